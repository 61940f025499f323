"""The part `board` of benchmark.py: the first page over hundreds of runs, and what changed since, beside TensorBoard and trackio.

All three get the same numbers of the same runs in their own files, and are asked for them by HTTP as their own pages do. Data of the
others are written by their own code: `benchmark_board.py tensorboard|trackio FOLDER RUNS LINES` in a process each.
"""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BOARD, TENSORBOARD, TRACKIO = "glmtuner board", "TensorBoard", "trackio"
RUNS, LINES, TOUCHED = 500, 2000, 10
SWEEPS = 10
GOALS = {"first": 2.0, "update": 0.5, "memory": 500.0}
NAMES = ("loss", "grad_norm", "learning_rate")
TRACKIO_VERSION = "0.43.0"
PATIENCE = 300.0  # seconds for an answer


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


# -- the same numbers for the others ---------------------------------------------------------------------------------------


def write_events(folder: Path, runs: int, lines: int, first: int = 0) -> None:
    """Event files of TensorBoard; with `first`, what is appended from that line on."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for run in range(runs):
        writer = EventFileWriter(str(folder / f"run-{run:03}"), max_queue_size=100_000, flush_secs=600)
        for place, line in enumerate(numbers(run, lines)):
            if place >= first:
                values = [Summary.Value(tag=name, simple_value=line[name]) for name in NAMES]
                writer.add_event(Event(step=int(line["step"]), wall_time=1.7e9 + place, summary=Summary(value=values)))
        writer.close()


def write_database(runs: int, lines: int, first: int = 0) -> None:
    """trackio's database in TRACKIO_DIR; with `first`, what is appended from that line on."""
    from trackio.sqlite_storage import SQLiteStorage

    for run in range(runs):
        logged = [line for place, line in enumerate(numbers(run, lines)) if place >= first]
        SQLiteStorage.bulk_log(
            "project", f"run-{run:03}", [{name: line[name] for name in NAMES} for line in logged],
            steps=[int(line["step"]) for line in logged], timestamps=[f"2026-01-01T00:00:00.{place:06}" for place in range(first, first + len(logged))],
            run_id=f"id-{run:03}",
        )  # fmt: skip


