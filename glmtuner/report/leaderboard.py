"""The ranking of a sweep as text: in the terminal, in report.md, in leaderboard.csv."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from glmtuner.report.bootstrap import LEVEL, RESAMPLES
from glmtuner.report.escape import markdown_cell, markdown_code, markdown_code_block, markdown_line, spreadsheet_cell
from glmtuner.report.jobs import Job, format_value, value_of
from glmtuner.report.ranking import Ranking, Row, format_score, metric_title
from glmtuner.report.run import MISSING, markdown_table, truncated
from glmtuner.run_folder.files import is_number

EXPORT = "export command"  # the name of that fact about the winner
UNRANKED_HEADER = ("job", "settings", "state", "reason")


def score_with_interval(row: Row, name: str) -> str:
    """12.07 [9.81, 14.40], with the standard deviation over seeds after ± if there are several."""
    if name not in row.metrics:
        return MISSING
    value, bounds = row.metrics[name], row.intervals.get(name)
    deviation = f" ± {format_score(name, row.std_devs[name], value)}" if name in row.std_devs else ""
    brackets = f" [{format_score(name, bounds.low, value)}, {format_score(name, bounds.high, value)}]" if bounds else ""
    return f"{format_score(name, value)}{deviation}{brackets}"


def format_difference(row: Row, objective: str) -> str:
    """-0.31 [-1.02, 0.40], after ≈ if the interval contains 0."""
    if row.difference is None:
        return MISSING
    difference, like = row.difference, row.metrics[objective]
    value, low, high = (
        format_score(objective, each, like) for each in (difference.value, difference.low, difference.high)
    )
    return f"{'≈ ' if row.tied else ''}{value} [{low}, {high}]"


def format_cost(name: str, metrics: dict[str, float]) -> str:
    """A cost of a job with its unit."""
    if name not in metrics:
        return MISSING
    value = metrics[name]
    if name == "train_runtime":
        return format_duration(value)
    if name == "peak_memory_gib":
        return f"{value:.2f} GiB"
    if name == "train_mfu":
        return f"{value:.1%}"
    if name == "trained_parameters":
        total = metrics.get("total_parameters")
        return f"{value:,.0f}{f' ({value / total:.2%})' if total else ''}"
    return f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    """8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60 or not math.isfinite(seconds):
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


Column = tuple[str, Callable[[str, Row], str]]  # its heading, and its text for a rank and a row


