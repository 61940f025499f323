"""What came out of a repetition, result by result: the same bytes, the same but for rounding, or something else."""

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from glmtuner.compare.diff import tensor_sentence
from glmtuner.compare.loaded import LoadedRun
from glmtuner.compare.steps import Parting, compare_steps, is_cost, relative_difference, rounding_of
from glmtuner.compare.tensors import compare_tensors, same_content, weights_in
from glmtuner.run_folder.files import is_number, read_lines
from glmtuner.run_folder.names import EVALUATIONS, LOSSES, PREDICTIONS, SAMPLED

# Rounding adds up over the steps: the norm of a tensor's difference, over its norm, is larger than that of a loss.
WEIGHTS_OVER_STEPS = 10.0
LONGEST = 120  # characters of an answer that are shown


class Kind(IntEnum):
    """How alike two results are; the larger, the less."""

    same = 0
    missing = 1  # one of the runs did not get there, or its files are gone
    rounding = 2
    other = 3


WORDS = {Kind.same: "same bytes", Kind.rounding: "rounding", Kind.other: "other", Kind.missing: "not compared"}


class Outcome(NamedTuple):
    """A result, how alike it is, and by how much it differs, in words."""

    name: str
    kind: Kind
    words: str = ""
    first: Parting | None = None  # of the steps: the value from which on they are apart


def outcomes(before: LoadedRun, after: LoadedRun) -> list[Outcome]:
    """The results of a run and of its repetition, in the order in which they came about."""
    rounding = rounding_of(before.values)
    trains = before.history or before.values.get("trainer.do_train")
    found = [steps_outcome(before, after, rounding)] if trains else []
    for path in sorted((before.folder / EVALUATIONS).glob("step-*.jsonl"), key=_step_of):
        found.append(lines_outcome(f"{EVALUATIONS}/{path.name}", before, after, rounding))
    for name in (SAMPLED, LOSSES, PREDICTIONS):
        if (before.folder / name).is_file():
            found.append(lines_outcome(name, before, after, rounding))
    if before.metrics:
        found.append(metrics_outcome(before, after, rounding))
    if weights_in(before.folder):
        found.append(weights_outcome(before, after, rounding))
    return found


def _step_of(path: Path) -> int:
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def overall(found: Sequence[Outcome]) -> Kind:
    """How alike the runs are: the steps and the weights decide; answers and scores, which one token can change, where those are equal."""
    decisive = [each.kind for each in found if each.name in (STEPS, WEIGHTS)]
    worst = max(decisive, default=Kind.same)
    return max(each.kind for each in found) if worst in (Kind.same, Kind.missing) else worst


STEPS, WEIGHTS = "logged steps", "trained weights"


def steps_outcome(before: LoadedRun, after: LoadedRun, rounding: float) -> Outcome:
    """The comparison of the histories, in phases: the same bytes up to a step, rounding up to another, and apart from there on."""
    steps = compare_steps(before.history, after.history)
    if not steps.common:
        reason = (
            "the run logged none; trainer.logging_steps=1 logs each"
            if not before.history
            else "no step was logged by both"
        )
        return Outcome(STEPS, Kind.missing, reason)
    listed = f"{len(steps.common):,} compared" + "".join(
        f", {len(only):,} only in the {name}"
        for name, only in zip(("run", "repetition"), steps.only, strict=True)
        if only
    )
    beyond = steps.first_beyond(rounding)
    if steps.missing:
        step, name = steps.missing[0]
        beyond = beyond or Parting(step, name, float("nan"), float("nan"))
    parts = [listed]
    if steps.first is not None and (equal := [step for step in steps.common if step < steps.first.step]):
        parts.append(f"the same up to step {equal[-1]}")
    if beyond is not None:
        if steps.first is not None and steps.first.step < beyond.step:
            parts.append(f"rounding from step {steps.first.step} on")
        return Outcome(STEPS, Kind.other, "; ".join([*parts, parted(beyond)]), beyond)
    if (largest := steps.largest) is not None:
        parts.append(
            f"within {largest.relative:.2g} of the value (rounding is up to {rounding:g}), most at step {largest.step}: "
            f"{largest.name} {largest.before:.9g} then, {largest.after:.9g} now"
        )
        return Outcome(STEPS, Kind.rounding, "; ".join(parts))
    if steps.partings:  # scores of answers alone
        return Outcome(
            STEPS, Kind.rounding, "; ".join([*parts, f"all but the scores of answers, {parted(steps.partings[0])}"])
        )
    return Outcome(STEPS, Kind.same if not any(steps.only) else Kind.missing, listed)


