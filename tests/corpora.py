"""What real servers have been seen to send: odd streams, and the bodies of errors.

Each entry says what a client should make of it. A chunk is a dict (sent as JSON) or a
string (sent as it is; one that starts with ":" is an SSE comment).
"""

from dataclasses import dataclass
from dataclasses import field
from typing import Any

Chunk = dict[str, Any] | str


@dataclass(frozen=True)
class Stream:
    """A streamed answer, and the text, calls and finish_reason a client should read in
    it.
    """

    about: str
    chunks: list[Chunk]
    text: str = ""
    calls: list[tuple[str, dict]] = field(default_factory=list)
    finish: str | None = "stop"
    broken: bool = False
    done: bool = True


@dataclass(frozen=True)
class Failure:
    """An error answer; kind: overflow, auth, quota, rate, parameter, retry or fatal."""

    kind: str
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


def envelope(choices: list[dict], **more: Any) -> dict:
    """A chunk as OpenAI frames it."""
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "fake",
    }
    return {**head, "choices": choices, **more}


def delta(finish: str | None = None, **fields: Any) -> dict:
    """A chunk with one delta."""
    return envelope([{"index": 0, "delta": fields, "finish_reason": finish}])


def says(text: str | None, **fields: Any) -> dict:
    """A first chunk: the role and some text."""
    return delta(role="assistant", content=text, **fields)


def call(
    index: int | None = 0,
    id: str | None = None,
    name: str | None = None,
    arguments=None,
):
    """A fragment of a tool call, with only the fields that are given."""
    fragment: dict[str, Any] = {} if index is None else {"index": index}
    if id is not None:
        fragment |= {"id": id, "type": "function"}
    function = {"name": name, "arguments": arguments}
    fragment["function"] = {
        key: value for key, value in function.items() if value is not None
    }
    return fragment


def calls(*fragments: dict, **fields: Any) -> dict:
    """A chunk with fragments of tool calls."""
    return delta(**fields, tool_calls=list(fragments))


def usage(prompt: int = 7, completion: int = 5) -> dict:
    """The closing chunk with the tokens used and no choices."""
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return envelope([], usage={**tokens, "total_tokens": prompt + completion})


ROLE = {"role": "assistant"}
ADD_ONE = ("add", {"a": 1})
ADD_TWO = ("add", {"a": 2})
CALLED = delta("tool_calls")
STOPPED = delta("stop")

