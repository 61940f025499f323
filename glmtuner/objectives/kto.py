"""Kahneman-Tversky optimization."""

from typing import Any

import torch
from torch import nn

from glmtuner.distributed import ranks
from glmtuner.objectives.losses import kto_loss
from glmtuner.objectives.objective import AgainstReference, Measured


class KtoObjective(AgainstReference):
    """The value of single answers under prospect theory."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Measured]:
        """The KL that answers are measured from is the batch's own, estimated on answers that belong to other prompts."""
        own, crossed = (
            {name: batch[name].chunk(2)[half] for name in ("input_ids", "attention_mask", "labels")} for half in (0, 1)
        )
        with self.reference.on(self.model):
            reference_R = self.answer_logprobs(self.model, own)
            reference_crossed_R = self.answer_logprobs(self.model, crossed)
        with torch.no_grad():
            kl = ranks.all_reduce_mean((self.answer_logprobs(self.model, crossed) - reference_crossed_R).mean()).clamp(
                min=0
            )
        ratio_R = self.answer_logprobs(model, own) - reference_R
        good_R, settings = batch["is_desirable"], self.settings
        loss_R = kto_loss(ratio_R, good_R, kl, settings.beta, settings.desirable_weight, settings.undesirable_weight)
        reward_R = (settings.beta * ratio_R).detach()
        return loss_R, {
            "reward_desirable": reward_R.where(good_R, torch.nan),
            "reward_undesirable": reward_R.where(~good_R, torch.nan),
            "kl": kl.expand(len(good_R)),
        }
