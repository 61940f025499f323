"""What a probe measured, and the costs of a job that follow from it; pure functions."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Seconds:
    """A duration: by the clock, and by the processor, whose seconds do not depend on what else the machine does."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Seconds") -> "Seconds":
        """The difference, never below 0."""
        return Seconds(max(self.wall - other.wall, 0.0), max(self.cpu - other.cpu, 0.0))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.wall * factor, self.cpu * factor)


def total(parts: Iterable[Seconds]) -> Seconds:
    """The sum of durations."""
    return sum(parts, Seconds())


def mean(parts: Sequence[Seconds]) -> Seconds:
    """The mean of durations; 0 of none."""
    return total(parts) * (1 / len(parts)) if parts else Seconds()


@dataclass(frozen=True)
class Size:
    """What decides on the duration of batches: the tokens that are computed, and the sum of the rows' squared lengths."""

    tokens: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.tokens + other.tokens, self.squares + other.squares)

    def __mul__(self, factor: float) -> "Size":
        return Size(self.tokens * factor, self.squares * factor)


@dataclass(frozen=True)
class Line:
    """The duration of a batch: `base`, `per_token` of matrix products, and `per_square` of attention."""

    base: Seconds = Seconds()
    per_token: Seconds = Seconds()
    per_square: Seconds = Seconds()

    def of(self, batches: float, size: Size) -> Seconds:
        """The duration of so many batches of so much together."""
        return self.base * batches + self.per_token * size.tokens + self.per_square * size.squares


def fit(points: Sequence[tuple[Size, Seconds]]) -> Line:
    """The durations of batches of these sizes by least squares, each part at least 0; without differences in size, a time a token."""
    wall, cpu = (
        _fit([size for size, _ in points], [getattr(seconds, name) for _, seconds in points])
        for name in ("wall", "cpu")
    )
    return Line(*(Seconds(*both) for both in zip(wall, cpu, strict=True)))


