"""TERMINAL and the menu's effects, without a terminal; tests/terminal drives the real thing."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import llm_router as r

PROGRAM = Path(r.__file__).resolve()
BASE = {"version": 1, "providers": [{"id": "p", "baseUrl": "https://p.example", "models": ["m"]}]}


@pytest.fixture
def home(tmp_path):
    (tmp_path / ".llm-router.json").write_text(json.dumps(BASE))
    (tmp_path / ".llm-router.json").chmod(0o600)
    return tmp_path


def run(home, *words, stdin="", **more):
    env = dict(os.environ, HOME=str(home), USERPROFILE=str(home), PYTHONIOENCODING="utf-8", **more)
    return subprocess.run(
        [sys.executable, str(PROGRAM), *words],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=env,
        timeout=60,
    )


def stored(home):
    return json.loads((home / ".llm-router.json").read_text(encoding="utf-8"))


# ----- where nothing can be drawn -----


@pytest.mark.parametrize("words", [(), ("config",)])
def test_without_a_terminal_the_masked_summary_is_shown_and_nothing_waits(home, words):
    env = dict(os.environ, HOME=str(home), USERPROFILE=str(home))
    read, write = os.pipe()  # nobody ever writes or closes it
    try:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *words], stdin=read, capture_output=True, text=True, env=env, timeout=60
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0
    assert "https://p.example" in done.stdout


def test_the_menu_as_prompts_adds_a_provider_and_saves_it(home):
    (home / ".llm-router.json").unlink()
    # Providers, add, Ollama, any model, save, Save these changes, quit
    lines = ["1", "a", "13", "*", "s", "1", "q"]
    done = run(home, "config", "--prompts", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert stored(home)["providers"][0]["id"] == "ollama"
    assert "saved to" in done.stdout
    assert '+      "id": "ollama"' in done.stdout


def test_prompts_that_end_before_they_are_saved_say_so_and_leave_the_file_alone(home):
    before = (home / ".llm-router.json").read_bytes()
    done = run(home, "--prompts", stdin="1\nd 1\n")
    assert done.returncode == 1
    assert "not saved" in done.stdout
    assert (home / ".llm-router.json").read_bytes() == before
    assert run(home, "--prompts", stdin="1\n").returncode == 0


def test_a_broken_file_is_shown_with_its_place_and_left_alone(home):
    (home / ".llm-router.json").write_text('{"version": 1,, }')
    done = run(home, "--prompts", stdin="\n")
    assert done.returncode == 2
    assert "^" in done.stderr
    assert (home / ".llm-router.json").read_text() == '{"version": 1,, }'


# ----- what the menu has done -----


def save(home, base, document, path=None):
    effects = r.menu_effects(str(path or home / ".llm-router.json"), {})
    return effects["save"](None, base, document)


CHANGED = dict(BASE, defaultModel="p/m")


def test_saving_is_private_and_keeps_what_was_there(home):
    file = home / ".llm-router.json"
    file.chmod(0o644)
    state, words = save(home, BASE, CHANGED)
    assert state == "saved"
    assert stored(home) == CHANGED
    assert json.loads((home / ".llm-router.json.bak").read_text()) == BASE
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
        assert "0644" in words


def test_a_file_that_was_changed_meanwhile_is_not_touched(home):
    theirs = dict(BASE, metadata={"by": "an editor"})
    (home / "new").write_text(json.dumps(theirs))
    os.replace(home / "new", home / ".llm-router.json")  # as editors save
    assert save(home, BASE, CHANGED) == ("conflict", theirs)
    assert stored(home) == theirs
    assert save(home, theirs, CHANGED)[0] == "saved"


def test_a_file_that_only_looks_different_is_no_conflict(home):
    (home / ".llm-router.json").write_text(json.dumps(BASE, indent=7))
    assert save(home, BASE, CHANGED)[0] == "saved"


def test_a_file_that_was_removed_meanwhile_is_made_again(home):
    (home / ".llm-router.json").unlink()
    assert save(home, BASE, CHANGED)[0] == "saved"
    assert stored(home) == CHANGED


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_a_link_stays_a_link_and_what_it_leads_to_is_written(home):
    (home / "real").mkdir()
    os.replace(home / ".llm-router.json", home / "real" / "router.json")
    (home / ".llm-router.json").symlink_to("real/router.json")
    assert save(home, BASE, CHANGED)[0] == "saved"
    assert (home / ".llm-router.json").is_symlink()
    assert json.loads((home / "real" / "router.json").read_text()) == CHANGED


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a directory that cannot be written")
def test_a_directory_that_cannot_be_written_is_told_and_nothing_is_lost(home):
    home.chmod(0o500)
    try:
        with pytest.raises(r.RouterError):
            save(home, BASE, CHANGED)
    finally:
        home.chmod(0o700)
    assert stored(home) == BASE


def test_the_whole_way_from_a_key_to_the_file(home):
    """The menu's own effects, not doubles: what update asks for is what the host can do."""
    path = str(home / ".llm-router.json")
    effects = r.menu_effects(path, {})
    menu = r.make_menu(BASE, r.Facts(path, (), ()))
    assert set(effects) >= {"save", "key", "models", "test", "startup", "deploy"}
    told = queue.SimpleQueue()
    for key in ("enter", "space", "s", "enter"):
        menu, effect = r.update(menu, key)
        if effect is not None:
            r.Job(effect, told.put).run(effects)
            menu, _ = r.update(menu, told.get())
    assert stored(home)["providers"][0]["enabled"] is False
    assert menu.note.startswith("saved to")


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_a_deployment_given_up_at_a_question_leaves_the_menu_with_what_was_stored_before_it(home, monkeypatch, key):
    def deploy(given):
        given.edit(lambda document: r.set_master_key(document, "made-meanwhile"))
        raise key

    monkeypatch.setattr(r, "run_deploy", deploy)
    document = r.menu_effects(str(home / ".llm-router.json"), {})["deploy"](None)
    assert document["masterKey"] == "made-meanwhile"


