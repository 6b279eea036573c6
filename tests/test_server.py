"""The client's side on real sockets: bad input, who may call, clients that leave or stop reading, start and end of the process."""

import asyncio
import contextlib
import gc
import gzip
import http.client
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from types import SimpleNamespace

import pytest

import fake_upstream as fake
import llm_router
from exchanges import (
    PATHS,
    QUICK,
    WIRES,
    Pair,
    ask,
    assert_answer,
    assert_stream_error,
    attempts_of,
    error_shape,
    pair_config,
    post,
    read_answer,
    until,
)
from running_router import CONSOLE_SCRIPT, PROGRAM, Caller, RunningRouter, clean_environment, config_of, provider

TEXT = "An answer, 答え."
KEY = "the-master-key-5d2c"
OTHER = {"openai": "anthropic", "anthropic": "openai", "responses": "anthropic"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One router that remembers nothing."""
    with fake.FakeUpstream() as first, fake.FakeUpstream() as second:
        first.plain_handler = second.plain_handler = fake.final_text(TEXT)
        flags = QUICK + ("--max-body-bytes=2000000",)
        running = RunningRouter(pair_config(first, second), flags, tmp_path_factory.mktemp("router"))
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture
def pair(shared):
    with shared.scripted():
        yield shared


@pytest.fixture(scope="module")
def shared_locked(tmp_path_factory):
    """One router that asks for a key."""
    with fake.FakeUpstream() as first, fake.FakeUpstream() as second:
        first.plain_handler = second.plain_handler = fake.final_text(TEXT)
        config = pair_config(first, second, masterKey=KEY, corsOrigins=["https://app.example"])
        running = RunningRouter(config, QUICK + ("--require-auth=true",), tmp_path_factory.mktemp("router"))
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture
def locked(shared_locked):
    with shared_locked.scripted():
        yield shared_locked


def no_calls(pair):
    """Whether nothing at all reached an upstream."""
    return pair.calls() == (0, 0)


def request_bytes(body, path=PATHS["openai"], headers=(), version="1.1"):
    """A POST as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["POST %s HTTP/%s" % (path, version), "host: localhost", "content-length: %d" % len(data), *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def connect(router):
    return socket.create_connection((router.host, router.port), 30)


# --- bad input ---

BAD_BODIES = {
    "nothing": b"",
    "not JSON": b"{model: x}",
    "half": b'{"model": "a-openai/solo", "messages": [',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "a-openai/solo"}'.encode("utf-16"),
    "NaN": b'{"temperature": NaN}',
    "two values": b"{} {}",
    "deep lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge integer": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "a model that is a list": b'{"model": []}',
    "a stream that is text": b'{"stream": "yes"}',
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_request_is_a_400_in_the_clients_format(pair, name, wire):
    """Hardening 37; trap 121."""
    reply = pair.router.post(PATHS[wire], BAD_BODIES[name])
    assert reply.status == 400, reply
    assert error_shape(wire, reply.json)["type"] == "invalid_request_error"
    assert no_calls(pair)
    assert "Traceback" not in reply.text


@pytest.mark.parametrize(
    "odd",
    [
        b'{"model": "a-openai/solo", "model": "b-openai/m", "messages": []}',
        b'\xef\xbb\xbf{"model": "a-openai/solo", "messages": []}',
        b'{"model": "a-openai/solo", "messages": [{"content": "\\ud800"}]}',
    ],
    ids=["duplicate keys", "byte order mark", "lone surrogate"],
)
def test_odd_but_readable_json_passes(pair, odd):
    """Hardening 37."""
    assert pair.router.post(PATHS["openai"], odd).status == 200


@pytest.mark.parametrize("wire", WIRES)
def test_a_message_that_cannot_be_translated_is_a_400_that_names_the_place(pair, wire):
    body = ask(wire, "a-%s/solo" % OTHER[wire])
    body["input" if wire == "responses" else "messages"] = [17]
    reply = pair.router.post(PATHS[wire], body)
    assert reply.status == 400
    error_shape(wire, reply.json)
    assert no_calls(pair)


def test_a_body_above_the_limit_is_a_413_before_it_was_sent(pair):
    """Hardening, proxies 25 and 27: in both framings, and the client sees the status."""
    for wire in WIRES:
        head = b"POST %s HTTP/1.1\r\nhost: x.localhost\r\ncontent-length: 2000001\r\n\r\n" % PATHS[wire].encode()
        answer = pair.router.raw(head + b"x" * 1000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        error_shape(wire, json.loads(answer.partition(b"\r\n\r\n")[2]))
    chunked = b"POST /v1/messages HTTP/1.1\r\nhost: x.localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = pair.router.raw(chunked + fake.chunk(b"x" * 1_000_000) * 3)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert pair.router.post("/v1/messages", b" " * 2_100_000).status == 413
    assert no_calls(pair)


@pytest.mark.parametrize(
    ("framing", "body", "code"),
    [(b"transfer-encoding: chunked", b"zz\r\n", "bad_chunk"), (b"content-length: 2000001", b"x", "request_too_large")],
    ids=["bad chunk", "too long"],
)
@pytest.mark.parametrize("comes_later", [False, True], ids=["with the head", "later"])
def test_a_wrong_body_is_a_request_like_any_other_whenever_it_comes(pair, locked, framing, body, code, comes_later):
    """It is logged, has its id and the client's format; who may not call is told that, and no more."""
    for router, log in ((pair.router, code), (locked.router, "401 invalid_api_key")):
        before = len(router.log())
        with connect(router) as client:
            start = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n%s\r\n\r\n" % framing
            client.sendall(start if comes_later else start + body)
            if comes_later:
                time.sleep(0.1)
                client.sendall(body)
            head, _, answer = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
        assert b"x-llm-router-request-id: req_" in head
        assert error_shape("anthropic", json.loads(answer))
        until(lambda router=router, before=before, log=log: log in "".join(router.log()[before:]))
    assert no_calls(pair)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "GZIP", "x-gzip", "identity"])
def test_a_compressed_body_is_read(pair, coding):
    data = json.dumps(ask("openai", "a-openai/solo")).encode()
    packed = {"deflate": zlib.compress, "identity": bytes}.get(coding, gzip.compress)(data)
    reply = pair.router.post(PATHS["openai"], packed, {"content-encoding": coding})
    assert_answer("openai", reply, TEXT)
    call = pair.first.calls[0]
    assert (call.json["model"], call.header("content-encoding")) == ("solo", None)


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (b"{}", "br", 415),
        (b"{}", "gzip, br", 415),
        (gzip.compress(b"{}")[:-6], "gzip", 400),
        (b"no gzip at all", "gzip", 400),
        (gzip.compress(b'{"a": "' + b"0" * 50_000_000 + b'"}'), "gzip", 413),
    ],
    ids=["brotli", "two codings", "cut off", "not gzip", "bomb"],
)
def test_a_body_that_cannot_be_inflated_is_refused(pair, body, coding, status):
    """Hardening 31: limits apply after inflation."""
    reply = pair.router.post("/v1/messages", body, {"content-encoding": coding})
    assert reply.status == status
    error_shape("anthropic", reply.json)
    assert no_calls(pair)


