"""What the ranks had counted, given to more or fewer ranks."""

from typing import Any

from glmtuner.training.rank_counters import for_ranks

PROGRESS: dict[str, Any] = {
    "loss_since_log": [1.0, 3.0], "tokens": [10, 20], "squares": [100, 300], "sequence": 1, "loss_logged": 7.0,
    "measured": [{"margin": [1.0, 2.0]}, {"margin": [0.5, 1.0], "accuracy": [3.0, 4.0]}],
}  # fmt: skip


def test_as_many_ranks_get_their_own() -> None:
    assert for_ranks(PROGRESS, 2, 1) is PROGRESS
    assert for_ranks({name: value for name, value in PROGRESS.items() if name != "sequence"}, 2, 1)["tokens"] == [
        10,
        20,
    ]


def test_the_sums_and_the_mean_loss_stay() -> None:
    for count in (1, 3, 4):
        found = for_ranks(PROGRESS, count, 1)
        assert found["loss_since_log"] == [2.0] * count  # their mean is logged
        assert found["tokens"] == [30] + [0] * (count - 1) and found["squares"] == [400] + [0] * (count - 1)
        assert len(found["measured"]) == count and found["loss_logged"] == 7.0
        for name, wanted in (("margin", [1.5, 3.0]), ("accuracy", [3.0, 4.0])):  # every rank has every metric
            assert [sum(sums[name][index] for sums in found["measured"]) for index in (0, 1)] == wanted


def test_ranks_that_share_a_row_count_the_same_tokens() -> None:
    shared = {
        **PROGRESS,
        "loss_since_log": [1.0] * 4,
        "tokens": [10, 10, 20, 20],
        "squares": [1, 1, 2, 2],
        "sequence": 2,
    }
    assert for_ranks(shared, 3, 1)["tokens"] == [30, 0, 0]
    assert for_ranks(PROGRESS, 4, 2)["tokens"] == [30, 30, 0, 0]
