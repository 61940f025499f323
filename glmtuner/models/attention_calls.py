"""What the attention functions of a model are given: which layers call them, with how many heads of which widths.

Names in config.json do not tell: keys and values may differ in width (multi-head latent attention), heads be shared by all
queries (multi-query attention) or differ between layers, and only some layers of a hybrid have attention at all.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RECORDED = "recorded"  # the name of the attention function that records and computes nothing
EXPERTS = "batched_mm"  # experts by matrix products that can be traced without values in every dtype
# What tracing raises where the forward pass depends on values, or a kernel does not know tensors without memory.
UNTRACED = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """A layer's call of the attention function: its module's path, and the numbers and widths of its heads.

    `heads` are those of keys and values, each of which `groups` heads of queries share.
    """

    module: str
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    learns: bool = True  # does a gradient of the logits reach it?


def attention_calls(model: "PreTrainedModel") -> list[AttentionCall]:
    """The calls in a forward pass of two tokens, in their order; empty where no layer calls transformers' AttentionInterface.

    Traced without values, on a model of the same class and config; where the forward pass depends on values, on the model
    itself. Raises ConfigError where that has no values either.
    """
    try:
        return traced_calls(type(model), model.config)
    except UNTRACED as error:
        if model.device.type == "meta":
            reason = (
                f"its forward pass depends on values ({_told(error)}); start the run itself, with trainer.max_steps=2"
            )
            raise ConfigError(
                f"finetuning=p_tuning: the heads of {type(model).__name__} cannot be read without its weights, since {reason}"
            ) from error
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.config._attn_implementation = RECORDED
    try:
        return _recorded_calls(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))
    except UNTRACED as error:
        raise ConfigError(
            f"finetuning=p_tuning: the heads of {type(model).__name__} cannot be read ({_told(error)}); type finetuning=lora"
        ) from error
    finally:
        model.config._attn_implementation = before
        model.train(training)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def traced_calls(
    build: "Callable[[PreTrainedConfig], PreTrainedModel]", config: "PreTrainedConfig"
) -> list[AttentionCall]:
    """The calls of the model that `build` makes from a config, on tensors that have shapes and no memory.

    Raises one of UNTRACED where the forward pass depends on values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # every class has it, and none of its code runs
    config._experts_implementation = EXPERTS
    with FakeTensorMode(), torch.device("cpu"):
        model = build(config).eval()
        model.config._attn_implementation = RECORDED
        return _recorded_calls(model, torch.zeros(1, 2, dtype=torch.long))


@contextmanager
def _recording(record: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, RECORDED is an attention function, in the models' own files too."""
    AttentionInterface.register(RECORDED, record)
    AttentionMaskInterface.register(RECORDED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])  # always a mask
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(RECORDED)
        AttentionMaskInterface._global_mapping.pop(RECORDED)


def _recorded_calls(model: "PreTrainedModel", ids_BQ: torch.Tensor) -> list[AttentionCall]:
    paths = {module: path for path, module in model.named_modules()}
    calls: dict[str, AttentionCall] = {}
    probes: dict[str, torch.Tensor] = {}  # whether a gradient reaches a layer's attention

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        path = paths[module]
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        call = AttentionCall(module=path, heads=heads, groups=groups, key_dim=key.shape[-1], value_dim=value.shape[-1])
        if calls.setdefault(path, call) != call:
            raise ValueError(f"{path} calls attention with keys and values of unlike sizes")
        probe = probes.setdefault(path, query.new_zeros((), requires_grad=True))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]) + probe, None

    with _recording(record), torch.enable_grad():
        logits: torch.Tensor = model(input_ids=ids_BQ, use_cache=False).logits
        if not calls:
            return []
        gradients = torch.autograd.grad(logits.float().sum(), list(probes.values()), allow_unused=True)
    return [
        AttentionCall(**{**vars(call), "learns": gradient is not None})
        for call, gradient in zip(calls.values(), gradients, strict=True)
    ]
