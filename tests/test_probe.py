"""What a probe finds out about a provider: formats, ways to show the key, models; and what the commands make of it."""

import json
import threading

import pytest

import llm_router as r
from fake_upstream import (
    Gate,
    Hang,
    Reset,
    body_answer,
    json_answer,
    model_answer,
    raw,
    redirect_answer,
    sse_answer,
    text_answer,
)

KEY = "the-provider-key-0123456789"
NO_ROUTE = text_answer(404, "404 page not found")


class Account:
    """A handler: speaks `wires`, takes the key as `auths` says, has `models` and lists them."""

    def __init__(self, wires=r.WIRES, auths=("bearer", "x-api-key"), models=("m1", "m2"), lists=True):
        self.wires, self.auths, self.models, self.lists = wires, auths, list(models), lists
        self.quirk = lambda call: None

    def __call__(self, call):
        shown = "bearer" if call.header("authorization") == "Bearer " + KEY else ""
        shown = "x-api-key" if call.header("x-api-key") == KEY else shown
        if call.method == "GET" and self.lists:
            return self.listing(call) if shown in self.auths else json_answer(401, {"error": {"message": "bad key"}})
        if call.wire not in self.wires:
            return NO_ROUTE
        if shown not in self.auths:
            return json_answer(401, {"error": {"message": "bad key " + KEY}})
        if call.json["model"] not in self.models:
            return json_answer(404, {"error": {"message": "the model %s does not exist" % call.json["model"]}})
        return self.quirk(call) or model_answer(call.wire, False, "ok")

    def listing(self, call):
        return json_answer(200, {"data": [{"id": id} for id in self.models], "has_more": False})


def run_probe(plan, settings=None, ends=None):
    return r.run_loop(r.run_probe(plan, settings or r.Settings(), {}, ends))


@pytest.fixture
def probe(make_upstream):
    """`probe(account, models, **fields)` -> (plan, report) for a provider at it; fields are its entry's."""

    def run(account, models=("m1",), settings=None, limit_s=20.0, **fields):
        run.upstream = make_upstream(account)
        raw = dict({"id": "p", "baseUrl": run.upstream.url + "/v1", "apiKey": KEY, "models": list(models)}, **fields)
        provider = r.read_config({"providers": [raw]}, {}).providers[0]
        plan = r.plan_probe(provider, raw)
        return plan, run_probe(plan._replace(limit_s=limit_s), settings)

    return run


def states(report):
    return {(row.model, row.wire): row.state for row in report.rows}


def asked(upstream):
    return sorted((call.wire, call.json["model"]) for call in upstream.calls if call.method == "POST")


@pytest.mark.parametrize("wires", [("openai",), ("anthropic",), ("openai", "responses"), r.WIRES])
def test_the_formats_that_answer_are_found_with_one_call_for_each_model(probe, wires):
    plan, report = probe(Account(wires), ["m1", "m2"])
    assert report.formats == wires and not report.is_tentative and report.unconfirmed == ()
    assert {row.wire for row in report.rows if row.state == "no"} == set(r.WIRES) - set(wires)
    posts = asked(probe.upstream)
    assert posts == sorted([(wire, "m1") for wire in r.WIRES] + [(wire, "m2") for wire in wires])
    assert r.learned_fields(plan, report) == {"formats": list(wires)}
    assert all(call.json.get("stream") in (None, False) for call in probe.upstream.calls if call.method == "POST")


def test_a_list_of_models_is_asked_for_once_and_at_anthropic_with_as_many_as_it_gives(probe):
    names = ["m%d" % number for number in range(1, 8)]
    for wire, query in (("anthropic", "?limit=1000"), ("openai", "")):
        _, report = probe(Account(models=names), format=wire, formats=[wire])
        assert report.listed == tuple(names)
        assert [call.path for call in probe.upstream.calls if call.method == "GET"] == ["/v1/models" + query]


@pytest.mark.parametrize("listing", [[{"id": "m1"}, {"id": "m2"}], {"models": [{"name": "m1"}, {"name": "m2"}]}])
def test_a_list_of_models_is_read_in_the_shapes_that_together_and_cohere_give_it(probe, listing):
    account = Account(("openai",))
    account.listing = lambda call: json_answer(200, listing)
    _, report = probe(account, ["*"], formats=["openai"])
    assert report.listed == ("m1", "m2") and states(report) == {("m1", "openai"): "ok"}


def test_a_list_without_end_ends(probe):
    account = Account(models=["m1"])
    account.listing = lambda call: json_answer(200, {"data": [{"id": "m1"}], "has_more": True, "last_id": "m1"})
    _, report = probe(account, formats=["openai"])
    assert report.listed == ("m1",) and sum(call.method == "GET" for call in probe.upstream.calls) == 1


