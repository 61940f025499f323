"""Which jobs of a sweep can share a base, and why the others cannot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.compose import Composed
from glmtuner.config.optimizers import LOMO
from glmtuner.config.schema import Run
from glmtuner.finetuning.initial import changes_base
from glmtuner.run_folder.redaction import flatten

# What jobs have in common: of whole groups every key, of the trainer those that the process or the base has once. An adapter, an
# optimizer, draws, evaluations and predictions are each job's own.
COMMON_GROUPS = ("model", "quant", "data", "stage", "parallel", "plugins")
COMMON_TRAINER_KEYS = (
    "bf16", "fp16", "tf32", "use_cpu", "full_determinism", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "log_level", "accelerator_config",
)  # fmt: skip
LORA_PARTS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)  # beside plain LoRA


def reason_apart(composed: Composed) -> str | None:
    """Why a job shares its base with no other; None where it could."""
    return next(_reasons(composed.run), None)


def _reasons(run: Run) -> Iterator[str]:
    trainer, method = run.trainer, run.finetuning
    if run.stage.name != "sft":
        yield f"stage={run.stage.name} is not stage=sft"
    if not trainer.do_train:
        yield "trainer.do_train=false: it trains nothing"
    if method.finetuning_type != "lora":
        yield f"finetuning={method.finetuning_type} is no LoRA on a frozen base"
        return
    for name in LORA_PARTS:
        if value := getattr(method, name, None):
            yield f"finetuning.{name}={_shown(value)} trains or computes more than a plain LoRA"
    if getattr(getattr(method, "bias", None), "value", "none") != "none":
        yield f"finetuning.bias={_shown(getattr(method, 'bias', None))} trains biases of the base"
    if changes_base(getattr(method, "init_lora_weights", True)):
        yield f"finetuning.init_lora_weights={_shown(getattr(method, 'init_lora_weights', None))} changes the base"
    if run.quant.bits == 8:
        yield "quant=int8: which columns are computed in 16 bits depends on all tokens of a row, those of other jobs included"
    if run.model.checkpoint_dir:
        yield "model.checkpoint_dir merges weights into the base, or resumes an adapter"
    if run.data.new_tokens:
        yield "data.new_tokens trains rows of the base's embeddings"
    if run.parallel.name != "none":
        yield f"parallel={run.parallel.name}: ranks do not share a base"
    if not (run.data.padding_free and run.data.ignore_pad_token_for_loss):
        yield "data.padding_free=false, or data.ignore_pad_token_for_loss=false: jobs share a row without padding"
    for name in ("neftune_noise_alpha", "torch_compile", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval"):
        if value := getattr(trainer, name):
            yield f"trainer.{name}={_shown(value)} changes how the base computes"
    if trainer.optim.value in LOMO:
        yield f"trainer.optim={trainer.optim.value} takes its steps in the backward pass"
    if trainer.dataloader_num_workers:
        yield f"trainer.dataloader_num_workers={trainer.dataloader_num_workers}: a process of several threads starts no workers"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))


def common_values(composed: Composed, env_set: Mapping[str, Any]) -> dict[str, Any]:
    """The values, by dotted key, in which the jobs of a group agree; `env_set` is the job's hydra.job.env_set."""
    config = OmegaConf.to_container(composed.config, enum_to_str=True)
    assert isinstance(config, dict)
    kept: dict[str, Any] = {name: config.get(name) for name in COMMON_GROUPS}
    kept["trainer"] = {name: config["trainer"].get(name) for name in COMMON_TRAINER_KEYS}
    return {**flatten(kept), **{f"hydra.job.env_set.{name}": value for name, value in env_set.items()}}


def grouped(values: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The places of the jobs whose `common_values` agree, group by group in the order of their first jobs."""
    groups: dict[str, list[int]] = {}
    for place, each in enumerate(values):
        groups.setdefault(json.dumps(each, sort_keys=True, default=str), []).append(place)
    return list(groups.values())


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which the common values of two groups differ."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
