"""Dialogues as one text, each turn after a marker.

    Human: What is 1 + 1?
    Assistant: 2
    Human: And 2 + 2?
    Assistant:

The answer to the last turn is in a column of its own, or part of the dialogue, or (ranked pairs) two columns hold
dialogues that share all but the last answer. White space around each turn is stripped. A marker that begins with a letter
or digit is matched only at the start of a line; any other, such as `### Human:`, is matched anywhere. A marker that ends
in a letter or digit must be followed by a colon.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from glmtuner.data.formats.alpaca import prompt
from glmtuner.data.records import (
    BadRecord,
    Example,
    Message,
    Turn,
    answer_turn,
    answered,
    feedback_of,
    ranked,
    shown,
    system_turn,
    text_of,
    value_of,
)

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"prompt": "instruction", "response": "output"}
TAGS = {"user_tag": "Human", "assistant_tag": "Assistant"}
ROLES = {"user_tag": ("user", "prompt"), "assistant_tag": ("assistant", "answer"), "system_tag": ("system", "text")}
COLONS = ":\uff1a"  # ASCII and full width


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation; the prompt column holds all of it if the entry names no column for the answer.

    A query column, if the entry names one, continues the text of the prompt column.
    """
    columns = spec.columns
    tags = TAGS | spec.tags
    system = system_turn(raw, columns.get("system"))
    if "prompt" not in columns:
        texts = [text_of(value_of(raw, columns[key]), columns[key], "dialogue") for key in ("chosen", "rejected")]
        chosen, rejected = dialogue(texts[0], columns["chosen"], tags), dialogue(texts[1], columns["rejected"], tags)
        return ranked([*system, *chosen[:-1]], *pair(chosen, rejected))
    keys = [key for key in ("chosen", "rejected", "response") if key in columns]
    text = prompt(raw, spec)
    turns = [*system, *dialogue(text, columns["prompt"], tags, awaits_answer=bool(keys))]
    answers = [text_of(value_of(raw, columns[key]), columns[key], "answer").strip() for key in keys]
    if "chosen" in columns:
        return ranked(turns, answers[0], answers[1])
    if answers:
        turns.append((columns["response"], Message("assistant", answers[0])))
    return answered(turns, feedback_of(raw, columns.get("kto_tag")))


def dialogue(text: str, column: str, tags: dict[str, str], awaits_answer: bool = False) -> list[Turn]:
    """The turns of a dialogue; with `awaits_answer` it may end in an assistant marker without text."""
    tag_of = {marker.strip().rstrip(COLONS): key for key, marker in tags.items() if key in ROLES}
    before, *parts = marker_pattern(tuple(tag_of)).split(text)
    if before.strip():
        raise BadRecord(column, f"the dialogue begins with {shown(before.strip())}, not with {tags['user_tag']!r}")
    contents = [content.strip() for content in parts[1::2]]
    turns: list[Turn] = []
    for number, (marker, content) in enumerate(zip(parts[::2], contents, strict=True), start=1):
        role, what = ROLES[tag_of[marker.strip()]]
        if awaits_answer and number == len(contents) and role == "assistant" and not content:
            break
        place = f"{column} (turn {number})"
        if role == "assistant":
            message = answer_turn(text_of(content, place, what, may_be_blank=number < len(contents)))
        elif role == "system" and not content:
            continue
        else:
            message = Message(role, text_of(content, place, what))
        turns.append((place, message))
    return turns


def pair(chosen: list[Turn], rejected: list[Turn]) -> tuple[str, str]:
    """The last answers of two dialogues; raises BadRecord if the turns before them differ."""
    if not chosen or not rejected:
        raise BadRecord("", "no user turn")
    if [message for _, message in chosen[:-1]] != [message for _, message in rejected[:-1]]:
        raise BadRecord(rejected[-1][0], "the turns before this answer differ from those of the chosen dialogue")
    for place, message in (chosen[-1], rejected[-1]):
        if message.role != "assistant":
            raise BadRecord(place, "the last user turn has no answer")
    return chosen[-1][1].content, rejected[-1][1].content


@cache
def marker_pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the markers with their colons; the group is the marker without its colon, with leading white space."""
    starts = [r"^[ \t]*" if marker[:1].isalnum() else "" for marker in markers]
    ends = [rf"(?=[ \t]*[{COLONS}])" if marker[-1:].isalnum() else "" for marker in markers]
    options = "|".join(
        start + re.escape(marker) + end for start, marker, end in zip(starts, markers, ends, strict=True)
    )
    return re.compile(rf"({options})[ \t]*[{COLONS}]?", re.MULTILINE)
