"""The int8 and int4 checkpoints that were published beside ChatGLM's own, turned into ordinary weights as they load.

Of each row of a matrix they hold a scale in fp16 and integers: int8, or two 4-bit numbers in a byte, the even column in
its upper half. The weight is integer times scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

# embeddings and head are quantized in the -qe checkpoints only
QUANTIZED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings", "lm_head", "output_layer")


def unpacked(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers of a quantized matrix, int8 [rows, columns], from their bytes [rows, columns] or [rows, columns / 2]."""
    if bits == 8:
        return integers.to(torch.int8)
    packed = integers.to(torch.int8)
    lower = torch.bitwise_left_shift(packed, 4)
    halves = [torch.bitwise_right_shift(part, 4) for part in (packed, lower)]  # the shift keeps the sign
    return torch.stack(halves, dim=-1).flatten(-2)


def dequantized(integers: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The matrix in the scale's dtype."""
    return unpacked(integers, bits).to(scale.dtype) * scale[:, None]


class Dequantize(ConversionOps):
    """`weight` and `weight_scale` -> `weight`; a matrix without a scale stays as it is."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        weight, scale = (found.get(pattern) for pattern in source_patterns)
        return {target_patterns[0]: weight if scale is None else dequantized(weight, scale, self.bits)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("weights are not quantized again when they are saved")


@contextmanager
def dequantizing(model_type: str, bits: int) -> Iterator[None]:
    """While this lasts, loading a model of that type dequantizes."""
    converters = [
        WeightConverter([rf"\.{name}\.weight$", rf"\.{name}\.weight_scale$"], f".{name}.weight", [Dequantize(bits)])
        for name in QUANTIZED
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(model_type, [], overwrite=True)


class PreQuantizedMixin:
    """`from_pretrained` that takes ordinary and pre-quantized checkpoints; the model is an ordinary one in either case."""

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if not hasattr(config, "quantization_bit"):
            hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "subfolder") if name in kwargs}
            config = cls.config_class.from_pretrained(config or source, **hub)  # type: ignore[attr-defined]
        bits = config.quantization_bit
        if not bits:
            return super().from_pretrained(source, *args, config=config, **kwargs)  # type: ignore[misc]
        dtype = kwargs.pop("dtype", None)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        # the scales are fp16, and transformers casts before it converts: bf16 would round them
        exact = torch.float32 if dtype == torch.float32 else torch.float16
        with dequantizing(config.model_type, bits):
            model = super().from_pretrained(source, *args, config=config, dtype=exact, **kwargs)  # type: ignore[misc]
        model._weight_conversions = []
        model.config.quantization_bit = None
        if dtype == torch.bfloat16:
            for parameter in model.parameters():
                if parameter.is_floating_point():  # what bitsandbytes has packed is not, and model.to() would refuse
                    parameter.data = parameter.data.to(dtype)
            model.config.dtype = dtype
        return model
