"""Requests and answers of the three wire formats as a client of each sees them, and a router with nothing to remember.

Reads answers by itself, without llm_router, so that a mistake of the router cannot hide in its own reader.
"""

import contextlib
import json
import time
from pathlib import Path

from running_router import config_of

STAYS_OUT = "not in this program: "  # how the place of a row begins that needs no test

WIRES = ("openai", "anthropic", "responses")
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "responses": "/v1/responses"}

# Short delays, and no health from one request to the next: what many tests that share a router need.
QUICK = (
    "--origin-retry-base-delay-ms=2",
    "--origin-retry-max-delay-ms=8",
    "--origin-fallback-cooldown-ms=0",
    "--origin-rate-limit-cooldown-ms=0",
    "--origin-billing-cooldown-ms=0",
    "--origin-auth-cooldown-ms=0",
    "--origin-policy-cooldown-ms=0",
    "--fallback-circuit-failures=0",
)
# The same delays with the health book as it is by default.
SHORT = QUICK[:2]


def ask(wire, model=None, text="Say hello.", stream=False, **more):
    """A request body of the wire format."""
    body = {"input": text} if wire == "responses" else {"messages": [{"role": "user", "content": text}]}
    if wire == "anthropic":
        body["max_tokens"] = 100
    if model is not None:
        body["model"] = model
    if stream:
        body["stream"] = True
    return dict(body, **more)


def post(router, wire, model=None, stream=False, headers=None, timeout=30.0, **more):
    """Ask and read the whole Reply."""
    return router.post(PATHS[wire], ask(wire, model, stream=stream, **more), headers, timeout=timeout)


class Told:
    """What an answer told its client. text; complete: it has its proper end; error: the error object in it or None;
    model: the name it shows; usage: (input, output) or None; ended: a chat stream's [DONE] was seen."""

    def __init__(self):
        self.text = ""
        self.complete = False
        self.ended = False
        self.error = None
        self.model = None
        self.usage = None

    @property
    def honest_end(self):
        """Complete without an error, or an error without a proper end: never both, never neither."""
        return self.complete != bool(self.error)

    def __repr__(self):
        return "<Told %r complete=%s error=%s>" % (self.text, self.complete, self.error)


def read_answer(wire, reply):
    """What a Reply tells a client of that format, streamed or whole."""
    told = Told()
    if "event-stream" in reply.headers.get("content-type", ""):
        for name, data in reply.events:
            STREAM_READERS[wire](told, name, data)
    else:
        body = reply.json
        told.error = body.get("error") or (body if body.get("type") == "error" else None)
        if not told.error:
            WHOLE_READERS[wire](told, body)
    return told


def _read_chat_event(told, name, data):
    assert not told.ended, "an event after [DONE]"
    if data == "[DONE]":
        told.complete = told.ended = True
        return
    event = json.loads(data)
    told.error = told.error or event.get("error")
    told.model = told.model or event.get("model")
    for choice in event.get("choices") or []:
        told.text += choice["delta"].get("content") or ""
        told.complete = told.complete or bool(choice.get("finish_reason"))
    if event.get("usage"):
        told.usage = (event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])


def _read_messages_event(told, name, data):
    event = json.loads(data)
    assert event["type"] == name, "the event's name is not its type"
    assert not told.complete or name == "ping", "an event after message_stop"
    if name == "error":
        told.error = event["error"]
    elif name == "message_start":
        assert told.model is None, "a second message_start"
        told.model = event["message"]["model"]
        told.usage = (event["message"]["usage"]["input_tokens"], 0)
    elif name == "content_block_delta":
        told.text += event["delta"].get("text", "")
    elif name == "message_delta":
        told.usage = (event["usage"].get("input_tokens", told.usage[0]), event["usage"]["output_tokens"])
    elif name == "message_stop":
        told.complete = True


def _read_responses_event(told, name, data):
    event = json.loads(data)
    assert not told.complete, "an event after response.completed"
    kind = event["type"]
    if kind == "response.output_text.delta":
        told.text += event["delta"]
    elif kind in ("error", "response.failed"):
        told.error = event.get("error") or event["response"]["error"]
    elif kind == "response.created":
        told.model = event["response"]["model"]
    elif kind == "response.completed":
        told.complete = True
        usage = event["response"].get("usage")
        told.usage = usage and (usage["input_tokens"], usage["output_tokens"])


STREAM_READERS = {"openai": _read_chat_event, "anthropic": _read_messages_event, "responses": _read_responses_event}


def _read_chat(told, body):
    choice = body["choices"][0]
    told.text, told.complete, told.model = (
        choice["message"]["content"] or "",
        bool(choice["finish_reason"]),
        body["model"],
    )
    told.usage = (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])