@pytest.mark.parametrize("wire", WIRES)
def test_an_unknown_model_is_a_404_that_names_what_is_near(pair, wire):
    """Trap 125; hardening 14: names only, no URL and no key."""
    reply = post(pair.router, wire, "a-opnai/solo")
    assert reply.status == 404
    error = error_shape(wire, reply.json)
    assert "a-openai/solo" in error["message"]
    assert "127.0.0.1" not in reply.text
    assert "provider-key" not in reply.text
    assert error["type"] in ("not_found_error", "invalid_request_error")
    assert no_calls(pair)


def test_a_bare_name_that_several_providers_have_is_a_404_that_lists_them(pair):
    reply = post(pair.router, "openai", "solo")
    assert reply.status == 404
    assert all("a-%s/solo" % wire in reply.text for wire in WIRES)


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1/nothing", "/v1", "/anthropic/v1/nothing", "/v1/v1/messages", "/../etc/passwd", "/metrics/x"],
)
def test_an_unknown_path_is_a_404_in_a_fitting_format(pair, path):
    """Trap 185."""
    if path != "/v1":
        reply = pair.router.post(path, {})
        assert reply.status == 404
        error_shape("anthropic" if path.startswith("/anthropic/") else "openai", reply.json)
    reply = pair.router.get(path, {"anthropic-version": "2023-06-01"})
    assert reply.status in (404, 405)
    error_shape("anthropic", reply.json)
    assert no_calls(pair)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/messages", {"POST"}),
        ("DELETE", "/v1/chat/completions", {"POST"}),
        ("PUT", "/v1/responses", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PATCH", "/", {"GET", "HEAD", "POST"}),
    ],
)
def test_a_wrong_method_is_a_405_with_allow(pair, method, path, allow):
    reply = pair.router.request(method, path, {} if method != "GET" else None)
    assert reply.status == 405
    assert set(reply.headers["allow"].split(", ")) >= allow
    error_shape("anthropic" if path == "/v1/messages" else "openai", reply.json)


def test_head_and_get_of_the_root_and_of_health_answer_shortly(pair):
    """Claude Code starts with HEAD /."""
    for path in ("/", "/health"):
        assert pair.router.get(path).status == 200
        reply = pair.router.request("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) > 0
    assert pair.router.get("/health").json["status"] == "ok"


# --- framing and slow clients ---


def test_requests_on_one_connection_are_answered_one_after_another_also_pipelined(pair):
    """The HTTP bar, 3."""
    for number in (1, 2, 3):
        pair.first.answer(fake.later(fake.json_answer(200, fake.chat_whole("answer %d" % number)), 0.15 / number))
    body = ask("openai", "a-openai/solo")
    answers = pair.router.raw(request_bytes(body) * 2 + request_bytes(body, headers=["connection: close"]))
    assert re.findall(rb"answer \d", answers) == [b"answer 1", b"answer 2", b"answer 3"]
    assert answers.count(b"HTTP/1.1 200 ") == 3


def test_a_request_may_arrive_byte_by_byte(pair):
    with connect(pair.router) as client:
        data = request_bytes(ask("openai", "a-openai/solo"), headers=["connection: close"])
        for at in range(len(data)):
            client.sendall(data[at : at + 1])
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert len(pair.first.calls) == 1


def test_a_client_that_expects_100_continue_gets_it_only_where_its_body_is_wanted(pair, locked):
    """Hardening, proxies 26."""
    body = json.dumps(ask("openai", "a-openai/solo")).encode()
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    with connect(pair.router) as client:
        client.sendall(head % (PATHS["openai"].encode(), len(body)))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    for running, path, size, status in (
        (locked.router, PATHS["openai"], 50, b"401"),
        (pair.router, "/nothing", 50, b"404"),
        (pair.router, PATHS["openai"], 3_000_000, b"413"),
    ):
        with connect(running) as client:
            client.sendall(head % (path.encode(), size))
            assert client.recv(1000).split()[1] == status
    with connect(pair.router) as client:
        client.sendall((head % (PATHS["openai"].encode(), 50)).replace(b"\r\n\r\n", b"\r\ncontent-encoding: br\r\n\r\n"))
        assert client.recv(1000).split()[1] == b"415"


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /v1/messages HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /v1/messages HTTP/1.1\r\nhost: u@x\r\ncontent-length: 2\r\n\r\n{}",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["length and chunks", "two hosts", "no host", "bad host", "garbage", "TLS", "bad chunk"],
)
def test_a_request_that_is_no_http_is_a_400_and_the_end_of_the_connection(pair, raw):
    """The HTTP bar, 1, 2 and 4."""
    answer = pair.router.raw(raw + b"\r\n" * 2)
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer), answer
    assert b"connection: close" in answer.lower()
    assert no_calls(pair)


@pytest.fixture
def impatient(router, upstream):
    """A router with short time limits for clients, and its upstream. The least of them is 15 s by default."""
    upstream.handler = fake.final_text(TEXT)
    flags = ("--head-timeout-ms=300", "--body-timeout-ms=300", "--client-idle-timeout-ms=900")
    return router(config_of(provider(upstream)), *flags)


def test_heads_bodies_and_idle_connections_have_their_time_limits(impatient, upstream):
    """The HTTP bar, 6: trickling does not help, and having sent all that one has to send does no harm."""
    body = b'POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{"a": "'
    for start in (b"POST /v1/messages HTTP/1.1\r\nhost: loc", body):
        began = time.monotonic()
        with connect(impatient) as client:
            client.sendall(start)
            answer = b""
            while not answer and time.monotonic() < began + 12:
                with contextlib.suppress(socket.timeout, ConnectionError):
                    client.sendall(b"x")
                    client.settimeout(0.05)
                    answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 "), (start, answer)
    assert upstream.calls == []
    began = time.monotonic()
    assert impatient.raw(b"") == b""
    assert 0.85 <= time.monotonic() - began < 12
    upstream.answer(fake.later(fake.model_answer("openai", False, TEXT), 1.0))
    assert b"HTTP/1.1 200 " in impatient.raw(request_bytes(ask("openai")), half_close=True)


