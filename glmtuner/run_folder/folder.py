"""The run folder: what is in it, and when a run counts as finished, failed or running.

No torch here: a folder can be read, shown and judged without loading a model.
"""

import fcntl
import os
import shutil
import traceback
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from glmtuner.errors import CheckpointError, FolderBusy, GlmtunerError
from glmtuner.run_folder.files import read_json, read_lines, read_object, write_json
from glmtuner.run_folder.names import ADAPTER, CONFIG, FAILED, HISTORY, LOCK, METRICS, MODEL, OURS, PROVENANCE
from glmtuner.run_folder.redaction import redact_overrides


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        return (self / CONFIG).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end: metrics.json is written last."""
        return self.is_run and (self / METRICS).is_file()

    def config(self) -> DictConfig:
        """The resolved config; raises CheckpointError when the folder holds no run."""
        if not self.is_run:
            raise CheckpointError(f"{self.path} holds no run: it has no {CONFIG}; name a folder under outputs/")
        try:
            loaded = OmegaConf.load(self / CONFIG)
        except (YAMLError, ValueError) as error:
            raise CheckpointError(f"{self / CONFIG} is damaged ({' '.join(str(error).split())})") from None
        if not isinstance(loaded, DictConfig):
            raise CheckpointError(f"{self / CONFIG} is damaged (it holds no keys)")
        return loaded

    def metrics(self) -> dict[str, float]:
        return read_object(self / METRICS) if (self / METRICS).is_file() else {}

    def provenance(self) -> dict[str, Any]:
        return read_object(self / PROVENANCE) if (self / PROVENANCE).is_file() else {}

    def history(self) -> list[dict[str, float]]:
        return list(read_lines(self / HISTORY))

    def failure(self) -> dict[str, Any] | None:
        """Why the last attempt ended early: its `kind` (error, or infeasible: out of memory), `reason`, `time`; or None."""
        return read_object(self / FAILED) if (self / FAILED).is_file() else None

    def lock(self) -> None:
        """Make the folder, and hold it until `unlock` or the end of this process, however it ends.

        Raises FolderBusy when another process runs the run in it. On a disk that knows no locks nothing is held.
        """
        if self.path in _LOCKS:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FolderBusy(
                f"trainer.output_dir={self.path}: another process runs the run in it right now; wait for its end, or type "
                "another trainer.output_dir"
            ) from None
        except OSError:
            file.close()
            return
        _LOCKS[self.path] = file

    def unlock(self) -> None:
        if file := _LOCKS.pop(self.path, None):
            file.close()

    @property
    def is_running(self) -> bool:
        """Whether a process, this one or another, holds the folder."""
        if not (self / LOCK).is_file():
            return False
        with (self / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return False
        return False

    def record_failure(self, error: BaseException, overrides: list[str], first_wins: bool = False) -> dict[str, Any]:
        """Write failed.json, and return it; a traceback goes in for what is no mistake of the user's.

        With `first_wins` a failure that is there already stays: of several ranks, the later ones fail for the first.
        """
        found = {
            "kind": "infeasible" if out_of_memory(error) else "error",
            "reason": " ".join(f"{error}".split())[:2000] or type(error).__name__,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "words": redact_overrides(overrides),
        }
        if not isinstance(error, GlmtunerError):
            found["reason"] = f"{type(error).__name__}: {found['reason']}"
            found["traceback"] = "".join(traceback.format_exception(error))
        if not first_wins:
            write_json(self / FAILED, found)
            return found
        mine = self / f".{FAILED}.{os.getpid()}"
        write_json(mine, found)
        try:
            os.link(mine, self / FAILED)
        except FileExistsError:
            found = read_json(self / FAILED)
        except OSError:  # a disk without hard links
            mine.replace(self / FAILED)
        mine.unlink(missing_ok=True)
        return found

    def trained(self) -> Path | None:
        """Where the trained weights are, when there are any: adapter/ or model/."""
        for name, file in ((ADAPTER, "adapter_config.json"), (MODEL, "config.json")):
            if (self / name / file).is_file():
                return self / name
        return None

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for name in OURS:
            path = self / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


_LOCKS: dict[Path, IO[str]] = {}  # what this process holds


def job_folders(sweep: Path) -> list[RunFolder]:
    """The folders of a sweep's jobs, in the order of their names: those of runs that started, or failed to."""
    if not sweep.is_dir():
        return []
    found = [RunFolder(path) for path in sorted(sweep.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [folder for folder in found if folder.is_run or (folder / FAILED).is_file()]


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine had no memory left; torch is not imported for it."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in text for sign in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    )
