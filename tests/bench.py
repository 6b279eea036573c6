#!/usr/bin/env python3
"""What the router costs on this machine: `python3 tests/bench.py`, about half a minute.

A built-in fake upstream and a load generator run beside the real program, all on 127.0.0.1. Printed are: time to the
first answered request, memory, the router's CPU time per request and per streamed chunk (user and system, all its
threads, from /proc, so on Linux only), and the latency it adds to a direct call. Ratios between two runs on one quiet
machine mean more than the figures: `--out=F` keeps a run, `--compare=F` shows it beside this one.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "llm_router.py"
CHAT, MESSAGES = "/openai/v1/chat/completions", "/anthropic/v1/messages"
CHUNKS_PER_S = 20
ROWS = (
    ("start_ms", "first answered request after start, ms"),
    ("idle_rss_mb", "memory after start, MB"),
    ("added_ms", "added latency, median, ms"),
    ("pass_ms", "CPU per 1 KB request, same format, ms"),
    ("translated_ms", "CPU per 1 KB request, translated, ms"),
    ("pass_large_ms", "CPU per 200 KB request, same format, ms"),
    ("translated_large_ms", "CPU per 200 KB request, translated, ms"),
    ("chunk_us", "CPU per streamed chunk, same format, us"),
    ("chunk_translated_us", "CPU per streamed chunk, translated, us"),
    ("failed_streams", "streams without their proper end"),
    ("peak_rss_mb", "memory at its peak, MB"),
)


# ----- the fake upstream: a Chat Completions provider in a process of its own -----

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 20}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 20, "total_tokens": 220},
    }
).encode()


def chunk(delta, finish=None):
    """One event of a chat stream as an HTTP chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": [choice]}
    return framed(b"data: " + json.dumps(event).encode() + b"\n\n")


def framed(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


async def answer_upstream(reader, writer, seconds):
    try:
        while True:
            body = await read_message(reader)
            if b'"stream": true' not in body and b'"stream":true' not in body:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER))
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.write(chunk({"role": "assistant", "content": ""}))
            for _ in range(int(seconds * CHUNKS_PER_S)):
                writer.write(chunk({"content": "word "}))
                await asyncio.sleep(1 / CHUNKS_PER_S)
            writer.write(chunk({}, "stop") + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def read_message(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line[15:]))
    return b""


async def serve_upstream(seconds):
    server = await asyncio.start_server(lambda r, w: answer_upstream(r, w, seconds), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


# ----- the load -----


def request_bytes(path, size, stream):
    """One request of about `size` bytes in the format of `path`, model bench."""
    body = {"model": "fake/bench", "max_tokens": 100, "stream": stream}
    body["messages"] = [{"role": "user", "content": "word " * (size // 5)}]
    data = json.dumps(body).encode()
    head = "POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return (head % (path, len(data))).encode() + data


async def ask_often(port, request, count):
    """Ask `count` times over one connection; the seconds each answer took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took = []
    for _ in range(count):
        began = time.perf_counter()
        writer.write(request)
        body = await read_message(reader)
        took.append(time.perf_counter() - began)
        if b"word" not in body:
            raise SystemExit("a request failed: %r" % body[:200])
    writer.close()
    return took


async def read_stream(port, request):
    """Whether one streamed answer came to its proper end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        data = await reader.read(65536)
        if not data:
            break
        tail = (tail + data)[-200:]
    writer.close()
    return b"[DONE]" in tail or b"message_stop" in tail


async def read_streams(port, request, count):
    """How many of `count` streams at once failed."""
    ended = await asyncio.gather(*(read_stream(port, request) for _ in range(count)))
    return ended.count(False)


# ----- what a process used, from /proc -----


def cpu_s(pid):
    """User and system time of a process in seconds; nan where /proc is missing."""
    try:
        fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid, field):
    """VmRSS or VmHWM of a process in MB; nan where /proc is missing."""
    try:
        text = Path("/proc/%d/status" % pid).read_text()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field)), float("nan"))


# ----- the measurement -----


