"""The words for datasets in the names of metrics."""

import pytest

from glmtuner.config.datasets import labels_of


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["few.jsonl", "belle_0.5m"], ["few", "belle_0_5m"]),
        (["data/few.jsonl", "few.json"], ["few", "few_2"]),
        (["hub/some-set", "my set.csv"], ["some_set", "my_set"]),
        (["few.jsonl"], []),
    ],
)
def test_a_dataset_is_named_like_its_file_without_the_ending(names: list[str], words: list[str]) -> None:
    assert [*labels_of(names).values()] == words
