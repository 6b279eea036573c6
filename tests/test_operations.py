"""The server in the background, its log file, SIGHUP, and who has its port."""

import asyncio
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import post, until
from running_router import COMMAND, RunningRouter, clean_environment, config_of, free_port, provider

PROGRAM = str(Path(r.__file__))
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells who has a port")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and modes are of POSIX")


@pytest.fixture
def command(tmp_path):
    """`command(*words)` runs the program with a home of its own and returns the finished process."""

    def run(*words):
        line = [*COMMAND, *words]
        return subprocess.run(line, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60)

    yield run
    run("stop", "--grace=0")


@pytest.fixture
def config(tmp_path, upstream):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(provider(upstream))))
    path.chmod(0o600)
    return path


def test_a_detached_server_answers_and_its_starter_ends(command, config, tmp_path):
    done = command("start", "--detach", "--port=0", "--config=%s" % config)
    assert done.returncode == 0, done.stderr
    assert re.match(r"listening on http://127\.0\.0\.1:\d+\n", done.stdout)
    status = json.loads(command("status", "--json").stdout)
    assert "pid                 %d" % status["pid"] in done.stdout
    if hasattr(os, "memfd_create"):  # it gave its source back, as one in the foreground does
        words = Path("/proc/%d/cmdline" % status["pid"]).read_text().split("\0")
        assert any(word.startswith("/proc/self/fd/") for word in words)
    log = tmp_path / ".llm-router.log"
    assert "listening on" in log.read_text()
    assert os.name != "posix" or log.stat().st_mode & 0o777 == 0o600
    assert "stopped" in command("stop").stdout


@posix
@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout"])
def test_a_detached_server_whose_log_goes_to_a_device_is_heard_all_the_same(command, config, tmp_path, path):
    done = command("start", "--detach", "--port=0", "--config=%s" % config, "--log-file=" + path)
    assert done.returncode == 0 and "stopped" in command("stop").stdout, done.stderr
    assert ("stopping" in (tmp_path / ".llm-router.log").read_text()) == (path == "/dev/stdout")


@linux
def test_a_detached_server_that_cannot_start_says_why_and_names_who_has_the_port(command, config):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = command("start", "--detach", "--port=%d" % port, "--config=%s" % config)
        assert done.returncode == 1 and "listening" not in done.stdout
        assert "the port is in use by pid %d (" % os.getpid() in done.stderr
        with socket.create_connection(("127.0.0.1", port)):  # the holder is as it was
            pass


def test_a_detached_server_is_heard_where_lines_end_as_windows_ends_them(tmp_path, monkeypatch):
    """It had started, was not heard for half a minute and was ended then."""
    monkeypatch.setattr(sys, "platform", "win32")
    (tmp_path / "log").write_bytes(b"listening on http://127.0.0.1:1002\r\n  providers  a\r\n  pid        2345\r\n")
    child = SimpleNamespace(pid=77, poll=lambda: None)
    assert r._wait_for_start(child, str(tmp_path / "log"), 0) == "http://127.0.0.1:1002"


@posix
def test_the_address_of_another_instance_in_the_same_log_is_not_taken_for_the_child_s(tmp_path):
    """Two `run` at the same time: each pointed its program at the other's router, and one of them stayed behind."""
    said = "listening on http://127.0.0.1:%d\n  providers           a\n  pid                 %d\n"
    (tmp_path / "log").write_text(said % (1001, 12345) + said % (1002, 2345) + said % (1003, 1234))
    child = SimpleNamespace(pid=2345, poll=lambda: None)
    assert r._wait_for_start(child, str(tmp_path / "log"), 0) == "http://127.0.0.1:1002"


def test_a_detached_server_on_another_port_has_a_log_of_its_own(command, config, tmp_path):
    port = free_port()
    done = command("start", "--detach", "--port=%d" % port, "--config=%s" % config)
    assert done.returncode == 0, done.stderr
    log = tmp_path / (".llm-router.%d.log" % port)
    assert str(log) in done.stdout and log.exists() and not (tmp_path / ".llm-router.log").exists()


@linux
def test_who_listens_on_a_port_is_found_for_both_kinds_of_addresses():
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            holder = socket.create_server((address, free_port()), family=family)  # nobody else's port afterwards
        except OSError:
            continue
        with holder:
            assert r.find_listener(holder.getsockname()[1])[0] == os.getpid()
            port = holder.getsockname()[1]
        assert r.find_listener(port) is None


