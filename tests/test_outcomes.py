"""Section OUTCOMES: what the status, headers and body of an upstream's answer mean."""

import json
import random
import time
from email.utils import formatdate
from pathlib import Path

import pytest

import llm_router as R

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
NOW = 1_800_000_000.0
KINDS = {
    R.OK, R.RATE_LIMITED, R.TEMPORARY, R.TIMEOUT, R.EMPTY, R.BILLING, R.AUTH, R.FORBIDDEN, R.NOT_FOUND, R.POLICY, R.INVALID, R.OVERFLOW,
}  # fmt: skip


def judge(status, body=b"", headers=(), wire="openai"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return R.judge_error(wire, status, list(headers), data, NOW)


def kind(status, body=b"", wire="openai"):
    return judge(status, body, wire=wire).kind


def error(message="", type=None, code=None, **more):
    return {"error": dict({"message": message, "type": type, "param": None, "code": code}, **more)}


# ---- statuses (CONTRACT 5)

BY_STATUS = {
    R.AUTH: {401},
    R.BILLING: {402},
    R.FORBIDDEN: {403, 407},
    R.NOT_FOUND: {404, 410, *range(300, 400)},
    R.RATE_LIMITED: {429},
    R.POLICY: {451},
    R.TEMPORARY: {408, 409, 424, 425, 498, *range(500, 600)},
}


@pytest.mark.parametrize("wire", sorted(R.WIRE_FORMATS))
def test_every_status_has_a_kind(wire):
    for status in range(100, 600):
        expected = next(
            (kind for kind, statuses in BY_STATUS.items() if status in statuses),
            R.INVALID if 400 <= status < 500 else R.TEMPORARY,
        )
        for body in (b"", b"{}", b"gone", error("no")):
            outcome = judge(status, body, wire=wire)
            assert (outcome.kind, outcome.status, outcome.label) == (expected, status, str(status))
            assert outcome.wire == wire


def test_an_outcome_keeps_status_headers_and_body_so_that_it_can_be_returned_unchanged():
    body, headers = b'{"error": {"message" : "n\xc3\xb6"}}', [("X-Request-Id", "1")]
    outcome = judge(400, body, headers)
    assert (outcome.body, outcome.headers) == (body, (("X-Request-Id", "1"),))
    assert outcome.error.message == "nö"


# ---- signals (CONTRACT 5; traps 123, 124, 128, 144, 155)

RAW = json.dumps(error("account suspended due to insufficient balance", "exceeded_current_quota_error"))
SIGNALS = [
    ("Claude subscription: plan used up", 400, error("You're out of extra usage. Add more at claude.ai/settings/usage.", "invalid_request_error"), R.BILLING),
    ("Claude subscription: not for this app", 400, error("Third-party apps now draw from your extra usage, not your plan limits.", "invalid_request_error"), R.BILLING),
    ("MiniMax: no balance", 500, error("insufficient balance (1008)", "api_error"), R.BILLING),
    ("MiniMax: broken", 500, error("unknown error, 999 (1000)", "api_error"), R.TEMPORARY),
    ("Gemini: prepaid and spent", 429, [error("Your prepayment credits are depleted.", None, 429, status="RESOURCE_EXHAUSTED")], R.BILLING),
    ("Vertex AI: not for this project", 400, error("Project `p` is not allowed to use Publisher Model `m`", None, 400), R.FORBIDDEN),
    ("ChatGPT: not in this plan", 400, {"detail": "The 'gpt-5.3-codex' model is not supported when using Codex with a ChatGPT account."}, R.NOT_FOUND),
    ("Azure: not a model for chat", 400, error("The chatCompletion operation does not work with the specified model, o3-pro.", None, "OperationNotSupported"), R.NOT_FOUND),
    ("Copilot: not a model for chat", 400, error('model "x" is not accessible via the /chat/completions endpoint', code="unsupported_api_for_model"), R.NOT_FOUND),
    ("NVIDIA: a model that is ill", 400, {"status": 400, "title": "Bad Request", "detail": "Function id 'x': DEGRADED function cannot be invoked"}, R.TEMPORARY),
    ("LM Studio: crashed", 400, {"error": "The model has crashed without additional information. (Exit code: 6)"}, R.TEMPORARY),
    ("LM Studio: let go", 400, {"error": "Model unloaded."}, R.TEMPORARY),
    ("TensorRT-LLM: too long", 400, error("The sum of prompt length (9) and query length max_tokens (1) should not exceed max_seq_len (8)"), R.OVERFLOW),
    ("LiteLLM: too long", 400, error("litellm.ContextWindowExceededError: litellm.BadRequestError: x"), R.OVERFLOW),
    ("SiliconFlow: too long", 400, {"code": 20015, "message": "length of prompt_tokens (9) must be less than max_seq_len (8).", "data": None}, R.OVERFLOW),
    ("Anthropic: switched off", 400, error("This organization has been disabled."), R.AUTH),
    ("Anthropic: token given back", 403, error("OAuth token has been revoked. Please obtain a new token."), R.AUTH),
    ("Gemini: no such key", 400, [error("API Key not found. Please pass a valid API key.", None, 400)], R.AUTH),
    ("NVIDIA: bad key", 403, {"status": 403, "title": "Forbidden", "detail": "Authorization failed"}, R.AUTH),
    ("Gemini: not for free here", 400, [error("Gemini API free tier is not available in your country.")], R.FORBIDDEN),
    ("Bedrock: not in this country", 400, {"message": "Access to Anthropic models is not allowed from unsupported countries, regions, or territories."}, R.FORBIDDEN),
    ("OpenAI: not verified", 400, error("Your organization must be verified to stream this model."), R.FORBIDDEN),
    ("Novita: no balance, other words", 403, {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "x"}, R.BILLING),
    ("Bedrock: no such model", 400, {"message": "The provided model identifier is invalid."}, R.NOT_FOUND),
    ("Bedrock: not by this name", 400, {"message": "Invocation of model ID x with on-demand throughput isn\u2019t supported."}, R.NOT_FOUND),
    ("TGI: too long for its inputs", 422, {"error": "Input validation error: `inputs` must have less than 9 tokens."}, R.OVERFLOW),
    ("vLLM: too long for the engine", 400, error("The engine prompt length 30 exceeds the max_model_len 20."), R.OVERFLOW),
    ("OpenCode Zen: its upstream failed", 400, error("Error from provider (Console Go): Upstream request failed"), R.TEMPORARY),
    ("AI Gateway: its upstream failed", 400, {"success": False, "error": [{"code": 2005, "message": "Failed to get response from provider"}]}, R.TEMPORARY),
    ("OpenRouter: its upstream failed", 400, error("Provider returned error", None, 400, metadata={"raw": "ERROR"}), R.TEMPORARY),
    ("OpenRouter: its upstream refused", 400, error("Provider returned error", None, 400, metadata={"raw": "at most 1 image"}), R.INVALID),
    ("OpenRouter: nobody to route to", 400, error("No models provided", None, 400), R.TEMPORARY),
    ("a model that rests, in Chinese", 400, error("当前模型暂时无法使用,请稍后再试"), R.TEMPORARY),
    ("a model that rests", 400, error("The model is temporarily unavailable, try again later"), R.TEMPORARY),
    ("new-api: no quota", 403, error("User's credit limit is insufficient, remaining: $0.0", "api_error", "insufficient_user_quota"), R.BILLING),
    ("new-api: no quota, in Chinese", 403, error("用户额度不足, 剩余额度: $0.0", "new_api_error"), R.BILLING),
    ("new-api: a token's quota", 403, error("token quota is not enough", "new_api_error", "pre_consume_token_quota_failed"), R.BILLING),
    ("DashScope: bad key", 400, {"code": "InvalidApiKey", "message": "Invalid API-key provided."}, R.AUTH),
    ("Databricks: bad key", 403, {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."}, R.AUTH),
    ("OpenCode Zen: a model that is gone", 400, error("Upstream request failed: Model is unavailable."), R.NOT_FOUND),
    ("no such model in quotes", 400, {"error": "model 'llama9' not found, try pulling it first"}, R.NOT_FOUND),
    ("a model that is not supported", 400, error("Unsupported model: x"), R.NOT_FOUND),
    ("a field that a model does not support", 400, error("Unsupported model parameter: x"), R.INVALID),
    ("a tool that is not there", 400, error("Tool choice 'get_model' is not found in the tools"), R.INVALID),
    ("a file that is not there", 400, error("The model got an image, but file img-1 not found"), R.INVALID),
    ("DashScope: too long", 400, error("Range of input length should be [1, 30720]"), R.OVERFLOW),
    ("Moonshot: too long", 400, error("Invalid request: Your request exceeded model token limit: 8192"), R.OVERFLOW),
    ("z.ai: too long", 400, error("Prompt exceeds max length", code="1261"), R.OVERFLOW),
    ("z.ai: too long, in Chinese", 400, error("Prompt 超长", code="1261"), R.OVERFLOW),
    ("LM Studio: loaded with too little", 400, {"error": "The model is loaded with context length of only 4096 tokens."}, R.OVERFLOW),
    ("vLLM: too long", 400, error("The decoder prompt (length 50) is longer than the maximum model length of 40."), R.OVERFLOW),
    ("Vertex AI: too long", 400, [error("the input token count is 1,500,000 but model only supports up to 1048576.")], R.OVERFLOW),
    ("GitHub Models: too long", 413, error("Request body too large for x model. Max size: 8000 tokens.", code="tokens_limit_reached"), R.OVERFLOW),
    ("Together: too long", 403, error("Input token count + max_tokens parameter must be less than the context length"), R.OVERFLOW),
    ("Bedrock: too long", 400, {"Message": "Input is too long for requested model."}, R.OVERFLOW),
    ("LM Studio: too long", 400, {"error": "The number of tokens to keep is greater than the context length."}, R.OVERFLOW),
    ("xAI: too long", 400, {"error": "This model's maximum prompt length is 10 but the request contains 12 tokens."}, R.OVERFLOW),
    ("Copilot: too long", 400, error("prompt token count of 93854 exceeds the limit of 90000", "", ""), R.OVERFLOW),
    ("TGI: too long", 422, error("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4097."), R.OVERFLOW),
    ("Cohere: too long", 400, {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"}, R.OVERFLOW),
    ("Groq: no model any more", 400, error("The model `x` has been decommissioned", code="model_decommissioned"), R.NOT_FOUND),
    ("Volcengine: overdue", 403, error("Your account has an overdue balance", code="AccountOverdueError"), R.BILLING),
    ("SiliconFlow: no balance", 403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}, R.BILLING),
    ("xAI: no credits", 403, {"error": "Your newly created team doesn't have any credits or licenses yet."}, R.BILLING),
    ("Baidu: too long", 400, error("Prompt tokens too long", "invalid_request_error", "tokens_too_long"), R.OVERFLOW),
    ("Bedrock: too many tokens", 400, {"message": "Number of input tokens exceeds maximum length."}, R.OVERFLOW),
    ("Volcengine: too long", 400, error("Total tokens of image and text exceed max message tokens."), R.OVERFLOW),
    ("Qwen: free tier used up", 403, error("x", code="AllocationQuota.FreeTierOnly"), R.BILLING),
    ("Kimi: plan used up", 403, error("You've reached your usage limit for this billing cycle."), R.BILLING),
    ("Workers AI: free allocation used up", 429, {"errors": [{"code": 4006, "message": "you have used up your daily free allocation"}]}, R.BILLING),
    ("OpenAI: refused", 400, error("Invalid prompt: we've limited access to this content for safety reasons.", code="invalid_prompt"), R.POLICY),
    ("Bedrock: another bad key", 403, {"message": "The security token included in the request is invalid."}, R.AUTH),
    ("Hugging Face: not there for chat", 400, error("Model x is not supported for task conversational and provider y."), R.NOT_FOUND),
    ("Fireworks: unpaid", 412, error("Account x is suspended, possibly due to reaching the monthly spending limit", "error", "PRECONDITION_FAILED"), R.BILLING),
    ("Fireworks: another precondition", 412, error("The deployment is not ready", "error", "PRECONDITION_FAILED"), R.INVALID),
    ("z.ai: plan over", 429, error("x", code="1309"), R.BILLING),
    ("Novita: no balance", 400, {"code": 400, "reason": "BALANCE_NOT_ENOUGH", "message": "x"}, R.BILLING),
    ("DeepSeek: refused", 400, error("Content Exists Risk", "invalid_request_error", "invalid_request_error"), R.POLICY),
    ("xAI: refused", 403, {"code": "x", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_X"}, R.POLICY),
    ("Volcengine: refused", 400, error("x", "BadRequest", "InputTextSensitiveContentDetected"), R.POLICY),
    ("Groq: restricted", 400, error("Organization has been restricted.", "invalid_request_error", "organization_restricted"), R.AUTH),
    ("Gemini: key too old", 400, [error("API key expired. Please renew the API key.", None, 400)], R.AUTH),
    ("Gemini: no key", 400, [error("Missing or invalid Authorization header.", None, 400)], R.AUTH),
    ("Gemini: key known to others", 403, [error("Your API key was reported as leaked.", None, 403)], R.AUTH),
    ("Bedrock: bad key", 403, {"Message": "Authentication failed: Please make sure your API Key is valid."}, R.AUTH),
    ("Bedrock: key too old", 403, {"Message": "Bearer Token has expired"}, R.AUTH),
    ("Gemini: not in this country", 400, [error("User location is not supported for the API use.", None, 400)], R.FORBIDDEN),
    ("Groq: terms of a model", 400, error("The model `x` requires terms acceptance.", code="model_terms_required"), R.FORBIDDEN),
    ("Copilot, Hugging Face: no such model", 400, error("The requested model is not supported.", code="model_not_supported"), R.NOT_FOUND),
    ("Azure AI, GitHub Models: no such model", 400, error("Unavailable model: x", code="unavailable_model"), R.NOT_FOUND),
    ("Together: no such model", 400, error("Unable to access non-serverless model x.", "invalid_request_error", "model_not_available"), R.NOT_FOUND),
    ("Mistral: no such model", 400, {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code": "1500"}, R.NOT_FOUND),
    ("Perplexity: no such model", 400, error("Invalid model 'x'. Permitted models can be found in the documentation", "invalid_model", 400), R.NOT_FOUND),
    ("LiteLLM: no such model", 400, error("Invalid model name passed in model=x."), R.NOT_FOUND),
    ("a field of a model", 400, error("Invalid model parameters: temperature is not supported by this model"), R.INVALID),
    ("z.ai: refused", 400, error("x", code="1301"), R.POLICY),
    ("z.ai: no such model", 400, error("x", code="1211"), R.NOT_FOUND),
    ("low credit as a 400", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low"}}, R.BILLING),
    ("usage limit as a 400", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "You have reached your specified API usage limits."}}, R.BILLING),
    ("overloaded", 529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, R.TEMPORARY),
    ("rate limit", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "exceeds your organization's limit"}}, R.RATE_LIMITED),
    ("quota as a 429", 429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), R.BILLING),
    ("tokens a minute", 429, error("Limit reached on tokens per min (TPM)", "tokens", "rate_limit_exceeded"), R.RATE_LIMITED),
    ("tokens a minute as a 413", 413, error("Too large on tokens per minute (TPM): Limit 6000", "tokens", "rate_limit_exceeded"), R.RATE_LIMITED),
    ("too large as a 413", 413, error("Request exceeds the maximum size", "request_too_large"), R.INVALID),
    ("tokens a day", 429, error("on tokens per day (TPD). Try again in 9m38.016s.", "tokens", "rate_limit_exceeded"), R.RATE_LIMITED),
    ("a number as code", 402, {"error": {"message": "requires more credits", "code": 402, "metadata": {"provider_name": None}}, "user_id": "u"}, R.BILLING),
    ("balance with an odd code", 402, error("Insufficient Balance", "unknown_error", "invalid_request_error"), R.BILLING),
    ("quota as a 403", 403, error("account not active, organization exceeded current quota", "exceeded_current_quota_error"), R.BILLING),
    ("suspended as a 429", 429, error("suspended due to insufficient balance, please recharge", "exceeded_current_quota_error"), R.BILLING),
    ("busy", 429, error("Too many requests, wait and retry", "rate_limit_reached_error"), R.RATE_LIMITED),
    ("a code of digits", 429, {"error": {"code": "1113", "message": "余额不足"}}, R.BILLING),
    ("a code of digits as type", 429, {"type": "error", "error": {"type": "1113", "message": "x"}}, R.BILLING),
    ("another code of digits", 429, {"error": {"code": "1302", "message": "High concurrency"}}, R.RATE_LIMITED),
    ("digits within digits", 429, {"error": {"code": "11130", "message": "High concurrency"}}, R.RATE_LIMITED),
    ("error as a string", 429, {"code": "Some resource has been exhausted", "error": "used all available credits or monthly spending limit"}, R.BILLING),
    ("denied for credit", 403, {"code": "permission-denied", "error": "used all available credits"}, R.BILLING),
    ("arrears", 400, error("Access denied, account not in good standing.", "Arrearage", "Arrearage"), R.BILLING),
    ("an array", 429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Resource has been exhausted", "details": []}}], R.RATE_LIMITED),
    ("Gemini's window", 429, [error("You exceeded your current quota, check your plan. Quota exceeded for metric: x/free_tier, limit: 15. Please retry in 23.4s.")], R.RATE_LIMITED),
    ("filtered prompt", 400, error("filtered by the content management policy", None, "content_filter", innererror={"code": "ResponsibleAIPolicyViolation"}), R.POLICY),
    ("moderation as a 403", 403, {"error": {"code": 403, "message": "requires moderation and the input was flagged", "metadata": {"reasons": ["x"]}}}, R.POLICY),
    ("inspection", 400, error("Input data may contain x", "data_inspection_failed", "data_inspection_failed"), R.POLICY),
    ("legal", 451, error("unavailable"), R.POLICY),
    ("no error wrapper", 400, {"object": "error", "message": "maximum context length is 10 tokens", "type": "BadRequestError", "code": 400}, R.OVERFLOW),
    ("context size", 400, error("request (20 tokens) exceeds the available context size (10 tokens)", "exceed_context_size_error"), R.OVERFLOW),
    ("context as a 500", 500, error("Context size has been exceeded.", "server_error"), R.TEMPORARY),
    ("prompt too long", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 3 tokens > 2 maximum"}}, R.OVERFLOW),
    ("input and max_tokens", 400, error("input length and `max_tokens` exceed context limit: 199000 + 4096 > 200000"), R.OVERFLOW),
    ("coded overflow", 400, error("too long", "invalid_request_error", "context_length_exceeded"), R.OVERFLOW),
    ("flat, quota words, a rate", 429, {"message": "Tokens per minute limit exceeded", "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"}, R.RATE_LIMITED),
    ("an HTML page", 502, b"<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", R.TEMPORARY),
    ("an HTML page as a 403", 403, b"<!DOCTYPE html><html><body>blocked</body></html>", R.FORBIDDEN),
    ("JSON inside a string", 429, {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": RAW}}}, R.BILLING),
    ("JSON inside JSON in a message", 429, error("upstream said: " + json.dumps({"error": {"message": RAW}})), R.BILLING),
    ("a list of earlier errors", 429, error("failed", metadata={"previous_errors": [error("requires more credits")]}), R.BILLING),
    ("a bad key as a 400", 400, {"code": "invalid-argument", "error": "Incorrect API key provided."}, R.AUTH),
    ("a bad key, Google's words", 400, [error("API key not valid. Please pass a valid API key.", None, 400, status="INVALID_ARGUMENT")], R.AUTH),
    ("a bad key as a 403", 403, error("invalid x-api-key", "authentication_error"), R.AUTH),
    ("detail", 401, {"detail": "Invalid API Key"}, R.AUTH),
    ("forbidden", 403, error("You are not allowed to sample from this model", "permission_error"), R.FORBIDDEN),
    ("no model as a 400", 400, error("The requested model 'x' does not exist.", "invalid_request_error", "model_not_found"), R.NOT_FOUND),
    ("no model, other words", 400, error("x is not a valid model ID"), R.NOT_FOUND),
    ("no deployment", 404, error("The API deployment does not exist", "x", "DeploymentNotFound"), R.NOT_FOUND),
    ("a plain 400", 400, error("Unsupported parameter: 'max_tokens'", "invalid_request_error", "unsupported_parameter"), R.INVALID),
    ("a validation error without words", 422, {"detail": [{"type": "missing", "loc": ["body", "messages"]}]}, R.INVALID),
    ("a validation error", 422, {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required", "input": {}}]}, R.INVALID),
    ("text", 400, b"Bad Request", R.INVALID),
]  # fmt: skip


@pytest.mark.parametrize("status, body, expected", [row[1:] for row in SIGNALS], ids=[row[0] for row in SIGNALS])
@pytest.mark.parametrize("wire", sorted(R.WIRE_FORMATS))
def test_what_an_error_says_decides_over_its_status(status, body, expected, wire):
    assert kind(status, body, wire) == expected


WORDS = "my credit balance is too low, insufficient_quota, content_filter, flagged, maximum context length, invalid api key, try again in 7m"


@pytest.mark.parametrize(
    "body",
    [
        error("no", metadata={"flagged_input": WORDS, "provider_name": WORDS}),
        error("no", input=WORDS, prompt=[WORDS]),
        {
            "detail": [
                {
                    "type": "missing",
                    "loc": ["body", WORDS],
                    "msg": "Field required",
                    "input": {"message": WORDS},
                    "ctx": {"error": 1},
                }
            ]
        },
        {"error": {"message": "no"}, "request": {"error": {"message": WORDS}}, "user_id": WORDS},
        error("no: " + json.dumps({"input": WORDS})),
        error("no", metadata={"raw": json.dumps({"error": {"message": "no", "input": WORDS}})}),
        json.dumps(json.dumps(error("no", input=WORDS))).encode(),
    ],
)
def test_the_clients_own_words_echoed_in_an_error_never_classify_it(body):
    for status, expected in ((400, R.INVALID), (403, R.FORBIDDEN), (429, R.RATE_LIMITED), (422, R.INVALID)):
        outcome = judge(status, body)
        assert (outcome.kind, outcome.retry_after) == (expected, None)


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_words_outside_their_statuses_mean_nothing(status):
    assert kind(status, error("insufficient_quota content_filter invalid api key")) in (R.TEMPORARY, R.NOT_FOUND)


def test_an_html_page_is_told_by_its_title_or_first_words_on_one_line():
    assert R.parse_body(b"<html><title>502:\n Bad   Gateway</title>") == "HTML page: 502: Bad Gateway"
    assert R.parse_body(b"<!doctype html><p>Sorry\x1b, busy</p>") == "HTML page: Sorry\\x1b, busy"
    assert len(R.parse_body(b"<html>" + b"x" * 100_000)) < 200


EXPECTED = {
    "rate_limit": {R.RATE_LIMITED}, "temporary": {R.TEMPORARY}, "billing": {R.BILLING}, "policy": {R.POLICY}, "auth": {R.AUTH},
    "forbidden": {R.FORBIDDEN}, "not_found": {R.NOT_FOUND}, "invalid_request": {R.INVALID, R.OVERFLOW},
}  # fmt: skip
WIRE_OF_API = {"chat": "openai", "messages": "anthropic", "responses": "responses"}


def test_reported_error_shapes_are_what_they_are_said_to_be():
    if not CORPUS.is_dir():
        pytest.skip("no reported error shapes beside the project")
    shapes = json.loads((CORPUS / "error_shapes.json").read_text("utf-8"))["shapes"]
    judged = 0
    for shape in shapes:
        wire, headers = WIRE_OF_API[shape["api"]], list(shape["headers"].items())
        if shape["status"] == 200:
            continue  # a matter of streams and whole answers
        outcome = R.judge_error(wire, shape["status"], headers, shape["body"].encode(), NOW)
        assert outcome.kind in EXPECTED[shape["expected_class"]], shape["id"]
        judged += 1
    assert judged > 20


def test_recorded_errors_have_a_sane_kind_and_words():
    if not CORPUS.is_dir():
        pytest.skip("no recorded answers beside the project")
    sane = {
        400: {R.INVALID, R.OVERFLOW, R.BILLING, R.AUTH, R.NOT_FOUND},
        401: {R.AUTH},
        404: {R.NOT_FOUND},
        429: {R.RATE_LIMITED},
    }
    judged = 0
    for row in json.loads((CORPUS / "INDEX.json").read_text("utf-8")):
        if row["status"] >= 300:
            exchange = json.loads((CORPUS / row["file"]).read_text("utf-8"))
            for wire in R.WIRE_FORMATS:
                outcome = R.judge_error(
                    wire, row["status"], list(exchange["headers"].items()), exchange["body"].encode(), NOW
                )
                assert outcome.kind in sane[row["status"]], row["file"]
                assert outcome.error.message, row["file"]
                assert outcome.retry_after == (1.0 if row["status"] == 429 else None), row["file"]
            judged += 1
    assert judged > 30


# ---- errors inside a 200


@pytest.mark.parametrize(
    "info, kind, status",
    [
        (R.ErrorInfo(502, "Overloaded", "overloaded_error"), R.TEMPORARY, 529),
        (R.ErrorInfo(502, "slow down", "rate_limit_error"), R.RATE_LIMITED, 429),
        (R.ErrorInfo(502, "slow down", "", "rate_limit_exceeded"), R.RATE_LIMITED, 429),
        (R.ErrorInfo(502, "x", "", "429"), R.RATE_LIMITED, 429),
        (R.ErrorInfo(502, "x", "insufficient_quota", "insufficient_quota"), R.BILLING, 429),
        (R.ErrorInfo(502, "x", "authentication_error"), R.AUTH, 401),
        (R.ErrorInfo(502, "x", "", "402"), R.BILLING, 402),
        (R.ErrorInfo(502, "x", "", "content_filter"), R.POLICY, 400),
        (R.ErrorInfo(502, "prompt is too long", "", "400"), R.OVERFLOW, 400),
        (R.ErrorInfo(502, "Provider returned error", "", "502"), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "bad parameter", "invalid_request_error", "400"), R.TEMPORARY, 400),
        (R.ErrorInfo(502, "no such thing", "", "404"), R.TEMPORARY, 404),
        (R.ErrorInfo(502, "insufficient_quota"), R.BILLING, 502),
        (R.ErrorInfo(502, "loaded with context length of only 4096 tokens"), R.OVERFLOW, 502),  # LM Studio's streams
        (R.ErrorInfo(502, "The model has crashed"), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "bad parameter"), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "insufficient_quota", "server_error"), R.TEMPORARY, 500),
        (R.ErrorInfo(502, ""), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "x", "", "1302"), R.RATE_LIMITED, 429),  # z.ai's numbers
        (R.ErrorInfo(502, "x", "", "1113"), R.BILLING, 429),
        (R.ErrorInfo(502, "x", "", "1301"), R.POLICY, 400),
        (R.ErrorInfo(502, "x", "", "1261"), R.OVERFLOW, 400),
        (R.ErrorInfo(502, "x", "", "1399"), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "x", "", "4" * 5000), R.TEMPORARY, 502),
        (R.ErrorInfo(502, "x", "", "\u00b2\u0664"), R.TEMPORARY, 502),
    ],
)
def test_an_error_inside_a_200_is_temporary_unless_it_says_better(info, kind, status):
    """Traps 19, 130."""
    outcome = R.judge_in_band(info, [("x-request-id", "1")], "openai", NOW)
    assert (outcome.kind, outcome.status, outcome.body) == (kind, status, None)
    assert outcome.label.startswith("200:")
    assert outcome.label.isprintable()
    assert not set(outcome.label) & set(" ,")


@pytest.mark.parametrize("status", [400, 200])
def test_an_overflow_has_the_code_on_which_agents_compact_whoever_tells_it(status):
    """Codex knows it by no other sign; Anthropic's errors have no code (trap 156)."""
    words = "prompt is too long: 210000 tokens > 200000 maximum"
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": words}}
    info = R.ErrorInfo(400, words, "invalid_request_error")
    outcome = (
        R.judge_error("anthropic", status, [], json.dumps(body).encode(), 0.0)
        if status == 400
        else R.judge_in_band(info, [], "anthropic", 0.0)
    )
    assert outcome.kind == R.OVERFLOW
    assert R.WIRE_FORMATS["responses"].render_error(outcome.error, "r")["error"]["code"] == "context_length_exceeded"
    assert R.WIRE_FORMATS["anthropic"].render_error(outcome.error, "r")["error"]["message"] == words


def test_an_error_inside_a_200_may_tell_when_to_come_back():
    info = R.ErrorInfo(502, "Rate limited, try again in 20 seconds", "rate_limit_error")
    assert R.judge_in_band(info, [("x-ratelimit-reset", "3")], "openai", NOW).retry_after == 20


def test_an_attempt_without_an_answer_is_a_502_or_a_504():
    assert R.failed_attempt(R.TIMEOUT, "timeout", "x").error.status == 504
    assert R.failed_attempt(R.TEMPORARY, "refused", "x").error.status == 502


# ---- Retry-After (CONTRACT 5: any form; trap 142)

DAY = 86_400.0
HEADERS = [
    ([("retry-after", "17")], 17),
    ([("retry-after", " 1.5 ")], 1.5),
    ([("retry-after", "0")], 0),
    ([("retry-after", "-5")], 0),
    ([("retry-after", "999999999")], DAY),
    ([("retry-after", "9" * 30)], DAY),
    ([("retry-after", formatdate(NOW + 90, usegmt=True))], 90),
    ([("retry-after", formatdate(NOW - 90, usegmt=True))], 0),
    ([("retry-after", "Sunday, 06-Nov-94 08:49:37 GMT")], 0),
    ([("retry-after", "Sun Nov  6 08:49:37 1994")], 0),
    ([("retry-after", "Fri, 15 Jan 2027 09:00:00 +0100")], 0),
    ([("retry-after", "2027-01-15T08:01:00Z")], 60),
    ([("retry-after", "soon")], None),
    ([("retry-after", "")], None),
    ([("retry-after-ms", "250")], 0.25),
    ([("retry-after-ms", "250"), ("retry-after", "9")], 0.25),
    ([("retry-after-ms", "0"), ("retry-after", "1")], 1),
    ([("retry-after-ms", "0")], 0),
    ([("retry-after-ms", "-3")], 0),
    ([("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6m0.5s")], 360.5),
    ([("x-ratelimit-remaining-tokens", "5"), ("x-ratelimit-reset-tokens", "6m")], None),
    ([("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "6ms"), ("x-ratelimit-reset-tokens", "2s")], 2),
    ([("x-ratelimit-reset", "30")], 30),
    ([("x-ratelimit-reset", "%d" % (NOW + 45))], 45),
    ([("x-ratelimit-reset", "%d" % ((NOW + 45) * 1000))], 45),
    ([("x-ratelimit-reset", "%d" % (NOW - 45))], 0),
    ([("anthropic-ratelimit-requests-remaining", "0"), ("anthropic-ratelimit-requests-reset", "2027-01-15T08:00:30Z")], 30),
    ([("anthropic-ratelimit-requests-remaining", "0"), ("anthropic-ratelimit-requests-reset", "2027-01-15T08:00:30.250+00:00")], 30),
    ([("ratelimit-remaining", "0"), ("ratelimit-reset", "12")], 12),
    ([("retry-after", "3"), ("x-ratelimit-reset", "30")], 3),
    ([("x-ratelimit-limit", "30"), ("date", "x")], None),
]  # fmt: skip


def test_the_clock_of_these_tests_is_8_o_clock():
    assert formatdate(NOW, usegmt=True) == "Fri, 15 Jan 2027 08:00:00 GMT"


@pytest.mark.parametrize("headers, expected", HEADERS)
def test_retry_after_is_read_from_every_form_of_header_capped_at_24_hours(headers, expected):
    outcome = judge(429, b"", headers)
    assert outcome.retry_after == (None if expected is None else pytest.approx(expected, abs=0.3))


BODIES = [
    (error("Please try again in 9m38.016s."), 578.016),
    (error("Please try again in 6ms."), 0.006),
    (error("Rate limited. Retry after 30 seconds"), 30),
    (error("Please retry in 23.4s."), 23.4),
    (error("try again in 1 hour and 5 minutes"), 3900),
    (error("Your limit will reset at 2027-01-15T09:00:00Z"), 3600),
    (error("Your limit will reset at 2027-01-15 08:00:10"), 10),  # long ago in Beijing
    (error("Usage limit reached for 5 hour. Your limit will reset at 2027-01-15 17:00:10", code="1308"), 3610),  # z.ai's time
    (error("已达到 5 小时的使用上限。您的限额将在 2027-01-15 17:00:10 重置。", code="1308"), 3610),
    (error("Your limit will reset at 2027-01-15 17:00:10+08:00"), 3610),
    (error("try again in 90 days"), DAY),
    (error("try again in 2 months"), None),
    (error("try again later"), None),
    (error("Rate limit of 10 per 86400s exceeded. Please wait 54321 seconds before retrying."), 54321),
    (error("The usage limit has been reached", "usage_limit_reached", resets_in_seconds=3600), 3600),
    (error("The usage limit has been reached", "usage_limit_reached", resets_at=NOW + 1800), 1800),
    (error("used 30 seconds"), None),
    ([{"error": {"details": [{"@type": "x.RetryInfo", "retryDelay": "34s"}]}}], 34),
    ([{"error": {"details": [{"retryDelay": "34.074824224s"}]}}], 34.07),
    ({"retry_after": 7}, 7),
    ({"error": {"retry_after": 0.30000000000000004}}, 0.3),
    ({"error": {"retry_after_seconds": "8"}}, 8),
    ({"error": {"retry_after": None, "retryAfter": "2 minutes"}}, 120),
    ({"error": {"retry_after": True}}, None),
    ({"error": {"retry_after": {"description": "wait 5 seconds"}}}, None),
    ({"error": {"metadata": {"headers": {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "%d" % ((NOW + 45) * 1000)}}}}, 45),
    ({"error": {"metadata": {"raw": json.dumps({"error": {"details": [{"retryDelay": "34s"}]}})}}}, 34),
    (error("upstream: " + json.dumps(error("try again in 5s"))), 5),
    (b"slow down, try again in 12 seconds", 12),
    (b"", None),
]  # fmt: skip


@pytest.mark.parametrize("body, expected", BODIES)
def test_retry_after_is_read_from_the_body_when_no_header_says_it(body, expected):
    assert judge(429, body).retry_after == (None if expected is None else pytest.approx(expected, abs=0.01))
    assert judge(429, body, [("retry-after", "3")]).retry_after == 3


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("9m38.016s", 578.016),
        ("17.5s", 17.5),
        ("6ms", 0.006),
        ("2 hours", 7200),
        ("1d2h", 93600),
        ("1 min", 60),
        ("5", None),
        ("", None),
        ("5x", None),
        ("3 millis", None),
    ],
)
def test_durations(text, seconds):
    assert R.read_duration(text) == (None if seconds is None else pytest.approx(seconds))


# ---- whatever the bytes

PIECES = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\x00", b"\xff", b"1", b"-", b"e9", b"null", b"true", b'"error"', b'"message"', b'"code"',
    b'"retry_after"', b'"details"', b'"metadata"', b'"headers"', b'"raw"', b"try again in ", b"9" * 40, b"s", b"<html>", b"<title>", b"reset at 2027-99-99T00:00:00Z", b"\n",
]  # fmt: skip
VALUES = [
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    1e300,
    "",
    "x",
    "try again in 99999999999999999999 days",
    "{",
    '{"error":{"code":[]}}',
    "²",
    "\ud800",
    [],
    {},
]


def make_value(rng, depth=0):
    if depth > 4 or rng.random() < 0.5:
        return rng.choice(VALUES)
    if rng.random() < 0.4:
        return [make_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = (
        "error",
        "message",
        "type",
        "code",
        "param",
        "details",
        "detail",
        "metadata",
        "headers",
        "raw",
        "retryDelay",
        "retry_after",
        "status",
    )
    return {rng.choice(names): make_value(rng, depth + 1) for _ in range(rng.randrange(5))}


DATES = [
    "",
    "0",
    "Mon, 99 Foo 2026",
    "1e9",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59-23:59",
    "Fri, 15 Jan 99999 08:00:00 GMT",
    "-" * 50,
    "١٢",
    "nan",
    "inf",
]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_escapes_whatever_an_upstream_answers(seed):
    rng = random.Random(seed)
    for _ in range(500):
        body = (
            b"".join(rng.choice(PIECES) for _ in range(rng.randrange(30)))
            if rng.random() < 0.5
            else json.dumps(make_value(rng)).encode()
        )
        headers = [
            (name, rng.choice(DATES) + rng.choice(DATES))
            for name in (
                "retry-after",
                "retry-after-ms",
                "x-ratelimit-reset",
                "x-ratelimit-remaining",
                "anthropic-ratelimit-tokens-reset",
            )
            if rng.random() < 0.5
        ]
        status = rng.randrange(100, 600)
        wire = rng.choice(sorted(R.WIRE_FORMATS))
        outcome = R.judge_error(wire, status, headers, body, NOW)
        assert outcome.kind in KINDS
        assert outcome.retry_after is None or 0 <= outcome.retry_after <= DAY
        again = R.judge_in_band(outcome.error, headers, wire, NOW)
        assert again.kind in KINDS
        assert again.retry_after is None or 0 <= again.retry_after <= DAY


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000, b'{"error":' * 50_000, b'{"error":"' + b"{" * 90_000 + b'"}', b"<html>" + b"<title" * 3000, b"<html>" + b"<" * 19_000,
        json.dumps({"error": {"message": "{" * 50_000 + "}" * 50_000}}).encode(), b'{"error":{"code":' + b"9" * 5000 + b"}}", b"\xff" * 100_000,
        json.dumps(error("retry " + "in " * 600 + "1" * 900)).encode(), json.dumps({"errors": [error("x" * 3000)] * 2000}).encode(),
    ],
)  # fmt: skip
def test_hostile_bodies_are_only_an_error(body):
    outcome = judge(400, body)
    assert outcome.kind in KINDS
    assert len(R.error_words(R.parse_body(body))) <= 40


@pytest.mark.parametrize("status, wait_s", [("allowed", None), ("allowed_warning", None), ("rejected", 600), ("", None)])
def test_the_windows_of_a_subscription_count_only_when_one_is_used_up(status, wait_s):
    """Every answer tells when they end (Claude Code gateway protocol): an overload is not to rest for days."""
    ends = {"reset": 600, "5h-reset": 600, "7d-reset": 500_000, "overage-reset": 2_000_000}
    headers = [("anthropic-ratelimit-unified-" + name, "%d" % (NOW + after)) for name, after in ends.items()]
    headers += [("anthropic-ratelimit-unified-status", status)] if status else []
    headers += [("anthropic-ratelimit-unified-5h-utilization", "0.42")]
    assert R.read_retry_after(headers, [], None, NOW) == wait_s


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("code", ["thread_not_found", "thread_unsupported_request"])
def test_what_an_upstream_says_of_a_thread_is_for_the_client_and_benches_no_model(status, code):
    """The SDKs' tool runners send the whole conversation on these codes (anthropic.types.ThreadNotFoundErrorDetails)."""
    error = {"type": "not_found_error", "message": "no thread", "details": {"error_code": code}}
    body = json.dumps({"type": "error", "error": error}).encode()
    assert R.judge_error("anthropic", status, [], body, 0.0).kind == R.INVALID
    assert R.judge_error("anthropic", 404, [], body.replace(code.encode(), b"other"), 0.0).kind == R.NOT_FOUND


def test_a_time_to_wait_of_a_hundred_thousand_digits_is_none_and_takes_none():
    """Steps that grow with its square take minutes, for every client."""
    began = time.process_time()
    assert R.read_retry_after([("retry-after", "1" * 100_000)], [], None, 0.0) is None
    assert time.process_time() - began < 10
