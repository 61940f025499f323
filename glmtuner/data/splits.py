"""From the datasets that a run names to its training and evaluation data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import run_folder_of
from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.data import DatasetSpec, find
from glmtuner.data.encode import Encoder
from glmtuner.data.prepare import Prepared, held_out, mixed, prepare
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

    def thinking(self) -> str | None:
        """The mode of most prompts that are trained, else of those that are answered: on or off; None for a template without modes."""
        trained = [part for part in self.prepared if part.spec.name in self.shares]
        on, off = _modes(trained or self.prepared)
        if not on + off:
            return None
        asked = None if trained else self.asks_thinking
        return "on" if (on > off if asked is None else asked) else "off"

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

    def encoded(names: Iterable[str], encoder: Encoder) -> dict[str, Prepared]:
        return {
            name: prepare(specs[name], data, encoder, hub_cache=run.model.cache_dir, token=run.model.use_auth_token)
            for name in dict.fromkeys(names)
        }

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
    return Datasets(train, evaluation, [*prepared.values()], shares, encoder.columns, encoder.asks_thinking)


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
