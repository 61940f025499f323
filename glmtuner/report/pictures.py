"""Pictures of runs, each in a light and a dark version; matplotlib draws them without a display."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.report.jobs import Job, is_number, shown, value_of
from glmtuner.report.ranking import Ranking, title
from glmtuner.run_folder.files import write_bytes
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import LOSS_PICTURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Arial Unicode MS",
)  # fmt: skip
COLOURS = (
    "#4c7fe0",
    "#d9822b",
    "#2a9d74",
    "#b8509b",
    "#4fb3d1",
    "#94783f",
)  # of the best runs; they read on both grounds
OTHERS = "#9a9a94"
HIGHLIGHTED = 5
THEMES = {"light": ("#ffffff", "#33332f", "#e4e4de"), "dark": ("#232528", "#d8d8d4", "#3b3d41")}  # ground, ink, grid
MANY = 100  # points from which a loss curve is smoothed
LEGEND = 90  # characters of a name beside the picture
DECADE = 10.0  # a numeric knob whose values span more is drawn on a logarithmic axis


@dataclass(frozen=True)
class Picture:
    """A picture as PNG, for a light and for a dark page."""

    name: str  # of its file, without .png
    about: str
    light: bytes
    dark: bytes


def drawn(name: str, about: str, paint: "Callable[[Axes], None]", size: tuple[float, float] = (6.8, 4.0)) -> Picture:
    """What `paint` does to empty axes, in both themes."""
    import warnings

    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {*font_manager.get_font_names()}
    found = {}
    for theme, (ground, ink, grid) in THEMES.items():
        style = {
            "font.family": [font for font in FONTS if font in installed],
            "text.parse_math": False,  # a $ in a name is a $
            "figure.facecolor": ground, "axes.facecolor": ground, "text.color": ink, "axes.labelcolor": ink,
            "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink, "grid.color": grid, "axes.grid": True,
            "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
            "axes.unicode_minus": False,
        }  # fmt: skip
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # on a machine without Chinese fonts
            figure: Figure = Figure(figsize=size, dpi=140, layout="constrained")
            paint(figure.add_subplot())
            file = io.BytesIO()
            figure.savefig(file, format="png")
        found[theme] = file.getvalue()
    return Picture(name, about, **found)


# -- losses --------------------------------------------------------------------------------------------------------------


def points(history: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of what the history logged under this name."""
    found = [(line["step"], line[name]) for line in history if is_number(line.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def run_loss(folder: RunFolder) -> Picture | None:
    """The training loss of a run, smoothed too when there are many points, and its evaluation loss; None without any."""
    history = folder.history()
    train, evaluation = points(history, "loss"), points(history, "eval_loss")
    if not train[0] and not evaluation[0]:
        return None

    def paint(axes: "Axes") -> None:
        many = len(train[0]) >= MANY
        axes.plot(
            *train, color=COLOURS[0], alpha=0.35 if many else 1.0, linewidth=1.2, marker="" if many else "o", markersize=3,
            label="training loss",
        )  # fmt: skip
        if many:
            axes.plot(train[0], smoothed(train[1]), color=COLOURS[0], linewidth=2, label="training loss, smoothed")
        if evaluation[0]:
            axes.plot(*evaluation, color=COLOURS[1], linestyle="--", marker="s", markersize=4, label="evaluation loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_title(folder.path.name, fontsize=10, loc="left")
        axes.legend()

    return drawn("loss", "loss by step", paint)


def draw_loss(folder: RunFolder) -> Path | None:
    """Write loss.png; None for a run that logged no loss."""
    picture = run_loss(folder)
    if picture is None:
        return None
    write_bytes(folder / LOSS_PICTURE, picture.light)
    return folder / LOSS_PICTURE


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value's neighbourhood, a twentieth of all values wide, narrower at the ends: it does not lag."""
    reach = max(len(values) // 40, 1)
    out = []
    for place in range(len(values)):
        around = min(reach, place, len(values) - 1 - place)
        window = values[place - around : place + around + 1]
        out.append(sum(window) / len(window))
    return out


def sweep_losses(board: Ranking) -> Picture | None:
    """The losses of all jobs: the best settings in colour, the others grey; evaluation losses dashed; None without any."""
    settings = [(row.label, row.jobs) for row in board.rows]
    settings += [(job.label(board.knobs), [job]) for job in board.others if job.history]
    settings = [(label, jobs) for label, jobs in settings if any(points(job.history, "loss")[0] for job in jobs)]
    if not settings:
        return None
    coloured = len(settings) if len(settings) <= len(COLOURS) else HIGHLIGHTED
    rest = len(settings) - coloured

    def paint(axes: "Axes") -> None:
        named = {}
        for place, (label, jobs) in reversed([*enumerate(settings)]):  # the best on top
            best = place < coloured
            style = {
                "color": COLOURS[place] if best else OTHERS,
                "linewidth": 1.8 if best else 0.9,
                "alpha": 1 if best else 0.6,
            }
            for job in jobs:
                steps, losses = points(job.history, "loss")
                (line,) = axes.plot(steps, smoothed(losses) if len(losses) >= MANY else losses, **style)
                axes.plot(*points(job.history, "eval_loss"), linestyle="--", marker="o", markersize=3, **style)
            named[min(place, coloured)] = (line, label[:LEGEND] if best else f"{rest} more")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.figure.legend(
            *zip(*(named[place] for place in sorted(named)), strict=True), loc="outside lower left", fontsize=9,
            title="the best first", alignment="left",
        )  # fmt: skip

    return drawn(
        "loss",
        "training loss by step; dashed: evaluation loss",
        paint,
        size=(6.8, 4.0 + 0.22 * (coloured + bool(rest))),
    )


# -- the objective by what was varied ------------------------------------------------------------------------------------


def by_knob(board: Ranking) -> list[Picture]:
    """The objective against each knob: a point a run, and the mean at each value."""
    if board.objective is None:
        return []
    jobs = [job for row in board.rows for job in row.jobs if math.isfinite(job.metrics.get(board.objective, math.nan))]
    found = [_against(jobs, board.objective, knob, name, board.chosen) for knob, name in board.knobs.items()]
    return [picture for picture in found if picture is not None]


def _against(jobs: Sequence[Job], objective: str, knob: str, called: str, winner: Job | None) -> Picture | None:
    valued = [(value_of(job, knob), job) for job in jobs]
    valued = [(value, job) for value, job in valued if value is not None]
    numeric = all(is_number(value) for value, _ in valued)
    valued.sort(key=lambda pair: pair[0] if numeric else shown(pair[0]))
    cells: dict[Any, list[Job]] = {}
    for value, job in valued:
        cells.setdefault(value if numeric else shown(value), []).append(job)
    if len(cells) < 2:
        return None
    values = [*cells]
    places = values if numeric else range(len(values))

    def paint(axes: "Axes") -> None:
        means = []
        for place, members in zip(places, cells.values(), strict=True):
            scores = [job.metrics[objective] for job in members]
            means.append(sum(scores) / len(scores))
            apart = [0.0] * len(scores) if numeric else [(n - (len(scores) - 1) / 2) * 0.05 for n in range(len(scores))]
            axes.scatter([place + shift for shift in apart], scores, s=34, color=COLOURS[0], alpha=0.75, linewidths=0)
            if winner in members:
                at = members.index(winner)
                axes.scatter(
                    [place + apart[at]], [scores[at]], s=110, facecolors="none", edgecolors=COLOURS[1], linewidths=1.8,
                    label="the winner",
                )  # fmt: skip
        if numeric:
            axes.plot(places, means, color=COLOURS[2], linewidth=1.6, label="mean")
            positive = min(values) > 0
            if positive and max(values) / min(values) > DECADE:
                axes.set_xscale("log")
            if len(values) <= 8:
                axes.set_xticks(values, [shown(value) for value in values])
                axes.minorticks_off()
            axes.margins(x=0.08)
        else:
            axes.hlines(
                means, [at - 0.28 for at in places], [at + 0.28 for at in places], color=COLOURS[2], linewidth=2,
                label="mean",
            )  # fmt: skip
            slanted = sum(map(len, values)) > 60
            axes.set_xticks(places, [value if len(value) <= 32 else f"{value[:31]}…" for value in values],
                            rotation=20 if slanted else 0, ha="right" if slanted else "center")  # fmt: skip
            axes.set_xlim(-0.6, len(values) - 0.4)
            axes.grid(axis="x", visible=False)
        axes.set_xlabel(called)
        axes.set_ylabel(title(objective))
        axes.figure.legend(loc="outside upper right", ncols=2, fontsize=9)

    name = re.sub(r"[^\w.\-]+", "-", f"{objective}_by_{called}")
    return drawn(name, f"{title(objective)} by {called}", paint, size=(5.8, 3.4))