@pytest.mark.parametrize("way, wire", [("x-api-key", "openai"), ("bearer", "anthropic")])
def test_the_way_to_show_the_key_is_found_and_learned_where_it_is_unusual(probe, way, wire):
    plan, report = probe(Account((wire,), (way,)))
    assert {row.auth.type for row in report.rows if row.state == "ok"} == {way}
    assert r.learned_fields(plan, report) == {"formats": [wire], "authByFormat": {wire: {"type": way}}}


def test_the_way_to_show_the_key_is_found_without_a_list_of_models_as_well(probe):
    plan, report = probe(Account(("openai",), ("x-api-key",), lists=False), ["m1", "m2"])
    assert r.learned_fields(plan, report)["authByFormat"] == {"openai": {"type": "x-api-key"}}
    assert report.listed is None and "404" in report.listing_note
    assert asked(probe.upstream).count(("openai", "m2")) == 1  # what m1 taught holds for m2


def test_what_the_entry_says_is_not_tried_in_other_ways_and_not_learned(probe):
    plan, report = probe(Account(), formats=["openai"], auth={"type": "bearer"})
    assert asked(probe.upstream) == [("openai", "m1")] and r.learned_fields(plan, report) == {}
    _, report = probe(Account(auths=("x-api-key",)), formats=["openai"], auth={"type": "bearer"})
    assert [row.about for row in report.rows] == ["key"]
    assert not any(call.header("x-api-key") for call in probe.upstream.calls)


def test_a_refused_key_stops_the_probe_after_the_first_model_and_never_stands_in_it(probe):
    _, report = probe(Account(auths=()), ["m1", "m2", "m3"])
    assert set(states(report).values()) == {"no"} and report.formats == ()
    assert {model for _, model in asked(probe.upstream)} == {"m1"}
    assert KEY not in repr(report) and report.unconfirmed == ("m1", "m2", "m3")


def test_a_model_that_is_not_there_says_nothing_about_the_format(probe):
    _, report = probe(Account(("openai",)), ["gone", "m2"])
    assert states(report)["gone", "openai"] == "no" and states(report)["m2", "openai"] == "ok"
    assert report.unconfirmed == ("gone",) and report.formats == ("openai",)


def test_a_first_model_that_is_missing_in_one_format_does_not_stop_that_format(probe):
    account = Account(("openai", "anthropic"))
    gone = json_answer(404, {"type": "error", "error": {"type": "not_found_error", "message": "model: m1"}})
    account.quirk = lambda call: gone if (call.wire, call.json["model"]) == ("anthropic", "m1") else None
    _, report = probe(account, ["m1", "m2"])
    assert states(report)["m2", "anthropic"] == "ok" and report.formats == ("openai", "anthropic")


def test_a_first_model_that_is_refused_in_every_format_does_not_speak_for_the_others(probe):
    account = Account(("openai",))
    account.quirk = lambda call: json_answer(404, {"error": "not found"}) if call.json["model"] == "typo" else None
    account.models.append("typo")
    _, report = probe(account, ["typo", "m2"])
    assert report.formats == ("openai",) and report.unconfirmed == ("typo",)


LIMIT_QUIRKS = {
    "it needs max_completion_tokens": ("max_tokens", ("Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead."), lambda body: "max_tokens" in body),
    "it takes no small limit": ("max_tokens", "max_tokens must be at least 512", lambda body: body.get("max_tokens", 999) < 512),
    "it wants more than its thinking takes": ("max_tokens", "`max_tokens` must be greater than `thinking.budget_tokens`",
        lambda body: body.get("max_tokens", 999) < 512),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMIT_QUIRKS)
def test_a_provider_that_refuses_the_token_limit_is_asked_in_its_own_way(probe, name):
    field, message, refuses = LIMIT_QUIRKS[name]
    account, error = Account(("openai",)), {"type": "invalid_request_error", "param": field, "message": message}
    account.quirk = lambda call: json_answer(400, {"error": error}) if refuses(call.json) else None
    _, report = probe(account, formats=["openai"])
    assert states(report) == {("m1", "openai"): "ok"} and len(asked(probe.upstream)) == 2


def test_a_limit_in_responses_that_is_too_small_is_raised(probe):
    error = {"message": "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 64, but got 16."}
    account = Account(("responses",))
    account.quirk = lambda call: json_answer(400, {"error": error}) if call.json["max_output_tokens"] < 64 else None
    assert probe(account, formats=["responses"])[1].formats == ("responses",)


