"""Log-probabilities that a reference model gives to the answers of rows, as a column of them.

A row of a pair, or of feedback, becomes two rows of a batch; the column has a number for each of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

COLUMN = "reference"
OF_TOKENS = ("input_ids", "labels", "rejected_ids", "rejected_labels", "other_ids")


def with_reference(rows: "Dataset", logprobs_N2: "torch.Tensor") -> "Dataset":
    """The rows with the column."""
    column: Any = logprobs_N2.tolist()
    return rows.add_column(COLUMN, column)


def reference_of_rows(rows: Sequence[Mapping[str, Any]]) -> "dict[str, torch.Tensor]":
    """`reference`, float32, [2 rows], in the order of a batch; nothing for rows without the column."""
    import torch

    if COLUMN not in rows[0]:
        return {}
    return {COLUMN: torch.tensor([row[COLUMN] for row in rows], dtype=torch.float32).t().flatten()}


def digest(rows: "Dataset") -> str:
    """A checksum of all tokens of the rows, in their order."""
    names = [name for name in OF_TOKENS if name in rows.column_names]
    sums = {name: hashlib.sha256() for name in names}
    for batch in rows.select_columns(names).with_format("arrow").iter(1000):
        for name in names:
            lists = batch[name].combine_chunks()
            sums[name].update(lists.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            sums[name].update(lists.flatten().to_numpy(zero_copy_only=False).tobytes())
    return hashlib.sha256(" ".join(each.hexdigest() for each in sums.values()).encode()).hexdigest()
