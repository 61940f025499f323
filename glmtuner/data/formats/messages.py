"""Conversations in OpenAI's format: `{"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.formats.sharegpt import answer, conversation, parts_of, spoken, with_parts
from glmtuner.data.records import BadRecord, Example, list_of, ranked, value_of
from glmtuner.data.tools import linked

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"messages": "messages"}
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "function_tag": "function_call",
    "observation_tag": "tool",
}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """A conversation; `columns.chosen` and `columns.rejected` hold the two answers to its last turn.

    Without `columns.messages` these two columns are whole conversations that share all but the last turn.
    """
    tags = TAGS | spec.tags
    if "messages" in spec.columns:
        return conversation(raw, spec, tags)
    columns = [spec.columns["chosen"], spec.columns["rejected"]]
    chosen, rejected = (list_of(value_of(raw, column), column, "turns") for column in columns)
    if not chosen or len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise BadRecord(columns[1], f"its turns before the answer differ from those of {columns[0]}")
    last = len(chosen) - 1
    parts = parts_of(chosen[:-1], spec, columns[0], tags)
    better, worse = (
        answer(turns[last], parts, spec, f"{column}[{last}]", tags)
        for turns, column in zip((chosen, rejected), columns, strict=True)
    )
    return with_parts(ranked(linked(spoken(parts)), better, worse), parts)
