"""A job of a Hydra sweep: the same launch as a single run, in a folder that its overrides name."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import glmtuner.families
import glmtuner.finetuning
import glmtuner.metrics
import glmtuner.quant
import glmtuner.stages
import glmtuner.trackers  # noqa: F401  (a job may start in a process of its own: everything registers itself here)
from glmtuner.config.compose import compose
from glmtuner.config.overrides import parse, typed_keys
from glmtuner.console import say
from glmtuner.launch import launch
from glmtuner.run_folder import RunFolder

SLUG = 60  # characters of a job folder's readable part


def sweep_words(words: Sequence[str]) -> list[str]:
    """The words for Hydra: typed ones, and where the sweep and its jobs live unless that was typed too.

    The sweep is named by `name`, or by a hash of everything that is not swept, so that the same command finds it again;
    a job by a readable slug of what is swept, with a hash.
    """
    overrides = parse(words)
    typed = typed_keys(overrides)
    fixed = [word for word, override in zip(words, overrides, strict=True) if not override.is_sweep_override()]
    name = next((word.partition("=")[2] for word in fixed if word.startswith("name=")), "")
    output = next((word.partition("=")[2] for word in fixed if word.startswith("trainer.output_dir=")), "")
    kept = [word for word in words if not word.startswith("trainer.output_dir=")]
    same = short_hash(" ".join(sorted(fixed)))
    root = output or f"outputs/sweeps/{name or same}"
    unswept = [override.key_or_group for override in overrides if not override.is_sweep_override()]
    where = {
        "hydra.sweep.dir": root,
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unswept)}]",
    }
    return [*kept, *(f"{key}={value}" for key, value in where.items() if key not in typed)]


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
    """One job; a finished one is skipped. Returns the objective for a sweeper.

    The job's words are composed again, so that a job means exactly what the same words mean in a single run.
    """
    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    extra = next((source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None)
    composed = compose(list(hydra.overrides.task), config_dir=extra, config_name=hydra.job.config_name)
    if folder.is_finished and not composed.run.trainer.overwrite_output_dir:
        say(f"finished before, skipped: {folder.path}")
        return objective(folder.metrics(), composed.run.objective)
    return objective(launch(composed, output_dir=folder.path), composed.run.objective)


def objective(metrics: dict[str, float], name: str | None) -> float | None:
    """The metric of that name, as it is or with eval_ or predict_ before it."""
    if name is None:
        return None
    return next((metrics[key] for key in (name, f"eval_{name}", f"predict_{name}") if key in metrics), None)
