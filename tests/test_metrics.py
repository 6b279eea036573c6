"""What an operator sees: every request as one line in the log and as numbers in /metrics (README, Seeing what happened)."""

import json
import re
import threading

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import PATHS, WIRES, ask, post, until
from running_router import config_of, provider

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (-?[0-9.e+]+)')
QUICK = ("--origin-retry-base-delay-ms=20", "--origin-retry-max-delay-ms=20", "--watch-config=false")


def two(upstream):
    models = [{"id": "m", "fallbackModels": ["b/m"]}]
    return config_of(provider(upstream, id="a", models=models), provider(upstream, id="b", models=["m"]))


class Numbers(dict):
    """The samples of an exposition (Prometheus text format 0.0.4) by name and sorted labels, and the type of each
    family; AssertionError for text that is none."""

    def __init__(self, text):
        self.types = {}
        assert text.endswith("\n")
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, family, kind = line.split()
                assert family not in self.types
                self.types[family] = kind
                continue
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert re.sub("_(bucket|sum|count)$", "", name) == list(self.types)[-1] or name == list(self.types)[-1]
            key = name, tuple(sorted(re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', labels or "")))
            assert key not in self
            self[key] = float(value)

    def of(self, name, **labels):
        return self.get((name, tuple(sorted(labels.items()))), 0)


def numbers(router):
    reply = router.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Numbers(reply.text)


def test_requests_attempts_tokens_and_times_are_counted(router, upstream):
    running = router(two(upstream), *QUICK)
    upstream.answer(fake.json_answer(500, {"error": {"message": "once"}}))
    post(running, "openai", "a/m")
    post(running, "anthropic", "a/m", stream=True)
    upstream.answer(fake.json_answer(400, {"error": {"message": "no"}}))
    post(running, "openai", "a/m")
    found = numbers(running)
    assert found.of("llm_router_requests_total", format="openai", operation="chat", status="200") == 1
    assert found.of("llm_router_requests_total", format="openai", operation="chat", status="400") == 1
    assert found.of("llm_router_requests_total", format="anthropic", operation="chat", status="200") == 1
    assert found.of("llm_router_attempts_total", model="a/m", outcome="temporary") == 1
    assert found.of("llm_router_attempts_total", model="a/m", outcome="ok") == 2
    assert found.of("llm_router_attempts_total", model="a/m", outcome="invalid") == 1
    assert found.of("llm_router_tokens_total", kind="input") == 22
    assert found.of("llm_router_tokens_total", kind="output") == 14
    for family, wire, count in (("request", "openai", 2), ("request", "anthropic", 1), ("first_content", "openai", 1)):
        name = "llm_router_%s_seconds" % family
        assert found.types[name] == "histogram" and found.of(name + "_count", format=wire) == count
        buckets = [v for (n, labels), v in found.items() if n == name + "_bucket" and ("format", wire) in labels]
        assert buckets == sorted(buckets) and buckets[-1] == count
        assert found.of(name + "_bucket", format=wire, le="+Inf") == count
    assert found.types["llm_router_requests_total"] == found.types["llm_router_tokens_total"] == "counter"


def test_a_histogram_sums_up_seconds():
    metrics = r.Metrics()
    for total_ms, first_ms in ((1500, 250), (500, None)):
        trail = r.Trail("req_1", 0.0, 0.0)
        trail.wire, trail.operation, trail.status = "openai", "chat", 200
        trail.total_ms, trail.first_content_ms = total_ms, first_ms
        metrics.count(trail, ())
    found = Numbers(metrics.render({}))
    assert found.of("llm_router_request_seconds_sum", format="openai") == 2.0
    assert found.of("llm_router_first_content_seconds_sum", format="openai") == 0.25
    assert found.of("llm_router_request_seconds_bucket", format="openai", le="0.5") == 1


def test_health_and_open_streams_are_shown_as_they_are_now(router, upstream):
    running = router(two(upstream), *QUICK, "--origin-retry-attempts=1", "--fallback-circuit-failures=1")
    upstream.answer(fake.json_answer(500, {"error": {"message": "down"}}))
    post(running, "openai", "a/m")
    found = numbers(running)
    assert (
        found.of("llm_router_circuit_open", model="a/m") == 1 and found.of("llm_router_circuit_open", model="b/m") == 0
    )
    assert 0 < found.of("llm_router_cooldown_seconds", model="a/m") <= 45
    assert ("llm_router_cooldown_seconds", (("model", "b/m"),)) in found
    gate = threading.Event()
    events = fake.chat_stream("hi")
    upstream.answer(fake.sse_answer([*events[:-1], fake.Gate(gate), *events[-1:]]))
    stream = running.open(PATHS["openai"], ask("openai", "b/m", stream=True))
    assert stream.read_until("hi")
    assert numbers(running).of("llm_router_open_streams") == 1
    stream.close()
    gate.set()
    assert until(lambda: numbers(running).of("llm_router_open_streams") == 0)


def test_a_count_of_tokens_that_no_float_can_hold_leaves_the_metrics_readable(router, upstream):
    answer = json.dumps(fake.chat_whole("hi")).replace('"prompt_tokens": 11', '"prompt_tokens": ' + "9" * 400)
    upstream.handler = lambda call: fake.text_answer(200, answer, content_type="application/json")
    running = router(config_of(provider(upstream)))
    assert post(running, "anthropic").status == 200
    told = running.get("/metrics")
    assert (told.status, 'llm_router_tokens_total{kind="output"} 7' in told.text) == (200, True)


def test_names_that_a_client_makes_up_are_no_labels(router, upstream):
    running = router(config_of(provider(upstream, models=["*"])), *QUICK)
    for name in ("one", "two", 'th"ree'):
        post(running, "openai", "fake/" + name)
    text = running.get("/metrics").text
    assert 'llm_router_attempts_total{model="fake/*",outcome="ok"} 3\n' in text
    assert "one" not in re.findall(r'model="([^"]*)"', text) and "ree" not in text


@pytest.mark.parametrize("flag", ["--log-format=text", "--log-format=json"])
def test_a_request_is_one_line_with_all_that_matters(router, upstream, flag):
    running = router(two(upstream), *QUICK, "--origin-retry-attempts=2", flag)
    for _ in range(2):
        upstream.answer(fake.json_answer(500, {"error": {"message": "oh\nno"}}))
    id = post(running, "anthropic", "a/m", stream=True).headers["x-llm-router-request-id"]
    line = running.wait_log(id)
    assert sum(id in line for line in running.log()) == 1
    if flag.endswith("json"):
        told = json.loads(line)
        assert (told["format"], told["asked"], told["model"], told["status"]) == ("anthropic", "a/m", "b/m", 200)
        waits = [(one["label"], one["wait_ms"] > 0, one["decision"][:8]) for one in told["attempts"]]
        assert waits == [("500", False, "retry in"), ("500", True, "fall bac"), ("ok", False, "")]
        assert told["usage"]["input"] == 11 and told["total_ms"] >= told["first_content_ms"] > 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}Z", told["time"]) and told["stream"] is True
        return
    words = r"\S+Z %s anthropic~ a/m 200 ok \[a/m=500 \d+ms -> retry in \d+ ms; a/m=500 after \d+ms \d+ms" % id
    assert re.fullmatch(words + r" -> fall back to b/m; b/m=ok \d+ms\] tokens=11>7 first=\d+ms total=\d+ms", line)


@pytest.mark.parametrize(
    ("method", "path", "status", "outcome"),
    [
        ("POST", "/v1/chat/completions", 401, "invalid_api_key"),
        ("GET", "/v1/models", 401, "invalid_api_key"),
        ("POST", "/nowhere", 404, "unknown_path"),
        ("DELETE", "/v1/messages", 405, "method_not_allowed"),
    ],
)
def test_what_is_refused_at_the_door_is_counted_and_logged_but_crowds_nothing_out(
    router, upstream, method, path, status, outcome
):
    running = router(config_of(provider(upstream), masterKey="the-key"), "--require-auth=true", *QUICK)
    shown = {"authorization": "Bearer the-key"}
    offered = shown if status != 401 else {"authorization": "Bearer guessed-key"}
    reply = running.request(method, path, b"{}" if method == "POST" else None, offered)
    assert reply.status == status
    line = running.wait_log(reply.headers["x-llm-router-request-id"])
    assert " %d %s " % (status, outcome) in line and "guessed-key" not in line
    text = running.get("/metrics", shown).text
    assert re.search(r'requests_total\{format="[a-z]+",operation="refused",status="%d"\} 1\n' % status, text)
    assert running.get("/health", shown).status == 200
    entry = r.read_instances(str(running.home / ".llm-router.runtime.json"))[0]
    with pytest.raises(r.RouterError, match="not remembered"):
        r.ask_instance(entry, "trail/last")


def test_a_head_that_is_no_request_is_logged_and_counted_and_crowds_nothing_out(router, upstream):
    """Behind a proxy the log is all that an operator sees of it."""
    running = router(config_of(provider(upstream)), *QUICK)
    heads = {
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n": "400 bad_request_line",
        b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 10_000): "414 request_line_too_long",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n" % (b"secret" * 20_000): "431 ",
        b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n": "501 ",
        b"GET / HTTP/3.0\r\nHost: a\r\n\r\n": "505 ",
    }
    for head, words in heads.items():
        answer, _, body = running.raw(head).partition(b"\r\n\r\n")
        id = re.search(rb"x-llm-router-request-id: (req_\w+)", answer).group(1).decode()
        wire = "anthropic" if b"messages" in head else "openai"
        assert (json.loads(body).get("request_id") == id) is (wire == "anthropic")
        line = running.wait_log(id)
        assert " %s - %s" % (wire, words) in line and "secret" not in line
    text = running.get("/metrics").text
    assert 'requests_total{format="openai",operation="refused",status="414"} 1\n' in text
    assert running.get("/health").status == 200
    entry = r.read_instances(str(running.home / ".llm-router.runtime.json"))[0]
    with pytest.raises(r.RouterError, match="not remembered"):
        r.ask_instance(entry, "trail/last")


def test_a_body_that_is_no_request_is_logged_in_the_client_s_format(router, upstream):
    running = router(config_of(provider(upstream)), *QUICK)
    for wire in WIRES:
        reply = running.post(PATHS[wire], b"{broken")
        line = running.wait_log(reply.headers["x-llm-router-request-id"])
        assert " %s - 400 " % wire in line
