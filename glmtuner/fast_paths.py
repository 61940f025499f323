"""Which of the faster ways to compute a step give this model the loss of the plain one.

A way is taken only where it was seen to do so on a few samples: what a model's code does besides is not known here, such as
a scale on the logits, a loss on its router, or attention of its own.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Collate = Callable[[Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Taken:
    """The collator to use, and whether the model's loss is computed in chunks and its LoRA layers in one operation each."""

    collate: Collate
    chunks_loss: bool = False
    fuses_lora: bool = False


def fast_paths(
    model: "nn.Module",
    rows: Sequence[Any],
    padded: Collate,
    *,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    without_padding: bool = True,
    on_weights: bool = True,
) -> Taken:
    """Prepares the model for what is taken, given a few samples and the plain collator.

    `without_padding` says whether batches of segments may be tried, `on_weights` whether what uses weights outside of their
    own layer's forward pass may.
    """
    import torch

    from glmtuner.data.segments import SegmentCollator
    from glmtuner.models.head import can_chunk, forget_chunks, use_chunks
    from glmtuner.models.lora import fuse_lora, unfuse_lora
    from glmtuner.models.segments import can_segment, forget_segments, places_of, use_segments

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps it
    device, was_training = next(model.parameters()).device, model.training

    def loss_of(collate: Collate) -> float:
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in collate(rows).items()
        }
        with torch.no_grad(), autocast():
            return float(model(**batch).loss)

    def keeps(wanted: float, collate: Collate) -> bool:
        try:
            found = loss_of(collate)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # the model's code has no room for it
        with autocast():
            exact = base.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
        return abs(found - wanted) <= (1e-4 if exact else 2e-2) * max(abs(wanted), 1.0)

    collate, chunks, fuses = padded, False, False
    model.eval()
    try:
        wanted = loss_of(padded) if without_padding or on_weights else 0.0
        if without_padding and can_segment(base):
            use_segments(base)
            candidate = SegmentCollator(places=places_of(base))
            if keeps(wanted, candidate):
                collate = candidate
            else:
                forget_segments(base)
        if on_weights and can_chunk(base):
            use_chunks(base)
            chunks = keeps(wanted, collate)
            if not chunks:
                forget_chunks(base)
        if on_weights and fuse_lora(model):
            fuses = keeps(wanted, collate)
            if not fuses:
                unfuse_lora(model)
    finally:
        model.train(was_training)
    return Taken(collate, chunks, fuses)
