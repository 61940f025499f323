"""Where what a board starts may write: inside of its folder, and nowhere else."""

import os
from datetime import datetime
from pathlib import Path

from glmtuner.board.root import HIDDEN
from glmtuner.errors import ConfigError

OUTPUTS = "outputs"  # that a run's and a sweep's own folder is below, in the current folder


def working_folder(root: Path) -> Path:
    """The folder in which commands are run: the one whose outputs/ the board shows, or a part of it; else the current one."""
    for folder in (root, *root.parents):
        if folder.name == OUTPUTS:
            return folder.parent
    return Path.cwd()


def inside(root: Path, path: Path, word: str) -> Path:
    """The path with all links followed; raises ConfigError, about `word`, unless it is below `root` and not hidden there."""
    try:
        found = path.expanduser().resolve()
        parts = found.relative_to(root).parts
    except (ValueError, OSError, RuntimeError):
        raise ConfigError(
            f"{word}: the board writes into {root} alone; type a folder in it, or type the command in a terminal"
        ) from None
    if not parts or "${" in str(path) or any(part.startswith(HIDDEN) for part in parts):
        raise ConfigError(
            f"{word}: legal is a folder in {root}, not that folder itself, and without names that begin with a dot or hold ${{"
        )
    return found


def run_base(root: Path, cwd: Path) -> Path:
    """The folder that runs without a folder of their own get theirs in: outputs/ if the board shows it, else the board's folder."""
    outputs = (cwd / OUTPUTS).resolve()
    return outputs if outputs == root or outputs.is_relative_to(root) else root


def sweep_base(root: Path, cwd: Path) -> Path:
    """The same for sweeps."""
    return run_base(root, cwd) / "sweeps"


def reserve(base: Path, name: str) -> Path:
    """A new folder `<base>/<date>/<time>_<name>`, which no other request gets; a number is appended if it exists."""
    now = datetime.now()
    day, stem = base / f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}_{name}"
    day.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = day / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{day / stem}: a thousand runs of this name began in this second; type the same again")


def shown(path: Path, cwd: Path) -> str:
    """The path as it is typed in the folder `cwd`."""
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else os.fspath(path)
