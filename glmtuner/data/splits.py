"""From the datasets that a run names to its training and evaluation data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.data import DatasetSpec, find
from glmtuner.data.encode import Encoder
from glmtuner.data.prepare import Prepared, held_out, mixed, prepare
from glmtuner.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TOKEN_COLUMNS = ("input_ids", "rejected_ids", "other_ids")  # each becomes rows of a batch
# of an entry, those that data.ignore_columns may leave out
OPTIONAL_COLUMNS = {"query", "history", "system", "tools", "kto_tag", "weight"}


@dataclass(frozen=True)
class Datasets:
    """The training and evaluation data of a run; None if it does not train or evaluate."""

    train: "Dataset | None"
    evaluation: "Dataset | None"
    prepared: list[Prepared]
    shares: dict[str, float]  # of each dataset in the training records, after mixing
    columns: tuple[str, ...]  # of the evaluation records: those that a batch is made of

    def thinking(self) -> str | None:
        """The mode of most of the records' prompts, on or off; None for a template without modes."""
        on = sum(part.counts.thinking for part in self.prepared)
        off = sum(part.counts.not_thinking for part in self.prepared)
        return None if not on + off else "on" if on > off else "off"

    def about(self) -> dict[str, Any]:
        """The datasets' entries in provenance.json, by name."""
        entries = {part.spec.name: part.about() for part in self.prepared}
        return {
            name: {**entry, "share": round(self.shares[name], 6)} if name in self.shares else entry
            for name, entry in entries.items()
        }


def dataset_entries(run: Run, catalogue: Sequence[Path]) -> dict[str, DatasetSpec]:
    """The entries of all datasets that the run names; raises UnknownName and DataError before anything is loaded."""
    data, specs = run.data, {}
    for name in (*data.dataset, *data.eval_dataset):
        spec = find(
            name, data.dataset_dir, catalogue, run.model.cache_dir, split=data.split, ignore_columns=data.ignore_columns
        )
        ignored = list(dict.fromkeys((*spec.ignore_columns, *data.ignore_columns)))
        columns = {role: column for role, column in spec.columns.items() if column not in data.ignore_columns}
        if needed := sorted({*spec.columns} - {*columns} - OPTIONAL_COLUMNS):
            raise DataError(
                f"data.ignore_columns={spec.columns[needed[0]]}: dataset {name!r} reads its {needed[0]} there; leave it out"
            )
        specs[name] = replace(spec, columns=columns, ignore_columns=ignored, input_separator=data.input_separator)
    return specs


def datasets_of(run: Run, specs: dict[str, DatasetSpec], encoder: Encoder) -> Datasets:
    """The encoded records, split and mixed. Raises DataError for a dataset in which no token would be learned."""
    from datasets import concatenate_datasets

    data, trainer = run.data, run.trainer
    evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
    names = [*data.dataset] if trainer.do_train or not data.eval_dataset else []
    names += data.eval_dataset if evaluates else []
    prepared = {
        name: prepare(specs[name], data, encoder, hub_cache=run.model.cache_dir, token=run.model.use_auth_token)
        for name in dict.fromkeys(names)
    }
    held = {name.rpartition(".")[2] for part in prepared.values() for name in part.columns}
    if unknown := [name for name in data.ignore_columns if name not in held]:
        say(f"data.ignore_columns={','.join(unknown)}: no record that was read holds anything there")
    for part in prepared.values():
        if encoder.learns and part.counts.learned_tokens == 0:
            raise DataError(
                f"data.dataset={part.spec.name}: no token of its {part.counts.records} records would be learned; "
                f"its entry ({part.spec.origin}) names the wrong columns, or data.max_target_length={data.max_target_length} "
                "leaves nothing of the answers"
            )
    seed = trainer.seed if trainer.data_seed is None else trainer.data_seed
    train, evaluation, shares = None, None, {}
    if data.eval_dataset and evaluates:
        evaluation = concatenate_datasets([prepared[name].rows for name in data.eval_dataset])
    parts = [prepared[name].rows for name in data.dataset if name in prepared]
    if data.dev_ratio:
        split_parts = [held_out(rows, data.dev_ratio, seed) for rows in parts]
        parts = [train_rows for train_rows, _ in split_parts]
        evaluation = concatenate_datasets([held for _, held in split_parts]) if evaluates else None
    elif evaluates and not data.eval_dataset:
        evaluation = concatenate_datasets(parts)
    if trainer.do_train:
        train, part_shares = mixed(parts, data.mix_probabilities, seed)
        shares = dict(zip(data.dataset, part_shares, strict=True))
    return Datasets(train, evaluation, list(prepared.values()), shares, encoder.columns)


def longest_row(rows: "Dataset") -> int:
    """The number of tokens of the longest row of a batch, rejected and mismatched answers included."""
    import pyarrow.compute as pc

    names = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    longest: int = max(pc.max(pc.list_value_length(rows.data.column(name))).as_py() for name in names)
    return longest
