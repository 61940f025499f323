"""What is measured of a pair of answers."""

from dataclasses import dataclass

import torch

from glmtuner.objectives.objective import RowMetrics


@dataclass(frozen=True)
class Halves:
    """Log-probabilities of the chosen and the rejected answers, and their numbers of tokens; each [R]."""

    chosen_R: torch.Tensor
    rejected_R: torch.Tensor
    chosen_tokens_R: torch.Tensor
    rejected_tokens_R: torch.Tensor

    @classmethod
    def of(cls, logprobs_R: torch.Tensor, tokens_R: torch.Tensor) -> "Halves":
        """Of a batch with the chosen answers in its first half, and the rejected ones in its second."""
        return cls(*logprobs_R.chunk(2), *tokens_R.chunk(2))

    @property
    def chosen_mean_R(self) -> torch.Tensor:
        """The mean log-probability of the chosen answers' tokens, [R]."""
        return self.chosen_R / self.chosen_tokens_R

    @property
    def rejected_mean_R(self) -> torch.Tensor:
        """That of the rejected answers' tokens, [R]."""
        return self.rejected_R / self.rejected_tokens_R


def pair_metrics(reward_chosen_R: torch.Tensor, reward_rejected_R: torch.Tensor, nll_R: torch.Tensor) -> RowMetrics:
    """Rewards, margin, accuracy, and the chosen answers' loss per token; each [R], without a gradient."""
    chosen_R, rejected_R = reward_chosen_R.detach(), reward_rejected_R.detach()
    return {
        "reward_chosen": chosen_R,
        "reward_rejected": rejected_R,
        "margin": chosen_R - rejected_R,
        "accuracy": (chosen_R > rejected_R).float(),
        "nll_chosen": nll_R.detach(),
    }
