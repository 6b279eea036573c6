"""The HTTP bar on real sockets: every raw request of test_http.py against the running program, and clients that are
slow, many, greedy or gone. What test_server.py asserts of single requests is not repeated here."""

import contextlib
import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from test_http import CASES, GET, POST, bytewise, results

import fake_upstream as fake
from exchanges import PATHS, ask, until
from running_router import RunningRouter, config_of, descriptors_of, provider

CHAT = PATHS["openai"].encode()
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
FIRST = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
REFUSALS = (400, 413, 414, 417, 431, 501, 505)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A router with small limits whose one upstream answers nothing that is not scripted, and that upstream."""
    with fake.FakeUpstream() as upstream:
        flags = ("--max-body-bytes=1000",)
        config = config_of(provider(upstream), allowedHosts=["a"])
        running = RunningRouter(config, flags, tmp_path_factory.mktemp("router"))
        running.upstream = upstream
        yield running
        running.kill()


def exchange(router, pieces, timeout=30.0):
    """Send the pieces, close that half, read to the end. Bytes that the router no longer takes are no failure."""
    with socket.create_connection((router.host, router.port), timeout) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = []

        def read():
            with contextlib.suppress(OSError):
                while part := client.recv(65536):
                    received.append(part)
                received.append(b"")

        reader = threading.Thread(target=read)
        reader.start()
        with contextlib.suppress(OSError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        reader.join(timeout)
        assert not reader.is_alive(), "the connection hangs"
        assert received[-1:] == [b""], "the connection was reset"
    return b"".join(received)


def answers(data):
    """[(status, whether it says close, body)] of answers one behind another; interim ones are left out."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status = int(re.match(rb"HTTP/1\.1 (\d\d\d) ", head).group(1))
        if status >= 200:
            announced = re.search(rb"(?i)content-length: (\d+)", head)
            assert announced or status == 204, head
            length = int(announced.group(1)) if announced else 0
            found.append((status, b"connection: close" in head.lower(), rest[:length]))
            assert len(rest) >= length
            rest = rest[length:]
        data = rest
    return found


def kind(answer):
    """The status with which HTTP itself refuses, or "served" for any answer of a handler."""
    status, closes, body = answer
    return status if status in REFUSALS and closes and b"not valid JSON" not in body else "served"


def wanted(expected):
    """What `kind` gives for a row of the table; nothing more is said of what an unfinished request gets."""
    return [row if isinstance(row, int) else "served" for row in results(expected) if row != "waits"]


def check(server, pieces_of):
    wrong = []
    for name, raw, expected in CASES:
        raw = raw.replace(b"POST / ", b"POST %s " % CHAT)  # where bodies are read
        pieces, before = pieces_of(raw)
        if pieces is None:
            continue
        try:
            seen = [kind(answer) for answer in answers(exchange(server, pieces))]
        except AssertionError as error:
            seen = [str(error)]
        want = ["served"] * before + wanted(expected)
        unfinished = results(expected)[-1] == "waits"
        if seen[: len(want)] != want if unfinished else seen != want:
            wrong.append((name, raw[:80], seen, want))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_raw_request_is_served_or_refused_by_the_running_program(server):
    check(server, lambda raw: ([raw], 0))


def test_every_raw_request_fares_the_same_behind_a_good_one_whose_answer_is_not_lost(server):
    """The HTTP bar, 3 and 4: pipelined in one packet."""
    check(server, lambda raw: ([FIRST + raw], 1))


def test_every_raw_request_fares_the_same_byte_by_byte(server):
    check(server, lambda raw: (bytewise(raw) if len(raw) < 250 else None, 0))


