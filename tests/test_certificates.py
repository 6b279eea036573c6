"""Certificates that do not verify, on the real program: the error says why, nothing of the request is sent, and the next
provider answers. An authority of the test's own issues them, so that each has one fault and no other."""

import http.server
import re
import ssl
import subprocess
import threading

import pytest

import fake_upstream as fake
import llm_router as r
from exchanges import PATHS, ask
from running_router import RunningRouter, config_of, provider

pytestmark = pytest.mark.skipif(not fake.can_tls(), reason="makes certificates with the openssl program")

SETTINGS = """
[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
rand_serial = yes
certificate = authority.pem
private_key = authority.key
default_md = sha256
policy = any
unique_subject = no
[any]
commonName = supplied
[here]
subjectAltName = IP:127.0.0.1,DNS:localhost
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[elsewhere]
subjectAltName = DNS:other.example
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
# fault -> names, first and last day, words of the error; "" is none
FAULTS = {
    "": ("here", "20200101", "20990101", ""),
    "expired": ("here", "20200101", "20200201", "expired"),
    "early": ("here", "20980101", "20990101", "not yet valid"),
    "elsewhere": ("elsewhere", "20200101", "20990101", "127.0.0.1"),
    "selfsigned": ("", "", "", "self-signed|self signed"),
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The folder of authority.pem, key.pem and a NAME.pem for each fault."""
    folder = tmp_path_factory.mktemp("authority")
    (folder / "settings").write_text(SETTINGS)
    (folder / "index.txt").write_text("")
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"

    def openssl(line):
        done = subprocess.run(["openssl", *line.split()], cwd=str(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    signs = "-addext keyUsage=critical,keyCertSign"  # Python 3.13 and later insist on it
    openssl("req -x509 %s %s -days 2 -subj /CN=authority -keyout authority.key -out authority.pem" % (new_key, signs))
    openssl("req -new %s -subj /CN=localhost -keyout key.pem -out request.pem" % new_key)
    openssl("req -x509 -key key.pem -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -out selfsigned.pem")
    for fault, (names, first, last, _) in FAULTS.items():
        if names:
            days = "-startdate %s000000Z -enddate %s000000Z" % (first, last)
            out = "%s.pem" % (fault or "good")
            openssl("ca -batch -config settings -in request.pem -extensions %s %s -out %s" % (names, days, out))
    return folder


@pytest.fixture(scope="module")
def house(certificates, tmp_path_factory):
    """A router before an upstream for each fault, all trusting the same authority; `upstreams` by fault."""
    upstreams, providers = {}, []
    try:
        for fault in FAULTS:
            upstreams[fault] = fake.FakeUpstream(fake.final_text("from " + (fault or "good")), tls=True).start()
            upstreams[fault]._context.load_cert_chain(
                str(certificates / ("%s.pem" % (fault or "good"))), str(certificates / "key.pem")
            )
            models = [{"id": "alone"}, {"id": "safe", "fallbackModels": ["good/alone"]}]
            more = {"id": fault or "good", "apiKey": "key-of-" + fault, "caBundle": str(certificates / "authority.pem")}
            providers.append(provider(upstreams[fault], models=models, **more))
        flags = ("--origin-retry-attempts=1", "--origin-fallback-cooldown-ms=0", "--fallback-circuit-failures=0")
        running = RunningRouter(config_of(*providers), flags, tmp_path_factory.mktemp("home"))
        running.upstreams = upstreams
        yield running
        running.kill()
    finally:
        for upstream in upstreams.values():
            upstream.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", list(FAULTS)[1:])
def test_a_bad_certificate_is_named_gets_nothing_and_the_next_provider_answers(house, fault, stream):
    """Hardening 2.34."""
    words = FAULTS[fault][3]
    alone = house.post(PATHS["openai"], ask("openai", fault + "/alone", stream=stream))
    assert alone.status == 502 and re.search(words, alone.json["error"]["message"]), alone
    assert "certificate" in alone.json["error"]["message"]
    reply = house.post(PATHS["openai"], ask("openai", fault + "/safe", stream=stream))
    assert reply.status == 200 and "from good" in "".join(re.findall(r'"content": ?"([^"]*)"', reply.text)), reply
    assert re.search("%s/safe=[^,]*, good/alone=ok" % fault, reply.headers["x-llm-router-attempts"])
    assert house.upstreams[fault].calls == []
    line = house.wait_log(fault + "/alone")
    assert re.search(words, line) and "key-of-" not in line
    assert "Traceback" not in "\n".join(house.log())


def test_a_release_is_fetched_from_whom_the_bundle_of_certificates_vouches_for(certificates, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x = 1")

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificates / "good.pem"), str(certificates / "key.pem"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = "https://127.0.0.1:%d/release" % server.server_address[1]
        try:
            with pytest.raises(r.RouterError, match="certificate verify failed"):
                r.fetch_release(url)
            monkeypatch.setenv("LLM_ROUTER_CA_BUNDLE", str(certificates / "authority.pem"))
            assert r.fetch_release(url) == b"x = 1"
            monkeypatch.setenv("LLM_ROUTER_CA_BUNDLE", str(certificates / "nothing"))
            with pytest.raises(r.RouterError, match=r"the certificates .*nothing: No such file"):
                r.fetch_release(url)
        finally:
            server.shutdown()
