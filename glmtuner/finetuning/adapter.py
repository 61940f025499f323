"""A saved LoRA adapter: its adapter_config.json, read as a whole, and its weights, all of which must fit.

A setting of adapter_config.json is passed on to PEFT, or the adapter is refused by the setting's name: none is left out, since
what is left out would compute something else.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError
from glmtuner.families.weight_files import tensor_shapes
from glmtuner.finetuning.trained import assign, check_fit, load_tensors, require_finite

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

# Without an effect on what an adapter computes, or, as fan_in_fan_out, known to `peft_config`.
DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# How weights were initialized that the file now holds: without effect unless init_lora_weights asks for it.
INITIAL = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# Initializations that leave the base as it is, and those that change it in the same way each time.
HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
REPEATABLE = (*HARMLESS, "pissa", "olora")
# Why PEFT does not load others as they were trained; by the beginning of their names.
CONVERT = (
    "convert the adapter where it was trained, with PEFT's save_pretrained(path_initial_model_for_weight_conversion=<the folder of the "
    "adapter before its training>)"
)
UNREPEATABLE = {
    "pissa_niter_": f"it took a random SVD off the base's weights, which loading draws again with other values, in PEFT too; {CONVERT}",
    "corda": f"it took directions of its data off the base's weights, without which PEFT does not load it either; {CONVERT}",
    "lora_ga": f"it took directions of its data off the base's weights, which PEFT leaves out when it loads the adapter; {CONVERT}",
    "loftq": (
        "it rounded the base's weights, which PEFT repeats on a GPU alone; merge it where it was trained, with PEFT's "
        "merge_and_unload(), save that, and name it in model.model_name_or_path"
    ),
}
# Active settings that are refused, with the reason.
REFUSED = {
    "layer_replication": (
        "it adds layers to the model, which share weights and are not merged correctly; merge it into its base with PEFT's "
        "merge_and_unload, save that, and name it in model.model_name_or_path"
    ),
    "alora_invocation_tokens": "the adapter is active only after these tokens, which generation here does not follow",
    "use_qalora": "it trains on pooled inputs of a GPTQ model, which is not supported",
    "velora_config": "its compressed activations are not supported",
    "monteclora_config": "its sampled updates are not supported",
    "arrow_config": "it routes between several adapters, which is not supported",
    "use_bdlora": "its block-diagonal updates are not supported",
    "kasa_config": "it replaces the base's weights by a truncated SVD, which is not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
}
# What the other settings may be, apart from null.
Check = tuple[Callable[[Any], bool], str]
_names: Check = (
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "a list of names",
)
_targets: Check = (lambda value: _is_pattern(value) or _names[0](value), "a list of names or a regular expression")
_flag: Check = (lambda value: isinstance(value, bool), "true or false")
_size: Check = (lambda value: _is_int(value) and value >= 1, "a whole number of at least 1")
_scale: Check = (lambda value: _is_number(value) and value > 0, "a number above 0")
_layers: Check = (
    lambda value: _is_int(value) or (isinstance(value, list) and all(map(_is_int, value))), "a layer's number or a list of them"
)  # fmt: skip
KNOWN: dict[str, Check] = {
    "r": _size,
    "lora_alpha": _scale,
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a share in [0, 1)"),
    "target_modules": _targets,
    "exclude_modules": _targets,
    "target_parameters": _names,
    "modules_to_save": _names,
    "layers_to_transform": _layers,
    "layers_pattern": _targets,
    "rank_pattern": (lambda value: _is_pattern_of(value, _size[0]), "regular expressions with a rank of at least 1 each"),
    "alpha_pattern": (lambda value: _is_pattern_of(value, _scale[0]), "regular expressions with a number above 0 each"),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "ensure_weight_tying": _flag,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a name"),
    "trainable_token_indices": (
        lambda value: all(map(_is_ids, value.values())) if isinstance(value, dict) else _is_ids(value),
        "a list of token ids, or one for each embedding",
    ),
}  # fmt: skip
EMBEDDINGS = {"embed_tokens", "lm_head", "word_embeddings", "output_layer", "wte"}
REQUIRED = ("r", "lora_alpha")
EVERY_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules"}  # the settings that every adapter has


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; raises CheckpointError if it is not a JSON object with a `peft_type`."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({' '.join(str(error).split())[:200]}); use another checkpoint"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{path} is damaged: it is not an object with a peft_type; use another checkpoint")
    return config


def read_lora_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter that PEFT loads as it was trained.

    Raises CheckpointError, with every reason, for one that it would not, and for weights of another rank.
    """
    config = read_adapter_config(folder)
    problems = [f"{name} is missing" for name in REQUIRED if config.get(name) is None]
    for name, value in config.items():
        if name in KNOWN:
            fits, legal = KNOWN[name]
            if value is not None and not fits(value):
                problems.append(f"{name}={_shown(value)}: legal is {legal}")
        elif name in REFUSED:
            if value not in (None, False, []) and (value or name != "megatron_config"):  # PEFT reads {} as the defaults
                problems.append(f"{name}={_shown(value)}: {REFUSED[name]}")
        elif name not in DESCRIPTIVE | INITIAL and _is_active(value):
            problems.append(f"{name}={_shown(value)}: {_unknown(config)}")
    how = config.get("init_lora_weights")
    # PEFT before 0.5 wrote the flag as text
    if isinstance(how, str) and how.lower() not in ("true", "false") and how not in REPEATABLE:
        reasons = (reason for name, reason in UNREPEATABLE.items() if how.lower().startswith(name))
        problems.append(f"init_lora_weights={how}: {next(reasons, _unknown(config))}")
    if isinstance(config.get("target_modules"), str) and config.get("layers_to_transform") is not None:
        problems.append("layers_to_transform with a regular expression for target_modules, which excludes it")
    if config.get("target_modules") is None and not config.get("target_parameters"):
        problems.append("target_modules is missing")
    if not problems:
        problems = _rank_problems(config, folder)
    if problems:
        raise CheckpointError(f"the adapter in {folder} cannot be used as it was trained: {'; '.join(problems)}")
    return config


