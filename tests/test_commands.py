"""COMMANDS and MAIN: the command line as people and scripts use it."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llm_router as r

PROGRAM = r.__file__

README_LINE = (
    'config --operation=upsert-provider --provider-id=openrouter --name="OpenRouter"'
    " --base-url=https://openrouter.ai/api/v1 --api-key=sk-or-v1-... --models=gpt-4o,claude-3-7-sonnet-latest"
    " --format=openai --skip-probe=true"
)


class Home:
    """A home directory, and the program run in it."""

    def __init__(self, folder, capsys, monkeypatch):
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        self.file = folder / ".llm-router.json"
        self.started = []

    def run(self, line, stdin=None):
        """(exit code, stdout, stderr) of a command line."""
        if stdin is not None:
            self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self.capsys.readouterr()
        code = r.main(shlex.split(line))
        out, err = self.capsys.readouterr()
        return code, out, err

    def ok(self, line, stdin=None):
        code, out, err = self.run(line, stdin)
        assert code == 0, err
        return out

    def refused(self, line, code=2, stdin=None):
        got, out, err = self.run(line, stdin)
        assert got == code
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("llm-router: ")
        return err

    def document(self):
        return json.loads(self.file.read_text(encoding="utf-8"))

    def write(self, document):
        self.file.write_text(json.dumps(document))
        self.file.chmod(0o600)


@pytest.fixture
def home(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "h"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    for row in r.PRESETS:
        for name in r.preset_variables(row):
            monkeypatch.delenv(name, raising=False)
    made = Home(folder, capsys, monkeypatch)
    monkeypatch.setattr(r, "run_server", lambda options: made.started.append(options) or 0, raising=False)
    monkeypatch.setattr(r, "run_demo", lambda once, port: made.started.append((once, port)) or 0, raising=False)
    return made


@pytest.fixture
def filled(home):
    home.ok(README_LINE)
    home.ok("config --operation=set-master-key --master-key=master-key-0123456789")
    return home


# ----- the README's line -----


def test_the_line_of_the_readme_stores_both_models_without_a_prompt(home):
    home.ok(README_LINE)
    provider = home.document()["providers"][0]
    assert [model["id"] for model in provider["models"]] == ["gpt-4o", "claude-3-7-sonnet-latest"]
    assert (provider["id"], provider["name"], provider["format"]) == ("openrouter", "OpenRouter", "openai")
    assert provider["apiKey"] == "sk-or-v1-..."
    assert r.find_problems(home.document()) == []


NO_NETWORK = """
import runpy, socket, sys
def refuse(*_):
    raise SystemExit("a socket")
socket.socket = refuse
socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _environment(home):
    return dict(os.environ, HOME=str(home), USERPROFILE=str(home))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_of_the_readme_works_as_a_program_with_and_without_a_terminal(tmp_path, terminal):
    command = [sys.executable, "-c", NO_NETWORK, PROGRAM] + shlex.split(README_LINE)
    if terminal:
        pty = pytest.importorskip("pty")
        controller, terminal_side = pty.openpty()
        child = subprocess.Popen(
            command, env=_environment(tmp_path), stdin=terminal_side, stdout=terminal_side, stderr=terminal_side
        )
        os.close(terminal_side)
        code = child.wait(timeout=60)
        output = os.read(controller, 65536).decode()
        os.close(controller)
    else:
        done = subprocess.run(
            command, env=_environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        code, output = done.returncode, done.stdout + done.stderr
    assert code == 0, output
    models = json.loads((tmp_path / ".llm-router.json").read_text())["providers"][0]["models"]
    assert [model["id"] for model in models] == ["gpt-4o", "claude-3-7-sonnet-latest"]
    assert "\x1b" not in output


# ----- flags -----


@pytest.mark.parametrize("form", ["--provider-id=p", "--provider-id p"])
@pytest.mark.parametrize(
    "flag", ["--skip-probe", "--skip-probe=true", "--skip-probe=YES", "--skip-probe on", "--skip-probe=0"]
)
def test_flags_take_their_value_in_every_form(home, form, flag):
    home.ok(
        "config --operation upsert-provider %s %s --base-url https://x.example --api-key k --models=a,b" % (form, flag)
    )
    assert home.document()["providers"][0]["id"] == "p"


def test_a_value_may_begin_with_a_dash(home):
    home.ok("config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --api-key -abc")
    assert home.document()["providers"][0]["apiKey"] == "-abc"


def test_a_list_that_is_given_twice_is_one_list(home):
    line = "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=a,b --models c --skip-probe"
    home.ok(line)
    assert [model["id"] for model in home.document()["providers"][0]["models"]] == ["a", "b", "c"]


def test_what_stands_in_a_configuration_reaches_no_terminal_as_an_escape_code(home):
    provider = {"id": "p", "baseUrl": "https://x.example", "models": ["m"]}
    document = {"providers": [provider], "modelAliases": {"fast\x1b[31m": "p/m"}, "defaultModel": "fast"}
    home.file.write_text(json.dumps(document))
    code, out, err = home.run("config --operation=validate")
    assert code == 2 and "did you mean fast\\x1b[31m?" in out and "\x1b" not in out + err


def test_a_model_list_takes_every_name_as_given(home):
    home.ok(
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --api-key=k --models 'llama, grok,a/b:c,'"
    )
    assert [m["id"] for m in home.document()["providers"][0]["models"]] == ["llama", "grok", "a/b:c"]


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("strat", "start"),
        ("confg", "config"),
        ("setting", "settings"),
        ("start --prot=1", "--port"),
        ("start --origin-retry-attempt=1", "--origin-retry-attempts"),
        ("config --operaton=list", "--operation"),
        ("config --operation=upsert-providr", "upsert-provider"),
        ("config --operation=lst", "list"),
        ("config --operation=upsert-provider --provider-id=x --base-ur=y", "--base-url"),
        ("--debg", "--debug"),
    ],
)
def test_what_is_unknown_is_refused_naming_the_nearest(home, line, near):
    assert "did you mean %s?" % near in home.refused(line)
    assert not home.file.exists()


