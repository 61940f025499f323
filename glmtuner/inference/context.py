"""A run with its loaded parts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Run, Tracker
from glmtuner.data.splits import Datasets
from glmtuner.families.family import Family
from glmtuner.run_folder.folder import RunFolder
from glmtuner.templates.base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The parts of a run that training, evaluation and prediction work on.

    `run` is the validated configuration, which is never changed. The other fields depend on the model or on a checkpoint, such
    as the family, the template and its name, and the fine-tuning method with its targets filled in. Ranks other than 0 have a
    tracker that logs nothing.
    """

    run: Run
    folder: RunFolder
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    template_name: str
    family: Family
    finetuning: Finetuning
    data: Datasets
    tracker: Tracker
