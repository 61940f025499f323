"""Cross-entropy of labelled tokens only, in chunks: the logits of a whole batch are never in memory.

With a vocabulary of 130,000 to 151,000 tokens they are often the largest tensor of a training run (Wijmans et al. 2024,
arXiv:2411.09009). For tokens without a label, those of prompts, no logits are computed.

Shape letters: B rows, T tokens, N labelled tokens, H hidden size, V vocabulary, K trained rows of a frozen head.
"""

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from glmtuner.kernels.chunked_logprobs import chunks, label_logprobs_in_chunks
from glmtuner.kernels.output_head import OutputHead, gradient_of_hidden, head_of, logits_of
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class TokenLogprobs(ModelOutput):
    """What a model returns for labels of which the log-probabilities are asked: each at its label's place, [B, T], float32."""

    logprobs: torch.Tensor | None = None  # with a gradient; 0 where there is no label
    entropies: torch.Tensor | None = None  # of the distributions that predict the labels, without one


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses, each with its weight, and each cross-entropy without it, [N].

    Gradients of the sum are computed in the forward pass, the only ones needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        rows_KH: torch.Tensor | None,
        ids_K: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor | None,
        smoothing: float,
        by_probability: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias, needs_rows = ctx.needs_input_grad[:4]
        hidden_grad = torch.empty_like(hidden_NH) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VH) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V) if bias_V is not None and needs_bias else None
        rows_grad = torch.zeros_like(rows_KH) if rows_KH is not None and needs_rows else None
        loss_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        if by_probability:
            weights_N = torch.ones_like(loss_N) if weights_N is None else weights_N.clone()
        smoothed_N = torch.empty_like(loss_N) if smoothing else loss_N
        for chunk in chunks(len(targets_N), weight_VH.shape[0], hidden_NH.device):
            logits = logits_of(hidden_NH[chunk], weight_VH, bias_V, rows_KH, ids_K)
            log_probs, dtype = logits.log_softmax(-1, dtype=torch.float32), logits.dtype
            targets = targets_N[chunk, None]
            loss_N[chunk] = -log_probs.gather(1, targets)[:, 0]
            if smoothing:
                smoothed_N[chunk] = (1 - smoothing) * loss_N[chunk] - smoothing * log_probs.mean(-1)
            if by_probability and weights_N is not None:
                weights_N[chunk] *= torch.exp(-loss_N[chunk])
            if not any(ctx.needs_input_grad[:4]):
                continue
            logits_grad = log_probs.exp_()  # the softmax, less 1 at the target
            if smoothing:
                logits_grad -= smoothing / weight_VH.shape[0]
            logits_grad.scatter_add_(1, targets, logits_grad.new_full(targets.shape, smoothing - 1.0))
            if weights_N is not None:
                logits_grad *= weights_N[chunk, None]
            logits_grad = logits_grad.to(dtype)
            if weight_grad is not None:
                weight_grad += logits_grad.t() @ hidden_NH[chunk].to(dtype)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
            if rows_grad is not None:
                rows_grad += logits_grad[:, ids_K].t() @ hidden_NH[chunk].to(dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = gradient_of_hidden(logits_grad, weight_VH, rows_KH, ids_K)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad, rows_grad)
        ctx.mark_non_differentiable(loss_N)
        return (smoothed_N if weights_N is None else smoothed_N * weights_N).sum(), loss_N

    @staticmethod
    def backward(ctx: Any, sum_grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return (*(grad if grad is None else grad * sum_grad for grad in ctx.saved_tensors), *[None] * 5)


def chunked_cross_entropy(
    hidden_NH: torch.Tensor,
    head: nn.Module,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
    *,
    smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses in nats, and each cross-entropy, [N]; both float32, and only the sum has a gradient.

    `hidden_NH` are the labelled tokens' last hidden states, `targets_N` the ids of the tokens to predict; `weights_N` are
    factors of the losses in the sum, float32. After Wijmans et al. 2024 (arXiv:2411.09009), in plain torch. In the sum, not in each,
    `smoothing` is label smoothing's factor (arXiv:1512.00567, section 7), and `by_probability` multiplies each loss by the target's
    probability, which counts as a constant (DFT, arXiv:2508.05629).
    """
    losses: tuple[torch.Tensor, torch.Tensor] = _ChunkedCrossEntropy.apply(
        hidden_NH, *head_of(head), targets_N, weights_N, smoothing, by_probability
    )
    return losses


def cross_entropy(
    hidden_BTH: torch.Tensor,
    head: nn.Module,
    labels_BT: torch.Tensor,
    weights_BT: torch.Tensor | None = None,
    *,
    smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the labelled tokens' losses in nats, and each loss at its label's position, [B, T], 0 elsewhere; both float32.

    `labels_BT` are not shifted: the hidden state at t predicts the label at t + 1, and IGNORE_INDEX marks unlabelled tokens. Of a part
    of a row (glmtuner/data/parts.py) they are one more than the hidden states.
    `weights_BT` are the labels' factors in the sum; `smoothing` and `by_probability` change the sum, as in `chunked_cross_entropy`.
    """
    count = labels_BT.shape[1] - 1  # of a part of a row there are as many as hidden states
    targets_BT = F.pad(labels_BT[:, 1:], (0, hidden_BTH.shape[1] - count), value=IGNORE_INDEX)
    is_labelled_BT = targets_BT != IGNORE_INDEX
    weights_N = None if weights_BT is None else weights_BT[:, 1:][is_labelled_BT[:, :count]]
    total, loss_N = chunked_cross_entropy(
        hidden_BTH[is_labelled_BT],
        head,
        targets_BT[is_labelled_BT],
        weights_N,
        smoothing=smoothing,
        by_probability=by_probability,
    )
    losses_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
    losses_BT[:, 1:] = losses_BT[:, 1:].masked_scatter(is_labelled_BT[:, :count], loss_N)
    return total, losses_BT


def chunked_loss_problem(model: "PreTrainedModel") -> str | None:
    """Why the loss cannot be computed from the last hidden states; None for a decoder with one plain linear head on them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if OutputHead.of(head) is None or model.base_model is model:
        return "the model's logits do not come from one linear layer"
    return None


def enable_chunked_loss(model: "PreTrainedModel") -> None:
    """Let the model's forward pass compute the loss of `labels`, [B, T], by `cross_entropy`; it then returns no logits.

    The loss is the mean in nats over the labelled tokens, or their sum divided by `num_items_in_batch`; with `weights`, [B, T],
    each label's loss counts as often as its weight says; `smoothing` and `by_probability` are those of `chunked_cross_entropy`. With
    `each=True` it is that of each token, [B, T], without a gradient and without weights. With `logprobs=True` the model returns
    TokenLogprobs instead, of logits divided by `temperature`, the entropies with `entropy=True`. Without labels the model computes
    as before. Raises NotImplementedError where the head is not applied to the last hidden states, as where the model projects them
    first.
    """

    plain = model.forward  # of its class, or with segments

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return plain(*args, **options)
        num_items, each = options.pop("num_items_in_batch", None), options.pop("each", False)
        weights_BT = options.pop("weights", None)
        logprobs, temperature = options.pop("logprobs", False), options.pop("temperature", 1.0)
        entropy = options.pop("entropy", False)
        changed = {name: options.pop(name) for name in ("smoothing", "by_probability") if name in options}
        hidden_BTH = getattr(self.base_model(*args, **{"use_cache": False, **options}), "last_hidden_state", None)
        head = self.get_output_embeddings()
        weight_VH = head_of(head).weight_VH
        if hidden_BTH is None or hidden_BTH.shape[-1] != weight_VH.shape[1]:
            raise NotImplementedError("the output layer is not applied to the last hidden states")
        if not torch.is_autocast_enabled(hidden_BTH.device.type):
            hidden_BTH = hidden_BTH.to(weight_VH.dtype)  # residual sums may be float32 (Mamba)
        if logprobs:
            return TokenLogprobs(*label_logprobs_in_chunks(hidden_BTH, head, labels, temperature, entropy))
        total, losses_BT = cross_entropy(hidden_BTH, head, labels, weights_BT, **changed)
        if each:
            return CausalLMOutputWithPast(loss=losses_BT)
        if num_items is None:
            is_labelled_BT = labels[:, 1:].ne(IGNORE_INDEX)
            num_items = is_labelled_BT.sum() if weights_BT is None else (is_labelled_BT * weights_BT[:, 1:]).sum()
        return CausalLMOutputWithPast(loss=total / num_items)

    model.__dict__["unchunked"] = model.__dict__.get("forward")
    model.forward = types.MethodType(forward, model)


def chunks_loss(model: "PreTrainedModel") -> bool:
    """Whether `enable_chunked_loss` is in effect."""
    return "unchunked" in model.__dict__


def disable_chunked_loss(model: "PreTrainedModel") -> None:
    """Undo `enable_chunked_loss`."""
    if not chunks_loss(model):
        return
    model.__dict__.pop("forward", None)
    if (plain := model.__dict__.pop("unchunked")) is not None:
        model.forward = plain
