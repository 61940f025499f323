"""Callbacks that write the history and stop a training on a signal."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Tracker
from glmtuner.console import say
from glmtuner.distributed.pause import Pause
from glmtuner.distributed.preemption import SignalCapture
from glmtuner.run_folder.checkpoints import step_of
from glmtuner.run_folder.files import is_number, read_lines, strict_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import HISTORY
from glmtuner.run_folder.names import TIMINGS as TIMINGS_FILE
from glmtuner.run_folder.spent import current_attempt
from glmtuner.training.measurements import peak_memory_gib
from glmtuner.training.progress import TIMINGS


class TrainerInProgress(Protocol):
    """The members of GlmTrainer that the history reads; `tokens` and `squared_lengths` are counts of this rank."""

    folder: RunFolder
    tracker: Tracker
    tokens: torch.Tensor
    squared_lengths: torch.Tensor
    resumed_from: Path | None
    history_lines: int | None
    epoch_ended: bool
    tokens_per_second: float | None

    @property
    def data_ranks(self) -> int: ...

    def restore_progress(self) -> None: ...

    def utilization(self, tokens: float, squared_lengths: float, seconds: float) -> float | None: ...


class History(TrainerCallback):
    """Writes history.jsonl: a line for each logging step, without timings; truncated to the checkpoint on resume.

    The tracker gets the same lines; those with a training loss also have the speed since the last logging step, evaluation
    or checkpoint. timings.jsonl has a line for each of them with what differs between two equal runs: when it was written, after
    how many seconds of training and how many tokens of all ranks, the speed, and the peak memory.
    """

    def __init__(self, trainer: TrainerInProgress) -> None:
        self.trainer = trainer
        self.path = trainer.folder / HISTORY
        self._begin, self._seconds_before = time.monotonic(), 0.0
        self._lap_start = (time.time(), 0.0, 0.0)  # time in seconds, tokens, squared lengths

    def _start_lap(self, *_: Any, **__: Any) -> None:
        """Measure the speed from now on."""
        self._lap_start = (time.time(), self.trainer.tokens.item(), self.trainer.squared_lengths.item())

    on_evaluate = on_save = _start_lap

    def _speed(self) -> dict[str, float]:
        """Tokens a second and MFU since the lap began, extrapolated from this rank to all; starts the next lap."""
        before = self._lap_start
        self._start_lap()
        seconds, tokens, squared_lengths = (now - then for now, then in zip(self._lap_start, before, strict=True))
        if not (tokens and seconds > 0):
            return {}
        tokens, squared_lengths = tokens * self.trainer.data_ranks, squared_lengths * self.trainer.data_ranks
        mfu = self.trainer.utilization(tokens, squared_lengths, seconds)
        return {"tokens_per_second": tokens / seconds} | ({} if mfu is None else {"mfu": mfu})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_progress()
        self._start_lap()
        if not args.should_save:
            return
        kept = []
        if self.trainer.resumed_from is not None:
            last = step_of(self.trainer.resumed_from)
            kept = [line for line in self.trainer.folder.history() if line["step"] <= last][
                : self.trainer.history_lines
            ]
            if self.trainer.history_lines is not None and len(kept) < self.trainer.history_lines:
                say(f"{self.path} has lost {self.trainer.history_lines - len(kept)} of the lines until step {last}")
        # a kill leaves the old lines or these
        write_text(self.path, "".join(f"{strict_json(line)}\n" for line in kept))
        self._keep_timings(kept)
        for line in kept:
            self.trainer.tracker.log(line)

    def _keep_timings(self, history: list[dict[str, float]]) -> None:
        """Keep the timings of the lines of the history that are kept; seconds of training go on from the last of them."""
        path, last = self.trainer.folder / TIMINGS_FILE, max((line["step"] for line in history), default=-1)
        kept = [line for line in read_lines(path) if is_number(line.get("step")) and line["step"] <= last][
            : len(history)
        ]
        seconds = kept[-1].get("seconds") if kept else 0.0
        self._begin, self._seconds_before = time.monotonic(), seconds if is_number(seconds) else 0.0
        write_text(path, "".join(f"{strict_json(line)}\n" for line in kept))

    def _log_timing(self, step: int, device: torch.device, speed: dict[str, float]) -> None:
        timing = {
            "step": step,
            "time": round(time.time(), 3),
            "seconds": round(self._seconds_before + time.monotonic() - self._begin, 3),
            "tokens": int(self.trainer.tokens.item()) * self.trainer.data_ranks,
            **speed,
            "memory_gib": round(peak_memory_gib(device), 4),
        }
        with (self.trainer.folder / TIMINGS_FILE).open("a", encoding="utf-8") as file:
            file.write(strict_json(timing) + "\n")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.epoch_ended = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if not name.endswith(TIMINGS)}
        if not args.should_save or "train_loss" in values or not values.keys() - {"epoch"}:
            return
        line = {"step": state.global_step, "epoch": values.pop("epoch", state.epoch), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(strict_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        speed = self._speed() if "loss" in values else {}
        self.trainer.tokens_per_second = speed.get("tokens_per_second", self.trainer.tokens_per_second)
        self._log_timing(state.global_step, args.device, speed)
        self.trainer.tracker.log(line | speed)


class CountOptimizerSteps(TrainerCallback):
    """Counts the optimizer steps of the training that fp16's scaler did not skip; it skips one when a gradient overflows."""

    def __init__(self, was_skipped: Callable[[], bool]) -> None:
        self.was_skipped = was_skipped
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += not self.was_skipped()


