"""Requests through the real program, each format to each: answers, headers, log, keys, models, counting, many at once."""

import json
import re
import threading

import pytest

import fake_upstream as fake
from exchanges import (
    PATHS,
    QUICK,
    WIRES,
    Pair,
    ask,
    assert_answer,
    attempts_of,
    error_shape,
    pair_config,
    post,
    read_answer,
    until,
)
from running_router import RunningRouter, config_of, provider

TEXT = 'Grüße aus 東京: "quoted" \\ and 🙂, said the model.'
KEY = "client-master-key-93fa"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One router for the tests that leave nothing behind."""
    with fake.FakeUpstream(fake.final_text(TEXT)) as first, fake.FakeUpstream(fake.final_text(TEXT)) as second:
        first.plain_handler = second.plain_handler = first.handler
        home = tmp_path_factory.mktemp("router")
        running = RunningRouter(pair_config(first, second, masterKey=KEY), QUICK, home, script=True)
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture
def pair(shared):
    with shared.scripted():
        yield shared


# --- answers, each format to each ---


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("upstream_wire", WIRES)
@pytest.mark.parametrize("client_wire", WIRES)
def test_a_client_of_any_format_gets_the_text_of_an_upstream_of_any_format(pair, client_wire, upstream_wire, stream):
    """Traps 1, 10, 44: characters whole, one terminator, the model that was asked for."""
    model = "a-%s/solo" % upstream_wire
    reply = post(pair.router, client_wire, model, stream)
    told = assert_answer(client_wire, reply, TEXT)
    assert told.usage == (11, 7) or (told.usage is None and client_wire == "openai" and stream)  # not asked for there
    same_openai = client_wire == upstream_wire != "anthropic"
    assert told.model == ("fake-model" if same_openai else model)
    assert [(call.wire, call.json["model"]) for call in pair.first.calls] == [(upstream_wire, "solo")]
    assert reply.headers["x-llm-router-model"] == model
    assert attempts_of(reply) == [(model, "ok")]


@pytest.mark.parametrize("wire", WIRES)
def test_a_stream_of_the_clients_own_format_is_relayed_byte_for_byte(pair, wire):
    events = fake.STREAMS[wire](TEXT, tool_calls=[("f", {"a": "ü"})], reasoning="hm")
    pair.first.answer(fake.drip(fake.sse_answer(events), 97))
    reply = post(pair.router, wire, "a-%s/solo" % wire, True)
    expected = b"".join(events)
    if wire == "anthropic":  # its first event names the model, and that is the one the client asked for
        expected = expected.replace(b'"model": "fake-model"', b'"model": "a-anthropic/solo"')
    assert reply.body == expected


@pytest.mark.parametrize("wire", ["openai", "responses"])
def test_a_whole_answer_of_the_clients_own_format_is_relayed_byte_for_byte(pair, wire):
    odd = b'{ "id":"x",  "choices":[{"index":0,"message":{"role":"assistant","content":"\\u0041"},"finish_reason":"stop"}], "extra":[1.50]}'
    if wire == "responses":
        odd = json.dumps(fake.responses_whole("A"), indent=3).encode()
    pair.first.answer(fake.body_answer(200, odd, "application/json"))
    assert post(pair.router, wire, "a-%s/solo" % wire).body == odd


def test_a_request_of_the_upstreams_own_format_keeps_every_byte_but_the_model(pair):
    raw = b'{"messages" : [{"role":"user","content":"\\u00e4 {{7*7}} ${x} %(x)s"}],\n "model":"a-openai/solo", "new_field": 1.50}'
    pair.router.post(PATHS["openai"], raw)
    assert pair.first.calls[0].body == raw.replace(b'"a-openai/solo"', b'"solo"')


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("upstream_wire", WIRES)
@pytest.mark.parametrize("client_wire", WIRES)
def test_a_tool_round_trip_works_between_any_two_formats(pair, client_wire, upstream_wire, stream):
    """Traps 22, 30, 53, 77: one call, its result back upstream, then the text."""
    pair.first.handler = fake.tool_round_trip("look", {"city": "Köln"})
    model = "a-%s/solo" % upstream_wire
    first = post(pair.router, client_wire, model, stream, tools=TOOLS[client_wire])
    assert (first.status, first.ended) == (200, "clean")
    calls = tool_calls(client_wire, first)
    assert [(name, arguments) for _, name, arguments in calls] == [("look", {"city": "Köln"})]
    history = with_result(client_wire, calls[0], "rain")
    second = post(pair.router, client_wire, model, stream, tools=TOOLS[client_wire], **history)
    assert_answer(client_wire, second, "the tool said: rain")


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {
    "openai": [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA}}],
    "anthropic": [{"name": "look", "description": "Look.", "input_schema": SCHEMA}],
    "responses": [{"type": "function", "name": "look", "description": "Look.", "parameters": SCHEMA, "strict": False}],
}


def tool_calls(wire, reply):
    """(id, name, arguments) of each tool call in an answer."""
    if "event-stream" not in reply.headers["content-type"]:
        if wire == "openai":
            made = reply.json["choices"][0]["message"]["tool_calls"]
            return [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in made]
        if wire == "anthropic":
            return [(b["id"], b["name"], b["input"]) for b in reply.json["content"] if b["type"] == "tool_use"]
        items = reply.json["output"]
    elif wire == "responses":
        items = reply.datas[-1]["response"]["output"]
    else:
        return list(streamed_calls(wire, [data for data in reply.datas if isinstance(data, dict)]))
    return [(i["call_id"], i["name"], json.loads(i["arguments"])) for i in items if i["type"] == "function_call"]


def streamed_calls(wire, datas):
    slots = {}
    for data in datas:
        if wire == "openai":
            for part in data["choices"][0]["delta"].get("tool_calls") or [] if data.get("choices") else []:
                slot = slots.setdefault(part["index"], {"id": "", "name": "", "text": ""})
                slot["id"] = slot["id"] or part.get("id", "")
                slot["name"] += part["function"].get("name") or ""
                slot["text"] += part["function"].get("arguments") or ""
        elif data["type"] == "content_block_start" and data["content_block"]["type"] == "tool_use":
            slots[data["index"]] = {
                "id": data["content_block"]["id"],
                "name": data["content_block"]["name"],
                "text": "",
            }
        elif data["type"] == "content_block_delta" and data["index"] in slots:
            slots[data["index"]]["text"] += data["delta"]["partial_json"]
    for slot in slots.values():
        yield slot["id"], slot["name"], json.loads(slot["text"])


def with_result(wire, call, result):
    """The fields of the next request: the history with the call and its result."""
    id, name, arguments = call
    text = json.dumps(arguments)
    if wire == "responses":
        items = [{"role": "user", "content": "What weather?"}]
        items.append({"type": "function_call", "call_id": id, "name": name, "arguments": text})
        return {"input": items + [{"type": "function_call_output", "call_id": id, "output": result}]}
    messages = [{"role": "user", "content": "What weather?"}]
    if wire == "openai":
        made = {"id": id, "type": "function", "function": {"name": name, "arguments": text}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [made]})
        messages.append({"role": "tool", "tool_call_id": id, "content": result})
    else:
        messages.append(
            {"role": "assistant", "content": [{"type": "tool_use", "id": id, "name": name, "input": arguments}]}
        )
        messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": id, "content": result}]})
    return {"messages": messages}


@pytest.mark.parametrize("path", ["/route", "/router", "/route/v1", "/v1", "/"])
@pytest.mark.parametrize("wire", WIRES)
def test_a_unified_path_answers_in_the_format_of_the_body(pair, path, wire):
    body = ask(wire, "a-%s/solo" % wire)
    if wire == "anthropic":
        body["system"] = "Be brief."
    reply = pair.router.post(path, body)
    assert_answer(wire, reply, TEXT)


@pytest.mark.parametrize(
    "path",
    [
        "/anthropic/v1/messages",
        "/anthropic/messages",
        "/anthropic",
        "/route/anthropic/v1/messages",
        "/v1/messages?beta=true",
        "/v1/messages/",
    ],
)
def test_every_spelling_of_the_anthropic_path_works(pair, path):
    """Trap 111."""
    assert_answer("anthropic", pair.router.post(path, ask("anthropic", "a-anthropic/solo")), TEXT)


def test_a_name_with_a_bracketed_suffix_finds_its_model_and_is_echoed(pair):
    """Trap 190."""
    reply = post(pair.router, "anthropic", "a-anthropic/solo[1m]")
    assert assert_answer("anthropic", reply, TEXT).model == "a-anthropic/solo[1m]"
    assert pair.first.calls[0].json["model"] == "solo"


def test_without_a_model_the_default_model_answers(pair):
    reply = post(pair.router, "openai")
    assert reply.headers["x-llm-router-model"] == "a-openai/solo"
    assert post(pair.router, "openai", "smart").headers["x-llm-router-model"] == "a-openai/solo"


def test_tokens_are_asked_for_or_counted_whether_or_not_a_chat_client_asks(pair):
    """Trap 56: the extra chunk only for a client that asked."""
    plain = post(pair.router, "openai", "a-anthropic/solo", True)
    assert [data for data in plain.datas if isinstance(data, dict) and data.get("usage")] == []
    asked = post(pair.router, "openai", "a-anthropic/solo", True, stream_options={"include_usage": True})
    told = [data for data in asked.datas if isinstance(data, dict) and data.get("usage")]
    assert [(data["choices"], data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"]) for data in told] == [
        ([], 11, 7)
    ]


# --- headers and log ---


def test_request_ids_and_rate_limits_reach_clients_of_the_upstreams_format_only(pair):
    told = {
        "request-id": "up-1",
        "x-ratelimit-remaining-requests": "5",
        "anthropic-ratelimit-tokens-remaining": "9",
        "retry-after": "3",
    }
    private = {
        "set-cookie": "a=b",
        "location": "http://x/",
        "x-api-key": "first-provider-key",
        "server": "nginx",
        "openai-organization": "org",
    }
    for client, seen in (("anthropic", True), ("openai", False)):
        for stream in (False, True):
            events = fake.messages_stream(TEXT)
            answer = (
                fake.sse_answer(events, headers=dict(told, **private))
                if stream
                else fake.json_answer(200, fake.messages_whole(TEXT), dict(told, **private))
            )
            pair.first.answer(answer)
            reply = post(pair.router, client, "a-anthropic/solo", stream)
            assert [reply.headers.get(name) for name in told] == (list(told.values()) if seen else [None] * len(told))
            assert [name for name in private if reply.headers.get(name)] == []


def test_a_client_header_goes_upstream_only_where_its_format_knows_it(pair):
    sent = {
        "anthropic-beta": "x-1,y-2",
        "anthropic-version": "2026-10-21",
        "openai-organization": "org",
        "openai-project": "p",
        "traceparent": "00-1",
        "cookie": "c=1",
        "x-forwarded-for": "1.2.3.4",
    }
    post(pair.router, "anthropic", "a-anthropic/solo", headers=sent)
    post(pair.router, "anthropic", "a-openai/solo", headers=sent)
    same, other = pair.first.calls
    assert (same.header("anthropic-beta"), same.header("anthropic-version"), same.header("traceparent")) == (
        "x-1,y-2",
        "2026-10-21",
        "00-1",
    )
    assert [name for name in sent if other.header(name)] == []
    assert [
        name for name in ("openai-organization", "openai-project", "cookie", "x-forwarded-for") if same.header(name)
    ] == []
    assert same.header("accept-encoding") == "identity"
    assert (same.header("x-api-key"), other.header("authorization")) == (
        "first-provider-key",
        "Bearer first-provider-key",
    )
    assert (same.header("authorization"), other.header("x-api-key")) == (None, None)


def test_the_clients_key_never_goes_upstream_and_the_providers_key_never_comes_back(pair):
    """Traps 183, hardening 12: searched in every recorded request, answer and log line, also when the upstream echoes it."""
    carriers = ({"authorization": "Bearer " + KEY}, {"x-api-key": KEY}, {"api-key": KEY})
    seen = []
    for number, headers in enumerate(carriers):
        for wire in WIRES:
            for status in (200, 400, 401, 402, 404, 429, 500):
                echo = "bad key first-provider-key in %s" % "Bearer first-provider-key"
                pair.clear()
                if status != 200:
                    pair.first.handler = lambda call, status=status, echo=echo: fake.error_answer(
                        call.wire, status, echo, headers={"x-echo": "first-provider-key"}
                    )
                if number and status not in (200, 400):
                    continue
                for client in (wire, WIRES[(WIRES.index(wire) + 1) % 3]):
                    reply = post(pair.router, client, "a-%s/solo" % wire, stream=status == 400, headers=headers)
                    seen.append(reply.body + str(reply.headers).encode())
                    for call in pair.first.calls:
                        assert KEY.encode() not in call.body + repr(call.headers).encode() + call.path.encode()
    assert not any(b"first-provider-key" in answer for answer in seen)
    pair.router.wait_log(reply.headers["x-llm-router-request-id"])
    log = "\n".join(pair.router.log() + pair.router.stdout())
    assert "first-provider-key" not in log
    assert KEY not in log


def test_an_error_the_upstream_puts_in_a_stream_shows_no_provider_key(pair):
    """Hardening 12, in mid-stream and as the first event."""
    for client in WIRES:
        for wire in WIRES:
            for events in ([], fake.STREAMS[wire](TEXT)[:6]):
                pair.first.answer(fake.sse_answer(events + [stream_error(wire, "key first-provider-key is bad")]))
                reply = post(pair.router, client, "a-%s/solo" % wire, True)
                assert b"first-provider-key" not in reply.body, (client, wire, len(events))
                pair.clear()


def stream_error(wire, message, kind="api_error"):
    """An error event of a wire format."""
    error = {"type": kind, "message": message, "code": None}
    if wire == "anthropic":
        return fake.sse({"type": "error", "error": error}, "error")
    if wire == "responses":
        response = dict(fake.responses_whole(status="failed"), error={"code": kind, "message": message})
        return fake.sse({"type": "response.failed", "sequence_number": 1, "response": response}, "response.failed")
    return fake.sse({"error": error})


def test_each_request_leaves_one_log_line_that_tells_its_story(pair):
    pair.first.answer(
        fake.error_answer("anthropic", 429),
        fake.error_answer("anthropic", 500),
        fake.error_answer("anthropic", 500),
        fake.error_answer("anthropic", 500),
    )
    limited = post(pair.router, "anthropic", "a-anthropic/to-openai", True)
    failing = post(pair.router, "openai", "a-anthropic/to-openai")
    line = pair.router.wait_log(limited.headers["x-llm-router-request-id"])
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z req_\w+ anthropic~ a-anthropic/to-openai 200 ok \[", line)
    assert "a-anthropic/to-openai=429" in line
    assert "fall back to b-openai/m" in line
    assert "b-openai/m=ok" in line
    assert re.search(r"tokens=11>7 first=\d+ms total=\d+ms$", line)
    line = pair.router.wait_log(failing.headers["x-llm-router-request-id"])
    assert line.count("a-anthropic/to-openai=500") == 3
    assert re.search(r"=500 after \d+ms \d+ms -> retry in \d+ ms", line)
    assert "Say hello" not in "\n".join(pair.router.log())


def test_a_model_name_with_control_characters_stays_one_log_line_and_one_header(pair):
    """Hardening 40: nothing a client sends breaks a line or colours a terminal."""
    post(pair.router, "openai", "evil\r\nX-Injected: 1\x1b[31m\u2028")
    pair.router.wait_log("evil")
    assert not any(char in line for line in pair.router.log() for char in "\x1b\r\u2028")
    assert not any(line.startswith("X-Injected") for line in pair.router.log())


def test_the_json_log_has_every_attempt_with_its_outcome_wait_and_decision(router, upstream):
    upstream.answer(fake.error_answer("openai", 500))
    running = router(config_of(provider(upstream)), "--log-format=json", *QUICK)
    reply = post(running, "openai", "fake/fake-model")
    record = json.loads(running.wait_log(reply.headers["x-llm-router-request-id"]))
    assert (record["asked"], record["model"], record["status"], record["outcome"], record["stream"]) == (
        "fake/fake-model",
        "fake/fake-model",
        200,
        "ok",
        False,
    )
    first, second = record["attempts"]
    assert (first["label"], first["kind"], second["label"]) == ("500", "temporary", "ok")
    assert first["decision"].startswith("retry in ")
    assert second["wait_ms"] >= 1
    assert (record["usage"]["input"], record["usage"]["output"]) == (11, 7)


# --- models, health, counting, embeddings ---


def test_what_is_nested_too_deeply_is_refused_in_words_and_ends_nothing(pair):
    """Deep enough to end Python's own recursion, and deep enough to end the stack that it stands on."""
    blocks = b'[{"type": "tool_result", "tool_use_id": "t", "content":' * 400 + b'"x"' + b"}]" * 400
    for nested in (blocks, b"[" * 5000 + b"]" * 5000, b'{"a":' * 100_000):
        body = b'{"model": "a-openai/solo", "max_tokens": 5, "messages": [{"role": "user", "content": %s}]}' % nested
        reply = pair.router.post("/v1/messages", body)
        assert reply.status == 400
        assert error_shape("anthropic", reply.json)["type"] == "invalid_request_error"
    assert pair.first.calls == []
    assert_answer("anthropic", post(pair.router, "anthropic", "a-openai/solo"), TEXT)


