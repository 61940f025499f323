"""The parts of a run put together: family, template, and the model with its checkpoints and its fine-tuning method."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed, compose, run_folder_of
from glmtuner.config.groups import SCHEMA_CLASSES
from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.families.family import Family, family_from_structure, family_named, family_of
from glmtuner.families.hub import read_config
from glmtuner.families.stop_tokens import stop_ids
from glmtuner.inference.finished import Finished
from glmtuner.launch.checks import check_base
from glmtuner.launch.device import compute_dtype, device_of
from glmtuner.launch.libraries import load_libraries
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import TEMPLATE
from glmtuner.templates.named import template_named

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def resolve_family(run: Run, model_config: Mapping[str, Any]) -> Family | None:
    """The family that config.json tells, with the method's targets named; None when only the loaded model can tell."""
    family = family_of(model_config, run.model.family)
    if run.model.family != "auto":
        declared = family_named(run.model.family)
        if family is None:
            family = declared
        elif family.name != declared.name:
            say(
                f"model.family={declared.name}, and config.json says {model_config.get('model_type')}: taken as {family.name}"
            )
            if getattr(run.finetuning, "lora_target", None) == list(declared.attention):
                run.finetuning.lora_target = []  # type: ignore[attr-defined]  # the default of the other family
    layers = model_config.get("num_hidden_layers") or model_config.get("num_layers")
    if family is not None and layers:
        run.finetuning.settle(family, layers)
    return family


def resolve_template(run: Run, family: Family | None, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The chat template: the run's, else the family's; the one stored with a checkpoint when it is a tokenizer's own."""
    name = run.model.template or (family.template if family else "tokenizer")
    source = run_folder_of(run.model.checkpoint_dir[-1]) if run.model.checkpoint_dir else None
    if name == "tokenizer" and source is not None and (source / TEMPLATE).is_file():
        tokenizer.chat_template = (source / TEMPLATE).read_text(encoding="utf-8")
    run.model.template = name
    return template_named(name, tokenizer)


def load_trainable_model(
    composed: Composed, family: Family | None, device: "torch.device"
) -> "tuple[nn.Module, Family]":
    """The base with its checkpoints and the fine-tuning method, and the family where only the model could tell."""
    from transformers import set_seed

    from glmtuner.finetuning.start import base_folder, build_trainable_model, checkpoints_of
    from glmtuner.models.load import load_model

    run = composed.run
    checkpoints = checkpoints_of(run.model)
    whole = base_folder(checkpoints)
    source = dataclasses.replace(run.model, model_name_or_path=str(whole), config_name=None) if whole else run.model
    dtype = compute_dtype(run, device)
    model = load_model(source, family, run.quant, device, dtype, sharded=run.parallel.sharded)
    run.quant.prepare(model)
    if family is None:
        family = family_from_structure(model)
        run.finetuning.settle(family, len(family.blocks(model)))
    set_seed(run.trainer.seed)  # what a method draws does not depend on what was loaded before it
    model = build_trainable_model(
        model,
        run.finetuning,
        family,
        checkpoints,
        resume_lora=run.model.resume_lora_training,
        trains=run.trainer.do_train,
        user_keys=composed.user_keys,
    )
    return model, family


def is_policy(path: Path) -> bool:
    """Whether the run in a folder trained a model that answers; taken for one where no run tells."""
    source = run_folder_of(str(path))
    name = RunFolder(source).config().get("stage", {}).get("name", "sft") if source else "sft"
    stage = SCHEMA_CLASSES["stage"].get(name)
    return stage is None or stage.policy


def finished_run(folders: Sequence[Path], overrides: Sequence[str], *, to_talk: bool = True) -> Finished:
    """The run in the last folder, on the checkpoints of all of them in order; `words` are composed over it.

    Raises GlmtunerError where a folder holds no trained weights, where a word is wrong, or where the run is `to_talk` and
    is no model that answers.
    """
    from glmtuner.models.load import load_tokenizer

    if to_talk and not is_policy(folders[-1]):
        raise CheckpointError(
            f"{folders[-1]} holds a reward model: it scores answers and gives none; name the run of a model that answers, such as "
            "the one it was trained from or one of stage=ppo"
        )
    paths = ",".join(f"'{folder}'" for folder in folders)
    composed = compose(["trainer=predict", f"model.checkpoint_dir=[{paths}]", *overrides])
    run = composed.run
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    family = resolve_family(run, model_config)
    load_libraries(compiles=run.quant.bits is not None, trains=False)
    tokenizer = load_tokenizer(run.model)
    template = resolve_template(run, family, tokenizer)
    model, family = load_trainable_model(composed, family, device_of(run))
    if not run.quant.bits:
        model = model.to(device_of(run))
    return Finished(
        run=run,
        model=model.eval(),
        tokenizer=tokenizer,
        template=template,
        family=family,
        stops=stop_ids(template, tokenizer, family.name),
    )
