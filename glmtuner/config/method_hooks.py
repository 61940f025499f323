"""What a training asks its fine-tuning method, and tells it of how far it is; by default a method does nothing then."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn


class MethodHooks:
    """The part of a fine-tuning method that follows a training."""

    @property
    def follows_steps(self) -> bool:
        """Whether `after_step` reads the whole gradients of every optimizer step."""
        return False

    def needs_values(self) -> str | None:
        """The setting for which `attach` computes with the base's weights, so that every rank must have them whole; None without one."""
        return None

    def initialize(
        self,
        model: "nn.Module",
        rows: Sequence[Mapping[str, Any]],
        collate: "Callable[[Any], dict[str, torch.Tensor]]",
        seed: int,
        checkpoint: "Path | None",
    ) -> None:
        """Give the attached parameters what they take from the training's rows, or their shapes from the checkpoint that goes on.

        `rows` have `input_ids`, and `labels` where they are learned. Called once on every rank, before anything reads the parameters.
        """

    def before_training(self, model: "nn.Module", steps: int) -> None:
        """Called once before the first step, after a checkpoint was restored, with the number of optimizer steps."""

    def after_step(self, model: "nn.Module", step: int) -> None:
        """Called after each optimizer step, counted from 1, while the parameters have its gradients."""

    def penalty(self, model: "nn.Module") -> "torch.Tensor | None":
        """What the method adds to the loss of an optimizer step, a scalar; None for nothing."""
        return None
