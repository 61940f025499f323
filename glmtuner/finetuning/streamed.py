"""The folder of a sharded model, as one process would write it, with one layer of the model gathered at a time.

transformers' `save_pretrained` decides on the files: it is given tensors without values, and what it would write is taken down. Then
every rank takes part in gathering layer after layer, and each file is written by one rank, so that several files are written at once.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.distributed import ranks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LAYER = re.compile(r"^.*?\.\d+(?=\.)")  # the beginning of a name, with the number of the layer
Described = dict[str, "torch.Tensor"]  # on the meta device


def described(tensors: "Mapping[str, torch.Tensor]") -> Described:
    """The same names, shapes and dtypes, without values."""
    import torch

    return {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}


@dataclass
class File:
    """A file of safetensors: its header, and where each tensor begins."""

    header: bytes
    begins: dict[str, int]
    size: int

    @classmethod
    def of(cls, tensors: Described, metadata: Mapping[str, str]) -> "File":
        """The file that `safetensors.torch.save_file` writes of such tensors."""
        import torch
        from safetensors.torch import save

        # safetensors' own order of the tensors and names of the dtypes
        empty = save(
            {name: torch.empty(0, dtype=each.dtype) for name, each in tensors.items()}, metadata=dict(metadata)
        )
        (length,) = struct.unpack("<Q", empty[:8])
        header: dict[str, Any] = json.loads(empty[8 : 8 + length])
        offset, begins = 0, {}
        for name in header:
            if name == "__metadata__":
                continue
            begins[name], end = offset, offset + tensors[name].numel() * tensors[name].element_size()
            header[name] |= {"shape": [*tensors[name].shape], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(math.ceil(len(text) / 8) * 8)
        begin = 8 + len(text)
        places = {name: begin + place for name, place in begins.items()}
        return cls(struct.pack("<Q", len(text)) + text, places, begin + offset)


@dataclass
class Plan:
    """The files of a folder, the tensors of each, and the names in the model of those that are gathered together."""

    files: dict[str, File]
    units: list[list[str]]
    converted: bool = False
    notices: list[str] = field(default_factory=list)


def plan_of_model(model: "PreTrainedModel", folder: Path, left_out: Sequence[str]) -> Plan:
    """Write all but the weights of a model's folder, on this rank alone; returns what the weights' files are to hold.

    `left_out` are beginnings of names.
    """
    from huggingface_hub import get_torch_storage_size, split_state_dict_into_shards_factory
    from transformers import modeling_utils
    from transformers.core_model_loading import revert_weight_conversion

    from glmtuner.finetuning.trained import is_converted

    state = described({name: value for name, value in model.state_dict().items() if not name.startswith((*left_out,))})
    files: dict[str, File] = {}
    planned: Described = {}
    before = modeling_utils.safe_save_file, modeling_utils.split_torch_state_dict_into_shards

    def take_down(tensors: Described, path: str, metadata: Mapping[str, str]) -> None:
        files[Path(path).name] = File.of(tensors, metadata)
        planned.update(tensors)

    def split(tensors: Described, **options: Any) -> Any:
        """As `split_torch_state_dict_into_shards`, which takes tensors without values for views of storages of their own."""
        return split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=get_torch_storage_size,
            get_storage_id=lambda each: each.untyped_storage()._cdata,
            **options,
        )

    modeling_utils.safe_save_file, modeling_utils.split_torch_state_dict_into_shards = take_down, split  # type: ignore[assignment]
    try:
        model.save_pretrained(folder, state_dict=dict(state))
    finally:
        modeling_utils.safe_save_file, modeling_utils.split_torch_state_dict_into_shards = before
    if not is_converted(model):
        return Plan(files, [[name] for name in state if name in planned])
    kept = modeling_utils.remove_tied_weights_from_state_dict(dict(state), model)
    units = units_of(kept)
    by_unit = [revert_weight_conversion(model, {name: kept[name] for name in unit}) for unit in units]
    shapes = {name: (each.shape, each.dtype) for unit in by_unit for name, each in unit.items()}
    if shapes == {name: (each.shape, each.dtype) for name, each in planned.items()}:
        return Plan(files, units, converted=True)
    notice = "the weights of this model are converted across its layers: every rank gathers the whole model to save it"
    return Plan(files, [[*kept]], converted=True, notices=[notice])


def units_of(names: Mapping[str, Any]) -> list[list[str]]:
    """The names of each layer, and those outside of the layers one by one."""
    units: dict[str, list[str]] = {}
    for name in names:
        layer = LAYER.match(name)
        units.setdefault(layer[0] if layer else name, []).append(name)
    return [*units.values()]


class Failures:
    """The first error of this rank, kept until all ranks have come to the same place."""

    def __init__(self) -> None:
        self.own: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, an error ends the block alone."""
        try:
            yield
        except Exception as error:
            self.own = self.own or error

    def settle(self) -> None:
        """Raise the first error of any rank on every rank: a collective."""
        told = ranks.all_gather(None if self.own is None else f"{type(self.own).__name__}: {self.own}")
        if self.own is not None:
            raise self.own
        for rank, reason in enumerate(told):
            if reason is not None:
                raise OSError(f"rank {rank}: {reason}")


