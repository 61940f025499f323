"""The OpenAI chat-completions API as types: the fields of a request, and the form of errors.

Every field of OpenAI's API is known. One that asks for something this server does not have is accepted with the values that
ask for nothing, as many clients send them (`tools: null`), and refused by name with any other.
Source: the API reference at developers.openai.com, and the request types of the official `openai` client.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from glmtuner.serving.messages import (
    AS_INTEGER,
    MAX_ECHO,
    MAX_TOOLS,
    ChatMessage,
    FunctionTool,
    Label,
    NoItems,
    StrictModel,
    ToolChoice,
    text_or_list,
    unique_fields,
)

MAX_STOP_LENGTH = 1024  # characters of a stop text
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONS = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "input should be an object")
REASONS["string_pattern_mismatch"] = "a function's name has 1 to 128 of a-z, A-Z, 0-9, _, -, . and Chinese characters"
MAX_CHOICES = 16
TOOLS_CODE = "invalid_tools"  # the code of errors in tools, calls and results that the schema of a request cannot name

# What is not there, and the values that do not ask for it.
ABSENT = {
    "audio": ("spoken answers are", "null"),
    "function_call": ("function calls are", "null, 'none' or 'auto'"),
    "functions": ("function calls are", "null or []"),
    "logit_bias": ("a bias on tokens is", "null, {} or zeros"),
    "logprobs": ("log probabilities are", "null or false"),
    "top_logprobs": ("log probabilities are", "null or 0"),
    "modalities": ("answers other than text are", 'null or ["text"]'),
    "moderation": ("moderation is", "null"),
    "prediction": ("predicted outputs are", "null"),
    "reasoning_effort": ("a choice of reasoning effort is", "null or 'none'"),
    "response_format": ("an answer format other than text is", 'null or {"type": "text"}'),
    "service_tier": ("service tiers are", "null, 'auto' or 'default'"),
    "store": ("storage of answers is", "null or false"),
    "stream_options.include_obfuscation": ("obfuscation is", "null or false"),
    "tool_choice": ("a choice of tools other than these is", "null, 'none', 'auto', 'required' or one function"),
    "verbosity": ("a choice of verbosity is", "null or 'medium'"),
    "web_search_options": ("web search is", "null"),
}
ABSENT_IN_MESSAGES = {
    "annotations": ("annotations of earlier answers are", "null or []"),
    "audio": ("spoken answers are", "null"),
    "function_call": ("function calls are", "null"),
    "parsed": ("JSON answer formats are", "null"),
    "refusal": ("refusals of other models are", "null"),
}
OTHER_TOOLS = ("tools other than functions are", 'null, or {"type": "function", "function": {"name": …}}')


class ApiError(Exception):
    """An error in the API's own form, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _reject_numbers(value: Any) -> Any:
    """The value; raises ValueError for 0, which Python takes for False and JSON does not."""
    if not isinstance(value, bool):
        raise ValueError("input should be false")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Off = Annotated[Literal[False], BeforeValidator(_reject_numbers)]
Zero = Annotated[float, Field(ge=0, le=0)]


