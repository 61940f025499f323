"""Templates by name."""

from typing import TYPE_CHECKING

import glmtuner.templates.glm  # noqa: F401  (fills TEMPLATES)
from glmtuner.errors import ConfigError, UnknownName
from glmtuner.templates.base import OWN, TEMPLATES, Template
from glmtuner.templates.jinja import TokenizersOwn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_named(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """A template of ours, or the tokenizer's own; `plain` for a tokenizer that has none.

    Raises UnknownName, and ConfigError for the own template of a tokenizer without offsets.
    """
    if name == OWN:
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, str) and not tokenizer.is_fast:
            raise ConfigError(
                f"model.template=tokenizer: {type(tokenizer).__name__} does not return the offsets of tokens; leave "
                f"model.template out for the family's own template, or choose one of {', '.join(TEMPLATES)}"
            )
        return TokenizersOwn(source=source) if isinstance(source, str) else TEMPLATES["plain"]
    if name not in TEMPLATES:
        raise UnknownName("template", name, [*TEMPLATES, OWN], add_one="glmtuner/templates/glm.py")
    return TEMPLATES[name]
