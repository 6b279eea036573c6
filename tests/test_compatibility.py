"""COMPATIBILITY: rows for known upstreams, and what a 400 teaches about fields that the router itself added."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fake_upstream as fake
import llm_router
from running_router import config_of, provider


def translated():
    return {"model": "m", "max_tokens": 5, "stream_options": {"include_usage": True}, "messages": []}


def test_openai_itself_gets_max_completion_tokens_and_an_unknown_host_max_tokens():
    """Trap 71."""
    fixes = llm_router.find_compat("", "api.openai.com").fixes
    body = llm_router.apply_fixes(translated(), fixes)
    assert body["max_completion_tokens"] == 5 and "max_tokens" not in body
    assert llm_router.apply_fixes(translated(), llm_router.find_compat("", "example.test").fixes)["max_tokens"] == 5


def test_a_row_is_found_by_name_before_the_host_and_by_the_host_of_a_subdomain():
    assert llm_router.find_compat("mistral", "api.openai.com").name == "mistral"
    assert llm_router.find_compat("", "eu.openai.azure.com").name == "azure"
    assert llm_router.find_compat("", "notopenai.azure.com.evil.test").name == ""


@pytest.mark.parametrize("row", llm_router.COMPATS, ids=[row.name for row in llm_router.COMPATS])
def test_every_fix_a_row_names_exists_and_leaves_a_request_usable(row):
    assert set(row.fixes) <= set(llm_router.FIXES)
    assert "messages" in llm_router.apply_fixes(translated(), row.fixes)


LESSONS = [
    (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "max_completion_tokens",
    ),
    ("max_tokens is deprecated, use max_completion_tokens instead", "max_completion_tokens"),
    ("Extra inputs are not permitted: stream_options", "no stream_options"),
    ("Unrecognized request argument supplied: stream_options", "no stream_options"),
    ("body.stream_options: Extra inputs are not permitted", "no stream_options"),  # FastAPI's, of Mistral and many more
    ("Argument not supported on this model: reasoningEffort", "no reasoning_effort"),  # xAI
    ('"m" does not support thinking', "no reasoning_effort"),  # Ollama
    ("`reasoning_effort` must be one of `none` or `default`", "no reasoning_effort"),  # Groq
    ("tools.0.function.strict: Extra inputs are not permitted", "no strict"),
    ("Unknown parameter: 'tools[0].function.strict'.", "no strict"),  # OpenAI, Azure
    ("Extra inputs are not permitted, field: 'messages[1].reasoning_content', value: 'hm'", "no reasoning_content"),  # Fireworks
    ("tools: Too many strict tools (22). The maximum number of strict tools supported is 20.", "no strict"),  # Anthropic
    ("Schema is too complex for compilation. Try reducing the number of tools.", "no strict"),
    ("The compiled grammar is too large, which would cause performance issues.", "no strict"),
    ("tools.25.custom: For 'integer' type, properties maximum, minimum are not supported", "no strict"),
    ("Invalid schema for function 'f': 'required' is required to be supplied and to be an array", "no strict"),  # OpenAI
    ("messages.2.assistant.reasoning_content: Extra inputs are not permitted", "no reasoning_content"),
    ("'response_format' of type 'json_schema' is not supported with this model.", "schema in words"),
    ("This model does not support response format `json_schema`.", "schema in words"),  # Groq
    ("Invalid value: 'json_schema'. Supported values are: 'json_object' and 'text'.", "schema in words"),
    ("Unknown name \"const\" at 'tools[0].function_declarations[0].parameters': Cannot find field.", "plain schemas"),
    ("After the optional system message, conversation roles must alternate user and assistant roles", "strict turns"),
    ("thinking.stream_options: Extra inputs are not permitted", ""),
    ("Invalid 'tools[0].function.name': string too long. Expected a maximum length 64, but got a string with length 95.", ""),
    ("temperature is not supported with this model", ""),
    ("messages: text content blocks must be non-empty", ""),
    ("tool parallel_tool_calls_helper is unknown", ""),
]


@pytest.mark.parametrize("message, fix", LESSONS)
def test_a_400_teaches_only_about_fields_the_router_put_there(message, fix):
    turns = [{"role": "assistant", "reasoning_content": "hm"}]
    body = dict(translated(), messages=turns, reasoning_effort="low", response_format={"type": "json_schema"})
    assert llm_router.learn_fix(dict(body, tools=[{"type": "function"}]), [message], ()) == fix


@pytest.mark.parametrize(
    "field, message",
    [
        ("stop", "Unsupported parameter: 'stop' is not supported with this model."),
        ("max_output_tokens", "Unsupported parameter: max_output_tokens"),
        ("tool_choice", "tool_choice 'specified' is incompatible with thinking enabled\ninvalid_request_error"),
        ("tool_choice", "The tool_choice parameter does not support being set to required or object in thinking mode"),
    ],
)
def test_what_thinking_models_refuse_of_a_translated_request_is_learned(field, message):
    body = dict(translated(), stop=["x"], tool_choice="required", max_output_tokens=99)
    fix = llm_router.learn_fix(body, message.split("\n"), ())
    assert field not in llm_router.apply_fixes(body, [fix]) and len(body) == len(translated()) + 2


def test_a_model_that_calls_no_functions_while_it_reasons_does_not_reason_beside_tools():
    """OpenAI's words for GPT-5.5 and newer ones in Chat Completions, whether an effort was sent or not."""
    words = ["Function tools with reasoning_effort are not supported for m in /v1/chat/completions."]
    for body in (dict(translated(), reasoning_effort="high"), translated()):
        body["tools"] = [{"type": "function", "function": {"name": "f"}}]
        fix = llm_router.learn_fix(body, words, ())
        assert llm_router.apply_fixes(body, [fix])["reasoning_effort"] == "none"
        assert "reasoning_effort" not in llm_router.apply_fixes(translated(), [fix])


@pytest.mark.parametrize("status", [400, 500])
def test_instructions_amid_the_conversation_are_the_user_s_where_a_template_wants_them_in_front(status, router, make_upstream):
    """Claude Code sends such turns; Qwen's template raises, which vLLM answers with 400 and llama.cpp with 500."""
    upstream = make_upstream()
    words = "Jinja Exception: System message must be at the beginning."
    upstream.answer(fake.error_answer("openai", status, words, "server_error"), fake.model_answer("openai", False, "fine"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}]
    body = {"model": "a/m", "max_tokens": 9, "system": "s", "messages": turns}
    assert "fine" in running.post("/v1/messages", body).text
    sent = [[(turn["role"], turn["content"]) for turn in call.json["messages"]] for call in upstream.calls]
    assert sent[0] == [("system", "s"), ("user", "a"), ("assistant", "b"), ("system", "c")]
    assert sent[1] == [*sent[0][:3], ("user", "c")]


def test_a_server_s_own_fault_teaches_nothing_whatever_field_it_names(router, make_upstream):
    upstream = make_upstream()
    words = "unknown error while reading max_tokens"
    upstream.answer(fake.error_answer("openai", 500, words, "server_error"), fake.model_answer("openai", False, "fine"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    body = {"model": "a/m", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]}
    assert "fine" in running.post("/v1/messages", body).text
    assert [call.json["max_tokens"] for call in upstream.calls] == [9, 9]
    assert "learned" not in running.wait_log("a/m=500")


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported parameter: 'reasoning.effort' is not supported with this model.",
        "Encrypted content is not supported with this model.",
        "Argument not supported on this model: reasoningEffort",
    ],
)
def test_a_model_that_does_not_reason_is_asked_for_no_reasoning_and_for_no_proof_of_it(message):
    """OpenAI's words in the Responses API, of which it says the one or the other, and xAI's."""
    asks = {"reasoning": {"effort": "high"}, "include": ["reasoning.encrypted_content"]}
    fix = llm_router.learn_fix({"model": "m", "input": [], **asks}, [message], ())
    assert llm_router.apply_fixes({"model": "m", **asks}, [fix]) == {"model": "m"}


@pytest.mark.parametrize("message", ["Argument not supported: include", "Unknown parameter: 'include'."])
def test_an_upstream_that_cannot_tell_its_proofs_is_not_asked_for_them_and_reasons_all_the_same(message):
    """xAI of some models (openclaw/openclaw#12910)."""
    asks = {"reasoning": {"effort": "high"}, "include": ["reasoning.encrypted_content"]}
    fix = llm_router.learn_fix({"model": "m", "input": [], **asks}, [message], ())
    assert llm_router.apply_fixes({"model": "m", **asks}, [fix]) == {"model": "m", "reasoning": {"effort": "high"}}


