"""Section OUTBOUND: a candidate and a request become an upstream request."""

import json
from urllib.parse import urlsplit

import pytest

import llm_router as R

SETTINGS = R.Settings()
ENDPOINTS = ("/chat/completions", "/messages", "/responses", "/embeddings")


# ---- URLs (CONTRACT 2, trap 182)


@pytest.mark.parametrize(
    "base, stem",
    [
        ("", "/v1"),
        ("/", "/v1"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/v1//", "/v1"),
        ("/api", "/api/v1"),
        ("/api/v1", "/api/v1"),
        ("/api/paas/v4", "/api/paas/v4"),
        ("/v1beta", "/v1beta"),
        ("/v1beta/openai", "/v1beta/openai"),
        ("/v1beta/openai/", "/v1beta/openai"),
        ("/v1alpha2", "/v1alpha2"),
        ("/openai/v1", "/openai/v1"),
        ("/openai", "/openai/v1"),
        ("/api/anthropic", "/api/anthropic/v1"),
        ("/compatible-mode/v1", "/compatible-mode/v1"),
        ("/vendor", "/vendor/v1"),
        ("/v", "/v/v1"),
        ("/apiv1", "/apiv1/v1"),
        ("/v2/proxy", "/v2/proxy/v1"),
    ],
)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_base_url_gets_the_endpoint_and_the_version_only_where_it_has_none(base, stem, endpoint):
    path = R.upstream_path(base, endpoint)
    assert path == stem + endpoint
    assert "/v1/v1" not in path
    assert R.upstream_path(path, endpoint) == path
    assert R.upstream_path(path + "/", endpoint) == path
    for other in ENDPOINTS:
        assert R.upstream_path(stem + other, endpoint) == path


@pytest.mark.parametrize(
    "base",
    ["/v1/chat/completions", "/openai/deployments/gpt/chat/completions", "/chat/completions", "/x/y/chat/completions/"],
)
def test_a_full_endpoint_path_is_used_as_is(base):
    assert R.upstream_path(base, "/chat/completions") == base.rstrip("/")


def provider(url="https://api.example/v1", **fields):
    formats = fields.pop("formats", R.WIRES)
    return R.Provider("p", base_urls=dict.fromkeys(R.WIRES, url), formats=formats, preferred=formats[0], **fields)


@pytest.mark.parametrize(
    "url, origin, host, path",
    [
        ("https://api.example/v1", "https://api.example", "api.example", "/v1/messages"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000", "127.0.0.1:9000", "/v1/messages"),
        ("http://[::1]:9000/v1", "http://[::1]:9000", "[::1]:9000", "/v1/messages"),
        (
            "https://api.example/x?api-version=2024-10&a=b",
            "https://api.example",
            "api.example",
            "/x/v1/messages?api-version=2024-10&a=b",
        ),
        ("https://user:pw@api.example/v1", "https://api.example", "api.example", "/v1/messages"),
        ("https://API.Example:443/v1/messages", "https://api.example", "API.Example:443", "/v1/messages"),
    ],
)
def test_a_target_is_where_the_base_url_says_its_query_kept(url, origin, host, path):
    target = R.make_target(provider(url), "anthropic")
    assert (target.key.origin, dict(target.headers)["host"], target.path) == (origin, host, path)


def test_a_format_without_a_base_url_is_an_error_of_the_configuration():
    with pytest.raises(R.RouterError) as caught:
        R.make_target(R.Provider("p", base_urls={"anthropic": "https://api.example"}), "openai")
    assert (caught.value.status, caught.value.code) == (502, "configuration_error")


# ---- the key


@pytest.mark.parametrize(
    "auth, wire, expected",
    [
        (None, "openai", ("authorization", "Bearer KEY")),
        (None, "responses", ("authorization", "Bearer KEY")),
        (None, "anthropic", ("x-api-key", "KEY")),
        (R.Auth("bearer"), "anthropic", ("authorization", "Bearer KEY")),
        (R.Auth("x-api-key"), "openai", ("x-api-key", "KEY")),
        (R.Auth("header", "Api-Key"), "openai", ("api-key", "KEY")),
        (R.Auth("header", "X-Auth", "Token "), "openai", ("x-auth", "Token KEY")),
        (R.Auth("none"), "openai", ("", "")),
    ],
)
def test_the_providers_key_is_shown_as_its_auth_says(auth, wire, expected):
    auths = {**R.USUAL_AUTHS, wire: auth} if auth else R.USUAL_AUTHS
    assert R.auth_header(provider(api_key="KEY", auths=auths), wire) == expected
    assert R.auth_header(provider(api_key="", auths=auths), wire) == ("", "")
    sent = dict(R.make_target(provider(api_key="KEY", auths=auths), wire).headers)
    assert [value for value in sent.values() if "KEY" in value] == ([expected[1]] if expected[1] else [])


# ---- headers

CLIENT = [
    ("host", "127.0.0.1:8787"),
    ("authorization", "Bearer CLIENT-KEY"),
    ("x-api-key", "CLIENT-KEY"),
    ("api-key", "CLIENT-KEY"),
    ("cookie", "session=CLIENT-KEY"),
    ("proxy-authorization", "Basic CLIENT-KEY"),
    ("openai-organization", "org-CLIENT"),
    ("openai-project", "proj-CLIENT"),
    ("user-agent", "client/1"),
    ("content-type", "text/plain"),
    ("content-length", "9"),
    ("transfer-encoding", "chunked"),
    ("connection", "keep-alive"),
    ("accept-encoding", "gzip, br"),
    ("x-forwarded-for", "10.0.0.7"),
    ("x-stainless-lang", "python"),
    ("openai-beta", "responses=v1"),
    ("anthropic-beta", "one, two"),
    ("anthropic-version", "2099-01-01"),
    ("anthropic-dangerous-direct-browser-access", "true"),
    ("x-request-id", "req-7"),
    ("traceparent", "00-abc-def-01"),
    ("tracestate", "x=y"),
]
OWN = {"host", "user-agent", "accept-encoding", "content-type", "accept", "authorization", "x-api-key"}


def merged(row, client_wire, wire, client=CLIENT, stream=False):
    return dict(R.merge_headers(R.make_target(row, wire), client, client_wire, wire, stream))


def test_what_connection_names_is_passed_on_in_neither_direction():
    """RFC 9110 7.6.1: it is for one connection alone. Names stand in any case, in lists, in several lines."""
    client = [*CLIENT, ("connection", "close, X-Request-Id ,traceparent")]
    headers = merged(provider(), "openai", "openai", client)
    assert {"openai-beta", "x-request-id", "traceparent"} & set(headers) == {"openai-beta"}
    answer = [("x-request-id", "1"), ("request-id", "2"), ("connection", "keep-alive, request-id")]
    assert R.returned_headers(answer) == [("x-request-id", "1")]


@pytest.mark.parametrize("wire", R.WIRES)
@pytest.mark.parametrize("client_wire", R.WIRES)
def test_only_what_the_contract_names_goes_upstream_and_never_the_clients_keys(client_wire, wire):
    headers = merged(provider(api_key="KEY"), client_wire, wire)
    passed = {
        "openai": {"openai-beta", "x-request-id", "traceparent"},
        "responses": {"openai-beta", "x-request-id", "traceparent"},
        "anthropic": {"anthropic-beta", "anthropic-version", "x-request-id", "traceparent"},
    }[wire]
    always = {"anthropic-version"} if wire == "anthropic" else set()
    assert set(headers) - OWN == (passed if client_wire == wire else always)
    assert not [value for value in headers.values() if "CLIENT" in value]
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == "api.example"
    assert headers["user-agent"].startswith("llm-router/")
    assert all(name == name.lower() for name in headers)


@pytest.mark.parametrize("stream, accept", [(True, "text/event-stream"), (False, "application/json")])
def test_the_upstream_is_asked_for_what_the_client_wants(stream, accept):
    assert merged(provider(), "openai", "openai", stream=stream)["accept"] == accept


@pytest.mark.parametrize(
    "own, client, expected",
    [
        ("2024-02-02", [("anthropic-version", "2099-01-01")], "2024-02-02"),  # the provider's
        ("", [("anthropic-version", "2099-01-01")], "2099-01-01"),  # else the client's
        ("", [], "2023-06-01"),  # else the first one
    ],
)
def test_the_anthropic_version_is_the_providers_else_the_clients_else_2023_06_01(own, client, expected):
    assert merged(provider(anthropic_version=own), "anthropic", "anthropic", client)["anthropic-version"] == expected
    assert merged(provider(anthropic_version=own), "openai", "anthropic", client)["anthropic-version"] == (
        own or "2023-06-01"
    )


@pytest.mark.parametrize(
    "own, client, expected",
    [
        ((), "", None),
        ((), "a,b", "a,b"),
        (("a", "b"), "", "a,b"),
        (("a", "b"), "b, c,,a", "a,b,c"),
        (("a",), " , ", "a"),
    ],
)
def test_anthropic_beta_of_provider_and_client_are_merged_each_once(own, client, expected):
    """Traps 109, 110."""
    headers = merged(provider(anthropic_beta=own), "anthropic", "anthropic", [("anthropic-beta", client)])
    assert headers.get("anthropic-beta") == expected
    assert merged(provider(anthropic_beta=own), "openai", "anthropic", [("anthropic-beta", client)]).get(
        "anthropic-beta"
    ) == (",".join(own) or None)


def test_configured_headers_replace_and_a_null_removes_whoever_would_add_it():
    changes = {
        "X-Extra": "1", "User-Agent": "mine/1", "Authorization": None, "Anthropic-Beta": None, "anthropic-version": None, "accept": "a/b",
        "traceparent": None,
    }  # fmt: skip
    row = provider(api_key="KEY", headers=changes, auths={"anthropic": R.Auth("bearer")}, anthropic_beta=("a",))
    headers = merged(row, "anthropic", "anthropic")
    assert (headers["x-extra"], headers["user-agent"], headers["accept"]) == ("1", "mine/1", "a/b")
    assert not {"authorization", "anthropic-beta", "anthropic-version", "traceparent"} & set(headers)
    assert headers["x-request-id"] == "req-7"


def test_merging_leaves_the_target_as_it_was():
    target = R.make_target(provider(anthropic_beta=("a",)), "anthropic")
    before = dict(target.headers)
    R.merge_headers(target, CLIENT, "anthropic", "anthropic", True)
    assert target.headers == before


# ---- formats and timeouts


@pytest.mark.parametrize(
    "provider_formats, model_formats, client, expected",
    [
        (("openai", "anthropic"), (), "anthropic", "anthropic"),
        (("openai", "anthropic"), (), "responses", "openai"),
        (("anthropic",), (), "openai", "anthropic"),
        (("openai", "anthropic"), ("anthropic",), "openai", "anthropic"),
        (("openai", "responses"), ("responses",), "anthropic", "responses"),
        (("responses", "openai"), (), "anthropic", "responses"),
    ],
)
def test_the_clients_format_is_spoken_where_it_can_be_else_the_preferred(
    provider_formats, model_formats, client, expected
):
    row = provider(formats=provider_formats)
    candidate = R.Candidate("p/m", row, R.Model("m", formats=model_formats), "m")
    assert R.choose_wire(candidate, client) == expected


def test_timeouts_are_the_providers_else_the_settings_and_0_stays_off():
    settings = R.Settings()._replace(first_byte_timeout_ms=11, whole_first_byte_timeout_ms=12, idle_timeout_ms=13)
    row = provider(timeouts=R.Timeouts(connect_ms=0, total_ms=5))
    assert R.resolve_timeouts(row, settings, True) == R.Timeouts(0, 11, settings.first_content_timeout_ms, 13, 5)
    assert R.resolve_timeouts(row, settings, False).first_byte_ms == 12
    assert R.resolve_timeouts(provider(timeouts=R.Timeouts(first_byte_ms=7)), settings, False).first_byte_ms == 7


# ---- whole requests


def requests(body, path="/v1/messages", headers=()):
    inbound = R.read_inbound(R.find_endpoint(path), list(headers), body)
    return R.Requests(inbound, SETTINGS, {}, {}, R.BoundedMap(), "")


def candidate(row, model_id="new/model"):
    return R.Candidate("p/" + model_id, row, R.Model(model_id), model_id)


BODIES = {
    "/v1/messages": '{ "model" : "a" ,\n "max_tokens": 10, "messages":[{"role":"user","content":"ä \\u00e4 \\ud83d"}], "x_unknown": 1e2 }',
    "/v1/chat/completions": '{"messages":[{"role":"user","content":"{\\"model\\":\\"a\\"}"}],"model":"a","seed":12345678901234567890}',
    "/v1/responses": '{"model":"a","input":"世界","store":false}',
}


@pytest.mark.parametrize("path", sorted(BODIES))
def test_to_the_same_format_only_the_model_changes(path):
    text = BODIES[path]
    out = requests(text.encode(), path).make(candidate(provider()))
    assert (
        out.body
        == text.replace('"model" : "a"', '"model" : "new/model"').replace('"model":"a"', '"model":"new/model"').encode()
    )
    assert out.path == "/v1" + path[3:]
    assert not out.stream


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize("wire", R.WIRES)
def test_to_another_format_the_body_is_translated_for_the_candidates_model(path, wire):
    out = requests(BODIES[path].encode(), path, [("x-api-key", "CLIENT-KEY")]).make(
        candidate(provider(formats=(wire,), api_key="KEY"))
    )
    assert out.wire == wire
    assert out.path == "/v1" + R.WIRE_FORMATS[wire].path
    assert json.loads(out.body)["model"] == "new/model"
    assert b"CLIENT-KEY" not in repr(out).encode()


def test_the_neutral_request_is_parsed_once_and_targets_are_shared():
    targets = {}
    inbound = R.read_inbound(R.find_endpoint("/v1/messages"), [], BODIES["/v1/messages"].encode())
    made = R.Requests(inbound, SETTINGS, targets, {}, R.BoundedMap(), "")
    row = provider(formats=("openai",))
    first, second = made.make(candidate(row)), made.make(candidate(row, "other"))
    assert first.target is second.target
    assert list(targets) == [("p", "openai", False)]
    assert made.neutral is made.neutral
    assert json.loads(second.body)["model"] == "other"


def test_a_stream_and_a_whole_answer_wait_differently_for_the_first_byte_though_targets_are_remembered():
    targets = {}
    for streams, expected in ((True, SETTINGS.first_byte_timeout_ms), (False, SETTINGS.whole_first_byte_timeout_ms)):
        inbound = R.read_inbound(
            R.find_endpoint("/v1/messages"), [], json.dumps({"model": "m", "messages": [], "stream": streams}).encode()
        )
        for _ in range(2):
            out = R.Requests(inbound, SETTINGS, targets, {}, R.BoundedMap(), "").make(
                candidate(provider(formats=("anthropic",)))
            )
            assert out.timeouts.first_byte_ms == expected
    assert SETTINGS.first_byte_timeout_ms != SETTINGS.whole_first_byte_timeout_ms


def test_a_request_that_is_let_go_leaves_its_body_nowhere_and_all_else_as_it_was():
    inbound = R.read_inbound(R.find_endpoint("/v1/messages"), [], BODIES["/v1/messages"].encode())
    out = R.Requests(inbound, SETTINGS, {}, {}, R.BoundedMap(), "").make(candidate(provider(formats=("anthropic",))))
    exchange = R.Exchange.__new__(R.Exchange)
    exchange._inbound, exchange._outbound = inbound, out
    exchange._let_go()
    assert exchange._inbound == inbound._replace(body=R.JsonObject({}))
    assert exchange._outbound == out._replace(body=b"") and out.body


@pytest.mark.parametrize(
    "path, wire, base, expected",
    [
        ("/v1/messages/count_tokens", "anthropic", "https://a.example", "/v1/messages/count_tokens"),
        (
            "/v1/messages/count_tokens",
            "anthropic",
            "https://a.example/v1/messages?beta=1",
            "/v1/messages/count_tokens?beta=1",
        ),
        ("/v1/embeddings", "openai", "https://a.example/v1beta/openai", "/v1beta/openai/embeddings"),
        (
            "/v1/embeddings",
            "openai",
            "https://a.example/d/x/chat/completions?api-version=1",
            "/d/x/embeddings?api-version=1",
        ),
    ],
)
def test_the_other_operations_lie_beside_the_formats_own_path(path, wire, base, expected):
    out = requests(b'{"model":"a","input":"x","messages":[]}', path).make(candidate(provider(base)))
    assert (out.wire, out.path) == (wire, expected)
    assert json.loads(out.body)["model"] == "new/model"


def test_a_body_that_is_not_of_its_format_is_a_400_only_when_it_must_be_translated():
    made = requests(b'{"model":"a","messages":5}', "/v1/chat/completions")
    assert made.make(candidate(provider())).body == b'{"model":"new/model","messages":5}'
    with pytest.raises(R.RouterError) as caught:
        made.make(candidate(provider(formats=("anthropic",))))
    assert caught.value.status == 400


def test_nothing_of_the_model_reaches_the_url():
    """CVE-2024-37032: `../` in a name."""
    out = requests(b'{"model":"x"}', "/v1/responses").make(candidate(provider(), "../../etc\\passwd"))
    assert urlsplit(out.path).path == "/v1/responses"
