"""What a careful client of each wire format makes of an answer, and what an upstream's own bytes say.

Both sides read without llm_router. The client's side asserts what each format promises: one start, contiguous and
balanced blocks, one terminator, unique ids, arguments that are JSON objects. The upstream's side is a plain sum of
what was sent, in whatever dialect.
"""

import json
import re


class Said:
    """What an answer says: text, thought, refusal; calls as (name, arguments as an object); stop: a common word;
    usage: (all of the input, output) or None; error: whether it ended in one; streamed: the deltas of a Responses
    stream, which in one recording are others than its final text."""

    def __init__(self):
        self.text = self.thought = self.refusal = self.streamed = ""
        self.calls = []
        self.stop = ""
        self.usage = None
        self.error = False

    def gist(self):
        """What is the same in every format; a refusal is text where nothing else is known."""
        return self.text + self.refusal, self.thought, self.calls, self.stop, self.usage

    def __repr__(self):
        return "<Said %r error=%s>" % (self.gist(), self.error)


def events_of(raw):
    """The events of a stream as (name, data), by the rules of the standard: LF, CR or CRLF, comments are nothing."""
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    found = []
    for block in re.split(r"\n\n+", text.replace("\r\n", "\n").replace("\r", "\n")):
        name, data = "", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value[1:] if value[:1] == " " else value
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value
        if data:
            found.append((name, "\n".join(data)))
    return found


# --- a client's side ---------------------------------------------------------------

CHAT_STOPS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use", "stop": "end"}
MESSAGES_STOPS = {"end_turn": "end", "stop_sequence": "end", "model_context_window_exceeded": "max_tokens"}
RESPONSES_STOPS = {"max_output_tokens": "max_tokens", "content_filter": "refusal"}


def arguments_object(text):
    value = json.loads(text)
    assert isinstance(value, dict), text
    return value


def unique(ids):
    ids = list(ids)
    assert all(ids), ids
    assert len(set(ids)) == len(ids), ids


def read_chat(body):
    """A whole Chat Completions answer."""
    said, message = Said(), body["choices"][0]["message"]
    assert len(body["choices"]) == 1
    assert message["role"] == "assistant"
    said.text, said.refusal = message["content"] or "", message.get("refusal") or ""
    said.thought = message.get("reasoning_content") or message.get("reasoning") or ""
    calls = message.get("tool_calls") or []
    unique(call["id"] for call in calls)
    said.calls = [
        (call["function"]["name"], arguments_object(call["function"]["arguments"]))
        if call.get("type") != "custom"
        else (call["custom"]["name"], call["custom"]["input"])
        for call in calls
    ]
    said.stop = CHAT_STOPS[body["choices"][0]["finish_reason"]]
    said.stop = "refusal" if said.refusal and said.stop == "end" else said.stop
    said.usage = chat_usage(body.get("usage"))
    return said


def chat_usage(usage):
    if not usage:
        return None
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"]


def read_chat_stream(raw):
    """A Chat Completions stream, its life cycle checked."""
    message, events = {"role": None, "content": "", "tool_calls": []}, events_of(raw)
    finish = usage = error = None
    for number, (name, data) in enumerate(events):
        assert name == ""
        if data == "[DONE]":
            assert number == len(events) - 1
            assert finish
            break
        chunk = json.loads(data)
        if "error" in chunk:
            error = chunk["error"]
            assert number == len(events) - 1
            break
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == json.loads(events[0][1])["id"]
        if not chunk["choices"]:
            assert finish
            usage = chunk["usage"]
            continue
        choice, delta = chunk["choices"][0], chunk["choices"][0]["delta"]
        assert choice["index"] == 0
        assert finish is None, "a chunk behind the finish"
        assert ("role" in delta) == (number == 0), "the role is in the first chunk only"
        message["role"] = message["role"] or delta.get("role")
        for key in ("content", "reasoning_content", "refusal"):
            message[key] = (message.get(key) or "") + (delta.get(key) or "")
        for call in delta.get("tool_calls") or []:
            add_chat_call(message["tool_calls"], call)
        finish = choice["finish_reason"]
    else:
        raise AssertionError("no [DONE]")
    if error:
        said = Said()
        said.error = True
        return said
    return read_chat({"choices": [{"message": message, "finish_reason": finish}], "usage": usage})