@pytest.mark.parametrize(
    "line", ["xyzzy", "start xyzzy", "config --operation=xyzzy", "--xyzzy", "start -x", "-h=3", "--config", "start --"]
)
def test_what_is_unknown_and_near_nothing_is_refused_with_a_hint(home, line):
    assert "--help" in home.refused(line)


@pytest.mark.parametrize(
    "line",
    [
        "config --provider-id=p",
        "config --operation=upsert-provider",
        "config --operation=upsert-provider --provider-id=p",
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example",
        "config --operation=upsert-provider --provider-id=p --base-url=nope --models=m",
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --skip-probe=perhaps",
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --headers=[]",
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --headers={",
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --format=soap",
        "config --operation=list --models=a",
        "config --operation=remove-provider",
        "config --operation=remove-provider --provider-id=p",
        "config --operation=remove-model --provider-id=p",
        "config --operation=set-model-fallbacks --provider-id=p --model=m",
        "config --operation=set-model-fallbacks --provider-id=p --model=m --fallback-models=a --clear-fallbacks",
        "config --operation=set-model-alias --alias=x",
        "config --operation=set-default-model",
        "config --operation=set-default-model --default-model=nope/x",
        "config --operation=set-master-key",
        "config --operation=set-master-key --master-key=a --generate",
        "config --operation=set-master-key --master-key=",
        "config --operation=validate",
        "--json=perhaps",
        "demo --port=x",
        "env --shell=tcsh",
    ],
)
def test_wrong_input_is_one_line_exit_2_and_makes_nothing(home, line):
    home.refused(line)
    assert not list(home.folder.iterdir())


@pytest.mark.parametrize("line", ["-h", "--help"] + ["%s --help" % row.name for row in r.COMMANDS if row.name])
def test_every_command_has_a_help_with_an_example(home, line):
    out = home.ok(line)
    assert "example:\n  llm-router" in out
    assert "-h, --help" in out


@pytest.mark.parametrize("row", r.OPERATIONS, ids=lambda row: row.name)
def test_every_operation_has_a_help_of_its_own_flags_and_an_example(home, row):
    out = home.ok("config --operation=%s -h" % row.name)
    assert row.example in out
    for flag in row.flags:
        assert "--" + flag.key in out
    assert "--watch-config" not in out


@pytest.mark.parametrize("line", [line for row in r.OPERATIONS + r.COMMANDS for line in row.example.split("\n")])
def test_every_example_parses(line, monkeypatch):
    words = shlex.split(line)
    assert words[0] == "llm-router"
    monkeypatch.setattr(r, "_read_secret", lambda name: "typed")
    command = next(c for c in r.COMMANDS if c.name == words[1])
    given = r.parse_flags(words[2:], command)
    assert bool(given.get("tail")) == command.passes_on


def flags_of(name):
    return next(row for row in r.COMMANDS if row.name == name).flags


def test_every_flag_of_an_operation_exists_and_those_required_are_among_them():
    for row in r.OPERATIONS:
        assert set(row.needs.replace("|", " ").split()) <= {flag.key for flag in row.flags}
        assert set(row.flags) <= set(flags_of("config"))


def test_every_setting_is_a_flag_of_start():
    assert {row.flag[2:] for row in r.SETTINGS} <= {flag.key for flag in flags_of("start")}


@pytest.mark.parametrize("line", ["--version", "start --version", "config --version=true"])
def test_the_version_is_told_anywhere(home, line):
    assert home.ok(line) == "llm-router %s\n" % r.__version__


# ----- no command -----


@pytest.mark.parametrize("line", ["", "--json"])
def test_no_command_without_a_configuration_tells_the_ways_on_and_makes_nothing(home, line):
    out = home.ok(line)
    assert not list(home.folder.iterdir())
    if not line:
        for way in ("upsert-provider", "OPENAI_API_KEY", "demo", "--help"):
            assert way in out


def test_no_command_shows_the_masked_summary(filled):
    before = sorted(p.name for p in filled.folder.iterdir())
    out = filled.ok("")
    for word in ("openrouter/gpt-4o", "https://openrouter.ai/api/v1", str(filled.file), "mas...6789", "--help"):
        assert word in out
    assert "master-key-0123456789" not in out
    assert "sk-or-v1-..." not in out
    assert sorted(p.name for p in filled.folder.iterdir()) == before


def test_no_command_as_a_program_without_a_terminal_exits_0_and_makes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, PROGRAM], env=_environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no configuration" in done.stdout
    assert not list(tmp_path.iterdir())


