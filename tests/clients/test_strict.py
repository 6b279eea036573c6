"""What the router writes, read strictly by the real SDKs: typed models, stream accumulators and error classes.

Every event and answer must be valid for the SDK's own models (known discriminators, required fields, no wrong types, no
field that nobody has heard of), and what the SDK gathers from a stream must be what the upstream said.
"""

import contextlib
import json
from pathlib import Path

import pytest

import llm_router as R
from real_clients import sdk
from sse_decoder import SseDecoder

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus"
WIRES = sorted(R.WIRE_FORMATS)
PAIRS = [(source, target) for source in WIRES for target in WIRES]
CROSSED = [(source, target) for source, target in PAIRS if source != target]
UNHAPPY = ("Length", "ContentFilter")
URLS = {"openai": "/chat/completions", "anthropic": "/v1/messages", "responses": "/responses"}

# Fields beyond the SDK's models that the router writes on purpose, as other providers and clients do.
# `store` is in OpenAI's own answers; openai 2 wants `name` where a call's arguments are done, openai 3 has it no more.
EXTENSIONS = {"reasoning_content", "reasoning_details", "citations", "store", "name"}

TOOLS = [
    R.Tool("look", "", {"type": "object", "properties": {}}),
    R.Tool("go", "", {"type": "object", "properties": {}}),
]
REQUEST = R.ChatRequest("asked-for", [R.Message("user", [R.Text("hi")])], tools=TOOLS, stream=True, include_usage=True)
USAGE = R.Usage(5, 9, 3, 2, 4)
CALLS = [R.ToolCall("call_1", "look", '{"a":"ä","b":[1,{"c":null}]}'), R.ToolCall("call_2", "go", "{}")]
ANSWERS = {
    "text": ([R.Text('Grüße, "世界" 🎉\n\u2028 end')], "end_turn"),
    "two texts": ([R.Text("one "), R.Text("two")], "end_turn"),
    "reasoning": ([R.Thinking("let me see"), R.Text("yes")], "end_turn"),
    "reasoning between": ([R.Thinking("a"), R.Text("b"), R.Thinking("c"), R.Text("d")], "end_turn"),
    "signed": ([R.Thinking("hm", {"anthropic": {"signature": "c2ln"}}), R.Text("yes")], "end_turn"),
    "only reasoning": ([R.Thinking("let me see")], "max_tokens"),
    "a call": (CALLS[:1], "tool_use"),
    "calls in parallel": ([R.Text("wait"), *CALLS], "tool_use"),
    "reasoning and calls": ([R.Thinking("which tool?"), *CALLS], "tool_use"),
    "refusal": ([R.Refusal("I will not.")], "refusal"),
    "length": ([R.Text("cut of")], "max_tokens"),
    "window": ([R.Text("full")], "model_context_window_exceeded"),
    "stop text": ([R.Text("until")], "stop_sequence"),
    "pause": ([R.Text("wait")], "pause_turn"),
    "nothing": ([], "end_turn"),
}


def context_of(request=REQUEST):
    return R.Context(request, "req_1", 1700000000)


def answer(name):
    blocks, stop = ANSWERS[name]
    stop_text = "END" if stop == "stop_sequence" else ""
    return R.ChatResponse("msg_1", "m", blocks, stop, stop_text, None if name == "nothing" else USAGE, 1700000000)


def streamed(wire, response):
    """The stream of an answer, its text in pieces of three characters."""
    render = R.WIRE_FORMATS[wire].renderer(context_of()).render
    out = []
    for event in R.unfold(response):
        text = event.text if isinstance(event, R.Delta) else None
        pieces = [event] if text is None else [R.Delta(text[at : at + 3]) for at in range(0, len(text), 3)]
        out.extend(map(render, pieces))
    return b"".join(out)


def passed(source, target, raw, context):
    processor = R.make_processor(source, target, context)
    out = b"".join(processor.feed(raw[at : at + 1000]) for at in range(0, len(raw), 1000))
    return out + processor.finish()


# ---- strict models


