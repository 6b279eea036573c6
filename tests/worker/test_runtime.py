"""What is the Worker's own: who may call, where the configuration comes from, a client that leaves, a snapshot."""

import json
import socket
import struct
import threading

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import ask, assert_answer, assert_stream_error, post, until
from running_router import config_of, provider
from running_worker import KEY, RunningWorker, project_files

TEXT = "said by the upstream"
GUARDED = ("/metrics", "/v1/models", "/v1/models/x", "/nothing", "/_router/status", "/v1/chat/completions")


@pytest.fixture
def serving(start_worker, upstream):
    upstream.handler = fake.final_text(TEXT)
    running = start_worker(config_of(provider(upstream)))
    running.upstream = upstream
    return running


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


def test_a_broken_connection_in_an_unwatched_stream_is_told_and_cut(serving):
    events = fake.chat_stream("half of it")
    serving.upstream.answer(fake.sse_answer(events[:3], end="cut"))
    told = assert_stream_error("openai", post(serving, "openai", stream=True))
    assert told.text


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