def _fit(sizes: Sequence[Size], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Base, and seconds a token and a square: of all choices of parts that are positive together, the one with the least error.

    With three parts this is the exact solution of non-negative least squares (Lawson and Hanson 1974).
    """
    import numpy

    if not sizes:
        return 0.0, 0.0, 0.0
    columns = numpy.array([[1.0, size.tokens, size.squares] for size in sizes])
    scale = columns.max(axis=0)
    usable = [part for part in range(3) if scale[part] > 0 and (part == 0 or numpy.ptp(columns[:, part]) > 0)]
    if usable == [0] and scale[1] > 0:  # batches of one size: one of half of the tokens takes half of the time
        return 0.0, float(numpy.mean(seconds)) / float(scale[1]), 0.0
    best, least = numpy.array([float(numpy.mean(seconds)), 0.0, 0.0]), numpy.inf
    for count in range(1, min(len(usable), len(sizes)) + 1):
        for parts in combinations(usable, count):
            chosen = columns[:, parts] / scale[list(parts)]
            found, *_ = numpy.linalg.lstsq(chosen, numpy.array(seconds), rcond=None)
            error = float(((chosen @ found - seconds) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = numpy.zeros(3), error
                best[list(parts)] = found / scale[list(parts)]
    base, per_token, per_square = (float(part) for part in best)
    return base, per_token, per_square


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The batches of an epoch of the training, or of an evaluation, on one process."""

    records: int = 0
    batches: int = 0
    computed: Size = Size()  # padding included where there is any
    tokens: int = 0  # without padding
    squares: int = 0  # sum of the squared lengths of the rows
    largest: int = 0  # computed tokens of the largest batch
    per_batch: int = 0  # rows of a batch


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on a few rows of one job."""

    device: str  # `cpu`, or the name of the GPU
    tokenizing: Seconds = Seconds()  # of data that no cache had; a job reads the cache
    libraries: Seconds = Seconds()  # from the start of the process
    loading: Seconds = Seconds()  # of data, model, method and Trainer
    reference_row: Seconds = Seconds()  # of stage.precompute_reference, a record
    around_training: Seconds = Seconds()  # the checks before the first step, and what the first one takes longer
    batch: Line = Line()  # forward and backward pass
    fetch: Seconds = Seconds()  # reading and collating a batch
    step: Seconds = Seconds()  # the optimizer, and all else that follows the batches of a step
    checkpoint: Seconds = Seconds()
    evaluation: Line = Line()
    around_evaluation: Seconds = Seconds()
    first_answer: Seconds = Seconds()  # what the first generation of the process takes longer
    answers: Seconds = Seconds()  # of a batch of answers, whatever their number
    answer: Seconds = Seconds()  # of each answer
    answers_at_once: int = 1
    answers_capped: bool = False  # some went on beyond the probe's tokens; they are taken to be as long as they may be
    report: Seconds = Seconds()  # pictures and report of a run, the first time
    ending: Seconds = Seconds()  # of a process
    train: Rows = Rows()
    evaluated: Rows = Rows()
    flops_per_token: int | None = None
    flops_per_square: int | None = None
    peak_bytes: int = 0
    watts: float | None = None  # of a GPU, or of a machine without one
    notes: tuple[str, ...] = ()


def to_json(value: Any) -> dict[str, Any]:
    """A dataclass of this module as JSON's types."""
    return dataclasses.asdict(value)


def probe_of(saved: Mapping[str, Any]) -> Probe:
    """The probe that `to_json` made this of; raises KeyError, TypeError or ValueError for anything else."""
    kinds = {declared.name: declared.type for declared in dataclasses.fields(Probe)}
    values: dict[str, Any] = {}
    for name, value in saved.items():
        kind = kinds[name]
        if kind is Seconds:
            value = Seconds(**value)
        elif kind is Line:
            value = Line(**{part: Seconds(**seconds) for part, seconds in dict(value).items()})
        elif kind is Rows:
            value = Rows(**{**value, "computed": Size(**value["computed"])})
        elif name == "notes":
            value = tuple(value)
        values[name] = value
    return Probe(**values)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often a job does what: `evaluations` are those during the training."""

    steps: int = 0
    batches: float = 0  # forward and backward passes
    checkpoints: int = 0
    evaluations: int = 0
    evaluates: bool = False  # after the training, or without one
    predicts: bool = False
    generates: bool = False  # answers, in its evaluations during the training too

    def left(self, steps_done: int) -> "Counts":
        """What is left of them after so many steps."""
        share = 1 - min(steps_done / self.steps, 1) if self.steps else 1.0
        return dataclasses.replace(
            self,
            steps=max(self.steps - steps_done, 0),
            batches=self.batches * share,
            checkpoints=math.ceil(self.checkpoints * share),
            evaluations=math.ceil(self.evaluations * share),
        )


def counts_of(trainer: Any, rows: Rows, *, evaluates: bool, predicts: bool, generates: bool) -> Counts:
    """The counts of a run with these trainer arguments, as transformers' Trainer steps, saves and evaluates."""
    ends = {"evaluates": evaluates, "predicts": predicts, "generates": generates}
    if not trainer.do_train:
        return Counts(**ends)
    accumulation = trainer.gradient_accumulation_steps
    per_epoch = max(math.ceil(rows.batches / accumulation), 1)
    steps = trainer.max_steps if trainer.max_steps > 0 else math.ceil(trainer.num_train_epochs * per_epoch)
    whole_epochs, others = divmod(steps, per_epoch)
    batches = whole_epochs * rows.batches + min(others * accumulation, rows.batches)
    epochs = steps / per_epoch
    checkpoints = _times(trainer.save_strategy, trainer.save_steps, steps, epochs)
    interval = trainer.eval_steps if trainer.eval_steps is not None else trainer.logging_steps
    evaluations = _times(trainer.eval_strategy, interval, steps, epochs, trainer.eval_delay)
    if trainer.save_strategy == "best":
        checkpoints = evaluations
    return Counts(
        steps=steps,
        batches=batches,
        checkpoints=checkpoints,
        evaluations=evaluations + bool(trainer.eval_on_start),
        **ends,
    )


def _times(strategy: str, interval: float, steps: int, epochs: float, delay: float = 0) -> int:
    """How often something happens that a strategy of transformers asks for: the last step counts, too."""
    if strategy == "steps":
        every = math.ceil(steps * interval) if interval < 1 else int(interval)
        return len({*range(every, steps + 1, every), steps} - {*range(math.ceil(delay))})
    if strategy == "epoch":
        return sum(epoch >= delay for epoch in range(1, math.ceil(epochs) + 1))
    return 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one job takes."""

    parts: Mapping[str, Seconds]  # what -> how long
    start: Seconds  # the part of it that each submission repeats
    own_process: Seconds  # the part of it that jobs in one process share
    steps: int = 0
    tokens: int = 0
    flops: float | None = None
    capped: bool = False  # are answers taken to be as long as they may be?

    @property
    def seconds(self) -> Seconds:
        """The whole duration, in a process of its own."""
        return total(self.parts.values())


def cost_of(probe: Probe, counts: Counts, world: int = 1) -> Cost:
    """The cost of a job in a process of its own, by part; on `world` processes, each of which has its share of the rows."""
    start = probe.libraries + probe.loading + probe.reference_row * (probe.train.records + probe.evaluated.records)
    once = probe.first_answer if counts.generates and (counts.predicts or counts.evaluations) else Seconds()
    # rows that are trained, in epochs of all rows
    epochs = counts.batches * world / probe.train.batches if probe.train.batches else 0.0
    tokens, squares = epochs * probe.train.tokens, epochs * probe.train.squares
    training = probe.batch.of(counts.batches, probe.train.computed * (epochs / world))
    training += probe.fetch * counts.batches + probe.step * counts.steps
    evaluation = probe.around_evaluation + probe.evaluation.of(
        probe.evaluated.batches / world, probe.evaluated.computed * (1 / world)
    )
    answers = _answers(probe, probe.evaluated.records / world)
    known = probe.flops_per_token is not None and probe.flops_per_square is not None
    parts = {
        "start-up": start,
        "training": training + probe.around_training if counts.steps else Seconds(),
        "evaluation": evaluation * (counts.evaluations + counts.evaluates),
        "generation": once + answers * ((counts.evaluations if counts.generates else 0) + counts.predicts),
        "checkpoints": probe.checkpoint * counts.checkpoints,
        "report": probe.report,
        "ending": probe.ending,
    }
    return Cost(
        parts=parts,
        start=start,
        own_process=probe.libraries + once + probe.ending,
        steps=counts.steps,
        tokens=round(tokens),
        capped=probe.answers_capped and counts.generates,
        flops=tokens * (probe.flops_per_token or 0) + squares * (probe.flops_per_square or 0) if known else None,
    )


def _answers(probe: Probe, records: float) -> Seconds:
    """The answers to so many evaluation records, once."""
    rounds = max(records / max(probe.answers_at_once, 1), 1.0)
    return probe.answers * rounds + probe.answer * records
