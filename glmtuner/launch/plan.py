"""The description of a run, in its folder and on the terminal."""

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from glmtuner.config.compose import Composed
from glmtuner.config.groups import AskedThinking
from glmtuner.config.plugins import loaded_plugins
from glmtuner.console import table
from glmtuner.distributed import ranks
from glmtuner.families.family import Family
from glmtuner.inference.context import RunContext
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.launch.checks import SHAPE
from glmtuner.launch.hardware import hardware, with_earlier
from glmtuner.launch.inputs import machine, tokenizer_hash, weight_hashes
from glmtuner.run_folder.files import write_bytes, write_json, write_text
from glmtuner.run_folder.names import CONFIG, OVERRIDES, PLAN, PROVENANCE, RECORDS, TEMPLATE
from glmtuner.run_folder.provenance import provenance
from glmtuner.run_folder.redaction import redact_config, redact_overrides

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import TrainingArguments

    from glmtuner.training.trainer import GlmTrainer


# Of provenance.json: what a run was computed from. Where a resumed run has it otherwise, what was before is kept.
SURROUNDINGS = ("python", "packages", "code", "git", "machine", "weights", "tokenizer")


def write_description(
    composed: Composed, context: RunContext, model_config: Mapping[str, Any], resumes: bool, device: "torch.device"
) -> None:
    """Write config.yaml, overrides.txt, provenance.json, records/ and, for a template in Jinja, that template into the run folder."""
    run, folder = composed.run, context.folder
    resolved = OmegaConf.to_container(composed.config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    resolved["model"] |= {
        "family": context.family.name,
        "template": context.template_name,
        "checkpoint_dir": [str(Path(path).expanduser().resolve()) for path in run.model.checkpoint_dir],
    }
    for name in ("model_name_or_path", "reward_model"):
        value = getattr(run.model, name)
        if value and Path(value).expanduser().is_dir():
            resolved["model"][name] = str(Path(value).expanduser().resolve())
    for field in dataclasses.fields(context.finetuning):
        value = getattr(context.finetuning, field.name)
        resolved["finetuning"][field.name] = value.value if isinstance(value, Enum) else value
    plugins = loaded_plugins(run.plugins)
    data = context.data.about()
    for index, part in enumerate(context.data.prepared):
        data[part.spec.name]["hashes"] = f"{RECORDS}/{index}"
    about = provenance(
        composed.overrides,
        seed=run.trainer.seed,
        template=context.template.describe(),
        thinking=context.data.thinking(),
        base={key: model_config[key] for key in SHAPE if key in model_config},
        weights=weight_hashes(run),
        tokenizer=tokenizer_hash(context.tokenizer),
        machine=machine(device),
        data=data,
        **({"flags": list(composed.flags)} if composed.flags else {}),
        hardware=[hardware(device, ranks.world_size())],
        **({"plugins": [plugin.about() for plugin in plugins]} if plugins else {}),
    )
    if resumes:
        before = folder.provenance()
        about = {
            **about,
            "hardware": with_earlier(about["hardware"][0], before),
            "started": before.get("started", about["started"]),
            "resumed": [*before.get("resumed", []), about["started"]],
        }
        changed = {name: before[name] for name in SURROUNDINGS if name in before and before[name] != about.get(name)}
        if earlier := [*before.get("earlier", []), *([changed] if changed else [])]:
            about["earlier"] = earlier
    write_text(folder / CONFIG, OmegaConf.to_yaml(redact_config(OmegaConf.create(resolved))))
    for index, part in enumerate(context.data.prepared):  # behind config.yaml, which makes the folder a run's
        write_bytes(folder / RECORDS / str(index), part.hashes)
    write_text(folder / OVERRIDES, "".join(f"{override}\n" for override in redact_overrides(composed.overrides)))
    write_json(folder / PROVENANCE, about)
    if "jinja" in about["template"]:
        write_text(folder / TEMPLATE, about["template"]["jinja"])


def show_plan(context: RunContext, trainer: "GlmTrainer", device: "torch.device") -> None:
    """Print a table of the run, and write it to plan.json: model, data, method, steps, device and folder."""
    from glmtuner.data.segments import Packs
    from glmtuner.finetuning.targets import adapted_layers, adapted_ranks, ranks_summary
    from glmtuner.models.sizes import active_summary

    run, model, data = context.run, context.model, context.data
    arguments = trainer.args
    train_rows: Any = trainer.train_dataset
    trained, total, beside = sizes(model, context.family)
    towers = f"; {', '.join(context.family.towers)} ({beside:,} more) as they are" if beside else ""
    rows = [("model", f"{run.model.model_name_or_path} ({context.family.name}), {total:,} parameters{towers}")]
    if active := active_summary(model):
        rows.append(("active", active))
    rows += [("data", f"{part.spec.name}: {part.counts.summary()}") for part in data.prepared]
    if run.data.mix_probabilities and data.train is not None:
        rows.append(("mix", ", ".join(f"{name} {share:.1%}" for name, share in data.shares.items())))
    if run.data.weights and data.train is not None:
        each = zip(run.data.dataset, run.data.weights, strict=True)
        rows.append(("weights", ", ".join(f"{name} {weight:g}" for name, weight in each)))
    if mode := data.thinking():
        words = {None: "as each record was learned", True: "with thinking on", False: "with thinking off"}
        asked = run.generation.thinking
        chat = f", chat and serve with thinking {mode if asked is AskedThinking.auto else asked.value}"
        predictions = f"predictions {words[data.asks_thinking]}{chat if data.train is not None else ''}"
        rows.append(("thinking", f"data.thinking={run.data.thinking.value}; {predictions}"))
    if data.evaluation is not None:
        rows.append(("evaluation", f"{len(data.evaluation):,} records"))
    if data.train is not None:
        rows.append(("method", f"{run.finetuning.finetuning_type}: {trained:,} of them trained, {trained / total:.4%}"))
        if adapted := adapted_layers(model):
            rows.append(("adapters", adapters_summary(adapted, context.family)))
        if len(ranks := adapted_ranks(model)) > 1:
            rows.append(("ranks", ranks_summary(ranks)))
        kind = "records"
        if isinstance(train_rows, Packs):
            filled = int(train_rows.lengths.sum(dtype="int64")) / (len(train_rows) * train_rows.capacity)
            rows.append(("packed", f"{len(train_rows):,} rows of {train_rows.capacity:,} tokens, {filled:.1%} full"))
            kind = "packed rows"
        rows.append(("steps", steps_summary(arguments, len(train_rows), kind, run.parallel.ranks_per_row)))
    if data.train is not None or run.trainer.do_eval:
        rows.append(("fast paths", fast_paths_summary(trainer.left_out)))
    precision = (
        "bf16"
        if arguments.bf16
        else "fp16"
        if arguments.fp16
        else str(next(model.parameters()).dtype).removeprefix("torch.")
    )
    rows.append(("device", f"{device}, {precision}"))
    rows.append(("run folder", str(context.folder.path)))
    if arguments.should_save:
        write_json(context.folder / PLAN, {"plan": rows})
    table("", ("", ""), rows, show_header=False)


def sizes(model: "nn.Module", family: Family) -> tuple[int, int, int]:
    """The numbers of trained parameters, of all of the language model's, and of its towers for images and sound."""
    from glmtuner.models.sizes import sizes_of
    from glmtuner.models.unwrap import unwrapped

    base = unwrapped(model)
    modules = dict(base.named_modules())
    towers = {value for path in family.towers if path in modules for value in modules[path].parameters()}
    counts = sizes_of(model)
    beside = sum(count for value, count in counts.items() if value in towers)
    trained = sum(count for value, count in counts.items() if value.requires_grad)
    return trained, sum(counts.values()) - beside, beside


def adapters_summary(adapted: Mapping[str, int], family: Family) -> str:
    """The layers that have a LoRA with their numbers, and the linear layers that `all` leaves out, with the reasons."""
    layers = ", ".join(f"{name} ×{count}" for name, count in adapted.items())
    if not {*family.linears} <= adapted.keys():
        return layers
    by_reason: dict[str, list[str]] = {}
    for name in family.left_out.keys() - adapted.keys():
        by_reason.setdefault(family.left_out[name], []).append(name)
    without = [f"{', '.join(sorted(names))} ({reason})" for reason, names in sorted(by_reason.items())]
    return "; ".join([layers, *([f"left out: {', '.join(without)}"] if without else [])])


def fast_paths_summary(left_out: Mapping[FastPath, str]) -> str:
    """The optimizations in use, and the others with the reasons, as one phrase."""
    used = [path.value for path in FastPath if path not in left_out]
    by_reason: dict[str, list[str]] = {}
    for path in FastPath:
        if left_out.get(path):
            by_reason.setdefault(left_out[path], []).append(path.value)
    without = [f"{' and '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return "; ".join([", ".join(used) or "none", *([f"left out: {', '.join(without)}"] if without else [])])


def steps_summary(arguments: "TrainingArguments", records: int, kind: str, sequence: int = 1) -> str:
    """Optimizer steps, their batch size over all ranks, of which `sequence` share a row, and epochs, as one phrase."""
    world = max(arguments.world_size // sequence, 1)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    steps_per_epoch = max(
        math.ceil(
            math.ceil(records / world / arguments.per_device_train_batch_size) / arguments.gradient_accumulation_steps
        ),
        1,
    )
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch)
    return f"{steps:,} of {batch} {kind}, {steps / steps_per_epoch:g} epochs"
