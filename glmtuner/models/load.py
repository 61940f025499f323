"""Loads a model's config, tokenizer and weights from a folder or a hub; code that comes with them is never run."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from glmtuner.config.groups import Dtype, Model, Quant
from glmtuner.console import say
from glmtuner.distributed import accelerator, ranks
from glmtuner.distributed.shares import cast, loading_shares, share_of
from glmtuner.errors import CheckpointError, GlmtunerError
from glmtuner.families.config_json import BLOCK
from glmtuner.families.hub import from_hub, hub_options, read_config, source_of
from glmtuner.models.new_tokens import add_tokens
from glmtuner.models.rope import apply_rope_scaling, require_scaled
from glmtuner.run_folder.folder import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.families.family import Family


T = TypeVar("T")
MOST_REASON = 300  # characters of an error of transformers that are repeated


def from_files(model: Model, what: str, fetch: Callable[[], T]) -> T:
    """What `fetch` returns: `what` of the model, by transformers; whatever its files make transformers raise is a CheckpointError.

    Files of others can be broken in every way, and the exceptions that they cause are as many: bare ones of tokenizers,
    validation errors of configs, KeyError, ZeroDivisionError.
    """
    try:
        return from_hub(model, fetch)
    except GlmtunerError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:MOST_REASON]
        raise CheckpointError(
            f"model.model_name_or_path={model.model_name_or_path}: {what} cannot be built from its files "
            f"({type(error).__name__}: {reason}); download them again"
        ) from error


def load_tokenizer(model: Model, new_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer, with left padding, a padding token and `new_tokens`; raises GlmtunerError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    source = source_of(model, model.tokenizer_name or model.model_name_or_path)
    tokenizer: PreTrainedTokenizerBase = from_files(
        model,
        "its tokenizer",
        lambda: AutoTokenizer.from_pretrained(
            source,
            use_fast=model.use_fast_tokenizer,
            trust_remote_code=False,
            padding_side="left",
            **hub_options(model),
        ),
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"model.model_name_or_path={model.model_name_or_path}: its files make no tokenizer ({type(tokenizer).__name__}); "
            "download them again, or name another one with model.tokenizer_name="
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"model.model_name_or_path={model.model_name_or_path}: its tokenizer has no pad_token, and no eos_token or unk_token that "
            'could stand for it; add one to its tokenizer_config.json, such as "pad_token": "<pad>", or download the file again'
        )
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def load_config(model: Model, family: "Family | None") -> "PreTrainedConfig":
    """The model's config, with `model.rope_scaling`; whether `rope_ratio` interpolates positions, which config.json does not say,
    follows the family.
    """
    from transformers import AutoConfig

    source = source_of(model, model.config_name or model.model_name_or_path)
    read_config(model)  # sizes that cannot be are refused before anything of that size is built

    def load() -> "PreTrainedConfig":
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub_options(model))
        if family is not None and hasattr(config, "rope_interpolation"):
            config.rope_interpolation = config.rope_interpolation or family.interpolates
            config.set_rope()
        return config

    config = from_files(model, "its config.json", load)
    apply_rope_scaling(config, model.rope_scaling)
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


def auto_class(config: "PreTrainedConfig") -> Any:
    """The Auto class by which a config's model is built: that for multimodal models where it has towers, else for causal LMs.

    Some multimodal checkpoints can also be loaded as a causal LM, which leaves out the towers, so that what is saved would lack
    them; of these, the class that config.json names decides.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    kind: Any = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING or config.is_encoder_decoder:
        return AutoModelForCausalLM
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING[kind]
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and whole.__name__ not in (config.architectures or ()):
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def meta_model(model: Model, family: "Family | None") -> "PreTrainedModel | None":
    """The model of config.json on the meta device, shapes without values; None where it cannot be built so."""
    import torch

    config = load_config(model, family)
    try:
        with torch.device("meta"):
            built: PreTrainedModel = auto_class(config).from_config(config)
    except (
        Exception
    ):  # of a model that computes with values while it is built, whatever it raises; loading it will tell
        return None
    return built


