"""Starting with the machine: what each platform's file says, and how it is put there."""

import json
import os
import plistlib
import shutil
import subprocess
import sys

import pytest

import llm_router as r

ARGV = ["/usr/bin/python3", "/home/a user/100%/llm_router.py", "start", '--config=/home/a "user"/$x\\y.json']
VARIABLES = {"HTTPS_PROXY": "http://proxy.example:3128", "no_proxy": "localhost,.example"}


def made(platform, home="/home/me"):
    return r.make_service(platform, home, ARGV, VARIABLES, "/home/me/log")


def test_the_launchd_agent_says_what_is_run():
    entry = plistlib.loads(made("darwin").text.encode())
    assert entry["ProgramArguments"] == ARGV and entry["EnvironmentVariables"] == VARIABLES and entry["RunAtLoad"]


def test_the_systemd_unit_quotes_what_systemd_would_read_as_its_own():
    text = made("linux").text
    assert '"/home/a user/100%%/llm_router.py"' in text
    assert '"--config=/home/a \\"user\\"/$$x\\\\y.json"' in text
    assert 'Environment="HTTPS_PROXY=http://proxy.example:3128"' in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    program = tmp_path / "a $folder 100%" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    argv = [str(program), str(tmp_path / "llm_router.py"), "start", '--config=%s/"$x".json' % tmp_path]
    unit = tmp_path / "llm-router.service"
    unit.write_text(r.make_service("linux", str(tmp_path), argv, VARIABLES, "").text)
    unit.chmod(0o644)  # whatever the umask
    line = ["systemd-analyze", "verify", "--user", str(unit)]
    done = subprocess.run(line, capture_output=True, text=True, env=dict(os.environ, XDG_RUNTIME_DIR=str(tmp_path)))
    assert "llm-router.service" not in done.stderr, done.stderr


def test_the_windows_task_runs_one_command_line():
    create, _, run = made("win32").install
    assert create[create.index("/TR") + 1] == subprocess.list2cmdline(ARGV) and run[-1] == r.SERVICE_NAME
    assert made("win32").path == ""


def test_the_windows_task_is_not_ended_after_three_days_nor_without_mains():
    """What schtasks makes is, and has no flag against it."""
    _, change, _ = made("win32").install
    assert change[0] == "powershell" and "Set-ScheduledTask " + r.SERVICE_NAME in change[-1]
    for word in ("-ExecutionTimeLimit ([TimeSpan]::Zero)", "-AllowStartIfOnBatteries", "-DontStopIfGoingOnBatteries"):
        assert word in change[-1]


def test_only_proxies_certificates_and_settings_are_kept_of_the_environment():
    kept = dict(VARIABLES, SSL_CERT_FILE="/ca", LLM_ROUTER_PORT="9000", LLM_ROUTER_LOG_LEVEL="warning")
    environ = dict(kept, OPENAI_API_KEY="secret", LLM_ROUTER_MASTER_KEY="secret", LLM_ROUTER_JSON="{}", PATH="/bin")
    assert r.service_variables(environ) == kept


def test_others_cannot_read_the_log_of_the_launchd_agent():
    assert plistlib.loads(made("darwin").text.encode())["Umask"] == 0o77


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A Linux home with a configuration and a systemctl that notes what it is told; `linux(line)` -> exit code."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text('#!/bin/sh\necho "$@" >> "$HOME/told"\necho active\n')
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools) + os.pathsep + os.environ["PATH"])
    provider = {"id": "p", "baseUrl": "https://example.com/v1", "apiKey": "planted-secret", "models": ["m"]}
    (tmp_path / ".llm-router.json").write_text(json.dumps({"providers": [provider]}))
    (tmp_path / ".llm-router.json").chmod(0o600)
    return tmp_path


unix = pytest.mark.skipif(os.name != "posix", reason="the fake systemctl is a script")
UNIT = ".config/systemd/user/llm-router.service"


