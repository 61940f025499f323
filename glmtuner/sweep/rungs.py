"""Rungs of a sweep: after a part of their training jobs pause and are evaluated, before it is decided which of them go on."""

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from omegaconf import ListConfig

from glmtuner.config.run_rules import TIMINGS, measured_by
from glmtuner.config.schema import Run
from glmtuner.console import plain
from glmtuner.distributed.pause import VARIABLE, Pause, is_generated, measured_name, parse_pause
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, PAUSE, PAUSES

KEY = "hydra.sweeper.rungs"
VISIBLE_SECONDS, POLL_SECONDS = 15.0, 1.0  # until a file that another machine has written is seen on a shared disk
DERIVED_MEASURES = ("perplexity", "kl")  # of means, not of a record


def pause_words(pause: Pause | None) -> list[str]:
    """The overrides of a job that pauses there."""
    return [f"++hydra.job.env_set.{VARIABLE}='{pause.text}'"] if pause else []


def has_reached(folder: RunFolder, pause: Pause) -> bool:
    """Whether the job has been evaluated at the pause, or has ended its training."""
    return folder.is_finished or (folder / PAUSES / pause.text / PAUSE).is_file()


def wait_for_files(folders: Sequence[RunFolder], pause: Pause, launcher: Any) -> None:
    """Wait a while for the files of jobs that have ended on another machine; there is nothing to wait for on this one."""
    end = time.monotonic() + (VISIBLE_SECONDS if launcher.get("submitit_folder") or launcher.get("address") else 0)
    while time.monotonic() < end and not all(
        has_reached(folder, pause) or (folder / FAILED).is_file() for folder in folders
    ):
        time.sleep(POLL_SECONDS)


def rungs_of(rungs: Any) -> tuple[Pause, ...]:
    """The pauses of hydra.sweeper.rungs, legal."""
    return tuple(parse_pause(value, KEY) for value in rungs or ())


def illegal_rungs(rungs: Any) -> Iterator[str]:
    """One sentence for a value of hydra.sweeper.rungs that is no list of increasing steps, or of increasing shares."""
    if not isinstance(rungs, (ListConfig, list)):
        yield f"{KEY}={plain(str(rungs))}: a list of shares or steps, such as {KEY}=[0.1,0.2,0.4]"
        return
    try:
        pauses = rungs_of(rungs)
    except ConfigError as error:
        yield str(error)
        return
    shown = f"{KEY}=[{','.join(pause.text for pause in pauses)}]"
    if len({pause.is_share for pause in pauses}) > 1:
        yield f"{shown}: either shares of the training, or numbers of steps"
    elif any(float(one.text) >= float(other.text) for one, other in pairwise(pauses)):
        yield f"{shown}: each rung is later than the one before; type them in order"


def cannot_pause(run: Run, rungs: Sequence[Pause], what: str, per_record: bool) -> Iterator[str]:
    """One sentence for each value of a job with which it cannot pause or be evaluated; `what` asks for it, such as hydra/sweeper=race.

    `per_record`: the measure has a value of each record, by which jobs are compared.
    """
    trainer, name = run.trainer, measured_name(run)
    if not trainer.do_train:
        yield f"{what} without training: jobs are dropped while they train; leave {what} out"
        return
    if not run.data.eval_dataset and not run.data.dev_ratio:
        yield f"{what}: the jobs are compared on evaluation records; type data.eval_dataset=…, or data.dev_ratio=0.1"
    if name.startswith("train_") or name in TIMINGS or (per_record and name in DERIVED_MEASURES):
        yield f"{what} with objective={run.objective}: no {'record has a value of it' if per_record else 'rung measures it'}; type objective=eval_loss"
    elif not is_generated(run):
        if not trainer.do_eval:
            yield f"{what}: the jobs are compared by eval_{name}, which is measured at the end, too; type trainer.do_eval=true"
        if name == "loss" and (run.stage.uses_rewards or run.stage.uses_reward_model):
            yield (
                f"{what} with stage={run.stage.name}: its loss is no measure of its answers; type objective=eval_reward"
            )
    elif not (trainer.predict_with_generate and (trainer.do_eval or trainer.do_predict)):
        yield (
            f"{what} with objective={run.objective}: scores of answers need them; type trainer.do_predict=true "
            "trainer.predict_with_generate=true, or objective=eval_loss"
        )
    elif (measured := measured_by(run)) is not None and name not in measured:
        legal = [each for each in measured if each not in TIMINGS]
        hint = did_you_mean(name, legal, f"legal: {', '.join(legal)}")
        yield f"{what} with objective={run.objective}: nothing of that name is measured{hint}"
    if trainer.overwrite_output_dir:
        yield f"{what} with trainer.overwrite_output_dir=true, which removes a job that pauses; type another name=… to start over"
    steps = [pause for pause in rungs if not pause.is_share]
    if steps and 0 < trainer.max_steps <= int(steps[-1].text):
        yield (
            f"{KEY}: the rung {steps[-1].text} is not before the end of a training of trainer.max_steps={trainer.max_steps}; "
            "type earlier rungs, or shares such as [0.1,0.2,0.4]"
        )
