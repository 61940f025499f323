"""Conversations as a list of turn objects: `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import (
    BadRecord,
    Example,
    Message,
    Turn,
    answered,
    feedback_of,
    list_of,
    ranked,
    shown,
    system_turn,
    text_of,
    value_of,
)

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "conversations"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "tool_call", "tool_response"}
CONTENT_NAMES = {"system": "system prompt", "user": "prompt", "assistant": "answer"}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation; with `columns.chosen` and `columns.rejected`, two answers to its last turn.

    A system turn of the conversation takes precedence over `columns.system`. `columns.response`, a turn, a list of turns or
    a text, continues the conversation.
    """
    return conversation(raw, spec, TAGS | spec.tags)


def conversation(raw: dict[str, Any], spec: DatasetSpec, tags: dict[str, str]) -> Example:
    """The example of a record whose turns are objects, with the keys and role words of `tags`."""
    columns = spec.columns
    turns = turns_of(value_of(raw, columns["messages"]), columns["messages"], tags)
    if turns and turns[0][1].role != "system":
        turns = [*system_turn(raw, columns.get("system")), *turns]
    if "chosen" in columns:
        chosen, rejected = (answer(value_of(raw, columns[key]), columns[key], tags) for key in ("chosen", "rejected"))
        return ranked(turns, chosen, rejected)
    if "response" in columns:
        column, response = columns["response"], value_of(raw, columns["response"])
        if isinstance(response, list) and response:
            turns += turns_of(response, column, tags)
        else:
            turns.append((column, Message("assistant", answer(response, column, tags))))
    return answered(turns, feedback_of(raw, columns.get("kto_tag")))


def turns_of(value: Any, column: str, tags: dict[str, str]) -> list[Turn]:
    """The turns of a column that holds a list of turn objects."""
    messages = list_of(value, column, "turns")
    return [turn(message, f"{column}[{index}]", tags) for index, message in enumerate(messages)]


def turn(message: Any, place: str, tags: dict[str, str]) -> Turn:
    """One turn object and its place in the record."""
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict):
        raise BadRecord(place, f"an object with {role_tag!r} and {content_tag!r} is expected, got {shown(message)}")
    if message.get(role_tag) is None:
        raise BadRecord(f"{place}.{role_tag}", f"missing; the turn has {', '.join(message) or 'nothing'}")
    if message.get("tool_calls"):
        raise BadRecord(f"{place}.tool_calls", "tool calls are not supported; leave such records out")
    role = role_of(message[role_tag], f"{place}.{role_tag}", tags)
    content = joined_parts(message.get(content_tag), f"{place}.{content_tag}")
    return place, Message(role, text_of(content, f"{place}.{content_tag}", CONTENT_NAMES[role]))


def role_of(word: Any, place: str, tags: dict[str, str]) -> str:
    """The standard name of a role; the tags take precedence over the names that the common formats use."""
    own = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    roles = ROLES | own
    if isinstance(word, str) and word in roles:
        return roles[word]
    if word in (tags.get("observation_tag"), tags.get("function_tag")) or (
        isinstance(word, str) and word in TOOL_ROLES
    ):
        raise BadRecord(place, f"a tool turn ({word!r}); tool calls are not supported, leave such records out")
    raise BadRecord(place, f"unknown role {shown(word)}; known: {', '.join(own)}")


def joined_parts(content: Any, place: str) -> Any:
    """The joined text of a content that is a list of text parts; any other content unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRecord(f"{place}[{index}]", f"a part of type 'text' is expected, got {shown(kind)}")
        texts.append(text_of(part.get("text"), f"{place}[{index}].text", "text"))
    return "".join(texts)


def answer(value: Any, column: str, tags: dict[str, str]) -> str:
    """One of two ranked answers: a text, or the assistant's turn."""
    if isinstance(value, str):
        return text_of(value, column, "answer")
    if isinstance(value, list) and len(value) == 1:
        value, column = value[0], f"{column}[0]"
    _, message = turn(value, column, tags)
    if message.role != "assistant":
        raise BadRecord(
            f"{column}.{tags['role_tag']}", f"the answer must be the assistant's, got a turn of {message.role}"
        )
    return message.content
