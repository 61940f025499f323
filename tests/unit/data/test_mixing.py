"""Mixing by shares draws the rows that datasets' own interleaving draws, without a Python object for each."""

import random

import pytest
from datasets import Dataset, concatenate_datasets, interleave_datasets

from glmtuner.data.mixing import drawn, mixed


@pytest.mark.parametrize("seed", range(6))
def test_the_rows_drawn_are_those_of_interleave_datasets(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice((1, 40, 700, 3000, draw.randint(1, 5000))) for _ in range(draw.randint(1, 4))]
    shares = [draw.uniform(0.05, 1) for _ in lengths]
    shares = [share / sum(shares) for share in shares]
    parts = [Dataset.from_dict({"set": [place] * length, "row": range(length)}) for place, length in enumerate(lengths)]
    expected = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    indices, counts = drawn(lengths, shares, seed)
    whole = concatenate_datasets(parts)
    assert whole.select(indices).to_list() == expected.to_list()
    assert counts == [expected["set"][:].count(place) for place in range(len(lengths))]
    rows, reached = mixed(parts, shares, seed)
    assert rows.to_list() == expected.to_list() and reached == [count / len(expected) for count in counts]
