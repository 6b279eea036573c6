"""Every request field, part, tool and item that the SDKs document is translated, refused, or declared as lost.

The SDKs' own type definitions are walked, so a field that a newer SDK brings fails here until somebody decides on it.
"""

import fnmatch
import json
import re
import typing

import pytest

import llm_router as R
from real_clients import sdk

MARK = "marked-value"
FUNCTION = {"name": MARK, "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = {
    "openai": [{"type": "function", "function": FUNCTION}],
    "anthropic": [{"name": MARK, "input_schema": {"type": "object", "properties": {}}}],
    "responses": [dict(FUNCTION, type="function", strict=False)],
}
BARE = {
    "openai": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "anthropic": {"model": "m", "max_tokens": 9000, "messages": [{"role": "user", "content": "hi"}]},
    "responses": {"model": "m", "input": "hi"},
}
PARAMS = {
    "openai": ["openai.types.chat.completion_create_params:CompletionCreateParamsStreaming"],
    "anthropic": [
        "anthropic.types.message_create_params:MessageCreateParamsStreaming",
        "anthropic.types.beta.message_create_params:MessageCreateParamsStreaming",
    ],
    "responses": ["openai.types.responses.response_create_params:ResponseCreateParamsStreaming"],
}
# Parameters of the SDK's method that travel in headers.
HEADERS = {"anthropic": {"betas"}}
# Values that mean something, where one made from the type would not; the default of a field says nothing.
VALUES = {
    "openai": {
        "model": "other",
        "function_call": {"name": MARK},
        "functions": [FUNCTION],
        "messages": [{"role": "user", "content": MARK}],
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "tool_choice": "required",
        "tools": TOOLS["openai"],
        "max_tokens": 77,
        "max_completion_tokens": 77,
        "reasoning_effort": "low",
    },
    "anthropic": {
        "model": "other",
        "max_tokens": 77,
        "messages": [{"role": "user", "content": MARK}],
        "metadata": {"user_id": MARK},
        "output_config": {"effort": "low"},
        "service_tier": "standard_only",
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "tool_choice": {"type": "any"},
        "tools": TOOLS["anthropic"],
        "thread": {"type": "create"},
    },
    "responses": {
        "model": "other",
        "input": MARK,
        "max_output_tokens": 77,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "tool_choice": "required",
        "tools": TOOLS["responses"],
    },
}
NEED_TOOLS = ("tool_choice", "function_call", "parallel_tool_calls")
PAIRS = [(source, target) for source in BARE for target in BARE if source != target]


def is_typeddict(kind):
    return hasattr(kind, "__required_keys__")


def is_required(hint):
    return "Required" in str(typing.get_origin(hint)) and "NotRequired" not in str(typing.get_origin(hint))


def load(path):
    module, name = path.split(":")
    sdk(module.split(".")[0])
    return getattr(__import__(module, fromlist=[name]), name)


