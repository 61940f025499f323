"""Reward model: the better answer of a pair is to score higher."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmtuner.models.value_head import FILE, last_token_scores, load_head, new_head, save_head
from glmtuner.objectives.losses import pairwise_logistic
from glmtuner.objectives.objective import Measured, Objective


class RewardObjective(Objective):
    """Pairwise logistic loss on a head at an answer's last token."""

    def __init__(self, model: Any, head: Path | None) -> None:
        """`head` is the file of the head to go on with; a new one is drawn without."""
        super().__init__(model)
        model.value_head = new_head(model, drawn=True)
        words = model.get_output_embeddings().weight
        if words is not model.get_input_embeddings().weight:
            words.requires_grad_(False)  # nothing of a reward goes through them
        if head is not None:
            load_head(model.value_head, head)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Measured]:
        chosen_R, rejected_R = self.scores(batch, model).chunk(2)
        margin_R = (chosen_R - rejected_R).detach()
        return pairwise_logistic(chosen_R, rejected_R), {"accuracy": (margin_R > 0).float(), "margin": margin_R}

    def scores(self, batch: dict[str, Any], model: nn.Module | None = None) -> torch.Tensor:
        """The reward of each row, [R]; of a batch of pairs the better answers' first."""
        return last_token_scores(self.model, self.model.value_head, batch["input_ids"], batch["attention_mask"], model)

    def save(self, folder: Path) -> None:
        save_head(self.model.value_head, folder)

    def restore(self, folder: Path) -> None:
        load_head(self.model.value_head, folder / FILE)
