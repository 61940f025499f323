"""What plain transformers and PEFT compute: every sample alone, in float32, without a cache. Nothing of glmtuner takes part."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100
UNQUANTIZED = {"mamba": ["dt_proj"]}  # whose weight transformers multiplies outside of the layer
AUXILIARY = ("router_aux_loss_coef", "aux_loss_alpha")


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    """The model of a folder in float32, of the class that its config.json names, with an adapter that PEFT itself loads; in eval mode."""
    import transformers

    (kind,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model: Any = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def dequantized(model: Any, bits: int) -> Any:
    """The model with the dequantized value of each weight that bitsandbytes can quantize, which is in place of the weight.

    Those are linear layers but for the head, and routed experts. In 8 bits, the inputs of linear layers are rounded, too, row by
    row in float16, as LLM.int8() does below its threshold for outliers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model) + UNQUANTIZED.get(model.config.model_type, [])
    for path, module in model.named_modules():
        if any(path == name or path.startswith(f"{name}.") or path.endswith(f".{name}") for name in kept):
            continue
        if type(module) in (nn.Linear, Conv1D):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            value = rounded(weight.detach(), bits)
            module.weight.data = (value.T if isinstance(module, Conv1D) else value).contiguous()
            if bits == 8:
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], 8), *inputs[1:]))
        elif "Experts" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 3:
                    parameter.data = rounded(parameter.detach(), bits)
    return model


def rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    """What bitsandbytes gives back of a value: NF4 in blocks of 64 with quantized scales, or int8 with a scale for each row."""
    from bitsandbytes import functional as bnb

    if bits == 4:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(value.contiguous(), compress_statistics=True, quant_type="nf4"))
    integers, scales, _ = bnb.int8_vectorwise_quant(value.reshape(-1, value.shape[-1]).to(torch.float16))
    return bnb.int8_vectorwise_dequant(integers, scales).view(value.shape).to(value.dtype)


def sum_of_losses(model: Any, row: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """The summed cross-entropy of a row's learned tokens, in nats."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), labels[1:], ignore_index=IGNORED, reduction="sum")


def num_learned(rows: Iterable[Mapping[str, Sequence[int]]]) -> int:
    """The number of learned tokens of the rows."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def loss_of(model: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """The mean loss of the rows' learned tokens, in nats."""
    with torch.no_grad():
        return float(sum(sum_of_losses(model, row) for row in rows) / num_learned(rows))


def gradients_of(model: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """The gradients of that mean, by the parameters' names."""
    total = num_learned(rows)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    for row in rows:
        (sum_of_losses(model, row) / total).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def answer_of(model: Any, prompt: Sequence[int], count: int, stops: Iterable[int]) -> list[int]:
    """The most probable next token, `count` times or up to a stop token, each computed from the whole text anew."""
    ids, stops = list(prompt), set(stops)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids[len(prompt) :]
