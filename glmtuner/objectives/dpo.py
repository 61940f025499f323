"""Direct preference optimization."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from glmtuner.config.groups import PreferenceLoss
from glmtuner.objectives.losses import hinge_preference, ipo_preference, sigmoid_preference
from glmtuner.objectives.objective import ReferenceObjective, RowMetrics
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DpoSettings(Protocol):
    """The keys of stage=dpo that are read here."""

    beta: float
    loss: PreferenceLoss
    label_smoothing: float
    sft_weight: float


class DpoObjective(ReferenceObjective):
    """A preference loss on pairs of a chosen and a rejected answer."""

    def __init__(self, model: "PreTrainedModel", settings: DpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair, [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        with self.reference.applied_to(self.model):
            reference_R = self.answer_logprobs(self.model, batch)
        logprobs_R = self.answer_logprobs(model, batch)
        tokens_R = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1)
        settings = self.settings
        is_ipo = settings.loss is PreferenceLoss.ipo
        ratio_R = (logprobs_R - reference_R) / (tokens_R if is_ipo else 1)
        chosen_R, rejected_R = ratio_R.chunk(2)
        if is_ipo:
            loss_R = ipo_preference(chosen_R, rejected_R, settings.beta)
        elif settings.loss is PreferenceLoss.hinge:
            loss_R = hinge_preference(chosen_R, rejected_R, settings.beta)
        else:
            loss_R = sigmoid_preference(chosen_R, rejected_R, settings.beta, settings.label_smoothing)
        nll_R = -(logprobs_R / tokens_R).chunk(2)[0]
        if settings.sft_weight:
            loss_R = loss_R + settings.sft_weight * nll_R
        rewards = (settings.beta * ratio_R).detach().chunk(2)
        return loss_R, {
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "margin": rewards[0] - rewards[1],
            "accuracy": (rewards[0] > rewards[1]).float(),
            "nll_chosen": nll_R.detach(),
        }
