"""Many runs, one behind the other, in the processes of one start: `python tests/rank_cells.py FILE`, as a rank or as one process.

The file holds a JSON list of cells. One with "words" is a run of the command line with these words. One with "shards" is a model
in so many bits that the ranks load and shard: how far its loss and its gradients are from those of bitsandbytes' own layers, whole,
and the bytes of its quantized weights, are written to the file named "out".
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import distributed
from torch.distributed.tensor import DTensor

from glmtuner.cli.main import main
from glmtuner.config.compose import compose
from glmtuner.distributed import ranks
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning import p_tuning
from glmtuner.finetuning.lora import Lora
from glmtuner.launch.device import shard_model
from glmtuner.launch.register import register_presets
from glmtuner.models.load import load_model

INTEGERS = (torch.uint8, torch.int8)


def adapted(run: Any, in_shares: bool) -> tuple[Any, list[Any]]:
    """The run's model, quantized, with a LoRA that changes it, and its blocks."""
    model = load_model(
        run.model, None, run.quant, torch.device("cpu"), torch.float32, sharded=True, in_shares=in_shares
    )
    run.quant.prepare(model)
    family = family_from_structure(model)
    targets = [*family.lora_targets, *(["experts"] if hasattr(model.config, "num_local_experts") else [])]
    method = Lora(finetuning_type="lora", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lora_target=targets)
    torch.manual_seed(0)
    adapter = method.attach(model, family)
    with torch.no_grad():
        for module in adapter.modules():
            if isinstance(module, LoraLayer):
                for update in module.lora_B.values():
                    update.weight.copy_(torch.randn(update.weight.shape) * 0.1)
    return adapter, family.blocks(model)


def learned(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a training step, with one of evaluation before it, and the gradients."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()
    }


def of_shards(folder: str, bits: int) -> dict[str, Any]:
    """What is compared of the model in a folder."""
    run = compose(
        [
            "model=causal_lm",
            f"model.model_name_or_path={folder}",
            "data.dataset=belle_sample",
            f"quant=int{bits}",
            "parallel=fsdp2",
        ]
    ).run
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    whole, _ = adapted(run, in_shares=False)
    wanted, gradients = learned(whole, ids)
    packed = [value for value in whole.parameters() if value.dtype in INTEGERS]
    model, blocks = adapted(run, in_shares=True)
    kept = [value.glmtuner_share.rows for value in model.parameters() if value.dtype in INTEGERS]
    loaded = sum(rows.untyped_storage().nbytes() for rows in kept)
    shard_model(run, model, blocks)
    scales = {name: value for name, value in model.named_parameters() if name.rpartition(".")[2] == "scales"}
    shards = [value for name, value in model.named_parameters() if value.dtype in INTEGERS and name not in scales]
    loss, found = learned(model, ids)
    largest = {
        name: ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in gradients.items()
    }
    return {
        "loss": loss - wanted, "gradient": max(largest.values()), "gradients": [len(gradients), len(found)],
        "tensors": [len(packed), len(kept), len(shards)], "scales": len(scales),
        "whole": sum(value.nbytes for value in packed), "loaded": loaded,
        "sharded": sum(value.to_local().untyped_storage().nbytes() for value in shards),
        "scales_sharded": sum(value.to_local().nbytes for value in scales.values()), "scales_whole": sum(value.nbytes for value in scales.values()),
    }  # fmt: skip


def run_cells(cells: list[dict[str, Any]]) -> int:
    """Run the cells in their order; returns 1 where one has failed, after which the ranks are no longer in step."""
    leave, ranks.destroy_process_group = ranks.destroy_process_group, lambda: None
    p_tuning.DROPOUT = 0.0  # ranks draw masks of their own
    for cell in cells:
        try:
            if "words" in cell:
                code = main(cell["words"])
            else:
                register_presets()
                if not distributed.is_initialized():
                    run = compose(["trainer.use_cpu=true", "data.dataset=belle_sample"]).run
                    ranks.init_process_group(run.trainer, run.parallel.lost_after)
                found, code = of_shards(cell["shards"], cell["bits"]), 0
                every = ranks.all_gather(found)
                if ranks.is_main():
                    Path(cell["out"]).write_text(json.dumps(every))
        except BaseException:
            traceback.print_exc()
            code = 1
        if code:
            print(f"cell {cell} ended with {code}", flush=True)
            return 1
    leave()
    return 0


if __name__ == "__main__":
    with ranks.Leaving():
        sys.exit(run_cells(json.loads(Path(sys.argv[1]).read_text())))
