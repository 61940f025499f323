"""What earlier versions had and this one lacks: why it was removed, and what to type instead."""

from typing import Any

DEEPSPEED = "DeepSpeed was removed, since its checkpoints could not be resumed safely"
# By group and preset, and by key; `{value}` is the value that was given.
PRESETS = {
    ("parallel", name): f"{DEEPSPEED}; type parallel=fsdp2, and parallel.cpu_offload=true for what it offloaded"
    for name in ("zero2", "zero3")
}
KEYS = {
    "parallel.offload_optimizer": f"{DEEPSPEED}; type parallel=fsdp2 parallel.cpu_offload={{value}}",
    "parallel.offload_parameters": f"{DEEPSPEED}; type parallel=fsdp2 parallel.cpu_offload={{value}}",
    "parallel.deepspeed_config": f"{DEEPSPEED}; type parallel=fsdp2, and parallel.cpu_offload=true for what it offloaded",
}


def removed_preset(group: str, name: Any) -> str | None:
    """One sentence on a preset of an earlier version; None for any other name."""
    why = PRESETS.get((group, str(name)))
    return None if why is None else f"{group}={name}: {why}"


def removed_key(key: str, value: Any) -> str | None:
    """One sentence on a key of an earlier version and its value; None for any other key."""
    why = KEYS.get(key)
    return None if why is None else f"{key}={value}: {why.replace('{value}', str(value))}"
