"""Where a run came from: code, packages, machine, command line."""

import hashlib
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from glmtuner.run_folder.redaction import redact_overrides


def provenance(overrides: list[str], **more: Any) -> dict[str, Any]:
    """Where a run came from: code, packages, machine, command line, and what the caller knows of data and template."""
    return {
        "command": " ".join(["python -m glmtuner", *redact_overrides(overrides)]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "packages": {name: version_of(name) for name in PACKAGES},
        "git": git_state(Path.cwd()),
        **more,
    }


PACKAGES = (
    "glmtuner",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "hydra-core",
)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, whether files differ from it, and a hash of the difference; None outside a repository."""

    def git(*overrides: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *overrides], cwd=folder, capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    difference = git("diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool((git("status", "--porcelain") or "").strip()),
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }
