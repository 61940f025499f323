"""A few steps, evaluations, answers and checkpoints of one run, timed in a process of its own: `python -m glmtuner.launch.forecast.probe`.

The run is set up as any other, in a temporary folder and without a tracker, and trains on a few batches from the shortest to the
longest of its own.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed, compose
from glmtuner.config.groups import Engine
from glmtuner.config.schema import Tracker
from glmtuner.console import plain
from glmtuner.data.splits import dataset_entries
from glmtuner.distributed import accelerator
from glmtuner.errors import GlmtunerError
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.launch.forecast.batches import FEW, Sample, sampled
from glmtuner.launch.forecast.cost import Line, Probe, Seconds, Size, fit, mean, to_json, total
from glmtuner.launch.forecast.power import Power
from glmtuner.launch.parts import Parts
from glmtuner.launch.places import catalogue_dirs
from glmtuner.launch.register import register_presets
from glmtuner.launch.run import finish, set_up
from glmtuner.launch.training import train
from glmtuner.launch.watch import Watcher
from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.stages.stage import learning_stage

if TYPE_CHECKING:
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.training.trainer import GlmTrainer

ENOUGH = ((10.0, FEW), (60.0, 4))  # seconds, after which no further batch is tried once there are so many
ANSWER_TOKENS = 64  # the most that an answer is tried with


def now() -> Seconds:
    """The time, once the GPU has done what it was asked for."""
    accelerator.synchronize()
    return Seconds(time.time(), time.process_time())


def process_start() -> Seconds:
    """When this process was started: none of its processor's time was used then."""
    import psutil

    return Seconds(psutil.Process().create_time(), 0.0)


class Timer:
    """Times the calls of an object's method: `calls` has the size of each batch, and when it began and ended."""

    def __init__(self, owner: Any, name: str, size_of: Callable[..., Size] = lambda *given: Size()) -> None:
        self.calls: list[tuple[Size, Seconds, Seconds]] = []
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            size, start = size_of(*args), now()
            result = method(*args, **kwargs)
            self.calls.append((size, start, now()))
            return result

        setattr(owner, name, timed)

    def durations(self) -> list[tuple[Size, Seconds]]:
        """The size of the batch and the duration of each call."""
        return [(size, end - start) for size, start, end in self.calls]


def size_of(unpads: bool) -> Callable[..., Size]:
    """What tells a batch's size, given the model and its inputs; `unpads`: the model is called without the padding that it has."""

    def size(model: Any, inputs: Any, *others: Any) -> Size:
        if "segments" in inputs:
            lengths = [float(length) for length in inputs["segments"].lengths]
        elif unpads and "attention_mask" in inputs:
            lengths = inputs["attention_mask"].sum(1).float().tolist()
        elif "input_ids" in inputs:
            rows, longest = inputs["input_ids"].shape
            lengths = [float(longest)] * rows
        else:
            return Size()
        return Size(sum(lengths), sum(length**2 for length in lengths))

    return size


class Measured(Watcher):
    """Times the setting up of a run, and lets it go on with a sample of its rows."""

    def __init__(self, composed: Composed) -> None:
        self.composed = composed
        self.at: dict[str, Seconds] = {}
        self.tokenizing = Seconds()
        self.sample: Sample | None = None

    def reached(self, part: str) -> None:
        self.at[part] = now()

    def data(self, load: "Callable[[], Datasets]") -> "Datasets":
        from glmtuner.config.paths import cache_root

        folder = cache_root() / "tokenized"

        def cached() -> set[str]:
            return {*os.listdir(folder)} if folder.is_dir() else set()

        known, start = cached(), now()
        data = load()
        if cached() - known:  # a job will read the cache, which is timed instead
            middle = now()
            data = load()
            self.tokenizing = (middle - start) - (now() - middle)
            self.extra = middle - start
        else:
            self.extra = Seconds()
        return data

    def rows(self, data: "Datasets") -> "Datasets":
        start = now()
        self.sample = sampled(self.composed.run, data)
        self.extra += now() - start
        return self.sample.data


