"""EDITS: changes to a configuration as functions of the raw document."""

import copy
import json
import time

import pytest

import llm_router as r

DOCUMENT = {
    "$schema": "kept",
    "version": 1,
    "master-key": "old-key",
    "defaultModel": "fast",
    "modelAliases": {"fast": "a/m1", "both": ["a/m1", "b/m2"], "only": ["a/m3"]},
    "future": {"kept": [1, 2.5, None, "ü"]},
    "providers": [
        {
            "id": "a",
            "base-url": "https://a.example/v1",
            "apiKey": "key-a",
            "rateLimits": [{"kept": True}],
            "headers": {"x-one": "1", "x-gone": None},
            "models": [
                {"id": "m1", "aliases": ["one"], "fallbackModels": ["b/m2", "a/m3"], "note": "kept"},
                {"id": "off", "enabled": False},
                "m3",
            ],
        },
        {
            "id": "b",
            "baseUrl": "https://b.example",
            "apiKey": "key-b",
            "models": [{"id": "m2", "fallbackModels": ["fast"]}],
        },
        {"id": "c", "enabled": False, "baseUrl": "x", "models": []},
    ],
}

FIELDS = {"baseUrl": "https://n.example", "apiKey": "key-n", "models": ["x"]}
NEW = dict(FIELDS, id="n")


def upsert(document, id, **fields):
    return r.upsert_provider(document, id, fields).document


def provider(document, id):
    return next(p for p in document["providers"] if p["id"] == id)


