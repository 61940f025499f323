"""GLM in transformers' own layout, dense and mixture-of-experts.

Several models share a `model_type` and differ in their prompts; of those, the first family here is what `model.family=auto`
takes, and the presets in conf/model name theirs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glmtuner.families.family import LATENT_ATTENTION, ROUTES, UNTRAINED, Family, register

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # as the makers' clients stop (THUDM/GLM-4, hf.py)
# transformers holds all routed experts of a block in one parameter each for gate and up projection, and for down projection.
# PEFT adapts those where a target has one of the first three names, and then no dense MLP and no shared expert; the router stays
# as it is.
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS = (*MLP, "experts", "experts.gate_up_proj", "experts.down_proj")


def _has_latent_queries(config: Mapping[str, Any]) -> bool:
    return config.get("q_lora_rank", 0) is not None


GLM = register(
    Family(  # GLM-4-9B-Chat-hf, GLM-4-9B-Chat-1M-hf: `GlmForCausalLM`
        name="glm",
        model_types=("glm",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=("q_proj", "k_proj", "v_proj"),
        other_linears=("o_proj", "gate_up_proj", "down_proj"),  # gate and up projection are one matrix
        template="glm4",
        stop_tokens=STOP_TOKENS,
    )
)
# the prompt has no [gMASK]<sop>
GLM_EDGE = register(replace(GLM, name="glm_edge", template="glm_edge"))
# GLM-4-9B-0414, GLM-4-32B-0414 and its base: `Glm4ForCausalLM`
GLM4 = register(replace(GLM, name="glm4", model_types=("glm4",), template="glm4_0414"))
# its prompt opens a thought
GLM_Z1 = register(replace(GLM4, name="glm_z1", template="tokenizer"))
GLM4_MOE = register(
    replace(  # GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7: `Glm4MoeForCausalLM`
        GLM,
        name="glm4_moe",
        model_types=("glm4_moe",),
        other_linears=("o_proj", *MLP),  # of dense blocks and shared experts
        experts=EXPERTS,
        left_out={"gate": ROUTES},
        template="tokenizer",
    )
)
GLM4_MOE_LITE = register(
    replace(  # GLM-4.7-Flash: `Glm4MoeLiteForCausalLM`
        GLM4_MOE,
        name="glm4_moe_lite",
        model_types=("glm4_moe_lite",),
        attention=LATENT_ATTENTION,
        fits=_has_latent_queries,
    )
)
# GLM-5, GLM-5.1, GLM-5.2: `GlmMoeDsaForCausalLM`; the indexer, which selects tokens, gets no gradient
GLM_MOE_DSA = register(
    replace(
        GLM4_MOE_LITE,
        name="glm_moe_dsa",
        model_types=("glm_moe_dsa",),
        left_out={"gate": ROUTES, **dict.fromkeys(("wq_b", "wk", "weights_proj"), UNTRAINED)},
    )
)
