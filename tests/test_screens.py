"""SCREENS and VIEW: the menu without a terminal. Keys go in, states and lines come out."""

import copy
import os
import random
from pathlib import Path

import pytest

import llm_router as r

GOLDEN = Path(__file__).parent / "golden_screens.txt"  # written anew with LLM_ROUTER_TEST_WRITE_GOLDEN=1

DOCUMENT = {
    "version": 1,
    "masterKey": "master-key-0123456789",
    "defaultModel": "router/gpt-4o",
    "modelAliases": {"fast": "router/gpt-4o", "claude-*": ["anthropic/sonnet", "router/gpt-4o"]},
    "clientKeys": [{"name": "laptop", "sha256": "a" * 64}],
    "future": {"kept": True},
    "providers": [
        {
            "id": "router",
            "name": "Röuter 大",
            "base-url": "https://router.example/api/v1",
            "apiKey": "sk-or-v1-0123456789abcdef",
            "headers": {"x-title": "me"},
            "models": [{"id": "gpt-4o", "fallbackModels": ["anthropic/sonnet"]}, "mini", "模型-大"],
        },
        {"id": "anthropic", "baseUrl": "https://a.example", "apiKeyEnv": "ANTHROPIC_API_KEY", "models": ["sonnet"]},
        {"id": "spare", "enabled": False, "baseUrl": "http://10.0.0.1/v1", "models": ["*"]},
    ],
}
SETTINGS = r.settings_table(r.read_settings({}, {"LLM_ROUTER_PORT": "9000"})[0])[:12]
FACTS = r.Facts("/home/me/.llm-router.json", ("GROQ_API_KEY",), SETTINGS)
EMPTY = {"version": 1, "providers": []}
PROBED = (
    [
        ("gpt-4o", "yes", "openai", "ok", "200", "0.8 s", "bearer", ""),
        ("gpt-4o", "yes", "anthropic", "no", "404", "0.1 s", "bearer", "no such path"),
        ("mini", "no", "openai", "tentative", "429", "0.1 s", "bearer", "slow down"),
    ],
    {"formats": ["openai"]},
    "it lists 340 models",
)


def line_text(line):
    """A line without its styles."""
    return "".join(text for text, _ in line)


class Host:
    """A menu and what its host would do: effects are kept, and answered from `answers` by their kind."""

    def __init__(self, document=DOCUMENT, **answers):
        self.menu = r.make_menu(copy.deepcopy(document), FACTS)
        self.answers = dict({"key": "lr-made-key-0123456789"}, **answers)
        self.effects = []

    def press(self, *keys):
        for key in keys:
            self.tell(r.update(self.menu, key))
        return self

    def tell(self, result):
        self.menu, effect = result
        if effect is None:
            return
        self.effects.append(effect)
        answer = self.answers.get(effect.kind)
        if effect.kind == "save" and answer is None:
            answer = ("saved", "saved")
        if isinstance(answer, Exception):
            self.tell(r.update(self.menu, r.Told(effect.serial, error=str(answer))))
        elif answer is not None:
            self.tell(r.update(self.menu, r.Told(effect.serial, answer)))

    def type(self, text):
        return self.press("ctrl-u", *["space" if c == " " else c for c in text], "enter")

    def open(self, *labels):
        """Select the row whose first cell is the label, and open it; one label after the other."""
        for label in labels:
            self.select(label).press("enter")
        return self

    def select(self, label):
        names = [row.cells[0] for row in r.rows_of(self.menu)]
        assert label in names, names
        return self.press("home", *["down"] * names.index(label))

    def screen(self, width=80, height=24):
        return "\n".join(line_text(line).rstrip() for line in r.view(self.menu, width, height))

    @property
    def document(self):
        return self.menu.document

    def providers(self):
        return [provider["id"] for provider in self.document["providers"]]


# ----- golden screens -----

SHOTS = {
    "home": Host,
    "home-empty": lambda: Host(EMPTY),
    "providers": lambda: Host().open("Providers"),
    "presets": lambda: Host(EMPTY).open("Providers").press("a"),
    "new-provider": lambda: Host(EMPTY).open("Providers").press("a").open("OpenRouter"),
    "new-models": lambda: Host(EMPTY, models=["a", "b"]).open("Providers").press("a").open("Groq"),
    "added-provider": lambda: Host(EMPTY, models=["a"]).open("Providers").press("a").open("Groq").press("enter"),
    "provider": lambda: Host().open("Providers", "router"),
    "models": lambda: Host().open("Providers", "router", "models"),
    "fallbacks": lambda: Host().open("Fallbacks"),
    "pick": lambda: Host().open("Fallbacks", "router/gpt-4o").press("down", "space"),
    "input": lambda: Host().open("Providers", "router", "baseUrl"),
    "secret": lambda: Host().open("Providers", "router", "apiKey").press(*"sk-secret"),
    "default": lambda: Host().open("Default model"),
    "aliases": lambda: Host().open("Aliases"),
    "key-once": lambda: Host().open("Master key", "Generate a new one"),
    "settings": lambda: Host().open("Settings"),
    "setting": lambda: Host().open("Settings", "port"),
    "check": lambda: Host().open("Check"),
    "diff": lambda: Host().open("Providers").select("spare").press("d", "s"),
    "conflict": lambda: Host(save=("conflict", EMPTY)).open("Providers").press("d", "s", "enter"),
    "leave": lambda: Host().open("Providers").press("d", "q"),
    "test": lambda: Host(test=PROBED).open("Providers").press("t"),
    "busy": lambda: Host().open("Providers").press("t", "tick"),
    "error": lambda: Host().open("Providers", "router", "baseUrl").type("nonsense"),
    "help": lambda: Host().open("Providers").press("?"),
}
SIZES = ((80, 24), (40, 10))


