"""The metric that a run is judged by, for searches and reports: which key of metrics.json, and which way is better."""

from collections.abc import Iterable

LESS_IS_BETTER = ("loss", "runtime", "perplexity", "memory_gib")  # how the names of such metrics end


def less_is_better(metric: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return metric.endswith(LESS_IS_BETTER)


def measured_as(name: str, measured: Iterable[str]) -> str | None:
    """The key in `measured` of the metric: its name, with predict_ or eval_ in front or without; None if it was not measured."""
    known = set(measured)
    return next((key for key in (name, f"predict_{name}", f"eval_{name}") if key in known), None)
