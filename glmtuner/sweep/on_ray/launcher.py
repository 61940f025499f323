"""hydra/launcher=ray: each job of the sweep is a task of a Ray cluster, which runs it as a process of its own.

What a job comes to is in its folder, which all nodes share; Ray only decides where it runs, and tells when it has ended.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn

from glmtuner.config.compose import Composed
from glmtuner.errors import ConfigError
from glmtuner.sweep.budget import reached
from glmtuner.sweep.collecting import CollectingLauncher
from glmtuner.sweep.job import Job, known_outcome, recorded_outcome, stop_process
from glmtuner.sweep.on_ray.cluster import alive_nodes, connect, require_ray, unplaceable
from glmtuner.sweep.on_ray.options import RayOptions
from glmtuner.sweep.on_ray.tasks import Task, Tasks

RAY_TARGET = "hydra_plugins.glmtuner.RayLauncher"  # `_target_` of conf/hydra/launcher/ray.yaml


def register_ray() -> None:
    """Let Hydra find the launcher of this module, as `register` of glmtuner/sweep/launchers.py does for others."""
    Plugins.instance().class_name_to_class[RAY_TARGET] = RayLauncher


class RayLauncher(CollectingLauncher):
    """Runs the jobs on the nodes of a Ray cluster. A job that fails stops no other, and one whose node is lost starts again."""

    def __init__(self, **typed: Any) -> None:
        super().__init__()
        self.typed = typed

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        options = RayOptions.of(self.typed)
        require_ray()
        jobs, returns = self.collect(job_overrides, initial_job_idx)
        due: list[tuple[int, Job]] = []
        for place, job in enumerate(jobs):
            with job.environment():
                returns[place].return_value = recorded_outcome(job, partial(due_or_known, due, place, job))
        if not due:
            return returns
        root = Path(jobs[0].sweep).absolute()
        tasks = Tasks(root, options)
        connect(options.address, tasks.messages)
        nodes = alive_nodes()
        has_gpus = any(node.resources.get("GPU") for node in nodes)
        wanted = [Task(place, job, options.demand(job.composed.run, has_gpus)) for place, job in due]
        for task in wanted:
            if (problem := unplaceable(task.demand, nodes)) is not None:
                raise ConfigError(problem)
        stopped = tasks.run(wanted)
        for task in wanted:
            returns[task.place].return_value = task.values
        if stopped is not None and not reached(root, jobs[0].composed.run.budget):
            stop_process(stopped)
        return returns


def due_or_known(due: list[tuple[int, Job]], place: int, job: Job, composed: Composed) -> list[float] | None:
    """The objectives of a job that is not to be started; one that is, is added to `due`."""
    known = known_outcome(job, composed)
    if known is not None:
        return known.values
    due.append((place, job))
    return None
