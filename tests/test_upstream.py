"""Connections to providers: their pool, odd but valid answers, proxies, dialling, and what is left when clients leave."""

import asyncio
import contextlib
import gc
import gzip
import json
import os
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import PATHS, QUICK, WIRES, ask, assert_answer, attempts_of, post, until
from running_router import config_of, provider, sockets_of

TEXT = "An answer, 答え."
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this needs /proc")


@pytest.fixture
def single(router, upstream):
    """`single(*flags)`: a router before one upstream of OpenAI format, which answers TEXT."""

    def start(*flags, env=None, **fields):
        upstream.handler = fake.final_text(TEXT)
        return router(config_of(provider(upstream, **fields)), *(QUICK + flags), env=env)

    return start


def together(count, work):
    """Run `work(number)` in `count` threads; the results in order."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# --- the pool ---


@STREAMED
def test_requests_one_after_another_share_a_connection(single, upstream, stream):
    """Hardening, proxies 14: back in the pool after the exact end, whatever the framing."""
    running = single()
    for _ in range(6):
        assert_answer("openai", post(running, "openai", "fake/fake-model", stream), TEXT)
    assert upstream.connections == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels drop what came before a reset")
def test_an_answer_that_came_before_the_connection_broke_while_sending_is_read():
    """A 429 that does not wait for the end of a long request is a 429 with its Retry-After, and no reset."""
    refusal = b"HTTP/1.1 429 No\r\nretry-after: 7\r\ncontent-length: 2\r\n\r\n{}"

    async def ask_who_leaves():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            peer, _ = listener.accept()
        peer.sendall(refusal)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        until(lambda: client.recv(1000, socket.MSG_PEEK) == refusal)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        dial = SimpleNamespace(key=None, prefix="", proxy_headers=[], sock=client)
        connection = r.Connection(loop, dial, lambda connection: None)
        reply = r.Reply(loop, connection, 1000)
        connection.start(b"x" * 10_000_000, reply)
        await reply.wait_for_head(30)
        return reply.status, reply.headers[0], await reply.read(30)

    assert asyncio.run(ask_who_leaves()) == (429, ("retry-after", "7"), b"{}")


def test_a_byte_order_mark_before_a_stream_is_no_part_of_it(single, upstream):
    """WHATWG HTML, server-sent events; the SDKs would miss the first event for it."""
    running = single()
    first, *rest = fake.chat_stream(TEXT)
    upstream.answer(fake.drip(fake.sse_answer([b"\xef\xbb\xbf" + first, *rest]), 1))
    reply = post(running, "openai", "fake/fake-model", True)
    assert_answer("openai", reply, TEXT)
    assert reply.body.startswith(b"data: ")


def test_requests_at_once_get_their_own_connections_and_these_are_used_again(single, upstream):
    running = single()
    upstream.handler = lambda call: fake.later(fake.final_text(TEXT)(call), 0.15)
    for _ in range(2):
        together(12, lambda number: assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT))
    assert upstream.connections <= 13


def test_an_answer_that_was_an_error_leaves_its_connection_usable(single, upstream):
    running = single()
    upstream.answer(
        fake.error_answer("openai", 400), fake.error_answer("openai", 429), fake.chunked_answer(500, [b"{}"])
    )
    for _ in range(4):
        post(running, "openai", "fake/fake-model")
    assert upstream.connections == 1


def test_a_kept_connection_that_the_upstream_closed_is_not_used_again(single, upstream):
    """Hardening, proxies 10."""
    running = single()
    for _ in range(3):
        upstream.answer(fake.raw(*fake.json_answer(200, fake.chat_whole(TEXT)).steps))
        reply = post(running, "openai", "fake/fake-model")
        assert attempts_of(reply) == [("fake/fake-model", "ok")]
        until(lambda: upstream.open_connections == 0)  # it has seen the end
    assert upstream.connections == 3


def test_a_kept_connection_on_which_something_unasked_arrived_is_not_used_again(single, upstream):
    """Some servers say 408 before they close an idle connection: it is not the answer to the next request."""
    running = single()
    late = [fake.Wait(0.05), fake.head(408, {"content-length": "0"})]
    upstream.answer(fake.Answer(*fake.json_answer(200, fake.chat_whole(TEXT)).steps, *late))
    for turn in range(2):
        reply = post(running, "openai", "fake/fake-model")
        assert attempts_of(reply) == [("fake/fake-model", "ok")]
        until(lambda turn=turn: upstream.open_connections == turn)  # it has seen the 408, or there was none
    assert upstream.connections == 2


def test_a_connection_with_bytes_behind_its_answer_is_not_used_again(single, upstream):
    """Response splitting: what follows an answer is never the next one's."""
    running = single()
    evil = fake.json_answer(200, fake.chat_whole("evil")).bytes
    upstream.answer(fake.Answer(fake.json_answer(200, fake.chat_whole(TEXT)).bytes + evil))
    for _ in range(2):
        assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)
    assert (upstream.connections, len(upstream.calls)) == (2, 2)


