"""What is the Worker's own: who may call, where the configuration comes from, a client that leaves, a snapshot."""

import json
import socket
import struct
import threading
import zlib

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import QUICK, ask, assert_answer, assert_stream_error, post, until
from running_router import config_of, provider
from running_worker import KEY, RunningWorker, project_files

TEXT = "said by the upstream"
GUARDED = ("/metrics", "/v1/models", "/v1/models/x", "/nothing", "/_router/status", "/v1/chat/completions")


@pytest.fixture(scope="module")
def shared(start_worker):
    """One Worker that remembers no failure, before an upstream of each format."""
    with fake.FakeUpstream() as upstream:
        config = config_of(provider(upstream), provider(upstream, "anthropic", id="messages"))
        running = start_worker(config, *QUICK)
        running.upstream = upstream
        yield running


@pytest.fixture
def serving(shared):
    shared.upstream.calls.clear()
    shared.upstream.handler = fake.final_text(TEXT)
    return shared


def test_every_path_but_the_root_and_the_health_wants_the_key(serving):
    """Hardening 3: no route is left out."""
    for path in GUARDED:
        for headers in ({"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"api-key": ""}):
            for method in ("GET", "POST"):
                reply = serving.request(method, path, b"{}" if method == "POST" else None, headers)
                assert reply.status in (401, 404), (path, reply)
    assert serving.upstream.calls == []
    assert serving.get("/", {"authorization": "Bearer wrong"}).json == {"name": "llm-router"}
    assert serving.get("/health", {"authorization": "Bearer wrong"}).json == {"status": "ok"}
    assert post(serving, "openai").status == 200
    for name in ("x-api-key", "api-key"):
        assert post(serving, "anthropic", headers={name: KEY}).status == 200


def test_without_a_usable_configuration_all_but_the_root_is_a_503_that_says_why(start_worker, upstream):
    good = json.dumps(config_of(provider(upstream)))
    for config, key, words in (
        (good, "", "master key"),
        ("{broken", KEY, "LLM_ROUTER_CONFIG_JSON:1:2"),
        ("", KEY, "not set"),
        ('{"providers": [{"id": "x"}]}', KEY, "providers[0]"),
        ('{"providers": []}', KEY, "no enabled provider"),
    ):
        running = start_worker(config, env={"LLM_ROUTER_MASTER_KEY": key})
        assert running.get("/").json == {"name": "llm-router"}
        for path in ("/health", "/v1/models"):
            assert running.get(path).status == 503
        reply = post(running, "anthropic")
        assert reply.status == 503
        assert words in reply.json["error"]["message"]
        assert reply.json["type"] == "error"
        assert "upstream-key" not in reply.text


def test_an_upgrade_that_nobody_asked_for_is_a_failed_attempt(serving):
    """A Response cannot have such a status: the client would get a 500 without a word."""
    for status in (101, 999):
        head = fake.head(status, [("content-length", "0"), ("connection", "close")])  # or it may be used again as it ends
        serving.upstream.answer(*[fake.raw(head)] * 3)
        reply = post(serving, "openai")
        assert (reply.status, reply.json["error"]["type"]) == (502, "server_error")
        assert "has the status %d" % status in reply.json["error"]["message"]
    assert_answer("openai", post(serving, "openai"), TEXT)


def test_a_head_request_is_told_the_size_of_what_it_does_not_get(serving):
    for path in ("/", "/v1/models", "/v1/models/nope", "/v1/chat/completions"):
        whole = serving.get(path)
        bare = serving.request("HEAD", path)
        assert (bare.status, bare.body) == (whole.status, b"")
        assert bare.headers["content-length"] == whole.headers["content-length"]


def test_health_and_metrics_tell_of_this_isolate_what_they_tell_of_a_server(start_worker, upstream):
    running = start_worker(config_of(provider(upstream)))
    told = running.get("/health").json
    assert (told["status"], told["config"]) == ("ok", "ok")
    assert told["instance"] == running.get("/health").json["instance"]
    upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}, {"retry-after": "600"}))
    assert post(running, "openai").status == 429
    lines = [line.split() for line in running.get("/metrics").text.splitlines() if "{model=" in line]
    shown = {name: float(value) for name, value in lines}
    assert 0 < shown['llm_router_cooldown_seconds{model="fake/fake-model"}'] <= 600
    assert shown['llm_router_circuit_open{model="fake/fake-model"}'] == 0


