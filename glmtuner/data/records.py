"""Examples, the error of a record that cannot become one, and the checks that all formats share."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glmtuner.config.datasets import WEIGHTS
from glmtuner.templates.rendering import split_reasoning
from glmtuner.templates.tool_calls import SURROGATE, ToolCall


class BadRecord(Exception):
    """A record that cannot become an example: the field that is wrong ("" for the whole record), and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = printable(field)
        self.reason = printable(reason)


class Message(NamedTuple):
    """One turn; `role` is system, user, assistant, or tool (the result of a call).

    An answer that is not `learned` is context for those after it, and one that is counts `weight` times. `reasoning` is the
    thought before an answer, and `tool_calls` are the calls behind its text, which may be empty. `call_id` of a result is the id
    of its call.
    """

    role: str
    content: str
    learned: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """One record, ready for a chat template; the fields that are set determine its kind.

    Turns alternate between user and assistant after at most one system turn; between an answer with tool calls and the
    answer to their results stand the results, in the order of the calls. `tools` are the functions that the model may call,
    each as `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`.

    single answer   messages end with the assistant's answer
    ranked pair     messages end with the user's turn, or results of tools; `chosen` and `rejected` are the texts of the two
                    answers to it, `chosen_calls` and `rejected_calls` the calls behind them
    feedback        messages end with the assistant's answer; `desirable` is whether it is a good one
    plain text      no messages; `text` is learned

    A record that is not `learned`, by a mark of its own, is left out; one that is counts `weight` times.
    """

    messages: list[Message] = field(default_factory=list)
    chosen: str | None = None
    rejected: str | None = None
    desirable: bool | None = None
    text: str | None = None
    learned: bool = True
    tools: tuple[dict[str, Any], ...] = ()
    chosen_calls: tuple[ToolCall, ...] = ()
    rejected_calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0

    @property
    def needs_tools(self) -> bool:
        """Whether only a template that renders tools can render it: it has tools, calls, or results."""
        return bool(self.tools or self.chosen_calls or self.rejected_calls) or any(
            turn.role == "tool" or turn.tool_calls for turn in self.messages
        )

    @property
    def kind(self) -> str:
        """Its kind: plain text, ranked pairs, single answers or feedback."""
        if self.text is not None:
            return "plain text"
        if self.chosen is not None:
            return "ranked pairs"
        return "single answers" if self.desirable is None else "feedback"


UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # control characters, line breaks, halves of pairs
MARKS = (
    "weight",
    "loss",
    "train",
    "training",
)  # of OpenAI, ms-swift, axolotl: whether an answer is learned, and how much
NUMBERS = ("weight", "loss")  # those that may be other numbers than 0 and 1
REASONING = ("reasoning_content", "reasoning", "thinking")  # the thought before an answer, by its names
MARK_WORDS = {"": None, "true": True, "false": False, "1": True, "0": False}
Turn = tuple[str, Message]  # the place of a turn in its record, such as conversations[3], and the turn


def value_of(raw: Mapping[str, Any], column: str) -> Any:
    """The record's value in a required column; raises BadRecord."""
    if raw.get(column) is None:
        raise BadRecord(column, f"missing; the record has {names_of(raw) or 'nothing'}")
    return raw[column]


def text_of(value: Any, place: str, what: str, *, may_be_blank: bool = False) -> str:
    """`value` if it is text (not blank unless it may be), else raises BadRecord; `what` names it in the error, such as answer."""
    if value is None:
        raise BadRecord(place, f"missing {what}")
    if not isinstance(value, str):
        raise BadRecord(place, f"text is expected, got {shown(value)}")
    if not may_be_blank and not value.strip():
        raise BadRecord(place, f"empty {what}")
    if SURROGATE.search(value):
        raise BadRecord(place, "half of a surrogate pair, which is not a character and cannot be tokenized")
    return value


def answer_turn(content: str, *, weight: float = 1.0, reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> Message:
    """The assistant's turn; an empty answer, which only stands before other turns, is context and is not learned.

    An answer of weight 0 is context, too.
    """
    learned = weight > 0 and bool(calls or content.strip())
    return Message("assistant", content, learned, reasoning, calls, weight=weight if learned else 1.0)


def without_reasoning(message: Message) -> Message:
    """The turn without its thought, be it apart or in its content; an answer that was nothing else is context."""
    if message.role != "assistant":
        return message
    content = split_reasoning(message.content)[1]
    learned = message.learned and bool(content or message.tool_calls)
    return message._replace(content=content, reasoning="", learned=learned)


def optional_text(raw: Mapping[str, Any], column: str | None, what: str) -> str:
    """The text in a column that may be unnamed, missing, null or blank, in which cases it is ""."""
    value = raw.get(column) if column else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(value, str(column), what)


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, blank text, an empty list or object."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def as_rows(value: Any) -> Any:
    """Turns stored as one list for each of their keys, as `Sequence` of datasets does, as a list of turns; else the value."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def list_of(value: Any, place: str, what: str) -> list[Any]:
    """`value` if it is a list or the JSON text of one (a cell of CSV), else raises BadRecord; `what` names its items."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord(
                place,
                f"a list of {what} is expected, got {shown(value)}, which is not JSON; CSV cannot hold lists: save the "
                "dataset as jsonl or parquet",
            ) from None
    value = as_rows(value)
    if not isinstance(value, list | tuple):
        raise BadRecord(place, f"a list of {what} is expected, got {shown(value)}")
    return list(value)


