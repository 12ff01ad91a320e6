"""Test the classification of common servers' error texts."""

import json
from typing import Any

import pytest

from services.producer.core.dialects import dialect_of
from services.producer.core.dialects.failures import failure_in_stream

TOO_LONG = [
    # OpenAI, Azure, DeepSeek, vLLM
    (400, {"error": {"message": "This model's maximum context length is 8192 tokens. However, your "
                     "messages resulted in 8545 tokens.", "code": "context_length_exceeded"}}),
    (400, {"error": {"message": "This model's maximum context length is 131072 tokens.", "code": None}}),
    (400, {"error": {"message": "Your input exceeds the context window of this model."}}),
    (400, {"object": "error", "message": "This model's maximum context length is 1024 tokens. However, you requested "
           "1029 tokens (1028 in the messages, 1 in the completion).", "type": "BadRequestError", "code": 400}),
    (400, {"error": {"message": "The decoder prompt (length 9000) is longer than the maximum model length of 8192."}}),
    (400, {"error": {"message": "'max_tokens' is too large. This model's maximum context length is 4096 tokens"}}),
    # llama.cpp
    (500, {"error": {"code": 500, "message": "request exceeds the available context size", "type": "server_error"}}),
    (400, {"error": {"code": 400, "message": "request (9 tokens) is too big", "type": "exceed_context_size_error"}}),
    # Ollama
    (400, {"error": {"message": "the input length exceeds the context length", "type": "api_error"}}),
    (500, {"error": "input length exceeds maximum context length"}),
    # TGI
    (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000",
           "error_type": "validation"}),
    (422, {"error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000"}),
    # SGLang
    (400, {"object": "error", "message": "The input (9000 tokens) is longer than the model's context length (8192 "
           "tokens).", "code": 400}),
    # Anthropic
    (400, {"type": "error", "error": {"type": "invalid_request_error",
                                      "message": "prompt is too long: 210000 tokens > 200000 maximum"}}),
    (400, {"type": "error", "error": {"type": "invalid_request_error",
                                      "message": "input length and `max_tokens` exceed context limit: 190000"}}),
    # Cohere
    (400, {"message": "too many tokens: size limit exceeded by 11326 tokens. Try using shorter or fewer inputs."}),
    # OpenRouter
    (400, {"error": {"code": 400, "message": "This endpoint's maximum context length is 131072 tokens. However, you "
                     "requested about 132463 tokens"}}),
    (400, {"error": {"code": 400, "message": "Provider returned error", "metadata": {"raw": "Prompt too long"}}}),
    # LM Studio
    (400, {"error": "The number of tokens to keep from the initial prompt is greater than the context length"}),
    (400, {"error": "Trying to keep the first 9000 tokens when context the overflows."}),
    # Mistral
    (400, {"object": "error", "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with "
           "32768 maximum context length", "type": "invalid_request_error", "code": "3051"}),
    # Groq, Cerebras
    (400, {"error": {"message": "Please reduce the length of the messages or completion.",
                     "type": "invalid_request_error", "code": "context_length_exceeded"}}),
    (400, {"error": {"message": "Please reduce the length of the messages or completion."}}),
    # Together, Gemini, xAI, Moonshot, GLM, Qwen, MiniMax, Bedrock
    (422, {"error": {"message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193",
                     "type": "invalid_request_error"}}),
    (400, [{"error": {"code": 400, "status": "INVALID_ARGUMENT",
                      "message": "The input token count (2000000) exceeds the maximum number of tokens allowed"}}]),
    (400, {"code": "Client specified an invalid argument",
           "error": "This model's maximum prompt length is 131072 but the request contains 140000 tokens."}),
    (400, {"error": {"type": "invalid_request_error",
                     "message": "Invalid request: Your request exceeded model token limit: 8192"}}),
    (400, {"error": {"code": "1261", "message": "Prompt exceeds max length"}}),
    (400, {"error": {"code": "invalid_parameter_error", "message": "Range of input length should be [1, 30720]"}}),
    (400, {"type": "error", "error": {"type": "bad_request", "message": "context window exceeds limit"}}),
    (400, {"message": "Input is too long for requested model."}),
    (400, {"error": {"message": "prompt token count of 140000 exceeds the limit of 128000"}}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), TOO_LONG, ids=lambda value: str(value)[-60:])
def test_a_prompt_that_is_too_long_has_one_code_at_all_servers(status: int, body: Any) -> None:
    refused = dialect_of("openai").refusal(status, {}, json.dumps(body).encode(), 0.0)
    assert (refused.code, refused.recoverable, refused.upstream_status) == ("context_length_exceeded", False, status)
    failed = failure_in_stream(body)
    assert (failed.code, failed.recoverable) == ("context_length_exceeded", False)
    assert failed.message == refused.message