@pytest.mark.parametrize("headers", [b"", b"content-length: 90000\r\n\r\n"], ids=["head", "body"])
def test_who_is_too_late_can_send_on_and_then_sees_why(impatient, headers):
    """The HTTP bar, 7: closing at once would be a reset, and the answer lost."""
    with connect(impatient) as client:
        client.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n" + headers)
        assert client.recv(1, socket.MSG_PEEK)  # the answer is there
        for _ in range(20):
            client.sendall(b"x" * 1000)
            time.sleep(0.005)
        client.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: client.recv(65536), b"")).startswith(b"HTTP/1.1 408 ")


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(pair):
    answer = pair.router.raw(request_bytes(ask("openai", "a-openai/solo", stream=True), version="1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_broken_stream_of_http_1_0_still_ends_in_an_error_event(pair):
    pair.first.answer(fake.sse_answer(fake.chat_stream("half")[:2], end="cut"))
    answer = pair.router.raw(request_bytes(ask("openai", "a-openai/solo", stream=True), version="1.0"))
    assert b'"error"' in answer.rpartition(b"data: ")[2]
    assert b"[DONE]" not in answer


def test_too_many_connections_and_too_many_bytes_are_refused_at_once(router, upstream):
    """Hardening, proxies 28 and 29."""
    running = router(config_of(provider(upstream)), "--max-connections=3", "--max-inflight-bytes=100000")
    assert post(running, "openai", text="x" * 50_000).status == 200
    reply = post(running, "openai", text="x" * 150_000)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    error_shape("openai", reply.json)
    clients = [connect(running) for _ in range(3)]
    until(lambda: b"503" in running.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", half_close=True))
    for client in clients:
        client.close()
    until(lambda: b"HTTP/1.1 200" in running.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", half_close=True))


def test_bodies_that_are_too_many_together_are_refused_until_one_of_them_is_gone(router, upstream):
    """The budget is everybody's: a body that is still on its way counts as far as it has come."""
    running = router(config_of(provider(upstream)), "--max-inflight-bytes=100000")
    with connect(running) as held:
        held.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 90000\r\n\r\n")
        held.sendall(b" " * 80_000)
        until(lambda: post(running, "openai", text="x" * 50_000).status == 503)
        assert post(running, "openai", text="x" * 5000).status == 200
    until(lambda: post(running, "openai", text="x" * 50_000).status == 200)


def held_of_refused(head, body):
    """How much of a body each connection holds once it was refused by a server that has room for 500,000 bytes."""

    async def handle(call, sink):
        with pytest.raises(llm_router.RouterError, match="too many"):
            await call.read_body()
        await sink.respond(503, [], b"")

    async def run():
        settings = llm_router.Settings()._replace(max_inflight_bytes=500_000)
        server = llm_router.Server(asyncio.get_running_loop(), settings, handle, lambda error: None)
        reader, writer = await asyncio.open_connection("127.0.0.1", await server.listen("127.0.0.1", 0))
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n\r\n" + body)
        assert await asyncio.wait_for(reader.readline(), 30) == b"HTTP/1.1 503 Service Unavailable\r\n"
        held = [connection._parser.body_size for connection in server.connections]
        writer.close()
        assert await server.drain(30.0)
        return held

    return asyncio.run(run())


def test_what_has_come_of_a_refused_body_is_not_held_while_its_client_lingers():
    """It is not counted any more: the budget would be nobody's."""
    assert held_of_refused(b"content-length: 2000000", bytes(600_000)) == [0]


def test_a_compressed_body_is_inflated_only_as_far_as_there_is_room(monkeypatch):
    """The budget is for what bodies take in memory, not for what they looked like on their way."""
    inflated, feed = [], llm_router.Inflater.feed
    monkeypatch.setattr(llm_router.Inflater, "feed", lambda self, data: inflated.append(feed(self, data)) or inflated[-1])
    body = gzip.compress(bytes(50_000_000))
    held_of_refused(b"content-encoding: gzip\r\ncontent-length: %d" % len(body), body)
    assert 0 < sum(map(len, inflated)) < 25_000_000


def test_a_large_body_is_served_whole_and_refused_like_a_small_one(router, upstream):
    """It is read in a thread, item by item."""
    running = router(config_of(provider(upstream)))
    messages = [{"role": "user", "content": "w\u00f6rd " * 1000} for _ in range(800)]
    reply = post(running, "openai", messages=messages)
    assert reply.status == 200
    assert upstream.calls[-1].json["messages"] == messages
    wrong = running.post(PATHS["openai"], b'{"messages": [' + b" " * 5_000_000 + b"}")
    assert (wrong.status, wrong.json["error"]["code"]) == (400, "invalid_json")
    assert running.get("/health").status == 200


# --- who may call ---


@pytest.mark.parametrize("carrier", ["authorization", "x-api-key", "api-key"])
def test_any_carrier_of_the_key_opens_and_a_wrong_key_does_not(router, upstream, carrier):
    """Hardening 19; the clients' list, 3. A router of its own: who guesses more than twenty keys has to wait."""
    running = router(pair_config(upstream, upstream, masterKey=KEY), *QUICK, "--require-auth=true")
    prefix = "Bearer " if carrier == "authorization" else ""
    for wire in WIRES:
        assert post(running, wire, "a-%s/solo" % wire, headers={carrier: prefix + KEY}).status == 200
        upstream.calls.clear()
        for wrong in (KEY + "x", KEY[:-1], "", "' OR 1=1", "%s{}", "\xe9", "x" * 20_000):
            reply = post(running, wire, "a-%s/solo" % wire, headers={carrier: prefix + wrong})
            assert reply.status == 401, (wrong[:20], reply)
            kind = error_shape(wire, reply.json)["type"]
            assert kind == "authentication_error" or wire != "anthropic"
            assert reply.headers["www-authenticate"] == "Bearer"
            assert not wrong or wrong not in reply.text
        assert upstream.calls == []
    running.wait_log(reply.headers["x-llm-router-request-id"])
    assert not [line for line in running.log() if KEY[:-1] in line or "OR 1=1" in line]


def test_a_right_key_beside_a_wrong_one_opens(locked):
    headers = {"authorization": "Bearer wrong", "x-api-key": KEY}
    assert post(locked.router, "anthropic", "a-anthropic/solo", headers=headers).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", path)
        for path in (
            "/",
            "/route",
            "/v1/messages",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/embeddings",
            "/v1/messages/count_tokens",
            "/anthropic",
        )
    ]
    + [
        ("GET", path)
        for path in ("/v1/models", "/v1/models/a-openai/solo", "/metrics", "/_router/status", "/_router/trail/x")
    ]
    + [("POST", "/_router/stop"), ("POST", "/_router/reload")],
)
def test_no_route_but_root_and_health_answers_without_the_key(locked, method, path):
    """Hardening 3, 18."""
    reply = locked.router.request(method, path, {} if method == "POST" else None)
    assert reply.status == (401 if path != "/" or method == "POST" else 200)
    assert no_calls(locked)


def test_health_without_the_key_is_minimal_and_with_it_tells_more(locked):
    assert locked.router.get("/health").json == {"status": "ok"}
    assert set(locked.router.get("/health", {"x-api-key": KEY}).json) > {"status"}
    assert "endpoints" not in locked.router.get("/").json


def test_an_early_401_is_seen_by_a_client_that_still_sends_its_body(locked):
    """The HTTP bar, 7: lingering close."""
    for _ in range(5):
        reply = locked.router.post("/v1/messages", b"x" * 900_000)
        assert reply.status == 401


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("127.0.0.1:8787", True),
        ("localhost", True),
        ("api.localhost:1", True),
        ("[::1]:80", True),
        ("192.168.1.9", True),
        ("host.docker.internal", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil.localhost.example", False),
    ],
)
def test_without_auth_only_names_of_this_machine_are_hosts(pair, host, passes):
    """Hardening 25: DNS rebinding."""
    for path, body in (("/v1/models", None), ("/v1/messages", ask("anthropic", "a-anthropic/solo")), ("/health", None)):
        reply = pair.router.request("POST" if body else "GET", path, body, {"host": host})
        assert (reply.status == 200) == passes
        assert passes or (reply.status == 403 and host.split(":")[0] in reply.text)
    assert passes or no_calls(pair)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1"]
)
def test_a_foreign_origin_is_refused_and_named(pair, origin):
    """Hardening 26, 27."""
    for content_type in ("application/json", "text/plain"):
        reply = post(pair.router, "openai", "a-openai/solo", headers={"origin": origin, "content-type": content_type})
        assert reply.status == 403
        assert origin in reply.text
        assert "corsOrigins" in reply.text
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]
    reply = post(
        pair.router, "openai", "a-openai/solo", headers={"sec-fetch-site": "cross-site", "content-type": "text/plain"}
    )
    assert reply.status == 403
    assert no_calls(pair)


