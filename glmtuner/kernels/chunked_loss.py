"""Cross-entropy of labelled tokens only, in chunks: the logits of a whole batch are never in memory.

With a vocabulary of 130,000 to 151,000 tokens they are often the largest tensor of a training run (Wijmans et al. 2024,
arXiv:2411.09009). For tokens without a label, those of prompts, no logits are computed.

Shape letters: B rows, T tokens, N labelled tokens, H hidden size, V vocabulary.
"""

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 2**28  # of a chunk's float32 logits on a GPU: every chunk reads the whole head, a gigabyte, twice
CHUNK_BYTES_CPU = 2**23  # small enough for the processor's cache


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses, and each loss, [N]; gradients of the sum are computed in the forward pass, the only ones needed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden_NH) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VH) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V) if bias_V is not None and needs_bias else None
        loss_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        chunk_bytes = CHUNK_BYTES_CPU if hidden_NH.device.type == "cpu" else CHUNK_BYTES
        chunk_tokens = max(chunk_bytes // (4 * weight_VH.shape[0]), 64)
        for start in range(0, len(targets_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = F.linear(hidden_NH[chunk], weight_VH, bias_V)
            log_probs, dtype = logits.log_softmax(-1, dtype=torch.float32), logits.dtype
            targets = targets_N[chunk, None]
            loss_N[chunk] = -log_probs.gather(1, targets)[:, 0]
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            logits_grad = log_probs.exp_()  # the softmax, less 1 at the target
            logits_grad.scatter_add_(1, targets, logits_grad.new_full(targets.shape, -1.0))
            logits_grad = logits_grad.to(dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ weight_VH.to(dtype)
            if weight_grad is not None:
                weight_grad += logits_grad.t() @ hidden_NH[chunk].to(dtype)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(ctx: Any, sum_grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return (*(grad if grad is None else grad * sum_grad for grad in ctx.saved_tensors), None)


def chunked_cross_entropy(
    hidden_NH: torch.Tensor, head: nn.Linear, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses in nats, and each loss, [N]; both float32, and only the sum has a gradient.

    `hidden_NH` are the labelled tokens' last hidden states, `targets_N` the ids of the tokens to predict. After Wijmans et al.
    2024 (arXiv:2411.09009), in plain torch.
    """
    losses: tuple[torch.Tensor, torch.Tensor] = _ChunkedCrossEntropy.apply(hidden_NH, head.weight, head.bias, targets_N)
    return losses


def cross_entropy(
    hidden_BTH: torch.Tensor, head: nn.Linear, labels_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the labelled tokens' losses in nats, and each loss at its label's position, [B, T], 0 elsewhere; both float32.

    `labels_BT` are not shifted: the hidden state at t predicts the label at t + 1, and IGNORE_INDEX marks unlabelled tokens.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    is_labelled_BT = targets_BT != IGNORE_INDEX
    total, loss_N = chunked_cross_entropy(hidden_BTH[is_labelled_BT], head, targets_BT[is_labelled_BT])
    losses_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
    losses_BT[:, 1:] = losses_BT[:, 1:].masked_scatter(is_labelled_BT[:, :-1], loss_N)
    return total, losses_BT


def chunked_loss_problem(model: "PreTrainedModel") -> str | None:
    """Why the loss cannot be computed from the last hidden states; None for a decoder with one plain linear head on them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or model.base_model is model:
        return "the model's logits do not come from one linear layer"
    return None


def enable_chunked_loss(model: "PreTrainedModel") -> None:
    """Let the model's forward pass compute the loss of `labels`, [B, T], by `cross_entropy`; it then returns no logits.

    The loss is the mean in nats over the labelled tokens, or their sum divided by `num_items_in_batch`. With `each=True` it is
    that of each token, [B, T], without a gradient. Without labels the model computes as before. Raises NotImplementedError
    where the head is not applied to the last hidden states, as where the model projects them first.
    """

    plain = model.forward  # of its class, or with segments

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return plain(*args, **options)
        num_items, each = options.pop("num_items_in_batch", None), options.pop("each", False)
        hidden_BTH = getattr(self.base_model(*args, **{"use_cache": False, **options}), "last_hidden_state", None)
        head = self.get_output_embeddings()
        if hidden_BTH is None or hidden_BTH.shape[-1] != head.in_features:
            raise NotImplementedError("the output layer is not applied to the last hidden states")
        if not torch.is_autocast_enabled(hidden_BTH.device.type):
            hidden_BTH = hidden_BTH.to(head.weight.dtype)  # residual sums may be float32 (Mamba)
        total, losses_BT = cross_entropy(hidden_BTH, head, labels)
        if each:
            return CausalLMOutputWithPast(loss=losses_BT)
        num_items = labels[:, 1:].ne(IGNORE_INDEX).sum() if num_items is None else num_items
        return CausalLMOutputWithPast(loss=total / num_items)

    model.__dict__["unchunked"] = model.__dict__.get("forward")
    model.forward = types.MethodType(forward, model)


def disable_chunked_loss(model: "PreTrainedModel") -> None:
    """Undo `enable_chunked_loss`."""
    if "unchunked" not in model.__dict__:
        return
    model.__dict__.pop("forward", None)
    if (plain := model.__dict__.pop("unchunked")) is not None:
        model.forward = plain
