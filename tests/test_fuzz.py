"""Every parser before mutated and grown input: nothing but RouterError may come out, and no input may take more than
linear time. Seconds by default; LLM_ROUTER_TEST_FUZZ_SECONDS=N spends N seconds on each target, seeds counting on."""

import json
import os
import random
import sys
import time
import tracemalloc

import pytest
from test_http import CASES

import fake_upstream as fake
import llm_router as R
from exchanges import PATHS, WIRES, ask
from running_router import config_of, provider
from sse_decoder import SseDecoder

SECONDS = float(os.environ.get("LLM_ROUTER_TEST_FUZZ_SECONDS", "0"))
ROUNDS = 150
CONTEXT = R.Context(R.ChatRequest("m", [R.Message("user", [R.Text("hi")])]), "req_1", 1)
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
RICH = {
    "openai": dict(
        ask("openai", "a/m"), tools=[{"type": "function", "function": TOOL}], tool_choice="auto", stop=["x"], n=1,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"},
                  {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
                  {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function",
                   "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "c", "content": "r"}]),
    "anthropic": dict(
        ask("anthropic", "a/m"), system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        tools=[{"name": "f", "input_schema": TOOL["parameters"]}], thinking={"type": "enabled", "budget_tokens": 2000},
        messages=[{"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image", "source":
                  {"type": "base64", "media_type": "image/png", "data": "AA=="}}]},
                  {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                   {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
                  {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]}]),
    "responses": dict(
        ask("responses", "a/m"), tools=[dict(TOOL, type="function")], reasoning={"effort": "low"}, instructions="i",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "t"}]},
               {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "e"},
               {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
               {"type": "function_call_output", "call_id": "c", "output": "r"}]),
}  # fmt: skip
ODD = [None, True, False, 0, -1, 1.5, 1e300, "", "x", "\ud800", "\0\r\n\x1b", [], {}, [None], {"": None}, [[[]]], {"type": None},
       {"type": "x"}, 10**30, "9" * 50, ["a"] * 3, {"type": "text"}, {"type": "tool_use"}, {"role": "user"}]  # fmt: skip
BYTES = [b"", b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b":", b" ", b"\xff", b"\xef\xbb\xbf", b"0", b"-1", b"ffffffff", b";", b'"',
         b"chunked", b"data: ", b"[DONE]", b"event: error\n", b"{", b"}", b"\\ud800", b"1e999", b"\x1f\x8b\x08"]  # fmt: skip


