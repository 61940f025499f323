"""Pauses: a training stops after a step, with a checkpoint and an evaluation, and a later command goes on with it.

Unlike a smaller trainer.max_steps, a pause changes nothing of the training: its schedule, the order of its data and what it logs
are those of the whole run. `hydra/sweeper=race` pauses its jobs by an environment variable, which reaches the process of a job
and those of its ranks, whichever launcher starts them, and is no part of the run's configuration.
"""

import os
from dataclasses import dataclass
from math import ceil

from glmtuner.config.schema import Run
from glmtuner.console import plain
from glmtuner.errors import ConfigError

VARIABLE = "GLMTUNER_PAUSE_AT"


@dataclass(frozen=True)
class Pause:
    """Where a training pauses: after a number of steps, or a share of them."""

    text: str  # as it was typed; it names the folder of the pause's evaluation

    @property
    def is_share(self) -> bool:
        return not self.text.isdecimal()

    def step(self, max_steps: int) -> int:
        """The step after which a training of `max_steps` steps pauses; of a share, the first step that completes it."""
        # 0.07 * 100 is 7.000000000000001
        return ceil(round(float(self.text) * max_steps, 6)) if self.is_share else int(self.text)

    def is_reached(self, step: int, max_steps: int) -> bool:
        """Whether a training that has taken `step` of its steps pauses; one that has taken all of them has nothing to wait for."""
        return self.step(max_steps) <= step < max_steps


class Paused(Exception):
    """The training has stopped at its pause, with a checkpoint and the pause's evaluation."""

    def __init__(self, pause: Pause, step: int, max_steps: int) -> None:
        super().__init__(f"paused after step {step} of {max_steps} (at {pause.text})")


def requested_pause() -> Pause | None:
    """The pause that the environment asks for, or None; raises ConfigError for one that is neither steps nor a share."""
    text = os.environ.get(VARIABLE, "").strip()
    return parse_pause(text, VARIABLE) if text else None


def parse_pause(value: object, key: str) -> Pause:
    """The pause of a value of `key`; raises ConfigError unless it is a number of steps, or a share between 0 and 1."""
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if text.isdecimal() and number >= 1:
        return Pause(str(int(text)))
    if not isinstance(value, bool) and 0 < number < 1:
        return Pause(f"{number:g}")
    raise ConfigError(
        f"{key}={plain(text)}: a pause is a number of steps, such as 200, or a share of the training between 0 and 1, such as 0.25"
    )


def measured_name(run: Run) -> str:
    """The metric by which paused runs are compared, without eval_ or predict_: that of `objective`, or the loss."""
    return measure_of(run.objective or "loss")


def measure_of(objective: str) -> str:
    """The metric's name in pause.json, which is without eval_ or predict_."""
    return objective.removeprefix("predict_").removeprefix("eval_")


def is_generated(run: Run) -> bool:
    """Whether that metric is a score of generated answers, and no measure of the stage; a plugin's stage may not declare its own."""
    if run.stage.evaluates is None:
        return run.trainer.predict_with_generate and measured_name(run) != "loss"
    return measured_name(run) not in ("loss", *run.stage.evaluates, *(f"reward_{name}" for name in run.reward))
