"""The prefix of P-Tuning v2 (Liu et al. 2022, arXiv:2110.07602): its encoder, and attention functions that include it.

Shape letters: B batch, M prefix tokens, H query heads, G key-value heads, D head dimension, Q query tokens, K key tokens. Keys and
values may differ in D, and layers in G and D.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.errors import ConfigError
from glmtuner.models.attention_calls import AttentionCall, attention_calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glmtuner.config.groups import ModelFamily

PREFIXED = "prefix|"  # prefix|sdpa is sdpa with the prefix


class PrefixEncoder(nn.Module):
    """The prefix's keys and values, one layer at a time.

    Without projection an embedding holds all of them, a row for each prefix token: the keys of the first layer, [G * D], its
    values, and so on for the other layers. With projection an embedding goes through a two-layer MLP, of which each layer
    computes its own slice: no graph is shared between layers, so every kind of gradient checkpointing works. The embedding is
    as wide as the hidden size or, if `wide`, as the output: in this the published code of ChatGLM-6B and of ChatGLM2 differ.
    """

    def __init__(
        self, calls: Sequence[AttentionCall], *, tokens: int, hidden: int, projection: bool, wide: bool, dropout: float
    ) -> None:
        super().__init__()
        self.tokens, self.calls = tokens, tuple(calls)
        ends = list(accumulate((call.heads * (call.key_dim + call.value_dim) for call in calls), initial=0))
        self.rows = [slice(*bounds) for bounds in pairwise(ends)]  # of each layer
        width = ends[-1]
        embedding_width = hidden if projection and not wide else width
        self.embedding = nn.Embedding(tokens, embedding_width)
        self.trans: nn.Sequential | None = None
        if projection:
            self.trans = nn.Sequential(nn.Linear(embedding_width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def folded(self) -> torch.Tensor:
        """All layers' keys and values without dropout, as wide as the embedding without projection: PEFT's form of a prefix."""
        folded: torch.Tensor = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        return folded

    def forward(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [G, M, D]."""
        call, rows = self.calls[layer], self.rows[layer]
        if self.trans is None:
            slots = self.embedding.weight[:, rows]
        else:
            first, tanh, last = self.trans
            assert isinstance(last, nn.Linear)
            slots = nn.functional.linear(tanh(first(self.embedding.weight)), last.weight[rows], last.bias[rows])
        keys, values = self.dropout(slots).split([call.heads * call.key_dim, call.heads * call.value_dim], dim=1)
        return (
            keys.view(self.tokens, call.heads, call.key_dim).transpose(0, 1),
            values.view(self.tokens, call.heads, call.value_dim).transpose(0, 1),
        )


def add_prefix(
    model: "PreTrainedModel", family: "ModelFamily", *, tokens: int, projection: bool, dropout: float
) -> PrefixEncoder:
    """Add a prefix of `tokens` tokens to the model, as `model.prefix_encoder`, and include it in attention.

    Each layer's keys and values have the heads and widths that its attention function is given. Raises ConfigError for a model
    whose attention functions cannot be replaced, or where a prefix would not be learned.
    """
    calls = attention_calls(model)
    check_calls(type(model).__name__, calls)
    encoder = PrefixEncoder(
        calls,
        tokens=tokens,
        hidden=model.config.get_text_config().hidden_size,
        projection=projection,
        wide=family.wide_prefix,
        dropout=dropout,
    ).to(model.device)
    _use_prefixed_attention(model, calls)
    model.prefix_encoder = encoder
    for layer, call in enumerate(calls):
        # past nn.Module's own __setattr__: the encoder is registered once, on the model, not in every attention
        object.__setattr__(model.get_submodule(call.module), "prefix", _LayerPrefix(encoder, layer))
    return encoder


def check_calls(name: str, calls: Sequence[AttentionCall]) -> None:
    """Raise ConfigError unless a prefix can be added to the attention of a model of class `name`, and be learned."""
    if not calls:
        raise ConfigError(
            f"finetuning=p_tuning: no layer of {name} computes attention through transformers' AttentionInterface (it has recurrent "
            "states, or attention in its own code), so there are no keys and values to add a prefix to; type finetuning=lora"
        )
    idle = [call.module for call in calls if not call.learns]
    if idle:
        raise ConfigError(
            f"finetuning=p_tuning: no gradient of the loss of {name} reaches the attention in {idle[0]}"
            f"{f' and {len(idle) - 1} more' if len(idle) > 1 else ''}, so a prefix there would not be learned; type finetuning=lora"
        )


