"""Supervised fine-tuning on single answers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import Engine, LossOn, preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec

if TYPE_CHECKING:
    from glmtuner.data.splits import Datasets


@preset("stage", "sft")
@dataclass(kw_only=True)
class Sft(Stage):
    """Instructions and conversations in, the assistant's answers learned."""

    models_loss: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    def datasets(self, run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":
        from glmtuner.data.encode import Encoder
        from glmtuner.data.prepare import with_earlier_answers
        from glmtuner.data.splits import datasets_of

        every_answer = run.data.loss_on is LossOn.every_answer
        encoder = Encoder(template=template, tokenizer=tokenizer, every_answer=every_answer, **run.data.lengths())
        found = datasets_of(run, specs, encoder)
        return found if found.train is None else replace(found, train=with_earlier_answers(found.train))

    def impossible(self, run: Run) -> Iterator[str]:
        if run.trainer.do_predict and not run.trainer.predict_with_generate:
            yield (
                "trainer.do_predict=true without trainer.predict_with_generate=true: a prediction of stage=sft is a "
                "generated answer; type trainer.predict_with_generate=true, or trainer=evaluate for the loss alone"
            )

    def check(self, run: Run) -> None:
        if run.trainer.do_predict and run.generation.engine is Engine.vllm:
            from glmtuner.inference.vllm import check_installed

            check_installed()

    def collator(self, **padding: Any) -> Any:
        from glmtuner.data.collate import Collator

        return Collator(**padding)

    def predict(
        self, run: Run, folder: Any, trainer: Any, tokenizer: Any, template: Any, data: "Datasets"
    ) -> dict[str, float]:
        from glmtuner.inference.predict import predict

        return predict(run, folder, trainer.model, tokenizer, template, data)
