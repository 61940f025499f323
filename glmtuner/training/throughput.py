"""How fast a training is against what its GPU can do: model FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311).

Counted is what the training must compute: of every weight that is multiplied 2 FLOPs a token in the forward pass, 2 more
where a gradient passes through it (from the first block on that has something trained), and 2 more where it is trained
itself; and the products inside attention. Gradients of frozen weights, and what gradient checkpointing computes again, are
not counted.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

# Dense TFLOPS of 16-bit matrix products with float32 sums, by a part of the name that CUDA gives the GPU; the first that
# is found counts. NVIDIA's data sheets, which often print twice as much, for sparse matrices:
# A100, A800  https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
# H100        https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
# H200        https://www.nvidia.com/en-us/data-center/h200/
# L40S, L4    https://www.nvidia.com/en-us/data-center/l40s/ https://www.nvidia.com/en-us/data-center/l4/
# A10, A40    https://www.nvidia.com/en-us/data-center/products/a10-gpu/ https://www.nvidia.com/en-us/data-center/a40/
# RTX 3090    https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf
# RTX 4090    https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
# V100        https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
# T4          https://www.nvidia.com/en-us/data-center/tesla-t4/
PEAK_TFLOPS = (
    ("A100", 312.0),
    ("A800", 312.0),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("L40S", 362.05),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L4", 121.0),
    ("RTX 3090", 71.0),
    ("RTX 4090", 165.2),
    ("V100-PCIE", 112.0),
    ("V100", 125.0),
    ("T4", 65.0),
)
BLOCK = re.compile(r"\.(\d+)\.")  # in the name of a parameter: its block's place


def peak_flops(gpu: str) -> float | None:
    """Floating-point operations a second that a GPU of that name can do in 16 bits; None for one that is not in the table."""
    for name, tflops in PEAK_TFLOPS:
        last = "$" if name.startswith("RTX") else ""  # an RTX 3090 Ti or a laptop's is another one
        if re.search(rf"(^|[\s-]){name}($|[\s-]){last}", gpu):
            return tflops * 1e12
    return None


@dataclass(frozen=True)
class ModelFlops:
    """What a training of one model computes."""

    a_token: int  # in matrix products with weights
    a_square: int  # in causal attention, for the square of a row's number of tokens

    def of(self, tokens: float, squares: float) -> float:
        """The FLOPs of rows with that many tokens, and that sum of squared lengths."""
        return self.a_token * tokens + self.a_square * squares


def model_flops(model: "nn.Module") -> ModelFlops | None:
    """What training computes of a model as it is trained; None where a token does not meet every weight (experts)."""
    config = model.config.get_text_config()
    if any("expert" in name for name in config.to_dict()):
        return None
    base: Any = unwrapped(model)
    looked_up, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    tied = head is not None and head.weight is looked_up
    lowest: float = (
        math.inf
    )  # the first block to which a gradient must pass; 0 also for what stands outside of the blocks
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = BLOCK.search(name)
            lowest = min(lowest, int(block.group(1)) if block else 0)
    a_token = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (parameter is looked_up and not tied) or name.startswith("prefix_encoder."):
            continue  # what is looked up, or made once a batch, is multiplied by no token
        block = BLOCK.search(name)
        passes = block is None or int(block.group(1)) >= lowest
        a_token += (2 + 2 * passes + 2 * parameter.requires_grad) * size_of(parameter)
    layers = config.num_hidden_layers
    width = config.num_attention_heads * (
        getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    )
    with_gradient = max(layers - min(lowest, layers), 0)
    # queries with keys, and weights with values: 2 products of 2 FLOPs, half of them hidden by the causal mask; twice that back
    return ModelFlops(a_token, int(2 * width * (layers + 2 * with_gradient)))


def size_of(parameter: "torch.Tensor") -> int:
    """How many numbers the parameter has, also where this rank holds a share of them, or two in a byte (int4)."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def utilization(flops: float, seconds: float, gpu: str, gpus: int) -> float | None:
    """The share of what `gpus` GPUs could have computed in that time; None where a GPU's peak is not known."""
    peak = peak_flops(gpu)
    return None if peak is None else flops / (seconds * peak * gpus)
