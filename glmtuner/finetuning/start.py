"""The model that a run starts from: the base with the checkpoints of `model.checkpoint_dir` applied in order."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from glmtuner.config.compose import run_folder_of
from glmtuner.config.groups import Finetuning, Model, ModelFamily
from glmtuner.console import say
from glmtuner.distributed.shares import cast
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.finetuning.adapter import (
    ADAPTER_CONFIG,
    adapter_notices,
    check_trainable,
    lora_settings,
    read_adapter_config,
)
from glmtuner.finetuning.lora import SavedLora
from glmtuner.finetuning.merge import merged_adapter
from glmtuner.finetuning.new_rows import require_new_rows
from glmtuner.finetuning.p_tuning import PUBLISHED_PREFIX, prefix_settings
from glmtuner.finetuning.peft import REFUSED, peft_settings, peft_types
from glmtuner.finetuning.trained import assign, holds_trained, load_folder, load_trained, names_in
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import ADAPTER, KEPT, MODEL

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CheckpointKind:
    """A kind of trained weights, and how a run can start from them.

    `method` is the fine-tuning method that can continue to train them, with the settings that `settings` reads from the folder;
    None if there is no such method. An `is_whole_model` replaces the base; `is_mergeable` weights can be merged into the base.
    """

    name: str
    method: str | None = None
    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    is_whole_model: bool = False
    is_mergeable: bool = True


LORA = CheckpointKind("lora", method="lora", settings=lora_settings)  # a PEFT adapter
PREFIX = CheckpointKind(
    "prefix", method="p_tuning", settings=prefix_settings, is_mergeable=False
)  # PEFT's or ChatGLM's own
TUNED = CheckpointKind("tuned", method="peft", settings=peft_settings)  # an adapter of another method of PEFT
WEIGHTS = CheckpointKind("weights", is_whole_model=True)
CHANGED = CheckpointKind("changed")  # only the parameters that were trained
EMBEDDING = re.compile(r"embed|(^|\.)(wte|w)\.weight$")  # in names of weights; those of GPT-2 and CTRL do not say it
PEFT_KINDS = {"LORA": LORA, "PREFIX_TUNING": PREFIX}


def adapter_kind(peft_type: str) -> CheckpointKind | None:
    """The kind of an adapter by the peft_type of its adapter_config.json; None where a run cannot start from it."""
    known = peft_type in peft_types() - REFUSED.keys()
    return PEFT_KINDS.get(peft_type) or (TUNED if known else None)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of trained weights, and their kind."""

    kind: CheckpointKind
    folder: Path

    def settings(self) -> dict[str, Any]:
        """The settings of the method that it was trained with, by configuration key."""
        return self.kind.settings(self.folder)

    def resumed(self, finetuning: Finetuning) -> Finetuning:
        """The method that continues to train it: `finetuning` with its settings, for a LoRA with all of its adapter_config.json."""
        if self.kind is LORA:
            saved = SavedLora.of(self.folder, finetuning.finetuning_type)
            for name in ("loraplus_lr_ratio", "loraplus_lr_embedding"):  # of a training, not of an adapter
                setattr(saved, name, getattr(finetuning, name))
            return saved
        return replace(finetuning, **self.settings())


def checkpoint_in(path: str) -> Checkpoint:
    """The weights in a run folder or checkpoint folder; raises CheckpointError if there are none, or of an unknown kind."""
    folder = Path(path).expanduser()
    for candidate in (folder, folder / ADAPTER, folder / MODEL, folder / KEPT):
        if (candidate / ADAPTER_CONFIG).is_file():
            settings = read_adapter_config(candidate)
            kind = adapter_kind(settings["peft_type"])
            if kind is None:
                reason = REFUSED.get(
                    settings["peft_type"], "the installed PEFT has no such method; type pip install -U peft"
                )
                raise CheckpointError(
                    f"model.checkpoint_dir={path} holds a {settings['peft_type']} adapter, which cannot be loaded: {reason}"
                )
            return Checkpoint(kind, candidate)
        if holds_trained(candidate):
            return Checkpoint(CHANGED, candidate)
        if [*candidate.glob("model*.safetensors"), *candidate.glob("pytorch_model*.bin")]:
            return Checkpoint(_kind_by_names(names_in(candidate)), candidate)
    raise CheckpointError(
        f"model.checkpoint_dir={path} holds no trained weights: no adapter/, no model/, no adapter_config.json; "
        "name a finished run's folder or one of its checkpoints/"
    )


