"""The tables of results: the settings by their score with intervals and tests, their other scores, their costs."""

from collections.abc import Mapping, Sequence

from glmtuner.report.bootstrap import LEVEL, Interval
from glmtuner.report.jobs import State
from glmtuner.report.leaderboard import format_cost
from glmtuner.report.paper.latex import Cell, Tex, latex_text, table
from glmtuner.report.paper.settings import title, value_tex
from glmtuner.report.paper.words import Words
from glmtuner.report.ranking import Ranking, Row, format_score, metric_title
from glmtuner.report.run import truncated

MISSING = Tex("--")
ALPHA = 0.05
MARKS = ((0.01, r"\ddagger"), (ALPHA, r"\dagger"))  # levels and their marks
SMALLEST_P = 0.001
SCORES_PER_TABLE = 3
MOST_OF_REASON = 200  # characters


def level(words: Words) -> str:
    """The level of the intervals, as LaTeX."""
    return rf"{100 * LEVEL:g}{'' if words.chinese else chr(92) + ','}\%"


def metric_name(name: str, words: Words) -> str:
    """A metric's name, as LaTeX."""
    return words.titles.get(name) or latex_text(metric_title(name), words.chinese)


def number(text: str) -> str:
    """A formatted number with a minus sign instead of a hyphen."""
    return text.replace("-", "$-$")


def bounds(name: str, interval: Interval, like: float) -> str:
    """[9.81, 14.40]"""
    low, high = (number(format_score(name, each, like)) for each in (interval.low, interval.high))
    return f"[{low}, {high}]"


def score(row: Row, name: str, with_interval: bool) -> Tex:
    """12.07 ± 0.31 [9.81, 14.40]; a dash for a metric that was not measured."""
    if name not in row.metrics:
        return MISSING
    value, found = row.metrics[name], row.intervals.get(name)
    deviation = rf" $\pm$ {format_score(name, row.std_devs[name], value)}" if name in row.std_devs else ""
    behind = f" {bounds(name, found, value)}" if found and with_interval else ""
    return Tex(f"{number(format_score(name, value))}{deviation}{behind}")


def p_text(p_value: float) -> str:
    """0.012, or <0.001."""
    return f"$<${SMALLEST_P}" if p_value < SMALLEST_P else f"{p_value:.3f}"


def mark(p_value: float | None) -> str:
    """The mark behind a score that differs from the best one; empty for one that may not."""
    found = next((sign for alpha, sign in MARKS if p_value is not None and p_value <= alpha), "")
    return f"$^{{{found}}}$" if found else ""


def results_text(ranking: Ranking, p_values: Mapping[int, float], figures: Sequence[str], words: Words) -> str:
    """A paragraph on the results, and the tables of the finished runs and of those without results.

    A sentence says so where there are no results. `figures` are the labels of the figures.
    """
    tables: dict[str, str] = {}
    others = ranking.scores[1:] if ranking.objective else ranking.scores
    for start in range(0, len(others), SCORES_PER_TABLE):
        label = "metrics" if start == 0 else f"metrics-{start // SCORES_PER_TABLE + 1}"
        tables[label] = scores_table(ranking, others[start : start + SCORES_PER_TABLE], label, words)
    if ranking.costs:
        tables["costs"] = costs_table(ranking, words)
    if ranking.unranked:
        tables["unranked"] = unranked_table(ranking, words)
    named = [words.say("table_of", label=label) for label in tables]
    named += [words.say("figure_of", label=label) for label in figures]
    sentences = [
        *_summary(ranking, p_values, words),
        words.say("more_tables", tables=words.listed(named)) if named else "",
    ]
    objective = [objective_table(ranking, p_values, words)] if ranking.winner else []
    return "\n".join([words.sentence_space.join(filter(None, sentences)), "", *objective, *tables.values()])


def _summary(ranking: Ranking, p_values: Mapping[int, float], words: Words) -> list[str]:
    """The best setting, and how many of the others differ from it; or that there are no results."""
    winner, objective = ranking.winner, ranking.objective or ""
    if not ranking.rows:
        return [words.say("nothing")]
    if winner is None:
        return [words.say("no_score")]
    shown, metric = score(winner, objective, with_interval=True), metric_name(objective, words)
    filled = {"metric": metric, "setting": latex_text(winner.label, words.chinese), "score": shown.text}
    if len(ranking.rows) == 1:
        return [words.say("only", **filled)]
    significant = sum(p_value <= ALPHA for p_value in p_values.values())
    compared = words.say("differ", compared=len(p_values), count=significant, alpha=ALPHA) if p_values else ""
    return [words.say("best", count=len(ranking.rows), **filled), compared]


def _settings(ranking: Ranking, words: Words) -> tuple[list[Cell], list[list[Cell]], str]:
    """Header, cells and letters of the columns that say which setting a row is, with the number of runs if it differs from 1."""
    header: list[Cell] = [title(knob, words) for knob in ranking.knobs] or [Tex(words.say("h_run"))]
    rows: list[list[Cell]] = [
        [Tex(value_tex(row.settings[knob], words)) for knob in ranking.knobs] or [row.label]
        for row in ranking.rows
    ]  # fmt: skip
    letters = "l" * len(header)
    if any(len(row.jobs) > 1 for row in ranking.rows):
        header.append(Tex(words.say("h_runs")))
        rows = [[*cells, str(len(row.jobs))] for cells, row in zip(rows, ranking.rows, strict=True)]
        letters += "r"
    return header, rows, letters


