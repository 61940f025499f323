"""Conversations as a list of turn objects: `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glmtuner.data.records import (
    MARKS,
    NUMBERS,
    REASONING,
    BadRecord,
    Example,
    Message,
    answer_turn,
    answered,
    as_rows,
    feedback_of,
    is_empty,
    list_of,
    mark_of,
    names_of,
    ranked,
    shown,
    system_turn,
    text_of,
    value_of,
)
from glmtuner.data.tools import (
    CALL_ROLES,
    RESULT_ROLES,
    Part,
    call_and_result,
    calls_in_turn,
    calls_of_answer,
    described,
    linked,
    result_text,
)

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "conversations"}
TAGS = {
    **{"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"},
    **{"function_tag": "function_call", "observation_tag": "observation"},
}
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "developer": "system"},
    **dict.fromkeys(CALL_ROLES, "calls"),  # a turn that is nothing but calls
    **dict.fromkeys(RESULT_ROLES, "tool"),
}
UNSUPPORTED = {  # parts of a turn that no template here renders
    **dict.fromkeys(("image", "images", "image_url"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios", "input_audio"), "sounds"),
    **dict.fromkeys(("file", "files", "documents"), "attached documents"),
    **dict.fromkeys(("train_detail", "training_detail"), "marks of parts of an answer"),
}
CONTENT_NAMES = {"system": "system prompt", "user": "prompt", "assistant": "answer"}
TOOL_KEYS = {
    "tool_calls": "assistant",
    "function_call": "assistant",
    "tools": "system",
}  # and the turns that they are keys of


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation; with `columns.chosen` and `columns.rejected`, two answers to its last turn.

    A system turn of the conversation takes precedence over `columns.system`. `columns.response`, a turn, a list of turns or
    a text, continues the conversation.
    """
    return conversation(raw, spec, TAGS | spec.tags)


def conversation(raw: dict[str, Any], spec: DatasetSpec, tags: dict[str, str]) -> Example:
    """The example of a record whose turns are objects, with the keys and role words of `tags`."""
    columns = spec.columns
    parts = parts_of(value_of(raw, columns["messages"]), spec, columns["messages"], tags)
    if not any(part.message.role == "system" for part in spoken(parts)[:1]):
        parts = [*(Part(*turn) for turn in system_turn(raw, columns.get("system"))), *parts]
    if "chosen" in columns:
        chosen, rejected = (
            answer(value_of(raw, columns[key]), parts, spec, columns[key], tags) for key in ("chosen", "rejected")
        )
        return with_parts(ranked(linked(spoken(parts)), chosen, rejected), parts)
    if "response" in columns:
        column, response = columns["response"], as_rows(value_of(raw, columns["response"]))
        if isinstance(response, list) and response:
            parts += parts_of(response, spec, column, tags)
        elif isinstance(response, dict):
            parts += parts_of_turn(response, spec, column, tags)
        else:
            parts.append(Part(column, Message("assistant", text_of(response, column, "answer"))))
    return with_parts(answered(linked(spoken(parts)), feedback_of(raw, columns.get("kto_tag"))), parts)


def with_parts(example: Example, parts: Sequence[Part]) -> Example:
    """The example with the descriptions of tools that a system turn of its parts holds; raises BadRecord."""
    holders = [part for part in parts if part.tools]
    if len(holders) > 1:
        raise BadRecord(
            f"{holders[1].place}.tools", f"tools in two system turns; those of {holders[0].place} come first"
        )
    return replace(example, tools=holders[0].tools) if holders else example


def spoken(parts: Sequence[Part]) -> list[Part]:
    """The parts without empty system turns."""
    return [part for part in parts if part.message.content or part.message.role != "system"]


def parts_of(value: Any, spec: DatasetSpec, column: str, tags: dict[str, str]) -> list[Part]:
    """The turns of a column that holds a list of turn objects; an answer before the last turn may be empty."""
    messages = list_of(value, column, "turns")
    last = len(messages) - 1
    return [
        part
        for index, message in enumerate(messages)
        for part in parts_of_turn(message, spec, f"{column}[{index}]", tags, is_last=index == last)
    ]


def parts_of_turn(
    message: Any, spec: DatasetSpec, place: str, tags: dict[str, str], *, is_last: bool = True
) -> list[Part]:
    """One turn object: a turn, or the call and the result of a ChatGLM3 turn; the content of an empty system turn is ""."""
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict):
        raise BadRecord(place, f"an object with {role_tag!r} and {content_tag!r} is expected, got {shown(message)}")
    if message.get(role_tag) is None:
        raise BadRecord(f"{place}.{role_tag}", f"missing; the turn has {names_of(message) or 'nothing'}")
    role = role_of(message[role_tag], place, tags)
    others = {} if len(message) == 2 and content_tag in message else _other_keys(message, spec, place, tags, role)
    content, where = message.get(content_tag), f"{place}.{content_tag}"
    if role == "tool" and content is None and "name" in others and message.keys() & {"parameters", "observation"}:
        weight, reasoning = weight_of(others, "assistant", place), reasoning_of(others, "assistant", place)
        return call_and_result(message, place, weight, reasoning, is_last=is_last)
    if role in ("calls", "tool"):
        part = _tool_part(role, content, others, place, where)
        names_call = part.name or part.message.call_id or message[role_tag] in ("tool", "function")
        return [part._replace(loose=role == "tool" and not names_call)]
    content = joined_parts(content, where)
    weight, reasoning = 1.0, ""
    if others:
        weight, reasoning = weight_of(others, role, place), reasoning_of(others, role, place)
    if role == "system":
        tools = described(others["tools"], f"{place}.tools") if "tools" in others else ()
        is_blank = content is None or (isinstance(content, str) and not content.strip())
        text = "" if is_blank else text_of(content, where, CONTENT_NAMES[role])
        return [Part(place, Message(role, text), tools=tools)]
    if role == "user":
        return [Part(place, Message(role, text_of(content, where, CONTENT_NAMES[role])))]
    calls = calls_of_answer(others, content, place) if others else ()
    if calls and not ({"tool_calls", "function_call"} & others.keys()):
        content = ""  # it is the call's arguments
    text = text_of(
        "" if calls and content is None else content,
        where,
        CONTENT_NAMES[role],
        may_be_blank=bool(calls) or not is_last,
    )
    return [Part(place, answer_turn(text, weight=weight, reasoning=reasoning, calls=calls))]


