"""What every objective has, and other weights for the same model: the reference, or the reward model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from glmtuner.config.groups import Finetuning
from glmtuner.finetuning.trained import check_fit, own_parameters, trained_parameters, weights_in
from glmtuner.objectives.losses import label_logprobs

Measured = dict[
    str, torch.Tensor
]  # name -> a value for each row, NaN where a row has none; the trainer logs their mean


class Objective:
    """A loss, and what belongs to it besides the model.

    `model` in the methods may be wrapped to be trained on several ranks; `self.model` is the model itself.
    """

    updates: ClassVar[bool] = False  # does it take its own optimizer steps, in `update`?

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Measured]:
        """The loss of each row, [R], and what is logged beside it."""
        raise NotImplementedError

    def trial(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a first batch, to see whether anything would be learned."""
        return self.loss(self.model, batch)[0].mean()

    def save(self, folder: Path) -> None:
        """Write what a checkpoint and a finished run need beside the trained weights."""

    def restore(self, folder: Path) -> None:
        """Put back what `save` wrote."""


class Weights:
    """Other values for some of a model's parameters, put in their place while they are needed: no second model is held."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values

    @classmethod
    def trained_in(cls, model: nn.Module) -> "Weights":
        """A copy of what the model trains, as it is now."""
        return cls({name: value.detach().clone() for name, value in trained_parameters(model).items()})

    @classmethod
    def saved_in(cls, folder: Path, model: nn.Module, finetuning: Finetuning) -> "Weights":
        """What a checkpoint of the same method makes of the model, which is left as it was; raises CheckpointError."""
        trained = trained_parameters(model)
        if finetuning.saved_as == "model":
            parameters = own_parameters(model)
            saved = weights_in(folder, parameters)
            check_fit(parameters, saved, folder)
            saved = {name: value.to(parameters[name]) for name, value in saved.items()}
            same = {name for name in saved.keys() - trained.keys() if torch.equal(parameters[name], saved[name])}
            return cls({name: value for name, value in saved.items() if name not in same})
        mine = cls.trained_in(model)
        finetuning.restore(model, folder)
        theirs = cls.trained_in(model)
        mine._swap(dict(model.named_parameters()))
        return theirs

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The model with these values, in evaluation mode and without gradients; nothing is copied."""
        parameters = dict(model.named_parameters())
        was_training = model.training
        self._swap(parameters)
        try:
            with torch.no_grad():
                model.eval()
                yield
        finally:
            self._swap(parameters)
            model.train(was_training)

    def _swap(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, value in self.values.items():
            parameter = parameters[name]
            self.values[name] = parameter.data
            parameter.data = value.to(parameter.device)


class AgainstReference(Objective):
    """An objective on log(policy / reference) of answers; the reference is the model as it comes in here.

    `settings` has the keys of the stage. Dropout is off.
    """

    def __init__(self, model: Any, settings: Any) -> None:
        super().__init__(model)
        self.settings, self.reference = settings, Weights.trained_in(model)
        without_dropout(model)

    def answer_logprobs(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The log-probability of each answer, [R]."""
        logits_RTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return label_logprobs(logits_RTV, batch["labels"]).sum(1)


def without_dropout(model: nn.Module) -> None:
    """No dropout from now on: the ratio of policy and reference would measure it instead of what was learned."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
