"""Model FLOPs utilization (MFU) of a training, as Chowdhery et al. 2022 define it (arXiv:2204.02311).

Counted are the FLOPs that the training needs. Per token and weight of a matrix product: 2 in the forward pass, 2 more if a
gradient flows through it (from the first block with a trained parameter on), and 2 more if the weight itself is trained; and
the products inside attention. Gradients of frozen weights and the recomputation of gradient checkpointing are not counted.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

# Dense TFLOPS of 16-bit matrix products with float32 accumulation, by a part of the GPU's name in CUDA; the first match
# counts. From NVIDIA's data sheets, which often print twice as much, for sparse matrices:
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
BLOCK_INDEX = re.compile(r"\.(\d+)\.")  # in the name of a parameter


def peak_flops(gpu: str) -> float | None:
    """The 16-bit floating-point operations a second of a GPU of that name; None if it is not in the table."""
    for name, tflops in PEAK_TFLOPS:
        end = "$" if name.startswith("RTX") else ""  # an RTX 3090 Ti or a laptop GPU is a different one
        if re.search(rf"(^|[\s-]){name}($|[\s-]){end}", gpu):
            return tflops * 1e12
    return None


@dataclass(frozen=True)
class ModelFlops:
    """The FLOPs of a training step of one model, forward and backward."""

    per_token: int  # in matrix products with weights
    per_squared_length: int  # in causal attention, for the square of a row's number of tokens

    def of(self, tokens: float, squared_lengths: float) -> float:
        """The FLOPs of rows with that many tokens, and that sum of squared lengths."""
        return self.per_token * tokens + self.per_squared_length * squared_lengths


def model_flops(model: "nn.Module") -> ModelFlops | None:
    """The FLOPs of the model with its trained parameters; None for experts, where a token does not meet every weight."""
    base: Any = unwrapped(model)
    config = base.config.get_text_config()
    if any("expert" in name for name in config.to_dict()):
        return None
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    lowest: float = math.inf  # the first block that a gradient reaches; 0 also for parameters outside of the blocks
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = BLOCK_INDEX.search(name)
            lowest = min(lowest, int(block.group(1)) if block else 0)
    per_token = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (parameter is embedding and not tied) or name.startswith("prefix_encoder."):
            continue  # no matrix product per token: looked up, or computed once a batch
        block = BLOCK_INDEX.search(name)
        has_gradient = block is None or int(block.group(1)) >= lowest
        per_token += (2 + 2 * has_gradient + 2 * parameter.requires_grad) * size_of(parameter)
    layers = config.num_hidden_layers
    width = config.num_attention_heads * (
        getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    )
    layers_with_gradient = max(layers - min(lowest, layers), 0)
    # queries by keys, and weights by values: 2 products of 2 FLOPs, half of them masked; twice that in the backward pass
    return ModelFlops(per_token, int(2 * width * (layers + 2 * layers_with_gradient)))


def size_of(parameter: "torch.Tensor") -> int:
    """The parameter's number of elements, whether this rank holds a shard of them (ZeRO-3) or they are packed (int4)."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def parameter_count(parameters: Iterable["torch.Tensor"]) -> int:
    """The number of all elements, those of other ranks' shards included."""
    return sum(size_of(parameter) for parameter in parameters)


def utilization(flops: float, seconds: float, gpu: str, gpus: int) -> float | None:
    """The fraction of the FLOPs that `gpus` GPUs could have computed in that time; None if the GPU's peak is unknown."""
    peak = peak_flops(gpu)
    return None if peak is None else flops / (seconds * peak * gpus)
