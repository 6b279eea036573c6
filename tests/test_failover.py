"""Faults of providers, injected through real sockets: who is asked next, how often, and what the client is told in the end."""

import asyncio
import gzip
import json
import math
import re
import socket
import threading
import time
import zlib
from types import SimpleNamespace

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import (
    PATHS,
    QUICK,
    SHORT,
    WIRES,
    Pair,
    ask,
    assert_answer,
    assert_stream_error,
    attempts_of,
    error_shape,
    pair_config,
    post,
    read_answer,
    until,
)
from running_router import RunningRouter, config_of, provider

TEXT = "All is well, said the second one."
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
CLIENTS = pytest.mark.parametrize("client_wire", WIRES)
UPSTREAMS = pytest.mark.parametrize("upstream_wire", WIRES)


def start_pair(tmp_path_factory, *flags, **timeouts):
    """A Pair of its own for a module's fixture, ended with it."""
    with fake.FakeUpstream() as first, fake.FakeUpstream() as second:
        first.plain_handler = second.plain_handler = fake.final_text(TEXT)
        config = pair_config(first, second, timeouts)
        running = RunningRouter(config, QUICK + flags, tmp_path_factory.mktemp("router"))
        yield Pair(running, first, second)
        running.kill()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One router that remembers no failure."""
    yield from start_pair(tmp_path_factory)


@pytest.fixture
def pair(shared):
    with shared.scripted():
        yield shared


# Of the first upstream only: on a busy machine, the second one may take longer for an answer.
TIMEOUTS = {"firstByteMs": 300, "idleMs": 300}
IDLE = {"idleMs": 300}


@pytest.fixture(scope="module")
def shared_impatient(tmp_path_factory):
    """The same with timeouts short enough to wait for."""
    yield from start_pair(tmp_path_factory, **TIMEOUTS)


@pytest.fixture
def impatient(shared_impatient):
    with shared_impatient.scripted():
        yield shared_impatient


@pytest.fixture(scope="module")
def shared_drowsy(tmp_path_factory):
    """The same with all the time for a beginning and little for each further part."""
    yield from start_pair(tmp_path_factory, **IDLE)


@pytest.fixture
def drowsy(shared_drowsy):
    with shared_drowsy.scripted():
        yield shared_drowsy


@pytest.fixture
def either(request):
    """`either(name)`: the router for a fault of that name: the impatient one for silence."""
    return lambda name, silent="impatient": request.getfixturevalue(silent if "silent" in name else "pair")


@pytest.fixture
def remembering(router, make_upstream):
    """`remembering(*flags)`: a router with the health book as it is by default, before two upstreams."""

    def start(*flags, **fields):
        first, second = make_upstream(fake.final_text("first")), make_upstream(fake.final_text("second"))
        first.plain_handler, second.plain_handler = first.handler, second.handler
        return Pair(router(pair_config(first, second, **fields), *(SHORT + flags)), first, second)

    return start


def always(upstream, answer):
    """Have every call answered so; returns the upstream."""
    upstream.handler = answer if callable(answer) else lambda call: answer
    return upstream


# --- retries and what follows, by status ---


@STREAMED
@CLIENTS
def test_a_rate_limited_origin_gets_exactly_one_call_and_the_fallback_answers(pair, client_wire, stream):
    """Trap 142."""
    always(pair.first, fake.error_answer("openai", 429, "slow down"))
    reply = post(pair.router, client_wire, "a-openai/to-" + client_wire, stream)
    assert_answer(client_wire, reply, TEXT)
    assert pair.calls() == (1, 1)
    assert attempts_of(reply) == [("a-openai/to-" + client_wire, "429"), ("b-%s/m" % client_wire, "ok")]
    assert reply.headers["x-llm-router-model"] == "b-%s/m" % client_wire


@STREAMED
@pytest.mark.parametrize("status", [500, 502, 503, 529, 408, 409])
def test_a_failing_origin_gets_three_calls_before_the_fallback_answers(pair, status, stream):
    always(pair.first, fake.error_answer("anthropic", status))
    reply = post(pair.router, "anthropic", "a-anthropic/to-anthropic", stream)
    assert_answer("anthropic", reply, TEXT)
    assert pair.calls() == (3, 1)


def test_retries_wait_longer_each_time_and_never_equally_long(router, make_upstream):
    """Jitter keeps clients that failed together from coming back together."""
    first, second = make_upstream(), make_upstream()
    running = router(
        pair_config(first, second), *QUICK, "--origin-retry-base-delay-ms=80", "--origin-retry-max-delay-ms=1000"
    )
    always(first, fake.error_answer("openai", 500))
    waits = []
    for _ in range(4):
        first.calls.clear()
        reply = post(running, "openai", "a-openai/to-openai")
        line = running.wait_log(reply.headers["x-llm-router-request-id"])
        waits.append([int(ms) for ms in re.findall(r"-> retry in (\d+) ms", line)])
        times = [call.time for call in first.calls]
        assert len(times) == 3
        assert all(after - before >= ms / 1000 - 0.002 for before, after, ms in zip(times, times[1:], waits[-1]))
    assert all(39 <= one <= 80 <= two + 1 <= 161 for one, two in waits), waits
    assert len(set(map(tuple, waits))) > 1


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_the_number_of_attempts_is_a_setting(router, make_upstream, attempts):
    first, second = make_upstream(), make_upstream()
    running = router(pair_config(first, second), *QUICK, "--origin-retry-attempts=%d" % attempts)
    always(first, fake.error_answer("openai", 500))
    post(running, "openai", "a-openai/to-openai")
    assert (len(first.calls), len(second.calls)) == (attempts, 1)


def test_an_origin_that_recovers_between_two_attempts_answers(pair):
    pair.first.answer(fake.error_answer("openai", 503), fake.reset_before_head())
    reply = post(pair.router, "openai", "a-openai/to-openai", True)
    assert_answer("openai", reply, TEXT)
    assert pair.calls() == (3, 0)
    assert [label for _, label in attempts_of(reply)] == ["503", "reset", "ok"]


def test_a_retry_after_longer_than_the_next_delay_goes_straight_to_the_fallback(remembering):
    pair = remembering()
    always(pair.first, fake.error_answer("openai", 503, headers={"retry-after": "7"}))
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "second")
    assert pair.calls() == (1, 1)


@STREAMED
@pytest.mark.parametrize("status", [401, 402, 404, 410, 403])
def test_a_refusal_of_the_account_or_model_falls_back_at_once(pair, status, stream):
    always(pair.first, fake.error_answer("anthropic", status))
    assert_answer("openai", post(pair.router, "openai", "a-anthropic/to-openai", stream), TEXT)
    assert pair.calls() == (1, 1)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (400, "Your credit balance is too low to access the Anthropic API.", "invalid_request_error"),
        (429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota"),
        (403, "This request requires more credits, or fewer max_tokens.", "api_error"),
        (400, "API key not valid. Please pass a valid API key.", "invalid_request_error"),
        (400, "The model `gpt-9` does not exist or you do not have access to it.", "invalid_request_error"),
        (413, "Request too large for model on tokens per minute (TPM): Limit 6000", "tokens"),
    ],
)
def test_a_refusal_that_hides_behind_another_status_is_known_by_its_words(pair, status, message, kind):
    """Traps 123, 128, 144."""
    always(pair.first, fake.error_answer("openai", status, message, kind))
    assert_answer("anthropic", post(pair.router, "anthropic", "a-openai/to-anthropic"), TEXT)
    assert pair.calls() == (1, 1)


@CLIENTS
def test_a_failure_behind_an_aggregator_is_retried_and_never_shown_as_the_clients_own(pair, client_wire):
    """Trap 128."""
    always(pair.first, fake.error_answer("openai", 400, "Error from provider: Upstream request failed", "api_error"))
    assert_answer(client_wire, post(pair.router, client_wire, "a-openai/to-openai"), TEXT)
    assert pair.calls() == (3, 1)
    assert post(pair.router, client_wire, "a-openai/solo").status == 502


def test_a_policy_block_is_the_answer_and_no_later_request_reaches_the_other_provider_for_it(remembering):
    """The README's promise: what one provider blocks is never shown to another one unasked."""
    pair = remembering()
    always(
        pair.first,
        fake.error_answer("openai", 403, "This request was flagged by our content policy.", "content_policy_violation"),
    )
    for client_wire in WIRES:
        for stream in (False, True, False):
            reply = post(pair.router, client_wire, "a-openai/to-openai", stream)
            assert reply.status == 403
            assert reply.headers["x-should-retry"] == "false"
            assert "flagged" in error_shape(client_wire, reply.json)["message"]
    assert pair.calls() == (9, 0)


