"""No fine-tuning: the model, or a checkpoint, unchanged."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import Finetuning, ModelFamily, preset
from glmtuner.finetuning.trained import freeze_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@preset("finetuning", "none")
@dataclass(kw_only=True)
class NoTuning(Finetuning):
    """Nothing is trained; for evaluation and prediction."""

    trains: ClassVar[bool] = False

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        freeze_all(model)
        return model
