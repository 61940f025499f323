"""Trials of a search that are pruned: at each rung a trial pauses and is evaluated, and Optuna's pruner compares it with the others.

What was decided is a file in the trial's folder, written before the study learns of it, so that a killed search decides nothing twice.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmtuner.distributed.pause import Pause
from glmtuner.errors import TrainingError
from glmtuner.report.race import pruned_reason
from glmtuner.run_folder.files import is_number, read_object, write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import PAUSE, PAUSES, PRUNED
from glmtuner.sweep.rungs import has_reached

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial

    from glmtuner.sweep.search_study import SharedStudy

PARTS = 1000  # Optuna's step of a rung that is a share: in thousandths of the training


def step_of(pause: Pause) -> int:
    """The step by which Optuna knows a rung: thousandths of the training for a share, else its number of steps."""
    return round(float(pause.text) * PARTS) if pause.is_share else int(pause.text)


def value_at(folder: RunFolder, pause: Pause, measure: str) -> float | None:
    """The objective of the trial at the pause; None if it was not evaluated there, as a finished one of another command."""
    path = folder / PAUSES / pause.text / PAUSE
    if not path.is_file():
        return None
    metrics = read_object(path).get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    value = next((metrics[name] for name in (measure, f"predict_{measure}") if name in metrics), None)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TrainingError(
            f"{path}: the pause has measured {', '.join(metrics) or 'nothing'}, and no {measure}, by which the search prunes; type "
            "objective=eval_loss, or leave hydra.sweeper.rungs out"
        )
    return float(value)


def survivors(
    study: "SharedStudy", trials: Sequence["FrozenTrial"], pause: Pause, pruner: "BasePruner", measure: str
) -> list["FrozenTrial"]:
    """Those of the trials that go on behind the rung; the others have failed, were interrupted, or are pruned now.

    All values of the rung are stored before the first trial is pruned, whichever was there first.
    """
    at = [trial for trial in trials if has_reached(study.folder(trial), pause) and not study.folder(trial).failure()]
    values = {trial.number: value_at(study.folder(trial), pause, measure) for trial in at}
    for trial in at:
        if (value := values[trial.number]) is not None:
            study.report(trial, value, step_of(pause))
    going = []
    for trial in at:
        folder, value = study.folder(trial), values[trial.number]
        if (
            folder.is_finished
            or value is None
            or ((reason := pruned_reason(folder)) is None and not is_pruned(study, trial, pruner))
        ):
            going.append(trial)
        elif reason is None:
            where = f"{pause.text} of the training" if pause.is_share else f"step {pause.text}"
            shown = f"{value:.6g}" if math.isfinite(value) else str(value)
            write_json(
                folder / PRUNED,
                {"reason": f"after {where}: {measure} {shown}", "pause": pause.text, "value": value if is_number(value) else None,
                 "pruner": type(pruner).__name__},
            )  # fmt: skip
    return going


def is_pruned(study: "SharedStudy", trial: "FrozenTrial", pruner: "BasePruner") -> bool:
    """Whether the pruner stops the trial, by the values that the study has."""
    latest = study.trials()[trial.number]
    return pruner.prune(study.study, latest)
