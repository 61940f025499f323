"""Packs, and batches of segments."""

import random

import pytest
import torch
from datasets import Dataset

from glmtuner.data.segments import Packs, SegmentCollator, lengths_of, packed
from glmtuner.templates.base import IGNORE_INDEX


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_in_one_pack_that_is_no_fuller_than_it_may_be(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 64) for _ in range(500)]
    packs = packed(lengths, 64)
    assert sorted(place for pack in packs for place in pack) == list(range(500))
    assert all(sum(lengths[place] for place in pack) <= 64 for pack in packs)
    assert len(packs) <= -(-sum(lengths) // 64) * 1.05 + 1  # best-fit decreasing leaves little room


@pytest.mark.parametrize("count", [1, 7, 2000])
def test_packs_are_those_of_a_search_through_all_open_packs(count):
    draw = random.Random(count)
    lengths = [draw.choice((draw.randint(1, 90), draw.randint(40, 60))) for _ in range(count)]
    expected: list[list[int]] = []
    for place in sorted(range(count), key=lambda place: -lengths[place]):
        rooms = [90 - sum(lengths[other] for other in pack) - lengths[place] for pack in expected]
        fitting = [room for room in rooms if room >= 0]
        if not fitting:
            expected.append([place])
        else:
            expected[rooms.index(min(fitting))].append(place)
    packs = packed(lengths, 90)
    assert len(packs) == len(expected)
    assert sorted(sum(lengths[place] for place in pack) for pack in packs) == sorted(
        sum(lengths[place] for place in pack) for pack in expected
    )


def test_a_sample_goes_where_least_room_is_left():
    assert packed([5, 4, 3, 2], 7) == [[0, 3], [1, 2]]
    assert packed([], 8) == []


def test_packs_are_read_as_rows_of_the_dataset_whatever_their_order():
    rows = Dataset.from_dict({"input_ids": [[n] * n for n in range(1, 9)], "labels": [[n] * n for n in range(1, 9)]})
    packs = Packs(rows.select(range(7, -1, -1)), capacity=9)
    assert lengths_of(packs.rows).tolist() == packs.lengths.tolist() == list(range(8, 0, -1))
    assert [sum(len(row["input_ids"]) for row in packs[pack]) for pack in range(len(packs))] == [9, 9, 9, 9]
    assert packs.__getitems__([1, 0]) == [packs[1], packs[0]]
    assert Packs(rows, capacity=2).capacity == 8  # no sample is cut


def test_a_batch_of_segments():
    first = {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3]}
    second = {"input_ids": [4, 5], "labels": [4, 5]}
    blank = {"input_ids": [6], "labels": [IGNORE_INDEX]}
    batch = SegmentCollator()([[first, second], blank])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    # the token before a segment's first is not its own, so that one cannot be learned
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["segments"].lengths == (3, 2, 1)
    assert batch["segments"].taught == (3, 2)  # the blank row teaches nothing
    assert batch["segments"].bounds("cpu").tolist() == [0, 3, 5, 6]
    assert batch["segments"].masks("cpu") == [None, None, None]


def test_a_context_sees_itself_both_ways():
    batch = SegmentCollator(positions_of=lambda ids: (torch.arange(len(ids)), 2))(
        [{"input_ids": [1] * 4, "labels": [1] * 4}]
    )
    assert batch["segments"].masks("cpu")[0][0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
