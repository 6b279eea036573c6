"""The wall clock jumps by hours, forward and back, while the real program runs: what is promised in seconds goes by the
clock that never jumps, and what is written down stays whole.

The program is started by CLOCK, which puts a shifted `time.time` and `time.time_ns` in place before the program is
imported; the shift stands in a file. Everything else of the process is as always: sockets, threads, SQLite, files."""

import contextlib
import json
import re
import sqlite3
import subprocess
import threading
import time
from email.utils import formatdate

import pytest

import fake_upstream as fake
from exchanges import PATHS, ask, until
from running_router import COMMAND, ROOT, RunningRouter, clean_environment, config_of, provider

CLOCK = """
import sys, time
shift, folder = sys.argv[1:3]
real, real_ns = time.time, time.time_ns

def seconds():
    with open(shift) as file:
        return int(file.read() or 0)

time.time = lambda: real() + seconds()
time.time_ns = lambda: real_ns() + seconds() * 10**9
sys.path.insert(0, folder)
import llm_router
sys.exit(llm_router.main(sys.argv[3:]))
"""
HOURS = (6, -12, 30 * 24, -30 * 24, 0)  # from the true time
FLAGS = ("--log-format=json", "--origin-retry-attempts=1", "--whole-first-byte-timeout-ms=700")


class Shifted:
    """A router whose wall clock can be set; `upstreams`: a FakeUpstream for each provider, by its id."""

    def __init__(self, home, upstreams):
        self.home, self.upstreams, self._shift = home, upstreams, home / "shift"
        self._shift.write_text("0")
        models = [{"id": "m", "fallbackModels": ["steady/m"]}]
        providers = [provider(upstreams[id], id=id, models=models if id == "limited" else ["m"]) for id in upstreams]
        program = ("-c", CLOCK, str(self._shift), str(ROOT))
        self.running = RunningRouter(config_of(*providers), FLAGS, home, program=program)
        self.asked = 0

    def jump(self, hours):
        fresh = self.home / "shift.new"
        fresh.write_text(str(hours * 3600))
        fresh.replace(self._shift)

    def post(self, ref, **more):
        self.asked += 1
        return self.running.post(PATHS["openai"], ask("openai", ref, **more))

    def command(self, *words):
        line = [*COMMAND, *words]
        done = subprocess.run(line, env=clean_environment(self.home), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    home = tmp_path_factory.mktemp("clock")
    with fake.FakeUpstream() as limited, fake.FakeUpstream() as steady, fake.FakeUpstream() as silent:
        silent.handler = lambda call: fake.Answer(fake.Hang())
        made = Shifted(home, {"steady": steady, "limited": limited, "silent": silent})
        yield made
        made.running.stop()


def test_a_cooldown_lasts_as_long_as_was_said_whatever_the_clock_says(shifted):
    """A Retry-After date is read against the clock of that moment, and counted by the other one from then on."""
    limited = shifted.upstreams["limited"]
    when = formatdate(time.time() + 6 * 3600 + 3000, usegmt=True)
    shifted.jump(6)
    limited.answer(fake.error_answer("openai", 429, "slow down", headers={"retry-after": when}))
    assert shifted.post("limited/m").status == 200
    for hours in HOURS:
        shifted.jump(hours)
        assert shifted.post("limited/m").status == 200
        status = shifted.command("status", "--json")
        (row,) = [row for row in status["candidates"] if row["model"] == "limited/m"]
        assert row["state"] == "cooling" and 2000 < row["left_s"] <= 3001, (hours, row)
        assert 0 <= status["uptime_s"] < 3600
    assert len(limited.calls) == 1


@pytest.mark.parametrize("hours", HOURS)
def test_a_deadline_comes_in_its_time_and_an_open_stream_goes_on(shifted, hours):
    gate, steady = threading.Event(), shifted.upstreams["steady"]
    parts = [part if isinstance(part, bytes) else part.encode() for part in fake.STREAMS["openai"]("first and last")]
    at = len(parts) // 2
    steady.answer(fake.sse_answer([*parts[:at], fake.Gate(gate), *parts[at:]]))
    stream = shifted.running.open(PATHS["openai"], ask("openai", "steady/m", stream=True))
    shifted.asked += 1
    assert stream.status == 200 and stream.read_event() is not None
    jump = threading.Timer(0.2, shifted.jump, (hours,))
    jump.start()
    assert shifted.post("silent/m").status == 504
    jump.join()
    gate.set()
    reply = stream.read_rest()
    assert reply.ended == "clean" and reply.datas[-1] == "[DONE]"


def test_log_ledger_and_state_file_are_whole_after_all_of_it(shifted):
    shifted.jump(0)
    assert shifted.post("steady/m").status == 200
    requests = lambda: [json.loads(line) for line in shifted.running.log() if '"attempts"' in line]  # noqa: E731
    assert until(lambda: len(requests()) == shifted.asked), shifted.running.log()
    for record in requests():
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ", record["time"])
        spans = [record["total_ms"], record["first_content_ms"] or 0, *[one["took_ms"] for one in record["attempts"]]]
        assert all(0 <= span < 60_000 for span in spans), record
    path = shifted.home / ".llm-router.usage.db"

    def rows():
        with contextlib.closing(sqlite3.connect(str(path))) as connection:
            return connection.execute("SELECT id, total_ms FROM requests").fetchall()

    assert until(lambda: len(rows()) == shifted.asked), rows()
    assert len({id for id, _ in rows()}) == shifted.asked and all(0 <= total < 60_000 for _, total in rows())
    (entry,) = json.loads((shifted.home / ".llm-router.runtime.json").read_text())["instances"]
    assert entry["port"] == shifted.running.port and entry["pid"] == shifted.running.process.pid
    assert not any("Traceback" in line or '"error"' in line for line in shifted.running.log())


def test_an_edit_is_noticed_and_stop_finds_it_while_the_clock_is_wrong(shifted):
    shifted.jump(-12)
    config = json.loads(shifted.running.config_path.read_text())
    shifted.running.write_config(dict(config, modelAliases={"new-name": "steady/m"}))
    assert until(lambda: shifted.post("new-name").status == 200)
    assert shifted.command("stop", "--json")["pid"] == shifted.running.process.pid
    assert shifted.running.process.wait(60) == 0
    assert json.loads((shifted.home / ".llm-router.runtime.json").read_text())["instances"] == []
