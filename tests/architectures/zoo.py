"""Tiny random checkpoints of the architectures of the installed transformers, with the shipped tokenizer.

`ARCHITECTURES` names each by its model_type, with what its config needs beside the sizes that all share. Sizes are the smallest
that keep what an architecture does differently: two kinds of blocks in a hybrid, a window shorter than the samples, more experts
than a token is routed to, grouped queries, untied or tied heads as the published models have them.
"""

import shutil
from pathlib import Path
from typing import Any

ASSET = Path(__file__).parents[2] / "glmtuner/assets/tiny_glm"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WINDOW = 24
SIZES: dict[str, Any] = {
    "vocab_size": 3000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [0, 7, 9],
    "sliding_window": WINDOW,
    # the same by the names of older architectures
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 512, "n_ctx": 512, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "d_ff": 48, "ffn_dim": 48, "num_layers": 2, "num_heads": 4,
    # no dropout, so that losses can be compared
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "embedding_dropout",
         "resid_dropout", "residual_dropout", "embed_dropout", "attn_dropout", "hidden_dropout_prob", "router_jitter_noise", "input_jitter_noise", "layerdrop"), 0.0
    ),
    # experts
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    # latent attention and its indexer
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 8,
    "index_head_dim": 8, "index_n_heads": 16,
    # recurrent states
    "state_size": 8, "time_step_rank": 4, "n_groups": 1, "expand": 2, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_dt_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
LATENT: dict[str, Any] = {"head_dim": None, "num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
# What each needs beside SIZES; None takes one of these away
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # GLM
    "glm": {}, "glm4": {}, "glm4_moe": {"num_nextn_predict_layers": 0}, "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | {"index_topk_freq": 2},
    # dense
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {}, "ministral": WINDOWED, "gemma": {}, "gemma2": WINDOWED,
    "gemma3_text": WINDOWED, "phi": {}, "phi3": {}, "olmo": {}, "olmo2": {}, "olmo3": WINDOWED, "cohere": {}, "cohere2": WINDOWED,
    "granite": {}, "smollm3": {}, "exaone4": WINDOWED, "internlm3": {}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "seed_oss": {},
    "starcoder2": {}, "stablelm": {}, "persimmon": {}, "nemotron": {}, "helium": {}, "apertus": {}, "bitnet": {}, "diffllama": {},
    "minicpm3": LATENT,
    # of the first generations: learned positions, ALiBi, fused projections, parallel blocks
    "gpt2": {}, "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "gptj": {"rotary_dim": 4}, "gpt_neox": {},
    "gpt_bigcode": {}, "opt": {}, "bloom": {}, "mpt": {}, "falcon": {"head_dim": None}, "codegen": {"rotary_dim": 4},
    # experts
    "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "phimoe": {}, "olmoe": {}, "gpt_oss": WINDOWED, "deepseek_v2": LATENT,
    "deepseek_v3": LATENT, "ernie4_5_moe": {}, "hunyuan_v1_moe": {}, "granitemoe": {}, "minimax": {}, "minimax_m2": {}, "flex_olmo": {},
    "jetmoe": {},
    # recurrent states and hybrids
    "mamba": {}, "mamba2": {"num_heads": 8, "head_dim": 8}, "falcon_mamba": {}, "rwkv": {}, "recurrent_gemma": {
        "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": WINDOW
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False
    },
    "bamba": {"attn_layer_indices": [1]}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "qwen3_next": LINEAR, "qwen3_5_text": LINEAR,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": None}, "olmo_hybrid": {},
}  # fmt: skip

# Of a multimodal model's tower, by the names of all of them
TOWER: dict[str, Any] = {
    "hidden_size": 16, "embed_dim": 16, "intermediate_size": 24, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2, "num_heads": 2,
    "image_size": 16, "patch_size": 4, "out_hidden_size": 32, "projection_dim": 32, "spatial_merge_size": 2, "temporal_patch_size": 1,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "vision_feature_layer": -1,
}  # fmt: skip
TEXT_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
GLM_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 2],
    }
}
# What the language model of each needs beside SIZES
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": WINDOWED, "glm4v": GLM_MROPE, "glm4v_moe": GLM_MROPE, "glm46v": GLM_MROPE, "glm_ocr": GLM_MROPE, "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE, "qwen3_vl": MROPE, "qwen3_vl_moe": MROPE, "qwen3_5": LINEAR | MROPE, "llava": {}, "internvl": {}, "mistral3": {},
    "llama4": {}, "gemma4": WINDOWED,
}  # fmt: skip
# Which of these are tried by default
ARCHITECTURES |= {
    name: {} for name in ("gemma3", "glm4v", "glm4v_moe", "glm_ocr", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava")
}

# Of those whose layers, attention or experts are built alike, one: what CI tries of each change (`make test-architectures` has all)
KINDS = (
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "llama", "qwen3", "gemma3_text", "phi3", "cohere2", "minicpm3", "gpt2",
    "gpt_neox", "opt", "bloom", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "jetmoe", "mamba2", "rwkv", "recurrent_gemma", "bamba",
    "qwen3_next", "lfm2_moe", "glm4v", "qwen3_vl",
)  # fmt: skip


def known_to(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of the sizes that a config has."""
    known = {*vars(config), *dir(type(config)), *getattr(config, "attribute_map", {})}
    return {key: value for key, value in sizes.items() if key in known}


def config_of(name: str) -> Any:
    """The config of an architecture, with the values of SIZES that it knows; of a multimodal one in the config of each part."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(name)
    if name in MULTIMODAL:
        text, tower = default.get_text_config(), default.vision_config
        own = {key: value for key, value in MULTIMODAL[name].items()}
        parts = {
            "text_config": {"model_type": text.model_type, **known_to(text, SIZES), **own},
            "vision_config": {"model_type": tower.model_type, **known_to(tower, TOWER)},
        }
        return AutoConfig.for_model(name, **parts, **known_to(default, {key: SIZES[key] for key in TEXT_IDS}))
    values = known_to(default, SIZES) | ARCHITECTURES.get(name, {})
    return AutoConfig.for_model(name, **{key: value for key, value in values.items() if value is not None})


def built(name: str) -> Any:
    """The model in float32, the same each time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    torch.manual_seed(0)
    kind = AutoModelForMultimodalLM if name in MULTIMODAL else AutoModelForCausalLM
    return kind.from_config(config_of(name), dtype=torch.float32)


def write_checkpoint(name: str, folder: Path) -> Path:
    """Save the model, as transformers does, and the shipped tokenizer in a folder; returns the folder."""
    model = built(name)
    model.generation_config.eos_token_id = SIZES[
        "eos_token_id"
    ]  # which a multimodal model's config does not always have
    model.save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copyfile(ASSET / file, folder / file)
    return folder