def test_the_model_list_has_both_shapes(pair):
    for path, headers, anthropic in (
        ("/v1/models", {}, False),
        ("/models", {}, False),
        ("/anthropic/v1/models", {}, True),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, True),
    ):
        body = pair.router.get(path, headers).json
        names = [entry["id"] for entry in body["data"]]
        assert {"smart", "a-openai/solo", "b-responses/m"} <= set(names)
        entry = body["data"][names.index("a-openai/solo")]
        assert (
            ("created_at" in entry and entry["type"] == "model")
            if anthropic
            else (entry["object"] == "model" and isinstance(entry["created"], int))
        )
        assert (body["first_id"], body["last_id"], body["has_more"]) == (names[0], names[-1], False)
    assert pair.calls() == (0, 0)


def test_the_model_list_is_paged(pair):
    first = pair.router.get("/anthropic/v1/models?limit=2").json
    assert (len(first["data"]), first["has_more"]) == (2, True)
    second = pair.router.get("/anthropic/v1/models?limit=2&after_id=" + first["last_id"]).json
    assert {entry["id"] for entry in first["data"]}.isdisjoint(entry["id"] for entry in second["data"])
    back = pair.router.get("/anthropic/v1/models?limit=2&before_id=" + second["first_id"]).json
    assert (back["data"], back["has_more"]) == (first["data"], False)
    nearest = pair.router.get("/anthropic/v1/models?limit=1&before_id=" + second["first_id"]).json
    assert (nearest["data"], nearest["has_more"]) == (first["data"][1:], True)
    last = pair.router.get("/anthropic/v1/models?limit=1&after_id=b-responses/m").json
    assert (last["data"], last["has_more"], last["first_id"], last["last_id"]) == ([], False, None, None)


