"""The usage ledger: what it holds, what disturbs it and never a request, and the tables of `usage`."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import QUICK, until
from running_router import PROGRAM, clean_environment, config_of, provider

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
PRICES = {"input": 2, "output": 10, "cacheRead": 0.5}


def rows_of(path):
    """Every row of a ledger as a dict, oldest first; [] while there is none."""
    if not path.exists():
        return []
    connection = sqlite3.connect(str(path))
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute("SELECT * FROM requests ORDER BY rowid")]
    except sqlite3.OperationalError:  # the table is being made
        return []
    finally:
        connection.close()


def entered(path, number):
    assert until(lambda: len(rows_of(path)) >= number), rows_of(path)
    return rows_of(path)


def priced(upstream, **more):
    models = [{"id": "fake-model", "cost": PRICES, "fallbackModels": ["other/fake-model"]}]
    return config_of(provider(upstream, models=models), provider(upstream, id="other"), **more)


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(home, *words)`: the code, stdout and stderr of a command that runs in this very process."""

    def run(home, *words, **env):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", clean_environment(home, **env))
            capsys.readouterr()
            code = r.main(words)
        return (code, *capsys.readouterr())

    return run


def a_trail(number=0, **more):
    trail = r.Trail("req_%d" % number, 0.0, time.time())
    trail.wire, trail.operation, trail.asked, trail.model = "openai", "chat", "m", "a/m"
    trail.status, trail.outcome, trail.usage = 200, r.OK, r.Usage(10, 5)
    for name, value in more.items():
        setattr(trail, name, value)
    return trail


class Noted(list):
    def __call__(self, text, level):
        self.append((level, text))


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """`make(**settings)`: a ledger of its own in tmp_path, with .path and .noted, that waits for nothing."""
    made = []
    monkeypatch.setattr(r, "_LEDGER_BATCH_S", 0.01)

    def make(limit=5000, **settings):
        noted = Noted()
        one = r.Ledger(str(tmp_path / "u.db"), r.Settings(**settings), noted, limit)
        one.path, one.noted = tmp_path / "u.db", noted
        one.close = lambda: r.Ledger.close(one, 30.0)  # a busy disk may take longer than a stop waits for it
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()


def prepare_connections(monkeypatch, pragma):
    """Every connection that writes a ledger gets a pragma more."""
    whole = r._open_ledger

    def prepared(path):
        connection = whole(path)
        connection.execute("PRAGMA " + pragma)
        return connection

    monkeypatch.setattr(r, "_open_ledger", prepared)


# ----- what it holds -----


def test_a_request_is_entered_with_what_it_used_and_cost_and_without_any_body(router, upstream):
    running = router(priced(upstream), *QUICK)
    upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}))
    upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}))
    running.post(CHAT, HI)
    id = running.post(CHAT, dict(HI, model="other/fake-model"), stream=True).headers["x-llm-router-request-id"]
    good = running.post("/v1/messages", dict(HI, model="fake/fake-model", max_tokens=9))
    path = running.home / ".llm-router.usage.db"
    lost, other, row = entered(path, 3)
    assert (lost["model"], lost["status"], lost["outcome"]) == ("", 429, "rate_limited")
    assert lost["attempts"] == "fake/fake-model=429, other/fake-model=429"
    assert lost["input"] is lost["cost"] is lost["first_content_ms"] is None
    assert (other["id"], other["stream"], other["cost"]) == (id, 1, None)
    assert good.status == 200 and (row["format"], row["asked"], row["model"]) == (
        "anthropic",
        "fake/fake-model",
        "fake/fake-model",
    )
    assert (row["input"], row["output"], row["estimated"]) == (11, 7, 0)
    assert row["cost"] == pytest.approx((11 * 2 + 7 * 10) / 1e6)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"upstream-key" not in path.read_bytes() and b"slow down" not in path.read_bytes()


