"""Counts the bytes that a forward and backward pass on fake tensors holds.

torch.distributed._tools.mem_tracker.MemTracker finds the same peak for full fine-tuning, but raises on models with frozen
parameters (torch 2.13), whose module outputs have no gradient.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


MMAP_THRESHOLD = 2**25  # bytes from which on glibc allocates a tensor by mmap, and returns it to the system when freed


class Ledger:
    """Bytes of the storages that are alive, their peak, and what the peak is made of."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.alive = self.peak = self.gradients = self.kept = 0
        self.gradients_at_peak = self.kept_at_peak = (
            0  # kept: what the forward pass holds when it reaches the output head
        )
        self.allocated = self.allocated_on_heap = 1  # sums over all allocations, and over those below MMAP_THRESHOLD
        self._nbytes: dict[int, int] = {}  # id of a storage -> bytes; storages keep their Python object while they live
        self._with_gradient: set[int] = set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self.count_gradient)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self.reached_head)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the allocations of all operations while this lasts."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        add = self._add

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if (
                    func is torch.ops.aten._grouped_mm.default
                ):  # of experts; without values torch knows it in bfloat16 alone
                    outputs = args[0].new_empty(grouped_shape(*args))
                else:
                    outputs = func(*args, **(kwargs or {}))
                for output in tree_leaves(outputs):
                    if isinstance(output, torch.Tensor):
                        add(output.untyped_storage())
                return outputs

        with Counting():
            yield

    def ignore_existing(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Do not count these tensors, which are counted elsewhere."""
        for tensor in tensors:
            self._nbytes[id(tensor.untyped_storage())] = 0

    def count_gradient(self, parameter: "torch.Tensor") -> None:
        """Count the parameter's gradient as one, once."""
        if id(parameter) not in self._with_gradient and parameter.grad is not None:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.nbytes

    def clear_gradients(self) -> None:
        """Called after the gradients were freed."""
        self.gradients = 0
        self._with_gradient.clear()

    def reached_head(self, *_: Any) -> None:
        """Called before the output head, when the activations of all blocks are held."""
        self.kept = max(self.kept, self.alive - self.gradients)

    def _add(self, storage: "torch.UntypedStorage") -> None:
        key = id(storage)
        if key in self._nbytes:
            return
        nbytes = self._nbytes[key] = storage.nbytes()
        self.alive += nbytes
        self.allocated += nbytes
        if nbytes < MMAP_THRESHOLD:
            self.allocated_on_heap += nbytes
        weakref.finalize(storage, self._free, key)
        if self.alive > self.peak:
            self.peak, self.gradients_at_peak, self.kept_at_peak = self.alive, self.gradients, self.kept

    def _free(self, key: int) -> None:
        self.alive -= self._nbytes.pop(key, 0)


def grouped_shape(one: "torch.Tensor", other: "torch.Tensor", ends: "torch.Tensor | None" = None, *_: Any) -> list[int]:
    """The shape of the product of matrices by groups: of rows with a matrix each, or of columns with rows, a product each."""
    if one.dim() == 2 and other.dim() == 2 and ends is not None:
        return [len(ends), one.shape[0], other.shape[1]]
    if one.dim() == 3 and other.dim() == 3:
        return [one.shape[0], one.shape[1], other.shape[2]]
    return [one.shape[-2], other.shape[-1]]
