"""The scores of benchmarks, from the files of a run folder's benchmarks/: intervals, tables, and the score of each record."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtuner.report.bootstrap import LEVEL, interval
from glmtuner.run_folder.files import is_number, read_lines, read_object
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import BENCHMARKS

SCORES = "scores.json"
BENCHMARK, SUBJECT = "benchmark_", "subject_"  # before the names of scores in metrics.json
NORMAL_QUANTILE = 1.959963984540054  # of (1 + LEVEL) / 2
TOLERANCE = 1e-6  # between a score and the mean of its records, above which the records give no interval
HEADER = ["benchmark", "task", "metric", "score", f"{LEVEL:.0%} interval", "records", "examples"]
MISSING = "-"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The bounds of the 95 % score interval of a proportion (Wilson 1927), which is not empty where all or none are hits."""
    z, share = NORMAL_QUANTILE, hits / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(center - half, 0.0), min(center + half, 1.0)


def bounds_of(value: float, records: Sequence[float]) -> dict[str, Any]:
    """The interval of a mean over records: Wilson's of right and wrong answers, else the bootstrap's; empty where it is no such mean."""
    if not records or abs(sum(records) / len(records) - value) > TOLERANCE:
        return {}
    if {*records} <= {0.0, 1.0}:
        low, high = wilson(round(sum(records)), len(records))
        return {"low": low, "high": high, "interval": "Wilson"}
    found = interval([(score, 1.0) for score in records])
    return {"low": found.low, "high": found.high, "interval": "bootstrap"} if found is not None else {}


def names_of(benchmark: Mapping[str, Any], prefix: str = BENCHMARK) -> dict[str, str]:
    """The names that a benchmark's scores have in metrics.json, each with its metric: the main one also has no metric in its name.

    Not so where less is better: which way is better is known by the metric's name.
    """
    main = benchmark["main"]
    bare = {} if main is None or main in benchmark["less_is_better"] else {f"{prefix}{benchmark['name']}": main}
    return {**bare, **{f"{prefix}{benchmark['name']}_{metric}": metric for metric in benchmark["scores"]}}


def subject_name(task: Mapping[str, Any]) -> dict[str, str]:
    """The name in metrics.json of the main score of a task in a group, and its metric; empty without one."""
    return dict([*names_of(task, SUBJECT).items()][:1]) if task["main"] is not None else {}


def read_scores(folder: RunFolder) -> dict[str, Any]:
    """The content of benchmarks/scores.json; empty for a run without benchmarks."""
    path = folder / BENCHMARKS / SCORES
    return read_object(path) if path.is_file() else {}


def benchmarks_table(folder: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each benchmark with all of its scores, then the main score of each of its tasks; both empty without any."""
    about = read_scores(folder)
    rows: list[list[str]] = []
    for benchmark in about.get("benchmarks", []):
        rows += [_cells(benchmark["name"], "", benchmark, metric) for metric in benchmark["scores"]]
        tasks = [about["tasks"][name] for name in benchmark["tasks"]]
        if benchmark["is_group"]:
            rows += [_cells("", task["name"], task, task["main"]) for task in tasks if task["main"] is not None]
    return (HEADER, rows) if rows else ([], [])


def _cells(name: str, task: str, about: Mapping[str, Any], metric: str) -> list[str]:
    score = about["scores"][metric]
    bounds = f"[{score['low']:.4f}, {score['high']:.4f}]" if "low" in score else MISSING
    return [name, task, metric, f"{score['value']:.4f}", bounds, f"{about['records']:,}", str(about["num_fewshot"])]


def method_of_bounds(folder: RunFolder) -> str:
    """How the intervals of the benchmarks' scores are computed."""
    about = read_scores(folder)
    parts = [*about.get("benchmarks", []), *about.get("tasks", {}).values()]
    kinds = {score.get("interval") for part in parts for score in part["scores"].values()} - {None}
    said = {
        "Wilson": "of right and wrong answers Wilson's score intervals",
        "bootstrap": "of other scores percentile bootstrap intervals over records",
    }
    listed = ", ".join(text for kind, text in said.items() if kind in kinds)
    return f"Intervals of benchmarks: {listed}." if listed else ""


def benchmark_records(folder: RunFolder, measured: Iterable[str]) -> dict[str, dict[Hashable, tuple[float, float]]]:
    """The record scores of each measured benchmark score, by the task, the record's place in it, and a hash of its content."""
    about, wanted = read_scores(folder), set(measured)
    if not about or not any(name.startswith((BENCHMARK, SUBJECT)) for name in wanted):
        return {}
    lines = {name: [*read_lines(task_file(folder.path, name))] for name in about["tasks"]}
    scores: dict[str, dict[Hashable, tuple[float, float]]] = {}
    tasks = about["tasks"].values()
    sources = [(names_of(each), each["tasks"]) for each in about["benchmarks"]]
    sources += [(subject_name(task), [task["name"]]) for task in tasks]
    for names, of_tasks in sources:
        for name, metric in names.items():
            if name in wanted:
                found: dict[Hashable, tuple[float, float]] = {
                    (task, line.get("index"), line.get("hash")): (float(line["scores"][metric]), 1.0)
                    for task in of_tasks
                    for line in lines.get(task, ())
                    if isinstance(line.get("scores"), dict) and is_number(line["scores"].get(metric))
                }
                if found:
                    scores[name] = found
    return scores


def task_file(folder: Path, name: str) -> Path:
    """The file with the scores of a task's records, in a run folder."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    return folder / BENCHMARKS / f"{safe}.jsonl"
