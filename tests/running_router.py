"""The real program as a process, and a small HTTP client that tells apart a clean end and a cut."""

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "llm_router.py"
LISTENING = "listening on "
# What the console script does. Its byte code is kept, while a script is compiled at every start: most of its CPU time.
CONSOLE_SCRIPT = "import sys; sys.path.insert(0, sys.argv.pop(1)); import llm_router; llm_router.entry()"
COMMAND = (sys.executable, "-c", CONSOLE_SCRIPT, str(ROOT))
# What a child process needs to run at all; proxies, keys and LLM_ROUTER_* of the developer stay out.
KEPT_ENVIRONMENT = ("PATH", "SYSTEMROOT", "WINDIR", "COMSPEC", "PATHEXT", "TEMP", "TMP", "TMPDIR", "LD_LIBRARY_PATH")


def clean_environment(home, **more):
    """The environment of a child: nothing of the developer's but PATH and the like, `home` as the home directory."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    kept.update(HOME=str(home), USERPROFILE=str(home), PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1", NO_COLOR="1")
    kept["RES_OPTIONS"] = "timeout:1 attempts:1"  # a name that does not exist is soon known, also without a network
    kept.update({name: str(value) for name, value in more.items()})
    return kept


def free_port():
    """A port of 127.0.0.1 for a program that takes no 0. It lies below those that systems hand out by themselves: one of
    these may be somebody's client port by the time the program asks for it."""
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def descriptors_of(pid):
    """What each descriptor of a process leads to (Linux); one may close while they are read, and is left out."""
    found = []
    for name in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink("/proc/%d/fd/%s" % (pid, name)))
    return found


def sockets_of(pid):
    """How many sockets a process has open."""
    return sum(target.startswith("socket:") for target in descriptors_of(pid))


def provider(upstream, wire="openai", id="fake", models=("fake-model",), **fields):
    """One provider of a config, of one wire format, at `upstream` (a FakeUpstream or a URL)."""
    url = upstream if isinstance(upstream, str) else upstream.url
    rows = [model if isinstance(model, dict) else {"id": model} for model in models]
    return dict({"id": id, "baseUrl": url, "apiKey": "upstream-key", "formats": [wire], "models": rows}, **fields)


def config_of(*providers, **fields):
    """A whole config; the default model is the first model of the first provider."""
    first = "%s/%s" % (providers[0]["id"], providers[0]["models"][0]["id"])
    return dict({"version": 1, "defaultModel": first, "providers": list(providers)}, **fields)


class Reply:
    """An answer: status, headers (any case: `reply.headers["X"]`), body (bytes), ended ("clean" or "cut").

    For streams also events, a list of (event name, data text) pairs in order, comments (text after the colon), and
    times, the monotonic seconds at which each piece of the body arrived.
    """

    def __init__(self, status, headers, body, ended, times=()):
        self.status = status
        self.headers = headers
        self.body = body
        self.ended = ended
        self.times = list(times)
        self.events, self.comments = read_events(body)

    @property
    def text(self):
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    @property
    def json(self):
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def datas(self):
        """The data of each event as JSON; text that is none (`[DONE]`) stays text."""
        return [_json_or_text(data) for _, data in self.events]

    def __repr__(self):
        return "<Reply %d %s %s>" % (self.status, self.ended, self.text[:300])


