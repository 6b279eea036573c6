"""Section ANTHROPIC MESSAGES: what goes in and out of the Messages API's shapes."""

import json
import random
from pathlib import Path

import pytest

import llm_router as R
from sse_decoder import SseDecoder

WIRE = R.ANTHROPIC_MESSAGES
CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"
CONTEXT = R.Context(R.ChatRequest("asked-for", []), "req1", 1700000000)


def parse(**body):
    body.setdefault("model", "claude-opus-4-6")
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return WIRE.parse_request(body)


def render(messages=None, model="claude-opus-4-6", **fields):
    if messages is None:
        messages = [R.Message("user", [R.Text("hi")])]
    return R.render_request(R.ChatRequest(model, messages, **fields), "anthropic")


def user(*blocks):
    return R.Message("user", [R.Text(block) if isinstance(block, str) else block for block in blocks])


def assistant(*blocks):
    return R.Message("assistant", [R.Text(block) if isinstance(block, str) else block for block in blocks])


def feed(*events, finish=True):
    parser = WIRE.parser(CONTEXT)
    out = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        out.extend(parser.feed(R.SseEvent("", data)))
    return parser, out + (parser.finish() if finish else [])


def start(**usage):
    usage = usage or {"input_tokens": 10, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
    return {"type": "message_start", "message": message}


def opened(index, **block):
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index, kind, **fields):
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def closed(index):
    return {"type": "content_block_stop", "index": index}


def end(reason="end_turn", **usage):
    event = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}}
    return {**event, "usage": usage or {"output_tokens": 5}}


STOP = {"type": "message_stop"}


def emit(*events):
    """The renderer's events as (name, data) pairs."""
    renderer = WIRE.renderer(CONTEXT)
    raw = b"".join(renderer.render(event) for event in events)
    return [(event.name, json.loads(event.data)) for event in R.parse_events(raw)]


def block_events(*events):
    """What the renderer emits between message_start and message_delta."""
    shown = emit(R.Started("msg_1", "m"), *events, R.Finished("end_turn"))
    assert [name for name, _ in shown[:1] + shown[-2:]] == ["message_start", "message_delta", "message_stop"]
    return [data for _, data in shown[1:-2]]


def assert_life_cycle(pairs):
    """One start, balanced blocks with contiguous indices, one end (traps 20 to 24)."""
    names = [name for name, _ in pairs]
    assert names[0] == "message_start" and names.count("message_start") == 1
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("message_delta") == names.count("message_stop") == 1
    index, is_open = -1, False
    for name, data in pairs:
        assert data["type"] == name
        if name == "content_block_start":
            assert not is_open and data["index"] == index + 1
            index, is_open = index + 1, True
        elif name in ("content_block_delta", "content_block_stop"):
            assert is_open and data["index"] == index
            is_open = name == "content_block_delta"
    assert not is_open


# ---- requests: Anthropic -> neutral


def test_a_full_request_becomes_neutral():
    request = parse(
        system=[{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ],
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop_sequences=["END"],
        stream=True,
        metadata={"user_id": "u1"},
        service_tier="auto",
    )
    assert request.system == [R.Text("be brief", {"anthropic": {"cache_control": {"type": "ephemeral"}}})]
    assert request.messages == [user("hi"), assistant("yes")]
    assert request.tools == [R.Tool("f", "d", {"type": "object"}, strict=True)]
    assert request.tool_choice == R.ToolChoice("tool", "f") and request.parallel_tools is False
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (9, 0.5, 0.9, 3)
    assert request.stop == ["END"] and request.stream and request.user == "u1"
    assert request.fields == {"anthropic": {"service_tier": "auto"}}


def test_a_system_message_in_mid_conversation_keeps_its_place():
    """trap 73"""
    request = parse(messages=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    assert request.messages == [user("a"), R.Message("system", [R.Text("b")])]


@pytest.mark.parametrize(
    "block, expected",
    [
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
            R.Media("image", "image/png", "QQ=="),
        ),
        (
            {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            R.Media("image", url="https://x/y.png"),
        ),
        (
            {"type": "image", "source": {"type": "file", "file_id": "f"}},
            R.Opaque("anthropic", {"type": "image", "source": {"type": "file", "file_id": "f"}}),
        ),
        (
            {
                "type": "document",
                "title": "T",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "QQ=="},
            },
            R.Media("document", "application/pdf", "QQ==", name="T"),
        ),
        (
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            R.Thinking("hm", {"anthropic": {"signature": "s"}}),
        ),
        (
            {"type": "redacted_thinking", "data": "x"},
            R.Opaque("anthropic", {"type": "redacted_thinking", "data": "x"}),
        ),
        ({"type": "tool_use", "id": "t", "name": "f", "input": {"a": "é"}}, R.ToolCall("t", "f", '{"a":"é"}')),
        ({"type": "tool_use", "id": "t", "name": "f", "input": {}}, R.ToolCall("t", "f", "{}")),
        ({"type": "tool_result", "tool_use_id": "t"}, R.ToolResult("t", [])),
        (
            {"type": "tool_result", "tool_use_id": "t", "content": "x", "is_error": True},
            R.ToolResult("t", [R.Text("x")], True),
        ),
        (
            {"type": "document", "source": {"type": "file", "file_id": "f"}},
            R.Opaque("anthropic", {"type": "document", "source": {"type": "file", "file_id": "f"}}),
        ),
        (
            {"type": "container_upload", "file_id": "f"},
            R.Opaque("anthropic", {"type": "container_upload", "file_id": "f"}),
        ),
    ],
)
def test_each_block_has_its_neutral_value(block, expected):
    assert parse(messages=[{"role": "user", "content": [block]}]).messages[0].blocks == [expected]


@pytest.mark.parametrize(
    "block, words",
    [
        (
            {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}},
            "T\nD",
        ),
        ({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "D"}]}}, "D"),
        (
            {"type": "search_result", "title": "T", "source": "S", "content": [{"type": "text", "text": "D"}]},
            "T\nS\nD",
        ),
        (
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
            "[server_tool_use] web_search q\n",
        ),
        (
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s",
                "content": [{"type": "web_search_result", "title": "T", "url": "U", "encrypted_content": "no"}],
            },
            "[web_search_tool_result] T U\n",
        ),
        (
            {
                "type": "web_fetch_tool_result",
                "tool_use_id": "s",
                "content": {
                    "type": "web_fetch_result",
                    "url": "U",
                    "content": {
                        "type": "document",
                        "source": {"type": "text", "media_type": "text/plain", "data": "the page"},
                        "title": "T",
                    },
                },
            },
            "[web_fetch_tool_result] U the page T\n",
        ),
        (
            {"type": "mcp_tool_use", "id": "m", "name": "ask", "server_name": "no", "input": {"a": {"b": ["c", "d"]}}},
            "[mcp_tool_use] ask c d\n",
        ),
        (
            {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False, "content": "a plain string"},
            "[mcp_tool_result] a plain string\n",
        ),
        (
            {
                "type": "text_editor_code_execution_tool_result",
                "tool_use_id": "e",
                "content": {"type": "text_editor_code_execution_str_replace_result", "lines": ["-old", "+new"]},
            },
            "[text_editor_code_execution_tool_result] -old +new\n",
        ),
        (
            {"type": "compaction", "content": "what was said", "encrypted_content": "no", "signature": "no"},
            "[compaction] what was said\n",
        ),
    ],
)
def test_blocks_only_anthropic_has_are_text_to_others_and_come_back_as_they_were(block, words):
    """trap 107"""
    request = parse(messages=[{"role": "user", "content": [block]}])
    assert request.messages[0].blocks[0].text == words
    assert WIRE.render_request(request)["messages"] == [{"role": "user", "content": [block]}]


