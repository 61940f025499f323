"""Writes how far a training is, for those who look at its folder meanwhile."""

import time
from typing import Any

from transformers import TrainerCallback

from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PROGRESS

WRITE_SECONDS = 5.0  # between two writes


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
