"""Any other method that PEFT has, with the fields of PEFT's own configuration class."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Finetuning, Model, ModelFamily, preset
from glmtuner.errors import CheckpointError, ConfigError, did_you_mean
from glmtuner.finetuning.adapter import ADAPTER, is_pattern, read_adapter_config, sort_names
from glmtuner.finetuning.targets import excluded_modules
from glmtuner.finetuning.trained import check_fit, load_tensors, require_finite, same_bits

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# Fields that say what an adapter is of, not what it computes.
DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip
PROMPTS = "it learns virtual tokens in front of the text; type finetuning=p_tuning, a learned prefix in every layer"
REFUSED = {
    "LORA": "type finetuning=lora, which has all of its settings",
    **dict.fromkeys(
        ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"), PROMPTS
    ),
    "ADALORA": "it moves ranks between layers by a schedule of its own during a training, which is not called here; type finetuning=lora",
    "ADAPTION_PROMPT": "it replaces the attention of a few architectures by its own code; type finetuning=p_tuning",
    "POLY": "it needs the number of each record's task; type finetuning=lora",
    "SHADOW": "it trains a second network beside the model, which has outputs of its own; type finetuning=lora",
    "XLORA": "it mixes several trained LoRA adapters; merge them with model.checkpoint_dir=<first>,<second>",
}
NORMS = "LN_TUNING"  # trains normalisation layers
NO_TARGETS = ("TRAINABLE_TOKENS",)  # whose default is the embedding


@preset("finetuning", "peft")
@dataclass(kw_only=True)
class Peft(Finetuning):
    """A method of PEFT: `config` has the fields of its configuration class there."""

    peft_type: str
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft_type = self.peft_type.upper()
        if reason := REFUSED.get(self.peft_type):
            raise ConfigError(f"finetuning.peft_type={self.peft_type}: {reason}")
        legal = sorted(peft_types() - REFUSED.keys())
        if self.peft_type not in legal:
            raise ConfigError(
                f"finetuning.peft_type={self.peft_type}: PEFT has no such method{did_you_mean(self.peft_type, legal, 'legal: ' + ', '.join(legal))}"
            )

    def impossible(self, bits: int | None, sharded: bool) -> Iterator[str]:
        if sharded:
            yield f"finetuning=peft finetuning.peft_type={self.peft_type} with sharded weights: it reads whole matrices; type parallel=ddp"

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        self.peft_config({})

    def peft_config(self, defaults: Mapping[str, Any]) -> Any:
        """PEFT's configuration, with `defaults` for what `config` leaves out; raises ConfigError for fields that it does not have."""
        from peft import TaskType

        cls = config_class(self.peft_type)
        if wrong := [*field_errors(cls, self.config)]:
            raise ConfigError("; ".join(wrong))
        values = {**{name: value for name, value in defaults.items() if name in settable(cls)}, **self.config}
        try:
            return cls(**values, task_type=TaskType.CAUSAL_LM)
        except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"finetuning.peft_type={self.peft_type}: PEFT refuses finetuning.config={shown(self.config)} "
                f"({' '.join(str(error).split())[:300]}); its fields: {', '.join(settable(cls))}"
            ) from None

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import get_peft_model

        given: Any = self.config.get("target_modules")
        names = self.targets(model, family)
        defaults: dict[str, Any] = {"target_modules": names or None, "feedforward_modules": []}
        takes = settable(config_class(self.peft_type))
        if names and "target_modules" in takes and self.peft_type != NORMS and given != "all-linear":
            pattern = isinstance(given, str) or is_pattern(names)
            knob = "finetuning.config.target_modules"
            left_out = excluded_modules(model, family, names, is_pattern=pattern, knob=knob)
            if left_out and "exclude_modules" in takes and not self.config.get("exclude_modules"):
                defaults["exclude_modules"] = left_out
        if "target_modules" in takes and "layers_to_transform" in takes:
            check_layers(self.config.get("layers_to_transform"), len(family.blocks(model)))
        config = self.peft_config(defaults)
        if given == ["all"]:
            config.target_modules = set(names)
        try:
            adapted: Any = get_peft_model(model, config)
        except (
            ValueError,
            TypeError,
            ImportError,
            NotImplementedError,
            KeyError,
            AttributeError,
            AssertionError,
            RuntimeError,
        ) as error:
            raise ConfigError(
                f"finetuning.peft_type={self.peft_type} with finetuning.config={shown(self.config)} does not fit this model: "
                f"{' '.join(str(error).split())[:300]}; the fields of {type(config).__name__}: {', '.join(takes)}"
            ) from None
        half = sorted(
            name for name, value in adapted.named_parameters() if value.requires_grad and value.element_size() < 4
        )
        if half:
            raise ConfigError(
                f"finetuning.peft_type={self.peft_type}: {len(half)} weights would be trained in half precision, which loses small "
                f"steps (such as {half[0].removeprefix('base_model.model.')}); type model.dtype=float32"
            )
        return adapted

    def targets(self, model: "nn.Module", family: ModelFamily) -> list[str]:
        """The names of the modules to adapt: those of the configuration, or the default of finetuning=lora."""
        given = self.config.get("target_modules")
        if given == ["all"]:
            return list(family.linears)
        if given:
            return [given] if isinstance(given, str) else list(given)
        if self.peft_type in NO_TARGETS:
            return []
        if self.peft_type == NORMS:
            ends = (
                path.rpartition(".")[2] for path, each in model.named_modules() if "norm" in type(each).__name__.lower()
            )
            return [*dict.fromkeys(ends)]
        return list(family.lora_targets or family.attention)

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        model.save_pretrained(folder)
        sort_names(folder)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        self.save(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        saved = load_tensors(folder / ADAPTER)
        require_finite({name: value for name, value in saved.items() if value.is_floating_point()}, folder / ADAPTER)
        check_fit(get_peft_model_state_dict(model), saved, folder)
        try:
            set_peft_model_state_dict(model, dict(saved))
        except (RuntimeError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"the adapter in {folder} does not fit this model: {' '.join(str(error).split())[:300]}"
            ) from None
        now: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
        if wrong := sorted(name for name, value in saved.items() if not same_bits(now[name], value)):
            raise CheckpointError(
                f"PEFT does not give back {len(wrong)} weights of the adapter in {folder} (such as {wrong[0]}); it cannot be loaded"
            )


@cache
def peft_types() -> frozenset[str]:
    """The names of PEFT's methods, read from its source, since importing it would import torch."""
    spec = find_spec("peft")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "utils" / "peft_types.py").read_text(encoding="utf-8")
    declared = text.partition("class PeftType")[2].partition("\nclass ")[0]
    return frozenset(re.findall(r'^    ([A-Z0-9_]+) = "', declared, re.MULTILINE))