def test_a_tool_that_is_defined_in_mid_conversation_is_a_tool():
    """The beta of inline tools; a reference to a tool of the request's own defines none."""
    late = {"name": "late", "description": "d", "input_schema": {"type": "object", "properties": {}}}
    added = [{"type": "tool_definition", "definition": late}, {"type": "tool_reference", "name": "early"}]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "system", "content": [{"type": "tool_addition", "tool": tool} for tool in added]},
    ]
    request = parse(messages=turns, tools=[{"name": "early", "input_schema": {"type": "object"}}])
    assert [tool.name for tool in request.tools] == ["early", "late"]
    assert request.tools[1] == R.Tool("late", "d", late["input_schema"])
    again = parse(messages=turns, tools=[late])  # a tool told twice would be refused
    assert [tool.name for tool in again.tools] == ["late"]


def deferred(name):
    return {"name": name, "input_schema": {"type": "object"}, "defer_loading": True}


def loading(name):
    content = [{"type": "tool_reference", "tool_name": name}]
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": content}]}


CALLS_FAR = {"role": "assistant", "content": [{"type": "tool_use", "id": "u", "name": "far", "input": {}}]}


@pytest.mark.parametrize(
    "further, tools, offered",
    [
        ([], [], ["near"]),  # as Claude Code's DeferredToolPlaceholder, which is never to be called
        ([loading("far")], [], ["near", "far"]),
        ([CALLS_FAR], [], ["near", "far"]),  # what loaded it may have left the history
        ([], [{"type": "tool_search_tool_regex_20251119", "name": "search"}], ["near", "far", "search"]),
    ],
)
def test_a_deferred_tool_is_offered_to_others_once_it_was_found(further, tools, offered):
    """Claude Code finds tools itself (ToolSearch); nobody but Anthropic has the search that it runs on its servers."""
    near = {"name": "near", "input_schema": {"type": "object"}}
    request = parse(messages=[{"role": "user", "content": "hi"}, *further], tools=[near, deferred("far"), *tools])
    assert [tool.name for tool in request.tools] == offered


def test_a_tool_that_is_withdrawn_in_mid_conversation_is_none_until_it_is_added_again():
    """BetaRequestToolRemovalBlockParam: no longer offered from this point on."""

    def change(kind, tool):
        return {"role": "system", "content": [{"type": kind, "tool": tool}]}

    early = {"name": "early", "input_schema": {"type": "object"}}
    late = {"name": "late", "input_schema": {"type": "object"}}
    reference = {"type": "tool_reference", "name": "early"}
    turns = [
        {"role": "user", "content": "hi"},
        change("tool_addition", {"type": "tool_definition", "definition": late}),
        change("tool_removal", reference),
    ]
    assert [tool.name for tool in parse(messages=turns, tools=[early]).tools] == ["late"]
    turns.append(change("tool_removal", {"type": "tool_reference", "name": "late"}))
    assert parse(messages=turns, tools=[early]).tools == []
    turns.append(change("tool_addition", reference))
    assert [tool.name for tool in parse(messages=turns, tools=[early]).tools] == ["early"]


def test_a_tool_that_was_found_is_named_in_words():
    """What Claude Code's ToolSearch answers (BetaToolReferenceBlockParam)."""
    body = {"model": "m", "max_tokens": 9, "tools": [deferred("far")], "messages": [CALLS_FAR, loading("far")]}
    body["messages"][1]["content"][0]["tool_use_id"] = "u"
    sent = R.translate_request(body, "anthropic", "openai")[1]["messages"]
    assert sent[-1] == {"role": "tool", "tool_call_id": "u", "content": "tool loaded: far"}
    assert WIRE.render_request(parse(**body))["messages"][-1] == body["messages"][1]


def test_no_tokens_at_all_warm_a_cache_of_anthropic_only():
    """MessageCreateParams.max_tokens: others refuse a limit of 0."""
    body = {"model": "m", "max_tokens": 0, "messages": [{"role": "user", "content": "hi"}]}
    assert R.translate_request(body, "anthropic", "openai")[1]["max_tokens"] == 1
    assert R.translate_request(body, "anthropic", "responses")[1]["max_output_tokens"] == 16


@pytest.mark.parametrize(
    "body, path",
    [
        ({"messages": "x"}, "messages: "),
        ({"messages": None}, "messages: Field required"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0: "),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "x"}]}]},
            "messages.0.content.0.input: ",
        ),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name: "),
        ({"system": 1}, "system: "),
        ({"system": [1]}, "system.0: "),
    ],
)
def test_a_wrong_type_is_a_400_that_names_the_path(body, path):
    with pytest.raises(R.RouterError) as caught:
        parse(**body)
    assert caught.value.status == 400 and caught.value.message.startswith(path)


@pytest.mark.parametrize(
    "thread, details",
    [
        ({"type": "create"}, {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}),
        ({"type": "continue", "previous_message_id": "m"}, {"error_code": "thread_not_found"}),
    ],
)
def test_a_stateful_thread_is_refused_with_the_code_that_makes_the_sdk_send_everything(thread, details):
    with pytest.raises(R.RouterError) as caught:
        parse(thread=thread)
    error = WIRE.render_error(R.ErrorInfo(caught.value.status, caught.value.message, code=caught.value.code), "r")
    assert caught.value.status == 400 and error["error"]["details"] == details


@pytest.mark.parametrize(
    "body, effort, budget, adaptive",
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "", 2000, False),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high", 0, True),
        ({"output_config": {"effort": "low"}}, "low", 0, False),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none", 0, False),
    ],
)
def test_thinking_and_effort_are_one_wish(body, effort, budget, adaptive):
    """traps 88 and 90"""
    request = parse(**body)
    assert request.reasoning[:3] == (effort, budget, adaptive)
    out = WIRE.render_request(request)
    assert {key: out[key] for key in body} == body


@pytest.mark.parametrize("where", ["output_format", "output_config"])
def test_a_schema_for_the_answer_is_read_in_both_spellings(where):
    """trap 99"""
    form = {"type": "json_schema", "schema": {"type": "object"}}
    request = parse(**{where: {"format": form} if where == "output_config" else form})
    assert request.output == R.JsonOutput({"type": "object"})
    assert WIRE.render_request(request)["output_config"] == {"format": form}


def test_a_server_tool_is_kept_for_anthropic_alone():
    """trap 106"""
    tool = {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}
    request = parse(tools=[tool])
    assert request.tools[0].kind == "server" and request.tools[0].schema is None
    assert WIRE.render_request(request)["tools"] == [tool]