def test_an_organization_that_may_not_see_summaries_keeps_effort_and_proofs(router, make_upstream):
    """OpenAI refuses the summary alone, of whoever it has not verified."""

    def answers(call):
        if "summary" in call.json["reasoning"]:
            words = "Your organization must be verified to generate reasoning summaries. Please go to: https://x/settings"
            return fake.error_answer("responses", 400, words, "invalid_request_error")
        return fake.model_answer("responses", False, "fine")

    upstream = make_upstream(answers)
    running = router(config_of(provider(upstream, "responses", "a", ["m"])))
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = {"model": "a/m", "max_tokens": 9000, "thinking": thinking, "messages": [{"role": "user", "content": "q"}]}
    assert [running.post("/v1/messages", body).status for _ in range(2)] == [200, 200]
    sent = upstream.calls[-1].json
    assert len(upstream.calls) == 3 and sent["reasoning"] == {"effort": "low"}
    assert sent["include"] == ["reasoning.encrypted_content"]


@pytest.mark.parametrize(
    "words, most",
    [
        ("max_tokens is too large: 32000. This model supports at most 16384 completion tokens, you provided 32000.", 16384),
        ("`max_tokens` must be less than or equal to `8192`, which is less than the `context_window`", 8192),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8192),
        ("max_completion_tokens: expected a value <= 12288, but got 32000. Request id: 0217752964393142fa5", 12288),
        ("max_tokens: 32000 > 4,096, which is the maximum allowed for claude-x-20240307", 4096),
        ("The maximum tokens you requested exceeds the model limit of 4096. Try a value that is lower than 4096.", 4096),
        ("it has a maxOutputTokens value of 32000 but the supported range is from 1 (inclusive) to 8193 (exclusive).", 8192),
        ("`max_tokens` must be greater than `thinking.budget_tokens`: 31999", 0),
        ("Requests with max_tokens > 4096 must have stream=true", 0),
        ("max_tokens must be at least 1, 320 was too large", 0),
        ("the maximum of 200 tools is exceeded", 0),
    ],
)
def test_the_most_that_an_upstream_gives_is_learned_from_its_refusal_of_more(words, most):
    fix = llm_router.learn_fix(dict(translated(), max_tokens=32000), [words], ())
    assert fix == "at most %d tokens" % most if most else not fix.startswith("at most")


def test_no_more_is_asked_for_than_the_model_gives_by_its_entry_or_by_what_was_learned(router, make_upstream):
    words, strict = "max_tokens is too large: 20000. This model supports at most 16384 completion tokens.", []

    def upstream_answers(call):
        if strict and call.json["max_tokens"] > 16384:
            return fake.error_answer("openai", 400, words, "invalid_request_error")
        return fake.model_answer(call.wire, False, "fine")

    upstream = make_upstream(upstream_answers)
    model = {"id": "m", "maxOutputTokens": 20000}
    running = router(config_of(provider(upstream, "openai", "a", [model]), provider(upstream, "anthropic", "b", [model])))
    turns = [{"role": "user", "content": "hi"}]

    def sent(path, **body):
        assert running.post(path, dict(body, messages=turns)).status == 200
        return upstream.calls[-1].json.get("max_tokens")

    assert sent("/v1/messages", model="a/m", max_tokens=32000) == 20000
    assert sent("/v1/messages", model="a/m", max_tokens=9) == 9
    assert sent("/v1/chat/completions", model="b/m", max_tokens=32000) == 20000
    assert sent("/v1/chat/completions", model="a/m", max_tokens=32000) == 32000  # passed through
    assert sent("/v1/responses", model="a/m", input="hi") is None
    strict.append(True)
    for _ in range(2):
        assert sent("/v1/messages", model="a/m", max_tokens=32000) == 16384
    assert "at most 16384 tokens" in running.wait_log("learned")


LONG = """
import sys
sys.path.insert(0, sys.argv[1])
import llm_router as r
body = {fix.needs: 1 for fix in r.FIXES.values()}
for piece in ("a_b ", "e", " ", "max_", "max_tokens ", "messages.", "tools.a.", "invalid ", "encrypted content "):
    text = piece * (100_000 // len(piece))
    assert r.learn_fix(body, [text], ()) == "", piece
    assert all(r.repair_history({}, wire, [text]) == ("", None) for wire in r.WIRES)
    for status in (400, 429, 500):
        r.judge_error("openai", status, [], r.dump_json({"detail": [{"msg": text, "input": text}]}), 0.0)
    r._WANTS_MORE.search(text)
head = "HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\nx: y\\r\\n" + " " * 250_000 + "z\\r\\n\\r\\n"
parser = r.ResponseParser()
parser.feed(head.encode())
assert ("x", "y z") in parser.head.headers
"""


def test_an_error_or_a_head_as_long_as_a_request_is_read_in_no_time():
    """Some repeat all of a request in their 400 (FastAPI's `detail[].input`): patterns that were tried anew at each of its
    characters held every other request up for minutes."""
    folder = str(Path(llm_router.__file__).parent)
    subprocess.run([sys.executable, "-c", LONG, folder], check=True, timeout=120)


def test_a_lesson_is_learned_once():
    words = ["stream_options is not supported"]
    assert llm_router.learn_fix(translated(), words, ("no stream_options",)) == ""