def config_class(peft_type: str) -> Any:
    """PEFT's configuration class of a method."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]


def settable(cls: Any) -> list[str]:
    """The fields of a configuration class that change what an adapter computes."""
    return [each.name for each in dataclasses.fields(cls) if each.init and each.name not in DESCRIPTIVE]


def field_errors(cls: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each value whose field the class does not have, or whose type the field does not take."""
    known = settable(cls)
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # names that PEFT imports for type checkers alone
        hints = {}
    for name, value in values.items():
        if name not in known:
            yield (
                f"unknown key finetuning.config.{name}{did_you_mean(name, known, f'the fields of {cls.__name__}: ' + ', '.join(known))}"
            )
        elif not fits(hints.get(name, Any), value):
            yield f"finetuning.config.{name}={shown(value)}: {cls.__name__} takes {described(hints[name])}"


def fits(hint: Any, value: Any) -> bool:
    """Whether a value of YAML has the type of an annotation; a list stands for a tuple and a set, a dictionary for a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(each, value) for each in arguments)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint in (bool, str):
        return type(value) is hint
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float)
    kind = origin or hint
    if kind in (list, tuple, set):
        inner = [each for each in arguments if each is not Ellipsis]
        return isinstance(value, list) and (not inner or all(any(fits(each, item) for each in inner) for item in value))
    if kind is dict:
        return isinstance(value, dict) and (not arguments or all(fits(arguments[1], item) for item in value.values()))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [member.value for member in kind]
    return not dataclasses.is_dataclass(kind) or isinstance(value, dict)


def described(hint: Any) -> str:
    """An annotation in the words of an error."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(described(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(hint) or re.sub(
        r"\btyping\.", "", str(hint) if typing.get_args(hint) else getattr(hint, "__name__", str(hint))
    )


def check_layers(layers: Any, count: int) -> None:
    """Raise ConfigError for a layer that the model does not have."""
    asked = [layers] if isinstance(layers, int) else layers or []
    if beyond := [layer for layer in asked if not 0 <= layer < count]:
        raise ConfigError(
            f"finetuning.config.layers_to_transform={layers}: there is no layer {beyond[0]}; legal: 0 to {count - 1}"
        )


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, set)):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def peft_settings(folder: Path) -> dict[str, Any]:
    """`peft_type` and `config` of a saved adapter; raises CheckpointError for one of a method or with fields that cannot be used."""
    saved = read_adapter_config(folder)
    kind = str(saved["peft_type"])
    try:
        Peft(finetuning_type="peft", peft_type=kind)
        cls = config_class(kind)
    except ConfigError as error:
        raise CheckpointError(f"the adapter in {folder} cannot be used: {error}") from None
    defaults = {each.name: each.default for each in dataclasses.fields(cls)}
    values = {
        name: value
        for name, value in saved.items()
        if name in settable(cls) and value != defaults[name] and value is not None
    }
    unknown = sorted(
        name for name, value in saved.items() if name not in defaults and value not in (None, False, [], {}, "")
    )
    if unknown:
        raise CheckpointError(
            f"the adapter in {folder} cannot be used as it was trained: the installed PEFT does not know {', '.join(unknown)} of "
            f"{kind}; type pip install -U peft"
        )
    return {"peft_type": kind, "config": values}
