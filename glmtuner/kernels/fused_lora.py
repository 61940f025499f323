"""A LoRA layer (Hu et al. 2021, arXiv:2106.09685) as one operation, forward and backward.

PEFT's layer computes the frozen product, the low-rank update and their sum in separate operations, each of which passes over
all activations, and so do their gradients. Here the matrix product that computes the update adds it in place.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _LoraLinear(torch.autograd.Function):
    """x W' + b + scale (x A') B', [T, O]; the frozen weight gets no gradient. `dropped_TI` is x after dropout, or None."""

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
        lora_x_TI = x_TI if dropped_TI is None else dropped_TI
        down_TR = lora_x_TI @ a_RI.t()
        ctx.save_for_backward(lora_x_TI, down_TR, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        out_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(down_TR, b_OR.t(), alpha=scale)
        # a view, since torch.compile of torch 2.11 computes no gradient for a tensor that was changed in place
        return out_TO.view(out_TO.shape)

    @staticmethod
    def backward(ctx: Any, out_grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lora_x_TI, down_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        needs_x, needs_dropped, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        if b_OR.device.type == "cpu":  # a product with so few columns takes twice as long with those far apart
            b_OR = b_OR.t().contiguous().t()
        down_grad_TR = (out_grad_TO @ b_OR).mul_(ctx.scale)
        x_grad = out_grad_TO @ weight_OI if needs_x else None
        dropped_grad = down_grad_TR @ a_RI if needs_dropped else None
        if x_grad is not None and not needs_dropped:
            x_grad.addmm_(down_grad_TR, a_RI)
        bias_grad = out_grad_TO.sum(0) if needs_bias else None
        a_grad = down_grad_TR.t() @ lora_x_TI if needs_a else None
        b_grad = (down_TR.t() @ out_grad_TO).mul_(ctx.scale).t() if needs_b else None
        return x_grad, dropped_grad, None, bias_grad, a_grad, b_grad, None


def _forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Replaces the forward of a PEFT layer, which still computes everything but a single active, unmerged adapter."""
    adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    base = self.base_layer
    if adapter not in self.lora_A or self.disable_adapters or self.merged or args or options:
        out: torch.Tensor = type(self).forward(self, x, *args, **options)
        return out
    a_RI, b_OR = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    tensors = [x, base.weight, base.bias, a_RI, b_OR]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [value if value is None else value.to(dtype) for value in tensors]
    elif any(value is not None and value.dtype != x.dtype for value in tensors):
        out = type(self).forward(self, x)  # float32 adapters on a half-precision base
        return out
    x, weight_OI, bias_O, a_RI, b_OR = tensors
    dropout = self.lora_dropout[adapter]
    has_dropout = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    x_TI = x.reshape(-1, x.shape[-1])
    dropped_TI = dropout(x_TI) if has_dropout else None
    out = _LoraLinear.apply(x_TI, dropped_TI, weight_OI, bias_O, a_RI, b_OR, self.scaling[adapter])
    return out.view(*x.shape[:-1], -1)


def _is_plain(layer: nn.Module) -> bool:
    """Whether this is PEFT's LoRA of an unquantized, frozen nn.Linear, without variants such as DoRA."""
    from peft.tuners.lora import layer as lora

    if type(layer) is not lora.Linear or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
        return False
    return not layer.lora_variant and not any(layer.lora_bias.values()) and not layer.base_layer.weight.requires_grad


def fuse_lora(model: nn.Module) -> int:
    """Let the model's plain LoRA layers compute in one operation each; returns the number of these layers.

    A layer's inputs [..., I] and outputs [..., O] are those of PEFT's layer.
    """
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and _is_plain(module)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def unfuse_lora(model: nn.Module) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward", None)
