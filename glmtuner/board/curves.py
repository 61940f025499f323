"""Curves of runs: the logged numbers over steps, tokens or time, thinned out to as many points as a picture can show."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glmtuner.board.histories import Columns
from glmtuner.board.records import Record

if TYPE_CHECKING:
    import numpy

AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}  # what is asked for, and the name of its numbers
POINTS, MOST_POINTS = 2000, 100_000
NO_METRICS = {"step", "epoch"}
NO_TIMINGS = {"step", "time", "seconds", "tokens"}


def metrics_of(record: Record) -> list[str]:
    """The names of the curves of a run: first those of its history, then its speed and its memory."""
    history, timings = record.history(), record.timings()
    names = [name for name in history.columns if name not in NO_METRICS]
    return names + [name for name in timings.columns if name not in {*NO_TIMINGS, *names}]


def curve(record: Record, metric: str, axis: str, points: int) -> tuple[dict[str, Any] | None, str]:
    """One curve, and why there is none where there is none; None without a reason for a metric that the run did not log."""
    history = record.history()
    is_logged = metric in history.columns
    source = history if is_logged else record.timings()
    lines, y = source.of(metric)
    if not len(y) or metric in (NO_METRICS if is_logged else NO_TIMINGS):
        return None, ""
    steps = by_line(source, "step")[lines]
    if axis == "step":
        x = steps
    else:
        x = at_steps(record.timings(), AXES[axis], steps)
        if x is None:
            return (
                None,
                f"it has no {'times' if axis == 'time' else 'numbers of tokens'}: an earlier version trained it",
            )
    x, y, steps = increasing(x, y, steps)
    kept = thinned(y, points)
    whole = len(kept) == len(y)
    return {
        "id": record.id,
        "metric": metric,
        "x": rounded(x[kept]),
        "y": rounded(y[kept]),
        **({} if axis == "step" else {"step": rounded(steps[kept])}),
        "points": len(y),
        "last_line": source.lines,
        "whole": whole,
    }, ""


def by_line(columns: Columns, name: str) -> "numpy.ndarray":
    """The values of a name by the number of the line, NaN for lines without one."""
    import numpy

    values = numpy.full(columns.lines, numpy.nan)
    lines, found = columns.of(name)
    values[lines] = found
    return values


def at_steps(timings: Columns, name: str, steps: "numpy.ndarray") -> "numpy.ndarray | None":
    """The value of the last timing until each of the steps, NaN before the first; None where there is none at all."""
    import numpy

    known_steps, values = by_line(timings, "step"), by_line(timings, name)
    is_known = numpy.isfinite(known_steps) & numpy.isfinite(values)
    known_steps, values = known_steps[is_known], values[is_known]
    if not len(values):
        return None
    places = numpy.searchsorted(known_steps, steps, side="right") - 1
    return numpy.where(places >= 0, values[places], numpy.nan)


def increasing(x: "numpy.ndarray", *others: "numpy.ndarray") -> "tuple[numpy.ndarray, ...]":
    """x in increasing order with what belongs to it, of equal ones the last, without those that are not known."""
    import numpy

    is_known = numpy.isfinite(x)
    columns = [column[is_known] for column in (x, *others)]
    order = numpy.argsort(columns[0], kind="stable")
    columns = [column[order] for column in columns]
    is_last = numpy.append(columns[0][1:] != columns[0][:-1], True)[: len(columns[0])]
    return tuple(column[is_last] for column in columns)


def thinned(y: "numpy.ndarray", points: int) -> "numpy.ndarray":
    """The places of at most about so many points: of each of equal parts its lowest and its highest, so that no peak is lost.

    The first and the last are kept, and in each part a value that is not a number, which shows as a gap.
    """
    import numpy

    count = len(y)
    if count <= max(points, 4):
        return numpy.arange(count)
    parts = max(points // 2, 1)
    edges = numpy.linspace(0, count, parts + 1).astype(int)
    starts = edges[:-1]
    is_number = numpy.isfinite(y)
    part_of = numpy.repeat(numpy.arange(parts), numpy.diff(edges))
    kept = [numpy.array([0, count - 1])]
    for sign in (1.0, -1.0):
        values = numpy.where(is_number, sign * y, numpy.inf)
        lowest = numpy.minimum.reduceat(values, starts)
        first = first_in_parts(values == lowest[part_of], part_of, parts)
        kept.append(first)
    kept.append(first_in_parts(~is_number, part_of, parts))
    return numpy.unique(numpy.concatenate(kept))


def first_in_parts(is_it: "numpy.ndarray", part_of: "numpy.ndarray", parts: int) -> "numpy.ndarray":
    """The first place of each part at which `is_it` is true; nothing for parts without one."""
    import numpy

    places = numpy.flatnonzero(is_it)
    _, first = numpy.unique(part_of[places], return_index=True)
    return places[first]


def rounded(values: "numpy.ndarray") -> list[float | None]:
    """The numbers with seven digits, which is more than a picture shows; None for what is not a number."""
    return [float(f"{value:.7g}") if abs(value) < float("inf") else None for value in values.tolist()]


def curves(records: Sequence[Record], metrics: Sequence[str], axis: str, points: int) -> dict[str, Any]:
    """The answer to api/curves: a series for each run and metric that it logged; `missing` says of which runs there is no axis."""
    series, missing = [], {}
    for record in records:
        for metric in metrics:
            found, why = curve(record, metric, axis, points)
            if found is not None:
                series.append(found)
            elif why:
                missing[record.id] = why
    return {"series": series, "missing": [{"id": id, "why": why} for id, why in missing.items()]}
