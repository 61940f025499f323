"""Rules of data.new_tokens, and the tokens that a checkpoint was trained with."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

KEY = "data.new_tokens"
IN_TOKENIZER = "new_tokens"  # the key of tokenizer_config.json that names them


def new_token_errors(tokens: Sequence[str]) -> Iterator[str]:
    """One sentence for each token that cannot be one."""
    for token, count in Counter(tokens).items():
        if not token.strip():
            yield f"{KEY} has an empty token; type '{KEY}=[<one>,<another>]'"
        elif count > 1:
            yield f"{KEY} names {token!r} {count} times; name each token once"


def new_tokens_in(folder: Path) -> list[str]:
    """The tokens that were added to the tokenizer in a folder; empty where it has none."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get(IN_TOKENIZER)
    except (OSError, ValueError, AttributeError):
        return []
    return [*found] if isinstance(found, dict) else []
