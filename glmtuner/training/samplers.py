"""Batches of one size for every rank, so that each row of an epoch is learned once; and the random state of data loaders."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from glmtuner.data.segments import flat
from glmtuner.objectives.objective import COUNTED
from glmtuner.templates.base import IGNORE_INDEX

PADDING = "is_padding"  # a column that only a marked padding row has


class Rows(Protocol):
    """A dataset that reads several rows at once: one of `datasets`, or packs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __getitems__(self, indices: Any, /) -> Sequence[Any]: ...


class PaddedRows(Dataset[Mapping[str, Any]]):
    """The rows of a dataset and, at `padding_index`, a row that is not learned: its labels are masked, or it `is_marked` as padding."""

    def __init__(self, rows: Rows, is_marked: bool = False) -> None:
        self.rows, self.is_marked = rows, is_marked
        self.padding_index = len(rows)

    def __len__(self) -> int:
        """The number of the dataset's own rows, from which samplers draw."""
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        rows = iter(self.rows.__getitems__([index for index in indices if index != self.padding_index]))
        return [self._padding_row() if index == self.padding_index else next(rows) for index in indices]

    def _padding_row(self) -> Mapping[str, Any]:
        if self.is_marked:
            return {**self.rows[0], PADDING: True}
        row = flat([self.rows[0]])[0]  # a real sequence, which every model accepts
        return {**row, "labels": [IGNORE_INDEX] * len(row["input_ids"])}


class CountedRows:
    """The batches of a collator with `counted`, bool, [rows]: False of the padding rows."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{name: value for name, value in row.items() if name != PADDING} for row in rows]
        return {**self.collate(plain), COUNTED: torch.tensor([PADDING not in row for row in rows])}


class EvenBatches(BatchSampler):
    """The batches of another sampler, all of one size and equally many for each rank, filled up with the padding row."""

    def __init__(self, batches: BatchSampler, world_size: int, padding_index: int) -> None:
        self.batches, self.world_size, self.padding_index = batches, world_size, padding_index
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    @property
    def sampler(self) -> Any:
        """The sampler of single rows, which accelerate replaces for reproducible shuffling."""
        return self.batches.sampler

    @sampler.setter
    def sampler(self, value: Any) -> None:
        self.batches.sampler = value

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield [*batch, *[self.padding_index] * (self.batch_size - len(batch))]
        for _ in range(len(self) - len(self.batches)):
            yield [self.padding_index] * self.batch_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size) * self.world_size


def draw_base_seed(loader: DataLoader[Any]) -> None:
    """Advance torch's random state where iterating over the loader does not, so that workers do not change what is learned.

    A new iterator of a DataLoader draws a seed for its workers from the random state that dropout draws from, also without
    workers. With `persistent_workers` all but the first pass over the data reuse the iterator, and draw none.
    """
    if getattr(loader, "_iterator", None) is not None:
        torch.empty((), dtype=torch.int64).random_()
