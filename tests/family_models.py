"""Folders with a tiny random model of each model type in transformers that a preset names, and the shipped tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

ASSET = Path(__file__).parent.parent / "glmtuner/assets/tiny_glm"
SIZES: dict[str, Any] = {
    "vocab_size": 3000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "eos_token_id": [0, 7, 9], "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
# Enough heads of the indexer that no two tokens have the same score of 0. The first block is dense, and in glm_moe_dsa the second uses the tokens that the first one's indexer selects, as in GLM-5.2
CONFIGS: dict[str, dict[str, Any]] = {
    "glm": GROUPED,
    "glm4": GROUPED,
    "glm4_moe": {**GROUPED, **EXPERTS, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "glm4_moe_lite": {**LATENT, **EXPERTS},
    "glm_moe_dsa": {
        **LATENT, **EXPERTS, "first_k_dense_replace": 1, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 16,
        "index_topk_freq": 2,
    },
}  # fmt: skip


def built(model_type: str) -> Any:
    """The model in float32, the same each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **CONFIGS[model_type]))


def write_model(model_type: str, folder: Path) -> Path:
    """Save the model, as transformers does, and the shipped tokenizer in a folder; returns the folder."""
    built(model_type).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, folder / name)
    return folder