def test_the_own_origin_passes_and_a_key_lets_any_origin_pass(pair, locked):
    own = "http://127.0.0.1:%d" % pair.router.port
    assert post(pair.router, "openai", "a-openai/solo", headers={"origin": own}).status == 200
    foreign = {"origin": "https://evil.example"}
    assert post(locked.router, "openai", "a-openai/solo", headers=foreign).status in (401, 403)
    reply = post(locked.router, "openai", "a-openai/solo", headers=dict(foreign, authorization="Bearer " + KEY))
    assert reply.status == 200
    assert reply.headers.get("access-control-allow-origin") is None


def test_cors_answers_name_the_listed_origin_and_never_a_wildcard(locked):
    """Hardening 26, 28."""
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    flight = locked.router.request("OPTIONS", "/v1/messages", None, asked)
    if flight.status == 401:
        pytest.fail("a preflight never carries a key")
    assert flight.status == 204
    assert flight.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-api-key" in flight.headers["access-control-allow-headers"]
    assert flight.headers.get("access-control-allow-private-network") is None
    for stream in (False, True):
        reply = post(
            locked.router,
            "openai",
            "a-openai/solo",
            stream,
            headers={"origin": "https://app.example", "x-api-key": KEY},
        )
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-llm-router-model" in reply.headers["access-control-expose-headers"]
    other = locked.router.request("OPTIONS", "/v1/messages", None, dict(asked, origin="https://evil.example"))
    assert other.headers.get("access-control-allow-origin") is None


# --- clients that leave ---


def leave(client, how):
    """Go away with a FIN or a RST."""
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


HOW = pytest.mark.parametrize("how", ["close", "reset"])


def assert_cancelled(pair, call, before=0):
    """The upstream's connection was closed, long before any time limit, and the log has the request as 499."""
    assert call.closed.wait(20), "the upstream still works"
    until(lambda: len([line for line in pair.router.log() if " 499 client_gone " in line]) > before)


def gone_before(pair):
    return len([line for line in pair.router.log() if " 499 client_gone " in line])


PHASES = [
    ("waiting for the head", "openai"),
    ("before content", "openai"),
    ("before content", "anthropic"),
    ("within the answer", "openai"),
    ("within the answer", "anthropic"),
]


@HOW
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("phase", "upstream_wire"), PHASES)
def test_when_a_client_leaves_its_upstream_is_closed_at_once(pair, phase, upstream_wire, stream, how):
    """Traps 161, 162."""
    events = fake.STREAMS[upstream_wire]("words " * 50)
    whole = json.dumps(fake.WHOLES[upstream_wire]("words " * 50)).encode()
    start = fake.head(200, {"content-type": "application/json", "content-length": str(len(whole))})
    answers = {
        "waiting for the head": fake.hang_before_head(),
        "before content": fake.sse_answer(events[:1], end="hang") if stream else fake.Answer(start, fake.Hang()),
        "within the answer": fake.sse_answer(events[:9], end="hang")
        if stream
        else fake.Answer(start + whole[:99], fake.Hang()),
    }
    pair.first.answer(answers[phase])
    before = gone_before(pair)
    client = connect(pair.router)
    client.sendall(request_bytes(ask("openai", "a-%s/to-openai" % upstream_wire, stream=stream)))
    call = pair.first.wait_calls(1)[0]
    if stream and phase == "within the answer":
        received = b""
        while b"words" not in received:
            received += client.recv(65536)
    else:
        time.sleep(0.05)  # for what was sent to arrive
    leave(client, how)
    assert_cancelled(pair, call, before)
    assert pair.calls() == (1, 0)


@HOW
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_right_after_its_request_is_noticed_as_well(pair, stream, how):
    """Trap 161: the end of the connection arrives together with the request."""
    pair.first.answer(fake.hang_before_head())
    before = gone_before(pair)
    client = connect(pair.router)
    client.sendall(request_bytes(ask("openai", "a-openai/solo", stream=stream)))
    leave(client, how)
    assert pair.router.get("/health").status == 200  # by now it has seen all that came before; a reset may have taken it away
    with contextlib.suppress(AssertionError):
        until(lambda: gone_before(pair) > before, 1)
    until(lambda: pair.first.is_quiet)
    if pair.first.calls:
        assert_cancelled(pair, pair.first.calls[0], before)


def test_a_client_that_leaves_during_a_backoff_costs_no_further_call(router, make_upstream):
    first, second = make_upstream(), make_upstream()
    running = router(
        pair_config(first, second), *QUICK, "--origin-retry-base-delay-ms=40000", "--origin-retry-max-delay-ms=40000"
    )
    first.handler = lambda call: fake.error_answer("openai", 500)
    client = connect(running)
    client.sendall(request_bytes(ask("openai", "a-openai/to-openai")))
    assert first.wait_calls(1)[0].answered.wait(30)
    leave(client, "reset")
    running.wait_log(" 499 client_gone ", 15)  # what has ended and is logged asks nobody
    assert (len(first.calls), len(second.calls)) == (1, 0)


