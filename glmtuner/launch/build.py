"""Builds the parts of a run: family, template, and the model with its checkpoints and its fine-tuning method."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed, compose, run_folder_of
from glmtuner.config.groups import SCHEMA_CLASSES, AskedThinking, Finetuning
from glmtuner.config.new_tokens import new_tokens_in
from glmtuner.config.overrides import quoted_value
from glmtuner.config.paths import PACKAGE_MODEL
from glmtuner.config.schema import Run
from glmtuner.console import complain, say
from glmtuner.distributed.shares import computed_with_stand_ins
from glmtuner.errors import CheckpointError, TrainingError
from glmtuner.families.family import Family, families_that_fit, family_named, family_of
from glmtuner.families.hub import read_config
from glmtuner.families.stop_tokens import stop_ids
from glmtuner.families.structure import family_from_structure
from glmtuner.inference.finished import Finished
from glmtuner.launch.between_jobs import base_key_of
from glmtuner.launch.checks import check_base
from glmtuner.launch.device import compute_dtype, device_of
from glmtuner.launch.libraries import load_libraries
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import MODEL, RECEIPT, TEMPLATE
from glmtuner.templates.base import TEMPLATES, Template
from glmtuner.templates.named import template_named
from glmtuner.templates.stored import EARLIER, version_stored

REWARD_MODEL = "a reward model"  # the stage in an exported model's receipt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.finetuning.start import Checkpoint


def resolve_family(run: Run, model_config: Mapping[str, Any]) -> tuple[Family | None, Finetuning]:
    """The model family by config.json, and the method with its targets filled in.

    If only the loaded model's structure can tell, the family is None and the method unchanged.
    """
    finetuning = run.finetuning
    family = family_of(model_config, run.model.family)
    if run.model.family != "auto":
        declared = family_named(run.model.family)
        if family is None:
            family = declared
        elif family.name != declared.name:
            say(
                f"model.family={declared.name}, but config.json has model_type={model_config.get('model_type')}: "
                f"{family.name} is used"
            )
            if getattr(finetuning, "lora_target", None) == list(declared.attention):  # the default of the other family
                finetuning = dataclasses.replace(finetuning, lora_target=[])  # type: ignore[call-arg]  # the method has the field
    elif family is not None and run.model.template is None:
        others = [each.name for each in families_that_fit(model_config) if each.template != family.template]
        if others:
            say(
                f"model.family=auto: config.json fits {', '.join([family.name, *others])}, which are prompted differently; "
                f"{family.name} is used, with model.template={family.template}; type model.family={others[0]}, or model.template=…, "
                "for another prompt"
            )
    layers = model_config.get("num_hidden_layers") or model_config.get("num_layers")
    if family is not None and layers:
        finetuning = finetuning.resolved(family, layers)
    return family, finetuning


def resolve_template(
    run: Run, family: Family | None, tokenizer: "PreTrainedTokenizerBase", resumed: Path | None = None
) -> tuple[str, Template]:
    """The chat template and its name: the run's, else the family's, else the tokenizer's own.

    A run that is resumed, and whatever starts from a checkpoint or an exported model, keeps the version of the template that
    is stored there; a stored Jinja template is set as the tokenizer's. `resumed` is the folder of the run whose training goes
    on. Raises CheckpointError where another template is named for that run.
    """
    source = resumed or trained_source(run)
    about = stored_template(source) if source is not None else {}
    name = run.model.template or stored_name(source) or (family.template if family else "tokenizer")
    if resumed is not None and (trained := stored_name(resumed) or name) != name:
        raise CheckpointError(
            f"model.template={name}: the run in {resumed} is trained with model.template={trained}; leave model.template out to "
            "resume it, or type another trainer.output_dir"
        )
    if name == "tokenizer" and source is not None and (source / TEMPLATE).is_file():
        tokenizer.chat_template = (source / TEMPLATE).read_text(encoding="utf-8")
    thinking = run.data.thinking.value
    if source is not None and (resumed or not run.trainer.do_train) and "thinking" not in about:
        thinking = "empty"  # trained before there were modes: its prompts are those of the template's default
    template = template_named(name, tokenizer, thinking=thinking, asks_thinking=asked_mode(run))
    if run.generation.thinking is not AskedThinking.auto and not template.has_modes(tokenizer):
        say(
            f"generation.thinking={run.generation.thinking.value} has no effect: model.template={name} has no modes with and without "
            "thinking"
        )
    if about.get("name") != template.name or "example" not in about:
        return name, template
    stored = version_stored(template.name, about)
    if stored is None:
        complain(
            f"model.template={name}: {source} was trained with another version of it, which this version of glmtuner does not have "
            f"({json.dumps(about['example'], ensure_ascii=False)}); its prompts are today's, so answers may be worse: train it "
            "again, or use the version of glmtuner that it was trained with"
        )
    base = run.model.model_name_or_path
    if stored in EARLIER and base.startswith(PACKAGE_MODEL) and source is not None and not (source / MODEL).is_dir():
        complain(
            f"model.model_name_or_path={base}: {source} was trained on the weights of an earlier version of glmtuner, and this one "
            "has others; its answers are worth nothing with them: train it again, or use the version of glmtuner that it was "
            "trained with"
        )
    return name, stored or template


def trained_source(run: Run) -> Path | None:
    """The folder that says with which template the weights were trained: that of a run, or of an exported model."""
    if run.model.checkpoint_dir:
        return run_folder_of(run.model.checkpoint_dir[-1])
    base = Path(run.model.model_name_or_path).expanduser()
    if not base.is_dir():
        return None
    return base if (base / RECEIPT).is_file() else run_folder_of(str(base))


def stored_name(source: Path | None) -> str | None:
    """The name of the template that a run or an exported model was trained with; None where nothing says."""
    if source is None:
        return None
    if (source / RECEIPT).is_file():
        name = stored_template(source).get("name")
        return name if name in TEMPLATES else None  # the tokenizer's own, which lies beside it
    name = RunFolder(source).config().get("model", {}).get("template")
    return name if isinstance(name, str) else None


def stored_template(source: Path) -> Mapping[str, Any]:
    """The description of the template in a folder's provenance.json or export.json; where there is none, one with all keys."""
    receipt = source / RECEIPT
    about = (read_object(receipt) if receipt.is_file() else RunFolder(source).provenance()).get("template")
    return about if isinstance(about, dict) else {"thinking": ""}


