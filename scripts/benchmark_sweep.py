"""The part `sweep` of benchmark.py: eight LoRA jobs from the command to the report, by several launchers and tools."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED = "glmtuner, hydra/launcher=shared"
APART = "glmtuner, one job after another"
GOALS = {"sweep": 2.0, "sweep int4": 3.0}
GOAL_LLAMAFACTORY = 5.0
RANKS, RATES, SEEDS = (4, 8), (1e-3, 5e-4), (1, 2)
STEPS, BATCH_SIZE = 40, 2


def measure(bench: Any, theirs: str, before: Path | None) -> None:
    """Measure the sweep in float32 and on int4, and eight runs of LLaMA-Factory where its environment is there.

    `theirs` is the name of LLaMA-Factory's measurements. `before` is another checkout, whose basic launcher is measured.
    """
    if before is not None and not (before / "glmtuner").is_dir():
        raise SystemExit(f"--before {before}: no checkout of glmtuner; name the folder that has glmtuner/ in it")
    has_theirs = (bench.llamafactory / "bin/llamafactory-cli").is_file()
    if not has_theirs:
        print(
            f"sweep: LLaMA-Factory is not measured: {bench.llamafactory} has no llamafactory-cli; name its environment with "
            "--llamafactory, or run another part first, which installs it",
            flush=True,
        )
    for part, more in (("sweep", ()), ("sweep int4", ("quant=int4",))):
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            SHARED: lambda more=more: by_glmtuner(bench, "shared", None, "hydra/launcher=shared", *more),
            APART: lambda more=more: by_glmtuner(bench, "apart", before, *more),
        }
        if has_theirs and not more:
            contenders[theirs] = lambda: by_llamafactory(bench)
        bench.take_turns(part, contenders)


def by_glmtuner(bench: Any, name: str, checkout: Path | None, *more: str) -> dict[str, float]:
    """Seconds of the whole command, and the peak memory of its process."""
    folder = bench.fresh(f"sweep {name}")
    typed = [
        override
        for override in bench.overrides(folder, "epoch", *more)
        if not override.startswith(
            ("finetuning.lora_rank", "trainer.learning_rate", "trainer.seed", "trainer.output_dir")
        )
    ]
    swept = {"finetuning.lora_rank": RANKS, "trainer.learning_rate": RATES, "trainer.seed": SEEDS}
    typed += [f"{key}={','.join(map(str, values))}" for key, values in swept.items()]
    typed += [
        f"trainer.per_device_train_batch_size={BATCH_SIZE}", f"trainer.max_steps={min(STEPS, bench.steps)}", "trainer.logging_steps=10",
        f"hydra.sweep.dir={folder / 'sweep'}",
    ]  # fmt: skip
    environment = bench.environment(ours=True)
    if checkout is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(checkout), environment["PYTHONPATH"]])
    ended = bench.run_in(environment, [sys.executable, "-m", "glmtuner", "-m", *typed], folder)
    if not (folder / "sweep/report.md").is_file():
        raise SystemExit(f"the sweep left no report; its whole output is in {folder / 'output.log'}")
    return {"seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds, "peak_mib": ended.peak_mib}


def by_llamafactory(bench: Any) -> dict[str, float]:
    """Seconds of eight runs, one after another, and the largest peak memory."""
    folder, seconds, cpu_seconds, peak = bench.fresh("sweep llamafactory"), 0.0, 0.0, 0.0
    for rank in RANKS:
        for rate in RATES:
            for seed in SEEDS:
                more = {
                    "lora_rank": rank, "learning_rate": rate, "seed": seed, "max_steps": min(STEPS, bench.steps), "logging_steps": 10,
                    "per_device_train_batch_size": BATCH_SIZE,
                }  # fmt: skip
                shutil.rmtree(folder / "run", ignore_errors=True)
                ended = bench.llamafactory_train(folder, bench.arguments(folder, "epoch", **more))
                seconds, cpu_seconds = seconds + ended.seconds, cpu_seconds + ended.cpu_seconds
                peak = max(peak, ended.peak_mib)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}
