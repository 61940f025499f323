"""What a run is made of, loaded for it alone; glmtuner/launch/shared.py loads it once for several runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from glmtuner.config.schema import Run
from glmtuner.data.spec import DatasetSpec
from glmtuner.stages.stage import learning_stage
from glmtuner.templates.base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets
    from glmtuner.training.trainer import GlmTrainer


class Parts:
    """Loads the parts of one run."""

    trainer: "Callable[..., GlmTrainer] | None" = None  # in place of the Trainer's class
    load_model: "Callable[..., PreTrainedModel] | None" = None  # in place of glmtuner.models.load.load_model

    def tokenizer(self, run: Run) -> "PreTrainedTokenizerBase":
        """The tokenizer of the run's model."""
        from glmtuner.models.load import load_tokenizer

        return load_tokenizer(run.model, run.data.new_tokens)

    def datasets(
        self, run: Run, specs: dict[str, DatasetSpec], template: Template, tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        """The run's data, read and encoded."""
        return learning_stage(run).datasets(run, specs, template, tokenizer)
