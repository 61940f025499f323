"""The ranking of a sweep as text: on the terminal, in report.md, in leaderboard.csv."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from glmtuner.report.bootstrap import LEVEL, RESAMPLES
from glmtuner.report.jobs import Job, is_number, shown, value_of
from glmtuner.report.ranking import Ranking, Row, score, title
from glmtuner.report.run import MISSING, cell, clipped, markdown_table


def score_with_interval(row: Row, name: str) -> str:
    """12.07 [9.81, 14.40], and ± the spread over seeds where there are several."""
    if name not in row.metrics:
        return MISSING
    spread = f" ± {score(name, row.std_devs[name], row.metrics[name])}" if name in row.std_devs else ""
    value, bounds = row.metrics[name], row.intervals.get(name)
    told = f" [{score(name, bounds.low, value)}, {score(name, bounds.high, value)}]" if bounds else ""
    return f"{score(name, value)}{spread}{told}"


def difference_told(row: Row, objective: str) -> str:
    """-0.31 [-1.02, 0.40], marked ≈ when it holds 0."""
    if row.difference is None:
        return MISSING
    found, like = row.difference, row.metrics[objective]
    value, low, high = (score(objective, each, like) for each in (found.value, found.low, found.high))
    return f"{'≈ ' if row.tied else ''}{value} [{low}, {high}]"


def cost(name: str, metrics: dict[str, float]) -> str:
    """What a job took, with its unit."""
    if name not in metrics:
        return MISSING
    value = metrics[name]
    if name == "train_runtime":
        return duration(value)
    if name == "peak_memory_gib":
        return f"{value:.2f} GiB"
    if name == "train_mfu":
        return f"{value:.1%}"
    if name == "trained_parameters":
        total = metrics.get("total_parameters")
        return f"{value:,.0f}{f' ({value / total:.2%})' if total else ''}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def table_of(board: Ranking, scores: Sequence[str], knob_columns: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the ranking; single seeds stand under their setting. Columns that hold nothing are left out."""
    objective = board.objective or ""
    costs = [name for name in board.costs if name != "total_parameters"]
    columns: list[tuple[str, Callable[[str, Row], str]]] = [("", lambda rank, row: rank)]
    if knob_columns:
        columns += [
            (name, lambda rank, row, knob=knob: shown(row.settings[knob])) for knob, name in board.knobs.items()
        ]
    else:
        columns.append(("settings" if board.knobs else "run", lambda rank, row: row.label))
    columns.append(("seed", lambda rank, row: f"{len(row.jobs)} runs" if len(row.jobs) > 1 else row.jobs[0].seed))
    for name in scores:
        columns.append((title(name), lambda rank, row, name=name: score_with_interval(row, name)))
        if name == objective:
            columns.append(("difference to the winner", lambda rank, row: difference_told(row, objective)))
    columns += [(title(name), lambda rank, row, name=name: cost(name, row.metrics)) for name in costs]
    several = any(row.seeds for row in board.rows)
    lines = []
    for place, row in enumerate(board.rows, 1):
        rank = str(place) if objective in row.metrics else MISSING
        lines.append([fill(rank, row) for _, fill in columns])
        lines += [[fill("", each) for _, fill in columns] for each in row.seeds]
    kept = [
        place
        for place, (name, _) in enumerate(columns)
        if (name != "seed" or several) and any(line[place] != MISSING for line in lines)
    ]
    return [columns[place][0] for place in kept], [[line[place] for place in kept] for line in lines]


def fitting(header: list[str], rows: list[list[str]], width: int, least: int) -> tuple[list[str], list[list[str]]]:
    """As many of the first columns as a terminal of that width can show in single lines, and at least `least` of them."""
    needed, kept = 1, 0
    for column in zip(header, *rows, strict=True):
        needed += max(map(len, column[1:]), default=0) + 3
        if needed > width and kept >= least:
            break
        kept += 1
    return header[:kept], [row[:kept] for row in rows]


def csv_of(board: Ranking) -> str:
    """leaderboard.csv: one line a job, every job, numbers as they are and keys by their full names."""
    scores, measured = board.scores, dict.fromkeys(name for row in board.rows for name in row.metrics)
    header = ["rank", "job", "state", "reason", *board.knobs, "seed", *measured]
    header += [f"{name}_{bound}" for name in scores for bound in ("low", "high", "samples")]
    header += ["difference_to_winner", "difference_low", "difference_high", "told_apart"]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
    writer.writeheader()
    ranked = [(place, each) for place, row in enumerate(board.rows, 1) for each in row.seeds or [row]]
    for place, row in ranked:
        line = {"rank": place, **_facts(row.jobs[0], board), **row.metrics}
        for name, bounds in row.intervals.items():
            line |= {f"{name}_low": bounds.low, f"{name}_high": bounds.high, f"{name}_samples": bounds.samples}
        if row.difference:
            line |= {
                "difference_to_winner": row.difference.value, "difference_low": row.difference.low,
                "difference_high": row.difference.high, "told_apart": str(not row.tied).lower(),
            }  # fmt: skip
        writer.writerow({name: value for name, value in line.items() if name in header})
    for job in board.others:
        writer.writerow(_facts(job, board))
    return out.getvalue()


