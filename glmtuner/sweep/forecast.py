"""The forecast of a sweep: the jobs that its command line means, and the refusal of what a budget does not allow."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from glmtuner.config.budget import Budget
from glmtuner.config.compose import MOST_SWEEP_JOBS_CHECKED, Composed, composed_jobs, count_jobs
from glmtuner.config.overrides import parse
from glmtuner.console import plain, say
from glmtuner.errors import ConfigError
from glmtuner.launch.forecast.jobs import Job
from glmtuner.launch.forecast.schedule import launcher_of
from glmtuner.launch.forecast.table import show
from glmtuner.launch.forecast.whole import Forecast, forecast, json_of, refuse, require_right_hours
from glmtuner.run_folder.files import strict_json
from glmtuner.sweep.folders import job_folder


def check_not_swept(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a budget of each job: it is that of the whole sweep."""
    for override in parse(overrides):
        if override.key_or_group.partition(".")[0] == "budget" and override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line}: a budget is of the whole sweep; type one value, such as budget.gpu_hours=8"
            )


def sweep_jobs(overrides: Sequence[str], root: Path, *, config_dir: str | None, config_name: str) -> list[Job]:
    """The jobs of a sweep. Of more than 64 the others count as the last of these; so do the trials of a search."""
    composed = composed_jobs(overrides, config_dir=config_dir, config_name=config_name)
    swept = {override.key_or_group: override for override in parse(overrides) if override.is_sweep_override()}
    jobs = [
        Job(composed=each, label=label_of(each, swept), folder=job_folder(root, each.overrides, {*swept}))
        for each in composed
    ]
    trials = composed[0].hydra.sweeper.get("n_trials")
    if trials is not None:
        return searched(jobs, int(trials))
    others = count_jobs(overrides, config_dir=config_dir) - len(jobs)
    if others:
        say(f"forecast: {others} jobs after the first {MOST_SWEEP_JOBS_CHECKED} count as the last of these")
        jobs.append(Job(composed=composed[-1], label="others like the last", count=others))
    return jobs


def searched(jobs: Sequence[Job], trials: int) -> list[Job]:
    """The trials of a search, divided evenly between the combinations of what it chooses from; which it will try, nobody knows."""
    each, more = divmod(trials, len(jobs))
    counts = [each + (place < more) for place in range(len(jobs))]
    return [
        Job(composed=job.composed, label=job.label, count=count)
        for job, count in zip(jobs, counts, strict=True)
        if count
    ]


def label_of(composed: Composed, swept: Mapping[str, object]) -> str:
    """The values of what is swept: `lora learning_rate=0.002`."""
    parts = []
    for text in composed.overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+~") in swept:
            parts.append(f"{key.rpartition('.')[2]}={value}" if "." in key else value)
    return " ".join(parts) or "trial"


def forecast_sweep(overrides: Sequence[str], root: Path, *, config_dir: str | None, config_name: str) -> Forecast:
    """The forecast of the sweep in the folder `root`."""
    jobs = sweep_jobs(overrides, root, config_dir=config_dir, config_name=config_name)
    return forecast(jobs, launcher_of(jobs[0].composed.hydra), root)


def check_sweep(
    overrides: Sequence[str], root: Path, *, as_json: bool, config_dir: str | None, config_name: str
) -> None:
    """Print the forecast of a sweep; raises ConfigError where a budget does not allow it, or where no job fits into memory."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        found = forecast_sweep(overrides, root, config_dir=config_dir, config_name=config_name)
    if as_json:
        print(plain(strict_json(json_of(found), indent=2)))
    else:
        show(found)
    require_right_hours(found)
    refuse(found, "the sweep")


def refuse_over_budget(
    overrides: Sequence[str], budget: Budget, root: Path, *, config_dir: str | None, config_name: str
) -> None:
    """Before a sweep with a limit starts: raise ConfigError where it is spent, or where the forecast passes it."""
    if not budget.limits():
        return
    if not budget.forecast:
        say(
            f"budget.forecast=false: the jobs stop when {' or '.join(f'budget.{name}={limit:g}' for name, limit in budget.limits().items())} is reached"
        )
        return
    found = forecast_sweep(overrides, root, config_dir=config_dir, config_name=config_name)
    require_right_hours(found)
    refuse(found, "the sweep")
    if not found.is_known:
        reason = next((job.reason for job in found.jobs if job.reason), "a job would not end")
        say(f"budget: the hours of some jobs are not known ({reason}); the jobs stop when the budget is reached")
