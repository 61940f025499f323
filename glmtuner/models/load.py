"""Loads a model's config, tokenizer and weights from a folder or a hub; code that comes with them is never run."""

import os
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import Dtype, Model, Quant
from glmtuner.config.paths import model_source
from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.families.hub import from_hub, hub_options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.families.family import Family


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer, with left padding and a padding token."""
    from transformers import AutoTokenizer

    source = model_source(model.tokenizer_name or model.model_name_or_path)
    tokenizer: PreTrainedTokenizerBase = from_hub(
        model,
        lambda: AutoTokenizer.from_pretrained(
            source,
            use_fast=model.use_fast_tokenizer,
            trust_remote_code=False,
            padding_side="left",
            **hub_options(model),
        ),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_config(model: Model, family: "Family | None") -> "PreTrainedConfig":
    """The model's config; whether `rope_ratio` interpolates positions, which config.json does not say, follows the family."""
    from transformers import AutoConfig

    source = model_source(model.config_name or model.model_name_or_path)
    config: PreTrainedConfig = from_hub(
        model, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False, **hub_options(model))
    )
    if family is not None and hasattr(config, "rope_interpolation"):
        config.rope_interpolation = config.rope_interpolation or family.interpolates
        config.set_rope()
    return config


def dtype_of(model: Model, config: "PreTrainedConfig", device: "torch.device") -> "torch.dtype | str":
    """The dtype to load weights in: `model.dtype`, or "auto" for the checkpoint's own."""
    import torch

    if model.dtype is not Dtype.auto:
        dtype: torch.dtype = getattr(torch, model.dtype.value)
        return dtype
    if device.type == "cpu" and config.dtype == torch.float16:
        return torch.float32  # half precision is slow and partly not implemented on a CPU
    return "auto"


def load_model(
    model: Model,
    family: "Family | None",
    quant: Quant,
    device: "torch.device",
    compute_dtype: "torch.dtype",
    *,
    sharded: bool = False,
) -> "PreTrainedModel":
    """The causal LM with the checkpoint's weights, in `model.dtype`; quantized weights compute in `compute_dtype`.

    On a GPU weights are loaded directly into its memory, unless they are going to be `sharded` over several. Raises
    CheckpointError if the checkpoint lacks weights of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = model_source(model.model_name_or_path)
    config = load_config(model, family)
    dtype = dtype_of(model, config, device)
    device_map = {"device_map": {"": device}} if device.type == "cuda" and not sharded else {}
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask the hub to convert .bin files

    def load() -> "tuple[PreTrainedModel, dict[str, Any]]":
        result: Any = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            **hub_options(model),
            **device_map | quant.loading(device, compute_dtype),
        )
        loaded, loading_info = result  # a pair because of `output_loading_info`
        return loaded, loading_info

    loaded, loading_info = from_hub(model, load)
    missing, unexpected = sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"])
    if missing:
        raise CheckpointError(
            f"model.model_name_or_path={model.model_name_or_path}: the checkpoint lacks {len(missing)} of the model's weights "
            f"(such as {missing[0]}), which would be initialized at random; its config.json and its weights do not belong "
            "together, download it again"
        )
    if unexpected:
        say(f"{len(unexpected)} weights of the checkpoint are not used by the model (such as {unexpected[0]})")
    if dtype == "auto" and device.type == "cpu" and loaded.dtype == torch.float16 and quant.bits is None:
        loaded = loaded.float()  # config.json did not state its half precision
    return loaded