def test_variables_of_wrangler_toml_need_not_be_text_and_wrong_ones_are_named(start_worker, upstream):
    """A table, a number and a switch; the configuration that cannot be used is told in the log as well."""
    upstream.handler = fake.final_text(TEXT)
    config = config_of(provider(upstream, apiKey="", apiKeyEnv="NOBODY_SET_IT"))
    env = {"LLM_ROUTER_CONFIG_JSON": config, "LLM_ROUTER_MAX_BODY_BYTES": 2000}
    env.update(LLM_ROUTER_ALLOW_POLICY_FALLBACK=True, LLM_ROUTER_TRAIL_SIZE="many", LLM_ROUTER_KEEPALIVE_MS=-1)
    running = start_worker("", env=env)
    assert_answer("openai", post(running, "openai"), TEXT)
    assert post(running, "openai", text="x" * 2000).status == 413
    assert running.wait_log("warning: LLM_ROUTER_TRAIL_SIZE: many is not a whole number")
    assert running.wait_log("warning: LLM_ROUTER_KEEPALIVE_MS: -1 is outside")
    assert running.wait_log("warning: providers[0].apiKeyEnv: the variable NOBODY_SET_IT is not set here")
    assert not [line for line in running.log() if "POLICY" in line]
    broken = start_worker("{broken")
    assert post(broken, "openai").status == 503
    assert broken.wait_log("configuration error: LLM_ROUTER_CONFIG_JSON:1:2")


def test_no_nesting_of_an_answer_or_a_configuration_ends_the_isolate(start_worker, serving):
    deep = b"[" * 5000
    for answer in (deep, b'{"choices": [{"message": {"content": "x", "y": %s' % deep):
        serving.upstream.answer(*[fake.body_answer(200, answer, "application/json")] * 3)
        assert post(serving, "openai").status == 502
    for stream in (False, True):
        serving.upstream.answer(fake.model_answer("openai", stream, tool_calls=[("t", '{"a":' + "[" * 5000)]))
        assert post(serving, "anthropic", "fake/fake-model", stream).status == 200
    assert_answer("openai", post(serving, "openai"), TEXT)
    assert "nested deeper" in post(start_worker('{"a":' + "[" * 5000), "openai").json["error"]["message"]