STREAMS = {
    "good": Stream(
        "OpenAI: text, then two parallel calls, then usage",
        [
            says(""),
            delta(content="Let me "),
            delta(content="look.\n"),
            calls(call(0, "call_a", "get_time", "")),
            calls(call(0, arguments='{"tz":')),
            calls(call(0, arguments='"UTC"}')),
            calls(call(1, "call_b", "add", "")),
            calls(call(1, arguments='{"a":1,"b":2}')),
            CALLED,
            usage(),
        ],
        text="Let me look.\n",
        calls=[("get_time", {"tz": "UTC"}), ("add", {"a": 1, "b": 2})],
        finish="tool_calls",
    ),
    "text": Stream(
        "OpenAI: text, then usage",
        [says(""), delta(content="Hello "), delta(content="world"), STOPPED, usage()],
        text="Hello world",
    ),
    "whole_call_stop": Stream(
        "Ollama: a whole call in one delta, and finish_reason stop",
        [
            says("", tool_calls=[call(0, "call_x", "get_time", '{"tz":"UTC"}')]),
            delta("stop", role="assistant", content=""),
        ],
        calls=[("get_time", {"tz": "UTC"})],
    ),
    "same_index": Stream(
        "two parallel calls that both claim index 0",
        [
            calls(call(0, "call_1", "add", '{"a":1}'), **ROLE),
            calls(call(0, "call_2", "add", '{"a":2}')),
            CALLED,
        ],
        calls=[ADD_ONE, ADD_TWO],
        finish="tool_calls",
    ),
    "no_index": Stream(
        "a call without an index",
        [calls(call(None, "call_1", "add", "{}"), **ROLE), CALLED],
        calls=[("add", {})],
        finish="tool_calls",
    ),
    "repeats": Stream(
        "role, id and name in every delta",
        [
            says("He"),
            says("llo"),
            calls(call(0, "call_1", "add", '{"a"'), **ROLE),
            calls(call(0, "call_1", "add", ":1}"), **ROLE),
            delta("tool_calls", **ROLE),
        ],
        text="Hello",
        calls=[ADD_ONE],
        finish="tool_calls",
    ),
    "empty_id": Stream(
        "a call whose id is empty",
        [calls(call(0, "", "add", '{"a":1}'), **ROLE), CALLED],
        calls=[ADD_ONE],
        finish="tool_calls",
    ),
    "dict_args": Stream(
        "arguments as an object, not as text",
        [calls(call(0, "call_1", "add", {"a": 1}), **ROLE), CALLED],
        calls=[ADD_ONE],
        finish="tool_calls",
    ),
    "null_fn_args": Stream(
        "arguments null",
        [
            calls(
                call(0, "call_1") | {"function": {"name": "now", "arguments": None}},
                **ROLE,
            ),
            CALLED,
        ],
        calls=[("now", {})],
        finish="tool_calls",
    ),
    "no_type": Stream(
        "a call without a type",
        [calls({"id": "call_1", **call(0, None, "add", '{"a":1}')}, **ROLE), CALLED],
        calls=[ADD_ONE],
        finish="tool_calls",
    ),
    "reasoning": Stream(
        "DeepSeek: reasoning beside the answer",
        [
            says(None, reasoning_content="hm "),
            delta(reasoning_content="yes"),
            delta(content="ok"),
            STOPPED,
        ],
        text="ok",
    ),
    "length": Stream(
        "cut at the limit", [says("cut"), delta("length")], "cut", finish="length"
    ),
    "filter": Stream(
        "stopped by a filter",
        [says("cut"), delta("content_filter")],
        "cut",
        finish="content_filter",
    ),
    "azure_first": Stream(
        "Azure: a first chunk without choices",
        [
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [],
                "prompt_filter_results": [{"prompt_index": 0}],
            },
            says("hi"),
            STOPPED,
        ],
        text="hi",
    ),
    "mid_error": Stream(
        "OpenRouter: the provider dies in mid-stream",
        [says("par"), {"error": {"code": 502, "message": "upstream died"}}],
        text="par",
        finish=None,
        broken=True,
    ),
    "mid_error_str": Stream(
        "Ollama: the same, as a bare text",
        [says("par"), {"error": "llama runner process has terminated"}],
        text="par",
        finish=None,
        broken=True,
    ),
    "truncated": Stream(
        "ends without finish_reason and without [DONE]",
        [says("half an ans")],
        text="half an ans",
        finish=None,
        broken=True,
        done=False,
    ),
    "bad_json": Stream(
        "a chunk that is not JSON",
        [says("a"), "{not json"],
        text="a",
        finish=None,
        broken=True,
    ),
    "comments": Stream(
        "OpenRouter: a comment keeps the line open",
        [says("a"), ": OPENROUTER PROCESSING", delta(content="b"), STOPPED],
        text="ab",
    ),
    "no_created": Stream(
        "a frame with little in it",
        [
            {
                "id": "x",
                "choices": [
                    {"index": 0, "delta": {"role": "assistant", "content": "x"}}
                ],
            },
            {
                "id": "x",
                "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            },
        ],
        text="x",
    ),
    "gemini_sig": Stream(
        "Gemini: a signature that has to go back with the call",
        [
            calls(
                call(0, "call_1", "add", '{"a":1}')
                | {"extra_content": {"google": {"thought_signature": "SIG"}}},
                **ROLE,
            ),
            CALLED,
        ],
        calls=[ADD_ONE],
        finish="tool_calls",
    ),
    "same_index_no_id": Stream(
        "two whole calls with no id, both at index 0",
        [
            calls(call(0, "", "add", '{"a":1}'), **ROLE),
            calls(call(0, "", "add", '{"a":2}')),
            STOPPED,
        ],
        calls=[ADD_ONE, ADD_TWO],
    ),
    "empty_200": Stream(
        "LM Studio when the context is full: a stream with nothing in it",
        [delta(**ROLE), STOPPED],
        broken=True,
    ),
    "refusal": Stream(
        "a refusal in place of content",
        [says(None, refusal="I can"), delta(refusal="not"), STOPPED],
        text="I cannot",
    ),
    "no_choices_key": Stream(
        "a closing chunk that has no choices at all",
        [
            says("x"),
            STOPPED,
            {
                "id": "x",
                "object": "chat.completion.chunk",
                "usage": {"total_tokens": 3},
            },
        ],
        text="x",
    ),
}


