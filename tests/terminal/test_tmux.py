"""The menu in a real terminal: tmux presses the keys, and what it shows is compared.

Skipped where tmux is missing; with LLM_ROUTER_TEST_REQUIRE_TMUX that is a failure.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm_router
from exchanges import until
from fake_upstream import FakeUpstream, json_answer, model_answer

PROGRAM = Path(llm_router.__file__).resolve()
MISSING = not shutil.which("tmux") or not hasattr(os, "fork")
if MISSING and os.environ.get("LLM_ROUTER_TEST_REQUIRE_TMUX"):
    raise RuntimeError("tmux is missing")
pytestmark = pytest.mark.skipif(MISSING, reason="tmux is missing")

WAIT_S = 60


class Terminal:
    """A shell in tmux, `width` x `height`, with a home of its own."""

    def __init__(self, folder, width=80, height=24, **environ):
        self.folder = folder
        self.socket = str(folder / "tmux")
        self.file = folder / ".llm-router.json"
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "PS1": "$ ", "SHELL": "/bin/sh"}
        subprocess.run(
            ["tmux", "-S", self.socket, "-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height)]
            + ["-c", str(folder), "exec /bin/sh"],
            env=self.environ,
            check=True,
            timeout=30,
        )
        self.wait("$")
        for name, value in environ.items():
            self.type("export %s=%s\n" % (name, value))

    def tmux(self, *words):
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], capture_output=True, text=True, encoding="utf-8", timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def keys(self, *names):
        for name in names:
            self.tmux("send-keys", name)

    def type(self, text):
        self.tmux("send-keys", "-l", text)

    def screen(self):
        return "\n".join(line.rstrip() for line in self.tmux("capture-pane", "-p").split("\n")).rstrip("\n")

    def wait(self, *words):
        """Until the screen holds every one of the words; it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            shown = self.screen()
            if all(word in shown for word in words):
                return shown
            assert time.monotonic() < deadline, "no %r in\n%s" % (words, shown)
            time.sleep(0.03)

    def wait_for(self, want):
        """Until the screen is exactly that; else the difference fails."""
        deadline = time.monotonic() + WAIT_S
        while self.screen() != want and time.monotonic() < deadline:
            time.sleep(0.03)
        assert self.screen() == want

    def state(self):
        return self.tmux("display-message", "-p", "#{alternate_on} #{cursor_flag} #{pane_width}x#{pane_height}").strip()

    def stty(self):
        told = self.folder / "tty"
        told.unlink(missing_ok=True)
        self.type("stty -a > tty.new; mv tty.new tty\n")  # there only when it is whole, whatever the screen still shows
        deadline = time.monotonic() + WAIT_S
        while not told.exists():
            assert time.monotonic() < deadline, self.screen()
            time.sleep(0.03)
        return told.read_text()

    def start(self, *words):
        line = " ".join([sys.executable, str(PROGRAM), *words])
        self.type("clear; %s; echo code-is=$?\n" % line)
        return self.wait("llm-router", "enter")

    def pid(self):
        """Of the program in the terminal."""
        shell = self.tmux("display-message", "-p", "#{pane_pid}").strip()
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            found = subprocess.run(["pgrep", "-P", shell], capture_output=True, text=True).stdout.split()
            if found:
                return int(found[0])
        raise AssertionError("nothing runs in the terminal")

    def close(self):
        subprocess.run(["tmux", "-S", self.socket, "kill-server"], capture_output=True, timeout=30)


