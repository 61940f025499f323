"""The interface of objectives, and alternative values for a model's parameters: the reference, or the reward model."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from glmtuner.config.groups import Finetuning
from glmtuner.data.reference import COLUMN
from glmtuner.distributed.shards import exchange, forget_gathered
from glmtuner.distributed.shares import Share, copy_of
from glmtuner.finetuning.trained import check_fit, own_parameters, trained_parameters, weights_in
from glmtuner.kernels.common_beginnings import dropouts
from glmtuner.objectives.rows import Rows
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainerState, TrainingArguments

# of a batch: bool, [R], False of rows that fill up the batches of several ranks, of which nothing is learned; without it, all count
COUNTED = "counted"
RowMetrics = dict[str, torch.Tensor]  # metric -> its value for each row, NaN where a row has none; logged as means


class MetricSink(Protocol):
    """Collects metrics until they are logged."""

    def add(self, metrics: RowMetrics, /) -> object: ...


class TrainingLoop(Protocol):
    """The members of GlmTrainer that an objective with its own optimizer steps uses."""

    accelerator: "Accelerator"
    args: "TrainingArguments"
    state: "TrainerState"
    tokens: torch.Tensor

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def measured(self) -> MetricSink: ...

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]: ...


class Objective:
    """A loss, with the state that belongs to it besides the model.

    `model` as an argument may be wrapped for training on several ranks; `self.model` is the model without that wrapper.
    """

    takes_optimizer_steps: ClassVar[bool] = False  # does `update` replace the trainer's forward and backward pass?
    reads_counted: ClassVar[bool] = (
        False  # is its loss of a row computed from other rows, so that it has to know which count?
    )

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each row, [R], and the metrics logged with it."""
        raise NotImplementedError

    def update(self, trainer: TrainingLoop, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One training step with all optimizer steps but the last; returns its mean loss. Only if `takes_optimizer_steps`."""
        raise NotImplementedError

    def preflight_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a first batch, to check that it has a gradient."""
        return self.loss(self.model, batch)[0].mean()

    def save(self, folder: Path) -> None:
        """Write what a checkpoint and a finished run need besides the trained weights."""

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""


class Weights:
    """Alternative values for some of a model's parameters, swapped in while they are needed, so that no second model is held."""

    def __init__(self, values: Mapping[str, torch.Tensor | Share]) -> None:
        self.values = dict(values)  # of a model that is going to be sharded, a rank's rows

    @classmethod
    def snapshot(cls, model: nn.Module) -> "Weights":
        """A copy of the model's trained parameters as they are now."""
        return cls({name: copy_of(value) for name, value in trained_parameters(model).items()})

    @classmethod
    def from_checkpoint(cls, folder: Path, model: "PreTrainedModel", finetuning: Finetuning) -> "Weights":
        """The parameters in which a checkpoint of the same method differs from the model; the model stays as it was.

        Raises CheckpointError.
        """
        trained = trained_parameters(model)
        if finetuning.saved_as == "model":
            parameters = own_parameters(model)
            saved = weights_in(folder, model)
            check_fit(parameters, saved, folder)
            saved = {name: value.to(parameters[name]) for name, value in saved.items()}
            same = {name for name in saved.keys() - trained.keys() if torch.equal(parameters[name], saved[name])}
            return cls({name: value for name, value in saved.items() if name not in same})
        before = cls.snapshot(model)
        finetuning.restore(model, folder)
        restored = cls.snapshot(model)
        before._swap(dict(model.named_parameters()))
        return restored

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, the model has these values, in evaluation mode and without gradients; only shards are copied."""
        forget_gathered(model)  # what a pass without a backward one left gathered hides the shards
        parameters = dict(model.named_parameters())
        was_training = model.training
        self._swap(parameters)
        try:
            with torch.no_grad():
                model.eval()
                forget_gathered(model)
                yield
        finally:
            self._swap(parameters)
            forget_gathered(model)
            model.train(was_training)

    def _swap(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, value in self.values.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                self.values[name] = exchange(parameter, value)
                continue
            assert isinstance(value, torch.Tensor)
            self.values[name] = parameter.data
            parameter.data = value.to(parameter.device)


def counted(batch: Mapping[str, Any], rows: int, device: torch.device) -> torch.Tensor:
    """Which rows of a batch count, bool, [rows]."""
    mask_R: torch.Tensor = batch.get(COUNTED, torch.ones(rows, dtype=torch.bool)).to(device)
    return mask_R


def take_counted(objective: Objective, batch: dict[str, Any]) -> torch.Tensor | None:
    """Which rows of the batch count, None if all do; they are left in the batch for an objective that reads them."""
    is_counted_R: torch.Tensor | None = batch.get(COUNTED)
    if not objective.reads_counted:
        batch.pop(COUNTED, None)
    return is_counted_R


def of_counted(measured: RowMetrics, is_counted_R: torch.Tensor) -> RowMetrics:
    """The metrics of the rows that count; of the others they are NaN."""
    return {name: value.where(is_counted_R.to(value.device), torch.nan) for name, value in measured.items()}


class AnswerObjective(Objective):
    """An objective on the log-probabilities of answers."""

    def answer_logprobs(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The log-probability of each answer, [R]."""
        return Rows.of(self.model, batch).statistics(batch["labels"], model).logprobs_RT.sum(1)

    def answer_tokens(self, batch: dict[str, Any]) -> torch.Tensor:
        """The number of labelled tokens of each answer, at least 1, [R]."""
        tokens_R: torch.Tensor = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
        return tokens_R.clamp(min=1)


class ReferenceObjective(AnswerObjective):
    """An objective on log(policy / reference) of answers. The reference is the model as it is now; dropout is disabled.

    `precomputes`: batches are to have the reference's log-probabilities, so that it is not held during the training.
    """

    def __init__(self, model: "PreTrainedModel", precomputes: bool = False) -> None:
        super().__init__(model)
        self.precomputes = precomputes
        self.reference = Weights.snapshot(model)
        disable_dropout(model)

    def reference_logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
        """The log-probability of each answer by the reference, [R], without a gradient: the batch's, if it has them."""
        if COLUMN in batch:
            logprobs_R: torch.Tensor = batch[COLUMN]
            return logprobs_R
        with self.reference.applied_to(self.model):
            return self.answer_logprobs(self.model, batch)

    def forget_reference(self) -> None:
        """Free its memory; batches have its log-probabilities from now on."""
        self.reference = Weights({})


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the ratio of policy and reference would measure it instead of what was learned."""
    for module in model.modules():
        for name, _ in dropouts(module):
            setattr(module, name, 0.0)