def test_one_model_is_found_under_its_whole_name(pair):
    assert pair.router.get("/v1/models/a-openai/solo").json["id"] == "a-openai/solo"
    assert pair.router.get("/v1/models/a-openai%2Fsolo").json["id"] == "a-openai/solo"
    assert pair.router.get("/v1/models/a-openai/solo[1m]").json["id"] == "a-openai/solo[1m]"
    assert pair.router.get("/v1/models/nobody/has-it").status == 404


def test_count_tokens_is_forwarded_where_the_upstream_can_count(pair):
    pair.first.answer(fake.json_answer(200, {"input_tokens": 4321}))
    reply = pair.router.post(
        "/v1/messages/count_tokens?beta=true", ask("anthropic", "a-anthropic/solo", thinking={"type": "adaptive"})
    )
    assert (reply.status, reply.json) == (200, {"input_tokens": 4321})
    call = pair.first.calls[0]
    assert (call.path, call.json["model"], call.json["thinking"]) == (
        "/v1/messages/count_tokens",
        "solo",
        {"type": "adaptive"},
    )


@pytest.mark.parametrize(
    "answer",
    [
        fake.error_answer("anthropic", 404),
        fake.error_answer("anthropic", 401),
        fake.error_answer("anthropic", 500),
        fake.text_answer(200, "<html>no</html>"),
        fake.json_answer(200, {"input_tokens": "many"}),
        fake.json_answer(200, {"input_tokens": -1}),
        fake.close_before_head(),
        fake.reset_before_head(),
    ],
    ids=["404", "401", "500", "html", "odd", "negative", "closed", "reset"],
)
def test_count_tokens_is_estimated_whatever_the_upstream_does(pair, answer):
    """Traps 115, 116, 118."""
    pair.first.answer(answer)
    reply = pair.router.post("/v1/messages/count_tokens", ask("anthropic", "a-anthropic/solo", text="word " * 1000))
    assert reply.status == 200
    assert 1000 <= reply.json["input_tokens"] <= 4000
    assert len(pair.first.calls) <= 1