def _json_or_text(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_events(body):
    """(events, comments) of a whole SSE body: events as (name, data) pairs. Independent of the router's own reader."""
    events, comments, name, data = [], [], "", []
    text = body.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n"):
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if not line:
            if data:
                events.append((name, "\n".join(data)))
            name, data = "", []
        elif not field:
            comments.append(value)
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return events, comments


class Stream:
    """An answer still being read: status, headers, `read_event`, `read_rest`, `close` (FIN) and `reset` (RST)."""

    def __init__(self, connection, response):
        self._connection = connection
        self._response = response
        self._socket = connection.sock or response.fp.raw._sock
        self.status = response.status
        self.headers = response.headers
        self.body = b""
        self.ended = None
        self.times = []

    def _more(self):
        try:
            data = self._response.read1(65536)
        except (http.client.IncompleteRead, ConnectionError):
            data, self.ended = b"", "cut"
        if not data and not self.ended:
            # http.client takes an early FIN inside Content-Length for a normal end.
            self.ended = "cut" if self._response.length else "clean"
        if data:
            self.times.append(time.monotonic())
        self.body += data
        return bool(data)

    def read_event(self, number=1):
        """The `number`-th event of the stream as (name, data), counted from 1; None when the stream ends before."""
        while True:
            events, _ = read_events(self.body)
            if len(events) >= number:
                return events[number - 1]
            if not self._more():
                return None

    def read_until(self, text, times=1):
        """Read until the body holds `text` as often; whether it did before the end."""
        while self.body.count(text.encode()) < times:
            if not self._more():
                return False
        return True

    def read_rest(self):
        """The whole Reply, once the stream has ended."""
        while not self.ended:
            self._more()
        self.close()
        return Reply(self.status, self.headers, self.body, self.ended, self.times)

    def close(self):
        """Leave, in the middle or at the end."""
        self._response.close()
        self._connection.close()

    def reset(self):
        """Leave with a RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class Caller:
    """HTTP calls to one port of 127.0.0.1, each on its own connection, without proxies."""

    def __init__(self, port, host="127.0.0.1"):
        self.host = host
        self.port = port
        self.url = "http://%s:%d" % (host, port)

    def open(self, path, body=None, headers=None, method="POST", timeout=30.0):
        """Send a request and return the Stream once its head is there. `body`: an object (as JSON), bytes or None."""
        data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        fields = {"content-type": "application/json"} if data is not None else {}
        fields.update(headers or {})
        try:
            connection.request(method, path, data, fields)
            return Stream(connection, connection.getresponse())
        except BaseException:
            connection.close()
            raise

    def request(self, method, path, body=None, headers=None, timeout=30.0):
        """The whole Reply to any request."""
        return self.open(path, body, headers, method, timeout).read_rest()

    def post(self, path, body, headers=None, stream=None, timeout=30.0):
        """POST and read to the end. `stream` true or false sets that field of the (dict) body."""
        if stream is not None:
            body = dict(body, stream=stream)
        return self.request("POST", path, body, headers, timeout)

    def get(self, path, headers=None, timeout=30.0):
        """GET and read to the end."""
        return self.request("GET", path, None, headers, timeout)

    def raw(self, data, timeout=30.0, half_close=False):
        """Send exactly these bytes; everything that comes back until the other side closes or `timeout` passes."""
        with socket.create_connection((self.host, self.port), timeout) as connection:
            connection.sendall(data)
            if half_close:
                with contextlib.suppress(OSError):  # the other side may have closed already
                    connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(socket.timeout, ConnectionError):
                while True:
                    part = connection.recv(65536)
                    if not part:
                        break
                    received += part
            return received


class RunningRouter(Caller):
    """`llm-router start` as a process. `process`, `home`, `config_path`, and everything a Caller does.

    script: start the file itself, as `llm_router.py start`. before: called in the child before it runs. program: other
    words for Python that start the program.
    """

    def __init__(self, config, flags, home, env=None, timeout=60.0, before=None, script=False, program=()):
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.config_path = self.home / "config.json"
        program = program or ([str(PROGRAM)] if script else COMMAND[1:])
        command = [sys.executable, *program, "start", "--port=0"]
        if config is not None:
            self.write_config(config)
            command.append("--config=%s" % self.config_path)
        self.process = subprocess.Popen(
            command + list(flags),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(self.home, **(env or {})),
            cwd=str(self.home),
            preexec_fn=before,  # noqa: PLW1509  before any thread of a test
        )
        self._lines = {"stdout": [], "stderr": []}
        self._changed = threading.Condition()
        self._readers = [self._follow("stdout"), self._follow("stderr")]
        super().__init__(self._wait_listening(timeout))

    def write_config(self, config):
        """Replace the config file; the router notices by itself when it watches."""
        temporary = self.config_path.with_suffix(".new")
        temporary.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        temporary.chmod(0o600)
        os.replace(str(temporary), str(self.config_path))

    def _follow(self, name):
        def read():
            for line in getattr(self.process, name):
                with self._changed:
                    self._lines[name].append(line.decode("utf-8", "replace").rstrip("\r\n"))
                    self._changed.notify_all()
            with self._changed:
                self._changed.notify_all()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        return reader

    def _wait_listening(self, timeout):
        def ready():
            return bool(self._lines["stdout"]) or self.process.poll() is not None

        until = time.monotonic() + timeout
        with self._changed:
            while not ready() and time.monotonic() < until:
                self._changed.wait(0.1)
            first = self._lines["stdout"][0] if self._lines["stdout"] else ""
        if not first.startswith(LISTENING):
            self.kill()
            said = "\n".join(self._lines["stdout"] + self._lines["stderr"])
            raise AssertionError("the router did not start (exit %s):\n%s" % (self.process.poll(), said))
        return int(first.rstrip("/").rsplit(":", 1)[1])

    def log(self):
        """The lines on stderr so far."""
        with self._changed:
            return list(self._lines["stderr"])

    def stdout(self):
        """The lines on stdout so far."""
        with self._changed:
            return list(self._lines["stdout"])

    def wait_log(self, text, timeout=30.0):
        """The first line on stderr that holds `text`; AssertionError after `timeout` seconds."""
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                found = [line for line in self._lines["stderr"] if text in line]
                if found:
                    return found[0]
                if time.monotonic() > until:
                    raise AssertionError("no %r in the log:\n%s" % (text, "\n".join(self._lines["stderr"])))
                self._changed.wait(0.1)

    def stop(self, timeout=30.0):
        """Ask it to end (SIGTERM; a kill on Windows) and return its exit code; killed after `timeout` seconds."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._reap()

    def kill(self):
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return self._reap()

    def _reap(self):
        for reader in self._readers:
            reader.join(20)
        for pipe, reader in zip((self.process.stdout, self.process.stderr), self._readers):
            if not reader.is_alive():
                pipe.close()
        return self.process.returncode
