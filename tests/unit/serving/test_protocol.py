"""Requests as clients send them: every field of OpenAI's API, every way to be malformed, and what it costs to find out."""

import json
import time
from typing import Any

import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionMessage,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolMessageParam,
    ParsedChatCompletionMessage,
    ParsedFunctionToolCall,
)
from openai.types.chat.completion_create_params import CompletionCreateParamsBase, CompletionCreateParamsStreaming
from openai.types.shared_params import FunctionDefinition

from glmtuner.serving.messages import Function, ToolMessage
from glmtuner.serving.prompt import tools_of, turns_of
from glmtuner.serving.protocol import ApiError, ChatRequest, parse_request
from glmtuner.templates.tool_calls import ToolCall

HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BARE = {"type": "function", "function": {"name": "查询.a-b", "description": None, "strict": True}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "1"}

# Of each field: values that ask for nothing, or for what is there, and values that ask for what is not there.
FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": ([HELLO], []),
    "model": (["m"], []),
    "stream": ([None, False, True], []),
    "audio": ([None], [{"format": "wav", "voice": "alloy"}]),
    "frequency_penalty": ([None, 0, -2, 2.0], []),
    "function_call": ([None, "none", "auto"], [{"name": "f"}]),
    "functions": ([None, []], [[{"name": "f"}]]),
    "logit_bias": ([None, {}, {"50256": 0}], [{"50256": -100}, {"1": 100}]),
    "logprobs": ([None, False], [True]),
    "max_completion_tokens": ([None, 1, 7], []),
    "max_tokens": ([None, 1, 7], []),
    "metadata": ([None, {}, {"a": "b"}], []),
    "modalities": ([None, [], ["text"]], [["audio"], ["text", "audio"]]),
    "moderation": ([None], [{"model": "omni-moderation-latest"}]),
    "n": ([None, 1, 16, 2.0], []),
    "parallel_tool_calls": ([None, True, False], []),
    "prediction": ([None], [{"type": "content", "content": "hi"}]),
    "presence_penalty": ([None, 0, -2, 2.0], []),
    "prompt_cache_key": ([None, "", "k"], []),
    "prompt_cache_options": ([None, {}, {"mode": "implicit", "ttl": "30m"}], []),
    "prompt_cache_retention": ([None, "in_memory", "24h"], []),
    "reasoning_effort": ([None, "none"], ["minimal", "low", "medium", "high", "xhigh", "max"]),
    "response_format": ([None, {"type": "text"}], [{"type": "json_object"}, {"type": "json_schema"}]),
    "safety_identifier": ([None, "", "x" * 128], []),
    "seed": ([None, 0, -(2**63), 2**63 - 1], []),
    "service_tier": ([None, "auto", "default"], ["flex", "scale", "priority", "fast"]),
    "stop": ([None, [], "a", ["a", "b", "c", "d"], "a" * 1024], []),
    "store": ([None, False], [True]),
    "stream_options": (
        [None, {}, {"include_usage": True, "include_obfuscation": False}],
        [{"include_obfuscation": True}],
    ),
    "temperature": ([None, 0, 2, 2e-38, 5e-324], []),
    "tool_choice": (
        [None, "none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
        [{"type": "custom", "custom": {"name": "f"}}, {"type": "allowed_tools", "allowed_tools": {}}, "any"],
    ),
    "tools": (
        [None, [], [TOOL], [BARE] * 128],
        [[{"type": "custom", "custom": {"name": "f"}}], [{"type": "file_search"}]],
    ),
    "top_logprobs": ([None, 0], [1, 20]),
    "top_p": ([None, 1, 1e-300], []),
    "user": ([None, "", "me"], []),
    "verbosity": ([None, "medium"], ["low", "high"]),
    "web_search_options": ([None], [{}, {"search_context_size": "low"}]),
}
OF_ASSISTANT: dict[str, tuple[list[Any], list[Any]]] = {
    "role": (["assistant"], []),
    "content": ([None, "", "hi", [{"type": "text", "text": "hi"}]], [[{"type": "refusal", "refusal": "no"}]]),
    "name": ([None, "a"], []),
    "refusal": ([None], ["no"]),
    "reasoning_content": ([None, "", "hm"], []),
    "tool_calls": (
        [None, [], [CALL], [CALL] * 128],
        [[{"id": "1", "type": "custom", "custom": {"name": "f", "input": ""}}]],
    ),
    "function_call": ([None], [{"name": "f", "arguments": ""}]),
    "audio": ([None], [{"id": "1"}]),
    "annotations": ([None, []], [[{"type": "url_citation"}]]),
    "parsed": ([None], [{"a": 1}]),
}