@pytest.mark.parametrize(
    ("tokens", "cost", "expected"),
    [
        (r.Usage(1_000_000, 0), PRICES, 2.0),
        (r.Usage(0, 1_000_000, 1_000_000), PRICES, 10.5),
        (r.Usage(1, 1, 0, 1), PRICES, None),
        (r.Usage(1, 1), {"input": 1}, None),
        (r.Usage(1, 1), {"input": 0, "output": 0}, 0.0),
        (r.Usage(1, 1), {"input": "2", "output": True}, None),
        (r.Usage(1, 1), {"input": -1, "output": 1}, None),
        (r.Usage(1, 1), {"input": 10**400, "output": 1}, None),
        (r.Usage(1, 1), {"input": 1e300, "output": 1}, None),
        (r.Usage(), PRICES, None),
        (None, PRICES, None),
        (r.Usage(1, 1), None, None),
    ],
)
def test_a_cost_is_known_or_none_but_never_a_guess(tokens, cost, expected):
    assert r.cost_of("a/m", tokens, {"a/m": cost, "a": PRICES}) == expected


def test_tokens_of_an_answer_that_broke_off_are_marked_as_an_estimate():
    assert r.ledger_row(a_trail(outcome="temporary"), {})[16] == 1
    assert r.ledger_row(a_trail(outcome="temporary", usage=None), {})[11:18] == (None,) * 5 + (0, None)


def test_a_model_that_passes_any_id_through_has_one_price(ledger):
    assert r.ledger_row(a_trail(model="a/what-ever"), {"a/*": {"input": 1, "output": 1}})[17] == pytest.approx(15e-6)


def test_hostile_names_and_counts_are_entered_all_the_same(ledger):
    one = ledger()
    one.add(a_trail(asked="\ud800'; DROP TABLE requests; --", client="\udfff", usage=r.Usage(10**30, 1)))
    one.close()
    (row,) = rows_of(one.path)
    assert row["asked"] == "?'; DROP TABLE requests; --" and row["input"] == 2**53 and one.noted == []


def test_embeddings_are_counted_too(router, upstream):
    running = router(priced(upstream), *QUICK)
    upstream.answer(
        fake.json_answer(200, {"object": "list", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}})
    )
    running.post("/v1/embeddings", {"model": "fake/fake-model", "input": "hi"})
    (row,) = entered(running.home / ".llm-router.usage.db", 1)
    assert (row["operation"], row["input"], row["output"]) == ("embeddings", 8, 0)


@pytest.mark.parametrize("value", ["off", "", "false", "0"])
def test_one_setting_switches_it_off(command, tmp_path, value):
    assert r.ledger_path(r.read_settings({}, {"LLM_ROUTER_USAGE_DB": value})[0]) == ""
    assert command(tmp_path, "usage", LLM_ROUTER_USAGE_DB=value)[0] == 2


def test_a_router_without_a_ledger_makes_no_file(router, upstream):
    running = router(priced(upstream), env={"LLM_ROUTER_USAGE_DB": "off"})
    running.post(CHAT, HI)
    assert running.stop() == 0
    assert not list(running.home.glob(".llm-router.usage.db*"))


# ----- what disturbs it -----