# ---- requests: neutral -> Anthropic


def test_leading_system_messages_are_lifted_and_later_ones_belong_to_the_user():
    """traps 73, 74 and 76"""
    body = render([R.Message("system", [R.Text("a")]), user("b"), assistant("c"), R.Message("system", [R.Text("d")])])
    assert body["system"] == "a"
    assert body["messages"] == [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]


@pytest.mark.parametrize(
    "messages", [[], [assistant("a")], [R.Message("system", [R.Text("a")])], [user("")], [user(" \n")]]
)
@pytest.mark.parametrize("model", ["claude-opus-4-6", "claude-sonnet-4-5", "other"])
def test_a_conversation_always_starts_with_the_user_and_has_no_empty_turn(messages, model):
    """trap 82"""
    turns = render(messages, model)["messages"]
    assert turns[0]["role"] == "user"
    assert all(turn["content"] for turn in turns)


def test_a_prefill_stays_where_models_take_one_and_else_gets_a_user_turn():
    assert render([user("a"), assistant("b \n")], "claude-sonnet-4-5")["messages"][-1] == {
        "role": "assistant",
        "content": "b",
    }
    assert render([user("a"), assistant("b")], "claude-opus-4-7")["messages"][-1]["role"] == "user"


def test_tool_results_come_first_in_their_turn():
    """trap 77"""
    body = render([user("a"), assistant(R.ToolCall("t", "f", "{}")), user("b", R.ToolResult("t", [R.Text("r")]))])
    assert body["messages"][-1]["content"] == [
        {"type": "tool_result", "tool_use_id": "t", "content": "r"},
        {"type": "text", "text": "b"},
    ]


def test_text_comes_before_the_calls_of_its_turn():
    """trap 80"""
    body = render([user("a"), assistant(R.ToolCall("t", "f"), "b"), user(R.ToolResult("t", []))])
    assert [part["type"] for part in body["messages"][1]["content"]] == ["text", "tool_use"]


def test_a_result_without_a_call_becomes_text():
    """trap 78"""
    content = render([user(R.ToolResult("gone", [R.Text("r")]))])["messages"][0]["content"]
    assert [part["text"] for part in content] == ["[result of tool call gone]", "r"]


@pytest.mark.parametrize("after", [[], [user("b")], [assistant("b")]])
def test_a_call_without_a_result_gets_one(after):
    """trap 79"""
    turns = render([user("a"), assistant(R.ToolCall("t", "f", "{}")), *after], "other")["messages"]
    position = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    result = turns[position + 1]["content"][0]
    assert result == {"type": "tool_result", "tool_use_id": "t", "content": "(no result)", "is_error": True}


def test_a_second_result_for_one_call_is_dropped():
    """trap 81"""
    results = [R.ToolResult("t", [R.Text("1")]), R.ToolResult("t", [R.Text("2")])]
    body = render([user("a"), assistant(R.ToolCall("t", "f")), user(*results)])
    assert body["messages"][-1]["content"] == [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]


def test_one_id_for_two_calls_becomes_two_ids_with_their_own_results():
    """trap 38"""
    calls = [R.ToolCall("t:1", "f"), R.ToolCall("t:1", "f")]
    results = [R.ToolResult("t:1", [R.Text("1")]), R.ToolResult("t:1", [R.Text("2")])]
    turns = render([user("a"), assistant(*calls), user(*results)])["messages"]
    ids = [part["id"] for part in turns[1]["content"]]
    assert len(set(ids)) == 2 and ids[0] == "t_1"
    assert [(part["tool_use_id"], part["content"]) for part in turns[2]["content"]] == list(zip(ids, "12"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("  ", {}),
        ("null", {}),
        ('{"a":1}', {"a": 1}),
        ('"{\\"a\\":1}"', {"a": 1}),
        ("[1]", {"_raw": "[1]"}),
        ('{"a":', {"_raw": '{"a":'}),
        ("NaN", {"_raw": "NaN"}),
        ("[" * 100000, {"_raw": "[" * 100000}),
    ],
)
def test_tool_arguments_are_always_an_object(text, expected):
    """traps 41 and 42"""
    assert R.arguments_object(text) == expected


def test_only_signed_reasoning_goes_back():
    """trap 85"""
    own = R.Thinking("x", {"anthropic": {"signature": "s"}})
    body = render(
        [user("a"), assistant(R.Thinking("foreign"), R.Thinking("y", {"anthropic": {"signature": ""}}), own, "b")]
    )
    assert body["messages"][1]["content"][0] == {"type": "thinking", "thinking": "x", "signature": "s"}
    assert len(body["messages"][1]["content"]) == 2


SIGNED = {"type": "thinking", "thinking": "own", "signature": "s"}
UNSIGNED = {"type": "thinking", "thinking": "foreign", "signature": ""}
CALL = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


def history(*parts):
    return {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": list(parts)}]}


def test_unsigned_reasoning_is_taken_out_of_a_body_that_is_passed_through():
    """trap 85"""
    body = history(UNSIGNED, {"type": "thinking", "thinking": "no field"}, SIGNED, CALL)
    before = json.dumps(body)
    assert R.drop_thinking(body) == history(SIGNED, CALL) and json.dumps(body) == before
    assert R.drop_thinking(history(UNSIGNED))["messages"] == history()["messages"][:1]


@pytest.mark.parametrize(
    "body",
    [
        history(SIGNED, CALL),
        history(),
        {},
        {"messages": "x"},
        {"messages": [5, {"content": "a"}, {"content": [None, 1]}]},
    ],
)
def test_a_body_without_unsigned_reasoning_stays_as_it_is(body):
    assert R.drop_thinking(body) is None


@pytest.mark.parametrize("kind, stays", [("enabled", False), ("adaptive", True)])
def test_a_budget_goes_with_the_reasoning_that_its_tool_turn_would_need(kind, stays):
    """trap 86"""
    fields = {"thinking": {"type": kind}, "context_management": {"edits": []}}
    dropped = R.drop_thinking({**history(UNSIGNED, CALL), **fields})
    assert [name in dropped for name in fields] == [stays, stays]
    assert "thinking" in R.drop_thinking({**history(UNSIGNED, SIGNED, CALL), **fields})


@pytest.mark.parametrize(
    "media, expected",
    [
        (R.Media("image", url="https://x"), {"type": "image", "source": {"type": "url", "url": "https://x"}}),
        (
            R.Media("image", "image/png", "QQ=="),
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
        ),
        *[
            (
                R.Media("image", said, data),
                {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}},
            )
            for said, media_type, data in [
                ("image/jpg", "image/jpeg", "/9j/4AAQ"),
                ("image/jpeg", "image/png", "iVBORw0KGgo="),
                ("", "image/gif", "R0lGODlh"),
                ("application/octet-stream", "image/webp", "UklGRg=="),
            ]
        ],
        (
            R.Media("document", "application/pdf", "QQ==", name="a.pdf"),
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "QQ=="},
                "title": "a.pdf",
            },
        ),
        (
            R.Media("document", "text/markdown", "QQ=="),
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A"}},
        ),
        (
            R.Media("audio", "audio/wav", "QQ=="),
            {"type": "text", "text": "[audio left out: audio/wav]"},
        ),
        (
            R.Media("document", "text/plain", "!"),
            {"type": "text", "text": "[document left out: text/plain]"},
        ),
    ],
)
def test_media_go_as_the_api_takes_them_also_in_tool_results(media, expected):
    """traps 102, 103 and 105"""
    body = render([user("a", media), assistant(R.ToolCall("t", "f")), user(R.ToolResult("t", [media, R.Text("z")]))])
    assert body["messages"][0]["content"][1] == expected
    assert body["messages"][2]["content"][0]["content"][0] == expected