def damage(rng, data):
    """Bytes with a few things done to them."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randint(0, len(data)), rng.randint(0, 12)
        what = rng.randint(0, 4)
        if what == 0:
            data[at : at + length] = rng.choice(BYTES)
        elif what == 1 and data:
            data[at % len(data)] = rng.randint(0, 255)
        elif what == 2:
            data[at:at] = data[at : at + length] * rng.randint(1, 4)
        elif what == 3:
            del data[at:]
        else:
            data[at:at] = rng.choice(BYTES)
    return bytes(data)


def bend(rng, value, depth=0):
    """A JSON value with something in it replaced, added or left out."""
    if depth and rng.random() < 0.12:
        return rng.choice(ODD)
    if isinstance(value, dict) and value:
        changed = {key: bend(rng, entry, depth + 1) if rng.random() < 0.5 else entry for key, entry in value.items()}
        if rng.random() < 0.15:
            changed.pop(rng.choice(list(changed)))
        if rng.random() < 0.15:
            changed[rng.choice(["type", "role", "content", "id", "name", "input", "stream", "x"])] = rng.choice(ODD)
        return changed
    if isinstance(value, list) and value:
        return [bend(rng, entry, depth + 1) for entry in value] + ([rng.choice(ODD)] if rng.random() < 0.15 else [])
    return value if rng.random() < 0.8 else rng.choice(ODD)


def cut(rng, data):
    """Data in pieces."""
    places = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 3)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]


def fuzz_request_head(rng):
    parser = R.RequestParser(R.HttpLimits(max_body_bytes=1000))
    for piece in cut(rng, damage(rng, rng.choice(CASES)[1])):
        parser.feed(piece)
        while parser.head() is not None and parser.body() is not None:
            parser.next()


def fuzz_answer(rng):
    parser = R.ResponseParser()
    raw = rng.choice([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nabcde", b"HTTP/1.1 100 C\r\n\r\nHTTP/1.0 404 \n\n",
                      b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nabcde\r\n0\r\nX: y\r\n\r\n"])  # fmt: skip
    for piece in cut(rng, damage(rng, raw)):
        parser.feed(piece)
    parser.finish()


def fuzz_inflate(rng):
    import gzip

    R.inflate(damage(rng, gzip.compress(b"abc" * 50)), rng.choice(["gzip", "deflate", "x-gzip", "identity", "br"]), 1000)


def fuzz_events(rng):
    decoder = SseDecoder(1000)
    for piece in cut(rng, damage(rng, b"event: a\ndata: {}\n\n: c\r\nid: 1\r\ndata: x\r\n\r\ndata\rretry: 5\r\r")):
        decoder.feed(piece)


def fuzz_request_body(rng):
    wire = rng.choice(WIRES)
    data = json.dumps(bend(rng, RICH[wire])).encode()
    data = damage(rng, data) if rng.random() < 0.3 else data
    inbound = R.read_inbound(R.find_endpoint(PATHS[wire]), [], data)
    for target in WIRES:
        R.translate_request(inbound.body.value, inbound.wire, target, "m")


def fuzz_whole_answer(rng):
    source = rng.choice(WIRES)
    body = bend(rng, fake.WHOLES[source]("text", [("f", {"a": 1})], reasoning="why"))
    if isinstance(body, dict):
        for target in WIRES:
            R.translate_response(body, source, target, CONTEXT)


def fuzz_stream(rng):
    source, target = rng.choice(WIRES), rng.choice(WIRES)
    events = fake.STREAMS[source]("text of it", [("f", {"a": 1})], reasoning="why")
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in events)
    if rng.random() < 0.5:
        lines = data.decode().split("\n")
        at = rng.choice([number for number, line in enumerate(lines) if line.startswith("data: {")])
        lines[at] = "data: " + json.dumps(bend(rng, json.loads(lines[at][6:])))
        data = "\n".join(lines).encode()
    else:
        data = damage(rng, data)
    processor = R.make_processor(source, target, CONTEXT, 5000)
    for piece in cut(rng, data):
        processor.feed(piece)
    processor.finish()


CONFIG = config_of(provider("https://a.example/v1", models=[{"id": "m", "aliases": ["x"], "fallbackModels": ["b/n"]}], id="a",
                            headers={"h": "v"}, timeouts={"idleMs": 5}), provider("https://b.example", "anthropic", "b", ("n",)),
                   modelAliases={"c*": "a/m", "l": ["a/m", "b/n"]}, clientKeys=[{"name": "n", "sha256": "0" * 64}])  # fmt: skip


def fuzz_config(rng):
    text = json.dumps(bend(rng, CONFIG)).encode()
    document = R.parse_config_text(damage(rng, text) if rng.random() < 0.3 else text, "file")
    R.find_problems(document)
    R.mask_document(document)
    R.Routes(R.read_config(document, {}))


def fuzz_model_name(rng):
    routes = R.Routes(R.read_config(CONFIG, {}))
    name = damage(rng, rng.choice([b"a/m", b"x", b"cc[1m]", b"l", b"b/n", b"smart", b"a/b/c"])).decode("latin-1")
    R.find_endpoint("/v1/models/" + name)
    routes.find_plan(name)


def fuzz_retry_after(rng):
    texts = [b"5", b"1.5", b"Wed, 21 Oct 2026 07:28:00 GMT", b"6m0s", b"1e3", b"-1", b"2026-01-01T00:00:00Z", b"nan", b"9" * 400]
    names = ["retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "anthropic-ratelimit-requests-reset"]
    text = damage(rng, rng.choice(texts)).decode("latin-1")
    body = bend(rng, {"error": {"message": "try again in %s" % text, "details": [{"retryDelay": text}]}})
    R.read_retry_after([(rng.choice(names), text)], ["try again in " + text], body, 0.0)
    R.judge_error(rng.choice(WIRES), rng.randint(300, 599), [(rng.choice(names), text)], json.dumps(body).encode(), 0.0)


TARGETS = {name[5:]: value for name, value in list(globals().items()) if name.startswith("fuzz_")}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_but_a_router_error_escapes(name):
    seed, end = 0, time.monotonic() + SECONDS
    while seed < ROUNDS or time.monotonic() < end:
        try:
            TARGETS[name](random.Random(seed))
        except R.RouterError:
            pass
        except Exception as error:
            raise AssertionError("%s with seed %d: %r" % (name, seed, error)) from error
        seed += 1


# --- linear time, in executed lines of the program rather than seconds ---


def lines_of(work):
    """How many lines of llm_router.py `work` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != R.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except R.RouterError:
        pass
    finally:
        sys.settrace(before)
    return count


def parse_head(raw):
    parser = R.RequestParser(R.HttpLimits(max_line_bytes=1 << 20, max_head_bytes=1 << 20, max_header_count=1 << 20))
    for at in range(0, len(raw), 7):
        parser.feed(raw[at : at + 7])
        parser.head()


def read_stream(wire, target, count):
    processor = R.make_processor(wire, target, CONTEXT)
    for part in fake.STREAMS[wire]("word " * count):
        processor.feed(part if isinstance(part, bytes) else part.encode())
    processor.finish()


def config_with(count):
    document = config_of(*[provider("https://a.example", id="p%d" % number) for number in range(count)])
    return lambda: R.find_problems(document)


