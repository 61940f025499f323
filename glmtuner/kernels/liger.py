"""Liger's Triton kernels (Hsu et al. 2024, arXiv:2410.10989) for ChatGLM and GLM, which liger-kernel does not support.

Each computes in one pass over all activations what takes torch several: RMSNorm, SwiGLU and LayerNorm, forward and backward.
Not replaced are the rotary embeddings, which Liger's do not match (half of a head with adjacent pairs; or two positions),
ChatGLM-6B's GELU, which is one pass already, and the loss: chunked_loss.py computes no logits for the tokens of prompts.

Importing this module imports liger-kernel, and that Triton.
"""

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from liger_kernel.ops import LigerLayerNormFunction, LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from torch import nn
from transformers.models.glm.modeling_glm import GlmMLP, GlmRMSNorm

from glmtuner.models.modeling_chatglm2 import ChatGLM2MLP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS = "fused_linear_cross_entropy"


def _rms_norm(self: GlmRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [..., H]."""
    normed: torch.Tensor = LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False
    )
    return normed


def _layer_norm(self: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [..., H]."""
    normed: torch.Tensor = LigerLayerNormFunction.apply(hidden_states, self.weight, self.bias, self.eps)
    return normed


def _swiglu(fused: torch.Tensor) -> torch.Tensor:
    """silu(gate) * gated, [..., inner], from both halves [..., 2 x inner], which are not copied; the gradient is flat."""
    out: torch.Tensor = LigerFusedGateUpSiLUMulFunction.apply(fused.flatten(0, -2)).unflatten(0, fused.shape[:-1])
    return out


def _glm_mlp(self: GlmMLP, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [..., H]."""
    out: torch.Tensor = self.down_proj(_swiglu(self.gate_up_proj(hidden_states)))
    return out


def _chatglm2_mlp(self: ChatGLM2MLP, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [..., H]."""
    out: torch.Tensor = self.dense_4h_to_h(_swiglu(self.dense_h_to_4h(hidden_states)))
    return out


def apply_liger_kernel_to_glm(
    rms_norm: bool = True, swiglu: bool = True, layer_norm: bool = True, model: "PreTrainedModel | None" = None
) -> None:
    """Let the model's RMSNorms, SwiGLU MLPs and LayerNorms use Liger's kernels, each kind if it is True.

    Named and called like liger-kernel's functions of this kind. Those can also change classes; this changes one model.
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


_originals: list[tuple[types.ModuleType, dict[str, Any]]] = []  # modules, and the names that were changed in them


def restore_modules() -> None:
    """Undo what liger-kernel changed in modules, for models that are built afterwards, such as those of a sweep's next job."""
    while _originals:
        module, names = _originals.pop()
        vars(module).update(names)


KNOWN: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("chatglm", "glm"), apply_liger_kernel_to_glm),
    **MODEL_TYPE_TO_APPLY_LIGER_FN,
}
"""The function that puts Liger's kernels into a model, by model_type: liger-kernel's own, and ours for ChatGLM and GLM."""


def kernels_for(model_type: str) -> list[str]:
    """The names of the kernels for such a model; raises KeyError if there are none."""
    return [name for name in inspect.signature(KNOWN[model_type]).parameters if name != "model"]


def enable_liger(model: "PreTrainedModel", chosen: Mapping[str, bool]) -> None:
    """Put Liger's kernels into the model: those `chosen` by name, and liger-kernel's defaults for all others.

    The model cannot be changed back. Liger's loss is off unless it is chosen: that of chunked_loss.py computes no logits for
    the tokens of prompts. liger-kernel's own functions also change the module of the model's class, and torch's;
    `restore_modules` undoes that.
    """
    modules = [(module, dict(vars(module))) for module in (sys.modules[type(model).__module__], nn.functional)]
    names = kernels_for(model.config.model_type)
    options = {name: value for name, value in {LOSS: False, **chosen}.items() if name in names}
    KNOWN[model.config.model_type](model=model, **options)
    for module, originals in modules:
        changed = {name: value for name, value in originals.items() if vars(module)[name] is not value}
        _originals.append((module, changed))
