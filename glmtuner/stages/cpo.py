"""Contrastive preference optimization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import CpoLoss, preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError
from glmtuner.stages.pairs import PairStage

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective


@preset("stage", "cpo")
@dataclass(kw_only=True)
class Cpo(PairStage):
    """Learning from ranked pairs as DPO does with a uniform reference, and the better answers (Xu et al. 2024, arXiv:2401.08417).

    beta: scale of the margin between the two answers' log-probabilities.
    loss: sigmoid is the paper's (section 3); ipo (arXiv:2310.12036, on mean log-probabilities) and hinge (arXiv:2305.10425).
    label_smoothing: the assumed share of pairs with swapped labels, for sigmoid.
    sft_weight: weight of the better answer's mean loss per token; 0 disables it.
    """

    beta: float
    loss: CpoLoss
    label_smoothing: float = 0.0
    sft_weight: float

    evaluates: ClassVar[tuple[str, ...] | None] = (
        "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "nll_chosen",
    )  # fmt: skip

    def __post_init__(self) -> None:
        checks = (
            ("beta", self.beta > 0, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)"),
            ("sft_weight", self.sft_weight >= 0, "0 or more"),
        )
        wrong = list(range_errors("stage", self, checks))
        if self.label_smoothing and self.loss is not CpoLoss.sigmoid:
            wrong.append(
                f"stage.label_smoothing={self.label_smoothing:g} with stage.loss={self.loss.value}: only sigmoid knows of swapped "
                "labels; type stage.label_smoothing=0"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.cpo import CpoObjective

        return CpoObjective(context.model, self)
