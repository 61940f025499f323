"""The parts of a run put together: family, template, and the model with its checkpoints and its fine-tuning method."""

import dataclasses
import gc
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed, compose, run_folder_of
from glmtuner.config.schema import SCHEMA_CLASSES, Dtype, Model, Run
from glmtuner.console import say
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.family import Family, family_from_structure, family_named, family_of
from glmtuner.families.template import template_named
from glmtuner.hub import read_config
from glmtuner.run_folder import TEMPLATE, RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

LIGER = "liger-kernel>=0.8.5"  # from here on it has a SwiGLU of one tensor, which is how GLM computes it
# what a checkpoint's base must share, in all the words that config.json files have for it
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_layers", "vocab_size", "padded_vocab_size")


def check_base(model: Model, found: Mapping[str, Any]) -> None:
    """Raise when a checkpoint's run was trained on a base of another shape."""
    for path in model.checkpoint_dir:
        source = run_folder_of(path)
        wanted = RunFolder(source).provenance().get("base", {}) if source else {}
        different = [
            f"{key} {wanted[key]} there, {found.get(key)} here" for key in wanted if wanted[key] != found.get(key)
        ]
        if different:
            raise CheckpointError(
                f"model.model_name_or_path={model.model_name_or_path} does not fit model.checkpoint_dir={path} "
                f"({', '.join(different)}); leave the model out, and the checkpoint's own is used"
            )


def check_liger(run: Run, found: Mapping[str, Any]) -> None:
    """Raise where Liger's kernels are asked for and are not there: without a word, transformers would go on without them."""
    if (left := sys.modules.get("glmtuner.models.liger")) is not None:
        left.restore_modules()  # by an earlier job of this process
    if not run.trainer.use_liger_kernel:
        return
    asked = "trainer.use_liger_kernel=true"
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(f"{asked}: liger-kernel is not installed here; type pip install '{LIGER}', or leave it out")
    from packaging.requirements import Requirement

    version = importlib.metadata.version("liger-kernel")
    if not Requirement(LIGER).specifier.contains(version, prereleases=True):
        raise ConfigError(f"{asked}: liger-kernel {version} is too old; type pip install '{LIGER}', or leave it out")
    quieten_libraries()
    from glmtuner.models.liger import KNOWN, kernels_for

    kind = found.get("model_type")
    if kind not in KNOWN:
        raise ConfigError(
            f"{asked} with model_type={kind}: liger-kernel {version} has no kernels for it; leave it out (there are kernels "
            f"for {', '.join(sorted(KNOWN))})"
        )
    for name, value in (run.trainer.liger_kernel_config or {}).items():
        if name not in (known := kernels_for(kind)) or not isinstance(value, bool):
            raise ConfigError(
                f"trainer.liger_kernel_config={{{name}: {str(value).lower()}}}: the kernels for model_type={kind} are "
                f"{', '.join(known)}, each true or false; type 'trainer.liger_kernel_config={{{known[0]}: true}}'"
            )


def check_liger_runs(run: Run, device: "torch.device") -> None:
    """Raise where Liger's kernels are asked for on a device that Triton does not compile for."""
    if run.trainer.use_liger_kernel and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"trainer.use_liger_kernel=true: Liger's kernels run on GPUs that Triton compiles for, and this run is on the "
            f"{device.type}; leave it out"
        )


def settle_family(run: Run, model_config: Mapping[str, Any]) -> Family | None:
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