@pytest.mark.parametrize("words", ["the quick brown fox ", "range max"])
def test_a_long_refusal_is_read_in_a_moment(words):
    """Validation errors may list a whole request. Steps that grow with its square take minutes, for every client."""
    body = dict(translated(), **dict.fromkeys(("tools", "stop", "store", "thinking", "reasoning_effort"), "x"))
    began = time.process_time()
    assert llm_router.learn_fix(body, [words * (60_000 // len(words))], ()) == ""
    assert time.process_time() - began < 10


def test_requests_that_are_refused_for_one_field_at_the_same_time_are_all_mended(router, make_upstream):
    both, refusal = threading.Barrier(2), "stream_options is not supported here"

    def answers(call):
        if "stream_options" not in call.json:
            return fake.model_answer("openai", True, "mended")
        both.wait(30)  # the second one is refused when the first one has learned, or is about to
        return fake.error_answer("openai", 400, refusal, "invalid_request_error")

    running = router(config_of(provider(make_upstream(answers), "openai", "a", ["m"])))
    body = {"model": "a/m", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(lambda _: running.post("/v1/messages", body), range(2)))
    assert [(reply.status, "mended" in reply.text) for reply in replies] == [(200, True)] * 2


def test_what_was_no_help_is_not_remembered(router, make_upstream):
    """A refusal may name a field by chance; the requests behind it are to have theirs."""

    def answers(call):
        if "odd" in call.body.decode():
            words = "Invalid conversation: it cannot stop with an assistant's turn"
            return fake.error_answer("openai", 400, words, "invalid_request_error")
        return fake.model_answer("openai", False, "fine")

    upstream = make_upstream(answers)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    body = {"model": "a/m", "max_tokens": 9, "stop_sequences": ["END"]}
    for text, status in (("odd", 400), ("even", 200)):
        assert running.post("/v1/messages", dict(body, messages=[{"role": "user", "content": text}])).status == status
    assert ["stop" in call.json for call in upstream.calls] == [True, False, True]


def test_a_server_that_refuses_several_fields_one_at_a_time_gets_none_of_them(router, make_upstream):
    def answers(call):
        odd = [name for name in ("stream_options", "parallel_tool_calls", "tool_choice") if name in call.json]
        if odd:
            words = "%s is not supported here" % odd[0]
            return fake.error_answer("openai", 400, words, "invalid_request_error")
        return fake.model_answer("openai", True, "fine")

    upstream = make_upstream(answers)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = {"model": "a/m", "max_tokens": 9, "stream": True, "tool_choice": choice, "tools": [{"name": "f", "input_schema": {}}]}
    for calls in (4, 5):
        reply = running.post("/v1/messages", dict(body, messages=[{"role": "user", "content": "q"}]))
        assert (reply.status, len(upstream.calls)) == (200, calls)
    assert "parallel_tool_calls" in upstream.calls[0].json


CODEX = {
    "model": "a/m", "input": "q", "store": False, "prompt_cache_key": "k", "text": {"verbosity": "low"},
    "metadata": {"a": "b"}, "user": "u",
}  # fmt: skip


@pytest.mark.parametrize("first", ["store", "prompt_cache_key", "verbosity"])
def test_who_refuses_one_of_the_fields_that_only_openai_has_gets_none_of_them(first, router, make_upstream):
    """Trap 70: Codex sends several, and servers name one at a time (Groq, Cerebras, Gemini); one further call is all."""

    def answers(call):
        odd = [name for name in (first, "store", "prompt_cache_key", "verbosity", "metadata") if name in call.json]
        if odd:
            return fake.error_answer("openai", 400, "property '%s' is unsupported" % odd[0], "invalid_request_error")
        return fake.model_answer("openai", False, "fine")

    upstream = make_upstream(answers)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    assert [running.post("/v1/responses", CODEX).status for _ in range(2)] == [200, 200]
    assert len(upstream.calls) == 3


@pytest.mark.parametrize("compat", ["groq", "cerebras", "gemini", "mistral"])
def test_a_strict_upstream_that_is_known_is_never_told_what_only_openai_knows(compat, router, make_upstream):
    """zed-industries/zed#36215, sipeed/picoclaw#1333, liliMozi/openhanako#394."""
    upstream = make_upstream(fake.model_answer("openai", False, "fine"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"], compat=compat)))
    assert running.post("/v1/responses", CODEX).status == 200
    assert {"store", "prompt_cache_key", "verbosity", "metadata"}.isdisjoint(upstream.calls[0].json)
    assert ("user" in upstream.calls[0].json) == (compat != "mistral")


@pytest.mark.parametrize("store, told", [(True, {"a": "b"}), (False, None), (None, None)])
def test_metadata_is_for_chat_completions_that_are_stored(store, told):
    """OpenAI: "The 'metadata' parameter is only allowed when 'store' is enabled." (QwenLM/qwen-code#243)"""
    _, body = llm_router.translate_request(dict(CODEX, store=store), "responses", "openai")
    assert body.get("metadata") == told


@pytest.mark.parametrize(
    "words, fix",
    [
        ("body.user: Extra inputs are not permitted", "no user"),
        ("property 'user' is unsupported", "no user"),
        ("Unknown name \"user\": Cannot find field.", "no user"),
        ("body.messages.0.user.name: Extra inputs are not permitted", ""),
        ("Invalid message role: expected user or assistant, which is unsupported", ""),
    ],
)
def test_the_end_user_is_left_out_for_who_refuses_that_field_and_not_that_role(words, fix):
    assert llm_router.learn_fix({"user": "u", "messages": []}, [words], ()) == fix


def test_a_lesson_needs_its_field_in_the_request():
    assert llm_router.learn_fix({"messages": []}, ["stream_options is not supported"], ()) == ""


def test_a_refused_field_is_left_out_at_once_and_from_then_on(router, make_upstream):
    """Traps 71, 108: one further call, remembered for the model, visible in the log, and never for a pass-through."""
    upstream = make_upstream()
    upstream.answer(fake.error_answer("openai", 400, "stream_options is not supported here", "invalid_request_error"))
    upstream.answer(fake.model_answer("openai", True, "one"), fake.model_answer("openai", True, "two"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    body = {"model": "a/m", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    for word in ("one", "two"):
        reply = running.post("/v1/messages", body, stream=True)
        assert reply.status == 200 and word in reply.text
    assert ["stream_options" in call.json for call in upstream.calls] == [True, False, False]
    assert "no stream_options" in running.wait_log("learned")
    upstream.answer(fake.error_answer("openai", 400, "stream_options is not supported here", "invalid_request_error"))
    chat = dict(body, stream_options={"include_usage": True})
    assert running.post("/v1/chat/completions", chat, stream=True).status == 400
    assert "stream_options" in upstream.calls[-1].json and len(upstream.calls) == 4


def history(signature):
    thinking = {"type": "thinking", "thinking": "hm", "signature": signature}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "b"}]},
    ]
    return {"model": "a/m", "max_tokens": 9, "messages": turns + [{"role": "user", "content": "c"}]}


@pytest.mark.parametrize("compat, signature, kept", [("anthropic", "", 1), ("anthropic", "sig", 2), ("", "", 2)])
def test_unsigned_thinking_is_kept_from_an_upstream_that_demands_signatures_and_from_no_other(
    compat, signature, kept, router, make_upstream
):
    """Trap 85."""
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"], compat=compat)))
    assert running.post("/v1/messages", history(signature)).status == 200
    assert len(upstream.calls[-1].json["messages"][1]["content"]) == kept


def test_a_conversation_that_a_provider_keeps_never_moves_to_another(router, make_upstream):
    """Trap 63."""
    home, other = make_upstream(), make_upstream(fake.final_text("lost"))
    home.answer(*[fake.error_answer("responses", 500)] * 3)
    origin = {"id": "m", "fallbackModels": ["b/m"]}
    running = router(
        config_of(provider(home, "responses", "a", [origin]), provider(other, "responses", "b", ["m"])),
        "--origin-retry-base-delay-ms=5",
    )
    body = {"model": "a/m", "input": "go on", "previous_response_id": "resp_1"}
    assert running.post("/v1/responses", body).status == 500
    assert len(home.calls) == 3 and other.calls == []
    home.answer(fake.error_answer("responses", 402))
    assert running.post("/v1/responses", {"model": "a/m", "input": "new"}).status == 200


# ---- what rows know


@pytest.mark.parametrize("model, left", [("gpt-5", []), ("o3-mini", []), ("gpt-4.1", ["temperature"]), ("gpt-5-chat-latest", ["temperature"])])
def test_models_that_reason_get_no_temperature_from_openai_s_row(model, left):
    """Trap 72."""
    body = llm_router.apply_fixes({"model": model, "temperature": 0.5}, llm_router.find_compat("openai", "").fixes)
    assert list(body)[1:] == left
    quiet = {"model": "gpt-5.2", "temperature": 0.5, "reasoning_effort": "none"}
    assert llm_router.apply_fixes(dict(quiet), ("no sampling",)) == quiet


@pytest.mark.parametrize("model, is_on", [("kimi-k2.6", False), ("kimi-k2.7-code", True), ("moonshotai/kimi-k3", True)])
def test_kimi_s_sampling_is_fixed_and_some_of_its_models_always_think(model, is_on):
    """Its 400s: "invalid temperature: only 1 is allowed", "invalid thinking: only type=enabled is allowed", and
    "reasoning_content is missing in assistant tool call message", which a dot satisfies."""
    calls = [{"role": "assistant", "tool_calls": [{"id": "a"}]}, {"role": "tool", "tool_call_id": "a", "content": "r"}]
    body = {"model": model, "temperature": 0.2, "top_p": 0.9, "messages": calls}
    sent = llm_router.apply_fixes(body, llm_router.find_compat("moonshot", "").fixes)
    assert "temperature" not in sent and "top_p" not in sent
    assert (sent["messages"][0].get("reasoning_content"), "thinking" in sent) == (("." if is_on else None), not is_on)
    assert llm_router.apply_fixes({"model": "moonshot-v1-8k", "temperature": 1}, ("no sampling",))["temperature"] == 1


def test_ollama_is_told_not_to_think_unless_the_client_asked_for_it():
    """Trap 112."""
    row = llm_router.find_compat("", "127.0.0.1", 11434)
    assert row.name == "ollama"
    assert llm_router.apply_fixes({"messages": []}, row.fixes)["reasoning_effort"] == "none"
    assert llm_router.apply_fixes({"reasoning_effort": "low"}, row.fixes)["reasoning_effort"] == "low"


SCHEMAS = [
    ({"type": "string", "pattern": "^\\p{L}+$"}, {"type": "string"}),
    ({"type": "string", "pattern": "^(?!x)"}, {"type": "string"}),
    ({"type": "string", "pattern": "^(?:a)$"}, {"type": "string", "pattern": "^(?:a)$"}),
    ({"type": "string", "format": "uri"}, {"type": "string"}),
    ({"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
    ({"$schema": "x", "const": 1}, {"enum": [1]}),
    ({"properties": {"const": {"const": 2}, "pattern": {}}}, {"properties": {"const": {"enum": [2]}, "pattern": {}}}),
    ({"const": {"a": 1}}, {"enum": [{"a": 1}]}),
    ({"items": {"anyOf": [{"$id": "a", "type": "null"}, False]}}, {"items": {"anyOf": [{"type": "null"}, {"not": {}}]}}),
    ({"properties": {"no": False, "any": True, "const": True}}, {"properties": {"no": {"not": {}}, "any": {}, "const": {}}}),
    ({"$defs": {"items": True}, "items": {"properties": {"properties": True}}},
     {"$defs": {"items": {}}, "items": {"properties": {"properties": {}}}}),
    ({"additionalProperties": False, "readOnly": True, "default": True, "enum": [True]},
     {"additionalProperties": False, "readOnly": True, "default": True, "enum": [True]}),
    ({"default": {"format": "uri", "type": "array"}, "examples": [{"$id": 1, "items": True}], "enum": [{"const": 1}]},
     {"default": {"format": "uri", "type": "array"}, "examples": [{"$id": 1, "items": True}], "enum": [{"const": 1}]}),
    ({"const": {"type": "array", "uniqueItems": True}}, {"enum": [{"type": "array", "uniqueItems": True}]}),
    ({"properties": {"default": {"format": "uri"}, "enum": {"const": 1}}}, {"properties": {"default": {}, "enum": {"enum": [1]}}}),
    ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
    ({"type": "integer", "exclusiveMinimum": 0, "multipleOf": 2, "maximum": 9}, {"type": "integer", "maximum": 9}),
    ({"type": "array"}, {"type": "array", "items": {"type": "string"}}),
    ({"items": {"type": ["array", "null"], "items": {}}}, {"items": {"type": ["array", "null"], "items": {}}}),
    ({"properties": {"type": {"type": "array", "items": {"type": "integer"}}}},
     {"properties": {"type": {"type": "array", "items": {"type": "integer"}}}}),
    ({"type": "object", "propertyNames": {"type": "string"}, "properties": {"multipleOf": {}}},
     {"type": "object", "properties": {"multipleOf": {}}}),
]


@pytest.mark.parametrize("schema, plain", SCHEMAS)
def test_a_schema_loses_what_strict_upstreams_refuse_and_nothing_else(schema, plain):
    """Traps 91, 92, 93."""
    before = json.dumps(schema)
    assert llm_router.plain_schema(schema) == plain
    assert json.dumps(schema) == before


def test_descriptions_are_cut_for_who_takes_no_longer_ones():
    words = ["Invalid 'tools[5].function.description': string too long. Expected a string with maximum length 1024."]
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 3000}}, {"name": "g", "description": "y"}]
    body = {"model": "m", "tools": [*tools, {"name": "h"}]}
    fix = llm_router.learn_fix(body, words, ())
    sent = llm_router.apply_fixes(body, [fix])["tools"]
    assert sent[0]["function"]["description"] == "x" * 1024 and sent[1:] == [tools[1], {"name": "h"}]


def test_strict_upstreams_get_plain_schemas_and_others_after_their_400():
    """Trap 91: the pattern goes, not the tool."""
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0][0]}}
    body = llm_router.apply_fixes({"tools": [tool]}, llm_router.find_compat("gemini", "").fixes)
    assert body["tools"][0]["function"] == {"name": "f", "parameters": {"type": "string"}}
    for words in (
        "Invalid schema for function 'f': '^\\p{L}+$' is not a valid regex",
        "Invalid schema for function 'f': In context=('properties', 'texts'), array schema missing items.",
        "* GenerateContentRequest.tools[0].function_declarations[16].parameters.properties[a].items: missing field.",
    ):
        assert llm_router.learn_fix({"tools": [tool]}, [words], ()) == "plain schemas"


