"""The tokens that end an answer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(template: Any, tokenizer: "PreTrainedTokenizerBase", family: str) -> tuple[int, ...]:
    """The template's stop token, the family's, and the tokenizer's own end of text."""
    from glmtuner.families.family import FAMILIES

    found = set(template.stop_ids(tokenizer))
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    for token in FAMILIES[family].stop_tokens if family in FAMILIES else ():
        known = tokenizer.convert_tokens_to_ids(token)
        if known is not None and known != tokenizer.unk_token_id:
            found.add(known)
    return tuple(sorted(found))