def add_chat_call(calls, call):
    if call["index"] == len(calls):
        calls.append(json.loads(json.dumps(call)))
        return
    assert call["index"] < len(calls)
    assert "id" not in call
    kind, field = ("custom", "input") if "custom" in call else ("function", "arguments")
    calls[call["index"]][kind][field] += call[kind].get(field) or ""


def read_messages(body):
    """A whole Message."""
    said = Said()
    assert (body["type"], body["role"]) == ("message", "assistant")
    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    unique(call["id"] for call in calls)
    for block in body["content"]:
        assert block.get("text") != "", "an empty text block"
        said.text += block.get("text", "") if block["type"] == "text" else ""
        said.thought += block.get("thinking", "")
    for call in calls:
        assert isinstance(call["input"], dict)
    said.calls = [(call["name"], call["input"]) for call in calls]
    said.stop = MESSAGES_STOPS.get(body["stop_reason"], body["stop_reason"])
    said.usage = messages_usage(body["usage"])
    return said


def messages_usage(usage):
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert all(isinstance(usage[kind], int) for kind in kinds)
    counts = sum(usage[kind] for kind in kinds), usage["output_tokens"]
    return counts if any(counts) else None


def read_messages_stream(raw):
    """A Messages stream, its life cycle checked."""
    events = [(name, json.loads(data)) for name, data in events_of(raw)]
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events if name != "ping"]
    if names[-1] == "error":
        assert "message_stop" not in names
        said = Said()
        said.error = True
        return said
    assert names[0] == "message_start"
    assert events[0][0] == "message_start", "a ping before the start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert [names.count(name) for name in ("message_start", "message_delta", "message_stop")] == [1, 1, 1]
    message, is_open = {}, False
    for name, data in events:
        if name == "message_start":
            message = dict(data["message"], content=[])
        elif name == "content_block_start":
            assert not is_open
            assert data["index"] == len(message["content"])
            message["content"].append(dict(data["content_block"]))
            is_open = True
        elif name == "content_block_delta":
            assert is_open
            assert data["index"] == len(message["content"]) - 1
            add_messages_delta(message["content"][-1], data["delta"])
        elif name == "content_block_stop":
            assert is_open
            assert data["index"] == len(message["content"]) - 1
            is_open = False
            if "_json" in message["content"][-1]:
                message["content"][-1]["input"] = arguments_object(message["content"][-1].pop("_json"))
        elif name == "message_delta":
            message.update(data["delta"])
            message["usage"] = {**message["usage"], **data["usage"]}
    assert not is_open
    return read_messages(message)


def add_messages_delta(block, delta):
    kinds = {"text_delta": ("text", "text"), "thinking_delta": ("thinking", "thinking")}
    if delta["type"] == "input_json_delta":
        block["_json"] = block.get("_json", "") + delta["partial_json"]
    elif delta["type"] in kinds:
        kind, field = kinds[delta["type"]]
        assert block["type"] == kind
        block[field] += delta[field]


def read_responses(body):
    """A whole Response."""
    said = Said()
    assert body["object"] == "response"
    assert body["id"]
    unique(item["id"] for item in body["output"])
    unique(item["call_id"] for item in body["output"] if item["type"] == "function_call")
    for item in body["output"]:
        if item["type"] == "message":
            said.text += "".join(part.get("text", "") for part in item["content"])
            said.refusal += "".join(part.get("refusal", "") for part in item["content"])
        elif item["type"] == "reasoning":
            said.thought += "".join(part["text"] for part in item["summary"] + item.get("content", []))
        elif item["type"] == "function_call":
            said.calls.append((item["name"], arguments_object(item["arguments"])))
        elif item["type"] == "custom_tool_call":
            said.calls.append((item["name"], item["input"]))
    assert body["status"] in ("completed", "incomplete"), body["status"]
    reason = (body["incomplete_details"] or {}).get("reason")
    said.stop = RESPONSES_STOPS[reason] if reason else "tool_use" if said.calls else "refusal" if said.refusal else "end"
    usage = body["usage"]
    counts = usage and (usage["input_tokens"], usage["output_tokens"])
    said.usage = counts if counts and any(counts) else None
    return said