def test_a_client_that_leaves_harms_nobodys_health(router, make_upstream):
    """Trap 162."""
    first, second = make_upstream(fake.final_text("first")), make_upstream(fake.final_text("second"))
    running = router(pair_config(first, second))
    events = fake.chat_stream("words " * 50)
    first.answer(
        fake.hang_before_head(), fake.sse_answer(events[:1], end="hang"), fake.sse_answer(events[:9], end="hang")
    )
    for number in (1, 2, 3):
        with connect(running) as client:
            client.sendall(request_bytes(ask("openai", "a-openai/to-openai", stream=True)))
            first.wait_calls(number)
            time.sleep(0.05)  # for what was sent to arrive
        assert first.calls[-1].closed.wait(20)
        until(lambda number=number: gone_before(Pair(running, first, second)) == number)
    reply = post(running, "openai", "a-openai/to-openai")
    assert attempts_of(reply) == [("a-openai/to-openai", "ok")]


@pytest.mark.parametrize("delay", [0.0, 0.9], ids=["at once", "after a while"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_only_closed_its_half_still_gets_its_answer(pair, stream, delay):
    """Hardening, proxies 24."""
    answer = fake.model_answer("openai", stream, TEXT)
    pair.first.answer(
        fake.later(answer, delay) if not stream else fake.sse_answer([fake.Wait(delay), *fake.chat_stream(TEXT)])
    )
    received = pair.router.raw(request_bytes(ask("openai", "a-openai/solo", stream=stream)), half_close=True)
    assert received.count(b"HTTP/1.1 200 ") == 1
    assert "答え" in received.decode() or "\\u7b54" in received.decode()
    assert received.endswith(b"0\r\n\r\n" if stream else b"}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_closed_its_half_and_leaves_later_is_noticed_as_well(pair, stream):
    """Trap 161: that it was still there a moment after it closed its half says nothing of later."""
    pair.first.answer(fake.hang_before_head())
    before = gone_before(pair)
    with connect(pair.router) as client:
        client.sendall(request_bytes(ask("openai", "a-openai/solo", stream=stream)))
        client.shutdown(socket.SHUT_WR)
        (call,) = pair.first.wait_calls(1)
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")  # with this it was asked whether it is still there
    assert_cancelled(pair, call, before)


# --- what a stream holds ---


@pytest.mark.parametrize("client_wire", ["openai", "anthropic"])
def test_a_stream_that_has_begun_holds_nothing_of_its_request(router, upstream, client_wire):
    """An agent's requests are long and their answers take minutes: a body is in memory as long as somebody may be asked
    with it, and counts as long. Twelve of 2 MB would be some 120 MB."""
    running = router(config_of(provider(upstream)), "--max-inflight-bytes=5000000")
    gate = threading.Event()
    events = fake.chat_stream("answer")
    upstream.handler = lambda call: fake.sse_answer([*events[:2], fake.Gate(gate), *events[2:]])
    before, streams = 0, []
    for number in range(14):
        streams.append(running.open(PATHS[client_wire], ask(client_wire, text="words " * 350_000, stream=True)))
        assert streams[-1].status == 200
        del upstream.calls[:]
        before = before or (memory_kb(running.process.pid) if number == 1 else 0)
    assert memory_kb(running.process.pid) - before < 40_000
    gate.set()
    for stream in streams:
        assert stream.read_rest().ended == "clean"
        stream.close()


# --- clients that do not read ---


def memory_kb(pid):
    try:
        with open("/proc/%d/status" % pid, encoding="ascii", errors="replace") as status:
            return int(re.search(r"^VmRSS:\s+(\d+)", status.read(), re.MULTILINE).group(1))
    except FileNotFoundError:
        pytest.skip("this needs /proc")
        return 0


@pytest.mark.parametrize("client_wire", ["openai", "anthropic"])
def test_a_client_that_stops_reading_holds_its_own_upstream_only_and_memory_stays_small(router, upstream, client_wire):
    """Hardening, proxies 22: 50 MB wait at the upstream, not in the router; then the client gets every byte."""
    running = router(config_of(provider(upstream)))
    post(running, "openai")
    piece = fake.sse({"choices": [{"index": 0, "delta": {"content": "x" * 50_000}, "finish_reason": None}]})
    events = fake.chat_stream("y")
    big = fake.sse_answer([events[0], *[piece] * 1000, *events[1:]])
    upstream.answer(big)
    before = memory_kb(running.process.pid)
    stream = running.open(PATHS[client_wire], ask(client_wire, stream=True))
    call = upstream.wait_calls(2)[1]
    sent = until(lambda: stalled(call), step=0.1)
    assert sent < 25_000_000
    for _ in range(10):
        assert post(running, "openai").status == 200
    assert memory_kb(running.process.pid) - before < 30_000
    received = 0
    while data := stream._response.read1(1 << 20):
        received += len(data)
    assert received > 50_000_000
    assert memory_kb(running.process.pid) - before < 40_000
    stream.close()


def stalled(call):
    """Bytes sent so far, once they do not grow any more."""
    sent = call.sent_bytes
    time.sleep(0.15)
    return sent if sent and sent == call.sent_bytes else 0


def test_a_client_that_never_reads_again_is_cut_after_the_send_timeout(router, upstream):
    running = router(config_of(provider(upstream)), "--send-timeout-ms=500")
    piece = fake.sse({"choices": [{"index": 0, "delta": {"content": "x" * 50_000}, "finish_reason": None}]})
    upstream.answer(fake.sse_answer([fake.chat_stream("y")[0], *[piece] * 1000]))
    with connect(running) as client:
        client.sendall(request_bytes(ask("openai", stream=True)))
        call = upstream.wait_calls(1)[0]
        assert call.closed.wait(30)  # 60 s by default
        running.wait_log(" 499 client_gone ")


def test_a_client_that_closed_its_half_and_never_takes_its_answer_did_not_get_it(router, upstream):
    """What the log calls a 200 has arrived."""
    running = router(config_of(provider(upstream)), "--send-timeout-ms=500")
    upstream.answer(fake.json_answer(200, fake.chat_whole("x" * 30_000_000)))
    with connect(running) as client:
        client.sendall(request_bytes(ask("openai")))
        client.shutdown(socket.SHUT_WR)
        running.wait_log(" 499 client_gone ")


HASTY = llm_router.Settings()._replace(client_idle_timeout_ms=100, send_timeout_ms=100)


async def unread_answer(settings, closes, work):
    """Await `work(server, client)` when an answer of 60,000 bytes stands partly in the kernel, partly in the transport,
    which is not enough to wait for the client."""
    loop, answered = asyncio.get_running_loop(), asyncio.Event()

    async def handle(call, sink):
        sink._connection._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await sink.respond(200, [], b"x" * 60_000)
        assert sink._connection._transport.get_write_buffer_size()
        answered.set()

    server = llm_router.Server(loop, settings, handle, lambda error: None)
    port = await server.listen("127.0.0.1", 0)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: %b\r\n\r\n" % (b"close" if closes else b"keep-alive"))
        await asyncio.wait_for(answered.wait(), 30)
        await work(server, client)


def bytes_left(client):
    """How many bytes come until the other side closes."""
    return len(b"".join(iter(lambda: client.recv(65536), b"")))


BOTH_ENDS = pytest.mark.parametrize("closes", [True, False], ids=["close", "keep-alive"])


@BOTH_ENDS
def test_a_client_that_takes_the_rest_of_its_answer_slowly_gets_it_also_when_the_router_stops(closes):
    async def read_late(server, client):
        drained = asyncio.ensure_future(server.drain(30.0))
        done, _ = await asyncio.wait([drained], timeout=0.5)
        assert not done
        assert await asyncio.get_running_loop().run_in_executor(None, bytes_left, client) > 60_000
        assert await drained

    asyncio.run(unread_answer(llm_router.Settings(), closes, read_late))


@BOTH_ENDS
def test_a_client_that_never_takes_the_rest_of_its_answer_is_cut_after_the_send_timeout(closes):
    """Else whoever reads nothing holds a connection for as long as it likes."""

    async def never_read(server, client):
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, until, lambda: not server.connections)
        assert await loop.run_in_executor(None, bytes_left, client) < 60_000
        assert await server.drain(1.0)

    asyncio.run(unread_answer(HASTY, closes, never_read))


def test_a_client_that_takes_some_of_its_answer_is_waited_for_longer_and_one_that_takes_none_is_not():
    async def read_some(server, client):
        run = asyncio.get_running_loop().run_in_executor
        (connection,) = server.connections
        transport = connection._transport
        await run(None, until, lambda: connection.phase == "sending")
        before = transport.get_write_buffer_size()
        await run(None, client.recv, 30_000)
        await run(None, until, lambda: transport.get_write_buffer_size() < before)
        connection.expire()
        assert connection.deadline < math.inf and connection in server.connections
        connection._unsent = transport.get_write_buffer_size()
        connection.expire()
        assert await run(None, bytes_left, client) < 60_000
        assert await server.drain(1.0)

    asyncio.run(unread_answer(llm_router.Settings(), True, read_some))


def test_who_has_connected_before_the_router_stops_is_answered():
    """Also when nobody else is there, and it has not been accepted yet."""

    async def run():
        async def handle(call, sink):
            await sink.respond(200, [], b"ok")

        server = llm_router.Server(asyncio.get_running_loop(), llm_router.Settings(), handle, lambda error: None)
        with socket.create_connection(("127.0.0.1", await server.listen("127.0.0.1", 0)), 30) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            assert await server.drain(30.0)
            return client.recv(1000)

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 ")


# --- the process ---


def test_a_stop_lets_a_running_stream_finish_and_refuses_new_connections(router, upstream):
    """Hardening, proxies 4, 5."""
    running = router(config_of(provider(upstream)))
    gate = threading.Event()
    events = fake.chat_stream(TEXT)
    upstream.answer(fake.sse_answer([*events[:3], fake.Gate(gate), *events[3:]]))
    stream = running.open(PATHS["openai"], ask("openai", stream=True))
    assert stream.read_event(2)
    idle = connect(running)
    running.process.send_signal(signal.SIGTERM)
    running.wait_log("stopping")
    with pytest.raises(ConnectionError):
        connect(running).recv(1)
    assert idle.recv(100) == b""
    idle.close()
    assert running.process.poll() is None
    gate.set()
    assert_answer("openai", stream.read_rest(), TEXT)
    assert running.process.wait(30) == 0
    running.wait_log(stream.headers["x-llm-router-request-id"])


@pytest.mark.parametrize("wire", WIRES)
def test_a_stream_that_outlives_the_grace_ends_in_an_error_event_and_the_exit_code_tells(router, upstream, wire):
    """Hardening, proxies 4."""
    running = router(config_of(provider(upstream)), "--drain-grace-ms=200")
    upstream.answer(fake.sse_answer(fake.chat_stream(TEXT)[:4], end="hang"))
    stream = running.open(PATHS[wire], ask(wire, stream=True))
    assert stream.read_until("An ")
    running.process.send_signal(signal.SIGTERM)
    reply = stream.read_rest()
    told = assert_stream_error(wire, reply)
    assert "stopping" in told.error["message"]
    if wire == "responses":
        numbers = [json.loads(data)["sequence_number"] for _, data in reply.events]
        assert numbers == list(range(len(numbers)))
    assert running.process.wait(20) == 1  # 30 s are the grace by default
    assert upstream.calls[0].closed.wait(20)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(router, upstream, first):
    """Hardening, proxies 7."""
    running = router(config_of(provider(upstream)))
    upstream.answer(fake.hang_before_head())
    with connect(running) as client:
        client.sendall(request_bytes(ask("openai")))
        upstream.wait_calls(1)
        running.process.send_signal(first)
        running.wait_log("stopping")
        running.process.send_signal(first)
        assert running.process.wait(15) in (-first, 130, 1)  # it would have waited for 30 s


def test_an_idle_router_stops_at_once(router, upstream):
    running = router(config_of(provider(upstream)))
    post(running, "openai")
    assert running.stop(15) == 0  # killed, it would have another code; open streams may go on for 30 s


def test_a_port_in_use_is_said_in_one_line(router, upstream, tmp_path):
    """Trap 176."""
    running = router(config_of(provider(upstream)))
    command = [sys.executable, str(PROGRAM), "start", "--port=%d" % running.port, "--config=%s" % running.config_path]
    second = subprocess.run(command, env=clean_environment(tmp_path), capture_output=True, timeout=60, text=True)
    assert second.returncode == 1
    assert len(second.stderr.strip().splitlines()) == 1
    assert str(running.port) in second.stderr
    assert second.stdout == ""
    assert post(running, "openai").status == 200


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, upstream):
    """Hardening, proxies 31."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this needs /dev/full")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_of(provider(upstream))))
    config.chmod(0o600)
    command = [sys.executable, str(PROGRAM), "start", "--port=0", "--config=%s" % config]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, env=clean_environment(tmp_path))
    try:
        port = int(process.stdout.readline().rsplit(b":", 1)[1])
        for _ in range(5):
            assert post(Caller(port), "openai").status == 200
            time.sleep(0.06)  # the log is written now and then
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stdout.close()


def in_process(handle, work, settings=None):
    """Run a Server with `handle` in this process, and `work(port)` in a thread beside it; what work returned, and the
    errors that reached the server."""

    async def run():
        errors = []
        loop = asyncio.get_running_loop()
        server = llm_router.Server(loop, settings or llm_router.Settings(), handle, errors.append)
        port = await server.listen("127.0.0.1", 0)
        try:
            return await loop.run_in_executor(None, work, port), errors
        finally:
            await server.drain(1.0)

    return asyncio.run(run())


def test_small_writes_leave_at_once():
    """TCP_NODELAY on every accepted socket: without it a second token may wait for the acknowledgement of the first."""
    seen = []

    async def handle(call, sink):
        sock = sink._connection._transport.get_extra_info("socket")
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await sink.respond(200, [], b"ok")

    def work(port):
        return Caller(port).get("/").body

    body, errors = in_process(handle, work)
    assert (body, errors, [bool(value) for value in seen]) == (b"ok", [], [True])


def test_a_broken_handler_harms_only_its_own_request():
    """Hardening, proxies 33."""

    async def handle(call, sink):
        if call.path == "/bad":
            raise ValueError("broken")
        await sink.respond(200, [], b"ok")

    def work(port):
        with pytest.raises((OSError, http.client.HTTPException)):
            Caller(port).get("/bad")
        return Caller(port).get("/good").body

    body, errors = in_process(handle, work)
    assert body == b"ok"
    assert [str(error) for error in errors] == ["broken"]


def test_what_a_client_sends_while_it_is_being_answered_is_held_in_the_kernel():
    """No budget counts it, and thousands of clients may do so."""
    sent, held = threading.Event(), []

    async def handle(call, sink):
        reader, end = sink._connection._reader, time.monotonic() + 30
        while not (sent.is_set() and reader._paused) and time.monotonic() < end:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.01)
        held.append(len(reader._buffer))
        sink.cut()

    def work(port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({}))
            client.settimeout(1)
            with contextlib.suppress(OSError):
                client.sendall(bytes(2_000_000))
            sent.set()
            with contextlib.suppress(OSError):
                client.recv(1)

    in_process(handle, work)
    assert 100_000 < held[0] < 200_000


def test_where_no_limit_of_descriptors_is_known_a_loop_of_windows_is_not_asked_for_too_much(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert llm_router._descriptors_for_clients() == 200  # select takes 512 sockets there


def test_a_client_that_leaves_while_it_gets_the_rest_of_an_answer_is_no_error_of_the_router():
    """Of an answer that was cut: a reset then ends a wait that nobody else cancels."""
    cut = threading.Event()

    async def handle(call, sink):
        sink.begin([], b":")
        while not sink._connection._transport.get_write_buffer_size():  # the kernel takes all that it has room for
            sink.write(b"x" * 5000)
        sink.cut()
        cut.set()

    def work(port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({}))
            assert cut.wait(30)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        return cut.is_set()

    assert in_process(handle, work) == (True, [])


class ScriptedHost:
    """A gateway's host that keeps what it is told; `send` does what the test says."""

    now = wall = staticmethod(time.monotonic)
    jitter = staticmethod(lambda: 0.5)
    new_id = staticmethod(lambda: "req_test")

    def __init__(self, send):
        self.failures, self.recorded, self.answer = [], [], send
        self.failed, self.record = self.failures.append, self.recorded.append

    async def sleep(self, seconds):
        raise AssertionError("it must not wait")

    async def send(self, outbound):
        return self.answer()

    def gateway(self, upstream):
        config = llm_router.read_config(pair_config(upstream, upstream), {})
        settings = llm_router.Settings()
        return llm_router.Gateway(
            llm_router.Routes(config), settings, llm_router.Access(), self, llm_router.HealthBook()
        )


def test_a_stream_whose_client_left_just_before_it_began_closes_its_upstream(upstream):
    """Trap 161, and no connection is left behind."""

    class Reply:
        status = 200
        headers = [("content-type", "text/event-stream")]
        closed = 0

        async def read(self, timeout_s):
            return b"".join(fake.chat_stream(TEXT)[:4])

        def close(self):
            self.closed += 1

    class Client:
        is_open = host_stops = False

        def keep_alive(self, at, every_ms, head):
            pass

        def begin(self, headers, ping):
            raise llm_router.RouterError("the client has left", 499, "client_gone")

        async def respond(self, status, headers, body):
            raise llm_router.RouterError("the client has left", 499, "client_gone")

    async def read_body():
        return json.dumps(ask("openai", "a-openai/to-openai", stream=True)).encode()

    reply = Reply()
    host = ScriptedHost(lambda: reply)
    call = llm_router.Call("POST", PATHS["openai"], "", [("host", "localhost")], read_body)
    with pytest.raises(llm_router.RouterError):
        asyncio.run(host.gateway(upstream).handle(call, Client()))
    assert reply.closed == 1
    assert [(trail.status, trail.outcome) for trail in host.recorded] == [(499, "client_gone")]


def test_an_error_whose_body_trickles_in_for_ever_is_judged_by_what_has_come_in_a_moment(upstream):
    """Trap 159: no client waits for the rest of an error."""

    class Reply:
        status, headers, pieces = 429, [], 0

        async def read(self, timeout_s):
            self.pieces += 1
            host.seconds += min(timeout_s, 1)
            if timeout_s < 1:
                raise llm_router.UpstreamError("no sign of more", "timeout", True)
            return b"x" * 1000

        def close(self):
            pass

    async def read_body():
        return json.dumps(ask("openai", "b-openai/m")).encode()

    class Client:
        is_open = False

        async def respond(self, status, headers, body):
            self.status = status

    reply, client = Reply(), Client()
    host = ScriptedHost(lambda: reply)
    host.seconds, host.now = 1000.0, lambda: host.seconds
    call = llm_router.Call("POST", PATHS["openai"], "", [("host", "localhost")], read_body)
    asyncio.run(host.gateway(upstream).handle(call, client))
    assert client.status == 429
    assert reply.pieces < 10


@pytest.mark.parametrize("wire", WIRES)
def test_an_error_of_the_routers_own_is_a_500_in_the_clients_format(wire, upstream):
    """Trap 129: told as what it is, and never a fallback."""
    host = ScriptedHost(lambda: 1 / 0)

    def work(port):
        return post(Caller(port), wire, "a-openai/to-openai")

    reply, errors = in_process(host.gateway(upstream).handle, work)
    assert reply.status == 500
    error_shape(wire, reply.json)
    assert "division" not in reply.text
    assert [type(error) for error in host.failures] == [ZeroDivisionError]
    assert [(trail.status, trail.outcome) for trail in host.recorded] == [(500, "internal_error")]
    assert errors == []


def test_a_name_of_megabytes_is_not_kept_with_the_request_that_asked_for_it(upstream):
    """Five hundred requests are remembered, ten thousand lines of the log may wait."""
    host = ScriptedHost(None)

    def work(port):
        return post(Caller(port), "openai", "x" * 1_000_000)

    reply, errors = in_process(host.gateway(upstream).handle, work)
    assert (reply.status, errors) == (404, [])
    assert [(trail.asked[:3], len(trail.asked) < 1000) for trail in host.recorded] == [("xxx", True)]


def test_the_shared_routers_had_no_errors_of_their_own(shared, shared_locked):
    """Hardening, proxies 32; hardening 15: after all that was thrown at them, no traceback, no key that was tried."""
    for pair in (shared, shared_locked):
        last = post(pair.router, "openai", "a-openai/solo", headers={"x-api-key": KEY})
        pair.router.wait_log(last.headers["x-llm-router-request-id"])
        log = pair.router.log()
        assert not [line for line in log if "internal error" in line or "Traceback" in line or "xception" in line]
        assert not [line for line in log if KEY in line]


def test_a_stream_that_was_read_to_its_end_leaves_the_connection_usable(pair):
    """One connection serves streams and whole answers in turn."""
    with connect(pair.router) as client:
        for stream in (True, False, True):
            client.sendall(request_bytes(ask("openai", "a-openai/solo", stream=stream)))
            answer = b""
            while not answer.endswith(b"0\r\n\r\n" if stream else b"}}"):
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: keep-alive" in answer.lower()
    assert read_answer("openai", post(pair.router, "openai", "a-openai/solo")).text == TEXT


def test_a_stream_that_has_ended_leaves_no_timer_that_would_hold_its_memory():
    class Reply:
        def pipe(self, on_data, on_end, idle_s):
            on_data(b"".join(fake.chat_stream(TEXT)))
            asyncio.get_running_loop().call_soon(on_end, "end")

    async def relayed():
        loop = asyncio.get_running_loop()
        connection = SimpleNamespace(loop=loop, is_blocked=lambda: False)
        sink = SimpleNamespace(write=lambda data: None, hush=lambda: None)
        context = llm_router.Context(llm_router.ChatRequest("", []), "req_1", 1)
        processor = llm_router.make_processor("openai", "openai", context)
        with_timers = llm_router._Relay(sink, connection, Reply(), processor)
        assert await with_timers.run(60.0, 60.0) == "end"
        return [timer for timer in loop._scheduled if not timer.cancelled()]

    assert asyncio.run(relayed()) == []


def test_a_stream_whose_client_left_leaves_no_timer_that_would_hold_its_memory():
    async def handle(call, sink):
        sink.keep_alive(asyncio.get_running_loop().time(), 3_600_000, [])
        sink.begin([], b": here\n\n")
        await asyncio.sleep(3600)

    async def run():
        loop = asyncio.get_running_loop()
        server = llm_router.Server(loop, llm_router.Settings(), handle, lambda error: None)
        reader, writer = await asyncio.open_connection("127.0.0.1", await server.listen("127.0.0.1", 0))
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.wait_for(reader.readline(), 30)
        writer.transport.abort()
        await loop.run_in_executor(None, until, lambda: not server.connections)
        left = [timer for timer in loop._scheduled if not timer.cancelled() and timer is not server._ticker]
        assert await server.drain(1.0)
        return left

    assert asyncio.run(run()) == []


def test_what_was_written_to_a_client_that_left_is_not_held_by_the_error_of_it():
    """asyncio keeps that error, and it the frames it was raised in, until the collector comes by."""
    held = []

    class Answer:
        data = b"x" * 1000

    async def run():
        loop = asyncio.get_running_loop()
        with socket.socket() as client:

            async def handle(call, sink):
                answer = Answer()
                held.append(weakref.ref(answer))
                sink.begin([], b": here\n\n")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                sink.write(answer.data)
                await asyncio.sleep(3600)

            server = llm_router.Server(loop, llm_router.Settings(), handle, lambda error: None)
            client.connect(("127.0.0.1", await server.listen("127.0.0.1", 0)))
            client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await loop.run_in_executor(None, until, lambda: held and held[0]() is None)
            assert await server.drain(1.0)

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_an_error_of_the_routers_own_in_a_stream_is_told_in_it_and_leaves_no_hole(tmp_path, upstream):
    """An exception in a callback of the loop's is logged and forgotten: the rest of the answer would follow."""
    saboteur = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport llm_router as r\nfeed = r.StreamRelay.feed\n"
        "r.StreamRelay.feed = lambda self, data: feed(self, data) if b'four' not in data else {}['four']\n"
        "sys.exit(r.main(sys.argv[2:]))"
    )
    words = fake.sse_answer(fake.chat_stream("one two three four five six seven"))
    upstream.handler = lambda call: fake.drip(words, 200, 0.01)
    program = ("-c", saboteur, str(PROGRAM.parent))
    running = RunningRouter(config_of(provider(upstream)), (), tmp_path, program=program)
    reply = post(running, "openai", stream=True)
    assert "one tw" in reply.text and "seven" not in reply.text and "[DONE]" not in reply.text
    assert "the router failed within: KeyError" in reply.text
    running.wait_log("internal error: KeyError")
    running.stop()


