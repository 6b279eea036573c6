"""A scripted provider on real sockets of 127.0.0.1: what the router's tests talk to instead of the world.

Standard library only and independent of llm_router, so that a mistake of the router cannot hide in its own test.

    with FakeUpstream() as upstream:
        upstream.answer(json_answer(429, {"error": {"message": "slow down"}}, {"retry-after": "1"}))
        upstream.answer(sse_answer(chat_stream("hello")))
        ... let the router call upstream.url ...
        upstream.calls[0].json["model"]

An `Answer` is a list of steps: bytes to send, or one of the small step classes (`Wait`, `Gate`, `Hang`, `Reset`,
`Close`). Queued answers go first, in order; then `handler(call)`, which by default is `final_text()`. An entry of the
queue may be a callable `call -> Answer` as well. One thread with a small stack per connection, keep-alive, hundreds of
connections at once.
"""

import atexit
import base64
import contextlib
import gzip as _gzip
import json
import math
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

STACK_BYTES = 512 * 1024
SLICE_BYTES = 64 * 1024


# --- steps ---------------------------------------------------------------------


class Wait:
    """Pause for `seconds`; ends at once when the peer goes away."""

    def __init__(self, seconds):
        self.seconds = seconds


class Gate:
    """Pause until the test sets `event` (a threading.Event), or the peer goes away."""

    def __init__(self, event):
        self.event = event


class Hang:
    """Say nothing more until the peer goes away or the upstream is stopped; the connection is dropped then."""


class Reset:
    """Drop the connection with a TCP RST."""


class Close:
    """End the connection with an orderly FIN, whatever was promised before."""


class Answer:
    """What one call gets: `steps` in order; then the connection is kept, or closed when `close` is true."""

    def __init__(self, *steps, close=False):
        self.steps = list(steps)
        self.close = close

    @property
    def bytes(self):
        """All bytes of the answer, its pauses left out."""
        return b"".join(step for step in self.steps if isinstance(step, bytes))


