"""Measure glmtuner beside LLaMA-Factory and a bare PyTorch loop on one machine, and write docs/performance.md.

Every measurement is a fresh process with the same number of threads; the contenders take turns (A B C A B C ...) and
medians are compared. LLaMA-Factory has its own virtual environment, which is created with pip if it is missing.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_board import BOARD, TENSORBOARD, TRACKIO
from benchmark_board import GOALS as BOARD_GOALS
from benchmark_board import measure as measure_board
from benchmark_data import GOAL_LLAMAFACTORY as DATA_GOAL
from benchmark_data import GOAL_MIB, GOAL_TOKENIZERS, TOKENIZERS
from benchmark_data import measure as measure_data
from benchmark_sweep import APART, GOAL_LLAMAFACTORY, GOALS, SHARED
from benchmark_sweep import measure as measure_sweep

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "scripts/benchmark_child.py"
FOLDER = ROOT / "outputs/benchmark"
DATA = ROOT.parent / "shared/data/alpaca_zh_demo.json"  # of LLaMA-Factory; SAMPLE where it is missing
SAMPLE = ROOT / "glmtuner/assets/data/alpaca_zh_sample.json"
DOCS = ROOT / "docs"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"

COPIES = 20  # copies of the records in the larger file, each with another number in front
PAIRS = ROOT.parent / "shared/data/dpo_zh_demo.json"  # of LLaMA-Factory, too; the package's sample where it is missing
PARTS = (
    "startup",
    "config_error",
    "preprocessing",
    "data",
    "training",
    "prediction",
    "preference",
    "grpo",
    "benchmarks",
    "sweep",
    "board",
)
BESIDE_TRL = {
    "preference",
    "grpo",
    "benchmarks",
    "board",
}  # parts that need no LLaMA-Factory, and neither the model nor the records
WITHOUT_LLAMAFACTORY = BESIDE_TRL | {"sweep"}  # of these, the sweep measures it where it is installed
LLAMAFACTORY = "0.9.5"
LORA = {"lora_rank": 8, "lora_alpha": 16}
LEARNING_RATE = 1e-4
SEED = 42
OURS, PACKED = "glmtuner", "glmtuner, packed"
THEIRS, THEIRS_FAST = f"LLaMA-Factory {LLAMAFACTORY}", f"LLaMA-Factory {LLAMAFACTORY}, no checkpointing"
BARE, BARE_PACKED = "bare loop, padded", "bare loop, the same packed tensors"
BY_SAMPLE = f"{BARE_PACKED}, attention by sample"
TRL = "1.16.0"
THEIRS_TRL, THEIRS_TRL_FAST = f"TRL {TRL}", f"TRL {TRL}, no checkpointing"
LM_EVAL = "0.4.13"
THEIRS_HARNESS = f"lm-evaluation-harness {LM_EVAL}, its model of transformers"
# What the harness needs and the environment of glmtuner lacks.
BESIDE_HARNESS = (
    "evaluate", "pytablewriter", "DataProperty", "mbstrdecoder", "pathvalidate", "tabledata", "tcolorpy", "typepy", "rouge-score",
    "sacrebleu", "colorama", "lxml", "portalocker", "tabulate", "scikit-learn", "scipy", "joblib", "threadpoolctl", "sqlitedict",
    "word2number", "more_itertools",
)  # fmt: skip
QUESTIONS, EXAMPLES, HARNESS_BATCH = 64, 5, 16  # of a task; before each question; of the harness' model
LARGE_HEAD = 64_000  # words of the model whose memory is compared
PROMPTS, GENERATIONS, ANSWER_TOKENS = 4, 8, 64  # of a step of grpo
IMPORTS = "importing torch, Trainer and the model class"


# -- arithmetic: measurements -> rows of the table -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: medians of both sides, how many times better ours is, and whether a goal is met (None: no goal)."""

    part: str
    what: str
    unit: str
    ours: float
    other: float | None
    against: str
    times: float | None
    goal: str = ""
    met: bool | None = None


def comparison_row(
    part: str, what: str, unit: str, ours: Sequence[float], other: Sequence[float], against: str,
    *, more_is_better: bool, at_least: float | None = None, who: str = "",
) -> Row:  # fmt: skip
    """The row that compares two contenders; `at_least` is the goal for how many times better ours is."""
    our_median, their_median = statistics.median(ours), statistics.median(other)
    times = our_median / their_median if more_is_better else their_median / our_median
    goal = "" if at_least is None else f"at least {at_least:.3g}x"
    met = None if at_least is None else times >= at_least
    what = f"{what}, {who}" if who else what
    return Row(
        part=part,
        what=what,
        unit=unit,
        ours=our_median,
        other=their_median,
        against=against,
        times=times,
        goal=goal,
        met=met,
    )


def bound_row(part: str, what: str, unit: str, ours: Sequence[float], *, under: float) -> Row:
    """The row of a measurement with a fixed upper bound."""
    our_median = statistics.median(ours)
    goal = f"under {under:g} {unit}"
    return Row(
        part=part,
        what=what,
        unit=unit,
        ours=our_median,
        other=None,
        against="",
        times=None,
        goal=goal,
        met=our_median < under,
    )


