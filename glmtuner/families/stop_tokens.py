"""The tokens that end an answer."""

from typing import TYPE_CHECKING

from glmtuner.families.family import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glmtuner.templates.base import Template


def stop_ids(template: "Template", tokenizer: "PreTrainedTokenizerBase", family: str) -> tuple[int, ...]:
    """The sorted ids of the template's stop token, of the family's that the tokenizer has, and of its end-of-text token."""
    ids = set(template.stop_ids(tokenizer))
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    for token in FAMILIES[family].stop_tokens if family in FAMILIES else ():
        token_id = tokenizer.convert_tokens_to_ids(token)
        if isinstance(token_id, int) and token_id != tokenizer.unk_token_id:
            ids.add(token_id)
    return tuple(sorted(ids))
