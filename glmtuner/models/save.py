"""Saves a whole model, in the layout of its first release or in transformers' own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glmtuner.console import say
from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration, as_glm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(
    model: "PreTrainedModel", folder: Path, layout: Literal["published", "transformers"], shard: str = "5GB"
) -> None:
    """Write weights, in files of at most `shard`, and config.json; both layouts load to a model with the same logits.

    `published` has the names of ChatGLM's own code, for tools that expect them; `transformers` saves ChatGLM2, ChatGLM3 and
    GLM-4 as a `GlmForCausalLM`, which loads without glmtuner. ChatGLM-6B and models that transformers supports have only one
    layout.
    """
    if layout == "transformers" and isinstance(model, ChatGLM2ForConditionalGeneration):
        as_glm(model).save_pretrained(folder, max_shard_size=shard)
        return
    if isinstance(model, ChatGLM2ForConditionalGeneration) and model.config.has_own_rope:
        say(
            f"{folder.name}: rope_type={(model.config.rope_parameters or {})['rope_type']} is unknown to ChatGLM's own code, which would "
            "compute without it; glmtuner reads it, and the layout transformers holds it for other tools"
        )
    model.save_pretrained(folder, max_shard_size=shard)
    if model.config.model_type == "chatglm":
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["architectures"] = ["ChatGLMModel"]  # as in every published config.json
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
