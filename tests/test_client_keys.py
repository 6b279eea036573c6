"""Further client keys: hashed at rest, named in the log, revoked by a reload."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import post, until
from running_router import config_of, provider


@pytest.fixture
def config_path(tmp_path, upstream):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(provider(upstream))))
    path.chmod(0o600)
    return path


def config(path, line, capsys):
    """(exit code, stdout, stderr) of `config --operation=...` on a file."""
    code = r.main(shlex.split("config --config=%s --operation=%s" % (path, line)))
    out, err = capsys.readouterr()
    return code, out, err


def made_key(path, name, capsys):
    code, out, _ = config(path, "add-client-key --name=" + name, capsys)
    assert code == 0
    return re.search(r"client key \(shown only now\): (\S+)", out)[1]


def test_the_key_of_a_client_is_shown_once_and_only_its_hash_is_kept(config_path, capsys):
    key = made_key(config_path, "laptop", capsys)
    text = config_path.read_text()
    assert key not in text
    entry = {"name": "laptop", "sha256": r.hashlib.sha256(key.encode()).hexdigest()}
    assert json.loads(text)["clientKeys"] == [entry]
    code, out, err = config(config_path, "list --json", capsys)
    assert code == 0 and entry["sha256"] not in out + err and key not in out + err


def test_a_client_of_the_same_name_gets_the_new_key(config_path, capsys):
    first, second = made_key(config_path, "laptop", capsys), made_key(config_path, "Laptop", capsys)
    kept = json.loads(config_path.read_text())["clientKeys"]
    assert first != second
    assert [entry["sha256"] for entry in kept] == [r.hashlib.sha256(second.encode()).hexdigest()]


def test_removing_a_client_that_is_not_there_is_refused(config_path, capsys):
    before = config_path.read_text()
    code, _, err = config(config_path, "remove-client-key --name=nobody", capsys)
    assert code == 2 and "nobody" in err and config_path.read_text() == before


@pytest.mark.parametrize(
    "entry", [{"name": "a"}, {"sha256": "0" * 64}, {"name": "a", "sha256": "short"}, {"name": "", "sha256": "0" * 64}]
)
def test_an_incomplete_client_key_is_a_problem_with_its_path(entry):
    problems = r.find_problems({"clientKeys": [entry]})
    assert any(one.path.startswith("clientKeys[0]") and one.level == "error" for one in problems)


def test_two_clients_of_one_name_are_a_problem():
    problems = r.find_problems({"clientKeys": [{"name": "a", "sha256": "0" * 64}, {"name": "A", "sha256": "1" * 64}]})
    assert any(one.path == "clientKeys[1]" for one in problems)


def test_an_entry_without_a_name_bears_none_that_could_be_removed():
    document = {"clientKeys": [{"sha256": "0" * 64}, "odd", {"name": "laptop", "sha256": "1" * 64}]}
    for name in ("none", "", "lapto"):
        with pytest.raises(r.UsageError, match=r"no client key.*; (there are|did you mean) laptop"):
            r.remove_client_key(document, name)
    assert r.remove_client_key(document, " LAPTOP").document["clientKeys"] == document["clientKeys"][:2]


def test_a_second_key_for_a_client_is_told_to_replace_the_first():
    first = r.add_client_key({}, "laptop", "a")
    assert first.notes == ("client key of laptop set",)
    assert "replaced" in r.add_client_key(first.document, "Laptop", "b").notes[0]


def test_a_client_key_opens_the_server_is_named_in_the_log_and_revoked_by_a_reload(config_path, router, capsys):
    key = made_key(config_path, "laptop", capsys)
    document = json.loads(config_path.read_text())
    running = router(document, "--require-auth=true")
    assert post(running, "openai", headers={"authorization": "Bearer " + key}).status == 200
    running.wait_log("client=laptop")
    assert post(running, "openai", headers={"authorization": "Bearer wrong"}).status == 401
    assert key not in "\n".join(running.log())
    other = r.hashlib.sha256(b"another").hexdigest()
    running.write_config(dict(document, clientKeys=[{"name": "phone", "sha256": other}]))
    assert until(lambda: post(running, "openai", headers={"authorization": "Bearer " + key}).status == 401)
    assert post(running, "openai", headers={"x-api-key": "another"}).status == 200


def test_what_is_kept_of_one_clients_answers_serves_no_other_client(router, upstream):
    """Incident 20: neither by an id that was overheard, nor because two conversations begin alike."""
    keys = [{"name": name, "sha256": r.hashlib.sha256(name.encode()).hexdigest()} for name in ("ann", "bob")]
    running = router(config_of(provider(upstream), clientKeys=keys), "--require-auth=true")
    upstream.handler = fake.final_text("", reasoning="only for ann", tool_calls=[("look", {})])
    said = {"role": "user", "content": "hi"}
    told = post(running, "responses", headers={"x-api-key": "ann"}, input=[said])
    thought, call = told.json["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "dark"}
    seen = {}
    for name in ("ann", "bob"):
        upstream.calls.clear()
        post(running, "responses", headers={"x-api-key": name}, input=[said, call, result])
        reference = {"type": "item_reference", "id": thought["id"]}
        status = post(running, "responses", headers={"x-api-key": name}, input=[said, reference, call, result]).status
        seen[name] = status, b"only for ann" in upstream.calls[0].body
    assert seen == {"ann": (200, True), "bob": (400, False)}


def test_auth_without_any_key_is_refused(config_path, capsys):
    assert r.main(["start", "--config=%s" % config_path, "--require-auth=true", "--port=0"]) == 2
    assert "master key" in capsys.readouterr().err
    assert Path(config_path).exists()


def test_a_peer_that_guesses_waits_longer_and_a_right_key_does_not(upstream, router):
    running = router(dict(config_of(provider(upstream)), masterKey="right"), "--require-auth=true")
    waits = []
    for number in range(8):
        wrong = "wrong%d" % number
        began = time.monotonic()
        headers = {"x-api-key": wrong, "api-key": wrong, "authorization": "Bearer " + wrong}
        assert post(running, "openai", headers=headers).status == 401
        waits.append(time.monotonic() - began)
    assert waits[7] >= 0.4  # a lower bound: the 24th wrong key has to wait that long, however many come at once
    assert post(running, "openai", headers={"x-api-key": "right"}).status == 200
