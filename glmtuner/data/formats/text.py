"""Plain text for continued pretraining: one column, `columns.prompt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmtuner.data.records import Example, text_of, value_of

if TYPE_CHECKING:
    from glmtuner.data.spec import DatasetSpec

COLUMNS = {"prompt": "text"}


def parse(raw: dict[str, Any], spec: DatasetSpec) -> Example:
    """An example with `text` and without messages."""
    column = spec.columns["prompt"]
    return Example(text=text_of(value_of(raw, column), column, "text"))