class CacheOptions(StrictModel):
    """Options of OpenAI's prompt cache; they have no effect."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class ResponseFormat(StrictModel):
    """The form of an answer; only text is supported."""

    type: Literal["text"]


class TemplateOptions(StrictModel):
    """Variables of the chat template; `enable_thinking` is the mode of the prompt, instead of that of the training."""

    enable_thinking: bool | None = None


class ChatRequest(StrictModel):
    """A request for a chat completion; what is left out comes from the run's `generation` values.

    `top_k`, `repetition_penalty` and `chat_template_kwargs` are not in OpenAI's API. After a last message that is the
    assistant's, an empty one of the user is read.
    """

    model: Label
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), AS_INTEGER] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), AS_INTEGER] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31), AS_INTEGER] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AS_INTEGER] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), AS_INTEGER] | None = None
    stop: (
        Annotated[
            Annotated[StopText, Tag("text")]
            | Annotated[list[StopText], Field(max_length=4, fail_fast=True), Tag("list")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # These identify the caller or tune OpenAI's own service: they have no effect on an answer.
    user: Label | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None

    # These ask for something that this server does not have, except with the values listed (ABSENT).
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: NoItems | None = None
    logit_bias: Annotated[dict[str, Zero], Field(max_length=1024)] | None = None
    logprobs: Off | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), AS_INTEGER] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    moderation: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    MAPPINGS: ClassVar[dict[str, int]] = {"metadata": 16, "logit_bias": 1024}

    @model_validator(mode="before")
    @classmethod
    def bound_mappings(cls, body: Any) -> Any:
        """Raises for a mapping with too many entries, before each of them is validated."""
        for name, most in cls.MAPPINGS.items() if isinstance(body, dict) else ():
            value = body.get(name)
            if isinstance(value, dict) and len(value) > most:
                raise PydanticCustomError(
                    "too_many_entries", "has {count} entries; at most {most} are legal",
                    {"field": name, "count": len(value), "most": most},
                )  # fmt: skip
        return body

    @property
    def max_new_tokens(self) -> int | None:
        """The limit on the answer's tokens: the smaller of its two names' values."""
        return min(
            (value for value in (self.max_completion_tokens, self.max_tokens) if value is not None), default=None
        )

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def parse_request(body: bytes, max_items: int) -> ChatRequest:
    """The request in a JSON body.

    Raises ApiError for one that is not JSON or not a legal request, and for more messages, or more parts of their content,
    than `max_items`.
    """
    try:
        text = body.decode(json.detect_encoding(body))  # json.loads itself would let half a surrogate pair through
        value = json.loads(text, object_pairs_hook=unique_fields)
        if "\\ud" in text.lower():
            # JSON can hold half a surrogate pair, which is no text: no tokenizer reads it and no response can repeat it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body holds half a surrogate pair (\\ud800 to \\udfff), which is no Unicode text"
        ) from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not JSON: it is not {error.encoding.upper()} at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "the body is not a chat request: it is nested too deeply") from None
    except ValueError as error:
        reason = "a number has too many digits" if "digits" in str(error) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    _check_count(value, max_items)
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from None


def _check_count(body: Any, max_items: int) -> None:
    """Raises ApiError for too many messages or parts, before each of them is validated."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    for count, what in ((len(messages), "messages"), (parts, "parts of content")):
        if count > max_items:
            raise ApiError(
                400, f"'messages': {count} {what}; this server's context has room for {max_items} at most",
                "context_length_exceeded", "messages",
            )  # fmt: skip


def validation_error(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors as an error of the API."""
    first = errors[0]
    return _described(first["type"], _without_tags(first["loc"]), first)


def _without_tags(loc: tuple[Any, ...]) -> list[str]:
    """The path of a value: pydantic's, without the names of the union members that it went through."""
    path: list[Any] = []
    for part in loc:
        is_tag = (path[:1] == ["messages"] and len(path) == 2 and not isinstance(part, int) and part in ROLES) or (
            path[-1:] in (["content"], ["stop"], ["tool_choice"]) and part in ("text", "list", "object")
        )
        if not is_tag:
            path.append(part)
    return [str(part) for part in path]


def _described(kind: str, path: list[str], error: Any) -> ApiError:
    context = error.get("ctx", {})
    if kind in ("unknown_field", "too_many_entries"):
        path = [*path, str(context["field"])]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = [*path, "role"]
    field = ".".join(path)
    shown = field if len(field) <= 2 * MAX_ECHO else field[:MAX_ECHO] + "…"
    absent = _absent(path)
    if kind == "unknown_field" and not absent:
        return ApiError(400, f"unsupported parameter: '{shown}'", "unsupported_parameter", shown)
    if absent is not None:
        what, legal = absent
        message = f"'{shown}': {what} not available on this server; leave it out, or send {legal}"
        return ApiError(400, message, "unsupported_value", shown)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return ApiError(400, f"'{shown}': legal are {', '.join(ROLES)}", None, shown)
    reason = REASONS.get(kind) or error["msg"].removeprefix("Value error, ").partition(" after validation")[0]
    reason = reason[:1].lower() + reason[1:]
    code = TOOLS_CODE if kind in ("not_an_object", "not_finite", "too_deep", "not_text") else None
    return ApiError(
        400, f"'{shown}': {reason}" if shown else f"the body is not a chat request: {reason}", code, shown or None
    )


def _absent(path: list[str]) -> tuple[str, str] | None:
    """What the field at this path asks for in vain, and its values that do not ask for it."""
    if path[:1] == ["tools"]:
        return OTHER_TOOLS if path[2:3] in (["type"], ["custom"]) else None
    if path[:1] == ["tool_choice"]:
        return None if path[1:2] == ["function"] else ABSENT["tool_choice"]
    if path[:1] == ["messages"] and path[2:3] == ["tool_calls"]:
        return OTHER_TOOLS if path[4:5] in (["type"], ["custom"]) else None
    if path[:1] == ["messages"]:
        return ABSENT_IN_MESSAGES.get(path[2]) if len(path) > 2 else None
    return ABSENT.get(".".join(path[:2]), ABSENT.get(path[0])) if path else None
