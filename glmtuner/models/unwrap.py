"""Models inside their wrappers."""

from typing import Any


def unwrapped(model: Any) -> Any:
    """The causal language model inside PEFT's wrapper; a model without one comes back as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
