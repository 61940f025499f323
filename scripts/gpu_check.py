"""Prove and measure every GPU path of glmtuner in one command of eight minutes; docs/gpu.md says what each figure means.

Each part runs in a process of its own with a time limit of its own, and what it finds is written as it is found, so that a part
that fails, hangs or is killed stops no other. Nothing is downloaded: models have random weights, drawn on the GPU.
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
MINUTES = 8.0
IMPORTS_S = 90.0  # a part may take this long to import its libraries, the first time on a machine


@dataclass(frozen=True)
class Part:
    """A part of the check and its share of the minutes; those that time nothing run together, at the start."""

    title: str
    seconds: float
    together: bool


PARTS = {
    "right": Part("Right", 100, together=True),
    "kernels": Part("The kernels", 120, together=True),
    "whole": Part("Whole", 120, together=True),
    "fast": Part("Fast", 150, together=False),
    "small": Part("Small", 90, together=False),
    "estimated": Part("Estimated", 45, together=False),
    "answers": Part("Answers", 75, together=False),
}
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger_kernel")


# -- a part, in a process of its own -------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> None:
    """Import what it needs and prepare, say `ready`, and run when told to, for as many seconds as told."""
    import gc

    from glmtuner.launch.libraries import load_libraries

    runner = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the log: the runner hears one word
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


def started(name: str, options: argparse.Namespace) -> Child:
    """Its process, importing."""
    log = (options.output / "logs" / f"{name}.log").open("w", encoding="utf-8")
    words = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--output", str(options.output)]
    words += ["--cpu-rehearsal"] if options.cpu_rehearsal else []
    words += ["--match", options.match] if options.match else []
    words += ["--shared", str(options.shared)] if options.shared else []
    threads = {"OMP_NUM_THREADS": "1"} if options.cpu_rehearsal else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", **threads}
    process = subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    return Child(name, process, log)


def go(child: Child, seconds: float) -> None:
    """Let it run for so long, from when it is ready; one that is not ready in IMPORTS_S has no time."""
    assert child.process.stdout is not None and child.process.stdin is not None
    heard, _, _ = select.select([child.process.stdout], [], [], IMPORTS_S)
    if not (heard and child.process.stdout.readline()):
        return  # `ended` tells why
    child.until = time.monotonic() + seconds
    with contextlib.suppress(BrokenPipeError):
        child.process.stdin.write(f"{seconds}\n")
        child.process.stdin.flush()


def ended(child: Child, options: argparse.Namespace) -> None:
    """Wait until it has, or its time is over; a part that did not end well is a finding."""
    path = options.output / "findings" / f"{child.name}.jsonl"
    try:
        code = child.process.wait(max(child.until - time.monotonic(), 1.0))
        why = f"its process ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        why = "its time was over" if child.until else f"it was not ready within {IMPORTS_S:g} s"
    end(child)
    if why:
        log = (options.output / "logs" / f"{child.name}.log").read_text(encoding="utf-8", errors="replace")
        last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
        note = f"{why}; the log ends: {last.strip()[:200]}"
        append(path, Finding(part=child.name, what="the whole part", goal="runs to its end", met=False, note=note))


def end(child: Child) -> None:
    """Kill it, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    child.log.close()


# -- all of them ---------------------------------------------------------------------------------------------------------


def run_parts(names: Sequence[str], options: argparse.Namespace) -> None:
    """Those that time nothing together, then the others one after the other, within all the minutes.

    A part has its share of the minutes that are left, so that what one does not need is the others'.
    """
    deadline = time.monotonic() + 60 * options.minutes
    children = {name: started(name, options) for name in names}
    groups = groups_of(names)
    try:
        for place, group in enumerate(groups):
            planned = sum(longest(later) for later in groups[place:])
            for name in group:
                left = deadline - time.monotonic()
                go(children[name], max(left * PARTS[name].seconds / planned, 1.0))
            for name in group:
                ended(children[name], options)
                print(f"{PARTS[name].title}: {summary(findings_of([name], options.output))}", flush=True)
    finally:
        for child in children.values():
            if child.process.poll() is None:
                end(child)


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """The parts that run at the same time, group by group."""
    together = [name for name in names if PARTS[name].together]
    return [group for group in (together, *([name] for name in names if name not in together)) if group]


