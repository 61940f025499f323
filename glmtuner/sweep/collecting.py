"""What launchers share that compose all jobs of the sweep before they start one."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from glmtuner.launch.register import register_presets
from glmtuner.sweep.job import Job


class CollectingLauncher(BasicLauncher):
    """A launcher that knows its jobs, as Hydra composes them, before it starts the first."""

    def collect(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> tuple[list[Job], list[JobReturn]]:
        """The jobs, and what is returned to the sweeper for them, with no objective yet."""
        task_function, jobs = self.task_function, list[Job]()

        def collect(config: DictConfig) -> None:
            register_presets()
            jobs.append(Job.current())

        self.task_function = collect
        try:
            returns = list(BasicLauncher.launch(self, job_overrides, initial_job_idx))
        finally:
            self.task_function = task_function
        for number, done in enumerate(returns):
            done.return_value  # noqa: B018  # raises what Hydra could not compose
            assert jobs[number].number == initial_job_idx + number
        return jobs, returns
