"""OPENAI CHAT: Chat Completions requests, answers, streams and errors, to the neutral form and back."""

import base64
import json
import os
import random
from pathlib import Path

import pytest

import llm_router as router
from llm_router import (
    OPENAI_CHAT,
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
    Ping,
    Reasoning,
    Refusal,
    RouterError,
    SseEvent,
    Started,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Usage,
    fold,
    unfold,
)
from sse_decoder import SseDecoder

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
SEEDS = range(int(os.environ.get("LLM_ROUTER_TEST_SEEDS", "3")))


def make_context(**fields):
    return Context(ChatRequest(**{"model": "asked", "messages": [], **fields}), "r1", 1700000000)


def chunk(delta=None, finish=None, index=0, **more):
    choice = {"index": index, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"id": "chatcmpl-u", "created": 7, "model": "up", "choices": [choice], **more}


def calls(*entries):
    return {"tool_calls": list(entries)}


def entry(index=None, id=None, name=None, arguments=None, **more):
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    known = (("index", index), ("id", id), ("function", function or None))
    return {**{key: value for key, value in known if value is not None}, **more}


def check(events):
    """The order that every stream keeps: Started (Opened ... Closed)* (Finished | Failed), one block open at a time."""
    state, is_open = "before", False
    for event in events:
        assert state != "ended", event
        if isinstance(event, Started):
            assert state == "before"
            state = "started"
        elif isinstance(event, Opened):
            assert state == "started" and not is_open
            is_open = True
        elif isinstance(event, Delta):
            assert is_open and event.text and isinstance(event.text, str)
        elif isinstance(event, Extended):
            assert is_open
        elif isinstance(event, Closed):
            assert is_open
            is_open = False
        elif isinstance(event, Finished):
            assert state == "started" and not is_open
            state = "ended"
        elif isinstance(event, Failed):
            state = "ended"
        else:
            assert isinstance(event, Ping)
    assert state == "ended"
    return events


def run(*chunks, done=True, context=None):
    """(parser, all its events) for chunks as dicts or as raw data strings."""
    parser = OPENAI_CHAT.parser(context or make_context())
    events = []
    for item in chunks + (("[DONE]",) if done else ()):
        sse = item if isinstance(item, SseEvent) else SseEvent("", item if isinstance(item, str) else json.dumps(item))
        events += parser.feed(sse)
    return parser, check(events + parser.finish())


def answer(*chunks, **options):
    return fold(run(*chunks, **options)[1])


def blocks(*chunks, **options):
    return answer(*chunks, **options).blocks


def whole(message, finish="stop", **more):
    body = {"id": "chatcmpl-u", "created": 7, "model": "up", "choices": [{"index": 0, "message": message}], **more}
    body["choices"][0]["finish_reason"] = finish
    return body


def shown(*events, **fields):
    """What a client gets for neutral events, as a list of parsed data, "[DONE]" as itself."""
    render = OPENAI_CHAT.renderer(make_context(**fields)).render
    raw = b"".join(render(event) for event in events)
    return [item.data if item.data == "[DONE]" else json.loads(item.data) for item in SseDecoder().feed(raw)]


# ---- streams from an upstream


def test_text_becomes_one_block_and_ends_at_done():
    parser, events = run(
        chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"}, "stop")
    )
    assert events == [
        Started("chatcmpl-u", "up", None, 7),
        Opened(Text("")),
        Delta("Hel"),
        Delta("lo"),
        Closed(),
        Finished("end_turn"),
    ]
    assert parser.done and parser.skipped == 0


def test_no_empty_text_block_stands_before_a_tool_call():
    """trap 32, and white space alone is as bad as nothing"""
    first = chunk({"role": "assistant", "content": ""})
    assert blocks(
        first, chunk({"content": "\n\n"}), chunk(calls(entry(0, "a", "f", "{}"))), chunk({}, "tool_calls")
    ) == [ToolCall("a", "f", "{}")]


def test_white_space_in_front_of_text_is_part_of_it():
    assert blocks(chunk({"content": "\n"}), chunk({"content": " x"})) == [Text("\n x")]


def test_an_answer_of_white_space_alone_is_kept():
    assert blocks(chunk({"content": " \n"}), chunk({}, "stop")) == [Text(" \n")]


def test_the_arguments_of_the_only_call_stream_as_they_come():
    _, events = run(
        chunk(calls(entry(0, "a", "f", ""))),
        chunk(calls(entry(0, arguments='{"x"'))),
        chunk(calls(entry(0, arguments=":1}"))),
        chunk({}, "tool_calls"),
    )
    assert events[1:] == [Opened(ToolCall("a", "f")), Delta('{"x"'), Delta(":1}"), Closed(), Finished("tool_use")]


def test_interleaved_calls_come_whole_and_in_order():
    """trap 33"""
    _, events = run(
        chunk(calls(entry(0, "a", "f", ""), entry(1, "b", "g", ""))),
        chunk(calls(entry(1, arguments='{"y":'))),
        chunk(calls(entry(0, arguments='{"x":'))),
        chunk(calls(entry(1, arguments="2}"))),
        chunk(calls(entry(0, arguments="1}"))),
        chunk({}, "tool_calls"),
    )
    assert [e for e in events if isinstance(e, Opened)] == [Opened(ToolCall("a", "f")), Opened(ToolCall("b", "g"))]
    assert fold(events).blocks == [ToolCall("a", "f", '{"x":1}'), ToolCall("b", "g", '{"y":2}')]
    assert Delta('{"x":') in events, "the active call is not held back"


def test_the_next_call_streams_once_the_one_before_is_complete():
    """trap 33"""
    parser = OPENAI_CHAT.parser(make_context())
    feed = lambda item: parser.feed(SseEvent("", json.dumps(item)))  # noqa: E731
    feed(chunk(calls(entry(0, "a", "f", '{"x":1}'))))
    assert feed(chunk(calls(entry(1, "b", "g", '{"y"')))) == [Closed(), Opened(ToolCall("b", "g")), Delta('{"y"')]
    assert feed(chunk(calls(entry(1, arguments=":2}")))) == [Delta(":2}")]


def test_both_calls_of_one_chunk_are_read():
    """trap 34"""
    both = calls(entry(0, "a", "f", "{}"), entry(1, "b", "g", '{"y":2}'))
    assert blocks(chunk(both, "tool_calls")) == [ToolCall("a", "f", "{}"), ToolCall("b", "g", '{"y":2}')]


@pytest.mark.parametrize("ids", [("a", "b"), (None, None)])
def test_calls_that_all_bear_index_0_stay_apart(ids):
    """trap 35"""
    found = blocks(
        chunk(calls(entry(0, ids[0], "f", '{"x":1}'))),
        chunk(calls(entry(0, ids[1], "g", '{"y":2}'))),
        chunk({}, "stop"),
    )
    assert [(call.name, call.arguments) for call in found] == [("f", '{"x":1}'), ("g", '{"y":2}')]
    assert len({call.id for call in found}) == 2


def test_two_calls_of_one_function_without_ids_and_with_one_index_stay_apart():
    """trap 35"""
    found = blocks(
        chunk(calls(entry(0, name="f", arguments='{"x":1}'))), chunk(calls(entry(0, name="f", arguments='{"x":2}')))
    )
    assert [call.arguments for call in found] == ['{"x":1}', '{"x":2}']


def test_calls_without_index_in_one_chunk_are_separate():
    """Mistral sends calls whole, without index and type."""
    found = blocks(
        chunk(calls(entry(id="a", name="f", arguments="{}"), entry(id="b", name="f", arguments="{}")), "tool_calls")
    )
    assert found == [ToolCall("a", "f", "{}"), ToolCall("b", "f", "{}")]


def test_equal_calls_in_one_chunk_without_ids_are_separate():
    """trap 35"""
    found = blocks(chunk(calls(entry(0, name="f", arguments="{}"), entry(0, name="f", arguments="{}")), "tool_calls"))
    assert [(call.id, call.arguments) for call in found] == [("call_r1_0", "{}"), ("call_r1_1", "{}")]


def test_arguments_without_index_and_id_belong_to_the_last_call():
    assert blocks(chunk(calls(entry(id="a", name="f"))), chunk(calls(entry(arguments="{}")))) == [
        ToolCall("a", "f", "{}")
    ]


@pytest.mark.parametrize("missing", [None, ""])
def test_a_missing_id_is_made_up_once(missing):
    """trap 36"""
    found = blocks(chunk(calls(entry(0, missing, "f", '{"a"'))), chunk(calls(entry(0, missing, arguments=":1}"))))
    assert found == [ToolCall("call_r1_0", "f", '{"a":1}')]


def test_a_real_id_after_a_made_up_one_is_the_same_call():
    """trap 37"""
    found = blocks(chunk(calls(entry(0, name="f", arguments="{"))), chunk(calls(entry(0, "real", arguments="}"))))
    assert found == [ToolCall("call_r1_0", "f", "{}")]


def test_an_id_that_comes_before_the_arguments_is_used():
    """trap 37"""
    assert blocks(chunk(calls(entry(0, name="f"))), chunk(calls(entry(0, "real", arguments="{}")))) == [
        ToolCall("real", "f", "{}")
    ]


def test_one_id_for_two_calls_is_made_unique():
    """trap 38"""
    found = blocks(chunk(calls(entry(0, "a", "f", "{}"))), chunk(calls(entry(1, "a", "f", "{}"))))
    assert [call.id for call in found] == ["a", "a_1"]


@pytest.mark.parametrize("again", ["f", "f_more"])
def test_a_name_in_every_chunk_counts_once(again):
    """trap 39"""
    found = blocks(
        chunk(calls(entry(0, "a", "f", ""))),
        chunk(calls(entry(0, "a", again, '{"x":'))),
        chunk(calls(entry(0, "a", again, "1}"))),
    )
    assert found == [ToolCall("a", "f", '{"x":1}')]


def test_cumulative_arguments_are_cut_to_what_is_new():
    """trap 40"""
    parts = ['{"a', '{"a": [1', '{"a": [1, 2]}', '{"a": [1, 2]}']
    _, events = run(*[chunk(calls(entry(0, "a", "f", part))) for part in parts])
    assert [e.text for e in events if isinstance(e, Delta)] == ['{"a', '": [1', ", 2]}"]


def test_an_object_nested_in_one_that_begins_alike_is_not_cumulative():
    """trap 40"""
    assert blocks(chunk(calls(entry(0, "a", "f", '{"a":'))), chunk(calls(entry(0, arguments='{"a":1}}')))) == [
        ToolCall("a", "f", '{"a":{"a":1}}')
    ]


def test_a_call_without_arguments_is_opened_and_closed():
    """trap 41"""
    _, events = run(chunk(calls(entry(0, "a", "f", ""))), chunk({}, "tool_calls"))
    assert events[1:] == [Opened(ToolCall("a", "f")), Closed(), Finished("tool_use")]


def test_arguments_that_are_an_object_become_text():
    assert blocks(chunk(calls(entry(0, "a", "f", {"x": [1]})))) == [ToolCall("a", "f", '{"x":[1]}')]


def test_a_call_without_a_name_is_left_out_and_counted():
    parser, events = run(chunk(calls(entry(0, "a", arguments="{}"))), chunk({}, "tool_calls"))
    assert fold(events).blocks == [] and parser.skipped == 1 and events[-1] == Finished("end_turn")