def test_count_tokens_of_an_upstream_of_another_format_is_estimated_without_a_call(pair):
    reply = pair.router.post("/v1/messages/count_tokens", ask("anthropic", "a-openai/solo"))
    assert (reply.status, list(reply.json)) == (200, ["input_tokens"])
    assert pair.calls() == (0, 0)


def test_count_tokens_never_touches_health_nor_waits_for_a_silent_upstream(router, make_upstream):
    """Trap 118: a 404 for counting must not bench the model."""
    first, second = make_upstream(), make_upstream()
    running = router(pair_config(first, second), "--count-tokens-timeout-ms=1000")
    first.answer(
        fake.hang_before_head(),
        fake.error_answer("anthropic", 404),
        fake.error_answer("anthropic", 401),
        fake.error_answer("anthropic", 529),
    )
    for _ in range(4):
        body = ask("anthropic", "a-anthropic/to-anthropic")
        assert running.post("/v1/messages/count_tokens", body, timeout=30).status == 200  # an answer may take 600 s by default
    reply = post(running, "anthropic", "a-anthropic/to-anthropic")
    assert attempts_of(reply) == [("a-anthropic/to-anthropic", "ok")]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("upstream_wire", ["openai", "anthropic"])
def test_a_responses_client_may_refer_to_what_the_router_wrote_unless_it_said_store_false(pair, upstream_wire, stream):
    """The AI SDK sends `item_reference` for the texts and thoughts of earlier turns: `store` is true by default."""
    model = "a-%s/solo" % upstream_wire
    pair.first.handler = fake.final_text("the first answer", reasoning="hm")

    def turn(*items, **more):
        told = post(pair.router, "responses", model, stream, input=[{"role": "user", "content": "hi"}, *items], **more)
        done = [json.loads(data) for name, data in told.events if name == "response.completed"] if stream else []
        return told, (done[0]["response"] if done else told.json if not stream else {}).get("output", [])

    def references(output):
        return [{"type": "item_reference", "id": item["id"]} for item in output]

    _, output = turn()
    assert [item["type"] for item in output] == ["reasoning", "message"]
    told, _ = turn(*references(output), {"role": "user", "content": "and now?"})
    assert told.status == 200
    assert "the first answer" in json.dumps(pair.first.calls[-1].json["messages"][1])
    _, unkept = turn(store=False)
    told, _ = turn(*references(unkept))
    assert told.status == 400
    assert "item_reference" in told.json["error"]["message"]


