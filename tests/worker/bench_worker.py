#!/usr/bin/env python3
"""What the router costs in the real Workers runtime: `python3 tests/worker/bench_worker.py`, about a minute.

CPU time of the whole workerd process (user and system, garbage collection and compilation included), so it is above
what Cloudflare counts; the upstream and the load are those of tests/bench.py. Needs `npm ci --ignore-scripts` here.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import bench  # noqa: E402

from running_worker import KEY, RunningWorker  # noqa: E402

SECONDS, STREAMS, WARM_UP, REQUESTS = 3, 10, 100, 300
CHUNKS = SECONDS * bench.CHUNKS_PER_S


def request(path, size, stream):
    """A request of the bench with the Worker's key."""
    return bench.request_bytes(path, size, stream).replace(b"\r\n", b"\r\nx-api-key: %s\r\n" % KEY.encode(), 1)


def measure(worker):
    """{"what": (same format, translated)} in ms."""
    pid, found = worker.process.pid, {}
    for what, size, count in (("1 KB request", 1000, REQUESTS), ("200 KB request", 200_000, REQUESTS // 10)):
        for path in (bench.CHAT, bench.MESSAGES):
            asyncio.run(bench.ask_often(worker.port, request(path, size, False), WARM_UP))
            before = bench.cpu_s(pid)
            asyncio.run(bench.ask_often(worker.port, request(path, size, False), count))
            found.setdefault(what, []).append((bench.cpu_s(pid) - before) / count * 1000)
    for number, path in enumerate((bench.CHAT, bench.MESSAGES)):
        asyncio.run(bench.read_streams(worker.port, request(path, 1000, True), STREAMS))
        before = bench.cpu_s(pid)
        failed = asyncio.run(bench.read_streams(worker.port, request(path, 1000, True), STREAMS))
        assert not failed, "%d streams failed" % failed
        spent_ms = (bench.cpu_s(pid) - before) * 1000 / STREAMS
        found.setdefault("streamed request of %d chunks" % CHUNKS, []).append(spent_ms)
        found.setdefault("streamed chunk", []).append((spent_ms - found["1 KB request"][number]) / CHUNKS)
    return found


def main():
    upstream, port = bench.start([sys.executable, bench.__file__, "--upstream", "--seconds=%d" % SECONDS])
    url = "http://127.0.0.1:%s/v1" % port
    provider = {"id": "fake", "baseUrl": url, "apiKey": "none", "models": ["bench"]}
    variables = {"LLM_ROUTER_CONFIG_JSON": json.dumps({"masterKey": KEY, "providers": [provider]})}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        worker = RunningWorker(Path(folder) / "worker", variables)
        try:
            took = time.perf_counter() - began, bench.cpu_s(worker.process.pid)
            print("start without a snapshot: %.1f s, %.1f s of CPU" % took)
            for what, (same, translated) in measure(worker).items():
                print("%-34s %8.2f ms %8.2f ms" % (what, same, translated))
            print("memory at its peak: %.0f MB" % bench.memory_mb(worker.process.pid, "VmHWM"))
        finally:
            worker.kill()
            upstream.terminate()
            upstream.wait()


if __name__ == "__main__":
    main()
