"""A run on one page, in the terminal and in report.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from glmtuner.console import say, table
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.checkpoints import checkpoint_problem, checkpoints
from glmtuner.run_folder.files import read_lines, write_text
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import EVALUATIONS, LOSS_PICTURE, PREDICTIONS, REPORT

SHOWN_ANSWERS = 8
MISSING = "-"


def show(path: Path) -> None:
    """Print a run folder: what it is, what came out, some answers, where its weights are."""
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}; runs live under outputs/<date>/<time>_<name>")
    folder = RunFolder(path)
    config = folder.config()
    about = folder.provenance()
    state = "finished" if folder.is_finished else "unfinished: the same command goes on"
    rows = [("run", f"{path} ({state})"), *facts(config, about)]
    whole = [found.name for found in checkpoints(path) if checkpoint_problem(found) is None]
    rows.append(("checkpoints", ", ".join(whole) or MISSING))
    trained = folder.trained()
    rows.append(("weights", str(trained) if trained else MISSING))
    table("", ("", ""), rows, show_header=False)
    _show_scores(folder)
    _show_answers(folder)
    if (folder / LOSS_PICTURE).is_file():
        say(f"loss curve: {folder / LOSS_PICTURE}")


def show_results(folder: RunFolder) -> None:
    """What a run prints when it ends."""
    _show_scores(folder)
    _show_answers(folder)
    say(f"run folder: {folder.path}")


def facts(config: Any, about: dict[str, Any]) -> list[tuple[str, str]]:
    method = config.finetuning
    knobs = ", ".join(f"{name} {_short(value)}" for name, value in method.items() if name != "finetuning_type")
    return [
        ("command", about.get("command", MISSING)),
        ("stage", config.stage.name),
        ("model", f"{config.model.model_name_or_path} ({config.model.family}, template {config.model.template})"),
        ("quantization", f"int{config.quant.quantization_bit}" if config.quant.quantization_bit else "none"),
        ("method", f"{method.finetuning_type}{f' ({knobs})' if knobs else ''}"),
        ("data", "; ".join(f"{name}: {_records(kept)}" for name, kept in about.get("data", {}).items()) or MISSING),
        ("seed", str(config.trainer.seed)),
        ("started", about.get("started", MISSING)),
        ("code", _code(about)),
    ]


def _records(kept: dict[str, Any]) -> str:
    cut = kept.get("prompts_cut", 0) + kept.get("answers_cut", 0)
    return f"{kept.get('records', 0):,} records" + (f", {cut:,} shortened" if cut else "")


def _code(about: dict[str, Any]) -> str:
    packages, git = about.get("packages", {}), about.get("git")
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("glmtuner", "transformers", "torch") if packages.get(name)
    )
    return versions + (f"; git {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else "")


def _short(value: Any) -> str:
    return (
        f"[{', '.join(map(str, value))}]" if not isinstance(value, (str, int, float, bool, type(None))) else str(value)
    )


def _show_scores(folder: RunFolder) -> None:
    metrics, before = folder.metrics(), scores_before(folder)
    if before:
        rows = [
            (name, number(value), number(before[name]) if name in before else "") for name, value in metrics.items()
        ]
        table("", ("metric", "value", "before training"), rows, lines=False)
    elif metrics:
        table("", ("", ""), [(name, number(value)) for name, value in metrics.items()], show_header=False)


def scores_before(folder: RunFolder) -> dict[str, float]:
    """The evaluation at step 0 (trainer.eval_on_start), under the names that metrics.json gives the later one."""
    line = next((line for line in folder.history() if line.get("step") == 0), {})
    found = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {f"{prefix}_{name}": value for name, value in found.items() for prefix in ("eval", "predict")}


def number(value: float) -> str:
    """A number as people read it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}"


def answers(folder: RunFolder) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows of the answers: question, answer before training where there is one, answer after, label.

    Of pairs that a reward model scored: question, both answers, their scores.
    """
    after, before = answers_in(folder / PREDICTIONS), answers_in(folder / EVALUATIONS / "step-0.jsonl")
    header: tuple[str, ...]
    if not after:
        return (), []
    chosen = evenly(sorted(after), SHOWN_ANSWERS)
    if "chosen_score" in after[chosen[0]]:
        header = ("question", "better answer", "score", "worse answer", "score")
        columns = ("prompt", "chosen", "chosen_score", "rejected", "rejected_score")
        rows = [
            tuple(number(after[i][column]) if "score" in column else after[i][column] for column in columns)
            for i in chosen
        ]
    elif before:
        header = ("question", "before", "after", "label")
        rows = [
            (after[i]["prompt"], before.get(i, {}).get("predict", MISSING), after[i]["predict"], after[i]["label"])
            for i in chosen
        ]
    else:
        header = ("question", "answer", "label")
        rows = [(after[i]["prompt"], after[i]["predict"], after[i]["label"]) for i in chosen]
    return header, [tuple(clipped(cell) for cell in row) for row in rows]


def answers_in(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a file of answers, or of scored pairs, by their index; those that hold all of their keys."""
    answer = {"index", "prompt", "label", "predict"}
    pair = {"index", "prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
    return {line["index"]: line for line in read_lines(path) if answer <= line.keys() or pair <= line.keys()}


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most `most` items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def clipped(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def _show_answers(folder: RunFolder) -> None:
    header, rows = answers(folder)
    if rows:
        table("", header, rows)


def write_run(folder: RunFolder, metrics: dict[str, float]) -> None:
    """Write report.md: the run on one page."""
    about, before = folder.provenance(), scores_before(folder)
    lines = [f"# {folder.path.name}", "", *markdown_table(("", ""), facts(folder.config(), about))]
    if metrics:
        rows = [
            [name, number(value), number(before[name]) if name in before else ""] for name, value in metrics.items()
        ]
        header = ["metric", "value", "before training"][: 3 if before else 2]
        lines += ["", "## Results", "", *markdown_table(header, [row[: len(header)] for row in rows])]
    losses = [line["loss"] for line in folder.history() if "loss" in line]
    if losses:
        lines += ["", f"Training loss: {losses[0]:.4f} at the first logged step, {losses[-1]:.4f} at the last."]
    if (folder / LOSS_PICTURE).is_file():
        lines += ["", f"![training loss]({LOSS_PICTURE})"]
    asked, rows = answers(folder)
    if rows:
        lines += ["", "## Answers", "", *markdown_table(asked, rows)]
    skipped = {name: kept["skipped"] for name, kept in about.get("data", {}).items() if kept.get("skipped")}
    if skipped:
        lines += ["", "## Records that were skipped", ""]
        lines += [f"- {name}: {line}" for name, told in skipped.items() for line in told[:20]]
    write_text(folder / REPORT, "\n".join(lines) + "\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [[cell(text) for text in line] for line in (header, *rows)]
    return [f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(header), *lines[1:])]


def cell(text: str) -> str:
    """The text as one cell of a Markdown table; what looks like HTML stays text."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