def read_responses_stream(raw):
    """A Responses stream, its life cycle checked; its last snapshot is what was told item by item."""
    events = [(name, json.loads(data)) for name, data in events_of(raw)]
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    if names[-1] in ("response.failed", "error"):
        said = Said()
        said.error = True
        return said
    assert names[-1] in ("response.completed", "response.incomplete")
    assert not any(name in names[:-1] for name in ("response.completed", "response.incomplete", "response.failed"))
    items, texts, is_open = [], {}, False
    for name, data in events:
        if name == "response.output_item.added":
            assert not is_open
            assert data["output_index"] == len(items)
            is_open = True
        elif name == "response.output_item.done":
            assert is_open
            assert data["output_index"] == len(items)
            items.append(data["item"])
            is_open = False
        elif name.endswith(".delta"):
            assert is_open
            key = name[:-6], len(items), data.get("content_index"), data.get("summary_index")
            texts[key] = texts.get(key, "") + data["delta"]
        elif name[:-5] + ".delta" in TEXT_DELTAS and name.endswith(".done"):
            key = name[:-5], len(items), data.get("content_index"), data.get("summary_index")
            whole = next(data[field] for field in ("text", "refusal", "arguments", "input") if field in data)
            assert texts.get(key, "{}") == whole or (not texts.get(key) and whole in ("", "{}"))
    assert not is_open
    assert events[-1][1]["response"]["output"] == items
    return read_responses(events[-1][1]["response"])


TEXT_DELTAS = {
    "response.%s.delta" % stem
    for stem in "output_text refusal reasoning_text reasoning_summary_text function_call_arguments custom_tool_call_input".split()
}
WHOLE = {"openai": read_chat, "anthropic": read_messages, "responses": read_responses}
STREAM = {"openai": read_chat_stream, "anthropic": read_messages_stream, "responses": read_responses_stream}


# --- an upstream's side ------------------------------------------------------------


def sum_of(wire, body):
    """What an upstream said, of its bytes as text, streamed or whole."""
    datas = [data for _, data in events_of(body)] if re.match(r"\s*(?:data|event|id|:)", body) else [body]
    values = [json.loads(data) for data in datas if data.strip() != "[DONE]" and data.strip()]
    said = Said()
    said.error = any(value.get("error") or value.get("type") in ("error", "response.failed") for value in values)
    SUMS[wire](said, values, datas != [body])
    return said


def sum_chat(said, values, is_stream):
    calls, finish = [], ""
    for value in values:
        usage = value.get("usage") or (value.get("x_groq") or {}).get("usage")
        for choice in (value.get("choices") or [])[:1]:
            if choice.get("index"):
                continue
            part = choice.get("delta" if is_stream else "message") or {}
            add_chat_part(said, part)
            for call in part.get("tool_calls") or []:
                sum_call(calls, call)
            if part.get("function_call"):
                sum_call(calls, {"index": "legacy", "function": part["function_call"]})
            finish = finish or choice.get("finish_reason") or ""
            usage = usage or choice.get("usage")
        if usage:
            said.usage = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
            thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
            if thought and usage.get("total_tokens") == sum(said.usage) + thought:
                said.usage = said.usage[0], said.usage[1] + thought  # xAI counts reasoning apart
    said.calls = [(name, json.loads(text or "{}")) for _, _, name, text in calls if name]
    if said.text.lstrip().startswith("<think>"):
        inside, _, said.text = said.text.lstrip()[7:].partition("</think>")
        said.thought += inside
    words = {"length": "max_tokens", "model_length": "max_tokens", "content_filter": "refusal", "max_tokens": "max_tokens"}
    said.stop = words.get(finish.lower()) or ("tool_use" if said.calls else "refusal" if said.refusal else "end")