def load_model(
    model: Model,
    family: "Family | None",
    quant: Quant,
    device: "torch.device",
    compute_dtype: "torch.dtype",
    *,
    sharded: bool = False,
    in_shares: bool = False,
) -> "PreTrainedModel":
    """The causal LM with the checkpoint's weights, in `model.dtype`; quantized weights compute in `compute_dtype`.

    On a GPU weights are loaded directly into its memory, unless they are going to be `sharded` over several; `in_shares`, this rank
    keeps its rows of each (glmtuner/distributed/shares.py). Raises CheckpointError if the checkpoint lacks weights of the model.
    """
    import torch

    source = source_of(model, model.model_name_or_path, weights=True)
    config = load_config(model, family)
    dtype = dtype_of(model, config, device)
    if quant.bits is not None and getattr(config, "rescale_every", None):  # RWKV
        config.rescale_every = 0
        say(
            f"quant=int{quant.bits}: the model does not halve its hidden states every few layers for generation, which would change "
            "quantized weights in place; what it computes is the same"
        )
    device_map = {"device_map": {"": device}} if accelerator.has_memory(device) and not sharded else {}
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask the hub to convert .bin files

    def load() -> "tuple[PreTrainedModel, dict[str, Any]]":
        result: Any = auto_class(config).from_pretrained(
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

    with quantizing(quant, in_shares), loading_shares() if in_shares else nullcontext():
        loaded, loading_info = from_files(model, "the model", load)
    check_loading(loaded, loading_info, f"model.model_name_or_path={model.model_name_or_path}", in_shares)
    require_scaled(loaded, model.rope_scaling)
    if dtype == "auto" and device.type == "cpu" and loaded.dtype == torch.float16 and quant.bits is None:
        for parameter in loaded.parameters():  # config.json did not state its half precision
            cast(parameter, torch.float32)
        loaded = loaded.float()
    if quant.bits is not None:
        from glmtuner.models.quantized_experts import described

        say(f"quant=int{quant.bits}: {described(loaded)}")
    return loaded


def quantizing(quant: Quant, in_shares: bool = False) -> AbstractContextManager[None]:
    """Within this context, bitsandbytes' weights are quantized with the experts, if the run quantizes; `in_shares`, rows of them."""
    if quant.bits is None:
        return nullcontext()
    from glmtuner.models.quantized_experts import quantizing_experts

    return quantizing_experts(in_shares)


def check_loading(
    loaded: "PreTrainedModel", loading_info: Mapping[str, Any], name: str, in_shares: bool = False
) -> None:
    """Raise CheckpointError where weights are missing, not finite, or left over by a model that would compute without them.

    Weights that only other parts of the model have, which are not built, are printed.
    """
    from torch import nn

    missing, unexpected = sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"])
    depth: float = getattr(loaded.config.get_text_config(decoder=True), "num_hidden_layers", math.inf)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{name}: an adapter_config.json stands beside the model, and transformers would add that adapter unchecked; move the "
            "adapter's files to a folder of their own, and name that in model.checkpoint_dir="
        )
    if missing:
        raise CheckpointError(
            f"{name}: the checkpoint lacks {len(missing)} of the model's weights "
            f"(such as {missing[0]}), which would be initialized at random; its config.json and its weights do not belong "
            "together, download it again"
        )
    blocks = {key[: match.start(1)] for key, _ in loaded.named_parameters() for match in BLOCK.finditer(key)}
    linears = {path for path, module in loaded.named_modules() if isinstance(module, nn.Linear)}
    left_out = [
        key
        for key in unexpected
        if re.sub(r"\.(weight|bias)$", "", key) in linears
        or any(key[: match.start(1)] in blocks and int(match[1]) >= depth for match in BLOCK.finditer(key))
    ]
    if left_out:
        raise CheckpointError(
            f"{name}: the model of config.json, which has {depth} layers, leaves out {len(left_out)} of the checkpoint's weights "
            f"(such as {left_out[0]}) and would compute something else; its config.json and its weights do not belong together, "
            "download it again"
        )
    if unexpected:
        say(f"{len(unexpected)} weights of the checkpoint are not used by the model (such as {unexpected[0]})")
    own = [path for path, value in loaded.named_parameters() if not is_finite(share_of(value))]
    spoiled = sorted({path for paths in ranks.all_gather(own) for path in paths}) if in_shares else own
    if spoiled:
        raise CheckpointError(
            f"{name}: {len(spoiled)} of the model's weights hold values that are NaN or infinite (such as {spoiled[0]}), with which "
            "nothing can be computed; download it again"
        )


def is_finite(value: "torch.Tensor") -> bool:
    """Whether no value is NaN or infinite; true for integers and 8-bit floats. One pass over the memory, nothing is allocated."""
    import torch

    compared = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8-bit ones have no minimum
    if value.dtype not in compared or value.is_meta or not value.numel():
        return True
    return all(torch.isfinite(extreme).item() for extreme in torch.aminmax(value.detach()))
