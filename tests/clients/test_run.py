"""The real agents through `run`: the origin refuses, the fallback speaks the other format, a tool is called; and what
Claude Code and Codex do beside that: model picker, windows, fallback model, sessions that are taken up again."""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm_router
from fake_upstream import FakeUpstream, final_text, json_answer, tool_results, tool_round_trip
from real_clients import HERE, MODEL, WIRES, missing, native
from running_router import clean_environment, config_of, provider

PROGRAM = str(Path(llm_router.__file__))
QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "CLAUDE_CODE_MAX_RETRIES": "1",
}
CODEX = (
    "exec --skip-git-repo-check -c approval_policy=never -c sandbox_mode=danger-full-access -c analytics.enabled=false"
)


@pytest.fixture
def upstreams():
    """(the address of a port where nobody listens, makes the fallback's FakeUpstream)."""
    started = []

    def make(handler):
        started.append(FakeUpstream(handler).start())
        return started[-1]

    yield make
    for upstream in started:
        upstream.stop()


def prepare(home, upstream, wire, program, name, **more):
    """The configuration in `home` and the program on a PATH of its own."""
    dead = dict(provider(upstream, wire, id="origin", models=[{"id": MODEL, "fallbackModels": ["spare/" + MODEL]}]))
    dead["baseUrl"] = "http://127.0.0.1:9/v1"
    document = config_of(dead, provider(upstream, wire, id="spare", models=[MODEL]), defaultModel="origin/" + MODEL)
    return install(home, dict(document, **more), program, name)


def install(home, document, program, name):
    """The same with a whole configuration."""
    (home / ".llm-router.json").write_text(json.dumps(document))
    (home / ".llm-router.json").chmod(0o600)
    tools = home / "tools"
    tools.mkdir()
    (tools / name).symlink_to(program)
    return "%s%s%s" % (tools, os.pathsep, os.environ["PATH"])


@pytest.mark.parametrize("wire", ["openai", "responses"])
def test_claude_code_runs_against_another_format_after_a_fallback(run_agent, project, upstreams, wire):
    home, folder = project
    upstream = upstreams(tool_round_trip("Bash", {"command": "cat hello.txt", "description": "x"}, "It says {result}"))
    path = prepare(home, upstream, wire, native("@anthropic-ai", "claude-code", "claude*"), "claude")
    words = ["run", "claude", "-p", "read hello.txt", "--allowedTools", "Bash Read", "--output-format", "json"]
    done = run_agent(sys.executable, PROGRAM, *words, home=home, cwd=folder, PATH=path, **QUIET)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "hello from file" in json.loads(done.stdout)["result"]
    assert any("hello from file" in result for result in tool_results(upstream.calls[-1].json))


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_codex_runs_against_another_format_after_a_fallback(run_agent, project, upstreams, wire):
    home, folder = project
    upstream = upstreams(tool_round_trip("exec_command", {"cmd": "cat hello.txt"}, "It says {result}"))
    path = prepare(home, upstream, wire, native("@openai", "codex", "vendor/*/bin/codex*"), "codex")
    (home / "codex").mkdir()
    words = ["run", "codex", *CODEX.split(), "read hello.txt"]
    done = run_agent(sys.executable, PROGRAM, *words, home=home, cwd=folder, PATH=path, CODEX_HOME=str(home / "codex"))
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"hello from file" in done.stdout
    assert any("hello from file" in result for result in tool_results(upstream.calls[-1].json))
    assert list((home / "codex").glob("config.toml")) == []


OPENCODE = {
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
}
CAT = {"command": "cat hello.txt", "description": "x"}


def find_opencode():
    for folder in (
        "opencode-linux-x64-baseline",
        "opencode-linux-x64",
        "opencode-linux-arm64",
        "opencode-darwin-arm64",
    ):
        program = HERE / "node_modules" / folder / "bin" / "opencode"
        if program.is_file():
            return str(program)
    return missing("opencode is not installed: run `npm ci --ignore-scripts` in tests/clients")


def find_qwen():
    program = HERE / "node_modules" / "@qwen-code" / "qwen-code" / "cli.js"
    if not program.is_file() or shutil.which("node") is None:
        missing("@qwen-code/qwen-code or node is not installed: run `npm ci --ignore-scripts` in tests/clients")
    return str(program)


def find_llm():
    program = Path(sys.executable).parent / "llm"
    if not program.is_file():
        missing("llm is not installed beside this Python: pip install -r tests/clients/requirements.txt")
    return str(program)


