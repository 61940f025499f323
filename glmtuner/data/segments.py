"""Batches without padding, and samples packed into rows of a fixed length.

A batch without padding is one row in which the samples stand one behind the other, as segments. A pack is a list of
samples that together fill such a row as far as possible; to the rest of the program it is one sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    Places = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class Segments:
    """Where the samples of a batch lie in its one row.

    `contexts` are the numbers of tokens at each segment's start that see each other in both directions, 0 where attention
    is causal throughout; `taught` are the lengths of the samples that teach something.
    """

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    taught: tuple[int, ...]

    @cached_property
    def _known(self) -> dict[Any, Any]:
        """What all layers of a forward pass share, made by the first that asks."""
        return {}

    def masks(self, device: "torch.device | str") -> "list[torch.Tensor | None]":
        """What each segment's tokens see, [1, 1, length, length] with True = seen; None is plain causal attention."""
        if ("masks", device) not in self._known:
            made = map(prefix_mask, self.lengths, self.contexts)
            self._known["masks", device] = [mask if mask is None else mask.to(device) for mask in made]
        return self._known["masks", device]

    def bounds(self, device: "torch.device | str") -> "torch.Tensor":
        """The segments' ends with a 0 in front, int32, as kernels for sequences of different lengths take them."""
        import torch

        if ("bounds", device) not in self._known:
            ends = [0, *accumulate(self.lengths)]
            self._known["bounds", device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._known["bounds", device]


def prefix_mask(length: int, context: int) -> "torch.Tensor | None":
    """Causal attention but for the first `context` tokens, which see each other; None without such."""
    import torch

    if not context:
        return None
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:context, :context] = True
    return seen[None, None]


def places_from_0(ids_T: "torch.Tensor") -> "tuple[torch.Tensor, int]":
    """The positions of a causal sample's tokens, [T], and how many of them see each other both ways: none."""
    import torch

    return torch.arange(len(ids_T)), 0


@dataclass(frozen=True, kw_only=True)
class SegmentCollator:
    """Samples, or packs of them, -> a batch of one row; `places` gives a sample's positions [..., T] and its context."""

    places: "Places" = places_from_0

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """`input_ids` and `labels`, [1, T], `position_ids`, [1, ..., T], and `segments`.

        `attention_mask` is ready made, [1, 1, 1, 1]: nothing is hidden but by the bounds of the segments. A segment's first
        label is none, since the token in front of it is another segment's.
        """
        import torch

        samples = flat(rows)
        ids = [torch.tensor(sample["input_ids"], dtype=torch.long) for sample in samples]
        labels = [torch.tensor([IGNORE_INDEX, *sample["labels"][1:]], dtype=torch.long) for sample in samples]
        placed = [self.places(sample) for sample in ids]
        taught = [len(sample) for sample, label in zip(ids, labels, strict=True) if bool((label != IGNORE_INDEX).any())]
        return {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([positions for positions, _ in placed], dim=-1)[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            "segments": Segments(tuple(map(len, ids)), tuple(context for _, context in placed), tuple(taught)),
        }


def flat(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The samples of rows, some of which may be packs."""
    return [sample for row in rows for sample in (row if isinstance(row, list) else [row])]


# -- packing -------------------------------------------------------------------------------------------------------------


class Packs:
    """The rows of a dataset in packs of at most `capacity` tokens; each row is in one of them."""

    def __init__(self, rows: "Dataset", capacity: int) -> None:
        self.rows = rows
        self.lengths = lengths_of(rows)
        self.capacity = max(capacity, *self.lengths)
        self.places = packed(self.lengths, self.capacity)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, pack: int) -> list[dict[str, Any]]:
        return self.__getitems__([pack])[0]

    def __getitems__(self, packs: Sequence[int]) -> list[list[dict[str, Any]]]:
        found = iter(self.rows.__getitems__([place for pack in packs for place in self.places[pack]]))
        return [[next(found) for _ in self.places[pack]] for pack in packs]


def lengths_of(rows: "Dataset") -> list[int]:
    """The number of tokens of every row; read column by column, since rows as lists of numbers are ten times slower."""
    batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    return [length for batch in batches for length in batch["input_ids"].combine_chunks().value_lengths().to_pylist()]


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The places of `lengths` in as few packs as best-fit decreasing finds, none fuller than `capacity`.

    A bit set of the rooms that open packs still have finds the tightest one without a search (Johnson 1974).
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room -> the packs that have just that much left
    rooms = 0  # bit r is set where open_packs[r] has any
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(place)
        left = room - length
        open_packs.setdefault(left, []).append(pack)
        rooms |= 1 << left
    return packs