def test_a_request_that_was_sent_in_full_is_never_repeated_in_silence(single, upstream):
    """Hardening, proxies 9 and 10: a POST costs money; what is repeated counts as an attempt and shows in the trail."""
    running = single("--origin-retry-attempts=1")
    post(running, "openai", "fake/fake-model")
    upstream.answer(fake.close_before_head(), fake.reset_before_head())
    for label in ("reset", "reset"):
        reply = post(running, "openai", "fake/fake-model")
        assert reply.status == 502
        assert attempts_of(reply) == [("fake/fake-model", label)]
    assert len(upstream.calls) == 3


def test_a_request_that_a_dying_connection_did_not_take_in_full_goes_out_again(router):
    """Hardening, proxies 9: nobody can have acted on half a request."""
    whole = fake.json_answer(200, fake.chat_whole(TEXT)).bytes
    seen = []

    def serve(listener):
        with contextlib.suppress(OSError):
            for turn in range(2):
                connection, _ = listener.accept()
                seen.append(read_request(connection))
                connection.sendall(whole)
                if not turn:  # the second request on this connection is cut off in its middle
                    connection.recv(1000)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        running = router(config_of(provider("http://127.0.0.1:%d" % listener.getsockname()[1])), *QUICK)
        assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)
        reply = post(running, "openai", "fake/fake-model", text="x" * 40_000_000)
        assert_answer("openai", reply, TEXT)
    assert attempts_of(reply) == [("fake/fake-model", "ok")]
    assert [size > 40_000_000 for size in seen] == [False, True]


