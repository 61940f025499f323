"""Initializations of LoRA that read the base's weights, and adapters of those that change them, saved as plain LoRA.

PiSSA (Meng et al. 2024, arXiv:2404.02948) starts at the largest singular vectors of a weight, OLoRA (Büyükakyüz 2024,
arXiv:2406.01775) at the first columns of its QR factors. Both take the product off the base: W' = W - s B₀ A₀, with the scaling s.
A trained adapter is then worth W' + s B A = W + s [B, -B₀] [A; A₀], a plain LoRA of twice the rank on the unchanged W, which is
what is saved. Its first half is the adapter in training, bit by bit, so that a checkpoint of this form also resumes it.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError, ConfigError, did_you_mean
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG
from glmtuner.finetuning.trained import load_folder, load_tensors, same_bits, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

WORDS = ("true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva", "mica")
KEPT = "initial_factor"  # a buffer of A and of B: their first values
PISSA = re.compile(r"pissa(_niter_\d+)?")


def initialization_error(value: bool | str) -> str | None:
    """What is wrong with a value of finetuning.init_lora_weights; None if nothing is."""
    word = str(value).lower()
    if word in WORDS or PISSA.fullmatch(word):
        return None
    legal = "legal: true, false, gaussian, orthogonal, pissa, pissa_niter_<iterations>, olora, loftq, eva, mica"
    return f"finetuning.init_lora_weights={value}{did_you_mean(word, WORDS, legal)}"


def changes_base(value: bool | str) -> bool:
    """Whether an initialization takes the adapter's first product off the base's weights."""
    word = str(value).lower()
    return word == "olora" or PISSA.fullmatch(word) is not None


def known_to_peft(value: bool | str, *, on_meta: bool) -> bool | str:
    """The value for PEFT's configuration; LoftQ is applied after it, and weights on the meta device are not initialized."""
    word = str(value).lower()
    if on_meta or word in ("true", "loftq"):
        return True
    return False if word == "false" else word


def keep_initial(adapted: "nn.Module") -> None:
    """Remember the first values of A and B of every linear layer, as buffers that are not saved."""
    for part in _factors(adapted).values():
        part.register_buffer(KEPT, part.weight.detach().clone(), persistent=False)


def _factors(adapted: "nn.Module") -> "dict[str, Any]":
    """Name in an adapter's file -> module, of the matrices A and B that PEFT initialized from the base."""
    return {
        f"{path.removesuffix('.default')}.weight": module
        for path, module in adapted.named_modules()
        if re.search(r"\.lora_[AB]\.default$", path)
    }


def initial_factors(adapted: "nn.Module") -> "dict[str, torch.Tensor]":
    """Name in the file -> the first values, of a model whose base was changed; empty for others."""
    return {name: part.get_buffer(KEPT) for name, part in _factors(adapted).items() if hasattr(part, KEPT)}