def test_a_policy_block_may_go_to_another_model_of_the_same_provider(pair):
    pair.first.answer(fake.error_answer("openai", 403, "blocked by content policy", "content_policy_violation"))
    reply = post(pair.router, "openai", "a-openai/sibling")
    assert_answer("openai", reply, TEXT)
    assert [call.json["model"] for call in pair.first.calls] == ["sibling", "solo"]
    assert pair.calls() == (2, 0)


def test_a_policy_block_goes_on_where_the_operator_allows_it(router, make_upstream):
    first, second = make_upstream(), make_upstream(fake.final_text(TEXT))
    running = router(pair_config(first, second), *QUICK, "--allow-policy-fallback=true")
    always(first, fake.error_answer("openai", 403, "content policy", "content_policy_violation"))
    assert_answer("openai", post(running, "openai", "a-openai/to-openai"), TEXT)


@STREAMED
@UPSTREAMS
def test_an_invalid_request_comes_back_unchanged_after_one_call(pair, upstream_wire, stream):
    """Traps 156, 167."""
    odd = b'{ "error" : {"message":"prompt is too long: 210000 tokens > 200000 maximum","type":"invalid_request_error", "x":1.50} }\n'
    always(pair.first, fake.body_answer(400, odd, "application/json"))
    reply = post(pair.router, upstream_wire, "a-%s/to-openai" % upstream_wire, stream)
    assert (reply.status, reply.body, reply.ended) == (400, odd, "clean")
    assert pair.calls() == (1, 0)


@pytest.mark.parametrize("status", [400, 413, 422, 418, 499])
@CLIENTS
@UPSTREAMS
def test_an_invalid_request_keeps_its_status_and_words_in_the_clients_own_format(
    pair, client_wire, upstream_wire, status
):
    """Trap 121."""
    always(pair.first, fake.error_answer(upstream_wire, status, "temperature: must be at most 1"))
    reply = post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire)
    assert reply.status == status
    assert "temperature: must be at most 1" in error_shape(client_wire, reply.json)["message"]
    assert pair.calls() == (1, 0)


def test_a_fallback_whose_format_cannot_say_what_was_asked_does_not_end_the_chain(router, make_upstream):
    """The origin takes what is not of the standard, and so does the third, to which it goes as it came."""
    origin, last = make_upstream(lambda call: fake.error_answer("openai", 503)), make_upstream(fake.final_text(TEXT))
    other = make_upstream()
    models = [{"id": "m", "fallbackModels": ["other/m", "last/m"]}, {"id": "n", "fallbackModels": ["other/m"]}]
    config = config_of(
        provider(origin, id="origin", models=models),
        provider(other, "anthropic", id="other", models=["m"]),
        provider(last, id="last", models=["m"]),
    )
    running = router(config, *QUICK, "--origin-retry-attempts=1")
    critic = {"messages": [{"role": "critic", "content": "hi"}]}
    reply = running.post(PATHS["openai"], dict(critic, model="origin/m"))
    assert_answer("openai", reply, TEXT)
    assert [label for _, label in attempts_of(reply)] == ["503", "not_sent", "ok"]
    assert running.post(PATHS["openai"], dict(critic, model="origin/n")).status == 503
    assert other.calls == []


def test_an_invalid_request_at_a_fallback_does_not_end_the_chain(remembering):
    pair = remembering(modelAliases={"chain": ["a-openai/solo", "b-openai/m", "b-anthropic/m"]})
    always(pair.first, fake.error_answer("openai", 429))
    pair.second.answer(fake.error_answer("openai", 400, "no such field"))
    reply = post(pair.router, "openai", "chain")
    assert_answer("openai", reply, "second")
    assert attempts_of(reply) == [("a-openai/solo", "429"), ("b-openai/m", "400"), ("b-anthropic/m", "ok")]


# --- health: what one request teaches the next ---


@pytest.mark.parametrize(
    ("status", "calls"),
    [(429, 1), (500, 3), (401, 1), (402, 1), (404, 1)],
)
def test_a_candidate_that_cools_goes_last_for_the_next_requests(remembering, status, calls):
    pair = remembering()
    always(pair.first, fake.error_answer("openai", status))
    for _ in range(3):
        assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "second")
    assert pair.calls() == (calls, 3)


def test_a_candidate_that_cools_is_still_asked_when_nobody_else_is_left(remembering):
    """Traps 151, 166."""
    pair = remembering()
    always(pair.first, fake.error_answer("openai", 429))
    post(pair.router, "openai", "a-openai/to-openai")
    pair.clear()
    always(pair.second, fake.error_answer("openai", 500))
    reply = post(pair.router, "openai", "a-openai/to-openai")
    assert_answer("openai", reply, "first")
    assert attempts_of(reply) == [("b-openai/m", "500"), ("a-openai/to-openai", "ok")]


def test_a_retry_after_is_kept_to_exactly(remembering):
    """Traps 142, 143: not asked before, asked again soon after."""
    pair = remembering()
    pair.first.answer(fake.error_answer("openai", 429, headers={"retry-after-ms": "400"}))
    began = time.monotonic()
    post(pair.router, "openai", "a-openai/to-openai")
    while len(pair.first.calls) == 1 and time.monotonic() < began + 15:
        post(pair.router, "openai", "a-openai/to-openai")
        time.sleep(0.02)
    assert 0.4 <= pair.first.calls[1].time - pair.first.calls[0].time <= 15  # it would cool for 30 s


def test_a_fallback_that_fails_is_remembered_as_well(remembering):
    """Trap 148."""
    pair = remembering()
    always(pair.first, fake.error_answer("openai", 429, headers={"retry-after": "20"}))
    always(pair.second, fake.error_answer("openai", 429, headers={"retry-after": "3"}))
    reply = post(pair.router, "openai", "a-openai/to-openai")
    assert (reply.status, pair.calls()) == (429, (1, 1))
    assert reply.headers["retry-after"] == "3"
    second = post(pair.router, "openai", "a-openai/to-openai")
    assert [candidate for candidate, _ in attempts_of(second)] == ["b-openai/m", "a-openai/to-openai"]