def read_request(connection):
    """Read one request with Content-Length off a socket; the size of its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    have = len(rest)
    while have < length:
        have += len(connection.recv(1 << 20))
    return have


def test_a_connection_that_was_kept_unused_counts_as_a_kept_one_when_it_dies():
    """It was dialled for a request that another connection served meanwhile; its upstream gives it up as any other."""
    limits = r.Timeouts(30_000, 30_000, 30_000, 30_000, 30_000)

    async def ask_on_a_dying_one(kept, theirs):
        loop = asyncio.get_running_loop()
        upstreams = r.Upstreams(loop, r.Settings(), {})
        key = r.UpstreamKey("http", "a", 80)
        dial, dials = SimpleNamespace(key=key, prefix="", proxy_headers=[], sock=kept), []
        upstreams._free(r.Connection(loop, dial, upstreams._free))

        async def connect(outbound):
            dials.append(outbound)
            raise r.UpstreamError("dialled anew", "refused")

        upstreams._connect = connect
        outbound = r.Outbound(r.Target(key, "/", {}), "/", [], bytes(10_000_000), "openai", True, limits)
        sent = asyncio.ensure_future(upstreams.send(outbound))
        await loop.run_in_executor(None, theirs.recv, 1000)
        theirs.close()
        with pytest.raises(r.UpstreamError, match="dialled anew"):
            await asyncio.wait_for(sent, 30)
        upstreams.close()
        return dials

    kept, theirs = socket.socketpair()
    kept.setblocking(False)
    assert len(asyncio.run(ask_on_a_dying_one(kept, theirs))) == 1


def test_idle_connections_are_closed_after_a_while_and_never_too_many_kept(single, upstream):
    running = single("--pool-size=3", "--pool-idle-ms=400")
    upstream.handler = lambda call: fake.later(fake.final_text(TEXT)(call), 0.1)
    together(8, lambda number: post(running, "openai", "fake/fake-model"))
    until(lambda: upstream.open_connections <= 3)
    until(lambda: upstream.open_connections == 0, 20)  # 30 s by default
    assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)


def test_a_connection_that_was_dialled_for_nothing_is_closed_after_a_while():
    """Another one served its request meanwhile, and no other request is open."""

    async def come_late(sock):
        loop = asyncio.get_running_loop()
        upstreams = r.Upstreams(loop, r.Settings()._replace(pool_idle_ms=1), {})
        dial = r.Dial(SimpleNamespace(key=r.UpstreamKey("http", "a", 80, "", "")), 60, loop.create_future(), None)
        dial.waiter.set_result(None)
        dial.sock = sock
        upstreams._dialled(dial)
        await loop.run_in_executor(None, until, lambda: sock.fileno() == -1)
        upstreams.close()

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        asyncio.run(come_late(ours))


def test_a_connection_whose_client_was_slow_to_the_last_is_read_for_the_next_one():
    """Who waits for a connection to be dialled gets it at once, paused as it may have been."""
    answer = b"HTTP/1.1 200 Ok\r\ncontent-length: 2\r\n\r\n{}"

    async def hand_over(ours, theirs):
        loop = asyncio.get_running_loop()
        upstreams = r.Upstreams(loop, r.Settings(), {})
        dial = SimpleNamespace(key="a", prefix="", proxy_headers=[], sock=ours)
        connection = r.Connection(loop, dial, upstreams._free)
        first, second = r.Reply(loop, connection, 1000), r.Reply(loop, connection, 1000)
        waiter = loop.create_future()
        upstreams._waiting["a"] = {waiter: None}
        connection.start(b"one", first)
        first.pipe(lambda data: first.pause(), str, 0)
        theirs.sendall(answer)
        assert await asyncio.wait_for(waiter, 30) is connection
        connection.start(b"two", second)
        theirs.sendall(answer)
        await asyncio.wait_for(second.wait_for_head(None), 30)
        second.close()
        upstreams.close()

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        asyncio.run(hand_over(ours, theirs))


@pytest.mark.parametrize("trouble", ["refused", "too slow", "answered early"])
def test_a_request_that_came_to_nothing_stays_in_nobodys_memory(trouble):
    """Not even until the collector comes by: there may be hundreds of them, of megabytes each."""
    body, peers = bytes(10_000_000), []

    def answer_early(reader, writer):
        peers.append(writer)
        writer.write(b"" if trouble == "too slow" else b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")

    def is_forgotten():
        return sys.getrefcount(body) == before and not any(isinstance(o, r.Connection) for o in gc.get_objects())

    async def ask_in_vain():
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(answer_early, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if trouble == "refused":
            server.close()
        proxied = r.UpstreamKey("https", "a.example", 443, "http://127.0.0.1:%d" % port)
        key = proxied if trouble == "too slow" else r.UpstreamKey("http", "127.0.0.1", port)
        limits = r.Timeouts(200 if trouble == "too slow" else 30_000, 30_000, 0, 0, 0)
        upstreams = r.Upstreams(loop, r.Settings(), {})
        with contextlib.suppress(r.UpstreamError):
            reply = await upstreams.send(r.Outbound(r.Target(key, "/", {}), "/", [], body, "openai", False, limits))
            assert reply.status == 413
            del reply
        await loop.run_in_executor(None, until, is_forgotten)
        upstreams.close()
        server.close()
        for writer in peers:
            writer.transport.abort()
        await asyncio.sleep(0)

    gc.collect()
    gc.disable()
    try:
        before = sys.getrefcount(body)
        asyncio.run(ask_in_vain())
    finally:
        gc.enable()


def test_the_first_byte_is_waited_for_only_as_long_as_connecting_has_left_of_all_the_time():
    limits = r.Timeouts(60_000, 60_000, 60_000, 60_000, 60_000)

    async def ask_who_is_silent(sock):
        loop = asyncio.get_running_loop()
        upstreams = r.Upstreams(loop, r.Settings(), {})

        async def connect(outbound):
            dial = SimpleNamespace(key=outbound.target.key, prefix="", proxy_headers=[], sock=sock)
            return r.Connection(loop, dial, upstreams._free)

        upstreams._connect = connect
        target = r.Target(r.UpstreamKey("http", "a", 80), "/", {})
        outbound = r.Outbound(target, "/", [], b"", "openai", True, limits, until=loop.time() + 0.2)
        with pytest.raises(r.UpstreamError, match="first byte") as told:
            await asyncio.wait_for(upstreams.send(outbound), 30)
        upstreams.close()
        return told.value.is_timeout

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        assert asyncio.run(ask_who_is_silent(ours))


# --- odd but valid answers ---


def odd_answers(body):
    """Ways to send the same JSON that a client of HTTP must understand."""
    plain = fake.head(200, {"content-type": "application/json", "content-length": str(len(body))}) + body
    chunks = b"".join(b'%X;name="v"\r\n%s\r\n' % (len(part), part) for part in (body[:5], body[5:]))
    packed = gzip.compress(body)
    coded = {"content-type": "application/json", "content-encoding": "gzip"}
    return {
        "a 103 first": fake.informational_first(fake.Answer(plain)),
        "several 1xx first": fake.informational_first(fake.informational_first(fake.Answer(plain), 102, {}), 100, {}),
        "chunked": fake.chunked_answer(200, [body[:7], body[7:]]),
        "chunks with extensions and trailers": fake.Answer(
            fake.head(200, {"content-type": "application/json", "Transfer-Encoding": "Chunked"})
            + chunks
            + b"0;a=b\r\nx-trailer: y\r\n\r\n"
        ),
        "ended by the connection": fake.close_delimited_answer(200, body),
        "HTTP/1.0": fake.raw(b"HTTP/1.0 200 OK\r\n\r\n" + body),
        "byte by byte": fake.drip(fake.Answer(plain), 1),
        "no reason phrase": fake.Answer(plain.replace(b"200 Whatever", b"200 ", 1)),
        "lone line feeds": fake.Answer(plain.replace(b"\r\n", b"\n")),
        "equal lengths twice": fake.Answer(
            plain.replace(b"\r\n\r\n", b"\r\ncontent-length: %d\r\n\r\n" % len(body), 1)
        ),
        "gzip": fake.gzip_answer(200, json.loads(body)),
        "undeclared gzip": fake.gzip_answer(200, json.loads(body), declared=False),
        "undeclared gzip, byte by byte": fake.drip(fake.gzip_answer(200, json.loads(body), declared=False), 1),
        "gzip in chunks": fake.chunked_answer(200, [packed[:1], packed[1:9], packed[9:]], coded),
        "declared gzip that is none": fake.body_answer(200, body, "application/json", coded),
        "deflate": fake.body_answer(200, zlib.compress(body), "application/json", {"content-encoding": "deflate"}),
        "no content type": fake.body_answer(200, body, ""),
        "a byte order mark": fake.body_answer(200, b"\xef\xbb\xbf" + body, "application/json"),
        "201": fake.body_answer(201, body, "application/json"),
    }


ODD_NAMES = sorted(odd_answers(b"{}"))


@pytest.mark.parametrize("client_wire", ["openai", "anthropic"])
def test_every_way_to_send_a_whole_answer_is_understood(single, upstream, client_wire):
    """Trap 18; hardening, proxies 15."""
    running = single("--origin-retry-attempts=1")
    for name in ODD_NAMES:
        upstream.answer(odd_answers(json.dumps(fake.chat_whole(TEXT)).encode())[name])
        reply = post(running, client_wire, "fake/fake-model")
        assert reply.status == 200, (name, reply)
        assert "content-encoding" not in reply.headers
        assert_answer(client_wire, reply, TEXT)


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_every_way_to_send_a_stream_is_understood(single, upstream, framing, gzipped):
    """Traps 1, 6, 18: also a byte at a time."""
    running = single("--origin-retry-attempts=1")
    for client_wire in ("openai", "anthropic"):
        for size in (1, 5, 100_000):
            answer = fake.drip(fake.sse_answer(fake.chat_stream(TEXT), framing=framing, gzip=gzipped), size)
            upstream.answer(fake.informational_first(answer))
            assert_answer(client_wire, post(running, client_wire, "fake/fake-model", True), TEXT)


def test_an_inflated_answer_is_bounded(single, upstream):
    """Hardening 31: a gzip bomb is no answer."""
    running = single("--max-answer-bytes=1000000", "--origin-retry-attempts=1")
    bomb = gzip.compress(b'{"a": "' + b"0" * 50_000_000 + b'"}')
    upstream.answer(fake.body_answer(200, bomb, "application/json", {"content-encoding": "gzip"}))
    assert post(running, "openai", "fake/fake-model").status == 502
    assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_larger_than_the_limit_is_not_paid_for_again(single, upstream, stream):
    """Neither by the router nor by the client's SDK, which repeats after a 502; and it says nothing of the provider."""
    running = single("--max-answer-bytes=1000000", "--origin-retry-attempts=3")
    body = b'{"a": "' + b"0" * 2_000_000 + b'"}'
    kinds = ((body, {}), (gzip.compress(body), {"content-encoding": "gzip"}))
    for seen, (data, headers) in enumerate(kinds, 1):
        upstream.handler = lambda call, data=data, headers=headers: fake.body_answer(200, data, "application/json", headers)
        reply = post(running, "openai", "fake/fake-model", stream)
        assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
        assert "max_answer_bytes" in reply.text
        assert attempts_of(reply) == [("fake/fake-model", "answer_too_large")]
        assert len(upstream.calls) == seen
    assert "llm_router_cooldown_seconds{model=\"fake/fake-model\"} 0" in running.get("/metrics").text


