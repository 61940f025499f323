"""Direct preference optimization."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from glmtuner.config.groups import PreferenceLoss
from glmtuner.objectives.losses import hinge_preference, ipo_preference, sigmoid_preference
from glmtuner.objectives.objective import ReferenceObjective, RowMetrics
from glmtuner.objectives.pairs import Halves, pair_metrics
from glmtuner.objectives.preference_losses import (
    apo_down_preference,
    apo_zero_preference,
    exo_preference,
    robust_preference,
    sppo_preference,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# of the mean log-ratio of an answer's tokens, not of their sum
OF_MEANS = (PreferenceLoss.ipo, PreferenceLoss.sigmoid_norm)
PLAIN = {
    PreferenceLoss.ipo: ipo_preference,
    PreferenceLoss.hinge: hinge_preference,
    PreferenceLoss.sppo_hard: sppo_preference,
    PreferenceLoss.apo_zero: apo_zero_preference,
    PreferenceLoss.apo_down: apo_down_preference,
}


class DpoSettings(Protocol):
    """The keys of stage=dpo that are read here."""

    beta: float
    loss: PreferenceLoss
    label_smoothing: float
    sft_weight: float
    precompute_reference: bool


class DpoObjective(ReferenceObjective):
    """A preference loss on pairs of a chosen and a rejected answer."""

    def __init__(self, model: "PreTrainedModel", settings: DpoSettings) -> None:
        super().__init__(model, settings.precompute_reference)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair, [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        reference_R = self.reference_logprobs(batch)
        logprobs_R, tokens_R = self.answer_logprobs(model, batch), self.answer_tokens(batch)
        ratios = Halves.of(logprobs_R - reference_R, tokens_R)
        means = self.settings.loss in OF_MEANS
        chosen_R = ratios.chosen_mean_R if means else ratios.chosen_R
        rejected_R = ratios.rejected_mean_R if means else ratios.rejected_R
        loss_R = self.preference(chosen_R, rejected_R)
        nll_R = -Halves.of(logprobs_R, tokens_R).chosen_mean_R
        if self.settings.sft_weight:
            loss_R = loss_R + self.settings.sft_weight * nll_R
        beta = self.settings.beta
        return loss_R, pair_metrics(beta * chosen_R, beta * rejected_R, nll_R)

    def preference(self, chosen_R: torch.Tensor, rejected_R: torch.Tensor) -> torch.Tensor:
        """The loss that the settings name, [R], of log(policy / reference) of the two answers, or of its means over their tokens."""
        beta, smoothing = self.settings.beta, self.settings.label_smoothing
        match self.settings.loss:
            case PreferenceLoss.sigmoid | PreferenceLoss.sigmoid_norm:
                return sigmoid_preference(chosen_R, rejected_R, beta, smoothing)
            case PreferenceLoss.robust:
                return robust_preference(chosen_R, rejected_R, beta, smoothing)
            case PreferenceLoss.exo_pair:
                return exo_preference(chosen_R, rejected_R, beta, smoothing)
            case loss:
                return PLAIN[loss](chosen_R, rejected_R, beta)