def system_turn(raw: Mapping[str, Any], column: str | None) -> list[Turn]:
    """The system turn of a record that has it in a column of its own, as a list; an empty list if there is none."""
    content = optional_text(raw, column, "system prompt")
    return [(str(column), Message("system", content))] if content else []


def feedback_of(raw: Mapping[str, Any], column: str | None) -> bool | None:
    """Whether the answer is marked as a good one; None if the dataset has no such column. In CSV it is text."""
    if not column:
        return None
    value = value_of(raw, column)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise BadRecord(column, f"true or false is expected, got {shown(value)}")
    return value


def mark_of(value: Any, place: str, *, takes_numbers: bool) -> float | None:
    """How much an answer is learned, by its mark (`weight`, `loss`, `train`), 0 for not at all; None without a mark.

    `takes_numbers`: may it be another number than 0 and 1? Raises BadRecord.
    """
    number = MARK_WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if number is None or isinstance(number, bool):
        return None if number is None else float(number)
    if isinstance(number, str) and takes_numbers:  # a cell of CSV
        with suppress(ValueError):
            number = float(number)
    if isinstance(number, int | float) and (number in (0, 1) or (takes_numbers and WEIGHTS[0] <= number <= WEIGHTS[1])):
        return float(number)
    legal = (
        f"true, false, 0 or a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}" if takes_numbers else "0, 1, true or false"
    )
    raise BadRecord(
        place,
        f"a mark of what is learned is {legal}, got {shown(value)}; type "
        f"data.ignore_columns={place.rpartition('.')[2]} to learn without these marks",
    )


def answered(turns: Iterable[Turn], desirable: bool | None = None) -> Example:
    """The example of a conversation whose last turn is the answer; raises BadRecord."""
    places, messages = checked_turns(turns)
    if messages[-1].role != "assistant":
        what = "last user turn has" if messages[-1].role == "user" else "results of the last tool calls have"
        raise BadRecord(places[-1], f"the {what} no answer")
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        raise BadRecord(places[-1], "empty answer")
    return Example(messages, desirable=desirable)


def ranked(turns: Iterable[Turn], chosen: str | Message, rejected: str | Message) -> Example:
    """The example of a conversation with two answers to its last turn; raises BadRecord."""
    places, messages = checked_turns(turns)
    if messages[-1].role == "assistant":
        raise BadRecord(
            places[-1], "the conversation ends with an answer; in a ranked pair it ends with the user's turn"
        )
    better, worse = (Message("assistant", text) if isinstance(text, str) else text for text in (chosen, rejected))
    return Example(
        messages, chosen=better.content, rejected=worse.content,
        chosen_calls=better.tool_calls, rejected_calls=worse.tool_calls,
    )  # fmt: skip


def checked_turns(turns: Iterable[Turn]) -> tuple[list[str], list[Message]]:
    """Places and messages of turns in which user and assistant alternate and the user begins; raises BadRecord.

    Results of tools stand between the answer that calls them and the next answer. Several system turns at the start are
    joined by a line break.
    """
    places: list[str] = []
    messages: list[Message] = []
    for place, message in turns:
        previous = messages[-1].role if messages else ""
        if message.role == "system" and previous == "system":
            messages[-1] = Message("system", f"{messages[-1].content}\n{message.content}")
            continue
        if message.role == "system" and previous:
            raise BadRecord(place, "a system turn after the conversation has begun")
        if message.role == "assistant" and previous in ("", "system"):
            raise BadRecord(place, "the conversation starts with an assistant turn; the user's comes first")
        if message.role == "tool" and previous not in ("assistant", "tool"):
            raise BadRecord(place, "the result of a tool, and the turn before it calls none")
        if message.role == previous != "tool":
            raise BadRecord(place, f"two {message.role} turns in a row")
        if message.role == "user" and previous == "tool":
            raise BadRecord(
                place, "a user turn behind the results of tools; the assistant's answer to them comes first"
            )
        places.append(place)
        messages.append(message)
    if not messages or messages[-1].role == "system":
        raise BadRecord(places[-1] if places else "", "no user turn")
    return places, messages


def shown(value: Any) -> str:
    """A value as errors show it: at most 40 characters of it, and its type."""
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def printable(text: str) -> str:
    """The text with escapes for what breaks a line, controls a terminal, or cannot be encoded."""
    return UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def names_of(names: Iterable[Any], limit: int = 10) -> str:
    """Names from a file, separated by commas, as errors show them; of many the first `limit`, of a long one its start."""
    listing = [str(name) for name in names]
    cut = [name if len(name) <= 60 else f"{name[:57]}..." for name in listing[:limit]]
    more = f" and {len(listing) - limit} more" if len(listing) > limit else ""
    return printable(", ".join(cut)) + more
