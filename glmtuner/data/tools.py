"""Tools in records: descriptions, calls and results as datasets write them, in the one form of `Message` and `Example`.

Read are OpenAI's form (`tool_calls`, role `tool`), turns of `function_call` and `observation` (sharegpt), GLM-4's (`metadata`, or
the call as JSON in the answer's text, role `observation`), and ChatGLM3's (a turn of `tool` with a call and its result).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from glmtuner.data.raw import Unreadable, parsed
from glmtuner.data.records import (
    BadRecord,
    Example,
    Message,
    Turn,
    answer_turn,
    as_rows,
    is_empty,
    list_of,
    names_of,
    shown,
    text_of,
)
from glmtuner.templates.rendering import split_reasoning
from glmtuner.templates.tool_calls import ONE_NAME, ToolCall, is_writable, syntax

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

CALL_ROLES = {"function_call", "function-call", "tool_call"}
RESULT_ROLES = {"observation", "tool", "function", "tool_response", "function_response", "function-response"}
ARGUMENTS = ("arguments", "parameters")  # names of a call's arguments
OF_CALLS = {"id", "type", "index", "name", "description", *ARGUMENTS}  # keys of a call
Tools = tuple[dict[str, Any], ...]


class Part(NamedTuple):
    """A turn before calls and results are brought together: its place, and the message.

    `name` is the tool of a result, where the result names it, and `tools` are the descriptions that a system turn holds. A
    result may be `loose`, behind an answer that calls nothing, in formats whose turns of results name no call.
    """

    place: str
    message: Message
    name: str = ""
    tools: Tools = ()
    loose: bool = False


# descriptions


def with_tools(example: Example, raw: Mapping[str, Any], spec: DatasetSpec) -> Example:
    """The example with the descriptions of tools that its record has in a column of its own; raises BadRecord."""
    column = spec.columns.get("tools")
    if column is None or is_empty(raw.get(column)):
        return example
    tools = described(raw[column], column, column)
    if example.tools and tools and example.tools != tools:
        raise BadRecord(column, "differs from the tools of the system turn; keep one of them")
    return replace(example, tools=tools) if tools else example


def keys_read(turn: Mapping[str, Any], spec: DatasetSpec) -> set[str]:
    """The keys of a turn's object, beside role and content, that its tools, calls or result are read from."""
    word = turn.get(spec.tags.get("role_tag") or ("from" if spec.formatting == "sharegpt" else "role"))
    if word in RESULT_ROLES or word == spec.tags.get("observation_tag", ""):
        keys = {"tool_call_id", "name", "parameters", "observation"}
    else:
        keys = {"tool_calls", "function_call", "tools", *(["metadata"] if names_tool(turn) else [])}
    return keys - {*spec.ignore_columns}


def described(value: Any, place: str, key: str = "tools") -> Tools:
    """The descriptions of tools in OpenAI's form, of a list of them or of its JSON; raises BadRecord.

    Each is in OpenAI's form or the bare function: an object with a name, and mostly a description and parameters. `key` is
    the column, or the key of the turn, that holds them.
    """
    try:
        return _described_all(value, place)
    except BadRecord as error:
        raise BadRecord(
            error.field, f"{error.reason}; type data.ignore_columns={key} to learn without the descriptions of tools"
        ) from None