# ----- config operations -----


def test_an_api_key_and_a_master_key_can_come_from_stdin(home):
    home.ok(
        "config --operation=upsert-provider --provider-id=p --base-url=https://x.example --models=m --api-key=-",
        stdin="sk-in\nmore\n",
    )
    home.ok("config --operation=set-master-key --master-key -", stdin="mk-in\r\n")
    assert home.document()["providers"][0]["apiKey"] == "sk-in"
    assert home.document()["masterKey"] == "mk-in"
    home.refused("config --operation=set-master-key --master-key=-", stdin="")


def test_bytes_of_no_text_on_stdin_are_refused_in_words(home):
    """Where the locale is one of UTF-8, Python would raise as it reads them."""
    home.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"k\xffey\n"), encoding="utf-8"))
    assert "has a character that no key has" in home.refused("config --operation=set-master-key --master-key=-")


def test_a_key_typed_at_a_terminal_is_not_shown(home):
    import getpass

    terminal = io.StringIO("shown\n")
    terminal.isatty = lambda: True
    home.monkeypatch.setattr(sys, "stdin", terminal)
    home.monkeypatch.setattr(getpass, "getpass", lambda prompt: "hidden")
    home.ok("config --operation=set-master-key --master-key=-")
    assert home.document()["masterKey"] == "hidden"


def test_each_flag_of_a_provider_arrives_in_the_file(home):
    home.ok(
        "config --operation=upsert-provider --provider-id=p --name=P --openai-base-url=https://x.example/v1"
        " --claude-base-url=https://x.example/anthropic --api-key-env=MY_KEY --models=m --formats=openai,anthropic"
        """ --format=anthropic --headers='{"x-title": "me", "user-agent": null}' --auth-type=bearer"""
    )
    assert home.document()["providers"] == [
        {
            "id": "p",
            "name": "P",
            "baseUrlByFormat": {"openai": "https://x.example/v1", "anthropic": "https://x.example/anthropic"},
            "apiKeyEnv": "MY_KEY",
            "models": [{"id": "m"}],
            "formats": ["openai", "anthropic"],
            "format": "anthropic",
            "headers": {"x-title": "me", "user-agent": None},
            "auth": {"type": "bearer"},
        }
    ]