@pytest.fixture
def terminal(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(width=80, height=24, **environ):
            made = Terminal(tmp_path, width, height, **environ)
            stack.callback(made.close)
            return made

        yield make


DOCUMENT = {
    "version": 1,
    "masterKey": "master-key-0123456789",
    "defaultModel": "one/m1",
    "providers": [
        {"id": "one", "name": "第一 one", "baseUrl": "http://127.0.0.1:9/v1", "apiKey": "key-0123456789abcdef", "models": ["m1", "模型"]},
        {"id": "two", "baseUrl": "http://127.0.0.1:9/v1", "apiKey": "key-0123456789abcdef", "models": ["m2"]},
    ],
}


def fill(folder, document=DOCUMENT):
    (folder / ".llm-router.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / ".llm-router.json").chmod(0o600)


def drawn(path, width, height, *keys):
    """What the pure view draws for the same keys."""
    settings = llm_router.settings_table(llm_router.read_settings({}, {})[0])
    facts = llm_router.Facts(str(path), (), settings)
    menu = llm_router.make_menu(json.loads(path.read_text(encoding="utf-8")), facts)
    for key in keys:
        menu, _ = llm_router.update(menu, key)
    lines = llm_router.view(menu, width, height)
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines).rstrip("\n")


def answer(call):
    if call.header("authorization") != "Bearer sk-typed-0123456789":
        return json_answer(401, {"error": {"message": "bad key"}})
    if call.method == "GET":
        return json_answer(200, {"data": [{"id": "big"}, {"id": "small"}]})
    return model_answer(call.wire, False, "ok") if call.wire == "openai" else json_answer(404, {"error": {"message": "no"}})


def test_a_provider_is_added_tested_given_fallbacks_and_saved(terminal):
    """From nothing to a configuration that works, without documentation."""
    with FakeUpstream(handler=answer) as upstream:
        shell = terminal()
        shell.start()
        shell.keys("Enter", "a")
        shell.wait("Who is it?")
        shell.keys("End", "Enter")
        shell.wait("Add a provider › id")
        shell.type("mine\n")
        shell.wait("› baseUrl")
        shell.type(upstream.url + "/v1\n")
        shell.wait("› apiKey")
        shell.type("sk-typed-0123456789")
        assert "sk-typed" not in shell.wait("•" * 19)
        shell.keys("Enter")
        shell.wait("big", "small")
        shell.keys("Space", "Down", "Space", "Down", "Space", "Enter")
        shell.wait("added provider mine", "2 models")
        shell.keys("t")
        shown = shell.wait("Test of mine", "Keep what was learned")
        assert [line.split()[1:4] for line in shown.split("\n") if " openai " in line] == [
            ["big", "openai", "ok"],
            ["small", "openai", "ok"],
        ]
        shell.keys("Escape", "Escape", "Down", "Enter")
        shell.wait("Fallbacks", "mine/big")
        shell.keys("Enter", "Space", "Enter")
        shell.wait("fallbacks of mine/big: mine/small")
        shell.keys("s")
        shell.wait("Save these changes")
        assert not shell.file.exists()
        shell.keys("Enter")
        shell.wait("saved to")
        shell.keys("q")
        shell.wait("code-is=0")
    document = json.loads(shell.file.read_text())
    assert document["defaultModel"] == "mine/big"
    assert document["providers"][0]["models"] == [{"id": "big", "fallbackModels": ["mine/small"]}, "small"]
    assert document["providers"][0]["apiKey"] == "sk-typed-0123456789"
    assert shell.file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("width, height", [(80, 24), (40, 10)])
def test_the_terminal_shows_what_the_view_draws(tmp_path, terminal, width, height):
    fill(tmp_path)
    shell = terminal(width, height)
    shell.start()
    path = ()
    for pressed, keys in (
        ((), ()),
        (("Enter",), ("enter",)),
        (("Enter",), ("enter",)),
        (("Down", "Down", "Enter"), ("down", "down", "enter")),
        (("Escape", "End", "?"), ("esc", "end", "?")),
    ):
        shell.keys(*pressed)
        path += keys
        shell.wait_for(drawn(tmp_path / ".llm-router.json", width, height, *path))


def test_a_window_that_changes_its_size_is_drawn_anew(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    shell.start()
    shell.keys("Enter")
    shell.wait("第一 one")
    for width, height in ((40, 10), (100, 30), (20, 5), (80, 24)):
        shell.tmux("resize-window", "-x", str(width), "-y", str(height))
        want = drawn(tmp_path / ".llm-router.json", width, height, "enter")
        shell.wait_for(want)
    shell.keys("q")
    shell.wait("code-is=0")


def test_leaving_restores_the_terminal(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    before = shell.stty()
    shell.start()
    assert shell.state() == "1 0 80x24"
    shell.keys("Escape")
    shell.wait("code-is=0")
    assert shell.state() == "0 1 80x24"
    assert shell.stty() == before


@pytest.mark.parametrize("name, code", [("TERM", 143), ("HUP", 129)])
@pytest.mark.parametrize("keys", [(), ("Enter", "Enter", "Enter")])
def test_a_signal_leaves_a_sane_terminal(tmp_path, terminal, name, code, keys):
    fill(tmp_path)
    shell = terminal()
    before = shell.stty()
    shell.start()
    shell.keys(*keys)
    subprocess.run(["kill", "-" + name, str(shell.pid())], check=True)
    shell.wait("code-is=%d" % code)
    assert shell.state() == "0 1 80x24"
    assert shell.stty() == before


def test_a_signal_while_a_provider_is_asked_ends_at_once(tmp_path, terminal):
    fill(tmp_path)
    with FakeUpstream() as upstream:
        fill(tmp_path, dict(DOCUMENT, providers=[dict(DOCUMENT["providers"][0], baseUrl=upstream.url)]))
        from fake_upstream import hang_before_head

        upstream.handler = lambda call: hang_before_head()
        shell = terminal()
        shell.start()
        shell.keys("Enter", "t")
        shell.wait("Testing …")
        shell.keys("Escape")
        shell.wait("stopped")
        shell.keys("t")
        shell.wait("Testing …")
        subprocess.run(["kill", "-TERM", str(shell.pid())], check=True)
        shell.wait("code-is=143")


def test_an_exception_in_a_screen_leaves_a_sane_terminal(tmp_path, terminal):
    fill(tmp_path)
    (tmp_path / "broken.py").write_text(
        "import sys\nsys.path.insert(0, %r)\nimport llm_router as r\nview = r.view\n"
        "def broken(menu, width, height):\n    if len(menu.frames) > 1:\n        raise ZeroDivisionError('oh')\n"
        "    return view(menu, width, height)\n"
        "r.view = broken\nsys.exit(r.main([]))\n" % str(PROGRAM.parent)
    )
    shell = terminal()
    before = shell.stty()
    shell.type("clear; %s broken.py; echo code-is=$?\n" % sys.executable)
    shell.wait("llm-router", "enter")
    shell.keys("Enter")
    shell.wait("code-is=1", "ZeroDivisionError: oh")
    assert shell.state() == "0 1 80x24"
    assert shell.stty() == before


def test_ctrl_c_asks_when_there_are_changes_and_then_ends(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    before = shell.stty()
    shell.start()
    shell.keys("Enter", "d")
    shell.wait("unsaved")
    shell.keys("C-c")
    shell.wait("Unsaved changes")
    shell.keys("C-c")
    shell.wait("code-is=130")
    assert shell.stty() == before
    assert json.loads(shell.file.read_text()) == DOCUMENT


def test_what_of_another_writers_change_goes_is_shown_before_it_is_overwritten(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    shell.start()
    shell.keys("Enter", "Down", "Space")
    shell.wait("two enabled: false")
    (tmp_path / "new").write_text(json.dumps(dict(DOCUMENT, metadata={"by": "an editor"})))
    os.replace(tmp_path / "new", shell.file)
    shell.keys("s", "Enter")
    shell.wait("changed meanwhile", "Keep yours")
    shell.keys("Down", "Enter")
    shell.wait("Save these changes", '"by": "an editor"', '"enabled": false')
    shell.keys("Enter")
    shell.wait("saved to")
    document = json.loads(shell.file.read_text())
    assert "metadata" not in document
    assert document["providers"][1]["enabled"] is False


@pytest.mark.parametrize(
    "environ",
    [
        {"NO_COLOR": "1"},
        {"TERM": "vt100"},
        {"TERM": "linux"},
        {"LANG": "C", "LC_ALL": "POSIX"},
        {"LC_ALL": "xx_XX.UTF-8"},  # ssh passes on what is not installed here
    ],
)
def test_other_terminals_show_the_same_words(tmp_path, terminal, environ):
    fill(tmp_path)
    shell = terminal(**environ)
    shell.start()
    shell.keys("Enter")
    shown = shell.wait("one", "two", "space on/off")
    assert len(shown.split("\n")) == 24
    if "NO_COLOR" in environ:
        colors = shell.tmux("capture-pane", "-p", "-e")
        assert not any("\033[3%d" % color in colors or "\033[38" in colors for color in range(1, 8))
    shell.keys("q")
    shell.wait("code-is=0")


def test_what_deploy_asks_is_asked_in_the_terminal_and_the_menu_comes_back(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    shell.start()
    shell.keys("Down", "Down", "Down", "Down", "Down", "Down", "Down", "Down", "Down", "Enter")
    shell.wait("[Y/n]")
    assert shell.state().startswith("0 1")
    shell.keys("n", "Enter")
    shell.wait("Enter goes back to the menu")
    shell.keys("Enter")
    shell.wait("Deploy", "enter open")
    shell.keys("Enter")
    until(lambda: shell.screen().count("[Y/n]") == 2, WAIT_S)  # what was there the last time is seen at once
    shell.keys("C-c")
    shell.wait("interrupted", "Enter goes back to the menu")
    shell.keys("Enter")
    shell.wait("Deploy", "enter open")
    shell.keys("q")
    shell.wait("code-is=0")


def test_a_terminal_that_cannot_draw_gets_numbered_prompts(tmp_path, terminal):
    fill(tmp_path)
    shell = terminal()
    before = shell.stty()
    shell.type("clear; TERM=dumb %s %s; echo code-is=$?\n" % (sys.executable, PROGRAM))
    shell.wait("1  Providers", ">")
    shell.type("5\n2\n")  # Master key, Type one
    shell.wait("(not shown)")
    shell.type("typed-key-0123456789\n")
    assert "typed-key-01" not in shell.wait("master key set")
    shell.type("q\n2\n")
    shell.wait("code-is=0")
    assert shell.stty() == before


def test_pasted_text_is_never_taken_for_keys(tmp_path, terminal):
    fill(tmp_path)
    made = terminal()
    made.start("config")
    made.keys("Enter")
    made.wait("Providers", "d remove")
    made.keys("C-z")
    made.wait("$")
    made.type("clear; fg\n")  # a shell in between ends the terminal's marking of what is pasted
    made.wait("Providers", "d remove")
    made.keys("Down")
    made.wait("›● two")
    made.tmux("set-buffer", "d\nd\n")
    made.tmux("paste-buffer", "-p")
    made.wait("nothing is typed here")
    made.keys("Enter")
    made.wait("two", "apiKeyEnv")
    made.keys("Down", "Down", "Enter", "C-u")
    made.wait("where the provider's API is")
    made.tmux("set-buffer", "http://127.0.0.1:7/\nv1\n")
    made.tmux("paste-buffer", "-p")
    made.wait("› http://127.0.0.1:7/ v1")
    made.keys("Escape", "Escape", "Escape", "q")
    deadline = time.monotonic() + WAIT_S
    while made.state().startswith("1"):  # the menu's own screen
        assert time.monotonic() < deadline, made.screen()
        time.sleep(0.03)
    assert json.loads(made.file.read_text(encoding="utf-8")) == DOCUMENT


@pytest.mark.parametrize("sequence", ["[4~", "[8~", "[F", "OF"])
def test_keys_work_also_where_a_terminal_sends_them_otherwise_than_its_name_says(tmp_path, terminal, sequence):
    fill(tmp_path)
    made = terminal()
    made.start("config")
    made.type("\x1b" + sequence)
    made.wait("shows the changes first")
    made.keys("q")
    made.wait("code-is=0")
