"""The OpenAI chat-completions API as types: what a request may hold, and what answers and errors look like.

Source: the API reference at platform.openai.com, and what the official `openai` client reads.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Fields that change nothing here: they tell OpenAI's own service who asks, or what to keep.
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity", "reasoning_effort",
)  # fmt: skip


class ApiError(Exception):
    """An error in the API's own shape, with the HTTP status that belongs to it."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """No field but its own, and no number from a text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart]
    name: str | None = None
    refusal: None = None

    @field_validator("content", mode="before")
    @classmethod
    def as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    @field_validator("content")
    @classmethod
    def of_characters(cls, content: list[TextPart]) -> list[TextPart]:
        """Half a surrogate pair is no character, and no tokenizer reads it."""
        for part in content:
            try:
                part.text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"half a surrogate pair at {error.start} is no Unicode text") from None
        return content


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """`top_k` and `repetition_penalty` are ours; what is left out comes from the run's `generation` values."""

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
    def without_ignored(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if name not in IGNORED} if isinstance(body, dict) else body

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def told(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors as the API tells them."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unsupported parameter: '{where}' is not known here", "unsupported_parameter", where)
    message = first["msg"].removeprefix("Value error, ")
    what = message[:1].lower() + message[1:]
    return ApiError(400, f"'{where}': {what}" if where else f"the body is no chat request: {what}", None, where or None)