def objective_table(ranking: Ranking, p_values: Mapping[int, float], words: Words) -> str:
    """The settings by the objective: score, interval, difference to the best one, corrected p-value."""
    objective = ranking.objective or ""
    header, rows, letters = _settings(ranking, words)
    intervals = any(objective in row.intervals for row in ranking.rows)
    header += [Tex(metric_name(objective, words))]
    header += [Tex(level(words))] if intervals else []
    header += [Tex(words.say("h_difference"))] if ranking.has_differences else []
    header += [Tex(words.say("h_p"))] if p_values else []
    for place, (row, cells) in enumerate(zip(ranking.rows, rows, strict=True)):
        shown = score(row, objective, with_interval=False)
        if shown is not MISSING:
            best = rf"\textbf{{{shown.text}}}" if row is ranking.winner and len(ranking.rows) > 1 else shown.text
            shown = Tex(f"{best}{mark(p_values.get(place))}")
        cells.append(shown)
        value = row.metrics.get(objective, 0.0)
        if intervals:
            found = row.intervals.get(objective)
            cells.append(Tex(bounds(objective, found, value)) if found else MISSING)
        if ranking.has_differences:
            cells.append(difference(row, objective))
        if p_values:
            cells.append(Tex(p_text(p_values[place])) if place in p_values else MISSING)
    letters += "r" * (len(header) - len(letters))
    direction = words.say("lower" if "lower" in ranking.direction else "higher")
    caption = words.say(
        "results_caption", metric=metric_name(objective, words), direction=direction, count=len(ranking.rows)
    )
    if len(ranking.rows) == 1:
        caption = words.say("results_one")
    return table(
        header, rows, label="results", caption=caption, columns=letters, chinese=words.chinese, continued=words.continued,
        note=_notes(ranking, p_values, words),
    )  # fmt: skip


def difference(row: Row, objective: str) -> Cell:
    """-0.31 [-1.02, 0.40]"""
    if row.difference is None:
        return MISSING
    like = row.metrics[objective]
    value = number(format_score(objective, row.difference.value, like))
    return Tex(f"{value} {bounds(objective, row.difference, like)}")


def _notes(ranking: Ranking, p_values: Mapping[int, float], words: Words) -> str:
    objective = ranking.objective or ""
    others = [row for row in ranking.rows if row is not ranking.winner]
    incomparable = sum(objective in row.record_scores and row.difference is None for row in others)
    unmeasured = sum(objective not in row.metrics for row in ranking.rows)
    notes = [
        words.say("bold") if len(ranking.rows) > 1 and ranking.winner else "",
        words.say("interval_note", level=level(words)) if ranking.has_intervals else "",
        words.say("seed_note") if any(row.std_devs for row in ranking.rows) else "",
        words.say("marks") if p_values else "",
        words.say("incomparable", count=incomparable) if incomparable and ranking.has_intervals else "",
        words.say("not_measured", count=unmeasured) if unmeasured else "",
    ]
    return words.sentence_space.join(filter(None, notes))


def scores_table(ranking: Ranking, names: Sequence[str], label: str, words: Words) -> str:
    """The settings by other scores, with intervals."""
    header, rows, letters = _settings(ranking, words)
    header += [Tex(metric_name(name, words)) for name in names]
    for row, cells in zip(ranking.rows, rows, strict=True):
        cells += [score(row, name, with_interval=True) for name in names]
    return table(
        header, rows, label=label, caption=words.say("metrics_caption"), columns=letters + "r" * len(names),
        chinese=words.chinese, continued=words.continued,
    )  # fmt: skip


def costs_table(ranking: Ranking, words: Words) -> str:
    """The settings by time, memory and numbers of parameters."""
    names = [name for name in ranking.costs if name != "total_parameters"]
    header, rows, letters = _settings(ranking, words)
    header += [Tex(metric_name(name, words)) for name in names]
    for row, cells in zip(ranking.rows, rows, strict=True):
        cells += [format_cost(name, row.metrics) if name in row.metrics else MISSING for name in names]
    return table(
        header, rows, label="costs", caption=words.say("costs_caption"), columns=letters + "r" * len(names),
        chinese=words.chinese, continued=words.continued,
    )  # fmt: skip


def unranked_table(ranking: Ranking, words: Words) -> str:
    """The jobs without results: what they are, their state, and why."""
    header: list[Cell] = [Tex(words.say(name)) for name in ("h_settings", "h_state", "h_reason")]
    rows: list[list[Cell]] = [
        [job.label(ranking.knobs), state_name(job.state, words), truncated(job.reason, MOST_OF_REASON) if job.reason else MISSING]
        for job in ranking.unranked
    ]  # fmt: skip
    return table(
        header, rows, label="unranked", caption=words.say("unranked_caption"), chinese=words.chinese, continued=words.continued,
        columns=r"p{0.3\linewidth}lp{0.5\linewidth}",
    )  # fmt: skip


def state_name(state: State, words: Words) -> Tex:
    """A job's state in words."""
    return Tex(words.say(f"s_{state.value}"))
