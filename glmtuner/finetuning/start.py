"""What a run starts from: the base model with the checkpoints of `model.checkpoint_dir` applied, in order."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from glmtuner.config.compose import run_folder_of
from glmtuner.config.groups import Finetuning, Model
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.finetuning.p_tuning import PUBLISHED_PREFIX, prefix_settings
from glmtuner.finetuning.trained import TRAINED, assign, load_folder, load_tensors

if TYPE_CHECKING:
    from torch import nn

    from glmtuner.families.family import Family

LORA, PREFIX, WEIGHTS, CHANGED = "lora", "prefix", "weights", "changed"


@dataclass(frozen=True)
class Checkpoint:
    """A folder of trained weights and what kind they are.

    lora: a PEFT adapter; prefix: a prefix, PEFT's or the published ChatGLM code's; weights: a whole model; changed: only
    the parameters that were trained.
    """

    kind: str
    folder: Path


def checkpoint_in(path: str) -> Checkpoint:
    """The weights in a run folder or checkpoint folder; raises CheckpointError where there are none."""
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "adapter", folder / "model"):
        if (candidate / "adapter_config.json").is_file():
            settings = json.loads((candidate / "adapter_config.json").read_text(encoding="utf-8"))
            kind = {"LORA": LORA, "PREFIX_TUNING": PREFIX}.get(settings.get("peft_type"))
            if kind is None:
                raise CheckpointError(
                    f"model.checkpoint_dir={path} holds a {settings.get('peft_type')} adapter; LoRA adapters and prefixes are read"
                )
            return Checkpoint(kind, candidate)
        if (candidate / TRAINED).is_file():
            return Checkpoint(CHANGED, candidate)
        if [*candidate.glob("model*.safetensors"), *candidate.glob("pytorch_model*.bin")]:
            return Checkpoint(_kind_by_names(load_folder(candidate)), candidate)
    raise CheckpointError(
        f"model.checkpoint_dir={path} holds no trained weights: no adapter/, no model/, no adapter_config.json; "
        "name a finished run's folder or one of its checkpoints/"
    )


def _kind_by_names(names: Iterable[str]) -> str:
    """What a folder of weights without a word about them holds: the trainers of ChatGLM wrote what they had trained only."""
    if any(PUBLISHED_PREFIX in name for name in names):
        return PREFIX
    return WEIGHTS if any("embed" in name for name in names) else CHANGED


def checkpoints_of(model: Model) -> list[Checkpoint]:
    """All checkpoints to apply to the base model, oldest first."""
    found: list[Checkpoint] = []
    for path in model.checkpoint_dir:
        applied = {
            checkpoint.folder.resolve() for checkpoint in found
        }  # a,b may name a run and one that started from it
        found += [checkpoint for checkpoint in lineage(path) if checkpoint.folder.resolve() not in applied]
    last_whole = max((place for place, checkpoint in enumerate(found) if checkpoint.kind == WEIGHTS), default=0)
    return found[last_whole:]


def lineage(path: str) -> list[Checkpoint]:
    """A checkpoint with those that its own run started from in front of it.

    The adapter or prefix that the run went on training stands in its checkpoint already and is left out.
    """
    mine, source = checkpoint_in(path), run_folder_of(path)
    if source is None or mine.kind == WEIGHTS:
        return [mine]
    saved = OmegaConf.load(source / "config.yaml").model
    below = [checkpoint for earlier in saved.checkpoint_dir for checkpoint in lineage(earlier)]
    if (
        below
        and below[-1].kind == mine.kind
        and (mine.kind == PREFIX or (mine.kind == LORA and saved.resume_lora_training))
    ):
        below.pop()
    return [*below, mine]


def base_folder(checkpoints: list[Checkpoint]) -> Path | None:
    """The folder to load the base weights from when a checkpoint is a whole model."""
    return checkpoints[0].folder if checkpoints and checkpoints[0].kind == WEIGHTS else None


def build_trainable_model(
    model: "nn.Module",
    finetuning: Finetuning,
    family: "Family",
    checkpoints: list[Checkpoint],
    *,
    resume_lora: bool,
    trains: bool,
    user_keys: set[str],
) -> "nn.Module":
    """The model with its checkpoints applied and the method attached: the last LoRA or prefix goes on, others are merged."""
    rest = [checkpoint for checkpoint in checkpoints if checkpoint.kind != WEIGHTS]
    last = rest[-1] if rest else None
    method = finetuning.finetuning_type
    prefixes = [checkpoint for checkpoint in rest if checkpoint.kind == PREFIX]
    if prefixes and (prefixes != [last] or method != "p_tuning"):
        raise CheckpointError(
            f"finetuning={method} cannot build on the prefix in {prefixes[0].folder}: a prefix has no weights to merge; "
            "type finetuning=p_tuning, with that checkpoint last"
        )
    goes_on = adapter_to_resume(checkpoints, finetuning, resume_lora, trains)
    for checkpoint in rest:
        if checkpoint is not goes_on:
            model = _merged(model, checkpoint)
    if goes_on is None:
        model = finetuning.attach(model, family)
        if not trains and finetuning.saved_as == "model":
            match_base(model)
        return model
    for name, value in settings_of(goes_on).items():
        mine = getattr(finetuning, name)
        same = sorted(mine) == sorted(value) if isinstance(value, list) else mine == value
        if not same and f"finetuning.{name}" in user_keys:
            raise ConfigError(
                f"finetuning.{name}={mine} does not fit {goes_on.folder}, which has {value}; leave it out to go on with that "
                "checkpoint, or type model.resume_lora_training=false to merge it and start a new adapter"
            )
        setattr(finetuning, name, value)
    model = finetuning.attach(model, family)
    finetuning.restore(model, goes_on.folder)
    return model


def match_base(model: "nn.Module") -> None:
    """Where nothing is trained, float32 weights between half-precision ones become such, too: products take one precision."""
    import torch

    frozen = {value.dtype for value in model.parameters() if not value.requires_grad}
    half = frozen & {torch.float16, torch.bfloat16}
    for parameter in model.parameters():
        if half and parameter.requires_grad:
            parameter.data = parameter.data.to(next(iter(half)))


def adapter_to_resume(
    checkpoints: list[Checkpoint], finetuning: Finetuning, resume_lora: bool, trains: bool
) -> Checkpoint | None:
    """The checkpoint whose adapter or prefix the method goes on with; all others are merged."""
    last = checkpoints[-1] if checkpoints else None
    adapts = last is not None and last.kind == LORA and finetuning.finetuning_type == "lora"
    return last if last is not None and (last.kind == PREFIX or (adapts and (resume_lora or not trains))) else None


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The method's settings that an adapter or a prefix was trained with."""
    return prefix_settings(checkpoint.folder) if checkpoint.kind == PREFIX else lora_settings(checkpoint.folder)


def lora_settings(folder: Path) -> dict[str, Any]:
    """Rank, alpha, dropout and targets of a saved adapter."""
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    targets = saved["target_modules"]
    if isinstance(targets, str):
        raise CheckpointError(
            f"{folder} names its targets by the pattern {targets!r}; adapters with a list of names are read"
        )
    return {
        "lora_rank": saved["r"],
        "lora_alpha": float(saved["lora_alpha"]),
        "lora_dropout": float(saved["lora_dropout"]),
        "lora_target": sorted(targets),
    }


def _merged(model: "nn.Module", checkpoint: Checkpoint) -> "nn.Module":
    if checkpoint.kind == CHANGED:
        trained = checkpoint.folder / TRAINED
        saved = load_tensors(trained) if trained.is_file() else load_folder(checkpoint.folder)
        parameters = dict(model.named_parameters())
        assign({name: parameters[name] for name in saved if name in parameters}, saved, checkpoint.folder)
        return model
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(checkpoint.folder))
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the adapter in {checkpoint.folder} does not fit this model: {reason}") from None
    return adapted.merge_and_unload()
