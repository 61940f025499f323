"""One linear layer under the LoRA adapters of several trainings: each adapts its own range of the tokens of a row.

The frozen product is computed once for the tokens of all trainings, forward and backward; the low-rank products (Hu et al. 2021,
arXiv:2106.09685) of each adapter take, and give gradients to, the tokens of its own training alone. S-LoRA (Sheng et al. 2023,
arXiv:2311.03285) and mLoRA (Ye et al. 2023, arXiv:2312.02515) put adapters side by side so, to answer and to train.

Shape letters: T tokens of all trainings together, N tokens of one, I inputs, O outputs, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtuner.distributed import accelerator

PLAIN = (nn.Dropout, nn.Identity)


class Draws:
    """The random state that a training draws its dropout from: that of torch's own generators in a run of its own."""

    def __init__(self, cpu: torch.Tensor | None = None, device: torch.Tensor | None = None) -> None:
        self.generator = torch.Generator()
        self.device_state = device  # of the GPU's generator; None on a CPU
        if cpu is not None:
            self.generator.set_state(cpu)

    def states(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states of the CPU's generator and of the GPU's."""
        return self.generator.get_state(), self.device_state

    def keep_mask(self, like: torch.Tensor, p: float) -> torch.Tensor:
        """1 / (1 - p) where an input is kept and 0 where it is dropped, of the shape and from the draws of `F.dropout`."""
        if like.device.type == "cpu":
            return torch.empty_like(like).bernoulli_(1 - p, generator=self.generator).div_(1 - p)
        device = accelerator.default_generator(like.device)
        outer = device.get_state()
        if self.device_state is not None:
            device.set_state(self.device_state)
        mask = F.dropout(torch.ones_like(like), p)
        self.device_state = device.get_state()
        device.set_state(outer)
        return mask


@dataclass
class Seat:
    """A training's place in the shared layers: its draws, and the tokens of the row in this forward pass that are its own."""

    draws: Draws = field(default_factory=Draws)
    tokens: slice = field(default_factory=lambda: slice(0, 0))


@dataclass(frozen=True)
class Adapter:
    """A LoRA of one layer: A, [R, I], B, [O, R], and the scale and the dropout of PEFT's layer."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    dropout: float

    @classmethod
    def of(cls, layer: Any, name: str = "default") -> "Adapter":
        """The adapter of PEFT's layer."""
        dropout = layer.lora_dropout[name]
        share = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
        return cls(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), share)


def shared_layers_problem(model: nn.Module) -> str | None:
    """Why the adapters of a model that PEFT adapted cannot share layers; None where all that is trained is plain LoRA."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    factors = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        is_linear = isinstance(layer, Linear) or hasattr(layer.base_layer, "in_features")
        names = [*layer.lora_A]
        if not is_linear or len(names) != 1 or getattr(layer, "fan_in_fan_out", False):
            return f"{path} is no linear layer with one LoRA"
        if layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
            return f"{path} has more than a plain LoRA"
        if not isinstance(layer.lora_dropout[names[0]], PLAIN):
            return f"{path} has a dropout of its own kind"
        factors |= {layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight}
    beside = [name for name, value in model.named_parameters() if value.requires_grad and value not in factors]
    return f"{beside[0]} is trained beside the LoRA" if beside else None if factors else "there is no LoRA"


class SharedLinear(nn.Module):
    """The base's layer under the adapters of all seats: x of all tokens, [..., I] -> [..., O]."""

    def __init__(self, base: nn.Module, recomputing: "Recomputing") -> None:
        super().__init__()
        self.base = base
        self.adapters: dict[int, tuple[Seat, Adapter]] = {}  # by the id of the seat
        self.recomputing = recomputing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        if x_TI.shape[0] != self.recomputing.tokens:
            raise NotImplementedError("a layer with LoRA gets other tokens than those of the row")
        used = [(seat, adapter) for seat, adapter in self.adapters.values() if seat.tokens.stop > seat.tokens.start]
        weight, bias = self.base._parameters.get("weight"), self.base._parameters.get("bias")
        autocast = torch.is_autocast_enabled(x.device.type)
        of_adapters = used[0][1].a_RI.dtype if used else x.dtype
        fuses = type(self.base) is nn.Linear and (
            autocast or all(value is None or value.dtype == x.dtype == of_adapters for value in (weight, bias))
        )
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else of_adapters
        lora_x_TI = x_TI.to(dtype)
        drawn_as = x_TI if autocast and not fuses else lora_x_TI  # as PEFT's layer draws
        tensors: list[torch.Tensor | None] = []
        for seat, adapter in used:
            mask = (
                self.recomputing.mask(self, seat, drawn_as[seat.tokens], adapter.dropout)
                if adapter.dropout and self.training
                else None
            )
            tensors += [adapter.a_RI.to(dtype), adapter.b_OR.to(dtype), mask if mask is None else mask.to(dtype)]
        parts = [(seat.tokens, adapter.scale) for seat, adapter in used]
        if fuses:
            frozen = [value if value is None else value.to(dtype) for value in (weight, bias)]
            out_TO = _SharedLinear.apply(lora_x_TI, *frozen, parts, *tensors)
        else:
            out_TO = self.base(x).reshape(x_TI.shape[0], -1)
            if used:
                out_TO = out_TO + _Updates.apply(lora_x_TI, out_TO.shape[1], parts, *tensors).to(out_TO.dtype)
        out: torch.Tensor = out_TO.view(*x.shape[:-1], -1)
        return out


