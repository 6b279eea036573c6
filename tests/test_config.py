"""CONFIG: the file as values, and every problem with its path."""

import copy
import json
import random
import re
import time

import pytest

import llm_router as r

MINIMAL = {
    "version": 1,
    "masterKey": "local_or_worker_key",
    "defaultModel": "openrouter/gpt-4o",
    "providers": [
        {
            "id": "openrouter",
            "name": "OpenRouter",
            "baseUrl": "https://openrouter.ai/api/v1",
            "apiKey": "sk-or-v1-abc",
            "formats": ["openai"],
            "models": [{"id": "gpt-4o", "aliases": ["gpt4o"], "fallbackModels": ["anthropic/claude-3-7-sonnet"]}],
        },
        {
            "id": "anthropic",
            "baseUrl": "https://api.anthropic.com",
            "format": "anthropic",
            "apiKeyEnv": "ANTHROPIC_API_KEY",
            "models": [{"id": "claude-3-7-sonnet"}],
        },
    ],
}


def changed(**changes):
    """MINIMAL with values set by path: changed(providers__0__apiKey="x"); None removes."""
    document = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        target = document
        for part in parents:
            target = target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return document


def problems_at(document, path, level=None):
    found = r.find_problems(document)
    return [p for p in found if p.path == path and level in (None, p.level)]


def only_problem(document, path, level="error"):
    """The one problem of the document, which must stand at `path`."""
    found = r.find_problems(document)
    assert [(p.path, p.level) for p in found] == [(path, level)], found
    assert found[0].message
    assert found[0].cure
    return found[0]


# ----- values -----


def test_the_minimal_example_has_no_problem_and_reads_as_written():
    assert r.find_problems(MINIMAL) == []
    config = r.read_config(MINIMAL, {"ANTHROPIC_API_KEY": "sk-ant"})
    first, second = config.providers
    assert (config.master_key, config.default_model) == ("local_or_worker_key", "openrouter/gpt-4o")
    assert (first.id, first.name, first.api_key, first.formats) == (
        "openrouter",
        "OpenRouter",
        "sk-or-v1-abc",
        ("openai",),
    )
    assert first.models[0] == r.Model("gpt-4o", ("gpt4o",), fallback_models=("anthropic/claude-3-7-sonnet",))
    assert (second.api_key, second.formats, second.preferred) == ("sk-ant", ("anthropic",), "anthropic")
    assert second.base_urls["anthropic"] == "https://api.anthropic.com"


def test_reading_changes_nothing_in_the_document():
    before = copy.deepcopy(MINIMAL)
    r.read_config(MINIMAL, {})
    assert before == MINIMAL


def test_a_key_variable_wins_over_the_key_when_it_is_set():
    document = changed(providers__0__apiKeyEnv="MY_KEY")
    assert r.read_config(document, {"MY_KEY": " from-env\n"}).providers[0].api_key == "from-env"
    assert r.read_config(document, {"MY_KEY": ""}).providers[0].api_key == "sk-or-v1-abc"
    assert r.read_config(document, {}).providers[0].api_key == "sk-or-v1-abc"


def test_the_master_key_variable_overrides_the_file():
    assert r.read_config(MINIMAL, {"LLM_ROUTER_MASTER_KEY": "other"}).master_key == "other"


@pytest.mark.parametrize("variable", ["ANTHROPIC_API_KEY", "LLM_ROUTER_MASTER_KEY"])
def test_a_key_from_the_environment_cannot_smuggle_a_header(variable):
    with pytest.raises(r.ConfigError) as caught:
        r.read_config(MINIMAL, {variable: "key\r\nx-evil: 1"})
    assert "evil" not in caught.value.message


@pytest.mark.parametrize(
    ("canonical", "others"),
    [
        ("masterKey", ["master-key", "master_key"]),
        ("defaultModel", ["default-model", "default_model"]),
        ("modelAliases", ["model-aliases"]),
        ("corsOrigins", ["cors-origins"]),
        ("allowedHosts", ["allowed-hosts"]),
    ],
)
def test_top_keys_have_dashed_and_snake_case_twins(canonical, others):
    value = {"modelAliases": {"fast": "openrouter/gpt-4o"}, "corsOrigins": ["http://x.example"]}.get(canonical)
    value = value or {"allowedHosts": ["box"]}.get(canonical) or MINIMAL[canonical]
    expected = r.read_config(dict(MINIMAL, **{canonical: value}), {})
    for other in others:
        document = dict(MINIMAL, **{other: value})
        if canonical in MINIMAL:
            del document[canonical]
        assert r.read_config(document, {}) == expected
        assert r.find_problems(document) == []


@pytest.mark.parametrize(
    ("canonical", "others"),
    [
        ("baseUrl", ["base-url", "base_url", "endpoint"]),
        ("apiKey", ["api-key", "api_key", "credential"]),
        ("formats", []),
        ("models", []),
    ],
)
def test_provider_keys_have_twins_and_older_names(canonical, others):
    expected = r.read_config(MINIMAL, {})
    for other in others:
        document = copy.deepcopy(MINIMAL)
        document["providers"][0][other] = document["providers"][0].pop(canonical)
        assert r.read_config(document, {}) == expected
        assert r.find_problems(document) == []


def test_every_field_has_its_spellings_and_none_means_two_fields():
    for kind, keys in r.SPELLINGS.items():
        every = [name for names in keys.values() for name in names]
        assert len(every) == len(set(every)), kind


def test_the_canonical_spelling_wins_over_a_twin_with_a_warning():
    document = changed(providers__0__credential="older")
    assert r.read_config(document, {}).providers[0].api_key == "sk-or-v1-abc"
    only_problem(document, "providers[0].credential", "warning")


def test_endpoints_may_be_urls_by_format():
    urls = {"openai": "https://a.example/v1", "claude": "https://a.example/c"}
    document = changed(providers__0__baseUrl=None, providers__0__formats=None, providers__0__endpoints=urls)
    provider = r.read_config(document, {}).providers[0]
    assert provider.base_urls == {"openai": urls["openai"], "anthropic": urls["claude"], "responses": urls["openai"]}
    assert provider.formats == ("openai", "anthropic")