@unix
def test_installing_writes_the_unit_and_starts_it_and_uninstalling_undoes_it(linux, capsys):
    assert r.main(["config", "--operation=startup-install"]) == 0
    unit = linux / UNIT
    assert "planted-secret" not in unit.read_text() and os.path.realpath(r.__file__) in unit.read_text()
    assert (linux / "told").read_text().splitlines() == [
        "--user daemon-reload",
        "--user enable --now llm-router.service",
    ]
    assert r.main(["config", "--operation=startup-status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 2)[2])["state"] == "active"
    assert r.main(["config", "--operation=startup-uninstall"]) == 0
    assert not unit.exists()
    capsys.readouterr()
    for verb in ("status", "uninstall"):  # there is nothing to undo
        assert r.main(["config", "--operation=startup-" + verb]) == 0
        assert capsys.readouterr().out == "not installed\n"


@unix
def test_what_runs_is_stopped_before_it_is_installed_once_more(linux, capsys):
    """It would go on with the configuration of before."""
    assert r.main(["config", "--operation=startup-install"]) == 0
    assert "loginctl enable-linger" in capsys.readouterr().out
    (linux / "told").unlink()
    assert r.main(["config", "--operation=startup-install"]) == 0
    told = [line.split()[1] for line in (linux / "told").read_text().splitlines()]
    assert told == ["disable", "daemon-reload", "enable"]


@unix
def test_a_file_that_the_tool_needs_to_undo_it_stays_until_the_tool_has_done_so(linux, capsys):
    """systemctl disables no unit, and launchctl unloads no agent, whose file is gone."""
    assert r.main(["config", "--operation=startup-install"]) == 0
    (linux / "tools" / "systemctl").write_text("#!/bin/sh\necho no bus >&2\nexit 1\n")
    capsys.readouterr()
    assert r.main(["config", "--operation=startup-uninstall", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "not removed"
    assert r.main(["config", "--operation=startup-uninstall"]) == 1
    shown = capsys.readouterr().out
    command = "systemctl --user disable --now llm-router.service && rm %s" % (linux / UNIT)
    assert "not removed" in shown and command in shown and (linux / UNIT).exists()


@unix
def test_a_task_that_is_not_there_is_not_installed_on_windows_either(linux, capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    (linux / "tools" / "schtasks").write_text("#!/bin/sh\necho ERROR: cannot find the file specified. >&2\nexit 1\n")
    (linux / "tools" / "schtasks").chmod(0o755)
    for verb in ("status", "uninstall"):
        assert r.main(["config", "--operation=startup-" + verb]) == 0
        assert capsys.readouterr().out == "not installed\n"


@unix
def test_without_the_tool_the_file_is_written_and_the_commands_are_told(linux, capsys):
    (linux / "tools" / "systemctl").write_text("#!/bin/sh\necho no bus >&2\nexit 1\n")
    assert r.main(["config", "--operation=startup-install", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left"][0] == "systemctl --user daemon-reload" and told["reason"] == "no bus"
    assert r.main(["config", "--operation=startup-install"]) == 0
    shown = capsys.readouterr().out
    assert "systemctl --user daemon-reload && systemctl --user enable --now llm-router.service" in shown
    assert (linux / UNIT).exists()


@unix
def test_a_service_that_could_not_start_is_not_installed(linux, capsys):
    (linux / ".llm-router.json").write_text('{"providers": []}')
    assert r.main(["config", "--operation=startup-install"]) == 2
    assert not (linux / UNIT).exists() and "provider" in capsys.readouterr().err


@unix
def test_a_key_that_only_a_variable_holds_is_told_to_be_missing_in_a_service(linux, capsys, monkeypatch):
    provider = {"id": "p", "baseUrl": "https://example.com/v1", "apiKeyEnv": "P_API_KEY", "models": ["m"]}
    (linux / ".llm-router.json").write_text(json.dumps({"providers": [provider, dict(provider, id="q", apiKey="k")]}))
    monkeypatch.setenv("P_API_KEY", "planted-secret")
    assert r.main(["config", "--operation=startup-install"]) == 0
    told = capsys.readouterr().err
    assert "key of p;" in told and "--provider-id=p" in told and "key of q" not in told
    assert "planted-secret" not in told + (linux / UNIT).read_text()


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("where", ["path", "variable"])
@pytest.mark.parametrize("bad", ["/home/me/x\nExecStartPre=/bin/evil", "/home/me/\udcff"], ids=["line", "no text"])
def test_nothing_can_begin_a_line_of_its_own_in_a_services_file(platform, where, bad):
    argv, variables = (ARGV + [bad], {}) if where == "path" else (ARGV, {"HTTPS_PROXY": bad})
    with pytest.raises(r.UsageError, match="control character"):
        r.make_service(platform, "/home/me", argv, variables, "/home/me/log")


@unix
def test_what_the_platforms_tool_says_is_shown_as_one_harmless_line_whatever_bytes_it_has(linux, capsysbinary):
    assert r.main(["config", "--operation=startup-install"]) == 0
    assert os.stat(str(linux / ".config")).st_mode & 0o077 == 0 or os.stat(str((linux / UNIT).parent)).st_mode & 0o077 == 0
    assert os.stat(str(linux / UNIT)).st_mode & 0o777 == 0o600
    (linux / "tools" / "systemctl").write_bytes(b'#!/bin/sh\nprintf "\\377 active\\033[2J\\nfailed"\n')
    capsysbinary.readouterr()
    assert r.main(["config", "--operation=startup-status"]) == 0
    shown = capsysbinary.readouterr().out
    assert b"active" in shown and b"\x1b" not in shown and shown.count(b"\n") == 1


@unix
def test_a_tool_that_cannot_tell_the_state_is_not_taken_for_the_state(linux, capsys):
    assert r.main(["config", "--operation=startup-install"]) == 0
    capsys.readouterr()
    (linux / "tools" / "systemctl").write_text("#!/bin/sh\necho Failed to connect to bus >&2\nexit 1\n")
    assert r.main(["config", "--operation=startup-status"]) == 0
    assert capsys.readouterr().out == "installed, state unknown: Failed to connect to bus\n"
    (linux / "tools" / "systemctl").write_text("#!/bin/sh\necho inactive\nexit 3\n")
    assert r.main(["config", "--operation=startup-status"]) == 0
    assert capsys.readouterr().out == "inactive\n"


@unix
def test_a_service_may_require_auth_by_a_key_that_is_stored(linux, capsys, monkeypatch):
    monkeypatch.setenv("LLM_ROUTER_MASTER_KEY", "planted-secret-of-this-shell")
    assert r.main(["config", "--operation=startup-install", "--require-auth"]) == 2
    assert not (linux / UNIT).exists() and "set-master-key" in capsys.readouterr().err
    assert r.main(["config", "--operation=set-master-key", "--generate"]) == 0
    assert r.main(["config", "--operation=startup-install", "--require-auth"]) == 0
    assert '" "--require-auth=true"\n' in (linux / UNIT).read_text()
    assert "planted-secret" not in (linux / UNIT).read_text()


@unix
def test_a_service_on_every_address_needs_the_same_word_as_start(linux, capsys, monkeypatch):
    monkeypatch.setenv("LLM_ROUTER_HOST", "0.0.0.0")
    assert r.main(["config", "--operation=startup-install"]) == 2
    assert "--allow-unauthenticated=true" in capsys.readouterr().err
    assert r.main(["config", "--operation=startup-install", "--allow-unauthenticated=true"]) == 0
    assert '" "--allow-unauthenticated=true"\n' in (linux / UNIT).read_text()
