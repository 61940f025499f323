"""A linear layer with a low-rank update as one operation, forward and backward.

PEFT's layer computes the frozen product, the update and their sum one after the other; each passes over all activations,
and so does each of their gradients. Here the update is added in place by the matrix product that makes it.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _LoraLinear(torch.autograd.Function):
    """x W' + b + scale (x A') B', [T, O]; the frozen weight gets no gradient. `dropped_TI` is x behind the dropout, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        dropped_TI: torch.Tensor | None,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        seen_TI = x_TI if dropped_TI is None else dropped_TI
        low_TR = seen_TI @ a_RI.t()
        ctx.save_for_backward(seen_TI, low_TR, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        out_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b_OR.t(), alpha=scale)
        # a view, since torch.compile of torch 2.11 gives no gradient to what was changed in place
        return out_TO.view(out_TO.shape)

    @staticmethod
    def backward(ctx: Any, slope_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        seen_TI, low_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        wants_x, wants_dropped, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
        low_slope_TR = (slope_TO @ b_OR).mul_(ctx.scale)
        x_grad = slope_TO @ weight_OI if wants_x else None
        dropped_grad = low_slope_TR @ a_RI if wants_dropped else None
        if x_grad is not None and not wants_dropped:
            x_grad.addmm_(low_slope_TR, a_RI)
        bias_grad = slope_TO.sum(0) if wants_bias else None
        a_grad = low_slope_TR.t() @ seen_TI if wants_a else None
        b_grad = (low_TR.t() @ slope_TO).mul_(ctx.scale).t() if wants_b else None
        return x_grad, dropped_grad, None, bias_grad, a_grad, b_grad, None


def _forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """In place of a PEFT layer's own forward; what is not a single plain adapter in training is left to that."""
    adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    base = self.base_layer
    if adapter not in self.lora_A or self.disable_adapters or self.merged or args or options:
        return type(self).forward(self, x, *args, **options)
    a_RI, b_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    tensors = [x, base.weight, base.bias, a_RI, b_OR]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [value if value is None else value.to(dtype) for value in tensors]
    elif any(value is not None and value.dtype != x.dtype for value in tensors):
        return type(self).forward(self, x)  # float32 adapters on a half-precision base
    x, weight_OI, bias_O, a_RI, b_OR = tensors
    dropout = self.lora_dropout[adapter]
    drops = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    rows = x.reshape(-1, x.shape[-1])
    dropped = dropout(rows) if drops else None
    out = _LoraLinear.apply(rows, dropped, weight_OI, bias_O, a_RI, b_OR, self.scaling[adapter])
    return out.view(*x.shape[:-1], -1)


def _is_plain(layer: nn.Module) -> bool:
    from peft.tuners.lora import layer as lora

    if type(layer) is not lora.Linear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return False
    return not layer.lora_variant and not any(layer.lora_bias.values()) and not layer.base_layer.weight.requires_grad


def fuse_lora(model: nn.Module) -> int:
    """Let the model's plain LoRA layers compute in one operation; returns how many do."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and _is_plain(module)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def unfuse_lora(model: nn.Module) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)
