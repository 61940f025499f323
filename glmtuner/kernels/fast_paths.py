"""The names of the optimizations that keep a model's loss."""

from enum import Enum


class FastPath(str, Enum):
    """An optimization that keeps the loss; the name is that in metrics.json, the value that of the plan."""

    without_padding = "batches without padding"
    chunked_loss = "loss in chunks"
    fused_lora = "fused LoRA layers"
    common_beginnings = "common prompts computed once"  # of stages with several rows to a prompt


NO_COMMON_BEGINNINGS = ""  # the reason where a stage has one row to a prompt: nothing is said of it
