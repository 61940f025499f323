"""Quantized weights of which every rank holds a share (parallel=fsdp2): their integers and their scales, as parameters.

FSDP shards parameters, whatever their dtype, and puts plain ones in their place for a forward pass. bitsandbytes' layers keep the
scales outside of the parameters, and the rest of what they know as attributes of a parameter of their own class. So both become
plain parameters of the layer, and its forward pass joins them again. What the backward pass needs refers to the same memory, which
FSDP fills again before it.

Shape letters: I inputs, O outputs of a layer.
"""

import copy
import types
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from glmtuner.distributed import ranks
from glmtuner.distributed.shares import SHARE, Share, rows_of_rank, share_of, stand_in
from glmtuner.models.sizes import SCALES


def keep_share(value: Any) -> Any:
    """A quantized weight as bitsandbytes has it, with this rank's rows alone; other parameters as they are."""
    if isinstance(value, Params4bit):
        state: Any = value.quant_state
        state.absmax = stand_in_of_scales(state.absmax)
    elif isinstance(value, Int8Params):
        value.SCB = stand_in_of_scales(value.SCB)
    else:
        return value
    made: Any = stand_in(value)
    if isinstance(made, Int8Params):
        made.CB = made.data
    return made


def stand_in_of_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales without values, with this rank's rows beside them; on the meta device, so that nothing can be computed with them."""
    made = torch.empty_like(scales, device="meta")
    setattr(made, SHARE, Share(scales[rows_of_rank(len(scales), ranks.rank(), ranks.world_size())].clone()))
    return made


def as_parameters(model: nn.Module) -> None:
    """Make plain parameters of all quantized weights and their scales, in place; nothing in a model without them."""
    modules: list[Any] = [*model.modules()]
    for module in modules:
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            _register(module, weight.quant_state.absmax, _forward_4bit)
        elif isinstance(module, Linear8bitLt):
            held: Any = module.weight
            if held.CB is not None:  # no forward pass has taken them yet
                module.init_8bit_state()
            assert module.state.SCB is not None
            _register(module, module.state.SCB, _forward_8bit)
            module.state.CB = module.state.SCB = None
        elif hasattr(module, "scales_as_parameter"):  # of experts
            module.scales_as_parameter()


def _register(layer: Any, scales: torch.Tensor, forward: Any) -> None:
    layer._parameters["weight"] = plain(layer.weight)
    layer.register_parameter(SCALES, plain(scales))
    layer.forward = types.MethodType(forward, layer)


def plain(value: torch.Tensor) -> nn.Parameter:
    """A frozen parameter with the same values; a stand-in's is one with the same share."""
    made = nn.Parameter(value.data, requires_grad=False)
    if hasattr(value, SHARE):
        setattr(made, SHARE, Share(share_of(value)))
    return made


def _forward_4bit(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of Linear4bit: x [..., I] -> [..., O]."""
    self.quant_state.absmax = self.scales
    inputs = x if self.compute_dtype is None else x.to(self.compute_dtype)
    bias = None if self.bias is None else self.bias.to(inputs.dtype)
    return bitsandbytes.matmul_4bit(inputs, self.weight, bias=bias, quant_state=self.quant_state).to(x.dtype)


def _forward_8bit(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of Linear8bitLt: x [..., I] -> [..., O]."""
    state = copy.copy(self.state)  # one that keeps nothing beyond the backward pass
    state.CB, state.SCB, state.is_training = self.weight.data, self.scales.data, self.training
    rows = x if x.ndim in (2, 3) else x.reshape(-1, x.shape[-1])
    bias = None if self.bias is None else self.bias.to(x.dtype)
    out = bitsandbytes.matmul(rows, self.weight, bias=bias, state=state)
    return out.view(*x.shape[:-1], out.shape[-1])