def error(
    message: str,
    code: str | int | None = None,
    type: str | None = None,
    param: str | None = None,
    **more: Any,
) -> dict:
    """An error body as OpenAI frames it."""
    return {
        "error": {
            "message": message,
            "type": type,
            "param": param,
            "code": code,
            **more,
        }
    }


def bare(message: str, **fields: Any) -> dict:
    """An error body with only the fields that are given."""
    return {"error": {"message": message, **fields}}


INVALID = "invalid_request_error"

ERRORS = {
    "e400ctx": Failure(
        "overflow",
        400,
        error(
            "This model's maximum context length is 8192 tokens. However, your"
            " messages resulted"
            " in 9000 tokens.",
            "context_length_exceeded",
            INVALID,
            "messages",
        ),
    ),
    "e401": Failure(
        "auth",
        401,
        error("Incorrect API key provided: sk-x.", "invalid_api_key", INVALID),
    ),
    "e402": Failure("quota", 402, bare("Insufficient credits", code=402)),
    "e403": Failure(
        "auth",
        403,
        bare("Country not supported", code="unsupported_country_region_territory"),
    ),
    "e404": Failure("fatal", 404, error("model 'x' not found", type="not_found_error")),
    "e408": Failure("retry", 408, bare("timeout")),
    "e409": Failure("retry", 409, bare("conflict")),
    "e413": Failure(
        "overflow",
        413,
        bare(
            "Request body too large for gpt-4o-mini model. Max size: 8000 tokens.",
            code="tokens_limit_reached",
            details="Request body too large",
        ),
    ),
    "e422": Failure("fatal", 422, bare("unprocessable")),
    "e429": Failure(
        "rate",
        429,
        error("Rate limit reached", "rate_limit_exceeded", "requests"),
        {"Retry-After": "1", "x-ratelimit-remaining-requests": "0"},
    ),
    "e429quota": Failure(
        "quota",
        429,
        error(
            "You exceeded your current quota",
            "insufficient_quota",
            "insufficient_quota",
        ),
    ),
    "e429long": Failure("rate", 429, bare("slow"), {"Retry-After": "300"}),
    "e500": Failure("retry", 500, bare("boom", type="api_error")),
    "e503": Failure("retry", 503, "<html>bad gateway</html>"),
    "e500str": Failure(
        "retry", 500, {"error": "model runner has unexpectedly stopped"}
    ),
    "e400flat": Failure(
        "fatal",
        400,
        {
            "object": "error",
            "message": "flat error body",
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    "e200err": Failure("retry", 200, bare("provider returned error", code=502)),
    "gpt4all": Failure("fatal", 400, error("'stream' is not supported", type=INVALID)),
    "llamacpp": Failure(
        "overflow",
        400,
        bare(
            "request (13392 tokens) exceeds the available context size (8192 tokens),"
            " try"
            " increasing it",
            code=400,
            type="exceed_context_size_error",
            n_prompt_tokens=13392,
            n_ctx=8192,
        ),
    ),
    "lmstudio": Failure(
        "overflow",
        400,
        {
            "error": "The number of tokens to keep from the initial prompt is greater"
            " than the"
            " context length (n_keep: 13055>= n_ctx: 4096). Try to load the model"
            " with a larger"
            " context length, or provide a shorter input."
        },
    ),
    "vllm16": Failure(
        "overflow",
        400,
        error(
            "You passed 1015 input tokens and requested 10 output tokens. However,"
            " the model's"
            " context length is only 1024 tokens, resulting in a maximum input length"
            " of 1014"
            " tokens.",
            400,
            "BadRequestError",
            "input_tokens",
        ),
    ),
    "vllm_old": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 6048 tokens. However,"
            " you requested"
            " 6616 tokens",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "openrouter": Failure(
        "overflow",
        400,
        bare(
            "This endpoint's maximum context length is 262000 tokens. However, you"
            " requested about"
            " 263390 tokens",
            code=400,
            metadata={"provider_name": None},
        ),
    ),
    "openrouter_raw": Failure(
        "overflow",
        400,
        bare(
            "Provider returned error",
            code=400,
            metadata={
                "raw": '{"error":{"message":"This model\'s maximum context length'
                ' is 262144 tokens."}}',
                "provider_name": "Nvidia",
            },
        ),
    ),
    "ollama": Failure(
        "overflow",
        400,
        error("the input length exceeds the context length", type=INVALID),
    ),
    "gpt5": Failure(
        "overflow",
        400,
        error(
            "Input tokens exceed the configured limit of 272000 tokens. Your messages"
            " resulted in"
            " 289650 tokens.",
            "context_length_exceeded",
            INVALID,
            "messages",
        ),
    ),
    "effort": Failure(
        "parameter",
        400,
        error(
            "Function tools with reasoning_effort are not supported for gpt-6-sol in"
            " /v1/chat/completions. To use function tools, use /v1/responses or set"
            " reasoning_effort to 'none'.",
            None,
            INVALID,
            "reasoning_effort",
        ),
    ),
    "max_tokens": Failure(
        "parameter",
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            " 'max_completion_tokens' instead.",
            "unsupported_parameter",
            INVALID,
            "max_tokens",
        ),
    ),
}

# More error answers of real servers; here the kind is the reason as s09 names it. What
# only loose
# words tell apart (Anthropic's empty account is a 400) is what its status says.
PROVIDERS = {
    "openai_no_access": Failure(
        "model_not_found",
        403,
        error(
            "Project `p` does not have access to model `m`", "model_not_found", INVALID
        ),
    ),
    "openai_tokens_per_min": Failure(
        "rate_limit",
        429,
        error(
            "Request too large for gpt-4 in organization o on tokens per min (TPM):"
            " Limit 10000,"
            " Requested 12401. The input or output tokens must be reduced in order to"
            " run.",
            "rate_limit_exceeded",
            "tokens",
        ),
    ),
    "openai_not_active": Failure(
        "billing",
        429,
        error("Your account is not active", "billing_not_active", INVALID),
    ),
    "openrouter_402": Failure(
        "billing",
        402,
        bare(
            "This request requires more credits, or fewer max_tokens. You requested"
            " up to 65536"
            " tokens, but can only afford 4290.",
            code=402,
            metadata={"provider_name": None},
        ),
    ),
    "openrouter_402_budget": Failure(
        "rate_limit",
        402,
        bare(
            "In flight",
            code=402,
            metadata={"limit_source": "openrouter_in_flight_budget"},
        ),
        {"Retry-After": "3"},
    ),
    "openrouter_403_flagged": Failure(
        "format",
        403,
        bare(
            "The model requires moderation and your input was flagged",
            code=403,
            metadata={
                "reasons": ["violence"],
                "flagged_input": "how to...",
                "provider_name": "x",
            },
        ),
    ),
    "openrouter_403_limit": Failure(
        "auth", 403, bare("Key limit exceeded (total limit).", code=403)
    ),
    "openrouter_403_raw": Failure(
        "auth",
        403,
        bare("Provider returned error", code=403, metadata={"raw": "Forbidden"}),
    ),
    "openrouter_404": Failure(
        "model_not_found",
        404,
        bare("No endpoints found that support tool use.", code=404),
    ),
    "openrouter_429": Failure(
        "rate_limit",
        429,
        bare(
            "Provider returned error",
            code=429,
            metadata={
                "raw": "m is temporarily rate-limited upstream",
                "provider_name": "Chutes",
            },
        ),
    ),
    "openrouter_502": Failure(
        "overloaded", 502, bare("Provider returned error", code=502)
    ),
    "openrouter_524": Failure("overloaded", 524, "<html>A timeout occurred</html>"),
    "gemini_key": Failure(
        "auth",
        400,
        [
            bare(
                "API key not valid. Please pass a valid API key.",
                code=400,
                status="INVALID_ARGUMENT",
                details=[
                    {
                        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                        "reason": "API_KEY_INVALID",
                        "domain": "googleapis.com",
                    }
                ],
            )
        ],
    ),
    "gemini_key_object": Failure(
        "auth",
        400,
        bare(
            "API key not valid. Please pass a valid API key.",
            code=400,
            status="INVALID_ARGUMENT",
            details=[{"reason": "API_KEY_INVALID", "domain": "googleapis.com"}],
        ),
    ),
    "gemini_quota": Failure(
        "rate_limit",
        429,
        [
            bare(
                "You exceeded your current quota", code=429, status="RESOURCE_EXHAUSTED"
            )
        ],
    ),
    "gemini_503": Failure(
        "overloaded",
        503,
        [bare("The model is overloaded.", code=503, status="UNAVAILABLE")],
    ),
    "gemini_400": Failure(
        "format", 400, [bare("Unknown name 'x'", code=400, status="INVALID_ARGUMENT")]
    ),
    "groq_decommissioned": Failure(
        "model_not_found",
        400,
        bare(
            "The model `m` has been decommissioned and is no longer supported.",
            type=INVALID,
            code="model_decommissioned",
        ),
    ),
    "groq_413": Failure(
        "overflow",
        413,
        bare(
            "Request too large for model `m` on tokens per minute (TPM): Limit 6000,"
            " Requested"
            " 8012, please reduce your message size and try again.",
            type="tokens",
            code="rate_limit_exceeded",
        ),
    ),
    "groq_498": Failure("overloaded", 498, bare("Flex tier capacity exceeded")),
    "groq_tool": Failure(
        "format",
        400,
        bare("Failed to call a function.", type=INVALID, code="tool_use_failed"),
    ),
    "deepseek_402": Failure(
        "billing", 402, error("Insufficient Balance", INVALID, "unknown_error")
    ),
    "deepseek_401": Failure(
        "auth", 401, error("Authentication Fails", INVALID, "authentication_error")
    ),
    "anthropic_529": Failure(
        "overloaded",
        529,
        {"type": "error", **bare("Overloaded", type="overloaded_error")},
    ),
    "anthropic_429": Failure(
        "rate_limit",
        429,
        {"type": "error", **bare("slow down", type="rate_limit_error")},
    ),
    "anthropic_credit": Failure(
        "format", 400, bare("Your balance is too low", type=INVALID)
    ),
    "anthropic_long": Failure(
        "overflow",
        400,
        bare("prompt is too long: 210000 tokens > 200000 maximum", type=INVALID),
    ),
    "azure_401": Failure(
        "auth", 401, bare("Access denied due to invalid subscription key", code="401")
    ),
    "azure_404": Failure(
        "model_not_found",
        404,
        bare(
            "The API deployment for this resource does not exist.",
            code="DeploymentNotFound",
        ),
    ),
    "azure_429": Failure(
        "rate_limit", 429, bare("retry after 7 seconds", code="RateLimitReached")
    ),
    "azure_filter": Failure(
        "format",
        400,
        bare(
            "The response was filtered",
            code="content_filter",
            status=400,
            innererror={},
        ),
    ),
    "vllm_404": Failure(
        "model_not_found",
        404,
        {"object": "error", "message": "The model `m` does not exist.", "code": 404},
    ),
    "vllm_401": Failure("auth", 401, {"error": "Unauthorized"}),
    "vllm_tools": Failure(
        "format",
        400,
        {
            "object": "error",
            "message": '"auto" tool choice requires --enable-auto-tool-choice',
            "type": "BadRequestError",
            "code": 400,
        },
    ),
    "lmstudio_load": Failure("format", 400, {"error": "Model unloaded."}),
    "lmstudio_404": Failure(
        "model_not_found", 404, {"error": "Failed to load model m."}
    ),
    "llamacpp_500": Failure(
        "overflow",
        500,
        bare("Context size has been exceeded.", code=500, type="server_error"),
    ),
    "llamacpp_503": Failure(
        "overloaded", 503, bare("Loading model", code=503, type="unavailable_error")
    ),
    "llamacpp_401": Failure(
        "auth", 401, bare("Invalid API Key", code=401, type="authentication_error")
    ),
    "ollama_404": Failure(
        "model_not_found",
        404,
        bare('model "m" not found, try pulling it first', type="api_error"),
    ),
    "moonshot_quota": Failure(
        "billing", 429, bare("check your plan", type="exceeded_current_quota_error")
    ),
    "dashscope_arrearage": Failure(
        "billing",
        400,
        error("Access denied, make sure your account is paid", "Arrearage", "x"),
    ),
    "mistral_model": Failure(
        "model_not_found",
        400,
        {
            "object": "error",
            "message": "Invalid model: m",
            "type": "invalid_model",
            "code": "1500",
        },
    ),
    "mistral_422": Failure(
        "format",
        422,
        {"object": "error", "message": {"detail": [{"msg": "Field required"}]}},
    ),
    "generate": Failure("format", 400, bare("cannot generate with this temperature")),
    "keyword": Failure(
        "format", 400, bare("unexpected keyword 'x': KeyError, key 'messages'")
    ),
    "tokens": Failure(
        "format", 400, bare("unknown token; token ids must be whole numbers")
    ),
    "digits": Failure(
        "overloaded", 500, bare("id 4294010402 took 429 ms, 401 steps, 402 kB")
    ),
    "words_500": Failure(
        "overloaded", 500, bare("rate limit: quota, invalid api key, billing")
    ),
    "words_400": Failure(
        "format", 400, bare("rate limit: 429, 401, overloaded, billing, timeout")
    ),
    "number": Failure("overloaded", 500, 5),
    "null": Failure("overloaded", 500, None),
    "empty_401": Failure("auth", 401, ""),
    "odd_error": Failure(
        "rate_limit", 429, {"error": [1, {"code": ["x"]}], "metadata": 3}
    ),
    "odd_code": Failure(
        "format", 400, bare("odd", code=["x"], type={"a": 1}, metadata=["x"])
    ),
    "odd_403": Failure("auth", 403, bare("odd", metadata="flagged_input")),
}

# A conversation that is too long, in the words of other servers. The texts are those
# that users have reported; around them stands OpenAI's frame, or that of the server.
OVERFLOWS = {
    "gemini_long": Failure(
        "overflow",
        400,
        [
            bare(
                "The input token count (1196265) exceeds the maximum number of"
                " tokens allowed"
                " (1048576).",
                code=400,
                status="INVALID_ARGUMENT",
            )
        ],
    ),
    "gemini_long_object": Failure(
        "overflow",
        400,
        bare(
            "The input token count exceeds the maximum number of tokens allowed"
            " 1048576.",
            code=400,
            status="INVALID_ARGUMENT",
        ),
    ),
    "dashscope_long": Failure(
        "overflow",
        400,
        error(
            "<400> InternalError.Algo.InvalidParameter: Range of input length should"
            " be [1, 30720]",
            "invalid_parameter_error",
            INVALID,
        ),
    ),
    "xai_long": Failure(
        "overflow",
        400,
        {
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request"
            " contains 537812"
            " tokens.",
        },
    ),
    "moonshot_long": Failure(
        "overflow",
        400,
        bare(
            "Invalid request: Your request exceeded model token limit: 8192"
            " (requested: 9000)",
            type=INVALID,
        ),
    ),
    "zai_long": Failure(
        "overflow", 400, bare("Prompt exceeds max length", code="1261")
    ),
    "zai_more_than_max": Failure(
        "overflow",
        400,
        bare("tokens in request more than max tokens allowed", code="1210"),
    ),
    "zai_maximum": Failure(
        "overflow",
        400,
        bare(
            "API 调用参数有误，请检查文档。Request 182387 input tokens exceeds"
            " the model's maximum"
            " context length 202750",
            code="1210",
        ),
    ),
    "sglang_longer": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "The input (14000 tokens) is longer than the model's context"
            " length (8192"
            " tokens).",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "sglang_requested": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "Requested token count exceeds the model's maximum context"
            " length of 8192"
            " tokens. You requested a total of 9000 tokens: 8000 tokens from the"
            " input messages"
            " and 1000 tokens for the completion.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "vllm_decoder": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "The decoder prompt (length 21535) is longer than the maximum"
            " model length"
            " of 16384. Make sure that `max_model_len` is no smaller than the number"
            " of text tokens"
            " plus multimodal tokens.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "vllm_completion": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 16384 tokens."
            " However, you requested"
            " 19591 tokens (9591 in the messages, 10000 in the completion). Please"
            " reduce the"
            " length of the messages or completion.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "siliconflow_seq_len": Failure(
        "overflow",
        400,
        {
            "code": 20015,
            "message": "length of prompt_tokens (40000) must be less than"
            " max_seq_len (32768).",
            "data": None,
        },
    ),
    "siliconflow_prompt": Failure(
        "overflow",
        400,
        {
            "code": 20015,
            "message": "number of input tokens (204703) has exceeded"
            " max_prompt_tokens (202752)"
            " limit",
            "data": None,
        },
    ),
    "anthropic_sum": Failure(
        "overflow",
        400,
        {
            "type": "error",
            **bare(
                "input length and `max_tokens` exceed context limit: 90402 + 116650"
                " > 204648,"
                " decrease input length or `max_tokens` and try again",
                type=INVALID,
            ),
        },
    ),
    "llamacpp_without_numbers": Failure(
        "overflow",
        400,
        bare(
            "the request exceeds the available context size, try increasing it",
            code=400,
            type=INVALID,
        ),
    ),
    "llamacpp_python": Failure(
        "overflow",
        400,
        error(
            "This model's maximum context length is 2048 tokens. However, you"
            " requested 3158 tokens"
            " (3158 in the messages, 0 in the completion). Please reduce the length"
            " of the"
            " messages or completion.",
            "context_length_exceeded",
            INVALID,
            "messages",
        ),
    ),
    "llamacpp_python_500": Failure(
        "overflow",
        500,
        error(
            "Requested tokens (3158) exceed context window of 2048",
            None,
            "internal_server_error",
        ),
    ),
    "lmstudio_without_numbers": Failure(
        "overflow",
        400,
        {
            "error": "The number of tokens to keep from the initial prompt is"
            " greater than the"
            " context length. Try to load the model with a larger context length, or"
            " provide a"
            " shorter input"
        },
    ),
    "lmstudio_keep": Failure(
        "overflow",
        400,
        {
            "error": "Trying to keep the first 7120 tokens when context the"
            " overflows. However, the"
            " model is loaded with context length of only 4096 tokens, which is not"
            " enough. Try to"
            " load the model with a larger context length, or provide a shorter input"
        },
    ),
    "lmstudio_reached": Failure(
        "overflow",
        400,
        {
            "error": "Reached context length of 4096 tokens with model (arch: llama)"
            " that does not"
            " currently support mid-generation context overflow."
        },
    ),
    "openai_window": Failure(
        "overflow",
        400,
        error(
            "Your input exceeds the context window of this model. Please adjust your"
            " input and try"
            " again.",
            "context_length_exceeded",
            INVALID,
            "input",
        ),
    ),
    "copilot_long": Failure(
        "overflow",
        400,
        bare(
            "prompt token count of 209000 exceeds the limit of 168000",
            code="model_max_prompt_tokens_exceeded",
        ),
    ),
    "minimax_long": Failure(
        "overflow",
        400,
        bare(
            "invalid params, context window exceeds limit (2013)",
            type="bad_request_error",
        ),
    ),
    "mistral_long": Failure(
        "overflow",
        400,
        {
            "object": "error",
            "message": "Prompt contains 40960 tokens and 0 draft tokens, too large"
            " for model with"
            " 32768 maximum context length",
            "type": "invalid_request_prompt",
            "code": "3051",
        },
    ),
    "bedrock_long": Failure(
        "overflow", 400, bare("Input is too long for requested model.")
    ),
    "cohere_long": Failure(
        "overflow",
        400,
        {
            "message": "too many tokens: size limit exceeded by 19296 tokens. Try"
            " using shorter or"
            " fewer inputs. The limit for this model is 132000 tokens."
        },
    ),
    "omlx_long": Failure(
        "overflow",
        400,
        bare(
            "Prompt too long: 41911 tokens exceeds max context window of 32768 tokens"
        ),
    ),
    "litellm_long": Failure(
        "overflow",
        400,
        bare(
            "litellm.ContextWindowExceededError: litellm.BadRequestError: Context"
            " Window exceeded"
            " for given call. No models have context window large enough for this"
            " call.",
            code="400",
        ),
    ),
    "fireworks_long": Failure(
        "overflow",
        400,
        bare(
            "The prompt is too long: 140000, model maximum context length: 131071",
            type=INVALID,
        ),
    ),
    "groq_long": Failure(
        "overflow",
        400,
        bare(
            "Please reduce the length of the messages or completion.",
            type=INVALID,
            code="context_length_exceeded",
        ),
    ),
    "cerebras_long": Failure(
        "overflow",
        400,
        {
            "message": "Please reduce the length of the messages or completion. Current"
            " length is 9000 while limit is 8192",
            "type": INVALID,
            "param": "messages",
            "code": "wrong_api_format",
        },
    ),
    "perplexity_long": Failure(
        "overflow", 400, bare("The total length of all messages is too long.", code=400)
    ),
    "together_long": Failure(
        "overflow",
        400,
        bare(
            "Input validation error: `inputs` tokens + `max_new_tokens` must be"
            " <= 8193. Given: 9000 `inputs` tokens and 512 `max_new_tokens`",
            type=INVALID,
        ),
    ),
    "bedrock_mantle_long": Failure(
        "overflow",
        400,
        bare(
            "input tokens (200000) exceeds customer model maximum input tokens (128000)"
        ),
    ),
    "ollama_long": Failure(
        "overflow",
        400,
        bare("prompt too long; exceeded max context length by 4 tokens"),
    ),
}

