"""Marked secrets in every place that holds one, every kind of failure at the most verbose level, every command; then
every output is searched (hardening 2.12 to 2.16, 2.39 and the secrets of issue trackers: LiteLLM #8075, #612, #5762)."""

import contextlib
import io
import os
import re
import stat
import subprocess
import sys

import pytest

import fake_upstream as fake
import llm_router
from exchanges import PATHS, WIRES, ask
from running_router import COMMAND, PROGRAM, RunningRouter, clean_environment, config_of, provider

SECRETS = {
    "masterKey": "MARK-master-key-Aa1!-0001",
    "apiKey": "sk-MARK-provider-key-0002",
    "apiKeyEnv": "sk-MARK-from-variable-0003",
    "header": "MARK-team-header-0004",
    "query": "MARK-query-key-0005",
    "proxy": "MARK-proxy-word-0006",
    "unknown field": "MARK-unknown-field-0007",
    "wrong key": "MARK-wrong-key-of-a-client-0008",
    "client query": "MARK-query-of-a-client-0009",
    "cookie": "MARK-cookie-of-a-client-0010",
    "prompt": "MARK-words-of-a-prompt-0011",
    "dead": "sk-MARK-dead-provider-0012",
}


def shown(call):
    """What an upstream was shown by this call, of all that is secret."""
    return "you sent %s %r" % (call.path, call.headers)


def echoing(status, call, stream):
    """What an upstream says that repeats all it was shown, in headers and body, before and within a stream."""
    echo = shown(call)
    headers = {"x-echo": echo, "set-cookie": "k=" + echo, "location": "http://x/?k=" + echo}
    if not stream:
        return fake.error_answer(call.wire, status, echo, headers=headers)
    error = {"type": "error", "error": {"type": "api_error", "message": echo, "code": None}}
    first = fake.STREAMS[call.wire]("Some text, long enough to be content.")[:6]
    return fake.sse_answer(first + [fake.sse(error, "error")], headers=headers)


