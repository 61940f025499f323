"""Before step 1: would this run learn anything at all? A run that cannot must not succeed with a loss of 0."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmtuner.errors import PreflightError

if TYPE_CHECKING:
    import torch
    from torch import nn


def check_first_batch(
    model: "nn.Module",
    batch: "dict[str, torch.Tensor]",
    autocast: Callable[[], Any] = contextlib.nullcontext,
    generate: Callable[[], Any] | None = None,
    loss_of: "Callable[[dict[str, Any]], torch.Tensor] | None" = None,
) -> float:
    """One forward and backward pass, and a few generated tokens; returns the loss and leaves no trace.

    The loss is the model's own, or `loss_of` the batch.

    Raises PreflightError when nothing is learned in the batch, when the loss is not finite, or when no trained parameter
    gets a gradient (CET#188, LLaMA-Factory#1147, trl#6668).
    """
    import torch

    device = next(model.parameters()).device
    if "labels" in batch and not bool((batch["labels"][:, 1:] != -100).any()):
        raise PreflightError(
            "the first batch has no token to learn: every label is masked; look at the dataset's columns and at "
            "data.max_target_length"
        )
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        with autocast():
            there = {name: values.to(device) if hasattr(values, "to") else values for name, values in batch.items()}
            loss = loss_of(there) if loss_of is not None else model(**there).loss
        if not bool(torch.isfinite(loss)):
            raise PreflightError(
                f"the loss of the first batch is {loss.item()}: the weights or the precision are unfit; try model.dtype=float32 "
                "or trainer.bf16=true, and look whether the checkpoint is whole"
            )
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        learns = any(parameter.grad is not None and bool(parameter.grad.ne(0).any()) for parameter in trained)
        for parameter in model.parameters():
            parameter.grad = None
        if not learns:
            raise PreflightError(
                "no trained parameter gets a gradient in the first batch, so the run would learn nothing; "
                "trainer.gradient_checkpointing_kwargs={use_reentrant: false} helps where checkpointing cuts the graph"
            )
        if generate is not None:
            with autocast():  # float32 weights may stand between half-precision ones
                generate()
    model.train(was_training)
    return float(loss.detach())
