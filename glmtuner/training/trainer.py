"""transformers' Trainer with crash-safe checkpoints and a history that reads the same after a resume."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Tracker
from glmtuner.distributed import accelerator, ranks
from glmtuner.distributed.pause import Pause
from glmtuner.kernels.fast_paths import NO_COMMON_BEGINNINGS, FastPath
from glmtuner.memory.checkpointing import enable_checkpointing
from glmtuner.models.sizes import parameter_count
from glmtuner.objectives.objective import COUNTED, of_counted, take_counted
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOSSES
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.callbacks import CountOptimizerSteps, History, MethodSteps
from glmtuner.training.checkpointing import CheckpointingTrainer
from glmtuner.training.divergence import FiniteChecks, require_finite_evaluation
from glmtuner.training.early_stopping import EarlyStopping
from glmtuner.training.label_smoothing import SmoothedLoss
from glmtuner.training.loaders import LoadingTrainer
from glmtuner.training.measurements import (
    Measurements,
    forget_peak,
    losses_text,
    means_of_parts,
    peak_memory_gib,
    sample_losses,
)
from glmtuner.training.neftune import noisy_embeddings
from glmtuner.training.optimizers import Optimizers, warm_up
from glmtuner.training.progress import ProgressLine, ShowProgress
from glmtuner.training.quantized import quantization_check_skipped
from glmtuner.training.samplers import draw_base_seed
from glmtuner.training.throughput import ModelFlops, model_flops, utilization
from glmtuner.training.weighted_loss import batch_weight, weighted_sum

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from glmtuner.objectives.objective import Objective


class GlmTrainer(CheckpointingTrainer, LoadingTrainer):
    """transformers' Trainer, except where a method below says otherwise.

    `score` is called with the step after the losses of an evaluation and returns more metrics, such as the scores of
    generated answers; `derived` computes metrics from the means of other metrics. `sharded` says that every rank holds only
    its shard of the model's weights; `sequence` ranks share a row. `plain_lines`: no live line in a terminal.

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
        sequence: int = 1,
        objective: "Objective | None" = None,
        derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {},
        chunks_loss: bool = False,
        by_probability: bool = False,
        left_out: Mapping[FastPath, str] = MappingProxyType({}),
        evaluated_parts: Mapping[str, slice] = MappingProxyType({}),
        optimizers_of_run: Optimizers | None = None,
        early_stopping: EarlyStopping | None = None,
        plain_lines: bool = False,
        async_save: bool = False,
        **kwargs: Any,
    ) -> None:
        self.sharded, self.sequence = sharded, sequence
        self.async_save, self.pending = async_save, None
        if sharded:
            # Gradients are reduced and sharded after every batch of an accumulation: unsharded ones would take the memory
            # of a whole model.
            config: Any = args.accelerator_config  # parsed: an AcceleratorConfig
            config.gradient_accumulation_kwargs = {
                **(config.gradient_accumulation_kwargs or {}),
                "sync_each_batch": True,
            }
        # it would log 0.0 for a loss that is not finite; FiniteChecks end such a run
        args.logging_nan_inf_filter = False
        if (args.label_smoothing_factor or by_probability or sequence > 1) and objective is None:
            # where the loss is a sum of `weighted_sum`, it has the labelled tokens counted, for every model
            kwargs["compute_loss_func"] = SmoothedLoss(args.label_smoothing_factor)
        with quantization_check_skipped(model):
            super().__init__(model, args, **kwargs)
        # transformers reads from a model's class name that its loss shifts the labels; that of every model here does
        self._loss_shifts_labels = True
        self.neftune_noise_alpha = None  # `_run_epoch` adds the noise
        if sharded:
            # The flag of a model that manages its placement and the reduction of its gradients, so that accelerate does not
            # wrap it into DDP. Set after __init__, which refuses checkpoints of such models; ours hold full weights.
            self.is_distributed_loading_by_transformers = True
        self.measure_peak()
        self.finetuning, self.tracker, self.folder = finetuning, tracker, folder
        self.losses_file = folder / LOSSES
        self.pause: Pause | None = None  # at which the training stops before its end
        self.score, self.objective, self.derived = score, objective, derived
        self.measured = Measurements()  # of an objective, since the last logged step
        self.by_probability = by_probability  # is the model's loss of a token multiplied by the token's probability?
        self.chunks_loss = chunks_loss  # can the model compute its loss by glmtuner/kernels/chunked_loss.py?
        self.left_out = left_out  # the optimizations that the training goes without, and why
        self.evaluated_parts = evaluated_parts  # of several datasets, where each one's evaluation records are
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
        self.tokens_per_second: float | None = None  # since the last logging step
        for kind in (ProgressCallback, PrinterCallback):  # a bar and dictionaries
            self.remove_callback(kind)
        self.add_callback(History(self))
        self.add_callback(ShowProgress(self.folder))
        self.progress = ProgressLine(self, plain_lines)  # after the history, which measures the speed
        self.add_callback(self.progress)
        self.add_callback(self.optimizer_steps)
        self.add_callback(MethodSteps(self.model, finetuning))
        self.optimizers_of_run, self.early_stopping = optimizers_of_run, early_stopping
        if early_stopping is not None:
            self.add_callback(early_stopping)

    def measure_peak(self) -> None:
        """Measure the peak memory from now on."""
        forget_peak(self.args.device)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Sharded weights are on their device already."""
        if not self.sharded:
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """That of the run's trainer.optim, with its learning rates."""
        if self.optimizer is None and self.optimizers_of_run is not None:
            whole, own = model or self.model, super().create_optimizer
            decaying = self.get_decay_parameter_names(whole)
            self.optimizer = self.optimizers_of_run.create(whole, self.args, decaying, lambda: own(model))
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """transformers' schedule; an optimizer without one is told the length of its warm-up."""
        warm_up(self.optimizer, self.args.optim, self.args.get_warmup_steps(num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def checkpoint_activations(self) -> None:
        """Enable activation checkpointing if the arguments ask for it; `train` does so too, but after the preflight check."""
        enable_checkpointing(self.model, self.args)

    @cached_property
    def flops(self) -> ModelFlops | None:
        """The FLOPs that utilization is computed from; None on a CPU, and for losses of an objective."""
        return model_flops(self.model) if accelerator.has_memory(self.args.device) and self.objective is None else None

    @cached_property
    def matrix_weights(self) -> int:
        """The number of parameters outside of embeddings."""
        return int(self.model.num_parameters(exclude_embeddings=True))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate for its `total_flos`; it would count the parameters again in every step."""
        return 6 * int(inputs["input_ids"].numel()) * self.matrix_weights if "input_ids" in inputs else 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training."""
        _ = (
            self.flops
        )  # counted on the model as it is before it is wrapped, and before the clock runs: it takes a second
        with self.progress.shown():
            output = super().train(*args, **kwargs)
            self.finish_saving()
            return output

    # -- history -----------------------------------------------------------------------------------------------------

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> "TrainOutput":
        """Loss and time of the whole training, not only of the part since the last resume."""
        self.finite.settle()
        self.optimizer.eval()
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

        The loss is the mean over all tokens of the evaluation records, or over their weights, whatever the batches and the ranks;
        transformers takes the mean over batches. An objective's metrics are means over the records. Where there are records of
        several datasets, there are also those of each. losses.jsonl has a line a record.
        """
        self.finite.settle()
        self.evaluated_batches = []
        with self.progress.evaluating():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        columns = {
            name: torch.cat([rows[name] for rows in self.evaluated_batches]) for name in self.evaluated_batches[0]
        }
        if self.sequence > 1:  # the last batches are filled up with rows that were evaluated before
            columns = {name: column[: self.num_examples(dataloader)] for name, column in columns.items()}
        require_finite_evaluation(columns["loss"], self.state.global_step, self.args)
        if self.args.should_save:
            write_text(self.losses_file, losses_text(columns, self.evaluated_parts))
        means = means_of_parts(columns, self.evaluated_parts, self.derived)
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
                weight_B = inputs.pop("weight", None)
                take_counted(self.objective, inputs)  # `gather_rows` drops the rows that do not count
                loss_B, measured = self.objective.loss(model, inputs)
                weighted = {} if weight_B is None else {"weight": weight_B}
                metrics = {"loss": loss_B if weight_B is None else loss_B * weight_B, **weighted, **measured}
            else:
                metrics = sample_losses(model, inputs, chunked=self.chunks_loss)
        self.evaluated_batches.append({name: self.gather_rows(values).cpu() for name, values in metrics.items()})
        return None, None, None

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """transformers' step, with the tokens counted; an objective that takes its own optimizer steps replaces it."""
        if self.objective is not None and self.objective.takes_optimizer_steps:
            model.train()
            self.optimizer.train()
            loss = self.objective.update(self, model, self._prepare_inputs(inputs))
            self.finite.add("loss", loss, self.state.global_step)
            return loss
        if "segments" in inputs:
            taught = inputs["segments"].taught
            self.tokens += sum(taught)
            self.squared_lengths += sum(length**2 for length in taught)
        else:
            is_taught_B = inputs["labels"].ne(IGNORE_INDEX).any(dim=1)  # all but the padding rows of the last batches
            if COUNTED in inputs:  # a pair is two rows of it, in two halves
                is_taught_B &= inputs[COUNTED].repeat(len(is_taught_B) // len(inputs[COUNTED]))
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
        if self.accelerator.scaler is None:
            self.finite.add("gradient norm", torch.as_tensor(norm), self.state.global_step)
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless the last step was taken before: transformers would take one more before it looks.

        So a run that was killed after its last checkpoint, in its final evaluation or prediction, ends with the same weights. One
        that was killed in its pause's evaluation trains nothing either, and its checkpoint stays as it is.
        """
        if self.pause is not None and self.pause.is_reached(self.state.global_step, self.state.max_steps):
            self.control.should_training_stop = True
            return
        if not self.epoch_ended and (self._is_done() or float(self.state.epoch or 0.5).is_integer()):
            self._end_epoch(**kwargs)
            kwargs["resume_from_checkpoint"] = None  # its random state was loaded
        if self._is_done():
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

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the mean of an objective's over the rows; both with the weights that the batch has.

        A penalty of the method is a share of that of the optimizer step, in each of its batches.
        """
        loss = self._loss_of_batch(model, inputs, *args, **kwargs)
        penalty = self.finetuning.penalty(self.model)
        if penalty is None:
            return loss
        return loss + (penalty if self._divides() else penalty / self.current_gradient_accumulation_steps)

    def _loss_of_batch(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        smooths = self.chunks_loss and bool(self.args.label_smoothing_factor)
        sums = "weights" in inputs or self.by_probability or smooths or self.sequence > 1
        if self.objective is None and not sums:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.objective is None:
            return self._share(self.weighted_sum(model, inputs), **kwargs)
        weight_B, is_counted_B = inputs.pop("weight", None), take_counted(self.objective, inputs)
        loss_B, measured = self.objective.loss(model, inputs)
        if is_counted_B is not None:
            measured = of_counted(measured, is_counted_B)
            weight_B = is_counted_B.float() if weight_B is None else weight_B * is_counted_B
        self.measured.add(measured)
        return loss_B.mean() if weight_B is None else self._share((weight_B * loss_B).sum(), **kwargs)

    def weighted_sum(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """The sum of the labels' losses, each times its weight."""
        smoothing = self.args.label_smoothing_factor
        return weighted_sum(
            model, inputs, chunked=self.chunks_loss, smoothing=smoothing, by_probability=self.by_probability
        )

    def _share(self, total: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """What a weighted sum over a batch adds to the mean over all batches of an optimizer step, those of other ranks included.

        The gradients of the ranks are averaged, and `training_step` divides by the number of batches, unless a model's loss takes
        the number of items itself.
        """
        share = total / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes
        return share * self.current_gradient_accumulation_steps if self._divides() else share

    def _divides(self) -> bool:
        """Whether `training_step` divides a batch's loss by the number of batches of an optimizer step."""
        return not self.model_accepts_loss_kwargs and self.compute_loss_func is None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The labelled tokens of an optimizer step's batches; of batches with weights, the sum of the weights; of rows that count."""
        weights = [batch_weight(batch) for batch in batch_samples if {"weights", "weight", COUNTED} & batch.keys()]
        if not weights:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = torch.stack(weights).sum().to(device)
        if self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total).sum()
        return total.clamp(min=1e-9)  # of a rank whose rows are all padding

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
            tokens, squared_lengths = (
                sum(ranks.all_gather(int(n))[:: self.sequence]) for n in (self.tokens, self.squared_lengths)
            )
            used |= {
                "trained_parameters": parameter_count(self.model, trained=True),
                "train_tokens_per_second": tokens / self.train_seconds,
                **{
                    f"fast_path_{path.name}": int(path not in self.left_out)
                    for path in FastPath
                    if self.left_out.get(path) != NO_COMMON_BEGINNINGS
                },
            }
            if (mfu := self.utilization(tokens, squared_lengths, self.train_seconds)) is not None:
                used["train_mfu"] = mfu
        return used

    def utilization(self, tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Model FLOPs utilization of all ranks together; None on a CPU, an unknown GPU, and for losses of an objective."""
        if self.flops is None:
            return None
        name = accelerator.name_of(self.args.device)
        return utilization(self.flops.of(tokens, squared_lengths), seconds, name, ranks.world_size())
