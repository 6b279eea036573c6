"""SETTINGS: one row per knob, flag before environment before default."""

import pytest

import llm_router as r

NUMBERS = [row for row in r.SETTINGS if type(row.default) is int]
BOOLS = [row for row in r.SETTINGS if type(row.default) is bool]


def test_the_defaults_are_those_of_the_rows():
    settings, warnings = r.read_settings({}, {})
    assert warnings == []
    assert settings == r.Settings()
    assert settings._asdict() == {row.name: row.default for row in r.SETTINGS}


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("host", "127.0.0.1"),
        ("port", 8787),
        ("origin_retry_attempts", 3),
        ("origin_retry_base_delay_ms", 250),
        ("origin_retry_max_delay_ms", 3000),
        ("origin_fallback_cooldown_ms", 45000),
        ("origin_rate_limit_cooldown_ms", 30000),
        ("origin_billing_cooldown_ms", 900000),
        ("origin_auth_cooldown_ms", 600000),
        ("origin_policy_cooldown_ms", 120000),
        ("allow_policy_fallback", False),
        ("fallback_circuit_failures", 2),
        ("fallback_circuit_cooldown_ms", 30000),
        ("retry_after_wait_ms", 0),
        ("keepalive_ms", 10000),
        ("max_body_bytes", 64 * 1024 * 1024),
        ("max_hold_bytes", 256 * 1024),
        ("count_tokens_timeout_ms", 3000),
    ],
)
def test_the_promised_default_of_each_documented_setting_holds(name, default):
    assert getattr(r.Settings(), name) == default


def test_variable_and_flag_derive_from_the_name():
    row = next(row for row in r.SETTINGS if row.name == "origin_retry_attempts")
    assert row.variable == "LLM_ROUTER_ORIGIN_RETRY_ATTEMPTS"
    assert row.flag == "--origin-retry-attempts"


def test_names_are_unique_and_every_default_is_of_its_type_and_within_its_limits():
    assert len({row.name for row in r.SETTINGS}) == len(r.SETTINGS)
    for row in r.SETTINGS:
        assert type(row.default) in (int, bool, str)
        assert row.help
        if type(row.default) is int:
            assert row.low <= row.default <= row.high


def test_a_flag_goes_before_the_environment_and_that_before_the_default():
    environ = {"LLM_ROUTER_TRAIL_SIZE": "20", "LLM_ROUTER_POOL_SIZE": "7"}
    settings, warnings = r.read_settings({"trail_size": "10"}, environ)
    assert (settings.trail_size, settings.pool_size, settings.dial_threads) == (10, 7, 48)
    assert warnings == []


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
@pytest.mark.parametrize("text", ["abc", "1.5", "1e3", "0x10", "1_000", "٣", "9" * 400, "-", "12 34", "nan"])
def test_what_is_no_whole_number_means_the_default_and_a_warning_that_names_the_variable(row, text):
    settings, warnings = r.read_settings({}, {row.variable: text})
    assert getattr(settings, row.name) == row.default
    assert len(warnings) == 1
    assert row.variable in warnings[0]


@pytest.mark.parametrize("row", [row for row in NUMBERS if not row.clamp], ids=lambda row: row.name)
def test_a_number_outside_the_limits_means_the_default_and_a_warning(row):
    for value in (row.low - 1, row.high + 1):
        settings, warnings = r.read_settings({}, {row.variable: str(value)})
        assert getattr(settings, row.name) == row.default
        assert len(warnings) == 1
        assert row.variable in warnings[0]


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_the_limits_themselves_are_allowed(row):
    for value in (row.low, row.high):
        settings, warnings = r.read_settings({row.name: " %d " % value}, {})
        assert getattr(settings, row.name) == value
        assert warnings == []


@pytest.mark.parametrize(("text", "attempts"), [("0", 1), ("-5", 1), ("11", 10), ("99999", 10)])
def test_retry_attempts_are_clamped_to_1_to_10_with_a_warning(text, attempts):
    settings, warnings = r.read_settings({}, {"LLM_ROUTER_ORIGIN_RETRY_ATTEMPTS": text})
    assert settings.origin_retry_attempts == attempts
    assert "using %d" % attempts in warnings[0]


def test_an_unusable_flag_is_named_as_the_flag():
    settings, warnings = r.read_settings({"trail_size": "x"}, {"LLM_ROUTER_TRAIL_SIZE": "7"})
    assert settings.trail_size == 500
    assert warnings[0].startswith("--trail-size:")


def test_an_empty_flag_is_what_the_default_is_where_that_is_empty_too():
    assert r.read_settings({"log_file": "", "usage_db": ""}, {}) == (r.Settings(usage_db="off"), [])


def test_an_empty_variable_counts_as_unset():
    assert r.read_settings({}, {"LLM_ROUTER_TRAIL_SIZE": ""}) == (r.Settings(), [])


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ("1", "true", "yes", "on", "TRUE", "Yes", " on ")]
    + [(t, False) for t in ("0", "false", "no", "off", "FALSE", "No", "oFF")],
)
def test_booleans_are_read_in_any_case(text, value):
    assert r.parse_bool(text) is value
    for row in BOOLS:
        assert getattr(r.read_settings({}, {row.variable: text})[0], row.name) is value


@pytest.mark.parametrize("text", ["", "2", "tru", "ja", "\x00", "true false"])
def test_what_is_no_boolean_is_refused(text):
    with pytest.raises(r.UsageError):
        r.parse_bool(text)


def test_a_warning_is_one_line_whatever_the_value_holds():
    _, warnings = r.read_settings({}, {"LLM_ROUTER_PORT": "80\n\x1b[31m" + "x" * 5000})
    assert len(warnings) == 1
    assert warnings[0].isprintable()
    assert len(warnings[0]) < 200


def test_the_table_has_a_row_per_setting_with_the_present_value():
    rows = r.settings_table(r.Settings(port=1))
    assert [row["variable"] for row in rows] == [row.variable for row in r.SETTINGS]
    port = next(row for row in rows if row["variable"] == "LLM_ROUTER_PORT")
    assert (port["flag"], port["default"], port["value"]) == ("--port", 8787, 1)