def _kind_by_names(names: Iterable[str]) -> CheckpointKind:
    """The kind of weights without an adapter_config.json; ChatGLM's own trainers save only the trained parameters."""
    if any(PUBLISHED_PREFIX in name for name in names):
        return PREFIX
    return WEIGHTS if any(EMBEDDING.search(name) for name in names) else CHANGED


def checkpoints_of(model: Model) -> list[Checkpoint]:
    """All checkpoints to apply to the base model, oldest first."""
    checkpoints: list[Checkpoint] = []
    for path in model.checkpoint_dir:
        # a,b may name a run and another one that started from it
        known = {checkpoint.folder.resolve() for checkpoint in checkpoints}
        checkpoints += [checkpoint for checkpoint in lineage(path) if checkpoint.folder.resolve() not in known]
    first = max((index for index, checkpoint in enumerate(checkpoints) if checkpoint.kind.is_whole_model), default=0)
    return checkpoints[first:]


def lineage(path: str, later: tuple[Path, ...] = ()) -> list[Checkpoint]:
    """A checkpoint, preceded by those that its run started from; `later` are the runs that started from it.

    The adapter or prefix that its run continued to train is left out: the checkpoint contains it.
    """
    last, source = checkpoint_in(path), run_folder_of(path)
    if source is None or last.kind.is_whole_model:
        return [last]
    if source.resolve() in later:
        raise CheckpointError(
            f"{source} started from itself, by its config.yaml and those of the runs in between; correct model.checkpoint_dir in it"
        )
    starts, resumes = _started_from(source)
    earlier = [checkpoint for start in starts for checkpoint in lineage(start, (*later, source.resolve()))]
    continued = last.kind.method is not None and (resumes or not last.kind.is_mergeable)
    if earlier and earlier[-1].kind == last.kind and continued:
        earlier.pop()
    return [*earlier, last]


def _started_from(source: Path) -> tuple[list[str], bool]:
    """`model.checkpoint_dir` and `model.resume_lora_training` in a run's config.yaml; raises CheckpointError."""
    model = RunFolder(source).config().get("model")
    starts = model.get("checkpoint_dir") if isinstance(model, DictConfig) else None
    if not isinstance(starts, ListConfig):
        raise CheckpointError(f"{source / 'config.yaml'} is damaged (it has no list model.checkpoint_dir)")
    return [str(start) for start in starts], bool(model.get("resume_lora_training", True))


def check_checkpoints(model: Model) -> None:
    """Read all checkpoints' settings, and print where an adapter names another base; raises CheckpointError.

    No weights are loaded and torch is not imported, except for .bin files.
    """
    checkpoints = checkpoints_of(model)
    base = base_folder(checkpoints)
    for checkpoint in checkpoints:
        checkpoint.settings()
        if (checkpoint.folder / ADAPTER_CONFIG).is_file():
            for notice in adapter_notices(
                checkpoint.folder, str(base or model.model_name_or_path), model.model_revision
            ):
                say(notice)


def base_folder(checkpoints: list[Checkpoint]) -> Path | None:
    """The folder to load the base weights from, if the first checkpoint is a whole model."""
    return checkpoints[0].folder if checkpoints and checkpoints[0].kind.is_whole_model else None