def test_extra_content_of_a_call_is_kept():
    """Gemini wants its thought signature back."""
    call = entry(0, "a", "f", "{}", extra_content={"google": {"thought_signature": "s"}})
    (found,) = blocks(chunk(calls(call)))
    assert found.extra == {"openai": {"extra_content": {"google": {"thought_signature": "s"}}}}
    rendered = OPENAI_CHAT.render_request(ChatRequest("m", [Message("assistant", [found])]))
    assert rendered["messages"][0]["tool_calls"][0]["extra_content"] == {"google": {"thought_signature": "s"}}


def test_the_legacy_function_call_is_a_call():
    parts = [{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}}]
    assert answer(*map(chunk, parts), chunk({}, "function_call"))[2:4] == (
        [ToolCall("call_r1_0", "f", "{}")],
        "tool_use",
    )


def test_a_custom_call_streams_its_input():
    first = {"index": 0, "id": "a", "type": "custom", "custom": {"name": "sh", "input": "ls"}}
    more = {"index": 0, "custom": {"input": " -l"}}
    assert blocks(chunk(calls(first)), chunk(calls(more))) == [ToolCall("a", "sh", "ls -l", "custom")]


def test_text_after_a_call_follows_it():
    """trap 33: it may not go into the call's block, nor cut the call in two"""
    found = blocks(
        chunk(calls(entry(0, "a", "f", '{"x"'))),
        chunk({"content": "so "}),
        chunk(calls(entry(0, arguments=":1}"))),
        chunk({"content": "on"}),
    )
    assert found == [ToolCall("a", "f", '{"x":1}'), Text("so on")]


def test_content_beside_an_empty_list_of_calls_is_text():
    """trap 26"""
    assert answer(chunk({"content": "x", "tool_calls": []}), chunk({}, "stop"))[2:4] == ([Text("x")], "end_turn")


def test_the_last_fragment_may_ride_with_the_finish_reason():
    """trap 25"""
    assert blocks(chunk({"content": "a"}), chunk({"content": "b"}, "stop")) == [Text("ab")]
    assert blocks(chunk(calls(entry(0, "a", "f", "{"))), chunk(calls(entry(0, arguments="}")), "tool_calls")) == [
        ToolCall("a", "f", "{}")
    ]


def test_a_second_finish_and_a_delta_after_it_are_merged():
    """trap 50"""
    found = answer(chunk({"content": "a"}, "length"), chunk({"content": "b"}), chunk({}, "stop"))
    assert (found.blocks, found.stop_reason) == ([Text("ab")], "max_tokens")


@pytest.mark.parametrize("finish", ["stop", "tool_calls", "stop_sequence", None])
def test_a_sent_call_makes_the_stop_reason_tool_use(finish):
    """trap 30"""
    assert answer(chunk(calls(entry(0, "a", "f", "{}"))), chunk({}, finish)).stop_reason == "tool_use"


@pytest.mark.parametrize("finish", ["tool_calls", "function_call", "tool_use"])
def test_a_finish_for_calls_that_were_not_sent_is_an_ordinary_end(finish):
    """trap 31"""
    assert answer(chunk({"content": "x"}), chunk({}, finish)).stop_reason == "end_turn"


@pytest.mark.parametrize(
    "finish, reason",
    [
        ("stop", "end_turn"),
        ("eos", "end_turn"),
        ("length", "max_tokens"),
        ("MAX_TOKENS", "max_tokens"),
        ("model_length", "model_context_window_exceeded"),
        ("content_filter", "refusal"),
        ("sensitive", "refusal"),
        ("SAFETY", "refusal"),
        ("BLOCKLIST", "refusal"),
        ("content_filter: RECITATION", "refusal"),  # Gemini's OpenAI endpoint
        ("function_call_filter: MALFORMED_FUNCTION_CALL", "end_turn"),
        ("stop_sequence", "stop_sequence"),
        ("something new", "end_turn"),
    ],
)
def test_finish_reasons_are_mapped(finish, reason):
    """trap 47"""
    assert answer(chunk({"content": "x"}), chunk({}, finish)).stop_reason == reason


@pytest.mark.parametrize("finish", ["error", "network_error", "insufficient_system_resource", "abort"])
def test_a_finish_reason_that_is_a_failure_fails(finish):
    """trap 47"""
    _, events = run(chunk({"content": "x"}), chunk({}, finish))
    assert isinstance(events[-1], Failed) and events[-1].error.status in (502, 503)
    with pytest.raises(RouterError):
        OPENAI_CHAT.parse_response(whole({"content": "x"}, finish), make_context())


def test_a_finish_reason_that_says_null_in_letters_is_none():
    """DashScope"""
    first = chunk({"content": "x"}, "null")
    assert answer(first, chunk({}, "length")).stop_reason == "max_tokens"
    assert not run(first, done=False)[0].done


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_the_stop_text_that_was_met_is_told(field):
    """trap 47; vLLM and SGLang"""
    last = chunk({}, "stop")
    last["choices"][0][field] = "END"
    found = answer(chunk({"content": "x"}), last, context=make_context(stop=["END"]))
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "END")


def test_a_refusal_is_a_block_and_a_stop_reason():
    """trap 46"""
    found = answer(chunk({"refusal": "I "}), chunk({"refusal": "cannot"}), chunk({}, "stop"))
    assert (found.blocks, found.stop_reason) == ([Refusal("I cannot")], "refusal")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "reasoning_text"])
def test_reasoning_and_text_are_blocks_of_their_own(field):
    """traps 27, 28, 29"""
    parts = [
        {"content": None, field: "hm"},
        {"content": "", field: "m"},
        {"content": "x", field: None},
        {field: "more"},
        {"content": "y"},
    ]
    assert blocks(*map(chunk, parts)) == [Thinking("hmm"), Text("x"), Thinking("more"), Text("y")]


def test_reasoning_sent_under_two_names_is_read_once():
    details = [{"type": "reasoning.text", "text": "hm", "index": 0}]
    delta = {"reasoning_content": "hm", "reasoning": "hm", "reasoning_details": details}
    assert blocks(chunk(delta), chunk({"content": "x"})) == [
        Thinking("hm", {"openai": {"reasoning_details": details}}),
        Text("x"),
    ]


def test_reasoning_details_alone_give_the_text():
    secret = {"type": "reasoning.encrypted", "data": "zz"}
    found = blocks(
        chunk({"reasoning_details": [{"type": "reasoning.summary", "summary": "sum"}]}),
        chunk({"reasoning_details": [secret]}),
    )
    assert found == [
        Thinking("sum", {"openai": {"reasoning_details": [{"type": "reasoning.summary", "summary": "sum"}, secret]}})
    ]


def test_an_empty_text_beside_the_signature_does_not_wipe_the_text_of_reasoning_details():
    pieces = [{"text": "Let me "}, {"text": "see."}, {"text": "", "signature": "s"}]
    deltas = [{"reasoning_details": [{"type": "reasoning.text", "index": 0, **piece}]} for piece in pieces]
    whole = {"type": "reasoning.text", "index": 0, "text": "Let me see.", "signature": "s"}
    assert blocks(*map(chunk, deltas)) == [Thinking("Let me see.", {"openai": {"reasoning_details": [whole]}})]


def test_reasoning_details_after_the_text_do_not_cut_it():
    secret = {"type": "reasoning.encrypted", "data": "zz"}
    found = blocks(
        chunk(calls(entry(0, "a", "f", "{"))),
        chunk({"reasoning_details": [secret]}),
        chunk(calls(entry(0, arguments="}"))),
    )
    assert found == [ToolCall("a", "f", "{}"), Thinking("", {"openai": {"reasoning_details": [secret]}})]


@pytest.mark.parametrize("proof_comes", ["with the call", "before it", "without a text"])
def test_what_copilot_proves_its_reasoning_by_is_given_back_beside_it(proof_comes):
    """As opencode's provider for Copilot does it (anomalyco/opencode#8900)."""
    call, proof = calls(entry(0, "a", "f", "{}")), {"reasoning_opaque": "zz"}
    thought = {} if proof_comes == "without a text" else {"reasoning_text": "hm"}
    deltas = [thought, {**proof, **call}] if proof_comes == "with the call" else [thought, proof, call]
    found = blocks(*map(chunk, deltas))
    bag = {"openai": {"field": "reasoning_text", "reasoning_opaque": "zz"}}
    assert found == [Thinking(thought.get("reasoning_text", ""), bag), ToolCall("a", "f", "{}")]
    messages = [Message("user", [Text("q")]), Message("assistant", found), Message("user", [ToolResult("a", [Text("r")])])]
    sent = OPENAI_CHAT.render_request(ChatRequest("m", messages))["messages"][1]
    assert {key: sent.get(key) for key in ("reasoning_text", "reasoning_opaque")} == {"reasoning_text": None, **thought, **proof}
    assert sent["tool_calls"] and "reasoning_content" not in sent


def test_odd_reasoning_details_are_kept():
    odd = [{"type": [], "index": {}, "text": "a"}, {"type": [], "index": {}, "text": 5}, {"data": "x", "index": None}, "no"]
    found = blocks(chunk({"reasoning_details": odd}), chunk({"content": "b"}))
    assert [type(block) for block in found] == [Thinking, Text]


def test_empty_reasoning_details_open_nothing():
    parts = [{"reasoning_details": []}, {"reasoning_details": [{"text": "", "signature": ""}]}, {"content": "x"}]
    assert blocks(*map(chunk, parts)) == [Text("x")]


def test_content_may_be_a_list_of_parts():
    """Mistral's thinking models"""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    found = blocks(
        chunk({"content": [thought]}),
        chunk({"content": [{"type": "text", "text": "x"}, "odd", None]}),
        chunk({"content": "y"}),
    )
    assert found == [Thinking("hm"), Text("xy")]


@pytest.mark.parametrize("field", ["message", "delta"])
def test_an_object_as_content_is_its_json(field):
    """Cloudflare Workers AI answers a json_schema request with the object itself: its text was lost, and the answer empty."""
    said = {"content": {"name": "Zoë", "age": 32}, "refusal": None}
    body = {"choices": [{"index": 0, field: said, "finish_reason": "stop"}]}
    found = OPENAI_CHAT.parse_response(body, make_context())
    assert [json.loads(block.text) for block in found.blocks] == [{"name": "Zoë", "age": 32}]
    assert not router.is_empty(found)


TAGGED = "\n<think>\nfirst < second </ third\n</think>\n\nThe <think> tag </think> stays."
UNTAGGED = [Thinking("first < second </ third\n"), Text("The <think> tag </think> stays.")]


@pytest.mark.parametrize("cut", range(1, len(TAGGED)))
def test_think_tags_become_thinking_wherever_they_are_cut(cut):
    """trap 48"""
    assert blocks(chunk({"content": TAGGED[:cut]}), chunk({"content": TAGGED[cut:]})) == UNTAGGED


def test_think_tags_become_thinking_letter_by_letter():
    """trap 48"""
    assert blocks(*[chunk({"content": letter}) for letter in TAGGED]) == UNTAGGED


def test_bedrock_s_tag_for_the_reasoning_of_gpt_oss_is_one():
    """CherryHQ/cherry-studio#10225; its end is its own."""
    text = "<reasoning>a </think> b</reasoning>c"
    assert blocks(*[chunk({"content": letter}) for letter in text]) == [Thinking("a </think> b"), Text("c")]
    assert blocks(chunk({"content": "<reasoning>cut of"})) == [Thinking("cut of")]


