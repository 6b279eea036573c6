"""What goes wrong around a running router, on real sockets: no descriptors left, upstreams that freeze, thousands of
connections, guesses, bombs. Moderate by default; LLM_ROUTER_TEST_LOAD=1 runs the figures of the acceptance."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import bench
import pytest

import fake_upstream as fake
from exchanges import PATHS, ask, until
from running_router import ROOT, RunningRouter, clean_environment, config_of, provider

LOAD = bool(os.environ.get("LLM_ROUTER_TEST_LOAD"))
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
posix = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")

UPSTREAM = """
import sys
import fake_upstream as fake
with fake.FakeUpstream(lambda request: fake.json_answer(200, fake.chat_whole("alive"))) as upstream:
    print(upstream.url, flush=True)
    sys.stdin.read()
"""


def idle_connections(running, stack, count):
    """`count` connections that send nothing; those the router did not even accept in time count as well."""
    return [stack.enter_context(socket.create_connection((running.host, running.port), 30)) for _ in range(count)]


def cpu_seconds(running):
    with open("/proc/%d/stat" % running.process.pid, encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def starved(tmp_path):
    """A router that may have 64 descriptors, and its upstream."""
    import resource

    with fake.FakeUpstream() as upstream:
        running = RunningRouter(
            config_of(provider(upstream)),
            (),
            tmp_path,
            before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        )
        running.upstream = upstream
        yield running
        running.kill()


@posix
def test_without_descriptors_it_refuses_at_once_keeps_serving_and_recovers(starved):
    """Hardening, proxies 30: who is in is served, who is not is told so; no busy loop, no traceback, no restart."""
    starved.upstream.handler = lambda request: fake.json_answer(200, fake.chat_whole("served"))
    with contextlib.ExitStack() as stack:
        (first,) = idle_connections(starved, stack, 1)
        first.sendall(HEALTH)
        assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
        others = idle_connections(starved, stack, 120)
        others[-1].sendall(HEALTH)
        assert others[-1].recv(1000).startswith(b"HTTP/1.1 503 ")
        first.sendall(HEALTH)
        assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
        before = cpu_seconds(starved) if os.path.exists("/proc/self/stat") else 0
        time.sleep(1)
        if before:
            assert cpu_seconds(starved) - before < 0.5
    last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    until(lambda: starved.raw(last)[:12] == b"HTTP/1.1 200")
    assert starved.post(PATHS["openai"], ask("openai", "fake-model")).status == 200
    assert "Traceback" not in "\n".join(starved.log())


@posix
def test_a_router_that_has_no_descriptor_for_an_upstream_says_503_and_does_not_blame_the_upstream(starved):
    gate = threading.Event()
    starved.upstream.handler = lambda request: fake.gated(fake.json_answer(200, fake.chat_whole("served")), gate)
    seen = []

    def connect():
        connection = http.client.HTTPConnection(starved.host, starved.port, timeout=30)
        connection.request("GET", "/health")  # so that it is in before the upstream takes a descriptor
        assert connection.getresponse().read()
        return connection

    def call(connection):
        connection.request("POST", PATHS["openai"], json.dumps(ask("openai", "fake-model")))
        with connection.getresponse() as response:
            seen.append(response.status)
        connection.close()

    callers = [threading.Thread(target=call, args=(connect(),)) for _ in range(31)]
    for caller in callers:
        caller.start()
    until(lambda: 503 in seen and len(seen) + len(starved.upstream.calls) >= 31)
    gate.set()
    for caller in callers:
        caller.join(60)
    assert set(seen) == {200, 503}
    metrics = starved.get("/metrics").text
    assert re.search(r'llm_router_cooldown_seconds\{[^}]*\} 0(\.0)?\n', metrics), metrics
    assert starved.post(PATHS["openai"], ask("openai", "fake-model")).status == 200


@posix
def test_an_upstream_that_is_frozen_is_a_504_and_thawed_it_answers_again(router, tmp_path):
    environment = clean_environment(tmp_path, PYTHONPATH=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", UPSTREAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    try:
        url = process.stdout.readline().decode().strip()
        flags = ("--whole-first-byte-timeout-ms=1500", "--origin-retry-attempts=1", "--origin-fallback-cooldown-ms=0")
        running = router(config_of(provider(url)), *flags)
        body = ask("openai", "fake-model")
        assert running.post(PATHS["openai"], body).status == 200
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
        assert running.post(PATHS["openai"], body).status == 504
        process.send_signal(signal.SIGCONT)
        assert running.post(PATHS["openai"], body).status == 200
        running.process.send_signal(signal.SIGSTOP)
        os.waitpid(running.process.pid, os.WUNTRACED)
        running.process.send_signal(signal.SIGCONT)
        assert running.post(PATHS["openai"], body).status == 200
    finally:
        process.kill()
        process.communicate()


def test_connections_that_are_idle_or_slow_or_come_and_go_delay_nobody_and_cost_little(router, upstream):
    """2,000 idle ones, half of them in the middle of a head; then 5,000 that come and go."""
    count, churn = (2000, 5000) if LOAD else (300, 300)
    running = router(config_of(provider(upstream)), "--max-connections-per-peer=0")
    with contextlib.ExitStack() as stack:
        idle = idle_connections(running, stack, count)
        for number, client in enumerate(idle):
            if number % 2:
                client.sendall(b"POST /v1/chat/comp")
        for _ in range(20):
            assert running.get("/health").status == 200
        if os.path.exists("/proc/self/status"):
            with open("/proc/%d/status" % running.process.pid, encoding="ascii") as file:
                resident = int(next(line for line in file if line.startswith("VmRSS")).split()[1])
            assert resident < 60_000 + 60 * count, "%d KiB" % resident
    for number in range(churn):
        with socket.create_connection((running.host, running.port), 30) as client:
            if number % 2:
                client.sendall(HEALTH)
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in "\n".join(running.log())


@contextlib.contextmanager
def full_disk(kind, folder):
    """(home, before): a home directory on which nothing more can be written, and what the child does first."""
    import resource

    if kind == "a limit for every file":
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        return
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with contextlib.suppress(OSError), open(str(folder / "filler"), "wb", 0) as file:
            while file.write(b"x" * 4096):
                pass
        yield folder, None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@posix
@pytest.mark.parametrize("kind", ["a limit for every file", "a file system without room"])
def test_a_full_disk_takes_the_state_file_and_the_ledger_but_no_request(kind, tmp_path, upstream):
    """Hardening, proxies 31: it says so, leaves no half file, serves, ends cleanly, and recovers with the room."""
    home = tmp_path / "full"
    home.mkdir()
    with full_disk(kind, home) as (home, before):
        running = RunningRouter(config_of(provider(upstream)), (), tmp_path / "here", {"HOME": str(home)}, before=before)
        try:
            said = running.wait_log("will not find this instance")
            assert ("File too large" if before else "No space left") in said and str(home) in said
            for _ in range(3):
                assert running.post(PATHS["openai"], ask("openai", "fake-model")).status == 200
            running.wait_log("the usage ledger is not written")
            state = home / ".llm-router.runtime.json"
            assert not state.exists() and not list(home.glob(".llm-router.runtime.json*"))
            if not before:
                (home / "filler").unlink()
                assert until(state.exists) and str(running.process.pid) in state.read_text()
                assert until(lambda: any("ledger is written again" in line for line in running.log()))
        finally:
            assert running.stop() == 0
        assert "Traceback" not in "\n".join(running.log()) and not list(home.glob("*.tmp"))


def test_three_hundred_whole_answers_that_take_long_delay_no_other_request_and_hold_no_threads(router, upstream):
    """Trap 173. No thread waits for a model: all are asked at once, others are served meanwhile, then all are answered."""
    ready, alive = threading.Event(), fake.json_answer(200, fake.chat_whole("alive"))
    upstream.handler = lambda call: fake.gated(alive, ready) if b"slowly" in call.body else alive
    running = router(config_of(provider(upstream)), "--max-connections-per-peer=0")
    slow = json.dumps(ask("openai", "fake-model", text="Answer slowly.")).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(slow)
    with contextlib.ExitStack() as stack:
        clients = idle_connections(running, stack, 300)
        for client in clients:
            client.sendall(request + slow)
        until(lambda: len(upstream.calls) == 300)
        for _ in range(5):
            assert running.post(PATHS["openai"], ask("openai", "fake-model")).status == 200
        if os.path.isdir("/proc/self/task"):
            assert len(os.listdir("/proc/%d/task" % running.process.pid)) <= 64
        ready.set()
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(not LOAD, reason="LLM_ROUTER_TEST_LOAD=1 sends 25,000 requests")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this needs /proc")
def test_twenty_thousand_requests_leave_no_memory_behind(router):
    """1 MB at most: the ledger's cache is bounded, nothing else grows."""
    upstream, port = bench.start([sys.executable, bench.__file__, "--upstream"])
    try:
        running = router(config_of(provider("http://127.0.0.1:%s" % port, models=("bench",))))
        request = bench.request_bytes(PATHS["openai"], 1000, False)
        asyncio.run(bench.ask_often(running.port, request, 5000))
        before = bench.memory_mb(running.process.pid, "VmRSS")
        asyncio.run(bench.ask_often(running.port, request, 20_000))
        assert bench.memory_mb(running.process.pid, "VmRSS") - before <= 1
    finally:
        upstream.terminate()
        upstream.wait()
        upstream.stdout.close()