EDITS = {
    "upsert-new": lambda d: r.upsert_provider(d, "n", FIELDS),
    "upsert-old": lambda d: r.upsert_provider(d, "a", {"name": "A", "models": ["m1", "m3", "m4"]}),
    "remove-provider": lambda d: r.remove_provider(d, "b"),
    "remove-model": lambda d: r.remove_model(d, "a", "m3"),
    "set-model-fallbacks": lambda d: r.set_model_fallbacks(d, "b", "m2", ["a/m1"]),
    "clear-fallbacks": lambda d: r.set_model_fallbacks(d, "a", "m1", []),
    "set-model-alias": lambda d: r.set_model_alias(d, "new", ["a/m1"]),
    "remove-alias": lambda d: r.set_model_alias(d, "both", []),
    "set-default-model": lambda d: r.set_default_model(d, "b/m2"),
    "set-master-key": lambda d: r.set_master_key(d, "new-key"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_leaves_its_document_alone_and_says_what_it_did(name):
    before = copy.deepcopy(DOCUMENT)
    edit = EDITS[name](DOCUMENT)
    assert before == DOCUMENT
    assert edit.document != DOCUMENT
    assert edit.notes
    assert not any("key-" in note or "new-key" in note for note in edit.notes)


@pytest.mark.parametrize("name", EDITS)
def test_unknown_keys_and_disabled_entries_survive_every_edit(name):
    document = EDITS[name](DOCUMENT).document
    assert (document["$schema"], document["future"]) == ("kept", DOCUMENT["future"])
    assert provider(document, "c") == DOCUMENT["providers"][2]
    a = provider(document, "a")
    assert a["rateLimits"] == [{"kept": True}]
    assert {"id": "off", "enabled": False} in a["models"]
    assert a["models"][0]["note"] == "kept"


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_brings_in_no_error(name):
    assert not [p for p in r.find_problems(EDITS[name](DOCUMENT).document) if p.level == "error"]


@pytest.mark.parametrize("name", [name for name in EDITS if not name.startswith("remove")])
def test_an_edit_done_twice_is_done_once(name):
    once = EDITS[name](DOCUMENT).document
    assert EDITS[name](once).document == once


# ----- upsert-provider -----


def test_a_new_provider_is_stored_as_given():
    document = r.upsert_provider(
        r.NEW_DOCUMENT,
        "openrouter",
        {
            "name": "OpenRouter",
            "baseUrl": "https://openrouter.ai/api/v1",
            "apiKey": "sk-or-v1-...",
            "models": ["gpt-4o", "claude-3-7-sonnet-latest"],
            "format": "openai",
        },
    ).document
    assert document["providers"] == [
        {
            "id": "openrouter",
            "name": "OpenRouter",
            "baseUrl": "https://openrouter.ai/api/v1",
            "apiKey": "sk-or-v1-...",
            "format": "openai",
            "models": [{"id": "gpt-4o"}, {"id": "claude-3-7-sonnet-latest"}],
        }
    ]
    assert r.NEW_DOCUMENT == {"version": 1, "providers": []}


def test_the_first_provider_of_all_gives_the_default_model_and_no_later_one_does():
    document = upsert(r.NEW_DOCUMENT, **NEW)
    assert document["defaultModel"] == "n/x"
    assert upsert(document, "o", **FIELDS)["defaultModel"] == "n/x"
    assert upsert(dict(r.NEW_DOCUMENT, defaultModel="n/x"), **NEW)["defaultModel"] == "n/x"
    assert "defaultModel" not in upsert(r.NEW_DOCUMENT, **dict(NEW, models=["*"]))


def test_models_are_taken_as_given_whatever_their_names():
    """`llama` and `grok` are names like any other, and so are ids with slashes."""
    names = ["llama", "grok", "meta-llama/Llama-3.3-70B", "a:b", "*", "GPT-4o", "ünï"]
    assert [m["id"] for m in upsert(r.NEW_DOCUMENT, **dict(NEW, models=names))["providers"][0]["models"]] == names


def test_an_upsert_changes_what_it_was_given_and_keeps_the_rest():
    a = provider(upsert(DOCUMENT, "a", name="A"), "a")
    assert a == dict(DOCUMENT["providers"][0], name="A")


def test_an_upsert_finds_the_provider_whatever_the_case_and_keeps_the_id():
    document = upsert(DOCUMENT, "B", name="Bee")
    assert [p["id"] for p in document["providers"]] == ["a", "b", "c"]
    assert provider(document, "b")["name"] == "Bee"


def test_models_that_were_there_keep_their_objects_and_disabled_ones_stay():
    edit = r.upsert_provider(DOCUMENT, "a", {"models": ["m4", "m3", "m1", "m4"]})
    old = DOCUMENT["providers"][0]["models"]
    assert provider(edit.document, "a")["models"] == [{"id": "m4"}, "m3", old[0], old[1]]


def test_models_no_longer_given_leave_the_list_and_are_named():
    edit = r.upsert_provider(
        EDITS["remove-alias"](EDITS["clear-fallbacks"](DOCUMENT).document).document,
        "b",
        {"models": ["m5"]},
    )
    assert [m["id"] for m in provider(edit.document, "b")["models"]] == ["m5"]
    assert "no longer listed: m2" in edit.notes


def test_references_to_models_no_longer_given_go_with_them_and_are_named():
    edit = r.upsert_provider({**DOCUMENT, "defaultModel": "b/m2"}, "b", {"models": ["m5"]})
    assert "defaultModel" not in edit.document and edit.document["modelAliases"]["both"] == ["a/m1"]
    assert provider(edit.document, "a")["models"][0]["fallbackModels"] == ["a/m3"]
    assert edit.notes[-3:] == ("a/m1 no longer falls back to b/m2", "the default model was b/m2", "there is no default model")
    assert not [problem for problem in r.find_problems(edit.document) if problem.level == "error"]


def test_a_changed_field_gets_its_canonical_spelling():
    a = provider(upsert(DOCUMENT, "a", baseUrl="https://new.example"), "a")
    assert a["baseUrl"] == "https://new.example"
    assert "base-url" not in a


def test_headers_and_urls_per_format_are_merged():
    a = provider(upsert(DOCUMENT, "a", headers={"X-One": "2", "x-two": "3"}), "a")
    assert a["headers"] == {"x-gone": None, "X-One": "2", "x-two": "3"}
    one = upsert(DOCUMENT, "b", baseUrlByFormat={"anthropic": "https://b.example/anthropic"})
    two = upsert(one, "b", baseUrlByFormat={"openai": "https://b.example/v1"})
    assert provider(two, "b")["baseUrlByFormat"] == {
        "anthropic": "https://b.example/anthropic",
        "openai": "https://b.example/v1",
    }


def test_a_url_per_format_replaces_the_one_under_the_older_format_name():
    document = upsert(DOCUMENT, "b", baseUrlByFormat={"anthropic": "https://b.example/x"})
    provider(document, "b")["baseUrlByFormat"] = {"claude": "https://old.example"}
    assert provider(upsert(document, "b", baseUrlByFormat={"anthropic": "https://new.example"}), "b")[
        "baseUrlByFormat"
    ] == {"anthropic": "https://new.example"}


def test_a_url_for_one_format_leaves_an_older_entry_for_all_of_them():
    document = copy.deepcopy(DOCUMENT)
    entry = provider(document, "b")
    entry["endpoints"] = [entry.pop("baseUrl")]
    b = provider(upsert(document, "b", baseUrlByFormat={"anthropic": "https://c.example"}), "b")
    assert b["baseUrlByFormat"] == {"anthropic": "https://c.example"}
    assert b["baseUrl"] == entry["endpoints"] and "endpoints" not in b


@pytest.mark.parametrize(
    ("formats", "given", "expected"),
    [
        (None, {"format": "anthropic"}, None),
        (["openai"], {"format": "anthropic"}, ["anthropic"]),
        (["openai", "responses"], {"format": "anthropic"}, ["openai", "responses", "anthropic"]),
        (["claude", "openai"], {"format": "anthropic"}, ["claude", "openai"]),
        (["openai"], {"format": "anthropic", "formats": ["openai"]}, ["openai", "anthropic"]),
        (["openai"], {"formats": ["responses"]}, ["responses"]),
    ],
)
def test_the_preferred_format_is_always_among_the_formats(formats, given, expected):
    document = copy.deepcopy(DOCUMENT)
    if formats:
        document["providers"][1]["formats"] = formats
    b = provider(upsert(document, "b", **given), "b")
    assert b.get("formats") == expected
    assert b.get("format") == given.get("format")


def test_the_auth_type_changes_and_the_rest_of_auth_stays():
    document = copy.deepcopy(DOCUMENT)
    document["providers"][1]["auth"] = {"type": "header", "headerName": "api-key", "kept": 1}
    assert provider(upsert(document, "b", auth={"type": "none"}), "b")["auth"] == {
        "type": "none",
        "headerName": "api-key",
        "kept": 1,
    }


@pytest.mark.parametrize(("missing", "flag"), [("baseUrl", "--base-url"), ("models", "--models")])
def test_a_new_provider_needs_a_url_and_models(missing, flag):
    with pytest.raises(r.UsageError, match=flag):
        upsert(DOCUMENT, **{k: v for k, v in NEW.items() if k != missing})


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "has space"},
        {"baseUrl": "http://user:pass@x.example"},
        {"baseUrl": "nope"},
        {"format": "soap"},
        {"formats": ["soap"]},
        {"headers": {"a b": "x"}},
        {"headers": {"x": "a\r\nb"}},
        {"auth": {"type": "basic"}},
        {"apiKey": "a\nb"},
        {"apiKeyEnv": "sk-not-a-name"},
        {"models": ["x", ""]},
    ],
    ids=repr,
)
def test_an_upsert_with_an_unusable_value_is_refused_with_the_cure(fields):
    with pytest.raises(r.UsageError, match="; "):
        upsert(DOCUMENT, **dict(NEW, **fields))


