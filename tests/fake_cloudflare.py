"""A fake of the part of Cloudflare's API that `deploy`, `worker-key` and wrangler use, on 127.0.0.1.

It keeps what it is given as Cloudflare does: a Worker's files, settings and bindings. Paths and shapes:
developers.cloudflare.com/api (workers, zones), and what wrangler 4.86.0 asks for.
"""

import email.parser
import email.policy
import http.server
import json
import re
import threading
from urllib.parse import urlsplit

TOKEN = "cloudflare-test-token"
ACCOUNT = "0123456789abcdef0123456789abcdef"


def parse_multipart(content_type, body):
    """{name: bytes} of a multipart/form-data body."""
    head = ("content-type: %s\r\n\r\n" % content_type).encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.iter_parts()
    }


class Refused(Exception):
    """An answer that is an error: status, Cloudflare's code, its words."""


class Script:
    """A Worker as it was uploaded. secrets, variables: name -> text."""

    def __init__(self):
        self.files, self.metadata, self.secrets, self.variables, self.enabled = {}, {}, {}, {}, False


class FakeCloudflare:
    """`with FakeCloudflare() as cloudflare:`; url is what CLOUDFLARE_API_BASE_URL has to be.

    calls: (method, path) in order; scripts: name -> Script; subdomain: of workers.dev, "" for none.
    """

    def __init__(self, accounts=(ACCOUNT,)):
        self.accounts, self.zones = list(accounts), {"example.com": "z1"}
        self.calls, self.scripts, self.routes, self.domains = [], {}, [], []
        self.subdomain = "me"
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self):
                body = self._read_body()
                fake.calls.append((self.command, self.path.partition("?")[0]))
                try:
                    status, answer = 200, {"success": True, "errors": [], "messages": [], "result": fake._answer(self, body)}
                except Refused as error:
                    status, code, words = error.args
                    answer = {"success": False, "errors": [{"code": code, "message": words}], "messages": [], "result": None}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _read_body(self):
                if "chunked" not in self.headers.get("transfer-encoding", ""):
                    return self.rfile.read(int(self.headers.get("content-length") or 0))
                pieces = []
                while True:
                    size = int(self.rfile.readline(), 16)
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                    if not size:
                        return b"".join(pieces)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _serve

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d/client/v4" % self._server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request, body):
        if request.headers.get("authorization") != "Bearer " + TOKEN:
            raise Refused(401, 10000, "Authentication error")
        parts = urlsplit(request.path)
        path = parts.path.replace("/client/v4", "", 1)
        for method, pattern, handle in self._ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == request.command:
                return getattr(self, handle)(*found.groups(), body=body, request=request, query=parts.query)
        raise Refused(404, 7003, "Could not route to %s %s" % (request.command, path))

    _SCRIPT = r"/accounts/(\w+)/workers/scripts/([\w-]+)"
    _ROUTES = (
        ("GET", "/accounts", "_list_accounts"),
        ("GET", "/memberships", "_list_memberships"),
        ("GET", "/user", "_user"),
        ("GET", "/zones", "_list_zones"),
        ("GET", r"/zones/(\w+)/workers/routes", "_list_routes"),
        ("POST", r"/zones/(\w+)/workers/routes", "_add_route"),
        ("GET", r"/accounts/(\w+)/workers/domains", "_list_domains"),
        ("PUT", r"/accounts/(\w+)/workers/domains", "_add_domain"),
        ("GET", r"/accounts/(\w+)/workers/subdomain", "_subdomain"),
        ("GET", r"/accounts/(\w+)/workers/services/([\w-]+)", "_service"),
        ("PUT", _SCRIPT, "_upload"),
        ("POST", _SCRIPT + "/versions", "_upload"),  # how wrangler sends a Worker that exists
        ("GET", _SCRIPT + "/deployments", "_deployments"),
        ("POST", _SCRIPT + "/deployments", "_deployments"),
        ("PATCH", _SCRIPT + "/script-settings", "_deployments"),
        ("GET", _SCRIPT + "/subdomain", "_get_enabled"),
        ("POST", _SCRIPT + "/subdomain", "_set_enabled"),
        ("GET", _SCRIPT + "/secrets", "_list_secrets"),
        ("PUT", _SCRIPT + "/secrets", "_put_secret"),
        ("DELETE", _SCRIPT + r"/secrets/(\w+)", "_delete_secret"),
        ("GET", _SCRIPT + "/settings", "_settings"),
        ("PATCH", _SCRIPT + "/settings", "_change_settings"),
    )

    def _script(self, account, name):
        if account not in self.accounts:
            raise Refused(403, 10000, "Authentication error")
        if name not in self.scripts:
            raise Refused(404, 10007, "This Worker does not exist on your account.")
        return self.scripts[name]

    def _list_accounts(self, **_):
        return [{"id": id, "name": "account %d" % number} for number, id in enumerate(self.accounts)]

    def _list_memberships(self, **_):
        return [{"account": account} for account in self._list_accounts()]

    def _user(self, **_):
        return {"email": "me@example.com"}

    def _list_zones(self, query, **_):
        name = query.partition("name=")[2].partition("&")[0]
        return [{"id": self.zones[name], "name": name}] if name in self.zones else []

    def _list_routes(self, zone, **_):
        return self.routes

    def _add_route(self, zone, body, **_):
        self.routes.append(json.loads(body))
        return {"id": "r1"}

    def _list_domains(self, account, query, **_):
        return [domain for domain in self.domains if domain["hostname"] == query.partition("hostname=")[2]]

    def _add_domain(self, account, body, **_):
        self.domains.append(json.loads(body))
        return {"id": "d1"}

    def _subdomain(self, account, **_):
        if not self.subdomain:
            raise Refused(404, 10007, "Not found.")  # what wrangler 4.86.0 takes for none
        return {"subdomain": self.subdomain}

    def _service(self, account, name, **_):
        script = self._script(account, name)
        return {"id": name, "default_environment": {"environment": "production", "script": {"last_deployed_from": "api",
                "tag": "t"}}, "files": sorted(script.files)}  # fmt: skip

    def _upload(self, account, name, body, request, **_):
        if account not in self.accounts:
            raise Refused(403, 10000, "Authentication error")
        files = parse_multipart(request.headers["content-type"], body)
        metadata = json.loads(files.pop("metadata"))
        if metadata["main_module"] not in files:
            raise Refused(400, 10021, "main_module is missing")
        script = self.scripts.setdefault(name, Script())
        if "secret_text" not in metadata.get("keep_bindings", ()):
            script.secrets = {}
        self._bind(script, metadata["bindings"])
        script.files, script.metadata = files, metadata
        made = {"id": name, "startup_time_ms": 1, "etag": "e", "deployment_id": "d", "has_preview": False}
        return dict(made, resources={"script": {"etag": "e"}})

    def _bind(self, script, bindings):
        for binding in bindings:
            kept = script.secrets if binding["type"] == "secret_text" else script.variables
            if "text" in binding:
                if len(binding["text"].encode()) > 5120:
                    raise Refused(400, 10052, "the binding %s is larger than 5 KB" % binding["name"])
                kept[binding["name"]] = binding["text"]

    def _deployments(self, account, name, **_):
        self._script(account, name)
        return {"deployments": []}

    def _get_enabled(self, account, name, **_):
        return {"enabled": self._script(account, name).enabled, "previews_enabled": False}

    def _set_enabled(self, account, name, body, **_):
        if not self.subdomain:
            raise Refused(404, 10063, "You need a workers.dev subdomain in order to proceed.")
        self._script(account, name).enabled = json.loads(body)["enabled"]
        return self._get_enabled(account, name)

    def _list_secrets(self, account, name, **_):
        return [{"name": secret, "type": "secret_text"} for secret in self._script(account, name).secrets]

    def _put_secret(self, account, name, body, **_):
        secret = json.loads(body)
        self._bind(self._script(account, name), [secret])
        return {"name": secret["name"], "type": "secret_text"}

    def _delete_secret(self, account, name, secret, **_):
        del self._script(account, name).secrets[secret]

    def _settings(self, account, name, **_):
        script = self._script(account, name)
        bindings = [{"type": "secret_text", "name": secret} for secret in script.secrets]
        bindings += [{"type": "plain_text", "name": key, "text": text} for key, text in script.variables.items()]
        return dict(script.metadata, bindings=bindings)

    def _change_settings(self, account, name, body, request, **_):
        script = self._script(account, name)
        bindings = json.loads(parse_multipart(request.headers["content-type"], body)["settings"])["bindings"]
        script.secrets = {key: text for key, text in script.secrets.items() if key in {one["name"] for one in bindings}}
        self._bind(script, bindings)
        return self._settings(account, name)
