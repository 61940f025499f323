"""The output layer of a language model, as losses in chunks read it: one weight, and rows of it that are trained on their own.

With new tokens, a LoRA trains their rows of the head alone (PEFT's `trainable_token_indices`): their logits come from these rows, all
others from the frozen weight, which nothing copies and of which no gradient is made.

Shape letters: N tokens, H hidden size, V vocabulary, K trained rows.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class OutputHead(NamedTuple):
    """A linear layer without what wraps it; `rows_KH` stand in for the weight's rows `ids_K`, which then is frozen."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    rows_KH: torch.Tensor | None = None
    ids_K: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module | None) -> "OutputHead | None":
        """The head that a layer computes; None where it is not a linear one, or PEFT trains more of it than rows."""
        if type(layer) is nn.Linear:
            return cls(layer.weight, layer.bias)
        trained: Any = getattr(layer, "token_adapter", None)  # PEFT's, within a LoRA
        base = trained.get_base_layer() if trained is not None else None
        if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
            return None
        if trained.disable_adapters or trained.merged or not trained.active_adapters:
            return cls(base.weight, None)
        (name, *others) = trained.active_adapters
        if others:
            return None
        ids_K = torch.tensor(trained.token_indices[name], device=base.weight.device)
        return cls(base.weight, None, trained.trainable_tokens_delta[name].to(base.weight), ids_K)


def head_of(layer: nn.Module) -> OutputHead:
    """The head that a layer computes, which `OutputHead.of` knows."""
    head = OutputHead.of(layer)
    assert head is not None
    return head


def logits_of(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    rows_KH: torch.Tensor | None,
    ids_K: torch.Tensor | None,
) -> torch.Tensor:
    """The logits, [N, V], those of `ids_K` by `rows_KH`; without a gradient."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    if rows_KH is not None:
        logits_NV[:, ids_K] = F.linear(hidden_NH, rows_KH)
    return logits_NV


def gradient_of_hidden(
    logits_grad_NV: torch.Tensor, weight_VH: torch.Tensor, rows_KH: torch.Tensor | None, ids_K: torch.Tensor | None
) -> torch.Tensor:
    """The gradient by the hidden states, [N, H], of one by the logits, which it sets to 0 at `ids_K`; in the dtype of the latter."""
    dtype = logits_grad_NV.dtype
    if rows_KH is None:
        return logits_grad_NV @ weight_VH.to(dtype)
    of_rows_NK = logits_grad_NV[:, ids_K]
    logits_grad_NV[:, ids_K] = 0
    return torch.addmm(of_rows_NK @ rows_KH.to(dtype), logits_grad_NV, weight_VH.to(dtype))