def test_a_document_that_is_already_broken_elsewhere_can_still_be_edited():
    document = copy.deepcopy(DOCUMENT)
    document["providers"][1]["baseUrl"] = "broken"
    assert provider(upsert(document, "b", baseUrl="https://b.example"), "b")["baseUrl"] == "https://b.example"
    assert r.set_master_key(document, "x").document["masterKey"] == "x"


@pytest.mark.parametrize("as_map", [False, True])
def test_providers_as_an_object_become_a_list_and_lose_nothing(as_map):
    raw = {"baseUrl": "https://a.example", "apiKey": "k", "models": ["m"], "kept": 1}
    document = {"providers": {"a": raw, "b": raw} if as_map else dict(raw, id="a")}
    new = upsert(document, "a", name="A")
    assert provider(new, "a") == dict(raw, id="a", name="A")
    assert len(new["providers"]) == (2 if as_map else 1)


# ----- removals -----


def test_removing_a_provider_removes_every_reference_to_it_and_says_so():
    edit = r.remove_provider(DOCUMENT, "A")
    assert [p["id"] for p in edit.document["providers"]] == ["b", "c"]
    assert edit.document["modelAliases"] == {"both": ["b/m2"]}
    assert "defaultModel" not in edit.document
    assert provider(edit.document, "b")["models"] == [{"id": "m2", "fallbackModels": []}]
    text = "\n".join(edit.notes)
    for word in (
        "removed provider a",
        "removed alias fast",
        "removed alias only",
        "default model",
        "b/m2 no longer falls back",
    ):
        assert word in text


