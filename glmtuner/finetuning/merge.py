"""Merges a saved adapter into its base, and compares the logits before and after."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import ModelFamily
from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.finetuning.adapter import allowed_difference, read_adapter_config
from glmtuner.finetuning.lora import SavedLora
from glmtuner.finetuning.peft import Peft, peft_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 16


def merged_adapter(model: "PreTrainedModel", family: ModelFamily, folder: Path) -> "PreTrainedModel":
    """The model with a saved adapter merged into its weights.

    Raises CheckpointError if the adapter does not fit, or if the merged model's logits differ from those of the unmerged adapter
    by more than rounding explains.
    """
    is_lora = read_adapter_config(folder)["peft_type"] == "LORA"
    method = SavedLora.of(folder) if is_lora else Peft(finetuning_type="peft", **peft_settings(folder))
    adapted: Any = method.attach(model, family).eval()
    method.restore(adapted, folder)
    before = probe_logits(adapted)
    if quantized_bits(model):
        from glmtuner.models.quantized_experts import merge_experts

        merge_experts(adapted)
    merged = merged_by_peft(adapted, folder, method.finetuning_type)
    bits, dtype = quantized_bits(merged), str(merged.dtype).removeprefix("torch.")
    difference = check_merge(before, probe_logits(merged), dtype, bits, folder, method.finetuning_type)
    if bits:
        say(f"merged {folder} into int{bits} weights, which rounds: a logit differs by up to {difference:.2g}")
    return merged


def merged_by_peft(adapted: Any, source: object, method: str) -> "PreTrainedModel":
    """The base with the attached adapter merged into its weights; raises CheckpointError where PEFT cannot merge it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")  # experts, which are merged apart
            merged: PreTrainedModel = adapted.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the adapter in {source} cannot be merged into this model: {' '.join(str(error).split())[:300]}; use it unmerged, with "
            f"finetuning={method} and as the last of model.checkpoint_dir"
        ) from None
    return merged


def quantized_bits(model: "PreTrainedModel") -> int | None:
    """8 or 4 if bitsandbytes stores the model's weights in so many bits."""
    return (
        8 if getattr(model, "is_loaded_in_8bit", False) else 4 if getattr(model, "is_loaded_in_4bit", False) else None
    )


def probe_logits(model: Any) -> "torch.Tensor":
    """The logits of a fixed row of token ids, float32 on the CPU."""
    import torch

    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    if hasattr(config, "gmask_token_id"):  # ChatGLM-6B: a row without the end of its context has no positions
        ending = [config.gmask_token_id, config.bos_token_id]
        ids = [*(token for token in ids if token not in (*ending, config.mask_token_id)), *ending]
    row = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
    return logits.float().cpu()


def check_merge(
    before: "torch.Tensor", after: "torch.Tensor", dtype: str, bits: int | None, folder: object, method: str = "lora"
) -> float:
    """The largest difference of a logit that merging made; raises CheckpointError for more than rounding explains."""
    difference: float = (after - before).abs().max().item()
    allowed = allowed_difference(before, dtype, bits)
    if not difference <= allowed:
        raise CheckpointError(
            f"the adapter in {folder} cannot be merged into this model: merged, a logit differs by {difference:.2g} from the "
            f"unmerged adapter's, and rounding in {f'int{bits}' if bits else dtype} explains {allowed:.2g} at most; use the adapter "
            f"unmerged, with finetuning={method} and as the last of model.checkpoint_dir"
        )
    return difference
