"""The published int8 and int4 checkpoints of ChatGLM, dequantized to ordinary weights as they load.

For each row of a matrix they hold an fp16 scale and integers: int8, or two 4-bit numbers per byte, the even column in the
upper half. A weight is integer times scale.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

# embeddings and head are quantized in the -qe checkpoints only
QUANTIZED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings", "lm_head", "output_layer")


def unpacked(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers of a quantized matrix, int8 [rows, columns], from bytes [rows, columns] or, for 4 bits, [rows, columns / 2]."""
    if bits == 8:
        return integers.to(torch.int8)
    packed = integers.to(torch.int8)
    lower = torch.bitwise_left_shift(packed, 4)
    halves = [torch.bitwise_right_shift(part, 4) for part in (packed, lower)]  # an arithmetic shift keeps the sign
    return torch.stack(halves, dim=-1).flatten(-2)


def dequantized(integers: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The matrix, [rows, columns], in the dtype of `scale`, [rows]; `integers` are bytes as in `unpacked`."""
    return unpacked(integers, bits).to(scale.dtype) * scale[:, None]


class Dequantize(ConversionOps):
    """`weight` and `weight_scale` -> `weight`; a matrix without a scale is not changed."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """The target's weight, from the tensors of `source_patterns`: the weight, then its scale, which may be missing."""
        tensors: dict[str, torch.Tensor] = {
            name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()
        }
        weight, scale = tensors[source_patterns[0]], tensors.get(source_patterns[1])
        return {target_patterns[0]: [weight if scale is None else dequantized(weight, scale, self.bits)]}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: raises NotImplementedError."""
        raise NotImplementedError("weights are not quantized again when they are saved")


@contextmanager
def dequantizing(model_type: str, bits: int) -> Iterator[None]:
    """Within this context, loading a model of that type dequantizes."""
    converters: list[WeightConverter | WeightRenaming] = [
        WeightConverter([rf"\.{name}\.weight$", rf"\.{name}\.weight_scale$"], f".{name}.weight", [Dequantize(bits)])
        for name in QUANTIZED
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping(model_type, [], overwrite=True)


class PreQuantizedModel(PreTrainedModel):
    """A model whose `from_pretrained` takes ordinary and pre-quantized checkpoints; its weights are ordinary either way."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """The model with the checkpoint's weights, dequantized if its config has `quantization_bit`."""
        source = pretrained_model_name_or_path
        if not hasattr(config, "quantization_bit"):
            hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "subfolder") if name in kwargs}
            assert cls.config_class is not None
            config_source: Any = config or source
            config = cls.config_class.from_pretrained(config_source, **hub)
        bits = config.quantization_bit
        if not bits:
            return super().from_pretrained(source, *args, config=config, **kwargs)
        dtype = kwargs.pop("dtype", None)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        # transformers casts before it converts, and bf16 would round the fp16 scales
        exact = torch.float32 if dtype == torch.float32 else torch.float16
        with dequantizing(config.model_type, bits):
            model: Any = super().from_pretrained(source, *args, config=config, dtype=exact, **kwargs)
        model._weight_conversions = []  # or save_pretrained would apply the conversion in reverse
        model.config.quantization_bit = None
        if dtype == torch.bfloat16:
            for parameter in model.parameters():
                if parameter.is_floating_point():  # not for what bitsandbytes has packed, for which model.to() raises
                    parameter.data = parameter.data.to(dtype)
            model.config.dtype = dtype
        return model