def parted(each: Parting) -> str:
    """Where and by how much a value is another, in words."""
    if each.before != each.before and each.after != each.after:
        return f"other from step {each.step} on: {each.name} was logged by one of them only"
    return f"other from step {each.step} on: {each.name} {each.before:.6g} then, {each.after:.6g} now"


def lines_outcome(name: str, before: LoadedRun, after: LoadedRun, rounding: float) -> Outcome:
    """The comparison of two files with a line per record, by their bytes, else line by line."""
    one, other = before.folder / name, after.folder / name
    if not other.is_file():
        return Outcome(name, Kind.missing, "the repetition has none")
    if same_content(one, other):
        return Outcome(name, Kind.same, f"{sum(1 for _ in read_lines(one)):,} lines")
    lines, others = list(read_lines(one)), list(read_lines(other))
    if len(lines) != len(others):
        return Outcome(name, Kind.other, f"{len(lines):,} lines then, {len(others):,} now")
    largest, apart = 0.0, []
    for number, (then, now) in enumerate(zip(lines, others, strict=True), start=1):
        texts = [
            key
            for key in {**then, **now}
            if not (is_number(then.get(key)) and is_number(now.get(key))) and then.get(key) != now.get(key)
        ]
        largest = max(
            [
                largest,
                *(
                    relative_difference(then[key], now[key])
                    for key in then
                    if is_number(then[key]) and is_number(now.get(key))
                ),
            ]
        )
        if texts:
            apart.append((number, texts[0]))
    if apart:
        number, key = apart[0]
        before_after = " then, ".join(_shortened(each[number - 1].get(key)) for each in (lines, others))
        words = f"{len(apart):,} of {len(lines):,} lines; the first is {number}: {key} {before_after} now"
        return Outcome(name, Kind.other, words)
    kind = Kind.rounding if largest <= rounding else Kind.other
    return Outcome(
        name, kind, f"within {largest:.2g} of the values of {len(lines):,} lines" if largest else "the same values"
    )


def _shortened(value: object) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def metrics_outcome(before: LoadedRun, after: LoadedRun, rounding: float) -> Outcome:
    """The comparison of metrics.json, times and memory left out."""
    if not after.metrics:
        return Outcome("metrics", Kind.missing, "the repetition is not finished")
    names = [name for name in {**before.metrics, **after.metrics} if not is_cost(name)]
    nan = float("nan")
    apart = [
        Parting(0, name, before.metrics.get(name, nan), after.metrics.get(name, nan))
        for name in names
        if (name in before.metrics) != (name in after.metrics)
        or relative_difference(before.metrics[name], after.metrics[name])
    ]
    if not apart:
        return Outcome("metrics", Kind.same, f"{len(names):,} values, times and memory aside")
    worst = max(apart, key=lambda each: each.relative)
    kind = Kind.rounding if worst.relative <= rounding else Kind.other
    return Outcome(
        "metrics",
        kind,
        f"{len(apart):,} of {len(names):,} values, most {worst.name}: {worst.before:.6g} then, {worst.after:.6g} now",
    )


def weights_outcome(before: LoadedRun, after: LoadedRun, rounding: float) -> Outcome:
    """The comparison of the trained weights."""
    files = weights_in(before.folder), weights_in(after.folder)
    if not files[1]:
        return Outcome(WEIGHTS, Kind.missing, "the repetition has none")
    tensors = compare_tensors(*files)
    if tensors.same_bytes:
        return Outcome(
            WEIGHTS,
            Kind.same,
            f"{tensors.files:,} {'file' if tensors.files == 1 else 'files'}, {tensors.tensors:,} tensors",
        )
    is_rounding = tensors.relative <= WEIGHTS_OVER_STEPS * rounding and not tensors.unlike
    return Outcome(WEIGHTS, Kind.rounding if is_rounding else Kind.other, tensor_sentence(tensors))