@pytest.mark.parametrize("text", ["<", "<think", "<reason>", "<thin air", "<thought>a</thought>", "a <think>b</think>", "</think>"])
def test_what_only_looks_like_a_think_tag_stays_text(text):
    """trap 48"""
    assert blocks(*[chunk({"content": letter}) for letter in text]) == [Text(text)]


def test_a_whole_answer_that_only_closes_the_tag_is_divided_there():
    """trap 48: the model's template had opened it"""
    found = OPENAI_CHAT.parse_response(whole({"content": "So they greet me.\n</think>\n\nHi"}), make_context())
    assert [(type(block), block.text.strip()) for block in found.blocks] == [(Thinking, "So they greet me."), (Text, "Hi")]
    told = "Write </think> behind your thoughts."
    assert OPENAI_CHAT.parse_response(whole({"content": told}), make_context()).blocks == [Text(told)]


def test_a_closing_tag_alone_in_a_stream_is_never_shown():
    """trap 48"""
    parts = ["So ", "they ", "greet.", "\n", "</think>", "\n\n", "Hi", " there"]
    assert blocks(*[chunk({"content": part}) for part in parts]) == [Text("So they greet.\n\n\nHi there")]
    raw = b"".join(b"data: " + json.dumps(chunk({"content": part})).encode() + b"\n\n" for part in parts)
    answer = router.fold_stream("openai", raw + b"data: [DONE]\n\n", make_context())
    assert answer.blocks == [Text("So they greet.\n\n\nHi there")]
    translator = router.StreamTranslator("openai", "anthropic", make_context())
    assert b"think>" not in b"".join(translator.feed(raw[at : at + 40]) for at in range(0, len(raw), 40))
    translator = router.StreamTranslator("openai", "anthropic", make_context())
    assert b"think>" not in b"".join(translator.feed(one + b"\n\n") for one in raw.split(b"\n\n") if one)


def test_an_empty_think_tag_leaves_no_block():
    """trap 48"""
    assert blocks(chunk({"content": "<think>\n\n</think>\n\nHi"})) == [Text("Hi")]


def test_an_unclosed_think_tag_is_thinking_to_the_end():
    """trap 48"""
    assert blocks(chunk({"content": "<think>a </thi"}), chunk({}, "length")) == [Thinking("a </thi")]


USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}


@pytest.mark.parametrize(
    "place",
    [
        [chunk({"content": "x"}), chunk({}, "stop", usage=USAGE)],
        [chunk({"content": "x"}), chunk({}, "stop"), {"choices": [], "usage": USAGE}],
        [chunk({"content": "x"}, usage={**USAGE, "completion_tokens": 1}), chunk({}, "stop", usage=USAGE)],
        [chunk({"content": "x"}, usage=USAGE), chunk({}, "stop", usage=None)],
        [chunk({"content": "x"}), chunk({}, "stop"), {"choices": None, "usage": USAGE}],
        [chunk({"content": "x"}), chunk({}, "stop"), {"choices": [], "x_groq": {"usage": USAGE}}],
    ],
)
def test_usage_is_found_in_each_of_its_places(place):
    """traps 15, 24, 43"""
    parser, events = run(*place)
    assert events[-1].usage == parser.usage == Usage(10, 3)


def test_usage_in_the_choice_is_found():
    """trap 43 (Moonshot)"""
    last = chunk({}, "stop")
    last["choices"][0]["usage"] = USAGE
    assert answer(chunk({"content": "x"}), last).usage == Usage(10, 3)


def test_usage_after_done_is_counted_and_says_nothing():
    """trap 9"""
    parser, events = run(chunk({"content": "x"}, "stop"), "[DONE]", {"choices": [], "usage": USAGE})
    assert sum(isinstance(event, Finished) for event in events) == 1
    assert parser.usage == Usage(10, 3)


@pytest.mark.parametrize(
    "usage, expected",
    [
        ({"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(6, 3, 4)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "cached_tokens": 4}, Usage(6, 3, 4)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "prompt_cache_hit_tokens": 4}, Usage(6, 3, 4)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "num_cached_tokens": 4}, Usage(6, 3, 4)),
        (
            {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5}},
            Usage(1, 0, 4, 5),
        ),
        ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 40}}, Usage(0, 0, 10)),
        (
            {"prompt_tokens": 1, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}},
            Usage(1, 9, 0, 0, 7),
        ),
        (
            {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "total_tokens": 10,
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            Usage(1, 9, 0, 0, 7),
        ),
        (
            {"prompt_tokens": 1, "completion_tokens": 6, "completion_tokens_details": {"reasoning_tokens": 7}},  # Kimi K3
            Usage(1, 6, 0, 0, 6),
        ),
        ({"prompt_tokens": None, "completion_tokens": "3", "prompt_tokens_details": 1}, Usage()),
    ],
)
def test_usage_is_read_in_every_dialect(usage, expected):
    """trap 113"""
    assert answer(chunk({"content": "x"}, "stop", usage=usage)).usage == expected


def test_a_first_chunk_without_choices_says_nothing():
    """trap 16 (Azure)"""
    parser = OPENAI_CHAT.parser(make_context())
    azure = {"id": "", "object": "", "model": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]}
    assert parser.feed(SseEvent("", json.dumps(azure))) == []
    assert parser.feed(SseEvent("", json.dumps(chunk({"content": "x"}))))[0] == Started("chatcmpl-u", "up", None, 7)


def test_an_upstream_without_an_id_gets_one_of_the_request():
    assert answer({"choices": [{"delta": {"content": "x"}}]}).id == "chatcmpl-r1"


def test_only_the_first_of_n_answers_is_read():
    parts = [chunk({"content": "b"}, index=1), chunk({"content": "a"}), chunk({}, "length", index=1), chunk({}, "stop")]
    assert answer(*parts)[2:4] == ([Text("a")], "end_turn")


def test_one_call_that_is_no_list_is_a_call():
    """Text Generation Inference streams it so, Spark tells whole answers so."""
    start, more = entry(0, "a", "f", '{"x":'), entry(0, arguments="1}")
    assert blocks(chunk({"tool_calls": start}), chunk({"tool_calls": more})) == [ToolCall("a", "f", '{"x":1}')]
    body = whole({"content": "", "tool_calls": entry(None, "a", "f", "{}")}, "tool_calls")
    assert OPENAI_CHAT.parse_response(body, make_context()).blocks == [ToolCall("a", "f", "{}")]


def test_what_a_server_s_own_tool_found_is_no_text():
    """MiniMax streams the results of its web search as role tool, with a finish_reason."""
    found = chunk({"role": "tool", "content": '[{"no":1}]', "tool_call_id": "c"}, "stop")
    parser, events = run(chunk({"content": "a"}), chunk({"content": "b"}), found, chunk({"content": "c"}), done=False)
    assert not parser.done and isinstance(events[-1], Failed)
    assert blocks(chunk({"content": "a"}), chunk({"content": "b"}), found, chunk({"content": "c"}, "stop")) == [Text("abc")]


def test_a_whole_answer_behind_its_stream_is_not_told_twice():
    """MiniMax: the last chunk has the message in place of a delta, and the usage."""
    last = whole({"role": "assistant", "content": "Hello", "reasoning_content": "hm"}, usage=USAGE, object="chat.completion")
    found = answer(chunk({"reasoning_content": "hm"}), chunk({"content": "Hel"}), chunk({"content": "lo"}), last)
    assert found.blocks == [Thinking("hm", found.blocks[0].extra), Text("Hello")] and found.usage is not None
    assert answer(last).blocks[1:] == [Text("Hello")]


