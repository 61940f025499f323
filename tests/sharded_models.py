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


def checkpoints(model: Any, root: Path) -> dict[str, Any]:
    """What each rank was told when it wrote the trained parameters and AdamW's state, and when it read them in three layouts."""
    from torch.distributed import checkpoint as dcp

    from glmtuner.distributed import ranks, shard_files
    from glmtuner.finetuning.trained import restore_trained, trained_parameters
    from glmtuner.training.optimizer_state import load_state, state_in_shards
    from glmtuner.training.pending import PendingCheckpoint

    def stepped() -> torch.optim.Optimizer:
        torch.manual_seed(0)
        groups = [
            [value for path, value in model.named_parameters() if ("norm" in path) == norm] for norm in (False, True)
        ]
        optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=0.25
        )
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        return optimizer

    def state_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        whole = state_in_shards(model, optimizer)[0]
        return {
            name: getattr(value, "full_tensor", lambda value=value: value)().clone() for name, value in whole.items()
        }

    optimizer = stepped()
    shards, rest = state_in_shards(model, optimizer)
    parameters = {f"model.{path}": value.detach() for path, value in trained_parameters(model).items()}
    wanted, values = state_of(optimizer), {path: value.full_tensor().clone() for path, value in parameters.items()}
    numbers = {
        id(parameter): n for n, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    by_number = optimizer.state_dict()
    by_number["state"] = {
        numbers[id(parameter)]: {key: wanted[f"optimizer.{path}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for path, parameter in model.named_parameters()
    }
    by_name = {
        "state": {path: by_number["state"][numbers[id(parameter)]] for path, parameter in model.named_parameters()},
        "param_groups": rest["param_groups"],
    }
    pending = PendingCheckpoint(
        shard_files.start_writing(shards | parameters, root / "shards"), root / "shards", lambda: None
    )
    with torch.no_grad():  # the training goes on
        for value in [*shards.values(), *parameters.values()]:
            value.mul_(0)
    pending.wait()
    if ranks.is_main():
        for layout, state in (("shards", rest), ("by-number", by_number), ("by-name", by_name)):
            (root / layout).mkdir(exist_ok=True)
            torch.save(state, root / layout / "optimizer.pt")
        torch.save(values, root / "values.pt")
        torch.save(wanted, root / "wanted.pt")
    ranks.barrier()
    told: dict[str, Any] = {}
    for layout in ("shards", "by-number", "by-name"):
        other = stepped()
        for state in other.state.values():
            state["exp_avg"].zero_()
        load_state(model, other, root / layout)
        found = state_of(other)
        settings = [group["weight_decay"] for group in other.param_groups]
        same = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        told[f"state {layout}"] = same and settings == [0.1, 0.0]
    restore_trained(model, root / "shards")
    told["trained"] = all(torch.equal(value.full_tensor(), values[path]) for path, value in parameters.items())

    write_data = dcp.HuggingFaceStorageWriter.write_data

    def full_disk(self: Any, *values: Any) -> Any:
        if ranks.rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, *values)

    dcp.HuggingFaceStorageWriter.write_data = full_disk
    told["write"] = error_of(lambda: shard_files.write(parameters, root / "full"))
    completed: list[int] = []
    pending = PendingCheckpoint(
        shard_files.start_writing(parameters, root / "full"), root / "full", lambda: completed.append(1)
    )
    told["wait"], told["completed"] = error_of(pending.wait), completed
    return told


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
    found |= checkpoints(model, root)
    by_rank = ranks.all_gather(found)
    if ranks.is_main():
        (root / "differing.json").write_text(json.dumps(by_rank))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that is being finalized (pytorch#179291)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