def test_without_a_configuration_there_is_nothing_to_deploy_and_the_menu_goes_on_as_it_was(tmp_path, capsys):
    assert r.menu_effects(str(tmp_path / "none.json"), {})["deploy"](None) == r.NEW_DOCUMENT
    assert "no configuration" in capsys.readouterr().out


def test_an_effect_that_breaks_becomes_a_note_and_not_a_traceback():
    told = queue.SimpleQueue()

    def broken(job):
        raise ZeroDivisionError("oh")

    r.Job(r.Effect("x", (), 7), told.put).run({"x": broken})
    assert told.get() == r.Told(7, error="ZeroDivisionError: oh")


def test_a_job_tells_how_far_it_is():
    told = queue.SimpleQueue()
    r.Job(r.Effect("x", (1,), 7), told.put).run({"x": lambda job, n: job.tell("half") or n})
    assert [told.get(), told.get()] == [r.Told(7, "half", is_progress=True), r.Told(7, 1)]


def test_a_test_asks_the_provider_with_what_is_not_saved_yet(make_upstream):
    from fake_upstream import json_answer, model_answer

    def answer(call):
        if call.method == "GET":
            return json_answer(200, {"data": [{"id": "m1"}, {"id": "m2"}]})
        return model_answer(call.wire, False, "ok") if call.wire == "openai" else json_answer(404, {"error": "no"})

    upstream = make_upstream(answer)
    provider = {"id": "p", "baseUrl": upstream.url + "/v1", "apiKey": "the-key-0123456789", "models": ["m1"]}
    effects = r.menu_effects("/nowhere", {})
    job = r.Job(r.Effect("test"), lambda told: None)
    table, learned, words = effects["test"](job, {"providers": [provider]})
    assert [row[2:4] for row in table if row[3] == "ok"] == [("openai", "ok")]
    assert learned["formats"] == ["openai"]
    assert "2 models" in words
    assert effects["models"](job, {"providers": [provider]}) == ["m1", "m2"]
    job.is_cancelled = True
    assert effects["test"](job, {"providers": [provider]})


def test_what_a_command_prints_and_warns_of_never_runs_over_the_screen(capfd):
    def command(given):
        print("done", given.x)
        print("warning: odd", file=sys.stderr)
        return 0

    assert r._printed(command, r.Given({}, {"x": 1})) == "done 1\nwarning: odd"
    assert capfd.readouterr() == ("", "")


def test_windows_gets_prompts_whatever_goes_by_the_name_of_curses_there(monkeypatch, capsys):
    """windows-curses knows no SIGCONT, and Git Bash sets TERM."""
    monkeypatch.setitem(sys.modules, "curses", SimpleNamespace(setupterm=lambda: None))
    monkeypatch.setattr(r, "os", SimpleNamespace(name="nt", environ={"TERM": "xterm"}))
    monkeypatch.setattr(r, "_run_prompts", lambda menu, effects: 5)
    assert r.run_menu(r.make_menu({}, r.Facts()), {}) == 5


def test_signals_that_end_the_program_are_taken_and_given_back(monkeypatch):
    def ended(menu, effects):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(r, "_run_prompts", ended)
    before = signal.getsignal(signal.SIGTERM)
    assert r.run_menu(r.make_menu({}, r.Facts()), {}, plain=True) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_style_of_the_view_has_its_attributes():
    import test_screens

    used = set()
    for make in test_screens.SHOTS.values():
        for size in test_screens.SIZES:
            used |= {style for line in r.view(make().menu, *size) for _, style in line}
    plain = {"", "lead", "value", "mark"}
    assert used - plain <= set(r._STYLES)