def add_chat_part(said, part):
    content = part.get("content") or ""
    for piece in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        thinking = piece.get("thinking")
        said.thought += "".join(one.get("text", "") for one in thinking) if thinking else ""
        said.text += piece.get("text") or ""
    said.text += (part.get("audio") or {}).get("transcript") or ""
    said.refusal += part.get("refusal") or ""
    details = "".join(one.get("text") or one.get("summary") or "" for one in part.get("reasoning_details") or [])
    said.thought += part.get("reasoning_content") or part.get("reasoning") or details


def sum_call(calls, call):
    """`calls` holds [index, id, name, arguments]; without an index, or with an id of its own, a call is a new one."""
    function, index, id = call.get("function") or {}, call.get("index"), call.get("id")
    known = next((one for one in calls if one[0] == index and (not id or not one[1] or one[1] == id)), None)
    if known is None or index is None:
        known = [index, id, "", ""]
        calls.append(known)
    known[1], known[2] = known[1] or id, known[2] or function.get("name") or ""
    text = function.get("arguments") or ""
    known[3] += text if isinstance(text, str) else json.dumps(text)


def sum_messages(said, values, is_stream):
    blocks, usage, stop = {}, {}, None
    for value in values:
        message = value.get("message") or (value if "content" in value and value.get("role") else {})
        usage.update({key: count for key, count in (message.get("usage") or {}).items() if count})
        usage.update({key: count for key, count in (value.get("usage") or {}).items() if count})
        stop = message.get("stop_reason") or (value.get("delta") or {}).get("stop_reason") or stop
        for number, block in enumerate(message.get("content") or []):
            blocks[number] = dict(block)
        if value.get("type") == "content_block_start":
            blocks[value["index"]] = dict(value["content_block"])
        elif value.get("type") == "content_block_delta":
            for field in ("text", "thinking", "partial_json"):
                if field in value["delta"]:
                    block = blocks[value["index"]]
                    block[field] = block.get(field, "") + value["delta"][field]
    for _, block in sorted(blocks.items()):
        said.text += block.get("text", "") if block["type"] == "text" else ""
        said.thought += block.get("thinking", "") if block["type"] == "thinking" else ""
        if block["type"] == "tool_use":
            said.calls.append((block["name"], json.loads(block.get("partial_json") or json.dumps(block["input"]))))
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    said.usage = sum(usage.get(kind, 0) for kind in kinds), usage.get("output_tokens", 0)
    said.stop = MESSAGES_STOPS.get(stop, stop)


def sum_responses(said, values, is_stream):
    items, final = {}, {}
    for value in values:
        said.streamed += value["delta"] if value.get("type") == "response.output_text.delta" else ""
        if value.get("type") == "response.output_item.done":
            items[value["output_index"]] = value["item"]
        if value.get("type", "")[9:] in ("completed", "incomplete", "failed"):
            final = value["response"]
        elif "output" in value and "type" not in value:
            final = value
    output = [item for _, item in sorted(items.items())] or final.get("output") or []
    for item in output:
        for part in item.get("content") or []:
            said.thought += part.get("text", "") if item["type"] == "reasoning" else ""
            said.text += part.get("text", "") if item["type"] == "message" else ""
            said.refusal += part.get("refusal", "")
        if item["type"] == "reasoning" and not item.get("content"):
            said.thought += "\n\n".join(part["text"] for part in item.get("summary") or [])
        if item["type"] == "function_call":
            said.calls.append((item["name"], json.loads(item["arguments"] or "{}")))
        if item["type"] == "custom_tool_call":
            said.calls.append((item["name"], item["input"]))
    usage = final.get("usage") or {}
    said.usage = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    reason = (final.get("incomplete_details") or {}).get("reason")
    said.stop = RESPONSES_STOPS[reason] if reason else "tool_use" if said.calls else "refusal" if said.refusal else "end"


SUMS = {"openai": sum_chat, "anthropic": sum_messages, "responses": sum_responses}