def test_a_success_clears_what_was_held_against_a_candidate(remembering):
    pair = remembering(
        "--origin-fallback-cooldown-ms=0", "--origin-retry-attempts=1", "--fallback-circuit-cooldown-ms=60000"
    )
    for _ in range(3):  # with two failures in a row the circuit would open
        pair.first.answer(fake.error_answer("openai", 500))
        assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "second")
        assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "first")


def test_two_failed_requests_open_the_circuit_and_one_probe_closes_it(remembering):
    """Traps 149, 150, 152."""
    pair = remembering(
        "--origin-fallback-cooldown-ms=0", "--origin-retry-attempts=2", "--fallback-circuit-cooldown-ms=500"
    )
    always(pair.first, fake.error_answer("openai", 500))
    began = time.monotonic()
    for calls in (2, 4, 4, 4):
        began = began if calls == len(pair.first.calls) else time.monotonic()
        post(pair.router, "openai", "a-openai/to-openai")
        assert len(pair.first.calls) == calls or time.monotonic() - began > 0.5  # on a busy machine it may have closed
    pair.first.handler = pair.first.plain_handler
    until(lambda: attempts_of(post(pair.router, "openai", "a-openai/to-openai")) == [("a-openai/to-openai", "ok")])
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "first")


def test_an_invalid_request_and_a_missing_model_name_touch_nobodys_health(remembering):
    """Trap 154."""
    pair = remembering()
    for _ in range(3):
        pair.first.answer(
            fake.error_answer(
                "openai", 400, "This model's maximum context length is 8192 tokens", "invalid_request_error"
            )
        )
        assert post(pair.router, "openai", "a-openai/to-openai").status == 400
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "first")


def test_a_bad_key_benches_the_whole_provider_and_a_rate_limit_only_its_model(remembering):
    """Trap 145."""
    pair = remembering()
    pair.first.answer(fake.error_answer("openai", 429))
    post(pair.router, "openai", "a-openai/to-openai")
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-anthropic"), "first")
    pair.first.answer(fake.error_answer("openai", 401))
    post(pair.router, "openai", "a-openai/to-anthropic")
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-responses"), "second")


# --- nobody is left ---


@STREAMED
@CLIENTS
@pytest.mark.parametrize(
    ("name", "first", "status", "headers"),
    [
        ("auth", fake.error_answer("openai", 401), 502, {"x-should-retry": "false"}),
        ("billing", fake.error_answer("openai", 402), 402, {"x-should-retry": "false"}),
        ("missing", fake.error_answer("openai", 404), 404, {"x-should-retry": "false"}),
        ("limited", fake.error_answer("openai", 429), 429, {"retry-after": "1"}),
        ("failing", fake.error_answer("openai", 500), 500, {"retry-after": "1"}),
        ("overloaded", fake.error_answer("openai", 503), 503, {"retry-after": "1"}),
        ("reset", fake.reset_before_head(), 502, {"retry-after": "1"}),
        ("silent", fake.hang_before_head(), 504, {"retry-after": "1"}),
        ("html", fake.text_answer(200, "<html>"), 502, {"retry-after": "1"}),
        ("a status that HTTP has not", fake.error_answer("openai", 700), 502, {"retry-after": "1"}),
        ("the proxy wants a login", fake.error_answer("openai", 407), 502, {"x-should-retry": "false"}),
    ],
)
def test_when_nobody_is_left_the_origin_decides_the_status_and_every_attempt_is_told(
    either, name, first, status, headers, client_wire, stream
):
    """Traps 122, 125, 126, 127."""
    pair = either(name)
    always(pair.first, first)
    always(pair.second, fake.error_answer("anthropic", 529))
    reply = post(pair.router, client_wire, "a-openai/to-anthropic", stream)
    expected = 529 if status == 503 and client_wire == "anthropic" else status
    assert reply.status == expected
    assert {name: reply.headers.get(name) for name in headers} == headers
    error = error_shape(client_wire, reply.json)
    assert "a-openai/to-anthropic=" in error["message"]
    assert "b-anthropic/m=529" in error["message"]
    if expected == 529:
        assert error["type"] == "overloaded_error"


# --- answers that are none ---