def test_older_words_of_auth_and_models_are_read():
    document = changed(
        providers__0__auth={"kind": "header", "header": "api-key"},
        providers__0__models=[
            {"id": "gpt-4o", "alias": "fast", "format": "claude", "fallbacks": ["anthropic/claude-3-7-sonnet"]}
        ],
    )
    provider = r.read_config(document, {}).providers[0]
    assert provider.auths["openai"] == r.Auth("header", "api-key")
    model = provider.models[0]
    assert (model.aliases, model.formats, model.fallback_models) == (
        ("fast",), ("anthropic",), ("anthropic/claude-3-7-sonnet",)
    )  # fmt: skip
    assert schema_accepts(document)


def test_endpoints_as_a_list_means_the_first():
    document = changed(providers__0__baseUrl=None, providers__0__endpoints=["https://a.example/v1"])
    assert r.read_config(document, {}).providers[0].base_urls["openai"] == "https://a.example/v1"


def test_models_may_be_plain_names():
    document = changed(providers__1__models=["claude-3-7-sonnet", "*"])
    models = r.read_config(document, {}).providers[1].models
    assert [model.id for model in models] == ["claude-3-7-sonnet", "*"]


def test_providers_may_be_a_single_object_or_an_object_by_id():
    single = {"providers": MINIMAL["providers"][1]}
    assert r.read_config(single, {}).providers[0].id == "anthropic"
    by_id = {"providers": {p["id"]: {k: v for k, v in p.items() if k != "id"} for p in MINIMAL["providers"]}}
    assert [p.id for p in r.read_config(by_id, {}).providers] == ["openrouter", "anthropic"]
    by_id["providers"]["openrouter"]["baseUrl"] = "x"
    only_problem(by_id, "providers.openrouter.baseUrl")


def test_the_format_name_claude_means_anthropic():
    document = changed(providers__1__format="claude", providers__0__formats=["OpenAI", "claude"])
    config = r.read_config(document, {})
    assert config.providers[1].preferred == "anthropic"
    assert config.providers[0].formats == ("openai", "anthropic")


@pytest.mark.parametrize(
    ("said", "formats", "preferred"),
    [
        ({"baseUrl": "https://x.example"}, ("openai",), "openai"),
        ({"baseUrl": "https://api.anthropic.com/v1"}, ("anthropic",), "anthropic"),
        ({"baseUrl": "https://x.example", "format": "responses"}, ("responses",), "responses"),
        ({"baseUrlByFormat": {"anthropic": "https://x.example"}}, ("anthropic",), "anthropic"),
        (
            {"baseUrlByFormat": {"anthropic": "https://x.example", "openai": "https://x.example"}},
            ("openai", "anthropic"),
            "openai",
        ),
        (
            {"baseUrlByFormat": {"anthropic": "https://x.example"}, "baseUrl": "https://y.example", "format": "openai"},
            ("openai", "anthropic"),
            "openai",
        ),
        (
            {"baseUrl": "https://x.example", "formats": ["responses", "openai"], "format": "openai"},
            ("responses", "openai"),
            "openai",
        ),
    ],
)
def test_formats_have_defaults_where_they_are_unsaid(said, formats, preferred):
    provider = r.read_config({"providers": [dict(said, id="p", apiKey="k", models=["m"])]}, {}).providers[0]
    assert (provider.formats, provider.preferred) == (formats, preferred)


def test_a_url_per_format_goes_before_the_base_url():
    raw = {
        "id": "p",
        "apiKey": "k",
        "models": ["m"],
        "baseUrl": "https://a.example",
        "baseUrlByFormat": {"claude": "https://b.example"},
    }
    urls = r.read_config({"providers": [raw]}, {}).providers[0].base_urls
    assert urls == {"openai": "https://a.example", "anthropic": "https://b.example", "responses": "https://a.example"}


def test_auth_has_a_default_per_format_and_can_be_set_for_all_or_one():
    provider = r.read_config(MINIMAL, {}).providers[0]
    assert {wire: auth.type for wire, auth in provider.auths.items()} == {
        "openai": "bearer",
        "anthropic": "x-api-key",
        "responses": "bearer",
    }
    document = changed(
        providers__0__auth={"type": "header", "headerName": "api-key", "prefix": "K "},
        providers__0__authByFormat={"anthropic": {"type": "none"}},
    )
    auths = r.read_config(document, {}).providers[0].auths
    assert auths["openai"] == r.Auth("header", "api-key", "K ")
    assert auths["anthropic"] == r.Auth("none")


def test_every_further_field_is_read():
    document = changed(
        providers__0__headers={"X-Title": "me", "user-agent": None},
        providers__0__anthropicVersion="2023-06-01",
        providers__0__anthropicBeta="a-1, b-2",
        providers__0__compat="azure",
        providers__0__timeouts={"connectMs": 1, "firstByteMs": 2, "firstContentMs": 3, "idleMs": 4, "totalMs": 0},
        providers__0__metadata={"any": 1},
        providers__0__models__0__contextWindow=128000,
        providers__0__models__0__maxOutputTokens=4096,
        providers__0__models__0__cost={"input": 1.5},
        providers__0__models__0__metadata={"any": 2},
        providers__0__models__0__formats=["openai"],
        corsOrigins=["https://App.example/"],
        allowedHosts=["Box.lan"],
        metadata={"any": 3},
    )
    assert r.find_problems(document) == []
    config = r.read_config(document, {})
    provider, model = config.providers[0], config.providers[0].models[0]
    assert provider.headers == {"X-Title": "me", "user-agent": None}
    assert (provider.anthropic_version, provider.anthropic_beta) == ("2023-06-01", ("a-1", "b-2"))
    assert provider.compat == "azure"
    assert provider.timeouts == r.Timeouts(1, 2, 3, 4, 0)
    assert (model.context_window, model.max_output_tokens, model.cost) == (128000, 4096, {"input": 1.5})
    assert (model.metadata, model.formats) == ({"any": 2}, ("openai",))
    assert (config.cors_origins, config.allowed_hosts) == (("https://app.example",), ("box.lan",))


def test_ids_are_kept_as_written():
    document = changed(providers__0__id="OpenRouter_2", defaultModel="openrouter_2/gpt-4o")
    assert r.read_config(document, {}).providers[0].id == "OpenRouter_2"


@pytest.mark.parametrize(
    ("enabled", "value"), [(False, False), ("false", False), ("off", False), (True, True), ("1", True)]
)
def test_enabled_is_read_as_a_flag(enabled, value):
    document = changed(providers__1__enabled=enabled, providers__0__models=["gpt-4o"])
    assert r.scan_config(document, {})[0].providers[1].enabled is value


