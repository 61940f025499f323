"""Supervised fine-tuning."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import Engine, LossOn, SftLoss, preset
from glmtuner.config.schema import Run
from glmtuner.stages.stage import LearningStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.encode import Encoder
    from glmtuner.data.spec import DatasetSpec
    from glmtuner.data.splits import Datasets
    from glmtuner.inference.context import RunContext
    from glmtuner.templates.base import Template
    from glmtuner.training.trainer import GlmTrainer


@preset("stage", "sft")
@dataclass(kw_only=True)
class Sft(LearningStage):
    """Learning the assistant's answers in instructions and conversations.

    loss: cross_entropy, or dft, dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629): each token's cross-entropy times its
        probability, which carries no gradient, so that tokens that the model finds unlikely do not dominate. Evaluations report the
        cross-entropy in either case.
    """

    loss: SftLoss = SftLoss.cross_entropy

    models_loss: ClassVar[bool] = True
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss",)
    packs: ClassVar[bool] = True

    @property
    def by_probability(self) -> bool:  # type: ignore[override]  # of a stage without the choice it is a constant
        """Whether the loss is that of dynamic fine-tuning."""
        return self.loss is SftLoss.dft

    def datasets(
        self, run: Run, specs: "dict[str, DatasetSpec]", template: "Template", tokenizer: "PreTrainedTokenizerBase"
    ) -> "Datasets":
        from glmtuner.data.mixing import with_earlier_answers
        from glmtuner.data.splits import datasets_of

        datasets = datasets_of(run, specs, self.encoder(run, template, tokenizer))
        return datasets if datasets.train is None else replace(datasets, train=with_earlier_answers(datasets.train))

    def encoder(self, run: Run, template: "Template", tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
        from glmtuner.data.encode import Encoder
        from glmtuner.data.splits import mode_of_checkpoint

        every_answer = run.data.loss_on is LossOn.every_answer
        asks_thinking = run.generation.asks_thinking
        if asks_thinking is None and not run.trainer.do_train:
            asks_thinking = mode_of_checkpoint(run)
        return Encoder(
            template=template, tokenizer=tokenizer, every_answer=every_answer, asks_thinking=asks_thinking,
            **run.data.lengths(),
        )  # fmt: skip

    def impossible(self, run: Run) -> Iterator[str]:
        if self.loss is SftLoss.dft and run.trainer.label_smoothing_factor:
            yield (
                f"trainer.label_smoothing_factor={run.trainer.label_smoothing_factor:g} with stage.loss=dft: it weighs the labels by "
                "their probabilities, and smoothing by those of all tokens; type trainer.label_smoothing_factor=0, or "
                "stage.loss=cross_entropy"
            )
        if run.trainer.do_predict and not run.trainer.predict_with_generate:
            yield (
                "trainer.do_predict=true without trainer.predict_with_generate=true: a prediction of stage=sft is a "
                "generated answer; type trainer.predict_with_generate=true, or trainer=evaluate for the loss alone"
            )

    def check(self, run: Run) -> None:
        if run.trainer.do_predict and run.generation.engine is Engine.vllm:
            from glmtuner.inference.vllm import check_installed

            check_installed()

    def collator(self, *, pad_id: int, ignore_pad_token_for_loss: bool) -> Any:
        from glmtuner.data.collate import Collator

        return Collator(pad_id=pad_id, ignore_pad_token_for_loss=ignore_pad_token_for_loss)

    def predict(self, context: "RunContext", trainer: "GlmTrainer") -> dict[str, float]:
        from glmtuner.inference.predict import predict

        return predict(context)