def asked_mode(run: Run) -> bool | None:
    """The mode in which the model is asked: generation.thinking, else that in which the checkpoint was trained.

    None where neither says: a base model, or a template without modes.
    """
    if run.generation.thinking is not AskedThinking.auto:
        return run.generation.thinking is AskedThinking.on
    source = run_folder_of(run.model.checkpoint_dir[-1]) if run.model.checkpoint_dir else None
    stored = RunFolder(source).provenance().get("thinking") if source is not None else None
    return {"on": True, "off": False}.get(str(stored))


def load_trainable_model(
    composed: Composed,
    finetuning: Finetuning,
    family: Family | None,
    device: "torch.device",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    load: "Callable[..., PreTrainedModel] | None" = None,
    *,
    in_shares: bool = False,
) -> "tuple[PreTrainedModel, Finetuning, Family]":
    """The base model with checkpoints applied and the method attached, the method with the settings in use, and the family.

    It has a row for each new token of the tokenizer. `load` takes the place of `load_model`. `in_shares`: the model is going to be
    sharded over the ranks, and holds the weights in shares (glmtuner/distributed/shares.py) where nothing needs them whole.
    """
    from transformers import set_seed

    from glmtuner.finetuning.start import base_folder, build_trainable_model, checkpoints_of
    from glmtuner.models.load import is_finite, load_model
    from glmtuner.models.new_tokens import add_rows, say_untrained
    from glmtuner.models.warm import base_model

    run = composed.run
    checkpoints = checkpoints_of(run.model)
    folder = base_folder(checkpoints)
    source = dataclasses.replace(run.model, model_name_or_path=str(folder), config_name=None) if folder else run.model
    dtype = compute_dtype(run, device)
    whole = why_whole(run, finetuning, checkpoints) if in_shares else None
    in_shares = in_shares and whole is None
    if whole is not None:
        say(f"parallel={run.parallel.name}: every process loads the whole model, before it keeps its shard ({whole})")
    model = base_model(
        base_key_of(run, family, device) if load is None else None,
        lambda: (load or load_model)(
            source,
            family,
            run.quant,
            device,
            dtype,
            sharded=run.parallel.sharded,
            **({"in_shares": True} if in_shares else {}),
        ),
    )
    if tokenizer is not None:
        add_rows(model, tokenizer, learned=new_tokens_in(folder) if folder else ())
    run.quant.prepare(model)
    if family is None:
        family = family_from_structure(model)
        if not family.lora_targets:
            say(
                f"model.family=auto: no projections of attention or of a recurrent state were recognised in {type(model).__name__}; "
                "finetuning=lora needs names in finetuning.lora_target"
            )
        finetuning = finetuning.resolved(family, len(family.blocks(model)))
    set_seed(run.trainer.seed)  # a method's random initialisation does not depend on what was loaded before
    model, finetuning = build_trainable_model(
        model,
        finetuning,
        family,
        checkpoints,
        resume_lora=run.model.resume_lora_training,
        trains=run.trainer.do_train,
        user_keys=composed.user_keys,
    )
    if in_shares and (wrong := computed_with_stand_ins(model, is_finite)):
        raise TrainingError(
            f"parallel={run.parallel.name} finetuning={finetuning.finetuning_type}: {wrong[0]} starts from the model's weights, of which "
            "every process has loaded its share only; type parallel=ddp, and please report this"
        )
    if run.trainer.do_train:
        say_untrained(model, finetuning.finetuning_type)
    return model, finetuning, family


