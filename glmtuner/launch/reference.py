"""The reference's log-probabilities of all records, computed before the first step and kept in the run folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glmtuner.console import say
from glmtuner.data.reference import COLUMN, digest, with_reference
from glmtuner.distributed import ranks
from glmtuner.inference.context import RunContext
from glmtuner.launch.optimizations import TrainingBatches
from glmtuner.run_folder.names import PARTIAL, REFERENCE

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from glmtuner.objectives.objective import Objective, ReferenceObjective


def with_reference_logprobs(
    context: RunContext,
    objective: "Objective | None",
    batches: TrainingBatches,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[RunContext, TrainingBatches]:
    """The context and the batches with the column of data/reference.py, where stage.precompute_reference asks for it.

    The reference is then no longer held. A resumed run reads what is in its folder, if that is of the same records.
    """
    from glmtuner.finetuning.trained import load_tensors, save_tensors
    from glmtuner.objectives.objective import ReferenceObjective

    if not isinstance(objective, ReferenceObjective) or not objective.precomputes:
        return context, batches
    data, file = context.data, context.folder / REFERENCE
    splits = {"train": data.train, "evaluation": data.evaluation}
    known = load_tensors(file) if ranks.broadcast_from_rank0(file.is_file) else {}
    found: dict[str, torch.Tensor] = {}
    columns: dict[str, Dataset | None] = dict.fromkeys(splits)
    for split, rows in splits.items():
        if rows is None:
            continue
        name = f"{split}.{digest(rows)}"
        if name in known:
            say(f"reference: the log-probabilities of {len(rows):,} {split} records are read from {REFERENCE}")
        else:
            say(f"reference: the log-probabilities of {len(rows):,} {split} records are computed, once")
            known[name] = _computed(context, objective, rows, batches.collator, autocast)
        found[name] = known[name]
        columns[split] = with_reference(rows, known[name])
    if ranks.is_main():
        partial = file.with_name(f".{file.name}{PARTIAL}")
        save_tensors(found, partial)
        partial.rename(file)
    ranks.barrier()
    objective.forget_reference()
    with_column = replace(
        data, train=columns["train"], evaluation=columns["evaluation"], columns=(*data.columns, COLUMN)
    )
    return replace(context, data=with_column), replace(batches, rows=with_column.train)


def _computed(
    context: RunContext,
    objective: "ReferenceObjective",
    rows: "Dataset",
    collator: Callable[[Any], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> "torch.Tensor":
    """The log-probabilities, float32, [rows, 2]; each rank computes its share of the batches, and as many as the others."""
    import torch

    size, device = context.run.trainer.per_device_train_batch_size, objective.model.device
    computed: dict[int, list[float]] = {}
    for number in ranks.turns(-(-len(rows) // size)):
        first = (number or 0) * size
        indices = range(first, min(first + size, len(rows)))
        batch = collator([rows[index] for index in indices])
        with autocast():
            logprobs_R = objective.reference_logprobs({name: value.to(device) for name, value in batch.items()})
        if number is not None:
            computed.update(zip(indices, torch.stack(logprobs_R.chunk(2), 1).tolist(), strict=True))
    everyone = {index: pair for part in ranks.all_gather(computed) for index, pair in part.items()}
    return torch.tensor([everyone[index] for index in range(len(rows))], dtype=torch.float32)