class Recomputing:
    """What the shared layers know of a pass: its number of tokens, and whether activation checkpointing computes it again.

    A layer that is computed again, in the backward pass, drops the inputs that it dropped before.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.keeps_states = False  # activation checkpointing is on
        self.in_backward = False
        self.states: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def mask(self, layer: nn.Module, seat: Seat, like: torch.Tensor, p: float) -> torch.Tensor:
        """The mask that the seat draws for these inputs, [N, I]."""
        if not self.keeps_states:
            return seat.draws.keep_mask(like, p)
        key = (id(layer), id(seat))
        if not self.in_backward:
            self.states[key] = seat.draws.states()
            return seat.draws.keep_mask(like, p)
        return Draws(*self.states[key]).keep_mask(like, p)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The context of the backward pass."""
        self.in_backward = True
        try:
            yield
        finally:
            self.in_backward = False
            self.states.clear()


Parts = Sequence[tuple[slice, float]]  # the tokens and the scale of each adapter


def _factors(tensors: Sequence[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(A, B, dropout's mask or None) of each adapter."""
    return ((tensors[at], tensors[at + 1], tensors[at + 2]) for at in range(0, len(tensors), 3))


def _add_updates(out_TO: torch.Tensor, x_TI: torch.Tensor, parts: Parts, tensors: Sequence[Any]) -> list[torch.Tensor]:
    """Add each adapter's update to its tokens of the output, in place; returns the products with A, each [N, R]."""
    downs = []
    for (tokens, scale), (a_RI, b_OR, mask_NI) in zip(parts, _factors(tensors), strict=True):
        x_NI = x_TI[tokens] if mask_NI is None else x_TI[tokens] * mask_NI
        down_NR = x_NI @ a_RI.t()
        out_TO[tokens].addmm_(down_NR, b_OR.t(), alpha=scale)
        downs.append(down_NR)
    return downs


def _gradients(
    ctx: Any, out_grad_TO: torch.Tensor, x_grad_TI: torch.Tensor | None, first: int
) -> list[torch.Tensor | None]:
    """The gradients of (A, B, mask) of each adapter; what its tokens' inputs get from them is added to `x_grad_TI` in place."""
    x_TI, *saved = ctx.saved_tensors
    tensors, downs = saved[: ctx.count], saved[ctx.count :]
    gradients: list[torch.Tensor | None] = []
    for number, ((tokens, scale), (a_RI, b_OR, mask_NI), down_NR) in enumerate(
        zip(ctx.parts, _factors(tensors), downs, strict=True)
    ):
        needs_a, needs_b = ctx.needs_input_grad[first + 3 * number], ctx.needs_input_grad[first + 3 * number + 1]
        out_grad_NO = out_grad_TO[tokens]
        if b_OR.device.type == "cpu":  # a product with so few columns takes twice as long with those far apart
            b_OR = b_OR.t().contiguous().t()
        down_grad_NR = (out_grad_NO @ b_OR).mul_(scale)
        if x_grad_TI is not None:
            if mask_NI is None:
                x_grad_TI[tokens].addmm_(down_grad_NR, a_RI)
            else:
                x_grad_TI[tokens].addcmul_(down_grad_NR @ a_RI, mask_NI)
        x_NI = x_TI[tokens] if mask_NI is None else x_TI[tokens] * mask_NI
        gradients.append(down_grad_NR.t() @ x_NI if needs_a else None)
        gradients.append((down_NR.t() @ out_grad_NO).mul_(scale).t() if needs_b else None)
        gradients.append(None)
    return gradients


def _save(ctx: Any, x_TI: torch.Tensor, parts: Parts, tensors: Sequence[Any], downs: Sequence[torch.Tensor]) -> None:
    ctx.parts, ctx.count = parts, len(tensors)
    ctx.save_for_backward(x_TI, *tensors, *downs)


class _SharedLinear(torch.autograd.Function):
    """x W' + b, [T, O], and for each adapter scale (x A') B' at its tokens; the frozen weight gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, parts: Parts, *tensors: Any
    ) -> torch.Tensor:
        out_TO = F.linear(x_TI, weight_OI, bias_O)
        _save(ctx, x_TI, parts, tensors, _add_updates(out_TO, x_TI, parts, tensors))
        ctx.weight = weight_OI
        return out_TO

    @staticmethod
    def backward(ctx: Any, out_grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad_TI = out_grad_TO @ ctx.weight if ctx.needs_input_grad[0] else None
        return x_grad_TI, None, None, None, *_gradients(ctx, out_grad_TO, x_grad_TI, 4)


class _Updates(torch.autograd.Function):
    """scale (x A') B' of each adapter at its tokens, [T, O], 0 elsewhere: beside a layer with a product of its own."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, outputs: int, parts: Parts, *tensors: Any) -> torch.Tensor:
        out_TO = x_TI.new_zeros(x_TI.shape[0], outputs)
        _save(ctx, x_TI, parts, tensors, _add_updates(out_TO, x_TI, parts, tensors))
        return out_TO

    @staticmethod
    def backward(ctx: Any, out_grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI = ctx.saved_tensors[0]
        x_grad_TI = torch.zeros_like(x_TI) if ctx.needs_input_grad[0] else None
        return x_grad_TI, None, None, *_gradients(ctx, out_grad_TO, x_grad_TI, 3)


class SharedLayers:
    """The layers of a base model that seats adapt; the model's modules are replaced as adapters come."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.recomputing = Recomputing()
        self.layers: dict[str, SharedLinear] = {}

    def add(self, seat: Seat, adapters: Mapping[str, Adapter]) -> None:
        """Let the seat's adapters, by the paths of their layers in the base, change its tokens."""
        for path, adapter in adapters.items():
            if path not in self.layers:
                parent, _, name = path.rpartition(".")
                owner = self.base.get_submodule(parent)
                self.layers[path] = SharedLinear(getattr(owner, name), self.recomputing)
                setattr(owner, name, self.layers[path])
            self.layers[path].adapters[id(seat)] = (seat, adapter)

    def remove(self, seat: Seat) -> None:
        """Take the seat's adapters out; the base's layers stay wrapped."""
        for layer in self.layers.values():
            layer.adapters.pop(id(seat), None)


def adapters_of(base: nn.Module) -> dict[str, Adapter]:
    """The adapters of PEFT's layers by their paths in `base`, the model inside of PEFT's wrapper."""
    return {
        path: Adapter.of(layer, next(iter(layer.lora_A)))
        for path, layer in base.named_modules()
        if hasattr(layer, "lora_A")
    }
