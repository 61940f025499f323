"""Batches without padding, and samples packed into rows of a fixed length.

A batch without padding is one row in which the samples are concatenated, as segments. A pack is a list of samples that
together fill such a row as far as possible; the rest of the program treats it as one sample.

Shapes: T is the number of tokens of the row or sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from glmtuner.data.weights import has_weights, label_weights
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from numpy import dtype, int32, int64, ndarray

    Int32s = ndarray[tuple[int, ...], dtype[int32]]
    Int64s = ndarray[tuple[int, ...], dtype[int64]]
    Positions = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class Segments:
    """The samples of a batch without padding, in the order of its row.

    `contexts` are the numbers of tokens at each segment's start that attend to each other in both directions, 0 if attention
    is causal throughout; `taught` are the lengths of the samples that have a label. `before` are, for each segment, the place in the
    row, and the number, of the tokens of another segment that come before its own, as in glmtuner/kernels/common_beginnings.py;
    `contexts` then count from the first of them. Without any it is empty.

    `parts` are the numbers of tokens that the ranks which share the row have of it, in its order, and `own` is the place of this
    rank's; empty where this process has the whole row. All else is of the whole row.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    taught: tuple[int, ...]
    before: tuple[tuple[int, int], ...] = ()
    parts: tuple[int, ...] = ()
    own: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that this process has of the row."""
        return self.parts[self.own] if self.parts else sum(self.lengths)

    def part(self, place: int) -> tuple[int, int]:
        """Where in the row a rank's part begins and ends."""
        first = sum(self.parts[:place])
        return first, first + self.parts[place]

    def reach_of_part(self, place: int) -> tuple[int, int]:
        """What a causal layer needs for a rank's part: from the beginning of the segment in which it begins, to its own end."""
        first, end = self.part(place)
        starts = [0, *accumulate(self.lengths)]
        return max(start for start in starts if start <= first), end

    def lengths_between(self, first: int, end: int) -> tuple[int, ...]:
        """The numbers of tokens that the segments have between two places of the row, without those that have none."""
        bounds = pairwise([0, *accumulate(self.lengths)])
        inside = (min(after, end) - max(before, first) for before, after in bounds)
        return tuple(length for length in inside if length > 0)

    @cached_property
    def reaches(self) -> tuple[int, ...]:
        """The number of tokens that each segment's last token attends to: its length and what comes before it."""
        if not self.before:
            return self.lengths
        return tuple(length + count for length, (_, count) in zip(self.lengths, self.before, strict=True))

    @cached_property
    def _cache(self) -> dict[Any, Any]:
        """What all layers of a forward pass share, computed by the first one."""
        return {}

    def masks(self, device: "torch.device | str") -> "list[torch.Tensor | None]":
        """Each segment's attention mask, [1, 1, reach, reach] with True = attended to; None is plain causal attention."""
        if ("masks", device) not in self._cache:
            masks = map(prefix_mask, self.reaches, self.contexts)
            self._cache["masks", device] = [mask if mask is None else mask.to(device) for mask in masks]
        cached: list[torch.Tensor | None] = self._cache["masks", device]
        return cached

    def bounds(self, device: "torch.device | str") -> "torch.Tensor":
        """Cumulative lengths of the segments with a leading 0, int32, [segments + 1]: `cu_seqlens` of variable-length kernels."""
        return self._cumulative("bounds", self.lengths, device)

    def reaching_bounds(self, device: "torch.device | str") -> "torch.Tensor":
        """The same of `reaches`, as the keys are bounded that have those before each segment's own."""
        return self._cumulative("reaching bounds", self.reaches, device)

    def _cumulative(self, name: str, lengths: tuple[int, ...], device: "torch.device | str") -> "torch.Tensor":
        import torch

        if (name, device) not in self._cache:
            self._cache[name, device] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        cached: torch.Tensor = self._cache[name, device]
        return cached


def prefix_mask(length: int, context: int) -> "torch.Tensor | None":
    """A causal mask whose first `context` tokens attend to each other, [1, 1, length, length]; None if `context` is 0."""
    import torch

    if not context:
        return None
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:context, :context] = True
    return mask[None, None]


def causal_positions(ids_T: "torch.Tensor") -> "tuple[torch.Tensor, int]":
    """The position ids of a causal sample, [T], and its number of bidirectional context tokens, 0."""
    import torch

    return torch.arange(len(ids_T)), 0


