"""GLM in transformers' own layout, dense and mixture-of-experts.

Several models share a `model_type` and differ in their prompts; of those, the first family here is what `model.family=auto`
takes, and the presets in conf/model name theirs.
"""

from collections.abc import Mapping
from typing import Any

from glmtuner.families.family import Family, register

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # as the makers' clients stop (THUDM/GLM-4, hf.py)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
GATED_MLP = ("o_proj", "gate_up_proj", "down_proj")  # gate and up projection are one matrix
# transformers holds all routed experts of a block in one parameter each for gate and up projection, and for down projection.
# PEFT adapts those where a target has one of these names, and then no dense MLP and no shared expert; the router stays as it is.
EXPERTS = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # multi-head latent attention, as in DeepSeek-V2


def _has_latent_queries(config: Mapping[str, Any]) -> bool:
    return config.get("q_lora_rank", 0) is not None


GLM = register(
    Family(  # GLM-4-9B-Chat-hf, GLM-4-9B-Chat-1M-hf: `GlmForCausalLM`
        name="glm",
        model_types=("glm",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=PROJECTIONS,
        other_linears=GATED_MLP,
        template="glm4",
        stop_tokens=STOP_TOKENS,
    )
)
GLM_EDGE = register(
    Family(  # the prompt has no [gMASK]<sop>
        name="glm_edge",
        model_types=("glm",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=PROJECTIONS,
        other_linears=GATED_MLP,
        template="glm_edge",
        stop_tokens=STOP_TOKENS,
    )
)
GLM4 = register(
    Family(  # GLM-4-9B-0414, GLM-4-32B-0414 and its base: `Glm4ForCausalLM`
        name="glm4",
        model_types=("glm4",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=PROJECTIONS,
        other_linears=GATED_MLP,
        template="glm4_0414",
        stop_tokens=STOP_TOKENS,
    )
)
GLM_Z1 = register(
    Family(  # its prompt opens a thought
        name="glm_z1",
        model_types=("glm4",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=PROJECTIONS,
        other_linears=GATED_MLP,
        template="tokenizer",
        stop_tokens=STOP_TOKENS,
    )
)
GLM4_MOE = register(
    Family(  # GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7: `Glm4MoeForCausalLM`
        name="glm4_moe",
        model_types=("glm4_moe",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=PROJECTIONS,
        other_linears=("o_proj",),
        experts=EXPERTS,
        template="tokenizer",
        stop_tokens=STOP_TOKENS,
    )
)
GLM4_MOE_LITE = register(
    Family(  # GLM-4.7-Flash: `Glm4MoeLiteForCausalLM`
        name="glm4_moe_lite",
        model_types=("glm4_moe_lite",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=LATENT,
        other_linears=("o_proj",),
        experts=EXPERTS,
        template="tokenizer",
        stop_tokens=STOP_TOKENS,
        fits=_has_latent_queries,
    )
)
GLM_MOE_DSA = register(
    Family(  # GLM-5, GLM-5.1, GLM-5.2: `GlmMoeDsaForCausalLM`; the indexer, which selects tokens, gets no gradient
        name="glm_moe_dsa",
        model_types=("glm_moe_dsa",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=LATENT,
        other_linears=("o_proj",),
        experts=EXPERTS,
        template="tokenizer",
        stop_tokens=STOP_TOKENS,
        fits=_has_latent_queries,
    )
)
