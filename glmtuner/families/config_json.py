"""Whether a config.json can be what it says, before anything is built from it: types, sizes, and the weights beside it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glmtuner.errors import CheckpointError
from glmtuner.families.weight_files import Contents, contents

# The sizes by all the names that models have for them. Those of WIDTHS may differ between layers, as lists.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
VOCABULARY = ("vocab_size", "padded_vocab_size")
COUNTS = (*LAYERS, *HIDDEN, *VOCABULARY, "num_attention_heads", "n_head", "n_heads")
WIDTHS = (
    "intermediate_size",
    "ffn_hidden_size",
    "inner_hidden_size",
    "n_inner",
    "num_key_value_heads",
    "head_dim",
    "kv_channels",
    "multi_query_group_num",
)
# The deepest published models have a few hundred; building more takes minutes before anything can be compared.
MOST_LAYERS = 4096
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # in names of weights


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """The parsed config.json at `path`; raises CheckpointError where it is not an object or a size in it is no size."""
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: it holds {_shown(config)} and no object; download the model again")
    wrong = list(_wrong(config, ""))
    if wrong:
        raise CheckpointError(f"{path} is damaged: {'; '.join(wrong)}; correct it, or download the model again")
    return config


def check_weights(config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where the weight files in `folder` are damaged, or cannot be those of this config.json."""
    held = contents(folder)
    if held is None:
        return
    text: Mapping[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    wrong = list(_too_large(text, held))
    if wrong:
        raise CheckpointError(
            f"{folder}: config.json and the weights beside it do not belong together: {'; '.join(wrong)}; download the model "
            "again"
        )


def _wrong(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key == "model_type" and value is not None and not isinstance(value, str):
            yield f"{name}={_shown(value)}, where the name of a model type is expected"
        elif key in COUNTS and value is not None and not _is_size(value):
            yield f"{name}={_shown(value)}, where a whole number of at least 1 is expected"
        elif key in WIDTHS and value is not None:
            each = value if isinstance(value, list) and value else [value]
            if not all(size is None or size == 0 or _is_size(size) for size in each) or isinstance(value, bool):
                yield f"{name}={_shown(value)}, where a whole number is expected"
        elif key in ("text_config", "llm_config", "language_config") and isinstance(value, dict):
            yield from _wrong(value, f"{name}.")
        if key in LAYERS and _is_size(value) and value > MOST_LAYERS:
            yield f"{name}={value}, where {MOST_LAYERS} is the most that is loaded"


def _too_large(config: Mapping[str, Any], held: Contents) -> Iterator[str]:
    """What the weights are too small for. Every block has a tensor; the embedding has vocabulary x hidden values."""

    def size(names: tuple[str, ...]) -> tuple[str, int]:
        return next(((name, config[name]) for name in names if _is_size(config.get(name))), (names[0], 1))

    (layers_key, layers), (hidden_key, hidden) = size(LAYERS), size(HIDDEN)
    vocabulary_key, vocabulary = size(VOCABULARY)
    if layers > held.tensors:
        yield f"{layers_key}={layers}, and they hold {held.tensors} tensors in all"
    if hidden * vocabulary > held.values:
        yield f"{hidden_key}={hidden} with {vocabulary_key}={vocabulary}, and they hold at most {held.values:,} values"
    for name in WIDTHS:
        width = config.get(name, 0)
        if _is_size(width) and width * (hidden if name not in ("head_dim", "kv_channels") else 1) > held.values:
            yield f"{name}={width}, and they hold at most {held.values:,} values"
    for name in ("num_attention_heads", "n_head", "n_heads"):
        if _is_size(config.get(name)) and config[name] > held.values:
            yield f"{name}={config[name]}, and they hold at most {held.values:,} values"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
