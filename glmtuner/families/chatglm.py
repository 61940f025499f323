"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and CodeGeeX4 in the layout of their first release (`model_type` chatglm).

ChatGLM2 and ChatGLM3 have the same config.json and compute the same; they differ in their prompts. So do GLM-4-9B and CodeGeeX4.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glmtuner.families.family import Family, register

CHATGLM2_VOCABULARY = 65024  # tokens: the padded_vocab_size of ChatGLM2 and ChatGLM3; GLM-4 has 151552


def _first_generation(config: Mapping[str, Any]) -> bool:
    return "padded_vocab_size" not in config


def _second_generation(config: Mapping[str, Any]) -> bool:
    return bool(config.get("padded_vocab_size", CHATGLM2_VOCABULARY + 1) <= CHATGLM2_VOCABULARY)


def _glm4(config: Mapping[str, Any]) -> bool:
    return bool(config.get("padded_vocab_size", 0) > CHATGLM2_VOCABULARY)


CHATGLM = register(
    Family(
        name="chatglm",
        model_types=("chatglm",),
        layers="transformer.layers",
        attention_block="attention",
        mlp="mlp",
        attention=("query_key_value",),
        other_linears=("dense", "dense_h_to_4h", "dense_4h_to_h"),
        template="chatglm",
        stop_tokens=("<eop>",),
        fits=_first_generation,
    )
)
CHATGLM2 = register(
    Family(
        name="chatglm2",
        model_types=("chatglm",),
        layers="transformer.encoder.layers",
        attention_block="self_attention",
        mlp="mlp",
        attention=("query_key_value",),
        other_linears=CHATGLM.other_linears,
        template="chatglm2",
        stop_tokens=("</s>",),
        fits=_second_generation,
        interpolates=True,
        wide_prefix=True,
    )
)
CHATGLM3 = register(
    replace(
        CHATGLM2,
        name="chatglm3",
        template="chatglm3",
        stop_tokens=("</s>", "<|user|>", "<|observation|>"),
        interpolates=False,
    )
)
GLM4_ORIGINAL = register(
    replace(
        CHATGLM3,
        name="glm4_original",
        template="glm4",
        stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
        fits=_glm4,
    )
)
CODEGEEX4 = register(
    replace(
        GLM4_ORIGINAL,
        name="codegeex4",
        template="codegeex4",
        # as the maker's server stops (THUDM/CodeGeeX4, candle_demo/api-server/src/api.rs)
        stop_tokens=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    )
)