class _LayerPrefix:
    """A function without arguments that returns one layer's keys and values, each [G, M, D]."""

    def __init__(self, encoder: PrefixEncoder, layer: int) -> None:
        self.encoder, self.layer = encoder, layer

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.encoder(self.layer)
        return keys, values


def _use_prefixed_attention(model: "PreTrainedModel", calls: Sequence[AttentionCall]) -> None:
    """Register the model's attention function with the prefix under a name of its own, and select it."""
    base = model.config._attn_implementation or "eager"
    if base.startswith(PREFIXED):
        return
    for call in calls:
        if _attention_of(model.get_submodule(call.module), base) is None:
            raise ConfigError(
                f"finetuning=p_tuning: {type(model).__name__} has an eager attention of its own, where a prefix cannot be added; "
                "type finetuning=lora"
            )
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ConfigError(
            f"finetuning=p_tuning: transformers has no masks for attention {base!r}; type finetuning=lora"
        )
    name = f"{PREFIXED}{base}"
    AttentionInterface.register(name, _prefixed(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    # not set_attn_implementation, which looks up a name with "flash" in it as a kernel on the hub
    model.config._attn_implementation = name


def _attention_of(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The attention function of that name that a module would call; None where its file has none.

    Eager attention stands in the model's own file, which may also have an AttentionInterface of its own.
    """
    file = vars(sys.modules[type(module).__module__])
    if name == "eager":
        found: Callable[..., Any] | None = file.get("eager_attention_forward")
        return found
    interface: AttentionInterface = file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return interface.get(name)


def _prefixed(base: str) -> Callable[..., Any]:
    """The attention function named `base` with the prefix prepended to keys and values."""
    causal_from_right = "flash" in base  # its causal mask is aligned to the lower right; a prefix needs no mask then

    def attend_with_prefix(
        module: nn.Module,
        query_BHQD: torch.Tensor,
        key_BGKD: torch.Tensor,
        value_BGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        attention = _attention_of(module, base)
        assert attention is not None
        prefix = getattr(module, "prefix", None)
        if prefix is not None:
            keys, values = (part.to(key_BGKD.dtype).expand(key_BGKD.shape[0], -1, -1, -1) for part in prefix())
            # latent attention widens values to the keys' width for kernels that want one width, and cuts the result
            values = nn.functional.pad(values, (0, value_BGKD.shape[-1] - values.shape[-1]))
            if attention_mask is not None or not causal_from_right:
                attention_mask = widen_mask(attention_mask, keys.shape[2], query_BHQD.shape[2], key_BGKD)
            key_BGKD = torch.cat([keys, key_BGKD], dim=2)
            value_BGKD = torch.cat([values, value_BGKD], dim=2)
        if base == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:  # which adds its mask
            blocked = torch.finfo(query_BHQD.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=query_BHQD.dtype).masked_fill(
                ~attention_mask, blocked
            )
        return attention(module, query_BHQD, key_BGKD, value_BGKD, attention_mask, **options)

    return attend_with_prefix


def widen_mask(
    mask: torch.Tensor | None, prefix_tokens: int, query_tokens: int, key_BGKD: torch.Tensor
) -> torch.Tensor | None:
    """The mask with `prefix_tokens` visible columns prepended, [..., Q, prefix_tokens + K].

    No mask means causal attention for several query tokens. SDPA aligns that to the upper left, where a prefix would shift
    it, so it becomes a mask; a single query token sees everything and needs none. A single column stands for all of them.
    """
    if mask is None:
        if query_tokens == 1:
            return None
        visible = torch.ones(query_tokens, key_BGKD.shape[2], dtype=torch.bool, device=key_BGKD.device)
        mask = visible.tril(diagonal=max(key_BGKD.shape[2] - query_tokens, 0))[None, None]
    if mask.dim() == 4 and mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], key_BGKD.shape[2])
    visible_value = True if mask.dtype == torch.bool else (0.0 if mask.dim() == 4 else 1)
    return nn.functional.pad(mask, (prefix_tokens, 0), value=visible_value)
