"""Stopping runs and sweeps with a checkpoint: SIGTERM to the process that holds the lock, or through SLURM."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from glmtuner.board.begun import Say, Task, Tasks
from glmtuner.board.processes import holder, is_glmtuner, is_in_worker, is_own, sweep_command_above, verified
from glmtuner.board.root import Root
from glmtuner.board.starts import Starts, sweep_of
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint
from glmtuner.run_folder.folder import RunFolder, job_folders
from glmtuner.run_folder.names import LOCK, SWEEP
from glmtuner.sweep.queue import RUNNING, in_queue
from glmtuner.sweep.submissions import read_submissions

SECONDS = 900.0  # in which a run must have ended after the signal; what it does is told meanwhile
AGAIN_SECONDS = 10.0  # SLURM's jobs ignore a signal before their training has begun


class Stops:
    """Stops what is running, after its process was found to be this user's and a glmtuner."""

    def __init__(self, root: Root, starts: Starts, tasks: Tasks) -> None:
        self.root, self.starts, self.tasks = root, starts, tasks

    def stop(self, name: str) -> Task:
        """Stop the run or sweep with this id; what happens until it has ended is the task's lines. Raises CheckpointError."""
        if any(task.what == "stop" for task in self.tasks.running(name)):
            raise CheckpointError(f"{name} is being stopped already")
        if (swept := sweep_of(self.root, name)) is not None:
            return self._stop_sweep(name, swept)
        begun = self._begun(name)
        try:
            folder = self.root.run(name)
        except CheckpointError:
            if not begun:
                raise
            return self.tasks.thread("stop", lambda say: end_child(begun[0], say), about=name)
        sweep = folder.path.parent
        submitted = read_submissions(sweep).get(folder.path.name) if (sweep / SWEEP).is_file() else None
        if submitted is not None and in_queue([submitted.id]):
            return self.tasks.thread("stop", lambda say: stop_in_slurm({submitted.id: folder}, say), about=name)
        if not folder.is_running:
            if begun:
                return self.tasks.thread("stop", lambda say: end_child(begun[0], say), about=name)
            raise CheckpointError(f"{name} is not running, so that there is nothing to stop")
        process = self._holder(folder, name)
        if sweep_command_above(process) is not None and not is_in_worker(process):
            raise CheckpointError(
                f"{name} runs in the process of its sweep, with which it would end; stop the sweep {self.root.id_of(sweep)}, which is continued later"
            )
        return self.tasks.thread("stop", lambda say: end_run(folder, process, say), about=name)

    def _begun(self, name: str) -> list[Task]:
        """What this board has started or continued there, and has not ended."""
        return [task for task in self.tasks.running(name) if task.what in ("start", "continue")]

    def _holder(self, folder: RunFolder, name: str) -> psutil.Process:
        process = holder(folder / LOCK)
        if process is None:
            raise CheckpointError(
                f"{name} is locked by no process of this machine that this user can see: it runs on another one, or in another "
                "container; stop it there (kill -TERM), or by its scheduler"
            )
        return verified(process, name)

    def _stop_sweep(self, name: str, folder: Path) -> Task:
        submitted = read_submissions(folder)
        queued = in_queue(each.id for each in submitted.values()) if submitted else {}
        if queued is None:
            raise CheckpointError(
                f"{name}: squeue does not answer, so that SLURM's jobs of this sweep cannot be stopped from here"
            )
        command = self.starts.sweep_process(folder)
        jobs = [job for job in job_folders(folder) if job.is_running]
        begun = self._begun(name)
        if command is None and begun and begun[0].process is not None:
            with suppress(psutil.Error):
                command = psutil.Process(begun[0].process.pid)
        if not queued and command is None:
            if not jobs:
                raise CheckpointError(f"{name} is not running, so that there is nothing to stop")
            command = self._holder(jobs[0], self.root.id_of(jobs[0].path))
        if command is not None:
            verified(command, name)

        def work(say: Say) -> int:
            code = 0
            if command is not None:
                code = end_sweep(folder, command, say)
            if queued:
                ids = {each.id: RunFolder(folder / job) for job, each in submitted.items() if each.id in queued}
                code = max(code, stop_in_slurm(ids, say))
            return code

        return self.tasks.thread("stop", work, about=name)


