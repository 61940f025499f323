"""Plots of runs, each in a light and a dark theme; drawn by matplotlib without a display."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.report.escape import one_line
from glmtuner.report.jobs import Job, format_value, value_of
from glmtuner.report.ranking import Ranking, metric_title
from glmtuner.run_folder.files import is_number, write_bytes
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOSS_PLOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Arial Unicode MS", "AR PL SungtiL GB",
)  # fmt: skip
Translate = Callable[[str], str]  # a label of a plot in another language
# Of the best runs, legible on both backgrounds.
COLOURS = ("#4c7fe0", "#d9822b", "#2a9d74", "#b8509b", "#4fb3d1", "#94783f")
OTHERS_COLOUR = "#9a9a94"
MAX_COLOURED = 5  # settings if there are more than COLOURS
THEMES = {  # background, text, grid
    "light": ("#ffffff", "#33332f", "#e4e4de"),
    "dark": ("#232528", "#d8d8d4", "#3b3d41"),
}
MIN_SMOOTHED = 100  # points from which a loss curve is smoothed
MAX_LEGEND_LENGTH = 90  # characters
LOG_SCALE_RATIO = 10.0  # between the largest and the smallest value of a knob above which its axis is logarithmic


@dataclass(frozen=True)
class Plot:
    """A plot: as PNG for a light and for a dark page, and as PDF for a paper; each is drawn when it is asked for."""

    name: str  # of its file, without .png
    caption: str
    paint: "Callable[[Axes], None]"  # onto empty axes
    size: tuple[float, float] = (6.8, 4.0)  # inches
    knob: str | None = None  # the key that it shows a metric against

    @cached_property
    def light(self) -> bytes:
        return self._drawn("light", "png")

    @cached_property
    def dark(self) -> bytes:
        return self._drawn("dark", "png")

    @cached_property
    def vector(self) -> bytes:
        """PDF in the light theme; equal plots are equal bytes."""
        return self._drawn("light", "pdf")

    def _drawn(self, theme: str, file_format: str) -> bytes:
        import logging
        import warnings

        import matplotlib
        from matplotlib import font_manager
        from matplotlib.figure import Figure

        installed = {*font_manager.get_font_names()}
        background, text, grid = THEMES[theme]
        style: Any = {  # matplotlib's type of it lists every key
            "font.family": [font for font in FONTS if font in installed],
            "text.parse_math": False, "text.usetex": False,  # a $ in a name is not mathematics
            "figure.facecolor": background, "axes.facecolor": background, "text.color": text, "axes.labelcolor": text,
            "axes.edgecolor": text, "xtick.color": text, "ytick.color": text, "grid.color": grid, "axes.grid": True,
            "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "axes.unicode_minus": False, "pdf.fonttype": 42,  # outlines: publishers refuse the bitmaps and the type 3 of the default
        }  # fmt: skip
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # on a machine without Chinese fonts
            logging.getLogger("fontTools").setLevel(logging.ERROR)  # what a font has besides its outlines is left out
            figure: Figure = Figure(figsize=self.size, dpi=140, layout="constrained")
            self.paint(figure.add_subplot())
            file = io.BytesIO()
            figure.savefig(file, format=file_format, metadata={"CreationDate": None} if file_format == "pdf" else None)
        return file.getvalue()


def has_chinese_font() -> bool:
    """Whether there is one of FONTS that has Chinese characters; matplotlib then knows it.

    Its list of fonts is a cache, which lacks those that were installed since it was made: they are looked for again.
    """
    from matplotlib import font_manager

    chinese, manager = {*FONTS[1:]}, font_manager.fontManager
    if not chinese & {*manager.get_font_names()}:
        for path in {*font_manager.findSystemFonts()} - {font.fname for font in manager.ttflist}:
            with suppress(OSError, RuntimeError):  # a font that matplotlib cannot read
                manager.addfont(path)
    return bool(chinese & {*manager.get_font_names()})


# -- losses --------------------------------------------------------------------------------------------------------------


def points(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which the history logged the metric, and its values there."""
    logged = [(line["step"], line[name]) for line in history if is_number(line.get(name))]
    return [step for step, _ in logged], [value for _, value in logged]


