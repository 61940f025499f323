"""Conversations as a list of turn objects: `{"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import (
    MARKS,
    REASONING,
    BadRecord,
    Example,
    Message,
    Turn,
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

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "conversations"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "developer": "system"},
}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "tool_call", "tool_response"}
UNSUPPORTED = {  # parts of a turn that no template here renders
    **dict.fromkeys(("tool_calls", "function_call", "tools", "functions"), "tool calls"),
    **dict.fromkeys(("image", "images", "image_url"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios", "input_audio"), "sounds"),
    **dict.fromkeys(("file", "files", "documents"), "attached documents"),
    **dict.fromkeys(("train_detail", "training_detail"), "marks of parts of an answer"),
}
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
    turns = turns_of(value_of(raw, columns["messages"]), spec, columns["messages"], tags)
    if not turns or turns[0][1].role != "system":
        turns = [*system_turn(raw, columns.get("system")), *turns]
    if "chosen" in columns:
        chosen, rejected = (
            answer(value_of(raw, columns[key]), spec, columns[key], tags) for key in ("chosen", "rejected")
        )
        return ranked(turns, chosen, rejected)
    if "response" in columns:
        column, response = columns["response"], as_rows(value_of(raw, columns["response"]))
        if isinstance(response, list) and response:
            turns += turns_of(response, spec, column, tags)
        elif isinstance(response, dict):
            turns.append(turn(response, spec, column, tags))
        else:
            turns.append((column, Message("assistant", text_of(response, column, "answer"))))
    return answered(turns, feedback_of(raw, columns.get("kto_tag")))


def turns_of(value: Any, spec: DatasetSpec, column: str, tags: dict[str, str]) -> list[Turn]:
    """The turns of a column that holds a list of turn objects; an answer before the last turn may be empty."""
    messages = list_of(value, column, "turns")
    last = len(messages) - 1
    turns = [
        turn(message, spec, f"{column}[{index}]", tags, is_last=index == last) for index, message in enumerate(messages)
    ]
    return [(place, message) for place, message in turns if message.role != "system" or message.content]


def turn(message: Any, spec: DatasetSpec, place: str, tags: dict[str, str], *, is_last: bool = True) -> Turn:
    """One turn object and its place in the record; the content of an empty system turn is ""."""
    role_tag, content_tag = tags["role_tag"], tags["content_tag"]
    if not isinstance(message, dict):
        raise BadRecord(place, f"an object with {role_tag!r} and {content_tag!r} is expected, got {shown(message)}")
    if message.get(role_tag) is None:
        raise BadRecord(f"{place}.{role_tag}", f"missing; the turn has {names_of(message) or 'nothing'}")
    others = {
        key: message[key]
        for key in message.keys() - {role_tag, content_tag, *spec.ignore_columns}
        if not is_empty(message[key])
    }
    for key in sorted(others.keys() & UNSUPPORTED):
        raise BadRecord(
            f"{place}.{key}",
            f"{UNSUPPORTED[key]} are not supported; leave such records out, or type data.ignore_columns={key} to read them "
            f"without it",
        )
    role = role_of(message[role_tag], f"{place}.{role_tag}", tags)
    content = joined_parts(message.get(content_tag), f"{place}.{content_tag}")
    learned = learned_of(others, role, place)
    reasoning = reasoning_of(others, role, place)
    if role == "system":
        if content is None or (isinstance(content, str) and not content.strip()):
            return place, Message(role, "")
        return place, Message(role, text_of(content, f"{place}.{content_tag}", CONTENT_NAMES[role]))
    may_be_blank = role == "assistant" and not is_last
    text = text_of(content, f"{place}.{content_tag}", CONTENT_NAMES[role], may_be_blank=may_be_blank)
    if role == "assistant":
        return place, answer_turn(text, learned=learned, reasoning=reasoning)
    return place, Message(role, text)


def learned_of(keys: dict[str, Any], role: str, place: str) -> bool:
    """Whether a turn is learned by its marks; all of several have to say so. Raises BadRecord."""
    learned = True
    for key in MARKS:
        if (mark := mark_of(keys.get(key), f"{place}.{key}")) is None:
            continue
        if mark and role != "assistant" and key in ("train", "training"):  # the others are of answers alone
            raise BadRecord(
                f"{place}.{key}",
                f"a turn of {role} is marked as learned, and only answers are; type data.ignore_columns={key} to learn "
                "all answers and nothing else",
            )
        learned &= mark
    return learned


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
    own = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    roles = ROLES | own
    if isinstance(word, str) and word in roles:
        return roles[word]
    if isinstance(word, str) and word in {*TOOL_ROLES, tags.get("observation_tag"), tags.get("function_tag")}:
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
        texts.append(text_of(part.get("text"), f"{place}[{index}].text", "text", may_be_blank=True))
    return "".join(texts)


def answer(value: Any, spec: DatasetSpec, column: str, tags: dict[str, str]) -> str:
    """One of two ranked answers: a text, or the assistant's turn."""
    if isinstance(value, str):
        return text_of(value, column, "answer")
    if isinstance(value, list) and len(value) == 1:
        value, column = value[0], f"{column}[0]"
    _, message = turn(value, spec, column, tags)
    if message.role != "assistant":
        raise BadRecord(
            f"{column}.{tags['role_tag']}", f"the answer must be the assistant's, got a turn of {message.role}"
        )
    if message.reasoning or not message.learned:
        what = "has reasoning" if message.reasoning else "is marked as not learned"
        raise BadRecord(column, f"the answer of a ranked pair {what}, which is not supported")
    return message.content
