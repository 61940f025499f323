"""Templates by name."""

from typing import Any

import glmtuner.templates.glm  # noqa: F401  (fills TEMPLATES)
from glmtuner.errors import ConfigError, UnknownName
from glmtuner.templates.base import OWN, TEMPLATES, Template
from glmtuner.templates.jinja import TokenizersOwn


def template_named(name: str, tokenizer: Any) -> Template:
    """A template of ours, or the tokenizer's own; a tokenizer that has none gets `plain`. Raises UnknownName."""
    if name == OWN:
        source = getattr(tokenizer, "chat_template", None)
        if isinstance(source, str) and not tokenizer.is_fast:
            raise ConfigError(
                f"model.template=tokenizer: {type(tokenizer).__name__} cannot tell where a text's tokens stand; leave it out, and "
                f"the family's own is used, or choose one of {', '.join(TEMPLATES)}"
            )
        return TokenizersOwn(source=source) if isinstance(source, str) else TEMPLATES["plain"]
    if name not in TEMPLATES:
        raise UnknownName("template", name, [*TEMPLATES, OWN], add_one="glmtuner/templates/glm.py")
    return TEMPLATES[name]
