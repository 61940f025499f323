"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in the layout of their first release (`model_type` chatglm)."""

from glmtuner.families.family import Family, register

OTHER_LINEARS = ("dense", "dense_h_to_4h", "dense_4h_to_h")

CHATGLM = register(
    Family(
        name="chatglm",
        model_types=("chatglm",),
        layers="transformer.layers",
        attention_block="attention",
        mlp="mlp",
        attention=("query_key_value",),
        other_linears=OTHER_LINEARS,
        template="chatglm",
        stop_tokens=("<eop>",),
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
        other_linears=OTHER_LINEARS,
        template="chatglm2",
        stop_tokens=("</s>",),
    )
)
CHATGLM3 = register(
    Family(
        name="chatglm3",
        model_types=("chatglm",),
        layers="transformer.encoder.layers",
        attention_block="self_attention",
        mlp="mlp",
        attention=("query_key_value",),
        other_linears=OTHER_LINEARS,
        template="chatglm3",
        stop_tokens=("</s>", "<|user|>", "<|observation|>"),
    )
)
GLM4_ORIGINAL = register(
    Family(
        name="glm4_original",
        model_types=("chatglm",),
        layers="transformer.encoder.layers",
        attention_block="self_attention",
        mlp="mlp",
        attention=("query_key_value",),
        other_linears=OTHER_LINEARS,
        template="glm4",
        stop_tokens=("<|endoftext|>", "<|user|>", "<|observation|>"),
    )
)
