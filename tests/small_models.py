"""Models of random weights in float64, in which batches give the same tokens as single prompts, and a run of the shipped one."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from glmtuner.cli.main import main

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "initializer_range": 0.3,
}
MODELS = {
    "Llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2},
    "Glm": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400, "initializer_range": 0.3},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400, "initializer_range": 0.3},
    "Mistral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 6},
    "Lfm2": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "ChatGLM": {},
    "ChatGLM2": {},
}  # fmt: skip
STOP = 7


def run_of_one_step(folder: Path) -> Path:
    """The folder, with a run of the shipped model that was trained for a step."""
    words = [
        "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=4", "trainer.max_steps=1",
        "trainer.learning_rate=1e-6", "trainer.disable_tqdm=true", f"trainer.output_dir={folder}",
    ]  # fmt: skip
    assert main(words) == 0
    return folder


def built(name: str) -> Any:
    """One of MODELS."""
    torch.manual_seed(0)
    if name == "ChatGLM":
        from glmtuner.models.configuration_chatglm import ChatGLMConfig
        from glmtuner.models.modeling_chatglm import ChatGLMForConditionalGeneration

        config = ChatGLMConfig(
            vocab_size=400, hidden_size=32, num_layers=2, num_attention_heads=4, inner_hidden_size=64, bos_token_id=4,
            mask_token_id=5, gmask_token_id=6, eos_token_id=STOP, pad_token_id=3,
        )  # fmt: skip
        model = ChatGLMForConditionalGeneration(config)
    elif name == "ChatGLM2":
        from glmtuner.models.configuration_chatglm import ChatGLM2Config
        from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration

        config = ChatGLM2Config(
            padded_vocab_size=400, hidden_size=32, num_layers=2, num_attention_heads=4, kv_channels=8,
            ffn_hidden_size=64, multi_query_group_num=2,
        )  # fmt: skip
        model = ChatGLM2ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{name}Config")(**MODELS[name])
        head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{name}{head}")(config)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # ChatGLM-6B's residual branch outweighs what its layers add, so that small ones repeat one token for ever
            inner = name == "ChatGLM" and "embeddings" not in path
            torch.nn.init.normal_(parameter, std=3.0 if inner else 0.3)
    return model.double().eval()


def prompt(name: str, number: int) -> list[int]:
    drawn = torch.Generator().manual_seed(number)
    length = int(torch.randint(2, 14, (1,), generator=drawn))
    words = torch.randint(10, 400, (length,), generator=drawn).tolist()
    return [*words, 6, 4] if name == "ChatGLM" else words  # its context ends in [gMASK] <sop>


def alone(model: Any, words: list[int], room: int = 12, **options: Any) -> list[int]:
    """What transformers generates for this prompt alone."""
    config = GenerationConfig(max_new_tokens=room, eos_token_id=STOP, pad_token_id=3, do_sample=False, **options)
    ids = torch.tensor([words])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(words) :].tolist()
