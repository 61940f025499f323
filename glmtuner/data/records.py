"""What a dataset's records become, the reason one of them cannot, and the checks that all record shapes share."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


class BadRecord(Exception):
    """A record that cannot become an example: the field that is wrong (may be "") and what is wrong with it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One record, ready for a chat template; which fields are set says what it can teach.

    Turns alternate between user and assistant after at most one system turn.

    single answer   messages end with the assistant's answer
    ranked pair     messages end with the user's turn; `chosen` and `rejected` are the two answers to it
    feedback        messages end with the assistant's answer; `desirable` says whether it was a good one
    plain text      no messages; `text` is what to learn
    """

    messages: list[Message] = field(default_factory=list)
    chosen: str | None = None
    rejected: str | None = None
    desirable: bool | None = None
    text: str | None = None

    @property
    def kind(self) -> str:
        """What it can teach, in words."""
        if self.text is not None:
            return "plain text"
        if self.chosen is not None:
            return "ranked pairs"
        return "single answers" if self.desirable is None else "feedback"


SURROGATE = re.compile("[\ud800-\udfff]")
Turn = tuple[str, Message]  # the place of a turn in its record, such as conversations[3], and the turn


def value_of(raw: Mapping[str, Any], column: str) -> Any:
    """The record's value in a column that it must have."""
    if raw.get(column) is None:
        raise BadRecord(column, f"missing; the record has {', '.join(map(str, raw)) or 'nothing'}")
    return raw[column]


def text_of(value: Any, place: str, what: str) -> str:
    """`value` when it is text with something in it; `what` names it in the error, such as answer."""
    if value is None:
        raise BadRecord(place, f"missing {what}")
    if not isinstance(value, str):
        raise BadRecord(place, f"text is expected, got {shown(value)}")
    if not value.strip():
        raise BadRecord(place, f"empty {what}")
    if SURROGATE.search(value):
        raise BadRecord(place, "half of a surrogate pair, which is no character and cannot be tokenized")
    return value


def optional_text(raw: Mapping[str, Any], column: str | None, what: str) -> str:
    """The text in a column that may be unnamed, absent, null or blank; blank text comes back as ""."""
    value = raw.get(column) if column else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(value, str(column), what)


def list_of(value: Any, place: str, what: str) -> list[Any]:
    """`value` when it is a list; `what` says of what, for the error."""
    if not isinstance(value, list | tuple):
        raise BadRecord(place, f"a list of {what} is expected, got {shown(value)}")
    return list(value)


def system_turn(raw: Mapping[str, Any], column: str | None) -> list[Turn]:
    """The system turn of a record that keeps it in a column of its own; nothing when it has none."""
    content = optional_text(raw, column, "system prompt")
    return [(str(column), Message("system", content))] if content else []


def feedback_of(raw: Mapping[str, Any], column: str | None) -> bool | None:
    """Whether the answer was a good one; None when the dataset has no such column. CSV writes it as text."""
    if not column:
        return None
    value = value_of(raw, column)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise BadRecord(column, f"true or false is expected, got {shown(value)}")
    return value


def answered(turns: Iterable[Turn], desirable: bool | None = None) -> Example:
    """The example of a conversation whose last turn is the answer."""
    places, messages = in_order(turns)
    if messages[-1].role == "user":
        raise BadRecord(places[-1], "the last user turn has no answer")
    return Example(messages, desirable=desirable)


def ranked(turns: Iterable[Turn], chosen: str, rejected: str) -> Example:
    """The example of a conversation whose last turn is answered twice."""
    places, messages = in_order(turns)
    if messages[-1].role != "user":
        raise BadRecord(
            places[-1], "the conversation ends with an answer; of a ranked pair it ends with the user's turn"
        )
    return Example(messages, chosen=chosen, rejected=rejected)


def in_order(turns: Iterable[Turn]) -> tuple[list[str], list[Message]]:
    """Places and messages, after a check that user and assistant take turns and the user begins.

    Several system turns at the start become one, joined by a line break.
    """
    places: list[str] = []
    messages: list[Message] = []
    for place, message in turns:
        before = messages[-1].role if messages else ""
        if message.role == "system" and before == "system":
            messages[-1] = Message("system", f"{messages[-1].content}\n{message.content}")
            continue
        if message.role == "system" and before:
            raise BadRecord(place, "a system turn after the conversation has begun")
        if message.role == "assistant" and before in ("", "system"):
            raise BadRecord(place, "the conversation starts with an assistant turn; the user's comes first")
        if message.role == before:
            raise BadRecord(place, f"two {message.role} turns in a row")
        places.append(place)
        messages.append(message)
    if not messages or messages[-1].role == "system":
        raise BadRecord(places[-1] if places else "", "no user turn")
    return places, messages


def shown(value: Any) -> str:
    """A value as an error shows it: cut to one short line, with its type."""
    written = repr(value)
    return f"{written if len(written) <= 40 else written[:37] + '...'} ({type(value).__name__})"
