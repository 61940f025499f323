"""Hydra's launchers of jobs: SLURM through submitit, and several at once on this machine through joblib.

Hydra takes plugins from `hydra_plugins` only; `register` makes ours known under a name there.
"""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititSlurm
from omegaconf import OmegaConf

from glmtuner.config.objective import less_is_better
from glmtuner.console import say
from glmtuner.distributed.ranks import gpus
from glmtuner.errors import ConfigError

SECONDS = 2.0  # between two looks at the queue
GRACE = 15.0  # seconds that a job may be out of the queue before its result is on a shared disk
QUEUE = (
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "timeout_min",
    "name",
    "stderr_to_stdout",
)


def register() -> None:
    """Make the launcher of this file and the resolvers of conf/hydra known."""
    Plugins.instance().class_name_to_class["hydra_plugins.glmtuner.SlurmLauncher"] = SlurmLauncher
    # the plugins' own presets of these names would be taken for the schemas of those in conf/hydra
    known = ConfigStore.instance().repo["hydra"]
    known["launcher"].pop("joblib.yaml", None)
    known["sweeper"].pop("optuna.yaml", None)
    OmegaConf.register_new_resolver("parallel_jobs", parallel_jobs, replace=True)
    OmegaConf.register_new_resolver("direction_of", direction_of, replace=True)


def parallel_jobs() -> int:
    """How many jobs run at once on this machine: one a GPU, or one for two cores."""
    return len(gpus()) or max((os.cpu_count() or 2) // 2, 1)


def direction_of(objective: str | None) -> str:
    """Whether a search wants less of the metric, or more."""
    if objective is None:
        raise ConfigError(
            "hydra/sweeper=optuna searches for the best value of a metric; type objective=eval_loss, or rouge-l"
        )
    return "minimize" if less_is_better(objective) else "maximize"


@contextmanager
def one_gpu(root: Path) -> Iterator[dict[str, str]]:
    """The environment of a job that has one of this machine's GPUs to itself among the jobs of this sweep.

    The locks end with the process that holds them, however it ends.
    """
    names = gpus()
    if len(names) < 2:
        yield {}
        return
    while True:
        for name in names:
            with (root / f".gpu-{name}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": name}
                return
        time.sleep(SECONDS)


class SlurmLauncher(SubmititSlurm):
    """Jobs as one SLURM array. A job that dies takes no other with it, and its folder tells what became of it."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import submitit

        assert self.config is not None
        if not shutil.which("sbatch"):
            raise ConfigError(
                "hydra/launcher=slurm: this machine has no `sbatch`; run it on a login node of the cluster, or type "
                "hydra/launcher=joblib"
            )
        root = Path(str(self.config.hydra.sweep.dir))
        root.mkdir(parents=True, exist_ok=True)
        params = dict(self.params)
        executor = submitit.AutoExecutor(
            cluster="slurm", folder=params.pop("submitit_folder"), slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        given = {name: value for name, value in params.items() if value is not None}
        executor.update_parameters(
            **{name if name in QUEUE else f"slurm_{name}": value for name, value in given.items()}
        )
        numbered = list(enumerate(job_overrides, initial_job_idx))
        state = Singleton.get_state()
        jobs = executor.map_array(
            self,
            [list(overrides) for _, overrides in numbered],
            ["hydra.sweep.dir"] * len(numbered),
            [number for number, _ in numbered],
            [f"job_id_for_{number}" for number, _ in numbered],
            [state] * len(numbered),
        )
        for (number, overrides), job in zip(numbered, jobs, strict=True):
            say(f"job {number} is SLURM's {job.job_id}: {' '.join(filter_overrides(overrides))}")
        wait_for(jobs)
        return [returned(job, overrides) for job, (_, overrides) in zip(jobs, numbered, strict=True)]


def wait_for(jobs: Sequence[Any]) -> None:
    """Until each job left its result, or has been out of SLURM's queue for a while."""
    gone: dict[str, float] = {}
    while True:
        left = [job for job in jobs if not Path(job.paths.result_pickle).exists()]
        if not left:
            return
        queued = in_queue({job.job_id.partition("_")[0] for job in left})
        now = time.monotonic()
        for job in left:
            if queued is None or job.job_id in queued:
                gone.pop(job.job_id, None)
            else:
                gone.setdefault(job.job_id, now)
        if all(now - gone.get(job.job_id, now) > GRACE for job in left):
            return
        time.sleep(SECONDS)


def in_queue(arrays: set[str]) -> set[str] | None:
    """The ids of the arrays' jobs that wait, run, or were put back; None when SLURM did not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", "--jobs", ",".join(sorted(arrays))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return set(done.stdout.split())


def returned(job: Any, overrides: Sequence[str]) -> JobReturn:
    """What Hydra's sweeper is told; a job without a result counts as done without an objective.

    Only a result that is there is asked for: without accounting submitit would wait for one for ever.
    """
    if Path(job.paths.result_pickle).exists():
        try:
            return job.task(0).result()
        except Exception as error:  # submitit's own; a job's failure stands in its folder
            say(f"SLURM's {job.job_id}: {type(error).__name__}: {error}")
    say(f"SLURM's {job.job_id} left no result; its log: {job.paths.stderr}")
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None)
