"""Continued pretraining on plain text."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from glmtuner.data.splits import Datasets


@preset("stage", "pt")
@dataclass(kw_only=True)
class Pt(Stage):
    """Every token of the documents is learned.

    block_length: tokens of a row. Documents stand one behind the other with the end of text between them, and rows are
    cut from that (Brown et al. 2020, arXiv:2005.14165, section 2.2): a token may see the end of another document.
    """

    block_length: int

    models_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block_length < 8:
            raise ConfigError(f"stage.block_length={self.block_length}: a row has at least 8 tokens")

    def datasets(self, run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":
        from glmtuner.data.blocks import BlockEncoder
        from glmtuner.data.splits import datasets_of

        lengths = {"max_source_length": self.block_length, "max_target_length": self.block_length}
        encoder = BlockEncoder(template=template, tokenizer=tokenizer, block_length=self.block_length, **lengths)
        return datasets_of(run, specs, encoder)

    def largest_batch(self, run: Run) -> tuple[int, int]:
        return run.trainer.per_device_train_batch_size, self.block_length

    def collator(self, **padding: Any) -> Any:
        from glmtuner.data.collate import Collator

        return Collator(**padding)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity, e to the mean loss of a token."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else {}
