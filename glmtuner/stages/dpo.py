"""Direct preference optimization."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import PreferenceLoss, preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.data.splits import Datasets


@preset("stage", "dpo")
@dataclass(kw_only=True)
class Dpo(Stage):
    """Ranked pairs, learned without a reward model; the reference is the model as this run starts.

    beta: how firmly the policy is held at the reference (Rafailov et al. 2023, arXiv:2305.18290).
    loss: sigmoid is DPO's own; ipo draws the margin of the mean log-ratio of a token to 1 / (2 beta) (Azar et al. 2023,
        arXiv:2310.12036); hinge is SLiC-HF's (Zhao et al. 2023, arXiv:2305.10425).
    label_smoothing: the share of pairs that are taken to be the wrong way round, for sigmoid (Mitchell 2023, conservative DPO).
    sft_weight: of the better answer's loss per token, added as in RPO (Pang et al. 2024, arXiv:2404.19733); 0 leaves it out.
    """

    beta: float
    loss: PreferenceLoss
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    supports_sharding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        wrong = [
            f"stage.{name}={value}: {legal}"
            for name, value, fits, legal in (
                ("beta", self.beta, self.beta > 0, "above 0"),
                ("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "a share in [0, 0.5)"),
                ("sft_weight", self.sft_weight, self.sft_weight >= 0, "0 or more"),
            )
            if not fits
        ]
        if self.label_smoothing and self.loss is not PreferenceLoss.sigmoid:
            wrong.append(
                f"stage.label_smoothing={self.label_smoothing} with stage.loss={self.loss.value}: only sigmoid is a likelihood "
                "that can be smoothed; type stage.label_smoothing=0"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))

    def datasets(self, run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":
        from glmtuner.data.pairs import pair_datasets

        return pair_datasets(run, specs, template, tokenizer)

    def largest_batch(self, run: Run) -> tuple[int, int]:
        rows, longest = super().largest_batch(run)
        return 2 * rows, longest  # a record is two rows

    def collator(self, **padding: Any) -> Any:
        from glmtuner.data.pairs import PairCollator

        return PairCollator(**padding)

    def objective(self, run: Run, model: "nn.Module", template: Any, tokenizer: Any) -> Any:
        from glmtuner.objectives.dpo import DpoObjective

        return DpoObjective(model, self)
