"""The training data of a run as they are learned: what `--preview` shows, composed from what the run was typed with."""

import os
from typing import Any

from glmtuner.board.records import Record
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.files import read_object
from glmtuner.run_folder.names import OVERRIDES, PROVENANCE
from glmtuner.run_folder.redaction import HIDDEN

MOST_ROWS = 200
NOT_PASSED = ("trainer.output_dir=", "plugins=", "hydra")


def samples(record: Record, dataset: str | None, count: int) -> dict[str, Any]:
    """The answer to api/samples: the first rows of a data set, of the first one unless it is named."""
    from glmtuner.config.compose import compose
    from glmtuner.config.plugins import load_plugins
    from glmtuner.launch.preview import open_preview
    from glmtuner.launch.register import register_presets

    register_presets()
    names = record.values.get("plugins") or []
    load_plugins([str(name) for name in names], named_by_run=True)  # from here, and never from the run's own folder
    words, cwd = words_of(record), os.getcwd()
    try:
        if (folder := folder_of(record)) is not None:
            os.chdir(folder)  # its relative paths are relative to it
        opened = open_preview(compose(words))
        datasets = list(opened.specs)
        name = dataset or next(iter(datasets), None)
        if name not in opened.specs:
            raise ConfigError(f"dataset={name}: the run has no such data set; legal are {', '.join(datasets)}")
        rows = [shown.as_json() | {"segments": segments(shown)} for shown in opened.rows(name, min(count, MOST_ROWS))]
    finally:
        os.chdir(cwd)
    for row in rows:
        for ids in ("input_ids", "labels", "rejected_ids", "rejected_labels"):
            row.pop(ids, None)
    return {
        "datasets": datasets,
        "dataset": name,
        "template": opened.template,
        "notes": list(opened.notes),
        "rows": rows,
    }


def segments(shown: Any) -> list[dict[str, str]]:
    """The parts of a row in order, and what was cut from it."""
    parts = [{"kind": kind, "text": text} for kind, text in shown.parts]
    return [*parts, *({"kind": "cut", "text": text} for text in shown.cut)]


def words_of(record: Record) -> list[str]:
    """The overrides of the run that its data depend on, without hidden secrets and without its folder."""
    try:
        lines = (record.path / OVERRIDES).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        raise CheckpointError(f"{record.id}: it has no {OVERRIDES}, so that its data cannot be encoded again") from None
    return [line for line in lines if "=" in line and HIDDEN not in line and not line.startswith(NOT_PASSED)]


def folder_of(record: Record) -> str | None:
    """The folder in which the run was typed; None if it is not recorded, or gone."""
    try:
        cwd = read_object(record.path / PROVENANCE).get("cwd")
    except CheckpointError:
        return None
    return cwd if isinstance(cwd, str) and os.path.isdir(cwd) else None
