"""Plain text to token ids by the fastest way that a tokenizer has."""

from collections.abc import MutableSequence, Sequence
from functools import partial
from typing import TYPE_CHECKING

from glmtuner.templates.tiktoken_engine import encodes_by_backend, engine_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Ids = MutableSequence[int]  # a list; an array of 32-bit integers where an Engine encodes


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, reads_controls: bool = False
) -> Sequence[Ids]:
    """Ids of plain texts: nothing is added, and no control token is matched in them unless `reads_controls`.

    They are arrays where an engine is in use for the tokenizer, else lists.
    """
    if not texts:
        return []
    if not reads_controls and (engine := engine_of(tokenizer)) is not None:
        return engine.encode(texts, partial(_encode_plain, tokenizer))
    if (backend := backend_of(tokenizer, reads_controls)) is not None:
        return _encode_by(backend, texts)
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=not reads_controls, return_attention_mask=False
    ).input_ids
    return ids


def _encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    backend = backend_of(tokenizer, reads_controls=False)
    assert backend is not None  # only such tokenizers have engines
    return _encode_by(backend, texts)


def _encode_by(backend: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def backend_of(tokenizer: "PreTrainedTokenizerBase", reads_controls: bool) -> "Tokenizer | None":
    """The tokenizer's backend, set to neither truncate nor pad; None where the tokenizer does not encode by a backend alone.

    Called directly it returns ids only: through transformers it would also compute each token's offsets, and eight lists
    would be copied for every text.
    """
    if not encodes_by_backend(tokenizer):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not reads_controls
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend
