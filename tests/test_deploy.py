"""Deployment to Cloudflare against a fake of its API: what is sent, what is refused, what stays in files."""

import hashlib
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import llm_router as r
from fake_cloudflare import ACCOUNT, TOKEN, FakeCloudflare, Refused, Script
from running_router import CONSOLE_SCRIPT, PROGRAM, ROOT, clean_environment

KEY = "lr-9fGh2kLmNpQrStUvWxYz13579bdfh"
SCRIPT = "/client/v4/accounts/%s/workers/scripts/llm-router-route" % ACCOUNT


def document_of(models=1, **fields):
    """A configuration with `models` models, whose ids no compression shortens much."""
    dice = random.Random(7)
    rows = [{"id": "m%d-%032x" % (number, dice.getrandbits(128))} for number in range(models)]
    one = {"id": "p", "baseUrl": "https://p.example/v1", "apiKeyEnv": "P_KEY", "models": rows}
    return dict({"masterKey": KEY, "defaultModel": "p/" + rows[0]["id"], "providers": [one]}, **fields)


class Desk:
    """A user's machine: the lone file, a configuration, and the fake API in place of Cloudflare's."""

    def __init__(self, folder, cloudflare):
        self.folder, self.cloudflare = folder, cloudflare
        self.program = folder / "llm_router.py"
        shutil.copy2(PROGRAM, self.program)
        (folder / "__pycache__").mkdir()
        for compiled in (ROOT / "__pycache__").glob("llm_router.%s.pyc" % sys.implementation.cache_tag):
            shutil.copy2(compiled, folder / "__pycache__")  # it is good for a file of the same date and size
        self.configure(document_of())

    def configure(self, document):
        path = self.folder / ".llm-router.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        path.chmod(0o600)

    def run(self, *words, stdin="", code=0, **env):
        given = {"CLOUDFLARE_API_BASE_URL": self.cloudflare.url, "CLOUDFLARE_API_TOKEN": TOKEN, "P_KEY": "sk-p-0123456789abcdef"}
        env = clean_environment(self.folder, **dict(given, **env))
        line = [sys.executable, "-c", CONSOLE_SCRIPT, str(self.folder), *words]
        done = subprocess.run(line, env=env, cwd=str(self.folder), input=stdin, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def deploy(self, *words, **more):
        return self.run("deploy", "--use-wrangler=false", *words, **more)

    @property
    def script(self):
        return self.cloudflare.scripts["llm-router-route"]


@pytest.fixture
def desk(tmp_path):
    with FakeCloudflare() as cloudflare:
        yield Desk(tmp_path, cloudflare)


def config_on(script):
    """The configuration as the Worker would read it from its secrets."""
    name, text = r.find_config_variable(script.secrets)
    return r.parse_config_text(r.unpack_config(text), name)


# --- the upload ---


def test_one_upload_brings_this_very_file_the_configuration_and_the_keys_it_names(desk):
    done = json.loads(desk.deploy("--json").stdout)
    assert done["url"] == "https://llm-router-route.me.workers.dev"
    assert desk.script.files["llm_router.py"] == desk.program.read_bytes()
    assert sorted(desk.script.files) == ["entry.py", "llm_router.py"]
    assert config_on(desk.script) == document_of()
    assert desk.script.secrets["P_KEY"] == "sk-p-0123456789abcdef"
    assert set(desk.script.secrets) == {"LLM_ROUTER_CONFIG_JSON", "P_KEY"} == set(done["secrets"])
    assert desk.script.enabled
    assert "python_workers" in desk.script.metadata["compatibility_flags"]


def test_no_argument_and_no_output_shows_a_secret(desk):
    done = desk.deploy()
    assert KEY not in done.stdout + done.stderr
    assert "sk-p-0123456789abcdef" not in done.stdout + done.stderr


def test_the_master_key_in_the_environment_goes_into_the_configuration_that_is_sent(desk):
    desk.configure(document_of(masterKey="weak"))
    desk.deploy(LLM_ROUTER_MASTER_KEY=KEY)
    assert config_on(desk.script)["masterKey"] == KEY
    assert "LLM_ROUTER_MASTER_KEY" not in desk.script.secrets


def test_a_variable_that_is_not_set_is_named(desk):
    assert "P_KEY is not set" in desk.deploy(P_KEY="").stderr
    document = document_of()
    document["providers"][0]["apiKey"] = "sk-p-0123456789abcdef"  # serves where the variable is not set
    document["providers"].append({"id": "q", "enabled": False, "baseUrl": "https://q.example", "apiKeyEnv": "Q_KEY", "models": ["m"]})
    desk.configure(document)
    assert desk.deploy(P_KEY="", Q_KEY="sk-q").stderr == ""
    assert "Q_KEY" not in desk.script.secrets


LOCAL = ["localhost:11434", "127.0.0.1:1", "192.168.1.5", "10.1.2.3", "172.20.0.1", "[fd00::1]:80", "ollama", "gpu.local", "host.docker.internal", "100.101.2.3"]


def test_a_provider_that_only_this_network_knows_is_named(desk):
    document = document_of()
    rows = [{"id": "l%d" % number, "baseUrl": "http://%s/v1" % host, "models": ["m"]} for number, host in enumerate(LOCAL)]
    document["providers"] += [*rows, {"id": "far", "baseUrl": "http://10.example.com", "models": ["m"]}]
    for number, host in enumerate(("100.1.2.3", "104.16.0.1", "172.32.0.1", "192.169.1.1", "[2606:4700::1]")):
        document["providers"].append({"id": "far%d" % number, "baseUrl": "http://" + host, "models": ["m"]})
    document["providers"].append({"id": "off", "enabled": False, "baseUrl": "http://127.0.0.1", "models": ["m"]})
    desk.configure(document)
    said = [line for line in desk.deploy("--dry-run").stderr.splitlines() if "Cloudflare cannot reach" in line]
    assert [line.rpartition(" ")[2] for line in said] == ["l%d" % number for number in range(len(LOCAL))]


def test_keys_that_stand_in_the_configuration_need_no_variable(desk):
    document = document_of()
    del document["providers"][0]["apiKeyEnv"]
    document["providers"][0]["apiKey"] = "sk-p-0123456789abcdef"
    desk.configure(document)
    assert desk.deploy().stderr == ""
    assert list(desk.script.secrets) == ["LLM_ROUTER_CONFIG_JSON"]


def test_an_account_without_a_workers_dev_name_is_told_how_to_get_one(desk):
    desk.cloudflare.subdomain = ""
    assert "open Workers & Pages in the dashboard" in desk.deploy(code=1).stderr


def test_a_second_deployment_keeps_variables_and_the_key_of_worker_key_and_says_so(desk):
    desk.deploy()
    desk.script.variables["LLM_ROUTER_KEEPALIVE_MS"] = "5"
    desk.run("worker-key", "--use-wrangler=false", "--master-key=-", stdin="New-Key-for-us-all-1q8vZ77x2bPw\n")
    assert desk.script.secrets["LLM_ROUTER_MASTER_KEY"] == "New-Key-for-us-all-1q8vZ77x2bPw"
    assert "worker-key gave it" in desk.deploy().stderr
    assert desk.script.secrets["LLM_ROUTER_MASTER_KEY"] == "New-Key-for-us-all-1q8vZ77x2bPw"
    assert desk.script.variables == {"LLM_ROUTER_KEEPALIVE_MS": "5"}


def test_a_name_and_an_environment_make_another_worker(desk):
    desk.deploy("--name=mine", "--env=staging")
    assert list(desk.cloudflare.scripts) == ["mine-staging"]


def test_a_domain_or_a_route_takes_the_place_of_workers_dev(desk):
    for _ in range(2):
        assert json.loads(desk.deploy("--domain=llm.example.com", "--json").stdout)["url"] == "https://llm.example.com"
    (domain,) = desk.cloudflare.domains
    assert (domain["hostname"], domain["service"], domain["zone_id"]) == ("llm.example.com", "llm-router-route", "z1")
    for _ in range(2):
        said = desk.deploy("--route=api.example.com/route/*", "--json").stdout
        assert json.loads(said)["url"] == "https://api.example.com/route"
    assert desk.cloudflare.routes == [{"pattern": "api.example.com/route/*", "script": "llm-router-route"}]
    assert not desk.script.enabled


def test_a_route_or_domain_of_another_worker_is_not_taken_from_it(desk):
    desk.cloudflare.routes.append({"pattern": "api.example.com/*", "script": "shop"})
    desk.cloudflare.domains.append({"hostname": "shop.example.com", "service": "shop"})
    for flag in ("--route=api.example.com/*", "--domain=shop.example.com"):
        assert "leads to the Worker shop" in desk.deploy(flag, code=1).stderr
    assert desk.cloudflare.scripts == {}


def test_a_worker_that_is_no_router_is_neither_replaced_nor_given_a_key(desk):
    shop = desk.cloudflare.scripts["shop"] = Script()
    shop.files, shop.secrets = {"index.js": b"sell"}, {"BANK": "x"}
    for words in (("deploy",), ("worker-key", "--generate")):
        assert "the Worker shop is no llm-router" in desk.run(*words, "--use-wrangler=false", "--name=shop", code=1).stderr
    assert (shop.files, shop.secrets) == ({"index.js": b"sell"}, {"BANK": "x"})
    shop.metadata = {"compatibility_flags": ["python_workers"]}  # by hand, its secrets not yet set
    shop.secrets = {}
    desk.deploy("--name=shop")
    assert config_on(shop) == document_of()


class Breaking(FakeCloudflare):
    """Refuses the call whose number is `at`, counted from 1."""

    at = 0

    def _answer(self, request, body):
        if len(self.calls) == self.at:
            raise Refused(429, 971, "Please wait and consider throttling your request speed")
        return super()._answer(request, body)


def test_a_deployment_that_breaks_off_says_whether_the_worker_is_there(tmp_path):
    """All that is read is read before anything is written."""
    with Breaking() as cloudflare:
        desk = Desk(tmp_path, cloudflare)
        cloudflare.subdomain = ""
        assert "dashboard" in desk.deploy(code=1).stderr
        assert cloudflare.scripts == {}
        cloudflare.subdomain, told = "me", []
        for at in range(1, 9):
            cloudflare.scripts, cloudflare.at, cloudflare.calls = {}, at, []
            said = desk.deploy(code=1 if at < 6 else 0).stderr
            assert ("code and secrets are there" in said) is bool(cloudflare.scripts) is (at == 5) or at > 5
            told.append(cloudflare.calls[-1][0])
        assert told == ["GET", "GET", "GET", "PUT", "POST"] + ["POST"] * 3


# --- sizes ---


@pytest.mark.parametrize("models, parts, packed", [(1, 1, False), (80, 1, False), (130, 1, True), (600, 4, True)])
def test_a_configuration_is_minified_then_packed_then_spread(models, parts, packed):
    document = document_of(models)
    secrets = r.config_secrets(r.minify_document(document, ""))
    assert len(secrets) == parts
    assert list(secrets)[1:] == ["LLM_ROUTER_CONFIG_JSON_%d" % number for number in range(2, parts + 1)]
    assert max(len(text.encode()) for text in secrets.values()) <= 5000
    name, text = r.find_config_variable(secrets)
    assert (text[:1] != "{") is packed
    assert r.parse_config_text(r.unpack_config(text), name) == document


def test_what_utf8_cannot_say_is_escaped():
    text = r.config_secrets(r.minify_document({"metadata": "\ud800"}, KEY))["LLM_ROUTER_CONFIG_JSON"]
    assert json.loads(text) == {"metadata": "\ud800", "masterKey": KEY}


def test_an_older_spelling_of_the_key_is_replaced_not_doubled():
    document = {"master-key": "old", "providers": document_of()["providers"]}
    short = json.loads(r.minify_document(document, KEY))
    assert "master-key" not in short
    assert short["masterKey"] == KEY


def test_text_beyond_ascii_is_counted_in_bytes():
    secrets = r.config_secrets(r.minify_document(document_of(metadata={"note": "世界" * 1200}), ""))
    assert max(len(text.encode()) for text in secrets.values()) <= 5000


def test_a_configuration_that_cannot_fit_is_refused_before_anything_is_sent(desk):
    desk.configure(document_of(14_000))
    assert "secrets of 5 KB" in desk.deploy(code=2).stderr
    assert desk.cloudflare.calls == []


def test_what_a_larger_configuration_left_behind_changes_nothing_at_any_moment(desk):
    """It stays when only the configuration's own secrets are set, as by hand."""
    for models in (600, 300, 130, 1):
        desk.configure(document_of(models))
        desk.deploy()
        assert "LLM_ROUTER_CONFIG_JSON_4" in desk.script.secrets
        assert config_on(desk.script) == document_of(models)


# --- the key ---

STRONG = [
    KEY,
    "lr-Zk3_0aB9xQ7-LmN2pRtUvWxYz4CdEfGhIjKl5oS6e8",
    hashlib.sha256(b"a key").hexdigest(),
    "5f0c9c1e-2b7d-4e4f-9a51-7d0f6f5c3b2a",
]
WEAK = [
    "short-A1",
    "local_or_worker_key",
    "SuperSecretPassword123456!",
    "Master-Key-For-My-Router-0123456789",
    "aB1-" * 10,
    "abcdefghijklmnopqrstuvwxyzab",
]


@pytest.mark.parametrize("key", STRONG)
def test_a_strong_key_is_strong(key):
    assert r.key_weakness(key) == ""


@pytest.mark.parametrize("key", WEAK)
def test_a_weak_key_is_weak(key):
    assert r.key_weakness(key)


def test_a_weak_or_missing_key_is_refused_unless_the_weak_one_is_allowed(desk):
    for key in ("local_or_worker_key", ""):
        desk.configure(document_of(masterKey=key))
        for words in ((), ("--export-only=true",), ("--dry-run",)):
            assert "set-master-key --generate" in desk.deploy(*words, code=2).stderr
    desk.deploy("--allow-weak-master-key", code=2)
    assert desk.cloudflare.calls == []
    desk.configure(document_of(masterKey="local_or_worker_key"))
    desk.deploy("--allow-weak-master-key")
    assert config_on(desk.script)["masterKey"] == "local_or_worker_key"


def test_keys_of_clients_make_a_master_key_unnecessary(desk):
    client = {"name": "laptop", "sha256": hashlib.sha256(b"x").hexdigest()}
    desk.configure(document_of(masterKey="", clientKeys=[client]))
    desk.deploy()


def test_worker_key_makes_a_key_and_shows_it_once(desk):
    desk.deploy()
    key = json.loads(desk.run("worker-key", "--use-wrangler=false", "--generate", "--json").stdout)["masterKey"]
    assert desk.script.secrets["LLM_ROUTER_MASTER_KEY"] == key
    assert r.key_weakness(key) == ""


def test_worker_key_refuses_a_weak_key_and_a_worker_that_is_not_there(desk):
    assert "too weak" in desk.run("worker-key", "--use-wrangler=false", "--master-key=abc", code=2).stderr
    assert "there is no Worker" in desk.run("worker-key", "--use-wrangler=false", "--generate", code=1).stderr
    assert "give either" in desk.run("worker-key", "--use-wrangler=false", code=2).stderr


# --- who and where ---


def test_a_bad_token_is_said_to_be_one_and_is_not_shown(desk):
    said = desk.deploy(code=1, CLOUDFLARE_API_TOKEN="another-token-0123456789").stderr
    assert "API token is not accepted" in said and "another-token" not in said


def test_without_token_or_account_the_cure_is_named(desk):
    assert "CLOUDFLARE_API_TOKEN is not set" in desk.deploy(code=2, CLOUDFLARE_API_TOKEN="").stderr
    desk.cloudflare.accounts = []
    assert "--account-id" in desk.deploy(code=2).stderr


def test_of_several_accounts_one_has_to_be_named(desk):
    other = "f" * 32
    desk.cloudflare.accounts = [other, ACCOUNT]
    said = desk.deploy(code=2).stderr
    assert other in said and ACCOUNT in said
    desk.deploy("--account-id=" + ACCOUNT)
    assert ("PUT", SCRIPT) in desk.cloudflare.calls
    desk.deploy(CLOUDFLARE_ACCOUNT_ID=other)
    assert ("PUT", SCRIPT.replace(ACCOUNT, other)) in desk.cloudflare.calls


def test_the_token_goes_nowhere_without_tls(desk):
    assert "not https" in desk.deploy(code=2, CLOUDFLARE_API_BASE_URL="http://api.example.com").stderr


@pytest.mark.parametrize("flag", ["--name=Big", "--name=../x", "--domain=x/y", "--route=example.com/other/*", "--route=*.example.com/*", "--account-id=a/b"])
def test_what_cloudflare_cannot_take_is_refused_at_once(desk, flag):
    assert "has not the right form" in desk.deploy(flag, code=2).stderr


# --- nothing sent ---


def test_a_dry_run_shows_what_is_sent_afterwards_and_no_secret(desk):
    desk.configure(document_of(200))
    shown = json.loads(desk.deploy("--dry-run", "--account-id=" + ACCOUNT, "--json").stdout)["steps"]
    plain = desk.deploy("--dry-run").stdout
    assert desk.cloudflare.calls == []
    desk.deploy("--account-id=" + ACCOUNT)
    changes = ["%s %s" % call for call in desk.cloudflare.calls if call[0] != "GET"]
    assert [step["call"].replace(desk.cloudflare.url, "/client/v4") for step in shown] == changes
    parts = {part["name"]: part for part in shown[0]["sends"]}
    assert parts["llm_router.py"]["sha256"] == hashlib.sha256(desk.script.files["llm_router.py"]).hexdigest()
    metadata = parts["metadata"]["content"]
    sent = {binding["name"]: binding["text"] for binding in metadata.pop("bindings")}
    assert metadata == {name: value for name, value in desk.script.metadata.items() if name != "bindings"}
    assert list(sent) == list(desk.script.secrets)
    for name, secret in desk.script.secrets.items():
        assert sent[name] == "%s (%d characters)" % (r.mask(secret), len(secret))
        assert secret not in plain + json.dumps(shown)


def test_export_only_writes_a_private_secret_and_the_line_that_uses_it(desk):
    done = desk.run("deploy", "--export-only=true", "--out=config.json", CLOUDFLARE_API_TOKEN="")
    path = desk.folder / "config.json"
    assert json.loads(path.read_text()) == document_of()
    assert "\n" not in path.read_text() and '": ' not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    line = "wrangler secret put LLM_ROUTER_CONFIG_JSON --name llm-router-route < %s"  # good in any folder
    assert line % os.path.realpath(str(path)) in done.stdout
    assert "wrangler secret put P_KEY --name llm-router-route" in done.stdout
    assert desk.cloudflare.calls == []


def test_a_large_configuration_is_exported_packed_a_huge_one_as_several_secrets(desk):
    desk.configure(document_of(130))
    desk.run("deploy", "--export-only=true", "--out=one")
    text = (desk.folder / "one").read_text()
    assert len(text) <= 5000 and json.loads(r.unpack_config(text)) == document_of(130)
    desk.configure(document_of(600))
    assert "wrangler secret bulk --name mine < " in desk.run("deploy", "--export-only=true", "--out=many", "--name=mine").stdout
    secrets = json.loads((desk.folder / "many").read_text())
    assert secrets["P_KEY"] and json.loads(r.unpack_config(r.find_config_variable(secrets)[1])) == document_of(600)


def test_the_exported_project_is_the_one_of_the_repository(desk):
    desk.run("deploy", "--export-dir=project", CLOUDFLARE_API_TOKEN="")
    made = {path.name: path.read_bytes() for path in (desk.folder / "project").iterdir()}
    assert made.pop("llm_router.py") == desk.program.read_bytes()
    assert made == {path.name: path.read_bytes() for path in (PROGRAM.parent / "worker_export").iterdir() if path.name in made}
    assert set(made) == {"entry.py", "wrangler.toml"}


def test_a_wrangler_toml_that_somebody_changed_outlives_the_next_export(desk):
    folder = desk.folder / "project"
    assert desk.run("deploy", "--export-dir=project").stderr == ""
    assert desk.run("deploy", "--export-dir=project").stderr == ""
    mine = (folder / "wrangler.toml").read_text() + "[vars]\nLLM_ROUTER_LOG_LEVEL = 'error'\n"
    (folder / "wrangler.toml").write_text(mine)
    (folder / "llm_router.py").write_text("an older one")
    done = desk.run("deploy", "--export-dir=project")
    assert "wrangler.toml there has other words and stays" in done.stderr
    assert "wrangler.toml" not in done.stdout.splitlines()[0]
    assert (folder / "wrangler.toml").read_text() == mine
    assert (folder / "llm_router.py").read_bytes() == desk.program.read_bytes()


def test_an_exported_project_has_the_name_and_the_place_that_were_given(desk):
    desk.run("deploy", "--export-dir=one", "--name=mine", "--domain=llm.example.com")
    toml = (desk.folder / "one" / "wrangler.toml").read_text()
    assert 'name = "mine"' in toml and "workers_dev = false" in toml
    assert 'routes = [{ pattern = "llm.example.com", custom_domain = true }]' in toml


# --- wrangler ---

STAND_IN = """#!%s
import json, os, sys
with open(%r, "a") as log:
    files = {name: open(name).read() for name in sorted(os.listdir(".")) if name != "llm_router.py"}
    json.dump({"argv": sys.argv[1:], "stdin": sys.stdin.read(), "files": files, "mode": oct(os.stat(".").st_mode & 0o777),
               "account": os.environ.get("CLOUDFLARE_ACCOUNT_ID")}, log)
    log.write("\\n")
if sys.argv[1:3] == ["secret", "list"]:
    print(json.dumps([{"name": os.environ.get("STAND_IN_SECRET", "LLM_ROUTER_CONFIG_JSON"), "type": "secret_text"}], indent=2))
if sys.argv[1] == "deploy":
    print("  https://llm-router-route.me.workers.dev")
failing, _, code = os.environ.get("STAND_IN_FAILS", "").partition("=")
sys.exit(int(code) if failing and failing in sys.argv else 0)
"""


@pytest.fixture
def wrangler(desk):
    """A stand-in for wrangler in PATH; `wrangler()` gives its calls. The real one: tests/worker."""
    if os.name != "posix":
        pytest.skip("a script with #! stands in for wrangler")
    log, program = desk.folder / "calls", desk.folder / "bin" / "wrangler"
    program.parent.mkdir()
    program.write_text(STAND_IN % (sys.executable, str(log)))
    program.chmod(0o755)
    path = str(program.parent) + os.pathsep + os.environ["PATH"]
    desk.path = {"PATH": path, "CLOUDFLARE_API_TOKEN": ""}
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def test_wrangler_is_used_when_it_is_there_and_gets_secrets_over_stdin_only(desk, wrangler):
    done = json.loads(desk.run("deploy", "--json", "--account-id=" + ACCOUNT, **desk.path).stdout)
    assert (done["with"], done["url"]) == ("wrangler", "https://llm-router-route.me.workers.dev")
    calls = wrangler()
    assert [call["argv"][:2] for call in calls] == [["secret", "list"], ["deploy"], ["secret", "bulk"]]
    assert json.loads(json.loads(calls[2]["stdin"])["LLM_ROUTER_CONFIG_JSON"]) == document_of()
    assert {call["account"] for call in calls} == {ACCOUNT}
    assert calls[0]["mode"] == "0o700" and set(calls[0]["files"]) == {"entry.py", "wrangler.toml"}
    for call in calls:
        assert KEY not in json.dumps([call["argv"], call["files"]])
    assert desk.cloudflare.calls == []


def test_with_wrangler_a_worker_that_is_no_router_is_left_alone_too(desk, wrangler):
    for words in (("deploy",), ("worker-key", "--generate")):
        said = desk.run(*words, "--name=shop", code=1, STAND_IN_SECRET="BANK", **desk.path).stderr
        assert "the Worker shop is no llm-router" in said
    assert [call["argv"][:2] for call in wrangler()] == [["secret", "list"]] * 2


def test_worker_key_hands_wrangler_the_key_over_stdin(desk, wrangler):
    desk.run("worker-key", "--master-key=" + KEY, **desk.path)
    assert [call["argv"][:2] for call in wrangler()] == [["secret", "list"], ["secret", "put"]]
    assert wrangler()[-1]["stdin"] == KEY and KEY not in wrangler()[-1]["argv"]


def test_wrangler_that_fails_is_quoted_and_one_that_is_missing_is_named(desk, wrangler):
    said = desk.run("deploy", code=1, STAND_IN_FAILS="deploy=7", **desk.path).stderr
    assert "wrangler deploy failed (code 7)" in said and "is there" not in said
    said = desk.run("deploy", code=1, STAND_IN_FAILS="bulk=8", **desk.path).stderr
    assert "the code is there, its secrets are not" in said and "wrangler secret bulk failed (code 8)" in said
    assert "wrangler is not installed" in desk.run("deploy", "--use-wrangler=true", code=2, PATH="").stderr


def test_a_dry_run_with_wrangler_shows_its_calls(desk, wrangler):
    shown = json.loads(desk.run("deploy", "--dry-run", "--json", **desk.path).stdout)["steps"]
    assert [step["call"] for step in shown] == ["wrangler deploy", "wrangler secret bulk --name llm-router-route"]
    assert not Path(desk.folder / "calls").exists()


# --- on a terminal ---


@pytest.fixture
def terminal(desk, monkeypatch, capsys):
    """`terminal(*answers)`: someone who types; then commands run in this process."""

    def start(*answers):
        waiting = list(answers)
        monkeypatch.setattr("builtins.input", lambda question="": waiting.pop(0))
        monkeypatch.setattr("getpass.getpass", lambda question="": waiting.pop(0))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        environ = {"CLOUDFLARE_API_BASE_URL": desk.cloudflare.url, "P_KEY": "sk-p-0123456789abcdef"}
        path = str(desk.folder / ".llm-router.json")

        def run(*words):
            code = r.run_command([*words, "--config=" + path, "--use-wrangler=false"], environ)
            assert not waiting, "never asked for"
            return code, capsys.readouterr().out

        return run

    return start


def test_a_guided_deployment_asks_for_key_domain_token_and_account(desk, terminal):
    desk.configure(document_of(masterKey="weak"))
    desk.cloudflare.accounts = ["f" * 32, ACCOUNT]
    code, said = terminal("", "", TOKEN, "2")("deploy")
    assert code == 0
    stored = json.loads((desk.folder / ".llm-router.json").read_text())["masterKey"]
    assert "master key (shown only now): " + stored in said
    assert config_on(desk.script)["masterKey"] == stored
    assert ("PUT", SCRIPT) in desk.cloudflare.calls
    assert TOKEN not in said


def test_who_wants_no_new_key_deploys_nothing(desk, terminal):
    desk.configure(document_of(masterKey="weak"))
    with pytest.raises(r.UsageError, match="nothing was deployed"):
        terminal("n")("deploy")
    assert desk.cloudflare.calls == []


def test_a_missing_key_is_not_called_a_weak_one_and_without_a_provider_nothing_is_deployed(desk):
    desk.configure(document_of(masterKey=""))
    assert "there is no master key" in desk.run("deploy", "--use-wrangler=false", code=2).stderr
    desk.configure(document_of(providers=[], defaultModel=""))
    assert "no enabled provider" in desk.run("deploy", "--use-wrangler=false", code=2).stderr
    (desk.folder / ".llm-router.json").unlink()
    said = desk.run("deploy", "--use-wrangler=false", code=2).stderr
    assert "upsert-provider" in said and "OPENAI_API_KEY" not in said  # which deploy makes nothing of
    assert desk.cloudflare.calls == []


# --- an API that means harm ---


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers every request with `server.answer`: (status, headers, body)."""

    def do_GET(self):
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def odd():
    """`odd(status, body, **headers)` -> a Cloudflare that gets just that."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def make(status, body, **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            server.answer = status, {name.replace("_", "-"): value for name, value in headers.items()}, data
            url = "http://127.0.0.1:%d/v4" % server.server_address[1]
            return r.Cloudflare({"CLOUDFLARE_API_BASE_URL": url}, "token-planted")

        yield make
        server.shutdown()


ODD_RESULTS = [7, "x", [7, None, {}], {"a": 1}, [{"id": "../../zones"}], [{"id": "a\r\nx: y"}], [{"id": ["x"]}], True]


@pytest.mark.parametrize("result", ODD_RESULTS, ids=range(len(ODD_RESULTS)))
@pytest.mark.parametrize("ask", ["accounts", "find_zone", "secret_names"])
def test_no_answer_of_the_api_leads_anywhere_else_or_ends_in_anything_but_a_router_error(odd, ask, result):
    cloudflare = odd(200, {"success": True, "result": result})
    words = {"accounts": (), "find_zone": ("a.example.com",), "secret_names": (r.Site(account="a"),)}[ask]
    try:
        found = getattr(cloudflare, ask)(*words)
    except r.RouterError as error:
        assert error.message.isprintable()
    else:
        assert "/" not in str(found) and "\\r" not in str(found) or ask == "secret_names"


@pytest.mark.parametrize("errors", [7, "x", [None, 7, {"code": ["x"], "message": {"\x1b[2J": 1}}], [{"code": 10000, "message": "\x1b]0;x\x07"}]])
def test_a_refusal_is_told_in_one_harmless_line_whatever_it_holds(odd, errors):
    with pytest.raises(r.RouterError, match="Cloudflare answers 403") as caught:
        odd(403, {"success": False, "errors": errors}).accounts()
    assert caught.value.message.isprintable() and "token-planted" not in caught.value.message


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_breaks_off_never_ends_or_leads_away_is_an_error(odd, status, monkeypatch):
    for body, headers in ((b"5\r\nab", {"transfer_encoding": "chunked"}), (b"{}", {"content_length": "900"})):
        with pytest.raises(r.RouterError):
            odd(status, body, **headers).ask("/x") if status == 200 else odd(status, body, **headers).accounts()
    monkeypatch.setattr(r, "_MAX_API_BYTES", 1000)
    with pytest.raises(r.RouterError, match="too large"):
        odd(status, b" " * 100_000).accounts()
    with pytest.raises(r.RouterError, match="answers 302"):
        odd(302, b"", location="http://127.0.0.1:9/").accounts()


@pytest.mark.parametrize("status", [200, 502])
def test_a_page_in_place_of_an_answer_is_no_empty_list_of_accounts(odd, status):
    with pytest.raises(r.RouterError, match="answers %d .* no JSON, as from a proxy" % status):
        odd(status, b"<html>sign in</html>").accounts()


def test_a_token_that_no_header_can_hold_is_not_quoted(odd):
    cloudflare = odd(200, {"result": []})
    cloudflare._token = "planted\nsecret"
    with pytest.raises(r.RouterError) as caught:
        cloudflare.accounts()
    assert "planted" not in caught.value.message
