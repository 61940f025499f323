"""The part of a stage that works on a run's data and model; its configuration is in config/schema.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective
    from glmtuner.templates.base import Template
    from glmtuner.training.trainer import GlmTrainer


@dataclass(kw_only=True)
class LearningStage(Stage):
    """The base class of every stage: its datasets, collator, loss and predictions."""

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        """The encoded records for training and evaluation."""
        raise NotImplementedError

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder | None":
        """The encoder of its records; None for a plugin's stage that makes its rows in another way, of which there is no preview."""
        return None

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        """A callable that turns a list of rows into a batch."""
        raise NotImplementedError

    def objective(self, context: "RunContext") -> "Objective | None":
        """The loss, with its modules besides the model; None for the model's own loss.

        Called on the model that training starts from, before a checkpoint is restored; adds the heads to that model.
        """
        return None

    def predict(self, context: "RunContext", trainer: "GlmTrainer") -> dict[str, float]:
        """Write predictions.jsonl, one line per evaluation record; returns the scores, with names that begin with predict_."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Further metrics, computed from the means of the measured ones, in training or in an evaluation."""
        return {}


def learning_stage(run: Run) -> LearningStage:
    """The stage of a composed run."""
    assert isinstance(run.stage, LearningStage)
    return run.stage