def test_a_socket_that_takes_no_option_is_served_or_closed_like_any_other(monkeypatch):
    """macOS refuses options of a socket whose client has left already."""
    errors, kept = [], socket.socket.setsockopt

    def refuse(self, level, name, *rest):
        if (level, name) == (socket.IPPROTO_TCP, socket.TCP_NODELAY):
            raise OSError(22, "Invalid argument")
        return kept(self, level, name, *rest)

    async def answer(call, sink):
        await sink.respond(200, [], b"fine")

    async def ask_once():
        loop, data = asyncio.get_running_loop(), [b""]
        server = llm_router.Server(loop, llm_router.Settings(), answer, errors.append)
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", await server.listen("127.0.0.1", 0)))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            while len(data) == 1 or data[-1]:
                data.append(await asyncio.wait_for(loop.sock_recv(client, 4096), 30))
        await server.drain(5.0)
        return b"".join(data)

    monkeypatch.setattr(socket.socket, "setsockopt", refuse)
    assert asyncio.run(ask_once()).endswith(b"\r\n\r\nfine")
    assert errors == []


def test_deep_json_is_read_where_threads_have_little_room(tmp_path):
    """A large body is read in a thread, of musl's with 1 MiB of stack: one nested 9,000 deep killed Python 3.13."""
    program = ("-c", "import threading; threading.stack_size(1 << 20); " + CONSOLE_SCRIPT, str(PROGRAM.parent))
    running = RunningRouter(config_of(provider("http://127.0.0.1:1/v1")), (), tmp_path, program=program)
    try:
        deep = '{"model":"x/y","pad":"%s","metadata":%s1%s}' % ("x" * (1 << 20), '{"a":' * 9000, "}" * 9000)
        for path in ("/v1/chat/completions", "/v1/messages/count_tokens"):
            assert running.post(path, deep.encode()).status in (400, 404)
        assert running.get("/health").status == 200
    finally:
        running.kill()


def test_large_bodies_are_worked_on_one_at_a_time(tmp_path):
    """Six threads that compute make the loop wait for each of them: small requests took seven times as long."""
    config = json.dumps(config_of(provider("http://127.0.0.1:1/v1")))
    flags = {"usage-db": "false", "config": str(tmp_path / "config.json")}
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "config.json").chmod(0o600)
    options = llm_router.read_start_options(llm_router.Given({}, flags))
    busy, most = [], []

    def work():
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.05)
        busy.pop()

    async def run():
        router = llm_router.Router(asyncio.get_running_loop(), options, SimpleNamespace(note=print))
        await asyncio.gather(*(router.aside(work) for _ in range(8)))
        router.upstreams.close()

    asyncio.run(run())
    assert most == [1] * 8