@pytest.mark.parametrize(
    ("value", "words"), [(True, "true/false"), ({}, "an object"), ([], "a list"), (1.5, "a number")]
)
def test_a_wrong_type_is_named(value, words):
    assert "is " + words in only_problem(changed(masterKey=value), "masterKey").message


def test_null_counts_as_absent():
    document = changed(providers__0__name=None)
    document["providers"][0]["name"] = None
    document["modelAliases"] = None
    assert r.find_problems(document) == []


def test_aliases_lead_to_one_model_or_an_ordered_list():
    document = dict(
        MINIMAL, modelAliases={"fast": "openrouter/gpt-4o", "claude-*": ["anthropic/claude-3-7-sonnet", "gpt4o"]}
    )
    assert r.find_problems(document) == []
    assert r.read_config(document, {}).aliases == {
        "fast": ("openrouter/gpt-4o",),
        "claude-*": ("anthropic/claude-3-7-sonnet", "gpt4o"),
    }


# ----- problems: one rule each, with its path -----

OFF_TYPE = [
    ("version", "1"),
    ("masterKey", 5),
    ("defaultModel", []),
    ("modelAliases", []),
    ("corsOrigins", 3),
    ("providers", "x"),
    ("metadata", []),
    ("providers[0].id", 1),
    ("providers[0].id", "has space"),
    ("providers[0].id", "1st"),
    ("providers[0].id", "a/b"),
    ("providers[0].id", ""),
    ("providers[0].name", 1),
    ("providers[0].enabled", "perhaps"),
    ("providers[0].enabled", 1),
    ("providers[0].baseUrl", 1),
    ("providers[0].baseUrlByFormat", 5),
    ("providers[0].baseUrlByFormat.grpc", "https://x.example"),
    ("providers[0].baseUrlByFormat.anthropic", "nope"),
    ("providers[0].apiKey", 1),
    ("providers[0].apiKey", "a\nb"),
    ("providers[0].apiKey", "käse"),
    ("providers[0].apiKeyEnv", "sk-or-v1-abc"),
    ("providers[0].formats", 1),
    ("providers[0].formats[0]", "soap"),
    ("providers[0].formats[0]", 7),
    ("providers[0].format", "soap"),
    ("providers[0].auth", "bearer"),
    ("providers[0].auth.type", "basic"),
    ("providers[0].auth", {"type": "header"}),
    ("providers[0].auth.headerName", "bad name"),
    ("providers[0].auth.prefix", "a\r\nb"),
    ("providers[0].authByFormat.anthropic.type", "basic"),
    ("providers[0].headers", []),
    ("providers[0].headers.X-A", "a\r\nb"),
    ("providers[0].headers.X-A", 1),
    ("providers[0].headers.Content-Length", "5"),
    ("providers[0].headers.transfer-encoding", "chunked"),
    ('providers[0].headers["a b"]', "x"),
    ('providers[0].headers["x\\n"]', "x"),
    ("providers[0].anthropicVersion", "a\nb"),
    ("providers[0].anthropicBeta", 1),
    ("providers[0].timeouts", 5),
    ("providers[0].timeouts.idleMs", -1),
    ("providers[0].timeouts.idleMs", 1.5),
    ("providers[0].timeouts.idleMs", True),
    ("providers[0].models", {}),
    ("providers[0].models[0]", 1),
    ("providers[0].models[0].id", ""),
    ("providers[0].models[0].id", " padded "),
    ("providers[0].models[0].id", "a\nb"),
    ("providers[0].models[0].aliases", {}),
    ("providers[0].models[0].aliases[0]", 1),
    ("providers[0].models[0].aliases[0]", " "),
    ("providers[0].models[0].contextWindow", "many"),
    ("providers[0].models[0].fallbackModels", 1),
    ("providers[0].models[0].fallbackModels[0]", {}),
    ("modelAliases.fast", []),
    ("modelAliases.fast[0]", 1),
    ("modelAliases.smart", "openrouter/gpt-4o"),
    ("corsOrigins[0]", "*"),
    ("corsOrigins[0]", "https://x.example/path"),
]


def set_at(document, path, value):
    """Set a value by a problem's path."""
    steps = []
    for part in path.replace('["', ".[").replace('"]', "").replace("[", ".[").replace("..", ".").split("."):
        if part.startswith("[") and part[1:].rstrip("]").isdigit():
            steps.append(int(part[1:].rstrip("]")))
        else:
            steps.append(part.lstrip("[").rstrip("]").replace("\\n", "\n"))
    target = document
    for step, following in zip(steps, steps[1:]):
        if isinstance(target, dict):
            target = target.setdefault(step, [None] if isinstance(following, int) else {})
        else:
            target = target[step]
    target[steps[-1]] = value
    return document


@pytest.mark.parametrize(("path", "value"), OFF_TYPE, ids=["%s=%.20r" % pair for pair in OFF_TYPE])
def test_a_value_that_cannot_be_used_is_an_error_at_its_path_with_a_cure(path, value):
    document = set_at(copy.deepcopy(MINIMAL), path, value)
    found = problems_at(document, path, "error")
    assert found, r.find_problems(document)
    assert all(problem.message and problem.cure for problem in found)
    with pytest.raises(r.ConfigError) as caught:
        r.read_config(document, {})
    assert set(found) <= set(caught.value.problems)
    assert "\n" not in caught.value.message


BAD_URLS = [
    "",
    "x",
    "openrouter.ai/api/v1",
    "ftp://x.example",
    "file:///etc/passwd",
    "https://",
    "https:///v1",
    "https://:443",
    "http://a@b",
    "http://user:pass@x.example/v1",
    "http://a\\@b",
    "http://[::1",
    "http://[::1]x",
    "http://[x]/",
    "https://x.example:0",
    "https://x.example:99999",
    "https://x.example:8x",
    "https://x.example/a b",
    "https://x.example/\n",
    "https://x.exa\tmple/v1",
    "https://x.example/{account}/v1",
    "https://x.example/#top",
    "https://exämple.de",
    "https://x.example/\x00",
    "javascript://x",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_bad_base_url_is_one_error_at_its_path(url):
    """Hardening: what is configured is parsed once, and there is only one way to read it."""
    document = changed(providers__0__baseUrl=url)
    if url.strip() == url:
        only_problem(document, "providers[0].baseUrl")
    assert r.check_url(url)[0]


@pytest.mark.parametrize(
    "url",
    [
        "https://x.example",
        "https://x.example/",
        "https://x.example:8443/api/v1?api-version=2024-10-21",
        "http://localhost:11434/v1",
        "http://127.0.0.1:1",
        "http://[::1]:8080/v1",
        "https://x.example/a%20b",
        "HTTPS://X.example/v1",
        "https://under_score.example/v1/~me/*",
    ],
)
def test_a_good_base_url_is_none(url):
    assert r.check_url(url) == ("", "")
    assert r.find_problems(changed(providers__0__baseUrl=url)) == []


@pytest.mark.parametrize("host", ["x.example", "192.168.1.5", "0.0.0.0", "127.evil.example", "localhost.evil.example"])
def test_plain_http_to_another_machine_warns(host):
    only_problem(changed(providers__0__baseUrl="http://%s/v1" % host), "providers[0].baseUrl", "warning")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "localhost."]
)
def test_loopback_is_told_from_the_rest(host):
    assert r.is_loopback(host)
    assert not r.is_loopback(host + ".evil.example")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "128.0.0.1", "127.0.0", "xlocalhost", ".localhost"])