def test_a_thread_goes_on_at_its_own_provider_only_and_elsewhere_begins_anew(pair):
    """What one Anthropic provider keeps, another has not: the SDK is told the code on which it sends everything."""
    pair.first.handler = lambda call: fake.error_answer("anthropic", 503)
    going_on = {"thread": {"type": "continue", "previous_message_id": "msg_1"}}
    reply = post(pair.router, "anthropic", "a-anthropic/to-anthropic", **going_on)
    assert (reply.status, reply.json["error"]["details"]) == (400, {"error_code": "thread_not_found"})
    assert pair.second.calls == []
    begun = post(pair.router, "anthropic", "a-anthropic/to-anthropic", thread={"type": "create"})
    assert_answer("anthropic", begun, TEXT)
    assert pair.second.calls[0].json["thread"] == {"type": "create"}


def test_embeddings_pass_through_and_never_fall_back_to_another_model(pair):
    body = {"model": "a-openai/to-openai", "input": ["a"], "encoding_format": "base64"}
    reply = pair.router.post("/v1/embeddings", body)
    assert reply.json["data"][0]["embedding"] == "AACAPgAAAL8="
    assert (pair.first.calls[0].path, pair.first.calls[0].json) == ("/v1/embeddings", dict(body, model="to-openai"))
    pair.first.handler = lambda call: fake.error_answer("openai", 429)
    assert pair.router.post("/v1/embeddings", body).status == 429
    assert len(pair.second.calls) == 0


