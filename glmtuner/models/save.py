"""A whole model into a folder, in the layout of its first release or in transformers' own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glmtuner.models.modeling_chatglm2 import ChatGLM2ForConditionalGeneration, as_glm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(
    model: "PreTrainedModel", folder: Path, layout: Literal["published", "transformers"], shard: str = "5GB"
) -> None:
    """Write weights and config.json, in files of at most `shard`; both layouts load again to the same logits.

    `published` has the names of ChatGLM's own code, for tools that know those; `transformers` makes a `GlmForCausalLM` of
    ChatGLM2, ChatGLM3 and GLM-4, which loads without glmtuner. Of ChatGLM-6B and of models that transformers knows there
    is one layout.
    """
    if layout == "transformers" and isinstance(model, ChatGLM2ForConditionalGeneration):
        as_glm(model).save_pretrained(folder, max_shard_size=shard)
        return
    model.save_pretrained(folder, max_shard_size=shard)
    if model.config.model_type == "chatglm":
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["architectures"] = ["ChatGLMModel"]  # what every published config.json says
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
