"""A finished run, ready to answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.families.family import Family

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run, ready to answer: what its folder alone tells, and what was typed over it."""

    run: Run
    model: "nn.Module"
    tokenizer: "PreTrainedTokenizerBase"
    template: Any
    family: Family
    stops: tuple[int, ...]
