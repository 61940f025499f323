"""The prefix of P-Tuning v2 (Liu et al. 2022, arXiv:2110.07602): its encoder, and attention functions that include it.

Shape letters: B batch, M prefix tokens, L layers, H query heads, G key-value heads, D head dimension, Q query tokens, K key tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glmtuner.config.groups import ModelFamily

PREFIXED = "prefix|"  # prefix|sdpa is sdpa with the prefix


class PrefixEncoder(nn.Module):
    """The prefix's keys and values, one layer at a time.

    Without projection an embedding holds all of them, [M, L * 2 * G * D]: slot 2l has the keys of layer l, slot 2l + 1 its
    values. With projection an embedding goes through a two-layer MLP, of which each layer computes its own slice: no graph
    is shared between layers, so every kind of gradient checkpointing works. The embedding is as wide as the hidden size or,
    if `wide`, as the output: in this the published code of ChatGLM-6B and of ChatGLM2 differ.
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
        embedding_width = hidden if projection and not wide else width
        self.embedding = nn.Embedding(tokens, embedding_width)
        self.trans: nn.Sequential | None = None
        if projection:
            self.trans = nn.Sequential(nn.Linear(embedding_width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def folded(self) -> torch.Tensor:
        """All layers' keys and values without dropout, [M, L * 2 * G * D]: the form in which PEFT stores a prefix."""
        folded: torch.Tensor = self.embedding.weight if self.trans is None else self.trans(self.embedding.weight)
        return folded

    def forward(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [G, M, D]."""
        rows = slice(layer_id * self.layer_width, (layer_id + 1) * self.layer_width)
        if self.trans is None:
            slots = self.embedding.weight[:, rows]
        else:
            first, tanh, last = self.trans
            assert isinstance(last, nn.Linear)
            slots = nn.functional.linear(tanh(first(self.embedding.weight)), last.weight[rows], last.bias[rows])
        slots = self.dropout(slots).view(self.tokens, 2, self.heads, self.head_dim)
        keys, values = slots.permute(1, 2, 0, 3)
        return keys, values


def add_prefix(
    model: "PreTrainedModel", family: "ModelFamily", *, tokens: int, projection: bool, dropout: float
) -> PrefixEncoder:
    """Add a prefix of `tokens` tokens to the model, as `model.prefix_encoder`, and include it in attention.

    Raises ConfigError for a model whose attention functions cannot be replaced.
    """
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(
            f"finetuning=p_tuning: {type(model).__name__} has multi-head latent attention (kv_lora_rank={config.kv_lora_rank}), "
            "where keys and values differ in width and no prefix can be added; type finetuning=lora"
        )
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
        # past nn.Module's own __setattr__: the encoder is registered once, on the model, not in every attention
        object.__setattr__(attention, "prefix", _LayerPrefix(encoder, layer_id))
    _use_prefixed_attention(model)
    return encoder


class _LayerPrefix:
    """A function without arguments that returns one layer's keys and values, each [G, M, D]."""

    def __init__(self, encoder: PrefixEncoder, layer_id: int) -> None:
        self.encoder, self.layer_id = encoder, layer_id

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.encoder(self.layer_id)
        return keys, values


def _use_prefixed_attention(model: "PreTrainedModel") -> None:
    """Register the model's attention function with the prefix under a name of its own, and select it."""
    base = model.config._attn_implementation or "eager"
    if base.startswith(PREFIXED):
        return
    name = f"{PREFIXED}{base}"
    if base == "eager":
        raise ConfigError(
            "finetuning=p_tuning: this model has only its own eager attention, where a prefix cannot be added; type "
            "finetuning=lora"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"finetuning=p_tuning: {type(model).__name__} computes attention in its own code, where a prefix cannot be "
            "added; type finetuning=lora"
        )
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ConfigError(
            f"finetuning=p_tuning: transformers has no masks for attention {base!r}; type finetuning=lora"
        )
    AttentionInterface.register(name, _prefixed(ALL_ATTENTION_FUNCTIONS[base], causal_from_right="flash" in base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    # not set_attn_implementation, which looks up a name with "flash" in it as a kernel on the hub
    model.config._attn_implementation = name


def _prefixed(attention: Callable[..., Any], causal_from_right: bool) -> Callable[..., Any]:
    """The attention function with the prefix prepended to keys and values.

    `causal_from_right`: its causal mask is aligned to the lower right, as flash attention's is; a prefix needs no mask then.
    """

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
                attention_mask = widen_mask(attention_mask, keys.shape[2], query_BHQD.shape[2], key_BGKD)
            key_BGKD = torch.cat([keys, key_BGKD], dim=2)
            value_BGKD = torch.cat([values, value_BGKD], dim=2)
        return attention(module, query_BHQD, key_BGKD, value_BGKD, attention_mask, **options)

    return attend_with_prefix


def widen_mask(
    mask: torch.Tensor | None, prefix_tokens: int, query_tokens: int, key_BGKD: torch.Tensor
) -> torch.Tensor | None:
    """The mask with `prefix_tokens` visible columns prepended, [..., Q, prefix_tokens + K].

    No mask means causal attention for several query tokens. SDPA aligns that to the upper left, where a prefix would shift
    it, so it becomes a mask; a single query token sees everything and needs none.
    """
    if mask is None:
        if query_tokens == 1:
            return None
        visible = torch.ones(query_tokens, key_BGKD.shape[2], dtype=torch.bool, device=key_BGKD.device)
        mask = visible.tril(diagonal=max(key_BGKD.shape[2] - query_tokens, 0))[None, None]
    visible_value = True if mask.dtype == torch.bool else (0.0 if mask.dim() == 4 else 1)
    return nn.functional.pad(mask, (prefix_tokens, 0), value=visible_value)