@contextlib.contextmanager
def locked(path):
    """Another program that is writing the ledger."""
    holder = sqlite3.connect(str(path), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    yield
    holder.execute("ROLLBACK")
    holder.close()


def test_a_locked_file_delays_nobody_and_is_written_at_the_end(router, upstream):
    running = router(priced(upstream), *QUICK)
    path = running.home / ".llm-router.usage.db"
    running.post(CHAT, HI)
    entered(path, 1)
    with locked(path):
        assert [running.post(CHAT, HI).status for _ in range(3)] == [200, 200, 200]
    assert running.stop() == 0
    assert len(rows_of(path)) == 4


def test_a_locked_file_is_named_once_and_written_once_it_is_free(ledger, monkeypatch):
    prepare_connections(monkeypatch, "busy_timeout = 1")
    monkeypatch.setattr(r, "_LEDGER_RETRY_S", 0.01)
    one = ledger()
    one.add(a_trail(1))
    entered(one.path, 1)
    with locked(one.path):
        one.add(a_trail(2))
        assert until(lambda: one.noted)
        one.add(a_trail(3))
        assert until(lambda: not one._trails)
    assert len(entered(one.path, 3)) == 3
    assert until(lambda: len(one.noted) == 2)
    assert [level for level, _ in one.noted] == ["warning", "info"]
    assert "not written" in one.noted[0][1] and "written again" in one.noted[1][1]


@pytest.mark.parametrize("damage", ["head", "pages"])
def test_a_damaged_file_is_kept_aside_and_a_fresh_one_begun(ledger, tmp_path, damage):
    path = tmp_path / "u.db"
    if damage == "pages":
        first = ledger()
        for number in range(300):
            first.add(a_trail(number))
        first.close()
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)
    else:
        path.write_bytes(bytes(8192))
    before = path.read_bytes()
    one = ledger()
    one.add(a_trail(1))
    one.close()
    assert [row["id"] for row in rows_of(path)] == ["req_1"]
    assert (tmp_path / "u.db.corrupt").read_bytes() == before
    assert len(one.noted) == 1 and "damaged" in one.noted[0][1]


@pytest.mark.parametrize("trouble", ["folder", "pipe", "text", "newer", "foreign", "of the same words", "no room"])
def test_a_file_that_cannot_be_used_is_left_alone_and_named_once(ledger, tmp_path, monkeypatch, trouble):
    path = tmp_path / "u.db"
    if trouble == "folder":
        path.mkdir()
    elif trouble == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("pipes with a name are of POSIX")
        os.mkfifo(path)
    elif trouble == "text":
        path.write_text("my notes")
        path.chmod(0o644)  # whatever the umask
        path.chmod(0o644)  # whatever the umask
    elif trouble == "no room":  # a real "database or disk is full": SQLite may not use a further page
        prepare_connections(monkeypatch, "max_page_count = 3")
    else:
        made = sqlite3.connect(str(path))
        made.execute("CREATE TABLE %s (a)" % ("requests" if trouble == "of the same words" else "other"))
        made.execute("PRAGMA user_version = %d" % (99 if trouble == "newer" else 0))
        made.close()
    before = path.read_bytes() if path.is_file() else b""
    one = ledger()
    for number in range(2):
        for _ in range(200):
            one.add(a_trail(number))
        assert until(lambda: not one._trails)
    one.close()
    assert len(one.noted) == 1 and one.noted[0][0] == "warning" and str(path) in one.noted[0][1]
    assert ("another program" in one.noted[0][1]) == (trouble in ("text", "foreign", "of the same words"))
    assert [one.name for one in tmp_path.iterdir()] == ["u.db"]
    assert trouble != "text" or os.name != "posix" or path.stat().st_mode & 0o777 == 0o644
    assert trouble != "text" or os.name != "posix" or path.stat().st_mode & 0o777 == 0o644
    assert trouble == "no room" or before == (path.read_bytes() if path.is_file() else b"")


@pytest.mark.skipif(os.name != "posix", reason="a pipe with a name")
def test_usage_waits_for_no_pipe(command, tmp_path):
    os.mkfifo(tmp_path / "u.db")
    code, _, error = command(tmp_path, "usage", "--usage-db=%s" % (tmp_path / "u.db"))
    assert code == 1 and "is not a regular file" in error


