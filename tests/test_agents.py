"""Coding agents run against the router: what they get, what stays untouched, what comes back."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import llm_router as r
from exchanges import until
from running_router import COMMAND, clean_environment, config_of, provider

PROGRAM = str(Path(r.__file__))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake tools are scripts with a #! line")

# Shows what it was started with, asks the router as its variables say, and ends with the code that its last word tells.
TOOL = """#!%s
import json, os, sys, urllib.request
file = os.environ.get("OPENCODE_CONFIG") or os.environ.get("KILO_CONFIG")
if file:
    options = json.load(open(file))["provider"]["llm-router"]["options"]
    base, key = options["baseURL"], options["apiKey"]
elif "-e" in sys.argv:
    assert oct(os.stat(sys.argv[2]).st_mode & 0o777) == "0o600"
    given = json.loads(open(sys.argv[2]).read().partition('"llm-router", ')[2].rpartition(");")[0])
    base, key = given["baseUrl"], given["apiKey"]
    assert sys.argv[4] == "llm-router/" + given["models"][0]["id"]
elif "-c" in sys.argv:
    base = sys.argv[4].split('base_url="')[1].split('"')[0]
    key = os.environ["ROUTER_API_KEY"]
elif os.environ.get("COPILOT_PROVIDER_BASE_URL"):
    base, key = os.environ["COPILOT_PROVIDER_BASE_URL"], os.environ["COPILOT_PROVIDER_API_KEY"]
elif os.environ.get("ANTHROPIC_BASE_URL") and "plain" not in sys.argv:
    base, key = os.environ["ANTHROPIC_BASE_URL"] + "/v1", os.environ["ANTHROPIC_AUTH_TOKEN"]
else:
    base, key = os.environ.get("OPENAI_BASE_URL") or os.environ["OPENAI_API_BASE"], os.environ["OPENAI_API_KEY"]
