"""The command that runs a sweep, from its overrides to its report."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.config.hydra_main import hydra_main
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from glmtuner.config.schema import Tracker


def run_sweep(
    overrides: list[str], flags: Sequence[str], *, config_dir: str | None, config_name: str, check: bool = False
) -> int:
    """Run every job of the sweep, each in its own folder; returns the exit code: 1 if a job failed, else 0.

    No job starts before every combination is composed and validated. The same command again skips the finished jobs,
    resumes the unfinished ones and runs the failed ones again. `flags` are Hydra's options; with `check`, only the memory
    of the first job is estimated.
    """
    from glmtuner.config.compose import compose_every_job, first_job
    from glmtuner.console import complain, say
    from glmtuner.launch.between_jobs import keep_no_more
    from glmtuner.launch.memory_check import report_memory, report_remote_memory
    from glmtuner.report.jobs import State, read_jobs
    from glmtuner.run_folder.acquire import require_usable
    from glmtuner.sweep import workers
    from glmtuner.sweep.folders import hydra_overrides, record_command, sweep_folder
    from glmtuner.sweep.job import run_job
    from glmtuner.sweep.launchers import SLURM_TARGET, register
    from glmtuner.sweep.placeholders import placeholders
    from glmtuner.sweep.sweepers import check_storage

    overrides = [override for override in overrides if override.replace(" ", "").lower() != "hydra.mode=multirun"]
    register()
    bracketed = compose_every_job(overrides, config_dir=config_dir, config_name=config_name)
    first = partial(first_job, bracketed, config_dir=config_dir, config_name=config_name)
    if check:
        report_memory(first())
        return 0
    if shutil.which("sbatch") and (composed := first()).hydra.launcher._target_ == SLURM_TARGET:
        report_remote_memory(composed)
    if any(override.startswith("hydra.sweeper.storage=") for override in bracketed):
        check_storage(first().hydra)
    root = sweep_folder(bracketed)
    require_usable(root)
    record_command(root, overrides)
    crash = None
    try:
        with placeholders(hydra_overrides(bracketed)) as public:
            hydra_main(["--multirun", *flags, *public], run_job)
    except ConfigError:
        raise
    except Exception as error:  # such as Optuna's if no trial of a search has completed
        crash = error
    finally:
        keep_no_more()
        workers.close()
        (root / "multirun.yaml").unlink(missing_ok=True)  # of Hydra
    jobs = read_jobs(root)  # their folders tell how they ended, whichever process ran them
    count = Counter(job.state for job in jobs)
    if crash is not None and count[State.finished] == len(jobs):
        raise crash
    failed = [job for job in jobs if job.state in (State.failed, State.unfinished, State.running)]
    for job in failed:
        reason = {State.unfinished: "interrupted", State.running: "still running"}.get(job.state, job.reason)
        complain(f"glmtuner: a job of the sweep failed: {job.name}: {reason[:300]}")
    _write_report(root, lambda: first().run.tracker)
    say(
        f"sweep folder: {root} ({count[State.finished]} finished, {count[State.infeasible]} did not fit into memory, "
        f"{len(failed)} failed)"
    )
    if failed:
        complain("glmtuner: the same command runs the failed jobs again and skips the finished ones")
    return 1 if failed else 0


def _write_report(sweep: Path, get_tracker: "Callable[[], Tracker]") -> None:
    """Write, print and publish the sweep's report; an error is printed in one line and has no other effect."""
    from glmtuner.console import complain, say
    from glmtuner.report import write_report

    try:
        write_report(sweep)
        if message := get_tracker().publish(sweep):
            say(message)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        complain(f"glmtuner: the report was not written ({reason}); python -m glmtuner report {sweep}")
