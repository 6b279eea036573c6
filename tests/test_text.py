"""TEXT AND HEADERS and ERRORS: small readers of foreign text."""

import pytest

import llm_router as R

ODD_JSON = [
    b"",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1e400",
    b'"\xff\xfe"',
    '{"a":1}'.encode("utf-16"),
    b'{"a":1} x',
    b"{'a':1}",
]


@pytest.mark.parametrize("data", ODD_JSON, ids=[repr(data[:8]) for data in ODD_JSON])
def test_odd_json_is_a_400_and_nothing_else(data):
    """Incident: huge integers and nesting (CVE-2020-10735)."""
    with pytest.raises(R.RouterError) as caught:
        R.load_json(data)
    assert caught.value.status == 400


def test_nesting_is_counted_outside_of_strings_only():
    flat = b'{"a": ["[[{{", "\\"[{", "\\\\", {"b": []}]}'
    assert not R.nests_too_deep(b"[" + b",".join([flat] * 2000) + b"]")
    for least in (b"[" * 2001, b'{"]":' * 2001, b"[%s," % flat * 2001, b"[[]," * 2001):
        assert R.nests_too_deep(least)
    for most in (b"[" * 2000 + b'"' + b"[" * 2000, b"[]" * 5000, b'["\\"[[[[[[[[[["],' * 500, b'"' + b"[" * 3000):
        assert not R.nests_too_deep(most)


def test_json_with_a_byte_order_mark_and_lone_surrogates_passes():
    assert R.load_json(b"\xef\xbb\xbf{}") == {}
    value = R.load_json(b'"\\ud800"')
    assert R.load_json(R.dump_json(value)) == value


def test_a_masked_secret_cannot_be_used():
    secret = "sk-proj-0123456789abcdef"
    assert R.mask(secret) == "sk-...cdef"
    assert R.mask("short-key") == "***" and R.mask("") == ""


def test_one_request_is_one_log_line():
    """Log injection: CR, LF, ESC and other controls."""
    shown = R.one_line("a\r\nb\x1b[31m\u2028c\x00" + "x" * 1000, 50)
    assert shown.isprintable() and len(shown) < 120 and "\\n" in shown and shown.endswith("...")


def test_values_are_told_apart_by_type():
    assert R.Text("a") == R.Text("a") != R.Refusal("a")
    assert R.Text("a") != R.Text("b")
    assert R.Closed() == R.Closed() != R.Ping()
    assert R.Closed() and repr(R.Delta("x")) == "Delta('x')"


@pytest.mark.parametrize("value", [True, -1, "7", None, float("nan"), float("inf"), [1]])
def test_only_whole_numbers_count(value):
    assert R.as_int(value) == 0


def test_a_header_is_found_and_a_missing_one_has_a_default():
    headers = [("a", "1"), ("b", "2"), ("a", "3")]
    assert R.header(headers, "a") == "1" and R.header(headers, "c") == "" and R.header(headers, "c", "x") == "x"


def test_the_nearest_names_come_first():
    assert R.did_you_mean("gpt-4", ["claude", "gpt-4o", "gpt-3"], "") == "did you mean gpt-4o?"
    assert R.did_you_mean("gpt-4", ["claude", "gpt-3", "gpt-4o"], "", 2) == "did you mean gpt-4o or gpt-3?"
    assert R.did_you_mean("zzz", ["claude"], "look") == "look"


def test_what_is_printed_keeps_its_lines_and_no_other_control():
    assert R.printable("a\nb\x1b[2J\r\u202e\x07é") == "a\nb\\x1b[2J\\r\\u202e\\x07é"


def test_a_wrong_name_is_compared_with_the_likeliest_of_very_many_only(monkeypatch):
    """Every unknown model that a client names asks this question, on the thread that serves all of them."""
    import difflib

    close, compared = difflib.get_close_matches, []
    monkeypatch.setattr(difflib, "get_close_matches", lambda w, known, *more: compared.extend(known) or close(w, known, *more))
    known = ["open/claude-%05d" % i for i in range(10_000)] + ["other/gpt-4o-mini"]
    assert R.did_you_mean("other/gtp-4o-mini", known, "") == "did you mean other/gpt-4o-mini?"
    assert len(compared) <= 500