def test_removing_the_last_provider_leaves_an_empty_list():
    document = upsert(r.NEW_DOCUMENT, **NEW)
    assert r.remove_provider(document, "n").document == {"version": 1, "providers": []}


def test_removing_a_model_removes_references_by_any_of_its_names():
    document = r.set_model_fallbacks(DOCUMENT, "b", "m2", ["one", "a/m1", "a/m3"]).document
    document = r.remove_model(document, "a", "a/m1").document
    assert [m if isinstance(m, str) else m["id"] for m in provider(document, "a")["models"]] == ["off", "m3"]
    assert provider(document, "b")["models"][0]["fallbackModels"] == ["a/m3"]
    assert document["modelAliases"] == {"both": ["b/m2"], "only": ["a/m3"]}


def test_a_removed_model_leaves_no_reference_that_now_reads_as_an_alias():
    document = {**DOCUMENT, "modelAliases": {"m3": "a/m1", "both": ["m3", "b/m2"]}, "defaultModel": "both"}
    assert r.remove_model(document, "a", "m3").document["modelAliases"] == {"m3": "a/m1", "both": ["b/m2"]}


def test_a_reference_that_was_unknown_before_is_not_touched_by_a_removal():
    document = dict(copy.deepcopy(DOCUMENT), modelAliases={"fast": "a/m1", "typo": "b/m22"})
    assert r.remove_model(document, "a", "m3").document["modelAliases"]["typo"] == "b/m22"


def test_the_last_model_of_a_provider_cannot_be_removed():
    with pytest.raises(r.UsageError, match="remove-provider"):
        r.remove_model(DOCUMENT, "b", "m2")


@pytest.mark.parametrize(
    ("edit", "near"),
    [
        (lambda: r.remove_provider({"providers": [{"id": "openrouter"}]}, "openruter"), "openrouter"),
        (lambda: r.remove_model({"providers": [{"id": "p", "models": ["gpt-4o", "x"]}]}, "p", "gpt-4"), "gpt-4o"),
        (lambda: r.set_model_fallbacks(DOCUMENT, "a", "m11", []), "m1"),
        (lambda: r.set_model_alias(DOCUMENT, "fst", []), "fast"),
        (lambda: r.set_default_model(DOCUMENT, "a/m11"), "a/m1"),
    ],
)
def test_what_is_not_there_is_refused_naming_what_is_near(edit, near):
    with pytest.raises(r.UsageError, match=near):
        edit()


# ----- fallbacks, aliases, default, key -----


def test_fallbacks_are_set_in_order_each_once_and_cleared():
    document = r.set_model_fallbacks(DOCUMENT, "a", "m3", ["b/m2", "a/m1", "b/m2"]).document
    assert provider(document, "a")["models"][2] == {"id": "m3", "fallbackModels": ["b/m2", "a/m1"]}
    document = r.set_model_fallbacks(document, "a", "m3", []).document
    assert provider(document, "a")["models"][2] == {"id": "m3"}