def plot_run_loss(folder: RunFolder, label: Translate = str) -> Plot | None:
    """The training loss of a run, also smoothed if it has many points, and its evaluation loss; None without any."""
    history = folder.history()
    train, evaluation = points(history, "loss"), points(history, "eval_loss")
    if not train[0] and not evaluation[0]:
        return None

    def paint(axes: "Axes") -> None:
        smooth = len(train[0]) >= MIN_SMOOTHED
        axes.plot(
            *train, color=COLOURS[0], alpha=0.35 if smooth else 1.0, linewidth=1.2, marker="" if smooth else "o",
            markersize=3, label=label("training loss"),
        )  # fmt: skip
        if smooth:
            axes.plot(
                train[0], smoothed(train[1]), color=COLOURS[0], linewidth=2, label=label("training loss, smoothed")
            )
        if evaluation[0]:
            axes.plot(
                *evaluation, color=COLOURS[1], linestyle="--", marker="s", markersize=4, label=label("evaluation loss")
            )
        axes.set_xlabel(label("step"))
        axes.set_ylabel(label("loss"))
        axes.set_title(one_line(folder.path.name), fontsize=10, loc="left")
        axes.legend()

    return Plot("loss", "loss by step", paint)


def write_loss_plot(folder: RunFolder) -> Path | None:
    """Write loss.png and return its path; None for a run that logged no loss."""
    plot = plot_run_loss(folder)
    if plot is None:
        return None
    write_bytes(folder / LOSS_PLOT, plot.light)
    return folder / LOSS_PLOT