@pytest.mark.parametrize("index", [{}, {"index": 0}])
def test_an_answer_that_was_shared_out_to_several_choices_is_one(index):
    """GitHub Copilot: the text in one choice, the calls in the next, none of them numbered."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = {"content": "Let me look."}, {"content": None, "tool_calls": [call]}
    body = whole({})
    body["choices"] = [{**index, "message": message, "finish_reason": "tool_calls"} for message in messages]
    found = OPENAI_CHAT.parse_response(body, make_context())
    assert found.blocks == [Text("Let me look."), ToolCall("a", "f", "{}")] and found.stop_reason == "tool_use"


def test_an_image_among_the_parts_of_an_answer_is_kept_for_clients_of_the_same_format():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    found = OPENAI_CHAT.parse_response(whole({"content": [{"type": "text", "text": "Look:"}, image]}), make_context())
    assert found.blocks == [Text("Look:"), Opaque("openai", image)] and not router.is_empty(found)
    assert OPENAI_CHAT.render_response(found, make_context())["choices"][0]["message"]["images"] == [image]


def test_only_the_first_of_several_answers_is_read():
    body = whole({})
    body["choices"] = [{"index": n, "message": {"content": "abc"[n]}, "finish_reason": "stop"} for n in range(3)]
    assert OPENAI_CHAT.parse_response(body, make_context()).blocks == [Text("a")]


@pytest.mark.parametrize(
    "code, status, kind",
    [(1002, 429, "rate_limited"), (1004, 401, "auth"), (1008, 402, "billing"), (1027, 400, "policy"), (1000, 502, "temporary")],
)
def test_an_error_in_base_resp_is_read_and_judged(code, status, kind):
    """MiniMax answers 200 with its own number for what is wrong."""
    body = {"id": "x", "choices": None, "base_resp": {"status_code": code, "status_msg": "so it is"}}
    events = run(body, done=False)[1]
    assert (events[-1].error.status, events[-1].error.message) == (status, "so it is")
    outcome = router.judge_in_band(router.read_error(502, body), [], "openai", 1.0)
    assert (outcome.kind, outcome.error.message) == (kind, "so it is")
    with pytest.raises(RouterError, match="so it is"):
        OPENAI_CHAT.parse_response(body, make_context())


def test_a_stream_that_groq_stopped_early_is_no_complete_answer():
    last = {**chunk({}, "stop"), "x_groq": {"id": "r", "error": "over capacity", "usage": USAGE}}
    parser, events = run(chunk({"content": "Hel"}), last)
    assert isinstance(events[-1], Failed) and events[-1].error.message == "over capacity" and parser.usage is not None
    relay = router.make_processor("openai", "openai", make_context())
    relay.feed(b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in (chunk({"content": "Hel"}), last)))
    assert relay.failed is not None


@pytest.mark.parametrize("code, status, kind", [(401, 401, "auth"), (1000, 401, "auth"), (1305, 429, "rate_limited"), (500, 500, "temporary")])
def test_a_200_without_success_is_the_error_that_its_number_names(code, status, kind):
    """z.ai"""
    body = {"code": code, "msg": "so it is", "success": False}
    failed = run(body, done=False)[1][-1]
    assert (failed.error.status, failed.error.message) == (status, "so it is")
    assert router._error_in(body) == body
    outcome = router.judge_in_band(router.read_error(502, body), [], "openai", 1.0)
    assert (outcome.kind, outcome.status, outcome.error.message) == (kind, status, "so it is")


@pytest.mark.parametrize("body, is_error", [({"message": "no"}, True), ({"detail": "no"}, True), ({"detail": []}, False), ({"message": {"role": "assistant"}}, False)])
def test_a_200_without_an_answer_is_an_error_where_it_has_words_for_one(body, is_error):
    """FastAPI and others tell an error without an envelope."""
    assert bool(router._error_in(body)) == is_error


def test_reasoning_in_parts_of_the_content_is_reasoning():
    """Mistral: type thinking with a list of texts; Databricks: type reasoning with a summary."""
    told = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm", "signature": "s"}]}
    for part in (told, {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}):
        found = OPENAI_CHAT.parse_response(whole({"content": [part, {"type": "text", "text": "x"}]}), make_context())
        assert [block.text for block in found.blocks] == ["hm", "x"] and isinstance(found.blocks[0], Thinking)


@pytest.mark.parametrize(
    "middle", ["{", "[1]", "null", '"x"', "NaN", "[" * 100000, '{"choices": 3}', '{"choices": [3]}']
)
def test_a_malformed_event_is_skipped(middle):
    """trap 13"""
    assert blocks(chunk({"content": "a"}), middle, chunk({"content": "b"}, "stop")) == [Text("ab")]


def test_malformed_events_are_counted():
    """trap 13"""
    assert run(chunk({"content": "a"}), "{", "[1]", "", chunk({}, "stop"))[0].skipped == 2


@pytest.mark.parametrize(
    "event, expected",
    [
        ({"error": {"message": "busy", "type": "server_error", "code": 503}}, (503, "busy")),
        ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, (429, "slow down")),
        ({"error": "kaputt"}, (502, "kaputt")),
        (
            {
                "id": "x",
                "error": {"code": 502, "message": "gone"},
                "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}],
            },
            (502, "gone"),
        ),
        ({"object": "error", "message": "too long", "code": 400}, (400, "too long")),
        (SseEvent("error", '{"message": "no"}'), (502, "no")),
        (SseEvent("error", "plain words"), (502, "plain words")),
        (SseEvent("error", '{"reason": 1}'), (502, "the upstream answered with status 502")),
        (SseEvent("error", '{"error": {"message": "no", "code": 400}}'), (400, "no")),
    ],
)
def test_an_error_in_the_stream_fails_it(event, expected):
    """trap 19"""
    parser, events = run(chunk({"content": "a"}), event, chunk({"content": "b"}, "stop"))
    assert events[1:3] == [Opened(Text("")), Delta("a")]
    assert (events[-1].error.status, events[-1].error.message) == expected
    assert parser.done and len(events) == 4


def test_a_stream_that_begins_with_an_error_only_fails():
    """trap 19"""
    assert [type(event) for event in run({"error": {"message": "busy"}})[1]] == [Failed]


def test_a_stream_that_stops_without_its_end_is_truncated():
    """trap 14"""
    _, events = run(chunk({"content": "a"}), chunk(calls(entry(0, "a", "f", "{"))), done=False)
    assert isinstance(events[-2], Delta) and events[-1].error.code == "truncated"
    parser, events = run(done=False)
    assert events[-1].error.code == "truncated" and not parser.done


def test_a_finish_reason_without_done_is_an_end_at_the_end_of_the_bytes():
    """traps 10, 24: closed whatever is missing"""
    parser = OPENAI_CHAT.parser(make_context())
    first = parser.feed(SseEvent("", json.dumps(chunk({"content": "a"}, "stop"))))
    assert parser.done and not any(isinstance(event, Finished) for event in first)
    parser.feed(SseEvent("", json.dumps({"choices": [], "usage": USAGE})))
    assert parser.finish() == [Closed(), Finished("end_turn", "", Usage(10, 3))]
    assert parser.finish() == []


def test_done_without_a_finish_reason_is_an_end():
    """trap 24"""
    assert answer(chunk({"content": "a"})).stop_reason == "end_turn"


STREAM = "".join(
    "data:%s\r\n\r\n" % (item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))
    for item in (
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "überlegt 🤔"}),
        chunk({"content": "Grüße 你好"}),
        chunk(calls(entry(0, "a", "f", ""), entry(1, "b", "g", ""))),
        chunk(calls(entry(1, arguments='{"y": "é"}'), entry(0, arguments='{"x": 1}'))),
        chunk({}, "tool_calls", usage=USAGE),
        "[DONE]",
    )
).encode("utf-8")


def _decoded(*pieces):
    decoder, parser = SseDecoder(), OPENAI_CHAT.parser(make_context())
    events = [event for piece in pieces for sse in decoder.feed(piece) for event in parser.feed(sse)]
    return events + [event for sse in decoder.finish() for event in parser.feed(sse)] + parser.finish()


def test_every_cut_point_of_a_stream_gives_the_same_events():
    """traps 1, 2, 3, 6"""
    expected = check(_decoded(STREAM))
    assert fold(expected).blocks[1] == Text("Grüße 你好")
    for cut in range(len(STREAM)):
        assert _decoded(STREAM[:cut], STREAM[cut:]) == expected, cut
    assert _decoded(*[bytes([byte]) for byte in STREAM]) == expected


# ---- whole answers

PAIRS = [
    ([{"content": "a"}, {"content": "b"}], {"content": "ab"}, "stop"),
    ([{"reasoning_content": "r"}, {"content": "a"}], {"reasoning_content": "r", "content": "a"}, "length"),
    ([{"content": "<thi"}, {"content": "nk>r</think>a"}], {"content": "<think>r</think>a"}, "stop"),
    ([{"refusal": "n"}, {"refusal": "o"}], {"content": None, "refusal": "no"}, "stop"),
    (
        [{"content": "\n"}, calls(entry(0, "a", "f", "{")), calls(entry(0, arguments="}"))],
        {"content": "\n", **calls(entry(id="a", name="f", arguments="{}"))},
        "tool_calls",
    ),
    (
        [calls(entry(0, "a", "f", "")), calls(entry(1, "b", "g", "{}"))],
        calls(entry(id="a", name="f", arguments=""), entry(id="b", name="g", arguments="{}")),
        "stop",
    ),
    (
        [{"function_call": {"name": "f", "arguments": "{}"}}],
        {"function_call": {"name": "f", "arguments": "{}"}},
        "function_call",
    ),
    (
        [{"audio": {"transcript": "he"}}, {"audio": {"transcript": "y"}}],
        {"content": None, "audio": {"id": "x", "data": "AA", "transcript": "hey"}},
        "stop",
    ),
    ([{"content": [{"type": "text", "text": "a"}]}], {"content": [{"type": "text", "text": "a"}]}, "stop"),
]


@pytest.mark.parametrize("deltas, message, finish", PAIRS)
def test_a_stream_folds_to_what_the_whole_answer_is(deltas, message, finish):
    streamed = answer(*map(chunk, deltas), chunk({}, finish, usage=USAGE), {"choices": [], "service_tier": "x"})
    assert streamed == OPENAI_CHAT.parse_response(whole(message, finish, usage=USAGE), make_context())


def test_a_whole_answer_may_hold_an_empty_delta_beside_its_message():
    """Perplexity"""
    body = whole({"content": "a"})
    body["choices"][0]["delta"] = {"role": "assistant", "content": ""}
    assert OPENAI_CHAT.parse_response(body, make_context()).blocks == [Text("a")]


@pytest.mark.parametrize(
    "body, status",
    [({}, 502), ([], 502), ({"choices": []}, 502), ({"error": {"message": "x", "code": 429}}, 429), (None, 502)],
)
def test_what_is_no_answer_is_refused(body, status):
    with pytest.raises(RouterError) as raised:
        OPENAI_CHAT.parse_response(body, make_context())
    assert raised.value.status == status


FULL = ChatResponse(
    "chatcmpl-u",
    "up",
    [Thinking("hm"), Text("Hi "), Text("there"), ToolCall("a", "f", ""), ToolCall("b", "g", '{"x":1}')],
    "tool_use",
    usage=Usage(5, 3, 2, 1, 1),
    created=7,
)


def test_a_whole_answer_is_written_with_everything():
    """traps 44, 53, 54, 113"""
    assert OPENAI_CHAT.render_response(FULL, make_context()) == {
        "id": "chatcmpl-u",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "asked",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi there",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                        {"id": "b", "type": "function", "function": {"name": "g", "arguments": '{"x":1}'}},
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 8,
            "completion_tokens": 3,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    }


def test_an_answer_survives_writing_and_reading():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    extra = {"openai": {"annotations": [{"type": "url_citation"}], "service_tier": "flex"}}
    before = ChatResponse(
        "chatcmpl-u",
        "asked",
        [Thinking("hm"), Text("Hi"), Opaque("openai", image), ToolCall("b", "g", '{"x":1}')],
        "tool_use",
        "",
        Usage(5, 3, 2),
        1700000000,
        extra,
    )
    assert OPENAI_CHAT.parse_response(OPENAI_CHAT.render_response(before, make_context()), make_context()) == before


def test_an_answer_without_usage_invents_none():
    body = OPENAI_CHAT.render_response(ChatResponse("msg_1", "up", [Text("x")]), make_context())
    assert "usage" not in body and body["id"] == "chatcmpl-r1"


# ---- streams to a client


def test_the_role_is_in_the_first_chunk_only_and_every_index_is_0():
    """traps 51, 52"""
    parts = shown(*unfold(FULL))
    deltas = [part["choices"][0]["delta"] for part in parts[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""} and not any("role" in delta for delta in deltas[1:])
    assert {choice["index"] for part in parts[:-1] for choice in part["choices"]} == {0}
    assert {(part["id"], part["model"], part["created"], part["object"]) for part in parts[:-1]} == {
        ("chatcmpl-u", "asked", 1700000000, "chat.completion.chunk")
    }


def test_calls_are_counted_on_their_own_and_never_lack_arguments():
    """traps 41, 53"""
    found = [
        part["choices"][0]["delta"]["tool_calls"][0]
        for part in shown(*unfold(FULL))[:-1]
        if "tool_calls" in part["choices"][0]["delta"]
    ]
    assert found == [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": "{}"}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"index": 1, "function": {"arguments": '{"x":1}'}},
    ]


def test_a_written_stream_reads_as_the_answer_it_was():
    """traps 10, 54"""
    render = OPENAI_CHAT.renderer(make_context(include_usage=True)).render
    raw = b"".join(map(render, unfold(FULL)))
    assert raw.count(b"[DONE]") == 1 and raw.endswith(b"data: [DONE]\n\n")
    found = fold(check(_decoded(raw)))
    assert found.blocks == [Thinking("hm"), Text("Hi there"), ToolCall("a", "f", "{}"), ToolCall("b", "g", '{"x":1}')]
    assert found.usage == FULL.usage and found.stop_reason == "tool_use"


def test_usage_comes_in_a_chunk_of_its_own_and_only_when_asked_for():
    """trap 56"""
    parts = shown(*unfold(FULL), include_usage=True)
    assert parts[-2]["choices"] == [] and parts[-2]["usage"]["prompt_tokens"] == 8 and parts[-1] == "[DONE]"
    assert all(part["usage"] is None for part in parts[:-2])
    assert not any("usage" in part for part in shown(*unfold(FULL))[:-1])


def test_odd_characters_are_escaped():
    """trap 17"""
    text = '"quote" \\ \n \x00 \u2028 🤔 \ud800'
    parts = shown(Started("", ""), Opened(Text("")), Delta(text), Closed(), Finished())
    assert parts[1]["choices"][0]["delta"] == {"content": text}


def test_a_ping_is_nothing():
    """trap 57"""
    assert OPENAI_CHAT.renderer(make_context()).render(Ping()) == b""


def test_a_failure_is_an_error_without_done():
    """traps 14, 55"""
    parts = shown(
        Started("", ""),
        Opened(Text("")),
        Delta("a"),
        Closed(),
        Failed(ErrorInfo(529, "busy", "overloaded_error")),
        Finished(),
    )
    assert parts[-1] == {"error": {"message": "busy", "type": "overloaded_error", "param": None, "code": None}}
    assert "[DONE]" not in parts


def test_nothing_follows_the_end():
    parts = shown(Started("", ""), Finished(), Finished(), Delta("x"), Opened(Text("")), Failed(ErrorInfo(500, "x")))
    assert parts[-1] == "[DONE]" and len(parts) == 3


@pytest.mark.parametrize(
    "reason, shown_blocks, finish",
    [
        ("end_turn", [Text("x")], "stop"),
        ("stop_sequence", [Text("x")], "stop"),
        ("pause_turn", [Text("x")], "stop"),
        ("max_tokens", [Text("x")], "length"),
        ("model_context_window_exceeded", [Text("x")], "length"),
        ("refusal", [Text("x")], "content_filter"),
        ("refusal", [Refusal("x")], "stop"),
        ("tool_use", [Text("x")], "stop"),
        ("end_turn", [ToolCall("a", "f")], "tool_calls"),
        ("max_tokens", [ToolCall("a", "f")], "length"),
    ],
)
def test_the_finish_reason_tells_what_was_sent(reason, shown_blocks, finish):
    """traps 47, 53"""
    response = ChatResponse("", "", shown_blocks, reason)
    assert OPENAI_CHAT.render_response(response, make_context())["choices"][0]["finish_reason"] == finish
    assert shown(*unfold(response))[-2]["choices"][0]["finish_reason"] == finish


def test_a_refusal_is_shown_as_one():
    assert shown(*unfold(ChatResponse("", "", [Refusal("no")])))[1]["choices"][0]["delta"] == {"refusal": "no"}


def test_bags_of_other_formats_are_not_shown():
    events = [
        Started("", ""),
        Opened(Thinking("", {"anthropic": {"signature": "s"}})),
        Extended("anthropic", {"signature": "t"}),
        Closed(),
        Finished(),
    ]
    assert len(shown(*events)) == 3


def test_reasoning_details_are_shown_again():
    detail = {"type": "reasoning.encrypted", "data": "zz"}
    events = [
        Started("", ""),
        Opened(Thinking("")),
        Extended("openai", {"reasoning_details": [detail]}),
        Closed(),
        Finished(),
    ]
    assert shown(*events)[1]["choices"][0]["delta"] == {"reasoning_details": [detail]}


# ---- requests from a client


def read(messages, **more):
    return OPENAI_CHAT.parse_request({"model": "m", "messages": messages, **more})


def user(content="hi", **more):
    return {"role": "user", "content": content, **more}


def test_every_field_finds_its_place():
    request = read(
        [user()],
        max_completion_tokens=5,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop="END",
        stream=True,
        stream_options={"include_usage": True},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        reasoning_effort="low",
        parallel_tool_calls=False,
        user="u",
        seed=1,
        n=None,
    )
    assert request == ChatRequest(
        "m",
        [Message("user", [Text("hi")])],
        parallel_tools=False,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop=["END"],
        stream=True,
        include_usage=True,
        output=JsonOutput({"type": "object"}, "n", True),
        reasoning=Reasoning("low"),
        user="u",
        fields={"openai": {"seed": 1}},
    )


@pytest.mark.parametrize(
    "field, value, name, expected",
    [
        ("max_tokens", -1, "max_tokens", None),  # LM Studio, llama.cpp: no limit
        ("max_completion_tokens", -1, "max_tokens", None),
        ("max_tokens", 0, "max_tokens", 0),
        ("top_k", -1, "top_k", None),  # vLLM: off
        ("reasoning_effort", "default", "reasoning", None),  # Groq
        ("reasoning", {"effort": "auto"}, "reasoning", None),
        ("reasoning_effort", "HIGH", "reasoning", Reasoning("high")),
        ("reasoning", {"enabled": True}, "reasoning", Reasoning(adaptive=True)),
        ("thinking", {"type": "enabled"}, "reasoning", Reasoning(adaptive=True)),  # DeepSeek, z.ai: without a budget
        ("thinking", {"type": "enabled", "budget_tokens": 2000}, "reasoning", Reasoning(budget=2000)),
        ("thinking", {"type": "disabled"}, "reasoning", Reasoning("none")),
        ("response_format", {"type": "text"}, "output", None),
        ("response_format", {"type": "json_object"}, "output", JsonOutput()),
        ("response_format", {"type": "json_object", "schema": {"type": "array"}}, "output", JsonOutput({"type": "array"})),
        ("response_format", {"type": "json_schema", "schema": {"type": "array"}}, "output", JsonOutput({"type": "array"})),
    ],
)
def test_what_other_servers_take_in_these_fields_is_read_for_what_it_means(field, value, name, expected):
    assert getattr(read([user()], **{field: value}), name) == expected


def test_instructions_in_front_are_the_system_and_later_ones_stay():
    """traps 73, 75"""
    request = read(
        [
            {"role": "system", "content": "a"},
            {"role": "developer", "content": [{"type": "text", "text": "b"}]},
            user(),
            {"role": "system", "content": "c"},
        ]
    )
    assert request.system == [Text("a"), Text("b")]
    assert [message.role for message in request.messages] == ["user", "system"]


def test_tool_messages_and_the_words_after_them_are_one_turn():
    """trap 77"""
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [entry(id="a", name="f", arguments="{}"), entry(id="b", name="g", arguments="")],
    }
    results = [
        {"role": "tool", "tool_call_id": "b", "content": "B"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "A"}]},
    ]
    request = read([user(), turn, *results, user("go on"), user("and on")])
    assert router.tidy_messages(request.messages)[1:] == [
        Message("assistant", [ToolCall("a", "f", "{}"), ToolCall("b", "g", "")]),
        Message("user", [ToolResult("a", [Text("A")]), ToolResult("b", [Text("B")]), Text("go on"), Text("and on")]),
    ]


def test_legacy_functions_become_tools_and_calls_with_ids():
    request = read(
        [
            user(),
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "R"},
        ],
        functions=[{"name": "f", "parameters": {"type": "object"}}],
        function_call={"name": "f"},
    )
    call, result = request.messages[1].blocks[0], request.messages[2].blocks[0]
    assert call.id and call.id == result.call_id and result.blocks == [Text("R")]
    assert request.tools == [Tool("f", "", {"type": "object"})] and request.tool_choice == ToolChoice("tool", "f")


def test_two_legacy_calls_of_one_function_keep_their_own_results():
    said = [user()]
    for words in ("A", "B"):
        said += [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]
        said += [{"role": "function", "name": "f", "content": words}]
    turns = router.tidy_messages(read(said).messages)
    calls = [block.id for turn in turns for block in turn.blocks if isinstance(block, ToolCall)]
    results = [block for turn in turns for block in turn.blocks if isinstance(block, ToolResult)]
    assert len(set(calls)) == 2 and [result.call_id for result in results] == calls
    assert [result.blocks for result in results] == [[Text("A")], [Text("B")]]


@pytest.mark.parametrize(
    "part, block",
    [
        ({"type": "text", "text": "x"}, Text("x")),
        ({"type": "image_url", "image_url": {"url": "https://h/i.png"}}, Media("image", url="https://h/i.png")),
        ({"type": "image_url", "image_url": "https://h/i.png"}, Media("image", url="https://h/i.png")),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
            Media("image", "image/png", "AA=="),
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;charset=x;base64,AA", "detail": "low"}},
            Media("image", "image/png", "AA", extra={"openai": {"detail": "low"}}),
        ),
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}}, Media("audio", "audio/mp3", "AA")),
        (
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"}},
            Media("document", "application/pdf", "AA", name="a.pdf"),
        ),
        ({"type": "file", "file": {"file_data": "AA"}}, Media("document", "application/pdf", "AA")),
        ({"type": "file", "file": {"file_id": "f1"}}, Opaque("openai", {"type": "file", "file": {"file_id": "f1"}})),
        ({"type": "refusal", "refusal": "no"}, Refusal("no")),
        (
            {"type": "video_url", "video_url": {"url": "u"}},
            Opaque("openai", {"type": "video_url", "video_url": {"url": "u"}}),
        ),
        (
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
            Text("x", {"anthropic": {"cache_control": {"type": "ephemeral"}}}),
        ),
        ({"type": "input_text", "text": "x"}, Text("x")),
        ({"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}, ToolCall("a", "f", '{"x":1}')),
        (
            {"type": "tool_result", "tool_use_id": "a", "content": "R", "is_error": True},
            ToolResult("a", [Text("R")], True),
        ),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
            Media("image", "image/png", "AA"),
        ),
        ({"type": "thinking", "thinking": "hm", "signature": "s"}, Thinking("hm", {"anthropic": {"signature": "s"}})),
        ({"type": "input_file", "file_url": "https://x/y.pdf"}, Media("document", url="https://x/y.pdf")),
        (
            {"type": "file", "file": {"file_data": "YQ==", "filename": "a.TXT"}},
            Media("document", "text/plain", "YQ==", name="a.TXT"),
        ),
    ],
)
def test_each_part_becomes_its_block(part, block):
    """trap 66: blocks of the other formats too"""
    assert read([user([part])]).messages[0].blocks == [block]


def test_a_cache_mark_beside_the_content_marks_the_last_block():
    """@ai-sdk/openai-compatible writes a message's options beside its content, as opencode's for Claude."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "system", "content": "s"},
        user("q"),
        {"role": "assistant", "content": "a", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    request = read([dict(turn, cache_control={"type": "ephemeral"}) for turn in turns])
    blocks = [*request.system, *(block for message in request.messages for block in message.blocks)]
    marked = [type(block) for block in blocks if block.extra == {"anthropic": {"cache_control": {"type": "ephemeral"}}}]
    assert marked == [Text, Text, ToolCall, ToolResult] and len(blocks) == 5
    assert read([dict(user([]), cache_control={"type": "ephemeral"}), user("q")]).messages[0].blocks == []


def test_reasoning_in_the_history_is_kept_and_written_back():
    """trap 87"""
    message = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    details = {
        "role": "assistant",
        "content": "y",
        "reasoning": "rr",
        "reasoning_details": [{"type": "reasoning.text", "text": "rr"}],
    }
    request = read([user(), message, user(), details])
    assert request.messages[1].blocks == [Thinking("hm", {"openai": {"field": "reasoning_content"}}), Text("x")]
    assert OPENAI_CHAT.render_request(request)["messages"] == [user(), message, user(), details]


@pytest.mark.parametrize(
    "tool, expected",
    [
        (
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
            },
            Tool("f", "d", {"type": "object"}, strict=True),
        ),
        ({"type": "function", "name": "f", "parameters": {}}, Tool("f", "", {})),
        (
            {"name": "f", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
            Tool("f", "", {"type": "object"}, extra={"anthropic": {"cache_control": {"type": "ephemeral"}}}),
        ),
        (
            {"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}},
            Tool("c", kind="custom", extra={"openai": {"format": {"type": "text"}}}),
        ),
        ({"type": "custom", "name": "f", "input_schema": {}}, Tool("f", "", {})),
        (
            {"type": "function", "function": {"name": "f", "cache_control": {"type": "ephemeral"}}},  # Goose
            Tool("f", extra={"anthropic": {"cache_control": {"type": "ephemeral"}}}),
        ),
        (
            {"type": "web_search_20250305", "name": "web_search"},
            Tool(
                "web_search", kind="server", extra={"anthropic": {"type": "web_search_20250305", "name": "web_search"}}
            ),
        ),
        ({"type": "web_search"}, Tool("web_search", kind="server", extra={"openai": {"type": "web_search"}})),
    ],
)
def test_each_tool_is_read_by_its_shape(tool, expected):
    """trap 66"""
    assert read([user()], tools=[tool]).tools == [expected]


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("any")),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("tool", "f")),
        ({"type": "function", "name": "f"}, ToolChoice("tool", "f")),
        ({"type": "custom", "custom": {"name": "c"}}, ToolChoice("tool", "c")),
        ({"type": "tool", "name": "f"}, ToolChoice("tool", "f")),
        ({"type": "any"}, ToolChoice("any")),
        ("nonsense", None),
    ],
)
def test_each_tool_choice_is_read(choice, expected):
    """trap 96"""
    assert read([user()], tool_choice=choice).tool_choice == expected