def test_what_others_may_reach_is_not_loopback(host):
    assert not r.is_loopback(host)


def test_a_missing_url_id_and_empty_models_are_errors():
    found = r.find_problems({"providers": [{"apiKey": "k"}]})
    assert {(p.path, p.level) for p in found} == {
        ("providers[0]", "error"),
        ("providers[0].baseUrl", "error"),
        ("providers[0].models", "error"),
    }
    only_problem(changed(providers__1__models=[], providers__0__models=["gpt-4o"]), "providers[1].models")


def test_a_format_without_any_url_is_an_error():
    raw = {"id": "p", "apiKey": "k", "models": ["m"], "formats": ["openai", "anthropic"]}
    problem = only_problem(
        {"providers": [dict(raw, baseUrlByFormat={"openai": "https://x.example"})]}, "providers[0].baseUrl"
    )
    assert "anthropic" in problem.message


def test_provider_ids_that_differ_only_in_case_are_duplicates():
    document = changed()
    document["providers"].append(dict(document["providers"][1], id="Anthropic"))
    assert "providers[1]" in only_problem(document, "providers[2]").message


def test_duplicate_model_ids_are_errors_and_case_tells_two_models_apart():
    only_problem(
        changed(providers__1__models=["claude-3-7-sonnet", {"id": "claude-3-7-sonnet"}]), "providers[1].models[1]"
    )
    assert not r.find_problems(changed(providers__1__models=["claude-3-7-sonnet", "Claude-3-7-Sonnet"]))


def test_an_alias_that_means_two_models_of_a_provider_warns():
    document = changed(providers__1__models=["claude-3-7-sonnet", {"id": "b", "aliases": ["claude-3-7-sonnet"]}])
    only_problem(document, "providers[1].models[1]", "warning")


@pytest.mark.parametrize(
    ("path", "ref"),
    [
        ("defaultModel", "openrouter/gpt-5"),
        ("defaultModel", "nobody"),
        ("modelAliases.fast", "openrouter/nope"),
        ("modelAliases.fast[0]", "nope"),
        ("providers[0].models[0].fallbackModels[0]", "anthropic/nope"),
        ("providers[0].models[0].fallbackModels[0]", "nope/claude-3-7-sonnet"),
    ],
)
def test_an_unknown_reference_is_an_error_at_its_path(path, ref):
    only_problem(set_at(copy.deepcopy(MINIMAL), path, ref), path)


def test_an_unknown_reference_names_what_is_near():
    assert "openrouter/gpt-4o" in only_problem(changed(defaultModel="openrouter/gpt-4p"), "defaultModel").cure


@pytest.mark.parametrize(
    "ref",
    ["openrouter/gpt-4o", "OpenRouter/gpt-4o", "openrouter/gpt4o", "gpt4o", "gpt-4o", "fast", "quick-1", "gpt-4o[1m]"],
)
def test_the_default_model_may_be_anything_a_client_may_ask_for(ref):
    document = dict(changed(defaultModel=ref), modelAliases={"fast": "gpt4o", "quick-*": "openrouter/gpt-4o"})
    assert r.find_problems(document) == []


def test_an_alias_cannot_lead_to_an_alias_but_a_fallback_can():
    document = dict(changed(), modelAliases={"fast": "gpt4o", "faster": "fast"})
    found = only_problem(document, "modelAliases.faster")
    assert "names the alias fast" in found.message and "did you mean" not in found.cure
    document = dict(
        changed(providers__0__models__0__fallbackModels=["fast"]), modelAliases={"fast": "claude-3-7-sonnet"}
    )
    assert r.find_problems(document) == []


@pytest.mark.parametrize("targets", [[], 5, [7]])
def test_an_alias_that_leads_to_no_model_is_no_name_for_one(targets):
    document = dict(changed(defaultModel="fast"), modelAliases={"fast": targets})
    assert r.scan_config(document, {})[0].aliases == {}
    assert problems_at(document, "defaultModel", "error")


def test_a_provider_with_a_star_takes_any_model():
    document = changed(providers__1__models=["*"], defaultModel="anthropic/whatever/it-is")
    assert r.find_problems(document) == []


def test_a_bare_name_that_two_providers_have_is_an_error_only_where_it_is_used():
    document = changed(providers__1__models=["claude-3-7-sonnet", "gpt-4o"])
    assert r.find_problems(document) == []
    problem = only_problem(dict(document, defaultModel="gpt-4o"), "defaultModel")
    assert "openrouter/gpt-4o" in problem.cure
    assert "anthropic/gpt-4o" in problem.cure


def test_a_reference_to_a_disabled_model_warns():
    only_problem(changed(providers__1__enabled=False), "providers[0].models[0].fallbackModels[0]", "warning")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("defaltModel", "defaultModel"),
        ("providers[0].apikey", "apiKey"),
        ("providers[0].models[0].fallbackModel", "fallbackModels"),
        ("providers[0].timeouts.connectMS", "connectMs"),
        ("providers[0].auth.headername", "headerName"),
    ],
)
def test_an_unknown_key_is_a_warning_that_names_the_nearest(path, near):
    problem = only_problem(set_at(copy.deepcopy(MINIMAL), path, "x"), path, "warning")
    assert near in problem.cure