def _described_all(value: Any, place: str) -> Tools:
    value = _of_json(value, place, "a list of descriptions of tools")
    if is_empty(value):
        return ()
    value = as_rows(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRecord(place, f"a list of descriptions of tools is expected, got {shown(value)}")
    return tuple(_described(tool, f"{place}[{index}]") for index, tool in enumerate(value))


def _described(tool: Any, place: str) -> dict[str, Any]:
    tool = _of_json(tool, place, "the description of a tool")
    if not isinstance(tool, dict):
        raise BadRecord(place, f"the description of a tool is an object with its name, got {shown(tool)}")
    if tool.get("type") not in (None, "function"):
        raise BadRecord(
            f"{place}.type",
            f"a tool of type {shown(tool['type'])}, and only functions are supported",
        )
    inner = tool.get("function")
    function = inner if isinstance(inner, dict) else {key: part for key, part in tool.items() if key != "type"}
    others = {key: part for key, part in tool.items() if key not in ("type", "function")} if function is inner else {}
    where = f"{place}.function" if function is inner else place
    function = {key: part for key, part in function.items() if part is not None}
    text_of(function.get("name"), f"{where}.name", "name of a tool")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _of_json(function["parameters"], f"{where}.parameters", "the parameters of a tool")
    if not is_writable([function, others]):
        raise BadRecord(where, "holds a value that JSON in UTF-8 has not, such as NaN or half of a surrogate pair")
    return {"type": "function", "function": function, **others}


# calls


def calls_of(value: Any, place: str) -> tuple[ToolCall, ...]:
    """The calls of `tool_calls`: a list of calls, a call, or the JSON of either; raises BadRecord."""
    value = _of_json(value, place, "a list of calls")
    calls = [value] if isinstance(value, dict) and as_rows(value) is value else list_of(value, place, "calls")
    return tuple(call_of(call, f"{place}[{index}]") for index, call in enumerate(calls))


def call_of(value: Any, place: str) -> ToolCall:
    """A call, of an object with a name and arguments, or in OpenAI's form; raises BadRecord."""
    value = _of_json(value, place, "a call")
    if not isinstance(value, dict):
        raise BadRecord(place, f"a call is an object with name and arguments, got {shown(value)}")
    if value.get("type") not in (None, "function", "tool_call"):
        raise BadRecord(f"{place}.type", f"a call of type {shown(value['type'])}, and only functions are supported")
    call_id = value.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise BadRecord(f"{place}.id", f"text is expected, got {shown(call_id)}")
    function, where = value, place
    if isinstance(value.get("function"), dict):
        function, where = value["function"], f"{place}.function"
    name = text_of(function.get("name"), f"{where}.name", "name of a tool").strip()
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    others = [key for key in function if key not in OF_CALLS and not is_empty(function[key])]
    if len(given) > 1 or (not given and others):
        listing = names_of([*given, *others])
        raise BadRecord(where, f"one of {' and '.join(ARGUMENTS)} is expected; the call has {listing}")
    arguments = arguments_of(function[given[0]], f"{where}.{given[0]}") if given else {}
    return ToolCall(name, arguments, text_of(call_id or "", f"{place}.id", "id", may_be_blank=True))


def arguments_of(value: Any, place: str) -> dict[str, Any]:
    """The arguments of a call: an object, its JSON, or none; raises BadRecord."""
    arguments = value
    if isinstance(value, str):
        try:
            arguments = parsed(value) if value.strip() else {}
        except (json.JSONDecodeError, Unreadable):
            arguments = None
    if not isinstance(arguments, dict) or not is_writable(arguments):
        raise BadRecord(
            place,
            f"the arguments of a call are a JSON object, got {shown(value)}; mend them, or leave the record out",
        )
    return arguments


def calls_in_turn(content: Any, place: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The thought and the calls of a turn that is nothing but calls: a call, a list of calls, or the JSON of either."""
    reasoning = ""
    if isinstance(content, str):
        reasoning, content = split_reasoning(content)
        text_of(content, place, "call")
    calls = calls_of(content, place)
    if not calls:
        raise BadRecord(place, "an empty list of calls")
    return reasoning, calls


def calls_of_answer(keys: Mapping[str, Any], content: Any, place: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn with these keys beside its content, whose text is its arguments with `metadata`."""
    given = [key for key in ("tool_calls", "function_call") if key in keys]
    given += ["metadata"] if names_tool(keys) else []
    if len(given) > 1:
        raise BadRecord(place, f"calls in {names_of(given)}; keep one of them")
    if given == ["function_call"]:
        return (call_of(keys["function_call"], f"{place}.function_call"),)
    if given == ["tool_calls"]:
        return calls_of(keys["tool_calls"], f"{place}.tool_calls")
    if not given:
        return ()
    try:
        return (ToolCall(keys["metadata"].strip(), arguments_of(content, place)),)
    except BadRecord:
        raise BadRecord(
            f"{place}.metadata",
            f"names the tool {shown(keys['metadata'])}, and the turn's text is not the JSON object of its arguments; type "
            "data.ignore_columns=metadata to learn the text without it",
        ) from None


def names_tool(turn: Mapping[str, Any]) -> bool:
    """Whether a turn names a tool in its `metadata`, as in GLM-4's format."""
    metadata = turn.get("metadata")
    return isinstance(metadata, str) and ONE_NAME.fullmatch(metadata.strip()) is not None


def call_and_result(turn: Mapping[str, Any], place: str, weight: float, reasoning: str, *, is_last: bool) -> list[Part]:
    """The call and its result of a turn of ChatGLM3's format: name, parameters and observation; raises BadRecord."""
    name = text_of(turn.get("name"), f"{place}.name", "name of a tool").strip()
    parameters = turn.get("parameters")
    arguments = arguments_of({} if parameters is None else parameters, f"{place}.parameters")
    call = Part(place, answer_turn("", weight=weight, reasoning=reasoning, calls=(ToolCall(name, arguments),)))
    if turn.get("observation") is None:
        if is_last:
            return [call]
        raise BadRecord(f"{place}.observation", "missing result of the call")
    return [call, Part(place, Message("tool", result_text(turn["observation"], f"{place}.observation")))]


def result_text(value: Any, place: str) -> str:
    """The text of a result: as it is, its parts of text joined, or the JSON of any other value; raises BadRecord."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and part.get("type") == "text" for part in value)
    ):
        value = "".join(text_of(part.get("text"), place, "text", may_be_blank=True) for part in value)
    if value is not None and not isinstance(value, str):
        if not is_writable(value):
            raise BadRecord(place, f"a result is text or JSON, got {shown(value)}")
        value = json.dumps(value, ensure_ascii=False)
    return text_of(value, place, "result of a tool", may_be_blank=True)


# turns


def linked(parts: Sequence[Part]) -> list[Turn]:
    """The turns: calls behind the text of their answer, and their results in the order of the calls; raises BadRecord.

    Calls without an id get one: call00001 and so on.
    """
    if not any(part.message.tool_calls or part.message.role == "tool" for part in parts):
        return [(part.place, part.message) for part in parts]
    joined = _joined(parts)
    given = {call.id for part in joined for call in part.message.tool_calls if call.id}
    fresh = (name for number in count(1) if (name := f"call{number:05}") not in given)
    turns: list[Turn] = []
    for is_result, group in groupby(joined, key=lambda part: part.message.role == "tool"):
        if not is_result:
            turns += [(part.place, _numbered(part.message, fresh)) for part in group]
            continue
        results = list(group)
        place, answer = turns[-1] if turns else ("", Message("system", ""))
        if answer.role == "assistant" and not answer.tool_calls:  # GLM-4: the call is the text of the answer
            answer = _numbered(_as_call(answer), fresh)
            turns[-1] = place, answer
        if not answer.tool_calls and answer.role == "assistant" and len(results) == 1 and results[0].loose:
            turns.append((results[0].place, results[0].message))
            continue
        if not answer.tool_calls:
            raise BadRecord(
                results[0].place,
                "the result of a tool, and the turn before it calls none; leave the result out, or write the call",
            )
        turns += _ordered(answer.tool_calls, results, given)
    return turns


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with calls that stand in turns of their own behind the assistant's as calls of that turn."""
    joined: list[Part] = []
    for part in parts:
        message, before = part.message, joined[-1].message if joined else None
        if before is None or before.role != "assistant" or not message.tool_calls or message.content.strip():
            joined.append(part)
            continue
        if before.reasoning and message.reasoning:
            raise BadRecord(part.place, "reasoning in the answer and in the turn of its call; keep one of them")
        says_something = bool(before.content.strip() or before.tool_calls)
        if says_something and (before.learned, before.weight) != (message.learned, message.weight):
            raise BadRecord(
                part.place,
                "a call is marked otherwise than the answer that it belongs to; type data.ignore_columns=loss (or the name of "
                "your mark) to learn both",
            )
        whole = before._replace(
            tool_calls=(*before.tool_calls, *message.tool_calls),
            learned=message.learned,
            weight=message.weight,
            reasoning=before.reasoning or message.reasoning,
        )
        joined[-1] = joined[-1]._replace(message=whole)
    return joined


def _numbered(message: Message, fresh: Iterator[str]) -> Message:
    """The message, its calls without an id with the next one."""
    calls = message.tool_calls
    if all(call.id for call in calls):
        return message
    return message._replace(tool_calls=tuple(call if call.id else replace(call, id=next(fresh)) for call in calls))


def _as_call(answer: Message) -> Message:
    """The answer as a call, if its text is one: JSON with name and arguments, or a name and below it the arguments' JSON."""
    thought, text = split_reasoning(answer.content)
    try:
        calls = calls_of(text, "") if text.lstrip().startswith(("{", "[")) else ()
    except BadRecord:
        calls = ()
    calls = calls or tuple(syntax("glm4").read(text, ()) or ())
    if not calls:
        return answer
    return answer._replace(content="", reasoning=answer.reasoning or thought, tool_calls=calls)


def _ordered(calls: Sequence[ToolCall], results: Sequence[Part], given: set[str]) -> list[Turn]:
    """The results in the order of their calls, each with the id of its call; raises BadRecord.

    A result belongs to the call with its id; without one to the first call that has none yet, of its name if it has one.
    """
    places = {call.id: index for index, call in enumerate(calls)}
    if len(places) < len(calls):
        raise BadRecord(results[0].place, "two calls with the same id, so that their results cannot be told apart")
    if len(results) == 1 and len(calls) > 1 and not results[0].name and not results[0].message.call_id:
        results = _shared(results[0], len(calls))
        if len(results) == 1:  # one text for all calls
            return [(results[0].place, results[0].message._replace(call_id=calls[0].id))]
    if len(results) > len(calls):
        raise BadRecord(results[len(calls)].place, f"{len(results)} results of {len(calls)} calls")
    has_ids = any(call.id in given for call in calls)
    found: dict[int, Turn] = {}
    for place, message, name, *_ in results:
        if message.call_id and has_ids:
            index = places.get(message.call_id, -1)
            if index < 0:
                raise BadRecord(
                    f"{place}.tool_call_id", f"no call with the id {shown(message.call_id)}; known: {names_of(places)}"
                )
            if index in found:
                raise BadRecord(f"{place}.tool_call_id", f"a second result of the call {shown(message.call_id)}")
        else:
            index = next((at for at in range(len(calls)) if at not in found and name in ("", calls[at].name)), -1)
            if index < 0:
                called = names_of(call.name for call in calls)
                raise BadRecord(place, f"the result of {shown(name)}, and the answer before it calls {called}")
        found[index] = place, message._replace(call_id=calls[index].id)
    missing = [call.name for index, call in enumerate(calls) if index not in found]
    if missing:
        raise BadRecord(results[-1].place, f"no result of the call of {names_of(missing)}")
    return [found[index] for index in range(len(calls))]


def _shared(result: Part, num_calls: int) -> list[Part]:
    """A result for each call, if the only one is the JSON of a list of them; else the one."""
    try:
        values = parsed(result.message.content)
    except (json.JSONDecodeError, Unreadable):
        return [result]
    if not isinstance(values, list) or len(values) != num_calls:
        return [result]
    return [
        result._replace(
            message=result.message._replace(content=result_text("null" if value is None else value, result.place))
        )
        for value in values
    ]


def _of_json(value: Any, place: str, what: str) -> Any:
    """The value that a text is the JSON of (None of a blank one), and any other value as it is; raises BadRecord."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value) if value.strip() else None
    except (json.JSONDecodeError, Unreadable):
        raise BadRecord(place, f"{what} is expected, or its JSON, got {shown(value)}") from None
