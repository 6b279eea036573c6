"""What doctor finds, and the models a provider lists."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import llm_router as r
from fake_upstream import dead_port
from running_router import clean_environment, free_port


class Provider:
    """A provider's GET .../models with one answer: status and body; `seen` are the requests' paths and keys."""

    def __init__(self):
        self.status, self.body, self.location, self.seen = 200, {"data": [{"id": "m1"}, {"id": "m2"}]}, "", []
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                provider.seen.append((self.path, self.headers.get("authorization") or self.headers.get("x-api-key")))
                data = json.dumps(provider.body).encode()
                self.send_response(provider.status)
                if provider.location:
                    self.send_header("location", provider.location)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def account():
    made = Provider()
    yield made
    made.server.shutdown()
    made.server.server_close()


def document(account, **fields):
    entry = {"id": "acct", "baseUrl": account.url + "/v1", "apiKey": "the-account-key", "models": ["m1"]}
    return {"providers": [dict(entry, **fields)]}


@pytest.fixture
def doctor(tmp_path, capsys):
    """`doctor(document, *flags)` -> (exit code, {about: level}, all the text)."""

    def run(config, *flags):
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        path.chmod(0o600)
        line = ["doctor", "--config=%s" % path, "--port=%d" % free_port(), *flags]
        code = r.main([*line, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert code == (0 if found["ok"] else 1)
        assert r.main(line) == code
        return code, {one["about"]: one["level"] for one in found["findings"]}, capsys.readouterr().out

    return run


def test_all_is_well(doctor, account):
    code, levels, text = doctor(document(account))
    assert code == 0 and levels["provider acct"] == "ok" and "problem" not in levels.values()
    assert account.seen[0] == ("/v1/models", "Bearer the-account-key")
    assert "the-account-key" not in text and "key of acct: goes to " + account.url.partition("//")[2] + "\n" in text


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_provider_that_refuses_is_a_problem_with_its_cure(doctor, account, status):
    account.status = status
    code, levels, text = doctor(document(account))
    assert code == 1 and levels["provider acct"] == "problem" and "answers %d" % status in text
    assert ("apiKey" in text) == (status < 500)


def test_a_key_that_goes_nowhere_is_not_told_to_go_somewhere(doctor):
    broken = {"id": "acct", "baseUrl": "https://user:pass@api.example.com", "apiKey": "k", "models": ["m"]}
    code, levels, text = doctor({"providers": [broken]}, "--offline")
    assert code == 1 and "key of acct" not in levels and "user:pass" not in text


def test_a_provider_without_a_list_of_models_is_only_a_warning(doctor, account):
    account.status = 404
    code, levels, _ = doctor(document(account))
    assert code == 0 and levels["provider acct"] == "warning"


def test_a_provider_that_nobody_answers_for_is_a_problem(doctor):
    nobody = {"id": "acct", "baseUrl": "http://127.0.0.1:%d" % dead_port(), "apiKey": "k", "models": ["m"]}
    code, levels, _ = doctor({"providers": [nobody]})
    assert code == 1 and levels["provider acct"] == "problem"


def test_a_configured_model_that_is_not_listed_is_named(doctor, account):
    _, levels, text = doctor(document(account, models=["m1", "m3"]))
    assert levels["provider acct"] == "warning" and "does not list m3" in text


def test_offline_asks_nobody(doctor, account):
    code, levels, _ = doctor(document(account), "--offline")
    assert code == 0 and not account.seen and "provider acct" not in levels


def test_a_broken_configuration_is_a_problem_with_its_place(doctor):
    code, levels, text = doctor('{"providers": [', "--offline")
    assert code == 1 and levels["configuration"] == "problem" and "config.json:1:" in text


def test_every_problem_of_the_configuration_is_shown_with_its_cure(doctor, account):
    code, _, text = doctor(document(account, baseUrl="ftp://x", models=["m1"]), "--offline")
    assert code == 1 and "providers[0].baseUrl" in text and "https://" in text


def test_variables_that_lead_clients_elsewhere_are_shown(doctor, account, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1/elsewhere?key=planted-secret")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:planted-secret@proxy.example:3128")
    code, levels, text = doctor(document(account), "--offline")
    assert code == 1 and levels["clients"] == "warning" and levels["certificates"] == "problem"
    assert levels["proxy"] == "ok" and "planted-secret" not in text


def test_a_proxy_that_speaks_no_http_and_certificates_that_are_not_there_are_problems(doctor, account, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:99999")
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("NO_PROXY", "a.example, 10.0.0.1:80")
    monkeypatch.setenv("LLM_ROUTER_CA_BUNDLE", "/nowhere/ca.pem")
    code, levels, text = doctor(document(account), "--offline")
    assert code == 1 and levels["certificates"] == "problem"
    assert text.count("_PROXY is none that speaks HTTP") == 3 and "NO_PROXY is" not in text
    assert "LLM_ROUTER_CA_BUNDLE names no file" in text


def test_certificates_are_looked_for_where_each_variable_is_read(doctor, account, monkeypatch, tmp_path):
    """OpenSSL reads SSL_CERT_FILE and expands no `~`."""
    (tmp_path / "ca.pem").write_text("")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LLM_ROUTER_CA_BUNDLE", "~/ca.pem")
    assert "names no file" not in doctor(document(account), "--offline")[2]
    monkeypatch.setenv("SSL_CERT_FILE", "~/ca.pem")
    assert "SSL_CERT_FILE names no file" in doctor(document(account), "--offline")[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells who has a port")
@pytest.mark.parametrize("told", ["is used by pid", "Address already in use"])
def test_a_port_in_foreign_hands_is_a_problem(account, tmp_path, capsys, monkeypatch, told):
    """Whose it is, is not told of another user's process."""
    if told != "is used by pid":
        monkeypatch.setattr(r, "find_listener", lambda port: None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document(account)))
    path.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        line = "doctor --offline --config=%s --port=%d" % (path, holder.getsockname()[1])
        assert r.main(line.split()) == 1
    assert told in capsys.readouterr().out


