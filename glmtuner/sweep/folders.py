"""Where a sweep and its jobs live."""

import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from glmtuner.config.overrides import parse, typed_keys
from glmtuner.run_folder.files import read_json, write_json
from glmtuner.run_folder.names import SWEEP
from glmtuner.run_folder.redaction import shown_words

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


def note_sweep(root: Path, words: Sequence[str]) -> None:
    """Write down what was typed, now and earlier."""
    before = read_json(root / SWEEP) if (root / SWEEP).is_file() else {"typed": []}
    command = shlex.join(["python", "-m", "glmtuner", "-m", *shown_words(list(words))])
    typed = [*(line for line in before["typed"] if line != command), command]
    write_json(root / SWEEP, {"typed": typed, "cwd": os.getcwd()})
