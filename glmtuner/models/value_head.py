"""A head that maps hidden states to one number: the reward of an answer, or the value of a token.

Shape letters: R rows, T tokens, H hidden size.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from glmtuner.distributed.shards import exchange
from glmtuner.errors import CheckpointError
from glmtuner.models.unwrap import unwrapped

FILE = "value_head.safetensors"
PUBLISHED_PREFIX = "v_head.summary."  # of the names in ChatGLM-Efficient-Tuning's value_head.bin


class ValueHead(nn.Module):
    """One linear layer, computed in float32 on hidden states of any precision."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, H] -> […], float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def new_head(model: Any, random_init: bool) -> ValueHead:
    """A head for the model, on its device: zero, or random with standard deviation 1 / sqrt(H + 1) (arXiv:2403.17031)."""
    output = model.get_output_embeddings()
    hidden_size = getattr(output, "original_module", output).in_features  # PEFT wraps one of which it trains rows
    head = ValueHead(hidden_size)
    if random_init:
        nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head.to(model.device)


def save_head(head: nn.Module, folder: Path) -> None:
    """Write the head's weights to `folder` / FILE."""
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / FILE)


def load_head(head: nn.Module, path: Path) -> None:
    """Load saved weights into the head: a file of `save_head`, or a value_head.bin of ChatGLM-Efficient-Tuning.

    Raises CheckpointError for a file that does not fit, or with values that are NaN or infinite.
    """
    try:
        saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        values = {name.removeprefix(PUBLISHED_PREFIX): value for name, value in saved.items()}
        if spoiled := [name for name, value in values.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{spoiled[0]} is NaN or infinite")
        assign_values(head, values)
    except (
        SafetensorError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is not a value head of this model ({reason}); use another reward model"
        ) from None


def assign_values(head: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give the head these values, also where every rank holds a shard of it; raises RuntimeError where they do not fit."""
    own = {name: parameter for name, parameter in head.named_parameters() if isinstance(parameter, DTensor)}
    if not own:
        head.load_state_dict(values)
        return
    if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in own.items()}:
        raise RuntimeError(f"it holds {', '.join(f'{name} {[*value.shape]}' for name, value in values.items())}")
    for name, parameter in own.items():
        exchange(parameter, values[name].to(parameter.dtype))


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[torch.Tensor]]:
    """While this lasts, the last hidden states of every forward pass are added to the list, each [R, T, H].

    A hook reads them, since `output_hidden_states` would keep those of every layer.
    """
    states: list[torch.Tensor] = []
    handle = unwrapped(model).base_model.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    try:
        yield states
    finally:
        handle.remove()