def leaderboard_table(ranking: Ranking, scores: Sequence[str], knob_columns: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the leaderboard, each seed in a row below its setting; empty columns are left out.

    With `knob_columns` each knob has a column, otherwise all are in one.
    """
    objective = ranking.objective or ""
    columns: list[Column] = [("", lambda rank, row: rank)]
    if knob_columns:
        columns += [_knob_column(knob, name) for knob, name in ranking.knobs.items()]
    else:
        columns.append(("settings" if ranking.knobs else "run", lambda rank, row: row.label))
    columns.append(("seed", lambda rank, row: f"{len(row.jobs)} runs" if len(row.jobs) > 1 else row.jobs[0].seed))
    for name in scores:
        columns.append(_score_column(name))
        if name == objective:
            columns.append(("difference to the winner", lambda rank, row: format_difference(row, objective)))
    columns += [_cost_column(name) for name in ranking.costs if name != "total_parameters"]
    rows = []
    for number, row in enumerate(ranking.rows, 1):
        rank = str(number) if objective in row.metrics else MISSING
        rows.append([text_of(rank, row) for _, text_of in columns])
        rows += [[text_of("", seed) for _, text_of in columns] for seed in row.seeds]
    has_seeds = any(row.seeds for row in ranking.rows)
    shown = [
        index
        for index, (heading, _) in enumerate(columns)
        if (heading != "seed" or has_seeds) and any(cells[index] != MISSING for cells in rows)
    ]
    return [columns[index][0] for index in shown], [[cells[index] for index in shown] for cells in rows]


def _knob_column(knob: str, heading: str) -> Column:
    return heading, lambda rank, row: format_value(row.settings[knob])


def _score_column(name: str) -> Column:
    return metric_title(name), lambda rank, row: score_with_interval(row, name)


def _cost_column(name: str) -> Column:
    return metric_title(name), lambda rank, row: format_cost(name, row.metrics)


def fit_columns(
    header: list[str], rows: list[list[str]], width: int, min_columns: int
) -> tuple[list[str], list[list[str]]]:
    """As many of the first columns as fit into `width` characters without wrapping, at least `min_columns` of them."""
    needed, count = 1, 0
    for column in zip(header, *rows, strict=True):
        needed += max(map(len, column[1:]), default=0) + 3
        if needed > width and count >= min_columns:
            break
        count += 1
    return header[:count], [row[:count] for row in rows]


def leaderboard_csv(ranking: Ranking) -> str:
    """The content of leaderboard.csv: one line per job, with numbers in full and keys by their dotted names."""
    measured = dict.fromkeys(name for row in ranking.rows for name in row.metrics)
    header = ["rank", "job", "state", "reason", *ranking.knobs, "seed", *measured]
    header += [f"{name}_{bound}" for name in ranking.scores for bound in ("low", "high", "samples")]
    header += ["difference_to_winner", "difference_low", "difference_high", "told_apart"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(spreadsheet_cell, header))
    ranked = [(rank, each) for rank, row in enumerate(ranking.rows, 1) for each in row.seeds or [row]]
    for rank, row in ranked:
        line = {"rank": rank, **_job_columns(row.jobs[0], ranking), **row.metrics}
        for name, bounds in row.intervals.items():
            line |= {f"{name}_low": bounds.low, f"{name}_high": bounds.high, f"{name}_samples": bounds.num_records}
        if row.difference:
            line |= {
                "difference_to_winner": row.difference.value, "difference_low": row.difference.low,
                "difference_high": row.difference.high, "told_apart": str(not row.tied).lower(),
            }  # fmt: skip
        writer.writerow(spreadsheet_cell(line.get(name, "")) for name in header)
    for job in ranking.unranked:
        columns = _job_columns(job, ranking)
        writer.writerow(spreadsheet_cell(columns.get(name, "")) for name in header)
    return out.getvalue()


def _job_columns(job: Job, ranking: Ranking) -> dict[str, Any]:
    columns = {"job": job.name, "state": job.state.value, "reason": job.reason, "seed": job.seed}
    values = {knob: value_of(job, knob) for knob in ranking.knobs}
    return columns | {
        knob: value if value is None or is_number(value) else format_value(value) for knob, value in values.items()
    }


def unranked_row(job: Job, ranking: Ranking) -> list[str]:
    """The cells below UNRANKED_HEADER of a job without results."""
    settings = job.label(ranking.knobs) if ranking.knobs else MISSING
    return [job.name, settings, job.state.value, job.reason or MISSING]


def method_note(paired: bool = True) -> str:
    """How the intervals are computed, and with `paired` how those of differences are."""
    method = f"Intervals are {LEVEL:.0%} percentile bootstrap intervals over evaluation records ({RESAMPLES:,} resamples, fixed seed)"
    if not paired:
        return f"{method}."
    return (
        f"{method}; differences are paired: both runs are scored on the same resampled records. ≈ marks a difference whose "
        "interval contains 0: it is not significant."
    )


def winner_facts(ranking: Ranking) -> list[tuple[str, str]]:
    """Name and value of each fact about the winner, the last one named EXPORT; empty without a winner."""
    winner, best_job = ranking.winner, ranking.best_job
    if winner is None or best_job is None or ranking.objective is None:
        return []
    bounds = winner.intervals.get(ranking.objective)
    records = f", {bounds.num_records} records" if bounds else ""
    facts = [(metric_title(ranking.objective), f"{score_with_interval(winner, ranking.objective)}{records}")]
    facts += [(name, format_value(winner.settings[knob])) for knob, name in ranking.knobs.items()]
    if winner.seeds:
        facts.append(("seed", f"{best_job.seed}, the best of {len(winner.jobs)}"))
    facts.append(("run", str(best_job.folder.path)))
    facts.append((EXPORT, ranking.export_command or "none: it trained nothing that can be exported"))
    return facts


def show_ranking(ranking: Ranking) -> None:
    """Print the ranking by the objective, with as many of the costs as the terminal has room for."""
    from glmtuner.console import say, table, width

    scores = [ranking.objective] if ranking.objective else ranking.scores
    header, rows = leaderboard_table(ranking, scores, knob_columns=False)
    if rows:
        min_columns = header.index(metric_title(scores[0])) + 1 if scores else len(header)
        header, rows = fit_columns(header, rows, width(), min_columns)
        table("", header, rows, lines=False)
    if ranking.unranked:
        unranked = [unranked_row(job, ranking) for job in ranking.unranked]
        table("", UNRANKED_HEADER, [[*cells[:3], truncated(cells[3], 300)] for cells in unranked])
    for note in ranking.notes:
        say(note)
    if ranking.has_intervals:
        say(method_note(ranking.has_differences))
    if ranking.export_command:
        say(f"the best: {ranking.winner.label if ranking.winner else ''}; export it: {ranking.export_command}")


def sweep_markdown(
    ranking: Ranking,
    plots: Sequence[tuple[str, str]],
    answers: tuple[list[str], list[list[str]]],
    front: Sequence[str] = (),
) -> str:
    """The content of report.md; `plots` are file names and captions, `answers` a header and rows, `front` a section's lines."""
    lines = [f"# Sweep {markdown_cell(ranking.root.resolve().name)}", "", f"{ranking.summary}."]
    lines += (
        [f"Ranked by {markdown_cell(metric_title(ranking.objective))}, {ranking.direction}."]
        if ranking.objective
        else []
    )
    facts = winner_facts(ranking)
    if facts:
        lines += ["", "## The winner", "", "| | |", "|---|---|"]
    for name, value in facts:
        shown = markdown_code if name == EXPORT and ranking.export_command else markdown_cell
        lines.append(f"| {markdown_cell(name)} | {shown(value)} |")
    lines += ["", *(f"- {markdown_line(note)}" for note in ranking.notes)] if ranking.notes else []
    header, rows = leaderboard_table(ranking, ranking.scores, knob_columns=True)
    if rows:
        lines += ["", "## Leaderboard", "", *markdown_table(header, rows)]
        lines += ["", method_note(ranking.has_differences)] if ranking.has_intervals else []
    lines += front
    lines += ["", "## Plots", ""] if plots else []
    lines += [f"![{markdown_cell(caption)}]({file})" for file, caption in plots]
    if answers[1]:
        cells = [[truncated(text) for text in row] for row in answers[1]]
        lines += ["", "## Answers", "", *markdown_table(answers[0], cells)]
    if ranking.unranked:
        unranked = [unranked_row(job, ranking) for job in ranking.unranked]
        lines += ["", "## Jobs without results", "", *markdown_table(UNRANKED_HEADER, unranked)]
    if ranking.commands:
        lines += ["", "## Commands", "", *markdown_code_block(ranking.commands)]
    return "\n".join(lines) + "\n"
