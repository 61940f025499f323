"""transformers' Trainer with checkpoints that survive a crash, and a training that goes on from them as if it had not been cut."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer

from glmtuner.config.groups import Finetuning
from glmtuner.distributed import ranks
from glmtuner.distributed.shards import forget_gathered
from glmtuner.finetuning.trained import gathered
from glmtuner.run_folder.checkpoints import checkpoints, mark_complete, step_of
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS
from glmtuner.training.callbacks import CountOptimizerSteps
from glmtuner.training.divergence import FiniteChecks
from glmtuner.training.early_stopping import EarlyStopping
from glmtuner.training.measurements import Measurements

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel

    from glmtuner.objectives.objective import Objective


PROGRESS = "progress.json"  # what trainer_state.json lacks: the loss since the last logged step, and the time so far


class CheckpointingTrainer(Trainer):
    """The part of GlmTrainer that writes checkpoints, and continues from one; the attributes are set by GlmTrainer."""

    model: "PreTrainedModel"  # or PEFT's wrapper around one, which forwards its attributes
    optimizer: "AcceleratedOptimizer"  # from the first step on
    lr_scheduler: "LambdaLR"
    objective: "Objective | None"
    sharded: bool
    finetuning: Finetuning
    folder: RunFolder
    finite: FiniteChecks
    measured: Measurements
    tokens: torch.Tensor
    squared_lengths: torch.Tensor
    seconds_before_resume: float
    epoch_ended: bool
    last_step: dict[str, Any]
    optimizer_steps: CountOptimizerSteps
    early_stopping: EarlyStopping | None
    resumed_from: Path | None
    history_lines: int | None
    _session_start: float

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, mark it complete, and rename it.

        transformers writes to the final name, where a killed process leaves half-written files. The weights are those that
        the fine-tuning method trains, and no `training_args.bin` (a pickle) is written.
        """
        self.optimizer.eval()  # a schedule-free one leaves the averaged weights, those of evaluations and results
        name = f"checkpoint-{self.state.global_step}"
        root = self.folder / CHECKPOINTS
        partial, final = root / f".partial-{name}", root / name
        self.finite.settle()
        progress = self._progress()
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        self.store_flos()
        unwrapped = self.accelerator.unwrap_model(model)
        with gathered(unwrapped, everything=False):
            if self.args.should_save:
                self.finetuning.save_trained(unwrapped, partial)
                if self.objective is not None:
                    self.objective.save(partial)
        if self._is_stopping() or not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        ranks.barrier()
        best = root / f"checkpoint-{self.state.best_global_step}"
        # the last one is of the run whose checkpoint this one continues; every rank loads the best one in the end
        self.state.best_model_checkpoint = ranks.broadcast_from_rank0(
            lambda: str(best) if best == final or best.is_dir() else self.state.best_model_checkpoint
        )
        if not self.args.should_save:
            return
        self.state.save_to_json(str(partial / "trainer_state.json"))
        write_json(partial / PROGRESS, progress)
        mark_complete(partial, {"step": self.state.global_step, "ranks": ranks.world_size()})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        best = self.state.best_model_checkpoint
        # later ones are of a training that was resumed from an earlier checkpoint, since they are damaged
        past = [path for path in checkpoints(self.folder.path) if step_of(path) <= self.state.global_step]
        droppable = [path for path in past if str(path) != best]
        keep = limit - 1 if best and self.args.load_best_model_at_end else limit
        for path in droppable[: max(len(droppable) - max(keep, 1), 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _progress(self) -> dict[str, Any]:
        """The content of progress.json: counters of each rank as lists by rank, and what all ranks share."""
        return {
            "loss_since_log": ranks.all_gather(self._tr_loss.item()),
            "measured": ranks.all_gather(self.measured.state_dict()),
            "tokens": ranks.all_gather(self.tokens.item()),
            "squares": ranks.all_gather(self.squared_lengths.item()),
            "loss_logged": self._total_loss_scalar,
            "step_logged": self._globalstep_last_logged,
            "seconds": self.seconds_before_resume + time.time() - self._session_start,
            "optimizer_steps": self.optimizer_steps.steps,
            "epoch_ended": self.epoch_ended,
            "last_step": {name: None if value is None else float(value) for name, value in self.last_step.items()},
            "history_lines": len(self.folder.history()),  # what comes later, a resumed run writes again
            **({} if self.early_stopping is None else {"not_improved": self.early_stopping.evaluations}),
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The state of a sharded model's optimizer is saved unsharded, in the file that other runs have it in."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Reads what `_save_optimizer_and_scheduler` wrote; each rank of a sharded model keeps its shard."""
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, optim_state_dict=state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the method's own files and compare every name and shape; transformers would load only what fits."""
        self.resumed_from = Path(resume_from_checkpoint)
        self._restore(self.resumed_from)

    def _load_best_model(self) -> None:
        """Load the method's own files, as `_load_from_checkpoint` does, also in a run folder that was moved."""
        assert self.state.best_model_checkpoint is not None
        ranks.barrier()  # rank 0 may still be writing it
        own = self.folder / CHECKPOINTS / f"checkpoint-{self.state.best_global_step}"
        self._restore(own if own.is_dir() else Path(self.state.best_model_checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        forget_gathered(self.model)
        self.finetuning.restore(self.model, checkpoint)
        if self.objective is not None:
            self.objective.restore(checkpoint)

    def restore_progress(self) -> None:
        """Called when training begins: continue the sums, which transformers starts at zero, from the checkpoint's."""
        self._session_start = time.time()
        if self.resumed_from is None:
            return
        if self.args.should_save:
            self._drop_old_checkpoints()  # the run may have been killed before or in it
        progress = read_json(self.resumed_from / PROGRESS)
        self._tr_loss += progress["loss_since_log"][ranks.rank()]
        self.tokens += progress["tokens"][ranks.rank()]
        self.squared_lengths += progress["squares"][ranks.rank()]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["step_logged"]
        self.seconds_before_resume = progress["seconds"]
        self.history_lines = progress.get("history_lines")  # checkpoints of earlier versions have none of these
        self.optimizer_steps.steps = progress.get("optimizer_steps", 1)
        self.epoch_ended, self.last_step = progress.get("epoch_ended", True), progress.get("last_step", {})
        if self.early_stopping is not None:
            self.early_stopping.evaluations = progress.get("not_improved", 0)
        self.measured.load_state_dict(progress["measured"][ranks.rank()], self.args.device)

    def _is_done(self) -> bool:
        """Whether the last step is taken: that of the schedule, or the one after which the training stops early."""
        stops_early = self.early_stopping is not None and self.early_stopping.stops
        return stops_early or self.state.global_step >= self.state.max_steps

    def _is_stopping(self) -> bool:
        """Whether a signal ends the training before its last step."""
        return self.control.should_training_stop and not self._is_done()