@dataclass(frozen=True, kw_only=True)
class SegmentCollator:
    """One row of samples or packs; `positions_of` returns a sample's position ids, [..., T], and number of context tokens."""

    positions_of: "Positions" = causal_positions

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """`input_ids` and `labels`, [1, T], `position_ids`, [1, ..., T], and `segments`; of rows with weights also `weights`, [1, T].

        `attention_mask` is all True, [1, 1, 1, 1]: only the bounds of the segments mask anything. A segment's first label is
        IGNORE_INDEX, since the token before it belongs to another segment.
        """
        import torch

        samples = flat(rows)
        ids = [torch.tensor(sample["input_ids"], dtype=torch.long) for sample in samples]
        labels = [torch.tensor([IGNORE_INDEX, *sample["labels"][1:]], dtype=torch.long) for sample in samples]
        positions = [self.positions_of(sample) for sample in ids]
        taught = [len(sample) for sample, label in zip(ids, labels, strict=True) if bool((label != IGNORE_INDEX).any())]
        weights = [weight for sample in samples for weight in label_weights(sample)] if has_weights(samples) else None
        return {
            **({} if weights is None else {"weights": torch.tensor([weights])}),
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([position_ids for position_ids, _ in positions], dim=-1)[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            "segments": Segments(tuple(map(len, ids)), tuple(context for _, context in positions), tuple(taught)),
        }


def flat(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The samples of rows, each of which is a sample or a pack."""
    return [sample for row in rows for sample in (row if isinstance(row, list) else [row])]


# -- packing -------------------------------------------------------------------------------------------------------------


class Packs:
    """The rows of a dataset in packs of at most `capacity` tokens; each row is in exactly one pack."""

    def __init__(self, rows: "Dataset", capacity: int) -> None:
        self.rows = rows
        self.lengths = lengths_of(rows)
        self.capacity = max(capacity, int(self.lengths.max(initial=0)))
        self.order, self.bounds = packed_order(self.lengths, self.capacity)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> list[dict[str, Any]]:
        return self.__getitems__([pack])[0]

    def __getitems__(self, packs: Sequence[int]) -> list[list[dict[str, Any]]]:
        indices = [self.indices(pack) for pack in packs]
        rows = iter(self.rows.__getitems__([index for pack in indices for index in pack]))
        return [[next(rows) for _ in pack] for pack in indices]

    def indices(self, pack: int) -> list[int]:
        """The rows of a pack, by their numbers."""
        if not -len(self) <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        pack %= len(self)
        found: list[int] = self.order[self.bounds[pack] : self.bounds[pack + 1]].tolist()
        return found


def lengths_of(rows: "Dataset") -> "Int32s":
    """The number of tokens of every row, four bytes each; computed in Arrow, ten times faster than from Python lists."""
    import numpy

    batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    parts = [batch["input_ids"].combine_chunks().value_lengths().to_numpy() for batch in batches]
    return numpy.concatenate([numpy.empty(0, numpy.int32), *parts])


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of `lengths` in packs of at most `capacity`; see `packed_order`."""
    import numpy

    order, bounds = packed_order(numpy.asarray(lengths, dtype=numpy.int32), capacity)
    return [order[start:end].tolist() for start, end in pairwise(bounds.tolist())]


def packed_order(lengths: "Int32s", capacity: int) -> "tuple[Int32s, Int64s]":
    """The indices of `lengths`, pack after pack, and where each pack begins and the last one ends, by best-fit decreasing (Johnson 1974).

    The free spaces of open packs are kept as a bit set, whose lowest fitting bit is the tightest fit, without a search. All else
    are numpy arrays, a few bytes for each row.
    """
    import numpy

    longest_first = numpy.argsort(-lengths, kind="stable").astype(numpy.int32)
    pack_of = numpy.empty(len(lengths), dtype=numpy.int32)  # in the order of `longest_first`
    open_packs: dict[int, list[int]] = {}  # free tokens -> the packs with exactly that many
    free_bits = 0  # bit n is set if open_packs[n] is not empty
    count = 0
    for start in range(0, len(lengths), 1 << 16):
        chosen = []
        for length in lengths[longest_first[start : start + (1 << 16)]].tolist():
            fitting = free_bits >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                pack = open_packs[free].pop()
                if not open_packs[free]:
                    free_bits ^= 1 << free
            else:
                free, pack = capacity, count
                count += 1
            chosen.append(pack)
            remaining = free - length
            open_packs.setdefault(remaining, []).append(pack)
            free_bits |= 1 << remaining
        pack_of[start : start + len(chosen)] = chosen
    bounds = numpy.concatenate(([0], numpy.cumsum(numpy.bincount(pack_of, minlength=count)))).astype(numpy.int64)
    return longest_first[numpy.argsort(pack_of, kind="stable")], bounds