NO_ANSWERS = {
    "html": fake.text_answer(200, "<html><title>Bad gateway</title></html>", content_type="text/html"),
    "nothing": fake.body_answer(200, b"", "application/json"),
    "half a JSON": fake.body_answer(200, b'{"id": "x", "choices": [{"mess', "application/json"),
    "a JSON list": fake.json_answer(200, []),
    "a JSON of another kind": fake.json_answer(200, {"ok": True}),
    "an error": fake.json_answer(200, {"error": {"message": "overloaded", "type": "overloaded_error", "code": 529}}),
    "an anthropic error": fake.json_answer(
        200, {"type": "error", "error": {"type": "api_error", "message": "internal"}}
    ),
    "closed": fake.close_before_head(),
    "reset": fake.reset_before_head(),
    "not HTTP": fake.raw(b"220 smtp ready\r\n"),
    "two lengths": fake.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "length and chunks": fake.raw(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    "bad chunk size": fake.bad_chunk_answer(b'{"id": ', content_type="application/json"),
    "too short": fake.wrong_length_answer(200, b'{"id": "x"', 500),
    "silent after the head": fake.hang_after_head("application/json"),
    "silent between the letters of a head": fake.drip(fake.json_answer(200, fake.chat_whole("late")), 1, 0.2),
    "a redirect loop": fake.redirect_answer("/v1/chat/completions", 307),
    "an upgrade": fake.raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "an endless head": fake.raw(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 60000),
}


# Every fault in one format, streamed and whole; those that a format's own reader has to notice in all of them.
NO_ANSWER_CASES = [
    (name, upstream_wire, client_wire, stream)
    for name in NO_ANSWERS
    for upstream_wire in WIRES
    for client_wire in WIRES
    for stream in (False, True)
    if upstream_wire == client_wire == "openai"
    or name in ("half a JSON", "a JSON of another kind", "an error", "an anthropic error")
]


@pytest.mark.parametrize(("name", "upstream_wire", "client_wire", "stream"), NO_ANSWER_CASES)
def test_what_is_no_answer_leads_to_the_fallback(either, name, upstream_wire, client_wire, stream):
    """Traps 141, 12; hardening, proxies 13."""
    pair = either(name)
    always(pair.first, NO_ANSWERS[name])
    reply = post(pair.router, client_wire, "a-%s/to-%s" % (upstream_wire, client_wire), stream)
    assert_answer(client_wire, reply, TEXT)
    assert attempts_of(reply)[-1] == ("b-%s/m" % client_wire, "ok")
    assert len(pair.second.calls) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@CLIENTS
def test_an_error_in_a_choice_means_what_it_says_whatever_text_came_with_it(pair, client_wire, stream):
    """Trap 19: OpenRouter's, of an answer that broke off at its provider."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "half"}, "finish_reason": "error"}
    whole = dict(fake.chat_whole(TEXT), choices=[dict(choice, error={"code": 429, "message": "limited upstream"})])
    always(pair.first, fake.json_answer(200, whole))
    reply = post(pair.router, client_wire, "a-openai/to-openai", stream)
    assert_answer(client_wire, reply, TEXT)
    assert pair.calls() == (1, 1)
    assert attempts_of(reply)[0] == ("a-openai/to-openai", "200:429")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@CLIENTS
def test_a_response_that_failed_means_what_its_error_says_whatever_output_came_with_it(pair, client_wire, stream):
    """Trap 19. SDK: Response.status, Response.error."""
    whole = dict(fake.responses_whole(TEXT), status="failed", error={"code": "rate_limit_exceeded", "message": "limited"})
    always(pair.first, fake.json_answer(200, whole))
    reply = post(pair.router, client_wire, "a-responses/to-responses", stream)
    assert_answer(client_wire, reply, TEXT)
    assert pair.calls() == (1, 1)
    assert attempts_of(reply)[0] == ("a-responses/to-responses", "200:rate_limit_exceeded")


def stream_error(wire, message="the fake upstream fell over", kind="api_error"):
    """An error as an event of the wire format."""
    if wire == "anthropic":
        return fake.sse({"type": "error", "error": {"type": kind, "message": message}}, "error")
    if wire == "responses":
        response = dict(fake.responses_whole(status="failed"), error={"code": kind, "message": message})
        return fake.sse({"type": "response.failed", "sequence_number": 9, "response": response}, "response.failed")
    return fake.sse({"error": {"message": message, "type": kind, "code": None}})


def before_content(wire):
    """The life-cycle events that come before any content."""
    marks = {"openai": 1, "anthropic": 3, "responses": 4}
    return fake.STREAMS[wire]("text")[: marks[wire]]


@pytest.mark.parametrize(
    "fault",
    [
        "error first",
        "error after the start",
        "cut at once",
        "ended at once",
        "cut after the start",
        "ended after the start",
        "silent after the start",
        "reset after the start",
        "bad chunk",
    ],
)
@CLIENTS
@UPSTREAMS
def test_a_stream_that_fails_before_its_content_leads_to_the_fallback(either, fault, client_wire, upstream_wire):
    """Traps 19, 55, 130, 131, 135."""
    pair = either(fault)
    start = before_content(upstream_wire)
    answers = {
        "error first": fake.sse_answer([stream_error(upstream_wire)]),
        "error after the start": fake.sse_answer(start + [stream_error(upstream_wire)]),
        "cut at once": fake.sse_answer([], end="cut"),
        "ended at once": fake.sse_answer([]),
        "cut after the start": fake.sse_answer(start, end="cut"),
        "ended after the start": fake.sse_answer(start),
        "silent after the start": fake.sse_answer(start, end="hang"),
        "reset after the start": fake.sse_answer(start, end="reset"),
        "bad chunk": fake.bad_chunk_answer(b"".join(start)),
    }
    always(pair.first, answers[fault])
    reply = post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire, True)
    assert_answer(client_wire, reply, TEXT)
    assert len(pair.first.calls) == (1 if fault == "silent after the start" else 3)


@pytest.mark.parametrize("fault", ["error", "cut", "ended", "silent", "reset", "bad chunk", "half an event"])
@CLIENTS
@UPSTREAMS
def test_a_stream_that_fails_after_its_content_ends_in_an_error_and_a_cut(either, fault, client_wire, upstream_wire):
    """Traps 14, 134: no second answer behind half a first one, and no clean end."""
    pair, seen = either(fault, "drowsy"), threading.Event()
    events = fake.STREAMS[upstream_wire]("half of it ")
    cut = next(n for n, event in enumerate(events) if b"half" in event) + 1
    start = events[:cut]
    sent = fake.sse_answer(start)
    answers = {
        "error": fake.sse_answer(start + [stream_error(upstream_wire)]),
        "cut": fake.sse_answer(start, end="cut"),
        "ended": fake.sse_answer(start),
        "silent": fake.sse_answer(start, end="hang"),
        "reset": fake.sse_answer(start + [fake.Gate(seen)], end="reset"),
        "bad chunk": fake.Answer(sent.bytes[: -len(b"0\r\n\r\n")] + b"zz\r\nno chunk\r\n", close=True),
        "half an event": fake.sse_answer(start + [events[cut][:-9]], end="cut"),
    }
    always(pair.first, answers[fault])
    stream = pair.router.open(PATHS[client_wire], ask(client_wire, "a-%s/to-openai" % upstream_wire, stream=True))
    assert stream.read_until("half")
    seen.set()
    reply = stream.read_rest()
    told = assert_stream_error(client_wire, reply)
    assert "half of it ".startswith(told.text)
    assert told.text
    assert pair.calls() == (1, 0)


@UPSTREAMS
def test_an_answer_is_whole_whatever_is_wrong_behind_it_in_the_same_packet(either, upstream_wire):
    """Its end was told and it is paid for: how the network cuts the bytes must not decide whether it counts."""
    pair = either("same packet")
    sent = fake.sse_answer(fake.STREAMS[upstream_wire]("all of it"))
    always(pair.first, fake.Answer(sent.bytes[: -len(b"0\r\n\r\n")] + b"zz\r\nno chunk\r\n", close=True))
    assert_answer("openai", post(pair.router, "openai", "a-%s/to-openai" % upstream_wire, True), "all of it")
    assert pair.calls() == (1, 0)


def test_a_failure_after_content_is_remembered_and_logged(remembering):
    """Traps 14, 165: the next request goes to the other one."""
    pair = remembering()
    events = fake.chat_stream("half of it")
    always(pair.first, fake.sse_answer(events[:3], end="cut"))
    reply = post(pair.router, "openai", "a-openai/to-openai", True)
    line = pair.router.wait_log(reply.headers["x-llm-router-request-id"])
    assert " temporary " in line
    assert "too late to fall back" in line
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai", True), "second")


LATE_ERRORS = [("content_filter", "policy", 0), ("rate_limit_exceeded", "rate_limited", 30), ("server_error", "temporary", 45)]


@pytest.mark.parametrize(("code", "kind", "cools_s"), LATE_ERRORS)
@pytest.mark.parametrize("client_wire", ["openai", "anthropic"])
def test_an_error_after_content_means_what_it_says_for_log_and_health(remembering, client_wire, code, kind, cools_s):
    """Traps 14, 55: a filter that strikes in mid-stream says nothing of the model's health."""
    pair = remembering()
    told = fake.sse({"error": {"message": "no more", "type": code, "code": code}})
    always(pair.first, fake.sse_answer([*fake.chat_stream("half of it")[:3], told]))
    reply = post(pair.router, client_wire, "a-openai/to-openai", True)
    assert reply.ended == "cut"
    line = pair.router.wait_log(reply.headers["x-llm-router-request-id"])
    assert "a-openai/to-openai=200:%s" % code in line and " %s " % kind in line
    cooling = re.search(r'cooldown_seconds\{model="a-openai/to-openai"\} ([0-9.]+)', pair.router.get("/metrics").text)
    assert cools_s - 30 <= float(cooling.group(1)) <= cools_s  # a busy machine takes its time


@pytest.mark.parametrize("end", ["cut", "clean"])
@UPSTREAMS
def test_the_error_event_of_a_broken_responses_stream_bears_the_number_that_is_due(pair, upstream_wire, end):
    events = fake.STREAMS[upstream_wire]("half of it")
    start = events[: next(n for n, event in enumerate(events) if b"half" in event) + 1]
    always(pair.first, fake.sse_answer(start, end=end))
    reply = post(pair.router, "responses", "a-%s/solo" % upstream_wire, True)
    assert [data["sequence_number"] for data in reply.datas] == list(range(len(reply.datas)))
    assert (reply.datas[-1]["type"], reply.ended) == ("response.failed", "cut")
    if upstream_wire != "responses":
        assert reply.datas[-1]["response"]["id"] == reply.datas[0]["response"]["id"]


def cuts(events, thorough):
    """Offsets at which a stream may break off: all of them, or those around the end of every line and some between."""
    raw = b"".join(events)
    near = {at + shift for at in range(len(raw)) if raw[at : at + 1] == b"\n" for shift in range(-1, 3)}
    return [at for at in range(len(raw)) if thorough or at in near or at % 61 == 0]


CUTS = [("cut", "openai"), ("cut", "anthropic"), ("clean", "openai"), ("reset", "anthropic")]


@pytest.mark.parametrize(("end", "client_wire"), CUTS)
@UPSTREAMS
def test_a_stream_cut_at_any_byte_is_either_the_whole_answer_or_a_clear_error(pair, client_wire, upstream_wire, end):
    """Trap 14, at every offset of a short stream (around every line of the longer ones), in the same format and translated."""
    events = fake.STREAMS[upstream_wire]("Hi 東", usage=None if upstream_wire == "openai" else (11, 7))
    thorough = upstream_wire == "openai" and end == "cut"
    whole = {}
    for offset in cuts(events, thorough):
        pair.first.answer(fake.sse_answer(events, cut_after=offset, end=end))
        pair.first.handler = fake.final_text("again")
        reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True)
        told = read_answer(client_wire, reply)
        assert told.honest_end, (offset, reply.body)
        assert (reply.ended == "clean") == told.complete, (offset, reply.ended)
        if told.complete:
            assert told.text in ("Hi 東", "again"), (offset, reply.body)
            whole.setdefault(told.text, []).append(offset)
        else:
            assert "Hi 東".startswith(told.text), (offset, reply.body)
    assert min(whole["again"]) == 0


