"""Recorded answers of real providers, each as an upstream's answer to a client of each wire format.

The recordings lie beside the project, where they exist; each text, call, stop and count is compared with a sum that
does not use the router. `-s` shows how many there were of whom.
"""

import collections
import json
from pathlib import Path

import pytest

import llm_router as R
from strict_readers import STREAM, WHOLE, sum_of

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"
APIS = {"chat": "openai", "responses": "responses", "messages": "anthropic"}
NOW = 1_800_000_000.0
WIRES = tuple(R.WIRE_FORMATS)


def rows(is_error):
    if not (CORPUS / "INDEX.json").is_file():
        return [pytest.param(None, marks=pytest.mark.skip("no recordings beside the project"))]
    found = [row for row in json.loads((CORPUS / "INDEX.json").read_text("utf-8")) if row["api"] in APIS]
    kept = [row for row in found if (row["status"] >= 300) == is_error]
    return [pytest.param(row, id="%s/%s" % (row["provider"], row["name"][:60])) for row in kept]


def read(row):
    """A recorded exchange; its request, where it can be read, makes the context."""
    return json.loads((CORPUS / row["file"]).read_text("utf-8"))


def context_of(exchange):
    return R.Context(R.ChatRequest("asked-for", [], stream=True, include_usage=True), "r1", int(NOW))


def shown(raw, source, target, context, is_stream):
    """(what the client of `target` gets, read strictly; the processor or None). A plain answer is shown whole."""
    if is_stream:
        processor = R.make_processor(source, target, context)
        out = processor.feed(raw) + processor.finish()
        return out, processor
    body = R.translate_response(json.loads(raw), source, target, context)
    return body, None


def is_streamed(exchange):
    return bool(exchange["stream"]) and exchange["body"].lstrip()[:1] not in ("{", "[", "")


def words(text):
    """White space around and between parts is nobody's to keep."""
    return text.split()


def compare(seen, told):
    """What a client was shown against what its upstream sent."""
    assert words(seen.text + seen.refusal) in (words(told.text + told.refusal), words(told.streamed) or [""])
    assert words(seen.thought) == words(told.thought)
    assert seen.calls == told.calls
    assert seen.stop == ("tool_use" if told.calls and told.stop == "end" else told.stop) or told.stop == "pause_turn"
    if told.usage and any(told.usage):
        assert seen.usage == told.usage


@pytest.mark.parametrize("row", rows(False))
def test_a_recorded_success_says_the_same_to_a_client_of_every_format(row):
    exchange = read(row)
    if exchange["streams_in_body"] != 1 or exchange["suspect_handmade"]:
        pytest.skip("no single answer of a provider")
    source, context, raw = APIS[row["api"]], context_of(exchange), exchange["body"].encode("utf-8", "surrogatepass")
    streamed, told = is_streamed(exchange), sum_of(source, exchange["body"])
    for target in WIRES:
        if target == source and streamed:
            out, relay = shown(raw, source, target, context, True)
            assert bool(relay.failed) == told.error
            assert out == raw or source == "anthropic" or told.error
            assert sum_of(source, out.decode("utf-8")).gist() == told.gist()
        elif told.error:
            out, translator = shown(raw, source, target, context, streamed)
            assert translator.failed is not None
            assert STREAM[target](out).error
        else:
            out, translator = shown(raw, source, target, context, streamed)
            compare((STREAM if streamed else WHOLE)[target](out), told)
            assert translator is None or (translator.done and translator.failed is None)


@pytest.mark.parametrize("row", rows(False))
def test_a_recorded_stream_is_the_same_however_it_is_cut_and_the_same_folded(row):
    exchange = read(row)
    if not is_streamed(exchange) or exchange["streams_in_body"] != 1:
        pytest.skip("no single stream")
    source, context, raw = APIS[row["api"]], context_of(exchange), exchange["body"].encode("utf-8", "surrogatepass")
    folded = R.fold_stream(source, raw, context)
    for target in WIRES:
        whole, _ = shown(raw, source, target, context, True)
        processor = R.make_processor(source, target, context)
        size = 1 if len(raw) < 3000 else 257
        pieces = [processor.feed(raw[at : at + size]) for at in range(0, len(raw), size)]
        assert b"".join(pieces) + processor.finish() == whole
        if target != source and not isinstance(folded, R.ErrorInfo):
            assert STREAM[target](whole).gist() == WHOLE[target](R.WIRE_FORMATS[target].render_response(folded, context)).gist()


@pytest.mark.parametrize("row", rows(True))
def test_a_recorded_error_is_classified_and_worded_in_the_client_s_format(row):
    exchange = read(row)
    source = APIS[row["api"]]
    outcome = R.judge_error(source, exchange["status"], list(exchange["headers"].items()), exchange["body"].encode(), NOW)
    assert outcome.kind != R.OK
    check_error(outcome.error)


def check_error(info):
    assert info.message
    assert not info.message.lstrip().startswith(("{", "<"))
    for target in WIRES:
        wire = R.WIRE_FORMATS[target]
        body = wire.render_error(info, "r1")
        assert body["error"]["message"].endswith(info.message)  # behind words by which a client knows an overflow
        assert body["error"]["type"]
        assert (body.get("type"), body.get("request_id")) == (("error", "r1") if target == "anthropic" else (None, None))
        event = json.loads(R.parse_events(wire.error_event(info, "r1"))[-1].data)
        assert (event.get("error") or event["response"]["error"])["message"].endswith(info.message)


def test_reported_error_shapes_are_worded_in_every_format():
    path = CORPUS / "error_shapes.json"
    if not path.is_file():
        pytest.skip("no reported error shapes beside the project")
    for shape in json.loads(path.read_text("utf-8"))["shapes"]:
        body = shape["body"].encode()
        if shape["status"] != 200:
            outcome = R.judge_error(APIS[shape["api"]], shape["status"], list(shape["headers"].items()), body, NOW)
            check_error(outcome.error)


def test_how_many_recordings_there_are_of_whom():
    found = [param.values[0] for is_error in (False, True) for param in rows(is_error)]
    if found[0] is None:
        pytest.skip("no recordings beside the project")
    counts = collections.Counter((row["provider"], "error" if row["status"] >= 300 else row["api"]) for row in found)
    for provider in sorted({provider for provider, _ in counts}):
        print(provider, *("%s %d" % (what, count) for (who, what), count in sorted(counts.items()) if who == provider))
    assert sum(counts.values()) > 300
