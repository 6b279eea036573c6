"""What a client sees for each way an origin fails. README's scenario table is written from these rows (test_readme.py)."""

import pytest

import fake_upstream as fake
from running_router import config_of, provider

GOOD = "the answer of the fallback"
RATE = {"retry-after": "7"}
QUICK = ("--origin-retry-base-delay-ms=5", "--first-byte-timeout-ms=400", "--idle-timeout-ms=400", "--keepalive-ms=0")


def error(status, message="no", kind="api_error", headers=None):
    return fake.error_answer("openai", status, message, kind, tuple((headers or {}).items()))


def cut_after(text):
    return fake.sse_answer(fake.chat_stream(text, done=False)[:-2], end="cut")


# the origin ... | its answers | streamed | status, text (None: an error) and end the client sees | calls to origin, fallback
SCENARIOS = [
    ("answers 429 with Retry-After 7", [error(429, headers=RATE)], False, (200, GOOD, "clean"), (1, 1)),
    ("answers 500 every time", [error(500)] * 3, False, (200, GOOD, "clean"), (3, 1)),
    ("answers 500, then recovers", [error(500), fake.model_answer("openai", False, "hi")], False, (200, "hi", "clean"), (2, 0)),
    ("answers 402", [error(402)], False, (200, GOOD, "clean"), (1, 1)),
    ("answers 401 (its key is dead)", [error(401)], False, (200, GOOD, "clean"), (1, 1)),
    ("answers 404 (no such model)", [error(404)], False, (200, GOOD, "clean"), (1, 1)),
    ("answers 400 (bad request)", [error(400)], False, (400, None, "clean"), (1, 0)),
    ("answers 403 with moderation words", [error(403, "flagged by moderation")], False, (403, None, "clean"), (1, 0)),
    ("answers 400: credit balance is too low", [error(400, "Your credit balance is too low")], False, (200, GOOD, "clean"), (1, 1)),
    ("answers 400: maximum context length", [error(400, "maximum context length is 10")], False, (400, None, "clean"), (1, 0)),
    ("answers 200 with an HTML page", [fake.text_answer(200, "<html>", content_type="text/html")] * 3, False, (200, GOOD, "clean"), (3, 1)),
    ("answers 200 with an error inside", [fake.json_answer(200, {"error": {"message": "x"}})] * 3, False, (200, GOOD, "clean"), (3, 1)),
    ("answers 200 with nothing in it", [fake.model_answer("openai", False, "")], False, (200, GOOD, "clean"), (1, 1)),
    ("redirects", [fake.redirect_answer("http://127.0.0.1:9/")], False, (200, GOOD, "clean"), (1, 1)),
    ("closes before any answer", [fake.close_before_head()] * 3, False, (200, GOOD, "clean"), (3, 1)),
    ("says nothing for too long", [fake.hang_before_head()], True, (200, GOOD, "clean"), (1, 1)),
    ("streams an error as its first event", [fake.sse_answer([fake.sse('{"error": {"message": "x"}}')])] * 3, True, (200, GOOD, "clean"), (3, 1)),
    ("streams an empty answer", [fake.model_answer("openai", True, "")], True, (200, GOOD, "clean"), (1, 1)),
    ("breaks off before the first content", [cut_after("")] * 3, True, (200, GOOD, "clean"), (3, 1)),
    ("breaks off after some content", [cut_after("half an answer")], True, (200, None, "cut"), (1, 0)),
]  # fmt: skip


def scenario_table():
    """The rows of README's table."""
    rows = ["| the origin ... | the client sees | calls: origin, fallback |", "|---|---|---|"]
    for title, _, stream, (status, text, end), (first, second) in SCENARIOS:
        if end == "cut":
            seen = "what came, an error in the stream, a cut connection"
        else:
            seen = "%d, %s" % (
                status,
                "the error unchanged" if text is None else "the fallback's answer" if second else "its answer",
            )
        rows.append("| %s%s | %s | %d, %d |" % (title, " (streamed)" if stream else "", seen, first, second))
    return rows


@pytest.mark.parametrize("row", SCENARIOS, ids=[row[0] for row in SCENARIOS])
@pytest.mark.parametrize("client", ["openai", "anthropic"])
def test_the_client_sees_what_the_readme_says(row, client, router, make_upstream):
    """Traps 122, 123, 130, 131, 134, 138, 141, 167."""
    _, answers, stream, (status, text, end), calls = row
    origin, second = make_upstream(), make_upstream(fake.final_text(GOOD))
    origin.answer(*answers)
    origin_model = {"id": "m1", "fallbackModels": ["b/m2"]}
    running = router(
        config_of(provider(origin, "openai", "a", [origin_model]), provider(second, "openai", "b", ["m2"])), *QUICK
    )
    body = {"model": "a/m1", "stream": stream, "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}
    path = {"openai": "/openai/v1/chat/completions", "anthropic": "/anthropic/v1/messages"}[client]
    reply = running.post(path, body, stream=stream)
    assert (reply.status, reply.ended) == (status, end), reply
    assert (len(origin.calls), len(second.calls)) == calls
    if text is not None:
        assert text in said(reply, client, stream)
    elif end == "clean":
        assert "error" in reply.json
    else:
        assert "error" in reply.text and "[DONE]" not in reply.text and "message_stop" not in reply.text


def said(reply, client, stream):
    """The text of an answer."""
    if not stream:
        value = reply.json
        return value["choices"][0]["message"]["content"] if client == "openai" else value["content"][0]["text"]
    deltas = [data for data in reply.datas if isinstance(data, dict)]
    if client == "openai":
        return "".join(choice["delta"].get("content") or "" for data in deltas for choice in data.get("choices", []))
    return "".join(data["delta"].get("text", "") for data in deltas if data["type"] == "content_block_delta")
