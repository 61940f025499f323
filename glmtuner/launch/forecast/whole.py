"""The forecast of a whole sweep, or of a single run: its jobs, their sum, and whether a budget allows it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtuner.config.budget import Budget
from glmtuner.errors import ConfigError
from glmtuner.launch.device import device_of
from glmtuner.launch.forecast.cost import Probe, Seconds
from glmtuner.launch.forecast.jobs import Job, JobForecast, cost_key, counts_in, forecast_job, probes_of, seen_runs
from glmtuner.launch.forecast.schedule import Launcher, elapsed
from glmtuner.launch.memory_check import estimate_run
from glmtuner.memory.policy import process_baseline_bytes
from glmtuner.run_folder.spent import Hours, hours_spent

NO_HOURS = Hours()


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What all jobs will take; those that are finished take nothing any more, and `spent` are the hours so far."""

    jobs: Sequence[JobForecast]
    launcher: Launcher
    budget: Budget
    spent: Hours = NO_HOURS

    @property
    def to_come(self) -> list[JobForecast]:
        """The jobs that are not finished, each as often as it runs."""
        return [job for job in self.jobs if job.state != "finished" for _ in range(job.count)]

    @property
    def hours(self) -> Hours:
        """The hours of the jobs to come whose hours are known."""
        return Hours(sum(job.gpu_hours for job in self.to_come), sum(job.cpu_hours for job in self.to_come))

    @property
    def is_known(self) -> bool:
        """Whether every job's hours are known."""
        return all(job.known for job in self.jobs)

    @property
    def elapsed_s(self) -> float:
        """The seconds from the start to the end of the last job."""
        return elapsed([job.seconds.wall for job in self.to_come], self.launcher.at_once)

    def sum_of(self, name: str) -> float | None:
        """The sum of a number of the jobs to come; None if one of them has none."""
        values = [getattr(job, name) for job in self.to_come]
        return None if any(value is None for value in values) else math.fsum(values)


def forecast(jobs: Sequence[Job], launcher: Launcher, root: Path | None = None) -> Forecast:
    """The forecast of these jobs, of the sweep in the folder `root`; what is not in the cache is probed.

    The memory of a job is the estimate for the largest batch of its own data; without a probe, for the largest that is allowed.
    """
    probes = probes_of(jobs, launcher)
    memory = _memory(jobs, probes)
    seen = _seen(jobs, probes, root)
    forecasts: list[JobForecast] = []
    for job in jobs:
        key = cost_key(job.composed)
        follows = launcher.shares_process and any(each.state != "finished" and each.cost for each in forecasts)
        forecasts.append(
            forecast_job(
                job, probes[key], launcher, memory[key], follows=follows, seen=seen.get(_schedule_key(job, probes[key]))
            )
        )
    spent = hours_spent(root) if root is not None and root.is_dir() else Hours()
    return Forecast(jobs=forecasts, launcher=launcher, budget=jobs[0].composed.run.budget, spent=spent)


def _schedule_key(job: Job, probe: "Probe | str") -> str:
    """Equal for jobs that also do everything equally often."""
    counts = counts_in(job.composed.run, probe, 1) if isinstance(probe, Probe) else None
    return f"{cost_key(job.composed)} {counts}"


def _seen(jobs: Sequence[Job], probes: "dict[str, Probe | str]", root: Path | None) -> dict[str, Seconds]:
    """How long finished jobs of the sweep took, by `_schedule_key`; the mean of several."""
    times = seen_runs(root)
    by_key: dict[str, list[Seconds]] = {}
    for job in jobs:
        if job.folder is not None and job.folder.name in times:
            key = _schedule_key(job, probes[cost_key(job.composed)])
            by_key.setdefault(key, []).append(times[job.folder.name])
    return {
        key: Seconds(sum(each.wall for each in found), sum(each.cpu for each in found)) * (1 / len(found))
        for key, found in by_key.items()
    }


