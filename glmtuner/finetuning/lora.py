"""LoRA, by PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Finetuning, Model, ModelFamily, preset
from glmtuner.config.ranges import range_errors
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.experts import ALL_EXPERTS
from glmtuner.families.family import READ
from glmtuner.finetuning.adapter import (
    adapter_parameters,
    is_pattern,
    load_adapter,
    peft_config,
    read_lora_config,
    settings_of,
    sort_names,
)
from glmtuner.finetuning.experts import Targets, adapted_by_peft, set_dropout, settle, targets_matching, targets_of
from glmtuner.finetuning.targets import check_attachment, excluded_modules, no_module_named
from glmtuner.run_folder.folder import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@preset("finetuning", "lora")
@dataclass(kw_only=True)
class Lora(Finetuning):
    """Low-rank update, W + (alpha / rank) B A, on chosen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target: list[str]

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "finetuning",
                self,
                (
                    ("lora_rank", self.lora_rank >= 1, "a rank is at least 1"),
                    ("lora_alpha", self.lora_alpha > 0, "above 0; the update is scaled by alpha / rank"),
                    ("lora_dropout", 0 <= self.lora_dropout < 1, "a share in [0, 1)"),
                ),
            )
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def resolved(self, family: ModelFamily, layers: int) -> Self:
        """The method with the family's targets for an empty list, all linear layers and experts for [all]; raises ConfigError.

        Names are checked as far as the family knows them; `attach` checks all of them by the model's own modules.
        """
        if not self.lora_target:
            targets = family.lora_targets or family.attention
            if not targets:
                raise ConfigError(
                    "finetuning.lora_target=[]: no projections of attention or of a recurrent state were recognised in the blocks of "
                    f"this model, so there is no default; name layers of its blocks ({', '.join(family.linears)}), or type "
                    "finetuning.lora_target=[all]"
                )
            return replace(self, lora_target=list(targets))
        if self.lora_target == ["all"]:
            return replace(self, lora_target=[*family.linears, *([ALL_EXPERTS] if family.experts else [])])
        known = (*family.linears, *family.experts, *family.left_out)
        if family.name != READ and not is_pattern(self.lora_target):
            for name in self.lora_target:
                if not {name, name.rpartition(".")[2]} & {*known}:
                    raise no_module_named(name, known, family, self.lora_target)
        return self

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        if family is None or is_pattern(self.lora_target) or not {*self.lora_target} <= {*family.linears}:
            check_attachment(self, model, family)

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import LoraConfig, TaskType

        pattern = self.lora_target[0] if is_pattern(self.lora_target) else None
        found = targets_matching(model, pattern) if pattern else targets_of(model, self.lora_target)
        targets = found or Targets([], [], [])
        excluded = excluded_modules(model, family, [pattern] if pattern else targets.modules, is_pattern=bool(pattern))
        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts fractions, too
            lora_dropout=self.lora_dropout,
            target_modules=targets.modules if found else pattern,
            target_parameters=targets.parameters or None,
            exclude_modules=excluded,
            task_type=TaskType.CAUSAL_LM,
        )
        try:
            settle(config, model)
            adapted: Any = adapted_by_peft(model, config)  # PEFT keeps adapters in float32 on a half-precision base
        except ValueError as error:  # no module's path matches, or one that is no linear layer
            wrong = f"finetuning.lora_target=[{','.join(self.lora_target)}]: {' '.join(str(error).split())[:300]}"
            raise ConfigError(
                f"{wrong}; name linear layers, or type a regular expression that matches their whole paths"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"finetuning.lora_rank={self.lora_rank}: not enough memory for the adapter ({reason}); type a smaller one"
            ) from error
        if config.target_parameters and self.lora_dropout:
            set_dropout(adapted, self.lora_dropout)
        if targets.left_out and not next(model.parameters()).is_meta:  # said once, of the model with values
            say(
                f"{len(targets.left_out)} linear layers (such as {targets.left_out[0]}) are not adapted: PEFT reads their names as "
                f"those of the routed experts of {model.config.model_type}, and their weights are quantized"
            )
        return adapted

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        if not adapter_parameters(model):
            raise AssertionError("an adapter without tensors")
        model.save_pretrained(folder)
        sort_names(folder)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        self.save(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        load_adapter(model, folder)


class SavedLora(Lora):
    """The LoRA of a saved adapter, with all settings of its adapter_config.json, also those without a key."""

    saved: Mapping[str, Any]  # not fields, which config.yaml would list
    folder: Path

    @classmethod
    def of(cls, folder: Path, finetuning_type: str = "lora") -> Self:
        """The method that a saved adapter was trained with; raises CheckpointError."""
        saved = read_lora_config(folder)
        method = cls(finetuning_type=finetuning_type, **settings_of(saved))
        method.saved, method.folder = saved, folder
        return method

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        import torch

        on_meta = any(parameter.is_meta for parameter in model.parameters())
        config = peft_config(self.saved, self.folder, on_meta=on_meta)
        try:
            settle(config, model)
            adapted: Any = adapted_by_peft(model, config)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(
                f"the adapter in {self.folder} does not fit this model: {' '.join(str(error).split())[:300]}"
            ) from None
        return adapted