def test_the_operations_change_what_they_say(filled):
    filled.ok(
        "config --operation=set-model-fallbacks --provider-id=openrouter --model=gpt-4o --fallback-models=openrouter/claude-3-7-sonnet-latest"
    )
    assert filled.document()["providers"][0]["models"][0]["fallbackModels"] == ["openrouter/claude-3-7-sonnet-latest"]
    filled.ok("config --operation=set-model-fallbacks --provider-id=openrouter --model=gpt-4o --clear-fallbacks")
    assert "fallbackModels" not in filled.document()["providers"][0]["models"][0]
    filled.ok("config --operation=set-model-alias --alias=fast --model=openrouter/gpt-4o")
    filled.ok(
        "config --operation=set-model-alias --alias=both --provider-id=openrouter --model=gpt-4o,claude-3-7-sonnet-latest"
    )
    assert filled.document()["modelAliases"] == {
        "fast": "openrouter/gpt-4o",
        "both": ["openrouter/gpt-4o", "openrouter/claude-3-7-sonnet-latest"],
    }
    filled.ok("config --operation=set-default-model --provider-id=openrouter --model=claude-3-7-sonnet-latest")
    assert filled.document()["defaultModel"] == "openrouter/claude-3-7-sonnet-latest"
    filled.ok("config --operation=set-default-model --default-model=fast")
    filled.ok("config --operation=set-model-alias --alias=fast --clear-alias")
    assert "defaultModel" not in filled.document()
    filled.ok("config --operation=remove-model --provider-id=openrouter --model=gpt-4o")
    assert [m["id"] for m in filled.document()["providers"][0]["models"]] == ["claude-3-7-sonnet-latest"]
    filled.ok("config --operation=remove-provider --provider-id=openrouter")
    assert filled.document()["providers"] == []


def test_a_generated_key_is_long_shown_once_and_stored(home):
    out = home.ok("config --operation=set-master-key --generate")
    key = home.document()["masterKey"]
    assert len(key) > 40
    assert out.count(key) == 1
    assert key not in home.ok("config --operation=list")
    shown = json.loads(home.ok("config --operation=set-master-key --generate --json"))
    assert shown["masterKey"] == home.document()["masterKey"] != key


def test_edits_answer_as_json(home):
    shown = json.loads(home.ok(README_LINE + " --json"))
    assert shown["path"] == str(home.file)
    assert "added provider openrouter" in shown["changes"]


def test_no_operation_ever_shows_a_key(filled):
    for line in (
        README_LINE,
        "config --operation=list",
        "config --operation=list --json",
        "config --operation=validate",
        "",
    ):
        _, out, err = filled.run(line.replace("sk-or-v1-...", "sk-or-v1-secret"))
        assert "sk-or-v1-secret" not in out + err
        assert "master-key-0123456789" not in out + err


def test_config_edits_the_file_that_is_given_and_warns_where_a_variable_hides_it(home, tmp_path):
    other = tmp_path / "other.json"
    home.monkeypatch.setenv("LLM_ROUTER_CONFIG_JSON", "{}")
    home.ok("config --operation=set-master-key --generate --config=%s" % other)
    assert other.exists()
    assert not home.file.exists()
    code, _, err = home.run("config --operation=set-master-key --generate")
    assert code == 0
    assert "LLM_ROUTER_CONFIG_JSON" in err
    assert home.file.exists()


def test_list_as_json_is_the_masked_document(filled):
    shown = json.loads(filled.ok("config --operation=list --json"))
    assert shown["source"] == str(filled.file)
    assert shown["masterKey"] == "mas...6789"
    assert shown["providers"][0]["models"] == [{"id": "gpt-4o"}, {"id": "claude-3-7-sonnet-latest"}]


def test_list_still_works_on_a_configuration_with_problems(filled):
    document = filled.document()
    document["providers"].append({"id": 5, "models": "x", "baseUrl": "nope"})
    filled.write(document)
    out = filled.ok("config --operation=list")
    assert "openrouter/gpt-4o" in out
    assert "validate" in out


def test_validate_says_ok_or_every_problem_with_path_and_cure(filled):
    assert "ok" in filled.ok("config --operation=validate")
    assert json.loads(filled.ok("config --operation=validate --json")) == {
        "ok": True,
        "source": str(filled.file),
        "problems": [],
    }
    filled.write(dict(filled.document(), defaultModel="openrouter/gpt-4p", surprise=1))
    code, out, _ = filled.run("config --operation=validate")
    assert code == 2
    assert "error: defaultModel: " in out
    assert "did you mean openrouter/gpt-4o?" in out
    assert "warning: surprise: " in out
    code, out, _ = filled.run("config --operation=validate --json")
    shown = json.loads(out)
    assert (code, shown["ok"]) == (2, False)
    assert {(p["path"], p["level"]) for p in shown["problems"]} == {("defaultModel", "error"), ("surprise", "warning")}
    assert all(p["cure"] for p in shown["problems"])