def test_a_name_of_needs_that_nobody_knows_is_a_warning_and_all_that_are_known_are_good():
    assert [row.name for row in r.COMPATS] == list(r.COMPAT_NAMES)
    for name in r.COMPAT_NAMES:
        assert r.find_problems(changed(providers__0__compat=name)) == []
    assert "deepseek" in only_problem(changed(providers__0__compat="depseek"), "providers[0].compat", "warning").cure
    assert "zai" in only_problem(changed(providers__0__compat={"x": 1}), "providers[0].compat", "warning").cure


@pytest.mark.parametrize("path", ["defaultModel", "modelAliases.fast", "providers[0].models[0].fallbackModels[0]"])
def test_a_reference_that_stands_for_any_model_is_a_warning(path):
    """The provider would be asked for a model of the name *; every other model can be used as before."""
    document = changed(providers__1__models=["*", "claude-3-7-sonnet"])
    problem = only_problem(set_at(document, path, "anthropic/*"), path, "warning")
    assert problem.message == "names the model anthropic/*, and * stands for any"
    assert r.find_problems(set_at(document, path, "anthropic/any-name")) == []


@pytest.mark.parametrize("key", ["$schema", "_comment", "//", "#note"])
def test_the_usual_ways_to_write_a_comment_do_not_warn(key):
    assert r.find_problems(dict(MINIMAL, **{key: "x"})) == []


def test_errors_inside_a_disabled_entry_are_only_warnings():
    document = changed()
    document["providers"].append({"id": "later", "enabled": False, "baseUrl": "x"})
    assert {p.level for p in r.find_problems(document)} == {"warning"}
    assert r.read_config(document, {}).providers[2].enabled is False


def test_a_provider_without_a_key_warns_unless_it_is_local_or_wants_none():
    document = changed(providers__0__apiKey=None)
    only_problem(document, "providers[0]", "warning")
    assert r.find_problems(dict(changed(providers__0__apiKey=None, providers__0__auth={"type": "none"}))) == []
    assert r.find_problems(changed(providers__0__apiKey=None, providers__0__baseUrl="http://localhost:1/v1")) == []


def test_a_variable_that_is_to_hold_a_key_and_is_not_set_is_a_warning_where_the_environment_is_known():
    document = changed(providers__0__apiKey=None, providers__0__apiKeyEnv="NOBODY_SET_IT")
    assert r.find_problems(document) == []
    (found,) = r.scan_config(document, {"ANTHROPIC_API_KEY": "k"})[1]
    assert (found.path, found.level) == ("providers[0].apiKeyEnv", "warning") and "NOBODY_SET_IT is not set" in found.message
    for good in (
        changed(providers__0__apiKeyEnv="NOBODY_SET_IT"),
        changed(providers__0__apiKey=None, providers__0__apiKeyEnv="NOBODY_SET_IT", providers__0__enabled=False),
        dict(document, providers=[{**document["providers"][0], "auth": {"type": "none"}}]),
    ):
        said = r.scan_config(good, {"ANTHROPIC_API_KEY": "k", "OTHER": "v"})[1]
        assert not [problem for problem in said if "NOBODY" in problem.message]
    assert r.scan_config(document, {"NOBODY_SET_IT": "k", "ANTHROPIC_API_KEY": "k"})[1] == []


def test_no_provider_is_a_warning_and_a_newer_version_too():
    only_problem({}, "providers", "warning")
    only_problem(changed(version=9), "version", "warning")


@pytest.mark.parametrize("of", ["provider", "model"])
def test_a_dangling_fallback_of_a_disabled_entry_only_warns(of):
    document = changed(providers__1__models__0__fallbackModels=["nope"], providers__0__models=["gpt-4o"])
    entry = document["providers"][1] if of == "provider" else document["providers"][1]["models"][0]
    entry["enabled"] = "OFF"
    only_problem(document, "providers[1].models[0].fallbackModels[0]", "warning")


def test_a_disabled_model_does_not_make_a_bare_name_ambiguous():
    document = changed(defaultModel="gpt-4o")
    document["providers"][1]["models"].append({"id": "gpt-4o", "enabled": False})
    assert r.find_problems(document) == []
    document["providers"][0]["models"][0]["enabled"] = False
    only_problem(document, "defaultModel")


def test_no_problem_shows_a_key():
    """Hardening: a key stands in no message, however it is broken."""
    secret = "sk-very-secret-0123456789"
    for path in ("masterKey", "providers[0].apiKey", "providers[0].headers.authorization", "providers[0].apiKeyEnv"):
        document = set_at(copy.deepcopy(MINIMAL), path, secret + "\r\nx")
        found = r.find_problems(document)
        assert problems_at(document, path, "error")
        assert not any(secret in r.show_problem(problem) for problem in found)


def test_a_problem_is_one_printable_line_whatever_the_names_hold():
    document = changed(defaultModel="a\n\x1b[31m")
    document["a\nb\x1b"] = 1
    document["providers"][0]["headers"] = {"x\ny": "z"}
    found = r.find_problems(document)
    assert len(found) == 3
    assert all(r.show_problem(problem).isprintable() for problem in found)


def test_the_config_error_says_the_first_problem_and_counts_the_rest():
    with pytest.raises(r.ConfigError) as caught:
        r.read_config(changed(version="1", masterKey=2), {})
    assert caught.value.message.startswith("version: ")
    assert "1 more" in caught.value.message
    assert len(caught.value.problems) == 2
    assert caught.value.status == 503


# ----- text -----


def test_a_byte_order_mark_is_tolerated():
    """trap 181"""
    assert r.parse_config_text("\ufeff{}", "f") == {}
    assert r.parse_config_text(b"\xef\xbb\xbf{}", "f") == {}


def test_broken_json_names_place_line_and_column_and_points_at_it():
    """trap 181"""
    text = '{\n  "version": 1,\n  "defaultModel": oops\n}'
    with pytest.raises(r.ConfigError) as caught:
        r.parse_config_text(text, "/x/router.json")
    first, line, caret = caught.value.message.split("\n")
    assert first.startswith("/x/router.json:3:19: ")
    assert line.strip() == '"defaultModel": oops'
    assert caret.index("^") == line.index("oops")


def test_the_caret_points_right_in_a_very_long_line_too():
    text = '{"a": "%s", "b": !}' % ("x y " * 3000)
    with pytest.raises(r.ConfigError) as caught:
        r.parse_config_text(text, "f")
    _, line, caret = caught.value.message.split("\n")
    assert len(line) < 140
    assert line[caret.index("^")] == "!"


