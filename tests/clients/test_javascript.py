"""The JavaScript SDKs and the Vercel AI SDK through the router: a tool round trip over each upstream format, whole and
streamed; the same with an origin that fails, so that a fallback of another format serves; and how they take errors.

One Node process (drive.mjs) holds all the clients, and one router all the providers.
"""

import json
import shutil
import subprocess

import pytest

import fake_upstream as fake
from exchanges import QUICK, WIRES, Pair, pair_config
from fake_upstream import Answer, FakeUpstream, tool_results, tool_round_trip
from real_clients import HERE, missing
from running_router import RunningRouter

CITY = {"city": "Paris"}
FINAL = "the tool said: sunny in Paris"
# client -> (its format, why a tool call ends an answer, why a text does)
CLIENTS = {
    "openai chat": ("openai", "tool_calls", "stop"),
    "openai responses": ("responses", "completed", "completed"),
    "anthropic": ("anthropic", "tool_use", "end_turn"),
    "anthropic of 2023": ("anthropic", "tool_use", "end_turn"),
    "anthropic runner": ("anthropic", None, "end_turn"),
    "ai openai": ("responses", "tool-calls", "stop"),
    "ai openai chat": ("openai", "tool-calls", "stop"),
    "ai anthropic": ("anthropic", "tool-calls", "stop"),
    "ai compatible": ("openai", "tool-calls", "stop"),
}
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
every_client = pytest.mark.parametrize("client", sorted(CLIENTS))


@pytest.fixture(scope="module")
def node():
    """`node(client, url, **fields)`: what drive.mjs tells of one client's work."""
    program = shutil.which("node")
    if not program:
        missing("node is not installed")
    if not (HERE / "node_modules" / "openai").is_dir():
        missing("the JavaScript SDKs are not installed: run `npm ci --ignore-scripts` in tests/clients")
    process = subprocess.Popen(
        [program, "drive.mjs"], cwd=str(HERE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )

    def ask(client, url, **fields):
        process.stdin.write(json.dumps(dict(fields, client=client, url=url)) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with FakeUpstream() as first, FakeUpstream() as second:
        running = RunningRouter(pair_config(first, second), QUICK, tmp_path_factory.mktemp("router"))
        for upstream in (first, second):
            upstream.plain_handler = upstream.handler
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture
def pair(shared):
    with shared.scripted():
        shared.first.handler = shared.second.handler = tool_round_trip("weather", CITY, reasoning="Let me look.")
        yield shared


def check(client, told, model, stream):
    _, call_end, end = CLIENTS[client]
    assert "error" not in told, told
    assert (told["text"], told["asked"], told["usage"]) == (FINAL, ["Paris"], [11, 7])
    assert told["ends"] == [call_end, end] if call_end else told["ends"][-1] == end
    assert told.get("model", model) == model


def chats(upstream, wire):
    """The conversation's two calls, both in the upstream's format; the key of the client is in neither."""
    calls = [call for call in upstream.calls if call.wire and "thread" not in call.json]
    assert [call.wire for call in calls] == [wire, wire]
    assert tool_results(calls[1].json) == ["sunny in Paris"]
    assert "dummy" not in str([call.headers for call in calls])


@both
@pytest.mark.parametrize("upstream_wire", WIRES)
@every_client
def test_a_tool_round_trip_over_each_upstream_format(node, pair, client, upstream_wire, stream):
    model = "b-%s/m" % upstream_wire
    check(client, node(client, pair.router.url, model=model, stream=stream, retries=0), model, stream)
    chats(pair.second, upstream_wire)


@both
@every_client
def test_a_fallback_of_another_format_serves_when_the_origin_fails(node, pair, client, stream):
    """Streams break off before their first content, whole requests are refused: the client sees neither."""
    wire = CLIENTS[client][0]
    other = WIRES[WIRES.index(wire) - 1]
    model = "a-%s/to-%s" % (wire, other)

    def failing(call):
        if not stream:
            return fake.error_answer(wire, 503)
        return fake.sse_answer(fake.STREAMS[wire]("never seen", done=False)[:1], end="reset")

    pair.first.handler = failing
    check(client, node(client, pair.router.url, model=model, stream=stream, retries=0), model, stream)
    assert len(pair.first.calls) >= 2
    chats(pair.second, other)


@every_client
def test_an_unknown_model_is_an_error_with_its_status(node, pair, client):
    told = node(client, pair.router.url, model="no/such", stream=False, retries=2)
    assert told["status"] == 404
    assert "no/such" in told["message"]
    assert pair.calls() == (0, 0)


def test_the_model_lists_are_paged_through(node, pair):
    told = node("models", pair.router.url, limit=2)
    assert told["paged"] == told["listed"]
    assert len(told["paged"]) == len(set(told["paged"])) > 10


def thread_server(name, fails_on=()):
    """An upstream that keeps threads: the first turn calls the tool, what continues its own answer `name` ends it. The name has five letters."""

    def handler(call):
        thread = call.json.get("thread") or {}
        if thread.get("type") in fails_on:
            return fake.error_answer("anthropic", 503)
        if thread.get("type") == "continue" and thread["previous_message_id"] != name:
            error = {"type": "invalid_request_error", "message": "no such thread"}
            error["details"] = {"error_code": "thread_not_found"}
            return fake.json_answer(404, {"type": "error", "error": error})
        results = tool_results(call.json)
        fields = {"text": "the tool said: " + results[-1]} if results else {"tool_calls": [("weather", CITY)]}
        answer = fake.model_answer(call.wire, bool(call.json.get("stream")), **fields)
        return Answer(*(step.replace(b'"msg_1"', b'"%s"' % name.encode()) for step in answer.steps))

    return handler


def threads_of(upstream):
    return [(call.json.get("thread") or {}).get("type") for call in upstream.calls]


@both
def test_a_thread_is_kept_where_the_server_keeps_it(node, pair, stream):
    pair.first.handler = thread_server("msg_a")
    model = "a-anthropic/to-openai"
    told = node("anthropic runner", pair.router.url, model=model, stream=stream, retries=0)
    check("anthropic runner", told, model, stream)
    assert threads_of(pair.first) == ["create", "continue"]
    assert pair.second.calls == []


@both
@pytest.mark.parametrize("fallback", WIRES)
def test_a_thread_whose_server_fails_is_replayed_at_the_fallback(node, pair, fallback, stream):
    """The SDK sends the whole conversation anew when it is told `thread_not_found` (CLIENTS.md, 4)."""
    first = thread_server("msg_a", fails_on=["continue"])
    pair.first.handler = lambda call: first(call) if len(pair.first.calls) < 3 else fake.error_answer("anthropic", 503)
    pair.second.handler = thread_server("msg_b")
    model = "a-anthropic/to-" + fallback
    told = node("anthropic runner", pair.router.url, model=model, stream=stream, retries=0)
    check("anthropic runner", told, model, stream)
    assert threads_of(pair.first)[:2] == ["create", "continue"]
    assert "continue" not in threads_of(pair.second)


def test_a_thread_that_its_server_has_forgotten_is_replayed_there_and_benches_nobody(node, pair):
    servers = [thread_server("msg_a"), thread_server("msg_g")]

    def forgetful(call):
        return (servers.pop() if len(servers) == 2 else servers[0])(call)

    pair.first.handler = forgetful
    told = node("anthropic runner", pair.router.url, model="a-anthropic/to-anthropic", stream=False, retries=0)
    check("anthropic runner", told, "a-anthropic/to-anthropic", False)
    assert threads_of(pair.first) == ["create", "continue", "create"]
    assert pair.second.calls == []