def test_allowed_tools_leave_out_the_others():
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
    }
    request = read([user()], tools=[{"name": "f"}, {"name": "g"}], tool_choice=choice)
    assert [tool.name for tool in request.tools] == ["f"] and request.tool_choice == ToolChoice("any")


def test_input_stands_for_missing_messages():
    """trap 66"""
    items = [
        user("q"),
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "R"},
    ]
    request = OPENAI_CHAT.parse_request({"model": "m", "input": items, "instructions": "be kind"})
    assert request.system == [Text("be kind")]
    assert request.messages[1:] == [
        Message("assistant", [ToolCall("a", "f", "{}")]),
        Message("user", [ToolResult("a", [Text("R")])]),
    ]
    assert OPENAI_CHAT.parse_request({"input": "q"}).messages == [Message("user", [Text("q")])]


@pytest.mark.parametrize(
    "body, path",
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [user(), 3]}, "messages[1]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [user(3)]}, "messages[0].content"),
        ({"messages": [user([{"type": "text", "text": 3}])]}, "messages[0].content[0].text"),
        ({"messages": [user([7])]}, "messages[0].content[0]"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [user()], "temperature": "hot"}, "temperature"),
        ({"messages": [user()], "max_tokens": True}, "max_tokens"),
        ({"messages": [user()], "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"messages": [user()], "tools": [{"name": "f", "parameters": []}]}, "tools[0].parameters"),
        ({"messages": [user()], "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(body, path):
    with pytest.raises(RouterError) as raised:
        OPENAI_CHAT.parse_request(body)
    assert raised.value.status == 400 and raised.value.message.startswith(path + ": ")


def test_a_whole_number_with_a_point_is_one():
    """Where a language knows no integers, they are written so; pydantic, behind most APIs, takes them."""
    request = OPENAI_CHAT.parse_request({"messages": [user()], "max_tokens": 9.0})
    assert request.max_tokens == 9 and isinstance(request.max_tokens, int)
    with pytest.raises(RouterError):
        OPENAI_CHAT.parse_request({"messages": [user()], "max_tokens": 9.5})


# ---- requests to an upstream


def written(*messages, **fields):
    return OPENAI_CHAT.render_request(ChatRequest("m", list(messages), **fields))


def messages_of(*messages, **fields):
    return router.render_request(ChatRequest("m", list(messages), **fields), "openai")["messages"]


CALLS = Message("assistant", [ToolCall("a", "f", ""), Text("text"), ToolCall("b", "g", '{"x":1}')])
CALLS_WRITTEN = {
    "role": "assistant",
    "content": "text",
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": '{"x":1}'}},
    ],
}


def tool_message(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def test_results_follow_their_calls_in_order_and_the_words_come_after():
    """traps 41, 77, 80"""
    turn = Message("user", [Text("go"), ToolResult("b", [Text("B"), Text("2")]), ToolResult("a", [Text("A")])])
    assert messages_of(CALLS, turn) == [CALLS_WRITTEN, tool_message("a", "A"), tool_message("b", "B\n2"), user("go")]


def test_results_are_found_behind_other_turns_too():
    """trap 77"""
    later = [
        Message("user", [Text("wait")]),
        Message("system", [Text("s")]),
        Message("user", [ToolResult("b", []), ToolResult("a", [])]),
    ]
    assert messages_of(CALLS, *later) == [
        CALLS_WRITTEN,
        tool_message("a", ""),
        tool_message("b", ""),
        user("wait"),
        {"role": "system", "content": "s"},
    ]


def test_a_result_without_a_call_becomes_text():
    """trap 78"""
    assert messages_of(Message("user", [ToolResult("z", [Text("Z")])])) == [user("[result of tool call z]\n\nZ")]


def test_a_call_without_a_result_gets_one():
    """trap 79"""
    assert messages_of(CALLS, Message("user", [ToolResult("a", [Text("A")])])) == [
        CALLS_WRITTEN,
        tool_message("a", "A"),
        tool_message("b", "(no result)"),
    ]


def test_second_results_are_dropped_and_second_calls_with_one_id_get_another():
    """traps 38, 81"""
    twice = Message("assistant", [ToolCall("a", "f", "{}"), ToolCall("a", "f", "{}")])
    results = [
        Message("user", [ToolResult("a", [Text("1")]), ToolResult("a", [Text("2")])]),
        Message("user", [ToolResult("a", [Text("3")])]),
    ]
    found = messages_of(twice, *results)
    assert [call["id"] for call in found[0]["tool_calls"]] == ["a", "a_1"]
    assert found[1:] == [tool_message("a", "1"), tool_message("a_1", "2")]


@pytest.mark.parametrize(
    "given, sent",
    [('{"a":', '{"_raw":"{\\"a\\":"}'), ("[1]", '{"_raw":"[1]"}'), ("", "{}"), (" ", "{}"), ('{ "a":1 }\n', '{ "a":1 }'), ("null", "{}")],
)
def test_arguments_in_the_history_are_an_object(given, sent):
    """trap 42: a call that was cut off must not spoil every later turn"""
    body = OPENAI_CHAT.render_request(ChatRequest("m", [Message("assistant", [ToolCall("c", "f", given)])]))
    assert body["messages"][0]["tool_calls"][0]["function"]["arguments"] == sent


def test_empty_texts_and_turns_are_left_out():
    """traps 32, 82"""
    assert messages_of(
        Message("user", [Text("")]), Message("assistant", [Text("")]), Message("user", [Text("a"), Text("")])
    ) == [user("a")]


def test_content_is_null_only_beside_calls():
    """trap 83"""
    assert messages_of(Message("assistant", [ToolCall("a", "f", "{}")]))[0]["content"] is None


def test_calls_in_turns_of_their_own_are_one_turn():
    turns = [Message("assistant", [ToolCall("a", "f", "{}")]), Message("assistant", [ToolCall("b", "g", "{}")])]
    found = messages_of(*turns, Message("user", [ToolResult("a", []), ToolResult("b", [])]))
    assert [message["role"] for message in found] == ["assistant", "tool", "tool"]


def test_images_in_results_follow_in_a_user_message():
    """traps 103, 104"""
    picture = Media("image", "image/png", "AA")
    found = messages_of(CALLS, Message("user", [ToolResult("a", [picture]), ToolResult("b", [Text("B")]), Text("go")]))
    assert found[1]["content"] and found[2] == tool_message("b", "B")
    assert found[3] == user(
        [
            {"type": "text", "text": "[from the result of tool call a]"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
            {"type": "text", "text": "go"},
        ]
    )
    assert len(found) == 4


def test_images_in_results_are_not_lost_before_the_next_answer_or_the_end():
    """trap 104"""
    turn = Message("user", [ToolResult("a", [Media("image", url="https://h/i")]), ToolResult("b", [])])
    for rest in ([], [Message("assistant", [Text("x")])]):
        assert messages_of(CALLS, turn, *rest)[3]["content"][1] == {
            "type": "image_url",
            "image_url": {"url": "https://h/i"},
        }


def test_an_error_result_says_so():
    assert messages_of(
        CALLS, Message("user", [ToolResult("a", [Text("boom")], True), ToolResult("b", [Text("error: x")], True)])
    )[1:] == [
        tool_message("a", "Error: boom"),
        tool_message("b", "error: x"),
    ]


@pytest.mark.parametrize(
    "media, part",
    [
        (
            Media("image", url="https://h/i", extra={"openai": {"detail": "low"}}),
            {"type": "image_url", "image_url": {"url": "https://h/i", "detail": "low"}},
        ),
        (
            Media("image", "image/png", "AA", extra={"openai": {"detail": "original"}}),
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "high"}},
        ),
        (Media("audio", "audio/mpeg", "AA"), {"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}}),
        (
            Media("document", "application/pdf", "AA", name="a.pdf"),
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"}},
        ),
        (Opaque("openai", {"type": "video_url"}), {"type": "video_url"}),
    ],
)
def test_media_are_written_as_parts(media, part):
    """traps 102, 105"""
    assert messages_of(Message("user", [media])) == [user([part])]


def test_documents_that_are_text_are_written_as_text():
    """trap 105"""
    data = base64.b64encode("Grüße".encode()).decode()
    assert messages_of(Message("user", [Media("document", "text/plain", data, name="a.txt")])) == [user("a.txt\nGrüße")]
    assert messages_of(Message("user", [Media("document", url="https://h/d.pdf")])) == [
        user("[document left out: https://h/d.pdf]")
    ]


def test_thinking_is_written_back_on_turns_with_calls_whatever_format_it_came_from():
    """trap 87: DeepSeek and Moonshot refuse a turn with calls that lacks it"""
    thoughts = [Thinking("hm ", {"anthropic": {"signature": "s"}}), Thinking("", {"anthropic": {"data": "x"}})]
    own = Thinking("so", {"openai": {"field": "reasoning_content"}})
    for count in (1, 2):
        turn = Message("assistant", [*thoughts[:count], own, *CALLS.blocks])
        assert messages_of(turn)[0] == {**CALLS_WRITTEN, "reasoning_content": "hm so"}
    assert "reasoning_content" not in messages_of(Message("assistant", [thoughts[1], *CALLS.blocks]))[0]


def test_thinking_of_others_and_foreign_blocks_are_dropped_on_turns_without_calls():
    """traps 84, 107"""
    turn = Message(
        "assistant", [Thinking("hm", {"anthropic": {"signature": "s"}}), Opaque("anthropic", {"type": "x"}), Text("x")]
    )
    assert messages_of(turn) == [{"role": "assistant", "content": "x"}]


def test_the_system_is_one_message_and_later_ones_keep_their_place():
    """trap 73"""
    found = messages_of(
        Message("user", [Text("q")]),
        Message("system", [Text("s")]),
        system=[Text("a", {"anthropic": {"cache_control": {}}}), Text("b")],
    )
    assert found == [{"role": "system", "content": "a\n\nb"}, user("q"), {"role": "system", "content": "s"}]


def test_tools_are_written_in_openais_form():
    """traps 67, 94, 98, 106"""
    schema = {"type": "object", "properties": {"x": {}}}
    tools = [
        Tool("f", "d", schema, strict=True, extra={"anthropic": {"cache_control": {"type": "ephemeral"}}}),
        Tool("g"),
        Tool("h", schema={"type": "object"}),
        Tool(
            "c",
            "d",
            kind="custom",
            extra={"responses": {"format": {"type": "grammar", "syntax": "regex", "definition": "a+"}}},
        ),
        Tool("web_search", kind="server", extra={"anthropic": {"type": "web_search_20250305"}}),
    ]
    empty = {"type": "object", "properties": {}}
    assert written(tools=tools)["tools"] == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}},
        {"type": "function", "function": {"name": "g", "parameters": empty}},
        {"type": "function", "function": {"name": "h", "parameters": empty}},
        {
            "type": "custom",
            "custom": {
                "name": "c",
                "description": "d",
                "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a+"}},
            },
        },
    ]


