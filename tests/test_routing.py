"""Section ROUTING: a model's name becomes an ordered list of candidates, and lists of models."""

import time

import pytest

import llm_router as R


def config(providers, aliases=None, default="", **more):
    """A Config from {"id": [model, ...]}; a model is an id, or a Model."""
    rows = tuple(
        R.Provider(id, models=tuple(m if isinstance(m, R.Model) else R.Model(m) for m in models))
        for id, models in providers.items()
    )
    refs = {name: (to,) if isinstance(to, str) else tuple(to) for name, to in (aliases or {}).items()}
    return R.Config(default_model=default, aliases=refs, providers=rows, **more)


def refs(routes, name):
    return [candidate.ref for candidate in routes.find_plan(name)]


def not_found(routes, name):
    with pytest.raises(R.RouterError) as caught:
        routes.find_plan(name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    return caught.value.message


ROUTES = R.Routes(
    config(
        {
            "Alpha": ["m1", "z-ai/glm-4.6", R.Model("m2", aliases=("fast", "m2")), R.Model("off", enabled=False)],
            "beta": [
                R.Model("m1", fallback_models=("Alpha/m2", "small")),
                "only-b",
                "claude-x",
                R.Model("l", aliases=("big",)),
            ],
            "gamma": ["m1"],
            "wild": ["*", "fixed"],
            "Alphabet": ["m9"],
        },
        {
            "small": "Alpha/m2",
            "chain": ["beta/m1", "Alpha/m1", "beta/m1", "gamma/m1"],
            "m9": "beta/only-b",
            "gamma/m1": "beta/l",
            "claude-*": "Alpha/m1",
            "claude-haiku-*": "gamma/only",
            "claude-*-mini*": "beta/only-b",
            "gone": ["Alpha/off", "Alpha/none"],
            "partly": ["Alpha/off", "beta/l", "Alpha/m1"],
        },
        default="small",
    )
)


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("small", ["Alpha/m2"]),  # an exact alias first ...
        ("m9", ["beta/only-b"]),  # ... even when a model bears the name
        ("gamma/m1", ["beta/l"]),
        ("Alpha/m1", ["Alpha/m1"]),  # then provider/model
        ("alpha/m1", ["Alpha/m1"]),  # the provider's case does not matter
        ("ALPHA/m1", ["Alpha/m1"]),
        ("Alpha/fast", ["Alpha/m2"]),  # or provider/alias
        ("Alpha/z-ai/glm-4.6", ["Alpha/z-ai/glm-4.6"]),  # split at the first slash
        ("z-ai/glm-4.6", ["Alpha/z-ai/glm-4.6"]),  # then an exact id, slashes included
        ("only-b", ["beta/only-b"]),
        ("fast", ["Alpha/m2"]),  # or a model's alias
        ("m2", ["Alpha/m2"]),  # an alias that repeats the id is not a second owner
        ("big", ["beta/l"]),
        ("claude-x", ["beta/claude-x"]),  # exact before any pattern
        ("claude-opus-4", ["Alpha/m1"]),  # then patterns
        ("claude-opus-mini-4", ["beta/only-b"]),  # the longest literal part first
        ("claude-opus-4[1m]", ["Alpha/m1"]),
        ("only-b[1m]", ["beta/only-b"]),  # then all again without the suffix (trap 190)
        ("small[beta]", ["Alpha/m2"]),
        ("alpha/m1[1m]", ["Alpha/m1"]),
        ("wild/any/thing:free", ["wild/any/thing:free"]),
        ("wild/fixed", ["wild/fixed"]),
        ("wild/x[1m]", ["wild/x"]),
        ("WILD/X", ["wild/X"]),
        ("smart", ["Alpha/m2"]),
        ("", ["Alpha/m2"]),
        ("smart[1m]", ["Alpha/m2"]),
    ],
)
def test_a_name_is_looked_up_in_the_order_of_the_contract(asked, expected):
    plan = ROUTES.find_plan(asked)
    assert [candidate.ref for candidate in plan] == expected
    assert [c.ref for c in plan] == ["%s/%s" % (c.provider.id, c.model_id) for c in plan]


def test_a_name_of_several_providers_is_a_404_that_lists_them():
    message = not_found(ROUTES, "m1")
    assert "Alpha/m1, beta/m1, gamma/m1" in message


@pytest.mark.parametrize(
    "asked",
    [
        "nope",
        "Alpha/nope",
        "off",
        "Alpha/off",
        "delta/m1",
        "M2",
        "Alpha/M1",
        "Alpha/",
        "/m1",
        "*",
        "Alpha/*",
        "claude",
        "only-b[1m",
        "gone",
        "clau*",
    ],
)
def test_an_unknown_or_disabled_name_is_a_404(asked):
    not_found(ROUTES, asked)