def end_child(task: Task, say: Say) -> int:
    """End a child that has no run yet: it has nothing to lose."""
    assert task.process is not None
    say(f"SIGTERM to process {task.process.pid}, which has not begun to train")
    task.process.terminate()
    task.ended.wait(SECONDS)
    say("it has ended")
    return 0


def end_run(folder: RunFolder, process: psutil.Process, say: Say) -> int:
    """Send SIGTERM to the run's process and wait until it has ended; the code is 1 if it has not in time."""
    terminate(process, say)
    return waited(lambda: folder.is_running, [folder], say)


def end_sweep(sweep: Path, command: psutil.Process, say: Say) -> int:
    """Send SIGTERM to the sweep's command and to what it has started, so that running jobs save checkpoints and no other starts."""
    started: list[psutil.Process] = []
    with suppress(psutil.Error):
        started = command.children(recursive=True)
    running = [job for job in job_folders(sweep) if job.is_running]
    terminate(command, say)
    signalled = {command.pid}
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        locked = [job for job in job_folders(sweep) if job.is_running]
        running += [job for job in locked if job.path not in {each.path for each in running}]
        holders = [found for job in locked if (found := holder(job / LOCK)) is not None]
        for process in holders:
            if process.pid not in signalled and is_own(process) and is_glmtuner(process):
                terminate(process, say)
                signalled.add(process.pid)
        if not locked:
            # processes for further jobs, which wait for a command that has ended
            left = [process for process in started if alive(process)]
            for process in left:
                with suppress(psutil.Error):
                    process.terminate()
            if not left and not alive(command):
                break
        time.sleep(0.5)
    return waited(lambda: alive(command) or any(job.is_running for job in running), running, say)


def stop_in_slurm(jobs: dict[str, RunFolder], say: Say) -> int:
    """Cancel SLURM's jobs that wait, and send SIGTERM to those that run, until they have left the queue."""
    until = time.monotonic() + SECONDS
    told: dict[str, str] = {}
    while time.monotonic() < until:
        queued = in_queue(jobs)
        if queued is None:
            say("squeue does not answer")
            return 1
        if not queued:
            break
        for number, each in queued.items():
            command = ["scancel", *(["--signal=TERM"] if each.state == RUNNING else []), number]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            if told.get(number) != each.state or done.returncode:
                say(f"{' '.join(command)}{f': {done.stderr.strip()}' if done.returncode else ''}")
            told[number] = each.state
        ends = time.monotonic() + AGAIN_SECONDS
        while time.monotonic() < ends and in_queue(jobs):
            time.sleep(1.0)
    return waited(lambda: bool(in_queue(jobs)), [*jobs.values()], say)


def terminate(process: psutil.Process, say: Say) -> None:
    """Send SIGTERM to the process, unless it has ended: psutil compares its start time, too."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        say(f"SIGTERM to process {process.pid}")


def alive(process: psutil.Process) -> bool:
    """Whether the process has not ended."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def waited(is_running: Callable[[], bool], folders: list[RunFolder], say: Say) -> int:
    """Wait until nothing runs, and say from which checkpoint each run goes on; the code is 1 if something still runs."""
    until = time.monotonic() + SECONDS
    while is_running():
        if time.monotonic() > until:
            say(f"it has not ended within {SECONDS:g} s; its log says what it does")
            return 1
        time.sleep(0.2)
    for folder in folders:
        checkpoint, _ = latest_complete_checkpoint(folder.path)
        label = folder.path.name
        if folder.is_finished:
            say(f"{label}: it had finished")
        elif checkpoint is None:
            say(f"{label}: stopped before its first checkpoint; continued, it starts anew")
        else:
            say(f"{label}: stopped, and continued from {checkpoint.name}")
    return 0
