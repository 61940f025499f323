"""Direct preference optimization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import PreferenceLoss, preset
from glmtuner.config.ranges import range_errors
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective
    from glmtuner.templates.base import Template


@preset("stage", "dpo")
@dataclass(kw_only=True)
class Dpo(LearningStage):
    """Learning from ranked pairs without a reward model; the reference is the model at the start of this run.

    beta: strength of the penalty on moving away from the reference (Rafailov et al. 2023, arXiv:2305.18290).
    loss: sigmoid is DPO's own; ipo regresses the margin of the per-token mean log-ratios to 1 / (2 beta) (Azar et al. 2023,
        arXiv:2310.12036); hinge is SLiC-HF's (Zhao et al. 2023, arXiv:2305.10425).
    label_smoothing: the assumed share of pairs with swapped labels, for sigmoid (Mitchell 2023, conservative DPO).
    sft_weight: weight of the better answer's mean loss per token, which is added as in RPO (Pang et al. 2024, arXiv:2404.19733); 0 disables it.
    """

    beta: float
    loss: PreferenceLoss
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    supports_sharding: ClassVar[bool] = False
    evaluates: ClassVar[tuple[str, ...] | None] = (
        "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "nll_chosen",
    )  # fmt: skip

    def __post_init__(self) -> None:
        wrong = [
            *range_errors(
                "stage",
                self,
                (
                    ("beta", self.beta > 0, "above 0"),
                    ("label_smoothing", 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)"),
                    ("sft_weight", self.sft_weight >= 0, "0 or more"),
                ),
            )
        ]
        if self.label_smoothing and self.loss is not PreferenceLoss.sigmoid:
            wrong.append(
                f"stage.label_smoothing={self.label_smoothing} with stage.loss={self.loss.value}: only sigmoid is a likelihood "
                "that can be smoothed; type stage.label_smoothing=0"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        from glmtuner.data.splits import datasets_of

        return datasets_of(run, specs, self.encoder(run, template, tokenizer))

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.pairs import PairEncoder

        return PairEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())

    def largest_batch(self, run: Run) -> tuple[int, int]:
        rows, longest = super().largest_batch(run)
        return 2 * rows, longest  # a record is two rows

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.pairs import PairCollator

        return PairCollator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.dpo import DpoObjective

        return DpoObjective(context.model, self)
