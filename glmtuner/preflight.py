"""Before step 1: would this run learn anything at all, and which fast paths give the loss of the plain one?

A run that cannot learn must not succeed with a loss of 0.
"""

import contextlib
from collections.abc import Callable, Sequence
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
            generate()
    model.train(was_training)
    return float(loss.detach())


def fast_paths(
    model: "nn.Module",
    rows: Sequence[Any],
    padded: Callable[[Sequence[Any]], "dict[str, Any]"],
    *,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    without_padding: bool = True,
    chunks_loss: bool = True,
) -> "tuple[Callable[[Sequence[Any]], dict[str, Any]], bool]":
    """The collator to use, and whether the model's loss is computed in chunks from now on.

    `rows` are a few samples, `padded` is the plain collator, and the two flags say what may be tried. A path is taken only
    where the samples' loss is that of padded rows under the model's own loss: what a model's code does besides is not known
    here (a scale on the logits, a loss on its router, attention of its own).
    """
    import torch

    from glmtuner.data.segments import SegmentCollator
    from glmtuner.models.head import can_chunk, forget_chunks, use_chunks
    from glmtuner.models.segments import can_segment, forget_segments, places_of, use_segments

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps it
    was_training = model.training
    model.eval()

    def loss_of(collate: Callable[[Sequence[Any]], dict[str, Any]]) -> float:
        device = next(model.parameters()).device
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(rows).items()
        }
        with torch.no_grad(), autocast():
            return float(model(**batch).loss)

    def gives(wanted: float, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> bool:
        try:
            found = loss_of(collate)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # the model's code has no room for it
        exact = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled()
        return abs(found - wanted) <= (1e-4 if exact else 2e-2) * max(abs(wanted), 1.0)

    try:
        collate, chunked = padded, False
        if not (without_padding or chunks_loss):
            return collate, chunked
        wanted = loss_of(padded)
        if without_padding and can_segment(base):
            use_segments(base)
            candidate = SegmentCollator(places=places_of(base))
            if gives(wanted, candidate):
                collate = candidate
            else:
                forget_segments(base)
        if chunks_loss and can_chunk(base):
            use_chunks(base)
            chunked = gives(wanted, collate)
            if not chunked:
                forget_chunks(base)
        return collate, chunked
    finally:
        model.train(was_training)
