"""The report of one run, in the terminal and as report.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig

from glmtuner.console import say, table
from glmtuner.errors import CheckpointError
from glmtuner.report.benchmarks import SUBJECT, benchmarks_table, method_of_bounds
from glmtuner.report.escape import markdown_cell, markdown_code, markdown_line
from glmtuner.report.sampled import first_and_last
from glmtuner.run_folder.checkpoints import checkpoint_problem, checkpoints
from glmtuner.run_folder.files import is_number, read_lines, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import EVALUATIONS, LOSS_PLOT, PREDICTIONS, REPORT

T = TypeVar("T")
MAX_ANSWERS = 8
MAX_SKIPPED_RECORDS = 20
MISSING = "-"


def show_run(path: Path) -> None:
    """Print a run folder: its settings, scores, some answers, and where its weights are.

    Raises CheckpointError if the folder does not exist, holds no run or is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}; run folders are under outputs/<date>/<time>_<name>")
    folder = RunFolder(path)
    config = folder.config(complete=True)
    provenance = folder.provenance()
    state = "finished" if folder.is_finished else "unfinished: the same command resumes it"
    rows = [("run", f"{path} ({state})"), *run_facts(config, provenance)]
    complete = [checkpoint.name for checkpoint in checkpoints(path) if checkpoint_problem(checkpoint) is None]
    rows.append(("checkpoints", ", ".join(complete) or MISSING))
    rows.append(("weights", str(folder.trained() or MISSING)))
    table("", ("", ""), rows, show_header=False)
    _show_scores(folder)
    _show_answers(folder)
    if (folder / LOSS_PLOT).is_file():
        say(f"loss curve: {folder / LOSS_PLOT}")


def show_results(folder: RunFolder) -> None:
    """Print scores, some answers and the run folder, as a run does at its end."""
    _show_scores(folder)
    _show_answers(folder)
    say(f"run folder: {folder.path}")


