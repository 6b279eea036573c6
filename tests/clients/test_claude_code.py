"""The real Claude Code, one turn with a real tool call; directly at the fake, and through the router."""

import json

import pytest

from fake_upstream import tool_results, tool_round_trip
from real_clients import native

QUIET = {
    "ANTHROPIC_API_KEY": "dummy",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "CLAUDE_CODE_MAX_RETRIES": "1",
}
TOOLS = {
    "Bash": {"command": "cat hello.txt", "description": "show the file"},
    "Read": {"file_path": "hello.txt"},
}


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_one_turn_with_a_tool_call(place, run_agent, project, tool):
    claude = native("@anthropic-ai", "claude-code", "claude*")
    home, folder = project
    arguments = dict(TOOLS[tool])
    if "file_path" in arguments:
        arguments["file_path"] = str(folder / "hello.txt")
    spot = place("anthropic", tool_round_trip(tool, arguments, "It says {result}"))
    done = run_agent(
        claude,
        "-p",
        "read hello.txt",
        "--model",
        "fake-model",
        "--allowedTools",
        "Bash Read",
        "--output-format",
        "json",
        home=home,
        cwd=folder,
        ANTHROPIC_BASE_URL=spot.url,
        CLAUDE_CONFIG_DIR=home / ".claude",
        **QUIET,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    answer = json.loads(done.stdout)
    assert answer["is_error"] is False
    assert "hello from file" in answer["result"]
    assert answer["result"].startswith("It says")
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (22, 14)
    calls = spot.chats("anthropic")
    assert any("hello from file" in result for result in tool_results(calls[-1].json))


def test_counting_the_context(place, run_agent, project):
    """`/context` fires a dozen count_tokens calls; all are answered with numbers."""
    claude = native("@anthropic-ai", "claude-code", "claude*")
    home, folder = project
    spot = place("anthropic")
    done = run_agent(
        claude,
        "-p",
        "/context",
        "--model",
        "fake-model",
        home=home,
        cwd=folder,
        ANTHROPIC_BASE_URL=spot.url,
        CLAUDE_CONFIG_DIR=home / ".claude",
        **QUIET,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"Context Usage" in done.stdout, done.stdout