@pytest.mark.parametrize(
    "choice, parallel, expected",
    [
        (None, None, None),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
        (R.ToolChoice("any"), None, {"type": "any"}),
        (R.ToolChoice("none"), False, {"type": "none"}),
        (R.ToolChoice("tool", "f"), False, {"type": "tool", "name": "f", "disable_parallel_tool_use": True}),
        (R.ToolChoice("tool", "gone"), None, None),
    ],
)
def test_tool_choice_keeps_its_meaning(choice, parallel, expected):
    """traps 96 and 97"""
    body = render(tools=[R.Tool("f")], tool_choice=choice, parallel_tools=parallel)
    assert body.get("tool_choice") == expected
    assert "tool_choice" not in render(tool_choice=choice, parallel_tools=parallel)


def test_a_tool_without_parameters_gets_an_object_schema():
    """traps 94 and 98"""
    tool = render(tools=[R.Tool("f", strict=True)])["tools"][0]
    assert tool == {"name": "f", "input_schema": {"type": "object", "properties": {}}, "strict": True}


def test_a_custom_tool_becomes_a_function_of_one_string():
    """trap 60"""
    body = render(
        [user("a"), assistant(R.ToolCall("t", "patch", "free text", "custom"))], tools=[R.Tool("patch", kind="custom")]
    )
    assert body["tools"][0]["input_schema"]["required"] == ["input"]
    assert body["messages"][1]["content"][0]["input"] == {"input": "free text"}


def test_tools_of_other_providers_are_left_out():
    assert "tools" not in render(tools=[R.Tool("search", kind="server", extra={"responses": {"type": "web_search"}})])


@pytest.mark.parametrize(
    "model, reasoning, max_tokens, thinking, effort",
    [
        ("claude-sonnet-4-5", R.Reasoning("high"), None, {"type": "enabled", "budget_tokens": 16384}, None),
        ("claude-sonnet-4-5", R.Reasoning("high"), 4000, {"type": "enabled", "budget_tokens": 3000}, None),
        ("claude-sonnet-4-5", R.Reasoning(budget=10), 4000, {"type": "enabled", "budget_tokens": 1024}, None),
        ("claude-sonnet-4-5", R.Reasoning("high"), 1000, None, None),
        ("claude-sonnet-4-5", R.Reasoning("none"), 1000, {"type": "disabled"}, None),
        ("claude-opus-4-6", R.Reasoning("xhigh"), None, {"type": "adaptive", "display": "summarized"}, "high"),
        ("claude-opus-4-8", R.Reasoning("xhigh"), 10, {"type": "adaptive", "display": "summarized"}, "xhigh"),
        ("claude-opus-4-8", R.Reasoning("minimal"), None, {"type": "adaptive", "display": "summarized"}, "low"),
        ("claude-opus-4-8", R.Reasoning("none"), None, {"type": "disabled"}, None),
        ("claude-3-5-haiku-latest", R.Reasoning("high"), None, None, None),
        ("some-model", R.Reasoning("low"), None, {"type": "enabled", "budget_tokens": 2048}, None),
    ],
)
def test_effort_and_budget_fit_the_model_and_max_tokens(model, reasoning, max_tokens, thinking, effort):
    """traps 89 and 90"""
    body = render(model=model, reasoning=reasoning, max_tokens=max_tokens)
    assert body.get("thinking") == thinking
    assert body.get("output_config", {}).get("effort") == effort
    assert not thinking or thinking.get("budget_tokens", 0) < body["max_tokens"]
    assert max_tokens is None or body["max_tokens"] == max_tokens


def test_a_forced_tool_switches_thinking_off():
    body = render(reasoning=R.Reasoning("high"), tools=[R.Tool("f")], tool_choice=R.ToolChoice("any"))
    assert "thinking" not in body and body["output_config"] == {"effort": "high"}


def test_budgeted_thinking_is_off_in_a_tool_turn_that_has_none():
    """trap 86"""
    messages = [user("a"), assistant(R.ToolCall("t", "f")), user(R.ToolResult("t", []))]
    assert "thinking" not in render(messages, "claude-sonnet-4-5", reasoning=R.Reasoning("high"))
    assert "thinking" in render(messages, "claude-opus-4-6", reasoning=R.Reasoning("high"))


@pytest.mark.parametrize(
    "model, fields, expected",
    [
        ("claude-sonnet-4-5", {"temperature": 1.7, "top_p": 0.5, "top_k": 4}, {"temperature": 1.0, "top_k": 4}),
        ("claude-sonnet-4-5", {"top_p": 0.5}, {"top_p": 0.5}),
        ("claude-opus-4-7", {"temperature": 0.5, "top_p": 0.5, "top_k": 4}, {}),
        ("claude-sonnet-4-5", {"temperature": 0.5, "reasoning": R.Reasoning("high")}, {}),
    ],
)
def test_sampling_fields_go_only_where_they_are_taken(model, fields, expected):
    """trap 72"""
    body = render(model=model, **fields)
    assert {key: body[key] for key in ("temperature", "top_p", "top_k") if key in body} == expected


def test_max_tokens_is_always_said_and_a_client_s_own_is_kept():
    assert render(model="x")["max_tokens"] == 8192
    assert render(model="claude-sonnet-5")["max_tokens"] == 32000
    assert render(model="x", max_tokens=5)["max_tokens"] == 5


def test_the_small_fields_have_their_places():
    """traps 99, 100 and 101"""
    body = render(
        stop=["END", "\n"], user="u", stream=True, fields={"anthropic": {"inference_geo": "eu"}, "openai": {"n": 2}}
    )
    assert body["stop_sequences"] == ["END"] and body["metadata"] == {"user_id": "u"} and body["stream"] is True
    assert body["inference_geo"] == "eu" and "n" not in body
    assert "JSON" in render(output=R.JsonOutput())["system"]


def test_a_bare_budget_becomes_an_effort_where_only_efforts_are_known():
    """trap 90"""
    assert render(model="claude-opus-4-8", reasoning=R.Reasoning(budget=9000))["output_config"] == {"effort": "high"}
    assert render(model="claude-opus-4-8", reasoning=R.Reasoning("low", 9000))["output_config"] == {"effort": "low"}


