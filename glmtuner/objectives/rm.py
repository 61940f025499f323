"""Reward model: it learns to score the chosen answer of a pair above the rejected one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glmtuner.models.value_head import FILE, load_head, new_head, save_head
from glmtuner.objectives.losses import pairwise_logistic
from glmtuner.objectives.objective import Objective, RowMetrics
from glmtuner.objectives.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardObjective(Objective):
    """Pairwise logistic loss of a value head on each answer's last token."""

    def __init__(self, model: "PreTrainedModel", head: Path | None) -> None:
        """`head` is the file of a trained head to continue with; None initializes a new one at random."""
        super().__init__(model)
        self.value_head = new_head(model, random_init=True)
        model.value_head = self.value_head  # trained with the model's parameters
        read = {*model.get_input_embeddings().parameters()}
        for parameter in model.get_output_embeddings().parameters():  # type: ignore[no-untyped-call]  # not annotated there
            if parameter not in read:
                parameter.requires_grad_(False)  # a reward is not computed from logits
        if head is not None:
            load_head(self.value_head, head)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, RowMetrics]:
        """The loss of each pair, [R]; the batch holds the chosen answers, then the rejected ones, [2 R]."""
        chosen_R, rejected_R = self.scores(batch, model).chunk(2)
        margin_R = (chosen_R - rejected_R).detach()
        return pairwise_logistic(chosen_R, rejected_R), {"accuracy": (margin_R > 0).float(), "margin": margin_R}

    def scores(self, batch: dict[str, Any], model: nn.Module | None = None) -> torch.Tensor:
        """The reward of each row, [R]; `model` is the wrapped model, if there is one."""
        scores_R: torch.Tensor = self.value_head(Rows.of(self.model, batch).last_states(model))
        return scores_R

    def save(self, folder: Path) -> None:
        """Write the value head."""
        save_head(self.value_head, folder)

    def restore(self, folder: Path) -> None:
        """Load the value head."""
        load_head(self.value_head, folder / FILE)
