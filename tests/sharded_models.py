"""A rank that shards small models and saves them by glmtuner/finetuning/streamed.py: `python sharded_models.py <folder> <name> …`.

Below the folder, `<name>` is a checkpoint; `<name>-saved` is written, and `differing.json` says what each rank was told.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

SMALL = "300KB"  # files of this size, so that there are several, and each rank writes some


def saved_small(model: Any) -> None:
    """Let the model's `save_pretrained` write several files."""
    own = model.save_pretrained
    model.save_pretrained = lambda *values, **named: own(*values, **named, max_shard_size=SMALL)


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def error_of(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(root: Path, *names: str) -> None:
    from glmtuner.distributed import ranks
    from glmtuner.finetuning import streamed

    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        model = shard(AutoModelForCausalLM.from_pretrained(root / name, dtype="auto"))
        saved_small(model)
        streamed.save_model(model, root / f"{name}-saved", ["nothing."])
        found[name] = streamed.differing_on_ranks(model, root / f"{name}-saved")
    with torch.no_grad():  # another value in one rank's rows of one weight
        weight = next(value for path, value in model.named_parameters() if "norm" in path)
        weight.to_local()[-1:] += ranks.rank() == 1
    found["changed"] = streamed.differing_on_ranks(model, root / f"{name}-saved")
    if ranks.is_main():  # transformers writes on rank 0 alone
        found["largest"] = max(len(unit) for unit in streamed.plan_of_model(model, root / "plan", ["nothing."]).units)

    bytes_of = streamed.bytes_of

    def full_disk(value: torch.Tensor) -> memoryview:
        if ranks.rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return bytes_of(value)

    streamed.bytes_of = full_disk
    found["full"] = error_of(lambda: streamed.save_model(model, root / "full-disk", ["nothing."]))
    streamed.bytes_of = bytes_of
    trained = {path: value for path, value in model.named_parameters() if "layers.0" in path}
    streamed.save_tensors_of_ranks(trained, root / "kept/trained.safetensors")
    by_rank = ranks.all_gather(found)
    if ranks.is_main():
        (root / "differing.json").write_text(json.dumps(by_rank))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that is being finalized (pytorch#179291)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