def _other_keys(
    message: dict[str, Any], spec: DatasetSpec, place: str, tags: dict[str, str], role: str
) -> dict[str, Any]:
    """What a turn has beside its role and content; raises BadRecord for what cannot be obeyed."""
    others = {
        key: message[key]
        for key in message.keys() - {tags["role_tag"], tags["content_tag"], *spec.ignore_columns}
        if not is_empty(message[key])
    }
    for key in sorted(others.keys() & UNSUPPORTED):
        raise BadRecord(
            f"{place}.{key}",
            f"{UNSUPPORTED[key]} are not supported; leave such records out, or type data.ignore_columns={key} to read them "
            f"without it",
        )
    for key in sorted(others.keys() & TOOL_KEYS):
        if role != TOOL_KEYS[key]:
            raise BadRecord(
                f"{place}.{key}",
                f"stands in a turn of {role}, and only a turn of {TOOL_KEYS[key]} has it; type data.ignore_columns={key} to "
                "read the turns without it",
            )
    return others


def _tool_part(role: str, content: Any, keys: dict[str, Any], place: str, where: str) -> Part:
    """A turn that is nothing but calls, or a result with the id or the name of its call."""
    if role == "calls":
        thought, calls = calls_in_turn(joined_parts(content, where) if _is_text_parts(content) else content, where)
        reasoning = reasoning_of(keys, "assistant", place) or thought
        return Part(
            place, answer_turn("", weight=weight_of(keys, "assistant", place), reasoning=reasoning, calls=calls)
        )
    weight_of(keys, role, place)
    reasoning_of(keys, role, place)
    call_id, name = (
        text_of(keys.get(key, ""), f"{place}.{key}", key, may_be_blank=True) for key in ("tool_call_id", "name")
    )
    return Part(place, Message(role, result_text(content, where), call_id=call_id), name.strip())


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content)


def weight_of(keys: dict[str, Any], role: str, place: str) -> float:
    """How much a turn is learned by its marks, 0 for not at all; of several the product. Raises BadRecord."""
    weight = 1.0
    for key in MARKS:
        mark = mark_of(keys.get(key), f"{place}.{key}", takes_numbers=key in NUMBERS)
        if mark is None:
            continue
        if mark and role != "assistant" and key in ("train", "training"):  # the others are of answers alone
            raise BadRecord(
                f"{place}.{key}",
                f"a turn of {role} is marked as learned, and only answers are; type data.ignore_columns={key} to learn "
                "all answers and nothing else",
            )
        weight *= mark
    return weight


def reasoning_of(keys: dict[str, Any], role: str, place: str) -> str:
    """The thought before an answer, under one of its names; "" if there is none. Raises BadRecord."""
    given = [key for key in REASONING if key in keys]
    if not given:
        return ""
    texts = {text_of(joined_parts(keys[key], f"{place}.{key}"), f"{place}.{key}", "reasoning") for key in given}
    if role != "assistant":
        raise BadRecord(f"{place}.{given[0]}", f"reasoning in a turn of {role}; only an answer has reasoning")
    if len(texts) > 1:
        raise BadRecord(f"{place}.{given[0]}", f"differs from {given[1]}; keep one of them")
    return texts.pop()


def role_of(word: Any, place: str, tags: dict[str, str]) -> str:
    """The standard name of a role; the tags take precedence over the names that the common formats use."""
    if word == tags["user_tag"]:
        return "user"
    if word == tags["assistant_tag"]:
        return "assistant"
    own = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    own |= {tags["function_tag"]: "calls", tags["observation_tag"]: "tool"}
    if isinstance(word, str) and (role := own.get(word) or ROLES.get(word)):
        return role
    raise BadRecord(f"{place}.{tags['role_tag']}", f"unknown role {shown(word)}; known: {', '.join(own)}")


def joined_parts(content: Any, place: str) -> Any:
    """The joined text of a content that is a list of text parts; any other content unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRecord(f"{place}[{index}]", f"a part of type 'text' is expected, got {shown(kind)}")
        texts.append(text_of(part.get("text"), f"{place}[{index}].text", "text", may_be_blank=True))
    return "".join(texts)


def answer(value: Any, before: Sequence[Part], spec: DatasetSpec, column: str, tags: dict[str, str]) -> Message:
    """One of two ranked answers to the turns before: a text, or the assistant's turn."""
    if isinstance(value, str):
        return Message("assistant", text_of(value, column, "answer"))
    if isinstance(value, list) and len(value) == 1:
        value, column = value[0], f"{column}[0]"
    parts = parts_of_turn(value, spec, column, tags)
    message = parts[-1].message
    if message.role != "assistant":
        raise BadRecord(
            f"{column}.{tags['role_tag']}", f"the answer must be the assistant's, got a turn of {message.role}"
        )
    if message.reasoning or not message.learned or message.weight != 1:
        marked = "has a weight of its own" if message.learned else "is marked as not learned"
        what = "has reasoning" if message.reasoning else marked
        raise BadRecord(column, f"the answer of a ranked pair {what}, which is not supported")
    return linked([*spoken(before), *parts])[-1][1] if message.tool_calls else message
