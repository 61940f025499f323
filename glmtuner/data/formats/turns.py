"""Conversations as a list of texts, beginning with the user's: `{"turns": ["Hi", "Hello!", "Who are you?", "…"]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import Example, Message, answered, feedback_of, list_of, system_turn, text_of, value_of

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "turns"}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation whose even entries are the user's and whose odd entries are the assistant's."""
    column = spec.columns["messages"]
    turns = system_turn(raw, spec.columns.get("system"))
    for index, content in enumerate(list_of(value_of(raw, column), column, "texts")):
        place = f"{column}[{index}]"
        role, what = ("assistant", "answer") if index % 2 else ("user", "prompt")
        turns.append((place, Message(role, text_of(content, place, what))))
    return answered(turns, feedback_of(raw, spec.columns.get("kto_tag")))
