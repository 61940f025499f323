"""`--check` of a single run: its memory by part, and what it will take."""

import sys
from contextlib import nullcontext, redirect_stdout

from glmtuner.config.compose import Composed
from glmtuner.console import plain, say
from glmtuner.launch.forecast.jobs import Job
from glmtuner.launch.forecast.schedule import Launcher
from glmtuner.launch.forecast.table import duration, show
from glmtuner.launch.forecast.whole import Forecast, forecast, json_of, refuse, require_right_hours
from glmtuner.launch.memory_check import report_memory
from glmtuner.launch.places import output_folder
from glmtuner.run_folder.files import strict_json


def check_run(composed: Composed, as_json: bool = False) -> None:
    """Print the memory and the forecast of a run; raises ConfigError where it does not fit, or where a budget does not allow it."""
    run = composed.run
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        report_memory(composed)
        if not run.budget.forecast:
            say("budget.forecast=false: no steps are measured")
            return
        folder = output_folder(composed) if run.trainer.output_dir else None
        label = run.name or run.finetuning.finetuning_type
        found = forecast([Job(composed=composed, label=label, folder=folder)], Launcher(), folder)
    if as_json:
        print(plain(strict_json(json_of(found), indent=2)))
    else:
        show(found)
        show_parts(found)
    require_right_hours(found)
    refuse(found, "the run")


def show_parts(found: Forecast) -> None:
    """Say how long each part of a run takes, the longest first."""
    cost = found.jobs[0].cost
    if cost is None:
        return
    parts = sorted(((seconds.wall, name) for name, seconds in cost.parts.items() if seconds.wall), reverse=True)
    say(f"forecast: {', '.join(f'{name} {duration(wall)}' for wall, name in parts)}")
