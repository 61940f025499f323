"""The check before step 1 that the run can learn: a run that learns nothing must fail, not end with a loss of 0."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import accelerator
from glmtuner.errors import PreflightError
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from torch import nn


def check_first_batch(
    model: "nn.Module",
    batch: "dict[str, torch.Tensor]",
    autocast: Callable[[], Any] = contextlib.nullcontext,
    generate: Callable[[], Any] | None = None,
    loss_of: "Callable[[dict[str, Any]], torch.Tensor] | None" = None,
    anywhere: Callable[[bool], bool] = bool,
) -> float:
    """The loss of one forward and backward pass; `generate` is called too, and model and random state stay as they were.

    The loss is `loss_of` the batch, or without it the model's own. Where ranks share a row, `anywhere` says of what holds on this rank
    whether it holds on one of them.

    Raises PreflightError if all labels of the batch are masked, if the loss is not finite, or if no trainable parameter
    gets a gradient (CET#188, LLaMA-Factory#1147, trl#6668).
    """
    import torch

    device = next(model.parameters()).device
    if "labels" in batch and not anywhere(bool((batch["labels"][:, 1:] != IGNORE_INDEX).any())):
        raise PreflightError(
            "the first batch has no token to learn: every label is masked; check the dataset's columns and "
            "data.max_target_length"
        )
    was_training = model.training
    with accelerator.fork_rng(device):
        model.train()
        with autocast():
            inputs = {name: values.to(device) if hasattr(values, "to") else values for name, values in batch.items()}
            loss = loss_of(inputs) if loss_of is not None else model(**inputs).loss
        if not bool(torch.isfinite(loss)):
            raise PreflightError(
                f"the loss of the first batch is {loss.item()}: the weights are damaged, or the precision is too low; try "
                "model.dtype=float32 or trainer.bf16=true, and check that the checkpoint is complete"
            )
        loss.backward()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        has_gradient = any(parameter.grad is not None and bool(parameter.grad.ne(0).any()) for parameter in trainable)
        for parameter in model.parameters():
            parameter.grad = None
        if not anywhere(has_gradient):
            raise PreflightError(
                "no trained parameter gets a gradient in the first batch, so the run would learn nothing; "
                "trainer.gradient_checkpointing_kwargs={use_reentrant: false} helps if checkpointing cuts the graph"
            )
        if generate is not None:
            with autocast():  # a model may mix float32 and half-precision weights
                generate()
    model.train(was_training)
    return float(loss.detach())
