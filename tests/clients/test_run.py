"""The real agents through `run`: the origin refuses, the fallback speaks the other format, a tool is called."""

import json
import os
import sys
from pathlib import Path

import pytest

import llm_router
from fake_upstream import FakeUpstream, tool_results, tool_round_trip
from real_clients import MODEL, native
from running_router import config_of, provider

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


def prepare(home, upstream, wire, program, name):
    """The configuration in `home` and the program on a PATH of its own."""
    dead = dict(provider(upstream, wire, id="origin", models=[{"id": MODEL, "fallbackModels": ["spare/" + MODEL]}]))
    dead["baseUrl"] = "http://127.0.0.1:9/v1"
    document = config_of(dead, provider(upstream, wire, id="spare", models=[MODEL]), defaultModel="origin/" + MODEL)
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
