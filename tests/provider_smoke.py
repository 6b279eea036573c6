"""Real providers through the real router: a PASS or FAIL for every provider, model, format and way of answering.

    cp .env.test-suite.example .env.test-suite     # and fill it in
    python3 tests/provider_smoke.py

Starts the router of this checkout on a port of its own with a temporary home and configuration; ~/.llm-router.json and
a router that runs are not touched. Each row is one short question, which costs a few tokens. Variables of the
environment go before those of the file. Exit code: 0 all passed, 1 something failed, 2 nothing to test.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from running_router import ROOT, RunningRouter

PREFIX = "LLM_ROUTER_TEST_"
# What a provider's block may say, after LLM_ROUTER_TEST_<KEY>_; CLAUDE and ANTHROPIC are one word for two spellings.
NAMES = (
    "PROVIDER_ID", "NAME", "API_KEY", "OPENAI_BASE_URL", "CLAUDE_BASE_URL", "ANTHROPIC_BASE_URL", "MODELS",
    "HEADERS_JSON", "OPENAI_HEADERS_JSON", "CLAUDE_HEADERS_JSON", "ANTHROPIC_HEADERS_JSON",
)  # fmt: skip
# How this machine reaches the outside; the router's other variables stay out.
NETWORK = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
NUMBERS = {"PORT": 0, "TIMEOUT_MS": 90_000}
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "responses": "/v1/responses"}
QUESTION = "Reply with the word pong and nothing else."
MAX_TOKENS = 512  # models that think need some before they say anything


class Unusable(Exception):
    """There is nothing to test, or what there is cannot be read."""


def read_env_file(path):
    """The variables of a file of NAME=VALUE lines: `export`, quotes, blank lines and # comments as usual."""
    found = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith("#"):
            continue
        value = value.strip()
        if value[:1] in ("'", '"') and value.find(value[0], 1) > 0:
            value = value[1 : value.find(value[0], 1)]
        else:
            value = value.partition(" #")[0].strip()
        found[name.replace("export ", "", 1).strip()] = value
    return found


def read_number(variables, name, usual):
    """The whole number that a variable holds, the usual one when it holds nothing."""
    text = variables.get(PREFIX + name) or str(usual)
    if not text.isdigit():
        raise Unusable("%s%s is not a whole number" % (PREFIX, name))
    return int(text)


def read_providers(variables):
    """The providers to test, as entries of a configuration: one, or one per format where these need other headers."""
    keys = [key.strip() for key in variables.get(PREFIX + "PROVIDER_KEYS", "").split(",") if key.strip()]
    if not keys:
        raise Unusable("%sPROVIDER_KEYS names no provider" % PREFIX)
    return [entry for key in keys for entry in _entries_of(key, variables)]


def _entries_of(key, variables):
    given = {name: variables.get("%s%s_%s" % (PREFIX, key, name), "") for name in NAMES}
    urls = {"openai": given["OPENAI_BASE_URL"], "anthropic": given["CLAUDE_BASE_URL"] or given["ANTHROPIC_BASE_URL"]}
    urls = {wire: url for wire, url in urls.items() if url}
    models = [model.strip() for model in given["MODELS"].split(",") if model.strip()]
    missing = [name for name, value in (("..._BASE_URL", urls), ("MODELS", models)) if not value]
    if missing:
        raise Unusable("%s%s_%s is missing" % (PREFIX, key, missing[0]))
    common = _headers(key, given, "HEADERS_JSON")
    own = {"openai": _headers(key, given, "OPENAI_HEADERS_JSON")}
    own["anthropic"] = _headers(key, given, "CLAUDE_HEADERS_JSON") or _headers(key, given, "ANTHROPIC_HEADERS_JSON")
    name = given["PROVIDER_ID"] or key.lower()
    entry = {"id": name, "name": given["NAME"] or name, "apiKey": given["API_KEY"], "models": models}
    if not any(own.values()):
        return [dict(entry, baseUrlByFormat=urls, formats=list(urls), headers=common)]
    return [
        dict(entry, id="%s-%s" % (name, wire), baseUrl=url, formats=[wire], headers=dict(common, **own[wire]))
        for wire, url in urls.items()
    ]


def _headers(key, given, name):
    try:
        value = json.loads(given[name] or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unusable("%s%s_%s is not a JSON object" % (PREFIX, key, name))
    return value


def question(wire, model, stream):
    """A request of that format."""
    if wire == "responses":
        return {"model": model, "input": QUESTION, "max_output_tokens": MAX_TOKENS, "stream": stream}
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "stream": stream,
    }