def write_as_plain_lora(adapted: "nn.Module", folder: Path) -> None:
    """Rewrite the adapter that PEFT saved in a folder as a plain LoRA of twice the rank, on the base as it was."""
    import torch

    initial, saved = initial_factors(adapted), load_tensors(folder / ADAPTER)
    for name, value in saved.items():
        if ".lora_A." in name or ".lora_embedding_A" in name:
            first = initial.get(name)  # of embeddings there is none, and their base is as it was
            saved[name] = torch.cat([value, torch.zeros_like(value) if first is None else first.to(value)], dim=0)
        elif ".lora_B." in name or ".lora_embedding_B" in name:
            first = initial.get(name)
            saved[name] = torch.cat([value, torch.zeros_like(value) if first is None else -first.to(value)], dim=1)
    save_tensors(saved, folder / ADAPTER)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    stretch = math.sqrt(2) if config["use_rslora"] else 2  # alpha / rank stays, or alpha / √rank
    config |= {"r": 2 * config["r"], "lora_alpha": stretch * config["lora_alpha"], "init_lora_weights": True}
    config["rank_pattern"] = {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {name: stretch * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def first_halves(adapted: "nn.Module", saved: "dict[str, torch.Tensor]", folder: Path) -> "dict[str, torch.Tensor]":
    """The adapter in training, of what `write_as_plain_lora` wrote.

    Where this machine's arithmetic initialized it with other bits, the base gets what was taken off it then. Raises
    CheckpointError if a model with sharded weights would need that.
    """
    initial = initial_factors(adapted)
    halves = dict(saved)
    differing = False
    for name, value in saved.items():
        down, up = ".lora_A." in name or ".lora_embedding_A" in name, ".lora_B." in name or ".lora_embedding_B" in name
        if not (down or up) or value.shape[0 if down else 1] % 2:
            continue
        halves[name], rest = (each.contiguous() for each in value.chunk(2, dim=0 if down else 1))
        if name in initial and initial[name].shape == rest.shape:
            differing = differing or not same_bits(initial[name], rest if down else -rest)
    if differing:
        _take_off(adapted, saved, folder)
    return halves


def _take_off(adapted: Any, saved: "dict[str, torch.Tensor]", folder: Path) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    modules = dict(adapted.named_modules())
    for path, layer, name_a, name_b in _pairs(adapted, saved):
        weight = modules[path].get_base_layer().weight
        if isinstance(weight, DTensor):
            raise CheckpointError(
                f"the adapter in {folder} was initialized on another machine, with other bits of its base's factors, which sharded "
                "weights cannot follow; type parallel=ddp, or model.checkpoint_dir=… to start a plain LoRA from it"
            )
        then = (saved[name_a].chunk(2, 0)[1].to(weight.device), -saved[name_b].chunk(2, 1)[1].to(weight.device))
        with torch.no_grad():
            now = layer.lora_A["default"].get_buffer(KEPT), layer.lora_B["default"].get_buffer(KEPT)
            change = layer.scaling["default"] * (now[1].float() @ now[0].float() - then[1].float() @ then[0].float())
            weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))
            for kept, value in zip(now, then, strict=True):
                kept.copy_(value)


def _pairs(adapted: Any, saved: "dict[str, torch.Tensor]") -> Iterator[tuple[str, Any, str, str]]:
    modules = dict(adapted.named_modules())
    for name in saved:
        if name.endswith(".lora_A.weight") and (path := name.removesuffix(".lora_A.weight")) in modules:
            yield path, modules[path], name, f"{path}.lora_B.weight"


def start_at_quantization_error(adapted: Any) -> None:
    """Start the adapter at the best low-rank part of what int4 rounds off, s B A ≈ W - Q(W) (LoftQ, Li et al. 2023, arXiv:2310.08659).

    The quantized base stays as it is, as after the method's first iteration. Raises ConfigError where the unquantized weights
    cannot be read by their names.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    base = adapted.get_base_model()
    weights = _unquantized(str(base.config._name_or_path))
    for path, layer in base.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        rank, scaling = layer.r["default"], layer.scaling["default"]
        rounded: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).float()
        whole = weights.get(f"{path}.weight")
        if whole is None or whole.shape != rounded.shape:
            raise ConfigError(
                f"finetuning.init_lora_weights=loftq: {base.config._name_or_path} has no weight {path}.weight of shape "
                f"{[*rounded.shape]}, as in transformers' own layout; leave it out, or export the model and name the export in "
                "model.model_name_or_path"
            )
        with torch.no_grad():
            left, values, right = torch.linalg.svd(whole.to(rounded.device).float() - rounded, full_matrices=False)
            root = (values[:rank] / scaling).sqrt()
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            down.get_parameter("weight").copy_(root[:, None] * right[:rank])
            up.get_parameter("weight").copy_(left[:, :rank] * root)


def _unquantized(source: str) -> "dict[str, torch.Tensor]":
    """The base's own weights by name, mapped from its files; raises ConfigError where it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"finetuning.init_lora_weights=loftq: the weights of {source} are not on this machine "
            f"({' '.join(str(error).split())[:200]}); leave it out"
        ) from None
    return load_folder(folder)