def test_an_error_that_inflates_beyond_the_limit_is_judged_by_its_status(single, upstream):
    running = single("--max-answer-bytes=1000000")
    bomb = gzip.compress(b"0" * 2_000_000)
    upstream.handler = lambda call: fake.body_answer(401, bomb, "application/json", {"content-encoding": "gzip"})
    assert attempts_of(post(running, "openai", "fake/fake-model")) == [("fake/fake-model", "401")]


def test_a_single_huge_event_passes_and_one_above_the_limit_is_an_error(single, upstream):
    """Trap 8: base64 images and tool arguments come in one line."""
    running = single("--max-event-bytes=3000000", "--origin-retry-attempts=1")
    big = "x" * 2_000_000
    events = fake.chat_stream(TEXT)
    huge = fake.sse({"choices": [{"index": 0, "delta": {"content": big}, "finish_reason": None}]})
    for client_wire in ("openai", "anthropic"):
        upstream.answer(fake.sse_answer([events[0], huge, *events[1:]]))
        assert_answer(client_wire, post(running, client_wire, "fake/fake-model", True), big + TEXT)
        upstream.answer(fake.sse_answer([events[0], b"data: " + b"y" * 4_000_000, b"\n\n", *events[1:]]))
        assert post(running, client_wire, "fake/fake-model", True).status == 502


# --- what is sent ---


def test_a_request_carries_exactly_the_headers_it_needs(single, upstream):
    running = single(headers={"X-Extra": "1", "User-Agent": "mine", "Accept": None})
    post(
        running,
        "openai",
        "fake/fake-model",
        headers={"user-agent": "client", "connection": "keep-alive", "te": "trailers", "x-api-key": "client"},
    )
    sent = {name.lower(): value for name, value in upstream.calls[0].headers}
    assert sent["host"] == "127.0.0.1:%d" % upstream.port
    assert sent["authorization"] == "Bearer upstream-key"
    assert sent["content-type"] == "application/json"
    assert sent["accept-encoding"] == "identity"
    assert (sent["x-extra"], sent["user-agent"]) == ("1", "mine")
    assert not {"te", "x-api-key", "cookie", "x-forwarded-for"} & set(sent)
    assert len(sent) == len(upstream.calls[0].headers)


BASE_PATHS = [
    ("", "/v1/chat/completions"),
    ("/", "/v1/chat/completions"),
    ("/v1", "/v1/chat/completions"),
    ("/v1/", "/v1/chat/completions"),
    ("/api/paas/v4", "/api/paas/v4/chat/completions"),
    ("/v1beta/openai", "/v1beta/openai/chat/completions"),
    ("/proxy/x", "/proxy/x/v1/chat/completions"),
    ("/v1/chat/completions", "/v1/chat/completions"),
    ("/v1?api-version=7", "/v1/chat/completions?api-version=7"),
]


