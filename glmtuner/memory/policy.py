"""The memory of this machine, and what to do about a run that does not fit."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.checkpointing import configured_checkpointing
from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run
from glmtuner.distributed import accelerator
from glmtuner.errors import ConfigError
from glmtuner.memory.estimate import GIB, Estimate, gib

if TYPE_CHECKING:
    import torch


MARGIN = 0.15  # largest relative error of an estimate
DATA_AND_TOKENIZER = 40 * 2**20  # bytes that data, tokenizer and the checks before step 1 leave allocated
LIBRARIES = (
    "datasets",
    "peft",
    "sentencepiece",
    "glmtuner.training.trainer",
    "glmtuner.models",
    "bitsandbytes",
    "rich.table",
)
TRACKER_LIBRARIES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def resident_bytes() -> int:
    """The resident memory of this process in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def process_baseline_bytes(device: "torch.device", tracker: str) -> int:
    """The bytes of this process without tensors, measured once its libraries are loaded and used; 0 on a GPU."""
    import torch

    from glmtuner.models.warm import shared_bytes

    if device.type != "cpu":
        return 0
    for name in filter(None, (*LIBRARIES, TRACKER_LIBRARIES.get(tracker))):
        with suppress(ImportError):
            import_module(name)
    for dtype in (torch.float32, torch.bfloat16):  # pages of a library count once they are used
        x = torch.ones(1, 2, 64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True).log_softmax(-1).sum().backward()
    return resident_bytes() - shared_bytes() + DATA_AND_TOKENIZER


def device_memory(device: "torch.device") -> int | None:
    """The bytes available to a run: all of a GPU, or on a CPU what is free or held by this process; None if unknown."""
    if (memory := accelerator.total_memory(device)) is not None:
        return memory
    if device.type != "cpu":
        return None
    import psutil

    free = psutil.virtual_memory().available + resident_bytes()
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    values = [path.read_text().strip() for path in limits if path.is_file()]
    return min([free, *(int(value) for value in values if value.isdigit())])  # `max` is no limit


def upper_bound_fits(config: Mapping[str, Any], run: Run, rows: int, longest: int, available: int) -> bool:
    """Whether a generous upper bound of the peak, computed from config.json alone in no time, fits into `available` bytes."""

    def size(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    hidden, layers = size("hidden_size"), size("num_hidden_layers", "num_layers")
    inner = size("intermediate_size", "ffn_hidden_size", "inner_hidden_size")
    vocabulary = size("vocab_size", "padded_vocab_size")
    heads = size("num_attention_heads")
    unlike = any("expert" in name or name in ("kv_lora_rank", "layers_block_type", "text_config") for name in config)
    if unlike or not (hidden and layers and inner and vocabulary and heads):
        return False
    width = max(hidden, heads * (size("head_dim", "kv_channels") or 0))  # of all heads' queries together
    weights = layers * (4 * hidden * width + 3 * hidden * inner) + 2 * vocabulary * hidden
    weight_bytes = weights * (20 if run.finetuning.saved_as == "model" else 8)
    activations = rows * longest * (layers * (40 * hidden + 10 * inner + 3 * heads * longest) + 8 * vocabulary)
    return weight_bytes + 4 * activations + 2 * GIB < available


def checkpointing_notice(
    composed: Composed, estimate_of: Callable[[bool], Estimate], available: int | None
) -> str | None:
    """The message that gradient checkpointing is turned on, or None if memory suffices without it.

    An explicit setting is respected. `estimate_of` estimates the run without and with checkpointing; raises ConfigError for a
    model that cannot be estimated. One that cannot be checkpointed stays as it is.
    """
    trainer = composed.run.trainer
    if configured_checkpointing(trainer) is not None or not trainer.do_train or available is None:
        return None
    plain = estimate_of(False)
    if plain.peak <= available:
        return None
    try:
        checkpointed = estimate_of(True)
    except ConfigError:
        return None
    return (
        f"gradient checkpointing is on: without it the longest batch needs about {gib(plain.peak)}, with it "
        f"{gib(checkpointed.peak)}, and {gib(available)} are available (trainer.gradient_checkpointing=false keeps it off)"
    )


def does_not_fit(run: Run, needed: Estimate, available: int) -> ConfigError:
    """The error of a run that certainly does not fit, with settings that need less memory."""
    largest = max(needed.parts, key=lambda name: needed.parts[name])
    suggestions = []
    if not needed.checkpointing:
        suggestions.append("trainer.gradient_checkpointing=true")
    if run.quant.bits != 4 and run.finetuning.on_quantized:  # 8 bits are twice as many
        suggestions.append("quant=int4")
    if not run.finetuning.on_quantized or run.finetuning.saved_as == "model":
        suggestions.append("finetuning=lora")
    if run.trainer.per_device_train_batch_size > 1:
        suggestions.append(
            f"trainer.per_device_train_batch_size={run.trainer.per_device_train_batch_size // 2} with "
            f"trainer.gradient_accumulation_steps={run.trainer.gradient_accumulation_steps * 2}"
        )
    suggestions += ["smaller data.max_source_length and data.max_target_length", "a smaller model"]
    return ConfigError(
        f"model.model_name_or_path={run.model.model_name_or_path} does not fit: training needs about {gib(needed.peak)} at "
        f"its peak (of which {largest} {gib(needed.parts[largest])}), and this machine's {needed.device} has "
        f"{gib(available)}; type {', or '.join(suggestions)}"
    )