def load_libraries(*, compiles: bool, trains: bool) -> None:
    """Import what a run needs of torch, transformers and PEFT, silently and at once.

    What makes these imports slow is switched off while they last: the garbage collector, which would look again and again
    through all that was imported and finds nothing to free; and, where nothing `compiles`, torch.compile. bitsandbytes,
    which PEFT imports wherever it is installed, calls it for the kernels that it writes in plain torch, and TorchInductor
    is loaded for them.
    """
    quieten_libraries()
    # rows of ever other lengths leave holes in a GPU's memory; segments that grow have none
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    compiling = os.environ.get("TORCHDYNAMO_DISABLE")
    first = "torch" not in sys.modules  # later, in the next job of a sweep, a frozen object might be a model
    if first:
        gc.disable()
    if not compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import peft  # noqa: F401
        import transformers

        import glmtuner.models  # noqa: F401

        if trains:
            from transformers import Trainer  # noqa: F401
    finally:
        if compiling is None:
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = compiling
        if first:
            gc.freeze()  # modules stay to the end: no later collection looks through them
            gc.enable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def quieten_libraries() -> None:
    """Progress and our own lines only; the libraries' chatter about what works as intended is left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels it can do without
    # PEFT still uses names that transformers renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def template_of(run: Run, family: Family | None, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The chat template: the run's, else the family's; the one stored with a checkpoint when it is a tokenizer's own."""
    name = run.model.template or (family.template if family else "tokenizer")
    source = run_folder_of(run.model.checkpoint_dir[-1]) if run.model.checkpoint_dir else None
    if name == "tokenizer" and source is not None and (source / TEMPLATE).is_file():
        tokenizer.chat_template = (source / TEMPLATE).read_text(encoding="utf-8")
    run.model.template = name
    return template_named(name, tokenizer)


def device_of(run: Run) -> "torch.device":
    """The accelerator that transformers will train on, or the CPU."""
    import torch

    if run.trainer.use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def has_bfloat16(device: "torch.device") -> bool:
    """Whether it is a GPU with bfloat16; of one that is not in this machine that is supposed."""
    import torch

    return device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())


def compute_dtype(run: Run, device: "torch.device") -> "torch.dtype":
    """What quantized layers multiply in: the run's precision, else bf16 where the GPU has it, else float32."""
    import torch

    if run.trainer.bf16 or run.trainer.fp16:
        return torch.bfloat16 if run.trainer.bf16 else torch.float16
    if run.model.dtype is not Dtype.auto:
        return getattr(torch, run.model.dtype.value)
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def attached_model(composed: Composed, family: Family | None, device: "torch.device") -> "tuple[nn.Module, Family]":
    """The base with its checkpoints and the fine-tuning method, and the family where only the model could tell."""
    from transformers import set_seed

    from glmtuner.finetuning.start import attach, base_folder, checkpoints_of
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
    model = attach(
        model,
        run.finetuning,
        family,
        checkpoints,
        resume_lora=run.model.resume_lora_training,
        trains=run.trainer.do_train,
        typed=composed.typed,
    )
    return model, family


def stop_ids(template: Any, tokenizer: "PreTrainedTokenizerBase", family: str) -> tuple[int, ...]:
    """The template's stop token, the family's, and the tokenizer's own end of text."""
    from glmtuner.families.family import FAMILIES

    found = set(template.stop_ids(tokenizer))
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    for token in FAMILIES[family].stop_tokens if family in FAMILIES else ():
        known = tokenizer.convert_tokens_to_ids(token)
        if known is not None and known != tokenizer.unk_token_id:
            found.add(known)
    return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run, ready to answer: what its folder alone tells, and what was typed over it."""

    run: Run
    model: "nn.Module"
    tokenizer: "PreTrainedTokenizerBase"
    template: Any
    family: Family
    stops: tuple[int, ...]


def is_policy(path: Path) -> bool:
    """Whether the run in a folder trained a model that answers; taken for one where no run tells."""
    source = run_folder_of(str(path))
    name = RunFolder(source).config().get("stage", {}).get("name", "sft") if source else "sft"
    stage = SCHEMA_CLASSES["stage"].get(name)
    return stage is None or stage.policy


def finished_run(folders: Sequence[Path], words: Sequence[str], *, to_talk: bool = True) -> Finished:
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
    composed = compose(["trainer=predict", f"model.checkpoint_dir=[{paths}]", *words])
    run = composed.run
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    family = settle_family(run, model_config)
    load_libraries(compiles=run.quant.bits is not None, trains=False)
    tokenizer = load_tokenizer(run.model)
    template = template_of(run, family, tokenizer)
    model, family = attached_model(composed, family, device_of(run))
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
