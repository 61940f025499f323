"""A finished run, loaded for inference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Run
from glmtuner.families.family import Family
from glmtuner.templates.base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run, loaded for inference, with the user's overrides applied.

    `finetuning` has the settings in use; `stops` are the ids of the tokens that end an answer.
    """

    run: Run
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    family: Family
    finetuning: Finetuning
    stops: tuple[int, ...]