def test_a_whole_answer_cut_at_any_byte_is_never_taken_for_whole(pair):
    """Hardening, proxies 16."""
    for wire in WIRES:
        body = json.dumps(fake.WHOLES[wire]("Hi")).encode()
        for size in list(range(0, len(body), 11)) + [len(body) - 1]:
            pair.first.answer(fake.wrong_length_answer(200, body[:size], len(body)))
            reply = post(pair.router, wire, "a-%s/solo" % wire)
            assert read_answer(wire, reply).text == TEXT
            pair.first.answer(fake.close_delimited_answer(200, body[:size]))
            assert_answer(wire, post(pair.router, wire, "a-%s/solo" % wire), TEXT)


# --- conversions ---


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("client_wire", ["openai", "anthropic"])
@pytest.mark.parametrize("packing", ["gzip", "undeclared", "deflate"])
def test_an_answer_that_is_packed_although_nobody_asked_is_read_all_the_same(pair, packing, client_wire, stream):
    """Trap 18."""
    plain = b"".join(fake.chat_stream("packed")) if stream else json.dumps(fake.chat_whole("packed")).encode()
    data = zlib.compress(plain) if packing == "deflate" else gzip.compress(plain)
    coding = {} if packing == "undeclared" else {"content-encoding": packing}
    kind = "text/event-stream" if stream else "application/json"
    pair.first.answer(fake.chunked_answer(200, [data[:40], data[40:]], coding, kind))
    assert_answer(client_wire, post(pair.router, client_wire, "a-openai/solo", stream), "packed")


def test_a_packed_answer_that_is_cut_off_leads_to_the_fallback(pair):
    data = gzip.compress(json.dumps(fake.chat_whole("packed")).encode())
    always(pair.first, fake.body_answer(200, data[:-9], "application/json"))
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), TEXT)


@CLIENTS
@UPSTREAMS
def test_a_json_answer_to_a_stream_request_becomes_a_stream(pair, client_wire, upstream_wire):
    """Trap 12."""
    always(pair.first, fake.json_answer(200, fake.WHOLES[upstream_wire]("whole", tool_calls=[("f", {"a": 1})])))
    reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    told = assert_answer(client_wire, reply, "whole")
    assert told.complete
    assert b'"f"' in reply.body


@pytest.mark.parametrize(
    ("client_wire", "upstream_wire"), [("openai", "openai"), ("anthropic", "responses"), ("responses", "anthropic")]
)
def test_json_that_calls_itself_a_stream_is_read_as_the_json_it_is(pair, client_wire, upstream_wire):
    """Trap 12: an answer becomes a stream, an error keeps its words and what they mean."""
    kind = "text/event-stream"
    whole = json.dumps(fake.WHOLES[upstream_wire]("whole")).encode()
    always(pair.first, fake.chunked_answer(200, [b"\n \n", whole[:9], whole[9:]], {}, kind))
    assert assert_answer(client_wire, post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True), "whole").complete
    assert pair.calls() == (1, 0)
    always(pair.first, fake.body_answer(200, b'{"error": {"message": "no more", "type": "insufficient_quota"}}', kind))
    reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True)
    assert "no more" in reply.text
    assert pair.calls() == (2, 0)


@pytest.mark.parametrize(
    ("client_wire", "upstream_wire"), [("openai", "openai"), ("anthropic", "responses"), ("responses", "anthropic")]
)
def test_a_complete_answer_whose_connection_stays_open_ends_for_the_client(pair, client_wire, upstream_wire):
    """Traps 9, 10. All of it comes at once, while it is still held back."""
    always(pair.first, fake.sse_answer([b"".join(fake.STREAMS[upstream_wire]("brief"))], end="hang"))
    reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True)
    assert assert_answer(client_wire, reply, "brief").complete
    assert reply.ended == "clean"


@UPSTREAMS
def test_a_whole_answer_to_a_stream_request_ends_with_the_usage_that_was_asked_for(pair, upstream_wire):
    """Traps 12, 56."""
    always(pair.first, fake.json_answer(200, fake.WHOLES[upstream_wire]("whole")))
    for wanted in (True, False):
        options = {"stream_options": {"include_usage": wanted}}
        reply = post(pair.router, "openai", "a-%s/solo" % upstream_wire, True, **options)
        told = [data["usage"]["total_tokens"] for data in reply.datas if isinstance(data, dict) and data.get("usage")]
        assert told == ([18] if wanted else [])


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json", "text/plain"])
@CLIENTS
@UPSTREAMS
def test_a_stream_answer_to_a_plain_request_becomes_one_body(pair, client_wire, upstream_wire, content_type):
    """Trap 11."""
    always(
        pair.first, fake.sse_answer(fake.STREAMS[upstream_wire]("in pieces"), headers={"content-type": content_type})
    )
    reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire)
    assert reply.headers["content-type"] == "application/json"
    assert_answer(client_wire, reply, "in pieces")


@pytest.mark.parametrize("first", ["id: 1\n", "retry: 9\n", ": a comment\n\n", "\ufeff", "id:1\n:HTTP_STATUS/200\n", "\n\n"])
@pytest.mark.parametrize("content_type", ["text/event-stream", "text/plain"])
def test_a_stream_answer_to_a_plain_request_is_known_by_whatever_field_it_begins_with(pair, first, content_type):
    """Traps 4, 5, 11."""
    events = [first.encode(), *fake.STREAMS["openai"]("in pieces")]
    always(pair.first, fake.sse_answer(events, headers={"content-type": content_type}))
    assert_answer("anthropic", post(pair.router, "anthropic", "a-openai/to-openai"), "in pieces")
    assert pair.calls() == (1, 0)


