"""The run folder: its contents, and whether its run is finished, failed or running.

torch is not imported: the state of a run can be read and shown without loading a model.
"""

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
from glmtuner.run_folder.files import read_lines, read_object, write_json
from glmtuner.run_folder.locks import LocksUnsupported, is_locked, try_lock
from glmtuner.run_folder.names import ADAPTER, CONFIG, FAILED, HISTORY, LOCK, METRICS, MODEL, PROVENANCE, RUN_ENTRIES
from glmtuner.run_folder.redaction import redact_overrides


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, in any state."""
        return (self / CONFIG).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished: metrics.json is written last."""
        return self.is_run and (self / METRICS).is_file()

    def config(self) -> DictConfig:
        """The resolved config; raises CheckpointError if the folder holds no run or the file is damaged."""
        if not self.is_run:
            raise CheckpointError(f"{self.path} holds no run: it has no {CONFIG}; name a folder under outputs/")
        try:
            loaded = OmegaConf.load(self / CONFIG)
        except (YAMLError, ValueError) as error:
            raise CheckpointError(f"{self / CONFIG} is damaged ({' '.join(str(error).split())})") from None
        if not isinstance(loaded, DictConfig):
            raise CheckpointError(f"{self / CONFIG} is damaged (it is not a mapping)")
        return loaded

    def metrics(self) -> dict[str, float]:
        """metrics.json; empty until the run is finished."""
        return read_object(self / METRICS) if (self / METRICS).is_file() else {}

    def provenance(self) -> dict[str, Any]:
        """provenance.json; empty if the run has not written it."""
        return read_object(self / PROVENANCE) if (self / PROVENANCE).is_file() else {}

    def history(self) -> list[dict[str, float]]:
        """The logged lines, with `step`, in the order in which they were logged."""
        return list(read_lines(self / HISTORY))

    def failure(self) -> dict[str, Any] | None:
        """failed.json of the last attempt: its `kind` (error, or infeasible: out of memory), `reason`, `time`; or None."""
        return read_object(self / FAILED) if (self / FAILED).is_file() else None

    def lock(self) -> None:
        """Create the folder and lock it until `unlock` or the end of this process, however it ends.

        Raises FolderBusy if another process has locked it. A disk that does not support locks leaves it unlocked.
        """
        if self.path in _HELD_LOCKS:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = try_lock(self / LOCK)
        except LocksUnsupported:
            return
        if lock is None:
            raise FolderBusy(
                f"trainer.output_dir={self.path}: another process is running in it; wait until it ends, or type another "
                "trainer.output_dir"
            )
        _HELD_LOCKS[self.path] = lock

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        if lock := _HELD_LOCKS.pop(self.path, None):
            lock.close()

    @property
    def is_running(self) -> bool:
        """Whether a process, this one or another, has locked the folder."""
        return is_locked(self / LOCK)

    def record_failure(self, error: BaseException, overrides: list[str], first_wins: bool = False) -> dict[str, Any]:
        """Write failed.json and return its content, with a traceback unless the user caused the error.

        With `first_wins` an existing failed.json is kept and returned: when one rank fails, the others fail because of it.
        """
        failure = {
            "kind": "infeasible" if is_out_of_memory(error) else "error",
            "reason": " ".join(f"{error}".split())[:2000] or type(error).__name__,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "words": redact_overrides(overrides),
        }
        if not isinstance(error, GlmtunerError):
            failure["reason"] = f"{type(error).__name__}: {failure['reason']}"
            failure["traceback"] = "".join(traceback.format_exception(error))
        if not first_wins:
            write_json(self / FAILED, failure)
            return failure
        own = self / f".{FAILED}.{os.getpid()}"
        write_json(own, failure)
        try:
            os.link(own, self / FAILED)  # atomic, and fails if the file exists
        except FileExistsError:
            failure = read_object(self / FAILED)
        except OSError:  # a disk without hard links
            own.replace(self / FAILED)
        own.unlink(missing_ok=True)
        return failure

    def trained(self) -> Path | None:
        """The folder of the trained weights, adapter/ or model/; None if there are none."""
        for name, file in ((ADAPTER, "adapter_config.json"), (MODEL, "config.json")):
            if (self / name / file).is_file():
                return self / name
        return None

    def clear(self) -> None:
        """Remove everything that a run writes, and nothing else."""
        for name in RUN_ENTRIES:
            path = self / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


_HELD_LOCKS: dict[Path, IO[bytes]] = {}  # locked by this process


def job_folders(sweep: Path) -> list[RunFolder]:
    """The folders of a sweep's jobs by name: those whose run has started, or failed before it started."""
    if not sweep.is_dir():
        return []
    folders = [RunFolder(path) for path in sorted(sweep.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [folder for folder in folders if folder.is_run or (folder / FAILED).is_file()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the host ran out of memory; torch is not imported for the check."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in text for sign in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    )