@posix
def test_sighup_reloads_the_configuration(router, upstream):
    running = router(config_of(provider(upstream)), "--watch-config=false")
    running.write_config(config_of(provider(upstream), modelAliases={"new-name": "fake/fake-model"}))
    assert post(running, "openai", model="new-name").status == 404
    running.process.send_signal(signal.SIGHUP)
    assert until(lambda: post(running, "openai", model="new-name").status == 200)


IN_A_THREAD = """
import sys, threading
sys.path.insert(0, %r)
import llm_router
codes = []
thread = threading.Thread(target=lambda: codes.append(llm_router.main(sys.argv[1:])))
thread.start()
thread.join()
print("it ended with", codes[0])
"""


def test_it_serves_in_a_thread_of_another_program_and_ends_when_told(config, tmp_path):
    """Python lets only the main thread set handlers of signals."""
    code = IN_A_THREAD % str(Path(PROGRAM).parent)
    running = RunningRouter(None, ["--config=%s" % config], tmp_path, program=("-c", code))
    try:
        assert post(running, "openai").status == 200
        line = [*COMMAND, "stop", "--port=%d" % running.port]
        done = subprocess.run(line, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60)
        assert "stopped" in done.stdout, done.stderr
        assert until(lambda: "it ended with 0" in running.stdout())
    finally:
        running.kill()


