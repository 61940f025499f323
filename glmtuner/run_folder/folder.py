"""The run folder: its contents, and whether its run is finished, failed or running.

torch is not imported: the state of a run can be read and shown without loading a model.
"""

import errno
import math
import os
import shutil
import time
import traceback
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError, Diverged, FolderBusy, GlmtunerError
from glmtuner.run_folder.checkpoints import checkpoints
from glmtuner.run_folder.files import is_number, read_lines, read_object, write_json
from glmtuner.run_folder.locks import LocksUnsupported, is_locked, try_lock
from glmtuner.run_folder.names import (
    ADAPTER,
    BENCHMARKS,
    CHECKPOINTS,
    CONFIG,
    FAILED,
    HISTORY,
    KEPT,
    LOCK,
    METRICS,
    MODEL,
    OUTPUT,
    PARTIAL,
    PREDICTIONS,
    PROVENANCE,
    RUN_ENTRIES,
    SPENT,
    TIMINGS,
)
from glmtuner.run_folder.provenance import wrong_values
from glmtuner.run_folder.redaction import redact_overrides, redact_text, secrets_in
from glmtuner.run_folder.saved_config import read_config


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

    def config(self, complete: bool = False) -> DictConfig:
        """The resolved config; raises CheckpointError if the folder holds no run or the file is damaged.

        With `complete` it has every group that runs write.
        """
        if not self.is_run:
            raise CheckpointError(f"{self.path} holds no run: it has no {CONFIG}; name a folder under outputs/")
        return read_config(self / CONFIG, complete)

    def metrics(self) -> dict[str, float]:
        """metrics.json; empty until the run is finished. Raises CheckpointError if a value is not a number."""
        if not os.path.lexists(self / METRICS):
            return {}
        values = read_object(self / METRICS)
        wrong = [name for name, value in values.items() if not is_number(value) and value is not None]
        if wrong:
            raise CheckpointError(f"{self / METRICS} is damaged ({wrong[0]} is not a number)")
        return {name: math.nan if value is None else value for name, value in values.items()}  # JSON has no NaN

    def provenance(self) -> dict[str, Any]:
        """provenance.json; empty if the run has not written it. Raises CheckpointError if it is damaged."""
        if not os.path.lexists(self / PROVENANCE):
            return {}
        values = read_object(self / PROVENANCE)
        if wrong := wrong_values(values):
            raise CheckpointError(f"{self / PROVENANCE} is damaged ({', '.join(wrong)})")
        return values

    def history(self) -> list[dict[str, float]]:
        """The logged lines, with `step`, in the order in which they were logged; damaged ones are named and left out."""
        lines = list(read_lines(self / HISTORY))
        whole = [line for line in lines if is_number(line.get("step")) and all(map(_is_logged, line.values()))]
        if len(whole) < len(lines):
            say(f"{self / HISTORY}: {len(lines) - len(whole)} lines are not of numbers with a step, and are left out")
        return whole

    def failure(self) -> dict[str, Any] | None:
        """failed.json of the last attempt: its `kind` (error, diverged, or infeasible: out of memory), `reason`, `time`; or None."""
        if not (self / FAILED).is_file():
            return None
        values = read_object(self / FAILED)
        if not isinstance(values.get("kind"), str) or not isinstance(values.get("reason"), str):
            raise CheckpointError(f"{self / FAILED} is damaged (it has no kind and reason); remove the file")
        return values

    def lock(self) -> None:
        """Create the folder and lock it until `unlock` or the end of this process, however it ends.

        Raises FolderBusy if another process has locked it. A disk that does not support locks leaves it unlocked.
        """
        if self.path in _HELD_LOCKS:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = try_lock(self / LOCK)
            for _ in range(LOCK_ATTEMPTS):
                if lock is not None:
                    break
                time.sleep(LOCK_SECONDS)
                lock = try_lock(self / LOCK)
        except LocksUnsupported:
            _HELD_LOCKS[self.path] = None
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = os.strerror(error.errno or 0).lower()
            raise ConfigError(
                f"trainer.output_dir={self.path}: the folder cannot be written ({reason}); type another trainer.output_dir"
            ) from None
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

    def prepare(self, *, resumes: bool, trains: bool) -> None:
        """Lock the folder for a run that now begins to write; unless the run `resumes`, what an earlier run left is removed.

        So a run that fails before, in its data or its model, costs nothing that was there. Raises FolderBusy if another
        process has used the folder since `acquire_run_folder` found it unused.
        """
        was_locked = self.path in _HELD_LOCKS
        self.lock()
        if not resumes and self.is_run:
            if not was_locked:
                raise FolderBusy(
                    f"trainer.output_dir={self.path}: another process has started a run in it meanwhile; type the same command "
                    "again once that has ended, or type another trainer.output_dir"
                )
            self.clear()
        if not trains:
            for name in (HISTORY, TIMINGS):
                (self / name).unlink(missing_ok=True)  # of an interrupted evaluation, which starts again

    @property
    def is_running(self) -> bool:
        """Whether a process, this one or another, has locked the folder."""
        return is_locked(self / LOCK)

    def record_failure(self, error: BaseException, overrides: list[str], first_wins: bool = False) -> dict[str, Any]:
        """Write failed.json and return its content, with a traceback unless the user caused the error.

        With `first_wins` an existing failed.json is kept and returned: when one rank fails, the others fail because of it.
        """
        secrets = secrets_in(overrides)
        failure = {
            "kind": kind_of(error),
            "reason": redact_text(" ".join(f"{error}".split()), secrets)[:2000] or type(error).__name__,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "words": redact_overrides(overrides),
        }
        if not isinstance(error, GlmtunerError):
            failure["reason"] = f"{type(error).__name__}: {failure['reason']}"
            text = "".join(traceback.format_exception(error))
            failure["traceback"] = redact_text(text, secrets, assignments=False)  # code assigns variables called token
        try:
            return self._write_failure(failure, first_wins)
        except OSError as problem:  # a full or a read-only disk, of which `error` tells
            say(f"{self / FAILED} could not be written ({problem.strerror})")
            return failure

    def _write_failure(self, failure: dict[str, Any], first_wins: bool) -> dict[str, Any]:
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

    @property
    def has_results(self) -> bool:
        """Whether starting over would lose anything: a trained step, a checkpoint, trained weights, answers, a benchmark's scores or final metrics."""
        if (self / METRICS).exists() or self.trained() is not None or (self / KEPT).exists() or checkpoints(self.path):
            return True
        if (self / PREDICTIONS).is_file() and (self / PREDICTIONS).stat().st_size:
            return True
        if (self / BENCHMARKS).exists():
            return True
        if not (self / HISTORY).exists() or not (self / HISTORY).stat().st_size:
            return False
        steps = [line.get("step") for line in self.history()]
        return not steps or any(step != 0 for step in steps)  # step 0 is an evaluation before training

    @property
    def is_unused(self) -> bool:
        """Whether no run has started in the folder: it is missing, or empty except for what an attempt leaves behind."""
        return not self.path.exists() or all(_is_trace(entry.name) for entry in self.path.iterdir())

    def clear(self) -> None:
        """Remove everything that a run writes, except for the output of a sweep job, and nothing else.

        metrics.json is removed first and config.yaml last, so that a process killed meanwhile leaves an unfinished run, which
        the same command removes again.
        """
        self.remove_partials()
        names = [METRICS, *(name for name in RUN_ENTRIES if name not in (METRICS, CONFIG, OUTPUT)), CONFIG]
        for name in names:
            _remove(self / name)

    def remove_partials(self) -> list[Path]:
        """Remove what a killed process had not finished writing; returns the incomplete checkpoints among it."""
        for path in self.path.glob(".*"):
            name = path.name.removeprefix(".")
            if (name.removesuffix(PARTIAL) in RUN_ENTRIES and name.endswith(PARTIAL)) or _is_failure_of_rank(path.name):
                _remove(path)
        incomplete = sorted((self / CHECKPOINTS).glob(f"{PARTIAL}-*"))
        for path in incomplete:
            _remove(path)
        return incomplete