def test_validate_names_file_line_and_column_as_compilers_do(filled):
    filled.file.write_text('{\n  // mine\n  "providers": [],\n  "defaultModel": "p/m",\n}')
    filled.file.chmod(0o600)
    code, out, _ = filled.run("config --operation=validate")
    assert code == 2 and "%s:4:3: error: defaultModel: " % filled.file in out
    shown = json.loads(filled.run("config --operation=validate --json")[1])
    assert (shown["problems"][-1]["line"], shown["problems"][-1]["column"]) == (4, 3)


def test_the_schema_is_printed_without_any_configuration(home):
    assert json.loads(home.ok("config --operation=schema"))["definitions"]["provider"]["required"] == ["models"]
    assert not home.file.exists()


def test_an_export_is_masked_on_the_screen_and_complete_in_a_private_file(filled, tmp_path):
    shown = filled.ok("config --operation=export")
    secret = filled.document()["providers"][0]["apiKey"]
    assert secret not in shown and json.loads(shown)["defaultModel"] == filled.document()["defaultModel"]
    target = tmp_path / "exported.json"
    assert secret not in filled.ok("config --operation=export --out=%s" % target)
    assert json.loads(target.read_text()) == filled.document() and target.read_text().count("\n") == 1
    assert target.stat().st_mode & 0o777 == 0o600
    assert json.loads(filled.ok("config --operation=export --show-secrets")) == filled.document()


def test_every_field_of_a_provider_is_a_flag(filled):
    line = (
        "config --operation=upsert-provider --provider-id=openrouter --skip-probe --enabled=false --anthropic-beta=a,b"
    )
    filled.ok(
        line
        + """ --timeouts='{"idleMs": 5}' --proxy=none --metadata='{"team": "x"}' --claude-base-url=https://c.example"""
    )
    entry = filled.document()["providers"][0]
    assert (entry["enabled"], entry["anthropicBeta"], entry["timeouts"]) == (False, ["a", "b"], {"idleMs": 5})
    assert entry["baseUrlByFormat"] == {"anthropic": "https://c.example"} and entry["metadata"] == {"team": "x"}
    filled.ok("config --operation=upsert-provider --provider-id=openrouter --skip-probe --proxy=")
    assert "proxy" not in filled.document()["providers"][0]
    known = {"--" + flag.key for flag in flags_of("config")}
    assert {"--" + r._snake(field.key).replace("_", "-") for field in r.FIELDS["provider"]} - known == {"--id"}


def test_validate_exits_0_when_there_are_only_warnings(filled):
    filled.write(dict(filled.document(), surprise=1))
    assert "warning: surprise" in filled.ok("config --operation=validate")


@pytest.mark.parametrize("line", ["", "config --operation=list", "config --operation=validate", "start", README_LINE])
def test_broken_json_is_shown_with_a_caret_and_left_alone(home, line):
    """trap 178"""
    home.file.write_text('{"masterKey": "secret",\n  oops}')
    code, out, err = home.run(line)
    assert (code, out) == (2, "")
    assert "%s:2:3: " % home.file in err
    assert err.rstrip("\n").endswith("^")
    assert "secret" not in err
    assert home.file.read_text() == '{"masterKey": "secret",\n  oops}'


def test_broken_json_is_a_problem_of_validate_as_json(home):
    home.file.write_text("{oops}")
    code, out, err = home.run("config --operation=validate --json")
    assert (code, err) == (2, "")
    assert json.loads(out)["ok"] is False


# ----- start -----


def start(home, line=""):
    home.ok("start " + line)
    return home.started[-1]


def test_start_hands_checked_options_to_the_server(filled):
    options = start(filled)
    settings = options.settings
    assert (settings.host, settings.port, settings.log_format) == ("127.0.0.1", 8787, "text")
    assert (options.require_auth, options.watch_config, options.debug) == (False, True, False)
    assert options.loaded.path == options.loaded.source == str(filled.file)
    assert options.loaded.document == filled.document()
    assert options.config == r.read_config(filled.document(), {})
    assert options.settings == r.Settings()