def run_facts(config: DictConfig, provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the run's command, settings, data and code."""
    method = config.finetuning
    given = {name: value for name, value in method.items() if name != "finetuning_type" and not _is_off(value)}
    if given.get("init_lora_weights") is True:
        del given["init_lora_weights"]
    if "loraplus_lr_ratio" not in given:
        given.pop("loraplus_lr_embedding", None)
    knobs = ", ".join(f"{name} {_format_knob(value)}" for name, value in given.items())
    data = "; ".join(f"{name}: {_count_records(counts)}" for name, counts in provenance.get("data", {}).items())
    return [
        ("command", provenance.get("command", MISSING)),
        ("stage", config.stage.name),
        ("model", f"{config.model.model_name_or_path} ({config.model.family}, template {config.model.template})"),
        ("quantization", f"int{config.quant.quantization_bit}" if config.quant.quantization_bit else "none"),
        ("method", f"{method.finetuning_type}{f' ({knobs})' if knobs else ''}"),
        ("data", data or MISSING),
        ("seed", str(config.trainer.seed)),
        ("started", provenance.get("started", MISSING)),
        ("code", _versions(provenance)),
    ]


def _count_records(counts: dict[str, Any]) -> str:
    truncated_records = counts.get("prompts_cut", 0) + counts.get("answers_cut", 0)
    return f"{counts.get('records', 0):,} records" + (f", {truncated_records:,} shortened" if truncated_records else "")


def _versions(provenance: dict[str, Any]) -> str:
    packages, git = provenance.get("packages", {}), provenance.get("git")
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("glmtuner", "transformers", "torch") if packages.get(name)
    )
    return versions + (f"; git {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else "")


def _is_off(value: Any) -> bool:
    """Whether a key with this value is not in use."""
    return (
        value is None
        or value is False
        or value == "none"
        or (isinstance(value, (ListConfig, DictConfig)) and not value)
    )


def _format_knob(value: Any) -> str:
    if isinstance(value, DictConfig):
        return f"{{{', '.join(f'{name!s}: {_format_knob(each)}' for name, each in value.items())}}}"
    is_scalar = isinstance(value, (str, int, float, bool, type(None)))
    return str(value) if is_scalar else f"[{', '.join(map(str, value))}]"


def _show_scores(folder: RunFolder) -> None:
    header, rows = scores_table(folder.metrics(), scores_before_training(folder))
    if rows:
        table("", header, rows, show_header=len(header) == 3, lines=False)


def scores_table(metrics: dict[str, float], before: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: metric, value, and, if there are scores `before` training, those."""
    header = ["metric", "value", *(["before training"] if before else [])]
    rows = [
        [name, format_number(value), format_number(before[name]) if name in before else ""][: len(header)]
        for name, value in metrics.items()
        if not name.startswith(SUBJECT)  # of which there are dozens, in a table of their own
    ]
    return header, rows


def scores_before_training(folder: RunFolder) -> dict[str, float]:
    """The scores of the evaluation at step 0 (trainer.eval_on_start), under the names that they have in metrics.json."""
    line = next((line for line in folder.history() if line.get("step") == 0), {})
    scores = {
        name.removeprefix("eval_"): value
        for name, value in line.items()
        if name.startswith("eval_") and is_number(value)
    }
    return {f"{prefix}_{name}": value for name, value in scores.items() for prefix in ("eval", "predict")}


def format_number(value: float) -> str:
    """1,234 for an int; a float with two decimals, or four significant digits below 1."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}"


def answers_table(folder: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Header and rows of some answers: question, answer before training if there is one, answer, label.

    The references that the answers were scored against follow if they differ from the labels. For pairs that a reward model
    scored: question, both answers, their scores. Both are empty without predictions.
    """
    after, before = read_predictions(folder / PREDICTIONS), read_predictions(folder / EVALUATIONS / "step-0.jsonl")
    if not after:
        return [], []
    are_pairs = "chosen_score" in after[min(after)]
    indices = [index for index in sorted(after) if ("chosen_score" in after[index]) is are_pairs]
    shown = [(index, after[index]) for index in evenly_spaced(indices, MAX_ANSWERS)]
    if are_pairs:
        header = ["question", "better answer", "score", "worse answer", "score"]
        columns = ("prompt", "chosen", "chosen_score", "rejected", "rejected_score")
        rows = [
            [format_number(line[column]) if "score" in column else line[column] for column in columns]
            for _, line in shown
        ]
    else:
        header = ["question", *(["before", "after"] if before else ["answer"]), "label"]
        rows = []
        for index, line in shown:
            earlier = [before.get(index, {}).get("predict", MISSING)] if before else []
            rows.append([line["prompt"], *earlier, line["predict"], line["label"], reference_of(line)])
        if all(label.split() == reference.split() for *_, label, reference in rows):
            rows = [row[:-1] for row in rows]
        else:
            header.append("scored against")
    return header, [[truncated(text) for text in row] for row in rows]


def sampled_table(folder: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the answers that stage=grpo sampled in the first and in the last step; both are empty for other stages."""
    numbers, lines = first_and_last(folder)
    if not lines:
        return [], []
    rows = [
        [
            str(line["step"]),
            *(truncated(line[name]) for name in ("prompt", "label", "answer")),
            *(format_number(line[name]) if name in line else MISSING for name in numbers),
        ]
        for line in lines
    ]
    return ["step", "question", "label", "answer", *numbers], rows


def read_predictions(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a file of answers, or of scored pairs, by their index; lines that are neither are left out."""
    texts, pair = ("prompt", "label", "predict"), ("prompt", "chosen", "rejected")
    scores = ("chosen_score", "rejected_score")

    def is_complete(line: dict[str, Any]) -> bool:
        is_answer = all(isinstance(line.get(name), str) for name in texts)
        is_pair = all(isinstance(line.get(name), str) for name in pair)
        return is_answer or (is_pair and all(is_number(line.get(name)) for name in scores))

    return {
        line["index"]: line for line in read_lines(path) if isinstance(line.get("index"), int) and is_complete(line)
    }


def reference_of(line: dict[str, Any]) -> str:
    """What the answer was scored against; earlier versions scored against the label itself."""
    return str(line.get("reference", line["label"]))


def evenly_spaced(items: Sequence[T], max_items: int) -> list[T]:
    """At most `max_items` of the items, at equal distances, in their order."""
    if len(items) <= max_items:
        return list(items)
    return [items[number * len(items) // max_items] for number in range(max_items)]


def truncated(text: str, max_length: int = 160) -> str:
    """The text on one line, of at most so many characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= max_length else f"{flat[: max_length - 1]}…"


def _show_answers(folder: RunFolder) -> None:
    for header, rows in (answers_table(folder), sampled_table(folder)):
        if rows:
            table("", header, rows)


def write_run_markdown(folder: RunFolder, metrics: dict[str, float]) -> None:
    """Write report.md, the run on one page."""
    provenance = folder.provenance()
    lines = [f"# {markdown_line(folder.path.name)}", "", "|  |  |", "| --- | --- |"]
    for name, value in run_facts(folder.config(complete=True), provenance):
        lines.append(f"| {name} | {(markdown_code if name == 'command' else markdown_cell)(value)} |")
    if metrics:
        lines += ["", "## Results", "", *markdown_table(*scores_table(metrics, scores_before_training(folder)))]
    header, rows = benchmarks_table(folder)
    if rows:
        lines += ["", "## Benchmarks", "", *markdown_table(header, rows), "", method_of_bounds(folder)]
    losses = [line["loss"] for line in folder.history() if is_number(line.get("loss"))]
    if losses:
        lines += ["", f"Training loss: {losses[0]:.4f} at the first logged step, {losses[-1]:.4f} at the last."]
    if (folder / LOSS_PLOT).is_file():
        lines += ["", f"![training loss]({LOSS_PLOT})"]
    header, rows = answers_table(folder)
    if rows:
        lines += ["", "## Answers", "", *markdown_table(header, rows)]
    header, rows = sampled_table(folder)
    if rows:
        lines += ["", "## Sampled answers", "", *markdown_table(header, rows)]
    skipped = {name: counts["skipped"] for name, counts in provenance.get("data", {}).items() if counts.get("skipped")}
    if skipped:
        lines += ["", "## Skipped records", ""]
        lines += [
            f"- {markdown_line(f'{name}: {record}')}"
            for name, records in skipped.items()
            for record in records[:MAX_SKIPPED_RECORDS]
        ]
    write_text(folder / REPORT, "\n".join(lines) + "\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, its texts escaped."""
    lines = [[markdown_cell(text) for text in cells] for cells in (header, *rows)]
    return [f"| {' | '.join(cells)} |" for cells in (lines[0], ["---"] * len(header), *lines[1:])]
