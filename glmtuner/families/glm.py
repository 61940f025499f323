"""GLM in transformers' own layout: GLM-4-9B(-Chat)-hf (`GlmForCausalLM`) and GLM-4-0414 (`Glm4ForCausalLM`)."""

from glmtuner.families.family import Family, register

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

GLM = register(
    Family(
        name="glm",
        model_types=("glm",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=("q_proj", "k_proj", "v_proj"),
        other_linears=("o_proj", "gate_up_proj", "down_proj"),
        template="glm4",
        stop_tokens=STOP_TOKENS,
    )
)
GLM4 = register(
    Family(
        name="glm4",
        model_types=("glm4",),
        layers="model.layers",
        attention_block="self_attn",
        mlp="mlp",
        attention=("q_proj", "k_proj", "v_proj"),
        other_linears=("o_proj", "gate_up_proj", "down_proj"),
        template="glm4",
        stop_tokens=STOP_TOKENS,
    )
)
