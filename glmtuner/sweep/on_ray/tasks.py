"""The jobs of a sweep as tasks of Ray: submitted, watched, started again after a node was lost, and stopped with a checkpoint."""

import os
import secrets
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import glmtuner
from glmtuner.config.compose import Composed
from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.distributed.pause import VARIABLE
from glmtuner.distributed.preemption import SIGNALS, Preempted, SignalCapture, capture_signals
from glmtuner.errors import CheckpointError, ConfigError, TrainingError
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, step_of
from glmtuner.run_folder.files import read_object, write_text
from glmtuner.run_folder.lost import FOLDER, Lost, add_lost
from glmtuner.run_folder.names import FAILED, LOCK, OUTPUT
from glmtuner.sweep.budget import hours_in, reached
from glmtuner.sweep.job import Job, JobFailed, check_exit, objective_values, recorded_outcome
from glmtuner.sweep.on_ray import node as on_node
from glmtuner.sweep.on_ray.cluster import Node, alive_nodes, unplaceable
from glmtuner.sweep.on_ray.options import KEY, RayOptions
from glmtuner.sweep.placeholders import reveal

POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0  # between two looks at the nodes and the budget
ANSWER_SECONDS = 90.0  # in which a node must have said whether it sees the sweep
LOST_SECONDS = 30.0  # from a node's death until its task counts as lost, whether Ray has noticed or not
ROOM_SECONDS = 60.0  # for which no node may have room for a job that waits
RESULT_SECONDS = 15.0  # from a job's end until what it has written on another machine must be visible
AGAIN_SECONDS = 5.0  # after which a task that was cancelled, and goes on, is cancelled again


@dataclass
class Task:
    """A job for Ray: its place among those that were launched, what it asks of a node, and what it has come to."""

    place: int
    job: Job
    demand: dict[str, float]
    values: list[float] | None = None
    attempt: int = 0
    shown: bool = False  # whether it was said where this attempt runs
    lost: int = 0  # how often this command has lost its node
    dead_since: float | None = None  # of its node

    @property
    def name(self) -> str:
        return self.job.folder.path.name


