"""Whether a run may use a folder: as a fresh one, to resume the run in it, or not at all."""

from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, LOCK, OUTPUT
from glmtuner.run_folder.redaction import flatten, redact_config

# Keys that a run fills in from its model.
DERIVED_KEYS = ("finetuning.lora_target", "model.family", "model.template")
# Keys that may change when a run is resumed: no result depends on them.
RESUME_IGNORED_KEYS = (
    "trainer.overwrite_output_dir", "trainer.output_dir", "trainer.disable_tqdm", "trainer.log_level",
    "data.overwrite_cache", "data.preprocessing_num_workers", "data.tiktoken_engine", "model.cache_dir", "model.use_auth_token",
    "plugins", "tracker.name", "tracker.project", "tracker.entity", "tracker.group", "tracker.job_type", "tracker.tags", "tracker.log_artifact",
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


def acquire_run_folder(path: Path, config: DictConfig, overwrite: bool) -> bool:
    """Lock the folder if it exists, and return whether the run in it is to be resumed; False for a fresh folder.

    With `overwrite` the run in it is removed. Raises FolderBusy if another process has locked the folder, and
    CheckpointError if it holds a finished run, a run of another configuration, or files that are not of a run.
    """
    folder = RunFolder(path)
    if not path.exists() or not any(entry.name not in (FAILED, OUTPUT, LOCK) for entry in path.iterdir()):
        (folder / FAILED).unlink(missing_ok=True)
        return False
    check_overwritable(folder, config, overwrite)
    folder.lock()
    if overwrite:
        folder.clear()
    (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
    return not overwrite


def check_overwritable(folder: RunFolder, config: DictConfig, overwrite: bool) -> None:
    """Raise CheckpointError if the folder holds something that this run may neither resume nor replace."""
    path = folder.path
    knob = f"trainer.output_dir={path}"
    advice = "type another trainer.output_dir, or trainer.overwrite_output_dir=true to start over"
    entries = ", ".join(sorted(entry.name for entry in path.iterdir())[:3])
    if not folder.is_run and overwrite:
        raise CheckpointError(
            f"{knob} is not a run folder (it contains {entries}), and trainer.overwrite_output_dir=true only replaces a run; "
            "type another trainer.output_dir"
        )
    if not folder.is_run:
        raise CheckpointError(
            f"{knob} is neither empty nor a run folder (it contains {entries}); type another trainer.output_dir"
        )
    if overwrite:
        return
    if folder.is_finished:
        raise CheckpointError(f"{knob} holds a finished run; {advice}")
    different = [key for key in differing_keys(folder.config(), config) if key not in RESUME_IGNORED_KEYS]
    if different:
        listing = ", ".join(different[:6]) + (f" and {len(different) - 6} more" if len(different) > 6 else "")
        raise CheckpointError(
            f"{knob} holds an unfinished run of another configuration (different: {listing}); {advice}"
        )


def differing_keys(one: DictConfig, other: DictConfig) -> list[str]:
    """The dotted keys whose values differ, DERIVED_KEYS aside; two spellings of the same path are equal."""
    left, right = _comparable(one), _comparable(other)
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


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
