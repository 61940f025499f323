"""A job of a Hydra sweep: the same launch as a single run, in a folder named by its overrides."""

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from glmtuner.config.compose import compose
from glmtuner.config.objective import measured_as
from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import SIGNALS, Preempted
from glmtuner.errors import ConfigError, FolderBusy
from glmtuner.launch.between_jobs import keep_base_models
from glmtuner.launch.register import register_presets
from glmtuner.launch.run import launch
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, OUTPUT
from glmtuner.sweep import workers
from glmtuner.sweep.placeholders import reveal

REQUEUE_SECONDS = 120.0  # that SLURM may take to end a job that is requeued


def run_job(config: DictConfig) -> float | None:
    """Run one job; returns its objective for the sweeper, None if the job failed or does not fit into memory.

    A finished job is skipped, an unfinished one is resumed, a failed one starts again. An error is recorded in the job's
    folder and does not stop the other jobs. The job's overrides are composed again, so that they mean exactly what they
    mean in a single run.
    """
    ranks.adopt_slurm_env()
    register_presets()  # a launcher may start the job in a new process
    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    config_dir = next(
        (source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None
    )
    overrides = [override for override in hydra.overrides.task if not override.startswith("trainer.output_dir=")]
    in_subprocess = hydra.runtime.choices.get("hydra/launcher") == "joblib"
    try:
        overrides = [reveal(override) for override in overrides]
        os.environ.update({name: reveal(str(value)) for name, value in hydra.job.env_set.items()})
        composed = compose(overrides, config_dir=config_dir, config_name=hydra.job.config_name or "config")
        overwrite = composed.run.trainer.overwrite_output_dir
        failure = folder.failure()
        if folder.is_finished and not overwrite:
            say(f"finished before, skipped: {folder.path}")
            value = objective_value(folder.metrics(), composed.run.objective)
            (folder / FAILED).unlink(missing_ok=True)  # an earlier command had an objective that was not measured
            return value
        if failure and failure["kind"] == "infeasible" and not overwrite:
            say(
                f"did not fit into memory before, skipped (trainer.overwrite_output_dir=true runs it again): {folder.path}"
            )
            return None
        say(f"job {hydra.job.num}: {folder.path}")
        if in_subprocess:
            run_in_subprocess(overrides, folder, composed.flags)
            metrics = folder.metrics()
        else:
            if hydra.runtime.choices.get("hydra/launcher") == "basic":  # the others run one job in a process
                keep_base_models()
            metrics = launch(composed, output_dir=folder.path)
        return objective_value(metrics, composed.run.objective)
    except Preempted as preempted:
        say(f"{folder.path}: {preempted}; the same command resumes it")
        preempted.call_previous_handler()
        if not ranks.is_main():
            time.sleep(REQUEUE_SECONDS)  # rank 0 is requeuing the job, which the end of any rank would end
        raise SystemExit(preempted.exit_code) from None
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


class JobFailed(Exception):
    """A job that ran in a subprocess failed; its folder holds the reason."""


def run_in_subprocess(overrides: Sequence[str], folder: RunFolder, flags: Sequence[str]) -> None:
    """Run the job in a process that other jobs ran in before, its output in output.log; raises JobFailed, with the reason in failed.json."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    _, _, _, *arguments = ranks.command_of(flags, overrides, folder.path)  # without `python -m glmtuner`
    jobs_at_once = int(HydraConfig.get().launcher.get("n_jobs") or 1)
    code = workers.run_job(folder.path.parent, arguments, folder / OUTPUT, jobs_at_once)
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
    """Free the accelerator memory of a failed job for the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def objective_value(metrics: dict[str, float], name: str | None) -> float | None:
    """The metric named `name`, predict_`name` or eval_`name`; None without a name.

    Raises ConfigError if the run has not measured it.
    """
    if name is None:
        return None
    key = measured_as(name, metrics)
    if key is not None:
        return metrics[key]
    raise ConfigError(
        f"objective={name}: the run measured {', '.join(metrics) or 'nothing'}; type one of these, or trainer.do_eval=true with "
        "data.dev_ratio or data.eval_dataset for eval_loss, trainer.do_predict=true for scores of answers"
    )