def longest(group: Sequence[str]) -> float:
    return max(PARTS[name].seconds for name in group)


def findings_of(names: Sequence[str], output: Path) -> list[Finding]:
    return [finding for name in names for finding in read(output / "findings" / f"{name}.jsonl")]


def merged(contents: Sequence[dict[str, Any]]) -> tuple[dict[str, str], list[Finding]]:
    """The machine of the last check, and the findings of all; one that was left out takes no other's place."""
    found: dict[tuple[str, str], Finding] = {}
    for content in contents:
        for values in content["findings"]:
            finding = Finding(**values)
            key = (finding.part, finding.what)
            if key not in found or finding.value is not None or finding.met is not None:
                found[key] = finding
    return contents[-1]["about"], list(found.values())


def summary(findings: Sequence[Finding]) -> str:
    met, missed = sum(it.met is True for it in findings), [it.what for it in findings if it.met is False]
    told = f"{len(findings)} findings, {met} goals met"
    return f"{told}, {len(missed)} missed ({'; '.join(missed)})" if missed else told


# -- what was found, on a page -------------------------------------------------------------------------------------------


def machine(on_gpu: bool) -> dict[str, str]:
    """The GPU, its driver and the versions, without asking torch, which would take a share of the GPU's memory."""
    about = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if on_gpu and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
        if listed:
            about["gpu"], about["driver"], about["memory"] = (value.strip() for value in listed[0].split(","))
    for name in PACKAGES:
        try:
            about[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return about


def shown(value: float | None) -> str:
    """A number with the digits that count."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 100 or (value == int(value) and size < 1e6):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def page(about: dict[str, str], findings: Sequence[Finding]) -> str:
    """What stands between the markers: machine, driver and versions, and a table a part."""
    place = f"{about.get('gpu', 'no GPU')} ({about.get('memory', '?')}), driver {about.get('driver', '?')}"
    versions = ", ".join(f"{name} {about[name]}" for name in ("python", *PACKAGES) if name in about)
    lines = [f"{place}; {versions}; {about['date']}.", ""]
    for name, part in PARTS.items():
        mine = [finding for finding in findings if finding.part == name]
        if not mine:
            continue
        lines += [
            f"### {part.title}",
            "",
            "| what | measured | beside it | goal | met | note |",
            "|---|--:|---|---|---|---|",
        ]
        for it in mine:
            value = f"{shown(it.value)} {it.unit}".strip() if it.value is not None else ""
            beside = f"{shown(it.beside)} ({it.against})" if it.beside is not None else it.against
            met = {True: "yes", False: "**no**", None: ""}[it.met]
            cells = (it.what, value, beside, it.goal, met, it.note)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def write_page(path: Path, text: str) -> None:
    """Replace what stands between the markers; raises SystemExit when the page has none."""
    whole = path.read_text(encoding="utf-8")
    if BEGIN not in whole or END not in whole:
        raise SystemExit(f"{path} has no {BEGIN} and {END} to write between")
    before, after = whole.partition(BEGIN)[0], whole.partition(END)[2]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    partial.rename(path)


# -- the command line ----------------------------------------------------------------------------------------------------


def parts_of(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in chosen if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(wrong)}; the parts: {', '.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def pattern_of(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from None
    return text


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", type=parts_of, default=list(PARTS), metavar="PARTS", help=f"these, with commas: {', '.join(PARTS)}"
    )
    parser.add_argument("--match", type=pattern_of, default="", help="of these parts, what a regular expression finds")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for everything (%(default)g), shared out among the parts"
    )
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
        about, findings = merged([json.loads(path.read_text(encoding="utf-8")) for path in options.sources])
    else:
        if not options.cpu_rehearsal and not shutil.which("nvidia-smi"):
            raise SystemExit(
                "no NVIDIA GPU here (there is no nvidia-smi); type --cpu-rehearsal to try every part on the CPU"
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
    text = page(about, findings)
    print(text)
    if options.page:
        write_page(options.page, text)
    return 1 if any(finding.met is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
