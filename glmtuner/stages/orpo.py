"""Odds ratio preference optimization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError
from glmtuner.stages.pairs import PairStage

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective


@preset("stage", "orpo")
@dataclass(kw_only=True)
class Orpo(PairStage):
    """Supervised fine-tuning on the better answers and learning from ranked pairs in one, without a reference (Hong et al. 2024,
    arXiv:2403.07691).

    beta: weight of the odds ratio loss, lambda in the paper (eq. 6).
    """

    beta: float

    evaluates: ClassVar[tuple[str, ...] | None] = (
        "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "nll_chosen", "log_odds",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if wrong := list(range_errors("stage", self, (("beta", self.beta > 0, "above 0"),))):
            raise ConfigError("; ".join(wrong))

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.orpo import OrpoObjective

        return OrpoObjective(context.model, self)
