"""The forecast on the terminal."""

from collections.abc import Sequence

from glmtuner.console import say, table
from glmtuner.launch.forecast.jobs import JobForecast
from glmtuner.launch.forecast.whole import Forecast, in_hours
from glmtuner.memory.estimate import gib

DASH = "-"
MOST_ROWS = 40
ENERGY, MONEY = "kWh", "cost"


def show(found: Forecast) -> None:
    """Print a table with a row a job, the sum, and what is to be known about them."""
    shown = found.jobs[:MOST_ROWS]
    on_gpu = any(job.gpu_hours for job in shown)
    columns = (
        "job",
        "memory",
        "steps",
        "tokens",
        "FLOPs",
        "time",
        "GPU-h" if on_gpu else "CPU-h",
        ENERGY,
        MONEY,
        "from",
    )
    rows = [_row(job, on_gpu, found.budget.currency) for job in shown]
    if len(found.jobs) > 1:
        rows.append(_sum(found, on_gpu))
    table("", columns, rows, lines=False)
    if len(found.jobs) > MOST_ROWS:
        say(f"{len(found.jobs) - MOST_ROWS} more jobs are in the sum")
    for sentence in sentences(found):
        say(sentence)


def _row(job: JobForecast, on_gpu: bool, currency: str) -> tuple[str, ...]:
    times = f" ×{job.count}" if job.count > 1 else ""
    memory = DASH if job.memory_bytes is None else gib(job.memory_bytes)
    if job.cost is None:
        return f"{job.label}{times}", memory, *[DASH] * 7, job.state or DASH
    hours = job.gpu_hours if on_gpu else job.cpu_hours
    return (
        f"{job.label}{times}", memory, f"{job.cost.steps:,}", f"{job.cost.tokens:,}", flops(job.cost.flops), duration(job.seconds.wall),
        f"{hours:.3g}", number(job.kilowatt_hours), money(job.money, currency), ", ".join(filter(None, (job.source, job.state))),
    )  # fmt: skip


def _sum(found: Forecast, on_gpu: bool) -> tuple[str, ...]:
    to_come = found.to_come
    costs = [job.cost for job in to_come if job.cost is not None]
    known = [cost.flops for cost in costs if cost.flops is not None]
    memory = [job.memory_bytes for job in to_come if job.memory_bytes is not None]
    hours = found.hours.gpu if on_gpu else found.hours.cpu
    return (
        "sum", f"at most {gib(max(memory))}" if memory else DASH, f"{sum(cost.steps for cost in costs):,}",
        f"{sum(cost.tokens for cost in costs):,}", flops(sum(known) if len(known) == len(costs) and costs else None),
        duration(found.elapsed_s), f"{hours:.3g}", number(found.sum_of("kilowatt_hours")),
        money(found.sum_of("money"), found.budget.currency), "" if found.is_known else "the known ones",
    )  # fmt: skip


def sentences(found: Forecast) -> list[str]:
    """What the table does not say: the parallelism, what is finished, submissions, and what is not known."""
    jobs, launcher = found.jobs, found.launcher
    told = []
    if len(jobs) > 1:
        finished = sum(job.state == "finished" for job in jobs)
        done = f", {finished} of them finished" if finished else ""
        told.append(
            f"forecast: {sum(job.count for job in jobs)} jobs{done}; {in_hours(found.hours)} to come, {duration(found.elapsed_s)} with "
            f"{launcher.at_once} at a time"
        )
    if found.spent.gpu or found.spent.cpu:
        told.append(f"spent so far: {in_hours(found.spent)}")
    if launcher.limit_s is not None:
        told += _submission_sentences(jobs, launcher.limit_s, launcher.most_submissions)
    for reason in dict.fromkeys(job.reason for job in jobs if job.reason):
        told.append(f"not measured: {reason}")
    if any(job.cost is not None and job.cost.capped for job in jobs):
        told.append("answers: some went on beyond the probe's tokens and are taken to be as long as they may be")
    return [*told, *launcher.notes]


def _submission_sentences(jobs: Sequence[JobForecast], limit_s: float, most: int | None) -> list[str]:
    several = [job for job in jobs if job.submissions and job.submissions > 1]
    endless = [job for job in jobs if job.submissions is None]
    told = [
        f"{job.label}: {job.submissions} submissions of {duration(limit_s)}"
        + (
            f", and hydra.launcher.max_num_timeout allows {most}"
            if most is not None and (job.submissions or 0) > most
            else ""
        )
        for job in several
    ]
    if endless:
        told.append(
            f"{', '.join(job.label for job in endless[:3])}: a submission of {duration(limit_s)} ends before the job has loaded; type a "
            "larger hydra.launcher.timeout_min"
        )
    return told


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def flops(value: float | None) -> str:
    """A number of floating-point operations, such as `2.1e+15`."""
    return DASH if value is None else f"{value:.2g}"


def number(value: float | None) -> str:
    """A number with three digits, a dash for None."""
    return DASH if value is None else f"{value:.3g}"


def money(value: float | None, currency: str) -> str:
    """An amount of money, a dash for None."""
    return DASH if value is None else f"{value:.2f} {currency}" if value >= 0.1 else f"{value:.2g} {currency}"
