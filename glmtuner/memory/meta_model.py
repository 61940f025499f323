"""A run's model without values: shapes and dtypes only."""

import dataclasses
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PreTrainedModel

    from glmtuner.families.family import Family


ABSMAX_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit storage


def estimation_unsupported(error: Exception) -> ConfigError:
    """The error of a model whose forward pass cannot be traced without values."""
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"the memory of this model cannot be estimated: its forward pass cannot be traced without values "
        f"({type(error).__name__}: {reason}); start the run with trainer.max_steps=2 and read peak_memory_gib in metrics.json"
    )


def build_meta_model(
    run: Run,
    finetuning: Finetuning,
    family: "Family | None",
    device: "torch.device",
    compute_dtype: "torch.dtype",
) -> "PreTrainedModel":
    """The model as it will be trained, with its method attached, on the meta device: shapes and dtypes without values."""
    import torch

    from glmtuner.families.structure import family_from_structure
    from glmtuner.finetuning.start import adapter_to_resume, base_folder, checkpoints_of
    from glmtuner.models.load import auto_class, dtype_of, load_config

    checkpoints = checkpoints_of(run.model)
    base = base_folder(checkpoints)
    source = dataclasses.replace(run.model, model_name_or_path=str(base), config_name=None) if base else run.model
    config = load_config(source, family)
    dtype = dtype_of(source, config, device)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
        if run.quant.bits:
            quantize(model, run.quant.bits, compute_dtype)
        if family is None:
            family = family_from_structure(model)
            finetuning = finetuning.resolved(family, len(family.blocks(model)))
        resumed = adapter_to_resume(checkpoints, finetuning, run.model.resume_lora_training, run.trainer.do_train)
        if resumed is not None:
            finetuning = resumed.resumed(finetuning)
        model = finetuning.attach(model, family)
    model.config.use_cache = False
    return model.train()


def quantize(model: "nn.Module", bits: int, compute_dtype: "torch.dtype") -> None:
    """Turn every linear layer and all experts that would be quantized into stand-ins that take the same memory."""
    import torch
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from glmtuner.families.experts import is_experts
    from glmtuner.models.quantized_experts import From8Bits, store

    class Product(torch.autograd.Function):
        """x W^T, where W is dequantized for the product and freed after it, and nothing is saved for the backward pass."""

        @staticmethod
        def forward(ctx: Any, x: "torch.Tensor", rows: int) -> "torch.Tensor":
            ctx.columns, ctx.dtype = x.shape[-1], x.dtype
            weight = x.new_empty(rows, x.shape[-1], dtype=compute_dtype)
            return nn.functional.linear(x.to(compute_dtype), weight).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: "torch.Tensor") -> Any:
            weight = grad.new_empty(grad.shape[-1], ctx.columns, dtype=compute_dtype)
            return (grad.to(compute_dtype) @ weight).to(ctx.dtype), None

    class Quantized(nn.Linear):
        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            product: torch.Tensor = Product.apply(x, self.out_features)
            return product if self.bias is None else product + self.bias

    class Computed(From8Bits):
        """Experts, of which the module computes all values at once."""

        def __init__(self, value: "torch.Tensor") -> None:
            super().__init__(value.new_empty(0), value.dtype, value.shape)

        def forward(self, value: "torch.Tensor") -> "torch.Tensor":
            with torch.no_grad():
                return torch.empty_like(value, dtype=torch.float32 if bits == 8 else value.dtype).to(value.dtype)

    excluded = get_keys_to_not_convert(model)
    for name, module in [*model.named_modules()]:
        for own, value in [*module.named_parameters(recurse=False)]:
            if is_experts(module, own, value.ndim) and should_convert_module(name, excluded):
                value.requires_grad_(False)
                store(module, own, Computed(value))
                stored: Any = module.parametrizations[own].original
                stored.stored_bits = bits
        if type(module) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in excluded):
            module.__class__ = Quantized
            weight: Any = module.weight.requires_grad_(False)
            weight.stored_bits = bits


def stored_nbytes(parameter: "torch.Tensor") -> int:
    """The bytes that a parameter takes in memory; a quantized one with its scales."""
    bits = getattr(parameter, "stored_bits", None)
    if bits == 4:  # and an 8-bit scale for every block; the scales of the scales are negligible
        return parameter.numel() // 2 + parameter.numel() // ABSMAX_BLOCK
    if bits == 8:  # and a float32 scale for every row
        return parameter.numel() + 4 * parameter.numel() // parameter.shape[-1]
    return parameter.numel() * parameter.element_size()


def materialize_fake(model: "nn.Module", mode: "FakeTensorMode", device: "torch.device") -> None:
    """Replace parameters and buffers on the meta device by fake ones on `device`; tied ones stay tied."""
    import torch

    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]:
            if tensor not in fakes:
                with mode:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                fakes[tensor] = fake
            setattr(module, name, fakes[tensor])
