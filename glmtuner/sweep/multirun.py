"""A sweep, from its overrides to its report."""

import shutil
import sys
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
    """Every job of the sweep, one folder a job; nothing runs before every combination was composed and validated.

    Started again, it skips what is finished, continues what is half done and tries again what failed. `flags` are Hydra's
    options; with `check` only the memory of the first job is estimated. Returns the exit code: 1 where jobs failed.
    """
    from glmtuner.config.compose import compose_every_job, first_job
    from glmtuner.console import say
    from glmtuner.launch.memory_check import report_memory as check_memory
    from glmtuner.launch.memory_check import report_remote_memory
    from glmtuner.report.jobs import State, read_jobs
    from glmtuner.sweep.folders import hydra_overrides, record_command, sweep_folder
    from glmtuner.sweep.job import run_job
    from glmtuner.sweep.launchers import register

    overrides = [word for word in overrides if word.replace(" ", "").lower() != "hydra.mode=multirun"]
    register()
    settled = compose_every_job(overrides, config_dir=config_dir, config_name=config_name)
    first = partial(first_job, settled, config_dir=config_dir, config_name=config_name)
    if check:
        check_memory(first())
        return 0
    if "hydra/launcher=slurm" in settled and shutil.which("sbatch"):
        report_remote_memory(first())
    root = sweep_folder(settled)
    record_command(root, overrides)
    crash = None
    try:
        hydra_main(["--multirun", *flags, *hydra_overrides(settled)], run_job)
    except ConfigError:
        raise
    except Exception as error:  # such as Optuna's, when no trial of a search came to an end
        crash = error
    finally:
        (root / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of the words, keys and tokens among them
    jobs = read_jobs(root)  # judged by the folders alone, whoever ran the jobs
    count = Counter(job.state for job in jobs)
    if crash is not None and count[State.finished] == len(jobs):
        raise crash
    failed = [job for job in jobs if job.state in (State.failed, State.unfinished, State.running)]
    for job in failed:
        reason = {State.unfinished: "cut off before its end", State.running: "still running"}.get(job.state, job.reason)
        print(f"glmtuner: a job of the sweep failed: {job.name}: {reason[:300]}", file=sys.stderr)
    _report(root, lambda: first().run.tracker)
    say(
        f"sweep folder: {root} ({count[State.finished]} finished, {count[State.infeasible]} did not fit into memory, "
        f"{len(failed)} failed)"
    )
    if failed:
        print("glmtuner: the same command tries the failed ones again and skips the finished ones", file=sys.stderr)
    return 1 if failed else 0


def _report(sweep: Path, tracker: "Callable[[], Tracker]") -> None:
    """Write, show and publish the sweep's report; what goes wrong with it is told in a line and changes nothing else."""
    from glmtuner.console import say
    from glmtuner.report import report

    try:
        report(sweep)
        if closing := tracker().publish(sweep):
            say(closing)
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"glmtuner: the report was not written ({told}); python -m glmtuner report {sweep}", file=sys.stderr)
