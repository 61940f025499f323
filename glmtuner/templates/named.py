"""Templates by name."""

from typing import TYPE_CHECKING

import glmtuner.templates.glm  # noqa: F401  (fills TEMPLATES)
from glmtuner.errors import ConfigError, UnknownName
from glmtuner.templates.base import OWN, TEMPLATES, Template
from glmtuner.templates.jinja import TokenizersOwn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_named(
    name: str, tokenizer: "PreTrainedTokenizerBase", *, thinking: str = "auto", asks_thinking: bool | None = None
) -> Template:
    """A template of ours, or the tokenizer's own; `plain` for a tokenizer that has none.

    `thinking` is data.thinking, and `asks_thinking` the mode of prompts that no answer follows (None: the template's default).
    Of several templates by names the tokenizer's own is its `default`. Raises UnknownName, and ConfigError for templates
    without a `default`, and for the own template of a tokenizer without offsets.
    """
    if name == OWN:
        source = own_source(tokenizer)
        if source is not None and not tokenizer.is_fast:
            raise ConfigError(
                f"model.template=tokenizer: {type(tokenizer).__name__} does not return the offsets of tokens; leave "
                f"model.template out for the family's own template, or choose one of {', '.join(TEMPLATES)}"
            )
        if source is None:
            return TEMPLATES["plain"]
        return TokenizersOwn(source=source, thinking=thinking, asks_thinking=asks_thinking, fitting=True)
    if name not in TEMPLATES:
        raise UnknownName("template", name, [*TEMPLATES, OWN], add_one="glmtuner/templates/glm.py")
    return TEMPLATES[name]


def own_source(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The Jinja source of the tokenizer's chat template, of several by names that of `default`; None if it has none."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, list | tuple):  # as tokenizer_config.json writes them
        source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, dict) and source:
        if "default" not in source:
            raise ConfigError(
                f"model.template=tokenizer: the tokenizer has the chat templates {', '.join(map(repr, source))} and none named "
                f"'default'; save the one to use as its chat_template.jinja, or choose one of {', '.join(TEMPLATES)}"
            )
        source = source["default"]
    return source if isinstance(source, str) and source else None