def test_start_takes_its_flags_and_every_setting(filled):
    options = start(
        filled,
        "--host=::1 --port 0 --watch-config=false --require-auth --log-format=JSON --debug --trail-size=7"
        " --allow-policy-fallback --context-fallback=off",
    )
    assert (options.settings.host, options.settings.port) == ("::1", 0)
    assert (options.watch_config, options.require_auth, options.debug) == (False, True, True)
    assert options.settings.log_format == "json"
    assert (options.settings.trail_size, options.settings.allow_policy_fallback) == (7, True)


def test_start_reads_host_port_and_settings_from_the_environment(filled):
    filled.monkeypatch.setenv("LLM_ROUTER_PORT", "9000")
    filled.monkeypatch.setenv("LLM_ROUTER_HOST", "localhost")
    filled.monkeypatch.setenv("LLM_ROUTER_TRAIL_SIZE", "oops")
    code, _, err = filled.run("start")
    settings = filled.started[-1].settings
    assert (code, settings.host, settings.port, settings.trail_size) == (0, "localhost", 9000, 500)
    assert "LLM_ROUTER_TRAIL_SIZE" in err
    assert start(filled, "--port=9001").settings.port == 9001


@pytest.mark.parametrize(
    "flag",
    ["--port=x", "--port=65536", "--port=-1", "--port=", "--log-format=xml", "--require-auth=perhaps", "--pool-sise=1"],
)
def test_start_refuses_flags_it_cannot_use(filled, flag):
    filled.refused("start " + flag)
    assert filled.started == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "192.168.1.4", "example.com"])
def test_an_address_that_others_can_reach_needs_auth_or_an_explicit_yes(filled, host):
    """Hardening: a proxy open to the network spends its owner's money."""
    error = filled.refused("start --host=" + host)
    assert "--require-auth" in error
    assert "--allow-unauthenticated" in error
    filled.refused("start --allow-unauthenticated=false --host " + host)
    assert start(filled, "--require-auth=true --host=" + host).require_auth
    assert start(filled, "--allow-unauthenticated --host=" + host).settings.host == host.strip("[]")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_loopback_addresses_need_no_auth(filled, host):
    assert start(filled, "--host=" + host).settings.host == host.strip("[]")


def test_auth_without_a_master_key_is_refused(home):
    home.ok(README_LINE)
    assert "set-master-key" in home.refused("start --require-auth")
    home.monkeypatch.setenv("LLM_ROUTER_MASTER_KEY", "from-env")
    assert start(home, "--require-auth").config.master_key == "from-env"


def test_without_a_configuration_start_names_three_ways_on(home):
    error = home.refused("start")
    for way in ("upsert-provider", "OPENAI_API_KEY", "demo"):
        assert way in error
    assert not home.file.exists()


def test_without_a_configuration_key_variables_make_one_in_memory(home):
    home.monkeypatch.setenv("GROQ_API_KEY", "gsk-1")
    home.monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-2")
    options = start(home)
    assert [(p.id, p.api_key) for p in options.config.providers] == [("anthropic", "sk-2"), ("groq", "gsk-1")]
    assert options.loaded.path == str(home.folder / ".llm-router.json")  # a reload takes it once it is there
    assert "GROQ_API_KEY" in options.loaded.source
    assert "ANTHROPIC_API_KEY" in options.loaded.source
    assert not list(home.folder.iterdir())


def test_a_file_that_is_named_must_exist_whatever_the_environment_holds(home):
    home.monkeypatch.setenv("GROQ_API_KEY", "gsk-1")
    assert "nope.json" in home.refused("start --config=nope.json")


def test_a_configuration_in_a_variable_goes_before_the_file(filled):
    filled.monkeypatch.setenv("LLM_ROUTER_CONFIG_JSON", json.dumps(dict(filled.document(), masterKey="inline")))
    options = start(filled)
    assert (options.config.master_key, options.loaded.path) == ("inline", "")
    assert "LLM_ROUTER_CONFIG_JSON" in options.loaded.source
    assert start(filled, "--config=%s" % filled.file).config.master_key == "master-key-0123456789"


def test_a_configuration_with_errors_or_without_providers_does_not_start(filled):
    filled.write(dict(filled.document(), defaultModel="nope"))
    assert "defaultModel" in filled.refused("start")
    filled.write({"providers": []})
    assert "demo" in filled.refused("start")
    assert filled.started == []


