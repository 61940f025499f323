"""Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7) of next-token prediction."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import LabelSmoother


@dataclass(frozen=True)
class SmoothedLoss:
    """transformers' label smoothing with shifted labels, for every model; a `compute_loss_func` of transformers' Trainer.

    The Trainer itself shifts the labels of those models only whose class it finds in its table of causal language models
    (transformers#27161), which lacks ChatGLM and models of plugins.
    """

    factor: float

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """(1 - factor) times the cross-entropy plus `factor` times that with the uniform distribution, in nats per labelled token.

        The logits at position t are for the label at t + 1. Computed in float32; `num_items_in_batch` is the number of labelled
        tokens to divide by, if it is not that of the batch.
        """
        loss: torch.Tensor = LabelSmoother(epsilon=self.factor)(
            {"logits": outputs.logits.float()}, labels, shift_labels=True, num_items_in_batch=num_items_in_batch
        )
        return loss