@pytest.mark.parametrize(
    "choice, value",
    [
        (ToolChoice("any"), "required"),
        (ToolChoice("auto"), "auto"),
        (ToolChoice("none"), "none"),
        (ToolChoice("tool", "f"), {"type": "function", "function": {"name": "f"}}),
        (ToolChoice("tool", "c"), {"type": "custom", "custom": {"name": "c"}}),
        (ToolChoice("tool", "gone"), None),
        (None, None),
    ],
)
def test_each_tool_choice_is_written(choice, value):
    """traps 96, 97"""
    body = written(tools=[Tool("f"), Tool("c", kind="custom")], tool_choice=choice, parallel_tools=False)
    assert body.get("tool_choice") == value and body["parallel_tool_calls"] is False


def test_without_tools_nothing_speaks_of_them():
    body = written(tools=[Tool("s", kind="server")], tool_choice=ToolChoice("any"), parallel_tools=True)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(body)


def test_the_remaining_fields_are_written():
    """traps 90, 99, 100, 101"""
    body = written(
        Message("user", [Text("q")]),
        max_tokens=5,
        temperature=0.0,
        top_p=1,
        top_k=3,
        stop=["END"],
        stream=True,
        output=JsonOutput({"type": "object"}, strict=True),
        reasoning=Reasoning(budget=8000),
        user="u",
        fields={
            "openai": {"seed": 1},
            "responses": {"service_tier": "flex", "text": {"verbosity": "low"}, "include": []},
            "anthropic": {"container": "c"},
        },
    )
    del body["messages"]
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 1,
        "stop": ["END"],
        "user": "u",
        "reasoning_effort": "medium",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 1,
        "service_tier": "flex",
        "verbosity": "low",
    }