def save_model(model: "PreTrainedModel", folder: Path, left_out: Sequence[str]) -> None:
    """Write a sharded model's folder, a collective; raises the error of any rank on every rank."""
    from transformers.core_model_loading import revert_weight_conversion

    from glmtuner.distributed.shards import whole

    plan: Plan | None = None
    failures = Failures()
    with failures.kept():
        if ranks.is_main():
            plan = plan_of_model(model, folder, left_out)
    failures.settle()
    plan = ranks.broadcast_from_rank0(lambda: plan)
    assert plan is not None
    for sentence in plan.notices:
        say(sentence)
    state = model.state_dict()
    with writing(plan.files, folder, failures) as write:
        for unit in plan.units:
            values = {name: whole(state[name]) for name in unit}
            with failures.kept():
                write(revert_weight_conversion(model, values) if plan.converted else values)
            del values
    failures.settle()


def save_tensors_of_ranks(tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Write sharded tensors to one file, one of them gathered at a time; a collective, which raises the error of any rank."""
    from glmtuner.distributed.shards import whole

    failures = Failures()
    with failures.kept():
        if ranks.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
    failures.settle()
    files = {path.name: File.of(described(tensors), {"format": "pt"})}
    with writing(files, path.parent, failures) as write:
        for name, value in tensors.items():
            value = whole(value)
            with failures.kept():
                write({name: value})
    failures.settle()


@contextmanager
def writing(files: Mapping[str, File], folder: Path, failures: Failures) -> Iterator[Any]:
    """A function that writes tensors into those of the files that are this rank's to write: one in so many as there are ranks."""
    own = [*files][ranks.rank() :: ranks.world_size()]
    with ExitStack() as stack:
        opened: dict[str, IO[bytes]] = {}
        with failures.kept():
            for name in own:
                opened[name] = stack.enter_context((folder / name).open("wb"))
                opened[name].write(files[name].header)
                opened[name].truncate(files[name].size)

        def write(values: "Mapping[str, torch.Tensor]") -> None:
            for name, value in values.items():
                for file, stream in opened.items():
                    if (begin := files[file].begins.get(name)) is not None:
                        stream.seek(begin)
                        stream.write(bytes_of(value))

        yield write
        with failures.kept():
            stack.close()  # what was buffered is written now


def bytes_of(value: "torch.Tensor") -> memoryview:
    """The numbers of a tensor as they lie in memory, row by row."""
    import torch

    numbers: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(numbers)


def differing_on_ranks(model: "PreTrainedModel", folder: Path) -> list[str]:
    """The parameters of a sharded model that a transformers folder holds with other values, bit by bit, on any rank; a collective.

    Each rank reads its own rows. Raises CheckpointError.
    """
    from glmtuner.finetuning.trained import is_converted, own_parameters

    failures, wrong = Failures(), list[str]()
    compared = _loaded_shares(model, folder) if is_converted(model) else _saved_rows(model, folder)
    with failures.kept():
        wrong = [name for name, value in own_parameters(model).items() if not compared(name, value)]
    failures.settle()
    return sorted({name for names in ranks.all_gather(wrong) for name in names})


def _rows(value: "torch.Tensor") -> "torch.Tensor":
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def _saved_rows(model: "PreTrainedModel", folder: Path) -> Any:
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    from glmtuner.distributed.shares import rows_of_rank
    from glmtuner.families.weight_files import tensor_shapes, weight_files
    from glmtuner.finetuning.trained import same_bits

    files = {name: path for path in weight_files(folder) for name in tensor_shapes(path)}

    def same(name: str, value: "torch.Tensor") -> bool:
        if name not in files:
            return False
        with safe_open(files[name], "pt") as file:
            saved = file.get_slice(name)
            if [*saved.get_shape()] != [*value.shape]:
                return False
            shard = isinstance(value, DTensor)
            rows = saved[rows_of_rank(value.shape[0], ranks.rank(), ranks.world_size())] if shard else saved[...]
            return same_bits(_rows(value), rows)

    return same


def _loaded_shares(model: "PreTrainedModel", folder: Path) -> Any:
    """Of weights that transformers converts, the shares that its `from_pretrained` gives this rank; a collective."""
    import torch

    from glmtuner.distributed.shares import loading_shares, share_of
    from glmtuner.finetuning.trained import loaded_as, own_parameters, same_bits

    with loading_shares():
        loaded, _ = loaded_as(model, folder, torch.float32)
    shares = own_parameters(loaded)

    def same(name: str, value: "torch.Tensor") -> bool:
        return name in shares and same_bits(_rows(value), share_of(shares[name]))

    return same