def test_a_model_is_found_by_id_ref_and_alias():
    for name in ("m1", "a/m1", "A/m1", "one"):
        document = r.set_model_fallbacks(DOCUMENT, "a", name, ["b/m2"]).document
        assert provider(document, "a")["models"][0]["fallbackModels"] == ["b/m2"]


def test_a_model_cannot_be_its_own_fallback_nor_have_an_unknown_one():
    with pytest.raises(r.UsageError, match="its own"):
        r.set_model_fallbacks(DOCUMENT, "a", "m1", ["A/m1"])
    with pytest.raises(r.UsageError, match="not configured"):
        r.set_model_fallbacks(DOCUMENT, "a", "m1", ["b/nope"])


def test_a_model_cannot_be_its_own_fallback_whatever_the_case_of_its_provider():
    document = upsert(r.NEW_DOCUMENT, **dict(NEW, id="Big"))
    with pytest.raises(r.UsageError, match="its own"):
        r.set_model_fallbacks(document, "big", "x", ["bIG/x"])


def test_an_alias_is_one_ref_or_a_list_and_may_be_a_pattern():
    assert r.set_model_alias(DOCUMENT, "x", ["a/m1"]).document["modelAliases"]["x"] == "a/m1"
    assert r.set_model_alias(DOCUMENT, "gpt-*", ["a/m1", "b/m2"]).document["modelAliases"]["gpt-*"] == ["a/m1", "b/m2"]


def test_removing_an_alias_removes_what_referred_to_it():
    document = r.set_model_alias(DOCUMENT, "fast", []).document
    assert "fast" not in document["modelAliases"]
    assert "defaultModel" not in document
    assert provider(document, "b")["models"] == [{"id": "m2", "fallbackModels": []}]


@pytest.mark.parametrize("alias", ["smart", " "])
def test_what_cannot_be_an_alias_is_refused(alias):
    with pytest.raises(r.UsageError):
        r.set_model_alias(DOCUMENT, alias, ["a/m1"])


def test_the_master_key_replaces_the_one_under_an_older_spelling():
    document = r.set_master_key(DOCUMENT, " new\n").document
    assert document["masterKey"] == "new"
    assert "master-key" not in document
    for bad in ("", "  ", "a\nb", "ü"):
        with pytest.raises(r.UsageError):
            r.set_master_key(DOCUMENT, bad)


# ----- masking -----


def test_a_masked_document_holds_no_secret_and_everything_else():
    secrets = ["top-secret-%02d-0123456789" % i for i in range(12)]
    document = {
        "masterKey": secrets[0],
        "master-key": secrets[1],
        "providers": [
            {
                "id": "p",
                "credential": secrets[2],
                "api-key": secrets[3],
                "baseUrl": "https://u:%s@x.example/v1?api_key=%s&v=2" % (secrets[4], secrets[5]),
                "baseUrlByFormat": {"openai": "https://x.example/?token=" + secrets[6]},
                "headers": {
                    "Authorization": "Bearer " + secrets[7],
                    "x-anything": secrets[8],
                    "user-agent": "me",
                    "x-gone": None,
                },
                "apiKeyEnv": "sk-" + secrets[9],
                "someToken": {"deep": [{"password": secrets[10]}]},
                "models": [{"id": "m", "maxOutputTokens": 5}],
            }
        ],
        "customSecret": [secrets[11]],
    }
    masked = r.mask_document(document)
    text = json.dumps(masked)
    assert not [secret for secret in secrets if secret in text]
    assert masked["providers"][0]["models"] == [{"id": "m", "maxOutputTokens": 5}]
    assert masked["providers"][0]["headers"]["user-agent"] == "me"
    assert masked["providers"][0]["headers"]["x-gone"] is None
    assert "v=2" in masked["providers"][0]["baseUrl"]