def test_every_sign_of_the_view_has_a_stand_in_for_terminals_without_utf8():
    import test_screens

    for name, make in test_screens.SHOTS.items():
        shown = make().screen(80, 24).translate(r.TO_ASCII)
        assert set(filter(lambda c: not c.isascii(), shown)) <= set("öü模型大"), name


class Keyboard:
    """A window of curses that takes in all that is drawn; `keys` are pressed, and functions called in their place."""

    encoding = "utf-8"

    def __init__(self, *keys):
        self.keys = iter(keys)

    def get_wch(self):
        key = next(self.keys)
        return key() or 0 if callable(key) else key  # 0: a key that nobody knows

    def getmaxyx(self):
        return 24, 80

    def __getattr__(self, name):
        return lambda *_: None


class Curses(SimpleNamespace):
    error = ValueError

    def __getattr__(self, name):
        return 0 if name.startswith("A_") else lambda *_: None


def test_ctrl_c_while_the_file_is_saved_stops_that_and_keeps_the_changes(monkeypatch):
    """It waits for another program that is writing the file, and perhaps for a slow disk."""

    def save(job, base, document):
        raise KeyboardInterrupt

    def look():
        assert painter._menu.is_unsaved and painter._menu.note == "stopped"

    monkeypatch.setitem(sys.modules, "curses", Curses())
    monkeypatch.setattr(r, "_bracket_pasted", lambda wanted: None)
    document = {"providers": [{"id": name, "baseUrl": "http://localhost", "models": ["m"]} for name in "ab"]}
    painter = r._Painter(r.make_menu(document, r.Facts()), {"save": save}, [])
    assert painter.run(Keyboard("\n", "d", "s", "\n", look, "q", "j", "\n")) == 0


def test_a_signal_that_an_effect_takes_for_ctrl_c_ends_the_menu_all_the_same(monkeypatch):
    ended = []

    def deploy(job):
        ended.append(signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "curses", Curses())
    monkeypatch.setattr(r, "_bracket_pasted", lambda wanted: None)
    monkeypatch.setattr("builtins.input", lambda *_: "")
    menu = r.make_menu({"providers": []}, r.Facts())
    with pytest.raises(KeyboardInterrupt):
        r._Painter(menu, {"deploy": deploy}, ended).run(Keyboard(*"jjjjjjjjj\n", lambda: pytest.fail("it goes on")))


def test_what_a_lent_terminal_is_for_is_not_kept_from_it_by_a_command_that_was_left(monkeypatch):
    """A service's tool may hang: Esc leaves it, its thread goes on and keeps what is printed meanwhile."""
    began, ends, seen, real, threads = threading.Event(), threading.Event(), [], sys.stdout, []

    def startup(job, verb):
        def wait(given):
            threads.append(threading.current_thread())
            began.set()
            ends.wait(30)

        return r._printed(wait, None)

    def deploy(job):
        seen.append(sys.stdout)
        ends.set()
        return {"providers": []}

    def begun():
        assert began.wait(30)

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # given back afterwards
        monkeypatch.setattr(sys, "__%s__" % name, real)
    monkeypatch.setitem(sys.modules, "curses", Curses())
    monkeypatch.setattr(r, "_bracket_pasted", lambda wanted: None)
    monkeypatch.setattr("builtins.input", lambda *_: "")
    menu = r.make_menu({"providers": []}, r.Facts())
    keys = [*"jjjjjjjj\n", begun, "q", "j", "\n", "q"]
    assert r._Painter(menu, {"startup": startup, "deploy": deploy}, []).run(Keyboard(*keys)) == 0
    threads[0].join(30)  # or it would give the streams back in the next test
    assert seen == [real]


def test_prompts_that_are_interrupted_say_what_is_not_saved(monkeypatch, capsys):
    answers = iter(["1", "d 1"])

    def answer(*_):
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", answer)
    document = {"providers": [{"id": name, "baseUrl": "http://localhost", "models": ["m"]} for name in "ab"]}
    assert r.run_menu(r.make_menu(document, r.Facts()), {}, plain=True) == 130
    assert capsys.readouterr().out.endswith("not saved: the input ended\n")
    answers = iter(["1", "d 1", "s", "1"])
    assert r.run_menu(r.make_menu(document, r.Facts()), {"save": answer}, plain=True) == 130
    assert capsys.readouterr().out.endswith("Saving ...\n\nnot saved: the input ended\n")
