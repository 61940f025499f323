"""The provenance of a run: command line, folder, start time, versions of all packages, its own code, git commit."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from glmtuner.run_folder.redaction import redact_overrides, redact_value


def provenance(overrides: list[str], **more: Any) -> dict[str, Any]:
    """The content of provenance.json: command line, start time, versions, code, git state, and `more` from the caller."""
    return {
        "command": " ".join(["python -m glmtuner", *redact_overrides(overrides)]),
        "cwd": os.getcwd(),  # that relative paths are relative to
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **environment(),
        "glmtuner_commit": installed_commit(),
        **more,
        **{name: redact_value(more[name], assignments=False) for name in ("data", "plugins") if name in more},
    }


def environment() -> dict[str, Any]:
    """What runs here, and would run again: Python, packages, glmtuner's own code, and the git state of the current folder."""
    return {
        "python": sys.version.split()[0],
        "packages": installed_packages(),
        "code": code_hashes(),
        "git": git_state(Path.cwd()),
    }


# named first, and with null where they are not installed
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
    "bitsandbytes",
)


TYPES: dict[str, tuple[type, ...]] = {
    "command": (str,), "started": (str,), "packages": (dict,), "git": (dict, type(None)), "base": (dict,), "data": (dict,),
    "resumed": (list,), "template": (dict, str), "thinking": (str, type(None)), "cwd": (str,), "flags": (list,), "code": (dict,),
    "weights": (dict,), "tokenizer": (str,), "machine": (dict,), "earlier": (list,), "python": (str,),
    "glmtuner_commit": (str, type(None)), "hardware": (list,),
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
        entries = [(f"weights.{name}", files) for name, files in values.get("weights", {}).items()]
        entries += [(f"earlier[{index}]", entry) for index, entry in enumerate(values.get("earlier", []))]
        wrong += [f"{name} is not a mapping" for name, entry in entries if not isinstance(entry, dict)]
        entries = [(f"hardware[{index}]", entry) for index, entry in enumerate(values.get("hardware", []))]
        wrong += [f"{name} is not a mapping" for name, entry in entries if not isinstance(entry, dict)]
    return wrong


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_packages() -> dict[str, str | None]:
    """The version of every installed distribution by its name: PACKAGES first, then the others in alphabetical order.

    Read once a process and search path, which takes a tenth of a second; a package that is installed meanwhile is not what runs.
    """
    return dict(_installed_packages(tuple(sys.path)))


@cache
def _installed_packages(search_path: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for distribution in metadata.distributions():  # of two of one name, Python imports the first
        name = distribution.metadata["Name"]
        if name and name not in PACKAGES:
            found.setdefault(name, distribution.version)
    return {name: version_of(name) for name in PACKAGES} | dict(sorted(found.items(), key=lambda item: item[0].lower()))


def code_hashes() -> dict[str, str]:
    """The SHA-256 of glmtuner's own modules, shortened to 16 hex digits, by the room of the package that they are in."""
    package = Path(__file__).parent.parent
    rooms: dict[str, Any] = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        room = rooms.setdefault(place.with_suffix("").parts[0], hashlib.sha256())
        room.update(f"{place.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return {name: room.hexdigest()[:16] for name, room in sorted(rooms.items())}


def installed_commit() -> str | None:
    """The commit of glmtuner's own code, `-dirty` behind it if the checkout has changes; None if it is not known.

    It is that of the checkout which the package is imported from, else the one that pip installed (PEP 610, direct_url.json).
    """
    package = Path(__file__).parent.parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package, "rev-parse", "HEAD")
        changes = _git(package, "status", "--porcelain", ".")
        return None if commit is None else commit.strip() + ("-dirty" if changes else "")
    try:
        origin = json.loads(metadata.distribution("glmtuner").read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints in the folder; None if it fails, or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit, whether the working tree is dirty, and the SHA-256 of `git diff HEAD`; None outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _git(folder, "diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool((_git(folder, "status", "--porcelain") or "").strip()),
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }
