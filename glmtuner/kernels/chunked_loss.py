"""The cross-entropy of learned tokens alone, a chunk at a time: the logits of a whole batch are never in memory.

Of a vocabulary of 130,000 to 151,000 tokens they are often the largest thing in a training run (Wijmans et al. 2024,
arXiv:2411.09009). Tokens without a label, those of prompts, cost nothing here.

Shape letters: N learned tokens, H hidden size, V vocabulary.
"""

import functools
import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmtuner.templates.base import IGNORE_INDEX

CHUNK_BYTES = 2**28  # of a chunk's float32 logits on a GPU: every chunk reads the whole head, a gigabyte, twice
CHUNK_BYTES_CPU = 2**23  # few enough to stay in the processor's cache


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss of each token, [N], and their sum; gradients are worked out on the way, since the sum's are all that is asked."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden_NH) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VH) if wants_weight else None
        bias_grad = torch.zeros_like(bias_V) if bias_V is not None and wants_bias else None
        loss_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        held = CHUNK_BYTES_CPU if hidden_NH.device.type == "cpu" else CHUNK_BYTES
        size = max(held // (4 * weight_VH.shape[0]), 64)
        for start in range(0, len(targets_N), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden_NH[chunk], weight_VH, bias_V)
            scores, dtype = logits.log_softmax(-1, dtype=torch.float32), logits.dtype
            targets = targets_N[chunk, None]
            loss_N[chunk] = -scores.gather(1, targets)[:, 0]
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            slope = scores.exp_()  # the softmax, less 1 at the target
            slope.scatter_add_(1, targets, slope.new_full(targets.shape, -1.0))
            slope = slope.to(dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = slope @ weight_VH.to(dtype)
            if weight_grad is not None:
                weight_grad += slope.t() @ hidden_NH[chunk].to(dtype)
            if bias_grad is not None:
                bias_grad += slope.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (*(grad if grad is None else grad * slope for grad in ctx.saved_tensors), None)


def chunked_cross_entropy(
    hidden_NH: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses in nats, and each, [N], float32; the sum alone has a gradient."""
    return _ChunkedCrossEntropy.apply(hidden_NH, head.weight, head.bias, targets_N)


def cross_entropy(
    hidden_BTH: torch.Tensor, head: nn.Linear, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the learned tokens' losses in nats, float32, and each one's where its label stands, [B, T] (0 elsewhere)."""
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    is_learned_BT = targets_BT != IGNORE_INDEX
    total, loss_N = chunked_cross_entropy(hidden_BTH[is_learned_BT], head, targets_BT[is_learned_BT])
    losses_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
    losses_BT[:, 1:] = losses_BT[:, 1:].masked_scatter(is_learned_BT[:, :-1], loss_N)
    return total, losses_BT


def supports_chunked_loss(model: nn.Module) -> bool:
    """Whether the model is a decoder under one plain linear head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return type(head) is nn.Linear and model.base_model is not model


def enable_chunked_loss(model: nn.Module) -> None:
    """Let the model compute the loss of labels by `cross_entropy`; it then gives no logits beside the loss.

    With `each=True` the loss is that of each token, [B, T], without a gradient.
    """
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return type(self).forward(self, *args, **options)
        count, each = options.pop("num_items_in_batch", None), options.pop("each", False)
        hidden = self.base_model(*args, **{"use_cache": False, **options}).last_hidden_state
        total, losses = cross_entropy(hidden, self.get_output_embeddings(), labels)
        if each:
            return CausalLMOutputWithPast(loss=losses)
        return CausalLMOutputWithPast(loss=total / (labels[:, 1:].ne(IGNORE_INDEX).sum() if count is None else count))

    model.forward = types.MethodType(forward, model)


def disable_chunked_loss(model: nn.Module) -> None:
    """Undo `use_chunks`."""
    model.__dict__.pop("forward", None)