def test_a_base_url_of_any_shape_leads_to_the_right_path(router, upstream):
    """Trap 182."""
    rows = [provider(upstream.url + base, id="p%d" % number) for number, (base, _) in enumerate(BASE_PATHS)]
    running = router(config_of(*rows))
    for row in rows:
        post(running, "openai", row["id"] + "/fake-model")
    assert [call.path for call in upstream.calls] == [path for _, path in BASE_PATHS]


AUTHS = [
    ({"type": "bearer"}, [("authorization", "Bearer upstream-key")]),
    ({"type": "x-api-key"}, [("x-api-key", "upstream-key")]),
    ({"type": "header", "headerName": "api-key"}, [("api-key", "upstream-key")]),
    ({"type": "header", "headerName": "Authorization", "prefix": "Token "}, [("authorization", "Token upstream-key")]),
    ({"type": "none"}, []),
]


def test_the_key_goes_where_the_provider_wants_it(router, upstream):
    rows = [provider(upstream, id="p%d" % number, auth=auth) for number, (auth, _) in enumerate(AUTHS)]
    running = router(config_of(*rows))
    for row in rows:
        post(running, "openai", row["id"] + "/fake-model")
    shown = [
        [(name.lower(), value) for name, value in call.headers if "upstream-key" in value] for call in upstream.calls
    ]
    assert shown == [expected for _, expected in AUTHS]


# --- proxies ---


def test_a_plain_upstream_is_reached_through_the_http_proxy(router, make_upstream):
    """Trap 184."""
    proxy = make_upstream(fake.final_text(TEXT))
    config = config_of(provider("http://models.example:8080/v1"))
    running = router(config, env={"HTTP_PROXY": proxy.url, "NO_PROXY": "other.example"})
    for _ in range(2):
        assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)
    assert [call.path for call in proxy.calls] == ["http://models.example:8080/v1/chat/completions"] * 2
    assert proxy.calls[0].header("host") == "models.example:8080"
    assert proxy.connections == 1


def test_an_https_upstream_is_reached_through_a_tunnel_that_never_sees_the_key(router):
    seen = []

    def serve(listener):
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            seen.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            seen.append(connection.recv(65536))
            connection.close()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        proxy = "http://user:p%%40ss@127.0.0.1:%d" % listener.getsockname()[1]
        running = router(
            config_of(provider("https://models.example/v1")),
            *QUICK,
            "--origin-retry-attempts=1",
            env={"HTTPS_PROXY": proxy},
        )
        reply = post(running, "openai", "fake/fake-model")
    assert reply.status == 502
    assert seen[0].startswith(b"CONNECT models.example:443 HTTP/1.")
    assert b"Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in seen[0]
    assert seen[1][:1] == b"\x16"  # a TLS ClientHello
    assert b"upstream-key" not in b"".join(seen)
    assert "p@ss" not in reply.text + "".join(running.log())


def test_a_tunnel_to_an_ipv6_address_is_asked_for_in_brackets():
    """RFC 9110 9.3.6; http.client of some Python versions writes them nowhere, of others not in Host."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        proxy = "http://127.0.0.1:%d" % listener.getsockname()[1]
        dial = r.Dial(SimpleNamespace(key=r.UpstreamKey("https", "2001:db8::1", 443, proxy)), 30, None, r.Network({}))
        dialled = pool.submit(dial.run)
        connection, _ = listener.accept()
        with connection:
            asked = connection.recv(65536)
        dialled.result(30)
    assert asked.startswith(b"CONNECT [2001:db8::1]:443 HTTP/1.")
    assert b"\r\nHost: [2001:db8::1]:443\r\n" in asked


def test_loopback_and_no_proxy_hosts_are_reached_directly(router, upstream, make_upstream):
    proxy = make_upstream()
    running = router(config_of(provider(upstream)), env={"HTTP_PROXY": proxy.url, "ALL_PROXY": proxy.url})
    assert post(running, "openai", "fake/fake-model").status == 200
    config = config_of(provider("http://localhost.invalid/v1"))
    exempt = router(config, *QUICK, "--origin-retry-attempts=1", env={"HTTP_PROXY": proxy.url, "NO_PROXY": ".invalid"})
    assert attempts_of(post(exempt, "openai", "fake/fake-model")) == [("fake/fake-model", "dns")]
    assert proxy.connections == 0


def test_a_proxy_for_plain_upstreams_is_shown_its_login(router, make_upstream):
    proxy = make_upstream(fake.final_text(TEXT))
    url = proxy.url.replace("//", "//user:p%40ss@")
    running = router(config_of(provider("http://models.example/v1")), env={"ALL_PROXY": url})
    assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)
    assert proxy.calls[0].header("proxy-authorization") == "Basic dXNlcjpwQHNz"


def test_a_provider_may_have_a_proxy_of_its_own_or_none(router, make_upstream):
    """Trap 184: the provider's own word goes before every variable, for loopback, too."""
    common, own, direct = make_upstream(), make_upstream(fake.final_text(TEXT)), make_upstream(fake.final_text(TEXT))
    config = config_of(
        provider("http://models.example/v1", id="own", proxy=own.url),
        provider(direct, id="direct", proxy="none"),
        provider("http://models.invalid/v1", id="dark", proxy="none"),
        provider("http://models.example/v1", id="gone", proxy="http://127.0.0.1:%d" % (port := fake.dead_port())),
    )
    running = router(config, *QUICK, "--origin-retry-attempts=1", env={"HTTP_PROXY": common.url})
    said = post(running, "openai", "gone/fake-model").text
    assert "connect to http://models.example through the proxy http://127.0.0.1:%d: " % port in said
    for id in ("own", "direct"):
        assert_answer("openai", post(running, "openai", id + "/fake-model"), TEXT)
    assert attempts_of(post(running, "openai", "dark/fake-model")) == [("dark/fake-model", "dns")]
    assert own.calls[0].path == "http://models.example:80/v1/chat/completions"
    assert common.connections == 0