# ---- reasoning goes back to who issued it, and to nobody else

CALL = ("look", {"a": 1})
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "responses": "/v1/responses"}


def tool_turns(wire, call_id="call_1"):
    """The second request of a tool turn as clients send it that keep no reasoning."""
    tool = {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}
    if wire == "anthropic":
        call = {"type": "tool_use", "id": call_id, "name": "look", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": call_id, "content": "r"}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        return {"max_tokens": 4000, "messages": turns, "tools": [{"name": "look", "input_schema": tool["parameters"]}]}
    if wire == "responses":
        call = {"type": "function_call", "call_id": call_id, "name": "look", "arguments": '{"a":1}'}
        result = {"type": "function_call_output", "call_id": call_id, "output": "r"}
        return {"input": [{"role": "user", "content": "q"}, call, result], "tools": [dict(tool, type="function")], "store": False}
    call = {"id": call_id, "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": turns + [{"role": "tool", "tool_call_id": call_id, "content": "r"}], "tools": [{"type": "function", "function": tool}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "responses"])
def test_an_upstream_that_wants_its_reasoning_back_gets_it_although_the_client_keeps_none(
    wire, stream, router, make_upstream
):
    """Trap 87, passed through and translated; another provider gets an empty one, with which it thinks on."""
    one, two = make_upstream(fake.final_text("ok")), make_upstream(fake.final_text("ok"))
    providers = [provider(up, "openai", id, ["m"], compat="deepseek") for up, id in ((one, "a"), (two, "b"))]
    running = router(config_of(*providers))
    one.answer(fake.model_answer("openai", stream, reasoning="hm, so", tool_calls=[CALL]))
    first = dict(tool_turns(wire), model="a/m", stream=stream)
    key = "input" if wire == "responses" else "messages"
    assert running.post(PATHS[wire], dict(first, **{key: first[key][:1]}), stream=stream).status == 200
    for ref, upstream, thought in (("a/m", one, "hm, so"), ("b/m", two, None if wire == "openai" else "")):
        assert running.post(PATHS[wire], dict(tool_turns(wire), model=ref)).status == 200
        turn = next(turn for turn in upstream.calls[-1].json["messages"] if turn.get("tool_calls"))
        assert turn.get("reasoning_content") == thought and "thinking" not in upstream.calls[-1].json
    other = json.loads(json.dumps(tool_turns(wire)).replace('"q"', '"another conversation"'))
    assert running.post(PATHS[wire], dict(other, model="a/m")).status == 200
    assert "hm, so" not in json.dumps(one.calls[-1].json)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", ["openai", "responses"])
def test_signed_thinking_goes_back_to_its_issuer_through_a_client_that_knows_no_signatures(
    wire, stream, router, make_upstream
):
    """Traps 54, 85, 86."""
    upstream, other = make_upstream(fake.final_text("ok")), make_upstream(fake.final_text("ok"))
    rows = provider(upstream, "anthropic", "a", ["m"]), provider(other, "anthropic", "b", ["m"])
    running = router(config_of(*rows))
    upstream.answer(fake.model_answer("anthropic", stream, reasoning="hm", tool_calls=[CALL]))
    first = dict(tool_turns(wire), model="a/m", stream=stream)
    key = "input" if wire == "responses" else "messages"
    assert running.post(PATHS[wire], dict(first, **{key: first[key][:1]}), stream=stream).status == 200
    for ref, seen, kinds in (("a/m", upstream, ["thinking", "tool_use"]), ("b/m", other, ["tool_use"])):
        assert running.post(PATHS[wire], dict(tool_turns(wire, "toolu_1"), model=ref)).status == 200
        turn = seen.calls[-1].json["messages"][1]["content"]
        assert [part["type"] for part in turn] == kinds
        assert all(part.get("signature") for part in turn if part["type"] == "thinking")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_keep_the_ids_of_who_made_them_and_reach_anthropic_with_legal_ones(stream, router, make_upstream):
    """Kimi wants its functions.NAME:0 back, and its reasoning is remembered under it; Anthropic answers such an id with
    a 400: "String should match pattern '^[a-zA-Z0-9_-]+$'", whoever wrote the request."""
    kimi, claude = make_upstream(fake.final_text("ok")), make_upstream(fake.final_text("ok"))
    rows = [provider(kimi, "openai", "a", ["m"], compat="moonshot")]
    running = router(config_of(*rows, provider(claude, "anthropic", "b", ["m"], compat="anthropic")))
    answer = (fake.chat_stream if stream else fake.chat_whole)(reasoning="hm, so", tool_calls=[CALL])
    odd = json.loads(json.dumps(answer, default=bytes.decode).replace("call_1", "functions.look:0"))
    kimi.answer(fake.sse_answer([event.encode() for event in odd]) if stream else fake.json_answer(200, odd))
    again = tool_turns("anthropic", "functions.look:0")
    first = dict(again, model="a/m", stream=stream, messages=again["messages"][:1])
    reply = running.post("/v1/messages", first, stream=stream)
    assert reply.status == 200 and "functions.look:0" in reply.text
    for ref in ("a/m", "b/m"):
        assert running.post("/v1/messages", dict(again, model=ref)).status == 200
    sent = kimi.calls[-1].json
    assert [call["id"] for turn in sent["messages"] for call in turn.get("tool_calls", ())] == ["functions.look:0"]
    assert "hm, so" in json.dumps(sent) and "thinking" not in sent
    call, result = (turn["content"][0] for turn in claude.calls[-1].json["messages"][1:])
    assert call["id"] == result["tool_use_id"] == "functions_look_0"


def signed_answer(stream):
    """A call with its signature as Gemini's OpenAI endpoint tells it."""
    answer = fake.chat_whole(tool_calls=[CALL])
    choice = answer["choices"][0]
    choice["message"]["tool_calls"][0]["extra_content"] = {"google": {"thought_signature": "sealed"}}
    if not stream:
        return fake.json_answer(200, answer)
    choice["delta"] = choice.pop("message")
    return fake.sse_answer([fake.sse(dict(answer, object="chat.completion.chunk")), fake.sse("[DONE]")])


@pytest.mark.parametrize("late", [False, True], ids=["signed at once", "signed behind the text"])
@pytest.mark.parametrize("wire", ["anthropic", "responses"])
def test_reasoning_that_openrouter_told_in_pieces_goes_back_whole(wire, late, router, make_upstream):
    """Anthropic, behind it, refuses pieces: the signature is of all of the text (agno-agi/agno#8794)."""
    kind, sealed = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}, {"type": "reasoning.encrypted"}
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    deltas = [
        {"role": "assistant", "reasoning": "Let", "reasoning_details": [dict(kind, text="Let")]},
        {"reasoning": " me.", "reasoning_details": [dict(kind, text=" me.")]},
        {"reasoning_details": [dict(kind, signature="sig")]},
        {"content": "I look."},
        {"tool_calls": [call], "reasoning_details": [dict(sealed, data="x", index=0), dict(sealed, data="y", index=0)]},
    ]
    deltas[2:4] = deltas[3:1:-1] if late else deltas[2:4]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    upstream.answer(fake.sse_answer([*map(fake.sse, chunks), fake.sse("[DONE]")]))
    again = dict(tool_turns(wire), model="a/m")
    key = "input" if wire == "responses" else "messages"
    first = dict(again, stream=True, **{key: again[key][:1]})
    assert running.post(PATHS[wire], first, stream=True).status == 200
    assert running.post(PATHS[wire], again).status == 200
    turn = next(turn for turn in upstream.calls[-1].json["messages"] if turn.get("tool_calls"))
    whole = dict(kind, text="Let me.", signature="sig")
    assert turn["reasoning_details"] == [whole, *deltas[-1]["reasoning_details"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", ["openai", "anthropic", "responses"])
def test_the_signature_of_a_call_goes_back_to_its_issuer_although_the_client_keeps_none(wire, stream, router, make_upstream):
    """Trap 85: Gemini 3 refuses turns whose call lacks its thought_signature (theopenco/llmgateway#1267)."""
    upstream, other = make_upstream(fake.final_text("ok")), make_upstream(fake.final_text("ok"))
    rows = [provider(up, "openai", id, ["m"], compat="gemini") for up, id in ((upstream, "a"), (other, "b"))]
    running = router(config_of(*rows))
    upstream.answer(signed_answer(stream))
    first = dict(tool_turns(wire), model="a/m", stream=stream)
    key = "input" if wire == "responses" else "messages"
    assert running.post(PATHS[wire], dict(first, **{key: first[key][:1]}), stream=stream).status == 200
    for ref, seen, kept in (("a/m", upstream, {"google": {"thought_signature": "sealed"}}), ("b/m", other, None)):
        assert running.post(PATHS[wire], dict(tool_turns(wire), model=ref)).status == 200
        turn = next(turn for turn in seen.calls[-1].json["messages"] if turn.get("tool_calls"))
        assert turn["tool_calls"][0].get("extra_content") == kept
        assert turn["tool_calls"][0]["function"]["name"] == "look" and "reasoning_content" not in turn


@pytest.mark.parametrize("wire", ["openai", "anthropic"])
def test_calls_of_another_provider_are_marked_as_foreign_where_an_upstream_demands_a_signature(wire, router, make_upstream):
    """Google names the word for histories that other models made (Gemini API, Thought signatures)."""
    upstream = make_upstream(fake.final_text("ok"))
    words = "Function call is missing a thought_signature in functionCall parts. This is required for tools to work."
    upstream.answer(fake.json_answer(400, [{"error": {"code": 400, "message": words, "status": "INVALID_ARGUMENT"}}]))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    assert running.post(PATHS[wire], dict(tool_turns(wire), model="a/m")).status == 200
    calls = [turn["tool_calls"][0] for turn in upstream.calls[-1].json["messages"] if turn.get("tool_calls")]
    assert calls[0]["extra_content"] == {"google": {"thought_signature": "skip_thought_signature_validator"}}
    assert len(upstream.calls) == 2


def mistral_validates(call):
    """The order of roles and the ids that mistral-common lets through; its words for others."""
    turns, before = json.loads(call.body)["messages"], ""
    for turn in turns:
        ids = [one["id"] for one in turn.get("tool_calls", [])] + [turn[key] for key in ("tool_call_id",) if key in turn]
        if not all(len(one) == 9 and one.isalnum() for one in ids):
            return error_of("Tool call id was %s but must be a-z, A-Z, 0-9, with a length of 9." % ids[0], "3280")
        if before == "tool" and turn["role"] == "user":
            return error_of("Unexpected role 'user' after role 'tool'", "3230")
        before = turn["role"]
    if before == "assistant" and not turns[-1].get("prefix"):
        return error_of("Expected last role User or Tool (or Assistant with prefix True) but got assistant", "3230")
    return fake.json_answer(200, fake.chat_whole("ok"))


def error_of(words, code):
    return fake.json_answer(400, {"object": "error", "message": words, "type": "invalid_request_error", "code": code})


@pytest.mark.parametrize(
    "wire, compat, calls",
    [("openai", "mistral", 2), ("anthropic", "mistral", 2), ("responses", "mistral", 2), ("anthropic", "", 3), ("responses", "", 3)],
)
def test_mistral_gets_the_turns_and_ids_that_it_validates(wire, compat, calls, router, make_upstream):
    """Words of the user behind a tool's result, as Claude Code's reminders, and ids that other providers gave; elsewhere
    it is learned."""
    upstream = make_upstream(mistral_validates)
    running = router(config_of(provider(upstream, "openai", "a", ["m"], **({"compat": compat} if compat else {}))))
    body = tool_turns(wire, "toolu_01A")
    body["input" if wire == "responses" else "messages"].append({"role": "user", "content": "and now?"})
    assert running.post(PATHS[wire], dict(body, model="a/m")).status == 200
    turns = upstream.calls[-1].json["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant", "user"]
    assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] and turns[4]["content"] == "and now?"
    assert running.post(PATHS[wire], dict(body, model="a/m")).status == 200
    assert len(upstream.calls) == calls


def test_what_mistral_takes_stays_as_it_is_and_a_last_turn_of_the_model_is_a_prefix():
    call = {"id": "abcDEF012", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "abcDEF012", "content": "r"})
    assert llm_router.strict_turns({"messages": turns}) is None
    last = {"role": "assistant", "content": "so"}
    assert llm_router.strict_turns({"messages": [*turns, last]})["messages"][-1] == dict(last, prefix=True)