@pytest.mark.parametrize(
    ("text", "hint"),
    [('{"a": 1,,}', "a comma"), ('{"a": [,]}', "a comma"), ("{,}", "a comma"), ('{"a": 1 # x\n}', "comments")],
)
def test_the_usual_mistakes_get_a_hint(text, hint):
    """trap 181"""
    with pytest.raises(r.ConfigError, match=hint):
        r.parse_config_text(text, "f")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1,}',
        '{"a": [1, 2,\n] ,\n}',
        '// first\n{"a": 1} // last',
        '{"a": /* "b": 2, */ 1, // "c": [,]\n}',
        '{"a": 1, /* two\nlines */ }',
        '\ufeff{"a": 1,\r\n  // x\r\n}',
    ],
)
def test_comments_and_last_commas_are_read_over(text):
    """trap 181"""
    assert r.parse_config_text(text, "f")["a"] in (1, [1, 2])
    assert r.parse_config_text(text.encode(), "f")["a"] in (1, [1, 2])


def test_what_looks_like_a_comment_inside_a_text_is_text():
    """trap 181"""
    text = '{"a": "https://x.example/v1", "b": "/* no */,]", "c": "\\"// ", "d": [1,],}'
    expected = {"a": "https://x.example/v1", "b": "/* no */,]", "c": '"// ', "d": [1]}
    assert r.parse_config_text(text, "f") == expected
    assert not r.has_comments(text) and r.has_comments(text + "// x") and r.has_comments("/**/" + text)


@pytest.mark.parametrize("broken", ["{ // x\n  /* y */ oops,\n}", '{"a": 1, // x\n  oops}', "{\n  /* never closed }"])
def test_an_error_beside_comments_is_shown_where_it_is(broken):
    with pytest.raises(r.ConfigError) as caught:
        r.parse_config_text(broken, "f")
    problem = caught.value.problems[0]
    line = broken.split("\n")[problem.line - 1]
    assert line[problem.column - 1 :][:4] in ("oops", "/* n")
    assert caught.value.message.split("\n")[1].strip() == line.strip()


@pytest.mark.parametrize("seed", range(40))
def test_a_document_among_comments_is_the_document(seed):
    dice = random.Random(seed)
    extras = ["", " ", "\n", '// a, ] } " x\n', '/* {[," */', "/***/"]
    plain = json.dumps(MINIMAL, indent=1)
    pieces = re.findall(r'"(?:[^"\\]|\\.)*"|[^\s"]', plain)
    pieces = [("," if dice.random() < 0.5 else "") + piece if piece in "]}" else piece for piece in pieces]
    text = "".join(piece + dice.choice(extras) for piece in pieces).replace("[,", "[").replace("{,", "{")
    assert r.parse_config_text(text, "f") == MINIMAL


def test_problems_are_located_in_the_text():
    text = """{
  // comment: {"providers": [
  "defaultModel": "nobody/x",
  "providers": [
    {"id": "a", "baseUrl": "https://a.example", "apiKey": "k", "models": ["m", {"id": "n", "aliases": 5}]},
    {"id": "b", "baseUrl": "nope", "models": ["m"],
     "base-ulr": 1}
  ], "modelAliases": {"a.b [c]": "nobody/y"}
}"""
    found = r.locate_problems(r.find_problems(r.parse_config_text(text, "f")), text)
    lines = text.split("\n")
    shown = {problem.path: lines[problem.line - 1][problem.column - 1 :].split(":")[0] for problem in found}
    assert shown == {
        "providers[0].models[1].aliases": '"aliases"',
        "providers[1].baseUrl": '"baseUrl"',
        "providers[1].base-ulr": '"base-ulr"',
        "defaultModel": '"defaultModel"',
        'modelAliases["a.b [c]"]': '"a.b [c]"',
    }


def test_a_key_that_is_written_twice_is_a_warning_at_the_last_one():
    text = '{"masterKey": "a",\n "providers": [],\n "masterKey": "b", "metadata": {"x": [{"y": 1, "y": 2}]}}'
    found = [p for p in r.locate_problems(r.find_problems(json.loads(text)), text) if "twice" in p.message]
    assert [(p.path, p.level, p.line, p.column) for p in found] == [
        ("masterKey", "warning", 3, 2), ("metadata.x[0].y", "warning", 3, 48)
    ]  # fmt: skip


def test_what_is_missing_is_located_at_what_should_hold_it():
    text = '{"providers":\n {"a": {"baseUrl": "https://a.example", "auth": {"type": "none"}}}}'
    found = r.locate_problems(r.find_problems(json.loads(text)), text)
    assert [(problem.path, problem.line, problem.column) for problem in found] == [("providers.a.models", 2, 3)]


@pytest.mark.parametrize("seed", range(20))
def test_every_problem_of_every_shape_has_a_place(seed):
    dice = random.Random(seed)

    def spoil(value):
        if dice.random() < 0.15:
            return dice.choice([None, 5, "x y", [], {}, True, ["a", 7], {"k": {"l": 1}}])
        if isinstance(value, dict):
            return {key: spoil(entry) for key, entry in value.items()}
        return [spoil(entry) for entry in value] if isinstance(value, list) else value

    document = {key: spoil(value) for key, value in MINIMAL.items()}
    text = json.dumps(document, indent=dice.choice([None, 2]))
    for problem in r.locate_problems(r.find_problems(document), text):
        assert problem.line >= 1 and problem.column >= 1


# ----- the schema -----


def accepts(schema, value, root):
    """A small validator of what the schema uses, for machines without jsonschema."""
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].split("/")[1:]:
            target = target[step]
        return accepts(target, value, root)
    types = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "null": type(None)}
    unknown = set(schema) - set(
        "$schema title definitions description type properties required items minItems additionalProperties propertyNames"
        " pattern enum minimum maximum anyOf allOf".split()
    )
    assert not unknown, unknown
    wanted = types.get(schema.get("type"), object)
    if not isinstance(value, wanted) or wanted is int and isinstance(value, bool):
        return False
    checks = [any(accepts(one, value, root) for one in schema["anyOf"])] if "anyOf" in schema else []
    checks += [accepts(one, value, root) for one in schema.get("allOf", ())]
    checks += [value in schema["enum"]] if "enum" in schema else []
    checks += [schema["minimum"] <= value <= schema["maximum"]] if "minimum" in schema else []
    if isinstance(value, str):
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if isinstance(value, list):
        checks += [accepts(schema["items"], one, root) for one in value if "items" in schema]
        checks.append(len(value) >= schema.get("minItems", 0))
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        checks += [accepts(known.get(key, others), one, root) for key, one in value.items()]
        checks += [accepts(schema.get("propertyNames", {}), key, root) for key in value]
        checks += [key in value for key in schema.get("required", ())]
    return all(checks)