def members(kind):
    """The alternatives of a union, lists and annotations looked through; a type that is none is its own."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired) or str(origin).endswith(
        ("Required", "NotRequired")
    ):
        return members(arguments[0])
    if origin is typing.Union or str(type(kind)) == "<class 'types.UnionType'>":
        return [found for argument in arguments if argument is not type(None) for found in members(argument)]
    return [kind]


def sample(kind, full=False, depth=0):
    """A value of a type: required fields only (all with `full`), MARK for every string."""
    kind = members(kind)[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return arguments[-1]
    if is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        wanted = [name for name, hint in hints.items() if full or is_required(hint) or name == "type"]
        return {name: sample(hints[name], False, depth + 1) for name in wanted if depth < 8}
    if origin is not None and issubclass(origin, typing.Mapping):
        return {"key": sample(arguments[1], False, depth + 1)}
    if origin is not None and issubclass(origin, typing.Iterable):
        return [sample(arguments[0], False, depth + 1)]
    plain = {str: MARK, int: 3, float: 0.5, bool: True, dict: {"key": MARK}, list: [MARK]}
    return plain.get(kind, MARK)


def is_declared(wire, name):
    """Whether LOSSES of a format name this field or type, in backticks."""
    lost = re.findall("`([^`]+)`", " ".join(R.WIRE_FORMATS[wire].losses))
    return any(fnmatch.fnmatch(name, pattern) for pattern in lost)


def documented_fields(wire):
    return {
        name: hint
        for path in PARAMS[wire]
        for name, hint in typing.get_type_hints(load(path), include_extras=True).items()
        if name not in HEADERS.get(wire, ())
    }


# Where things of several types stand in a request: a union of the SDK, and the request that carries one of them.
PLACES = {
    "openai": {
        "chat:ChatCompletionContentPartParam": lambda part: {"messages": [{"role": "user", "content": [part]}]},
        "chat:ChatCompletionMessageParam": lambda message: {"messages": [{"role": "user", "content": "hi"}, message]},
        "chat:ChatCompletionToolUnionParam": lambda tool: {"tools": [tool]},
        "chat:ChatCompletionToolChoiceOptionParam": lambda choice: {"tool_choice": choice, "tools": TOOLS["openai"]},
    },
    "anthropic": {
        "beta:BetaContentBlockParam": lambda block: {"messages": [{"role": role_of(block), "content": [block]}]},
        "beta:BetaToolUnionParam": lambda tool: {"tools": [tool]},
        "beta:BetaToolChoiceParam": lambda choice: {"tool_choice": choice, "tools": TOOLS["anthropic"]},
    },
    "responses": {
        "responses:ResponseInputItemParam": lambda item: {"input": [{"role": "user", "content": "hi"}, item]},
        "responses:ResponseInputContentParam": lambda part: {"input": [{"role": "user", "content": [part]}]},
        "responses:ToolParam": lambda tool: {"tools": [tool]},
        "responses.response_create_params:ToolChoice": lambda choice: {
            "tool_choice": choice,
            "tools": TOOLS["responses"],
        },
    },
}


def role_of(block):
    return "assistant" if "tool_use" in block["type"] or "thinking" in block["type"] else "user"


def variants(source):
    package = "anthropic" if source == "anthropic" else "openai"
    for path, wrap in PLACES[source].items():
        module, name = path.split(":")
        for kind in members(load("%s.types.%s:%s" % (package, module, name))):
            if is_typeddict(kind):
                yield kind, wrap


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_documented_field_is_translated_or_declared(source, target):
    silent = []
    for name, hint in documented_fields(source).items():
        value = VALUES[source].get(name, sample(hint, full=True))
        bare = dict(BARE[source], tools=TOOLS[source]) if name in NEED_TOOLS else BARE[source]
        before = R.translate_request(bare, source, target)[1]
        try:
            after = R.translate_request(dict(bare, **{name: value}), source, target)[1]
        except R.RouterError as error:
            assert (error.status, name in str(error)) == (400, True)
            after = before  # refused: that too is declared
        if after == before and not is_declared(source, name):
            silent.append((name, value))
    assert silent == []


def translated(source, target, body):
    """The request in the other format; None where it is refused."""
    try:
        return R.translate_request(dict(BARE[source], **body), source, target)[1]
    except R.RouterError as error:
        assert error.status == 400
        return None


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_documented_type_of_message_part_item_and_tool_is_translated_or_declared(source, target):
    silent, seen = [], 0
    for kind, wrap in variants(source):
        seen += 1
        value = sample(kind)
        name = value.get("type") or value["role"]
        after = translated(source, target, wrap(value))
        bare = translated(source, target, {key: tools for key, tools in wrap(value).items() if key == "tools"})
        told = MARK in json.dumps(after) or "ToolChoice" in kind.__name__ and after != bare
        if not told and not is_declared(source, name) and json.dumps(value).count(MARK):
            silent.append((name, value, after))
    assert silent == []
    assert seen > 10


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_documented_field_of_what_is_translated_is_so_too_or_declared(source, target):
    silent = set()
    for kind, wrap in variants(source):
        value, full = sample(kind), sample(kind, full=True)
        name = value.get("type") or value["role"]
        before = translated(source, target, wrap(value))
        if is_declared(source, name):
            continue
        for field in full.keys() - value.keys():
            after = translated(source, target, wrap(dict(value, **{field: full[field]})))
            if after == before and after is not None:  # refused: that too is declared
                silent.add((name, field))
    assert sorted((name, field) for name, field in silent if not is_declared(source, field)) == []