class MethodSteps(TrainerCallback):
    """Tells the fine-tuning method how long the training is, and of each optimizer step."""

    def __init__(self, model: torch.nn.Module, finetuning: Finetuning) -> None:
        self.method_model, self.finetuning = model, finetuning

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finetuning.before_training(self.method_model, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finetuning.after_step(self.method_model, state.global_step + 1)


class StopOnBudget(TrainerCallback):
    """Stops a training whose hours reach a limit of its budget as SIGTERM does: it saves a checkpoint and can be resumed."""

    def __init__(self, received: SignalCapture) -> None:
        self.received = received

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attempt = current_attempt()
        if attempt is None or self.received.signum is not None or state.global_step >= state.max_steps:
            return
        if over := attempt.over():
            say(f"{'; '.join(over)}: the training saves a checkpoint and stops")
            self.received.signum = signal.SIGTERM


class StopBeforeEnd(TrainerCallback):
    """Saves and stops after the first step at which `stops`, unless it is the last one."""

    has_stopped = False

    def stops(self, args: Any, state: Any) -> bool:
        """Whether the training stops; called after each step, on all ranks with the same answer."""
        raise NotImplementedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_stopped = self.stops(args, state) and state.global_step < state.max_steps
        if self.has_stopped:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing more: the step's checkpoint is written, and the resumed run ends the epoch."""
        if self.has_stopped and control.should_training_stop:
            control.should_log = control.should_evaluate = control.should_save = False


class StopOnSignal(StopBeforeEnd):
    """Stops after the step during which a signal arrived, on all ranks after the same step."""

    def __init__(self, received: SignalCapture) -> None:
        self.received = received

    def stops(self, args: Any, state: Any) -> bool:
        if args.world_size > 1:
            self._share_signal(args.device)
        return self.received.signum is not None

    def _share_signal(self, device: torch.device) -> None:
        """A signal that one rank received counts for all ranks."""
        signum = torch.tensor(self.received.signum or 0, device=device)
        torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
        self.received.signum = int(signum) or None


class StopAtPause(StopBeforeEnd):
    """Stops after the step of a pause."""

    def __init__(self, pause: Pause) -> None:
        self.pause = pause

    def stops(self, args: Any, state: Any) -> bool:
        return self.pause.is_reached(state.global_step, state.max_steps)
