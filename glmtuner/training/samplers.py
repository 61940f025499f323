"""Batches of one size for every rank, so that each row of an epoch is learned once."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import BatchSampler, Dataset

from glmtuner.data.segments import flat
from glmtuner.templates.base import IGNORE_INDEX


class Filled(Dataset):
    """The rows of a dataset and, at `blank`, a row that teaches nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.blank = rows, len(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[Mapping[str, Any]]:
        found = iter(self.rows.__getitems__([place for place in places if place != self.blank]))
        return [self._blank() if place == self.blank else next(found) for place in places]

    def _blank(self) -> Mapping[str, Any]:
        ids = flat([self.rows[0]])[0]["input_ids"]  # a sequence that every model takes
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}


class EvenBatches(BatchSampler):
    """The batches of another sampler, all of one size and as many for each rank, filled up with the blank row."""

    def __init__(self, batches: BatchSampler, world_size: int, blank: int) -> None:
        self.batches, self.world_size, self.blank = batches, world_size, blank
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    @property
    def sampler(self) -> Any:
        return self.batches.sampler

    @sampler.setter
    def sampler(self, value: Any) -> None:
        self.batches.sampler = value

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield [*batch, *[self.blank] * (self.batch_size - len(batch))]
        for _ in range(len(self) - len(self.batches)):
            yield [self.blank] * self.batch_size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world_size) * self.world_size
