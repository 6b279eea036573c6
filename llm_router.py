#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""llm-router: one local endpoint for every AI provider, in OpenAI and Anthropic format.

Clients (Claude Code, Codex, the OpenAI and Anthropic SDKs, any agent) point at it; it picks a provider from
~/.llm-router.json, translates where the wire formats differ, retries and falls back by what the upstream's answer
means, and streams the result back without damaging it. `python3 llm_router.py demo` shows it at work; README.md says
the rest.

The walk of a request: bytes -> HttpRequest (HTTP) -> Endpoint, Inbound (INBOUND) -> Plan of candidates (ROUTING) -> Run
and action (FALLBACK) -> Outbound (OUTBOUND) -> Reply (UPSTREAM) -> Outcome or Answer (OUTCOMES, GATEWAY) -> ... until
there is an answer -> stream processor or translated body (TRANSLATION) -> bytes (SERVER). Only the loop in GATEWAY
and the hosts touch the world; all above them is values and functions. A section uses names from itself and from those
above it only.

Contents:
   1  ERRORS                the one family of errors every parser and decision may raise [pure]
   2  TEXT AND HEADERS      header access, masking, small readers of foreign text [pure]
   3  SETTINGS              one row per knob: name, default, limits, variable, flag [pure]
   4  CONFIG                the configuration file as values, and every problem with its path [pure]
   5  EDITS                 changes to a configuration, shared by commands and menu [pure]
   6  SSE                   bytes to server-sent events and back, incrementally [pure]
   7  HTTP                  HTTP/1.1 messages: bytes to requests and answers, answers to bytes [pure]
   8  NEUTRAL FORM          what a chat request, answer and stream mean in any wire format [pure]
   9  OPENAI CHAT           Chat Completions: requests, answers, streams, errors [pure]
  10  ANTHROPIC MESSAGES    Messages API: requests, answers, streams, errors [pure]
  11  OPENAI RESPONSES      Responses API: requests, answers, streams, errors [pure]
  12  TRANSLATION           the table of wire formats, and streams from one to another [pure]
  13  COMPATIBILITY         what a given upstream refuses or needs, and lessons from a 400 [pure]
  14  INBOUND               paths, who may call, and what a request asks for [pure]
  15  ROUTING               a model's name becomes an ordered list of candidates [pure]
  16  OUTBOUND              a candidate and a request become an upstream request [pure]
  17  OUTCOMES              status, headers and body of an upstream's answer: what they mean [pure]
  18  FALLBACK              what to do next after each outcome, clock and dice passed in [pure]
  19  SCREENS               the menu as values: what it shows, and what each key does [pure]
  20  VIEW                  the menu as lines of styled text, for any size of a terminal [pure]
  21  GATEWAY               one request from its head to its end, through injected effects [async]
  22  PROBE                 which formats, auth styles and models a provider really serves [async]
  23  FILES                 configuration and state on disk: atomic, private, locked [host]
  24  UPSTREAM              threads dial, the loop talks: connections, their pool, replies [host]
  25  SERVER                client connections on asyncio streams: one request after another [host]
  26  METRICS AND TRAIL     one line a request, written where it can block nobody [host]
  27  LEDGER                what every request used and cost, in SQLite, off the hot path [host]
  28  WORKER                the same gateway on Cloudflare, its effects from JavaScript [host]
  29  PROCESS               the running server: its effects, signals, start and end [host]
  30  UPDATE                this very file replaced by a newer release [host]
  31  SERVICES              start with the machine: launchd, systemd, Windows tasks [host]
  32  DEPLOY                this file as a Cloudflare Worker: what is sent, and by whom [host]
  33  DEMO                  fake providers, the router before them, and every kind of request [host]
  34  DOCTOR                what is wrong on this machine, and the cure [host]
  35  AGENTS                coding agents run against the router, their files untouched [host]
  36  TERMINAL              the menu in a real terminal: curses, or numbered prompts [host]
  37  COMMANDS              flags, help and what each command does [host]
  38  MAIN                  the only exit [host]
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import math
import os
import re
import sys
import time
import zlib
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque, namedtuple
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import accumulate, chain, product
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union
from urllib.parse import parse_qsl, quote, unquote, urlsplit

__version__ = "0.1.0"

__all__ = [
    "WIRE_FORMATS",
    "Access",
    "Config",
    "Gateway",
    "HealthBook",
    "RouterError",
    "Routes",
    "Settings",
    "entry",
    "find_problems",
    "main",
    "make_processor",
    "parse_config_text",
    "read_config",
    "read_settings",
    "translate_request",
    "translate_response",
]


# ==============================================================================
# 1 ERRORS - the one family of errors every parser and decision may raise [pure]
# ==============================================================================


class RouterError(Exception):
    """Something the router refuses or cannot do.

    message: one sentence for a person. status: the HTTP status it has when a client must see it.
    code: a stable machine word, the `code` of OpenAI's error object (`model_not_found`, ...).
    """

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code


class UsageError(RouterError):
    """Wrong flags or an unusable configuration: the program ends with exit code 2."""


class ConfigError(UsageError):
    """A configuration that cannot be used; `problems` lists every Problem found in it."""

    def __init__(self, message: str, problems: Sequence[Any] = ()) -> None:
        super().__init__(message, 503, "configuration_error")
        self.problems = tuple(problems)


class UpstreamError(RouterError):
    """An upstream that could not be asked or did not answer as HTTP demands.

    label: one word for logs and headers (`refused`, `reset`, `tls`, `timeout`, ...). is_timeout: it was too slow.
    """

    def __init__(self, message: str, label: str, is_timeout: bool = False) -> None:
        super().__init__(message, 504 if is_timeout else 502, "upstream_timeout" if is_timeout else "upstream_error")
        self.label = label
        self.is_timeout = is_timeout


# ==============================================================================
# 2 TEXT AND HEADERS - header access, masking, small readers of foreign text [pure]
# ==============================================================================

Headers = List[Tuple[str, str]]
Json = Dict[str, Any]  # a JSON object
Texts = Tuple[str, ...]
Environ = Mapping[str, str]  # variables of a process


class Value:
    """Base of small values that are told apart by type: equal when type and every field are equal.

    Not a NamedTuple: two NamedTuples with equal fields compare equal whatever their types, and an
    empty one is falsy. Subclasses name their fields in `__slots__`, which are also the arguments, and in `defaults`
    the values of the last ones, which may be left out; treat instances as immutable.
    """

    __slots__ = ()
    defaults: Tuple[Any, ...] = ()

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__slots__
        if named:
            named = {**dict(zip(names[::-1], self.defaults[::-1])), **named}
            values += tuple(named[name] for name in names[len(values) :])
        elif len(values) < len(names):
            values += self.defaults[len(values) - len(names) :]
        for name, value in zip(names, values):
            setattr(self, name, value)

    def _fields(self) -> Tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def _replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, as of a NamedTuple."""
        return type(self)(*(changes[name] if name in changes else getattr(self, name) for name in self.__slots__))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._fields() == other._fields()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self).__name__, repr(self._fields())))

    def __repr__(self) -> str:
        return "%s(%s)" % (type(self).__name__, ", ".join(map(repr, self._fields())))


def header(headers: Iterable[Tuple[str, str]], name: str, default: str = "") -> str:
    """The first value of the header `name`, or `default`. Names are lower-case everywhere: hosts hand them over so."""
    for key, value in headers:
        if key == name:
            return value
    return default


def mask(secret: str) -> str:
    """A secret as it may be shown: enough to recognise it, too little to use it."""
    if not secret:
        return ""
    return secret[:3] + "..." + secret[-4:] if len(secret) >= 16 else "***"


def mask_in(text: str, secrets: Sequence[str]) -> str:
    """`text` with each secret that stands in it masked. Secrets of less than 6 characters are words, not keys."""
    for secret in secrets:
        text = text.replace(secret, mask(secret)) if len(secret) >= 6 else text
    return text


def one_line(text: str, limit: int = 300) -> str:
    """`text` safe for one log line: controls escaped (CR, LF, ESC cannot forge a line), cut at `limit`."""
    clean = text[: limit + 1]
    clean = clean if clean.isprintable() else printable(clean, "")
    return clean if len(text) <= limit else clean[:limit] + "..."


def printable(text: str, breaks: str = "\n") -> str:
    """`text` safe for a terminal: line breaks stay, every other control is escaped."""
    return "".join(c if c.isprintable() or c in breaks else repr(c)[1:-1] for c in text)


def load_json(data: Union[bytes, str], what: str = "body") -> Any:
    """Parse JSON text from outside. RouterError (400) for anything that is not JSON, however odd.

    RFC 8259: UTF-8, a BOM is tolerated; NaN and Infinity are not JSON; nesting deep enough to exhaust
    the recursion limit, integers of thousands of digits and what is infinite as a float (1e999) are refused like any
    other syntax error.
    """
    try:
        return _JSON_DECODER.decode(_decoded(data) if isinstance(data, (bytes, bytearray)) else data)
    except (ValueError, RecursionError) as error:
        words = what, one_line(str(error), 120)
        raise RouterError("the %s is not valid JSON: %s" % words, 400, "invalid_json") from None


def try_json(data: Union[bytes, str]) -> Any:
    """What JSON text from outside says, None for what is no JSON."""
    with suppress(RouterError):
        return load_json(data)
    return None


def _decoded(data: bytes) -> str:
    """UTF-8 without its byte order mark, which the codec utf-8-sig drops eight times slower."""
    return str(data[3:] if data.startswith(b"\xef\xbb\xbf") else data, "utf-8")


def _refuse_constant(name: str) -> Any:
    raise ValueError("%s is not JSON" % name)


def _read_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("%s is too large a number" % one_line(text, 40))
    return number


class _Decoder(json.JSONDecoder):
    def decode(self, s: str, *more: Any) -> Any:  # type: ignore[override]
        if len(s) > _MAX_NESTING and nests_too_deep(s.encode("utf-8", "surrogatepass")):
            raise ValueError("nested deeper than %d levels" % _MAX_NESTING)
        text = s.strip(" \t\n\r")
        try:
            value, end = self.scan_once(text, 0)  # type: ignore[attr-defined]
        except StopIteration:
            end = -1
        return value if end == len(text) else super().decode(s, *more)  # which tells what is wrong, and where


_JSON_DECODER = _Decoder(parse_constant=_refuse_constant, parse_float=_read_float)  # json.loads would make one per call
_MAX_NESTING = 2000  # three thousand are too much for V8; an agent's long request has fewer brackets in all
_NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))


def nests_too_deep(data: bytes, limit: int = _MAX_NESTING) -> bool:
    """Whether JSON has more levels than that. Where Python cannot tell how much of the stack is left, as in a Worker,
    parsing would exhaust it and end the whole isolate."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    depths = accumulate(1 if mark in b"[{" else -1 for mark in b"".join(marks.split(b'"')[::2]))
    return max(depths, default=0) > limit


def dump_json(value: Any) -> bytes:
    """Compact JSON bytes, ASCII only: safe whatever lone surrogates a client's strings hold."""
    return _JSON_ENCODER.encode(value).encode("ascii")


_JSON_ENCODER = json.JSONEncoder(separators=(",", ":"))


def as_dict(value: Any) -> Json:
    """`value` when it is a JSON object, else an empty one: foreign answers are read without trust."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> List[Any]:
    """`value` when it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """`value` when it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def as_int(value: Any) -> int:
    """A number of at least 0 without its fraction, 0 for anything else (a boolean is none); 2**53 for more, which is a
    lie."""
    if type(value) is float and math.isfinite(value):
        value = int(value)
    return min(value, 2**53) if type(value) is int and value > 0 else 0


def get_text(item: Json, key: str) -> str:
    """as_text of a member."""
    value = item.get(key)
    return value if isinstance(value, str) else ""


def get_dict(item: Json, key: str) -> Json:
    """as_dict of a member."""
    value = item.get(key)
    return value if isinstance(value, dict) else {}


def get_list(item: Json, key: str) -> List[Any]:
    """as_list of a member."""
    value = item.get(key)
    return value if isinstance(value, list) else []


def did_you_mean(name: str, known: Iterable[str], otherwise: str, count: int = 1) -> str:
    """The question for up to `count` of the `known` words that look most like `name`; `otherwise` when none does."""
    import difflib  # costs milliseconds and is only needed once something went wrong

    parts = [name[at : at + 4] for at in range(0, min(len(name), 80), 4)]
    likely = sorted(known, key=lambda word: -sum(part in word for part in parts))[:500]  # each takes a tenth of a ms
    near = difflib.get_close_matches(name, likely, count, 0.5)
    return "did you mean %s?" % " or ".join(map(one_line, near)) if near else otherwise


# ==============================================================================
# 3 SETTINGS - one row per knob: name, default, limits, variable, flag [pure]
# ==============================================================================

_MOST = 86_400_000  # a day in milliseconds; more than any count needs
_MOST_BYTES = 2**40
LOG_LEVELS = ("info", "warning", "error", "silent")  # warning: requests that failed, too


class Setting(NamedTuple):
    """One knob; its default's type (int, bool or str) is its own. low, high: the numbers allowed. clamp: a number
    outside becomes the nearest limit, where others become the default. choices: the words allowed, () for any. blank:
    what an empty text stands for, "" where it counts as none."""

    name: str
    default: Any
    help: str
    low: int = 0
    high: int = _MOST
    clamp: bool = False
    choices: Texts = ()
    blank: str = ""

    @property
    def variable(self) -> str:
        """Its environment variable, `LLM_ROUTER_` and the name in capitals."""
        return "LLM_ROUTER_" + self.name.upper()

    @property
    def flag(self) -> str:
        """Its flag of `start`, `--` and the name with dashes."""
        return "--" + self.name.replace("_", "-")


SETTINGS: Tuple[Setting, ...] = (
    Setting("host", "127.0.0.1", "address to listen on"),
    Setting("port", 8787, "port to listen on; 0 picks a free one", 0, 65535),
    Setting("origin_retry_attempts", 3, "attempts at the origin before falling back", 1, 10, clamp=True),
    Setting("origin_retry_base_delay_ms", 250, "delay before the first retry, doubled for each further one"),
    Setting("origin_retry_max_delay_ms", 3000, "longest delay between retries"),
    Setting("origin_fallback_cooldown_ms", 45000, "cooldown after a temporary failure that led to a fallback"),
    Setting("origin_rate_limit_cooldown_ms", 30000, "cooldown after a rate limit without Retry-After"),
    Setting("origin_billing_cooldown_ms", 900000, "cooldown of a provider whose credit is used up"),
    Setting("origin_auth_cooldown_ms", 600000, "cooldown of a provider that refuses its key"),
    Setting("origin_policy_cooldown_ms", 120000, "cooldown after a policy block, where policy fallback is allowed"),
    Setting("allow_policy_fallback", False, "let policy-blocked requests go to other providers"),
    Setting("fallback_circuit_failures", 2, "failed requests in a row that open a model's circuit; 0: no circuit"),
    Setting("fallback_circuit_cooldown_ms", 30000, "how long a circuit stays open; 0: no circuit"),
    Setting("retry_after_wait_ms", 0, "longest wait for a cooling candidate when no other is left"),
    Setting("context_fallback", False, "try candidates of a larger contextWindow when the context is too long"),
    Setting("connect_timeout_ms", 10000, "connecting to a provider, TLS included; 0: off"),
    Setting("first_byte_timeout_ms", 120000, "first byte of a streamed answer; 0: off"),
    Setting("whole_first_byte_timeout_ms", 600000, "first byte of an answer that is not streamed; 0: off"),
    Setting("first_content_timeout_ms", 0, "first content of a streamed answer; 0: off"),
    Setting("idle_timeout_ms", 120000, "silence between two reads of an answer; 0: off"),
    Setting("total_timeout_ms", 0, "a whole answer; 0: off"),
    Setting("keepalive_ms", 10000, "silence after which a waiting stream gets a comment; 0: off"),
    Setting("max_body_bytes", 67_108_864, "largest request body, inflated", 1, _MOST_BYTES),
    Setting("max_inflight_bytes", 536_870_912, "request bodies in memory, all together", 1, _MOST_BYTES),
    Setting("max_hold_bytes", 262_144, "bytes of a stream held back before its first content", 1, _MOST_BYTES),
    Setting("max_event_bytes", 67_108_864, "largest single event of a stream", 1, _MOST_BYTES),
    Setting("max_answer_bytes", 268_435_456, "largest answer that is not streamed", 1, _MOST_BYTES),
    Setting("max_connections", 4096, "client connections at once", 1),
    Setting("max_connections_per_peer", 2048, "client connections at once from one address; 0: no limit"),
    Setting("head_timeout_ms", 15000, "a request's head, from its first byte to its last"),
    Setting("body_timeout_ms", 30000, "a request's body, and a second more for each KiB; silence in it"),
    Setting("client_idle_timeout_ms", 75000, "how long an idle client connection is kept"),
    Setting("send_timeout_ms", 60000, "how long a client may take nothing of its answer; a slow one has time"),
    Setting("pool_idle_ms", 30000, "how long an idle connection to a provider is kept"),
    Setting("pool_size", 128, "idle connections kept per provider; 0: none"),
    Setting("dial_threads", 48, "connections being opened at once", 1),
    Setting("dial_threads_per_upstream", 16, "connections being opened at once to one provider", 1),
    Setting("drain_grace_ms", 30000, "how long open streams may go on after stop"),
    Setting("ca_bundle", "", "file of certificates (PEM) to trust in place of the system's"),
    Setting("log_format", "text", "text, or json for one object a line", choices=("text", "json")),
    Setting("log_level", "info", "least level that is logged: info, warning, error, silent", choices=LOG_LEVELS),
    Setting("log_file", "", "file for the log, in place of stderr; moved to FILE.1 when it is full"),
    Setting("log_max_bytes", 10_000_000, "size at which the log file is moved to FILE.1; 0: never"),
    Setting("usage_db", "~/.llm-router.usage.db", "the usage ledger's file; off or empty: none", blank="off"),
    Setting("usage_max_bytes", 100_000_000, "size at which the oldest rows leave the ledger", 1_000_000, _MOST_BYTES),
    Setting("usage_max_days", 90, "age at which rows leave the ledger; 0: never"),
    Setting("trail_size", 500, "requests that explain can still show"),
    Setting("count_tokens_timeout_ms", 3000, "forwarded count_tokens, before the local estimate answers"),
)

Settings = namedtuple("Settings", [row.name for row in SETTINGS], defaults=[row.default for row in SETTINGS])
Settings.__doc__ = "The value of every row of SETTINGS, by its name; `Settings()` holds the defaults."

_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def parse_bool(text: str) -> bool:
    """A flag's or variable's boolean: 1 0 true false yes no on off, any case. UsageError for anything else."""
    value = _BOOLS.get(text.strip().lower())
    if value is None:
        raise UsageError("%s is not a boolean: use true or false" % (one_line(text, 40) or "an empty value"))
    return value


def read_settings(flags: Mapping[str, str], environ: Environ) -> Tuple[Settings, List[str]]:
    """The settings and what to warn about. flags: {"trail_size": "10"}, by setting name.

    A flag goes before the environment, that before the default; an empty variable counts as unset. An unusable value
    means the default (the nearest limit where the row says clamp) and a warning that names where it came from.
    """
    values, warnings = {}, []
    for row in SETTINGS:
        source, text = (row.flag, flags[row.name]) if row.name in flags else (row.variable, environ.get(row.variable))
        if text or row.name in flags or (row.blank and text is not None):
            values[row.name], complaint = _read_setting(row, (text or row.blank).strip())
            if complaint:
                warnings.append("%s: %s; using %s" % (source, complaint, show_setting(values[row.name])))
    return Settings(**values), warnings


def _read_setting(row: Setting, text: str) -> Tuple[Any, str]:
    """The value to use, and what is wrong with the one that was given ("" when nothing is)."""
    shown = one_line(text, 40) or "an empty value"
    if type(row.default) is int:
        if not re.fullmatch("[+-]?[0-9]{1,15}", text):
            return row.default, shown + " is not a whole number"
        number = min(max(int(text), row.low), row.high)
        if number == int(text):
            return number, ""
        return number if row.clamp else row.default, "%d is outside %d to %d" % (int(text), row.low, row.high)
    words = _BOOLS if type(row.default) is bool else {word: word for word in row.choices}
    if not words:
        return (text, "") if text or not row.default else (row.default, shown)
    if text.lower() in words:
        return words[text.lower()], ""
    return row.default, "%s is none of %s" % (shown, ", ".join(words))


def show_setting(value: Any) -> str:
    """A setting's value as it is written in a flag or variable."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings_table(settings: Settings) -> List[Json]:
    """The settings as rows for people and for --json: variable, flag, default, value, help."""
    names = ("variable", "flag", "default", "help")
    return [dict({name: getattr(row, name) for name in names}, value=getattr(settings, row.name)) for row in SETTINGS]


# ==============================================================================
# 4 CONFIG - the configuration file as values, and every problem with its path [pure]
# ==============================================================================

WIRES = ("openai", "anthropic", "responses")
AUTH_TYPES = ("bearer", "x-api-key", "header", "none")

# Other names of a wire format that older files use.
_WIRE_ALIASES = {"claude": "anthropic"}


class Problem(NamedTuple):
    """Something wrong in a configuration. path: `providers[0].models[1].fallbackModels[0]`, "" for the whole.
    level: "error" (it cannot be used) or "warning". line, column: where in the text, from 1, 0 when that is unknown."""

    path: str
    message: str
    cure: str
    level: str = "error"
    line: int = 0
    column: int = 0


class Field(NamedTuple):
    """One key of the file. kind: what it holds, a row of _FIELD_KINDS or FIELDS, or url or providers; [kind]: a list
    of them, or one text in place of it; {kind:kind}: an object. aliases: other spellings that older files use,
    beside the dashed and snake-case twins."""

    key: str
    kind: str
    help: str
    aliases: Texts = ()


def _read_table(table: str) -> Tuple[Field, ...]:
    """Rows of a field's key, with its aliases behind commas, its kind and its help."""
    fields = []
    for line in table.strip().split("\n"):
        names, kind, help = line.split(None, 2)
        key, *aliases = names.split(",")
        fields.append(Field(key, kind, help, tuple(aliases)))
    return tuple(fields)


FIELDS: Dict[str, Tuple[Field, ...]] = {
    "config": _read_table("""
        $schema       text              where editors find the schema of this file, see config --operation=schema
        version       whole             version of the file's shape, 1
        masterKey     secret            the key that clients show to the router
        clientKeys    [client_key]      further keys, each with the name of its client and the key's SHA-256
        defaultModel  default           the model for `smart` and for requests that name none
        modelAliases  {alias:[target]}  name, or pattern with *, to a model ref or an ordered list of them
        corsOrigins   [origin]          browser origins that may use the router
        allowedHosts  [name]            further Host names that are answered while auth is off
        providers     providers         the accounts requests may go to
        metadata      object            anything; kept, not used
    """),
    "provider": _read_table("""
        id                     provider_id         short name, the first half of `provider/model`
        name                   text                name for people
        baseUrl,endpoint       url                 where the provider's API is
        baseUrlByFormat,endpointByFormat,endpoints  {wire:url}  a base URL of its own per format
        formats                [wire]              wire formats the provider speaks: openai, anthropic, responses
        apiKeyEnv              variable            environment variable that holds the key; wins when it is set
        apiKey,credential      secret              the key the router shows to the provider
        models                 [model]             its models; * passes any id through
        enabled                flag                false keeps the entry and does not use it
        format,responseFormat  wire                the preferred one of its formats
        auth                   auth                how the key is shown
        authByFormat           {wire:auth}         how the key is shown per wire format, where they differ
        headers                {header_name:header}  headers for every request; null removes one
        anthropicVersion       header              the anthropic-version header
        anthropicBeta          [beta]              anthropic-beta features to ask for
        compat                 any                 whose needs it has beside the format, where its URL does not tell
        timeouts               timeouts            limits of its own in milliseconds
        proxy                  proxy               its own HTTP proxy, http://HOST:PORT, or none for a direct connection
        caBundle               text                file of certificates (PEM) to trust for it
        metadata               object              anything; kept, not used
    """),
    "model": _read_table("""
        id               model_id    the provider's own name of the model; * for any
        aliases,alias    [name]      further names
        formats,format   [wire]      wire formats of this model, when not all of the provider's
        enabled          flag        false keeps the entry and does not use it
        contextWindow    whole       tokens that input and output may have together
        maxOutputTokens  whole       tokens that an answer may have; a translated request asks for no more
        cost             object      US dollars per million tokens: input, output, cacheRead, cacheWrite
        metadata         object      anything; kept, not used
        fallbackModels,fallbacks,silentFallbacks  [fallback]  what to try when it fails, in order
    """),
    "auth": _read_table("""
        type,kind          auth_type    bearer, x-api-key, header or none
        headerName,header  header_name  the header, for the type header
        prefix             prefix       what stands before the key in that header
    """),
    "client_key": _read_table("""
        name    name    the client's name, shown in the log
        sha256  sha256  the key's SHA-256 in hexadecimal digits, made by config --operation=add-client-key
    """),
    "timeouts": _read_table("""
        connectMs       whole  connecting
        firstByteMs     whole  first byte of the answer
        firstContentMs  whole  first content of a stream
        idleMs          whole  silence between two reads
        totalMs         whole  the whole answer
    """),
}


def _snake(name: str) -> str:
    return re.sub("[A-Z]", lambda match: "_" + match.group().lower(), name)


def _record(name: str, kind: str, about: str, **defaults: Any) -> Any:
    """A NamedTuple with the fields of a kind. What nobody said, and no default says, is as empty as its kind allows."""
    empty = {"flag": True, "whole": None, "object": None}
    unsaid = {_snake(row.key): () if row.kind[0] == "[" else empty.get(row.kind, "") for row in FIELDS[kind]}
    made = namedtuple(name, unsaid, defaults={**unsaid, **defaults}.values())
    made.__doc__ = about
    return made


Auth = _record(
    "Auth", "auth", "How a provider is shown its key. header_name, prefix: for the type header.", type="bearer"
)
Timeouts = _record("Timeouts", "timeouts", "A provider's own limits in milliseconds; 0 is off, None means the setting.")
Model = _record("Model", "model", "A model of a provider. formats: () means the provider's.")
ClientKey = _record("ClientKey", "client_key", "A client's own key. sha256: the lower-case hex digest of the key.")

# How the wire formats' own providers are shown a key.
USUAL_AUTHS = {"openai": Auth(), "anthropic": Auth("x-api-key"), "responses": Auth()}


class Provider(NamedTuple):
    """A configured account. base_urls, auths: by wire format. preferred: the one of `formats` to speak when the
    client's own is not among them. headers: a None removes the header. compat: as configured, None when unsaid.
    proxy: "none" for a direct connection, "" for the environment's. ca_bundle: a file, "" for what everybody trusts."""

    id: str
    name: str = ""
    enabled: bool = True
    base_urls: Dict[str, str] = {}
    api_key: str = ""
    formats: Texts = ("openai",)
    preferred: str = "openai"
    auths: Dict[str, Auth] = USUAL_AUTHS
    headers: Dict[str, Optional[str]] = {}
    anthropic_version: str = ""
    anthropic_beta: Texts = ()
    compat: Any = None
    timeouts: Timeouts = Timeouts()
    proxy: str = ""
    ca_bundle: str = ""
    models: Tuple[Model, ...] = ()


class Config(NamedTuple):
    """A configuration, checked and complete. aliases: name or pattern -> model refs in order."""

    master_key: str = ""
    client_keys: Tuple[ClientKey, ...] = ()
    default_model: str = ""
    aliases: Dict[str, Texts] = {}
    cors_origins: Texts = ()
    allowed_hosts: Texts = ()
    providers: Tuple[Provider, ...] = ()


# Fields that an object cannot do without; an id of a provider may stand outside of it.
_REQUIRED = {"provider": ("models",), "model": ("id",), "client_key": ("name", "sha256")}
# Lists that may not be empty: what is wrong with one, and the cure.
_NOT_EMPTY = {
    "model": ("has no models", "add at least one; * passes any id through"),
    "target": ("leads to no model", "write provider/model, or remove the alias"),
}


def _spellings(field: Field) -> Texts:
    names = [field.key, *field.aliases]
    snakes = [_snake(name) for name in names]
    return tuple(dict.fromkeys(names + [name.replace("_", "-") for name in snakes] + snakes))


# {"provider": {"baseUrl": ("baseUrl", "endpoint", ..., "base-url", "base_url")}}: first found wins.
SPELLINGS = {kind: {field.key: _spellings(field) for field in fields} for kind, fields in FIELDS.items()}
_FIELD_OF = {kind: {s: f for f in fields for s in _spellings(f)} for kind, fields in FIELDS.items()}


def find_key(raw: Json, kind: str, key: str) -> Optional[str]:
    """The spelling under which `raw` (a "config", "provider"...) holds the field `key`; None without one or a null."""
    return next((name for name in SPELLINGS[kind][key] if raw.get(name) is not None), None)


def get_field(raw: Json, kind: str, key: str) -> Any:
    """The value of a field in a raw object, whatever its spelling; None when it has none."""
    return raw.get(find_key(raw, kind, key) or key)


# ----- reading text -----

_MAX_DEPTH = 60  # far below the recursion limit, so that no walk of a document needs to fear it
# What may be a key, also where the mistake is JavaScript's: {masterKey: 'x'}; texts, as few starts need them compiled.
_MAY_BE_SECRETS = (
    r"""((?i:key|secret|token|auth|credential|password)[^"':,{}]{0,80}["']?\s*:\s*(["']))((?:\\.|(?!\2).)*)""",
    r"(())([A-Za-z0-9_+/=-]{24,}|\bsk-[A-Za-z0-9_-]+)",
)
_TYPES = {bool: "true/false", dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def parse_config_text(text: Union[str, bytes], source: str) -> Json:
    """The JSON object in `text`, which may hold // and /* comments and a comma before a closing bracket (trap 181).
    ConfigError names `source`, line and column and shows the place, keys hidden; its problem has the same apart."""
    try:
        text = plain = (text if isinstance(text, str) else str(text, "utf-8")).removeprefix("\ufeff")
        try:
            document = _JSON_DECODER.decode(text)
        except json.JSONDecodeError:
            plain = _plain_json(text)
            document = _JSON_DECODER.decode(plain)
    except UnicodeDecodeError as error:
        before = len(error.object[: error.start].decode("utf-8"))
        message = "not UTF-8 text (save the file as UTF-8)"
        raise _syntax_error(source, error.object.decode("utf-8", "replace"), before, message) from None
    except json.JSONDecodeError as error:
        raise _syntax_error(source, text, error.pos, error.msg + _hint(text, error.pos)) from None
    except (ValueError, RecursionError) as error:
        constants = (piece.start() for piece in _JSON_PIECE.finditer(_plain_json(text)) if piece.group() in _NO_JSON)
        at, words = next(constants, None), one_line(str(error), 120)
        if at is None:  # no place is better than a wrong one
            raise ConfigError("%s is not usable JSON: %s" % (source, words)) from None
        raise _syntax_error(source, text, at, words) from None
    if not isinstance(document, dict):
        raise ConfigError("%s must hold a JSON object, it holds %s" % (source, _TYPES.get(type(document), "null")))
    if nests_too_deep(plain.encode("utf-8", "surrogatepass"), _MAX_DEPTH):
        raise ConfigError("%s is nested deeper than %d levels" % (source, _MAX_DEPTH))
    return document


_COMMENTS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|(?P<extra>//[^\n]*|/\*.*?\*/)|/\*.*', re.DOTALL)
_LAST_COMMAS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[\[{]\s*,|(?P<extra>,)(?=\s*[]}])', re.DOTALL)


def has_comments(text: str) -> bool:
    """Whether a configuration's text holds comments, which would not outlive that it is written anew."""
    return any(found.group("extra") for found in _COMMENTS.finditer(text))


def _plain_json(text: str) -> str:
    """`text` with spaces in place of comments and last commas, so that every place stays what it was."""
    for pattern in (_COMMENTS, _LAST_COMMAS):
        text = pattern.sub(lambda m: re.sub(r"\S", " ", m.group()) if m.group("extra") else m.group(), text)
    return text


def _syntax_error(source: str, text: str, at: int, message: str) -> ConfigError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    shown = text.split("\n")[line - 1]
    for pattern in _MAY_BE_SECRETS:  # asterisks of the same length: the caret still points right
        shown = re.sub(pattern, lambda match: match.group(1) + "*" * len(match.group(3)), shown)
    start = max(0, column - 71)
    shown = "".join(c if c.isprintable() else " " for c in shown[start : start + 100])
    caret = " " * (column - 1 - start) + "^"
    words = "%s:%d:%d: %s\n  %s\n  %s" % (source, line, column, message, shown, caret)
    return ConfigError(words, [Problem("", message, "correct the text there", "error", line, column)])


def _hint(text: str, at: int) -> str:
    """What may be meant by a usual mistake."""
    there, before = text[at : at + 1], text[:at].rstrip()[-1:]
    if there == "#":
        return " (comments are written // so)"
    if not text.strip():
        return " (there is nothing in it)"
    if text.startswith("eN"):  # as all that pack_config makes
        return " (a packed configuration, but cut off or damaged)"
    return " (a comma too many)" if "," in (there, before) else ""


_NO_JSON = ("NaN", "Infinity", "-Infinity")
_JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]|[^][{}:,\s"]+')  # all but colons and commas


def locate_problems(problems: Iterable[Problem], text: str) -> List[Problem]:
    """The problems of a document in the order of its `text`, with line and column where what they name begins; what
    is missing is shown at what should hold it. Keys that are written twice are further problems, seen in text only."""
    text = text.removeprefix("\ufeff")
    places, twice = _find_places(text)
    doubled = [Problem(path, "is written twice, the last one counts", "remove one", "warning") for path in twice]
    located, starts = [], [0, *(found.end() for found in re.finditer("\n", text))]  # of each line
    for problem in [*problems, *doubled]:
        path = problem.path
        while path not in places:
            path = path[: max(0, path.rfind("."), path.rfind("["))]
        line = bisect_left(starts, places[path] + 1)
        located.append(problem._replace(line=line, column=places[path] + 1 - starts[line - 1]))
    return sorted(located, key=lambda problem: (problem.line, problem.column))


def _find_places(text: str) -> Tuple[Dict[str, int], List[str]]:
    """Where each member of a JSON text begins (its key, or a list's entry) by its path, and paths that come twice."""
    places, twice = {"": 0}, []
    pieces = _JSON_PIECE.finditer(_plain_json(text))

    def walk(path: str, opened: str) -> None:
        for index, piece in enumerate(pieces):
            word = piece.group()
            if word in "}]":
                return
            inner = _join(path, load_json(word)) if opened == "{" else "%s[%d]" % (path, index)
            twice.extend([inner] if inner in places else [])
            places[inner] = piece.start()
            word = next(pieces).group() if opened == "{" else word
            if word in "{[":
                walk(inner, word)

    walk("", next(pieces).group())
    return places, twice


# ----- a configuration in environment variables -----

CONFIG_VARIABLES = ("LLM_ROUTER_CONFIG_JSON", "ROUTE_CONFIG_JSON", "LLM_ROUTER_JSON")
_MAX_CONFIG_BYTES = 16_777_216


def find_config_variable(environ: Any) -> Tuple[str, str]:
    """(name, text) of the first variable that holds a configuration, ("", "") without. Cloudflare's secrets are small:
    the text may go on in NAME_2, NAME_3 and so on; those behind its end are left over from a larger configuration."""
    for name in CONFIG_VARIABLES:
        text, number = (environ.get(name, "") or "").strip(), 2
        while text:
            more = (environ.get("%s_%d" % (name, number), "") or "").strip()
            with suppress(RouterError):
                if not more or load_json(unpack_config(text)):
                    return name, text
            text, number = text + more, number + 1
    return "", ""


def pack_config(text: str) -> str:
    """A configuration's text in as few characters as `unpack_config` takes: zlib, then base64."""
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def unpack_config(text: str) -> str:
    """What `pack_config` made, as it was; any other text comes back as it is. ConfigError above 16 MiB."""
    if text.lstrip("\ufeff \r\n\t")[:1] in ("", "{", "["):
        return text
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(base64.b64decode(text.encode("ascii"), validate=True), _MAX_CONFIG_BYTES)
        if not unpacker.eof and unpacker.unconsumed_tail:
            raise ConfigError("the packed configuration is larger than %d bytes" % _MAX_CONFIG_BYTES)
        return plain.decode("utf-8") if unpacker.eof else text
    except (ValueError, zlib.error):  # not packed, or damaged: the JSON parser says what it finds
        return text


# ----- one pass over a document makes the values and finds the problems -----


def find_problems(document: Json) -> List[Problem]:
    """Everything wrong in a configuration as it was read from its file, each with path and cure."""
    return scan_config(document, {})[1]


def read_config(document: Json, environ: Environ) -> Config:
    """The configuration as values, keys from the environment filled in. ConfigError when a problem is an error."""
    config, problems = scan_config(document, environ)
    errors = [problem for problem in problems if problem.level == "error"]
    if errors:
        more = " (and %d more: llm-router config --operation=validate)" % (len(errors) - 1) if len(errors) > 1 else ""
        raise ConfigError(show_problem(errors[0]) + more, problems)
    return config


def read_usable_config(document: Json, environ: Environ) -> Config:
    """The same for what is to serve: ConfigError without an enabled provider, too."""
    config = read_config(document, environ)
    if not any(provider.enabled for provider in config.providers):
        cure = "enable one, or " * bool(config.providers) + WAYS_ON
        raise ConfigError("the configuration has no enabled provider; " + cure)
    return config


def scan_config(document: Json, environ: Environ) -> Tuple[Config, List[Problem]]:
    """What can be read of a configuration, however broken, and everything wrong in it; {}: of no known environment."""
    scan = _Scan(environ)
    return scan.scan(document), scan.problems


def show_problem(problem: Problem) -> str:
    """A problem as one line: path, message and cure."""
    return "%s: %s; %s" % (problem.path or "configuration", problem.message, problem.cure)


# RFC 9110, 5.6.2, without the headers of framing and connections
_HEADER_NAME = re.compile(
    "(?!(?:content-length|transfer-encoding|connection|keep-alive|upgrade|te|trailer)$)[!#$%&'*+.^_`|~0-9A-Za-z-]+",
    re.IGNORECASE | re.ASCII,
)
_HEADER_VALUE = re.compile(r"[\t -~\u0080-\u00ff]*")  # RFC 9110, 5.5; no CR, LF or NUL
_SECRET = re.compile(r"[ -~]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL_CHARACTERS = re.compile(r"[!#-;=?-\[\]_a-z~]*")  # RFC 3986: printable ASCII without " < > \ ^ ` { | }
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_LOOPBACK = re.compile(r"localhost|.+\.localhost|127(?:\.[0-9]{1,3}){3}|::1", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (IPv6 without brackets) can only mean this machine."""
    return bool(_LOOPBACK.fullmatch(host.rstrip(".")))


def check_url(url: str) -> Tuple[str, str]:
    """What is wrong with a base URL, and the cure; ("", "") when nothing is."""
    if "://" not in url:
        return "is not a URL", "write it with its scheme, https://HOST/..."
    if not _URL_CHARACTERS.fullmatch(url):
        return "has a character that no URL may have", "remove spaces, backslashes, braces and control characters"
    try:
        parts = urlsplit(url)
        host_is_good = parts.port != 0 and _AUTHORITY.fullmatch(parts.netloc)
    except ValueError:
        return "has a host or port that cannot be read", "write https://HOST:PORT/..."
    if parts.scheme not in ("http", "https"):
        return "has the scheme %s" % one_line(parts.scheme, 20), "use https:// or http://"
    if "@" in parts.netloc:
        return "has a user name or password in it", "remove what is before the @; keys go into apiKey"
    if not host_is_good:
        return "has no usable host", "write https://HOST:PORT/..."
    return ("has a fragment", "remove the # and what follows") if parts.fragment else ("", "")


def _wire_of(text: str) -> str:
    return _WIRE_ALIASES.get(text.strip().lower(), text.strip().lower())


def _flag_of(value: Any) -> Any:
    """A boolean that is written as text; anything else as it is."""
    return _BOOLS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _is_proxy(url: str) -> bool:
    """Whether it is an HTTP proxy's URL, which may have a login where a base URL may not, or says there is none."""
    bare = re.sub("//[^/@]*@", "//", url)
    return url in ("", "none") or bare.startswith("http://") and not check_url(bare)[0]


class FieldKind(NamedTuple):
    """What a plain value must be. type: its JSON type. tidy: how a text is tidied before. is_good: what it must then
    be; message, cure: what is said when it is not. A rule that is a method of a pattern or a tuple is the schema's."""

    type: type
    tidy: Callable[[str], Any] = str
    is_good: Callable[[Any], Any] = lambda value: True
    message: str = ""
    cure: str = ""


# Names of models that must exist: any that a client may use, a model or alias, a model.
_REFERENCES = ("default", "fallback", "target")
_UNSEEN = r"\x00-\x1f\x7f-\xa0\u200b-\u200f\u2028-\u202f\u205f-\u206f\ud800-\udfff\ufeff"  # what nobody sees
_HEADER = FieldKind(str, str.strip, _HEADER_VALUE.fullmatch, "is not a header value", "remove line breaks and controls")
_NAME = FieldKind(str, str.strip, re.compile(r"\s*\S[\s\S]*").fullmatch, "is empty", "remove it or write a name")

_FIELD_KINDS: Dict[str, FieldKind] = {
    "any": FieldKind(object),
    "object": FieldKind(dict),
    "flag": FieldKind(bool, _flag_of),
    "whole": FieldKind(int, str, range(2**53 + 1).__contains__,
        "must be a whole number of at least 0", "write a number without quotes or fraction"),
    **dict.fromkeys(("text", "default"), FieldKind(str, str.strip)),
    **dict.fromkeys(("name", "fallback", "target"), _NAME),
    "alias": FieldKind(str, str, re.compile(r"(?!\s*(?:smart)?\s*$)[\s\S]*").fullmatch,
        "cannot be an alias", "choose another name; for smart set defaultModel"),
    "secret": FieldKind(str, str.strip, _SECRET.fullmatch,
        "has a character that no key has", "copy the key again, without line breaks"),
    "sha256": FieldKind(str, lambda text: text.strip().lower(), re.compile("[0-9a-f]{64}").fullmatch,
        "is not a SHA-256", "make the entry with llm-router config --operation=add-client-key"),
    "variable": FieldKind(str, str.strip, _VARIABLE.fullmatch,
        "is not the name of an environment variable",
        "write a name like OPENAI_API_KEY; the key itself goes into apiKey"),
    "provider_id": FieldKind(str, str, re.compile(r"[A-Za-z][A-Za-z0-9_-]*").fullmatch,
        "is not a provider id", "use a letter, then letters, digits, - and _"),
    "model_id": FieldKind(str, str, re.compile(r"(?!\s)[^%s]+(?<!\s)" % _UNSEEN).fullmatch,
        "is not a model id", "write the provider's own name of the model, without spaces around it"),
    "wire": FieldKind(str, _wire_of, WIRES.__contains__,
        "is not a wire format", "use " + ", ".join(WIRES)),
    "auth_type": FieldKind(str, lambda text: text.strip().lower(), AUTH_TYPES.__contains__,
        "is not an auth type", "use " + ", ".join(AUTH_TYPES)),
    "header_name": FieldKind(str, str, _HEADER_NAME.fullmatch,
        "is not a header that can be set", "use letters, digits and -; framing is the router's own"),
    "header": _HEADER,
    "prefix": _HEADER._replace(tidy=str),
    "beta": FieldKind(str, str.strip, re.compile(r"[\t -~\u0080-\u00ff]*[!-~][\t -~\u0080-\u00ff]*").fullmatch,
        "is not a feature's name", "write it without line breaks, or remove it"),
    "proxy": FieldKind(str, str.strip, _is_proxy,
        "is not the URL of an HTTP proxy", "write http://HOST:PORT, or none"),
    "origin": FieldKind(str, lambda text: text.strip().rstrip("/").lower(), re.compile(r"[^/]+://[^/?#*\s]+").fullmatch,
        "is not an origin", "write scheme://host:port; a wildcard would let any web page spend your money"),
}  # fmt: skip

# What a provider's `compat` may be: the names of COMPATS.
COMPAT_NAMES = tuple(
    "openai azure anthropic bedrock vertex openrouter deepseek moonshot zai qwen groq mistral gemini together cerebras"
    " ollama".split()
)
# Objects that are read by their fields alone.
_RECORDS: Dict[str, Any] = {"timeouts": Timeouts, "client_key": ClientKey, "model": Model}
_VERDICTS = {  # of ModelIndex.judge: what is said of the name, and the cure
    "unknown": ("names the model %s, which is not configured", "write provider/model, both as they are configured"),
    "ambiguous": ("names the model %s, which several providers have", "write one of "),
    "disabled": ("names the model %s, which is disabled", "enable it or name another"),
    "any": ("names the model %s, and * stands for any", "write the name of one"),
    "alias": ("names the alias %s, and an alias leads to models only", "write the models that one leads to"),
}


class _Scan:
    """A pass over a document: makes its values, notes what is wrong. A reader returns None for what cannot be used."""

    def __init__(self, environ: Environ) -> None:
        self.problems: List[Problem] = []
        self._environ = environ
        self._level = "error"  # of an error where the pass is: inside a disabled entry it does no harm
        self._references: List[Tuple[str, str, str, str]] = []  # path, name, kind, level

    def scan(self, document: Json) -> Config:
        """The Config of a whole document."""
        values = self._read_fields("config", "", document)
        if not values.get("providers"):
            self._warn("providers", "no provider is configured", "add one with llm-router config")
        if values.get("version", 1) > 1:
            self._warn("version", "is of a newer version", "check the other warnings: unknown keys have no effect")
        config = _made(Config, values)._replace(
            master_key=self._read_variable_value("LLM_ROUTER_MASTER_KEY") or values.get("master_key", ""),
            aliases={name: refs for name, refs in values.get("model_aliases", {}).items() if refs},
            allowed_hosts=tuple(map(str.lower, values.get("allowed_hosts", ()))),
        )
        self._check_references(ModelIndex(config.providers, config.aliases))
        return config

    def _error(self, path: str, message: str, cure: str) -> None:
        self.problems.append(Problem(path, message, cure, self._level))

    def _warn(self, path: str, message: str, cure: str) -> None:
        self.problems.append(Problem(path, message, cure, "warning"))

    def _is(self, path: str, value: Any, type_: type, words: str = "") -> bool:
        """Whether `value` is of the JSON type, noted when it is not. words: what it may be, when that is more."""
        is_good = type_ in (object, type(value))
        if not is_good:
            words = words or _TYPES[type_]
            self._error(path, "must be %s, is %s" % (words, _TYPES.get(type(value), "null")), "write " + words)
        return is_good

    def _read(self, kind: str, path: str, value: Any) -> Any:
        if kind[0] == "[":
            return self._read_list(kind[1:-1], path, value)
        if kind[0] == "{":
            return self._read_map(*kind[1:-1].split(":"), path, value)
        if kind in _RECORDS:
            value = {"id": value} if kind == "model" and isinstance(value, str) else value  # a text alone is its id
            values = self._read_fields(kind, path, value)
            return _RECORDS[kind](**values) if values.keys() >= set(_REQUIRED.get(kind, ())) else None
        if kind not in _FIELD_KINDS:
            return getattr(self, "_read_" + kind)(path, value)
        type_, tidy, is_good, message, cure = _FIELD_KINDS[kind]
        value = tidy(value) if isinstance(value, str) else value
        if not self._is(path, value, type_):
            return None
        if not is_good(value):
            return self._error(path, message, cure)
        if kind in _REFERENCES:
            self._references.append((path, value, kind, self._level))
        return value

    def _read_list(self, kind: str, path: str, value: Any) -> Tuple[Any, ...]:
        """What can be used of a list, or of one text in place of a list."""
        if isinstance(value, str):
            entries = [(path, entry) for entry in (value.split(",") if kind == "beta" else (value,))]
        else:
            is_list = self._is(path, value, list)
            entries = [("%s[%d]" % (path, i), entry) for i, entry in enumerate(value if is_list else ())]
            if is_list and not entries and kind in _NOT_EMPTY:
                self._error(path, *_NOT_EMPTY[kind])
        return self._read_entries(kind, entries)

    def _read_entries(self, kind: str, entries: Iterable[Tuple[str, Any]]) -> Tuple[Any, ...]:
        found, level = [], self._level
        for path, raw in entries:
            self._level = "warning" if _is_off(raw) else level
            found.append((path, self._read(kind, path, raw)))
            self._level = level
        found = [(path, entry) for path, entry in found if entry is not None]
        if kind in _REQUIRED:
            self._check_ids(kind, found)
        return tuple(entry for _, entry in found)

    def _read_map(self, name_kind: str, kind: str, path: str, value: Any) -> Any:
        if kind == "url" and not isinstance(value, dict):  # one for every format, as older files have it
            return {"": self._read_url(path, value)}
        found = {}
        for where, name, entry in self._items(path, value):
            good = self._read(name_kind, where, name)
            read = self._read(kind, where, entry) if good and entry is not None else None
            if good and (read is not None or entry is None and kind == "header"):  # a null removes a header
                found[good] = read
        return found

    def _items(self, path: str, value: Any, words: str = "") -> List[Tuple[str, str, Any]]:
        """The path, name and value of each member of an object."""
        good = self._is(path, value, dict, words)
        return [(_join(path, name), name, entry) for name, entry in value.items()] if good else []

    def _read_fields(self, kind: str, path: str, raw: Any) -> Json:
        """The fields of an object by their attributes' names (`base_url`); unknown keys become warnings."""
        values = {}
        for where, name, value in self._items(path, raw, "text or an object" if kind == "model" else ""):
            field = _FIELD_OF[kind].get(name)
            first = find_key(raw, kind, field.key) if field else None
            if field is None:
                if name[:1] not in ("_", "$", "#") and name[:2] != "//":  # a comment, a schema
                    cure = did_you_mean(name, SPELLINGS[kind], "remove it: it has no effect")
                    self._warn(where, "is not a known key", cure)
            elif value is not None and first != name:
                self._warn(where, "says again what %s says" % first, "remove one of them")
            elif value is not None:
                values[_snake(field.key)] = self._read(field.kind, where, value)
        for name in _REQUIRED.get(kind, ()):
            if isinstance(raw, dict) and find_key(raw, kind, name) is None:
                self._error(_join(path, name), "is missing", "add it: " + _FIELD_OF[kind][name].help)
        return {name: value for name, value in values.items() if value is not None}

    def _check_ids(self, kind: str, found: Sequence[Tuple[str, Any]]) -> None:
        """No two entries may have the same id, the first of their fields; those of models count case."""
        same: Dict[str, str] = {}
        owners = {entry[0]: entry for _, entry in found}
        for path, entry in found:
            first = same.setdefault(entry[0] if kind == "model" else entry[0].lower(), path)
            if entry[0] and first != path:
                words = kind.replace("_", " "), one_line(entry[0], 80), first
                self._error(path, "the %s id %s is already used at %s" % words, "rename or remove one of them")
            for alias in getattr(entry, "aliases", ()):
                if owners.setdefault(alias, entry) is not entry:
                    words = one_line(alias, 80), one_line(owners[alias][0], 80)
                    self._warn(path, "its alias %s also means %s" % words, "rename one of them")

    # ----- kinds with rules of their own -----

    def _read_url(self, path: str, value: Any) -> Any:
        if isinstance(value, list) and value:
            if len(value) > 1:
                self._warn(path, "holds several URLs, only the first is used", "make one provider of each")
            path, value = path + "[0]", value[0]
        url = self._read("text", path, value)
        if url is None:
            return None
        message, cure = check_url(url)
        if message:
            return self._error(path, message, cure)
        parts = urlsplit(url)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            self._warn(path, "sends keys and prompts unencrypted", "use https:// unless you trust the network")
        return url

    def _read_auth(self, path: str, value: Any) -> Auth:
        auth = Auth(**self._read_fields("auth", path, value))
        if auth.type == "header" and not auth.header_name:
            self._error(path, "has the type header and no header", "add headerName")
        return auth

    def _read_providers(self, path: str, value: Any) -> Tuple[Provider, ...]:
        is_good = isinstance(value, dict) or self._is(path, value, list)
        return self._read_entries("provider", provider_entries(path, value) if is_good else ())

    def _read_provider(self, path: str, raw: Any) -> Optional[Provider]:
        if not self._is(path, raw, dict):
            return None
        values = self._read_fields("provider", path, raw)
        if raw.get("id") is None:
            self._error(path, "the provider has no id", 'add "id"')
        key = self._read_variable_value(values.get("api_key_env", ""), _join(path, "apiKeyEnv"))
        provider = _made(Provider, {"id": "", **values, **_facts_by_format(values)})
        provider = provider._replace(name=provider.name or provider.id, api_key=key or provider.api_key)
        self._check_provider(path, raw, provider, values)
        return provider

    def _check_provider(self, path: str, raw: Json, provider: Provider, values: Json) -> None:
        missing = [wire for wire in provider.formats if wire not in provider.base_urls]
        if missing and get_field(raw, "provider", "baseUrl") is None:  # one that is bad has been noted
            message = "there is no base URL for the format %s" % missing[0]
            self._error(_join(path, "baseUrl"), message, "add baseUrl, or baseUrlByFormat.%s" % missing[0])
        hosts = [urlsplit(url).hostname or "" for url in provider.base_urls.values()]
        has_key, variable = provider.api_key or provider.headers, values.get("api_key_env")
        wants_key = any(provider.auths[wire].type != "none" for wire in provider.formats) and not has_key
        if wants_key and variable and self._environ and not _is_off(raw):
            self._warn(_join(path, "apiKeyEnv"), "the variable %s is not set here" % variable, "set it, or add apiKey")
        elif wants_key and not variable and not all(map(is_loopback, hosts)):
            self._warn(path, "the provider has no key", 'add apiKey or apiKeyEnv, or auth {"type": "none"}')
        if provider.compat and provider.compat not in COMPAT_NAMES:
            cure = did_you_mean(as_text(provider.compat), COMPAT_NAMES, "write one of " + ", ".join(COMPAT_NAMES))
            self._warn(_join(path, "compat"), "is not known, and has no effect", cure)
        if values.get("format", provider.preferred) not in provider.formats:
            self._warn(path, "its preferred format %s is not one of its formats" % values["format"], "add it there")
        for model in provider.models:
            if model.formats and not set(model.formats) & set(provider.formats):
                message = "the model %s has no format that its provider speaks"
                self._warn(path, message % one_line(model.id, 80), "correct formats")

    def _read_variable_value(self, name: str, path: str = "") -> str:
        """The key that an environment variable holds, "" when it holds none."""
        value = self._environ.get(name, "").strip()
        if _SECRET.fullmatch(value):
            return value
        message = "the variable %s holds a character that no key has" % one_line(name, 80)
        self._error(path or name, message, "set it again")
        return ""

    def _check_references(self, index: ModelIndex) -> None:
        guesses_left = 20  # comparing a name with thousands of others is slow; nobody reads more guesses
        for path, name, kind, level in self._references:
            name = bare_name(name) if kind == "default" else name
            verdict = index.judge(name, kind != "target", kind == "default") if name else ""
            if not verdict:
                continue
            message, cure = _VERDICTS[verdict]
            if verdict == "unknown" and guesses_left:
                guesses_left -= 1
                cure = did_you_mean(name, index.names, cure)
            elif verdict == "ambiguous":
                cure += ", ".join("%s/%s" % (provider.id, model.id) for provider, model in index.find(name))
            level = "warning" if verdict in ("disabled", "any") else level
            self.problems.append(Problem(path, message % one_line(name, 80), cure, level))


def _made(type_: Any, values: Json) -> Any:
    """A value of those of the values that it holds."""
    return type_(**{name: value for name, value in values.items() if name in type_._fields})


def _join(path: str, key: str) -> str:
    """The path of a member: `a.b`, or `a["b c"]` where the key is not a plain word."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key):
        return "%s.%s" % (path, key) if path else key
    return '%s["%s"]' % (path, one_line(key, 80).replace('"', '\\"'))


def provider_entries(path: str, value: Any) -> List[Tuple[str, Any]]:
    """The providers of a file as (path, raw provider). They may stand in a list, alone, or in an object id -> provider,
    where each gets its id when it has none of its own."""
    if isinstance(value, list):
        return [("%s[%d]" % (path, i), raw) for i, raw in enumerate(value)]
    if not isinstance(value, dict) or value.get("id") or not all(isinstance(raw, dict) for raw in value.values()):
        return [(path, value)]
    return [(_join(path, key), raw if raw.get("id") else dict(raw, id=key)) for key, raw in value.items()]


def _is_off(raw: Any) -> bool:
    """Whether an entry, a provider or a model, is disabled."""
    return _flag_of(get_field(as_dict(raw), "model", "enabled")) is False


def _facts_by_format(values: Json) -> Json:
    """What a provider's fields mean per wire format, with the defaults for what is unsaid."""
    own, preferred = values.get("base_url_by_format", {}), values.get("format")
    base = values.get("base_url") or own.get("")
    formats = values.get("formats") or [wire for wire in WIRES if wire in own or wire == preferred]
    is_anthropic = urlsplit(base or "").hostname == "api.anthropic.com"  # whoever says none speaks OpenAI's otherwise
    formats = tuple(dict.fromkeys(formats)) or ("anthropic" if is_anthropic else "openai",)
    urls = {wire: own.get(wire) or base for wire in WIRES}
    urls["responses"] = urls["responses"] or urls["openai"]
    auths = {wire: values.get("auth") or usual for wire, usual in USUAL_AUTHS.items()}
    return {
        "formats": formats,
        "preferred": preferred if preferred in formats else formats[0],
        "base_urls": {wire: url for wire, url in urls.items() if url},
        "auths": {**auths, **values.get("auth_by_format", {})},
    }


# ----- the same table as a JSON Schema -----


def config_schema() -> Json:
    """The shape of the configuration file as a JSON Schema (draft 7, which editors know), made of FIELDS.
    What it accepts has no problem of shape; the router itself also takes odd spellings of a value (" True ")."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "llm-router configuration"}
    named = {kind: _object_schema(kind) for kind in FIELDS if kind != "config"}
    return dict(schema, **_object_schema("config"), definitions=named)


def _object_schema(kind: str) -> Json:
    properties: Json = {}
    for field in FIELDS[kind]:
        schema = _kind_schema(field.kind)
        properties.update((name, schema) for name in _spellings(field))
        properties[field.key] = dict({"allOf": [schema]} if "$ref" in schema else schema, description=field.help)
    return {"type": "object", "properties": properties, "required": list(_REQUIRED.get(kind, ()))}


def _kind_schema(kind: str) -> Json:
    if kind in _OWN_SCHEMAS:
        return _OWN_SCHEMAS[kind]
    if kind in FIELDS:
        return {"$ref": "#/definitions/" + kind}
    if kind[0] == "[":
        one = _kind_schema(kind[1:-1])
        alone = {"model": [_ID_SCHEMA], "client_key": []}.get(kind[1:-1], [one])
        return {"anyOf": [{"type": "array", "items": one, "minItems": int(kind[1:-1] in _NOT_EMPTY)}, *alone]}
    if kind[0] == "{":
        name, value = map(_kind_schema, kind[1:-1].split(":"))
        value = {"anyOf": [value, {"type": "null"}]} if kind.endswith(":header}") else value
        schema = {"type": "object", "propertyNames": name, "additionalProperties": value}
        return {"anyOf": [schema, value]} if kind.endswith(":url}") else schema
    rule = getattr(_FIELD_KINDS[kind].is_good, "__self__", None)
    schema = {"type": _SCHEMA_TYPES[_FIELD_KINDS[kind].type]}
    if isinstance(rule, re.Pattern):
        schema["pattern"] = "^(?:%s)$" % rule.pattern
    elif isinstance(rule, tuple):
        schema["enum"] = [*rule, *_WIRE_ALIASES] if kind == "wire" else list(rule)
    return dict(schema, minimum=rule[0], maximum=rule[-1]) if isinstance(rule, range) else schema


_SCHEMA_TYPES = {str: "string", int: "integer", bool: "boolean", dict: "object"}
_ID_SCHEMA = {"$ref": "#/definitions/model/properties/id"}
_URL_PATTERN = r"^[Hh][Tt][Tt][Pp][Ss]?://%s([/?][!$-;=?-\[\]_a-z~]*)?$" % _AUTHORITY.pattern
_URL_SCHEMA = {"type": "string", "pattern": _URL_PATTERN}
_PROVIDER_SCHEMA = {"$ref": "#/definitions/provider"}
_NAMED_PROVIDER = {"allOf": [_PROVIDER_SCHEMA, {"required": ["id"]}]}
_OWN_SCHEMAS: Dict[str, Json] = {
    "any": {},
    "url": {"anyOf": [_URL_SCHEMA, {"type": "array", "items": _URL_SCHEMA, "minItems": 1}]},
    "proxy": {"type": "string", "pattern": "^(?:none|http://\\S+)?$"},
    "model": {"anyOf": [_ID_SCHEMA, {"$ref": "#/definitions/model"}]},
    "providers": {"anyOf": [
        {"type": "array", "items": _NAMED_PROVIDER},
        _NAMED_PROVIDER,
        {"type": "object", "additionalProperties": _PROVIDER_SCHEMA},
    ]},
}


# ----- what names mean -----


def bare_name(name: str) -> str:
    """`name` without a trailing `[...]`, with which clients mark variants such as `[1m]`."""
    return name[: name.rindex("[")] if name.endswith("]") and "[" in name else name


class ModelIndex:
    """What model names mean in a configuration, indexed so that no look-up grows with its size; disabled ones nothing.
    aliases: name or pattern -> model refs. names: all a client may list: plain aliases, `provider/model`, and the
    models' own aliases that mean only one of them."""

    def __init__(self, providers: Iterable[Provider], aliases: Mapping[str, Texts]) -> None:
        self.aliases = aliases
        self.names = [alias for alias in aliases if "*" not in alias]
        self._models: Dict[Tuple[str, str], Tuple[Provider, Model]] = {}
        self._owners: Dict[str, Dict[str, Tuple[Provider, Model]]] = {}
        self._disabled: Set[Tuple[str, str]] = set()
        for provider, model in ((one, model) for one in providers for model in one.models):
            ref, is_on = "%s/%s" % (provider.id, model.id), provider.enabled and model.enabled
            self.names += [ref] if is_on and model.id != "*" else []
            for name in (model.id, *model.aliases):
                key = provider.id.lower(), name
                if not is_on:
                    self._disabled.add(key)
                    continue
                self._models.setdefault(key, (provider, model))
                if name != "*":
                    self._owners.setdefault(name, {})[ref] = (provider, model)
        sole = ((name, *owners.values()) for name, owners in self._owners.items() if len(owners) == 1)
        self.names += [name for name, (_, model) in sole if model.id != name]
        wild = sorted((name for name in aliases if "*" in name), key=lambda name: name.count("*") - len(name))
        self._patterns = [(name.split("*"), aliases[name]) for name in wild]

    def find(self, name: str) -> List[Tuple[Provider, Model]]:
        """The enabled models that `name` (`provider/model`, or a bare id or alias) means: one, none, or those among
        which it is ambiguous. A model that `*` passes through bears the id that was asked for."""
        provider_id, _, model_id = name.partition("/")
        found = self._models.get((provider_id.lower(), model_id))
        wild = self._models.get((provider_id.lower(), "*")) if model_id and not found else None
        if wild:
            found = (wild[0], wild[1]._replace(id=bare_name(model_id)))  # no upstream knows the suffix (trap 190)
        return [found] if found else list(self._owners.get(name, {}).values())

    def find_pattern(self, name: str) -> Optional[Texts]:
        """The refs of the alias pattern with the longest literal part that `name` matches."""
        return next((refs for pieces, refs in self._patterns if _fits(name, *pieces)), None)

    def judge(self, name: str, aliases: bool = True, patterns: bool = False) -> str:
        """ "" when `name` means one enabled model, or, if it may, an alias or a pattern; else a key of _VERDICTS."""
        found = self.find(name)
        if any(model.id == "*" for _, model in found):
            return "any"
        if len(found) == 1 or aliases and name in self.aliases or patterns and self.find_pattern(name) is not None:
            return ""
        provider_id, _, model_id = name.partition("/")
        is_off = self._disabled.intersection({(provider_id.lower(), model_id), (provider_id.lower(), "*")})
        if found or name in self.aliases:
            return "ambiguous" if found else "alias"
        return "disabled" if model_id and is_off else "unknown"


def _fits(name: str, first: str, *others: str) -> bool:
    """Whether `name` is these pieces with anything between. A regular expression would try each piece at every place,
    and with a few stars a long name would stop every stream for minutes."""
    *middle, last = others
    is_good = len(name) >= len(first + last) and name.startswith(first) and name.endswith(last)
    rest = name[len(first) : len(name) - len(last)]
    for piece in filter(None, middle):
        _, found, rest = rest.partition(piece)
        is_good = is_good and found != ""
    return is_good


# ----- well-known providers -----


WAYS_ON = (
    "add a provider: llm-router config opens the menu, llm-router config --operation=upsert-provider --help is for"
    " scripts; or set a key variable such as OPENAI_API_KEY; or try llm-router demo"
)

# In the order in which the first key found gives the default model; last the servers on this machine at their usual
# ports, which need no key.
_PRESET_TABLE = """
    id | name | keys | model | keys_at | openai | anthropic | responses
    openai | OpenAI | OPENAI | gpt-4o | platform.openai.com/api-keys | api.openai.com/v1 | | api.openai.com/v1
    anthropic | Anthropic | ANTHROPIC | claude-sonnet-4-5 | platform.claude.com/settings/keys | | api.anthropic.com
    openrouter | OpenRouter | OPENROUTER | openrouter/auto | openrouter.ai/settings/keys | openrouter.ai/api/v1
    groq | Groq | GROQ | llama-3.3-70b-versatile | console.groq.com/keys | api.groq.com/openai/v1
    deepseek | DeepSeek | DEEPSEEK | deepseek-chat | platform.deepseek.com/api_keys \
        | api.deepseek.com/v1 | api.deepseek.com/anthropic
    mistral | Mistral | MISTRAL | mistral-large-latest | console.mistral.ai/api-keys | api.mistral.ai/v1
    gemini | Gemini | GEMINI GOOGLE | gemini-2.5-flash | aistudio.google.com/apikey \
        | generativelanguage.googleapis.com/v1beta/openai
    xai | xAI | XAI | grok-4 | console.x.ai | api.x.ai/v1
    together | Together | TOGETHER | meta-llama/Llama-3.3-70B-Instruct-Turbo | api.together.ai/settings/api-keys \
        | api.together.xyz/v1
    cerebras | Cerebras | CEREBRAS | llama-3.3-70b | cloud.cerebras.ai | api.cerebras.ai/v1
    moonshot | Moonshot | MOONSHOT | kimi-k2.6 | platform.moonshot.ai/console/api-keys \
        | api.moonshot.ai/v1 | api.moonshot.ai/anthropic
    zai | Z.ai | ZAI | glm-4.6 | z.ai/manage-apikey/apikey-list | api.z.ai/api/paas/v4 | api.z.ai/api/anthropic
    ollama | Ollama | |  | | http://127.0.0.1:11434/v1
    lmstudio | LM Studio | |  | | http://127.0.0.1:1234/v1
    llamacpp | llama.cpp | |  | | http://127.0.0.1:8080/v1
    vllm | vLLM | |  | | http://127.0.0.1:8000/v1
"""
_PRESET_ROWS = [[cell.strip() for cell in line.split("|")] for line in _PRESET_TABLE.strip().split("\n")]
Preset = namedtuple("Preset", _PRESET_ROWS[0], defaults=[""] * len(_PRESET_ROWS[0]))
Preset.__doc__ = """A well-known provider. keys: where its users keep the key, variables without their `_API_KEY`.
model: one that every account has. keys_at: where to get a key. openai, anthropic, responses: base URLs, https:// left
out."""
PRESETS = tuple(Preset(*row) for row in _PRESET_ROWS[1:])


def preset_variables(row: Preset) -> List[str]:
    """Its key variables, the first that is set wins."""
    return [name + "_API_KEY" for name in row.keys.split()]


def preset_urls(row: Preset) -> Dict[str, str]:
    """Its base URLs by wire format."""
    found = {wire: getattr(row, wire) for wire in WIRES if getattr(row, wire)}
    return {wire: url if "://" in url else "https://" + url for wire, url in found.items()}


def preset_document(environ: Environ) -> Optional[Json]:
    """A configuration of every well-known provider whose key variable is set; None when none is."""
    found = {row: name for row in PRESETS for name in reversed(preset_variables(row)) if environ.get(name, "").strip()}
    providers = [
        {"id": row.id, "name": row.name, "baseUrlByFormat": preset_urls(row), "apiKeyEnv": name, "models": ["*"]}
        for row, name in found.items()
    ]
    defaults = ["%s/%s" % (row.id, row.model) for row in found]
    return {"version": 1, "defaultModel": defaults[0], "providers": providers} if found else None


# ==============================================================================
# 5 EDITS - changes to a configuration, shared by commands and menu [pure]
# ==============================================================================
#
# An edit takes the raw document and returns a changed copy: what it was not told to change stays as it was written,
# unknown keys and disabled entries included. A field that it does change gets its canonical spelling.


class Edit(NamedTuple):
    """A changed document and what was done, one sentence each, without secrets."""

    document: Json
    notes: Texts = ()


NEW_DOCUMENT: Json = {"version": 1, "providers": []}


def upsert_provider(document: Json, provider_id: str, change: Json) -> Edit:
    """Add the provider, or change those of its fields that `change` has; "" removes one. Objects (headers, auth, URLs
    by format) are merged into what is there; a header's null stays, it removes the header. UsageError when the result
    would not be usable.

    models: the list becomes the given one; what was there keeps its object, if disabled its place; references go along.
    """
    new, providers = _open(document)
    is_new = provider_id.lower() not in [_id_of(entry).lower() for entry in providers]
    provider = _new_provider(provider_id, change) if is_new else _find_provider(providers, provider_id)
    notes = ["%s provider %s" % ("added" if is_new else "changed", _id_of(provider))]
    for key in (key for key in SPELLINGS["provider"] if key in change):
        value = change[key]
        if key == "models":
            notes += _put_models(provider, value)
        elif isinstance(value, dict):
            old = _as_object(provider, key, get_field(provider, "provider", key))
            given = {name.lower() for name in value}
            kept = {name: entry for name, entry in old.items() if _wire_of(name) not in given}
            _put(provider, "provider", key, {**kept, **value} or None)
        else:
            _put(provider, "provider", key, None if value in ("", []) else value)
    _take_in_format(provider, change)
    if is_new:
        providers.append(provider)
        is_first = len(providers) == 1 and change["models"][0] != "*"
        notes += _default_to(new, "%s/%s" % (provider_id, change["models"][0]) if is_first else "")
    return _finish(document, new, notes, "models" in change)


def add_provider(document: Json, provider: Json, default: str = "") -> Edit:
    """Add a provider as it would stand in the file; `default` becomes the default model when there is none."""
    new, providers = _open(document)
    providers.append(_copy(provider))
    return _finish(document, new, ["added provider " + _id_of(provider), *_default_to(new, default)])


def _default_to(document: Json, model: str) -> List[str]:
    """Make it the default model where there is none, and say so."""
    if not model or get_field(document, "config", "defaultModel"):
        return []
    _put(document, "config", "defaultModel", model)
    return ["default model: " + model]


def remove_provider(document: Json, provider_id: str) -> Edit:
    """Remove a provider and every reference to its models. UsageError when there is none of that id."""
    new, providers = _open(document)
    provider = _find_provider(providers, provider_id)
    providers.remove(provider)
    return _finish(document, new, ["removed provider " + _id_of(provider)], True)


def remove_model(document: Json, provider_id: str, model: str) -> Edit:
    """Remove a model of a provider and every reference to it. UsageError when it is not there, or is the last one."""
    new, models, found, ref = _open_model(document, provider_id, model)
    if len(models) == 1:
        raise UsageError("%s is the last model of its provider: use remove-provider, or add another first" % ref)
    models.remove(found)
    return _finish(document, new, ["removed model " + ref], True)


def set_model_fallbacks(document: Json, provider_id: str, model: str, fallbacks: Sequence[str]) -> Edit:
    """Set the ordered fallbacks of a model; an empty list clears them."""
    new, _, found, ref = _open_model(document, provider_id, model)
    names = list(dict.fromkeys(fallbacks))
    if ref.lower() in map(str.lower, names):
        raise UsageError("%s cannot be its own fallback" % ref)
    _put(found, "model", "fallbackModels", names or None)
    return _finish(document, new, ["fallbacks of %s: %s" % (ref, ", ".join(names) or "none")])


def set_model_alias(document: Json, alias: str, targets: Sequence[str]) -> Edit:
    """Let `alias` (a name, or a pattern with *) mean the model refs `targets`, in order; none removes the alias."""
    new, names = _copy(document), list(dict.fromkeys(targets))
    aliases, _ = _walk(new, ("modelAliases",))
    if names:
        aliases[alias] = names if names[1:] else names[0]
        return _finish(document, new, ["alias %s: %s" % (alias, ", ".join(names))])
    if alias not in aliases:
        raise UsageError("there is no alias %s%s" % (one_line(alias, 80), _near_or_all(alias, aliases)))
    del aliases[alias]
    return _finish(document, new, ["removed alias " + alias], True)


def set_default_model(document: Json, model: str) -> Edit:
    """Set the model that `smart` and requests without a model use."""
    return _set_in_config(document, "defaultModel", model, "default model: " + model)


def set_master_key(document: Json, key: str) -> Edit:
    """Set the key that clients must show where auth is required. UsageError when it is empty."""
    if not key.strip():
        raise UsageError("the master key is empty: give one, or use --generate")
    return _set_in_config(document, "masterKey", key.strip(), "master key set")


def add_client_key(document: Json, name: str, key: str) -> Edit:
    """Let a further client in by a key of its own, kept as its hash; a client of that name gets the new key."""
    if not name.strip():
        raise UsageError("the client has no name: give --name")
    entry = {"name": name.strip(), "sha256": hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()}
    others = _client_keys_but(document, name)
    done = "set" if len(others) == len(get_field(document, "config", "clientKeys") or ()) else "replaced"
    return _set_in_config(document, "clientKeys", [*others, entry], "client key of %s %s" % (name.strip(), done))


def remove_client_key(document: Json, name: str) -> Edit:
    """Let a client in no longer. UsageError when no key has that name."""
    kept = _client_keys_but(document, name)
    if len(kept) == len(get_field(document, "config", "clientKeys") or ()):
        near = _near_or_all(name, [get_text(as_dict(entry), "name") for entry in kept])
        raise UsageError("there is no client key of the name %s%s" % (one_line(name, 60), near))
    return _set_in_config(document, "clientKeys", kept, "client key of %s removed" % name.strip())


def _client_keys_but(document: Json, name: str) -> List[Any]:
    entries = get_field(document, "config", "clientKeys") or []
    if not isinstance(entries, list):
        raise UsageError("clientKeys must be a list; see llm-router config --operation=validate")
    names = [get_text(as_dict(entry), "name").strip().lower() for entry in entries]
    return [entry for entry, own in zip(entries, names) if not own or own != name.strip().lower()]


def _set_in_config(document: Json, key: str, value: Any, note: str) -> Edit:
    new = _copy(document)
    _put(new, "config", key, value)
    return _finish(document, new, [note])


# ----- masking -----

_SECRET_WORDS = re.compile(r"key|secret|token|auth|credential|password|cookie|sha256", re.IGNORECASE)
_SECRET_QUERY = re.compile(r"([?&][^=&#]*(?:key|secret|token|sig|password)[^=&#]*=)[^&#]+", re.IGNORECASE)
# Headers whose values are no secrets; the value of any other is masked.
_PLAIN_HEADERS = "accept anthropic-beta anthropic-version http-referer openai-beta referer user-agent x-title".split()


def mask_document(value: Any, under: str = "") -> Any:
    """A copy of a document, or of what stands in it under the key `under`, with every secret masked, fit to be shown.
    Keys that nobody knows may hold secrets as well: texts under a telling name, at any depth."""
    if isinstance(value, dict):
        return {name: mask_document(entry, _secret_name(name, under)) for name, entry in value.items()}
    if isinstance(value, list):
        return [mask_document(entry, under) for entry in value]
    if not isinstance(value, str):
        return value if value is None or under != "header key" else "***"
    if under in ("baseUrl", "baseUrlByFormat", "proxy"):
        return mask_url(value)
    is_plain = under == "apiKeyEnv" and _VARIABLE.fullmatch(value) or not _SECRET_WORDS.search(under)
    return value if is_plain else mask(value)


def _secret_name(name: str, under: str) -> str:
    if under == "headers":
        return "" if name.lower() in _PLAIN_HEADERS else "header key"
    field = _FIELD_OF["provider"].get(name)
    return under if under == "baseUrlByFormat" else field.key if field else name


def mask_url(url: str) -> str:
    """A URL without passwords, and with the keys in its query masked."""
    return _SECRET_QUERY.sub(r"\1***", re.sub(r"//[^/?#]*@", "//***@", url))


def secrets_of(provider: Provider) -> Texts:
    """All that is shown to a provider and to nobody else: its key, its own headers, the keys in its URLs."""
    headers = [value for name, value in provider.headers.items() if value and name.lower() not in _PLAIN_HEADERS]
    found = [match for url in provider.base_urls.values() for match in _SECRET_QUERY.finditer(url)]
    return (provider.api_key, *headers, *[match.group()[len(match.group(1)) :] for match in found])


# ----- the document -----


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _open(document: Json) -> Tuple[Json, List[Any]]:
    """A copy of the document whose providers are a list; also that list."""
    new = _copy(document)
    value = get_field(new, "config", "providers")
    if not isinstance(value, list):
        value = [raw for _, raw in provider_entries("", value) if isinstance(raw, dict)]
        _put(new, "config", "providers", value)
    return new, value


def _put(raw: Json, kind: str, key: str, value: Any) -> None:
    """Set a field under its canonical spelling, in place of any other, or remove it where the value is None; other keys
    keep their order. An object of no kind has fields of any name."""
    for name in SPELLINGS[kind][key] if kind else (key,):
        if name != key or value is None:
            raw.pop(name, None)
    if value is not None:
        raw[key] = value


def _id_of(entry: Any) -> str:
    """The id of a provider or model, which may be a plain name."""
    return entry if isinstance(entry, str) else as_text(get_field(as_dict(entry), "model", "id"))


def _find_provider(providers: Sequence[Any], provider_id: str) -> Json:
    """The provider of that id, any case. UsageError when there is none."""
    for entry in providers:
        if isinstance(entry, dict) and _id_of(entry).lower() == provider_id.lower():
            return entry
    near = _near_or_all(provider_id, [_id_of(entry) for entry in providers])
    raise UsageError("there is no provider %s%s" % (one_line(provider_id, 80), near))


def _models_of(provider: Json) -> List[Any]:
    value = get_field(provider, "provider", "models")
    return [value] if isinstance(value, str) else as_list(value)


def _open_model(document: Json, provider_id: str, model: str) -> Tuple[Json, List[Any], Any, str]:
    """A copy of the document, the models of a provider in it, one of them as an object, and its ref.
    `model`: its id or an alias, with or without the provider's id in front. A plain name becomes an object."""
    new, providers = _open(document)
    provider = _find_provider(providers, provider_id)
    models, names = _models_of(provider), [model]
    if model.lower().startswith(provider_id.lower() + "/"):
        names.append(model.partition("/")[2])
    _put(provider, "provider", "models", models)
    for name, (i, entry) in ((name, found) for name in names for found in enumerate(models)):
        aliases = get_field(as_dict(entry), "model", "aliases")
        if name in (_id_of(entry), aliases, *as_list(aliases)):
            models[i] = as_dict(entry) or {"id": entry}
            return new, models, models[i], "%s/%s" % (_id_of(provider), _id_of(entry))
    near = _near_or_all(model, [_id_of(entry) for entry in models])
    raise UsageError("%s has no model %s%s" % (provider_id, one_line(model, 80), near))


def _near_or_all(name: str, known: Iterable[str]) -> str:
    known = list(filter(None, known))
    return "; " + did_you_mean(name, known, "there are " + ", ".join(known[:10])) if known else ""


def _new_provider(provider_id: str, change: Json) -> Json:
    needed = {
        "--base-url=URL": change.get("baseUrl") or change.get("baseUrlByFormat"),
        "--models=NAME,... (or --models=* for any)": change.get("models"),
    }
    missing = " and ".join(flag for flag, value in needed.items() if not value)
    if missing:
        shown = one_line(provider_id, 80), missing
        raise UsageError("there is no provider %s yet; to add it, give %s as well" % shown)
    return {"id": provider_id}


def _take_in_format(provider: Json, change: Json) -> None:
    """The preferred format must be among the formats: a single old one gives way to it, several take it in."""
    formats, preferred = as_list(get_field(provider, "provider", "formats")), change.get("format")
    if preferred and formats and _wire_of(preferred) not in map(_wire_of, filter(as_text, formats)):
        kept = [] if len(formats) == 1 and "formats" not in change else formats
        _put(provider, "provider", "formats", [*kept, preferred])


def _as_object(holder: Json, key: str, value: Any) -> Json:
    """The value of a field as an object. One URL for every format, as older files have it, becomes the base URL."""
    is_url = key == "baseUrlByFormat" and value and not isinstance(value, dict)
    if is_url and get_field(holder, "provider", "baseUrl") is None:
        _put(holder, "provider", "baseUrl", value)
    return as_dict(value)


def _put_models(provider: Json, names: Sequence[str]) -> List[str]:
    """Make `names` the provider's models; what became of the old ones."""
    wanted, old = dict.fromkeys(names), _models_of(provider)
    by_id = {_id_of(entry): entry for entry in reversed(old)}
    gone = [entry for entry in old if _id_of(entry) not in wanted]
    disabled = [entry for entry in gone if _is_off(entry)]
    _put(provider, "provider", "models", [by_id.get(name, {"id": name}) for name in wanted] + disabled)
    dropped = ", ".join(_id_of(entry) for entry in gone if not _is_off(entry))
    return ["models: " + ", ".join(wanted)] + (["no longer listed: " + dropped] if dropped else [])


# ----- any field, by its place -----

Place = Tuple[Union[str, int], ...]  # ("providers", 0, "models", 2): keys as in FIELDS, and indices

_KIND_AT = {"providers": "provider", "models": "model", "auth": "auth", "timeouts": "timeouts"}
_GONE = Value()  # in place of a reference that goes


def look_at(document: Json, place: Place) -> Tuple[Any, str]:
    """A copy of what stands at `place` and its kind, a row of FIELDS; an empty object where there is nothing, the kind
    "" for a plain one. UsageError when an entry of a list is not there."""
    return _walk(_open(document)[0], place)


def set_field(document: Json, place: Place, key: str, value: Any) -> Edit:
    """Set one field of the object at `place`; None removes it. A new id is taken over wherever the old one is named,
    and references to what is no longer there go. UsageError when the value cannot be used."""
    new, _ = _open(document)
    raw, kind = _walk(new, place)
    owner = "/".join(_id_of(_walk(new, place[: i + 1])[0]) for i, s in enumerate(place) if isinstance(s, int))
    if kind in ("provider", "model") and key == "id" and value:
        end = "/" if kind == "provider" else ""
        _rename_references(new, owner + end, owner[: -len(_id_of(raw)) or None] + value + end)
    _put(raw, kind, key, value)
    if not raw and place and isinstance(place[-1], str):
        del _walk(new, place[:-1])[0][place[-1]]
    shown = json.dumps(mask_document({key: value})[key], ensure_ascii=False) if value is not None else "removed"
    words = " ".join(filter(None, (owner, *(s for s in place[-1:] if s in ("auth", "timeouts")), key)))
    return _finish(document, new, ["%s: %s" % (words, shown)], True, path_of((*place, key)))


def path_of(place: Place) -> str:
    """A place as the path that problems bear: `providers[0].models[2].id`."""
    path = ""
    for step in place:
        path = "%s[%d]" % (path, step) if isinstance(step, int) else _join(path, step)
    return path


def move_entry(document: Json, place: Place, step: int) -> Edit:
    """Move the provider or model at `place` by `step` in its list; at the list's end it stays."""
    new, _ = _open(document)
    entries, at = _walk(new, place[:-1])[0], int(place[-1])
    look_at(document, place)  # what was moved on a screen may be gone from the file
    entry = entries.pop(at)
    entries.insert(max(0, at + step), entry)
    return _finish(document, new, ["moved " + _id_of(entry)])


def _walk(document: Json, place: Place) -> Tuple[Any, str]:
    """What stands at `place` in a document that may be changed, made where it is missing, and its kind."""
    node, kind = document, "config"
    for step in place:
        if isinstance(step, int):
            if step >= len(node):
                raise UsageError("the entry is no longer there")
            node[step] = {"id": node[step]} if isinstance(node[step], str) else as_dict(node[step])
            node = node[step]
            continue
        value = _models_of(node) if step == "models" else get_field(node, kind, step) if kind else node.get(step)
        value = value if step in ("providers", "models") else _as_object(node, step, value)
        _put(node, kind, step, value)
        node, kind = value, _KIND_AT.get(step, "")
    return node, kind


def _rename_references(document: Json, old: str, new: str) -> None:
    """Put `new` in place of `old`: the ref of a model, which may be named by its id alone, too, or the id of a provider
    with its slash. Providers are found in any case."""
    (provider_id, _, model_id), index = old.partition("/"), _index_of(document)

    def renamed(ref: str, aliases: bool) -> str:
        owners = [provider.id for provider, _ in index.find(ref)] if ref == model_id else []
        if owners == [provider_id] and not (aliases and ref in index.aliases):
            return new
        is_meant = ref.lower().startswith(provider_id.lower() + "/") and model_id in ("", ref[len(provider_id) + 1 :])
        return new + ref[len(old) :] if is_meant else ref

    _map_references(document, renamed)


# ----- what an edit would break -----


def _finish(old: Json, new: Json, notes: List[str], drops: bool = False, field: str = "") -> Edit:
    """The edit, refused with UsageError when it brings in an error that was not there before, or leaves one in `field`,
    the path of what it set. drops: references that it left dangling go as well."""
    notes += _drop_references(old, new) if drops else []
    known = [problem.message for problem in find_problems(old) if problem.level == "error"]
    for problem in find_problems(new):
        if problem.level == "error":
            if problem.message not in known or field and (problem.path + "[").startswith(field + "["):
                raise UsageError(show_problem(problem))
            known.remove(problem.message)
    return Edit(new, tuple(notes))


def _drop_references(old: Json, new: Json) -> List[str]:
    """Remove from `new` every reference that meant a model in `old` and means none any more; says which."""
    before, notes, more = _index_of(old), [], [""]

    def left(ref: str, aliases: bool) -> Any:
        was_none, is_none = (index.judge(ref, aliases) in ("unknown", "alias") for index in (before, after))
        return _GONE if is_none and not was_none else ref

    while more:  # an alias that goes takes along what led to it
        after = _index_of(new)
        more = _map_references(new, left)
        notes += more
    return notes


def _map_references(document: Json, change: Callable[[str, bool], Any]) -> List[str]:
    """Put `change(ref, may_be_an_alias)` in place of each reference, none where it is _GONE; says which those were."""
    notes = []
    for holder, key, aliases, words, emptied in _references_in(document):
        refs = holder[key] if isinstance(holder[key], list) else [holder[key]]
        changed = [(ref, change(ref, aliases) if isinstance(ref, str) else ref) for ref in refs]
        left = [new for _, new in changed if new is not _GONE]
        lost = [old for old, new in changed if new is _GONE]
        holder[key] = left[0] if left and refs is not holder[key] else left
        if lost:
            notes.append("%s %s" % (words, ", ".join(lost)))
        if lost and emptied and not left:
            del holder[key]
            notes.append(emptied)
    return notes


def _index_of(document: Json) -> ModelIndex:
    config = scan_config(document, {})[0]
    return ModelIndex(config.providers, config.aliases)


def _references_in(document: Json) -> List[Tuple[Json, str, bool, str, str]]:
    """Where references stand: the object, its key, whether they may name aliases, what to say of one that is dropped,
    and of a key that goes with its last one."""
    aliases = as_dict(get_field(document, "config", "modelAliases"))
    rows = [(aliases, a, False, "alias %s no longer leads to" % a, "removed alias %s" % a) for a in aliases]
    for provider in map(as_dict, as_list(get_field(document, "config", "providers"))):
        for model in map(as_dict, _models_of(provider)):
            key = find_key(model, "model", "fallbackModels")
            place = "%s/%s" % (get_field(provider, "provider", "id"), _id_of(model))
            rows += [(model, key, True, place + " no longer falls back to", "")] if key else []
    key = find_key(document, "config", "defaultModel")
    return rows + ([(document, key, True, "the default model was", "there is no default model")] if key else [])


# ==============================================================================
# 6 SSE - bytes to server-sent events and back, incrementally [pure]
# ==============================================================================
#
# WHATWG HTML, "Server-sent events": lines end in LF, CR or CRLF, a blank line ends an event, the
# space after the colon is optional, lines that start with a colon are comments. Bytes are only
# decoded as whole events, so a character may be cut anywhere by the network.

_BLANK_LINE = re.compile(rb"(?:\r\n|\r(?!\n)|\n)" * 2)  # as {2} it would be four times as slow

MAX_EVENT_BYTES = 64 << 20


class SseEvent(NamedTuple):
    """One event: `name` from its `event:` field ("" without), `data` its data lines joined by LF."""

    name: str
    data: str


class EventSplitter:
    """Cuts a byte stream after whole events: `feed` returns all complete ones, still raw, and keeps the rest.

    A CR at the end of a chunk may be half of a CRLF; cutting after it is harmless, since the LF that
    follows then only makes an empty event. Work is linear in the bytes, however they are cut.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """The raw bytes up to the last event border in everything fed so far. UpstreamError for an endless event."""
        held = self._held
        if not held and data.endswith(b"\n\n"):
            return data
        start = max(0, len(held) - 3)  # where a border may begin that ends in the new bytes
        held += data
        if held.find(b"\r", start) >= 0:
            cut = max((match.end() for match in _BLANK_LINE.finditer(held, start)), default=0)
        else:
            cut = held.rfind(b"\n\n", start) + 2 if held.find(b"\n\n", start) >= 0 else 0
        whole = bytes(held[:cut])
        del held[:cut]
        if len(held) > self._max_event_bytes:
            raise UpstreamError("an event is larger than %d bytes" % self._max_event_bytes, "event_too_large")
        return whole

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished event are held."""
        return len(self._held)

    def finish(self) -> bytes:
        """What came after the last border: an event that the stream's end cut off, or one without its blank line."""
        rest, self._held = bytes(self._held), bytearray()
        return rest


def parse_events(raw: bytes) -> List[SseEvent]:
    """The events in `raw`, which must be cut at event borders. Comments, ids and retry fields are dropped."""
    text = str(raw, "utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    events: List[SseEvent] = []
    name, data = "", []
    # One byte order mark at the start is no part of the stream (WHATWG); the last event may lack its blank line.
    for line in (text[text.startswith("\ufeff") :] + "\n\n").split("\n"):
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value[value.startswith(" ") :])
        elif field == "event":
            name = value.strip()
        elif not line:
            if data:
                events.append(SseEvent(name, "\n".join(data)))
            name, data = "", []
    return events


class Stencil(NamedTuple):
    """What events have in common that differ in one JSON string only, as nearly all of a streamed answer do: the text
    `before` that string, with its opening quote, and the text `after` it. To look through it costs a fraction of
    parsing the event."""

    before: str
    after: str

    def text_in(self, raw: bytes) -> str:
        """The string, when `raw` is exactly one more such event; "" when it is anything else."""
        whole = str(raw, "utf-8", "replace")
        if not whole.startswith(self.before):
            return ""
        try:
            text, end = _scan_string(whole, len(self.before))
        except ValueError:
            return ""
        return text if whole[end:] == self.after else ""


_scan_string = json.decoder.scanstring


def make_stencil(raw: bytes, text: str) -> Optional[Stencil]:
    """The stencil of the event `raw`, in which `text` is a JSON string; None where it cannot be told which one."""
    whole = str(raw, "utf-8", "replace")
    before, found, after = whole.partition('"%s"' % text)
    is_sure = found and "\\" not in whole and found not in after  # without escapes every string stands as it is
    return Stencil(before + '"', after) if is_sure else None


def sse_event(data: bytes, name: str = "") -> bytes:
    """One event on the wire. `data` must hold no line break (JSON from `dump_json` never does)."""
    if name:
        return b"event: %s\ndata: %s\n\n" % (name.encode("ascii"), data)
    return b"data: %s\n\n" % data


SSE_COMMENT = b": keep-alive\n\n"  # every SSE client ignores it: a sign of life that carries nothing


# ==============================================================================
# 7 HTTP - HTTP/1.1 messages: bytes to requests and answers, answers to bytes [pure]
# ==============================================================================
#
# RFC 9110 and 9112, sans-IO. Towards clients every doubt is refused: what two parsers could read in
# two ways is how requests are smuggled. Towards upstreams only doubts about where a message ends are.
# What goes wrong depends on the bytes and never on how the network cut them: heads are read whole and
# fast; only a head that is late or wrong is walked line by line, to refuse it at its first bad byte.

_TCHARS = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = r"[\t -~\x80-\xff]*"
# Printable ASCII without " # < > \ and space. RFC 3986 allows fewer, but WHATWG URLs leave [ ] { } | ^ ` as they are.
_TARGET = r"[!$-;=?-\[\]-~]+"
_REQUEST_LINE = re.compile(r"(%s) (%s) HTTP/([0-9]\.[0-9])(?=\r\n|\Z)" % (_TCHARS, _TARGET))
_FIELDS = re.compile(r"\r\n(%s):(%s)(?=\r\n|\Z)" % (_TCHARS, _VALUE))
_FIELD_LINE = re.compile("%s:%s" % (_TCHARS, _VALUE))
_NOT_IN_REQUEST_LINE = re.compile(rb"[^ -~\r\n]|\r[^\n]|(?<!\r)\n")
_NOT_IN_FIELD_LINE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n")
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_AUTHORITY_FORM = re.compile(r".+:[0-9]+")
_REG_NAME = r"(?=[^:[])[A-Za-z0-9._~!$&'()*+,;=-]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9._~!$&'()*+,;=-]*)*"
_HOST = re.compile(r"(?:" + _REG_NAME + r"|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{0,5}))?")
_DIGITS = re.compile(r"[0-9]+")
_TOKEN_CHARS = re.compile(_TCHARS)
_CODINGS_THEN_CHUNKED = re.compile(r"(?:(?!(?:chunked|identity)[ \t]*,)%s[ \t]*,[ \t]*)*chunked" % _TCHARS)
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = r"[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?" % (_TCHARS, _TCHARS, _QUOTED)
_CHUNK_LINE = re.compile((r"([0-9A-Fa-f]{1,16})((?:%s)*)\r\n" % _EXTENSION).encode("latin-1"))
_CHUNK_LINE_SO_FAR = re.compile(rb"[0-9A-Fa-f]{1,16}(?:[ \t;][\t -~\x80-\xff]*)?\r?")
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_SPECIAL = {"host": 0, "content-length": 1, "transfer-encoding": 2, "expect": 3, "connection": 4}
_VERSIONS = {"1.1": (1, 1), "1.0": (1, 0)}
_MAX_LENGTH_DIGITS, _ENDLESS = 19, 1 << 80
Fault = Callable[[str, int, str], RouterError]


class HttpError(RouterError):
    """A request that HTTP forbids to serve: answer it, then close. request: its head, if that could be read."""

    request: Optional[HttpRequest] = None


class UpstreamProtocolError(RouterError):
    """An upstream's answer that is not HTTP ("upstream_bad_response") or ends too early ("upstream_truncated")."""

    before = b""  # the body bytes in front of the fault that came in one piece with it

    def __init__(self, message: str, status: int = 502, code: str = "") -> None:
        code = code if code == "upstream_truncated" else "upstream_bad_response"
        super().__init__("the upstream's answer is not valid HTTP: " + message, 502, code)


def answer_fault(message: str, status: int, code: str) -> RouterError:
    """What is wrong with a compressed answer. One too large for us says nothing of the upstream, and nobody is asked
    again for it: whoever is asked wants to be paid again."""
    if status == 413:
        return RouterError("the answer is larger than max_answer_bytes", 502, "answer_too_large")
    return UpstreamProtocolError(message, status, code)


class HttpLimits(NamedTuple):
    """What a client may send. Beyond: the status in brackets."""

    max_line_bytes: int = 8192  # the request line (414)
    max_head_bytes: int = 65536  # request line, headers and blank line (431)
    max_header_count: int = 100  # (431)
    max_body_bytes: int = 64 << 20  # after dechunking (413)
    max_chunk_line_bytes: int = 1024  # one chunk-size line (400)
    max_extension_bytes: int = 16384  # the chunk extensions of one body together (400)
    max_trailer_bytes: int = 8192  # (431)
    max_trailer_count: int = 32  # (431)
    max_blank_lines: int = 4  # CRLFs in front of a request line (400; RFC 9112 2.2 wants at least one ignored)


_DEFAULT_LIMITS = HttpLimits()
_ANSWER_LIMITS = HttpLimits(max_body_bytes=_ENDLESS)  # how long an answer may be is the gateway's business


class HttpRequest(NamedTuple):
    """A request's head. headers: lower-case names, values without outer blanks, latin-1, in order. version: (1, 0 or 1)

    target: in origin-form, also when absolute-form came; "*" for OPTIONS *, host:port for CONNECT (`path` is then "").
    path: not percent-decoded. keep_alive: whether the connection may serve another request after this one.
    """

    method: str
    target: str
    path: str
    query: str
    version: Tuple[int, int]
    headers: Headers
    keep_alive: bool


class RequestParser:
    """Bytes of one client connection to requests: `feed` what was received; `head()` and `body()` give a request's
    parts once they are complete, or raise HttpError (the parser is of no use then); `next()` goes on to the one behind.
    """

    def __init__(self, limits: HttpLimits = _DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._buffer, self._start = b"", 0
        self._reset()

    def _reset(self) -> None:
        self._searched = self._blank_lines = 0
        self._lines = self._head = self._decoder = self._body = None
        self._awaits_continue, self._collected = False, bytearray()

    def feed(self, data: bytes) -> None:
        """Take received bytes."""
        if self._start == len(self._buffer):
            self._buffer = data
        else:
            held = self._buffer = self._buffer if isinstance(self._buffer, bytearray) else bytearray(self._buffer)
            del held[: self._start]
            held += data
        self._start = 0

    def head(self) -> Optional[HttpRequest]:
        """The request without its body, None while its head is incomplete. HttpError: 400 414 417 431 501 505."""
        if self._head is None and self._start < len(self._buffer):
            while self._buffer.startswith(b"\r\n", self._start):
                self._start += 2
                self._blank_lines += 1
                if self._blank_lines > self._limits.max_blank_lines:
                    raise HttpError("too many blank lines before the request", 400, "bad_request_line")
            self._find_head()
        return self._head

    def body(self) -> Optional[bytes]:
        """The whole body (b"" when the request has none), or None while it is incomplete. HttpError: 400, 413, 431."""
        decoder = self._decoder
        if self._body is None and decoder is not None:
            start, end = self._start, min(len(self._buffer), self._start + decoder.wanted)
            self._awaits_continue = self._awaits_continue and start == end
            data = decoder.feed(bytes(self._buffer[start:end]))
            self._start = end
            if end == len(self._buffer):
                self._buffer, self._start = b"", 0  # a large body is not to be held twice
            if self._collected or not decoder.complete:
                # Not a list of parts: millions of one-byte chunks would cost 50 times their size in objects.
                self._collected += data
            if decoder.complete:
                self._body, self._collected = bytes(self._collected or data), bytearray()
                if decoder.surplus:
                    self._buffer, self._start = decoder.surplus, 0
        return self._body

    def take_body(self) -> bytes:
        """The whole body, once: who takes it says how long it is kept."""
        body, self._body = self._body, b""
        return body or b""

    def drop_body(self) -> None:
        """Nobody wants what has been read of the body; it can be read on to its end all the same."""
        self._collected, self._body = bytearray(), self._body and b""

    def next(self) -> None:
        """Go on to the next request. Only after `body()` gave the last one's: RouterError (500) otherwise."""
        if self._body is None:
            raise RouterError("the request before has not been read to its end", 500, "internal_error")
        self._reset()

    # Whether the client waits for "100 Continue" before it sends the body (RFC 9110 10.1.1).
    expects_continue = property(lambda self: self._awaits_continue and self._start == len(self._buffer))
    # Whether the present request is, or begins like, one whose answer has no body.
    is_head = property(
        lambda self: self._head.method == "HEAD" if self._head else self._buffer.startswith(b"HEAD ", self._start)
    )
    # Whether a byte of the current request has arrived; blank lines in front of it do not count.
    started = property(lambda self: bool(self._head or self._buffer[self._start : self._start + 2].strip(b"\r\n")))
    # Whether bytes behind the present request are there.
    has_more = property(lambda self: self._start < len(self._buffer))
    # How many bytes of the body are still to come: 0 when only its chunks tell, endless from who waits to send it.
    unread = property(lambda self: _ENDLESS if self.expects_continue else self._decoder.wanted % _ENDLESS)
    # How many bytes of the body were read so far.
    body_size = property(lambda self: len(self._collected if self._body is None else self._body))

    def _find_head(self) -> None:
        buffer, start, limits, fault = self._buffer, self._start, self._limits, None
        end = buffer.find(b"\r\n\r\n", start + self._searched)
        if end >= 0 and end + 4 - start <= limits.max_head_bytes:
            try:
                self._head, self._decoder, self._awaits_continue = _read_request_head(buffer[start:end], limits)
                self._start = end + 4
                return
            except HttpError as error:
                fault = error
        self._searched = max(0, len(buffer) - start - 3)
        if self._lines is None:
            self._lines = _LineCheck(limits.max_line_bytes, limits.max_head_bytes, limits.max_header_count, HttpError)
        self._lines.check(buffer, start)
        if fault is not None:
            raise fault


def _read_request_head(data: bytes, limits: HttpLimits) -> Tuple[HttpRequest, Any, bool]:
    """(request, decoder of its body, whether it waits for 100 Continue). _LineCheck finds a line's exact fault."""
    text = str(data, "latin-1")
    method, target, authority, version, end = _read_request_line(text)
    found = _FIELDS.findall(text, end)
    if end > limits.max_line_bytes or len(found) != text.count("\r\n", end) or len(found) > limits.max_header_count:
        raise HttpError("a header line is malformed", 400, "bad_header")
    headers = [(name.lower(), value.strip(" \t")) for name, value in found]
    special, keep_alive = _read_special(headers, version)
    if authority is not None:  # HTTP/1.0 may come without Host
        headers = [pair for pair in headers if pair[0] != "host"] + [("host", authority)]
    path, _, query = target.partition("?") if method != "CONNECT" else ("", "", "")
    request = HttpRequest(method, target, path, query, version, headers, keep_alive)
    try:
        decoder, awaits_continue = _read_framing(version, special, limits)
    except HttpError as error:
        error.request = request
        raise
    return request, decoder, awaits_continue


def _read_request_line(text: str) -> Tuple[str, str, Optional[str], Tuple[int, int], int]:
    """(method, target, authority, version, length) of the line that `text` begins with.

    RFC 9112 3.2: a fragment or a form that the method does not allow is 400. The form is judged before the version,
    so that HTTP/2's preface ("PRI * HTTP/2.0") is 400 like any other thing that is not meant for us.
    """
    line = _REQUEST_LINE.match(text)
    if line is None:
        raise HttpError("the request line is malformed", 400, "bad_request_line")
    method, target, digits = line.groups()
    authority = None
    if method == "CONNECT" or target[0] != "/":
        target, authority = _read_other_form(method, target)
    if digits[0] != "1":
        raise HttpError("only HTTP/1.0 and HTTP/1.1 are spoken here", 505, "http_version_not_supported")
    # RFC 9110 2.5: a higher minor version is to be processed as the highest one known.
    return method, target, authority, _VERSIONS.get(digits, (1, 1)), line.end()


def _read_other_form(method: str, target: str) -> Tuple[str, Optional[str]]:
    """(target, the authority in it) of a target that is not a path. RFC 9112 3.2.2: absolute-form must be accepted, and
    its authority be taken instead of Host. Userinfo in it is refused: RFC 9110 4.2.4."""
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if method == "CONNECT":
        if _AUTHORITY_FORM.fullmatch(target) and _is_host(target):
            return target, target
    elif target == "*" and method == "OPTIONS":
        return target, None
    elif absolute and _is_host(absolute.group(1)):
        authority, rest = absolute.groups()
        if not rest and method == "OPTIONS":
            return "*", authority
        return (rest if rest.startswith("/") else "/" + rest), authority
    raise HttpError("the request target is malformed", 400, "bad_request_line")


def _is_host(text: str) -> bool:
    """RFC 9110 7.2, uri-host [":" port], without an empty host: 4.2.1 calls such http URIs invalid."""
    match = _HOST.fullmatch(text)
    if match is None or int(match.group(2) or 0) > 65535:
        return False
    if match.group(1) is not None:
        from ipaddress import IPv6Address  # late: few hosts are written so

        try:
            IPv6Address(match.group(1))
        except ValueError:
            return False
    return True


def _read_special(headers: Headers, version: Tuple[int, int]) -> Tuple[Tuple[List[str], ...], bool]:
    """(the values of each header in _SPECIAL, whether the connection outlives the message: RFC 9112 9.3)."""
    special: Tuple[List[str], ...] = ([], [], [], [], [])
    for name, value in headers:
        if name in _SPECIAL:
            special[_SPECIAL[name]].append(value)
    if not special[4]:
        return special, version == (1, 1)
    options = [option.strip(" \t") for option in ",".join(special[4]).lower().split(",")]
    return special, "close" not in options and (version == (1, 1) or "keep-alive" in options)


def _read_framing(version: Tuple[int, int], special: Tuple[List[str], ...], limits: HttpLimits) -> Tuple[Any, bool]:
    """(decoder of the body, whether the client waits for 100 Continue). RFC 9112 3.2: one valid Host. 6.1 and 6.3 read
    strictly: one Content-Length or one "chunked", never both or twice, else 400; 501 for a coding before it."""
    hosts, lengths, codings, expected, _ = special
    if len(hosts) > 1 or not (_is_host(hosts[0]) if hosts else version == (1, 0)):
        raise HttpError("the request needs exactly one valid Host header", 400, "bad_host")
    length = 0
    if codings:
        coding = ",".join(codings).lower()
        if lengths or version == (1, 0) or not _CODINGS_THEN_CHUNKED.fullmatch(coding):
            raise HttpError("Transfer-Encoding must stand alone, be chunked, in HTTP/1.1", 400, "bad_transfer_encoding")
        if coding != "chunked":
            raise HttpError("the only transfer coding known here is chunked", 501, "unknown_transfer_coding")
    elif lengths:
        if len(lengths) > 1 or not _DIGITS.fullmatch(lengths[0]):
            raise HttpError("Content-Length is malformed or repeated", 400, "bad_content_length")
        length = int(lengths[0]) if len(lengths[0]) <= _MAX_LENGTH_DIGITS else _ENDLESS
    expects = bool(expected) and version == (1, 1)
    if expects and {value.lower() for value in expected} != {"100-continue"}:
        raise HttpError("the only expectation known here is 100-continue", 417, "expectation_failed")
    decoder = ChunkDecoder(limits, HttpError) if codings else _LengthDecoder(length, limits.max_body_bytes)
    return decoder, expects and not decoder.complete


class _LineCheck:
    """Walks the lines of a head or of trailers as they arrive; refuses the first byte or line that cannot be right.

    max_line_bytes: of the request line, 0 when there is none. All positions are relative to the section's start.
    """

    def __init__(self, max_line_bytes: int, max_bytes: int, max_count: int, fault: Fault) -> None:
        self._limits = (max_line_bytes, max_bytes, max_count)
        self._fault = fault
        self._line = self._scanned = self._count = 0

    def check(self, buffer: Union[bytes, bytearray], start: int) -> int:
        """The size of the section with its blank line, or 0 while that has not come."""
        max_line_bytes, max_bytes, max_count = self._limits
        while True:
            end = buffer.find(b"\n", start + self._scanned)
            stop = end + 1 or len(buffer)
            first = max_line_bytes > 0 and not self._line
            cap = start + (max_line_bytes + 2 if first else max_bytes)
            forbidden = _NOT_IN_REQUEST_LINE if first else _NOT_IN_FIELD_LINE
            # The look-behind of `forbidden` may see the message before, which could have ended in CR.
            begins_with_lf = buffer.startswith(b"\n", start + self._line)
            if begins_with_lf or forbidden.search(buffer, start + self._scanned, min(stop, cap)):
                raise self._fault("a line holds a control character, or does not end in CRLF", 400, "bad_line")
            if stop > cap and first:
                raise self._fault("the request line is over %d bytes" % max_line_bytes, 414, "request_line_too_long")
            if stop > cap:
                raise self._fault("the headers are over %d bytes" % max_bytes, 431, "headers_too_large")
            if end < 0:
                self._scanned = max(self._line, stop - 1 - start)
                return 0
            line = str(buffer[start + self._line : end - 1], "latin-1")
            if not line:
                return stop - start
            if first:
                _read_request_line(line)
            elif not _FIELD_LINE.fullmatch(line):
                raise self._fault("a header line is malformed", 400, "bad_header")
            elif self._count == max_count:
                raise self._fault("there are more than %d headers" % max_count, 431, "too_many_headers")
            self._count += not first
            self._line = self._scanned = stop - start


class _LengthDecoder:
    """A body of `length` bytes, read like ChunkDecoder does it. wanted: how many bytes of input it can use at most.
    most: a longer body is refused, but not before somebody reads it (HttpError 413)."""

    __slots__ = ("complete", "surplus", "wanted", "_most")

    def __init__(self, length: int, most: int = _ENDLESS) -> None:
        self.complete, self.surplus, self.wanted, self._most = not length, b"", length, most

    def feed(self, data: bytes) -> bytes:
        if self.wanted > self._most:
            raise HttpError("the body is larger than %d bytes" % self._most, 413, "request_too_large")
        body = data[: self.wanted]
        self.wanted -= len(body)
        if not self.wanted:
            self.complete = True
            self.surplus += data[len(body) :]
        return body


class ChunkDecoder:
    """Chunked transfer coding (RFC 9112 7.1) to bytes, for requests and answers, as strict for both.

    complete: the end was read; surplus: what came behind it. size: body bytes announced so far. fault: makes the error.
    """

    wanted = _ENDLESS

    def __init__(self, limits: HttpLimits, fault: Fault) -> None:
        self._limits, self._fault = limits, fault
        self.complete, self.surplus, self._held = False, b"", b""
        self.size = self._left = self._extension_bytes = 0
        # Plain functions, not bound methods: those would tie the object to itself, and its memory to the collector.
        self._step: Callable[[ChunkDecoder, bytes, int, List[bytes]], int] = ChunkDecoder._read_size

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` brought. Raises `fault` (400, 413, 431)."""
        if self._held:
            data, self._held = self._held + data, b""
        parts: List[bytes] = []
        position, size = 0, len(data)
        if self._step is ChunkDecoder._read_size:
            begin = data.find(b"\r\n", 0, 9) + 2
            digits = data[: max(begin - 2, 0)]
            # Exactly one whole chunk without extensions: what nearly every event of a stream is.
            if digits and not digits.strip(_HEX_DIGITS) and begin + int(digits, 16) + 2 == size > begin + 2:
                if data.endswith(b"\r\n") and self.size + size <= self._limits.max_body_bytes:
                    self.size += size - begin - 2
                    return data[begin:-2]
        try:
            while position < size:
                after = self._step(self, data, position, parts)
                if after == position:
                    self._held = data[position:]
                    break
                position = after
        except UpstreamProtocolError as fault:
            fault.before = b"".join(parts)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_size(self, data: bytes, position: int, parts: List[bytes]) -> int:
        limits, line = self._limits, _CHUNK_LINE.match(data, position)
        if line is None or line.end() - position > limits.max_chunk_line_bytes:
            if len(data) - position > limits.max_chunk_line_bytes or not _CHUNK_LINE_SO_FAR.fullmatch(data, position):
                raise self._fault("a chunk-size line is malformed", 400, "bad_chunk")
            return position
        digits, extension = line.groups()
        size, begin = int(digits, 16), line.end()
        if extension:
            self._extension_bytes += len(extension)
            if self._extension_bytes > limits.max_extension_bytes:
                raise self._fault("the chunk extensions are too large", 400, "bad_chunk")
        if not size:
            self._trailers = _LineCheck(0, limits.max_trailer_bytes, limits.max_trailer_count, self._fault)
            self._step = ChunkDecoder._read_trailers
            return begin
        self.size += size
        if self.size > limits.max_body_bytes:
            raise self._fault("the body is larger than %d bytes" % limits.max_body_bytes, 413, "request_too_large")
        end = begin + size
        if data.startswith(b"\r\n", end):
            parts.append(data[begin:end])
            return end + 2
        self._left = size
        self._step = ChunkDecoder._read_data
        return begin

    def _read_data(self, data: bytes, position: int, parts: List[bytes]) -> int:
        if self._left:
            part = data[position : position + self._left]
            parts.append(part)
            self._left -= len(part)
            return position + len(part)
        if data.startswith(b"\r\n", position):
            self._step = ChunkDecoder._read_size
            return position + 2
        if data[position:] != b"\r":
            raise self._fault("a chunk does not end in CRLF", 400, "bad_chunk")
        return position

    def _read_trailers(self, data: bytes, position: int, parts: List[bytes]) -> int:
        if not self.complete:
            size = self._trailers.check(data, position)
            if not size:
                return position
            self.complete = True
            position += size
        self.surplus += data[position:]
        return len(data)


# How zlib is told to read each content coding (RFC 9110 8.4.1); 0: by the first byte.
_CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 0, "identity": None, "": None}
_MAX_GZIP_MEMBERS, _STEP_BYTES = 4096, 65536


def looks_gzipped(data: bytes) -> bool:
    """Whether bytes that nobody declared as compressed start like gzip (RFC 1952): no JSON or SSE does (trap 18)."""
    return data.startswith(b"\x1f\x8b")


def inflate(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """`data` without its content coding, see Inflater. RouterError: 413 above `max_bytes`, 400 corrupt, 415 unknown."""
    inflater = Inflater(encoding, max_bytes, RouterError)
    plain = inflater.feed(data)
    inflater.finish()
    return plain


class Inflater:
    """Compressed bytes to plain ones as they arrive: gzip of any number of members, deflate, identity.

    encoding: the value of a content-encoding header. fault: makes the error out of message, status and code.
    """

    def __init__(self, encoding: str, max_bytes: int, fault: Fault = UpstreamProtocolError) -> None:
        name = encoding.strip(" \t").lower()
        if name not in _CODINGS:
            told = "the content encoding %s is not known here: only gzip, deflate and identity" % one_line(name, 40)
            raise fault(told, 415, "unsupported_encoding")
        self._wbits, self._left, self._fault = _CODINGS[name], max_bytes, fault
        self._zlib, self._members = None, 0

    def feed(self, data: bytes) -> bytes:
        """The plain bytes that `data` brought. Raises `fault`: 400 corrupt, 413 above `max_bytes` in total."""
        if self._wbits is None:
            return self._count(data)
        return b"".join([self._inflate(data[at : at + _STEP_BYTES]) for at in range(0, len(data), _STEP_BYTES)])

    def finish(self) -> None:
        """The end of the data. Raises `fault` (400) when it is cut off; no data at all is fine."""
        if self._zlib is not None and not self._zlib.eof:
            raise self._fault("the compressed body is cut off", 400, "bad_encoding")

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise self._fault("the decompressed body is too large", 413, "request_too_large")
        return data

    def _inflate(self, data: bytes) -> bytes:
        parts = []
        while data:
            if self._zlib is None or self._zlib.eof:
                data = data.lstrip(b"\0") if self._members else data
                if not data:
                    break
                if self._members and (self._wbits != 31 or self._members == _MAX_GZIP_MEMBERS):
                    raise self._fault("the compressed body has bytes behind its end", 400, "bad_encoding")
                self._members += 1
                # Some leave zlib's wrapper out of "deflate"; its first byte ends in 8 (RFC 1950 2.2).
                self._zlib = zlib.decompressobj(self._wbits or (15 if data[0] & 15 == 8 else -15))
            try:
                # One byte more than allowed is asked for, so nothing is left unconsumed without being too much.
                parts.append(self._count(self._zlib.decompress(data, self._left + 1)))
            except zlib.error:
                raise self._fault("the compressed body is corrupt", 400, "bad_encoding") from None
            data = self._zlib.unused_data
        return b"".join(parts)


# Phrases for people who read raw answers; clients go by the number.
_REASON_ROWS = """\
    100 Continue, 200 OK, 201 Created, 202 Accepted, 204 No Content, 304 Not Modified, 400 Bad Request,
    401 Unauthorized, 402 Payment Required, 403 Forbidden, 404 Not Found, 405 Method Not Allowed,
    408 Request Timeout, 409 Conflict, 410 Gone, 413 Content Too Large, 414 URI Too Long,
    415 Unsupported Media Type, 417 Expectation Failed, 421 Misdirected Request, 422 Unprocessable Content,
    426 Upgrade Required, 429 Too Many Requests, 431 Request Header Fields Too Large, 451 Unavailable For Legal Reasons,
    500 Internal Server Error, 501 Not Implemented, 502 Bad Gateway, 503 Service Unavailable,
    504 Gateway Timeout, 505 HTTP Version Not Supported, 529 Overloaded"""
_REASONS = {int(row[:3]): row[4:] for row in re.split(r",\s+", _REASON_ROWS.strip())}
LAST_CHUNK = b"0\r\n\r\n"
_UNSAFE = re.compile(r"[^\t -~\x80-\xff]")
_UPSTREAM_TARGET = re.compile(r"[!-~]+")


def render_head(status: int, headers: Sequence[Tuple[str, str]]) -> bytes:
    """An answer's status line, headers and blank line. RouterError (500) for what HTTP forbids, as a line's end."""
    return _render_lines("HTTP/1.1 %d %s" % (status, _REASONS.get(status, "")), headers)


def render_response(
    status: int, headers: Headers, body: bytes, *, head_only: bool, keep_alive: bool, date: str
) -> bytes:
    """A whole answer, with connection, content-length and (unless `date`, an HTTP date, is "") date added.

    head_only: the request was HEAD: no body, but its length. 1xx, 204 and 304 have neither (RFC 9110 8.6).
    """
    bodiless = status in (204, 304) or status < 200
    length = [] if bodiless else [("content-length", str(len(body)))]
    added = [("connection", "keep-alive" if keep_alive else "close"), *length, ("date", date)]
    head = render_head(status, [*headers, *(added if date else added[:-1])])
    return head if head_only or bodiless else head + body


def render_upstream_request(method: str, path: str, headers: Sequence[Tuple[str, str]], body: bytes) -> bytes:
    """A whole request to an upstream. path: with its query. headers: with Host, without length. RouterError (500)."""
    if not _TOKEN_CHARS.fullmatch(method) or not _UPSTREAM_TARGET.fullmatch(path):
        raise RouterError("the upstream's method or path has a character that HTTP forbids", 500, "unsafe_header")
    if body or method in ("POST", "PUT", "PATCH"):
        headers = [*headers, ("content-length", str(len(body)))]
    return _render_lines("%s %s HTTP/1.1" % (method, path), headers) + body


def hop_by_hop(headers: Sequence[Tuple[str, str]]) -> Set[str]:
    """The headers that `Connection` names: meant for this connection alone, not to be passed on (RFC 9110 7.6.1)."""
    return {name.strip(" \t") for key, value in headers if key == "connection" for name in value.lower().split(",")}


def encode_chunk(data: bytes) -> bytes:
    """`data` as one chunk; nothing for no data, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def _render_lines(first: str, headers: Sequence[Tuple[str, str]]) -> bytes:
    lines = [first, *[": ".join(pair) for pair in headers]]
    names, text = [name for name, _ in headers], "".join(lines)
    is_plain = text.isascii() and text.isprintable()
    if not all(names) or not _TOKEN_CHARS.fullmatch("".join(names) or "-") or (not is_plain and _UNSAFE.search(text)):
        raise RouterError("a header has a character that HTTP forbids", 500, "unsafe_header")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


class ResponseHead(NamedTuple):
    """The head of an upstream's answer. headers as in HttpRequest."""

    status: int
    headers: Headers
    version: Tuple[int, int]


_STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-5][0-9]{2})(?: %s)?(?=\r?\n|\Z)" % _VALUE)
# Repaired as RFC 9112 2.2, 5.1 and 5.2 let a client do: lone LF, blanks before the colon, folded lines.
_ANSWER_FIELDS = re.compile(r"\n(%s)[ \t]*:(%s)(?=\r?\n|\Z)" % (_TCHARS, _VALUE))
_FOLD = re.compile(r"(?<=[^\r\n \t])(?:[ \t]*\r?\n[ \t]+)+")
_ANSWER_HEAD_END = re.compile(rb"\r\n\r?\n|\n\r?\n")  # with \r? in front it would try every byte
_MAX_INTERIM_ANSWERS, _MAX_ANSWER_HEAD_BYTES = 20, 262144


class ResponseParser:
    """Bytes of an upstream connection to one answer. HEAD is never asked: its answer would have no body.

    head: a ResponseHead once it is there. complete: its exact end was read. surplus: bytes behind it. Tolerated:
    lone LF line ends and folded lines in the head, a missing or odd reason phrase, HTTP/1.0, repeated equal lengths.
    Not tolerated: any doubt about where the answer ends (RFC 9112 6.3).
    """

    __slots__ = ("head", "_held", "_searched", "_interim", "decoder", "_until_close", "_persistent")

    def __init__(self) -> None:
        self.head: Optional[ResponseHead] = None
        self._held = bytearray()
        self._searched = self._interim = 0
        self.decoder: Any = _LengthDecoder(_ENDLESS)
        self._until_close = self._persistent = False

    complete = property(lambda self: self.decoder.complete)
    surplus = property(lambda self: self.decoder.surplus)
    # Whether the connection may carry another request: the answer ended exactly, and nobody said close.
    reusable = property(lambda self: self.decoder.complete and self._persistent and not self.decoder.surplus)

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` brought, without any chunking; b"" in the head. UpstreamProtocolError (502)."""
        if self.head is None:
            data = self._read_head(data)
            if not data:
                return data
        return self.decoder.feed(data)

    def finish(self) -> None:
        """The upstream closed the connection. UpstreamProtocolError (502, "upstream_truncated") if it was too early."""
        decoder = self.decoder
        decoder.complete = decoder.complete or self._until_close
        if not decoder.complete:
            what = "within its answer" if self.head or self._held else "without an answer"
            raise UpstreamProtocolError("the connection was closed " + what, 502, "upstream_truncated")

    def _read_head(self, data: bytes) -> bytes:
        """Reads up to the end of the final head, over any interim ones; returns what is behind it."""
        held = self._held
        held += data
        while self.head is None:
            end = _ANSWER_HEAD_END.search(held, self._searched)
            if (end.end() if end else len(held)) > _MAX_ANSWER_HEAD_BYTES:
                raise UpstreamProtocolError("the head is too large")
            if end is None and held.startswith(b"HTTP/1."[: len(held)]):
                self._searched = max(0, len(held) - 3)
                return b""
            head = _read_answer_head(str(held[: end and end.start()], "latin-1"))
            if head.status == 101 or (head.status < 200 and self._interim == _MAX_INTERIM_ANSWERS):
                raise UpstreamProtocolError("an unasked upgrade, or too many interim answers")
            del held[: end.end()]
            self._searched, self._interim = 0, self._interim + 1
            if head.status >= 200:
                self._choose_body(head)
                self.head = head
        self._held = bytearray()
        return bytes(held)

    def _choose_body(self, head: ResponseHead) -> None:
        (_, lengths, codings, _, _), persistent = _read_special(head.headers, head.version)
        # RFC 9112 6.1: chunked in HTTP/1.0 is read, but the connection is not to be trusted afterwards.
        self._persistent = persistent and not (codings and head.version == (1, 0))
        if head.status in (204, 304):
            self.decoder = _LengthDecoder(0)
        elif codings:
            if lengths or [value.lower() for value in codings] != ["chunked"]:
                raise UpstreamProtocolError("its transfer encoding is not understood")
            self.decoder = ChunkDecoder(_ANSWER_LIMITS, UpstreamProtocolError)
        elif lengths:
            # RFC 9112 6.3: equal lengths, repeated or listed, count as one; anything else is an error.
            length, *others = {length.strip(" \t") for length in ",".join(lengths).split(",")}
            if others or len(length) > _MAX_LENGTH_DIGITS or not _DIGITS.fullmatch(length):
                raise UpstreamProtocolError("its content length is not understood")
            self.decoder = _LengthDecoder(int(length))
        else:
            self._until_close, self._persistent = True, False


def _read_answer_head(text: str) -> ResponseHead:
    line = _STATUS_LINE.match(text)
    if line is None:
        raise UpstreamProtocolError("no status line")
    rest = text[line.end() :]
    if "\n " in rest or "\n\t" in rest:
        rest = _FOLD.sub(" ", rest)
    found = _ANSWER_FIELDS.findall(rest)
    if len(found) != rest.count("\n"):
        raise UpstreamProtocolError("a malformed header line")
    headers = [(name.lower(), value.strip(" \t")) for name, value in found]
    return ResponseHead(int(line.group(2)), headers, _VERSIONS[line.group(1)])


# ==============================================================================
# 8 NEUTRAL FORM - what a chat request, answer and stream mean in any wire format [pure]
# ==============================================================================
#
# Every wire format is parsed into and rendered from these values, so N formats need N sections and
# not N x N. `extra` is a bag keyed by wire format name ({"anthropic": {"signature": "..."}}): what
# only that format knows about the value. A renderer writes its own bag back and no other.

Extra = Optional[Dict[str, Json]]
Blocks = List[Any]  # of a turn or an answer, in order: Text, Thinking, Media, ToolCall, ...
Events = List[Any]  # of a stream, in order: Started, Opened, Delta, ...


class _Words(Value):
    """The most frequent values by far. Like those of tools, they have a constructor of their own, which is quicker."""

    __slots__ = ("text", "extra")

    def __init__(self, text: str, extra: Extra = None) -> None:
        self.text = text
        self.extra = extra


class Text(_Words):
    """Plain text."""


class Refusal(_Words):
    """The model's words for declining (OpenAI's `refusal`); other formats show them as text."""


class Thinking(_Words):
    """Reasoning text. `extra` holds what proves or continues it: signature, encrypted content, details."""


class Media(Value):
    """An image, document or sound: `kind` is image, document or audio; exactly one of `data` (base64) and `url` is set.

    media_type: MIME type, "" when a URL does not tell. name: file name or title, "" for none.
    """

    __slots__ = ("kind", "media_type", "data", "url", "name", "extra")
    defaults = ("", "", "", "", None)


class ToolCall(Value):
    """A call the model asks for. `arguments` is text as it came: JSON for kind "function", free text for "custom"."""

    __slots__ = ("id", "name", "arguments", "kind", "extra")

    def __init__(self, id: str, name: str, arguments: str = "", kind: str = "function", extra: Extra = None) -> None:
        self.id, self.name, self.arguments, self.kind, self.extra = id, name, arguments, kind, extra


class ToolResult(Value):
    """What a tool answered: `blocks` are Text and Media."""

    __slots__ = ("call_id", "blocks", "is_error", "extra")

    def __init__(self, call_id: str, blocks: Blocks, is_error: bool = False, extra: Extra = None) -> None:
        self.call_id, self.blocks, self.is_error, self.extra = call_id, blocks, is_error, extra


class Opaque(Value):
    """A block that only the format `wire` knows, kept as it came. Other formats drop it, as their LOSSES declare."""

    __slots__ = ("wire", "value")
    extra: Extra = None  # no bag: the format's words are the value


class Message(NamedTuple):
    """One turn. role: "system" (developer too), "user" or "assistant"; tool results are blocks of a user turn."""

    role: str
    blocks: Blocks
    extra: Extra = None


class Tool(NamedTuple):
    """A tool the model may call. kind: function | custom (free text in) | server (run by one provider, see `extra`)."""

    name: str
    description: str = ""
    schema: Optional[Json] = None
    kind: str = "function"
    strict: Optional[bool] = None
    extra: Extra = None


class ToolChoice(NamedTuple):
    """mode: auto | any | none | tool (then `name` says which)."""

    mode: str
    name: str = ""


class JsonOutput(NamedTuple):
    """The answer must be JSON; with `schema`, JSON of that schema (`None`: any object)."""

    schema: Optional[Json] = None
    name: str = ""
    strict: Optional[bool] = None
    description: str = ""


class Reasoning(NamedTuple):
    """How much the model shall think. effort: "" (unsaid) | none | minimal | low | medium | high | xhigh | max.

    budget: tokens, 0 unsaid. adaptive: the model decides. extra: the rest of the format's own object.
    """

    effort: str = ""
    budget: int = 0
    adaptive: bool = False
    extra: Extra = None


# Efforts in order, and what each is worth in tokens of thinking: the one table for both ways (trap 90).
EFFORT_BUDGETS = {"none": 0, "minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 24576, "max": 31999}


def nearest_effort(reasoning: Reasoning, known: Sequence[str]) -> str:
    """The effort asked for, or that which the budget pays for, or else the next lower one that is `known`; "" unsaid.

    What is below all known ones becomes the lowest; only who wants no thinking at all gets `none`.
    """
    order, wanted = list(EFFORT_BUDGETS), reasoning.effort
    if not wanted and reasoning.budget:
        wanted = next((name for name in order[2:] if reasoning.budget <= EFFORT_BUDGETS[name]), "max")
    if wanted in known or not wanted or not known:
        return wanted if known else ""
    lower = order[order.index(wanted) : 0 : -1] if wanted in order else []
    lowest = next((name for name in known if name != "none"), "")
    return next((name for name in lower if name in known), lowest)


class ChatRequest(NamedTuple):
    """What a client asks for. `None` means the client did not say; `fields` are passed to formats that share them.

    system: the instructions in front of the conversation. stop: texts that end the answer.
    parallel_tools: whether several calls in one turn are allowed. user: the end user's id.
    include_usage: an OpenAI client wants a usage chunk in its stream.
    fields: further request fields under their names in the format they came in ({"openai": {"seed": 1}}).
    """

    model: str
    messages: List[Message]
    system: Blocks = []
    tools: List[Tool] = []
    tool_choice: Optional[ToolChoice] = None
    parallel_tools: Optional[bool] = None
    max_tokens: Optional[int] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_k: Optional[int] = None
    stop: List[str] = []
    stream: bool = False
    include_usage: bool = False
    output: Optional[JsonOutput] = None
    reasoning: Optional[Reasoning] = None
    user: str = ""
    fields: Extra = None


class Usage(NamedTuple):
    """Tokens. `input` is without the cached ones (OpenAI's prompt_tokens = input + cache_read + cache_write);
    `output` includes `reasoning`."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0


# Why an answer ended, in the neutral form: the words of Anthropic's stop_reason, which tell most apart.
STOP_REASONS = tuple(
    "end_turn max_tokens stop_sequence tool_use refusal pause_turn model_context_window_exceeded".split()
)


class ChatResponse(NamedTuple):
    """A whole answer. usage is None when the upstream told none; stop_reason is one of STOP_REASONS."""

    id: str
    model: str
    blocks: Blocks
    stop_reason: str = "end_turn"
    stop_sequence: str = ""
    usage: Optional[Usage] = None
    created: int = 0
    extra: Extra = None


class ErrorInfo(NamedTuple):
    """An error as a client or upstream words it. type, code, param: "" when unknown; code keeps its digits as text."""

    status: int
    message: str
    type: str = ""
    code: str = ""
    param: str = ""


class Context(NamedTuple):
    """What parsing and rendering an answer needs besides the answer: the client's request, an id and the time.

    request: its conversation, and what its tools are for, may be left out. id: the router's request id, from which ids
    that an upstream left out are derived. created: Unix seconds. likely_input: tokens that the request takes about, for
    clients that must be told a number where the upstream tells none.
    """

    request: ChatRequest
    id: str
    created: int
    likely_input: int = 0


# Stream events. Order: Started (Opened (Delta | Extended)* Closed)* (Finished | Failed). At most one block
# is open; every Opened is Closed before the next Opened and before Finished, but what Failed cuts off stays open: a
# client would run the half of a tool call.


class Started(Value):
    """The answer begins. usage: what is known of the input so far, or None."""

    __slots__ = ("id", "model", "usage", "created")
    defaults = (None, 0)


UNTOLD_START = Started("", "")  # of an answer whose first event brings something else


class Opened(Value):
    """A block begins: an empty Text, Thinking or Refusal, a ToolCall without arguments, or a whole Opaque."""

    __slots__ = ("block",)


class Delta(Value):
    """More text of the open block: of its `text`, or of its `arguments` when it is a ToolCall. Never empty."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Extended(Value):
    """More of the open block's `extra` for the format `wire`: strings under the same key are joined, lists too."""

    __slots__ = ("wire", "values")


class Closed(Value):
    """The open block is complete."""

    __slots__ = ()


class Finished(Value):
    """The answer is complete."""

    __slots__ = ("stop_reason", "stop_sequence", "usage", "extra")
    defaults = ("end_turn", "", None, None)


class Failed(Value):
    """The upstream ended the stream with an error, or (code "truncated") without any end."""

    __slots__ = ("error",)


class Ping(Value):
    """A sign of life without content."""

    __slots__ = ()


class WireFormat(NamedTuple):
    """One row of WIRE_FORMATS: everything the router knows of a format, as functions of one shape.

    parse_request(body) -> ChatRequest raises RouterError for a body that is not of the format, as does what reads a
    whole answer, parser(context) with its `whole(body) -> [event]`. It also has `feed(SseEvent) -> [event]` and
    `finish() -> [event]`, and renderer(context) has `render(event) -> bytes`. Both keep the stream invariants stated
    above whatever comes in.
    Where the last SseEvent said nothing but more text of the open block, parser.said is that JSON string, else "";
    after it parser.more(text) stands for feeding an SseEvent that differs from it in that string only.
    render_error(info, id) writes an error as a JSON value (read_error reads one in any format). watch: matches raw
    stream bytes that may hold usage, an error or the end, so that a relay looks at nothing else. losses: field -> what
    becomes of it. answer: the key of a whole answer under which its content stands; read_usage(usage) -> Usage.
    """

    name: str
    path: str
    parse_request: Callable[[Json], ChatRequest]
    render_request: Callable[[ChatRequest], Json]
    render_response: Callable[[ChatResponse, Context], Json]
    parser: Callable[[Context], Any]
    renderer: Callable[[Context], Any]
    render_error: Callable[[ErrorInfo, str], Json]
    watch: re.Pattern[bytes]
    losses: Dict[str, str]
    answer: str
    read_usage: Callable[[Json], Optional[Usage]]

    def parse_response(self, body: Json, context: Context) -> ChatResponse:
        """A whole answer. RouterError for an error in its place (its status, else 502), and for what is none (502)."""
        answer = fold(self.parser(context).whole(body))
        if isinstance(answer, ErrorInfo):
            raise RouterError(answer.message, answer.status, answer.code or answer.type or "upstream_error")
        return answer

    def error_event(self, info: ErrorInfo, request_id: str) -> bytes:
        """An error as all that a stream says."""
        return self.renderer(Context(ChatRequest("", []), request_id, 0)).render(Failed(info))


def join_text(blocks: Iterable[Any], separator: str = "") -> str:
    """The text of all Text and Refusal blocks."""
    return separator.join(block.text for block in blocks if isinstance(block, (Text, Refusal)))


def own_extra(value: Any, wire: str) -> Json:
    """The bag that the format `wire` keeps on `value`, empty when it has none."""
    extra = value.extra
    return (extra.get(wire) or {}) if extra else {}


def fold(events: Iterable[Any]) -> Union[ChatResponse, ErrorInfo]:
    """A whole stream as one answer; its ErrorInfo when it failed."""
    begun, blocks, deltas, added = Started("", ""), [], [], []
    for event in events:
        if isinstance(event, Delta):
            deltas.append(event.text)
        elif isinstance(event, Opened):
            blocks.append(event.block)
            deltas, added = [block_text(event.block)], []
        elif isinstance(event, Extended):
            added.append(event)
        elif isinstance(event, Closed):
            block = with_text(blocks[-1], "".join(deltas)) if len(deltas) > 1 else blocks[-1]
            blocks[-1] = _extended(block, added) if added else block
        elif isinstance(event, Started):
            begun = event
        elif isinstance(event, Failed):
            return event.error
        elif isinstance(event, Finished):
            ended = (event.stop_reason, event.stop_sequence, event.usage)
            return ChatResponse(begun.id, begun.model, blocks, *ended, begun.created, event.extra)
    return ErrorInfo(502, "the stream ended before the answer was complete", code="truncated")


def unfold(response: ChatResponse) -> Iterable[Any]:
    """A whole answer as the stream events it would have been: `fold(unfold(r)) == r`."""
    yield Started(response.id, response.model, response.usage, response.created)
    for block in response.blocks:
        text = block_text(block)
        yield Opened(with_text(block, "") if text else block)
        if text:
            yield Delta(text)
        yield Closed()
    yield Finished(response.stop_reason, response.stop_sequence, response.usage, response.extra)


def block_text(block: Any) -> str:
    """The text of a block that deltas add to: of a call its arguments, "" for a block without any."""
    return block.arguments if isinstance(block, ToolCall) else getattr(block, "text", "")


def with_text(block: Any, text: str) -> Any:
    """The block with another text (block_text)."""
    return type(block)(text, block.extra) if isinstance(block, _Words) else block._replace(arguments=text)


def _extended(block: Any, added: List[Extended]) -> Any:
    bags: Dict[str, Json] = {event.wire: {**own_extra(block, event.wire)} for event in added}
    made: Dict[Tuple[str, str], Any] = {}  # joined here: grows in place, since a text may have thousands of citations
    for wire, key, value in ((event.wire, *said) for event in added for said in event.values.items()):
        old, bag = bags[wire].get(key), bags[wire]
        if not isinstance(value, (str, list)) or type(old) is not type(value):
            bag[key] = value
        elif made.get((wire, key)) is old:
            bag[key] += value
        else:
            bag[key] = made[wire, key] = old + value
    return block._replace(extra={**(block.extra or {}), **bags})


# What a client is spared to send back.


class BoundedMap:
    """The newest values by key: `limit` of them, or as many as fit into so many bytes where they come with a size."""

    def __init__(self, limit: int = 1 << 24) -> None:
        self._entries: OrderedDict[Any, Tuple[Any, int]] = OrderedDict()
        self._limit = self._left = limit

    def put(self, key: Any, value: Any, size: int = 1) -> None:
        """Add a value, or put another in its place; the oldest give way, but none to one that never fits."""
        self._left += self._entries.pop(key, (None, 0))[1]
        if size <= self._limit:
            self._left -= size
            self._entries[key] = value, size
        while self._left < 0:
            self._left += self._entries.popitem(last=False)[1][1]

    def put_sized(self, key: Any, value: Any) -> None:
        """Add texts, blocks and JSON by their bytes in memory: small strings take ten times their characters."""
        size, parts = 300, [key, value]
        for part in parts:
            size += 16 + part.__sizeof__()
            if isinstance(part, dict):
                parts += [*part, *part.values()]
            elif isinstance(part, (list, tuple, Value)):
                parts += part._fields() if isinstance(part, Value) else part
        self.put(key, value, size)

    def get(self, key: Any) -> Any:
        """The value of a key, None when there is none any more."""
        return self._entries.get(key, (None, 0))[0]


def is_reasoning(block: Any) -> bool:
    """Whether a block is reasoning, be it readable or not (encrypted, redacted)."""
    kind = block.value.get("type") if isinstance(block, Opaque) else ""
    return isinstance(block, Thinking) or kind in ("reasoning", "redacted_thinking")


class ReasoningRecorder:
    """Keeps the reasoning of one answer, from its stream events, in `memory` under (issuer, id of the call behind it),
    and the bag of a call that proves it was made by its issuer (Gemini's thought_signature) as that call without more.

    Most clients cannot send it back, but some upstreams refuse a tool turn without it, and all go on better with it
    (traps 85 to 87). No other provider or conversation ever gets it.
    """

    def __init__(self, memory: BoundedMap, issuer: str) -> None:
        self._memory, self._issuer = memory, issuer
        self._events: Events = []
        self._is_inside = False

    def see(self, events: Iterable[Any]) -> None:
        """The next events of the answer."""
        for event in events:
            if type(event) is Opened:
                block = event.block
                self._is_inside = is_reasoning(block)
                if isinstance(block, ToolCall) and (self._events or block.extra):
                    blocks = getattr(fold([*self._events, Finished()]), "blocks", [])
                    blocks += [block._replace(arguments="")] if block.extra else []
                    self._memory.put_sized((self._issuer, block.id), blocks)
                    self._events = []
            if self._is_inside:
                self._events.append(event)


def recall(memory: BoundedMap, issuer: str, call_ids: Iterable[Any]) -> Blocks:
    """What `issuer` had put before these calls, and the proofs of them, as far as they are remembered."""
    return [block for call_id in call_ids for block in memory.get((issuer, call_id)) or ()]


def restore_reasoning(messages: List[Message], memory: BoundedMap, issuer: Callable[[], str]) -> List[Message]:
    """A conversation for `issuer`: turns with calls that it made begin with what it thought then."""
    restored = []
    for message in messages:
        calls = [block.id for block in message.blocks if isinstance(block, ToolCall)]
        known = recall(memory, issuer(), calls) if calls else []
        if known:
            thoughts = list(filter(is_reasoning, known))
            bags = {block.id: block.extra for block in known if isinstance(block, ToolCall)}
            rest = [block for block in message.blocks if not (thoughts and is_reasoning(block))]
            rest = [b._replace(extra=bags[b.id]) if getattr(b, "id", None) in bags else b for b in rest]
            message = message._replace(blocks=thoughts + rest)
        restored.append(message)
    return restored


# Tools that take free text (kind "custom", OpenAI's grammar tools) where only JSON functions are known: TRANSLATION
# offers them as functions of one string and turns the calls back.

_CUSTOM_SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def tool_grammar(tool: Tool) -> Json:
    """`syntax` and `definition` of the grammar a custom tool's input must follow, {} when any text will do.

    Responses says {"format": {"type": "grammar", "syntax", "definition"}}, Chat nests the two under "grammar".
    """
    for bag in (tool.extra or {}).values():
        form = get_dict(as_dict(bag), "format")
        grammar = get_dict(form, "grammar") or form
        if get_text(grammar, "definition"):
            return {"syntax": get_text(grammar, "syntax") or "lark", "definition": grammar["definition"]}
    return {}


def custom_as_function(tool: Any) -> Any:
    """A custom tool, or a call of one, as that of a function of one string; its grammar is described (trap 60)."""
    if isinstance(tool, ToolCall):
        return tool._replace(arguments=json.dumps({"input": tool.arguments}), kind="function")
    grammar = tool_grammar(tool)
    note = "The input must follow this %(syntax)s grammar:\n%(definition)s" % grammar if grammar else ""
    notes = filter(None, (tool.description, note))
    return tool._replace(description="\n\n".join(notes), schema=_CUSTOM_SCHEMA, kind="function", strict=None)


def custom_input(arguments: str) -> str:
    """The free text in the arguments of a one-string function; what is no such object is taken as the text itself."""
    value = try_json(arguments)
    if isinstance(value, dict):
        value = next(iter(value.values()), "") if len(value) < 2 else value.get("input")
    return value if isinstance(value, str) else arguments


# Arguments of tools.

# The key under which arguments that are no JSON object are put, where the format demands an object (trap 42).
RAW_ARGUMENTS = "_raw"


def arguments_text(value: Any) -> str:
    """Arguments as text; some clients and servers send the object itself."""
    return value or "" if value is None or isinstance(value, str) else _ARGUMENTS_ENCODER.encode(value)


_ARGUMENTS_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def arguments_object(arguments: str) -> Json:
    """Arguments as an object (trap 42): nothing and null are {}, an object in a string (encoded twice) is unwrapped,
    anything else is kept under RAW_ARGUMENTS."""
    if not arguments.strip():
        return {}
    try:
        value = load_json(arguments)
        value = load_json(value) if isinstance(value, str) else value
    except RouterError:
        return {RAW_ARGUMENTS: arguments}
    return value if isinstance(value, dict) else {} if value is None else {RAW_ARGUMENTS: arguments}


def unique_id(wanted: str, taken: Set[str]) -> str:
    """`wanted`, or with a number behind it when it is in `taken`, which gets the result (trap 38). The numbers tried
    grow with `taken`, and ever faster: ten thousand calls under one id must not cost a search through all of them."""
    name, number, step = wanted, 1, 1
    while name in taken:
        name = "%s_%d" % (wanted, number)
        number, step = max(number, len(taken) - 1) + step, step * 2
    taken.add(name)
    return name


# Conversations.

NO_RESULT = "(no result)"


def tidy_messages(messages: Iterable[Message]) -> List[Message]:
    """A conversation as every upstream wants it; TRANSLATION does this before it renders a request in any format.

    Empty text and empty turns are left out (trap 82), neighbours of one role are one turn unless their `extra` differs.
    Calls come last in their turn (80) under ids of their own (38), and the very next turn, a user's, begins with their
    results in the same order (77): a call without one gets NO_RESULT (79), a second one is dropped (81). A result
    without a call becomes text (78).
    """
    said = (Message(role, _without_blanks(blocks), extra) for role, blocks, extra in messages)
    return _join_turns(_place_results(_join_turns(said)))


def _without_blanks(blocks: Iterable[Any]) -> Blocks:
    """The blocks but texts without words, also those that bear a mark such as cache_control; reasoning stays where a
    signature or the like stands for its words."""
    return [b for b in blocks if getattr(b, "text", "-").strip() or (b.extra and isinstance(b, Thinking))]


def _join_turns(messages: Iterable[Message]) -> List[Message]:
    """Blocks are added to the lists that turns came with."""
    merged = [Message("", [])]
    for message in messages:
        last = merged[-1]
        if message.role == last.role and message.extra == last.extra:
            last.blocks.extend(message.blocks)
        elif message.blocks:
            merged.append(message)
    return merged[1:]


def _place_results(messages: List[Message]) -> List[Message]:
    turns: List[Message] = []
    taken: Set[str] = set()
    waiting: Dict[str, List[ToolResult]] = {}  # id the client uses -> results that may still come
    for role, blocks, extra in messages:
        calls, rest = [], []
        for block in blocks:
            if isinstance(block, ToolCall):
                calls.append(block)
            elif not isinstance(block, ToolResult):
                rest.append(block)
            elif block.call_id not in waiting:
                rest += [Text("[result of tool call %s]" % block.call_id), *_without_blanks(block.blocks)]
            elif waiting[block.call_id]:
                place = waiting[block.call_id].pop(0)
                place.blocks, place.is_error, place.extra = block.blocks, block.is_error, block.extra
        ids = [unique_id(call.id or "call_%d" % len(taken), taken) for call in calls]
        named = [call if call.id == own else call._replace(id=own) for call, own in zip(calls, ids)]
        turns.append(Message(role, rest + named, extra))
        if calls:
            # An error where the format has a flag for it; elsewhere the words are enough.
            flag = {"anthropic": {"is_error": True}}
            results = [ToolResult(call.id, [Text(NO_RESULT)], extra=flag) for call in named]
            waiting.update((call.id, []) for call in calls)
            for call, result in zip(calls, results):
                waiting[call.id].append(result)
            turns.append(Message("user", results))
    return turns


# Media.

_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^,]*)?;base64,", re.IGNORECASE)  # RFC 2397; a repeated group costs memory


def url_of_media(media: Media, default_type: str = "application/octet-stream") -> str:
    """The URL of a Media, a data URL where it has none."""
    return media.url or "data:%s;base64,%s" % (media.media_type or default_type, media.data)


def text_of_media(media: Media) -> Optional[str]:
    """The words of a text document that came as base64; None for anything else (trap 105)."""
    media_type = media.media_type.lower().split(";")[0].strip()
    is_text = media_type.startswith("text/") or media_type == "application/json"
    with suppress(ValueError):
        if media.kind == "document" and media.data and is_text:
            return base64.b64decode("".join(media.data.split()), validate=True).decode("utf-8", "replace")
    return None


def note_of_media(media: Media) -> str:
    """What stands in the place of media that a format does not take."""
    return "[%s left out: %s]" % (media.kind, media.name or media.url or media.media_type or "no name")


# Keys of blocks that only one format knows whose strings mean something to another model, as all of an input does.
_READABLE_KEYS = frozenset(
    "arguments code command commands content diff error error_code input lines logs name output path queries query"
    " stderr stdout text title url".split()
)


def readable(value: Any) -> str:
    """The words in a nested foreign block, in order, without ids and encrypted content (trap 107)."""
    found: List[str] = []
    stack = [("", value)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, str):
            found += [value] if value and key in _READABLE_KEYS else []
        elif isinstance(value, list):
            stack += [(key, child) for child in reversed(value)]
        elif isinstance(value, dict):
            names = {"data": "text"} if value.get("type") == "text" else {}  # a document's source
            children = [(key if key == "input" else names.get(name, name), child) for name, child in value.items()]
            stack += reversed(children)
    return " ".join(found)


# Readers that every format shares.

Kinds = Tuple[type, ...]
_KINDS = {str: "a string", list: "an array", dict: "an object", int: "an integer", float: "a number", bool: "a boolean"}


def field_error(path: str, message: str) -> RouterError:
    """The refusal of a client's request, with the path of what is wrong in it."""
    return RouterError("%s: %s" % (path, message), 400, "invalid_request")


def check_kind(value: Any, kinds: Kinds, path: str) -> Any:
    """`value` if it is of one of `kinds`, else RouterError 400. A boolean is a number to Python, not to the APIs."""
    if isinstance(value, kinds) and (type(value) is not bool or bool in kinds):
        return value
    if int in kinds and isinstance(value, float) and value.is_integer():  # some languages know no other numbers
        return int(value)
    raise field_error(path, "expected %s" % " or ".join(_KINDS[kind] for kind in kinds))


def check_field(item: Json, key: str, kinds: Kinds, path: str) -> Any:
    """A member of the object at `path`: None, or of one of `kinds` (check_kind)."""
    value = item.get(key)
    return value if value is None else check_kind(value, kinds, "%s.%s" % (path, key))


def need_text(item: Json, key: str, path: str) -> str:
    """A member of the object at `path` that must be a string."""
    value = item.get(key)
    return value if isinstance(value, str) else check_kind(value, (str,), "%s.%s" % (path, key))


def read_each(read: Callable[[Any, str], Any], items: Optional[List[Any]], paths: str) -> List[Any]:
    """What `read(item, path)` makes of each item; the number of one goes into `paths` ("tools[%d]")."""
    return [read(item, paths % number) for number, item in enumerate(items or ())]


def field_kinds(table: Dict[Kinds, str]) -> Dict[str, Kinds]:
    """Name of a field -> its types, from a table of types -> names."""
    return {key: kinds for kinds, keys in table.items() for key in keys.split()}


def read_fields(body: Json, known: Dict[str, Kinds]) -> Json:
    """The `known` fields of a request (field_kinds), each None or of one of its types."""
    return {key: None if body.get(key) is None else check_kind(body[key], kinds, key) for key, kinds in known.items()}


def rest_of(item: Json, known: Iterable[str], wire: str) -> Extra:
    """A bag with what `item` says besides the `known` keys; None when that is nothing."""
    rest = {key: value for key, value in item.items() if key not in known and value not in (None, [], {})}
    return {wire: rest} if rest else None


# What errors inside a 200 mean as a status, by their type or code: openai.types and anthropic.types (ErrorType,
# ResponseError), the words of other providers, and z.ai's numbers (docs.z.ai, Errors). Anything else is temporary.
_STATUS_WORDS = {
    400: "invalid_request_error tool_use_failed context_length_exceeded invalid_prompt bio_policy cyber_policy"
    " misalignment_policy_violation data_residency_mismatch invalid_encrypted_content previous_response_not_found"
    " content_filter content_policy_violation 1261 1301",
    401: "authentication_error invalid_api_key 1000 1001 1002 1003 1004",
    402: "insufficient_balance billing_error",
    403: "permission_error permission_denied usage_not_included",
    404: "not_found_error model_not_found 1211",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error rate_limit_exceeded requests tokens insufficient_quota usage_limit_reached 1113 1302 1303"
    " 1304 1305 1308 1309 1310",
    500: "api_error server_error internal_server_error",
    503: "service_unavailable server_is_overloaded slow_down",
    504: "timeout_error vector_store_timeout",
    529: "overloaded_error",
}
OVERFLOW_CODE = "context_length_exceeded"  # by this code Codex knows that it has to compact (trap 156)
ERROR_STATUSES = {word: status for status, words in _STATUS_WORDS.items() for word in words.split()}
# MiniMax: numbers of base_resp.status_code inside a 200, 0 in all other answers (platform.minimax.io, Error codes).
_BASE_CODES = {
    1001: "timeout_error", 1002: "rate_limit_exceeded", 1004: "invalid_api_key", 1008: "insufficient_balance",
    1026: "content_filter", 1027: "content_filter", 1039: "rate_limit_exceeded", 1041: "rate_limit_exceeded",
    2013: "invalid_request_error", 2045: "rate_limit_exceeded", 2049: "invalid_api_key", 2056: "usage_limit_reached",
}  # fmt: skip


def _error_in(body: Json) -> Json:
    """The error that a 200's body is all the same, without any answer beside it, or that its choice tells (OpenRouter,
    API Reference: choices[].error); {} for none."""
    choice = as_dict(next(iter(get_list(body, "choices")), None))
    if choice.get("error"):
        return {"error": choice["error"]}
    is_failed = body.get("status") in ("failed", "cancelled")  # of a Response, whatever it said before
    if not is_failed and (body.get("choices") or body.get("content") or body.get("output") or body.get("data")):
        return {}
    told = is_failed or body.get("error") or "error" in (body.get("type"), body.get("object"))
    told = told or get_dict(body, "base_resp").get("status_code") or body.get("success") is False
    words = get_text(body, "message") or body.get("detail") or body.get("errors")
    return body if told or words and "choices" not in body else {}


def read_error(status: int, body: Any, unknown: int = 502) -> ErrorInfo:
    """An error answer in any of the shapes in use: {"error": {...} or "..."}, {"message"}, {"detail"}, a list, text.

    body: parsed JSON, or text. JSON inside strings is unwrapped (trap 124). A status below 400 (an error in a stream)
    is replaced by the one that the error names, or by that of its code or type, else by `unknown`.
    """
    error = _innermost_error(body, 8)
    message, raw = error["message"], _innermost_error(get_dict(error, "metadata").get("raw"), 4)["message"]
    message = "%s: %s" % (message, raw) if message and raw else message or raw  # OpenRouter: the words of who answered
    kind = get_text(error, "type") or get_text(error, "status")
    code = get_dict(error, "details").get("error_code") if error.get("code") is None else error["code"]
    code = code or _BASE_CODES.get(as_int(error.get("status_code")))
    code = str(code) if isinstance(code, int) and not isinstance(code, bool) else as_text(code)
    if status >= 400:
        message = message or (one_line(dump_json(body).decode()) if body and not isinstance(body, str) else "")
    else:
        named = (str(error.get(key)) for key in ("status_code", "code", "status"))
        number = next((int(word) for word in named if re.fullmatch(r"[45]\d\d", word)), 0)
        status = number or ERROR_STATUSES.get(code) or ERROR_STATUSES.get(kind.lower()) or unknown
    message = message or "the upstream answered with status %d" % status
    return ErrorInfo(status, message, "" if kind == "error" else kind, code, get_text(error, "param"))


def _innermost_error(value: Any, depth: int) -> Json:
    """The fields of the object that tells the error, its words under `message`, "" when there are none."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, str):
        start = value.find("{")
        inner = _innermost_error(try_json(value[start:]), depth - 1) if start >= 0 and depth else {}
        before = value[:start].rstrip(" :-") if inner.get("message") else value.strip()[:4000]
        return {**inner, "message": ": ".join(words for words in (before, inner.get("message")) if words)}
    outer = as_dict(value)
    for key in ("error", "message", "detail", "msg", "error_message", "title", "errors", "base_resp"):
        inner = _innermost_error(outer[key], depth - 1) if outer.get(key) and depth else {}
        if key == "msg" and inner and get_list(outer, "loc"):  # pydantic: which field it is
            inner["message"] = "%s: %s" % (".".join(map(str, outer["loc"])), inner["message"])
        if inner.get("message"):
            return {**outer, **inner} if key == "error" else {**inner, **outer, "message": inner["message"]}
    return {**outer, "message": as_text(outer.get("message") or outer.get("Message") or outer.get("status_msg"))}


# ==============================================================================
# 9 OPENAI CHAT - Chat Completions: requests, answers, streams, errors [pure]
# ==============================================================================
#
# platform.openai.com/docs/api-reference/chat; shapes as in the types of the official Python SDK 3.54
# (openai.types.chat). Many providers speak dialects of this format: reading is tolerant, by the shape of a value
# and never by the provider's name; writing is strict.

_CHAT = "openai"
_CHAT_MAX_USER = 64  # characters of `user`, by OpenAI's API reference

# In backticks: fields and types of a request in this format, and what becomes of them when another format serves it.
# In words: what becomes of something that is written in this format.
CHAT_LOSSES = {
    "`audio` `frequency_penalty` `logit_bias` `logprobs` `modalities` `n` `prediction` `presence_penalty` `seed`"
    " `top_logprobs` `web_search_options`": "not sent",
    "`metadata` `moderation` `prompt_cache_*` `safety_identifier` `service_tier` `verbosity`": "kept for OpenAI "
    "Responses, else not sent",
    "`stop`": "not sent to OpenAI Responses, which knows no stop texts",
    "`store`": "not sent; for OpenAI Responses always false",
    "`stream_options`": "answered by the router itself",
    "`input_audio`": "becomes a short text note, as neither Anthropic nor OpenAI Responses takes sound",
    "`name` `prompt_cache_breakpoint`": "of messages and their parts: not sent, but for names in OpenAI Responses",
    "thinking in the history": "becomes reasoning_content on turns with tool calls, is left out on others",
    "server tools and their blocks": "left out; what is readable in them becomes text",
    "tool results without a call": "become text of the user's turn; second ones of one call are left out",
    "tool calls without a result": "get the result `%s`" % NO_RESULT,
    "images and files in tool results": "become a user message after the tool messages",
    "images and files in system or assistant messages": "become a short text note",
    "documents other than PDF and text": "become a short text note, as do videos, and files and sounds by URL or id",
    "the answer's schema, where only JSON mode is known": "becomes a system message (DeepSeek, or learned from a 400)",
    "system messages amid the conversation": "become the user's where a 400 says that they must be in front",
    "the user's turn right behind a tool message": "at Mistral gets an assistant's `(noted)` in front of it",
    "thinking switched off": "told to DeepSeek, Moonshot and z.ai, else left out",
    "thinking budget": "becomes reasoning_effort: low up to 2048 tokens, medium up to 8192, high up to 16384, then "
    "xhigh and max",
    "efforts that a model does not know": "become the next lower one that it knows, or else its lowest",
    "user": "left out when longer than %d characters" % _CHAT_MAX_USER,
    "answers: stop text": "finish_reason does not tell which stop text ended the answer",
    "answers: signatures and citations of other formats": "left out",
    "answers: n, logprobs, audio data, images": "only the first choice; of audio the transcript, of the others nothing",
}

# ---- requests: Chat Completions -> neutral

# Types -> the fields of a request that are read, those of other formats and of routers among them.
_CHAT_FIELDS = field_kinds({
    (str,): "model user instructions reasoning_effort", (int,): "max_tokens max_completion_tokens top_k",
    (int, float): "temperature top_p", (bool,): "stream parallel_tool_calls", (list,): "messages tools functions",
    (dict,): "stream_options response_format reasoning thinking", (str, list): "input system stop",
    (str, dict): "tool_choice function_call",
})  # fmt: skip


def parse_chat_request(body: Json) -> ChatRequest:
    """The body of POST /v1/chat/completions (SDK: CompletionCreateParams) as a ChatRequest.

    Bodies mixed with the other formats' shapes, as some editors send them, are read by shape (trap 66): content blocks
    and tools of the Messages API, flat tools, `input` for `messages`. RouterError 400 with the path of a wrong value.
    """
    said = read_fields(check_kind(body, (dict,), "body"), _CHAT_FIELDS)
    system, messages = _chat_turns(said)
    tools = [tool for key in ("tools", "functions") for tool in read_each(_chat_tool, said[key], key + "[%d]")]
    choice, tools = _chat_tool_choice(said["tool_choice"] or said["function_call"], tools)
    stop, form = said["stop"] or [], said["response_format"] or {}
    inner = form.get("json_schema", form if "schema" in form else None)
    limits = (said[key] for key in ("max_completion_tokens", "max_tokens") if said[key] is not None)
    limit, top_k = next(limits, -1), said["top_k"]  # clients of local servers say -1 for no limit
    return ChatRequest(
        said["model"] or "", messages, system, tools, choice, said["parallel_tool_calls"],
        None if limit < 0 else limit, said["temperature"], said["top_p"], None if top_k is None or top_k < 0 else top_k,
        stop=[stop] if isinstance(stop, str) else [text for text in stop if isinstance(text, str)],
        stream=bool(said["stream"]), include_usage=(said["stream_options"] or {}).get("include_usage") is True,
        output=_read_output(form, inner, "response_format.json_schema"),
        reasoning=_chat_reasoning(said["reasoning_effort"] or "", said["reasoning"] or {}, said["thinking"] or {}),
        user=said["user"] or "", fields=_chat_rest(body, _CHAT_FIELDS),
    )  # fmt: skip


def _chat_rest(item: Json, known: Iterable[str]) -> Extra:
    """What `item` says besides the `known` keys. `cache_control`, which some providers take, has Anthropic's shape."""
    mark, rest = get_dict(item, "cache_control"), rest_of(item, (*known, "cache_control"), _CHAT)
    return {"anthropic": {"cache_control": mark}, **(rest or {})} if mark else rest


def _chat_turns(said: Json) -> Tuple[Blocks, List[Message]]:
    """(instructions in front, turns), one for each message: what belongs together tidy_messages joins."""
    name = "messages" if said["messages"] is not None or not said["input"] else "input"
    if not said[name]:
        raise field_error("messages", "expected at least one message")
    system = _chat_parts(said["system"], "system") + _chat_parts(said["instructions"], "instructions")
    items = [{"role": "user", "content": said[name]}] if isinstance(said[name], str) else said[name]
    turns = read_each(_chat_message, items, name + "[%d]")
    while turns and turns[0].role == "system":
        system += turns.pop(0).blocks
    return system, turns


# Role -> whose turn it is; what roles `tool` and `function` say are results.
_CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _chat_message(value: Any, path: str) -> Message:
    """A message; items `function_call` and `function_call_output` of the Responses API are the messages they mean.
    `cache_control` beside the content, where the AI SDK's openai-compatible provider puts it, marks the last block."""
    item = check_kind(value, (dict,), path)
    kind, call_id = None if "role" in item else item.get("type"), item.get("call_id")
    if kind == "function_call":
        item = {"role": "assistant", "tool_calls": [{"id": call_id, "function": item}]}
    elif kind == "function_call_output":
        item = {"role": "tool", "tool_call_id": call_id, "content": item.get("output")}
    role, name = get_text(item, "role"), get_text(item, "name")
    blocks = _chat_parts(item.get("content"), path + ".content")
    mark = _chat_rest({"cache_control": item.get("cache_control")}, ())
    if role in ("tool", "function"):
        call_id = get_text(item, "tool_call_id") or "call_" + (name or "0")
        return Message("user", [ToolResult(call_id, blocks, extra=mark)])
    if role not in _CHAT_ROLES:
        raise field_error(path + ".role", "expected system, developer, user, assistant or tool")
    if role == "assistant":
        field = next((key for key in _THOUGHT_FIELDS if get_text(item, key)), "reasoning_content")
        thought, details = get_text(item, field), get_list(item, "reasoning_details")
        if thought or details:
            blocks.insert(0, Thinking(thought, rest_of({"field": field, "reasoning_details": details}, (), _CHAT)))
        if get_text(item, "refusal"):
            blocks.append(Refusal(item["refusal"]))
        calls = check_field(item, "tool_calls", (list,), path)
        blocks += read_each(_chat_call, calls, path + ".tool_calls[%d]")
        if item.get("function_call") and not calls:  # what came before tool_calls has no id, and its result the name
            call = _chat_call({"function": item["function_call"]}, path)
            blocks.append(call._replace(id="call_" + call.name))
    if mark and blocks and isinstance(blocks[-1], (Text, ToolCall, Media)):
        blocks[-1] = blocks[-1]._replace(extra={**(blocks[-1].extra or {}), **mark})
    return Message(_CHAT_ROLES[role], blocks, {_CHAT: {"name": name}} if name else None)


# Kind of a call, which is the name of its object -> the field in there with its arguments.
_CHAT_CALLS = {"function": "arguments", "custom": "input"}
_CHAT_CALL_KEYS = frozenset(("index", "id", "type", *_CHAT_CALLS))


def _chat_call(value: Any, path: str) -> ToolCall:
    item = check_kind(value, (dict,), path)
    kind = "custom" if isinstance(item.get("custom"), dict) else "function"
    path = "%s.%s" % (path, kind)
    inner = check_kind(item.get(kind), (dict,), path)
    name, arguments = need_text(inner, "name", path), arguments_text(inner.get(_CHAT_CALLS[kind]))
    return ToolCall(get_text(item, "id"), name, arguments, kind, _chat_rest(item, _CHAT_CALL_KEYS))


def _chat_parts(content: Any, path: str) -> Blocks:
    """Content parts (SDK: ChatCompletionContentPartParam), blocks of other formats among them (trap 66)."""
    if isinstance(content, str):
        return [Text(content)] if content else []
    return read_each(_chat_part, None if content is None else check_kind(content, (str, list), path), path + "[%d]")


def _chat_part(value: Any, path: str) -> Any:
    item = {"text": value} if isinstance(value, str) else check_kind(value, (dict,), path)
    reader = _CHAT_READERS.get(as_text(item.get("type", "text" if isinstance(item.get("text"), str) else "")))
    return reader(item, path) if reader else Opaque(_CHAT, item)


def _thinking_text(item: Json) -> str:
    """`thinking` is a string in the Messages API, a list of text parts at Mistral, and called summary at Databricks."""
    value = item.get("thinking") or item.get("summary")
    return as_text(value) or "".join(get_text(as_dict(part), "text") for part in as_list(value))


# Type of a part -> kind of Media, the part's object, and its field with the data or a URL.
_IMAGE, _FILE = ("image", "image_url", "url"), ("document", "file", "file_data")
_AUDIO = ("audio", "input_audio", "data")
_CHAT_MEDIA = {"image_url": _IMAGE, "input_image": _IMAGE, "input_audio": _AUDIO, "file": _FILE, "input_file": _FILE}
# Ending of a file's name -> its type, where bare base64 does not tell it.
_FILE_FORMS = {
    "txt": "text/plain", "md": "text/markdown", "csv": "text/csv", "html": "text/html", "json": "application/json",
}  # fmt: skip


def _read_chat_media(item: Json, path: str) -> Any:
    """In the Responses API the URL, or the part itself, stands for the object. A file's id means nothing elsewhere."""
    kind, key, field = _CHAT_MEDIA[item["type"]]
    value = item.get(key)
    inner = value if isinstance(value, dict) else {**item, field: item.get(field) or item.get("file_url") or value}
    if kind == "document" and not inner.get(field):
        return Opaque(_CHAT, item)
    url = need_text(inner, field, "%s.%s" % (path, key))
    if kind != "image" and not url.startswith(("data:", "http://", "https://")):
        form = _FILE_FORMS.get(get_text(inner, "filename").rpartition(".")[2].lower(), "application/pdf")
        form = "audio/" + (get_text(inner, "format") or "wav") if kind == "audio" else form
        url = "data:%s;base64,%s" % (form, url)
    rest = _chat_rest({**item, "detail": inner.get("detail")}, ("type", key, field, "filename", "file_url"))
    match = _DATA_URL.match(url)
    data = (match.group(1).lower(), url[match.end() :], "") if match else ("", "", url)
    return Media(kind, *data, get_text(inner, "filename"), rest)


def _read_source(item: Json, path: str, extra: Extra = None) -> Any:
    """An `image` or `document` block of the Messages API. A file's id means nothing elsewhere."""
    path += ".source"
    source = check_kind(item.get("source"), (dict,), path)
    form, default = get_text(source, "type"), "application/pdf" if item["type"] == "document" else ""
    if form not in ("text", "base64", "url"):
        return Opaque("anthropic", item)
    field = "url" if form == "url" else "data"
    value = need_text(source, field, path)
    about = {"media_type": get_text(source, "media_type") or default, "name": get_text(item, "title"), "extra": extra}
    return Text(value) if form == "text" else Media(item["type"], **{field: value}, **about)


_CHAT_READERS: Dict[str, Callable[[Json, str], Any]] = {
    **dict.fromkeys(
        ("text", "input_text", "output_text"),
        lambda item, path: Text(need_text(item, "text", path), _chat_rest(item, ("type", "text"))),
    ),
    **dict.fromkeys(_CHAT_MEDIA, _read_chat_media),
    **dict.fromkeys(("image", "document"), _read_source),
    "refusal": lambda item, path: Refusal(need_text(item, "refusal", path)),
    "thinking": lambda item, path: Thinking(
        _thinking_text(item), rest_of({"signature": get_text(item, "signature") or None}, (), "anthropic")
    ),
    "tool_use": lambda item, path: ToolCall(
        get_text(item, "id"), need_text(item, "name", path), arguments_text(item.get("input") or {})
    ),
    "tool_result": lambda item, path: ToolResult(
        need_text(item, "tool_use_id", path),
        _chat_parts(item.get("content"), path + ".content"),
        item.get("is_error") is True,
    ),
}

_CHAT_TOOL_KEYS = frozenset(("type", "function", "name", "description", "parameters", "input_schema", "strict"))


def _chat_tool(value: Any, path: str) -> Tool:
    """SDK: ChatCompletionToolUnionParam, nested or flat; or a tool in Anthropic's shape (trap 66)."""
    item = check_kind(value, (dict,), path)
    kind = item.get("type")
    is_custom = kind == "custom" and "input_schema" not in item
    field = "custom" if is_custom else "function"
    inner = item.get(field)
    if isinstance(inner, dict):
        path = "%s.%s" % (path, field)
    elif kind in (None, "function", "custom"):
        inner = item
    else:
        wire = "anthropic" if re.search(r"_20\d{6}$", as_text(kind)) else _CHAT  # web_search_20250305
        return Tool(get_text(item, "name") or as_text(kind), kind="server", extra={wire: item})
    name, description = need_text(inner, "name", path), get_text(inner, "description")
    if is_custom:
        return Tool(name, description, kind="custom", extra=rest_of({"format": get_dict(inner, "format")}, (), _CHAT))
    key = "parameters" if inner.get("parameters") is not None else "input_schema"
    schema, strict = check_field(inner, key, (dict,), path), check_field(inner, "strict", (bool,), path)
    marked = {"cache_control": inner.get("cache_control"), **item}  # inside the function by Goose
    return Tool(name, description, schema, "function", strict, _chat_rest(marked, _CHAT_TOOL_KEYS))


_CHAT_CHOICES = {"auto": "auto", "none": "none", "required": "any", "any": "any"}


def _chat_tool_choice(value: Any, tools: List[Tool]) -> Tuple[Optional[ToolChoice], List[Tool]]:
    """(the choice, the tools that it leaves). SDK: ChatCompletionToolChoiceOptionParam."""
    item = as_dict(value)
    kind, name = as_text(value) or get_text(item, "type"), _chosen_name(item)
    if kind == "allowed_tools":
        inner = get_dict(item, "allowed_tools") or item
        kind = get_text(inner, "mode")
        allowed = {_chosen_name(as_dict(tool)) for tool in get_list(inner, "tools")}
        return ToolChoice(_CHAT_CHOICES.get(kind, "auto")), [tool for tool in tools if tool.name in allowed]
    if kind in _CHAT_CHOICES:
        return ToolChoice(_CHAT_CHOICES[kind]), tools
    return ToolChoice("tool", name) if name else None, tools


def _chosen_name(item: Json) -> str:
    return get_text(get_dict(item, "function") or get_dict(item, "custom") or item, "name")


def _read_output(form: Json, inner: Any, at: str) -> Optional[JsonOutput]:
    """SDK: ResponseFormatJSONSchema, ResponseFormatTextConfig, ResponseFormatJSONObject. inner: what has the schema,
    which stands beside `json_object` at Together, Fireworks and llama.cpp."""
    if form.get("type") not in ("json_schema", "json_object"):
        return None
    inner = check_kind(inner, (dict,), at) if form["type"] == "json_schema" else form
    schema, strict = check_field(inner, "schema", (dict,), at), check_field(inner, "strict", (bool,), at)
    return JsonOutput(schema, get_text(inner, "name"), strict, get_text(inner, "description"))


def _chat_reasoning(effort: str, own: Json, thinking: Json) -> Optional[Reasoning]:
    """`reasoning_effort`, or OpenRouter's `reasoning`, or `thinking` in the shape of the Messages API. Efforts like
    `auto` and `default` say nothing."""
    kind = thinking.get("type")
    if kind == "disabled" or own.get("enabled") is False:
        return Reasoning("none")
    effort = next((word for word in (effort.lower(), get_text(own, "effort").lower()) if word in EFFORT_BUDGETS), "")
    budget = as_int(own.get("max_tokens")) or as_int(thinking.get("budget_tokens"))
    is_on = own.get("enabled") is True or kind == "enabled"  # the latter at DeepSeek and z.ai
    adaptive = kind == "adaptive" or (is_on and not effort and not budget)
    return Reasoning(effort, budget, adaptive) if effort or budget or adaptive else None


# ---- requests: neutral -> Chat Completions

# Models by a pattern of their ids -> efforts they take, lowest first (their makers' pages; the last row is what most
# others take). Shared with OPENAI RESPONSES.
_OPENAI_EFFORTS = (
    (r"gpt-5-pro", ("high",)),
    (r"gpt-5\.\d-pro", ("medium", "high", "xhigh")),
    (r"gpt-(5\.[6-9]|[6-9])|deepseek-v[4-9]|glm-[5-9]", ("none", "low", "medium", "high", "xhigh", "max")),
    (r"gpt-(5\.[2-5]|5\.1-codex-max)", ("none", "low", "medium", "high", "xhigh")),
    (r"gpt-5\.1", ("none", "low", "medium", "high")),
    (r"gpt-5", ("minimal", "low", "medium", "high")),
    (r"(?:^|/)o\d", ("low", "medium", "high")),
    (r"mistral-(?:small|medium)", ("none", "high")),
    (r"", ("none", "low", "medium", "high")),
)


def _openai_effort(reasoning: Reasoning, model: str) -> str:
    return nearest_effort(reasoning, next(efforts for pattern, efforts in _OPENAI_EFFORTS if re.search(pattern, model)))


# Format -> its request fields that mean the same here.
_CHAT_SHARED = {
    "anthropic": "service_tier",
    "responses": "service_tier metadata moderation prompt_cache_key prompt_cache_options prompt_cache_retention"
    " safety_identifier store",
    _CHAT: "",
}


def render_chat_request(request: ChatRequest) -> Json:
    """The request as a body of POST /v1/chat/completions, in OpenAI's own words, with `max_tokens` for the limit.
    Its messages must be tidy (tidy_messages): each turn of calls is followed by all their results."""
    turns = [Message("system", request.system), *request.messages]
    fields = {
        "model": request.model, "messages": [item for turn in turns for item in _write_chat_turn(turn)],
        **_write_chat_tools(request), "max_tokens": request.max_tokens, "temperature": request.temperature,
        "top_p": request.top_p, "stop": request.stop or None,
        "user": request.user if 0 < len(request.user) <= _CHAT_MAX_USER else None,
        "reasoning_effort": _write_chat_effort(request.reasoning, request.model) if request.reasoning else None,
        "response_format": _write_chat_output(request.output) if request.output else None,
        "stream": request.stream or None, "stream_options": {"include_usage": True} if request.stream else None,
    }  # fmt: skip
    return {**(_chat_shared_fields(request.fields) if request.fields else {}), **_told(fields)}


def _told(fields: Json) -> Json:
    return {key: value for key, value in fields.items() if value is not None}


def _chat_shared_fields(fields: Dict[str, Json]) -> Json:
    found = {"verbosity": get_dict(get_dict(fields, "responses"), "text").get("verbosity")}
    for wire, keys in _CHAT_SHARED.items():
        bag = get_dict(fields, wire)
        found.update((key, bag[key]) for key in (keys.split() if keys else bag) if key in bag)
    if found.get("service_tier") == "standard_only":  # Anthropic's word
        found["service_tier"] = "default"
    if not found.get("store"):  # "The 'metadata' parameter is only allowed when 'store' is enabled"
        found.pop("metadata", None)
    return _told(found)


def _write_chat_effort(reasoning: Reasoning, model: str) -> Optional[str]:
    """Thinking that a switch turned off is no effort: models that never think refuse the word `none`."""
    is_switch = reasoning.effort == "none" and "thinking" in own_extra(reasoning, "anthropic")
    return None if is_switch else _openai_effort(reasoning, model) or None


def _write_chat_output(output: JsonOutput) -> Json:
    if output.schema is None:
        return {"type": "json_object"}
    inner = {"name": output.name or "answer", "schema": output.schema, "strict": output.strict}
    return {"type": "json_schema", "json_schema": _told({**inner, "description": output.description or None})}


def _write_chat_tools(request: ChatRequest) -> Json:
    """tools, tool_choice and parallel_tool_calls; the latter two are errors without the first (traps 96, 97)."""
    tools, choice = [item for item in map(_write_chat_tool, request.tools) if item], _openai_choice(request)
    if isinstance(choice, dict):
        choice = {"type": choice["type"], choice["type"]: {"name": choice["name"]}}
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": request.parallel_tools} if tools else {}


def _openai_choice(request: ChatRequest) -> Any:
    """`tool_choice` as in OPENAI RESPONSES; Chat nests the name. A tool that had to be left out cannot be forced."""
    mode, name = request.tool_choice or (None, "")
    if mode != "tool":
        return "required" if mode == "any" else mode
    kinds = [tool.kind for tool in request.tools if tool.name == name and tool.kind != "server"]
    return {"type": kinds[0], "name": name} if kinds else None


def _write_chat_tool(tool: Tool) -> Json:
    own, kind, grammar = own_extra(tool, _CHAT), tool.kind, tool_grammar(tool)
    if kind == "server":
        return own
    inner = _openai_tool(tool, tool.strict, {"grammar": grammar} if grammar else {})
    return {**(own if kind == "function" else {}), "type": kind, kind: inner}


def _openai_tool(tool: Tool, strict: Optional[bool], grammar: Json) -> Json:
    """What both of OpenAI's formats say of a tool beside its type. grammar: of a custom tool, if it has one."""
    more = {"parameters": _openai_schema(tool.schema or {}), "strict": strict}
    if tool.kind == "custom":
        more = {"format": {"type": "grammar", **grammar} if grammar else None}
    return _told({"name": tool.name, "description": tool.description or None, **more})


def _openai_schema(schema: Json) -> Json:
    """The parameters of a function; an object without properties is refused by some (trap 94)."""
    if not any(key in schema for key in ("type", "anyOf", "oneOf", "allOf", "$ref")):
        schema = {"type": "object", **schema}
    return {**schema, "properties": {}} if schema.get("type") == "object" and "properties" not in schema else schema


def _write_chat_turn(message: Message) -> List[Json]:
    """A turn's tool messages (trap 77), then one message with the rest, and with what those cannot hold (trap 104).

    Text alone is a string, which every server takes. Foreign thinking is for turns with calls (traps 84, 87).
    """
    items: List[Json] = []
    if message.role == "assistant":
        has_calls = any(isinstance(block, ToolCall) for block in message.blocks)
        kept = [b for b in message.blocks if has_calls or not isinstance(b, Thinking) or own_extra(b, _CHAT)]
        fields: Json = {"content": None, **_answer_fields(kept, "call")}  # null only beside others (trap 83)
    else:
        parts: List[Json] = []
        for block in message.blocks:
            if isinstance(block, ToolResult):
                item, rest = _write_chat_result(block)
                items.append(item)
                parts += rest
            else:
                parts += _write_chat_part(block) if message.role == "user" else _text_part(block, _plain_text(block))
        is_text = all(len(part) == 2 and part.get("type") == "text" for part in parts)
        fields = {"content": "\n\n".join(part["text"] for part in parts) if is_text else parts}
    if fields.get("content") or fields.get("tool_calls") or fields.get("refusal"):
        items.append({"role": message.role, **fields, **_told({"name": own_extra(message, _CHAT).get("name")})})
    return items


def _write_chat_result(result: ToolResult) -> Tuple[Json, List[Json]]:
    """The tool message, and the parts that it cannot hold."""
    inner = [part for block in result.blocks for part in _write_chat_part(block)]
    rest = [part for part in inner if part.get("type") != "text"]
    text = "\n".join(part["text"] for part in inner if part.get("type") == "text")
    if rest:
        rest.insert(0, {"type": "text", "text": "[from the result of tool call %s]" % result.call_id})
        text = text or "(see the next message)"
    return {"role": "tool", "tool_call_id": result.call_id, "content": _result_text(result, text)}, rest


def _result_text(result: ToolResult, text: str) -> str:
    """The text of a result, where the format has no flag for an error."""
    return "Error: " + text if result.is_error and not text.lower().startswith("error") else text


def _plain_text(block: Any) -> str:
    return note_of_media(block) if isinstance(block, Media) else getattr(block, "text", "")


# Block type -> the field of a message or delta that holds its text (trap 54).
_CHAT_TEXT_FIELDS: Dict[type, str] = {Text: "content", Refusal: "refusal", Thinking: "reasoning_content"}


def _answer_fields(blocks: Blocks, call_id: str) -> Json:
    """What an assistant says, as fields of its message. call_id: the beginning of ids for calls without one."""
    fields: Json = {}
    texts: Dict[str, List[str]] = {}
    details: List[Any] = []  # a signature may come behind the text of the answer
    for block in blocks:
        bag = own_extra(block, _CHAT)
        text = "\n\n" * bool(bag.get("apart")) + _plain_text(block)
        if isinstance(block, ToolCall):
            calls = fields.setdefault("tool_calls", [])
            calls.append(_write_chat_call(block, block.id or "%s_%d" % (call_id, len(calls))))
        elif isinstance(block, Opaque) and block.wire == _CHAT and block.value.get("type") == "image_url":
            fields.setdefault("images", []).append(block.value)
        elif text:
            field = get_text(bag, "field") or _CHAT_TEXT_FIELDS.get(type(block), "content")
            texts.setdefault(field, []).append(text)
        if bag:
            details += get_list(bag, "reasoning_details")
            fields.update(_told({"reasoning_opaque": bag.get("reasoning_opaque")}))
    said = {field: "".join(pieces) for field, pieces in texts.items()}
    return {**said, **({"reasoning_details": _whole_details(details)} if details else {}), **fields}


def _write_chat_call(call: ToolCall, call_id: str) -> Json:
    """Arguments that were cut off become an object (trap 42): vLLM and others parse the history's."""
    text = call.arguments.strip() or "{}"
    text = text if text[0] == "{" and text[-1] == "}" else arguments_text(arguments_object(text))
    inner = {"name": call.name, _CHAT_CALLS[call.kind]: text if call.kind == "function" else call.arguments}
    return {**own_extra(call, _CHAT), "id": call_id, "type": call.kind, call.kind: inner}


def _write_chat_part(block: Any) -> List[Json]:
    """A block as a part; a sound or PDF needs its data, a text document becomes its text (trap 105)."""
    if isinstance(block, Text):
        return _text_part(block, block.text)
    kind = block.kind if isinstance(block, Media) else type(block)
    if kind in (Thinking, Opaque):
        return [block.value] if kind is Opaque and block.wire == _CHAT else []
    if kind == "image":
        detail = own_extra(block, _CHAT).get("detail")  # of which Responses knows one more
        detail = _told({"detail": "high" if detail == "original" else detail})
        return [{"type": "image_url", "image_url": {"url": url_of_media(block, "image/png"), **detail}}]
    if kind == "audio" and block.data:
        form = block.media_type.rpartition("/")[2] or "wav"
        form = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav"}.get(form, form)
        return [{"type": "input_audio", "input_audio": {"data": block.data, "format": form}}]
    if kind == "document" and block.data and block.media_type in ("", "application/pdf"):
        file = {"filename": _file_name(block), "file_data": url_of_media(block, "application/pdf")}
        return [{"type": "file", "file": file}]
    words = text_of_media(block) if kind == "document" else None
    text = _plain_text(block) if words is None else "\n".join(filter(None, (block.name, words))) or "(empty document)"
    return _text_part(block, text)


def _file_name(block: Media) -> str:
    """OpenAI knows a file's kind by the ending of its name, which the title of a document may lack."""
    return block.name if re.search(r"\.[A-Za-z]\w{1,4}$", block.name) else (block.name or "document") + ".pdf"


def _text_part(block: Any, text: str) -> List[Json]:
    """`cache_control` stands where COMPATIBILITY put it: a text that bears it stays a part."""
    mark = own_extra(block, _CHAT).get("cache_control")
    part = {"type": "text", "text": text}
    return [part if mark is None else {**part, "cache_control": mark}] if text else []


# ---- whole answers

# Stop reason -> its words in lower case beside itself (trap 47): OpenAI's five, Mistral's model_length, z.ai's
# sensitive, Gemini's and Anthropic's at routers that pass them through. Whatever else is an ordinary end.
_FINISH_WORDS = {
    "max_tokens": "length max_output_tokens",
    "model_context_window_exceeded": "model_length",
    "tool_use": "tool_calls function_call",
    "refusal": "content_filter content_filtered guardrail_intervened safety recitation prohibited_content blocklist"
    " spii sensitive",
}
_CHAT_STOPS = {word: reason for reason in STOP_REASONS for word in [reason, *_FINISH_WORDS.get(reason, "").split()]}
# finish_reasons that mean a failure: OpenRouter, Mistral | z.ai | vLLM and SGLang | DeepSeek.
_CHAT_FAILURES = {"error": 502, "network_error": 502, "abort": 502, "insufficient_system_resource": 503}
# Stop reason -> finish_reason (SDK: Choice.finish_reason).
_CHAT_FINISHES = {"max_tokens": "length", "model_context_window_exceeded": "length", "refusal": "content_filter"}
# What an answer says beside its text; kept for conversions between a stream and a whole answer of this format.
_CHAT_ANSWER_KEYS = ("service_tier", "system_fingerprint", "provider", "citations", "search_results")


def _first_count(*values: Any) -> int:
    return next(filter(None, [as_int(value) for value in values if value]), 0)


def _chat_usage(usage: Json) -> Usage:
    """SDK: CompletionUsage or ResponseUsage, and where others put the cached tokens (trap 113).

    Together, Hugging Face: cached_tokens; DeepSeek: prompt_cache_hit_tokens; Mistral: num_cached_tokens. xAI counts
    reasoning beside completion_tokens, which shows in the total.
    """
    get = usage.get
    details = as_dict(get("prompt_tokens_details") or get("input_tokens_details")).get
    prompt = _first_count(get("prompt_tokens"), get("input_tokens"))
    output = _first_count(get("completion_tokens"), get("output_tokens"))
    outputs = as_dict(get("completion_tokens_details") or get("output_tokens_details"))
    thought = _first_count(outputs.get("reasoning_tokens"), get("reasoning_tokens"))
    if thought and as_int(get("total_tokens")) == prompt + output + thought:
        output += thought
    elsewhere = map(get, ("cached_tokens", "prompt_cache_hit_tokens", "num_cached_tokens"))
    cached = min(_first_count(details("cached_tokens"), *elsewhere), prompt)
    written = min(as_int(details("cache_write_tokens")), prompt - cached)
    return Usage(prompt - cached - written, output, cached, written, min(thought, output))  # Kimi's may be one more


def _write_openai_usage(usage: Usage, prompt: str = "prompt_tokens", output: str = "completion_tokens") -> Json:
    """SDK: CompletionUsage; ResponseUsage names the two counts otherwise. The prompt includes what was read from and
    written to the cache (trap 113)."""
    total = usage.input + usage.cache_read + usage.cache_write
    counts = {prompt: total, output: usage.output, "total_tokens": total + usage.output}
    cached = {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write}
    return {**counts, prompt + "_details": cached, output + "_details": {"reasoning_tokens": usage.reasoning}}


def render_chat_response(response: ChatResponse, context: Context) -> Json:
    """SDK: ChatCompletion. `model` is what the client asked for (trap 44); `usage` is left out when nobody told it."""
    bag, fields = own_extra(response, _CHAT), _answer_fields(response.blocks, "call_" + context.id)
    content = None if "tool_calls" in fields or "refusal" in fields else ""
    annotations = _told({"annotations": bag.get("annotations") or None})
    message = {"role": "assistant", "content": content, "refusal": None, **fields, **annotations}
    reason = _shown_finish(response.stop_reason, "tool_calls" in fields, "refusal" in fields)
    answer = {
        **_chat_head(response, context, "chat.completion"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        "usage": _write_openai_usage(response.usage) if response.usage is not None else None,
    }
    return {**_told(answer), **{key: bag[key] for key in _CHAT_ANSWER_KEYS if key in bag}}


def _chat_head(start: Union[ChatResponse, Started], context: Context, kind: str) -> Json:
    own_id = start.id if start.id.startswith("chatcmpl-") else "chatcmpl-" + context.id
    return {"id": own_id, "object": kind, "created": context.created or start.created, "model": context.request.model}


def _own_end(kinds: Iterable[type], otherwise: str = "end_turn") -> str:
    """Why an answer ended of its own accord, by the types of its blocks."""
    return "tool_use" if ToolCall in kinds else "refusal" if Refusal in kinds else otherwise


def _shown_finish(reason: str, has_calls: bool, has_refusal: bool) -> str:
    """The finish_reason; `tool_calls` exactly when calls were sent and nothing cut the answer short (trap 53)."""
    if reason in _CHAT_FINISHES:
        return "stop" if reason == "refusal" and has_refusal else _CHAT_FINISHES[reason]
    return "tool_calls" if has_calls else "stop"


# ---- streams: Chat Completions -> neutral

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"  # around the reasoning that a server left in the content (trap 48)
_THINK_TAGS = (_THINK_OPEN, "<reasoning>")  # the latter at Bedrock, of gpt-oss (CherryHQ/cherry-studio#10225)
# A tag that the model's template had opened: a whole answer is divided there, a stream only loses it as its own chunk.
_LONE_CLOSE = re.compile(r"(?m)^</think>\s*$")
_DETAIL_KEYS = ("text", "summary", "data", "signature")
# Field of a delta -> the block that its text adds to. GitHub Copilot: reasoning_text.
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "reasoning_text")
_CHAT_FLOWS = {"content": Text, "refusal": Refusal, **dict.fromkeys(_THOUGHT_FIELDS, Thinking)}
_MAX_HELD = 4096  # characters of white space in front of a text; more of it counts as text


class _Slot:
    """A block of an answer, open or to come. waiting: its text not yet passed on. For calls also pieces: all of it,
    size: its length, is_whole: whether it was found to be an object, which is looked at next when it is longer than
    `judged`, and id: the upstream's own, which may come after the block was opened (trap 37)."""

    is_open = is_cumulative = is_whole = False
    size = judged = 0
    id = ""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.waiting: List[str] = []
        self.pieces: List[str] = []

    def add_arguments(self, text: str) -> None:
        """More arguments. Some servers repeat all of them from the start (trap 40), but an object may begin like the
        one around it: after `:`, `,` or `[` a repetition must be known as such."""
        if 0 < self.size <= len(text) and text[0] == "{" and self.block.kind == "function":
            so_far = "".join(self.pieces)
            if text.startswith(so_far) and (self.is_cumulative or not so_far.rstrip().endswith((":", ",", "["))):
                self.is_cumulative = True
                text = text[self.size :]
        if text:
            self.pieces.append(text)
            self.waiting.append(text)
            self.size += len(text)

    def is_complete(self) -> bool:
        """Whether nothing can follow in it once another block began: of a call, when its arguments are an object."""
        if type(self.block) is not ToolCall:
            return True
        may_end = self.is_open and self.size > self.judged and self.block.kind == "function"
        if may_end and self.pieces[-1].rstrip().endswith("}"):
            text = "".join(self.pieces)
            self.judged = self.size + self.size // 8  # thousands of pieces may end like that
            self.is_whole = arguments_object(text) != {RAW_ARGUMENTS: text}
        return self.is_whole


def _whole_details(details: List[Any]) -> List[Any]:
    """Reasoning details as OpenRouter wants them back: a stream brings the text of one in pieces under its index, the
    signature of all of it last (agno-agi/agno#8794)."""
    whole: Dict[Any, Json] = OrderedDict()
    texts: Dict[Any, List[str]] = {}
    for number, item in enumerate(map(as_dict, details)):
        is_piece = "index" in item and "data" not in item
        place = "%s %s" % (item.get("type"), item["index"]) if is_piece else number
        whole.setdefault(place, {}).update(_told(item))
        for key in ("text", "summary"):
            texts.setdefault((place, key), []).append(get_text(item, key))
    for (place, key), pieces in texts.items():
        whole[place].update({key: "".join(pieces)} if any(pieces) else {})
    return list(whole.values())


class ChatStreamParser:
    """Chunks (SDK: ChatCompletionChunk) and their dialects to neutral stream events, one block open at a time.

    Every unfinished block is a slot, in the order in which they began. The first one streams; those behind it are held
    and follow whole (trap 33). Finished is told at `[DONE]` or at the end of the bytes, so that usage sent last is in
    it. done: a finish_reason or `[DONE]` was seen. usage: the last counts told, or None. skipped: events and parts that
    could not be read. said: see WireFormat.
    """

    def __init__(self, context: Context) -> None:
        self.done = self._is_started = self.is_ended = False
        self.skipped, self.said = 0, ""
        self.usage: Optional[Usage] = None
        self._context = context
        self._out: Events = []
        self._slots: List[_Slot] = []  # the last one stays until the end
        self._types: Set[type] = set()  # of all blocks opened so far
        self._calls: Dict[Any, _Slot] = {}  # by index, by id, and the last one
        self._ids: Set[str] = set()
        self._details: List[Any] = []  # of the reasoning that is open or to come
        self._proof: Json = {}  # of the same, at GitHub Copilot
        self._tag, self._held = _THINK_OPEN, ""  # looked for next, " " behind both; text that may be its beginning
        self._reason = self._stop_sequence = ""
        self._extra: Json = {}

    def feed(self, event: SseEvent) -> Events:
        """The neutral events that `event` completes."""
        self.said = ""
        if event.data.strip() == "[DONE]":
            self.done = True
            return self.end()
        try:
            chunk = _JSON_DECODER.decode(event.data)
        except (ValueError, RecursionError):
            chunk = None
        chunk = chunk[0] if type(chunk) is list and chunk else chunk  # as Gemini tells an error
        if event.name == "error" and not as_dict(chunk).get("error"):
            chunk = {"error": as_dict(chunk) or event.data}
        if type(chunk) is dict:
            return self.read(chunk)
        self.skipped += bool(event.data.strip())
        return []

    def finish(self) -> Events:
        """The end of the bytes: without a finish_reason or `[DONE]` the answer was cut off (trap 14)."""
        if not self.done and not self.is_ended:
            message = "the upstream's stream ended without a finish_reason"  # pi asks again after "ended without"
            self._fail(ErrorInfo(502, message, "server_error", "truncated"))
        return self.end()

    def whole(self, body: Json) -> Events:
        """The events of a whole answer (SDK: ChatCompletion): its message is read like the only delta of a stream."""
        events = self.read(as_dict(body), "message")
        if not events:
            raise RouterError("the upstream's answer is no chat completion", 502, "invalid_answer")
        return events + self.end()

    def read(self, chunk: Json, field: str = "delta") -> Events:
        """The neutral events of one chunk, or of a whole answer, whose text is in the `field` message (or in both)."""
        groq = get_dict(chunk, "x_groq")
        for usage in (chunk.get("usage"), groq.get("usage")):
            self._count(usage)
        chunk = {"error": groq["error"]} if groq.get("error") else chunk  # why it stopped early (groq.types, XGroq)
        choices = get_list(chunk, "choices")
        if self.is_ended or chunk.get("error") or not choices:
            return [] if self.is_ended else self._read_without_choice(chunk)
        # Only the first of n answers is read. GitHub Copilot shares it out to several choices (HKUDS/nanobot#1481).
        own = [item for item in choices if type(item) is dict and not item.get("index")]
        for choice in own:
            self._start(chunk)
            delta, flowing = choice.get(field), self._flowing
            if type(delta) is not dict:
                # MiniMax ends a stream with all of its answer (ENTERPILOT/GoModel#1068).
                is_repeated = self._slots and chunk.get("object") == "chat.completion"
                delta = {} if is_repeated else get_dict(choice, "message" if field == "delta" else "delta")
            if delta.get("role") == "tool":  # MiniMax: what its own web search found
                continue
            self._read_delta(delta)
            if choice.get("finish_reason") or choice.get("usage") or choice.get("error"):
                self._read_end_of_choice(choice)
            elif self._out and flowing and flowing is self._flowing and len(own) == 1 and not chunk.get("usage"):
                self.said = self._only_text(delta)
        return self._take()

    def more(self, text: str) -> Events:
        """See WireFormat."""
        if self._flowing is not ToolCall:
            return [] if text.strip() == _THINK_CLOSE and self._flowing is Text else [Delta(text)]
        self._slots[-1].add_arguments(text)
        self._advance()
        return self._take()

    def _only_text(self, delta: Json) -> str:
        """The one string in a delta that adds to the block that flows and says nothing else."""
        parts = [(key, value) for key, value in delta.items() if value and key != "role"]
        key, value = parts[0] if len(parts) == 1 else ("", None)
        calls = as_list(value) if key == "tool_calls" and self._flowing is ToolCall else []
        if len(calls) == 1:
            inner = get_dict(as_dict(calls[0]), self._slots[-1].block.kind)
            return "" if inner.get("name") else as_text(inner.get("arguments") or inner.get("input"))
        return as_text(value) if _CHAT_FLOWS.get(key) is self._flowing and not (self._tag and key == "content") else ""

    def end(self) -> Events:
        """The end of the answer: whatever is held, closed blocks, and Finished once."""
        if not self.is_ended:
            self._start({})
            self._flush()
            self._advance(True)
            self.is_ended = True
            extra = {_CHAT: self._extra} if self._extra else None
            self._out.append(Finished(self._stop_reason(), self._stop_sequence, self.usage, extra))
        return self._take()

    def _take(self) -> Events:
        out, self._out = self._out, []
        return out

    def _start(self, chunk: Json) -> None:
        if not self._is_started:
            self._is_started = True
            self._extra.update((key, chunk[key]) for key in _CHAT_ANSWER_KEYS if chunk.get(key) is not None)
            answer_id = get_text(chunk, "id") or "chatcmpl-" + self._context.id
            created = as_int(chunk.get("created")) or self._context.created
            self._out.append(Started(answer_id, get_text(chunk, "model"), self.usage, created))

    def _read_without_choice(self, chunk: Json) -> Events:
        """An error, with or without its envelope, usage alone (trap 15), or Azure's prompt_filter_results (trap 16)."""
        if chunk.get("error") or _error_in(chunk):
            self._fail(read_error(200, chunk))
        return self._take()

    def _read_end_of_choice(self, choice: Json) -> None:
        """What rides with the last delta, read after it (trap 25); the first of two reasons counts (trap 50)."""
        self._count(choice.get("usage"))
        reason = get_text(choice, "finish_reason").lower().partition(":")[0]  # Gemini: "content_filter: RECITATION"
        if choice.get("error") or reason in _CHAT_FAILURES:
            error = choice.get("error") or "the upstream ended its answer with finish_reason %s" % reason
            self._fail(read_error(_CHAT_FAILURES.get(reason, 200), {"error": error}))
        elif reason not in ("", "null") and not self._reason:  # as text at DashScope
            self.done, self._reason = True, reason
            # vLLM, SGLang: the stop text that was met, or a token id.
            matched = choice.get("stop_reason") or choice.get("matched_stop")
            self._stop_sequence = as_text(matched) if matched in self._context.request.stop else ""

    def _count(self, usage: Any) -> None:
        counted = _chat_usage(usage) if isinstance(usage, dict) else ()
        if any(counted) or (counted and self.usage is None):
            self.usage = counted

    def _stop_reason(self) -> str:
        """Derived from what was sent where the upstream's word contradicts it (traps 30, 31, 46)."""
        reason = _CHAT_STOPS.get(self._reason, "end_turn")
        if reason not in ("end_turn", "tool_use", "stop_sequence"):
            return reason
        is_met = self._stop_sequence or reason == "stop_sequence"
        return _own_end(self._types, "stop_sequence" if is_met else "end_turn")

    def _fail(self, error: ErrorInfo) -> None:
        self._flush()
        self.is_ended = True
        self._out.append(Failed(error))

    # -- blocks

    @property
    def _flowing(self) -> Any:
        """The type of the open block, when no other waits behind it: its text may go out at once."""
        slot = self._slots[0] if len(self._slots) == 1 else None
        return type(slot.block) if slot and slot.is_open else None

    def _add_slot(self, block: Any) -> _Slot:
        self._slots.append(_Slot(block))
        return self._slots[-1]

    def _advance(self, is_end: bool = False) -> None:
        """Opens the first unfinished block, passes on what it holds, and goes on when nothing can follow in it.
        White space alone is no text (trap 32), unless it is all there is."""
        while self._slots:
            slot, is_last = self._slots[0], len(self._slots) == 1
            kind, call = type(slot.block), slot.block
            can_open = kind is not ToolCall or (call.name and (slot.id or slot.pieces or is_end))
            text = "".join(slot.waiting) if can_open else ""
            if kind is Text and not slot.is_open:
                can_open = text.strip() or len(text) >= _MAX_HELD or (is_end and is_last and not self._types)
            if can_open and not slot.is_open:
                if kind is ToolCall:
                    call.id = unique_id(slot.id or "call_%s_%d" % (self._context.id, len(self._ids)), self._ids)
                slot.is_open = True
                self._types.add(kind)
                self._out.append(Opened(call))
            if slot.is_open and text:
                self._out.append(Delta(text))
                slot.waiting.clear()
            if not is_end and (is_last or not slot.is_complete()):
                return
            if kind is Thinking and (self._details or self._proof):
                details = {"reasoning_details": _whole_details(self._details)} if self._details else {}
                self._out.append(Extended(_CHAT, {**details, **self._proof}))
                self._details, self._proof = [], {}
            if slot.is_open:
                self._out.append(Closed())
            self.skipped += kind is ToolCall and not slot.is_open  # a call without a name
            del self._slots[0]

    def _add_text(self, kind: type, text: Any) -> None:
        if text and type(text) is str:
            slot = self._slots[-1] if self._slots and type(self._slots[-1].block) is kind else self._add_slot(kind(""))
            slot.waiting.append(text)
            self._advance()

    def _read_delta(self, delta: Json) -> None:
        """A delta's or message's parts. Reasoning that comes under several names is read once."""
        get = delta.get
        thought = get("reasoning_content") or get("reasoning") or get("reasoning_text")
        told = as_list(get("reasoning_details"))
        details = [item for item in told if any(map(as_dict(item).get, _DETAIL_KEYS))] if told else told
        if thought or details:
            texts = [get_text(item, "text") or get_text(item, "summary") for item in details]
            self._add_text(Thinking, thought or "".join(texts))
        self._details += details
        if as_text(get("reasoning_opaque")):  # Gemini runs in circles without it (anomalyco/opencode#5346, #8900)
            self._proof = {"field": "reasoning_text", "reasoning_opaque": get("reasoning_opaque")}
        self._read_content(get("content"))
        self._add_text(Refusal, get("refusal"))
        self._add_text(Text, as_dict(get("audio")).get("transcript"))
        for image in as_list(get("images")):  # as some routers put them beside the content
            self._add_slot(Opaque(_CHAT, as_dict(image)))
            self._advance()
        if get("annotations"):
            self._extra.setdefault("annotations", []).extend(filter(as_dict, as_list(get("annotations"))))
        if get("tool_calls") or get("function_call"):  # the latter was one call without an id
            self._read_calls(get("tool_calls") or [{"index": "function_call", "function": get("function_call")}])

    def _read_content(self, value: Any) -> None:
        if type(value) is str and self._tag and value:
            self._read_tagged(value)
            return
        if type(value) is dict:  # Cloudflare Workers AI: the object that a response_format asked for, already parsed
            value = arguments_text(value)
        if as_text(value).strip() != _THINK_CLOSE:
            self._add_text(Text, value)
        for part in map(as_dict, as_list(value)):  # Mistral sends thinking as parts
            said = {"content": get_text(part, "text"), "refusal": part.get("refusal")}
            images = [part] if part.get("type") == "image_url" else None
            self._read_delta({"reasoning_content": _thinking_text(part), "images": images, **said})

    def _read_tagged(self, text: str) -> None:
        """Content that begins, or may begin, with a <think> tag; both tags may be cut anywhere."""
        text, self._held = self._held + text, ""
        if self._tag == _THINK_OPEN:
            begin = text.lstrip()
            opened = next((tag for tag in _THINK_TAGS if begin.startswith(tag)), "")
            if not opened and len(text) < _MAX_HELD and any(tag.startswith(begin) for tag in _THINK_TAGS):
                self._held = text
                return
            text = begin[len(opened) :] if opened else text
            is_closed = _THINK_CLOSE in text and _LONE_CLOSE.search(text)
            self._tag = "</" + opened[1:] if opened else _THINK_CLOSE if is_closed else ""
        if self._tag.startswith("</"):
            thought, tag, text = text.partition(self._tag)
            keep = next((n for n in range(len(self._tag) - 1, 0, -1) if thought.endswith(self._tag[:n])), 0)
            self._tag = " " if tag else self._tag
            if keep and not tag:
                thought, self._held = thought[:-keep], thought[-keep:]
            self._add_text(Thinking, thought if self._flowing is Thinking else thought.lstrip())
        text = text.lstrip() if self._tag else text
        if text:
            self._tag = ""
            self._add_text(Text, text)

    def _flush(self) -> None:
        """Text that was held because it might have been the beginning of a tag; a block for reasoning details that came
        without a text, or amid another block."""
        held, self._held = self._held, ""
        self._add_text(Thinking if self._tag.startswith("</") else Text, held)
        if (self._details or self._proof) and not (self._slots and type(self._slots[-1].block) is Thinking):
            self._add_slot(Thinking(""))

    # -- tool calls

    def _read_calls(self, value: Any) -> None:
        touched: Set[_Slot] = set()
        for entry in map(as_dict, as_list(value) or [value]):  # one call is no list at TGI and Spark
            kind = "function" if type(entry.get("function")) is dict else "custom"
            inner = get_dict(entry, kind)
            if not inner and not entry.get("id"):
                self.skipped += 1
                continue
            name, text = get_text(inner, "name"), arguments_text(inner.get(_CHAT_CALLS[kind]))
            slot = self._find_call(entry, name, text, touched)
            touched.add(slot)
            slot.id = slot.id or get_text(entry, "id")
            call = slot.block
            if not slot.is_open:
                if not call.name:  # in every chunk, at some servers: the first counts (trap 39)
                    call.name, call.kind = name, kind
                call.extra = rest_of({**own_extra(call, _CHAT), **entry}, _CHAT_CALL_KEYS, _CHAT)
            slot.add_arguments(text)
            self._advance()

    def _find_call(self, entry: Json, name: str, text: str, touched: Set[_Slot]) -> _Slot:
        """The call that an entry continues, or a new one: `index` and `id` may be missing, or the same for all."""
        call_id, index = get_text(entry, "id"), entry.get("index")
        place = ("index", index) if type(index) in (int, str) else None
        slot = self._calls.get(place)
        if slot is None and not (place and name):
            slot = self._calls.get(("id", call_id) if call_id else "last")
        if slot is None or (name and self._is_new_call(slot, call_id, name, text, touched)):
            self._flush()
            slot = self._add_slot(ToolCall("", ""))
            self._calls["last"] = slot
        if place:
            self._calls[place] = slot
        if call_id:
            self._calls.setdefault(("id", call_id), slot)
        return slot

    def _is_new_call(self, slot: _Slot, call_id: str, name: str, text: str, touched: Set[_Slot]) -> bool:
        """Whether an entry that bears a name is another call than `slot`, although its index is the same (trap 35)."""
        if slot in touched or (call_id and slot.id):
            return slot in touched or call_id != slot.id
        is_repeated = name == slot.block.name and (text.lstrip()[:1] != "{" or text == "".join(slot.pieces))
        return not is_repeated and slot.is_complete()


# ---- streams: neutral -> Chat Completions

_quote_json = json.encoder.encode_basestring_ascii
_HOLE = "\0"  # stands in a chunk for the text of a delta


class ChatStreamRenderer:
    """Neutral stream events to chunks (SDK: ChatCompletionChunk).

    The role is in the first chunk only (trap 51), every index of a choice is 0 (trap 52), calls are counted on their
    own (trap 53). A stream that failed ends without `[DONE]`. Only the text of a chunk is written anew for each delta.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._head: Json = {}  # of every chunk, once there was one
        self._is_ended = self._lacks_arguments = self._has_refusal = False
        self._calls = 0
        self._prefix = self._suffix = ""  # around the text of a delta; "" when the open block shows none

    def render(self, event: Any) -> bytes:
        """The bytes for `event`, b"" when the client sees nothing of it."""
        if type(event) is Delta:
            self._lacks_arguments = False
            return (self._prefix + _quote_json(event.text) + self._suffix).encode("ascii") if self._prefix else b""
        handler = self._HANDLERS.get(type(event))
        return handler(self, event) if handler and not self._is_ended else b""

    def _start(self, event: Started) -> bytes:
        if self._head:
            return b""
        self._head = _chat_head(event, self._context, "chat.completion.chunk")
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: Json, reason: Optional[str] = None) -> bytes:
        """With include_usage every chunk but the last says that it has none (SDK: ChatCompletionChunk.usage)."""
        chunk = {**self._head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        return sse_event(dump_json({**chunk, "usage": None} if self._context.request.include_usage else chunk))

    def _open(self, event: Opened) -> bytes:
        out, block = self._start(UNTOLD_START), event.block
        shown = _answer_fields([block], "call_%s_%d" % (self._context.id, self._calls))
        hole: Optional[Json] = None
        if isinstance(block, ToolCall):
            field, (call,) = _CHAT_CALLS[block.kind], shown["tool_calls"]
            call["index"], call[block.kind][field] = self._calls, block.arguments
            hole = {"tool_calls": [{"index": self._calls, block.kind: {field: _HOLE}}]}
            self._calls += 1
            self._lacks_arguments = block.kind == "function" and not block.arguments
        elif type(block) in _CHAT_TEXT_FIELDS:
            self._has_refusal = self._has_refusal or isinstance(block, Refusal)
            hole = {_CHAT_TEXT_FIELDS[type(block)]: _HOLE}
        parts = self._chunk(hole).decode("ascii").rsplit(dump_json(_HOLE).decode("ascii"), 1) if hole else ("", "")
        self._prefix, self._suffix = parts
        return out + (self._chunk(shown) if shown else b"")

    def _close(self, event: Closed) -> bytes:
        """A call without arguments is one with an empty object (trap 41): clients parse them."""
        out = self.render(Delta("{}")) if self._lacks_arguments else b""
        self._prefix = ""
        return out

    def _extend(self, event: Extended) -> bytes:
        details = event.values.get("reasoning_details") if event.wire == _CHAT and self._head else None
        return self._chunk({"reasoning_details": details}) if details else b""

    def _finish(self, event: Finished) -> bytes:
        reason = _shown_finish(event.stop_reason, self._calls > 0, self._has_refusal)
        out = self._start(UNTOLD_START) + self._chunk({}, reason)
        self._is_ended = True
        if event.usage is not None and self._context.request.include_usage:
            out += sse_event(dump_json({**self._head, "choices": [], "usage": _write_openai_usage(event.usage)}))
        return out + b"data: [DONE]\n\n"

    def _fail(self, event: Failed) -> bytes:
        """`[DONE]` does not follow it (trap 14)."""
        self._is_ended, self._prefix = True, ""
        return sse_event(dump_json(render_chat_error(event.error, self._context.id)))

    _HANDLERS = {Started: _start, Opened: _open, Closed: _close, Extended: _extend, Finished: _finish, Failed: _fail}


# ---- errors

# Error types by status (platform.openai.com/docs/guides/error-codes), without their `_error`; 4xx and 5xx otherwise.
_CHAT_ERROR_TYPES = {401: "authentication", 403: "permission", 429: "rate_limit"}


def render_chat_error(info: ErrorInfo, request_id: str) -> Json:
    """SDK: ErrorObject (openai.types.shared); the type follows from the status when nobody named one."""
    kind = _CHAT_ERROR_TYPES.get(info.status, "server" if info.status >= 500 else "invalid_request") + "_error"
    rest = {"param": info.param or None, "code": info.code or None}
    return {"error": {"message": info.message, "type": info.type or kind, **rest}}


OPENAI_CHAT = WireFormat(
    name=_CHAT, path="/chat/completions", parse_request=parse_chat_request, render_request=render_chat_request,
    render_response=render_chat_response, parser=ChatStreamParser, renderer=ChatStreamRenderer,
    render_error=render_chat_error, losses=CHAT_LOSSES, answer="choices", read_usage=_chat_usage,
    watch=re.compile(rb'"(?:usage"\s*:\s*\{|error"\s*:\s*[{\["]|finish_reason"\s*:\s*"|object"\s*:\s*"error")'),
)  # fmt: skip

# ==============================================================================
# 10 ANTHROPIC MESSAGES - Messages API: requests, answers, streams, errors [pure]
# ==============================================================================
#
# platform.claude.com/docs: "Messages" (api/messages), "Streaming messages", "Errors"; shapes as in the types of the
# official Python SDK 2.12 (anthropic.types and anthropic.types.beta). The block types that other formats share become
# neutral values; every other block is kept as Opaque, or, in a request's history, as Text that knows its original.

_ANTHROPIC = "anthropic"

_ANTHROPIC_MIN_BUDGET = 1024  # the least budget_tokens of ThinkingConfigEnabledParam


class AnthropicModel(NamedTuple):
    """One row of ANTHROPIC_MODELS: what models whose id matches `pattern` take.

    thinking: how reasoning is switched on: "" not at all, "budget" (type enabled with budget_tokens), "adaptive"
    (type adaptive with output_config.effort). efforts: levels known. sampling: temperature, top_p and top_k are taken.
    prefill: the conversation may end with an assistant turn. max_tokens: sent when the client named none, since the
    API demands it; every model of the row accepts it.
    """

    pattern: str
    thinking: str
    efforts: Texts
    sampling: bool
    prefill: bool
    max_tokens: int


# First match wins. platform.claude.com/docs: "Models overview", "Thinking", "Effort", "What's new in Claude ...".
# The last row is for what others serve in this format: the oldest spelling is the one they know.
_ANTHROPIC_FOURTH = r"claude-(3[-.]7|(opus|sonnet|haiku)-4([-.@][015]\b|[-@]20|(?![-.@\d]))|4-)"
ANTHROPIC_MODELS = (
    AnthropicModel(r"claude-(instant|2|3-(opus|sonnet|haiku))", "", (), True, True, 4096),
    AnthropicModel(r"claude-3[-.]5", "", (), True, True, 8192),
    AnthropicModel(_ANTHROPIC_FOURTH, "budget", (), True, True, 32000),
    AnthropicModel(r"claude-(opus|sonnet)-4[-.]6", "adaptive", ("low", "medium", "high", "max"), True, False, 32000),
    AnthropicModel(r"claude-", "adaptive", ("low", "medium", "high", "xhigh", "max"), False, False, 32000),
    AnthropicModel(r"", "budget", (), True, True, 8192),
)

# As in CHAT_LOSSES: fields and types of requests in this format in backticks, what is written in it in words.
ANTHROPIC_LOSSES = {
    "`billing_policy` `compaction` `container` `context_management` `diagnostics`"
    " `fallback_credit_token` `fallbacks` `inference_geo` `mcp_servers` `speed` `top_k` `user_profile_id`"
    " `workspace_id`": "not sent",
    "`cache_control`": "of texts and tools: kept where the upstream is OpenRouter or Qwen, else not sent",
    "`service_tier`": "kept for OpenAI Chat, else not sent",
    "`stop_sequences`": "not sent to OpenAI Responses, which knows no stop texts",
    "max_tokens of 0": "becomes 1: other caches are not warmed that way",
    "`x-anthropic-billing-header`": "Claude Code's line in front of `system`, another one in every request: not sent",
    "`thread`": "refused with 400, in the words on which the SDKs send the whole conversation",
    "`advisor_*` `bash_*` `browser_*` `code_execution_*` `computer_*` `mcp_toolset` `memory_*` `text_editor_*`"
    " `tool_search_tool_*` `web_fetch_*` `web_search_*`": "tools that only Anthropic's models know: not sent",
    "`*_tool_result` `compaction` `fallback` `mcp_tool_listing` `mcp_tool_use` `server_tool_use` `tool_addition`"
    " `tool_removal`": "what such tools left in the history: text where it can be read, else not sent; what adds or "
    "withdraws a tool is carried out",
    "`is_error`": "of tool results: becomes the word Error in front of their text",
    "`redacted_thinking` `thinking`": "in the history: to OpenAI Chat on turns with tool calls, else not sent",
    "`allowed_callers` `caller` `citations` `context` `defer_loading` `eager_input_streaming` `input_examples`"
    " `toolset_name` `transformations`": "of tools and blocks: not sent",
    "`container_upload` `file`": "files by id: become a text note, as do audio and documents other than PDF and text",
    "system messages after the first turn": "become text of the user's turn, at their place",
    "server tools of other formats": "left out, as are their blocks and citations",
    "reasoning without an Anthropic signature": "left out of the history",
    "temperature above 1": "becomes 1; with top_p and top_k left out while thinking and for models that refuse them",
    "top_p beside temperature, stop texts of white space": "left out",
    "JSON mode without a schema": "becomes a sentence in `system`",
    "open objects and bounds in the answer's schema and strict tools": "objects are closed, bounds become words of the"
    " description",
    "reasoning effort": "becomes thinking.budget_tokens or output_config.effort, by model; not when a tool is forced "
    "or max_tokens leaves no room",
    "strict: false on tools": "left out, it is the default",
    "refusal parts": "become text",
}

# ---- requests: Anthropic -> neutral

_ANTHROPIC_KINDS = field_kinds({
    (str,): "model", (list,): "messages tools stop_sequences", (str, list): "system", (int,): "max_tokens top_k",
    (dict,): "tool_choice thinking output_config output_format metadata thread", (int, float): "temperature top_p",
    (bool,): "stream",
})  # fmt: skip


def parse_anthropic_request(body: Json) -> ChatRequest:
    """The body of POST /v1/messages (MessageCreateParams, beta ones too) as a ChatRequest.
    RouterError 400 with the path of the value in Anthropic's way of writing it ("messages.3.content.0: ...")."""
    said = read_fields(body, _ANTHROPIC_KINDS)
    if said["messages"] is None:
        raise field_error("messages", "Field required")
    refuse_thread(said["thread"])
    messages, tools = read_each(_anthropic_message, said["messages"], "messages.%d"), said["tools"] or []
    may_change = any(isinstance(block, Opaque) for message in messages for block in message.blocks)
    if may_change or any(as_dict(tool).get("defer_loading") for tool in tools):
        tools = _anthropic_tools(tools, said["messages"])
    choice, config = said["tool_choice"] or {}, said["output_config"] or {}
    mode = choice.get("type") if choice.get("type") in ("auto", "any", "none", "tool") else ""
    schema = as_dict(config.get("format") or said["output_format"]).get("schema")
    rest = {key: value for key, value in body.items() if key not in _ANTHROPIC_KINDS}
    rest["output_config"] = _without(config, "effort", "format")
    return ChatRequest(
        said["model"] or "", messages, _anthropic_blocks((drop_attribution(said) or said)["system"], "system"),
        read_each(_anthropic_tool, tools, "tools.%d"),
        ToolChoice(mode, get_text(choice, "name") if mode == "tool" else "") if mode else None,
        False if choice.get("disable_parallel_tool_use") is True else None,
        said["max_tokens"], said["temperature"], said["top_p"], said["top_k"],
        stop=list(filter(as_text, said["stop_sequences"] or [])), stream=bool(said["stream"]),
        output=JsonOutput(schema) if isinstance(schema, dict) else None,
        reasoning=_anthropic_reasoning(said["thinking"] or {}, get_text(config, "effort")),
        user=get_text(said["metadata"] or {}, "user_id"), fields=rest_of(rest, (), _ANTHROPIC),
    )  # fmt: skip


def _anthropic_tools(tools: List[Any], messages: List[Any]) -> List[Any]:
    """The tools, and behind them what is defined in mid-conversation (BetaToolChangeToolDefinitionParam), each once;
    without withdrawn ones (BetaRequestToolRemovalBlockParam), and without deferred ones that no tool_reference or call
    names, unless Anthropic's own search was to find them, which nobody else has."""
    known: Dict[Any, Any] = {get_text(as_dict(tool), "name") or index: tool for index, tool in enumerate(tools)}
    searches = any(get_text(as_dict(tool), "type").startswith("tool_search_tool_") for tool in tools)
    offered = {name: searches or as_dict(tool).get("defer_loading") is not True for name, tool in known.items()}
    # Of most parts only the deferred ones could be meant: a long conversation is not to be searched for nothing.
    idle = ("text", "thinking", *(("tool_use", "tool_result") if all(offered.values()) else ()))
    for part in (as_dict(part) for turn in messages for part in get_list(as_dict(turn), "content")):
        if part.get("type") in idle:
            continue
        change, definition = get_dict(part, "tool"), get_dict(get_dict(part, "tool"), "definition")
        for item in map(as_dict, [definition or change or part, *get_list(part, "content")]):
            offered[as_text(item.get("name") or item.get("tool_name"))] = part.get("type") != "tool_removal"
        if definition:
            known.setdefault(get_text(definition, "name"), definition)
    return [tool for name, tool in known.items() if offered.get(name, True)]


def _without(item: Json, *keys: str) -> Json:
    return {key: value for key, value in item.items() if key not in keys}


def drop_attribution(body: Json) -> Optional[Json]:
    """A Messages body without the line that Claude Code puts in front of `system` for Anthropic's own books; None when
    it has none. That differs in every request, so that nobody could cache what follows (ollama/ollama#14918), and
    Bedrock refuses it (anthropics/claude-code#24168)."""
    parts = get_list(body, "system") or [{"type": "text", "text": as_text(body.get("system"))}]
    text = get_text(as_dict(parts[0]), "text")
    rest = re.sub(r"\Ax-anthropic-billing-header:[^\n]*\n*", "", text)
    front = [{**parts[0], "text": rest}] if rest else []
    return None if rest == text else {**body, "system": front + parts[1:]}


def refuse_thread(thread: Optional[Json]) -> None:
    """Threads keep the conversation at Anthropic; the SDKs' tool runners fall back to the whole history on these codes.

    anthropic.types.ThreadUnsupportedRequestErrorDetails, ThreadNotFoundErrorDetails.
    """
    if thread is not None:
        code = "thread_not_found" if thread.get("type") == "continue" else "thread_unsupported_request"
        words = "thread: not available for this model through the router; send the full conversation"
        raise RouterError(words, 400, code)


def _anthropic_reasoning(thinking: Json, effort: str) -> Optional[Reasoning]:
    """`thinking` and `output_config.effort`. Thinking switched off wins over an effort (trap 88)."""
    kind, budget = thinking.get("type"), as_int(thinking.get("budget_tokens"))
    extra = rest_of({"thinking": thinking, "effort": effort or None}, (), _ANTHROPIC)
    if kind == "disabled":
        return Reasoning("none", extra=extra)
    return Reasoning(effort, budget, kind in ("adaptive", "between_tools"), extra) if extra else None


def _anthropic_tool(item: Any, path: str) -> Tool:
    """A custom tool (ToolParam), or one that Anthropic defines by its `type` (web_search_20250305, ...)."""
    kind, name = check_kind(item, (dict,), path).get("type"), get_text(item, "name")
    if kind not in (None, "custom"):
        return Tool(name or as_text(kind), kind="server", extra={_ANTHROPIC: item})
    if not name:
        raise field_error(path + ".name", "Field required")
    schema, strict = check_field(item, "input_schema", (dict,), path), check_field(item, "strict", (bool,), path)
    extra = rest_of(item, ("type", "name", "description", "input_schema", "strict"), _ANTHROPIC)
    return Tool(name, get_text(item, "description"), schema, "function", strict, extra)


def _anthropic_message(item: Any, path: str) -> Message:
    """One message. Role system occurs in mid-conversation (SystemMessageParam, Claude Code; trap 73)."""
    role = _CHAT_ROLES.get(get_text(check_kind(item, (dict,), path), "role"))
    if role is None:
        raise field_error(path + ".role", "Input should be 'user', 'assistant' or 'system'")
    path += ".content"
    return Message(role, _anthropic_blocks(check_kind(item.get("content"), (str, list), path), path))


def _anthropic_blocks(content: Any, path: str) -> Blocks:
    if isinstance(content, str):
        return [Text(content)] if content else []
    return read_each(_anthropic_block, content, path + ".%d")


class AnthropicBlock(NamedTuple):
    """One row of ANTHROPIC_BLOCKS: a block type, what it is in the neutral form, and how streams tell its text.

    delta, piece: type of the deltas that add to the block's text, and their field with it, as it is called in a block
    of words, too. more: what stands for fields that only this format has.
    """

    kind: str
    block: type
    delta: str
    piece: str
    more: Json = {}


# The block types that an answer can hold and other formats know, too (anthropic.types.RawContentBlockDelta).
ANTHROPIC_BLOCKS = (
    AnthropicBlock("text", Text, "text_delta", "text"),
    AnthropicBlock("thinking", Thinking, "thinking_delta", "thinking", {"signature": ""}),
    AnthropicBlock("tool_use", ToolCall, "input_json_delta", "partial_json"),
)
_ANTHROPIC_BY_KIND = {row.kind: row for row in ANTHROPIC_BLOCKS}
_ANTHROPIC_BY_BLOCK = {Refusal: ANTHROPIC_BLOCKS[0], **{row.block: row for row in ANTHROPIC_BLOCKS}}
_ANTHROPIC_CALL_KEYS = ("type", "id", "name", "input")


def _anthropic_part(item: Json, row: Optional[AnthropicBlock]) -> Any:
    """A block that an answer can hold. row: of its type."""
    if row is None:
        return Opaque(_ANTHROPIC, item)
    if row.block is not ToolCall:
        return row.block(get_text(item, row.piece), rest_of(item, ("type", row.piece), _ANTHROPIC))
    arguments, extra = arguments_text(item.get("input") or {}), rest_of(item, _ANTHROPIC_CALL_KEYS, _ANTHROPIC)
    return ToolCall(get_text(item, "id"), get_text(item, "name"), arguments, extra=extra)


def _anthropic_block(item: Any, path: str) -> Any:
    """One content block of a request as a neutral value."""
    kind = need_text(check_kind(item, (dict,), path), "type", path)
    row, reader = _ANTHROPIC_BY_KIND.get(kind), _ANTHROPIC_READERS.get(kind)
    if row is not None:
        for key in ("id", "name") if row.block is ToolCall else (row.piece,):
            need_text(item, key, path)
        if row.block is ToolCall:
            check_field(item, "input", (dict,), path)
        return _anthropic_part(item, row)
    if reader is not None:
        return reader(item, path)
    if kind in ("server_tool_use", "mcp_tool_use", "compaction") or kind.endswith("_tool_result"):
        return _anthropic_shown(item, "[%s] %s\n" % (kind, readable(item)))
    return Opaque(_ANTHROPIC, item)


def _anthropic_shown(item: Json, *words: str) -> Any:
    """A block that others see as text (trap 107), if there are words in it, and this format as it came."""
    text = "\n".join(filter(None, words))
    return Text(text, {_ANTHROPIC: {"block": item}}) if text else Opaque(_ANTHROPIC, item)


def _anthropic_media(item: Json, path: str) -> Any:
    """ImageBlockParam, DocumentBlockParam. A text source is text to others."""
    source, title = get_dict(item, "source"), get_text(item, "title")
    if source.get("type") not in ("text", "content"):
        return _read_source(item, path, rest_of(item, ("type", "source", "title"), _ANTHROPIC))
    value = source.get("data") or source.get("content")
    return _anthropic_shown(item, title, get_text(item, "context"), as_text(value) or readable(value))


def _anthropic_result(item: Json, path: str) -> ToolResult:
    call_id, content = need_text(item, "tool_use_id", path), check_field(item, "content", (str, list), path)
    blocks = _anthropic_blocks(content, path + ".content")
    blocks = [_anthropic_shown(b.value, dump_json(b.value).decode()) if isinstance(b, Opaque) else b for b in blocks]
    extra = rest_of(item, ("type", "tool_use_id", "content", "is_error"), _ANTHROPIC)
    return ToolResult(call_id, blocks, item.get("is_error") is True, extra)


_ANTHROPIC_READERS: Dict[str, Callable[[Json, str], Any]] = {
    "tool_reference": lambda item, path: _anthropic_shown(item, "tool loaded: %s" % get_text(item, "tool_name")),
    "image": _anthropic_media, "document": _anthropic_media, "tool_result": _anthropic_result,
    "search_result": lambda item, path: _anthropic_shown(
        item, get_text(item, "title"), get_text(item, "source"), readable(item.get("content"))
    ),
}  # fmt: skip


# ---- requests: neutral -> Anthropic


def render_anthropic_request(request: ChatRequest) -> Json:
    """A ChatRequest as the body of POST /v1/messages; `request.model` decides the row of ANTHROPIC_MODELS.
    The conversation must be tidy (tidy_messages): calls answered in the turn that follows them."""
    row = next(row for row in ANTHROPIC_MODELS if re.search(row.pattern, request.model))
    own, output = get_dict(request.fields or {}, _ANTHROPIC), request.output or JsonOutput()
    system, messages = list(request.system), list(request.messages)
    while messages and messages[0].role == "system":
        system += messages.pop(0).blocks
    if request.output and output.schema is None:
        system.append(Text("Answer with one valid JSON object and nothing else."))
    turns = _anthropic_turns(messages, row.prefill)
    tools = [tool for tool in map(_write_anthropic_tool, request.tools) if tool]
    choice = _write_anthropic_choice(request, [tool.get("name") for tool in tools]) if tools else {}
    max_tokens = row.max_tokens if request.max_tokens is None else request.max_tokens
    thinking, effort = _write_anthropic_reasoning(request.reasoning, row, max_tokens, choice, turns)
    form = output.schema and {"type": "json_schema", "schema": output.schema}
    config = _told({"effort": effort or None, "format": form})
    samples: Json = {}
    if row.sampling and as_dict(thinking).get("type") in (None, "disabled"):  # trap 72
        samples = {"top_p": request.top_p, "top_k": request.top_k}
        if request.temperature is not None:
            samples.update(temperature=min(request.temperature, 1.0), top_p=None)
    body = {
        "model": request.model, "messages": list(map(_with_legal_ids, turns)), **own,
        "system": _anthropic_content([part for part in _anthropic_parts(system) if part.get("type") == "text"]),
        "tools": tools, "tool_choice": choice, "max_tokens": max_tokens, "thinking": thinking,
        "output_config": {**get_dict(own, "output_config"), **config}, **samples,
        "stop_sequences": [text for text in request.stop if text.strip()],
        "metadata": {"user_id": request.user} if request.user else None, "stream": request.stream or None,
    }  # fmt: skip
    return {key: value for key, value in body.items() if value not in (None, [], {})}


def _write_anthropic_choice(request: ChatRequest, names: List[Any]) -> Json:
    """Traps 96 and 97. A forced tool that had to be left out cannot be forced."""
    mode, name = request.tool_choice or ("", "")
    choice = {"type": mode} if mode else {}
    if mode == "tool":
        choice = {"type": mode, "name": name} if name in names else {}
    if request.parallel_tools is False and mode != "none":
        return {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return choice


def _write_anthropic_tool(tool: Tool) -> Json:
    bag = own_extra(tool, _ANTHROPIC)
    if tool.kind == "server":
        return bag
    about = _told({"description": tool.description or None, "strict": tool.strict or None})
    schema = {"type": "object", "properties": {}, **(tool.schema or {})}
    return {"name": tool.name, "input_schema": schema, **about, **bag}


def _write_anthropic_reasoning(
    reasoning: Optional[Reasoning], row: AnthropicModel, max_tokens: int, choice: Json, turns: List[Any]
) -> Tuple[Optional[Json], str]:
    """(`thinking`, `output_config.effort`). A budget leaves a quarter of max_tokens free (trap 89).

    Forced tools and thinking exclude each other. display: the newest models hide their reasoning unless told, and who
    asked for reasoning wants to see it.
    """
    own = own_extra(reasoning, _ANTHROPIC) if reasoning else {}
    if reasoning is None or own:
        return own.get("thinking"), own.get("effort", "")
    if reasoning.effort == "none":
        return {"type": "disabled"} if row.thinking else None, ""
    effort, room = nearest_effort(reasoning, row.efforts), max_tokens * 3 // 4
    if not row.thinking or choice.get("type") in ("any", "tool"):
        return None, effort
    if row.thinking == "adaptive":
        return {"type": "adaptive", "display": "summarized"}, effort
    if room < _ANTHROPIC_MIN_BUDGET or _lacks_thinking(turns):
        return None, effort
    budget = reasoning.budget or EFFORT_BUDGETS.get(reasoning.effort, EFFORT_BUDGETS["medium"])
    return {"type": "enabled", "budget_tokens": max(_ANTHROPIC_MIN_BUDGET, min(budget, room))}, effort


def _lacks_thinking(turns: Sequence[Any]) -> bool:
    """Whether the tool turn that goes on has no thinking block in front, which budgeted thinking refuses (trap 86)."""
    last = next((turn for turn in reversed(turns) if as_dict(turn).get("role") == "assistant"), {})
    kinds = [as_dict(part).get("type") for part in get_list(last, "content")]
    return "tool_use" in kinds and kinds[0] not in ("thinking", "redacted_thinking")


def _anthropic_turns(messages: List[Message], prefill: bool) -> List[Json]:
    """`messages`: turns alternate and start with the user. A system message between them is the user's (trap 74).

    A conversation that ends with the assistant: a prefill without white space behind it, or one more user turn.
    """
    turns: List[Tuple[str, List[Json]]] = [("user", [])]
    for message in messages:
        role, parts = "assistant" if message.role == "assistant" else "user", _anthropic_parts(message.blocks)
        if turns[-1][0] == role:
            turns[-1][1].extend(parts)
        elif parts:
            turns.append((role, parts))
    filler = {"type": "text", "text": "(continue)"}
    if not turns[0][1]:
        turns[0][1].append(filler)
    role, parts = turns[-1]
    if role == "assistant" and prefill and parts[-1].get("type") == "text":
        parts[-1]["text"] = parts[-1]["text"].rstrip()
    elif role == "assistant":
        turns.append(("user", [filler]))
    return [{"role": role, "content": _anthropic_content(parts)} for role, parts in turns]


def _anthropic_content(parts: List[Json]) -> Any:
    """`parts`, or a string where that says it all."""
    return parts[0]["text"] if [list(part) for part in parts] == [["type", "text"]] else parts


def _anthropic_parts(blocks: Iterable[Any], is_answer: bool = False) -> List[Json]:
    """The content blocks for `blocks`, without those that this format has no place for.

    Text of white space is refused in a request (trap 82); reasoning goes back only if Anthropic signed it (trap 85),
    in an answer it is shown although nobody signed it.
    """
    parts = []
    for block in blocks:
        if isinstance(block, Opaque):
            parts += [block.value] if block.wire == _ANTHROPIC else []
            continue
        bag, text = own_extra(block, _ANTHROPIC), getattr(block, "text", "-")
        has_words = text if is_answer else text.strip() and not isinstance(block, Thinking)
        if "block" in bag:
            parts.append(bag["block"])
        elif has_words or (isinstance(block, Thinking) and bag.get("signature")):
            parts.append(_write_anthropic_block(block, bag))
    return parts


def _write_anthropic_block(block: Any, bag: Json) -> Json:
    if isinstance(block, Media):
        return _write_anthropic_media(block, bag)
    if isinstance(block, ToolResult):
        content = _anthropic_content(_anthropic_parts(block.blocks))
        said = _told({"content": content or None, "is_error": block.is_error or None})
        return {"type": "tool_result", "tool_use_id": block.call_id, **said, **bag}
    if isinstance(block, ToolCall):
        said = {"id": block.id, "name": block.name, "input": arguments_object(block.arguments)}
        return {"type": "tool_use", **said, **bag}
    row = _ANTHROPIC_BY_BLOCK[type(block)]
    return {"type": row.kind, row.piece: block.text, **row.more, **bag}


_ANTHROPIC_IDS = {"tool_use": "id", "tool_result": "tool_use_id"}
_ODD_IN_IDS = r"[^a-zA-Z0-9_-]"


def _with_legal_ids(message: Any) -> Any:
    """A message whose calls and results bear ids as Anthropic wants them: those of other providers reach clients as
    they are, since these want theirs back (Kimi's are functions.NAME:0)."""
    parts = as_dict(message).get("content")
    return {**message, "content": list(map(_with_legal_id, parts))} if isinstance(parts, list) else message


def _with_legal_id(part: Any) -> Any:
    field = _ANTHROPIC_IDS.get(get_text(as_dict(part), "type"))
    id = get_text(part, field) if field else ""
    return {**part, field: re.sub(_ODD_IN_IDS, "_", id)} if re.search(_ODD_IN_IDS, id) else part


# How the base64 of an image begins -> its type: a wrong one is a 400 at Anthropic, as is image/jpg; OpenAI takes any.
_IMAGE_STARTS = {"/9j/": "image/jpeg", "iVBORw0K": "image/png", "R0lGOD": "image/gif", "UklGR": "image/webp"}
_ANTHROPIC_MEDIA = {"image": tuple(_IMAGE_STARTS.values()), "document": ("application/pdf",)}


def _write_anthropic_media(block: Media, bag: Json) -> Json:
    """An image or document block, or a note for what the API does not take (traps 102, 105)."""
    media_type, text = block.media_type.lower().split(";")[0].strip(), text_of_media(block)
    media_type = next((kind for start, kind in _IMAGE_STARTS.items() if block.data.startswith(start)), media_type)
    if block.url and block.kind in _ANTHROPIC_MEDIA:
        source = {"type": "url", "url": block.url}
    elif media_type in _ANTHROPIC_MEDIA.get(block.kind, ()):
        source = {"type": "base64", "media_type": media_type, "data": block.data}
    elif text is not None:
        source = {"type": "text", "media_type": "text/plain", "data": text}
    else:
        return {"type": "text", "text": note_of_media(block)}
    title = {"title": block.name} if block.kind == "document" and block.name else {}
    return {"type": block.kind, "source": source, **title, **bag}


def drop_thinking(body: Json, keeps_signed: bool = True) -> Optional[Json]:
    """A Messages body without the reasoning in its history, and with legal ids; None when nothing is to be changed.

    keeps_signed: only that goes which this router showed of other formats. It bears an empty signature, which
    Anthropic refuses (trap 85). Where a tool turn goes on that lacks the thinking that a budget demands, thinking is
    off for this request (trap 86).
    """
    kinds = ("thinking",) if keeps_signed else ("thinking", "redacted_thinking")
    messages: List[Any] = []
    for message in get_list(body, "messages"):
        parts = list(map(as_dict, get_list(as_dict(message), "content")))
        kept = [part for part in parts if part.get("type") not in kinds or (keeps_signed and part.get("signature"))]
        if kept or not parts:
            messages.append(_with_legal_ids({**message, "content": kept} if len(kept) < len(parts) else message))
    if get_dict(body, "thinking").get("type") == "enabled" and _lacks_thinking(messages):
        # To clear old thinking is an error without thinking.
        return {**_without(body, "thinking", "context_management"), "messages": messages}
    return {**body, "messages": messages} if messages != get_list(body, "messages") else None


# ---- answers

# Keys of a Message that only this format knows, kept in the answer's bag.
_ANTHROPIC_ANSWER_KEYS = ("stop_details", "container", "context_management", "diagnostics", "input_transformations")

# Counts that Usage holds; what an answer's usage says besides is kept in the bag.
_ANTHROPIC_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def _anthropic_usage(usage: Json) -> Usage:
    """anthropic.types.Usage: input_tokens are already without the cached ones (trap 113)."""
    counts = (as_int(usage.get(key)) for key in _ANTHROPIC_COUNTS)
    return Usage(*counts, as_int(get_dict(usage, "output_tokens_details").get("thinking_tokens")))


def render_anthropic_response(response: ChatResponse, context: Context) -> Json:
    """A ChatResponse as a Message, under the model name that the client asked for (trap 44)."""
    content = _anthropic_parts(response.blocks, is_answer=True)
    has_calls = any(item.get("type") == "tool_use" for item in content)
    end, usage, bag = _anthropic_end(response, has_calls, Usage(context.likely_input))
    return {**_anthropic_shell(response, usage, context), "content": content, **end, **bag}


def _anthropic_shell(start: Union[ChatResponse, Started], usage: Json, context: Context) -> Json:
    """A Message as it begins."""
    answer_id = start.id if start.id.startswith("msg_") else "msg_" + context.id
    shell = {"id": answer_id, "type": "message", "role": "assistant", "model": context.request.model or start.model}
    return {**shell, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}


def _anthropic_end(end: Union[ChatResponse, Finished], has_calls: bool, usage: Optional[Usage]) -> List[Json]:
    """How it stopped, its usage or else `usage`, the rest of the bag.

    `tool_use` is told exactly when a tool block was sent, or agents stop or loop (traps 30, 31).
    """
    bag, reason = dict(own_extra(end, _ANTHROPIC)), end.stop_reason
    if reason in ("end_turn", "tool_use"):
        reason = "tool_use" if has_calls else "end_turn"
    counts = _write_anthropic_usage(end.usage or usage, bag.pop("usage", {}))
    return [{"stop_reason": bag.pop("stop_reason", reason), "stop_sequence": end.stop_sequence or None}, counts, bag]


def _write_anthropic_usage(usage: Optional[Usage], further: Mapping[str, Any] = {}) -> Json:
    """Always an object with integers: SDKs and Claude Code add them up unseen (trap 43)."""
    usage = usage or Usage()
    details = {"output_tokens_details": {"thinking_tokens": usage.reasoning}} if usage.reasoning else {}
    return {**further, **dict(zip(_ANTHROPIC_COUNTS, usage)), **details}


# ---- streams: Anthropic -> neutral

_ANTHROPIC_DELTAS: Dict[Any, Tuple[str, Any]] = {row.delta: (row.piece, row.block) for row in ANTHROPIC_BLOCKS}
# Type of a delta that adds no text -> its field, the key of the block's bag that it adds to, and the block.
_ANTHROPIC_PROOFS: Dict[Any, Tuple[str, str, Any]] = {
    "signature_delta": ("signature", "signature", Thinking), "citations_delta": ("citation", "citations", Text),
}  # fmt: skip


class TypedEventParser:
    """What the parsers of streams share whose events are objects with a `type`: this format's and OPENAI RESPONSES'.

    A subclass has `take(event object, its type) -> [neutral event]` and `_fail(ErrorInfo) -> [neutral event]`.
    done: the answer is complete. skipped: events that could not be read (trap 13). said: see WireFormat.
    """

    END = ""  # what the last event is called

    def __init__(self, context: Context) -> None:
        self.done = self.is_ended = self._is_started = False
        self.skipped, self.said = 0, ""
        self._context = context
        self._kinds: List[type] = []  # of the blocks so far

    def feed(self, event: SseEvent) -> Events:
        """The neutral events that `event` completes. Never raises."""
        self.said = ""
        if self.is_ended:
            return []
        try:
            data = _JSON_DECODER.decode(event.data)
            return self.take(data, data.get("type") or ("error" if _error_in(data) else event.name))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            self.skipped += event.data.strip() != "[DONE]"
            return []

    def finish(self) -> Events:
        """The end of the bytes: without its last event an answer was cut off, whatever was said before (trap 62)."""
        if self.is_ended:
            return []
        return self._fail(ErrorInfo(502, "the upstream's stream ended without " + self.END, "", "truncated"))


class AnthropicStreamParser(TypedEventParser):
    """RawMessageStreamEvents to neutral stream events. Unknown events and deltas are skipped.

    usage: the counts so far, or None. The blocks of the API never overlap; of routers that tell calls as those come, a
    call waits for the end of the one before. What else comes for a block that is not open is skipped.
    """

    END = "message_stop"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._block: Any = None  # the open block; of one that only this format knows, its own object
        self._index: Any = None
        self._late: List[Json] = []  # events of calls that began before the open one ended
        self._pieces: List[str] = []  # a block's text in its start event; the input of a block of this format only
        self._counts: Json = {}
        self._answer: Json = {}

    @property
    def usage(self) -> Optional[Usage]:
        """message_start's usage with message_delta's laid over it, field by field (trap 114)."""
        return _anthropic_usage(self._counts) if self._counts else None

    def take(self, data: Json, kind: Any) -> Events:
        """The neutral events that an event of a type completes."""
        if kind == "content_block_delta":
            return self._delta(data["delta"], data.get("index", self._index))
        handler = self._HANDLERS.get(kind)
        return handler(self, data) if handler else []

    def whole(self, message: Json) -> Events:
        """The events of a whole answer (anthropic.types.Message)."""
        if not isinstance(as_dict(message).get("content"), list):
            raise RouterError("the upstream's answer is not an Anthropic message", 502, "upstream_answer_invalid")
        return self._start({"message": message}) + self._stop({})

    def _note(self, *parts: Json) -> Events:
        """What is said of the answer. Later counts win, except that a zero never hides a number: some upstreams repeat
        the fields empty."""
        for part in parts:
            self._answer.update(_told(part))
            for key, value in get_dict(part, "usage").items():
                if value or self._counts.get(key) is None:
                    self._counts[key] = value
        return []

    def _start(self, data: Json) -> Events:
        message = get_dict(data, "message")
        self._note(message)
        if self._is_started:
            return []
        self._is_started = True
        answer_id = get_text(message, "id") or "msg_" + self._context.id
        events = [Started(answer_id, get_text(message, "model"), self.usage, self._context.created)]
        # All of it, or, where a program goes on that the model wrote, what that did meanwhile.
        for item in filter(as_dict, get_list(message, "content")):
            events += self._open({"content_block": item})
        return events

    def _make_way(self) -> Events:
        events = [] if self._is_started else self._start({})
        while self._block is not None:
            events += self._close()
        return events

    def _open(self, data: Json) -> Events:
        item = data["content_block"]
        block = _anthropic_part(item, _ANTHROPIC_BY_KIND.get(get_text(item, "type")))
        if type(self._block) is ToolCall is type(block) and data.get("index", self._index) != self._index:
            self._late.append(data)
            return []
        events = self._make_way()
        self._index = data.get("index")
        if isinstance(block, Opaque):
            self._block = dict(item)
        else:
            text, self._block = block_text(block), with_text(block, "")
            events.append(Opened(self._block))
            if isinstance(block, ToolCall):
                self._block.id = block.id or "toolu_%s_%d" % (self._context.id, len(self._kinds))
            self._pieces = [text] if text else []
        self._kinds.append(type(block))
        return events

    def _delta(self, delta: Json, index: Any) -> Events:
        field, block_type = _ANTHROPIC_DELTAS.get(delta["type"], ("", None))
        text = delta.get(field)
        if type(self._block) is not block_type or index != self._index:
            return self._other_delta(delta, as_text(text), block_type, index)
        if not text or type(text) is not str:
            return []
        self.said = text
        if self._pieces:  # a placeholder for these, or, at MiniMax, what they begin with once more (cline/cline#9215)
            begun, self._pieces = self._pieces[0], []
            text = text if block_type is ToolCall or text.startswith(begun) else begun + text
        return [Delta(text)]

    def more(self, text: str) -> Events:
        """See WireFormat."""
        return [Delta(text)]

    def _other_delta(self, delta: Json, text: str, block_type: Any, index: Any) -> Events:
        """A delta of an Opaque block, one that adds no text, or one without its start, which opens what it says."""
        if self._late and index != self._index:
            self._late.append({"type": "content_block_delta", "index": index, "delta": delta})
            return []
        is_open = index == self._index and self._block is not None
        if is_open and isinstance(self._block, dict):
            return self._add_to_opaque(_told(delta))
        field, key, owner = _ANTHROPIC_PROOFS.get(delta["type"], ("", "", None))
        if is_open and type(self._block) is owner and delta.get(field):
            return [Extended(_ANTHROPIC, {key: delta[field] if field == key else [delta[field]]})]
        if text and block_type in (Text, Thinking) and (is_open or self._block is None):
            events = self._make_way()
            self._block, self._index = block_type(""), index
            return events + [Opened(self._block), Delta(text)]
        self.skipped += 1
        return []

    def _add_to_opaque(self, delta: Json) -> Events:
        """`input` comes as JSON text; other deltas name the block's own fields (compaction_delta: content)."""
        if delta.pop("type") == "input_json_delta":
            self._pieces.append(get_text(delta, "partial_json"))
            return []
        for key, value in delta.items():
            old = self._block.get(key)
            self._block[key] = old + value if isinstance(old, str) and isinstance(value, str) else value
        return []

    def _close(self, data: Mapping[str, Any] = {}) -> Events:
        block, text, late = self._block, "".join(self._pieces), self._late
        if block is None or data.get("index", self._index) != self._index:
            late += [data] if late else []
            return []
        self._block, self._pieces, self._late = None, [], []
        if isinstance(block, dict) and text:
            block["input"] = arguments_object(text)
        rest: Events = [Opened(Opaque(_ANTHROPIC, block))] if isinstance(block, dict) else [Delta(text)] if text else []
        return [*rest, Closed(), *(event for data in late for event in self.take(data, data["type"]))]

    def _stop(self, data: Json) -> Events:
        events = self._make_way()
        self.done = self.is_ended = True
        answer, said = self._answer, get_text(self._answer, "stop_reason")
        # What it says besides text, calls and counts, and its stop_reason, if others do not know that.
        extra = {key: answer.get(key) for key in _ANTHROPIC_ANSWER_KEYS}
        extra["stop_reason"] = None if said in STOP_REASONS else said or None
        further = rest_of(self._counts, (*_ANTHROPIC_COUNTS, "output_tokens_details"), _ANTHROPIC)
        extra["usage"] = further and further[_ANTHROPIC]
        reason, words = _CHAT_STOPS.get(said) or _own_end(self._kinds), get_text(answer, "stop_sequence")
        return events + [Finished(reason, words, self.usage, rest_of(extra, (), _ANTHROPIC))]

    def _fail(self, error: ErrorInfo) -> Events:
        self.is_ended = True
        return [Failed(error)]

    _HANDLERS: Dict[Any, Callable[..., Events]] = {
        "message_start": _start, "content_block_start": _open, "content_block_stop": _close,
        "message_delta": lambda self, data: self._note(data, get_dict(data, "delta")), "message_stop": _stop,
        "ping": lambda self, data: [Ping()], "error": lambda self, data: self._fail(read_error(200, data, 500)),
    }  # fmt: skip


# ---- streams: neutral -> Anthropic


def _anthropic_event(name: str, **fields: Any) -> bytes:
    """One event. Clients need the `event:` line (the SDKs skip events without, Claude Code repeats the request)."""
    return sse_event(dump_json({"type": name, **fields}), name)


class AnthropicStreamRenderer:
    """Neutral stream events to Messages events: one message_start, blocks from 0 on, one stop for each, one end.

    Text and reasoning blocks are opened by their first delta, since a stored empty one spoils every later turn
    (trap 32). Tool arguments stream as they come if they begin like an object; others are held and repaired.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = "before"
        self._usage: Optional[Usage] = None
        self._index = 0
        self._block: Any = None
        self._is_shown = False
        self._prefix = ""  # everything of a delta event that stands before its text: a delta costs one concatenation
        self._pieces: List[str] = []  # of arguments that are held
        self._ids: Set[str] = set()

    def render(self, event: Any) -> bytes:
        """The bytes for `event`, b"" when the client sees nothing of it."""
        if type(event) is Delta:
            if self._prefix:
                return (self._prefix + _quote_json(event.text) + "}}\n\n").encode("ascii")
            return self._first_delta(event.text)
        handler = self._HANDLERS.get(type(event))
        return handler(self, event) if handler and self._state != "after" else b""

    def _start(self, event: Started) -> bytes:
        if self._state != "before":
            return b""
        self._state, self._usage = "inside", event.usage or Usage(self._context.likely_input)
        shell = _anthropic_shell(event, _write_anthropic_usage(self._usage), self._context)
        return _anthropic_event("message_start", message=shell)

    def _make_way(self) -> bytes:
        return self._start(UNTOLD_START) + self._close()

    def _open(self, event: Opened) -> bytes:
        out, block = self._make_way(), event.block
        self._block, self._pieces = block, []
        if isinstance(block, ToolCall):
            call_id = unique_id(block.id or "toolu_%s_%d" % (self._context.id, self._index), self._ids)
            self._pieces += [block.arguments] if block.arguments else []
            item = {"type": "tool_use", "id": call_id, "name": block.name, "input": {}, **own_extra(block, _ANTHROPIC)}
            return out + self._show(item)
        if not isinstance(block, Opaque):
            return out + (self._first_delta(block.text) if block.text else b"")
        if block.wire != _ANTHROPIC:
            return out
        given = block.value.get("input")
        if not isinstance(given, dict):
            return out + self._show(block.value)
        # The SDKs look for the input in a delta.
        return out + self._show({**block.value, "input": {}}) + self._input_delta(given)

    def _show(self, item: Json) -> bytes:
        self._is_shown = True
        return _anthropic_event("content_block_start", index=self._index, content_block=item)

    def _show_text(self) -> bytes:
        """The start of a text or reasoning block, if it was not told yet."""
        return b"" if self._is_shown else self._show(_write_anthropic_block(type(self._block)(""), {}))

    def _first_delta(self, text: str) -> bytes:
        """The slow path: opens a text or reasoning block, or looks at the first character of a tool's arguments."""
        row = _ANTHROPIC_BY_BLOCK.get(type(self._block))
        if row is None or (row.block is ToolCall and not text.lstrip().startswith("{")) or self._pieces:
            self._pieces.append(text)
            return b""
        out = self._show_text()
        event = 'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":'
        self._prefix = event % (self._index, row.delta, row.piece)
        return out + self.render(Delta(text))

    def _delta(self, kind: str, field: str, value: Any) -> bytes:
        return _anthropic_event("content_block_delta", index=self._index, delta={"type": kind, field: value})

    def _input_delta(self, given: Json) -> bytes:
        return self._delta("input_json_delta", "partial_json", arguments_text(given))

    def _prove(self, bag: Json) -> bytes:
        """Deltas for what a block has besides its text."""
        out = b""
        for kind, (field, key, owner) in _ANTHROPIC_PROOFS.items():
            values = bag.get(key) or [] if type(self._block) is owner else []
            for value in values if isinstance(values, list) else [values]:
                out += self._show_text() + self._delta(kind, field, value)
        return out

    def _close(self, event: Optional[Closed] = None) -> bytes:
        block, out = self._block, b""
        if isinstance(block, Thinking) or (isinstance(block, Text) and self._is_shown):
            out = self._prove(own_extra(block, _ANTHROPIC))
        elif isinstance(block, ToolCall) and self._pieces:
            out = self._input_delta(arguments_object("".join(self._pieces)))
        self._block, self._prefix = None, ""
        if not self._is_shown:
            return b""
        self._is_shown = False
        self._index += 1
        return out + _anthropic_event("content_block_stop", index=self._index - 1)

    def _finish(self, event: Finished) -> bytes:
        out = self._make_way()
        self._state = "after"
        delta, usage, bag = _anthropic_end(event, bool(self._ids), self._usage)
        rest = {key: bag.pop(key) for key in ("context_management", "input_transformations") if key in bag}
        delta.update(_without(bag, "diagnostics"))
        out += _anthropic_event("message_delta", delta=delta, usage=usage, **rest)
        return out + _anthropic_event("message_stop")

    def _fail(self, event: Failed) -> bytes:
        self._state = "after"
        return sse_event(dump_json(render_anthropic_error(event.error, self._context.id)), "error")

    _HANDLERS: Dict[type, Callable[..., bytes]] = {
        Started: _start, Opened: _open, Closed: _close, Finished: _finish, Failed: _fail,
        Extended: lambda self, event: self._prove(event.values) if event.wire == _ANTHROPIC else b"",
        # Only between message_start and the end (trap 45).
        Ping: lambda self, event: _anthropic_event("ping") if self._state == "inside" else b"",
    }  # fmt: skip


# ---- errors

# platform.claude.com/docs/en/api/errors; anthropic.types.shared.ErrorType.
_ANTHROPIC_ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
    503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip

# error.details that clients act on, by error code (_refuse_thread): the SDKs send the whole conversation then.
_ANTHROPIC_DETAILS: Json = {"thread_unsupported_request": {"unsupported": ["thread"]}, "thread_not_found": {}}
_TOO_LONG = "prompt is too long"  # by these words Claude Code knows that it has to compact (trap 156)


def render_anthropic_error(info: ErrorInfo, request_id: str) -> Json:
    """anthropic.types.shared.ErrorResponse, of the error's type if not one for all, else its status's (121, 122)."""
    other = _ANTHROPIC_ERROR_TYPES[500 if info.status >= 500 else 400]
    is_own = info.type in _ANTHROPIC_ERROR_TYPES.values() and info.type != _ANTHROPIC_ERROR_TYPES[400]
    kind = info.type if is_own else _ANTHROPIC_ERROR_TYPES.get(info.status, other)
    before = _TOO_LONG + ": " if info.code == OVERFLOW_CODE and _TOO_LONG not in info.message.lower() else ""
    further = _ANTHROPIC_DETAILS.get(info.code)
    details = {} if further is None else {"details": {"error_code": info.code, **further}}
    told = {"type": kind, "message": before + info.message, **details}
    return {"type": "error", "error": told, "request_id": request_id}


ANTHROPIC_MESSAGES = WireFormat(
    name=_ANTHROPIC, path="/messages", parse_request=parse_anthropic_request, render_request=render_anthropic_request,
    render_response=render_anthropic_response, parser=AnthropicStreamParser, renderer=AnthropicStreamRenderer,
    render_error=render_anthropic_error, losses=ANTHROPIC_LOSSES, answer="content", read_usage=_anthropic_usage,
    watch=re.compile(rb'"(?:usage|error|message_stop)"'),
)  # fmt: skip

# ==============================================================================
# 11 OPENAI RESPONSES - Responses API: requests, answers, streams, errors [pure]
# ==============================================================================
#
# Shapes: OpenAI API reference, "Responses", and the types of OpenAI's Python SDK (openai/types/responses):
# ResponseCreateParams, ResponseInputItem, Response, ResponseStreamEvent. An answer is a list of items;
# a message item holds parts, each part is one neutral block. A reasoning item with text is one Thinking
# block, one without (only encrypted content, or only an id) says nothing to other formats: Opaque.
# Items of tools that the provider runs itself (web_search_call, mcp_call, ...) are Opaque, too.
# Requests of this format go to upstreams of this format as they came, so the neutral form keeps of them what other
# formats can say; of answers it keeps all, since a stream may have to become a whole answer or the reverse.

_RESPONSES = "responses"
_FlatNames = Dict[Tuple[str, str], str]  # (namespace, name) -> flat name of each tool that came in a namespace


# How each kind of text is told: `response.<stem>.delta` and `.done` (whole text in `field`) inside an `item`, whose own
# id begins with `id`. Texts of a list `holder` have their number in `index`, and `response.<frame>.added` and `.done`
# around them.
_RESPONSES_TABLE = """
    kind             item             id  stem                    field     index         frame                  holder
    output_text      message          msg output_text             text      content_index content_part           content
    refusal          message          msg refusal                 refusal   content_index content_part           content
    reasoning_text   reasoning        rs  reasoning_text          text      content_index content_part           content
    summary_text     reasoning        rs  reasoning_summary_text  text      summary_index reasoning_summary_part summary
    function_call    function_call    fc  function_call_arguments arguments
    custom_tool_call custom_tool_call ctc custom_tool_call_input  input
""".strip().split("\n")
_ResponsesPart = namedtuple("_ResponsesPart", _RESPONSES_TABLE[0].split(), defaults=["", "", ""])
_RESPONSES_PARTS = {line.split()[0]: _ResponsesPart(*line.split()) for line in _RESPONSES_TABLE[1:]}
_RESPONSES_CALLS = {"function_call": "function", "custom_tool_call": "custom"}  # item types -> kind of the ToolCall
# What is told as which kind of part: blocks by type, calls by kind; a Thinking's bag may say another.
_RESPONSES_KINDS: Dict[Any, str] = {
    Text: "output_text", Refusal: "refusal", Thinking: "summary_text", **{v: k for k, v in _RESPONSES_CALLS.items()}
}  # fmt: skip

# The request fields whose types are checked.
_RESPONSES_CHECKED = field_kinds({
    (bool,): "parallel_tool_calls", (int,): "max_output_tokens", (int, float): "temperature top_p",
    (str,): "instructions", (dict,): "text reasoning", (str, list): "input",
})  # fmt: skip

# As in CHAT_LOSSES: fields and types of requests in this format in backticks, what is written in it in words.
RESPONSES_LOSSES = {
    "`moderation` `prompt_cache_*` `service_tier` `text.verbosity`": "kept for OpenAI Chat, else not sent",
    "`metadata`": "kept for OpenAI Chat where `store` is true, else not sent",
    "`safety_identifier`": "kept for OpenAI Chat, else the end user's id",
    "`background` `compaction_trigger` `conversation` `previous_response_id` `prompt`": "refused with 400, as file ids"
    " are: only their provider has them",
    "`item_reference`": "refused likewise, but for items of answers that the router itself wrote and still remembers",
    "`access_programs` `background_options` `context_management` `image` `max_tool_calls`": "not sent",
    "`stream_options` `top_logprobs`": "not sent: answers carry no obfuscation, no logprobs, no foreign citations",
    "`include`": "not sent; reasoning is returned as text, encrypted content only by a Responses upstream",
    "`reasoning.summary`": "not sent: reasoning comes as the upstream gives it",
    "`store`": "always false: the router stores nothing",
    "`truncation`": "always disabled",
    "`apply_patch` `code_interpreter` `computer*` `file_search` `image_generation` `local_shell` `mcp`"
    " `programmatic_tool_calling` `shell` `tool_search` `web_search*`": "tools that only OpenAI's models and servers "
    "know: not sent, and never forced",
    "`apply_patch_call*` `code_interpreter_call` `computer_call*` `file_search_call` `image_generation_call`"
    " `local_shell_call*` `mcp_*` `program*` `shell_call*` `tool_search_*` `web_search_call`": "what such tools left"
    " in the history: text where it can be read, else not sent",
    "`compaction` `configuration_update` `reasoning`": "other models' thoughts and summaries, encrypted: not sent",
    "`custom` `namespace`": "tools: become functions, of one string and with the namespace in their names",
    "`allowed_tools`": "only these tools are sent",
    "`allowed_callers` `async` `caller` `defer_loading` `detail` `filename` `format` `id` `name` `output_schema`"
    " `phase` `prompt_cache_breakpoint` `status`": "of items and tools: not sent where the other format has none",
}


# --- Requests, reading ------------------------------------------------------------------------------------


def needs_server_state(body: Json) -> Optional[str]:
    """Why a Responses request only makes sense where earlier state is kept, as a sentence; None when it needs none."""
    for field in ("previous_response_id", "conversation", "prompt", "background"):
        if body.get(field):
            return "`%s` needs state that only the provider keeps: leave it out, send the whole `input`" % field
    for index, item in enumerate(map(as_dict, get_list(body, "input"))):
        if _responses_type(item) == "item_reference":
            return "`input[%d]` is an item_reference, which only the provider can resolve: send the item itself" % index
        if item.get("type") == "compaction_trigger":
            return "`input[%d]` is a compaction_trigger, for OpenAI alone: `run codex` sums up by itself" % index
        for part in map(as_dict, get_list(item, "content") + get_list(item, "output")):
            if part.get("file_id"):
                return "`input[%d]` has a `file_id`, which only the provider can read: send the data or a URL" % index
    return None


class ItemMemory(BoundedMap):
    """Items of the answers that the router wrote for Responses clients, by owner (the name of a client's key) and id:
    nobody else can refer to them. Clients whose answers are stored (the AI SDK's, unless told otherwise) send
    references in place of the items. The oldest give way after `limit` bytes."""

    def keep(self, items: Iterable[Json], owner: str = "") -> None:
        """Remember the items of an answer."""
        for item in filter(lambda item: get_text(item, "id"), items):
            self.put_sized((owner, item["id"]), dump_json(item))

    def resolve(self, body: Json, owner: str = "") -> Optional[Json]:
        """The request with what is remembered in place of references to it; None when it has no such reference."""
        source = get_list(body, "input")
        items = [self._remembered(as_dict(item), owner) or item for item in source]
        return {**body, "input": items} if items != source else None

    def _remembered(self, item: Json, owner: str) -> Optional[Json]:
        data = self.get((owner, get_text(item, "id"))) if _responses_type(item) == "item_reference" else None
        return load_json(data) if data else None


def parse_responses_request(body: Json) -> ChatRequest:
    """A request body of POST /v1/responses (SDK: ResponseCreateParams).
    RouterError (400) when it is none, or needs state of its provider: what it refers to would be lost (trap 63)."""
    missing = needs_server_state(body)
    if missing:
        raise RouterError(missing, 400, "unsupported_parameter")
    said = read_fields(body, _RESPONSES_CHECKED)
    text, reasoning, source = said["text"] or {}, said["reasoning"], said["input"] or []
    source = [{"role": "user", "content": source}] if isinstance(source, str) else source
    items = [check_kind(item, (dict,), "input[%d]" % index) for index, item in enumerate(source)]
    adding = ("additional_tools", "tool_search_output")
    added = [tool for item in items if item.get("type") in adding for tool in get_list(item, "tools")]
    tools = _responses_tools(get_list(body, "tools") + added)
    choice, tools = _responses_choice(body.get("tool_choice"), tools)
    turns = _responses_turns(items, _responses_flat_names(tools))
    return ChatRequest(
        get_text(body, "model"), turns[1:], _chat_parts(said["instructions"], "") + turns[0].blocks, tools, choice,
        said["parallel_tool_calls"], said["max_output_tokens"], said["temperature"], said["top_p"],
        stream=body.get("stream") is True,
        output=_read_output(get_dict(text, "format"), text.get("format"), "text.format"),
        reasoning=Reasoning(get_text(reasoning, "effort")) if reasoning and any(reasoning.values()) else None,
        user=get_text(body, "user") or get_text(body, "safety_identifier"),
        fields={_RESPONSES: _without(body, "input")},
    )  # fmt: skip


def _responses_type(item: Json) -> str:
    """The type of an input item: messages and references may leave it out (EasyInputMessage, ItemReference)."""
    return get_text(item, "type") or ("message" if "role" in item else "item_reference" if "id" in item else "")


def _responses_turns(items: List[Json], names: _FlatNames) -> List[Message]:
    """The conversation behind a turn of the instructions in front; items of one role in a row are one turn."""
    turns, has_text = [Message("system", [])], False
    for index, item in enumerate(items):
        role, blocks = _responses_turn(item, "input[%d]" % index, names)
        if turns[-1].role == role:
            follows = has_text and role == "assistant" and "content" in item
            turns[-1].blocks.extend([*map(set_apart, blocks[:1]), *blocks[1:]] if follows else blocks)
        elif blocks:
            turns.append(Message(role, blocks))
            has_text = False
        has_text = has_text or Text in map(type, blocks)
    return turns


def set_apart(block: Any) -> Any:
    """A text that begins a further message of an answer: where messages become one, as in Chat, a paragraph of its own,
    as in microsoft/vscode#312173; a preamble (`phase`) would run into what follows it."""
    return block._replace(extra={**(block.extra or {}), _CHAT: {"apart": True}}) if type(block) is Text else block


def _responses_turn(item: Json, where: str, names: _FlatNames) -> Tuple[str, Blocks]:
    """(role, blocks) of an item, no blocks for what cannot be read."""
    kind, role = _responses_type(item), _CHAT_ROLES.get(get_text(item, "role"))
    if kind == "message":
        if role is None:
            raise field_error(where + ".role", "expected user, assistant, system or developer")
        return role, _responses_parts(item.get("content"), where + ".content")
    if kind in ("function_call_output", "custom_tool_call_output"):
        call_id = get_text(item, "call_id") or get_text(item, "id")
        return "user", [ToolResult(call_id, _responses_parts(item.get("output"), where + ".output"))]
    if kind in _RESPONSES_CALLS or kind == "reasoning":
        return "assistant", _responses_blocks(item, names)
    # What tools of other providers left (trap 107). Lists of tools and requests for leave say nothing of what was done.
    words = "" if not kind or "tools" in item or kind.startswith("mcp_approval") else readable(item)
    role = "user" if kind.endswith("_output") else "assistant"
    return role, [Text("[%s] %s\n" % (kind, words))] if words else []


def _responses_parts(content: Any, where: str) -> Blocks:
    """Content of a request, which Chat's reader knows by shape, without what is empty (trap 82) or unknown to it."""
    return [b for b in _chat_parts(content, where) if getattr(b, "text", "-") and not isinstance(b, Opaque)]


def _responses_words(part: Json, bag: Json) -> Any:
    """A part of an answer as a block that keeps `bag`, too; None when it is empty or unknown."""
    kind = get_text(part, "type")
    block, field = (Refusal, "refusal") if kind == "refusal" else (Text, "text")
    text = get_text(part, field) if kind in ("output_text", "input_text", "text", "refusal") else ""
    return block(text, rest_of({**part, **bag}, ("type", field), _RESPONSES)) if text else None


def _responses_kept(item: Json, *fields: str) -> Json:
    return {field: item[field] for field in fields if get_text(item, field)}


def _responses_blocks(item: Json, names: _FlatNames, call_id: str = "", bag: Mapping[str, Any] = {}) -> Blocks:
    """The blocks of an item the model made. call_id: for a call without one; bag: what else their own bags keep."""
    kind = get_text(item, "type")
    if kind in _RESPONSES_CALLS:
        space, name = get_text(item, "namespace"), get_text(item, "name")
        call_id = get_text(item, "call_id") or get_text(item, "id") or call_id
        arguments = arguments_text(item.get(_RESPONSES_PARTS[kind].field))
        extra = rest_of({**_responses_kept(item, "namespace"), **bag}, (), _RESPONSES)
        call = ToolCall(call_id, names.get((space, name), name), arguments, _RESPONSES_CALLS[kind], extra)
        return [call] if name else []
    if kind == "message":
        bag = {**_responses_kept(item, "phase"), **bag}
        blocks = [_responses_words(as_dict(part), bag) for part in get_list(item, "content")]
        return [block for block in blocks if block is not None]
    thinking = _responses_thinking(item, bag) if kind == "reasoning" else Thinking("")
    return [thinking if thinking.text else Opaque(_RESPONSES, item)] if kind else []


def _responses_thinking(item: Json, bag: Json) -> Thinking:
    """A reasoning item: its summary, else the reasoning itself (open models), and what proves and continues it."""
    for kind in ("summary_text", "reasoning_text"):
        parts = map(as_dict, get_list(item, _RESPONSES_PARTS[kind].holder))
        text = "\n\n".join(filter(None, [get_text(part, "text") for part in parts]))
        if text:
            break
    own = {"part": kind} if text and kind == "reasoning_text" else {}
    return Thinking(text, rest_of({**_responses_kept(item, "encrypted_content"), **own, **bag}, (), _RESPONSES))


def _responses_tools(tools: List[Any]) -> List[Tool]:
    """The tools that a client runs: functions (flat, or nested as in Chat: trap 66), custom tools, and the members of a
    namespace (SDK: NamespaceTool) under flat names, "space__name". One told twice, found by a search, is one."""
    result: Dict[Tuple[str, str], Tool] = {}
    used = {get_text(as_dict(tool), "name") for tool in tools}
    for index, tool in enumerate(map(as_dict, tools)):
        kind, space = get_text(tool, "type"), get_text(tool, "name")
        if kind == "namespace":
            members = _responses_tools(get_list(tool, "tools"))
            for member in (member for member in members if (space, member.name) not in result):
                bag = {**own_extra(member, _RESPONSES), "namespace": space, "name": member.name}
                flat = unique_id("%s__%s" % (space, member.name), used)
                result[space, member.name] = member._replace(name=flat, extra={_RESPONSES: bag})
        elif kind in ("function", "custom"):
            known = (kind, "type", "name", "description", "parameters", "strict", "format")
            parsed = _chat_tool({key: tool[key] for key in known if key in tool}, "tools[%d]" % index)
            parsed = parsed._replace(extra=rest_of(own_extra(parsed, _CHAT), (), _RESPONSES))
            result.setdefault(("", parsed.name), parsed)
    return list(result.values())


def _responses_flat_names(tools: Iterable[Tool]) -> _FlatNames:
    bags = ((tool.name, own_extra(tool, _RESPONSES)) for tool in tools)
    return {(bag["namespace"], bag["name"]): flat for flat, bag in bags if "namespace" in bag}


def _responses_choice(choice: Any, tools: List[Tool]) -> Tuple[Optional[ToolChoice], List[Tool]]:
    """(neutral choice, tools it leaves): Chat's reader knows all but the namespaces (SDK: ToolChoiceAllowed)."""
    flat = _responses_flat_names(tools)

    def named(item: Json) -> Json:
        name = flat.get((get_text(item, "namespace"), get_text(item, "name")))
        return {**item, "name": name} if name else item

    if isinstance(choice, dict):
        choice = {**named(choice), "tools": [named(as_dict(tool)) for tool in get_list(choice, "tools")]}
    return _chat_tool_choice(choice, tools)


# --- Requests, writing ------------------------------------------------------------------------------------


# OpenAI's models that think by themselves, at names of other providers, too.
_THINKERS = r"(?:^|/)(?:o\d|gpt-[5-9](?!.*chat))"


def render_responses_request(request: ChatRequest) -> Json:
    """The request of a client of another format as a body of POST /v1/responses. Nothing is stored there: the whole
    conversation goes along, item ids do not (trap 65)."""
    chat = get_dict(request.fields or {}, "openai")
    tools = [tool for tool in request.tools if tool.kind != "server"]
    images = [block for block in request.system if isinstance(block, Media)]
    items = _responses_items([Message("system", images), *request.messages])
    instructions = join_text(request.system, "\n\n") or None
    if not items:  # an empty `input` is refused
        role, words = ("system", instructions) if instructions else ("user", "(continue)")
        items, instructions = [{"type": "message", "role": role, "content": words}], None
    thinks = request.reasoning.effort != "none" if request.reasoning else re.search(_THINKERS, request.model)
    text, form = _responses_kept(chat, "verbosity"), _write_chat_output(request.output) if request.output else {}
    if form:
        text["format"] = {"type": form["type"], **form.get("json_schema", {})}
    body = {
        "parallel_tool_calls": request.parallel_tools if tools else None,
        "max_output_tokens": request.max_tokens and max(16, request.max_tokens),  # OpenAI: "Expected a value >= 16"
        "temperature": request.temperature, "top_p": request.top_p, "model": request.model, "input": items,
        "instructions": instructions,
        # Left out, `strict` makes OpenAI try strict mode; other formats are not strict unless they say so.
        "tools": [{"type": t.kind, **_openai_tool(t, bool(t.strict), tool_grammar(t))} for t in tools] or None,
        "tool_choice": _openai_choice(request) if tools else None,
        "text": text or None,
        "user": request.user if 0 < len(request.user) <= _CHAT_MAX_USER else None, "stream": request.stream or None,
        "reasoning": _responses_render_reasoning(request.reasoning, request.model),
        "include": ["reasoning.encrypted_content"] if thinks else None,
    }  # fmt: skip
    shared = {key: chat[key] for key in _CHAT_SHARED[_RESPONSES].split() if key in chat}
    return {**_told(body), **shared, "store": False}


def _responses_items(messages: Iterable[Message]) -> List[Json]:
    """The items of a conversation: parts in a row are one message, everything else is an item of its own.

    A plain text goes as a string, the shape every server takes (SDK: EasyInputMessage), as do all texts that the model
    said in a row: vLLM takes parts of its own making only, with their message's id and status."""
    items: List[Json] = []
    customs: Set[str] = set()  # ids of the calls of custom tools so far
    for role, blocks, _ in messages:
        parts: List[Any] = []
        for block in blocks:
            part = _responses_render_part(block, role)
            item = None if part else _responses_render_item(block, customs)
            if part and not parts:
                item = {"type": "message", "role": role, "content": []}
            if item:
                items.append(item)
                parts = item["content"] if part else []
            if part:
                parts.append(part)
    for item in items:
        parts = get_list(item, "content") if item["type"] == "message" else []
        is_plain = all([key for key, value in part.items() if value] == ["type", "text"] for part in parts)
        if parts and is_plain and (len(parts) == 1 or item["role"] == "assistant"):
            item["content"] = "".join(part["text"] for part in parts)
    return items


def _responses_render_item(block: Any, customs: Set[str]) -> Optional[Json]:
    """The item of one block, None for what the API has no place for: thinking of other providers, foreign blocks."""
    if isinstance(block, ToolCall):
        (customs.add if block.kind == "custom" else customs.discard)(block.id)
        return _responses_call(block, {}, block.arguments or ("" if block.kind == "custom" else "{}"))
    if isinstance(block, ToolResult):
        kind = "custom_tool_call_output" if block.call_id in customs else "function_call_output"
        text = _result_text(block, join_text(block.blocks, "\n"))
        others = [inner for inner in block.blocks if not isinstance(inner, (Text, Refusal))]
        rest = [part for part in (_responses_render_part(other, "user") for other in others) if part]
        output = ([{"type": "input_text", "text": text}] if text else []) + rest if rest else text
        return {"type": kind, "call_id": block.call_id, "output": output}
    if isinstance(block, Opaque):
        is_proof = block.wire == _RESPONSES and block.value.get("encrypted_content")
        return _without(block.value, "id") if is_proof else None
    bag = own_extra(block, _RESPONSES)
    # Open models' servers demand the id beside their reasoning (vLLM), OpenAI would look for it in vain (trap 65).
    proof = _responses_kept(bag, "encrypted_content", *(["id"] if "part" in bag else []))
    kind = bag.get("part", "summary_text")
    holder = {_RESPONSES_PARTS[kind].holder: [{"type": kind, "text": block.text}]}
    return {"type": "reasoning", "summary": [], **holder, **proof} if proof or "part" in bag else None


def _responses_call(call: ToolCall, bag: Json, arguments: str) -> Json:
    """The item of a call; one of a tool from a namespace, which `bag` tells, names both."""
    row = _RESPONSES_PARTS[_RESPONSES_KINDS[call.kind]]
    item = {"type": row.item, "call_id": call.id, "name": call.name, row.field: arguments}
    return {**item, **_responses_kept(bag, "namespace", "name")}


def _responses_render_part(block: Any, role: str) -> Optional[Json]:
    """The content part of one block, None when it is no part but an item."""
    if isinstance(block, (Text, Refusal)) and role != "assistant":
        return {"type": "input_text", "text": block.text}
    if isinstance(block, Text):
        return {"type": "output_text", "text": block.text, "annotations": []}
    if isinstance(block, Refusal):
        return {"type": "refusal", "refusal": block.text}
    if not isinstance(block, Media):
        return None
    if block.kind == "audio":  # no content of ResponseInputContentParam: refused
        return {"type": "input_text", "text": note_of_media(block)}
    if block.kind == "image":
        detail = get_text(own_extra(block, _CHAT), "detail") or "auto"
        return {"type": "input_image", "image_url": url_of_media(block), "detail": detail}
    name = {"filename": _file_name(block)} if block.name or not block.url else {}
    return {"type": "input_file", "file_url" if block.url else "file_data": url_of_media(block), **name}


def _responses_render_reasoning(reasoning: Optional[Reasoning], model: str) -> Optional[Json]:
    """`reasoning`: a budget becomes an effort; a client that asked for thinking as such is to see a summary of it."""
    if reasoning is None:
        return None
    effort = _openai_effort(reasoning, model)
    asks = (reasoning.budget or reasoning.adaptive) and effort != "none"
    return _told({"summary": "auto" if asks else None, "effort": effort or None})


# --- Answers, reading -------------------------------------------------------------------------------------

# Events that bring text: type -> (kind of part, type of item, field with the part's number, field with the text).
_RESPONSES_TEXTS = {
    "response.%s.%s" % (row.stem, end): (kind, row.item, row.index, "delta" if end == "delta" else row.field)
    for kind, row in _RESPONSES_PARTS.items()
    for end in ("delta", "done")
}

# The status that the last event of a stream tells; others are the end of a completed answer.
_RESPONSES_ENDS = {"response." + end: end for end in ("completed", "incomplete", "failed", "cancelled", "done")}
_RESPONSES_REASONS = {"content_filter": "refusal", "max_messages": "pause_turn", "steered": "pause_turn"}


class _ResponsesItem:
    """An output item on its way. block: its open block; pieces: what is known of that block's text.

    part: kind and number of the newest part, whose text begins at pieces[mark]; parts below it are complete.
    sent: blocks closed so far. waiting: events held back while a block of another item is open."""

    block: Any = None
    part = ("", 0)
    mark = sent = 0
    ended = False

    def __init__(self, index: int, item: Json) -> None:
        self.index, self.item = index, item
        self.pieces: List[str] = []
        self.waiting: Events = []


class ResponsesParser(TypedEventParser):
    """A Responses stream (SDK: ResponseStreamEvent) as neutral events.

    Items are told apart by `output_index`, since some upstreams change the item ids in mid-stream; an event without
    it belongs to the item with its `item_id`, else to the newest. Every event that has more than a delta (the done
    events, the final snapshot) completes what was left out before it (trap 61). Its events are numbered, so no two are
    alike, and nothing is ever `said`. usage: of the last event."""

    END = "response.completed"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.usage: Optional[Usage] = None
        self._names = _responses_flat_names(context.request.tools)
        self._items: Dict[int, _ResponsesItem] = OrderedDict()
        self._going: List[_ResponsesItem] = []  # those that may still have something to send
        self._active: Optional[_ResponsesItem] = None

    def take(self, value: Json, kind: str) -> Events:
        """The neutral events that an event of a type completes."""
        if kind == "error":
            return self._fail(_responses_error(get_dict(value, "error") or value))
        if not kind.startswith("response."):
            self.skipped += not kind
            return [Ping()] if kind and self._is_started else []
        response = get_dict(value, "response")
        start = [] if self._is_started else [self._start(response)]
        if kind in _RESPONSES_ENDS:
            return start + self._terminate(_RESPONSES_ENDS[kind], response)
        handler = self._HANDLERS.get(kind)
        if handler is None:
            return start or [Ping()]
        handler(self, value, kind)
        return start + self._flush()

    def whole(self, body: Json) -> Events:
        """The events of a whole answer (SDK: Response): a stream's end of which nothing else was seen."""
        body = as_dict(body)
        failed = body.get("status") in ("failed", "cancelled") or body.get("error")
        if not failed and not isinstance(body.get("output"), list):
            raise RouterError("the upstream's answer has no `output`", 502, "invalid_upstream_answer")
        return self.take({"response": body}, "response.failed" if failed else "response.completed")

    def _start(self, response: Json) -> Started:
        self._is_started = True
        model = get_text(response, "model") or self._context.request.model
        return Started(get_text(response, "id"), model, None, as_int(response.get("created_at")))

    # -- what one event says of its item

    def _item(self, value: Json, kind: str = "") -> _ResponsesItem:
        """The item an event belongs to; one that was never announced is made up, of type `kind`."""
        index = value.get("output_index")
        if not isinstance(index, int):
            name = value.get("item_id") or get_dict(value, "item").get("id")
            newest = len(self._items) - bool(kind and self._items)
            index = next((i for i in reversed(self._items) if name and self._items[i].item.get("id") == name), newest)
        if index not in self._items:
            self._items[index] = _ResponsesItem(index, get_dict(value, "item") or {"type": kind})
            self._going.append(self._items[index])
        return self._items[index]

    def _text(self, value: Json, event: str) -> None:
        kind, item, index, field = _RESPONSES_TEXTS[event]
        text = get_text(value, field)
        if text:
            state = self._item(value, item)
            if self._reach(state, kind, as_int(value.get(index))):
                self._add(state, text, field != "delta")

    def _item_added(self, value: Json, event: str) -> None:
        state, item = self._item(value), get_dict(value, "item")
        state.item = item or state.item
        kind = get_text(state.item, "type")
        if kind in _RESPONSES_CALLS and self._reach(state, kind, 0) and state.block is None:
            self._open(state)

    def _part_done(self, value: Json, event: str) -> None:
        """A content part is complete: message parts end here, with their annotations."""
        block, state = _responses_words(get_dict(value, "part"), {}), self._item(value, "message")
        kind = _RESPONSES_KINDS.get(type(block), "")
        if kind and self._reach(state, kind, as_int(value.get("content_index"))):
            self._settle(state, block)

    _HANDLERS: Dict[str, Callable[..., None]] = {
        **dict.fromkeys(_RESPONSES_TEXTS, _text),
        **dict.fromkeys(("response.created", "response.content_part.added"), lambda *event: None),
        "response.output_item.added": _item_added,
        "response.content_part.done": _part_done,
        "response.output_item.done": lambda self, value, _: self._end(self._item(value), get_dict(value, "item")),
    }

    # -- the blocks of an item

    def _reach(self, state: _ResponsesItem, kind: str, index: int) -> bool:
        """Goes on to a part of an item; False for a part that is complete, or says the same as another (trap 32)."""
        if state.ended or index < state.part[1]:
            return False
        if (kind, index) != state.part:
            if not isinstance(state.block, Thinking):
                self._close(state)
            elif kind == state.part[0]:
                self._add(state, "\n\n")
            else:
                return False
            state.part, state.mark = (kind, index), len(state.pieces)
        return True

    def _add(self, state: _ResponsesItem, text: str, is_whole: bool = False) -> None:
        """Text of the newest part; is_whole: all of its text, of which some was seen before."""
        if is_whole:
            received = "".join(state.pieces[state.mark :])
            text = text[len(received) :] if text.startswith(received) else ""
        if text:
            if state.block is None:
                self._open(state)
            state.pieces.append(text)
            if state.block is not None:
                state.waiting.append(Delta(text))

    def _open(self, state: _ResponsesItem, block: Any = None) -> None:
        """Opens a block, of the newest part when none is given. A call without a name cannot be opened yet."""
        block = block or self._blank(state)
        if block is not None:
            block = block if state.sent or Text not in self._kinds else set_apart(block)
            self._kinds += {type(block)}.difference(self._kinds)  # each once, or it is long to search
            state.block = with_text(block, "") if block_text(block) else block
            state.waiting += [Opened(state.block), *([Delta("".join(state.pieces))] if state.pieces else [])]

    def _blank(self, state: _ResponsesItem) -> Any:
        """The block of the newest part as it begins; the proof of reasoning is final at its end only."""
        row = _RESPONSES_PARTS[state.part[0]]
        told = {row.holder: [{"type": state.part[0], row.field: "?"}]} if row.holder else {row.field: ""}
        item = {**state.item, "type": row.item, "summary": [], "encrypted_content": None, **told}
        return next(iter(self._blocks(state, item)), None)

    def _close(self, state: _ResponsesItem, bag: Mapping[str, Any] = {}) -> None:
        """Closes the open block, if there is one. bag: what its own bag must hold in the end."""
        if state.block is not None:
            more = _without(bag, *own_extra(state.block, _RESPONSES))
            state.waiting += [Extended(_RESPONSES, more), Closed()] if more else [Closed()]
            state.block, state.pieces, state.mark, state.part = None, [], 0, ("", state.part[1] + 1)
            state.sent += 1

    def _blocks(self, state: _ResponsesItem, item: Json) -> Blocks:
        """The blocks of an item; they keep its id, unless the router made it, and its phase."""
        tail = "_%s_%d" % (self._context.id, state.index)
        bag = _responses_kept(item, *(("phase",) if get_text(item, "id").endswith(tail) else ("id", "phase")))
        if isinstance(state.block, Thinking):
            return [_responses_thinking(item, bag)]
        return _responses_blocks(item, self._names, "call" + tail, bag)

    def _end(self, state: _ResponsesItem, item: Json) -> None:
        """The item is complete and reads `item`, or as far as it came when that is empty."""
        if not state.ended:
            item = item or state.item
            state.item = {**item, "id": state.item.get("id") or item.get("id")}
            for block in self._blocks(state, state.item)[state.sent :]:
                self._settle(state, block)
            self._close(state)
            state.ended = True

    def _settle(self, state: _ResponsesItem, block: Any) -> None:
        """Closes the open block, which reads `block` in the end."""
        if state.block is None:
            self._open(state, block)
        if type(block) is type(state.block) and not isinstance(block, Opaque):
            state.mark = 0
            self._add(state, block_text(block), True)
            self._close(state, own_extra(block, _RESPONSES))
        self._close(state)

    def _flush(self) -> Events:
        """What can be sent on: while a block is open, the events of all other items wait (trap 33)."""
        events: Events = []
        for state in [*([self._active] if self._active else []), *self._going]:
            events += state.waiting
            state.waiting, self._active = [], state if state.block is not None else None
            if self._active is not None:
                break
        else:
            self._going = [state for state in self._going if not state.ended]
        return events

    # -- the end

    def _terminate(self, status: str, response: Json) -> Events:
        counts = _chat_usage(get_dict(response, "usage"))
        self.usage = counts if any(counts) else None  # zeros stand where nothing is known
        status = response["status"] if response.get("status") in ("failed", "cancelled", "incomplete") else status
        if status in ("failed", "cancelled"):
            return self._fail(_responses_error(get_dict(response, "error"), status))
        self._catch_up(list(map(as_dict, get_list(response, "output"))))
        stop = _own_end(self._kinds)
        if status == "incomplete":
            reason = get_text(get_dict(response, "incomplete_details"), "reason")
            stop = _RESPONSES_REASONS.get(reason, "max_tokens")
        self.done = self.is_ended = True
        later = {_RESPONSES: {"status": "queued"}} if response.get("status") == "queued" else None
        return [*self._flush(), Finished(stop, "", self.usage, later)]

    def _catch_up(self, output: List[Json]) -> None:
        """What the snapshot has and no event brought: everything, the ends of items, or calls nobody announced."""
        seen = [self._items[index] for index in sorted(self._items)]
        for number, state in enumerate(seen):
            self._end(state, output[number] if len(output) == len(seen) else {})
        known = {get_text(state.item, "call_id") for state in seen}
        for index, item in enumerate(output if len(output) > len(seen) else (), max(self._items, default=-1) + 1):
            if not seen or (get_text(item, "type") in _RESPONSES_CALLS and get_text(item, "call_id") not in known):
                self._end(self._item({"output_index": index, "item": item}), item)

    def _fail(self, info: ErrorInfo) -> Events:
        start = [] if self._is_started else [self._start({})]
        self.is_ended = True
        return [*start, Failed(info)]


# --- Answers, writing -------------------------------------------------------------------------------------

# Why an answer is incomplete, by its finish_reason in Chat Completions.
_RESPONSES_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def render_responses_response(response: ChatResponse, context: Context) -> Json:
    """A whole answer as the body of POST /v1/responses: the snapshot that ends its stream."""
    renderer = ResponsesRenderer(context, is_read=False)
    for event in unfold(response):
        renderer.render(event)
    return renderer.snapshot


# What an answer repeats of its request, and what it says where that says nothing. The SDK's Response demands tools,
# tool_choice and parallel_tool_calls.
_RESPONSES_ECHO: Json = {
    "background": False, "parallel_tool_calls": True, "truncation": "disabled", "top_logprobs": 0,
    "metadata": {}, "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}},
    "service_tier": "default", "tool_choice": "auto", "tools": [],
    **dict.fromkeys("instructions max_output_tokens max_tool_calls previous_response_id prompt_cache_key"
                    " safety_identifier temperature top_p user".split()),
}  # fmt: skip


def _responses_snapshot(request: ChatRequest, id: str, created: int, model: str) -> Json:
    """A Response (SDK) in progress, which repeats its request."""
    said = _told(get_dict(request.fields or {}, _RESPONSES))
    echo = {
        key: {**value, **get_dict(said, key)} if isinstance(value, dict) else said.get(key, value)
        for key, value in _RESPONSES_ECHO.items()
    }
    start = {"id": id, "object": "response", "created_at": created, "status": "in_progress", "model": model}
    unknown = dict.fromkeys(("completed_at", "error", "incomplete_details", "usage"))
    return {**start, "output": [], **unknown, **echo, "store": False}


class ResponsesRenderer:
    """Neutral events as a Responses stream with its whole life cycle (trap 58), numbered from 0.

    The end of an item is only told once the next one begins: after a failure a tool call that was cut off must
    not look complete, since clients run a call as soon as its item is done (trap 62). Texts in a row are parts of
    one message. snapshot: the answer as it stands, as the SDK's Response. number: of the next event. is_read: whether
    anybody reads the events, some of which repeat the request with all its tools."""

    def __init__(self, context: Context, is_read: bool = True) -> None:
        self._context, self._is_read = context, is_read
        self._tools = {tool.name: own_extra(tool, _RESPONSES) for tool in context.request.tools}
        self.snapshot: Json = {}
        self.number = 0
        self._items: List[Json] = []
        self._item: Json = {}  # the open item, empty when there is none
        self._block: Any = None
        self._kind = ""  # of the open block's part, "" until it has something to show
        self._place: Json = {}  # of the open item, or of its open part, as events tell it
        self._more: Json = {}  # what events of the open part's text have besides
        self._bag: Mapping[str, Any] = {}
        self._pieces: List[str] = []
        self._head = self._middle = b""
        self._refused = False

    def render(self, event: Any) -> bytes:
        """The bytes for one neutral event, b"" when there is nothing to send."""
        if type(event) is not Delta:
            handler = self._HANDLERS.get(type(event))
            return handler(self, event) if handler else b""
        if not self._kind:
            return self._begin() + self.render(event) if self._block is not None else b""
        self._pieces.append(event.text)
        self.number += 1
        text = _quote_json(event.text).encode("ascii")
        return b"%s%d%s%s}\n\n" % (self._head, self.number - 1, self._middle, text)

    def _event(self, kind: str, **values: Any) -> bytes:
        self.number += 1
        event = {"type": kind, "sequence_number": self.number - 1, **values}
        return sse_event(dump_json(event), kind) if self._is_read else b""

    def _tell(self, kind: str, **values: Any) -> bytes:
        """An event about the open item, or its open part."""
        return self._event("response." + kind, **self._place, **values)

    def _start(self, event: Started) -> bytes:
        if self.snapshot:
            return b""
        request, created = self._context.request, event.created or self._context.created
        name = event.id or "resp_" + self._context.id
        self.snapshot = _responses_snapshot(request, name, created, request.model or event.model)
        kinds = ("response.created", "response.in_progress")
        return b"".join([self._event(kind, response=self.snapshot) for kind in kinds])

    def _open(self, event: Opened) -> bytes:
        block = event.block
        self._block, self._kind, self._pieces, self._bag = block, "", [], {}
        if isinstance(block, Opaque):  # an item as it came; those of other formats are nothing a client knows
            self._block = None
            return self._next_item({**block.value}) if block.wire == _RESPONSES else b""
        self._bag = dict(own_extra(block, _RESPONSES))
        out, given = self._begin() if isinstance(block, ToolCall) else b"", block_text(block)
        return out + (self.render(Delta(given)) if given else b"")

    def _begin(self) -> bytes:
        """The open block has something to show: its item, unless it joins the message before it, and its part."""
        block, bag, item = self._block, self._bag, self._item
        key = block.kind if isinstance(block, ToolCall) else type(block)
        self._kind = bag["part"] if key is Thinking and "part" in bag else _RESPONSES_KINDS[key]
        row, out = _RESPONSES_PARTS[self._kind], b""
        joins = row.item == "message" == item.get("type") and item.get("phase") == bag.get("phase")
        if not joins or bag.get("id", item["id"]) != item["id"]:
            out = self._next_item(self._new_item(row))
        if row.frame:
            self._place[row.index] = len(self._item[row.holder])
            out += self._tell(row.frame + ".added", part=self._part(""))
        event = b"response.%s.delta" % row.stem.encode()
        self._head = b'event: %s\ndata: {"type":"%s","sequence_number":' % (event, event)
        self._more = {"logprobs": []} if self._kind == "output_text" else {}
        self._middle = b',%s,"delta":' % dump_json({**self._place, **self._more})[1:-1]
        return out

    def _new_item(self, row: _ResponsesPart) -> Json:
        tail, bag = "_%s_%d" % (self._context.id, len(self._items) + bool(self._item)), self._bag
        item: Json = {"id": bag.get("id") or row.id + tail, "type": row.item, "status": "in_progress"}
        if row.item == "message":
            return {**item, "role": "assistant", "content": [], **_responses_kept(bag, "phase")}
        if row.item == "reasoning":
            return {**item, "summary": [], row.holder: []}
        call = _responses_call(self._block, {**bag, **self._tools.get(self._block.name, {})}, "")
        return {**item, **call, "call_id": call["call_id"] or "call" + tail}

    def _next_item(self, item: Json) -> bytes:
        out = self._end_item()
        self._item, self._place = item, {"item_id": item.get("id"), "output_index": len(self._items)}
        return out + self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _part(self, text: str) -> Json:
        part = {"type": self._kind, _RESPONSES_PARTS[self._kind].field: text}
        if self._kind == "output_text":
            part.update((key, get_list(self._bag, key)) for key in ("annotations", "logprobs"))
        return part

    def _extend(self, event: Extended) -> bytes:
        if event.wire == _RESPONSES:
            self._bag.update(event.values)
        return b""

    def _close(self, event: Closed) -> bytes:
        if not self._kind:
            return b""
        row, text, out = _RESPONSES_PARTS[self._kind], "".join(self._pieces), b""
        if not row.frame:  # the end of a call is told with that of its item
            self._item[row.field] = text or ("{}" if self._kind == "function_call" else "")
            return out
        if isinstance(self._block, Thinking):
            self._item.update(_responses_kept(self._bag, "encrypted_content"))
        part = self._part(text)
        for number, annotation in enumerate(part.get("annotations", ())):
            out += self._tell("output_text.annotation.added", annotation_index=number, annotation=annotation)
        out += self._tell(row.stem + ".done", **{row.field: text}, **self._more)
        self._item[row.holder].append(part)
        self._refused = self._refused or self._kind == "refusal"
        return out + self._tell(row.frame + ".done", part=part)

    def _end_item(self, status: str = "completed") -> bytes:
        """Tells the end of the item before, if there is one."""
        item, out = self._item, b""
        if not item:
            return out
        row = _RESPONSES_PARTS.get(get_text(item, "type"))
        if item.get("status") == "in_progress":
            item["status"] = status
            if row is not None:
                named = {"name": item["name"]} if row.item == "function_call" else {}
                out = self._tell(row.stem + ".done", **{row.field: item[row.field]}, **named)
        out += self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item = {}
        return out

    def _finish(self, event: Finished) -> bytes:
        reason = _RESPONSES_INCOMPLETE.get(_shown_finish(event.stop_reason, False, self._refused))
        status = "incomplete" if reason else "completed"
        out = self._start(UNTOLD_START) + self._end_item("completed" if reason == "content_filter" else status)
        done = None if reason else max(self.snapshot["created_at"], self._context.created)
        # Zeros when nothing is known: the SDKs demand all counts.
        usage = _write_openai_usage(event.usage or Usage(), "input_tokens", "output_tokens")
        told = {"completed_at": done, "incomplete_details": reason and {"reason": reason}, "usage": usage}
        return out + self._conclude(status, told)

    def _fail(self, event: Failed) -> bytes:
        """An `error` event in front of `response.failed`, which is all that Codex reads: the SDKs raise it by its
        member `error` (openai._streaming), beside which their type, ResponseErrorEvent, has the same. The code is one
        that clients know, else that of the status: Codex retries unknown ones."""
        info = event.error
        is_known = info.code in ERROR_STATUSES or "image" in info.code
        code = info.code if is_known else _RESPONSES_STATUS_CODES.get(info.status, "server_error")
        failure = {"code": code, "message": info.message}
        error = {**render_chat_error(info, "")["error"], **failure}
        out = self._start(UNTOLD_START) + self._event("error", **_without(error, "type"), error=error)
        return out + self._conclude("failed", {"error": failure})

    def _conclude(self, status: str, told: Json) -> bytes:
        self.snapshot.update(told, status=status, output=self._items)
        return self._event("response." + status, response=self.snapshot)

    _HANDLERS: Dict[type, Callable[..., bytes]] = {
        Started: _start, Opened: _open, Extended: _extend, Closed: _close, Finished: _finish, Failed: _fail,
    }  # fmt: skip


# --- Errors -----------------------------------------------------------------------------------------------

_RESPONSES_STATUS_CODES = {**dict.fromkeys((400, 413, 422), "invalid_prompt"), 429: "rate_limit_exceeded"}


def _responses_error(error: Json, status: str = "failed") -> ErrorInfo:
    """The error of a `response.failed` or `error` event (SDK: ResponseError, ResponseErrorEvent)."""
    message = get_text(error, "message") or "the upstream ended its answer with the status %s" % status
    return read_error(200, {**error, "message": message}, 400 if "image" in get_text(error, "code") else 500)


OPENAI_RESPONSES = WireFormat(
    name=_RESPONSES, path="/responses", parse_request=parse_responses_request, render_request=render_responses_request,
    render_response=render_responses_response, parser=ResponsesParser, renderer=ResponsesRenderer,
    render_error=render_chat_error, losses=RESPONSES_LOSSES, answer="output", read_usage=_chat_usage,
    # Quotes inside JSON strings are escaped, so these words match no text that the model wrote.
    watch=re.compile(rb'"(?:response\.(?:completed|incomplete|failed|cancelled)|error|usage)"'),
)  # fmt: skip
# ==============================================================================
# 12 TRANSLATION - the table of wire formats, and streams from one to another [pure]
# ==============================================================================

WIRE_FORMATS: Dict[str, WireFormat] = {wire.name: wire for wire in (OPENAI_CHAT, ANTHROPIC_MESSAGES, OPENAI_RESPONSES)}

# ---- requests and whole answers


def translate_request(body: Json, source: str, target: str, model: str = "") -> Tuple[ChatRequest, Json]:
    """A request body of the format `source` as a neutral request and as a body of `target`.

    model: the upstream's model id for the body; "" keeps the client's. The neutral request keeps the client's names
    and is what a Context needs for the way back. RouterError 400 for a body that is not of its format.
    """
    request = WIRE_FORMATS[source].parse_request(body)
    return request, render_request(request._replace(model=model or request.model), target)


# What is told by a file's id, which means nothing elsewhere, or is of a kind that no other format has.
_FILE_TYPES = ("image", "document", "file", "video_url", "audio_url", "container_upload")


def render_request(request: ChatRequest, target: str) -> Json:
    """A neutral request as a body of the format `target`: tidy, and with tools that every provider takes."""

    def fitted(value: Any) -> Any:
        if isinstance(value, Opaque):
            is_lost = value.wire != target and value.value.get("type") in _FILE_TYPES
            return Text("[%s left out]" % value.value["type"]) if is_lost else value
        if not isinstance(value, (ToolCall, Tool)) or value.kind == "server":
            return value
        name = short_tool_name(value.name)
        value = value if name == value.name else value._replace(name=name)
        # Few servers of the other formats know tools of free text.
        return value if target == "responses" or value.kind != "custom" else custom_as_function(value)

    choice = request.tool_choice and request.tool_choice._replace(name=short_tool_name(request.tool_choice.name))
    # No tokens at all are Anthropic's way to warm its cache; others refuse that.
    limit = request.max_tokens if request.max_tokens != 0 else 1
    request = map_request(request, fitted)
    tidy = {"system": _without_blanks(request.system), "messages": tidy_messages(request.messages)}
    return WIRE_FORMATS[target].render_request(request._replace(tool_choice=choice, max_tokens=limit, **tidy))


def map_request(request: ChatRequest, change: Callable[[Any], Any]) -> ChatRequest:
    """The request with a function applied to each of its tools and blocks, those of the instructions too."""
    return request._replace(
        system=list(map(change, request.system)),
        tools=list(map(change, request.tools)),
        messages=[Message(role, list(map(change, blocks)), extra) for role, blocks, extra in request.messages],
    )


def parse_answer(body: Json, source: str, context: Context) -> ChatResponse:
    """A whole answer of the format `source`, with the client's own tool names. RouterError 502 when it is none."""
    return restore_tools(WIRE_FORMATS[source].parse_response(body, context), context.request)


_SAID = frozenset(("content", "text", "refusal", "reasoning_content", "reasoning", "thinking", "name"))
_ODD_ENDS = (b'"abort"', b'"network_error"', b'"insufficient_system_resource"')
_NO_ERROR = (b'"error":null', b'"error": null')  # every Response says so


def is_plain_answer(body: Json, raw: bytes, source: str) -> bool:
    """Whether a whole answer that passed _error_in surely says something, seen without parsing it; False: who knows."""
    errors = raw.count(b'"error"')
    is_odd = errors and errors > sum(map(raw.count, _NO_ERROR)) or any(map(raw.__contains__, _ODD_ENDS))
    pending = [] if is_odd else [body.get(WIRE_FORMATS[source].answer)]
    while pending:
        value = pending.pop()
        for key, part in value.items() if isinstance(value, dict) else enumerate(as_list(value)):
            if isinstance(part, (dict, list)):
                pending.append(part)
            elif part and isinstance(part, str) and key in _SAID:
                return True
    return False


def translate_response(body: Json, source: str, target: str, context: Context) -> Json:
    """A whole answer of the format `source` as one of `target`. RouterError 502 when it is not of its format."""
    return WIRE_FORMATS[target].render_response(parse_answer(body, source, context), context)


def fold_stream(source: str, raw: bytes, context: Context) -> Union[ChatResponse, ErrorInfo]:
    """A complete event stream of the format `source` as one answer, or the error that it ended with (trap 11)."""
    parser = WIRE_FORMATS[source].parser(context)
    answer = fold([event for sse in parse_events(raw) for event in parser.feed(sse)] + parser.finish())
    return answer if isinstance(answer, ErrorInfo) else restore_tools(answer, context.request)


def render_stream(target: str, response: ChatResponse, context: Context) -> bytes:
    """A whole answer as the event stream of the format `target` that it would have been (trap 12)."""
    renderer = WIRE_FORMATS[target].renderer(context)
    return b"".join(renderer.render(event) for event in unfold(response))


# ---- tools whose names or kinds not every format takes

# OpenAI's limit for function names, the tightest one in use; Anthropic allows 128 of the same characters.
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def short_tool_name(name: str) -> str:
    """`name`, or a legal one made of its beginning and its hash: always the same for one name (trap 95)."""
    if not name or _TOOL_NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return re.sub(r"[^a-zA-Z0-9_-]+", "_", name)[:53] + "_" + digest


class ToolRestorer:
    """Turns an answer's calls back into what the client's tools are: full names, free text for custom tools."""

    def __init__(self, names: Dict[str, str], customs: Set[str]) -> None:
        self._names, self._customs = names, customs
        self._held: Optional[List[str]] = None

    def restore(self, event: Any) -> Sequence[Any]:
        """The stream events for `event`. A custom tool's arguments are held until they can be unwrapped."""
        kind = type(event)
        if kind is Delta and self._held is not None:
            self._held.append(event.text)
            return ()
        if kind is Opened and isinstance(event.block, ToolCall):
            name, kind = self._names.get(event.block.name, event.block.name), event.block.kind
            self._held = [] if name in self._customs and kind != "custom" else None
            return (Opened(event.block._replace(name=name, kind=kind if self._held is None else "custom")),)
        if kind is Closed and self._held is not None:
            text, self._held = custom_input("".join(self._held)), None
            return (Delta(text), event) if text else (event,)
        return (event,)


def tool_restorer(request: ChatRequest) -> Optional[ToolRestorer]:
    """The ToolRestorer for a client's request; None when its tools are the same everywhere."""
    names = {short_tool_name(tool.name): tool.name for tool in request.tools if not _TOOL_NAME.fullmatch(tool.name)}
    customs = {tool.name for tool in request.tools if tool.kind == "custom"}
    return ToolRestorer(names, customs) if names or customs else None


def restore_tools(response: ChatResponse, request: ChatRequest) -> ChatResponse:
    """What ToolRestorer does to a stream, for a whole answer."""
    restorer = tool_restorer(request)
    if restorer is None:
        return response
    restored = fold(item for event in unfold(response) for item in restorer.restore(event))
    return restored if isinstance(restored, ChatResponse) else response


# ---- streams

_STENCIL_TRIES = 4  # in a row: where something else differs in every event, a stencil never fits


class StreamTranslator:
    """An answer's bytes from the format `source` to `target`: `feed(bytes) -> bytes`, `finish() -> bytes`.

    A failure ends the output with an error event of the target's format and without its terminator.
    content: the first content was seen: text, reasoning or refusal that is not empty, or the name of a tool, be it one
    that the provider runs itself, if its block is shown.
    failed: the error that ended the stream, also when it ended too early.
    limit: bytes of one event. secrets: the provider's; should the upstream's error echo one, it is masked (trap 183).
    recorder: None, or who sees every event of the answer.
    """

    def __init__(
        self, source: str, target: str, context: Context, limit: int = MAX_EVENT_BYTES, secrets: Sequence[str] = ()
    ) -> None:
        self.content = False
        self.failed: Optional[ErrorInfo] = None
        self._context, self._secrets = context, secrets
        self._target = WIRE_FORMATS[target]
        self._splitter = EventSplitter(limit)
        self._parser = WIRE_FORMATS[source].parser(context)
        self._renderer = self._target.renderer(context)
        self._render = self._renderer.render
        self._restorer = tool_restorer(context.request)
        self._stop_reason, self._has_opaque = "", False
        self._begun = UNTOLD_START
        self._stencil: Optional[Stencil] = None
        self._tries = _STENCIL_TRIES
        self.recorder: Optional[ReasoningRecorder] = None

    @property
    def done(self) -> bool:
        """Whether the answer ended properly."""
        return self._parser.done and self.failed is None

    def patience_ms(self, idle_ms: int) -> int:
        """How long silence is borne: `idle_ms`, but of a complete answer only usage and its end may follow (trap 9)."""
        return idle_ms if not self.done else 2000 if self._parser.is_ended else 10_000

    @property
    def usage(self) -> Optional[Usage]:
        """The tokens told so far."""
        return self._parser.usage

    @property
    def items(self) -> Sequence[Json]:
        """The items of a complete answer to a Responses client."""
        return get_list(getattr(self._renderer, "snapshot", {}), "output") if self.done else ()

    @property
    def is_empty(self) -> bool:
        """A complete answer with a normal stop that says nothing at all (trap 138)."""
        return not (self.content or self._has_opaque) and self._stop_reason in ("end_turn", "stop_sequence", "tool_use")

    def feed(self, data: bytes) -> bytes:
        """The target's bytes for what `data` completes."""
        if self.failed is not None:
            return b""
        if self._stencil is not None and not self._splitter.pending:
            text = self._stencil.text_in(data)
            if text:  # nearly every chunk of an answer
                self._tries = _STENCIL_TRIES
                return self._write(self._parser.more(text))
        if self._splitter.pending or not data.endswith(b"\n\n"):
            try:
                data = self._splitter.feed(data)
            except RouterError as error:
                return self.fail(ErrorInfo(error.status, error.message, code=error.code))
        return self._take(data) if data else b""

    def finish(self) -> bytes:
        """The target's bytes for the end of the stream; a stream without its end becomes an error."""
        rest = self._splitter.finish()
        events = parse_events(rest) if self.failed is None else []
        # Without a blank line behind them they are whole events all the same, or were cut off in one.
        is_whole = bool(events) and all(one.data == "[DONE]" or try_json(one.data) is not None for one in events)
        out = self._take(rest.rstrip(b"\r\n") + b"\n\n") if is_whole else b""
        return out + self._end(self._parser.finish()) if self.failed is None else out

    def _take(self, whole: bytes) -> bytes:
        events, parse = parse_events(whole), self._parser.feed
        out = b"".join([self._write(parse(event)) for event in events])
        self._stencil = None
        if len(events) == 1 and self._parser.said and self._tries:
            self._tries -= 1
            self._stencil = make_stencil(whole, self._parser.said)
        return out

    def _write(self, events: Sequence[Any]) -> bytes:
        if self.recorder is not None:
            self.recorder.see(events)
        if self._restorer is not None:
            events = [restored for event in events for restored in self._restorer.restore(event)]
        if len(events) == 1 and self.content and type(events[0]) is Delta:
            return self._render(events[0])
        self._look(events)
        out = b"".join([self._render(event) for event in events])
        return out if self.failed is None else self._hide(out)

    _end = _write

    def _look(self, events: Sequence[Any]) -> None:
        for event in events:
            kind = type(event)
            if kind is Delta:
                self.content = True
            elif kind is Opened:
                block, is_opaque = event.block, isinstance(event.block, Opaque)
                shown = block.value if is_opaque and block.wire == self._target.name else {}
                calls = shown.get("name") or get_text(shown, "type").endswith("_call")
                self.content = self.content or bool(getattr(block, "name", "") or calls)
                self._has_opaque = self._has_opaque or is_opaque
            elif kind is Started:
                self._begun = event
            elif kind is Finished:
                self._stop_reason = event.stop_reason
            elif kind is Failed:
                self.failed = event.error._replace(message=mask_in(event.error.message, self._secrets))

    def fail(self, error: ErrorInfo) -> bytes:
        """The target's bytes for an answer that cannot go on."""
        return self._write([Failed(error)])

    def _hide(self, out: bytes) -> bytes:
        """What is sent of an upstream's error."""
        return mask_in(out.decode("utf-8", "surrogateescape"), self._secrets).encode("utf-8", "surrogateescape")


class StreamRelay(StreamTranslator):
    """An answer's bytes from a format to the same one, untouched but cut after whole events.

    Until the first content every event is parsed; after it only those that the format's `watch` finds, so a relayed
    chunk costs one search. Nothing follows the event in which the upstream told an error. A last event that the
    connection cut off is not passed on. Where the format shows the model in its first event, that is renamed.
    """

    _is_named = False  # whether the event that names the model went by
    _last = b""  # what was passed on last that bears a number, as comments do not

    def _watch(self, raw: bytes) -> Any:
        return self._target.watch.search(raw) or b"[DONE]" in raw or _ERROR_EVENT.search(raw)

    def _take(self, whole: bytes) -> bytes:
        self._last = whole if b'"sequence_number"' in whole else self._last
        sees_all = self.recorder is not None
        if self.content and not sees_all and not self._watch(whole):
            return whole
        ends = [0, *(match.end() for match in _BLANK_LINE.finditer(whole)), len(whole)]
        passed, rest = [], [whole[start:end] for start, end in zip(ends, ends[1:]) if start < end]
        for index, raw in enumerate(rest, 1):
            if sees_all or not self.content or self._watch(raw):
                for event in parse_events(raw):
                    events = self._parser.feed(event)
                    self._look(events)
                    if self.recorder is not None:
                        self.recorder.see(events)
                model = self._context.request.model
                if self._target.name == "anthropic" and b"message_start" in raw and model and not self._is_named:
                    raw, self._is_named = rename_model(raw, model), True  # clients take it for theirs (trap 44)
            passed.append(raw)
            if self.failed is not None:  # OpenAI tells an error twice, the second time as Codex reads it
                last = b"".join(one for one in rest[index : index + 1] if b'"response.failed"' in one)
                if not last and self._target.name == "responses" and b'"response.' not in raw:  # which may come later
                    last = b"".join(self.fail(self.failed).partition(b"event: response.failed")[1:])
                return self._hide(b"".join(passed) + last)
        return b"".join(passed)

    def hand_over(self) -> bytes:
        """The bytes that wait for the end of their event: from here on somebody else passes the rest on, unwatched."""
        return self._splitter.finish()

    def _end(self, events: Sequence[Any]) -> bytes:
        self._look(events)
        return b"" if self.failed is None else self.fail(self.failed)

    def fail(self, error: ErrorInfo) -> bytes:
        """The error as the format has it; in Responses with the number due, of the answer begun (SDK: no other)."""
        self.failed, numbers = error, _EVENT_NUMBER.findall(self._last)
        self._renderer.render(self._begun)  # which the client has
        if numbers:
            self._renderer.number = int(numbers[-1]) + 1
        return self._renderer.render(Failed(error))


_ERROR_EVENT = re.compile(rb"event:\s*error")
_EVENT_NUMBER = re.compile(rb'"sequence_number"\s*:\s*([0-9]{1,15})')


def make_processor(
    source: str, target: str, context: Context, limit: int = MAX_EVENT_BYTES, secrets: Sequence[str] = ()
) -> StreamTranslator:
    """What stands between an upstream that speaks `source` and a client that speaks `target`."""
    return (StreamRelay if source == target else StreamTranslator)(source, target, context, limit, secrets)


# ---- the model's name in answers that are passed through

_MODEL_MEMBER = re.compile(rb'("model"\s*:\s*)"[^"\\]*(?:\\.[^"\\]*)*"')


def rename_model(data: bytes, name: str) -> bytes:
    """A whole answer's JSON, or one raw event that holds it, with `name` as its `model` (or its message's).

    Only the name's bytes change where the result proves to be the same JSON otherwise, else the JSON is written anew;
    what cannot be read comes back as it is.
    """
    start, end = data.find(b"{"), data.rfind(b"}") + 1
    value = as_dict(try_json(data[start:end]))
    holder = value["message"] if isinstance(value.get("message"), dict) else value
    if not isinstance(holder.get("model"), str):
        return data
    holder["model"] = name
    spliced = _MODEL_MEMBER.sub(lambda match: match.group(1) + dump_json(name), data[start:end], 1)
    return data[:start] + (spliced if load_json(spliced) == value else dump_json(value)) + data[end:]


# ==============================================================================
# 13 COMPATIBILITY - what a given upstream refuses or needs, and lessons from a 400 [pure]
# ==============================================================================
#
# Fixes are for what the router itself adds or names when it translates. A request that is passed through in its own
# format is altered only where its row says what its upstream is known to refuse (signed_thinking, replays_reasoning,
# betas, "no reasoning_content"), or, by REPAIRS, after the 400 that says so. What no row knows is learned from the 400
# that names the field, once per model.


class Compat(NamedTuple):
    """One family of upstreams, found by host (or ":port") or by a provider's `compat`. fixes: names in FIXES, always
    applied.

    signed_thinking: refuses thinking without its own signature (trap 85), and ids of calls with other signs than
    letters, digits, - and _, also in a request that is passed through.
    replays_reasoning: refuses turns with calls without their `reasoning_content` while it thinks (trap 87).
    switches: thinks unless told not to by `thinking`, which has Anthropic's shape (api-docs.deepseek.com, docs.z.ai).
    caches: takes Anthropic's `cache_control` in Chat Completions (trap 68). betas: all of `anthropic-beta` that it
    takes (trap 110), and then no `cache_control.scope` (trap 69) or attribution either; None: everything."""

    name: str
    hosts: Texts
    fixes: Texts = ()
    signed_thinking: bool = False
    replays_reasoning: bool = False
    switches: bool = False
    caches: bool = False
    betas: Optional[re.Pattern[str]] = None


_NEVER = "(?!)"


class Fix(NamedTuple):
    """A change to a translated body. apply(body) changes it in place. refused: the pattern of the 400 that asks for
    this change; needs: a field that must stand in the body for it to make sense."""

    apply: Callable[[Json], None]
    needs: str
    refused: str = _NEVER  # a text, as all patterns that only errors need: compiling them would slow every start


def _rename(old: str, new: str) -> Callable[[Json], None]:
    return lambda body: body.update({new: body.pop(old)} if old in body else {})


def _drop(*names: str, among: Callable[[Json], List[Json]] = lambda body: [body]) -> Callable[[Json], None]:
    def apply(body: Json) -> None:
        for holder in among(body):
            for name in names:
                holder.pop(name, None)

    return apply


def _turns(body: Json) -> List[Json]:
    return [as_dict(turn) for turn in get_list(body, "messages")]


def _system_in_front(body: Json) -> None:
    """Instructions amid the conversation, as Claude Code sends them, are the user's words to templates like Qwen's."""
    for turn in _turns(body)[1:]:
        turn.update({"role": "user"} if turn.get("role") == "system" else {})


def _drop_sampling(body: Json) -> None:
    """OpenAI's and Kimi's models that reason refuse what steers sampling, unless they are told not to (trap 72)."""
    efforts = body.get("reasoning_effort"), get_dict(body, "reasoning").get("effort")
    if re.search(_THINKERS + "|(?:^|/)kimi-", get_text(body, "model")) and "none" not in efforts:
        _drop("temperature", "top_p")(body)


def blank_thoughts(body: Json, blank: str = "") -> Optional[Json]:
    """A Chat body all of whose answers bear `reasoning_content`, a blank one for what nobody remembers: DeepSeek, which
    refuses calls without, takes an empty one (experientiallabs/experiential#887, #890). None when all do."""
    turns = []
    for turn in _turns(body):
        is_answer = turn.get("role") == "assistant"
        turns.append({**turn, "reasoning_content": turn.get("reasoning_content") or blank} if is_answer else turn)
    return {**body, "messages": turns} if turns != body.get("messages") else None


def _think_on(body: Json) -> None:
    """A turn with calls may lack its reasoning: another provider made it, or it was forgotten. Kimi does not think then
    (platform.moonshot.ai), or takes a dot for it where it always thinks (anomalyco/opencode#10996)."""
    is_lacking = any(turn.get("tool_calls") and not turn.get("reasoning_content") for turn in _turns(body))
    model = get_text(body, "model")
    always_thinks = re.search(r"kimi-k(?:2\.[7-9]|[3-9])", model)
    if is_lacking and not always_thinks and re.search("kimi|moonshot", model):
        body["thinking"] = {"type": "disabled"}
        body.pop("reasoning_effort", None)  # both at once are refused
    elif is_lacking:
        body.update(blank_thoughts(body, "." if always_thinks else "") or {})


def strict_turns(body: Json) -> Optional[Json]:
    """A Chat body as Mistral wants it (errors 3230, 3280), None when it is so: ids of calls are nine letters or digits,
    the user does not speak right behind a tool, and a turn of the model at the end is a prefix."""

    def nine(call_id: Any) -> str:
        text = as_text(call_id).encode("utf-8", "surrogatepass")
        return call_id if re.fullmatch(rb"[a-zA-Z0-9]{9}", text) else hashlib.sha256(text).hexdigest()[:9]

    turns: List[Json] = []
    role = None  # of the turn before
    for turn in _turns(body):
        if role == "tool" and turn.get("role") not in ("tool", "assistant"):
            turns.append({"role": "assistant", "content": "(noted)"})
        role = turn.get("role")
        calls = [{**call, "id": nine(call.get("id"))} for call in map(as_dict, get_list(turn, "tool_calls"))]
        turn = {**turn, "tool_call_id": nine(turn["tool_call_id"])} if "tool_call_id" in turn else turn
        turns.append({**turn, "tool_calls": calls} if calls else turn)
    if role == "assistant":
        turns[-1] = {**turns[-1], "prefix": True}
    return {**body, "messages": turns} if turns != body.get("messages") else None


# Formats beyond OpenAI's list for strict schemas; patterns with Unicode classes, look-around or names; notes; bounds
# that Gemini does not know, behind whatever gateway (databricks/unity-gateway#491): Claude Code and opencode tell such.
_ODD_IN_SCHEMA = re.compile(
    r"format: (?!(?:date-time|date|time|duration|email|hostname|ipv4|ipv6|uuid)?$)"
    r"|pattern: .*(?:\\[pPkK]|\(\?[=!<])|\$(?:schema|id|comment): "
    r"|(?:exclusiveM(?:in|ax)imum|multipleOf|uniqueItems|propertyNames): "
)

# Keywords whose value maps names to schemas, and those that hold a schema or a list of them.
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_PLACES = ("items", "prefixItems", "anyOf", "oneOf", "allOf", "not")


def plain_schema(schema: Any, place: str = "items") -> Any:
    """A JSON schema in the words that strict upstreams take (traps 91 to 93): without what is odd, `const` as `enum`,
    and `true` and `false` as the objects that mean them, which Moonshot and Gemini demand (can1357/oh-my-pi#5604,
    #5980). A list of nobody knows what is one of texts: OpenAI and Gemini refuse it (NousResearch/hermes-agent#77617).
    A property may bear any such name. place: where it stands."""
    if isinstance(schema, bool) and place in _SCHEMA_PLACES:
        return {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        return [plain_schema(one, place) for one in schema] if isinstance(schema, list) else schema
    is_map = place in _SCHEMA_MAPS
    words = {k: one for k, one in schema.items() if is_map or not _ODD_IN_SCHEMA.match(k + ": " + as_text(one))}
    words.update({"enum": [words.pop("const")]} if "const" in words and not is_map else {})
    if "array" in (words.get("type"), *get_list(words, "type")):
        words.setdefault("items", {"type": "string"})
    data = () if is_map else ("const", "default", "enum", "examples")  # may look like a schema and is none
    return {k: one if k in data else plain_schema(one, "items" if is_map else k) for k, one in words.items()}


_SCHEMA_BOUNDS = frozenset(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength pattern minItems maxItems"
    " uniqueItems minProperties maxProperties".split()
)


def closed_schema(schema: Any, place: str = "items") -> Any:
    """A JSON schema as Anthropic's structured outputs take it: objects are closed, bounds become words of the
    description (the SDK's transform_schema). place: where it stands."""
    if isinstance(schema, list):
        return [closed_schema(one, place) for one in schema]
    if not isinstance(schema, dict) or place not in _SCHEMA_MAPS + _SCHEMA_PLACES:
        return schema
    if place in _SCHEMA_MAPS:
        return {name: closed_schema(one) for name, one in schema.items()}
    bounds = {key: one for key, one in schema.items() if key in _SCHEMA_BOUNDS}
    words = {key: closed_schema(one, key) for key, one in schema.items() if key not in bounds}
    if bounds:
        words["description"] = ("%s\n\n%s" % (get_text(words, "description"), dump_json(bounds).decode())).strip()
    kinds = [words.get("type"), *get_list(words, "type")]
    return {**words, "additionalProperties": False} if "object" in kinds else words


def _close_schemas(body: Json) -> None:
    """Those that Anthropic compiles: the answer's, and strict tools' (earendil-works/pi#9953)."""
    strict = [tool for tool in _tools_of(body) if tool.get("strict")]
    for holder in (get_dict(get_dict(body, "output_config"), "format"), *strict):
        holder.update((key, closed_schema(holder[key])) for key in ("schema", "input_schema") if key in holder)


def _tell_schema(body: Json) -> None:
    """Where JSON mode is all there is, as at DeepSeek, or not even that, as with older models in Anthropic's format,
    the schema is told in words."""
    form = get_dict(body, "response_format").get("json_schema") or get_dict(body, "output_config").get("format")
    words = "Answer with JSON that follows this JSON schema:\n" + dump_json(as_dict(form).get("schema")).decode()
    if body.pop("output_config", None) and form:
        before = body.get("system") or []
        before = [{"type": "text", "text": before}] if isinstance(before, str) else before
        body["system"] = [*before, {"type": "text", "text": words}]
    elif get_dict(form or {}, "schema"):
        body["messages"] = [{"role": "system", "content": words}, *get_list(body, "messages")]
        body["response_format"] = {"type": "json_object"}


def _tools_of(body: Json) -> List[Json]:
    tools = [as_dict(tool) for tool in get_list(body, "tools")]
    return tools + [get_dict(tool, "function") for tool in tools]


def _plain_schemas(body: Json) -> None:
    for tool in _tools_of(body):
        tool.update((key, plain_schema(tool[key])) for key in ("input_schema", "parameters") if key in tool)


_REFUSAL = (
    r"unsupported|not supported|unrecognized|unknown|unexpected|not permitted|invalid|extra|not allowed|cannot|does not"
    r"|instead"
)


def _names(field: str) -> str:
    """An error that says no to `field`: its name as a word of its own, however it is spelled (xAI: reasoningEffort),
    alone or at the end of its place in the body (FastAPI: tools.0.strict; OpenAI, Fireworks: tools[0].strict), and a
    word of refusal."""
    place = r"(?:(?:body|tools|messages)(?:\.[\w-]+|\[\d+\])*\.)?"
    word = r"(?<![\w.])%s%s(?!\w)" % (place, field.replace("_", "[_ ]?"))
    return r"(?s)\A(?=.*%s)(?=.*(?:%s))" % (word, _REFUSAL)  # at the start only, or long texts take minutes


# More words of refusal: Ollama's and Groq's; Anthropic's of too many strict tools, OpenAI's of optional properties.
_UNTHINKING = r"|does not support thinking|reasoning_effort\W{1,3}must be one of"
_UNSTRICT = r"|strict tools|compil|'required' is required|tools\.\d+\.custom: for '"
_LIMITS = ("max_tokens", "max_completion_tokens")
_LEFT_OUT = "stream_options parallel_tool_calls thinking service_tier stop tool_choice max_output_tokens"
# What Codex and others tell OpenAI: a server that refuses one of these fields knows none of them (trap 70).
_OPENAI_ONLY = (
    "metadata moderation prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier verbosity"
).split()


def _shorten_ids(body: Json) -> None:
    """OpenAI takes forty characters of a call's id. Others need theirs whole: LiteLLM puts signatures into them."""
    turns, items = get_list(body, "messages"), get_list(body, "input")
    holders = [(item, "call_id") for item in items] + [(turn, "tool_call_id") for turn in turns]
    for holder, key in holders + [(call, "id") for turn in turns for call in get_list(turn, "tool_calls")]:
        call_id = get_text(holder, key)
        if len(call_id) > 40:
            holder[key] = call_id[:29] + "_" + hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _shorten_descriptions(body: Json) -> None:
    """Azure's models, at SAP as well, take 1024 characters (rusiaaman/wcgw#51): Claude Code has tools with more."""
    for tool in _tools_of(body):
        tool.update({"description": tool["description"][:1024]} if get_text(tool, "description") else {})


def _drop_openai_only(body: Json) -> None:
    """`store` goes with them where nothing is stored unless that says so."""
    _drop(*_OPENAI_ONLY, *(["store"] if "messages" in body else []))(body)


# Vendors' API references, and the public threads that TRAPS of this kind were met in (traps 70, 71, 108).
FIXES: Dict[str, Fix] = {
    "closed schemas": Fix(_close_schemas, "output_config", r"additionalproperties"),
    **{new: Fix(_rename(old, new), old, _names(old)) for old, new in (_LIMITS, _LIMITS[::-1])},
    "short ids": Fix(_shorten_ids, "model", r"id\W{1,3}string too long"),
    "short descriptions": Fix(_shorten_descriptions, "tools", r"description\W{1,3}string too long"),
    # GPT-5.5 and newer ones call no functions in Chat Completions while they reason.
    "no effort beside tools": Fix(
        lambda body: body.update({"reasoning_effort": "none"} if body.get("tools") else {}),
        "tools",
        r"function tools with reasoning_effort",
    ),
    **{"no " + field: Fix(_drop(field), field, _names(field)) for field in _LEFT_OUT.split()},
    **{"no " + field: Fix(_drop_openai_only, field, _names(field)) for field in _OPENAI_ONLY},
    "no store": Fix(_drop("store", *_OPENAI_ONLY), "store", _names("store")),
    "no user": Fix(  # a word of many errors that speak of roles
        _drop("user"), "user", r"\buser\W{1,3}(?:extra|is un|is not)|(?:property|name|supplied|meter)\W{1,3}user\b"
    ),
    "no reasoning_effort": Fix(_drop("reasoning_effort"), "reasoning_effort", _names("reasoning_effort") + _UNTHINKING),
    "no output_config": Fix(_tell_schema, "output_config", _names("output_config") + "|support the effort parameter"),
    # Before what is known of schemas, for the format's name ends in that word: OpenAI, Azure, Groq, DeepSeek.
    "schema in words": Fix(
        _tell_schema,
        "response_format",
        r"response[_ ]format.{0,60}(?:un|not )(?:avail|supp)|not support response[_ ]format"
        r"|invalid value: 'json_schema'|allowed values \[[^\]]{0,40}json_object",
    ),
    # Summaries are for verified organizations only, the rest is for all.
    "no summary": Fix(lambda body: _drop("summary")(body["reasoning"]), "reasoning", r"reasoning[ ._]summar"),
    "no include": Fix(_drop("include"), "include", r"(?:supported|parameter)\W{1,3}include\b|\binclude\W{1,3}extra"),
    "no reasoning": Fix(
        _drop("reasoning", "include"), "reasoning", _names(r"reasoning(?:\.\w+|_effort)?") + "|encrypted content is not"
    ),
    # What DeepSeek and Moonshot ask for others refuse (traps 84, 87).
    "no reasoning_content": Fix(_drop("reasoning_content", among=_turns), "messages", _names("reasoning_content")),
    "no strict": Fix(_drop("strict", among=_tools_of), "tools", _names("strict") + _UNSTRICT),
    "plain schemas": Fix(_plain_schemas, "tools", _names("(?:json_|input_)?schema") + "|function_declarations"),
    "no sampling": Fix(_drop_sampling, "model"),
    "strict turns": Fix(
        lambda body: body.update(strict_turns(body) or {}),
        "messages",
        r"length (?:of )?9\b|unexpected role|last role user|conversation roles must alternate",
    ),
    "system in front": Fix(_system_in_front, "messages", r"system message must be at the beginning"),
    # Ollama's models think unless told not to (trap 112; docs.ollama.com, OpenAI compatibility).
    "think if asked": Fix(lambda body: body.setdefault("reasoning_effort", "none"), "messages"),
    "think on": Fix(_think_on, "messages"),
}
TEMPLATE_FIXES = ("strict turns", "system in front")  # what a local model's template refuses may be told with a 500

# Amazon Bedrock's and Vertex AI's documentation of Claude name these; whatever else is "invalid beta flag".
_CLOUD_BETAS = re.compile(
    r"(?:computer-use|token-efficient-tools|interleaved-thinking|output-128k|dev-full-thinking|context-1m"
    r"|context-management|effort|tool-search-tool|tool-examples)-\d"
)
_CLOUD_FIXES = ("plain schemas", "closed schemas")
_MISTRAL_FIXES = ("no stream_options", "no reasoning_content", "no store", "no user", "strict turns")
_OPENAI_FIXES = ("max_completion_tokens", "no reasoning_content", "no sampling", "short ids")
_KIMI_FIXES = ("think on", "plain schemas", "no sampling")
_PICKY_FIXES = ("no reasoning_content", "no store", "plain schemas")

COMPATS: Tuple[Compat, ...] = (
    Compat("openai", ("api.openai.com",), _OPENAI_FIXES),
    Compat("azure", ("openai.azure.com", "services.ai.azure.com", "cognitiveservices.azure.com"), _OPENAI_FIXES),
    Compat("anthropic", ("api.anthropic.com",), ("closed schemas",), signed_thinking=True),
    Compat("bedrock", ("amazonaws.com",), _CLOUD_FIXES, signed_thinking=True, betas=_CLOUD_BETAS),
    Compat("vertex", ("aiplatform.googleapis.com",), _CLOUD_FIXES, signed_thinking=True, betas=_CLOUD_BETAS),
    Compat("openrouter", ("openrouter.ai",), caches=True),
    Compat("deepseek", ("api.deepseek.com",), ("think on", "schema in words"), replays_reasoning=True, switches=True),
    Compat("moonshot", ("api.moonshot.ai", "api.moonshot.cn"), _KIMI_FIXES, replays_reasoning=True, switches=True),
    Compat("zai", ("api.z.ai", "open.bigmodel.cn"), ("plain schemas",), switches=True),
    Compat("qwen", ("dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com", "dashscope-us.aliyuncs.com"), caches=True),
    Compat("groq", ("api.groq.com",), _PICKY_FIXES),
    Compat("mistral", ("api.mistral.ai",), _MISTRAL_FIXES),
    Compat("gemini", ("generativelanguage.googleapis.com",), _PICKY_FIXES, replays_reasoning=True),
    Compat("together", ("api.together.xyz", "api.together.ai"), ("plain schemas",)),
    Compat("cerebras", ("api.cerebras.ai",), ("max_completion_tokens", *_PICKY_FIXES)),
    Compat("ollama", (":11434",), ("think if asked",)),
)  # fmt: skip
_PLAIN = Compat("", ())


def find_compat(name: str, host: str, port: int = 0) -> Compat:
    """The row for a provider: by its `compat`, else by the host of its URL; an empty row for what nobody knows."""
    dotted = "." + host
    rows = [row for row in COMPATS if ":%d" % port in row.hosts or any(dotted.endswith("." + end) for end in row.hosts)]
    return next((row for row in COMPATS if row.name == name), next(iter(rows), _PLAIN))


def apply_fixes(body: Json, fixes: Iterable[str]) -> Json:
    """A translated body as the upstream wants it. `body` is changed in place."""
    for fix in filter(None, map(FIXES.get, fixes)):
        fix.apply(body)
    return body


def told_limit(body: Json, text: str) -> str:
    """The fix for a body that asks for more tokens of an answer than the upstream says that it gives, else ""."""
    asked = max(as_int(body.get(key)) for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
    is_bound = re.search(r"at most|less than|lower than|<=|> \d|range|maximum|too large", text)
    is_other = re.search(r"greater|at least|minimum|stream", text)
    if not is_bound or is_other or not re.search(r"max\w{0,40}[_ ]?tokens", text):
        return ""
    numbers = (int(word.replace(",", "")) for word in re.findall(r"(?<![\w.-])\d[\d,]{2,8}(?!\w|\.\d)", text))
    limit = max((number for number in numbers if number < asked), default=0)
    limit -= "%d (exclusive)" % limit in text  # Vertex AI
    return "at most %d tokens" % limit if limit else ""


def _change_turns(body: Json, change: Callable[[Json, List[Json]], Json]) -> Optional[Json]:
    """A Chat body with its turns of calls changed; None when they stay as they are."""
    messages, changed = get_list(body, "messages"), []
    for message in messages:
        calls = list(map(as_dict, get_list(as_dict(message), "tool_calls")))
        changed.append(change(message, calls) if calls else message)
    return {**body, "messages": changed} if changed != messages else None


def replay_reasoning(body: Json, issuer: str, memory: BoundedMap) -> Optional[Json]:
    """A Chat body with what `issuer` had thought before its calls (trap 87), and their proofs; None if it has all."""

    def replayed(turn: Json, calls: List[Json]) -> Json:
        known = recall(memory, issuer, [get_text(call, "id") for call in calls])
        proofs = {block.id: own_extra(block, "openai") for block in known if isinstance(block, ToolCall)}
        text = "".join(map(block_text, known))
        thought = {"reasoning_content": text} if text and not turn.get("reasoning_content") else {}
        return {**turn, **thought, "tool_calls": [{**proofs.get(get_text(call, "id"), {}), **call} for call in calls]}

    return _change_turns(body, replayed)


def drop_thoughts(body: Json) -> Optional[Json]:
    """A Chat body without any `reasoning_content`, None without one: opencode, qwen-code and pi send what one model
    thought to the next one, which may be another provider's."""
    turns = [_without(turn, "reasoning_content") for turn in _turns(body)]
    return {**body, "messages": turns} if turns != get_list(body, "messages") else None


def sign_calls(body: Json) -> Optional[Json]:
    """A Chat body whose turns of calls bear a thought signature, as Gemini demands: where another provider made the
    calls, what Google names for that (ai.google.dev/gemini-api/docs/thought-signatures). None when all do."""
    foreign = {"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}}

    def signed(turn: Json, calls: List[Json]) -> Json:
        is_signed = any(call.get("extra_content") for call in calls)
        return turn if is_signed else {**turn, "tool_calls": [{**calls[0], **foreign}, *calls[1:]]}

    return _change_turns(body, signed)


def sign_calls_anew(body: Json) -> Optional[Json]:
    """A Chat body without the proofs of its calls, which are then those of another provider. Google's two clouds take
    no proof of each other, and OpenRouter asks now one, now the other (OpenRouterTeam/ai-sdk-provider#491). None
    without calls."""

    def bare(turn: Json, calls: List[Json]) -> Json:
        own = [_without(call, "extra_content") for call in calls]
        return {**_without(turn, "reasoning_details"), "tool_calls": own}

    return sign_calls(_change_turns(body, bare) or body)


def drop_sealed(body: Json, mark: str = "") -> Optional[Json]:
    """A Responses body without the items that only their issuer can read, since they are encrypted, or reasoning that a
    provider looks up by its id, and answers 404 where it was not the one that stored it (vercel/ai#7543); None if it
    has none. mark: only those go whose id holds it."""
    items, kept = get_list(body, "input"), []
    for item in items:
        is_sealed = "encrypted_content" in as_dict(item) or as_dict(item).get("type") == "reasoning"
        kept += [] if is_sealed and mark in get_text(item, "id") else [item]
    return {**body, "input": kept} if len(kept) < len(items) else None


OWN_REASONING = b"rs_req_"  # how the ids begin that the router gives to reasoning of other formats
_FOREIGN = "its history without the proofs of others"
_THINKING_REFUSED = (
    r"(?:invalid[^\n]{0,20}signature[^\n]{0,80}|expected[^\n]{0,20})thinking|thinking[^\n]{0,90}cannot be modified"
)
_THOUGHT_MISSED = r"reasoning_content[^\n]{0,30}must be passed back|missing .?reasoning_content"  # DeepSeek
# Format, what a 400 or 404 says of foreign words or a missing proof, the repair in words, and the body mended, or None.
# Anthropic: "Invalid `signature` in `thinking` block", "Expected `thinking` or `redacted_thinking`, but found ...",
# "`thinking` ... blocks in the latest assistant message cannot be modified" (traps 64, 85, 86).
REPAIRS = (
    ("anthropic", r"billing-header is a reserved", "without Claude Code's line for its books", drop_attribution),
    ("openai", r"missing a thought_?signature", "its calls with signatures", sign_calls),
    ("openai", r"(?:corrupted|invalid) thought[_ ]?signature", _FOREIGN, sign_calls_anew),
    ("openai", _THOUGHT_MISSED, "its calls with reasoning", blank_thoughts),
    # Kimi, wherever it is served: an empty one is missing to it.
    ("openai", r"reasoning_content is missing", "its calls with reasoning", lambda body: blank_thoughts(body, ".")),
    ("responses", r"invalid_encrypted_content|encrypted content[^\n]{0,200}could not", _FOREIGN, drop_sealed),
    ("responses", r"item with id '[^'\n]+' not found", _FOREIGN, drop_sealed),
    ("anthropic", _THINKING_REFUSED, _FOREIGN, lambda body: drop_thinking(body, False)),
)


def repair_history(data: bytes, wire: str, words: Sequence[str]) -> Tuple[str, Optional[Json]]:
    """The repair that a 400 of its format asks for, in words, and the body as JSON after it, None without one."""
    text = "\n".join(words).lower()
    repair, apply = next((row[2:] for row in REPAIRS if row[0] == wire and re.search(row[1], text)), ("", None))
    return repair, apply(load_json(data)) if apply else None


def keep_cache_marks(request: ChatRequest) -> ChatRequest:
    """A request whose cache_control, of texts and tools, is written in Chat Completions, too (trap 68)."""

    def marked(value: Any) -> Any:
        mark = own_extra(value, "anthropic").get("cache_control") if isinstance(value, (Text, Tool)) else None
        if not mark:
            return value
        return value._replace(extra={**value.extra, "openai": {**own_extra(value, "openai"), "cache_control": mark}})

    return map_request(request, marked)


def keep_switch(request: ChatRequest) -> ChatRequest:
    """A request whose wish for no thinking is written in Chat Completions as `thinking`, and not as an effort, too."""
    if not request.reasoning or request.reasoning.effort != "none":
        return request
    own = {**get_dict(request.fields or {}, "openai"), "thinking": {"type": "disabled"}}
    return request._replace(reasoning=None, fields={**(request.fields or {}), "openai": own})


def bare_cache_marks(value: Any) -> Any:
    """A Messages body whose cache_control says nothing but `type` and `ttl` (trap 69)."""
    if not isinstance(value, dict):
        return [bare_cache_marks(one) for one in value] if isinstance(value, list) else value
    nested = ("system", "tools", "messages", "content")
    bare = {key: bare_cache_marks(one) if key in nested else one for key, one in value.items()}
    if "cache_control" in bare:
        bare["cache_control"] = {k: v for k, v in as_dict(bare["cache_control"]).items() if k in ("type", "ttl")}
    return bare


def learn_fix(body: Json, words: Sequence[str], known: Iterable[str]) -> str:
    """The fix that a 400's words ask for, "" when it names nothing that the router added or that was not tried yet."""
    text = "\n".join(words).lower()[:50_000]  # some repeat the request
    untried = (name for name, fix in FIXES.items() if name not in known and fix.needs in body)
    return told_limit(body, text) or next((name for name in untried if re.search(FIXES[name].refused, text)), "")


# ==============================================================================
# 14 INBOUND - paths, who may call, and what a request asks for [pure]
# ==============================================================================

_PATH = re.compile(r"(?:/(?:route|router))?(?:/(anthropic|openai))?(?:/v1)?(?:/(.+))?", re.DOTALL)


class Endpoint(NamedTuple):
    """What a path means. operation: chat, count_tokens, embeddings, models, model, root, health, ready or metrics.

    methods: what the path answers to. wire: the format the path fixes, "" when the request decides.
    argument: the rest of the path, percent-decoded (a model id). is_open: reading it needs no key."""

    operation: str
    methods: Texts = ("POST",)
    wire: str = ""
    argument: str = ""
    is_open: bool = False


_READ = ("GET", "HEAD")
_METHODS = frozenset("GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH".split())
_CONTROL = "/_router/"  # what a host answers itself

# The part of a path that decides -> its endpoint: behind the prefixes, where "" stands for nothing, or all of it. One
# that no row names is unknown.
_TAILS: Dict[str, Endpoint] = {
    **{row.path[1:]: Endpoint("chat", wire=wire) for wire, row in WIRE_FORMATS.items()},
    "messages/count_tokens": Endpoint("count_tokens", wire="anthropic"),
    "embeddings": Endpoint("embeddings", wire="openai"),
    "models": Endpoint("models", _READ),
    "": Endpoint("chat"),
}
_PATHS: Dict[str, Endpoint] = {
    "": Endpoint("root", (*_READ, "POST"), is_open=True),
    "*": Endpoint("root", (*_READ, "POST"), is_open=True),  # only OPTIONS may ask it (RFC 9112 3.2.4)
    "/health": Endpoint("health", _READ, is_open=True),
    "/ready": Endpoint("ready", _READ, is_open=True),
    "/metrics": Endpoint("metrics", _READ),
}


def find_endpoint(path: str) -> Endpoint:
    """The endpoint of a request path (no query). RouterError 404 for a path that means nothing."""
    bare = path[:-1] if path.endswith("/") else path
    match = _PATH.fullmatch(bare)
    prefix, tail = match.groups("") if match else ("", "*")
    endpoint = _PATHS.get(bare) or _TAILS.get(tail)
    if tail.startswith("models/"):
        endpoint = Endpoint("model", _READ, argument=unquote(tail[len("models/") :]))
    if endpoint is None:
        raise RouterError("unknown path %s" % one_line(path, 100), 404, "unknown_path")
    return endpoint._replace(wire=prefix) if prefix and not endpoint.wire else endpoint


def check_method(endpoint: Endpoint, method: str, headers: Headers) -> Endpoint:
    """The endpoint as `method` means it (POST / is a chat request). RouterError 405 for a method it does not answer,
    501 for one that HTTP does not know (RFC 9110 9.1), 426 for a WebSocket: on that Codex goes on over HTTP at once,
    on any other only when its retries are used up, which takes seconds (codex-rs/core/src/client.rs)."""
    if method not in _METHODS:
        raise RouterError("the method %s is not known here" % one_line(method, 40), 501, "unknown_method")
    if method not in endpoint.methods:
        if header(headers, "upgrade").lower() == "websocket":
            raise RouterError("this path speaks no WebSocket: POST to it over HTTP", 426, "no_websocket")
        raise RouterError("this path answers to %s only" % ", ".join(endpoint.methods), 405, "method_not_allowed")
    return _TAILS[""] if (endpoint.operation, method) == ("root", "POST") else endpoint


class Access(NamedTuple):
    """Who may call. keys: the accepted client keys as bytes, the master key; with `required` false none is asked for.
    clients: (SHA-256 as hexadecimal digits, name) of each further key.

    origins: web origins that may call; hosts: further names in `Host` that are this server.
    """

    required: bool = False
    keys: Tuple[bytes, ...] = ()
    origins: Texts = ()
    hosts: Texts = ()
    clients: Tuple[Tuple[str, str], ...] = ()


def make_access(config: Config, required: bool, guests: Iterable[Tuple[str, str]] = ()) -> Access:
    """Who may call, as the configuration says it. required: a key is asked for. guests: SHA-256 and name of further
    clients' keys."""
    keys = (config.master_key.encode("utf-8", "surrogateescape"),) if config.master_key else ()
    clients = tuple((key.sha256, key.name) for key in config.client_keys) + tuple(guests)
    return Access(required, keys, config.cors_origins, config.allowed_hosts, clients)


_LOCAL_HOST = re.compile(
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:.%]+\]|(?:.*\.)?localhost|host\.docker\.internal)(?::\d*)?",
    re.ASCII | re.IGNORECASE,
)


def offered_keys(headers: Headers) -> List[bytes]:
    """Every key the client shows, from `Authorization: Bearer`, `x-api-key` and `api-key`."""
    keys = []
    for name, value in headers:
        if name == "authorization" and value[:7].lower() == "bearer ":
            keys.append(value[7:].strip().encode("utf-8", "surrogateescape"))
        elif name in ("x-api-key", "api-key"):
            keys.append(value.encode("utf-8", "surrogateescape"))
    return keys


def find_caller(access: Access, headers: Headers) -> Optional[str]:
    """Whose key is shown: "" for the master key, a client's name for its own, None when none is right. Every pair is
    compared in constant time, with no early exit."""
    found: Dict[bool, Optional[str]] = {}
    for offered in offered_keys(headers) if access.keys or access.clients else ():
        for key in access.keys:
            found.setdefault(hmac.compare_digest(offered, key), "")
        shown = hashlib.sha256(offered).hexdigest() if access.clients else ""
        for digest, name in access.clients:
            found[hmac.compare_digest(shown, digest)] = name
    return found.get(True)


class Strikes:
    """Wrong keys by peer address, so that guessing becomes slow: the first twenty cost nothing, each further one twice
    the wait of the one before, at most two seconds. A minute without one forgives. At most a thousand peers are
    remembered; who shows a right key never waits."""

    FREE, FIRST_WAIT_S, MAX_WAIT_S, FORGIVEN_AFTER_S, MAX_PEERS = 20, 0.05, 2.0, 60.0, 1000

    def __init__(self) -> None:
        self._strikes = BoundedMap(self.MAX_PEERS)  # peer -> how many, when the last one was

    def add(self, peer: str, now: float, keys: int = 1) -> float:
        """Note the wrong keys of a request; how many seconds its answer has to wait."""
        count, last = self._strikes.get(peer) or (0, now)
        count = min((0 if now - last > self.FORGIVEN_AFTER_S else count) + keys, 64)
        self._strikes.put(peer, (count, now))
        over = count - self.FREE
        return min(self.FIRST_WAIT_S * 2 ** (over - 1), self.MAX_WAIT_S) if over > 0 else 0.0


def check_access(access: Access, endpoint: Endpoint, method: str, headers: Headers) -> Optional[str]:
    """The caller as find_caller names it, "" for whom nobody asked for a key; None: without one, and then only what is
    open may be told. RouterError 401 or 403 when the request may not pass.

    The Host rule keeps out DNS rebinding (CVE-2024-28224), the Origin rule any web page the user happens to
    have open (claude-code-router GHSA-8hmm-4crw-vm2c): both come before anything is read or sent.
    """
    host, origin = header(headers, "host"), header(headers, "origin")
    caller = find_caller(access, headers)
    if not access.required:
        caller = caller or ""
        if host and not _LOCAL_HOST.fullmatch(host):
            names = host.lower(), re.sub(r":\d*$", "", host).lower()
            if not any(own.lower() in names for own in access.hosts):
                words = "the Host %s is not this server; add it to allowedHosts if it is" % one_line(host, 80)
                raise RouterError(words, 403, "host_not_allowed")
    if caller is None or not access.required:
        own = ("http://" + host.lower(), "https://" + host.lower()) if host else ()
        if origin and origin.lower() not in own and origin not in access.origins:
            words = "requests from the web origin %s are refused; add it to corsOrigins to allow them"
            raise RouterError(words % one_line(origin, 80), 403, "origin_not_allowed")
        if not origin and method == "POST" and header(headers, "sec-fetch-site") == "cross-site":
            words = "cross-site requests from a browser are refused; see corsOrigins"
            raise RouterError(words, 403, "origin_not_allowed")
    is_open = endpoint.is_open and method in _READ or method == "OPTIONS"  # a browser's preflight carries no key
    if caller is None and not is_open:
        raise RouterError("missing or wrong API key", 401, "invalid_api_key")
    return caller


def cors_headers(access: Access, headers: Headers) -> Headers:
    """The CORS answer headers: only for an origin that is listed, never a wildcard."""
    origin = header(headers, "origin") if access.origins else ""
    if not origin or origin not in access.origins:
        return []
    asked = header(headers, "access-control-request-headers", "authorization, content-type, x-api-key")
    told = "x-llm-router-request-id, x-llm-router-model, x-llm-router-attempts, retry-after"
    return [
        ("access-control-allow-origin", origin),
        ("vary", "origin"),
        ("access-control-allow-methods", "GET, HEAD, POST, OPTIONS"),
        ("access-control-allow-headers", asked),
        ("access-control-expose-headers", told),
        ("access-control-max-age", "600"),
    ]


class JsonObject(NamedTuple):
    """A JSON object from outside. data: its text, b"" when it is to be written anew; model: where the value of `model`
    stands in that, `data[start:end]`, (0, 0) for nowhere."""

    value: Json
    data: bytes = b""
    model: Tuple[int, int] = (0, 0)


# Up to a member's value, whose key is the group; behind the last one.
_MEMBER = r'[ \t\n\r]*%s[ \t\n\r]*"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"[ \t\n\r]*:[ \t\n\r]*'
_FIRST_MEMBER, _NEXT_MEMBER = re.compile(_MEMBER % "{"), re.compile(_MEMBER % ",")
_OBJECT_END = re.compile(r"[ \t\n\r]*}[ \t\n\r]*")
_FIRST_ITEM = re.compile(r"\[[ \t\n\r]*(?![ \t\n\r\]])")
_ITEM_END = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(\]))")
_JSON_SCAN = _JSON_DECODER.scan_once  # type: ignore[attr-defined]
LARGE_BODY_BYTES = 1 << 20  # from here on a host reads and translates a body where it holds up nobody


def read_json_object(data: bytes) -> JsonObject:
    """Parse a request body. RouterError 400 when it is not a JSON object.

    Costs little more than json.loads: the values are parsed by the same C scanner, only the outermost level is walked
    here, which proves where the value of `model` stands, so that it can be replaced without dumping the rest.
    """
    try:
        text = _decoded(data)
        value, model = _scan_object(text)
    except (ValueError, RecursionError, StopIteration):
        value = load_json(data, "request body")
        if not isinstance(value, dict):
            raise RouterError("the request body is not a JSON object", 400, "invalid_json") from None
        return JsonObject(value)
    data = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    if len(text) != len(data):  # not ASCII alone: the same places in bytes
        model = len(text[: model[0]].encode()), len(text[: model[1]].encode())
    return JsonObject(value, data, model)


def _scan_value(text: str, start: int) -> Tuple[Any, int]:
    """The value at `start` and its end. An array item by item: one call into C for all of it lets no thread run."""
    mark = _FIRST_ITEM.match(text, start)
    if mark is None:
        return _JSON_SCAN(text, start)  # type: ignore[no-any-return]
    items, is_open = [], True
    while is_open:
        item, end = _JSON_SCAN(text, mark.end())
        items.append(item)
        mark = _ITEM_END.match(text, end)
        if mark is None:
            raise ValueError("the array is not closed")
        is_open = mark.group(1) is None
    return items, mark.end()


def _scan_object(text: str) -> Tuple[Json, Tuple[int, int]]:
    """The object and the place of its `model`. ValueError, RecursionError or StopIteration for what is no object, is
    empty, or has a key twice."""
    value: Json = {}
    model = 0, 0
    scan = _JSON_SCAN if len(text) < LARGE_BODY_BYTES else _scan_value
    end, member = 0, _FIRST_MEMBER.match(text)
    while member is not None:
        key, start = member.group(1), member.end()
        if "\\" in key:
            key = _JSON_SCAN('"%s"' % key, 0)[0]
        if key in value:
            raise ValueError("a key stands twice")
        value[key], end = scan(text, start)
        if key == "model":
            model = start, end
        member = _NEXT_MEMBER.match(text, end)
    if not value or _OBJECT_END.fullmatch(text, end) is None:
        raise ValueError("not an object, or an empty one")
    return value, model


def replace_model(body: JsonObject, model: str) -> bytes:
    """The object's bytes with another `model`, everything else as it came."""
    start, end = body.model
    if not end:
        return dump_json(dict(body.value, model=model))
    return b"".join((body.data[:start], dump_json(model), memoryview(body.data)[end:]))


_ANTHROPIC_FIELDS = ("system", "thinking", "stop_sequences", "top_k")
_ANTHROPIC_BLOCKS = ("tool_use", "tool_result")


def detect_wire(headers: Headers, body: Json) -> str:
    """The format of a request whose path does not say: the first sign in the order of the README's list."""
    if any(name.startswith("anthropic-") for name, _ in headers):
        return "anthropic"
    if "input" in body and "messages" not in body:
        return "responses"
    blocks = (block for message in get_list(body, "messages") for block in get_list(as_dict(message), "content"))
    is_anthropic = any(field in body for field in _ANTHROPIC_FIELDS)
    is_anthropic = is_anthropic or any("input_schema" in as_dict(tool) for tool in get_list(body, "tools"))
    is_anthropic = is_anthropic or any(as_dict(block).get("type") in _ANTHROPIC_BLOCKS for block in blocks)
    return "anthropic" if is_anthropic else "openai"


class Inbound(NamedTuple):
    """A request as the gateway takes it. `wire` is the client's format, `asked` the model name it used ("" for
    none)."""

    operation: str
    wire: str
    asked: str
    stream: bool
    headers: Headers
    body: JsonObject


_TYPED_FIELDS = (("model", str, "must be a string"), ("stream", bool, "must be true or false"))


def read_inbound(endpoint: Endpoint, headers: Headers, data: bytes) -> Inbound:
    """A POST's meaning. RouterError 400 for a body that is no JSON object or whose model or stream has a wrong type."""
    body = read_json_object(data)
    for field, kind, words in _TYPED_FIELDS:
        if not isinstance(body.value.get(field), (kind, type(None))):
            raise RouterError("%s: %s" % (field, words), 400, "invalid_type")
    wire = endpoint.wire or detect_wire(headers, body.value)
    streams = bool(body.value.get("stream")) and endpoint.operation == "chat"
    return Inbound(endpoint.operation, wire, body.value.get("model") or "", streams, headers, body)


def ends_with_tool_result(body: Json, wire: str) -> bool:
    """Whether the client's last message is a tool's result: then an empty answer may well be the right one."""
    items = get_list(body, "input" if wire == "responses" else "messages")
    last = as_dict(items[-1]) if items else {}
    if last.get("role") == "tool" or get_text(last, "type").endswith("_call_output"):
        return True
    return any(as_dict(block).get("type") == "tool_result" for block in get_list(last, "content"))


def wire_of_client(path: str, headers: Headers) -> str:
    """The format an error before parsing is written in: what the path fixes, even an unknown one behind a prefix, else
    what the headers show."""
    match = _PATH.fullmatch(path)
    fixed = (match.group(1) or "") if match else ""
    with suppress(RouterError):
        fixed = find_endpoint(path).wire
    return fixed or detect_wire(headers, {})


# What families of models count. text, schema: tokens a piece of text, and of a tool's or answer's schema. once,
# message: tokens around a request and each message; tools, forced, shape, thinking: the provider's own words when there
# are tools, one is forced, the answer has a schema, the model thinks. models: found in the model's id.
# Chosen so that the estimate errs high: a client that compacts early loses little, one that compacts too late is
# refused (traps 116, 117). From answers with a known usage, OpenAI's cookbook (How to count tokens) and Anthropic's
# documentation (Tool use: 313 to 804 tokens by model). Newest Claude models cut text finer than older ones.
_TOKEN_TABLE = r"""
     text schema once message tools forced shape thinking  models
      1.3    1.3    6       3   280     90   115       30  claude-[23]
      1.5    1.5    7       3   500     90   115       30  claude-(opus-4[-.][789]|[a-z]+-[5-9])
      1.3    1.3    7       3   530     90   115       30  claude
      1.1    1.0   70       4    20      0    20        0  gpt-oss
      1.1    0.6    3       4    90      0    20        0  gpt-5(?![.\d])
      1.1   0.65    4       4     5      0     5        0  gpt-|\bo[134]\b
      1.1    1.1    6       4   590      0    20        0  llama-?4
      1.1    1.1   32       4   100      0    20        0  llama-?3[.-][1-3]\b
      1.1    1.1    7       4   100      0    20        0  llama
      1.1    1.1  206       4   104      0    20        0  grok-(4\.[2-9]|[5-9])
      1.1    1.1   80       4   220      0    20        0  deepseek-v4
      1.1      0    1       2     0      0     0        0  deepseek-r1
      1.1    1.1    4       4   220      0    20        0  deepseek
      1.1    1.1    4       5   210      0    20        0  qwen.*coder
      1.4    0.9    3       4     5      0    20        0  stral
      1.1   0.85    1       3    10      0    20        0  gemini
     1.15    1.1    6       5   125      0    20        0
""".strip().split("\n")
TokenRow = namedtuple("TokenRow", _TOKEN_TABLE[0], defaults=[""])
_TOKEN_ROWS = [TokenRow(*map(float, line.split()[:8]), *line.split()[8:]) for line in _TOKEN_TABLE[1:]]
_CLAUDE_ROW = _TOKEN_ROWS[2]

# About what every tokenizer takes for one token: a short word, a capital abbreviation, three digits, two signs, a line
# break with its indentation, a syllable of a European or Semitic script, a character of any other.
_PIECE = r"[A-Z]?[a-z]{1,8}|[A-Z]{1,3}|\d{1,3}|[!-/:-@\[-`{-~]{1,2}|\n\s*|[\x80-\u07ff]{1,3}|[\u0800-\U0010ffff]"
_SAMPLES, _SAMPLE_CHARS = 8, 512  # longer texts are judged by samples, so that megabytes cost little

# Definitions of tools that the provider adds by itself, by the start of their type: Anthropic's documentation of each,
# or the least that answers show.
_PROVIDER_TOOLS = (
    ("web_", 2500), ("code_execution", 1600), ("advisor", 1100), ("computer", 1300), ("text_editor", 700),
    ("bash", 250), ("", 500),
)  # fmt: skip
_TOKENS_PER_IMAGE = 1600
_BASE64_PER_IMAGE_TOKEN = 13.0
_BASE64_PER_DOCUMENT_TOKEN = 32.0
_CITATIONS_TOKENS = 650
_CALL_TOKENS = 8
_UNCOUNTED = frozenset(  # what no model reads, what is counted by itself, and what chat models drop from their history
    "type role id object status tool_use_id tool_call_id call_id media_type signature encrypted_content input"
    " reasoning_content reasoning reasoning_details".split()
)
_IMAGE_TYPES = ("image", "image_url", "input_image")


def estimate_tokens(body: Json, model: str = "", wire: str = "") -> int:
    """About how many input tokens a request of any format is: system, messages, tools, results, thinking, media.

    model: the id it has upstream, else the body's own; wire: a format that the upstream speaks, for unknown models.
    """
    name = (model or get_text(body, "model")).lower()
    row = next(row for row in _TOKEN_ROWS if re.search(row.models, name))
    row = _CLAUDE_ROW if wire == "anthropic" and not row.models else row
    tools = get_list(body, "tools") or get_list(body, "functions")
    forms = [get_dict(body, field) for field in ("output_format", "output_config", "response_format", "text")]
    schemas = [f.get("schema") or f.get("json_schema") or get_dict(f, "format").get("schema") for f in forms]
    schemas = list(filter(None, schemas))
    texts = [body.get(field) for field in ("messages", "input", "system", "instructions")]
    messages = isinstance(texts[1], str) + bool(texts[2]) + bool(texts[3])
    choice = body.get("tool_choice")
    forced = (as_dict(choice).get("type") or choice) in ("any", "required", "tool", "function")
    thinks = get_dict(body, "thinking").get("type") in ("enabled", "adaptive") or body.get("reasoning")
    tokens = row.once + row.message * messages + row.shape * bool(schemas) + row.thinking * bool(thinks)
    tokens += (row.tools + row.forced * forced if tools else 0) + sum(map(_provider_tool_tokens, tools))
    return math.ceil(tokens + _count_content(texts, row) + row.schema * _count_schema(tools + schemas))


def _provider_tool_tokens(tool: Any) -> int:
    kind = get_text(as_dict(tool), "type")
    dated = re.search(r"_20\d{6}$", kind)
    return next(tokens for start, tokens in _PROVIDER_TOOLS if kind.startswith(start)) if dated else 0


def _count_content(pending: List[Any], row: TokenRow) -> float:
    tokens = 0.0
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            tokens += row.text * _count_pieces(value)
        elif isinstance(value, list):
            pending.extend(value)
        elif not isinstance(value, dict):
            tokens += value is not None
        elif value.get("type") in _IMAGE_TYPES:
            tokens += _image_tokens(value)
        elif value.get("type") == "base64":
            tokens += len(get_text(value, "data")) / _BASE64_PER_DOCUMENT_TOKEN
        else:
            tokens += row.message if "role" in value else 0
            tokens += _CITATIONS_TOKENS if get_dict(value, "citations").get("enabled") else 0
            tokens += _CALL_TOKENS if get_text(value, "type").startswith(("tool_", "function", "custom_tool")) else 0
            tokens += row.text * _count_schema([value["input"]]) if isinstance(value.get("input"), dict) else 0
            pending.extend(part for key, part in value.items() if key not in _UNCOUNTED)
    return tokens


def _count_schema(pending: List[Any]) -> float:
    pieces = 0.0
    while pending:
        value = pending.pop()
        pieces += _count_pieces(value) + 1 if isinstance(value, str) else 1 + isinstance(value, (dict, list))
        if isinstance(value, dict):
            pieces += 2 * len(value) + sum(map(_count_pieces, value))
        pending.extend(value.values() if isinstance(value, dict) else as_list(value))
    return pieces


def _count_pieces(text: str) -> float:
    if len(text) <= _SAMPLES * _SAMPLE_CHARS:
        return len(re.findall(_PIECE, text))
    starts = range(0, len(text) - _SAMPLE_CHARS + 1, (len(text) - _SAMPLE_CHARS) // (_SAMPLES - 1))
    found = sum(len(re.findall(_PIECE, text[start : start + _SAMPLE_CHARS])) for start in starts)
    return found * len(text) / (len(starts) * _SAMPLE_CHARS)


def _image_tokens(block: Json) -> float:
    link = block.get("image_url")
    link = as_text(link if isinstance(link, str) else as_dict(link).get("url"))
    size = len(get_text(get_dict(block, "source"), "data")) or len(link) * link.startswith("data:")
    return min(_TOKENS_PER_IMAGE, 70 + size / _BASE64_PER_IMAGE_TOKEN) if size else _TOKENS_PER_IMAGE


# ==============================================================================
# 15 ROUTING - a model's name becomes an ordered list of candidates [pure]
# ==============================================================================


class Candidate(NamedTuple):
    """One model at one provider that may serve a request. ref: `provider/model`; model_id: the name it has upstream."""

    ref: str
    provider: Provider
    model: Model
    model_id: str

    @property
    def formats(self) -> Texts:
        """The wire formats it speaks."""
        return self.model.formats or self.provider.formats


Plan = Tuple[Candidate, ...]  # who may serve a request, the origin first


class Routes:
    """A configuration as plans. Names are found in the order of the README: exact alias, `provider/model`, a bare
    model id or alias, alias patterns (longest literal part first), then all again without a trailing `[...]`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._index = ModelIndex(config.providers, config.aliases)
        self._plans: Dict[str, Plan] = {}

    def refs(self) -> List[str]:
        """`provider/model` of everything that is enabled."""
        providers = [provider for provider in self.config.providers if provider.enabled]
        return ["%s/%s" % (one.id, model.id) for one in providers for model in one.models if model.enabled]

    def find_plan(self, asked: str) -> Plan:
        """The candidates for the name a client asked for. RouterError 404 that names what is near."""
        plan = self._plans.get(asked)
        if plan is None:
            plan = self._make_plan(asked)
            if len(self._plans) < _MAX_PLANS:  # a model `*` lets clients make up names
                self._plans[asked] = plan
        return plan

    def _make_plan(self, asked: str) -> Plan:
        name = self.config.default_model if bare_name(asked) in ("", "smart") else asked
        if not name:
            raise _not_found("no model was asked for and no defaultModel is configured")
        if len(asked) > _MAX_NAME or not asked.isprintable():  # it would end up in headers, logs and the health book
            raise _not_found("the model's name is too long or holds control characters")
        for known in dict.fromkeys((name, bare_name(name))):
            targets = self.config.aliases.get(known) if "*" not in known else None
            if targets is None:
                targets = (known,) if self.find_candidate(known) is not None else self._index.find_pattern(known)
            if targets is not None:
                return self._resolve(asked, targets)
        passing = [ref[:-1] + one_line(name, 80) for ref in self.refs() if ref.endswith("/*") and "/" not in name]
        hint = "GET /v1/models lists what there is" + "; %s is passed on" % " or ".join(passing[:3]) * bool(passing)
        hint = did_you_mean(name, self.names(), hint, 3)
        raise _not_found("the model %s is not configured; %s" % (one_line(name, 80), hint))

    def _resolve(self, asked: str, targets: Sequence[str]) -> Plan:
        """The candidates that targets mean, each once; a single one brings its own fallbacks."""
        found = self._find_all(targets)
        if not found:
            raise _not_found("the alias %s leads to no enabled model" % one_line(asked, 80))
        origin, others = found[0], found[1:]
        if len(targets) == 1:
            refs = (self.config.aliases.get(ref, (ref,)) for ref in origin.model.fallback_models)
            others = self._find_all(target for targets in refs for target in targets)
        return (origin, *[candidate for candidate in others if candidate.ref != origin.ref])

    def find_candidate(self, name: str) -> Optional[Candidate]:
        """The model that `name` (`provider/model`, or a bare id or alias) means; None when there is none. RouterError
        404 when several providers have it."""
        found = self._index.find(name)
        if len(found) > 1:
            refs = ", ".join(sorted("%s/%s" % (provider.id, model.id) for provider, model in found))
            raise _not_found("several providers have the model %s: ask for one of %s" % (one_line(name, 80), refs))
        return next((Candidate("%s/%s" % (p.id, m.id), p, m, m.id) for p, m in found), None)

    def _find_all(self, refs: Iterable[str]) -> Tuple[Candidate, ...]:
        found = [candidate for candidate in map(self.find_candidate, refs) if candidate is not None]
        return tuple({candidate.ref: candidate for candidate in found}.values())

    def names(self) -> List[str]:
        """Every name a client may list: `smart`, aliases, each enabled `provider/model`, the models' own aliases."""
        smart = ["smart"] if self.config.default_model else []
        return list(dict.fromkeys(smart + self._index.names))


_MAX_NAME, _MAX_PLANS = 512, 1000


def _not_found(message: str) -> RouterError:
    return RouterError(message, 404, "model_not_found")


def list_models(routes: Routes, anthropic: bool, after: str = "", limit: int = 0, before: str = "") -> Json:
    """The model list. OpenAI: {"object":"list","data":[{"id","object","created","owned_by"}]}; Anthropic's shape
    (docs.anthropic.com, List Models) has type, display_name, created_at and the pagination fields; both carry both.

    after, before: the ids that a page starts behind or ends in front of; limit: its length, 0 for all."""
    names = routes.names()
    if before in names:
        names = names[: names.index(before)]
        page = names[-limit:]
    else:
        names = names[names.index(after) + 1 if after in names else 0 :]
        page = names[: limit or None]
    data = [model_entry(name, anthropic) for name in page]
    first, last = (page[0], page[-1]) if page else (None, None)
    return {"object": "list", "data": data, "has_more": len(page) < len(names), "first_id": first, "last_id": last}


def model_entry(name: str, anthropic: bool) -> Json:
    """One model as `GET /models/ID` and the list show it."""
    if anthropic:
        created = "2025-01-01T00:00:00Z"
        return {"type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active"}
    return {"id": name, "object": "model", "created": 1735689600, "owned_by": name.partition("/")[0]}


# ==============================================================================
# 16 OUTBOUND - a candidate and a request become an upstream request [pure]
# ==============================================================================


class UpstreamKey(NamedTuple):
    """What connections that may stand in for one another have in common; proxy and ca_bundle as in Provider."""

    scheme: str
    host: str
    port: int
    proxy: str = ""
    ca_bundle: str = ""

    @property
    def origin(self) -> str:
        """scheme://host:port, without a usual port: the only place the provider's key is ever sent to."""
        return origin_url(self.scheme, self.host, self.port * (self.port != _DEFAULT_PORTS[self.scheme]))


def origin_url(scheme: str, host: str, port: int = 0) -> str:
    """scheme://host:port, an IPv6 address in brackets; port 0 is left out."""
    return "%s://%s%s" % (scheme, "[%s]" % host if ":" in host else host, ":%d" % port if port else "")


class Target(NamedTuple):
    """Where requests of one provider in one wire format go, and what every one of them carries.

    key: which connections can carry them. path: with the base URL's own query. headers: everything fixed by the
    configuration; None for one that it removes, whoever else would add it. compat: what this upstream is known to
    refuse. secrets: what nobody but it may see.
    """

    key: UpstreamKey
    path: str
    headers: Mapping[str, Optional[str]]
    compat: Compat = _PLAIN
    secrets: Texts = ()


Targets = Dict[Tuple[str, str, bool], Tuple[Target, Timeouts]]  # by a provider's id, the wire format, whether streamed


class Outbound(NamedTuple):
    """One upstream request as a value. wire: its format; timeouts already resolved to milliseconds; until: the moment
    on the host's clock when the time for all of it is up."""

    target: Target
    path: str
    headers: Headers
    body: bytes
    wire: str
    stream: bool
    timeouts: Timeouts
    method: str = "POST"
    until: float = math.inf


_VERSION_SEGMENT = re.compile(r"/v\d+[a-z0-9]*(?:/openai)?$", re.IGNORECASE)
_FULL_ENDPOINT = re.compile(r"/(?:chat/completions|responses|messages|embeddings)$")
_DEFAULT_PORTS = {"http": 80, "https": 443}

# A request's own operations beside chat; their paths lie beside the format's own.
OPERATION_PATHS = {"count_tokens": "/messages/count_tokens", "embeddings": "/embeddings"}

ANTHROPIC_VERSION = "2023-06-01"

# What a client's header is to an upstream of the client's own format; every other one stays here.
_FORWARDED = {
    "openai": frozenset(("openai-beta", "x-request-id", "traceparent")),
    "responses": frozenset(("openai-beta", "x-request-id", "traceparent")),
    "anthropic": frozenset(("anthropic-beta", "anthropic-version", "x-request-id", "traceparent")),
}


def upstream_path(base_path: str, endpoint: str) -> str:
    """The path for `endpoint` ("/messages") under a base URL's path.

    A full endpoint path is used as is, one that ends in a version segment gets the endpoint, any other gets
    /v1 and the endpoint; never /v1/v1 (trap 182).
    """
    base = base_path.rstrip("/")
    if base.endswith(endpoint):
        return base
    base = _FULL_ENDPOINT.sub("", base)
    return base + endpoint if _VERSION_SEGMENT.search(base) else base + "/v1" + endpoint


def make_target(provider: Provider, wire: str) -> Target:
    """The target of a provider for a wire format. RouterError 502 when it has no base URL for that: a model may have
    formats that its provider has not."""
    parts = urlsplit(provider.base_urls.get(wire, ""))  # checked, see check_url
    if not parts.hostname:
        raise RouterError("provider %s has no usable base URL for %s" % (provider.id, wire), 502, "configuration_error")
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    return Target(
        UpstreamKey(parts.scheme, parts.hostname, port, provider.proxy, provider.ca_bundle),
        upstream_path(parts.path, WIRE_FORMATS[wire].path) + ("?" + parts.query if parts.query else ""),
        _fixed_headers(provider, wire, parts.netloc),
        find_compat(as_text(provider.compat), parts.hostname, port),
        secrets_of(provider),
    )


def _fixed_headers(provider: Provider, wire: str, netloc: str) -> Dict[str, Optional[str]]:
    name, value = auth_header(provider, wire)
    told = {
        "host": netloc.rpartition("@")[2],
        "user-agent": "llm-router/" + __version__,
        "accept-encoding": "identity",
        "content-type": "application/json",
        name: value,
        "anthropic-version": provider.anthropic_version if wire == "anthropic" else "",
        "anthropic-beta": ",".join(provider.anthropic_beta) if wire == "anthropic" else "",
    }
    own = {key.lower(): value for key, value in provider.headers.items()}
    return {**{name: value for name, value in told.items() if value}, **own}


def auth_header(provider: Provider, wire: str) -> Tuple[str, str]:
    """The header that shows the provider's key; ("", "") when it has none or wants none."""
    auth = provider.auths[wire]
    if not provider.api_key or auth.type == "none":
        return "", ""
    ways = {"bearer": ("authorization", "Bearer "), "x-api-key": ("x-api-key", "")}
    name, prefix = ways.get(auth.type, (auth.header_name.lower(), auth.prefix))
    return name, prefix + provider.api_key


def choose_wire(candidate: Candidate, client_wire: str) -> str:
    """The format to speak with a candidate: the client's own when it is spoken there, else the provider's preferred."""
    formats, preferred = candidate.formats, candidate.provider.preferred
    return client_wire if client_wire in formats else preferred if preferred in formats else formats[0]


def merge_headers(target: Target, client_headers: Headers, client_wire: str, wire: str, stream: bool) -> Headers:
    """The headers of one upstream request: the target's, and of the client's only what its format allows through."""
    headers = dict(target.headers)
    headers.setdefault("accept", "text/event-stream" if stream else "application/json")
    allowed, betas = _FORWARDED[wire] if client_wire == wire else (), target.compat.betas
    forwarded = [pair for pair in client_headers if pair[0] in allowed and pair[1]]
    dropped = hop_by_hop(client_headers) if forwarded else ()
    for name, value in forwarded:
        if name in dropped:
            continue
        if name == "anthropic-beta":
            asked = [beta for beta in map(str.strip, value.split(",")) if betas is None or betas.match(beta)]
            own = map(str.strip, (headers.get(name) or "").split(","))
            value = ",".join(filter(None, dict.fromkeys([*own, *asked])))
        if value and (name not in headers or name == "anthropic-beta" and headers[name]):
            headers[name] = value
    if wire == "anthropic":
        headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
    return [pair for pair in headers.items() if pair[1] is not None]


_TIMEOUTS = [name.replace("_ms", "_timeout_ms") for name in Timeouts._fields]  # the settings of a streamed answer
_WHOLE_TIMEOUTS = [name.replace("first_byte", "whole_first_byte") for name in _TIMEOUTS]


def resolve_timeouts(provider: Provider, settings: Settings, stream: bool) -> Timeouts:
    """A provider's timeouts in milliseconds, the settings' where it has none of its own; 0 means off."""
    names = _TIMEOUTS if stream else _WHOLE_TIMEOUTS
    return Timeouts(*[getattr(settings, name) if own is None else own for own, name in zip(provider.timeouts, names)])


class Requests:
    """Makes the upstream requests of one inbound request; what two candidates share is computed once.

    The client's own format goes through as it came, with only `model` replaced; for another format the body is
    translated through the neutral form.
    """

    def __init__(
        self, inbound: Inbound, settings: Settings, targets: Targets, lessons: BoundedMap, reasoning: Any, owner: str
    ) -> None:
        self._inbound, self._settings, self._targets, self._lessons = inbound, settings, targets, lessons
        self._reasoning, self._owner = reasoning, owner  # the name of the client's key
        self._neutral: Optional[ChatRequest] = None
        self._conversation = ""
        self.home = ""  # the provider that has what a request refers to

    @property
    def neutral(self) -> ChatRequest:
        """The client's request in the neutral form. RouterError 400 when it is not of its format."""
        if self._neutral is None:
            self._neutral = WIRE_FORMATS[self._inbound.wire].parse_request(self._inbound.body.value)
        return self._neutral

    def issuer(self, provider: str) -> str:
        """The provider in this conversation, which its client and first words tell from others: call ids may recur."""
        if not self._conversation:
            first = ""
            with suppress(RouterError):  # what cannot be read here is passed through all the same
                texts = (join_text(message.blocks) for message in self.neutral.messages if message.role == "user")
                first = next(filter(None, texts), "")
            words = "%s\0%s" % (self._owner, first)
            self._conversation = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()
        return "%s %s" % (provider, self._conversation)

    def make(self, candidate: Candidate) -> Outbound:
        """The request for one candidate."""
        inbound, provider = self._inbound, candidate.provider
        is_chat, thread = inbound.operation == "chat", inbound.body.value.get("thread")
        wire = choose_wire(candidate, inbound.wire) if is_chat else inbound.wire
        place = provider.id, wire, inbound.stream
        if place not in self._targets:
            self._targets[place] = make_target(provider, wire), resolve_timeouts(provider, self._settings, place[2])
        target, timeouts = self._targets[place]
        path = target.path if is_chat else _operation_path(target.path, WIRE_FORMATS[wire].path, inbound.operation)
        if wire != inbound.wire:
            body = dump_json(self._translated(candidate, wire, target.compat))
        else:
            if provider.id != self.home and as_dict(thread).get("type") == "continue":
                refuse_thread(thread)
            body = replace_model(self._passed(candidate, wire, target.compat), candidate.model_id)
        headers = merge_headers(target, inbound.headers, inbound.wire, wire, inbound.stream)
        return Outbound(target, path, headers, body, wire, inbound.stream, timeouts)

    def _passed(self, candidate: Candidate, wire: str, compat: Compat) -> JsonObject:
        """The client's body, without what its upstream is known to refuse and with what it demands."""
        (value, data, _), changed = self._inbound.body, None
        if wire == "anthropic" and compat.signed_thinking:
            changed = drop_thinking(value)
        if wire == "responses" and OWN_REASONING in (data or OWN_REASONING):
            changed = drop_sealed(value, OWN_REASONING.decode())
        if wire == "anthropic" and compat.betas is not None:
            changed = bare_cache_marks(changed or value)
            changed = drop_attribution(changed) or changed
        if wire == "openai" and compat.replays_reasoning:
            changed = replay_reasoning(value, self.issuer(candidate.provider.id), self._reasoning)
        takes_none = wire == "openai" and "no reasoning_content" in compat.fixes
        if takes_none and (changed or not data or b"reasoning_content" in data):
            changed = drop_thoughts(changed or value) or changed
        if wire == "openai" and "strict turns" in compat.fixes:
            changed = strict_turns(changed or value) or changed
        return self._inbound.body if changed is None else JsonObject(changed)

    def _translated(self, candidate: Candidate, wire: str, compat: Compat) -> Json:
        provider = candidate.provider.id
        messages = restore_reasoning(self.neutral.messages, self._reasoning, lambda: self.issuer(provider))
        lessons, asked = self._lessons.get(candidate.ref) or (), self.neutral.max_tokens
        learned = (int(name.split()[2]) for name in lessons if name not in FIXES)  # "at most 8192 tokens"
        most = min(filter(None, (candidate.model.max_output_tokens, *learned)), default=0)
        if most and (asked or wire == "anthropic"):  # which demands a limit
            asked = min(asked or most, most)
        request = self.neutral._replace(model=candidate.model_id, messages=messages, max_tokens=asked)
        request = keep_switch(request) if compat.switches and wire == "openai" else request
        body = render_request(keep_cache_marks(request) if compat.caches and wire == "openai" else request, wire)
        return apply_fixes(body, compat.fixes + lessons)


def _operation_path(path: str, own: str, operation: str) -> str:
    bare, question, query = path.partition("?")
    return bare[: len(bare) - len(own)] + OPERATION_PATHS[operation] + question + query


# ==============================================================================
# 17 OUTCOMES - status, headers and body of an upstream's answer: what they mean [pure]
# ==============================================================================

OK = "ok"
RATE_LIMITED = "rate_limited"
TEMPORARY = "temporary"
TIMEOUT = "timeout"
EMPTY = "empty"
BILLING = "billing"
AUTH = "auth"
FORBIDDEN = "forbidden"
NOT_FOUND = "not_found"
POLICY = "policy"
INVALID = "invalid"
OVERFLOW = "context_overflow"


class Outcome(NamedTuple):
    """What one attempt came to. kind: one of the words above. status: the upstream's, 0 when it gave none.

    label: short for logs and headers (`429`, `timeout`, `refused`). error: the error in words. retry_after: seconds
    until the upstream wants to be asked again, None when it did not say. headers, body: of the upstream's answer, so
    that it can be returned unchanged; body is None when there was none.
    """

    kind: str
    status: int = 0
    label: str = ""
    error: ErrorInfo = ErrorInfo(502, "")
    retry_after: Optional[float] = None
    headers: Tuple[Tuple[str, str], ...] = ()
    body: Optional[bytes] = None
    wire: str = ""


# (kind, statuses, patterns): an error of these statuses whose words match one is of that kind; the first row wins.
# Words are the lower-cased codes, types and messages of the error, one a line; those here are of the vendors'
# documentation and of errors that users pasted in public threads (traps 123, 128, 144, 155).
SIGNALS: Tuple[Tuple[str, Tuple[int, ...], Texts], ...] = (
    # What a provider no longer keeps says nothing about its model; the SDKs mend it.
    (INVALID, (400, 404), (r"^(?:thread|previous_response)_(?:not_found|unsupported_request)$|item with id",)),
    (RATE_LIMITED, (413,), (r"tokens? per (?:min|minute|day)", r"\btp[md]\b", r"rate_limit")),
    # Gemini words its windows like an account without credit (ai.google.dev, Rate limits).
    (RATE_LIMITED, (429,), (r"quota exceeded for (?:quota )?metric", r"please retry in \d")),
    (OVERFLOW, (400, 403, 413, 422), (  # 403: Together
        r"maximum (?:context|prompt|model) length|context length of only",
        r"context[_ ](?:size|length|window)[^\n]{0,40}exceed",
        r"exceed(?:s|ed)?[^\n]{0,40}context[_ ](?:size|length|window|limit)",
        r"exceed(?:s|ed)? (?:max length|max message tokens|model token limit|the max_model_len)",
        r"(?:prompt|input) (?:is|tokens) too long",
        r"input (?:length|tokens)[^\n]{0,80}exceed|range of input length",
        r"(?:longer|greater|less) than the (?:model's )?context",
        r"\bmax_(?:seq|input)_len\b|contextwindowexceeded",  # TensorRT-LLM, SiliconFlow; LiteLLM
        r"token count[^\n]{0,20} exceeds|token count is [\d,]+ but|exceeds the maximum number of tokens",
        r"max_new_tokens` must be <=|`inputs` must have less than|number of tokens in the prompt cannot exceed",
        r"reduce the length of the (?:messages|input|prompt)",
        r"^(?:tokens_limit_reached|1261)$",  # GitHub Models, z.ai
    )),
    (BILLING, (500,), (r"insufficient balance \(1008\)",)),  # MiniMax-AI/MiniMax-M2#62
    (BILLING, (400, 402, 403, 412, 429), (  # 412: Fireworks, of an account that is suspended
        r"insufficient[_ ](?:user_)?(?:quota|balance|credits?|funds)",
        r"pre_consume_token_quota_failed|quota is not enough|credit limit is insufficient|额度不足",  # new-api, one-api
        r"balance is (?:too low|insufficient)|balance[_ ]not[_ ]enough|not[_ ]enough[_ ]balance",
        r"exceeded(?: your|_)?[_ ]current[_ ]quota",
        r"billing_(?:error|hard_limit|not_active)",
        r"arrearage|accountoverdueerror|account not in good standing",
        r"(?:requires more|used all available|doesn't have any) credits|credits are depleted",
        r"extra usage, not your plan|out of extra usage",  # a Claude subscription (anthropics/claude-code#45048)
        r"please recharge|freetieronly|free allocation|spend(?:ing)? limit",
        r"specified (?:api |workspace )*usage limits|usage limit for this billing",
        r"(?:key|credit) limit exceeded|budget (?:has been )?exceeded",
        r"^(?:1113|1309)$",  # z.ai
    )),
    (POLICY, (400, 403, 451), (
        r"content_filter|responsibleaipolicyviolation",
        r"content[_ ](?:(?:management|filtering) )?policy",
        r"usage (?:polic(?:y|ies)|guidelines)",
        r"safety[_ ](?:system|filter|settings|policy|check)",
        r"flagged|moderation|data_inspection_failed|limited access to this content",
        r"prohibited_content|inappropriate content|content exists risk|sensitivecontentdetected",
        r"^1301$",  # z.ai
    )),
    (AUTH, (400, 403), (
        r"(?:invalid|incorrect)[_ ]?api[_ -]?key|invalid access token",
        r"api[_ ]key[_ ](?:not valid|not found|invalid|expired|was reported)",
        r"(?:authentication|authorization)[_ ](?:error|failed)|bearer token has expired|security token",
        r"invalid (?:authentication|authorization|x-api-key)|oauth token has been revoked",
        r"organization_restricted|organization has been disabled",
    )),
    (FORBIDDEN, (400,), (
        r"location is not supported|free tier is not available in",  # Gemini
        r"model_terms_required",  # Groq
        r"not allowed from unsupported countries",  # Bedrock, of Anthropic's models
        r"not allowed to use publisher model",  # Vertex AI
        r"organization must be verified (?!to generate reasoning summaries)",  # OpenAI; those are left out (FIXES)
    )),
    (NOT_FOUND, (400, 403, 422), (
        r"model[_ ]not[_ ](?:found|exist)|model_not_(?:supported|available)",
        r"(?:unknown|no such|unavailable)[_ ]model|(?:invalid|unsupported)[_ ]model(?:$|:| name| id| ['\"`])",
        r"model is unavailable|model ['\"`]?[^\s'\"`]+['\"`]? not found",
        r"\bmodel[^\n]{0,120}(?:does not exist|is not (?:found|available|a valid|supported for task)|decommissioned)",
        r"not a valid model|deploymentnotfound",
        r"model identifier is invalid|invocation of model id[^\n]{0,120} with on-demand throughput",  # Bedrock
        r"model is not supported when using codex|does not work with the specified model",  # ChatGPT, Azure
        r"^unsupported_api_for_model$",  # GitHub Copilot
        r"^1211$",  # z.ai
    )),
    (TEMPORARY, (400,), (  # what failed behind an aggregator or inside, which blames the request (trap 128)
        r"upstream request failed|failed to get response from provider",  # OpenCode Zen, Cloudflare AI Gateway
        r"^provider returned error\n400\nerror$|no models provided",  # OpenRouter
        r"temporarily unavailable|暂时无法使用",
        r"degraded function cannot be invoked",  # NVIDIA
        r"the model has crashed|model (?:is )?unloaded",  # LM Studio
    )),
)  # fmt: skip

_STATUS_KINDS: Dict[int, str] = {
    401: AUTH, 402: BILLING, 403: FORBIDDEN, 404: NOT_FOUND, 408: TEMPORARY, 409: TEMPORARY, 410: NOT_FOUND,
    407: FORBIDDEN, 424: TEMPORARY,  # of the proxy before the upstream; TGI, when generation failed
    425: TEMPORARY, 429: RATE_LIMITED, 451: POLICY, 498: TEMPORARY,  # 498: Groq, no capacity left in its flex tier
}  # fmt: skip
_CLASS_KINDS: Dict[int, str] = {3: NOT_FOUND, 4: INVALID, 5: TEMPORARY}

# Errors inside a 200 carry no HTTP status: their type or code tells it, else their words do, read as a 400's. Anything
# but these is temporary.
_IN_BAND_KINDS = (RATE_LIMITED, BILLING, AUTH, POLICY, OVERFLOW)

# Keys of an error body whose text says what went wrong. Never those that echo the client's own words back.
_TELLING_KEYS = (
    "error errors message msg type code status reason detail details innererror error_type metadata raw title"
    " error_code previous_errors Message"
).split()


def error_words(body: Any) -> List[str]:
    """The telling strings of an error body, JSON inside strings unwrapped (trap 124), outermost first."""
    return [word for (_, word), _ in zip(_members(body, 12, _TELLING_KEYS), range(40))]


def _members(value: Any, depth: int, keys: Optional[Sequence[str]] = None, name: str = "") -> Iterable[Tuple[str, str]]:
    """Names and values of what a body says, under `keys` only where they are given, JSON inside strings included."""
    parts: Json = {}
    if isinstance(value, dict):
        parts = value if keys is None else {key: value[key] for key in keys if key in value}
    elif isinstance(value, list):
        parts = {str(at): part for at, part in enumerate(value[:8])}
    elif isinstance(value, str):
        before, inner, after = _split_json(value)
        yield name, (before + after)[:2000]
        parts = {name: inner}
    elif type(value) in (int, float):
        yield name, str(value)[:20]
    for key, part in parts.items() if depth > 1 else ():
        yield from _members(part, depth - 1, keys, key.lower())


def _split_json(text: str) -> Tuple[str, Any, str]:
    """What stands before, in and after the JSON object inside a text, whose own text may echo the client's words."""
    start, end = text.find("{"), text.rfind("}") + 1
    inner = try_json(text[start:end]) if start >= 0 and len(text) <= 100_000 else None
    return (text, None, "") if inner is None else (text[:start], inner, text[end:])


def kind_of(status: int, words: Sequence[str]) -> str:
    """The kind of an error answer: by the first signal whose words match, else by its status."""
    text = "\n".join(words).lower()
    for kind, statuses, patterns in SIGNALS:
        if status in statuses and re.search("(?m)" + "|".join(patterns), text):
            return kind
    return _STATUS_KINDS.get(status) or _CLASS_KINDS.get(status // 100, TEMPORARY)


def judge_error(wire: str, status: int, headers: Headers, body: bytes, now: float) -> Outcome:
    """The outcome of an answer whose status is not 2xx. now: Unix seconds, for dates in headers and bodies."""
    parsed = parse_body(body)
    words = error_words(parsed)
    info = read_error(status, parsed)
    wait, kind = read_retry_after(headers, words, parsed, now), kind_of(status, words)
    info = info._replace(code=OVERFLOW_CODE) if kind == OVERFLOW else info
    return Outcome(kind, status, str(status), info, wait, tuple(headers), body, wire)


def judge_in_band(info: ErrorInfo, headers: Headers, wire: str, now: float) -> Outcome:
    """The outcome of an error that came inside a 200: a first event, or a body that is an error."""
    words = [word for word in (info.type, info.code, info.message) if word]
    status = ERROR_STATUSES.get(info.code) or ERROR_STATUSES.get(info.type, 0)
    status = status or (int(info.code) if re.fullmatch(r"[45][0-9][0-9]", info.code) else 0)
    kind, wait = kind_of(status or 400, words), read_retry_after([], words, None, now)
    kind = kind if kind in _IN_BAND_KINDS else TEMPORARY
    label = "200:" + re.sub("[ ,]", "_", one_line(info.code or info.type or "error", 40))
    info = info._replace(code=OVERFLOW_CODE) if kind == OVERFLOW else info
    return Outcome(kind, status or 502, label, info, wait, tuple(headers), None, wire)


def failed_attempt(kind: str, label: str, message: str) -> Outcome:
    """The outcome of an attempt without an answer: refused, reset, timed out, truncated, unparsable."""
    return Outcome(kind, 0, label, ErrorInfo(504 if kind == TIMEOUT else 502, message))


def parse_body(body: bytes) -> Any:
    """An error body as JSON, else as text; an HTML page as its title or first words."""
    try:
        return load_json(body[:1_000_000])
    except RouterError:
        text = body[:20_000].decode("utf-8", "replace")
    if "<html" in text[:2000].lower() or text[:9].lower() == "<!doctype":
        title = re.search(r"<title[^<>]*>([^<]*)", text, re.IGNORECASE)
        words = title.group(1) if title else re.sub(r"<[^<>]*>", " ", text)
        return "HTML page: %s" % one_line(" ".join(words.split()), 120)
    return text


# --- when to ask again ---

MAX_RETRY_AFTER_S = 86_400.0

_DURATION = r"(\d+(?:\.\d+)?)\s*(ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?|d|days?)(?![a-z])"
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TRY_AGAIN = (
    r"(?:(?:try again|retry|available again|reset)[^\n]{0,40}?(?:in|after)|please wait)\s+"
    r"((?:\d+(?:\.\d+)?\s*[a-z]+[\s,]*(?:and\s+)?){1,4})"
)
_RESET_AT = (
    r"(?:reset[^\n]{0,30}?(?:at|on)\s+|将在\s*)(\d{4}-\d\d-\d\d[t ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?)(z|[+-]\d\d:?\d\d)?"
)
# Every answer to a Claude subscription tells when windows of hours and days end; `-status` whether one is used up, and
# `-reset` when that is over (Claude Code gateway protocol, Usage-limit headers).
_UNIFIED = "anthropic-ratelimit-unified-"
_DELAYS = "retry-after retrydelay retry_after retry_after_seconds retryafter retry_after_s resets_in_seconds resets_at"


def read_retry_after(headers: Headers, words: Sequence[str], body: Any, now: float) -> Optional[float]:
    """Seconds to wait as the upstream says it, in any of the forms seen; None when it does not. Capped at 24 hours.

    Headers first: retry-after-ms (OpenAI, Azure; 0 with a retry-after beside it means the latter), Retry-After
    (seconds, fractions or an HTTP date, RFC 9110 10.2.3), then the reset of an exhausted x-ratelimit or
    anthropic-ratelimit window; then the same in the body's members, where they have further names and OpenRouter nests
    the provider's headers; then "try again in 9m38s" in its words.
    """
    waits = _from_members(headers, now), _from_members(_members(body, 12), now), _from_words(words, now)
    seconds = next((wait for wait in waits if wait is not None), None)
    return None if seconds is None else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _from_members(members: Iterable[Tuple[str, str]], now: float) -> Optional[float]:
    told = dict(reversed(list(members)))  # the first of a name counts
    waits = (_read_wait(told[name], now) for name in _DELAYS.split() if name in told)
    seconds = next((wait for wait in waits if wait is not None), None)
    milliseconds = _number(told.get("retry-after-ms", ""))
    if milliseconds is not None and (milliseconds > 0 or seconds is None):
        return milliseconds / 1000.0
    if seconds is None:
        resets = [name for name in told if "ratelimit" in name and "reset" in name and not name.startswith(_UNIFIED)]
        spent = [name for name in resets if _number(told.get(name.replace("reset", "remaining")) or "0") == 0]
        spent += [] if told.get(_UNIFIED + "status", "allowed").startswith("allowed") else [_UNIFIED + "reset"]
        waits = (_read_wait(told.get(name, ""), now) for name in spent)
        seconds = max((wait for wait in waits if wait is not None), default=None)
    return seconds


def _read_wait(text: str, now: float) -> Optional[float]:
    """Seconds from a number of them, a duration, or a moment: a date or Unix time, in milliseconds too (OpenRouter)."""
    number = _number(text)
    if number is None:
        seconds = read_duration(text[:100])  # what is longer is no time, and might cost one
        return _seconds_until(text[:100], now) if seconds is None else seconds
    number = number / 1000.0 if number > 1e11 else number
    return number - now if number > 1e9 else number


def _from_words(words: Sequence[str], now: float) -> Optional[float]:
    for word in words:
        match, at = (re.search(pattern, word.lower()) for pattern in (_TRY_AGAIN, _RESET_AT))
        seconds = read_duration(match.group(1)) if match else None
        if seconds is None and at:
            stamp, zone = at.groups("")  # z.ai leaves it out and means Beijing's (can1357/oh-my-pi#11014)
            waits = [_seconds_until(stamp + one, now) for one in ([zone] if zone else ["+08:00", ""])]
            seconds = next((wait for wait in waits if wait is not None and wait > 0), waits[-1])
        if seconds is not None:
            return seconds
    return None


def read_duration(text: str) -> Optional[float]:
    """Seconds from `9m38.016s`, `17.5s`, `6ms`, `2 hours`; None when there is no unit."""
    parts = re.findall(_DURATION, text.lower())
    units = (1e-3 if unit.startswith(("ms", "mil")) else _UNIT_S[unit[0]] for _, unit in parts)
    return sum(float(number) * unit_s for (number, _), unit_s in zip(parts, units)) if parts else None


def _number(text: str) -> Optional[float]:
    return float(text) if re.fullmatch(r"[ \t]*-?[0-9]{1,40}(?:\.[0-9]{1,40})?[ \t]*", text) else None


def _seconds_until(text: str, now: float) -> Optional[float]:
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime  # late: only dates need it

    text = text.strip()
    try:
        if re.match(r"\d{4}-", text):
            iso = re.sub(r"\.\d+", "", text.upper().replace(" ", "T", 1))
            moment = datetime.fromisoformat(iso.replace("Z", "+00:00"))
        else:
            moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() - now


# ==============================================================================
# 18 FALLBACK - what to do next after each outcome, clock and dice passed in [pure]
# ==============================================================================
#
# `begin` and `follow` decide, the gateway does. Health is read from a book that a host keeps and changed by the
# HealthChanges they return, so that the book can live in this process, in an isolate, or in a shared store.


class Health(NamedTuple):
    """What is remembered of one model (key `provider/model`) or one provider (key `provider/`).

    cooldown_until, circuit_until: seconds of the host's monotonic clock; circuit_until 0 means closed, in the future
    open, in the past half-open. failures: consecutive ones, counted once a request. probe: the request that has the
    half-open slot. reason: the kind of the last failure, failed_at: its moment.
    """

    cooldown_until: float = 0.0
    circuit_until: float = 0.0
    failures: int = 0
    reason: str = ""
    probe: str = ""
    failed_at: float = 0.0


HEALTHY = Health()


class HealthChange(NamedTuple):
    """One change to the book. Behind the key stand the fields of Health; one that is None stays what it is, and a
    cooldown never shortens an older one.

    frees: the request whose half-open slot is free again, if it still has it. clear: all good again, unless it failed
    after the moment `at`: an answer to a call that was made before a failure says nothing about the time after it.
    """

    key: str
    cooldown_until: Optional[float] = None
    circuit_until: Optional[float] = None
    failures: Optional[int] = None
    reason: Optional[str] = None
    probe: Optional[str] = None
    frees: str = ""
    clear: bool = False
    at: float = 0.0


class HealthBook:
    """Health by key, in memory. `read` and `apply` are its whole interface, so that a shared store can replace it.

    At most `limit` keys: a model `*` lets clients make up names, the oldest entries give way.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._entries: Dict[str, Health] = {}
        self._renewed: Dict[str, float] = {}
        self._limit = limit

    def read(self, key: str) -> Health:
        """The health of a key; HEALTHY when nothing is remembered."""
        return self._entries.get(key, HEALTHY)

    def apply(self, changes: Iterable[HealthChange], since: float = math.inf) -> None:
        """Carry out changes, in order. since: when the request began that brings them."""
        for change in changes:
            if since < self._renewed.get(change.key.partition("/")[0], 0.0):
                continue
            changed = changed_health(self._entries.pop(change.key, HEALTHY), change)
            if changed != HEALTHY:
                self._entries[change.key] = changed  # the newest now
        while len(self._entries) > self._limit:
            del self._entries[next(iter(self._entries))]

    def renew(self, providers: Sequence[str], now: float) -> None:
        """Forget what is known of providers that were configured anew, and what older requests still bring of them."""
        self._renewed.update(dict.fromkeys(providers, now))
        for key in self.known():
            if key.partition("/")[0] in providers:
                del self._entries[key]

    def known(self) -> List[str]:
        """The keys that something is remembered of."""
        return list(self._entries)


def changed_health(health: Health, change: HealthChange) -> Health:
    """`health` after `change`. The later of two cooldowns stands (trap 147)."""
    if change.clear:
        return health if health.failed_at > change.at else HEALTHY
    told = {name: new for name, new in zip(Health._fields, change[1:6]) if new is not None}
    if change.frees and change.frees == health.probe:
        told.setdefault("probe", "")
    told["cooldown_until"] = max(health.cooldown_until, change.cooldown_until or 0.0)
    return health._replace(failed_at=max(health.failed_at, change.at), **told)


class HealthAfter(NamedTuple):
    """A book as it will be after `changes`, read without changing it."""

    book: Any
    changes: Sequence[HealthChange]

    def read(self, key: str) -> Health:
        """The health of a key after the changes."""
        health: Health = self.book.read(key)
        for change in self.changes:
            health = changed_health(health, change) if change.key == key else health
        return health


class Attempt(NamedTuple):
    """One call to an upstream, for the trail. wait_ms: the delay before it; decision: what followed."""

    ref: str
    wire: str
    label: str
    kind: str
    wait_ms: int
    took_ms: int
    decision: str
    message: str = ""


class Try(Value):
    """Action: send the request to `candidate` after `delay_ms`."""

    __slots__ = ("candidate", "delay_ms")

    def __init__(self, candidate: Candidate, delay_ms: int) -> None:
        self.candidate, self.delay_ms = candidate, delay_ms


class Deliver(Value):
    """Action: the answer that `outcome` brought is the client's answer."""

    __slots__ = ("outcome",)


class GiveUp(Value):
    """Action: nobody could serve; `outcome` decides the status. retry_after: seconds to the soonest
    recovery, None: never soon."""

    __slots__ = ("outcome", "retry_after")
    defaults = (None,)


class Run(NamedTuple):
    """How far one request has come, under these settings.

    remaining: candidates not tried yet, in the plan's order; tries: attempts at `current` so far, of `allowed`;
    accepts_empty: an empty answer is as good as any; first: the origin's last outcome; last: the last outcome of all;
    blamed: providers whose key or account failed; counted: refs whose circuit was counted; probes: refs whose
    half-open slot this request holds; waited_ms: spent waiting for a cooling candidate; fenced: a policy block keeps
    it inside one provider; until: when its total time is up, and nobody is asked any more.
    """

    id: str
    plan: Plan
    settings: Settings
    remaining: Tuple[Candidate, ...]
    accepts_empty: bool = False
    current: Optional[Candidate] = None
    tries: int = 0
    allowed: int = 1
    first: Optional[Outcome] = None
    last: Optional[Outcome] = None
    blamed: Texts = ()
    counted: Texts = ()
    probes: Texts = ()
    waited_ms: int = 0
    fenced: bool = False
    until: float = math.inf


Step = Tuple[Run, Any, List[HealthChange]]


class Rule(NamedTuple):
    """A row of RULES: what an outcome of a kind leads to.

    retries: the origin may be tried again. falls_back: "all", "provider" (only inside the same provider) or "no".
    cooldown: the setting that names its length, "" for what says nothing of health. comes_back: waiting helps, and a
    Retry-After counts instead. blames: it is the provider's as a whole, other providers go first from here on. counts:
    it counts for the circuit.
    """

    retries: bool = False
    falls_back: str = "all"
    cooldown: str = ""
    comes_back: bool = False
    blames: bool = False
    counts: bool = False


RULES: Dict[str, Rule] = {
    RATE_LIMITED: Rule(cooldown="origin_rate_limit_cooldown_ms", comes_back=True),
    TEMPORARY: Rule(True, cooldown="origin_fallback_cooldown_ms", comes_back=True, counts=True),
    TIMEOUT: Rule(cooldown="origin_fallback_cooldown_ms", comes_back=True, counts=True),
    EMPTY: Rule(),
    BILLING: Rule(cooldown="origin_billing_cooldown_ms", blames=True),
    AUTH: Rule(cooldown="origin_auth_cooldown_ms", blames=True),
    FORBIDDEN: Rule(cooldown="origin_auth_cooldown_ms"),
    NOT_FOUND: Rule(cooldown="origin_fallback_cooldown_ms"),
    POLICY: Rule(falls_back="provider"),
    INVALID: Rule(falls_back="no"),
    OVERFLOW: Rule(falls_back="no"),
}
_ALLOWED_POLICY = Rule(cooldown="origin_policy_cooldown_ms")


def rule_for(kind: str, settings: Settings) -> Rule:
    """The rule for an outcome's kind under these settings."""
    return _ALLOWED_POLICY if kind == POLICY and settings.allow_policy_fallback else RULES[kind]


def provider_key(candidate: Candidate) -> str:
    """The key under which a candidate's provider stands in the health book."""
    return candidate.provider.id + "/"


def ready_at(candidate: Candidate, book: Any) -> float:
    """When a candidate is out of every cooldown and its circuit no longer open, on the host's clock; 0.0: never
    cooled."""
    health = book.read(candidate.ref)
    return max(health.cooldown_until, health.circuit_until, book.read(provider_key(candidate)).cooldown_until)


def is_half_open(candidate: Candidate, book: Any, now: float) -> bool:
    """Whether the candidate's circuit had opened and may be probed now."""
    return book.read(candidate.ref).circuit_until > 0 and ready_at(candidate, book) <= now


def begin(id: str, plan: Plan, settings: Settings, book: Any, now: float) -> Step:
    """The first step of a request. id: the request's, unique."""
    total_s = settings.total_timeout_ms / 1000.0 or math.inf
    return _next_candidate(Run(id, plan, settings, plan, until=now + total_s), book, now)


def follow(run: Run, outcome: Outcome, book: Any, now: float, jitter: float) -> Step:
    """The step after an attempt that brought no answer for the client. jitter: 0 to 1.

    The changes that this outcome makes count for the order of what comes next.
    """
    candidate, rule = run.current, rule_for(outcome.kind, run.settings)
    first = outcome if candidate is run.plan[0] else run.first
    run = run._replace(last=outcome, first=first, tries=run.tries + 1)
    if outcome.kind == EMPTY and run.accepts_empty:
        return _end(run, Deliver(outcome))
    delay_ms = backoff_ms(run.tries, run.settings, jitter)
    cools_until = ready_at(candidate, book) if run.remaining else 0.0  # other requests may have cooled it meanwhile
    back_at = max(now + (outcome.retry_after or 0.0), cools_until)
    if rule.retries and run.tries < run.allowed and back_at <= now + delay_ms / 1000.0 < run.until:
        return run, Try(candidate, delay_ms), []
    is_cut_short = outcome.kind == TIMEOUT and now >= run.until and len(run.remaining) + 1 < len(run.plan)
    held_against_it = EMPTY if is_cut_short else outcome.kind  # nothing, when others had used up its time
    changes = _changes(run, held_against_it, outcome.retry_after, book, now)
    run = run._replace(
        remaining=_still_to_ask(run, outcome.kind, rule),
        blamed=run.blamed + (candidate.provider.id,) if rule.blames else run.blamed,
        counted=run.counted + (candidate.ref,) if rule.counts else run.counted,
        probes=tuple(ref for ref in run.probes if ref != candidate.ref),
        fenced=run.fenced or rule.falls_back == "provider",
    )
    run, action, more = _next_candidate(run, HealthAfter(book, changes), now)
    return run, action, changes + more


def _still_to_ask(run: Run, kind: str, rule: Rule) -> Tuple[Candidate, ...]:
    """Who may be asked after `current`. When the origin refuses the request itself, nobody; or larger ones, when it is
    just too long and they may try: all of them, when nobody said how large the origin is."""
    current = run.current
    if rule.falls_back == "provider":
        return tuple(c for c in run.remaining if c.provider.id == current.provider.id)
    if rule.falls_back == "all" or current is not run.plan[0]:
        return run.remaining
    if kind != OVERFLOW or not run.settings.context_fallback:
        return ()
    limit = current.model.context_window
    return tuple(c for c in run.remaining if limit is None or (c.model.context_window or 0) > limit)


def _changes(run: Run, kind: str, retry_after: Optional[float], book: Any, now: float) -> List[HealthChange]:
    """What leaving `current` after an outcome writes into the book."""
    ref, settings, rule = run.current.ref, run.settings, rule_for(kind, run.settings)
    changes = [HealthChange(ref, frees=run.id)] if ref in run.probes else []
    seconds = getattr(settings, rule.cooldown) / 1000.0 if rule.cooldown else 0.0
    if rule.comes_back and retry_after is not None:
        seconds = retry_after
    elif rule.counts and len(run.plan) == 1:
        seconds = 0.0  # "once the router had to fall back": an only candidate is left in its place
    if seconds > 0:
        key = provider_key(run.current) if rule.blames else ref
        changes.append(HealthChange(key, cooldown_until=now + seconds, reason=kind, at=now))
    threshold, open_s = settings.fallback_circuit_failures, settings.fallback_circuit_cooldown_ms / 1000.0
    if rule.counts and threshold > 0 and open_s > 0 and ref not in run.counted:
        failures = book.read(ref).failures + 1
        opens = now + open_s if failures >= threshold else None
        changes.append(HealthChange(ref, failures=failures, circuit_until=opens, reason=kind, at=now))
    return changes


def _first_of(run: Run, book: Any, now: float) -> Candidate:
    """Who is tried next of those that remain: the first that is ready, else who is back soonest.

    None is ever left out: when everything cools, somebody still answers (traps 151, 166). A half-open one keeps its
    place for the request that probes it and goes behind the ready ones for others.
    """

    def rank(candidate: Candidate) -> Tuple[int, float]:
        until = ready_at(candidate, book)
        is_blamed = candidate.provider.id in run.blamed
        if is_blamed or until > now:
            return 2 + is_blamed, until
        probed = book.read(candidate.ref).probe not in ("", run.id)
        return int(probed and is_half_open(candidate, book, now)), 0.0

    return min(run.remaining, key=rank)


def _next_candidate(run: Run, book: Any, now: float) -> Step:
    if not run.remaining or now >= run.until:
        return _exhausted(run, book, now)
    candidate, others = run.remaining[0], run.remaining[1:]
    ready = ready_at(candidate, book)
    if ready or run.blamed:  # else nothing was ever held against it: it goes first, whatever the others are like
        candidate = _first_of(run, book, now)
        ready, others = ready_at(candidate, book), tuple(c for c in run.remaining if c is not candidate)
    half_open = ready > 0 and is_half_open(candidate, book, now)
    is_steady = candidate is run.plan[0] and ready <= now and not half_open
    delay_ms = _wait_ms(ready, run, now) if ready > now else 0
    probes = (candidate.ref,) if half_open and not book.read(candidate.ref).probe else ()
    run = run._replace(
        current=candidate,
        tries=0,
        allowed=run.settings.origin_retry_attempts if is_steady else 1,
        remaining=others,
        probes=run.probes + probes,
        waited_ms=run.waited_ms + delay_ms,
    )
    return run, Try(candidate, delay_ms), [HealthChange(ref, probe=run.id) for ref in probes]


def _wait_ms(ready: float, run: Run, now: float) -> int:
    """How long to wait for a candidate that cools, when that is short enough to be worth it."""
    wait_ms, left_s = math.ceil((ready - now) * 1000), run.until - now
    return wait_ms if 0 < wait_ms <= min(run.settings.retry_after_wait_ms - run.waited_ms, left_s * 1000 - 1) else 0


def _exhausted(run: Run, book: Any, now: float) -> Step:
    outcome = run.first or run.last
    rule, retry_after = RULES[outcome.kind], None
    if not rule.cooldown:
        return _end(run, Deliver(outcome))
    if rule.comes_back:
        cooling = [candidate for candidate in run.plan if ready_at(candidate, book) > now]
        soonest = min(cooling, key=lambda candidate: ready_at(candidate, book), default=None)
        back_at = now if soonest is None else ready_at(soonest, book)
        may_wait = len(cooling) == len(run.plan) and not run.fenced and not run.waited_ms
        if may_wait and _wait_ms(back_at, run, now):
            return _next_candidate(run._replace(remaining=(soonest,)), book, now)
        retry_after = max(1.0, back_at - now)
    return _end(run, GiveUp(outcome, retry_after))


def _end(run: Run, action: Any) -> Step:
    return run._replace(probes=()), action, release(run)


def release(run: Run) -> List[HealthChange]:
    """The changes that free every half-open slot the request holds: for a client that left, and for every end."""
    return [HealthChange(ref, frees=run.id) for ref in run.probes]


def proceed(run: Run, asked_at: float, book: Any) -> List[HealthChange]:
    """The changes once `current` streams content: its circuit closes. What counts toward opening it stays until the
    answer is complete, or an upstream that breaks off every stream would look well at each start."""
    health = book.read(run.current.ref)
    closes = health.circuit_until and health.failed_at <= asked_at
    return release(run) + ([HealthChange(run.current.ref, circuit_until=0.0)] if closes else [])


def succeed(run: Run, asked_at: float, book: Any) -> List[HealthChange]:
    """The changes after `current` answered a call made at `asked_at` in full: nothing is held against it or its
    provider."""
    keys = [key for key in (run.current.ref, provider_key(run.current)) if book.read(key) is not HEALTHY]
    return release(run) + [HealthChange(key, clear=True, at=asked_at) for key in keys]


def fail_late(run: Run, outcome: Outcome, book: Any, now: float) -> List[HealthChange]:
    """The changes after `current` failed when content had reached the client already: it cools and is counted, as if
    it had failed before, though nothing can be tried in its place any more."""
    return _changes(run, outcome.kind, outcome.retry_after, book, now) + release(run)


def backoff_ms(retry: int, settings: Settings, jitter: float) -> int:
    """The delay before retry number `retry` (1, 2, ...): base * 2^(retry-1), at most max, times 0.5 to 1."""
    delay = min(settings.origin_retry_base_delay_ms * 2 ** min(retry - 1, 30), settings.origin_retry_max_delay_ms)
    return int(delay * (0.5 + 0.5 * jitter))


# ==============================================================================
# 19 SCREENS - the menu as values: what it shows, and what each key does [pure]
# ==============================================================================
#
# update(menu, event) -> (menu, effect). An event is the name of a key ("a", "up", "enter"), what was Pasted, or what
# the host Told after an effect. Screens lie on one another, each a row of SCREENS with its keys; a key gets the menu
# and the item of the selected row. A dialog is a screen that knows how to go on (`then`) with what it was told.


class Row(NamedTuple):
    """A line that can be selected. cells: its columns. item: what the keys of its screen work on, None for nothing.
    state: ok, off, warning, error or ""."""

    cells: Texts
    item: Any = None
    hint: str = ""
    state: str = ""


class Frame(NamedTuple):
    """An open screen, a row of SCREENS. at: the selected row, the first line of a text, or the caret. place: what of
    the document it shows. rows, lead, typed, hidden, picked, then, serial: of a dialog."""

    screen: str
    title: str = ""
    place: Place = ()
    at: int = 0
    filter: str = ""
    rows: Tuple[Row, ...] = ()
    lead: str = ""
    typed: str = ""
    hidden: bool = False
    picked: Texts = ()
    then: Any = None
    serial: int = 0


class Facts(NamedTuple):
    """What the host knows. path: of the file. variables: names in the environment. settings: of settings_table."""

    path: str = ""
    variables: Iterable[str] = ()
    settings: Sequence[Json] = ()


class Effect(Value):
    """What the host is to do: a name in its table, the arguments, and the serial that its answer must bear."""

    __slots__ = ("kind", "args", "serial")
    defaults = ((), 0)


class Told(Value):
    """How an effect ended, or how far it is: `value`, or `error` as a sentence."""

    __slots__ = ("serial", "value", "error", "is_progress")
    defaults = (None, "", False)


class Pasted(Value):
    """Text that came at once: it is no key, nor are its line breaks."""

    __slots__ = ("text",)


class Menu(NamedTuple):
    """The whole menu. saved: the document of the file. past: those to go back to. scanned: what `_scan` found last."""

    facts: Facts
    saved: Json
    document: Json
    frames: Tuple[Frame, ...] = (Frame("home"),)
    past: Tuple[Json, ...] = ()
    note: str = ""
    is_error: bool = False
    effect: Optional[Effect] = None
    serial: int = 0
    scanned: Tuple[Any, Any] = (None, None)

    @property
    def front(self) -> Frame:
        """The screen that is seen."""
        return self.frames[-1]

    @property
    def is_unsaved(self) -> bool:
        """Whether anything differs from the file."""
        return self.document != self.saved


class Screen(NamedTuple):
    """A kind of screen. rows: made of the menu; a dialog brings its own. keys: "name word" (no word where it goes
    without saying) to the action on the selected row's item. kind: list, pick, input, text or busy."""

    title: str = ""
    rows: Optional[Callable[[Menu], List[Row]]] = None
    keys: Dict[str, Callable[[Menu, Any], Menu]] = {}
    lead: str = ""
    empty: str = ""
    kind: str = "list"


def make_menu(document: Json, facts: Facts) -> Menu:
    """The menu over a document as it was read from the file."""
    return Menu(facts, document, document)


def update(menu: Menu, event: Any) -> Tuple[Menu, Optional[Effect]]:
    """What becomes of the menu, and what the host is to do."""
    is_told = isinstance(event, Told)
    if is_told and event.serial != menu.front.serial:
        return menu, None  # of something that was stopped
    if is_told and event.is_progress:
        return _swap(menu, lead=event.value), None
    before = _pop(menu) if is_told else menu if event == "tick" else menu._replace(note="", is_error=False)
    try:
        if is_told and event.error:
            raise UsageError(event.error)
        new = menu.front.then(before, event.value) if is_told else _press(before, event)
    except RouterError as error:
        new = before._replace(note=error.message, is_error=True)
    while not _stands(new):
        new = _pop(new)
    return new._replace(effect=None, scanned=(new.document, _scan(new))), new.effect


def rows_of(menu: Menu) -> List[Row]:
    """The rows that the front screen shows, filtered."""
    frame, make = menu.front, SCREENS[menu.front.screen].rows
    rows = make(menu) if make else frame.rows
    return [row for row in rows if frame.filter.lower() in " ".join(row.cells).lower()]


def keys_of(menu: Menu, item: Any) -> List[Tuple[str, str]]:
    """The keys that do something here, on a row with that item, and a word for each; the most useful first."""
    screen = SCREENS[menu.front.screen]
    pairs = [tuple(key.split(" ", 1)) for key in screen.keys if " " in key]
    if screen.kind != "list":
        return pairs
    pairs = [pair for pair in pairs if item is not None or pair[0] not in _ROW_KEYS]
    if menu.is_unsaved:
        pairs = [*pairs[:1], ("s", "save"), *pairs[1:], ("u", "undo")]
    return [*pairs, ("esc", "back" if len(menu.frames) > 1 else "quit"), ("?", "help")]


def _stands(menu: Menu) -> bool:
    """Whether what the screens show is still there: an undo can take it away."""
    try:
        return all(look_at(menu.document, frame.place) for frame in menu.frames)
    except UsageError:
        return False


# ----- keys -----

_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1, "pgup": -10, "pgdn": 10, "home": -(1 << 30), "end": 1 << 30}
_SAME = {"left": "esc", "backspace": "esc", "ctrl-c": "esc"}  # where the screen says nothing else
_ROW_KEYS = ("enter", "space", "J", "K", "d", "f", "t")  # they do nothing in a list without rows


def within(at: int, count: int) -> int:
    """The nearest index of something that has so many entries."""
    return max(0, min(at, count - 1))


def _press(menu: Menu, name: str) -> Menu:
    frame, screen, rows = menu.front, SCREENS[menu.front.screen], rows_of(menu)
    is_list, is_typed = screen.kind == "list", screen.kind == "input"
    keys = {key.partition(" ")[0]: do for key, do in {**(_LIST_KEYS if is_list else {}), **screen.keys}.items()}
    count = frame.lead.count("\n") + 1 if screen.kind == "text" else len(rows)
    at = within(frame.at, count)
    if isinstance(name, Pasted):
        return _paste(menu, name.text)
    if name == "enter" and is_list and not (rows or frame.filter):
        name = "a"  # where there is nothing to open, something can be added
    if is_typed and name not in keys:
        return _type(menu, name)
    if name in _MOVES and not is_typed:
        return _swap(menu, at=within(at + _MOVES[name], count))
    do = keys.get(name) or keys.get(_SAME.get(name, ""))
    item = rows[at].item if rows else None
    if not do or is_list and item is None and name in _ROW_KEYS:
        return menu
    return do(_swap(menu, at=at) if rows else menu, item)


def _type(menu: Menu, key: str) -> Menu:
    text, typed = menu.front.typed, " " if key == "space" else key
    head, tail = text[: menu.front.at], text[menu.front.at :]
    edits = {
        "backspace": (head[:-1], tail),
        "delete": (head, tail[1:]),
        "left": (head[:-1], head[-1:] + tail),
        "right": (head + tail[:1], tail[1:]),
        "home": ("", text),
        "end": (text, ""),
    }
    if len(typed) == 1 and typed.isprintable():
        edits[key] = (head + typed, tail)
    head, tail = edits.get(key, (head, tail))
    return _swap(menu, typed=head + tail, at=len(head))


def _paste(menu: Menu, text: str) -> Menu:
    """Put text in at the caret: a key, which is not seen, without any spaces, other text in one line."""
    frame = menu.front
    if SCREENS[frame.screen].kind != "input":
        raise UsageError("nothing is typed here: what was pasted is left out")
    text = "".join(filter(str.isprintable, ("" if frame.hidden else " ").join(text.split())))
    return _swap(menu, typed=frame.typed[: frame.at] + text + frame.typed[frame.at :], at=frame.at + len(text))


# ----- moving between screens, and dialogs -----


def _push(menu: Menu, *fields: Any, **more: Any) -> Menu:
    """A further screen; fields: of its Frame."""
    return menu._replace(frames=menu.frames + (Frame(*fields, **more),))


def _pop(menu: Menu, item: Any = None) -> Menu:
    return menu._replace(frames=menu.frames[:-1] or (Frame("home"),))


def _swap(menu: Menu, **changes: Any) -> Menu:
    return menu._replace(frames=menu.frames[:-1] + (menu.front._replace(**changes),))


def _at(menu: Menu, place: Place) -> Any:
    return look_at(menu.document, place)[0]


def _ids(menu: Menu, place: Place) -> List[str]:
    """The id of the provider at `place`, and of the model there when it is one's."""
    return [_id_of(_at(menu, place[:n])) for n in range(2, len(place) + 1, 2)]


def _model_ids(raw: Json) -> List[str]:
    return [_id_of(entry) for entry in _models_of(raw)]


def _apply(menu: Menu, edit: Callable[..., Edit], *args: Any) -> Menu:
    """Change the document, which undo can take back."""
    document, notes = edit(menu.document, *args)
    if document == menu.document:
        return menu
    return menu._replace(document=document, past=menu.past[-199:] + (menu.document,), note="; ".join(notes))


def _do(menu: Menu, action: Any) -> Menu:
    return action(menu) if action else menu


def _go(screen: str, *steps: Union[str, int]) -> Callable[[Menu], Menu]:
    """Open a screen at the place that the steps lead to from the present one."""
    return lambda menu: _push(menu, screen, "", (*menu.front.place, *steps))


def _ask(menu: Menu, title: str, then: Any, lead: str = "", typed: str = "", hidden: bool = False) -> Menu:
    return _push(menu, "input", title, lead=lead, typed=typed, at=len(typed), hidden=hidden, then=then)


def _choose(menu: Menu, title: str, rows: Iterable[Any], lead: str = "", then: Any = _do, now: Any = "") -> Menu:
    """rows: of a text, an item and a hint. then(menu below, item chosen); that of `now` is marked and selected."""
    rows = tuple(Row((text,), item, hint, "ok" if now and item == now else "") for text, item, hint in rows)
    at = next((i for i, row in enumerate(rows) if row.state), 0)
    return _push(menu, "choose", title, at=at, rows=rows, lead=lead, then=then)


def _pick(menu: Menu, title: str, names: Iterable[str], picked: Sequence[str], then: Any, lead: str = "") -> Menu:
    """then(menu below, list of what was picked)."""
    rows = tuple(_name_rows([*picked, *names]))
    return _push(menu, "pick", title, rows=rows, picked=tuple(picked), then=then, lead=lead)


def _name_rows(names: Iterable[str]) -> List[Row]:
    return [Row((name,), name) for name in dict.fromkeys(names)]


def _show(menu: Menu, title: str, *lines: str) -> Menu:
    return _push(menu, "text", title, lead="\n".join(lines))


def _run(menu: Menu, words: str, then: Any, kind: str, *args: Any) -> Menu:
    """Let the host do something, seen while it lasts; then(menu below, value), or its error is shown there."""
    serial = menu.serial + 1
    new = _push(menu, "busy", words, then=then, serial=serial)
    return new._replace(serial=serial, effect=Effect(kind, args, serial))


def _quit(menu: Menu, code: int = 0) -> Menu:
    return menu._replace(effect=Effect("quit", (code,)))


def _pick_rows(menu: Menu) -> List[Row]:
    """state: the place in the order of what is picked."""
    states = {name: str(number) for number, name in enumerate(menu.front.picked, 1)}
    return [row._replace(state=states.get(row.item, "mark")) for row in menu.front.rows]


def _pick_row(menu: Menu, name: str) -> Menu:
    picked = [one for one in menu.front.picked if one != name]
    is_new = name is not None and name not in menu.front.picked
    return _swap(menu, picked=(*picked, name) if is_new else tuple(picked))


def _pick_sooner(menu: Menu, name: str, step: int = -1) -> Menu:
    picked = list(menu.front.picked)
    if name in picked:
        at = picked.index(name)
        picked.insert(max(0, at + step), picked.pop(at))
    return _swap(menu, picked=tuple(picked))


def _pick_further(menu: Menu, item: Any) -> Menu:
    def named(menu: Menu, name: str) -> Menu:
        names = [*menu.front.picked, *filter(None, [name])]
        rows = _name_rows([*(row.item for row in menu.front.rows), *names])
        return _swap(menu, rows=tuple(rows), picked=tuple(dict.fromkeys(names)), filter="")

    return _ask(menu, "Name it", named, "A name that is not in the list")


# ----- leaving, undo, saving -----


def _back(menu: Menu, item: Any = None) -> Menu:
    if menu.front.filter:
        return _swap(menu, filter="", at=0)
    return _pop(menu) if len(menu.frames) > 1 else _leave(menu)


def _leave(menu: Menu, item: Any = None) -> Menu:
    if not menu.is_unsaved or menu.front.screen == "leave":
        return menu if menu.is_unsaved else _quit(menu)
    rows = [
        ("Save and quit", lambda menu: _save(menu, _quit), "write the changes to the file"),
        ("Quit without saving", _quit, "the file stays as it is"),
        ("Stay", "", "go on editing"),
    ]
    return _swap(_choose(menu, "Unsaved changes", rows, "Nothing has been written yet."), screen="leave")


def _undo(menu: Menu, item: Any) -> Menu:
    if not menu.past:
        return menu._replace(note="nothing to undo")
    return menu._replace(document=menu.past[-1], past=menu.past[:-1], note="undone")


def _review(menu: Menu, item: Any = None) -> Menu:
    """The changes before they are saved."""
    if not menu.is_unsaved:
        return menu._replace(note="nothing to save")
    lines = diff_lines(menu.saved, menu.document)
    rows = [
        ("Save these changes", _save, "to " + menu.facts.path),
        ("See every line", lambda menu: _show(_review(menu), "Changes", *lines), ""),
        ("Go on editing", "", ""),
    ]
    return _swap(_choose(menu, "Save", rows, "\n".join(lines)), screen="diff")


def diff_lines(old: Json, new: Json) -> List[str]:
    """What was changed, as lines that start with +, - or a space; keys are masked."""
    import difflib

    texts = [json.dumps(mask_document(one), indent=2, ensure_ascii=False) for one in (old, new)]
    before, after = (text.replace(",\n", "\n").split("\n") for text in texts)  # a comma that moves is no change
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    return [line for line in lines if line[:2] != "@@"] or ["+ a key that looks the same when it is masked"]


def _save(menu: Menu, then: Any = None) -> Menu:
    def saved(menu: Menu, answer: Tuple[str, Any]) -> Menu:
        state, value = answer
        if state == "conflict":
            return _resolve(menu, value)
        return _do(menu._replace(saved=menu.document, past=(), note=value), then)

    return _run(menu, "Saving", saved, "save", menu.saved, menu.document)


def _resolve(menu: Menu, theirs: Json) -> Menu:
    """Another program wrote the file in the meantime: nothing of either side is lost silently."""

    def reload(menu: Menu) -> Menu:
        past, note = menu.past + (menu.document,), "reloaded; u brings your changes back"
        return menu._replace(saved=theirs, document=theirs, past=past, note=note)

    rows = [
        ("Take the file", reload, "yours can still be brought back by undo"),
        ("Keep yours", lambda menu: _review(menu._replace(saved=theirs)), "shows first what of it goes"),
        ("Back", "", "nothing is written"),
    ]
    return _choose(menu, "The file was changed meanwhile", rows, "Another program wrote %s." % menu.facts.path)


def _filter(menu: Menu, item: Any) -> Menu:
    words = "Show only what contains this; empty shows all"
    return _ask(menu, "Filter", lambda menu, text: _swap(menu, filter=text.strip(), at=0), words, menu.front.filter)


def _help(menu: Menu, item: Any) -> Menu:
    screen = SCREENS[menu.front.screen]
    pairs = [key.split(" ", 1) for key in screen.keys if " " in key and key[:5] != "enter"]
    lines = [screen.lead, ""] if screen.lead else []
    return _show(menu, "Help", *lines, *("%-8s %s" % (KEY_NAMES.get(name, name), word) for name, word in pairs), _HELP)


KEY_NAMES = {"up": "↑↓", "J": "J K"}  # of two that have one word
_HELP = """\
enter    open, or accept
esc      back; at the first screen quit
arrows   move, also j and k, page up and down, home, end
/        show only the rows that contain a word
s        see the changes and save them
u        undo; nothing is written until it is saved
q        quit; asks when there are changes
ctrl-c   back, or quit"""


# ----- the first screen -----


def _home_rows(menu: Menu) -> List[Row]:
    config, problems = _scan(menu)
    chains = sum(bool(model.fallback_models) for provider in config.providers for model in provider.models)
    states = {"check": min((problem.level for problem in problems), default="ok")}  # error before warning
    for problem in problems:
        name = getattr(_FIELD_OF["config"].get(re.split(r"[.[]", problem.path)[0]), "key", "")
        states[name] = min(problem.level, states.get(name, "warning"))
    changes = _count(max(1, len(menu.past)), "change") if menu.is_unsaved else "no changes"
    values = {
        "providers": ", ".join(_id_of(raw) or "?" for raw in map(as_dict, _at(menu, ("providers",)))),
        "fallbacks": "of %s" % _count(chains, "model") if chains else "",
        "defaultModel": config.default_model,
        "modelAliases": ", ".join(config.aliases),
        "masterKey": mask(config.master_key),
        "clientKeys": ", ".join(key.name for key in config.client_keys),
        "corsOrigins": ", ".join(config.cors_origins + config.allowed_hosts),
        "settings": "%d set here" % sum(row["value"] != row["default"] for row in menu.facts.settings),
        "check": _count(len(problems), "problem") if problems else "",
        "changes": "%s to %s" % (changes, menu.facts.path),
    }
    return [
        Row((label, values.get(name) or empty), does, hint, states.get(name, ""))
        for name, label, empty, does, hint in _HOME
    ]


def _scan(menu: Menu) -> Tuple[Config, List[Problem]]:
    """What the document means here: a variable that a provider names and nobody has set is a problem, too. It is the
    same from one key to the next until the document changes: with thousands of models no key waits for it."""
    document, found = menu.scanned
    return found if document is menu.document else scan_config(menu.document, dict.fromkeys(menu.facts.variables, "x"))


def _count(number: int, word: str) -> str:
    return "%d %s%s" % (number, word, "s" * (number != 1))


# ----- providers -----


def _provider_rows(menu: Menu) -> List[Row]:
    rows, problems = [], _scan(menu)[1]
    for i, raw in enumerate(map(as_dict, _at(menu, ("providers",)))):
        config = scan_config({"providers": [dict(raw, models=[], enabled=True)]}, {})[0]  # without them it is quick
        one = config.providers[0] if config.providers else Provider("")
        own = [problem for problem in problems if problem.path.startswith("providers[%d]" % i)]
        worst = min(own, key=lambda problem: problem.level, default=None)  # error before warning
        state = "off" if _is_off(raw) else worst.level if worst else "ok"
        variable = as_text(get_field(raw, "provider", "apiKeyEnv"))
        key = mask(one.api_key) or ("$" + variable if variable else "no key")
        hosts = " ".join(dict.fromkeys(urlsplit(url).netloc for url in one.base_urls.values()))
        cells = (_id_of(raw) or "?", _count(len(_models_of(raw)), "model"), ",".join(one.formats), key, hosts)
        hint = show_problem(worst) if worst else "%s: %s" % (one.name, "switched off" if state == "off" else "ready")
        rows.append(Row(cells, ("providers", i), hint, state))
    return rows


def _preset_rows(menu: Menu) -> List[Row]:
    rows = []
    for preset in PRESETS:
        variable = next((name for name in preset_variables(preset) if name in menu.facts.variables), "")
        key, hint = "", "get a key at " + preset.keys_at
        if variable:
            key, hint = "has a key", "its key is in $" + variable
        elif not preset.keys:
            key, hint = "needs none", "runs on this machine"
        cells = (preset.name, key, preset.openai or preset.anthropic)
        rows.append(Row(cells, (preset, variable), hint, "ok" if key else ""))
    return [*rows, Row(("Another one", "", "any provider, by its URL"), (Preset(), ""))]


def _start_provider(menu: Menu, chosen: Tuple[Preset, str]) -> Menu:
    """A new provider: what is known of it needs no question."""
    preset, variable = chosen
    if not preset.id:
        return _describe_provider(menu, {"models": ["*"]}, preset, ("id", "baseUrl", "apiKey", "models"))
    taken = [_id_of(entry).lower() for entry in _at(menu, ("providers",))]
    names = [preset.id, *("%s%d" % (preset.id, i) for i in range(2, len(taken) + 3))]
    raw = {"id": next(name for name in names if name not in taken), "name": preset.name}
    raw.update({"baseUrlByFormat": preset_urls(preset), "models": ["*"]}, **{"apiKeyEnv": variable} if variable else {})
    needs_key = preset.keys and not variable
    return _describe_provider(menu, raw, preset, ("apiKey", "models") if needs_key else ("models",))


def _describe_provider(menu: Menu, raw: Json, preset: Preset, keys: Sequence[str]) -> Menu:
    """Ask for these fields of a new provider, one after the other; with the last answer it is added."""
    others = _at(menu, ("providers",))
    if not keys:
        raw = {key: raw[key] for key in SPELLINGS["provider"] if key in raw}  # in the usual order
        model = next((name for name in _model_ids(raw) if name != "*"), preset.model)
        default = model and "%s/%s" % (_id_of(raw), model)
        new = _apply(_swap(_pop(menu), at=len(others)), add_provider, raw, default)
        return new._replace(note=new.note + "; t tests it, s saves")
    field = _FIELD_OF["provider"][keys[0]]

    def put(menu: Menu, value: Any) -> Menu:
        if not value and field.key != "apiKey":
            raise UsageError("%s: nothing was given" % field.key)
        document = dict(menu.document, providers=[*others, raw])
        new, _ = set_field(document, ("providers", len(others)), field.key, value or None)
        return _describe_provider(menu, new["providers"][-1], preset, keys[1:])

    if field.kind == "[model]":
        return _list_models(menu, raw, put)
    title = " of ".join(filter(None, (field.key, preset.name or _id_of(raw))))
    lead = "Get a key at " + preset.keys_at if preset.keys else field.help
    return _ask(menu, title, lambda menu, text: put(menu, text.strip()), lead, hidden=field.kind == "secret")


def _switch(menu: Menu, place: Place) -> Menu:
    return _apply(menu, set_field, place, "enabled", None if _is_off(_at(menu, place)) else False)


def _move(menu: Menu, place: Place, step: int = 1) -> Menu:
    return _swap(_apply(menu, move_entry, place, step), at=max(0, menu.front.at + step))


def _alone(raw: Json) -> Json:
    """A document of one provider alone, so that the host may ask it something before anything is saved."""
    return {"providers": [dict(raw, models=_model_ids(raw) or ["*"], enabled=True)]}


def _test(menu: Menu, place: Place) -> Menu:
    """Ask a provider what it really serves; what it says can be taken over into its fields."""

    def heard(menu: Menu, answer: Tuple[Any, ...]) -> Menu:
        table, learned, words = answer
        rows = [Row((row[0], *row[2:6], row[7]), None, row[7], _PROBE_STATES.get(row[3], "")) for row in table]
        rows += [Row(("Keep what was learned",), learned, json.dumps(learned))] if learned else []
        return _push(menu, "test", "Test of " + _ids(menu, place)[0], place, rows=tuple(rows), lead=words)

    return _run(menu, "Testing", heard, "test", _alone(_at(menu, place)))


_PROBE_STATES = {"ok": "ok", "tentative": "warning", "no": "error"}


def _keep(menu: Menu, learned: Json) -> Menu:
    place, menu = menu.front.place, _pop(menu)
    for key, value in learned.items():
        menu = _apply(menu, set_field, place, key, value)
    return menu


# ----- forms: one row per field -----

def _form_fields(place: Place, kind: str, raw: Json) -> List[Field]:
    if place[-1:] == ("headers",):
        kinds = {name: "header" if name.lower() in _PLAIN_HEADERS else "secret" for name in raw}
        return [Field(name, kinds[name], "sent with every request") for name in raw]
    if not kind:
        return [Field(wire, "url", "for the format " + wire) for wire in WIRES]
    return [field for field in FIELDS[kind] if kind != "config" or field.key in ("corsOrigins", "allowedHosts")]


def _form_rows(menu: Menu) -> List[Row]:
    place = menu.front.place
    raw, kind = look_at(menu.document, place)
    under = "" if kind else str(place[-1])
    problems = _scan(menu)[1]
    rows = []
    for field in _form_fields(place, kind, raw):
        value = get_field(raw, kind, field.key) if kind else raw.get(field.key)
        value = True if value is None and field.kind == "flag" else value
        shown = _in_words(mask_document({field.key: value}, under)[field.key])
        is_set = field.kind == "variable" and value in menu.facts.variables
        state = "ok" if is_set else "off" if field.key == "enabled" and _is_off(raw) else ""
        is_here = re.compile(re.escape(path_of((*place, field.key))) + "(?![A-Za-z])").match
        worst = min(filter(lambda one: is_here(one.path), problems), key=lambda one: one.level, default=None)
        hint, state = (show_problem(worst), worst.level) if worst else (field.help, state)
        rows.append(Row((field.key, shown), (field, value), hint, state))
    return rows


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_id_of(entry) or json.dumps(entry) for entry in value)
    if isinstance(value, dict):
        return ", ".join("%s: %s" % (name, _in_words(entry)) for name, entry in value.items())
    return ("no", "yes")[value] if isinstance(value, bool) else "" if value is None else str(value)


def _edit_field(menu: Menu, item: Tuple[Field, Any]) -> Menu:
    field, value = item

    def put(menu: Menu, value: Any) -> Menu:
        new = _apply(menu, set_field, menu.front.place, field.key, None if value in ("", []) else value)
        return _swap(new, title=str(value)) if field.key == "id" else new

    return _EDITORS.get(field.kind, _edit_text)(menu, field, value, put)


def _edit_text(menu: Menu, field: Field, value: Any, put: Any) -> Menu:
    typed = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else value
    typed = typed if isinstance(typed, str) else json.dumps(typed, ensure_ascii=False)
    then = lambda menu, text: put(menu, read_typed(field.kind, text))  # noqa: E731
    return _ask(menu, field.key, then, field.help, one_line(typed, 4000))


def is_object(kind: str) -> bool:
    """Whether a field of that kind holds an object."""
    return kind == "object" or kind[0] == "{" or kind in FIELDS


def read_typed(kind: str, text: str) -> Any:
    """What a person typed as the value of a field of that kind. RouterError where only JSON will do and it is none."""
    text = text.strip()
    if text and (is_object(kind) or kind == "any" and text[0] in "[{"):
        value = load_json(text, "value")
        if is_object(kind) and not isinstance(value, dict):
            raise UsageError("write a JSON object")
        return value
    if kind[0] == "[":
        return list(filter(None, map(str.strip, text.split(","))))
    return int(text) if kind == "whole" and re.fullmatch("[0-9]{1,15}", text) else text


def _edit_secret(menu: Menu, field: Field, value: Any, put: Any) -> Menu:
    now = "Now %s; empty keeps it, - removes it." % mask(str(value)) if value else "Not shown while typed."
    then = lambda menu, text: put(menu, None if text.strip() == "-" else text.strip() or value)  # noqa: E731
    return _ask(menu, field.key, then, "%s. %s" % (field.help, now), hidden=True)


def _list_models(menu: Menu, raw: Json, then: Any) -> Menu:
    """Let models be picked from what a provider lists; they are typed where it lists none, or nobody waits for it."""
    now = _model_ids(raw)
    typed = lambda menu, text: then(menu, read_typed("[name]", text))  # noqa: E731
    below = _ask(menu, "models", typed, "Models, with commas between; * for any.", ", ".join(now))

    def heard(menu: Menu, names: Sequence[str]) -> Menu:
        if not names:
            raise UsageError("it lists no models")
        return _pick(_pop(menu), "models", ["*", *names], now, then, "* passes any model through.")

    return _run(below, "Asking for its models", heard, "models", _alone(raw))


def _edit_choice(names: Sequence[str]) -> Any:
    rows = [(name, name, "") for name in names]
    return lambda menu, field, value, put: _choose(menu, field.key, rows, field.help, put, value)


_EDITORS: Dict[str, Callable[[Menu, Field, Any, Any], Menu]] = {  # by a field's kind; all others are typed
    "flag": lambda menu, field, value, put: _switch(menu, menu.front.place),
    "secret": _edit_secret,
    "[model]": lambda menu, field, value, put: _go("models", field.key)(menu),
    "wire": _edit_choice(WIRES),
    "auth_type": _edit_choice(AUTH_TYPES),
    "[wire]": lambda menu, field, value, put: _pick(menu, field.key, WIRES, as_list(value), put, field.help),
    "[fallback]": lambda menu, field, value, put: _edit_fallbacks(menu, menu.front.place),
    **dict.fromkeys(
        ("auth", "timeouts", "{wire:url}"),
        lambda menu, field, value, put: _push(menu, "form", field.key, (*menu.front.place, field.key)),
    ),
    "{header_name:header}": lambda menu, field, value, put: _go("headers", field.key)(menu),
}


def _add_header(menu: Menu, item: Any) -> Menu:
    def accept(menu: Menu, text: str) -> Menu:
        name, _, value = text.partition(":")
        return _apply(menu, set_field, menu.front.place, name.strip(), value.strip())

    return _ask(menu, "Header", accept, "As Name: value")


# ----- models, fallbacks, aliases, default -----


def _model_row(entry: Any, place: Place) -> Row:
    raw = as_dict(entry) or {"id": entry}
    backs, aliases = (as_list(get_field(raw, "model", key)) for key in ("fallbackModels", "aliases"))
    cells = (_id_of(raw) or "?", " › ".join(map(str, backs)), ", ".join(map(str, aliases)))
    hint = "then " + cells[1] if backs else "no fallbacks: f sets them"
    return Row(cells, place, hint, "off" if _is_off(raw) else "ok")


def _add_models(menu: Menu, item: Any) -> Menu:
    def put(menu: Menu, names: Sequence[str]) -> Menu:
        owner = _ids(menu, menu.front.place)[0]
        return _apply(menu, upsert_provider, owner, {"models": names}) if names else menu

    return _list_models(menu, _at(menu, menu.front.place[:2]), put)


def _refs(menu: Menu) -> List[str]:
    """Every model that can be named, as provider/model."""
    return [ref for ref in Routes(_scan(menu)[0]).refs() if not ref.endswith("/*")]


def _aliases(menu: Menu) -> Dict[str, List[str]]:
    aliases = as_dict(get_field(menu.document, "config", "modelAliases"))
    return {name: [refs] if isinstance(refs, str) else list(map(str, as_list(refs))) for name, refs in aliases.items()}


def _edit_fallbacks(menu: Menu, place: Place) -> Menu:
    ids = _ids(menu, place)
    ref = "/".join(ids)
    if not ids[-1]:
        raise UsageError("the model has no id: give it one first")
    others = [name for name in (*_refs(menu), *_aliases(menu)) if name != ref]
    now = [name for name in as_list(get_field(_at(menu, place), "model", "fallbackModels")) if isinstance(name, str)]
    then = lambda menu, names: _apply(menu, set_model_fallbacks, *ids, names)  # noqa: E731
    return _pick(menu, "Fallbacks of " + ref, others, now, then, "What to try when it fails, in this order.")


def _chain_rows(menu: Menu) -> List[Row]:
    rows = []
    for i, provider in enumerate(map(as_dict, _at(menu, ("providers",)))):
        for j, entry in enumerate(_models_of(provider)):
            row = _model_row(entry, ("providers", i, "models", j))
            cells = ("%s/%s" % (_id_of(provider), row.cells[0]), row.cells[1] or "none")
            rows.append(row._replace(cells=cells, hint="Enter picks and orders them"))
    return rows


def _edit_default(menu: Menu) -> Menu:
    now = as_text(get_field(menu.document, "config", "defaultModel"))
    then = lambda menu, name: _apply(menu, set_default_model, name)  # noqa: E731

    def chosen(menu: Menu, name: str) -> Menu:
        return then(menu, name) if name else _ask(menu, "Default model", then, "provider/model, or an alias", now)

    rows = [(name, name, "") for name in dict.fromkeys((*_refs(menu), *_aliases(menu)))]
    rows.append(("Another one", "", "to be typed: one that * passes through"))
    return _choose(menu, "Default model", rows, "For `smart` and for requests that name no model.", chosen, now)


def _edit_alias(menu: Menu, name: str) -> Menu:
    then = lambda menu, refs: _apply(menu, set_model_alias, name, refs) if refs else menu  # noqa: E731
    now, lead = _aliases(menu).get(name, ()), "What it leads to; several are tried in order."
    return _pick(menu, "Alias " + name, _refs(menu), now, then, lead)


def _add_alias(menu: Menu, item: Any) -> Menu:
    def named(menu: Menu, name: str) -> Menu:
        kind = _FIELD_KINDS["alias"]
        if name.strip() and not kind.is_good(name):
            raise UsageError("%s %s; %s" % (name.strip(), kind.message, kind.cure))
        return _edit_alias(menu, name.strip()) if name.strip() else menu

    return _ask(menu, "New alias", named, "A name, or a pattern with *: claude-* catches every such name.")


# ----- keys of clients -----


def _edit_master(menu: Menu) -> Menu:
    def store(menu: Menu, key: str) -> Menu:
        return _apply(menu, set_master_key, key) if key.strip() else menu

    made = lambda menu, key: _show_key(store(menu, key), "master key", key)  # noqa: E731
    remove = lambda menu: _apply(menu, set_field, (), "masterKey", None)  # noqa: E731
    rows = [
        ("Generate a new one", lambda menu: _run(menu, "Generating", made, "key"), "shown once"),
        ("Type one", lambda menu: _ask(menu, "Master key", store, hidden=True), "not shown while typed"),
        ("Remove it", remove, "clients then need none, or their own"),
    ]
    lead = "The key that clients show where start has --require-auth=true."
    return _choose(menu, "Master key", rows[: 2 + bool(find_key(menu.document, "config", "masterKey"))], lead)


def _show_key(menu: Menu, what: str, key: str) -> Menu:
    lines = ("The new %s, shown only now:" % what, "", key, "", "Copy it, then save: it counts once it is saved.")
    return _show(menu, "New " + what, *lines)


def _add_client(menu: Menu, item: Any) -> Menu:
    def named(menu: Menu, name: str) -> Menu:
        add = lambda menu, key: _apply(menu, add_client_key, name, key)  # noqa: E731
        made = lambda menu, key: _show_key(add(menu, key), "key of " + name.strip(), key)  # noqa: E731
        return _run(menu, "Generating", made, "key")

    return _ask(menu, "New client", named, "Its name, as it is to stand in the log; a new key is made and shown once.")


# ----- the rest -----


def _setting_rows(menu: Menu) -> List[Row]:
    rows = []
    for row in menu.facts.settings:
        is_own = row["value"] != row["default"]
        value, default = (show_setting(row[name]) or "(empty)" for name in ("value", "default"))
        cells = (row["flag"][2:], value, "default " + default if is_own else "")
        rows.append(Row(cells, (row, value, default), row["help"], "warning" if is_own else ""))
    return rows


def _show_setting(menu: Menu, item: Tuple[Json, str, str]) -> Menu:
    row, value, default = item
    lines = (row["help"], "", "now      " + value, "default  " + default, "")
    lines += ("It is no part of the file. Set it for one start:", "  llm-router start %s=..." % row["flag"])
    return _show(menu, row["flag"], *lines, "or in the environment:", "  export %s=..." % row["variable"])


def _open_problem(menu: Menu, problem: Problem) -> Menu:
    """Go where a problem can be mended: to the field of its provider or model, else to the screen for its part."""
    steps = [int(step) if step.isdigit() else step for step in re.findall(r"[A-Za-z]\w*|[0-9]+", problem.path)]
    place = tuple(steps[: 4 if steps[2:3] == ["models"] and len(steps) > 3 else 2])
    if place[:1] == ("providers",) and isinstance(place[-1], int):
        new = _push(menu, "form" if place[2:] else "provider", _ids(menu, place)[-1] or "?", place)
        names = [row.cells[0] for row in rows_of(new)]
        return _swap(new, at=next((names.index(step) for step in steps[len(place) :] if step in names), 0))
    does = next((does for name, _, _, does, _ in _HOME if [name] == steps[:1]), None)
    return does(menu) if does else _show(menu, problem.level, problem.path, "", problem.message, "", problem.cure)


def _startup(menu: Menu) -> Menu:
    words, title = "Asking the system", "Start with the machine"
    told = lambda menu, text: _show(menu, title, text)  # noqa: E731
    run = lambda verb: lambda menu: _run(menu, words, told, "startup", verb)  # noqa: E731
    rows = [
        ("Install", run("startup-install"), "start the router whenever you log in"),
        ("Remove", run("startup-uninstall"), "start it no longer"),
    ]
    return _run(menu, words, lambda menu, text: _choose(menu, title, rows, "Now: " + text), "startup", "startup-status")


def _deploy(menu: Menu) -> Menu:
    if menu.is_unsaved:
        raise UsageError("save first: what the file holds is deployed")
    then = lambda menu, document: menu._replace(saved=document, document=document)  # noqa: E731
    return _run(menu, "Deploying", then, "deploy")


_HOME = (  # the first word: the field whose problems are its own, an effect of the host, or another name
    ("providers", "Providers", "none yet", _go("providers"), "the accounts requests may go to: add, edit, test, order"),
    ("fallbacks", "Fallbacks", "none", _go("fallbacks"), "what to try when a model fails"),
    ("defaultModel", "Default model", "none", _edit_default, "for `smart` and for requests that name no model"),
    ("modelAliases", "Aliases", "none", _go("aliases"), "further names and patterns for models"),
    ("masterKey", "Master key", "none", _edit_master, "the key that clients show to the router"),
    ("clientKeys", "Client keys", "none", _go("clients"), "further keys, one per client"),
    ("corsOrigins", "Browser access", "none", _go("access"), "origins and hosts that may use it"),
    ("settings", "Settings", "", _go("settings"), "timeouts, retries, cooldowns: see them and how to set them"),
    ("startup", "Start-up", "with the machine", _startup, "start the router with the machine"),
    ("deploy", "Deploy", "onto Cloudflare", _deploy, "put the router and this configuration onto Cloudflare"),
    ("check", "Check", "nothing is wrong", _go("check"), "what is wrong in the configuration, and the cure"),
    ("changes", "Save", "", _review, "shows the changes first"),
)

_LIST_KEYS = {  # of every list
    "s save": _review,
    "u undo": _undo,
    "/ filter": _filter,
    "? help": _help,
    "q quit": _leave,
    "esc back": _back,
    "right": lambda menu, item: _press(menu, "enter"),
    "ctrl-c": lambda menu, item: (_back if menu.front.rows else _leave)(menu),
}
_ENTRY_KEYS = {
    "space on/off": _switch,
    "J move": _move,
    "K": lambda menu, place: _move(menu, place, -1),
}
_FORM_KEYS = {
    "enter edit": _edit_field,
    "d clear": lambda menu, item: _apply(menu, set_field, menu.front.place, item[0].key, None),
}
_STOP = lambda menu, item: _pop(menu)._replace(effect=Effect("cancel"), note="stopped")  # noqa: E731
_CHOOSE = {"enter choose": lambda menu, item: menu.front.then(_pop(menu), item)}
_ASKED = {**_CHOOSE, "s": lambda menu, item: _save(_pop(menu)), "u": lambda menu, item: _undo(_pop(menu), item)}

SCREENS: Dict[str, Screen] = {
    "home": Screen("llm-router", _home_rows, {"enter open": _do}, "One address for every provider."),
    "providers": Screen("Providers", _provider_rows, {
        "enter open": lambda menu, place: _push(menu, "provider", _ids(menu, place)[0] or "?", place),
        "a add": lambda menu, item: _push(menu, "presets"),
        "t test": _test,
        "d remove": lambda menu, place: _apply(menu, remove_provider, *_ids(menu, place)),
        **_ENTRY_KEYS,
    }, empty="No providers yet: press a to add one."),
    "presets": Screen("Add a provider", _preset_rows, {"enter choose": _start_provider}, "Who is it?"),
    "provider": Screen("Provider", _form_rows, {
        "enter edit": _edit_field, "t test": lambda menu, item: _test(menu, menu.front.place), **_FORM_KEYS,
    }),
    "form": Screen("Fields", _form_rows, _FORM_KEYS),
    "access": Screen("Browser access", _form_rows, _FORM_KEYS),
    "headers": Screen("Headers", _form_rows, {"a add": _add_header, **_FORM_KEYS},
                      empty="No headers yet: press a to add one."),
    "models": Screen("Models", lambda menu: [
        _model_row(raw, (*menu.front.place, i)) for i, raw in enumerate(_at(menu, menu.front.place))
    ], {
        "enter open": lambda menu, place: _push(menu, "form", _ids(menu, place)[1] or "?", place),
        "a add": _add_models,
        "f fallbacks": _edit_fallbacks,
        "d remove": lambda menu, place: _apply(menu, remove_model, *_ids(menu, place)),
        **_ENTRY_KEYS,
    }, empty="No models yet: press a to add some."),
    "fallbacks": Screen("Fallbacks", _chain_rows, {"enter open": _edit_fallbacks},
                        "Each model, and what is tried when it fails.", "No models yet: add a provider first."),
    "aliases": Screen("Aliases", lambda menu: [
        Row((name, " › ".join(refs)), name, "Enter picks and orders what it leads to")
        for name, refs in _aliases(menu).items()
    ], {
        "enter open": _edit_alias,
        "a add": _add_alias,
        "d remove": lambda menu, name: _apply(menu, set_model_alias, name, ()),
    }, empty="No aliases yet: press a to add one."),
    "clients": Screen("Client keys", lambda menu: [
        Row((name, "kept as its hash"), name, "d removes it", "ok")
        for one in as_list(get_field(menu.document, "config", "clientKeys"))
        for name in [str(as_dict(one).get("name"))]
    ], {
        "a add": _add_client,
        "d remove": lambda menu, name: _apply(menu, remove_client_key, name),
    }, empty="No keys yet: press a to make one."),
    "settings": Screen("Settings", _setting_rows, {"enter open": _show_setting}),
    "check": Screen("Check", lambda menu: [
        Row((p.path or "configuration", p.message), p, p.cure, p.level) for p in _scan(menu)[1]
    ], {
        "enter open": _open_problem,
    }, empty="Nothing is wrong."),
    "choose": Screen(keys=_CHOOSE),
    "leave": Screen(keys={**_ASKED, "ctrl-c": lambda menu, item: _quit(menu, 130)}),
    "diff": Screen(keys=_ASKED),
    "test": Screen(keys={"enter choose": _keep}, empty="It names no model: give it some, and they are asked."),
    "pick": Screen("", _pick_rows, {
        "space pick": _pick_row,
        "J move": lambda menu, name: _pick_sooner(menu, name, 1),
        "K": _pick_sooner,
        "a type": _pick_further,
        "/ filter": _filter,
        "enter done": lambda menu, item: menu.front.then(_pop(menu), list(menu.front.picked)),
        "esc back": _pop,
        "q": _pop,
    }, empty="nothing to pick: a types a name", kind="pick"),
    "input": Screen(keys={
        "enter accept": lambda menu, item: menu.front.then(_pop(menu), menu.front.typed),
        "ctrl-u clear": lambda menu, item: _swap(menu, typed="", at=0),
        "esc back": _pop,
        "ctrl-c": _pop,
    }, kind="input"),
    "text": Screen(keys={"up scroll": _do, "esc back": _pop, "enter": _pop, "q": _pop, "space": _pop}, kind="text"),
    "busy": Screen(keys={
        "esc stop": _STOP,
        "q": _STOP,
        "tick": lambda menu, item: _swap(menu, at=menu.front.at + 1),
    }, kind="busy"),
}  # fmt: skip


# ==============================================================================
# 20 VIEW - the menu as lines of styled text, for any size of a terminal [pure]
# ==============================================================================

Line = List[Tuple[str, str]]  # spans: text and style, a row of the host's table of attributes

_MARKS = {"ok": "●", "off": "○", "warning": "▲", "error": "✗", "mark": "·", "": " "}
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_DIFF_STYLES = {"+": "ok", "-": "error"}
TO_ASCII = dict(zip(map(ord, "●○▲✗›↑↓…─•·" + _SPINNER), "*o!x>^v~-*." + "|/-\\" * 3))  # for terminals without UTF-8
_HELD = 1 << 10  # no terminal is wider; a cell's width is counted, not searched


def text_width(text: str) -> int:
    """How many cells a terminal needs for `text`: wide characters have two, combining marks none (UAX 11)."""
    import unicodedata

    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in text)


def _cut(text: str, width: int) -> str:
    """As much of the start of `text` as fits."""
    while text and text_width(text) > width:
        text = text[:-1]
    return text


def fit(text: str, width: int) -> str:
    """`text` in exactly `width` cells: cut with an ellipsis, or filled up; what cannot be shown is replaced."""
    text = _printable(text[:_HELD])
    if text_width(text) > width:
        text = (_cut(text, width - 1) + "…")[: max(0, width)]
    return text + " " * (width - text_width(text))


def wrap(text: str, width: int, most: int = 1000) -> List[str]:
    """`text` as at most `most` lines of that width, broken at spaces where there are some."""
    lines: List[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+", paragraph[: 40 * _HELD]):
            if line and text_width(line + word) > width:
                lines.append(line)
                line, word = "", word.lstrip()
            while text_width(word) > width > 1:
                lines.append(_cut(word, width))
                word = word[len(lines[-1]) :]
            line += word
        lines.append(line)
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return lines[:most]


def view(menu: Menu, width: int, height: int) -> List[Line]:
    """Exactly `height` lines of exactly `width` cells: title, body, and what the selected row and the keys do."""
    is_roomy = height >= 16
    rows = rows_of(menu)
    selected = rows[within(menu.front.at, len(rows))] if rows else Row(())
    style = "error" if menu.is_error else "note" if menu.note else "dim"
    most = 6 if is_roomy else 2 if menu.note and height > 5 else 1
    notes = wrap(menu.note or selected.hint, width - 2, most) if height > 3 else []
    blank, rule = ([[]], [[("─" * width, "dim")]]) if is_roomy else ([], [])
    foot = rule + _styled(notes, style, " ") + [_keys_line(keys_of(menu, selected.item), width)]
    room = max(0, height - 1 - len(foot) - len(blank))
    body = _BODIES[SCREENS[menu.front.screen].kind](menu.front, rows, width, room)[:room]
    lines = [_title_line(menu, width), *blank, *body, *[[]] * (room - len(body)), *foot]
    return [_exactly(line, width) for line in lines][:height]


def _styled(lines: Iterable[str], style: str, indent: str = "  ") -> List[Line]:
    return [[(indent + line, style)] for line in lines]


def _exactly(line: Line, width: int) -> Line:
    """Spans cut and filled to the width; the last one's style goes on to the edge when it is a bar's."""
    spans: Line = []
    for text, style in line:
        text = fit(text, min(text_width(text), width))
        spans += [(text, style)] if text else []
        width -= text_width(text)
    bar = spans[-1][1] if spans and spans[-1][1] in ("title", "selected") else ""
    return spans + ([(" " * width, bar)] if width > 0 else [])


def _title_line(menu: Menu, width: int) -> Line:
    crumbs = [frame.title or SCREENS[frame.screen].title for frame in menu.frames]
    state, style = ("● unsaved ", "changed") if menu.is_unsaved else ("saved ", "title")
    state = state if width > 30 else "● " if menu.is_unsaved else ""
    room = width - text_width(state) - 2
    paths = [" › ".join(["…"] * (i > 0) + crumbs[i:]) for i in range(len(crumbs))] + crumbs[-1:]
    path = next((path for path in paths if text_width(path) <= room), paths[-1])
    return [(" " + fit(path, room) + " ", "title"), (state, style)]


def _keys_line(pairs: Sequence[Tuple[str, str]], width: int) -> Line:
    """As many keys as there is room for: the first and the last two, of which help goes before the way back."""
    kept = [(KEY_NAMES.get(name, name), word) for name, word in pairs]
    while len(kept) > 1 and text_width("  ".join(map(" ".join, kept))) >= width:
        kept.pop(-3 if len(kept) > 3 else -1 if kept[-1][0] == "?" else 1)
    (first, style), *spans = [span for name, word in kept for span in (("  " + name, "key"), (" " + word, "dim"))]
    return [(first[1:], style), *spans]


def _list_body(frame: Frame, rows: Sequence[Row], width: int, room: int) -> List[Line]:
    screen = SCREENS[frame.screen]
    lead = frame.lead or screen.lead
    lines: List[Line] = []
    if frame.screen == "diff":
        lines = _diff_lines(lead.split("\n"), max(1, room - len(rows) - 2)) + [[]]
    elif lead and room > 5:
        lines = _styled(wrap(lead, width - 4, max(1, room // 3)), "lead") + [[]] * (room > 12)
    if frame.picked and room > 4:
        lines += _styled(wrap(" › ".join(frame.picked), width - 4, 2), "ok")
    if frame.filter:
        lines.append([("  only what contains ", "dim"), (frame.filter, "key")])
    if not rows:
        return lines + _styled(wrap(screen.empty, width - 4), "lead")
    return lines + _row_lines(rows, within(frame.at, len(rows)), width, max(1, room - len(lines)))


def _diff_lines(lines: List[str], room: int) -> List[Line]:
    lines = lines if len(lines) <= room else [line for line in lines if line[:1] != " "]
    if len(lines) > room:
        lines = lines[: room - 1] + ["  … and %d lines more" % (len(lines) - room + 1)]
    return [[(" " + line, _DIFF_STYLES.get(line[:1], "dim"))] for line in lines]


def _row_lines(rows: Sequence[Row], at: int, width: int, room: int) -> List[Line]:
    """The part of the rows around the selected one, in aligned columns."""
    first = max(0, min(at - room // 2, len(rows) - room))
    last = min(len(rows), first + room) - 1
    widths = _column_widths([row.cells for row in rows], width - 5)
    lines: List[Line] = []
    for i in range(first, last + 1):
        row = rows[i]
        name, *cells = map(fit, row.cells, widths if len(row.cells) > 1 else [width - 4])
        rest = fit("".join("  " + cell for cell in cells), max(0, width - 4 - text_width(name)))
        more = "↑" if i == first > 0 else "↓" if i == last < len(rows) - 1 else " "
        mark = _MARKS.get(row.state, row.state[-1:]) + " "
        if i == at:
            lines.append([("›" + mark + name + rest + more, "selected")])
        else:
            style = "ok" if row.state.isdigit() else row.state or "mark"
            lines.append([(" " + mark, style), (name, "name"), (rest, "value"), (more, "dim")])
    return lines


def _column_widths(table: Sequence[Sequence[str]], width: int) -> List[int]:
    """Widths for the columns of rows: as wide as their cells, the first at most half of it; the last takes the rest."""
    count = max(map(len, table), default=0)
    sizes = [max(text_width(row[i]) if len(row) > i else 0 for row in table) for i in range(count)]
    room = width - 2 * max(0, count - 1)
    if count > 1:
        sizes[0] = min(sizes[0], max(8, room // 2 if sum(sizes) > room else room))
    return [max(0, min(size, room - sum(sizes[:i]))) for i, size in enumerate(sizes)]


def _input_body(frame: Frame, rows: Sequence[Row], width: int, room: int) -> List[Line]:
    lines = _styled(wrap(frame.lead, width - 4, max(1, room - 2)), "lead") if room > 1 else []
    shown = _printable("•" * len(frame.typed) if frame.hidden else frame.typed) + " "
    before, caret, after = shown[: frame.at], shown[frame.at], shown[frame.at + 1 :]
    while before and text_width(before + caret) > width - 7:
        before = before[1:]
    return lines + [[]] * (room > 4) + [[("  › ", "key"), (before, "typed"), (caret, "caret"), (after, "typed")]]


def _text_body(frame: Frame, rows: Sequence[Row], width: int, room: int) -> List[Line]:
    lines = [part for line in frame.lead.split("\n") for part in wrap(line, width - 4)]
    first = max(0, min(frame.at, len(lines) - room))
    return [[("  " + line, _DIFF_STYLES.get(line[:1], ""))] for line in lines[first : first + room]]


def _busy_body(frame: Frame, rows: Sequence[Row], width: int, room: int) -> List[Line]:
    spin = [("  %s " % _SPINNER[frame.at % len(_SPINNER)], "key"), (frame.title + " …", "")]
    return [spin, *_styled(wrap(frame.lead, width - 6), "lead", "    ")]


_BODIES = {"list": _list_body, "pick": _list_body, "input": _input_body, "text": _text_body, "busy": _busy_body}


# ----- the same screens as numbered prompts -----

_HOW = {"list": "number, %s, or empty for %s", "pick": "number to pick, %s, or empty when %s"}


def prompt_text(menu: Menu) -> str:
    """The screen as plain lines, its rows numbered, for where nothing can be drawn."""
    frame, screen = menu.front, SCREENS[menu.front.screen]
    lead = frame.lead or screen.lead
    lines, rows = ["", "== " + (frame.title or screen.title)] + [lead] * bool(lead), rows_of(menu)
    for i, row in enumerate(rows, 1):
        picked = "[%s] " % row.state if row.state.isdigit() else ""
        mark = " (%s)" % row.state if row.state in ("off", "warning", "error") else ""
        is_new = row.hint and row.hint not in row.cells and (mark or not any(row.cells[1:]))
        why = " - " + one_line(row.hint, 200) if is_new else ""
        lines.append("%3d  %s%s%s%s" % (i, picked, "  ".join(filter(None, map(one_line, row.cells))), mark, why))
    lines += ["error: " * menu.is_error + menu.note] if menu.note else []
    if screen.kind == "input" and not frame.hidden:
        lines.append("[%s] empty leaves it, - clears it" % one_line(frame.typed))
    keys = dict(keys_of(menu, rows[0].item if rows else None))
    empty = keys["enter" if screen.kind == "pick" else "esc"]
    shown = (name for name in keys if keys[name] != "pick" and name not in ("enter", "esc"))
    words = ", ".join("%s%s %s" % (name, " N" * _wants_number(menu, name), keys[name]) for name in shown)
    return "\n".join(lines + ([_HOW[screen.kind] % (words, empty)] if screen.kind in _HOW else []))


def _wants_number(menu: Menu, key: str) -> bool:
    """Whether a key must be told for which row: no row is seen to be selected at a prompt."""
    return key in _ROW_KEYS[1:] and (key, menu.front.screen) != ("t", "provider")  # a test of the one that is shown


def answer_keys(menu: Menu, answer: str) -> Tuple[Menu, List[str]]:
    """A line typed at a prompt as the menu and the keys that mean it."""
    kind, text = SCREENS[menu.front.screen].kind, answer.strip()
    if kind == "input" and not (text or menu.front.hidden):
        return menu, ["esc"]
    if kind == "input":
        typed = "" if text == "-" and not menu.front.hidden else answer
        return _swap(menu, typed=typed, at=len(typed)), ["enter"]
    found = re.fullmatch("(?:([A-Za-z?/]|space) *)?([0-9]{1,6})", text)  # "d 3": a key, and the row it is for
    if kind in _HOW and _wants_number(menu, text) and len(rows_of(menu)) > 1:
        return menu._replace(note="for which row? Give its number, too: %s 2" % text, is_error=True), []
    if kind not in _HOW or not found:
        return menu, [text] if text else ["enter" if kind == "pick" else "esc"]
    key, number = found.groups()
    if not 0 < int(number) <= len(rows_of(menu)):
        return menu._replace(note="there is no number " + number, is_error=True), []
    return _swap(menu, at=int(number) - 1), [key or ("enter" if kind == "list" else "space")]


# ==============================================================================
# 21 GATEWAY - one request from its head to its end, through injected effects [async]
# ==============================================================================
#
# The gateway is handed a host and, per request, a client; it touches nothing else.
#
# host:   now() -> monotonic seconds; wall() -> Unix seconds; jitter() -> 0..1; new_id() -> str
#         await sleep(seconds); await aside(work, *arguments) -> what `work` returns, computed where nobody waits for it
#         await send(outbound) -> reply: status, headers, await read(timeout_s) -> bytes (b"" at the exact end),
#             close(); send and read raise UpstreamError
#         record(trail): the request has ended; failed(error): an error of the router's own
# client: is_open: the head was sent by a keep-alive already; fail: what writes an error into the stream under way
#         await respond(status, headers, body): a whole answer
#         keep_alive(at, every_ms, head): from `at` on open the stream and send comments while nothing else is sent
#         begin(headers, ping): the head of a stream; ping: what is sent in silence from now on
#         write(data); await relay(reply, processor, idle_ms, left_s) -> "end", UNWATCHED or the
#             label of what broke it
#         await finish(): the end of a complete stream; cut(): end the connection without one
#         host_stops: true when the host cancels the task because it ends itself, while the client still waits
# A client that leaves cancels the task that runs here: what must be undone stands in `finally`.


class Call(NamedTuple):
    """A request's head as a host hands it over. `await read_body()` gives the inflated body or raises RouterError."""

    method: str
    path: str
    query: str
    headers: Headers
    read_body: Callable[[], Any]


class Trail:
    """What became of one request: filled in on the way, complete when it is recorded.

    client: the name of its key, see clientKeys. passed_over: why the origin was not the first to be asked.
    """

    operation = wire = asked = model = outcome = message = client = passed_over = ""
    stream = False
    status = total_ms = 0
    usage: Optional[Usage] = None
    first_content_ms: Optional[int] = None

    def __init__(self, id: str, began: float, began_wall: float) -> None:
        self.id, self.began, self.began_wall = id, began, began_wall
        self.attempts: List[Attempt] = []

    @property
    def path(self) -> str:
        """The attempts in a line: `a/m1=429, b/m2=ok`."""
        return ", ".join(["%s=%s" % (attempt.ref, attempt.label) for attempt in self.attempts])

    def amend(self, **fields: str) -> None:
        """Write into the last attempt what was not known when it ended."""
        self.attempts[-1] = self.attempts[-1]._replace(**fields)


class Answer(NamedTuple):
    """An upstream's answer that the client may have. ref: who gave it. Whole: `body` is all of it in the client's
    format. Streamed: `body` is what was held back, `processor` and `reply` give the rest; no reply: there is no more
    to come."""

    ref: str
    headers: Headers
    body: bytes
    usage: Optional[Usage] = None
    processor: Any = None
    reply: Any = None


class RefusedError(RouterError):
    """An error as the client gets it. info: as its format shows it; headers beside it; body: the upstream's own bytes,
    None when `info` is to be rendered."""

    def __init__(self, message: str, code: str, info: ErrorInfo, headers: Headers, body: Optional[bytes]) -> None:
        super().__init__(message, info.status, code)
        self.info, self.headers, self.body = info, headers, body


Result = Union[Outcome, Answer]  # of an attempt

_JSON_HEADERS: Headers = [("content-type", "application/json")]
_STREAM_HEADERS: Headers = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
]
_PINGS = {"anthropic": sse_event(b'{"type": "ping"}', "ping")}
_NOT_SOON: Headers = [("x-should-retry", "false")]

# What a client of the upstream's own format gets to see of its headers, by their beginnings; all others stay here.
_RETURNED_HEADERS = ("request-id", "x-request-id", "retry-after", "x-ratelimit-", "anthropic-ratelimit-")

# What RFC 9110 wants said with a refusal: 7.8, 15.5.2, 15.5.16, 15.5.22; and what the SDKs want said to one that stays.
_REFUSAL_HEADERS: Dict[Union[int, str], Headers] = {
    "answer_too_large": _NOT_SOON,
    401: [("www-authenticate", "Bearer")],
    415: [("accept-encoding", "gzip, deflate")],
    426: [("upgrade", "HTTP/1.1"), ("connection", "upgrade")],
    503: [("retry-after", "1")],
}

# What `relay` says when the host passed the rest of a stream on without showing it to the processor.
UNWATCHED = "unwatched"

ENDPOINT_HELP = {
    **{name: "/v1" + wire.path for name, wire in WIRE_FORMATS.items()},
    "unified": "/route",
    "models": "/v1/models",
    **{operation: "/v1" + path for operation, path in OPERATION_PATHS.items()},
    "health": "/health",
    "ready": "/ready",
}


class Gateway:
    """Answers calls with one configuration; a reload makes a new gateway around the same health book."""

    def __init__(self, routes: Routes, settings: Settings, access: Access, host: Any, book: Any) -> None:
        self.routes, self.settings, self.access, self.host, self.book = routes, settings, access, host, book
        self.targets: Targets = {}
        self.lessons = BoundedMap(1000)  # the fixes that a model's upstream asked for; a reload forgets
        self.items = ItemMemory()
        self.reasoning = BoundedMap()
        self.info: Json = {}
        self.draining = False

    async def handle(self, call: Call, client: Any) -> None:
        """Answer one call. Every error becomes one in the client's own format, one of the router's own a 500."""
        trail = Trail(self.host.new_id(), self.host.now(), self.host.wall())
        endpoint: Optional[Endpoint] = None
        cors = cors_headers(self.access, call.headers)
        try:
            endpoint = find_endpoint(call.path)
            caller = check_access(self.access, endpoint, call.method, call.headers)
            trail.client = caller or ""
            if call.method == "OPTIONS":
                await client.respond(204, [_allowed(endpoint.methods + ("OPTIONS",)), *cors], b"")
                return
            endpoint = check_method(endpoint, call.method, call.headers)
            if call.method == "POST":
                await Exchange(self, await self._read_inbound(endpoint, call, trail), client, trail, cors).run()
                self._record(trail)
            else:
                await client.respond(*self._get(endpoint, call, caller is not None, cors))
        except BaseException as error:
            if not isinstance(error, Exception) and client.host_stops:
                error = RouterError("the router is stopping", 503, "stopping")
            end = _refusal_of(error, endpoint)
            trail.wire = trail.wire or wire_of_client(call.path, call.headers)
            trail.status, trail.outcome, trail.message = end.status, end.code, end.message
            is_gone = not isinstance(error, Exception)
            if trail.operation or not is_gone:
                self._record(trail)
            if is_gone:
                raise
            if end.code == "internal_error":
                self.host.failed(error)
            await self._refuse(end, client, trail, cors)

    def _record(self, trail: Trail) -> None:
        trail.total_ms = int((self.host.now() - trail.began) * 1000)
        self.host.record(trail)

    async def _refuse(self, error: RefusedError, client: Any, trail: Trail, cors: Headers) -> None:
        """An error as the client's format has it, or in the stream that a keep-alive opened already; a failed Response
        ends that as others do, since behind a cut Codex forgets the error and asks again."""
        wire = WIRE_FORMATS[trail.wire]
        if client.is_open:
            client.write(client.fail(error.info) if client.fail else wire.error_event(error.info, trail.id))
            await client.finish() if wire.name == "responses" and not client.fail else client.cut()
            return
        body = dump_json(wire.render_error(error.info, trail.id)) if error.body is None else error.body
        await client.respond(error.status, _JSON_HEADERS + own_headers(trail) + cors + error.headers, body)

    def _get(self, endpoint: Endpoint, call: Call, authorized: bool, cors: Headers) -> Tuple[int, Headers, bytes]:
        if endpoint.operation == "metrics":
            return 200, [("content-type", "text/plain; version=0.0.4")], self.host.metrics().encode()
        status, body = self._read(endpoint, call, authorized)
        return status, _JSON_HEADERS + cors, dump_json(body)

    def _read(self, endpoint: Endpoint, call: Call, authorized: bool) -> Tuple[int, Json]:
        anthropic = endpoint.wire == "anthropic" or bool(header(call.headers, "anthropic-version"))
        if endpoint.operation == "models":
            query = dict(parse_qsl(call.query))
            limit = int(query["limit"]) if re.fullmatch("[0-9]{1,5}", query.get("limit", "")) else 0
            after = query.get("after_id") or query.get("after") or ""
            return 200, list_models(self.routes, anthropic, after, limit, query.get("before_id") or "")
        if endpoint.operation == "model":
            self.routes.find_plan(endpoint.argument)  # 404 for a model that no request could use
            return 200, model_entry(endpoint.argument, anthropic)
        if endpoint.operation == "health":
            return 200, {"status": "ok", **(self.info if authorized else {})}
        if endpoint.operation == "ready":
            return (503, {"status": "draining"}) if self.draining else (200, {"status": "ready"})
        more = {"version": __version__, "endpoints": ENDPOINT_HELP} if authorized else {}
        return 200, {"name": "llm-router", **more}

    async def _read_inbound(self, endpoint: Endpoint, call: Call, trail: Trail) -> Inbound:
        """What a POST asks for. Whoever holds this holds its body, which may be large: an Exchange lets go of it."""
        data = await call.read_body()
        inbound = await _work(self.host, len(data), read_inbound, endpoint, call.headers, data)
        resolved = self.items.resolve(inbound.body.value, trail.client) if inbound.wire == "responses" else None
        if resolved is not None:
            inbound = inbound._replace(body=JsonObject(resolved))
        trail.operation, trail.wire, asked, trail.stream = inbound[:4]
        trail.asked = asked[:_MAX_NAME]  # it is remembered, logged and stored
        return inbound


async def _work(host: Any, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, which takes its time by a body's `size` in bytes: a large one holds up nobody else."""
    return await host.aside(work, *arguments) if size >= LARGE_BODY_BYTES else work(*arguments)


def _allowed(methods: Sequence[str]) -> Tuple[str, str]:
    return "allow", ", ".join(methods)


def _refusal_of(error: BaseException, endpoint: Optional[Endpoint]) -> RefusedError:
    """What an exception that ended a request means: a task that is cancelled has lost its client, the rest is our own
    fault."""
    if isinstance(error, RefusedError):
        return error.with_traceback(None)  # whose frames hold the request: a cycle, which the collector is slow to see
    if not isinstance(error, Exception):
        error = RouterError("the client has left", 499, "client_gone")
    elif isinstance(error, RecursionError):
        error = RouterError("the request is nested too deeply", 400, "invalid_json")
    elif not isinstance(error, RouterError):
        error = RouterError("the router failed within: %s" % type(error).__name__, 500, "internal_error")
    headers = list(_REFUSAL_HEADERS.get(error.code) or _REFUSAL_HEADERS.get(error.status, ()))
    if endpoint is not None and error.status == 405:
        headers.append(_allowed(endpoint.methods))
    return RefusedError(error.message, error.code, _error_info(error), headers, None)


def _error_info(error: RouterError) -> ErrorInfo:
    return ErrorInfo(error.status, error.message, code=error.code)


def own_headers(trail: Trail) -> Headers:
    """What the router tells of a request beside its answer."""
    headers = [("x-llm-router-request-id", trail.id)]
    for name, text in (("x-llm-router-attempts", trail.path), ("x-llm-router-model", trail.model)):
        if text:
            text = text if text.isascii() else text.encode("ascii", "backslashreplace").decode()
            headers.append((name, text[:2000]))
    return headers


def returned_headers(headers: Sequence[Tuple[str, str]]) -> Headers:
    """The upstream's headers that its own clients may see, as many as they can take: Node reads heads of 16 KB, Python
    100 lines."""
    found = [pair for pair in headers if pair[0].startswith(_RETURNED_HEADERS) and len("".join(pair)) <= 200]
    dropped = hop_by_hop(headers) if found else ()
    return [pair for pair in found if pair[0] not in dropped][:50]


class Exchange:
    """One POST: drives the fallback engine, judges what comes back, delivers one answer.

    Of the attempt that is under way: _candidate, _outbound, _asked_at, _until (when its time is up) and _passes
    (whether its upstream speaks the client's format).
    """

    def __init__(self, gateway: Gateway, inbound: Inbound, client: Any, trail: Trail, cors: Headers) -> None:
        self._gateway, self._inbound, self._client, self._trail, self._cors = gateway, inbound, client, trail, cors
        self._host, self._settings, self._book = gateway.host, gateway.settings, gateway.book
        self._wire = WIRE_FORMATS[inbound.wire]
        targets, lessons, reasoning = gateway.targets, gateway.lessons, gateway.reasoning
        self._requests: Any = Requests(inbound, gateway.settings, targets, lessons, reasoning, trail.client)
        self._stores = inbound.body.value.get("store") is not False
        self._empty: Optional[Answer] = None
        self._deadline = self._until = math.inf

    async def run(self) -> None:
        """Find the candidates and serve the request by its operation. RefusedError when nobody has an answer."""
        plan, client, trail = self._find_plan(), self._client, self._trail
        if self._inbound.operation == "count_tokens":
            await self._count_tokens(plan[0])
            return
        if self._inbound.stream:
            head = [*_STREAM_HEADERS, ("x-llm-router-request-id", trail.id), *self._cors]
            client.keep_alive(trail.began, self._settings.keepalive_ms, head)
        await self._serve(plan)

    def _find_plan(self) -> Plan:
        """Who may be asked. RouterError 404 or 400 when that is nobody."""
        inbound = self._inbound
        plan = self._gateway.routes.find_plan(inbound.asked)
        origin = plan[0]
        home = self._requests.home = origin.provider.id
        if inbound.operation == "embeddings":
            plan = tuple(c for c in plan if c.model_id == origin.model_id and "openai" in c.formats)
            if not plan:
                words = "%s does not speak the openai format, which this endpoint needs" % origin.ref
                raise RouterError(words, 400, "unsupported_format")
        elif inbound.wire == "responses" and needs_server_state(inbound.body.value):
            # What a provider keeps, no other one has (trap 63).
            plan = tuple(c for c in plan if c.provider.id == home)
        return plan

    async def _serve(self, plan: Plan) -> None:
        book, settings, host, trail = self._book, self._settings, self._host, self._trail
        run, action, changes = begin(trail.id, plan, settings, book, host.now())
        self._deadline = run.until
        if action.candidate is not plan[0]:
            trail.passed_over = _why_not_first(plan[0], book)
        try:
            while True:
                book.apply(changes, trail.began)
                if not isinstance(action, Try):
                    await self._conclude(action)
                    return
                if action.delay_ms:
                    await host.sleep(action.delay_ms / 1000)
                result = await self._attempt(action, run)
                if isinstance(result, Answer):
                    book.apply((succeed if result.processor is None else proceed)(run, self._asked_at, book))
                    await self._deliver(result, run)
                    return
                if result.kind == EMPTY and ends_with_tool_result(self._inbound.body.value, self._inbound.wire):
                    run = run._replace(accepts_empty=True)
                run, action, changes = follow(run, result, book, host.now(), host.jitter())
                trail.amend(decision=_decision(action, self._candidate))
        finally:
            book.apply(release(run))

    async def _attempt(self, action: Try, run: Run) -> Result:
        """An attempt at a candidate; again at once while its 400 names what can be mended, or its 500: so llama.cpp
        tells what the model's template refuses. A fallback whose format cannot say what was asked refuses it."""
        self._candidate, ref, has_more = action.candidate, action.candidate.ref, bool(run.remaining)
        known = self._gateway.lessons.get(ref) or ()
        try:
            outbound = await _work(self._host, len(self._inbound.body.data), self._requests.make, action.candidate)
        except RouterError as error:  # a thread's make the SDKs send all that there is, with which others can go on
            if action.candidate is run.plan[0] or error.code.startswith("thread_"):
                raise
            self._trail.attempts.append(Attempt(ref, "", "not_sent", INVALID, 0, 0, "", one_line(error.message)))
            return Outcome(INVALID, error.status, "not_sent", _error_info(error))
        result = await self._call(outbound, action.delay_ms, has_more)
        for _ in range(3):  # many name one field at a time
            is_told = isinstance(result, Outcome) and result.status and result.kind in (INVALID, TEMPORARY)
            mended = self._mended(result, known) if is_told else None
            if mended is None:
                break
            before, result = result, await self._call(mended, 0, has_more)
            if isinstance(result, Outcome) and (self._passes or result.error == before.error):
                self._gateway.lessons.put(ref, known)  # it was not that; and what passes is mended once
                break
            known = self._gateway.lessons.get(ref) or ()
        return result

    def _mended(self, outcome: Outcome, known: Texts) -> Optional[Outbound]:
        """The request without the field that its 400 names and the router itself had added, or without reasoning that
        another provider issued; None when it is neither. known: the lessons that it was made with."""
        sent, ref = self._outbound, self._candidate.ref
        words = [*error_words(parse_body(outcome.body or b"")), outcome.error.message]
        repair, body = repair_history(sent.body, sent.wire, words)
        if body is not None:
            self._trail.amend(decision="again, " + repair)
            return sent._replace(body=dump_json(body))
        fix = "" if self._passes else learn_fix(load_json(sent.body), words, known)
        if not fix or (outcome.kind == TEMPORARY and fix not in TEMPLATE_FIXES):
            return None
        learned = self._gateway.lessons.get(ref) or ()  # by now, from others that were under way, too
        self._gateway.lessons.put(ref, tuple(dict.fromkeys((*learned, fix))))
        self._trail.amend(decision="learned, again: " + fix)
        return self._requests.make(self._candidate)

    async def _call(self, outbound: Outbound, delay_ms: int, has_more: bool) -> Result:
        """One call: an Answer the client may have, or what came instead."""
        provider = self._candidate.provider
        self._outbound, self._asked_at = outbound, self._host.now()
        self._passes = outbound.wire == self._inbound.wire
        own_ms = provider.timeouts.total_ms
        self._until = self._deadline if own_ms is None else self._asked_at + own_ms / 1000 if own_ms else math.inf
        reply, plight = None, ""
        result: Any = None
        try:
            reply = await self._host.send(self._within_deadline(outbound))
            result = await self._judge(reply, has_more)
        except UpstreamError as error:
            result = failed_attempt(TIMEOUT if error.is_timeout else TEMPORARY, error.label, error.message)
        except RouterError as error:  # our own, which says nothing of the upstream
            plight = error.code
            raise
        finally:
            if reply is not None and getattr(result, "reply", None) is None:
                reply.close()
            if isinstance(result, Outcome):
                result = _redacted(result, provider)
            self._note(delay_ms, result, plight)
        return result

    def _within_deadline(self, outbound: Outbound) -> Outbound:
        if self._until == math.inf:
            return outbound
        left_ms = max(math.ceil((self._until - self._host.now()) * 1000), 1)
        own = outbound.timeouts
        less = {name: min(getattr(own, name) or left_ms, left_ms) for name in ("connect_ms", "first_byte_ms")}
        return outbound._replace(timeouts=own._replace(**less), until=self._until)

    def _note(self, delay_ms: int, result: Optional[Result], plight: str) -> None:
        took_ms = int((self._host.now() - self._asked_at) * 1000)
        label, kind, message = "ok", OK, ""
        if result is None:
            label = kind = "stopping" if self._client.host_stops else plight or "client_gone"
        elif isinstance(result, Outcome):
            label, kind, message = result.label, result.kind, one_line(result.error.message)
        ref, wire = self._candidate.ref, self._outbound.wire
        self._trail.attempts.append(Attempt(ref, wire, label, kind, delay_ms, took_ms, "", message))

    # --- what an upstream's answer is, read as far as that takes ---

    async def _judge(self, reply: Any, has_more: bool) -> Result:
        if not 200 <= reply.status < 300:
            body = await self._read_error(reply)
            return judge_error(self._outbound.wire, reply.status, reply.headers, body, self._host.wall())
        if self._inbound.stream and "event-stream" in header(reply.headers, "content-type").lower():
            return await self._judge_stream(reply, has_more)
        return await self._judge_whole(reply, await self._read_whole(reply))

    async def _read_error(self, reply: Any) -> bytes:
        """As much of an error as arrives in a moment: it says enough."""
        body, until = b"", self._host.now() + _ERROR_BODY_S
        with suppress(RouterError):
            while len(body) < 1_000_000 and (data := await reply.read(self._time_left(0, until))):
                body += data
        return body

    async def _read_whole(self, reply: Any) -> bytes:
        """All of a body; of a stream that nobody asked for, what comes until its own end and a moment later."""
        parts: List[bytes] = []
        size, source, watch = 0, self._outbound.wire, None
        while size <= self._settings.max_answer_bytes:
            data = await self._read_on(reply, watch)
            if not data:
                return b"".join(parts)
            parts.append(data)
            if watch is None and size < _MARK_BYTES and _EVENT_LINE.match(b"".join(parts)):
                watch = make_processor(source, source, Context(_BARE_REQUEST, "", 0), self._settings.max_event_bytes)
                data = b"".join(parts)
            if watch is not None:
                watch.feed(data)
            size += len(data)
        raise answer_fault("", 413, "")

    async def _read_on(self, reply: Any, processor: Any, until: float = math.inf) -> bytes:
        """More of an answer; nothing once it has told its end, whatever becomes of the connection (trap 9)."""
        idle_ms = self._outbound.timeouts.idle_ms
        try:
            return await reply.read(self._time_left(processor.patience_ms(idle_ms) if processor else idle_ms, until))
        except UpstreamError:
            if processor is None or not processor.done:
                raise
        return b""

    def _time_left(self, limit_ms: int, until: float = math.inf) -> Optional[float]:
        """Seconds to wait at most: a limit (0: none), a moment, and the deadline of the attempt; None for no end."""
        left_s = min(limit_ms / 1000 or math.inf, max(min(until, self._until) - self._host.now(), 0.0))
        return None if left_s == math.inf else left_s

    async def _judge_whole(self, reply: Any, body: bytes) -> Result:
        source, is_chat = WIRE_FORMATS[self._outbound.wire], self._inbound.operation == "chat"
        parsed = as_dict(await _work(self._host, len(body), try_json, body))
        told = _error_in(parsed)
        if told:
            return self._judge_told(read_error(502, told), reply)
        if not parsed and not (is_chat and _EVENT_LINE.match(body)):
            text = one_line(str(parse_body(body)) if body else "an empty body", 120)
            return failed_attempt(TEMPORARY, "unparsable", "the answer is not what was asked for: " + text)
        passes = self._passes and not self._inbound.stream
        if passes and (not is_chat or not self._records and is_plain_answer(parsed, body, source.name)):
            usage = parsed.get("usage")
            return self._answer(reply, self._named(body), source.read_usage(usage) if isinstance(usage, dict) else None)
        context = self._context()
        try:
            response = parse_answer(parsed, source.name, context) if parsed else fold_stream(source.name, body, context)
        except RouterError as error:
            return failed_attempt(TEMPORARY, "unparsable", error.message)
        if isinstance(response, ErrorInfo):
            return self._judge_told(response, reply)
        if self._records and any(isinstance(block, ToolCall) for block in response.blocks):
            self._recorder().see(unfold(response))
        body = self._named(body) if passes and parsed else self._rendered(response, context)
        answer = self._answer(reply, body, response.usage)
        return self._judge_empty(answer, reply) if is_empty(response) else answer

    def _rendered(self, response: ChatResponse, context: Context) -> bytes:
        """A whole answer as the router writes it in the client's format."""
        whole = self._wire.render_response(response, context)
        if self._remembers:
            self._gateway.items.keep(whole["output"], self._trail.client)
        return render_stream(self._wire.name, response, context) if self._inbound.stream else dump_json(whole)

    def _named(self, body: bytes) -> bytes:
        """A whole body with the model that was asked for, where the format's clients take it for that (trap 44)."""
        return rename_model(body, self._inbound.asked or "smart") if self._wire.name == "anthropic" else body

    def _judge_told(self, info: ErrorInfo, reply: Any) -> Outcome:
        """The outcome of an error inside a 200."""
        if info.code == "truncated":
            return failed_attempt(TEMPORARY, "truncated", info.message)
        return judge_in_band(info, reply.headers, self._outbound.wire, self._host.wall())

    def _judge_empty(self, answer: Answer, reply: Any) -> Outcome:
        self._empty = self._empty or answer
        return Outcome(EMPTY, reply.status, "empty", ErrorInfo(502, "the answer was complete but empty"))

    async def _judge_stream(self, reply: Any, has_more: bool) -> Result:
        """Hold a stream back until its first content: until then it can still turn out to be no answer (trap 130)."""
        source, timeouts, limits = self._outbound.wire, self._outbound.timeouts, self._settings
        secrets = self._outbound.target.secrets
        processor = make_processor(source, self._wire.name, self._context(), limits.max_event_bytes, secrets)
        processor.recorder = self._recorder() if self._records else None
        content_ms = timeouts.first_content_ms if has_more else 0  # the last one gets all the time there is (trap 158)
        content_until = self._asked_at + content_ms / 1000 if content_ms else math.inf
        held, is_first, is_over = b"", True, False
        while not processor.content and not is_over and len(held) <= limits.max_hold_bytes:
            data = await self._read_on(reply, processor, content_until)
            if is_first and data.lstrip().startswith(b"{"):  # JSON, whatever it is called (trap 12)
                return await self._judge_whole(reply, data + await self._read_whole(reply))
            is_first, is_over = is_first and not data.strip(), not data
            held += processor.feed(data) if data else processor.finish()
            if processor.content:
                break
            if processor.failed is not None:
                return self._judge_told(processor.failed, reply)
            if not is_over and self._host.now() >= content_until:
                raise UpstreamError("no content within %d ms" % content_ms, "timeout", True)
        answer = self._answer(reply, held, processor.usage)
        answer = answer._replace(processor=processor, reply=None if is_over else reply)
        return self._judge_empty(answer, reply) if is_over and processor.is_empty else answer

    @property
    def _records(self) -> bool:
        """Whether an answer's reasoning is remembered: where it is translated, and where the upstream wants it back."""
        return not self._passes or self._outbound.target.compat.replays_reasoning

    def _recorder(self) -> ReasoningRecorder:
        return ReasoningRecorder(self._gateway.reasoning, self._requests.issuer(self._candidate.provider.id))

    @property
    def _remembers(self) -> bool:
        """Whether the client may refer to what it gets: it is the router's own writing, and to be stored."""
        return self._inbound.wire == "responses" and not self._passes and self._stores

    def _context(self) -> Context:
        """What reading and writing the answer need of the request: not what was said, nor what its tools are for."""
        request = _BARE_REQUEST if self._passes else self._requests.neutral
        model, body = self._inbound.asked or "smart", self._outbound.body
        tools = [Tool(tool.name, kind=tool.kind, extra=tool.extra) for tool in request.tools]
        counts = get_dict(self._inbound.body.value, "stream_options").get("include_usage") is True
        request = request._replace(model=model, include_usage=counts, messages=[], system=[], tools=tools)
        likely = 0 if self._passes or b";base64," in body else len(body) // 4
        return Context(request, self._trail.id, int(self._host.wall()), likely)

    def _answer(self, reply: Any, body: bytes, usage: Optional[Usage]) -> Answer:
        headers = returned_headers(reply.headers) if self._passes else []
        return Answer(self._candidate.ref, headers, body, usage)

    # --- what the client gets ---

    async def _deliver(self, answer: Answer, run: Optional[Run]) -> None:
        trail, client, processor = self._trail, self._client, answer.processor
        trail.model, trail.status, trail.outcome, trail.usage = answer.ref, 200, OK, answer.usage
        trail.first_content_ms = int((self._host.now() - trail.began) * 1000)
        headers = own_headers(trail) + self._cors + answer.headers
        self._let_go()
        if not self._inbound.stream:
            await client.respond(200, _JSON_HEADERS + headers, answer.body)
            return
        try:
            client.begin(_STREAM_HEADERS + headers, _PINGS.get(self._wire.name, SSE_COMMENT))
            client.write(answer.body)
            if processor is None:
                await client.finish()
            else:
                await self._relay(answer, run)
        finally:
            if answer.reply is not None:
                answer.reply.close()
            if processor is not None:
                trail.usage = processor.usage or trail.usage
                self._gateway.items.keep(processor.items if self._remembers else (), trail.client)

    def _let_go(self) -> None:
        """Drop the request: nobody else will be asked, and there may be hundreds of long ones behind streams that take
        minutes."""
        self._requests = None
        (*told, _), (target, path, headers, _, *rest) = self._inbound, self._outbound
        self._inbound, self._outbound = Inbound(*told, JsonObject({})), Outbound(target, path, headers, b"", *rest)

    async def _relay(self, answer: Answer, run: Optional[Run]) -> None:
        """The rest of a stream, and an honest end: after content a failure is told in the stream, then the connection
        is cut without the last chunk, so that no client takes half an answer for a whole one (traps 14, 134)."""
        client, processor, trail, book = self._client, answer.processor, self._trail, self._book
        broken, late = "end", None
        if answer.reply is not None and processor.failed is None:
            idle_ms, client.fail = self._outbound.timeouts.idle_ms, processor.fail  # which knows the event's number
            left_s = self._time_left(processor.patience_ms(0))  # it may all be there, and its end never come
            broken = await client.relay(answer.reply, processor, idle_ms, left_s)
        if broken == "end" or processor.done or processor.failed is not None:
            client.write(processor.finish())
        elif broken != UNWATCHED:
            words = "the upstream's answer broke off, connection lost: " + broken
            late = failed_attempt(TIMEOUT if broken == "timeout" else TEMPORARY, broken, words)
            client.write(processor.fail(late.error._replace(code="upstream_" + broken)))
        failure = processor.failed
        if failure is None:
            book.apply(succeed(run, self._asked_at, book) if run is not None else ())
            await client.finish()
            return
        late = late or self._judge_told(failure, answer)
        trail.outcome, trail.message = late.kind, one_line(failure.message)
        trail.amend(label=late.label, kind=late.kind, decision="too late to fall back", message=trail.message)
        book.apply(fail_late(run, late, book, self._host.now()) if run is not None else (), trail.began)
        client.cut()

    async def _conclude(self, action: Union[Deliver, GiveUp]) -> None:
        """Nobody answered, or what came is the answer: an empty answer, an error unchanged, or the router's own words.
        The errors are raised as RefusedError."""
        outcome, body = action.outcome, None
        if isinstance(action, GiveUp):
            status = give_up_status(outcome, self._wire.name)
            info = outcome.error._replace(status=status, message=give_up_message(outcome, self._trail), type="")
            soon = action.retry_after
            headers = _NOT_SOON if soon is None else [("retry-after", str(math.ceil(soon)))]
        elif outcome.kind == EMPTY and self._empty is not None:
            await self._deliver(self._empty, None)
            return
        else:
            info = outcome.error._replace(status=outcome.status or 502)
            body = outcome.body if outcome.wire == self._wire.name else None
            headers = returned_headers(outcome.headers if body is not None else ())
            headers += _NOT_SOON if outcome.kind == POLICY else []
        raise RefusedError(one_line(outcome.error.message), outcome.kind, info, headers, body)

    async def _count_tokens(self, candidate: Candidate) -> None:
        """Ask a candidate that can count, else estimate. Never an error, never a word in the health book (trap 118)."""
        trail, count, wire = self._trail, None, "anthropic" if "anthropic" in candidate.formats else ""
        if wire:
            limits = Timeouts(*[self._settings.count_tokens_timeout_ms] * 5)
            self._candidate = candidate._replace(provider=candidate.provider._replace(timeouts=limits))
            with suppress(RouterError):
                result = await self._call(self._requests.make(self._candidate), 0, False)
                count = as_dict(try_json(result.body or b"")).get("input_tokens")
        trail.status, trail.outcome = 200, OK
        if type(count) is not int or count < 0:
            count = await self._host.aside(estimate_tokens, self._inbound.body.value, candidate.model_id, wire)
        headers = _JSON_HEADERS + own_headers(trail) + self._cors
        await self._client.respond(200, headers, dump_json({"input_tokens": count}))


_BARE_REQUEST = ChatRequest("", [])
_EVENT_LINE = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")  # a stream's first (traps 4, 5, 11)
_MARK_BYTES = 64  # within which a body shows what it is
_ERROR_BODY_S = 5.0


def _decision(action: Any, candidate: Candidate) -> str:
    """What follows an attempt at `candidate`, in words."""
    if isinstance(action, Try):
        same = action.candidate is candidate
        return "retry in %d ms" % action.delay_ms if same else "fall back to %s" % action.candidate.ref
    return "return it" if isinstance(action, Deliver) else "give up"


def _why_not_first(origin: Candidate, book: Any) -> str:
    last = max(map(book.read, (origin.ref, provider_key(origin))), key=lambda health: max(health[:2]))
    return "%s, which cools after: %s" % (origin.ref, (last.reason or "failures").replace("_", " "))


def is_empty(response: ChatResponse) -> bool:
    """Whether a complete answer says nothing at all: a normal stop without text, reasoning, tool call or refusal.

    A Responses answer that is still queued, as it was asked for (`background`), is no such thing.
    """
    if response.stop_reason not in ("end_turn", "stop_sequence", "tool_use") or own_extra(response, "responses"):
        return False
    return not any(isinstance(block, (ToolCall, Opaque)) or getattr(block, "text", "") for block in response.blocks)


def _redacted(outcome: Outcome, provider: Provider) -> Outcome:
    """An outcome in which the provider's secrets, should the upstream echo them, are masked (trap 183)."""
    body, secrets = outcome.body, secrets_of(provider)
    if body is not None:
        body = mask_in(body.decode("utf-8", "surrogateescape"), secrets).encode("utf-8", "surrogateescape")
    headers = tuple((name, mask_in(value, secrets)) for name, value in outcome.headers)  # of a redirect: where to
    error = outcome.error._replace(message=mask_in(outcome.error.message, secrets))
    return outcome._replace(body=body, error=error, headers=headers)


def give_up_status(outcome: Outcome, wire: str) -> int:
    """The client's status when nobody could serve. An upstream's bad key is the operator's fault, never the client's
    (trap 127), nor is what a proxy wants of the router, nor the failure that an aggregator calls a 400 (trap 128)."""
    is_not_clients = outcome.kind == AUTH or (outcome.kind, outcome.status) in ((TEMPORARY, 400), (FORBIDDEN, 407))
    if is_not_clients or 200 <= outcome.status < 400 or outcome.status > 599:
        return 502
    if outcome.status in (503, 529):
        return 529 if wire == "anthropic" else 503
    return outcome.status or (504 if outcome.kind == TIMEOUT else 502)


def give_up_message(outcome: Outcome, trail: Trail) -> str:
    """The router's own error in words: the origin's error and every attempt, since clients show nothing else (trap
    125)."""
    text = outcome.error.message or outcome.label
    if outcome.kind == AUTH:
        text = "the provider refused the API key that is configured for it: " + text
    return "%s (attempts: %s)" % (one_line(text, 500), trail.path)


# ==============================================================================
# 22 PROBE - which formats, auth styles and models a provider really serves [async]
# ==============================================================================
#
# host: as the gateway's (now, wall, send), and `await gather(function, arguments)`, which awaits the function with each
#       tuple of arguments, a few at a time. A probe knows no health: what it meets changes nothing for requests.
# First GET .../models, which costs nothing; then one model in every format; then the others in the formats that were
# not refuted. A call is repeated only when it was refused: for the way the key was shown, or for a field of its own.

PROBE_LIMIT_S = 60.0
PROBE_CALLS = 24
_PROBE_CALL_MS, _PROBE_LISTING_MS = 30_000, 10_000
_PROBE_TRIES = 5  # of one model in one format
_TINY, _AMPLE = 16, 1024  # tokens: 16 is the least that Responses takes (developers.openai.com/api/reference)
_MAX_LISTING_BYTES = 10_000_000
_MAX_LISTED = 5000

_WANTS_MORE = re.compile(r"(?s)\A(?=.*max\w{0,40}_tokens)(?=.*(?:minimum|at least|>|greater|too (?:small|low)|below))")
_NO_CHAT = (
    "(?i)embed|rerank|bge|minilm|whisper|tts|speech|audio|transcri|realtime|image|dall|flux|diffusion|video|sora|veo"
    "|moderation|guard|ocr|search|davinci|babbage"
)
_GUESSES = 3  # listed models to try where none is named: lists hold models that are gone, or not for chat


class ProbePlan(NamedTuple):
    """What to ask a provider. models: ids, () for one of those that it lists; calls: how many pairs of model and format
    at most, 0 for the listing only. auths: ways to show the key per format, in the order in which they are tried.
    learns: the fields of the provider that were not said, so that what is found can fill them. limit_s: for all."""

    provider: Provider
    models: Texts = ()
    wires: Texts = WIRES
    auths: Dict[str, Tuple[Auth, ...]] = {}
    calls: int = PROBE_CALLS
    learns: Texts = ()
    limit_s: float = PROBE_LIMIT_S


class ProbeRow(NamedTuple):
    """One model in one format. state: waiting | asking | ok | tentative (neither shown nor refuted) | no. label: as in
    Outcome; kind: what came, a word of OUTCOMES, "" while nothing has; about: what a `no` is due to: key, format,
    model. auth: the way in which the key was shown last. note: what was said."""

    model: str
    wire: str
    state: str = "waiting"
    label: str = ""
    note: str = ""
    took_ms: int = 0
    kind: str = ""
    about: str = ""
    auth: Auth = Auth()


class ProbeReport(NamedTuple):
    """What a probe has found so far. listed: the ids in the provider's list, None when it gave none, and then
    listing_status (0: nobody answered) and listing_note say why."""

    listed: Optional[Texts] = None
    listing_status: int = 0
    listing_note: str = ""
    rows: Tuple[ProbeRow, ...] = ()

    @property
    def formats(self) -> Texts:
        """The formats in which a model answered; when none did, those that an answer has at least not refuted."""
        likely = {row.wire for row in self.rows if row.state == "tentative" and row.label[:1] == "4"}
        found = {row.wire for row in self.rows if row.state == "ok"} or likely
        return tuple(wire for wire in WIRES if wire in found)

    @property
    def is_tentative(self) -> bool:
        """Whether no model answered, so that `formats` is a guess."""
        return all(row.state != "ok" for row in self.rows)

    @property
    def unconfirmed(self) -> Texts:
        """The models that answered in no format."""
        good = {row.model for row in self.rows if row.state == "ok"}
        return tuple(dict.fromkeys(row.model for row in self.rows if row.model not in good))


def plan_probe(provider: Provider, raw: Json, models: Sequence[str] = ()) -> ProbePlan:
    """The plan for a provider whose entry in the file is `raw`: what that fixes is not tried in other ways.
    models: () for the provider's own; "*" stands for one that it lists."""
    says = [key for key in ("formats", "auth", "authByFormat") if get_field(raw, "provider", key)]
    wires = tuple(wire for wire in (provider.formats if "formats" in says else WIRES) if provider.base_urls.get(wire))
    open_auth = says in ([], ["formats"]) and bool(provider.api_key)
    others = (Auth("bearer"), Auth("x-api-key")) if open_auth else ()
    auths = {wire: tuple(dict.fromkeys((provider.auths[wire],) + others)) for wire in wires}
    names = dict.fromkeys(models or [model.id for model in provider.models if model.enabled])
    learns = ("formats",) * ("formats" not in says) + ("authByFormat",) * open_auth
    return ProbePlan(provider, tuple(name for name in names if name != "*"), wires, auths, learns=learns)


def learned_fields(plan: ProbePlan, report: ProbeReport) -> Json:
    """What a probe found, as fields of the provider's entry that it did not have: formats, and auth where it is not
    what each format does unasked. Empty when there is nothing to rely on."""
    shown = {row.wire: row.auth.type for row in reversed(report.rows) if row.state == "ok"}
    odd = {wire: {"type": type_} for wire, type_ in shown.items() if type_ != USUAL_AUTHS[wire].type}
    found = {"formats": list(report.formats), "authByFormat": odd}
    return {name: value for name, value in found.items() if value and name in plan.learns}


# What the first model's call says of all further ones in its format.
_ALIKE = {
    "key": {"state": "no", "about": "key", "note": "the key is refused"},
    "format": {"state": "no", "about": "format", "note": "the format is not spoken"},
    "nobody": {"state": "tentative", "note": "not asked, nobody answers"},
}
_UNANSWERED = {"asking": "no answer in time", "waiting": "not asked"}


class Probe:
    """Asks one provider. `report` is at any time what is known by then; a new value replaces it with every step."""

    def __init__(self, plan: ProbePlan, settings: Settings, host: Any) -> None:
        self.report = ProbeReport()
        self._plan, self._settings, self._host = plan, settings, host
        self._rows: Dict[Tuple[str, str], ProbeRow] = {}
        self._auths = {wire: list(plan.auths.get(wire) or [plan.provider.auths[wire]]) for wire in plan.wires}

    async def run(self) -> None:
        """Ask everything. Whoever cancels this keeps what `report` says, see `end`."""
        wires, calls = self._plan.wires, self._plan.calls
        await self._host.gather(self._list, [(wire,) for wire in self._listing_wires()])
        listed = sorted(self.report.listed or (), key=lambda name: bool(re.search(_NO_CHAT, name)))
        guesses = [(name,) for name in listed[:_GUESSES]] or [()]
        for models in [self._plan.models] if self._plan.models else guesses:
            pairs = [(model, wire) for model in models for wire in wires] if calls else []
            self._rows = {pair: ProbeRow(*pair) for pair in pairs}
            await self._host.gather(self._ask, pairs[: len(wires)])
            first = [self._rows[pair] for pair in pairs[: len(wires)]]
            if any(row.state == "ok" for row in first) or all(row.about != "model" for row in first):
                break
        is_absent = all(row.about == "format" for row in first)  # more likely the model that is not there
        deaf = {row.wire for row in first if row.state == "tentative" and not row.label[:1].isdigit()}
        why = {row.wire: "" if is_absent else "nobody" if row.wire in deaf else row.about for row in first}
        for pair in pairs[len(wires) :]:
            self._put(pair, **_ALIKE.get(why[pair[1]], {}))
        left = [pair for pair in pairs if self._rows[pair].state == "waiting"]
        await self._host.gather(self._ask, left[: max(0, calls - len(first))])

    def end(self) -> None:
        """Nothing more will come: what was not answered stays tentative."""
        for pair, row in self._rows.items():
            if row.state in _UNANSWERED:
                self._put(pair, state="tentative", note=_UNANSWERED[row.state])

    def _put(self, pair: Tuple[str, str], **changes: Any) -> None:
        self._rows[pair] = self._rows[pair]._replace(**changes)
        self.report = self.report._replace(rows=tuple(self._rows.values()))

    # ----- the list of models -----

    def _listing_wires(self) -> List[str]:
        """One format for each place where a list may be."""
        places: Dict[Any, str] = {}
        for wire in sorted(self._plan.wires, key=lambda wire: wire != self._plan.provider.preferred):
            target = make_target(self._plan.provider, wire)
            places.setdefault((target.key, target.path[: -len(WIRE_FORMATS[wire].path)], wire == "anthropic"), wire)
        return list(places.values())

    async def _list(self, wire: str) -> None:
        """One list ({"data": [{"id"}]}, platform.claude.com/docs/en/api/models-list and
        developers.openai.com/api/reference; bare at Together); a key that it refuses is shown in the next way."""
        auths = self._auths[wire]
        for auth in list(auths):
            status, note, body = await self._get_list(wire, auth)
            if status not in (401, 403):
                auths.sort(key=lambda other, good=auth: other != good)
                break
        if note:
            if self.report.listed is None:
                self.report = self.report._replace(listing_status=502 if status == 200 else status, listing_note=note)
            return
        entries = map(as_dict, get_list(body, "data") or get_list(body, "models"))
        names = (as_text(entry.get("id") or entry.get("name")) for entry in entries)  # the latter at Cohere
        listed = dict.fromkeys((*(self.report.listed or ()), *filter(None, names)))
        self.report = self.report._replace(listed=tuple(listed)[:_MAX_LISTED], listing_status=200, listing_note="")

    async def _get_list(self, wire: str, auth: Auth) -> Tuple[int, str, Json]:
        """A list's status, what is wrong with it ("" for nothing), and its body."""
        target = self._target(wire, auth)
        path, question, query = target.path.partition("?")
        path = _FULL_ENDPOINT.sub("", path) + "/models"
        where = mask_url(target.key.origin + path + question + query)
        words = "&".join(filter(None, (query, "limit=1000" if wire == "anthropic" else "")))  # unasked it gives 20
        try:
            status, _, data = await self._exchange(target, wire, path + "?" * bool(words) + words)
        except RouterError as error:
            return 0, "%s: %s" % (where, error.message), {}
        body = as_dict(try_json(b'{"data":%s}' % data if data.lstrip()[:1] == b"[" else data))
        is_list = any(isinstance(body.get(key), list) for key in ("data", "models"))
        words = " answers %d" % status if status != 200 else "" if is_list else " gives no list"
        return status, words and where + words, body

    # ----- one model in one format -----

    async def _ask(self, model: str, wire: str) -> None:
        began, auths, limit, fixes = self._host.now(), list(self._auths[wire]), _TINY, ()
        self._put((model, wire), state="asking")
        for _ in range(_PROBE_TRIES):
            outcome, body = await self._call(model, wire, auths[0], limit, fixes)
            words = [*error_words(parse_body(outcome.body or b"")), outcome.error.message[:20_000]]
            text = "\n".join(words).lower()
            found = _read_outcome(outcome, text)
            fix = learn_fix(body, words, fixes) if outcome.kind == INVALID else ""
            if found["about"] == "key" and len(auths) > 1:
                auths.pop(0)
            elif outcome.kind == INVALID and limit == _TINY and _WANTS_MORE.search(text):
                limit = _AMPLE
            elif fix:
                fixes += (fix,)
            else:
                break
        if outcome.kind == OK:
            self._auths[wire] = auths  # the further models need not try again
        self._put((model, wire), took_ms=int((self._host.now() - began) * 1000), auth=auths[0], **found)

    async def _call(self, model: str, wire: str, auth: Auth, limit: int, fixes: Texts) -> Tuple[Outcome, Json]:
        """What one small question comes to, and the body that asked it."""
        body: Json = {}
        try:
            target = self._target(wire, auth)
            request = ChatRequest(model, [Message("user", [Text("Say: ok")])], max_tokens=limit)
            body = apply_fixes(render_request(request, wire), target.compat.fixes + fixes)
            status, headers, data = await self._exchange(target, wire, target.path, dump_json(body))
            outcome = _judge_probe(wire, status, headers, data, self._host.wall(), request)
        except UpstreamError as error:
            outcome = failed_attempt(TIMEOUT if error.is_timeout else TEMPORARY, error.label, error.message)
        except RouterError as error:
            outcome = Outcome(INVALID, 0, "unusable", ErrorInfo(error.status, error.message))
        return _redacted(outcome, self._plan.provider), body

    def _target(self, wire: str, auth: Auth) -> Target:
        return make_target(self._plan.provider._replace(auths={wire: auth}), wire)

    async def _exchange(self, target: Target, wire: str, path: str, body: bytes = b"") -> Tuple[int, Headers, bytes]:
        """Status, headers and body of the answer to a question, or to GET."""
        method, most_ms = ("POST", _PROBE_CALL_MS) if body else ("GET", _PROBE_LISTING_MS)
        limits = resolve_timeouts(self._plan.provider, self._settings, False)
        first_byte_ms, idle_ms = (min(ms or most_ms, most_ms) for ms in (limits.first_byte_ms, limits.idle_ms))
        limits = limits._replace(first_byte_ms=first_byte_ms, idle_ms=idle_ms)
        headers = merge_headers(target, [], wire, wire, False)
        reply = await self._host.send(Outbound(target, path, headers, body, wire, False, limits, method))
        data = bytearray()  # a copy of all for each small piece would take minutes
        try:
            while len(data) < _MAX_LISTING_BYTES and (part := await reply.read(idle_ms / 1000)):
                data += part
        finally:
            reply.close()
        return reply.status, reply.headers, bytes(data)


def _judge_probe(wire: str, status: int, headers: Headers, data: bytes, now: float, request: ChatRequest) -> Outcome:
    """The outcome of a whole answer; one that is cut short by its token limit and so says nothing is fine here."""
    if not 200 <= status < 300:
        return judge_error(wire, status, headers, data, now)
    parsed = as_dict(try_json(data))
    context = Context(request, "probe", int(now))
    told = _error_in(parsed)
    if told:
        outcome = judge_in_band(read_error(502, told), headers, wire, now)
        return outcome._replace(kind=NOT_FOUND) if "404 NOT_FOUND" in outcome.error.message else outcome  # z.ai
    try:
        if parsed:
            parse_answer(parsed, wire, context)
        elif isinstance(fold_stream(wire, data, context), ErrorInfo):
            raise RouterError("not an answer: %s" % one_line(str(parse_body(data)), 120))
    except RouterError as error:
        return failed_attempt(NOT_FOUND, "unparsable", error.message)
    return Outcome(OK, status, str(status))


def _read_outcome(outcome: Outcome, words: str) -> Json:
    """What an outcome says of a model in a format, as fields of its row; a 404 may speak of the model or the format."""
    of_model, about = outcome.status and re.search(r"\bmodels?\b", words), ""
    if outcome.kind == AUTH or outcome.kind == FORBIDDEN and not of_model:
        about = "key"
    elif outcome.kind in (FORBIDDEN, NOT_FOUND) or outcome.status in (405, 501):
        about = "model" if of_model else "format"
    state = "ok" if outcome.kind == OK else "no" if about else "tentative"
    note = "" if state == "ok" else one_line(outcome.error.message, 160)
    if 300 <= outcome.status < 400:
        note = "redirects to %s: correct the base URL" % one_line(mask_url(header(outcome.headers, "location")), 160)
    return {"state": state, "label": outcome.label, "note": note, "kind": outcome.kind, "about": about}


def probe_table(report: ProbeReport) -> Tuple[Texts, List[Texts]]:
    """A report as a head and rows of text, for commands and menu."""
    rows = []
    for row in report.rows:
        listed = "?" if report.listed is None else "yes" if row.model in report.listed else "no"
        how = ("%d ms" % row.took_ms, row.auth.type) if row.kind else ("", "")
        rows.append((row.model, listed, row.wire, row.state, row.label, *how, row.note))
    return ("MODEL", "LISTED", "FORMAT", "RESULT", "ANSWER", "TOOK", "AUTH", "NOTE"), rows


# ==============================================================================
# 23 FILES - configuration and state on disk: atomic, private, locked [host]
# ==============================================================================

CONFIG_PATH = "~/.llm-router.json"

_COMMENTED = ".commented.bak"  # beside .bak, which the next edit replaces
_LOCK_WAIT_S = 10.0
_EDIT_ATTEMPTS = 5


class Loaded(NamedTuple):
    """A configuration as found. document: None when there is none. source: where from, in words. path: its file, ""
    when it came from a variable. warnings: what is wrong with the file itself. text: as it was read. stamp: the file's
    (see file_stamp), taken before it was read."""

    document: Optional[Json]
    source: str
    path: str
    warnings: Texts = ()
    text: str = ""
    stamp: Tuple[Any, ...] = ()


def config_path(given: str = "") -> str:
    """The configuration file's path, absolute; `given` is the --config flag, "" for none."""
    return os.path.abspath(os.path.expanduser(given or CONFIG_PATH))


def load_config(given: str, environ: Environ) -> Loaded:
    """The configuration from the first source that has one: --config (`given`), a variable, the usual file.
    ConfigError when it cannot be read or is no JSON object."""
    name, text = ("", "") if given else find_config_variable(environ)
    if name:
        text = unpack_config(text)
        return Loaded(parse_config_text(text, name), "the variable " + name, "", text=text)
    path = config_path(given)
    stamp, (data, mode) = file_stamp(path), read_bytes(path)
    if data is None:
        return Loaded(None, path, path)
    warnings = ("%s can be read by others (mode %04o): chmod 600 it" % (one_line(path), mode),) if mode else ()
    return Loaded(parse_config_text(data, one_line(path)), path, path, warnings, data.decode("utf-8-sig"), stamp)


def file_stamp(path: str) -> Tuple[Any, ...]:
    """What changes whenever a file is written or replaced, also where its time is set back (`cp -p`): times, size,
    inode. Empty while there is none, and for a pipe, which changes as it is read."""
    with suppress(OSError):
        status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        return (times, status.st_size, status.st_ino) if os.path.isfile(path) else ()
    return ()


def read_bytes(path: str) -> Tuple[Optional[bytes], int]:
    """A file's content, None without one, and its mode where others may use it, else 0. ConfigError if unreadable."""
    at_once = lambda path, flags: os.open(path, flags | os.O_NONBLOCK)  # noqa: E731  nobody may write to a pipe
    try:
        is_file = os.name != "posix" or os.path.isfile(path)
        with open(path, "rb", opener=None if is_file else at_once) as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read() if is_file else _read_pipe(file.fileno(), path)
            return data, mode if os.name == "posix" and mode & 0o077 else 0  # Windows has no such bits
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        raise ConfigError("cannot read %s: %s" % (one_line(path), error.strerror or error)) from None


def _read_pipe(descriptor: int, path: str) -> bytes:
    """What comes from a pipe (`--config=<(sops -d FILE)`) or device. ConfigError when it does not come to an end."""
    import select

    poll, data = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(data) < _PIPE_BYTES and poll.poll(_PIPE_SILENCE_S * 1000):
        piece = os.read(descriptor, 65_536)
        if not piece:
            return data
        data += piece
    raise ConfigError("cannot read %s: it is no file, and its end does not come" % one_line(path))


_PIPE_BYTES, _PIPE_SILENCE_S = 2**24, 10


def edit_config_file(path: str, change: Callable[[Json], Edit]) -> Edit:
    """Apply `change` to the configuration file and write it back; the file is made when there is none.

    Writers wait for one another, and a write by a program that knows nothing of the lock is noticed: the change is
    then applied to what that program wrote. On any error the file stays as it was. A text with comments is kept beside
    it. Returns the edit, its notes extended by what else was done.
    """
    import glob

    target = os.path.realpath(path)  # a symbolic link stays a link, and what it leads to is replaced
    make_folder(os.path.dirname(target))
    check_regular(target)
    with file_lock(target):
        for rest in glob.glob("%s.%s.tmp" % (glob.escape(target), "[0-9a-f]" * 12)):  # a writer was killed: keys in it
            _remove(rest)
        for _ in range(_EDIT_ATTEMPTS):
            data, mode = read_bytes(target)
            edit = change(NEW_DOCUMENT if data is None else parse_config_text(data, one_line(path)))
            text = render_document(edit.document)
            if text == data and not mode:
                return edit
            notes = ("%s had mode %04o, now 0600" % (one_line(path), mode),) if mode else ()
            if has_comments((data or b"").decode("utf-8-sig")):
                write_private(target + _COMMENTED, data or b"")
                words = "comments cannot be kept in a file that is written anew: the text with them is %s"
                notes += (words % one_line(target + _COMMENTED),)
            if write_private(target, text, expected=data):
                return edit._replace(notes=edit.notes + notes)
    raise RouterError("%s keeps being changed by another program; nothing was saved" % one_line(path))


def render_document(document: Json, indent: Optional[int] = 2) -> bytes:
    """A document as it is stored: readable JSON, without an indent short."""
    how: Dict[str, Any] = {"indent": indent, "separators": (",", ":" if indent is None else ": ")}
    try:
        return (json.dumps(document, ensure_ascii=False, **how) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, escaped in the file: it can only be kept escaped
        return (json.dumps(document, **how) + "\n").encode("ascii")


def check_regular(path: str) -> None:
    """RouterError for a device, which would be replaced, a pipe, which would be waited for, and links in a circle."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise RouterError("%s is not a regular file" % one_line(path))


def make_folder(path: str) -> None:
    """Make a folder, its owner's only, with all above it, unless it is there. RouterError."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise RouterError("cannot make %s: %s" % (one_line(path), error.strerror or error)) from None


def temporary_folder() -> Any:
    """`with temporary_folder() as path:` a new folder, its owner's only, that goes with all in it. RouterError."""
    import tempfile

    try:
        return tempfile.TemporaryDirectory(prefix="llm-router-")
    except OSError as error:
        raise RouterError("cannot make a temporary folder: %s; set TMPDIR" % (error.strerror or error)) from None


def write_private(target: str, data: bytes, expected: Any = ..., durable: bool = True, mode: int = 0o600) -> bool:
    """Replace the file `target`, or the one that a symbolic link of this name leads to, by `data`: whole or not at all,
    readable by its owner only unless `mode` says otherwise, and if `durable` safe against power loss, which may take a
    tenth of a second.

    Where it is said what is `expected` (what the file held, None when there was none), that is kept as target + ".bak",
    and False is returned, the file as it was, when it holds something else by now. RouterError when writing fails.
    """
    target = os.path.realpath(target)
    check_regular(target)
    complete: List[str] = []  # files that wait for their names
    try:
        complete.append(_write_temporary(target, data, durable, mode))
        if isinstance(expected, bytes):
            complete.append(_write_temporary(target, expected, durable, mode))
            os.replace(complete[1], target + ".bak")
        if expected is not ... and read_bytes(target)[0] != expected:  # the last moment: an editor knows of no lock
            return False
        os.replace(complete[0], target)
    except OSError as error:
        why = "mounted by itself, mount its folder" if error.errno == errno.EBUSY else error.strerror or error
        raise RouterError("cannot write %s: %s; it is unchanged" % (one_line(target), why)) from None
    finally:
        for temporary in complete:  # without its name
            _remove(temporary)
    if durable:
        with suppress(OSError):  # makes the rename durable; some systems cannot, and the file itself is safe by now
            descriptor = os.open(os.path.dirname(target), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return True


def _write_temporary(target: str, data: bytes, durable: bool, mode: int) -> str:
    """A new file beside `target`, 0600 until it is complete, if `durable` on the disk; its path. OSError if not."""
    path = "%s.%s.tmp" % (target, os.urandom(6).hex())
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            with suppress(OSError, AttributeError):  # root that edits a user's file must not lock its owner out
                old, new = os.stat(target), os.fstat(file.fileno())
                if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if mode != 0o600:
            os.chmod(path, mode)
    except BaseException:
        _remove(path)
        raise
    return path


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def open_private(path: str, mode: str) -> Any:
    """The file `path` opened without a buffer, made when it is not there, mode 0600, never through a symbolic link.
    OSError otherwise, also for a pipe that nobody reads."""
    import stat

    more = os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = open(path, mode, 0, opener=lambda name, flags: os.open(name, flags | more, 0o600))  # noqa: SIM115  kept open
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # /dev/null stays everybody's
        os.fchmod(file.fileno(), 0o600)
    elif hasattr(os, "fchmod"):
        os.set_blocking(file.fileno(), True)  # only opening it must not wait
    return file


@contextmanager
def file_lock(target: str) -> Any:
    """`with file_lock(path):` one writer of `path` at a time, through a lock file beside it that goes with its owner.
    RouterError when the directory cannot be written or another writer holds the lock for ten seconds."""
    path, deadline = target + ".lock", time.monotonic() + _LOCK_WAIT_S
    try:
        while (file := _try_lock(path)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
    except OSError as error:
        words = one_line(target), error.strerror or error
        raise RouterError("cannot write beside %s: %s; it is unchanged" % words) from None
    if file is None:
        raise RouterError("another program is changing %s; nothing was saved" % one_line(target))
    try:
        yield
    finally:
        _remove(path)  # before the lock goes; Windows refuses, and the file simply stays
        file.close()


def _try_lock(path: str) -> Any:
    """The lock file, locked, and still the one at its path: its last owner may have removed it; else None. OSError."""
    file = open_private(path, "r+b")
    with suppress(OSError):
        if _lock_descriptor(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    file.close()
    return None


def _lock_descriptor(descriptor: int) -> bool:
    """Take the lock if it is free. Where a system or file system has no locks, the comparison of contents remains."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        return getattr(error, "errno", 0) not in (errno.EAGAIN, errno.EACCES)
    return True


# ==============================================================================
# 24 UPSTREAM - threads dial, the loop talks: connections, their pool, replies [host]
# ==============================================================================
#
# A worker thread does what blocks (DNS, TCP, proxy tunnel, TLS) with http.client. The event loop then sends, waits,
# reads and reuses the connection through add_reader and add_writer, so no thread ever waits for a model: hundreds
# of answers that take minutes cost no thread at all.

_READ_BYTES = 65_536  # from 128 KB on malloc maps fresh pages for every read, which costs 15 us however little comes
_PAUSE_BYTES = 1 << 20
_ABORT_AGAIN_S = 0.05
_NEXT_ADDRESS_S = 0.25
_LATE_S = 0.1  # as exact as time limits are
_LINGER_S = 2.0


class Dial:
    """One connection being made by a worker thread. `abort` ends it from the loop, whatever phase it is in."""

    def __init__(self, target: Target, timeout_s: Optional[float], waiter: Any, network: Any) -> None:
        self.key = target.key
        self.where = self.key.origin
        self.waiter = waiter
        self.sock: Any = None
        self.error: Optional[RouterError] = None
        self.prefix = ""
        self.proxy_headers: Headers = []
        self._timeout_s = timeout_s
        self._network = network
        self.is_aborted = False

    def run(self) -> None:
        """Connect; sets `sock` (non-blocking) or `error`. Runs in a worker thread."""
        try:
            self._connect()
            self.sock.setblocking(False)
        except Exception as error:  # whatever a resolver, proxy or TLS stack raises is the dial's outcome
            self.close()
            self.error = _dial_error(error, self.where)

    def abort(self) -> None:
        """Stop connecting: wakes the thread by shutting the half-made socket down. There may be none yet, but a moment
        later: to be called again until the thread is done."""
        import socket

        self.is_aborted = True
        with suppress(OSError, AttributeError):  # not connecting yet, or closed already
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nobody wants the socket."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def _connect(self) -> None:
        import http.client

        scheme, host, port, _, ca_bundle = self.key
        proxy = self._network.proxy_for(self.key)
        dial_host, dial_port, headers = proxy or (host, port, {})
        self.where += " through the proxy " + origin_url("http", *proxy[:2]) if proxy else ""
        connection = http.client.HTTPConnection(dial_host, dial_port, timeout=self._timeout_s)
        connection._create_connection = self._open  # type: ignore[attr-defined]  # so that abort has the socket
        if proxy and scheme == "https":
            name = "[%s]" % host if ":" in host else host
            connection.set_tunnel(name, port, {"Host": "%s:%d" % (name, port), **headers})
        elif proxy:
            self.prefix = origin_url(scheme, host, port)
            self.proxy_headers = list(headers.items())
        connection.connect()
        if scheme == "https":
            self.sock = self._network.tls_context(ca_bundle).wrap_socket(
                self.sock, server_hostname=host, do_handshake_on_connect=False
            )
            self._check()
            self.sock.do_handshake()

    def _open(self, address: Tuple[str, int], timeout: Optional[float], source: Any = None) -> Any:
        """A socket to the first of the host's addresses that answers. Each is asked a quarter of a second after the one
        before, or at its failure, so that IPv6 that leads nowhere costs no more than that (RFC 8305)."""
        import selectors
        import socket

        failure, until = OSError("the name has no address"), time.monotonic() + (timeout or math.inf)
        places = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
        with selectors.DefaultSelector() as asked:
            try:
                while places or asked.get_map():
                    self._check()
                    if time.monotonic() > until:
                        raise TimeoutError("timed out")
                    try:
                        if places:
                            _ask_address(asked, *places.pop(0))
                        self.sock = _first_connected(asked)
                    except OSError as error:
                        failure = error
                    if self.sock is not None:
                        self.sock.settimeout(timeout)
                        return self.sock
            finally:
                for key in list(asked.get_map().values()):
                    key.fileobj.close()
        raise failure

    def _check(self) -> None:
        if self.is_aborted:
            raise OSError("the request was cancelled")


def _ask_address(asked: Any, family: int, kind: int, proto: int, _: str, place: Any) -> None:
    """Begin to connect to one address; `asked` is the selector that learns of the end. OSError."""
    import selectors
    import socket

    sock = socket.socket(family, kind, proto)
    sock.setblocking(False)
    try:
        sock.connect(place)
    except BlockingIOError:
        pass  # under way
    except OSError:
        sock.close()
        raise
    asked.register(sock, selectors.EVENT_WRITE)


def _first_connected(asked: Any) -> Any:
    """The first socket that connects within the moment that the next address has to wait, or None. OSError when one of
    them fails."""
    import socket

    for key, _ in asked.select(_NEXT_ADDRESS_S):
        asked.unregister(key.fileobj)
        code = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return key.fileobj
        key.fileobj.close()
        raise OSError(code, os.strerror(code))
    return None


def _afresh(error: RouterError) -> RouterError:
    """The same error, to be raised: one that is kept would keep the frames that it passes, and they the request."""
    if isinstance(error, UpstreamError):
        return UpstreamError(error.message, error.label, error.is_timeout)
    return RouterError(error.message, error.status, error.code)


def _dial_error(error: Exception, where: str) -> RouterError:
    import socket
    import ssl

    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # our own plight, which says nothing of them
        return RouterError("the router has no file descriptor left for a connection", 503, "overloaded")
    labels = (
        (socket.gaierror, "dns"),
        (ConnectionRefusedError, "refused"),
        ((TimeoutError, socket.timeout), "connect_timeout"),  # one class since Python 3.10
        (ssl.SSLError, "tls"),
        (ConnectionError, "reset"),
    )
    label = next((label for kind, label in labels if isinstance(error, kind)), "connect_failed")
    return UpstreamError("cannot connect to %s: %s" % (where, one_line(str(error) or label, 160)), label)


def read_proxy(url: str) -> Optional[Tuple[str, int, Dict[str, str]]]:
    """Host and port of an HTTP proxy, and the headers that it wants; None for "" and `none`. OSError for any other."""
    if url in ("", "none"):
        return None
    try:
        parts = urlsplit(url if "://" in url else "http://" + url)
        host, port = parts.hostname if parts.scheme == "http" else "", parts.port or 80
    except ValueError:  # whose words may quote a part of the password
        host = ""
    if not host:
        raise OSError("its proxy is not an http:// URL")
    headers = {}
    if parts.username:
        login = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    return host, port, headers


class Network:
    """How this machine reaches the outside: proxy variables, and one TLS context for each set of certificates.

    ca_bundle: the file of certificates for providers that name none; "" for the system's, which OpenSSL reads from
    SSL_CERT_FILE where that is set.
    """

    def __init__(self, environ: Any, ca_bundle: str = "") -> None:
        import threading

        self._environ = environ
        self._ca_bundle = ca_bundle
        self._lock = threading.Lock()
        self._contexts: Dict[str, Any] = {}

    def tls_context(self, ca_bundle: str) -> Any:
        """The shared client context; making one costs 27 ms, so each is made once, by the first thread that needs
        it. OSError when its file cannot be read."""
        import ssl

        path = os.path.expanduser(ca_bundle or self._ca_bundle)
        with self._lock:
            if path not in self._contexts:
                try:
                    context = ssl.create_default_context(cafile=path or None)
                except OSError as error:
                    raise OSError("the certificates %s: %s" % (one_line(path), error.strerror or error)) from None
                context.set_alpn_protocols(["http/1.1"])
                self._contexts[path] = context
            return self._contexts[path]

    def proxy_for(self, key: UpstreamKey) -> Optional[Tuple[str, int, Dict[str, str]]]:
        """Its provider's own proxy, else that of HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, past which NO_PROXY leads."""
        if not key.proxy and (is_loopback(key.host) or self._is_exempt(key)):
            return None
        return read_proxy(key.proxy or self._variable(key.scheme + "_proxy") or self._variable("all_proxy"))

    def _variable(self, name: str) -> str:
        return self._environ.get(name) or self._environ.get(name.upper()) or ""

    def _is_exempt(self, key: UpstreamKey) -> bool:
        names = [name.strip().lstrip("*.").lower() for name in self._variable("no_proxy").split(",") if name.strip()]
        hosts = "." + key.host.lower(), ".%s:%d" % (key.host.lower(), key.port)
        return any(not name or host.endswith("." + name) for name in names for host in hosts)  # "*" has become ""


class Dialer:
    """Worker threads that connect, started as needed; a slow upstream can never take them all."""

    def __init__(self, loop: Any, max_threads: int, max_per_upstream: int, on_done: Callable[[Dial], None]) -> None:
        import threading
        from queue import SimpleQueue

        self._loop = loop
        self._jobs: Any = SimpleQueue()
        self._closing = threading.Lock()
        self._is_closed = False
        self._max_threads = max_threads
        self._max_per_upstream = max_per_upstream
        self._on_done = on_done
        self._threads = 0
        self._lines: Dict[UpstreamKey, List[Dial]] = {}  # an upstream's dials; beyond the limit they wait

    def submit(self, dial: Dial) -> None:
        """Have a dial made; its `on_done` runs in the loop."""
        line = self._lines.setdefault(dial.key, [])
        line.append(dial)
        if len(line) <= self._max_per_upstream:
            self._start(dial)

    def cancel(self, dial: Dial, aborts: bool = True) -> None:
        """Nobody waits for this dial any more: it is not begun. aborts: nor finished, if it was."""
        line = self._lines.get(dial.key, [])
        if dial in line[self._max_per_upstream :]:
            line.remove(dial)
        elif aborts and dial in line:
            dial.abort()
            self._loop.call_later(_ABORT_AGAIN_S, self.cancel, dial)

    def close(self) -> None:
        """Let every thread end once its dial is over, which is nobody's from now on."""
        with self._closing:
            self._is_closed = True
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0

    def _start(self, dial: Dial) -> None:
        import threading

        busy = sum(min(len(line), self._max_per_upstream) for line in self._lines.values())
        if self._threads < min(busy, self._max_threads):
            with suppress(RuntimeError):  # the system has no thread left: the dial waits for one that is there
                threading.Thread(target=self._work, name="llm-router-dial", daemon=True).start()
                self._threads += 1
        self._jobs.put(dial)

    def _work(self) -> None:
        for dial in iter(self._jobs.get, None):
            dial.run()
            with self._closing:  # a loop that is being closed drops what it is told, socket and all
                if not self._is_closed:
                    self._loop.call_soon_threadsafe(self._finished, dial)
                    del dial  # which has led to a connection with a request, while this waits for the next one
                    continue
            dial.close()
            return

    def _finished(self, dial: Dial) -> None:
        line = self._lines[dial.key]
        line.remove(dial)
        if len(line) >= self._max_per_upstream:
            self._start(line[self._max_per_upstream - 1])
        elif not line:
            del self._lines[dial.key]
        self._on_done(dial)


class Connection:
    """One connection to an upstream, driven by the loop. One exchange at a time; its Reply gets what arrives."""

    def __init__(self, loop: Any, dial: Dial, on_free: Callable[[Connection], None]) -> None:
        import ssl

        self.key = dial.key
        self.prefix = dial.prefix
        self.proxy_headers = dial.proxy_headers
        self.reused = False
        self.idle_since = 0.0
        self.unsent: Any = None
        self.is_closed = False
        self._loop = loop
        self._sock = dial.sock
        self._on_free = on_free
        self._reply: Optional[Reply] = None
        self._is_tls = isinstance(dial.sock, ssl.SSLSocket)
        self._not_yet = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._reads = self._writes = False
        self.resume()

    def start(self, request: bytes, reply: Reply) -> None:
        """Send a request whose answer goes to `reply`. Errors reach the reply."""
        self._reply = reply
        self.unsent = memoryview(request)
        self._send()

    def is_alive(self) -> bool:
        """Whether a kept connection can still be used: nothing may have arrived on it, least of all its end.

        TLS has no MSG_PEEK; there a read that would block means alive, and what it reads otherwise is unasked for.
        """
        try:
            self._sock.recv(1)  # whatever there may be, nobody has asked for it
        except OSError as error:
            return isinstance(error, self._not_yet) and not self.is_closed
        return False

    def pause(self) -> None:
        """Stop reading: the kernel's buffer fills and the upstream waits."""
        if self._reads:
            self._reads = False
            self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Read again; TLS may hold decrypted bytes that no readiness event will announce."""
        if self._reads or self.is_closed:
            return
        self._reads = True
        self._loop.add_reader(self._sock, self._on_readable)
        if self._is_tls and self._sock.pending():
            self._loop.call_soon(self._on_readable)

    def close(self) -> None:
        """Remove both watchers, then close: in any other order the number may be reused and never served."""
        if not self.is_closed:
            self.is_closed, self._reply = True, None  # which holds this, and with it all of a request not sent in full
            self.pause()
            self._loop.remove_writer(self._sock)
            self._sock.close()

    def free(self) -> None:
        """The exchange ended exactly: the connection may serve another."""
        self._reply = None
        self.resume()  # who gets it now waits for an answer, and would not know that the last client was slow
        self._on_free(self)

    def _send(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[self._sock.send(self.unsent) :]
        except self._not_yet:
            self._writes = True
            self._loop.add_writer(self._sock, self._send)
            return
        except OSError as error:
            self._on_readable()  # who refuses a long request (413, 429) may answer it and leave before its end
            self._ended(UpstreamError("the connection broke while sending: " + one_line(str(error), 80), "reset"))
            return
        self.unsent = None
        if self._writes:
            self._writes = False
            self._loop.remove_writer(self._sock)

    def _on_readable(self) -> None:
        """Read what is there and hand it over; again while TLS holds more."""
        while self._reads:
            try:
                data = self._sock.recv(_READ_BYTES)
            except self._not_yet:
                return
            except OSError as error:
                self._ended(UpstreamError("the connection broke: " + one_line(str(error), 80), "reset"))
                return
            if not data or self._reply is None:  # its end, or bytes that nobody asked for
                self._ended(None)
                return
            self._reply.feed(data)
            if not self._is_tls or self.is_closed or not self._sock.pending():
                return

    def _ended(self, error: Optional[UpstreamError]) -> None:
        self.pause()
        if self._reply is None:
            self.close()
        else:
            self._reply.end(error)


class PlainBody:
    """A body without its compression. Some upstreams compress although they were asked not to, a few without saying so
    or say so without doing it (trap 18); its first three bytes show what it is. inflater: None while it is plain."""

    def __init__(self, max_bytes: int) -> None:
        self.is_plain = False
        self.inflater: Optional[Inflater] = None
        self._max_bytes = max_bytes
        self._held = b""

    def feed(self, data: bytes, headers: Headers, is_whole: bool = False) -> bytes:
        """The plain bytes that `data` brought; is_whole: nothing follows. UpstreamProtocolError when it is corrupt."""
        if self.is_plain:
            return data
        if self.inflater is None:
            data, self._held = self._held + data, b""
            if len(data) < 3 and not is_whole:
                self._held = data  # too little to tell
                return b""
            is_gzip = looks_gzipped(data)
            encoding = "gzip" if is_gzip else header(headers, "content-encoding").strip().lower()
            if not is_gzip and encoding != "deflate":
                self.is_plain = True
                return data[3:] if data.startswith(b"\xef\xbb\xbf") else data
            self.inflater = Inflater(encoding, self._max_bytes, answer_fault)
        return self.inflater.feed(data)

    def finish(self) -> bytes:
        """The end: all of a body that is shorter than any mark. UpstreamProtocolError for one that is cut off."""
        if self.inflater is not None:
            self.inflater.finish()
        return self._held


class Reply:
    """An upstream's answer as it arrives: the head first, then the body, pulled with `read` or pushed with `pipe`."""

    def __init__(self, loop: Any, connection: Connection, max_body_bytes: int) -> None:
        self._loop = loop
        self._connection = connection
        self._limit = ("", 0.0)
        self.deadline = math.inf
        self._parser = ResponseParser()
        self._body = PlainBody(max_body_bytes)
        self._parts: List[bytes] = []
        self._buffered = 0
        self._waiter: Any = None
        self._error: Optional[RouterError] = None
        self.is_over = False
        self._on_data: Optional[Callable[[bytes], None]] = None
        self._on_end: Optional[Callable[[str], None]] = None
        self._idle_s = math.inf

    # Only once the head has arrived.
    status = property(lambda self: self._parser.head.status)
    headers = property(lambda self: self._parser.head.headers)

    @property
    def was_untouched(self) -> bool:
        """Whether a kept connection died before the request was sent in full: then nobody can have acted on it."""
        return self._connection.reused and bool(self._connection.unsent) and self._parser.head is None

    async def wait_for_head(self, timeout_s: Optional[float]) -> None:
        """Wait for the final head. UpstreamError when it does not come, or not in time, however it trickles in."""
        began = self._loop.time()
        while self._parser.head is None:
            await self._wait(timeout_s, "the first byte of an answer", began)

    async def read(self, timeout_s: Optional[float]) -> bytes:
        """The body bytes there are, waiting for some; b"" at the exact end. UpstreamError when it breaks off or
        stalls."""
        while not self._parts:
            if self.is_over and self._error is None:
                return b""
            await self._wait(timeout_s, "more of the answer", self._loop.time())
        data = self._take()
        self.resume()
        return data

    def pipe(self, on_data: Callable[[bytes], None], on_end: Callable[[str], None], idle_s: float) -> None:
        """Push from now on: `on_data` gets body bytes as they come, `on_end` "end" or the label of what broke it, be it
        that none came for `idle_s` (0: no limit) while they were read."""
        self._on_data, self._on_end, self._idle_s = on_data, on_end, idle_s or math.inf
        self._limit = ("more of the answer", idle_s)
        if self._parts:
            on_data(self._take())
        if self.is_over:
            self._tell_end()
        elif self._on_data is not None:
            self.resume()

    def pause(self) -> None:
        """Stop reading from the upstream until `resume`."""
        self.deadline = math.inf
        self._connection.pause()

    def resume(self) -> None:
        """Go on reading."""
        if not self.is_over:
            self.deadline = self._loop.time() + self._idle_s if self._on_data is not None else math.inf
            self._connection.resume()

    def close(self) -> None:
        """The answer is not wanted any further. A connection whose answer was not read to its end is cut, which is what
        stops the upstream from working on."""
        self._on_data = self._on_end = None
        if not self.is_over:
            self.end(UpstreamError("nobody wants the rest of the answer", "closed"))

    def feed(self, data: bytes) -> None:
        """Bytes from the connection."""
        if self.is_over:
            return
        if self._on_data is not None:
            self.deadline = self._loop.time() + self._idle_s
        fault: Optional[RouterError] = None
        try:
            body = self._parser.feed(data)
        except UpstreamProtocolError as error:
            body, fault = error.before, error  # what is whole in front of it counts, however the network cut it
        try:
            if body and not self._body.is_plain:
                body = self._body.feed(body, self.headers, self._parser.complete)
        except RouterError as error:
            body, fault = b"", error
        if body and self._on_data is not None:
            self._on_data(body)
        elif body:
            self._parts.append(body)
            self._buffered += len(body)
            if self._buffered > _PAUSE_BYTES:
                self._connection.pause()
        if fault is not None:
            is_ours = fault.code == "answer_too_large"
            self.end(fault if is_ours else UpstreamError(fault.message, "bad_response"))
        elif self._parser.decoder.complete:
            self.end(None)
        elif self._waiter is not None:
            self._wake()

    def end(self, error: Optional[RouterError]) -> None:
        """The exchange is over: by an error, by the peer's FIN or at the answer's exact end, after which the connection
        may serve another; a broken one is never used again."""
        if self.is_over:
            return
        try:
            if error is None:
                self._parser.finish()
                rest = self._body.finish()
                if rest:
                    self._parts.append(rest)
        except RouterError as broken:
            error = UpstreamError(broken.message, "truncated" if self._parser.head is not None else "reset")
        self.is_over, self._error = True, error
        connection = self._connection
        if error is None and self._parser.reusable and connection.unsent is None:
            connection.free()
        else:
            connection.close()
        self._tell_end()
        self._wake()

    def _take(self) -> bytes:
        data, self._parts, self._buffered = b"".join(self._parts), [], 0
        return data

    def _tell_end(self) -> None:
        on_end, self._on_data, self._on_end = self._on_end, None, None
        if on_end is not None:
            on_end("end" if self._error is None else getattr(self._error, "label", self._error.code))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, timeout_s: Optional[float], what: str, since: float) -> None:
        """Wait for a change. UpstreamError when that is an error, or none comes in time, counted from `since`."""
        if self._error is not None:
            raise _afresh(self._error)
        self._waiter = self._loop.create_future()
        if timeout_s is not None:
            self._limit, self.deadline = (what, timeout_s), since + timeout_s
        try:
            await self._waiter
        finally:
            self._waiter, self.deadline = None, math.inf

    def expire(self) -> None:
        """Nothing came until the deadline."""
        what, timeout_s = self._limit
        self.end(UpstreamError("no sign of %s within %g s" % (what, round(timeout_s, 3)), "timeout", True))


class Upstreams:
    """Sends requests: a kept connection if one is free, else a dialled one, whichever is there first."""

    def __init__(self, loop: Any, settings: Settings, environ: Any) -> None:
        self._loop = loop
        self._settings = settings
        self._network = Network(environ, settings.ca_bundle)
        self._dialer = Dialer(loop, settings.dial_threads, settings.dial_threads_per_upstream, self._dialled)
        self._idle: Dict[UpstreamKey, List[Connection]] = {}
        self._waiting: Dict[UpstreamKey, OrderedDict[Any, None]] = {}
        self._open: List[Reply] = []
        self._ticker: Any = None

    async def send(self, outbound: Outbound) -> Reply:
        """Send one request and wait for the head of its answer. UpstreamError when there is none."""
        while True:
            connection = self._take_idle(outbound.target) or await self._connect(outbound)
            reply = Reply(self._loop, connection, self._settings.max_answer_bytes)
            self._open.append(reply)
            if self._ticker is None:
                self._tick()
            path, headers = connection.prefix + outbound.path, outbound.headers + connection.proxy_headers
            connection.start(render_upstream_request(outbound.method, path, headers, outbound.body), reply)
            first_s = outbound.timeouts.first_byte_ms / 1000 or None  # 0 is off
            if first_s and outbound.until < math.inf:  # connecting has taken its part
                first_s = min(first_s, max(outbound.until - self._loop.time(), 0.0))
            try:
                await reply.wait_for_head(first_s)
                return reply
            except UpstreamError as error:
                if error.is_timeout or not reply.was_untouched:
                    raise
            except BaseException:
                reply.close()
                raise

    def close(self) -> None:
        """Drop every kept connection and let the threads end."""
        self._sweep(math.inf)
        if self._ticker is not None:
            self._ticker.cancel()
        self._dialer.close()

    def _take_idle(self, target: Target) -> Optional[Connection]:
        connections = self._idle.get(target.key)
        while connections:
            connection = connections.pop()
            if connection.is_alive():
                return connection
            connection.close()
        return None

    async def _connect(self, outbound: Outbound) -> Connection:
        target, timeout_s = outbound.target, outbound.timeouts.connect_ms / 1000 or None  # 0 is off
        waiter = self._loop.create_future()
        dial = Dial(target, timeout_s, waiter, self._network)
        waiting = self._waiting.setdefault(dial.key, OrderedDict())
        waiting[waiter] = None
        timer = self._loop.call_later(timeout_s, self._too_slow, waiter, dial) if timeout_s else None
        self._dialer.submit(dial)
        try:
            found = await waiter
        except BaseException:
            self._dialer.cancel(dial)
            if waiter.done() and not waiter.cancelled() and isinstance(waiter.result(), Connection):
                self._free(waiter.result())  # it came in the moment the client left
            raise
        finally:
            self._dialer.cancel(dial, False)  # it is no longer needed where another connection came free first
            waiting.pop(waiter, None)
            if timer is not None:
                timer.cancel()
        if not isinstance(found, Connection):
            raise _afresh(found)
        return found

    def _too_slow(self, waiter: Any, dial: Dial) -> None:
        if not waiter.done():
            self._dialer.cancel(dial)
            waiter.set_result(UpstreamError("cannot connect to %s in time" % dial.where, "connect_timeout"))

    def _dialled(self, dial: Dial) -> None:
        if dial.is_aborted:  # what was shut down half-way is of no use to anybody
            dial.close()
            return
        found = dial.error or Connection(self._loop, dial, self._free)
        if not dial.waiter.done():
            dial.waiter.set_result(found)
        elif isinstance(found, Connection):
            self._free(found)

    def _free(self, connection: Connection) -> None:
        """Give a connection to whoever waits longest, else keep it."""
        if connection.is_closed:
            return
        connection.reused = True
        for waiter in self._waiting.get(connection.key, ()):
            if not waiter.done():
                waiter.set_result(connection)
                return
        idle = self._idle.setdefault(connection.key, [])
        connection.idle_since = self._loop.time()
        idle.append(connection)
        if len(idle) > self._settings.pool_size:
            idle.pop(0).close()
        if self._ticker is None:  # its request has ended, it was dialled for nothing
            self._tick()

    def _tick(self) -> None:
        """End the waits that are late, since a timer for each would cost more than a read, and close connections that
        were idle for too long, sooner than upstreams do."""
        now = self._loop.time()
        self._ticker = self._loop.call_later(_LATE_S, self._tick) if self._open or self._idle else None
        for reply in self._open:
            if reply.deadline <= now:
                reply.expire()
        self._open = [reply for reply in self._open if not reply.is_over]
        self._sweep(now - self._settings.pool_idle_ms / 1000)

    def _sweep(self, oldest: float) -> None:
        """Close connections that are idle since before `oldest`, and forget dead ones."""
        for connection in chain.from_iterable(self._idle.values()):
            if connection.idle_since < oldest:
                connection.close()
        alive = {key: [one for one in connections if not one.is_closed] for key, connections in self._idle.items()}
        self._idle = {key: connections for key, connections in alive.items() if connections}


# ==============================================================================
# 25 SERVER - client connections on asyncio streams: one request after another [host]
# ==============================================================================

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_HIGH_WATER_BYTES = 65_536
_TICK_S = 0.25
_HALF_CLOSE_WAIT_S = 0.3
_PROBE_WAIT_S = 0.2
_CLOSING_S = 30.0
_BACKLOG, _ACCEPTS_AT_ONCE, _ACCEPT_REST_S = 1024, 64, 1.0
_SKIP_BYTES = 65_536
_INFLATE_BYTES = 8192
_BUSY_LINGER_S = 0.5
_UPLOAD_BYTES_PER_S = 1024


class ClientGoneError(RouterError):
    """The client's connection is broken: nothing can be sent any more."""

    def __init__(self) -> None:
        super().__init__("the client has left", 499, "client_gone")


class PingingSink:
    """What a client's sink is on every host: a stream's head is sent once, a sign of life whenever there is silence."""

    _send_head: Callable[[Headers], None]
    _send_ping: Callable[[], None]

    def __init__(self, loop: Any) -> None:
        self.is_open = self.ended = self.host_stops = False
        self.fail: Optional[Callable[[ErrorInfo], bytes]] = None
        self.sent_at = 0.0
        self.loop = loop
        self._ping = SSE_COMMENT
        self._every_s = 0.0
        self._early_headers: Headers = []
        self._timer: Any = None

    def keep_alive(self, at: float, every_ms: int, head: Headers) -> None:
        """From `at` on, whenever `every_ms` pass in silence, send a sign of life; the first one opens the stream with
        `head`."""
        if every_ms > 0:
            self._every_s, self._early_headers, self.sent_at = every_ms / 1000, head, at
            self._timer = self.loop.call_later(max(0.0, at + self._every_s - self.loop.time()), self._tick)

    def begin(self, headers: Headers, ping: bytes) -> None:
        """Send the head of a stream, unless a keep-alive has done so."""
        if not self.is_open:
            self._send_head(headers)
        self._ping = ping

    def _tick(self) -> None:
        if self.ended:
            return
        now = self.loop.time()
        if now - self.sent_at >= self._every_s - 0.001:
            if not self.is_open:
                self._send_head(self._early_headers)
            self._send_ping()
            self.sent_at = now
        self._timer = self.loop.call_later(self.sent_at + self._every_s - now, self._tick)

    def hush(self) -> None:
        """No further signs of life: the answer is complete."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.ended = True
        self.hush()


class Sink(PingingSink):
    """Where the gateway puts the answer to one request (see GATEWAY for what each method means)."""

    def __init__(self, connection: ClientConnection, head: HttpRequest) -> None:
        super().__init__(connection.loop)
        self._connection = connection
        self._head = head
        self._chunked = head.version >= (1, 1)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer; that a key was wrong is said the later the more often it happens."""
        connection = self._connection
        keys = len(offered_keys(self._head.headers)) if status == 401 else 0
        if keys:  # who shows none does not guess
            await connection.server.delay_refusal(connection, keys)
        self._end()
        if status == 499 and not connection.body_is_read:  # a word of the log's; who still listens sent half a request
            status = 400
        keep_alive = connection.may_keep_alive(self._head)
        connection.closes = not keep_alive
        bare, date = self._head.method == "HEAD", connection.server.date()
        if connection.send(render_response(status, headers, body, head_only=bare, keep_alive=keep_alive, date=date)):
            await connection.drain()

    def begin(self, headers: Headers, ping: bytes) -> None:
        """Send the head of a stream; the gateway has let go of the request's body."""
        super().begin(headers, ping)
        self._connection.forget_body()

    def write(self, data: bytes) -> bool:
        """Send a piece of the stream; whether the client is behind with reading."""
        if not data:
            return False
        self.sent_at = self.loop.time()
        return self._connection.send(encode_chunk(data) if self._chunked else data)

    async def relay(self, reply: Reply, processor: Any, idle_ms: int, left_s: Optional[float]) -> str:
        """Pump a reply through `processor` to the client until it ends; returns "end" or the label of what broke it."""
        return await _Relay(self, self._connection, reply, processor).run(idle_ms / 1000, left_s)

    async def finish(self) -> None:
        """The stream is complete: send its last chunk."""
        self._end()
        if self._chunked:
            self._connection.send(LAST_CHUNK)
        await self._connection.drain()

    def cut(self) -> None:
        """End the connection without the last chunk, after what was written: the client sees that the answer broke
        off."""
        self._end()
        self._connection.closes = self._connection.was_cut = True

    def probe(self) -> None:
        """Send something harmless, so that a client that is gone answers with a reset."""
        if self.is_open:
            self.write(self._ping)
        elif self._chunked:
            self._connection.send(_CONTINUE)

    def _send_head(self, headers: Headers) -> None:
        self.is_open = True
        connection = self._connection
        connection.closes = not (self._chunked and connection.may_keep_alive(self._head))
        framing = [("transfer-encoding", "chunked")] if self._chunked else []
        lasts = ("connection", "close" if connection.closes else "keep-alive")
        connection.send(render_head(200, [*headers, *framing, ("date", connection.server.date()), lasts]))

    def _send_ping(self) -> None:
        if not self._connection.is_blocked():
            self.write(self._ping)

    def _tick(self) -> None:
        with suppress(ClientGoneError):
            super()._tick()


class _Relay:
    """One stream on its way: what the upstream sends is processed and written in the loop's callback, without waking a
    coroutine per chunk; the coroutine only handles what is rare: a client that reads slowly, silence, the end."""

    def __init__(self, sink: Sink, connection: ClientConnection, reply: Reply, processor: Any) -> None:
        import asyncio

        self._sink = sink
        self._connection = connection
        self._reply = reply
        self._processor = processor
        self._loop = connection.loop
        self._end = ""
        self._error: Optional[Exception] = None
        self._is_needed = asyncio.Event()
        self._timers: Dict[str, Any] = {}

    async def run(self, idle_s: float, left_s: Optional[float]) -> str:
        """Relay until the end; the label of how it ended. ClientGoneError when the client left."""
        if left_s is not None:
            self._timers["all"] = self._loop.call_later(left_s, self._stop, "timeout")
        if self._processor.done:  # all of it came at once
            self._sink.hush()
        self._reply.pipe(self._on_data, self._stop, idle_s)
        try:
            await self._is_needed.wait()
            while not self._end:  # the client reads slowly
                self._is_needed.clear()
                await self._connection.drain()
                self._reply.resume()
                await self._is_needed.wait()
        finally:
            for timer in self._timers.values():  # or each would hold this stream's memory until it rings
                timer.cancel()
            self._end = self._end or "client_gone"
        if self._error is not None:
            raise self._error
        if self._end == "client_gone":
            raise ClientGoneError
        return self._end

    def _on_data(self, data: bytes) -> None:
        if self._end:
            return
        processor = self._processor
        try:
            out = processor.feed(data)
            if out and self._sink.write(out):
                self._reply.pause()
                self._is_needed.set()
        except ClientGoneError:
            self._stop("client_gone")
            return
        except Exception as error:  # the loop would log it and go on: an answer with a hole that looks whole
            self._error = error
            self._stop("failed")
            return
        if processor.failed is not None:
            self._stop("failed")
        elif processor.done:
            self._sink.hush()
            name = "linger %d" % processor.patience_ms(0)  # shorter from the terminator on
            if name not in self._timers:
                self._timers[name] = self._loop.call_later(processor.patience_ms(0) / 1000, self._stop, "end")

    def _stop(self, label: str) -> None:
        self._end = self._end or label
        self._is_needed.set()


class ClientConnection:
    """One client connection: reads requests, has them answered one after another, and notices when the client
    leaves."""

    def __init__(self, server: Server, reader: Any, writer: Any, task: Any) -> None:
        self.server = server
        self.loop = server.loop
        self.closes = False
        self.was_cut = False
        self.deadline = self._unsent = math.inf
        self.phase = "idle"
        self.sink: Optional[Sink] = None
        self.task = task
        self._reader = reader
        self._writer = writer
        self._transport = writer.transport
        self._parser = RequestParser(server.limits)
        self._reserved = 0
        self._at_eof = self._is_broken = False
        self._probing: Any = None
        self._hook()

    def _hook(self) -> None:
        """Learn at once when the client closes or resets, also while nothing is being read from it."""
        import socket

        reader, feed_eof, set_exception = self._reader, self._reader.feed_eof, self._reader.set_exception

        def on_eof() -> None:
            feed_eof()
            self._on_eof()

        def on_exception(error: BaseException) -> None:
            set_exception(error.with_traceback(None))  # or the frames of a failed write are kept, and all they hold
            self._on_gone()

        reader.feed_eof, reader.set_exception = on_eof, on_exception
        self._expire_read = set_exception
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._transport.max_size = _READ_BYTES  # asyncio asks for 256 KB at a time
        with suppress(OSError):  # macOS refuses it for a client that has left already
            self._transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        """Serve requests until the connection ends. ClientGoneError when the client ended it."""
        try:
            while not self.closes and await self._serve_one():
                pass
            if self._parser.has_more and not self.was_cut:
                await self._linger()
        except HttpError as error:
            await self.refuse(error)
        finally:
            if self._probing is not None:  # its timer would hold the connection
                self._probing.cancel()
            self._transport.abort() if self.was_cut and self.is_blocked() else self._writer.close()
            if self._transport.get_write_buffer_size():  # the rest of an answer, for a client that takes its time
                await self._until_sent(self._writer.wait_closed)

    def may_keep_alive(self, head: HttpRequest) -> bool:
        """Whether the connection can serve another request after this one: not with much of a body unread, or a wrong
        one, nor in a drain."""
        if not self.body_is_read and not self._is_broken:  # nobody has asked for it
            try:
                self.body_is_read = self._parser.body() is not None
            except HttpError:
                self._is_broken = True
        may_go_on = self.body_is_read or (not self._is_broken and self._parser.unread <= _SKIP_BYTES)
        ends = self._reader.at_eof() and not self._parser.has_more
        return head.keep_alive and may_go_on and not self.server.draining and not ends

    def send(self, data: bytes) -> bool:
        """Hand bytes to the transport; whether the client is behind with reading. ClientGoneError."""
        transport = self._transport
        if transport.is_closing():
            raise ClientGoneError
        transport.write(data)
        return bool(transport.get_write_buffer_size() > _HIGH_WATER_BYTES)

    def is_blocked(self) -> bool:
        """Whether the client reads slower than it is written to."""
        return self._transport.get_write_buffer_size() > _HIGH_WATER_BYTES

    async def drain(self) -> None:
        """Wait until a slow client has taken what was written. ClientGoneError when it takes too long or leaves."""
        if self._transport.get_write_buffer_size():
            await self._until_sent(self._writer.drain)

    async def _until_sent(self, wait: Callable[[], Any]) -> None:
        before, self.phase, self._unsent = self.phase, "sending", math.inf
        self.expire()  # the time begins
        try:
            await wait()
        except ConnectionError:
            raise ClientGoneError from None
        finally:
            self.phase, self.deadline = before, math.inf

    def expire(self) -> None:
        """The deadline of the present phase has passed. A client that took some of its answer since is only slow."""
        self.deadline, unsent = math.inf, self._transport.get_write_buffer_size()
        if self.phase == "sending" and unsent < self._unsent:
            self._unsent, self.deadline = unsent, self.loop.time() + self.server.settings.send_timeout_ms / 1000
        elif self.phase == "sending":
            self._transport.abort()
            self._on_gone()  # whose end asyncio does not tell again when the client had closed its half
        else:
            late = HttpError("the request took too long to arrive", 408, "request_timeout")
            self._expire_read(ClientGoneError() if self.phase == "idle" else late)

    async def read_body(self) -> bytes:
        """The body of the present request, inflated. RouterError 413, 415, 400 or 503 when it cannot be had."""
        head, parser = self._head, self._parser
        encoding, limit = header(head.headers, "content-encoding").strip().lower(), self.server.limits.max_body_bytes
        # Made first: a coding that cannot be read is refused before the client sends it all.
        inflater = Inflater(encoding, limit, RouterError) if encoding not in ("", "identity") else None
        await self._receive_body()
        body = parser.take_body()
        self._reserve(len(body))
        if inflater is None:
            return body
        parts, size = [], len(body)
        for at in range(0, len(body), _INFLATE_BYTES):  # which may be a thousand times as many: others need room, too
            part = await self.loop.run_in_executor(None, inflater.feed, body[at : at + _INFLATE_BYTES])
            parts.append(part)
            size += len(part)
            self._reserve(size)
        inflater.finish()
        self._reserve(size - len(body))
        return b"".join(parts)

    async def _receive_body(self, most_bytes: int = _MOST_BYTES) -> None:
        """Read on until the body is there or has more than `most_bytes`: at a fair rate, never silent for long."""
        parser, limit_s = self._parser, self.server.settings.body_timeout_ms / 1000
        began, self.phase = self.loop.time(), "body"
        try:
            self.body_is_read = parser.body() is not None
            if parser.expects_continue and most_bytes > _SKIP_BYTES:
                self.send(_CONTINUE)
            while not self.body_is_read and parser.body_size <= most_bytes:
                if most_bytes > _SKIP_BYTES:
                    self._reserve(parser.body_size)
                self.deadline = min(began + parser.body_size / _UPLOAD_BYTES_PER_S, self.loop.time()) + limit_s
                parser.feed(await self._read())
                self.body_is_read = parser.body() is not None
        except HttpError as error:
            self._is_broken = True  # nothing tells any more where the next request begins
            error.request = self._head
            raise
        finally:
            self.phase, self.deadline = "serving", math.inf

    async def _read(self) -> bytes:
        """Some bytes from the client. ClientGoneError at the end of the connection."""
        try:
            data = await self._reader.read(_READ_BYTES)
        except HttpError:
            self._expire_read(None)  # what is late is refused, and who sends on while it is told can still be read from
            raise
        except OSError:
            raise ClientGoneError from None
        if not data:
            raise ClientGoneError
        return data

    async def _serve_one(self) -> bool:
        head = await self._read_head()
        if head is None:
            return False
        self._head = head
        self.body_is_read = False
        if head.method != "POST" and self._parser.unread <= _SKIP_BYTES:
            await self._receive_body(_SKIP_BYTES)  # no handler asks for it: what is wrong with it is said now or never
        self.phase, self.sink = "serving", Sink(self, head)
        try:
            await self.server.handle(Call(head.method, head.path, head.query, head.headers, self.read_body), self.sink)
        finally:
            self.forget_body()
            self.sink.hush()  # its timer would hold the stream of a client that left
            self.phase, self.sink = "idle", None
        if not self.body_is_read:
            await self._skip_body()
        if not self.closes:
            self._parser.next()
        return not self.closes

    async def _skip_body(self) -> None:
        """Throw away what nobody read of a body, or close: when it is long or wrong, for it has had its answer."""
        try:
            if not self.closes:
                await self._receive_body(_SKIP_BYTES)
        except HttpError:
            self.closes = True
        if not self.body_is_read:
            await self._linger()

    async def _read_head(self) -> Optional[HttpRequest]:
        """The next request's head; None when the client closed between requests."""
        parser, settings = self._parser, self.server.settings
        head = parser.head()
        self.phase, self.deadline = "idle", self.loop.time() + settings.client_idle_timeout_ms / 1000
        while head is None:
            if parser.started and self.phase == "idle":
                self.phase, self.deadline = "head", self.loop.time() + settings.head_timeout_ms / 1000
            try:
                parser.feed(await self._read())
            except ClientGoneError:
                if parser.started and self._at_eof:
                    raise HttpError("the request ended in the middle of its head", 400, "incomplete_request") from None
                return None
            head = parser.head()
        self.phase, self.deadline = "serving", math.inf
        return head

    def forget_body(self) -> None:
        """The body of the present request is no longer in memory, nor what has come of it."""
        self._parser.drop_body()
        self._reserve(0)

    def _reserve(self, size: int) -> None:
        self.server.reserve(size - self._reserved)
        self._reserved = size

    async def refuse(self, error: HttpError) -> None:
        """Answer what cannot be served as HTTP, then close so that the answer still arrives."""
        wire = wire_of_client(error.request.path, error.request.headers) if error.request is not None else "openai"
        id = self.server.refused(error, wire)
        body = dump_json(WIRE_FORMATS[wire].render_error(_error_info(error), id))
        with suppress(ClientGoneError):
            how = {"head_only": self._parser.is_head, "keep_alive": False, "date": self.server.date()}
            headers = _JSON_HEADERS + _REFUSAL_HEADERS.get(error.status, [])
            headers += [("x-llm-router-request-id", id)] if id else []
            self.send(render_response(error.status, headers, body, **how))
            await self.drain()
            await self._linger()

    async def _linger(self) -> None:
        """Close our side and read on for a moment: closing with unread bytes would reset the connection and the client
        might never see the answer (RFC 9112, 9.6)."""
        self.closes = True
        self.phase, until = "idle", self.loop.time() + _CLOSING_S
        with suppress(ClientGoneError, HttpError, OSError, RuntimeError):
            if self._transport.can_write_eof():
                self._transport.write_eof()
            while not self._at_eof:
                self.deadline = min(self.loop.time() + _LINGER_S, until)
                await self._read()

    def _on_gone(self) -> None:
        if self.phase in ("serving", "sending", "body") and self.task is not None and not self.was_cut:
            self.task.cancel()

    def _on_eof(self) -> None:
        """The client will send nothing more. It may have left, or only closed its half and still wait for the answer:
        which of the two, a few harmless bytes tell, since a client that left answers them with a reset."""
        if self._at_eof:
            return
        self._at_eof = True
        if self._transport.is_closing():
            self._on_gone()
        else:
            self._probing = self.loop.call_later(_HALF_CLOSE_WAIT_S, self._probe, _HALF_CLOSE_WAIT_S)

    def _probe(self, waited_s: float) -> None:
        """It may also leave later: ask again, after twice as long each time, for clients bear only so many of these."""
        if self.sink is not None and not self.sink.ended and not self._transport.is_closing():
            self.sink.probe()
            self.loop.call_later(_PROBE_WAIT_S, self._check_probe)
        self._probing = self.loop.call_later(waited_s, self._probe, 2 * waited_s)

    def _check_probe(self) -> None:
        import socket

        sock, is_gone = self._transport.get_extra_info("socket"), self._transport.is_closing()
        if self.sink is not None and (is_gone or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            self._transport.abort()
            self._on_gone()


def open_listeners(host: str, port: int) -> List[Any]:
    """A listening socket for every address that `host` has on this machine, all with one port (0: a free one); that of
    `::` takes IPv4, too, as nearly all servers' does. OSError when the port is taken at one, or when there is none."""
    import socket

    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    how = {"backlog": _BACKLOG, "dualstack_ipv6": host == "::" and socket.has_dualstack_ipv6()}
    sockets: List[Any] = []
    for family, place in dict.fromkeys((family, place) for family, _, _, _, place in found):
        shared = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(socket.create_server((place[0], shared, *place[2:]), family=family, **how))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # not one of this machine, or no IPv6 here
                continue
            for sock in sockets:
                sock.close()
            if sockets and not port and error.errno == errno.EADDRINUSE:  # free at the first address only
                return open_listeners(host, port)
            raise
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, "no address of %s is one of this machine" % one_line(host, 80))
    return sockets


class BodyBudget:
    """What all request bodies in memory take, of what the settings allow."""

    settings: Settings
    _inflight_bytes = 0

    def reserve(self, size: int) -> None:
        """Account for so many bytes more. RouterError 503 when they are too many at once."""
        if size > 0 and self._inflight_bytes + size > self.settings.max_inflight_bytes:
            raise RouterError("too many request bytes are in memory, try again in a moment", 503, "overloaded")
        self._inflight_bytes += size


class Server(BodyBudget):
    """The listener and its connections. `handle(call, sink)` answers one request."""

    def __init__(
        self, loop: Any, settings: Settings, handle: Callable[[Call, Any], Any], failed: Callable[[BaseException], None]
    ) -> None:
        self.loop = loop
        self.settings = settings
        self.handle = handle
        self.limits = HttpLimits(max_body_bytes=settings.max_body_bytes)
        self.most_connections = settings.max_connections
        self.draining = False
        self.refused: Callable[[HttpError, str], str] = lambda *_: ""  # is told of it, and returns its id
        self.port = 0
        self.connections: Dict[Any, str] = {}
        self._peers: Dict[str, int] = {}
        self._strikes = Strikes()
        self._failed = failed
        self._listeners: List[Any] = []
        self._tasks: Set[Any] = set()
        self._date = (0.0, "")
        self._ticker: Any = None

    async def listen(self, host: str, port: int) -> int:
        """Accept connections on `host`, every address it has; returns the port. OSError when it cannot be had."""
        self._listeners = open_listeners(host, port)
        for listener in self._listeners:
            listener.setblocking(False)
            self._watch(listener)
        self._ticker = self.loop.call_later(_TICK_S, self._tick)
        self.port = int(self._listeners[0].getsockname()[1])
        return self.port

    def _watch(self, listener: Any) -> None:
        if not self.draining:
            self.loop.add_reader(listener.fileno(), self._take, listener)

    def _take(self, listener: Any, most: int = _ACCEPTS_AT_ONCE) -> None:
        """Accept who waits. Without a free descriptor the listener rests a while: asyncio's own servers try on as often
        as their backlog is long, and log each time."""
        for _ in range(most):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                self.loop.remove_reader(listener.fileno())
                self.loop.call_later(_ACCEPT_REST_S, self._watch, listener)
                self.loop.call_exception_handler({"message": "cannot accept for a moment", "exception": error})
                return
            task = self.loop.create_task(self._accept(sock, str(address[0]) if address else ""))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _accept(self, sock: Any, peer: str) -> None:
        import asyncio

        sock.setblocking(False)
        reader = asyncio.StreamReader(_READ_BYTES, self.loop)  # it keeps twice that, and one read
        protocol = asyncio.StreamReaderProtocol(reader, loop=self.loop)
        transport, _ = await self.loop.connect_accepted_socket(lambda: protocol, sock)
        writer = asyncio.StreamWriter(transport, protocol, reader, self.loop)
        connection = ClientConnection(self, reader, writer, asyncio.current_task())
        if not self._has_room(peer):
            refusal = connection.refuse(HttpError("too many connections", 503, "overloaded"))
            with suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(refusal, _BUSY_LINGER_S)
            writer.close()
            return
        self.connections[connection] = peer
        self._peers[peer] = self._peers.get(peer, 0) + 1
        try:
            await connection.run()
        except (ClientGoneError, asyncio.CancelledError):
            pass  # a cancelled task would make asyncio's streams log a traceback before Python 3.12
        except Exception as error:  # one broken handler must not touch the others
            self._failed(error)
        finally:
            del self.connections[connection]
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]

    def _has_room(self, peer: str) -> bool:
        total, each = self.most_connections, self.settings.max_connections_per_peer
        return len(self.connections) < total and (not each or self._peers.get(peer, 0) < each)

    async def delay_refusal(self, connection: ClientConnection, keys: int) -> None:
        """Wait as long as the connection's peer must for its wrong keys."""
        import asyncio

        await asyncio.sleep(self._strikes.add(self.connections.get(connection, ""), self.loop.time(), keys))

    def date(self) -> str:
        """The present moment as an HTTP date (RFC 9110, 5.6.7), made once a second."""
        now = self.loop.time()
        if now >= self._date[0]:
            from email.utils import formatdate

            wall = time.time()
            self._date = (now + 1 - wall % 1, formatdate(int(wall), usegmt=True))
        return self._date[1]

    async def drain(self, grace_s: float) -> bool:
        """Stop accepting, let what runs finish for `grace_s`, then cut it with a word. True when nothing had to be
        cut."""
        import asyncio

        self.draining = True
        for listener in self._listeners:
            self._take(listener, _BACKLOG)  # who is connected already would see a reset
            self.loop.remove_reader(listener.fileno())
            listener.close()
        until = self.loop.time() + grace_s
        while self._tasks and self.loop.time() < until:  # some may not be connections yet
            for connection in self.connections:
                if connection.phase == "idle":
                    connection.deadline = min(connection.deadline, self.loop.time() + 0.2)
            await asyncio.sleep(0.02)
        cut = list(self.connections)
        for connection in cut:
            if connection.sink is not None and not connection.sink.ended:
                connection.sink.host_stops = True
            connection.task.cancel()
        if cut:
            await asyncio.sleep(0.05)
        if self._ticker is not None:  # else it never listened
            self._ticker.cancel()
        return not cut

    def _tick(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            if now >= connection.deadline:
                connection.expire()
        self._ticker = self.loop.call_later(_TICK_S, self._tick)


# ==============================================================================
# 26 METRICS AND TRAIL - one line a request, written where it can block nobody [host]
# ==============================================================================

_RECORDED = (
    "id operation client wire asked stream model status outcome passed_over attempts usage first_content_ms total_ms"
    " message"
).split()


def log_record(trail: Trail) -> Json:
    """A request's trail as a JSON value: what the JSON log and `explain` show."""
    record = {"format" if name == "wire" else name: getattr(trail, name) for name in _RECORDED}
    record["attempts"] = [attempt._asdict() for attempt in trail.attempts]
    record["usage"] = trail.usage and trail.usage._asdict()
    return {"time": _iso_time(trail.began_wall), **record}


def log_level_of(trail: Trail) -> str:
    """How severe the end of a request is: a client that left is nobody's fault."""
    return "info" if trail.outcome == OK or trail.status == 499 else "warning"


def wanted_levels(least: str) -> Texts:
    """The levels that are logged when `least` is the setting."""
    return LOG_LEVELS[LOG_LEVELS.index(least) :]


def log_line(trail: Trail, as_json: bool) -> str:
    """A request's trail as one line of text or JSON."""
    if as_json:
        return dump_json(log_record(trail)).decode()
    usage, first_ms = trail.usage, trail.first_content_ms
    line = "%s %s %s%s %s %d %s [%s] tokens=%s first=%s total=%dms" % (
        _iso_time(trail.began_wall),
        trail.id,
        trail.wire,
        "~" if trail.stream else "",
        one_line(trail.asked or ("smart" if trail.operation else "-"), 120),
        trail.status,
        trail.outcome,
        "; ".join(map(_attempt_words, trail.attempts)),
        "%d>%d" % (usage.input + usage.cache_read + usage.cache_write, usage.output) if usage is not None else "-",
        "%dms" % first_ms if first_ms is not None else "-",
        trail.total_ms,
    )
    line += " client=" + one_line(trail.client, 60) if trail.client else ""
    return line + (" - " + one_line(trail.message, 200) if trail.outcome != OK and trail.message else "")


def _attempt_words(attempt: Attempt) -> str:
    wait = " after %dms" % attempt.wait_ms if attempt.wait_ms else ""
    then = " -> " + attempt.decision if attempt.decision else ""
    return "%s=%s%s %dms%s" % (attempt.ref, attempt.label, wait, attempt.took_ms, then)


def _iso_time(wall: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall)) + ".%03dZ" % (wall % 1 * 1000)


class TrailRing(BoundedMap):
    """The trails of the last requests by id, for `explain`."""

    def find(self, id: str) -> Optional[Json]:
        """The trail of a request as a JSON value; `last` means the newest. None when it is not remembered."""
        trail = self.get(next(reversed(self._entries), "") if id == "last" else id)
        return None if trail is None else log_record(trail)

    def tally(self) -> Dict[str, Json]:
        """ref -> {"ok", "failed", "last_error"}: the attempts of the remembered requests, counted."""
        found: Dict[str, Json] = {}
        attempts = ((trail, attempt) for trail, _ in self._entries.values() for attempt in trail.attempts)
        for trail, (ref, _, label, kind, _, _, _, message) in attempts:
            counts = found.setdefault(ref, {"ok": 0, "failed": 0, "last_error": None})
            if kind == OK:
                counts["ok"] += 1
            elif kind != "client_gone":
                words = {"label": label, "kind": kind, "message": message, "id": trail.id, "time": trail.began_wall}
                counts.update(failed=counts["failed"] + 1, last_error=words)
        return found


_COUNTERS = {  # name -> its labels
    "llm_router_requests_total": ("format", "operation", "status"),
    "llm_router_attempts_total": ("model", "outcome"),
    "llm_router_tokens_total": ("kind",),
}
_DURATIONS = ("llm_router_request_seconds", "llm_router_first_content_seconds")
_TOKEN_KINDS = tuple((kind,) for kind in Usage._fields)
_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BOUNDS = (*["%g" % bound for bound in _BUCKETS_S], "+Inf")


class Metrics:
    """Counters of everything that was recorded, as Prometheus text (exposition format 0.0.4).
    Labels come from the configuration and the contract only, never from what a client may make up without limit."""

    def __init__(self) -> None:
        self._counts: Dict[str, Dict[Any, int]] = {name: defaultdict(int) for name in _COUNTERS}  # by label values
        # By (name, format): the sum, then each bucket's count.
        self._times: Dict[Tuple[str, str], List[float]] = defaultdict(lambda: [0.0] * (1 + len(_BOUNDS)))

    def count(self, trail: Trail, known: Any) -> None:
        """Count a request that has ended. known: the refs that are configured."""
        (requests, attempts, all_tokens), wire = self._counts.values(), trail.wire or "none"
        requests[wire, trail.operation or "refused", trail.status] += 1
        for attempt in trail.attempts:
            attempts[attempt.ref if attempt.ref in known else attempt.ref.partition("/")[0] + "/*", attempt.kind] += 1
        for kind, tokens in zip(_TOKEN_KINDS, trail.usage or ()):
            all_tokens[kind] += tokens
        for name, took_ms in zip(_DURATIONS, (trail.total_ms, trail.first_content_ms)):
            if took_ms is not None:
                times = self._times[name, wire]
                times[0] += took_ms / 1000
                times[1 + bisect_left(_BUCKETS_S, took_ms / 1000)] += 1

    def render(self, gauges: Dict[str, Dict[str, float]]) -> str:
        """All metrics as text. gauges: name -> model ("" for none) -> present value."""
        families: Dict[str, List[str]] = {}

        def tell(kind: str, name: str, labels: Json, value: float, suffix: str = "") -> None:
            shown = ",".join('%s="%s"' % (key, str(text).translate(_IN_LABELS)) for key, text in labels.items())
            family = families.setdefault(name, ["# TYPE %s %s\n" % (name, kind)])
            family.append("%s%s%s %.12g\n" % (name, suffix, "{%s}" % shown if shown else "", value))

        for counter, counted in self._counts.items():
            for values, value in counted.items():
                tell("counter", counter, dict(zip(_COUNTERS[counter], values)), value)
        for (name, wire), (seconds, *counts) in self._times.items():
            labels = {"format": wire}
            for at, bound in enumerate(_BOUNDS, 1):
                tell("histogram", name, dict(labels, le=bound), sum(counts[:at]), "_bucket")
            tell("histogram", name, labels, seconds, "_sum")
            tell("histogram", name, labels, sum(counts), "_count")
        for name, values in gauges.items():
            for model, present in values.items():
                tell("gauge", name, {"model": model} if model else {}, present)
        return "".join(line for name in sorted(families) for line in families[name])


_IN_LABELS = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def show_health(ref: str, book: Any, now: float) -> Json:
    """A candidate's state in words and seconds: ok, cooling, open (its circuit) or half-open."""
    health, provider = book.read(ref), book.read(ref.partition("/")[0] + "/")
    rows = [
        (health.circuit_until, "open", health.reason),
        (health.cooldown_until, "cooling", health.reason),
        (provider.cooldown_until, "cooling", provider.reason),
    ]
    until, state, reason = max(rows, key=lambda row: row[0])
    if until <= now:
        state, reason = "half-open" if health.circuit_until else "ok", health.reason
    left_s = round(max(until - now, 0.0), 1)
    return {"model": ref, "state": state, "left_s": left_s, "reason": reason, "failures": health.failures}


def failure_line(error: BaseException) -> str:
    """An error of the router's own and its place. Keys never stand in it."""
    import traceback

    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = " at line %s in %s" % (where[0].lineno, where[0].name) if where else ""
    return "internal error: %s%s" % (one_line("%s: %s" % (type(error).__name__, error)), place)


class CountingHost:
    """Those of the gateway's effects that every host shares (see GATEWAY). known: the refs that are configured; book:
    what is known of their health."""

    def __init__(self, book: Any) -> None:
        import asyncio
        import random

        self.now, self.wall, self.sleep = time.monotonic, time.time, asyncio.sleep
        self.jitter = random.Random().random  # noqa: S311  it spreads retries, it guards nothing
        self.book, self.counters = book, Metrics()
        self.known: Any = ()

    def gauges(self) -> Dict[str, Dict[str, float]]:
        """What /metrics shows of the present, as `Metrics.render` takes it."""
        now, refs = self.now(), sorted(self.known)
        return {
            "llm_router_cooldown_seconds": {ref: show_health(ref, self.book, now)["left_s"] for ref in refs},
            "llm_router_circuit_open": {ref: float(bool(self.book.read(ref).circuit_until)) for ref in refs},
        }

    def metrics(self) -> str:
        """The text of /metrics."""
        return self.counters.render(self.gauges())

    def new_id(self) -> str:
        """A request id: unique, not guessable."""
        return "req_" + os.urandom(12).hex()


class Batches:
    """Does `_work(is_last)` in a thread of its own, `pause_s` after it was woken, so that there is much to do at once,
    and a last time at the end. What it returns: after how many seconds it wants to try again, None for not at all."""

    _work: Callable[[bool], Optional[float]]

    def __init__(self, name: str, pause_s: float) -> None:
        import threading

        self._pause_s = pause_s
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to do."""
        if not self._wake.is_set():
            self._wake.set()

    def close(self, most_s: float = 2.0) -> None:
        """Have the rest done, within so many seconds."""
        self._closing.set()
        self._wake.set()
        self._thread.join(most_s)

    def _run(self) -> None:
        is_last, again_s = False, None
        while not is_last:
            self._wake.wait(again_s)
            self._closing.wait(self._pause_s)
            self._wake.clear()
            is_last = self._closing.is_set()  # asked before the work, which sees all that came before the end then
            again_s = self._work(is_last)


class LogWriter(Batches):
    """Writes lines to a stream from a thread of its own: a full disk or a stopped pipe delays no request.

    At most `limit` lines wait; further ones are dropped and counted, and the count is logged when there is room again.
    """

    def __init__(self, stream: Any, format: str = "text", level: str = "info", limit: int = 10_000) -> None:
        self._stream = stream
        self._as_json = format == "json"
        self._wanted = wanted_levels(level)
        self._lines: Any = deque()
        self._limit = limit
        self._dropped = 0
        super().__init__("llm-router-log", 0.2)  # a line by itself costs as much as half a request

    def add(self, trail: Trail) -> None:
        """Queue the line of a request that has ended."""
        if log_level_of(trail) in self._wanted:
            self.write(log_line(trail, self._as_json))

    def note(self, text: str, level: str = "info") -> None:
        """Queue what the router itself has to say, a sentence (with a traceback, several lines)."""
        if level in self._wanted:
            self.write(self._sentence(text, level))

    def _sentence(self, text: str, level: str) -> str:
        record = {"time": _iso_time(time.time()), "level": level, "message": text}
        return dump_json(record).decode() if self._as_json else "%(time)s %(level)s: %(message)s" % record

    def write(self, line: str) -> None:
        """Queue one line."""
        if len(self._lines) >= self._limit:
            self._dropped += 1
            return
        self._lines.append(line)
        self.wake()

    def _work(self, is_last: bool) -> None:
        dropped, self._dropped = self._dropped, 0
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        words = "%d log lines were dropped: the log could not be written fast enough" % dropped
        said = [self._sentence(words, "warning")] if dropped else []
        try:
            self._stream.write("".join(line + "\n" for line in lines + said))
            self._stream.flush()
        except (OSError, ValueError):
            self._dropped += dropped + len(lines)


class LogFile:
    """A log file as a stream for LogWriter: its owner's only, moved to `path`.1 when it is full (0 bytes: never). It is
    open only while it is written, so that others may move or remove it, as logrotate does."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes

    def write(self, text: str) -> None:
        """Append some lines. OSError when the disk is full or the folder gone."""
        data, stamp = text.encode("utf-8", "backslashreplace"), file_stamp(self._path)
        if stamp and 0 < self._max_bytes < stamp[1] + len(data):
            with suppress(OSError):  # a folder that only root may write: the file grows, and nothing is lost
                os.replace(self._path, self._path + ".1")
        with open_private(self._path, "ab") as file:
            written = file.write(data)
            if written < len(data):  # the disk is full: half a line would spoil the one behind it
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Nothing waits: the file has no buffer."""


# ==============================================================================
# 27 LEDGER - what every request used and cost, in SQLite, off the hot path [host]
# ==============================================================================

LEDGER_VERSION = 1  # PRAGMA user_version of the file; a newer one is left alone
COST_KEYS = ("input", "output", "cacheRead", "cacheWrite")  # of a model's `cost`; the order of Usage
_LEDGER_COLUMNS = (
    "time REAL, id TEXT, format TEXT, operation TEXT, stream INTEGER, client TEXT, asked TEXT, model TEXT,"
    " attempts TEXT, status INTEGER, outcome TEXT, input INTEGER, output INTEGER, cache_read INTEGER,"
    " cache_write INTEGER, reasoning INTEGER, estimated INTEGER, cost REAL, first_content_ms INTEGER, total_ms INTEGER"
)
_LEDGER_INSERT = "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SHRINK = "DELETE FROM requests WHERE rowid <= (SELECT min(rowid) + (max(rowid) - min(rowid)) / 10 FROM requests)"
_MOST_TOKENS = 2**53  # more is a lie, and SQLite takes 64 bits
_LEDGER_BATCH_S = 0.5
_LEDGER_RETRY_S = 1.0


def ledger_path(settings: Settings) -> str:
    """The ledger's file, "" when it is switched off; the usual one where a word just switches it on."""
    chosen = _BOOLS.get(settings.usage_db.lower(), settings.usage_db)
    return os.path.expanduser(Settings().usage_db if chosen is True else chosen or "")


def cost_of(ref: str, usage: Optional[Iterable[int]], costs: Json) -> Optional[float]:
    """What tokens (the fields of Usage) cost, by the `cost` of the model `ref` in `costs`, prices per million of them;
    None when a price that is needed is unknown."""
    cost = costs.get(ref) or costs.get(ref.partition("/")[0] + "/*")
    needed = [(tokens, cost.get(key)) for tokens, key in zip(usage or (), COST_KEYS) if tokens] if cost else []
    if not needed or not all(type(price) in (int, float) and 0 <= price < 1e9 for _, price in needed):
        return None
    return sum(tokens * price for tokens, price in needed) / 1e6


def ledger_row(trail: Trail, costs: Json) -> Tuple[Any, ...]:
    """A request as a row of the ledger. costs: ref -> `cost`. Tokens that nobody told are None; told by an answer
    that did not reach its end they are marked as an estimate. Half a surrogate pair, which a client's JSON may hold,
    becomes a question mark."""
    usage = trail.usage if any(trail.usage or ()) else None
    told = trail.client, trail.asked, trail.model, trail.path
    texts = [text[:2000] if text.isascii() else text[:2000].encode("utf-8", "replace").decode() for text in told]
    tokens = [min(count, _MOST_TOKENS) for count in usage] if usage else [None] * len(Usage._fields)
    return (
        trail.began_wall, trail.id, trail.wire, trail.operation, trail.stream, *texts, trail.status, trail.outcome,
        *tokens, usage is not None and trail.outcome != OK, cost_of(trail.model, usage, costs),
        trail.first_content_ms, trail.total_ms,
    )  # fmt: skip


class Ledger(Batches):
    """Rows of requests in an SQLite file, written in batches by a thread of its own.

    Whatever is wrong with the file disturbs no request: `note(text, level)` is told once, and the newest `limit` rows
    wait until it works again. costs: ref -> `cost`, see `cost_of`.
    """

    def __init__(self, path: str, settings: Settings, note: Callable[[str, str], None], limit: int = 5000) -> None:
        self.costs: Json = {}
        self._path = path
        self._settings = settings
        self._note = note
        self._limit = limit
        self._trails: Any = deque(maxlen=limit)
        self._rows: List[Tuple[Any, ...]] = []
        self._trouble = ""
        self._file: Any = None
        self._connection: Any = None
        super().__init__("llm-router-ledger", _LEDGER_BATCH_S)

    def add(self, trail: Trail) -> None:
        """A request has ended: all else is the thread's work."""
        self._trails.append(trail)
        self.wake()

    def _work(self, is_last: bool) -> Optional[float]:
        """Write all that waits; what cannot be written now goes on waiting."""
        try:
            while self._trails:
                self._rows.append(ledger_row(self._trails.popleft(), self.costs))
            del self._rows[: -self._limit]
            if self._rows:
                self._write_or_heal()
            self._rows = []
            if self._trouble:
                self._note("the usage ledger is written again", "info")
            self._trouble = ""
        except Exception as error:  # the thread must live: the next batch may succeed
            self._disconnect()
            if not self._trouble:
                words = getattr(error, "message", "") or getattr(error, "strerror", "") or error
                self._trouble = one_line("%s: %s" % (self._path, words))
                self._note("the usage ledger is not written, requests go on: " + self._trouble, "warning")
        if is_last:
            self._disconnect()
        return _LEDGER_RETRY_S if self._rows else None

    def _write_or_heal(self) -> None:
        import sqlite3

        try:
            self._write()
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # locked, full, read-only: its subclasses
                raise
            self._disconnect()
            os.replace(self._path, self._path + ".corrupt")
            for rest in filter(os.path.exists, (self._path + "-wal", self._path + "-shm")):
                os.unlink(rest)
            self._note("the usage ledger was damaged (%s): kept as %s.corrupt" % (error, self._path), "warning")
            self._write()

    def _write(self) -> None:
        if self._connection is None or self._file != file_stamp(self._path)[2:]:  # removed, or set aside by another
            self._disconnect()
            self._connection = _open_ledger(self._path)
            self._file = file_stamp(self._path)[2:]
        with self._connection as connection:
            connection.executemany(_LEDGER_INSERT, self._rows)
            days, most = self._settings.usage_max_days, self._settings.usage_max_bytes
            if days:
                connection.execute("DELETE FROM requests WHERE time < ?", (time.time() - days * 86400,))
            names = ("page_count", "freelist_count", "page_size")
            pages, free, size = (connection.execute("PRAGMA " + name).fetchone()[0] for name in names)
            if (pages - free) * size > most:  # pages that become free are used again: the file does not grow
                connection.execute(_SHRINK)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _open_ledger(path: str) -> Any:
    """A connection that writes the ledger, made when it is not there. RouterError for what is no file or another
    program's."""
    import sqlite3

    check_regular(path)
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if file.read(16).strip(b"\0") not in (b"", b"SQLite format 3"):  # one of NULs was a ledger before a power cut
            raise RouterError("%s is the file of another program" % one_line(path))
    open_private(path, "r+b").close()
    connection = sqlite3.connect(path, timeout=5.0)
    try:
        connection.execute("BEGIN IMMEDIATE")  # of two that start at once, one makes the table
        with connection:
            if _check_ledger(connection, path) == 0:
                connection.execute("CREATE TABLE requests (%s)" % _LEDGER_COLUMNS)
                connection.execute("CREATE INDEX requests_time ON requests (time)")
                connection.execute("PRAGMA user_version = %d" % LEDGER_VERSION)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # whole after a crash of the program, as after a power cut
        connection.execute("PRAGMA journal_size_limit = 4000000")
        connection.execute("PRAGMA cache_size = -256")  # KB; SQLite would fill 2 MB as the file grows
    except BaseException:
        connection.close()
        raise
    return connection


def _check_ledger(connection: Any, path: str) -> int:
    """The version of a ledger, 0 for an empty file; asked within a transaction, since two questions of a file that is
    being made would find it in two states. RouterError for one that cannot be used."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if version > LEDGER_VERSION:
        raise RouterError("%s was made by a newer llm-router" % one_line(path))
    if "requests" not in tables if version else tables:
        raise RouterError("%s is the database of another program" % one_line(path))
    return int(version)


# What `usage --by` groups rows by.
LEDGER_GROUPS = {
    "model": "coalesce(nullif(model, ''), '(nobody)')",
    "provider": "coalesce(nullif(substr(model, 1, max(instr(model, '/') - 1, 0)), ''), '(nobody)')",
    "day": "date(time, 'unixepoch', 'localtime')",
    "client": "coalesce(nullif(client, ''), '(no name)')",
    "format": "format",
}
# Sums of a group. unknown_cost: answers with tokens and no price; untold: answers whose tokens nobody told.
_LEDGER_SUMS = {
    "requests": "count(*)",
    "failed": "sum(outcome <> 'ok')",
    "input": "sum(input)",
    "cache_read": "sum(cache_read)",
    "cache_write": "sum(cache_write)",
    "output": "sum(output)",
    "reasoning": "sum(reasoning)",
    "cost": "sum(cost)",
    "unknown_cost": "sum(input IS NOT NULL AND cost IS NULL)",
    "untold": "sum(input IS NULL AND outcome = 'ok')",
    "estimated": "sum(estimated)",
    "first_content_ms": "round(avg(first_content_ms))",
    "total_ms": "round(avg(total_ms))",
}


def sum_ledger(path: str, by: str, since: float) -> List[Json]:
    """The ledger's rows from `since` (Unix seconds) on, summed by a key of LEDGER_GROUPS: {"group", "requests", ...},
    the last one the total with the group None; [] when there is nothing. count_tokens calls are left out. RouterError
    when the file cannot be read."""
    sums = ", ".join("%s AS %s" % (sql, name) for name, sql in _LEDGER_SUMS.items())
    source = "FROM requests WHERE time >= ? AND operation <> 'count_tokens'"
    order = '"group"' if by == "day" else "coalesce(cost, 0) DESC, requests DESC"
    groups = 'SELECT %s AS "group", %s %s GROUP BY 1 ORDER BY %s' % (LEDGER_GROUPS[by], sums, source, order)
    rows = _read_ledger(path, since, groups, 'SELECT NULL AS "group", %s %s' % (sums, source))
    return rows if len(rows) > 1 else []


def find_in_ledger(path: str, id: str) -> Optional[Json]:
    """A request's row of the ledger in the shape of `log_record`, with "cost", and with "path" in place of attempts;
    "last" means the newest. None when it is not there."""
    rows = _read_ledger(path, id, "SELECT * FROM requests WHERE ? IN (id, 'last') ORDER BY rowid DESC LIMIT 1")
    if not rows:
        return None
    usage = {name: rows[0].pop(name) for name in Usage._fields}
    row = dict(rows[0], stream=bool(rows[0]["stream"]), usage=usage if usage["input"] is not None else None)
    return dict(row, time=_iso_time(row["time"]), path=row["attempts"], attempts=[], message="")


def _read_ledger(path: str, value: Any, *queries: str) -> List[Json]:
    """The rows that each of the queries finds for `value`, all in one state of the file; none in one that is empty."""
    import pathlib
    import sqlite3

    file = pathlib.Path(path).absolute()
    try:
        os.stat(path)
        check_regular(path)
        with closing(sqlite3.connect(file.as_uri() + "?mode=ro", timeout=5.0, uri=True)) as connection:
            connection.execute("BEGIN")
            connection.row_factory = sqlite3.Row
            queries = queries if _check_ledger(connection, path) else ()
            return [dict(row) for query in queries for row in connection.execute(query, (value,))]
    except FileNotFoundError:  # of the path "" as well
        return []
    except (OSError, sqlite3.Error) as error:
        raise RouterError("%s cannot be read: %s" % (one_line(path), getattr(error, "strerror", "") or error)) from None


# ==============================================================================
# 28 WORKER - the same gateway on Cloudflare, its effects from JavaScript [host]
# ==============================================================================
#
# A Python Worker is Pyodide inside an isolate (developers.cloudflare.com/workers/languages/python): no sockets, no
# threads, no randomness while the module is imported. worker_export/entry.py makes one WorkerRouter per isolate.
#
# Bytes that Python need not see never reach it: once a stream of the client's own format has shown its first content,
# the rest of the upstream's body is piped to the client by the runtime, unwatched. A translated stream costs one
# callback a chunk.

_FLUSH_S = 0.05


class WorkerRouter:
    """The router of one isolate. What it knows of its providers' health is lost with the isolate, as is everything
    else that it remembers; `book` may be any object with HealthBook's `read` and `apply`."""

    def __init__(self, book: Any = None) -> None:
        self._book = HealthBook() if book is None else book
        self._made_of: Any = None
        self._gateway: Any = None

    async def fetch(self, request: Any, env: Any, context: Any) -> Any:
        """The Response to a Worker's Request. env: its variables and secrets; context: has `waitUntil`."""
        import asyncio

        client = WorkerClient(getattr(request, "js_object", request))
        client.task = asyncio.ensure_future(self._serve(client, WorkerEnviron(env)))
        context.waitUntil(client.task)
        return await asyncio.shield(client.response)

    async def _serve(self, client: WorkerClient, environ: WorkerEnviron) -> None:
        try:
            gateway = self._find_gateway(environ)
            client.host = gateway.host
            await gateway.handle(client.call, client)
        except ConfigError as error:
            await self._refuse(client, error)
        finally:
            await client.settle()

    def _find_gateway(self, environ: WorkerEnviron) -> Gateway:
        """The gateway of the present configuration, made once: a secret that changes comes with a new isolate, and a
        test that changes one in place gets a new gateway. ConfigError for a Worker that cannot serve."""
        made_of = [environ.get(name) for name in (*CONFIG_VARIABLES, "LLM_ROUTER_MASTER_KEY")]
        if self._made_of != made_of:
            name, text = find_config_variable(environ)  # it reads what several variables hold: not for every request
            if not text:
                raise ConfigError("the secret %s is not set" % CONFIG_VARIABLES[0])
            document = parse_config_text(unpack_config(text), name)
            config, problems = read_usable_config(document, environ), scan_config(document, environ)[1]
            access = make_access(config, True)
            if not access.keys and not access.clients:
                raise ConfigError("the Worker has no master key: set the secret LLM_ROUTER_MASTER_KEY")
            settings, warnings = read_settings({}, environ)
            for warning in [*warnings, *map(show_problem, problems)]:
                print("warning: " + one_line(warning))
            routes, book = Routes(config), self._book
            self._gateway = Gateway(routes, settings, access, WorkerHost(routes, settings, book), book)
            self._gateway.info = {"instance": os.urandom(8).hex(), "config": "ok"}
            self._made_of = made_of
        return self._gateway

    async def _refuse(self, client: WorkerClient, error: ConfigError) -> None:
        """What is said without a usable configuration: a bare GET / still answers, everything else is a 503."""
        call = client.call
        info = ErrorInfo(503, "configuration error: " + error.message.split("\n")[0], code=error.code)
        status, body = 503, WIRE_FORMATS[wire_of_client(call.path, call.headers)].render_error(info, "")
        if call.method in ("GET", "HEAD") and call.path == "/":
            status, body = 200, {"name": "llm-router"}
        print(info.message)
        await client.respond(status, _JSON_HEADERS, dump_json(body))


class WorkerEnviron:
    """A Worker's variables and secrets, read like an environment."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def get(self, name: str, default: str = "") -> str:
        """A variable's text, `default` for a missing one. Numbers, switches and tables of wrangler.toml are no text."""
        import js

        value = getattr(self._env, name, default)
        return value if isinstance(value, str) else str(js.JSON.stringify(value))


class WorkerHost(CountingHost, BodyBudget):
    """The gateway's effects in a Worker (see GATEWAY). Log lines go to the console, as `wrangler tail` shows it."""

    def __init__(self, routes: Routes, settings: Settings, book: Any) -> None:
        super().__init__(book)
        self.known = frozenset(routes.refs())
        self.settings = settings

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Work at once: an isolate has no other thread."""
        return work(*arguments)

    async def send(self, outbound: Outbound) -> WorkerReply:
        """Send one request and wait for the head of its answer. UpstreamError when there is none."""
        import js

        control = js.AbortController.new()
        headers = {name: value for name, value in outbound.headers if name not in ("host", "content-length")}
        what = {"headers": headers, "body": outbound.body, "signal": control.signal}
        first_s, fault = outbound.timeouts.first_byte_ms / 1000 or None, "cannot reach %s" % outbound.target.key.host
        try:
            with _limited(control, first_s, "an answer", fault, "connect_failed"):
                options = _js_object(method="POST", redirect="manual", **what)
                answer = await js.fetch(outbound.target.key.origin + outbound.path, options)
                if not 200 <= int(answer.status) < 600:  # a 101, say: a Response cannot have such a one
                    raise UpstreamError("the upstream's answer has the status %d" % answer.status, "bad_response")
        except BaseException:
            control.abort()
            raise
        received = list(js.Object.fromEntries(answer.headers).to_py().items())
        return WorkerReply(answer, received, control, self.settings.max_answer_bytes)

    def record(self, trail: Trail) -> None:
        """A request has ended: count it and write its line."""
        self.counters.count(trail, self.known)
        if log_level_of(trail) in wanted_levels(self.settings.log_level):
            print(log_line(trail, self.settings.log_format == "json"))

    def failed(self, error: BaseException) -> None:
        """An error of the router's own."""
        print(failure_line(error))


def _js_object(**members: Any) -> Any:
    """A JavaScript object; what its members hold becomes JavaScript's as well."""
    import js  # type: ignore[import-not-found]
    from pyodide.ffi import to_js  # type: ignore[import-not-found]

    return to_js(members, dict_converter=js.Object.fromEntries)


@contextmanager
def _limited(control: Any, seconds: Optional[float], what: str, fault: str, label: str) -> Any:
    """A time limit on the runtime's side that aborts what `control` controls; asyncio.wait_for would make a task, for
    thrice the cost. UpstreamError when it ends that, no sign of `what`, and with `fault` and `label` for other ends."""
    import asyncio

    from pyodide.ffi import JsException

    timer = None if seconds is None else asyncio.get_event_loop().call_later(seconds, control.abort)
    try:
        yield
    except JsException as error:
        if control.signal.aborted:
            raise UpstreamError("no sign of %s within %g s" % (what, seconds or 0), "timeout", True) from None
        raise UpstreamError("%s: %s" % (fault, one_line(str(error), 160)), label) from None
    finally:
        if timer is not None:
            timer.cancel()


class WorkerReply:
    """An upstream's answer in a Worker: pulled with `read`, or handed over as the stream of what is left."""

    def __init__(self, answer: Any, headers: Headers, control: Any, max_body_bytes: int) -> None:
        self.status, self.headers = int(answer.status), headers
        self._control = control
        self._answer = answer
        self._reader: Any = None
        self._is_over = not answer.body
        self.body = PlainBody(max_body_bytes)

    async def read(self, timeout_s: Optional[float]) -> bytes:
        """Some bytes of the body; b"" at its end. UpstreamError when it breaks off or stalls."""
        data = b""
        try:
            with _limited(self._control, timeout_s, "more of the answer", "the answer broke off", "reset"):
                while not data and not self._is_over:
                    self._reader = self._reader or self._answer.body.getReader()
                    piece = await self._reader.read()
                    self._is_over = bool(piece.done)
                    data = self.body.finish() if piece.done else self.body.feed(piece.value.to_bytes(), self.headers)
        except UpstreamProtocolError as error:
            raise UpstreamError(error.message, "truncated") from None
        return data

    def rest(self) -> Any:
        """The stream of all that is not read yet; something must have been read before."""
        self._reader.releaseLock()
        return self._answer.body

    def close(self) -> None:
        """The answer is not wanted any further; does nothing to one that was read to its end."""
        self._control.abort()


class WorkerClient(PingingSink):
    """Where the gateway puts the answer to one request in a Worker (see GATEWAY for what each method means).

    call: the request's head. response: a future of the Response, done as soon as there is a head. task: what a client
    that leaves cancels.
    """

    def __init__(self, request: Any) -> None:
        import asyncio

        import js
        from pyodide.ffi import create_proxy, to_js

        parts = urlsplit(str(request.url))
        super().__init__(asyncio.get_event_loop())
        headers = list(js.Object.fromEntries(request.headers).to_py().items())
        self.call = Call(str(request.method), parts.path or "/", parts.query, headers, self._read_body)
        self.response = self.loop.create_future()
        self.task: Any = None
        self.to_js, self._js = to_js, js
        self.host: Any = None
        self._reserved = 0
        self._request = request
        self._writable: Any = None
        self._writer: Any = None
        self._written: Any = None
        self._ends = ""
        self._enqueue: Any = self.write  # a translated stream replaces it while the runtime holds the writer
        self._gone = create_proxy(self._on_gone)
        request.signal.addEventListener("abort", self._gone)

    async def _read_body(self) -> bytes:
        from pyodide.ffi import JsException

        size, limit = header(self.call.headers, "content-length"), self.host.settings.max_body_bytes
        told = int(size[:13]) if size.isdecimal() else 0
        try:
            self._reserve(min(told, limit))
            data = b"" if told > limit else await self._read_bytes(bool(size), limit)
        except JsException as error:
            raise RouterError("the body broke off: " + one_line(str(error), 160), 400, "incomplete_request") from None
        if max(told, len(data)) > limit:
            raise RouterError("the body is larger than %d bytes" % limit, 413, "request_too_large")
        self._reserve(len(data))
        body = inflate(data, header(self.call.headers, "content-encoding"), limit)
        self._reserve(len(body))
        if nests_too_deep(body):
            raise RouterError("the body is not valid JSON: nested too deeply", 400, "invalid_json")
        return body

    def _reserve(self, size: int) -> None:
        self.host.reserve(size - self._reserved)
        self._reserved = size

    async def _read_bytes(self, has_size: bool, limit: int) -> bytes:
        """The body as it came; one that does not say its size is read until it exceeds the limit."""
        if has_size or not self._request.body:
            whole: bytes = (await self._request.arrayBuffer()).to_bytes()
            return whole
        data, reader, piece = bytearray(), self._request.body.getReader(), None
        while len(data) <= limit and (piece is None or not piece.done):
            piece = await reader.read()
            data += b"" if piece.done else piece.value.to_bytes()
        return bytes(data)

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        self._end()
        self._answer(status, headers, None if status == 204 else self.to_js(body))  # HEAD gets but the size

    def begin(self, headers: Headers, ping: bytes) -> None:
        """Send the head of a stream; the gateway has let go of the request's body."""
        super().begin(headers, ping)
        self._reserve(0)

    def write(self, data: bytes) -> None:
        """Send a piece of the stream."""
        if data and self._writer is not None:
            self.sent_at = self.loop.time()
            self._written = self._writer.write(self.to_js(data))
            self._written.catch(self._gone)

    async def relay(self, reply: WorkerReply, processor: Any, idle_ms: int, left_s: Optional[float]) -> str:
        """The rest of a reply to the client: UNWATCHED when the runtime passes it on, "end" or the label of what broke
        it when it was translated."""
        from pyodide.ffi import JsException, create_proxy

        passes = isinstance(processor, StreamRelay) and processor.recorder is None and reply.body.inflater is None
        pump = _Pump(self, reply, processor, 0.0 if passes else idle_ms / 1000, left_s)
        self.write(processor.hand_over() if passes else b"")
        self._writer.releaseLock()
        self._enqueue = pump.ping
        steps = {} if passes else {"start": create_proxy(pump.start), "transform": create_proxy(pump.transform)}
        label = "reset"
        try:
            rest = reply.rest()
            if not passes:
                rest = rest.pipeThrough(self._js.TransformStream.new(_js_object(**steps)))
            await rest.pipeTo(self._writable, _js_object(preventClose=True, preventAbort=True))
            label = UNWATCHED if passes else "end"
        except JsException as error:
            if self._request.signal.aborted:
                raise ClientGoneError from error
        finally:
            pump.stop()
            self._enqueue = self.write
            self._writer = None if self._writable.locked else self._writable.getWriter()  # locked: the client has left
            for proxy in steps.values():
                proxy.destroy()
        self.write(b"\n\n" if passes and label != UNWATCHED else b"")  # the end of an event that broke off within
        return pump.end or label

    async def finish(self) -> None:
        """The stream is complete."""
        self._ends = "close"

    def cut(self) -> None:
        """End the connection after what was written, so that the client sees that the answer broke off."""
        self._ends = "abort"

    async def settle(self) -> None:
        """The gateway has ended: let the last bytes go out, then end the stream as it said; let go of the request."""
        from pyodide.ffi import JsException

        self._end()
        if self.host is not None:
            self._reserve(0)
        self._request.signal.removeEventListener("abort", self._gone)
        with suppress(JsException):  # the client has left
            if self._written is not None:
                await self._written
            if self._writer is not None and self._ends == "close":
                await self._writer.close()
            elif self._writer is not None:
                await self.host.sleep(_FLUSH_S)  # an abort overtakes what the runtime has taken but not yet sent
                await self._writer.abort("the answer broke off")
        if not self.response.done():  # cancelled before there was a head: nobody waits for it
            self._answer(500, [], None)
        self._gone.destroy()

    def _send_ping(self) -> None:
        self._enqueue(self._ping)

    def _send_head(self, headers: Headers) -> None:
        pipe = self._js.IdentityTransformStream.new()
        self.is_open, self._writable, self._writer = True, pipe.writable, pipe.writable.getWriter()
        self._answer(200, headers, pipe.readable)

    def _answer(self, status: int, headers: Headers, body: Any) -> None:
        self.response.set_result(self._js.Response.new(body, _js_object(status=status, headers=headers)))

    def _on_gone(self, *_: Any) -> None:
        if self.task is not None and not self._ends:
            self.task.cancel()


class _Pump:
    """The rest of a stream in a Worker. For a translated one the runtime calls `transform` for every chunk. end: why it
    was stopped before the upstream's end, "" when it was not."""

    def __init__(
        self, client: WorkerClient, reply: WorkerReply, processor: Any, idle_s: float, left_s: Optional[float]
    ) -> None:
        self.end = ""
        self._client = client
        self._reply = reply
        self._processor = processor
        self._controller: Any = None
        self._idle_s = idle_s
        self._loop = client.loop
        self._last = self._loop.time()
        self._timers = [self._loop.call_later(left_s, self._abort, "timeout")] if left_s is not None else []
        if idle_s:
            self._watch()

    def start(self, controller: Any) -> None:
        """The runtime's side of the stream: where to put bytes."""
        self._controller = controller

    def transform(self, chunk: Any, controller: Any) -> None:
        """Some bytes from the upstream."""
        self._last = self._loop.time()
        data, inflater = chunk.to_bytes(), self._reply.body.inflater
        self.put(self._processor.feed(data if inflater is None else inflater.feed(data)))
        if self._processor.failed is not None and not self.end:
            self.end = "failed"
            controller.terminate()
        elif self._processor.done:  # the body may go on, or never end
            self._timers.append(self._loop.call_later(self._processor.patience_ms(0) / 1000, self._abort, "end"))

    def stop(self) -> None:
        """Nothing is to come any more."""
        for timer in self._timers:
            timer.cancel()

    def ping(self, data: bytes) -> None:
        """Send a sign of life, unless the answer has ended."""
        self.put(b"" if self._processor.done else data)

    def put(self, data: bytes) -> None:
        """Send some bytes; nothing can be put into a stream that the runtime passes on by itself."""
        if data and self._controller is not None:
            self._client.sent_at = self._last
            self._controller.enqueue(self._client.to_js(data))

    def _watch(self) -> None:
        silent_s = self._loop.time() - self._last
        if silent_s >= self._idle_s:
            self._abort("timeout")
        else:
            self._timers.append(self._loop.call_later(self._idle_s - silent_s, self._watch))

    def _abort(self, label: str) -> None:
        self.end = self.end or label
        self._reply.close()


# ==============================================================================
# 29 PROCESS - the running server: its effects, signals, start and end [host]
# ==============================================================================


class StartOptions(NamedTuple):
    """All that a server needs to start, checked. loaded: the configuration as it was read; config: the same as
    values. only_checks: it ends once it listens."""

    loaded: Loaded
    config: Config
    settings: Settings
    require_auth: bool
    watch_config: bool
    environ: Environ
    debug: bool
    only_checks: bool = False


# ----- the instances that run here -----

_CONTROL_TIMEOUT_S = 5.0
_MOST_GUESTS = 1000
_WATCH_S = 0.5
_ENROLL_AGAIN_S = 5.0
TRIAL_S = 60.0


def state_path() -> str:
    """Where the running instances of this user are listed."""
    return os.path.expanduser("~/.llm-router.runtime.json")


class Instance(NamedTuple):
    """One running server as the state file tells it. token: the bearer of its control channel; started, and ends, for
    one that stops: Unix seconds."""

    id: str
    pid: int
    host: str
    port: int
    config: str
    token: str
    started: float
    ends: float = 0.0


def near_host(host: str) -> str:
    """The host by which this machine reaches who listens on `host`: a wildcard is no address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def read_instances(path: str) -> List[Instance]:
    """The entries of the state file; what is corrupt in it is left out."""
    kinds: Json = dict.fromkeys(Instance._fields, str)
    kinds.update(pid=int, port=int, started=(int, float), ends=(int, float))
    with suppress(RouterError):
        check_regular(path)
        entries = get_list(as_dict(load_json(read_bytes(path)[0] or b"{}")), "instances")
        known = [entry for entry in map(as_dict, entries) if set(entry) == set(kinds)]
        return [Instance(**one) for one in known if all(isinstance(one[name], kinds[name]) for name in kinds)]
    return []


def change_instances(path: str, change: Callable[[List[Instance]], List[Instance]]) -> None:
    """Rewrite the state file, one writer at a time. RouterError when it cannot be written."""
    with file_lock(path):
        data = dump_json({"instances": [instance._asdict() for instance in change(read_instances(path))]})
        write_private(path, data, durable=False)  # no instance outlives a power loss


def ask_instance(instance: Instance, verb: str, method: str = "GET", limit_s: float = _CONTROL_TIMEOUT_S) -> Json:
    """What a running instance answers on its control channel. RouterError 404, 504 when it says nothing, or 503 when it
    does not run (any more).

    An answer counts only with the instance's own id: another program may have its port by now.
    """
    import http.client
    import socket

    place = near_host(instance.host), instance.port
    try:
        with closing(http.client.HTTPConnection(*place, timeout=limit_s)) as connection:
            connection.request(method, _CONTROL + verb, headers={"authorization": "Bearer " + instance.token})
            response, data, until = connection.getresponse(), b"", time.monotonic() + limit_s
            while (piece := response.read1(65_536)) and len(data) < 10_000_000 and time.monotonic() < until:
                data += piece
            answer = as_dict(load_json(data))  # what another program streams without end is none
    except socket.timeout:  # an OSError
        words = "pid %d has port %d and says nothing: it is suspended or busy" % (instance.pid, instance.port)
        raise RouterError(words, 504, "no_answer") from None
    except (OSError, ValueError, http.client.HTTPException, RouterError):  # ValueError: a name or token that is none
        raise RouterError("no llm-router answers on port %d" % instance.port, 503, "not_running") from None
    if answer.get("instance") != instance.id:
        raise RouterError("port %d is in the hands of another program" % instance.port, 503, "not_running")
    if response.status != 200:
        raise RouterError(get_text(answer, "error") or "the instance refused", response.status, "control_error")
    return answer


def running_instances() -> List[Tuple[Instance, Json]]:
    """Every instance that answers, and its status."""
    found = []
    for instance in read_instances(state_path()):
        with suppress(RouterError):  # it does not run any more
            found.append((instance, ask_instance(instance, "status")))
    return found


def find_instance(path: str, config: str, port: int) -> Instance:
    """The running instance with that configuration file (its real path) and port ("" and 0: any); stale entries go.
    RouterError 503 when none runs, UsageError when several do."""
    alive, stale, ending = [], [], ""
    for instance in read_instances(path):
        try:
            ask_instance(instance, "status")
            alive.append(instance)
        except RouterError as error:
            left_s = instance.ends - time.time()
            if error.code != "no_answer" and left_s > 0:  # it does not listen any more
                ending += "; pid %d is stopping, its open requests have %d s left" % (instance.pid, left_s)
            else:
                (alive if error.code == "no_answer" else stale).append(instance)
    if stale:
        with suppress(RouterError):  # a full disk must keep nobody from stopping what runs
            change_instances(path, lambda known: [one for one in known if one not in stale])
    fits = [one for one in alive if (not config or os.path.realpath(one.config) == config) and port in (0, one.port)]
    ports = " or ".join("--port=%d" % one.port for one in fits or alive)
    if not fits:
        others = " with that port or configuration, only %s" % ports if alive else "; llm-router start starts one"
        raise RouterError("no llm-router is running here" + others + ending, 503, "not_running")
    if len(fits) > 1:
        raise UsageError("several run here: choose one with " + ports)
    return fits[0]


def has_ended(instance: Instance) -> bool:
    """Whether an instance that was told to stop is gone: taking its entry out is the last thing it does, unless it was
    killed (Linux: /proc)."""
    is_killed = os.path.exists("/proc/self") and not os.path.exists("/proc/%d" % instance.pid)
    return is_killed or all(one.id != instance.id for one in read_instances(state_path()))


# ----- one running server -----


def run_tool(argv: Sequence[str], limit_s: float, data: bytes = b"", **where: Any) -> Tuple[int, str]:
    """(exit code, output and errors) of another program that gets `data` over stdin; 127 when it is missing or hangs.
    where: cwd, env."""
    import subprocess

    try:
        how = {"input": data, "capture_output": True, "timeout": limit_s, **where}
        done = subprocess.run(argv, check=False, **how)  # noqa: S603  a table's, this file or one on the PATH
    except (OSError, subprocess.TimeoutExpired):
        return 127, "%s is missing or hangs" % one_line(argv[0], 160)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")  # Windows has its own code pages


class Router(CountingHost):
    """One running instance: its gateway and the effects that has (see GATEWAY), what it remembers, and what its control
    channel can do."""

    def __init__(self, loop: Any, options: StartOptions, log: LogWriter) -> None:
        from concurrent.futures import ThreadPoolExecutor

        super().__init__(HealthBook())
        self._worker = ThreadPoolExecutor(1)
        self.id = os.urandom(8).hex()
        self.token = os.urandom(32).hex()
        self.options = options
        self.log = log
        self.ring = TrailRing(options.settings.trail_size)
        self.upstreams = Upstreams(loop, options.settings, options.environ)
        self.send = self.upstreams.send
        path = ledger_path(options.settings)
        self.ledger = Ledger(path, options.settings, log.note) if path else None
        self.server = Server(loop, options.settings, self.handle, self.failed)
        self.server.refused = self.refused
        self._began = self.now()
        self.stopping: Any = None
        self.grace_s = options.settings.drain_grace_ms / 1000
        self.restarts = self.is_told = False  # to run anew after the end; by whoever may, to end
        self.config_state = "ok"
        self._entries: List[Instance] = []
        self._state_trouble = ""
        self._seen = options.loaded.stamp  # as it was read: an edit since then is one, too
        self.guests: Dict[str, str] = {}
        self.items = ItemMemory()
        self.reasoning = BoundedMap()
        self._make_gateway()

    def _make_gateway(self) -> None:
        options = self.options
        models = [(one.id + "/" + model.id, model.cost) for one in options.config.providers for model in one.models]
        self.costs = {ref: cost for ref, cost in models if cost}
        if self.ledger is not None:
            self.ledger.costs = self.costs
        access = make_access(options.config, options.require_auth, self.guests.items())
        self.gateway = Gateway(Routes(options.config), options.settings, access, self, self.book)
        self.gateway.items, self.gateway.reasoning = self.items, self.reasoning
        self.known = frozenset(self.gateway.routes.refs())

    async def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Work in a thread, one after another: where many compute at once, the loop has to wait for each of them."""
        return await self.server.loop.run_in_executor(self._worker, work, *arguments)

    def record(self, trail: Trail) -> None:
        """A request has ended: remember its trail, count it, write its line."""
        self.counters.count(trail, self.known)
        self.log.add(trail)
        if trail.operation:  # not what was refused before it came to that: strangers could fill the ring
            self.ring.put(trail.id, trail)
            if self.ledger is not None:
                self.ledger.add(trail)

    def refused(self, error: HttpError, wire: str) -> str:
        """What could not be read as a request, or found no room, is refused: write its line; the id in there."""
        trail = Trail(self.new_id(), self.now(), self.wall())
        trail.wire, trail.status, trail.outcome, trail.message = wire, error.status, error.code, error.message
        self.record(trail)
        return trail.id

    def failed(self, error: BaseException) -> None:
        """An error of the router's own: one line, with `--debug` its traceback."""
        import traceback

        text = failure_line(error)
        if self.options.debug:
            text += "\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        self.log.note(text, "error")

    async def handle(self, call: Call, sink: Sink) -> None:
        """Answer one call: the control channel's here, every other one's in the gateway."""
        if not call.path.startswith(_CONTROL):
            self.gateway.info = {"instance": self.id, "config": self.config_state}
            self.gateway.draining = self.server.draining
            await self.gateway.handle(call, sink)
            return
        status, body = 401, {"error": "the control channel needs its token"}
        if find_caller(Access(True, (self.token.encode(),)), call.headers) is not None:
            status, body = await self._control(call.method, call.path[len(_CONTROL) :])
        headers = _JSON_HEADERS + _REFUSAL_HEADERS.get(status, [])
        await sink.respond(status, headers, dump_json(dict(body, instance=self.id) if status != 401 else body))

    async def _control(self, method: str, verb: str) -> Tuple[int, Json]:
        name, _, argument = verb.partition("/")
        request = "%s %s" % (method, name)
        if request == "GET status":
            return 200, self.status()
        if request == "GET model":
            problem = ""  # why no request for that model could be served
            try:
                self.gateway.routes.find_plan(unquote(argument))
            except RouterError as error:
                problem = error.message
            return 200, {"problem": problem}
        if request == "GET trail":
            record = self.ring.find(argument)
            if record and record["usage"]:
                record["cost"] = cost_of(record["model"], record["usage"].values(), self.costs)
            return (200, {"trail": record}) if record else (404, {"error": "that request is not remembered (any more)"})
        if request == "POST reload":
            return self.try_reload()
        if request == "POST restart":
            return await self._restart()
        if request in ("POST admit", "POST dismiss"):
            self._change_guests(name, argument)
            return 200, {}
        if request == "POST stop":
            self.is_told = True
            self.stop(argument)
            return 200, {"pid": os.getpid(), "grace_s": self.grace_s}
        return 404, {"error": "unknown verb"}

    async def _restart(self) -> Tuple[int, Json]:
        """Become the program that the file holds by now. 422 when that would end at once, 409 for the configuration."""
        status, body = self.try_reload()
        trouble = await self.server.loop.run_in_executor(None, _try_start) if status == 200 else ""
        if status == 200 and not trouble:
            self.restarts, self.is_told = not self.is_told, True
            self.stop()
        return (422, {"error": trouble}) if trouble else (status, body)

    def _change_guests(self, verb: str, argument: str) -> None:
        """Let a client in by the SHA-256 of its key, `admit/SHA256/NAME`, or out, `dismiss/SHA256`; not stored."""
        sha256, _, name = argument.partition("/")
        if verb == "dismiss":
            self.guests.pop(sha256, None)
        elif re.fullmatch(r"[0-9a-f]{64}", sha256):
            self.guests[sha256] = one_line(name, 60) or "guest"
            for oldest in list(self.guests)[:-_MOST_GUESTS]:  # very likely of a program whose `run` was killed
                del self.guests[oldest]
        self.gateway.access = make_access(self.options.config, self.options.require_auth, self.guests.items())

    def stop(self, grace: str = "") -> None:
        """Begin to drain; `grace` seconds for what is still running, "" for the setting's."""
        if grace.isdecimal() and len(grace) < 7:
            self.grace_s = float(grace)
        self.stopping.set()

    def status(self) -> Json:
        """Everything an operator asks about, without any secret."""
        options, now, refs = self.options, self.now(), self.gateway.routes.refs()
        any_model = tuple(ref[:-1] for ref in refs if ref.endswith("/*"))
        made_up = [key for key in self.book.known() if key.startswith(any_model) and key not in (*refs, *any_model)]
        file = os.path.realpath(__file__)
        tally, none = self.ring.tally(), {"ok": 0, "failed": 0, "last_error": None}
        return {
            "pid": os.getpid(),
            "version": __version__,
            "file": file if os.path.realpath(sys.argv[0]) == file else "",  # another program's module cannot restart
            "host": options.settings.host,
            "port": self.server.port,
            "uptime_s": int(self.now() - self._began),
            "config": {"source": options.loaded.source, "state": self.config_state},
            "require_auth": options.require_auth,
            "connections": len(self.server.connections),
            "default_model": options.config.default_model,
            "candidates": [{**show_health(ref, self.book, now), **tally.get(ref, none)} for ref in refs + made_up],
        }

    def gauges(self) -> Dict[str, Dict[str, float]]:
        """Those of every host, and who is connected."""
        clients = len(self.server.connections)
        streams = sum(one.sink is not None and one.sink.is_open for one in self.server.connections)
        return {**super().gauges(), "llm_router_open_streams": {"": streams}, "llm_router_connections": {"": clients}}

    def try_reload(self) -> Tuple[int, Json]:
        """`reload` as the control channel answers it: status and body. A failure is logged and shown by `status`."""
        try:
            notes = self.reload()
        except RouterError as error:
            self.config_state = one_line(error.message.partition("\n")[0], 500)  # without the text around the place
            self.log.note("reload failed, the configuration before stays: " + self.config_state, "error")
            return 409, {"error": "not reloaded, the last good configuration stays: " + self.config_state}
        return 200, {"changes": notes}

    async def apply_edit(self) -> None:
        """Reload when the configuration file is another one than was seen last. An editor may replace it; while it is
        away nothing changes."""
        seen, self._seen = self._seen, file_stamp(self.options.loaded.path) or self._seen
        if self._seen != seen:
            self.try_reload()

    def reload(self) -> List[str]:
        """Read the configuration again and use it for every request from now on; returns what changed. ConfigError
        leaves all as it was.

        Open requests finish with what they began with. Providers whose URL, key or auth changed start healthy.
        """
        options, loaded = self.options, self.options.loaded
        if os.path.exists(loaded.path) and not os.path.isfile(loaded.path):  # every stream would wait
            raise ConfigError("%s is not a regular file: it is read at the start only" % one_line(loaded.path))
        found = load_config(loaded.path, options.environ) if loaded.path else loaded
        if found.document is not None:
            loaded = found
        elif found.source == loaded.source:  # else it was made of key variables, for want of a file
            raise ConfigError("%s is not there (any more)" % one_line(loaded.path))
        config = read_usable_config(loaded.document, options.environ)
        if options.require_auth and not config.master_key and not config.client_keys:
            raise ConfigError("the new configuration has no masterKey, which --require-auth needs")
        before, after = (
            {one.id: (one.base_urls, one.api_key, one.auths, one.headers, one.enabled) for one in known.providers}
            for known in (options.config, config)
        )
        notes = [id for id in {**before, **after} if before.get(id) != after.get(id)]
        self.book.renew(notes, self.now())
        self.options = options._replace(config=config, loaded=loaded)
        self._make_gateway()
        self.config_state = "ok"
        self.log.note("configuration reloaded" + (": %s changed" % ", ".join(notes) if notes else ""))
        return notes

    def enroll(self, *entries: Instance) -> None:
        """Have the state file say this of the instance, so that `stop`, `reload`, `status` and `explain` find it, and
        without an entry nothing."""
        self._entries = list(entries)
        self.stay_enrolled()

    def stay_enrolled(self) -> None:
        """Write into the state file what it does not say of this instance (any more)."""
        path, trouble = state_path(), ""
        try:
            if [one for one in read_instances(path) if one.id == self.id] != self._entries:
                change_instances(path, lambda known: [one for one in known if one.id != self.id] + self._entries)
        except RouterError as error:
            trouble = error.message
        if trouble and trouble != self._state_trouble:
            self.log.note("stop, reload and status will not find this instance: " + trouble, "warning")
        self._state_trouble = trouble


def _try_start() -> str:
    """Why what this file holds by now could not serve with this process's flags and environment, "" when it could: a
    child starts it on a free port and ends at once."""
    argv = [*interpreter_words(), os.path.realpath(__file__), *sys.argv[1:], "--port=0", "--check"]
    code, said = run_tool(argv, TRIAL_S)
    is_fine = code == 0 and "listening on " in said
    return "" if is_fine else one_line(said.strip().rpartition("\n")[2], 300) or "it says nothing"


def run_server(options: StartOptions) -> int:
    """Serve until a signal or `stop` ends it; the exit code. SIGINT and SIGTERM drain, a second one ends at once."""
    code, port = run_loop(_serve(options))
    if port:  # become the program that this file holds by now, with the same flags, environment, pid and port
        told = "--port=%d" % port
        os.execv(sys.executable, [*interpreter_words(), *(word for word in sys.argv if word != told), told])  # noqa: S606
    return code


def run_loop(work: Any) -> Any:
    """asyncio.run with a loop that watches sockets on every platform: Windows' proactor loop has no add_reader."""
    import asyncio

    how: Dict[str, Any] = {}
    if sys.platform == "win32" and sys.version_info >= (3, 12):
        how["loop_factory"] = asyncio.SelectorEventLoop
    elif sys.platform == "win32":  # deprecated since 3.14
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    return asyncio.run(work, **how)


_PATH_OPTION = "llm_router"  # of -X, which Python ignores and `ps` shows: where the program's file is
_INTERPRETER_FLAGS = {"isolated": "-I", "ignore_environment": "-E", "no_site": "-S", "no_user_site": "-s"}


def interpreter_words() -> List[str]:
    """The interpreter with the options it runs with (-I, -X utf8, -W error), for a process like this one."""
    options = {name: value for name, value in sys._xoptions.items() if name != _PATH_OPTION}
    words = [flag for name, flag in _INTERPRETER_FLAGS.items() if getattr(sys.flags, name)]
    words += ["-W" + text for text in sys.warnoptions]
    words += ["-X" + (name if value is True else "%s=%s" % (name, value)) for name, value in options.items()]
    return [sys.executable, *words]


def _log_stream(settings: Settings) -> Any:
    """Where the log goes. RouterError when its file cannot be written."""
    if not settings.log_file:
        return sys.stderr
    path = os.path.expanduser(settings.log_file)
    for stream in (sys.stdout, sys.stderr):  # /dev/stdout is a link, and where it leads to a socket it cannot be opened
        with suppress(OSError):
            if os.path.islink(path) and os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
    _open_log(path).close()
    return LogFile(path, settings.log_max_bytes)


def _open_log(path: str) -> Any:
    try:
        return open_private(path, "ab")
    except OSError as error:
        words = one_line(path, 160), error.strerror or error, "--log-file or LLM_ROUTER_LOG_FILE"
        raise RouterError("cannot write the log file %s: %s; choose another with %s" % words) from None


async def _serve(options: StartOptions) -> Tuple[int, int]:
    """The exit code, and the port when the file shall be run anew on it."""
    import asyncio
    import threading

    threading.stack_size(8 << 20)  # as the main thread's: of deep JSON, Python 3.13 dies in musl's, which have 1 MiB
    loop = asyncio.get_running_loop()
    log = LogWriter(_log_stream(options.settings), options.settings.log_format, options.settings.log_level)
    loop.set_exception_handler(lambda _, context: log.note(_loop_trouble(context), "warning"))
    router = Router(loop, options, log)
    router.server.most_connections = min(router.server.most_connections, _descriptors_for_clients() or math.inf)
    router.stopping = asyncio.Event()
    give_back = _on_signals(loop, router.stop, router.try_reload)
    try:
        port = await _listen(router.server, options.settings.host, options.settings.port)
        if options.only_checks:
            _announce(options, port)
            return 0, 0
        host, path = options.settings.host, options.loaded.path
        entry = Instance(router.id, os.getpid(), host, port, path, router.token, router.wall())
        router.enroll(entry)
        # A disk that was full may get room, the state file may have been removed or damaged.
        chores = [(_ENROLL_AGAIN_S, lambda: loop.run_in_executor(None, router.stay_enrolled))]
        chores += [(_WATCH_S, router.apply_edit)] if options.watch_config and path else []
        tasks = [asyncio.ensure_future(_repeat(router, *chore)) for chore in chores]
        _announce(options, port)  # last: whoever reads it may stop, reload and ask for the status at once
        _get_ready()
        await router.stopping.wait()
        for task in tasks:
            task.cancel()
        router.enroll(entry._replace(ends=router.wall() + router.grace_s))  # for it answers nobody any more
        log.note("stopping: open requests have %g s to finish" % router.grace_s)
        clean = await router.server.drain(router.grace_s)
    finally:
        router.upstreams.close()
        if router.ledger is not None:
            router.ledger.close()
        router.enroll()  # last: `stop` waits for it
        log.close()
        give_back()
    # What was told to stop has done so, whatever had to be cut: a service's keeper would start it once more after a 1.
    return int(not clean and not router.is_told), port if router.restarts else 0


def _loop_trouble(context: Dict[str, Any]) -> str:
    """What asyncio would have printed with a traceback, in a line."""
    error = context.get("exception")
    return one_line("%s: %s" % (context.get("message"), (error and str(error)) or type(error).__name__), 300)


def _descriptors_for_clients() -> int:
    """Raise the limit of open files as far as the system lets us; how many may be clients: the rest is for upstreams,
    files and the answer that there is no room. 0: unknown. Windows has none, but its loop ends at the 513th socket
    (docs.python.org/3/library/asyncio-platforms.html), and a request takes two."""
    try:
        import resource
    except ImportError:
        return 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, 65_536, 10_240) if soft >= 0 else ():  # macOS allows OPEN_MAX whatever the hard limit says
        if 0 < limit <= 1 << 20 and limit > soft:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                soft = limit
    return max(soft - max(32, soft // 4), soft // 2, 0)


def _get_ready() -> None:
    """Import what the first requests need while there are descriptors to read it with, and tune the cycle collector: it
    passes over what is there for good, and starts only when much is new, since a large body makes thousands of objects.
    Then it looks at older ones soon, too: each transport of asyncio's is a cycle of 3 KB."""
    import gc
    from importlib import import_module

    for name in ("email.utils", "encodings.idna", "http.client", "ssl", "traceback"):
        import_module(name)
    bytes(8 << 20)  # freed at once: glibc then serves bodies from its heap, instead of mapping fresh pages for each
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 1, 1)


async def _repeat(router: Router, every_s: float, work: Callable[[], Any]) -> None:
    """Await `work` again and again. What it raises is a fault of ours, told once: its next turn may do better."""
    told = ""
    while True:
        await router.sleep(every_s)
        try:
            await work()
        except Exception as error:  # the task would end, and nobody would know
            told, before = one_line("%s: %s" % (type(error).__name__, error), 300), told
            if told != before:
                router.log.note("a task in the background failed, and goes on: " + told, "error")


async def _listen(server: Server, host: str, port: int) -> int:
    try:
        return await server.listen(host, port)
    except OSError as error:
        reason = one_line((error.strerror or str(error)).partition(" (while ")[0], 160)  # the address is told anyway
        if error.errno == errno.EADDRINUSE:
            reason = "the port is in use" + _holder_hint(port)
        raise RouterError("cannot listen on %s: %s" % (origin_url("http", host, port), reason)) from None


def _holder_hint(port: int) -> str:
    """Who listens on a port, where the system tells (Linux: /proc), and what to do."""
    for instance, _ in running_instances():
        if instance.port == port:
            return " by a running llm-router (pid %d): llm-router stop --port=%d ends it" % (instance.pid, port)
    holder = find_listener(port)
    return (" by pid %d (%s)" % holder if holder else "") + "; choose another with --port"


def find_listener(port: int) -> Optional[Tuple[int, str]]:
    """(pid, program) of a process that listens on a TCP port, None when the system does not tell.

    /proc/net/tcp: the local address is ADDRESS:PORT in hexadecimal, state 0A is LISTEN, the tenth field is the inode
    (proc(5)); a process that has it shows `socket:[INODE]` among its descriptors.
    """
    import glob

    sockets = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(path, encoding="ascii") as file:
            rows = [line.split() for line in file]
            sockets.update("socket:[%s]" % row[9] for row in rows if row[1].endswith(":%04X" % port) and row[3] == "0A")
    for link in glob.iglob("/proc/[0-9]*/fd/*") if sockets else ():
        with suppress(OSError):  # gone by now, or another user's
            if os.readlink(link) in sockets:
                pid = int(link.split("/")[2])
                with open("/proc/%d/comm" % pid, encoding="utf-8", errors="replace") as file:
                    return pid, one_line(file.read().strip(), 60)
    return None


def settle_stream(stream: Any) -> None:
    """Write what a stream holds; a closed or full one leads nowhere from then on: it would make the exit code 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _announce(options: StartOptions, port: int) -> None:
    """What a person, or a program that waits for the first line, needs to know."""
    base = origin_url("http", near_host(options.settings.host), port)
    lines = [
        "listening on " + origin_url("http", options.settings.host, port),
        "  Anthropic clients   ANTHROPIC_BASE_URL=%s" % base,
        "  OpenAI clients      OPENAI_BASE_URL=%s/v1" % base,
        "  either format       %s/route" % base,
        "  configuration       " + one_line(options.loaded.source),
        "  authorization       "
        + ("clients must show a key" if options.require_auth else "none: anyone who can connect may use it"),
        "  providers           " + ", ".join(one.id for one in options.config.providers if one.enabled),
        "  default model       %s" % (options.config.default_model or "none"),
        "  pid                 %d" % os.getpid(),
    ]
    with suppress(OSError):  # nobody reads it any more, or the disk is full: no reason not to serve
        print("\n".join(lines))
    settle_stream(sys.stdout)


def _on_signals(loop: Any, stop: Callable[[], Any], reload: Callable[[], Any]) -> Callable[[], Any]:
    """The first SIGINT or SIGTERM stops; after it both have their plain meaning: a second one ends the process. SIGHUP
    reloads; Windows has none. What is returned undoes it."""
    import signal

    def end(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    return on_end(end, SIGINT=end, SIGHUP=lambda *_: loop.call_soon_threadsafe(reload))


def on_end(handler: Any, **others: Any) -> Callable[[], Any]:
    """Let SIGTERM and SIGHUP call `handler`, and the signals that `others` names theirs, as far as the system has them.
    The function that is returned gives back what was there before. In a thread of another program signals are that
    program's, and Python lets nobody else have them."""
    import signal
    import threading

    is_guest = threading.current_thread() is not threading.main_thread()
    wanted = {} if is_guest else {"SIGTERM": handler, "SIGHUP": handler, **others}
    found = [(getattr(signal, name), new) for name, new in wanted.items() if hasattr(signal, name)]
    before = [(number, signal.signal(number, new)) for number, new in found]
    # None is a handler that was set in C, which Python cannot give back.
    return lambda: [signal.signal(number, old or signal.SIG_DFL) for number, old in before]


# ----- in the background -----

LOG_PATH = "~/.llm-router.log"
_DETACHED_START_S = 30.0
# Others may write into the same log meanwhile. On Windows a virtual environment's interpreter starts another one.
_SAYS_IT_LISTENS = r"^listening on (http://\S+)\n(?:  .*\n)*?  pid +%s$"


def start_detached(flags: Sequence[str], log_path: str) -> Tuple[int, str]:
    """Start this very file in the background with the flags of `start`; (pid, its address) once it accepts connections.
    What it prints goes to `log_path`. RouterError with its last words when it ends before that."""
    import subprocess

    log = _open_log(log_path)
    began = os.fstat(log.fileno()).st_size
    argv = [*interpreter_words(), os.path.abspath(__file__), "start", *flags]
    release = _hold_signals()
    how: Dict[str, Any] = {"start_new_session": True, "preexec_fn": release}  # held back there, nothing could end it
    if sys.platform == "win32":
        how = {"creationflags": 0x208}  # detached, in a group of its own
    try:
        with log:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **how)  # noqa: S603  this file
        try:
            release()
            return child.pid, _wait_for_start(child, log_path, began)
        except BaseException:
            if child.poll() is None:  # interrupted, or it does not listen in time: nobody would know of it
                child.terminate()
            raise
    finally:
        release()


def _hold_signals() -> Callable[[], Any]:
    """Keep what would interrupt us waiting until the function that is returned is called, here or in a child: an
    interrupt inside Popen would leave a child behind that nobody knows. Windows has nothing to do that with."""
    import signal

    if not hasattr(signal, "pthread_sigmask"):
        return lambda: None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    return lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_start(child: Any, log_path: str, began: int) -> str:
    """The address that a child says it listens on, in what it has logged from `began` on."""
    until = time.monotonic() + _DETACHED_START_S
    with open(log_path, "rb") as file:  # once: what it prints stays in that file, whatever name that is given meanwhile
        while time.monotonic() < until:
            time.sleep(0.05)
            has_ended = child.poll() is not None  # asked before its last words are read
            file.seek(began)
            said = file.read(1_000_000).decode("utf-8", "replace").replace("\r\n", "\n")
            found = re.search(_SAYS_IT_LISTENS % (r"\d+" if sys.platform == "win32" else child.pid), said, re.MULTILINE)
            if found:
                child.returncode = 0  # it is meant to go on without us: no warning that it still runs
                return str(found.group(1))
            if has_ended:
                last = said.strip().split("\n")[-1].replace("llm-router: ", "")
                raise RouterError("it ended at once: " + (last or "see " + log_path))
    raise RouterError("it did not listen within %d s, see %s" % (_DETACHED_START_S, log_path))


# ==============================================================================
# 30 UPDATE - this very file replaced by a newer release [host]
# ==============================================================================

_MAX_RELEASE_BYTES = 20_000_000
_SILENCE_S = 60.0  # of a server that is fetched from
_FETCH_S = 600.0  # for all of an answer, however steadily it drips


def update_file(target: str, source: str) -> str:
    """Replace the program `target` by the release at `source` (a URL or file) after every check; the old one is kept
    as target + ".bak". Returns the version it is then, __version__ when the release is this very one. RouterError, and
    nothing is changed, when the release is not whole, older or does not run."""
    target = os.path.realpath(target)
    folders = set(target.replace("\\", "/").split("/"))
    if {"site-packages", "dist-packages"} & folders:
        name = "FOLDER, that of the newer release: by its name pip would take another project's"  # PyPI's llm-router
        how = "pipx upgrade llm-router" if "pipx" in folders else "pip install --upgrade " + name
        raise RouterError("this program was installed by pip: update it with " + how)
    if not source:
        raise UsageError("update: give --from=URL or FILE, or set LLM_ROUTER_UPDATE_URL")
    data = fetch_release(source)
    if data is None:
        raise RouterError("there is no release at %s" % one_line(mask_url(source), 160))
    _check_digest(data, source)
    try:
        compile(data, "release", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RouterError("the release is not a Python program: %s" % one_line(str(error), 120)) from None
    old = read_bytes(target)[0]
    after = __version__ if old == data else _check_version(data)
    if after != __version__:
        if not write_private(target, data, expected=old, mode=os.stat(target).st_mode & 0o777):
            raise RouterError("another program is changing %s; it is not updated" % one_line(target, 160))
    return after


def fetch_release(source: str) -> Optional[bytes]:
    """The bytes at a URL (https, or http on this machine) or in a file, None when there is nothing. RouterError when
    they cannot be had whole."""
    if "://" not in source:
        return read_bytes(os.path.expanduser(source))[0]
    status, headers, data = fetch(check_safe_url(source), _MAX_RELEASE_BYTES, check_safe_url)
    shown = one_line(mask_url(source), 160)
    if status in (404, 410):
        return None
    if status != 200:
        raise RouterError("%s answers %d" % (shown, status))
    size = header([(name.lower(), value) for name, value in headers.items()], "content-length")
    if size and size != str(len(data)):
        raise RouterError("the download of %s broke off" % shown)
    return data


def fetch(url: str, max_bytes: int, check: Any = None, **request: Any) -> Tuple[int, Any, bytes]:
    """(status, headers, body) of the answer to a request, whatever its status; a redirection is followed when `check`
    lets its URL pass. request: method, data and headers. RouterError for no answer, one that is too slow or too large.
    What stays on this machine goes through no proxy."""
    import http.client
    import urllib.error
    import urllib.request

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            if check is None:  # it would take a token along
                return None
            check(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    shown = one_line(mask_url(url), 160)
    direct = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    until, data = time.monotonic() + _FETCH_S, b""
    try:
        try:
            asked = urllib.request.Request(url, **request)  # noqa: S310  checked
            trust = Network({}, os.environ.get("LLM_ROUTER_CA_BUNDLE", "")).tls_context("")
            opener = urllib.request.build_opener(Redirects, urllib.request.HTTPSHandler(context=trust), *direct)
            response = opener.open(asked, timeout=_SILENCE_S)
        except urllib.error.HTTPError as error:
            response = error  # an answer like any other
        with response:
            while piece := response.read1(65_536):
                data += piece
                if len(data) > max_bytes or time.monotonic() > until:
                    how = "large" if len(data) > max_bytes else "slow"
                    raise RouterError("the answer of %s is too %s" % (shown, how))
            return int(response.code), response.headers, data
    except (OSError, http.client.HTTPException) as error:
        why = one_line(str(getattr(error, "reason", error)), 160)  # urllib wraps it
        raise RouterError("cannot read %s: %s" % (shown, why)) from None
    except ValueError:  # its text quotes the header, which may be a token
        raise RouterError("cannot ask %s: its URL or a header has a character that HTTP forbids" % shown) from None


def check_safe_url(url: str) -> str:
    """The URL, when it is https, or http that stays on this machine. UsageError otherwise."""
    with suppress(ValueError):  # http://[
        parts = urlsplit(url)
        if parts.scheme == "https" or parts.scheme == "http" and is_loopback(parts.hostname or ""):
            return url
    raise UsageError("%s is not https, and not on this machine" % one_line(mask_url(url), 160))


def _check_digest(data: bytes, source: str) -> None:
    """Compare with SOURCE.sha256 when there is one: the digits, alone, before a file's name or behind it (BSD)."""
    place, question, query = source.partition("?")
    said = fetch_release(place + ".sha256" + question + query)
    if said is not None and hashlib.sha256(data).hexdigest().encode() not in said.lower().split():
        raise RouterError("the release is not what its .sha256 says: nothing was changed")


def _check_version(data: bytes) -> str:
    """What a release answers to --version, run alone. RouterError when it is older than this one or does not run."""
    with temporary_folder() as folder:
        path = os.path.join(folder, "llm_router.py")
        write_private(path, data, durable=False)
        code, said = run_tool([sys.executable, "-I", path, "--version"], 60)
    name, _, version = said.partition("\n")[0].strip().partition(" ")
    if code or name != "llm-router" or not re.fullmatch(_VERSION, version):
        raise RouterError("the release does not run here: its --version failed or gave no version")
    if _version_key(version) < _version_key(__version__):
        raise RouterError("the release %s is older than %s: nothing was changed" % (version, __version__))
    return version


_VERSION = r"([0-9]{1,9}(?:\.[0-9]{1,9})*)(\.?(?:a|b|rc|dev)[0-9]+)?[0-9a-z.+-]{0,40}"  # PEP 440


def _version_key(version: str) -> Tuple[List[int], bool]:
    """What versions are ordered by: 1.0rc1 comes before 1.0, 1.0.post1 does not."""
    numbers, early = re.match(_VERSION, version).groups()  # type: ignore[union-attr]  both have been checked
    return [int(number) for number in numbers.split(".")], not early


# ==============================================================================
# 31 SERVICES - start with the machine: launchd, systemd, Windows tasks [host]
# ==============================================================================

SERVICE_NAME = "llm-router"
_LAUNCHD_LABEL = "org.llm-router"
_SERVICE_S = 30.0
_SERVICE_VARIABLES = "HTTPS_PROXY HTTP_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR LLM_ROUTER_CA_BUNDLE".split()


class Service(NamedTuple):
    """How one platform starts the router at login. path: its file, "" when it has none; text: what stands in it.
    install, status, remove: the commands of the platform's own tool; what undoes it needs the file, which goes last.
    hint: what is left to know."""

    path: str
    text: str
    install: Tuple[Texts, ...]
    status: Texts
    remove: Tuple[Texts, ...]
    hint: str = ""


def service_variables(environ: Environ) -> Dict[str, str]:
    """What a service must keep of the environment: proxies and certificates, in either case, and settings; no key."""
    names = [row.variable for row in SETTINGS]
    names += [name for upper in _SERVICE_VARIABLES for name in (upper, upper.lower())]
    return {name: environ[name] for name in names if environ.get(name)}


def make_service(platform: str, home: str, argv: Sequence[str], variables: Environ, log: str) -> Service:
    """The service of a platform (sys.platform) that runs `argv`. A value, nothing is touched. UsageError for what no
    platform's file can hold: a control character, which could start a line of its own there, and bytes of no text."""
    for text in (home, log, *argv, *variables, *variables.values()):
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
            raise UsageError("a service cannot have a control character, nor what is no text: %s" % one_line(text, 160))
    if platform == "darwin":
        return _launchd_agent(home, argv, variables, log)
    return _windows_task(argv) if platform == "win32" else _systemd_unit(home, argv, variables)


_SYSTEMD_UNIT = """[Unit]
Description=llm-router

[Service]
ExecStart=%s
%sExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=5

[Install]
WantedBy=default.target
"""


def _systemd_unit(home: str, argv: Sequence[str], variables: Environ) -> Service:
    """systemd.service(5): % and $ are its own in ExecStart, quotes and backslashes are C's. Behind @ the program comes
    first, in which $ is not its own, and then all of argv."""
    words = [_systemd_word(word) for word in (argv[0], *argv)]
    call = "@%s %s" % (words[0], " ".join(words[1:]).replace("$", "$$"))
    kept = "".join("Environment=%s\n" % _systemd_word("%s=%s" % entry) for entry in variables.items())
    unit, user = SERVICE_NAME + ".service", ("systemctl", "--user")
    path = home + "/.config/systemd/user/" + unit
    return Service(
        path,
        _SYSTEMD_UNIT % (call, kept),
        ((*user, "daemon-reload"), (*user, "enable", "--now", unit)),
        (*user, "is-active", unit),
        ((*user, "disable", "--now", unit), ("rm", path)),
        "it ends when you log out, and starts when you log in; all the time it runs after: loginctl enable-linger",
    )


def _systemd_word(word: str) -> str:
    return '"%s"' % word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


def _launchd_agent(home: str, argv: Sequence[str], variables: Environ, log: str) -> Service:
    """launchd.plist(5)."""
    import plistlib

    entry: Json = {"Label": _LAUNCHD_LABEL, "ProgramArguments": list(argv), "EnvironmentVariables": dict(variables)}
    entry.update(RunAtLoad=True, KeepAlive={"SuccessfulExit": False}, StandardOutPath=log, StandardErrorPath=log)
    entry.update(Umask=0o77)  # or everybody could read the log
    path = "%s/Library/LaunchAgents/%s.plist" % (home, _LAUNCHD_LABEL)
    list_, remove = ("launchctl", "list", _LAUNCHD_LABEL), (("launchctl", "unload", "-w", path), ("rm", path))
    return Service(path, plistlib.dumps(entry).decode(), (("launchctl", "load", "-w", path),), list_, remove)


def _windows_task(argv: Sequence[str]) -> Service:
    """schtasks /Create: at logon, as this user. It knows no flag for what else a task of its kind does: end after three
    days, and run on mains only (learn.microsoft.com, New-ScheduledTaskSettingsSet)."""
    import subprocess

    create = ("schtasks", "/Create", "/F", "/SC", "ONLOGON", "/TN", SERVICE_NAME, "/TR", subprocess.list2cmdline(argv))
    limits = "-ExecutionTimeLimit ([TimeSpan]::Zero) -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries"
    change = "Set-ScheduledTask %s -Settings (New-ScheduledTaskSettingsSet %s)" % (SERVICE_NAME, limits)
    for_good = ("powershell", "-NoProfile", "-Command", change)
    run = ("schtasks", "/Run", "/TN", SERVICE_NAME)
    remove = ("schtasks", "/Delete", "/F", "/TN", SERVICE_NAME)
    return Service("", "", (create, for_good, run), ("schtasks", "/Query", "/TN", SERVICE_NAME), (remove,))


def install_service(service: Service) -> Tuple[List[str], str]:
    """Write the service's file and start it; what `give_commands` returns. RouterError when it cannot be written."""
    if service.path:
        if os.path.exists(service.path):  # what runs would go on as it was started
            give_commands(service.remove)
        make_folder(os.path.dirname(service.path))
        write_private(service.path, service.text.encode())
    return give_commands(service.install)


def service_state(service: Service) -> str:
    """`not installed`, which schtasks says by a 1 alone, or what the platform's tool says."""
    if service.path and not os.path.exists(service.path):
        return "not installed"
    code, said = run_tool(service.status, _SERVICE_S)
    words = "not installed" if code == 1 and not service.path else one_line(said.strip(), 300) or "code %d" % code
    return "installed, state unknown: " + words if code and service.path and " " in words else words


def give_commands(commands: Sequence[Texts]) -> Tuple[List[str], str]:
    """Run commands; those that are left for the user, from the first on that failed, and what that one said."""
    import shlex

    for at, command in enumerate(commands):
        code, said = run_tool(command, _SERVICE_S)
        if code:
            return [shlex.join(words) for words in commands[at:]], one_line(said.strip(), 300)
    return [], ""


# ==============================================================================
# 32 DEPLOY - this file as a Cloudflare Worker: what is sent, and by whom [host]
# ==============================================================================
#
# A deployment is first made as values: the project's files, the secrets, and the steps that bring them there, either
# requests to Cloudflare's API (developers.cloudflare.com/api) or calls of its tool wrangler. A dry run shows exactly
# the steps that would be taken otherwise. Secrets travel in bodies and over stdin, never as arguments.

WORKER_NAME = "llm-router-route"
_COMPATIBILITY: Json = {
    "compatibility_date": "2026-11-17",
    "compatibility_flags": ["python_workers", "disable_python_external_sdk"],
}
_ENTRY = '''"""The Worker's entry: every request goes to the router that stands beside this file as llm_router.py."""

from workers import WorkerEntrypoint

from llm_router import WorkerRouter

ROUTER = WorkerRouter()  # it lives as long as the isolate, and with it what it knows of its providers' health


class Default(WorkerEntrypoint):
    async def fetch(self, request):
        return await ROUTER.fetch(request, self.env, self.ctx)
'''
_CODE_TYPE = "text/x-python"
_API_URL = "https://api.cloudflare.com/client/v4"
_MAX_API_BYTES = 20_000_000
_WRANGLER_S = 900.0  # it may install itself first
_SECRET_BYTES = 5000  # 5 KB each (developers.cloudflare.com/workers/platform/limits)
# Names and addresses (RFC 1918, 3927, 4193, 6598) that mean something in one network only.
_PRIVATE_HOST = (
    r"[^.:]+|.+\.(?:internal|lan|local)|(?:f[cd]..|fe80):.+|(?:10|169\.254|192\.168|172\.(?:1[6-9]|2\d|3[01])"
    r"|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7]))\.[.\d]+"
)
_MAX_SECRETS = 60  # the free plan has room for 64 variables and secrets
_WRANGLER_VARIABLES = {"CI": "1", "WRANGLER_SEND_METRICS": "false", "WRANGLER_HIDE_BANNER": "true"}


class Site(NamedTuple):
    """Where a Worker goes. account: "" for the only one of the token. domain: a host of its own; route: a pattern in a
    zone of the account; neither: NAME.SUBDOMAIN.workers.dev."""

    name: str = WORKER_NAME
    account: str = ""
    domain: str = ""
    route: str = ""

    @property
    def account_path(self) -> str:
        """Its account in Cloudflare's API."""
        return "/accounts/" + (self.account or "<account>")

    @property
    def path(self) -> str:
        """The Worker in Cloudflare's API."""
        return "%s/workers/scripts/%s" % (self.account_path, self.name)

    @property
    def address(self) -> str:
        """Where clients find it, without https://; "" for the account's own name on workers.dev."""
        return self.domain or self.route.rstrip("*/")


_HOST_SHAPE = r"(?:[a-z0-9-]+\.)+[a-z0-9-]+"
_SITE_SHAPES = (
    ("name", r"[a-z0-9][a-z0-9_-]{0,62}"),
    ("account-id", r"[A-Za-z0-9_-]{0,64}"),
    ("domain", r"(?:%s)?" % _HOST_SHAPE),
    ("route", r"(?:%s/(?:router?/)?\*)?" % _HOST_SHAPE),  # paths that the router knows
)


class CloudStep(NamedTuple):
    """One thing to do. words: a method and a path of the API, or a command line. doing: what it is for. content: what
    is sent, a JSON value or a text, "" for nothing. files: what goes along, in a request as further parts."""

    doing: str
    words: Texts
    content: Any = ""
    files: Mapping[str, bytes] = {}


def check_site(site: Site) -> Site:
    """The site, or a UsageError for a name, domain or route that Cloudflare does not take."""
    for value, (flag, shape) in zip(site, _SITE_SHAPES):
        if not re.fullmatch(shape, value):
            raise UsageError("--%s: %s has not the right form" % (flag, one_line(value, 80)))
    if site.domain and site.route:
        raise UsageError("give either --domain or --route")
    return site


def key_weakness(key: str) -> str:
    """Why a master key is too weak for a router that everybody can reach, "" when it is strong. Words that lists of
    passwords hold count for nothing."""
    words = "0123456789|abcdef|change|default|letmein|master|passw[o0]rd|private|qwerty|router|secret|welcome|worker"
    core = re.sub(words, "", key, flags=re.IGNORECASE)
    kinds = sum(bool(re.search(kind, core)) for kind in ("[a-z]", "[A-Z]", "[0-9]", "[^a-zA-Z0-9]"))
    if len(core) < 20:
        return "it has less than 20 characters beside well-known words"
    if kinds < 2 or kinds == 2 and len(core) < 32:
        return "it has too few kinds of characters: mix small and capital letters, digits and signs"
    return "it repeats itself" if len(set(core)) < 10 else ""


def minify_document(document: Json, master_key: str) -> str:
    """A configuration as short JSON, with the key that is in force. ConfigError for what JSON cannot say."""
    document = set_master_key(document, master_key).document if master_key else document
    return render_document(document, None).decode("utf-8").strip()


def config_secrets(text: str) -> Dict[str, str]:
    """The secrets that hold a configuration: as it is, packed, or packed and spread. UsageError when too large."""
    name = CONFIG_VARIABLES[0]
    if len(text.encode("utf-8")) <= _SECRET_BYTES:
        return {name: text}
    packed = pack_config(text)
    starts = range(0, len(packed), _SECRET_BYTES)
    if len(starts) > _MAX_SECRETS:
        words = len(starts), _MAX_SECRETS
        raise UsageError("the configuration would need %d secrets of 5 KB, %d can be had: remove some models" % words)
    names = [name] + ["%s_%d" % (name, number) for number in range(2, len(starts) + 1)]
    return {name: packed[at : at + _SECRET_BYTES] for name, at in zip(names, starts)}


class Payload(NamedTuple):
    """What the Worker gets to know. secrets: by name, the configuration's first. doubts: what will not work there."""

    config: Config
    secrets: Dict[str, str]
    doubts: Texts


def make_payload(document: Json, environ: Environ) -> Payload:
    """The secrets for a configuration. ConfigError when it cannot be used, UsageError when it is too large."""
    config = read_usable_config(document, environ)
    secrets, doubts = config_secrets(minify_document(document, config.master_key)), []
    entries = [as_dict(raw) for _, raw in provider_entries("", get_field(document, "config", "providers"))]
    for raw in entries:
        name = "" if _is_off(raw) else as_text(get_field(raw, "provider", "apiKeyEnv")).strip()
        if environ.get(name, "").strip():
            secrets[name] = environ.get(name, "").strip()
        elif name and not get_field(raw, "provider", "apiKey"):
            doubts.append("the variable %s is not set here: the Worker needs a secret of this name" % name)
    enabled = [one for one in config.providers if one.enabled]
    places = [(urlsplit(url).hostname or "", one.id) for one in enabled for url in one.base_urls.values()]
    private = [it for it in places if is_loopback(it[0]) or re.fullmatch(_PRIVATE_HOST, it[0])]
    doubts += ["Cloudflare cannot reach %s, the address of the provider %s" % it for it in private]
    return Payload(config, secrets, tuple(dict.fromkeys(doubts)))


def project_files(site: Site) -> Dict[str, bytes]:
    """The Worker project that wrangler deploys, by file name: entry.py, wrangler.toml and this very file."""
    rows: List[Tuple[str, Any]] = [("name", site.name), ("main", "entry.py"), *_COMPATIBILITY.items()]
    rows += [("workers_dev", not site.domain and not site.route), ("keep_vars", True)]
    toml = "".join("%s = %s\n" % (name, json.dumps(value)) for name, value in rows)
    toml += "routes = [{ pattern = %s, custom_domain = true }]\n" % json.dumps(site.domain) if site.domain else ""
    toml += "routes = [%s]\n" % json.dumps(site.route) if site.route else ""
    router = read_bytes(os.path.realpath(__file__))[0] or b""
    return {"entry.py": _ENTRY.encode(), "wrangler.toml": toml.encode(), "llm_router.py": router}


def write_project(folder: str, site: Site) -> List[str]:
    """Write the project into a folder, which is made; the paths of what was written: a wrangler.toml with other words,
    vars or routes perhaps, stays. RouterError when it cannot be written."""
    make_folder(folder)
    paths = []
    for name, data in project_files(site).items():
        path = os.path.join(folder, name)
        if name != "wrangler.toml" or read_bytes(path)[0] in (None, data):
            write_private(path, data)
            paths.append(path)
    return paths


# ----- the steps -----


def api_steps(site: Site, secrets: Mapping[str, str], zone: str = "<zone>") -> List[CloudStep]:
    """The requests of a deployment. One upload brings code and secrets together: no moment has only one of them.

    Multipart metadata: developers.cloudflare.com/workers/configuration/multipart-upload-metadata. `keep_bindings` keeps
    what was set by others: variables, and the master key of `worker-key`.
    """
    files = project_files(site)
    bindings = [{"type": "secret_text", "name": name, "text": text} for name, text in secrets.items()]
    keeps = ["plain_text", "json", "secret_text"]
    metadata = dict(_COMPATIBILITY, main_module="entry.py", bindings=bindings, keep_bindings=keeps)
    code = {name: files[name] for name in ("entry.py", "llm_router.py")}
    place = CloudStep("an address on workers.dev", ("POST", site.path + "/subdomain"), {"enabled": True})
    if site.domain:
        # domains: developers.cloudflare.com/api/resources/workers/subresources/domains
        body = {"environment": "production", "hostname": site.domain, "service": site.name, "zone_id": zone}
        place = CloudStep("the domain", ("PUT", site.account_path + "/workers/domains"), body)
    elif site.route:
        body = {"pattern": site.route, "script": site.name}
        place = CloudStep("the route", ("POST", "/zones/%s/workers/routes" % zone), body)
    return [CloudStep("code and secrets", ("PUT", site.path), metadata, code), place]


def wrangler_steps(site: Site, secrets: Mapping[str, str]) -> List[CloudStep]:
    """The calls of wrangler, made in a folder that holds the project's files."""
    bulk = CloudStep("secrets", ("wrangler", "secret", "bulk", "--name", site.name), secrets)
    return [CloudStep("code", ("wrangler", "deploy"), "", project_files(site)), bulk]


def key_step(site: Site, key: str, wrangler: bool) -> CloudStep:
    """The step of `worker-key`: a new master key, which goes before the configuration's and outlives a `deploy`."""
    name = "LLM_ROUTER_MASTER_KEY"
    if wrangler:
        return CloudStep("the key", ("wrangler", "secret", "put", name, "--name", site.name), key)
    return CloudStep("the key", ("PUT", site.path + "/secrets"), {"name": name, "text": key, "type": "secret_text"})


def show_secrets(secrets: Mapping[str, str]) -> Dict[str, str]:
    """Secrets as a dry run shows them, in the place of their texts."""
    return {name: "%s (%d characters)" % (mask(text), len(text)) for name, text in secrets.items()}


def show_step(step: CloudStep, base: str) -> Json:
    """A step as a dry run shows it: all that would be sent, programs by size and hash."""
    kind = "text/plain" if isinstance(step.content, str) else "application/json"
    whole = {"name": "metadata" if step.files else "", "type": kind, "content": step.content}
    sent: List[Json] = [whole] if step.content else []
    for name, data in step.files.items():
        digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        shown = {"type": _CODE_TYPE, **digest} if name.endswith(".py") else {"lines": data.decode().splitlines()}
        sent.append({"name": name, **shown})
    words = step.words if step.words[0] == "wrangler" else (step.words[0], base + step.words[1])
    return {"for": step.doing, "call": " ".join(words), "sends": sent}


def encode_step(step: CloudStep) -> Tuple[str, bytes]:
    """(content type, body) of a step's request: JSON, with files multipart/form-data (RFC 7578)."""
    content = json.dumps(step.content).encode()
    if not step.files:
        return "application/json", content
    parts = [('name="metadata"', "application/json", content)]
    parts += [('name="%s"; filename="%s"' % (name, name), _CODE_TYPE, data) for name, data in step.files.items()]
    boundary = "llm-router-" + hashlib.sha256(b"".join(data for _, _, data in parts)).hexdigest()
    body = b""
    for names, kind, data in parts:
        head = "--%s\r\ncontent-disposition: form-data; %s\r\ncontent-type: %s\r\n\r\n" % (boundary, names, kind)
        body += head.encode() + data + b"\r\n"
    return "multipart/form-data; boundary=" + boundary, body + b"--%s--\r\n" % boundary.encode()


# ----- taking them -----


class Cloudflare:
    """Cloudflare's API with a token (developers.cloudflare.com/fundamentals/api/how-to/make-api-calls)."""

    def __init__(self, environ: Environ, token: str) -> None:
        self.base = api_url(environ)
        self._token = token

    def take(self, step: CloudStep, before: str = "") -> Any:
        """What a step's request results in. RouterError with Cloudflare's words, which `before` precedes; its status is
        the answer's."""
        (method, path), headers, body = step.words, {"authorization": "Bearer " + self._token}, None
        if step.content:
            headers["content-type"], body = encode_step(step)
        try:
            status, _, data = fetch(self.base + path, _MAX_API_BYTES, method=method, data=body, headers=headers)
        except RouterError as error:
            raise RouterError(before + error.message) from None
        answer = as_dict(try_json(data))
        if status < 300 and answer.get("success") is True:
            return answer.get("result")
        raise RouterError(before + self._refusal(method, path, status, answer), status)

    def ask(self, path: str) -> Any:
        """What is at a path."""
        return self.take(CloudStep("", ("GET", path)))

    def _refusal(self, method: str, path: str, status: int, answer: Json) -> str:
        errors = [as_dict(error) for error in get_list(answer, "errors")]
        words = "; ".join("%s (code %s)" % (error.get("message"), error.get("code")) for error in errors)
        codes = {as_int(error.get("code")) for error in errors}
        if status == 401 or codes & {10000, 9109, 6003, 6111, 1000, 1001}:
            words = "the API token is not accepted here: %s; make one from the template Edit Cloudflare Workers" % words
        if codes & {10063, 10007} and path.endswith("/subdomain"):
            words += "; open Workers & Pages in the dashboard once to get a workers.dev name, or give --domain"
        words = words or ("no reason given" if answer else "no JSON, as from a proxy or a sign-in page between")
        return one_line("Cloudflare answers %d to %s %s: %s" % (status, method, path, words), 600)

    def accounts(self) -> List[Tuple[str, str]]:
        """(id, name) of every account that the token may use."""
        found = map(as_dict, as_list(self.ask("/accounts?per_page=50")))
        return [(_path_word(account.get("id")), str(account.get("name"))) for account in found]

    def find_zone(self, host: str) -> str:
        """The id of the zone that holds a host. RouterError when the account has none."""
        labels = host.split(".")
        for at in range(len(labels) - 1):
            zones = as_list(self.ask("/zones?name=" + ".".join(labels[at:])))
            if zones:
                return _path_word(as_dict(zones[0]).get("id"))
        raise RouterError("no zone of this account holds %s" % one_line(host, 100))

    def secret_names(self, site: Site) -> Optional[List[str]]:
        """The names of the secrets that a Worker has; None when there is no such Worker. RouterError for one that
        is no router."""
        try:
            found = as_dict(self.ask(site.path + "/settings"))
        except RouterError as error:
            if error.status == 404:
                return None
            raise
        bindings = map(as_dict, get_list(found, "bindings"))
        names = [str(binding.get("name")) for binding in bindings if binding.get("type") == "secret_text"]
        _check_own(site, names, "python_workers" in get_list(found, "compatibility_flags"))
        return names

    def deploy(self, site: Site, secrets: Mapping[str, str]) -> Tuple[str, List[str]]:
        """Take the steps of a deployment, after everything that may stand in their way was asked for. The Worker's URL
        and the names of the secrets it had."""
        host = site.address.partition("/")[0]
        upload, place = api_steps(site, secrets, self.find_zone(host) if host else "")
        present = self.secret_names(site) or []
        has_place = bool(host) and self._has_place(place, site)
        own = {} if host else as_dict(self.ask(site.account_path + "/workers/subdomain"))
        url = "https://" + (site.address or "%s.%s.workers.dev" % (site.name, _path_word(own.get("subdomain"))))
        self.take(upload)
        if not has_place:
            self.take(place, "code and secrets are there, the rest is not, so deploy again: ")
        return url, present

    def set_key(self, site: Site, key: str) -> None:
        """The step of `worker-key`. RouterError when there is no such Worker."""
        if self.secret_names(site) is None:
            raise RouterError("there is no Worker %s: llm-router deploy makes it" % site.name, 404)
        self.take(key_step(site, key, False))

    def _has_place(self, place: CloudStep, site: Site) -> bool:
        """Whether its domain or route leads to the Worker already. RouterError when it leads to another one."""
        wanted, name, owner, query = site.route, "pattern", "script", ""
        if site.domain:
            wanted, name, owner, query = site.domain, "hostname", "service", "?hostname=" + site.domain
        rows = map(as_dict, as_list(self.ask(place.words[1] + query)))
        owners = [str(row.get(owner)) for row in rows if row.get(name) == wanted]
        if owners and owners[0] != site.name:
            words = wanted, one_line(owners[0], 80)
            raise RouterError("%s leads to the Worker %s: remove it there first" % words, 409)
        return bool(owners)


def _path_word(value: Any) -> str:
    """An id or name that Cloudflare told, fit for a path and a terminal. RouterError for anything else."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", as_text(value)):
        raise RouterError("Cloudflare's answer has no usable id: %s" % one_line(str(value), 80), 502)
    return str(value)


def api_url(environ: Environ) -> str:
    """Where Cloudflare's API is. UsageError for one that would get the token without TLS."""
    return check_safe_url(environ.get("CLOUDFLARE_API_BASE_URL", "").strip().rstrip("/") or _API_URL)


def _check_own(site: Site, names: List[str], is_router: bool) -> None:
    """RouterError for a Worker of another kind, that nobody wants replaced. names: of its secrets."""
    if not is_router and not set(names).intersection(CONFIG_VARIABLES):
        words = "the Worker %s is no llm-router, having no secret %s: give another --name, or delete it first"
        raise RouterError(words % (site.name, CONFIG_VARIABLES[0]), 409)


class Wrangler:
    """Cloudflare's own tool, which has its own way to log in (developers.cloudflare.com/workers/wrangler)."""

    def __init__(self, program: str, environ: Environ, account: str) -> None:
        self._program = program
        self._environ = dict(environ, **_WRANGLER_VARIABLES, **({"CLOUDFLARE_ACCOUNT_ID": account} if account else {}))

    def call(self, step: CloudStep, site: Site, before: str = "") -> str:
        """What a call printed; it is made in a folder with the project, which is gone afterwards. RouterError with
        its last words when it failed, which `before` precedes."""
        data = step.content if isinstance(step.content, str) else json.dumps(step.content)
        with temporary_folder() as folder:
            write_project(folder, site)
            line = [self._program, *step.words[1:]]
            code, said = run_tool(line, _WRANGLER_S, data.encode(), cwd=folder, env=self._environ)
        said = re.sub("\033\\[[0-9;]*m", "", said)
        if code:
            lines = [line.strip() for line in said.splitlines() if line.strip() and "Logs were written" not in line]
            words = " ".join(step.words[:3]), code, one_line(" | ".join(lines[-8:]), 900)
            raise RouterError(before + "%s failed (code %d): %s" % words)
        return said

    def secret_names(self, site: Site) -> List[str]:
        """The names of the secrets that a Worker has. RouterError when there is no such Worker."""
        listed = self.call(CloudStep("", ("wrangler", "secret", "list", "--name", site.name)), site)
        return re.findall(r'"name":\s*"(\w+)"', listed)

    def deploy(self, site: Site, secrets: Mapping[str, str]) -> Tuple[str, List[str]]:
        """Take the steps of a deployment; the Worker's URL, "" when not told, and the names of the secrets it had."""
        present: List[str] = []
        with suppress(RouterError):  # there is no such Worker; if it is anything else, the first step says so
            present = self.secret_names(site)
        _check_own(site, present, not present)  # without any secret it may be one that was not finished
        code, bulk = wrangler_steps(site, secrets)
        said = self.call(code, site)
        self.call(bulk, site, "the code is there, its secrets are not, so deploy again: ")
        found = re.search(r"https://[\w.-]+\.workers\.dev", said)
        return "https://" + site.address if site.address else found.group(0) if found else "", present

    def set_key(self, site: Site, key: str) -> None:
        """The step of `worker-key`; wrangler would make a Worker that does not exist, and say so to nobody."""
        names = self.secret_names(site)
        _check_own(site, names, not names)
        self.call(key_step(site, key, True), site)


# ==============================================================================
# 33 DEMO - fake providers, the router before them, and every kind of request [host]
# ==============================================================================

_DEMO_TEXT = "Hello from a provider that works."

# Provider -> its format, what it does with a request, and the status and words of its error.
_DEMO_PROVIDERS: Dict[str, Tuple[str, str, int, str]] = {
    "steady": ("openai", "answers", 0, ""),
    "claudette": ("anthropic", "answers", 0, ""),
    "limited": ("openai", "says 429", 429, "Rate limit reached"),
    "failing": ("anthropic", "says 500", 500, "Internal error"),
    "lying": ("openai", "says 200, then an error", 200, "Provider returned error"),
    "dying": ("openai", "breaks off in the middle of a stream", 0, ""),
}
_DEMO_REQUESTS: Dict[str, Json] = {
    "openai": {"messages": [{"role": "user", "content": "Say hello."}]},
    "anthropic": {"max_tokens": 100, "messages": [{"role": "user", "content": "Say hello."}]},
    "responses": {"input": "Say hello."},
}


async def _demo_provider(call: Call, sink: Sink) -> None:
    """The fake providers: the first segment of the path says which one is meant."""
    name, body = call.path.split("/")[1], load_json(await call.read_body())
    format, _, status, message = _DEMO_PROVIDERS[name]
    wire, context = WIRE_FORMATS[format], Context(ChatRequest(get_text(body, "model"), []), "demo", 0)
    answer = ChatResponse("demo", "demo", [Text(_DEMO_TEXT)], "end_turn", "", Usage(input=12, output=7))
    if status:
        error = ErrorInfo(502 if status == 200 else status, message)
        await sink.respond(status, _JSON_HEADERS, dump_json(wire.render_error(error, "demo")))
    elif not body.get("stream"):
        await sink.respond(200, _JSON_HEADERS, dump_json(wire.render_response(answer, context)))
    else:
        renderer, words = wire.renderer(context), list(map(Delta, re.findall(r"\S+\s*", _DEMO_TEXT)))
        events = [part for event in unfold(answer) for part in (words if isinstance(event, Delta) else [event])]
        sink.begin(_STREAM_HEADERS, SSE_COMMENT)
        for event in events[:5] if name == "dying" else events:  # the start and three words
            sink.write(renderer.render(event))
        sink.cut() if name == "dying" else await sink.finish()


def demo_document(base_url: str) -> Json:
    """The configuration of the demo, in the form of the configuration file."""
    providers = []
    for name, (wire, _, status, _) in _DEMO_PROVIDERS.items():
        model = {"id": "demo", "fallbackModels": ["steady/demo"] if status else []}
        one = {"id": name, "baseUrl": "%s/%s/v1" % (base_url, name), "apiKey": "demo-key-of-" + name}
        providers.append(dict(one, formats=[wire], models=[model]))
    return {"version": 1, "defaultModel": "steady/demo", "providers": providers}


def ask_demo(port: int, wire: str, stream: bool, provider: str) -> Tuple[bool, str, str]:
    """Send one request of the demo: whether the answer is right, what it was, and the decision trail. Right is
    the whole text, and where a stream dies an honest error in it."""
    import http.client

    body, whole = dict(_DEMO_REQUESTS[wire], model=provider + "/demo", stream=stream), True
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", ENDPOINT_HELP[wire], dump_json(body), {"content-type": "application/json"})
        response = connection.getresponse()
        try:
            data = response.read()
        except http.client.IncompleteRead as error:
            data, whole = error.partial, False
    answer = _read_demo_answer(wire, stream, data)
    right = isinstance(answer, ErrorInfo) and not whole if provider == "dying" else answer == _DEMO_TEXT and whole
    shown = answer if isinstance(answer, str) else "an error in the stream, then a cut: " + answer.message
    return right, shown, response.headers.get("x-llm-router-attempts", "-")


def _read_demo_answer(wire: str, stream: bool, data: bytes) -> Union[str, ErrorInfo]:
    context = Context(ChatRequest("", []), "demo", 0)
    try:
        whole = WIRE_FORMATS[wire].parse_response
        answer = fold_stream(wire, data, context) if stream else whole(load_json(data), context)
        return answer if isinstance(answer, ErrorInfo) else join_text(answer.blocks)
    except RouterError as error:
        return ErrorInfo(502, error.message)


def run_demo(once: bool, port: int) -> int:
    """Show the router at work on fake providers; exit code 0 only if every answer was right."""
    return int(run_loop(_demo(once, port)))


async def _demo(once: bool, port: int) -> int:
    import asyncio

    loop = asyncio.get_running_loop()
    # Nothing is remembered from one request to the next, so that each shows its whole trail.
    nothing = {"origin_fallback_cooldown_ms": 0, "origin_rate_limit_cooldown_ms": 0, "fallback_circuit_failures": 0}
    settings = Settings(origin_retry_base_delay_ms=20, usage_db="off", **nothing)
    log = LogWriter(sys.stderr, level="silent" if once else "info")  # the demonstration shows every trail itself
    fakes = Server(loop, settings, _demo_provider, lambda error: log.note(str(error), "error"))
    document = demo_document("http://127.0.0.1:%d" % await fakes.listen("127.0.0.1", 0))
    config = read_config(document, {})
    router = Router(loop, StartOptions(Loaded(document, "", ""), config, settings, False, False, {}, False), log)
    router.stopping = asyncio.Event()
    try:
        port = await _listen(router.server, "127.0.0.1", port)
        print("listening on http://127.0.0.1:%d, with fake providers behind it:" % port)
        for name, (wire, habit, *_) in _DEMO_PROVIDERS.items():
            print("  %-10s %-10s %s" % (name, wire, habit))
        wrong = await loop.run_in_executor(None, _show_cases, port)
        if not once:
            _on_signals(loop, router.stop, router.stop)  # first: whoever reads the line may press Ctrl-C at once
            print("\nstill serving on http://127.0.0.1:%d; Ctrl-C ends it" % port, flush=True)
            await router.stopping.wait()
    finally:
        await router.server.drain(1.0)
        await fakes.drain(1.0)
        router.upstreams.close()
        log.close()
    return 1 if wrong else 0


def _show_cases(port: int) -> int:
    """Ask every provider in every format, streamed and whole, print what comes; returns how many answers were wrong."""
    print("\n%-10s %-9s %-16s %-7s%s" % ("client", "", "asked for", "answer", "attempts"))
    wrong = 0
    for wire, stream, provider in product(_DEMO_REQUESTS, (False, True), _DEMO_PROVIDERS):
        if stream or provider != "dying":  # in mid-stream
            right, shown, attempts = ask_demo(port, wire, stream, provider)
            wrong += not right
            kind = "streamed" if stream else "whole"
            answer = "right:" if right else "WRONG:"
            print("%-10s %-9s %-16s %-7s%s" % (wire, kind, provider + "/demo", answer, attempts), flush=True)
            if shown != _DEMO_TEXT:
                print("%37s %s" % ("", one_line(shown, 150)), flush=True)
    words = "%d answers were wrong" % wrong if wrong else 'every answer was right ("%s")' % _DEMO_TEXT
    print("\n" + words, flush=True)
    return wrong


# ==============================================================================
# 34 DOCTOR - what is wrong on this machine, and the cure [host]
# ==============================================================================


# ----- asking providers -----

_PROBES_AT_ONCE = 8
_LISTING_LIMIT_S = 20.0


async def gather_some(function: Callable[..., Any], arguments: Iterable[Tuple[Any, ...]]) -> List[Any]:
    """What `function` returns for each tuple of arguments, awaited a few at a time."""
    import asyncio

    free = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def one(given: Tuple[Any, ...]) -> Any:
        async with free:
            return await function(*given)

    return list(await asyncio.gather(*map(one, arguments)))


async def run_probe(plan: ProbePlan, settings: Settings, environ: Environ, ends: Any = None) -> ProbeReport:
    """What a probe finds. ends(report), if it is given, is asked ten times a second whether what is known by then is
    enough."""
    import asyncio
    from types import SimpleNamespace

    loop = asyncio.get_running_loop()
    upstreams = Upstreams(loop, settings, environ)
    host = SimpleNamespace(now=loop.time, wall=time.time, send=upstreams.send, gather=gather_some)
    probe = Probe(plan, settings, host)
    task, until = loop.create_task(probe.run()), loop.time() + plan.limit_s
    try:
        while not (await asyncio.wait([task], timeout=0.1))[0]:
            if loop.time() > until or ends and ends(probe.report):
                break
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    finally:
        upstreams.close()
        await asyncio.sleep(0)
        upstreams.close()  # connections that came too late for their call as well
    probe.end()
    return probe.report


async def ask_models(plan: ProbePlan, settings: Settings, environ: Environ) -> List[str]:
    """The ids that a provider lists. RouterError with its status when it refuses, 502 when nobody answers."""
    report = await run_probe(plan._replace(calls=0, limit_s=_LISTING_LIMIT_S), settings, environ)
    if report.listed is None:
        raise RouterError(report.listing_note or "no answer in time", report.listing_status or 502)
    return list(report.listed)


# ----- looking -----


class Finding(NamedTuple):
    """One thing that was looked at. level: ok, warning or problem; cure: "" when there is nothing to do."""

    level: str
    about: str
    text: str
    cure: str = ""


def examine(given: str, settings: Settings, environ: Environ, offline: bool) -> List[Finding]:
    """Everything that is looked at, in order. given: --config; settings: they name the port that is to be used."""
    findings, config = _examine_config(given, environ)
    home = os.path.dirname(state_path())
    if not os.access(home, os.W_OK):
        text = "%s cannot be written: no status, stop and reload of an instance, and no ledger" % home
        findings.append(Finding("warning", "home", text, "make it writable, or set HOME to a folder that is"))
    running = running_instances()
    ports = {instance.port for instance, _ in running}
    findings += _examine_running(running)
    findings += [_examine_port(settings.port)] if settings.port not in ports else []
    findings += [*_examine_network(environ), *_examine_clients(environ, ports | {settings.port})]
    providers = [provider for provider in config.providers if provider.enabled]
    for one in providers:  # a base URL may have come from anywhere
        hosts = dict.fromkeys(urlsplit(url).netloc for url in one.base_urls.values())
        findings += [Finding("ok", "key of " + one.id, "goes to " + ", ".join(hosts))] if one.api_key and hosts else []
    if not offline:  # several at once, in one loop: threads would outlive a Ctrl-C
        findings += run_loop(gather_some(_examine_provider, ((one, settings, environ) for one in providers)))
    return findings


def _examine_config(given: str, environ: Environ) -> Tuple[List[Finding], Config]:
    try:
        loaded = load_config(given, environ)
    except RouterError as error:
        return [Finding("problem", "configuration", error.message, "correct the file; its .bak may be good")], Config()
    document = loaded.document if loaded.document is not None or given else preset_document(environ)
    if document is None:
        return [Finding("problem", "configuration", "there is none", WAYS_ON)], Config()
    config, problems = scan_config(document, environ)
    found = [Finding("ok", "configuration", loaded.source if loaded.document is not None else "made of key variables")]
    found += [Finding("warning", "configuration", warning) for warning in loaded.warnings]
    for one in problems:
        level = "problem" if one.level == "error" else "warning"
        found.append(Finding(level, "configuration", "%s: %s" % (one.path, one.message), one.cure))
    return found, config


def _examine_running(running: Iterable[Tuple[Instance, Json]]) -> Iterable[Finding]:
    for instance, status in running:
        where, state = "port %d, pid %d" % (instance.port, instance.pid), status["config"]["state"]
        yield Finding("ok", "running", "%s, version %s" % (where, status["version"]))
        if state != "ok":
            yield Finding("problem", "running", "its newest configuration: " + state, "correct the file")
        if status["version"] != __version__:
            text = "%s is not this version, %s" % (where, __version__)
            yield Finding("warning", "running", text, "llm-router stop, then start")


def _examine_port(port: int) -> Finding:
    """Whether the router could listen there, by trying it: the system does not show everybody's sockets."""
    import socket

    try:
        socket.create_server(("127.0.0.1", port)).close()
        return Finding("ok", "port", "%d is free" % port)
    except OSError as error:
        holder, why = find_listener(port), (error.strerror or str(error)).partition(" (while ")[0]
        words = "%d is used by pid %d (%s)" % (port, *holder) if holder else "%d: %s" % (port, why)
        return Finding("problem", "port", words, "start --port=0")


def _examine_network(environ: Environ) -> Iterable[Finding]:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        url = environ.get(name.lower(), "") or environ.get(name, "")
        if url:
            yield Finding("ok", "proxy", "%s=%s" % (name, mask_url(url)))
        try:
            read_proxy("" if name == "NO_PROXY" else url)
        except OSError:
            yield Finding("problem", "proxy", name + " is none that speaks HTTP", "name an http:// proxy")
    for name, read in (("SSL_CERT_FILE", str), ("LLM_ROUTER_CA_BUNDLE", os.path.expanduser)):  # OpenSSL expands no ~
        path = environ.get(name, "")
        if path and not os.path.isfile(read(path)):
            yield Finding("problem", "certificates", "%s names no file: %s" % (name, path), "correct or unset it")


def _examine_clients(environ: Environ, ports: Set[int]) -> Iterable[Finding]:
    """Variables that lead clients somewhere."""
    for name in ("ANTHROPIC_BASE_URL", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        url = environ.get(name, "")
        here = False
        with suppress(ValueError):
            parts = urlsplit(url)
            here = is_loopback(parts.hostname or "") and parts.port in ports
        text = "%s=%s is " % (name, mask_url(url))
        if here:
            yield Finding("ok", "clients", text + "the router")
        elif url:
            yield Finding("warning", "clients", text + "not this router", 'eval "$(llm-router env)" points it here')


async def _examine_provider(provider: Provider, settings: Settings, environ: Environ) -> Finding:
    """Whether it lists its models, and those that are configured among them."""
    about = "provider " + provider.id
    try:
        models = await ask_models(ProbePlan(provider, (), (provider.preferred,)), settings, environ)
    except RouterError as error:
        level = "warning" if error.status in (404, 405) else "problem"
        return Finding(level, about, error.message, _CURES.get(error.status, _CURES[0]))
    named = [model.id for model in provider.models if model.enabled and model.id != "*"]
    strange = [name for name in named if models and name not in models]
    if strange:
        cure = "llm-router config --operation=discover-models --provider-id=%s" % provider.id
        return Finding("warning", about, "it does not list " + ", ".join(strange), cure)
    return Finding("ok", about, "reached, the key is accepted, %d models" % len(models))


_CURES = {
    0: "check baseUrl, the network, proxy and certificates",
    **dict.fromkeys((401, 403), "set its key anew: apiKey or apiKeyEnv"),
    **dict.fromkeys((404, 405), "nothing, when requests work: it has no list of models there"),
}


# ==============================================================================
# 35 AGENTS - coding agents run against the router, their files untouched [host]
# ==============================================================================


class Agent(NamedTuple):
    """How a program is pointed at the router. variables (NAME=VALUE) and words (arguments before the user's own) are
    templates, see `agent_facts`; one that needs a fact that is empty is left out. hidden: variables that must not reach
    it. file: the name of a temporary file, whose path is the fact `file`, and what makes its text of the other facts.
    install: where to get it."""

    name: str
    install: str
    variables: str
    words: Texts = ()
    hidden: Texts = ()
    file: Optional[Tuple[str, Callable[[Mapping[str, str]], str]]] = None


def _opencode_config(facts: Mapping[str, str]) -> str:
    """opencode.json with one provider, the router (opencode.ai/docs/providers, custom provider)."""
    options = {"baseURL": facts["base"] + "/v1", "apiKey": facts["key"]}
    models: Json = {facts[name]: {} for name in ("small", "model") if facts[name]}
    if facts["window"] and facts["output"]:  # without a limit opencode never compacts; it wants both numbers
        models[facts["model"]] = {"limit": {"context": int(facts["window"]), "output": int(facts["output"])}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "llm-router", "options": options, "models": models}
    chosen = {"model": "llm-router/" + facts["model"], "small_model": "llm-router/" + facts["small"]}
    return json.dumps(dict(chosen, provider={"llm-router": provider}))


def _pi_extension(facts: Mapping[str, str]) -> str:
    """An extension that adds one provider, the router (pi's docs/custom-provider.md); it wants all of these fields."""
    free = dict.fromkeys(("input", "output", "cacheRead", "cacheWrite"), 0)
    model = {"id": facts["model"], "name": facts["model"], "reasoning": False, "input": ["text", "image"], "cost": free}
    model.update(contextWindow=int(facts["window"] or 128_000), maxTokens=int(facts["output"] or 16_384))
    own = {"baseUrl": facts["base"] + "/v1", "apiKey": facts["key"], "api": "openai-completions", "models": [model]}
    return 'export default (pi) => pi.registerProvider("llm-router", %s);\n' % json.dumps(own)


PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")

# Sources: code.claude.com/docs/en/settings and /llm-gateway; developers.openai.com/codex/config-reference (-c takes
# TOML); opencode.ai/docs/config (OPENCODE_CONFIG); aider.chat/docs/llms/openai-compat.html; Qwen Code's README;
# copilot help providers. Kilo is an opencode.
AGENTS: Tuple[Agent, ...] = (
    Agent("claude", "npm install -g @anthropic-ai/claude-code",
          "ANTHROPIC_BASE_URL=%(base)s ANTHROPIC_AUTH_TOKEN=%(key)s ANTHROPIC_MODEL=%(model)s"
          " ANTHROPIC_DEFAULT_OPUS_MODEL=%(opus)s ANTHROPIC_DEFAULT_SONNET_MODEL=%(sonnet)s"
          " ANTHROPIC_DEFAULT_FABLE_MODEL=%(fable)s ANTHROPIC_DEFAULT_HAIKU_MODEL=%(haiku)s"
          " ANTHROPIC_SMALL_FAST_MODEL=%(small)s"
          " CLAUDE_CODE_MAX_CONTEXT_TOKENS=%(window)s CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY=1"
          " CLAUDE_CODE_ATTRIBUTION_HEADER=0",  # so that caches last where its format is passed through, too
          hidden=("ANTHROPIC_API_KEY",)),
    Agent("codex", "npm install -g @openai/codex", "ROUTER_API_KEY=%(key)s",
          ("-c", 'model_provider="llm-router"',
           "-c", ('model_providers.llm-router={name="llm-router",base_url="%(base)s/v1",'
                  'env_key="ROUTER_API_KEY",wire_api="responses"}'),
           "-c", 'model="%(model)s"', "-c", "model_context_window=%(window)s")),
    Agent("opencode", "npm install -g opencode-ai", "OPENCODE_CONFIG=%(file)s",
          file=("opencode.json", _opencode_config)),
    Agent("kilo", "npm install -g @kilocode/cli", "KILO_CONFIG=%(file)s", file=("kilo.json", _opencode_config)),
    Agent("copilot", "npm install -g @github/copilot", "COPILOT_PROVIDER_TYPE=openai COPILOT_PROVIDER_API_KEY=%(key)s"
          " COPILOT_PROVIDER_BASE_URL=%(base)s/v1 COPILOT_MODEL=%(model)s", hidden=("COPILOT_PROVIDER_BEARER_TOKEN",)),
    Agent("aider", "pipx install aider-chat", "OPENAI_API_BASE=%(base)s/v1 OPENAI_API_KEY=%(key)s",
          ("--model", "openai/%(model)s", "--weak-model", "openai/%(small)s")),
    Agent("qwen", "npm install -g @qwen-code/qwen-code",
          "OPENAI_BASE_URL=%(base)s/v1 OPENAI_API_KEY=%(key)s OPENAI_MODEL=%(model)s",
          ("--auth-type", "openai"), hidden=PROXY_VARIABLES),  # it sends even 127.0.0.1 to a proxy
    Agent("pi", "npm install -g @earendil-works/pi-coding-agent", "",
          ("-e", "%(file)s", "--model", "llm-router/%(model)s"), file=("pi.js", _pi_extension)),
)  # fmt: skip
ANY_AGENT = Agent(
    "any", "", "ANTHROPIC_BASE_URL=%(base)s ANTHROPIC_AUTH_TOKEN=%(key)s OPENAI_BASE_URL=%(base)s/v1"
    " OPENAI_API_BASE=%(base)s/v1 OPENAI_API_KEY=%(key)s", hidden=("ANTHROPIC_API_KEY",))  # fmt: skip


def agent_facts(base: str, key: str, config: Config, chosen: Mapping[str, str]) -> Dict[str, str]:
    """What the templates of AGENTS may use: base (the router's URL), key, model, small, Claude Code's tiers; window and
    output: the model's limits in tokens, where the configuration has them. `file` comes to them where a program is run.

    chosen: the models the user named. The others are the default model, or else the first there is."""
    routes = Routes(config)
    named = (ref for ref in routes.refs() if not ref.endswith("/*"))
    model = chosen.get("model") or config.default_model or next(named, "")
    key = key or "no-key-needed"  # clients insist on some
    facts = {"base": base, "key": key, "model": model, "small": chosen.get("small-model") or model}
    facts.update({name: chosen.get(name) or model for name in ("opus", "sonnet", "fable")}, window="", output="")
    with suppress(RouterError):  # the program will be told when it asks for that model
        found = routes.find_plan(model)[0].model
        facts.update(window=str(found.context_window or ""), output=str(found.max_output_tokens or ""))
    return dict(facts, haiku=chosen.get("haiku") or facts["small"])


def fill_templates(agent: Agent, facts: Mapping[str, str]) -> Tuple[Dict[str, str], List[str]]:
    """The variables and the words of an agent; what needs an empty fact is left out, a word with its flag."""
    pairs = (word.partition("=")[::2] for word in agent.variables.split())
    variables = {name: text % facts for name, text in pairs if _is_filled(text, facts)}
    words: List[str] = []
    inside = {name: json.dumps(text, ensure_ascii=False)[1:-1] for name, text in facts.items()}
    for flag, text in zip(agent.words[::2], agent.words[1::2]):  # in quotes it is a string of TOML, which is JSON's
        words += [flag, text % (inside if '"' in text else facts)] if _is_filled(text, facts) else []
    return variables, words


def _is_filled(text: str, facts: Mapping[str, str]) -> bool:
    return all(facts.get(name) for name in re.findall(r"%\((\w+)\)s", text))


def run_program(agent: Agent, argv: Sequence[str], facts: Mapping[str, str], environ: Environ) -> int:
    """Run a program against the router; its exit code, 128 + n when the signal n ended it. RouterError when it is
    missing. Its own configuration is not touched: variables, arguments and a temporary file last as long as it runs."""
    import shutil

    env = {name: value for name, value in environ.items() if name not in agent.hidden}
    if any(env.get(name) for name in PROXY_VARIABLES):  # the router itself is reached directly
        own = urlsplit(facts["base"]).hostname or ""
        env.update({name: ",".join(filter(None, (env.get(name), own))) for name in ("NO_PROXY", "no_proxy")})
    program = shutil.which(argv[0], path=env.get("PATH"))
    if program is None:
        hint = "; install it: " + agent.install if agent.install else ""
        raise RouterError("%s is not on the PATH%s" % (one_line(argv[0], 80), hint))
    with temporary_folder() as folder:
        path = os.path.join(folder, agent.file[0]) if agent.file else ""
        if agent.file:
            write_private(path, agent.file[1](facts).encode())
        variables, words = fill_templates(agent, dict(facts, file=path))
        return _wait_for([program, *words, *argv[1:]], dict(env, **variables))


def _wait_for(argv: Sequence[str], env: Environ) -> int:
    """Ctrl-C reaches the child by the terminal itself; what asks us to end is passed on to it."""
    import signal
    import subprocess

    release = _hold_signals()  # one that came now would end us and leave the child behind
    how: Dict[str, Any] = {} if sys.platform == "win32" else {"preexec_fn": release}
    try:
        child = subprocess.Popen(argv, env=dict(env), **how)  # noqa: S603  the user named it
        restore = on_end(lambda number, _: child.send_signal(number), SIGINT=signal.SIG_IGN)
    except OSError as error:
        raise RouterError("cannot run %s: %s" % (one_line(argv[0], 160), error.strerror or error)) from None
    finally:
        release()
    try:
        code = child.wait()
    finally:
        restore()
    return 128 - code if code < 0 else code


_POSIX = ("export %s=%s", lambda text: "'%s'" % text.replace("'", "'\\''"))
_SHELLS: Dict[str, Tuple[str, Callable[[str], str]]] = {
    "bash": _POSIX,
    "zsh": _POSIX,
    "fish": ("set -gx %s %s", lambda text: "'%s'" % text.replace("\\", "\\\\").replace("'", "\\'")),
    # PowerShell ends such a text at typographic quotes, too
    "powershell": ("$env:%s = %s", lambda text: "'%s'" % re.sub("(['\u2018-\u201b])", r"\1\1", text)),
}


def shell_lines(variables: Environ, shell: str) -> List[str]:
    """Variables as lines that one of _SHELLS can read."""
    line, quote = _SHELLS[shell]
    return [line % (name, quote(value)) for name, value in variables.items()]


# ==============================================================================
# 36 TERMINAL - the menu in a real terminal: curses, or numbered prompts [host]
# ==============================================================================

Effects = Mapping[str, Callable[..., Any]]  # by the name of an Effect; the first argument is the Job

# style -> the words of curses for it: attributes, and a colour before them
_STYLES = {
    "title": "A_REVERSE A_BOLD",
    "changed": "YELLOW A_REVERSE A_BOLD",
    "selected": "CYAN A_REVERSE",
    "name": "A_BOLD",
    "key": "CYAN A_BOLD",
    "dim": "A_DIM",
    "off": "A_DIM",
    "ok": "GREEN",
    "note": "GREEN A_BOLD",
    "warning": "YELLOW A_BOLD",
    "error": "RED A_BOLD",
    "typed": "A_UNDERLINE",
    "caret": "A_REVERSE",
}
_CHARACTER_NAMES = "enter enter down backspace backspace home delete end ctrl-u ctrl-c space".split()
_CHARACTER_KEYS = dict(zip("\n\r\t\x7f\b\x01\x04\x05\x15\x03 ", _CHARACTER_NAMES))
_CODES = (  # names of curses after KEY_
    "UP=up DOWN=down LEFT=left RIGHT=right HOME=home END=end PPAGE=pgup NPAGE=pgdn BACKSPACE=backspace DC=delete"
    " ENTER=enter BTAB=up SR=K SF=J"
)
_CODE_KEYS = dict(pair.split("=") for pair in _CODES.split())
# What follows Escape and [ or O, where a terminal sends other sequences than its TERM says.
_CSI = "A=up B=down C=right D=left H=home F=end M=enter Z=up 1~=home 7~=home 4~=end 8~=end 3~=delete 5~=pgup 6~=pgdn"
_SEQUENCES = dict(pair.split("=") for pair in _CSI.split())
_PASTE_MODE, _PASTE_END = b"\x1b[?2004%c", "\x1b[201~"  # what is pasted comes in brackets (xterm's control sequences)
_QUICK = ("key", "save")  # effects that are done at once; the others get a thread, so that they can be left
_TALKING = ("deploy",)  # those that ask and print themselves: they get the terminal meanwhile


class Job:
    """An effect under way. `tell` says how far it is; `is_cancelled` whether anybody still waits for it."""

    def __init__(self, effect: Effect, put: Callable[[Told], Any]) -> None:
        self.is_cancelled = False
        self._effect = effect
        self._put = put

    def tell(self, words: str) -> None:
        """Show how far it is."""
        self._put(Told(self._effect.serial, words, is_progress=True))

    def run(self, effects: Effects) -> None:
        """Do it and hand its end over, whatever that is."""
        try:
            told = Told(self._effect.serial, effects[self._effect.kind](self, *self._effect.args))
        except Exception as error:
            words = getattr(error, "message", "") or "%s: %s" % (type(error).__name__, error)
            told = Told(self._effect.serial, error=words)
        self._put(told)


def run_menu(menu: Menu, effects: Effects, plain: bool = False) -> int:
    """The menu until it is left; the exit code. plain: as numbered prompts, also where curses would work."""
    ended: List[int] = []

    def end(number: int, frame: Any) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    restore = on_end(end, SIGCONT=lambda *_: plain or _bracket_pasted(True))  # the shell has ended it
    try:
        import curses

        curses.setupterm()
        plain = plain or os.name == "nt" or os.environ.get("TERM", "dumb") == "dumb"
    except Exception:  # Windows has none, or a stranger's with less in it; curses.error for an unknown terminal
        plain = True
    try:
        if plain:
            return _run_prompts(menu, effects)
        os.environ.setdefault("ESCDELAY", "50")
        return int(curses.wrapper(_Painter(menu, effects, ended).run))
    except KeyboardInterrupt:
        return 128 + ended[0] if ended else 130
    finally:
        if not plain:
            _bracket_pasted(False)
        restore()


def _bracket_pasted(wanted: bool) -> None:
    """Let the terminal mark what is pasted, so that no list takes it for keys; curses has no function for it."""
    with suppress(OSError):  # the terminal is gone
        os.write(1, _PASTE_MODE % (b"h" if wanted else b"l"))


class _Painter:
    """The menu drawn by curses: reads keys, draws what `view` says, lets threads do what takes time."""

    def __init__(self, menu: Menu, effects: Effects, ended: List[int]) -> None:
        import curses
        import queue

        self._menu, self._effects, self._ended, self._curses = menu, effects, ended, curses
        self._told: Any = queue.SimpleQueue()
        self._job: Optional[Job] = None
        self._attributes: Dict[str, int] = {}

    def run(self, window: Any) -> int:
        """Until the menu is left."""
        self._attributes = _attributes_of(self._curses)
        with suppress(self._curses.error):
            self._curses.curs_set(0)
        event: Any = ""
        while True:
            try:
                self._menu, effect = update(self._menu, event) if event else (self._menu, None)
                if effect is not None and effect.kind == "quit":
                    return int(effect.args[0])
                self._start(effect)
                if event is not None:
                    self._draw(window)
                event = self._next_event(window)
            except KeyboardInterrupt:  # also while something is saved, which may wait for another program
                if self._ended:
                    raise
                event = "ctrl-c"

    def _start(self, effect: Optional[Effect]) -> None:
        import threading

        if effect is None:
            return
        if self._job is not None:
            self._job.is_cancelled = True
        job = self._job = Job(effect, self._told.put)
        if effect.kind in _TALKING:
            self._talk(job)
        elif effect.kind in _QUICK:
            job.run(self._effects)
        elif effect.kind != "cancel":
            threading.Thread(target=job.run, args=(self._effects,), daemon=True).start()

    def _talk(self, job: Job) -> None:
        """Lend the terminal out."""
        self._curses.def_prog_mode()
        self._curses.endwin()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a command whose output is kept may still run beside
        try:
            job.run(self._effects)
            if self._ended:  # which it may have taken for somebody's Ctrl-C
                raise KeyboardInterrupt
            input("\nEnter goes back to the menu ")
        except (EOFError, KeyboardInterrupt):
            if self._ended:
                raise
            self._told.put(Told(self._menu.serial, error="interrupted"))
        self._curses.reset_prog_mode()

    def _next_event(self, window: Any) -> Any:
        """The name of a key, "" for an unknown one, Pasted, Told; None when nothing came for a while."""
        if not self._told.empty():
            return self._told.get()
        is_busy = self._menu.front.screen == "busy"
        window.timeout(80 if is_busy else 500)
        try:
            key = window.get_wch()
        except self._curses.error:
            return "tick" if is_busy else None
        if key == "\x1b":
            return self._escape(window)
        if isinstance(key, str):
            return _CHARACTER_KEYS.get(key, key)
        codes = {getattr(self._curses, "KEY_" + name): word for name, word in _CODE_KEYS.items()}
        return codes.get(key, "")

    def _escape(self, window: Any) -> Any:
        """The key Escape, or what a sequence means that starts with it and that curses does not know."""
        window.timeout(0)
        code = ""
        with suppress(self._curses.error):
            key = window.get_wch()
            if key not in ("[", "O"):
                (self._curses.unget_wch if isinstance(key, str) else self._curses.ungetch)(key)
                return "esc"
            code = key
            while not re.fullmatch(".[ -?]*[@-~]", code):
                code += str(window.get_wch())
        if code == "[200~":
            return Pasted(self._read_pasted(window))
        return _SEQUENCES.get(code[1:], "") if code else "esc"

    def _read_pasted(self, window: Any) -> str:
        text = ""
        window.timeout(1000)
        with suppress(self._curses.error):  # the end is missing
            while not text.endswith(_PASTE_END):
                key = window.get_wch()
                text += key if isinstance(key, str) else ""
        return text.removesuffix(_PASTE_END)

    def _draw(self, window: Any) -> None:
        height, width = window.getmaxyx()
        encoding = window.encoding
        is_utf8 = "utf" in encoding.lower()
        window.erase()
        for y, line in enumerate(view(self._menu, width, height)):
            x = 0
            for text, style in line:
                shown = text if is_utf8 else text.translate(TO_ASCII).encode(encoding, "replace").decode(encoding)
                with suppress(self._curses.error):  # after the last cell there is no place for the cursor
                    window.addstr(y, x, shown, self._attributes.get(style, 0))
                x += text_width(text)
        _bracket_pasted(True)  # with every picture: what was lent the terminal may have ended it
        window.refresh()


def _attributes_of(curses: Any) -> Dict[str, int]:
    """What each style is on this terminal; without colour where none is wanted (no-color.org) or possible."""
    if curses.has_colors():
        curses.use_default_colors()  # the wrapper has made everything white on black
    has_color = curses.has_colors() and not os.environ.get("NO_COLOR")
    found: Dict[str, int] = defaultdict(int)
    for style, word in ((style, word) for style, words in _STYLES.items() for word in words.split()):
        if word.startswith("A_"):
            found[style] |= getattr(curses, word)
        elif has_color:
            number = getattr(curses, "COLOR_" + word)
            curses.init_pair(number, number, -1)
            found[style] |= curses.color_pair(number)
    return found


def _run_prompts(menu: Menu, effects: Effects) -> int:
    """The menu as questions and answers, line by line."""
    import getpass

    try:
        while True:
            print(printable(prompt_text(menu)), flush=True)
            hidden = menu.front.hidden and sys.stdin.isatty()
            answer = getpass.getpass("(not shown) > ") if hidden else input("> ")
            menu, events = answer_keys(menu, answer)
            while events:
                menu, effect = update(menu, events.pop(0))
                if effect is not None and effect.kind == "quit":
                    return int(effect.args[0])
                if effect is not None and effect.kind != "cancel":
                    print(menu.front.title + " ...", flush=True)
                    Job(effect, events.append).run(effects)
    except (EOFError, KeyboardInterrupt) as end:
        print("\nnot saved: the input ended" if menu.is_unsaved else "")
        if isinstance(end, KeyboardInterrupt):
            raise
        return int(menu.is_unsaved)


# ==============================================================================
# 37 COMMANDS - flags, help and what each command does [host]
# ==============================================================================


class Given:
    """What a command is run with: the flags that were given, {"log-format": "json"}, and the environment. Every flag is
    an attribute as well, `log_format`, None when it was not given."""

    def __init__(self, environ: Environ, flags: Json) -> None:
        self.environ = environ
        self.flags = flags

    def __getattr__(self, name: str) -> Any:
        return self.flags.get(name.replace("_", "-"))

    @property
    def path(self) -> str:
        """The configuration file."""
        return config_path(self.config or "")

    @property
    def settings(self) -> Settings:
        """The settings by flags, variables and defaults."""
        return self.read_settings()[0]

    def read_settings(self) -> Tuple[Settings, List[str]]:
        """The settings, and what to warn about."""
        flags = {row.name: show_setting(self.flags[row.flag[2:]]) for row in SETTINGS if row.flag[2:] in self.flags}
        return read_settings(flags, self.environ)

    def load(self, presets: bool = False) -> Loaded:
        """The configuration in use, else ConfigError; presets: where there is none, one of well-known key variables."""
        loaded = load_config(self.config or "", self.environ)
        if loaded.document is not None:
            return loaded
        made = preset_document(self.environ) if presets and not self.config else None
        if made is None:
            ways = WAYS_ON if presets else WAYS_ON.partition("; or set a key variable")[0]
            raise ConfigError("no configuration: %s does not exist; %s" % (one_line(loaded.path), ways))
        names = ", ".join(provider["apiKeyEnv"] for provider in made["providers"])
        return Loaded(made, "the key variables %s (there is no %s)" % (names, one_line(loaded.path)), loaded.path)

    def hiding_variable(self) -> str:
        """The variable that goes before the file, "" for none."""
        return "" if self.config else find_config_variable(self.environ)[0]

    def find_instance(self) -> Instance:
        """The running instance that is meant; errors as in `find_instance`."""
        return find_instance(state_path(), os.path.realpath(self.path) if self.config else "", self.port or 0)

    def tell(self, record: Any, lines: Iterable[str], code: int = 0) -> int:
        """What there is to say, as JSON or in lines of text; the exit code."""
        print(json.dumps(record, indent=2) if self.json else as_started("\n".join(lines)))
        return code

    def edit(self, change: Callable[[Json], Edit], lines: Sequence[str] = (), **told: Any) -> int:
        """Apply an edit to the file and tell what was done; a key that was made is shown here and nowhere else. lines,
        told: what else to tell, as text and as JSON."""
        edit = edit_config_file(self.path, change)
        done = [*map(one_line, (*edit.notes, "saved to " + self.path))]
        done += [_KEY_ONCE % (name[:-3], told[name]) for name in ("masterKey", "clientKey") if name in told]
        self.tell(dict({"path": self.path, "changes": list(edit.notes)}, **told), _spaced(lines, done))
        _warn(_HIDES % name for name in [self.hiding_variable()] if name)
        _warn_of(find_problems(edit.document))
        return 0


class Command(NamedTuple):
    """A command, or an operation of `config`. run: does it; the exit code. takes: keys of _FLAGS; needs: those of flags
    that must be given, a|b for either of two. passes_on: its first word that is no flag and all that follows are
    another program's, `tail`. before: what its name follows on a command line."""

    name: str
    run: Callable[[Given], int]
    help: str
    takes: str
    example: str
    needs: str = ""
    passes_on: bool = False
    before: str = ""

    @property
    def title(self) -> str:
        """How a command line with it begins."""
        return ("llm-router " + self.before + self.name).strip()

    @property
    def flags(self) -> List[Field]:
        """Those that it takes, every command's included."""
        keys = re.findall("[a-z.-]+", "%s %s debug version help" % (self.needs, self.takes))
        return [_FLAGS[key] for key in dict.fromkeys(keys)]


# Every flag that is made of no setting and no field of a provider, as a field: its kind is one of theirs, or port,
# seconds, word (a text that may also stand without its flag), or a|b for one of these, which the help shows as {}.
# What commands have with meanings of their own has several rows: port.demo is the --port of demo.
_FLAG_ROWS = """
operation                     text    what to do, see above; without it the menu opens
config                        text    the configuration file, default %(config)s
json                          flag    answer as JSON
prompts                       flag    the menu as numbered prompts, line by line, also through a pipe
provider-id,provider          text    the provider
auth-type                     text    how the key is shown: %(auths)s
skip-probe                    flag    store the provider without asking it anything
model                         [name]  a model: its id at the provider, or provider/model
fallback-models,fallbacks     [name]  what to try when the model fails, in order, comma separated
clear-fallbacks               flag    remove the model's fallbacks
alias                         text    the alias: a name, or a pattern with *
clear-alias                   flag    remove the alias
default-model                 text    the model for `smart` and for requests that name none
master-key                    secret  the key that clients show; - reads it from stdin
generate,generate-master-key  flag    make a new master key and print it once
client-key                    secret  the client's key; - reads it from stdin; without it one is made and printed once
out                           text    file for the exported configuration, keys included, mode 0600
show-secrets                  flag    print keys as they are
require-auth                  flag    answer only requests that show the master key
allow-unauthenticated         flag    allow an address that others can reach without auth
grace                         seconds seconds that open streams may go on after stop, default that of start: 30
watch-config                  flag    apply changes of the file while running, default true
check                         flag    start, and end at once: whether it could serve
detach                        flag    serve in the background; log: --log-file, else %(log)s, or with .PORT before .log
port                          port    the port of the instance, when several run
id                            word    the request's id, from the header x-llm-router-request-id; default: last
since                         text    7d, 12h or a date like 2026-01-31, default 30d
today                         flag    since midnight
by                            %(by)s {}; default model
csv                           flag    answer as CSV
usage-db                      text    the ledger's file
port.doctor                   port    the port the router is to use
offline                       flag    ask no provider
from                          text    the release: a URL or a file, default LLM_ROUTER_UPDATE_URL
model.run                     text    the model to use, default: the configuration's default model
small-model                   text    the model for small tasks
opus                          text    the model for Claude Code's tier opus
sonnet                        text    the model for Claude Code's tier sonnet
fable                         text    the model for Claude Code's tier fable
haiku                         text    the model for Claude Code's tier haiku
keep                          flag    leave a router that was started for it running
tool                          word    claude, aider, qwen or any (the default)
shell                         %(shell)s {}
name.worker                   text    the Worker's name, default %(worker)s
env                           text    a Worker beside it, whose name ends in -ENV
account-id                    text    the account, default CLOUDFLARE_ACCOUNT_ID or the only one there is
use-wrangler                  %(auto)s auto (the default: when it is installed), true, or false to call the API directly
allow-weak-master-key         flag    take the master key as it is
dry-run                       flag    show what would be sent, secrets masked, and send nothing
domain                        text    a host name of its own, in a zone of the account
route                         text    a pattern in a zone of the account: example.com/* or example.com/route/*
export-only                   flag    write the secret with the configuration into a file and send nothing
out.worker                    text    that file, default .llm-router.worker.json
export-dir                    text    write the Worker project there and send nothing
once                          flag    exit after the demonstration
port.demo                     port    port to listen on, default any
debug                         flag    show the traceback of an error
version                       flag    show the version
help                          flag    show this help
""" % {
    "config": CONFIG_PATH,
    "log": LOG_PATH,
    "worker": WORKER_NAME,
    "auths": ", ".join(AUTH_TYPES),
    "by": "|".join(LEDGER_GROUPS),
    "shell": "|".join(_SHELLS),
    "auto": "|".join(("auto", *_BOOLS)),
}


def _field_flag(field: Field) -> Field:
    """The flag that sets a field of a provider."""
    name, *others = (_snake(name).replace("_", "-") for name in (field.key, *field.aliases))
    return Field(name, field.kind, field.help + "; - reads it from stdin" * (field.kind == "secret"), tuple(others))


def _setting_flag(row: Setting) -> Field:
    kind = "port" if row.name == "port" else "flag" if type(row.default) is bool else "|".join(row.choices) or "text"
    return Field(row.flag[2:], kind, "%s, default %s" % (row.help, show_setting(row.default) or "none"))


_OTHER_URLS = {wire: tuple(a + "BaseUrl" for a, w in _WIRE_ALIASES.items() if w == wire) for wire in WIRES}
_URL_FIELDS = [Field(wire + "BaseUrl", "url", "its base URL, format " + wire, _OTHER_URLS[wire]) for wire in WIRES]
_FIELD_FLAGS = {flag.key: flag for flag in map(_field_flag, [*FIELDS["provider"][1:], *_URL_FIELDS])}
_START_FLAGS = {row.flag[2:] + ".start": _setting_flag(row) for row in SETTINGS}
_OTHER_FLAGS = {
    key: Field(key.partition(".")[0], kind, help.replace("{}", kind.replace("|", ", ")), aliases)
    for key, kind, help, aliases in _read_table(_FLAG_ROWS)
}
_FLAGS = {**_FIELD_FLAGS, **_START_FLAGS, **_OTHER_FLAGS}
_SITE = "name.worker env account-id use-wrangler allow-weak-master-key dry-run json "


# ----- parsing -----


def run_command(argv: Sequence[str], environ: Environ) -> int:
    """Parse a command line and do what it says; the exit code. RouterError for what cannot be done."""
    words = list(argv)
    first = next((word for word in words if not word.startswith("-") or word == "--config"), "--config")
    name = words.pop(words.index(first)) if first != "--config" else ""
    command = _find_named(name, COMMANDS, "command", "llm-router --help lists them")
    given = Given(environ, parse_flags(words, command))
    if given.version:
        print("llm-router " + __version__)
        return 0
    if given.operation:
        command = _find_named(given.operation, OPERATIONS, "operation", "llm-router config --help lists them")
    if given.help:
        print(as_started(_help_text(command)))
        return 0
    _check_flags(command, given.flags)
    return command.run(given)


def _check_flags(command: Command, given: Json) -> None:
    """UsageError for a flag that an operation does not take, or that is needed and not there."""
    strange = [name for name in given if name not in ("tail", *(flag.key for flag in command.flags))]
    if strange:
        raise UsageError("%s does not take --%s" % (command.title, strange[0]))
    needed = [word.split("|") for word in command.needs.split()]
    missing = [names for names in needed if sum(bool(given.get(name)) for name in names) != 1]
    if missing:
        words = [("either --%s or --%s" if names[1:] else "--%s") % tuple(names) for names in missing]
        raise UsageError("%s: give %s; example: %s" % (command.title, " and ".join(words), command.example))


def _find_named(name: str, rows: Sequence[Command], what: str, hint: str) -> Command:
    found = next((row for row in rows if row.name == name), None)
    if found is None:
        hint = did_you_mean(name.lower(), [row.name for row in rows if row.name], hint)
        raise UsageError("unknown %s %s; %s" % (what, one_line(name, 60), hint))
    return found


def parse_flags(argv: Sequence[str], command: Command) -> Json:
    """The values of the flags that `argv` gives, {"log-format": "json"}: booleans, lists and objects already as such;
    "tail": what is another program's. UsageError for anything that is no flag of the command or has an unusable value.

    A value may begin with one dash (keys do); a boolean flag takes the next word only when that is a boolean.
    """
    flags = command.flags
    known = {"--" + name: flag for flag in flags for name in (flag.key, *flag.aliases)}
    known["-h"] = known["--help"]
    bare = [flag for flag in flags if flag.kind == "word"]
    given: Json = {}
    waiting = list(argv)
    while waiting:
        word, equals, text = waiting[0].partition("=")
        flag = known.get(word)
        if flag is None and command.passes_on and (word == "--" or not word.startswith("-")):
            return dict(given, tail=waiting)
        if flag is None and bare and not word.startswith("-"):
            flag, equals, text = bare.pop(), "=", waiting[0]
        if flag is None:
            hint = command.title + " --help shows its flags"
            hint = did_you_mean(word.lower(), known if word[2:] and word.startswith("--") else (), hint)
            kind = "unknown flag" if word.startswith("-") else "unexpected"
            raise UsageError("%s %s; %s" % (kind, one_line(word, 60), hint))
        del waiting[0]
        following = waiting[0] if waiting else "--"
        if not equals and flag.kind == "flag":
            text = waiting.pop(0) if following.lower() in _BOOLS else "true"
        elif not equals:
            if following.startswith("--"):
                raise UsageError("%s needs a value; %s --help shows more" % (word, command.title))
            text = waiting.pop(0)
        value = _read_flag_value(flag, text)
        given[flag.key] = given.get(flag.key, []) + value if flag.kind[0] == "[" else value
    return dict(given, tail=[]) if command.passes_on else given


def _read_flag_value(flag: Field, text: str) -> Any:
    try:
        if "|" in flag.kind:
            choices = flag.kind.split("|")
            if text.strip().lower() not in choices:
                raise UsageError("%s is none of %s" % (one_line(text, 40) or "an empty value", ", ".join(choices)))
            return text.strip().lower()
        if flag.kind == "secret" and text == "-":
            return _read_secret(flag.key)
        return _READERS[flag.kind](text) if flag.kind in _READERS else read_typed(flag.kind, text)
    except RouterError as error:
        raise UsageError("--%s: %s" % (flag.key, error.message)) from None


def _read_number(text: str, most: int) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) > most:
        raise UsageError("%s is no number from 0 to %d" % (one_line(text, 40) or "an empty value", most))
    return int(text)


_READERS: Dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("text", "word", "secret"), str),
    "flag": parse_bool,
    "port": lambda text: _read_number(text, 65535),
    "seconds": lambda text: _read_number(text, 999_999),
}


def _read_secret(name: str) -> str:
    """The next line of stdin; not shown while it is typed."""
    import getpass

    text = getpass.getpass("%s (not shown): " % name) if sys.stdin.isatty() else sys.stdin.readline()
    if not text.strip():
        raise UsageError("stdin held no key")
    return text.strip()


def make_key() -> str:
    """A new key for clients to show: 32 random bytes, as `secrets.token_urlsafe` writes them."""
    return "lr-" + base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")


# ----- help and output -----


def _help_text(command: Command) -> str:
    what, rows = {"": ("commands", COMMANDS), "config": ("operations", OPERATIONS)}.get(command.name, ("", ()))
    parts = {
        what: _table((row.name, row.help) for row in rows if row.name),
        "flags": _table((_flag_words(flag), flag.help) for flag in command.flags),
        "example": command.example.split("\n"),
    }
    listed = ([name + ":", *("  " + line for line in lines)] for name, lines in parts.items() if lines)
    return "\n".join(_spaced(["%s - %s" % (command.title, command.help)], *listed))


def _flag_words(flag: Field) -> str:
    value = "=JSON" if is_object(flag.kind) else "=A,B" if flag.kind[0] == "[" else "=VALUE"
    value = {"flag": "", "secret": "=KEY"}.get(flag.kind, value)
    return flag.key.upper() if flag.kind == "word" else ("-h, --" if flag.key == "help" else "--") + flag.key + value


def as_started(text: str) -> str:
    """`text` with the commands in it as they can be given here: without installation there is no `llm-router`."""
    import shlex

    if os.path.basename(sys.argv[0]) != os.path.basename(__file__):
        return text
    start = "%s %s " % (os.path.basename(sys.executable), shlex.quote(sys.argv[0]))
    names = "|".join(row.name for row in COMMANDS if row.name)
    return re.sub(r"\bllm-router (?=(--|%s)\b)" % names, lambda _: start, text)


def _spaced(*groups: Sequence[str]) -> List[str]:
    """Groups of lines with an empty line between them; a group that is empty leaves no gap."""
    return [line for group in groups if group for line in ("", *group)][1:]


def _labelled(**texts: str) -> List[str]:
    """A line for each text that is not empty, behind its label."""
    return ["%-14s %s" % (label.replace("_", " "), text) for label, text in texts.items() if text]


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        tell_aside("warning: " + line)


def tell_aside(text: str) -> None:
    """Print a line on stderr. What could be said there alone is no reason to end a command whose work is done."""
    with suppress(OSError):
        print(as_started(printable(text)), file=sys.stderr)


def _warn_of(problems: Iterable[Problem]) -> None:
    for problem in problems:
        tell_aside("%s: %s" % (problem.level, show_problem(problem)))


_COLORS = {"ok": 32, "error": 31, "problem": 31, "open": 31, "warning": 33, "cooling": 33, "half-open": 33}


def _colored(text: str, word: str) -> str:
    """`text` in the colour of a state when stdout is a terminal that wants one (no-color.org)."""
    usual = "dumb" if os.name == "nt" else ""  # a console of Windows has to be told before it knows escape codes
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", usual) == "dumb" or not sys.stdout.isatty()
    return text if plain or word not in _COLORS else "\033[%dm%s\033[0m" % (_COLORS[word], text)


def _table(rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> List[str]:
    """Rows of texts and numbers as lines of aligned columns. numbers: the columns that are aligned to the right."""
    cells = [[one_line(str(cell), 120) for cell in row] for row in rows]
    columns = []
    for i, column in enumerate(zip(*cells)):
        width = max(map(text_width, column))
        gaps = [" " * (width - text_width(cell)) for cell in column]
        columns.append([gap + cell if i in numbers else cell + gap for cell, gap in zip(column, gaps)])
    return ["  ".join(row).rstrip() for row in zip(*columns)]


def _with_bars(lines: Sequence[str], bars: Sequence[List[Tuple[str, float]]], whole: float, width: int) -> List[str]:
    """Lines, each with its bar behind it where `width` has room for them. A bar is spans one after another: a sign, and
    a part of `whole`. Signs: "#" solid, "=" light, "." dotted, " " nothing; blocks where the terminal has them."""
    indent = max(map(text_width, lines))
    room = min(30, width - indent - 2)
    if room < 5:
        return list(lines)
    blocks = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")
    drawn = []
    for line, spans in zip(lines, bars):
        bar, done = "", 0.0
        for sign, part in spans:
            done += part
            bar += sign * max(round(min(done / whole, 1.0) * room) - len(bar), sign == "#" and part > 0)
        bar = bar[:room].translate({35: "█", 61: "▒", 46: "·"} if blocks else {})
        drawn.append((line + " " * (indent - text_width(line)) + "  " + bar).rstrip())
    return drawn


def _columns() -> int:
    """The width of the terminal, 80 where there is none."""
    import shutil

    return shutil.get_terminal_size((80, 24)).columns


def show_duration(ms: float) -> str:
    """A time span for people: `0 s`, `850 ms`, `1.2 s`, `2 min 5 s`, `3 h 12 min`."""
    s = int(ms / 1000)
    if ms < 60_000:
        return "%d ms" % ms if 0 < ms < 1000 else "%g s" % round(ms / 1000, 1)
    return "%d min %d s" % divmod(s, 60) if s < 3600 else "%d h %d min" % divmod(s // 60, 60)


_HIDES = "%s is set and goes before this file"
_KEY_ONCE = "%s key (shown only now): %s"

# ----- config -----


def _edits(change: Callable[[Given, Json], Edit]) -> Callable[[Given], int]:
    """The operation that applies an edit."""
    return lambda given: given.edit(lambda document: change(given, document))


def run_upsert(given: Given) -> int:
    """`--operation=upsert-provider`: store it; what is not said of it is asked of it first, unless --skip-probe."""
    id, change = given.provider_id, _provider_change(given)
    told: Json = {}
    lines: List[str] = []
    if not given.skip_probe:
        document = upsert_provider(load_config(given.path, {}).document or NEW_DOCUMENT, id, change).document
        plan = _plan_of(document, id, given.environ)
        report = _ask_provider(plan, given)
        learned = learned_fields(plan, report)
        change.update(learned)
        told = {"probe": _probe_facts(report), "learned": learned}
        word = "assumed" if report.is_tentative else "learned"
        lines = _spaced(_probe_lines(report), ["%s %s: %s" % (word, key, json.dumps(learned[key])) for key in learned])
        _warn(_probe_warnings(report))
    return given.edit(lambda document: upsert_provider(document, id, change), lines, **told)


def _provider_change(given: Given) -> Json:
    """The fields of a provider that flags give, those for a part of an object included."""
    names = zip(FIELDS["provider"][1:], _FIELD_FLAGS)
    change = {field.key: given.flags[name] for field, name in names if name in given.flags}
    urls = {wire: given.flags[wire + "-base-url"] for wire in WIRES if given.flags.get(wire + "-base-url")}
    auth = {"type": given.auth_type} if given.auth_type else {}
    for key, part in (("baseUrlByFormat", urls), ("auth", auth)):
        change.update({key: {**as_dict(change.get(key)), **part}} if part else {})
    return change


def _remove_models(given: Given, document: Json) -> Edit:
    notes: Texts = ()
    for model in given.model:
        document, further = remove_model(document, given.provider_id, model)
        notes += further
    return Edit(document, notes)


def _ref_of(given: Given, model: str) -> str:
    prefix = given.provider_id + "/" if given.provider_id else ""
    return model if model.startswith(prefix) else prefix + model


def _single(models: Optional[Sequence[str]]) -> str:
    if not models or len(models) != 1:
        raise UsageError("--model: give one model")
    return models[0]


def run_set_master_key(given: Given) -> int:
    """`--operation=set-master-key`: store the key, or one that is made here and shown once."""
    key = given.master_key or make_key()
    return given.edit(lambda document: set_master_key(document, key), **{"masterKey": key} if given.generate else {})


def run_add_client_key(given: Given) -> int:
    """`--operation=add-client-key`: store the hash of a client's key; a key made here is shown once."""
    key = given.client_key or make_key()
    told = {} if given.client_key else {"clientKey": key}
    return given.edit(lambda document: add_client_key(document, given.name, key), **told)


def run_list(given: Given) -> int:
    """`--operation=list`, and the program without a command: the configuration with its keys masked."""
    loaded = load_config(given.config or "", given.environ)
    if loaded.document is None and not given.config and preset_document(given.environ):
        loaded = given.load(presets=True)  # what start would serve
    _warn(loaded.warnings)
    lines = ["llm-router " + __version__]
    if loaded.document is None:
        lines += ["no configuration: %s does not exist" % one_line(loaded.path), WAYS_ON]
    else:
        config, problems = scan_config(loaded.document, given.environ)
        lines += _summary(config, loaded.source)
        errors = sum(problem.level == "error" for problem in problems)
        hint = "problems that must be solved: %d; llm-router config --operation=validate shows them" % errors
        lines += ["", hint] if errors else []
    lines += [] if given.operation else ["", "llm-router --help lists the commands"]
    return given.tell(dict(mask_document(loaded.document or {}), source=loaded.source), lines)


def _summary(config: Config, source: str) -> List[str]:
    aliases = "; ".join("%s -> %s" % (name, ", ".join(refs)) for name, refs in config.aliases.items())
    key, model = mask(config.master_key), config.default_model
    facts = {"configuration": source, "master_key": key, "default_model": model, "aliases": aliases}
    lines = _labelled(**{label: one_line(text) or "none" for label, text in facts.items()})
    providers, models = [("PROVIDER", "FORMATS", "URL", "KEY")], [("MODEL", "ALIASES", "FALLBACKS")]
    for p in config.providers:
        urls = dict.fromkeys(mask_url(p.base_urls[wire]) for wire in p.formats if wire in p.base_urls)
        off = "" if p.enabled else " (off)"
        providers.append((p.id + off, ",".join(p.formats), ", ".join(urls) or "none", mask(p.api_key) or "none"))
        for m in p.models:
            name = "%s/%s%s" % (p.id, m.id, off if m.enabled else " (off)")
            models.append((name, ", ".join(m.aliases), ", ".join(m.fallback_models)))
    tables = [_table(providers), _table(models)] if config.providers else [["no providers"]]
    return _spaced(lines, *tables)


def _plan_of(document: Json, wanted: str, environ: Environ, models: Sequence[str] = ()) -> ProbePlan:
    """What to ask a provider of a document, "" for its only one. UsageError when none of that id can be asked."""
    raws = [raw for _, raw in provider_entries("", get_field(document, "config", "providers"))]
    raw = _find_provider(raws, wanted) if wanted else raws[0]
    config, problems = scan_config(dict(document, providers=[raw]), environ)
    if not config.providers:
        raise UsageError(show_problem(problems[0]))
    return plan_probe(config.providers[0], raw, models)


def run_discover(given: Given) -> int:
    """`--operation=discover-models`: what a configured provider lists; nothing is stored."""
    plan = _plan_of(given.load().document, given.provider_id, given.environ)
    models = run_loop(ask_models(plan, given.settings, given.environ))
    return given.tell({"provider": plan.provider.id, "models": models}, map(one_line, models or ["it lists no models"]))


def run_test_provider(given: Given) -> int:
    """`--operation=test-provider`: ask a configured provider; 1 when one of the models answers in no format."""
    plan = _plan_of(given.load().document, given.provider_id, given.environ, given.models or ())
    wanted = [_wire_of(name) for name in given.formats or ()]
    if not set(wanted) <= set(WIRES):
        raise UsageError("--formats: use " + ", ".join(WIRES))
    plan = plan._replace(wires=tuple(wire for wire in WIRES if wire in wanted) or plan.wires)
    report = _ask_provider(plan, given)
    lines = _probe_lines(report) or ["no model could be asked: name some with --models"]
    given.tell(_probe_facts(report), lines)
    _warn([] if given.json else _probe_warnings(report))
    return int(report.is_tentative or bool(report.unconfirmed))


def _ask_provider(plan: ProbePlan, given: Given) -> ProbeReport:
    """Probe, with progress where somebody watches; Ctrl-C ends it at once."""
    is_watched = sys.stderr.isatty()

    def show(report: ProbeReport) -> bool:
        asked = sum(row.state not in ("waiting", "asking") for row in report.rows)
        words = "\rasking %s: %d of %d" % (plan.provider.id, asked, len(report.rows))
        print(words * is_watched, end="", file=sys.stderr, flush=True)
        return False

    try:
        return run_loop(run_probe(plan, given.settings, given.environ, show))  # type: ignore[no-any-return]
    finally:
        print(("\r%*s\r" % (_columns() - 1, "")) * is_watched, end="", file=sys.stderr, flush=True)


def _probe_lines(report: ProbeReport) -> List[str]:
    """A report as a table; nothing when nothing was asked."""
    head, rows = probe_table(report)
    return _table([head, *rows]) if rows else []


def _probe_facts(report: ProbeReport) -> Json:
    """A report for --json."""
    return {
        "ok": not report.is_tentative and not report.unconfirmed,
        "tentative": report.is_tentative,
        "formats": report.formats,
        "unconfirmed": report.unconfirmed,
        "listed": report.listed,
        "results": [dict(row._asdict(), auth=row.auth.type) for row in report.rows],
        "listing": report.listing_note,
    }


def _probe_warnings(report: ProbeReport) -> List[str]:
    """What somebody who configures a provider should know of it."""
    found = ["its models cannot be listed: " + report.listing_note] if report.listing_note else []
    for model in report.unconfirmed:
        why = min((row for row in report.rows if row.model == model), key=lambda row: row.state != "tentative")
        found.append("%s is not confirmed: %s" % (one_line(model, 80), why.note or why.label))
    return found


def run_startup(given: Given) -> int:
    """`--operation=startup-install`, `-status`, `-uninstall`: start with the machine."""
    verb, home = given.operation.partition("-")[2], os.path.expanduser("~")
    auth = {name: True for name in ("require-auth", "allow-unauthenticated") if given.flags.get(name)}
    if verb == "install":  # a service that cannot start helps nobody
        _warn_of_lost_keys(read_start_options(Given(given.environ, {"config": given.path, **auth})))
    words = ["--config=" + given.path, *("--%s=true" % name for name in auth)]
    argv = [sys.executable, os.path.realpath(__file__), "start", *words]
    service = make_service(sys.platform, home, argv, service_variables(given.environ), os.path.expanduser(LOG_PATH))
    if verb == "install":
        state, (left, said) = "installed", install_service(service)
    else:
        state = service_state(service)
        if verb == "status" or state == "not installed":
            return given.tell({"state": state, "path": service.path}, [state])
        left, said = give_commands(service.remove)
        state = "not removed" if left else "removed"
    lines = ["%s: %s" % (state, one_line(service.path) or "the task " + SERVICE_NAME)]
    lines += ["now run: " + " && ".join(left), "which failed here: " + said] if left else []
    lines += [service.hint] if service.hint and verb == "install" else []
    told = {"state": state, "path": service.path, "left": left, "reason": said}
    return given.tell(told, lines, int(state == "not removed"))


def _warn_of_lost_keys(options: StartOptions) -> None:
    """Warn of keys that only this shell's variables hold, which a service lacks. UsageError for the master key."""
    stored = read_config(options.loaded.document, {})
    if options.require_auth and not stored.master_key and not stored.client_keys:
        raise UsageError("a service has no variable's key: llm-router config --operation=set-master-key stores one")
    lost = [one.id for one, bare in zip(options.config.providers, stored.providers) if one.api_key and not bare.api_key]
    cure = "llm-router config --operation=upsert-provider --provider-id=%s --api-key=- stores it"
    _warn("a service does not have the variable with the key of %s; %s" % (id, cure % id) for id in lost)


def run_validate(given: Given) -> int:
    """`--operation=validate`: every problem with place, path and cure; exit code 2 when one is an error."""
    try:
        loaded = given.load()
        source, problems = loaded.source, [Problem("", *note.rsplit(": ", 1), "warning") for note in loaded.warnings]
        problems += locate_problems(scan_config(loaded.document, given.environ)[1], loaded.text)
    except ConfigError as error:
        if not given.json:
            raise
        source = given.hiding_variable() or given.path
        problems = list(error.problems) or [Problem("", error.message, "")]
    is_usable = all(problem.level != "error" for problem in problems)
    lines = []
    for one in problems:
        place = "%s:%d:%d: " % (one_line(source), one.line, one.column) if one.line else ""
        lines.append("%s%s: %s" % (place, _colored(one.level, one.level), show_problem(one)))
    lines.append("%s: %s" % (one_line(source), "ok" if is_usable else "cannot be used"))
    record = {"ok": is_usable, "source": source, "problems": [problem._asdict() for problem in problems]}
    return given.tell(record, lines, 0 if is_usable else 2)


def run_export(given: Given) -> int:
    """`--operation=export`: the configuration in use as JSON: masked, or complete into a private file or when asked."""
    document = given.load().document
    if given.out:
        target = os.path.realpath(os.path.expanduser(given.out))
        write_private(target, dump_json(document) + b"\n")
        return given.tell({"path": target}, ["saved to " + one_line(target)])
    print(json.dumps(document if given.show_secrets else mask_document(document), indent=2))
    return 0


def _operation(
    name: str, run: Callable[[Given], int], help: str, sample: str = "", needs: str = "", takes: str = ""
) -> Command:
    """A row of OPERATIONS. sample: what follows its name in the example; takes: flags beside those it needs."""
    takes, example = "operation config json " + takes, "llm-router config --operation=%s %s" % (name, sample)
    return Command(name, run, help, takes, example.strip(), needs, before="config --operation=")


OPERATIONS: Tuple[Command, ...] = (
    _operation("upsert-provider", run_upsert, "add a provider, or change what is given of one",
               "--provider-id=openrouter --base-url=https://openrouter.ai/api/v1 --api-key=- --models=gpt-4o"
               " --format=openai --skip-probe=true", "provider-id", " ".join(_FIELD_FLAGS) + " auth-type skip-probe"),
    _operation("remove-provider", _edits(lambda given, document: remove_provider(document, given.provider_id)),
               "remove a provider and all references to it", "--provider-id=openrouter", "provider-id"),
    _operation("remove-model", _edits(_remove_models), "remove a model and all references to it",
               "--provider-id=openrouter --model=gpt-4o", "provider-id model"),
    _operation("set-model-fallbacks", _edits(lambda given, document: set_model_fallbacks(
                   document, given.provider_id, _single(given.model), given.fallback_models or [])),
               "set what to try when a model fails",
               "--provider-id=openrouter --model=gpt-4o --fallback-models=anthropic/claude-3-7-sonnet",
               "provider-id model fallback-models|clear-fallbacks"),
    _operation("set-model-alias", _edits(lambda given, document: set_model_alias(
                   document, given.alias, [_ref_of(given, model) for model in given.model or []])),
               "give models a further name", "--alias=fast --model=openrouter/gpt-4o", "alias model|clear-alias",
               "provider-id"),
    _operation("set-default-model", _edits(lambda given, document: set_default_model(
                   document, _ref_of(given, given.default_model or _single(given.model)))),
               "set the model for `smart` and for requests that name none", "--default-model=openrouter/gpt-4o",
               "default-model|model", "provider-id"),
    _operation("set-master-key", run_set_master_key, "set the key that clients show", "--generate",
               "master-key|generate"),
    _operation("add-client-key", run_add_client_key, "let a client in by its own key, kept as a hash",
               "--name=laptop", "name", "client-key"),
    _operation("remove-client-key", _edits(lambda given, document: remove_client_key(document, given.name)),
               "let a client in no longer", "--name=laptop", "name"),
    _operation("list", run_list, "show the configuration, keys masked", "--json"),
    _operation("discover-models", run_discover, "ask a provider which models it lists", "--provider-id=openrouter",
               "provider-id"),
    _operation("test-provider", run_test_provider, "ask a provider in every format: what works, with which key style",
               "--provider-id=openrouter", "provider-id", "models formats"),
    _operation("startup-install", run_startup, "start with the machine: launchd, systemd or a Windows task",
               "--require-auth", takes="require-auth allow-unauthenticated"),
    _operation("startup-status", run_startup, "show whether it starts with the machine"),
    _operation("startup-uninstall", run_startup, "start with the machine no longer"),
    _operation("validate", run_validate, "show every problem with its place and cure", "--json"),
    _operation("schema", lambda given: given.tell(config_schema(), [json.dumps(config_schema(), indent=2)]),
               "print the JSON Schema of the file, for editors and CI"),
    _operation("export", run_export, "print the configuration in use, keys masked; --out writes all of it",
               "--out=router.json", takes="out show-secrets"),
)  # fmt: skip

# ----- start, settings, demo -----


def run_settings(given: Given) -> int:
    """`settings`: every setting with its variable, flag, default and present value."""
    settings, warnings = given.read_settings()
    _warn(warnings)
    rows = settings_table(settings)
    cells = [(row["variable"], show_setting(row["default"]), show_setting(row["value"]), row["help"]) for row in rows]
    hint = "each is also a flag of start: LLM_ROUTER_TRAIL_SIZE is --trail-size; flag, then variable, then default"
    return given.tell(rows, _spaced(_table([("VARIABLE", "DEFAULT", "VALUE", "MEANING"), *cells]), [hint]))


def run_start(given: Given) -> int:
    """`start`: serve in the foreground until told to stop, or in the background."""
    if not given.detach:
        return run_server(read_start_options(given))
    pid, address, path = _start_in_background(given)
    lines = ["listening on " + address, "  pid                 %d" % pid, "  log                 " + one_line(path)]
    return given.tell(None, [*lines, "  stop it with        llm-router stop --port=" + address.rpartition(":")[2]])


def _start_in_background(given: Given) -> Tuple[int, str, str]:
    """The pid, address and log of a server with these flags; what is wrong with them is better said here than there."""
    settings = read_start_options(given).settings
    own = LOG_PATH if settings.port in (0, Settings().port) else "~/.llm-router.%d.log" % settings.port
    log, usual = map(os.path.expanduser, (settings.log_file or own, own))
    path = log if os.path.isfile(log) or not os.path.lexists(log) else usual  # what a device swallows cannot be read
    flags = {**given.flags, "log-file": log}
    words = ["--%s=%s" % (name, show_setting(flags[name])) for name in flags if name != "detach"]
    return (*start_detached(words, path), path)


def read_start_options(given: Given) -> StartOptions:
    """The options of a server, after every check that needs no socket; warnings go to stderr. UsageError otherwise."""
    settings, warnings = given.read_settings()
    settings = settings._replace(host=settings.host.strip("[]"))
    if given.grace is not None:
        settings = settings._replace(drain_grace_ms=given.grace * 1000)
    loaded = given.load(presets=True)
    try:
        config = read_usable_config(loaded.document, given.environ)
    except ConfigError as error:
        more = " --config=" + one_line(given.config) if given.config else ""
        words = error.message.replace("=validate)", "=validate%s)" % more)
        raise ConfigError("%s: %s" % (one_line(loaded.source), words), error.problems) from None
    auth = bool(given.require_auth)
    if auth and not config.master_key and not config.client_keys:
        cure = "llm-router config --operation=set-master-key --generate, or LLM_ROUTER_MASTER_KEY"
        raise UsageError("--require-auth needs a master key: " + cure)
    if not is_loopback(settings.host) and not auth and not given.allow_unauthenticated:
        cure = "add --require-auth=true, or --allow-unauthenticated=true if you want that"
        raise UsageError("%s can be reached by others: %s" % (one_line(settings.host, 80), cure))
    _warn(warnings + list(loaded.warnings))
    _warn_of(scan_config(loaded.document, given.environ)[1])
    watches = given.watch_config is not False
    return StartOptions(loaded, config, settings, auth, watches, given.environ, bool(given.debug), bool(given.check))


# ----- the menu -----


def run_menu_command(given: Given) -> int:
    """No command, and `config` without an operation: the menu on a terminal, elsewhere the masked summary."""
    if not set(given.flags) <= {"config", "json", "debug", "prompts"}:
        raise UsageError("config: give --operation=, one of " + ", ".join(row.name for row in OPERATIONS))
    if given.json or not (given.prompts or sys.stdin.isatty() and sys.stdout.isatty()):
        return run_list(given)
    loaded = load_config(given.path, {})
    document = NEW_DOCUMENT if loaded.document is None else loaded.document
    effects = menu_effects(given.path, given.environ)
    facts = Facts(given.path, frozenset(given.environ), settings_table(given.settings))
    menu, hiding = make_menu(document, facts), given.hiding_variable()
    note = _HIDES % hiding if hiding else "".join(loaded.warnings)
    return run_menu(menu._replace(note=note, is_error=True) if note else menu, effects, bool(given.prompts))


def menu_effects(path: str, environ: Environ) -> Effects:
    """What the menu can have done, by the name of its Effect."""
    given = Given(environ, {"config": path})
    return {
        "key": lambda job: make_key(),
        "save": lambda job, base, document: _save_menu(path, base, document),
        "models": lambda job, document: run_loop(ask_models(_plan_of(document, "", environ), given.settings, environ)),
        "test": lambda job, document: _test_in_menu(job, _plan_of(document, "", environ), given),
        "startup": lambda job, verb: _printed(run_startup, Given(environ, {"operation": verb, "config": path})),
        "deploy": lambda job: _deploy_in_menu(given),
    }


def _test_in_menu(job: Job, plan: ProbePlan, given: Given) -> Tuple[Any, ...]:
    """Probe: rows of probe_table, which tell what each model said, what was learned, and what its list said."""

    def show(report: ProbeReport) -> bool:
        job.tell("\n".join("%s  %s  %s" % (row.model, row.wire, row.state) for row in report.rows))
        return bool(job.is_cancelled)

    report = run_loop(run_probe(plan, given.settings, given.environ, show))
    words = ["it lists %d models" % len(report.listed)] if report.listed is not None else []
    words += _probe_warnings(report)[: bool(report.listing_note)]
    return probe_table(report)[1], learned_fields(plan, report), "\n".join(words)


def _deploy_in_menu(given: Given) -> Json:
    """Deploy, asking what there is to ask; what the file holds then, since a new key may have been stored."""
    try:
        run_deploy(given)
    except (RouterError, KeyboardInterrupt, EOFError) as error:  # Ctrl-C and Ctrl-D at a question
        print("\nllm-router: " + getattr(error, "message", "interrupted"))
    document = load_config(given.path, {}).document
    return NEW_DOCUMENT if document is None else document


def _save_menu(path: str, base: Json, document: Json) -> Tuple[str, Any]:
    """("saved", words), or ("conflict", what the file holds by now) when it is no longer `base`; then it is untouched.
    A file that was removed is made again."""
    theirs: List[Json] = []

    def change(found: Json) -> Edit:
        if found != base and found is not NEW_DOCUMENT:
            theirs.append(found)
            raise RouterError("%s was changed meanwhile" % one_line(path))
        return Edit(document, ("saved to " + path,))

    try:
        next_step = [] if running_instances() else [as_started("llm-router start serves it")]
        return "saved", "; ".join([*edit_config_file(path, change).notes, *next_step])
    except RouterError:
        if theirs:
            return "conflict", theirs[0]
        raise


def _printed(run: Callable[[Given], int], given: Given) -> str:
    """What a command prints, its warnings included: they must not run over the screen."""
    import io

    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        run(given)
    return text.getvalue().rstrip()


# ----- the running instance -----


def run_status(given: Given) -> int:
    """`status`: what runs, with which configuration, and how every candidate is."""
    status = ask_instance(given.find_instance(), "status")
    where = origin_url("http", status["host"], status["port"])
    facts = _labelled(
        configuration="%s (%s)" % (one_line(status["config"]["source"]), one_line(status["config"]["state"])),
        authorization="clients must show a key" if status["require_auth"] else "none",
        connections=str(status["connections"]),
    )
    rows = [("MODEL", "STATE", "BACK IN", "OK", "FAILED", "REASON", "LAST ERROR")]
    for one in status["candidates"]:
        name = one["model"] + (" (default)" if one["model"] == status["default_model"] else "")
        back = show_duration(one["left_s"] * 1000) if one["left_s"] else ""
        rows.append((name, one["state"], back, one["ok"], one["failed"], _plain(one["reason"]), _last_error(one)))
    table = [_colored(line, row[1]) for line, row in zip(_table(rows, (2, 3, 4)), rows)]
    up = show_duration(status["uptime_s"] * 1000)
    head = "llm-router %s on %s, pid %d, up %s" % (status["version"], where, status["pid"], up)
    note = "OK and FAILED count attempts of the requests that `explain` still knows"
    return given.tell(status, _spaced([head, *facts], table, [note]))


def _plain(word: str) -> str:
    return word.replace("_", " ")


def _last_error(candidate: Json) -> str:
    error = candidate["last_error"]
    if error is None:
        return ""
    ago = show_duration(max(0, int(time.time() - error["time"])) * 1000)
    return "%s, %s ago, %s: %s" % (error["label"] or error["kind"], ago, error["id"], one_line(error["message"], 80))


def run_stop(given: Given) -> int:
    """`stop`: end the running instance and wait until it is gone; nothing running is fine."""
    try:
        instance = given.find_instance()
    except RouterError as error:
        if error.code != "not_running":
            raise
        return given.tell({"stopped": False}, [error.message])
    _end_instance(instance, given.flags.get("grace", ""))
    done = {"stopped": True, "pid": instance.pid, "port": instance.port}
    return given.tell(done, ["stopped (pid %(pid)d, port %(port)d)" % done])


def _end_instance(instance: Instance, grace_s: Any) -> None:
    """Tell an instance to stop, with so much time for open requests ("": its own), and wait until it is gone."""
    until = time.monotonic() + ask_instance(instance, "stop/%s" % grace_s, "POST").get("grace_s", 30) + 5
    while not has_ended(instance):
        if time.monotonic() > until:
            raise RouterError("pid %d still runs 5 s after its grace" % instance.pid)
        time.sleep(0.05)


def run_reload(given: Given) -> int:
    """`reload`: apply the edited configuration without losing a request."""
    changes = ask_instance(given.find_instance(), "reload", "POST")["changes"]
    words = "changed providers: " + ", ".join(changes) if changes else "every provider is as it was"
    return given.tell({"reloaded": True, "changed": changes}, ["reloaded, " + words])


def run_doctor(given: Given) -> int:
    """`doctor`: one line for each thing that was looked at, with its cure; 1 when there is a problem."""
    findings = examine(given.config or "", given.settings, given.environ, bool(given.offline))
    bad = any(finding.level == "problem" for finding in findings)
    lines = []
    for one in findings:
        words = "; ".join(one_line(text, 300) for text in (one.text.partition("\n")[0], one.cure) if text)
        lines.append("%s %s: %s" % (_colored("%-8s" % one.level, one.level), one.about, words))
    return given.tell({"ok": not bad, "findings": [finding._asdict() for finding in findings]}, lines, int(bad))


def run_update(given: Given) -> int:
    """`update`: this file replaced by a newer release; running instances of it follow after they have drained."""
    before = __version__
    after = update_file(__file__, given.flags.get("from") or given.environ.get("LLM_ROUTER_UPDATE_URL", "").strip())
    told = _restart_instances() if after != before else []
    lines = ["updated %s to %s; the file before is kept as .bak" % (before, after)]
    lines += ["pid %d continues with it once its open requests have ended" % pid for pid in told]
    lines = lines if after != before else ["%s is already the version there" % before]
    return given.tell({"before": before, "after": after, "changed": after != before, "restarted": told}, lines)


def _restart_instances() -> List[int]:
    """Tell every running instance of this file to become the new one; their pids. RouterError when it starts at none:
    then the file before is back."""
    told, file = [], os.path.realpath(__file__)
    for instance in [one for one, status in running_instances() if status.get("file") == file]:
        try:
            if sys.platform == "win32":  # exec makes a new process there, and the old console is lost
                raise RouterError("stop and start it")
            ask_instance(instance, "restart", "POST", TRIAL_S + 10)
            told.append(instance.pid)
        except RouterError as error:
            if error.status == 422 and not told:
                os.replace(file + ".bak", file)
                words = "the release would not start again as pid %d was started, so the file before is back: %s"
                raise RouterError(words % (instance.pid, error.message)) from None
            _warn(["pid %d still runs the version before: %s" % (instance.pid, error.message)])
    return told


def run_explain(given: Given) -> int:
    """`explain ID`: what became of a request and why."""
    id = one_line(given.id or "last", 100)
    try:
        trail = ask_instance(given.find_instance(), "trail/" + quote(id, safe=""))["trail"]
    except RouterError as error:
        trail = None if isinstance(error, UsageError) else find_in_ledger(ledger_path(given.settings), id)
        if trail is None:
            error.message += "; the usage ledger does not know the request" if error.code == "not_running" else ""
            raise
    return given.tell(trail, _explanation(trail))


# What decides how an outcome is dealt with: shown by `explain`.
_WHAT_DECIDES = {
    RATE_LIMITED: "the provider's Retry-After, else --origin-rate-limit-cooldown-ms; who is next: fallbackModels",
    TEMPORARY: "--origin-retry-attempts, --origin-retry-base-delay-ms; then fallbackModels",
    TIMEOUT: "--first-byte-timeout-ms, --first-content-timeout-ms, --idle-timeout-ms, or the provider's own timeouts",
    EMPTY: "nothing: an empty answer is passed on only when nobody has a better one",
    BILLING: "credit at the provider; it is asked again after --origin-billing-cooldown-ms",
    AUTH: "the provider's apiKey or apiKeyEnv; a reload with another key ends --origin-auth-cooldown-ms",
    FORBIDDEN: "what the provider's key may use; it is asked again after --origin-auth-cooldown-ms",
    NOT_FOUND: "the model's id: llm-router config --operation=discover-models lists the provider's",
    POLICY: "--allow-policy-fallback lets other providers try what one has blocked",
    INVALID: "the request itself: a provider's 400 is not tried elsewhere",
    OVERFLOW: "--context-fallback lets the next candidate try; a model with a larger contextWindow",
}


def _explanation(trail: Json) -> List[str]:
    """A request's story: what was asked, who was tried and why the next one, what the client got, what decides that."""
    kind = "%s %s%s" % (trail["format"], trail["operation"], ", streamed" if trail["stream"] else "")
    first = ", first content after " + show_duration(trail["first_content_ms"]) if trail["first_content_ms"] else ""
    counts = ["%d %s" % (count, _plain(name)) for name, count in (trail["usage"] or {}).items() if count]
    kinds = [attempt["kind"] for attempt in trail["attempts"]]
    asked = _labelled(
        asked_for="%s (%s)" % (one_line(trail["asked"]) or "the default model", kind),
        client=one_line(trail["client"]),
        passed_over=one_line(trail.get("passed_over", "")),
    )
    path = one_line(trail.get("path", ""), 2000)  # all that the ledger knows of the attempts
    came = _labelled(
        answered_by=one_line(trail["model"] or "nobody") if trail["outcome"] == OK else "",
        outcome="%s, status %d" % (_plain(trail["outcome"]), trail["status"]),
        time=show_duration(trail["total_ms"]) + first,
        tokens=", ".join(counts),
        cost="" if trail.get("cost") is None else _dollars(trail["cost"]),
        error=one_line(trail["message"], 500),
    )
    return _spaced(
        ["%s  %s" % (trail["id"], trail["time"].replace("T", " ")), *asked],
        _attempt_lines(trail) if kinds else _labelled(attempts=path),
        came,
        ["what decides"] * any(kind in kinds for kind in _WHAT_DECIDES)
        + ["  %-13s%s" % (_plain(kind), words) for kind, words in _WHAT_DECIDES.items() if kind in kinds],
    )


def _attempt_lines(trail: Json) -> List[str]:
    """Each attempt with its place in the request's time: dotted a wait, solid the attempt, light the rest of an answer
    that streams."""
    attempts, whole, began = trail["attempts"], max(trail["total_ms"], 1), 0
    rows, bars = [], []
    for number, one in enumerate(attempts, 1):
        wait_ms, took_ms, kind = one["wait_ms"], one["took_ms"], _plain(one["kind"])
        said = kind if one["label"] in ("", one["kind"]) else "%s: %s" % (one["label"], kind)
        times = "waited %s, " % show_duration(wait_ms) if wait_ms else ""
        said += " (%stook %s)" % (times, show_duration(took_ms))
        rows.append(("%3d. %s" % (number, one["ref"]), one["wire"], said))
        bars.append([(" ", began), (".", wait_ms), ("#", took_ms)])
        began += wait_ms + took_ms
    bars[-1] += [("=", whole - began)] if trail["stream"] else []
    lines = _table(rows)
    lines = _with_bars(lines, bars, whole, _columns()) if whole >= 10 else lines
    told = []
    for line, one in zip(lines, attempts):
        further = [one_line(one["message"], 200), "-> " + one_line(one["decision"], 200) if one["decision"] else ""]
        told += [_colored(line, "ok" if one["kind"] == OK else "warning")]
        told += ["       " + text for text in further if text]
    return told


# ----- usage -----


def run_usage(given: Given) -> int:
    """`usage`: the ledger summed up, as a table with bars, JSON or CSV."""
    import csv

    path, by = ledger_path(given.settings), given.by or "model"
    if given.today and given.since:
        raise UsageError("usage: give --today or --since, not both")
    since = _parse_since("0d" if given.today else given.flags.get("since", "30d"))
    rows = sum_ledger(path, by, since) if path else []
    if not path and not given.json:
        raise UsageError("the usage ledger is off: LLM_ROUTER_USAGE_DB or --usage-db names its file")
    if given.csv and not given.json:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        cells = ([printable(str(group)), *sums] for group, *sums in (row.values() for row in rows[:-1]))
        writer.writerows([["group", *_LEDGER_SUMS], *cells])
        return 0
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(since)).replace(" 00:00", "")
    if rows:
        head = "since %s, by %s, from %s" % (day, by, one_line(path))
        lines = _spaced([head], _usage_table(rows, by, _columns()))
    else:
        hint = "every request through a running router is entered: llm-router start, or llm-router run claude"
        lines = ["%s holds no request since %s" % (one_line(path), day), hint]
    told = {"since": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(since)), "by": by, "file": path}
    return given.tell(dict(told, rows=rows[:-1], total=rows[-1] if rows else None), lines)


def _parse_since(text: str) -> float:
    """`7d` (days: from midnight on), `12h` or 2026-11-25 as Unix seconds. UsageError for anything else."""
    span = re.fullmatch(r"([0-9]{1,5})([dh])", text.strip())
    try:
        if span and span.group(2) == "h":
            return time.time() - int(span.group(1)) * 3600
        day = time.localtime() if span else time.strptime(text, "%Y-%m-%d")
        back = int(span.group(1)) if span else 0  # days, of which one may have 23 or 25 hours
        return time.mktime((day.tm_year, day.tm_mon, day.tm_mday - back, 0, 0, 0, 0, 0, -1))
    except (ValueError, OverflowError):
        raise UsageError("--since: %s is neither 7d, 12h nor a date like 2026-01-31" % one_line(text, 40)) from None


def _usage_table(rows: Sequence[Json], by: str, width: int) -> List[str]:
    """The sums as a table, a bar for each row's share of what the rows are compared by, and what is not known."""
    total = rows[-1]
    shares = [(row["cost"] or 0) if total["cost"] else _all_tokens(row) for row in rows[:-1]]
    head = (by.upper(), "REQUESTS", "FAILED", "INPUT", "CACHED", "OUTPUT", "COST")
    lines = _table([head, *(_usage_cells(row, max(12, width - 60)) for row in rows)], range(1, len(head)))
    bars = [[], *([("#", share)] for share in shares), []]
    notes = [
        (total["unknown_cost"], "without a known cost (+): their models have no complete `cost` in the configuration"),
        (total["estimated"], "not answered to the end (~): the tokens are those told until then"),
        (total["untold"], "whose tokens the provider did not tell"),
    ]
    said = ["%d request%s %s" % (count, "s" * (count != 1), words) for count, words in notes if count]
    return _spaced(_with_bars(lines, bars, max(shares) or 1, width), said)


def _all_tokens(row: Json) -> int:
    return sum(row[name] or 0 for name in ("input", "cache_read", "cache_write", "output"))


def _usage_cells(row: Json, widest: int) -> Tuple[Any, ...]:
    prompt = _all_tokens(row) - (row["output"] or 0)
    tokens = ("-", "-", "-")
    if row["input"] is not None:
        cached = "%d%%" % (100 * row["cache_read"] / prompt) if prompt else "-"
        tokens = (_short(prompt), cached, _short(row["output"]) + "~" * bool(row["estimated"]))
    cost = "-" if row["cost"] is None else _dollars(row["cost"]) + "+" * bool(row["unknown_cost"])
    name = "total" if row["group"] is None else one_line(row["group"], 200)
    name = name if len(name) <= widest else name[: widest - 3] + "..."
    return (name, row["requests"], row["failed"] or "", *tokens, cost)


def _dollars(cost: float) -> str:
    return "$%.2f" % cost if cost >= 1 else "$%.4f" % cost


def _short(count: float) -> str:
    thousands = "%.1fk" % (count / 1e3) if count < 999_950 else "%.1fM" % (count / 1e6)
    return thousands if count >= 1000 else "%d" % count


# ----- agents -----

_MODEL_FLAGS = "model.run small-model opus sonnet fable haiku "


def run_agent(given: Given) -> int:
    """`run TOOL [args...]`, `run -- COMMAND`: a program against the running router, or one of its own."""
    name, *further = given.tail or [""]
    agent = ANY_AGENT if name == "--" and further else next((row for row in AGENTS if row.name == name), None)
    if agent is None:
        names = ", ".join(row.name for row in AGENTS)
        raise UsageError("run: name one of %s, or -- and any command; run claude, run -- python app.py" % names)
    argv = further if agent is ANY_AGENT else given.tail
    try:
        return _run_as_guest(agent, argv, given.find_instance(), given)
    except RouterError as error:
        if error.code != "not_running":
            raise
    return _run_with_router(agent, argv, given)


def _run_as_guest(agent: Agent, argv: Sequence[str], instance: Instance, given: Given) -> int:
    """Run a program with a key of its own, which the running router knows while the program runs, and by which log and
    ledger name it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", argv[0].replace("\\", "/").rpartition("/")[2])
    key = "run-" + os.urandom(24).hex()
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    _, base, config = _reach_running(instance, given)
    ask_instance(instance, "admit/%s/run-%s" % (sha256, name), "POST")
    try:
        return run_program(agent, argv, agent_facts(base, key, config, given.flags), given.environ)
    finally:
        with suppress(RouterError):  # it has stopped, and its guests with it
            ask_instance(instance, "dismiss/" + sha256, "POST")


def _reach_running(instance: Instance, given: Given) -> Tuple[Json, str, Config]:
    """A running instance's status, URL and configuration, if it can be read here. UsageError for a model it has not."""
    status, environ = ask_instance(instance, "status"), given.environ
    for flag in (_FLAGS[key].key for key in _MODEL_FLAGS.split()):
        name = given.flags.get(flag)
        problem = name and ask_instance(instance, "model/" + quote(name, "", errors="replace"))["problem"]
        if problem:
            raise UsageError("--%s: %s" % (flag, problem))
    try:
        config = read_config(Given(environ, {"config": instance.config}).load(presets=True).document, environ)
    except RouterError:  # made of key variables that this shell does not have, or broken since
        config = Config(environ.get("LLM_ROUTER_MASTER_KEY", "").strip(), default_model=status["default_model"])
    return status, origin_url("http", near_host(instance.host), instance.port), config


def _run_with_router(agent: Agent, argv: Sequence[str], given: Given) -> int:
    """A router on a free port for as long as the program runs; with --keep it stays."""
    import signal

    on_end(signal.default_int_handler)  # as Ctrl-C does: the router must not stay behind
    flags = {"port": 0, **{name: given.flags[name] for name in ("config", "port") if name in given.flags}}
    change_instances(state_path(), lambda known: known)  # where that cannot be written, nobody would find it again
    pid, base, _ = _start_in_background(Given(given.environ, flags))
    port = int(base.rpartition(":")[2])
    try:
        return _run_as_guest(agent, argv, find_instance(state_path(), "", port), given)
    finally:
        _hold_signals()  # a second one would leave it behind after all
        if given.keep:
            _warn(["the router stays: pid %d, %s; llm-router stop ends it" % (pid, base)])
        else:
            _end_instance(find_instance(state_path(), "", port), 2)


def run_env(given: Given) -> int:
    """`env [TOOL]`: the variables that point a program at the running router, for a shell to read."""
    name = one_line(given.tool or "any", 40)
    led = {row.name: row for row in (*AGENTS, ANY_AGENT) if "%(base)s" in row.variables}
    if name not in led:
        words = name, ", ".join(led), name
        raise UsageError("env: variables do not lead %s anywhere, only %s; try llm-router run %s" % words)
    status, base, config = _reach_running(given.find_instance(), given)
    if status["require_auth"] and not config.master_key:
        raise UsageError("the running router wants a key: set LLM_ROUTER_MASTER_KEY to one")
    key = config.master_key if status["require_auth"] else ""
    variables = fill_templates(led[name], agent_facts(base, key, config, given.flags))[0]
    own = given.environ.get("SHELL", "").rpartition("/")[2]
    usual = own if own in _SHELLS else "powershell" if given.environ.get("OS") == "Windows_NT" else "bash"
    return given.tell(variables, shell_lines(variables, given.shell or usual))


# ----- Cloudflare -----


def run_deploy(given: Given) -> int:
    """`deploy`: this very file and the configuration to Cloudflare, or into files."""
    site = _read_site(given)
    paths = write_project(given.export_dir, site) if given.export_dir else []
    if paths and os.path.join(given.export_dir, "wrangler.toml") not in paths:
        _warn(["the wrangler.toml there has other words and stays; remove it for a new one"])
    if paths and not given.export_only:
        hint = "there: wrangler deploy, then wrangler secret put %s < FILE, made by deploy --export-only=true"
        return given.tell({"files": paths}, ["wrote " + ", ".join(map(one_line, paths)), hint % CONFIG_VARIABLES[0]])
    payload = _strong_payload(given)
    _warn(payload.doubts)
    if given.export_only:
        return _export_config(given, payload, site)
    wrangler = _find_wrangler(given)
    if given.dry_run:
        make = wrangler_steps if wrangler else api_steps
        return _show_steps(given, make(site, show_secrets(payload.secrets)))
    if not site.domain and not site.route and _is_guided(given):
        site = check_site(site._replace(domain=input("a domain of yours for it (empty: one of workers.dev): ").strip()))
    host, site = _reach_cloudflare(given, site, wrangler)
    url, present = host.deploy(site, payload.secrets)
    key = mask(payload.config.master_key) or "their own"
    if "LLM_ROUTER_MASTER_KEY" in present:
        _warn(["the Worker keeps the key that worker-key gave it, whatever masterKey the configuration has"])
        key = "that of worker-key"
    names, means = list(payload.secrets), "wrangler" if wrangler else "api"
    lines = [
        "deployed %s, secrets: %s" % (site.name, ", ".join(names)),
        "  Anthropic clients   ANTHROPIC_BASE_URL=" + url,
        "  OpenAI clients      OPENAI_BASE_URL=%s/v1" % url,
        "  their key           " + key,
    ]
    return given.tell({"worker": site.name, "url": url, "secrets": names, "with": means}, lines)


def run_worker_key(given: Given) -> int:
    """`worker-key`: a new master key for the Worker; the one before is refused from then on."""
    site = _read_site(given)
    key = (given.master_key or "").strip() or make_key()
    weakness = "" if given.allow_weak_master_key else key_weakness(key)
    if weakness:
        raise UsageError(_WEAK % weakness + "; --generate makes a strong one")
    wrangler = _find_wrangler(given)
    if given.dry_run:
        return _show_steps(given, [key_step(site, show_secrets({"key": key})["key"], bool(wrangler))])
    host, site = _reach_cloudflare(given, site, wrangler)
    host.set_key(site, key)
    made = {"masterKey": key} if given.generate else {}
    lines = ["the Worker %s has a new master key; the one before is refused" % site.name]
    return given.tell({"worker": site.name, **made}, lines + [_KEY_ONCE % ("master", key)] * len(made))


_WEAK = "the master key is too weak for an address that everybody can reach: %s"


def _read_site(given: Given) -> Site:
    name = "-".join(filter(None, (given.name or WORKER_NAME, given.env)))
    account = given.account_id or given.environ.get("CLOUDFLARE_ACCOUNT_ID", "").strip()
    return check_site(Site(name, account, given.domain or "", given.route or ""))


def _is_guided(given: Given) -> bool:
    """Whether a person sits there who can be asked."""
    return not given.json and sys.stdin.isatty() and sys.stdout.isatty()


def _ask_user(given: Given, question: str, otherwise: str) -> str:
    """What somebody at a terminal answers. UsageError with what to do `otherwise`."""
    if not _is_guided(given):
        raise UsageError(otherwise)
    return input(question).strip()


def _strong_payload(given: Given) -> Payload:
    """What the Worker gets to know, with a new master key in place of a weak or missing one, if the user wants that.
    UsageError when he does not, or cannot be asked."""
    loaded = given.load()
    payload = make_payload(loaded.document, given.environ)
    config = payload.config
    fault = "" if config.client_keys else "there is no master key, and everybody can reach a Worker"
    if config.master_key:
        weakness = "" if given.allow_weak_master_key else key_weakness(config.master_key)
        fault = weakness and _WEAK % weakness
    if not fault:
        return payload
    cures = "llm-router config --operation=set-master-key --generate makes a strong one"
    cures += ", --allow-weak-master-key=true takes it as it is" if config.master_key else ""
    question = fault + "\nmake a new one and store it in the configuration? [Y/n] "
    if _ask_user(given, question, "%s; %s" % (fault, cures)).lower() not in ("", "y", "yes"):
        raise UsageError("nothing was deployed")
    if not loaded.path or given.environ.get("LLM_ROUTER_MASTER_KEY", "").strip():
        raise UsageError("the key, or all of the configuration, comes from a variable: set a strong key there")
    key = make_key()
    edit = edit_config_file(loaded.path, lambda document: set_master_key(document, key))
    print(_KEY_ONCE % ("master", key))
    return make_payload(edit.document, given.environ)


def _export_config(given: Given, payload: Payload, site: Site) -> int:
    """`--export-only`: the configuration's secret as a file for wrangler; several as one for its `secret bulk`."""
    import shlex

    path = os.path.abspath(os.path.expanduser(given.out or ".llm-router.worker.json"))
    name, *others = payload.secrets
    fits = not any(other.startswith(name) for other in others)
    write_private(path, (payload.secrets[name] if fits else json.dumps(payload.secrets)).encode("utf-8"))
    call = "wrangler secret %s --name %s < %s" % ("put " + name if fits else "bulk", site.name, shlex.quote(path))
    further = others if fits else []
    lines = ["wrote %s (0600)" % one_line(path), "now run: " + call]
    lines += ["and for every key: wrangler secret put %s --name %s" % (other, site.name) for other in further]
    return given.tell({"path": path, "command": call, "further": further}, lines)


def _find_wrangler(given: Given) -> str:
    """The path of wrangler, "" when the API shall be called directly."""
    import shutil

    wanted = _BOOLS.get(given.use_wrangler)  # None: when it is there
    found = "" if wanted is False else shutil.which("wrangler") or ""
    if wanted and not found:
        raise UsageError("wrangler is not installed: npm install -g wrangler, or --use-wrangler=false")
    return found


def _show_steps(given: Given, steps: Sequence[CloudStep]) -> int:
    shown = {"steps": [show_step(step, api_url(given.environ)) for step in steps]}
    return given.tell(shown, [json.dumps(shown, indent=2)])


def _reach_cloudflare(given: Given, site: Site, wrangler: str) -> Tuple[Any, Site]:
    """Who takes the steps, and the site with its account. UsageError without token or with several accounts."""
    if wrangler:
        return Wrangler(wrangler, given.environ, site.account), site
    token = given.environ.get("CLOUDFLARE_API_TOKEN", "").strip()
    if not token and not _is_guided(given):
        made = "made from the template Edit Cloudflare Workers at https://dash.cloudflare.com/profile/api-tokens"
        raise UsageError("CLOUDFLARE_API_TOKEN is not set: give one, %s; or install wrangler" % made)
    api = Cloudflare(given.environ, token or _read_secret("Cloudflare's API token"))
    return api, site if site.account else site._replace(account=_choose_account(given, api.accounts()))


def _choose_account(given: Given, accounts: Sequence[Tuple[str, str]]) -> str:
    if not accounts:
        raise UsageError("the token sees no account: give --account-id or CLOUDFLARE_ACCOUNT_ID")
    if len(accounts) == 1:
        return accounts[0][0]
    rows = {str(at): "%s (%s)" % (id, one_line(name, 60)) for at, (id, name) in enumerate(accounts, 1)}
    question = "".join("%s  %s\n" % row for row in rows.items()) + "which account? "
    several = "the token sees several accounts: give --account-id, one of " + ", ".join(rows.values())
    chosen = _ask_user(given, question, several)
    if chosen not in rows:
        raise UsageError("no such account")
    return accounts[int(chosen) - 1][0]


COMMANDS: Tuple[Command, ...] = (
    Command("", run_menu_command, "one local endpoint for every AI provider; alone on a terminal it opens the menu",
            "config json prompts", "llm-router start"),
    Command("config", run_menu_command, "the menu, or with --operation= one change without any prompt",
            "operation config json prompts " + " ".join(row.needs + " " + row.takes for row in OPERATIONS),
            "llm-router config --operation=list"),
    Command("start", run_start, "serve, in the foreground or with --detach in the background",
            "config grace watch-config require-auth allow-unauthenticated check detach " + " ".join(_START_FLAGS),
            "llm-router start\nllm-router start --detach --port=8787 --require-auth=true"),
    Command("status", run_status, "show the running instance and the state of every model", "config port json",
            "llm-router status\nllm-router status --port=8787 --json"),
    Command("explain", run_explain, "show what became of a request and why: explain ID, or explain last",
            "id config port json",
            "llm-router explain last\nllm-router explain req_0123456789abcdef01234567 --json"),
    Command("usage", run_usage, "show what requests used and cost, from the usage ledger",
            "since today by json csv usage-db",
            "llm-router usage --since=7d --by=provider\nllm-router usage --today --json"),
    Command("reload", run_reload, "apply the edited configuration; open streams go on", "config port json",
            "llm-router reload"),
    Command("stop", run_stop, "end the running instance", "config port grace json", "llm-router stop --grace=5"),
    Command("doctor", run_doctor, "look for what is wrong and say the cure", "config port.doctor offline json",
            "llm-router doctor --offline"),
    Command("update", run_update, "replace this file by a newer release", "from json",
            "llm-router update --from=https://example.com/llm_router.py"),
    Command("run", run_agent, "run claude, codex, opencode, kilo, copilot, aider, qwen, pi, or -- any command",
            _MODEL_FLAGS + "keep config port",
            "llm-router run claude\nllm-router run --model=openrouter/gpt-4o --haiku=groq/small claude -p 'say hi'\n"
            "llm-router run -- python app.py", passes_on=True),
    Command("env", run_env, "print the variables that point a program at the running router",
            "tool shell " + _MODEL_FLAGS + "config port json", "llm-router env --shell=bash"),
    Command("deploy", run_deploy, "put this file and the configuration onto Cloudflare as a Worker",
            "config " + _SITE + "domain route export-only out.worker export-dir", "llm-router deploy --dry-run"),
    Command("worker-key", run_worker_key, "give the Worker a new master key; the one before is refused",
            _SITE, "llm-router worker-key --generate", "master-key|generate"),
    Command("settings", run_settings, "show every setting", "json", "llm-router settings --json"),
    Command("demo", lambda given: run_demo(bool(given.once), given.port or 0),
            "try it without key, configuration or network", "once port.demo", "llm-router demo --once"),
)  # fmt: skip

# ==============================================================================
# 38 MAIN - the only exit [host]
# ==============================================================================


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line; the exit code: 0 done, 1 failed, 2 wrong input or configuration, 130 interrupted."""
    hold_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not stop a command
    with suppress(AttributeError, ValueError):  # a caller's own, perhaps one that was read from before
        sys.stdin.reconfigure(errors="surrogateescape")  # nor what is no text there: it is said what is wrong with it
    try:
        code = run_command(argv, os.environ)
        sys.stdout.flush()
    except (KeyboardInterrupt, EOFError):  # Ctrl-C, or Ctrl-D at a question
        code = 130
    except Exception as error:
        code = 1 if isinstance(error, BrokenPipeError) else _report(error, argv)
    settle_stream(sys.stdout)
    settle_stream(sys.stderr)
    return code


def _report(error: Exception, argv: Sequence[str]) -> int:
    """Say on stderr what went wrong and return the exit code."""
    if any(re.fullmatch("--debug(=(1|true|yes|on))?", word.lower()) for word in argv):
        sys.excepthook(type(error), error, error.__traceback__)
    text = getattr(error, "message", "") or "%s: %s (--debug shows more)" % (type(error).__name__, error)
    tell_aside("llm-router: " + text)
    return 2 if isinstance(error, UsageError) else 1


def hold_streams() -> None:
    """Open the null device for every closed standard stream: a file could get its number, and what is printed to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  it takes the free number


def entry() -> None:
    """The console script `llm-router`."""
    sys.exit(main())


def shed_source(path: str) -> str:
    """Where the program's file is; `path` is where it seems to be. Called first, by the script itself.

    CPython compiles a script at each start and keeps its syntax tree, here nearly half of the memory, as long as it
    runs. So a server starts once more in the same process, from the byte code that is there by then: through a memory
    file, where the system has them (Linux). Nothing is cached, so nothing needs to be trusted, kept fresh or writable.
    """
    hold_streams()
    told = sys._xoptions.get(_PATH_OPTION)
    if path.startswith(_DESCRIPTORS) and told:
        os.close(int(path[len(_DESCRIPTORS) :]))
        sys.argv[0], sys.path[0] = told, os.path.dirname(told)
        return str(told)
    caller, watched = sys._getframe(1), sys.gettrace() or sys.getprofile()  # a debugger or profiler would be lost
    serves = sys.argv[1:2] == ["start"] and not any(word.startswith("--detach") for word in sys.argv)
    if serves and not watched and caller.f_globals["__spec__"] is None and hasattr(os, "memfd_create"):
        with suppress(OSError):  # forbidden here: it only costs memory
            _start_byte_code(os.path.abspath(path), caller.f_code)
    return path


_DESCRIPTORS = "/proc/self/fd/"


def _start_byte_code(path: str, code: Any) -> None:
    """Replace this process by the module `code`; `path` goes along. OSError when that cannot be done."""
    import marshal
    from importlib.util import MAGIC_NUMBER

    descriptor = os.memfd_create("llm_router", 0)
    try:
        os.write(descriptor, MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
        script = _DESCRIPTORS + str(descriptor)
        os.stat(script), os.stat(path)
        told = ("-X", "%s=%s" % (_PATH_OPTION, path))
        os.execv(sys.executable, [*interpreter_words(), *told, script, *sys.argv[1:]])  # noqa: S606  this file
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    __file__ = shed_source(__file__)
    entry()
