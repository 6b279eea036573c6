"""Section TRANSLATION: from any wire format to any other, whole and streamed, and the relay of one format to itself."""

import json
import os
import random

import pytest

import llm_router as R
from strict_readers import STREAM, WHOLE

WIRES = sorted(R.WIRE_FORMATS)
PAIRS = [(source, target) for source in WIRES for target in WIRES if source != target]

TOOLS = [
    R.Tool("look", "", {"type": "object", "properties": {}}),
    R.Tool("go", "", {"type": "object", "properties": {}}),
]
REQUEST = R.ChatRequest("asked-for", [R.Message("user", [R.Text("hi")])], tools=TOOLS, stream=True, include_usage=True)
CONTEXT = R.Context(REQUEST, "req1", 1700000000)

ANSWERS = {
    "text": R.ChatResponse("msg_1", "m", [R.Text('Grüße, "世界" 🎉\n\u2028 end')], "end_turn", usage=R.Usage(5, 7, 2)),
    "reasoning": R.ChatResponse(
        "msg_1", "m", [R.Thinking("let me see"), R.Text("yes")], "max_tokens", usage=R.Usage(5, 7)
    ),
    "tools": R.ChatResponse(
        "msg_1",
        "m",
        [R.Text("wait"), R.ToolCall("call_1", "look", '{"a":"ä","b":[1,2]}'), R.ToolCall("call_2", "go", "{}")],
        "tool_use",
        usage=R.Usage(5, 7),
    ),
    "only tools": R.ChatResponse(
        "msg_1", "m", [R.ToolCall("call_1", "look", '{"a":1}')], "tool_use", usage=R.Usage(1, 2)
    ),
}


def stream_of(source, answer, finish=True):
    """The stream of an answer, its text in pieces of two characters."""
    renderer = R.WIRE_FORMATS[source].renderer(CONTEXT)
    out = []
    for event in R.unfold(answer):
        events = [event]
        if isinstance(event, R.Delta):
            events = [R.Delta(event.text[at : at + 2]) for at in range(0, len(event.text), 2)]
        if finish or not isinstance(event, R.Finished):
            out.extend(renderer.render(item) for item in events)
    return b"".join(out)


def translated(source, target, raw, sizes=None, context=CONTEXT):
    """All output of a StreamTranslator for `raw` cut into pieces, and the translator."""
    translator = R.StreamTranslator(source, target, context)
    return run(translator, raw, sizes), translator


def run(processor, raw, sizes=None):
    out, at = [], 0
    for size in sizes or [len(raw)]:
        out.append(processor.feed(raw[at : at + size]))
        at += size
    if at < len(raw):
        out.append(processor.feed(raw[at:]))
    return b"".join(out) + processor.finish()


def gist(answer):
    """What must be the same in every format."""
    blocks = [
        (type(block).__name__, block.name, json.loads(block.arguments))
        if isinstance(block, R.ToolCall)
        else (type(block).__name__, block.text)
        for block in answer.blocks
    ]
    return blocks, answer.stop_reason, answer.usage


def folded(wire, raw):
    return R.fold_stream(wire, raw, CONTEXT)


# ---- every pair of formats


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize("source, target", PAIRS)
def test_a_stream_says_the_same_in_every_format(source, target, name):
    """traps 10, 28, 53 and 54"""
    out, translator = translated(source, target, stream_of(source, ANSWERS[name]))
    assert gist(folded(target, out)) == gist(ANSWERS[name])
    assert translator.content and translator.done and translator.failed is None and not translator.is_empty
    assert translator.usage == ANSWERS[name].usage


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize("source, target", PAIRS)
def test_a_translated_stream_folds_to_the_translated_whole(source, target, name):
    whole = R.WIRE_FORMATS[source].render_response(ANSWERS[name], CONTEXT)
    from_whole = R.parse_answer(R.translate_response(whole, source, target, CONTEXT), target, CONTEXT)
    out, _ = translated(source, target, stream_of(source, ANSWERS[name]))
    assert gist(folded(target, out)) == gist(from_whole)


@pytest.mark.parametrize("source, target", PAIRS)
def test_any_cut_of_the_bytes_gives_the_same_output(source, target):
    """traps 1 and 6"""
    raw = stream_of(source, ANSWERS["text"]._replace(blocks=[R.Text("世🎉")]))
    expected, _ = translated(source, target, raw)
    for cut in range(1, len(raw)):
        assert translated(source, target, raw, [cut])[0] == expected
    assert translated(source, target, raw, [1] * len(raw))[0] == expected


def events_of(raw):
    return [event + b"\n\n" for event in raw.split(b"\n\n") if event]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source, target", PAIRS)
def test_events_that_come_one_by_one_and_all_at_once_say_the_same(source, target, seed):
    """One by one, an event like the last one is read by its stencil."""
    dice = random.Random(seed)
    words = ["a", "a", "bb", '"', "\\", "\n", "東", "\u2028", "{", "}", '{"a"', "<think>", " ", "\x7f", "stop"]
    texts = ["".join(dice.choices(words, k=60)) for _ in range(3)]
    blocks = [R.Thinking(texts[0]), R.Text(texts[1]), R.ToolCall("call_1", "look", R.dump_json({"a": texts[2]}).decode())]
    raw = stream_of(source, R.ChatResponse("msg_1", "m", blocks, "tool_use", usage=R.Usage(5, 7)))
    one_by_one = R.StreamTranslator(source, target, CONTEXT)
    out = b"".join(map(one_by_one.feed, events_of(raw))) + one_by_one.finish()
    assert out == translated(source, target, raw)[0]


