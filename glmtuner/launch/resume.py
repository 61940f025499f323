"""The checkpoint that trainer.resume_from_checkpoint names, and whether this run may continue its training."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from glmtuner.config.compose import run_folder_of
from glmtuner.config.removed import removed_preset
from glmtuner.config.schema import Run, key_defaults
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError, did_you_mean
from glmtuner.run_folder.acquire import RESUME_IGNORED_KEYS, differing_keys
from glmtuner.run_folder.checkpoints import (
    checkpoint_problem,
    checkpoints,
    latest_complete_checkpoint,
    saved_ranks,
    saved_rows,
    step_of,
)
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CHECKPOINTS, CONFIG, MARKER
from glmtuner.run_folder.saved_config import read_values

if TYPE_CHECKING:
    import torch

KNOB = "trainer.resume_from_checkpoint"
# What may be another in the run that continues a checkpoint's training, besides RESUME_IGNORED_KEYS: when it ends, is
# measured, saved and logged, and how fast it is computed. A pattern stands for all keys that match it.
MAY_CHANGE = (
    "name", "objective", "model.plot_loss", "generation.*", "metric.*", "tracker.*", "parallel.*",
    "trainer.resume_from_checkpoint", "trainer.max_steps", "trainer.num_train_epochs",
    "trainer.logging_*", "trainer.log_*", "trainer.eval_*", "trainer.save_*", "trainer.async_save", "trainer.per_device_eval_batch_size",
    "trainer.do_eval", "trainer.do_predict", "trainer.predict_with_generate", "trainer.prediction_loss_only",
    "trainer.*_full_eval", "trainer.load_best_model_at_end", "trainer.metric_for_best_model", "trainer.greater_is_better",
    "trainer.early_stopping_*",
    "trainer.disable_tqdm", "trainer.dataloader_num_workers", "trainer.dataloader_pin_memory",
    "trainer.dataloader_persistent_workers", "trainer.dataloader_prefetch_factor", "trainer.dataloader_multiprocessing_context",
    "trainer.torch_compile*", "trainer.use_liger_kernel", "trainer.liger_kernel_config", "trainer.activation_checkpointing*",
    "trainer.gradient_checkpointing*", "trainer.torch_empty_cache_steps", "trainer.skip_memory_metrics",
    "trainer.include_num_input_tokens_seen", "trainer.debug", "trainer.ddp_*", "trainer.ignore_data_skip",
    "trainer.push_to_hub", "trainer.hub_*", "data.eval_num_beams", "data.eval_dataset", "data.padding_free", "benchmark.*",
)  # fmt: skip
# Of the keys above, those that change the rest of the schedule, which is said.
CHANGES_SCHEDULE = ("trainer.max_steps", "trainer.num_train_epochs")
# Of which only the product with the number of processes matters, as `require_same_rows` checks.
BATCH_KEYS = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
MAX_LISTED = 6


def may_change(key: str) -> bool:
    """Whether a run may continue another run's checkpoint with another value of the key."""
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def checkpoint_to_resume(run: Run, config: DictConfig, folder: Path, ranks: int) -> Path | None:
    """The complete checkpoint that trainer.resume_from_checkpoint names; None if it names none.

    `folder` is this run's. Raises GlmtunerError if there is no such checkpoint, or if it is of a training that this run, with
    `ranks` processes, does not continue.
    """
    value = run.trainer.resume_from_checkpoint
    if value is None or value.lower() in ("false", "null", "none", ""):
        return None
    if not run.trainer.do_train:
        raise ConfigError(
            f"{KNOB}={value} without training: it continues one; type model.checkpoint_dir={value} to start from its weights, or "
            "trainer=train"
        )
    if value.lower() == "true":
        checkpoint = _latest_of(folder, ranks, run.trainer.output_dir is not None)
    else:
        checkpoint = _named(Path(value).expanduser(), ranks)
    require_resumable(checkpoint, ranks)
    if run.trainer.overwrite_output_dir and lies_in(checkpoint, folder):
        raise ConfigError(
            f"{KNOB}={value} with trainer.overwrite_output_dir=true, which removes that checkpoint; leave one of the two out, or "
            "type another trainer.output_dir"
        )
    require_same_training(run, config, checkpoint)
    require_same_rows(run, config, checkpoint, ranks)
    return checkpoint


def rows_per_step(run: Run, ranks: int) -> int:
    """The rows of an optimizer step of so many processes."""
    trainer = run.trainer
    return (
        trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * ranks // run.parallel.ranks_per_row
    )


