"""The tokens that data.new_tokens added to a tokenizer, which keeps their names in its tokenizer_config.json."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = "new_tokens"  # a key of tokenizer_config.json


def new_tokens_of(tokenizer: "PreTrainedTokenizerBase") -> Mapping[str, list[int]]:
    """Token -> the ids of the pieces that its text had before; in what users and records say they are meant, as in answers."""
    found = getattr(tokenizer, "init_kwargs", {}).get(NEW_TOKENS)
    return found if isinstance(found, dict) else {}