@CLIENTS
@UPSTREAMS
def test_a_stream_answer_to_a_plain_request_that_ends_in_an_error_leads_to_the_fallback(
    pair, client_wire, upstream_wire
):
    """Traps 11, 14."""
    events = fake.STREAMS[upstream_wire]("half")
    start = events[: next(n for n, event in enumerate(events) if b"half" in event) + 1]
    for fault in (start + [stream_error(upstream_wire)], start):
        pair.clear()
        always(pair.first, fake.sse_answer(fault))
        reply = post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire)
        assert_answer(client_wire, reply, TEXT)


@pytest.mark.parametrize(
    ("upstream_wire", "odd"),
    [
        ("openai", b": OPENROUTER PROCESSING\n\n"),
        ("openai", b"data: {broken\n\n"),
        ("openai", b'data: {"choices": [], "prompt_filter_results": []}\n\n'),
        ("openai", b"id: 7\nretry: 10\nevent: message\n"),
        ("anthropic", b'event: ping\ndata: {"type": "ping"}\n\n'),
        ("anthropic", b'event: new_kind\ndata: {"type": "new_kind"}\n\n'),
        ("responses", b'event: response.new\ndata: {"type": "response.new", "sequence_number": 1}\n\n'),
    ],
)
@CLIENTS
def test_an_odd_event_in_a_stream_harms_nothing(pair, upstream_wire, odd, client_wire):
    """Traps 4, 5, 13, 15, 16."""
    events = fake.STREAMS[upstream_wire]("fine")
    always(pair.first, fake.sse_answer([odd, events[0], odd, *events[1:]]))
    reply = post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True)
    if client_wire == upstream_wire and b"broken" in odd:
        assert reply.ended == "clean"
        assert b"fine" in reply.body
    else:
        assert_answer(client_wire, reply, "fine")


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
@CLIENTS
@UPSTREAMS
def test_other_line_ends_and_missing_spaces_are_read_as_well(pair, client_wire, upstream_wire, newline):
    """Traps 2, 3, also with a CR at the end of a chunk."""
    raw = b"".join(fake.STREAMS[upstream_wire]("fine 東")).replace(b"data: ", b"data:").replace(b"\n", newline)
    pair.first.answer(fake.sse_answer([raw[at : at + 3] for at in range(0, len(raw), 3)]))
    assert_answer(client_wire, post(pair.router, client_wire, "a-%s/solo" % upstream_wire, True), "fine 東")


# --- empty answers ---


@STREAMED
@CLIENTS
@UPSTREAMS
def test_an_empty_answer_leads_to_the_fallback_after_one_call(pair, client_wire, upstream_wire, stream):
    """Trap 138."""
    always(pair.first, fake.model_answer(upstream_wire, stream, ""))
    reply = post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire, stream)
    assert_answer(client_wire, reply, TEXT)
    assert pair.calls() == (1, 1)
    assert attempts_of(reply)[0] == ("a-%s/to-openai" % upstream_wire, "empty")


@STREAMED
@CLIENTS
@UPSTREAMS
def test_when_every_answer_is_empty_the_empty_answer_is_the_answer(pair, client_wire, upstream_wire, stream):
    """Traps 139, 140: nothing is invented."""
    always(pair.first, fake.model_answer(upstream_wire, stream, ""))
    always(pair.second, lambda call: fake.model_answer(call.wire, stream, ""))
    assert_answer(client_wire, post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire, stream), "")
    assert pair.calls() == (1, 1)


def test_an_empty_answer_to_a_tool_result_is_taken_as_it_is(pair):
    always(pair.first, fake.json_answer(200, fake.chat_whole("")))
    history = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai", messages=history), "")
    assert pair.calls() == (1, 0)


def test_empty_answers_touch_nobodys_health(remembering):
    """Trap 140."""
    pair = remembering()
    for _ in range(4):
        pair.first.answer(fake.json_answer(200, fake.chat_whole("")))
        post(pair.router, "openai", "a-openai/to-openai")
    assert_answer("openai", post(pair.router, "openai", "a-openai/to-openai"), "first")


@pytest.mark.parametrize("fields", [{"tool_calls": [("f", {})]}, {"reasoning": "hm, hm"}], ids=["tool", "reasoning"])
@STREAMED
@CLIENTS
@UPSTREAMS
def test_a_tool_call_or_reasoning_alone_is_content(pair, client_wire, upstream_wire, stream, fields):
    always(pair.first, fake.model_answer(upstream_wire, stream, "", **fields))
    reply = post(pair.router, client_wire, "a-%s/to-openai" % upstream_wire, stream)
    assert reply.status == 200
    assert pair.calls() == (1, 0)


# --- timeouts ---


@STREAMED
def test_a_silent_origin_times_out_once_and_the_fallback_answers(impatient, stream):
    always(impatient.first, fake.hang_before_head())
    began = time.monotonic()
    reply = post(impatient.router, "openai", "a-openai/to-openai", stream)
    assert_answer("openai", reply, TEXT)
    assert 0.3 <= time.monotonic() - began < 30  # it may take 120 s by default
    assert attempts_of(reply)[0] == ("a-openai/to-openai", "timeout")
    assert len(attempts_of(reply)) == 2 and len(impatient.second.calls) == 1
    for call in impatient.first.calls:  # none where a busy machine had no time to take it
        assert call.closed.wait(20)


def test_comments_and_life_cycle_events_do_not_stop_the_clock_for_the_first_content(router, make_upstream):
    """Traps 131, 157, 158: the last candidate gets all the time it needs."""
    first, second = make_upstream(), make_upstream()
    running = router(pair_config(first, second), *QUICK, "--first-content-timeout-ms=250")
    for wire in WIRES:
        first.answer(fake.sse_answer(before_content(wire) + [b": still here\n\n"] * 1000, delay=0.02))
        second.answer(fake.sse_answer([fake.Wait(0.4)] + fake.STREAMS[wire](TEXT)))
        began = time.monotonic()
        reply = post(running, wire, "a-%s/to-%s" % (wire, wire), True)
        assert_answer(wire, reply, TEXT)
        assert attempts_of(reply)[0][1] == "timeout"
        assert time.monotonic() - began >= 0.6


def test_a_stream_with_a_byte_now_and_then_is_not_cut_by_the_idle_timeout(router, make_upstream):
    """Hardening, proxies 18; trap 160."""
    first, second = make_upstream(), make_upstream()
    running = router(pair_config(first, second), *QUICK, "--idle-timeout-ms=1000")
    always(first, fake.sse_answer(fake.chat_stream("slow but good"), delay=0.2))
    assert_answer("openai", post(running, "openai", "a-openai/to-openai", True), "slow but good")
    always(first, fake.drip(fake.json_answer(200, fake.chat_whole("slow")), 55, 0.2))
    assert_answer("openai", post(running, "openai", "a-openai/to-openai"), "slow")


