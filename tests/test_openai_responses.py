"""Section 11: the Responses API to and from the neutral form."""

import fnmatch
import json
import os
import random
import re
from pathlib import Path

import pytest

import llm_router as router
from llm_router import (
    OPENAI_RESPONSES,
    ChatRequest,
    ChatResponse,
    Closed,
    Context,
    Delta,
    ErrorInfo,
    Extended,
    Failed,
    Finished,
    JsonOutput,
    Media,
    Message,
    Opaque,
    Opened,
    Reasoning,
    Refusal,
    ResponsesParser,
    ResponsesRenderer,
    RouterError,
    Started,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Usage,
    fold,
    needs_server_state,
    parse_responses_request,
    render_responses_request,
    render_responses_response,
    unfold,
)
from sse_decoder import SseDecoder

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
PATCH_TOOL = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: LINE"},
}
FUNCTION = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": False,
}
NAMESPACE = {
    "type": "namespace",
    "name": "team",
    "description": "Helpers.",
    "tools": [
        {"type": "function", "name": "spawn", "parameters": {"type": "object", "properties": {}}, "strict": False}
    ],
}


def context(tools=(), **fields):
    return Context(
        parse_responses_request({"model": "asked", "input": "hi", "tools": list(tools), **fields}), "rid", 1700000000
    )


def sse(events):
    return b"".join(b"event: %s\ndata: %s\n\n" % (e["type"].encode(), json.dumps(e).encode()) for e in events)


def read(data, where=None, cut=0):
    """The neutral events of a stream, cut in two at byte `cut`."""
    decoder, parser, events = SseDecoder(), ResponsesParser(where or context()), []
    for event in decoder.feed(data[:cut]) + decoder.feed(data[cut:]) + decoder.finish():
        events += parser.feed(event)
    return events + parser.finish()


def write(events, where=None):
    renderer = ResponsesRenderer(where or context())
    return b"".join(map(renderer.render, events))


def payloads(data):
    return [json.loads(event.data) for event in router.parse_events(data)]


def kinds(data):
    return [payload["type"] for payload in payloads(data)]


def check_order(events):
    is_open, ended = False, False
    assert isinstance(events[0], Started) and sum(isinstance(e, Started) for e in events) == 1
    for event in events:
        assert not ended
        if isinstance(event, Opened):
            assert not is_open
            is_open = True
        elif isinstance(event, Closed):
            assert is_open
            is_open = False
        elif isinstance(event, (Delta, Extended)):
            assert is_open and (not isinstance(event, Delta) or event.text)
        elif isinstance(event, (Finished, Failed)):
            assert isinstance(event, Failed) or not is_open
            ended = True
    assert ended


# What a Responses server sends: each item as (item, [events while it is open]); ids and numbers are added.
REASONING = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "First."}, {"type": "summary_text", "text": "Then."}],
    "encrypted_content": "xyz",
}
ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "phase": "commentary",
    "content": [
        {
            "type": "output_text",
            "text": "Grüße, 中",
            "annotations": [{"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}],
        }
    ],
}
CALL = {
    "id": "fc_1",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_1",
    "name": "look",
    "arguments": '{"at":"x"}',
}
SEARCH = {"id": "ws_1", "type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "q"}}
PATCH = {"id": "ctc_1", "type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": "*** Begin"}
USAGE = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
    "output_tokens": 40,
    "output_tokens_details": {"reasoning_tokens": 15},
    "total_tokens": 140,
}


def snapshot(output, **fields):
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000001,
        "status": "completed",
        "model": "up",
        "output": output,
        "usage": USAGE,
        "error": None,
        "incomplete_details": None,
        **fields,
    }


def item_events(item, index, rotate=False):
    """added, deltas of three characters, done events, done; rotate: a new item id in each event."""
    names = iter("id_%d_%d" % (index, n) for n in range(10000))

    def at():
        return {"output_index": index, "item_id": next(names) if rotate else item["id"]}

    bare = {**item, **{key: type(item[key])() for key in ("content", "summary", "arguments", "input") if key in item}}
    bare.pop("encrypted_content", None)
    events = [{"type": "response.output_item.added", "output_index": index, "item": bare}]
    texts = [
        ("output_text", "content_index", n, p["text"])
        for n, p in enumerate(item.get("content") or [])
        if p["type"] == "output_text"
    ]
    texts += [
        ("reasoning_summary_text", "summary_index", n, p["text"]) for n, p in enumerate(item.get("summary") or [])
    ]
    texts += [
        (name, "unused", 0, item[field])
        for name, field in (("function_call_arguments", "arguments"), ("custom_tool_call_input", "input"))
        if field in item
    ]
    for name, key, number, text in texts:
        events += [
            {"type": "response.%s.delta" % name, key: number, "delta": text[i : i + 3], **at()}
            for i in range(0, len(text), 3)
        ]
        field = {"function_call_arguments": "arguments", "custom_tool_call_input": "input"}.get(name, "text")
        events.append({"type": "response.%s.done" % name, key: number, field: text, **at()})
        if name == "output_text":
            events.append({"type": "response.content_part.done", key: number, "part": item["content"][number], **at()})
    done = {**item, "id": next(names)} if rotate else item
    return events + [{"type": "response.output_item.done", "output_index": index, "item": done}]


def stream(items, end="response.completed", output=None, rotate=False, **fields):
    start = {"type": "response.created", "response": {**snapshot([]), "status": "in_progress", "usage": None}}
    events = [start, {**start, "type": "response.in_progress"}]
    for index, item in enumerate(items):
        events += item_events(item, index, rotate)
    return sse(events + [{"type": end, "response": snapshot(items if output is None else output, **fields)}])


FULL = [REASONING, ANSWER, SEARCH, CALL, PATCH]


# --- Streams, reading


def test_every_cut_of_a_stream_gives_the_same_events():
    """trap 1, trap 6"""
    data = stream([{**ANSWER, "content": [{"type": "output_text", "text": "ü中"}]}, CALL], output=[])
    whole = read(data)
    check_order(whole)
    for cut in range(len(data)):
        assert read(data, cut=cut) == whole


def test_a_stream_and_the_whole_answer_mean_the_same():
    whole = OPENAI_RESPONSES.parse_response(snapshot(FULL), context())
    assert fold(read(stream(FULL))) == whole
    assert whole.blocks == [
        Thinking("First.\n\nThen.", {"responses": {"id": "rs_1", "encrypted_content": "xyz"}}),
        Text(
            "Grüße, 中",
            {"responses": {"id": "msg_1", "phase": "commentary", "annotations": ANSWER["content"][0]["annotations"]}},
        ),
        Opaque("responses", SEARCH),
        ToolCall("call_1", "look", '{"at":"x"}', extra={"responses": {"id": "fc_1"}}),
        ToolCall("call_2", "apply_patch", "*** Begin", "custom", {"responses": {"id": "ctc_1"}}),
    ]
    assert whole.usage == Usage(30, 40, 60, 10, 15)
    assert (whole.id, whole.model, whole.created, whole.stop_reason) == ("resp_1", "up", 1700000001, "tool_use")


def test_items_are_collected_when_the_final_snapshot_is_empty():
    """trap 59"""
    assert fold(read(stream(FULL, output=[]))) == fold(read(stream(FULL)))


def test_a_snapshot_alone_is_enough():
    assert (
        fold(read(sse([{"type": "response.completed", "response": snapshot(FULL)}]))).blocks
        == fold(read(stream(FULL))).blocks
    )


def test_changing_item_ids_do_not_split_an_item():
    """Some upstreams change the ids with every event: output_index decides."""
    assert [type(b) for b in fold(read(stream(FULL, rotate=True))).blocks] == [
        Thinking,
        Text,
        Opaque,
        ToolCall,
        ToolCall,
    ]
    assert fold(read(stream([CALL], rotate=True))).blocks[0].arguments == CALL["arguments"]


