"""ChatGLM-6B (2023): a decoder that sees its context in both directions and generates in blocks.

A row is `context … [gMASK] <sop> answer … <eop>`. The context, everything before <sop>, is visible to every token; from
<sop> on attention is causal. Positions are two-dimensional: the first counts the context and then stands still at the mask
token, the second is 0 in the context and counts from <sop> on (GLM, Du et al. 2022, arXiv:2103.10360).

Shape letters: B batch, S tokens, N heads, D head dimension, H hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
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
from glmtuner.models.prequantized import PreQuantizedMixin

ALPHA = (2 * 28) ** 0.5  # of the residual branches: 28 whatever the number of layers, as the published code computes it


def positions(
    input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """Position ids: [B, 2, S], or [B, S] where `position_encoding_2d` is off; 0 on padding.

    Raises ValueError for a row without <sop>, or without [gMASK] and [MASK]: its context has no end.
    """
    length = input_ids_BS.shape[1]
    index_S = torch.arange(length, device=input_ids_BS.device)
    starts = _first(input_ids_BS == config.bos_token_id, "<sop>", config.bos_token_id)[:, None]
    is_gmask = input_ids_BS == config.gmask_token_id
    blanks = torch.where(is_gmask.any(1, keepdim=True), is_gmask, input_ids_BS == config.mask_token_id)
    blank = _first(blanks, "[gMASK] or [MASK]", config.gmask_token_id)[:, None]
    if attention_mask_BS is None:
        padded = torch.zeros_like(starts)
        keep = torch.ones_like(input_ids_BS, dtype=torch.bool)
    else:
        keep = attention_mask_BS.bool()
        padded = keep.int().argmax(1, keepdim=True)  # how many tokens of padding stand in front
    in_context = index_S < starts
    if config.position_encoding_2d:
        sequence = torch.where(in_context, index_S, blank) - padded
        block = torch.where(in_context, 0, index_S - starts + 1)
        return torch.stack([sequence, block], dim=1) * keep[:, None]
    frozen = (
        ~is_gmask.any(1, keepdim=True) & ~in_context
    )  # a short blank, [MASK], holds the position, a long one does not
    return (torch.where(frozen, blank, index_S) - padded) * keep


def _first(found_BS: torch.Tensor, what: str, token_id: Any) -> torch.Tensor:
    """The first place that holds in each row, [B]."""
    if not is_tracing(found_BS) and not found_BS.any(1).all():  # a shape without values has nothing to be refused
        raise ValueError(
            f"a row of input_ids has no {what} (id {token_id}); ChatGLM-6B rows read context … [gMASK] <sop> answer"
        )
    return found_BS.int().argmax(1)


def context_blocks(
    input_ids_BS: torch.Tensor | None, position_ids: torch.Tensor, config: ChatGLMConfig
) -> torch.Tensor:
    """[B, S]: 0 for the tokens before <sop>, which see each other, -1 for those from <sop> on."""
    if config.position_encoding_2d:
        answer = position_ids[:, 1] > 0
    elif input_ids_BS is not None:
        answer = input_ids_BS == config.bos_token_id
    else:
        raise ValueError("position_encoding_2d=False: the context cannot be told from inputs_embeds; pass input_ids")
    return -(answer.int().cumsum(1) > 0).long()


class ChatGLMRotaryEmbedding(nn.Module):
    """Angles of the positions. The published frequencies went through fp16; the angles are computed in float32 always."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.dim = head_dim // 2 if config.position_encoding_2d else head_dim
        self.inv_freq = nn.Buffer(self.frequencies(), persistent=False)

    def frequencies(self) -> torch.Tensor:
        exact = 1.0 / (10000 ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))
        return exact.half().float()

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in float32, [B, 1, S, D]; with two positions, one half of D each."""
        # not the buffer itself: model.half() and model.bfloat16() would have rounded it once more
        inv_freq = self.frequencies().to(position_ids.device) if self.inv_freq.dtype != torch.float32 else self.inv_freq
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        if angles.dim() == 4:  # [B, 2, S, D / 2]
            angles = torch.cat([angles[:, 0], angles[:, 1]], dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]


def rotate(states_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, parts: int) -> torch.Tensor:
    """The states turned by the angles; each of `parts` equal parts of D pairs its first half with its second."""
    pairs = states_BNSD.unflatten(-1, (parts, 2, -1))
    turned = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], dim=-2).flatten(-3)
    return states_BNSD * cos.to(states_BNSD.dtype) + turned * sin.to(states_BNSD.dtype)


def eager_attention(
    module: nn.Module,
    query_BNSD: torch.Tensor,
    key_BNKD: torch.Tensor,
    value_BNKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelled out, [B, S, N, D] and its weights.

    Scores are made smaller by the layer's number and larger again in float32: that keeps fp16 scores from overflowing.
    """
    shrink = float(module.layer_idx + 1)
    scores = torch.matmul(query_BNSD * (scaling / shrink), key_BNKD.transpose(2, 3)).float() * shrink
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(query_BNSD.dtype)
    return torch.matmul(weights, value_BNKD).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    """Multi-head attention; the fused projection holds query, key and value head by head."""

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
        fused = self.query_key_value(hidden_states_BSH).unflatten(-1, (self.heads, 3 * self.head_dim)).transpose(1, 2)
        query_BNSD, key_BNSD, value_BNSD = fused.chunk(3, dim=-1)
        query_BNSD = rotate(query_BNSD, *position_embeddings, self.rotary_parts)
        key_BNSD = rotate(key_BNSD, *position_embeddings, self.rotary_parts)
        if past_key_values is not None:
            key_BNSD, value_BNSD = past_key_values.update(key_BNSD, value_BNSD, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        attended_BSND, weights = attend(
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
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states_BSH), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """A block whose residual branch is its normalized input, scaled by ALPHA (DeepNorm, arXiv:2203.00555)."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states_BSH: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states_BSH)
        attended, _ = self.attention(normed, **kwargs)
        normed = self.post_attention_layernorm(ALPHA * normed + attended)
        return ALPHA * normed + self.mlp(normed)


class ChatGLMPreTrainedModel(PreQuantizedMixin, PreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # its kernels know causal and full masks; a context seen both ways is neither
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}
    # inv_freq is worked out here, and a prefix is loaded by finetuning=p_tuning
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"prefix_encoder\."]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChatGLMRotaryEmbedding):
            with torch.no_grad():
                module.inv_freq.copy_(module.frequencies())


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
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
        """Hidden states behind the last norm, [B, S, H].

        `attention_mask` is [B, S], 1 = a token, 0 = padding on either side; or a prepared mask of four dimensions.
        `position_ids` is [B, 2, S] ([B, S] without position_encoding_2d), and worked out from `input_ids` when missing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if input_ids is None or seen:
                raise ValueError("with a filled cache or with inputs_embeds, position_ids [B, 2, S] must be passed")
            flat = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            position_ids = positions(input_ids, flat, self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # behind a filled cache everything is seen causally, the context included
            block_sequence_ids=None if seen else context_blocks(input_ids, position_ids, self.config),
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


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its language-modelling head, which is the embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def places(self, input_ids_S: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The positions of one row without padding, [2, S] or [S], and the length of its context."""
        position_ids = positions(input_ids_S[None], None, self.config)
        return position_ids[0], int((input_ids_S == self.config.bos_token_id).int().argmax())

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
        """Logits [B, S, vocabulary], and with `labels` (-100 = not learned) the mean cross-entropy in float32."""
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
        """transformers' own, with positions worked out from all tokens so far: those of an answer depend on its <sop>."""
        flat = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        position_ids = positions(input_ids, flat, self.config)
        return super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(
        config: ChatGLMConfig, position_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The mask of a compilable cache, which transformers asks for before it calls the model."""
        past = kwargs.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        blocks = None if seen or position_ids is None else context_blocks(None, position_ids, config)
        names = ("inputs_embeds", "attention_mask", "past_key_values")
        return create_causal_mask(config=config, block_sequence_ids=blocks, **{name: kwargs[name] for name in names})


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    """A score a row, read at its last token: the head of classifiers and reward models."""

    base_model_prefix = "transformer"


class ChatGLMForTokenClassification(GenericForTokenClassification, ChatGLMPreTrainedModel):
    """A score a token: the head of value models."""

    base_model_prefix = "transformer"
