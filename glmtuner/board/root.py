"""The folder that a board shows, and the addresses of what is in it."""

import stat
from pathlib import Path

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import SWEEP

HIDDEN = "."  # a folder whose name begins with it is not shown, such as the trash
ITSELF = "."  # the id of the board's folder, which may be a run or a sweep


class Root:
    """The board's folder. What is in it has an id: its path from there, with slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def id_of(self, path: Path) -> str:
        """The id of a folder that `run`, `sweep` or a listing has returned."""
        return path.relative_to(self.path).as_posix()

    def run(self, name: str) -> RunFolder:
        """The run with this id; raises CheckpointError unless it is the folder of a run inside."""
        folder = RunFolder(self._inside(name))
        if not folder.is_run and not (folder / "failed.json").is_file():
            raise CheckpointError(f"{name[:200]!r} is no run in {self.path}")
        return folder

    def sweep(self, name: str) -> Path:
        """The folder of the sweep with this id; raises CheckpointError unless it is one inside."""
        path = self._inside(name)
        if not (path / SWEEP).is_file():
            raise CheckpointError(f"{name[:200]!r} is no sweep in {self.path}")
        return path

    def file(self, folder: Path, name: str) -> Path:
        """The regular file with this name in a folder that `run` or `sweep` has returned, with all links followed.

        Raises CheckpointError for any path that leads out of that folder or of the board's, and for pipes and devices, which would
        keep their reader waiting.
        """
        path = self._resolved(folder, name)
        if path is None or not path.is_relative_to(folder.resolve()) or not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{name[:200]!r} is no file in {folder}")
        return path

    def _inside(self, name: str) -> Path:
        """The folder with this id, with all links followed; raises CheckpointError for any path that leads outside."""
        path = self.path if name == ITSELF else self._resolved(self.path, name)
        if path is None or not path.is_dir():
            raise CheckpointError(f"{name[:200]!r} is no folder in {self.path}")
        return path

    def _resolved(self, folder: Path, name: str) -> Path | None:
        """The existing path that a name leads to; None if it is not plain, leads out of the board's folder, or cannot be looked up."""
        parts = name.split("/")
        if "\\" in name or any(not part or part.startswith(HIDDEN) for part in parts):
            return None
        try:
            path = (folder / name).resolve(strict=True)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ):  # missing, too long, no permission, a loop of links, a NUL, half a character
            return None
        shown = path.relative_to(self.path).parts if path.is_relative_to(self.path) else (HIDDEN,)
        return None if any(part.startswith(HIDDEN) for part in shown) else path
