"""Kahneman-Tversky optimization."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.ranges import range_errors
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError, DataError
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective
    from glmtuner.templates.base import Template


@preset("stage", "kto")
@dataclass(kw_only=True)
class Kto(LearningStage):
    """Learning from answers marked good or bad; the reference is the model at the start of this run (Ethayarajh et al. 2024, arXiv:2402.01306).

    beta: strength of the penalty on moving away from the reference.
    desirable_weight, undesirable_weight: weights of good and bad answers; the paper keeps the ratio of (weight x count) of good
        answers to that of bad ones within 1 to 4/3.
    precompute_reference: compute the reference's log-probabilities of all records before the first step and keep them in the run
        folder, instead of those of every batch in every epoch; the reference then takes no memory during the training.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    precompute_reference: bool = False

    reads_rows: ClassVar[bool] = True
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss", "reward_desirable", "reward_undesirable", "kl", "margin")

    def __post_init__(self) -> None:
        names = ("beta", "desirable_weight", "undesirable_weight")
        wrong = list(range_errors("stage", self, ((name, getattr(self, name) > 0, "above 0") for name in names)))
        if wrong:
            raise ConfigError("; ".join(wrong))

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        """The encoded feedback; raises DataError where all answers are good, or all bad: the loss contrasts them."""
        from glmtuner.data.feedback import with_other_answers
        from glmtuner.data.splits import datasets_of

        datasets = datasets_of(run, specs, self.encoder(run, template, tokenizer))
        if datasets.train is not None and len(kinds := set(datasets.train["is_desirable"])) < 2:
            raise DataError(
                f"data.dataset=[{','.join(run.data.dataset)}]: every answer is marked {str(next(iter(kinds))).lower()}, and stage=kto "
                "learns good from bad answers; name datasets with both, or type stage=sft"
            )
        return replace(
            datasets,
            train=with_other_answers(datasets.train) if datasets.train is not None else None,
            evaluation=with_other_answers(datasets.evaluation) if datasets.evaluation is not None else None,
        )

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.feedback import FeedbackEncoder

        return FeedbackEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())

    def largest_batch(self, run: Run) -> tuple[int, int]:
        rows, longest = super().largest_batch(run)
        return 2 * rows, longest  # a record is two rows

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.feedback import FeedbackCollator

        return FeedbackCollator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.kto import KtoObjective

        return KtoObjective(context.model, self)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The mean reward of good answers minus that of bad ones, if both were measured."""
        desirable, undesirable = means.get("reward_desirable"), means.get("reward_undesirable")
        return {} if desirable is None or undesirable is None else {"margin": desirable - undesirable}