@pytest.mark.parametrize(
    "reasoning, effort",
    [
        (Reasoning("xhigh"), "high"),
        (Reasoning(budget=5000), "medium"),
        (Reasoning(budget=1024), "low"),
        (Reasoning(budget=31999), "high"),
        (Reasoning(adaptive=True), None),
        (Reasoning("none"), "none"),
        (Reasoning("none", extra={"anthropic": {"thinking": {"type": "disabled"}}}), None),
    ],
)
def test_reasoning_becomes_an_effort(reasoning, effort):
    """trap 90"""
    assert written(reasoning=reasoning).get("reasoning_effort") == effort


@pytest.mark.parametrize(
    "model, wanted, effort",
    [
        ("gpt-5.2", "max", "xhigh"), ("gpt-5.2", "none", "none"), ("gpt-5.2", "minimal", "low"), ("gpt-5", "xhigh", "high"),
        ("gpt-5", "none", "minimal"), ("openai/o4-mini", "minimal", "low"), ("qwen3", "max", "high"), ("qwen3", "odd", "low"),
        ("mistral-small-2603", "low", "high"), ("mistral-medium-3-5", "none", "none"),
        ("gpt-5.6-sol", "max", "max"), ("gpt-5.5", "max", "xhigh"), ("gpt-5.4-pro", "low", "medium"), ("gpt-5-pro", "low", "high"),
        ("deepseek/deepseek-v4-pro", "max", "max"), ("glm-5.3", "max", "max"), ("glm-4.7", "max", "high"),
    ],
)  # fmt: skip
def test_an_effort_is_one_that_the_model_knows(model, wanted, effort):
    """trap 90"""
    request = ChatRequest(model, [Message("user", [Text("hi")])], reasoning=Reasoning(wanted))
    assert OPENAI_CHAT.render_request(request)["reasoning_effort"] == effort
    assert OPENAI_RESPONSES.render_request(request)["reasoning"]["effort"] == effort


def test_a_long_user_id_is_left_out():
    """trap 101"""
    assert "user" not in written(user="u" * 65) and "user" in written(user="u" * 64)


def test_reading_what_was_written_gives_the_same_request():
    request = ChatRequest(
        "m",
        [
            Message("user", [Text("q"), Media("image", "image/png", "AA")]),
            Message("assistant", [Text("t"), ToolCall("a", "f", '{"x":1}')]),
            Message("user", [ToolResult("a", [Text("R")]), Text("go")]),
            Message("assistant", [Refusal("no")]),
        ],
        system=[Text("s")],
        tools=[Tool("f", "d", {"type": "object", "properties": {}}, strict=False)],
        tool_choice=ToolChoice("tool", "f"),
        parallel_tools=True,
        max_tokens=5,
        stop=["END"],
        stream=True,
        include_usage=True,
        output=JsonOutput(),
        reasoning=Reasoning("high"),
        user="u",
        fields={"openai": {"seed": 1}},
    )
    found = OPENAI_CHAT.parse_request(OPENAI_CHAT.render_request(request))
    assert found._replace(messages=router.tidy_messages(found.messages)) == request


# ---- errors


@pytest.mark.parametrize(
    "status, body, expected",
    [
        (400, {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}, ErrorInfo(400, "m", "t", "c", "p")),
        (402, {"error": {"message": "m", "code": 402}}, ErrorInfo(402, "m", "", "402")),
        (429, {"code": "exhausted", "error": "no credits"}, ErrorInfo(429, "no credits", "", "exhausted")),
        (
            429,
            [{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}],
            ErrorInfo(429, "m", "RESOURCE_EXHAUSTED", "429"),
        ),
        (401, {"detail": "Invalid API Key"}, ErrorInfo(401, "Invalid API Key")),
        (422, {"detail": [{"loc": ["body", "x", 0], "msg": "field required"}]}, ErrorInfo(422, "body.x.0: field required")),
        (429, {"Message": "Rate exceeded"}, ErrorInfo(429, "Rate exceeded")),
        (
            400,
            {"object": "error", "message": "m", "type": "BadRequestError", "code": 400},
            ErrorInfo(400, "m", "BadRequestError", "400"),
        ),
        (502, "plain words\n", ErrorInfo(502, "plain words")),
        (400, '{"error": {"message": "m"}}', ErrorInfo(400, "m")),
        (400, {"error": '{"error": {"message": "m", "code": "c"}}'}, ErrorInfo(400, "m", "", "c")),
        (
            400,
            {"error": {"message": 'Error from provider: {"error": {"message": "inner"}}'}},
            ErrorInfo(400, "Error from provider: inner"),
        ),
        (
            429,
            {"error": {"message": "Provider returned error", "metadata": {"raw": '{"error": {"message": "inner"}}'}}},
            ErrorInfo(429, "Provider returned error: inner"),
        ),
        (503, {}, ErrorInfo(503, "the upstream answered with status 503")),
        (500, None, ErrorInfo(500, "the upstream answered with status 500")),
        (200, {"error": {"message": "m", "type": "insufficient_quota"}}, ErrorInfo(429, "m", "insufficient_quota")),
        (200, {"error": {"message": "m"}}, ErrorInfo(502, "m")),
    ],
)
def test_an_error_is_read_in_every_shape(status, body, expected):
    """trap 124"""
    assert router.read_error(status, body) == expected


@pytest.mark.parametrize(
    "info, kind",
    [
        (ErrorInfo(400, "m"), "invalid_request_error"),
        (ErrorInfo(401, "m"), "authentication_error"),
        (ErrorInfo(429, "m"), "rate_limit_error"),
        (ErrorInfo(503, "m"), "server_error"),
        (ErrorInfo(503, "m", "own"), "own"),
    ],
)
def test_an_error_is_written_with_a_type(info, kind):
    """trap 121"""
    assert OPENAI_CHAT.render_error(info, "r") == {"error": {"message": "m", "type": kind, "param": None, "code": None}}
    assert (
        OPENAI_CHAT.error_event(info, "r")
        == b"data: " + router.dump_json(OPENAI_CHAT.render_error(info, "r")) + b"\n\n"
    )


@pytest.mark.parametrize(
    "raw, is_seen",
    [
        (b'data: {"choices":[],"usage":{"prompt_tokens":1}}', True),
        (b'data: {"usage" : {', True),
        (b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}', True),
        (b'data: {"error":{"message":"x"}}', True),
        (b'data: {"error":"x"}', True),
        (b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null}],"usage":null}', False),
        (
            b'data: {"choices":[{"delta":{"content":"\\"error\\": {} \\"usage\\":{}"},"finish_reason":null}]}',
            False,
        ),
        (b'data: {"error":null}', False),
    ],
)
def test_a_relay_looks_only_at_what_matters(raw, is_seen):
    assert bool(router.StreamRelay("openai", "openai", make_context())._watch(raw)) is is_seen


