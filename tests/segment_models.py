"""Small models of families with attention of their own kinds, to compare the computation of a batch's rows with each row's own."""

from typing import Any

import torch
from torch import nn
from transformers import GlmConfig, GlmForCausalLM, MistralConfig, MistralForCausalLM

from glmtuner.models.configuration_chatglm import ChatGLM2Config, ChatGLMConfig
from glmtuner.models.modeling_chatglm import ChatGLMForConditionalGeneration
from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration

VOCABULARY = 96
V1 = {"bos_token_id": 90, "eos_token_id": 91, "mask_token_id": 92, "gmask_token_id": 93, "pad_token_id": 3}


def glm(**values: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "num_key_value_heads": 2, "head_dim": 8}
    return GlmForCausalLM(GlmConfig(vocab_size=VOCABULARY, **sizes, **special, **values))


def chatglm(**values: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "inner_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
    return ChatGLMForConditionalGeneration(ChatGLMConfig(vocab_size=VOCABULARY, **sizes, **V1, **values))


def chatglm2() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8}
    return ChatGLM2ForConditionalGeneration(
        ChatGLM2Config(padded_vocab_size=VOCABULARY, multi_query_group_num=2, seq_length=128, **sizes)
    )


def mistral() -> nn.Module:
    """Attention within a window that is shorter than the samples."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, sliding_window=4, **sizes)
    return MistralForCausalLM(config)


MODELS = {
    "glm": glm,
    "glm, tied": lambda: glm(tie_word_embeddings=True),
    "chatglm": chatglm,
    "chatglm, one position": lambda: chatglm(position_encoding_2d=False),
    "chatglm2": chatglm2,
    "mistral": mistral,
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms are not what they start as
    return model.train()