@pytest.mark.parametrize(
    "words",
    [
        "The `reasoning_content` in the thinking mode must be passed back to the API.",
        "Missing `reasoning_content` field in the assistant message at message index 3. For more information, refer to x",
    ],
)
def test_a_conversation_without_its_reasoning_goes_to_deepseek_with_empty_ones_in_every_answer(
    words, router, make_upstream
):
    """Passed through, after its 400; an answer without calls needs it, too, in the turn that goes on."""

    def wants_reasoning(call):
        answers = [turn for turn in call.json["messages"] if turn["role"] == "assistant"]
        if all(isinstance(turn.get("reasoning_content"), str) for turn in answers):
            return fake.json_answer(200, fake.chat_whole("fine"))
        return fake.error_answer("openai", 400, words, "invalid_request_error")

    upstream = make_upstream(wants_reasoning)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    body = dict(tool_turns("openai"), model="a/m")
    said = [{"role": "assistant", "content": "hm"}, {"role": "assistant", "content": "so", "reasoning_content": "kept"}]
    body["messages"][1:1] = said
    assert running.post("/v1/chat/completions", body).status == 200
    answers = [turn for turn in upstream.calls[-1].json["messages"] if turn["role"] == "assistant"]
    assert [turn["reasoning_content"] for turn in answers] == ["", "kept", ""] and len(upstream.calls) == 2


