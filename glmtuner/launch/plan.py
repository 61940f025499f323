"""What a run is: on the terminal and in its folder."""

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run
from glmtuner.console import table
from glmtuner.families.family import Family
from glmtuner.launch.checks import SHAPE
from glmtuner.run_folder.files import write_json, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import CONFIG, OVERRIDES, PROVENANCE, TEMPLATE
from glmtuner.run_folder.provenance import provenance
from glmtuner.run_folder.redaction import redact_config, redact_overrides

if TYPE_CHECKING:
    import torch
    from torch import nn

    from glmtuner.data.splits import Datasets
    from glmtuner.training.trainer import GlmTrainer


def write_description(
    folder: RunFolder,
    composed: Composed,
    family: Family,
    template: Any,
    model_config: Mapping[str, Any],
    data: "Datasets",
    resumes: bool,
) -> None:
    """config.yaml, overrides.txt, provenance.json: what runs, and where it came from."""
    run, config = composed.run, composed.config
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    resolved["model"] |= {
        "family": family.name,
        "template": run.model.template,
        "checkpoint_dir": [str(Path(path).expanduser().resolve()) for path in run.model.checkpoint_dir],
    }
    for name in ("model_name_or_path", "reward_model"):
        value = getattr(run.model, name)
        if value and Path(value).expanduser().is_dir():
            resolved["model"][name] = str(Path(value).expanduser().resolve())
    for field in dataclasses.fields(run.finetuning):
        value = getattr(run.finetuning, field.name)
        resolved["finetuning"][field.name] = value.value if isinstance(value, Enum) else value
    about = provenance(
        composed.overrides,
        seed=run.trainer.seed,
        template=template.describe(),
        base={key: model_config[key] for key in SHAPE if key in model_config},
        data=data.about(),
    )
    if resumes:
        before = folder.provenance()
        about = {
            **about,
            "started": before.get("started", about["started"]),
            "resumed": [*before.get("resumed", []), about["started"]],
        }
    write_text(folder / CONFIG, OmegaConf.to_yaml(redact_config(OmegaConf.create(resolved))))
    write_text(folder / OVERRIDES, "".join(f"{word}\n" for word in redact_overrides(composed.overrides)))
    write_json(folder / PROVENANCE, about)
    if "jinja" in about["template"]:
        write_text(folder / TEMPLATE, about["template"]["jinja"])


def show_plan(
    run: Run, folder: RunFolder, model: "nn.Module", data: "Datasets", trainer: "GlmTrainer", device: "torch.device"
) -> None:
    """The short table of what will run."""
    from glmtuner.data.segments import Packs
    from glmtuner.training.throughput import size_of

    arguments, trained_on = trainer.args, trainer.train_dataset

    total = sum(map(size_of, model.parameters()))
    trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    rows = [("model", f"{run.model.model_name_or_path} ({run.model.family}), {total:,} parameters")]
    rows += [("data", f"{part.spec.name}: {part.counts.told()}") for part in data.prepared]
    if run.data.mix_probabilities and data.train is not None:
        rows.append(("mix", ", ".join(f"{name} {share:.1%}" for name, share in data.shares.items())))
    if data.evaluation is not None:
        rows.append(("evaluation", f"{len(data.evaluation):,} records"))
    if data.train is not None:
        rows.append(("method", f"{run.finetuning.finetuning_type}: {trained:,} of them trained, {trained / total:.4%}"))
        kind = "records"
        if isinstance(trained_on, Packs):
            filled = sum(trained_on.lengths) / (len(trained_on) * trained_on.capacity)
            rows.append(("packed", f"{len(trained_on):,} rows of {trained_on.capacity:,} tokens, {filled:.1%} full"))
            kind = "packed rows"
        rows.append(("steps", steps_summary(arguments, len(trained_on), kind)))
    precision = (
        "bf16"
        if arguments.bf16
        else "fp16"
        if arguments.fp16
        else str(next(model.parameters()).dtype).removeprefix("torch.")
    )
    rows.append(("device", f"{device}, {precision}"))
    rows.append(("run folder", str(folder.path)))
    table("", ("", ""), rows, show_header=False)


def steps_summary(arguments: Any, records: int, kind: str) -> str:
    world = max(arguments.world_size, 1)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    an_epoch = max(
        math.ceil(
            math.ceil(records / world / arguments.per_device_train_batch_size) / arguments.gradient_accumulation_steps
        ),
        1,
    )
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)
    return f"{steps:,} of {batch} {kind}, {steps / an_epoch:g} epochs"
