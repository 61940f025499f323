"""Reward models."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.compose import run_folder_of
from glmtuner.config.schema import Run, Stage, preset
from glmtuner.data import DatasetSpec
from glmtuner.errors import CheckpointError
from glmtuner.run_folder import RunFolder

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
    spreads: ClassVar[bool] = False

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
        return pairs(run, specs, template, tokenizer)

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
        """One line a pair: the prompt, both answers, and the score of each."""
        from glmtuner.predict import score_pairs

        return score_pairs(run, folder, trainer, data)


def pairs(run: Run, specs: dict[str, DatasetSpec], template: Any, tokenizer: Any) -> "Datasets":
    """The datasets of a stage that learns from ranked pairs."""
    from glmtuner.data.pairs import PairEncoder
    from glmtuner.data.splits import datasets_of

    encoder = PairEncoder(template=template, tokenizer=tokenizer, every_answer=False, **run.data.lengths())
    return datasets_of(run, specs, encoder)


def find_head(path: str) -> Path | None:
    """The value head in a run folder or a checkpoint, when there is one."""
    folder = Path(path).expanduser()
    names = [f"value_head{suffix}" for suffix in (".safetensors", ".bin")]
    places = [place / name for place in (folder, folder / "adapter", folder / "model") for name in names]
    return next((place for place in places if place.is_file()), None)


def stage_of(path: str) -> str | None:
    """The stage of the run that a checkpoint is of; None where no run tells."""
    source = run_folder_of(path)
    return RunFolder(source).config().stage.name if source else None


def head_file(path: str, key: str) -> Path:
    """The head of a trained reward model; raises CheckpointError where `path` is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{key}={path}: no such folder; name the run folder of a reward model (train one with stage=rm)"
        )
    stage, head = stage_of(path), find_head(path)
    if stage not in (None, "rm"):
        raise CheckpointError(f"{key}={path} holds a run of stage={stage}; name one of stage=rm, a reward model")
    if head is None:
        raise CheckpointError(
            f"{key}={path} has no value_head.safetensors, so it is no trained reward model; name the folder of a finished "
            "run of stage=rm, or one of its checkpoints"
        )
    return head
