"""From the datasets that a run names to its training and evaluation data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import run_folder_of
from glmtuner.config.datasets import labels_of
from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.data import DatasetSpec, find
from glmtuner.data.catalog import at_modelscope
from glmtuner.data.encode import Encoder
from glmtuner.data.mixing import held_out, mixed
from glmtuner.data.prepare import Prepared, prepare
from glmtuner.data.weights import COLUMNS, times
from glmtuner.errors import DataError
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

TOKEN_COLUMNS = ("input_ids", "rejected_ids", "other_ids")  # each becomes rows of a batch
# of an entry, those that data.ignore_columns may leave out
OPTIONAL_COLUMNS = {"query", "history", "system", "tools", "kto_tag", "weight"}


@dataclass(frozen=True)
class Datasets:
    """The training and evaluation data of a run; None if it does not train or evaluate.

    `asks_thinking` is the mode of the prompts that are answered; None: each as it was learned.
    """

    train: "Dataset | None"
    evaluation: "Dataset | None"
    prepared: list[Prepared]
    shares: dict[str, float]  # of each dataset in the training records, after mixing
    columns: tuple[str, ...]  # of the evaluation records: those that a batch is made of
    asks_thinking: bool | None = None
    evaluated: dict[str, int] = field(
        default_factory=dict
    )  # dataset -> its number of evaluation records, in their order

    def thinking(self) -> str | None:
        """The mode of most prompts that are trained, else of those that are answered: on or off; None for a template without modes."""
        trained = [part for part in self.prepared if part.spec.name in self.shares]
        on, off = _modes(trained or self.prepared)
        if not on + off:
            return None
        asked = None if trained else self.asks_thinking
        return "on" if (on > off if asked is None else asked) else "off"

    def evaluated_parts(self) -> dict[str, slice]:
        """Where the evaluation records of each dataset are, by the word for it in the names of metrics; empty for one dataset."""
        parts, start = {}, 0
        labels = labels_of([*self.evaluated])
        for name, count in self.evaluated.items():
            if name in labels:
                parts[labels[name]] = slice(start, start + count)
            start += count
        return parts

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
    for name in (*data.dataset, *data.eval_dataset) if reads_records(run) else ():
        spec = find(
            name, data.dataset_dir, catalogue, run.model.cache_dir, split=data.split, ignore_columns=data.ignore_columns
        )
        spec = at_modelscope(spec) if data.use_modelscope else spec
        ignored = list(dict.fromkeys((*spec.ignore_columns, *data.ignore_columns)))
        columns = {role: column for role, column in spec.columns.items() if column not in data.ignore_columns}
        if needed := sorted({*spec.columns} - {*columns} - OPTIONAL_COLUMNS):
            raise DataError(
                f"data.ignore_columns={spec.columns[needed[0]]}: dataset {name!r} reads its {needed[0]} there; leave it out"
            )
        specs[name] = replace(spec, columns=columns, ignore_columns=ignored, input_separator=data.input_separator)
    return specs


def reads_records(run: Run) -> bool:
    """Whether the run trains, evaluates or predicts; one that only asks benchmarks reads no dataset."""
    return run.trainer.do_train or run.trainer.do_eval or run.trainer.do_predict


def datasets_of(run: Run, specs: dict[str, DatasetSpec], encoder: Encoder) -> Datasets:
    """The encoded records, split and mixed. Raises DataError for a dataset in which no token would be learned."""
    from datasets import concatenate_datasets

    data, trainer = run.data, run.trainer
    evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start

    def encoded(names: Iterable[str], encoder: Encoder) -> dict[str, Prepared]:
        return {
            name: prepare(specs[name], data, encoder, hub_cache=run.model.cache_dir, token=run.model.use_auth_token)
            for name in dict.fromkeys(names)
        }

    if not reads_records(run):
        return Datasets(None, None, [], {}, encoder.columns, encoder.asks_thinking)
    prepared = encoded(data.dataset if trainer.do_train or not data.eval_dataset else (), encoder)
    if trainer.do_train and encoder.asks_thinking is None:
        encoder = replace(encoder, asks_thinking=only_mode(*_modes(prepared.values())))
    prepared |= encoded([name for name in data.eval_dataset if evaluates and name not in prepared], encoder)
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
        if not encoder.learns and (column := part.spec.columns.get("weight")) in part.columns:
            say(
                f"dataset {part.spec.name!r}: its {column} is not used: stage={run.stage.name} learns from answers of its own"
            )
    seed = trainer.seed if trainer.data_seed is None else trainer.data_seed
    train, shares = None, {}
    evaluation_parts: list[tuple[str, Dataset]] = []
    rows_of = {name: part.rows for name, part in prepared.items()}
    if any("weight" in rows.column_names for rows in rows_of.values()):  # then all have the columns
        rows_of = {name: times(rows, 1.0) for name, rows in rows_of.items()}
    if data.eval_dataset and evaluates:
        evaluation_parts = [(name, rows_of[name]) for name in data.eval_dataset]
    parts = [rows_of[name] for name in data.dataset if name in prepared]
    if data.dev_ratio:
        split_parts = [held_out(rows, data.dev_ratio, seed) for rows in parts]
        parts = [train_rows for train_rows, _ in split_parts]
        if evaluates:
            evaluation_parts = [(name, rows) for name, (_, rows) in zip(data.dataset, split_parts, strict=True)]
    elif evaluates and not data.eval_dataset:
        evaluation_parts = list(zip(data.dataset, parts, strict=True))
    order = list(dict.fromkeys(name for name, _ in evaluation_parts))
    evaluation_parts.sort(key=lambda part: order.index(part[0]))  # one may be named twice
    if trainer.do_train:
        if len({*data.weights}) > 1:  # they are relative
            parts = [times(rows, weight) for rows, weight in zip(parts, data.weights, strict=True)]
        train, part_shares = mixed(parts, data.mix_probabilities, seed)
        shares = dict(zip(data.dataset, part_shares, strict=True))
    evaluation = concatenate_datasets([rows for _, rows in evaluation_parts]) if evaluation_parts else None
    evaluated: dict[str, int] = {}
    for name, rows in evaluation_parts:
        evaluated[name] = evaluated.get(name, 0) + len(rows)
    columns = encoder.columns
    if evaluation is not None and "weight" in evaluation.column_names:
        columns = (*columns, *COLUMNS)
    return Datasets(train, evaluation, [*prepared.values()], shares, columns, encoder.asks_thinking, evaluated)


def _modes(parts: Iterable[Prepared]) -> tuple[int, int]:
    """How many records are learned behind prompts with thinking on, and how many behind those with thinking off."""
    counts = [part.counts for part in parts]
    return sum(each.thinking for each in counts), sum(each.not_thinking for each in counts)


def only_mode(on: int, off: int) -> bool | None:
    """The mode of all prompts, of which so many have thinking on and off; None if there are both, or none of either."""
    return None if bool(on) == bool(off) else bool(on)


def mode_of_checkpoint(run: Run) -> bool | None:
    """The mode of all prompts that the last checkpoint was trained behind; None if there were both, or nothing says."""
    source = run_folder_of(run.model.checkpoint_dir[-1]) if run.model.checkpoint_dir else None
    entries = RunFolder(source).provenance().get("data", {}).values() if source is not None else ()
    trained = [entry for entry in entries if "share" in entry]
    return only_mode(*(sum(bool(entry.get(name)) for entry in trained) for name in ("thinking", "not_thinking")))


def longest_row(rows: "Dataset") -> int:
    """The number of tokens of the longest row of a batch, rejected and mismatched answers included."""
    import pyarrow.compute as pc

    names = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    longest: int = max(pc.max(pc.list_value_length(rows.data.column(name))).as_py() for name in names)
    return longest