def judge(reply, wire, model, stream):
    """What is wrong with an answer, "" when nothing is: status, who answered, an end, and something said."""
    if reply.status != 200:
        return "%d %s" % (reply.status, reply.text.strip()[:200])
    answered_by = reply.headers.get("x-llm-router-model") or "nobody"
    if answered_by != model.encode("ascii", "backslashreplace").decode()[:2000]:  # a header is ASCII
        return "answered by %s" % answered_by
    if reply.ended != "clean":
        return "the connection was cut"
    values = reply.datas if stream else [reply.json]
    ends = {"openai": "[DONE]", "anthropic": "message_stop", "responses": "response.completed"}
    last = values[-1] if values else None
    if stream and ends[wire] not in (last, (last or {}).get("type") if isinstance(last, dict) else None):
        return "the stream has no end: %s" % json.dumps(last)[:120]
    said = [text for value in values for text in texts_in(value)]
    return "" if any(text.strip() for text in said) else "nothing was said"


SAID = ("content", "text", "delta", "reasoning_content", "reasoning", "thinking", "refusal")


def texts_in(value, key=""):
    """Every text that stands under a key of SAID, at any depth."""
    if isinstance(value, str):
        return [value] if key in SAID else []
    entries = (
        value.items() if isinstance(value, dict) else [(key, one) for one in value] if isinstance(value, list) else []
    )
    return [text for name, entry in entries for text in texts_in(entry, name)]


def ask(router, wire, model, stream, timeout_s):
    """(seconds, what is wrong)."""
    began = time.monotonic()
    headers = {"anthropic-version": "2023-06-01"} if wire == "anthropic" else {}
    try:
        reply = router.post(PATHS[wire], question(wire, model, stream), headers, timeout=timeout_s)
        wrong = judge(reply, wire, model, stream)
    except (OSError, ValueError) as error:
        wrong = "no answer: %s" % (error or type(error).__name__)
    return time.monotonic() - began, wrong


def is_free(host, port):
    """Whether a router can listen there; the usual port may be that of one that runs."""
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True


def run(providers, host, port, timeout_s):
    """Ask everything, a row as soon as it is known; how many failed."""
    cases = [
        (entry, "%s/%s" % (entry["id"], model), wire, stream)
        for entry in providers
        for model in entry["models"]
        for wire in PATHS
        for stream in (False, True)
    ]
    width = max([5] + [len(ref) for _, ref, _, _ in cases])
    env = {name: os.environ[name] for one in NETWORK for name in (one, one.lower()) if name in os.environ}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="llm-router-smoke-") as home:
        flags = ["--host=" + host, "--port=%d" % (port if is_free(host, port) else 0)]
        router = RunningRouter({"version": 1, "providers": providers}, flags, home, env)
        router.host = host
        try:
            print("%-*s  %-9s  %-8s  %-4s  %s" % (width, "MODEL", "FORMAT", "ANSWER", "", "TIME"))
            for entry, ref, wire, stream in cases:
                seconds, wrong = ask(router, wire, ref, stream, timeout_s)
                wrong = wrong.replace(entry["apiKey"], "***") if entry["apiKey"] else wrong
                failed += bool(wrong)
                words = (width, ref, wire, "streamed" if stream else "whole", "FAIL" if wrong else "PASS", seconds)
                print("%-*s  %-9s  %-8s  %-4s  %5.1f s  " % words + " ".join(wrong.split()), flush=True)
        finally:
            router.stop()
    print("\n%d passed, %d failed" % (len(cases) - failed, failed))
    return failed


def main(argv=None):
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-file", default=str(ROOT / ".env.test-suite"), help="default: .env.test-suite")
    path = Path(parser.parse_args(argv).env_file)
    try:
        variables = read_env_file(path) if path.exists() else {}
        variables.update((name, value) for name, value in os.environ.items() if name.startswith(PREFIX))
        providers = read_providers(variables)
        host = variables.get(PREFIX + "HOST") or "127.0.0.1"
        port, timeout_ms = (read_number(variables, name, usual) for name, usual in NUMBERS.items())
    except (Unusable, ValueError, OSError) as error:
        print("provider_smoke: %s; copy .env.test-suite.example to %s and fill it in" % (error, path), file=sys.stderr)
        return 2
    try:
        return 1 if run(providers, host, port, timeout_ms / 1000) else 0
    except AssertionError as error:  # the router did not start, and says why
        print("provider_smoke: %s" % error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