def test_what_is_served_between_two_good_requests_takes_neither_of_their_answers(server):
    """The HTTP bar, 3: whole and byte by byte, also with a body that no handler reads."""
    wrong = []
    for name, raw, expected in CASES:
        raw = raw.replace(b"POST / ", b"POST %s " % CHAT)
        want = wanted(expected)
        if "waits" in results(expected) or want[-1] != "served" or len(raw) > 5000:
            continue
        if not (isinstance(results(expected)[-1], tuple) and results(expected)[-1][-1]):
            continue  # it asks for the end of the connection
        between = FIRST + raw + CLOSE
        for pieces in ([between], bytewise(between)):
            seen = [kind(answer) for answer in answers(exchange(server, pieces))]
            if seen != ["served", *want, "served"]:
                wrong.append((name, len(pieces), seen))
    assert not wrong, "\n".join(map(str, wrong))


# (request line and headers, body, status, a header that must be there); the body of a HEAD's answer must not
ANSWERED = [
    (b"OPTIONS * HTTP/1.1\r\nHost: a", b"", 204, b"allow: "),  # RFC 9110 9.3.7
    (b"OPTIONS http://a HTTP/1.1\r\nHost: a", b"", 204, b"allow: "),
    (b"OPTIONS /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 3", b"abc", 204, b"allow: post"),
    (b"HEAD / HTTP/1.1\r\nHost: a", b"", 200, b"content-length: "),
    (b"HEAD /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5", b"GET /", 200, b"content-length: "),
    (b"HEAD /nothing HTTP/1.1\r\nHost: a", b"", 404, b"content-length: "),
    (b"HEAD /v1/messages HTTP/1.1\r\nHost: a", b"", 405, b"allow: post"),
    (b"HEAD http://a/health HTTP/1.1\r\nHost: b", b"", 200, b"content-length: "),
    (b"TRACE / HTTP/1.1\r\nHost: a", b"", 405, b"allow: "),  # never echoed: 9110 9.3.8
    (b"TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: 1", b"x", 405, b"allow: "),
    (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443", b"", 405, b"allow: "),
    (b"PUT /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 2", b"{}", 405, b"allow: post"),
    (b"GET /v1/responses HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket", b"", 426,
     b"upgrade: http/1.1\r\nconnection: upgrade\r\n"),
    (b"DELETE /health HTTP/1.1\r\nHost: a", b"", 405, b"allow: get"),
    (b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 2", b"{}", 405, b"allow: get"),
    (b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", 404, b""),
    (b"get / HTTP/1.1\r\nHost: a", b"", 501, b""),  # 9110 9.1
    (b"PROPFIND / HTTP/1.1\r\nHost: a\r\nContent-Length: 1", b"x", 501, b""),
    (b"M" * 300 + b" / HTTP/1.1\r\nHost: a", b"", 501, b""),
    (b"GET / HTTP/1.9\r\nHost: a", b"", 200, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: AAMAAABk",
     b"", 200, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 99", b"", 200, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", b"5;a=b\r\nabcde\r\n0\r\n\r\n", 200, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1,0-2\r\nIf-Match: x\r\nIf-Modified-Since: x", b"", 200, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nAccept: ;;;\r\nAccept-Encoding: gzip;q=0", b"", 200, b""),
    (b"GET /%00%0d%0aX:%20y HTTP/1.1\r\nHost: a", b"", 404, b""),
    (b"GET /..%c0%af../ HTTP/1.1\r\nHost: a", b"", 404, b""),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nExpect: 100-continue", b"", 200, b""),
    (b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 0", b"", 400, b""),
    (b"POST /v1/messages HTTP/1.1\r\nHost: a", b"", 400, b""),
    (b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Encoding: br\r\nContent-Length: 2", b"{}", 415, b"accept-encoding: gzip"),
]  # fmt: skip


def test_methods_bodies_and_upgrades_are_answered_as_they_should_and_take_no_neighbours_answer(server):
    """Whole and byte by byte, each between two good requests, and that the date is an HTTP date."""
    for head, body, status, wanted_header in ANSWERED:
        raw = FIRST + head + b"\r\n\r\n" + body + CLOSE
        for pieces in ([raw], bytewise(raw)):
            data = exchange(server, pieces)
            parts = data.split(b"HTTP/1.1 ")[1:]
            assert [int(part[:3]) for part in parts] == [200, status, 200], (head, data)
            answer, _, rest = parts[1].partition(b"\r\n\r\n")
            assert wanted_header in answer.lower(), (head, answer)
            assert re.search(rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer)
            assert not (head.startswith(b"HEAD") and rest), (head, rest)


def test_requests_that_came_before_a_half_close_are_all_answered(server):
    """The HTTP bar, 3 and 8: also when an answer before them takes its time."""
    server.upstream.answer(fake.later(fake.json_answer(200, fake.chat_whole("first")), 0.3))
    body = json.dumps(ask("openai", "fake-model")).encode()
    post = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (CHAT, len(body)) + body
    seen = answers(exchange(server, [post + FIRST * 2]))
    assert [answer[0] for answer in seen] == [200, 200, 200]
    assert [answer[1] for answer in seen] == [False, False, True]


def test_the_refusal_of_a_head_has_no_body(server):
    for bad in (b"Host: a/b\r\n\r\n", b"X : y\r\n\r\n", b"Host: a\r\nContent-Length: x\r\n\r\n"):
        data = exchange(server, [b"HEAD / HTTP/1.1\r\n" + bad])
        assert data.startswith(b"HTTP/1.1 400 ")
        assert data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("cut", [0, 1])
def test_nothing_behind_a_refused_request_is_served(server, cut):
    """No desync: a refusal is the last answer of its connection, whether the rest comes at once or later."""
    for name, raw, expected in CASES:
        raw = raw.replace(b"POST / ", b"POST %s " % CHAT)
        if isinstance(results(expected)[-1], int):
            seen = answers(exchange(server, [raw, CLOSE] if cut else [raw + CLOSE]))
            assert [kind(answer) for answer in seen] == wanted(expected), name


def test_bad_bytes_that_come_during_an_answer_are_refused_after_it(server):
    """The HTTP bar, 4."""
    server.upstream.answer(fake.later(fake.json_answer(200, fake.chat_whole("first")), 0.4))
    body = json.dumps(ask("openai", "fake-model")).encode()
    with socket.create_connection((server.host, server.port), 30) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (CHAT, len(body)) + body)
        time.sleep(0.1)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n")
        data = b""
        while part := client.recv(65536):
            data += part
    (status, closes, body), refusal = answers(data)
    assert (status, closes, b"first" in body) == (200, False, True)
    assert kind(refusal) == 400


def test_a_thousand_pipelined_requests_are_all_answered(server):
    data = exchange(server, [FIRST * 999 + CLOSE])
    assert [answer[0] for answer in answers(data)] == [200] * 1000


def test_what_is_sent_ahead_of_an_answer_does_not_fill_the_memory(server):
    """While a request is being served, the connection is not read without bound."""
    gate = threading.Event()
    server.upstream.answer(fake.gated(fake.json_answer(200, fake.chat_whole("late")), gate))
    body = json.dumps(ask("openai", "fake-model")).encode()
    with socket.create_connection((server.host, server.port), 30) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (CHAT, len(body)) + body)
        client.settimeout(0.5)
        sent, piece = 0, FIRST * 2000
        with contextlib.suppress(socket.timeout):
            while sent < 64 << 20:
                sent += client.send(piece)
        gate.set()
    assert sent < 32 << 20


@pytest.mark.parametrize("raw", [b"GET / HTT", GET, GET + b"X"], ids=["line", "headers", "header"])
def test_half_a_head_and_then_the_end_is_a_400(server, raw):
    assert [kind(answer) for answer in answers(exchange(server, [raw]))] == [400]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" % CHAT, 413),
        (b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
    ],
    ids=["too large", "not HTTP"],
)
def test_who_sends_on_after_an_early_refusal_can_finish_and_then_see_it(server, head, status):
    """The HTTP bar, 7: an early close would be a reset, and the answer lost."""
    with socket.create_connection((server.host, server.port), 30) as client:
        client.sendall(head)
        for _ in range(30):
            client.sendall(b"x" * 10_000)
            time.sleep(0.005)
        client.shutdown(socket.SHUT_WR)
        data = b""
        while part := client.recv(65536):
            data += part
    assert [answer[0] for answer in answers(data)] == [status]


def test_half_a_body_and_then_the_end_reaches_no_upstream(server):
    before = len(server.upstream.calls)
    for framing in (b"Content-Length: 500\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1f4\r\n"):
        raw = POST.replace(b" / ", b" %s " % CHAT) + framing + b'{"model": "fake-model"}'
        assert [answer[0] for answer in answers(exchange(server, [raw]))] == [400]
    assert len(server.upstream.calls) == before


def test_bytes_behind_a_request_that_closes_do_not_turn_its_answer_into_a_reset(server):
    """The HTTP bar, 7; RFC 9112, 9.6: who sends on for a while still sees the answer and an orderly end."""
    with socket.create_connection((server.host, server.port), 30) as client:
        client.sendall(CLOSE + b"x")
        data = client.recv(65536)
        for _ in range(10):
            client.sendall(b"x" * 10_000)
        while part := client.recv(65536):
            data += part
    assert [answer[0] for answer in answers(data)] == [200]


@pytest.fixture(scope="module")
def hasty(tmp_path_factory, server):
    """A router that leaves clients little time, before the same upstream."""
    flags = ("--head-timeout-ms=2000", "--body-timeout-ms=1000", "--max-connections-per-peer=600")
    config = config_of(provider(server.upstream), allowedHosts=["a"])
    running = RunningRouter(config, flags, tmp_path_factory.mktemp("router"))
    yield running
    running.kill()


def test_an_upload_at_a_fair_rate_is_not_cut_but_one_below_it_is(hasty):
    """Hardening, proxies 20: a deadline that grows with what came. By default it comes after 30 s."""
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 36000\r\n\r\n" % CHAT
    for size, pause, status in ((3000, 0.12, 400), (1, 0.2, 408)):
        with socket.create_connection((hasty.host, hasty.port), 10) as client:
            client.sendall(head)
            began, data = time.monotonic(), b""
            client.settimeout(pause)
            sent = 0
            while not data and time.monotonic() < began + 20:
                with contextlib.suppress(OSError):
                    if sent < 36_000:
                        sent += client.send(b"x" * size)
                    data = client.recv(65536)
        assert data.startswith(b"HTTP/1.1 %d " % status), (size, data[:100])
        assert time.monotonic() - began > 1


def test_hundreds_of_idle_and_trickling_connections_do_not_delay_a_request(hasty):
    """Hardening, proxies 21."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((hasty.host, hasty.port), 30)) for _ in range(300)]
        for client in idle[:150]:
            client.sendall(b"GET / HT")
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert hasty.get("/health").status == 200
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 0.5, took  # 2 s, if one waited for them
        assert sum(b"408" in client.recv(1000) for client in idle[:150]) == 150


def test_one_peer_cannot_take_every_connection(router, upstream):
    """Hardening, proxies 28: 503 and when to come again, at once; and there is room again when one leaves."""
    running = router(config_of(provider(upstream)), "--max-connections-per-peer=2")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.create_connection((running.host, running.port), 30))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        data = exchange(running, [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
        assert data.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in data
    until(lambda: b"200 OK" in running.raw(CLOSE.replace(b"Host: a", b"Host: localhost")))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_connections_that_come_and_go_leave_nothing_behind(server):
    def count():
        return len(descriptors_of(server.process.pid))

    assert server.get("/health").status == 200
    before = count()
    for number in range(300):
        client = socket.create_connection((server.host, server.port), 30)
        if number % 3:
            client.sendall((b"", b"GET / HT", GET + b"\r\n")[number % 3])
        if number % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    until(lambda: count() <= before + 3, step=0.05)


def test_nothing_of_all_this_was_an_error_of_the_routers_own(server, hasty):
    """Runs last: no traceback and no error line came of any of it."""
    for running in (server, hasty):
        assert [line for line in running.log() if "Traceback" in line or "internal" in line.lower()] == []
        assert running.get("/health").status == 200
