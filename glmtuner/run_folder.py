"""The run folder: what is written where, when a run counts as finished, which checkpoints are whole.

No torch here: a folder can be read, shown and judged without loading a model.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from glmtuner.errors import CheckpointError, FolderBusy, GlmtunerError

CONFIG, WORDS, PROVENANCE, HISTORY, METRICS = (
    "config.yaml",
    "overrides.txt",
    "provenance.json",
    "history.jsonl",
    "metrics.json",
)
PREDICTIONS, REPORT, LOSS_PICTURE, TEMPLATE = "predictions.jsonl", "report.md", "loss.png", "template.jinja"
REPORT_PAGE, SWEEP = "report.html", "sweep.json"  # sweep.json is in a sweep's folder: what was typed
CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL = "checkpoints", "evaluations", "adapter", "model"
FAILED, OUTPUT = "failed.json", "output.log"  # why the last attempt ended; what a job of a sweep printed
LOSSES = "losses.jsonl"  # of each evaluation record: `index`, `loss` (nats, summed over the answer), `tokens`; or what a stage measures
LOCK = ".lock"  # held by the process that runs the run
TRACKERS = ("wandb", "tensorboard")
OURS = (
    CONFIG, WORDS, PROVENANCE, HISTORY, METRICS, PREDICTIONS, REPORT, REPORT_PAGE, LOSS_PICTURE, TEMPLATE,
    CHECKPOINTS, EVALUATIONS, ADAPTER, MODEL, FAILED, OUTPUT, LOSSES, *TRACKERS,
)  # fmt: skip
MARKER = "complete.json"  # written last into a checkpoint: its files and their sizes
SECRETS = ("token", "api_key", "password", "secret")
IN_DICTIONARY = re.compile(  # {token: …} as a value
    rf"""((?<![^\W_])(?:{"|".join(SECRETS)})['"]?\s*:\s*)(?:'[^']*'|"[^"]*"|[^,{{}}]+)"""
)
HIDDEN = "<hidden>"  # stands for the value of one of them
# Keys that a run fills in itself, from the model.
FILLED_IN = ("finetuning.lora_target", "model.family", "model.template")
# Keys that may differ between a run and its continuation: they change no number.
FREE_TO_CHANGE = (
    "trainer.overwrite_output_dir", "trainer.output_dir", "trainer.disable_tqdm", "trainer.log_level",
    "data.overwrite_cache", "data.preprocessing_num_workers", "model.cache_dir", "model.use_auth_token",
    "tracker.name", "tracker.project", "tracker.entity", "tracker.group", "tracker.job_type", "tracker.tags", "tracker.log_artifact",
)  # fmt: skip


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

    def record_failure(self, error: BaseException, words: list[str], first_wins: bool = False) -> dict[str, Any]:
        """Write failed.json, and return it; a traceback goes in for what is no mistake of the user's.

        With `first_wins` a failure that is there already stays: of several ranks, the later ones fail for the first.
        """
        found = {
            "kind": "infeasible" if out_of_memory(error) else "error",
            "reason": " ".join(f"{error}".split())[:2000] or type(error).__name__,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "words": shown_words(words),
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


def default_folder(root: Path, name: str) -> Path:
    """`<root>/<date>/<time>_<name>`, numbered when two runs start in the same second."""
    now = datetime.now()
    folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}"
    number = 2
    while folder.exists():
        folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}_{number}"
        number += 1
    return folder