def test_a_turn_that_nothing_is_left_of_joins_its_neighbours():
    turns = render([user("a"), assistant("b"), user(R.Opaque("openai", {})), assistant("c"), user("d")])["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert [part["text"] for part in turns[1]["content"]] == ["b", "c"]


def test_what_output_config_holds_besides_is_passed_on():
    request = parse(output_config={"effort": "low", "further": 1})
    assert request.fields == {"anthropic": {"output_config": {"further": 1}}}
    assert WIRE.render_request(request)["output_config"] == {"effort": "low", "further": 1}


@pytest.mark.parametrize(
    "model, sampling, prefill, max_tokens",
    [
        ("claude-3-opus-20240229", True, True, 4096),
        ("claude-3-5-haiku-latest", True, True, 8192),
        ("anthropic/claude-sonnet-4.5", True, True, 32000),
        ("claude-opus-4-20250514", True, True, 32000),
        ("claude-sonnet-4-6", True, False, 32000),
        ("claude-sonnet-5", False, False, 32000),
        ("kimi-k2", True, True, 8192),
    ],
)
def test_the_row_of_a_model_says_what_it_takes(model, sampling, prefill, max_tokens):
    body = render([user("a"), assistant("b")], model, temperature=0.5)
    assert ("temperature" in body, body["messages"][-1]["role"] == "assistant") == (sampling, prefill)
    assert body["max_tokens"] == max_tokens


# ---- answers


def test_a_whole_answer_comes_back_as_it_was():
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "asked-for",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "see", "citations": [{"type": "char_location"}]},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1, None]}, "caller": {"type": "direct"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "stop_details": {"type": "refusal"},
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 1,
            "cache_read_input_tokens": 2,
            "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 4},
            "service_tier": "standard",
        },
    }
    response = WIRE.parse_response(body, CONTEXT)
    assert response.usage == R.Usage(3, 9, 2, 1, 4)
    assert WIRE.render_response(response, CONTEXT) == body


def test_an_answer_of_another_format_is_a_proper_message():
    """traps 42, 43, 44, 46 and 48"""
    blocks = [
        R.Thinking("hm"),
        R.Thinking(""),
        R.Text(""),
        R.Refusal("no"),
        R.Opaque("openai", {}),
        R.ToolCall("c", "f", "oops"),
    ]
    message = WIRE.render_response(R.ChatResponse("chatcmpl-1", "gpt", blocks, "end_turn"), CONTEXT)
    assert message["id"] == "msg_req1" and message["model"] == "asked-for"
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "no"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"_raw": "oops"}},
    ]
    assert message["stop_reason"] == "tool_use" and message["stop_sequence"] is None
    assert all(isinstance(count, int) for count in message["usage"].values())


@pytest.mark.parametrize("body", [{}, {"content": "x"}, {"type": "error", "error": {"message": "m"}}])
def test_what_is_no_message_is_refused(body):
    with pytest.raises(R.RouterError) as caught:
        WIRE.parse_response(body, CONTEXT)
    assert caught.value.status == 502


# ---- streams: Anthropic -> neutral


def test_a_stream_is_parsed_block_by_block():
    parser, events = feed(
        start(input_tokens=7, cache_read_input_tokens=2, output_tokens=1),
        {"type": "ping"},
        opened(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="hm"),
        delta(0, "signature_delta", signature="sig"),
        closed(0),
        opened(1, type="text", text=""),
        delta(1, "text_delta", text="a"),
        delta(1, "citations_delta", citation={"x": 1}),
        delta(1, "text_delta", text="b"),
        closed(1),
        opened(2, type="tool_use", id="t", name="f", input={}),
        delta(2, "input_json_delta", partial_json=""),
        delta(2, "input_json_delta", partial_json='{"a"'),
        delta(2, "input_json_delta", partial_json=":1}"),
        closed(2),
        end("tool_use", output_tokens=20),
        STOP,
    )
    assert events[:3] == [
        R.Started("msg_1", "m", R.Usage(7, 1, 2), 1700000000),
        R.Ping(),
        R.Opened(R.Thinking("", {"anthropic": {"signature": ""}})),
    ]
    answer = R.fold(events)
    assert answer.blocks == [
        R.Thinking("hm", {"anthropic": {"signature": "sig"}}),
        R.Text("ab", {"anthropic": {"citations": [{"x": 1}]}}),
        R.ToolCall("t", "f", '{"a":1}'),
    ]
    assert answer.stop_reason == "tool_use" and parser.done and parser.skipped == 0
    assert answer.usage == parser.usage == R.Usage(7, 20, 2)


def test_usage_is_merged_by_field_and_a_late_zero_hides_nothing():
    """trap 114"""
    parser, _ = feed(start(input_tokens=7, cache_creation_input_tokens=3), end(input_tokens=0, output_tokens=9), STOP)
    assert parser.usage == R.Usage(7, 9, 0, 3)
    parser, _ = feed(start(input_tokens=0, output_tokens=0), end(input_tokens=7, output_tokens=9), STOP)
    assert parser.usage == R.Usage(7, 9)


def test_a_tool_without_arguments_has_an_empty_object():
    """trap 41"""
    _, events = feed(start(), opened(0, type="tool_use", id="t", name="f", input={}), closed(0), STOP)
    assert R.fold(events).blocks == [R.ToolCall("t", "f", "{}")]


def test_arguments_that_came_whole_in_the_start_event_are_kept():
    _, events = feed(start(), opened(0, type="tool_use", id="t", name="f", input={"a": 1}), closed(0), STOP)
    assert R.fold(events).blocks == [R.ToolCall("t", "f", '{"a":1}')]


def test_a_block_of_unknown_type_arrives_whole():
    _, events = feed(
        start(),
        opened(0, type="server_tool_use", id="s", name="web_search", input={}),
        delta(0, "input_json_delta", partial_json='{"query":'),
        delta(0, "input_json_delta", partial_json='"q"}'),
        closed(0),
        opened(1, type="compaction", content=None),
        delta(1, "compaction_delta", content="sum"),
        closed(1),
        STOP,
    )
    assert R.fold(events).blocks == [
        R.Opaque("anthropic", {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}}),
        R.Opaque("anthropic", {"type": "compaction", "content": "sum"}),
    ]


def test_blocks_in_the_first_event_of_a_stream_are_part_of_the_answer():
    """A program that the model wrote went on: what it did, and which tool it calls, comes in message_start."""
    first = start(input_tokens=3, output_tokens=0)
    done = {"type": "code_execution_tool_result", "tool_use_id": "s", "content": {"stdout": "4"}}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    first["message"].update(content=[done, call], stop_reason="tool_use")
    more = opened(2, type="text", text=""), delta(2, "text_delta", text="so"), closed(2)
    for rest, said in (((), []), (more, [R.Text("so")])):
        _, events = feed(first, *rest, STOP)
        answer = R.fold(events)
        assert answer.blocks == [R.Opaque("anthropic", done), R.ToolCall("t", "f", '{"a":1}'), *said]
        assert answer.stop_reason == "tool_use"