@pytest.fixture(scope="module")
def models():
    """Wire -> validators of (an event, a whole answer)."""
    openai, anthropic = sdk("openai"), sdk("anthropic")
    from openai.types.responses import Response, ResponseStreamEvent
    from pydantic import TypeAdapter

    return {
        "openai": (TypeAdapter(openai.types.chat.ChatCompletionChunk), TypeAdapter(openai.types.chat.ChatCompletion)),
        "responses": (TypeAdapter(ResponseStreamEvent), TypeAdapter(Response)),
        "anthropic": (
            TypeAdapter(anthropic.types.RawMessageStreamEvent),
            TypeAdapter(anthropic.types.Message),
        ),
    }


def unknown_fields(value, path=""):
    """The fields of a model, at any depth, that its class does not declare."""
    if isinstance(value, list):
        return [found for item in value for found in unknown_fields(item, path + "[]")]
    if not hasattr(value, "model_fields_set"):
        return []
    names = [path + "." + name for name in value.model_extra or () if name not in EXTENSIONS]
    return names + [f for name, part in value.__dict__.items() for f in unknown_fields(part, path + "." + name)]


def events_of(wire, raw):
    """The payloads of a stream; names and terminator checked."""
    decoder = SseDecoder()
    events = decoder.feed(raw) + decoder.finish()
    if wire == "openai":
        assert events.pop().data == "[DONE]"
    payloads = [json.loads(event.data) for event in events]
    assert all(event.name == payload.get("type", "") for event, payload in zip(events, payloads))
    return [payload for payload in payloads if payload.get("type") != "ping"]  # documented, but not in the SDK's union


def check_strictly(model, payload):
    """The payload as the SDK's model."""
    found = model.validate_json(json.dumps(payload), strict=True)
    assert unknown_fields(found) == []
    return found


# ---- what the SDKs make of it


def served(wire, status, body, content_type):
    """A client of the SDK for this format, whose every request is answered with these bytes."""
    name = "anthropic" if wire == "anthropic" else "openai"
    module = sdk(name)
    httpx = __import__(module.DefaultHttpxClient.__mro__[1].__module__.split(".")[0])

    def handle(request):
        assert request.url.path.endswith(URLS[wire])
        return httpx.Response(status, headers={"content-type": content_type, "x-should-retry": "false"}, content=body)

    make = module.Anthropic if name == "anthropic" else module.OpenAI
    return make(
        api_key="k", base_url="http://127.0.0.1:9", http_client=httpx.Client(transport=httpx.MockTransport(handle))
    )


def gather(wire, client):
    """The answer that the SDK's stream accumulator ends up with."""
    if wire == "openai":
        with client.chat.completions.stream(model="m", messages=[]) as stream:
            # The helper takes an answer that was cut or filtered for an error, after it has gathered it.
            with contextlib.suppress(*(getattr(sdk("openai"), name + "FinishReasonError") for name in UNHAPPY)):
                stream.until_done()
            return stream.current_completion_snapshot
    if wire == "anthropic":
        with client.messages.stream(model="m", max_tokens=9, messages=[]) as stream:
            return stream.get_final_message()
    with client.responses.stream(model="m", input="") as stream:
        for event in stream:
            if event.type == "response.incomplete":  # get_final_response wants a completed one
                return event.response
        return stream.get_final_response()


def ask(wire, client):
    """A whole answer."""
    if wire == "openai":
        return client.chat.completions.create(model="m", messages=[])
    if wire == "anthropic":
        return client.messages.create(model="m", max_tokens=9, messages=[])
    return client.responses.create(model="m", input="")


def told(wire, final):
    """(text with refusals, reasoning, calls, why it ended, tokens in and out) of an answer as an SDK gives it."""
    return TOLD[wire](final)


def told_chat(final):
    [choice] = final.choices
    message = choice.message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    usage = final.usage and (final.usage.prompt_tokens, final.usage.completion_tokens)
    reasoning = getattr(message, "reasoning_content", None) or ""
    return (message.content or "") + (message.refusal or ""), reasoning, calls, choice.finish_reason, usage