def claim(path: Path, config: DictConfig, overwrite: bool) -> bool:
    """Whether the run in this folder is to be resumed; False for a fresh folder.

    Where the folder exists it is locked. Raises CheckpointError when another process has it, and when it holds a finished
    run, another run, or files that are no run's.
    """
    folder = RunFolder(path)
    if not path.exists() or not any(entry.name not in (FAILED, OUTPUT, LOCK) for entry in path.iterdir()):
        (folder / FAILED).unlink(missing_ok=True)
        return False
    refuse_foreign(folder, config, overwrite)
    folder.lock()
    if overwrite:
        folder.clear()
    (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
    return not overwrite


def refuse_foreign(folder: RunFolder, config: DictConfig, overwrite: bool) -> None:
    """Raise CheckpointError where the folder holds what this run may neither go on with nor replace."""
    path = folder.path
    name = f"trainer.output_dir={path}"
    again = "type another trainer.output_dir, or trainer.overwrite_output_dir=true to start it afresh"
    if overwrite:
        if not folder.is_run:
            raise CheckpointError(
                f"{name} holds files that are no run's ({', '.join(sorted(entry.name for entry in path.iterdir())[:3])}), and "
                "trainer.overwrite_output_dir=true only replaces a run; type another trainer.output_dir"
            )
        return
    if not folder.is_run:
        raise CheckpointError(
            f"{name} is not empty and holds no run ({', '.join(sorted(entry.name for entry in path.iterdir())[:3])}); "
            "type another trainer.output_dir"
        )
    if folder.is_finished:
        raise CheckpointError(f"{name} holds a finished run; {again}")
    different = [key for key in differing(folder.config(), config) if key not in FREE_TO_CHANGE]
    if different:
        told = ", ".join(different[:6]) + (f" and {len(different) - 6} more" if len(different) > 6 else "")
        raise CheckpointError(f"{name} holds an unfinished run of another configuration (different: {told}); {again}")


def differing(one: DictConfig, other: DictConfig) -> list[str]:
    """The dotted keys whose values differ; what a run fills in itself and how a path is written do not count."""
    left, right = (_comparable(config) for config in (one, other))
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def _comparable(config: DictConfig) -> dict[str, Any]:
    values = flat(OmegaConf.to_container(without_secrets(config)))
    for key in FILLED_IN:
        values.pop(key, None)
    for key in ("model.model_name_or_path", "model.checkpoint_dir", "model.reward_model"):
        value = values.get(key)
        if isinstance(value, list):
            values[key] = [str(Path(path).expanduser().resolve()) for path in value]
        elif isinstance(value, str) and Path(value).expanduser().is_dir():
            values[key] = str(Path(value).expanduser().resolve())
    return values


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def without_secrets(config: DictConfig) -> DictConfig:
    """A copy in which tokens and keys are null."""
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    assert isinstance(copy, DictConfig)
    for key, value in flat(OmegaConf.to_container(copy)).items():
        leaf = key.rpartition(".")[2]
        if isinstance(value, str) and any(leaf == word or leaf.endswith(f"_{word}") for word in SECRETS):
            OmegaConf.update(copy, key, None)
    return copy


def shown_words(words: list[str]) -> list[str]:
    """What was typed, with the values of tokens and keys left out."""
    shown = []
    for word in words:
        key, equals, _ = word.partition("=")
        leaf = key.rpartition(".")[2]
        secret = equals and any(leaf == name or leaf.endswith(f"_{name}") for name in SECRETS)
        shown.append(f"{key}={HIDDEN}" if secret else IN_DICTIONARY.sub(rf"\1{HIDDEN}", word))
    return shown


def provenance(words: list[str], **more: Any) -> dict[str, Any]:
    """Where a run came from: code, packages, machine, command line, and what the caller knows of data and template."""
    return {
        "command": " ".join(["python -m glmtuner", *shown_words(words)]),
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

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary name, to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The file's value; raises CheckpointError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The file's object; raises CheckpointError when it is damaged, or holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged (it holds no keys)")
    return found


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line that a kill cut short is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def mark_complete(folder: Path, about: dict[str, Any]) -> None:
    """Write the marker: every file of the checkpoint with its size, all of them on the disk before it."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / MARKER, {**about, "files": files})


NEEDED = {
    "optimizer.pt": "its optimizer state",
    "scheduler.pt": "its scheduler state",
    "trainer_state.json": "its step",
}


def flaw(folder: Path, ranks: int | None = None) -> str | None:
    """Why a checkpoint cannot be resumed from (by so many ranks), in a few words; None when it is whole."""
    if not (folder / MARKER).is_file():
        return f"half-written: it has no {MARKER}"
    try:
        about = read_json(folder / MARKER)
        sizes = about["files"]
    except (CheckpointError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    for name, what in NEEDED.items():
        if not (folder / name).is_file():
            return f"it lacks {what} ({name})"
    if not list(folder.glob("rng_state*.pth")):
        return "it lacks its random states (rng_state.pth)"
    if ranks not in (None, about.get("ranks", 1)):
        return f"{about.get('ranks', 1)} processes wrote it, and this run has {ranks}"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} is truncated ({(folder / name).stat().st_size} of {size} bytes)"
    return None


def step_of(folder: Path) -> int:
    """The step in `checkpoint-<step>`; -1 for any other name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdecimal() else -1


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest step first, whole or not."""
    found = [path for path in (run / CHECKPOINTS).glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def newest_whole(run: Path, ranks: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint to resume from, and a sentence for each one that was passed over."""
    passed = [f"{path.name} is passed over: half-written" for path in sorted((run / CHECKPOINTS).glob(".partial-*"))]
    for folder in reversed(checkpoints(run)):
        reason = flaw(folder, ranks)
        if reason is None:
            return folder, passed
        passed.append(f"{folder.name} is passed over: {reason}")
    return None, passed
