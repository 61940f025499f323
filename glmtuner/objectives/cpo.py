"""Contrastive preference optimization."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from glmtuner.config.groups import CpoLoss
from glmtuner.objectives.losses import hinge_preference, ipo_preference, sigmoid_preference
from glmtuner.objectives.objective import AnswerObjective, RowMetrics
from glmtuner.objectives.pairs import Halves, pair_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CpoSettings(Protocol):
    """The keys of stage=cpo that are read here."""

    beta: float
    loss: CpoLoss
    label_smoothing: float
    sft_weight: float


class CpoObjective(AnswerObjective):
    """A preference loss as DPO's with a uniform reference, and the better answer's loss per token."""

    def __init__(self, model: "PreTrainedModel", settings: CpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair, [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        settings, beta = self.settings, self.settings.beta
        pairs = Halves.of(self.answer_logprobs(model, batch), self.answer_tokens(batch))
        is_ipo = settings.loss is CpoLoss.ipo
        chosen_R = pairs.chosen_mean_R if is_ipo else pairs.chosen_R
        rejected_R = pairs.rejected_mean_R if is_ipo else pairs.rejected_R
        if is_ipo:
            loss_R = ipo_preference(chosen_R, rejected_R, beta)
        elif settings.loss is CpoLoss.hinge:
            loss_R = hinge_preference(chosen_R, rejected_R, beta)
        else:
            loss_R = sigmoid_preference(chosen_R, rejected_R, beta, settings.label_smoothing)
        nll_R = -pairs.chosen_mean_R
        loss_R = loss_R + settings.sft_weight * nll_R
        return loss_R, pair_metrics(beta * chosen_R, beta * rejected_R, nll_R)
