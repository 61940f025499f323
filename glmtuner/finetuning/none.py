"""No fine-tuning: the model, or a checkpoint, as it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import Finetuning, preset
from glmtuner.finetuning.trained import freeze_all

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.families.family import Family


@preset("finetuning", "none")
@dataclass(kw_only=True)
class NoTuning(Finetuning):
    """Nothing is trained; for evaluation and prediction."""

    trains: ClassVar[bool] = False

    def attach(self, model: "nn.Module", family: "Family") -> "nn.Module":
        freeze_all(model)
        return model