def test_embeddings_go_on_to_the_same_model_of_another_provider(router, make_upstream):
    first, second = make_upstream(), make_upstream()
    rows = [provider(first, id="first", models=["e"]), provider(second, id="second", models=["e", "other"])]
    both = {"same": ["first/e", "second/e"], "mixed": ["first/e", "second/other"]}
    running = router(config_of(*rows, modelAliases=both), *QUICK)
    first.handler = lambda call: fake.error_answer("openai", 429)
    reply = running.post("/v1/embeddings", {"model": "same", "input": "a"})
    assert (reply.status, reply.headers["x-llm-router-model"]) == (200, "second/e")
    assert running.post("/v1/embeddings", {"model": "mixed", "input": "a"}).status == 429
    assert [call.json["model"] for call in second.calls] == ["e"]


def test_embeddings_of_a_model_that_is_not_openai_format_are_refused_in_words(pair):
    reply = pair.router.post("/v1/embeddings", {"model": "a-anthropic/solo", "input": "a"})
    assert reply.status == 400
    assert "a-anthropic/solo" in reply.json["error"]["message"]
    assert pair.calls() == (0, 0)


# --- keep-alives ---


@pytest.fixture(scope="module")
def shared_lively(tmp_path_factory):
    """A router that speaks after 40 ms of silence."""
    with fake.FakeUpstream(fake.final_text(TEXT)) as first, fake.FakeUpstream(fake.final_text(TEXT)) as second:
        first.plain_handler = second.plain_handler = first.handler
        flags = QUICK + ("--keepalive-ms=40",)
        running = RunningRouter(pair_config(first, second), flags, tmp_path_factory.mktemp("router"), script=True)
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture
def lively(shared_lively):
    with shared_lively.scripted():
        yield shared_lively


