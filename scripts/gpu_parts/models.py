"""Models of real sizes with random weights, generated on the device while they are loaded; no file holds them.

Such a model is a folder with only a config.json. transformers loads it like any checkpoint, quantization included, except
that each tensor is generated when it is read. The tokenizer is the shipped model's, whatever the size of the vocabulary.
"""

import gc
import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

STD = 0.02  # of a random matrix
TOKENIZER = "package://tiny_glm"
CHATGLM2 = {"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "num_layers": 28, "num_attention_heads": 32,
            "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024,
            "layernorm_epsilon": 1e-5, "seq_length": 8192, "add_qkv_bias": True, "torch_dtype": "bfloat16"}  # fmt: skip
GLM = {"model_type": "glm", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
       "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "attention_bias": True, "rms_norm_eps": 1.5625e-7,
       "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16", "pad_token_id": 0,
       "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}  # fmt: skip
# values of the published config.json files
CONFIGS: dict[str, dict[str, Any]] = {
    "ChatGLM-6B": {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
                   "num_attention_heads": 32, "vocab_size": 130528, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048,
                   "position_encoding_2d": True, "torch_dtype": "float16"},
    "ChatGLM3-6B": CHATGLM2,
    "GLM-4-9B": GLM,
    "GLM-Edge-1.5B": GLM | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
                            "num_key_value_heads": 4, "vocab_size": 59264, "max_position_embeddings": 8192},
}  # fmt: skip
PRESETS = {
    "ChatGLM-6B": (
        "model=chatglm_6b",
        "model.template=chatglm",
    ),  # which the shipped tokenizer's own chat template is not
    "ChatGLM3-6B": ("model=chatglm3_6b", "model.template=glm4"),  # the shipped tokenizer has <sop>, ChatGLM3's has sop
    "GLM-4-9B": ("model=glm4_9b_chat_hf",),
    "GLM-Edge-1.5B": ("model=causal_lm", "model.family=glm"),
}
SMALL = {"hidden_size": 64, "num_layers": 3, "num_hidden_layers": 3, "num_attention_heads": 4, "kv_channels": 16, "head_dim": 16,
         "intermediate_size": 96, "ffn_hidden_size": 96, "inner_hidden_size": 128, "vocab_size": 3200,
         "padded_vocab_size": 3200, "dtype": "float32", "torch_dtype": "float32"}  # fmt: skip


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from glmtuner.config.paths import model_source

    return AutoTokenizer.from_pretrained(model_source(TOKENIZER), padding_side="left")


def config_of(name: str, miniature: bool) -> dict[str, Any]:
    """The content of a model's config.json, with the shipped tokenizer's ids for its special tokens."""
    config = dict(CONFIGS[name])
    if miniature:
        config |= {key: value for key, value in SMALL.items() if key in config}
    if "inner_hidden_size" in config:
        names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]", "pad": "<|endoftext|>"}
        config |= {f"{kind}_token_id": tokenizer().convert_tokens_to_ids(token) for kind, token in names.items()}
    return config


def model_folder(name: str, root: Path, miniature: bool) -> Path:
    """A new folder with a config.json and no weights."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name, miniature)), encoding="utf-8")
    return folder


def model_overrides(name: str, root: Path, miniature: bool) -> list[str]:
    """The overrides that select the model."""
    folder = model_folder(name, root, miniature)
    return [*PRESETS[name], f"model.model_name_or_path={folder}", f"model.tokenizer_name={TOKENIZER}"]


class RandomTensor:
    """A tensor of a checkpoint that is generated when it is read, with the interface of a safetensors slice."""

    def __init__(self, name: str, like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.shape, self.dtype, self.device = name, tuple(like.shape), dtype, device

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> torch.dtype:
        return self.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        if len(self.shape) > 1:
            # of its own, since transformers reads several tensors at a time, in an order that changes
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
            return torch.empty(self.shape, dtype=self.dtype, device=self.device).normal_(std=STD, generator=generator)
        fill = 0.0 if self.name.endswith("bias") else 1.0  # other vectors are weights of norms
        return torch.full(self.shape, fill, dtype=self.dtype, device=self.device)


def random_state_dict(config: Any, device: torch.device) -> dict[str, RandomTensor]:
    """A state dict of the configured model; tied weights are in it once, as in a file."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype = config.dtype or torch.float32
    tied = set(model.all_tied_weights_keys)
    return {
        name: RandomTensor(name, value, dtype, device) for name, value in model.state_dict().items() if name not in tied
    }  # fmt: skip


@contextmanager
def random_models(device: torch.device) -> Iterator[None]:
    """While this lasts, a folder without weights is loaded with random ones."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, source: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        folder = Path(source)
        if config is None or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return original.__func__(cls, source, *args, config=config, **options)
        for name in ("trust_remote_code", "revision", "cache_dir", "token"):
            options.pop(name, None)
        model_class = cls._model_mapping[type(config)]
        model = model_class.from_pretrained(
            None, config=config, state_dict=random_state_dict(config, device), **options
        )
        (model[0] if isinstance(model, tuple) else model).name_or_path = str(folder)
        return model

    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = original


def random_model(config: Any, device: torch.device, **options: Any) -> Any:
    """A model of a transformers class with random weights on the device."""
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=random_state_dict(config, device),
        dtype=config.dtype,
        device_map={"": device},
        **options,
    )


def transformers_config(name: str, miniature: bool) -> Any:
    """A configuration of the same shape for a class of transformers itself."""
    from transformers import GlmConfig

    config = config_of(name, miniature)
    if config["model_type"] == "glm":
        return GlmConfig(**config)
    return GlmConfig(
        hidden_size=config["hidden_size"], intermediate_size=config["ffn_hidden_size"], num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"], num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"], vocab_size=config["padded_vocab_size"], attention_bias=True, pad_token_id=0,
        rope_parameters=GLM["rope_parameters"], tie_word_embeddings=False, dtype=config["torch_dtype"],
    )  # fmt: skip


def free() -> None:
    """Free the memory of earlier runs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- records of given lengths --------------------------------------------------------------------------------------------


@cache
def characters() -> list[str]:
    """Chinese characters that are one token each."""
    shipped = tokenizer()
    decoded = (shipped.decode([token]) for token in range(300, len(shipped)))
    return sorted({text for text in decoded if len(text) == 1 and "\u4e00" <= text <= "\u9fff"})


def text_of(tokens: int, draw: random.Random) -> str:
    """A text of at least that many tokens."""
    return "".join(draw.choice(characters()) for _ in range(2 * tokens)) if tokens else ""


def cut_to(tokens: int, draw: random.Random) -> str:
    """A text of that many tokens, or one or two fewer."""
    text = text_of(tokens, draw)
    offsets = tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return text[: offsets[min(tokens, len(offsets)) - 1][1]]


def write_records(path: Path, lengths: list[tuple[int, int]], *, ranked: bool = False, seed: int = 0) -> None:
    """Write Alpaca records with questions and answers of about these lengths; ranked ones get a second, shorter answer."""
    draw = random.Random(seed)
    records = []
    for question_tokens, answer_tokens in lengths:
        answer = cut_to(answer_tokens, draw)
        output = [answer, answer[: max(len(answer) * 3 // 4, 1)]] if ranked else answer
        records.append({"instruction": cut_to(question_tokens, draw), "input": "", "output": output})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