def parsed(**fields: Any) -> ChatRequest:
    return parse_request(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), max_items=100)


def deep(levels: int) -> Any:
    """An object of so many levels."""
    return {"a": deep(levels - 1)} if levels > 1 else {}


def error_of(body: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        if isinstance(body, bytes):
            parse_request(body, max_items=100)
        else:
            parsed(**body)
    assert caught.value.status == 400 and len(caught.value.message) < 500
    return caught.value


def test_the_tables_hold_every_field_of_the_official_client() -> None:
    official = CompletionCreateParamsBase.__annotations__ | CompletionCreateParamsStreaming.__annotations__
    assert {*FIELDS} == {*official}
    assert {*ChatRequest.model_fields} == {*FIELDS, "top_k", "repetition_penalty", "chat_template_kwargs"}
    assert {*OF_ASSISTANT} - {"annotations", "parsed", "reasoning_content"} == {
        *ChatCompletionAssistantMessageParam.__annotations__
    }
    assert {*ToolMessage.model_fields} == {*ChatCompletionToolMessageParam.__annotations__, "name"}
    assert {*Function.model_fields} == {*FunctionDefinition.__annotations__}
    # clients send answers back as they came
    assert {*OF_ASSISTANT} >= {*ChatCompletionMessage.model_fields, *ParsedChatCompletionMessage.model_fields}
    assert {*ChatCompletionStreamOptionsParam.__annotations__} == {"include_usage", "include_obfuscation"}
    assert {*ChatCompletionContentPartTextParam.__annotations__} == {"type", "text", "prompt_cache_breakpoint"}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_asks_for_nothing_is_accepted_and_anything_else_refused_by_name(field: str) -> None:
    nothing, something = FIELDS[field]
    for value in nothing:
        parsed(**{field: value})
    for value in something:
        error = error_of({field: value})
        assert str(error.param).startswith(field) and f"'{field}" in error.message, error.message
        assert "not available on this server; leave it out, or send null" in error.message


def calling(arguments: Any = "{}", **more: Any) -> list[Any]:
    """Turns with a call of these arguments."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, RESULT]


@pytest.mark.parametrize(
    "arguments",
    [
        "", " ", "[]", "null", '"{}"', "{", "{} {}", "{'a': 1}", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": "\\ud83d"}',
        '{"a": ' * 65 + "1" + "}" * 65, "[" * 100_000, '{"a": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_arguments_that_are_not_the_json_of_an_object_are_told_with_their_place(arguments: str) -> None:
    error = error_of({"messages": calling(arguments)})
    assert error.param == "messages.1.tool_calls.0.function.arguments" and error.code == "invalid_tools"
    assert f"'{error.param}'" in error.message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tools.0.function.name", [{"name": name} for name in ("", "a b", "x" * 129, "<f>", 5, None, "f\n")]),
        ("tools.0.function.parameters", [{"name": "f", "parameters": each} for each in ([], "{}", 1, deep(70), {"a": [{"b": float("inf")}]})]),
        ("tools.0.function.description", [{"name": "f", "description": 1}]),
        ("tools.0.function.strict", [{"name": "f", "strict": 1}]),
        ("tools.0.function.other", [{"name": "f", "other": 1}]),
        ("tools.0.function", [None, [], "f"]),
    ],
)  # fmt: skip
def test_a_tool_that_is_none_is_told_with_its_place(field: str, values: list[Any]) -> None:
    for value in values:
        error = error_of({"tools": [{"type": "function", "function": value}]})
        assert error.param == field and f"'{field}" in error.message, (value, error.message)


def test_a_tool_keeps_the_order_of_its_keys_and_loses_what_is_null() -> None:
    given = {"parameters": {"b": 1, "a": None}, "strict": None, "name": "f", "description": "d"}
    (tool,) = parsed(tools=[{"function": given, "type": "function"}]).tools or ()
    assert json.dumps(tool.described) == json.dumps(
        {"type": "function", "function": {"parameters": {"b": 1, "a": None}, "name": "f", "description": "d"}}
    )


def test_turns_of_a_request_with_calls() -> None:
    calls = [{**CALL, "id": each, "function": {"name": "f", "arguments": f'{{"a": "{each}"}}'}} for each in "xyz"]
    results = [{"role": "tool", "tool_call_id": each, "content": each} for each in "zxy"]
    answer = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls}
    turns = turns_of(parsed(messages=[*HELLO, answer, *results, {"role": "developer", "content": "d"}]))
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "tool", "tool", "system"]
    assert turns[1].tool_calls == tuple(ToolCall("f", {"a": each}, each) for each in "xyz")
    assert turns[1].content == "" and turns[1].reasoning == "hm"
    assert [(turn.call_id, turn.content) for turn in turns[2:5]] == [("x", "x"), ("y", "y"), ("z", "z")]


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([RESULT], "messages.0.tool_call_id"),
        ([*HELLO, RESULT], "messages.1.tool_call_id"),
        (calling()[:2], "messages.1.tool_calls"),
        ([*calling()[:2], *HELLO], "messages.1.tool_calls"),
        ([*calling(), RESULT], "messages.3.tool_call_id"),
        ([*calling(id="2")], "messages.2.tool_call_id"),
        ([*calling(), {"role": "assistant", "content": "a"}, RESULT], "messages.4.tool_call_id"),
        ([*HELLO, {"role": "assistant", "tool_calls": [CALL, CALL]}, RESULT], "messages.1.tool_calls"),
    ],
)
def test_calls_and_results_that_do_not_belong_together_are_told(messages: list[Any], place: str) -> None:
    with pytest.raises(ApiError) as caught:
        turns_of(parsed(messages=messages))
    assert caught.value.status == 400 and caught.value.param == place and caught.value.code == "invalid_tools"


def test_tools_that_the_model_is_shown() -> None:
    names = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    assert len(tools_of(parsed(tools=names))) == len(tools_of(parsed(tools=names, tool_choice="required"))) == 2
    assert tools_of(parsed(tools=names, tool_choice="none")) == tools_of(parsed()) == ()
    named = {"type": "function", "function": {"name": "h"}}
    for tools, choice, place in (
        (names, named, "tool_choice.function.name"), (None, named, "tool_choice.function.name"),
        ([], "required", "tool_choice"), (names[:1] * 2, "auto", "tools.1.function.name"),
    ):  # fmt: skip
        with pytest.raises(ApiError, match=place):
            tools_of(parsed(tools=tools, tool_choice=choice))


@pytest.mark.parametrize("field", OF_ASSISTANT)
def test_an_earlier_answer_is_taken_as_the_official_client_returns_it(field: str) -> None:
    answer = {name: accepted[0] for name, (accepted, _) in OF_ASSISTANT.items()}
    nothing, something = OF_ASSISTANT[field]
    for value in nothing:
        chat = parsed(messages=[*HELLO, {**answer, field: value}, *HELLO])
        assert chat.messages[1].text == ("hi" if field == "content" and value else "")
    for value in something:
        error = error_of({"messages": [*HELLO, {**answer, field: value}, *HELLO]})
        assert str(error.param).startswith(f"messages.1.{field}") and f"'messages.1.{field}" in error.message


def test_a_call_is_taken_as_the_official_client_parses_and_streams_it() -> None:
    function = {**CALL["function"], "parsed_arguments": {"a": [1]}}
    call = ParsedFunctionToolCall(**{**CALL, "function": function, "index": 0})  # type: ignore[arg-type]  # fields are checked
    message = ParsedChatCompletionMessage[None](role="assistant", content="", tool_calls=[call])
    for sent in (message.model_dump(), message.to_dict()):
        chat = parsed(messages=[*HELLO, sent, {**RESULT, "name": "f"}])
        assert turns_of(chat)[1].tool_calls == (ToolCall("f", {}, "1"),)
    for wrong in ({"index": -1}, {"index": "0"}, {"function": {**function, "parsed_arguments": [1]}}):
        error = error_of({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, **wrong}]}, RESULT]})
        assert str(error.param).startswith(f"messages.1.tool_calls.0.{next(iter(wrong))}")


def test_texts_of_all_parts_are_read() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    for role in ("system", "developer", "user"):
        chat = parsed(messages=[{"role": role, "content": parts, "name": "n"}, *HELLO])
        assert [message.text for message in chat.messages] == ["ab", "hi"]


def test_of_two_limits_both_hold() -> None:
    assert parsed(max_tokens=5, max_completion_tokens=9).max_new_tokens == 5
    assert parsed(max_tokens=9, max_completion_tokens=5).max_new_tokens == 5
    assert parsed().max_new_tokens is None and parsed(stop="a").stops == ["a"] and parsed().stops == []


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1e-9, 2.1, "1", True, 10**400, []]),
        ("top_p", [0, 1.1, False]),
        ("top_k", [-1, 2**31, 0.5, True]),
        ("repetition_penalty", [0, -1, 1e-300, 1e300]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1, "0"]),
        ("seed", [2**63, -(2**63) - 1, 1.5, True]),
        ("n", [0, 17, True, 1.5, 1e300]),
        ("max_tokens", [0, -1, 1.5, "5", True, 10**4000]),
        ("max_completion_tokens", [0, 10.5, 2**31]),
        ("stop", ["", ["a"] * 5, [""], [1], 1, "a" * 1025]),
        ("stream", [0, 1, "true"]),
        ("store", [0]),
        ("logprobs", [0, 5]),
        ("model", ["m" * 1025, None, 1]),
        ("user", ["u" * 1025, 1]),
        ("safety_identifier", ["u" * 129]),
        ("metadata", [{str(n): "" for n in range(17)}, {"k" * 65: ""}, {"k": "v" * 513}, {"k": 1}, []]),
        ("messages", [[], {}, "hi", [1], [[]], [{}], [{"role": "robot", "content": "hi"}], [{"role": "tool", "content": ""}]]),
        ("messages", [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": []}]]),
        ("messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]]),
        ("messages", [[{"role": "user", "content": 5}], [{"role": "user", "content": "hi", "tool_calls": []}]]),
        ("messages", [HELLO * 101, [{"role": "user", "content": [{"type": "text", "text": ""}] * 101}]]),
        ("no_such_field", [None, 1]),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        error = error_of({field: value})
        assert str(error.param).startswith(field) and f"'{field}" in error.message, (value, error.message)
        assert len(error.message) < 1000


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a chat request"),
        (b"null", "not a chat request"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'"\xff"', "not JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"model": "a", "model": "b"}', "'model' comes twice"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' comes twice"),
        (b'{"model": "\\ud83d"}', "surrogate"),
        (b'{"\\uDC00": 1}', "surrogate"),
        (b'{"model": "\xed\xa0\x80"}', "not UTF-8 at byte 11"),
        ('{"model": "\ud800"}'.encode("utf-16", "surrogatepass"), "not UTF-16"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 1e400}', "'temperature'"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "'temperature'"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "top_p": -Infinity}', "'top_p'"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_told(body: bytes, told: str) -> None:
    assert told in error_of(body).message


def test_other_encodings_of_unicode_and_pairs_of_surrogates_are_read() -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "😀"}]})
    assert "\\ud83d\\ude00" in body
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_request(body.encode(encoding), max_items=1).messages[0].text == "😀"


def test_a_body_of_a_million_mistakes_costs_a_moment_and_a_short_answer() -> None:
    count = 100_000
    head = b'{"model":"m","messages":[{"role":"user","content":"a"}],'
    keys = b",".join(b'"a%d":1' % number for number in range(count))
    bodies = [
        head + keys + b"}",
        b'{"model":"m","messages":[{"role":"user","content":"a",' + keys + b"}]}",
        b'{"model":"m","messages":[' + b"[]," * count + b"1]}",
        head + b'"logit_bias":{' + keys + b"}}",
        head + b'"metadata":{' + keys + b"}}",
        head + b'"tools":[' + b"1," * count + b"1]}",
        head + b'"stop":[' + b"1," * count + b"1]}",
        head + b'"modalities":[' + b"1," * count + b"1]}",
        b'{"model":"' + b"m" * 10 * count + b'","messages":[]}',
        head + b'"' + b"x" * 10 * count + b'":1}',
    ]
    started = time.process_time()
    for body in bodies:
        error_of(body)
    assert time.process_time() - started < 3  # a tenth of it is usual
