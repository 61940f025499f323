"""Model FLOPs utilization (MFU) of a training, as Chowdhery et al. 2022 define it (arXiv:2204.02311).

Counted are the FLOPs that the training needs. Per token and weight of a matrix product: 2 in the forward pass, 2 more if a
gradient flows through it (from the first block with a trained parameter on), and 2 more if the weight itself is trained; and
the products inside attention. Of experts those are counted to which a token is routed. Gradients of frozen weights and the
recomputation of gradient checkpointing are not counted.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from glmtuner.models.sizes import routed_shares, share_of, sizes_of, towers
from glmtuner.models.unwrap import unwrapped

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
    """The FLOPs of the model with its trained parameters; None where it is not known how many experts compute a token."""
    base: Any = unwrapped(model)
    shares, sizes = routed_shares(base), sizes_of(model)
    if shares is None:
        return None
    head = base.get_output_embeddings()
    read = {module.weight for module in base.modules() if isinstance(module, nn.Embedding)}
    unused = {parameter for tower in towers(base) for parameter in tower.parameters()}
    if head is not None:
        read -= {*head.parameters()}  # tied
    lowest: float = math.inf  # the first block that a gradient reaches; 0 also for parameters outside of the blocks
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lowest = min(lowest, _block_of(name, 0))
    per_token = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter in read or parameter in unused or name.startswith("prefix_encoder."):
            continue  # no matrix product per token: looked up, or computed once a batch
        has_gradient = _block_of(name, math.inf) >= lowest
        per_token += (2 + 2 * has_gradient + 2 * parameter.requires_grad) * sizes[parameter] * share_of(name, shares)
    # queries by keys, and weights by values: 2 products of 2 FLOPs, half of them masked; twice that in the backward pass
    per_squared_length = sum(
        width * (3 if _block_of(path, math.inf) >= lowest else 1) for path, width in attention_widths(base).items()
    )
    return ModelFlops(round(per_token), per_squared_length)


def _block_of(name: str, outside: float) -> float:
    """The index of the block in which a parameter or module is; `outside` where it is in none."""
    block = BLOCK_INDEX.search(f"{name}.")
    return int(block.group(1)) if block else outside


def attention_widths(base: Any) -> dict[str, int]:
    """Path of each layer's attention -> the widths of a query and of a value, each over all heads of queries, together."""
    from glmtuner.models.attention_calls import UNTRACED, traced_calls

    config = base.config.get_text_config()
    try:
        calls = traced_calls(type(base), base.config)
    except UNTRACED:
        calls = []
    if calls:
        return {call.module: call.heads * call.groups * (call.key_dim + call.value_dim) for call in calls}
    # attention in the model's own code, if any: as config.json has it
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = heads * (getattr(config, "head_dim", 0) or config.hidden_size // max(heads, 1))
    return {f"blocks.{block}": 2 * width for block in range(config.num_hidden_layers) if width}


def utilization(flops: float, seconds: float, gpu: str, gpus: int) -> float | None:
    """The fraction of the FLOPs that `gpus` GPUs could have computed in that time; None if the GPU's peak is unknown."""
    peak = peak_flops(gpu)
    return None if peak is None else flops / (seconds * peak * gpus)
