"""Where a sweep and its jobs live."""

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from glmtuner.config.overrides import parse, user_keys_of
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.names import SWEEP
from glmtuner.run_folder.redaction import redact_overrides

SLUG = 60  # characters of a job folder's readable part


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """The words for Hydra: typed ones, and where the sweep and its jobs live unless that was typed too.

    The sweep is named by `name`, or by a hash of everything that is not swept, so that the same command finds it again;
    a job by a readable slug of what is swept, with a hash.
    """
    parsed = parse(overrides)
    user_keys = user_keys_of(parsed)
    unswept = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    where = {
        "hydra.sweep.dir": f"'{sweep_folder(overrides)}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(unswept)}]",
    }
    kept = [word for word in overrides if not word.startswith("trainer.output_dir=")]
    return [*kept, *(f"{key}={value}" for key, value in where.items() if key not in user_keys)]


def sweep_folder(overrides: Sequence[str]) -> Path:
    """Where the sweep of these words lives."""
    parsed = parse(overrides)
    fixed = {override.key_or_group: override for override in parsed if not override.is_sweep_override()}
    for key in ("hydra.sweep.dir", "trainer.output_dir"):
        if key in fixed:
            return Path(str(fixed[key].value()))
    same = [
        word
        for word, override in zip(overrides, parsed, strict=True)
        if not override.is_sweep_override() and override.key_or_group not in LAUNCHING
    ]
    name = str(fixed["name"].value()) if "name" in fixed else short_hash(" ".join(sorted(same)))
    return Path("outputs") / "sweeps" / name


LAUNCHING = ("hydra/launcher", "hydra.launcher.n_jobs")  # how jobs are started does not make another sweep


def job_slug(parsed: str) -> str:
    """`finetuning=lora,trainer.learning_rate=0.001` as `finetuning-lora_learning_rate-0.001_<hash>`."""
    parts = [
        re.sub(r"^[\w.]*\.", "", part.partition("=")[0]) + "-" + part.partition("=")[2]
        for part in parsed.split(",")
        if part
    ]
    readable = re.sub(r"[^\w.\-]+", "-", re.sub(r"[\[\]]", "", "_".join(parts)))[:SLUG].strip("-_.")
    return f"{readable}_{short_hash(parsed)}" if readable else short_hash(parsed)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("job_slug", job_slug, replace=True)


def record_command(root: Path, overrides: Sequence[str]) -> None:
    """Write down what was typed, now and earlier."""
    before = read_json(root / SWEEP) if (root / SWEEP).is_file() else {"typed": []}
    command = shlex.join(["python", "-m", "glmtuner", "-m", *redact_overrides(list(overrides))])
    commands = [*(line for line in before["typed"] if line != command), command]
    write_json(root / SWEEP, {"typed": commands, "cwd": os.getcwd()})
