"""Rows to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.data.weights import has_weights, label_weights
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads on the right to the longest row of the batch, so that token positions start at 0 in every row.

    Labels of padding are IGNORE_INDEX, or the padding token when `ignore_pad_token_for_loss` is false.
    """

    pad_id: int
    ignore_pad_token_for_loss: bool = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, int64, each [rows, longest]; of rows with weights also `weights`, float32."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        label_pad = IGNORE_INDEX if self.ignore_pad_token_for_loss else self.pad_id
        padded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            padding = longest - len(row["input_ids"])
            padded["input_ids"].append([*row["input_ids"], *[self.pad_id] * padding])
            padded["attention_mask"].append([1] * len(row["input_ids"]) + [0] * padding)
            padded["labels"].append([*row["labels"], *[label_pad] * padding])
        batch = {name: torch.tensor(values, dtype=torch.long) for name, values in padded.items()}
        if has_weights(rows):
            each = [label_weights(row) for row in rows]
            batch["weights"] = torch.tensor([[*weights, *[1.0] * (longest - len(weights))] for weights in each])
        return batch
