"""Simple preference optimization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError
from glmtuner.stages.pairs import PairStage

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective


@preset("stage", "simpo")
@dataclass(kw_only=True)
class Simpo(PairStage):
    """Learning from ranked pairs by the mean log-probabilities of the answers, without a reference (Meng et al. 2024, arXiv:2405.14734).

    beta: scale of the reward, which is beta times the mean log-probability of an answer's tokens.
    gamma: margin by which the better answer's reward is to be larger; the paper tries ratios of gamma to beta from 0.3 to 1.6.
    label_smoothing: the assumed share of pairs with swapped labels.
    sft_weight: weight of the better answer's mean loss per token, which is added; 0 disables it.
    """

    beta: float
    gamma: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    evaluates: ClassVar[tuple[str, ...] | None] = (
        "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "nll_chosen",
    )  # fmt: skip

    def __post_init__(self) -> None:
        checks = (
            ("beta", self.beta > 0, "above 0"),
            ("gamma", self.gamma >= 0, "0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)"),
            ("sft_weight", self.sft_weight >= 0, "0 or more"),
        )
        if wrong := list(range_errors("stage", self, checks)):
            raise ConfigError("; ".join(wrong))

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.simpo import SimpoObjective

        return SimpoObjective(context.model, self)
