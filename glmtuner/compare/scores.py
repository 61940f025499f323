"""Metrics of several runs with paired intervals of their differences, and the answers on which they differ most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glmtuner.compare.loaded import LoadedRun
from glmtuner.compare.steps import is_cost, relative_difference
from glmtuner.report.answers import answers_by_question
from glmtuner.report.bootstrap import Interval, interval
from glmtuner.report.leaderboard import method_note
from glmtuner.report.ranking import resolve_objective
from glmtuner.report.record_scores import common_records
from glmtuner.report.run import MISSING, truncated

MAX_ANSWERS, MAX_LENGTH = 5, 400
NOT_RESULTS = ("epoch",)


@dataclass(frozen=True)
class MetricDifference:
    """A metric that is not the same in two runs; without an interval, `why_not` says why there is none."""

    name: str
    before: float | None
    after: float | None
    interval: Interval | None = None
    why_not: str = ""

    def shown(self) -> str:
        """The difference and, where there is one, its interval; ≈ marks one that contains 0."""
        if self.before is None or self.after is None:
            return MISSING
        if self.interval is None:
            difference = self.after - self.before
            if isinstance(difference, int):
                return f"{difference:+,}"
            return f"{difference:+.4g}" if math.isfinite(difference) else MISSING
        bounds = (self.interval.value, self.interval.low, self.interval.high)
        size = max(map(abs, bounds))
        decimals = min(max(2 - math.floor(math.log10(size)), 0), 12) if size else 0  # three digits of the largest
        value, low, high = (f"{each:+,.{decimals}f}" for each in bounds)
        mark = "≈ " if self.interval.contains_zero else ""
        return f"{mark}{value} [{low}, {high}] ({self.interval.num_records:,} records)"


def metric_differences(before: LoadedRun, after: LoadedRun) -> list[MetricDifference]:
    """The metrics that are not the same, costs left out, with the paired interval of each that has the scores of its records."""
    found = []
    names = dict.fromkeys([*before.metrics, *after.metrics])
    for name in names:
        one, other = before.metrics.get(name), after.metrics.get(name)
        if name in NOT_RESULTS or is_cost(name):
            continue
        if name.startswith("eval_") and f"predict_{name.removeprefix('eval_')}" in names:
            continue  # the same score of the same answers
        if one is None or other is None:
            found.append(MetricDifference(name, one, other))
        elif relative_difference(one, other):
            found.append(MetricDifference(name, one, other, *_paired(before, after, name)))
    return found


def _paired(before: LoadedRun, after: LoadedRun, name: str) -> tuple[Interval | None, str]:
    """The interval of after - before on the records of both; or None, and why there is none."""
    own, other = before.row.record_scores.get(name), after.row.record_scores.get(name)
    if not own or not other:
        is_measured = name.startswith(("predict_", "eval_"))
        return None, "there are no scores of its single records" if is_measured else ""
    if not name.startswith("predict_") and (sets := changed_evaluation(before, after)):
        return None, f"the records of {', '.join(sets)} are others"
    records = common_records(own, other)
    if not records:
        return None, "they were evaluated on other records"
    found = interval([other[record] for record in records], [own[record] for record in records])
    return found, "" if found else "there are fewer than two records"


def changed_evaluation(before: LoadedRun, after: LoadedRun) -> list[str]:
    """The evaluation datasets of one name whose records, or files, are recorded as others."""
    named = before.values.get("data.eval_dataset") or before.values.get("data.dataset") or []
    entries = [(run.provenance.get("data", {}).get(name, {}) for run in (before, after)) for name in named]
    changed = []
    for name, (one, other) in zip(named, entries, strict=True):
        fact = "records_sha256" if "records_sha256" in one and "records_sha256" in other else "sha256"
        if one.get(fact) != other.get(fact):
            changed.append(str(name))
    return changed


def metrics_table(runs: Sequence[LoadedRun]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and notes of the metrics that differ from the first run's; the rows are empty where none does."""
    first, *others = runs
    pairs = [{each.name: each for each in metric_differences(first, other)} for other in others]
    names = dict.fromkeys(name for pair in pairs for name in pair)
    header = ["metric", first.label]
    for other in others:
        header += [other.label, f"{other.label} - {first.label}"]
    rows, reasons = [], dict[str, list[str]]()
    for name in names:
        row = [name, metric_value(first.metrics.get(name))]
        for other, pair in zip(others, pairs, strict=True):
            each = pair.get(name)
            row += [metric_value(other.metrics.get(name)), each.shown() if each else "="]
            if each and each.why_not:
                reasons.setdefault(each.why_not, []).append(name)
        rows.append(row)
    notes = [f"{', '.join(dict.fromkeys(each))}: no interval, because {reason}." for reason, each in reasons.items()]
    notes += [note for run in runs for note in run.notes]
    if any(each.interval for pair in pairs for each in pair.values()):
        notes.append(method_note())
    return header, rows, list(dict.fromkeys(notes))


def metric_value(value: float | None) -> str:
    """A value with six significant digits, so that values that differ show it; a count in full; a dash for None."""
    if value is None:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def costs_table(runs: Sequence[LoadedRun]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of times, speeds and memory, which differ between any two runs."""
    names = dict.fromkeys(name for run in runs for name in run.metrics if is_cost(name))
    return ["", *(run.label for run in runs)], [
        [name, *(metric_value(run.metrics.get(name)) for run in runs)] for name in names
    ]


def answers_table(runs: Sequence[LoadedRun]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and notes of the answers on which the runs differ most; the rows are empty where none differs.

    Most is by the first score that both have of each answer, else by the first question.
    """
    answers = [answers_by_question(run.job) for run in runs]
    common = [question for question in answers[0] if all(question in each for each in answers)]
    different = [question for question in common if len({each[question] for each in answers}) > 1]
    if not any(answers):
        return [], [], []
    notes = []
    if not common:
        notes.append("They were asked other questions, or their labels are others, so no answers are compared.")
    elif any(len(each) > len(common) for each in answers):
        notes.append(f"Only the {len(common):,} questions that all were asked are compared.")
    if not different:
        return [], [], notes
    objective, _ = resolve_objective([run.job for run in runs])
    scored = [name for name in runs[0].row.record_scores if name.startswith("predict_")]
    scored = [name for name in scored if all(name in run.row.record_scores for run in runs)]
    name = objective if objective in scored else scored[0] if scored else None
    scores = [run.row.record_scores[name] if name else {} for run in runs]

    def score(index: int, question: tuple[str, str]) -> float:
        total, weight = scores[index].get(question, (0.0, 1.0))
        return total / max(weight, 1e-9)

    def spread(question: tuple[str, str]) -> float:
        each = [score(index, question) for index in range(len(runs))]
        return max(each) - min(each)

    shown = sorted(different, key=spread, reverse=True)[:MAX_ANSWERS]
    by = f", those with the largest difference of {name}, which stands behind each" if name else ""
    notes.insert(
        0,
        f"{len(different):,} of {len(common):,} answers differ{by}."
        + (f" The first {len(shown)}:" if len(shown) < len(different) else ""),
    )
    rows = []
    for question in shown:
        cells = [truncated(each[question], MAX_LENGTH) for each in answers]
        if name:
            cells = [f"{cell} ({score(index, question):.1f})" for index, cell in enumerate(cells)]
        rows.append([*(truncated(text, MAX_LENGTH) for text in question), *cells])
    return ["question", "label", *(run.label for run in runs)], rows, notes