@pytest.mark.parametrize("opened", ["to be written", "to be read"])
@pytest.mark.parametrize("moment", range(9))
def test_a_ledger_that_another_writer_makes_at_any_moment_is_no_foreign_one(tmp_path, monkeypatch, opened, moment):
    path, connect, left = tmp_path / "u.db", sqlite3.connect, [moment]

    class Interrupted(sqlite3.Connection):
        def execute(self, *words):
            left[0] -= 1
            if left[0] == -1:
                other = connect(str(path), timeout=0, isolation_level=None)
                try:
                    other.executescript(
                        "BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS requests (%s); PRAGMA user_version = %d; COMMIT"
                        % (r._LEDGER_COLUMNS, r.LEDGER_VERSION)
                    )
                except sqlite3.OperationalError as error:  # it waits, as this one would
                    assert "locked" in str(error)
                other.close()
            return super().execute(*words)

    path.touch()
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Interrupted, **kwargs))
    if opened == "to be read":
        assert r.sum_ledger(str(path), "model", 0) == []
    else:
        r._open_ledger(str(path)).close()
        with contextlib.closing(connect(str(path))) as made:
            assert made.execute("PRAGMA user_version").fetchone() == (r.LEDGER_VERSION,)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_the_ledger_is_written_through_no_symbolic_link(tmp_path):
    target = tmp_path / "mine"
    target.write_bytes(b"")
    target.chmod(0o644)
    (tmp_path / "usage.db").symlink_to(target)
    with pytest.raises(OSError, match="usage"):
        r._open_ledger(str(tmp_path / "usage.db"))
    assert target.read_bytes() == b"" and target.stat().st_mode & 0o777 == 0o644


def test_only_the_newest_rows_wait_for_a_file_that_cannot_be_written(ledger, tmp_path):
    (tmp_path / "u.db").mkdir()
    one = ledger(limit=10)
    for number in range(100):
        one.add(a_trail(number))
    assert until(lambda: one.noted and not one._trails)
    (tmp_path / "u.db").rmdir()
    one.close()
    assert [row["id"] for row in rows_of(one.path)] == ["req_%d" % number for number in range(90, 100)]


def test_a_file_that_is_removed_while_it_is_written_is_made_again(ledger):
    one = ledger()
    one.add(a_trail(1))
    entered(one.path, 1)
    for path in one.path.parent.glob("u.db*"):
        path.unlink()
    one.add(a_trail(2))
    assert [row["id"] for row in entered(one.path, 1)] == ["req_2"]


def test_old_rows_leave_and_the_file_stays_within_its_size(ledger):
    one = ledger(usage_max_days=7, usage_max_bytes=1_000_000)
    old = a_trail(0)
    old.began_wall -= 8 * 86400
    one.add(old)
    for number in range(1, 12_001):
        one.add(a_trail(number, asked="x" * 150))
        if number % 1000 == 0:
            assert until(lambda: not one._trails)
    one.close()
    ids = [row["id"] for row in rows_of(one.path)]
    assert "req_0" not in ids and ids[-1] == "req_12000" and 1000 < len(ids) < 8000
    assert one.path.stat().st_size < 2_000_000


# ----- many writers, and a sudden end -----


def test_fifty_clients_at_once_are_all_entered_once(router, upstream):
    running = router(priced(upstream), *QUICK)
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda _: running.post(CHAT, HI), range(300)))
    assert {reply.status for reply in replies} == {200}
    rows = entered(running.home / ".llm-router.usage.db", 300)
    assert {row["id"] for row in rows} == {reply.headers["x-llm-router-request-id"] for reply in replies}
    assert len(rows) == 300


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import llm_router as r
ledger = r.Ledger(sys.argv[2], r.Settings(), lambda *words: print(*words, flush=True))
print("ready", flush=True)
number = 0
while True:
    trail = r.Trail("req_%s_%d" % (sys.argv[3], number), 0.0, time.time())
    trail.wire, trail.operation, trail.outcome, trail.usage = "openai", "chat", "ok", r.Usage(1, 2)
    ledger.add(trail)
    number += 1
    time.sleep(0.0005)
