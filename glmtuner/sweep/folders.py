"""The folders of a sweep and its jobs."""

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from glmtuner.config.compose import combinations
from glmtuner.config.overrides import parse, quoted_value, user_keys_of
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_object, write_json
from glmtuner.run_folder.names import SWEEP
from glmtuner.run_folder.redaction import redact_overrides

SLUG_LENGTH = 60  # characters of the readable part of a job folder's name


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides for Hydra: the user's, and the folders of the sweep and its jobs unless the user set them.

    The sweep's folder is named by `name`, or by a hash of everything that is not swept, so that the same command uses the
    same folder again; a job's by a readable slug of its swept values and a hash of them.
    """
    parsed = parse(overrides)
    user_keys = user_keys_of(parsed)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    unswept = [override.key_or_group for override in parsed if override.key_or_group not in swept]
    folders = {
        "hydra.sweep.dir": quoted_value(str(sweep_folder(overrides))),
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unswept)}]",
    }
    kept = [override for override in overrides if not override.startswith("trainer.output_dir=")]
    return [*kept, *(f"{key}={value}" for key, value in folders.items() if key not in user_keys)]


def sweep_folder(overrides: Sequence[str]) -> Path:
    """The folder of the sweep with these overrides."""
    parsed = parse(overrides)
    fixed = {override.key_or_group: override for override in parsed if not override.is_sweep_override()}
    for key in ("hydra.sweep.dir", "trainer.output_dir"):
        if key in fixed:
            return Path(str(fixed[key].value()))
    identifying = [
        text
        for text, override in zip(overrides, parsed, strict=True)
        if not override.is_sweep_override() and not _is_of_launching(override.key_or_group)
    ]
    name = str(fixed["name"].value()) if "name" in fixed else short_hash(" ".join(sorted(identifying)))
    return Path("outputs") / "sweeps" / name


RAY_KEYS = ("address", "num_cpus", "num_gpus", "memory_gb", "resources", "max_parallel", "max_retries", "timeout_min", "grace_s",
            "runtime_env")  # fmt: skip
# another way to start the jobs, or dropped jobs that are called back, are not another sweep
LAUNCHER_KEYS = (
    *(f"hydra.launcher.{name}" for name in RAY_KEYS),
    *("hydra/launcher", "hydra.launcher.n_jobs", "hydra.launcher.wait", "hydra.launcher.jobs_at_once"),
    "hydra.sweeper.recall",
)


def _is_of_launching(key: str) -> bool:
    """Whether the key says how the jobs are started or how much they may take, and not what they are."""
    # an entry of a mapping, such as hydra.launcher.resources.a100, belongs to its key
    return ".".join(key.split(".")[:3]) in LAUNCHER_KEYS or key.partition(".")[0] == "budget"


def job_slug(swept: str) -> str:
    """`finetuning=lora,trainer.learning_rate=0.001` as `finetuning-lora_learning_rate-0.001_<hash>`."""
    parts = [
        re.sub(r"^[\w.]*\.", "", part.partition("=")[0]) + "-" + part.partition("=")[2]
        for part in swept.split(",")
        if part
    ]
    readable = re.sub(r"[^\w.\-]+", "-", re.sub(r"[\[\]]", "", "_".join(parts)))[:SLUG_LENGTH].strip("-_.")
    return f"{readable}_{short_hash(swept)}" if readable else short_hash(swept)


def short_hash(text: str) -> str:
    """The first 8 hex digits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def job_folder(root: Path, job: Sequence[str], swept: set[str]) -> Path:
    """The folder of the job with these overrides; `swept` are the keys whose values differ between the jobs."""
    parsed = parse(job)
    # of a key that was typed twice the last counts
    texts = {it.key_or_group: text for text, it in zip(job, parsed, strict=True) if it.key_or_group in swept}
    return root / job_slug(",".join(sorted(texts.values())))


OmegaConf.register_new_resolver("job_slug", job_slug, replace=True)


def job_folders_of(root: Path, overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """The names of the folders of a grid's jobs, in its order; none where hydra.sweep.subdir names them otherwise."""
    parsed = parse(overrides)
    if any(override.key_or_group == "hydra.sweep.subdir" for override in parsed):
        return []
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    names = [job_folder(root, job, swept).name for job in combinations(overrides, config_dir=config_dir)]
    return [*dict.fromkeys(names)]  # of a key that was typed twice, once with several values, some are the same


def record_command(root: Path, flags: Sequence[str], overrides: Sequence[str], jobs: Sequence[str]) -> None:
    """Add the sweep's command line, `flags` being its options, with secrets redacted, to those in sweep.json, and the names of its jobs' folders; each once.

    Raises CheckpointError if sweep.json is damaged.
    """
    known, before = recorded(root, "typed"), recorded(root, "jobs")
    command = shlex.join(["python", "-m", "glmtuner", *flags, "-m", *redact_overrides(list(overrides))])
    typed = [*(line for line in known if line != command), command]
    write_json(root / SWEEP, {"typed": typed, "cwd": os.getcwd(), "jobs": [*dict.fromkeys([*before, *jobs])]})


def recorded(root: Path, name: str) -> list[str]:
    """The command lines (`typed`) or the names of the jobs' folders (`jobs`) in sweep.json, of all commands so far; `jobs` are those of grids.

    Raises CheckpointError if sweep.json is damaged.
    """
    values = read_object(root / SWEEP) if os.path.lexists(root / SWEEP) else {name: []}
    lines = values.get(name, [] if name == "jobs" else None)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        what = "command lines" if name == "typed" else "jobs"
        raise CheckpointError(f"{root / SWEEP} is damaged (it has no list of {what}); remove it: no job depends on it")
    return lines
