"""Liger's Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for ChatGLM and GLM, which liger-kernel's own list does not have.

Each takes what torch computes in several passes over all activations in one: RMSNorm, SwiGLU and LayerNorm, forward and
backward. The two rotary embeddings are not Liger's (half of a head, neighbours in pairs; or two positions), ChatGLM-6B's
GELU is one pass already, and the loss is `head`'s, which leaves out the tokens of prompts.

Importing this module imports liger-kernel, and that Triton.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from liger_kernel.ops import LigerLayerNormFunction, LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from torch import nn
from transformers.models.glm.modeling_glm import GlmMLP, GlmRMSNorm

from glmtuner.models.modeling_chatglm2 import ChatGLM2MLP

LOSS = "fused_linear_cross_entropy"


def _rms_norm(self: GlmRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


def _layer_norm(self: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    return LigerLayerNormFunction.apply(hidden_states, self.weight, self.bias, self.eps)


def _gated(fused: torch.Tensor) -> torch.Tensor:
    """silu(gate) * gated of [..., 2 x inner], which needs no copies of the two halves; the kernel's gradient is [T, 2 x inner]."""
    return LigerFusedGateUpSiLUMulFunction.apply(fused.flatten(0, -2)).unflatten(0, fused.shape[:-1])


def _glm_mlp(self: GlmMLP, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_gated(self.gate_up_proj(hidden_states)))


def _chatglm2_mlp(self: ChatGLM2MLP, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.dense_4h_to_h(_gated(self.dense_h_to_4h(hidden_states)))


def apply_liger_kernel_to_glm(
    rms_norm: bool = True, swiglu: bool = True, layer_norm: bool = True, model: nn.Module | None = None
) -> None:
    """Let the model's norms and MLPs compute by Liger's kernels, each kind where it is True.

    Named and called as liger-kernel's functions of this kind are; those can also change a class, this changes a model.
    """
    assert model is not None
    kernels: dict[type[nn.Module], Callable[..., torch.Tensor]] = {}
    if rms_norm:
        kernels[GlmRMSNorm] = _rms_norm
    if layer_norm:
        kernels[nn.LayerNorm] = _layer_norm
    if swiglu:
        kernels[ChatGLM2MLP] = _chatglm2_mlp
        if getattr(model.config, "hidden_act", "silu") == "silu":
            kernels[GlmMLP] = _glm_mlp
    for module in model.modules():
        if (forward := kernels.get(type(module))) is not None:
            module.forward = types.MethodType(forward, module)


_before: list[tuple[types.ModuleType, dict[str, Any]]] = []  # what modules had under names that were changed


def restore_modules() -> None:
    """Let models that are built from now on be without Liger's kernels, as the next job of a sweep may be."""
    while _before:
        module, names = _before.pop()
        vars(module).update(names)


KNOWN: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("chatglm", "glm"), apply_liger_kernel_to_glm),
    **MODEL_TYPE_TO_APPLY_LIGER_FN,
}
"""What puts Liger's kernels into a model, by model_type: liger-kernel's own list, and ours where that has none."""


def kernels_for(model_type: str) -> list[str]:
    """What can be chosen for such a model; raises KeyError where there are no kernels for it."""
    return [name for name in inspect.signature(KNOWN[model_type]).parameters if name != "model"]


def enable_liger(model: nn.Module, chosen: Mapping[str, bool]) -> None:
    """Put Liger's kernels into the model, those that are `chosen`, else those liger-kernel recommends; there is no way back.

    Its loss is left out unless it is chosen: that of `head` computes no logits of the prompts' tokens either. liger-kernel's
    own functions also change the module that the model's classes stand in, and torch's; `restore_modules` undoes that.
    """
    modules = [(module, dict(vars(module))) for module in (sys.modules[type(model).__module__], nn.functional)]
    known = kernels_for(model.config.model_type)
    options = {name: value for name, value in {LOSS: False, **chosen}.items() if name in known}
    KNOWN[model.config.model_type](model=model, **options)
    for module, names in modules:
        changed = {name: value for name, value in names.items() if vars(module)[name] is not value}
        _before.append((module, changed))
