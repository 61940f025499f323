"""One rank of several that share rows: losses and gradients of tiny models, compared with plain transformers in one process.

`python tests/shared_row_ranks.py CASE ...` with torch's variables (RANK, WORLD_SIZE, ...) prints on rank 0 a line of JSON for each case: the
difference of the loss, and the largest of a gradient, relative to the largest of its parameter. A case is an architecture of
tests/architectures/zoo.py or tests/segment_models.py, a row ("one" sample, or a "pack" of several), and what is trained.
"""

import contextlib
import json
import os
import sys
from typing import Any

import torch
import zoo
from segment_models import MODELS, VOCABULARY, model_of
from torch import distributed, nn

from glmtuner.data.collate import Collator
from glmtuner.data.parts import PartCollator
from glmtuner.errors import ConfigError
from glmtuner.families import family_named
from glmtuner.kernels.choose import choose_optimizations, require_shared_rows
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.models.prefix import add_prefix
from glmtuner.training.measurements import sample_losses
from glmtuner.training.weighted_loss import weighted_sum

LENGTHS = {"one": (83,), "pack": (37, 5, 61, 28)}  # not multiples of the ranks, and longer than the windows of the zoo


def samples_of(row: str, model: Any, chatglm: bool) -> list[dict[str, list[int]]]:
    """Samples of which the first third is a prompt; ChatGLM-6B's ends in [gMASK] <sop>."""
    drawn = torch.Generator().manual_seed(len(row))
    most = VOCABULARY - 10 if chatglm else model.config.get_text_config().vocab_size
    samples = []
    for length in LENGTHS[row]:
        ids = torch.randint(10, most, (length,), generator=drawn).tolist()
        prompt = max(length // 3, 3)
        if chatglm:
            ids[prompt - 2 : prompt] = [model.config.gmask_token_id, model.config.bos_token_id]
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def model_and_trained(name: str, method: str) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model with random weights, in training mode, and the parameters whose gradients are compared."""
    model = model_of(name) if name in MODELS else zoo.built(name).train()
    if method == "p_tuning":
        model.requires_grad_(False)
        torch.manual_seed(1)
        add_prefix(model, family_named("glm"), tokens=3, projection=True, dropout=0.0)
    return model, {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}


def compared(name: str, row: str, method: str) -> dict[str, Any]:
    """How far the ranks' losses and gradients are from those of plain transformers, sample by sample."""
    model, trained = model_and_trained(name, method)
    samples = samples_of(row, model, hasattr(model, "places"))
    count = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    expected, each = 0.0, []
    for sample in samples:
        batch = {key: torch.tensor([values]) for key, values in sample.items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
        (loss / count).backward()
        each.append(loss.item())
        expected += loss.item() / count
    gradients = {path: parameter.grad.clone() for path, parameter in trained.items() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    padded = Collator(pad_id=getattr(model.config, "pad_token_id", None) or 0)
    chosen = choose_optimizations(model, samples, padded)
    if reason := chosen.left_out.get(FastPath.without_padding):
        return {"case": f"{name}:{row}:{method}", "refused": reason}
    size, own = distributed.get_world_size(), distributed.get_rank()
    collate = PartCollator(collate=chosen.collate, parts=size, own=own)
    try:
        require_shared_rows(model, samples, chosen.collate, collate, contextlib.nullcontext, size)
    except ConfigError as error:
        return {"case": f"{name}:{row}:{method}", "refused": str(error)}
    part = collate(samples)
    loss = weighted_sum(model, part, chunked=chosen.chunks_loss) / count
    loss.backward()
    with torch.no_grad():
        evaluated = sample_losses(model.eval(), part, chunked=chosen.chunks_loss)
    total = loss.detach().clone()
    distributed.all_reduce(total)
    worst, most = 0.0, ""
    # float32 rounds the sums that are smaller gradients
    least = 1e-2 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for path, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        distributed.all_reduce(found)
        wanted = gradients.get(path, torch.zeros_like(parameter))
        differs = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))
        if differs > worst:
            worst, most = differs, path
    return {
        "case": f"{name}:{row}:{method}",
        "loss": abs(float(total) - expected),
        "gradient": worst,
        "of": most,
        "parameters": len(gradients),
        "evaluation": max(abs(float(a) - b) for a, b in zip(evaluated["loss"], each, strict=True)),
        "tokens": int(evaluated["tokens"].sum()) - count,
        "own_tokens": part["input_ids"].shape[1],
    }


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for case in sys.argv[1:]:
        result = compared(*case.split(":"))
        if os.environ["RANK"] == "0":
            print(json.dumps(result), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()