GROWING = {
    "long headers": lambda n: lambda: parse_head(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * n * 10),
    "many headers": lambda n: lambda: parse_head(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * n),
    "tiny chunks": lambda n: lambda: R.ResponseParser().feed(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * n),
    "many messages": lambda n: lambda: R.translate_request(
        dict(RICH["openai"], messages=RICH["openai"]["messages"] * n), "openai", "anthropic", "m"),
    "many fields": lambda n: lambda: R.read_json_object(json.dumps({str(key): [] for key in range(n)}).encode()),
    "many providers": config_with,
    "a long stream": lambda n: lambda: read_stream("openai", "anthropic", n),
    "a long stream of the same": lambda n: lambda: read_stream("anthropic", "anthropic", n),
    "a long model name": lambda n: lambda: R.Routes(R.read_config(CONFIG, {})).find_plan("c[" * n),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GROWING))
def test_twice_the_input_costs_about_twice_the_steps(name):
    small, large = lines_of(GROWING[name](100)), lines_of(GROWING[name](200))
    assert 0 < large <= 2.3 * small + 50, (small, large)


class Tape(str):
    """A text that counts how many characters were copied while such texts were added up."""

    copied = 0

    def __add__(self, more):
        Tape.copied += len(self) + len(more)
        return Tape(str(self) + str(more))

    def __radd__(self, before):
        return Tape(before) + self


def many_texts(count):
    texts = [{"type": "text", "text": Tape("word")}] * count
    turns = [{"role": role, "content": texts} for role in ("user", "assistant", "user")]
    R.translate_request({"model": "m", "max_tokens": 9, "messages": turns}, "anthropic", "openai")


def many_details(count):
    parser = R.ChatStreamParser(CONTEXT)
    detail = {"type": "reasoning.text", "index": 0, "text": Tape("word")}
    for delta in [{"reasoning": "word", "reasoning_details": [detail]}] * count + [{"content": "Yes."}]:
        parser.read({"choices": [{"index": 0, "delta": delta}]})


@pytest.mark.parametrize("work", [many_texts, many_details])
def test_a_text_in_many_pieces_is_not_copied_for_each_of_them(work):
    Tape.copied = 0
    work(300)
    assert Tape.copied <= 300 * 4 * 4


def tool_additions(count):
    tools = [{"type": "tool_definition", "definition": {"name": "f%d" % number}} for number in range(count)]
    parts = [{"type": "tool_addition", "tool": tool} for tool in tools]
    return "anthropic", {"model": "m", "messages": [{"role": "user", "content": parts}]}


def sealed_thoughts(count):
    item = {"type": "reasoning", "summary": [], "content": [], "encrypted_content": "x"}
    return "responses", {"model": "m", "input": [item] * count}


@pytest.mark.parametrize("make", [tool_additions, sealed_thoughts])
def test_a_request_of_many_small_parts_is_read_in_a_moment(make):
    """Work that grows with the square of these takes half a minute, for every client."""
    wire, body = make(50_000)
    began = time.process_time()
    R.WIRE_FORMATS[wire].parse_request(body)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("piece", [";", ";a=b", ";a", "a"])
def test_a_hostile_data_url_costs_no_memory(piece):
    """A pattern with a repeated group remembers every turn of it: a hundred bytes for each character of a body."""
    url = "data:" + piece * (200_000 // len(piece))
    tracemalloc.start()
    try:
        assert R._DATA_URL.match(url) is None
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()



ERROR_KEYS = [*R._TELLING_KEYS, "loc", "headers", "retry_after", "resets_at", "base_resp", "status_code", "status_msg", "success", "detail"]


def odd_error(rng, depth=4):
    """An object of the keys that error bodies have, in any order and with anything under them."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([*ODD, "429", '{"error": {"message": "m"}}', "try again in 5s"])
    if rng.random() < 0.2:
        return [odd_error(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(ERROR_KEYS): odd_error(rng, depth - 1) for _ in range(rng.randint(0, 5))}


@pytest.mark.parametrize("seed", range(20))
def test_no_error_body_is_too_odd_to_be_judged_and_shown(seed):
    rng = random.Random(seed)
    for _ in range(100):
        body = odd_error(rng)
        outcome = R.judge_error("openai", rng.choice([400, 401, 422, 429, 500]), [], json.dumps(body).encode(), 1e9)
        told = R.judge_in_band(R.read_error(200, body), [], "openai", 1e9)
        for error in (outcome.error, told.error):
            assert error.message
            for wire in R.WIRE_FORMATS.values():
                R.dump_json(wire.render_error(error, "id"))


TRICKY = [R._REQUEST_LINE, R._FIELDS, R._FIELD_LINE, R._HOST, R._CODINGS_THEN_CHUNKED, R._FOLD, R._ANSWER_FIELDS]


@pytest.mark.parametrize("number", range(len(TRICKY)))
def test_no_pattern_of_the_codec_backtracks_without_end(number):
    """A pattern that explodes would never finish on these; one that is linear takes no time."""
    for part in ("a", "%20", "%", "a,", "x ,", "[:", ": ", "\t", "\r\n ", "a:", ",\t", "a:b\r\n"):
        for end in ("", "\0", "\r", "!", ":"):
            TRICKY[number].match(part * 5000 + end)
            TRICKY[number].fullmatch(part * 5000 + end)
            TRICKY[number].search("\n" + part * 500 + end)
