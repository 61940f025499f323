"""From the datasets that a run names to what it trains on and what it is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.data import DatasetSpec, find
from glmtuner.data.encode import Encoder
from glmtuner.data.prepare import Prepared, held_out, mixed, prepare
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TOKENS = ("input_ids", "rejected_ids", "other_ids")  # the columns that hold a row of a batch


@dataclass(frozen=True)
class Datasets:
    """What a run trains on and is evaluated on; None where it does not."""

    train: "Dataset | None"
    evaluation: "Dataset | None"
    prepared: "list[Prepared]"
    shares: dict[str, float]  # of the training records, reached by mixing
    columns: tuple[str, ...]  # of the evaluation records, those that a batch is made of

    def about(self) -> dict[str, Any]:
        """What provenance.json keeps."""
        found = {part.spec.name: part.about() for part in self.prepared}
        return {
            name: {**kept, "share": round(self.shares[name], 6)} if name in self.shares else kept
            for name, kept in found.items()
        }


def dataset_entries(run: Run, catalogue: Sequence[Path]) -> dict[str, DatasetSpec]:
    """The entries of all datasets that the run names; raises for an unknown name before anything is loaded."""
    return {name: find(name, run.data.dataset_dir, catalogue) for name in (*run.data.dataset, *run.data.eval_dataset)}


def datasets_of(run: Run, specs: dict[str, DatasetSpec], encoder: Encoder) -> Datasets:
    """The encoded records, split, mixed and checked: a dataset without a token to learn is refused."""
    from datasets import concatenate_datasets

    data, trainer = run.data, run.trainer
    hub = {"hub_cache": run.model.cache_dir, "token": run.model.use_auth_token}
    evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
    wanted = [*data.dataset] if trainer.do_train or not data.eval_dataset else []
    wanted += data.eval_dataset if evaluates else []
    prepared = {name: prepare(specs[name], data, encoder, **hub) for name in dict.fromkeys(wanted)}
    for part in prepared.values():
        if encoder.learns and part.counts.learned_tokens == 0:
            raise DataError(
                f"data.dataset={part.spec.name}: not one token would be learned of its {part.counts.records} records; "
                f"its entry ({part.spec.origin}) names the wrong columns, or data.max_target_length={data.max_target_length} "
                "leaves nothing of the answers"
            )
    seed = trainer.seed if trainer.data_seed is None else trainer.data_seed
    train, evaluation, shares = None, None, {}
    if data.eval_dataset and evaluates:
        evaluation = concatenate_datasets([prepared[name].rows for name in data.eval_dataset])
    parts = [prepared[name].rows for name in data.dataset if name in prepared]
    if data.dev_ratio:
        halves = [held_out(rows, data.dev_ratio, seed) for rows in parts]
        parts = [kept for kept, _ in halves]
        evaluation = concatenate_datasets([held for _, held in halves]) if evaluates else None
    elif evaluates and not data.eval_dataset:
        evaluation = concatenate_datasets(parts)
    if trainer.do_train:
        train, reached = mixed(parts, data.mix_probabilities, seed)
        shares = dict(zip(data.dataset, reached, strict=True))
    return Datasets(train, evaluation, list(prepared.values()), shares, encoder.columns)


def longest_row(rows: "Dataset") -> int:
    """The most tokens that a row of the table has, answers that were not chosen among them."""
    import pyarrow.compute as pc

    found = [name for name in TOKENS if name in rows.column_names]
    return max(pc.max(pc.list_value_length(rows.data.column(name))).as_py() for name in found)
