"""Which of the faster ways to compute a step give this model the loss of the plain one.

A way is taken only where it was seen to do so on a few samples: what a model's code does besides is not known here, such as
a scale on the logits, a loss on its router, or attention of its own.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.models.unwrap import unwrapped
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import nn

LOOKED_AT = 50  # rows, in search for short ones
LEARNED = 64  # tokens of a sample's answer, half as many of the second one's, so that it has padding
Collate = Callable[[Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Optimizations:
    """The collator to use, and whether the model's loss is computed in chunks and its LoRA layers in one operation each.

    `refused` says of each way that was tried and left out why.
    """

    collate: Collate
    chunks_loss: bool = False
    fuses_lora: bool = False
    refused: tuple[str, ...] = ()


def choose_optimizations(
    model: "nn.Module",
    rows: Sequence[Any],
    padded: Collate,
    *,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    without_padding: bool = True,
    on_weights: bool = True,
    own_loss: bool = True,
) -> Optimizations:
    """Prepares the model for what is taken, given a few samples and the plain collator.

    `without_padding` says whether batches of segments may be tried, `on_weights` whether what uses weights outside of their
    own layer's forward pass may, and `own_loss` whether the loss in chunks, one of these, may take the place of the model's.
    """
    from glmtuner.data.segments import SegmentCollator
    from glmtuner.kernels.chunked_loss import disable_chunked_loss, enable_chunked_loss, supports_chunked_loss
    from glmtuner.kernels.fused_lora import fuse_lora, unfuse_lora
    from glmtuner.kernels.segment_attention import (
        disable_segment_attention,
        enable_segment_attention,
        position_function,
        supports_segment_attention,
    )

    base = unwrapped(model)
    collate, chunks, fuses = padded, False, False
    refused: list[str] = []

    def keeps(what: str, wanted: float, collate: Collate) -> bool:
        try:
            found = loss_of(model, collate(rows), autocast)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            refused.append(f"{what}: the model's code has no room for it ({told[:200]})")
            return False
        if is_same(model, wanted, found, autocast):
            return True
        refused.append(f"{what}: the loss of two samples would be {found:.6g} and is {wanted:.6g}")
        return False

    with evaluating(model):
        wanted = loss_of(model, padded(rows), autocast) if without_padding or on_weights else 0.0
        if without_padding and supports_segment_attention(base):
            enable_segment_attention(base)
            candidate = SegmentCollator(places=position_function(base))
            if keeps("batches without padding", wanted, candidate):
                collate = candidate
            else:
                disable_segment_attention(base)
        if on_weights and own_loss and supports_chunked_loss(base):
            enable_chunked_loss(base)
            chunks = keeps("the loss in chunks", wanted, collate)
            if not chunks:
                disable_chunked_loss(base)
        if on_weights and fuse_lora(model):
            fuses = keeps("LoRA layers in one operation", wanted, collate)
            if not fuses:
                unfuse_lora(model)
    return Optimizations(collate, chunks, fuses, tuple(refused))


def short_samples(rows: Sequence[Any], count: int = 2) -> list[Any]:
    """The shortest beginnings of some of the first rows that hold learned tokens, of different lengths.

    Short, since the plain way to compute their loss makes logits of all their tokens, which of whole rows might not fit.
    """
    cut = []
    for place in range(min(len(rows), LOOKED_AT)):
        row = rows[place]
        ids, labels = row["input_ids"], row["labels"]
        first = next((at for at, label in enumerate(labels) if label != IGNORE_INDEX), None)
        if first is not None:
            cut.append((first, place, ids, labels))
    shortest = sorted(cut)[:count]
    ends = [first + LEARNED // (1 + rank) for rank, (first, *_) in enumerate(shortest)]
    return [
        {"input_ids": ids[:end], "labels": labels[:end]}
        for end, (_, _, ids, labels) in zip(ends, shortest, strict=True)
    ]


def apply_liger(
    model: "nn.Module",
    chosen: Mapping[str, bool],
    rows: Sequence[Any],
    collate: Collate,
    autocast: Callable[[], Any] = contextlib.nullcontext,
) -> None:
    """Put Liger's kernels into the model; raises ConfigError where the loss of the samples is then another one.

    Without samples, as for objectives that are not the model's own loss, nothing is compared.
    """
    from glmtuner.kernels.liger import enable_liger

    asked = "trainer.use_liger_kernel=true"
    with evaluating(model):
        wanted = loss_of(model, collate(rows), autocast) if rows else 0.0
        try:
            enable_liger(unwrapped(model), chosen)
            found = loss_of(model, collate(rows), autocast) if rows else 0.0
        except Exception as error:  # a compiler's, a driver's
            told = " ".join(str(error).split())
            raise ConfigError(f"{asked}: {type(error).__name__}: {told[:300]}; leave it out") from error
    if not is_same(model, wanted, found, autocast):
        raise ConfigError(
            f"{asked}: the loss of two samples is {found:.6g} with Liger's kernels and {wanted:.6g} without; leave it out"
        )


@contextlib.contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Without dropout, for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def loss_of(model: "nn.Module", batch: Mapping[str, Any], autocast: Callable[[], Any]) -> float:
    """The model's loss of a batch, as the trainer would compute it."""
    import torch

    device = next(model.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad(), autocast():
        return float(model(**moved).loss)


def is_same(model: "nn.Module", wanted: float, found: float, autocast: Callable[[], Any]) -> bool:
    """Whether two ways to compute a loss differ by no more than the rounding of what they are computed in."""
    import torch

    with autocast():
        half = torch.is_autocast_enabled(next(model.parameters()).device.type)
    exact = unwrapped(model).dtype == torch.float32 and not half
    return abs(found - wanted) <= (1e-4 if exact else 2e-2) * max(abs(wanted), 1.0)
