"""The batches of a run: padded and unpadded tokens by hand, and the few that are tried."""

from types import SimpleNamespace

import pytest

from glmtuner.launch.forecast.batches import BATCHES, answered, chosen, computed, lengths_in, packs, rows_of
from glmtuner.launch.forecast.cost import Size

RECORDS = [(5,), (3,), (8,), (2,), (4,)]


def run(**values: object) -> SimpleNamespace:
    trainer = {"per_device_train_batch_size": 2, "train_sampling_strategy": "random"} | values
    data = SimpleNamespace(packing=values.get("packing", False), max_source_length=4, max_target_length=4)
    return SimpleNamespace(trainer=SimpleNamespace(**trainer), data=data, stage=SimpleNamespace(weighs=True))


def test_padding_is_computed_where_there_is_any():
    assert computed([(5,), (3,)], unpadded=True) == Size(8, 25 + 9)
    assert computed([(5,), (3,)], unpadded=False) == Size(10, 50)
    assert computed([(5, 7), (3, 1)], unpadded=False) == Size(28, 4 * 49)  # a pair is two rows


def test_the_sums_of_an_epoch():
    unpadded, padded = rows_of(RECORDS, 2, True), rows_of(RECORDS, 2, False)
    assert (unpadded.batches, unpadded.computed.tokens, unpadded.tokens, unpadded.largest) == (3, 22, 22, 10)
    assert (padded.batches, padded.computed.tokens, padded.tokens, padded.largest) == (3, 10 + 16 + 4, 22, 16)
    assert unpadded.squares == 25 + 9 + 64 + 4 + 16
    assert rows_of(RECORDS, 2, True, drops_last=True).batches == 2
    assert rows_of([], 2, True).batches == 0


def test_records_are_packed_as_the_training_packs_them():
    assert sorted(map(sum, packs(run(packing=True), RECORDS))) == [6, 8, 8]  # rows of 8 tokens


def test_the_longest_batch_and_the_shortest_are_tried():
    lengths = [(length,) for length in range(1, 101)]
    indices = chosen(run(), lengths)
    batches = [indices[start : start + 2] for start in range(0, len(indices), 2)]
    assert len(batches) == BATCHES
    longest = [max(lengths[index][0] for index in batch) for batch in batches]
    every = chosen(run(train_sampling_strategy="sequential"), lengths)
    assert longest[1] == 100 and longest[2] == min(longest)
    assert every[2:4] == [98, 99] and every[4:6] == [0, 1]  # batches of neighbours


def test_few_records_are_tried_again_and_again():
    indices = chosen(run(), [(3,), (4,), (5,)])
    assert len(indices) == 2 * BATCHES and {*indices} <= {0, 1, 2}
    assert chosen(run(), [(3,)]) == [0] * BATCHES


def test_answers_are_tried_for_records_of_all_lengths():
    lengths = [(length,) for length in (9, 1, 5, 7, 3)]
    assert answered(lengths, 3) == [1, 4, 3] and answered(lengths, 9) == [1, 4, 2, 3, 0] and answered([], 3) == []


def test_lengths_of_pairs_and_of_prompts():
    from datasets import Dataset

    pairs = Dataset.from_dict({"input_ids": [[1, 2], [1]], "rejected_ids": [[1], [1, 2, 3]]})
    assert lengths_in(pairs) == [(2, 1), (1, 3)]
    assert lengths_in(Dataset.from_dict({"prompt": ["a", "b"]})) == [(0,), (0,)]
    assert lengths_in(None) == []


@pytest.mark.parametrize("count", [1, 2, 40])
def test_packed_rows_are_filled_from_so_many_records(count):
    lengths = [(4,)] * count
    indices = chosen(run(packing=True), lengths)
    assert len(indices) == min(count, BATCHES * 2 * 8 // 4)