def test_start_shows_what_is_odd_in_the_configuration(filled):
    filled.write(dict(filled.document(), surprise=1))
    code, out, err = filled.run("start")
    assert (code, out) == (0, "")
    assert "warning: surprise" in err


def test_where_several_errors_keep_a_server_from_starting_the_command_that_lists_them_names_the_same_file(filled, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"defaultModel": "x", "masterKey": 1, "providers": []}')
    code, _, err = filled.run("start --config=%s" % other)
    assert code == 2 and "config --operation=validate --config=%s)" % other in err
    filled.write(json.loads(other.read_text()))
    assert "config --operation=validate)" in filled.run("start")[2]


def test_the_summary_shows_what_start_would_serve_of_key_variables(home):
    """It told to set a key variable where one was set."""
    home.monkeypatch.setenv("GROQ_API_KEY", "gsk-0123456789abcdef")
    out = home.ok("")
    assert "the key variables GROQ_API_KEY" in out and "https://api.groq.com/openai/v1" in out and "0123456789" not in out
    assert not home.file.exists()


def test_where_every_provider_is_disabled_the_cure_is_to_enable_one(filled):
    filled.write(dict(filled.document(), providers=[dict(filled.document()["providers"][0], enabled=False)]))
    code, _, err = filled.run("start")
    assert code == 2 and "no enabled provider; enable one, or add a provider" in err
    filled.write({"providers": []})
    assert "no enabled provider; add a provider" in filled.run("start")[2]


# ----- the other commands -----


def test_settings_shows_every_row_with_its_present_value(home):
    home.monkeypatch.setenv("LLM_ROUTER_TRAIL_SIZE", "77")
    out = home.ok("settings")
    for row in r.SETTINGS:
        assert row.variable in out
    rows = json.loads(home.ok("settings --json"))
    assert next(row for row in rows if row["variable"] == "LLM_ROUTER_TRAIL_SIZE")["value"] == 77


def test_demo_is_told_whether_to_stop_and_where_to_listen(home):
    home.ok("demo")
    home.ok("demo --once --port=99")
    assert home.started == [(False, 0), (True, 99)]


# ----- main -----


def _fail(error):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (r.UsageError("wrong"), 2, "llm-router: wrong\n"),
        (r.ConfigError("broken"), 2, "llm-router: broken\n"),
        (r.RouterError("failed", 500), 1, "llm-router: failed\n"),
        (KeyError("bug"), 1, "llm-router: KeyError: 'bug' (--debug shows more)\n"),
        (r.RouterError("a\x1b[31m\rb"), 1, "llm-router: a\\x1b[31m\\rb\n"),
        (KeyboardInterrupt(), 130, ""),
        (EOFError(), 130, ""),
    ],
)
def test_main_turns_errors_into_exit_codes_and_one_line(home, error, code, text):
    home.monkeypatch.setattr(r, "run_command", _fail(error))
    assert home.run("start") == (code, "", text)


@pytest.mark.parametrize(
    ("words", "shows"), [("--debug", 1), ("--debug=Yes", 1), ("--debug=on", 1), ("--debug=false", 0), ("", 0)]
)
def test_the_traceback_is_shown_only_on_request(home, words, shows):
    home.monkeypatch.setattr(r, "run_demo", _fail(RuntimeError("bug")))
    code, _, err = home.run("demo " + words)
    assert code == 1 and err.count("Traceback") == shows


