"""Conversations as a list of texts, beginning with the user's: `{"turns": ["Hi", "Hello!", "Who are you?", "…"]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import (
    Example,
    Message,
    answer_turn,
    answered,
    feedback_of,
    list_of,
    system_turn,
    text_of,
    value_of,
)

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "turns"}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation whose even entries are the user's and whose odd entries are the assistant's."""
    column = spec.columns["messages"]
    turns = system_turn(raw, spec.columns.get("system"))
    contents = list_of(value_of(raw, column), column, "texts")
    for index, content in enumerate(contents):
        place = f"{column}[{index}]"
        if index % 2:
            turns.append(
                (place, answer_turn(text_of(content, place, "answer", may_be_blank=index + 1 < len(contents))))
            )
        else:
            turns.append((place, Message("user", text_of(content, place, "prompt"))))
    return answered(turns, feedback_of(raw, spec.columns.get("kto_tag")))
