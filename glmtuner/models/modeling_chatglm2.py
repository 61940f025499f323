"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B as first published: the computation of transformers' GLM under the original names.

The published module names are kept, above all the fused query-key-value projection: existing adapters fit, and training
steps are the same, which they would not be with three projections that have an adapter each. `as_glm` converts a model to
transformers' own `GlmForCausalLM`.

Shape letters: B batch, S tokens, D head dimension, H hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import GlmConfig, GlmForCausalLM
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
from transformers.models.glm.modeling_glm import (
    GlmRMSNorm,
    GlmRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from glmtuner.models.configuration_chatglm import ChatGLM2Config
from glmtuner.models.prequantized import PreQuantizedModel


class ChatGLM2Attention(nn.Module):
    """Grouped-query attention; the rows of the fused projection are all queries, then all keys, then all values."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.heads = (config.num_attention_heads, config.multi_query_group_num, config.multi_query_group_num)
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(
            config.hidden_size, sum(self.heads) * self.head_dim, bias=config.add_qkv_bias or config.add_bias_linear
        )
        self.dense = nn.Linear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear
        )

    def forward(
        self,
        hidden_states_BSH: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs, [B, S, H], and the attention weights if the implementation returns them."""
        fused = self.query_key_value(hidden_states_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = fused.split(self.heads, dim=1)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(attended.flatten(2)), weights


class ChatGLM2MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202); the first matrix has the rows of the gate, then those of the gated values."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states_BSH: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        gate, gated = self.dense_h_to_4h(hidden_states_BSH).chunk(2, dim=-1)
        out_BSH: torch.Tensor = self.dense_4h_to_h(silu(gate) * gated)
        return out_BSH


class ChatGLM2Block(GradientCheckpointingLayer):
    """A pre-norm block."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLM2MLP(config)

    def forward(self, hidden_states_BSH: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `kwargs` go to the attention."""
        attended_BSH, _ = self.self_attention(self.input_layernorm(hidden_states_BSH), **kwargs)
        hidden_states_BSH = hidden_states_BSH + attended_BSH
        out_BSH: torch.Tensor = hidden_states_BSH + self.mlp(self.post_attention_layernorm(hidden_states_BSH))
        return out_BSH


class ChatGLM2Embedding(nn.Module):
    """The token embeddings under their published name."""

    word_embeddings: nn.Module

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, H]."""
        embedded_BSH: torch.Tensor = self.word_embeddings(input_ids)
        return embedded_BSH


class ChatGLM2Encoder(nn.Module):
    """The blocks and the last norm under their published names; ChatGLM2Model calls them."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ChatGLM2Block(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = GlmRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLM2PreTrainedModel(PreQuantizedModel):
    """What the models of ChatGLM2, ChatGLM3 and GLM-4 have in common."""

    config: ChatGLM2Config
    config_class = ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM2Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}
    # inv_freq is computed, and a prefix is loaded by finetuning=p_tuning
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"prefix_encoder\."]


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """The decoder without its head."""

    output_layer: nn.Module  # the head, which published checkpoints keep here; set by the model that has one
    _keys_to_ignore_on_load_unexpected = [
        *ChatGLM2PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"output_layer\.weight$",
    ]

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.embedding = ChatGLM2Embedding(config)
        self.rotary_pos_emb = GlmRotaryEmbedding(config)  # type: ignore[arg-type]  # it reads fields that ChatGLM2Config has, too
        self.encoder = ChatGLM2Encoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.embedding.word_embeddings = value

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
        """Hidden states after the last norm, [B, S, H]; masks and positions as in transformers' GLM."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + cached)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states_BSH = inputs_embeds
        position_embeddings = self.rotary_pos_emb(hidden_states_BSH, position_ids=position_ids)
        for layer in self.encoder.layers:
            hidden_states_BSH = layer(
                hidden_states_BSH,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.encoder.final_layernorm(hidden_states_BSH), past_key_values=past_key_values
        )


class ChatGLM2ForConditionalGeneration(ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2, ChatGLM3 or GLM-4 with its language-modelling head."""

    _keys_to_ignore_on_load_unexpected = ChatGLM2PreTrainedModel._keys_to_ignore_on_load_unexpected
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.transformer.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language-modelling head."""
        self.transformer.output_layer = new_embeddings

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
        logits = self.transformer.output_layer(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.padded_vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


class ChatGLM2ForSequenceClassification(GenericForSequenceClassification, ChatGLM2PreTrainedModel):
    """One score per row, from its last token: the head of classifiers and reward models."""

    base_model_prefix = "transformer"


class ChatGLM2ForTokenClassification(GenericForTokenClassification, ChatGLM2PreTrainedModel):
    """One score per token: the head of value models."""

    base_model_prefix = "transformer"


def glm_config(config: ChatGLM2Config) -> GlmConfig:
    """The config of the same model as transformers' GLM. Raises ValueError for `add_bias_linear`, which GLM cannot have."""
    if config.add_bias_linear:
        raise ValueError("add_bias_linear=True: transformers' GLM has no biases in output projection and MLP")
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters=dict(config.rope_parameters or {}),
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
        dtype=config.dtype,
    )


GLM_NAMES = (
    ("transformer.embedding.word_embeddings", "model.embed_tokens"),
    ("transformer.encoder.layers", "model.layers"),
    ("transformer.encoder.final_layernorm", "model.norm"),
    ("transformer.output_layer", "lm_head"),
    ("self_attention.dense", "self_attn.o_proj"),
    ("self_attention", "self_attn"),
    ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
    ("mlp.dense_4h_to_h", "mlp.down_proj"),
)


def as_glm(model: ChatGLM2ForConditionalGeneration) -> GlmForCausalLM:
    """A GlmForCausalLM that computes the same logits; it shares the model's tensors."""
    config = model.config
    block = model.transformer.encoder.layers[0]
    assert isinstance(block, ChatGLM2Block)
    sizes = [heads * config.kv_channels for heads in block.self_attention.heads]  # rows of queries, keys and values
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for published, glm_name in GLM_NAMES:
            name = name.replace(published, glm_name)
        if "query_key_value" in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), value.split(sizes), strict=True):
                state[name.replace("query_key_value", part)] = rows
        else:
            state[name] = value
    with torch.device("meta"):
        glm = GlmForCausalLM(glm_config(config))
    glm.load_state_dict(state, assign=True, strict=True)
    glm.model.rotary_emb = GlmRotaryEmbedding(glm.config).to(model.device)  # its buffers are not in the state dict
    glm.tie_weights()
    glm.generation_config = model.generation_config
    glm.eval()
    return glm