def told_messages(final):
    blocks = final.content
    assert all(block.type in ("text", "thinking", "redacted_thinking", "tool_use") for block in blocks)
    usage = final.usage
    tokens = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return (
        "".join(block.text for block in blocks if block.type == "text"),
        "".join(block.thinking for block in blocks if block.type == "thinking"),
        [(block.name, block.input) for block in blocks if block.type == "tool_use"],
        final.stop_reason,
        (tokens, usage.output_tokens),
    )


def told_responses(final):
    parts = [part for item in final.output if item.type == "message" for part in item.content]
    reasoning = [item for item in final.output if item.type == "reasoning"]
    texts = [part for item in reasoning for part in [*item.summary, *(item.content or [])]]
    calls = [item for item in final.output if item.type == "function_call"]
    reason = final.incomplete_details.reason if final.incomplete_details else final.status
    return (
        "".join(part.text if part.type == "output_text" else part.refusal for part in parts),
        "".join(part.text for part in texts),
        [(item.name, json.loads(item.arguments)) for item in calls],
        reason,
        final.usage and (final.usage.input_tokens, final.usage.output_tokens),
    )


TOLD = {"openai": told_chat, "anthropic": told_messages, "responses": told_responses}

# Why an answer ended, in the words of each format.
ENDS = {
    "openai": {"tool_use": "tool_calls", "refusal": "content_filter", "max_tokens": "length"},
    "responses": {"refusal": "content_filter", "max_tokens": "max_output_tokens"},
    "anthropic": {stop: stop for stop in R.STOP_REASONS},
}
ENDS["openai"]["model_context_window_exceeded"] = "length"
ENDS["responses"]["model_context_window_exceeded"] = "max_output_tokens"


def expected(wire, response):
    """What `told` must be for an answer of the upstream."""
    blocks, usage = response.blocks, response.usage
    has_calls = any(isinstance(block, R.ToolCall) for block in blocks) and response.stop_reason == "end_turn"
    stop = "tool_use" if has_calls else response.stop_reason  # trap 30
    end = ENDS[wire].get(stop, "stop" if wire == "openai" else "completed")
    tokens = usage and (usage.input + usage.cache_read + usage.cache_write, usage.output)
    tokens = tokens or (None if wire == "openai" else (0, 0))
    if wire != "anthropic" and any(isinstance(block, R.Refusal) for block in blocks):
        end = "stop" if wire == "openai" else "completed"  # a refusal in words is an answer like any other
    said = [block for block in blocks if isinstance(block, (R.Text, R.Refusal))]
    apart = [wire == "openai" and R.own_extra(block, "openai").get("apart") for block in said]  # messages of their own
    return (
        "".join("\n\n" * bool(parted) + block.text for parted, block in zip(apart, said)),
        "".join(block.text for block in blocks if isinstance(block, R.Thinking)),
        [(block.name, json.loads(block.arguments or "{}")) for block in blocks if isinstance(block, R.ToolCall)],
        end,
        tokens,
    )


# ---- every pair, every kind of answer


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_stream_is_valid_event_by_event_and_gathers_to_what_was_said(source, target, name, models):
    raw = passed(source, target, streamed(source, answer(name)), context_of())
    for payload in events_of(target, raw):
        check_strictly(models[target][0], payload)
    final = gather(target, served(target, 200, raw, "text/event-stream"))
    assert told(target, final) == expected(target, R.fold_stream(source, streamed(source, answer(name)), context_of()))


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_whole_answer_is_valid_and_says_what_was_said(source, target, name, models):
    whole = R.WIRE_FORMATS[source].render_response(answer(name), context_of())
    body = R.translate_response(whole, source, target, context_of()) if source != target else whole
    check_strictly(models[target][1], body)
    final = ask(target, served(target, 200, json.dumps(body).encode(), "application/json"))
    assert told(target, final) == expected(target, R.parse_answer(whole, source, context_of()))


# ---- errors


