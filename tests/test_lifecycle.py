"""status, explain, reload, stop and the state file, against the real program as a process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import until
from running_router import COMMAND, PROGRAM, clean_environment, config_of, descriptors_of, provider

SCRIPT = True
CHAT = "/v1/chat/completions"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
QUICK = ("--origin-retry-base-delay-ms=1", "--watch-config=false")


def run(home, *words):
    """(exit code, stdout, stderr) of a command with `home` as its home directory."""
    done = subprocess.run(
        [*COMMAND, *words],
        env=clean_environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def ok(home, *words):
    code, out, err = run(home, *words)
    assert (code, err) == (0, "")
    return out


def refused(home, code, *words):
    """The one line of an error."""
    got, out, err = run(home, *words)
    assert (got, out) == (code, "")
    assert err.startswith("llm-router: ")
    assert err.count("\n") == 1
    return err


def state_file(home):
    return home / ".llm-router.runtime.json"


def instances(home):
    return json.loads(state_file(home).read_text())["instances"]


def two_models(upstream, **fields):
    """Model a, which falls back to model b, at one upstream."""
    return config_of(provider(upstream, models=({"id": "a", "fallbackModels": ["fake/b"]}, "b")), **fields)


@pytest.fixture
def running(router, upstream):
    """A running router whose default model is fake/a; its upstream as `.upstream`."""
    started = router(two_models(upstream), *QUICK)
    started.upstream = upstream
    return started


# ----- status -----


def test_status_shows_where_it_runs_with_what_and_every_model(running):
    out = ok(running.home, "status")
    lines = [line.split() for line in out.splitlines()]
    assert "http://127.0.0.1:%d, pid %d" % (running.port, running.process.pid) in out
    assert "%s (ok)" % running.config_path in out
    assert ["MODEL", "STATE", "BACK", "IN", "OK", "FAILED", "REASON", "LAST", "ERROR"] in lines
    assert ["fake/a", "(default)", "ok", "0", "0"] in lines
    assert ["fake/b", "ok", "0", "0"] in lines
    assert "upstream-key" not in out


def test_status_counts_down_what_cools_and_says_why(running):
    running.upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}, {"retry-after": "3000"}))
    running.post(CHAT, MESSAGES)
    line = next(line for line in ok(running.home, "status").splitlines() if line.startswith("fake/a"))
    assert "cooling" in line
    assert "49 min" in line
    state = json.loads(ok(running.home, "status", "--json"))
    cooling = next(one for one in state["candidates"] if one["model"] == "fake/a")
    assert cooling["state"] == "cooling"
    assert 2900 < cooling["left_s"] <= 3000


def test_status_counts_what_went_well_and_names_the_last_error(running):
    running.upstream.answer(fake.json_answer(404, {"error": {"message": "no such model"}}))
    id = running.post(CHAT, MESSAGES).headers["x-llm-router-request-id"]
    running.post(CHAT, dict(MESSAGES, model="fake/b"))
    rows = {line.split()[0]: line for line in ok(running.home, "status").splitlines() if line.startswith("fake/")}
    assert re.search(" 0 +1  not found ", rows["fake/a"])
    assert id in rows["fake/a"] and "404" in rows["fake/a"] and "no such model" in rows["fake/a"]
    assert rows["fake/b"].split() == ["fake/b", "ok", "2", "0"]


def test_status_shows_no_model_that_a_reload_took_away_but_those_that_clients_name(router, upstream):
    config = two_models(upstream)
    config["providers"].append(provider(upstream, id="open", models=["*"]))
    running = router(config, "--watch-config=false", *QUICK)
    always = fake.json_answer(404, {"error": {"message": "no such model"}})
    upstream.handler = lambda call: always
    for model in ("fake/a", "open/any", "open/other"):
        running.post(CHAT, dict(MESSAGES, model=model))

    def shown():
        return [one["model"] for one in json.loads(ok(running.home, "status", "--json"))["candidates"]]

    assert shown() == ["fake/a", "fake/b", "open/*", "open/any", "open/other"]
    config["providers"][0]["models"] = ["b"]
    running.write_config(dict(config, defaultModel="fake/b"))
    ok(running.home, "reload")
    assert shown() == ["fake/b", "open/*", "open/any", "open/other"]


def test_status_as_json_holds_no_secret(running):
    out = ok(running.home, "status", "--json")
    status = json.loads(out)
    assert (status["pid"], status["port"]) == (running.process.pid, running.port)
    entry = instances(running.home)[0]
    assert entry["token"] not in out
    assert "upstream-key" not in out


@pytest.mark.parametrize("words", [("status",), ("explain",), ("reload",)])
def test_what_needs_a_running_instance_fails_without_one(tmp_path, words):
    assert "no llm-router is running" in refused(tmp_path, 1, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("port", ["x", "70000", "-1", ""])
def test_a_port_that_is_none_is_wrong_input(tmp_path, port):
    assert "--port" in refused(tmp_path, 2, "status", "--port=" + port)


# ----- explain -----


def test_explain_tells_the_story_of_the_last_request(running):
    running.upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}))
    reply = running.post(CHAT, dict(MESSAGES, model="fake/a"))
    out = ok(running.home, "explain", "last")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith(reply.headers["x-llm-router-request-id"] + " ")
    assert lines[1] == "asked for fake/a (openai chat)"
    first, second = [number for number, line in enumerate(lines) if line[:2] in ("1.", "2.")]
    assert lines[first].startswith("1. fake/a openai 429: rate limited (took ")
    assert lines[first + 1 : first + 3] == ["slow down", "-> fall back to fake/b"]
    assert lines[second].startswith("2. fake/b openai ok (took ")
    assert "answered by fake/b" in lines
    assert "outcome ok, status 200" in lines
    assert "tokens 11 input, 7 output" in lines
    assert ok(running.home, "explain") == out


def test_explain_tells_waits_streams_and_failures(running):
    for _ in range(4):
        running.upstream.answer(fake.json_answer(500, {"error": {"message": "oh\x1b[31m no"}}))
    reply = running.post(CHAT, MESSAGES, stream=True)
    out = ok(running.home, "explain", reply.headers["x-llm-router-request-id"])
    assert "asked for      the default model (openai chat, streamed)" in out
    assert out.count("500: temporary") == 4
    assert "(waited 1 ms, took " in out
    assert "-> give up" in out
    assert "answered by" not in out
    assert "outcome        temporary, status 500" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("kind", sorted(r.RULES))
def test_explain_says_for_every_outcome_what_decides_it_in_flags_that_exist(kind):
    flags = re.findall(r"--[a-z-]+", r._WHAT_DECIDES[kind])
    assert set(flags) <= {row.flag for row in r.SETTINGS} | {"--operation"}


def test_explain_says_what_decides_the_outcomes_that_occurred_and_no_others(running):
    running.upstream.answer(fake.json_answer(500, {"error": {"message": "once"}}))
    running.post(CHAT, MESSAGES)
    lines = [line.split() for line in ok(running.home, "explain").splitlines()]
    assert [line[0] for line in lines[lines.index(["what", "decides"]) + 1 :]] == ["temporary"]


def test_explain_says_why_the_model_that_was_asked_for_was_not_asked_first(running):
    running.upstream.answer(fake.json_answer(429, {"error": {"message": "slow down"}}))
    running.post(CHAT, MESSAGES)
    assert "passed over" not in ok(running.home, "explain")
    running.post(CHAT, MESSAGES)
    out = ok(running.home, "explain")
    assert "passed over    fake/a, which cools after: rate limited" in out and "1. fake/b" in out


def test_the_reason_for_which_a_model_was_passed_over_is_that_of_the_cooldown_that_lasts_longest():
    book, model, provider_of = r.HealthBook(), r.Model("m"), r.Provider("a")
    book.apply([r.HealthChange("a/m", cooldown_until=5.0, reason="rate_limited", at=1.0)])
    book.apply([r.HealthChange("a/", cooldown_until=600.0, reason="auth", at=7.0)])
    assert r._why_not_first(r.Candidate("a/m", provider_of, model, "m"), book) == "a/m, which cools after: auth"


def test_explain_draws_each_attempt_at_its_place_in_the_time_of_the_request(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    attempts = [
        r.Attempt("a/m", "openai", "500", "temporary", 0, 250, ""),
        r.Attempt("b/m", "openai", "ok", "ok", 250, 250, ""),
    ]
    trail = {"attempts": [attempt._asdict() for attempt in attempts], "total_ms": 1000, "stream": True}
    bars = [line.partition(")  ")[2] for line in r._attempt_lines(trail)]
    assert [bar.strip() for bar in bars] == ["########", "." * 7 + "#" * 7 + "=" * 8]
    assert len(bars[1]) == 30 and bars[1].startswith(" " * 8)
    monkeypatch.setenv("COLUMNS", "50")
    assert "#" not in "".join(r._attempt_lines(trail))


def test_explain_as_json_and_by_flag_is_the_record_of_that_request(running):
    id = running.post(CHAT, MESSAGES).headers["x-llm-router-request-id"]
    running.post(CHAT, MESSAGES)
    for words in (["--json", id], ["--id=" + id, "--json"], [id, "--json"]):
        assert json.loads(ok(running.home, "explain", *words))["id"] == id


def test_explain_of_a_request_that_nobody_remembers_fails(running):
    for id in ("req_nope", "last", "../status", "a b\r\n", "ä" * 9000):
        assert "not remembered" in refused(running.home, 1, "explain", id)


def test_explain_writes_no_escape_code_that_a_client_has_put_into_a_name():
    trail = r.Trail("req_1", 0.0, 0.0)
    trail.wire, trail.operation, trail.model, trail.asked = "openai", "chat", "any/\x1b[31m", "\x1b[31m"
    trail.status, trail.outcome = 200, r.OK
    assert "\x1b" not in "\n".join(r._explanation(r.log_record(trail)))


def test_explain_takes_one_request(running):
    assert "unexpected two" in refused(running.home, 2, "explain", "one", "two")


# ----- reload -----


def test_reload_applies_an_edit_and_names_the_providers_that_changed(running, make_upstream):
    other = make_upstream(fake.final_text("from the other"))
    running.write_config(two_models(other))
    assert ok(running.home, "reload") == "reloaded, changed providers: fake\n"
    assert "from the other" in running.post(CHAT, MESSAGES).text
    assert ok(running.home, "reload") == "reloaded, every provider is as it was\n"


@pytest.mark.parametrize("broken", ['{"providers": oops}', '{"defaultModel": "nope"}'])
def test_reload_of_a_broken_edit_keeps_the_last_good_configuration_and_says_so(running, broken):
    running.write_config(broken)
    error = run(running.home, "reload")
    assert error[:2] == (1, "")
    assert ".json:1:15: Expecting value\n" in error[2] or "defaultModel" in error[2]
    assert "stays" in error[2]
    assert running.post(CHAT, MESSAGES).status == 200
    assert "(ok)" not in ok(running.home, "status")
    running.write_config(two_models(running.upstream))
    ok(running.home, "reload")
    assert "(ok)" in ok(running.home, "status")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_restart_is_refused_while_the_file_would_not_let_it_start(running, capsys, monkeypatch):
    """It goes on with the last good configuration, which would be lost."""
    good = running.config_path.read_text()
    running.config_path.write_text("{")
    monkeypatch.setattr(r, "running_instances", lambda: [(find(running), {"file": os.path.realpath(r.__file__)})])
    assert r._restart_instances() == []
    told = capsys.readouterr().err
    assert "pid %d still runs the version before: not reloaded" % running.process.pid in told
    running.config_path.write_text(good)
    assert "reloaded" in ok(running.home, "reload") and "pid %d" % running.process.pid in ok(running.home, "status")


def find(running):
    return r.find_instance(str(state_file(running.home)), "", 0)


def test_a_reload_waits_for_no_pipe(running):
    """Nobody may ever write to it, and every stream would wait as well."""
    running.config_path.unlink()
    os.mkfifo(running.config_path)
    assert r.file_stamp(str(running.config_path)) == ()  # it would change as it is read, and be read again
    code, _, said = run(running.home, "reload")
    assert code == 1 and "is not a regular file: it is read at the start only" in said
    assert running.post(CHAT, MESSAGES).status == 200


# ----- stop -----


def test_stop_waits_until_the_instance_is_gone(running):
    assert ok(running.home, "stop") == "stopped (pid %d, port %d)\n" % (running.process.pid, running.port)
    assert running.process.wait(30) == 0
    assert instances(running.home) == []


def test_stop_without_an_instance_is_done_at_once(tmp_path):
    assert "no llm-router is running" in ok(tmp_path, "stop")


def test_stop_takes_seconds_only(running):
    for grace in ("x", "-1", "", "1.5"):
        assert "--grace" in refused(running.home, 2, "stop", "--grace=" + grace)
    assert running.process.poll() is None


def test_an_open_stream_may_finish_after_stop(running):
    gate, events = threading.Event(), fake.chat_stream("late")
    running.upstream.answer(fake.sse_answer(events[:-1] + [fake.Gate(gate)] + events[-1:]))
    stream = running.open(CHAT, dict(MESSAGES, stream=True))
    child = subprocess.Popen(
        [sys.executable, str(PROGRAM), "stop"], env=clean_environment(running.home), stdout=subprocess.PIPE
    )
    running.wait_log("stopping")
    gate.set()
    assert stream.read_rest().ended == "clean"
    assert b"stopped" in child.communicate(timeout=60)[0]


@pytest.mark.skipif(os.name != "posix", reason="its log is read, and Windows has no /proc to miss it in")
def test_stop_leaves_streams_the_time_that_start_was_given_and_returns_when_the_instance_is_gone(router, upstream):
    """What had to be cut is no failure of who was told to stop, or a service's keeper would start it once more; and
    the client has not left."""
    running = router(two_models(upstream), *QUICK, "--grace=1")
    upstream.answer(fake.sse_answer(fake.chat_stream("never")[:2], end="hang"))
    stream = running.open(CHAT, dict(MESSAGES, stream=True))
    assert stream.read_event()
    upstream.answer(fake.hang_before_head())
    whole = socket.create_connection((running.host, running.port), 30)
    whole.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}" % CHAT.encode())
    upstream.wait_calls(2)
    assert "stopped" in ok(running.home, "stop")
    assert instances(running.home) == []
    assert running.process.wait(30) == 0
    running.wait_log("1 s to finish")
    assert until(lambda: "\n".join(running.log()).count(" 503 stopping ") == 2, timeout=30)  # its last lines are read
    assert "client_gone" not in "\n".join(running.log())
    assert b'"code":"stopping"' in stream.read_rest().body
    with whole:
        assert whole.makefile("rb").read().startswith(b"HTTP/1.1 503 ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are POSIX")
def test_a_pipe_in_place_of_the_state_file_keeps_nobody_waiting(tmp_path):
    """A start would not say a word, a running server not end."""
    os.mkfifo(str(state_file(tmp_path)))
    reader = threading.Thread(target=r.read_instances, args=(str(state_file(tmp_path)),), daemon=True)
    reader.start()
    reader.join(30)
    assert not reader.is_alive()


def test_one_that_still_finishes_its_streams_is_said_to_stop_and_its_entry_stays(router, upstream):
    running = router(two_models(upstream), *QUICK)
    upstream.answer(fake.sse_answer(fake.chat_stream("never")[:2], end="hang"))
    stream = running.open(CHAT, dict(MESSAGES, stream=True))
    assert stream.read_event()
    entry = r.read_instances(str(state_file(running.home)))[0]
    r.ask_instance(entry, "stop/600", "POST")
    running.wait_log("stopping")
    said = "pid %d is stopping, its open requests have 5" % running.process.pid
    assert said in refused(running.home, 1, "status") and said in ok(running.home, "stop")
    late = [dict(instances(running.home)[0], ends=1.0)]  # one that was killed before its time was over
    assert late[0]["id"] == entry.id
    running.kill()
    state_file(running.home).write_text(json.dumps({"instances": late}))
    assert "stopping" not in ok(running.home, "stop") and instances(running.home) == []
    stream.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_suspended_instance_is_no_dead_one_and_a_lost_entry_comes_back(running, monkeypatch):
    entry = r.read_instances(str(state_file(running.home)))
    monkeypatch.setattr(r, "_CONTROL_TIMEOUT_S", 0.3)
    running.process.send_signal(signal.SIGSTOP)
    try:
        found = r.find_instance(str(state_file(running.home)), "", 0)
        with pytest.raises(r.RouterError, match="pid %d has port .* suspended" % running.process.pid):
            r.ask_instance(found, "status")
    finally:
        running.process.send_signal(signal.SIGCONT)
    state_file(running.home).write_text("damaged")
    assert until(lambda: r.read_instances(str(state_file(running.home))) == entry, timeout=30)


def test_stop_and_reload_tell_programs_what_they_did(running):
    assert json.loads(ok(running.home, "reload", "--json")) == {"reloaded": True, "changed": []}
    told = {"stopped": True, "pid": running.process.pid, "port": running.port}
    assert json.loads(ok(running.home, "stop", "--json")) == told
    assert json.loads(ok(running.home, "stop", "--json")) == {"stopped": False}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_start_takes_the_seconds_that_a_signal_leaves_to_open_streams(router, upstream):
    gate = threading.Event()
    events = fake.chat_stream("never")
    upstream.answer(fake.sse_answer([*events[:2], fake.Gate(gate), *events[2:]]))
    running = router(two_models(upstream), *QUICK, "--grace=1")
    stream = running.open(CHAT, dict(MESSAGES, stream=True))
    assert stream.read_event()
    running.process.terminate()
    assert "1 s to finish" in running.wait_log("stopping")
    assert stream.read_rest().ended == "cut"
    assert running.process.wait(30) == 1
    gate.set()
    assert "--grace" in refused(running.home, 2, "start", "--grace=soon")


# ----- several instances, and the state file -----


@pytest.fixture
def both(router, upstream):
    """Two running routers that share one state file."""
    first = router(two_models(upstream), *QUICK)
    second = router(two_models(upstream), *QUICK, env={"HOME": first.home, "USERPROFILE": first.home})
    return first, second


def test_a_router_made_of_key_variables_takes_the_configuration_file_once_there_is_one(tmp_path, upstream):
    """As who starts without one and then adds a provider expects; one that has none keeps what runs."""
    environ = dict(clean_environment(tmp_path), OPENAI_API_KEY="k")
    line = [sys.executable, str(PROGRAM), "start", "--port=0"]
    with subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout.readline().startswith("listening on ")
            assert "every provider is as it was" in ok(tmp_path, "reload")
            (tmp_path / ".llm-router.json").write_text('{"providers": []}')
            assert "no enabled provider" in refused(tmp_path, 1, "reload")
            (tmp_path / ".llm-router.json").write_text(json.dumps(two_models(upstream)))
            assert until(lambda: "fake/a" in ok(tmp_path, "status"), timeout=30)
            assert str(tmp_path / ".llm-router.json") in ok(tmp_path, "status", "--config=~/.llm-router.json")
            (tmp_path / ".llm-router.json").write_text('{"providers":\n\n')
            said = refused(tmp_path, 1, "reload")
            assert said.endswith(".llm-router.json:3:1: Expecting value\n") and "stays" in said
        finally:
            child.kill()


def test_of_several_instances_the_port_or_the_configuration_chooses(both):
    first, second = both
    error = refused(first.home, 2, "stop")
    assert "--port=%d" % first.port in error
    assert str(second.port) in error
    assert "only --port=%d or --port=%d" % (first.port, second.port) in refused(first.home, 1, "status", "--port=1")
    assert first.process.poll() is second.process.poll() is None
    for words, pid in (
        (["--port=%d" % second.port], second.process.pid),
        (["--config=%s" % first.config_path], first.process.pid),
    ):
        assert json.loads(ok(first.home, "status", "--json", *words))["pid"] == pid
    assert "pid %d" % second.process.pid in ok(first.home, "stop", "--port", str(second.port))
    assert "pid %d" % first.process.pid in ok(first.home, "status")


@pytest.mark.skipif(os.name != "posix", reason="a symbolic link")
def test_an_instance_is_found_by_any_name_of_its_configuration_file(running, tmp_path):
    (tmp_path / "link.json").symlink_to(running.config_path)
    assert "pid %d" % running.process.pid in ok(running.home, "status", "--config=%s" % (tmp_path / "link.json"))


@pytest.mark.skipif(os.name != "posix", reason="permission bits of POSIX")
def test_the_state_file_is_private(running):
    assert state_file(running.home).stat().st_mode & 0o777 == 0o600


ODD_HOST = {"id": "x", "pid": 1, "host": "a\r\nb", "port": 1, "config": "", "token": "t", "started": 0}
CORRUPT = ["", "oops", "[]", '{"instances": [1, {"pid": 1}, {"id": []}]}', "\x00" * 100]


@pytest.mark.parametrize("text", [*CORRUPT, json.dumps({"instances": [ODD_HOST]})])
def test_a_corrupt_state_file_is_none(tmp_path, text):
    state_file(tmp_path).write_text(text)
    assert "no llm-router is running" in ok(tmp_path, "stop")
    assert "no llm-router is running" in refused(tmp_path, 1, "status")


def test_a_corrupt_state_file_is_replaced_by_the_next_start(router, upstream, tmp_path):
    (tmp_path / "router1").mkdir()
    state_file(tmp_path / "router1").write_text("oops")
    started = router(two_models(upstream), *QUICK)
    assert "pid %d" % started.process.pid in ok(started.home, "status")


def test_a_stale_entry_is_cleaned_and_the_living_one_stays(running, monkeypatch):
    alive = instances(running.home)[0]
    dead = dict(alive, id="0" * 16, port=fake.dead_port())
    damaged = [dict(dead, id="1" * 16, token="a\nb"), dict(dead, id="2" * 16, host="a" * 70)]
    path = state_file(running.home)
    path.write_text(json.dumps({"instances": [dead, *damaged, alive]}))
    with monkeypatch.context() as patch:  # a full disk keeps nobody from stopping what runs
        patch.setattr(r, "write_private", lambda *_, **more: (_ for _ in ()).throw(r.RouterError("no space left")))
        assert r.find_instance(str(path), "", 0).id == alive["id"]
    assert "pid %d" % running.process.pid in ok(running.home, "status")
    assert instances(running.home) == [alive]


def test_a_killed_instance_leaves_nothing_that_matters(running):
    running.kill()
    assert "no llm-router is running" in ok(running.home, "stop")
    assert instances(running.home) == []


def test_another_program_that_streams_without_end_does_not_hold_anybody_up(tmp_path, monkeypatch):
    """A development server that answers every path with events, on the port of an instance that was killed."""
    monkeypatch.setattr(r, "_CONTROL_TIMEOUT_S", 0.5)
    sent = []

    def drip(held):
        with held, contextlib.suppress(OSError):
            held.recv(4096)
            held.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while len(sent) < 3000:
                held.sendall(b" ")
                sent.append(time.sleep(0.02))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: drip(server.accept()[0]), daemon=True).start()
        gone = r.Instance("a" * 16, 1, "127.0.0.1", server.getsockname()[1], "", "token", 0.0)
        with pytest.raises(r.RouterError):
            r.ask_instance(gone, "status")
    assert len(sent) < 3000


def test_another_program_on_the_port_of_a_dead_instance_is_not_taken_for_it(running, upstream):
    """The entry's id must come back: a port may be in other hands by now."""
    alive = instances(running.home)[0]
    running.kill()
    upstream.handler = lambda call: fake.json_answer(200, {"instance": "another", "pid": 1})
    state_file(running.home).write_text(
        json.dumps({"instances": [dict(alive, port=int(upstream.url.rsplit(":", 1)[1]))]})
    )
    assert "no llm-router is running" in ok(running.home, "stop")
    assert instances(running.home) == []


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0, "0 s"),  # of what is known in seconds only, as how long it has been up
        (1, "1 ms"),
        (999, "999 ms"),
        (1000, "1 s"),
        (59_900, "59.9 s"),
        (125_000, "2 min 5 s"),
        (11_520_000, "3 h 12 min"),
    ],
)
def test_durations_read_well(ms, words):
    assert r.show_duration(ms) == words


