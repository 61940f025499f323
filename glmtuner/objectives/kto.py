"""Kahneman-Tversky optimization."""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from glmtuner.distributed import ranks
from glmtuner.objectives.losses import kto_loss
from glmtuner.objectives.objective import ReferenceObjective, RowMetrics, counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KtoSettings(Protocol):
    """The keys of stage=kto that are read here."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    precompute_reference: bool


class KtoObjective(ReferenceObjective):
    """The value of single answers under prospect theory."""

    reads_counted: ClassVar[bool] = True

    def __init__(self, model: "PreTrainedModel", settings: KtoSettings) -> None:
        super().__init__(model, settings.precompute_reference)
        self.settings = settings

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each answer, [R]; the batch holds the answers, then mismatched ones to the same prompts, [2 R].

        The reference point is the KL of the whole batch, estimated on the mismatched answers.
        """
        matched, mismatched = (
            {name: batch[name].chunk(2)[half] for name in ("input_ids", "attention_mask", "labels")} for half in (0, 1)
        )
        reference_R, reference_mismatched_R = self.reference_logprobs(batch).chunk(2)
        with torch.no_grad():
            log_ratio_R = self.answer_logprobs(self.model, mismatched) - reference_mismatched_R
            is_counted_R = counted(batch, len(log_ratio_R), log_ratio_R.device)
            sums = torch.stack([(log_ratio_R * is_counted_R).sum(), is_counted_R.sum()])  # of all ranks
            total, count = ranks.all_reduce_mean(sums)
            kl = (total / count.clamp(min=1e-9)).clamp(min=0)  # of a whole batch it may be that no row counts
        ratio_R = self.answer_logprobs(model, matched) - reference_R
        is_desirable_R, settings = batch["is_desirable"], self.settings
        loss_R = kto_loss(
            ratio_R, is_desirable_R, kl, settings.beta, settings.desirable_weight, settings.undesirable_weight
        )
        reward_R = (settings.beta * ratio_R).detach()
        return loss_R, {
            "reward_desirable": reward_R.where(is_desirable_R, torch.nan),
            "reward_undesirable": reward_R.where(~is_desirable_R, torch.nan),
            "kl": kl.expand(len(is_desirable_R)),
        }