OTHERS = [
    # rate limits
    (429, {"error": {"message": "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000",
                     "type": "tokens", "code": "rate_limit_exceeded"}}, "upstream_rate_limited", True),
    (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}}, "upstream_rate_limited", True),
    (429, {"message": "You are using a Trial key, which is limited to 10 API calls / minute"},
     "upstream_rate_limited", True),
    (429, {"object": "error", "message": "Requests rate limit exceeded", "type": "rate_limited", "code": "1300"},
     "upstream_rate_limited", True),
    (429, {"error": {"type": "rate_limit_reached_error", "message": "max RPM: 3"}}, "upstream_rate_limited", True),
    (429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You exceeded your current quota"}}],
     "upstream_rate_limited", True),
    (400, {"error": {"message": "Rate limit exceeded: free-models-per-min"}}, "upstream_rate_limited", True),
    # quota and balance
    (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
     "upstream_rate_limited", False),
    (429, {"error": {"type": "exceeded_current_quota_error", "message": "x"}}, "upstream_rate_limited", False),
    (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}, "upstream_unauthorized", False),
    (429, {"error": {"code": "1113", "message": "Insufficient balance or no resource package"}},
     "upstream_unauthorized", False),
    (400, {"type": "error", "error": {"type": "invalid_request_error",
                                      "message": "Your credit balance is too low to access the Anthropic API."}},
     "upstream_unauthorized", False),
    (400, {"code": "Arrearage", "message": "Access denied"}, "upstream_unauthorized", False),
    # credentials
    (401, {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error"}},
     "upstream_unauthorized", False),
    (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.",
                      "status": "INVALID_ARGUMENT"}}], "upstream_unauthorized", False),
    (401, {"message": "invalid api token"}, "upstream_unauthorized", False),
    (401, {"detail": "Unauthorized"}, "upstream_unauthorized", False),
    (403, {"type": "error", "error": {"type": "permission_error", "message": "x"}}, "upstream_unauthorized", False),
    # models
    (404, {"error": {"message": "The model `m` does not exist"}}, "upstream_not_found", False),
    (404, {"object": "error", "message": "The model `m` does not exist.", "type": "NotFoundError", "code": 404},
     "upstream_not_found", False),
    (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}, "upstream_not_found", False),
    (400, {"object": "error", "message": "Invalid model: m", "type": "invalid_model", "code": "1500"},
     "upstream_not_found", False),
    (400, {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error"}},
     "upstream_not_found", False),
    (400, {"error": {"message": "m is not a valid model ID", "code": 400}}, "upstream_bad_request", False),
    (400, {"error": {"message": "The model `m` has been decommissioned", "code": "model_decommissioned"}},
     "upstream_not_found", False),
    # content filters
    (400, {"error": {"message": "The response was filtered", "code": "content_filter"}}, "content_filtered", False),
    (400, {"error": {"message": "Your request was rejected as a result of our safety system."}},
     "content_filtered", False),
    (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}},
     "content_filtered", False),
    (403, {"error": {"message": "flagged", "metadata": {"flagged_input": "x"}}}, "content_filtered", False),
    (400, {"error": {"code": "1301", "message": "unsafe"}}, "content_filtered", False),
    (200, {"base_resp": {"status_code": 1026, "status_msg": "new_sensitive"}}, "content_filtered", False),
    # overload
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "upstream_overloaded", True),
    (503, {"error": {"code": 503, "message": "Loading model"}}, "upstream_overloaded", True),
    (429, {"error": "Model is overloaded", "error_type": "overloaded"}, "upstream_overloaded", True),
    (500, {"error": {"message": "The engine is currently overloaded, please try again later"}},
     "upstream_overloaded", True),
    (400, {"error": {"type": "engine_overloaded_error", "message": "x"}}, "upstream_overloaded", True),
    (200, {"error": {"message": "no healthy upstream"}}, "upstream_overloaded", True),
    # what says nothing more
    (400, {"error": {"message": "temperature must be below 2", "type": "invalid_request_error"}},
     "upstream_bad_request", False),
    (400, {"error": {"message": "max_tokens is too large: at most 4096 tokens"}}, "upstream_bad_request", False),
    (400, {"error": {"message": '"m" does not support tools', "type": "api_error"}}, "upstream_bad_request", False),
    (413, {"type": "error", "error": {"type": "request_too_large", "message": "x"}}, "upstream_bad_request", False),
    (500, {"error": {"message": "context deadline exceeded"}}, "upstream_error", True),
    (502, {"error": {"message": "bad gateway", "type": "api_error"}}, "upstream_error", True),
    (500, {"error": {"message": "x", "type": "invalid_request_error"}}, "upstream_error", True),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "code", "recoverable"), OTHERS, ids=lambda value: str(value)[-60:])
def test_an_error_means_the_same_at_all_servers(status: int, body: Any, code: str, recoverable: bool) -> None:
    refused = dialect_of("openai").refusal(status, {}, json.dumps(body).encode(), 0.0)
    assert (refused.code, refused.recoverable) == (code, recoverable)


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic", "cohere"])
def test_all_dialects_recognise_a_context_length_error(dialect: str) -> None:
    body = b'{"message": "too many tokens: size limit exceeded"}'
    refused = dialect_of(dialect).refusal(400, {}, body, 0.0)  # type: ignore[arg-type]  # names of dialects
    assert refused.code == "context_length_exceeded"


def test_a_long_message_takes_no_time() -> None:
    for text in ("model " * 500_000, "a" * 3_000_000, "input tokens count " * 100_000):
        assert len(failure_in_stream({"error": {"message": text}}).message) == 500
