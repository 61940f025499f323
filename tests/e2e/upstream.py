"""Tiny checkpoints of ChatGLM as the hub has the real ones: upstream names, real tokenizer files, code that must not run."""

import json
import shutil
from pathlib import Path

import torch

REMOTE_CODE = "raise RuntimeError('code that came with a checkpoint was run')\n"
CODE_FILES = ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py")


def write_checkpoint(preset: str, folder: Path, goldens: Path) -> Path:
    """A checkpoint for `model=<preset>` (chatglm_6b, chatglm2_6b, chatglm3_6b) in `folder`; returns it."""
    folder.mkdir(parents=True)
    if preset == "chatglm_6b":
        _write_first_generation(folder, goldens)
    else:
        source = goldens / "chatglm2_realvocab"
        for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
    for name in CODE_FILES:
        (folder / name).write_text(REMOTE_CODE, encoding="utf-8")
    _add(folder / "config.json", {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    })  # fmt: skip
    _add(folder / "tokenizer_config.json", {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]})
    return folder


def _add(path: Path, auto_map: dict) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "auto_map": auto_map}), encoding="utf-8")


def _write_first_generation(folder: Path, goldens: Path) -> None:
    """Random weights, in the two .bin shards and the words of THUDM/chatglm-6b."""
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(goldens / "tokenizer_v1" / name, folder / name)
    config = json.loads((goldens / "chatglm_v1/config.json").read_text(encoding="utf-8"))
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
