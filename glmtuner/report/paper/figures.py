"""The pictures of a paper: the plots of a report as PDF, and the LaTeX that shows them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from glmtuner.report.paper.latex import is_chinese
from glmtuner.report.paper.results import metric_name
from glmtuner.report.paper.settings import title
from glmtuner.report.paper.words import Words
from glmtuner.report.plots import Plot, has_chinese_font, plot_by_knob, plot_run_loss, plot_sweep_losses
from glmtuner.report.ranking import Ranking, metric_title

FOLDER = "figures"


@dataclass(frozen=True)
class Figures:
    """The content of figures.tex, its labels, the pictures by file name, and what a reader of the terminal must know."""

    tex: str
    labels: list[str]
    files: dict[str, bytes]
    notes: list[str]


def draw_figures(ranking: Ranking, is_run: bool, words: Words) -> Figures:
    """The plots of a sweep, or of the only run of the ranking, with labels in the language if there is a font for them."""
    jobs = [job for row in ranking.rows for job in row.jobs] + ranking.unranked
    notes, has_font = [], True
    if words.chinese or any(is_chinese(sign) for job in jobs for sign in job.label(ranking.knobs)):
        has_font = has_chinese_font()
    if not has_font:
        notes.append(
            f"the pictures have {'English labels, and ' if words.chinese else ''}boxes for Chinese characters: matplotlib finds no "
            "Chinese font; install one, such as fonts-noto-cjk, and type the same command again"
        )
    translated = _translations(ranking, words) if words.chinese and has_font else {}

    def label(text: str) -> str:
        return translated.get(text, text)

    if is_run:
        plots = [(plot_run_loss(jobs[0].folder, label), words.say("loss_caption"))]
    else:
        plots = [(plot_sweep_losses(ranking, label), words.say("loss_caption"))]
        plots += [(plot, _knob_caption(plot, ranking, words)) for plot in plot_by_knob(ranking, label)]
    files: dict[str, bytes] = {}
    lines: list[str] = []
    for plot, caption in plots:
        if plot is None:
            continue
        name = file_name(plot.name, files)
        files[name] = plot.vector
        lines += [
            r"\begin{figure}[htbp]",
            r"\centering",
            rf"\includegraphics[width=0.8\linewidth]{{\glmtunerpath {FOLDER}/{name}}}",
        ]
        lines += [rf"\caption{{{caption}}}", rf"\label{{fig:{name.removesuffix('.pdf')}}}", r"\end{figure}", ""]
    return Figures("\n".join(lines), [name.removesuffix(".pdf") for name in files], files, notes)


def _translations(ranking: Ranking, words: Words) -> Mapping[str, str]:
    """The labels of the plots in this language: their own words, and the names of hyper-parameters and metrics."""
    knobs = {short: words.titles[knob] for knob, short in ranking.knobs.items() if knob in words.titles}
    metrics = {metric_title(name): words.titles[name] for name in ranking.scores if name in words.titles}
    plain = {name: text for name, text in (knobs | metrics).items() if "$" not in text}  # no mathematics in a plot
    return plain | words.labels


def _knob_caption(plot: Plot, ranking: Ranking, words: Words) -> str:
    metric = metric_name(ranking.objective or "", words)
    return words.say("knob_caption", metric=metric, knob=title(plot.knob or "", words).text)


def file_name(name: str, taken: Mapping[str, bytes]) -> str:
    """A name that every LaTeX reads: letters, digits, _ and -; with a number behind it if it is taken."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "figure"
    number, found = 2, f"{stem}.pdf"
    while found in taken:
        found, number = f"{stem}-{number}.pdf", number + 1
    return found
