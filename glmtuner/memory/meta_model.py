"""A run's model without values: shapes and dtypes only."""

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from glmtuner.families.family import Family


ABSMAX_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit storage


def estimation_unsupported(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"the memory of this model cannot be estimated: its forward pass cannot be gone through without values "
        f"({type(error).__name__}: {reason}); start the run with trainer.max_steps=2 and read peak_memory_gib in metrics.json"
    )


def build_meta_model(
    run: Run, family: "Family | None", device: "torch.device", compute_dtype: "torch.dtype"
) -> "nn.Module":
    """The model as it will be trained, its method attached, on the meta device: shapes and dtypes without values."""
    import torch
    from transformers import AutoModelForCausalLM

    from glmtuner.families.family import family_from_structure
    from glmtuner.finetuning.start import adapter_to_resume, base_folder, checkpoints_of, settings_of
    from glmtuner.models.load import dtype_of, load_config

    finetuning = copy.copy(
        run.finetuning
    )  # what is settled here is settled again, and told, when the run itself is put together
    checkpoints = checkpoints_of(run.model)
    whole = base_folder(checkpoints)
    source = dataclasses.replace(run.model, model_name_or_path=str(whole), config_name=None) if whole else run.model
    config = load_config(source, family)
    dtype = dtype_of(source, config, device)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if run.quant.bits:
            quantize(model, run.quant.bits, compute_dtype)
        if family is None:
            family = family_from_structure(model)
            finetuning.settle(family, len(family.blocks(model)))
        goes_on = adapter_to_resume(checkpoints, finetuning, run.model.resume_lora_training, run.trainer.do_train)
        if goes_on is not None:
            for name, value in settings_of(goes_on).items():
                setattr(finetuning, name, value)
        model = finetuning.attach(model, family)
    model.config.use_cache = False
    return model.train()


def quantize(model: "nn.Module", bits: int, compute_dtype: "torch.dtype") -> None:
    """Put a stand-in, with the memory that bitsandbytes' has, in the place of every linear layer that is quantized."""
    import torch
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    class Product(torch.autograd.Function):
        """x W^T where W is made for the product and thrown away, and nothing is kept."""

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
            product = Product.apply(x, self.out_features)
            return product if self.bias is None else product + self.bias

    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in kept):
            module.__class__ = Quantized
            module.weight.requires_grad_(False)
            module.weight.stored_bits = bits


def stored_nbytes(parameter: "torch.Tensor") -> int:
    """The bytes that a parameter takes; quantized ones with their scales."""
    bits = getattr(parameter, "stored_bits", None)
    if bits == 4:  # a scale in 8 bits for every block, and their own scales
        return parameter.numel() // 2 + parameter.numel() // ABSMAX_BLOCK
    if bits == 8:  # a float32 scale for every row
        return parameter.numel() + 4 * parameter.shape[0]
    return parameter.numel() * parameter.element_size()


def materialize_fake(model: "nn.Module", mode: Any, device: "torch.device") -> None:
    """Replace parameters and buffers on the meta device by fake ones on `device`; tied ones stay tied."""
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (fake, tensor)  # the old one too: its id must stay its own
                held[name] = made[id(tensor)][0]
