"""What the machine has, and what to do where a run does not fit."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError
from glmtuner.memory.estimate import GIB, Estimate, gib

if TYPE_CHECKING:
    import torch


MARGIN = 0.15  # how far from the measured peak an estimate may lie
LEFT_BEHIND = 40 * 2**20
LIBRARIES = (
    "datasets",
    "peft",
    "sentencepiece",
    "glmtuner.training.trainer",
    "glmtuner.models",
    "bitsandbytes",
    "rich.table",
)
OF_TRACKERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def resident_bytes() -> int:
    """The bytes of memory that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def process_baseline_bytes(device: "torch.device", tracker: str) -> int:
    """What this process holds besides tensors: its libraries are imported and have computed once."""
    import torch

    if device.type != "cpu":
        return 0
    for name in filter(None, (*LIBRARIES, OF_TRACKERS.get(tracker))):
        with suppress(ImportError):
            import_module(name)
    for dtype in (torch.float32, torch.bfloat16):  # a library's code counts once it has been touched
        x = torch.ones(1, 2, 64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True).log_softmax(-1).sum().backward()
    return resident_bytes() + LEFT_BEHIND


def device_memory(device: "torch.device") -> int | None:
    """The bytes that a run can have: the GPU's all, or on a CPU what is free and what this process holds; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    import psutil

    free = psutil.virtual_memory().available + resident_bytes()
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    given = [path.read_text().strip() for path in limits if path.is_file()]
    return min([free, *(int(limit) for limit in given if limit.isdigit())])


def upper_bound_fits(config: Mapping[str, Any], run: Run, rows: int, longest: int, available: int) -> bool:
    """Whether even a bound far above the truth fits, told from config.json alone in no time."""

    def size(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    hidden, layers = size("hidden_size"), size("num_hidden_layers", "num_layers")
    inner = size("intermediate_size", "ffn_hidden_size", "inner_hidden_size")
    vocabulary = size("vocab_size", "padded_vocab_size")
    heads = size("num_attention_heads")
    if any("expert" in name for name in config) or not (hidden and layers and inner and vocabulary and heads):
        return False
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * vocabulary * hidden
    held = weights * (20 if run.finetuning.saved_as == "model" else 8)
    numbers = rows * longest * (layers * (40 * hidden + 10 * inner + 3 * heads * longest) + 8 * vocabulary)
    return held + 4 * numbers + 2 * GIB < available


def checkpointing_notice(
    composed: Composed, estimate_of: Callable[[bool], Estimate], available: int | None
) -> str | None:
    """Whether gradient checkpointing is to be turned on because memory needs it: the line that says so, or None.

    What was typed is obeyed. `estimate_of` is asked without and with checkpointing; a model that cannot be estimated, or
    cannot be checkpointed, is left as it is.
    """
    trainer = composed.run.trainer
    chosen = "trainer.gradient_checkpointing" in composed.user_keys or trainer.gradient_checkpointing
    if chosen or not trainer.do_train or available is None:
        return None
    try:
        plain = estimate_of(False)
        if plain.peak <= available:
            return None
        saving = estimate_of(True)
    except ConfigError:
        return None
    return (
        f"gradient checkpointing is on: without it the longest batch needs about {gib(plain.peak)}, with it "
        f"{gib(saving.peak)}, and there are {gib(available)} (trainer.gradient_checkpointing=false leaves it off)"
    )


def does_not_fit(run: Run, needed: Estimate, available: int) -> ConfigError:
    """What to say of a run that is surely too large."""
    largest = max(needed.parts, key=lambda name: needed.parts[name])
    ways = []
    if not needed.checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    if run.quant.bits is None and run.finetuning.on_quantized:
        ways.append("quant=int4")
    if not run.finetuning.on_quantized or run.finetuning.saved_as == "model":
        ways.append("finetuning=lora")
    if run.trainer.per_device_train_batch_size > 1:
        ways.append(
            f"trainer.per_device_train_batch_size={run.trainer.per_device_train_batch_size // 2} with "
            f"trainer.gradient_accumulation_steps={run.trainer.gradient_accumulation_steps * 2}"
        )
    ways += ["smaller data.max_source_length and data.max_target_length", "a smaller model"]
    return ConfigError(
        f"model.model_name_or_path={run.model.model_name_or_path} does not fit: training needs about {gib(needed.peak)} at "
        f"its peak (the most for {largest}, {gib(needed.parts[largest])}), and this machine's {needed.device} has "
        f"{gib(available)}; type {', or '.join(ways)}"
    )