def _memory(jobs: Sequence[Job], probes: "dict[str, Probe | str]") -> dict[str, int | None]:
    """The estimated peak of the jobs, by `cost_key`; None where it cannot be estimated."""
    found: dict[str, int | None] = {}
    baseline = None
    for job in jobs:
        key, run = cost_key(job.composed), job.composed.run
        if key in found:
            continue
        if not run.trainer.do_train:
            found[key] = None
            continue
        device = device_of(run)
        batch = None
        probe = probes[key]
        if isinstance(probe, Probe) and probe.train.largest:
            rows, longest = run.stage.largest_batch(run)
            rows = min(rows, probe.train.records * max(rows // max(probe.train.per_batch, 1), 1))
            batch = rows, min(-(-probe.train.largest // rows), longest)
        try:
            if baseline is None:  # what later estimates leave behind is not a job's
                from glmtuner.kernels.fast_paths import FastPath  # noqa: F401
                from glmtuner.launch.libraries import load_libraries

                load_libraries(compiles=False, trains=True)
                baseline = process_baseline_bytes(device, run.tracker.name)
            found[key] = estimate_run(job.composed, device, None, batch=batch, baseline=baseline)[0].peak
        except ConfigError:
            found[key] = None
    return found


def refuse(found: Forecast, what: str) -> None:
    """Raise ConfigError where what is spent and what is to come pass a limit of the budget; `what` is `the sweep` or `the run`."""
    budget, hours = found.budget, found.spent + found.hours
    if not found.to_come:
        return
    if over := budget.passed(hours.gpu, hours.cpu):
        spent = ""
        if found.spent.gpu or found.spent.cpu:
            spent = f", of which {in_hours(found.spent)} are spent"
        knob = over[0].partition("=")[0]
        raise ConfigError(
            f"{'; '.join(over)}: {what} is forecast to take {in_hours(hours)}{spent}; --check shows it by job. Type {knob}=… of "
            "more, a smaller sweep or fewer steps, or budget.forecast=false to start all the same and stop, resumably, when the budget "
            "is spent"
        )


def require_right_hours(found: Forecast) -> None:
    """Raise ConfigError for a limit in hours of what the jobs do not use."""
    budget, hours = found.budget, found.hours
    if budget.gpu_hours is not None and hours.cpu and not hours.gpu:
        raise ConfigError(
            f"budget.gpu_hours={budget.gpu_hours:g}: the jobs run without a GPU; type budget.cpu_hours=…, hours of a processor core"
        )
    if budget.cpu_hours is not None and hours.gpu and not hours.cpu:
        raise ConfigError(f"budget.cpu_hours={budget.cpu_hours:g}: the jobs run on a GPU; type budget.gpu_hours=…")
    price = "gpu" if hours.gpu else "cpu"
    if budget.money is not None and (hours.gpu or hours.cpu) and budget.cost(hours.gpu, hours.cpu) is None:
        raise ConfigError(
            f"budget.money={budget.money:g}: the jobs take {price.upper()}-hours, which have no price; type budget.price_per_{price}_hour=…"
        )


def in_hours(hours: Hours) -> str:
    """`0.25 GPU-hours`, `2.5 CPU-hours`, or both."""
    parts = [(hours.gpu, "GPU"), (hours.cpu, "CPU")]
    shown = [f"{value:.3g} {kind}-hours" for value, kind in parts if value]
    return " and ".join(shown) or "0 hours"


def json_of(found: Forecast) -> dict[str, Any]:
    """The forecast as JSON's types: seconds, bytes, hours, kWh, and money in the budget's currency; null is not known."""
    jobs = []
    for job in found.jobs:
        values = dataclasses.asdict(job)
        cost = values.pop("cost")
        if job.cost is not None:
            values |= {
                "steps": job.cost.steps,
                "tokens": job.cost.tokens,
                "flops": job.cost.flops,
                "parts": cost["parts"],
            }
        jobs.append(values)
    hours = found.hours
    return {
        "jobs": jobs,
        "to_come": len(found.to_come),
        "at_once": found.launcher.at_once,
        "is_known": found.is_known,
        "elapsed_seconds": found.elapsed_s,
        "gpu_hours": hours.gpu,
        "cpu_hours": hours.cpu,
        "kilowatt_hours": found.sum_of("kilowatt_hours"),
        "money": found.sum_of("money"),
        "currency": found.budget.currency,
        "spent": dataclasses.asdict(found.spent),
    }
