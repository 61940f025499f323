"""A Hydra launcher whose jobs share a frozen base, and train their adapters in lock step."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn

from glmtuner.config.compose import Composed
from glmtuner.console import SPEAKER, say
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import Preempted, capture_signals
from glmtuner.errors import ConfigError
from glmtuner.launch.run import computes_on_gpu, launch
from glmtuner.launch.shared import SharedBase
from glmtuner.run_folder.spent import counted
from glmtuner.sweep.budget import reached
from glmtuner.sweep.collecting import CollectingLauncher
from glmtuner.sweep.groups import common_values, differing, grouped, reason_apart
from glmtuner.sweep.job import Job, run_or_skip, stop_process

if TYPE_CHECKING:
    from glmtuner.training.lockstep import Runner

SHARED_TARGET = "hydra_plugins.glmtuner.SharedLauncher"  # `_target_` of conf/hydra/launcher/shared.yaml


def register_shared() -> None:
    """Let Hydra find the launcher of this module, as `register` of glmtuner/sweep/launchers.py does for others."""
    Plugins.instance().class_name_to_class[SHARED_TARGET] = SharedLauncher


class SharedLauncher(CollectingLauncher):
    """Trains the jobs that can share a base in one process, step by step together; others run apart, one after another."""

    def __init__(self, jobs_at_once: int | None = None) -> None:
        super().__init__()
        self.jobs_at_once = jobs_at_once

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        at_once = self.jobs_at_once
        if at_once is not None and (isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1):
            raise ConfigError(
                f"hydra.launcher.jobs_at_once={at_once}: legal is null, as many as fit into memory, or a number from 1; type "
                "hydra.launcher.jobs_at_once=8, or leave it out"
            )
        jobs, returns = self.collect(job_overrides, initial_job_idx)
        groups, apart = shared_groups(jobs)
        for group in groups:
            values = run_together([jobs[place] for place in group], self.jobs_at_once)
            for place, value in zip(group, values, strict=True):
                returns[place].return_value = value
        for place in apart:
            returns[place] = super().launch([job_overrides[place]], initial_job_idx + place)[0]
        return returns


def shared_groups(jobs: Sequence[Job]) -> tuple[list[list[int]], list[int]]:
    """The places of the jobs that share a base, group by group, and of those that run apart, whose reasons are printed.

    A job that is finished, or that cannot be composed, is among the latter: it costs nothing.
    """
    composed: dict[int, Composed] = {}
    apart, reasons = [], dict[str, list[int]]()
    for place, job in enumerate(jobs):
        try:
            if not job.folder.is_finished or job.composed.run.trainer.overwrite_output_dir:
                composed[place] = job.composed
        except Exception:  # what is wrong is recorded where the job runs
            pass
        if place not in composed:
            apart.append(place)
        elif reason := (
            "hydra.job.chdir=true: a process has one current folder" if job.chdir else reason_apart(composed[place])
        ):
            reasons.setdefault(reason, []).append(place)
    for reason, places in reasons.items():
        say_apart([jobs[place] for place in places], reason)
        apart += places
    common = {place: common_values(composed[place], jobs[place].env_set) for place in composed if place not in apart}
    places = [*common]
    groups = [[places[index] for index in group] for group in grouped([*common.values()])]
    for group in groups:
        if len(group) == 1:
            others = [other for other in groups if other != group]
            keys = differing(common[group[0]], common[others[0][0]]) if others else []
            why = f"no other has its {', '.join(keys[:3])}" if keys else "it is the only one to run"
            say_apart([jobs[group[0]]], why)
            apart += group
    return [group for group in groups if len(group) > 1], sorted(apart)


def say_apart(jobs: Sequence[Job], reason: str) -> None:
    """Print which jobs run apart, and why."""
    numbers = ", ".join(str(job.number) for job in jobs)
    say(f"hydra/launcher=shared: {'jobs' if len(jobs) > 1 else 'job'} {numbers} of the sweep will run apart: {reason}")


def run_together(jobs: Sequence[Job], jobs_at_once: int | None) -> list[float | None]:
    """Run jobs that can share a base; returns their objectives as `run_job` does. A signal ends all of them, then this process."""
    from glmtuner.launch.libraries import load_libraries
    from glmtuner.launch.optimizations import needs_compiler

    load_libraries(compiles=needs_compiler(jobs[0].composed.run), trains=True)
    from glmtuner.launch.shared_memory import jobs_that_fit
    from glmtuner.training.lockstep import Lockstep
    from glmtuner.training.measurements import forget_peak

    at_once = jobs_at_once or jobs_that_fit([job.composed for job in jobs])
    say(
        f"hydra/launcher=shared: {len(jobs)} jobs share {jobs[0].composed.run.model.model_name_or_path}"
        f"{'' if at_once >= len(jobs) else f', {at_once} at a time'}"
    )
    base, first = SharedBase(), jobs[0].composed.run
    device = base.device(first)
    if device.type == "cpu":
        say(
            "hydra/launcher=shared: on a CPU the same jobs are as fast one after another, in less memory: leave the launcher out"
        )
    forget_peak(device)
    name = f"jobs_{jobs[0].number}_to_{jobs[-1].number}"
    with (
        jobs[0].environment(),  # that of all
        counted(jobs[0].sweep, name, computes_on_gpu(first), first.budget.passed),
        capture_signals() as capture,
    ):
        runners = Lockstep(base.together(), capture).run(
            [(f"job {job.number}", partial(work_of, job, base)) for job in jobs], at_once
        )
    for runner in runners:
        if runner.error is not None and not isinstance(runner.error, Preempted):
            raise runner.error
    if capture.signum is not None and not reached(jobs[0].sweep, first.budget):
        stop_process(capture.preempted(0))
    return [runner.outcome for runner in runners]


def work_of(job: Job, base: SharedBase, runner: "Runner") -> list[float] | None:
    """A job, in its thread."""
    ranks.adopt_slurm_env()

    def start(composed: Composed, **options: Any) -> dict[str, float]:
        SPEAKER.set(f"{runner.name}: ")
        return launch(composed, parts=base.parts_of(composed.run, runner), **options)

    return run_or_skip(job, start)
