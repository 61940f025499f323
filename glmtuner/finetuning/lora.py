"""LoRA, by PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Finetuning, ModelFamily, preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import CheckpointError, ConfigError, did_you_mean
from glmtuner.finetuning.adapter import (
    adapter_parameters,
    is_pattern,
    load_adapter,
    peft_config,
    read_lora_config,
    settings_of,
    sort_names,
)
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
        """The method with the family's targets for an empty list, all linear layers for [all]; raises ConfigError on unknown names."""
        if not self.lora_target:
            return replace(self, lora_target=list(family.attention))
        if self.lora_target == ["all"]:
            return replace(self, lora_target=list(family.linears))
        self._check(family.linears, family.experts)
        return self

    def _check(self, linears: tuple[str, ...], experts: tuple[str, ...]) -> None:
        if is_pattern(self.lora_target):
            return
        names = {name.rpartition(".")[2] for name in self.lora_target}
        if names & {*experts} and self.lora_dropout:
            raise ConfigError(
                f"finetuning.lora_target=[{','.join(self.lora_target)}] with finetuning.lora_dropout={self.lora_dropout:g}: routed "
                f"experts are adapted without dropout; type finetuning.lora_dropout=0, or finetuning.lora_target=all for "
                f"{', '.join(linears)}"
            )
        unknown = [name for name in self.lora_target if name.rpartition(".")[2] not in (*linears, *experts)]
        if unknown:
            known = f"this model's blocks have {', '.join(linears)}; `all` selects all of them"
            known += f"; {', '.join(experts)} select the routed experts" if experts else ""
            raise ConfigError(
                f"finetuning.lora_target=[{','.join(self.lora_target)}]: no linear layer is named "
                f"{' or '.join(map(repr, unknown))}{did_you_mean(unknown[0], (*linears, *experts), known)}"
            )

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts fractions, too
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target[0] if is_pattern(self.lora_target) else list(self.lora_target),
            task_type=TaskType.CAUSAL_LM,
        )
        try:
            adapted: Any = get_peft_model(model, config)  # PEFT keeps adapters in float32 on a half-precision base
        except ValueError as error:  # no module's path matches, or one that is no linear layer; experts with dropout
            wrong = f"finetuning.lora_target=[{','.join(self.lora_target)}]: {' '.join(str(error).split())[:300]}"
            if "lora_dropout" in str(error):
                raise ConfigError(
                    f"{wrong}: routed experts are adapted without dropout; type finetuning.lora_dropout=0, or name other layers"
                ) from None
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
        from peft import get_peft_model

        on_meta = any(parameter.is_meta for parameter in model.parameters())
        config = peft_config(self.saved, self.folder, on_meta=on_meta)
        try:
            adapted: Any = get_peft_model(model, config)
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