def test_a_reader_that_goes_away_does_no_harm(tmp_path):
    child = subprocess.Popen(
        [sys.executable, PROGRAM, "settings"],
        env=_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    child.wait(timeout=60)
    assert error == b""


@pytest.mark.skipif(os.name != "posix", reason="a signal that a program can handle")
def test_a_server_whose_output_nobody_reads_any_more_still_ends_with_0(tmp_path):
    """The interpreter would make 120 of what it cannot write at its end."""
    (tmp_path / ".llm-router.json").write_text('{"providers": {"p": {"baseUrl": "http://127.0.0.1:9", "models": ["m"]}}}')
    command = [sys.executable, str(PROGRAM), "start", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=_environment(tmp_path), **pipes) as child:
        assert child.stdout.readline().startswith(b"listening on ")
        child.stdout.close()
        child.stderr.close()
        child.terminate()  # "stopping" is what it cannot log
        assert child.wait(timeout=60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux' device that is always full")
@pytest.mark.parametrize("words", ["--help", "start --help", "config --operation=list"])
def test_an_output_that_is_full_or_closed_gives_one_line_or_none_and_no_traceback(tmp_path, words):
    line = 'exec "$0" "$1" %s %s'
    for where, code, lines in ((">/dev/full", 1, 1), (">&- <&-", 0, 0)):
        command = ["sh", "-c", line % (words, where), sys.executable, str(PROGRAM)]
        done = subprocess.run(command, env=_environment(tmp_path), stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (code, lines), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux' device that is always full")
@pytest.mark.parametrize(("words", "code"), [("nonsense", 2), ("config --operation=set-master-key --master-key=k", 0)])
def test_errors_and_warnings_that_cannot_be_told_do_not_change_the_exit_code(tmp_path, words, code):
    command = ["sh", "-c", 'exec "$0" "$1" %s 2>/dev/full' % words, sys.executable, str(PROGRAM)]
    env = dict(_environment(tmp_path), LLM_ROUTER_JSON="{}")  # a warning says that it hides the file
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code and ("saved to" in done.stdout) == (code == 0)


@pytest.mark.skipif(os.name != "posix", reason="a symbolic link, and the words of a POSIX shell")
def test_who_runs_the_file_itself_is_shown_commands_that_can_be_given_as_they_are(tmp_path):
    """There is no `llm-router` without installation."""
    program = tmp_path / "my gateway.py"
    program.symlink_to(PROGRAM)

    def run(*words):
        command = [sys.executable, str(program), *words]
        return subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True, timeout=60)

    begin = "%s '%s' " % (os.path.basename(sys.executable), program)
    hint = run("frobnicate").stderr.partition("; ")[2]
    assert hint.startswith(begin + "--help lists")
    assert begin + "config --operation=upsert-provider --help is for" in run().stdout
    assert "example:\n  %sstop --grace=5\n" % begin in run("stop", "--help").stdout
    assert run("stop").stdout == "no llm-router is running here; %sstart starts one\n" % begin


def test_a_terminal_without_utf8_does_not_stop_a_command(tmp_path):
    (tmp_path / ".llm-router.json").write_text(
        '{"providers": {"p": {"name": "x", "baseUrl": "https://x.example", "models": ["m\u00fc"]}}}', encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, PROGRAM],
        env=dict(_environment(tmp_path), PYTHONIOENCODING="ascii"),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"p/m\\xfc" in done.stdout


@pytest.mark.parametrize("color", [None, "1"])
def test_colour_is_only_for_terminals_that_want_it(tmp_path, color):
    pty = pytest.importorskip("pty")
    (tmp_path / ".llm-router.json").write_text("{}")
    environ = dict(_environment(tmp_path), TERM="xterm")
    environ.pop("NO_COLOR", None)
    if color:
        environ["NO_COLOR"] = color
    controller, terminal_side = pty.openpty()
    command = [sys.executable, PROGRAM, "config", "--operation=validate"]
    child = subprocess.Popen(command, env=environ, stdin=terminal_side, stdout=terminal_side, stderr=terminal_side)
    os.close(terminal_side)
    assert child.wait(timeout=60) == 0
    output = os.read(controller, 65536)
    os.close(controller)
    assert (b"\x1b[" in output) == (color is None)
    piped = subprocess.run(command, env=environ, capture_output=True).stdout
    assert b"\x1b" not in piped


@pytest.mark.parametrize(("system", "environ", "is_colored"), [("nt", {}, 0), ("nt", {"TERM": "xterm"}, 1), ("posix", {}, 1)])
def test_a_console_of_windows_gets_no_escape_codes_unless_it_is_known_to_take_them(monkeypatch, system, environ, is_colored):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(r, "os", SimpleNamespace(name=system, environ=environ))
    assert r._colored("x", "ok") == ("\033[32mx\033[0m" if is_colored else "x")


def test_the_version_needs_no_parser():
    program = "import sys; sys.path.insert(0, %r); import llm_router; llm_router.main(['--version']); print('argparse' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program % str(Path(PROGRAM).parent)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split("\n")[1] == "False", done.stderr


def test_columns_are_aligned_also_behind_wide_characters():
    lines = r._table([("NAME", "N", "X"), ("模型", "10", "a"), ("plain", "5", "b")], (1,))
    assert lines == ["NAME    N  X", "模型   10  a", "plain   5  b"]
