"""Counts the bytes that a forward and backward pass on fake tensors holds."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


MAPPED = 2**25  # bytes of a tensor from which on glibc has it from the system, and gives it back when it goes


class Ledger:
    """Bytes of the tensors that are alive, as operations make them; the most there were, and what it was made of."""

    def __init__(self, model: "nn.Module") -> None:
        self.alive = self.most = self.gradients = self.kept = 0
        self.at_peak = (0, 0)  # gradients, and what the forward pass had kept until the output head
        self.made, self.made_on_heap = 1, 1  # all that was ever made, in tensors of any size and in smaller than MAPPED
        self._sizes: dict[int, int] = {}
        self._with_gradient: set[int] = set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self.reached_head)

    @contextmanager
    def open(self) -> Iterator["Ledger"]:
        """Count what happens while this lasts."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        ledger = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = func(*args, **(kwargs or {}))
                for value in tree_leaves(made):
                    if isinstance(value, torch.Tensor):
                        ledger._add(value.untyped_storage())
                return made

        with Counting():
            yield self

    def ignore_existing(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Do not count these: they were there before."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _add(self, storage: "torch.UntypedStorage") -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += self._sizes[key]
        self.made += self._sizes[key]
        if self._sizes[key] < MAPPED:
            self.made_on_heap += self._sizes[key]
        weakref.finalize(storage, self._free, key)
        if self.alive > self.most:
            self.most, self.at_peak = self.alive, (self.gradients, self.kept)

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)

    def _gradient(self, parameter: "torch.Tensor") -> None:
        if id(parameter) not in self._with_gradient and parameter.grad is not None:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.nbytes

    def reached_head(self, *_: Any) -> None:
        self.kept = max(self.kept, self.alive - self.gradients)