@dataclass
class Tasks:
    """The tasks of a sweep in the folder `root`."""

    root: Path
    options: RayOptions
    unusable: dict[str, str] = field(default_factory=dict)  # nodes by Ray's id, and why

    def __post_init__(self) -> None:
        (self.root / FOLDER / "places").mkdir(parents=True, exist_ok=True)
        self.marker = self.root / FOLDER / f"seen-{secrets.token_hex(8)}"
        self.queue: deque[Task] = deque()
        self.running: dict[Any, Task] = {}  # by Ray's reference
        self.no_room_since: float | None = None
        self.stopping = False

    @property
    def messages(self) -> Path:
        """The file of what Ray itself says."""
        return self.root / FOLDER / "messages.log"

    def run(self, tasks: Sequence[Task]) -> Preempted | None:
        """Run the tasks until all have ended; returns the signal that has stopped them, if one did. Ctrl-C stops them, and is raised."""
        import ray
        import ray.cloudpickle

        ray.cloudpickle.register_pickle_by_value(on_node)
        self.queue.extend(tasks)
        write_text(self.marker, "a node that sees this file sees the sweep\n")
        try:
            with capture_signals() as capture:
                try:
                    self._look_at(tasks)
                    self._work(capture)
                except KeyboardInterrupt:
                    self._stop("stopped")
                    raise
                if capture.signum is None:
                    return None
                self._stop(f"stopped by {signal.Signals(capture.signum).name}")
                return Preempted.by(capture.signum, 0)
        finally:
            self.marker.unlink(missing_ok=True)

    def _work(self, capture: SignalCapture) -> None:
        """Submit and conclude tasks until none is left, or a signal was captured."""
        import ray

        looked = time.monotonic()
        while (self.queue or self.running) and capture.signum is None:
            most = self.options.max_parallel
            while self.queue and (most is None or len(self.running) < most):
                self._submit(self.queue.popleft())
            ready, _ = ray.wait([*self.running], timeout=POLL_SECONDS)
            for task in self.running.values():
                self._say_where(task)
            for reference in ready:
                self._conclude(reference)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if not self._goes_on():
                    return

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _look_at(self, tasks: Sequence[Task]) -> None:
        """Ask each node that could run a job whether it sees the sweep; those that do not are avoided, which is said."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in alive_nodes() if any(node.fits(task.demand) for task in tasks)]
        asked = self._asked(tasks[0])
        look = ray.remote(on_node.look)
        answers = {
            look.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                runtime_env=self.options.runtime_env or None,
            ).remote(asked): node
            for node in nodes
        }
        ready, late = ray.wait([*answers], num_returns=len(answers), timeout=ANSWER_SECONDS)
        for reference in ready:
            try:
                self._avoid(answers[reference], ray.get(reference)["problem"])
            except ray.exceptions.RayError as error:
                self._avoid(answers[reference], in_words(error))
        for reference in late:
            ray.cancel(reference, force=True)
            self._avoid(answers[reference], f"it has not answered within {ANSWER_SECONDS:g} s")
        if len(self.unusable) == len(nodes):
            reasons = "; ".join(dict.fromkeys(self.unusable.values()))
            raise ConfigError(
                f"hydra/launcher=ray: no node of the cluster can run the jobs: {reasons}; put the sweep where all nodes see it, such as "
                "hydra.sweep.dir=/shared/sweep, and type the command from a folder that they share"
            )

    def _avoid(self, node: Node, problem: str | None) -> None:
        if problem is not None and node.id not in self.unusable:
            self.unusable[node.id] = problem
            say(f"hydra/launcher=ray: the node {node.host} ({node.id[:8]}) is not used: {problem}")

    def _usable(self) -> list[Node]:
        return [node for node in alive_nodes() if node.id not in self.unusable]

    def _goes_on(self) -> bool:
        """Look after what Ray does not: lost nodes, jobs that no node has room for, and the budget; returns whether to go on."""
        import ray

        nodes, now = alive_nodes(), time.monotonic()
        alive = {node.id for node in nodes}
        for reference, task in [*self.running.items()]:
            place = self._place(task)
            if place is None or place["node"] in alive:
                task.dead_since = None
                continue
            task.dead_since = task.dead_since or now
            if now - task.dead_since > LOST_SECONDS:
                with suppress(Exception):
                    ray.cancel(reference, force=True)
                del self.running[reference]
                self._start_again(task, "its node has died")
        waiting = [task for task in self.running.values() if self._place(task) is None]
        usable = self._usable()
        hopeless = [task for task in waiting if unplaceable(task.demand, usable) is not None]
        self.no_room_since = (self.no_room_since or now) if hopeless else None
        if hopeless and self.no_room_since is not None and now - self.no_room_since > ROOM_SECONDS:
            for reference, task in [*self.running.items()]:
                if task in hopeless:
                    ray.cancel(reference, force=True)
                    del self.running[reference]
                    say(
                        f"not started: {task.job.folder.path}: {unplaceable(task.demand, usable)}; the same command goes on"
                    )
            self.no_room_since = None
        over = self._over()
        if over:
            self._stop("; ".join(over))
        return not over

    def _over(self) -> list[str]:
        """The limits of the budget that are reached."""
        first = next(iter([*self.running.values(), *self.queue]), None)
        return reached(self.root, first.job.composed.run.budget) if first is not None else []

    # -- one task ---------------------------------------------------------------------------------------------------

    def _asked(self, task: Task) -> dict[str, Any]:
        """What a node is told of the job."""
        job = task.job
        folder = job.folder.path.absolute()
        overrides = [reveal(override) for override in job.typed]
        with hours_in(self.root), job.environment():
            environment = dict(os.environ)
        _, _, _, *arguments = ranks.command_of(job.composed.flags, overrides, folder)  # without `python -m glmtuner`
        limit = self.options.timeout_min
        return {
            "arguments": arguments,
            "env": environment,
            "env_vars": dict(self.options.runtime_env.get("env_vars") or {}),
            "gpus": task.demand.get("GPU", 0.0),
            "cwd": os.getcwd(),
            "version": glmtuner.__version__,
            "marker": str(self.marker),
            "log": str(folder / OUTPUT),
            "lock": str(folder / LOCK),
            "place": str(self._place_file(task)),
            "attempt": task.attempt,
            "limit_s": None if limit is None else limit * 60,
            "grace_s": self.options.grace_s,
        }

    def _place_file(self, task: Task) -> Path:
        return self.root / FOLDER / "places" / f"{task.name}.json"

    def _place(self, task: Task) -> dict[str, Any] | None:
        """Where this attempt runs; None before it does."""
        try:
            place = read_object(self._place_file(task))
        except CheckpointError:
            return None
        return place if place.get("attempt") == task.attempt else None

    def _submit(self, task: Task) -> None:
        import ray

        (self._place_file(task)).unlink(missing_ok=True)
        (task.job.folder / FAILED).unlink(missing_ok=True)
        task.job.folder.path.mkdir(parents=True, exist_ok=True)
        task.attempt, task.shown, task.dead_since = task.attempt + 1, False, None
        demand = dict(task.demand)
        selector = {"ray.io/node-id": f"!in({','.join(self.unusable)})"} if self.unusable else None
        run = ray.remote(on_node.run_job).options(
            name=f"glmtuner {task.name}",
            num_cpus=demand.pop("CPU", 0),
            num_gpus=demand.pop("GPU", 0),
            memory=demand.pop("memory", None),
            resources=demand or None,
            max_retries=0,
            label_selector=selector,
            runtime_env=self.options.runtime_env or None,
        )
        self.running[run.remote(self._asked(task))] = task

    def _say_where(self, task: Task) -> None:
        if not task.shown and (place := self._place(task)) is not None:
            task.shown = True
            again = f", attempt {task.attempt}" if task.attempt > 1 else ""
            say(f"job {task.job.number} on {place['host']}{again}: {task.job.folder.path}")

    def _conclude(self, reference: Any) -> None:
        """Take up what has come of a task that Ray has ended."""
        import ray

        task = self.running.pop(reference)
        try:
            end = ray.get(reference)
        except ray.exceptions.TaskCancelledError:
            return
        except ray.exceptions.RayTaskError as error:
            self._fail(task, TrainingError(f"Ray could not run the job: {in_words(error)}"))
            return
        except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.TaskUnschedulableError) as error:
            self._fail(task, ConfigError(f"{KEY}.runtime_env={self.options.runtime_env}: {in_words(error)}"))
            return
        except ray.exceptions.RayError as error:
            self._start_again(task, in_words(error))
            return
        if problem := end.get("problem"):  # of a node that has joined since the others were asked
            self._avoid(Node(end["node"], end["host"], {}), problem)
            if unplaceable(task.demand, self._usable()) is None:
                self.queue.appendleft(task)
            else:
                self._fail(task, ConfigError(f"hydra/launcher=ray: no node that is left can run the job: {problem}"))
            return
        with task.job.environment():
            task.values = recorded_outcome(task.job, lambda composed: self._values(task, composed, end))

    def _values(self, task: Task, composed: Composed, end: dict[str, Any]) -> list[float] | None:
        """The objectives of a job whose process has ended; raises JobFailed if it has failed."""
        job, code = task.job, int(end["code"])
        was_asked = code in [*(-signum for signum in SIGNALS), *(128 + signum for signum in SIGNALS)]
        if end["stopped"] and (was_asked or code == -signal.SIGKILL):
            what = (
                f"{KEY}.timeout_min={self.options.timeout_min} is reached" if end["stopped"] == "limit" else "stopped"
            )
            how = "" if was_asked else f", and killed after {KEY}.grace_s={self.options.grace_s}"
            say(f"{job.folder.path}: {what}{how}; the same command resumes it from step {step_at(job)}")
            raise JobFailed
        check_exit(code, job.folder, [reveal(override) for override in job.typed])
        until = time.monotonic() + (RESULT_SECONDS if self.options.address and VARIABLE not in job.env_set else 0)
        while not (metrics := job.folder.metrics()) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return objective_values(metrics, composed.run.objective) if metrics else None

    def _start_again(self, task: Task, why: str) -> None:
        """Put a job back whose node was lost, or record that it was lost too often."""
        place = self._place(task)
        starts_over = task.job.composed.run.trainer.overwrite_output_dir
        host, step = place["host"] if place else "an unknown node", 0 if starts_over else step_at(task.job)
        add_lost(self.root, task.name, Lost(host, datetime.now().astimezone().isoformat(timespec="seconds"), why, step))
        task.lost += 1
        lost = f"{task.job.folder.path}: lost with its node {host} ({why})"
        if task.lost > self.options.max_retries:
            self._fail(
                task,
                TrainingError(
                    f"lost with its node {task.lost} times, the last time {host} ({why}), and {KEY}.max_retries={self.options.max_retries}; "
                    f"the same command resumes it from step {step}"
                ),
            )
            return
        if self.stopping:
            say(f"{lost}; the same command resumes it from step {step}")
            return
        say(f"{lost}; it starts again from step {step}")
        self.queue.appendleft(task)

    def _fail(self, task: Task, error: Exception) -> None:
        def fail(composed: Composed) -> None:
            raise error

        with task.job.environment():
            recorded_outcome(task.job, fail)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        """Cancel all tasks, and wait until the running ones have saved their checkpoints; a second Ctrl-C does not wait."""
        import ray

        waiting, self.stopping = len(self.queue), True
        self.queue.clear()
        count = Counter(self._place(task) is not None for task in self.running.values())
        idle = waiting + count[False]
        say(f"{why}: {count[True]} running jobs save a checkpoint" + (f", {idle} are not started" if idle else ""))
        until, again = time.monotonic() + self.options.grace_s + AGAIN_SECONDS, 0.0
        try:
            while self.running and time.monotonic() < until:
                if time.monotonic() >= again:
                    again = time.monotonic() + AGAIN_SECONDS
                    for reference in self.running:
                        ray.cancel(reference)
                ready, _ = ray.wait([*self.running], timeout=POLL_SECONDS)
                for reference in ready:
                    self._conclude(reference)
        finally:
            for reference in self.running:
                with suppress(Exception):
                    ray.cancel(reference, force=True)
            self.running.clear()


def step_at(job: Job) -> int:
    """The step of the job's latest checkpoint; 0 without one."""
    checkpoint, _ = latest_complete_checkpoint(job.folder.path)
    return step_of(checkpoint) if checkpoint else 0


def in_words(error: BaseException) -> str:
    """The error of Ray's in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