def test_arguments_that_are_an_object_become_text():
    """Without them the tool would be run with none at all."""
    item = dict(CALL, arguments={"a": [1]})
    whole = {"object": "response", "status": "completed", "output": [item]}
    answer = router.parse_answer(whole, "responses", context())
    assert json.loads(answer.blocks[0].arguments) == {"a": [1]}
    _, sent = router.translate_request({"input": [item]}, "responses", "openai")
    assert json.loads(sent["messages"][0]["tool_calls"][0]["function"]["arguments"]) == {"a": [1]}


@pytest.mark.parametrize("keep", range(5))
def test_what_the_deltas_left_out_comes_from_the_done_event(keep):
    """trap 61"""
    events = payloads(stream([CALL, PATCH, ANSWER]))
    seen = {}
    for event in list(events):
        if event["type"].endswith(".delta"):
            seen[event["type"]] = seen.get(event["type"], 0) + 1
            if seen[event["type"]] > keep:
                events.remove(event)
    assert fold(read(sse(events))).blocks == fold(read(stream([CALL, PATCH, ANSWER]))).blocks


@pytest.mark.parametrize(
    "gone",
    [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.done",
    ],
)
def test_a_stream_without_one_kind_of_event_is_still_read(gone):
    """trap 58, trap 61"""
    events = [event for event in payloads(stream([REASONING, ANSWER, CALL])) if event["type"] != gone]
    events_read = read(sse(events))
    check_order(events_read)
    blocks = fold(events_read).blocks
    assert [type(b) for b in blocks] == [Thinking, Text, ToolCall]
    assert blocks[1].text == "Grüße, 中"
    assert (blocks[2].name, blocks[2].arguments) == ("look", '{"at":"x"}')


def test_events_without_output_index_belong_to_the_item_they_name():
    """trap 58"""
    events = payloads(stream([ANSWER, CALL]))
    for event in events:
        event.pop("output_index", None)
    assert [getattr(b, "text", getattr(b, "arguments", "")) for b in fold(read(sse(events))).blocks] == [
        "Grüße, 中",
        '{"at":"x"}',
    ]


def test_items_that_overlap_are_sent_on_one_after_the_other():
    """trap 33"""
    one, two, three = (
        item_events(CALL, 0),
        item_events({**CALL, "id": "fc_2", "call_id": "call_9"}, 1),
        item_events(ANSWER, 2),
    )
    mixed = (
        [event for trio in zip(one, two, three) for event in trio]
        + one[len(three) :]
        + two[len(three) :]
        + three[min(map(len, (one, two, three))) :]
    )
    mixed += [
        e for e in one[min(map(len, (one, two, three))) :] + two[min(map(len, (one, two, three))) :] if e not in mixed
    ]
    events = read(sse(mixed + [{"type": "response.completed", "response": snapshot([])}]))
    check_order(events)
    assert sorted(getattr(b, "id", "") for b in fold(events).blocks) == ["", "call_1", "call_9"]
    assert all(b.arguments == CALL["arguments"] for b in fold(events).blocks if isinstance(b, ToolCall))


@pytest.mark.parametrize(
    "fields,stop",
    [
        ({}, "end_turn"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "max_tokens"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "refusal"),
        ({"status": "incomplete", "incomplete_details": None}, "max_tokens"),
    ],
)
def test_stop_reasons_follow_from_status_and_details(fields, stop):
    """trap 47"""
    end = "response.incomplete" if fields else "response.completed"
    assert fold(read(stream([ANSWER], end=end, **fields))).stop_reason == stop
    assert OPENAI_RESPONSES.parse_response(snapshot([ANSWER], **fields), context()).stop_reason == stop


def test_a_call_means_tool_use_but_a_cut_off_answer_stays_cut_off():
    """trap 30, trap 62"""
    cut = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert fold(read(stream([CALL]))).stop_reason == "tool_use"
    assert fold(read(stream([CALL], end="response.incomplete", **cut))).stop_reason == "max_tokens"