def require_same_rows(run: Run, config: DictConfig, checkpoint: Path, ranks: int) -> None:
    """Raise CheckpointError where so many processes learn other rows in a step than those that wrote the checkpoint did."""
    source = run_folder_of(str(checkpoint))
    before, saved = saved_ranks(checkpoint), RunFolder(source).config() if source is not None else None
    rows = saved_rows(checkpoint)
    if rows is None and saved is not None:  # of an earlier version, and of as many processes
        shared = int(_value(saved, "parallel.sequence") or 1)
        rows = math.prod(int(_value(saved, key) or 1) for key in BATCH_KEYS) * before // shared
    now, group = rows_per_step(run, ranks), run.parallel.ranks_per_row
    changed = [] if saved is None else [key for key in BATCH_KEYS if _value(saved, key) != _value(config, key)]
    listed = [_comparison(key, saved, config) for key in changed if saved is not None]
    listed += [f"processes are {before} there and {ranks} here"] if ranks != before else []
    if rows is not None and rows != now:
        own, left = divmod(rows * group, ranks)
        advice = (
            f"with {ranks} processes, {' times '.join(BATCH_KEYS)} must be {own}"
            if not left
            else f"{ranks} processes cannot share {rows} rows equally: run a number that divides them"
        )
        raise CheckpointError(
            f"{KNOB}={checkpoint} is of a training with {rows} rows in an optimizer step, and this run has {now} ({'; '.join(listed)}); "
            f"{advice}, or start from its weights with a fresh optimizer: model.checkpoint_dir={checkpoint}"
        )
    if run.trainer.train_sampling_strategy == "group_by_length" and changed:
        raise CheckpointError(
            f"{KNOB}={checkpoint} with trainer.train_sampling_strategy=group_by_length: batches of similar length are drawn for the rows "
            f"of a process, of which there are others now ({'; '.join(listed)}), so the order of the data would be another one; type the "
            f"values of the checkpoint's run and {before} processes"
        )


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Whether the checkpoint is one of the run in the folder, whatever links lead to them."""
    return folder.resolve() in checkpoint.resolve().parents


def _latest_of(folder: Path, ranks: int, is_named: bool) -> Path:
    checkpoint, skipped = latest_complete_checkpoint(folder, ranks)
    if checkpoint is None:
        missing = f"there is no folder {folder}" if is_named else "trainer.output_dir is not set"
        reason = "; ".join(skipped) or (f"{folder} has no checkpoint" if folder.is_dir() else missing)
        raise CheckpointError(
            _of_removed_strategy("true", folder)
            or f"{KNOB}=true is the latest complete checkpoint of trainer.output_dir, and {reason}; leave it out to start from step 0, "
            f"or type {KNOB}=<a checkpoint or run folder>"
        )
    for sentence in skipped:
        say(sentence)
    return checkpoint


def _named(path: Path, ranks: int) -> Path:
    """The checkpoint at a path, which may also be of a run folder or of its folder of checkpoints."""
    if not path.is_dir():
        reason = "it is a file, and a checkpoint is a folder" if path.exists() else f"no such folder{_nearest(path)}"
        raise CheckpointError(_refusal(path, reason))
    if path.name == CHECKPOINTS and not (path / MARKER).is_file() and checkpoints(path.parent):
        path = path.parent
    if not checkpoints(path):
        return path
    checkpoint, skipped = latest_complete_checkpoint(path, ranks)
    if checkpoint is None:
        raise CheckpointError(_refusal(path, f"it has no complete checkpoint ({'; '.join(skipped)})"))
    for sentence in skipped:
        say(sentence)
    return checkpoint


def _nearest(path: Path) -> str:
    """A suggestion among the folders beside the missing part of a path."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        beside = [entry.name for entry in missing.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return ""
    listed = f"{missing.parent} has {', '.join(sorted(beside)[:MAX_LISTED])}" if beside else ""
    return did_you_mean(missing.name, beside, listed)


def _refusal(checkpoint: Path, reason: str) -> str:
    return _of_removed_strategy(str(checkpoint), checkpoint) or (
        f"{KNOB}={checkpoint} cannot be resumed from: {reason}; name another checkpoint, or leave it out: the same command with "
        "the same trainer.output_dir resumes from the latest complete one"
    )


def _of_removed_strategy(value: str, path: Path) -> str | None:
    """The refusal of a checkpoint, or a run folder, of a strategy of an earlier version; None for any other."""
    source = run_folder_of(str(path))
    why = removed_preset("parallel", read_values(source / CONFIG).get("parallel.name")) if source else None
    return why and (
        f"{KNOB}={value} cannot be resumed from: its run had {why}. To train on from its weights with a fresh optimizer, leave "
        f"{KNOB} out and type model.checkpoint_dir={(checkpoints(path) or [path])[-1]} with another trainer.output_dir"
    )


