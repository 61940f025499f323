"""Eight-bit base weights, by bitsandbytes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from glmtuner.config.schema import Quant, preset


@preset("quant", "int8")
@dataclass(kw_only=True)
class Int8(Quant):
    """Rows of int8 with outlier columns apart (LLM.int8(), arXiv:2208.07339)."""

    bits: ClassVar[int | None] = 8

    def loading(self, device: Any, compute_dtype: Any) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