def test_the_models_that_a_provider_lists_are_shown_and_nothing_is_stored(account, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document(account, format="anthropic", formats=["anthropic"])))
    path.chmod(0o600)
    before = path.read_bytes()
    line = ["config", "--operation=discover-models", "--provider-id=ACCT", "--config=%s" % path]
    assert r.main(line) == 0
    assert capsys.readouterr().out == "m1\nm2\n"
    assert account.seen[0] == ("/v1/models?limit=1000", "the-account-key")
    assert r.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"provider": "acct", "models": ["m1", "m2"]}
    assert path.read_bytes() == before
    assert r.main([line[0], line[1], "--provider-id=nobody", line[3]]) == 2
    assert "acct" in capsys.readouterr().err


def test_a_redirect_is_not_followed_with_the_key(account):
    account.status, account.location = 302, account.url + "/elsewhere"
    config = r.read_config(document(account), {})
    with pytest.raises(r.RouterError, match="302"):
        r.run_loop(r.ask_models(r.ProbePlan(config.providers[0], wires=("openai",)), r.Settings(), {}))
    assert len(account.seen) == 1


@pytest.mark.parametrize("body", ["text", {}, {"data": 7}, {"data": [{"id": 5}, "text", None]}])
def test_a_strange_list_of_models_is_an_empty_one_and_what_is_none_is_refused(account, body):
    account.body = body
    plan = r.ProbePlan(r.read_config(document(account), {}).providers[0], wires=("openai",))
    if isinstance(body, dict) and isinstance(body.get("data"), list):
        assert r.run_loop(r.ask_models(plan, r.Settings(), {})) == []
    else:
        with pytest.raises(r.RouterError, match="no list"):
            r.run_loop(r.ask_models(plan, r.Settings(), {}))


PATIENT = """
import signal, sys
import llm_router as r
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
r._LISTING_LIMIT_S, r._PROBE_LISTING_MS = 3600, 3600_000
sys.exit(r.main(["doctor"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child there")
def test_ctrl_c_ends_doctor_while_providers_say_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        path = tmp_path / ".llm-router.json"
        one = {"baseUrl": "http://127.0.0.1:%d" % silent.getsockname()[1], "apiKey": "k", "models": ["m"]}
        path.write_text(json.dumps({"providers": [dict(one, id=id) for id in "ab"]}))
        path.chmod(0o600)
        words = [sys.executable, "-c", PATIENT]
        environ = dict(clean_environment(tmp_path), PYTHONPATH=os.path.dirname(r.__file__))
        with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            with silent.accept()[0], silent.accept()[0]:  # both are asked
                child.send_signal(signal.SIGINT)
                try:
                    assert child.communicate(timeout=60) == (b"", b"")
                finally:
                    child.kill()
        assert child.returncode == 130
