"""Chooses the optimizations that keep a model's loss.

Each is enabled only after it gave the loss of the unoptimized model on a few samples: what else a model's code computes is
not known here, such as a scale on the logits, an auxiliary loss of its router, or its own attention.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.models.unwrap import unwrapped
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import nn

SEARCHED_ROWS = 50  # rows among which the shortest are taken as samples
ANSWER_TOKENS = 64  # of the first sample's answer; the second has half as many, so that its row is padded
Collate = Callable[[Sequence[Any]], dict[str, Any]]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Optimizations:
    """The collator to use, whether the model's loss is computed in chunks, and whether its LoRA layers are fused.

    `refused` has a line for each optimization that was tried and disabled again: its name and the reason.
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
    autocast: Autocast = contextlib.nullcontext,
    without_padding: bool = True,
    on_weights: bool = True,
    own_loss: bool = True,
) -> Optimizations:
    """Enable in the model the optimizations that keep the loss of the samples `rows`; returns which these are.

    `padded` is the ordinary collator. `without_padding` allows batches of segments, `on_weights` optimizations that use
    weights outside their own layer's forward pass, and `own_loss` one of these, the loss in chunks, in place of the model's.
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
    collate, chunks_loss, fuses_lora = padded, False, False
    refused: list[str] = []

    def keeps_loss(name: str, expected: float, collate: Collate) -> bool:
        try:
            loss = loss_of(model, collate(rows), autocast)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            refused.append(f"{name}: the model's code does not support it ({reason[:200]})")
            return False
        if is_same_loss(model, expected, loss, autocast):
            return True
        refused.append(f"{name}: the loss of two samples would be {loss:.6g} instead of {expected:.6g}")
        return False

    with evaluating(model):
        expected = loss_of(model, padded(rows), autocast) if without_padding or on_weights else 0.0
        if without_padding and supports_segment_attention(base):
            enable_segment_attention(base)
            segmented = SegmentCollator(positions_of=position_function(base))
            if keeps_loss("batches without padding", expected, segmented):
                collate = segmented
            else:
                disable_segment_attention(base)
        if on_weights and own_loss and supports_chunked_loss(base):
            enable_chunked_loss(base)
            chunks_loss = keeps_loss("the loss in chunks", expected, collate)
            if not chunks_loss:
                disable_chunked_loss(base)
        if on_weights and fuse_lora(model):
            fuses_lora = keeps_loss("fused LoRA layers", expected, collate)
            if not fuses_lora:
                unfuse_lora(model)
    return Optimizations(collate, chunks_loss, fuses_lora, tuple(refused))


def short_samples(rows: Sequence[Any], count: int = 2) -> list[Any]:
    """The `count` shortest beginnings of the first rows that have labelled tokens, of different lengths.

    They are short because the unoptimized model computes logits of all their tokens, for which whole rows may be too long.
    """
    candidates = []
    for index in range(min(len(rows), SEARCHED_ROWS)):
        row = rows[index]
        ids, labels = row["input_ids"], row["labels"]
        first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), None)
        if first is not None:
            candidates.append((first, index, ids, labels))
    shortest = sorted(candidates)[:count]
    ends = [first + ANSWER_TOKENS // (1 + rank) for rank, (first, *_) in enumerate(shortest)]
    return [
        {"input_ids": ids[:end], "labels": labels[:end]}
        for end, (_, _, ids, labels) in zip(ends, shortest, strict=True)
    ]


def apply_liger(
    model: "nn.Module",
    chosen: Mapping[str, bool],
    rows: Sequence[Any],
    collate: Collate,
    autocast: Autocast = contextlib.nullcontext,
) -> None:
    """Put Liger's kernels into the model; raises ConfigError if they fail or change the loss of the samples `rows`.

    Without samples, as for objectives other than the model's own loss, nothing is compared.
    """
    from glmtuner.kernels.liger import enable_liger

    knob = "trainer.use_liger_kernel=true"
    with evaluating(model):
        expected = loss_of(model, collate(rows), autocast) if rows else 0.0
        try:
            enable_liger(unwrapped(model), chosen)
            loss = loss_of(model, collate(rows), autocast) if rows else 0.0
        except Exception as error:  # from a compiler or a driver, too
            reason = " ".join(str(error).split())
            raise ConfigError(f"{knob}: {type(error).__name__}: {reason[:300]}; leave it out") from error
    if not is_same_loss(model, expected, loss, autocast):
        raise ConfigError(
            f"{knob}: the loss of two samples is {loss:.6g} with Liger's kernels and {expected:.6g} without; leave it out"
        )


@contextlib.contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """The model in evaluation mode, without dropout, within this context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def loss_of(model: "nn.Module", batch: Mapping[str, Any], autocast: Autocast) -> float:
    """The model's loss of a batch, in nats per labelled token, as the trainer computes it."""
    import torch

    device = next(model.parameters()).device
    on_device = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad(), autocast():
        return float(model(**on_device).loss)


def is_same_loss(model: "nn.Module", expected: float, loss: float, autocast: Autocast) -> bool:
    """Whether two losses differ by no more than the rounding of the dtype that the model computes in."""
    import torch

    with autocast():
        half = torch.is_autocast_enabled(next(model.parameters()).device.type)
    exact = unwrapped(model).dtype == torch.float32 and not half
    return abs(loss - expected) <= (1e-4 if exact else 2e-2) * max(abs(expected), 1.0)
