"""The folder that a board shows, and the addresses of what is in it."""

from pathlib import Path

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import SWEEP

HIDDEN = "."  # a folder whose name begins with it is not shown, such as the trash


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

    def _inside(self, name: str) -> Path:
        """The folder with this id, with all links followed; raises CheckpointError for any path that leads outside."""
        parts = name.split("/")
        is_plain = all(part and not part.startswith(HIDDEN) for part in parts) and "\0" not in name and "\\" not in name
        path = (self.path / name).resolve() if is_plain else self.path
        if not is_plain or not path.is_relative_to(self.path) or not path.is_dir():
            raise CheckpointError(f"{name[:200]!r} is no folder in {self.path}")
        return path
