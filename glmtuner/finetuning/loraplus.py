"""LoRA+: a larger learning rate for the matrices B, which start at zero, than for the matrices A."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def loraplus_rates(
    model: "nn.Module", rate: float, ratio: float, rate_of_embeddings: float
) -> "dict[nn.Parameter, float]":
    """The rates of the trained parameters that do not have `rate` (Hayou et al. 2024, arXiv:2402.12354), grouped as by PEFT.

    `ratio` times `rate` for B and for all vectors, and `rate_of_embeddings` for the adapters of embeddings.
    """
    from peft.tuners.lora.layer import Embedding

    rates: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, Embedding):
            of_lora = (module.lora_embedding_A, module.lora_embedding_B)
            rates |= {
                value: rate_of_embeddings for part in of_lora for value in part.parameters() if value.requires_grad
            }
    for name, value in model.named_parameters():
        if value.requires_grad and value not in rates and ("lora_B" in name or value.ndim == 1):
            rates[value] = rate * ratio
    return rates