def test_a_404_names_what_is_near_and_nothing_but_names():
    """LiteLLM #5762: the unknown-model error listed keys and URLs."""
    provider = R.Provider(
        "Alpha", api_key="sk-secret", base_urls={"openai": "https://secret.example"}, models=(R.Model("gpt-4o-mini"),)
    )
    message = not_found(R.Routes(R.Config(providers=(provider,))), "alpha/gpt-4o-mni")
    assert "Alpha/gpt-4o-mini" in message
    assert "secret" not in message
    assert "/v1/models" in not_found(ROUTES, "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqq")


def test_a_404_says_how_to_ask_for_a_model_that_a_wildcard_passes_on():
    """The first request of somebody who started from key variables alone: each provider has `*` and nothing else."""
    routes = R.Routes(config({"openai": ["*"], "anthropic": ["*"], "mine": ["m"]}))
    assert not_found(routes, "gpt-5").endswith("; openai/gpt-5 or anthropic/gpt-5 is passed on")
    assert not_found(routes, "opnai/gpt-5").endswith("GET /v1/models lists what there is")


def test_nothing_asked_and_no_default_is_a_404_that_says_so():
    routes = R.Routes(config({"a": ["m"]}))
    for asked in ("", "smart"):
        assert "defaultModel" in not_found(routes, asked)


def test_a_disabled_provider_has_no_models():
    on, off = (
        R.Provider("a", models=(R.Model("m"),)),
        R.Provider("b", enabled=False, models=(R.Model("m"), R.Model("n"))),
    )
    routes = R.Routes(R.Config(providers=(on, off)))
    assert refs(routes, "m") == ["a/m"]
    not_found(routes, "b/n")
    not_found(routes, "n")
    assert routes.names() == ["a/m"]


def test_an_alias_that_is_a_list_is_the_whole_list_of_candidates_each_once():
    assert refs(ROUTES, "chain") == ["beta/m1", "Alpha/m1", "gamma/m1"]
    assert refs(ROUTES, "partly") == ["beta/l", "Alpha/m1"]
    assert "gone" in not_found(ROUTES, "gone")


def test_a_single_reference_adds_the_models_own_fallbacks_which_are_not_transitive():
    models = {
        "a": [R.Model("m", fallback_models=("b/m", "both", "nick", "a/m", "b/off", "c/x"))],
        "b": [R.Model("m", fallback_models=("a/n",)), R.Model("off", enabled=False), R.Model("n", aliases=("nick",))],
        "c": ["*"],
    }
    routes = R.Routes(
        config(models, {"one": "a/m", "list": ["a/m"], "both": ["b/m", "c/y"], "two": ["a/m", "c/z"], "p-*": "a/m"})
    )
    expected = ["a/m", "b/m", "c/y", "b/n", "c/x"]
    for name in ("a/m", "one", "list", "p-1"):
        assert refs(routes, name) == expected
    assert refs(routes, "two") == ["a/m", "c/z"]


def test_patterns_may_hold_several_stars_and_every_other_character_stands_for_itself():
    aliases = {"*": "a/any", "gpt-4.*": "a/dot", "*[x]*": "a/square", "a+b*": "a/plus", "*-end": "a/end"}
    routes = R.Routes(config({"a": ["any", "dot", "square", "plus", "end"]}, aliases))
    for asked, ref in (
        ("gpt-4.1", "dot"),
        ("gpt-45", "any"),
        ("1[x]2", "square"),
        ("a+b", "plus"),
        ("aab", "any"),
        ("the-end", "end"),
        ("x/y", "any"),
    ):
        assert refs(routes, asked) == ["a/" + ref]


@pytest.mark.parametrize(
    "pattern, name, is_meant",
    [
        ("ab*ba", "aba", False),  # no character counts twice
        ("ab*ba", "abba", True),
        ("a*b*b*", "ab", False),
        ("a*b*b*", "axbxb\n", True),
        ("**x**", "x", True),
        ("*-x*x-*", "-x-", False),
    ],
)
def test_a_star_stands_for_any_characters_or_none(pattern, name, is_meant):
    assert (R.ModelIndex((), {pattern: ("a/m",)}).find_pattern(name) is not None) == is_meant


def test_a_long_name_is_compared_with_a_pattern_of_many_stars_in_a_moment():
    """The name is a client's; trying every piece at every place would take centuries, and hold up everybody."""
    index, began = R.ModelIndex((), {"*-" * 8 + "*x": ("a/m",)}), time.process_time()
    assert index.find_pattern("-" * 512) is None
    assert time.process_time() - began < 10


def test_a_wildcard_passes_any_id_with_the_models_own_fallbacks_and_fields():
    routes = R.Routes(config({"w": [R.Model("*", formats=("anthropic",), fallback_models=("a/m",))], "a": ["m"]}))
    plan = routes.find_plan("w/vendor/new:free")
    assert [c.ref for c in plan] == ["w/vendor/new:free", "a/m"]
    assert plan[0].model.formats == ("anthropic",)
    assert plan[0].model_id == "vendor/new:free"


