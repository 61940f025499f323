"""The OpenAI chat-completions API as types: the fields of a request, and the form of errors.

Source: the API reference at platform.openai.com, and what the official `openai` client reads.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields that are accepted and have no effect: they tell OpenAI's own service who asks, or what to store.
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity", "reasoning_effort",
)  # fmt: skip


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


class StrictModel(BaseModel):
    """Rejects unknown fields, and numbers given as strings."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(StrictModel):
    """A piece of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One turn; `developer` is another name for `system`, `name` and `refusal` have no effect."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart]
    name: str | None = None
    refusal: None = None

    @field_validator("content", mode="before")
    @classmethod
    def as_parts(cls, content: Any) -> Any:
        """A string as a list of one text part."""
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text for part in self.content)

    @field_validator("content")
    @classmethod
    def reject_lone_surrogates(cls, content: list[TextPart]) -> list[TextPart]:
        """Raises ValueError for half a surrogate pair, which JSON can hold and no tokenizer reads."""
        for part in content:
            try:
                part.text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"half a surrogate pair at {error.start} is not valid Unicode text") from None
        return content


class StreamOptions(StrictModel):
    """Options of a streamed answer; `include_obfuscation` has no effect."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(StrictModel):
    """The form of an answer; only text is supported."""

    type: Literal["text"]


class ChatRequest(StrictModel):
    """A request for a chat completion; what is left out comes from the run's `generation` values.

    `top_k` and `repetition_penalty` are not in OpenAI's API.
    """

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_ignored(cls, body: Any) -> Any:
        """The body without the fields that have no effect."""
        return {name: value for name, value in body.items() if name not in IGNORED} if isinstance(body, dict) else body

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, stop: Any) -> Any:
        """One stop text as a list."""
        return [stop] if isinstance(stop, str) else stop

    @property
    def max_new_tokens(self) -> int | None:
        """The limit on the answer's tokens, under either of its names."""
        return self.max_completion_tokens or self.max_tokens


def validation_error(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors as an error of the API."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unsupported parameter: '{field}'", "unsupported_parameter", field)
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    return ApiError(
        400, f"'{field}': {reason}" if field else f"the body is not a chat request: {reason}", None, field or None
    )