def table_rows(measured: dict[str, dict[str, list[dict[str, float]]]]) -> list[Row]:
    """The table's rows from {part: {contender: [measurement, ...]}}; measurements that are missing have no row."""
    rows: list[Row] = []

    def series(part: str, contender: str, name: str) -> list[float]:
        return [run[name] for run in measured.get(part, {}).get(contender, []) if name in run]

    def add(
        part: str, what: str, unit: str, name: str, contender: str, against: str, *, who: str = "", **options: Any
    ) -> None:
        ours, other = series(part, contender, name), series(part, against, name)
        if ours and other:
            rows.append(comparison_row(part, what, unit, ours, other, against, who=who, **options))

    higher_is_better: dict[str, Any] = {"more_is_better": True}
    lower_is_better: dict[str, Any] = {"more_is_better": False}
    add("startup", "help", "s", "help", OURS, THEIRS, **lower_is_better)
    add("startup", "version", "s", "version", OURS, THEIRS, **lower_is_better)
    add(
        "startup",
        "start to the end of the first step",
        "s",
        "first_step",
        OURS,
        THEIRS,
        **lower_is_better,
        at_least=1.0,
    )
    if first_steps := series("startup", OURS, "first_step"):
        imports_s = statistics.median(series("startup", IMPORTS, "seconds"))
        beyond_imports = [seconds - imports_s for seconds in first_steps]
        rows.append(bound_row("startup", f"first step, beyond {IMPORTS}", "s", beyond_imports, under=1.5))
    add("config_error", "a mistyped key is answered", "s", "seconds", OURS, THEIRS, **lower_is_better)
    if seconds := series("config_error", OURS, "seconds"):
        rows.append(bound_row("config_error", "a mistyped key is answered", "s", seconds, under=1.0))
    for name, what in (
        ("records_per_second", "file to rows"),
        ("many_per_second", f"file to rows, {COPIES} times the file"),
    ):
        add("preprocessing", what, "records/s", name, OURS, THEIRS, **higher_is_better, at_least=5.0)
    for against, goal in ((THEIRS, DATA_GOAL), (TOKENIZERS, GOAL_TOKENIZERS)):
        row = ("data", "generated file to rows")
        add(*row, "records/s", "per_second", OURS, against, **higher_is_better, at_least=goal)
        add(*row, "records/s of CPU time", "per_cpu_second", OURS, against, **higher_is_better)
    if peaks := series("data", OURS, "peak_mib"):
        rows.append(bound_row("data", "generated file to rows, peak memory of a process", "MiB", peaks, under=GOAL_MIB))
    rate = ("training", "training", "tokens/s", "tokens_per_second")
    add(*rate, OURS, THEIRS, **higher_is_better, at_least=2.0)
    add(*rate, OURS, THEIRS_FAST, **higher_is_better, at_least=1.3)
    add(*rate, OURS, BARE, **higher_is_better, at_least=1.25)
    add(*rate, PACKED, BARE_PACKED, **higher_is_better, at_least=0.95, who="packed")
    add(*rate, PACKED, BY_SAMPLE, **higher_is_better, at_least=0.95, who="packed")
    add(*rate, PACKED, THEIRS, **higher_is_better, who="packed")
    memory = ("training", "training, peak memory", "MiB", "peak_mib")
    for against in (THEIRS, THEIRS_FAST, BARE):
        add(*memory, OURS, against, **lower_is_better)
    add(*memory, PACKED, BARE_PACKED, **lower_is_better, who="packed")
    add(
        "prediction", "prediction", "samples/s", "samples_per_second", OURS, THEIRS, **higher_is_better, at_least=2.5
    )  # fmt: skip
    for stage in ("dpo", "rm"):
        for against, goal in ((THEIRS_TRL, 1.8), (THEIRS_TRL_FAST, None)):
            add(
                f"preference {stage}", f"stage={stage}", "tokens/s", "tokens_per_second", OURS, against,
                **higher_is_better, at_least=goal,
            )  # fmt: skip
            add(
                f"preference {stage} memory", f"stage={stage}, peak above rest, {LARGE_HEAD:,} words", "MiB", "peak_mib", OURS,
                against, **lower_is_better, at_least=None if goal is None else 1 / 0.6,
            )  # fmt: skip
    for against in (THEIRS_TRL, THEIRS_TRL_FAST):
        for name, unit in (("tokens_per_second", "tokens/s"), ("tokens_per_cpu_second", "tokens/s of CPU time")):
            add("grpo", "stage=grpo, whole steps", unit, name, OURS, against, **higher_is_better)
    for part, bits in (("sweep", ""), ("sweep int4", ", int4")):
        for against, goal in ((APART, GOALS[part]), (THEIRS, GOAL_LLAMAFACTORY)):
            for name, unit, at_least in (("seconds", "s", goal), ("cpu_seconds", "s of CPU time", None)):
                add(
                    part, f"eight jobs, from the command to the report{bits}", unit, name, SHARED, against,
                    **lower_is_better, at_least=at_least,
                )  # fmt: skip
    for name, what, unit in (
        ("first", "500 runs: process start to the first table", "s"),
        ("again", "500 runs: the list of them again", "s"),
        ("curves", "curves of 20 runs with 2,000 points", "s"),
        ("update", "500 runs: a line more in 10 of them", "s"),
        ("memory", "500 runs: memory", "MiB"),
    ):
        if (ours := series("board", BOARD, name)) and name in BOARD_GOALS:
            rows.append(bound_row("board", what, unit, ours, under=BOARD_GOALS[name]))
        for against in (TENSORBOARD, TRACKIO):
            add("board", what, unit, name, BOARD, against, **lower_is_better)
    for name, what, unit in (
        ("letters", "options of a letter", "questions"),
        ("options", "options of a sentence", "questions"),
        ("answers", "generated answers", "answers"),
    ):
        row = ("benchmarks", f"benchmark, {what}")
        add(*row, f"{unit}/s", name, OURS, THEIRS_HARNESS, **higher_is_better)
        add(*row, f"{unit}/s of CPU time", f"{name}_cpu", OURS, THEIRS_HARNESS, **higher_is_better, at_least=1.0)
    return rows


def format_number(value: float | None) -> str:
    """A number with three significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; more than 1 in the fifth column means that glmtuner is better."""
    lines = ["| what | glmtuner | other | against | times better | goal | met |", "|---|--:|--:|---|--:|---|---|"]
    for row in rows:
        times = "" if row.times is None else f"{row.times:.2f}x"
        met = {True: "yes", False: "no", None: ""}[row.met]
        what = f"{row.what}, {row.unit}"
        lines.append(
            f"| {what} | {format_number(row.ours)} | {format_number(row.other)} | {row.against} | {times} | {row.goal} | {met} |"
        )
    return "\n".join(lines)


# -- fresh processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A finished process: exit status, duration, peak resident memory, and when `awaited` was printed (None: never)."""

    status: int
    seconds: float
    peak_mib: float
    awaited_seconds: float | None
    cpu_seconds: float = 0.0


