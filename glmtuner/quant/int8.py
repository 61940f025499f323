"""Eight-bit base weights, by bitsandbytes."""

import functools
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
        """Make the layers save no inputs for the backward pass, which only gradients of the weights would need.

        bitsandbytes saves each input, as an attribute that gradient checkpointing does not free: training ChatGLM-6B on 4
        rows of 512 tokens took 13.8 GiB of an H200, where 8.0 were estimated.
        """
        from bitsandbytes.autograd._functions import (
            MatMul8bitLt,
        )  # the public `matmul` gives no access to what is saved

        drop_saved_inputs(MatMul8bitLt)


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