def test_a_refusal_is_a_refusal():
    """trap 46"""
    item = {**ANSWER, "content": [{"type": "refusal", "refusal": "No."}]}
    events = [
        {"type": "response.refusal.delta", "output_index": 0, "content_index": 0, "delta": "No"},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    answer = fold(read(sse(events + [{"type": "response.completed", "response": snapshot([item])}])))
    assert answer.blocks[0].text == "No." and isinstance(answer.blocks[0], Refusal)
    assert answer.stop_reason == "refusal" == OPENAI_RESPONSES.parse_response(snapshot([item]), context()).stop_reason


def test_reasoning_without_text_says_nothing_to_other_formats():
    """trap 32"""
    silent = {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "xyz"}
    assert fold(read(stream([silent, ANSWER]))).blocks[0] == Opaque("responses", silent)


def test_raw_reasoning_of_open_models_is_thinking():
    item = {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hmm."}]}
    events = [
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {
            "type": "response.content_part.added",
            "output_index": 0,
            "content_index": 0,
            "part": {"type": "reasoning_text", "text": ""},
        },
        {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0, "delta": "Hm"},
        {"type": "response.reasoning_text.done", "output_index": 0, "content_index": 0, "text": "Hmm."},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    thinking = Thinking("Hmm.", {"responses": {"id": "rs_1", "part": "reasoning_text"}})
    assert fold(read(sse(events + [{"type": "response.completed", "response": snapshot([item])}]))).blocks == [thinking]
    assert OPENAI_RESPONSES.parse_response(snapshot([item]), context()).blocks == [thinking]


def test_reasoning_told_twice_is_told_once():
    """A summary and the raw text of one item say the same: the first to come is shown."""
    item = {**REASONING, "content": [{"type": "reasoning_text", "text": "First. And so on."}]}
    deltas = [
        {"type": "response.%s.delta" % kind, "output_index": 0, "delta": text}
        for kind, text in (("reasoning_summary_text", "First."), ("reasoning_text", "First. And so on."))
    ]
    done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    events = read(sse(deltas + [done, {"type": "response.completed", "response": snapshot([item])}]))
    assert fold(events).blocks[0].text == "First.\n\nThen."


@pytest.mark.parametrize("count", range(1, len(payloads(stream(FULL)))))
def test_a_stream_without_its_end_is_truncated(count):
    """trap 14, trap 62"""
    events = read(sse(payloads(stream(FULL))[:count]))
    check_order(events)
    assert fold(events).code == "truncated"
    assert isinstance(events[-1], Failed)


@pytest.mark.parametrize(
    "event,status,code",
    [
        (
            {
                "type": "response.failed",
                "response": {"status": "failed", "error": {"code": "rate_limit_exceeded", "message": "slow"}},
            },
            429,
            "rate_limit_exceeded",
        ),
        (
            {
                "type": "response.failed",
                "response": {"status": "failed", "error": {"code": "context_length_exceeded", "message": "slow"}},
            },
            400,
            "context_length_exceeded",
        ),
        ({"type": "error", "code": "server_error", "message": "slow", "param": None}, 500, "server_error"),
        ({"type": "error", "error": {"type": "invalid_request_error", "code": None, "message": "slow"}}, 400, ""),
        ({"error": {"message": "slow", "code": 503}}, 503, "503"),
    ],
)
def test_errors_in_a_stream_are_errors(event, status, code):
    """trap 19, trap 130"""
    for start in (b"", sse(payloads(stream([ANSWER]))[:5])):
        events = read(start + b"data: " + json.dumps(event).encode() + b"\n\n")
        check_order(events)
        error = fold(events)
        assert (error.status, error.code, error.message) == (status, code, "slow")


def test_a_failed_whole_answer_raises():
    with pytest.raises(RouterError) as caught:
        OPENAI_RESPONSES.parse_response(
            snapshot([], status="failed", error={"code": "server_error", "message": "broke"}), context()
        )
    assert (caught.value.message, caught.value.status, caught.value.code) == ("broke", 500, "server_error")


def test_broken_events_are_skipped_and_counted():
    """trap 13"""
    parser, events = ResponsesParser(context()), []
    for event in router.parse_events(
        b"data: {oops\n\ndata: 7\n\ndata: {}\n\n" + stream([ANSWER]) + b"data: [DONE]\n\n"
    ):
        events += parser.feed(event)
    assert parser.skipped == 3 and parser.done and fold(events).blocks[0].text == "Grüße, 中"
    assert parser.usage == Usage(30, 40, 60, 10, 15)


def test_a_call_without_an_id_gets_one():
    """trap 36"""
    calls = [{key: value for key, value in CALL.items() if key not in ("id", "call_id")} for _ in "ab"]
    blocks = OPENAI_RESPONSES.parse_response(snapshot(calls), context()).blocks
    assert [block.id for block in blocks] == ["call_rid_0", "call_rid_1"]


def test_the_proof_of_reasoning_is_the_one_at_its_end():
    """Servers announce a reasoning item with an encrypted content that its end replaces."""
    events = item_events(REASONING, 0)
    events[0]["item"]["encrypted_content"] = "early"
    block = fold(read(sse(events + [{"type": "response.completed", "response": snapshot([REASONING])}]))).blocks[0]
    assert block.extra["responses"]["encrypted_content"] == "xyz"


def test_a_text_told_again_after_its_end_is_told_once():
    events = item_events(ANSWER, 0)
    again = [event for event in events if event["type"] == "response.output_text.done"]
    answer = fold(
        read(sse(events[:-1] + again + events[-1:] + [{"type": "response.completed", "response": snapshot([])}]))
    )
    assert [block.text for block in answer.blocks] == ["Grüße, 中"]


# --- Streams, writing


ROUND = ChatResponse(
    "resp_7",
    "asked",
    [
        Thinking("because"),
        Text("a"),
        Text("b \U0001f600"),
        ToolCall("c1", "look", '{"at":1}'),
        ToolCall("c2", "apply_patch", "+x\n", "custom"),
        ToolCall("c3", "team__spawn", "{}", extra={"responses": {"namespace": "team"}}),
        Thinking("raw", {"responses": {"part": "reasoning_text", "encrypted_content": "e"}}),
        Opaque("responses", SEARCH),
        Text(
            "cited",
            {
                "responses": {
                    "annotations": [{"type": "file_path", "file_id": "f", "index": 0}],
                    "id": "msg_up",
                    "phase": "final_answer",
                }
            },
        ),
    ],
    "tool_use",
    "",
    Usage(3, 4, 5, 6, 1),
    1700000005,
)


def unmarked(answer):
    """The answer without the marks of texts that are a further message's."""
    bags = [{**(getattr(block, "extra", None) or {})} for block in answer.blocks]
    marks = [bag.pop("openai", None) for bag in bags]
    return answer._replace(
        blocks=[b._replace(extra=bag or None) if mark else b for b, bag, mark in zip(answer.blocks, bags, marks)]
    )


def test_a_rendered_answer_reads_back_as_it_was():
    where = context([PATCH_TOOL, FUNCTION, NAMESPACE])
    assert unmarked(fold(read(write(unfold(ROUND), where), where))) == ROUND
    assert unmarked(OPENAI_RESPONSES.parse_response(render_responses_response(ROUND, where), where)) == ROUND


@pytest.mark.parametrize("seed", range(40))
def test_random_answers_read_back_as_they_were(seed):
    dice = random.Random(seed)
    where = context([PATCH_TOOL, FUNCTION])
    makers = [
        lambda n: Text("t%d" % n),
        lambda n: Thinking("h%d" % n),
        lambda n: Thinking("h%d" % n, {"responses": {"encrypted_content": "e"}}),
        lambda n: ToolCall("c%d" % n, "look", '{"n":%d}' % n),
        lambda n: ToolCall("c%d" % n, "apply_patch", "text %d" % n, "custom"),
        lambda n: Opaque("responses", {**SEARCH, "id": "ws_%d" % n}),
    ]
    blocks = [dice.choice(makers)(n) for n in range(dice.randrange(8))]
    stop = (
        "tool_use"
        if any(isinstance(b, ToolCall) for b in blocks)
        else dice.choice(["end_turn", "max_tokens", "refusal"])
    )
    answer = ChatResponse("resp_x", "asked", blocks, stop, "", Usage(1, 2), 5)
    data = write(unfold(answer), where)
    assert unmarked(fold(read(data, where))) == answer
    check_life_cycle(data)


def check_life_cycle(data):
    """trap 58: every item is added, filled and done, numbered without gaps, and the final snapshot has it all."""
    seen, done = [], []
    for number, payload in enumerate(payloads(data)):
        kind = payload["type"]
        assert payload["sequence_number"] == number
        if kind == "response.output_item.added":
            assert payload["output_index"] == len(seen) == len(done)
            seen.append(payload["item"]["id"])
        elif kind == "response.output_item.done":
            assert payload["item"]["id"] == seen[payload["output_index"]]
            done.append(payload["item"])
        elif "item_id" in payload:
            assert payload["item_id"] == seen[-1] and payload["output_index"] == len(seen) - 1
    assert kinds(data)[:2] == ["response.created", "response.in_progress"]
    final = payloads(data)[-1]["response"]
    assert final["output"] == done and len(done) == len(seen)
    assert {
        "id",
        "created_at",
        "model",
        "object",
        "parallel_tool_calls",
        "tool_choice",
        "tools",
        "usage",
        "metadata",
        "text",
        "reasoning",
    } <= set(final)
    return final


def test_the_whole_life_cycle_is_told():
    """trap 58"""
    final = check_life_cycle(write(unfold(ROUND), context([PATCH_TOOL, FUNCTION, NAMESPACE])))
    assert final["status"] == "completed" and final["object"] == "response" and final["id"] == "resp_7"
    assert final["usage"] == {
        "input_tokens": 14,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 6},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 18,
    }
    assert kinds(write(unfold(ROUND._replace(blocks=[Text("hi")]))))[2:] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_texts_in_a_row_are_parts_of_one_message():
    output = render_responses_response(
        ROUND._replace(blocks=[Text("a"), Text("b"), Text("c", {"responses": {"phase": "final_answer"}})]), context()
    )["output"]
    assert [[part["text"] for part in item["content"]] for item in output] == [["a", "b"], ["c"]]


def test_the_answer_repeats_the_request():
    body = {
        "instructions": "be brief",
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "text": {"verbosity": "low"},
        "tool_choice": {"type": "function", "name": "look"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    final = render_responses_response(ROUND, context([FUNCTION, PATCH_TOOL, NAMESPACE, {"type": "web_search"}], **body))
    assert final["tools"] == [FUNCTION, PATCH_TOOL, NAMESPACE, {"type": "web_search"}]
    assert {key: final[key] for key in body if key != "text"} == {
        key: value for key, value in body.items() if key != "text"
    }
    assert final["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert final["model"] == "asked"  # trap 44
    assert final["store"] is False


def test_a_custom_tool_called_as_a_function_comes_back_as_custom_call():
    """trap 60: the JSON is unwrapped, however it was cut."""
    where = context([PATCH_TOOL])
    restorer = router.tool_restorer(where.request)
    pieces = ['{"inp', 'ut": "a\\', "nb", '"}']
    events = [
        Started("r", "m"),
        Opened(ToolCall("c", "apply_patch")),
        *map(Delta, pieces),
        Closed(),
        Finished("tool_use"),
    ]
    data = write([restored for event in events for restored in restorer.restore(event)], where)
    assert [p["delta"] for p in payloads(data) if p["type"] == "response.custom_tool_call_input.delta"] == ["a\nb"]
    assert [p["input"] for p in payloads(data) if p["type"] == "response.custom_tool_call_input.done"] == ["a\nb"]
    assert fold(read(data, where)).blocks == [ToolCall("c", "apply_patch", "a\nb", "custom")]
    assert payloads(data)[-1]["response"]["output"][0]["type"] == "custom_tool_call"


def test_a_native_custom_call_is_streamed_as_it_comes():
    events = [
        Started("r", "m"),
        Opened(ToolCall("c", "apply_patch", kind="custom")),
        Delta("*** "),
        Delta("Begin"),
        Closed(),
        Finished("tool_use"),
    ]
    assert [p["delta"] for p in payloads(write(events, context([PATCH_TOOL]))) if "delta" in p] == ["*** ", "Begin"]


def test_a_call_of_a_tool_in_a_namespace_names_both():
    item = render_responses_response(ROUND._replace(blocks=[ToolCall("c", "team__spawn", "{}")]), context([NAMESPACE]))[
        "output"
    ][0]
    assert (item["namespace"], item["name"]) == ("team", "spawn")
    answer = OPENAI_RESPONSES.parse_response(snapshot([{**CALL, "name": "spawn", "namespace": "team"}]), context([NAMESPACE]))
    assert answer.blocks[0].name == "team__spawn"


def test_a_call_without_arguments_has_an_empty_object():
    """trap 41"""
    assert (
        render_responses_response(ROUND._replace(blocks=[ToolCall("c", "look")]), context())["output"][0]["arguments"]
        == "{}"
    )


def test_empty_texts_make_no_item():
    """trap 32"""
    data = write(
        [
            Started("r", "m"),
            Opened(Text("")),
            Closed(),
            Opened(Thinking("")),
            Closed(),
            Opened(Text("")),
            Delta("x"),
            Closed(),
            Finished(),
        ]
    )
    assert [item["type"] for item in payloads(data)[-1]["response"]["output"]] == ["message"]


@pytest.mark.parametrize(
    "stop,end,reason",
    [
        ("end_turn", "completed", None),
        ("stop_sequence", "completed", None),
        ("tool_use", "completed", None),
        ("pause_turn", "completed", None),
        ("max_tokens", "incomplete", "max_output_tokens"),
        ("model_context_window_exceeded", "incomplete", "max_output_tokens"),
        ("refusal", "incomplete", "content_filter"),
    ],
)
def test_every_stop_reason_has_its_ending(stop, end, reason):
    """trap 10, trap 47"""
    last = payloads(write(unfold(ROUND._replace(stop_reason=stop))))[-1]
    assert last["type"] == "response." + end and last["response"]["status"] == end
    assert (last["response"]["incomplete_details"] or {}).get("reason") == reason


def test_a_refusal_that_is_told_is_a_complete_answer():
    """trap 46"""
    told = payloads(write(unfold(ROUND._replace(blocks=[Refusal("no")], stop_reason="refusal"))))[-1]["response"]
    assert (told["status"], told["output"][0]["content"]) == ("completed", [{"type": "refusal", "refusal": "no"}])


def test_an_answer_repeats_the_instructions_and_no_other_message():
    where = context(
        instructions="be brief", input=[{"role": "developer", "content": "long"}, {"role": "user", "content": "x"}]
    )
    assert render_responses_response(ROUND, where)["instructions"] == "be brief"


def test_a_cut_off_call_never_looks_complete():
    """trap 62: clients run a call as soon as its item is done."""
    start = [
        Started("r", "m"),
        Opened(Text("")),
        Delta("x"),
        Closed(),
        Opened(ToolCall("c", "look")),
        Delta('{"a'),
        Closed(),
    ]
    failed = write(start + [Failed(ErrorInfo(502, "cut", code="truncated"))])
    assert kinds(failed)[-1] == "response.failed" and "response.function_call_arguments.done" not in kinds(failed)
    assert [p["item"]["type"] for p in payloads(failed) if p["type"] == "response.output_item.done"] == ["message"]
    assert payloads(failed)[-1]["response"]["error"] == {"code": "server_error", "message": "cut"}
    assert payloads(write(start + [Finished("max_tokens")]))[-1]["response"]["output"][-1]["status"] == "incomplete"


@pytest.mark.parametrize(
    "info,code",
    [
        (ErrorInfo(429, "m"), "rate_limit_exceeded"),
        (ErrorInfo(400, "m", code="context_length_exceeded"), "context_length_exceeded"),
        (ErrorInfo(400, "m", code="weird"), "invalid_prompt"),
        (ErrorInfo(529, "m", "overloaded_error"), "server_error"),
    ],
)
def test_failures_have_a_code_that_clients_know(info, code):
    for data in (write([Failed(info)]), router.WIRE_FORMATS["responses"].error_event(info, "rid")):
        last = payloads(data)[-1]
        assert last["type"] == "response.failed" and last["response"]["error"] == {"code": code, "message": "m"}


def test_a_failure_is_told_as_openai_tells_it_by_an_error_event_first():
    """openai-python raises an `error` event with a member `error`, and hands on `response.failed`, which nobody looks at
    who iterates over the events; ResponseErrorEvent has the fields of the first beside it."""
    info = ErrorInfo(429, "slow down", "tokens", "rate_limit_exceeded", "model")
    for data in (write([Failed(info)]), router.WIRE_FORMATS["responses"].error_event(info, "rid")):
        told, failed = payloads(data)[-2:]
        said = {"code": "rate_limit_exceeded", "message": "slow down", "param": "model"}
        number = failed["sequence_number"] - 1
        assert told == {"type": "error", "sequence_number": number, **said, "error": {"type": "tokens", **said}}
        assert failed["type"] == "response.failed"
        assert b"event: error\n" in data


def test_awkward_text_survives_the_templates():
    """trap 17"""
    text = 'quote " back \\ line \n\u2028 \x00 % %s {} \ud800'
    data = write([Started("r", "m"), Opened(Text("")), Delta(text), Closed(), Finished()])
    assert fold(read(data)).blocks[0].text == text and data.isascii()


# --- Requests


def test_a_codex_request_is_understood():
    request = parse_responses_request(
        {
            "model": "m",
            "stream": True,
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "input": [
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "developer",
                    "content": [{"type": "input_text", "text": "You code."}],
                },
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "e"},
                {
                    "type": "function_call",
                    "id": "fc_1",
                    "name": "look",
                    "arguments": "{}",
                    "call_id": "c1",
                    "status": "completed",
                },
                {
                    "type": "function_call",
                    "id": "fc_2",
                    "name": "spawn",
                    "namespace": "team",
                    "arguments": "{}",
                    "call_id": "c2",
                },
                {"type": "custom_tool_call", "name": "apply_patch", "input": "+", "call_id": "c3"},
                {"type": "function_call_output", "id": "fco", "call_id": "c1", "output": "seen"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [
                        {"type": "input_text", "text": "a"},
                        {"type": "input_image", "image_url": "data:image/png;base64,QUJD"},
                    ],
                },
                {"type": "custom_tool_call_output", "call_id": "c3", "output": "ok"},
                {
                    "type": "message",
                    "role": "assistant",
                    "phase": "final_answer",
                    "content": [{"type": "output_text", "text": "done", "annotations": []}],
                },
                {"role": "developer", "content": "note"},
            ],
            "tools": [FUNCTION, NAMESPACE, PATCH_TOOL, {"type": "web_search", "external_web_access": True}],
            "tool_choice": "auto",
            "reasoning": {"summary": "auto"},
            "client_metadata": {"x": "y"},
        }
    )
    assert request.system == [Text("You code.")]
    assert request.messages == [
        Message("user", [Text("go")]),
        Message(
            "assistant",
            [
                Opaque("responses", {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "e"}),
                ToolCall("c1", "look", "{}"),
                ToolCall("c2", "team__spawn", "{}", extra={"responses": {"namespace": "team"}}),
                ToolCall("c3", "apply_patch", "+", "custom"),
            ],
        ),
        Message(
            "user",
            [
                ToolResult("c1", [Text("seen")]),
                ToolResult("c2", [Text("a"), Media("image", "image/png", "QUJD")]),
                ToolResult("c3", [Text("ok")]),
            ],
        ),
        Message("assistant", [Text("done")]),
        Message("system", [Text("note")]),
    ]
    assert [(tool.name, tool.kind) for tool in request.tools] == [
        ("look", "function"),
        ("team__spawn", "function"),
        ("apply_patch", "custom"),
    ]
    assert request.tool_choice == ToolChoice("auto") and request.stream
    assert request.reasoning == Reasoning()
    assert request.fields["responses"]["client_metadata"] == {"x": "y"}


@pytest.mark.parametrize("value", [None, {}, {"effort": None, "summary": None}])
def test_who_says_nothing_of_reasoning_asks_for_none(value):
    """A Response shows such an object where nothing was asked for; Anthropic's models began to think for it."""
    _, body = router.translate_request({"input": "q", "reasoning": value}, "responses", "anthropic", "claude-sonnet-4-5")
    assert "thinking" not in body


def test_simple_fields_have_their_place():
    request = parse_responses_request(
        {
            "model": "m",
            "input": "hi",
            "instructions": "be",
            "max_output_tokens": 9,
            "temperature": 0,
            "top_p": 0.5,
            "parallel_tool_calls": False,
            "safety_identifier": "me",
            "text": {
                "format": {
                    "type": "json_schema",
                    "name": "n",
                    "schema": {"type": "object"},
                    "strict": True,
                    "description": "d",
                },
                "verbosity": "low",
            },
            "reasoning": {"effort": "high"},
        }
    )
    assert request.messages == [Message("user", [Text("hi")])] and request.system == [Text("be")]
    assert (request.max_tokens, request.temperature, request.top_p, request.parallel_tools, request.user) == (
        9,
        0,
        0.5,
        False,
        "me",
    )
    assert request.output == JsonOutput({"type": "object"}, "n", True, "d") and request.reasoning == Reasoning("high")
    assert router.render_request(request, "openai")["verbosity"] == "low"
    assert parse_responses_request({"input": "x", "text": {"format": {"type": "json_object"}}}).output == JsonOutput()
    assert parse_responses_request({"input": "x", "text": {"format": {"type": "text"}}}).output is None


def test_parts_become_media():
    parts = [
        {"type": "input_image", "image_url": "https://x/y.png", "detail": "high"},
        {"type": "input_file", "file_data": "data:application/pdf;base64,QUJD", "filename": "a.pdf"},
        {"type": "input_file", "file_url": "https://x/a.pdf"},
        {"type": "input_file"},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        {"type": "input_file", "file_data": "QUJD", "filename": "a.txt"},
    ]
    blocks = parse_responses_request({"input": [{"role": "user", "content": parts}]}).messages[0].blocks
    assert blocks == [
        Media("image", url="https://x/y.png", extra={"openai": {"detail": "high"}}),
        Media("document", "application/pdf", "QUJD", name="a.pdf"),
        Media("document", url="https://x/a.pdf"),
        Media("audio", "audio/mp3", "QUJD"),
        Media("document", "text/plain", "QUJD", name="a.txt"),
    ]
    rendered = render_responses_request(ChatRequest("m", [Message("user", blocks)]))["input"][0]["content"]
    assert rendered[:4] == [*parts[:3], {"type": "input_text", "text": "[audio left out: audio/mp3]"}]


@pytest.mark.parametrize("title, name", [
    (None, "document.pdf"), ("The third quarter", "The third quarter.pdf"), ("Version 1.2", "Version 1.2.pdf"), ("a.PDF", "a.PDF"),
])  # fmt: skip
def test_a_pdf_without_a_name_gets_one_with_its_ending(title, name):
    """As the AI SDK's `part-0.pdf`: OpenAI goes by the ending of the name. Anthropic's documents have a title, or none."""
    source = {"type": "base64", "media_type": "application/pdf", "data": "QUJD"}
    said = {"role": "user", "content": [{"type": "document", "source": source, "title": title}]}
    body = router.translate_request({"model": "m", "max_tokens": 9, "messages": [said]}, "anthropic", "responses")[1]
    data = {"file_data": "data:application/pdf;base64,QUJD", "filename": name}
    assert body["input"][0]["content"] == [{"type": "input_file", **data}]
    body = router.translate_request({"model": "m", "max_tokens": 9, "messages": [said]}, "anthropic", "openai")[1]
    assert body["messages"][0]["content"] == [{"type": "file", "file": data}]


def test_instructions_alone_are_the_input():
    """An empty `input` is refused; Chat Completions knows no such rule."""
    body = render_responses_request(ChatRequest("m", [], [Text("be brief")]))
    assert body["input"] == [{"type": "message", "role": "system", "content": "be brief"}] and "instructions" not in body
    blank = router.render_request(ChatRequest("m", [Message("user", [Text(" ")])]), "responses")
    assert blank["input"] == [{"type": "message", "role": "user", "content": "(continue)"}]


@pytest.mark.parametrize(
    "choice,neutral",
    [
        ("required", ToolChoice("any")),
        ("none", ToolChoice("none")),
        ({"type": "function", "name": "look"}, ToolChoice("tool", "look")),
        ({"type": "custom", "name": "apply_patch"}, ToolChoice("tool", "apply_patch")),
        ({"type": "function", "name": "spawn", "namespace": "team"}, ToolChoice("tool", "team__spawn")),
        (None, None),
    ],
)
def test_tool_choice_both_ways(choice, neutral):
    """trap 96"""
    request = parse_responses_request({"input": "x", "tools": [FUNCTION, PATCH_TOOL, NAMESPACE], "tool_choice": choice})
    assert request.tool_choice == neutral
    written = render_responses_request(request).get("tool_choice")
    flat = {"type": "function", "name": "team__spawn"}
    assert written == (flat if isinstance(choice, dict) and "namespace" in choice else choice)


def test_allowed_tools_hide_the_others():
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    request = parse_responses_request(
        {"input": "x", "tools": [FUNCTION, PATCH_TOOL, {"type": "web_search"}], "tool_choice": choice}
    )
    assert request.tool_choice == ToolChoice("any") and [tool.name for tool in request.tools] == ["look"]


def test_a_custom_tool_of_a_namespace_keeps_its_grammar_and_leaves_nothing_else_in_the_function():
    """trap 60"""
    request = parse_responses_request({"input": "x", "tools": [{**NAMESPACE, "tools": [PATCH_TOOL]}]})
    (tool,) = router.render_request(request, "openai")["tools"]
    assert set(tool) == {"type", "function"} and tool["function"]["name"] == "team__apply_patch"
    assert "start: LINE" in tool["function"]["description"]


def test_tools_that_a_client_s_search_found_are_tools_and_none_is_told_twice():
    found = [{**FUNCTION, "description": "again"}, {**FUNCTION, "name": "late"}, NAMESPACE, {**NAMESPACE, "name": "b"}]
    search = {"type": "tool_search_output", "call_id": "s", "execution": "client", "tools": found}
    body = {"model": "m", "input": [{"role": "user", "content": "hi"}, search], "tools": [FUNCTION, NAMESPACE]}
    tools = parse_responses_request(body).tools
    assert [tool.name for tool in tools] == ["look", "team__spawn", "late", "b__spawn"]
    assert tools[0].description == FUNCTION["description"]


def test_namespaced_names_stay_unique():
    clash = {**FUNCTION, "name": "team__spawn"}
    names = [tool.name for tool in parse_responses_request({"input": "x", "tools": [clash, NAMESPACE]}).tools]
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"previous_response_id": "resp_1", "input": "x"},
        {"conversation": "conv_1", "input": "x"},
        {"prompt": {"id": "p"}},
        {"background": True, "input": "x"},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [{"id": "msg_1"}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
        {"input": [{"role": "user", "content": "x"}, {"type": "compaction_trigger"}]},
    ],
)
def test_what_needs_stored_state_is_named(body):
    """trap 63"""
    reason = needs_server_state(body)
    with pytest.raises(RouterError) as caught:
        parse_responses_request(body)
    assert reason and caught.value.status == 400 and caught.value.message.startswith(reason)
    inside = ("file_id", "item_reference", "compaction_trigger")
    assert any(field in reason for field in (*inside, *body))
    assert any(cure in reason for cure in ("send the", "leave it out", "sums up by itself"))


def test_a_request_with_its_whole_conversation_needs_no_state():
    assert (
        needs_server_state(
            {"input": [{"role": "user", "content": "x"}, CALL], "previous_response_id": None, "background": False}
        )
        is None
    )


@pytest.mark.parametrize(
    "body",
    [
        {"input": 7},
        {"input": [7]},
        {"input": [{"role": "robot", "content": "x"}]},
        {"input": [{"role": "user", "content": 7}]},
        {"input": "x", "temperature": "hot"},
        {"input": "x", "max_output_tokens": 1.5},
        {"input": "x", "max_output_tokens": True},
        {"input": "x", "instructions": []},
    ],
)
def test_a_body_of_another_shape_is_refused(body):
    with pytest.raises(RouterError) as caught:
        parse_responses_request(body)
    assert caught.value.status == 400


def test_requests_store_nothing_and_ask_for_encrypted_reasoning():
    """trap 65"""
    body = render_responses_request(ChatRequest("m", [Message("user", [Text("x")])], reasoning=Reasoning(budget=5000)))
    assert body == {
        "model": "m",
        "input": [{"type": "message", "role": "user", "content": "x"}],
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "medium", "summary": "auto"},
    }
    assert "include" not in render_responses_request(ChatRequest("m", []))


