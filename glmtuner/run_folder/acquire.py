"""Whether a run may use a folder: as a fresh one, to resume the run in it, or not at all."""

import errno
import os
import stat
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from glmtuner.console import plain, say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS, CONFIG, FAILED, LOCK, OVERRIDES, PARTIAL, PROVENANCE
from glmtuner.run_folder.redaction import flatten, redact_config
from glmtuner.run_folder.saved_config import parse_config, wrong_keys

# Keys that a run fills in from its model.
DERIVED_KEYS = ("finetuning.lora_target", "model.family", "model.template")
# Keys that may change when a run is resumed: no result depends on them.
RESUME_IGNORED_KEYS = (
    "trainer.overwrite_output_dir", "trainer.output_dir", "trainer.disable_tqdm", "trainer.log_level",
    "data.overwrite_cache", "data.preprocessing_num_workers", "data.tiktoken_engine", "model.cache_dir", "model.use_auth_token",
    "plugins", "benchmark.data_dir", "benchmark.include_path", "tracker.name", "tracker.project", "tracker.entity", "tracker.group", "tracker.job_type", "tracker.tags", "tracker.log_artifact", "tracker.tracking_uri", "tracker.workspace",
    "budget.gpu_hours", "budget.cpu_hours", "budget.money", "budget.price_per_gpu_hour", "budget.price_per_cpu_hour",
    "budget.currency", "budget.watts", "budget.forecast", "parallel.lost_after",
)  # fmt: skip


def default_folder(root: Path, name: str) -> Path:
    """`<root>/<date>/<time>_<name>`, with a number appended if that folder exists."""
    now = datetime.now()
    folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}"
    number = 2
    while folder.exists():
        folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}_{number}"
        number += 1
    return folder


Differences = Callable[[DictConfig, DictConfig], list[str]]


def differences(saved: DictConfig, config: DictConfig) -> list[str]:
    """The keys for whose other values a run is not resumed."""
    return [key for key in differing_keys(saved, config) if key not in RESUME_IGNORED_KEYS]


def acquire_run_folder(path: Path, config: DictConfig, overwrite: bool, compare: Differences = differences) -> bool:
    """Lock the folder if it holds a run, and return whether that run is to be resumed; False if the folder is unused.

    False, too, for a run that is to be replaced, by `overwrite` or because it has no results: `RunFolder.prepare` removes it.
    Raises FolderBusy if another process has locked the folder, ConfigError if it cannot be written, and CheckpointError if
    it holds a finished run, a run of another configuration, or files that are not of a run.
    """
    require_usable(path)
    folder = RunFolder(path)
    if folder.is_unused:
        if path.exists():
            (folder / FAILED).unlink(missing_ok=True)
            folder.remove_partials()
        return False
    resumes = check_overwritable(folder, config, overwrite, compare)
    folder.lock()
    (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
    if resumes:
        for incomplete in folder.remove_partials():
            say(f"{incomplete.name} is skipped: incomplete")
    return resumes


def require_usable(path: Path, key: str = "trainer.output_dir") -> None:
    """Raise ConfigError where no folder can be created or written at the path, as far as can be known before writing."""
    if problem := _path_problem(path):
        shown = plain(str(path)).replace("\n", "\\n")
        raise ConfigError(f"{key}={shown}: {problem}; type another {key}")


LONGEST_ENTRY = Path(CHECKPOINTS) / f"{PARTIAL}-checkpoint-1000000000" / "special_tokens_map.json"


def _path_problem(path: Path) -> str | None:
    """Why no folder can be created or written there, in a few words."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "the name is not valid UTF-8, and the files of a run are"
    if "${" in str(path):
        return "a name with ${ is an interpolation in YAML"
    if any(ord(character) < 32 or ord(character) == 127 for character in str(path)):
        return "the name holds a control character, such as a line break"
    try:
        (path / LONGEST_ENTRY).stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return os.strerror(error.errno).lower()
    for place in (path, *path.absolute().parents):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                return f"{place} is a symbolic link to {os.readlink(place)}, which does not exist"
            continue
        except OSError as error:
            return f"{place}: {os.strerror(error.errno or 0).lower()}"
        if not is_folder:
            return f"{place} is not a folder"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"{place} cannot be written (read-only, or without the permission)"
        break
    return None


def check_overwritable(
    folder: RunFolder, config: DictConfig, overwrite: bool, compare: Differences = differences
) -> bool:
    """Whether the run in the folder is to be resumed; False if it is to be replaced.

    Raises CheckpointError if the folder holds something that this run may neither resume nor replace.
    """
    path = folder.path
    knob = f"trainer.output_dir={path}"
    advice = "type another trainer.output_dir, or trainer.overwrite_output_dir=true to start over"
    entries = ", ".join(sorted(entry.name for entry in path.iterdir())[:3])
    if overwrite and not (folder.is_run and _is_of_run(folder)):
        raise CheckpointError(
            f"{knob} is not a run folder (it contains {entries}), and trainer.overwrite_output_dir=true only replaces a run; "
            "type another trainer.output_dir"
        )
    if not folder.is_run:
        raise CheckpointError(
            f"{knob} is neither empty nor a run folder (it contains {entries}); type another trainer.output_dir"
        )
    if overwrite:
        return False
    if folder.is_finished:
        raise CheckpointError(f"{knob} holds a finished run; {advice}")
    try:
        saved = folder.config(complete=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}" if _is_of_run(folder) else f"{error}") from None
    different = compare(saved, config)
    if not different:
        return True
    listing = ", ".join(different[:6]) + (f" and {len(different) - 6} more" if len(different) > 6 else "")
    if folder.has_results:
        raise CheckpointError(
            f"{knob} holds an unfinished run of another configuration (different: {listing}); {advice}"
        )
    say(f"{knob}: the run in it had not trained a step and is replaced (different: {listing})")
    return False


def _is_of_run(folder: RunFolder) -> bool:
    """Whether config.yaml is of a run, however damaged, and not of another program."""
    if any((folder / name).exists() for name in (LOCK, PROVENANCE, OVERRIDES)):
        return True
    try:
        return not wrong_keys(parse_config(folder / CONFIG))
    except CheckpointError:
        return False


def differing_keys(one: DictConfig, other: DictConfig, defaults: Mapping[str, Any] | None = None) -> list[str]:
    """The dotted keys whose values differ, DERIVED_KEYS aside; two spellings of the same path are equal.

    A key that only one of them has, as configurations of two versions do, has the value in `defaults` in the other.
    """
    left, right, unset = _comparable(one), _comparable(other), defaults or {}
    keys = left.keys() | right.keys()
    return sorted(key for key in keys if left.get(key, unset.get(key)) != right.get(key, unset.get(key)))


def _comparable(config: DictConfig) -> dict[str, Any]:
    values = flatten(OmegaConf.to_container(redact_config(config)))
    for key in DERIVED_KEYS:
        values.pop(key, None)
    for key in ("model.model_name_or_path", "model.checkpoint_dir", "model.reward_model"):
        value = values.get(key)
        if isinstance(value, list):
            values[key] = [str(Path(path).expanduser().resolve()) for path in value]
        elif isinstance(value, str) and Path(value).expanduser().is_dir():
            values[key] = str(Path(value).expanduser().resolve())
    return values
