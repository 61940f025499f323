"""Tiny checkpoints of ChatGLM as the hub has the real ones: upstream names, its tokenizer files or stand-ins, code that must not run."""

import base64
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

REMOTE_CODE = "raise RuntimeError('code that came with a checkpoint was run')\n"
CODE_FILES = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")


def write_checkpoint(preset: str, folder: Path, upstream_files: Path) -> Path:
    """A checkpoint for `model=<preset>` (chatglm_6b, chatglm2_6b, chatglm3_6b, glm4_9b_chat) in `folder`; returns it."""
    folder.mkdir(parents=True)
    if preset == "chatglm_6b":
        _write_first_generation(folder, upstream_files)
    elif preset == "glm4_9b_chat":
        _write_glm4(folder, upstream_files)
    else:
        source = upstream_files / "chatglm2_realvocab"
        for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
    for name in CODE_FILES:
        (folder / name).write_text(REMOTE_CODE, encoding="utf-8")
    _add(folder / "config.json", {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    })  # fmt: skip
    tokenizer = "ChatGLM4Tokenizer" if preset == "glm4_9b_chat" else "ChatGLMTokenizer"
    _add(folder / "tokenizer_config.json", {"AutoTokenizer": [f"tokenization_chatglm.{tokenizer}", None]})
    return folder


def _add(path: Path, auto_map: dict) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "auto_map": auto_map}), encoding="utf-8")


def _write_glm4(folder: Path, upstream_files: Path) -> None:
    """Random weights over GLM-4's vocabulary, of which the tokenizer knows single bytes and control tokens."""
    config = json.loads((upstream_files / "chatglm2_realvocab/config.json").read_text(encoding="utf-8"))
    vocabulary, hidden = 151552, 8
    config |= {
        "padded_vocab_size": vocabulary, "hidden_size": hidden, "num_attention_heads": 2, "kv_channels": 8, "rope_ratio": 500,
        "multi_query_group_num": 1, "num_layers": 2, "layernorm_epsilon": 1.5625e-07, "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "seq_length": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "tokenizer.model").write_text("".join(lines), encoding="utf-8")
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left", "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(0)
    inner = config["ffn_hidden_size"]
    shapes = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (32, hidden), "self_attention.query_key_value.bias": (32,),
        "self_attention.dense.weight": (hidden, 16), "mlp.dense_h_to_4h.weight": (2 * inner, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, inner),
    }  # fmt: skip
    weights = {
        f"transformer.encoder.layers.{layer}.{name}": torch.randn(shape) * 0.3 if len(shape) > 1 else torch.ones(shape)
        for layer in range(2) for name, shape in shapes.items()
    }  # fmt: skip
    for name in ("embedding.word_embeddings", "output_layer"):
        weights[f"transformer.{name}.weight"] = torch.randn(vocabulary, hidden) * 0.3
    weights["transformer.encoder.final_layernorm.weight"] = torch.ones(hidden)
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2)
    stored = {name: value.bfloat16() for name, value in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _write_first_generation(folder: Path, upstream_files: Path) -> None:
    """Random weights, in the two .bin shards and the words of THUDM/chatglm-6b."""
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(upstream_files / "tokenizer_v1" / name, folder / name)
    config = json.loads((upstream_files / "chatglm_v1/config.json").read_text(encoding="utf-8"))
    config |= {
        "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3,
        "vocab_size": 130528, "hidden_size": 16, "inner_hidden_size": 32, "num_attention_heads": 2, "num_layers": 3,
        "max_sequence_length": 2048, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    embeddings = torch.randn(config["vocab_size"], hidden) * 0.3
    shards: list[dict[str, torch.Tensor]] = [{"transformer.word_embeddings.weight": embeddings}, {}]
    shapes = {
        "input_layernorm": (hidden,), "attention.query_key_value": (3 * hidden, hidden), "attention.dense": (hidden, hidden),
        "post_attention_layernorm": (hidden,), "mlp.dense_h_to_4h": (inner, hidden), "mlp.dense_4h_to_h": (hidden, inner),
    }  # fmt: skip
    for layer in range(config["num_layers"]):
        for name, shape in shapes.items():
            weight = torch.randn(shape) * 0.3 if len(shape) > 1 else torch.ones(shape)
            shards[layer % 2][f"transformer.layers.{layer}.{name}.weight"] = weight
            shards[layer % 2][f"transformer.layers.{layer}.{name}.bias"] = torch.zeros(shape[0])
        shards[layer % 2][f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    shards[1] |= {"transformer.final_layernorm.weight": torch.ones(hidden),
                  "transformer.final_layernorm.bias": torch.zeros(hidden), "lm_head.weight": embeddings}  # fmt: skip
    index = {}
    for place, shard in enumerate(shards):
        name = f"pytorch_model-{place + 1:05}-of-00002.bin"
        torch.save({key: value.half() for key, value in shard.items()}, folder / name)
        index |= dict.fromkeys(shard, name)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content), encoding="utf-8")
