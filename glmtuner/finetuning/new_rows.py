"""The rows of new tokens beside a LoRA, by PEFT's `trainable_token_indices`: they are trained, and no other row is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

ROWS = "trainable_tokens_delta"  # in the names of these parameters


def train_new_rows(config: "LoraConfig", model: "nn.Module") -> None:
    """Add the model's new rows to those that PEFT's configuration trains; raises ConfigError."""
    from glmtuner.models.new_tokens import new_rows

    rows, given = new_rows(model), config.trainable_token_indices
    if not rows:
        return
    first = next(iter(rows))
    if isinstance(given, list):
        given = {first: given}
    merged: dict[str, list[int]] = {**(given or {})}
    for path, ids in rows.items():
        name = next((key for key in merged if path == key or path.endswith(f".{key}")), path)
        merged[name] = sorted({*merged.get(name, []), *ids})
    config.trainable_token_indices = merged


def keep_rows_exact(adapted: "nn.Module") -> None:
    """Make trained rows float32 on a half-precision base, so that small steps are not rounded away."""
    for name, value in adapted.named_parameters():
        if ROWS in name and value.element_size() < 4:
            value.data = value.data.float()


def require_new_rows(model: "nn.Module", saved: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where an adapter that is trained further does not train all new rows of its base."""
    from glmtuner.models.new_tokens import KNOB, new_rows

    trained = saved.get("trainable_token_indices") or {}
    lists = trained.values() if isinstance(trained, Mapping) else [trained]
    known = {row for ids in lists for row in ids}
    base: Any = model
    missing = sorted({row for ids in new_rows(base.get_base_model()).values() for row in ids} - known)
    if missing:
        raise CheckpointError(
            f"{KNOB}: the adapter in {folder} does not train the rows of {len(missing)} new tokens (such as {missing[0]}); type "
            "model.resume_lora_training=false to merge it and train a new one"
        )
