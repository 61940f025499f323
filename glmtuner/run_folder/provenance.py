"""The provenance of a run: command line, start time, versions of the packages, git commit."""

import hashlib
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from glmtuner.run_folder.redaction import redact_overrides, redact_value


def provenance(overrides: list[str], **more: Any) -> dict[str, Any]:
    """The content of provenance.json: command line, start time, versions, git state, and `more` from the caller."""
    return {
        "command": " ".join(["python -m glmtuner", *redact_overrides(overrides)]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "packages": {name: version_of(name) for name in PACKAGES},
        "git": git_state(Path.cwd()),
        **more,
        **{name: redact_value(more[name], assignments=False) for name in ("data", "plugins") if name in more},
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


TYPES: dict[str, tuple[type, ...]] = {
    "command": (str,), "started": (str,), "packages": (dict,), "git": (dict, type(None)), "base": (dict,), "data": (dict,),
    "resumed": (list,), "template": (dict, str), "thinking": (str, type(None)),
}  # fmt: skip


def wrong_values(values: dict[str, Any]) -> list[str]:
    """The values of a provenance.json that have another type than a run writes, each in a few words."""
    wrong = [
        f"{name} is of another type"
        for name, types in TYPES.items()
        if not isinstance(values.get(name, types[0]()), types)
    ]
    if not wrong:
        counts = values.get("data", {})
        wrong += [f"data.{name} is not a mapping" for name, count in counts.items() if not isinstance(count, dict)]
        commit = (values.get("git") or {}).get("commit", "")
        wrong += [] if isinstance(commit, str) else ["git.commit is not a text"]
    return wrong


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit, whether the working tree is dirty, and the SHA-256 of `git diff HEAD`; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False
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
