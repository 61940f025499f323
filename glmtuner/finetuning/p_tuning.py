"""P-Tuning v2: a learned prefix of keys and values in every layer.

The prefix is added inside the attention call, after the cache: tokens keep their positions (the first one is 0), every token
attends to the whole prefix, and neither cache classes nor gradient checkpointing are involved. PEFT's prefix is stored in the
cache instead, which shifts positions and cannot be checkpointed (peft#869, peft#2821).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from glmtuner.config.groups import Finetuning, Model, ModelFamily, preset
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.weight_files import file_metadata, tensor_shapes
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG, read_adapter_config
from glmtuner.finetuning.trained import assign, freeze_all, load_folder, load_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from glmtuner.models.attention_calls import AttentionCall

RAW = "prefix_encoder.safetensors"  # the trained parameters, before projection; PEFT's file holds the projected prefix
PUBLISHED_PREFIX = "transformer.prefix_encoder."  # of the parameter names in checkpoints of ChatGLM's own trainer
POSITIONS = {"positions": "not shifted by the prefix"}  # in the file's metadata; PEFT trains prefixes that shift them
DROPOUT = 0.1  # as in the published ChatGLM code; in training only


@preset("finetuning", "p_tuning")
@dataclass(kw_only=True)
class PTuning(Finetuning):
    """A prefix of `pre_seq_len` learned keys and values per layer (Liu et al. 2021, arXiv:2110.07602)."""

    pre_seq_len: int
    prefix_projection: bool = False

    fp16_on_quantized: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.pre_seq_len < 1:
            raise ConfigError(f"finetuning.pre_seq_len={self.pre_seq_len}: a prefix has at least 1 token")

    def check_model(self, model: Model, family: ModelFamily | None) -> None:
        from glmtuner.models.attention_calls import UNTRACED, traced_calls
        from glmtuner.models.load import auto_class, load_config
        from glmtuner.models.prefix import check_calls

        config = load_config(model, family)  # type: ignore[arg-type]  # a Family is what the groups call ModelFamily
        try:
            calls = traced_calls(auto_class(config).from_config, config)
        except UNTRACED:
            return  # what only the loaded model can tell, `attach` checks
        check_calls((config.architectures or [config.model_type])[0], calls)

    def attach(self, model: "PreTrainedModel", family: ModelFamily) -> "PreTrainedModel":
        from glmtuner.models.prefix import add_prefix

        freeze_all(model)
        add_prefix(model, family, tokens=self.pre_seq_len, projection=self.prefix_projection, dropout=DROPOUT)
        return model

    def save(self, model: "PreTrainedModel", folder: Path) -> None:
        from peft import PrefixTuningConfig, TaskType

        encoder: Any = model.get_submodule("prefix_encoder")
        save_tensors({"prompt_embeddings": encoder.folded()}, folder / ADAPTER, **POSITIONS)
        save_tensors(dict(encoder.named_parameters()), folder / RAW)
        PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=model.config.name_or_path,
            num_virtual_tokens=encoder.tokens,
            num_transformer_submodules=1,
            **peft_sizes(encoder.calls, model),
            inference_mode=True,
        ).save_pretrained(str(folder))

    def save_trained(self, model: "PreTrainedModel", folder: Path) -> None:
        self.save(model, folder)

    def restore(self, model: "PreTrainedModel", folder: Path) -> None:
        encoder = model.get_submodule("prefix_encoder")
        if (folder / RAW).is_file():
            assign(dict(encoder.named_parameters()), load_tensors(folder / RAW), folder)
        elif not (folder / ADAPTER_CONFIG).is_file():
            assign(dict(encoder.named_parameters()), published_prefix(folder), folder)
        elif self.prefix_projection and (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{folder} holds a prefix without its projection, so it cannot be trained with finetuning.prefix_projection=true; "
                "type finetuning.prefix_projection=false"
            )
        else:
            saved: dict[str, torch.Tensor] = load_tensors(folder / ADAPTER)
            assign(dict(encoder.named_parameters()), {"embedding.weight": saved["prompt_embeddings"]}, folder)


def peft_sizes(calls: "Sequence[AttentionCall]", model: "PreTrainedModel") -> dict[str, Any]:
    """The sizes of PEFT's PrefixTuningConfig; none where PEFT has no such prefix, so that it refuses to load it.

    Its prefixes have keys and values of one width, the same in all layers, and every layer has one.
    """
    call, layers = calls[0], model.config.get_text_config().num_hidden_layers
    alike = {(each.heads, each.key_dim, each.value_dim) for each in calls} == {(call.heads, call.key_dim, call.key_dim)}
    if not alike or len(calls) != layers:
        return {}
    return {"num_layers": layers, "num_attention_heads": call.heads, "token_dim": call.heads * call.key_dim}


def prefix_settings(folder: Path) -> dict[str, Any]:
    """The settings `pre_seq_len` and `prefix_projection` of a saved prefix, read from its files."""
    if not (folder / ADAPTER_CONFIG).is_file():
        saved = published_prefix(folder)
        return {"pre_seq_len": len(saved["embedding.weight"]), "prefix_projection": "trans.0.weight" in saved}
    config = read_adapter_config(folder)
    tokens, raw, folded = config.get("num_virtual_tokens"), folder / RAW, folder / ADAPTER
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is damaged: num_virtual_tokens={json.dumps(tokens)}, where a whole number of at least 1 "
            "is expected; use another checkpoint"
        )
    if not raw.is_file() and folded.is_file() and not POSITIONS.items() <= file_metadata(folded).items():
        raise CheckpointError(
            f"the prefix in {folder} was trained by PEFT, where it shifts the positions of all tokens; here it shifts none, so it would "
            f"compute something else. It is not supported (a prefix of glmtuner has {RAW} beside it: copy that file, too)"
        )
    shapes = tensor_shapes(raw if raw.is_file() else folded) if raw.is_file() or folded.is_file() else {}
    rows = shapes.get("embedding.weight", shapes.get("prompt_embeddings", ()))
    if shapes and rows[:1] != (tokens,):
        raise CheckpointError(
            f"{folder} does not fit together: num_virtual_tokens={tokens} in adapter_config.json, and the weights hold "
            f"{rows[0] if rows else 'no'} prefix tokens; use another checkpoint"
        )
    return {"pre_seq_len": tokens, "prefix_projection": raw.is_file() and "trans.0.weight" in shapes}


def published_prefix(folder: Path) -> "dict[str, torch.Tensor]":
    """The prefix in a checkpoint of ChatGLM's own P-tuning trainer, with the parameter names of PrefixEncoder."""
    saved = load_folder(folder)
    return {
        name.removeprefix(PUBLISHED_PREFIX): value for name, value in saved.items() if name.startswith(PUBLISHED_PREFIX)
    }


def save_published_prefix(adapter: Path, folder: Path) -> Path:
    """Write a run's prefix as `pytorch_model.bin`, as ChatGLM's own P-tuning code reads it; returns the file's path."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pytorch_model.bin"
    torch.save({f"{PUBLISHED_PREFIX}{name}": value for name, value in load_tensors(adapter / RAW).items()}, path)
    return path
