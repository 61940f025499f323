"""A job of a Hydra sweep: the same launch as a single run, in a folder that its overrides name."""

import gc
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import glmtuner.families
import glmtuner.finetuning
import glmtuner.metrics
import glmtuner.parallel
import glmtuner.quant
import glmtuner.stages
import glmtuner.trackers  # noqa: F401  (a job may start in a process of its own: everything registers itself here)
from glmtuner import ranks
from glmtuner.config.compose import compose
from glmtuner.config.objective import measured_as
from glmtuner.config.overrides import parse, typed_keys
from glmtuner.console import say
from glmtuner.errors import ConfigError, FolderBusy
from glmtuner.launch import launch
from glmtuner.launchers import one_gpu
from glmtuner.preemption import Preempted
from glmtuner.run_folder import FAILED, OUTPUT, SWEEP, RunFolder, read_json, shown_words, write_json

HANDED_ON = 120.0  # seconds that SLURM may take to end a job that goes back into the queue
SLUG = 60  # characters of a job folder's readable part


def sweep_words(words: Sequence[str]) -> list[str]:
    """The words for Hydra: typed ones, and where the sweep and its jobs live unless that was typed too.

    The sweep is named by `name`, or by a hash of everything that is not swept, so that the same command finds it again;
    a job by a readable slug of what is swept, with a hash.
    """
    overrides = parse(words)
    typed = typed_keys(overrides)
    unswept = [override.key_or_group for override in overrides if not override.is_sweep_override()]
    where = {
        "hydra.sweep.dir": f"'{sweep_folder(words)}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unswept)}]",
    }
    kept = [word for word in words if not word.startswith("trainer.output_dir=")]
    return [*kept, *(f"{key}={value}" for key, value in where.items() if key not in typed)]


def sweep_folder(words: Sequence[str]) -> Path:
    """Where the sweep of these words lives."""
    overrides = parse(words)
    fixed = {override.key_or_group: override for override in overrides if not override.is_sweep_override()}
    for key in ("hydra.sweep.dir", "trainer.output_dir"):
        if key in fixed:
            return Path(str(fixed[key].value()))
    same = [
        word
        for word, override in zip(words, overrides, strict=True)
        if not override.is_sweep_override() and override.key_or_group not in LAUNCHING
    ]
    name = str(fixed["name"].value()) if "name" in fixed else short_hash(" ".join(sorted(same)))
    return Path("outputs") / "sweeps" / name


LAUNCHING = ("hydra/launcher", "hydra.launcher.n_jobs")  # how jobs are started does not make another sweep


def job_slug(overrides: str) -> str:
    """`finetuning=lora,trainer.learning_rate=0.001` as `finetuning-lora_learning_rate-0.001_<hash>`."""
    parts = [
        re.sub(r"^[\w.]*\.", "", part.partition("=")[0]) + "-" + part.partition("=")[2]
        for part in overrides.split(",")
        if part
    ]
    readable = re.sub(r"[^\w.\-]+", "-", re.sub(r"[\[\]]", "", "_".join(parts)))[:SLUG].strip("-_.")
    return f"{readable}_{short_hash(overrides)}" if readable else short_hash(overrides)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("job_slug", job_slug, replace=True)


def run_job(config: DictConfig) -> float | None:
    """One job; returns the objective for a sweeper, None for a job that failed or does not fit into memory.

    A finished job is skipped, a half-done one goes on, a failed one starts again. What goes wrong is recorded in the
    job's folder and stops no other job. The job's words are composed again, so that a job means exactly what the same
    words mean in a single run.
    """
    ranks.settle()
    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    extra = next((source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None)
    words = [word for word in hydra.overrides.task if not word.startswith("trainer.output_dir=")]
    apart = hydra.runtime.choices.get("hydra/launcher") == "joblib"
    try:
        composed = compose(words, config_dir=extra, config_name=hydra.job.config_name)
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
            in_a_process(words, folder, composed.flags)
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
    except ranks.ToldByRank0:
        return None
    except JobFailed:
        return None  # the process wrote down why
    except Exception as error:
        told = ranks.world_size() > 1 or isinstance(error, ranks.RankFailed)  # by the rank that failed first
        failure = folder.record_failure(error, words, first_wins=told)
        say(f"{failure['kind']}: {folder.path}: {failure['reason'][:300]}")
        if ranks.world_size() > 1:
            raise SystemExit(1) from None  # the other ranks wait for this one in a collective
        free_memory()
        return None


class JobFailed(Exception):
    """A job that ran in a process of its own failed, which its folder tells."""


def in_a_process(words: Sequence[str], folder: RunFolder, flags: Sequence[str]) -> None:
    """Run the job in a process of its own, its output in output.log. Raises JobFailed, with the reason in failed.json."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    with (folder / OUTPUT).open("ab") as log, one_gpu(folder.path.parent) as chosen:
        child = subprocess.Popen(
            ranks.command_of(flags, words, folder.path),
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
        folder.record_failure(ConfigError(how), list(words))
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


def note_sweep(root: Path, words: Sequence[str]) -> None:
    """Write down what was typed, now and earlier."""
    before = read_json(root / SWEEP) if (root / SWEEP).is_file() else {"typed": []}
    command = shlex.join(["python", "-m", "glmtuner", "-m", *shown_words(list(words))])
    typed = [*(line for line in before["typed"] if line != command), command]
    write_json(root / SWEEP, {"typed": typed, "cwd": os.getcwd()})
