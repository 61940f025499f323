"""The part `board` of benchmark.py: the first page over hundreds of runs, and what changed since, beside TensorBoard and trackio.

All three get the same numbers of the same runs in their own files. Also a child of that part: `benchmark_board.py ROLE FOLDER …`.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

BOARD, TENSORBOARD, TRACKIO = "glmtuner board", "TensorBoard", "trackio"
RUNS, LINES, TOUCHED = 500, 2000, 10
SWEEPS = 10
GOALS = {"first": 2.0, "update": 0.5, "memory": 500.0}
NAMES = ("loss", "grad_norm", "learning_rate")
TRACKIO_VERSION = "0.43.0"
PATIENCE = 900.0  # seconds for an answer


def numbers(run: int, lines: int) -> Iterator[dict[str, float]]:
    """The logged lines of a run."""
    noise = random.Random(run)
    rate, floor = 0.5 + noise.random(), 1 + noise.random()
    for line in range(1, lines + 1):
        yield {
            "step": line * 10,
            "epoch": line / lines * 3,
            "loss": floor + 2 * math.exp(-rate * line / lines * 5) + noise.gauss(0, 0.05),
            "grad_norm": abs(noise.gauss(1.5, 0.3)),
            "learning_rate": 1e-4 * (1 - line / (lines + 1)),
        }


def make_runs(folder: Path, config: str, runs: int, lines: int) -> None:
    """Write run folders as a training leaves them, in sweeps; `config` is the config.yaml of a real run."""
    for run in range(runs):
        sweep = folder / f"sweep-{run % SWEEPS}"
        rate, seed = f"{1e-5 * (1 + run // SWEEPS):.6g}", run % 3
        path = sweep / f"learning_rate-{rate}_seed-{seed}_{run:08x}"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(
            config.replace("learning_rate: 5.0e-05", f"learning_rate: {rate}").replace("seed: 42", f"seed: {seed}"),
            encoding="utf-8",
        )
        typed = [
            "model=tiny_glm",
            "data.dataset=[belle_sample]",
            f"trainer.learning_rate={rate}",
            f"trainer.seed={seed}",
        ]
        (path / "overrides.txt").write_text("\n".join(typed), encoding="utf-8")
        about = {
            "command": f"python -m glmtuner {' '.join(typed)}",
            "started": "2026-01-01T00:00:00+00:00",
            "packages": {},
        }
        (path / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
        logged = [*numbers(run, lines)]
        (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged), encoding="utf-8")
        timings = (
            {
                "step": line["step"],
                "time": 1.7e9 + place,
                "seconds": place * 1.0,
                "tokens": place * 4096,
                "tokens_per_second": 4096.0,
                "memory_gib": 8.5,
            }
            for place, line in enumerate(logged)
        )
        (path / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings), encoding="utf-8")
        if run % 10:  # the tenth part was interrupted
            measured = {
                "train_runtime": lines * 1.0,
                "train_loss": logged[-1]["loss"],
                "eval_loss": logged[-1]["loss"] + 0.1,
                "peak_memory_gib": 8.5,
            }
            (path / "metrics.json").write_text(json.dumps(measured), encoding="utf-8")
        (path / ".lock").touch()
    for sweep in range(min(SWEEPS, runs)):
        (folder / f"sweep-{sweep}/sweep.json").write_text(
            json.dumps({"typed": ["python -m glmtuner -m …"], "cwd": "/", "jobs": []}), encoding="utf-8"
        )