@pytest.mark.parametrize("upstream_wire", WIRES)
@pytest.mark.parametrize("client_wire", WIRES)
def test_a_silent_stream_gets_comments_before_its_first_event_and_pings_only_after_message_start(
    lively, client_wire, upstream_wire
):
    """Traps 45, 57, 132."""
    events = fake.STREAMS[upstream_wire](TEXT)
    cut = len(events) // 2
    # One ping is the fake upstream's own, where it is an Anthropic one; the others are the router's.
    sign, own = ("event: ping", upstream_wire == "anthropic") if client_wire == "anthropic" else (": keep-alive", 0)
    first, second = threading.Event(), threading.Event()
    lively.first.answer(fake.sse_answer([fake.Gate(first), *events[:cut], fake.Gate(second), *events[cut:]]))
    stream = lively.router.open(PATHS[client_wire], ask(client_wire, "a-%s/solo" % upstream_wire, stream=True))
    assert stream.headers["x-llm-router-request-id"].startswith("req_")
    assert stream.read_until(": keep-alive", 2)
    first.set()
    assert stream.read_until("data:") and stream.read_until(sign, stream.body.count(sign.encode()) + 2 + own)
    second.set()
    reply = stream.read_rest()
    told = assert_answer(client_wire, reply, TEXT)
    assert told.complete
    start = reply.body.index(b"data:")
    assert reply.body[:start].count(b": keep-alive") >= 2
    names = [name for name, _ in reply.events]
    if client_wire == "anthropic":
        assert names.index("message_start") < names.index("ping")
        assert names[-1] == "message_stop"
    else:
        assert "ping" not in names