def test_history_keeps_encrypted_reasoning_but_no_ids_save_of_what_is_open():
    """trap 65, trap 84"""
    silent = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "f"}
    turn = [
        Thinking("why", {"responses": {"id": "rs_1", "encrypted_content": "e"}}),
        Thinking("foreign", {"anthropic": {"signature": "s"}}),
        Opaque("responses", silent),
        Thinking("open", {"responses": {"id": "rs_3", "part": "reasoning_text"}}),
        ToolCall("c", "look", "{}", extra={"responses": {"id": "fc_1"}}),
    ]
    items = render_responses_request(
        ChatRequest("m", [Message("assistant", turn), Message("user", [ToolResult("c", [Text("r")])])])
    )["input"]
    assert items == [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "why"}], "encrypted_content": "e"},
        {"type": "reasoning", "summary": [], "encrypted_content": "f"},
        # vLLM refuses reasoning without its id, which it made.
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "open"}], "id": "rs_3"},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "r"},
    ]


def test_what_hosted_tools_left_in_the_history_is_text_where_it_can_be_read():
    """trap 107: the last output is a turn of the user, or nobody would be asked."""
    items = [
        {"role": "user", "content": "list the files"},
        {**SEARCH, "action": {"type": "search", "query": "how", "queries": ["how", "why"]}},
        {"type": "compaction", "id": "cmp_1", "encrypted_content": "no"},
        {"type": "mcp_list_tools", "id": "l", "server_label": "no", "tools": [{"name": "no", "input_schema": {}}]},
        {"type": "mcp_approval_request", "id": "no", "server_label": "no", "name": "no", "arguments": "no"},
        {"type": "shell_call", "call_id": "no", "action": {"commands": ["ls", "pwd"]}, "status": "completed"},
        {
            "type": "shell_call_output",
            "call_id": "no",
            "output": [{"stdout": "a.txt", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
        },
    ]
    request = parse_responses_request({"model": "m", "input": items})
    assert [(turn.role, [block.text for block in turn.blocks]) for turn in request.messages] == [
        ("user", ["list the files"]),
        ("assistant", ["[web_search_call] how how why\n", "[shell_call] ls pwd\n"]),
        ("user", ["[shell_call_output] a.txt\n"]),
    ]


def test_what_says_neither_its_type_nor_who_speaks_is_nobodys_words():
    items = [{"content": [{"type": "input_text", "text": "How?"}]}, {"name": "look", "arguments": "{}"}]
    assert parse_responses_request({"model": "m", "input": items}).messages == []


@pytest.mark.parametrize("mode", [ToolChoice("any"), ToolChoice("tool", "web_search"), ToolChoice("auto")])
def test_nothing_is_asked_of_tools_that_had_to_be_left_out(mode):
    """Claude Code forces its web search, which only Anthropic runs; OpenAI refuses a choice without its tool."""
    search = Tool("web_search", kind="server", extra={"anthropic": {"type": "web_search_20250305"}})
    request = ChatRequest("m", [Message("user", [Text("hi")])], [], [search], mode, parallel_tools=False)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(router.render_request(request, "responses"))
    body = router.render_request(request._replace(tools=[search, Tool("look")]), "responses")
    assert body.get("tool_choice") == {"any": "required", "auto": "auto"}.get(mode.mode)


@pytest.mark.parametrize("schema", [None, {}, {"type": "object"}])
def test_a_function_without_parameters_says_that_its_object_has_none(schema):
    """trap 94"""
    request = ChatRequest("m", [Message("user", [Text("hi")])], tools=[Tool("look", "", schema)])
    (tool,) = router.render_request(request, "responses")["tools"]
    assert tool["parameters"] == {"type": "object", "properties": {}}


def test_an_answer_that_is_queued_is_not_an_empty_one():
    """`background`: judged empty, it would be asked for once more elsewhere, and paid for twice."""
    queued = OPENAI_RESPONSES.parse_response(snapshot([], status="queued", usage=None), context())
    empty = OPENAI_RESPONSES.parse_response(snapshot([], usage=None), context())
    assert [router.is_empty(queued), router.is_empty(empty)] == [False, True]


def rendered(*messages):
    return [
        (item["type"], item.get("call_id") or item.get("content"))
        for item in router.render_request(ChatRequest("m", list(messages)), "responses")["input"]
    ]


def test_what_the_model_said_in_a_row_is_one_string():
    """Parts of the model's are refused by servers that want their message's id and status beside them (vLLM)."""
    said = [Text("I searched. "), Text("And found."), ToolCall("a", "look"), Text("So.")]
    turns = [Message("user", [Text("hi")]), Message("assistant", said), Message("user", [ToolResult("a", [Text("r")])])]
    assert rendered(*turns)[1:] == [
        ("message", "I searched. And found.So."),
        ("function_call", "a"),
        ("function_call_output", "a"),
    ]
    parts = rendered(Message("user", [Text("a"), Text("b")]), Message("assistant", [Text("c"), Refusal("no")]))
    assert [[part["type"] for part in content] for _, content in parts] == [
        ["input_text", "input_text"],
        ["output_text", "refusal"],
    ]


def test_calls_and_results_are_made_to_match():
    """trap 77, trap 78, trap 79, trap 81"""
    items = rendered(
        Message("user", [ToolResult("gone", [Text("old")])]),
        Message("assistant", [Text("t"), ToolCall("a", "look"), ToolCall("b", "look")]),
        Message("user", [Text("and"), ToolResult("b", [Text("B")]), ToolResult("b", [Text("again")])]),
        Message("assistant", [ToolCall("c", "look")]),
    )
    assert items == [
        (
            "message",
            [{"type": "input_text", "text": "[result of tool call gone]"}, {"type": "input_text", "text": "old"}],
        ),
        ("message", "t"),
        ("function_call", "a"),
        ("function_call", "b"),
        ("function_call_output", "a"),
        ("function_call_output", "b"),
        ("message", "and"),
        ("function_call", "c"),
        ("function_call_output", "c"),
    ]


def test_an_id_used_for_two_calls_keeps_both_results():
    """trap 38"""
    turns = [Message("assistant", [ToolCall("a", "look")]), Message("user", [ToolResult("a", [Text("1")])])]
    assert rendered(*turns, *turns) == [
        (kind, name) for name in ("a", "a_1") for kind in ("function_call", "function_call_output")
    ]


def test_a_repeated_id_still_gets_its_missing_result():
    """trap 38, trap 79"""
    call = Message("assistant", [ToolCall("a", "look")])
    messages = [call, Message("user", [ToolResult("a", [Text("1")])]), call]
    items = router.render_request(ChatRequest("m", messages), "responses")
    outputs = [item["output"] for item in items["input"] if item["type"] == "function_call_output"]
    assert outputs[0] == "1" and "no result" in outputs[1] and len(outputs) == 2


def test_results_of_custom_calls_answer_as_such():
    items = rendered(
        Message("assistant", [ToolCall("a", "apply_patch", "+", "custom")]),
        Message("user", [ToolResult("a", [Text("1")])]),
    )
    assert items == [("custom_tool_call", "a"), ("custom_tool_call_output", "a")]


def test_images_in_results_and_errors_are_told():
    """trap 104"""
    result = ToolResult("a", [Text("bad"), Media("image", "image/png", "QUJD")], is_error=True)
    output = render_responses_request(
        ChatRequest("m", [Message("assistant", [ToolCall("a", "look")]), Message("user", [result])])
    )["input"][1]["output"]
    assert output == [
        {"type": "input_text", "text": "Error: bad"},
        {"type": "input_image", "image_url": "data:image/png;base64,QUJD", "detail": "auto"},
    ]


def test_fields_shared_with_chat_are_kept():
    request = ChatRequest(
        "m",
        [Message("user", [Text("hi")])],
        user="u" * 300,
        fields={"openai": {"service_tier": "flex", "seed": 1, "verbosity": "low"}},
        max_tokens=1,
        stop=["x"],
        top_k=3,
    )
    assert render_responses_request(request) == {
        "model": "m",
        "input": [{"type": "message", "role": "user", "content": "hi"}],
        "service_tier": "flex",
        "text": {"verbosity": "low"},
        "max_output_tokens": 16,
        "store": False,
    }


@pytest.mark.parametrize("effort, model, asks", [
    ("", "gpt-5.2", True), ("", "openai/o3", True), ("", "gpt-4.1", False), ("", "gpt-5-chat-latest", False),
    ("none", "gpt-5.2", False), ("low", "other", True),
])  # fmt: skip
def test_the_proof_of_thoughts_is_asked_for_wherever_a_model_thinks(effort, model, asks):
    """@ai-sdk/openai does so by the model, too: without it nothing of them outlives a call where nothing is stored."""
    reasoning = router.Reasoning(effort) if effort else None
    body = render_responses_request(ChatRequest(model, [Message("user", [Text("q")])], reasoning=reasoning))
    assert ("include" in body) == asks and ("reasoning" in body) == bool(effort)


def test_a_request_reads_back_as_it_was():
    body = {
        "model": "m",
        "instructions": "be",
        "tools": [FUNCTION, PATCH_TOOL],
        "tool_choice": "required",
        "temperature": 1,
        "store": False,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": False}},
        "include": ["reasoning.encrypted_content"],
        "stream": True,
        "input": [
            {"role": "user", "content": "a"},
            CALL,
            {"type": "function_call_output", "call_id": "call_1", "output": "r"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "system", "content": "s"},
        ],
    }
    request = parse_responses_request(body)
    again = parse_responses_request(render_responses_request(request))
    assert again._replace(fields=None) == request._replace(fields=None)


def test_an_answer_repeats_what_its_client_asked_for_in_the_client_s_words():
    said = {"tools": [FUNCTION, NAMESPACE, {"type": "web_search"}], "tool_choice": {"type": "web_search"},
            "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}, "metadata": None, "max_output_tokens": 3}  # fmt: skip
    request = parse_responses_request({"input": "hi", "store": True, **said})
    told = render_responses_response(ChatResponse("r", "m", [Text("x")]), Context(request, "rid", 1))
    assert told == {
        **told, **said, "store": False, "metadata": {}, "reasoning": {"effort": "low", "summary": None},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }  # fmt: skip


# --- Helpers for formats without custom tools


def test_a_custom_tool_as_a_function_says_its_grammar():
    """trap 60"""
    tool = parse_responses_request({"input": "x", "tools": [PATCH_TOOL]}).tools[0]
    function = router.custom_as_function(tool)
    assert function.kind == "function" and function.schema["required"] == ["input"]
    assert (
        function.description.startswith("Edits files.")
        and "lark" in function.description
        and "start: LINE" in function.description
    )
    nested = Tool(
        "t",
        kind="custom",
        extra={"openai": {"format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a+"}}}},
    )
    assert router.tool_grammar(nested) == {"syntax": "regex", "definition": "a+"} and not router.tool_grammar(Tool("t"))


@pytest.mark.parametrize(
    "arguments,text",
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"patch": "x"}', "x"),
        ('"x"', "x"),
        ("plain", "plain"),
        ('{"a": 1}', '{"a": 1}'),
        ("", ""),
    ],
)
def test_free_text_comes_out_of_a_one_string_function(arguments, text):
    assert router.custom_input(arguments) == text


