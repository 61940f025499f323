"""The keys of finetuning=lora under PEFT's own names: which exclude each other, and whether the model has what they name.

PEFT ignores names that nothing has: of modules to save, of patterns, and of layers beyond the last one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from glmtuner.config.groups import ModelFamily
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.finetuning.adapter import is_pattern
from glmtuner.finetuning.initial import changes_base, initialization_error
from glmtuner.finetuning.targets import is_named

if TYPE_CHECKING:
    from torch import nn


class LoraKeys(Protocol):
    """The fields of `Lora` that are checked here."""

    lora_target: list[str]
    init_lora_weights: Any
    use_dora: bool
    lora_bias: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    exclude_modules: list[str]
    layers_to_transform: list[int]
    layers_pattern: list[str]
    modules_to_save: list[str]
    trainable_token_indices: list[int]
    target_parameters: list[str]


EVA = {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "whiten": False, "adjust_scaling_factors": True, "batch_size": 4, "max_batches": 1000}  # fmt: skip


def exclusive_keys(lora: LoraKeys) -> Iterator[str]:
    """One sentence for each value, or pair of values, that PEFT cannot train."""
    if wrong := initialization_error(lora.init_lora_weights):
        yield wrong
    word = str(lora.init_lora_weights).lower()
    if word != "eva":
        for name, default in EVA.items():
            if (value := getattr(lora, f"eva_{name}")) != default:
                shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
                yield f"finetuning.eva_{name}={shown} without finetuning.init_lora_weights=eva has no effect; leave it out"
    if lora.lora_bias and lora.use_dora:
        yield "finetuning.lora_bias=true with finetuning.use_dora=true: DoRA has no place for a bias; leave one out"
    if lora.lora_bias and word not in ("true", "false"):
        yield (
            f"finetuning.lora_bias=true with finetuning.init_lora_weights={word}: a bias is known to the default initialization "
            "alone; leave one out"
        )
    if lora.layers_to_transform and is_pattern(lora.lora_target):
        yield (
            "finetuning.layers_to_transform with a regular expression in finetuning.lora_target: name the layers in the expression"
        )
    if lora.layers_pattern and not lora.layers_to_transform:
        yield "finetuning.layers_pattern without finetuning.layers_to_transform has no effect; leave it out"
    if lora.target_parameters:
        for name, active in (
            ("use_dora=true", lora.use_dora), ("lora_bias=true", lora.lora_bias),
            (f"init_lora_weights={word}", changes_base(word) or word in ("loftq", "eva", "mica")),
            ("layers_to_transform", bool(lora.layers_to_transform)),
        ):  # fmt: skip
            if active:
                yield f"finetuning.target_parameters with finetuning.{name}: parameters are adapted without it; leave one out"
    for name in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(lora, name).items():
            if not _is_expression(key):
                yield f"finetuning.{name}={{{key}: {value}}}: {key!r} is not a regular expression"
            elif not (value >= 1 if name == "rank_pattern" else value > 0):
                yield f"finetuning.{name}={{{key}: {value}}}: a {'rank is at least 1' if name == 'rank_pattern' else 'number above 0'}"
    for key in ("exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
        if len({*getattr(lora, key)}) < len(getattr(lora, key)):
            yield f"finetuning.{key}=[{','.join(getattr(lora, key))}] names something twice"
    for key in ("layers_to_transform", "trainable_token_indices"):
        if any(number < 0 for number in getattr(lora, key)):
            yield f"finetuning.{key}={getattr(lora, key)}: they are counted from 0"
    if len({*lora.layers_to_transform}) < len(lora.layers_to_transform):
        yield f"finetuning.layers_to_transform={lora.layers_to_transform} names a layer twice"


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def names_parts(lora: LoraKeys) -> bool:
    """Whether keys other than lora_target name parts of the model."""
    keys = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "modules_to_save")
    return any(getattr(lora, key) for key in (*keys, "trainable_token_indices", "target_parameters"))


def check_names(lora: LoraKeys, model: "nn.Module", family: ModelFamily) -> None:
    """Raise ConfigError where the model does not have what the keys name."""
    paths = [path for path, _ in model.named_modules() if path]
    short = [*dict.fromkeys(path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit())]
    for key in ("exclude_modules", "modules_to_save"):
        names: list[str] = getattr(lora, key)
        if key == "exclude_modules" and is_pattern(names):
            if not any(re.fullmatch(names[0], path) for path in paths):
                raise ConfigError(f"finetuning.{key}=[{names[0]}]: no module's whole path matches this expression")
            continue
        for name in names:
            if not any(is_named(path, name) for path in paths):
                raise ConfigError(
                    f"finetuning.{key}=[{','.join(names)}]: no module of this model is named {name!r}"
                    f"{did_you_mean(name, short, f'its modules: {_some(short)}')}"
                )
    parameters = [name for name, _ in model.named_parameters()]
    for name in lora.target_parameters:
        if not any(is_named(path, name) for path in parameters):
            ends = [*dict.fromkeys(".".join(path.split(".")[-2:]) for path in parameters)]
            raise ConfigError(
                f"finetuning.target_parameters=[{','.join(lora.target_parameters)}]: no parameter of this model is named {name!r}"
                f"{did_you_mean(name, ends, f'its parameters: {_some(ends)}')}"
            )
    whole: Any = model
    ends = [
        path
        for path, each in model.named_modules()
        if each in (whole.get_input_embeddings(), whole.get_output_embeddings())
    ]
    saved = [name for name in lora.modules_to_save if any(is_named(path, name) for path in ends)]
    if lora.trainable_token_indices and saved:
        raise ConfigError(
            f"finetuning.trainable_token_indices with finetuning.modules_to_save=[{','.join(saved)}]: the whole module is trained "
            "already; leave one out"
        )
    count = len(family.blocks(model))
    if beyond := [layer for layer in lora.layers_to_transform if not 0 <= layer < count]:
        raise ConfigError(
            f"finetuning.layers_to_transform={lora.layers_to_transform}: there is no layer {beyond[0]}; legal: 0 to {count - 1}"
        )
    rows = _rows(model)
    if beyond := [token for token in lora.trainable_token_indices if not 0 <= token < rows]:
        raise ConfigError(
            f"finetuning.trainable_token_indices={lora.trainable_token_indices}: there is no token {beyond[0]}; legal: 0 to {rows - 1}"
        )


def check_patterns(lora: LoraKeys, adapted: Any) -> None:
    """Raise ConfigError where a key of a pattern matches no adapted layer of a model with its adapter."""
    from peft.tuners.lora.layer import LoraLayer

    paths = [path for path, module in adapted.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    short = [*dict.fromkeys(path.rpartition(".")[2] for path in paths)]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, name):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths):
                raise ConfigError(
                    f"finetuning.{name}: no adapted layer matches {key!r}{did_you_mean(key, short, f'adapted: {_some(short)}')}"
                )


def check_precision(adapted: "nn.Module") -> None:
    """Raise ConfigError where parts of a half-precision base would be trained in its dtype."""
    half = sorted(
        name for name, value in adapted.named_parameters() if value.requires_grad and value.element_size() < 4
    )
    if half:
        raise ConfigError(
            f"finetuning.modules_to_save or finetuning.bias: {len(half)} weights would be trained in half precision, which loses "
            f"small steps (such as {half[0].removeprefix('base_model.model.')}); type model.dtype=float32"
        )


def check_rows_of_eva(how: bool | str, config: Any) -> None:
    """Raise ConfigError where PEFT's configuration adapts what PEFT's EVA takes for a layer with inputs, and is none."""
    if how == "eva" and config.trainable_token_indices:
        raise ConfigError(
            "finetuning.init_lora_weights=eva with data.new_tokens or finetuning.trainable_token_indices: PEFT takes the trained rows "
            "of the embedding for a layer; leave one out"
        )
    if how == "eva" and config.target_parameters:
        raise ConfigError(
            f"finetuning.init_lora_weights=eva with routed experts ({config.target_parameters[0]}): it knows the inputs of layers alone; "
            "name the layers of attention in finetuning.lora_target"
        )


def excluded(names: Sequence[str], others: str | None) -> str | None:
    """One regular expression of the modules that are not adapted: those of the key, and `others`."""
    own = list(names) if is_pattern([*names]) else [rf"(.*\.)?{re.escape(name)}" for name in names]
    parts = [*own, *([others] if others else [])]
    return "|".join(f"({part})" for part in parts) if len(parts) > 1 else parts[0] if parts else None


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:24]) + (", …" if len(names) > 24 else "")
