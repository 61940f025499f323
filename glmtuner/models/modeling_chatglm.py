"""ChatGLM-6B (2023): a prefix decoder, bidirectional in its context and causal in its answer.

A row is `context … [gMASK] <sop> answer … <eop>`. The context, everything before <sop>, is visible to every token; from
<sop> on attention is causal. Positions are two-dimensional: the first counts the context and then stays at the position of
the mask token, the second is 0 in the context and counts from <sop> on (GLM, Du et al. 2022, arXiv:2103.10360).

Shape letters: B batch, S tokens, K tokens in keys and values, N heads, D head dimension, H hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_tracing
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from glmtuner.models.configuration_chatglm import ChatGLMConfig
from glmtuner.models.prequantized import PreQuantizedModel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ALPHA = (2 * 28) ** 0.5  # scale of the residual branches: 28 for any number of layers, as in the published code


def positions(
    input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """Position ids: [B, 2, S], or [B, S] if `position_encoding_2d` is off; 0 on padding.

    Raises ValueError for a row without <sop>, or with neither [gMASK] nor [MASK]: its context has no end.
    """
    length = input_ids_BS.shape[1]
    index_S = torch.arange(length, device=input_ids_BS.device)
    sop_B1 = _first_index(input_ids_BS == config.sop_token_id, "<sop>", config.sop_token_id)[:, None]
    is_gmask_BS = input_ids_BS == config.gmask_token_id
    has_gmask_B1 = is_gmask_BS.any(1, keepdim=True)
    is_blank_BS = torch.where(has_gmask_B1, is_gmask_BS, input_ids_BS == config.mask_token_id)
    blank_B1 = _first_index(is_blank_BS, "[gMASK] or [MASK]", config.gmask_token_id)[:, None]
    if attention_mask_BS is None:
        left_padding_B1 = torch.zeros_like(sop_B1)
        is_token_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    else:
        is_token_BS = attention_mask_BS.bool()
        left_padding_B1 = is_token_BS.int().argmax(1, keepdim=True)
    in_context_BS = index_S < sop_B1
    if config.position_encoding_2d:
        sequence_BS = torch.where(in_context_BS, index_S, blank_B1) - left_padding_B1
        block_BS = torch.where(in_context_BS, 0, index_S - sop_B1 + 1)
        return torch.stack([sequence_BS, block_BS], dim=1) * is_token_BS[:, None]
    # after a short blank, [MASK], the position stays at the blank; after a long one, [gMASK], it counts on
    at_blank_BS = ~has_gmask_B1 & ~in_context_BS
    return (torch.where(at_blank_BS, blank_B1, index_S) - left_padding_B1) * is_token_BS


def _first_index(is_match_BS: torch.Tensor, token: str, token_id: int) -> torch.Tensor:
    """The index of the first match in each row, [B]; raises ValueError for a row without one."""
    if not is_tracing(is_match_BS) and not is_match_BS.any(1).all():  # a traced tensor has no values to check
        raise ValueError(
            f"a row of input_ids has no {token} (id {token_id}); ChatGLM-6B rows are context … [gMASK] <sop> answer"
        )
    return is_match_BS.int().argmax(1)


def context_blocks(
    input_ids_BS: torch.Tensor | None, position_ids: torch.Tensor, config: ChatGLMConfig
) -> torch.Tensor:
    """Block ids for `create_causal_mask`, [B, S]: 0 before <sop>, where tokens see each other, -1 from <sop> on."""
    if config.position_encoding_2d:
        is_answer_BS = position_ids[:, 1] > 0
    elif input_ids_BS is not None:
        is_answer_BS = input_ids_BS == config.sop_token_id
    else:
        raise ValueError(
            "position_encoding_2d=False: inputs_embeds do not show where the context ends; pass input_ids instead"
        )
    return -(is_answer_BS.int().cumsum(1) > 0).long()


class ChatGLMRotaryEmbedding(nn.Module):
    """Rotary angles. The frequencies are rounded to fp16, as published; the angles are always computed in float32."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.dim = head_dim // 2 if config.position_encoding_2d else head_dim
        self.inv_freq = nn.Buffer(self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        """The inverse frequencies, [D / 2] ([D / 4] with two positions), float32 values that were rounded to fp16."""
        exact = 1.0 / (10000 ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        return exact.half().float()

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in float32, [B, 1, S, D]; with two positions, each has one half of D."""
        # not the buffer if it was cast: model.half() and model.bfloat16() round it once more
        inv_freq = self.frequencies().to(position_ids.device) if self.inv_freq.dtype != torch.float32 else self.inv_freq
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        if angles.dim() == 4:  # [B, 2, S, D / 2]
            angles = torch.cat([angles[:, 0], angles[:, 1]], dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]


def rotate(states_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, parts: int) -> torch.Tensor:
    """The states rotated by the angles; in each of `parts` equal parts of D, the first half is paired with the second."""
    pairs = states_BNSD.unflatten(-1, (parts, 2, -1))
    rotated = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], dim=-2).flatten(-3)
    return states_BNSD * cos.to(states_BNSD.dtype) + rotated * sin.to(states_BNSD.dtype)


def eager_attention(
    module: "ChatGLMAttention",
    query_BNSD: torch.Tensor,
    key_BNKD: torch.Tensor,
    value_BNKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by matrix products: outputs [B, S, N, D] and weights [B, N, S, K].

    Scores are divided by the layer's number before the product and multiplied by it in float32: so fp16 does not overflow.
    """
    divisor = float(module.layer_idx + 1)
    scores_BNSK = torch.matmul(query_BNSD * (scaling / divisor), key_BNKD.transpose(2, 3)).float() * divisor
    if attention_mask is not None:
        scores_BNSK = scores_BNSK + attention_mask
    weights_BNSK = nn.functional.softmax(scores_BNSK, dim=-1).to(query_BNSD.dtype)
    return torch.matmul(weights_BNSK, value_BNKD).transpose(1, 2).contiguous(), weights_BNSK


class ChatGLMAttention(nn.Module):
    """Multi-head attention; the rows of the fused projection are query, key and value of each head in turn."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.rotary_parts = 2 if config.position_encoding_2d else 1
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states_BSH: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs, [B, S, H], and the attention weights if the implementation returns them."""
        fused = self.query_key_value(hidden_states_BSH).unflatten(-1, (self.heads, 3 * self.head_dim)).transpose(1, 2)
        query_BNSD, key_BNSD, value_BNSD = fused.chunk(3, dim=-1)
        query_BNSD = rotate(query_BNSD, *position_embeddings, self.rotary_parts)
        key_BNSD = rotate(key_BNSD, *position_embeddings, self.rotary_parts)
        if past_key_values is not None:
            key_BNSD, value_BNSD = past_key_values.update(key_BNSD, value_BNSD, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        attended_BSND, weights = attention(
            self, query_BNSD, key_BNSD, value_BNSD, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(attended_BSND.flatten(2)), weights


class ChatGLMMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states_BSH: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        out_BSH: torch.Tensor = self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states_BSH), approximate="tanh"))
        return out_BSH


class ChatGLMBlock(GradientCheckpointingLayer):
    """A block whose residual branch is its normalized input times ALPHA (as in DeepNorm, arXiv:2203.00555)."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states_BSH: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `kwargs` go to the attention."""
        normed_BSH: torch.Tensor = self.input_layernorm(hidden_states_BSH)
        attended_BSH, _ = self.attention(normed_BSH, **kwargs)
        normed_BSH = self.post_attention_layernorm(ALPHA * normed_BSH + attended_BSH)
        out_BSH: torch.Tensor = ALPHA * normed_BSH + self.mlp(normed_BSH)
        return out_BSH


class ChatGLMPreTrainedModel(PreQuantizedModel):
    """What ChatGLM-6B's models have in common."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its kernels support causal and full masks only; a bidirectional context is neither
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    # inv_freq is computed, and a prefix is loaded by finetuning=p_tuning
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"prefix_encoder\."]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            with torch.no_grad():
                module.inv_freq.copy_(module.frequencies())


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder without its head."""

    word_embeddings: nn.Module

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm, [B, S, H].

        `attention_mask` is [B, S], 1 = a token, 0 = padding on either side; or a prepared mask of four dimensions.
        `position_ids` is [B, 2, S] ([B, S] without position_encoding_2d); by default it is computed from `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if input_ids is None or cached:
                raise ValueError("with a filled cache or with inputs_embeds, position_ids [B, 2, S] must be passed")
            position_ids = positions(input_ids, _mask_2d(attention_mask), self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # with a filled cache the new tokens follow the context, so attention is causal
            block_sequence_ids=None if cached else context_blocks(input_ids, position_ids, self.config),
        )
        hidden_states_BSH = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids)
        for layer in self.layers:
            hidden_states_BSH = layer(
                hidden_states_BSH,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states_BSH), past_key_values=past_key_values
        )


def places_of(input_ids_S: torch.Tensor, config: ChatGLMConfig) -> tuple[torch.Tensor, int]:
    """The position ids of one row without padding, [2, S] or [S], and the length of its bidirectional context."""
    position_ids = positions(input_ids_S[None], None, config)
    return position_ids[0], int((input_ids_S == config.sop_token_id).int().argmax())


def _mask_2d(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask if it is [B, S]; None for a prepared one of four dimensions."""
    return attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its language-modelling head, which shares the embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def places(self) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
        """`places_of` for this model's config; processes that load batches get it without the model."""
        return partial(places_of, config=self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, vocabulary], and with `labels` [B, S] (-100 = ignored) the mean cross-entropy in nats, float32."""
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' inputs, with positions computed from all tokens so far: those of an answer depend on its <sop>."""
        kwargs |= {"attention_mask": attention_mask}
        kwargs |= {"position_ids": positions(input_ids, _mask_2d(attention_mask), self.config)}
        prepare: Callable[..., dict[str, Any]] = super().prepare_inputs_for_generation  # type: ignore[misc]  # its self is annotated as a protocol that is not a base of it
        return prepare(input_ids, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: ChatGLMConfig, position_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> "torch.Tensor | BlockMask | None":
        """The mask for a compilable cache, which `generate` makes before it calls the model."""
        past = kwargs.get("past_key_values")
        cached = past.get_seq_length() if past is not None else 0
        blocks = None if cached or position_ids is None else context_blocks(None, position_ids, config)
        names = ("inputs_embeds", "attention_mask", "past_key_values")
        return create_causal_mask(config=config, block_sequence_ids=blocks, **{name: kwargs[name] for name in names})


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    """One score per row, from its last token: the head of classifiers and reward models."""

    base_model_prefix = "transformer"


class ChatGLMForTokenClassification(GenericForTokenClassification, ChatGLMPreTrainedModel):
    """One score per token: the head of value models."""

    base_model_prefix = "transformer"