# -- servers ---------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running server; it is ended with its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=log.parent
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def ask(url: str, body: Any = None, kind: str = "application/json") -> Any:
    """The JSON of the answer; None while there is none."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={} if data is None else {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())
    except OSError:
        return None


def wait(found: Callable[[], bool], began: float, what: str) -> float:
    """The seconds since `began` until something is found, which is tried again and again."""
    while not found():
        if time.perf_counter() - began > PATIENCE:
            raise SystemExit(f"{what} did not come within {PATIENCE:.0f} s")
        time.sleep(0.02)
    return time.perf_counter() - began


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = act()
    return time.perf_counter() - began, found


def tree(pid: int) -> list[int]:
    """The process and its children, as they are now."""
    import psutil

    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def memory_mib(pids: list[int]) -> float:
    """The proportional memory of the processes: what they share counts once."""
    import psutil

    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids if psutil.pid_exists(pid)) / 2**20


def cpu_seconds(pid: int) -> float:
    import psutil

    times = [psutil.Process(each).cpu_times() for each in tree(pid)]
    return sum(each.user + each.system for each in times)


# -- what is measured ------------------------------------------------------------------------------------------------------


def by_board(bench: Any, data: Path, runs: int, lines: int) -> dict[str, float]:
    """Our board: its first table, the table again, the curves of 20 runs, a change of ten of them."""
    folder = bench.fresh("board")
    port = free_port()
    command = [sys.executable, "-m", "glmtuner", "board", str(data), "--port", str(port), "--no-token"]
    base = f"http://127.0.0.1:{port}/api"
    began = time.perf_counter()
    with server(command, bench.environment(ours=True), folder / "output.log") as process:
        answers: list[dict[str, Any]] = []

        def table() -> bool:
            found = ask(f"{base}/runs")
            answers.extend([found] if found else [])
            return bool(found)

        first = wait(table, began, "the table of runs")
        cpu = cpu_seconds(process.pid)
        assert len(answers[-1]["rows"]) == runs, len(answers[-1]["rows"])
        ids = [row["id"] for row in answers[-1]["rows"]]
        again, _ = timed(lambda: ask(f"{base}/runs"))
        query = urllib.parse.urlencode([*(("id", id) for id in ids[:20]), ("metric", "loss"), ("points", str(lines))])
        curves, drawn = timed(lambda: ask(f"{base}/curves?{query}"))
        assert len(drawn["series"]) == 20 and len(drawn["series"][0]["x"]) == lines
        time.sleep(1.2)
        version = ask(f"{base}/runs")["version"]
        touched = [id for id, row in zip(ids, answers[-1]["rows"], strict=True) if row["state"] != "finished"][:TOUCHED]
        time.sleep(1.2)  # the board looks at the disk once a second
        for id in touched:
            with (data / id / "history.jsonl").open("a") as file:
                file.write(json.dumps({"step": lines * 10 + 10, "epoch": 3.0, "loss": 0.123}) + "\n")
        update, changed = timed(lambda: ask(f"{base}/runs?since={version}"))
        assert {row["id"] for row in changed["rows"] if row["loss"] == 0.123} == {*touched}
        return {
            "first": first, "cpu": cpu, "again": again, "curves": curves, "update": update,
            "memory": memory_mib(tree(process.pid)), "own_memory": memory_mib([process.pid]),
        }  # fmt: skip


def by_tensorboard(bench: Any, data: Path, runs: int, lines: int) -> dict[str, float]:
    """TensorBoard: until it knows all runs, which it reads in the background, its answers, and until it has read a change."""
    folder = bench.fresh("tensorboard")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(data),
        "--port",
        str(port),
        "--samples_per_plugin",
        f"scalars={lines}",
        "--reload_interval",
        "1",
    ]
    base = f"http://127.0.0.1:{port}/data/plugin/scalars"
    step = lines * 10 + 10
    began = time.perf_counter()
    with server(command, bench.environment(ours=True), folder / "output.log") as process:

        def names() -> dict[str, Any]:
            return ask(f"{base}/tags") or {}

        def curve(run: str) -> list[list[float]]:
            return ask(f"{base}/scalars?{urllib.parse.urlencode({'run': run, 'tag': 'loss'})}") or []

        first = wait(lambda: len(names()) == runs, began, "TensorBoard's list of runs")
        last = f"run-{runs - 1:03}"
        whole = wait(lambda: bool(curve(last)) and curve(last)[-1][1] == lines * 10, began, "TensorBoard's last curve")
        cpu = cpu_seconds(process.pid)
        again, _ = timed(names)
        chosen = [f"run-{run:03}" for run in range(20)]
        curves, drawn = timed(lambda: [curve(run) for run in chosen])
        assert all(len(each) == lines for each in drawn), [len(each) for each in drawn]
        subprocess.run(
            [sys.executable, __file__, "tensorboard", str(data), str(TOUCHED), str(lines + 1), str(lines)], check=True
        )
        update = wait(
            lambda: all(curve(f"run-{run:03}")[-1][1] == step for run in range(TOUCHED)),
            time.perf_counter(),
            "TensorBoard's update",
        )
        return {
            "first": first,
            "whole": whole,
            "cpu": cpu,
            "again": again,
            "curves": curves,
            "update": update,
            "memory": memory_mib(tree(process.pid)),
        }


def by_trackio(bench: Any, data: Path, runs: int, lines: int) -> dict[str, float]:
    """trackio: until it answers with all runs and what its page shows of them, its answers, and a change."""
    folder = bench.fresh("trackio")
    port = free_port()
    environment = trackio_environment(bench, data)
    command = [
        sys.executable,
        "-c",
        f"import trackio; trackio.show('project', open_browser=False, host='127.0.0.1', server_port={port}, block_thread=True)",
    ]
    base = f"http://127.0.0.1:{port}/api"
    began = time.perf_counter()
    with server(command, environment, folder / "output.log") as process:

        def runs_of() -> list[dict[str, Any]]:
            return (ask(f"{base}/get_runs_for_project", {"project": "project"}) or {}).get("data") or []

        def logs(chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return (
                ask(f"{base}/get_logs_batch", {"project": "project", "runs": chosen, "scalar_only": True}) or {}
            ).get("data") or []

        first = wait(lambda: len(runs_of()) == runs, began, "trackio's list of runs")
        cpu = cpu_seconds(process.pid)
        again, known = timed(runs_of)
        chosen = [{"run": run["name"], "run_id": run["id"]} for run in known[:20]]
        curves, drawn = timed(lambda: logs(chosen))
        assert len(drawn) == 20 and len(drawn[0]["logs"]) == lines, (len(drawn), len(drawn[0]["logs"]))
        subprocess.run(
            [sys.executable, __file__, "trackio", str(data), str(TOUCHED), str(lines + 1), str(lines)],
            check=True,
            env=environment,
        )
        touched = [{"run": f"run-{run:03}", "run_id": f"id-{run:03}"} for run in range(TOUCHED)]
        update = wait(
            lambda: all(each["logs"][-1]["step"] == lines * 10 + 10 for each in logs(touched)),
            time.perf_counter(),
            "trackio's update",
        )
        return {
            "first": first,
            "cpu": cpu,
            "again": again,
            "curves": curves,
            "update": update,
            "memory": memory_mib(tree(process.pid)),
        }


def trackio_environment(bench: Any, data: Path) -> dict[str, str]:
    """The variables of its processes: its own packages before those of the environment, its database in the folder."""
    variables = bench.environment(ours=False)
    return variables | {
        "PYTHONPATH": str(bench.folder / "trackio"),
        "TRACKIO_DIR": str(data),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def measure(bench: Any) -> None:
    """Write the data of all three, and measure them in turns."""
    beside = bench.folder / "trackio"
    if not beside.is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            "install",
            "--target",
            str(beside),
        ]
        if subprocess.run([*pip, f"trackio=={TRACKIO_VERSION}"]).returncode != 0:
            raise SystemExit(f"pip install --target {beside} trackio=={TRACKIO_VERSION} failed")
    root = bench.fresh("board data")
    where = {name: root / name for name in ("runs", "events", "trackio")}
    for path in where.values():
        path.mkdir()
    text = subprocess.run(
        [sys.executable, "-m", "glmtuner", "model=tiny_glm", "data.dataset=belle_sample", "--cfg", "job", "--resolve"],
        env=bench.environment(ours=True), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    make_runs(where["runs"], text, RUNS, LINES)
    size = [str(RUNS), str(LINES)]
    subprocess.run([sys.executable, __file__, "tensorboard", str(where["events"]), *size], check=True)
    subprocess.run(
        [sys.executable, __file__, "trackio", str(where["trackio"]), *size],
        check=True,
        env=trackio_environment(bench, where["trackio"]),
    )
    print(f"board: {RUNS} runs with {LINES:,} lines each are written", flush=True)

    def copied(name: str) -> Path:
        """The data as they were before anything was appended."""
        path = bench.fresh(f"{name} copy") / name
        shutil.copytree(where[name], path)
        return path

    bench.take_turns(
        "board",
        {
            BOARD: lambda: by_board(bench, copied("runs"), RUNS, LINES),
            TENSORBOARD: lambda: by_tensorboard(bench, copied("events"), RUNS, LINES),
            TRACKIO: lambda: by_trackio(bench, copied("trackio"), RUNS, LINES),
        },
    )


if __name__ == "__main__":
    role, place, *sizes = sys.argv[1:]
    if role == "tensorboard":
        write_events(Path(place), *map(int, sizes))
    else:
        write_database(*map(int, sizes))
