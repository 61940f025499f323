"""The metrics that a run is judged by, for searches and reports: which keys of metrics.json, and which way is better."""

from collections.abc import Iterable, Sequence
from typing import Any

LESS_IS_BETTER = (
    "loss",
    "runtime",
    "perplexity",
    "memory_gib",
    "parameters",
    "bits_per_byte",
    "brier_score",
)  # how the names of such metrics end

PREFIXES = ("predict_", "eval_", "benchmark_", "subject_")  # of scores in metrics.json


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return metric.endswith(LESS_IS_BETTER)


def objectives_of(value: Any) -> list[str]:
    """The metrics that `objective` names: none for null, one for a name, two for a list of two (the second is a cost)."""
    if value is None:
        return []
    return [str(name) for name in value] if isinstance(value, Sequence) and not isinstance(value, str) else [str(value)]


def objective_problem(value: Any) -> str | None:
    """What is wrong with a value of `objective`, and what to type; None if it is legal."""
    names = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    legal = "one metric, as in objective=eval_loss, or two, as in objective=[eval_loss,train_runtime]"
    if value is not None and not all(isinstance(name, str) and name for name in names):
        return f"objective={value}: expected {legal}"
    if not 1 <= len(names) <= 2 or len({*names}) < len(names):
        return f"objective=[{','.join(map(str, names))}]: expected {legal}"
    return None


def measured_as(name: str, measured: Iterable[str]) -> str | None:
    """The key in `measured` of the metric: its name, with one of PREFIXES in front or without; None if it was not measured."""
    known = set(measured)
    return next((key for key in (name, *(f"{prefix}{name}" for prefix in PREFIXES)) if key in known), None)