def measured(composed: Composed, folder: RunFolder) -> Probe:
    """The probe of a composed run; `folder` is temporary."""
    run, stage = composed.run, learning_stage(composed.run)
    specs = dataset_entries(run, catalogue_dirs(composed))
    run.stage.check(run)
    watcher = Measured(composed)
    context, trainer = set_up(composed, specs, folder, Tracker(name="none"), False, None, Parts(), watcher)
    ready, at, sample = now(), watcher.at, watcher.sample
    assert sample is not None
    unpadded = FastPath.without_padding not in trainer.left_out
    reference = at["reference"] - at["model"]
    sampled_rows = sum(len(rows) for rows in (sample.data.train, sample.data.evaluation) if rows is not None)
    precomputes = bool(trainer.objective is not None and getattr(trainer.objective, "precomputes", False))
    values: dict[str, Any] = {
        "device": device_name(trainer),
        "tokenizing": watcher.tokenizing,
        "libraries": at["libraries"] - process_start(),
        "loading": (at["model"] - at["libraries"]) - watcher.extra + (ready - at["reference"]),
        "reference_row": reference * (1 / max(sampled_rows, 1)) if precomputes else Seconds(),
        "train": sample.train_rows(unpadded),
        "evaluated": sample.evaluation_rows(unpadded),
    }
    metrics: dict[str, float] = {}
    if run.trainer.do_train:
        values |= training_times(context, trainer, sample, metrics)
    if sample.data.evaluation is not None:
        values |= evaluation_times(context, trainer, sample, unpadded)
        if run.trainer.predict_with_generate and run.generation.engine is Engine.transformers:
            values |= answer_times(context, len(sample.prompts))
        elif run.trainer.do_predict and not run.trainer.predict_with_generate:
            values |= prediction_times(context, trainer, stage)
    start = now()
    metrics |= trainer.resources()
    finish(context, trainer, metrics)
    values["report"] = now() - start
    return Probe(**values, peak_bytes=round(metrics["peak_memory_gib"] * 2**30))