def test_what_only_anthropic_says_of_an_answer_outlives_a_whole_answer_s_way_into_a_stream():
    """BetaMessage, and BetaRawMessageDeltaEvent, which has two of its fields beside `delta`."""
    beside = {"context_management": {"applied_edits": []}, "input_transformations": [{"type": "thinking_dropped"}]}
    told = {"container": {"id": "c"}, "stop_details": {"type": "refusal", "category": "cyber"}, "stop_reason": "refusal"}
    message = {**start()["message"], "model": "asked-for", "stop_sequence": None, **beside, **told}
    answer = WIRE.parse_response(message, CONTEXT)
    assert WIRE.render_response(answer, CONTEXT).items() >= {**beside, **told}.items()
    stream = R.render_stream("anthropic", answer, CONTEXT)
    delta = json.loads(R.parse_events(stream)[-2].data)
    assert delta.items() >= beside.items() and delta["delta"].items() >= told.items()
    assert R.fold_stream("anthropic", stream, CONTEXT) == answer


@pytest.mark.parametrize("last", [None, end("end_turn")])
def test_a_stream_without_message_stop_is_truncated(last):
    """trap 14"""
    parser, events = feed(
        *[
            event
            for event in (start(), opened(0, type="text", text=""), delta(0, "text_delta", text="a"), last)
            if event
        ]
    )
    assert events[-2:] == [R.Delta("a"), R.Failed(events[-1].error)]
    assert events[-1].error.code == "truncated" and events[-1].error.status == 502 and not parser.done


@pytest.mark.parametrize(
    "event, status",
    [
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, 529),
        ({"type": "error", "error": {"type": "rate_limit_error", "message": "m"}}, 429),
        ({"error": {"message": "m"}}, 500),
    ],
)
def test_an_error_event_fails_the_stream_and_nothing_follows(event, status):
    """traps 19 and 55"""
    parser, events = feed(start(), opened(0, type="text", text=""), event, delta(0, "text_delta", text="x"), STOP)
    assert [type(item) for item in events] == [R.Started, R.Opened, R.Failed]
    assert (events[-1].error.status, events[-1].error.message) == (status, "m") and not parser.done


def test_an_error_as_first_event_is_all_there_is():
    """trap 130"""
    _, events = feed({"type": "error", "error": {"type": "overloaded_error", "message": "m"}})
    assert [type(item) for item in events] == [R.Failed]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "5",
        "[]",
        "null",
        '{"type": [1]}',
        '{"type":"content_block_delta"}',
        '{"type":"content_block_start","content_block":5}',
        '{"type":"content_block_delta","index":0,"delta":{"type":{}}}',
        '{"a":NaN}',
    ],
)
def test_a_malformed_event_is_skipped_and_the_rest_goes_on(bad):
    """trap 13"""
    parser, events = feed(
        start(), opened(0, type="text", text=""), bad, delta(0, "text_delta", text="a"), closed(0), end(), STOP
    )
    assert R.fold(events).blocks == [R.Text("a")] and parser.skipped == 1


def test_a_delta_of_another_type_opens_its_own_block():
    """trap 29"""
    _, events = feed(
        start(),
        opened(0, type="text", text=""),
        delta(0, "text_delta", text="a"),
        delta(0, "thinking_delta", thinking="b"),
        closed(0),
        STOP,
    )
    assert R.fold(events).blocks == [R.Text("a"), R.Thinking("b")]


def test_blocks_left_open_and_starts_left_out_are_closed_and_made_up():
    """traps 22, 23 and 24"""
    _, events = feed(
        delta(0, "text_delta", text="a"),
        opened(1, type="text", text=""),
        delta(1, "text_delta", text="b"),
        closed(1),
        closed(1),
        STOP,
        STOP,
    )
    assert isinstance(events[0], R.Started) and events[0].id == "msg_req1"
    assert R.fold(events).blocks == [R.Text("a"), R.Text("b")]
    assert (
        sum(isinstance(event, R.Closed) for event in events)
        == sum(isinstance(event, R.Opened) for event in events)
        == 2
    )


def test_a_stop_for_another_block_closes_nothing():
    _, events = feed(
        start(), opened(0, type="text", text=""), closed(5), delta(0, "text_delta", text="a"), closed(0), STOP
    )
    assert [type(event) for event in events[1:4]] == [R.Opened, R.Delta, R.Closed]


@pytest.mark.parametrize("ends", [True, False], ids=["each ends", "none ends"])
def test_calls_that_overlap_keep_their_own_arguments(ends):
    """Trap 33: routers that turn parallel calls into this format mix their events, and the SDKs go by the index."""
    calls = [opened(index, type="tool_use", id=name, name=name, input={}) for index, name in enumerate("abc")]
    pieces = [delta(index, "input_json_delta", partial_json=text) for text in ('{"x":', "%d}") for index in range(3)]
    for index, piece in enumerate(pieces[3:]):
        piece["delta"]["partial_json"] %= index
    stops = [closed(index) for index in range(3)] if ends else []
    after = [opened(3, type="text", text=""), delta(3, "text_delta", text="so"), closed(3)]
    _, events = feed(start(), *calls, *pieces, *stops, *after, end("tool_use"), STOP)
    blocks = R.fold(events).blocks
    assert [(block.id, block.arguments) for block in blocks[:3]] == [(name, '{"x":%d}' % n) for n, name in enumerate("abc")]
    assert blocks[3:] == [R.Text("so")]
    kinds = [type(event) for event in events if type(event) in (R.Opened, R.Closed)]
    assert kinds == [R.Opened, R.Closed] * 4


@pytest.mark.parametrize(
    "word, reason", [("length", "max_tokens"), ("content_filter", "refusal"), ("stop", "end_turn"), (["odd"], "end_turn")]
)
def test_a_stop_reason_in_the_words_of_chat_completions_means_the_same(word, reason):
    _, events = feed(start(), opened(0, type="text", text=""), delta(0, "text_delta", text="a"), closed(0), end(word), STOP)
    assert R.fold(events).stop_reason == reason


def test_a_stop_reason_only_this_api_has_comes_back_to_its_clients():
    _, events = feed(start(), end("compaction"), STOP)
    answer = R.fold(events)
    assert answer.stop_reason == "end_turn"
    assert emit(*events)[-2][1]["delta"]["stop_reason"] == "compaction"
    assert WIRE.render_response(answer, CONTEXT)["stop_reason"] == "compaction"
    _, events = feed(start(), end(None), STOP)
    assert R.fold(events).stop_reason == "end_turn" and R.fold(events).extra is None


# ---- streams: neutral -> Anthropic


def test_a_stream_that_begins_with_a_tool_call_has_its_message_start():
    """trap 20"""
    pairs = emit(R.Opened(R.ToolCall("t", "f")), R.Delta("{}"), R.Closed(), R.Finished("tool_use", usage=R.Usage(1, 2)))
    assert_life_cycle(pairs)
    assert pairs[0][1]["message"]["usage"]["input_tokens"] == 0


def test_there_is_one_message_start():
    """trap 21"""
    assert [name for name, _ in emit(R.Started("a", "m"), R.Started("a", "m"), R.Finished())].count(
        "message_start"
    ) == 1


