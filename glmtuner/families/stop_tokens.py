"""The tokens that end an answer."""

from typing import TYPE_CHECKING

from glmtuner.families.family import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.templates.base import Template


def stop_ids(
    template: "Template", tokenizer: "PreTrainedTokenizerBase", family: str, model: "PreTrainedModel | None" = None
) -> tuple[int, ...]:
    """The sorted ids of the tokens that end an answer.

    They are the template's stop tokens, which are learned, the family's that the tokenizer has, its end-of-text token, and
    those of the model's generation config.
    """
    ids = set(template.stop_ids(tokenizer))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids |= {end for end in (ends if isinstance(ends, list | tuple) else [ends]) if isinstance(end, int) and end >= 0}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    for token in FAMILIES[family].stop_tokens if family in FAMILIES else ():
        token_id = tokenizer.convert_tokens_to_ids(token)
        if isinstance(token_id, int) and token_id != tokenizer.unk_token_id:
            ids.add(token_id)
    return tuple(sorted(ids))