@pytest.mark.parametrize("target", WIRES)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 503, 504, 529])
def test_an_error_is_the_sdks_own_class_with_its_fields(target, status):
    module = sdk("anthropic" if target == "anthropic" else "openai")
    if status == 529 and target != "anthropic":
        pytest.skip("529 is Anthropic's word")
    body = R.WIRE_FORMATS[target].render_error(R.ErrorInfo(status, "no such thing", code="some_code"), "req_1")
    client = served(target, status, json.dumps(body).encode(), "application/json").with_options(max_retries=0)
    with pytest.raises(module.APIStatusError) as caught:
        ask(target, client)
    error = caught.value
    assert (error.status_code, type(error).__module__) == (status, module.__name__)
    if target == "anthropic":
        assert (error.body["type"], error.body["error"]["message"]) == ("error", "no such thing")
        types = [kind.model_fields["type"].annotation.__args__[0] for kind in anthropic_errors()]
        # The SDK's union lacks the type that Anthropic's documentation (Errors) has for 413.
        assert error.body["error"]["type"] in [*types, "request_too_large"]
    else:
        assert "no such thing" in error.message
        assert isinstance(error.type, str)
        assert error.code == "some_code"


def anthropic_errors():
    from anthropic.types.shared.error_object import ErrorObject

    return ErrorObject.__args__[0].__args__ if hasattr(ErrorObject, "__metadata__") else ErrorObject.__args__


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_stream_that_breaks_is_an_error_in_the_sdk_and_never_a_short_answer(source, target, models):
    module = sdk("anthropic" if target == "anthropic" else "openai")
    whole = streamed(source, answer("text"))
    raw = passed(source, target, whole[: len(whole) // 2], context_of())
    client = served(target, 200, raw, "text/event-stream")
    with pytest.raises((module.APIError, RuntimeError)) as caught:
        gather(target, client)
    assert target == "responses" or isinstance(caught.value, module.APIError)
    if target == "responses":  # the helper has no error for a failed answer but that it did not complete
        last = [json.loads(e.data) for e in SseDecoder().feed(raw)][-1]
        assert last["type"] == "response.failed"
        check_strictly(models[target][0], last)


# ---- the corpus


def recorded():
    """(name, wire, exchange) of every recorded success that may be served as an upstream's answer."""
    wires = {"chat": "openai", "messages": "anthropic", "responses": "responses"}
    for row in json.loads((CORPUS / "INDEX.json").read_text("utf-8")):
        if row["api"] in wires and row["status"] == 200 and row["streams_in_body"] == 1 and not row["suspect_handmade"]:
            yield row["file"], wires[row["api"]], json.loads((CORPUS / row["file"]).read_text("utf-8"))


def recorded_context(wire, exchange):
    try:
        request = R.WIRE_FORMATS[wire].parse_request(exchange["request"])
    except (R.RouterError, TypeError, AttributeError):
        return context_of()
    return context_of(request._replace(model="asked-for", stream=True, include_usage=True, fields=None, reasoning=None))


@pytest.mark.parametrize("target", WIRES)
def test_every_recorded_answer_translates_to_what_the_sdk_takes_strictly(target, models, capsys):
    if not CORPUS.is_dir():
        pytest.skip("no recorded answers beside the project")
    bad, count = [], 0
    for name, source, exchange in recorded():
        if source == target:
            continue
        count += 1
        context, raw = recorded_context(source, exchange), exchange["body"].encode()
        try:
            if exchange["stream"] and "data:" in exchange["body"]:
                whole = R.fold_stream(source, raw, context)
                out = passed(source, target, raw, context)
                if isinstance(whole, R.ErrorInfo):
                    continue
                for payload in events_of(target, out):
                    check_strictly(models[target][0], payload)
                final = gather(target, served(target, 200, out, "text/event-stream"))
            else:
                whole = R.parse_answer(json.loads(raw), source, context)
                body = R.translate_response(json.loads(raw), source, target, context)
                check_strictly(models[target][1], body)
                final = ask(target, served(target, 200, json.dumps(body).encode(), "application/json"))
            assert told(target, final) == expected(target, whole)
        except Exception as error:
            bad.append("%s: %s %s" % (name, type(error).__name__, str(error)[:300]))
    with capsys.disabled():
        print("\n%d recorded answers read strictly as %s" % (count, target))
    assert bad == []
    assert count > 50