def test_a_block_is_stopped_once():
    """trap 22"""
    events = block_events(R.Opened(R.ToolCall("t", "f")), R.Delta("{}"), R.Closed(), R.Closed())
    assert [event["type"] for event in events].count("content_block_stop") == 1


def test_indices_are_contiguous_whatever_is_left_out():
    """trap 23"""
    pairs = emit(
        R.Started("msg_1", "m"),
        R.Opened(R.Text("")),
        R.Closed(),
        R.Opened(R.Opaque("openai", {"x": 1})),
        R.Closed(),
        R.Opened(R.Thinking("")),
        R.Delta("hm"),
        R.Closed(),
        R.Opened(R.Text("")),
        R.Delta("a"),
        R.Closed(),
        R.Finished(),
    )
    assert_life_cycle(pairs)
    assert [data["content_block"]["type"] for name, data in pairs if name == "content_block_start"] == [
        "thinking",
        "text",
    ]


def test_what_was_left_open_is_closed_at_the_end():
    """trap 24"""
    assert_life_cycle(emit(R.Started("a", "m"), R.Opened(R.Text("")), R.Delta("a"), R.Finished()))


def test_an_empty_text_block_is_never_shown():
    """trap 32"""
    events = block_events(R.Opened(R.Text("")), R.Closed(), R.Opened(R.ToolCall("t", "f")), R.Closed())
    assert [event["type"] for event in events] == ["content_block_start", "content_block_stop"]
    assert events[0]["content_block"]["type"] == "tool_use"


def test_text_starts_empty_and_every_piece_is_a_delta():
    """trap 28"""
    events = block_events(R.Opened(R.Text("")), R.Delta("a"), R.Delta('b"\n\u2028\ud800'), R.Closed())
    assert events[0]["content_block"] == {"type": "text", "text": ""}
    assert [event["delta"] for event in events[1:3]] == [
        {"type": "text_delta", "text": "a"},
        {"type": "text_delta", "text": 'b"\n\u2028\ud800'},
    ]


def test_foreign_reasoning_is_a_thinking_block_without_signature():
    """traps 27 and 29"""
    events = block_events(
        R.Opened(R.Thinking("")), R.Delta("a"), R.Closed(), R.Opened(R.Text("")), R.Delta("b"), R.Closed()
    )
    assert events[0]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[1]["delta"] == {"type": "thinking_delta", "thinking": "a"}
    assert [event["index"] for event in events] == [0, 0, 0, 1, 1, 1]


def test_a_signature_is_kept_even_without_text():
    for events in (
        [R.Opened(R.Thinking("", {"anthropic": {"signature": "s"}})), R.Closed()],
        [R.Opened(R.Thinking("")), R.Extended("anthropic", {"signature": "s"}), R.Closed()],
    ):
        shown = block_events(*events)
        assert [event["type"] for event in shown] == [
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
        ]
        assert shown[1]["delta"] == {"type": "signature_delta", "signature": "s"}