def test_an_answer_cut_off_by_its_limit_before_it_says_anything_is_an_answer(probe):
    account = Account()
    account.quirk = lambda call: model_answer(call.wire, False, "")
    assert set(states(probe(account)[1]).values()) == {"ok"}


def test_a_stream_in_place_of_a_whole_answer_is_an_answer(probe):
    account = Account(("openai", "anthropic"))
    account.quirk = lambda call: model_answer(call.wire, True, "hello")
    assert probe(account)[1].formats == ("openai", "anthropic")


@pytest.mark.parametrize("status, label", [(429, "429"), (500, "500"), (402, "402"), (400, "400")])
def test_what_neither_shows_nor_refutes_a_format_stays_and_is_marked(probe, status, label):
    account = Account(("openai",))
    account.quirk = lambda call: json_answer(status, {"error": {"message": "not now"}})
    _plan, report = probe(account)
    row = next(row for row in report.rows if row.wire == "openai")
    assert (row.state, row.label) == ("tentative", label) and "not now" in row.note
    assert report.is_tentative and report.unconfirmed == ("m1",)
    assert report.formats == (("openai",) if status < 500 else ())


@pytest.mark.parametrize("page", ["<!doctype html><title>All models and prices</title>", "", "{}"])
def test_a_web_page_in_place_of_an_answer_means_that_the_format_is_not_spoken(probe, page):
    account = Account(("openai", "anthropic"))
    account.quirk = lambda call: text_answer(200, page) if call.wire == "anthropic" else None
    report = probe(account)[1]
    assert report.formats == ("openai",) and states(report)["m1", "anthropic"] == "no"


def test_a_path_that_is_refused_inside_a_200_is_a_format_that_is_not_spoken(probe):
    """z.ai"""
    nowhere = json_answer(200, {"code": 500, "msg": "404 NOT_FOUND", "success": False})
    account = Account()
    account.quirk = lambda call: None if call.wire == "anthropic" else nowhere
    _, report = probe(account, ["m1", "m2"])
    assert report.formats == ("anthropic",) and states(report)["m1", "openai"] == states(report)["m2", "openai"] == "no"
    assert ("openai", "m2") not in asked(probe.upstream)


def test_any_model_means_one_that_is_listed_and_can_chat(probe):
    names = ["text-embedding-3", "whisper-1", "tts-1", "gpt-image-1", "omni-moderation", "chatty", "other"]
    _, report = probe(Account(("openai",), models=names), ["*"])
    assert {model for _, model in asked(probe.upstream)} == {"chatty"} and report.formats == ("openai",)
    _, report = probe(Account(("openai",), models=["gpt-image-2", "text-embedding-3"]), ["*"])
    assert {model for _, model in asked(probe.upstream)} == {"gpt-image-2"}


def test_a_listed_model_that_is_gone_is_not_the_last_that_is_tried(probe):
    account = Account(("openai",), models=("m3",))
    account.listing = lambda call: json_answer(200, {"data": [{"id": "m%d" % number} for number in range(1, 6)]})
    _, report = probe(account, ["*"])
    assert report.formats == ("openai",) and {row.model for row in report.rows} == {"m3"}
    assert {model for _, model in asked(probe.upstream)} == {"m1", "m2", "m3"}


def test_without_a_model_and_a_list_nothing_is_asked(probe):
    _, report = probe(Account(lists=False), ["*"])
    assert report.rows == () and report.formats == () and report.is_tentative and report.listing_status == 404


def test_the_number_of_calls_has_a_bound_and_what_was_not_asked_is_marked(probe):
    names = ["m%d" % number for number in range(1, 41)]
    _, report = probe(Account(models=names), names)
    assert len(asked(probe.upstream)) == r.PROBE_CALLS and len(report.rows) == 120
    left = [row for row in report.rows if row.note == "not asked"]
    assert len(left) == 120 - r.PROBE_CALLS and {row.state for row in left} == {"tentative"}


def test_a_page_in_place_of_a_list_is_no_list_of_nothing(probe):
    _, report = probe(lambda call: body_answer(200, b"<html>Sign in here</html>", "text/html"), ["m1"])
    assert report.listed is None and report.listing_note.endswith("/v1/models gives no list")
    assert {row.state for row in report.rows} == {"no"} and "Sign in here" in report.rows[0].note


def test_a_redirect_that_echoes_the_key_does_not_show_it(probe):
    _, report = probe(lambda call: redirect_answer("/login/" + KEY), ["m1"])
    assert {row.note for row in report.rows} == {"redirects to /login/%s: correct the base URL" % r.mask(KEY)}


