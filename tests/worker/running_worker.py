"""The real Workers runtime (workerd with Pyodide, both from npm) as a process, serving what `deploy` would upload.

Two compatibility flags, `experimental` and `python_workers_development`, are all that differs from production: they make
workerd take its Pyodide from a local file.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyodide_bundle import write_bundle
from running_router import PROGRAM, ROOT, Caller, clean_environment, free_port

HERE = Path(__file__).resolve().parent
WORKERD = HERE / "node_modules" / "@cloudflare" / "workerd-linux-64" / "bin" / "workerd"
PYODIDE = HERE / "node_modules" / "pyodide"
REQUIRED = os.environ.get("LLM_ROUTER_TEST_REQUIRE_CLIENTS") == "1"
KEY = "Worker-Test-Key-0123456789"
LOCAL_FLAGS = ("experimental", "python_workers_development")

CONFIG = """\
using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [
    (name = "main", worker = .worker),
    (name = "internet", network = (allow = ["private", "local"])),
  ],
  sockets = [(name = "http", address = "127.0.0.1:0", http = (), service = "main")],
);
const worker :Workerd.Worker = (
  modules = [%(modules)s],
  bindings = [%(bindings)s],
  compatibilityDate = "%(date)s",
  compatibilityFlags = [%(flags)s],
);
"""


def missing(reason):
    """Skip, or fail where everything is required."""
    if REQUIRED:
        pytest.fail(reason + " (LLM_ROUTER_TEST_REQUIRE_CLIENTS=1)")
    pytest.skip(reason)


def need_workerd():
    """Skip (or fail) without the runtime."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the pinned workerd is for Linux")
    if not WORKERD.is_file() or not PYODIDE.is_dir():
        missing("workerd is not installed: run `npm ci --ignore-scripts` in tests/worker")


def project_files():
    """{name: path} of what is uploaded: the entry of worker_export and the router."""
    return {"entry.py": ROOT / "worker_export" / "entry.py", "llm_router.py": PROGRAM}


def project_settings():
    """(compatibility date, compatibility flags) as worker_export/wrangler.toml has them."""
    found = {}
    for line in (ROOT / "worker_export" / "wrangler.toml").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" = ")
        if name.startswith("compatibility_"):
            found[name] = json.loads(value)
    return found["compatibility_date"], found["compatibility_flags"]


class RunningWorker(Caller):
    """A Worker that serves. Every call shows the master key unless it shows another one or `key` is None."""

    def __init__(self, folder, variables, files=None, snapshot=None, key=KEY, settings=None):
        self.key = key
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path = self.folder / "workerd.log"
        self.process = None
        super().__init__(free_port())
        self._write_project(variables, files or project_files(), settings or project_settings())
        self._start(snapshot)

    def _write_project(self, variables, files, settings):
        rows = []
        for name, source in files.items():
            (self.folder / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
            rows.append('(name = "%s", pythonModule = embed "%s")' % (name, name))
        bindings = []
        for name, value in variables.items():  # other values are what wrangler.toml may hold: JSON
            kind, text = ("text", value) if isinstance(value, str) else ("json", json.dumps(value))
            (self.folder / (name + ".txt")).write_text(text, encoding="utf-8")
            bindings.append('(name = "%s", %s = embed "%s.txt")' % (name, kind, name))
        flags = ['"%s"' % flag for flag in [*settings[1], *LOCAL_FLAGS]]
        config = {"modules": ", ".join(rows), "bindings": ", ".join(bindings), "date": settings[0]}
        (self.folder / "config.capnp").write_text(CONFIG % dict(config, flags=", ".join(flags)), encoding="utf-8")

    def _start(self, snapshot):
        cache = self.folder.parent / "pyodide-bundle"
        if not cache.is_dir():
            write_bundle(PYODIDE, cache)
        command = [str(WORKERD), "serve", "config.capnp", "--experimental"]
        command += ["--pyodide-bundle-disk-cache-dir=%s" % cache, "--socket-addr=http=127.0.0.1:%d" % self.port]
        command += list(snapshot or [])
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=str(self.folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=clean_environment(self.folder),
            )  # fmt: skip
        until = time.monotonic() + 60
        while True:
            try:
                self.request("GET", "/", timeout=30)
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise AssertionError("workerd did not start:\n" + "\n".join(self.log())) from None
                time.sleep(0.05)

    def open(self, path, body=None, headers=None, method="POST", timeout=30.0):
        """As Caller does, with the master key."""
        headers = dict(headers or {})
        if self.key and not {"authorization", "x-api-key", "api-key"} & {name.lower() for name in headers}:
            headers["authorization"] = "Bearer " + self.key
        return super().open(path, body, headers, method, timeout)

    def log(self):
        """What the Worker printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()

    def stdout(self):
        """A Worker has but one log."""
        return []

    def wait_log(self, text, timeout=30.0):
        """The first line that holds `text`; AssertionError after `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            found = [line for line in self.log() if text in line]
            if found:
                return found[0]
            assert time.monotonic() < until, "no %r in the log:\n%s" % (text, "\n".join(self.log()))
            time.sleep(0.02)

    def kill(self):
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
