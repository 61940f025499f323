"""Hydra launchers: SLURM through submitit, and several jobs at a time on this machine through joblib.

Hydra looks for plugins in the package `hydra_plugins` only; `register` gives ours a name there.
"""

import copy
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititSlurm
from omegaconf import OmegaConf

from glmtuner.console import complain, say
from glmtuner.distributed.heartbeat import told_of_loss
from glmtuner.distributed.visible import only, visible_gpus
from glmtuner.errors import ConfigError, RankLost
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.locks import try_lock
from glmtuner.run_folder.redaction import redact_value
from glmtuner.sweep.attempts import DONE, INTERRUPTED, begin_attempt, end_attempt
from glmtuner.sweep.due import Jobs, check_detached, folder_names, is_due, queued_submissions
from glmtuner.sweep.placeholders import PLACEHOLDER, reveal, without_secrets
from glmtuner.sweep.queue import in_queue, own_job_id
from glmtuner.sweep.race import RaceSweeper
from glmtuner.sweep.race_options import RACE_TARGET
from glmtuner.sweep.search import OPTUNA_TARGET, REMOVED_TARGET, OptunaSweeper, RemovedSweeper
from glmtuner.sweep.search_settings import direction_of
from glmtuner.sweep.submissions import Submission, add_submissions, submitting
from glmtuner.sweep.sweepers import BASIC_TARGET, BasicSweeper

if TYPE_CHECKING:
    from submitit import Job