FAILURES = {
    **{"%d" % status: lambda call, status=status: echoing(status, call, False) for status in
       (302, 400, 401, 402, 403, 404, 408, 413, 422, 429, 451, 500, 503, 529)},
    "mid-stream": lambda call: echoing(200, call, True),
    "html": lambda call: fake.text_answer(502, "<html><title>%s</title></html>" % shown(call), content_type="text/html"),
    "no json": lambda call: fake.text_answer(200, "{%s" % shown(call), content_type="application/json"),
    "broken events": lambda call: fake.sse_answer(["data: {%s\n\n" % shown(call)]),
    "no http": lambda call: fake.raw(shown(call).encode() + b"\r\n\r\n"),
    "bad header": lambda call: fake.raw(b"HTTP/1.1 200 OK\r\n" + shown(call).encode() + b"\r\n\r\n"),
    "reset": lambda call: fake.reset_before_head(),
    "closed": lambda call: fake.close_before_head(),
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """{where: text} of everything that came out, with the router's own files in it."""
    found = {}
    home = tmp_path_factory.mktemp("home")
    with fake.FakeUpstream() as upstream:
        providers = [
            provider(upstream.url + "/v1?api-key=" + SECRETS["query"], wire, wire, ("m",), apiKey=SECRETS["apiKey"],
                     headers={"x-team": SECRETS["header"]}) for wire in WIRES
        ] + [
            provider(upstream, "openai", "byenv", ("m",), apiKeyEnv="MARKED_KEY"),
            provider("http://127.0.0.1:%d" % fake.dead_port(), "openai", "dead", ("m",), apiKey=SECRETS["dead"]),
            provider("http://no-such-host.invalid", "openai", "nodns", ("m",), apiKey=SECRETS["dead"], proxy="none"),
            provider("https://127.0.0.1:%d" % upstream.port, "openai", "tls", ("m",), apiKey=SECRETS["dead"]),
        ]  # fmt: skip
        config = config_of(*providers, masterKey=SECRETS["masterKey"], metadata={"apiToken": SECRETS["unknown field"]})
        environment = {
            "MARKED_KEY": SECRETS["apiKeyEnv"],
            "HTTP_PROXY": "http://user:%s@127.0.0.1:%d" % (SECRETS["proxy"], fake.dead_port()),
            "NO_PROXY": "127.0.0.1",
            "LLM_ROUTER_CONNECT_TIMEOUT_MS": "500",
        }
        flags = ("--require-auth=true", "--debug", "--log-level=info", "--origin-retry-attempts=1")
        flags += ("--origin-fallback-cooldown-ms=0", "--fallback-circuit-failures=0")
        running = RunningRouter(config, flags, home, environment, script=True)
        try:
            provoke(running, upstream, found)
            if os.path.exists("/proc/self/cmdline"):
                with open("/proc/%d/cmdline" % running.process.pid, "rb") as file:
                    found["arguments"] = file.read().decode()
            if os.name == "posix":
                agents_told(running, home, environment, found)
            everything_said(running, home, environment, found)
        finally:
            running.stop()
        found["stderr"] = "\n".join(running.log())
        found["stdout"] = "\n".join(running.stdout())
    for path in home.rglob("*"):
        if path.is_file() and path.name != "config.json" and not path.name.startswith("config.json.bak"):
            found["file " + path.name] = path.read_bytes().decode("latin-1")
    return found


def provoke(running, upstream, found):
    key = {"authorization": "Bearer " + SECRETS["masterKey"], "cookie": "c=" + SECRETS["cookie"]}
    for name, handler in FAILURES.items():
        upstream.handler = handler
        for ref in (*WIRES, "byenv"):
            for client in {ref, "anthropic"} & set(WIRES) or {"openai"}:
                body = ask(client, ref + "/m", text=SECRETS["prompt"], stream=name in ("mid-stream", "broken events"))
                reply = running.post(PATHS[client] + "?k=" + SECRETS["client query"], body, key)
                found["answer %s %s %s" % (name, client, ref)] = "%s\n%s" % (reply.headers, reply.text)
    for ref in ("dead", "nodns", "tls", "unknown"):
        reply = running.post(PATHS["openai"], ask("openai", ref + "/m"), key)
        assert reply.status >= 400, ref
        found["answer " + ref] = "%s\n%s" % (reply.headers, reply.text)
    for path in ("/v1/models", "/metrics", "/health", "/", "/v1/models/openai/m", "/nothing?" + SECRETS["client query"]):
        for headers in (key, {"x-api-key": SECRETS["wrong key"]}, {"api-key": SECRETS["wrong key"] + "'\"%s{}"}):
            reply = running.get(path, headers)
            found["answer %s %d" % (path, len(found))] = "%s\n%s" % (reply.headers, reply.text)
    found["raw 400"] = running.raw(b"GET /%s HTTP/1.1\r\nX: %s\r\n\r\n" % ((SECRETS["client query"].encode(),) * 2)).decode()


COMMANDS = [
    "status", "status --json", "explain last", "explain last --json", "usage", "usage --json", "doctor --offline",
    "doctor --offline --json", "doctor", "settings", "settings --json", "", "--json", "config --operation=list",
    "config --operation=list --json", "config --operation=validate", "config --operation=validate --json",
    "config --operation=export", "config --operation=set-default-model --model=dead/m", "reload", "stop --debug --grace=1",
]  # fmt: skip


# A program in place of an agent: it tells all that it was given, its environment, arguments and files.
NOSY = """#!/bin/sh
env
echo ARGUMENTS
tr '\\0' '\\n' </proc/$$/cmdline 2>/dev/null || echo "$@"
echo FILES
[ -z "$OPENCODE_CONFIG" ] || { ls -l "$OPENCODE_CONFIG"; cat "$OPENCODE_CONFIG"; }
"""
AGENT_COMMANDS = ["run claude", "run codex", "run opencode -p x", "run -- nosy", "env", "env claude", "env --json --shell=fish"]


def agents_told(running, home, environment, found):
    """What programs under `run` get, and what `env` prints; `env` is for a shell that calls with the master key."""
    folder = home / "bin"
    folder.mkdir()
    for name in ("claude", "codex", "opencode", "nosy"):
        (folder / name).write_text(NOSY)
        (folder / name).chmod(0o755)
    env = clean_environment(home, MARKED_KEY=environment["MARKED_KEY"], SHELL="/bin/bash")
    env["PATH"] = "%s%s%s" % (folder, os.pathsep, env["PATH"])
    own = "\n".join("%s=%s" % entry for entry in env.items())
    for command in AGENT_COMMANDS:
        verb, *words = command.split()
        line = [*COMMAND, verb, "--config=%s" % running.config_path, *words]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert running.url in said, said
        for line in own.split("\n"):  # what the user has set for all of his programs
            said = said.replace(line + "\n", "")
        found["agent " + command] = said.replace(SECRETS["masterKey"], "") if verb == "env" else said


def everything_said(running, home, environment, found):
    for command in COMMANDS:
        words = command.split()
        if not (words and words[0] in ("usage", "settings")):
            words.append("--config=%s" % running.config_path)
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            for name, value in dict(environment, HOME=str(home), USERPROFILE=str(home)).items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO())
            code = llm_router.main(words)
        found["command " + command] = said.getvalue()
        assert "nternal" not in said.getvalue() and code in (0, 1), (command, said.getvalue())


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_is_in_nothing_that_came_out(outputs, name):
    assert len(outputs) > 100
    seen = sorted(where for where, text in outputs.items() if SECRETS[name] in text)
    assert not seen, [(where, outputs[where][max(0, outputs[where].index(SECRETS[name]) - 200) :][:300]) for where in seen][:3]


def test_no_answer_shows_a_traceback_or_a_path_of_this_machine(outputs):
    """Hardening 2.16."""
    for where, text in outputs.items():
        if where.startswith(("answer", "raw")):
            assert "Traceback" not in text and 'File "' not in text and str(PROGRAM.parent) not in text, where


def test_every_file_the_program_made_is_private(outputs, tmp_path_factory):
    """Hardening 2.39: whatever the umask."""
    made = 0
    for folder in tmp_path_factory.getbasetemp().glob("home*"):
        for path in folder.rglob("*"):
            if path.is_file() and path.name.startswith((".llm-router", "config.json")):
                made += 1
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert made >= 2 or os.name != "posix"


def test_what_upstreams_echoed_came_out_masked(outputs):
    """The search above finds nothing because it was masked, not because nothing was echoed."""
    answers = "".join(text for where, text in outputs.items() if where.startswith("answer"))
    for name in ("apiKey", "apiKeyEnv", "header", "query"):
        assert llm_router.mask(SECRETS[name]) in answers, name


@pytest.mark.skipif(os.name != "posix", reason="a script stands in for the agents")
def test_a_program_under_run_gets_a_key_of_its_own_and_no_other(outputs):
    for command in ("run claude", "run codex", "run opencode -p x", "run -- nosy"):
        told = re.split("ARGUMENTS\n|FILES\n", outputs["agent " + command])
        keys = [re.findall(r"\brun-[A-Za-z0-9_-]{20}", part) for part in told]
        assert bool(keys[0]) == ("opencode" not in command) and not keys[1] and bool(keys[2]) == ("opencode" in command)
    assert outputs["agent run opencode -p x"].count("-rw------- ") == 1