body = json.dumps({"model": "smart", "messages": [{"role": "user", "content": "hi"}]}).encode()
request = urllib.request.Request(base + "/chat/completions", body)
request.add_header("authorization", "Bearer " + key)
request.add_header("content-type", "application/json")
status = urllib.request.urlopen(request).status
print(json.dumps({"status": status, "argv": sys.argv[1:], "env": dict(os.environ), "key": key}))
sys.exit(int(sys.argv[-1]) if sys.argv[-1].isdigit() else 0)
"""


class Home:
    """A home folder with a configuration, fake tools on the PATH, and the program run in it."""

    def __init__(self, folder, document):
        self.folder = folder
        self.env = clean_environment(folder)
        tools = folder / "tools"
        tools.mkdir()
        for name in [agent.name for agent in r.AGENTS] + ["my-app"]:
            (tools / name).write_text(TOOL % sys.executable)
            (tools / name).chmod(0o755)
        self.env["PATH"] = "%s%s%s" % (tools, os.pathsep, self.env.get("PATH", os.defpath))
        config = folder / ".llm-router.json"
        config.write_text(json.dumps(document))
        config.chmod(0o600)

    def run(self, line):
        words = [*COMMAND, *shlex.split(line)]
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def home(tmp_path, upstream):
    made = Home(tmp_path, config_of(provider(upstream), defaultModel="fake/fake-model"))
    yield made
    made.run("stop --grace=0")


@pytest.mark.parametrize("tool", [agent.name for agent in r.AGENTS])
def test_every_tool_reaches_a_router_that_was_started_for_it_and_is_gone_after_it(home, tool):
    before = {path: path.read_bytes() for path in home.folder.iterdir() if path.is_file()}
    done = home.run("run %s say 'two words' --json 7" % tool)
    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 200 and told["argv"][-4:] == ["say", "two words", "--json", "7"]
    assert r.read_instances(str(home.folder / ".llm-router.runtime.json")) == []  # it did not only say that it will end
    assert "no llm-router is running" in home.run("status").stderr
    assert {path: path.read_bytes() for path in before} == before
    assert not Path(told["env"].get("OPENCODE_CONFIG", "/nowhere")).exists()


def test_any_command_gets_the_variables_of_both_formats(home):
    told = json.loads(home.run("run -- my-app plain --model=mine").stdout)
    assert told["argv"] == ["plain", "--model=mine"]
    base = told["env"]["ANTHROPIC_BASE_URL"]
    assert told["env"]["OPENAI_BASE_URL"] == told["env"]["OPENAI_API_BASE"] == base + "/v1"


def test_the_models_that_the_user_names_reach_the_tiers_of_claude_code(home, upstream):
    document = config_of(provider(upstream, models=["fake-model", "big", "small", "huge"]))
    (home.folder / ".llm-router.json").write_text(json.dumps(document))
    home.env["ANTHROPIC_API_KEY"] = "the-user's-own"
    env = json.loads(home.run("run --model big --small-model=small --opus=huge claude").stdout)["env"]
    assert (env["ANTHROPIC_MODEL"], env["ANTHROPIC_DEFAULT_OPUS_MODEL"]) == ("big", "huge")
    assert (env["ANTHROPIC_DEFAULT_SONNET_MODEL"], env["ANTHROPIC_DEFAULT_HAIKU_MODEL"]) == ("big", "small")
    assert env["ANTHROPIC_DEFAULT_FABLE_MODEL"] == "big"  # a tier since Claude Code 2.1.3xx; its subagents may ask for it
    assert "ANTHROPIC_API_KEY" not in env


def test_without_a_name_the_default_model_is_used(home):
    argv = json.loads(home.run("run codex exec hello").stdout)["argv"]
    assert 'model="fake/fake-model"' in argv and argv[-2:] == ["exec", "hello"]


def test_a_program_gets_a_key_of_its_own_from_a_running_router_for_as_long_as_it_runs(tmp_path, upstream):
    home = Home(tmp_path, config_of(provider(upstream), masterKey="the-master-key"))
    assert home.run("start --detach --port=0 --require-auth=true").returncode == 0
    try:
        told = json.loads(home.run("run claude").stdout)
        assert told["status"] == 200 and told["key"] not in ("", "the-master-key")
        assert "the-master-key" not in json.dumps(told)
        trail = json.loads(home.run("explain --json").stdout)
        assert trail["client"] == "run-claude" and trail["status"] == 200
        late = urllib.request.Request(told["env"]["ANTHROPIC_BASE_URL"] + "/v1/models")
        late.add_header("authorization", "Bearer " + told["key"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(late)
        shown = home.run("env claude --shell=bash").stdout
        assert "export ANTHROPIC_AUTH_TOKEN='the-master-key'\n" in shown
        assert json.loads(home.run("status --json").stdout)["require_auth"]
    finally:
        home.run("stop --grace=0")


def test_a_program_s_key_outlives_a_reload_of_the_router(router, upstream):
    running = router(config_of(provider(upstream), masterKey="the-master-key"), "--require-auth=true")
    entry = r.read_instances(str(running.home / ".llm-router.runtime.json"))[0]
    r.ask_instance(entry, "admit/%s/run-x" % hashlib.sha256(b"guest-key").hexdigest(), "POST")
    r.ask_instance(entry, "reload", "POST")
    assert running.get("/v1/models", {"x-api-key": "guest-key"}).status == 200
    for word in ("nonsense", "", "0" * 63):
        r.ask_instance(entry, "admit/%s/run-x" % word, "POST")
    assert running.get("/v1/models", {"x-api-key": ""}).status == 401
    r.ask_instance(entry, "dismiss/" + hashlib.sha256(b"guest-key").hexdigest(), "POST")
    assert running.get("/v1/models", {"x-api-key": "guest-key"}).status == 401


def test_guests_that_killed_runs_left_behind_give_way_to_new_ones(monkeypatch):
    monkeypatch.setattr(r, "_MOST_GUESTS", 3)
    gateway, options = SimpleNamespace(), SimpleNamespace(config=r.Config(), require_auth=True)
    router = SimpleNamespace(guests={}, gateway=gateway, options=options)
    keys = [hashlib.sha256(b"key %d" % number).hexdigest() for number in range(5)]
    for key in keys:
        r.Router._change_guests(router, "admit", key + "/run-x")
    assert list(router.guests) == keys[2:] and len(gateway.access.clients) == 3


def test_a_program_learns_its_small_model_and_the_window_where_the_configuration_has_it():
    model = {"id": "m", "contextWindow": 131072, "maxOutputTokens": 8192}
    config = r.read_config(config_of(provider("http://127.0.0.1:1", models=[model, "n"]), defaultModel="fake/m"), {})
    facts = r.agent_facts("http://x", "", config, {})
    claude, codex, opencode = r.AGENTS[:3]
    kilo, copilot, aider, pi = (agent for agent in r.AGENTS if agent.name in ("kilo", "copilot", "aider", "pi"))
    assert r.fill_templates(claude, facts)[0]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "131072"
    assert r.fill_templates(codex, facts)[1][-2:] == ["-c", "model_context_window=131072"]
    small = r.fill_templates(aider, dict(facts, small="fake/n"))[1]
    assert small == ["--model", "openai/fake/m", "--weak-model", "openai/fake/n"]
    assert r.fill_templates(copilot, facts)[0]["COPILOT_PROVIDER_BASE_URL"] == "http://x/v1"
    assert (r.fill_templates(kilo, dict(facts, file="f"))[0], kilo.file[1]) == ({"KILO_CONFIG": "f"}, opencode.file[1])
    told = json.loads(opencode.file[1](facts))["provider"]["llm-router"]["models"]
    assert told == {"fake/m": {"limit": {"context": 131072, "output": 8192}}}
    assert '"contextWindow": 131072, "maxTokens": 8192' in pi.file[1](facts)
    unknown = r.agent_facts("http://x", "", config, {"model": "fake/n"})
    assert '"contextWindow": 128000, "maxTokens": 16384' in pi.file[1](unknown)
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in r.fill_templates(claude, unknown)[0]
    assert r.fill_templates(claude, unknown)[0]["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"  # caches of prompts last
    assert json.loads(opencode.file[1](unknown))["provider"]["llm-router"]["models"] == {"fake/n": {}}
    r.agent_facts("http://x", "", config, {"model": "nobody/knows"})


def test_without_a_default_the_first_model_that_is_enabled_and_has_a_name_is_run():
    models = [r.Model("off", enabled=False), r.Model("*"), r.Model("on")]
    config = r.Config(providers=(r.Provider("p", models=tuple(models)),))
    assert r.agent_facts("http://x", "", config, {})["model"] == "p/on"


def test_a_proxy_in_the_environment_does_not_stand_between_a_program_and_the_router(home):
    home.env.update(HTTPS_PROXY="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    home.env["NO_PROXY"] = "corp.example"
    env = json.loads(home.run("run -- my-app").stdout)["env"]
    assert (env["NO_PROXY"], env["no_proxy"]) == ("corp.example,127.0.0.1", "127.0.0.1")
    assert env["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert json.loads(home.run("usage --by=client --json").stdout)["rows"][0]["group"] == "run-my-app"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_start_leaves_no_router_behind(home, number):
    line = [sys.executable, PROGRAM, "run", "claude"]
    with subprocess.Popen(line, env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        log = home.folder / ".llm-router.log"
        assert until(log.exists)
        running.send_signal(number)
        running.communicate(timeout=60)
    assert until(lambda: "no llm-router is running" in home.run("status").stderr)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be held back here")
def test_an_interrupt_while_a_router_is_being_started_does_not_part_us_from_it(home, monkeypatch):
    children = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            children.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            r.start_detached(["--port=0"], str(home.folder / "log"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert children[0].wait(60) == -signal.SIGTERM
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_running_router_whose_configuration_this_shell_cannot_read_is_reached_all_the_same(home):
    assert home.run("start --detach --port=0 --watch-config=false").returncode == 0
    (home.folder / ".llm-router.json").write_text("{broken")
    shown = json.loads(home.run("env --json").stdout)
    assert shown["OPENAI_BASE_URL"].startswith("http://127.0.0.1:")


def test_a_router_may_be_left_running(home):
    done = home.run("run --keep claude")
    assert done.returncode == 0 and "stays" in done.stderr
    assert json.loads(home.run("status --json").stdout)["candidates"]


def test_a_program_that_is_missing_is_named_with_how_to_get_it(home):
    (home.folder / "tools" / "codex").unlink()
    home.env["PATH"] = str(home.folder / "tools")
    done = home.run("run codex")
    assert done.returncode == 1 and "npm install -g @openai/codex" in done.stderr
    (home.folder / "tools" / "my-app").write_text("#!/nowhere/sh\n")
    done = home.run("run -- my-app")
    assert done.returncode == 1 and re.fullmatch("llm-router: cannot run .*/my-app: .*\n", done.stderr)
    assert "no llm-router is running" in home.run("status").stderr


@pytest.mark.parametrize(
    "line", ["run", "run unknown-tool", "run --", "env nobody", "env codex", "run --modell=x claude"]
)
def test_what_cannot_be_run_is_refused(home, line):
    done = home.run(line)
    assert done.returncode == 2 and done.stderr.startswith("llm-router: ")


def test_a_model_that_no_request_could_be_served_by_is_said_at_once_and_nothing_is_started(home):
    """By the router that is to serve it: this shell may not know its configuration."""
    assert home.run("start --detach --port=0").returncode == 0
    for line, near in (
        ("run --model=fake/fake-modle claude", "--model: .*fake/fake-modle.*fake/fake-model?"),
        ("run --model=smart --haiku=nobody/x -- my-app", "--haiku: .*nobody/x"),
        ("env --opus=fakemodel claude", "--opus: .*fake-model"),
    ):
        done = home.run(line)
        assert (done.returncode, done.stdout) == (2, "") and re.match("llm-router: " + near, done.stderr)
    assert home.run("run --model=fake-model[1m] claude").returncode == 0
    (home.folder / ".llm-router.json").write_text("{broken")
    assert home.run("run --model=nobody/x claude").returncode == 2


def test_no_router_is_started_where_it_could_not_be_found_again(home):
    """As in a read-only home: it would go on for ever, and `stop` would not know of it."""
    (home.folder / ".llm-router.runtime.json").mkdir()
    done = home.run("run -- my-app")
    assert (done.returncode, done.stdout) == (1, "") and ".llm-router.runtime.json" in done.stderr
    assert not (home.folder / ".llm-router.log").exists()


def test_the_signal_that_ended_the_program_is_its_exit_code_and_ours_is_passed_on(home):
    (home.folder / "tools" / "my-app").write_text("#!/bin/sh\necho ready\nexec sleep 60\n")
    line = [sys.executable, PROGRAM, "run", "--", "my-app"]
    with subprocess.Popen(line, env=home.env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGTERM)  # a second one, as of a terminal that is closed, leaves nothing behind either
        assert running.wait(60) in (128 + signal.SIGTERM, 130)
    assert until(lambda: "no llm-router is running" in home.run("status").stderr)


@pytest.mark.parametrize("value", ["plain", "with space", "it's", 'a"b', "$HOME", "back\\slash", "`id`"])
def test_a_shell_reads_back_what_env_prints(value):
    lines = r.shell_lines({"A": value}, "bash")
    line = "\n".join(lines) + '\nprintf %s "$A"'
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == value


def test_other_shells_quote_in_their_own_way():
    assert r.shell_lines({"A": "it's"}, "powershell") == ["$env:A = 'it''s'"]
    assert r.shell_lines({"A": "x\u2019; evil"}, "powershell") == ["$env:A = 'x\u2019\u2019; evil'"]
    assert r.shell_lines({"A": "it's \\"}, "fish") == ["set -gx A 'it\\'s \\\\'"]


def test_a_models_name_stays_a_string_in_codexs_toml():
    facts = dict.fromkeys(["base", "key", "window"], "1")
    words = r.fill_templates(r.AGENTS[1], dict(facts, model='a"\nnotify=["evil"]\\'))[1]
    assert words[words.index("model_context_window=1") - 2] == 'model="a\\"\\nnotify=[\\"evil\\"]\\\\"'
