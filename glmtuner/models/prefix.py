"""The prefix of P-Tuning v2 as modules, and the attention functions that see it.

Shape letters: B batch, M prefix tokens, L layers, G key-value heads, D head dimension, Q query tokens, K key tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from glmtuner.families.family import Family

PREFIXED = "prefix|"  # prefix|sdpa is sdpa that sees the prefix


class PrefixEncoder(nn.Module):
    """Keys and values of the prefix, a layer at a time.

    Without projection an embedding holds them all, [M, L * 2 * G * D], slot 2l the keys of layer l and slot 2l + 1 its
    values. With projection an embedding goes through a two-layer MLP; each layer computes its own slice, so that no graph
    is shared between layers and every kind of gradient checkpointing works. The embedding is as wide as the hidden size,
    or, where `wide`, as what comes out: the published code of ChatGLM-6B and of ChatGLM2 differ in that.
    """

    def __init__(
        self,
        *,
        tokens: int,
        layers: int,
        heads: int,
        head_dim: int,
        hidden: int,
        projection: bool,
        wide: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens, self.layers, self.heads, self.head_dim = tokens, layers, heads, head_dim
        self.layer_width = 2 * heads * head_dim
        width = layers * self.layer_width
        embedded = hidden if projection and not wide else width
        self.embedding = nn.Embedding(tokens, embedded)
        self.trans = (
            nn.Sequential(nn.Linear(embedded, hidden), nn.Tanh(), nn.Linear(hidden, width)) if projection else None
        )
        self.dropout = nn.Dropout(dropout)

    def folded(self) -> torch.Tensor:
        """All layers' keys and values without dropout, [M, L * 2 * G * D]: what PEFT stores of a prefix."""
        embedded = self.embedding.weight
        return self.trans(embedded) if self.trans is not None else embedded

    def forward(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [G, M, D]."""
        rows = slice(layer_id * self.layer_width, (layer_id + 1) * self.layer_width)
        if self.trans is None:
            slots = self.embedding.weight[:, rows]
        else:
            first, tanh, last = self.trans
            slots = nn.functional.linear(tanh(first(self.embedding.weight)), last.weight[rows], last.bias[rows])
        slots = self.dropout(slots).view(self.tokens, 2, self.heads, self.head_dim)
        keys, values = slots.permute(1, 2, 0, 3)
        return keys, values


def add_prefix(model: nn.Module, family: "Family", *, tokens: int, projection: bool, dropout: float) -> PrefixEncoder:
    """Give the model a prefix, as `model.prefix_encoder`; its attention sees it from now on."""
    config = model.config.get_text_config()
    blocks = family.blocks(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    encoder = PrefixEncoder(
        tokens=tokens,
        layers=len(blocks),
        heads=heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        projection=projection,
        wide=family.wide_prefix,
        dropout=dropout,
    ).to(model.device)
    model.prefix_encoder = encoder
    for layer_id, block in enumerate(blocks):
        attention = block.get_submodule(family.attention_block)
        # not a submodule of the attention: the encoder is registered once, on the model
        object.__setattr__(attention, "prefix", _LayerPrefix(encoder, layer_id))
    _use_prefixed_attention(model)
    return encoder


class _LayerPrefix:
    """Calling it gives one layer's keys and values."""

    def __init__(self, encoder: PrefixEncoder, layer_id: int) -> None:
        self.encoder, self.layer_id = encoder, layer_id

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(self.layer_id)


def _use_prefixed_attention(model: nn.Module) -> None:
    base = model.config._attn_implementation or "eager"
    if base.startswith(PREFIXED):
        return
    name = f"{PREFIXED}{base}"
    if base == "eager":
        raise ConfigError("finetuning=p_tuning: this model has no attention but its own eager one; use finetuning=lora")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"finetuning=p_tuning: {type(model).__name__} computes attention in code of its own, where a prefix cannot be "
            "added; type finetuning=lora"
        )
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ConfigError(f"finetuning=p_tuning: no masks are known for attention {base!r}; use finetuning=lora")
    AttentionInterface.register(name, _prefixed(ALL_ATTENTION_FUNCTIONS[base], causal_from_right="flash" in base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.config._attn_implementation = name


def _prefixed(attend: Callable[..., Any], causal_from_right: bool) -> Callable[..., Any]:
    """`attend` with the prefix; flash attention aligns causality to the lower right, where a prefix changes nothing."""

    def attend_with_prefix(
        module: nn.Module,
        query_BHQD: torch.Tensor,
        key_BGKD: torch.Tensor,
        value_BGKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> Any:
        prefix = getattr(module, "prefix", None)
        if prefix is not None:
            keys, values = (part.to(key_BGKD.dtype).expand(key_BGKD.shape[0], -1, -1, -1) for part in prefix())
            if attention_mask is not None or not causal_from_right:
                attention_mask = widened(attention_mask, keys.shape[2], query_BHQD.shape[2], key_BGKD)
            key_BGKD = torch.cat([keys, key_BGKD], dim=2)
            value_BGKD = torch.cat([values, value_BGKD], dim=2)
        return attend(module, query_BHQD, key_BGKD, value_BGKD, attention_mask, **options)

    return attend_with_prefix


def widened(
    mask: torch.Tensor | None, prefix_tokens: int, query_tokens: int, key_BGKD: torch.Tensor
) -> torch.Tensor | None:
    """The mask with `prefix_tokens` visible columns in front.

    No mask means causal attention for several query tokens, which SDPA aligns to the upper left and a prefix would
    shift, so it is spelled out; a single query token sees everything anyway.
    """
    if mask is None:
        if query_tokens == 1:
            return None
        seen = torch.ones(query_tokens, key_BGKD.shape[2], dtype=torch.bool, device=key_BGKD.device)
        mask = seen.tril(diagonal=max(key_BGKD.shape[2] - query_tokens, 0))[None, None]
    visible = True if mask.dtype == torch.bool else (0.0 if mask.dim() == 4 else 1)
    return nn.functional.pad(mask, (prefix_tokens, 0), value=visible)
