"""Another module tree on the same weights: what is attached to one tree leaves the other as it was."""

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED_STATE = ("quant_state", "state")  # of bitsandbytes' layers: scales, and weights in the layout of their products


def twin_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of the model's modules and config; parameters, buffers and the states of quantized layers are the same objects.

    It takes no memory for weights. A weight that is changed in place, moved or cast is changed in both.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = [
            *module._parameters.values(),
            *module._buffers.values(),
            *(vars(module).get(name) for name in SHARED_STATE),
        ]
        memo |= {id(value): value for value in kept if value is not None}
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    return twin
