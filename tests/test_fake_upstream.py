"""The fake upstream is itself tried, with http.client and bare sockets: a test double that lies is worse than none."""

import gzip
import json
import socket
import ssl
import threading
import time

import pytest

import fake_upstream as fake
from exchanges import until
from running_router import Caller


def caller(upstream):
    return Caller(upstream.port)


def test_queued_answers_go_first_and_in_order_and_then_the_handler(upstream):
    upstream.answer(
        fake.json_answer(429, {"n": 1}, {"Retry-After": "7"}), lambda call: fake.json_answer(201, call.json)
    )
    first = caller(upstream).post("/v1/chat/completions", {"model": "a"})
    assert (first.status, first.json, first.headers["retry-after"], first.ended) == (429, {"n": 1}, "7", "clean")
    assert caller(upstream).post("/x", {"model": "b"}).json == {"model": "b"}
    assert caller(upstream).post("/v1/messages", {"model": "c"}).json["content"][0]["text"].startswith("hello")
    assert [call.json["model"] for call in upstream.calls] == ["a", "b", "c"]
    assert upstream.calls[0].header("CONTENT-TYPE") == "application/json"


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "responses"])
def test_a_stream_arrives_whole_in_every_framing(upstream, wire, framing):
    events = fake.STREAMS[wire]("hello", tool_calls=[("f", {"a": 1})], reasoning="hm")
    upstream.answer(fake.sse_answer(events, framing=framing))
    reply = caller(upstream).post("/v1", {}, stream=True)
    assert (reply.body, reply.ended) == (b"".join(events), "clean")
    assert len(reply.events) == len(events)


def test_a_gzip_stream_and_a_gzip_body_inflate_to_the_same_bytes(upstream):
    events = fake.chat_stream("hello")
    upstream.answer(fake.sse_answer(events, gzip=True), fake.gzip_answer(200, {"a": 1}, declared=False))
    reply = caller(upstream).post("/v1", {})
    assert gzip.decompress(reply.body) == b"".join(events)
    second = caller(upstream).post("/v1", {})
    assert json.loads(gzip.decompress(second.body)) == {"a": 1}
    assert second.headers["content-encoding"] is None


@pytest.mark.parametrize("framing", ["chunked", "length"])
@pytest.mark.parametrize("end", ["cut", "reset"])
def test_a_cut_stream_is_seen_as_cut(upstream, framing, end):
    upstream.answer(fake.sse_answer(fake.chat_stream("hello"), cut_after=100, end=end, framing=framing))
    if framing == "length":
        upstream._queue.clear()
        upstream.answer(fake.wrong_length_answer(200, b"abc", 10, "text/event-stream"))
    reply = caller(upstream).post("/v1", {})
    assert reply.ended == "cut"


def test_a_clean_end_after_a_part_is_seen_as_clean(upstream):
    upstream.answer(fake.sse_answer(fake.chat_stream("hello"), cut_after=100))
    reply = caller(upstream).post("/v1", {})
    assert (reply.ended, len(reply.body)) == ("clean", 100)


@pytest.mark.parametrize(
    "answer",
    [fake.reset_before_head(), fake.close_before_head(), fake.raw(b"garbage\r\n\r\n")],
    ids=["reset", "close", "garbage"],
)
def test_an_answer_without_a_head_is_an_error_of_the_client(upstream, answer):
    import http.client

    upstream.answer(answer)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        caller(upstream).post("/v1", {})


@pytest.mark.parametrize(
    "answer",
    [fake.hang_before_head(), fake.hang_after_head(), fake.sse_answer(fake.chat_stream("x"), cut_after=50, end="hang")],
    ids=["before head", "after head", "mid body"],
)
def test_a_hanging_answer_notices_the_client_leaving(upstream, answer):
    upstream.answer(answer)
    with socket.create_connection(("127.0.0.1", upstream.port)) as client:
        client.sendall(b"POST /v1 HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")
        call = upstream.wait_calls(1)[0]
        assert not call.closed.wait(0.1)
    assert call.closed.wait(30)
    assert call.closed_at >= call.time
    assert not call.answered.is_set()


def test_a_gate_holds_the_answer_until_the_test_opens_it(upstream):
    gate = threading.Event()
    upstream.answer(fake.gated(fake.json_answer(200, {"ok": True}), gate))
    replies = []
    client = threading.Thread(target=lambda: replies.append(caller(upstream).post("/v1", {})))
    client.start()
    upstream.wait_calls(1)
    assert not replies
    gate.set()
    client.join(30)
    assert replies[0].json == {"ok": True}


