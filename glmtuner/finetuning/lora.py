"""LoRA, by PEFT."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from glmtuner.config.groups import Finetuning, ModelFamily, preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.finetuning.trained import assign, load_tensors, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTER = "adapter_model.safetensors"


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
        self._check(family.linears)
        return self

    def _check(self, linears: "tuple[str, ...]") -> None:
        unknown = [name for name in self.lora_target if name.rpartition(".")[2] not in linears]
        if unknown:
            known = f"this model's blocks have {', '.join(linears)}; `all` selects all of them"
            raise ConfigError(
                f"finetuning.lora_target=[{','.join(self.lora_target)}]: no linear layer is named "
                f"{' or '.join(map(repr, unknown))}{did_you_mean(unknown[0], linears, known)}"
            )

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts fractions, too
            lora_dropout=self.lora_dropout,
            target_modules=list(self.lora_target),
            task_type=TaskType.CAUSAL_LM,
        )
        adapted: Any = get_peft_model(model, config)  # PEFT keeps adapters in float32 on a half-precision base
        return adapted

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        from peft import get_peft_model_state_dict

        if not get_peft_model_state_dict(model):
            raise AssertionError("an adapter without tensors")
        model.save_pretrained(folder)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        self.save(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        saved = load_tensors(folder / ADAPTER)
        parameters = {name.replace(".default.", "."): value for name, value in trained_parameters(model).items()}
        assign(parameters, saved, folder)
