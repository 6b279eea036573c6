"""README is true: its tables come from the program and the tests, its examples run. `python tests/test_readme.py` rewrites the tables."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from test_scenarios import scenario_table  # noqa: E402
from test_screens import Host  # noqa: E402

import llm_router  # noqa: E402
from exchanges import until  # noqa: E402
from fake_upstream import can_tls, final_text  # noqa: E402
from running_router import clean_environment, free_port  # noqa: E402

README = ROOT / "README.md"


def settings_table():
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for row in llm_router.SETTINGS:
        rows.append("| `%s` | %s | %s |" % (row.variable, llm_router.show_setting(row.default), row.help))
    return rows


def losses_table():
    rows = ["| format | what | becomes |", "|---|---|---|"]
    for name, wire in llm_router.WIRE_FORMATS.items():
        rows += ["| `%s` | %s | %s |" % (name, what, fate.replace("|", "\\|")) for what, fate in wire.losses.items()]
    return rows


FIELD_PLACES = {"config": "", "client_key": "`clientKeys[]`", "timeouts": "`timeouts`", "auth": "`auth`"}


def fields_table():
    rows = ["| in | key | meaning |", "|---|---|---|"]
    for kind, fields in llm_router.FIELDS.items():
        where = FIELD_PLACES.get(kind, "`%ss[]`" % kind)
        for field in fields:
            also = ", ".join("`%s`" % name for name in field.aliases)
            rows.append("| %s | `%s`%s | %s |" % (where, field.key, also and " (also %s)" % also, field.help))
    return rows


def menu_screen():
    """A screen of the menu as the program draws it: three providers, one of them switched off."""
    providers = [
        ("openrouter", {"openai": "https://openrouter.ai/api/v1"}, {"apiKey": "sk-or-v1-0123456789abcdef"}, ["gpt-4o", "o3"]),
        ("anthropic", {"anthropic": "https://api.anthropic.com"}, {"apiKeyEnv": "ANTHROPIC_API_KEY"}, ["*"]),
        ("ollama", {"openai": "http://127.0.0.1:11434/v1"}, {"enabled": False}, ["*"]),
    ]
    document = {"providers": [dict({"id": id, "baseUrlByFormat": urls, "models": models}, **more) for id, urls, more, models in providers]}
    host = Host(document)
    host.menu = host.menu._replace(facts=host.menu.facts._replace(variables=("ANTHROPIC_API_KEY",)))
    return ["```text", *host.open("Providers").press("down").screen(80, 16).split("\n"), "```"]


BLOCKS = {"menu": menu_screen, "fields": fields_table, "settings": settings_table, "losses": losses_table, "scenarios": scenario_table}


def block(name, text):
    return re.search("(<!-- %s -->\n)(.*?)(<!-- /%s -->)" % (name, name), text, re.DOTALL)


def rewritten(text):
    for name, make in BLOCKS.items():
        found = block(name, text)
        text = text[: found.start(2)] + "\n" + "\n".join(make()) + "\n\n" + text[found.start(3) :]
    return text


def test_the_tables_are_those_of_the_program():
    text = README.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run python tests/test_readme.py"


def test_every_variable_command_operation_and_flag_in_the_readme_exists():
    text = README.read_text(encoding="utf-8")
    variables = {row.variable for row in llm_router.SETTINGS} | {
        "LLM_ROUTER_CONFIG_JSON",
        "LLM_ROUTER_JSON",
        "LLM_ROUTER_MASTER_KEY",
        "LLM_ROUTER_UPDATE_URL",
    }
    assert set(re.findall(r"\bLLM_ROUTER_[A-Z_]+\b", text)) <= variables
    commands = {row.name for row in llm_router.COMMANDS}
    assert set(re.findall(r"llm_router\.py ([a-z-]+)", text)) <= commands
    table = re.search(r"\| command \| does \|\n.*?\n\n", text, re.DOTALL).group(0)
    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)) == commands - {""}
    operations = re.search(r"`config --operation=`:(.*?)\.", text, re.DOTALL).group(1)
    assert set(re.findall(r"`([a-z-]+)`", operations)) == {row.name for row in llm_router.OPERATIONS}
    every = [flag for command in llm_router.COMMANDS for flag in command.flags]
    flags = {name for flag in every for name in (flag.key, *flag.aliases)} | {"version", "help"}
    assert set(re.findall(r"(?<!-)--([a-z][a-z-]+)", text)) <= flags


def test_the_example_configuration_has_no_problem():
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1)
    document = llm_router.parse_config_text(example, "README.md")
    assert [problem for problem in llm_router.find_problems(document) if problem.level == "error"] == []
    config = llm_router.read_config(document, {})
    assert llm_router.Routes(config).find_plan("claude-anything")[0].ref == "anthropic/claude-3-7-sonnet"


FAKE_CLAUDE = """#!%s
import json, os, sys, urllib.request
headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
headers["x-api-key"] = os.environ.get("ANTHROPIC_AUTH_TOKEN") or os.environ["ANTHROPIC_API_KEY"]
model = sys.argv[sys.argv.index("--model") + 1] if "--model" in sys.argv else os.environ["ANTHROPIC_MODEL"]
body = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": sys.argv[-1]}]}
request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode(), headers)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(json.load(opener.open(request))["content"][0]["text"])
"""


class Shell:
    """Runs lines of README in an empty folder that holds nothing but the program, as a person would type them.

    The world stands in: HTTPS_PROXY leads every https address to one fake upstream, which has a certificate for
    openrouter.ai; `python3` and `claude` are those of the test; the port of the text is another, free one.
    """

    def __init__(self, folder, upstream, tunnel, port):
        self.here, self.port, self.serving = folder / "here", port, []
        for made in (self.here, folder / "home", folder / "tools"):
            made.mkdir()
        shutil.copy(str(ROOT / "llm_router.py"), str(self.here))
        python = '#!/bin/sh\nexec "%s" "$@"\n' % sys.executable
        for name, text in (("python3", python), ("claude", FAKE_CLAUDE % sys.executable)):
            (folder / "tools" / name).write_text(text)
            (folder / "tools" / name).chmod(0o755)
        self.env = clean_environment(folder / "home", HTTPS_PROXY=tunnel, SSL_CERT_FILE=upstream.cafile)
        self.env.update(PATH="%s%s%s" % (folder / "tools", os.pathsep, os.environ["PATH"]), LLM_ROUTER_PORT=str(port))
        self.env["NO_PROXY"] = self.env["no_proxy"] = "127.0.0.1"

    def run(self, line):
        """What a line prints; one that serves goes on in the background once it says so."""
        words = ["bash", "-c", line.replace("8787", str(self.port))]
        if not line.endswith((" start", " demo")):  # what does not serve
            done = subprocess.run(words, cwd=str(self.here), env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)  # fmt: skip
            assert done.returncode == 0 and done.stderr == "", (line, done.stdout, done.stderr)
            return done.stdout
        said = self.here.parent / "said"
        with said.open("wb") as out:
            self.serving.append(subprocess.Popen(words, cwd=str(self.here), env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True))  # fmt: skip
        ready = "listening on " if line.endswith(" start") else "still serving on "
        until(lambda: ready in said.read_text() or self.serving[-1].poll() is not None, 60)
        return said.read_text()

    def end(self, number=None):
        """Ctrl-C, or the end of what was stopped otherwise; the exit code."""
        process = self.serving.pop()
        if number is not None:
            os.killpg(process.pid, number)
        return process.wait(30)


@pytest.fixture
def shell(tmp_path, make_upstream):
    if os.name != "posix" or not can_tls() or shutil.which("bash") is None or shutil.which("curl") is None:
        pytest.skip("the walk through README needs bash, curl and openssl")
    upstream = make_upstream(final_text("hello from far away"), tls="openrouter.ai")
    with tunnel_to(upstream.port) as tunnel:
        made = Shell(tmp_path, upstream, tunnel, free_port())
        made.upstream = upstream
        yield made
        for process in made.serving:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@contextlib.contextmanager
def tunnel_to(port):
    """A proxy that lets CONNECT lead to 127.0.0.1:port, whatever was asked for; its URL."""

    class Tunnel(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as far:
                ends = {self.connection: far, far: self.connection}
                while True:
                    for end in select.select(list(ends), [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        ends[end].sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield "http://127.0.0.1:%d" % server.server_address[1]
        server.shutdown()


def shell_lines(title):
    """The lines of all shell blocks of a section of README."""
    section = re.search(
        r"^## %s\n(.*?)^## " % title, README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ).group(1)
    return [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]


def test_a_walk_through_the_readme_from_an_empty_folder_word_for_word(shell):
    demo, tests = shell_lines("Set-up")
    assert "pytest" in tests  # what CI runs from a clean checkout
    assert "every answer was right" in shell.run(demo)
    assert shell.end(signal.SIGINT) == 0
    said = [(line, shell.run(line)) for line in shell_lines("Quick start")]
    told = {line.split("llm_router.py ")[-1].split()[0]: out for line, out in said}
    assert shell.end() == 0  # the last line stopped it
    assert json.loads(told["curl"])["choices"][0]["message"]["content"] == "hello from far away"
    assert told["run"] == told["ANTHROPIC_BASE_URL=http://127.0.0.1:8787"] == "hello from far away\n"
    assert re.search(r"openrouter/gpt-4o \(default\) +ok +3 +0", told["status"])
    assert "answered by    openrouter/gpt-4o" in told["explain"]
    assert re.search(r"^openrouter/gpt-4o +3 ", told["usage"], re.MULTILINE)
    assert "stopped" in told["stop"]
    for call in shell.upstream.calls:
        assert (call.path, call.json["model"], call.wire) == ("/api/v1/chat/completions", "gpt-4o", "openai")
        assert call.header("authorization") == "Bearer sk-or-v1-..."
    stored = shell.here.parent / "home" / ".llm-router.json"
    models = llm_router.parse_config_text(stored.read_text(), "file")["providers"][0]["models"]
    assert [model["id"] for model in models] == ["gpt-4o", "claude-3-7-sonnet-latest"]
    assert stored.stat().st_mode & 0o777 == 0o600


def test_the_tests_of_the_readme_are_what_ci_runs():
    text = README.read_text(encoding="utf-8")
    assert re.search(r"^python3 -m venv \.venv && .* -m pytest", text, re.MULTILINE)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