def smoothed(values: Sequence[float]) -> list[float]:
    """The centred moving average over a twentieth of the values; its window is narrower at the ends, so it does not lag."""
    radius = max(len(values) // 40, 1)
    averages = []
    for index in range(len(values)):
        reach = min(radius, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        averages.append(sum(window) / len(window))
    return averages


def plot_sweep_losses(ranking: Ranking, label: Translate = str) -> Plot | None:
    """The training losses of all jobs, the best settings in colour, and dashed their evaluation losses; None without any."""
    settings = [(row.label, row.jobs) for row in ranking.rows]
    settings += [(job.label(ranking.knobs), [job]) for job in ranking.unranked if job.history]
    settings = [(name, jobs) for name, jobs in settings if any(points(job.history, "loss")[0] for job in jobs)]
    if not settings:
        return None
    num_coloured = len(settings) if len(settings) <= len(COLOURS) else MAX_COLOURED
    num_others = len(settings) - num_coloured

    def paint(axes: "Axes") -> None:
        legend = {}
        for rank, (name, jobs) in reversed([*enumerate(settings)]):  # the best on top
            is_coloured = rank < num_coloured
            style: dict[str, Any] = {
                "color": COLOURS[rank] if is_coloured else OTHERS_COLOUR,
                "linewidth": 1.8 if is_coloured else 0.9,
                "alpha": 1 if is_coloured else 0.6,
            }
            for job in jobs:
                steps, losses = points(job.history, "loss")
                (line,) = axes.plot(steps, smoothed(losses) if len(losses) >= MIN_SMOOTHED else losses, **style)
                axes.plot(*points(job.history, "eval_loss"), linestyle="--", marker="o", markersize=3, **style)
            legend[min(rank, num_coloured)] = (
                line,
                one_line(name)[:MAX_LEGEND_LENGTH] if is_coloured else f"{num_others} {label('more')}",
            )
        axes.set_xlabel(label("step"))
        axes.set_ylabel(label("loss"))
        axes.figure.legend(
            *zip(*(legend[rank] for rank in sorted(legend)), strict=True), loc="outside lower left", fontsize=9,
            title=label("the best first"), alignment="left",
        )  # fmt: skip

    return Plot(
        "loss",
        "training loss by step; dashed: evaluation loss",
        paint,
        size=(6.8, 4.0 + 0.22 * (num_coloured + bool(num_others))),
    )


# -- the objective against the knobs -------------------------------------------------------------------------------------


def plot_by_knob(ranking: Ranking, label: Translate = str) -> list[Plot]:
    """The objective against each knob: one point per job, and the mean for each value."""
    if ranking.objective is None:
        return []
    jobs = [
        job for row in ranking.rows for job in row.jobs if math.isfinite(job.metrics.get(ranking.objective, math.nan))
    ]
    plots = [
        _plot_against(jobs, ranking.objective, knob, name, ranking.best_job, label)
        for knob, name in ranking.knobs.items()
    ]
    return [plot for plot in plots if plot is not None]


def _plot_against(
    jobs: Sequence[Job], objective: str, knob: str, knob_name: str, best_job: Job | None, label: Translate
) -> Plot | None:
    """The objective against one knob; None if the jobs have fewer than two values of it."""
    valued = [(value, job) for job in jobs if (value := value_of(job, knob)) is not None]
    is_numeric = all(is_number(value) for value, _ in valued)
    valued.sort(key=lambda pair: pair[0] if is_numeric else format_value(pair[0]))
    jobs_by_value: dict[Any, list[Job]] = {}
    for value, job in valued:
        jobs_by_value.setdefault(value if is_numeric else format_value(value), []).append(job)
    if len(jobs_by_value) < 2:
        return None
    values = [*jobs_by_value]
    names = [one_line(format_value(value)) for value in values]
    positions: Sequence[float] = values if is_numeric else range(len(values))

    def paint(axes: "Axes") -> None:
        means = []
        for position, members in zip(positions, jobs_by_value.values(), strict=True):
            scores = [job.metrics[objective] for job in members]
            means.append(sum(scores) / len(scores))
            middle = (len(scores) - 1) / 2
            x = [position + (0.0 if is_numeric else (number - middle) * 0.05) for number in range(len(scores))]
            axes.scatter(x, scores, s=34, color=COLOURS[0], alpha=0.75, linewidths=0)
            if best_job in members:
                best = members.index(best_job)
                axes.scatter(
                    [x[best]], [scores[best]], s=110, facecolors="none", edgecolors=COLOURS[1], linewidths=1.8,
                    label=label("the winner"),
                )  # fmt: skip
        if is_numeric:
            axes.plot(positions, means, color=COLOURS[2], linewidth=1.6, label=label("mean"))
            if min(values) > 0 and max(values) / min(values) > LOG_SCALE_RATIO:
                axes.set_xscale("log")
            if len(values) <= 8:
                axes.set_xticks(values, names)
                axes.minorticks_off()
            axes.margins(x=0.08)
        else:
            axes.hlines(
                means, [position - 0.28 for position in positions], [position + 0.28 for position in positions],
                color=COLOURS[2], linewidth=2, label=label("mean"),
            )  # fmt: skip
            is_slanted = sum(map(len, names)) > 60
            axes.set_xticks(positions, [name if len(name) <= 32 else f"{name[:31]}…" for name in names],
                            rotation=20 if is_slanted else 0, ha="right" if is_slanted else "center")  # fmt: skip
            axes.set_xlim(-0.6, len(values) - 0.4)
            axes.grid(axis="x", visible=False)
        axes.set_xlabel(label(one_line(knob_name)))
        axes.set_ylabel(label(one_line(metric_title(objective))))
        axes.figure.legend(loc="outside upper right", ncols=2, fontsize=9)

    name = re.sub(r"[^\w.\-]+", "-", f"{objective}_by_{knob_name}")
    return Plot(name, f"{metric_title(objective)} by {knob_name}", paint, (5.8, 3.4), knob)
