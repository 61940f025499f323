"""Odds ratio preference optimization."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from glmtuner.objectives.objective import AnswerObjective, RowMetrics
from glmtuner.objectives.pairs import Halves, pair_metrics
from glmtuner.objectives.preference_losses import odds_ratio_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OrpoSettings(Protocol):
    """The keys of stage=orpo that are read here."""

    beta: float


class OrpoObjective(AnswerObjective):
    """The better answer's loss per token, and `beta` times the odds ratio loss; there is no reference."""

    def __init__(self, model: "PreTrainedModel", settings: OrpoSettings) -> None:
        super().__init__(model)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair (arXiv:2403.07691, eq. 6), [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        pairs = Halves.of(self.answer_logprobs(model, batch), self.answer_tokens(batch))
        odds_R, log_odds_R = odds_ratio_loss(pairs.chosen_mean_R, pairs.rejected_mean_R)
        beta, nll_R = self.settings.beta, -pairs.chosen_mean_R
        metrics = pair_metrics(beta * pairs.chosen_mean_R, beta * pairs.rejected_mean_R, nll_R)
        return nll_R + beta * odds_R, {**metrics, "log_odds": log_odds_R.detach()}