# tool -> (finds its program, the tool it is to call and with what, its words, its environment, what comes back)
OTHERS = {
    "opencode": (find_opencode, ("bash", CAT), ["opencode", "run", "read hello.txt"], OPENCODE, "hello from file"),
    "qwen": (find_qwen, ("run_shell_command", dict(CAT, is_background=False)), ["qwen", "--yolo", "-p", "read hello.txt"], {}, "hello from file"),
    "llm": (find_llm, ("llm_version", {}), ["--", "llm", "-m", "gpt-4o-mini", "-T", "llm_version", "which?"], {}, "0."),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs timeout(1)")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("tool", sorted(OTHERS))
def test_other_agents_run_over_each_upstream_format_after_a_fallback(run_agent, project, upstreams, tool, wire):
    find, call, words, env, told = OTHERS[tool]
    home, folder = project
    program = find()
    upstream = upstreams(tool_round_trip(*call, "It says {result}"))
    path = prepare(home, upstream, wire, program, tool, modelAliases={"gpt-*": "origin/" + MODEL})
    guarded = ["timeout", "-k", "3", "250", sys.executable, PROGRAM, "run"]  # opencode does not end on SIGTERM
    done = run_agent(*guarded, *words, home=home, cwd=folder, PATH=path, **env)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert told.encode() in done.stdout
    assert any(told in result for result in tool_results(upstream.calls[-1].json))
    assert {call.wire for call in upstream.calls} == {wire}
    assert sorted(path.name for path in folder.iterdir()) == ["hello.txt"]


# ----- Claude Code: models, windows, sessions -----

CLAUDE_OFFLINE = dict(QUIET, HTTPS_PROXY="http://127.0.0.1:9")
del CLAUDE_OFFLINE["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"]  # asking for the models counts as such


@pytest.fixture
def claude(run_agent, project, upstreams):
    """`claude(handler, document_of, *words, before=(), **env)`: Claude Code through `run`; its home as claude.home."""
    home, folder = project

    class Claude:
        def __init__(self):
            self.home, self.folder, self.path, self.upstream = home, folder, "", None

        def prepare(self, handler, wire="openai", models=(MODEL,), **more):
            self.upstream = upstreams(handler)
            document = config_of(provider(self.upstream, wire, models=list(models)), **more)
            self.path = install(home, document, native("@anthropic-ai", "claude-code", "claude*"), "claude")
            return self

        def run(self, *words, before=(), **env):
            line = [sys.executable, PROGRAM, "run", *before, "claude", *words]
            done = run_agent(*line, home=home, cwd=folder, PATH=self.path, **{**QUIET, **env})
            assert done.returncode == 0, (done.stdout, done.stderr)
            return done.stdout.decode()

    return Claude()


def test_claude_code_knows_the_window_of_the_model_and_counts_its_context(claude):
    models = [{"id": MODEL, "contextWindow": 150_000}]
    claude.prepare(final_text(), models=models, modelAliases={"claude-mine": "fake/" + MODEL})
    assert "/ 150k" in claude.run("-p", "/context", before=["--model=claude-mine"])


def test_claude_code_asks_for_a_model_with_the_suffix_1m(claude):
    claude.prepare(final_text("hello there"), modelAliases={"claude-mine": "fake/" + MODEL})
    assert "/ 1m" in claude.run("-p", "/context", before=["--model=claude-mine[1m]"])
    told = json.loads(claude.run("-p", "say hi", "--output-format=json", before=["--model=claude-mine[1m]"]))
    assert told["result"] == "hello there" and told["usage"]["output_tokens"] == 7
    assert {call.json["model"] for call in claude.upstream.calls} == {MODEL}


def test_claude_code_takes_a_session_up_again(claude):
    claude.prepare(final_text("the first answer"))
    first = json.loads(claude.run("-p", "say one", "--output-format=json"))
    again = json.loads(claude.run("-p", "say two", "--continue", "--output-format=json"))
    assert again["session_id"] == first["session_id"]
    roles = [(m["role"], json.dumps(m["content"])) for m in claude.upstream.calls[-1].json["messages"]]
    assert [role for role, text in roles if "say one" in text or "the first answer" in text] == ["user", "assistant"]
    assert list(again["modelUsage"]) == ["fake/" + MODEL]  # the name it asked for, so that it can ask for it again


def test_claude_code_goes_to_its_own_fallback_model_when_a_model_is_overloaded(claude):
    def handler(call):
        overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        return json_answer(529, overloaded) if call.json["model"] == "bad" else final_text("from the good one")(call)

    claude.prepare(handler, "anthropic", ["bad", "good"], defaultModel="fake/bad")
    quick = {"LLM_ROUTER_ORIGIN_FALLBACK_COOLDOWN_MS": "0", "LLM_ROUTER_FALLBACK_CIRCUIT_FAILURES": "0"}
    once = {"LLM_ROUTER_ORIGIN_RETRY_ATTEMPTS": "1", "CLAUDE_CODE_MAX_RETRIES": "4"}
    assert "from the good one" in claude.run("-p", "say hi", "--fallback-model", "fake/good", **quick, **once)
    assert claude.upstream.calls[-1].json["model"] == "good"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_the_model_picker_of_claude_code_lists_the_aliases_that_name_claude(claude):
    aliases = dict.fromkeys(["claude-mine", "claude-other", "no-such-name"], "fake/" + MODEL)
    claude.prepare(final_text(), modelAliases=aliases)
    trusted = {str(claude.folder.resolve()): {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}}
    settings = {"hasCompletedOnboarding": True, "theme": "dark", "projects": trusted}
    (claude.home / ".claude.json").write_text(json.dumps(settings))
    line = [sys.executable, PROGRAM, "run", "--model=claude-mine", "claude"]
    env = clean_environment(claude.home, PATH=claude.path, TERM="xterm-256color", **CLAUDE_OFFLINE)
    cache = claude.home / ".claude" / "cache" / "gateway-models.json"
    with Terminal(line, env, claude.folder) as terminal:
        terminal.wait("/effort")
        until_true(cache.exists)
        terminal.type(b"/model", "Switchmodel")
        terminal.type(b"\r", "Selectmodel")
        terminal.wait("claude-otherFromgateway")
        assert "no-such-name" not in terminal.text()
        terminal.type(b"\x1b", "")
        end = time.monotonic() + 90
        while terminal.process.poll() is None and time.monotonic() < end:
            terminal.type(b"\x03", "")  # Ctrl-C is the program's own business: the second one ends it
        assert terminal.process.poll() == 0
    assert {model["id"] for model in json.loads(cache.read_text())["models"]} == {"claude-mine", "claude-other"}


class Terminal:
    """A program in a pseudo-terminal of 120 columns; text() is what it wrote, without escapes and white space."""

    def __init__(self, line, env, cwd):
        import fcntl
        import pty
        import struct
        import termios

        self.lead, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        self.data = b""
        self.process = subprocess.Popen(
            line, env=env, cwd=str(cwd), stdin=side, stdout=side, stderr=side, start_new_session=True
        )
        os.close(side)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        os.close(self.lead)

    def text(self):
        shown = re.sub(rb"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b.", b"", self.data)
        return re.sub(r"\s", "", shown.decode("utf-8", "replace"))

    def wait(self, words, timeout=90):
        end = time.monotonic() + timeout
        while words not in self.text():
            assert time.monotonic() < end, (words, self.text()[-2000:])
            self._read(0.2)

    def type(self, keys, then):
        os.write(self.lead, keys)
        time.sleep(0.3)  # a key that follows at once is taken for pasted text
        self._read(0.2)
        self.wait(then)

    def _read(self, seconds):
        if select.select([self.lead], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.data += os.read(self.lead, 65536)


def until_true(condition, timeout=90):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.1)


# ----- Codex: sessions -----


def test_codex_takes_a_session_up_again(run_agent, project, upstreams):
    home, folder = project
    upstream = upstreams(final_text("the first answer"))
    path = prepare(home, upstream, "anthropic", native("@openai", "codex", "vendor/*/bin/codex*"), "codex")
    (home / "codex").mkdir()
    for words in (["exec", *CODEX.split()[1:], "say one"], ["exec", *CODEX.split()[1:], "resume", "--last", "say two"]):
        line = [sys.executable, PROGRAM, "run", "codex", *words]
        done = run_agent(*line, home=home, cwd=folder, PATH=path, CODEX_HOME=str(home / "codex"))
        assert done.returncode == 0, (done.stdout, done.stderr)
    last = [(m["role"], json.dumps(m["content"])) for m in upstream.calls[-1].json["messages"]]
    said = [role for role, text in last for mark in ("say one", "the first answer", "say two") if mark in text]
    assert said == ["user", "assistant", "user"]
