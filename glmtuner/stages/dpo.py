"""Direct preference optimization."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import PreferenceLoss, preset
from glmtuner.config.ranges import range_errors
from glmtuner.errors import ConfigError
from glmtuner.stages.pairs import PairStage

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective

SMOOTHED = (PreferenceLoss.sigmoid, PreferenceLoss.robust, PreferenceLoss.exo_pair)


@preset("stage", "dpo")
@dataclass(kw_only=True)
class Dpo(PairStage):
    """Learning from ranked pairs without a reward model; the reference is the model at the start of this run.

    beta: strength of the penalty on moving away from the reference (Rafailov et al. 2023, arXiv:2305.18290).
    loss: sigmoid is DPO's own; sigmoid_norm is the same on the means of an answer's log-ratios (Lambert et al. 2024,
        arXiv:2411.15124); ipo regresses the margin of these means to 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036); hinge is
        SLiC-HF's (Zhao et al. 2023, arXiv:2305.10425); robust (arXiv:2403.00409), exo_pair (arXiv:2402.00856), sppo_hard
        (arXiv:2405.00675), apo_zero and apo_down (arXiv:2408.06266).
    label_smoothing: the assumed share of pairs with swapped labels, for sigmoid (Mitchell 2023, conservative DPO), robust and
        exo_pair, which needs one above 0.
    sft_weight: weight of the better answer's mean loss per token, which is added as in RPO (Pang et al. 2024, arXiv:2404.19733); 0 disables it.
    precompute_reference: compute the reference's log-probabilities of all records before the first step and keep them in the run
        folder, instead of those of every batch in every epoch; the reference then takes no memory during the training.
    """

    beta: float
    loss: PreferenceLoss
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    precompute_reference: bool = False

    evaluates: ClassVar[tuple[str, ...] | None] = (
        "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "nll_chosen",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if wrong := [*self._wrong_values()]:
            raise ConfigError("; ".join(wrong))

    def _wrong_values(self) -> Iterator[str]:
        yield from range_errors(
            "stage",
            self,
            (
                ("beta", self.beta > 0, "above 0"),
                ("label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)"),
                ("sft_weight", self.sft_weight >= 0, "0 or more"),
            ),
        )
        smoothed = f"stage.label_smoothing={self.label_smoothing:g} with stage.loss={self.loss.value}"
        if self.label_smoothing and self.loss not in SMOOTHED:
            yield (
                f"{smoothed}: of these losses {', '.join(loss.value for loss in SMOOTHED)} know of swapped labels; type "
                "stage.label_smoothing=0"
            )
        if self.loss is PreferenceLoss.exo_pair and not self.label_smoothing:
            yield f"{smoothed}: it is infinite without label smoothing; type stage.label_smoothing=0.001, as its paper does"

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.dpo import DpoObjective

        return DpoObjective(context.model, self)
