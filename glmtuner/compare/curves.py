"""The losses of the runs that are compared, in one plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glmtuner.compare.loaded import LoadedRun
from glmtuner.report.escape import one_line
from glmtuner.report.plots import COLOURS, Plot, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_losses(runs: Sequence[LoadedRun]) -> list[Plot]:
    """The training losses by step, and dashed the evaluation losses; empty where no run logged any."""
    shown = [run for run in runs if points(run.history, "loss")[0] or points(run.history, "eval_loss")[0]]
    if not shown:
        return []

    def paint(axes: "Axes") -> None:
        for index, run in enumerate(shown):
            colour = COLOURS[index % len(COLOURS)]
            train, evaluation = points(run.history, "loss"), points(run.history, "eval_loss")
            axes.plot(*train, color=colour, linewidth=1.6, marker="o", markersize=3, label=one_line(run.label))
            axes.plot(*evaluation, color=colour, linestyle="--", marker="s", markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (dashed: of the evaluation)")
        axes.legend()

    return [Plot("losses", "loss by step", paint)]