def _is_logged(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str))


def _is_trace(name: str) -> bool:
    """Whether an entry of this name is left by an attempt that ended before its run had started."""
    return name in (FAILED, OUTPUT, LOCK, SPENT, f".{CONFIG}{PARTIAL}", f".{FAILED}{PARTIAL}") or _is_failure_of_rank(
        name
    )


def _is_failure_of_rank(name: str) -> bool:
    """Whether it is the name under which a rank writes failed.json before it is linked."""
    stem, _, number = name.removesuffix(PARTIAL).lstrip(".").rpartition(".")
    return stem == FAILED and number.isdecimal()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


LOCK_ATTEMPTS, LOCK_SECONDS = 5, 0.02  # whoever looks whether a folder is locked holds its lock for an instant
_HELD_LOCKS: dict[Path, IO[bytes] | None] = {}  # locked by this process; None on a disk that does not support locks


def job_folders(sweep: Path) -> list[RunFolder]:
    """The folders of a sweep's jobs by name: those whose run has started, or failed before it started."""
    if not sweep.is_dir():
        return []
    folders = [RunFolder(path) for path in sorted(sweep.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [folder for folder in folders if folder.is_run or (folder / FAILED).is_file()]


def kind_of(error: BaseException) -> str:
    """`infeasible` for a lack of memory, `diverged` for numbers that are not finite, else `error`."""
    return "infeasible" if is_out_of_memory(error) else "diverged" if isinstance(error, Diverged) else "error"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the host ran out of memory; torch is not imported for the check."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in text for sign in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
    )
