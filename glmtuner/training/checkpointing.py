"""transformers' Trainer with checkpoints that survive a crash, and a training that goes on from them as if it had not been cut."""

import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, set_seed

from glmtuner.config.groups import Finetuning
from glmtuner.distributed import ranks, shard_files
from glmtuner.distributed.shards import forget_gathered
from glmtuner.finetuning.trained import IN_SHARDS, VALUE_HEAD, gathered, trained_parameters
from glmtuner.run_folder.checkpoints import checkpoints, mark_complete, saved_ranks, step_of
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS
from glmtuner.training.callbacks import CountOptimizerSteps
from glmtuner.training.divergence import FiniteChecks
from glmtuner.training.early_stopping import EarlyStopping
from glmtuner.training.measurements import Measurements
from glmtuner.training.optimizer_state import is_by_names, load_state, state_in_shards
from glmtuner.training.pending import PendingCheckpoint
from glmtuner.training.rank_counters import for_ranks

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
    sequence: int
    async_save: bool  # does a thread write the optimizer's state, and the weights of a whole model?
    pending: PendingCheckpoint | None  # which is being written
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
        self.finish_saving()
        self.optimizer.eval()  # a schedule-free one leaves the averaged weights, those of evaluations and results
        name = f"checkpoint-{self.state.global_step}"
        root = self.folder / CHECKPOINTS
        partial_folder, final = root / f".partial-{name}", root / name
        self.finite.settle()
        progress = self._progress()
        if self.args.should_save:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
        ranks.barrier()
        self.store_flos()
        unwrapped = self.accelerator.unwrap_model(model)
        shards: dict[str, torch.Tensor] = {}
        if in_shards := self.saves_shards and self.finetuning.saved_as == "model":
            shards |= {f"{IN_SHARDS}{name}": value.detach() for name, value in trained_parameters(unwrapped).items()}
        with gathered(unwrapped, everything=False, beginning=f"{VALUE_HEAD}." if in_shards else ""):
            if self.args.should_save:
                if not in_shards:
                    self.finetuning.save_trained(unwrapped, partial_folder)
                if self.objective is not None:
                    self.objective.save(partial_folder)
        if self._is_stopping() or not self.args.save_only_model:
            if self.saves_shards:
                shards |= self._optimizer_shards(partial_folder)
            else:
                self._save_optimizer_and_scheduler(str(partial_folder))
            self._save_scaler(str(partial_folder))
            self._save_rng_state(str(partial_folder))
        ranks.barrier()
        best = root / f"checkpoint-{self.state.best_global_step}"
        # the last one is of the run whose checkpoint this one continues; every rank loads the best one in the end
        self.state.best_model_checkpoint = ranks.broadcast_from_rank0(
            lambda: str(best) if best == final or best.is_dir() else self.state.best_model_checkpoint
        )
        if self.args.should_save:
            self.state.save_to_json(str(partial_folder / "trainer_state.json"))
            write_json(partial_folder / PROGRESS, progress)
        complete = partial(
            self._complete, partial_folder, final, self.state.global_step, self.state.best_model_checkpoint
        )
        if shards and self.async_save:
            self.pending = PendingCheckpoint(shard_files.start_writing(shards, partial_folder), final, complete)
            return
        if shards:
            shard_files.write(shards, partial_folder)
        if self.args.should_save:
            complete()

    @property
    def saves_shards(self) -> bool:
        """Whether every rank writes a part of a checkpoint: its shards, or of what all ranks hold a share."""
        return self.sharded or self.async_save

    def _optimizer_shards(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors of the optimizer's state, by names for the shards; rank 0 writes the rest of it."""
        shards, rest = state_in_shards(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(rest, folder / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        return shards

    def _complete(self, partial_folder: Path, final: Path, step: int, best: str | None) -> None:
        """Mark a checkpoint complete, and give it its name; on rank 0, maybe while later steps are taken."""
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        rows = batch * ranks.world_size() // self.sequence
        mark_complete(partial_folder, {"step": step, "ranks": ranks.world_size(), "rows_per_step": rows})
        shutil.rmtree(final, ignore_errors=True)
        partial_folder.rename(final)
        self._drop_old_checkpoints(step, best)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is complete; raises the error of its writing, on every rank. A collective."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.wait()

    def _drop_old_checkpoints(self, step: int, best: str | None) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        # later ones are of a training that was resumed from an earlier checkpoint, since they are damaged
        past = [path for path in checkpoints(self.folder.path) if step_of(path) <= step]
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
            "sequence": self.sequence,
            "loss_logged": self._total_loss_scalar,
            "step_logged": self._globalstep_last_logged,
            "seconds": self.seconds_before_resume + time.time() - self._session_start,
            "optimizer_steps": self.optimizer_steps.steps,
            "epoch_ended": self.epoch_ended,
            "last_step": {name: None if value is None else float(value) for name, value in self.last_step.items()},
            "history_lines": len(self.folder.history()),  # what comes later, a resumed run writes again
            **({} if self.early_stopping is None else {"not_improved": self.early_stopping.evaluations}),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read what any number of processes wrote; each rank of a sharded model keeps its shard."""
        if checkpoint is None or not (self.sharded or is_by_names(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_state(self.model, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states of the checkpoint's ranks; where there were more or fewer, each rank draws from a new one."""
        if checkpoint is None or saved_ranks(Path(checkpoint)) == ranks.world_size():
            super()._load_rng_state(checkpoint)
            return
        drawn = random.Random(f"{self.args.seed} {self.state.global_step} {ranks.world_size()} {ranks.rank()}")
        set_seed(drawn.randrange(2**32))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the method's own files and compare every name and shape; transformers would load only what fits."""
        self.resumed_from = Path(resume_from_checkpoint)
        self._restore(self.resumed_from)

    def _load_best_model(self) -> None:
        """Load the method's own files, as `_load_from_checkpoint` does, also in a run folder that was moved."""
        assert self.state.best_model_checkpoint is not None
        self.finish_saving()
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
            # the run may have been killed before or in it
            self._drop_old_checkpoints(self.state.global_step, self.state.best_model_checkpoint)
        progress = for_ranks(read_json(self.resumed_from / PROGRESS), ranks.world_size(), self.sequence)
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