class Call:
    """One recorded request.

    method, path (with query), headers (list of pairs as sent), body (bytes, chunked framing removed), time (monotonic
    seconds when it was complete), connection (number of its connection), sent_bytes (how much of the answer the kernel
    took). closed: an Event, set when the peer goes away at any time after this request and before the next one on the
    same connection; closed_at: when. answered: an Event, set when every step of the answer was carried out;
    `closed.is_set() and not answered.is_set()` is a client that left early.
    """

    def __init__(self, method, path, headers, body, connection):
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.connection = connection
        self.time = time.monotonic()
        self.sent_bytes = 0
        self.closed = threading.Event()
        self.closed_at = None
        self.answered = threading.Event()

    def header(self, name, default=None):
        """The first value of a header, any case."""
        for key, value in self.headers:
            if key.lower() == name.lower():
                return value
        return default

    @property
    def json(self):
        """The body as JSON, or None when it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def wire(self):
        """The wire format by the path: "openai", "anthropic", "responses", or "" for anything else."""
        path = self.path.split("?")[0].rstrip("/")
        ends = (("/chat/completions", "openai"), ("/messages", "anthropic"), ("/responses", "responses"))
        return next((wire for end, wire in ends if path.endswith(end)), "")

    def _peer_left(self):
        if not self.closed.is_set():
            self.closed_at = time.monotonic()
            self.closed.set()

    def __repr__(self):
        return "<Call %s %s %d bytes>" % (self.method, self.path, len(self.body))


# --- answers: plain HTTP -------------------------------------------------------


def head(status=200, headers=(), reason="Whatever"):
    """Bytes of a response head; `headers` is a dict or a list of pairs."""
    pairs = list(headers.items()) if isinstance(headers, dict) else list(headers)
    lines = ["HTTP/1.1 %d %s" % (status, reason)] + ["%s: %s" % pair for pair in pairs]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _with(defaults, headers):
    pairs = list(headers.items()) if isinstance(headers, dict) else list(headers)
    names = {name.lower() for name, _ in pairs}
    return [pair for pair in defaults if pair[0].lower() not in names] + pairs


def body_answer(status, body, content_type, headers=()):
    """A whole answer with Content-Length on a kept connection."""
    pairs = _with([("content-type", content_type), ("content-length", str(len(body)))], headers)
    return Answer(head(status, pairs) + body)


def json_answer(status, obj, headers=()):
    """`obj` as JSON."""
    return body_answer(status, json.dumps(obj).encode(), "application/json", headers)


def text_answer(status, text, headers=(), content_type="text/plain; charset=utf-8"):
    """Text, HTML and the like."""
    return body_answer(status, text.encode(), content_type, headers)


def raw(*steps, close=True):
    """Exactly these bytes and steps; the connection is closed after them unless `close` is false."""
    return Answer(*steps, close=close)


def chunk(data):
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def chunked_answer(status, parts, headers=(), content_type="application/json", trailer=b"0\r\n\r\n"):
    """A body in chunks, one per part; other `trailer` bytes make the framing end wrongly."""
    pairs = _with([("content-type", content_type), ("transfer-encoding", "chunked")], headers)
    return Answer(head(status, pairs), *[chunk(part) for part in parts], trailer, close=trailer != b"0\r\n\r\n")


def bad_chunk_answer(first=b"", bad=b"zz\r\nnot a chunk\r\n", content_type="text/event-stream"):
    """A 200 whose chunked framing breaks after `first`."""
    start = [chunk(first)] if first else []
    return Answer(
        head(200, [("content-type", content_type), ("transfer-encoding", "chunked")]), *start, bad, close=True
    )


def close_delimited_answer(status, body, content_type="application/json", headers=()):
    """A body that ends with the connection: neither Content-Length nor chunks."""
    return Answer(
        head(status, _with([("content-type", content_type), ("connection", "close")], headers)), body, close=True
    )


def wrong_length_answer(status, body, declared, content_type="application/json"):
    """Content-Length `declared` with another body; the connection is closed after it."""
    return Answer(head(status, [("content-type", content_type), ("content-length", str(declared))]), body, close=True)


def gzip_answer(status, obj, declared=True, headers=()):
    """JSON inside gzip; `declared` false leaves content-encoding out, as some upstreams do."""
    coding = [("content-encoding", "gzip")] if declared else []
    return body_answer(status, _gzip.compress(json.dumps(obj).encode()), "application/json", _with(coding, headers))


def informational_first(answer, status=103, headers=(("link", "</x>; rel=preload"),)):
    """`answer` after an interim 1xx response."""
    return Answer(head(status, headers), *answer.steps, close=answer.close)


def redirect_answer(location, status=302):
    """A redirect, which a router must never follow."""
    return body_answer(status, b"moved", "text/plain", {"location": location})


def hang_before_head():
    """The request is read, then nothing."""
    return Answer(Hang())


def hang_after_head(content_type="text/event-stream"):
    """A 200 head, then nothing."""
    return Answer(head(200, [("content-type", content_type), ("transfer-encoding", "chunked")]), Hang())


def reset_before_head():
    """RST instead of an answer."""
    return Answer(Reset())


def close_before_head():
    """FIN instead of an answer."""
    return Answer(Close())


def drip(answer, size=1, delay=0.0):
    """The same answer in pieces of `size` bytes, `delay` seconds apart."""
    steps = []
    for step in answer.steps:
        if not isinstance(step, bytes):
            steps.append(step)
            continue
        for start in range(0, len(step), size):
            steps += [step[start : start + size]] + ([Wait(delay)] if delay else [])
    return Answer(*steps, close=answer.close)


def later(answer, seconds):
    """The same answer after a silence of `seconds`."""
    return Answer(Wait(seconds), *answer.steps, close=answer.close)


def gated(answer, event):
    """The same answer once the test sets `event`."""
    return Answer(Gate(event), *answer.steps, close=answer.close)


# --- answers: server-sent events -----------------------------------------------


def sse(data, name=""):
    """One event on the wire; `data` is an object (dumped as JSON) or text."""
    text = data if isinstance(data, str) else json.dumps(data)
    return (("event: %s\n" % name if name else "") + "data: %s\n\n" % text).encode()


ENDS = {"cut": Close, "reset": Reset, "hang": Hang}


def sse_answer(
    events,
    status=200,
    headers=(),
    delay=0.0,
    cut_after=None,
    end="clean",
    framing="chunked",
    gzip=False,
    first_delay=0.0,
):
    """A stream of `events` (a list of bytes, or of steps such as Wait and Gate between them).

    delay: seconds between events. cut_after: only so many bytes of the body are sent. end: "clean" ends the HTTP body
    properly (after `cut_after` bytes that is an answer cut in silence), "cut" closes the connection without the last
    chunk, "reset" sends RST, "hang" says nothing more. framing: "chunked", "close" (the connection ends the body) or
    "length". gzip: the body is compressed and declared so. first_delay: silence between the head and the first event.
    """
    bodies = _limited(_compressed(events) if gzip else list(events), cut_after)
    pairs = [("content-type", "text/event-stream"), ("cache-control", "no-cache")]
    pairs += [("content-encoding", "gzip")] if gzip else []
    if framing == "chunked":
        pairs.append(("transfer-encoding", "chunked"))
    elif framing == "length":
        pairs.append(("content-length", str(sum(len(part) for part in bodies if isinstance(part, bytes)))))
    else:
        pairs.append(("connection", "close"))
    steps = [head(status, _with(pairs, headers))] + ([Wait(first_delay)] if first_delay else [])
    for number, part in enumerate(bodies):
        steps += [Wait(delay)] if delay and number else []
        steps.append(chunk(part) if framing == "chunked" and isinstance(part, bytes) else part)
    if end != "clean":
        return Answer(*steps, ENDS[end]())
    return Answer(*steps, *([b"0\r\n\r\n"] if framing == "chunked" else []), close=framing == "close")


def _limited(parts, limit):
    if limit is None:
        return [part for part in parts if part != b""]
    kept = []
    for part in parts:
        if isinstance(part, bytes):
            part, limit = part[:limit], limit - len(part[:limit])
            kept += [part] if part else []
        elif limit > 0:
            kept.append(part)
    return kept


def _compressed(events):
    import zlib

    press = zlib.compressobj(wbits=31)
    parts = [press.compress(e) + press.flush(zlib.Z_SYNC_FLUSH) if isinstance(e, bytes) else e for e in events]
    return parts + [press.flush()]


# --- wire formats --------------------------------------------------------------
#
# tool_calls: a list of (name, arguments), arguments an object or text as it shall appear. usage: (input, output), or
# an object in the format's own words, or None for none. Ids are fixed: "call_1", "call_2", ...


def pieces(text, size=6):
    """`text` cut in small parts, as models stream it."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def _arguments(value):
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(value):
    return json.loads(value or "{}") if isinstance(value, str) else value


