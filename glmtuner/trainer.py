"""The Hugging Face Trainer with checkpoints that survive a kill and a history that does not show where it was resumed."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from glmtuner.config.schema import Finetuning, Tracker
from glmtuner.preemption import Asked
from glmtuner.run_folder import (
    CHECKPOINTS,
    HISTORY,
    RunFolder,
    checkpoints,
    mark_complete,
    read_json,
    step_of,
    write_json,
)

PROGRESS = "progress.json"  # what transformers forgets: the loss since the last logged step, and the time so far
TIMINGS = ("_runtime", "_per_second", "_time", "total_flos")


class GlmTrainer(Trainer):
    """What transformers' Trainer does, except where a method below says otherwise.

    `score` is called with a metric prefix after the losses of an evaluation and returns more metrics, such as the scores
    of generated answers.
    """

    def __init__(
        self,
        *args: Any,
        finetuning: Finetuning,
        tracker: Tracker,
        folder: RunFolder,
        score: Callable[[str, int], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        with _adapter_declared(kwargs["model"]):
            super().__init__(*args, **kwargs)
        self.finetuning, self.tracker, self.folder, self.score = finetuning, tracker, folder, score
        self.earlier_seconds = 0.0
        self.resumed_from: Path | None = None
        self.add_callback(_History(self))

    # -- checkpoints: written to a temporary name, marked complete, renamed ------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Replaces transformers' in-place checkpoint, whose files a kill leaves half-written under the final name.

        The weights are what the fine-tuning method trains, and no `training_args.bin` (a pickle) is written.
        """
        name = f"checkpoint-{self.state.global_step}"
        root = self.folder / CHECKPOINTS
        partial, final = root / f".partial-{name}", root / name
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.store_flos()
        if self.args.should_save:
            self.finetuning.save_trained(self.accelerator.unwrap_model(model), partial)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        if not self.args.should_save:
            return
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(root / f"checkpoint-{self.state.best_global_step}")
        self.state.save_to_json(str(partial / "trainer_state.json"))
        write_json(partial / PROGRESS, self._progress())
        mark_complete(partial, {"step": self.state.global_step})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        best = self.state.best_model_checkpoint
        droppable = [path for path in checkpoints(self.folder.path) if str(path) != best]
        keep = limit - 1 if best and self.args.load_best_model_at_end else limit
        for path in droppable[: len(droppable) - max(keep, 1)]:
            shutil.rmtree(path, ignore_errors=True)

    def _progress(self) -> dict[str, float]:
        return {
            "loss_since_log": self._tr_loss.item(),
            "loss_logged": self._total_loss_scalar,
            "step_logged": self._globalstep_last_logged,
            "seconds": self.earlier_seconds + time.time() - self._session_start,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The method's own files, every name and shape compared; transformers would load what fits."""
        self.resumed_from = Path(resume_from_checkpoint)
        self.finetuning.restore(model or self.model, self.resumed_from)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.finetuning.restore(self.model, Path(self.state.best_model_checkpoint))

    # -- history -----------------------------------------------------------------------------------------------------

    def recall_progress(self) -> None:
        """Called when training begins: the sums that transformers starts at zero go on where the checkpoint left them."""
        self._session_start = time.time()
        if self.resumed_from is None:
            return
        progress = read_json(self.resumed_from / PROGRESS)
        self._tr_loss += progress["loss_since_log"]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["step_logged"]
        self.earlier_seconds = progress["seconds"]

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Loss and time of the whole training, not of the part since the last resume."""
        self._initial_global_step = 0
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The losses, then the scores of generated answers, so that both stand in one line of the history."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score is not None:
            found = self.score(metric_key_prefix, self.state.global_step)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """transformers remembers the best step only; its checkpoint is kept under our folder."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
            self.state.best_global_step = self.state.global_step
        return better


@contextmanager
def _adapter_declared(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, transformers takes a quantized model with a prefix for one that can be trained; it knows PEFT's only."""
    had = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = had or hasattr(model, "prefix_encoder")
    try:
        yield
    finally:
        model._hf_peft_config_loaded = had


class _History(TrainerCallback):
    """history.jsonl: one line a logging step, without timings; cut back to the checkpoint when a run is resumed.

    The tracker gets the same lines.
    """

    def __init__(self, trainer: GlmTrainer) -> None:
        self.trainer = trainer
        self.path = trainer.folder / HISTORY

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recall_progress()
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
        self.trainer.tracker.log(line)


class StopWhenAsked(TrainerCallback):
    """Save and stop behind the step in which the signal came; all ranks behind the same one."""

    def __init__(self, asked: Asked) -> None:
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
