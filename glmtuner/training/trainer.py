"""transformers' Trainer with crash-safe checkpoints and a history that reads the same after a resume."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Tracker
from glmtuner.data.segments import lengths_of
from glmtuner.distributed import ranks
from glmtuner.finetuning.trained import gathered
from glmtuner.run_folder.checkpoints import checkpoints, mark_complete
from glmtuner.run_folder.files import read_json, strict_json, write_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS, LOSSES
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.callbacks import CountOptimizerSteps, History
from glmtuner.training.divergence import require_finite
from glmtuner.training.measurements import Measurements, forget_peak, peak_memory_gib, token_losses
from glmtuner.training.samplers import EvenBatches, PaddedRows
from glmtuner.training.throughput import model_flops, size_of, utilization

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

    from glmtuner.objectives.objective import Objective


PROGRESS = "progress.json"  # what trainer_state.json lacks: the loss since the last logged step, and the time so far


class GlmTrainer(Trainer):
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
        # it would log 0.0 for a loss that is not finite; `_require_finite` ends such a run
        args.logging_nan_inf_filter = False
        with _quantization_check_skipped(model):
            super().__init__(model, args, **kwargs)
        if sharded and not self.is_deepspeed_enabled:
            # The flag of a model that manages its placement and the reduction of its gradients, so that accelerate does not
            # wrap it into DDP. Set after __init__, which refuses checkpoints of such models; ours hold full weights.
            self.is_distributed_loading_by_transformers = True
        forget_peak(self.args.device)
        self.finetuning, self.tracker, self.folder = finetuning, tracker, folder
        self.score = score
        self.objective = objective
        self.derived = derived
        self.measured = Measurements()  # of an objective, since the last logged step
        self.chunks_loss = chunks_loss  # does the model compute its loss by glmtuner/kernels/chunked_loss.py?
        if objective is not None:
            self.model_accepts_loss_kwargs = False  # an objective's loss is a mean over rows, whatever their lengths
        # of this rank: the number of tokens without padding, and the sum of the rows' squared lengths
        self.tokens, self.squared_lengths = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self.evaluated_batches: list[dict[str, torch.Tensor]] = []  # metric -> values of a batch's rows
        self.seconds_before_resume = 0.0
        self.train_seconds = 0.0
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
        if self.args.activation_checkpointing:
            options = dict(self.args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]  # parsed, no longer a str
            layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=options or None, every_n_layers=layers, offload=offload
            )

    # -- checkpoints: written to a temporary name, marked complete, renamed ------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, mark it complete, and rename it.

        transformers writes to the final name, where a killed process leaves half-written files. The weights are those that
        the fine-tuning method trains, and no `training_args.bin` (a pickle) is written.
        """
        name = f"checkpoint-{self.state.global_step}"
        root = self.folder / CHECKPOINTS
        partial, final = root / f".partial-{name}", root / name
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
        if not (self.args.save_only_model or self.is_deepspeed_enabled):  # DeepSpeed's are pickles, never loaded
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
        droppable = [path for path in checkpoints(self.folder.path) if str(path) != best]
        keep = limit - 1 if best and self.args.load_best_model_at_end else limit
        for path in droppable[: len(droppable) - max(keep, 1)]:
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
        progress = read_json(self.resumed_from / PROGRESS)
        self._tr_loss += progress["loss_since_log"][ranks.rank()]
        self.tokens += progress["tokens"][ranks.rank()]
        self.squared_lengths += progress["squares"][ranks.rank()]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["step_logged"]
        self.seconds_before_resume = progress["seconds"]
        self.history_lines = progress.get("history_lines")  # checkpoints of earlier versions have neither
        self.optimizer_steps.steps = progress.get("optimizer_steps", 1)
        self.measured.load_state_dict(progress["measured"][ranks.rank()], self.args.device)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> "TrainOutput":
        """Loss and time of the whole training, not only of the part since the last resume."""
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
        takes the mean over batches. The metrics of an objective are means over the records. losses.jsonl has a line for each
        record.
        """
        self.evaluated_batches = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        columns = {
            name: torch.cat([rows[name] for rows in self.evaluated_batches]) for name in self.evaluated_batches[0]
        }
        if self.args.should_save:
            rows = zip(*(column.tolist() for column in columns.values()), strict=True)
            lines = [
                {
                    "index": index,
                    **{name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)},
                }
                for index, row in enumerate(rows)
            ]
            write_text(self.folder / LOSSES, "".join(f"{strict_json(line)}\n" for line in lines))
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
                loss_B, tokens_B = self.row_losses(model, inputs)
                metrics = {"loss": loss_B, "tokens": tokens_B}
        self.evaluated_batches.append({name: self.gather_function(values).cpu() for name, values in metrics.items()})
        return None, None, None

    def row_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every sample: the loss in nats, summed over its labelled tokens, float32 [B], and their number [B]."""
        labels_BT = inputs["labels"]
        if self.chunks_loss:
            losses_BT = model(**inputs, each=True).loss
        else:
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            losses_BT = token_losses(model(**unlabelled).logits, labels_BT)
        is_labelled_BT = torch.nn.functional.pad(labels_BT[:, 1:].ne(IGNORE_INDEX), (1, 0))
        if "segments" not in inputs:
            return losses_BT.sum(1), is_labelled_BT.sum(1)
        lengths = inputs["segments"].lengths  # one row [1, T] holds the samples
        return segment_sums(losses_BT[0], lengths), segment_sums(is_labelled_BT[0], lengths)

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """transformers' step, with the tokens counted; an objective that takes its own optimizer steps replaces it."""
        if self.objective is not None and self.objective.takes_optimizer_steps:
            model.train()
            return self._require_finite("loss", self.objective.update(self, model, self._prepare_inputs(inputs)))
        if "segments" in inputs:
            taught = inputs["segments"].taught
            self.tokens += sum(taught)
            self.squared_lengths += sum(length**2 for length in taught)
        else:
            is_taught_B = inputs["labels"].ne(IGNORE_INDEX).any(dim=1)  # all but the padding rows of the last batches
            tokens_B = (inputs["attention_mask"] * is_taught_B[:, None]).sum(1).to(self.tokens.device)
            self.tokens += tokens_B.sum()
            self.squared_lengths += tokens_B.square().sum()
        return self._require_finite("loss", super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm before clipping; raises TrainingError unless it is finite, or fp16's scaler skips such steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self._require_finite("gradient norm", torch.as_tensor(norm))
        return norm

    def _require_finite(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return require_finite(name, value, self.state.global_step, self.args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless the last step was taken before: transformers would take one more before it looks.

        So a run that was killed after its last checkpoint, in its final evaluation or prediction, ends with the same weights.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the mean of an objective's over the rows."""
        if self.objective is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss_B, measured = self.objective.loss(model, inputs)
        self.measured.add(measured)
        return loss_B.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logging step of the training also reports the objective's metrics since the last one."""
        if "loss" in logs and self.objective is not None:
            means = self.measured.reduce_and_reset()
            logs |= means | self.derived(means)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Batches of similar length read the lengths as a column; transformers would read the rows one by one."""
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(rows, PaddedRows):
            rows = rows.rows
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(group_size, lengths=lengths_of(rows))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """On several ranks, every row of an epoch is learned once: accelerate would repeat rows to fill the last batches.

        The last batches are filled with padding rows instead; not for an objective, whose rows have no padding row.
        """
        if ranks.world_size() == 1 or self.args.dataloader_drop_last or self.objective is not None:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        padded = PaddedRows(rows)
        self.train_dataset = padded
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        shard: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
        shard.batch_sampler = EvenBatches(shard.batch_sampler, ranks.world_size(), padded.padding_index)
        return loader

    def resources(self) -> dict[str, float]:
        """Peak memory in GiB (the largest rank's), numbers of parameters, tokens a second without padding, and MFU."""
        used: dict[str, float] = {
            "peak_memory_gib": max(ranks.all_gather(peak_memory_gib(self.args.device))),
            "total_parameters": parameter_count(self.model.parameters()),
        }
        if self.train_seconds:
            tokens = sum(ranks.all_gather(int(self.tokens)))
            squared_lengths = sum(ranks.all_gather(int(self.squared_lengths)))
            used |= {
                "trained_parameters": parameter_count(p for p in self.model.parameters() if p.requires_grad),
                "train_tokens_per_second": tokens / self.train_seconds,
            }
            if (mfu := self.utilization(tokens, squared_lengths, self.train_seconds)) is not None:
                used["train_mfu"] = mfu
        return used

    def utilization(self, tokens: float, squared_lengths: float, seconds: float) -> float | None:
        """Model FLOPs utilization of all ranks together; None on a CPU, an unknown GPU, and for losses of an objective."""
        device = self.args.device
        if device.type != "cuda" or self.objective is not None or (flops := model_flops(self.model)) is None:
            return None
        name = torch.cuda.get_device_name(device)
        return utilization(flops.of(tokens, squared_lengths), seconds, name, ranks.world_size())


def segment_sums(values_T: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The sum of each segment, [number of segments]."""
    return torch.stack([segment.sum() for segment in torch.split(values_T, list(lengths))])


def parameter_count(parameters: Iterable[torch.Tensor]) -> int:
    """The number of all elements, those of other ranks' shards included."""
    return sum(size_of(parameter) for parameter in parameters)


@contextmanager
def _quantization_check_skipped(model: Any) -> Iterator[None]:
    """While this lasts, a quantized model with a prefix encoder counts as one that is not quantized.

    Otherwise transformers' Trainer refuses to train it: of trainable parts on quantized weights it knows only PEFT's.
    """
    skipped = hasattr(model, "prefix_encoder") and hasattr(model, "is_quantized")
    if skipped:
        before, model.is_quantized = model.is_quantized, False
    try:
        yield
    finally:
        if skipped:
            model.is_quantized = before