def _chat_usage(usage):
    if isinstance(usage, tuple):
        return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return usage


def chat_whole(text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", stop=None):
    """A Chat Completions answer as an object."""
    message = {"role": "assistant", "content": text or None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = [
            {"id": "call_%d" % n, "type": "function", "function": {"name": name, "arguments": _arguments(arguments)}}
            for n, (name, arguments) in enumerate(tool_calls, 1)
        ]
    stop = stop or ("tool_calls" if tool_calls else "stop")
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": model}
    answer["choices"] = [{"index": 0, "message": message, "finish_reason": stop, "logprobs": None}]
    return dict(answer, usage=_chat_usage(usage)) if usage else answer


def chat_stream(text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", stop=None, done=True):
    """A Chat Completions stream as a list of events; usage comes in its own last chunk."""

    def event(delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse(dict(base, choices=[choice]))

    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": model}
    events = [event({"role": "assistant", "content": ""})]
    events += [event({"reasoning_content": part}) for part in pieces(reasoning)]
    events += [event({"content": part}) for part in pieces(text)]
    for index, (name, arguments) in enumerate(tool_calls):
        start = {"index": index, "id": "call_%d" % (index + 1), "type": "function"}
        events.append(event({"tool_calls": [dict(start, function={"name": name, "arguments": ""})]}))
        for part in pieces(_arguments(arguments)):
            events.append(event({"tool_calls": [{"index": index, "function": {"arguments": part}}]}))
    events.append(event({}, stop or ("tool_calls" if tool_calls else "stop")))
    if usage:
        events.append(sse(dict(base, choices=[], usage=_chat_usage(usage))))
    return events + ([sse("[DONE]")] if done else [])


def _messages_usage(usage):
    return {"input_tokens": usage[0], "output_tokens": usage[1]} if isinstance(usage, tuple) else usage


def _messages_blocks(text, tool_calls, reasoning):
    blocks = [{"type": "thinking", "thinking": reasoning, "signature": "c2lnbmF0dXJl"}] if reasoning else []
    blocks += [{"type": "text", "text": text}] if text else []
    return blocks + [
        {"type": "tool_use", "id": "toolu_%d" % n, "name": name, "input": _parsed(arguments)}
        for n, (name, arguments) in enumerate(tool_calls, 1)
    ]


def messages_whole(text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", stop=None):
    """An Anthropic Messages answer as an object."""
    answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "stop_sequence": None}
    answer["content"] = _messages_blocks(text, tool_calls, reasoning)
    answer["stop_reason"] = stop or ("tool_use" if tool_calls else "end_turn")
    return dict(answer, usage=_messages_usage(usage)) if usage else answer


def messages_stream(text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", stop=None, done=True):
    """An Anthropic Messages stream as a list of events."""

    def event(kind, **fields):
        return sse(dict({"type": kind}, **fields), kind)

    counts = _messages_usage(usage)
    start = messages_whole(model=model)
    start.update(content=[], stop_reason=None, usage=dict(counts, output_tokens=1) if counts else None)
    events = [event("message_start", message=start), event("ping")]
    for index, block in enumerate(_messages_blocks(text, tool_calls, reasoning)):
        opened, deltas = _messages_deltas(block)
        events.append(event("content_block_start", index=index, content_block=opened))
        events += [event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(event("content_block_stop", index=index))
    last = {"stop_reason": stop or ("tool_use" if tool_calls else "end_turn"), "stop_sequence": None}
    events.append(event("message_delta", delta=last, **({"usage": counts} if counts else {})))
    return events + ([event("message_stop")] if done else [])


def _messages_deltas(block):
    if block["type"] == "text":
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": part} for part in pieces(block["text"])]
    if block["type"] == "thinking":
        deltas = [{"type": "thinking_delta", "thinking": part} for part in pieces(block["thinking"])]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
        return {"type": "thinking", "thinking": "", "signature": ""}, deltas
    deltas = [{"type": "input_json_delta", "partial_json": part} for part in pieces(json.dumps(block["input"]))]
    return dict(block, input={}), deltas


def _responses_items(text, tool_calls, reasoning):
    items = []
    if reasoning:
        items.append({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": reasoning}]})
    if text:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        items.append({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]})
    for n, (name, arguments) in enumerate(tool_calls, 1):
        item = {"type": "function_call", "id": "fc_%d" % n, "call_id": "call_%d" % n, "status": "completed"}
        items.append(dict(item, name=name, arguments=_arguments(arguments)))
    return items


def _responses_usage(usage):
    if isinstance(usage, tuple):
        return {
            "input_tokens": usage[0],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage[1],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(usage),
        }
    return usage


def responses_whole(text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", status="completed"):
    """An OpenAI Responses answer as an object."""
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1700000000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": _responses_items(text, tool_calls, reasoning),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": _responses_usage(usage),
    }


def responses_stream(
    text="", tool_calls=(), usage=(11, 7), reasoning="", model="fake-model", status="completed", done=True
):
    """An OpenAI Responses stream as a list of events, the whole life cycle."""
    bare = dict(responses_whole(model=model, status="in_progress"), usage=None)
    events = [("response.created", {"response": bare}), ("response.in_progress", {"response": bare})]
    for index, item in enumerate(_responses_items(text, tool_calls, reasoning)):
        opened = dict(item, **OPENED[item["type"]])
        events.append(("response.output_item.added", {"output_index": index, "item": opened}))
        events += _responses_deltas(index, item)
        events.append(("response.output_item.done", {"output_index": index, "item": item}))
    whole = responses_whole(text, tool_calls, usage, reasoning, model, status)
    events += [("response." + status, {"response": whole})] if done else []
    return [sse(dict({"type": name, "sequence_number": n}, **data), name) for n, (name, data) in enumerate(events)]


OPENED = {
    "message": {"status": "in_progress", "content": []},
    "function_call": {"status": "in_progress", "arguments": ""},
    "reasoning": {"summary": []},
}


def _responses_deltas(index, item):
    where = {"output_index": index, "item_id": item["id"]}
    if item["type"] == "function_call":
        name, text, key = "response.function_call_arguments", item["arguments"], "arguments"
        frames = ([], [])
    elif item["type"] == "message":
        where["content_index"] = 0
        part = item["content"][0]
        name, text, key = "response.output_text", part["text"], "text"
        frames = _framed("response.content_part", where, part)
    else:
        where["summary_index"] = 0
        part = item["summary"][0]
        name, text, key = "response.reasoning_summary_text", part["text"], "text"
        frames = _framed("response.reasoning_summary_part", where, part)
    extra = {"logprobs": []} if key == "text" and item["type"] == "message" else {}
    deltas = [(name + ".delta", dict(where, delta=piece, **extra)) for piece in pieces(text)]
    return frames[0] + deltas + [(name + ".done", dict(where, **dict(extra, **{key: text})))] + frames[1]


def _framed(name, where, part):
    added = (name + ".added", dict(where, part=dict(part, text="")))
    return [added], [(name + ".done", dict(where, part=part))]


STREAMS = {"openai": chat_stream, "anthropic": messages_stream, "responses": responses_stream}
WHOLES = {"openai": chat_whole, "anthropic": messages_whole, "responses": responses_whole}


def model_answer(wire, stream, text="", **fields):
    """The answer in the wire format, streamed or whole; `fields` as in the builders (tool_calls, usage, ...)."""
    if stream:
        return sse_answer(STREAMS[wire](text, **fields))
    return json_answer(200, WHOLES[wire](text, **fields))


def error_answer(wire, status, message="the fake upstream says no", kind="api_error", headers=()):
    """An error in the wire format's own shape."""
    if wire == "anthropic":
        return json_answer(status, {"type": "error", "error": {"type": kind, "message": message}}, headers)
    return json_answer(status, {"error": {"message": message, "type": kind, "param": None, "code": None}}, headers)


# --- handlers ------------------------------------------------------------------


def offered_tools(body):
    """Names of the tools a request offers, in any wire format."""
    names = []
    for tool in body.get("tools") or []:
        function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
        names += [function["name"]] if function.get("name") else []
    return names


def _as_text(content):
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def tool_results(body):
    """Texts of the tool results a request carries, in any wire format and in order."""
    found = []
    for message in body.get("messages") or []:
        if message.get("role") == "tool":
            found.append(_as_text(message.get("content")))
        for block in message["content"] if isinstance(message.get("content"), list) else []:
            if block.get("type") == "tool_result":
                found.append(_as_text(block.get("content")))
    for item in body["input"] if isinstance(body.get("input"), list) else []:
        if item.get("type") in ("function_call_output", "custom_tool_call_output"):
            found.append(_as_text(item.get("output")))
    return found


def _side_call(call):
    path = call.path.split("?")[0]
    body = call.json or {}
    if path.endswith("/count_tokens"):
        return json_answer(200, {"input_tokens": max(1, len(call.body) // 4)})
    if path.endswith("/embeddings"):
        vector = [0.25, -0.5]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack("<2f", *vector)).decode()
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return json_answer(200, {"object": "list", "data": data, "model": body.get("model"), "usage": usage})
    if path.endswith("/models"):
        return json_answer(
            200, {"object": "list", "data": [{"id": "fake-model", "object": "model", "owned_by": "fake"}]}
        )
    if call.method in ("GET", "HEAD"):
        return Answer(head(200, {"content-length": "0"}))
    return json_answer(404, {"error": {"message": "the fake upstream has no %s" % path, "type": "not_found"}})


def final_text(text="hello from the fake upstream", **fields):
    """A handler that answers every chat in its own format with `text`; counts, models and embeddings get stubs."""

    def handler(call):
        if not call.wire or call.method != "POST":
            return _side_call(call)
        return model_answer(call.wire, bool((call.json or {}).get("stream")), text, **fields)

    return handler


THREADS_REFUSED = {
    "type": "error",
    "error": {
        "type": "invalid_request_error",
        "message": "threads are not supported here",
        "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
    },
}


def tool_round_trip(tool=None, arguments=None, text="the tool said: {result}", **fields):
    """A handler for one tool round trip in any format.

    Tools offered and no tool result yet: a call of `tool` (default: the first one offered) with `arguments`. Otherwise
    a final text; `{result}` in it is the last tool result. A tool that is not offered is said so in the text.
    Anthropic's `thread` field is refused the way that makes SDKs go on without it.
    """

    def handler(call):
        body = call.json
        if not call.wire or call.method != "POST" or not isinstance(body, dict):
            return _side_call(call)
        if "thread" in body:
            return json_answer(400, THREADS_REFUSED)
        stream, names, results = bool(body.get("stream")), offered_tools(body), tool_results(body)
        name = tool or (names[0] if names else None)
        if names and name not in names:
            return model_answer(call.wire, stream, "no tool %s among %s" % (name, ", ".join(names)), **fields)
        if name and names and not results:
            return model_answer(call.wire, stream, tool_calls=[(name, arguments or {})], **fields)
        return model_answer(
            call.wire, stream, text.replace("{result}", results[-1] if results else "nothing"), **fields
        )

    return handler


# --- the server ----------------------------------------------------------------


class _PeerLeft(Exception):
    """The client closed its side, or the upstream is being stopped."""


class FakeUpstream:
    """The provider. `url` is "http(s)://127.0.0.1:PORT" without /v1; `calls` lists every request in order.

    handler: `call -> Answer` for calls beyond the queue. tls: serve HTTPS with a self-signed certificate for localhost
    and 127.0.0.1, and for the name that `tls` may be (`cafile` names it; see `can_tls`). backlog: the listen queue.
    """

    def __init__(self, handler=None, tls=False, backlog=1024):
        self.handler = handler or final_text()
        self.calls = []
        self.connections = 0
        self.cafile = None
        self._queue = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._sockets = set()
        self._backlog = backlog
        self._tls = tls
        self._context = None
        self._folder = None

    # scripting

    def answer(self, *answers):
        """Queue answers for the next calls: `Answer`s or callables `call -> Answer`. Returns self."""
        self._queue.extend(answers)
        return self

    def wait_calls(self, count, timeout=30.0):
        """The calls, once there are at least `count`; AssertionError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.calls) >= count, timeout):
                raise AssertionError("%d calls instead of %d: %r" % (len(self.calls), count, self.calls))
        return self.calls

    @property
    def open_connections(self):
        """How many connections are open now."""
        return len(self._sockets)

    @property
    def is_quiet(self):
        """Whether everything that has come in was taken notice of: no call, no connection and no end of one waits."""
        try:
            return not any(_readable(one, 0) for one in [self._listener, *list(self._sockets)] if one.fileno() >= 0)
        except ValueError:  # one was closed meanwhile
            return False

    # life

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Listen on a free port of 127.0.0.1."""
        if self._tls:
            import ssl

            self._folder = tempfile.mkdtemp()
            self.cafile, key = self_signed(self._folder, self._tls if isinstance(self._tls, str) else "localhost")
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(self.cafile, key)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(self._backlog)
        self.port = self._listener.getsockname()[1]
        self.url = "%s://127.0.0.1:%d" % ("https" if self._tls else "http", self.port)
        self._spawn(self._accept)
        return self

    def stop(self):
        """Close the listener and every connection."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, target, *args):
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=target, args=args, daemon=True).start()
        finally:
            threading.stack_size(before)

    def _accept(self):
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.add(connection)
            self._spawn(self._serve, connection, self.connections)

    def _serve(self, plain, number):
        peer = _Peer(plain, self._stopping)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context:
                plain.settimeout(10)
                peer.socket = self._context.wrap_socket(plain, server_side=True)
                peer.socket.settimeout(None)
            while not self._stopping.is_set():
                call = peer.read_call(number)
                if call is None or not self._respond(peer, call):
                    return
        except (OSError, ValueError, _PeerLeft):
            pass
        finally:
            peer.left()
            self._sockets.discard(plain)
            with contextlib.suppress(OSError):
                peer.socket.close()

    def _respond(self, peer, call):
        with self._changed:
            self.calls.append(call)
            answer = self._queue.popleft() if self._queue else self.handler
            self._changed.notify_all()
        answer = answer if isinstance(answer, Answer) else answer(call)
        head_only = call.method == "HEAD"
        for step in answer.steps:
            if isinstance(step, bytes):
                peer.send(step[: step.find(b"\r\n\r\n") + 4] if head_only else step)
            elif isinstance(step, Wait):
                until = time.monotonic() + step.seconds
                peer.pause(lambda until=until: until - time.monotonic())
            elif isinstance(step, Gate):
                peer.pause(lambda event=step.event: 0 if event.is_set() else 0.02)
            elif isinstance(step, Hang):
                peer.pause(lambda: 3600)
            elif isinstance(step, Reset):
                call.answered.set()
                return peer.reset()
            elif isinstance(step, Close):
                break
        else:
            call.answered.set()
            if not answer.close and (call.header("connection") or "").lower() != "close":
                return True
        call.answered.set()
        return peer.finish()


class _Peer:
    """One connection: reads requests, sends bytes, and notices when the other side goes away."""

    def __init__(self, connection, stopping):
        self.socket = connection
        self.call = None
        self._stopping = stopping
        self._buffer = b""

    def left(self):
        if self.call is not None:
            self.call._peer_left()

    def read_call(self, number):
        """The next request, or None at the end of the connection."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                return None
        start, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        lines = start.decode("latin-1").lstrip("\r\n").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        lower = {name.lower(): value for name, value in headers}
        if lower.get("expect", "").lower() == "100-continue":
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in lower.get("transfer-encoding", "").lower():
            body = self._chunks()
        else:
            body = self._exactly(int(lower.get("content-length", "0")))
        self.call = Call(method, path, headers, body, number)
        return self.call

    def _more(self):
        data = self.socket.recv(SLICE_BYTES)
        self._buffer += data
        return bool(data)

    def _exactly(self, size):
        parts, have = [self._buffer], len(self._buffer)
        while have < size:
            data = self.socket.recv(min(SLICE_BYTES, size - have))
            if not data:
                raise _PeerLeft
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        self._buffer = whole[size:]
        return whole[:size]

    def _line(self):
        while b"\r\n" not in self._buffer:
            if not self._more():
                raise _PeerLeft
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _chunks(self):
        parts = []
        while True:
            size = int(self._line().split(b";")[0], 16)
            if not size:
                while self._line():
                    pass
                return b"".join(parts)
            parts.append(self._exactly(size))
            self._line()

    def send(self, data):
        """Send everything; a peer that is gone shows here at the latest."""
        view = memoryview(data)
        while view:
            sent = self.socket.send(view[:SLICE_BYTES])
            self.call.sent_bytes += sent
            view = view[sent:]

    def pause(self, left):
        """Wait while `left()` seconds are positive; _PeerLeft as soon as the other side goes away."""
        while True:
            seconds = left()
            if seconds <= 0:
                return
            if self._stopping.is_set():
                raise _PeerLeft
            if _readable(self.socket, min(seconds, 0.25)) and not self._still_there():
                raise _PeerLeft

    def _still_there(self):
        # TLS has no MSG_PEEK: what is read here is kept for the next request.
        data = self.socket.recv(SLICE_BYTES)
        self._buffer += data
        return bool(data)

    def reset(self):
        """End with RST: linger 0 makes close() drop the connection."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def finish(self):
        """End with FIN, then drain: closing with unread bytes would turn the FIN into a RST."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            self.socket.settimeout(5)
            while self.socket.recv(SLICE_BYTES):
                pass
        return False


def _readable(connection, seconds):
    if getattr(connection, "pending", lambda: 0)():
        return True
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(math.ceil(seconds * 1000)))
    return bool(select.select([connection], [], [], seconds)[0])


# --- odd addresses and TLS -----------------------------------------------------


def dead_port():
    """A port of 127.0.0.1 on which nobody listens and nobody else can: connections are refused."""
    if not _DEAD:
        _DEAD.append(socket.socket())
        _DEAD[0].bind(("127.0.0.1", 0))
        atexit.register(_DEAD[0].close)
    return _DEAD[0].getsockname()[1]


_DEAD = []  # bound and never listening, to the end of the process


@contextlib.contextmanager
def blackhole(for_s=None):
    """The port of a listener that completes no connection, or none `for_s` seconds long: its queue is full (Linux drops
    the SYN)."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    ends = []

    def take_all():
        with contextlib.suppress(OSError):
            while True:
                ends.append(listener.accept()[0])

    try:
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            ends.append(filler)
        time.sleep(0.1)
        taker = threading.Timer(for_s or 0, take_all)
        taker.daemon = True
        if for_s is not None:
            taker.start()
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # ends accept, too
        for connection in ends + [listener]:
            connection.close()


def can_tls():
    """Whether a self-signed certificate can be made here: it takes the `openssl` program."""
    return shutil.which("openssl") is not None


def self_signed(folder, name="localhost"):
    """Make a certificate for `name`, localhost and 127.0.0.1 in `folder`: (certificate file, key file)."""
    cert, key = str(Path(folder) / "cert.pem"), str(Path(folder) / "key.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    names = ["-addext", "subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1" % name, "-keyout", key, "-out", cert]
    subprocess.run(command + names, check=True, capture_output=True)
    return cert, key