def test_wrapping_and_unwrapping_free_text_is_the_identity():
    call = ToolCall("c", "t", 'a "b"\n', "custom")
    assert router.custom_input(router.custom_as_function(call).arguments) == call.arguments


# --- Errors and the watch


@pytest.mark.parametrize(
    "body,message,code",
    [
        ({"error": {"message": "m", "type": "t", "code": 5, "param": "p"}}, "m", "5"),
        ({"error": "m", "code": "c"}, "m", "c"),
        ({"detail": "m"}, "m", ""),
        ([{"error": {"message": "m", "code": None}}], "m", ""),
        ("m", "m", ""),
        (None, "the upstream answered with status 418", ""),
        ({"detail": [1]}, '{"detail":[1]}', ""),
    ],
)
def test_error_shapes_are_read(body, message, code):
    info = router.read_error(418, body)
    assert (info.status, info.message, info.code) == (418, message, code)


@pytest.mark.parametrize(
    "status,kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_error_answers_have_the_standard_types(status, kind):
    assert router.render_chat_error(ErrorInfo(status, "m"), "rid") == {
        "error": {"message": "m", "type": kind, "param": None, "code": None}
    }


def test_the_watch_sees_ends_and_errors_and_no_text():
    watch = router.OPENAI_RESPONSES.watch
    events = router.parse_events(stream([ANSWER]))
    assert watch.search(sse([json.loads(events[-1].data)]))
    assert watch.search(router.WIRE_FORMATS["responses"].error_event(ErrorInfo(500, "m"), "r"))
    text = write(
        [Started("r", "m"), Opened(Text("")), Delta('say "error" or "response.completed" or "usage":1')]
    ).split(b"\n\n")[-2]
    assert not watch.search(text)


# --- Losses, fuzz, recordings


def test_every_documented_field_is_mapped_or_declared_lost():
    documented = """
        access_programs background background_options context_management conversation image include input
        instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls
        previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning
        safety_identifier service_tier store stream_options temperature text tool_choice tools top_logprobs
        top_p truncation user stream
    """.split()
    mapped = {
        "input",
        "instructions",
        "max_output_tokens",
        "model",
        "parallel_tool_calls",
        "reasoning",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_p",
        "user",
        "stream",
    }
    lost = re.findall("`([^`]+)`", " ".join(router.OPENAI_RESPONSES.losses))
    told = [field for field in documented if any(fnmatch.fnmatch(field, name.split(".")[0]) for name in lost)]
    assert sorted(set(documented) - mapped - set(told)) == []


def test_remembered_items_stand_in_for_references_and_the_oldest_are_forgotten_first():
    def item(name):
        return {"type": "message", "id": name, "role": "assistant", "content": "x" * 100}

    def reference(name):
        return {"type": "item_reference", "id": name}

    memory = router.ItemMemory(limit=2500)
    memory.keep([item("msg_1"), item("msg_2")])
    said = {"role": "user", "content": "hi"}
    body = {"model": "m", "input": [said, reference("msg_1"), reference("msg_9"), {"id": "msg_2"}]}
    assert memory.resolve(body) == dict(body, input=[said, item("msg_1"), reference("msg_9"), item("msg_2")])
    assert body["input"][1] == reference("msg_1")
    for unresolved in ({"input": "hi"}, {"input": [said]}, {"input": [reference("msg_9"), None, {"id": []}]}, {}):
        assert memory.resolve(unresolved) is None
    memory.keep([item("msg_2")])
    memory.keep([item("msg_%d" % number) for number in range(3, 5)])
    assert memory.resolve({"input": [reference("msg_1")]}) is None
    assert memory.resolve({"input": [reference("msg_4")]})
    memory.keep([dict(item("msg_5"), content="x" * 9999)])
    assert memory.resolve({"input": [reference("msg_4")]}), "what never fits drives nothing out"
    memory.keep([{"id": "m%d" % number} for number in range(100)])
    assert memory.resolve({"input": [reference("m90")]}) is None, "small items take more than their text"


@pytest.mark.parametrize("item", [{"type": "web_search_call"}, {"type": "web_search_call", "id": {"a": 1}}])
def test_an_item_without_an_id_of_its_own_is_not_remembered_and_harms_nothing(item):
    """An answer of another server of this format, which the router turns into a stream: its items go on as they came."""
    answer = OPENAI_RESPONSES.parse_response({"output": [item], "status": "completed"}, context())
    shown = router.render_responses_response(answer, context())
    memory = router.ItemMemory()
    memory.keep(shown["output"])
    assert memory.resolve({"input": [{"type": "item_reference", "id": ""}]}) is None


def test_items_that_ended_are_not_looked_through_again():
    parser = router.ResponsesParser(context())
    for index in range(50):
        item = {"type": "function_call", "id": "fc_%d" % index, "call_id": "c%d" % index, "name": "f", "arguments": "{}"}
        for kind in ("added", "done"):
            parser.take({"output_index": index, "item": item}, "response.output_item." + kind)
    assert parser._going == []


WORDS = [
    "type",
    "role",
    "content",
    "input",
    "output",
    "text",
    "item",
    "response",
    "error",
    "code",
    "id",
    "call_id",
    "name",
    "arguments",
    "tools",
    "namespace",
    "summary",
    "usage",
    "output_index",
    "delta",
    "part",
    "status",
    "tool_choice",
    "reasoning",
    "file_id",
    "image_url",
]
VALUES = [
    "message",
    "function_call",
    "reasoning",
    "input_text",
    "output_text",
    "refusal",
    "user",
    "assistant",
    "namespace",
    "custom",
    "allowed_tools",
    "function_call_output",
    "item_reference",
    "x",
    "",
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
]


def junk(dice, depth=0):
    roll = dice.random()
    if depth > 4 or roll < 0.3:
        return dice.choice(VALUES)
    if roll < 0.5:
        return [junk(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(WORDS): junk(dice, depth + 1) for _ in range(dice.randrange(7))}


@pytest.mark.parametrize("seed", range(int(os.environ.get("LLM_ROUTER_TEST_SEEDS", "60"))))
def test_nonsense_raises_nothing_but_router_errors(seed):
    dice = random.Random(seed)
    for _ in range(10):
        body = {
            **{word: junk(dice, 1) for word in WORDS if dice.random() < 0.3},
            "input": [junk(dice, 1) for _ in range(3)],
            "tools": [junk(dice, 1) for _ in range(3)],
        }
        where = context()
        try:
            needs_server_state(body)
            request = parse_responses_request(body)
            json.dumps(render_responses_request(request))
            where = Context(request, "rid", 1)
            json.dumps(render_responses_response(ROUND, where))
        except RouterError:
            pass
        try:
            answer = OPENAI_RESPONSES.parse_response(
                snapshot([junk(dice) for _ in range(3)], **{word: junk(dice) for word in WORDS[:4]}), where
            )
            json.dumps(render_responses_response(answer, where))
        except RouterError:
            pass
        router.read_error(500, junk(dice))
        types = [
            "error",
            "",
            "keepalive",
            *{p["type"] for p in payloads(stream(FULL))},
            "response.failed",
            "response.refusal.delta",
        ]
        events = [
            {**{word: junk(dice, 2) for word in WORDS if dice.random() < 0.3}, "type": dice.choice(types)}
            for _ in range(12)
        ]
        got = read(sse(events), where)
        check_order([event for event in got if not isinstance(event, router.Ping)])
        write(got, where)


def recordings(streamed):
    if not (CORPUS / "INDEX.json").exists():
        return []
    rows = json.loads((CORPUS / "INDEX.json").read_text())
    keep = [
        r
        for r in rows
        if r["api"] == "responses"
        and r["status"] == 200
        and r["stream"] is streamed
        and r["streams_in_body"] == 1
        and not r["suspect_handmade"]
    ]
    return [r["file"] for r in keep]


def load(name):
    record = json.loads((CORPUS / name).read_text())
    request = record.get("request")
    request = request if isinstance(request, dict) and "input" in request else {"input": "x"}
    request = {"input": "x", "tools": request.get("tools")} if needs_server_state(request) else request
    return record["body"], Context(parse_responses_request(request), "rid", 1)


def bare(blocks):
    """Blocks without what providers change from event to event: ids, encrypted content."""
    bags = [
        (
            {k: v for k, v in router.own_extra(b, "responses").items() if k not in ("id", "encrypted_content")}
            if not isinstance(b, Opaque)
            else {}
        )
        for b in blocks
    ]
    return [
        (type(b).__name__, getattr(b, "text", ""), getattr(b, "name", ""), getattr(b, "arguments", ""), bag)
        for b, bag in zip(blocks, bags)
    ]


def texts_of(output):
    """What an answer's items say, read without the code under test."""
    parts = [p for item in output if item["type"] == "message" for p in item["content"]]
    return "".join(p.get("text", p.get("refusal", "")) for p in parts), [
        (i["call_id"], i["arguments"]) for i in output if i["type"] == "function_call"
    ]


def check_recording(answer, output):
    text, calls = texts_of(output)
    assert router.join_text(answer.blocks) == text
    assert [(b.id, b.arguments) for b in answer.blocks if isinstance(b, ToolCall) and b.kind == "function"] == calls


@pytest.mark.skipif(not recordings(True), reason="no recordings beside the repository")
@pytest.mark.parametrize("name", [n for n in recordings(True) if "openai-shell-container" not in n] or ["none"])
def test_recorded_streams_say_what_their_final_snapshot_says(name):
    body, where = load(name)
    events = read(body.encode(), where)
    check_order(events)
    answer = fold(events)
    final = next(
        p
        for p in (
            json.loads(line[5:]) for line in body.splitlines() if line.startswith("data:") and "[DONE]" not in line
        )
        if p["type"] in ("response.completed", "response.incomplete")
    )["response"]
    check_recording(answer, final["output"])
    whole = OPENAI_RESPONSES.parse_response(final, where)
    assert bare(answer.blocks) == bare(whole.blocks)
    assert (answer.usage, answer.stop_reason, answer.created) == (whole.usage, whole.stop_reason, whole.created)
    assert answer.usage.input + answer.usage.cache_read + answer.usage.cache_write == final["usage"]["input_tokens"]
    assert fold(read(write(events, where), where)).blocks == answer.blocks
    assert all(read(body.encode(), where, cut) == events for cut in range(1, len(body), max(1, len(body) // 20)))


@pytest.mark.skipif(not recordings(False), reason="no recordings beside the repository")
@pytest.mark.parametrize("name", recordings(False) or ["none"])
def test_recorded_answers_are_read_and_written_back(name):
    body, where = load(name)
    body = json.loads(body)
    answer = OPENAI_RESPONSES.parse_response(body, where)
    check_recording(answer, body["output"])
    again = OPENAI_RESPONSES.parse_response(render_responses_response(answer, where), where)
    assert again.blocks == answer.blocks and again.usage == answer.usage and again.stop_reason == answer.stop_reason
    assert fold(read(write(unfold(answer), where), where)).blocks == answer.blocks