def test_a_body_that_breaks_off_or_says_no_size_is_the_clients_fault_and_read_no_further_than_allowed(
    start_worker, upstream
):
    upstream.handler = fake.final_text(TEXT)
    running = start_worker(config_of(provider(upstream)), env={"LLM_ROUTER_MAX_BODY_BYTES": "20000"})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\n" % KEY
    chunked = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
    body = json.dumps(ask("openai", text="x" * 10_000)).encode()
    whole = [fake.chunk(body[at : at + 999]) for at in range(0, len(body), 999)]
    assert running.raw(chunked + b"".join(whole) + b"0\r\n\r\n", 30).startswith(b"HTTP/1.1 200 ")
    assert running.raw(chunked + b"".join(whole * 3) + b"0\r\n\r\n", 30).startswith(b"HTTP/1.1 413 ")
    assert running.raw(chunked + whole[0] + b"no size\r\n", 30).startswith(b"HTTP/1.1 400 ")
    with socket.create_connection((running.host, running.port)) as client:
        client.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n{")
    until(lambda: sum(" 400 incomplete_request " in line for line in running.log()) == 2)
    assert not [line for line in running.log() if "internal" in line]


def test_bodies_that_are_too_many_at_once_are_refused_until_one_is_gone(start_worker, upstream):
    """Also those that do not say their size, and packed ones; a stream under way needs its request's body no more."""
    running, gate = start_worker(config_of(provider(upstream)), env={"LLM_ROUTER_MAX_INFLIGHT_BYTES": "3000"}), threading.Event()
    upstream.answer(fake.sse_answer([*fake.chat_stream("hello")[:2], fake.Gate(gate), *fake.chat_stream("hello")[2:]]))
    stream = running.open("/v1/chat/completions", ask("openai", text="x" * 2000, stream=True))
    assert stream.read_event()
    upstream.answer(fake.gated(fake.json_answer(200, fake.chat_whole(TEXT)), gate))
    replies = []
    waiting = threading.Thread(target=lambda: replies.append(post(running, "openai", text="x" * 2000)))
    waiting.start()
    until(lambda: len(upstream.calls) == 2)
    large = json.dumps(ask("openai", text="x" * 2000)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\n" % KEY.encode()
    for body, how in ((large, {}), (zlib.compress(large), {"content-encoding": "deflate"})):
        reply = running.post("/v1/chat/completions", body, how)
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + fake.chunk(large) + b"0\r\n\r\n"
    assert running.raw(chunked).startswith(b"HTTP/1.1 503 ")
    gate.set()
    waiting.join()
    assert_answer("openai", replies[0], TEXT)
    stream.read_rest()
    upstream.handler = fake.final_text(TEXT)
    assert_answer("openai", running.post("/v1/chat/completions", large), TEXT)


@pytest.mark.parametrize("how", ["packed", "numbered"])
def test_a_large_configuration_may_be_packed_or_numbered(start_worker, upstream, how):
    upstream.handler = fake.final_text(TEXT)
    text = json.dumps(config_of(provider(upstream, models=["m%d" % number for number in range(500)])))
    packed = r.pack_config(text)
    parts = {"LLM_ROUTER_CONFIG_JSON": packed}
    if how == "numbered":
        third = len(packed) // 3 + 1
        names = ("LLM_ROUTER_CONFIG_JSON", "LLM_ROUTER_CONFIG_JSON_2", "LLM_ROUTER_CONFIG_JSON_3")
        parts = {name: packed[third * at : third * (at + 1)] for at, name in enumerate(names)}
    running = start_worker("", env=parts)
    assert_answer("openai", post(running, "openai", "fake/m499"), TEXT)


def test_keys_may_come_from_secrets_of_their_own(start_worker, upstream):
    upstream.handler = fake.final_text(TEXT)
    config = config_of(provider(upstream, apiKeyEnv="FAKE_API_KEY", apiKey="other"))
    running = start_worker(config, env={"FAKE_API_KEY": "from-the-secret"})
    assert post(running, "openai").status == 200
    assert upstream.calls[0].header("authorization") == "Bearer from-the-secret"


@pytest.mark.parametrize("upstream_wire", ["openai", "anthropic"])
@pytest.mark.parametrize("phase", ["before the answer", "in mid-stream"])
def test_a_client_that_leaves_ends_the_upstreams_work(start_worker, upstream, upstream_wire, phase):
    running = start_worker(config_of(provider(upstream, upstream_wire)))
    gate = threading.Event()
    events = fake.STREAMS[upstream_wire]("one and two")
    steps = [fake.Gate(gate), *events] if phase == "before the answer" else [*events[:4], fake.Gate(gate), *events[4:]]
    upstream.answer(fake.sse_answer(steps))
    if phase == "in mid-stream":
        stream = running.open("/v1/chat/completions", ask("openai", stream=True))
        assert stream.read_event()
        stream.reset()
    else:
        client = socket.create_connection((running.host, running.port))
        body = json.dumps(ask("openai", stream=True)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
        client.sendall((head % (KEY, len(body))).encode() + body)
        until(lambda: upstream.calls)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset is seen at once
        client.close()
    try:
        until(lambda: upstream.calls and upstream.calls[0].closed.is_set())
    finally:
        gate.set()
    running.wait_log(" 499 client_gone ")


def test_after_its_last_event_a_translated_stream_gets_no_ping_and_waits_for_no_end_of_the_connection(
    start_worker, upstream
):
    upstream.answer(fake.sse_answer(fake.chat_stream(TEXT), end="hang"))
    running = start_worker(config_of(provider(upstream)), "--keepalive-ms=10", "--idle-timeout-ms=60000")
    reply = post(running, "anthropic", stream=True)
    assert_answer("anthropic", reply, TEXT)
    assert [name for name, _ in reply.events][-1] == "message_stop"


def test_reasoning_that_an_upstream_wants_back_is_remembered_from_a_stream_of_its_own_format(start_worker, upstream):
    """Trap 87: DeepSeek refuses a turn with calls without it, and no client of Chat sends it back."""
    running = start_worker(config_of(provider(upstream, compat="deepseek")))
    upstream.answer(fake.sse_answer(fake.chat_stream("", tool_calls=[("look", {"a": 1})], reasoning="in the book, at the end")))
    first = post(running, "openai", stream=True)
    assert [data for _, data in first.events][-1] == "[DONE]"
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "x"}]
    running.post("/v1/chat/completions", {"messages": ask("openai")["messages"] + turns})
    assert upstream.calls[1].json["messages"][1]["reasoning_content"] == "in the book, at the end"


def test_a_broken_connection_in_an_unwatched_stream_is_told_and_cut(serving):
    events = fake.chat_stream("half of it")
    serving.upstream.answer(fake.sse_answer(events[:3], end="cut"))
    told = assert_stream_error("openai", post(serving, "openai", stream=True))
    assert told.text


@pytest.mark.parametrize("at", [b"event: content_bl", b'event: content_block_delta\ndata: {"type":"con', b'data: {"type": "ping"}', b"\n"])
def test_the_error_of_an_unwatched_stream_stands_alone_wherever_its_connection_broke(serving, at):
    """Behind half a line nobody would find it."""
    serving.upstream.answer(fake.sse_answer([*fake.messages_stream("half of it")[:4], at], end="cut"))
    reply = post(serving, "anthropic", "messages/fake-model", stream=True)
    assert reply.ended == "cut"
    name, data = reply.events[-1]
    assert (name, json.loads(data)["type"]) == ("error", "error")


def test_it_serves_without_a_memory_snapshot_as_well(workers_folder, upstream):
    """All others start from one, as production does."""
    upstream.handler = fake.final_text(TEXT)
    variables = {"LLM_ROUTER_CONFIG_JSON": json.dumps(config_of(provider(upstream))), "LLM_ROUTER_MASTER_KEY": KEY}
    running = RunningWorker(workers_folder / "cold", variables)
    try:
        assert_answer("anthropic", post(running, "anthropic", stream=True), TEXT)
    finally:
        running.kill()


def test_the_uploaded_files_are_those_of_the_repository():
    assert set(project_files()) == {"entry.py", "llm_router.py"}
