"""The evaluation of a paused training, after its checkpoint is written: nothing of it is found by the run that goes on."""

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

from glmtuner.distributed import ranks
from glmtuner.distributed.pause import VARIABLE, Pause, is_generated, requested_pause
from glmtuner.errors import ConfigError
from glmtuner.inference.context import RunContext
from glmtuner.inference.predict import answer_all
from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.names import LOSSES, PAUSE, PAUSES, PREDICTIONS

if TYPE_CHECKING:
    from datasets import Dataset

    from glmtuner.training.trainer import GlmTrainer


def pause_of(context: RunContext) -> Pause | None:
    """The pause that the environment asks for; raises ConfigError for a run that cannot be evaluated there."""
    pause = requested_pause()
    if pause is not None and context.data.evaluation is None:
        raise ConfigError(
            f"{VARIABLE}={pause.text}: a training pauses to be evaluated, and this one has no evaluation records; type "
            "data.eval_dataset=…, or data.dev_ratio=0.1"
        )
    return pause


def evaluate_pause(context: RunContext, trainer: "GlmTrainer", pause: Pause) -> None:
    """Evaluate the model as it is, and write `pauses/<pause>/` of the run folder; its pause.json, the last file, marks it as whole.

    losses.jsonl has a line a record, predictions.jsonl the answers if the objective is one of their scores. pause.json has the
    step, the steps of the training, the metrics without a prefix, and a digest of the evaluation records, which two runs must
    share for their losses to be compared. The history, the tracker and the results of the run get nothing. The random numbers
    are those of trainer.seed, so that an evaluation that is cut off and made again comes out the same.
    """
    from transformers import set_seed

    evaluation = context.data.evaluation
    assert evaluation is not None
    place, state = context.folder / PAUSES / pause.text, trainer.state
    if ranks.is_main():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    ranks.barrier()
    set_seed(context.run.trainer.seed)
    generates, trainer.score = is_generated(context.run), None
    trainer.losses_file = place / LOSSES
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
    assert output.metrics is not None
    metrics = {name.removeprefix("eval_"): value for name, value in output.metrics.items()}
    if generates:
        answers = place / "answers.jsonl"  # under its own name a prediction that was cut off is continued
        metrics |= answer_all(context, answers)
        if ranks.is_main():
            answers.rename(place / PREDICTIONS)
    if ranks.is_main():
        columns = list(context.data.columns)
        about = {"step": state.global_step, "max_steps": state.max_steps, "records": digest(evaluation, columns)}
        write_json(place / PAUSE, {**about, "metrics": metrics})
    ranks.barrier()


def digest(rows: "Dataset", columns: list[str]) -> str:
    """The first 16 hex digits of the SHA-256 of the rows, as they are encoded for the model."""
    total = hashlib.sha256()
    for row in rows.select_columns(columns):
        total.update(json.dumps(row, sort_keys=True).encode())
    return total.hexdigest()[:16]