@pytest.mark.parametrize(
    "pieces, expected",
    [
        ([], ""),
        (['{"a"', ":1}"], '{"a":1}'),
        ([" {", "}"], " {}"),
        ([" ", "{}"], "{}"),
        (["null"], "{}"),
        (["not", " json"], '{"_raw":"not json"}'),
        (['"{\\"a\\"', ':1}"'], '{"a":1}'),
    ],
)
def test_streamed_arguments_begin_like_an_object_or_are_held_and_repaired(pieces, expected):
    """traps 41 and 42"""
    events = block_events(R.Opened(R.ToolCall("t", "f")), *map(R.Delta, pieces), R.Closed())
    assert events[0]["content_block"] == {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    assert "".join(event["delta"]["partial_json"] for event in events[1:-1]) == expected
    assert events[-1]["type"] == "content_block_stop"


def test_ids_of_calls_are_there_and_unique():
    """traps 36 and 38"""
    events = block_events(
        R.Opened(R.ToolCall("", "f")),
        R.Closed(),
        R.Opened(R.ToolCall("t", "f")),
        R.Closed(),
        R.Opened(R.ToolCall("t", "f")),
        R.Closed(),
    )
    ids = [event["content_block"]["id"] for event in events if "content_block" in event]
    assert len(set(ids)) == 3 and all(ids) and ids[1] == "t"


@pytest.mark.parametrize(
    "reason, has_tool, shown",
    [
        ("end_turn", True, "tool_use"),
        ("tool_use", False, "end_turn"),
        ("tool_use", True, "tool_use"),
        ("max_tokens", True, "max_tokens"),
        ("refusal", False, "refusal"),
    ],
)
def test_the_stop_reason_agrees_with_what_was_sent(reason, has_tool, shown):
    """traps 30, 31 and 47"""
    tool = [R.Opened(R.ToolCall("t", "f")), R.Closed()] if has_tool else []
    assert emit(*tool, R.Finished(reason))[-2][1]["delta"]["stop_reason"] == shown
    blocks = [R.ToolCall("t", "f")] if has_tool else []
    assert WIRE.render_response(R.ChatResponse("i", "m", blocks, reason), CONTEXT)["stop_reason"] == shown


def test_late_usage_is_complete_in_message_delta():
    """traps 43 and 47"""
    pairs = emit(R.Started("a", "m"), R.Finished("stop_sequence", "END", R.Usage(5, 6, 7, 8, 2)))
    assert all(type(count) is int for count in pairs[0][1]["message"]["usage"].values())
    assert pairs[-2][1] == {
        "type": "message_delta",
        "delta": {"stop_reason": "stop_sequence", "stop_sequence": "END"},
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 8,
            "cache_read_input_tokens": 7,
            "output_tokens": 6,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


def test_the_answer_bears_the_name_that_was_asked_for_and_an_own_id():
    """trap 44"""
    message = emit(R.Started("chatcmpl-1", "gpt"))[0][1]["message"]
    assert (message["id"], message["model"]) == ("msg_req1", "asked-for")
    assert emit(R.Started("msg_9", "m"))[0][1]["message"]["id"] == "msg_9"


def test_pings_come_only_between_start_and_end():
    """trap 45"""
    names = [name for name, _ in emit(R.Ping(), R.Started("a", "m"), R.Ping(), R.Finished(), R.Ping())]
    assert names == ["message_start", "ping", "message_delta", "message_stop"]


def test_nothing_follows_the_end():
    """traps 10 and 50"""
    after = [R.Finished(), R.Opened(R.Text("")), R.Delta("x"), R.Closed(), R.Failed(R.ErrorInfo(500, "m"))]
    assert_life_cycle(emit(R.Started("a", "m"), R.Finished(), *after))


def test_a_failure_closes_the_block_and_has_no_message_stop():
    """trap 14"""
    pairs = emit(
        R.Started("a", "m"),
        R.Opened(R.Text("")),
        R.Delta("a"),
        R.Closed(),
        R.Failed(R.ErrorInfo(503, "busy")),
        R.Finished(),
    )
    assert [name for name, _ in pairs][-2:] == ["content_block_stop", "error"]
    assert pairs[-1][1] == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
        "request_id": "req1",
    }


# ---- errors


@pytest.mark.parametrize("status", range(400, 600))
def test_every_status_has_an_error_type_of_the_api(status):
    """traps 121 and 122"""
    kind = WIRE.render_error(R.ErrorInfo(status, "m", "None"), "r")["error"]["type"]
    known = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error"}
    known.update({413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error"})
    known.update({504: "timeout_error", 408: "timeout_error"})
    assert kind == known.get(status, "invalid_request_error" if status < 500 else "api_error")


def test_the_status_says_more_than_openais_word_for_every_refusal():
    """OpenAI types all its 4xx `invalid_request_error`; anthropic.types.shared has a type for most of them."""
    assert WIRE.render_error(R.ErrorInfo(413, "m", "invalid_request_error"), "r")["error"]["type"] == "request_too_large"
    assert WIRE.render_error(R.ErrorInfo(200, "m", "overloaded_error"), "r")["error"]["type"] == "overloaded_error"


def test_an_overflow_says_the_words_on_which_claude_code_compacts():
    """trap 156"""
    info = R.ErrorInfo(400, "Requested 9 tokens of 8", "BadRequest", "context_length_exceeded")
    words = "prompt is too long: Requested 9 tokens of 8"
    assert WIRE.render_error(info, "r")["error"] == {"type": "invalid_request_error", "message": words}
    own = info._replace(message="Prompt is too long: 9 tokens > 8 maximum")
    assert WIRE.render_error(own, "r")["error"]["message"] == own.message


@pytest.mark.parametrize(
    "body, expected",
    [
        (
            {"type": "error", "error": {"type": "not_found_error", "message": "m"}},
            R.ErrorInfo(404, "m", "not_found_error"),
        ),
        ({"error": "m"}, R.ErrorInfo(404, "m")),
        ({"detail": "m"}, R.ErrorInfo(404, "m")),
        ({"error": {"message": "m", "code": 7}}, R.ErrorInfo(404, "m", code="7")),
        ({"error": {"message": "m", "details": {"error_code": "c"}}}, R.ErrorInfo(404, "m", code="c")),
        ("plain", R.ErrorInfo(404, "plain")),
        ([], R.ErrorInfo(404, "the upstream answered with status 404")),
        (None, R.ErrorInfo(404, "the upstream answered with status 404")),
    ],
)
def test_errors_are_read_in_every_shape(body, expected):
    assert R.read_error(404, body) == expected


def test_an_error_type_of_the_api_is_kept_whatever_the_status():
    kind = WIRE.render_error(R.ErrorInfo(400, "m", "billing_error"), "r")["error"]["type"]
    assert kind == "billing_error"


# ---- everything at once


def test_the_watch_pattern_sees_usage_errors_and_the_end_but_not_text():
    event = b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\"usage\\" error message_stop"}}\n\n'
    assert not WIRE.watch.search(event)
    for seen in (start(), end(), STOP, {"type": "error", "error": {}}):
        assert WIRE.watch.search(json.dumps(seen).encode())


def recordings(stream):
    if not CORPUS.is_dir():
        return []
    rows = json.loads((CORPUS / "INDEX.json").read_text())
    return [
        pytest.param(CORPUS / row["file"], id=row["name"])
        for row in rows
        if row["api"] == "messages" and row["stream"] is stream and row["status"] == 200 and row["streams_in_body"] <= 1
    ]


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no recordings beside the project")
@pytest.mark.parametrize("path", recordings(True))
def test_a_recorded_stream_survives_the_neutral_form(path):
    parser = WIRE.parser(CONTEXT)
    recorded = SseDecoder().feed(json.loads(path.read_text())["body"].encode())
    events = [event for sse in recorded for event in parser.feed(sse)]
    assert parser.done and not parser.skipped and not parser.finish()
    pairs = emit(*events)
    assert_life_cycle([pair for pair in pairs if pair[0] != "ping"])
    _, again = feed(*[data for _, data in pairs])
    assert R.fold(again) == R.fold(events)._replace(model="asked-for")


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no recordings beside the project")
@pytest.mark.parametrize("path", recordings(False))
def test_a_recorded_answer_survives_the_neutral_form(path):
    body = json.loads(json.loads(path.read_text())["body"])
    shown = WIRE.render_response(WIRE.parse_response(body, CONTEXT), CONTEXT)
    assert [part for part in body["content"] if part.get("text") != ""] == shown["content"]
    counts = {key: count for key, count in body["usage"].items() if isinstance(count, int)}
    assert counts.items() <= shown["usage"].items()


WORDS = (
    "type text thinking tool_use tool_result image source base64 data id name input content role user assistant system messages "
    "tools index delta content_block message usage error model stop_reason input_tokens document url thinking_delta text_delta "
    "input_json_delta content_block_delta content_block_start content_block_stop message_start message_delta message_stop"
).split()


def random_json(dice, depth=0):
    kind = dice.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return dice.choice(WORDS)
    if kind < 6:
        return dice.choice([None, True, 0, -1, 1.5, 10**30, "", "\ud800", "{}"])
    if kind == 6:
        return [random_json(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(WORDS): random_json(dice, depth + 1) for _ in range(dice.randrange(5))}


@pytest.mark.parametrize("seed", range(20))
def test_random_json_raises_nothing_but_router_errors(seed):
    dice = random.Random(seed)
    parser, renderer = WIRE.parser(CONTEXT), WIRE.renderer(CONTEXT)
    for _ in range(200):
        body = {dice.choice(WORDS): random_json(dice) for _ in range(6)}
        body["messages"] = [{"role": dice.choice(["user", "assistant"]), "content": [random_json(dice, 2)]}]
        try:
            R.dump_json(WIRE.render_request(WIRE.parse_request(body)))
        except R.RouterError:
            pass
        try:
            R.dump_json(WIRE.render_response(WIRE.parse_response(body, CONTEXT), CONTEXT))
        except R.RouterError:
            pass
        R.read_error(500, random_json(dice))
        body["type"] = dice.choice(WORDS[-6:])
        for event in parser.feed(R.SseEvent("", json.dumps(body))):
            renderer.render(event)
        if dice.randrange(20) == 0:
            parser, renderer = WIRE.parser(CONTEXT), WIRE.renderer(CONTEXT)


def test_every_loss_is_said_in_words():
    assert WIRE.losses and all(isinstance(key, str) and text for key, text in WIRE.losses.items())


@pytest.mark.parametrize("begun, deltas, text", [("Hello", ["Hello", " you"], "Hello you"), ("Hel", ["lo"], "Hello"), ("Hi", [], "Hi")])
def test_the_text_in_the_start_of_a_block_is_told_once(begun, deltas, text):
    """MiniMax's first delta repeats it; elsewhere it is the first piece."""
    parts = [{"type": "message_start", "message": {"id": "msg_1", "content": []}}]
    parts.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": begun}})
    parts += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": one}} for one in deltas]
    parts += [{"type": "content_block_stop", "index": 0}, {"type": "message_stop"}]
    parser = WIRE.parser(CONTEXT)
    assert R.fold([event for part in parts for event in parser.feed(R.SseEvent("", json.dumps(part)))]).blocks == [R.Text(text)]
