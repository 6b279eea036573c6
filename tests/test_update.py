"""The program replaced by a newer release: every check, and what is left when one fails."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import llm_router as r
from exchanges import until
from running_router import clean_environment, config_of, provider

SOURCE = Path(r.__file__).read_bytes()
LINE = b'__version__ = "%s"' % r.__version__.encode()


def released(version):
    """The program as that version."""
    return SOURCE.replace(LINE, b'__version__ = "%s"' % version.encode())


NEWER, OLDER = released("99.0.1"), released("0.0.1")


class Releases:
    """A release server on 127.0.0.1. files: path -> bytes; short: paths whose download breaks off."""

    def __init__(self):
        self.files, self.short, self.redirects = {}, set(), {}
        releases = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path in releases.redirects:
                    self.send_response(302)
                    self.send_header("location", releases.redirects[self.path])
                    self.end_headers()
                    return
                data = releases.files.get(self.path)
                self.send_response(404 if data is None else 200)
                self.send_header("content-length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write((data or b"")[: -1000 if self.path in releases.short else None])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def releases():
    made = Releases()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Installed:
    """The program as a single file in a folder of its own."""

    def __init__(self, folder):
        self.home = folder / "home"
        self.home.mkdir()
        self.file = folder / "bin" / "router.py"
        self.file.parent.mkdir()
        self.file.write_bytes(SOURCE)
        self.file.chmod(0o755)

    def run(self, *words, **env):
        line = [sys.executable, str(self.file), *words]
        env = clean_environment(self.home, **env)
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=90)

    def is_untouched(self):
        return self.file.read_bytes() == SOURCE and [path.name for path in self.file.parent.iterdir()] == ["router.py"]


@pytest.fixture
def installed(tmp_path):
    return Installed(tmp_path)


def test_a_newer_release_takes_the_place_of_the_file_and_the_old_one_is_kept(installed, releases):
    releases.files["/llm_router.py"] = NEWER
    releases.files["/llm_router.py.sha256"] = hashlib.sha256(NEWER).hexdigest().encode() + b"  llm_router.py\n"
    done = installed.run("update", "--from=%s/llm_router.py" % releases.url)
    assert done.returncode == 0, done.stderr
    assert "99.0.1" in done.stdout and installed.file.read_bytes() == NEWER
    assert installed.file.with_name("router.py.bak").read_bytes() == SOURCE
    assert os.name != "posix" or installed.file.stat().st_mode & 0o777 == 0o755
    assert installed.run("--version").stdout == "llm-router 99.0.1\n"


def test_the_source_may_come_from_the_environment_and_be_a_file(installed, tmp_path):
    (tmp_path / "release").write_bytes(NEWER)
    done = installed.run("update", "--json", LLM_ROUTER_UPDATE_URL=str(tmp_path / "release"))
    told = json.loads(done.stdout)
    assert told == {"before": r.__version__, "after": "99.0.1", "changed": True, "restarted": []}


@pytest.mark.parametrize("text", ["%s", "%s *llm_router.py", "SHA256 (llm_router.py) = %s\n"])
def test_a_hash_is_found_in_the_form_of_every_tool_that_makes_one(releases, text):
    releases.files["/release.sha256"] = (text % hashlib.sha256(NEWER).hexdigest().upper()).encode()
    r._check_digest(NEWER, releases.url + "/release")
    with pytest.raises(r.RouterError, match="sha256"):
        r._check_digest(OLDER, releases.url + "/release")


def test_versions_are_ordered_as_pip_orders_them():
    rising, order = ["0.9", "0.10.dev1", "0.10", "0.10.1", "1.0rc1", "1.0", "10.0"], [3, 1, 6, 5, 4, 0, 2]
    assert sorted((rising[i] for i in order), key=r._version_key) == rising
    assert r._version_key("1.0.post1") == r._version_key("1.0")


def test_the_same_version_changes_nothing(installed, releases):
    releases.files["/same"] = SOURCE
    done = installed.run("update", "--from=%s/same" % releases.url)
    assert done.returncode == 0 and "already" in done.stdout and installed.is_untouched()


def test_without_a_source_both_ways_to_name_one_are_told(installed):
    done = installed.run("update")
    assert done.returncode == 2 and "--from" in done.stderr and "LLM_ROUTER_UPDATE_URL" in done.stderr


BAD = {
    "missing": (None, b"", "there is no release at"),
    "older": (OLDER, b"", "older"),
    "wrong hash": (NEWER, b"0" * 64, "sha256"),
    "empty hash": (NEWER, b" ", "sha256"),
    "a web page": (b"<html>not found</html>", b"", "not a Python program"),
    "half a file": (NEWER[: len(NEWER) // 2], b"", "not"),
    "another program": (b"print('hello')\n", b"", "does not run"),
    "a program that fails": (b"raise SystemExit(3)\n", b"", "does not run"),
    "an earlier state of this very version": (released(r.__version__ + "rc1"), b"", "older"),
    "a version of escape codes": (b"print('llm-router 99.0.0\\x1b[31m')\n", b"", "does not run"),
    "a version of many digits": (b"print('llm-router ' + '9' * 5000)\n", b"", "does not run"),
    "a version that fails": (b"print('llm-router 99.0.0')\nraise SystemExit(3)\n", b"", "does not run"),
    "no text": (b"\x00\xff\xfe", b"", "not a Python program"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_release_that_is_not_right_changes_nothing(installed, releases, name):
    data, digest, text = BAD[name]
    if data is not None:
        releases.files["/release"] = data
    if digest:
        releases.files["/release.sha256"] = digest
    with pytest.raises(r.RouterError, match=text):
        r.update_file(str(installed.file), releases.url + "/release")
    assert installed.is_untouched()


def test_a_download_that_breaks_off_changes_nothing(installed, releases):
    releases.files["/release"] = NEWER
    releases.short.add("/release")
    done = installed.run("update", "--from=%s/release" % releases.url)
    assert done.returncode == 1 and installed.is_untouched()


def test_a_release_comes_over_https_also_after_a_redirect(releases):
    for source in ("http://example.com/llm_router.py", "http://[::1"):
        with pytest.raises(r.RouterError, match="https"):
            r.fetch_release(source)
    releases.redirects["/moved"] = "http://example.com/llm_router.py"
    with pytest.raises(r.RouterError, match="https"):
        r.fetch_release(releases.url + "/moved")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_changed(installed, tmp_path):
    (tmp_path / "release").write_bytes(NEWER)
    installed.file.parent.chmod(0o500)
    done = installed.run("update", "--from=%s" % (tmp_path / "release"))
    installed.file.parent.chmod(0o700)
    assert done.returncode == 1 and "unchanged" in done.stderr and installed.is_untouched()


def test_a_failure_to_write_leaves_the_file_and_no_rest(installed, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if Path(target).parent == installed.file.parent:
            raise OSError(28, "No space left on device")
        replace(source, target)

    release = installed.home / "release"
    release.write_bytes(NEWER)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(r.RouterError, match="No space left"):
        r.update_file(str(installed.file), str(release))
    assert installed.is_untouched()


def test_an_installation_by_pip_is_told_pips_own_command(tmp_path):
    target = tmp_path / "lib" / "site-packages" / "llm_router.py"
    for source in ("anything", ""):
        with pytest.raises(r.RouterError, match="pip install --upgrade FOLDER"):  # PyPI's llm-router is not this one
            r.update_file(str(target), source)
    target = tmp_path / "pipx" / "venvs" / "llm-router" / "site-packages" / "llm_router.py"
    with pytest.raises(r.RouterError, match="pipx upgrade llm-router"):
        r.update_file(str(target), "anything")


@pytest.mark.skipif(os.name != "posix", reason="a process becomes another only on POSIX")
def test_a_running_instance_becomes_the_new_version_on_its_port(installed, tmp_path, upstream):
    (installed.home / ".llm-router.json").write_text(json.dumps(config_of(provider(upstream))))
    (installed.home / ".llm-router.json").chmod(0o600)
    assert installed.run("start", "--detach", "--port=0").returncode == 0
    before = json.loads(installed.run("status", "--json").stdout)
    (tmp_path / "release").write_bytes(NEWER)
    done = installed.run("update", "--from=%s" % (tmp_path / "release"))
    assert "pid %d continues" % before["pid"] in done.stdout, done.stderr
    try:
        found = until(lambda: installed.run("status", "--json").stdout)
        after = json.loads(found)
        assert (after["version"], after["pid"], after["port"]) == ("99.0.1", before["pid"], before["port"])
    finally:
        installed.run("stop", "--grace=0")


SIGNED = b"def run_start(given: Given) -> int:\n"


@pytest.mark.skipif(os.name != "posix", reason="a process becomes another only on POSIX")
def test_a_release_that_would_end_at_once_ends_nobody_and_the_file_before_comes_back(installed, tmp_path, upstream):
    """It answers --version, and would have ended the router: a flag that it knows no more, say."""
    (installed.home / ".llm-router.json").write_text(json.dumps(config_of(provider(upstream))))
    (installed.home / ".llm-router.json").chmod(0o600)
    assert installed.run("start", "--detach", "--port=0").returncode == 0
    try:
        before = json.loads(installed.run("status", "--json").stdout)
        for body in (b'    raise UsageError("unknown flag --log-file")\n', b"    return 0\n"):
            (tmp_path / "release").write_bytes(NEWER.replace(SIGNED, SIGNED + body))
            done = installed.run("update", "--from=%s" % (tmp_path / "release"))
            words = "unknown flag --log-file" if b"raise" in body else "it says nothing"
            assert done.returncode == 1 and "pid %d" % before["pid"] in done.stderr and words in done.stderr
            assert installed.is_untouched()
        after = json.loads(installed.run("status", "--json").stdout)
        assert (after["pid"], after["version"], after["port"]) == (before["pid"], r.__version__, before["port"])
    finally:
        installed.run("stop", "--grace=0")


def test_a_start_that_only_checks_ends_once_it_listens_and_is_nobody_to_be_found(installed, upstream):
    config = installed.home / ".llm-router.json"
    config.write_text(json.dumps(config_of(provider(upstream))))
    config.chmod(0o600)
    done = installed.run("start", "--check", "--port=0")
    assert (done.returncode, done.stdout[:13]) == (0, "listening on ")
    assert not (installed.home / ".llm-router.runtime.json").exists()
    config.write_text("{")
    assert installed.run("start", "--check", "--port=0").returncode == 2


# --- a release server that means harm ---


def fetched(url):
    with pytest.raises(r.RouterError) as caught:
        r.update_file("nowhere/llm_router.py", url)
    return caught.value


def test_an_endless_and_a_dripping_download_are_given_up(releases, monkeypatch):
    releases.files["/release"] = NEWER
    monkeypatch.setattr(r, "_MAX_RELEASE_BYTES", 1000)
    assert "too large" in fetched(releases.url + "/release").message
    monkeypatch.undo()
    monkeypatch.setattr(r, "_FETCH_S", -1.0)
    assert "too slow" in fetched(releases.url + "/release").message


def test_no_proxy_comes_between_the_program_and_a_server_on_this_machine(releases, monkeypatch):
    """What is plain http is taken from this machine only: a proxy could put its own program in its place."""
    releases.files["/release"] = b"x = 1"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert r.fetch_release(releases.url + "/release") == b"x = 1"


def test_a_password_and_a_key_in_the_url_are_in_no_message(releases):
    port = releases.url.rpartition(":")[2]
    for url in ("http://me:planted-secret@127.0.0.1:%s/gone?key=planted-secret" % port, "https://x/\nplanted-secret",
                "http://127.0.0.1:%s/gone?api_key=planted-secret" % port, "http://x.example/?key=planted-secret"):  # fmt: skip
        assert "planted-secret" not in fetched(url).message.replace("\\nplanted-secret", "")


@pytest.mark.parametrize("data", [b"(" * 100_000, b"-" * 200_000 + b"1", b"x = " + b"[" * 5000])
def test_a_release_that_no_compiler_can_take_is_refused(installed, data):
    release = installed.home / "release"
    release.write_bytes(data)
    with pytest.raises(r.RouterError, match="not a Python program"):
        r.update_file(str(installed.file), str(release))
    assert installed.is_untouched()
