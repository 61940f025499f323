"""Routed experts in 4 or 8 bits, which bitsandbytes and transformers leave as they are: both quantize linear layers alone.

An experts' parameter is quantized while it is loaded, one after another, and computed from its integers where it is used, by a
parametrization of PyTorch. For the backward pass not the computed values are kept but what they are computed from; otherwise a
training would hold the whole model in 16 bits.
"""

import inspect
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Int8Params, Params4bit
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from glmtuner.distributed import accelerator
from glmtuner.distributed.shares import stand_in
from glmtuner.families.experts import is_experts
from glmtuner.models.quantized_shards import keep_share, plain, stand_in_of_scales


class From4Bits(nn.Module):
    """Values from blocks of NF4 or FP4."""

    bits = 4

    def __init__(self, state: bnb.QuantState) -> None:
        super().__init__()
        self.state, self.dtype, self.shape = state, state.dtype, state.shape

    @classmethod
    def quantized(cls, value: torch.Tensor, config: Any) -> "tuple[torch.Tensor, From4Bits]":
        """The packed integers of a value, and what computes it from them."""
        packed, state = bnb.quantize_4bit(
            value.contiguous(),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return packed, cls(state)

    def keep_share(self) -> None:
        """Keep this rank's rows of the scales alone."""
        self.state.absmax = stand_in_of_scales(self.state.absmax)

    def scales_as_parameter(self) -> None:
        """Make a parameter of the scales, so that they can be sharded."""
        self.scales = plain(self.state.absmax)

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """The values, in the shape and the dtype of those that were quantized."""
        if hasattr(self, "scales"):
            self.state.absmax = self.scales
        with torch.no_grad():
            return bnb.dequantize_4bit(packed, self.state)

    def again(self, value: torch.Tensor) -> "tuple[torch.Tensor, From4Bits]":
        """Another value, quantized in the same way."""
        packed, state = bnb.quantize_4bit(
            value.contiguous(), blocksize=self.state.blocksize, compress_statistics=self.state.nested,
            quant_type=self.state.quant_type,
        )  # fmt: skip
        return packed, From4Bits(state)


class From8Bits(nn.Module):
    """Values from int8 rows with a scale each."""

    bits = 8

    def __init__(self, scales: torch.Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
        super().__init__()
        self.scales, self.dtype, self.shape = scales, dtype, shape

    @classmethod
    def quantized(cls, value: torch.Tensor, config: Any = None) -> "tuple[torch.Tensor, From8Bits]":
        """The integers of a value, in its shape, and what computes it from them."""
        rows = value.reshape(-1, value.shape[-1])
        integers, scales, _ = bnb.int8_vectorwise_quant(
            rows.to(torch.float16)
        )  # as bitsandbytes does with linear layers
        return integers.view(value.shape), cls(scales, value.dtype, value.shape)

    def keep_share(self) -> None:
        """Keep this rank's rows of the scales alone."""
        self.scales = stand_in_of_scales(self.scales)

    def scales_as_parameter(self) -> None:
        """Make a parameter of the scales, so that they can be sharded."""
        scales = plain(self.scales)
        del self.scales
        self.scales = scales

    def forward(self, integers: torch.Tensor) -> torch.Tensor:
        """The values, in the shape and the dtype of those that were quantized."""
        with torch.no_grad():
            rows = bnb.int8_vectorwise_dequant(integers.view(-1, integers.shape[-1]), self.scales)
            return rows.view(integers.shape).to(self.dtype)

    def again(self, value: torch.Tensor) -> "tuple[torch.Tensor, From8Bits]":
        """Another value, quantized in the same way."""
        return self.quantized(value)


STORED = (From4Bits, From8Bits)
# in the code of a module: the name of a layer whose weight is multiplied, or used in any way
MULTIPLIED = re.compile(r"self\.(\w+)\.weight(?:\.T|\.t\(\))? ?@|@ ?self\.(\w+)\.weight")
MAMBA_KERNEL = re.compile(r"mamba_(inner_fn|split_conv1d_scan_combined)")
READ = re.compile(r"self\.(\w+)\.weight(?!\w|\.dtype|\.device|\.shape)()")


class QuantizeExperts(ConversionOps):
    """A step of loading: quantizes experts, and leaves linear layers to transformers' own step."""

    def __init__(self, quantizer: Any, linear: ConversionOps) -> None:
        self.quantizer, self.linear = quantizer, linear

    def convert(self, input_dict: dict[str, Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        """Path -> what is stored at it."""
        model, found, others = options["model"], {}, {}
        for path, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.is_expert(model, path):
                integers, computes = self.quantizer.stored_as.quantized(tensor, self.quantizer.quantization_config)
                self.quantizer.computing[path] = computes
                found[path] = nn.Parameter(integers, requires_grad=False)
                if self.quantizer.in_shares:
                    computes.keep_share()
                    found[path] = stand_in(found[path])
            else:
                others[path] = value
        converted: dict[str, Any] = self.linear.convert(others, *arguments, **options) if others else {}
        if self.quantizer.in_shares:
            converted = {path: keep_share(value) for path, value in converted.items()}
        return found | converted

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: raises NotImplementedError."""
        raise NotImplementedError("quantized weights are not saved")


class _WithExperts(HfQuantizer):
    """Makes one of transformers' quantizers quantize experts, too."""

    stored_as: type[From4Bits] | type[From8Bits]
    in_shares = False  # does this rank keep its rows alone?
    modules_to_not_convert: list[str] | None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.computing: dict[str, nn.Module] = {}

    @staticmethod
    def get_modules_to_not_convert(
        model: PreTrainedModel,
        skip_modules: list[str] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        add_default_skips: bool = False,
    ) -> list[str]:
        """The paths of modules that stay as they are: transformers' own, and those whose weights the model's code multiplies."""
        kept: list[str] = HfQuantizer.get_modules_to_not_convert(
            model, skip_modules, keep_in_fp32_modules, add_default_skips
        )
        return kept + read_as_matrices(model)

    def is_expert(self, model: nn.Module, path: str) -> bool:
        """Whether the parameter at this path is one of experts that are to be quantized."""
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        stored = module._parameters.get(name)
        fits = stored is not None and is_experts(module, name, stored.ndim)
        return fits and should_convert_module(owner, self.modules_to_not_convert)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether the parameter of this name is quantized while it is loaded."""
        return super().param_needs_quantization(model, param_name, **options) or self.is_expert(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """The step of loading that quantizes."""
        return QuantizeExperts(self, super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **options)
        for path in [
            path for path, _ in model.named_parameters() if path in self.computing
        ]:  # in the modules' own order
            owner, _, name = path.rpartition(".")
            store(model.get_submodule(owner), name, self.computing[path])
        return model


class _Quantizer4Bits(_WithExperts, Bnb4BitHfQuantizer):
    stored_as = From4Bits


class _Quantizer8Bits(_WithExperts, Bnb8BitHfQuantizer):
    stored_as = From8Bits


def read_as_matrices(model: nn.Module) -> list[str]:
    """The paths of linear layers whose weight the code around them multiplies itself, such as dt_proj of Mamba.

    On a GPU also those that it hands to the kernels of Mamba. Code that asks whether the model is quantized is left to do so.
    """
    names: dict[type, set[str]] = {}
    found = []
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in names:
            methods = [each for each in vars(kind).values() if inspect.isfunction(each)]
            source = "\n".join(map(_source, methods))
            # the kernel that reads weights past their layers is written for CUDA
            reads = READ if accelerator.is_available("cuda") and MAMBA_KERNEL.search(source) else MULTIPLIED
            asks = reads is MULTIPLIED and "_is_quantized" in source
            names[kind] = set() if asks else {name for match in reads.findall(source) for name in match if name}
        children = dict(module.named_children())
        found += [f"{path}.{name}" for name in names[kind] if type(children.get(name)) is nn.Linear]
    return found


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made at run time
        return ""


@contextmanager
def quantizing_experts(in_shares: bool = False) -> Iterator[None]:
    """Within this context, what transformers loads with bitsandbytes has quantized experts; `in_shares`, this rank's rows of all."""
    own = {"bitsandbytes_4bit": _Quantizer4Bits, "bitsandbytes_8bit": _Quantizer8Bits}
    before = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in own}
    auto.AUTO_QUANTIZER_MAPPING.update(own)
    _WithExperts.in_shares = in_shares
    try:
        yield
    finally:
        _WithExperts.in_shares = False
        auto.AUTO_QUANTIZER_MAPPING.update(before)


def store(module: nn.Module, name: str, computes: nn.Module) -> None:
    """Let the module compute its parameter of this name, which holds integers, and not keep the values for the backward pass."""
    parametrize.register_parametrization(module, name, computes, unsafe=True)
    if "forward" not in module.__dict__:
        module.forward = types.MethodType(_forward, module)


def _forward(self: Any, *arguments: Any, **options: Any) -> Any:
    """Replaces the forward of experts."""
    original = type(self).forward
    for name in self.parametrizations:  # of a value read before an update was added
        parametrize._cache.pop((id(self), name), None)
    with parametrize.cached():  # each value is computed once
        if (
            torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ):  # checkpointing, which keeps nothing either
            return original(self, *arguments, **options)
        saved = {name: _Saved(self, name) for name in self.parametrizations}
        with torch.autograd.graph.saved_tensors_hooks(_packed_by([*saved.values()]), _unpacked):
            return original(self, *arguments, **options)


class _Saved:
    """A computed parameter, as the backward pass needs it: the integers and what computes the values from them."""

    def __init__(self, module: Any, name: str) -> None:
        self.key = (id(module), name)
        self.integers = module.parametrizations[name].original
        self.steps: Sequence[Callable[[torch.Tensor], torch.Tensor]] = tuple(module.parametrizations[name])
        self.views = 0  # that the graph holds
        self.value: torch.Tensor | None = None

    def is_storage_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the computed parameter, or a view of it."""
        value = parametrize._cache.get(self.key)
        return value is not None and value.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    def view(self, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
        """A view of the values, which are computed for the first one and dropped after the last."""
        if self.value is None:
            value = self.integers
            with torch.no_grad():
                for step in self.steps:
                    value = step(value)
            self.value = value
        found = self.value.as_strided(size, stride, offset)
        self.views -= 1
        if self.views <= 0:
            self.value = None
        return found


def _packed_by(parameters: Sequence[_Saved]) -> Callable[[torch.Tensor], Any]:
    def pack(tensor: torch.Tensor) -> Any:
        for saved in parameters:
            if saved.is_storage_of(tensor):
                saved.views += 1
                return saved, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor

    return pack


def _unpacked(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    saved, *view = packed
    found: torch.Tensor = saved.view(*view)
    return found


def described(model: nn.Module) -> str:
    """How many of the parameters are quantized, and which are not, by the last names of their modules, largest first."""
    counts: Counter[str] = Counter()
    quantized = 0
    for path, module in model.named_modules():
        computed = {name: stored_in(module, name) for name in getattr(module, "parametrizations", {})}
        quantized += sum(math.prod(each.shape) for each in computed.values() if each)
        for stored in [] if path.endswith(".parametrizations") else module.parameters(recurse=False):
            if type(stored) in (Params4bit, Int8Params):
                quantized += math.prod(getattr(stored, "quant_state", stored).shape)
            elif not isinstance(module, parametrize.ParametrizationList):
                counts[path.rpartition(".")[2]] += stored.numel()
    total = quantized + counts.total()
    largest = ", ".join(f"{name} {count / total:.2%}" for name, count in counts.most_common(4))
    more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    return f"{quantized / total:.2%} of {total:,} parameters are quantized; not {largest}{more}"


def stored_in(module: nn.Module, name: str) -> "From4Bits | From8Bits | None":
    """What computes a module's parameter of this name; None if it is not quantized."""
    steps = getattr(module, "parametrizations", {})
    return next((each for each in steps[name] if isinstance(each, STORED)), None) if name in steps else None


class _Update(nn.Module):
    """The update of a LoRA, for parametrizations: value -> value + scale * B A."""

    def __init__(self, layer: Any, adapter: str) -> None:
        super().__init__()
        self.factors = lambda: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        self.scale, self.is_swapped = layer.scaling[adapter], layer._did_swap_in_out_features

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The updated value, [experts, output, input], or with both swapped, as the layer has it."""
        a, b = (factor.to(value.dtype) for factor in self.factors())
        with torch.autocast(device_type=value.device.type, enabled=False):
            if value.ndim == 2:
                return torch.addmm(value, b, a, alpha=self.scale)
            a_ERI = a.reshape(value.shape[0], -1, a.shape[-1])
            b_EOR = b.reshape(b.shape[0], -1, value.shape[0]).permute(2, 0, 1)
            if self.is_swapped:
                return torch.baddbmm(value, b_EOR, a_ERI, alpha=self.scale)
            return torch.baddbmm(value, a_ERI.transpose(1, 2), b_EOR.transpose(1, 2), alpha=self.scale)


@contextmanager
def activated(self: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Replaces `_activate_lora` of PEFT's layer for a quantized parameter: within this context, it has the updates."""
    steps = self.get_base_layer().parametrizations[self.parameter_name]
    updates = [_Update(self, adapter) for adapter in adapters if adapter in self.lora_A]
    for update in updates:
        steps.append(update)
    try:
        yield
    finally:
        for _ in updates:
            del steps[-1]


@contextmanager
def as_plain_parameters(model: nn.Module) -> Iterator[None]:
    """Within this context, the experts that are quantized have parameters of their shape, without values, as PEFT expects them.

    PEFT would adapt the parameters of parametrized modules in another order, and name the weights of an adapter by that order.
    """
    hidden = []
    for module in model.modules():
        for name in [*getattr(module, "parametrizations", {})]:
            if computes := stored_in(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                integers: Any = module._parameters[name]
                hidden.append((module, name, integers, computes))
    for module, name, integers, computes in hidden:  # all of a module's, in their order
        one = torch.empty((), dtype=computes.dtype, device=integers.device)
        module._parameters[name] = nn.Parameter(one.expand(computes.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, integers, computes in hidden:
            module._parameters[name] = integers
            store(module, name, computes)


def merge_experts(adapted: nn.Module) -> None:
    """Add the updates of a LoRA to the experts that are quantized, and quantize the sums; PEFT would lose them."""
    from peft.tuners.lora.layer import ParamWrapper

    for layer in adapted.modules():
        if not isinstance(layer, ParamWrapper):
            continue
        module, name = layer.get_base_layer(), layer.parameter_name
        computes = stored_in(module, name)
        if computes is None:
            continue
        with torch.no_grad():
            value = layer.get_param()
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A and adapter not in layer.merged_adapters:
                    value = value + layer.get_delta_weight(adapter)
                    layer.merged_adapters.append(adapter)
            integers, again = computes.again(value)
        owner: Any = module
        steps = owner.parametrizations[name]
        steps.original.data = integers
        steps[0] = again