def why_whole(run: Run, finetuning: Finetuning, checkpoints: "Sequence[Checkpoint]") -> str | None:
    """What needs the values of whole weights before they are sharded; None where every rank can load its share."""
    from glmtuner.finetuning.start import adapter_to_resume

    if run.data.new_tokens:
        return "data.new_tokens start at the mean of other rows"
    if (reads := finetuning.needs_values()) is not None:
        return f"finetuning.{reads} reads weights"
    resumed = adapter_to_resume([*checkpoints], finetuning, run.model.resume_lora_training, run.trainer.do_train)
    merged = [each for each in checkpoints if not each.kind.is_whole_model and each is not resumed]
    if merged:
        return f"{merged[0].folder} is merged into it"
    if run.model.reward_model is not None and finetuning.saved_as == "model":
        return "model.reward_model is compared with it"
    return None


def is_policy(path: Path) -> bool:
    """Whether the run in a folder trained a model that generates answers, also of an exported one; true where nothing says."""
    source = run_folder_of(str(path))
    if source is None and (path / RECEIPT).is_file():
        return read_object(path / RECEIPT).get("stage") != REWARD_MODEL
    name = RunFolder(source).config().get("stage", {}).get("name", "sft") if source else "sft"
    stage = SCHEMA_CLASSES["stage"].get(name)
    return stage is None or bool(getattr(stage, "policy", True))


def is_exported_model(path: Path) -> bool:
    """Whether a folder is what `export` wrote of a run, a whole model; an exported prefix is an adapter."""
    return (path / RECEIPT).is_file() and (path / "config.json").is_file() and run_folder_of(str(path)) is None


def finished_run(folders: Sequence[Path], overrides: Sequence[str], *, generates: bool = True) -> Finished:
    """The run in the last folder, with the checkpoints of all folders applied in order, and with `overrides`.

    The first folder may also be an exported model, which then is the base. Raises GlmtunerError where a folder holds no trained weights, where an override is illegal, or where the run
    `generates` and is a reward model.
    """
    from glmtuner.models.load import load_tokenizer

    if generates and not is_policy(folders[-1]):
        raise CheckpointError(
            f"{folders[-1]} holds a reward model, which scores answers and generates none; name the run that it was trained from, "
            "or one of stage=ppo"
        )
    first, *others = folders
    chosen = any(override.startswith(("model=", "model.model_name_or_path=")) for override in overrides)
    base: list[str] = []
    if is_exported_model(first) and not chosen:
        base = ["model=causal_lm", f"model.model_name_or_path={quoted_value(str(first))}"]
        base += [] if others else ["finetuning=none"]
    paths = ",".join(quoted_value(str(folder)) for folder in (others if base else folders))
    composed = compose(["trainer=predict", *base, f"model.checkpoint_dir=[{paths}]", *overrides])
    run = composed.run
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    family, finetuning = resolve_family(run, model_config)
    load_libraries(compiles=run.quant.bits is not None, trains=False)
    tokenizer = load_tokenizer(run.model, run.data.new_tokens)
    _, template = resolve_template(run, family, tokenizer)
    model, finetuning, family = load_trainable_model(composed, finetuning, family, device_of(run), tokenizer)
    if not run.quant.bits:
        model.to(device_of(run))  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    return Finished(
        run=run,
        model=model.eval(),
        tokenizer=tokenizer,
        template=template,
        family=family,
        finetuning=finetuning,
        stops=stop_ids(template, tokenizer, family.name, model),
    )