SLURM_TARGET = "hydra_plugins.glmtuner.SlurmLauncher"  # `_target_` of conf/hydra/launcher/slurm.yaml
POLL_SECONDS = 2.0  # between two looks at the queue, or at the locks of the GPUs
RESULT_GRACE_SECONDS = 15.0  # from a job's end in the queue until its result must be visible on a shared disk
EXECUTOR_PARAMETERS = (  # of submitit's AutoExecutor; the others are of SLURM, and prefixed there
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
    """Register the launcher of this module and the resolvers that conf/hydra uses."""
    Plugins.instance().class_name_to_class |= {
        SLURM_TARGET: SlurmLauncher, BASIC_TARGET: BasicSweeper, OPTUNA_TARGET: OptunaSweeper, REMOVED_TARGET: RemovedSweeper,
        RACE_TARGET: RaceSweeper,
    }  # fmt: skip
    # Hydra would use presets of these names that installed plugins bring as schemas of those in conf/hydra.
    stored = ConfigStore.instance().repo["hydra"]
    stored["launcher"].pop("joblib.yaml", None)
    stored["sweeper"].pop("optuna.yaml", None)
    OmegaConf.register_new_resolver("parallel_jobs", parallel_jobs, replace=True)
    OmegaConf.register_new_resolver("direction_of", direction_of, replace=True)


def parallel_jobs() -> int:
    """How many jobs run at a time on this machine: one per GPU, or one per two CPU cores."""
    return len(visible_gpus()) or max((os.cpu_count() or 2) // 2, 1)


@contextmanager
def one_gpu(root: Path) -> Iterator[dict[str, str]]:
    """The environment variables that give a job one of this machine's GPUs, which no other job of the sweep uses meanwhile.

    Empty on a machine with fewer than two GPUs. Each GPU has a lock file in the sweep's folder `root`; its lock is released
    when the process that holds it ends, however it ends.
    """
    gpus = visible_gpus()
    if len(gpus) < 2:
        yield {}
        return
    while True:
        for gpu in gpus:
            lock = try_lock(root / f".gpu-{gpu}.lock")
            if lock is not None:
                with lock:
                    yield only(gpu)
                return
        time.sleep(POLL_SECONDS)


class SlurmLauncher(SubmititSlurm):
    """Runs the jobs as one SLURM array. A job that fails stops no other, and its folder records how it ended.

    With `wait=false` it returns once they are submitted. A job that is in the queue already is not submitted again.
    """

    places: dict[int, tuple[Path, str]]  # the sweep's folder and the name of the job's, by its number
    puts_back: (
        bool  # whether a job is requeued here when a machine is lost; for detached ones what follows them does it
    )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        check_detached(self.config.hydra)
        if not shutil.which("sbatch"):
            raise ConfigError(
                "hydra/launcher=slurm: this machine has no `sbatch`; type it on a login node of the cluster, or type "
                "hydra/launcher=joblib"
            )
        root = Path(str(self.config.hydra.sweep.dir))
        root.mkdir(parents=True, exist_ok=True)
        params = hide_setup(dict(self.params))
        detached = params.pop("wait", True) is False
        numbered = list(enumerate(job_overrides, initial_job_idx))
        names = dict(zip(dict(numbered), folder_names(self.config, numbered), strict=True))
        with submitting(root):
            queued = queued_submissions(root, [*names.values()])
            fresh = [
                (n, each) for n, each in numbered if names[n] not in queued and is_due(root, names[n], each, detached)
            ]
            jobs = dict(zip(dict(fresh), self._submit(root, params, fresh, names, detached), strict=True))
            add_submissions(
                root, {names[number]: self._record(job, dict(fresh)[number], detached) for number, job in jobs.items()}
            )
        for number, overrides in numbered:
            job_id = jobs[number].job_id if number in jobs else queued.get(names[number])
            if job_id is not None:
                known = "" if number in jobs else " already"
                say(f"job {number} is SLURM job {job_id}{known}: {' '.join(filter_overrides(overrides))}")
        if detached:
            return [JobReturn(overrides=each, status=JobStatus.COMPLETED, _return_value=None) for _, each in numbered]
        from submitit.slurm.slurm import SlurmJob

        waiting: dict[int, Job[JobReturn]] = dict(jobs)
        for number in names.keys() - jobs.keys():
            if (job_id := queued.get(names[number])) is not None:
                waiting[number] = SlurmJob(self.params["submitit_folder"], job_id)
        wait_for_jobs([*waiting.values()])
        return [job_return(waiting.get(number), overrides) for number, overrides in numbered]

    def _submit(
        self, root: Path, params: dict[str, Any], fresh: Jobs, names: dict[int, str], detached: bool
    ) -> "list[Job[JobReturn]]":
        """Submit these jobs as an array; returns them as submitit's."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if not fresh:
            return []
        # a job whose node fails goes back into the queue, also where the cluster's default is another
        more = dict(params.get("additional_parameters") or {})
        params["additional_parameters"] = (
            more if {"requeue", "no-requeue", "no_requeue"} & more.keys() else {**more, "requeue": True}
        )
        if detached:
            params["teardown"] = [shlex.join([sys.executable, "-m", "glmtuner.sweep.closing", str(root.absolute())])]
        executor = submitit.AutoExecutor(
            cluster="slurm", folder=params.pop("submitit_folder"), slurm_max_num_timeout=params.pop("max_num_timeout")
        )
        executor.update_parameters(
            **{
                name if name in EXECUTOR_PARAMETERS else f"slurm_{name}": value
                for name, value in params.items()
                if value is not None
            }
        )
        state = dict(Singleton.get_state())
        if (hydra_config := state.get(HydraConfig)) is not None and hydra_config.cfg is not None:
            state[HydraConfig] = copy.copy(hydra_config)
            state[HydraConfig].cfg = without_secrets(hydra_config.cfg)
        pickled = copy.copy(self)  # submitit writes it to disk
        pickled.params, pickled.config = {}, without_secrets(self.config)
        pickled.puts_back = not detached
        pickled.places = {number: (root.absolute(), names[number]) for number, _ in fresh}
        try:
            return executor.map_array(
                pickled,
                [list(overrides) for _, overrides in fresh],
                ["hydra.sweep.dir"] * len(fresh),
                [number for number, _ in fresh],
                [f"job_id_for_{number}" for number, _ in fresh],
                [state] * len(fresh),
            )
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(
                f"hydra/launcher=slurm: sbatch refused the jobs: {' '.join(str(error).split())[:300]}; check the keys of hydra.launcher"
            ) from None

    def _record(self, job: "Job[JobReturn]", overrides: Sequence[str], detached: bool) -> Submission:
        assert self.config is not None
        sources = self.config.hydra.runtime.config_sources
        config_dir = next((source.path for source in sources if source.provider == "command-line"), None)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return Submission(job.job_id, now, list(overrides), config_dir, detached)

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run a job, on the machine that SLURM gave it; its configuration, which may hold secrets, is not part of the result."""
        root, name = self.places[arguments[2]]
        counts = os.environ.get("SLURM_PROCID", "0") == "0"
        if counts and (stopped := begin_attempt(root, name, own_job_id()).stopped):
            RunFolder(root / name).record_failure(ConfigError(stopped), list(arguments[0]))
            say(stopped)
            raise SystemExit(1)  # ends the other tasks
        how = INTERRUPTED
        try:
            with told_of_loss(put_back) if counts and self.puts_back else nullcontext():
                done = super().__call__(*arguments)
            how = DONE
        finally:
            if counts:
                end_attempt(root, name, how)
        return JobReturn(overrides=done.overrides, status=done.status, _return_value=done._return_value)


def put_back(loss: RankLost) -> None:
    """Put this SLURM job back into the queue if a machine of it cannot be reached: SLURM itself notices that minutes later.

    Until then it would take the end of rank 0 for a failure of the job.
    """
    if not loss.unreachable:
        return
    done = subprocess.run(["scontrol", "requeue", own_job_id()], capture_output=True, text=True, check=False)
    if done.returncode:
        complain(
            f"SLURM did not put job {own_job_id()} back into the queue ({done.stderr.strip()}); type the same command"
        )
    else:
        say(f"SLURM job {own_job_id()} goes back into the queue")


SETUP_VARIABLE = "GLMTUNER_SETUP_{}"  # a shell line of the user that holds a secret


def hide_setup(params: dict[str, Any]) -> dict[str, Any]:
    """The launcher's parameters for submitit's script, in which shell lines with secrets are read from the environment.

    SLURM passes this process's environment on to the jobs. Raises ConfigError for a secret in a parameter of sbatch or srun.
    """
    public = {**params, "setup": []}
    for number, typed in enumerate(params.get("setup") or []):
        # YAML reads the command `true` as a boolean
        line = str(typed).lower() if isinstance(typed, bool) else str(typed)
        if not _holds_secret(line):
            public["setup"].append(line)
            continue
        variable = SETUP_VARIABLE.format(number)
        os.environ[variable] = reveal(line)
        public["setup"].append(f'eval "${variable}"')
    public["setup"] = public["setup"] or None
    if wrong := [name for name, value in public.items() if name != "setup" and _holds_secret(value)]:
        raise ConfigError(
            f"hydra.launcher.{wrong[0]} holds a secret, which would be in clear in the job's script; type it as "
            "'hydra.launcher.setup=[\"export NAME=…\"]', or set it in the environment, which SLURM passes on"
        )
    return public


def _holds_secret(value: Any) -> bool:
    return bool(PLACEHOLDER.search(str(value))) or redact_value(value) != value


def wait_for_jobs(jobs: Sequence["Job[JobReturn]"]) -> None:
    """Wait until each job has left its result, or has been out of SLURM's queue for RESULT_GRACE_SECONDS."""
    left_queue_at: dict[str, float] = {}
    while True:
        pending = [job for job in jobs if not Path(job.paths.result_pickle).exists()]
        if not pending:
            return
        queued = in_queue(job.job_id for job in pending)
        now = time.monotonic()
        for job in pending:
            if queued is None or job.job_id in queued:
                left_queue_at.pop(job.job_id, None)
            else:
                left_queue_at.setdefault(job.job_id, now)
        if all(now - left_queue_at.get(job.job_id, now) > RESULT_GRACE_SECONDS for job in pending):
            return
        time.sleep(POLL_SECONDS)


def job_return(job: "Job[JobReturn] | None", overrides: Sequence[str]) -> JobReturn:
    """The job's result for Hydra's sweeper; a job without one, or not submitted, counts as completed without an objective.

    submitit is asked only for a result that exists: on a cluster without accounting it would wait for one forever.
    """
    if job is None:
        return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None)
    if Path(job.paths.result_pickle).exists():
        try:
            result: JobReturn = job.task(0).result()
            return result
        except Exception as error:  # of submitit; the error of a job is in its folder
            say(f"SLURM job {job.job_id}: {type(error).__name__}: {error}")
    say(f"SLURM job {job.job_id} left no result; its log: {job.paths.stderr}")
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None)
