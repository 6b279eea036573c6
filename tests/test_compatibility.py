"""COMPATIBILITY: rows for known upstreams, and what a 400 teaches about fields that the router itself added."""

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
    ("Extra inputs are not permitted: stream_options", "no stream_options"),
    ("Unrecognized request argument supplied: stream_options", "no stream_options"),
    ("temperature is not supported with this model", ""),
    ("messages: text content blocks must be non-empty", ""),
    ("tool parallel_tool_calls_helper is unknown", ""),
]


@pytest.mark.parametrize("message, fix", LESSONS)
def test_a_400_teaches_only_about_fields_the_router_put_there(message, fix):
    assert llm_router.learn_fix(translated(), [message], ()) == fix


def test_a_lesson_is_learned_once():
    words = ["stream_options is not supported"]
    assert llm_router.learn_fix(translated(), words, ("no stream_options",)) == ""


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
