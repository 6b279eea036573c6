"""Three hundred clients at once against origins that flap at random: each gets one right answer or one clear error."""

import json
import os
import random
import threading

import pytest

import fake_upstream as fake
from exchanges import until
from running_router import config_of, descriptors_of, provider

CLIENTS = 300
SEEDS = [int(seed) for seed in os.environ.get("LLM_ROUTER_TEST_SEEDS", "1").split(",")]
QUICK = (
    "--origin-retry-base-delay-ms=5", "--origin-retry-max-delay-ms=20", "--origin-fallback-cooldown-ms=50",
    "--origin-rate-limit-cooldown-ms=50", "--fallback-circuit-cooldown-ms=50", "--first-byte-timeout-ms=20000",
    "--whole-first-byte-timeout-ms=20000",
)  # fmt: skip


def flapping(wire, seed):
    """A handler that says the token of the request's last message, or fails in one of many ways."""
    dice, lock = random.Random(seed), threading.Lock()

    def handle(call):
        with lock:
            roll = dice.random()
        body = call.json
        token = body["messages"][-1]["content"]
        token = token if isinstance(token, str) else token[-1]["text"]
        stream = bool(body.get("stream"))
        if roll < 0.55:
            return fake.model_answer(wire, stream, "you said " + token)
        if roll < 0.65:
            return fake.error_answer(wire, 500)
        if roll < 0.72:
            return fake.error_answer(wire, 429, headers=(("retry-after", "0.05"),))
        if roll < 0.78:
            return fake.model_answer(wire, stream, "")
        if roll < 0.84:
            return fake.reset_before_head()
        if roll < 0.9:
            return fake.text_answer(200, "<html>busy</html>", content_type="text/html")
        build = fake.chat_stream if wire == "openai" else fake.messages_stream
        return fake.sse_answer(build("you said " + token)[:3], end="cut") if stream else fake.close_before_head()

    return handle


def ask(running, number, results):
    """One client: what it asked for, how it was answered."""
    client, stream, token = number % 2, number % 3 != 0, "token-%d." % number
    path = ("/openai/v1/chat/completions", "/anthropic/v1/messages")[client]
    body = {"model": "a/m", "max_tokens": 50, "stream": stream, "messages": [{"role": "user", "content": token}]}
    try:
        results[number] = (client, stream, token, running.post(path, body, stream=stream, timeout=60))
    except Exception as error:
        results[number] = (client, stream, token, error)


def text_of(client, stream, reply):
    if not stream:
        answer = reply.json
        return (
            answer["choices"][0]["message"]["content"] or ""
            if client == 0
            else "".join(b["text"] for b in answer["content"])
        )
    found = [data for data in reply.datas if isinstance(data, dict)]
    if client == 0:
        return "".join(choice["delta"].get("content") or "" for data in found for choice in data.get("choices", []))
    return "".join(data["delta"].get("text", "") for data in found if data["type"] == "content_block_delta")


def is_complete(client, reply):
    return reply.ended == "clean" and ("[DONE]" if client == 0 else "message_stop") in reply.text


def judge(client, stream, token, reply):
    """ "right", "empty" (nobody had more to say), "error", or a sentence that says what is wrong."""
    if isinstance(reply, Exception):
        return "the connection failed: %r" % reply
    if not stream or reply.status != 200:
        if reply.status == 200:
            said = text_of(client, stream, reply)
            return _verdict(said, token)
        return "error" if reply.json.get("error", {}).get("message") else "no clear error: %r" % reply
    said, complete = text_of(client, stream, reply), is_complete(client, reply)
    if complete:
        return _verdict(said, token)
    clear = reply.ended == "cut" and '"error"' in reply.text and ("you said " + token).startswith(said)
    return "error" if clear else "neither answer nor error: %r" % reply


def _verdict(said, token):
    return {"you said " + token: "right", "": "empty"}.get(said, "wrong text %r" % said)


def threads(pid):
    return len(os.listdir("/proc/%d/task" % pid))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("seed", SEEDS)
def test_three_hundred_clients_each_get_one_right_answer_or_one_clear_error(seed, router, make_upstream):
    """Traps 13, 134, 148, 168 under load; nothing twice, nothing left behind."""
    upstreams = [
        make_upstream(flapping(wire, seed * 10 + at)) for at, wire in enumerate(("openai", "anthropic", "openai"))
    ]
    fallbacks = ["b/m", "c/m"]
    running = router(
        config_of(
            provider(upstreams[0], "openai", "a", [{"id": "m", "fallbackModels": fallbacks}]),
            provider(upstreams[1], "anthropic", "b", ["m"]),
            provider(upstreams[2], "openai", "c", ["m"]),
        ),
        *QUICK,
        "--usage-db=off",  # its files are descriptors, too
    )
    assert running.get("/health").status == 200
    before = len(descriptors_of(running.process.pid))
    results = {}
    workers = [threading.Thread(target=ask, args=(running, number, results)) for number in range(CLIENTS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    verdicts = {number: judge(*row) for number, row in results.items()}
    wrong = {number: verdict for number, verdict in verdicts.items() if verdict not in ("right", "empty", "error")}
    assert not wrong and len(verdicts) == CLIENTS, json.dumps(wrong, indent=1)[:3000]
    assert sum(verdict == "right" for verdict in verdicts.values()) > CLIENTS * 0.6
    for upstream in upstreams:
        upstream.stop()
    until(lambda: len(descriptors_of(running.process.pid)) <= before + 2, step=0.1)
    assert threads(running.process.pid) <= 64
