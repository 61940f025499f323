"""A head that reads one number off hidden states: the reward of an answer, or the value of a token."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from glmtuner.errors import CheckpointError
from glmtuner.models.unwrap import unwrapped

FILE = "value_head.safetensors"
PUBLISHED = "v_head.summary."  # in front of the names, in ChatGLM-Efficient-Tuning's value_head.bin


class ValueHead(nn.Module):
    """One linear layer in float32, on hidden states of any precision."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, H] -> […]."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


def new_head(model: Any, drawn: bool) -> ValueHead:
    """A head for the model, on its device: zero, or drawn with standard deviation 1 / sqrt(H + 1) (arXiv:2403.17031)."""
    hidden_size = model.get_output_embeddings().in_features
    head = ValueHead(hidden_size)
    if drawn:
        nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head.to(model.device)


def save_head(head: nn.Module, folder: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, folder / FILE)


def load_head(head: nn.Module, path: Path) -> None:
    """Copy a saved head, ours or the value_head.bin of ChatGLM-Efficient-Tuning; raises CheckpointError."""
    try:
        saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        head.load_state_dict({name.removeprefix(PUBLISHED): value for name, value in saved.items()})
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no value head of this model ({reason}); use another reward model") from None


def hidden_states(
    model: Any, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor, call: Any = None, logits: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the language-modelling head sees, [R, T, H], and the logits (of the last token alone unless `logits`).

    `call` is the model as it is wrapped to be trained on several ranks. `output_hidden_states` would keep every layer's.
    """
    causal_lm = unwrapped(model)
    spares = not logits and "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
    found: list[torch.Tensor] = []
    handle = causal_lm.base_model.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    try:
        out = (call or model)(
            input_ids=input_ids_RT,
            attention_mask=attention_mask_RT,
            use_cache=False,
            **({"logits_to_keep": 1} if spares else {}),
        )
    finally:
        handle.remove()
    return found[-1], out.logits


def last_token_scores(
    model: Any, head: nn.Module, input_ids_RT: torch.Tensor, attention_mask_RT: torch.Tensor, call: Any = None
) -> torch.Tensor:
    """The head's reading at each row's last token, [R]; rows are padded on the right."""
    states_RTH, _ = hidden_states(model, input_ids_RT, attention_mask_RT, call)
    last_R = attention_mask_RT.sum(1) - 1
    return head(states_RTH[torch.arange(len(last_R), device=last_R.device), last_R])