@STREAMED
def test_a_total_timeout_ends_even_an_answer_that_goes_on(router, make_upstream, stream):
    first, second = make_upstream(), make_upstream()
    running = router(pair_config(first, second), *QUICK, "--total-timeout-ms=1000")
    endless = fake.chat_stream("x" * 600)
    first.handler = lambda call: (
        fake.sse_answer(endless, delay=0.05)
        if stream
        else fake.drip(fake.json_answer(200, fake.chat_whole("x" * 600)), 10, 0.05)
    )
    reply = post(running, "openai", "a-openai/solo", stream)
    if stream:
        assert_stream_error("openai", reply)
    else:
        assert reply.status == 504
    assert first.calls[0].closed.wait(20)


def test_a_provider_may_have_its_own_timeouts(router, make_upstream):
    first, second = make_upstream(), make_upstream(fake.final_text(TEXT))
    config = pair_config(first, second)
    timeouts = {"a-openai": {"firstByteMs": 150}, "a-anthropic": {"totalMs": 150}, "a-responses": {"idleMs": 150}}
    for entry in config["providers"]:
        entry["timeouts"] = timeouts.get(entry["id"], {})
    running = router(config, *QUICK)
    first.answer(
        fake.hang_before_head(),
        fake.sse_answer(before_content("anthropic") + [b": still here\n\n"] * 1000, delay=0.02),
        fake.sse_answer(before_content("responses"), end="hang"),
    )
    for wire in WIRES:
        began = time.monotonic()
        reply = post(running, wire, "a-%s/to-openai" % wire, True)
        assert_answer(wire, reply, TEXT)
        assert attempts_of(reply)[0][1] == "timeout"
        assert time.monotonic() - began < 15  # it may take 120 s by default


# --- early commit by keep-alives ---


@pytest.fixture(scope="module")
def shared_committed(tmp_path_factory):
    """A router that opens a stream after 30 ms of silence."""
    yield from start_pair(tmp_path_factory, "--keepalive-ms=30")


@pytest.fixture
def committed(shared_committed):
    with shared_committed.scripted():
        yield shared_committed


def early(pair, client_wire, model, answer):
    """(Stream, Reply) of a request whose head was there before the first upstream gave its answer."""
    gate = threading.Event()
    always(pair.first, fake.gated(answer, gate))
    stream = pair.router.open(PATHS[client_wire], ask(client_wire, model, stream=True))
    gate.set()
    return stream, stream.read_rest()


@CLIENTS
@UPSTREAMS
def test_after_an_early_commit_a_failure_still_falls_back(committed, client_wire, upstream_wire):
    """Traps 132, 133: only comments were sent, so nothing is lost."""
    stream, reply = early(committed, client_wire, "a-%s/to-openai" % upstream_wire, fake.error_answer(upstream_wire, 500))
    assert stream.headers["x-llm-router-attempts"] is None
    assert_answer(client_wire, reply, TEXT)
    assert reply.comments
    assert committed.calls() == (3, 1)
    line = committed.router.wait_log(reply.headers["x-llm-router-request-id"])
    assert line.count("=500") == 3


# How a stream ends that held nothing but the error: a `response.failed` ends a Response as it should, and behind a cut
# Codex forgets it, sends the request again and again, and shows a "Transport error" in the end.
END_OF_ERROR = {"openai": "cut", "anthropic": "cut", "responses": "clean"}


@CLIENTS
def test_after_an_early_commit_an_exhausted_chain_is_told_in_the_stream(committed, client_wire):
    always(committed.second, fake.error_answer("anthropic", 503))
    _, reply = early(committed, client_wire, "a-openai/to-anthropic", fake.error_answer("openai", 500))
    told = assert_stream_error(client_wire, reply, END_OF_ERROR[client_wire])
    assert "b-anthropic/m=503" in told.error["message"]
    assert "error" in [name for name, _ in reply.events] or client_wire != "anthropic"


@CLIENTS
def test_after_an_early_commit_an_invalid_request_is_told_in_the_stream(committed, client_wire):
    _, reply = early(committed, client_wire, "a-openai/to-anthropic", fake.error_answer("openai", 400, "no such field"))
    told = assert_stream_error(client_wire, reply, END_OF_ERROR[client_wire])
    assert "no such field" in told.error["message"]
    assert committed.calls() == (1, 0)


def test_a_request_that_took_long_to_arrive_is_still_refused_by_its_status(committed):
    """The silence counts from its head on, but nobody asks an upstream."""
    body = json.dumps(dict(ask("anthropic", "a-openai/to-openai", stream=True), thread={"type": "new"})).encode()
    head = "POST %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", committed.router.port), timeout=30) as client:
        client.sendall((head % (PATHS["anthropic"], len(body))).encode() + body[:9])
        time.sleep(0.1)  # more than 30 ms
        client.sendall(body[9:])
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")


# --- where the bytes come from: nothing but the configured place ---


@STREAMED
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(pair, make_upstream, status, stream):
    """Hardening 22, 32."""
    decoy = make_upstream()
    always(pair.first, fake.redirect_answer(decoy.url + "/v1/chat/completions", status))
    reply = post(pair.router, "openai", "a-openai/to-openai", stream)
    assert_answer("openai", reply, TEXT)
    assert (decoy.connections, pair.calls()) == (0, (1, 1))
    assert reply.headers.get("location") is None


def test_nothing_in_a_request_chooses_where_it_goes_or_which_key_is_sent(pair, make_upstream):
    """Hardening 1, 2, 23."""
    decoy = make_upstream()
    fields = dict.fromkeys(("api_base", "base_url", "proxy", "endpoint", "url"), decoy.url)
    fields.update(api_key="stolen", custom_llm_provider="x", extra_headers={"authorization": "Bearer stolen"})
    content = [{"type": "image_url", "image_url": {"url": decoy.url + "/i.png"}}, {"type": "text", "text": "hi"}]
    headers = {"x-portkey-custom-host": decoy.url, "x-forwarded-host": decoy.url, "x-base-url": decoy.url}
    messages = [{"role": "user", "content": content}]
    for wire in ("openai", "anthropic"):
        post(pair.router, "openai", "a-%s/solo" % wire, headers=headers, messages=messages, **fields)
    assert decoy.connections == 0
    assert pair.first.calls[0].header("authorization") == "Bearer first-provider-key"


@pytest.mark.skipif(not fake.can_tls(), reason="a certificate takes the openssl program")
def test_an_upstream_with_an_untrusted_certificate_gets_no_key_and_the_fallback_answers(router, make_upstream):
    """Hardening 34."""
    first, second = make_upstream(tls=True), make_upstream(fake.final_text(TEXT))
    running = router(pair_config(first, second), *QUICK)
    reply = post(running, "openai", "a-openai/to-openai")
    assert_answer("openai", reply, TEXT)
    assert attempts_of(reply)[0] == ("a-openai/to-openai", "tls")
    assert first.calls == []


@pytest.mark.skipif(not fake.can_tls(), reason="a certificate takes the openssl program")
@STREAMED
def test_an_upstream_with_a_trusted_certificate_answers_over_tls(router, make_upstream, stream):
    first = make_upstream(fake.final_text(TEXT * 200), tls=True)
    running = router(config_of(provider(first)), env={"SSL_CERT_FILE": first.cafile})
    for _ in range(3):
        assert_answer("openai", post(running, "openai", "fake/fake-model", stream), TEXT * 200)
    assert first.connections == 1


