"""What the ranks of a checkpoint had counted, for the ranks that go on from it."""

from typing import Any


def for_ranks(progress: dict[str, Any], count: int, sequence: int) -> dict[str, Any]:
    """The content of a checkpoint's progress.json for `count` ranks, `sequence` of which share a row: the sums over all stay the same.

    The ranks' losses are averaged when they are logged, all else is added up.
    """
    saved = len(progress["loss_since_log"])
    if saved == count and progress.get("sequence", sequence) == sequence:
        return progress
    groups = progress.get("sequence", 1)  # ranks that share a row count the same tokens
    others = count - sequence

    def on_first(values: list[int]) -> list[int]:
        return [sum(values[::groups])] * sequence + [0] * others

    measured = progress["measured"]
    names = dict.fromkeys(name for sums in measured for name in sums)
    totals = {name: [sum(sums[name][index] for sums in measured if name in sums) for index in (0, 1)] for name in names}
    return {
        **progress,
        "loss_since_log": [sum(progress["loss_since_log"]) / saved] * count,
        "tokens": on_first(progress["tokens"]),
        "squares": on_first(progress["squares"]),
        "measured": [totals] + [{name: [0.0, 0.0] for name in names}] * (count - 1),
    }
