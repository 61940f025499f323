"""The model inside PEFT's wrapper."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unwrapped(model: Any) -> "PreTrainedModel":
    """The causal language model inside PEFT's wrapper; a model without a wrapper is returned as it is."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base