def test_an_edit_of_the_file_is_applied_while_running_and_a_broken_one_keeps_the_last_good(router, upstream):
    upstream.handler = fake.final_text("hi")
    running = router(config_of(provider(upstream, models=["one"])), "--origin-retry-base-delay-ms=1")

    def knows(model):
        return running.post(CHAT, dict(MESSAGES, model=model)).status == 200

    assert knows("fake/one") and not knows("fake/two")
    running.write_config(config_of(provider(upstream, models=["one", "two"])))
    until(lambda: knows("fake/two"))
    running.write_config("{ broken")
    until(lambda: running.get("/health").json["config"] != "ok")
    assert knows("fake/two")
    running.write_config(config_of(provider(upstream, models=["three"])))
    until(lambda: knows("fake/three"))
    assert running.get("/health").json["config"] == "ok" and not knows("fake/two")


def test_an_edit_made_the_moment_the_server_listens_is_applied(router, upstream):
    """It has read the file by then, but does not watch it yet."""
    running = router(config_of(provider(upstream, models=["one"])))
    running.write_config(config_of(provider(upstream, models=["two"])))
    until(lambda: running.post(CHAT, dict(MESSAGES, model="fake/two")).status == 200)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux'")
def test_a_server_runs_from_byte_code_in_the_process_that_was_started_and_knows_its_file(running):
    words = Path("/proc/%d/cmdline" % running.process.pid).read_text().split("\0")
    assert "llm_router=%s" % PROGRAM in words
    assert words[words.index("llm_router=%s" % PROGRAM) + 1].startswith("/proc/self/fd/")
    assert not any("memfd" in name for name in descriptors_of(running.process.pid))
    assert json.loads(ok(running.home, "status", "--json"))["pid"] == running.process.pid


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is open keeps its name there")
def test_a_start_in_the_background_is_seen_in_a_log_that_is_moved_away_at_once(tmp_path):
    """It was nearly full. Nobody who waits for the line in vain should end a server that serves."""
    log = tmp_path / "log"
    log.write_text("before\nlistening on http://127.0.0.1:8787\n  pid                 77\n")

    def poll():
        if not (tmp_path / "log.1").exists():
            os.replace(log, tmp_path / "log.1")
            log.write_text("a request\n")

    child = SimpleNamespace(pid=77, poll=poll)
    assert r._wait_for_start(child, str(log), len("before\n")) == "http://127.0.0.1:8787"


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux'")
@pytest.mark.parametrize("words", [["--version"], ["start", "--detach"], ["status"]])
def test_other_commands_run_from_the_source_they_were_given(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM)] + words)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started once more"))
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    source = "path = shed_source(%r)" % str(PROGRAM)
    assert exec_as_script(source)["path"] == str(PROGRAM)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux'")
def test_where_a_process_cannot_start_anew_the_server_runs_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "start"])
    calls = []

    def forbidden(*arguments):
        calls.append(arguments)
        raise PermissionError

    monkeypatch.setattr(os, "execv", forbidden)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    assert exec_as_script("path = shed_source(%r)" % str(PROGRAM))["path"] == str(PROGRAM)
    assert len(calls) == 1


def exec_as_script(source):
    """The names of a module, compiled and run as a script would be."""
    names = {"shed_source": r.shed_source, "__spec__": None}
    exec(compile(source, str(PROGRAM), "exec"), names)  # noqa: S102  it is what is tested
    return names