def run_process(
    command: Sequence[str], environment: dict[str, str], log: Path, *, awaited: str | None = None, timeout_s: float = 3600
) -> Finished:  # fmt: skip
    """Run a command to its end, output to `log`; the peak is the VmHWM of the process if /proc has it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    awaited_at, peak_kib = None, 0
    ours_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=log.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()

    def watch() -> None:
        nonlocal peak_kib
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            if match := re.search(r"VmHWM:\s+(\d+)", status):
                peak_kib = max(peak_kib, int(match[1]))  # a process may reset its VmHWM
            time.sleep(0.2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    tail = ""
    try:
        assert process.stdout is not None
        with log.open("wb", buffering=0) as file:
            while chunk := os.read(process.stdout.fileno(), 65536):
                file.write(chunk)
                if awaited and awaited_at is None:
                    tail = tail[-200:] + chunk.decode(errors="replace")
                    if awaited in tail:
                        awaited_at = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        if process.returncode is None:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - started
    watcher.join()
    if usage.ru_maxrss > ours_kib or not peak_kib:  # a smaller value may be the peak of this process, inherited by fork
        peak_kib = max(peak_kib, usage.ru_maxrss)
    return Finished(process.returncode, seconds, peak_kib / 1024, awaited_at, usage.ru_utime + usage.ru_stime)


def fail(log: Path, command: Sequence[str]) -> None:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"this failed; its whole output is in {log}\n{' '.join(command)}\n{tail}")


@dataclass
class Bench:
    """The settings of one benchmark, its folders and its measurements."""

    folder: Path
    llamafactory: Path
    model: Path | None  # None until it is created
    template: str
    steps: int
    batch_size: int
    cutoff: int
    predicted: int
    max_new_tokens: int
    threads: int
    repeats: int
    seed: int = 0  # of the model that is made
    before: Path | None = None  # another checkout, for the sweep's jobs one after another
    generated: int = 200_000  # records of the part `data`
    measured: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def environment(self, ours: bool) -> dict[str, str]:
        """The environment variables of every process: its own caches, and no network."""
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        threads = str(self.threads)
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        variables |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "DISABLE_VERSION_CHECK": "1",
        }
        variables |= {
            "GLMTUNER_CACHE": str(self.folder / "cache"),
            "HF_DATASETS_CACHE": str(self.folder / "hf_datasets"),
        }
        if ours:
            beside = (ROOT, self.folder / "trl", self.folder / "lm_eval")
            variables["PYTHONPATH"] = os.pathsep.join(map(str, beside))
        return variables

    def fresh(self, name: str) -> Path:
        """A new folder for a run; the caches of earlier runs are deleted."""
        self.count += 1
        path = self.folder / "runs" / f"{self.count:03d}_{re.sub('[^a-z0-9]+', '_', name.lower())}"
        for old in (path, self.folder / "cache", self.folder / "hf_datasets"):
            shutil.rmtree(old, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def run(
        self, command: Sequence[str], folder: Path, *, ours: bool, fails: bool = False, awaited: str | None = None
    ) -> Finished:
        return self.run_in(self.environment(ours), command, folder, fails=fails, awaited=awaited)

    def run_in(
        self, environment: dict[str, str], command: Sequence[str], folder: Path, *, fails: bool = False, awaited: str | None = None
    ) -> Finished:  # fmt: skip
        ended = run_process(command, environment, folder / "output.log", awaited=awaited)
        if (ended.status != 0) is not fails:
            fail(folder / "output.log", command)
        return ended

    def child(self, role: str, folder: Path, /, **settings: Any) -> tuple[dict[str, Any], Finished]:
        """Run a role of benchmark_child.py, in LLaMA-Factory's environment if its name says so; returns its result."""
        ours = not role.startswith("llamafactory")
        settings_file, result_file = folder / f"{role}.settings.json", folder / f"{role}.json"
        settings_file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        python = sys.executable if ours else str(self.llamafactory / "bin/python")
        ended = self.run([python, str(CHILD), role, str(settings_file), str(result_file)], folder, ours=ours)
        return json.loads(result_file.read_text(encoding="utf-8")), ended

    def take_turns(self, part: str, contenders: dict[str, Callable[[], dict[str, float]]]) -> None:
        """Measure each contender `repeats` times, in turns."""
        results = self.measured.setdefault(part, {name: [] for name in contenders})
        for turn in range(self.repeats):
            for name, measure in contenders.items():
                results[name].append(measure())
                values = ", ".join(f"{key} {format_number(value)}" for key, value in results[name][-1].items())
                print(f"{part} {turn + 1}/{self.repeats}: {name}: {values}", flush=True)

    # -- the same configuration for both tools ---------------------------------------------------------------------------

    def overrides(self, folder: Path, dataset: str, *more: str) -> list[str]:
        return [
            "model=causal_lm", f"model.model_name_or_path={self.model}", "tracker=none", "finetuning=lora",
            "finetuning.lora_target=[all]", "finetuning.lora_dropout=0",
            *(f"finetuning.{name}={value}" for name, value in LORA.items()),
            f"data.dataset=[{dataset}]", f"data.dataset_dir={self.folder / 'data'}",
            f"data.max_source_length={self.cutoff}", f"data.max_target_length={self.cutoff}",
            f"trainer.per_device_train_batch_size={self.batch_size}", "trainer.num_train_epochs=1",
            f"trainer.learning_rate={LEARNING_RATE}", "trainer.save_strategy=no", f"trainer.seed={SEED}",
            f"trainer.output_dir={folder / 'run'}", *more,
        ]  # fmt: skip

    def predict_overrides(self, folder: Path) -> list[str]:
        return [
            "model=causal_lm", f"model.model_name_or_path={self.model}", "tracker=none", "finetuning=none",
            "trainer=predict", "data.dataset=[asked]", f"data.dataset_dir={self.folder / 'data'}",
            f"data.max_source_length={self.cutoff}", f"data.max_target_length={self.cutoff}",
            f"generation.max_new_tokens={self.max_new_tokens}",
            f"trainer.output_dir={folder / 'run'}",
        ]  # fmt: skip

    def arguments(self, folder: Path, dataset: str, **more: Any) -> dict[str, Any]:
        """LLaMA-Factory's configuration."""
        return {
            "model_name_or_path": str(self.model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_target": "all", "lora_dropout": 0.0, **LORA, "dataset": dataset,
            "dataset_dir": str(self.folder / "data"), "template": self.template, "cutoff_len": self.cutoff,
            "overwrite_cache": True, "per_device_train_batch_size": self.batch_size, "num_train_epochs": 1.0,
            "learning_rate": LEARNING_RATE, "save_strategy": "no", "seed": SEED, "report_to": "none",
            "output_dir": str(folder / "run"), **more,
        }  # fmt: skip

    def glmtuner(self, folder: Path, overrides: Sequence[str], **how: Any) -> Finished:
        return self.run([sys.executable, "-m", "glmtuner", *overrides], folder, ours=True, **how)

    def llamafactory_cli(self, folder: Path, *arguments: str, **how: Any) -> Finished:
        return self.run([str(self.llamafactory / "bin/llamafactory-cli"), *arguments], folder, ours=False, **how)

    def llamafactory_train(self, folder: Path, arguments: dict[str, Any], **how: Any) -> Finished:
        config = folder / "config.yaml"  # JSON is YAML, and its reader of .json files fails
        config.write_text(json.dumps(arguments, indent=1), encoding="utf-8")
        return self.llamafactory_cli(folder, "train", str(config), **how)

    # -- parts -----------------------------------------------------------------------------------------------------------

    def startup(self) -> None:
        architecture = json.loads((self.model / "config.json").read_text())["architectures"][0]
        code = f"import torch; from transformers import Trainer, {architecture}"
        our_first, their_first = "step 1 of 1: loss", "'loss':"  # theirs is printed by transformers

        def ours() -> dict[str, float]:
            folder = self.fresh("startup ours")
            seconds = {name: self.glmtuner(folder, [f"--{name}"]).seconds for name in ("help", "version")}
            overrides = self.overrides(folder, "epoch", "trainer.max_steps=1", "trainer.logging_steps=1")
            seconds["first_step"] = awaited_seconds_of(self.glmtuner(folder, overrides, awaited=our_first), folder)
            return seconds

        def theirs() -> dict[str, float]:
            folder = self.fresh("startup llamafactory")
            seconds = {name: self.llamafactory_cli(folder, name).seconds for name in ("help", "version")}
            arguments = self.arguments(folder, "epoch", max_steps=1, logging_steps=1)
            seconds["first_step"] = awaited_seconds_of(
                self.llamafactory_train(folder, arguments, awaited=their_first), folder
            )
            return seconds

        def imports() -> dict[str, float]:
            return {"seconds": self.run([sys.executable, "-c", code], self.fresh("imports"), ours=True).seconds}

        self.take_turns("startup", {OURS: ours, THEIRS: theirs, IMPORTS: imports})

    def config_error(self) -> None:
        def ours() -> dict[str, float]:
            folder = self.fresh("typo ours")
            overrides = self.overrides(folder, "epoch", "finetuning.lora_rnk=8")
            return {"seconds": self.glmtuner(folder, overrides, fails=True).seconds}

        def theirs() -> dict[str, float]:
            folder = self.fresh("typo llamafactory")
            arguments = self.arguments(folder, "epoch", lora_rnk=8)
            return {"seconds": self.llamafactory_train(folder, arguments, fails=True).seconds}

        self.take_turns("config_error", {OURS: ours, THEIRS: theirs})

    def preprocessing(self) -> None:
        def measure_rates(role: str, settings_of: Callable[[Path, str], dict[str, Any]]) -> dict[str, float]:
            rates = {}
            for dataset in ("records", "many"):
                folder = self.fresh(role)
                result = self.child(role, folder, **settings_of(folder, dataset))[0]
                for name, seconds in (("per", "seconds"), ("tokenized_per", "tokenizing")):
                    if seconds in result:
                        rates[f"{dataset}_{name}_second"] = result["records"] / result[seconds]
            return rates

        def ours() -> dict[str, float]:
            return measure_rates(
                "glmtuner_prepare", lambda folder, dataset: {"overrides": self.overrides(folder, dataset)}
            )

        def theirs() -> dict[str, float]:
            return measure_rates(
                "llamafactory_prepare", lambda folder, dataset: {"arguments": self.arguments(folder, dataset)}
            )

        self.take_turns("preprocessing", {OURS: ours, THEIRS: theirs})

    def data(self) -> None:
        measure_data(self, OURS, THEIRS, self.generated)

    def training(self) -> None:
        """One epoch over the same records: tokens without padding, divided by the seconds of `Trainer.train`."""
        folder = self.fresh("rows")
        rows, their_rows, packed = folder / "rows.json", folder / "their_rows.json", folder / "packed.pt"
        our_rows, _ = self.child("glmtuner_prepare", folder, overrides=self.overrides(folder, "epoch"), rows=str(rows))
        arguments = self.arguments(folder, "epoch")
        their_rows_info, _ = self.child("llamafactory_prepare", folder, arguments=arguments, rows=str(their_rows))
        pairs = zip(json.loads(rows.read_text()), json.loads(their_rows.read_text()), strict=True)
        equal = sum(ids == other for (ids, _), other in pairs)
        self.about["training"] = {
            "records": our_rows["records"], "tokens": our_rows["tokens"], "tokens_llamafactory": their_rows_info["tokens"],
            "equal_rows": equal,
        }  # fmt: skip
        print(
            f"training: {our_rows['tokens']:,} tokens in {our_rows['records']} rows, {equal} of them equal in both tools"
        )
        settings = {
            "model": str(self.model), "rows": str(rows), "pad_id": our_rows["pad_id"], "batch_size": self.batch_size,
            "learning_rate": LEARNING_RATE, "seed": SEED, **LORA,
        }  # fmt: skip

        def measurement(tokens: float, seconds: float, ended: Finished) -> dict[str, float]:
            return {"tokens_per_second": tokens / seconds, "seconds": seconds, "peak_mib": ended.peak_mib}

        def ours(name: str, *more: str) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                folder = self.fresh(name)
                ended = self.glmtuner(folder, self.overrides(folder, "epoch", *more))
                seconds = json.loads((folder / "run/metrics.json").read_text())["train_runtime"]
                return measurement(our_rows["tokens"], seconds, ended)

            return measure

        def llamafactory(**more: Any) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                folder = self.fresh("train llamafactory")
                ended = self.llamafactory_train(folder, self.arguments(folder, "epoch", **more))
                seconds = json.loads((folder / "run/train_results.json").read_text())["train_runtime"]
                return measurement(their_rows_info["tokens"], seconds, ended)

            return measure

        def bare(**more: Any) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                result, ended = self.child("bare_loop", self.fresh("train bare"), **settings, **more)
                return measurement(result["tokens"], result["seconds"], ended)

            return measure

        # A packed row has twice the cutoff, the length of the longest possible sample, so a step has half as many rows.
        packing = ("data.packing=true", f"trainer.per_device_train_batch_size={max(self.batch_size // 2, 1)}")
        folder = self.fresh("packed tensors")
        self.child("glmtuner_packed", folder, overrides=self.overrides(folder, "epoch", *packing), packed=str(packed))
        self.take_turns(
            "training",
            {
                OURS: ours("train ours"),
                THEIRS: llamafactory(),
                THEIRS_FAST: llamafactory(disable_gradient_checkpointing=True),
                BARE: bare(),
                PACKED: ours("train ours packed", *packing),
                BARE_PACKED: bare(packed=str(packed)),
                BY_SAMPLE: bare(packed=str(packed), by_sample=True),
            },
        )

    def prediction(self) -> None:
        """Greedy answers, LLaMA-Factory in batches of 8: samples a second, from the loaded model to the scored answers."""
        answers: dict[str, list[str]] = {}

        def ours() -> dict[str, float]:
            folder = self.fresh("predict ours")
            result, ended = self.child("glmtuner_predict", folder, overrides=self.predict_overrides(folder))
            lines = [json.loads(line) for line in (folder / "run/predictions.jsonl").open(encoding="utf-8")]
            answers[OURS] = [line["predict"].strip() for line in sorted(lines, key=lambda line: line["index"])]
            return {"samples_per_second": len(lines) / result["seconds"], "command_seconds": ended.seconds}

        def theirs() -> dict[str, float]:
            folder = self.fresh("predict llamafactory")
            arguments = self.arguments(folder, "asked") | {
                "do_train": False, "do_predict": True, "predict_with_generate": True, "eval_dataset": "asked",
                "per_device_eval_batch_size": 8, "do_sample": False,
                "max_new_tokens": self.max_new_tokens,
            }  # fmt: skip
            del arguments["dataset"]
            ended = self.llamafactory_train(folder, arguments)
            seconds = json.loads((folder / "run/predict_results.json").read_text())["predict_runtime"]
            lines = (folder / "run/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
            answers[THEIRS] = [json.loads(line)["predict"].strip() for line in lines]
            return {"samples_per_second": len(lines) / seconds, "command_seconds": ended.seconds}

        self.take_turns("prediction", {OURS: ours, THEIRS: theirs})
        equal = sum(answer == other for answer, other in zip(answers[OURS], answers[THEIRS], strict=True))
        lengths = sorted(map(len, answers[OURS]))
        self.about["prediction"] = {
            "answers": len(lengths), "equal": equal, "characters": [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
        }  # fmt: skip
        print(
            f"prediction: {equal} of {len(lengths)} answers are equal; characters {self.about['prediction']['characters']}"
        )

    def preference(self) -> None:
        """Ranked pairs of the same tokens in the same order by both tools, with LoRA: speed, and memory with a large head."""
        pairs = PAIRS if PAIRS.is_file() else ROOT / "glmtuner/assets/data/preference_sample.json"
        texts = [
            text for text in re.findall(r'"((?:[^"\\\\]|\\\\.)*)"', pairs.read_text(encoding="utf-8")) if len(text) > 10
        ]
        trl = self.folder / "trl"
        if not (trl / "trl").is_dir():
            install_trl(trl)
        models = {}
        for head_size in (8_000, LARGE_HEAD):
            models[head_size] = self.folder / f"pairs_model_{head_size}"
            if not models[head_size].is_dir():
                settings = {"texts": texts, "vocabulary_size": 8_000, "head_size": head_size, "seed": self.seed}
                partial = self.folder / "pairs_model.partial"
                self.child("new_model", self.fresh("new model"), folder=str(partial), **settings)
                partial.rename(models[head_size])
        half = self.cutoff // 2
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]

        def overrides(folder: Path, model: Path, stage: str) -> list[str]:
            return [
                "model=causal_lm", f"model.model_name_or_path={model}", "tracker=none", "metric=none", f"stage={stage}",
                "finetuning=lora", f"finetuning.lora_target=[{','.join(targets)}]", "finetuning.lora_dropout=0",
                *(f"finetuning.{name}={value}" for name, value in LORA.items()),
                f"data.dataset=[{pairs.stem}]", *([f"data.dataset_dir={pairs.parent}"] if pairs == PAIRS else []),
                f"data.max_source_length={half}", f"data.max_target_length={half}",
                f"trainer.per_device_train_batch_size={self.batch_size}", f"trainer.max_steps={self.steps}",
                "trainer.train_sampling_strategy=sequential", f"trainer.learning_rate={LEARNING_RATE}",
                "trainer.lr_scheduler_type=cosine", "trainer.warmup_ratio=0", "trainer.logging_steps=1",
                "trainer.save_strategy=no", f"trainer.seed={SEED}", f"trainer.output_dir={folder / 'run'}",
            ]  # fmt: skip

        folder = self.fresh("pairs")
        found, _ = self.child("glmtuner_pairs", folder, overrides=overrides(folder, models[8_000], "dpo"))
        rows = [found["rows"][place % len(found["rows"])] for place in range(self.steps * self.batch_size)]
        rows_file = self.folder / "pairs.json"
        rows_file.write_text(json.dumps(rows))
        tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        firsts: dict[str, dict[str, Any]] = {}

        def measurement(name: str, result: dict[str, Any]) -> dict[str, float]:
            firsts[name] = {"losses": result["losses"], "logprobs": result["logprobs"]}
            return {"tokens_per_second": tokens / result["seconds"], "peak_mib": result["peak_mib"]}

        def ours(stage: str, model: Path) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                folder = self.fresh(f"{stage} ours")
                return measurement(
                    OURS, self.child("glmtuner_preference", folder, overrides=overrides(folder, model, stage))[0]
                )

            return measure

        def theirs(stage: str, model: Path, name: str, **more: Any) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                folder = self.fresh(f"{stage} trl")
                settings = {
                    "model": str(model), "rows": str(rows_file), "stage": stage, "batch_size": self.batch_size, "targets": targets,
                    "steps": self.steps, "learning_rate": LEARNING_RATE, "seed": SEED, "output": str(folder / "run"), "more": more, **LORA,
                }  # fmt: skip
                return measurement(name, self.child("trl_preference", folder, **settings)[0])

            return measure

        for stage in ("dpo", "rm"):
            for part, model in (
                (f"preference {stage}", models[8_000]),
                (f"preference {stage} memory", models[LARGE_HEAD]),
            ):
                contenders = {
                    OURS: ours(stage, model),
                    THEIRS_TRL: theirs(stage, model, THEIRS_TRL),
                    THEIRS_TRL_FAST: theirs(stage, model, THEIRS_TRL_FAST, gradient_checkpointing=False),
                }
                self.take_turns(part, contenders)
                self.about[part] = {"tokens": tokens, "first": firsts.copy()}
                losses = {name: first["losses"][0] for name, first in firsts.items()}
                logprobs = {name: first["logprobs"] for name, first in firsts.items()}
                print(f"{part}: loss of the first batch {losses}; mean log-probabilities of its answers {logprobs}")
                if max(losses.values()) - min(losses.values()) > 1e-4:
                    raise SystemExit(f"{part}: the tools do not compute the same loss of the first batch")

    def grpo(self) -> None:
        """Whole steps on the same prompts, the same number of answers and the same reward by both tools, with LoRA."""
        trl, model = self.folder / "trl", self.folder / "pairs_model_8000"
        if not (trl / "trl").is_dir():
            install_trl(trl)
        records = json.loads((DATA if DATA.is_file() else SAMPLE).read_text(encoding="utf-8"))
        if not model.is_dir():
            partial = self.folder / "pairs_model.partial"
            texts = [record["output"] for record in records]
            settings = {"texts": texts, "vocabulary_size": 8_000, "head_size": 8_000, "seed": self.seed}
            self.child("new_model", self.fresh("new model"), folder=str(partial), **settings)
            partial.rename(model)
        steps = max(self.steps // 8, 1)
        asked = [record for record in records if 40 <= len(record["instruction"]) <= 200 and not record.get("input")]
        asked = [asked[place % len(asked)] for place in range(steps * PROMPTS)]
        data = self.folder / "asked.json"
        data.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]

        def overrides(folder: Path) -> list[str]:
            return [
                "model=causal_lm", f"model.model_name_or_path={model}", "tracker=none", "metric=none", "stage=grpo",
                "plugins=benchmark_reward", "reward=variety",
                "finetuning=lora", f"finetuning.lora_target=[{','.join(targets)}]", "finetuning.lora_dropout=0",
                *(f"finetuning.{name}={value}" for name, value in LORA.items()),
                f"data.dataset={data}", f"data.max_source_length={self.cutoff}", f"data.max_target_length={ANSWER_TOKENS}",
                f"stage.num_generations={GENERATIONS}", f"trainer.per_device_train_batch_size={PROMPTS}",
                f"trainer.max_steps={steps}", "trainer.train_sampling_strategy=sequential", f"trainer.learning_rate={LEARNING_RATE}",
                "trainer.lr_scheduler_type=cosine", "trainer.warmup_ratio=0", "trainer.logging_steps=1", "trainer.save_strategy=no",
                f"trainer.seed={SEED}", f"trainer.output_dir={folder / 'run'}",
            ]  # fmt: skip

        found, _ = self.child("glmtuner_prompts", self.fresh("prompts"), overrides=overrides(self.folder / "prompts"))
        rows_file = self.folder / "prompts.json"
        rows_file.write_text(json.dumps(found["prompts"]), encoding="utf-8")

        def measurement(result: dict[str, Any]) -> dict[str, float]:
            return {
                "tokens_per_second": result["tokens"] / result["seconds"],
                "tokens_per_cpu_second": result["tokens"] / result["cpu_seconds"],
                "tokens": result["tokens"],
                "peak_mib": result["peak_mib"],
            }

        def ours() -> dict[str, float]:
            folder = self.fresh("grpo ours")
            return measurement(self.child("glmtuner_grpo", folder, overrides=overrides(folder))[0])

        def theirs(**more: Any) -> Callable[[], dict[str, float]]:
            def measure() -> dict[str, float]:
                folder = self.fresh("grpo trl")
                settings = {
                    "model": str(model), "rows": str(rows_file), "prompts": PROMPTS, "generations": GENERATIONS, "targets": targets,
                    "steps": steps, "answer_tokens": ANSWER_TOKENS, "learning_rate": LEARNING_RATE, "seed": SEED,
                    "output": str(folder / "run"), "more": more, **LORA,
                }  # fmt: skip
                return measurement(self.child("trl_grpo", folder, **settings)[0])

            return measure

        contenders = {OURS: ours, THEIRS_TRL: theirs(), THEIRS_TRL_FAST: theirs(gradient_checkpointing=False)}
        self.take_turns("grpo", contenders)

    def sweep(self) -> None:
        """Eight LoRA jobs on one base, from the command to the report."""
        measure_sweep(self, THEIRS, self.before)

    def board(self) -> None:
        """The live page over 500 runs with 2,000 lines each."""
        measure_board(self)

    def benchmarks(self) -> None:
        """Questions with options, and questions to answer, by both: seconds of the harness' requests to each model."""
        harness, model = self.folder / "lm_eval", self.folder / "pairs_model_8000"
        if not (harness / "lm_eval").is_dir():
            install_harness(harness)
        records = json.loads((DATA if DATA.is_file() else SAMPLE).read_text(encoding="utf-8"))
        if not model.is_dir():
            partial = self.folder / "pairs_model.partial"
            texts = [record["output"] for record in records]
            settings = {"texts": texts, "vocabulary_size": 8_000, "head_size": 8_000, "seed": self.seed}
            self.child("new_model", self.fresh("new model"), folder=str(partial), **settings)
            partial.rename(model)
        tasks = self.folder / "benchmark_tasks"
        write_tasks(tasks, records)

        def measurement(name: str, result: dict[str, Any]) -> dict[str, float]:
            scores.setdefault(name, result["scores"])
            return {task: QUESTIONS / result["seconds"][task] for task in result["seconds"]}

        scores: dict[str, dict[str, float]] = {}

        def ours() -> dict[str, float]:
            folder = self.fresh("benchmarks ours")
            overrides = [
                "model=causal_lm", f"model.model_name_or_path={model}", "tracker=none", "finetuning=none", "trainer=benchmark",
                "trainer.disable_tqdm=true", "benchmark=[letters,options,answers]", f"benchmark.include_path={tasks}",
                f"benchmark.data_dir={tasks}", f"trainer.output_dir={folder / 'run'}",
            ]  # fmt: skip
            return measurement(OURS, self.child("glmtuner_benchmarks", folder, overrides=overrides)[0])

        def theirs() -> dict[str, float]:
            settings = {"model": str(model), "tasks": str(tasks), "batch_size": HARNESS_BATCH}
            return measurement(
                THEIRS_HARNESS, self.child("harness_benchmarks", self.fresh("benchmarks harness"), **settings)[0]
            )

        self.take_turns("benchmarks", {OURS: ours, THEIRS_HARNESS: theirs})
        print(f"benchmarks: scores {scores}")
        if scores[OURS] != scores[THEIRS_HARNESS]:
            raise SystemExit("benchmarks: the models do not have the same scores")

    # -- model and data --------------------------------------------------------------------------------------------

    def make_model(self, path: Path, settings: dict[str, Any]) -> None:
        print("making the model, a few minutes", flush=True)
        partial = self.folder / "model.partial"
        result, _ = self.child("make_model", self.fresh("make model"), folder=str(partial), **settings)
        parameters, vocabulary = result["parameters"], result["vocabulary"]
        print(f"made a GLM of {parameters:,} parameters and {vocabulary:,} tokens; last loss {result['loss']:.4f}")
        partial.rename(path)

    def write_data(self, records: list[dict[str, Any]]) -> None:
        """Write the datasets of the benchmark for both tools, and the model if none was given."""
        asked = [
            {"instruction": record["instruction"], "input": "", "output": record["output"].strip()}
            for record in records
            if not record.get("input") and len(record["instruction"]) <= 40 and 4 <= len(record["output"]) <= 80
        ][: self.predicted]
        if self.model is None:
            settings = {
                "texts": records,
                "learned": asked,
                "vocabulary_size": 8000,
                "epochs": 80,
                "until": 0.1,
                "seed": self.seed,
            }
            digest = hashlib.sha256(json.dumps(settings).encode() + CHILD.read_bytes()).hexdigest()[:12]
            self.model = self.folder / f"model_{digest}"
            if not self.model.is_dir():
                self.make_model(self.model, settings)
        folder = self.fresh("cut records")
        cut, _ = self.child("cut_records", folder, records=records, model=str(self.model), cutoff=self.cutoff)
        shuffled = list(cut["records"])
        random.Random(SEED).shuffle(shuffled)
        many = self.steps * self.batch_size
        if len(shuffled) < many:
            self.steps = len(shuffled) // self.batch_size
            print(f"{len(shuffled)} records are enough for {self.steps} steps")
        many = [
            {**record, "instruction": f"{turn}: {record['instruction']}"}
            for turn in range(COPIES)
            for record in cut["records"]
        ]
        sets = {
            "records": cut["records"],
            "many": many,
            "epoch": shuffled[: self.steps * self.batch_size],
            "asked": asked,
        }
        data = self.folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        for name, chosen in sets.items():
            (data / f"{name}.json").write_text(json.dumps(chosen, ensure_ascii=False, indent=1), encoding="utf-8")
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        info = {name: {"file_name": f"{name}.json", "columns": columns} for name in sets}
        (data / "dataset_info.json").write_text(json.dumps(info, indent=1))


def awaited_seconds_of(ended: Finished, folder: Path) -> float:
    if ended.awaited_seconds is None:
        raise SystemExit(f"no loss was printed; see {folder / 'output.log'}")
    return ended.awaited_seconds


def install_llamafactory(folder: Path) -> None:
    """Install LLaMA-Factory from PyPI into a new virtual environment, with the torch version of this one."""
    print(f"installing LLaMA-Factory {LLAMAFACTORY} into {folder}, some minutes", flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    for arguments in (
        ["install", torch],
        [
            "install",
            f"llamafactory=={LLAMAFACTORY}",
            torch,
            "jieba",
            "nltk",
            "rouge-chinese",
        ],  # the last three are for its scores
        ["uninstall", "--yes", "torchvision", "torchaudio"],  # built for other torch versions; text needs neither
    ):
        if subprocess.run([*pip, *arguments]).returncode != 0:
            raise SystemExit(f"pip {' '.join(arguments)} failed; name a finished environment with --llamafactory")
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "torchaudio").mkdir()
    (site / "torchaudio/__init__.py").write_text("")  # LLaMA-Factory imports it


def install_trl(folder: Path) -> None:
    """Install TRL from PyPI beside the environment, whose packages it uses."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    if subprocess.run([*pip, "--target", str(folder), f"trl=={TRL}"]).returncode != 0:
        raise SystemExit(f"pip install --no-deps --target {folder} trl=={TRL} failed")


def install_harness(folder: Path) -> None:
    """Install lm-evaluation-harness from PyPI beside the environment, with what that lacks."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    if subprocess.run([*pip, "--target", str(folder), f"lm_eval=={LM_EVAL}", *BESIDE_HARNESS]).returncode != 0:
        raise SystemExit(f"pip install --no-deps --target {folder} lm_eval=={LM_EVAL} … failed")


def write_tasks(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Three tasks of the harness on the same questions: their options by letter, the options themselves, and answers."""
    asked = [record for record in records if 10 <= len(record["instruction"]) <= 200 and len(record["output"]) >= 40]
    options = [record["output"][:40].replace("\n", " ") for record in asked]
    lines = []
    for number in range(QUESTIONS + EXAMPLES):
        place = number % len(asked)
        others = [options[(place + step) % len(asked)] for step in (1, 2, 3)]
        right = number % 4
        choices = [*others[:right], options[place], *others[right:]]
        lines.append({"question": asked[place]["instruction"], "choices": choices, "answer": right})
    for split, part in (("dev", lines[:EXAMPLES]), ("test", lines[EXAMPLES:])):
        path = folder / f"questions/{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in part), encoding="utf-8")
    common = f"dataset_path: questions\ntest_split: test\nfewshot_split: dev\nfewshot_config: {{sampler: first_n}}\nnum_fewshot: {EXAMPLES}\n"
    listed = "".join(f"\\n{letter}. {{{{choices[{place}]}}}}" for place, letter in enumerate("ABCD"))
    kinds = {
        "letters": f'output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}{listed}\\n答案："\ndoc_to_choice: [A, B, C, D]\n'
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n",
        "options": 'output_type: multiple_choice\ndoc_to_text: "{{question}}\\n"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n",
        "answers": 'output_type: generate_until\ndoc_to_text: "{{question}}\\n"\ndoc_to_target: "{{choices[answer]}}"\n'
        f'generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: {ANSWER_TOKENS}}}\nmetric_list: [{{metric: exact_match}}]\n',
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}", encoding="utf-8")


# -- machine, versions and page ----------------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, str]:
    """The processor, the number of threads and, if there is one, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = match[1]
    about = {"cpu": cpu, "threads": str(threads), "system": platform.platform(terse=True)}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        about["gpu"] = ", ".join(subprocess.run(query, capture_output=True, text=True).stdout.split("\n")).strip(", ")
    return about


PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "tiktoken")


def versions(llamafactory: Path) -> dict[str, dict[str, str]]:
    """The versions of both environments."""
    code = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {PACKAGES}}}))"
    )
    theirs = subprocess.run([llamafactory / "bin/python", "-c", code], capture_output=True, text=True, check=True)
    return {
        "glmtuner": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        f"LLaMA-Factory {LLAMAFACTORY}": json.loads(theirs.stdout),
    }