def _facts(job: Job, board: Ranking) -> dict[str, Any]:
    facts = {"job": job.name, "state": job.state.value, "reason": job.reason, "seed": job.seed}
    values = {knob: value_of(job, knob) for knob in board.knobs}
    return facts | {
        knob: value if value is None or is_number(value) else shown(value) for knob, value in values.items()
    }


def told_of(job: Job, board: Ranking) -> list[str]:
    """A job without results in a line: folder, settings, state, reason."""
    return [job.name, job.label(board.knobs) if board.knobs else MISSING, job.state.value, job.reason or MISSING]


def method_told(paired: bool = True) -> str:
    """How intervals are made, in a sentence for readers, and how differences are when they are shown."""
    told = f"Intervals are {LEVEL:.0%} percentile bootstrap intervals over evaluation samples ({RESAMPLES:,} resamples, fixed seed)"
    if not paired:
        return f"{told}."
    return (
        f"{told}; differences are paired: both runs on the same resampled records. ≈ marks a difference whose interval "
        "holds 0: not told apart from the winner."
    )


def winner_told(board: Ranking) -> list[tuple[str, str]]:
    """The winner's facts, by name."""
    winner, chosen = board.winner, board.chosen
    if winner is None or chosen is None or board.objective is None:
        return []
    bounds = winner.intervals.get(board.objective)
    samples = f", {bounds.samples} samples" if bounds else ""
    facts = [(title(board.objective), f"{score_with_interval(winner, board.objective)}{samples}")]
    facts += [(name, shown(winner.settings[knob])) for knob, name in board.knobs.items()]
    if winner.seeds:
        facts.append(("seed", f"{chosen.seed}, the best of {len(winner.jobs)}"))
    facts.append(("run", str(chosen.folder.path)))
    facts.append(("export it", board.export or "it trained nothing that could be exported"))
    return facts


def show_ranking(board: Ranking) -> None:
    """Print the ranking: the objective, and what a run took where the terminal is wide enough; all is in the files."""
    from glmtuner.console import say, table, width

    scores = [board.objective] if board.objective else board.scores
    header, rows = table_of(board, scores, knob_columns=False)
    if rows:
        header, rows = fitting(header, rows, width(), header.index(title(scores[0])) + 1 if scores else len(header))
        table("", header, rows, lines=False)
    if board.others:
        unfit = [told_of(job, board) for job in board.others]
        table("", ("job", "settings", "state", "reason"), [[*line[:3], clipped(line[3], 300)] for line in unfit])
    for note in board.notes:
        say(note)
    if board.compared:
        say(method_told(board.paired))
    if board.export:
        say(f"the best: {board.winner.label if board.winner else ''}; export it: {board.export}")


def markdown_of(board: Ranking, pictures: Sequence[tuple[str, str]], answers: tuple[list[str], list[list[str]]]) -> str:
    """report.md: the whole report; `pictures` are file names with what they show, `answers` a header and rows."""
    lines = [f"# Sweep {board.root.resolve().name}", "", f"{board.told}."]
    lines += [f"Ranked by {title(board.objective)}, {board.way}."] if board.objective else []
    for name, value in winner_told(board):
        lines += ["", "## The winner", "", "| | |", "|---|---|"] if name == title(board.objective or "") else []
        lines.append(f"| {name} | {f'`{value}`' if name == 'export it' and board.export else cell(value)} |")
    lines += ["", *(f"- {cell(note)}" for note in board.notes)] if board.notes else []
    header, rows = table_of(board, board.scores, knob_columns=True)
    if rows:
        lines += ["", "## Leaderboard", "", *markdown_table(header, rows)]
        lines += ["", method_told(board.paired)] if board.compared else []
    lines += ["", "## Pictures", ""] if pictures else []
    lines += [f"![{cell(about)}]({file})" for file, about in pictures]
    if answers[1]:
        lines += [
            "",
            "## Answers",
            "",
            *markdown_table(answers[0], [[clipped(each) for each in row] for row in answers[1]]),
        ]
    if board.others:
        unfit = [told_of(job, board) for job in board.others]
        lines += ["", "## Jobs without results", "", *markdown_table(["job", "settings", "state", "reason"], unfit)]
    if board.commands:
        lines += ["", "## Typed", "", "```text", *(line.replace("```", "'''") for line in board.commands), "```"]
    return "\n".join(lines) + "\n"
