"""Reward models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glmtuner.config.groups import preset
from glmtuner.config.schema import Run
from glmtuner.distributed import ranks
from glmtuner.objectives.reward_model import find_head, head_file, stage_of
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.names import PREDICTIONS
from glmtuner.stages.pairs import PairStage

if TYPE_CHECKING:
    from glmtuner.inference.context import RunContext
    from glmtuner.objectives.objective import Objective
    from glmtuner.training.trainer import GlmTrainer


@preset("stage", "rm")
@dataclass(kw_only=True)
class Rm(PairStage):
    """A model that scores answers with a linear head on the hidden state of the last token, trained on ranked pairs.

    The loss is the pairwise logistic one of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
    """

    policy: ClassVar[bool] = False
    evaluates: ClassVar[tuple[str, ...] | None] = ("loss", "accuracy", "margin")

    def impossible(self, run: Run) -> Iterator[str]:
        if run.trainer.predict_with_generate:
            yield (
                "trainer.predict_with_generate=true with stage=rm: a reward model scores answers and generates none; "
                "type trainer.predict_with_generate=false"
            )
        if not run.trainer.do_train and not run.model.checkpoint_dir:
            yield (
                "stage=rm without training needs a trained reward model; type model.checkpoint_dir=<its run folder>, "
                "or trainer=train"
            )

    def check(self, run: Run) -> None:
        if not run.trainer.do_train:
            head_file(run.model.checkpoint_dir[-1], "model.checkpoint_dir")

    def objective(self, context: "RunContext") -> "Objective":
        from glmtuner.objectives.rm import RewardObjective

        checkpoints = context.run.model.checkpoint_dir
        start = checkpoints[-1] if checkpoints else None
        head = None
        if start is not None and stage_of(start) in (
            None,
            self.name,
        ):  # a policy's head is a value head, which estimates returns
            head = find_head(start)
        return RewardObjective(context.model, head=head)

    def predict(self, context: "RunContext", trainer: "GlmTrainer") -> dict[str, float]:
        """Write the prompt, both answers and their scores of each pair to predictions.jsonl; returns accuracy and mean margin.

        Each rank scores its share of the batches, and as many as the others.
        """
        import torch

        from glmtuner.inference.predict import text_of
        from glmtuner.objectives.rm import RewardObjective

        run, data = context.run, context.data
        assert data.evaluation is not None and isinstance(trainer.objective, RewardObjective)
        trainer.model.eval()
        rows, size, own = data.evaluation, run.trainer.per_device_eval_batch_size, []
        for number in ranks.turns(-(-len(rows) // size)):
            start = (number or 0) * size
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            with torch.no_grad(), trainer.compute_loss_context_manager():
                scores = trainer.objective.scores(trainer._prepare_inputs(trainer.data_collator(batch))).tolist()
            if number is None:
                continue
            for offset, (row, chosen, rejected) in enumerate(
                zip(batch, scores[: len(batch)], scores[len(batch) :], strict=True)
            ):
                line = {
                    "index": start + offset,
                    "prompt": row["prompt"],
                    "chosen": row["answer"],
                    "rejected": row["rejected"],
                }
                own.append({**line, "chosen_score": chosen, "rejected_score": rejected})
        lines = sorted((line for part in ranks.all_gather(own) for line in part), key=lambda line: line["index"])
        if ranks.is_main():
            write_text(context.folder / PREDICTIONS, text_of(lines))
        margins = [line["chosen_score"] - line["rejected_score"] for line in lines]
        correct = sum(margin > 0 for margin in margins)
        return {"predict_accuracy": correct / len(margins), "predict_margin": sum(margins) / len(margins)}