def _read_messages(told, body):
    told.text = "".join(block.get("text", "") for block in body["content"])
    told.complete, told.model = bool(body["stop_reason"]), body["model"]
    told.usage = (body["usage"]["input_tokens"], body["usage"]["output_tokens"])


def _read_responses(told, body):
    parts = [part for item in body["output"] for part in item.get("content") or []]
    told.text = "".join(part.get("text", "") for part in parts)
    told.complete, told.model = body["status"] == "completed", body["model"]
    told.usage = (body["usage"]["input_tokens"], body["usage"]["output_tokens"])


WHOLE_READERS = {"openai": _read_chat, "anthropic": _read_messages, "responses": _read_responses}


def error_shape(wire, body):
    """The error object of an error body, its envelope checked: each format has its own."""
    if wire == "anthropic":
        assert set(body) >= {"type", "error"}, body
        assert body["type"] == "error"
        assert isinstance(body["error"]["type"], str)
    else:
        assert set(body) == {"error"}, body
        assert set(body["error"]) >= {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


def assert_answer(wire, reply, text):
    """The reply is a 200 with exactly this text, cleanly ended."""
    assert reply.status == 200, reply
    assert reply.ended == "clean", reply
    told = read_answer(wire, reply)
    assert (told.text, told.complete, told.error) == (text, True, None), reply
    assert told.ended or wire != "openai" or reply.headers["content-type"] == "application/json", "no [DONE]"
    return told


def assert_stream_error(wire, reply, ended="cut"):
    """The reply is a stream that ended in an error of its format: no terminator, and the connection was cut, or not."""
    assert reply.status == 200, reply
    told = read_answer(wire, reply)
    assert told.error, reply
    assert not told.complete, reply
    assert reply.ended == ended, reply
    return told


def until(condition, timeout=30.0, step=0.01):
    """Poll until `condition()` is true and return its value; AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "it did not come true in %g s" % timeout
        time.sleep(step)


def attempts_of(reply):
    """The x-llm-router-attempts header as a list of (candidate, label)."""
    header = reply.headers["x-llm-router-attempts"]
    return [tuple(part.split("=", 1)) for part in header.split(", ")] if header else []


# --- two upstreams in every format -----------------------------------------------


def pair_config(first, second, timeouts=None, **fields):
    """A config with two upstreams, each as a provider of every wire format: `a-openai` ... at `first`, `b-openai` ... at `second`.

    Models of the `a` providers: `solo` has no fallback; `to-openai`, `to-anthropic`, `to-responses` fall back to that
    provider of `b`; `sibling` falls back to `solo` of the same provider. The `b` providers have `m`. timeouts: those of
    the `a` providers.
    """
    providers = []
    for wire in WIRES:
        models = [{"id": "solo"}, {"id": "sibling", "fallbackModels": ["a-%s/solo" % wire, "b-%s/m" % wire]}]
        models += [{"id": "to-" + other, "fallbackModels": ["b-%s/m" % other]} for other in WIRES]
        providers.append(dict(_provider("a-" + wire, first, wire, models, "first-provider-key"), timeouts=timeouts or {}))
        providers.append(_provider("b-" + wire, second, wire, [{"id": "m"}], "second-provider-key"))
    return config_of(*providers, **fields)


def _provider(id, upstream, wire, models, key):
    return {"id": id, "baseUrl": upstream.url, "apiKey": key, "formats": [wire], "models": models}


class Pair:
    """A running router before two fake upstreams, `first` and `second` (see pair_config)."""

    def __init__(self, router, first, second):
        self.router = router
        self.first = first
        self.second = second

    def calls(self):
        """How many calls each upstream has got."""
        return len(self.first.calls), len(self.second.calls)

    def clear(self):
        """Forget what was recorded and scripted."""
        for upstream in (self.first, self.second):
            until(lambda upstream=upstream: upstream.is_quiet)  # a call of a client that left would take what comes next
            upstream.calls.clear()
            upstream._queue.clear()
            upstream.handler = upstream.plain_handler

    @contextlib.contextmanager
    def scripted(self):
        """Clean before and after one test."""
        self.clear()
        yield self
        self.clear()


def assert_tested(rows, size):
    """`rows` are numbered from 1 to `size`, each with a place that exists: FILE::TEST, a FILE as a whole, or STAYS_OUT."""
    assert sorted(rows) == list(range(1, size + 1))
    for place in rows.values():
        name, _, test = place.partition("::")
        if not place.startswith(STAYS_OUT):
            text = (Path(__file__).parent / name).read_text(encoding="utf-8")
            assert not test or "def %s(" % test in text, place
