"""The OpenAPI description of the server: what it accepts, and what it returns."""

from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from glmtuner.inference.finished import Finished
from glmtuner.serving.protocol import ChatRequest


class ClosedModel(BaseModel):
    """An object without other fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ClosedModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ClosedModel):
    """An error in the form of OpenAI's API; in a stream it is an event's data."""

    error: ErrorDetail


class AnsweredFunction(ClosedModel):
    """The function that is called, and its arguments: the JSON of an object."""

    name: str
    arguments: str


class AnsweredCall(ClosedModel):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(ClosedModel):
    """An answer; `reasoning_content` is there if it has a thought, `tool_calls` if it has calls, beside which content may be null."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str
    tool_calls: list[AnsweredCall]


class AnswerChoice(ClosedModel):
    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls"]


class FunctionDelta(ClosedModel):
    """The name of a function, or the next piece of its arguments."""

    name: str
    arguments: str


class CallDelta(ClosedModel):
    """A call; its first delta has id, type and the function's name, the following ones its arguments."""

    index: int
    id: str
    type: Literal["function"]
    function: FunctionDelta


class Delta(ClosedModel):
    """New text, of the answer or of its thought, or a call; the first delta of a choice has the role."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[CallDelta]


class ChunkChoice(ClosedModel):
    index: int
    delta: Delta
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class Usage(ClosedModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(ClosedModel):
    """A whole answer; `service_tier` is there when the request named one."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[AnswerChoice]
    usage: Usage
    service_tier: Literal["default"]


class ChatCompletionChunk(ClosedModel):
    """A part of a streamed answer; with `stream_options.include_usage` the last one has no choices, and the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None
    service_tier: Literal["default"]


class ModelInfo(ClosedModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(ClosedModel):
    object: Literal["list"]
    data: list[ModelInfo]


class Health(ClosedModel):
    status: Literal["ok"]


ERRORS = {
    400: "the request is malformed, or asks for something that this server does not have; with the code invalid_tools, its "
    "tools, calls and results do not fit together",
    401: "the API key is missing or wrong",
    403: "the Host header names another host",
    404: "there is no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "too many requests are waiting",
    500: "the model failed on this request",
    503: "the server is stopping",
    504: "the answer was not finished in time",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The descriptions of these error responses, as FastAPI takes them."""
    return {status: {"model": ErrorBody, "description": ERRORS[status]} for status in statuses}


ANSWER = {
    "description": "the answer; with `stream` as server-sent events, each with a ChatCompletionChunk or an ErrorBody as its "
    "data, and `[DONE]` as that of the last",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/ChatCompletion"}},
        "text/event-stream": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {
                    "data": {
                        "anyOf": [
                            {"type": "string", "const": "[DONE]"},
                            {
                                "type": "string",
                                "contentMediaType": "application/json",
                                "contentSchema": {
                                    "anyOf": [
                                        {"$ref": "#/components/schemas/ChatCompletionChunk"},
                                        {"$ref": "#/components/schemas/ErrorBody"},
                                    ]
                                },
                            },
                        ]
                    }
                },
            }
        },
    },
}
SOMETIMES = {
    "ChatCompletion": ("service_tier",),
    "ChatCompletionChunk": ("service_tier", "usage"),
    "AnswerMessage": ("reasoning_content", "tool_calls"),
    "Delta": ("role", "content", "reasoning_content", "tool_calls"),
    "CallDelta": ("id", "type"),
    "FunctionDelta": ("name",),
}


def request_body() -> dict[str, Any]:
    """What the route says about its body, which it reads itself."""
    schema = {"$ref": "#/components/schemas/ChatRequest"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@dataclass(frozen=True)
class Abilities:
    """What the chat template renders: descriptions of tools, calls and results, thoughts, and both modes of prompts."""

    tools: bool
    calls: bool
    reasoning: bool
    modes: bool


def abilities_of(finished: Finished) -> Abilities:
    """The abilities of a run's chat template."""
    template, tokenizer = finished.template, finished.tokenizer
    return Abilities(
        tools=template.renders_tools(tokenizer) and template.syntax(tokenizer) is not None,
        calls=template.renders_calls(tokenizer),
        reasoning=template.renders_reasoning,
        modes=template.has_modes(tokenizer),
    )


def _leave_out(schemas: dict[str, Any], abilities: Abilities) -> None:
    """Change the schemas of requests so that they accept nothing that the chat template lacks."""
    request, answer = schemas["ChatRequest"]["properties"], schemas["AssistantMessage"]["properties"]
    nothing = {"type": "null"}
    if not abilities.tools:
        request["tools"]["anyOf"] = [{"type": "array", "items": {}, "maxItems": 0}, nothing]
        request["tool_choice"]["anyOf"] = [{"type": "string", "enum": ["none", "auto"]}, nothing]
    if not abilities.calls:
        answer["tool_calls"]["anyOf"] = [{"type": "array", "items": {}, "maxItems": 0}, nothing]
        turns = request["messages"]["items"]
        turns["oneOf"] = [turn for turn in turns["oneOf"] if not turn["$ref"].endswith("/ToolMessage")]
        del turns["discriminator"]["mapping"]["tool"]
    if not abilities.reasoning:
        answer["reasoning_content"]["anyOf"] = [{"type": "string", "maxLength": 0}, nothing]
    if not abilities.modes:
        schemas["TemplateOptions"]["properties"]["enable_thinking"]["anyOf"] = [nothing]


def describe(
    app: FastAPI, name: str, *, max_tokens: int, max_choices: int, has_key: bool, abilities: Abilities
) -> dict[str, Any]:
    """The OpenAPI document of the app, for a model of this name with these abilities, and these limits of a request."""
    from fastapi.openapi.utils import get_openapi

    document = get_openapi(
        title="glmtuner serve", version="1", summary="OpenAI's chat completions, answered by the model of a run",
        routes=app.routes,
    )  # fmt: skip
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (ChatCompletion, ChatCompletionChunk, ErrorBody):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for title in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of errors, which is not used
        schemas.pop(title, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for title, optional in SOMETIMES.items():
        schema = schemas[title]
        schema["required"] = [field for field in schema["required"] if field not in optional]
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(request.pop("$defs"))
    fields = request["properties"]
    fields["model"] = {"type": "string", "enum": [name]}
    for limit in ("max_tokens", "max_completion_tokens"):
        del fields[limit]["anyOf"][0]["exclusiveMaximum"]  # of every server
        fields[limit]["anyOf"][0]["maximum"] = max_tokens
    fields["n"]["anyOf"][0]["maximum"] = max_choices
    schemas["ChatRequest"] = request
    _leave_out(schemas, abilities)
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
    return document