# The window that an overflow states, in tokens.
WINDOWS = {
    "cerebras_long": 8192,
    "together_long": 8193,
    "bedrock_mantle_long": 128000,
    "e400ctx": 8192,
    "llamacpp": 8192,
    "lmstudio": 4096,
    "vllm16": 1024,
    "vllm_old": 6048,
    "openrouter": 262000,
    "openrouter_raw": 262144,
    "gpt5": 272000,
    "anthropic_long": 200000,
    "in the stream": 4096,
    "in the stream, late": 4096,
    "in place of the stream": 4096,
    "in place": 4096,
    "gemini_long": 1048576,
    "gemini_long_object": 1048576,
    "dashscope_long": 30720,
    "xai_long": 131072,
    "moonshot_long": 8192,
    "zai_maximum": 202750,
    "sglang_longer": 8192,
    "sglang_requested": 8192,
    "vllm_decoder": 16384,
    "vllm_completion": 16384,
    "siliconflow_seq_len": 32768,
    "siliconflow_prompt": 202752,
    "anthropic_sum": 204648,
    "llamacpp_python": 2048,
    "llamacpp_python_500": 2048,
    "lmstudio_keep": 4096,
    "lmstudio_reached": 4096,
    "copilot_long": 168000,
    "mistral_long": 32768,
    "cohere_long": 132000,
    "omlx_long": 32768,
    "fireworks_long": 131071,
}
# Where a client may miss it: it stands where others have the size of the request.
WINDOW_IN_PROSE = {
    "together_long",
    "bedrock_mantle_long",
    "mistral_long",
    "cohere_long",
    "omlx_long",
    "fireworks_long",
    "llamacpp_python_500",
}
