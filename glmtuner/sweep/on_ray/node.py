"""What Ray executes on a node for a job of a sweep: a process of its own, which is watched, stopped and outlived by nothing.

Ray gets this module by value, so that also a node without glmtuner can say that it has none. It therefore imports nothing of
glmtuner, and nothing that is not of Python.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
VISIBLE_SECONDS = 15.0  # until a file that another machine has written is seen on a shared disk
UNLOCKED_SECONDS = 60.0  # until the process of an earlier attempt, whose node was lost, has ended
VERSION = "import glmtuner; print(glmtuner.__version__)"
PARENT = "GLMTUNER_WORKER_PARENT"  # as in glmtuner/cli/worker.py
HOSTS_OWN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HOSTNAME",
             "XDG_RUNTIME_DIR", "TMPDIR", "DISPLAY")  # fmt: skip
HOSTS_OWN_PREFIXES = ("RAY_", "SSH_")


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """The name of this node, and why it cannot run the sweep's jobs, if it cannot."""
    return {"host": socket.gethostname(), "problem": problem(asked)}


def problem(asked: dict[str, Any]) -> str | None:
    """Why this node cannot run the sweep's jobs: it does not see the files, or has another glmtuner; else None."""
    marker = Path(asked["marker"])
    end = time.monotonic() + VISIBLE_SECONDS
    while not marker.is_file():
        if time.monotonic() > end:
            return f"it does not see the sweep's folder {marker.parent.parent}, which all nodes must share"
        time.sleep(POLL_SECONDS)
    if not Path(asked["cwd"]).is_dir():
        return f"it does not see the folder {asked['cwd']}, in which the command was typed"
    found = subprocess.run(
        [sys.executable, "-c", VERSION],
        cwd=asked["cwd"],
        env=environment(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        return f"its {sys.executable} has no glmtuner ({(found.stderr.strip().splitlines() or ['?'])[-1][:200]})"
    if found.stdout.strip() != asked["version"]:
        return f"it has glmtuner {found.stdout.strip()}, and this machine {asked['version']}"
    return None


def environment(asked: dict[str, Any]) -> dict[str, str]:
    """The environment of a job: that of the command, but for what a machine has of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    typed = {
        name: value
        for name, value in asked["env"].items()
        if name not in HOSTS_OWN and not name.startswith(HOSTS_OWN_PREFIXES)
    }
    nothing_visible = {} if asked["gpus"] else {"CUDA_VISIBLE_DEVICES": ""}
    return {**own, **typed, **nothing_visible, **asked["env_vars"]}


def run_job(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the job; returns its exit code (negative for the signal that killed it) and why it was stopped, or this node's problem.

    Ray cancels a task as Ctrl-C would, by SIGINT's handler; the job then saves a checkpoint.
    """
    cancelled: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: cancelled.append(signum))
    try:
        host = socket.gethostname()
        if (wrong := problem(asked)) is not None:
            return {"host": host, "node": node_id(), "problem": wrong}
        wait_for_lock(Path(asked["lock"]), cancelled)
        if cancelled:
            return {"host": host, "code": 128 + signal.SIGTERM, "stopped": "cancelled"}
        code, stopped = watched(start(asked), asked, cancelled)
        return {"host": host, "code": code, "stopped": stopped}
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_lock(lock: Path, cancelled: list[int]) -> None:
    """Wait while a process of an earlier attempt still has the run's folder."""
    import fcntl

    end = time.monotonic() + UNLOCKED_SECONDS
    while lock.is_file() and time.monotonic() < end and not cancelled:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            except OSError:  # a disk without locks
                return


def start(asked: dict[str, Any]) -> "subprocess.Popen[str]":
    """The job's process, which ends with this one, and the file that says where it runs."""
    # in a session of its own: a Ctrl-C in the terminal of a local Ray reaches the command alone, which stops the jobs in order
    with Path(asked["log"]).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "glmtuner.cli.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            cwd=asked["cwd"],
            env={**environment(asked), PARENT: str(os.getpid())},
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died, as its log and exit code will tell
        process.stdin.write(json.dumps({"arguments": asked["arguments"], "log": asked["log"]}) + "\n")
        process.stdin.close()
    place = Path(asked["place"])
    partial = place.with_name(f".{place.name}.{process.pid}")
    partial.write_text(
        json.dumps(
            {
                "host": socket.gethostname(),
                "node": node_id(),
                "pid": process.pid,
                "attempt": asked["attempt"],
                "started": time.time(),
            }
        ),
        encoding="utf-8",
    )
    partial.replace(place)
    return process


def node_id() -> str:
    """Ray's id of this node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def watched(process: "subprocess.Popen[str]", asked: dict[str, Any], cancelled: list[int]) -> tuple[int, str]:
    """The job's exit code, and why it was asked to stop: it was `cancelled`, its time `limit` was reached, or not at all.

    One that has not saved its checkpoint in time after that is killed.
    """
    began, stopped, deadline = time.monotonic(), "", 0.0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        over = asked["limit_s"] is not None and now - began > asked["limit_s"]
        if not stopped and (cancelled or over):
            stopped, deadline = "cancelled" if cancelled else "limit", now + asked["grace_s"]
            process.terminate()
        elif stopped and now > deadline:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    answer = process.stdout.read().strip()
    process.stdout.close()
    return int(answer) if answer else process.returncode, stopped