def test_a_conversation_without_its_reasoning_goes_to_kimi_with_a_dot_wherever_it_is_served(router, make_upstream):
    """Its words come through OpenCode Zen and OpenRouter, wrapped."""

    def wants_reasoning(call):
        calls = [turn for turn in call.json["messages"] if turn.get("tool_calls")]
        if all(turn.get("reasoning_content") for turn in calls):
            return fake.json_answer(200, fake.chat_whole("fine"))
        words = "thinking is enabled but reasoning_content is missing in assistant tool call message at index 1"
        raw = json.dumps({"error": {"message": words, "type": "invalid_request_error"}})
        return fake.json_answer(400, {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": raw}}})

    upstream = make_upstream(wants_reasoning)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    for wire in ("openai", "anthropic"):
        assert running.post(PATHS[wire], dict(tool_turns(wire), model="a/m")).status == 200


def test_proofs_of_calls_that_gemini_no_longer_takes_are_left_out_in_one_more_try(router, make_upstream):
    def wants_none_but_its_own(call):
        if "stale" not in call.body.decode():
            return fake.json_answer(200, fake.chat_whole("fine"))
        words = {"error": {"code": 400, "message": "Corrupted thought signature.", "status": "INVALID_ARGUMENT"}}
        raw = {"message": "Provider returned error", "code": 400, "metadata": {"raw": json.dumps(words)}}
        return fake.json_answer(400, {"error": raw})

    upstream = make_upstream(wants_none_but_its_own)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    body = dict(tool_turns("openai"), model="a/m")
    turn = next(turn for turn in body["messages"] if turn.get("tool_calls"))
    turn["reasoning_details"] = [{"type": "reasoning.encrypted", "data": "stale"}]
    turn["tool_calls"][0]["extra_content"] = {"google": {"thought_signature": "stale"}}
    assert running.post(PATHS["openai"], body).status == 200
    sent = next(turn for turn in upstream.calls[-1].json["messages"] if turn.get("tool_calls"))
    assert sent["tool_calls"][0]["extra_content"]["google"]["thought_signature"] == "skip_thought_signature_validator"
    assert llm_router.sign_calls_anew({"messages": [{"role": "user", "content": "q"}]}) is None


def test_a_turn_that_bears_a_signature_is_not_marked():
    """Parallel calls have one, on the first."""
    signed = {"id": "a", "extra_content": {"google": {"thought_signature": "s"}}}
    body = {"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [signed, {"id": "b"}]}]}
    assert llm_router.sign_calls(body) is None


@pytest.mark.parametrize("compat, told", [("deepseek", True), ("zai", True), ("moonshot", True), ("openai", False), ("", False)])
def test_thinking_that_a_client_switched_off_is_off_where_a_model_thinks_unasked(compat, told, router, make_upstream):
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"], **({"compat": compat} if compat else {}))))
    turns = [{"role": "user", "content": "q"}]
    asks = [
        ("/v1/messages", {"model": "a/m", "max_tokens": 9, "messages": turns, "thinking": {"type": "disabled"}}),
        ("/v1/responses", {"model": "a/m", "input": turns, "reasoning": {"effort": "none"}}),
        ("/v1/messages", {"model": "a/m", "max_tokens": 9, "messages": turns}),
    ]
    assert [running.post(path, body).status for path, body in asks] == [200] * 3
    thinking = [call.json.get("thinking") for call in upstream.calls]
    assert thinking == ([{"type": "disabled"}] * 2 if told else [None] * 2) + [None]
    assert [call.json.get("reasoning_effort") for call in upstream.calls] == [None, None if told else "none", None]


def test_encrypted_reasoning_goes_back_to_its_issuer_and_to_no_other(router, make_upstream):
    """Traps 64, 65."""
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"}
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": "{}", "status": "completed"}
    upstream, other = make_upstream(fake.final_text("ok")), make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "responses", "a", ["m"]), provider(other, "responses", "b", ["m"])))
    upstream.answer(fake.json_answer(200, dict(fake.responses_whole("x"), output=[sealed, call])))
    first = dict(tool_turns("anthropic"), model="a/m")
    assert running.post("/v1/messages", dict(first, messages=first["messages"][:1])).status == 200
    for ref, seen, held in (("a/m", upstream, ["sealed"]), ("b/m", other, [])):
        assert running.post("/v1/messages", dict(tool_turns("anthropic"), model=ref)).status == 200
        items = seen.calls[-1].json["input"]
        found = [item for item in items if item["type"] == "reasoning"]
        assert [item["encrypted_content"] for item in found] == held and not any("id" in item for item in found)


def test_the_memory_is_bounded_and_forgets_the_oldest():
    memory = llm_router.BoundedMap(2000)
    for number in range(20):
        memory.put(number, "x", 300)
        memory.put(number, "x%d" % number, 300)
    assert [memory.get(number) for number in range(20)] == [None] * 14 + ["x%d" % number for number in range(14, 20)]


@pytest.mark.parametrize("odd", [[], {}, {"a": 1}, 7, None])
def test_a_call_whose_id_is_no_text_is_passed_through_for_its_upstream_to_refuse(odd):
    body = {"messages": [{"role": "assistant", "tool_calls": [{"id": odd, "function": {"name": "f"}}]}]}
    assert llm_router.replay_reasoning(body, "issuer", llm_router.BoundedMap()) is None


OPENAI_SEAL = "The encrypted content gAAA could not be verified. Reason: Encrypted content could not be decrypted or parsed."
SEALED = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
SIGNED = {"type": "thinking", "thinking": "hm", "signature": "foreign"}
OPENAI_LOST = "Item with id 'rs_1' not found. Items are not persisted when `store` is set to false."  # vercel/ai#7543
PLAIN = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "foreign"}]}
# Claude Code's own sessions get stuck on it (anthropics/claude-code#63203 and dozens more).
CLAUDE_CHANGED = "`thinking` or `redacted_thinking` blocks in the latest assistant message cannot be modified. They must remain."
QUESTIONS = [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}]
FOREIGN = [
    ("responses", {"input": [QUESTIONS[0], SEALED, QUESTIONS[1]]}, 400, OPENAI_SEAL),
    ("responses", {"input": [QUESTIONS[0], PLAIN, QUESTIONS[1]]}, 404, OPENAI_LOST),
    ("anthropic", history("foreign"), 400, "messages.1.content.0: Invalid `signature` in `thinking` block"),
    ("anthropic", history("foreign"), 400, CLAUDE_CHANGED),
]


@pytest.mark.parametrize("wire, body, status, message", FOREIGN)
def test_reasoning_that_an_upstream_did_not_issue_is_left_out_after_its_refusal_once(
    wire, body, status, message, router, make_upstream
):
    """Traps 64, 85. What cannot be mended is the request's fault: its model is not cooled, and nobody else is asked."""
    upstream, other = make_upstream(fake.final_text("ok")), make_upstream()
    models = [{"id": "m", "fallbackModels": ["b/m"]}]
    running = router(config_of(provider(upstream, wire, "a", models), provider(other, wire, "b", ["m"])))
    refusal = fake.error_answer(wire, status, message, "invalid_request_error")
    upstream.answer(refusal)
    assert running.post(PATHS[wire], dict(body, model="a/m")).status == 200
    sent = [json.dumps(call.json) for call in upstream.calls]
    assert ["gAAA" in text or "foreign" in text for text in sent] == [True, False]
    running.wait_log("again, its history without the proofs of others")
    upstream.answer(refusal, refusal)
    assert running.post(PATHS[wire], dict(body, model="a/m")).status == status
    assert (len(upstream.calls), len(other.calls)) == (4, 0)


