"""Kahneman-Tversky optimization."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec
from glmtuner.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.data.splits import Datasets


@preset("stage", "kto")
@dataclass(kw_only=True)
class Kto(Stage):
    """Answers that were marked good or bad; the reference is the model as this run starts (Ethayarajh et al. 2024, arXiv:2402.01306).

    beta: how firmly the policy is held at the reference.
    desirable_weight, undesirable_weight: of the two kinds of answers; the paper keeps weight times count of the one within
        1 to 4/3 of the other's.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    supports_sharding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        names = ("beta", "desirable_weight", "undesirable_weight")
        wrong = [f"stage.{name}={getattr(self, name)}: above 0" for name in names if getattr(self, name) <= 0]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def datasets(self, run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":
        """Feedback on both good and bad answers: one kind alone has nothing to be told from."""
        from glmtuner.data.feedback import FeedbackEncoder, with_other_answers
        from glmtuner.data.splits import datasets_of

        encoder = FeedbackEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())
        found = datasets_of(run, specs, encoder)
        if found.train is not None and len(kinds := set(found.train["is_desirable"])) < 2:
            raise DataError(
                f"data.dataset=[{','.join(run.data.dataset)}]: every answer is marked {str(next(iter(kinds))).lower()}, and stage=kto "
                "learns good from bad answers; name datasets with both, or type stage=sft"
            )
        return replace(
            found,
            train=with_other_answers(found.train) if found.train is not None else None,
            evaluation=with_other_answers(found.evaluation) if found.evaluation is not None else None,
        )

    def largest_batch(self, run: Run) -> tuple[int, int]:
        rows, longest = super().largest_batch(run)
        return 2 * rows, longest  # a record is two rows

    def collator(self, **padding: Any) -> Any:
        from glmtuner.data.feedback import FeedbackCollator

        return FeedbackCollator(**padding)

    def objective(self, run: Run, model: "nn.Module", template: Any, tokenizer: Any) -> Any:
        from glmtuner.objectives.kto import KtoObjective

        return KtoObjective(model, self)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The mean reward of good answers minus that of bad ones, where there were both."""
        kinds = [means.get("reward_desirable"), means.get("reward_undesirable")]
        return {} if None in kinds else {"margin": kinds[0] - kinds[1]}
