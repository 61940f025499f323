"""Check and measure every GPU path of glmtuner in one command of nine minutes; docs/gpu.md explains each figure.

Each part runs in its own process with its own time limit, and every finding is written at once, so that a part that fails,
hangs or is killed does not stop the others. Nothing is downloaded: models get random weights on the GPU.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from gpu_parts.record import Check, Finding, append, read  # noqa: E402

SHARED = ROOT.parent / "shared"
FOLDER = ROOT / "outputs/gpu_check"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
MINUTES = 9.0
IMPORTS_S = 90.0  # time limit for a part's imports, which are slow the first time on a machine


@dataclass(frozen=True)
class Part:
    """A part of the check and its share of the time; concurrent ones measure no speed and run together, first."""

    title: str
    seconds: float
    concurrent: bool


PARTS = {
    "right": Part("Right", 100, concurrent=True),
    "kernels": Part("The kernels", 120, concurrent=True),
    "whole": Part("Whole", 120, concurrent=True),
    "ranks": Part("Ranks", 120, concurrent=True),
    "fast": Part("Fast", 150, concurrent=False),
    "small": Part("Small", 90, concurrent=False),
    "estimated": Part("Estimated", 45, concurrent=False),
    "answers": Part("Answers", 75, concurrent=False),
    "sweep": Part("Sweep", 60, concurrent=False),
}
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger_kernel")


# -- a part, in a process of its own -------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> None:
    """Import and prepare, print `ready`, read a number of seconds from standard input, and run for that time."""
    import gc

    from glmtuner.launch.libraries import load_libraries

    runner = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output goes to the log: the runner reads only `ready`
    load_libraries(compiles=True, trains=True)
    import torch

    on_gpu = not options.cpu_rehearsal
    part = importlib.import_module(f"gpu_parts.{name}")
    check = Check(
        part=name, path=options.output / "findings" / f"{name}.jsonl", folder=options.output / "work" / name,
        shared=options.shared, device=torch.device("cuda" if on_gpu else "cpu"), miniature=options.cpu_rehearsal,
        match=options.match,
    )  # fmt: skip
    gc.collect()
    gc.freeze()
    if hasattr(part, "prepare"):
        part.prepare(check)
    print("ready", file=runner, flush=True)
    os.environ["GLMTUNER_CACHE"] = str(check.folder / "cache")
    seconds = float(sys.stdin.readline())
    check.until = time.monotonic() + seconds
    part.run(check)


@dataclass
class Child:
    """The process of a part."""

    name: str
    process: "subprocess.Popen[str]"
    log: IO[str]
    until: float = 0.0


def start_child(name: str, options: argparse.Namespace) -> Child:
    """Start the process of a part, which imports its libraries and waits."""
    log = (options.output / "logs" / f"{name}.log").open("w", encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--output", str(options.output)]
    command += ["--cpu-rehearsal"] if options.cpu_rehearsal else []
    command += ["--match", options.match] if options.match else []
    command += ["--shared", str(options.shared)] if options.shared else []
    threads = {"OMP_NUM_THREADS": "1"} if options.cpu_rehearsal else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", **threads}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    return Child(name, process, log)


def release_child(child: Child, seconds: float) -> None:
    """Let a part run for `seconds` from when it is ready; one that is not ready within IMPORTS_S does not run."""
    assert child.process.stdout is not None and child.process.stdin is not None
    readable, _, _ = select.select([child.process.stdout], [], [], IMPORTS_S)
    if not (readable and child.process.stdout.readline()):
        return  # `wait_for_child` reports why
    child.until = time.monotonic() + seconds
    with contextlib.suppress(BrokenPipeError):
        child.process.stdin.write(f"{seconds}\n")
        child.process.stdin.flush()


def wait_for_child(child: Child, options: argparse.Namespace) -> None:
    """Wait until a part ends or its time is over; a part that failed or was killed becomes a finding."""
    path = options.output / "findings" / f"{child.name}.jsonl"
    try:
        code = child.process.wait(max(child.until - time.monotonic(), 1.0))
        problem = f"its process ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = "its time was over" if child.until else f"it was not ready within {IMPORTS_S:g} s"
    kill_child(child)
    if problem:
        log = (options.output / "logs" / f"{child.name}.log").read_text(encoding="utf-8", errors="replace")
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        note = f"{problem}; the log ends: {last.strip()[:200]}"
        append(path, Finding(part=child.name, what="the whole part", goal="runs to its end", met=False, note=note))


def kill_child(child: Child) -> None:
    """Kill a part with all its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    child.log.close()


# -- all of them ---------------------------------------------------------------------------------------------------------


def run_parts(names: Sequence[str], options: argparse.Namespace) -> None:
    """Run the concurrent parts together, then the others one after the other, within the time of all.

    A part gets its share of the remaining time, so that the others can use what it leaves.
    """
    deadline = time.monotonic() + 60 * options.minutes
    children = {name: start_child(name, options) for name in names}
    groups = groups_of(names)
    try:
        for index, group in enumerate(groups):
            planned = sum(group_seconds(remaining_group) for remaining_group in groups[index:])
            for name in group:
                seconds_left = deadline - time.monotonic()
                release_child(children[name], max(seconds_left * PARTS[name].seconds / planned, 1.0))
            for name in group:
                wait_for_child(children[name], options)
                print(f"{PARTS[name].title}: {summary(findings_of([name], options.output))}", flush=True)
    finally:
        for child in children.values():
            if child.process.poll() is None:
                kill_child(child)


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """The parts in groups that run at the same time, in order."""
    concurrent = [name for name in names if PARTS[name].concurrent]
    return [group for group in (concurrent, *([name] for name in names if name not in concurrent)) if group]