@pytest.mark.skipif(not fake.can_tls(), reason="a certificate takes the openssl program")
def test_certificates_are_trusted_for_one_provider_or_for_all(router, make_upstream):
    """Trap 184. Trust in one provider's certificates says nothing about another's."""
    upstream = make_upstream(fake.final_text(TEXT), tls=True)
    config = config_of(provider(upstream, id="trusted", caBundle=upstream.cafile), provider(upstream, id="other"))
    running = router(config, *QUICK, "--origin-retry-attempts=1")
    for _ in range(2):
        assert_answer("openai", post(running, "openai", "trusted/fake-model"), TEXT)
        assert attempts_of(post(running, "openai", "other/fake-model")) == [("other/fake-model", "tls")]
    everybody = router(config, "--ca-bundle=%s" % upstream.cafile)
    assert_answer("openai", post(everybody, "openai", "other/fake-model"), TEXT)


def test_certificates_that_cannot_be_read_are_named(router):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "https://127.0.0.1:%d/v1" % listener.getsockname()[1]
        config = config_of(provider(url, caBundle="/nowhere/ca.pem"))
        running = router(config, *QUICK, "--origin-retry-attempts=1")
        reply = post(running, "openai", "fake/fake-model")
    assert reply.status == 502
    assert "/nowhere/ca.pem" in reply.text


@pytest.mark.parametrize(
    ("names", "exempt"),
    [("*", True), ("example.com", True), ("*.example.com", True), (".EXAMPLE.com:8443", True), ("b.example.com", False),
     ("ample.com", False), ("example.com:443", False), (" , ", False), ("other.org, api.example.com", True)],
)  # fmt: skip
def test_no_proxy_names_hosts_domains_and_ports(names, exempt):
    network = r.Network({"https_proxy": "http://proxy:3128", "no_proxy": names})
    found = network.proxy_for(r.UpstreamKey("https", "api.example.com", 8443))
    assert (found is None) is exempt


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_a_body_of_two_bytes_whose_end_comes_later_is_not_lost(router, upstream, framing):
    """It waits for more bytes, which would tell whether it is compressed."""
    head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n%s\r\n"
    steps = [head % b"transfer-encoding: chunked\r\n", b"2\r\n{}\r\n", fake.Wait(0.1), b"0\r\n\r\n"]
    steps = steps if framing == "chunked" else [head % b"", b"{}", fake.Wait(0.1), fake.Close()]
    upstream.handler = lambda call: fake.Answer(*steps)
    reply = post(router(config_of(provider(upstream))), "openai", "fake/fake-model")
    assert (reply.status, reply.text) == (400, "{}")


def test_a_stream_nobody_asked_for_is_known_by_its_start_however_that_is_cut(router, upstream):
    """Trap 9: its own end is its end, whether the connection is closed or not."""
    head, body = fake.head(200, {"content-type": "text/event-stream"}), b"".join(fake.chat_stream(TEXT))
    upstream.answer(fake.Answer(head, body[:3], fake.Wait(0.1), body[3:], fake.Hang()))
    running = router(config_of(provider(upstream)), *QUICK)
    assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT)
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("url", ["http://user:planted/secret@host:3128", "http://[::1", "https://host", "http://"])
def test_a_proxy_that_is_none_is_refused_without_a_word_of_its_password(url):
    with pytest.raises(OSError, match="proxy") as caught:
        r.Network({"https_proxy": url}).proxy_for(r.UpstreamKey("https", "api.example.com", 443))
    assert "planted" not in str(caught.value)


# --- dialling ---


def test_an_upstream_that_cannot_be_reached_delays_nobody_else(router, upstream):
    """Only so many threads dial one upstream: others always find one."""
    upstream.handler = fake.final_text(TEXT)
    with fake.blackhole() as port:
        dark = provider("http://127.0.0.1:%d" % port, id="dark")
        running = router(config_of(provider(upstream), dark), *QUICK, "--connect-timeout-ms=60000")
        body = ask("openai", "dark/fake-model")
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(raw_request(running, body))
            until(lambda: "llm_router_connections 61\n" in running.get("/metrics").text)  # this one is the last
            together(5, lambda number: assert_answer("openai", post(running, "openai", "fake/fake-model"), TEXT))


