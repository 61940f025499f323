"""Plain text to token ids by the fastest way that a tokenizer has."""

from array import array
from collections.abc import Sequence
from typing import Any

from glmtuner.templates.tiktoken_engine import encodes_by_backend, engine_of

Ids = list[int] | array  # arrays of 32-bit numbers where an Engine encodes


def encode_text(tokenizer: Any, texts: Sequence[str], *, reads_controls: bool = False) -> list[Ids]:
    """Ids of plain texts: nothing added, and nothing in them read as a control token unless `reads_controls`.

    They come as arrays where an engine was prepared for the tokenizer, else as lists.
    """
    if not texts:
        return []
    if not reads_controls and (engine := engine_of(tokenizer)) is not None:
        return engine.encode(texts, lambda others: _encoded_by(backend_of(tokenizer, False), others))
    if (backend := backend_of(tokenizer, reads_controls)) is not None:
        return _encoded_by(backend, texts)
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=not reads_controls, return_attention_mask=False
    ).input_ids


def _encoded_by(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def backend_of(tokenizer: Any, reads_controls: bool) -> Any:
    """The tokenizer's backend, set to cut nothing and to pad nothing; None where the tokenizer has a way of its own.

    Asked by itself it gives ids alone: transformers would have it look for each token's place, and copy eight lists a text.
    """
    if not encodes_by_backend(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not reads_controls
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend
