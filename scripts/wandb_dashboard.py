"""Writes a W&B workspace (a dashboard) for a sweep: its curves, its objective against every varied knob, its answers.

The varied knobs and the objective are read from the sweep's folder, or named with --knob and --objective where there is
only the name of a W&B group. Each call makes a new view of the project. Needs `pip install 'glmtuner[dashboard]'`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmtuner.config.objective import measured_as
from glmtuner.console import complain, say
from glmtuner.errors import ConfigError, GlmtunerError
from glmtuner.report.jobs import PRESET_KEYS, read_jobs, varied_knobs
from glmtuner.report.ranking import resolve_objective
from glmtuner.run_folder.files import write_text

WIDE = 50  # numbers that are so many times apart get a logarithmic axis


@dataclass
class Sweep:
    """What a dashboard shows."""

    group: str
    objective: str
    knobs: dict[str, list[Any]] = field(default_factory=dict)  # by its dotted key: the values, none when unknown
    pictures: list[str] = field(default_factory=list)


def read_sweep(folder: Path, objective: str | None) -> Sweep:
    """What the jobs' config.yaml and metrics.json tell; raises ConfigError when the folder holds no jobs."""
    folder = folder.resolve()
    jobs = [job for job in read_jobs(folder) if job.values]
    if not jobs:
        raise ConfigError(f"{folder} holds no jobs of a sweep; name a folder under outputs/sweeps, or a W&B group")
    keys = [PRESET_KEYS.get(knob, knob) for knob in varied_knobs(jobs)]  # W&B has the config's keys
    metrics = {name for job in jobs for name in job.metrics}
    asked = measured_as(objective, metrics) or objective if objective else resolve_objective(jobs)[0]
    places = [folder, *(job.folder.path for job in jobs)]
    return Sweep(
        group=jobs[0].values.get("tracker.group") or folder.name,
        objective=asked or "eval_loss",
        knobs={key: [job.values[key] for job in jobs if key in job.values] for key in keys},
        pictures=sorted(
            {f"pictures/{path.stem}" for at in places for path in (*at.glob("*.png"), *at.glob("pictures/*.png"))}
        ),
    )


def workspace(entity: str, project: str, sweep: Sweep) -> Any:
    """The wandb_workspaces.workspaces.Workspace; nothing is asked of a server."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    aim = panels.SummaryMetric(sweep.objective)

    def curve(name: str) -> Any:
        return panels.LinePlot(title=name, x="train/global_step", y=[name])

    def against(knob: str, values: list[Any]) -> Any:
        title = f"{sweep.objective} by {knob}"
        if is_number(values):
            return panels.ScatterPlot(title=title, x=panels.Config(knob), y=aim, log_x=is_wide(values))
        return panels.BarPlot(
            title=title, metrics=[sweep.objective], groupby=panels.Config(knob), groupby_aggfunc="mean"
        )

    columns = [
        panels.ParallelCoordinatesPlotColumn(metric=panels.Config(knob), log=is_number(values) and is_wide(values))
        for knob, values in sweep.knobs.items()
    ]
    columns.append(panels.ParallelCoordinatesPlotColumn(metric=aim))
    sections = {
        "Objective": [
            *(against(knob, values) for knob, values in sweep.knobs.items()),
            panels.ParallelCoordinatesPlot(title="every run", columns=columns),
            panels.ParameterImportancePlot(with_respect_to=sweep.objective),
        ],
        "Training": [curve(name) for name in ("train/loss", "eval/loss", "train/learning_rate")],
        "Answers and pictures": [
            panels.WeavePanelSummaryTable(table_name="leaderboard"),
            panels.WeavePanelSummaryTable(table_name="predictions"),
            panels.MediaBrowser(media_keys=sweep.pictures or ["pictures/loss"]),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"glmtuner sweep {sweep.group}",
        sections=[workspaces.Section(name=name, panels=shown, is_open=True) for name, shown in sections.items()],
        settings=workspaces.WorkspaceSettings(x_axis="train/global_step", max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == sweep.group), pinned_columns=[f"summary:{sweep.objective}"]
        ),
    )


def is_number(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def is_wide(values: list[Any]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= WIDE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where W&B has the runs")
    parser.add_argument("sweep", metavar="SWEEP", help="the sweep's folder, or the name of a W&B group")
    parser.add_argument("--objective", help="the metric to compare by; default: the sweep's, or the loss")
    parser.add_argument("--knob", action="append", default=[], metavar="KEY", help="a varied key; once for each")
    parser.add_argument("--dry-run", type=Path, metavar="FILE", help="write the workspace's JSON, and ask no server")
    given = parser.parse_args(argv)
    try:
        say(make(given))
    except GlmtunerError as error:
        complain(f"wandb_dashboard: {error}")
        return 2
    return 0


def make(given: argparse.Namespace) -> str:
    """Write the dashboard; returns where it is."""
    entity, slash, project = given.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise ConfigError(
            f"{given.project!r} is no ENTITY/PROJECT; type both names, as in the address of the project's page"
        )
    if Path(given.sweep).is_dir():
        sweep = read_sweep(Path(given.sweep), given.objective)
    else:
        sweep = Sweep(group=given.sweep, objective=given.objective or "eval_loss")
    sweep.knobs |= {knob: sweep.knobs.get(knob, []) for knob in given.knob}
    try:
        import wandb

        view = workspace(entity, project, sweep)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; type pip install 'glmtuner[dashboard]'") from None
    if given.dry_run:
        write_text(given.dry_run, view._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n")
        return str(given.dry_run)
    try:
        if not wandb.login(prompt=False, verify=True):
            raise ConfigError("not logged in to W&B; type wandb login, or --dry-run FILE to see what would be written")
        return view.save().url
    except (wandb.Error, OSError) as error:
        raise ConfigError(f"W&B took no dashboard for {given.project} ({' '.join(str(error).split())})") from None


if __name__ == "__main__":
    sys.exit(main())
