"""A job of a Hydra sweep: the same launch as a single run, in a folder that its overrides name."""

import gc
import os
import signal
import subprocess
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
from glmtuner.distributed.preemption import Preempted
from glmtuner.errors import ConfigError, FolderBusy
from glmtuner.launch.register import register_presets
from glmtuner.launch.run import launch
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, OUTPUT
from glmtuner.sweep.launchers import one_gpu

HANDED_ON = 120.0  # seconds that SLURM may take to end a job that goes back into the queue


def run_job(config: DictConfig) -> float | None:
    """One job; returns the objective for a sweeper, None for a job that failed or does not fit into memory.

    A finished job is skipped, a half-done one goes on, a failed one starts again. What goes wrong is recorded in the
    job's folder and stops no other job. The job's words are composed again, so that a job means exactly what the same
    words mean in a single run.
    """
    ranks.adopt_slurm_env()
    register_presets()  # a job may start in a process of its own
    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    extra = next((source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None)
    overrides = [word for word in hydra.overrides.task if not word.startswith("trainer.output_dir=")]
    apart = hydra.runtime.choices.get("hydra/launcher") == "joblib"
    try:
        composed = compose(overrides, config_dir=extra, config_name=hydra.job.config_name)
        again = composed.run.trainer.overwrite_output_dir
        failure = folder.failure()
        if folder.is_finished and not again:
            say(f"finished before, skipped: {folder.path}")
            value = objective(folder.metrics(), composed.run.objective)
            (folder / FAILED).unlink(missing_ok=True)  # an earlier command asked for an objective that is not there
            return value
        if failure and failure["kind"] == "infeasible" and not again:
            say(
                f"did not fit into memory before, skipped (trainer.overwrite_output_dir=true tries it again): {folder.path}"
            )
            return None
        say(f"job {hydra.job.num}: {folder.path}")
        if apart:
            in_a_process(overrides, folder, composed.flags)
            metrics = folder.metrics()
        else:
            metrics = launch(composed, output_dir=folder.path)
        return objective(metrics, composed.run.objective)
    except Preempted as stopped:
        say(f"{folder.path}: {stopped}; started again, it goes on")
        stopped.hand_on()
        if not ranks.is_main():
            time.sleep(HANDED_ON)  # rank 0 is putting the job back into the queue, and the end of any rank ends it
        raise SystemExit(stopped.exit_code) from None
    except FolderBusy as busy:
        say(f"left alone: {busy}")
        return None
    except ranks.ReportedByRank0:
        return None
    except JobFailed:
        return None  # the process wrote down why
    except Exception as error:
        told = ranks.world_size() > 1 or isinstance(error, ranks.RankFailed)  # by the rank that failed first
        failure = folder.record_failure(error, overrides, first_wins=told)
        say(f"{failure['kind']}: {folder.path}: {failure['reason'][:300]}")
        if ranks.world_size() > 1:
            raise SystemExit(1) from None  # the other ranks wait for this one in a collective
        free_memory()
        return None


class JobFailed(Exception):
    """A job that ran in a process of its own failed, which its folder tells."""


def in_a_process(overrides: Sequence[str], folder: RunFolder, flags: Sequence[str]) -> None:
    """Run the job in a process of its own, its output in output.log. Raises JobFailed, with the reason in failed.json."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    with (folder / OUTPUT).open("ab") as log, one_gpu(folder.path.parent) as chosen:
        child = subprocess.Popen(
            ranks.command_of(flags, overrides, folder.path),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **chosen},
        )
        try:
            ranks.wait_for([child])
            return
        except ranks.RankFailed as failed:
            if failed.stopped_by is not None:
                say(f"{folder.path}: {failed}; started again, it goes on")
                raise JobFailed from None
            code = failed.code
    if folder.is_running:
        say(f"left alone: another process runs in {folder.path}")
        raise JobFailed
    if folder.failure() is None:
        tail = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {' '.join(tail)}"
        folder.record_failure(ConfigError(how), list(overrides))
    say(f"failed: {folder.path}: {(folder.failure() or {}).get('reason', '')[:300]}")
    raise JobFailed


def free_memory() -> None:
    """What a failed job held on an accelerator is free for the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def objective(metrics: dict[str, float], name: str | None) -> float | None:
    """The metric of that name, as it is or with predict_ or eval_ before it; None when none is asked for."""
    if name is None:
        return None
    key = measured_as(name, metrics)
    if key is not None:
        return metrics[key]
    raise ConfigError(
        f"objective={name}: the run measured {', '.join(metrics) or 'nothing'}; type one of these, or trainer.do_eval=true with "
        "data.dev_ratio or data.eval_dataset for eval_loss, trainer.do_predict=true for scores of answers"
    )