def start(argv, **more):
    """A process and the first line it prints."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **more)
    return process, process.stdout.readline().strip()


def measure(options):
    """{"start_ms": 480.0, ...}: every row of ROWS."""
    found = {}
    upstream, upstream_port = start([sys.executable, __file__, "--upstream", "--seconds=%g" % options.seconds])
    with tempfile.TemporaryDirectory() as home:
        provider = {
            "id": "fake",
            "baseUrl": "http://127.0.0.1:%s/v1" % upstream_port,
            "apiKey": "none",
            "models": ["bench"],
        }
        config = Path(home, "config.json")
        config.write_text(json.dumps({"providers": [provider]}))
        config.chmod(0o600)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ROUTER_")}
        argv = [sys.executable, options.program, "start", "--port=0", "--config=%s" % config]
        began = time.perf_counter()
        router, line = start(argv, env=dict(environ, HOME=home, USERPROFILE=home))
        try:
            port = int(line.rpartition(":")[2])
            asyncio.run(ask_often(port, request_bytes(CHAT, 1000, False), 1))
            found["start_ms"] = (time.perf_counter() - began) * 1000
            found["idle_rss_mb"] = memory_mb(router.pid, "VmRSS")
            measure_requests(found, options, router.pid, port, int(upstream_port))
            measure_streams(found, options, router.pid, port)
            found["peak_rss_mb"] = memory_mb(router.pid, "VmHWM")
        finally:
            for process in (router, upstream):
                process.terminate()
                process.wait()
                process.stdout.close()
    return found


def measure_requests(found, options, pid, port, upstream_port):
    """Latency and CPU of whole answers, small and large."""
    small = request_bytes(CHAT, 1000, False)
    asyncio.run(ask_often(port, small, 200))
    through = statistics.median(asyncio.run(ask_often(port, small, options.requests)))
    direct = statistics.median(asyncio.run(ask_often(upstream_port, small, options.requests)))
    found["added_ms"] = (through - direct) * 1000
    plan = (("", 1000, options.requests), ("_large", 200_000, max(20, options.requests // 10)))
    for suffix, size, count in plan:
        for name, path in (("pass", CHAT), ("translated", MESSAGES)):
            request = request_bytes(path, size, False)
            asyncio.run(ask_often(port, request, 20))
            before = cpu_s(pid)
            asyncio.run(ask_often(port, request, count))
            found["%s%s_ms" % (name, suffix)] = (cpu_s(pid) - before) / count * 1000


def measure_streams(found, options, pid, port):
    """CPU per chunk of many streams at once."""
    chunks = options.streams * int(options.seconds * CHUNKS_PER_S)
    found["failed_streams"] = 0
    for name, path in (("chunk_us", CHAT), ("chunk_translated_us", MESSAGES)):
        before = cpu_s(pid)
        found["failed_streams"] += asyncio.run(read_streams(port, request_bytes(path, 1000, True), options.streams))
        found[name] = (cpu_s(pid) - before) / chunks * 1e6


def table(found, other):
    """The figures, beside those of another run when there is one."""
    head = "%-46s %10s" % ("", "this run") + (" %10s %7s" % ("compared", "ratio") if other else "")
    lines = [head]
    for name, text in ROWS:
        line = "%-46s %10.2f" % (text, found[name])
        if name in other:
            ratio = "%6.2fx" % (found[name] / other[name]) if other[name] else ""
            line += " %10.2f %7s" % (other[name], ratio)
        lines.append(line.rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(PROGRAM), help="the file to measure")
    parser.add_argument("--requests", type=int, default=2000, help="small requests per measurement")
    parser.add_argument("--streams", type=int, default=200, help="streams at once")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a stream")
    parser.add_argument("--out", help="keep the figures as JSON in this file")
    parser.add_argument("--compare", help="show the figures of this file beside the new ones")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        asyncio.run(serve_upstream(options.seconds))
        return
    other = json.loads(Path(options.compare).read_text()) if options.compare else {}
    found = measure(options)
    print("Python %s, %s, %d cores" % (platform.python_version(), platform.machine(), os.cpu_count()))
    print("%d requests, %d streams of %g s" % (options.requests, options.streams, options.seconds))
    print(table(found, other))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