@pytest.mark.parametrize(
    "name", ["w/" + "x" * 100_000, "w/a\r\nx-evil: 1", "w/a\x00b", "w/\x1b[31m", "w/\u2028", "w/\ud800"]
)
def test_a_name_that_could_break_a_header_or_a_log_line_is_refused(name):
    """Log and header injection: through a wildcard a client's own words become a reference."""
    message = not_found(R.Routes(config({"w": ["*"]})), name)
    assert len(message) < 500
    assert message.isprintable()


def test_the_mark_of_a_variant_is_no_longer_than_a_name():
    """Plans are kept by the name that was asked for."""
    routes = R.Routes(config({"a": ["m"]}, default="a/m"))
    assert refs(routes, "smart[1m]") == ["a/m"]
    not_found(routes, "smart[%s]" % ("x" * 1000))


@pytest.mark.parametrize(
    "name", ["w/{{7*7}}", "w/${x}", "w/{0.__class__}", "w/%(x)s", "w/../../etc", "w/a b", "w/%2e%2e"]
)
def test_a_template_or_path_in_a_name_goes_upstream_as_it_is(name):
    """CVE-2026-42203."""
    assert R.Routes(config({"w": ["*"]})).find_plan(name)[0].model_id == name[2:]


# ---- lists of models


def test_the_list_has_smart_aliases_and_every_enabled_model_but_no_pattern_and_no_wildcard():
    names = [entry["id"] for entry in R.list_models(ROUTES, False)["data"]]
    assert names[0] == "smart"
    assert {"small", "chain", "Alpha/m1", "beta/l", "wild/fixed"} < set(names)
    assert not [name for name in names if "*" in name or name.endswith("/off")]
    assert "smart" not in R.Routes(config({"a": ["m"]})).names()


def test_a_models_own_alias_is_listed_where_it_means_that_model_only():
    models = {"a": [R.Model("m", aliases=("claude-gpt", "m", "both"))], "b": [R.Model("n", aliases=("both", "o")), "o"]}
    assert R.Routes(config(models)).names() == ["a/m", "b/n", "b/o", "claude-gpt"]
    off = R.Model("m", aliases=("hidden",), enabled=False)
    assert R.Routes(config({"a": [off, "n"]}, {"n": "a/n"})).names() == ["n", "a/n"]


def test_every_listed_name_can_be_asked_for():
    for name in ROUTES.names():
        if name != "gone":
            assert ROUTES.find_plan(name)


def test_the_openai_shape_has_created_in_seconds():
    listed = R.list_models(ROUTES, False)
    assert listed["object"] == "list"
    for entry in listed["data"]:
        assert set(entry) == {"id", "object", "created", "owned_by"}
        assert entry["object"] == "model"
        assert 1e9 < entry["created"] < 1e10
    assert R.model_entry("Alpha/m1", False) in listed["data"]


def test_the_anthropic_shape_has_names_dates_and_pages():
    listed = R.list_models(ROUTES, True)
    names = ROUTES.names()
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (names[0], names[-1], False)
    for entry in listed["data"]:
        assert set(entry) == {"type", "id", "display_name", "created_at", "lifecycle"}
        assert entry["type"] == "model"
        assert entry["created_at"].endswith("Z")


@pytest.mark.parametrize("anthropic", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_pages_hold_every_name_once(anthropic, limit):
    seen, after = [], ""
    for _ in range(100):
        page = R.list_models(ROUTES, anthropic, after, limit)
        assert len(page["data"]) <= limit
        seen += [entry["id"] for entry in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == ROUTES.names()


def test_an_empty_page_has_no_edges():
    listed = R.list_models(R.Routes(R.Config()), True)
    assert (listed["data"], listed["first_id"], listed["last_id"], listed["has_more"]) == ([], None, None, False)


# ---- size


class Counting(dict):
    """A dict that counts its look-ups and forbids a walk over its items."""

    count = 0

    def get(self, key, default=None):
        Counting.count += 1
        return super().get(key, default)

    def __getitem__(self, key):
        Counting.count += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        Counting.count += 1
        return super().__contains__(key)

    def __iter__(self):
        raise AssertionError("walked over")

    keys = values = items = __iter__


def lookups(size):
    providers = {"p%d" % i: ["m%d-%d" % (i, j) for j in range(10)] for i in range(size)}
    aliases = {"alias%d" % i: "p%d/m%d-1" % (i, i) for i in range(size)}
    routes = R.Routes(config(providers, dict(aliases, **{"claude-*": "p0/m0-1"}), default="p1/m1-1"))
    wrapped = 0
    for owner in (routes, *vars(routes).values()):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if isinstance(value, dict):
                setattr(owner, name, Counting(value))
                wrapped += 1
    routes.config = routes.config._replace(aliases=Counting(routes.config.aliases))
    assert wrapped >= 2
    counts = []
    for asked in ("p3/m3-4", "m4-4", "alias3", "claude-x", "smart", "p3/m3-4[1m]"):
        Counting.count = 0
        assert routes.find_plan(asked)
        counts.append(Counting.count)
    return counts


def test_a_look_up_costs_the_same_in_a_big_configuration():
    assert lookups(5) == lookups(1000)
    assert 2 <= max(lookups(5)) < 20
