"""Batches of one size for every rank: each row once, and what fills up is marked where labels alone do not say that it is not learned."""

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, SequentialSampler

from glmtuner.training.samplers import CountedRows, EvenBatches, PaddedRows

ROWS = Dataset.from_list([{"input_ids": [number] * 2, "labels": [number] * 2} for number in range(5)])


def collate(rows):
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def batches_of(padded, count):
    even = EvenBatches(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False), count, padded.padding_index)
    assert len([*even]) == len(even)
    return [padded.__getitems__(batch) for batch in even]


def test_rows_that_fill_up_are_marked_and_are_the_only_ones():
    padded, counted = PaddedRows(ROWS, is_marked=True), CountedRows(collate)
    made = [counted(batch) for batch in batches_of(padded, 4)]
    assert [batch["counted"].tolist() for batch in made] == [[True, True], [True, True], [True, False], [False, False]]
    learned = [row for batch in made for row in batch["input_ids"][batch["counted"]][:, 0].tolist()]
    assert learned == [0, 1, 2, 3, 4]
    # a sequence that the model knows, with labels: an objective may need them
    assert made[3]["labels"].tolist() == [[0, 0], [0, 0]]


def test_rows_that_fill_up_have_no_labels_where_nothing_else_is_learned():
    made = [collate(batch) for batch in batches_of(PaddedRows(ROWS), 2)]
    labels = [row[0] for batch in made for row in batch["labels"].tolist()]
    assert labels == [0, 1, 2, 3, 4, -100, -100, -100]
