"""The stages that learn from ranked pairs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.schema import Run
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.templates.base import Template


@dataclass(kw_only=True)
class PairStage(LearningStage):
    """A stage whose records are ranked pairs: two answers to one question, the better one first."""

    reads_rows: ClassVar[bool] = True

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