"""


def test_writers_that_are_killed_leave_a_whole_ledger_behind(tmp_path):
    path = tmp_path / "u.db"
    for turn in range(2):
        words = [sys.executable, "-c", WRITER, str(PROGRAM.parent), str(path)]
        writers = [subprocess.Popen(words + ["%d-%d" % (turn, n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
        try:
            assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
            count = len(rows_of(path))
            entered(path, count + 200)
        finally:
            for writer in writers:
                writer.send_signal(signal.SIGKILL)
            said = [writer.communicate()[0] for writer in writers]
        assert said == [""] * 3
        connection = sqlite3.connect(str(path))
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert (
            connection.execute(
                "SELECT count(*), count(DISTINCT id) FROM requests WHERE input = 1 AND output = 2 AND reasoning = 0"
            ).fetchone()
            == (len(rows_of(path)),) * 2
        )
        connection.close()


def test_a_router_that_is_killed_goes_on_with_the_same_ledger(router, upstream):
    running = router(priced(upstream), *QUICK)
    path = running.home / ".llm-router.usage.db"
    running.post(CHAT, HI)
    entered(path, 1)
    done = threading.Event()

    def keep_asking():
        while not done.is_set():
            try:
                running.post(CHAT, HI)
            except OSError:
                return

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    entered(path, 20)
    running.process.kill()
    done.set()
    for asker in askers:
        asker.join()
    before = len(rows_of(path))
    again = router(priced(upstream), *QUICK, env={"LLM_ROUTER_USAGE_DB": str(path)})
    again.post(CHAT, HI)
    assert len(entered(path, before + 1)) == before + 1


def test_what_waits_is_written_when_the_router_stops(router, upstream):
    running = router(priced(upstream), *QUICK)
    running.post(CHAT, HI)
    assert running.stop() == 0
    assert len(rows_of(running.home / ".llm-router.usage.db")) == 1


# ----- explain, when no router remembers -----


def test_explain_knows_what_a_request_cost_while_the_router_runs_and_after_it(router, upstream, command):
    def facts(text):
        return [
            line for line in text.splitlines() if line.startswith(("outcome", "tokens", "cost", "answered", "asked"))
        ]

    running = router(priced(upstream), *QUICK)
    id = running.post(CHAT, HI).headers["x-llm-router-request-id"]
    live = command(running.home, "explain", id)[1]
    assert "cost           $0.0001" in live and "1. fake/fake-model" in live
    running.post(CHAT, HI)
    assert command(running.home, "explain", "\udcff")[::2] == (1, "llm-router: that request is not remembered (any more)\n")
    assert running.stop() == 0
    code, later, error = command(running.home, "explain", id)
    assert code == 0 and error == ""
    assert facts(live) == facts(later) and len(facts(later)) == 5
    assert "attempts       fake/fake-model=ok" in later
    record = json.loads(command(running.home, "explain", "--json")[1])
    assert record["id"] != id and record["stream"] is False
    assert (record["usage"]["input"], record["path"], record["cost"]) == (11, "fake/fake-model=ok", 9.2e-05)
    assert command(running.home, "explain", "req_unknown")[0] == 1
    assert command(running.home, "explain", "last' OR 1")[0] == 1
    assert "does not know the request" in command(running.home, "explain", "\udcff")[2]


# ----- usage -----


@pytest.fixture
def filled(tmp_path, ledger):
    """A home with a ledger: two models, a failure, an answer that broke off, a count_tokens call."""
    one = ledger()
    one.costs = {"a/m": {"input": 1000, "output": 1000, "cacheRead": 100}}
    one.add(a_trail(1, usage=r.Usage(1000, 500, 3000), total_ms=100, client="laptop"))
    one.add(a_trail(2, usage=r.Usage(1000, 500), total_ms=300))
    one.add(a_trail(3, model="b/deep/n", usage=r.Usage(2_000_000, 1, 0, 0, 1), wire="anthropic"))
    one.add(a_trail(4, model="", outcome="rate_limited", status=429, usage=None))
    one.add(a_trail(5, model="b/deep/n", outcome="temporary", usage=r.Usage(20, 1)))
    one.add(a_trail(6, operation="count_tokens", usage=None))
    one.add(a_trail(7, usage=None))
    long_ago = a_trail(8)
    long_ago.began_wall -= 40 * 86400
    one.add(long_ago)
    one.close()
    (tmp_path / "u.db").rename(tmp_path / ".llm-router.usage.db")
    return tmp_path


def test_the_table_shows_totals_cached_share_cost_and_bars(command, filled):
    code, out, err = command(filled, "usage")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:7]}
    assert rows["MODEL"] == ["MODEL", "REQUESTS", "FAILED", "INPUT", "CACHED", "OUTPUT", "COST"]
    assert rows["a/m"][1:6] == ["3", "5.0k", "60%", "1.0k", "$3.30"] and set(rows["a/m"][6]) == {"#"}
    assert rows["b/deep/n"][1:] == ["2", "1", "2.0M", "0%", "2~", "-"]
    assert rows["(nobody)"][1:] == ["1", "1", "-", "-", "-", "-"]
    assert rows["total"][1:] == ["6", "2", "2.0M", "0%", "1.0k~", "$3.30+"]
    assert "2 requests without a known cost" in out
    assert "1 request not answered to the end" in out
    assert "1 request whose tokens the provider did not tell" in out
    assert out.isascii() and "\x1b" not in out


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("provider", {"a": 3, "b": 2, "(nobody)": 1}),
        ("client", {"laptop": 1, "(no name)": 5}),
        ("format", {"openai": 5, "anthropic": 1}),
        ("day", {}),
    ],
)
def test_rows_are_grouped_by_what_is_asked_for(command, filled, by, groups):
    groups = groups or {time.strftime("%Y-%m-%d"): 6}  # told now: midnight may have passed since the tests were found
    told = json.loads(command(filled, "usage", "--by", by, "--json")[1])
    assert {row["group"]: row["requests"] for row in told["rows"]} == groups
    assert told["total"]["requests"] == 6 and told["total"]["cost"] == pytest.approx(3.3)
    table = list(csv.DictReader(io.StringIO(command(filled, "usage", "--csv", "--by", by)[1])))
    assert {row["group"]: int(row["requests"]) for row in table} == groups


@pytest.mark.parametrize(("word", "file"), [("on", "~/.llm-router.usage.db"), ("Off", ""), ("~/u.db", "~/u.db")])
def test_a_word_that_switches_the_ledger_is_no_name_of_a_file(word, file):
    assert r.ledger_path(r.Settings(usage_db=word)) == os.path.expanduser(file)


def test_a_ledger_that_cannot_be_looked_for_is_said_to_be_so(command, tmp_path):
    code, out, err = command(tmp_path, "usage", "--usage-db=" + str(tmp_path / ("x" * 300)))
    assert (code, out) == (1, "") and re.fullmatch(r"llm-router: /\S+ cannot be read: File name too long\n", err)


def test_the_span_of_time_is_chosen(command, filled):
    def count(*words):
        return (json.loads(command(filled, "usage", "--json", *words)[1])["total"] or {}).get("requests", 0)

    assert count("--since=60d") == 7
    assert count("--since=1h") == count("--today") == count("--since=" + time.strftime("%Y-%m-%d")) == 6
    assert count("--since=2999-01-01") == 0


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows has one time zone only")
def test_days_go_back_to_a_midnight_also_past_one_that_had_23_hours(monkeypatch):
    """Berlin's clocks went from 2:00 to 3:00 on 29 March 2026: 24 hours before Monday, 0:30, it was still Saturday."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        now, times = time.mktime((2026, 3, 30, 0, 30, 0, 0, 0, -1)), time.localtime
        monkeypatch.setattr(time, "localtime", lambda at=now: times(at))
        monkeypatch.setattr(time, "time", lambda: now)
        days = [times(r._parse_since(text))[:5] for text in ("0d", "1d", "2d", "40d")]
        assert days == [(2026, 3, 30, 0, 0), (2026, 3, 29, 0, 0), (2026, 3, 28, 0, 0), (2026, 2, 18, 0, 0)]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "words", [["--since=yesterday"], ["--since=2026-13-01"], ["--since="], ["--by=colour"], ["--today", "--since=7d"], ["--since=99999d", "--x"]]
)
def test_what_usage_does_not_understand_is_refused(command, tmp_path, words):
    code, out, err = command(tmp_path, "usage", *words)
    assert code == 2 and out == "" and err.startswith("llm-router: ") and err.count("\n") == 1


