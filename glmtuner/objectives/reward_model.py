"""Trained reward models: where the head is, and whether a run may use it."""

from pathlib import Path

from glmtuner.config.compose import run_folder_of
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder


def find_head(path: str) -> Path | None:
    """The value head in a run folder or a checkpoint, when there is one."""
    folder = Path(path).expanduser()
    names = [f"value_head{suffix}" for suffix in (".safetensors", ".bin")]
    places = [place / name for place in (folder, folder / "adapter", folder / "model") for name in names]
    return next((place for place in places if place.is_file()), None)


def stage_of(path: str) -> str | None:
    """The stage of the run that a checkpoint is of; None where no run tells."""
    source = run_folder_of(path)
    return RunFolder(source).config().stage.name if source else None


def head_file(path: str, key: str) -> Path:
    """The head of a trained reward model; raises CheckpointError where `path` is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{key}={path}: no such folder; name the run folder of a reward model (train one with stage=rm)"
        )
    stage, head = stage_of(path), find_head(path)
    if stage not in (None, "rm"):
        raise CheckpointError(f"{key}={path} holds a run of stage={stage}; name one of stage=rm, a reward model")
    if head is None:
        raise CheckpointError(
            f"{key}={path} has no value_head.safetensors, so it is no trained reward model; name the folder of a finished "
            "run of stage=rm, or one of its checkpoints"
        )
    return head
