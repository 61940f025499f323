"""Reward models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run, Stage
from glmtuner.data import DatasetSpec
from glmtuner.distributed import ranks
from glmtuner.inference.predict import text_of
from glmtuner.objectives.reward_model import find_head, head_file, stage_of
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.names import PREDICTIONS

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.data.splits import Datasets


@preset("stage", "rm")
@dataclass(kw_only=True)
class Rm(Stage):
    """A model that scores answers: a head on the hidden state of an answer's last token, learned from ranked pairs.

    The loss is the pairwise logistic one of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
    """

    policy: ClassVar[bool] = False
    supports_sharding: ClassVar[bool] = False

    def impossible(self, run: Run) -> Iterator[str]:
        if run.trainer.predict_with_generate:
            yield (
                "trainer.predict_with_generate=true with stage=rm: a reward model scores answers and generates none; "
                "type trainer.predict_with_generate=false"
            )
        if not run.trainer.do_train and not run.model.checkpoint_dir:
            yield (
                "stage=rm without training scores with a trained reward model; type model.checkpoint_dir=<its run folder>, "
                "or trainer=train"
            )

    def check(self, run: Run) -> None:
        if not run.trainer.do_train:
            head_file(run.model.checkpoint_dir[-1], "model.checkpoint_dir")

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
        from glmtuner.objectives.rm import RewardObjective

        start = run.model.checkpoint_dir[-1] if run.model.checkpoint_dir else None
        goes_on = start is not None and stage_of(start) in (None, self.name)  # the head of a policy reads values
        return RewardObjective(model, head=find_head(start) if goes_on else None)

    def predict(
        self, run: Run, folder: Any, trainer: Any, tokenizer: Any, template: Any, data: "Datasets"
    ) -> dict[str, float]:
        """One line a pair in predictions.jsonl: the prompt, both answers, and their scores; returns the share ranked right, and the margin."""
        import torch

        assert data.evaluation is not None
        trainer.model.eval()
        rows, size, lines = data.evaluation, run.trainer.per_device_eval_batch_size, []
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            with torch.no_grad(), trainer.compute_loss_context_manager():
                scores = trainer.objective.scores(trainer._prepare_inputs(trainer.data_collator(batch))).tolist()
            for place, (row, chosen, rejected) in enumerate(
                zip(batch, scores[: len(batch)], scores[len(batch) :], strict=True)
            ):
                line = {
                    "index": start + place,
                    "prompt": row["prompt"],
                    "chosen": row["answer"],
                    "rejected": row["rejected"],
                }
                lines.append({**line, "chosen_score": chosen, "rejected_score": rejected})
        if ranks.is_main():
            write_text(folder / PREDICTIONS, text_of(lines))
        margins = [line["chosen_score"] - line["rejected_score"] for line in lines]
        right = sum(margin > 0 for margin in margins)
        return {"predict_accuracy": right / len(margins), "predict_margin": sum(margins) / len(margins)}