def require_resumable(checkpoint: Path, ranks: int) -> None:
    """Raise CheckpointError where training cannot be resumed from the checkpoint."""
    reason = checkpoint_problem(checkpoint, ranks)
    if reason is None:
        return
    if not (checkpoint / MARKER).is_file() and (checkpoint / "trainer_state.json").is_file():
        reason = (
            f"it has no {MARKER}, so glmtuner has not saved it, or not completely; to train on from its weights with a fresh "
            f"optimizer, type model.checkpoint_dir={checkpoint}"
        )
    elif (checkpoint / MARKER).is_file() and not (checkpoint / "optimizer.pt").is_file():
        reason += (
            f", as with trainer.save_only_model=true; to train on from its weights with a fresh optimizer, type "
            f"model.checkpoint_dir={checkpoint}"
        )
    raise CheckpointError(_refusal(checkpoint, reason))


def require_same_training(run: Run, config: DictConfig, checkpoint: Path) -> None:
    """Raise CheckpointError where this run would continue the checkpoint's training with other data, batches or optimization."""
    step = step_of(checkpoint)
    if 0 < run.trainer.max_steps < step:
        raise CheckpointError(
            f"{KNOB}={checkpoint} is at step {step}, past trainer.max_steps={run.trainer.max_steps}; type a larger "
            "trainer.max_steps, or name an earlier checkpoint"
        )
    source = run_folder_of(str(checkpoint))
    if source is None:
        say(
            f"{KNOB}={checkpoint}: there is no config.yaml above it, so whether it is of the same training is not checked"
        )
        return
    saved = RunFolder(source).config()
    different = differences_when_continued(saved, config)
    if different:
        listed = "; ".join(_comparison(key, saved, config) for key in different[:MAX_LISTED])
        more = f"; and {len(different) - MAX_LISTED} more" if len(different) > MAX_LISTED else ""
        raise CheckpointError(
            f"{KNOB}={checkpoint} is of a training with another configuration: {listed}{more}; type the checkpoint's values, or "
            f"start from its weights with a fresh optimizer: model.checkpoint_dir={checkpoint}"
        )
    for key in CHANGES_SCHEDULE:
        before, now = _value(saved, key), _value(config, key)
        if before != now:
            say(
                f"{key}={now}, {before} in the checkpoint's run: the schedule of the learning rate is that of the new length"
            )


def differences(saved: DictConfig, config: DictConfig) -> list[str]:
    """The keys for whose other values a run is not resumed in its own folder."""
    return [key for key in differing_keys(saved, config, key_defaults()) if key not in RESUME_IGNORED_KEYS]


def differences_when_continued(saved: DictConfig, config: DictConfig) -> list[str]:
    """The keys for whose other values a training is not continued from a checkpoint that the user names."""
    return [key for key in differences(saved, config) if not may_change(key) and key not in BATCH_KEYS]


def how_to_continue(folder: RunFolder, config: DictConfig, checkpoint: Path | None) -> str:
    """What to add to the refusal of a folder whose unfinished run could be continued with these values; may be empty."""
    if checkpoint is not None or not folder.is_run or folder.is_finished or not checkpoints(folder.path):
        return ""
    try:
        different = differences_when_continued(folder.config(complete=True), config)
    except CheckpointError:
        return ""
    return "" if different else f", or {KNOB}=true to go on from its latest checkpoint with these values"


def _value(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key)


def _comparison(key: str, saved: DictConfig, config: DictConfig) -> str:
    before, now = (_shown(_value(values, key)) for values in (saved, config))
    return f"{key} is {before} there and {now} here"


def _shown(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, enum_to_str=True)
    value = getattr(value, "value", value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def require_same_optimizer(checkpoint: Path, optimizer: "torch.optim.Optimizer", name: str) -> None:
    """Raise CheckpointError where a checkpoint's optimizer state is not of this optimizer, which has taken a step on one layer."""
    from glmtuner.training.optimizer_state import LAYOUT, read_file

    saved = read_file(checkpoint)
    before, now = (
        {str(entry) for part in ("state", LAYOUT) for entries in state.get(part, {}).values() for entry in entries}
        for state in (saved, optimizer.state_dict())
    )
    state = optimizer.state_dict()
    groups = saved["param_groups"]  # of which there may be more or fewer, by rate
    state["param_groups"] = [
        {**next((group for group in groups if group.keys() == own.keys()), groups[0]), "params": own["params"]}
        for own in state["param_groups"]
    ]
    reason = f"its state holds {', '.join(sorted(before)) or 'nothing'}, and this one's {', '.join(sorted(now)) or 'nothing'}"
    try:
        optimizer.load_state_dict(state)
        optimizer.step()
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError):
        pass
    else:
        if before <= now:
            return
    raise CheckpointError(
        f"{KNOB}={checkpoint} was saved with another optimizer than trainer.optim={name}: {reason}; type the optimizer of the "
        "checkpoint's run"
    )
