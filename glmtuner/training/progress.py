"""Shows how far a training is: in the terminal, and in a file for those who look at its folder meanwhile."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from glmtuner.console import POSITION, SPEAKER, LiveRegion, duration, live_region, replaces_lines, say
from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PROGRESS
from glmtuner.training.measurements import peak_memory_gib

WRITE_SECONDS = 5.0  # between two writes
TIMINGS = ("_runtime", "_per_second", "_time", "total_flos")  # of what is logged


class ShowProgress(TrainerCallback):
    """Writes progress.json: `step` of `steps`, and the `seconds` since this process began at `start_step`.

    At the beginning, every WRITE_SECONDS, and at the end.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder / PROGRESS
        self.start_step, self.start, self.written = 0, time.monotonic(), 0.0

    def _write(self, state: Any) -> None:
        self.written = time.monotonic()
        seconds = round(self.written - self.start, 1)
        progress = {
            "step": state.global_step,
            "steps": state.max_steps,
            "start_step": self.start_step,
            "seconds": seconds,
        }
        write_json(self.path, progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_step, self.start = state.global_step, time.monotonic()
        if args.should_save:
            self._write(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and time.monotonic() - self.written >= WRITE_SECONDS:
            self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            self._write(state)


class MeasuredTrainer(Protocol):
    """The members of GlmTrainer that the line about a run reads."""

    args: Any
    tokens_per_second: float | None  # of all ranks, when it was measured last


class ProgressLine(TrainerCallback):
    """One live line about the run in a terminal, in place of transformers' bar and dictionaries; else a line for each logging step.

    With `plain` the terminal gets these lines, too. Only numbers are shown that are on the host already: no step
    waits for the device.
    """

    def __init__(self, trainer: MeasuredTrainer, plain: bool = False) -> None:
        self.trainer, self.plain = trainer, plain
        self.region: LiveRegion | None = None
        self.start_step, self.start, self.trains = 0, 0.0, False
        self.loss: float | None = None  # as it was logged last
        self.evaluated = ""  # how far an evaluation is
        self.batches = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the line be seen while this lasts; it leaves nothing behind."""
        if self.region is not None or self.plain:
            yield
            return
        with live_region() as self.region:
            try:
                yield
            finally:
                self.region = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """`shown`, for an evaluation."""
        with self.shown():
            self.batches = 0
            try:
                yield
            finally:
                self.evaluated = ""

    def line(self, state: Any) -> str:
        """`step 5 of 20, epoch 1.25, loss 2.31, 3,210 tokens/s, 12 s left, peak 1.2 GiB`, of which only what is known."""
        if not self.trains:
            return self.evaluated
        parts = [f"step {state.global_step} of {state.max_steps}", self.evaluated]
        parts += [f"epoch {state.epoch:.2f}" if state.epoch is not None else ""]
        parts += [f"loss {self.loss:.4g}" if self.loss is not None else "", *self.measured(state)]
        return ", ".join(filter(None, parts))

    def measured(self, state: Any) -> list[str]:
        """Tokens a second, the time that is left, and the peak memory, where they are known."""
        speed = self.trainer.tokens_per_second
        done, left = state.global_step - self.start_step, state.max_steps - state.global_step
        seconds = (time.monotonic() - self.start) / done * left if done > 0 else None
        return [
            f"{speed:,.0f} tokens/s" if speed is not None else "",
            f"{duration(seconds)} left" if seconds is not None and left else "",
            f"peak {peak_memory_gib(self.trainer.args.device):.2f} GiB",
        ]

    def draw(self, state: Any) -> None:
        """Draw the line, unless that was done a moment ago."""
        if self.region is not None and self.region.is_due:
            self.region.draw([POSITION.get() + SPEAKER.get() + self.line(state)])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_step, self.start, self.trains = state.global_step, time.monotonic(), True
        self.draw(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draw(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.batches += 1
        of = f" of {len(eval_dataloader)}" if has_length(eval_dataloader) else ""
        self.evaluated = f"evaluation {self.batches}{of}"
        self.draw(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs if logs is not None else {}
        logs.pop("total_flos", None)  # from the metrics of the training as well
        values = logged(logs)
        if not self.trains or not values:
            return
        self.loss = values.get("loss", self.loss)
        is_evaluation = any(name.startswith("eval_") for name in values)
        if is_evaluation or self.plain or not replaces_lines():
            texts = [
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in values.items()
            ]
            measured = [] if is_evaluation else [*filter(None, self.measured(state))]
            say(f"step {state.global_step} of {state.max_steps}: {', '.join([*texts, *measured])}")
        self.draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.region is not None:
            say(f"{self.line(state)}, took {duration(time.monotonic() - self.start)}")
        self.trains = False


def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth a line of what a logging step logs: no timings, and nothing of the whole training, which a table shows."""
    values = {
        name: float(value) if isinstance(value, torch.Tensor) else value
        for name, value in logs.items()
        if not name.endswith(TIMINGS)
    }
    return values if values.keys() - {"epoch"} and "train_loss" not in values else {}