def test_an_empty_ledger_says_how_to_fill_it(command, tmp_path):
    code, out, _ = command(tmp_path, "usage")
    assert code == 0 and "llm-router start" in out and "llm-router run" in out
    assert json.loads(command(tmp_path, "usage", "--json")[1])["total"] is None
    assert command(tmp_path, "usage", "--csv")[1].startswith("group,requests,failed,input,")  # and no row
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_table_keeps_within_the_terminal_and_long_names_are_cut(width):
    row = dict.fromkeys(["failed", "cache_write", "reasoning", "unknown_cost", "untold", "estimated", "cost"], 0)
    row = dict(row, requests=12, input=100_000, cache_read=50_000, output=2_000, cost=0.5)
    rows = [dict(row, group="provider/" + "long-name-" * 9), dict(row, group="b/m", cost=0.1), dict(row, group=None)]
    lines = r._usage_table(rows, "model", width)
    assert max(map(len, lines)) <= max(width, 72)
    assert ("#" in lines[1]) == (width == 200) or width == 40
    if width == 200:
        assert lines[1].count("#") == 30 and lines[2].count("#") == 6


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_gets_blocks_and_no_color_keeps_colours_out(filled):
    import pty

    def shown(**env):
        lead, side = pty.openpty()
        done = subprocess.Popen(
            [sys.executable, str(PROGRAM), "usage"],
            env=clean_environment(
                filled, TERM="xterm", LC_ALL="C.UTF-8", COLUMNS="100", PYTHONIOENCODING="utf-8", **env
            ),
            stdout=side,
        )
        os.close(side)
        data = b""
        try:
            while True:
                part = os.read(lead, 65536)
                if not part:
                    break
                data += part
        except OSError:  # Linux: the other side has closed
            pass
        done.wait(30)
        os.close(lead)
        return data.decode()

    assert "█" in shown()
    assert "\x1b" not in shown(NO_COLOR="1")


def test_a_request_that_ends_while_a_batch_is_written_is_entered_before_the_end(tmp_path, monkeypatch):
    write, is_writing, may_go_on = r.Ledger._write_or_heal, threading.Event(), threading.Event()

    def slowly(self):
        is_writing.set()
        may_go_on.wait(30)
        write(self)

    monkeypatch.setattr(r.Ledger, "_write_or_heal", slowly)
    ledger = r.Ledger(str(tmp_path / "u.db"), r.Settings(), lambda *words: None)
    ledger.add(a_trail(1))
    assert is_writing.wait(30)
    ledger.add(a_trail(2))
    closing = threading.Thread(target=ledger.close)
    closing.start()
    assert until(ledger._closing.is_set)
    may_go_on.set()
    closing.join(30)
    assert [row["id"] for row in entered(tmp_path / "u.db", 2)] == ["req_1", "req_2"]


def test_a_router_without_a_request_makes_no_ledger(tmp_path):
    r.Ledger(str(tmp_path / "u.db"), r.Settings(), lambda *words: None).close()
    assert not list(tmp_path.iterdir())
