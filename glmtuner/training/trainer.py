"""transformers' Trainer with crash-safe checkpoints and a history that reads the same after a resume."""

import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Tracker
from glmtuner.distributed import ranks
from glmtuner.finetuning.trained import gathered
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.memory.checkpointing import enable_checkpointing
from glmtuner.models.sizes import parameter_count
from glmtuner.run_folder.checkpoints import checkpoints, mark_complete, step_of
from glmtuner.run_folder.files import read_json, write_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS, LOSSES
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.callbacks import CountOptimizerSteps, History
from glmtuner.training.divergence import FiniteChecks, require_finite_evaluation
from glmtuner.training.label_smoothing import SmoothedLoss
from glmtuner.training.loaders import LoadingTrainer
from glmtuner.training.measurements import Measurements, forget_peak, losses_text, peak_memory_gib, sample_losses
from glmtuner.training.neftune import noisy_embeddings
from glmtuner.training.quantized import quantization_check_skipped
from glmtuner.training.samplers import draw_base_seed
from glmtuner.training.throughput import ModelFlops, model_flops, utilization

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from glmtuner.objectives.objective import Objective


PROGRESS = "progress.json"  # what trainer_state.json lacks: the loss since the last logged step, and the time so far


class GlmTrainer(LoadingTrainer):
    """transformers' Trainer, except where a method below says otherwise.

    `score` is called with the step after the losses of an evaluation and returns more metrics, such as the scores of
    generated answers; `derived` computes metrics from the means of other metrics. `sharded` says that every rank holds only
    its shard of the model's weights.

    tests/unit/training/test_trainer_private.py lists the private members of transformers' Trainer that are used here.
    """

    model: "PreTrainedModel"  # or PEFT's wrapper around one, which forwards its attributes
    optimizer: "AcceleratedOptimizer"  # from the first step on
    lr_scheduler: "LambdaLR"
    objective: "Objective | None"

    def __init__(
        self,
        model: torch.nn.Module,
        args: "TrainingArguments",
        *,
        finetuning: Finetuning,
        tracker: Tracker,
        folder: RunFolder,
        score: Callable[[int], dict[str, float]] | None = None,
        sharded: bool = False,
        objective: "Objective | None" = None,
        derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {},
        chunks_loss: bool = False,
        left_out: Mapping[FastPath, str] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        self.sharded = sharded
        if sharded and not args.deepspeed:
            # Gradients are reduced and sharded after every batch of an accumulation: unsharded ones would take the memory
            # of a whole model.
            config: Any = args.accelerator_config  # parsed: an AcceleratorConfig
            config.gradient_accumulation_kwargs = {
                **(config.gradient_accumulation_kwargs or {}),
                "sync_each_batch": True,
            }
        # it would log 0.0 for a loss that is not finite; FiniteChecks end such a run
        args.logging_nan_inf_filter = False
        if args.label_smoothing_factor and objective is None:
            kwargs["compute_loss_func"] = SmoothedLoss(args.label_smoothing_factor)
        with quantization_check_skipped(model):
            super().__init__(model, args, **kwargs)
        # transformers reads from a model's class name that its loss shifts the labels; that of every model here does
        self._loss_shifts_labels = True
        self.neftune_noise_alpha = None  # `_run_epoch` adds the noise
        if sharded and not self.is_deepspeed_enabled:
            # The flag of a model that manages its placement and the reduction of its gradients, so that accelerate does not
            # wrap it into DDP. Set after __init__, which refuses checkpoints of such models; ours hold full weights.
            self.is_distributed_loading_by_transformers = True
        forget_peak(self.args.device)
        self.finetuning, self.tracker, self.folder = finetuning, tracker, folder
        self.score, self.objective, self.derived = score, objective, derived
        self.measured = Measurements()  # of an objective, since the last logged step
        self.chunks_loss = chunks_loss  # can the model compute its loss by glmtuner/kernels/chunked_loss.py?
        self.left_out = left_out  # the optimizations that the training goes without, and why
        if objective is not None:
            self.model_accepts_loss_kwargs = False  # an objective's loss is a mean over rows, whatever their lengths
        # of this rank: the number of tokens without padding, and the sum of the rows' squared lengths
        self.tokens, self.squared_lengths = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self.evaluated_batches: list[dict[str, torch.Tensor]] = []  # metric -> values of a batch's rows
        self.seconds_before_resume = 0.0
        self.train_seconds = 0.0
        self.epoch_ended = True  # False from an epoch's first step on, until what follows its last one
        self.last_step: dict[str, Any] = {}  # what is logged of it; the norm is on the device
        self.finite = FiniteChecks(self.args)
        self.resumed_from: Path | None = None
        self.history_lines: int | None = None  # at the checkpoint that is resumed from
        self.optimizer_steps = CountOptimizerSteps(lambda: self.accelerator.optimizer_step_was_skipped)
        self.add_callback(History(self))
        self.add_callback(self.optimizer_steps)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Sharded weights are on their device already."""
        if not self.sharded:
            super()._move_model_to_device(model, device)

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing if the arguments ask for it; `train` does so too, but after the preflight check."""
        enable_checkpointing(self.model, self.args)

    @cached_property
    def flops(self) -> ModelFlops | None:
        """The FLOPs that utilization is computed from; None on a CPU, and for losses of an objective."""
        return model_flops(self.model) if self.args.device.type == "cuda" and self.objective is None else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training."""
        _ = (
            self.flops
        )  # counted on the model as it is before it is wrapped, and before the clock runs: it takes a second
        return super().train(*args, **kwargs)

    # -- checkpoints: written to a temporary name, marked complete, renamed ------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, mark it complete, and rename it.

        transformers writes to the final name, where a killed process leaves half-written files. The weights are those that
        the fine-tuning method trains, and no `training_args.bin` (a pickle) is written.
        """
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
        # DeepSpeed's are pickles, never loaded
        if not self.is_deepspeed_enabled and (self._is_stopping() or not self.args.save_only_model):
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        ranks.barrier()
        if not self.args.should_save:
            return
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(root / f"checkpoint-{self.state.best_global_step}")
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
        """Load the method's own files, as `_load_from_checkpoint` does."""
        assert self.state.best_model_checkpoint is not None
        self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        self.finetuning.restore(self.model, checkpoint)
        if self.objective is not None:
            self.objective.restore(checkpoint)

    # -- history -----------------------------------------------------------------------------------------------------

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
        self.measured.load_state_dict(progress["measured"][ranks.rank()], self.args.device)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> "TrainOutput":
        """Loss and time of the whole training, not only of the part since the last resume."""
        self.finite.settle()
        self._initial_global_step = 0
        self.train_seconds = self.seconds_before_resume + time.time() - start_time
        start_time -= self.seconds_before_resume
        output: TrainOutput = super()._finalize_training(trial, num_train_samples, start_time)
        return output

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> "EvalLoopOutput":
        """The losses, then the scores of generated answers, so that both are in one line of the history.

        The loss is the mean over all tokens of the evaluation records, whatever the batches and the ranks; transformers
        takes the mean over batches. An objective's metrics are means over the records. losses.jsonl has a line a record.
        """
        self.finite.settle()
        self.evaluated_batches = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        columns = {
            name: torch.cat([rows[name] for rows in self.evaluated_batches]) for name in self.evaluated_batches[0]
        }
        require_finite_evaluation(columns["loss"], self.state.global_step, self.args)
        if self.args.should_save:
            write_text(self.folder / LOSSES, losses_text(columns))
        if self.objective is None:
            means = {"loss": (columns["loss"].sum() / columns["tokens"].sum()).item()}
        else:
            means = {name: column.nanmean().item() for name, column in columns.items() if not column.isnan().all()}
        means |= self.derived(means)
        if self.score is not None:
            means |= self.score(self.state.global_step)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Keep the loss of each row for `evaluation_loop`; transformers would return the mean of the batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.objective is not None:
                loss_B, measured = self.objective.loss(model, inputs)
                metrics = {"loss": loss_B, **measured}
            else:
                loss_B, tokens_B = sample_losses(model, inputs, chunked=self.chunks_loss)
                metrics = {"loss": loss_B, "tokens": tokens_B}
        self.evaluated_batches.append({name: self.gather_function(values).cpu() for name, values in metrics.items()})
        return None, None, None

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """transformers' step, with the tokens counted; an objective that takes its own optimizer steps replaces it."""
        if self.objective is not None and self.objective.takes_optimizer_steps:
            model.train()
            loss = self.objective.update(self, model, self._prepare_inputs(inputs))
            self.finite.add("loss", loss, self.state.global_step)
            return loss
        if "segments" in inputs:
            taught = inputs["segments"].taught
            self.tokens += sum(taught)
            self.squared_lengths += sum(length**2 for length in taught)
        else:
            is_taught_B = inputs["labels"].ne(IGNORE_INDEX).any(dim=1)  # all but the padding rows of the last batches
            tokens_B = (inputs["attention_mask"] * is_taught_B[:, None]).sum(1).to(self.tokens.device)
            self.tokens += tokens_B.sum()
            self.squared_lengths += tokens_B.square().sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite.add("loss", loss, self.state.global_step)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm before clipping; raises TrainingError unless it is finite, or fp16's scaler skips such steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.last_step = {"grad_norm": norm, "learning_rate": self._get_learning_rate()}
        if norm is not None and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self.finite.add("gradient norm", torch.as_tensor(norm), self.state.global_step)
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless the last step was taken before: transformers would take one more before it looks.

        So a run that was killed after its last checkpoint, in its final evaluation or prediction, ends with the same weights.
        """
        is_done = self.state.global_step >= self.state.max_steps
        if not self.epoch_ended and (is_done or float(self.state.epoch or 0.5).is_integer()):
            self._end_epoch(**kwargs)
            kwargs["resume_from_checkpoint"] = None  # its random state was loaded
        if is_done:
            self.control.should_training_stop = True
            return
        draw_base_seed(kwargs["train_dataloader"])
        with noisy_embeddings(self.model, self.args.neftune_noise_alpha):
            super()._run_epoch(*args, **kwargs)

    def _end_epoch(self, *, resume_from_checkpoint: str, model: Any, trial: Any, epoch: int, **others: Any) -> None:
        """Log, evaluate and save at an epoch's end, for a run that was stopped between its last step's checkpoint and this."""
        self._load_rng_state(resume_from_checkpoint)
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss, self.last_step.get("grad_norm"), model, trial, epoch, others["ignore_keys_for_eval"],
            others["start_time"], learning_rate=self.last_step.get("learning_rate"),
        )  # fmt: skip

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the metric is the best so far, or the run is being stopped: its checkpoint is written in either case."""
        return bool(super()._determine_best_metric(metrics, trial)) or self._is_stopping()

    def _is_stopping(self) -> bool:
        """Whether a signal ends the training before its last step."""
        return self.control.should_training_stop and self.state.global_step < self.state.max_steps

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the mean of an objective's over the rows."""
        if self.objective is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss_B, measured = self.objective.loss(model, inputs)
        self.measured.add(measured)
        return loss_B.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logging step of the training also reports the objective's metrics since the last one."""
        self.finite.settle()
        if "loss" in logs and self.objective is not None:
            means = self.measured.reduce_and_reset()
            logs |= means | self.derived(means)
        super().log(logs, start_time)

    def resources(self) -> dict[str, float]:
        """Peak memory in GiB (the largest rank's), numbers of parameters, tokens a second without padding, MFU, fast paths."""
        used: dict[str, float] = {
            "peak_memory_gib": max(ranks.all_gather(peak_memory_gib(self.args.device))),
            "total_parameters": parameter_count(self.model),
        }
        if self.train_seconds:
            tokens, squared_lengths = (sum(ranks.all_gather(int(n))) for n in (self.tokens, self.squared_lengths))
            used |= {
                "trained_parameters": parameter_count(self.model, trained=True),
                "train_tokens_per_second": tokens / self.train_seconds,
                **{f"fast_path_{path.name}": int(path not in self.left_out) for path in FastPath},
            }
            if (mfu := self.utilization(tokens, squared_lengths, self.train_seconds)) is not None:
                used["train_mfu"] = mfu
        return used

    def utilization(self, tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Model FLOPs utilization of all ranks together; None on a CPU, an unknown GPU, and for losses of an objective."""
        if self.flops is None:
            return None
        name = torch.cuda.get_device_name(self.args.device)
        return utilization(self.flops.of(tokens, squared_lengths), seconds, name, ranks.world_size())
