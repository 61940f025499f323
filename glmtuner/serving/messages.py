"""The turns and the tools of a request as types, in the form of OpenAI's API."""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from glmtuner.templates.tool_calls import is_writable

MAX_LABEL_LENGTH = 1024  # characters of a text that only identifies something; OpenAI documents no limit
MAX_ECHO = 100  # characters of a client's own text that an error message repeats
MAX_TOOLS = 128  # OpenAI's limit
MAX_DEPTH = 64  # levels of a JSON object that a chat template renders
NAME = "^[a-zA-Z0-9_.\u4e00-\u9fff-]{1,128}$"  # of functions; OpenAI has 64 characters, no dots and no Chinese


class StrictModel(BaseModel):
    """Rejects unknown fields, and numbers given as strings."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def reject_unknown_fields(cls, body: Any) -> Any:
        """Raises for the first unknown field alone: a body may have a hundred thousand of them."""
        if isinstance(body, dict):
            unknown = next((name for name in body if name not in cls.model_fields), None)
            if unknown is not None:
                raise PydanticCustomError("unknown_field", "unknown field", {"field": unknown})
        return body


def text_or_list(value: Any) -> str:
    """The tag of a value that is a text or a list."""
    return "list" if isinstance(value, list) else "text"


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary. Raises ValueError if a name comes twice: one of its values would be lost."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the field {twice[:MAX_ECHO]!r} comes twice in one object")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call from their JSON. Raises PydanticCustomError for a text that is not the JSON of an object."""
    try:
        value = json.loads(text, object_pairs_hook=unique_fields, parse_constant=_no_constant)
        problem = "" if isinstance(value, dict) else f"it is {_kind_of(value)}"
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = "a number has too many digits" if "digits" in str(error) else str(error)
    if problem:
        raise PydanticCustomError(
            "not_an_object", "input should be the JSON of an object, such as {example}: {problem}",
            {"example": '"{}"', "problem": problem},
        )  # fmt: skip
    return _shallow(value)


def _kind_of(value: Any) -> str:
    names = {str: "a string", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    """The object. Raises PydanticCustomError if it is nested too deeply, or holds what JSON in UTF-8 cannot."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            children: Iterable[Any] = each.values() if isinstance(each, dict) else each
            inner += [child for child in children if isinstance(child, dict | list)]
            if any(isinstance(child, float) and not math.isfinite(child) for child in children):
                raise PydanticCustomError("not_finite", "its numbers should be finite")
        level = inner
        if not level:
            break
    if level:
        raise PydanticCustomError("too_deep", "input should have at most {depth} levels", {"depth": MAX_DEPTH})
    if not is_writable(value):
        raise PydanticCustomError("not_text", "it holds half a surrogate pair, which is no Unicode text")
    return value


def _check_arguments(text: str) -> str:
    read_arguments(text)
    return text


def _as_integer(value: Any) -> Any:
    """1 for 1.0, which are the same number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_INTEGER = BeforeValidator(_as_integer)  # after the bounds, or the schema loses them
JsonObject = Annotated[dict[str, Any], AfterValidator(_shallow)]
Label = Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]
FunctionName = Annotated[str, Field(pattern=NAME)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH)]
NoItems = Annotated[list[Any], Field(max_length=0, fail_fast=True)]


class CacheBreakpoint(StrictModel):
    """A hint for OpenAI's prompt cache; it has no effect."""

    mode: Literal["explicit"]


class TextPart(StrictModel):
    """A piece of a message's content; only text is supported."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("list")],
    Discriminator(text_or_list),
]


class _Turn(StrictModel):
    """What all messages have; `name`, the participant's or the tool's, has no effect: no chat template shows it to the model."""

    content: Content
    name: Label | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        content: Any = self.content
        if isinstance(content, list):
            return "".join(part.text for part in content)
        return content or ""


class SystemMessage(_Turn):
    """Instructions to the model."""

    role: Literal["system"]


class DeveloperMessage(_Turn):
    """The newer name of a system message."""

    role: Literal["developer"]


class UserMessage(_Turn):
    """A turn of the user."""

    role: Literal["user"]


class CalledFunction(StrictModel):
    """The function that is called, and its arguments: the JSON of an object.

    `parsed_arguments`, which the official client's `parse` and `stream` add to an answer, have no effect.
    """

    name: FunctionName
    arguments: Annotated[str, AfterValidator(_check_arguments)]
    parsed_arguments: JsonObject | None = None


class FunctionCall(StrictModel):
    """A call of a function in an earlier answer; `index`, which it has in a stream, has no effect."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int, Field(ge=0, lt=2**31), AS_INTEGER] | None = None


class AssistantMessage(_Turn):
    """An earlier answer, also as the official client returns it; without `content` it is empty.

    `reasoning_content`, the thought before it, is not in OpenAI's API.
    """

    role: Literal["assistant"]
    content: Content | None = None  # type: ignore[assignment]
    reasoning_content: str | None = None
    tool_calls: Annotated[list[FunctionCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: NoItems | None = None
    parsed: None = None


class ToolMessage(_Turn):
    """The result of a call in the answer before it."""

    role: Literal["tool"]
    tool_call_id: CallId


ChatMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(StrictModel):
    """A function that the model may call. Arguments are always an object; `strict` does not hold them to `parameters`."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def keep_order(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Keeps the keys in the order in which they came, which is that of the prompt."""
        function = handler(value)
        function._given = {key: part for key, part in value.items() if part is not None}
        return function


class FunctionTool(StrictModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function

    @property
    def described(self) -> dict[str, Any]:
        """The description as chat templates read it and as records have it: what is null is not there."""
        return {"type": "function", "function": self.function._given}


class NamedFunction(StrictModel):
    """The name of a function."""

    name: FunctionName


class NamedTool(StrictModel):
    """The function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


def _text_or_object(value: Any) -> str:
    return "object" if isinstance(value, dict) else "text"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
    Discriminator(_text_or_object),
]
