"""`demo` as somebody runs it who has nothing but the file: no config, no key, no network."""

import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from exchanges import ask, until
from running_router import PROGRAM, Caller, clean_environment

PROVIDERS = ("steady", "claudette", "limited", "failing", "lying", "dying")


def interpreters():
    """This interpreter, the oldest supported one and the newest one that are installed here."""
    found = {}
    for path in glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3")) + glob.glob(
        "/usr/bin/python3.[0-9]*"
    ):
        version = re.search(r"3\.(\d+)", path)
        if version and int(version.group(1)) >= 9 and os.access(path, os.X_OK) and not path.endswith("-config"):
            found[int(version.group(1))] = path
    chosen = {sys.version_info[1]: sys.executable}
    for minor in (9, max(found, default=0)):
        if minor in found:
            chosen.setdefault(minor, found[minor])
    return [pytest.param(path, id="3.%d" % minor) for minor, path in sorted(chosen.items())]


@pytest.fixture
def folder(tmp_path):
    """A folder that holds only the file; it is the home as well."""
    shutil.copy(str(PROGRAM), str(tmp_path / "llm_router.py"))
    return tmp_path


@pytest.mark.parametrize("python", interpreters())
def test_the_demo_needs_only_the_file_and_every_answer_is_right(folder, python):
    command = [python, "-I", "-S", "llm_router.py", "demo", "--once"]
    done = subprocess.run(
        command, cwd=str(folder), env=clean_environment(folder), capture_output=True, timeout=60, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "every answer was right" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stdout.count("right:") == 33
    for name in PROVIDERS:
        assert len(re.findall(r"%s/demo " % name, done.stdout)) == (3 if name == "dying" else 6)
    for trail in (
        "limited/demo=429, steady/demo=ok",
        "failing/demo=500, failing/demo=500, failing/demo=500, steady/demo=ok",
    ):
        assert done.stdout.count(trail) == 6
    assert done.stdout.count("an error in the stream, then a cut") == 3
    assert sorted(entry for entry in os.listdir(str(folder)) if entry != "__pycache__") == ["llm_router.py"]


def test_the_demo_goes_on_serving_until_it_is_interrupted(folder):
    command = [sys.executable, "llm_router.py", "demo"]
    process = subprocess.Popen(
        command,
        cwd=str(folder),
        env=clean_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        until(lambda: any("still serving" in line for line in lines), 60)
        assert lines[0].startswith("listening on http://127.0.0.1:")
        port = int(re.search(r":(\d+)", lines[0].partition("//")[2]).group(1))
        reply = Caller(port).post("/v1/messages", ask("anthropic", "limited/demo"))
        assert reply.json["content"][0]["text"] == "Hello from a provider that works."
        assert reply.headers["x-llm-router-attempts"] == "limited/demo=429, steady/demo=ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        errors = process.stderr.read()
        assert "limited/demo=429" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
        reader.join(2)
        process.stdout.close()
        process.stderr.close()


def test_the_demo_takes_the_port_it_is_told(folder):
    with subprocess.Popen(
        [sys.executable, "llm_router.py", "demo", "--once", "--port=0"],
        cwd=str(folder),
        env=clean_environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("listening on http://127.0.0.1:")
        process.stdout.read()
        assert process.wait(30) == 0


def test_the_demo_says_that_its_port_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        command = [sys.executable, "-I", "-S", "llm_router.py", "demo", "--once", "--port=%d" % port]
        done = subprocess.run(
            command, cwd=str(folder), env=clean_environment(folder), capture_output=True, timeout=60, text=True
        )
    assert done.returncode == 1
    assert "cannot listen on http://127.0.0.1:%d: the port is in use" % port in done.stderr


def test_an_answer_that_is_wrong_makes_the_demo_fail(folder):
    """The demo is a check as well: here its own text is changed behind its back."""
    program = folder / "llm_router.py"
    source = program.read_text(encoding="utf-8")
    broken = source.replace("[Text(_DEMO_TEXT)]", '[Text("wrong")]')
    assert broken != source
    program.write_text(broken, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "llm_router.py", "demo", "--once"],
        cwd=str(folder),
        env=clean_environment(folder),
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert done.returncode == 1
    assert "WRONG" in done.stdout