def _rank_problems(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Ranks that the weights do not have; they would be allocated before anything is compared."""
    pattern = config.get("rank_pattern") or {}
    # with a pattern, r may be that of no module
    highest = max([1 if pattern and config["r"] < 100_000 else config["r"], *pattern.values()])
    path, old = folder / ADAPTER, (folder / ADAPTER).with_suffix(".bin")
    if path.is_file():
        shapes = tensor_shapes(path)
        ranks = [
            shape[0] for name, shape in shapes.items() if shape and (".lora_A" in name or ".lora_embedding_A" in name)
        ]
        limit = max(ranks, default=0)
    else:
        limit = old.stat().st_size if old.is_file() else 0  # a rank is a row of values
    if limit and highest > limit and not config.get("target_parameters"):
        return [f"it has a rank of {highest}, and its weights have {limit} at most"]
    return []


def _unknown(config: Mapping[str, Any]) -> str:
    from importlib.metadata import version

    return (
        f"the installed PEFT {version('peft')} does not know it (the adapter was saved by {config.get('peft_version', 'another')}); "
        "type pip install -U peft, or remove the key if it has no effect"
    )


def lora_settings(folder: Path) -> dict[str, Any]:
    """The settings of a saved adapter, by configuration key; raises CheckpointError."""
    return settings_of(read_lora_config(folder))


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a checked adapter_config.json, by configuration key.

    A regular expression is a list of one, and so are targets among which are an embedding or the head, which have no name in
    `finetuning.lora_target`.
    """
    targets = saved.get("target_modules") or []
    if targets == "all-linear":
        targets = ["all"]
    elif isinstance(targets, list) and not EMBEDDINGS.isdisjoint(targets):
        targets = rf"(.*\.)?({'|'.join(re.escape(name) for name in sorted(targets))})"
    parameters = [] if isinstance(targets, str) else saved.get("target_parameters") or []
    tokens, layers, how = (
        saved.get(key) for key in ("trainable_token_indices", "layers_to_transform", "init_lora_weights")
    )
    return {
        "lora_rank": saved["r"],
        "lora_alpha": float(saved["lora_alpha"]),
        "lora_dropout": float(saved.get("lora_dropout") or 0.0),
        "lora_target": [targets] if isinstance(targets, str) else sorted([*targets, *parameters]),
        "init_lora_weights": how if isinstance(how, str) and how in REPEATABLE else str(how).lower() != "false",
        "bias": saved.get("bias") or "none",
        "layers_to_transform": [layers] if isinstance(layers, int) else list(layers or []),
        "trainable_token_indices": list(tokens)
        if isinstance(tokens, list)
        else [],  # a dictionary's embeddings have no key
        **{name: bool(saved.get(name)) for name in ("use_rslora", "use_dora", "lora_bias")},
        **{name: dict(saved.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")},
        **{name: _as_list(saved.get(name)) for name in ("exclude_modules", "layers_pattern", "modules_to_save")},
        "target_parameters": [],  # they are among lora_target
    }


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def is_pattern(targets: list[str]) -> bool:
    """Whether `finetuning.lora_target` is one regular expression for whole paths, instead of names."""
    return len(targets) == 1 and any(character in targets[0] for character in "*+?()[]|^$\\")


def further_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings beyond rank, alpha, dropout and targets that change what an adapter computes, where they are active."""
    ignored = EVERY_LORA | DESCRIPTIVE | INITIAL | REFUSED.keys()
    return {
        name: value
        for name, value in sorted(config.items())
        if name not in ignored and _is_active(value) and not (name == "init_lora_weights" and value in HARMLESS)
    }


def adapter_notices(folder: Path, base: str, revision: str) -> list[str]:
    """Sentences about an adapter's further settings, and about a base, revision or task that is not this run's."""
    config, notices = read_adapter_config(folder), []
    if further := further_settings(config) if config["peft_type"] == "LORA" else {}:
        listed = ", ".join(f"{name}={_shown(value)}" for name, value in further.items())
        notices.append(f"the adapter in {folder} is used with its own {listed}")
    trained_on, trained_revision, task = (
        config.get(name) for name in ("base_model_name_or_path", "revision", "task_type")
    )
    if isinstance(trained_on, str) and trained_on and _last_name(trained_on) != _last_name(base):
        notices.append(f"the adapter in {folder} was trained on {trained_on}, and is applied to {base}")
    elif isinstance(trained_revision, str) and trained_revision != revision and not Path(base).expanduser().is_dir():
        notices.append(
            f"the adapter in {folder} was trained on revision {trained_revision} of {base}, and is applied to {revision}"
        )
    if task not in (None, "CAUSAL_LM"):
        notices.append(f"the adapter in {folder} was trained for {task}, and is applied to a causal language model")
    return notices


def _last_name(base: str) -> str:
    """The model's name in a folder, a hub id or a folder of the hub's cache, in lower case."""
    parts = base.replace("\\", "/").rstrip("/").lower().split("/")
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return cached[0] if cached else parts[-1]


def check_trainable(model: "nn.Module", folder: Path) -> None:
    """Raise CheckpointError where a further training of the loaded adapter would train or save less than all of it."""
    from peft import get_peft_model_state_dict

    path, parameters = folder / ADAPTER, adapter_parameters(model)
    saved = (tensor_shapes(path) if path.is_file() else load_tensors(path)).keys()
    own = {id(parameter) for parameter in parameters.values()}
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    problems = []
    if beside := sorted(saved - parameters.keys() - get_peft_model_state_dict(model).keys()):
        problems.append(
            f"it holds {len(beside)} weights of its base, which would not be saved again (such as {beside[0]})"
        )
    if unsaved := sorted(name for name, value in trained.items() if id(value) not in own):
        problems.append(f"{len(unsaved)} weights would be trained that PEFT does not save (such as {unsaved[0]})")
    if half := sorted(name for name, value in trained.items() if value.element_size() < 4):
        problems.append(
            f"{len(half)} of its weights would be trained in half precision, which loses small steps (such as {half[0]}; "
            "model.dtype=float32 avoids it)"
        )
    if problems:
        raise CheckpointError(
            f"the adapter in {folder} cannot be trained further: {'; '.join(problems)}; type model.resume_lora_training=false to merge "
            "it and train a new one"
        )


def peft_config(saved: Mapping[str, Any], folder: object, *, on_meta: bool) -> "LoraConfig":
    """PEFT's configuration of a saved adapter, for training it further. Raises CheckpointError if PEFT refuses it.

    `on_meta`: for a model without values, which no initialization can read.
    """
    from peft import LoraConfig, TaskType

    settings = {name: value for name, value in saved.items() if name in KNOWN and value is not None}
    settings |= {name: value for name, value in saved.items() if name in INITIAL and value}
    settings["fan_in_fan_out"] = bool(saved.get("fan_in_fan_out"))
    how = str(settings.get("init_lora_weights", True)).lower()
    if on_meta or how in ("true", "false"):
        settings["init_lora_weights"] = on_meta or how == "true"
    if how != "eva":
        settings = {name: value for name, value in settings.items() if name not in INITIAL}
    try:
        return LoraConfig(**settings, task_type=TaskType.CAUSAL_LM)
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be used as it was trained: PEFT refuses its {ADAPTER_CONFIG} "
            f"({' '.join(str(error).split())[:300]})"
        ) from None


def adapter_parameters(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """Name in the file -> parameter, for all that an adapter's file holds, by PEFT's own rules."""
    from peft import get_peft_model_state_dict

    parameters: Any = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = get_peft_model_state_dict(
        model, state_dict=parameters, save_embedding_layers=False
    )
    return found


def load_adapter(model: "PreTrainedModel", folder: Path, saved: "dict[str, torch.Tensor] | None" = None) -> None:
    """Copy a saved adapter's weights into the model, which has the adapter attached; `saved` are those of the folder's file.

    Weights of the base that the file holds beside the adapter's own are loaded, too. Raises CheckpointError where weights are
    missing or left over, have another shape, or are not finite.
    """
    saved = load_tensors(folder / ADAPTER) if saved is None else saved
    parameters = adapter_parameters(model)
    require_finite(saved, folder / ADAPTER)
    if saved.keys() == parameters.keys():
        assign(parameters, saved, folder)
        return
    from peft import set_peft_model_state_dict

    try:  # names of other versions of PEFT and transformers; embeddings that PEFT saved beside the adapter
        result: Any = set_peft_model_state_dict(model, saved)
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        check_fit(parameters, saved, folder)
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the adapter in {folder} does not fit this model: {reason}") from None
    own = {id(parameter) for parameter in parameters.values()}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}
    if result.unexpected_keys or names & set(result.missing_keys):
        check_fit(parameters, saved, folder)


# The largest difference of a logit that rounding explains, relative to the largest logit; in float32 at least LEAST.
ROUNDING = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}
QUANTIZED_ROUNDING = {8: 0.25, 4: 1.0}  # the sum of weight and update is quantized again
LEAST = 1e-4


def allowed_difference(logits: "torch.Tensor", dtype: str, bits: int | None = None) -> float:
    """The largest difference from these logits that rounding explains in weights of this dtype, or of so many bits."""
    share = QUANTIZED_ROUNDING[bits] if bits else ROUNDING.get(dtype, ROUNDING["bfloat16"])
    return max(LEAST, share * logits.abs().max().item())


def sort_names(folder: Path) -> None:
    """Sort the names in adapter_config.json that PEFT holds as sets, whose order differs between processes."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules", "target_parameters", "feedforward_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_pattern_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_pattern(name) and fits(size) for name, size in value.items())


def _is_active(value: Any) -> bool:
    return value not in (None, False, 0, "", "none", [], {})


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