def test_signals_stay_another_program_s_where_a_command_runs_in_a_thread_of_it():
    """As `main(["run", ...])`: Python raises a ValueError at every other thread's attempt."""
    before, undone = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: undone.append(r.on_end(len)()))
    thread.start()
    thread.join(30)
    assert undone == [[]] and signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_was_set_in_c_is_no_reason_to_fail_at_the_end(monkeypatch):
    """Python shows it as None, which it does not take back."""
    given = []

    def set_handler(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        given.append(handler)

    monkeypatch.setattr(signal, "signal", set_handler)
    r.on_end(len)()
    assert given[0] is len and given[-1] is signal.SIG_DFL


@posix
def test_a_sighup_with_a_broken_file_keeps_the_last_good_one(router, upstream):
    running = router(config_of(provider(upstream)), "--watch-config=false")
    running.write_config("{broken")
    running.process.send_signal(signal.SIGHUP)
    running.wait_log("reload failed")
    assert post(running, "openai").status == 200


def test_the_log_file_is_moved_when_it_is_full_and_private(tmp_path):
    path = tmp_path / "log"
    file = r.LogFile(str(path), 100)
    for number in range(12):
        file.write("line %02d %s\n" % (number, "x" * 20))
    kept = (tmp_path / "log.1").read_text() + path.read_text()
    assert kept.endswith("line 11 %s\n" % ("x" * 20))
    assert path.stat().st_size <= 100 and (tmp_path / "log.1").stat().st_size <= 100
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600


@posix
def test_a_log_file_that_somebody_else_moves_or_removes_is_begun_anew(tmp_path):
    """logrotate does so, and a second router with the same file; what is full is judged by the file, not by our part."""
    path = tmp_path / "log"
    first, second = r.LogFile(str(path), 100), r.LogFile(str(path), 100)
    first.write("a" * 60 + "\n")
    second.write("b" * 30 + "\n")
    first.write("c" * 30 + "\n")  # moves what both have written
    second.write("d\n")
    assert path.read_text() == "c" * 30 + "\nd\n" and len((tmp_path / "log.1").read_text()) == 92
    path.rename(tmp_path / "old")
    first.write("e\n")
    path.unlink()
    first.write("f\n")
    assert path.read_text() == "f\n"


def test_a_log_file_that_fails_is_opened_anew_by_the_next_line(tmp_path):
    folder = tmp_path / "away"
    file = r.LogFile(str(folder / "log"), 100)
    with pytest.raises(OSError, match="away"):
        file.write("lost\n")
    folder.mkdir()
    file.write("kept\n")
    assert (folder / "log").read_text() == "kept\n"


def test_a_log_file_that_cannot_be_moved_grows_rather_than_lose_lines(tmp_path):
    """In /var/log the file may be a user's, and the folder is not."""
    path = tmp_path / "log"
    (tmp_path / "log.1").mkdir()
    file = r.LogFile(str(path), 20)
    for line in ("a" * 15, "b" * 15, "c" * 15):
        file.write(line + "\n")
    assert path.read_text().split() == ["a" * 15, "b" * 15, "c" * 15]


@posix
def test_lines_that_find_no_room_leave_no_half_of_one_behind(tmp_path):
    """A full disk takes what fits. RLIMIT_FSIZE stands in for it, of which Python ignores the signal."""
    import resource

    path, file = tmp_path / "log", r.LogFile(str(tmp_path / "log"), 0)
    file.write("a\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="space"):
            file.write("b" * 20 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write("c\n")
    assert path.read_text() == "a\nc\n"


def test_what_is_logged_before_the_end_is_written_though_the_writer_is_busy_just_then():
    """The stream is in the middle of a write when the last line comes and the log is closed."""
    is_writing, may_go_on, written = threading.Event(), threading.Event(), []

    class Stream(io.StringIO):
        def write(self, text):
            is_writing.set()
            may_go_on.wait(30)
            written.append(text)

    log = r.LogWriter(Stream())
    log.write("first")
    assert is_writing.wait(30)
    log.write("last")
    closing = threading.Thread(target=log.close)
    closing.start()
    assert until(log._closing.is_set)
    may_go_on.set()
    closing.join(30)
    assert until(lambda: "".join(written) == "first\nlast\n")


def test_lines_that_nobody_could_write_are_counted_until_somebody_can():
    written, is_full = [], [True]

    class Stream(io.StringIO):
        def write(self, text):
            if is_full[0]:
                raise OSError("no space left")
            written.append(text)

    log = r.LogWriter(Stream(), "json", limit=2)
    log.close(30)  # its thread would write at moments of its own
    for _ in range(5):
        log.write("lost")
    log._work(False)
    log._work(False)
    is_full[0] = False
    log._work(True)
    (line,) = written
    told = json.loads(line)  # like every other line
    assert (told["level"], told["message"].partition(":")[0]) == ("warning", "5 log lines were dropped")


@posix
def test_the_log_goes_through_no_symbolic_link(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "log").symlink_to(target)
    with pytest.raises(OSError, match="log"):
        r.open_private(str(tmp_path / "log"), "ab")
    assert target.read_text() == "mine"


@posix
def test_only_a_file_is_made_private_and_no_device():
    """A router that root runs with --log-file=/dev/null must not take that from everybody else."""
    master, slave = os.openpty()
    try:
        os.fchmod(slave, 0o620)
        r.open_private(os.ttyname(slave), "ab").close()
        assert os.fstat(slave).st_mode & 0o777 == 0o620
    finally:
        os.close(master)
        os.close(slave)


@posix
def test_a_process_that_is_started_anew_keeps_the_options_of_its_interpreter():
    code = "import sys; sys.path.insert(0, %r); import llm_router as r; print(r.interpreter_words()[1:])"
    line = [sys.executable, "-I", "-S", "-W", "ignore::UserWarning", "-X", "utf8", "-X", "llm_router=x", "-c"]
    done = subprocess.run([*line, code % os.path.dirname(PROGRAM)], capture_output=True, text=True, timeout=60, check=True)
    words = json.loads(done.stdout.replace("'", '"'))
    assert {"-I", "-S", "-Wignore::UserWarning", "-Xutf8"} <= set(words) and "llm_router" not in " ".join(words)


def test_requests_are_logged_to_the_file_of_the_setting(router, upstream, tmp_path):
    path = tmp_path / "requests.log"
    running = router(config_of(provider(upstream)), "--log-file=%s" % path)
    assert post(running, "openai").status == 200
    assert until(lambda: "fake/fake-model=ok" in path.read_text())
    assert not any("fake/fake-model=ok" in line for line in running.log())


@posix
@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/2"])
def test_the_log_may_go_to_a_standard_stream_by_the_name_of_its_device(config, tmp_path, path):
    """What a container's log collector reads. Where the stream is a socket, as here, it cannot be opened by its name."""
    ours, theirs = socket.socketpair()
    words = [*COMMAND, "start", "--port=0", "--config=%s" % config, "--log-file=%s" % path, "--log-format=json"]
    streams = {"stdout" if path.endswith("stdout") else "stderr": theirs}
    with ours, subprocess.Popen(words, env=clean_environment(tmp_path), **streams) as child:
        theirs.close()
        try:
            assert until((tmp_path / ".llm-router.runtime.json").exists)
            child.send_signal(signal.SIGHUP)
            with ours.makefile() as said:
                assert any("configuration reloaded" in line for line in said)
        finally:
            child.kill()


@posix
def test_a_pipe_that_nobody_reads_is_no_log_and_not_waited_for(command, config, tmp_path):
    os.mkfifo(tmp_path / "log")
    done = command("start", "--port=0", "--config=%s" % config, "--log-file=%s" % (tmp_path / "log"))
    assert done.returncode == 1 and "--log-file" in done.stderr and "listening" not in done.stdout
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        r.LogFile(str(tmp_path / "log"), 10).write("one\n")
        assert os.read(reader, 100) == b"one\n"
        with r.open_private(str(tmp_path / "log"), "ab") as file:
            assert os.get_blocking(file.fileno())  # a line that does not fit waits, in the thread that writes
    finally:
        os.close(reader)


def test_a_log_file_that_cannot_be_written_is_said_at_the_start(command, config, tmp_path):
    done = command("start", "--port=0", "--config=%s" % config, "--log-file=%s" % (tmp_path / "no" / "log"))
    assert done.returncode == 1 and "--log-file" in done.stderr and "listening" not in done.stdout


def test_every_line_of_a_json_log_is_an_object(router, upstream):
    running = router(config_of(provider(upstream)), "--log-format=json", "--watch-config=false")
    assert post(running, "openai").status == 200
    running.write_config("{broken")
    running.process.send_signal(signal.SIGHUP) if os.name == "posix" else None
    running.stop()
    records = [json.loads(line) for line in running.log()]
    assert [one["level"] for one in records if "level" in one][-1] == "info"
    assert any("stopping" in one["message"] for one in records)
    assert any(one.get("outcome") == "ok" for one in records)


def test_the_log_level_keeps_what_went_wrong_and_leaves_out_what_went_well(router, upstream):
    running = router(config_of(provider(upstream)), "--log-level=warning")
    assert post(running, "openai").status == 200
    upstream.answer(fake.json_answer(400, {"error": {"message": "bad"}}))
    assert post(running, "openai").status == 400
    running.wait_log("fake/fake-model=400")
    assert not any("fake/fake-model=ok" in line for line in running.log())
    quiet = router(config_of(provider(upstream)), "--log-level=silent")
    assert post(quiet, "openai").status == 200
    quiet.stop()
    assert quiet.log() == []


def test_a_task_in_the_background_that_fails_is_told_once_and_goes_on():
    """It would end, and no edit of the configuration be seen any more."""
    said, turns = [], []

    async def work():
        turns.append(len(turns))
        if len(turns) == 6:
            raise asyncio.CancelledError
        if len(turns) != 4:
            raise ValueError("odd bytes" if len(turns) < 5 else "others")

    host = SimpleNamespace(sleep=lambda s: asyncio.sleep(0), log=SimpleNamespace(note=lambda *words: said.append(words)))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(r._repeat(host, 1.0, work))
    failed = "a task in the background failed, and goes on: ValueError: "
    assert turns == list(range(6)) and said == [(failed + "odd bytes", "error"), (failed + "others", "error")]


# ----- addresses -----


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


both_kinds = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


def listening(sockets):
    return sorted(sock.getsockname()[:2] for sock in sockets)


@pytest.fixture
def two_addresses(monkeypatch):
    """A name with an IPv4 and an IPv6 address, and one that this machine does not have."""
    family, kind = socket.AF_INET6, socket.SOCK_STREAM
    found = [(socket.AF_INET, kind, 0, "", ("127.0.0.1", 0)), (family, kind, 0, "", ("::1", 0, 0, 0))]
    found += [(family, kind, 0, "", ("2001:db8::1", 0, 0, 0))]

    def lookup(host, port, *_, **__):
        return [(*row[:4], (row[4][0], port, *row[4][2:])) for row in found]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@both_kinds
def test_all_addresses_of_a_name_share_one_port(two_addresses):
    sockets = r.open_listeners("localhost", 0)
    (v4, port), (v6, other) = listening(sockets)
    assert (v4, v6, other) == ("127.0.0.1", "::1", port)
    for sock in sockets:
        sock.close()


@both_kinds
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine's IPv6 sockets take no IPv4")
def test_who_listens_on_every_address_of_ipv6_is_reached_by_ipv4_too():
    """As nearly every other server is with `::`; asyncio's own make it IPv6 alone (Kludex/uvicorn#2945)."""
    (listener,) = r.open_listeners("::", 0)
    with listener:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, listener.getsockname()[1]), 30):
                pass


@both_kinds
def test_a_name_of_which_one_address_is_taken_is_refused_and_the_holder_stays(two_addresses):
    with socket.create_server(("::1", free_port()), family=socket.AF_INET6) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            r.open_listeners("localhost", port)
        with socket.create_connection(("::1", port)):
            pass
        with socket.create_server(("127.0.0.1", port)):  # nothing of ours is left there
            pass


@both_kinds
def test_a_free_port_is_free_at_all_addresses_of_a_name(two_addresses, monkeypatch):
    create, tried = socket.create_server, []

    def taken_once(address, **how):
        tried.append(address[:2])
        if len(tried) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return create(address, **how)

    monkeypatch.setattr(socket, "create_server", taken_once)
    sockets = r.open_listeners("localhost", 0)
    (_, port), (_, other) = listening(sockets)
    assert port == other and tried[2] == ("127.0.0.1", 0)
    for sock in sockets:
        sock.close()


@both_kinds
def test_it_listens_on_ipv6(router, upstream):
    running = router(config_of(provider(upstream)), "--host=::1")
    with socket.create_connection(("::1", running.port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


# ----- changes under load -----


def test_hundreds_of_edits_under_load_lose_no_request(router, upstream):
    """Every edit replaces the file; every other one breaks it."""
    upstream.handler = fake.final_text("hi")
    running = router(config_of(provider(upstream)), "--log-level=error")
    failed, asked, over = [], [0] * 4, threading.Event()

    def ask_on(number):
        while not over.is_set():
            reply = post(running, "openai", stream=asked[number] % 2 == 1)
            asked[number] += 1
            if reply.status != 200 or "hi" not in reply.text:
                failed.append(reply)

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            good = config_of(provider(upstream), modelAliases={"edit-%d" % number: "fake/fake-model"})
            running.write_config("{" if number % 2 else good)
            if os.name == "posix":
                running.process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        running.write_config(config_of(provider(upstream), modelAliases={"the-last": "fake/fake-model"}))
        until(lambda: post(running, "openai", model="the-last").status == 200)
        until(lambda: min(asked) > 5)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failed


@posix
def test_a_key_that_was_set_right_is_not_blamed_for_the_wrong_one_by_requests_under_way(router, make_upstream):
    """Else its provider would be passed over for ten minutes."""
    wrong, gate = "not the key", threading.Event()

    def knows_the_key(call):
        if wrong in call.header("authorization"):
            return fake.gated(fake.error_answer("openai", 401), gate)
        return fake.final_text("the right key")(call)

    upstream = make_upstream(knows_the_key)
    running = router(config_of(provider(upstream, apiKey=wrong)), "--watch-config=false")
    late = threading.Thread(target=post, args=(running, "openai"))
    late.start()
    upstream.wait_calls(1)
    running.write_config(config_of(provider(upstream)))
    running.process.send_signal(signal.SIGHUP)
    running.wait_log("reloaded")
    assert "the right key" in post(running, "openai").text
    gate.set()
    late.join(30)
    running.wait_log("fake/fake-model=401")
    assert "llm_router_cooldown_seconds{model=\"fake/fake-model\"} 0" in running.get("/metrics").text


@posix
def test_fifty_streams_outlive_a_reload_that_takes_their_provider_away(router, upstream, make_upstream):
    gate, events = threading.Event(), fake.chat_stream("first and last")
    upstream.handler = lambda call: fake.sse_answer(events[:2] + [fake.Gate(gate)] + events[2:])
    other = make_upstream(fake.final_text("from the other"))
    running = router(config_of(provider(upstream)), "--watch-config=false")
    streams = [running.open("/v1/chat/completions", dict(MESSAGES, stream=True)) for _ in range(50)]
    for stream in streams:
        assert stream.read_event()
    running.write_config(config_of(provider(other)))
    running.process.send_signal(signal.SIGHUP)
    until(lambda: "from the other" in post(running, "openai").text)
    gate.set()
    for stream in streams:
        reply = stream.read_rest()
        assert reply.ended == "clean"
        assert reply.events[-1][1] == "[DONE]"
