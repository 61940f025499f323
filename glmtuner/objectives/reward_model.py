"""Trained reward models: their value head and their stage."""

from pathlib import Path

from glmtuner.config.compose import run_folder_of
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.folder import RunFolder


def find_head(path: str) -> Path | None:
    """The path of the value head in a run folder or a checkpoint; None if it has none."""
    folder = Path(path).expanduser()
    names = [f"value_head{suffix}" for suffix in (".safetensors", ".bin")]
    candidates = [parent / name for parent in (folder, folder / "adapter", folder / "model") for name in names]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def stage_of(path: str) -> str | None:
    """The stage of the run that a checkpoint belongs to; None if it is not in a run folder."""
    source = run_folder_of(path)
    return RunFolder(source).config(complete=True).stage.name if source else None


def head_file(path: str, key: str) -> Path:
    """The path of a trained reward model's head; raises CheckpointError, naming the config `key`, where `path` is no reward model."""
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
            f"{key}={path} has no value_head.safetensors, so it is not a trained reward model; name the folder of a finished "
            "run of stage=rm, or one of its checkpoints"
        )
    return head
