"""Eight-bit base weights, by bitsandbytes."""

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import Quant, preset

if TYPE_CHECKING:
    from torch import nn


@preset("quant", "int8")
@dataclass(kw_only=True)
class Int8(Quant):
    """Int8 weights scaled by row, with products of outlier columns in 16 bits (LLM.int8(), arXiv:2208.07339)."""

    bits: ClassVar[int | None] = 8

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}

    def prepare(self, model: "nn.Module") -> None:
        """Make the layers take inputs of any shape, and save none for the backward pass, which only gradients of the weights need.

        bitsandbytes multiplies rows and batches of rows; of other inputs, such as the latent keys and values of DeepSeek-V2,
        [B, 1, S, H], its code for CPUs takes the maxima along another dimension than the last. It saves each input as an attribute
        that gradient checkpointing does not free: training ChatGLM-6B on 4 rows of 512 tokens took 13.8 GiB of an H200, where 8.0
        were estimated.
        """
        from bitsandbytes.autograd._functions import (
            MatMul8bitLt,
        )  # the public `matmul` gives no access to what is saved

        drop_saved_inputs(MatMul8bitLt)
        from bitsandbytes.nn import Linear8bitLt

        for module in model.modules():
            if isinstance(module, Linear8bitLt):
                module.forward = types.MethodType(_forward_of_rows, module)  # type: ignore[method-assign]


def _forward_of_rows(self: Any, x: Any) -> Any:
    """Replaces the forward of a layer: x [..., I] -> [..., O]."""
    if x.ndim in (2, 3):
        return type(self).forward(self, x)
    out = type(self).forward(self, x.reshape(-1, x.shape[-1]))
    return out.view(*x.shape[:-1], out.shape[-1])


def drop_saved_inputs(matmul: Any) -> None:
    """Patch bitsandbytes' autograd function to save no inputs if the weight needs no gradient; repeated calls do nothing."""
    forward = matmul.forward
    if hasattr(forward, "__wrapped__"):
        return

    @functools.wraps(forward)
    def forward_without_saving(ctx: Any, *args: Any) -> Any:
        output = forward(ctx, *args)
        if not (ctx.is_empty or ctx.needs_input_grad[1]):
            ctx.tensors = (None, None, None)
        return output

    matmul.forward = staticmethod(forward_without_saving)
