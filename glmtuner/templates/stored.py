"""The version of a template of ours with which a run was trained: today's, or one of an earlier release."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from glmtuner.templates.base import TEMPLATES, Template
from glmtuner.templates.glm import CHATGLM3, GLM4

# What earlier releases called by today's names, as their runs keep it in provenance.json.
EARLIER: tuple[Template, ...] = (
    # the line break behind <|assistant|> ended the prompt, where the maker lets the model generate it
    replace(GLM4, separate_newline=False, skips_empty=False, calls=""),
    # the stop token of every answer was </s>, where the maker has <|user|> between turns
    replace(CHATGLM3, inner_stop=""),
)
IN_PROMPTS = ("name", "example", "tokenized_apart")  # the keys of a description that say how a prompt is rendered


def version_stored(name: str, about: Mapping[str, Any]) -> Template | None:
    """The version of a template of ours that the description of a run is of; None if the description is of another template.

    Where no version learns the same, it is the first with the same prompts.
    """
    if about.get("name") != name or name not in TEMPLATES:
        return None
    candidates = (TEMPLATES[name], *EARLIER)
    same = (template for template in candidates if _agrees(template.describe(), about, {*about, "inner_stop"}))
    prompts = (template for template in candidates if _agrees(template.describe(), about, IN_PROMPTS))
    return next(chain(same, prompts), None)


def _agrees(described: Mapping[str, Any], about: Mapping[str, Any], keys: Iterable[str]) -> bool:
    return all(described.get(key) == about.get(key) for key in keys)