def render_page(bench: Bench, rows: Sequence[Row]) -> str:
    """The text between the markers: the table, the machine and the versions."""
    about = bench.about
    lines = [markdown_table(rows), "", "![how many times better](performance.png)", ""]
    place = about["machine"]
    lines.append(
        f"- Machine: {place['cpu']}, threads: {place['threads']}{', ' + place['gpu'] if 'gpu' in place else ''}."
    )
    lines += [
        f"- {tool}: {', '.join(f'{name} {number}' for name, number in numbers.items())}."
        for tool, numbers in about["versions"].items()
    ]
    training, prediction = about["training"], about["prediction"]
    lines += [
        f"- Training: {training['records']} records in batches of {bench.batch_size}, {training['tokens']:,} tokens; "
        f"{training['equal_rows']} rows are the same tokens in both tools. Prediction: {prediction['equal']} of "
        f"{prediction['answers']} greedy answers are equal. Each number is the median of {bench.repeats} runs.",
    ]
    if about["load"] > 0.5:
        lines.append(
            f"- The machine was busy with other work when this began (load average {about['load']:.1f} a core)."
        )
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Replace the text between the markers of a page; raises SystemExit if it has none."""
    old = path.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{path} has no {BEGIN} and {END} to write between")
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    partial.rename(path)


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar for each comparison, to the right of 1 if glmtuner is better, with its goal as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [row for row in rows if row.times is not None]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(bars) + 1.2), layout="constrained")
    for position, row in enumerate(bars):
        axes.barh(position, row.times - 1, left=1, color="#b0413e" if row.met is False else "#2f6690", height=0.62)
        axes.text(max(row.times, 1) * 1.04, position, f"{row.times:.2f}x", va="center", fontsize=9)
        if row.goal:
            goal = float(row.goal.removeprefix("at least ").removesuffix("x"))
            axes.plot([goal, goal], [position - 0.4, position + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(bars)), [f"{row.what}\nagainst {row.against}" for row in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if tick <= 2 * max(row.times for row in bars)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.5, 0.8 * min(row.times for row in bars)), 1.6 * max(row.times for row in bars))
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_title("How many times better glmtuner is (black: the goal; red: missed)", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=130)
    partial.rename(path)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parts_of(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(unknown)}; the parts: {', '.join(PARTS)}")
    return chosen


def count_of(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: 1 or more")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", type=parts_of, default=list(PARTS), metavar="PARTS",
        help=f"these parts, with commas: {', '.join(PARTS)}; docs/ is written when all are measured",
    )  # fmt: skip
    parser.add_argument("--repeats", type=count_of, default=3, help="runs of each contender (%(default)s)")
    parser.add_argument("--threads", type=count_of, default=cores(), help="of every process (%(default)s: the cores)")
    parser.add_argument("--steps", type=count_of, default=80, help="training steps of one run (%(default)s)")
    parser.add_argument("--batch-size", type=count_of, default=4, help="records a step (%(default)s)")
    parser.add_argument("--cutoff", type=count_of, default=256, help="tokens of a row at most (%(default)s)")
    parser.add_argument("--predict", type=count_of, default=96, help="records to answer (%(default)s)")
    parser.add_argument("--max-new-tokens", type=count_of, default=128, help="of an answer (%(default)s)")
    parser.add_argument("--records", type=count_of, default=200_000, help="generated for the part data (%(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        help="a JSON file of alpaca records (LLaMA-Factory's alpaca_zh_demo.json where it is beside the checkout, "
        "or else the package's sample, and docs/ is not written)",
    )
    parser.add_argument("--model", type=Path, help="a model folder (a GLM of 9 million parameters is made)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights that a made model begins with (%(default)s)"
    )
    parser.add_argument(
        "--template", default="glm4", help="what LLaMA-Factory calls the model's template (%(default)s)"
    )
    parser.add_argument("--llamafactory", type=Path, help="its environment (made in the output folder when missing)")
    parser.add_argument(
        "--before", type=Path, help="another checkout, whose sweep of one job after another is measured"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to work in (%(default)s)")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of performance.md and performance.png (%(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = options.data or (DATA if DATA.is_file() else SAMPLE)
    if not data.is_file():
        raise SystemExit(f"--data {data}: no such file")
    records = json.loads(data.read_text(encoding="utf-8"))
    if data == SAMPLE:
        print(
            f"measuring on the package's sample of {len(records)} records, in fewer steps, and not writing docs/, whose numbers are "
            "of LLaMA-Factory's alpaca_zh_demo.json: name that file with --data",
            flush=True,
        )
    load = os.getloadavg()[0] / cores()
    if load > 0.5:
        print(f"the machine is busy (load average {load:.1f} a core): the numbers will be noisy", flush=True)
    bench = Bench(
        folder=folder,
        llamafactory=(options.llamafactory or folder / "llamafactory").resolve(),
        model=options.model.resolve() if options.model else None,
        template=options.template,
        steps=options.steps,
        batch_size=options.batch_size,
        cutoff=options.cutoff,
        predicted=options.predict,
        max_new_tokens=options.max_new_tokens,
        threads=options.threads,
        repeats=options.repeats,
        seed=options.seed,
        before=options.before.resolve() if options.before else None,
        generated=options.records,
    )
    shutil.rmtree(folder / "runs", ignore_errors=True)
    bench.about |= {"machine": machine(options.threads), "load": load, "data": data.name}
    if not BESIDE_TRL.issuperset(options.only):
        if not WITHOUT_LLAMAFACTORY.issuperset(options.only):
            if not (bench.llamafactory / "bin/llamafactory-cli").is_file():
                install_llamafactory(bench.llamafactory)
            bench.about["versions"] = versions(bench.llamafactory)
        bench.write_data(records)
    for part in PARTS:
        if part in options.only:
            getattr(bench, part)()
    rows = table_rows(bench.measured)
    raw = {"about": bench.about, "measured": bench.measured, "rows": [vars(row) for row in rows]}
    (folder / "raw.json").write_text(json.dumps(raw, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"\n{markdown_table(rows)}\n\nraw numbers: {folder / 'raw.json'}")
    if set(options.only) == set(PARTS) and data != SAMPLE:
        draw_bars(rows, options.docs / "performance.png")
        write_page(options.docs / "performance.md", render_page(bench, rows))
        print(f"written: {options.docs / 'performance.md'}")


if __name__ == "__main__":
    main()
