"""The history and the stop of a training."""

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from glmtuner.config.schema import Tracker
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import SignalCapture
from glmtuner.run_folder.checkpoints import step_of
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import HISTORY

TIMINGS = ("_runtime", "_per_second", "_time", "total_flos")


class TrainerInProgress(Protocol):
    """What the history needs of the trainer; `tokens` and `squares` are this rank's counts, see GlmTrainer."""

    folder: RunFolder
    tracker: Tracker
    tokens: torch.Tensor
    squares: torch.Tensor
    resumed_from: Path | None

    def recall_progress(self) -> None: ...

    def utilization(self, tokens: int, squares: int, seconds: float) -> float | None: ...


class History(TrainerCallback):
    """history.jsonl: one line a logging step, without timings; cut back to the checkpoint when a run is resumed.

    The tracker gets the same lines, with the speed since the last one, evaluation or checkpoint beside the losses.
    """

    def __init__(self, trainer: TrainerInProgress) -> None:
        self.trainer = trainer
        self.path = trainer.folder / HISTORY
        self._since = (time.time(), 0, 0)

    def _lap(self, *_: Any, **__: Any) -> None:
        """Measure the speed from now on."""
        self._since = (time.time(), self.trainer.tokens.item(), self.trainer.squares.item())

    on_evaluate = on_save = _lap

    def _speed(self) -> dict[str, float]:
        """Tokens a second, and how well the GPUs are used, since the last lap; of this rank, taken for what all have."""
        before = self._since
        self._lap()
        seconds, tokens, squares = (now - then for now, then in zip(self._since, before, strict=True))
        if not (tokens and seconds > 0):
            return {}
        tokens, squares = tokens * ranks.world_size(), squares * ranks.world_size()
        share = self.trainer.utilization(tokens, squares, seconds)
        return {"tokens_per_second": tokens / seconds} | ({} if share is None else {"mfu": share})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recall_progress()
        self._lap()
        if not args.should_save:
            return
        kept = []
        if self.trainer.resumed_from is not None:
            last = step_of(self.trainer.resumed_from)
            kept = [line for line in self.trainer.folder.history() if line["step"] <= last]
        self.path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        for line in kept:
            self.trainer.tracker.log(line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if not name.endswith(TIMINGS)}
        if not args.should_save or "train_loss" in values or not values.keys() - {"epoch"}:
            return
        line = {"step": state.global_step, "epoch": values.pop("epoch", state.epoch), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trainer.tracker.log(line | self._speed() if "loss" in values else line)


class StopWhenAsked(TrainerCallback):
    """Save and stop behind the step in which the signal came; all ranks behind the same one."""

    def __init__(self, asked: SignalCapture) -> None:
        self.asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            self._agree(args.device)
        if self.asked.signum is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _agree(self, device: Any) -> None:
        """A signal that one rank got is everybody's."""
        signum = torch.tensor(self.asked.signum or 0, device=device)
        torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
        self.asked.signum = int(signum) or None