def test_a_redirect_is_told_with_where_it_leads_and_its_cure(probe):
    _, report = probe(lambda call: redirect_answer("https://other.example/v1?key=secret-0123"), ["m1"])
    assert {row.note for row in report.rows} == {"redirects to https://other.example/v1?key=***: correct the base URL"}


def test_nobody_there_ends_after_the_first_model(probe):
    _, report = probe(lambda call: raw(Reset()), ["m1", "m2"])
    assert report.listing_status == 0 and set(states(report).values()) == {"tentative"} and report.formats == ()
    assert {model for _, model in asked(probe.upstream)} == {"m1"}


def test_a_probe_ends_by_itself_and_keeps_what_it_found(probe):
    account = Account()
    account.quirk = lambda call: raw(Hang()) if call.wire == "responses" else None
    _, report = probe(account, limit_s=4.0)  # the others answer long before
    assert states(report) == {("m1", "openai"): "ok", ("m1", "anthropic"): "ok", ("m1", "responses"): "tentative"}
    assert report.rows[2].note == "no answer in time"


def test_a_probe_tells_its_progress_and_can_be_cancelled(make_upstream):
    gate, account = threading.Event(), Account()
    account.quirk = lambda call: None if call.wire == "openai" else raw(Gate(gate))
    upstream = make_upstream(account)
    raw_provider = {"id": "p", "baseUrl": upstream.url, "apiKey": KEY, "models": ["m1", "m2"]}
    plan = r.plan_probe(r.read_config({"providers": [raw_provider]}, {}).providers[0], raw_provider)
    seen = []

    def is_enough(report):
        seen.append(states(report))
        return seen[-1].get(("m1", "openai")) == "ok" and len(upstream.calls) >= 4  # the list, and m1 in every format

    report = run_probe(plan, ends=is_enough)
    assert seen[-1]["m1", "anthropic"] == seen[-1]["m1", "responses"] == "asking"
    assert states(report)["m1", "openai"] == "ok" and states(report)["m2", "openai"] == "tentative"
    held = [call for call in upstream.calls if call.wire in ("anthropic", "responses")]
    assert held and all(call.closed.wait(30) for call in held)  # nobody pays for what is no longer wanted
    gate.set()


def test_calls_are_parallel(make_upstream):
    together = threading.Barrier(3, timeout=20)

    def handler(call):
        if call.method == "POST":
            together.wait()
        return Account()(call)

    upstream = make_upstream(handler)
    raw_provider = {"id": "p", "baseUrl": upstream.url, "apiKey": KEY, "models": ["m1"]}
    plan = r.plan_probe(r.read_config({"providers": [raw_provider]}, {}).providers[0], raw_provider)
    assert run_probe(plan).formats == r.WIRES


def test_an_error_inside_a_200_is_no_answer(probe):
    account = Account(("openai",))
    account.quirk = lambda call: json_answer(200, {"error": {"message": "overloaded", "code": 503}})
    _, report = probe(account, formats=["openai"])
    assert states(report) == {("m1", "openai"): "tentative"}
    account.quirk = lambda call: sse_answer([b'data: {"error": {"message": "no"}}\n\n'])
    assert probe(account, formats=["openai"])[1].is_tentative


# ----- the commands -----


@pytest.fixture
def config(tmp_path, capsys):
    """`config(words, **flags)` -> (exit code, stdout, stderr); `config.path` is the file."""
    path = tmp_path / "config.json"

    def run(operation, *flags):
        capsys.readouterr()
        code = r.main(["config", "--operation=" + operation, "--config=%s" % path, *flags])
        out, err = capsys.readouterr()
        return code, out, err

    run.path = path
    run.stored = lambda: json.loads(path.read_text())
    return run


def test_an_upsert_stores_what_it_learned_and_shows_it(config, make_upstream):
    upstream = make_upstream(Account(("anthropic",), ("bearer",)))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1,gone"]
    code, out, err = config("upsert-provider", *flags)
    entry = config.stored()["providers"][0]
    assert (
        code == 0 and entry["formats"] == ["anthropic"] and entry["authByFormat"] == {"anthropic": {"type": "bearer"}}
    )
    assert [model["id"] for model in entry["models"]] == ["m1", "gone"]  # reported, never dropped
    assert "gone is not confirmed" in err and "learned formats" in out and KEY not in out + err
    assert "MODEL" in out and "tentative" not in out


