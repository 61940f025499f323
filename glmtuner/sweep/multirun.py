"""The command that runs a sweep, from its overrides to its report."""

import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.config.hydra_main import hydra_main
from glmtuner.errors import GlmtunerError

if TYPE_CHECKING:
    from glmtuner.config.schema import Tracker


def run_sweep(
    overrides: list[str],
    flags: Sequence[str],
    *,
    config_dir: str | None,
    config_name: str,
    check: bool = False,
    as_json: bool = False,
) -> int:
    """Run every job of the sweep, each in its own folder; returns the exit code: 1 if a job failed, else 0.

    No job starts before every combination is composed and validated. The same command again skips the finished jobs,
    resumes the unfinished ones and runs the failed ones again. `flags` are Hydra's options; with `check`, the sweep is
    forecast, `as_json` as one JSON object.
    """
    from glmtuner.config.compose import Composed, compose_every_job, count_jobs, first_job
    from glmtuner.console import complain, say
    from glmtuner.launch.between_jobs import keep_no_more
    from glmtuner.launch.memory_check import report_remote_memory
    from glmtuner.report.jobs import State, read_jobs
    from glmtuner.run_folder.acquire import require_usable
    from glmtuner.sweep import workers
    from glmtuner.sweep.budget import reached
    from glmtuner.sweep.due import check_detached, has_queued_jobs
    from glmtuner.sweep.folders import hydra_overrides, job_folders_of, record_command, sweep_folder
    from glmtuner.sweep.forecast import check_not_swept, check_sweep, refuse_over_budget
    from glmtuner.sweep.job import run_job
    from glmtuner.sweep.launchers import SLURM_TARGET, register
    from glmtuner.sweep.live_table import live_table
    from glmtuner.sweep.on_ray.cluster import close
    from glmtuner.sweep.on_ray.launcher import register_ray
    from glmtuner.sweep.placeholders import placeholders
    from glmtuner.sweep.race_options import RACE_TARGET, check_race
    from glmtuner.sweep.search import check_sweeper, is_failure
    from glmtuner.sweep.shared import register_shared
    from glmtuner.sweep.submissions import read_submissions

    overrides = [override for override in overrides if override.replace(" ", "").lower() != "hydra.mode=multirun"]
    register()
    register_shared()
    register_ray()
    composed_jobs: list[Composed] = []
    bracketed = compose_every_job(overrides, config_dir=config_dir, config_name=config_name, seen=composed_jobs.append)
    is_race = composed_jobs[0].hydra.sweeper._target_ == RACE_TARGET
    if is_race:
        check_race(composed_jobs)
    first = partial(first_job, bracketed, config_dir=config_dir, config_name=config_name)
    searches = check_sweeper(first(), bracketed, config_dir=config_dir, config_name=config_name)
    root = sweep_folder(bracketed)
    check_not_swept(bracketed)
    budget = composed_jobs[0].run.budget
    if check:
        check_sweep(bracketed, root, as_json=as_json, config_dir=config_dir, config_name=config_name)
        return 0
    detached = False
    if shutil.which("sbatch") and (composed := first()).hydra.launcher._target_ == SLURM_TARGET:
        check_detached(composed.hydra)
        detached = composed.hydra.launcher.get("wait", True) is False
        report_remote_memory(composed)
    require_usable(root)
    submitted = read_submissions(root)
    refuse_over_budget(bracketed, budget, root, config_dir=config_dir, config_name=config_name)
    crash, names = None, list[str]()
    try:
        with placeholders(hydra_overrides(bracketed)) as public:
            names = [] if searches else job_folders_of(root, public, config_dir)
            record_command(root, flags, overrides, names)
            with live_table(root, composed_jobs[0].hydra.launcher._target_):
                hydra_main(["--multirun", *flags, *public], run_job)
    except GlmtunerError:
        raise
    except Exception as error:
        crash = error
    finally:
        keep_no_more()
        workers.close_all()
        close()
        (root / "multirun.yaml").unlink(missing_ok=True)  # of Hydra
    if detached and has_queued_jobs(root, since=submitted):
        say(f"sweep folder: {root}; the jobs run without this command, and the last one writes the report")
        say(f"python -m glmtuner status {shlex.quote(str(root))}")
        return 0
    jobs = read_jobs(root)  # their folders tell how they ended, whichever process ran them
    count = Counter(job.state for job in jobs)
    if crash is not None and count[State.finished] == len(jobs):
        raise crash
    failed = [job for job in jobs if is_failure(job, searches)]
    paused = count[State.paused]
    for job in failed:
        reason = {State.unfinished: "interrupted", State.running: "still running"}.get(job.state, job.reason)
        complain(f"glmtuner: a job of the sweep failed: {job.name}: {reason[:300]}")
    write_and_publish(root, lambda: first().run.tracker)
    say(
        f"sweep folder: {root} ({count[State.finished]} finished, {count[State.infeasible]} did not fit into memory, "
        f"{len(failed)} failed{f', {count[State.dropped]} dropped' if count[State.dropped] else ''})"
    )
    in_all = count_jobs(bracketed, config_dir=config_dir)
    if (failed or len(jobs) < in_all) and (over := reached(root, budget)):
        complain(
            f"glmtuner: {'; '.join(over)}: {count[State.finished]} of {in_all} jobs are finished; the same command with a larger limit "
            "goes on"
        )
        return 1
    if absent := [name for name in names if name not in {job.name for job in jobs}]:
        complain(
            f"glmtuner: {len(absent)} of {len(names)} jobs have not begun, such as {absent[0]}; the same command goes on"
        )
    if paused:
        complain(f"glmtuner: {paused} jobs of the race are paused at a rung; the same command goes on")
    elif failed and is_race:
        complain(
            "glmtuner: a job that failed at a rung is out of the race, and hydra.sweeper.recall=[<job>] runs it again; the same command "
            "runs the others again"
        )
    elif failed:
        complain("glmtuner: the same command runs the failed jobs again and skips the finished ones")
    return 1 if failed or paused or absent else 0


def write_and_publish(sweep: Path, get_tracker: "Callable[[], Tracker]") -> None:
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
