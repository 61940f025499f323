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
    """Rows of int8 with outlier columns apart (LLM.int8(), arXiv:2208.07339)."""

    bits: ClassVar[int | None] = 8

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}

    def prepare(self, model: "nn.Module") -> None:
        """Let the layers' products keep nothing of their inputs, which only gradients of the weights would need.

        bitsandbytes keeps each input whole, and where gradient checkpointing cannot reach it: ChatGLM-6B's training on 4 rows
        of 512 tokens held 13.8 GiB of an H200 where 8.0 had been estimated.
        """
        from bitsandbytes.autograd._functions import MatMul8bitLt

        keep_no_inputs(MatMul8bitLt)


def keep_no_inputs(product: Any) -> None:
    """Drop what bitsandbytes' product keeps for the gradient of a weight that has none; done once in a process."""
    forward = product.forward
    if hasattr(forward, "__wrapped__"):
        return

    @functools.wraps(forward)
    def without(ctx: Any, *args: Any) -> Any:
        found = forward(ctx, *args)
        if not (ctx.is_empty or ctx.needs_input_grad[1]):
            ctx.tensors = (None, None, None)
        return found

    product.forward = staticmethod(without)