def schema_accepts(document):
    schema = r.config_schema()
    verdict = accepts(schema, document, schema)
    try:
        import jsonschema
    except ImportError:
        return verdict
    jsonschema.Draft7Validator.check_schema(schema)
    assert jsonschema.Draft7Validator(schema).is_valid(document) == verdict
    return verdict


def test_the_schema_knows_every_field_in_every_spelling_and_says_what_it_is():
    schema = r.config_schema()
    objects = dict(schema["definitions"], config=schema)
    assert set(objects) == set(r.FIELDS)
    for kind, fields in r.FIELDS.items():
        assert set(objects[kind]["properties"]) == set(r._FIELD_OF[kind])
        assert all(objects[kind]["properties"][field.key]["description"] == field.help for field in fields)
    assert schema["definitions"]["auth"]["properties"]["type"]["enum"] == list(r.AUTH_TYPES)
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("fields", [{}, {"$schema": "./router.schema.json"}, {"surprise": 1, "_note": []}])
def test_the_schema_accepts_what_the_router_accepts(fields):
    document = dict(MINIMAL, **fields)
    assert not [problem for problem in r.find_problems(document) if problem.level == "error"]
    assert schema_accepts(document)


ODD_SHAPES = [
    {"default-model": "a/m", "master-key": "k", "providers": {"a": {"endpoint": "https://a.example", "models": "m"}}},
    {"providers": {"id": "a", "base_url": "https://a.example", "credential": "k", "models": ["m"], "formats": ["claude"]}},
    {"providers": [{"id": "a", "endpoints": ["https://a.example"], "models": [{"id": "*", "aliases": "b"}], "format": "openai"}]},
    {"modelAliases": {"x-*": ["a/m"]}, "providers": [{"id": "a", "baseUrl": "https://a.example", "models": ["m"],
        "headers": {"x-a": None, "x-b": "1"}, "authByFormat": {"anthropic": {"type": "bearer"}}, "timeouts": {"idleMs": 5}}]},
]  # fmt: skip


@pytest.mark.parametrize("document", ODD_SHAPES)
def test_the_schema_accepts_older_shapes(document):
    assert not [problem for problem in r.find_problems(document) if problem.level == "error"]
    assert schema_accepts(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version="1"),
        lambda d: d.update(masterKey=5),
        lambda d: d.update(corsOrigins=["*"]),
        lambda d: d.update(providers=5),
        lambda d: d.update(clientKeys=[{"name": "x"}]),
        lambda d: d["providers"][0].update(id="a b"),
        lambda d: d["providers"][0].update(baseUrl="ftp://x"),
        lambda d: d["providers"][0].update(formats=["soap"]),
        lambda d: d["providers"][0].update(auth={"type": "basic"}),
        lambda d: d["providers"][0].update(headers={"a b": "c"}),
        lambda d: d["providers"][0].update(headers={"content-length": "c"}) or d["providers"][0].update(enabled=1),
        lambda d: d["providers"][0].update(timeouts={"idleMs": -1}),
        lambda d: d["providers"][0].update(baseUrlByFormat={"soap": "https://x.example"}),
        lambda d: d["providers"][0].update(models=[]),
        lambda d: d["providers"][0].update(models=[" gpt-4o"]),
        lambda d: d["providers"][0].update(models=[{"id": "gpt\u200b-4o"}]),
        lambda d: d["providers"][0].update(models=""),
        lambda d: d["providers"][0].update(baseUrl="https://a b.example/"),
        lambda d: d["providers"][0].update(baseUrl="https://a.example/b c"),
        lambda d: d["providers"][0].update(proxy="http://a b"),
        lambda d: d["providers"][0].update(timeouts={"idleMs": 10**30}),
        lambda d: d["providers"][0].update(models=[{"aliases": ["x"]}]),
        lambda d: d["providers"][0].pop("models"),
        lambda d: d["providers"][0].pop("id"),
    ],
)
def test_the_schema_refuses_what_the_router_refuses(change):
    document = copy.deepcopy(MINIMAL)
    change(document)
    assert [problem for problem in r.find_problems(document) if problem.level == "error"]
    assert not schema_accepts(document)


@pytest.mark.parametrize(
    "line",
    [
        '"apiKey": "hunter2" oops',
        '"api-key": "hunter2',
        '"headers": {"authorization": "Bearer hunter2"} oops',
        '"x": "sk-hunter2" oops',
        '"whatever": "hunter2hunter2hunter2hunter2" oops',
        "apiKey: 'hunter2', oops",
        """'masterKey' : 'x"hunter2' oops""",
        r'"apiKey": "\"hunter2" oops',
    ],
)
def test_the_line_shown_for_broken_json_hides_keys(line):
    with pytest.raises(r.ConfigError) as caught:
        r.parse_config_text("{\n%s\n}" % line, "f")
    assert "hunter2" not in caught.value.message
    assert "\n" in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'"x"',
        b"null",
        b"5",
        b"\xff\xfe{\x00}\x00",
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'{"a": ' + b"9" * 6000 + b"}",
    ]
    + [b"[" * 100000, b'{"a":' * 100000, b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", b'{"a": "\x01"}', b"{" * 3],
    ids=lambda data: repr(data[:12]),
)
def test_whatever_is_not_a_json_object_is_a_config_error_that_names_the_source(data):
    with pytest.raises(r.ConfigError) as caught:
        r.parse_config_text(data, "/x/router.json")
    assert "/x/router.json" in caught.value.message


def test_text_that_is_not_utf8_is_placed_too():
    with pytest.raises(r.ConfigError, match="f:2:6"):
        r.parse_config_text(b'{\n"name\xe4": 1}', "f")


# ----- properties -----


def _nodes(value, path=()):
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _nodes(entry, path + (key,))


ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    2**70,
    "",
    " ",
    "x",
    "\ud800",
    "a\r\nb",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": []}},
]


