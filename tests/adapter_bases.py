"""Small models that adapters are tried on, and their loss on fixed rows."""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from glmtuner.config.paths import PACKAGE_DATA
from glmtuner.models.configuration_chatglm import ChatGLM2Config
from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration

IDS = torch.randint(4, 48, (3, 12), generator=torch.Generator().manual_seed(5))


def base(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "glm":
        return AutoModelForCausalLM.from_pretrained(PACKAGE_DATA.parent / "tiny_glm", dtype=torch.float32).eval()
    if name == "qwen3":
        config = Qwen3Config(
            num_hidden_layers=2, vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, tie_word_embeddings=False, attention_bias=True, initializer_range=0.2,
        )  # fmt: skip
        return Qwen3ForCausalLM(config).eval()
    config = ChatGLM2Config(
        num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_channels=8,
        multi_query_group_num=2,
    )  # fmt: skip
    model = ChatGLM2ForConditionalGeneration(config)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def loss(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss)
