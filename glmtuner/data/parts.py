"""Batches of which this process has a part of the tokens: several ranks share a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmtuner.errors import DataError
from glmtuner.templates.base import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class PartCollator:
    """The part number `own` of `parts` contiguous and nearly equal parts of the row that `collate` makes, a row without padding."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]
    parts: int
    own: int

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """This process's part of the batch of these rows, as `part_of` makes it."""
        return part_of(self.collate(rows), self.parts, self.own)


def part_of(batch: dict[str, Any], parts: int, own: int) -> dict[str, Any]:
    """A part of a batch without padding: `input_ids`, [1, P], and `position_ids`; `segments` are of the whole row.

    `labels` and `weights` are one longer, [1, P + 1]: the part's last token predicts the first one of the next part, and after the
    row's last token there is IGNORE_INDEX, of weight 0. So a label belongs to one part, that of the token which predicts it.
    """
    import torch

    tokens = batch["input_ids"].shape[1]
    if tokens < parts:
        raise DataError(
            f"parallel.sequence={parts}: a row of {tokens} tokens cannot be shared by {parts} ranks; type a smaller "
            "parallel.sequence, or data.packing=true"
        )
    lengths = tuple(tokens // parts + (place < tokens % parts) for place in range(parts))
    segments = replace(batch["segments"], parts=lengths, own=own)
    first, end = segments.part(own)
    following = {
        name: torch.nn.functional.pad(batch[name], (0, 1), value=filler)[:, first : end + 1]
        for name, filler in (("labels", IGNORE_INDEX), ("weights", 0.0))
        if name in batch
    }
    return {
        **batch,
        **following,
        "input_ids": batch["input_ids"][:, first:end],
        "position_ids": batch["position_ids"][..., first:end],
        "segments": segments,
    }