@pytest.mark.parametrize("path", [p for p in _nodes(MINIMAL) if p], ids=str)
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:12])
def test_any_odd_value_anywhere_gives_problems_and_never_another_exception(path, odd):
    document = copy.deepcopy(MINIMAL)
    target = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = odd
    for problem in r.find_problems(document):
        assert r.show_problem(problem).isprintable()
    r.mask_document(document)
    try:
        r.read_config(document, {})
    except r.ConfigError:
        pass


@pytest.mark.parametrize("seed", range(5))
def test_any_cut_or_random_text_is_a_config_error_or_an_object(seed):
    dice = random.Random(seed)
    text = json.dumps(MINIMAL, indent=1)
    for _ in range(200):
        data = bytearray(text[: dice.randrange(len(text))].encode())
        for _ in range(dice.randrange(3)):
            if data:
                data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            document = r.parse_config_text(bytes(data), "f")
        except r.ConfigError:
            continue
        r.find_problems(document)


def big_document(providers, models, ref="p%d/m%d"):
    return {
        "providers": [
            {
                "id": "p%d" % i,
                "baseUrl": "https://x.example",
                "apiKey": "k",
                "models": [
                    {"id": "m%d" % j, "fallbackModels": [ref % ((i + 1) % providers, j)]} for j in range(models)
                ],
            }
            for i in range(providers)
        ]
    }


class CountedIndex(r.ModelIndex):
    """An index that counts its look-ups."""

    judged = 0

    def judge(self, *args, **kwargs):
        CountedIndex.judged += 1
        return super().judge(*args, **kwargs)


def test_a_huge_configuration_is_judged_once_per_reference(monkeypatch):
    monkeypatch.setattr(r, "ModelIndex", CountedIndex)
    CountedIndex.judged = 0
    assert r.find_problems(big_document(200, 25)) == []
    assert CountedIndex.judged == 5000


def test_thousands_of_unknown_references_are_all_reported_without_thousands_of_guesses(monkeypatch):
    calls = []
    monkeypatch.setattr(r, "did_you_mean", lambda *args: calls.append(1) or "")
    assert len(r.find_problems(big_document(100, 25, "nope%d/m%d"))) == 2500
    assert len(calls) <= 20


# ----- presets -----


def test_no_key_variable_means_no_configuration():
    assert r.preset_document({"OPENAI_API_KEY": " ", "PATH": "x"}) is None


@pytest.mark.parametrize("row", r.PRESETS, ids=lambda row: row.id)
def test_each_key_variable_alone_makes_a_usable_configuration(row):
    for variable in r.preset_variables(row):
        environ = {variable: "the-key"}
        document = r.preset_document(environ)
        assert r.find_problems(document) == []
        assert "the-key" not in json.dumps(document)
        config = r.read_config(document, environ)
        assert [p.id for p in config.providers] == [row.id]
        assert config.providers[0].api_key == "the-key"
        assert config.providers[0].models == (r.Model("*"),)
        assert config.default_model == row.id + "/" + row.model


def test_several_key_variables_make_one_provider_each_in_the_order_of_the_table():
    environ = {name: "k" for row in r.PRESETS for name in r.preset_variables(row)}
    config = r.read_config(r.preset_document(environ), environ)
    assert [p.id for p in config.providers] == [row.id for row in r.PRESETS if row.keys]
    assert config.default_model.startswith(r.PRESETS[0].id + "/")


@pytest.mark.parametrize("name", "OPENAI ANTHROPIC OPENROUTER GROQ DEEPSEEK MISTRAL GEMINI".split())
def test_the_promised_key_variables_are_known(name):
    assert any(name + "_API_KEY" in r.preset_variables(row) for row in r.PRESETS)


@pytest.mark.parametrize(
    "document, words",
    [
        ({"providers": 5}, "providers: must be a list, is a whole number; write a list"),
        ({"providers": {"id": "a", "baseUrl": "http://localhost", "models": [5]}}, "providers.models[0]: must be text or an object, is a whole number; write text or an object"),
    ],
)
def test_what_may_be_more_than_one_type_is_told_so(document, words):
    assert words in [r.show_problem(problem) for problem in r.find_problems(document)]


@pytest.mark.parametrize(
    "text, where, words",
    [
        ('{\n // NaN\n "version": NaN}', (3, 13), "NaN is not JSON"),
        ('{"a": "Infinity", "b": -Infinity}', (1, 24), "-Infinity is not JSON"),
        (" \n", (2, 1), "there is nothing in it"),
    ],
)
def test_what_is_no_json_is_shown_at_its_place(text, where, words):
    with pytest.raises(r.ConfigError, match=words) as caught:
        r.parse_config_text(text, "file")
    assert [(one.line, one.column) for one in caught.value.problems] == [where]


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "NaNs"], ids=["deep", "constant"])
def test_what_has_no_place_of_its_own_is_told_without_one(value):
    with pytest.raises(r.ConfigError, match="file is not usable JSON: ") as caught:
        r.parse_config_text('{"version": 1,\n "metadata": %s}' % value, "file")
    assert not [one for one in caught.value.problems if one.line]


@pytest.mark.parametrize("text", ['{"a" "' + "key" * 250_000, "{" + "/* " * 100_000], ids=["one line", "a comment"])
def test_what_is_no_json_is_told_in_a_moment_however_long_it_is(text):
    began = time.process_time()
    with pytest.raises(r.ConfigError, match="f:1:"):
        r.parse_config_text(text, "f")
    assert time.process_time() - began < 10


def test_a_byte_order_mark_moves_no_place():
    text = '{\n "nobody": 1,\n "knows": 2}'
    problems = r.find_problems(r.parse_config_text(text, "f"))
    assert r.locate_problems(problems, "\ufeff" + text) == r.locate_problems(problems, text)


def test_thousands_of_problems_are_found_in_a_long_text_in_a_moment():
    began, problems = time.process_time(), [r.Problem("b", "is odd", "mend it")] * 20_000
    found = r.locate_problems(problems, "{" + "\n" * 2_000_000 + ' "b": 1}')
    assert {(one.line, one.column) for one in found} == {(2_000_001, 2)}
    assert time.process_time() - began < 10


def test_problems_come_in_the_order_of_the_text():
    text = '{"defaultModel": "x",\n "providers": [{"id": "a",\n "baseUrl": "http://localhost", "models": [5],\n "name": "x", "name": "y"}]}'
    found = r.locate_problems(r.find_problems(json.loads(text)), text)
    assert [(one.line, one.path) for one in found] == [
        (1, "defaultModel"), (3, "providers[0].models[0]"), (4, "providers[0].name")
    ]  # fmt: skip