def test_keep_alive_serves_several_calls_on_one_connection_and_reads_chunked_bodies(upstream):
    with socket.create_connection(("127.0.0.1", upstream.port)) as client:
        for body in (
            b"content-length: 4\r\n\r\nabcd",
            b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n2;x\r\ncd\r\n0\r\n\r\n",
        ):
            upstream.answer(fake.json_answer(200, {}))
            client.sendall(b"POST /v1 HTTP/1.1\r\n" + body)
            assert client.recv(65536).endswith(b"{}")
    assert [(call.body, call.connection) for call in upstream.calls] == [(b"abcd", 1), (b"abcd", 1)]


def test_odd_framings_come_out_as_ordered(upstream):
    upstream.answer(
        fake.informational_first(fake.json_answer(200, {"a": 1}), 100, ()),
        fake.redirect_answer("http://127.0.0.1:1/"),
        fake.close_delimited_answer(200, b'{"b": 2}'),
        fake.chunked_answer(200, [b'{"c"', b": 3}"]),
        fake.drip(fake.json_answer(200, {"d": 4}), size=3, delay=0.001),
    )
    replies = [caller(upstream).post("/v1", {}) for _ in range(5)]
    assert [reply.status for reply in replies] == [200, 302, 200, 200, 200]
    assert [replies[n].json for n in (0, 2, 3, 4)] == [{"a": 1}, {"b": 2}, {"c": 3}, {"d": 4}]
    upstream.answer(fake.bad_chunk_answer(b"data: 1\n\n"))
    assert caller(upstream).post("/v1", {}).ended == "cut"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "responses"])
def test_a_tool_round_trip_calls_first_and_quotes_the_result_afterwards(upstream, wire, stream):
    upstream.handler = fake.tool_round_trip("f", {"a": 1}, "it said {result}")
    path = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "responses": "/v1/responses"}[wire]
    tool = {"type": "function", "function": {"name": "f"}} if wire == "openai" else {"name": "f"}
    results = {
        "openai": {"messages": [{"role": "tool", "content": "42"}]},
        "anthropic": {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "42"}]}]},
        "responses": {"input": [{"type": "function_call_output", "output": "42"}]},
    }
    first = caller(upstream).post(path, {"tools": [tool], "stream": stream})
    second = caller(upstream).post(path, dict(results[wire], tools=[tool], stream=stream))
    assert b'"f"' in first.body
    text = second.text if not stream else "".join(str(data) for data in second.datas)
    assert "42" in text


def test_hundreds_of_connections_at_once():
    gate = threading.Event()
    with fake.FakeUpstream(lambda call: fake.gated(fake.json_answer(200, {"ok": 1}), gate)) as upstream:
        clients = [socket.create_connection(("127.0.0.1", upstream.port)) for _ in range(400)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        upstream.wait_calls(400)
        assert upstream.open_connections == 400
        gate.set()
        for client in clients:
            client.settimeout(30)
            assert client.recv(65536).endswith(b'{"ok": 1}')
            client.close()


@pytest.mark.skipif(not fake.can_tls(), reason="no openssl program to make a certificate with")
def test_tls_with_a_certificate_of_its_own(make_upstream):
    upstream = make_upstream(tls=True)
    context = ssl.create_default_context(cafile=upstream.cafile)
    with socket.create_connection(("127.0.0.1", upstream.port)) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"POST /v1/messages HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
    assert upstream.url.startswith("https://")


def test_a_dead_port_refuses_and_a_blackhole_never_answers():
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", fake.dead_port()), 5)
    with fake.blackhole() as port:
        start = time.monotonic()
        with pytest.raises(socket.timeout):
            socket.create_connection(("127.0.0.1", port), 0.3)
        assert time.monotonic() >= start


def test_what_the_upstream_could_not_send_is_counted(upstream):
    upstream.answer(fake.body_answer(200, b"x" * (64 << 20), "application/octet-stream"))
    with socket.create_connection(("127.0.0.1", upstream.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        call = upstream.wait_calls(1)[0]
        client.recv(1000)
        assert until(lambda: call.sent_bytes) < 64 << 20
    assert call.closed.wait(30)
