"""Continued pretraining on plain text."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.templates.base import Template


@preset("stage", "pt")
@dataclass(kw_only=True)
class Pt(LearningStage):
    """Next-token prediction on every token of the documents.

    block_length: tokens per row. Documents are concatenated with the end-of-text token between them and cut into rows (Brown
    et al. 2020, arXiv:2005.14165, section 2.2), so a token may attend to the end of another document.
    """

    block_length: int

    models_loss: ClassVar[bool] = True
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss", "perplexity")

    def __post_init__(self) -> None:
        if self.block_length < 8:
            raise ConfigError(f"stage.block_length={self.block_length}: a row has at least 8 tokens")

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        from glmtuner.data.splits import datasets_of

        return datasets_of(run, specs, self.encoder(run, template, tokenizer))

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.blocks import BlockEncoder

        length = self.block_length
        return BlockEncoder(
            template=template,
            tokenizer=tokenizer,
            block_length=length,
            max_source_length=length,
            max_target_length=length,
        )

    def largest_batch(self, run: Run) -> tuple[int, int]:
        return run.trainer.per_device_train_batch_size, self.block_length

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.collate import Collator

        return Collator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity, e to the mean loss of a token."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else {}