def _golden():
    if not GOLDEN.exists():
        return {}
    parts = GOLDEN.read_text(encoding="utf-8").split("\n=== ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "%dx%d" % size)
@pytest.mark.parametrize("name", SHOTS)
def test_each_screen_looks_as_it_was_approved(name, size):
    shown = SHOTS[name]().screen(*size)
    assert shown == _golden()["%s %dx%d" % (name, *size)].rstrip("\n")


@pytest.mark.skipif("LLM_ROUTER_TEST_WRITE_GOLDEN" not in os.environ, reason="writes the approved screens anew")
def test_write_the_golden_screens():
    text = ["Screens of the menu as they were approved; tests/test_screens.py says how they are made."]
    for name, make in SHOTS.items():
        text += ["=== %s %dx%d\n%s" % (name, *size, make().screen(*size)) for size in SIZES]
    GOLDEN.write_text("\n".join(text) + "\n", encoding="utf-8")


# ----- whatever is pressed -----

KEYS = (
    "up down down down enter enter enter enter right esc a d t f J K space s u / ? q x z end pgdn backspace ctrl-u"
    " ctrl-c tick 大 \x00 é left delete home"
).split()
SCREENS = [(80, 24), (40, 10), (20, 6), (120, 40), (9, 3), (1, 1), (2, 30)]
SEQUENCES = int(os.environ.get("LLM_ROUTER_TEST_SEQUENCES", "2000"))
ANSWERS = {
    "key": ["lr-made"],
    "save": [("saved", "saved"), ("conflict", EMPTY), ("conflict", dict(DOCUMENT, defaultModel="fast"))],
    "models": [["m1", "模型"], [], [""]],
    "test": [
        ([("m1", "yes", "openai", "ok", "200", "1.0 s", "bearer", "")], {"formats": ["openai"]}, "words"),
        ([], {}, ""),
    ],
    "deploy": [DOCUMENT],
    "startup": ["not installed\nmore", ""],
}
ODD = [
    EMPTY,
    {},
    DOCUMENT,
    {"providers": {"a": {"baseUrl": "https://a.example", "models": "m"}, "b": {"models": {}}}},
    {"providers": [7, None, {"id": 5, "models": [3, None, {}]}, {"id": "x\x1b[31m", "models": "y"}], "modelAliases": 3},
    {"providers": "x", "clientKeys": [3, {"name": 5}], "corsOrigins": 7, "defaultModel": ["x"]},
]


def _random_walk(seed):
    dice = random.Random(seed)
    menu = r.make_menu(copy.deepcopy(dice.choice(ODD)), FACTS)
    pressed = []
    for _ in range(8):
        pressed.append(dice.choice(KEYS))
        menu, effect = r.update(menu, pressed[-1])
        for _ in range(3):
            if effect is None or effect.kind not in ANSWERS or dice.random() < 0.2:
                break
            value = dice.choice(ANSWERS[effect.kind])
            menu, effect = r.update(menu, r.Told(effect.serial, value, dice.choice(["", "", "", "it failed"])))
        width, height = dice.choice(SCREENS)
        lines = r.view(menu, width, height)
        assert len(lines) == height, pressed
        assert {r.text_width(line_text(line)) for line in lines} == {width}, pressed
        assert all(line_text(line).isprintable() for line in lines), pressed
    assert r.prompt_text(menu)


@pytest.mark.parametrize("block", range(8))
def test_no_sequence_of_keys_raises_and_every_line_fits(block):
    for seed in range(block * SEQUENCES // 8, (block + 1) * SEQUENCES // 8):
        _random_walk(seed)


def test_a_large_configuration_is_shown_in_part_around_the_selected_row():
    models = ["m%03d" % i for i in range(400)]
    host = Host({"providers": [{"id": "p", "baseUrl": "https://p.example", "models": models}]})
    host.open("Providers", "p", "models").press("end")
    assert "m399" in host.screen() and "m000" not in host.screen() and "↑" in host.screen()
    host.press("/").type("m12")
    assert "m120" in host.screen() and "m399" not in host.screen()


# ----- text that fits -----


def test_no_key_reads_the_whole_configuration_anew_until_it_changes(monkeypatch):
    host, scans, scan = Host(), [], r.scan_config
    monkeypatch.setattr(r, "scan_config", lambda *given: scans.append(len(given[0]["providers"])) or scan(*given))
    host.press("down")
    scans.clear()
    for key in ("up", "enter", "down", "up", "enter", "esc"):
        host.press(key).screen()
    assert max(scans) == 1  # a provider alone, for its row
    host.press("space")
    assert scans.count(3) >= 1 and r.rows_of(host.menu)[0].state == "off"


@pytest.mark.parametrize(
    "text, width, shown",
    [
        ("abc", 5, "abc  "),
        ("abcdef", 4, "abc…"),
        ("大大大", 6, "大大大"),
        ("大大大", 5, "大大…"),
        ("大大大", 4, "大… "),
        ("e\u0301e\u0301", 2, "e\u0301e\u0301"),
        ("a\x1b[31m\n", 7, "a·[31m·"),
        ("abc", 0, ""),
        ("大", 1, "…"),
    ],
)
def test_text_is_cut_and_filled_by_cells(text, width, shown):
    assert r.fit(text, width) == shown


def test_words_are_wrapped_by_cells_and_long_ones_broken():
    assert r.wrap("one two three", 8) == ["one two", "three"]
    assert r.wrap("大大大大", 4) == ["大大", "大大"]
    assert r.wrap("a\n\nb", 4) == ["a", "", "b"]
    assert len(r.wrap("x " * 100, 4, 3)) == 3


# ----- providers -----


def test_a_preset_asks_for_the_key_alone_and_is_complete():
    host = Host(EMPTY, models=["a", "b"]).open("Providers").press("a").open("OpenRouter")
    assert "Get a key at openrouter.ai" in host.screen()
    host.type("sk-new-key-0123456789")
    assert host.menu.front.screen == "pick"
    host.press("space", "down", "space", "enter")
    assert host.menu.front.screen == "providers" and "t tests it" in host.menu.note
    assert host.document["providers"] == [
        {
            "id": "openrouter",
            "name": "OpenRouter",
            "baseUrlByFormat": {"openai": "https://openrouter.ai/api/v1"},
            "apiKey": "sk-new-key-0123456789",
            "models": ["a"],
        }
    ]
    assert host.document["defaultModel"] == "openrouter/a"
    assert r.find_problems(host.document) == []


def test_a_preset_takes_the_key_from_a_variable_that_is_set():
    host = Host(EMPTY, models=["a"]).open("Providers").press("a").open("Groq").press("enter")
    assert host.document["providers"][0]["apiKeyEnv"] == "GROQ_API_KEY"
    assert host.document["defaultModel"] == "groq/llama-3.3-70b-versatile"


@pytest.mark.parametrize("row", r.PRESETS, ids=lambda row: row.id)
def test_every_preset_makes_a_provider_without_errors(row):
    host = Host(EMPTY, models=["a"]).open("Providers").press("a").open(row.name)
    if host.menu.front.screen == "input":
        host.type("sk-0123456789")
    host.press("enter")
    assert [p.level for p in r.find_problems(host.document) if p.level == "error"] == []
    assert host.providers() == [row.id]
    assert bool(row.keys) == bool(row.keys_at)


def test_a_second_account_at_the_same_preset_gets_an_id_of_its_own():
    host = Host(EMPTY, models=["a"]).open("Providers").press("a").open("Groq").press("enter")
    host.press("a").open("Groq").press("enter")
    assert host.providers() == ["groq", "groq2"]


def test_a_provider_can_be_described_by_its_url():
    host = Host(EMPTY, models=RuntimeError("refused"))
    host.open("Providers").press("a").open("Another one").type("mine").type("https://mine.example/v1").type("")
    assert host.menu.front.screen == "input"  # it lists nothing, so names are typed
    assert "refused" in host.screen()
    host.type("m1, m2")
    assert host.document["providers"] == [{"id": "mine", "baseUrl": "https://mine.example/v1", "models": ["m1", "m2"]}]


@pytest.mark.parametrize(
    "typed, words", [(("9",), "not a provider id"), (("Spare",), "already used"), (("mine", "nonsense"), "its scheme")]
)
def test_what_a_new_provider_cannot_have_is_refused_where_it_is_typed(typed, words):
    host = Host().open("Providers").press("a").open("Another one")
    for text in typed:
        host.type(text)
    assert host.menu.is_error and words in host.menu.note
    assert host.menu.front.typed == typed[-1]
    assert host.document == DOCUMENT
    assert host.press("esc").menu.front.screen == "presets"


def test_nothing_is_added_without_an_id_a_url_and_models():
    host = Host(EMPTY, models=["a"]).open("Providers").press("a").open("Another one").type("")
    assert "id: nothing was given" in host.menu.note
    assert "baseUrl: nothing was given" in host.type("mine").type("").menu.note
    host.type("https://mine.example").type("sk-0123456789")
    assert host.menu.front.screen == "pick"
    host.press("space", "enter")
    assert "models: nothing was given" in host.menu.note and host.document == EMPTY


def test_a_wrong_value_is_refused_in_its_dialog_with_the_cure():
    host = Host().open("Providers", "router", "baseUrl").type("nonsense")
    assert host.menu.front.screen == "input"
    assert host.menu.front.typed == "nonsense"
    assert "write it with its scheme" in host.menu.note
    assert host.document == DOCUMENT
    host.type("https://other.example")
    assert host.document["providers"][0]["baseUrl"] == "https://other.example"


def test_keys_are_never_shown_neither_typed_nor_stored():
    secret = "sk-or-v1-0123456789abcdef"
    host = Host().open("Providers", "router", "apiKey").press(*secret)
    assert secret not in host.screen() and "•" * len(secret) in host.screen()
    host.press("enter", "s")
    for name, make in SHOTS.items():
        if name != "key-once":
            shown = make().screen(200, 60)
            assert secret not in shown and "master-key-0123456789" not in shown, name


def test_a_key_is_kept_when_nothing_is_typed_and_removed_on_request():
    host = Host().open("Providers", "router", "apiKey").press("enter")
    assert host.document == DOCUMENT
    host.open("apiKey").type("-")
    assert "apiKey" not in host.document["providers"][0]


def test_a_new_id_is_taken_over_by_every_reference():
    host = Host().open("Providers", "anthropic", "id").type("claude")
    assert host.document["modelAliases"]["claude-*"] == ["claude/sonnet", "router/gpt-4o"]
    assert host.document["providers"][0]["models"][0]["fallbackModels"] == ["claude/sonnet"]
    host.press("esc").open("router", "models", "gpt-4o", "id").type("gpt-5")
    assert host.document["defaultModel"] == "router/gpt-5"
    assert host.document["modelAliases"]["fast"] == "router/gpt-5"
    assert r.find_problems(host.document) == r.find_problems(DOCUMENT)


def test_fields_are_set_by_the_editor_of_their_kind():
    host = Host().open("Providers", "router")
    host.open("format", "anthropic")
    assert "format" in host.document["providers"][0]
    host.open("timeouts", "idleMs").type("5000")
    host.press("esc").open("auth", "type", "x-api-key").press("esc")
    host.open("formats").press("space", "down", "space", "enter")
    host.open("headers").press("a").type("x-more: yes").press("esc")
    host.open("compat").type('{"a": [1]}')
    assert host.menu.note
    raw = host.document["providers"][0]
    assert raw["timeouts"] == {"idleMs": 5000}
    assert raw["auth"] == {"type": "x-api-key"}
    assert raw["formats"] == ["openai", "anthropic"]
    assert raw["headers"] == {"x-title": "me", "x-more": "yes"}
    assert raw["compat"] == {"a": [1]}
    host.open("timeouts").select("idleMs").press("d")
    assert "timeouts" not in host.document["providers"][0]


def test_every_field_of_the_table_has_a_row_and_opens_something():
    for kind, labels in (("provider", ("Providers", "router")), ("model", ("Providers", "router", "models", "gpt-4o"))):
        names = [row.cells[0] for row in r.rows_of(Host().open(*labels).menu)]
        assert sorted(names) == sorted(field.key for field in r.FIELDS[kind])
        for name in names:
            before = Host(models=["m"]).open(*labels)
            after = Host(models=["m"]).open(*labels, name)
            assert len(after.menu.frames) > len(before.menu.frames) or after.document != before.document, name


def test_providers_are_ordered_switched_and_removed():
    host = Host().open("Providers").press("J")
    assert host.providers() == ["anthropic", "router", "spare"]
    host.press("K", "K")
    assert host.providers() == ["router", "anthropic", "spare"]
    host.press("space")
    assert host.document["providers"][0]["enabled"] is False
    host.press("space")
    assert "enabled" not in host.document["providers"][0]
    host.press("d")
    assert host.providers() == ["anthropic", "spare"]
    assert "defaultModel" not in host.document
    assert "default model" in host.menu.note  # what went with it is said
    host.press("u")
    assert host.providers() == ["router", "anthropic", "spare"]
    assert host.document["defaultModel"] == "router/gpt-4o"


def test_testing_shows_progress_can_be_stopped_and_then_tells_nothing():
    host = Host().open("Providers").press("t")
    effect = host.effects[-1]
    assert effect.kind == "test"
    assert effect.args[0]["providers"][0]["apiKey"] == DOCUMENT["providers"][0]["apiKey"]
    host.tell(r.update(host.menu, r.Told(effect.serial, "2 of 5", is_progress=True)))
    assert "2 of 5" in host.screen()
    host.press("esc")
    assert host.effects[-1].kind == "cancel"
    host.tell(r.update(host.menu, r.Told(effect.serial, ["late"])))
    assert host.menu.front.screen == "providers"


def test_what_a_test_learned_can_be_kept():
    host = Host(test=PROBED).open("Providers").press("t").open("Keep what was learned")
    assert host.document["providers"][0]["formats"] == ["openai"]
    assert host.menu.front.screen == "providers"


def test_only_what_is_saved_is_deployed():
    host = Host(deploy=dict(DOCUMENT, masterKey="made while deploying")).open("Deploy")
    assert [effect.kind for effect in host.effects] == ["deploy"]
    assert host.document == host.menu.saved == dict(DOCUMENT, masterKey="made while deploying")
    host = Host().open("Providers").press("d", "esc").open("Deploy")
    assert not host.effects and "save first" in host.menu.note


def test_a_test_that_fails_says_why_and_leaves_the_menu_usable():
    host = Host(test=RuntimeError("refused")).open("Providers").press("t")
    assert host.menu.note == "refused" and host.menu.is_error
    assert host.menu.front.screen == "providers"


# ----- models, fallbacks, aliases -----


def test_models_are_added_from_the_listing_ordered_and_removed():
    host = Host(models=["mini", "new"]).open("Providers", "router", "models").press("a").select("new")
    host.press("space", "enter")
    ids = [m if isinstance(m, str) else m["id"] for m in host.document["providers"][0]["models"]]
    assert ids == ["gpt-4o", "mini", "模型-大", "new"]
    assert host.document["providers"][0]["models"][0] == DOCUMENT["providers"][0]["models"][0]
    host.press("home", "down", "J", "d")
    assert len(host.document["providers"][0]["models"]) == 3


def test_a_name_that_is_not_listed_can_be_typed():
    host = Host(models=["mini"]).open("Providers", "router", "models").press("a", "a").type("unlisted").press("enter")
    assert {"id": "unlisted"} in host.document["providers"][0]["models"]


def test_fallbacks_are_picked_and_reordered():
    host = Host().open("Fallbacks", "router/gpt-4o")
    host.select("router/mini").press("space", "K", "enter")
    assert host.document["providers"][0]["models"][0]["fallbackModels"] == ["router/mini", "anthropic/sonnet"]
    host.press("enter").press("space", "enter")
    assert host.document["providers"][0]["models"][0]["fallbackModels"] == ["anthropic/sonnet"]


def test_models_to_choose_from_are_named_once_and_no_model_is_its_own_fallback():
    host = Host({"providers": [{"id": "p", "baseUrl": "https://p.example", "models": [{"id": "m", "aliases": ["n"]}, "o", "*"]}]})
    host.open("Fallbacks", "p/m")
    assert [row.cells[0] for row in r.rows_of(host.menu)] == ["p/o"]


def test_a_model_without_an_id_gets_no_fallbacks_and_ends_nothing():
    host = Host({"providers": [{"id": "p", "baseUrl": "https://p.example", "models": [7, "m"]}]})
    host.open("Fallbacks").press("enter")
    assert host.menu.is_error and "no id" in host.menu.note
    assert host.menu.front.screen == "fallbacks"


def test_aliases_and_the_default_model_are_set_and_removed():
    host = Host().open("Aliases").press("a").type("mini*").select("router/mini").press("space", "enter")
    assert host.document["modelAliases"]["mini*"] == "router/mini"
    host.select("fast").press("d")
    assert "fast" not in host.document["modelAliases"]
    host.press("esc").open("Default model", "anthropic/sonnet")
    assert host.document["defaultModel"] == "anthropic/sonnet"
    host.open("Default model", "Another one").type("router/mini")
    assert host.document["defaultModel"] == "router/mini"


def test_a_name_that_cannot_be_an_alias_is_refused_where_it_is_typed():
    host = Host().open("Aliases").press("a").type("smart")
    assert host.menu.is_error and host.menu.note == "smart cannot be an alias; choose another name; for smart set defaultModel"
    assert host.menu.front.title == "New alias" and host.type("smarter").menu.front.title == "Alias smarter"


def test_who_asks_twice_to_quit_is_asked_once():
    host = Host().open("Providers").press("d", "q", "q")
    assert host.screen().count("Unsaved changes") == 1 and not host.effects
    assert host.press("esc").menu.front.screen == "providers"


# ----- keys of clients -----


def test_a_generated_master_key_is_shown_once_on_a_line_of_its_own():
    host = Host().open("Master key", "Generate a new one")
    assert "\n  lr-made-key-0123456789\n" in host.screen()
    assert host.document["masterKey"] == "lr-made-key-0123456789"
    assert "lr-made-key-0123456789" not in host.press("enter").screen()
    host.open("Master key", "Remove it")
    assert "masterKey" not in host.document


def test_a_clients_key_is_made_shown_once_and_kept_as_its_hash():
    host = Host().open("Client keys").press("a").type("phone")
    assert "lr-made-key-0123456789" in host.screen()
    assert [key["name"] for key in host.document["clientKeys"]] == ["laptop", "phone"]
    assert "lr-made" not in str(host.document)
    host.press("enter").select("laptop").press("d")
    assert [key["name"] for key in host.document["clientKeys"]] == ["phone"]


# ----- saving -----


def test_nothing_is_written_before_the_changes_were_shown():
    host = Host().open("Providers").select("spare").press("d", "s")
    assert not host.effects
    assert "-" in host.screen() and "Save these changes" in host.screen()
    assert '-      "baseUrl": "http://10.0.0.1/v1"' in host.select("See every line").press("enter").screen(80, 60)
    assert host.press("esc").menu.front.screen == "diff"
    host.press("enter")
    assert host.effects[-1].kind == "save"
    assert host.effects[-1].args == (DOCUMENT, host.document)
    assert host.menu.saved == host.document and not host.menu.past


def test_leaving_with_changes_asks_and_each_answer_does_what_it_says():
    assert Host().press("esc").effects == [r.Effect("quit", (0,))]
    host = Host().open("Providers").press("d", "q")
    assert not host.effects
    assert host.open("Stay").menu.front.screen == "providers"
    assert host.press("q").open("Quit without saving").effects == [r.Effect("quit", (0,))]
    host = Host().open("Providers").press("d", "q").open("Save and quit")
    assert [effect.kind for effect in host.effects] == ["save", "quit"]
    host = Host(save=RuntimeError("disk full")).open("Providers").press("d", "q").open("Save and quit")
    assert [effect.kind for effect in host.effects] == ["save"] and host.menu.note == "disk full"


def test_ctrl_c_goes_back_and_twice_it_ends_the_program():
    host = Host().open("Providers", "router", "baseUrl").press("ctrl-c")
    assert host.menu.front.screen == "provider"
    host.select("name").press("d", "ctrl-c")
    assert "Unsaved" in host.screen()
    assert host.press("ctrl-c").effects == [r.Effect("quit", (130,))]


def test_undo_goes_back_to_what_was_saved_step_by_step():
    host = Host().open("Providers").press("J", "space", "d")
    assert len(host.menu.past) == 3
    host.press("u", "u", "u")
    assert host.document == DOCUMENT
    assert host.press("u").menu.note == "nothing to undo"


def test_an_undo_that_takes_away_what_is_shown_closes_its_screen():
    host = Host(EMPTY, models=["a"]).open("Providers").press("a").open("Groq").press("enter").open("groq").press("u")
    assert host.document == EMPTY
    assert host.menu.front.screen == "providers"


def test_keeping_ones_own_over_another_writers_file_shows_first_what_of_it_goes():
    theirs = copy.deepcopy(DOCUMENT)
    theirs["modelAliases"]["new"] = "anthropic/sonnet"
    host = Host(save=("conflict", theirs)).open("Providers", "router", "baseUrl").type("https://mine.example")
    host.press("s", "enter")
    assert "changed meanwhile" in host.screen()
    host.open("Keep yours")
    assert host.document["providers"][0]["baseUrl"] == "https://mine.example"
    assert host.menu.saved == theirs and host.menu.front.screen == "diff"
    assert '-    "new": "anthropic/sonnet"' in host.screen()


def test_taking_another_writers_file_can_be_undone():
    host = Host(save=("conflict", EMPTY)).open("Providers").press("d", "s", "enter").open("Take the file")
    assert host.document == EMPTY
    host.press("u")
    assert host.providers() == ["anthropic", "spare"]


# ----- numbered prompts -----


def answer(host, line):
    host.menu, keys = r.answer_keys(host.menu, line)
    return host.press(*keys)


def test_the_same_screens_work_as_numbered_prompts():
    host = Host(EMPTY, models=["a", "b"])
    for line in ("1", "a", "3", "sk-typed-0123456789", "1", "2", ""):
        assert r.prompt_text(host.menu)
        answer(host, line)
    assert host.document["providers"][0]["id"] == "openrouter"
    assert host.document["providers"][0]["apiKey"] == "sk-typed-0123456789"
    assert host.document["providers"][0]["models"] == ["a"]
    answer(host, "99")
    assert "no number 99" in r.prompt_text(host.menu)
    answer(host, "d 1")
    assert host.document["providers"] == []


def test_an_empty_answer_at_a_prompt_leaves_a_value_and_a_dash_clears_it():
    host = Host()
    for line in ("1", "1", "2"):  # Providers, router, name
        answer(host, line)
    assert "[Röuter 大] empty leaves it" in r.prompt_text(host.menu)
    answer(host, "")
    assert host.document == DOCUMENT and host.menu.front.screen == "provider"
    answer(answer(host, "1"), "not an id!")
    assert host.menu.is_error
    assert answer(host, "").menu.front.screen == "provider"
    answer(answer(host, "2"), "-")
    assert "name" not in host.document["providers"][0]


def test_a_row_that_is_not_there_is_not_taken_for_the_last_one():
    host = answer(answer(Host(), "1"), "d 4")
    assert "no number 4" in host.menu.note
    assert host.document == DOCUMENT


def test_a_list_of_models_that_nobody_waits_for_is_typed():
    host = Host().open("Providers", "router", "models").press("a", "esc")
    assert host.effects[-1].kind == "cancel"
    assert host.menu.front.screen == "input"
    host.type("gpt-4o, mini")
    assert len(host.document["providers"][0]["models"]) == 2


def test_urls_by_format_have_a_form_with_a_row_for_each_format():
    host = Host().open("Providers", "router", "baseUrlByFormat", "anthropic").type("https://router.example/anthropic")
    assert host.document["providers"][0]["baseUrlByFormat"] == {"anthropic": "https://router.example/anthropic"}


# ----- what is shown where -----


def keys_line(host, width=80):
    return host.screen(width).rpartition("\n")[2]


def test_only_keys_that_do_something_are_shown():
    assert keys_line(Host(EMPTY).open("Providers")) == " a add  esc back  ? help"
    assert keys_line(Host(test=([], {}, "")).open("Providers").press("t")) == " esc back  ? help"
    host = Host(test=PROBED).open("Providers").press("t")
    assert "enter" not in keys_line(host) and "enter choose" in keys_line(host.press("end"))


def test_a_change_shows_how_it_is_saved_on_every_screen_of_the_usual_width():
    host = Host().open("Providers").press("space")
    for labels in ((), ("router",), ("models",)):
        assert "s save" in keys_line(host.open(*labels))


@pytest.mark.parametrize(
    "document, label",
    [
        ({"providers": [5, DOCUMENT["providers"][0]]}, "Providers"),
        ({"providers": "x"}, "Providers"),
        (dict(DOCUMENT, defaultModel="nobody/x"), "Default model"),
        (dict({k: v for k, v in DOCUMENT.items() if k != "defaultModel"}, **{"default-model": "nobody/x"}), "Default model"),
        (dict(DOCUMENT, modelAliases={"smart": ["router/mini"]}), "Aliases"),
        (dict(DOCUMENT, masterKey=5), "Master key"),
        (dict(DOCUMENT, clientKeys=[{}]), "Client keys"),
        (dict(DOCUMENT, corsOrigins=["*"]), "Browser access"),
    ],
)
def test_a_problem_marks_the_row_where_it_can_be_mended(document, label):
    assert {row.cells[0]: row.state for row in r.rows_of(Host(document).menu)}[label] == "error"


def test_a_provider_without_a_usable_id_has_its_place_on_the_first_screen():
    host = Host({"providers": [{"id": "a b"}, {"baseUrl": "https://a.example"}, {"id": "c"}]})
    assert r.rows_of(host.menu)[0].cells == ("Providers", "a b, ?, c")


def test_a_key_variable_that_nobody_set_is_told_as_validate_tells_it():
    row = r.rows_of(Host().open("Providers").menu)[1]
    assert (row.state, row.cells[3]) == ("warning", "$ANTHROPIC_API_KEY")
    assert "the variable ANTHROPIC_API_KEY is not set here" in row.hint
    document = copy.deepcopy(DOCUMENT)
    document["providers"][1]["apiKeyEnv"] = "GROQ_API_KEY"
    assert r.rows_of(Host(document).open("Providers").menu)[1].state == "ok"


def test_a_form_marks_the_fields_that_are_wrong_and_says_the_cure():
    document = {"providers": [{"id": "a", "baseUrl": "a.example", "format": "x", "apiKey": "k", "models": ["m", {"id": ""}]}]}
    rows = {row.cells[0]: row for row in r.rows_of(Host(document).open("Providers", "a").menu)}
    assert {name for name, row in rows.items() if row.state == "error"} == {"baseUrl", "format", "models"}
    assert "write it with its scheme" in rows["baseUrl"].hint
    host = Host(document).open("Providers", "a", "models", "?")
    assert {row.cells[0]: row.state for row in r.rows_of(host.menu)}["id"] == "error"


@pytest.mark.parametrize(
    "path, screen, row",
    [
        ("providers[0].id", "provider", "id"),
        ("providers[0].timeouts.idleMs", "provider", "timeouts"),
        ("providers[0].models[1].fallbackModels[0]", "form", "fallbackModels"),
        ("providers[0].modles", "provider", "id"),
        ("defaultModel", "choose", None),
        ("modelAliases.fast", "aliases", None),
        ("clientKeys[0].name", "clients", None),
        ("providers.a.baseUrl", "providers", None),
        ("nobody", "text", None),
        ("", "text", None),
    ],
)
def test_a_problem_leads_to_where_it_can_be_mended(path, screen, row):
    menu = r.SCREENS["check"].keys["enter open"](Host().open("Check").menu, r.Problem(path, "is wrong", "mend it"))
    assert menu.front.screen == screen
    assert row is None or r.rows_of(menu)[menu.front.at].cells[0] == row


def test_what_is_wrong_is_mended_from_the_check_and_then_gone():
    document = {"providers": [{"id": "a", "baseUrl": "a.example", "apiKey": "k", "models": ["m"]}]}
    host = Host(document).open("Check").press("enter", "enter").type("https://a.example/v1").press("esc")
    assert host.menu.front.screen == "check" and "Nothing is wrong" in host.screen()


def test_enter_adds_where_there_is_nothing_yet_but_not_where_a_filter_hides_all():
    assert Host(EMPTY).open("Providers").press("enter").menu.front.screen == "presets"
    host = Host().open("Providers").press("/").type("nothing is called so").press("enter")
    assert host.menu.front.screen == "providers"


def test_escape_shows_all_rows_again_before_it_goes_back():
    host = Host().open("Providers").press("/").type("spare").press("esc")
    assert host.menu.front.screen == "providers" and len(r.rows_of(host.menu)) == 3
    assert host.press("esc").menu.front.screen == "home"


def test_the_first_screen_names_the_file_and_counts_the_changes():
    host = Host()
    assert r.rows_of(host.menu)[-1].cells == ("Save", "no changes to /home/me/.llm-router.json")
    host.open("Providers").press("space", "J", "esc")
    assert r.rows_of(host.menu)[-1].cells == ("Save", "2 changes to /home/me/.llm-router.json")


def test_what_is_set_is_marked_among_the_choices():
    states = {row.item: row.state for row in r.rows_of(Host().open("Default model").menu)}
    assert states.pop("router/gpt-4o") == "ok" and set(states.values()) == {""}


def test_a_bad_value_is_refused_also_where_a_bad_one_was():
    host = Host({"providers": [{"id": "no id"}]}).open("Providers", "no id", "id").type("no id, too")
    assert host.menu.is_error and host.menu.note.startswith("providers[0].id: is not a provider id")
    host = Host(dict(DOCUMENT, corsOrigins=["*"])).open("Browser access", "corsOrigins").type("http://*.example")
    assert host.menu.is_error and host.document["corsOrigins"] == ["*"]


def test_the_changes_can_be_saved_and_undone_where_they_are_shown():
    host = Host().open("Providers").press("space", "s")
    assert host.menu.front.screen == "diff"
    host.press("s")
    assert host.effects[-1].kind == "save" and [frame.screen for frame in host.menu.frames] == ["home", "providers"]
    host.press("space", "s", "u")
    assert not host.menu.is_unsaved and host.menu.front.screen == "providers"


def test_a_comma_that_moves_is_no_change():
    assert r.diff_lines({"a": 1}, {"a": 1, "b": [2]}) == ['   "a": 1', '+  "b": [', "+    2", "+  ]", " }"]


# ----- pasted text -----


def test_pasted_text_is_typed_and_its_line_breaks_accept_nothing():
    host = Host(EMPTY).open("Providers").press("a").open("Another one").press("a", "c", "left")
    host.press(r.Pasted("b\r\nb\x1b[31m\u200b"))
    assert (host.menu.front.screen, host.menu.front.typed, host.menu.front.at) == ("input", "ab b[31mc", 8)


def test_a_pasted_key_loses_its_line_breaks():
    host = Host().open("Providers", "router", "apiKey")
    host.press(r.Pasted(" sk-one\r\n  two\r"), "enter")
    assert host.document["providers"][0]["apiKey"] == "sk-onetwo"


@pytest.mark.parametrize("where", ["Providers", "Default model", "Check"])
def test_no_list_takes_pasted_text_for_keys(where):
    host = Host().open(where)
    front = host.menu.front
    host.press(r.Pasted("d\r\nspace"))
    assert host.menu.front == front and host.document == DOCUMENT and host.menu.is_error


# ----- numbered prompts: what no line below tells -----


def test_a_prompt_tells_each_problem_and_what_a_row_without_a_value_is_for():
    text = r.prompt_text(Host({"providers": [{"id": "a", "models": []}]}).open("Providers").menu)
    assert "  1  a  0 models  openai  no key (error) - providers[0].models: has no models; add at least one" in text
    assert "t N test, d N remove, space N on/off, J N move" in text
    assert "  proxy - its own HTTP proxy" in r.prompt_text(Host().open("Providers", "router").menu)


def test_a_row_is_switched_and_moved_by_its_number():
    host = answer(Host(), "1")
    assert answer(host, "space 2").document["providers"][1]["enabled"] is False
    assert answer(host, "J 1").providers() == ["anthropic", "router", "spare"]


@pytest.mark.parametrize("key", ["d", "space", "J", "K", "t"])
def test_a_prompt_asks_for_which_row_a_key_is_where_there_are_several(key):
    host = answer(answer(Host(), "1"), key)
    assert host.document == DOCUMENT and host.effects == [] and "number" in host.menu.note
    assert answer(host, "d 2").providers() == ["router", "spare"]
    assert answer(host.open("router"), "t").effects[-1].kind == "test"  # of the provider that is shown


def test_a_prompt_says_what_an_empty_line_does_and_nothing_twice():
    assert r.prompt_text(Host().menu).endswith("number, ? help, or empty for quit")
    assert r.prompt_text(Host().open("Providers").menu).endswith("or empty for back")
    picking = r.prompt_text(Host().open("Fallbacks", "router/gpt-4o").menu)
    assert picking.endswith("number to pick, J N move, a type, / filter, or empty when done")
    tested = r.prompt_text(Host(test=PROBED).open("Providers").press("t").menu)
    assert tested.count("no such path") == 1


def test_a_new_provider_is_stored_in_the_usual_order_and_its_first_named_model_is_the_default():
    host = Host(EMPTY, models=["a", "b"]).open("Providers").press("a").open("Another one").type("mine")
    host.type("http://localhost/v1").type("sk-0123456789").press("down", "space", "enter")
    assert list(host.document["providers"][0]) == ["id", "baseUrl", "apiKey", "models"]
    assert host.document["providers"][0]["models"] == ["*", "a"] and host.document["defaultModel"] == "mine/a"


def test_the_title_follows_a_new_id():
    host = Host().open("Providers", "router", "id").type("best")
    assert host.screen().startswith(" llm-router › Providers › best ")


@pytest.mark.parametrize("urls", ["https://a.example", ["https://a.example"]])
def test_one_url_for_every_format_stays_when_another_is_added(urls):
    document = {"providers": [{"id": "a", "endpoints": urls, "apiKey": "k", "models": ["m"]}]}
    host = Host(document).open("Providers", "a", "baseUrlByFormat", "anthropic").type("https://a.example/anthropic")
    new = host.document["providers"][0]
    assert (new["baseUrl"], new["baseUrlByFormat"]) == (urls, {"anthropic": "https://a.example/anthropic"})


@pytest.mark.parametrize("key", ["auth", "authByFormat", "timeouts", "headers"])
@pytest.mark.parametrize("value", [["x"], "x", 5])
def test_a_form_opens_also_where_no_object_stands(key, value):
    host = Host({"providers": [{"id": "a", "baseUrl": "http://localhost", key: value, "models": ["m"]}]})
    assert host.open("Providers", "a", key).screen().count("\n") == 23


@pytest.mark.parametrize("typed, value", [("deepseek", "deepseek"), ('{"a": 1}', {"a": 1}), ("", None)])
def test_what_may_be_anything_may_be_a_word(typed, value):
    host = Host().open("Providers", "router", "compat").type(typed)
    assert host.document["providers"][0].get("compat") == value


def test_where_there_is_little_room_only_what_changes_is_shown():
    host = Host().open("Providers").select("spare").press("space", "s")
    assert '-      "enabled": false' in host.screen(40, 10)


@pytest.mark.parametrize(
    "where, widths",
    [
        (("Providers", "router", "baseUrl"), {40: "enter accept  ctrl-u clear  esc back", 30: "enter accept  esc back", 18: "enter accept"}),
        (("Providers",), {40: "enter open  a add  esc back  ? help", 30: "enter open  esc back  ? help", 24: "enter open  esc back"}),
    ],
)
def test_a_narrow_screen_keeps_what_goes_on_and_what_goes_back(where, widths):
    host = Host().open(*where)
    assert {width: keys_line(host, width).strip() for width in widths} == widths
