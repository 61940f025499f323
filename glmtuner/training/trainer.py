"""The Hugging Face Trainer with checkpoints that survive a kill and a history that does not show where it was resumed."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Tracker
from glmtuner.data.segments import lengths_of
from glmtuner.distributed import ranks
from glmtuner.finetuning.trained import gathered
from glmtuner.run_folder.checkpoints import checkpoints, mark_complete
from glmtuner.run_folder.files import read_json, write_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS, LOSSES
from glmtuner.templates.base import IGNORE_INDEX
from glmtuner.training.callbacks import History
from glmtuner.training.measurements import Measurements, forget_peak, peak_memory_gib, token_losses
from glmtuner.training.samplers import EvenBatches, Filled
from glmtuner.training.throughput import model_flops, size_of, utilization

if TYPE_CHECKING:
    from glmtuner.objectives.objective import Objective


PROGRESS = "progress.json"  # what transformers forgets: the loss since the last logged step, and the time so far


class GlmTrainer(Trainer):
    """What transformers' Trainer does, except where a method below says otherwise.

    `score` is called with the step after the losses of an evaluation and returns more metrics, such as the scores of
    generated answers. `sharded` says that every rank holds only its share of the model's weights.
    """

    def __init__(
        self,
        *args: Any,
        finetuning: Finetuning,
        tracker: Tracker,
        folder: RunFolder,
        score: Callable[[int], dict[str, float]] | None = None,
        sharded: bool = False,
        objective: "Objective | None" = None,
        derived: Callable[[dict[str, float]], dict[str, float]] = lambda means: {},
        **kwargs: Any,
    ) -> None:
        self.sharded = sharded
        with _adapter_declared(kwargs["model"]):
            super().__init__(*args, **kwargs)
        if sharded and not self.is_deepspeed_enabled:
            # What transformers calls a model that owns its placement and the reduction of its gradients, so that accelerate
            # puts no DDP around it. Said after __init__, which refuses checkpoints of such models; ours are whole.
            self.is_distributed_loading_by_transformers = True
        forget_peak(self.args.device)
        self.finetuning, self.tracker, self.folder, self.score = finetuning, tracker, folder, score
        self.objective, self.derived, self.measured = objective, derived, Measurements()
        self.chunks_loss = False  # does the model compute its loss by glmtuner/kernels/chunked_loss.py?
        if objective is not None:
            self.model_accepts_loss_kwargs = False  # the loss is a mean over rows, whatever tokens they have
        self.earlier_seconds = 0.0
        # of this rank: tokens without padding, and the sum of the rows' squared numbers of them
        self.tokens, self.squares = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self.evaluated: list[dict[str, torch.Tensor]] = []  # of the evaluation in progress: a batch's rows, by metric
        self.train_seconds = 0.0
        self.resumed_from: Path | None = None
        self.add_callback(History(self))

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Weights that are shared out lie where they belong."""
        if not self.sharded:
            super()._move_model_to_device(model, device)

    def checkpoint_activations(self) -> None:
        """Now, where the arguments ask for it; `train` does so too, but the first batch is tried before that."""
        if self.args.activation_checkpointing:
            options = dict(self.args.activation_checkpointing_kwargs or {})
            layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
            self.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=options or None, every_n_layers=layers, offload=offload
            )

    # -- checkpoints: written to a temporary name, marked complete, renamed ------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Replaces transformers' in-place checkpoint, whose files a kill leaves half-written under the final name.

        The weights are what the fine-tuning method trains, and no `training_args.bin` (a pickle) is written.
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
        whole = self.accelerator.unwrap_model(model)
        with gathered(whole, everything=False):
            if self.args.should_save:
                self.finetuning.save_trained(whole, partial)
                if self.objective is not None:
                    self.objective.save(partial)
        if not (self.args.save_only_model or self.is_deepspeed_enabled):  # DeepSpeed's states are pickles, never loaded
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
        """What each rank has summed up, a list with an entry a rank, and what all share."""
        return {
            "loss_since_log": ranks.all_gather(self._tr_loss.item()),
            "measured": ranks.all_gather(self.measured.told()),
            "tokens": ranks.all_gather(self.tokens.item()),
            "squares": ranks.all_gather(self.squares.item()),
            "loss_logged": self._total_loss_scalar,
            "step_logged": self._globalstep_last_logged,
            "seconds": self.earlier_seconds + time.time() - self._session_start,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer of weights that are shared out, whole, in the file that the plain one has."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Gradients are shared out after every batch of an accumulation: whole ones would need a whole model's memory."""
        return nullcontext()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, optim_state_dict=state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The method's own files, every name and shape compared; transformers would load what fits."""
        self.resumed_from = Path(resume_from_checkpoint)
        self._restore(model or self.model, self.resumed_from)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore(self.model, Path(self.state.best_model_checkpoint))

    def _restore(self, model: torch.nn.Module, checkpoint: Path) -> None:
        self.finetuning.restore(model, checkpoint)
        if self.objective is not None:
            self.objective.restore(checkpoint)

    # -- history -----------------------------------------------------------------------------------------------------

    def recall_progress(self) -> None:
        """Called when training begins: the sums that transformers starts at zero go on where the checkpoint left them."""
        self._session_start = time.time()
        if self.resumed_from is None:
            return
        progress = read_json(self.resumed_from / PROGRESS)
        self._tr_loss += progress["loss_since_log"][ranks.rank()]
        self.tokens += progress["tokens"][ranks.rank()]
        self.squares += progress["squares"][ranks.rank()]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["step_logged"]
        self.earlier_seconds = progress["seconds"]
        self.measured.recall(progress["measured"][ranks.rank()], self.args.device)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Loss and time of the whole training, not of the part since the last resume."""
        self._initial_global_step = 0
        self.train_seconds = self.earlier_seconds + time.time() - start_time
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier_seconds)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The losses, then the scores of generated answers, so that both stand in one line of the history.

        The loss is the mean over all tokens of the evaluation records, whatever the batches and the ranks; transformers'
        is the mean over batches. What an objective measures is the mean over the records. losses.jsonl keeps each record's.
        """
        self.evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        columns = {name: torch.cat([part[name] for part in self.evaluated]) for name in self.evaluated[0]}
        if self.args.should_save:
            rows = zip(*(column.tolist() for column in columns.values()), strict=True)
            lines = [
                {
                    "index": place,
                    **{name: value for name, value in zip(columns, row, strict=True) if not math.isnan(value)},
                }
                for place, row in enumerate(rows)
            ]
            write_text(self.folder / LOSSES, "".join(f"{json.dumps(line)}\n" for line in lines))
        if self.objective is None:
            means = {"loss": (columns["loss"].sum() / columns["tokens"].sum()).item()}
        else:
            means = {name: column.nanmean().item() for name, column in columns.items() if not column.isnan().all()}
        means |= self.derived(means)
        if self.score is not None:
            means |= self.score(self.state.global_step)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """The loss of each row, kept for `evaluation_loop`; transformers would take the batch's mean."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.objective is not None:
                loss_B, measured = self.objective.loss(model, inputs)
                found = {"loss": loss_B, **measured}
            else:
                loss_B, tokens_B = self.row_losses(model, inputs)
                found = {"loss": loss_B, "tokens": tokens_B}
        self.evaluated.append({name: self.gather_function(values).cpu() for name, values in found.items()})
        return None, None, None

    def row_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every sample: the loss in nats, summed over its learned tokens, float32, and their number."""
        labels_BT = inputs["labels"]
        if self.chunks_loss:
            losses_BT = model(**inputs, each=True).loss
        else:
            plain = {name: value for name, value in inputs.items() if name != "labels"}
            losses_BT = token_losses(model(**plain).logits, labels_BT)
        learned_BT = torch.nn.functional.pad(labels_BT[:, 1:].ne(IGNORE_INDEX), (1, 0))
        if "segments" not in inputs:
            return losses_BT.sum(1), learned_BT.sum(1)
        lengths = inputs["segments"].lengths
        return tuple(torch.stack([part.sum() for part in row[0].split(lengths)]) for row in (losses_BT, learned_BT))

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.objective is not None and self.objective.updates:
            model.train()
            return self.objective.update(self, model, self._prepare_inputs(inputs))
        if "segments" in inputs:
            taught = inputs["segments"].taught
            self.tokens += sum(taught)
            self.squares += sum(length**2 for length in taught)
        else:
            taught_B = inputs["labels"].ne(IGNORE_INDEX).any(dim=1)  # all but blank rows
            tokens_B = (inputs["attention_mask"] * taught_B[:, None]).sum(1).to(self.tokens.device)
            self.tokens += tokens_B.sum()
            self.squares += tokens_B.square().sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the mean of an objective's over the rows."""
        if self.objective is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss_B, measured = self.objective.loss(model, inputs)
        self.measured.add(measured)
        return loss_B.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logging step of the training also tells what an objective has measured since the last one."""
        if "loss" in logs and self.objective is not None:
            means = self.measured.take()
            logs |= means | self.derived(means)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of similar length know the lengths without reading the rows one by one, as transformers would."""
        rows = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=lengths_of(rows))

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **kwargs: Any) -> DataLoader:
        """Several ranks learn an epoch's rows once each: accelerate would fill the last batches up with rows seen before.

        So it does where an objective learns: its rows have no blank one among them.
        """
        plain = ranks.world_size() == 1 or not kwargs.get("is_training") or self.args.dataloader_drop_last
        if plain or self.objective is not None:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        sampler_of = kwargs.pop("sampler_fn")
        filled = Filled(dataset)
        loader = super()._get_dataloader(
            filled, description, batch_size, sampler_fn=lambda _: sampler_of(dataset), **kwargs
        )
        inner = loader.batch_sampler.batch_sampler  # accelerate's BatchSamplerShard is around it
        loader.batch_sampler.batch_sampler = EvenBatches(inner, ranks.world_size(), filled.blank)
        return loader

    def resources(self) -> dict[str, float]:
        """What the run took: non-padding tokens a second, peak memory of the largest rank, trained and all parameters."""
        found = {
            "peak_memory_gib": max(ranks.all_gather(peak_memory_gib(self.args.device))),
            "total_parameters": sum(map(size_of, self.model.parameters())),
        }
        if self.train_seconds:
            tokens, squares = (sum(ranks.all_gather(count.item())) for count in (self.tokens, self.squares))
            found |= {
                "trained_parameters": sum(size_of(p) for p in self.model.parameters() if p.requires_grad),
                "train_tokens_per_second": tokens / self.train_seconds,
            }
            if (share := self.utilization(tokens, squares, self.train_seconds)) is not None:
                found["train_mfu"] = share
        return found

    def utilization(self, tokens: int, squares: int, seconds: float) -> float | None:
        """Model FLOPs utilization of all ranks together; None on a CPU, an unknown GPU, and for losses of an objective."""
        device = self.args.device
        if device.type != "cuda" or self.objective is not None or (flops := model_flops(self.model)) is None:
            return None
        name = torch.cuda.get_device_name(device)
        return utilization(flops.of(tokens, squares), seconds, name, ranks.world_size())

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