@pytest.mark.parametrize("trouble", ["silent", "refused", "unknown family"])
def test_an_address_that_leads_nowhere_delays_the_next_one_only_a_moment(upstream, monkeypatch, trouble):
    """Many a machine has IPv6 that leads nowhere, or none, while the names of providers have both kinds."""
    port = int(upstream.url.rsplit(":", 1)[1])

    def answers(family, number):
        return family, socket.SOCK_STREAM, 0, "", ("127.0.0.1", number)

    with fake.blackhole() as dark:
        first = {"silent": answers(socket.AF_INET, dark), "refused": answers(socket.AF_INET, fake.dead_port())}
        found = [first.get(trouble, answers(12345, port)), answers(socket.AF_INET, port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: list(found))
        target = SimpleNamespace(key=r.UpstreamKey("http", "api.example.com", 80, "", ""))
        dial = r.Dial(target, 120, None, r.Network({}))
        thread = threading.Thread(target=dial.run, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and dial.error is None
        assert dial.sock.getpeername() == ("127.0.0.1", port)
        dial.close()


def test_no_limit_for_connecting_is_none_at_all(upstream, monkeypatch):
    """CONNECT_TIMEOUT_MS 0 is off, as the settings say."""
    limits, run = [], r.Dial.run

    def watched(dial):
        run(dial)
        limits.append(dial._timeout_s)

    monkeypatch.setattr(r.Dial, "run", watched)

    async def ask():
        upstreams = r.Upstreams(asyncio.get_running_loop(), r.Settings(), {})
        target = r.Target(r.UpstreamKey("http", "127.0.0.1", int(upstream.url.rsplit(":", 1)[1])), "/", {})
        reply = await upstreams.send(r.Outbound(target, "/", [], b"{}", "openai", False, r.Timeouts(0, 0, 0, 0, 0)))
        reply.close()
        upstreams.close()

    asyncio.run(ask())
    assert limits == [None]


def test_a_slow_address_is_not_given_up_for_one_behind_it_that_fails(monkeypatch):
    """Where there is no IPv6 its addresses come last and fail at once; one lost packet must not cost the only way."""
    with fake.blackhole(for_s=1.2) as slow:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", at)) for at in (slow, fake.dead_port())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: list(found))
        target = SimpleNamespace(key=r.UpstreamKey("http", "api.example.com", 80, "", ""))
        dial = r.Dial(target, 60, None, r.Network({}))
        dial.run()
        assert dial.error is None
        assert dial.sock.getpeername() == ("127.0.0.1", slow)
        dial.close()


def test_the_last_address_that_fails_says_why(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", fake.dead_port())) for _ in range(2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: list(found))
    dial = r.Dial(SimpleNamespace(key=r.UpstreamKey("http", "api.example.com", 80, "", "")), 60, None, r.Network({}))
    dial.run()
    assert (dial.error.label, dial.sock) == ("refused", None)


def test_an_upstream_is_named_as_in_a_url_without_a_port_that_nobody_wrote(monkeypatch):
    def fails(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    keys = {"https://[2001:db8::1]": ("https", "2001:db8::1", 443), "http://a.example:8080": ("http", "a.example", 8080)}
    for place, key in keys.items():
        dial = r.Dial(SimpleNamespace(key=r.UpstreamKey(*key)), 60, None, r.Network({}))
        dial.run()
        assert "cannot connect to %s: " % place in dial.error.message


def test_a_dial_that_is_over_when_nobody_is_left_is_told_to_nobody_and_closed(monkeypatch):
    """A loop that is being closed drops what it is told, and the socket stayed open until it was collected."""
    going, sockets, told, run = threading.Event(), [], [], r.Dial.run

    def late(dial):
        assert going.wait(30)
        run(dial)
        sockets.append(dial.sock)

    async def dial_late(port):
        loop = asyncio.get_running_loop()
        dialer = r.Dialer(loop, 1, 1, told.append)
        target = SimpleNamespace(key=r.UpstreamKey("http", "127.0.0.1", port, "", ""))
        dialer.submit(r.Dial(target, 60, None, r.Network({})))
        dialer.close()
        going.set()
        await loop.run_in_executor(None, until, lambda: sockets and sockets[0].fileno() == -1)

    monkeypatch.setattr(r.Dial, "run", late)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(dial_late(listener.getsockname()[1]))
    assert told == []


def test_without_a_free_thread_a_dial_waits_for_one_of_those_that_there_are(monkeypatch):
    """Containers limit the number of processes and threads."""

    async def dial_twice(port):
        loop, done = asyncio.get_running_loop(), []
        dialer = r.Dialer(loop, 8, 8, done.append)
        target = SimpleNamespace(key=r.UpstreamKey("http", "127.0.0.1", port, "", ""))
        dials = [r.Dial(target, 60, None, r.Network({})) for _ in range(2)]
        dialer.submit(dials[0])

        def refuse(self):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        dialer.submit(dials[1])
        for _ in range(3000):
            if len(done) == 2:
                break
            await asyncio.sleep(0.01)
        dialer.close()
        return dials, done

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dials, done = asyncio.run(dial_twice(listener.getsockname()[1]))
    assert sorted(map(id, done)) == sorted(map(id, dials)) and not any(dial.error for dial in dials)
    for dial in dials:
        dial.close()


def test_a_dial_that_has_not_begun_is_not_made_when_another_connection_came_free(monkeypatch):
    """A burst of requests leaves no queue of dials behind, which would open connections that nobody needs."""
    begun, may_end = [], threading.Event()

    def run(dial):
        begun.append(dial)
        may_end.wait(30)
        dial.error = r.UpstreamError("too late", "refused")

    async def connect_twice(pairs):
        loop = asyncio.get_running_loop()
        upstreams = r.Upstreams(loop, r.Settings()._replace(dial_threads_per_upstream=1), {})
        target = r.Target(r.UpstreamKey("http", "a", 80), "/", {})
        outbound = r.Outbound(target, "/", [], b"", "openai", True, r.Timeouts(60_000, 0, 0, 0, 0))
        waiting = [asyncio.ensure_future(upstreams._connect(outbound)) for _ in pairs]
        await asyncio.sleep(0)
        for ours, _ in pairs:
            ours.setblocking(False)
            dial = SimpleNamespace(key=target.key, prefix="", proxy_headers=[], sock=ours)
            upstreams._free(r.Connection(loop, dial, upstreams._free))
        for connection in await asyncio.gather(*waiting):
            connection.close()
        may_end.set()
        await loop.run_in_executor(None, until, lambda: not upstreams._dialer._lines)
        upstreams.close()

    monkeypatch.setattr(r.Dial, "run", run)
    pairs = [socket.socketpair() for _ in range(2)]
    asyncio.run(connect_twice(pairs))
    assert len(begun) == 1
    for _, theirs in pairs:
        theirs.close()


@needs_proc
@pytest.mark.parametrize("leave", ["close", "reset"])
def test_clients_that_leave_while_their_upstream_is_dialled_free_everything_at_once(router, leave):
    """Trap 161: waiting requests of that upstream get the threads again."""
    with fake.blackhole() as port:
        running = router(config_of(provider("http://127.0.0.1:%d" % port)), *QUICK, "--connect-timeout-ms=20000")
        before = sockets_of(running.process.pid)
        clients = [
            raw_request(running, ask("openai", "fake/fake-model", stream=bool(number % 2))) for number in range(24)
        ]
        until(lambda: sockets_of(running.process.pid) >= before + 24 + 16)
        for client in clients:
            if leave == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        until(lambda: sockets_of(running.process.pid) <= before, 15)  # the dials would end after 20 s by themselves
        line = running.wait_log("client_gone")
        assert " 499 client_gone [fake/fake-model=client_gone" in line


@needs_proc
def test_a_dial_that_is_called_off_just_before_it_connects_ends_at_once(monkeypatch):
    """A socket that is not there yet cannot be shut down: without a second try its thread was lost for 60 s."""
    connecting = threading.Event()
    check = r.Dial._check

    def late(self):
        check(self)
        connecting.set()
        time.sleep(0.1)

    async def call_off(port):
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        dialer = r.Dialer(loop, 1, 1, lambda dial: done.set())
        target = SimpleNamespace(key=r.UpstreamKey("http", "127.0.0.1", port, "", ""))
        dial = r.Dial(target, 60, None, r.Network({}))
        dialer.submit(dial)
        await loop.run_in_executor(None, connecting.wait, 30)
        dialer.cancel(dial)
        await asyncio.wait_for(done.wait(), 30)
        dialer.close()
        return dial

    with fake.blackhole() as port:
        monkeypatch.setattr(r.Dial, "_check", late)
        dial = asyncio.run(call_off(port))
    assert dial.is_aborted


def raw_request(running, body, path=PATHS["openai"]):
    """A socket on which one request was sent and nothing was read."""
    data = json.dumps(body).encode()
    client = socket.create_connection((running.host, running.port), 10)
    client.sendall(
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(data), data)
    )
    return client


@needs_proc
def test_after_two_hundred_aborted_requests_nothing_is_left_open(single, upstream):
    """Hardening, proxies 32; trap 169."""
    running = single("--pool-idle-ms=200", "--usage-db=off")
    together(5, lambda number: post(running, "openai", "fake/fake-model"))
    until(lambda: upstream.open_connections == 0)
    pid = running.process.pid
    before = sockets_of(pid)
    upstream.handler = lambda call: (
        fake.sse_answer(fake.chat_stream("x" * 300), delay=0.01, end="hang")
        if len(upstream.calls) % 3
        else fake.hang_before_head()
    )

    def abort(number):
        for turn in range(10):
            body = ask(WIRES[(number + turn) % 3], "fake/fake-model", stream=bool(turn % 4))
            client = raw_request(running, body, PATHS[WIRES[(number + turn) % 3]])
            time.sleep(0.005 * (turn % 7))
            if turn % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    together(20, abort)
    until(lambda: sockets_of(pid) <= before, step=0.05)
    until(lambda: upstream.open_connections == 0)
    begun = len(upstream.calls) - 5
    upstream.handler = fake.final_text(TEXT)
    reply = post(running, "openai", "fake/fake-model")
    assert attempts_of(reply) == [("fake/fake-model", "ok")]
    running.wait_log(reply.headers["x-llm-router-request-id"])
    odd = [line for line in running.log() if "rror" in line or "xception" in line or "Traceback" in line]
    assert odd == []
    # A reset takes away what the router has not read yet; a FIN does not, and every other client has sent one.
    assert len([line for line in running.log() if " 499 client_gone " in line]) >= max(begun, 100)