def group_seconds(group: Sequence[str]) -> float:
    return max(PARTS[name].seconds for name in group)


def findings_of(names: Sequence[str], output: Path) -> list[Finding]:
    return [finding for name in names for finding in read(output / "findings" / f"{name}.jsonl")]


def merge_findings(contents: Sequence[dict[str, Any]]) -> tuple[dict[str, str], list[Finding]]:
    """The machine of the last check, and the findings of all; a later one replaces an earlier one unless it was skipped."""
    by_key: dict[tuple[str, str], Finding] = {}
    for content in contents:
        for values in content["findings"]:
            finding = Finding(**values)
            key = (finding.part, finding.what)
            if key not in by_key or finding.value is not None or finding.met is not None:
                by_key[key] = finding
    return contents[-1]["about"], list(by_key.values())


def summary(findings: Sequence[Finding]) -> str:
    met, missed = (
        sum(finding.met is True for finding in findings),
        [finding.what for finding in findings if finding.met is False],
    )
    text = f"{len(findings)} findings, {met} goals met"
    return f"{text}, {len(missed)} missed ({'; '.join(missed)})" if missed else text


# -- the page of findings -------------------------------------------------------------------------------------------


def machine(on_gpu: bool) -> dict[str, str]:
    """The GPU, its driver and the versions; torch is not asked, since it would allocate GPU memory."""
    about = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if on_gpu and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        if lines:
            about["gpu"], about["driver"], about["memory"] = (value.strip() for value in lines[0].split(","))
    for name in PACKAGES:
        try:
            about[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return about


def format_number(value: float | None) -> str:
    """A number with its significant digits."""
    if value is None:
        return ""
    magnitude = abs(value)
    if magnitude >= 100 or (value == int(value) and magnitude < 1e6):
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}" if magnitude >= 0.1 else f"{value:.2g}"


def render_page(about: dict[str, str], findings: Sequence[Finding]) -> str:
    """The text between the markers: machine, driver and versions, and a table for each part."""
    gpu = f"{about.get('gpu', 'no GPU')} ({about.get('memory', '?')}), driver {about.get('driver', '?')}"
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", *PACKAGES) if name in about)
    lines = [f"{gpu}; {versions}; {about['date']}.", ""]
    for name, part in PARTS.items():
        rows = [finding for finding in findings if finding.part == name]
        if not rows:
            continue
        lines += [
            f"### {part.title}",
            "",
            "| what | measured | beside it | goal | met | note |",
            "|---|--:|---|---|---|---|",
        ]
        for finding in rows:
            value = f"{format_number(finding.value)} {finding.unit}".strip() if finding.value is not None else ""
            beside = (
                f"{format_number(finding.beside)} ({finding.against})"
                if finding.beside is not None
                else finding.against
            )
            met = {True: "yes", False: "**no**", None: ""}[finding.met]
            cells = (finding.what, value, beside, finding.goal, met, finding.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def write_page(path: Path, text: str) -> None:
    """Replace the text between the markers of a page; raises SystemExit if it has none."""
    old = path.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{path} has no {BEGIN} and {END} to write between")
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    partial.rename(path)


# -- the command line ----------------------------------------------------------------------------------------------------


def parts_of(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(unknown)}; the parts: {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def pattern_of(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression: {error}") from None
    return text


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", type=parts_of, default=list(PARTS), metavar="PARTS", help=f"these, with commas: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--match",
        type=pattern_of,
        default="",
        help="of these parts, only the measurements that match this regular expression",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts together (%(default)g)")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="every part in miniature, on the CPU")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to work in (%(default)s)")
    parser.add_argument(
        "--shared",
        type=Path,
        default=SHARED if SHARED.is_dir() else None,
        help="folder with goldens/ and data/ (%(default)s)",
    )
    parser.add_argument(
        "--page", type=Path, help="write the tables between the markers of this page (docs/performance.md)"
    )
    parser.add_argument(
        "--from", type=Path, nargs="+", dest="sources", metavar="JSON", help="measure nothing: the tables of these "
        "gpu_check.json of one machine, where a later one's findings take the place of an earlier one's",
    )  # fmt: skip
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.output = options.output.resolve()
    options.shared = options.shared.resolve() if options.shared else None
    return options


def main() -> int:
    options = parse()
    if options.part:
        run_part(options.part, options)
        return 0
    if options.sources:
        about, findings = merge_findings([json.loads(path.read_text(encoding="utf-8")) for path in options.sources])
    else:
        if not options.cpu_rehearsal and not shutil.which("nvidia-smi"):
            raise SystemExit(
                "no NVIDIA GPU found (nvidia-smi is missing); type --cpu-rehearsal to try every part on the CPU"
            )
        shutil.rmtree(options.output, ignore_errors=True)
        for name in ("findings", "logs", "work"):
            (options.output / name).mkdir(parents=True)
        about = machine(not options.cpu_rehearsal)
        run_parts(options.only, options)
        findings = findings_of(options.only, options.output)
        content = {"about": about, "findings": [vars(finding) for finding in findings]}
        (options.output / "gpu_check.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        shutil.rmtree(options.output / "work", ignore_errors=True)
    text = render_page(about, findings)
    print(text)
    if options.page:
        write_page(options.page, text)
    return 1 if any(finding.met is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
