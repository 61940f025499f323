"""Parts of a row: what each rank has of its tokens, labels and weights, by hand."""

import pytest

from glmtuner.data.parts import PartCollator, part_of
from glmtuner.data.segments import SegmentCollator, Segments
from glmtuner.errors import DataError

ROWS = [
    {"input_ids": [10, 11, 12, 13], "labels": [-100, -100, 12, 13]},
    {"input_ids": [20, 21, 22], "labels": [-100, 21, 22]},
]


def parts(rows, count):
    return [PartCollator(collate=SegmentCollator(), parts=count, own=own)(rows) for own in range(count)]


def test_a_label_belongs_to_the_part_of_the_token_before_it():
    first, second, third = parts(ROWS, 3)
    assert [part["input_ids"].tolist() for part in (first, second, third)] == [[[10, 11, 12]], [[13, 20]], [[21, 22]]]
    assert [part["position_ids"].tolist() for part in (first, second, third)] == [[[0, 1, 2]], [[3, 0]], [[1, 2]]]
    # the first column is that of the token before, whose label the part before has: losses leave it out
    assert first["labels"][:, 1:].tolist() == [[-100, 12, 13]]
    assert second["labels"][:, 1:].tolist() == [[-100, 21]]
    assert third["labels"][:, 1:].tolist() == [[22, -100]]
    assert [part["segments"].own for part in (first, second, third)] == [0, 1, 2]
    assert all(
        part["segments"].parts == (3, 2, 2) and part["segments"].lengths == (4, 3) for part in (first, second, third)
    )
    assert [part["segments"].tokens for part in (first, second, third)] == [3, 2, 2]


def test_weights_go_with_their_labels():
    rows = [{**ROWS[0], "weights": [1.0, 1.0, 0.5, 2.0], "weight": 1.0}, {**ROWS[1], "weights": None, "weight": 3.0}]
    first, second = parts(rows, 2)
    assert first["weights"][:, 1:].tolist() == [[1.0, 0.5, 2.0, 3.0]]
    assert second["weights"][:, 1:].tolist() == [[3.0, 3.0, 0.0]]
    assert first["labels"].shape == first["weights"].shape == (1, 5)


def test_what_a_causal_layer_needs_of_a_row_begins_with_a_segment():
    segments = Segments((4, 3, 5), (0, 0, 0), (4, 3, 5), parts=(3, 3, 3, 3))
    assert [segments.reach_of_part(place) for place in range(4)] == [(0, 3), (0, 6), (4, 9), (7, 12)]
    assert segments.lengths_between(0, 6) == (4, 2)
    assert segments.lengths_between(4, 9) == (3, 2)
    assert segments.lengths_between(7, 12) == (5,)


def test_a_row_with_less_tokens_than_ranks_is_refused():
    batch = SegmentCollator()([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    with pytest.raises(
        DataError, match=r"parallel\.sequence=4: a row of 3 tokens .*; type a smaller parallel\.sequence"
    ):
        part_of(batch, 4, 0)
