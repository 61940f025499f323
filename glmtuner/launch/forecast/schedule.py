"""How a launcher runs the jobs of a sweep: how many at once, on what, and in how many submissions; pure functions."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

JOBLIB, SLURM, BASIC, SHARED = "JoblibLauncher", "SlurmLauncher", "BasicLauncher", "SharedLauncher"
RAY = "hydra_plugins.glmtuner.RayLauncher"  # whole: other packages have launchers of the same name


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What the forecast needs to know of a Hydra launcher."""

    at_once: int = 1
    shares_process: bool = True  # do all jobs run in one process, which imports its libraries once?
    remote: bool = False  # do the jobs run on other machines?
    gpus: int | None = None  # of a job; None: what this machine would give it
    limit_s: float | None = None  # of a submission
    notice_s: float = 0.0  # before the limit, from which on a job saves and is requeued
    most_submissions: int | None = None
    notes: tuple[str, ...] = ()


def launcher_of(hydra: DictConfig) -> Launcher:
    """The launcher of a composed sweep; one that is not known counts as one job at a time, and says so."""
    launcher = hydra.launcher
    name = str(launcher._target_).rpartition(".")[2]
    if name == BASIC:
        return Launcher()
    if name == SHARED:
        return Launcher(
            notes=(
                "hydra/launcher=shared: jobs that train together take less than one after the other, as forecast here",
            )
        )
    if name == JOBLIB:
        import os

        jobs = int(launcher.n_jobs)
        cores = os.cpu_count() or 1
        return Launcher(at_once=jobs if jobs > 0 else max(cores + 1 + jobs, 1), shares_process=False)
    if name == SLURM:
        return Launcher(
            at_once=int(launcher.array_parallelism),
            shares_process=False,
            remote=True,
            gpus=slurm_gpus(launcher),
            limit_s=60.0 * launcher.timeout_min if launcher.timeout_min else None,
            notice_s=float(launcher.signal_delay_s or 0),
            most_submissions=1 + int(launcher.max_num_timeout or 0),
        )
    if launcher._target_ == RAY:
        return ray_launcher(launcher)
    jobs = launcher.get("n_jobs", 1)
    at_once = jobs if isinstance(jobs, int) and jobs > 0 else 1
    note = f"hydra.launcher._target_={launcher._target_} is not known: {at_once} job{'s' * (at_once > 1)} at a time, on this machine"
    return Launcher(at_once=at_once, shares_process=False, notes=(note,))


def ray_launcher(launcher: DictConfig) -> Launcher:
    """hydra/launcher=ray, as far as its keys tell: how much room a cluster has is known only to the cluster."""
    import os

    here = launcher.address is None
    most = launcher.max_parallel
    cores = int((os.cpu_count() or 1) // max(float(launcher.num_cpus or 1), 1)) or 1
    notes: tuple[str, ...] = ()
    if not here and most is None:
        notes = (
            "hydra/launcher=ray: forecast for one job at a time; hydra.launcher.max_parallel=… says for how many nodes have room",
        )
    return Launcher(
        at_once=min(most or cores, cores) if here else int(most or 1),
        shares_process=False,
        remote=not here,
        gpus=None if launcher.num_gpus is None else math.ceil(launcher.num_gpus),
        notes=notes,
    )


def slurm_gpus(launcher: DictConfig) -> int | None:
    """The GPUs of a job of this launcher; None where its keys do not say, as with gres."""
    tasks = int(launcher.nodes or 1) * int(launcher.tasks_per_node or 1)
    if launcher.gpus_per_node is not None:
        return int(launcher.nodes or 1) * int(launcher.gpus_per_node)
    if launcher.gpus_per_task is not None:
        return tasks * int(launcher.gpus_per_task)
    return None


def elapsed(durations: Sequence[float], at_once: int) -> float:
    """The time until the last of the jobs has ended, each started in order as soon as one of `at_once` places is free."""
    free = [0.0] * max(min(at_once, len(durations)), 1)
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def submissions(start_s: float, work_s: float, limit_s: float | None, notice_s: float = 0.0) -> int | None:
    """How often a job must be submitted whose every submission begins with `start_s`; None if it would never end.

    The last submission may use its whole time limit, each before it ends `notice_s` earlier.
    """
    if limit_s is None or start_s + work_s <= limit_s:
        return 1
    each = limit_s - notice_s - start_s
    if each <= 0:
        return None
    before = max(math.ceil((start_s + work_s - limit_s) / each), 1)
    return before + 1
