"""What a model computes, in float32: rounding to half precision hides what a fast path leaves out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtuner.distributed import accelerator
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.float16, torch.bfloat16)
PLANTED = 50.0  # in place of logits: above the values at which models cap them, and exact in half precision
LOSS_TOLERANCE = 2e-5  # of a loss of planted logits, in nats: float32's rounding


def is_exact(model: nn.Module) -> bool:
    """Whether all weights are in float32 or wider."""
    tensors = [*model.parameters(), *model.buffers()]
    return all(each.dtype not in HALF for each in tensors if each.is_floating_point()) and not _quantized(model)


def can_be_exact(model: nn.Module) -> bool:
    """Whether `in_float32` can widen the model's weights: they are whole, and neither quantized nor packed."""
    whole = all(type(each.data) is torch.Tensor for each in model.parameters())
    return whole and not _quantized(model)


def _quantized(model: nn.Module) -> bool:
    return any(not (each.is_floating_point() or each.is_complex()) for each in model.parameters())


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """The model with float32 weights within this context; afterwards it has the tensors that it had.

    Blocks are widened one at a time, while each computes; a model of 9 billion weights takes 5 GiB more for it, not 18.
    """
    blocks = [
        module
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for module in parent
        if type(module).forward is not nn.Module.forward
    ]
    inside = {id(module) for block in blocks for module in block.modules()}
    outermost = [block for block in blocks if not _is_below(block, blocks)]
    hooks = []
    widened: dict[int, list[Callable[[], None]]] = {}

    def widen(block: nn.Module, *_: Any) -> None:
        widened[id(block)] = _widened(block.modules())

    def restore(block: nn.Module, *_: Any) -> None:
        for undo in widened.pop(id(block), ()):
            undo()

    for block in outermost:
        hooks += [block.register_forward_pre_hook(widen), block.register_forward_hook(restore, always_call=True)]
    others = _widened(module for module in model.modules() if id(module) not in inside)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for undos in (*widened.values(), others):
            for undo in undos:
                undo()


def _is_below(block: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether the block is part of another."""
    return any(block is module for other in blocks if other is not block for module in other.modules())


def _widened(modules: Any) -> list[Callable[[], None]]:
    """Widen the modules' own half-precision weights and buffers; what is returned gives them back."""
    undo: list[Callable[[], None]] = []
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.dtype in HALF:
                undo.append(_restoring(tensor, tensor.data))
                tensor.data = tensor.data.float()
    return undo


def _restoring(tensor: torch.Tensor, data: torch.Tensor) -> Callable[[], None]:
    def restore() -> None:
        tensor.data = data

    return restore


def loss_problem(model: nn.Module, base: "PreTrainedModel", batch: dict[str, Any]) -> str | None:
    """What a model in training computes between its last hidden states and its loss besides its head and a cross-entropy.

    None if nothing. The head gets other logits to give than its own, as large as none of a new model; what becomes of them is
    compared with them, so that a cap, a scale or another loss is found however little it changes on this batch.
    """
    head: nn.Module = base.get_output_embeddings()
    labels = batch["labels"]
    seen: dict[str, torch.Tensor] = {}

    def keep_hidden(_: nn.Module, args: Any, out: Any) -> None:
        if (hidden := getattr(out, "last_hidden_state", None)) is not None:
            seen["hidden"] = hidden

    def plant(_: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen["read"] = args[0]
        seen["planted"] = (PLANTED - torch.arange(out.shape[-1], device=out.device) % 2).to(out.dtype).expand(out.shape)
        return seen["planted"]

    hooks = [base.base_model.register_forward_hook(keep_hidden), head.register_forward_hook(plant)]
    was_training = model.training
    device = labels.device
    try:
        model.train()
        with torch.no_grad(), accelerator.fork_rng(device):
            out = model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    planted, hidden = seen.get("planted"), seen.get("hidden")
    if planted is None or hidden is None or hidden.shape[-1] != seen["read"].shape[-1]:
        return "the output layer is not applied to the last hidden states"
    if hidden.shape != seen["read"].shape or not torch.equal(hidden.to(seen["read"].dtype), seen["read"]):
        return "the model changes its last hidden states before the output layer"
    if not torch.equal(out.logits.float(), planted.float()):
        return "the model scales or caps its logits"
    wanted = float(
        F.cross_entropy(planted[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    )
    if abs(float(out.loss) - wanted) > LOSS_TOLERANCE:
        return "the model's loss is more than the cross-entropy, as with the auxiliary loss of a router"
    return None
