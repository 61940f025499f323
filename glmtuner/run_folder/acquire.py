"""Whether a run may use a folder: fresh, to be resumed, or refused."""

from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import FAILED, LOCK, OUTPUT
from glmtuner.run_folder.redaction import flatten, redact_config

# Keys that a run fills in itself, from the model.
DERIVED_KEYS = ("finetuning.lora_target", "model.family", "model.template")
# Keys that may differ between a run and its continuation: they change no number.
RESUME_IGNORED_KEYS = (
    "trainer.overwrite_output_dir", "trainer.output_dir", "trainer.disable_tqdm", "trainer.log_level",
    "data.overwrite_cache", "data.preprocessing_num_workers", "model.cache_dir", "model.use_auth_token",
    "tracker.name", "tracker.project", "tracker.entity", "tracker.group", "tracker.job_type", "tracker.tags", "tracker.log_artifact",
)  # fmt: skip


def default_folder(root: Path, name: str) -> Path:
    """`<root>/<date>/<time>_<name>`, numbered when two runs start in the same second."""
    now = datetime.now()
    folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}"
    number = 2
    while folder.exists():
        folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}_{number}"
        number += 1
    return folder


def acquire_run_folder(path: Path, config: DictConfig, overwrite: bool) -> bool:
    """Whether the run in this folder is to be resumed; False for a fresh folder.

    Where the folder exists it is locked. Raises CheckpointError when another process has it, and when it holds a finished
    run, another run, or files that are no run's.
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
    different = [key for key in differing_keys(folder.config(), config) if key not in RESUME_IGNORED_KEYS]
    if different:
        told = ", ".join(different[:6]) + (f" and {len(different) - 6} more" if len(different) > 6 else "")
        raise CheckpointError(f"{name} holds an unfinished run of another configuration (different: {told}); {again}")


def differing_keys(one: DictConfig, other: DictConfig) -> list[str]:
    """The dotted keys whose values differ; what a run fills in itself and how a path is written do not count."""
    left, right = (_comparable(config) for config in (one, other))
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
