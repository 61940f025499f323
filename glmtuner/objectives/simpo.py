"""Simple preference optimization."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from glmtuner.objectives.objective import AnswerObjective, RowMetrics
from glmtuner.objectives.pairs import Halves, pair_metrics
from glmtuner.objectives.preference_losses import simpo_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SimpoSettings(Protocol):
    """The keys of stage=simpo that are read here."""

    beta: float
    gamma: float
    label_smoothing: float
    sft_weight: float


class SimpoObjective(AnswerObjective):
    """A preference loss on the mean log-probabilities of the two answers; there is no reference."""

    def __init__(self, model: "PreTrainedModel", settings: SimpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair, [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        settings = self.settings
        pairs = Halves.of(self.answer_logprobs(model, batch), self.answer_tokens(batch))
        chosen_R, rejected_R = pairs.chosen_mean_R, pairs.rejected_mean_R
        loss_R = simpo_loss(chosen_R, rejected_R, settings.beta, settings.gamma, settings.label_smoothing)
        if settings.sft_weight:
            loss_R = loss_R - settings.sft_weight * chosen_R
        return loss_R, pair_metrics(settings.beta * chosen_R, settings.beta * rejected_R, -chosen_R)