def test_an_upsert_keeps_what_is_given_and_asks_nothing_when_told_so(config, make_upstream):
    upstream = make_upstream(Account(("anthropic",)))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1"]
    assert config("upsert-provider", *flags, "--skip-probe")[0] == 0 and upstream.calls == []
    assert "formats" not in config.stored()["providers"][0]
    code, out, err = config("upsert-provider", *flags, "--formats=openai", "--auth-type=bearer", "--json")
    entry, answer = config.stored()["providers"][0], json.loads(out)
    assert code == 0 and entry["formats"] == ["openai"] and "authByFormat" not in entry
    assert answer["probe"]["ok"] is False and answer["probe"]["unconfirmed"] == ["m1"] and "m1 is not confirmed" in err


def test_an_upsert_that_cannot_be_stored_asks_nobody(config, make_upstream):
    upstream = make_upstream(Account())
    assert config("upsert-provider", "--provider-id=p", "--base-url=" + upstream.url)[0] == 2
    assert upstream.calls == [] and not config.path.exists()


def test_a_provider_that_is_away_is_stored_all_the_same(config, make_upstream):
    upstream = make_upstream(lambda call: raw(Reset()))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1"]
    code, _, err = config("upsert-provider", *flags)
    entry = config.stored()["providers"][0]
    assert code == 0 and "formats" not in entry and "cannot be listed" in err and "m1 is not confirmed" in err


def test_a_format_that_is_only_likely_is_stored_and_called_assumed(config, make_upstream):
    account = Account(("anthropic",))
    account.quirk = lambda call: json_answer(429, {"error": {"message": "slow down"}})
    flags = ["--provider-id=p", "--base-url=" + make_upstream(account).url, "--api-key=" + KEY, "--models=m1"]
    code, out, err = config("upsert-provider", *flags)
    assert code == 0 and 'assumed formats: ["anthropic"]' in out and "tentative" in out and "slow down" in err
    assert config.stored()["providers"][0]["formats"] == ["anthropic"]


def test_a_provider_can_be_tested_and_its_models_listed(config, make_upstream):
    upstream = make_upstream(Account(("openai",)))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1"]
    config("upsert-provider", *flags, "--skip-probe")
    before = config.path.read_bytes()
    code, out, _ = config("test-provider", "--provider-id=P")
    assert code == 0 and "openai     ok" in out and "not spoken" not in out
    code, out, _ = config("test-provider", "--provider-id=p", "--models=m2,gone", "--json")
    answer = json.loads(out)
    assert code == 1 and answer["formats"] == ["openai"] and answer["unconfirmed"] == ["gone"]
    assert [row["state"] for row in answer["results"] if row["wire"] == "openai"] == ["ok", "no"]
    assert config("discover-models", "--provider-id=p")[:2] == (0, "m1\nm2\n")
    assert config.path.read_bytes() == before and config("test-provider", "--provider-id=q")[0] == 2


def test_other_formats_than_the_configured_ones_can_be_tested(config, make_upstream):
    upstream = make_upstream(Account(("openai", "anthropic")))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1", "--formats=openai"]
    config("upsert-provider", *flags, "--skip-probe")
    answer = json.loads(config("test-provider", "--provider-id=p", "--formats=claude,responses", "--json")[1])
    assert answer["formats"] == ["anthropic"]
    assert config("test-provider", "--provider-id=p", "--formats=soap")[0] == 2
    config("upsert-provider", "--provider-id=p", "--formats=")
    assert config.stored()["providers"][0]["formats"] == ["openai", "anthropic"]  # forgotten, and learned anew


def test_a_provider_is_asked_and_stored_although_another_entry_is_broken(config, make_upstream):
    upstream = make_upstream(Account(("openai",)))
    broken = [5, {"id": "bad", "baseUrl": "nope", "models": ["x"]}]
    config.path.write_text(json.dumps({"providers": broken}))
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1"]
    assert config("upsert-provider", *flags)[0] == 0
    assert config.stored()["providers"][:2] == broken and config.stored()["providers"][2]["formats"] == ["openai"]
    assert config("test-provider", "--provider-id=p")[0] == 0
    assert config("test-provider", "--provider-id=bad")[0] == 1
    assert config("upsert-provider", "--provider-id=bad", "--name=Bad")[0] == 0
    assert config.stored()["providers"][1]["name"] == "Bad"


def test_ctrl_c_while_asking_stores_nothing(config, make_upstream, monkeypatch):
    upstream = make_upstream(lambda call: raw(Hang()))

    async def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(r.Probe, "run", interrupted)
    flags = ["--provider-id=p", "--base-url=" + upstream.url, "--api-key=" + KEY, "--models=m1"]
    assert config("upsert-provider", *flags)[0] == 130 and not config.path.exists()
