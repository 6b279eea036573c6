"""The smoke test of real providers, run against fake ones: its table, exit codes, and what it leaves alone."""

import shutil
import socket
import subprocess
import sys

import provider_smoke
import pytest

from fake_upstream import final_text, json_answer
from running_router import ROOT, clean_environment

KEY = "sk-smoke-0123456789abcdef"


@pytest.fixture
def smoke(tmp_path):
    """`smoke(lines)` -> (exit code, rows of words, stdout, stderr) with these lines as the file of variables."""

    def run(lines, **env):
        file = tmp_path / "variables"
        file.write_text("\n".join(lines))
        command = [sys.executable, str(ROOT / "tests" / "provider_smoke.py"), "--env-file=%s" % file]
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        (home / ".llm-router.json").write_text("{the user's own, not even readable}")
        done = subprocess.run(command, env=clean_environment(home, **env), capture_output=True, text=True, timeout=120)
        assert [path.name for path in home.iterdir()] == [".llm-router.json"]
        assert KEY not in done.stdout + done.stderr
        rows = [line.split() for line in done.stdout.splitlines() if "/" in line]
        return done.returncode, rows, done.stdout, done.stderr

    return run


def block(upstream, key="EXAMPLE", **fields):
    values = dict(PROVIDER_ID="example", API_KEY=KEY, OPENAI_BASE_URL=upstream.url + "/v1", MODELS="m1", **fields)
    lines = ["LLM_ROUTER_TEST_%s_%s=%s" % (key, name, value) for name, value in values.items()]
    return ["# a comment", "export LLM_ROUTER_TEST_PROVIDER_KEYS='%s'" % key, "", *lines]


def test_every_model_format_and_way_of_answering_gets_a_row_and_passes(smoke, upstream):
    claude, headers = upstream.url + "/anthropic", '{"x-team": "blue"}'
    lines = block(upstream, CLAUDE_BASE_URL=claude, HEADERS_JSON=headers)
    code, rows, out, _ = smoke([line.replace("=m1", '="m1, 模型"') for line in lines])
    assert code == 0 and "12 passed, 0 failed" in out and {row[3] for row in rows} == {"PASS"}
    wires = ("openai", "anthropic", "responses")
    ways = ("whole", "streamed")
    expected = [["example/" + model, wire, way] for model in ("m1", "模型") for wire in wires for way in ways]
    assert [row[:3] for row in rows] == expected
    assert {call.path for call in upstream.calls} == {"/v1/chat/completions", "/anthropic/v1/messages"}
    assert {call.header("x-team") for call in upstream.calls} == {"blue"}


def test_headers_of_one_format_go_to_that_format_only(smoke, upstream):
    lines = block(upstream, ANTHROPIC_BASE_URL=upstream.url, CLAUDE_HEADERS_JSON='{"x-only": "claude"}')
    code, rows, _, _ = smoke(lines)
    assert code == 0 and {row[0] for row in rows} == {"example-openai/m1", "example-anthropic/m1"}
    assert {(call.wire, call.header("x-only")) for call in upstream.calls} == {
        ("openai", None),
        ("anthropic", "claude"),
    }


@pytest.mark.parametrize(
    "answer",
    [lambda call: json_answer(401, {"error": {"message": "wrong key " + KEY}}), final_text("")],
    ids=["401", "empty"],
)
def test_what_fails_is_told_and_makes_the_exit_code(smoke, upstream, answer):
    good = final_text()
    upstream.handler = lambda call: answer(call) if call.json["model"] == "bad" else good(call)
    lines = [line.replace("=m1", "=m1,bad") for line in block(upstream)]
    code, rows, out, _ = smoke(lines, LLM_ROUTER_TEST_TIMEOUT_MS="20000")
    assert code == 1 and "6 passed, 6 failed" in out
    assert {(row[0], row[3]) for row in rows} == {("example/m1", "PASS"), ("example/bad", "FAIL")}


@pytest.mark.parametrize(
    "lines, told",
    [
        ([], "PROVIDER_KEYS"),
        (["LLM_ROUTER_TEST_PROVIDER_KEYS=A"], "LLM_ROUTER_TEST_A_"),
        (["LLM_ROUTER_TEST_PROVIDER_KEYS=A", "LLM_ROUTER_TEST_A_OPENAI_BASE_URL=http://x"], "MODELS"),
        (["LLM_ROUTER_TEST_PROVIDER_KEYS=A", "LLM_ROUTER_TEST_A_HEADERS_JSON=[]", "LLM_ROUTER_TEST_A_MODELS=m",
          "LLM_ROUTER_TEST_A_OPENAI_BASE_URL=http://x"], "HEADERS_JSON"),
        (["LLM_ROUTER_TEST_PROVIDER_KEYS=A", "LLM_ROUTER_TEST_A_OPENAI_BASE_URL=http://x", "LLM_ROUTER_TEST_A_MODELS=m",
          "LLM_ROUTER_TEST_PORT=many"], "LLM_ROUTER_TEST_PORT is not a whole number"),
    ],
)  # fmt: skip
def test_without_anything_to_test_it_says_what_is_missing(smoke, lines, told):
    code, rows, _, err = smoke(lines)
    assert code == 2 and rows == [] and told in err and ".env.test-suite.example" in err


def test_a_port_in_use_is_left_to_whom_it_belongs(smoke, upstream):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, rows, _, _ = smoke(block(upstream), LLM_ROUTER_TEST_PORT=str(taken.getsockname()[1]))
    assert code == 0 and len(rows) == 6


def test_a_router_that_cannot_start_is_told_without_a_traceback(smoke, upstream):
    code, rows, _, err = smoke([line.replace("http://", "ftp://") for line in block(upstream)])
    assert code == 2 and rows == [] and "baseUrlByFormat.openai" in err and "Traceback" not in err


def test_the_template_names_every_variable_and_only_those_that_are_read():
    text = (ROOT / ".env.test-suite.example").read_text()
    prefix = "LLM_ROUTER_TEST_EXAMPLE_"
    named = {name.lstrip("# ") for name in (line.partition("=")[0] for line in text.splitlines()) if prefix in name}
    assert named == {prefix + name for name in provider_smoke.NAMES if name != "ANTHROPIC_HEADERS_JSON"}
    for name in ("HOST", "PORT", "TIMEOUT_MS", "PROVIDER_KEYS"):
        assert "\nLLM_ROUTER_TEST_%s=" % name in text


def test_the_template_is_kept_by_git_and_what_it_becomes_is_not():
    def ignored(name):
        command = ["git", "-c", "safe.directory=*", "check-ignore", "-q", "--no-index", name]  # whoever owns the folder
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0

    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    assert not ignored(".env.test-suite.example") and ignored(".env.test-suite")
