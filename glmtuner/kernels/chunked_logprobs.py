"""Log-probabilities of labelled tokens only, in chunks, with a gradient for each: the logits of a batch are never in memory.

Losses of preferences and of policies combine the log-probabilities of tokens in ways of their own, so that their gradients are known
in the backward pass only. The gradient of a log-probability by its hidden state is known before, and takes no more memory than the
state: where the head is frozen, as with LoRA, nothing is computed twice, also where rows of new tokens are trained beside it.
Otherwise the backward pass computes the logits again.

Shape letters: B rows, T tokens, N labelled tokens, H hidden size, V vocabulary, K trained rows of a frozen head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtuner.kernels.output_head import gradient_of_hidden, head_of, logits_of
from glmtuner.templates.base import IGNORE_INDEX

CHUNK_BYTES = 2**28  # of a chunk's float32 logits on a GPU: every chunk reads the whole head, a gigabyte, twice
CHUNK_BYTES_CPU = 2**23  # small enough for the processor's cache


def chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """The chunks of `count` tokens whose logits are in memory at a time."""
    chunk_bytes = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES
    tokens = max(chunk_bytes // (4 * vocabulary), 64)
    for start in range(0, count, tokens):
        yield slice(start, start + tokens)


class _ChunkedLogprobs(torch.autograd.Function):
    """Each target's log-probability, [N], and the entropy of its distribution, [N], without a gradient; both float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        rows_KH: torch.Tensor | None,
        ids_K: torch.Tensor | None,
        targets_N: torch.Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, *needs_head, needs_rows = ctx.needs_input_grad[:4]
        # the gradient of each log-probability by its hidden state, and by the logits of the trained rows
        slope_NH = torch.empty_like(hidden_NH) if needs_hidden and not any(needs_head) else None
        slope_NK = hidden_NH.new_empty(len(targets_N), len(rows_KH)) if needs_rows and rows_KH is not None else None
        logprob_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        entropy_N = torch.zeros_like(logprob_N)
        dtype = hidden_NH.dtype
        for chunk in chunks(len(targets_N), weight_VH.shape[0], hidden_NH.device):
            logits = logits_of(hidden_NH[chunk], weight_VH, bias_V, rows_KH, ids_K)
            dtype = logits.dtype
            log_probs = _tempered(logits, temperature).log_softmax(-1, dtype=torch.float32)
            targets = targets_N[chunk, None]
            logprob_N[chunk] = log_probs.gather(1, targets)[:, 0]
            if entropy:
                entropy_N[chunk] = -(log_probs.exp() * log_probs).sum(-1)
            if slope_NH is None and slope_NK is None:
                continue
            logits_grad = _logits_grad(log_probs, targets, temperature).to(dtype)
            if slope_NK is not None:
                slope_NK[chunk] = logits_grad[:, ids_K]
            if slope_NH is not None:
                slope_NH[chunk] = gradient_of_hidden(logits_grad, weight_VH, rows_KH, ids_K)
        ctx.mark_non_differentiable(entropy_N)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.by_slopes = not any(needs_head)
        if ctx.by_slopes:
            ctx.save_for_backward(slope_NH, slope_NK, hidden_NH if slope_NK is not None else None)
        else:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.by_slopes:
            slope_NH, slope_NK, hidden_NH = ctx.saved_tensors
            by_hidden, by_rows = (
                None if slope is None else (grad_N[:, None] * slope).to(slope.dtype) for slope in (slope_NH, slope_NK)
            )
            return by_hidden, None, None, None if by_rows is None else by_rows.t() @ hidden_NH, *[None] * 4
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden_NH) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VH) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V) if bias_V is not None and needs_bias else None
        hidden, weight = hidden_NH.to(ctx.dtype), weight_VH.to(ctx.dtype)  # autocast does not reach a backward pass
        bias = None if bias_V is None else bias_V.to(ctx.dtype)
        for chunk in chunks(len(targets_N), weight_VH.shape[0], hidden_NH.device):
            logits = _tempered(F.linear(hidden[chunk], weight, bias), ctx.temperature)
            log_probs = logits.log_softmax(-1, dtype=torch.float32)
            logits_grad = _logits_grad(log_probs, targets_N[chunk, None], ctx.temperature)
            logits_grad = logits_grad.mul_(grad_N[chunk, None]).to(ctx.dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ weight
            if weight_grad is not None:
                weight_grad += logits_grad.t() @ hidden[chunk]
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
        return hidden_grad, weight_grad, bias_grad, *[None] * 5


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits.float() / temperature


def _logits_grad(log_probs: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """The gradient of the targets' log-probabilities by the logits, [n, V]; overwrites `log_probs`."""
    grad = log_probs.exp_().neg_()
    grad.scatter_add_(1, targets, grad.new_ones(targets.shape))
    return grad if temperature == 1 else grad.div_(temperature)


def chunked_logprobs(
    hidden_NH: torch.Tensor,
    head: nn.Module,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's log-probability in nats, [N], with a gradient, and its distribution's entropy, [N], 0 unless asked for.

    Both are float32. `hidden_NH` are the last hidden states of the tokens before the targets, logits are divided by `temperature`.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _ChunkedLogprobs.apply(
        hidden_NH, *head_of(head), targets_N, temperature, entropy
    )
    return found


def label_logprobs_in_chunks(
    hidden_BTH: torch.Tensor, head: nn.Module, labels_BT: torch.Tensor, temperature: float, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of every label and the entropy it was drawn with, each at the label's position, [B, T], 0 elsewhere.

    `labels_BT` are not shifted: the hidden state at t predicts the label at t + 1, and IGNORE_INDEX marks unlabelled tokens.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    is_labelled_BT = targets_BT != IGNORE_INDEX
    each = chunked_logprobs(
        hidden_BTH[is_labelled_BT], head, targets_BT[is_labelled_BT], temperature=temperature, entropy=entropy
    )
    at_label_BT = F.pad(is_labelled_BT[:, :-1], (1, 0))
    logprobs_BT, entropy_BT = (
        values_N.new_zeros(labels_BT.shape).masked_scatter(at_label_BT, values_N) for values_N in each
    )
    return logprobs_BT, entropy_BT