@pytest.mark.parametrize("refers", [False, True])
def test_reasoning_that_the_router_showed_of_another_format_reaches_no_provider_of_responses(refers, router, make_upstream):
    """OpenAI looks it up by its id and answers 404, with every turn that follows a fallback (Codex, the Agents SDK)."""
    claude, gpt = make_upstream(fake.final_text("ok", reasoning="hm")), make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(claude, "anthropic", "a", ["m"]), provider(gpt, "responses", "b", ["m"])))
    output = running.post("/v1/responses", {"model": "a/m", "input": QUESTIONS[:1]}).json["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    turns = [{"type": "item_reference", "id": item["id"]} if refers else item for item in output]
    assert running.post("/v1/responses", {"model": "b/m", "input": [QUESTIONS[0], *turns, QUESTIONS[1]]}).status == 200
    assert gpt.calls[0].json["input"] == [QUESTIONS[0], output[1], QUESTIONS[1]]


THOUGHT_REFUSED = "messages.1.assistant.reasoning_content: property 'messages.1.assistant.reasoning_content' is unsupported"


@pytest.mark.parametrize("compat", ["cerebras", "", "deepseek"])
def test_what_another_model_thought_is_not_passed_on_to_an_upstream_that_refuses_it(compat, router, make_upstream):
    """Agents send it with every turn (CherryHQ/cherry-studio#16790). Where no row says it, the client's own words go as
    they came, and the 400 comes back unchanged after one call."""
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    body = {"model": "a/m", "messages": [QUESTIONS[0], thought, QUESTIONS[1]]}
    refusal = fake.error_answer("openai", 400, THOUGHT_REFUSED, "invalid_request_error")

    def handler(call):
        refuses = compat != "deepseek" and "reasoning_content" in json.dumps(call.json)
        return refusal if refuses else fake.final_text("ok")(call)

    upstream = make_upstream(handler)
    running = router(config_of(provider(upstream, "openai", "a", ["m"], **({"compat": compat} if compat else {}))))
    replies = [running.post("/v1/chat/completions", body) for _ in range(2)]
    assert [reply.status for reply in replies] == ([200, 200] if compat else [400, 400])
    sent = ["reasoning_content" in json.dumps(call.json) for call in upstream.calls]
    assert sent == [compat != "cerebras"] * 2
    assert upstream.calls[-1].json["messages"][2] == QUESTIONS[1]


def test_a_client_s_own_fault_whose_error_repeats_its_words_teaches_nothing(router, make_upstream):
    """vLLM shows the part of the request that it cannot read: every later request lost what its model had thought."""
    thought = {"role": "assistant", "content": "a", "reasoning_content": "it cannot be"}
    body = {"model": "a/m", "messages": [QUESTIONS[0], thought, QUESTIONS[1]]}
    odd = {**body, "messages": [*body["messages"], {**thought, "role": "nobody"}]}

    def handler(call):
        wrong = [turn for turn in call.json["messages"] if turn["role"] == "nobody"]
        words = "[{'type': 'literal_error', 'input': %r}]" % wrong
        return fake.error_answer("openai", 400, words, "BadRequestError") if wrong else fake.final_text("ok")(call)

    upstream = make_upstream(handler)
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    assert [running.post("/v1/chat/completions", one).status for one in (odd, body)] == [400, 200]
    assert upstream.calls[-1].json["messages"] == body["messages"]


def test_thinking_is_off_where_a_replayed_tool_turn_has_none():
    """Trap 86."""
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    body = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "context_management": {}, "messages": [{"role": "assistant", "content": [call]}]}
    assert llm_router.drop_thinking(body) == {"messages": body["messages"]}
    body["messages"][0]["content"].insert(0, SIGNED)
    assert llm_router.drop_thinking(body) is None


# ---- threads that a provider keeps


def test_a_thread_is_refused_in_the_words_that_make_the_sdks_go_on_without(router, make_upstream):
    chat = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(chat, "openai", "a", ["m"])))
    body = {"model": "a/m", "max_tokens": 9, "messages": [{"role": "user", "content": "q"}]}
    refused = running.post("/v1/messages", dict(body, thread={"type": "create"}))
    assert refused.status == 400
    assert refused.json["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    lost = running.post("/v1/messages", dict(body, thread={"type": "continue", "previous_message_id": "msg_1"}))
    assert (lost.status, lost.json["error"]["details"]) == (400, {"error_code": "thread_not_found"})
    assert chat.calls == []


# ---- further traps


def test_claude_code_is_told_about_how_long_its_request_is_where_nobody_counts_it(router, make_upstream):
    """Trap 43: it would never compact a conversation of 0 tokens. What is counted goes before, and an image has no length."""
    upstream = make_upstream()
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    uncounted = {key: value for key, value in fake.chat_whole("hi").items() if key != "usage"}
    stream = [piece for piece in fake.chat_stream("hi") if b"prompt_tokens" not in piece]

    def told(content, answer, is_streamed):
        upstream.answer(answer)
        body = {"model": "a/m", "max_tokens": 9, "stream": is_streamed, "messages": [{"role": "user", "content": content}]}
        reply = running.post("/v1/messages", body)
        if not is_streamed:
            return [reply.json["usage"]["input_tokens"]]
        usages = (data.get("message", data).get("usage") for data in reply.datas)
        return [usage["input_tokens"] for usage in usages if usage]

    words = "word " * 4000
    (whole,) = told(words, fake.json_answer(200, uncounted), False)
    first, last = told(words, fake.sse_answer(stream), True)
    assert all(4000 < count < 6000 for count in (whole, first, last))
    assert told(words, fake.sse_answer(fake.chat_stream("hi")), True)[-1] == 11
    source = {"type": "base64", "media_type": "image/png", "data": "A" * 40_000}
    assert told([{"type": "image", "source": source}], fake.sse_answer(stream), True) == [0, 0]


def test_a_call_written_as_text_stays_text():
    """Trap 49."""
    text = '<|tool_calls_section_begin|>functions.look:0{"a":1}<|tool_calls_section_end|>'
    body = fake.chat_whole(text)
    context = llm_router.Context(llm_router.ChatRequest("m", []), "r", 1)
    answer = llm_router.translate_response(body, "openai", "anthropic", context)
    assert answer["content"] == [{"type": "text", "text": text}] and answer["stop_reason"] == "end_turn"


def test_a_count_of_tokens_is_asked_with_the_client_s_own_thinking(router, make_upstream):
    """Trap 119."""
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"])))
    body = dict(history("sig"), thinking={"type": "enabled", "budget_tokens": 2000})
    assert running.post("/v1/messages/count_tokens", body).status == 200
    assert upstream.calls[-1].json == dict(body, model="m")


def test_usage_is_asked_of_every_translated_stream(router, make_upstream):
    """Trap 120."""
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"])))
    reply = running.post("/v1/messages", dict(history("sig"), stream=True), stream=True)
    assert upstream.calls[-1].json["stream_options"] == {"include_usage": True}
    assert '"input_tokens":11' in reply.text


def marked(**mark):
    part = {"type": "text", "text": "long", "cache_control": dict({"type": "ephemeral"}, **mark)}
    tool = {"name": "f", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    return {"model": "a/m", "max_tokens": 9, "system": [part], "tools": [tool], "messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("compat, kept", [("openrouter", True), ("qwen", True), ("openai", False), ("", False)])
def test_cache_control_goes_where_it_is_known_and_nowhere_else(compat, kept, router, make_upstream):
    """Traps 67, 68, 70."""
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "openai", "a", ["m"], compat=compat)))
    assert running.post("/v1/messages", marked()).status == 200
    body = upstream.calls[-1].json
    found = [body["messages"][0]["content"][0], body["messages"][1]["content"][0], body["tools"][0]] if kept else [body]
    assert [json.dumps(place).count('"cache_control"') for place in found] == ([1, 1, 1] if kept else [0])
    assert not any(key.startswith("prompt_cache") for key in body)


@pytest.mark.parametrize("compat, betas", [("bedrock", "context-1m-2025-08-07"), ("anthropic", "context-1m-2025-08-07,odd-2026-01-01")])
def test_betas_and_cache_scopes_that_a_cloud_refuses_stay_here(compat, betas, router, make_upstream):
    """Traps 69, 109, 110."""
    upstream = make_upstream(fake.final_text("ok"))
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"], compat=compat)))
    headers = {"anthropic-beta": "context-1m-2025-08-07,odd-2026-01-01"}
    assert running.post("/v1/messages", marked(scope="global", ttl="1h"), headers).status == 200
    assert upstream.calls[-1].header("anthropic-beta") == betas
    expected = {"type": "ephemeral", "scope": "global", "ttl": "1h"}
    if compat == "bedrock":
        del expected["scope"]
    assert upstream.calls[-1].json["messages"][0]["content"][0]["cache_control"] == expected
    assert upstream.calls[-1].json["system"][0]["cache_control"] == expected


ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.128; cc_entrypoint=cli; cch=78ef3;"


@pytest.mark.parametrize("system", [ATTRIBUTION + "\nbe brief", [{"type": "text", "text": t} for t in (ATTRIBUTION, "be brief")]])
@pytest.mark.parametrize("target, sent", [
    ("openai", {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]}),
    ("responses", {"instructions": "be brief"}),
])  # fmt: skip
def test_what_claude_code_says_of_itself_first_spoils_nobody_s_cache(system, target, sent):
    """Its `cch` is another one in every request, and the first words that differ end what a cache can know."""
    body = {"model": "m", "max_tokens": 9, "system": system, "messages": [{"role": "user", "content": "q"}]}
    body = llm_router.translate_request(body, "anthropic", target)[1]
    assert {key: body[key] for key in sent} == sent and "billing" not in json.dumps(body)
    alone = {"model": "m", "max_tokens": 9, "system": ATTRIBUTION, "messages": [{"role": "user", "content": "q"}]}
    assert llm_router.WIRE_FORMATS["anthropic"].parse_request(alone).system == []


