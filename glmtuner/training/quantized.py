"""Training of prefixes on quantized weights, which transformers' Trainer does not know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quantization_check_skipped(model: Any) -> Iterator[None]:
    """While this lasts, a quantized model with a prefix encoder counts as one that is not quantized.

    Otherwise transformers' Trainer refuses to train it: of trainable parts on quantized weights it knows only PEFT's.
    """
    skipped = hasattr(model, "prefix_encoder") and hasattr(model, "is_quantized")
    if skipped:
        before, model.is_quantized = model.is_quantized, False
    try:
        yield
    finally:
        if skipped:
            model.is_quantized = before