def test_a_refused_connection_and_an_unknown_name_lead_to_the_fallback(router, make_upstream):
    first, second = make_upstream(), make_upstream(fake.final_text(TEXT))
    config = pair_config(first, second)
    config["providers"][0]["baseUrl"] = "http://127.0.0.1:%d/v1" % fake.dead_port()
    config["providers"][2]["baseUrl"] = "http://no-such-name.invalid/v1"
    running = router(config, *QUICK)
    for id, label in ((config["providers"][0]["id"], "refused"), (config["providers"][2]["id"], "dns")):
        reply = post(running, "openai", id + "/to-openai")
        assert_answer("openai", reply, TEXT)
        assert attempts_of(reply)[:-1] == [(id + "/to-openai", label)] * 3


def test_an_address_that_never_answers_costs_one_connect_timeout(router, make_upstream):
    first, second = make_upstream(), make_upstream(fake.final_text(TEXT))
    with fake.blackhole() as port:
        config = pair_config(first, second)
        config["providers"][0]["baseUrl"] = "http://127.0.0.1:%d/v1" % port
        running = router(config, *QUICK, "--connect-timeout-ms=300", "--origin-retry-attempts=1")
        began = time.monotonic()
        reply = post(running, "openai", "a-openai/to-openai")
        assert_answer("openai", reply, TEXT)
        assert attempts_of(reply)[0] == ("a-openai/to-openai", "connect_timeout")
        assert 0.3 <= time.monotonic() - began < 8  # 10 s by default


def test_an_error_that_drips_is_read_for_a_moment_only():
    """It says enough by then, and the next candidate waits."""
    moments = iter(range(10**9))
    exchange = r.Exchange.__new__(r.Exchange)
    exchange._host, exchange._until = SimpleNamespace(now=lambda: next(moments)), math.inf

    async def read(timeout_s):
        if timeout_s <= 0:
            raise r.UpstreamError("no sign of more of the answer", "timeout", True)
        return b"."

    assert 0 < len(asyncio.run(exchange._read_error(SimpleNamespace(read=read)))) < 10


@pytest.mark.parametrize("wire", WIRES)
def test_a_stream_answer_to_a_plain_request_is_over_at_its_own_end_though_its_connection_goes_on(wire):
    """Traps 9, 11: the idle timeout is for what has not said its end."""
    pieces, answers, waits = fake.STREAMS[wire]("all of it"), [], []

    async def read(timeout_s):
        waits.append(timeout_s)
        if len(waits) > len(pieces):
            raise r.UpstreamError("silence", "timeout", True)
        return pieces[len(waits) - 1]

    async def send(outbound):
        return SimpleNamespace(status=200, headers=[], read=read, close=lambda: None)

    async def respond(status, headers, body):
        answers.append((status, body))

    async def read_body():
        return json.dumps(ask("openai", "a/m")).encode()

    config = r.read_config(config_of(provider("http://127.0.0.1:1/v1", id="a", formats=[wire], models=["m"])), {})
    host = SimpleNamespace(now=lambda: 1.0, wall=lambda: 1.0, jitter=lambda: 0.5, new_id=lambda: "req_1", send=send)
    host.record = lambda trail: None
    gateway = r.Gateway(r.Routes(config), r.Settings(), r.Access(), host, r.HealthBook())
    client = SimpleNamespace(respond=respond, is_open=False, host_stops=False)
    asyncio.run(gateway.handle(r.Call("POST", PATHS["openai"], "", [("host", "localhost")], read_body), client))
    ((status, body),) = answers
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "all of it")
    assert waits[0] == 120 and waits[-1] == 2


def aside_of(done):
    """A host's `aside`, which notes what is worked there."""

    async def aside(work, *arguments):
        done.append(work.__name__)
        return work(*arguments)

    return aside


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("operation", ["chat", "embeddings", "count_tokens"])
def test_what_takes_long_on_a_large_body_holds_up_no_other_request(operation, is_large, monkeypatch):
    """300,000 numbers of embeddings took a third of a second in which no stream went on, counting 8 MB half of one."""
    monkeypatch.setattr(r, "LARGE_BODY_BYTES", 50 if is_large else 100_000)
    done, answers = [], []
    vector = json.dumps({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5] * 20}]})
    whole = iter([(vector if operation == "embeddings" else json.dumps(fake.chat_whole("hi"))).encode(), b""])

    async def read(timeout_s):
        return next(whole)

    async def send(outbound):
        return SimpleNamespace(status=200, headers=[], read=read, close=lambda: None)

    async def respond(status, headers, body):
        answers.append(status)

    async def read_body():
        return json.dumps({"model": "a/m", "messages": [{"role": "user", "content": "hi"}], "input": "x"}).encode()

    config = r.read_config(config_of(provider("http://127.0.0.1:1/v1", id="a", models=["m"])), {})
    host = SimpleNamespace(now=lambda: 1.0, wall=lambda: 1.0, jitter=lambda: 0.5, new_id=lambda: "req_1", send=send)
    host.record, host.aside = lambda trail: None, aside_of(done)
    gateway = r.Gateway(r.Routes(config), r.Settings(), r.Access(), host, r.HealthBook())
    client = SimpleNamespace(respond=respond, is_open=False, host_stops=False)
    path = {"chat": "/anthropic/v1/messages", "embeddings": "/v1/embeddings"}.get(operation)
    call = r.Call("POST", path or "/v1/messages/count_tokens", "", [("host", "localhost")], read_body)
    asyncio.run(gateway.handle(call, client))
    counted = ["estimate_tokens"] * (operation == "count_tokens")
    answered = ["make", "try_json"] * (operation != "count_tokens")
    assert (answers, done) == ([200], ["read_inbound", *answered, *counted] if is_large else counted)


@pytest.mark.parametrize("operation", ["count_tokens", "chat"])
def test_a_plight_of_the_routers_own_is_told_as_that_and_counting_goes_on(operation):
    """Without a free file descriptor a count of tokens is estimated, and no upstream or client is blamed."""
    recorded, answers = [], []

    async def send(outbound):
        raise r.RouterError("the router has no file descriptor left for a connection", 503, "overloaded")

    async def respond(status, headers, body):
        answers.append((status, json.loads(body)))

    async def read_body():
        return json.dumps({"model": "a/m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}).encode()

    fake_one = provider("http://127.0.0.1:1/v1", id="a", formats=["anthropic"], models=["m"])
    config = r.read_config(config_of(fake_one), {})
    host = SimpleNamespace(now=lambda: 1.0, wall=lambda: 1.0, jitter=lambda: 0.5, new_id=lambda: "req_1", send=send)
    host.record, book, host.aside = recorded.append, r.HealthBook(), aside_of([])
    gateway = r.Gateway(r.Routes(config), r.Settings(), r.Access(), host, book)
    path = "/v1/messages" + "/count_tokens" * (operation == "count_tokens")
    client = SimpleNamespace(respond=respond, is_open=False, host_stops=False)
    asyncio.run(gateway.handle(r.Call("POST", path, "", [("host", "localhost")], read_body), client))
    ((status, body),) = answers
    assert book.known() == []
    if operation == "count_tokens":
        assert status == 200 and body["input_tokens"] > 0
    else:
        assert (status, [attempt.label for attempt in recorded[0].attempts]) == (503, ["overloaded"])
