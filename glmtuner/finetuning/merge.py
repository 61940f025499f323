"""Merges a saved LoRA adapter into its base, and compares the logits before and after."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.groups import ModelFamily
from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.finetuning.adapter import allowed_difference
from glmtuner.finetuning.lora import SavedLora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 16


def merged_adapter(model: "PreTrainedModel", family: ModelFamily, folder: Path) -> "PreTrainedModel":
    """The model with a saved adapter merged into its weights.

    Raises CheckpointError if the adapter does not fit, or if the merged model's logits differ from those of the unmerged adapter
    by more than rounding explains.
    """
    method = SavedLora.of(folder)
    adapted: Any = method.attach(model, family).eval()
    method.restore(adapted, folder)
    before = probe_logits(adapted)
    if quantized_bits(model):
        from glmtuner.models.quantized_experts import merge_experts

        merge_experts(adapted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")  # experts, above
            merged: PreTrainedModel = adapted.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the adapter in {folder} cannot be merged into this model: {' '.join(str(error).split())[:300]}"
        ) from None
    bits = quantized_bits(merged)
    difference = check_merge(before, probe_logits(merged), str(merged.dtype).removeprefix("torch."), bits, folder)
    if bits:
        say(f"merged {folder} into int{bits} weights, which rounds: a logit differs by up to {difference:.2g}")
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


def check_merge(before: "torch.Tensor", after: "torch.Tensor", dtype: str, bits: int | None, folder: object) -> float:
    """The largest difference of a logit that merging made; raises CheckpointError for more than rounding explains."""
    difference: float = (after - before).abs().max().item()
    allowed = allowed_difference(before, dtype, bits)
    if not difference <= allowed:
        raise CheckpointError(
            f"the adapter in {folder} cannot be merged into this model: merged, a logit differs by {difference:.2g} from the "
            f"unmerged adapter's, and rounding in {f'int{bits}' if bits else dtype} explains {allowed:.2g} at most; use the adapter "
            "unmerged, with finetuning=lora and as the last of model.checkpoint_dir"
        )
    return difference
