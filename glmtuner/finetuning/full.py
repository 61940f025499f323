"""Full fine-tuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import Finetuning, ModelFamily, preset
from glmtuner.finetuning.trained import (
    VALUE_HEAD,
    freeze_all,
    holds_trained,
    load_model_folder,
    make_trainable,
    restore_trained,
    save_trained,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@preset("finetuning", "full")
@dataclass(kw_only=True)
class Full(Finetuning):
    """Every weight is trained; of a multimodal model those of the language model."""

    on_quantized: ClassVar[bool] = False
    saved_as: ClassVar[str] = "model"

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        freeze_all(model)
        towers = tuple(f"{tower}." for tower in family.towers)
        for name, parameter in model.named_parameters():
            if not name.startswith(towers):
                make_trainable(parameter)
        return model

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        head = model._modules.pop(VALUE_HEAD, None)  # written to its own file by the stage
        try:
            model.save_pretrained(folder)
        finally:
            if head is not None:
                model.add_module(VALUE_HEAD, head)

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        save_trained(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        if holds_trained(folder):
            restore_trained(model, folder)
        else:
            load_model_folder(model, folder)