def chat_chunk(**delta):
    return b"data: %s\n\n" % R.dump_json({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


ODD_CHUNKS = {
    "late for a call that is complete": [
        chat_chunk(tool_calls=[{"index": index, "id": "c%d" % index, "function": {"name": "look", "arguments": text}}])
        for index, text in enumerate(["{}", "{"])
    ]
    + [chat_chunk(tool_calls=[{"index": 0, "function": {"arguments": text}}]) for text in (" ", " ", "X")]
    + [chat_chunk(tool_calls=[{"index": 1, "function": {"arguments": "}"}}])],
    "a tag amid reasoning": [chat_chunk(reasoning_content=text) for text in ("a", "b", "</think>", "c")],
    "a tag amid a refusal": [chat_chunk(refusal=text) for text in ("a", "b", "</think>", "c")],
}


@pytest.mark.parametrize("target", ["anthropic", "responses"])
@pytest.mark.parametrize("chunks", ODD_CHUNKS.values(), ids=list(ODD_CHUNKS))
def test_a_stencil_never_changes_what_an_odd_chunk_means(chunks, target):
    raw = chunks + [b"data: [DONE]\n\n"]
    one_by_one = R.StreamTranslator("openai", target, CONTEXT)
    assert b"".join(map(one_by_one.feed, raw)) == translated("openai", target, b"".join(raw))[0]


@pytest.mark.parametrize(
    "block", [R.Text("of one kind"), R.Thinking("of one kind"), R.ToolCall("c", "look", "{ of one kind")]
)
@pytest.mark.parametrize("source, target", [pair for pair in PAIRS if pair[0] != "responses"])
def test_an_event_like_the_last_one_is_not_parsed_again(source, target, block, monkeypatch):
    events = events_of(stream_of(source, R.ChatResponse("msg_1", "m", [block])))
    last = max(at for at, event in enumerate(events) if b'"in"' in event)
    translator = R.StreamTranslator(source, target, CONTEXT)
    for event in events[: last + 1]:
        translator.feed(event)
    monkeypatch.setattr(R, "parse_events", None)
    told = translator.feed(events[last].replace(b'"in"', b'"more \\"words\\""'))
    assert rb"more \"words\"" in told


@pytest.mark.parametrize("source, target", PAIRS)
def test_a_stream_in_which_every_event_has_a_number_of_its_own_is_read_all_the_same(source, target):
    numbered = [
        event.replace(b'"type"', b'"n":%d,"type"' % at, 1).replace(b'"id"', b'"n":%d,"id"' % at, 1)
        for at, event in enumerate(events_of(stream_of(source, ANSWERS["text"])))
    ]
    translator = R.StreamTranslator(source, target, CONTEXT)
    out = b"".join(map(translator.feed, numbered)) + translator.finish()
    assert out == translated(source, target, b"".join(numbered))[0]
    assert translator.done


@pytest.mark.parametrize("source, target", PAIRS)
def test_cr_and_crlf_are_line_ends_too_and_comments_are_nothing(source, target):
    """traps 2 and 4"""
    raw = stream_of(source, ANSWERS["tools"])
    expected, _ = translated(source, target, raw)
    for end in (b"\r\n", b"\r"):
        assert translated(source, target, raw.replace(b"\n", end), [7] * (len(raw) // 7))[0] == expected
    noisy = b": PROCESSING\n\n" + raw.replace(b"\n\n", b"\n\n: x\n\nid: 1\nretry: 5\n\n")
    assert translated(source, target, noisy)[0] == expected


@pytest.mark.parametrize("target", WIRES)
def test_a_byte_order_mark_hides_nothing(target):
    raw = b"\xef\xbb\xbf" + chunk(content="a") + chunk("stop") + DONE
    out = run(R.make_processor("openai", target, CONTEXT), raw)
    assert folded(target, out).blocks == [R.Text("a")]


@pytest.mark.parametrize("source, target", PAIRS)
def test_the_space_after_the_colon_is_optional(source, target):
    """trap 3"""
    raw = stream_of(source, ANSWERS["tools"])
    assert translated(source, target, raw.replace(b"data: ", b"data:"))[0] == translated(source, target, raw)[0]


@pytest.mark.parametrize("source", sorted(R.WIRE_FORMATS))
def test_an_error_without_an_envelope_keeps_its_words_in_a_stream_of_any_format(source):
    """FastAPI's, Bedrock's and Cloudflare's: in two formats they were an answer cut off, in the router's words."""
    for body in ({"message": "too much"}, {"success": False, "errors": [{"message": "too much"}], "message": "too much"}):
        relay = R.make_processor(source, source, CONTEXT)
        relay.feed(b"data: %s\n\n" % json.dumps(body).encode())
        relay.finish()
        assert relay.failed is not None and relay.failed.message == "too much"


@pytest.mark.parametrize("source, target", PAIRS)
def test_a_truncated_stream_ends_in_an_error_and_without_a_success(source, target):
    """trap 14"""
    raw = stream_of(source, ANSWERS["text"], finish=False)
    out, translator = translated(source, target, raw)
    assert translator.failed is not None and translator.failed.code == "truncated" and not translator.done
    seen = folded(target, out)
    assert isinstance(seen, R.ErrorInfo) and seen.message == translator.failed.message
    assert b"data: [DONE]" not in out and b'"message_stop"' not in out and b'"response.completed"' not in out


@pytest.mark.parametrize("source, target", PAIRS)
def test_an_error_in_the_stream_is_told_in_the_client_s_format_and_ends_it(source, target):
    """traps 19, 55 and 130"""
    wire = R.WIRE_FORMATS[source]
    error = wire.error_event(R.ErrorInfo(529, "overloaded", "overloaded_error"), "x")
    translator = R.StreamTranslator(source, target, CONTEXT)
    out = translator.feed(error + stream_of(source, ANSWERS["text"]))
    assert translator.failed is not None and translator.failed.message == "overloaded" and not translator.content
    assert translator.finish() == b"" and translator.feed(error) == b""
    assert isinstance(folded(target, out), R.ErrorInfo)


@pytest.mark.parametrize("source, target", PAIRS + [(wire, wire) for wire in WIRES])
def test_content_is_seen_at_the_first_real_delta_and_not_before(source, target):
    """trap 131"""
    for answer in ANSWERS.values():
        processor = R.make_processor(source, target, CONTEXT)
        renderer = R.WIRE_FORMATS[source].renderer(CONTEXT)
        events = list(R.unfold(answer))
        opened = next(i for i, event in enumerate(events) if isinstance(event, R.Opened))
        first = opened if isinstance(events[opened].block, R.ToolCall) else opened + 1
        for event in events[:first]:
            processor.feed(renderer.render(event))
        assert not processor.content
        processor.feed(renderer.render(events[first]))
        assert processor.content


SERVER_CALLS = [
    ("anthropic", {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}),
    ("responses", {"type": "mcp_call", "id": "m", "name": "ask", "server_label": "l", "arguments": "{}", "output": "o"}),
    ("responses", {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search"}}),
]


@pytest.mark.parametrize("source, call", SERVER_CALLS)
@pytest.mark.parametrize("target", WIRES)
def test_the_call_of_a_tool_that_the_provider_runs_is_content_where_it_is_shown(source, call, target):
    """traps 131 and 138: a search may take long, and whoever sees it begin is not to wait for its end."""
    answer = R.ChatResponse("msg_1", "m", [R.Opaque(source, call)], "end_turn", usage=R.Usage(1, 2))
    processor = R.make_processor(source, target, CONTEXT)
    run(processor, stream_of(source, answer))
    assert processor.content == (source == target)
    assert not processor.is_empty


@pytest.mark.parametrize("source, target", PAIRS + [(wire, wire) for wire in WIRES])
def test_an_answer_that_says_nothing_is_empty(source, target):
    """traps 131 and 138"""
    processor = R.make_processor(source, target, CONTEXT)
    run(processor, stream_of(source, R.ChatResponse("msg_1", "m", [], "end_turn", usage=R.Usage(1, 0))))
    assert processor.is_empty and processor.failed is None


@pytest.mark.parametrize("source, target", PAIRS + [(wire, wire) for wire in WIRES])
def test_an_endless_event_fails_the_stream(source, target):
    """trap 8"""
    processor = R.make_processor(source, target, CONTEXT, 100)
    assert processor.feed(b"data: " + b"x" * 50) == b"" and processor.failed is None
    processor.feed(b"x" * 100)
    assert processor.failed is not None and processor.failed.status == 502


@pytest.mark.parametrize("source, target", PAIRS + [(wire, wire) for wire in WIRES])
def test_whole_answers_become_streams_and_streams_whole_answers(source, target):
    """traps 11 and 12"""
    answer = ANSWERS["tools"]
    body = R.WIRE_FORMATS[source].render_response(answer, CONTEXT)
    streamed = R.render_stream(target, R.parse_answer(body, source, CONTEXT), CONTEXT)
    assert gist(folded(target, streamed)) == gist(answer)
    whole = R.WIRE_FORMATS[target].render_response(folded(source, stream_of(source, answer)), CONTEXT)
    assert gist(R.parse_answer(whole, target, CONTEXT)) == gist(answer)
    cut_off = folded(source, stream_of(source, answer, finish=False))
    assert isinstance(cut_off, R.ErrorInfo) and cut_off.code == "truncated"


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_random_events_never_raise(source, target, seed):
    dice = random.Random(seed)
    raw = stream_of(source, ANSWERS["tools"])
    for _ in range(60):
        noise = bytearray(raw)
        for _ in range(dice.randrange(1, 12)):
            noise[dice.randrange(len(noise))] = dice.choice(b'{}[]":,\\\n0tn')
        for processor in (R.StreamTranslator(source, target, CONTEXT), R.StreamRelay(source, source, CONTEXT)):
            run(processor, bytes(noise[: dice.randrange(len(noise))]), [dice.randrange(1, 400) for _ in range(5)])


@pytest.mark.parametrize("source, target", PAIRS)
def test_a_request_keeps_its_meaning(source, target):
    request = R.ChatRequest(
        "asked-for",
        [
            R.Message("user", [R.Text("hi")]),
            R.Message("assistant", [R.Text("wait"), R.ToolCall("call_1", "look", '{"a":1}')]),
            R.Message("user", [R.ToolResult("call_1", [R.Text("seen")])]),
        ],
        system=[R.Text("be brief")],
        tools=TOOLS,
        tool_choice=R.ToolChoice("any"),
        parallel_tools=False,
        max_tokens=100,
        temperature=0.5,
    )
    neutral, body = R.translate_request(R.render_request(request, source), source, target, "up/stream")
    assert neutral.model == "asked-for" and body["model"] == "up/stream"
    again = R.WIRE_FORMATS[target].parse_request(body)
    assert R.join_text(again.system or again.messages[0].blocks) == "be brief"
    assert [tool.name for tool in again.tools] == ["look", "go"]
    assert (again.tool_choice, again.parallel_tools) == (R.ToolChoice("any"), False)
    assert (again.max_tokens, again.temperature) == (100, 0.5)
    blocks = [block for message in again.messages for block in message.blocks]
    call = next(block for block in blocks if isinstance(block, R.ToolCall))
    result = next(block for block in blocks if isinstance(block, R.ToolResult))
    assert (call.name, json.loads(call.arguments)) == ("look", {"a": 1})
    assert result.call_id == call.id and R.join_text(result.blocks) == "seen"


# ---- conversations


def tidied(*turns):
    """(role, blocks) with every block in short."""
    short = {
        R.Text: lambda b: b.text,
        R.ToolCall: lambda b: (b.id, b.name),
        R.ToolResult: lambda b: (b.call_id, R.join_text(b.blocks)),
    }
    messages = R.tidy_messages([R.Message(role, blocks) for role, *blocks in turns])
    return [(message.role, *[short[type(block)](block) for block in message.blocks]) for message in messages]


A, B = R.ToolCall("a", "f"), R.ToolCall("b", "g")


def result(call_id, text="r"):
    return R.ToolResult(call_id, [R.Text(text)])


@pytest.mark.parametrize(
    "trap, turns, expected",
    [
        (
            77,
            [("assistant", A), ("user", R.Text("x"), result("a"))],
            [("assistant", ("a", "f")), ("user", ("a", "r"), "x")],
        ),
        (
            77,
            [("assistant", A), ("system", R.Text("s")), ("user", result("a"))],
            [("assistant", ("a", "f")), ("user", ("a", "r")), ("system", "s")],
        ),
        (
            77,
            [("assistant", A, B), ("user", result("b", "2"), result("a", "1"))],
            [("assistant", ("a", "f"), ("b", "g")), ("user", ("a", "1"), ("b", "2"))],
        ),
        (78, [("user", result("z"))], [("user", "[result of tool call z]", "r")]),
        (79, [("assistant", A)], [("assistant", ("a", "f")), ("user", ("a", "(no result)"))]),
        (
            80,
            [("assistant", A, R.Text("x")), ("user", result("a"))],
            [("assistant", "x", ("a", "f")), ("user", ("a", "r"))],
        ),
        (
            81,
            [("assistant", A), ("user", result("a"), result("a", "2"))],
            [("assistant", ("a", "f")), ("user", ("a", "r"))],
        ),
        (82, [("user", R.Text(" \n")), ("assistant", R.Text("x"), R.Text(""))], [("assistant", "x")]),
        (
            38,
            [("assistant", A), ("user", result("a", "1")), ("assistant", A), ("user", result("a", "2"))],
            [("assistant", ("a", "f")), ("user", ("a", "1")), ("assistant", ("a_1", "f")), ("user", ("a_1", "2"))],
        ),
        (
            38,
            [("assistant", A), ("user", R.Text("x")), ("assistant", A), ("user", result("a", "2"))],
            [
                ("assistant", ("a", "f")),
                ("user", ("a", "(no result)"), "x"),
                ("assistant", ("a_1", "f")),
                ("user", ("a_1", "2")),
            ],
        ),
        (
            79,
            [("assistant", A), ("assistant", B), ("user", result("a"), R.Text("x")), ("user", R.Text("y"))],
            [("assistant", ("a", "f"), ("b", "g")), ("user", ("a", "r"), ("b", "(no result)"), "x", "y")],
        ),
    ],
)
def test_a_conversation_is_made_tidy(trap, turns, expected):
    """traps 38, 77, 78, 79, 80, 81 and 82"""
    assert tidied(*turns) == expected
    twice = R.tidy_messages(R.tidy_messages([R.Message(role, blocks) for role, *blocks in turns]))
    assert twice == R.tidy_messages([R.Message(role, blocks) for role, *blocks in turns])


def test_turns_with_different_names_stay_apart_and_the_request_is_not_touched():
    turns = [R.Message("user", [R.Text(name)], {"openai": {"name": name}}) for name in "ab"]
    assert R.tidy_messages(turns) == turns
    turns = [R.Message("user", [R.Text("a")]), R.Message("user", [R.Text("b")])]
    assert len(R.tidy_messages(turns)) == 1 and len(turns[0].blocks) == 1


@pytest.mark.parametrize("target", WIRES)
def test_a_free_text_tool_is_a_function_where_free_text_is_not_known(target):
    """trap 60"""
    calls = [R.Message("assistant", [R.ToolCall("c", "patch", "+ a", "custom")]), R.Message("user", [result("c")])]
    body = R.render_request(R.ChatRequest("m", calls, tools=[R.Tool("patch", "d", kind="custom")]), target)
    again = R.WIRE_FORMATS[target].parse_request(body)
    call = next(block for message in again.messages for block in message.blocks if isinstance(block, R.ToolCall))
    kind = "custom" if target == "responses" else "function"
    assert (again.tools[0].kind, call.kind) == (kind, kind)
    assert call.arguments == "+ a" or json.loads(call.arguments) == {"input": "+ a"}


# ---- from raw OpenAI chunks to Anthropic events


def chunk(finish=None, usage=None, **delta):
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %s\n\n" % json.dumps({"id": "c", "model": "up", "choices": choices, "usage": usage}).encode()


def call(index=0, id=None, name=None, arguments=""):
    item = {"index": index, "function": {"arguments": arguments}}
    if id is not None:
        item.update(id=id, type="function")
    if name is not None:
        item["function"]["name"] = name
    return item


DONE = b"data: [DONE]\n\n"


def anthropic_answer(*chunks):
    """The events that an Anthropic client sees, checked for their life cycle, and the folded answer."""
    out, translator = translated("openai", "anthropic", b"".join(chunks))
    assert translator.failed is None
    pairs = [(event.name, json.loads(event.data)) for event in R.parse_events(out)]
    names = [name for name, _ in pairs]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("message_start") == names.count("message_delta") == names.count("message_stop") == 1
    current, is_open = -1, False
    for name, data in pairs:
        if name == "content_block_start":
            assert not is_open and data["index"] == current + 1
            current, is_open = current + 1, True
        elif name.startswith("content_block"):
            assert is_open and data["index"] == current
            is_open = name == "content_block_delta"
    assert not is_open
    return R.fold_stream("anthropic", out, CONTEXT)


def test_a_stream_that_begins_with_a_tool_call_is_complete():
    """traps 20, 22 and 23"""
    answer = anthropic_answer(chunk(tool_calls=[call(0, "c1", "look", '{"a":1}')]), chunk("tool_calls"), DONE)
    assert gist(answer)[0] == [("ToolCall", "look", {"a": 1})] and answer.stop_reason == "tool_use"


def test_the_end_without_usage_and_the_last_fragment_beside_the_finish_reason():
    """traps 24 and 25"""
    first = chunk(tool_calls=[call(0, "c1", "look", '{"a"')])
    answer = anthropic_answer(first, chunk("tool_calls", tool_calls=[call(0, arguments=":1}")]))
    assert gist(answer)[0] == [("ToolCall", "look", {"a": 1})]


def test_an_empty_list_of_calls_is_no_call_and_tools_with_stop_are_tools():
    """traps 26, 30, 31 and 32"""
    answer = anthropic_answer(
        chunk(role="assistant", content="", tool_calls=[]), chunk(content="a", tool_calls=[]), chunk("tool_calls"), DONE
    )
    assert gist(answer)[:2] == ([("Text", "a")], "end_turn")
    answer = anthropic_answer(
        chunk(role="assistant", content=""), chunk(tool_calls=[call(0, "c1", "go", "{}")]), chunk("stop"), DONE
    )
    assert gist(answer)[:2] == ([("ToolCall", "go", {})], "tool_use")


def test_parallel_calls_keep_their_own_arguments_however_they_are_numbered():
    """traps 33, 34 and 35"""
    interleaved = [
        chunk(tool_calls=[call(0, "c1", "look", '{"a":'), call(1, "c2", "go", '{"b":')]),
        chunk(tool_calls=[call(1, arguments="2}")]),
        chunk(tool_calls=[call(0, arguments="1}")]),
    ]
    same_index = [
        chunk(tool_calls=[call(0, "c1", "look", '{"a":1}')]),
        chunk(tool_calls=[call(0, "c2", "go", '{"b":2}')]),
    ]
    for chunks in (interleaved, same_index):
        answer = anthropic_answer(*chunks, chunk("tool_calls"), DONE)
        assert gist(answer)[0] == [("ToolCall", "look", {"a": 1}), ("ToolCall", "go", {"b": 2})]


def test_a_call_without_id_or_arguments_is_whole():
    """traps 36 and 41"""
    answer = anthropic_answer(chunk(tool_calls=[call(0, "", "go")]), chunk("tool_calls"), DONE)
    assert gist(answer)[0] == [("ToolCall", "go", {})] and answer.blocks[0].id


def test_usage_chunks_and_empty_choices_are_taken_as_they_come():
    """traps 9, 15, 16, 43 and 113"""
    empty = b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    last = b"data: %s\n\n" % json.dumps({"choices": [], "usage": usage}).encode()
    answer = anthropic_answer(empty, chunk(content="a"), chunk("stop"), last, DONE)
    assert gist(answer) == ([("Text", "a")], "end_turn", R.Usage(6, 3, 4))


def test_usage_beside_the_last_choice_in_groq_s_own_field_counts():
    """trap 43"""
    last = json.loads(chunk("stop")[6:])
    last["x_groq"] = {"id": "req_1", "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}}
    answer = anthropic_answer(chunk(content="a"), b"data: %s\n\n" % json.dumps(last).encode(), DONE)
    assert answer.usage == R.Usage(10, 3)


def test_reasoning_is_a_thinking_block_of_its_own():
    """traps 27 and 29"""
    answer = anthropic_answer(chunk(content=None, reasoning_content="hm"), chunk(content="a"), chunk("stop"), DONE)
    assert gist(answer)[0] == [("Thinking", "hm"), ("Text", "a")]


# ---- the relay of one format to itself


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_relayed_stream_is_untouched_however_it_is_cut(wire, name):
    raw = stream_of(wire, ANSWERS[name])
    for sizes in (None, [1] * len(raw), [100] * (len(raw) // 100)):
        relay = R.StreamRelay(wire, wire, CONTEXT)
        assert run(relay, raw, sizes) == raw
        assert relay.content and relay.done and relay.failed is None and relay.usage == ANSWERS[name].usage


@pytest.mark.parametrize("wire", WIRES)
def test_a_relay_passes_whole_events_only(wire):
    raw = stream_of(wire, ANSWERS["text"])
    relay = R.StreamRelay(wire, wire, CONTEXT)
    for at in range(len(raw)):
        out = relay.feed(raw[at : at + 1])
        assert not out or out.endswith(b"\n\n")


@pytest.mark.parametrize("wire", WIRES)
def test_a_relayed_stream_that_breaks_off_gets_an_error_and_not_the_cut_event(wire):
    """trap 14"""
    raw = stream_of(wire, ANSWERS["text"], finish=False)
    relay = R.StreamRelay(wire, wire, CONTEXT)
    out = run(relay, raw + b'data: {"type":"conte')
    assert relay.failed is not None and relay.failed.code == "truncated"
    if wire != "responses":
        assert out == raw + R.WIRE_FORMATS[wire].error_event(relay.failed, CONTEXT.id)
        return
    *_, last = R.parse_events(raw)
    told, failed = (json.loads(event.data) for event in R.parse_events(out[len(raw) :]))
    number = json.loads(last.data)["sequence_number"]
    assert out.startswith(raw)
    assert (told["type"], told["sequence_number"]) == ("error", number + 1)
    assert (failed["type"], failed["sequence_number"]) == ("response.failed", number + 2)


def test_a_comment_does_not_start_the_numbers_of_a_broken_stream_anew():
    relay = R.StreamRelay("responses", "responses", CONTEXT)
    relay.feed(b'event: response.created\ndata: {"type": "response.created", "sequence_number": 4}\n\n')
    relay.feed(b": OPENROUTER PROCESSING\n\n")
    assert b'"sequence_number":5,' in relay.fail(R.ErrorInfo(502, "the upstream's answer broke off: reset"))


@pytest.mark.parametrize("target", sorted(R.WIRE_FORMATS))
@pytest.mark.parametrize("more", [{"cache_control": {"type": "ephemeral"}}, {"citations": [{"cited_text": "x"}]}], ids=["cache", "cite"])
@pytest.mark.parametrize("blank", ["", " \n"], ids=["empty", "space"])
def test_a_text_without_words_is_left_out_whatever_it_has_besides(blank, more, target):
    """Trap 82."""
    part = {"type": "text", "text": blank, **more}
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}, {"role": "assistant", "content": [part]}]
    body = {"model": "m", "max_tokens": 16, "system": [part], "messages": turns}
    plain = dict(body, messages=[{"role": "user", "content": "hi"}])
    assert R.translate_request(body, "anthropic", target)[1] == R.translate_request(plain, "anthropic", target)[1]


def test_a_document_without_words_is_kept_for_anthropic_and_becomes_a_note_for_others():
    empty = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": ""}}
    body = {"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": [empty, {"type": "text", "text": "hi"}]}]}
    assert R.translate_request(body, "anthropic", "anthropic")[1]["messages"][0]["content"][0] == empty
    assert R.translate_request(body, "anthropic", "openai")[1]["messages"][0]["content"] == "[document left out]\n\nhi"


def test_arguments_with_a_number_beyond_all_floats_reach_an_anthropic_client_as_json():
    """Trap 42. Python reads 1e999 as infinity and writes that as `Infinity`, on which a client's JSON.parse fails."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"n": 1e999}'}}
    body = {"choices": [{"message": {"role": "assistant", "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    answer = R.translate_response(body, "openai", "anthropic", CONTEXT)
    assert answer["content"][0]["input"] == {"_raw": '{"n": 1e999}'}


def test_an_endless_number_of_an_event_does_not_spoil_the_error_that_follows():
    """Python refuses to read integers of more than 4,300 digits."""
    relay = R.StreamRelay("responses", "responses", CONTEXT)
    relay.feed(b'data: {"type": "response.created", "sequence_number": %s}\n\n' % (b"9" * 5000))
    assert b"broke off" in relay.fail(R.ErrorInfo(502, "the upstream's answer broke off: reset"))


def test_a_broken_responses_stream_fails_as_the_answer_that_began():
    """openai-python 3.57, lib.streaming.responses: another id is "Lifecycle response identity changed"."""
    relay = R.StreamRelay("responses", "responses", CONTEXT)
    begun = {"type": "response.created", "sequence_number": 0, "response": {"id": 'gen-"1"', "status": "in_progress"}}
    relay.feed(R.sse_event(json.dumps(begun).encode(), "response.created"))
    told, failed = R.parse_events(relay.fail(R.ErrorInfo(502, "the upstream's answer broke off: reset")))
    assert json.loads(failed.data)["response"]["id"] == 'gen-"1"'
    assert [json.loads(event.data)["sequence_number"] for event in (told, failed)] == [1, 2]


BEGUN = {
    "openai": {"id": "x", "model": "m", "choices": [{"index": 0, "delta": {"content": "some words"}}]},
    "anthropic": {"type": "message_start", "message": {"id": "x", "model": "m", "role": "assistant", "content": []}},
    "responses": {"type": "response.created", "response": {"id": "x", "status": "in_progress"}},
}
OWN_TYPES = {"openai": "server_error", "anthropic": "api_error"}


@pytest.mark.parametrize("client", sorted(OWN_TYPES))
@pytest.mark.parametrize("upstream", sorted(BEGUN))
def test_a_stream_that_ends_too_early_is_told_in_words_on_which_agents_ask_again(upstream, client):
    """pi-coding-agent 0.73 asks again after "ended without" and "connection lost", Continue's CLI 1.5 after the type
    `server_error`, which an OpenAI client got only from upstreams of its own format."""
    processor = R.make_processor(upstream, client, CONTEXT)
    processor.feed(R.sse_event(json.dumps(BEGUN[upstream]).encode(), BEGUN[upstream].get("type", "")))
    error = next(json.loads(e.data)["error"] for e in R.parse_events(processor.finish()) if b"error" in e.data.encode())
    assert error["type"] == OWN_TYPES[client] and "ended without" in error["message"]


@pytest.mark.parametrize("end", ["reset", "end of input", "error event"])
def test_half_a_tool_call_is_not_called_complete_when_the_answer_breaks_off(end):
    """trap 22: clients run a tool at its block's stop."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "rm", "arguments": '{"path": "/tm'}}
    chunk = {"id": "x", "model": "m", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
    processor = R.make_processor("openai", "anthropic", CONTEXT)
    assert b"/tm" in processor.feed(b"data: %s\n\n" % json.dumps(chunk).encode())
    if end == "reset":
        told = processor.fail(R.ErrorInfo(502, "the upstream's answer broke off: reset"))
    else:
        told = processor.finish() if end == "end of input" else processor.feed(b'data: {"error": {"message": "no"}}\n\n')
    assert [event.name for event in R.parse_events(told)] == ["error"] and processor.finish() == b""


def test_a_further_message_of_an_answer_is_a_paragraph_of_its_own_where_messages_are_one():
    """A preamble (`phase`) ran into what followed it; the parts of one message are one text (microsoft/vscode#312173)."""
    words = [{"type": "output_text", "text": text} for text in ("Let me look.", "Here it ", "is.")]
    items = [{"type": "message", "role": "assistant", "content": parts} for parts in (words[:1], words[1:])]
    whole = {"object": "response", "status": "completed", "output": items}
    answer = R.parse_answer(whole, "responses", CONTEXT)
    chat = R.WIRE_FORMATS["openai"].render_response(answer, CONTEXT)
    assert chat["choices"][0]["message"]["content"] == "Let me look.\n\nHere it is."
    stream = R.render_stream("responses", answer._replace(blocks=[b._replace(extra={"responses": {"id": "m%d" % (i > 0)}})
                                                                  for i, b in enumerate(answer.blocks)]), CONTEXT)
    processor = R.make_processor("responses", "openai", CONTEXT)
    told = R.fold_stream("openai", processor.feed(stream) + processor.finish(), CONTEXT)
    assert R.join_text(told.blocks) == "Let me look.\n\nHere it is."
    _, sent = R.translate_request({"input": [{"role": "user", "content": "go"}, *items]}, "responses", "openai")
    assert sent["messages"][1] == {"role": "assistant", "content": "Let me look.\n\nHere it is."}
    told = R.translate_response(whole, "responses", "anthropic", CONTEXT)
    assert [block["text"] for block in told["content"]] == ["Let me look.", "Here it ", "is."]


@pytest.mark.parametrize("target", WIRES)
def test_silence_is_borne_for_usage_and_end_but_not_for_long_behind_the_end(target):
    """trap 9"""
    raw = stream_of("openai", ANSWERS["text"])
    processor = R.make_processor("openai", target, CONTEXT)
    waits = [processor.patience_ms(99_000)]
    for event in raw.split(b"\n\n")[:-1]:
        processor.feed(event + b"\n\n")
        waits.append(processor.patience_ms(99_000))
    assert list(dict.fromkeys(waits)) == [99_000, 10_000, 2000]
    assert waits[-1] == 2000 and waits[-2] == 10_000


@pytest.mark.parametrize("wire", WIRES)
def test_a_last_event_without_its_blank_line_counts(wire):
    raw = stream_of(wire, ANSWERS["text"])
    for missing in (1, 2):
        relay = R.StreamRelay(wire, wire, CONTEXT)
        assert run(relay, raw[:-missing]) == raw and relay.failed is None and relay.done


@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_relayed_behind_an_error(wire):
    """trap 19"""
    head = stream_of(wire, ANSWERS["text"], finish=False)
    error = R.WIRE_FORMATS[wire].error_event(R.ErrorInfo(500, "broke"), "up")
    relay = R.StreamRelay(wire, wire, CONTEXT)
    assert relay.feed(head) == head and relay.content
    assert relay.feed(error + DONE) + relay.feed(DONE) + relay.finish() == error
    assert relay.failed is not None and relay.failed.message == "broke"


def test_the_model_in_a_relayed_anthropic_stream_is_the_one_that_was_asked_for():
    """trap 44"""
    data = {
        "type": "message_start",
        "message": {"id": "msg_1", "model": "up", "content": [], "usage": {"input_tokens": 1}},
    }
    first = b"event: message_start\ndata: %s\n\n" % json.dumps(data).encode()
    rest = stream_of("anthropic", ANSWERS["text"]).partition(b"\n\n")[2]
    for sizes in (None, [1] * 2000):
        out = run(R.StreamRelay("anthropic", "anthropic", CONTEXT), first + rest, sizes)
        assert out == first.replace(b'"up"', b'"asked-for"') + rest


@pytest.mark.parametrize(
    "data, expected",
    [
        (b'{"id":1,  "model" : "up", "x":"model"}', b'{"id":1,  "model" : "n\\"", "x":"model"}'),
        (b'{"usage":{"model":"a"},"model":"up"}', b'{"usage":{"model":"a"},"model":"n\\""}'),
        (b'{"x":"\\"model\\":\\"a\\"","model":"up"}', b'{"x":"\\"model\\":\\"a\\"","model":"n\\""}'),
        (b'{"m\\u006fdel":"up","y":{"model":"a"}}', b'{"model":"n\\"","y":{"model":"a"}}'),
        (b'data: {"message":{"model":"up"}}\n\n', b'data: {"message":{"model":"n\\""}}\n\n'),
        (b'{"model":5}', b'{"model":5}'),
        (b"no json", b"no json"),
        (b"[]", b"[]"),
        (b"", b""),
    ],
)
def test_only_the_model_s_own_value_is_replaced(data, expected):
    assert R.rename_model(data, 'n"') == expected


# ---- tools


LONG = "mcp__some-server__" + "x" * 80
ODD = "weather.look up"


def test_tool_names_are_short_legal_unique_and_mapped_back():
    """trap 95"""
    names = [LONG, LONG + "y", ODD, "weather_look up", "ok_name"]
    short = [R.short_tool_name(name) for name in names]
    assert len(set(short)) == len(names) and short[-1] == "ok_name"
    assert all(0 < len(name) <= 64 and name.replace("_", "").replace("-", "").isalnum() for name in short)


@pytest.mark.parametrize("source, target", PAIRS)
def test_tool_names_are_shortened_in_every_place_and_restored_in_every_answer(source, target):
    """trap 95"""
    request = R.ChatRequest(
        "m",
        [
            R.Message("user", [R.Text("a")]),
            R.Message("assistant", [R.ToolCall("c1", LONG, "{}")]),
            R.Message("user", [R.ToolResult("c1", [R.Text("r")])]),
        ],
        tools=[
            R.Tool(LONG, "", {"type": "object", "properties": {}}),
            R.Tool(ODD, "", {"type": "object", "properties": {}}),
        ],
        tool_choice=R.ToolChoice("tool", LONG),
    )
    text = json.dumps(R.render_request(request, target))
    assert LONG not in text and ODD not in text and text.count(R.short_tool_name(LONG)) >= 3
    context = R.Context(request, "req1", 1)
    answer = R.ChatResponse("msg_1", "m", [R.ToolCall("c2", R.short_tool_name(LONG), "{}")], "tool_use")
    body = R.WIRE_FORMATS[source].render_response(answer, CONTEXT)
    assert R.parse_answer(body, source, context).blocks[0].name == LONG
    out, _ = translated(source, target, stream_of(source, answer), context=context)
    assert folded(target, out).blocks[0].name == LONG


@pytest.mark.parametrize("target", R.WIRE_FORMATS)
def test_an_ordinary_request_is_left_as_it_is(target):
    assert R.render_request(REQUEST, target) == R.WIRE_FORMATS[target].render_request(REQUEST)
    assert R.tool_restorer(REQUEST) is None


@pytest.mark.parametrize("pieces", [['{"input":"a\\nb"}'], list('{"input":"a\\nb"}'), ["a\nb"]])
def test_a_custom_tool_gets_its_free_text_back(pieces):
    """trap 60"""
    request = REQUEST._replace(tools=[R.Tool("patch", kind="custom")])
    context = R.Context(request, "req1", 1)
    restorer = R.tool_restorer(request)
    events = [
        R.Opened(R.ToolCall("c", "patch")),
        *map(R.Delta, pieces),
        R.Closed(),
        R.Opened(R.ToolCall("d", "f")),
        R.Delta("{}"),
        R.Closed(),
    ]
    restored = [item for event in events for item in restorer.restore(event)]
    calls = [R.ToolCall("c", "patch", "a\nb", "custom"), R.ToolCall("d", "f", "{}")]
    assert R.fold([R.Started("i", "m"), *restored, R.Finished()]).blocks == calls
    whole = R.ChatResponse("i", "m", [R.ToolCall("c", "patch", "".join(pieces)), R.ToolCall("d", "f", "{}")])
    assert R.restore_tools(whole, context.request).blocks == calls


def test_a_custom_call_that_is_custom_already_streams_on():
    restorer = R.tool_restorer(REQUEST._replace(tools=[R.Tool("patch", kind="custom")]))
    events = [R.Opened(R.ToolCall("c", "patch", kind="custom")), R.Delta("{x"), R.Closed()]
    assert [list(restorer.restore(event)) for event in events] == [[event] for event in events]


CHAT_SAYS = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
RESPONSE_SAYS = {"output": [{"type": "message", "content": [{"type": "output_text", "text": "hi"}]}]}
PLAIN = [
    ("openai", CHAT_SAYS, True),
    ("openai", {"choices": [{"message": {"content": None, "tool_calls": [{"function": {"name": "f"}}]}}]}, True),
    ("openai", {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}, False),
    ("openai", {"choices": [{"message": {"content": "hi"}, "finish_reason": "error"}]}, False),
    ("openai", dict(CHAT_SAYS, error={"message": "x"}), False),
    ("openai", {"text": "hi"}, False),
    ("anthropic", {"content": [{"type": "text", "text": "hi"}]}, True),
    ("anthropic", {"content": [{"type": "text", "text": ""}]}, False),
    ("responses", RESPONSE_SAYS, True),
    ("responses", {"output": []}, False),
    ("responses", dict(RESPONSE_SAYS, error=None), True),
    ("responses", dict(RESPONSE_SAYS, error=None, x={"error": {"message": "x"}}), False),
    ("responses", dict(RESPONSE_SAYS, error={"message": "x"}), False),
]


@pytest.mark.parametrize("wire, body, plain", PLAIN)
def test_only_an_answer_that_says_something_and_no_error_passes_at_a_look(wire, body, plain):
    """Traps 12, 138."""
    assert R.is_plain_answer(body, R.dump_json(body), wire) is plain


# ---- properties, over all nine pairs

ALL_PAIRS = [(source, target) for source in WIRES for target in WIRES]
SEEDS = range(int(os.environ.get("LLM_ROUTER_TEST_SEEDS", "6")))
BITS = ("a", "<think>", "</think>", "\n", " ", "é", "🎉", '"', "\\", "data: x", "[DONE]", "\r\n", "{", "\u2028", "tool")


def some_text(dice):
    return "".join(dice.choice(BITS) for _ in range(dice.randrange(1, 9))) + "."


def some_answer(dice):
    """Any answer that all three formats can tell: reasoning, then text, then calls, in any number and mixture."""
    blocks = [R.Thinking("t" + some_text(dice))] if dice.random() < 0.5 else []
    blocks += [R.Text("x" + some_text(dice))] if dice.random() < 0.7 else []
    for number in range(dice.randrange(4)):
        arguments = json.dumps({some_text(dice): some_text(dice) for _ in range(dice.randrange(3))})
        blocks.append(R.ToolCall("call_%d" % number, dice.choice(["look", "go"]), arguments))
    calls = any(isinstance(block, R.ToolCall) for block in blocks)
    stop = dice.choice(["tool_use" if calls else "end_turn", "max_tokens"])
    usage = R.Usage(dice.randrange(1, 99), dice.randrange(1, 99), dice.randrange(9))
    return R.ChatResponse("msg_1", "m", blocks or [R.Text("x")], stop, usage=usage)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("source, target", ALL_PAIRS)
def test_any_answer_keeps_the_promises_of_the_client_s_format_and_its_meaning(source, target, seed):
    """Traps 20 to 29, 33, 51 to 53, 58: one start, contiguous balanced blocks, one end, unique ids, arguments that are
    objects; streamed and folded, whole and translated, and cut anywhere it is the same."""
    dice = random.Random(1000 * seed + ALL_PAIRS.index((source, target)))
    for _ in range(4):
        answer = some_answer(dice)
        raw = stream_of(source, answer)
        out = run(R.make_processor(source, target, CONTEXT), raw)
        said = STREAM[target](out).gist()
        body = R.WIRE_FORMATS[source].render_response(answer, CONTEXT)
        assert WHOLE[target](R.translate_response(body, source, target, CONTEXT)).gist() == said
        assert WHOLE[target](R.WIRE_FORMATS[target].render_response(folded(source, raw), CONTEXT)).gist() == said
        sizes = [dice.randrange(1, 40) for _ in range(len(raw) // 20)]
        assert run(R.make_processor(source, target, CONTEXT), raw, sizes) == out
        assert said[:2] == ("".join(b.text for b in answer.blocks if isinstance(b, R.Text)), "".join(b.text for b in answer.blocks if isinstance(b, R.Thinking)))
        assert said[2] == [(b.name, json.loads(b.arguments)) for b in answer.blocks if isinstance(b, R.ToolCall)]


@pytest.mark.parametrize(
    "source, part",
    [
        ("openai", {"type": "file", "file": {"file_id": "file-1"}}),
        ("openai", {"type": "video_url", "video_url": {"url": "https://h/v.mp4"}}),
        ("anthropic", {"type": "image", "source": {"type": "file", "file_id": "file-1"}}),
        ("anthropic", {"type": "document", "source": {"type": "file", "file_id": "file-1"}}),
    ],
)
@pytest.mark.parametrize("target", WIRES)
def test_a_part_that_only_its_own_provider_can_read_leaves_a_note(source, part, target):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]}
    text = json.dumps(R.translate_request(body, source, target)[1])
    assert ("[%s left out]" % part["type"] in text) == (source != target) == ("file-1" not in text and "v.mp4" not in text)


ERROR_TOLD_TWICE = [
    {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "status": "in_progress", "output": []}},
    {"type": "response.output_text.delta", "sequence_number": 1, "output_index": 0, "delta": "hi"},
    {"type": "error", "sequence_number": 2, "code": "context_length_exceeded", "message": "too long"},
    {"type": "response.failed", "sequence_number": 3, "response": {"id": "r", "status": "failed", "error": {"code": "x"}}},
]


@pytest.mark.parametrize("reads", [1, 4])
def test_the_end_that_codex_reads_follows_an_error_that_is_relayed_however_the_network_cut_them(reads):
    events = [R.sse_event(R.dump_json(event), event["type"]) for event in ERROR_TOLD_TWICE]
    relay = R.make_processor("responses", "responses", CONTEXT)
    out = b"".join(map(relay.feed, events if reads == 4 else [b"".join(events)])) + relay.finish()
    told = [json.loads(event.data) for event in R.parse_events(out)]
    assert [event["type"] for event in told] == [event["type"] for event in ERROR_TOLD_TWICE]
    numbers = [event["sequence_number"] for event in told]
    assert numbers == sorted(set(numbers)) and told[-1]["response"]["id"] == "r"