def training_times(
    context: "RunContext", trainer: "GlmTrainer", sample: Sample, metrics: dict[str, float]
) -> dict[str, Any]:
    """The times of a training on the sampled batches, by the names in `Probe`."""
    from transformers import TrainerCallback

    from glmtuner.training.throughput import model_flops

    flops = model_flops(trainer.model) if trainer.objective is None else None
    arguments = trainer.args
    accumulation = arguments.gradient_accumulation_steps = min(arguments.gradient_accumulation_steps, 2)
    arguments.train_sampling_strategy, arguments.num_train_epochs = "sequential", 1.0
    arguments.max_steps = max(sample.tried_batches(trainer) // accumulation, 2)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = arguments.eval_on_start = False
    # an objective's batches are padded, and lose the padding where the model is called
    unpads = trainer.objective is not None and FastPath.without_padding not in trainer.left_out
    batches = Timer(trainer, "training_step", size_of(unpads))
    fetches = Timer(trainer, "get_batch_samples")
    saves = Timer(trainer, "_save_checkpoint")
    ends: list[Seconds] = []
    begun = time.monotonic()

    class Pace(TrainerCallback):
        """Saves after the last two steps, and ends a training that takes long."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(now())
            took, tried = time.monotonic() - begun, len(batches.calls)
            late = any(took > seconds and tried >= few for seconds, few in ENOUGH)
            if late:
                state.max_steps = state.global_step
                control.should_training_stop = True
            if late or state.global_step >= state.max_steps - 1:
                control.should_save = True

    trainer.add_callback(Pace())
    start = now()
    with Power(trainer.args.device.type) as power:
        metrics |= train(context, trainer, False)
        whole = now() - start
    timed = batches.durations()
    later = timed[accumulation:] or timed
    own_steps = trainer.objective is not None and trainer.objective.takes_optimizer_steps
    line = Line(mean([seconds for _, seconds in later])) if own_steps else fit(later)
    fetch = mean([seconds for _, seconds in fetches.durations()]) * (1 / accumulation)
    # from the end of a step's last batch to the first look at the next: the optimizer, the callbacks, the log
    afters = [
        fetches.calls[step + 1][1] - batches.calls[(step + 1) * accumulation - 1][2]
        for step in range(1, len(ends) - 1)
        if step + 1 < len(fetches.calls)
        and not any(ends[step].wall <= begin.wall <= fetches.calls[step + 1][1].wall for _, begin, _ in saves.calls)
    ] or [end - batches.calls[(step + 1) * accumulation - 1][2] for step, end in enumerate(ends)][1:]
    after = mean(afters)
    saved = [seconds for _, seconds in saves.durations()]
    usual = line.of(len(timed), sum((size for size, _ in timed), Size())) + fetch * len(timed) + after * len(ends)
    return {
        "batch": line,
        "fetch": fetch,
        "step": after,
        "checkpoint": mean(saved),
        "around_training": whole - usual - total(saved),
        "flops_per_token": flops.per_token if flops else None,
        "flops_per_square": flops.per_squared_length if flops else None,
        "watts": power.watts,
    }


def evaluation_times(context: "RunContext", trainer: "GlmTrainer", sample: Sample, unpadded: bool) -> dict[str, Any]:
    """The times of an evaluation's losses."""
    trainer.score, trainer.evaluated_parts = None, {}
    unpads = trainer.objective is not None and unpadded
    rows: Any = trainer.eval_dataset
    size = trainer.args.eval_batch_size
    if "input_ids" not in rows.column_names:
        return {}
    trainer.evaluate(rows.select(range(min(size, len(rows)))))  # what only the first one takes
    batches = Timer(trainer, "prediction_step", size_of(unpads))
    start = now()
    trainer.evaluate()
    whole = now() - start
    timed = batches.durations()
    line = fit(timed)
    between = whole - total(seconds for _, seconds in timed)
    # what is not a batch is divided between the batches and the evaluation by two evaluations of different size
    few = rows.select(range(min(size, len(rows))))
    batches.calls.clear()
    start = now()
    trainer.evaluate(few)
    around = now() - start - total(seconds for _, seconds in batches.durations())
    each = (between - around) * (1 / (len(timed) - 1)) if len(timed) > 1 else Seconds()
    return {
        "evaluation": dataclasses.replace(line, base=line.base + each),
        "around_evaluation": around - each,
    }


def answer_times(context: "RunContext", records: int) -> dict[str, Any]:
    """The times of generated and scored answers: the first one of the process, a batch of them, and each."""
    from glmtuner.inference.predict import answer_all, batch_size_of
    from glmtuner.run_folder.files import read_lines

    run, data = context.run, context.data
    assert data.evaluation is not None
    most = run.generation.max_new_tokens or run.data.max_target_length
    tried = min(most, ANSWER_TOKENS)
    prompts = [row["prompt_ids"] for row in data.evaluation]
    at_once = batch_size_of(run, context.model, prompts, most)
    generation = dataclasses.replace(run.generation, max_new_tokens=tried)
    run = dataclasses.replace(run, generation=generation)

    def timed(count: int) -> tuple[Seconds, list[int]]:
        rows = data.evaluation.select(range(count))  # type: ignore[union-attr]
        few = dataclasses.replace(context, run=run, data=dataclasses.replace(data, evaluation=rows, evaluated={}))
        path = context.folder / f"probe-{count}.jsonl"
        start = now()
        answer_all(few, path)
        seconds = now() - start
        texts = [line["predict"] for line in read_lines(path)]
        return seconds, [len(context.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    count = min(len(data.evaluation), at_once)
    first, _ = timed(1)
    one, _ = timed(1)
    many, lengths = timed(count)
    capped = tried < most and any(length >= tried - 1 for length in lengths)
    longer = _longer(lengths, tried, most) if capped else 1.0
    each = (many - one) * (1 / (count - 1)) if count > 1 else Seconds()
    return {
        "first_answer": first - one,
        "answers": (one - each) * longer,
        "answer": each * longer,
        "answers_at_once": at_once,
        "answers_capped": capped,
    }


def _longer(lengths: Sequence[int], tried: int, most: int) -> float:
    """How many times as long answers are if those that reached the probe's limit go on to that of the run."""
    full = sum(most if length >= tried - 1 else length for length in lengths)
    return full / max(sum(lengths), 1)


def prediction_times(context: "RunContext", trainer: "GlmTrainer", stage: Any) -> dict[str, Any]:
    """The time of a prediction without generated answers, a record."""
    start = now()
    stage.predict(context, trainer)
    return {"answer": (now() - start) * (1 / max(len(context.data.evaluation or ()), 1))}


def device_name(trainer: "GlmTrainer") -> str:
    """`cpu`, or the name of the GPU."""
    return accelerator.name_of(trainer.args.device)


def main() -> int:
    """Probe the run of the arguments and write the result as JSON; the exit code is 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="python -m glmtuner.launch.forecast.probe")
    parser.add_argument("--result", required=True)
    parser.add_argument("--config-dir")
    parser.add_argument("--config-name", default="config")
    options, overrides = parser.parse_known_args()
    register_presets()
    with tempfile.TemporaryDirectory(prefix="glmtuner-forecast-") as scratch:
        try:
            composed = compose(overrides, config_dir=options.config_dir, config_name=options.config_name)
            folder = RunFolder(Path(scratch) / "run")
            probe = measured(composed, folder)
        except GlmtunerError as error:
            print(plain(str(error)), file=sys.stderr)
            return 2
        ended = now()
        write_json(Path(options.result), {**to_json(probe), "ending": to_json(ended)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