@pytest.mark.parametrize("comes_at_once", [True, False])
def test_no_ping_follows_an_answer_that_is_complete_while_its_upstream_holds_the_connection(lively, comes_at_once):
    """Trap 45. A second stream tells when the silence has been long enough for pings."""
    last, held, silent = threading.Event(), threading.Event(), threading.Event()
    request, events = ask("anthropic", "a-anthropic/solo", stream=True), fake.STREAMS["anthropic"](TEXT)
    parts = [b"".join(events)] if comes_at_once else [*events[:-1], fake.Gate(last), events[-1]]
    lively.first.answer(fake.sse_answer([*parts, fake.Gate(held)]))
    stream = lively.router.open(PATHS["anthropic"], request)
    assert stream.read_until("content_block_delta")
    last.set()
    assert stream.read_until("event: message_stop")
    lively.first.answer(fake.sse_answer([fake.Gate(silent), *events]))
    other = lively.router.open(PATHS["anthropic"], request)
    assert other.read_until(": keep-alive", 3)
    held.set()
    assert stream.read_rest().events[-1][0] == "message_stop"
    silent.set()
    assert assert_answer("anthropic", other.read_rest(), TEXT).complete


def test_a_whole_answer_gets_no_keep_alive(lively):
    lively.first.answer(fake.later(fake.json_answer(200, fake.chat_whole(TEXT)), 0.15))
    reply = post(lively.router, "openai", "a-openai/solo")
    assert reply.json == fake.chat_whole(TEXT)
    assert reply.headers["content-type"] == "application/json"


# --- many at once ---


def test_sixty_streams_at_once_each_get_their_own_text(pair):
    def handler(call):
        return fake.sse_answer(fake.chat_stream(call.json["messages"][0]["content"] * 20), delay=0.01)

    pair.first.handler = handler
    failures = []

    def one(number):
        reply = post(pair.router, WIRES[number % 3], "a-openai/solo", True, text="<%d>" % number)
        told = read_answer(WIRES[number % 3], reply)
        if (told.text, told.complete) != ("<%d>" % number * 20, True):
            failures.append((number, reply))

    workers = [threading.Thread(target=one, args=(number,)) for number in range(60)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_the_first_tokens_come_before_the_last_are_there(pair):
    """Nothing on the way waits for more than one event."""
    gate = threading.Event()
    for client in WIRES:
        for wire in WIRES:
            gate.clear()
            events = fake.STREAMS[wire](TEXT)
            cut = next(n for n, event in enumerate(events) if b"Gr" in event) + 1
            pair.first.answer(fake.sse_answer([*events[:cut], fake.Gate(gate), *events[cut:]]))
            stream = pair.router.open(PATHS[client], ask(client, "a-%s/solo" % wire, stream=True))
            assert stream.read_until("Gr"), (client, wire)
            gate.set()
            assert_answer(client, stream.read_rest(), TEXT)


def test_the_whole_log_of_the_shared_router_holds_no_error_of_its_own(pair):
    post(pair.router, "openai", "a-openai/solo")
    until(pair.router.log)
    assert not [
        line for line in pair.router.log() if "internal error" in line or "Traceback" in line or "xception" in line
    ]
