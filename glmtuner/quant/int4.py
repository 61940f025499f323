"""Four-bit base weights, by bitsandbytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import Quant, preset

if TYPE_CHECKING:
    from torch import nn


@preset("quant", "int4")
@dataclass(kw_only=True)
class Int4(Quant):
    """NF4 or FP4 blocks whose scales are quantized too (QLoRA, arXiv:2305.14314); matrix products in the compute dtype."""

    bits: ClassVar[int | None] = 4

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantization_type.value,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=compute_dtype,
        )
        return {"quantization_config": config, "device_map": {"": device}}

    def prepare(self, model: "nn.Module") -> None:
        """Keep the weights in a layout that has a backward pass.

        On a CPU with AVX-512, bitsandbytes repacks them for good at the first forward pass in evaluation mode, and the
        repacked layout has no backward pass: a run that generates before it trains would fail.
        """
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