@pytest.mark.parametrize("as_map", [False, True])
def test_masking_reaches_providers_in_every_shape(as_map):
    raw = {"id": "p", "apiKey": "hunter2-hunter2-hunter2"}
    document = {"providers": {"p": raw} if as_map else raw}
    assert "hunter2-hunter2" not in json.dumps(r.mask_document(document))


def test_a_variable_name_is_no_secret():
    assert r.mask_document({"apiKeyEnv": "OPENAI_API_KEY"}, "provider") == {"apiKeyEnv": "OPENAI_API_KEY"}


def test_a_list_of_very_many_models_is_replaced_in_a_moment():
    document = {"providers": [{"id": "a", "baseUrl": "https://a.test", "models": ["old-%d" % i for i in range(60_000)]}]}
    began = time.process_time()
    r._put_models(document["providers"][0], ["new-%d" % i for i in range(60_000)])
    assert time.process_time() - began < 10
    assert document["providers"][0]["models"][0] == {"id": "new-0"}


def test_a_model_is_found_by_its_only_alias_written_without_a_list():
    document = {"providers": [{"id": "a", "baseUrl": "https://a.test", "models": ["m1", {"id": "m2", "alias": "z"}]}]}
    assert r.remove_model(document, "a", "z").notes == ("removed model a/m2",)


@pytest.mark.parametrize("place", [("providers", 1), ("providers", 0, "models", 5), ("providers", 7, "models", 0)])
def test_what_is_no_longer_there_cannot_be_moved(place):
    """Another program may have changed the file since the menu read it."""
    document = {"providers": [{"id": "a", "baseUrl": "https://a.test", "models": ["m1"]}]}
    with pytest.raises(r.UsageError, match="no longer there"):
        r.move_entry(document, place, 1)


# --- new ids ---


def renamed(ref, place, id, **more):
    """The places of `ref` in a document once the entry at `place` has another id."""
    models = [{"id": "n", "fallbackModels": [ref]}, *more.pop("models", [])]
    urls = {"baseUrl": "http://127.0.0.1:1", "auth": {"type": "none"}}
    providers = [{"id": "a", "models": ["m", {"id": "off", "enabled": False}], **urls}, {"id": "b", "models": models, **urls}]
    document = {"defaultModel": ref, "modelAliases": {"x": ref, "y": [ref, "b/n"]}, "providers": providers, **more}
    new = r.set_field(document, place, "id", id).document
    return new.get("defaultModel"), new["modelAliases"], new["providers"][1]["models"][0]["fallbackModels"]


@pytest.mark.parametrize("ref", ["a/m", "A/m", "m"])
def test_a_new_id_of_a_model_is_taken_over_however_the_old_one_was_written(ref):
    assert renamed(ref, ("providers", 0, "models", 0), "mm") == ("a/mm", {"x": "a/mm", "y": ["a/mm", "b/n"]}, ["a/mm"])


@pytest.mark.parametrize(("ref", "expected"), [("a/m", "aa/m"), ("A/m", "aa/m"), ("m", "m")])
def test_a_new_id_of_a_provider_is_taken_over_wherever_it_is_named(ref, expected):
    assert renamed(ref, ("providers", 0), "aa") == (expected, {"x": expected, "y": [expected, "b/n"]}, [expected])


def test_a_new_id_changes_no_name_that_means_something_else():
    """The bare id means a model of another provider here, since the one that is renamed is disabled."""
    aliases = {"x": "off", "y": ["off", "b/n"]}
    assert renamed("off", ("providers", 0, "models", 1), "new", models=["off"]) == ("off", aliases, ["off"])


def test_a_new_id_changes_no_alias_of_the_old_name():
    document = {"defaultModel": "m", "modelAliases": {"m": "b/n"}, "providers": [dict(NEW, models=["m"]), dict(NEW, id="b", models=["n"])]}
    assert r.set_field(document, ("providers", 0, "models", 0), "id", "mm").document["defaultModel"] == "m"