def build_trainable_model(
    model: "PreTrainedModel",
    finetuning: Finetuning,
    family: ModelFamily,
    checkpoints: list[Checkpoint],
    *,
    resume_lora: bool,
    trains: bool,
    user_keys: set[str],
) -> "tuple[PreTrainedModel, Finetuning]":
    """The model with checkpoints applied and the method attached, and the method with the settings in use.

    The last adapter or prefix is resumed with its own settings if `adapter_to_resume` says so; all others are merged. Raises
    CheckpointError for a prefix that would have to be merged, ConfigError for user keys that differ from resumed settings.
    """
    applied = [checkpoint for checkpoint in checkpoints if not checkpoint.kind.is_whole_model]
    last = applied[-1] if applied else None
    method = finetuning.finetuning_type
    unmergeable = [checkpoint for checkpoint in applied if not checkpoint.kind.is_mergeable]
    if unmergeable and (unmergeable != [last] or method != unmergeable[0].kind.method):
        raise CheckpointError(
            f"finetuning={method} cannot start from the prefix in {unmergeable[0].folder}: a prefix cannot be merged; "
            "type finetuning=p_tuning, with that checkpoint last"
        )
    resumed = adapter_to_resume(checkpoints, finetuning, resume_lora, trains)
    for checkpoint in applied:
        if checkpoint is not resumed:
            model = _merged(model, family, checkpoint)
    if resumed is None:
        model = finetuning.attach(model, family)
        if not trains and finetuning.saved_as == "model":
            match_base(model)
        return model, finetuning
    settings = resumed.settings()
    for name, value in settings.items():
        current = getattr(finetuning, name)
        if isinstance(value, dict):
            require_same(name, current, value, user_keys, resumed.folder)
            continue
        same = sorted(current) == sorted(value) if isinstance(value, list) else current == value
        if not same and f"finetuning.{name}" in user_keys:
            raise ConfigError(
                f"finetuning.{name}={current} does not fit {resumed.folder}, which has {value}; leave it out to resume that "
                "adapter, or type model.resume_lora_training=false to merge it and start a new adapter"
            )
    finetuning = resumed.resumed(finetuning)
    model = finetuning.attach(model, family)
    finetuning.restore(model, resumed.folder)
    if trains and resumed.kind is LORA:
        require_new_rows(model, read_adapter_config(resumed.folder), resumed.folder)
        check_trainable(model, resumed.folder)
    return model, finetuning


def require_same(name: str, given: dict[str, Any], saved: dict[str, Any], user_keys: set[str], folder: Path) -> None:
    """Raise ConfigError where the user gives an entry of a dictionary another value than a resumed adapter has."""
    knob = f"finetuning.{name}"
    typed = {key for key in given if knob in user_keys or f"{knob}.{key}" in user_keys}
    differing = sorted(key for key in typed if given[key] != saved.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{knob}={{{key}: {given[key]}}} does not fit {folder}, which has {saved.get(key, 'none')}; leave it out to resume that "
            "adapter, or type model.resume_lora_training=false to merge it and start a new adapter"
        )


def match_base(model: "nn.Module") -> None:
    """Cast a method's float32 weights to the half precision of the frozen ones, which products without autocast require."""
    import torch

    frozen = {value.dtype for value in model.parameters() if not value.requires_grad}
    half = frozen & {torch.float16, torch.bfloat16}
    for parameter in model.parameters():
        if half and parameter.requires_grad:
            cast(parameter, next(iter(half)))


def adapter_to_resume(
    checkpoints: list[Checkpoint], finetuning: Finetuning, resume_lora: bool, trains: bool
) -> Checkpoint | None:
    """The checkpoint with the adapter or prefix that the method resumes, if any; all others are merged."""
    last = checkpoints[-1] if checkpoints else None
    if last is None or last.kind.method != finetuning.finetuning_type:
        return None
    return last if resume_lora or not trains or not last.kind.is_mergeable else None


def _merged(model: "PreTrainedModel", family: ModelFamily, checkpoint: Checkpoint) -> "PreTrainedModel":
    if checkpoint.kind is not CHANGED:
        return merged_adapter(model, family, checkpoint.folder)
    saved = load_trained(checkpoint.folder) if holds_trained(checkpoint.folder) else load_folder(checkpoint.folder)
    parameters = dict(model.named_parameters())
    assign({name: parameters[name] for name in saved if name in parameters}, saved, checkpoint.folder)
    return model