@pytest.mark.parametrize("end", [b"data:[DONE]\n\n", b"event: error\ndata: x\n\n", b'event:error\r\ndata: "x"\r\n\r\n'])
def test_a_relay_sees_an_end_that_no_json_tells(end):
    """Traps 3, 19."""
    relay = router.make_processor("openai", "openai", make_context())
    relay.feed(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
    relay.feed(b'data: {"choices":[{"delta":{"content":"[DONE"}}]}\n\n')
    assert not relay.done and relay.failed is None
    relay.feed(end)
    assert relay.done is (b"DONE" in end) and (relay.failed is None) is (b"DONE" in end)


# ---- recorded answers and foreign input


def recorded(*names):
    if not CORPUS.is_dir():
        return []
    found = []
    for path in sorted(CORPUS.glob("*/*.json")):
        item = json.loads(path.read_text("utf-8"))
        is_stream = bool(item.get("stream")) and "data:" in item["body"]
        kind = "error" if item["status"] != 200 else "stream" if is_stream else "whole"
        if item.get("api") == "chat" and item["streams_in_body"] in (0, 1) and kind in names:
            found.append(pytest.param(item, id=path.parent.name + "/" + path.name[:60]))
    return found or [pytest.param(None, marks=pytest.mark.skip("no recorded chat answers here"))]


RECORDED = {
    name: recorded(name) or [pytest.param(None, marks=pytest.mark.skip("no corpus"))]
    for name in ("stream", "whole", "error")
}


def _plain(value):
    """The text of a content value, read without the parser; the words in think tags and thinking parts apart."""
    if isinstance(value, list):
        return "".join(part.get("text", "") for part in value if isinstance(part, dict) and part.get("type") == "text")
    return value or ""


def _expected(choices):
    """(text with its tags, reasoning, refusal, {(name, arguments)}) of deltas or messages, independently extracted."""
    text = reasoning = refusal = ""
    found = {}
    for number, delta in enumerate(choices):
        text += _plain(delta.get("content"))
        reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        refusal += delta.get("refusal") or ""
        for position, item in enumerate(delta.get("tool_calls") or []):
            call = found.setdefault(item.get("index", (number, position)), ["", ""])
            call[0] = call[0] or item["function"].get("name") or ""
            call[1] += item["function"].get("arguments") or ""
    return text, reasoning, refusal, [tuple(call) for call in found.values()]


def _compare(response, expected):
    text, reasoning, refusal, found = expected
    assert [
        (b.name, b.arguments) for b in response.blocks if isinstance(b, ToolCall) and not b.id.startswith("call_r1_")
    ] == found
    assert "".join(b.text for b in response.blocks if isinstance(b, Refusal)) == refusal
    seen = "".join(b.text for b in response.blocks if isinstance(b, Text))
    thought = "".join(b.text for b in response.blocks if isinstance(b, Thinking))
    if text.lstrip().startswith("<think>"):
        inside, _, text = text.lstrip()[7:].partition("</think>")
        assert thought.split() == inside.split()
    elif reasoning:
        assert thought == reasoning
    if text or seen:
        assert seen.strip() == text.strip() or any(getattr(b, "text", "") for b in response.blocks)
        assert seen.split() == text.split() or not text.strip()


@pytest.mark.parametrize("item", RECORDED["stream"])
def test_recorded_streams_keep_the_order_and_lose_nothing(item):
    parser = OPENAI_CHAT.parser(make_context())
    decoder = SseDecoder()
    sses = decoder.feed(item["body"].encode("utf-8", "surrogatepass")) + decoder.finish()
    events = check([event for sse in sses for event in parser.feed(sse)] + parser.finish())
    data = [json.loads(sse.data) for sse in sses if sse.data.strip().startswith("{")]
    assert parser.skipped == 0
    response = fold(events)
    if any(part.get("error") for part in data):
        assert isinstance(response, ErrorInfo)
        return
    _compare(response, _expected([c["delta"] for part in data for c in part.get("choices") or [] if not c["index"]]))
    usages = [part.get("usage") or part.get("x_groq", {}).get("usage") for part in data]
    usages = [usage for usage in usages if usage]
    assert (response.usage is not None) == bool(usages)
    if usages:
        usage = response.usage
        assert usage.input + usage.cache_read + usage.cache_write == usages[-1]["prompt_tokens"]
        assert usage.output in (
            usages[-1]["completion_tokens"],
            usages[-1]["total_tokens"] - usages[-1]["prompt_tokens"],
        )
    assert (response.stop_reason == "tool_use") == any(isinstance(block, ToolCall) for block in response.blocks)


@pytest.mark.parametrize("item", RECORDED["whole"])
def test_recorded_answers_lose_nothing(item):
    try:
        body = json.loads(item["body"])
    except ValueError:
        pytest.skip("not one JSON body")
    if not body.get("choices"):
        with pytest.raises(RouterError):
            OPENAI_CHAT.parse_response(body, make_context())
        return
    response = OPENAI_CHAT.parse_response(body, make_context())
    message = body["choices"][0]["message"]
    if not message.get("audio"):
        _compare(response, _expected([message]))
    assert fold(unfold(response)) == response
    again = OPENAI_CHAT.parse_response(OPENAI_CHAT.render_response(response, make_context()), make_context())
    assert again.usage == response.usage and again.stop_reason == response.stop_reason


@pytest.mark.parametrize("item", RECORDED["error"])
def test_recorded_errors_have_words(item):
    body = json.loads(item["body"])
    info = router.read_error(item["status"], body)
    assert info.status == item["status"] and info.message and not info.message.startswith(("{", "the upstream"))


def test_reported_error_shapes_have_words():
    path = CORPUS / "error_shapes.json"
    if not path.is_file():
        pytest.skip("no error shapes here")
    for shape in json.loads(path.read_text("utf-8"))["shapes"]:
        try:
            body = json.loads(shape["body"])
        except ValueError:
            body = shape["body"]
        info = router.read_error(shape["status"], body)
        assert info.message and info.status >= 400 and not info.message.startswith("{"), shape["id"]


WORDS = (
    "id index type function name arguments custom input content role text tool_calls delta message choices usage error finish_reason "
    "reasoning_content reasoning reasoning_details refusal audio images annotations function_call tools tool_choice messages user "
    "assistant system tool tool_call_id image_url url file file_data thinking source data detail metadata raw status code stop "
    "response_format json_schema schema stream_options prompt_tokens completion_tokens prompt_tokens_details cached_tokens model"
).split()
VALUES = WORDS + [
    "",
    "<think>",
    "</think>",
    "x",
    "{",
    '{"a":1}',
    "tool_use",
    "tool_result",
    "input_audio",
    "data:a;base64,AA",
    "\ud800",
]


def noise(dice, depth=0):
    kind = dice.randrange(9 if depth < 6 else 5)
    if kind >= 7:
        return [noise(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind >= 5:
        return {dice.choice(WORDS): noise(dice, depth + 1) for _ in range(dice.randrange(6))}
    return (
        dice.choice(VALUES),
        dice.choice(VALUES),
        None,
        dice.choice((0, 1, -1, 2.5, 1e300, True, False, 10**30)),
        {},
    )[kind]


def spoil(dice, value, depth=0):
    """`value` with something in it replaced by noise, so that the readers get deep."""
    if dice.random() < 0.06 and depth:
        return noise(dice, 3)
    if isinstance(value, dict):
        return {key: spoil(dice, item, depth + 1) for key, item in value.items()}
    return [spoil(dice, item, depth + 1) for item in value] if isinstance(value, list) else value


REQUEST = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        user(
            [
                {"type": "text", "text": "x"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                {"type": "file", "file": {"file_data": "AA"}},
            ]
        ),
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [entry(id="a", name="f", arguments="{}")],
        },
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "R"}]},
        user(
            [
                {
                    "type": "tool_result",
                    "tool_use_id": "q",
                    "content": [{"type": "image", "source": {"type": "base64", "data": "AA"}}],
                }
            ]
        ),
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        {"type": "custom", "custom": {"name": "c"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    "stream_options": {"include_usage": True},
    "reasoning": {"effort": "low"},
}


@pytest.mark.parametrize("seed", SEEDS)
def test_foreign_requests_are_read_or_refused(seed):
    dice = random.Random(seed)
    accepted = 0
    for turn in range(1500):
        body = spoil(dice, REQUEST) if turn % 3 else {"messages": noise(dice)}
        try:
            request = OPENAI_CHAT.parse_request(body)
        except RouterError as error:
            assert error.status == 400
            continue
        router.dump_json(OPENAI_CHAT.render_request(request))
        router.dump_json(router.render_request(request, "openai"))
        accepted += 1
    assert accepted > 50


@pytest.mark.parametrize("seed", SEEDS)
def test_foreign_answers_are_read_or_refused(seed):
    dice = random.Random(seed)
    full = whole(
        {"content": [{"type": "text", "text": "x"}], "reasoning": "r", **calls(entry(0, "a", "f", "{}"))},
        "stop",
        usage=USAGE,
    )
    for turn in range(1500):
        body = spoil(dice, full) if turn % 2 else noise(dice)
        try:
            response = OPENAI_CHAT.parse_response(body, make_context())
        except RouterError:
            continue
        router.dump_json(OPENAI_CHAT.render_response(response, make_context()))


@pytest.mark.parametrize("seed", SEEDS)
def test_foreign_streams_keep_the_order(seed):
    dice = random.Random(seed)
    base = [
        chunk({"role": "assistant", "content": "<think>a"}),
        chunk({"content": "</think>b", "reasoning_content": "r", "reasoning_details": [{"text": "r"}]}),
        chunk(calls(entry(0, "a", "f", ""), entry(1, "b", "g", '{"x"'))),
        chunk(calls(entry(1, None, "g", ":1}"), entry(0, arguments="{}"))),
        chunk({"refusal": "no", "content": "late", "images": [{"type": "image_url"}]}),
        chunk({"audio": {"transcript": "x"}, "function_call": {"name": "h", "arguments": "{}"}}, "stop", usage=USAGE),
    ]
    for _ in range(400):
        parser = OPENAI_CHAT.parser(make_context())
        renderer = OPENAI_CHAT.renderer(make_context(include_usage=True))
        events = []
        for item in dice.choices(base + [None], k=dice.randrange(1, 12)):
            value = noise(dice) if item is None else spoil(dice, item) if dice.random() < 0.7 else item
            data = json.dumps(value)
            events += parser.feed(
                SseEvent(
                    dice.choice(("", "", "", "message")),
                    data[: dice.randrange(len(data) + 1)] if dice.random() < 0.1 else data,
                )
            )
        check(events + parser.finish()) if dice.random() < 0.5 else check(
            events + parser.feed(SseEvent("", "[DONE]")) + parser.finish()
        )
        raw = b"".join(map(renderer.render, events))
        assert raw.isascii()


@pytest.mark.parametrize("seed", SEEDS)
def test_foreign_errors_always_have_words(seed):
    dice = random.Random(seed)
    for _ in range(1500):
        body = noise(dice)
        info = router.read_error(dice.choice((200, 400, 500)), json.dumps(body) if dice.random() < 0.3 else body)
        assert info.message and 400 <= info.status <= 599
        router.dump_json(OPENAI_CHAT.render_error(info, "r"))


def test_deeply_wrapped_errors_end():
    """trap 124"""
    body = {"message": "x"}
    for _ in range(30):
        body = {"error": {"message": json.dumps(body)}} if len(json.dumps(body)) < 100000 else {"error": [body]}
    assert router.read_error(500, body).message


@pytest.mark.parametrize("odd", [True, 7, "x", {"a": 1}, [7], [None, None], [[]]])
def test_odd_tool_calls_in_the_middle_of_a_call_are_passed_over(odd):
    def chunk(calls, **more):
        return {"choices": [dict({"index": 0, "delta": {"tool_calls": calls}}, **more)]}

    def part(text, **more):
        return [dict({"index": 0, "function": dict({"arguments": text}, **more)}, id="c", type="function")]

    chunks = [chunk(part('{"a":', name="f")), chunk(part("1")), chunk(odd), chunk(part("}"))]
    raw = b"".join(b"data: %s\n\n" % json.dumps(row).encode() for row in [*chunks, chunk([], finish_reason="tool_calls")])
    folded = router.fold_stream("openai", raw, Context(ChatRequest("m", []), "r", 1))
    assert [(block.name, json.loads(block.arguments)) for block in folded.blocks] == [("f", {"a": 1})]


def test_a_broken_call_is_judged_once_and_not_for_every_chunk_behind_it(monkeypatch):
    judged, judge = [], router.arguments_object
    monkeypatch.setattr(router, "arguments_object", lambda text: judged.append(text) or judge(text))
    parser = router.ChatStreamParser(Context(ChatRequest("m", []), "r", 1))
    calls = [(0, "a", '{"a":1}}'), *[(1, "b", "x")] * 50]
    for index, name, text in calls:
        item = {"index": index, "id": name, "function": {"name": name, "arguments": text}}
        parser.read({"choices": [{"delta": {"tool_calls": [item]}}]})
    assert judged == ['{"a":1}}']


def test_interleaved_calls_of_a_thousand_pieces_are_not_read_anew_at_each(monkeypatch):
    """Arguments full of code end many a piece with a brace; each time all of them were put together and parsed."""
    judged, judge = [], router.arguments_object
    monkeypatch.setattr(router, "arguments_object", lambda text: judged.append(text) or judge(text))
    parser = router.ChatStreamParser(Context(ChatRequest("m", []), "r", 1))
    pieces = ['{"code":"', *["f(){}"] * 999, '"}']
    events = []
    for piece in pieces:
        calls = [{"index": i, "id": name, "function": {"name": name, "arguments": piece}} for i, name in enumerate("ab")]
        events += parser.read({"choices": [{"delta": {"tool_calls": calls}}]})
    folded = fold(events + parser.end())
    assert [(block.name, block.arguments) for block in folded.blocks] == [("a", "".join(pieces)), ("b", "".join(pieces))]
    assert len(judged) < 100


def test_an_error_in_a_list_is_an_error():
    """Gemini's OpenAI endpoint answers so, in a stream, too."""
    raw = '[{"error":{"code":429,"message":"quota","status":"RESOURCE_EXHAUSTED"}}]'
    events = router.ChatStreamParser(Context(ChatRequest("m", []), "r", 1)).feed(SseEvent("", raw))
    assert [event.error.status for event in events] == [429]
    assert router.ChatStreamParser(Context(ChatRequest("m", []), "r", 1)).feed(SseEvent("", "[]")) == []
