"""A job of a Hydra sweep: the same launch as a single run, in a folder named by its overrides."""

import gc
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from glmtuner.config.compose import Composed, compose
from glmtuner.config.objective import PREFIXES, measured_as, objectives_of
from glmtuner.config.offline import adopt_offline
from glmtuner.console import POSITION, say
from glmtuner.distributed import accelerator, ranks
from glmtuner.distributed.preemption import SIGNALS, Preempted
from glmtuner.errors import CheckpointError, ConfigError, FolderBusy, did_you_mean
from glmtuner.launch.between_jobs import keep_base_models
from glmtuner.launch.register import register_presets
from glmtuner.launch.run import launch
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, OUTPUT
from glmtuner.sweep import workers
from glmtuner.sweep.budget import hours_in, reached
from glmtuner.sweep.folders import recorded
from glmtuner.sweep.placeholders import reveal

T = TypeVar("T")
REQUEUE_SECONDS = 120.0  # that SLURM may take to end a job that is requeued


@dataclass(frozen=True)
class Job:
    """A job as Hydra composed it: its number and folder, and what its run is composed of again."""

    number: int
    folder: RunFolder
    sweep: Path  # the sweep's folder
    typed: list[str]  # its overrides, with placeholders for secrets
    env_set: Mapping[str, Any]
    config_dir: str | None
    config_name: str
    launcher: str
    chdir: bool  # whether Hydra changes into the folder while it runs

    @classmethod
    def current(cls) -> "Job":
        """The job that Hydra is running."""
        hydra = HydraConfig.get()
        config_dir = next(
            (source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None
        )
        return cls(
            number=hydra.job.num,
            folder=RunFolder(Path(hydra.runtime.output_dir)),
            sweep=Path(hydra.sweep.dir),
            typed=[override for override in hydra.overrides.task if not override.startswith("trainer.output_dir=")],
            env_set=dict(hydra.job.env_set),
            config_dir=config_dir,
            config_name=hydra.job.config_name or "config",
            launcher=hydra.runtime.choices["hydra/launcher"],
            chdir=bool(hydra.job.chdir),
        )

    @cached_property
    def composed(self) -> Composed:
        """The run, composed from the job's overrides so that they mean exactly what they mean in a single run."""
        overrides = [reveal(override) for override in self.typed]
        with self.environment():
            return compose(overrides, config_dir=self.config_dir, config_name=self.config_name)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Within it, the environment has what hydra.job.env_set asks for, secrets included."""
        new = {name: reveal(str(value)) for name, value in self.env_set.items()}
        before = {name: os.environ.get(name) for name in new}
        os.environ.update(new)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def run_job(config: DictConfig) -> list[float] | None:
    """Run one job; returns its objectives (none, one or two) for the sweeper, None if the job failed or does not fit into memory.

    A finished job is skipped, an unfinished one is resumed, a failed one starts again. An error is recorded in the job's
    folder and does not stop the other jobs.
    """
    ranks.adopt_slurm_env()
    register_presets()  # a launcher may start the job in a new process
    try:
        job = Job.current()
        with job.environment():
            return run_or_skip(job)
    except Preempted as preempted:
        stop_process(preempted)


def stop_process(preempted: Preempted) -> NoReturn:
    """End this process as the signal that stopped a job asks for."""
    preempted.call_previous_handler()
    if not ranks.is_main():
        time.sleep(REQUEUE_SECONDS)  # rank 0 is requeuing the job, which the end of any rank would end
    raise SystemExit(preempted.exit_code) from None


def run_or_skip(job: Job, start: Callable[..., dict[str, float]] | None = None) -> list[float] | None:
    """Run a job, by `start` in place of `launch` where it shares this process, unless it is finished or did not fit; returns its objectives, None as `run_job` does.

    Raises Preempted.
    """
    folder = job.folder

    def run(composed: Composed) -> list[float] | None:
        if known := known_outcome(job, composed):
            return known.values
        say(f"job {job.number}: {folder.path}")
        with hours_in(job.sweep) if start is None else nullcontext():  # jobs that share a process are counted together
            if job.launcher == "joblib":
                run_in_subprocess([reveal(override) for override in job.typed], folder, composed.flags)
                metrics = folder.metrics()
            else:
                if job.launcher == "basic":  # the others run one job in a process
                    keep_base_models()
                with shown_as(job):
                    metrics = (start or launch)(composed, output_dir=folder.path)
        if not metrics:  # paused at a rung of a race
            free_memory()
            return None
        return objective_values(metrics, composed.run.objective)

    return recorded_outcome(job, run)


@dataclass(frozen=True)
class Known:
    """What a job has come to without being started: its objectives, or None."""

    values: list[float] | None


def known_outcome(job: Job, composed: Composed) -> Known | None:
    """What is known of a job that is not to be started, which is printed: it is finished, did not fit, or the budget is spent; else None."""
    folder, overwrite = job.folder, composed.run.trainer.overwrite_output_dir
    failure = folder.failure()
    if folder.is_finished and not overwrite:
        say(f"finished before, skipped: {folder.path}")
        values = objective_values(folder.metrics(), composed.run.objective)
        (folder / FAILED).unlink(missing_ok=True)  # an earlier command had an objective that was not measured
        return Known(values)
    if failure and failure["kind"] == "infeasible" and not overwrite:
        say(f"did not fit into memory before, skipped (trainer.overwrite_output_dir=true runs it again): {folder.path}")
        return Known(None)
    if over := reached(job.sweep, composed.run.budget):
        say(f"not started, {'; '.join(over)}: {folder.path}")
        return Known(None)
    return None


def recorded_outcome(job: Job, run: Callable[[Composed], T]) -> T | None:
    """What `run` returns of the composed job; None after an error, which is recorded in its folder and printed. Raises Preempted."""
    folder, overrides = job.folder, job.typed
    try:
        adopt_offline()  # a launcher's `setup` may set it for the machine of the job alone
        composed = job.composed
        overrides = [reveal(override) for override in overrides]
        return run(composed)
    except Preempted as preempted:
        if over := reached(job.sweep, job.composed.run.budget):
            say(f"{folder.path}: {preempted}, {'; '.join(over)}; the same command with a larger limit resumes it")
            return None
        say(f"{folder.path}: {preempted}; the same command resumes it")
        raise
    except FolderBusy as busy:
        say(f"skipped: {busy}")
        return None
    except ranks.ReportedByRank0:
        return None
    except JobFailed:
        return None  # the job's process has recorded the reason
    except Exception as error:
        was_rank = ranks.world_size() > 1 or isinstance(
            error, ranks.RankFailed
        )  # the rank that failed first recorded it
        failure = folder.record_failure(error, overrides, first_wins=was_rank)
        say(f"{failure['kind']}: {folder.path}: {failure['reason'][:300]}")
        if ranks.world_size() > 1:
            raise SystemExit(1) from None  # the other ranks wait for this one in a collective
        free_memory()
        return None


@contextmanager
def shown_as(job: Job) -> Iterator[None]:
    """Within it, the live line of the run says which of the sweep's jobs it is."""
    try:
        total = len(recorded(job.sweep, "jobs"))
    except CheckpointError:
        total = 0
    token = POSITION.set(f"job {job.number}{f' ({job.number + 1} of {total})' if job.number < total else ''}: ")
    try:
        yield
    finally:
        POSITION.reset(token)


class JobFailed(Exception):
    """A job that ran in a subprocess failed; its folder holds the reason."""


def run_in_subprocess(overrides: Sequence[str], folder: RunFolder, flags: Sequence[str]) -> None:
    """Run the job in a process that other jobs ran in before, its output in output.log; raises JobFailed, with the reason in failed.json."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    _, _, _, *arguments = ranks.command_of(flags, overrides, folder.path)  # without `python -m glmtuner`
    jobs_at_once = int(HydraConfig.get().launcher.get("n_jobs") or 1)
    check_exit(workers.run_job(folder.path.parent, arguments, folder / OUTPUT, jobs_at_once), folder, overrides)


def check_exit(code: int, folder: RunFolder, overrides: Sequence[str]) -> None:
    """Raise JobFailed for a job's process that has not ended with exit code 0, whose reason is printed and in failed.json."""
    if code == 0:
        return
    if code in [128 + signum for signum in SIGNALS]:
        say(f"{folder.path}: stopped by {signal.Signals(code - 128).name}; the same command resumes it")
        raise JobFailed
    if folder.is_running:
        say(f"skipped: another process is running in {folder.path}")
        raise JobFailed
    if folder.failure() is None:
        last_line = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {' '.join(last_line)}"
        folder.record_failure(ConfigError(how), list(overrides))
    say(f"failed: {folder.path}: {(folder.failure() or {}).get('reason', '')[:300]}")
    raise JobFailed


def free_memory() -> None:
    """Free the accelerator memory of a failed or paused job for the next one."""
    gc.collect()
    accelerator.empty_cache()


def objective_values(metrics: dict[str, float], objective: Any) -> list[float]:
    """The metrics that `objective` names, each found as it is, or with predict_ or eval_ in front; empty without a name.

    Raises ConfigError if the run has not measured one.
    """
    names = objectives_of(objective)
    keys = [measured_as(name, metrics) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        known = dict.fromkeys(re.sub(f"^({'|'.join(PREFIXES)})", "", key) for key in metrics)
        raise ConfigError(
            f"objective={missing[0]}{did_you_mean(missing[0], known)}: the run measured {', '.join(metrics) or 'nothing'}; type one of "
            "these, or trainer.do_eval=true with data.dev_ratio or data.eval_dataset for eval_loss, trainer.do_predict=true for scores "
            "of answers"
        )
    return [metrics[key] for key in keys if key is not None]
