"""How much records and their answers count in the loss: the columns of rows, and what batches get of them.

A row's `weight` is that of its record, times that of its dataset; `weights` are those of its labels, None if all answers of the
record weigh 1. Rows of a run without weights have neither column.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

COLUMNS = ("weight", "weights")


def has_weights(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows are of a run with weights."""
    return "weight" in rows[0]


def label_weights(row: Mapping[str, Any]) -> list[float]:
    """The weight of each label of a row, as many."""
    factor, each = row["weight"], row["weights"]
    return [factor] * len(row["labels"]) if each is None else [factor * weight for weight in each]


def weights_of_rows(rows: Sequence[Mapping[str, Any]]) -> "dict[str, torch.Tensor]":
    """`weight`, float32, [rows]; nothing for rows of a run without weights."""
    import torch

    if not has_weights(rows):
        return {}
    return {"weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32)}


def is_weighted(row: Mapping[str, Any]) -> bool:
    """Whether anything in an encoded row weighs other than 1."""
    earlier = any(each["weight"] != 1 for each in row.get("earlier", ()))
    return earlier or row.get("weight", 1) != 1 or row.get("weights") is not None


def without_weights(rows: "Dataset") -> "Dataset":
    """The rows without the columns of weights."""
    return rows.remove_columns([name for name in COLUMNS if name in rows.column_names])


def times(rows: "Dataset", factor: float) -> "Dataset":
    """The rows with both columns of weights, their `weight` multiplied by that of their dataset."""
    import numpy
    import pyarrow
    from datasets import List, Value

    weight = numpy.ones(len(rows), dtype=numpy.float32)
    if "weight" in rows.column_names:
        if factor == 1:
            return rows
        weight = numpy.asarray(rows.with_format("numpy")["weight"][:], dtype=numpy.float32)
        rows = rows.remove_columns(["weight"])
    rows = rows.add_column("weight", weight * numpy.float32(factor), feature=Value("float32"))
    if "weights" not in rows.column_names:
        nothing: Any = pyarrow.nulls(len(rows), pyarrow.list_(pyarrow.float32()))
        rows = rows.add_column("weights", nothing, feature=List(Value("float32")))
    return rows
