"""Any other method that PEFT has, with the fields of PEFT's own configuration class."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Finetuning, Model, ModelFamily, preset
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError, did_you_mean
from glmtuner.finetuning import adalora
from glmtuner.finetuning.adapter import ADAPTER, is_pattern, read_adapter_config, sort_names
from glmtuner.finetuning.peft_fields import field_errors, fields_of, shown, stored, stored_fields
from glmtuner.finetuning.targets import excluded_modules
from glmtuner.finetuning.trained import check_fit, load_tensors, require_finite, same_bits

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

PROMPTS = "it learns virtual tokens in front of the text; type finetuning=p_tuning, a learned prefix in every layer"
REFUSED = {
    "LORA": "type finetuning=lora, which has all of its settings",
    **dict.fromkeys(
        ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"), PROMPTS
    ),
    "POLY": "it needs the number of each record's task; type finetuning=lora",
    "SHADOW": "it trains a second network beside the model, which has outputs of its own; type finetuning=lora",
    "XLORA": "it mixes several trained LoRA adapters; merge them with model.checkpoint_dir=<first>,<second>",
}
ADALORA = "ADALORA"  # changes its ranks during a training
NORMS = "LN_TUNING"  # trains normalisation layers
NO_TARGETS = ("TRAINABLE_TOKENS", "ADAPTION_PROMPT")  # whose defaults are the embedding, and the attention
CHOSEN = {
    "ADAPTION_PROMPT": {"adapter_len": "10", "adapter_layers": "30"}
}  # fields without a default, with their papers' values


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
        fields = stored_fields(self.peft_type)  # a newer PEFT tells its fields when the run starts
        wrong = [*field_errors(fields, self.config)] if fields is not None else []
        wrong += [
            f"finetuning.config.{name} must be chosen for finetuning.peft_type={self.peft_type}; type finetuning.config.{name}={value}"
            for name, value in CHOSEN.get(self.peft_type, {}).items()
            if self.config.get(name) is None
        ]
        if self.peft_type == "ADAMSS" and self.config.get("use_asa"):
            wrong.append(
                "finetuning.config.use_asa=true: its subspaces are chosen by a schedule of their own during a training, which is not "
                "called here; leave it out"
            )
        if self.peft_type == ADALORA and not wrong:
            wrong = [*adalora.config_errors(self.config)]
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def follows_steps(self) -> bool:
        return self.peft_type == ADALORA

    def impossible(self, bits: int | None, sharded: bool) -> Iterator[str]:
        if sharded:
            yield f"finetuning=peft finetuning.peft_type={self.peft_type} with sharded weights: it reads whole matrices; type parallel=ddp"

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        self.peft_config({})

    def peft_config(self, defaults: Mapping[str, Any]) -> Any:
        """PEFT's configuration, with `defaults` for what `config` leaves out; raises ConfigError for fields that it does not have."""
        from peft import TaskType

        cls = config_class(self.peft_type)
        fields = fields_of(cls)
        if wrong := [*field_errors(fields, self.config)]:
            raise ConfigError("; ".join(wrong))
        known = {"total_step": adalora.UNKNOWN, **defaults}
        values = {**{name: value for name, value in known.items() if name in fields.kinds}, **self.config}
        try:
            return cls(**values, task_type=TaskType.CAUSAL_LM)
        except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"finetuning.peft_type={self.peft_type}: PEFT refuses finetuning.config={shown(self.config)} "
                f"({' '.join(str(error).split())[:300]}); its fields: {', '.join(fields.kinds)}"
            ) from None

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import get_peft_model

        given: Any = self.config.get("target_modules")
        names = self.targets(model, family)
        defaults: dict[str, Any] = {"target_modules": names or None, "feedforward_modules": []}
        takes = [*fields_of(config_class(self.peft_type)).kinds]
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
        if self.peft_type == ADALORA or "forward" in vars(adapted.base_model):
            adapted.base_model.forward = MethodType(forward_of_model, adapted.base_model)
        adalora.prepare(adapted)
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

    def before_training(self, model: "nn.Module", steps: int) -> None:
        newer = [name for name in self.config if name not in stored_names(self.peft_type)]
        if newer:
            say(
                f"finetuning.config.{newer[0]}{f' and {len(newer) - 1} more' if len(newer) > 1 else ''}: known to the installed PEFT "
                f"{version('peft')}, and not to {stored()[0]}, of which finetuning.peft_type={self.peft_type} was tried"
            )
        adalora.begin(model, steps, is_given="total_step" in self.config)

    def after_step(self, model: "nn.Module", step: int) -> None:
        adalora.allocate(model, step)

    def penalty(self, model: "nn.Module") -> "torch.Tensor | None":
        return adalora.orthogonality(model)

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        adalora.drop_masked(model)
        model.save_pretrained(folder)
        sort_names(folder)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        with adalora.whole(model, folder):
            model.save_pretrained(folder)
        sort_names(folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if adalora.restored(model, folder):
            return
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


def forward_of_model(tuner: Any, *args: Any, **options: Any) -> Any:
    """The forward of the model within, as it is now: PEFT's ADAPTION_PROMPT holds that of before, and ADALORA adds its penalty to each
    batch's loss, so that it would grow with the accumulation.
    """
    return tuner.model.forward(*args, **options)


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


def stored_names(peft_type: str) -> set[str]:
    """The fields of a method that the version of PEFT has for which this was written."""
    fields = stored()[1].get(peft_type)
    return {*fields.kinds} if fields is not None else set()


def check_layers(layers: Any, count: int) -> None:
    """Raise ConfigError for a layer that the model does not have."""
    asked = [layers] if isinstance(layers, int) else layers or []
    if beyond := [layer for layer in asked if not 0 <= layer < count]:
        raise ConfigError(
            f"finetuning.config.layers_to_transform={layers}: there is no layer {beyond[0]}; legal: 0 to {count - 1}"
        )


def peft_settings(folder: Path) -> dict[str, Any]:
    """`peft_type` and `config` of a saved adapter; raises CheckpointError for one of a method or with fields that cannot be used."""
    saved = read_adapter_config(folder)
    kind = str(saved["peft_type"])
    if reason := REFUSED.get(kind):
        raise CheckpointError(f"the adapter in {folder} cannot be used: finetuning.peft_type={kind}: {reason}")
    cls = config_class(kind)
    defaults = fields_of(cls).defaults
    values = {
        name: value
        for name, value in saved.items()
        if name in defaults and value != defaults[name] and value is not None
    }
    try:
        Peft(finetuning_type="peft", peft_type=kind, config=values)
    except ConfigError as error:
        raise CheckpointError(f"the adapter in {folder} cannot be used: {error}") from None
    declared = {each.name for each in dataclasses.fields(cls)}
    unknown = sorted(
        name for name, value in saved.items() if name not in declared and value not in (None, False, [], {}, "")
    )
    if unknown:
        raise CheckpointError(
            f"the adapter in {folder} cannot be used as it was trained: the installed PEFT does not know {', '.join(unknown)} of "
            f"{kind}; type pip install -U peft"
        )
    return {"peft_type": kind, "config": values}
