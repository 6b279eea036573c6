"""The real Codex, which speaks the Responses format only: one turn with a real command."""

import pytest

from fake_upstream import tool_results, tool_round_trip
from real_clients import native

CONFIG = """
model = "fake-model"
model_provider = "router"
approval_policy = "never"
sandbox_mode = "danger-full-access"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.router]
name = "router"
base_url = "%s/v1"
env_key = "ROUTER_API_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


@pytest.fixture
def codex():
    return native("@openai", "codex", "vendor/*/bin/codex*")


def test_one_turn_with_a_command(place, run_agent, project, codex):
    home, folder = project
    spot = place("responses", tool_round_trip("exec_command", {"cmd": "cat hello.txt"}, "It says {result}"))
    (home / "codex").mkdir()
    (home / "codex" / "config.toml").write_text(CONFIG % spot.url, encoding="utf-8")
    done = run_agent(
        codex,
        "exec",
        "--skip-git-repo-check",
        "read hello.txt",
        home=home,
        cwd=folder,
        CODEX_HOME=home / "codex",
        ROUTER_API_KEY="dummy",
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"It says" in done.stdout, (done.stdout, done.stderr)
    assert b"hello from file" in done.stdout
    calls = spot.chats("responses")
    assert len(calls) == 2
    assert any("hello from file" in result for result in tool_results(calls[-1].json))