@pytest.mark.parametrize("compat, calls", [("bedrock", 1), ("", 2), ("anthropic", 1)], ids=["its row", "after its 400", "kept"])
def test_what_claude_code_says_of_itself_is_not_told_to_a_cloud_that_reserves_the_word(compat, calls, router, make_upstream):
    def reserves(call):
        if compat != "anthropic" and "x-anthropic-billing-header" in json.dumps(call.json):
            words = "x-anthropic-billing-header is a reserved keyword and may not be used in the system prompt."
            return fake.error_answer("anthropic", 400, words, "invalid_request_error")
        return fake.json_answer(200, fake.messages_whole("fine"))

    upstream = make_upstream(reserves)
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"], **({"compat": compat} if compat else {}))))
    said = [{"type": "text", "text": text} for text in (ATTRIBUTION, "be brief")]
    body = {"model": "a/m", "max_tokens": 9, "system": said, "messages": [{"role": "user", "content": "q"}]}
    assert running.post("/v1/messages", body).status == 200 and len(upstream.calls) == calls
    assert upstream.calls[-1].json["system"] == (said if compat == "anthropic" else said[1:])


def test_a_block_that_nobody_knows_in_a_system_message_is_left_out():
    parts = [{"type": "weird", "x": 1}, {"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "x"}]
    body = llm_router.translate_request({"model": "m", "max_tokens": 1, "messages": messages}, "anthropic", "openai")[1]
    assert body["messages"][0] == {"role": "system", "content": "hi"}


def test_a_schema_for_anthropic_is_closed_and_its_bounds_are_told_in_words():
    """anthropic.transform_schema: open objects and bounds are a 400 in structured outputs."""
    name = {"type": "string", "maxLength": 9, "description": "A name"}
    person = {"type": "object", "properties": {"type": name, "minimum": {"type": ["object", "null"]}}}
    schema = {"type": "array", "items": {"$ref": "#/$defs/P"}, "$defs": {"P": person}, "default": {"type": "object"}}
    closed = llm_router.closed_schema(schema)
    assert closed["$defs"]["P"]["additionalProperties"] is False and closed["default"] == {"type": "object"}
    properties = closed["$defs"]["P"]["properties"]
    assert properties["type"] == {"type": "string", "description": 'A name\n\n{"maxLength":9}'}
    assert properties["minimum"] == {"type": ["object", "null"], "additionalProperties": False}


@pytest.mark.parametrize("compat, calls", [("anthropic", 1), ("", 2)], ids=["its row", "learned"])
def test_structured_output_goes_to_anthropic_with_a_closed_schema(compat, calls, router, make_upstream):
    def closes(call):
        if call.json["output_config"]["format"]["schema"].get("additionalProperties") is not False:
            words = "output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false"
            return fake.error_answer("anthropic", 400, words, "invalid_request_error")
        return fake.json_answer(200, fake.messages_whole("{}"))

    upstream = make_upstream(closes)
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"], **({"compat": compat} if compat else {}))))
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
    body = {"model": "a/m", "messages": [{"role": "user", "content": "q"}], "response_format": form}
    assert running.post(PATHS["openai"], body).status == 200 and len(upstream.calls) == calls


def test_a_strict_tool_goes_to_anthropic_with_a_closed_schema_and_any_other_as_it_is():
    """OpenAI's strict mode knows bounds, which Anthropic's refuses for tools, too (earendil-works/pi#9953)."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}}
    functions = [{"name": name, "parameters": schema, "strict": name == "strict"} for name in ("strict", "open")]
    tools = [{"type": "function", "function": function} for function in functions]
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "tools": tools}
    body = llm_router.translate_request(body, "openai", "anthropic", "claude-sonnet-4-5")[1]
    strict, other = llm_router.apply_fixes(body, llm_router.find_compat("anthropic", "").fixes)["tools"]
    described = {"type": "integer", "description": '{"maximum":9}'}
    assert strict["input_schema"] == {"type": "object", "properties": {"n": described}, "additionalProperties": False}
    assert other["input_schema"] == schema


@pytest.mark.parametrize("compat, calls", [("deepseek", 1), ("", 2)], ids=["its row", "learned"])
def test_a_schema_is_told_in_words_where_only_json_mode_is_known(compat, calls, router, make_upstream):
    """Codex and Claude Code ask for titles so; DeepSeek: "This response_format type is unavailable now"."""

    def knows_json_mode(call):
        if call.json["response_format"]["type"] != "json_object":
            return fake.error_answer("openai", 400, "This response_format type is unavailable now", "invalid_request_error")
        return fake.json_answer(200, fake.chat_whole("{}"))

    upstream = make_upstream(knows_json_mode)
    running = router(config_of(provider(upstream, "openai", "a", ["m"], **({"compat": compat} if compat else {}))))
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"title": {"type": "string"}}}}
    body = {"model": "a/m", "input": "q", "instructions": "be brief", "text": {"format": form}}
    assert running.post(PATHS["responses"], body).status == 200 and len(upstream.calls) == calls
    turns = upstream.calls[-1].json["messages"]
    assert "JSON" in turns[0]["content"] and '"title"' in turns[0]["content"] and turns[1]["content"] == "be brief"


@pytest.mark.parametrize("system, before", [("be brief", ["be brief"]), (None, [])])
def test_a_schema_is_told_in_words_to_a_model_that_knows_no_output_config(system, before, router, make_upstream):
    """Trap 99: without the field alone the answer was prose."""

    def knows_no_schema(call):
        if "output_config" in call.json:
            words = "output_config: Extra inputs are not permitted"
            return fake.error_answer("anthropic", 400, words, "invalid_request_error")
        return fake.json_answer(200, fake.messages_whole("{}"))

    upstream = make_upstream(knows_no_schema)
    running = router(config_of(provider(upstream, "anthropic", "a", ["m"])))
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    turns = [{"role": "system", "content": system}] if system else []
    body = {"model": "a/m", "messages": [*turns, {"role": "user", "content": "q"}], "response_format": form}
    assert running.post(PATHS["openai"], body).status == 200 and len(upstream.calls) == 2
    told = [part["text"] for part in upstream.calls[-1].json["system"]]
    assert told[:-1] == before and "JSON" in told[-1] and '"title"' in told[-1]


def test_an_effort_that_a_model_does_not_know_is_no_longer_told_to_it():
    """Anthropic's words for one, which do not name the field."""
    words = ["This model does not support the effort parameter.", "invalid_request_error"]
    fix = llm_router.learn_fix({"output_config": {"effort": "low"}}, words, ())
    assert "output_config" not in llm_router.apply_fixes({"output_config": {"effort": "low"}}, [fix])


def test_an_invalid_schema_is_no_reason_to_tell_it_in_words():
    words = ["Invalid schema for response_format 'x': In context=(), 'required' is required to be supplied"]
    assert llm_router.learn_fix({"response_format": {}}, words, ()) == ""


LONG_IDS = ["fc_" + "a" * 50, "fc_" + "a" * 49 + "b", "call_1"]


def body_with_ids(target):
    """A turn of calls with the LONG_IDS and their results, as a request to `target`."""
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}} for one in LONG_IDS]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    turns += [{"role": "tool", "tool_call_id": one, "content": one} for one in LONG_IDS]
    request = llm_router.WIRE_FORMATS["openai"].parse_request({"model": "m", "messages": turns})
    return llm_router.render_request(request, target)


def ids_of(body, target):
    """The ids of its calls, and of its results."""
    blocks = [block for turn in llm_router.WIRE_FORMATS[target].parse_request(body).messages for block in turn.blocks]
    called = [block.id for block in blocks if isinstance(block, llm_router.ToolCall)]
    return called, [block.call_id for block in blocks if isinstance(block, llm_router.ToolResult)]


@pytest.mark.parametrize("target", ["openai", "responses"])
@pytest.mark.parametrize("compat", ["openai", "azure"])
def test_ids_of_calls_that_are_too_long_for_openai_are_shortened_with_their_results(target, compat):
    """In mid-conversation another provider's, as a Response's item id where it told no other (agno-agi/agno#5382)."""
    sent = llm_router.apply_fixes(body_with_ids(target), llm_router.find_compat(compat, "").fixes)
    called, answered = ids_of(sent, target)
    assert called == answered and len(set(called)) == 3
    assert [len(one) for one in called] == [40, 40, 6] and called[2] == "call_1"


@pytest.mark.parametrize("target", ["openai", "responses"])
def test_elsewhere_ids_of_calls_stay_whole_until_they_are_refused(target):
    """LiteLLM keeps the signatures of Gemini's thoughts in them."""
    sent = llm_router.apply_fixes(body_with_ids(target), llm_router.find_compat("", "litellm.example").fixes)
    assert ids_of(sent, target) == (LONG_IDS, LONG_IDS)
    words = ["Invalid 'messages[1].tool_calls[0].id': string too long. Expected a string with maximum length 40"]
    assert llm_router.learn_fix(sent, words, ()) == "short ids"
