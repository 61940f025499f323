"""Several trainings in one process, in lock step: each is a thread, and of all threads one runs at a time.

A training that hands in a part of a step that all compute together waits there, and the next one runs; when all wait, the main
thread computes it. What a process has once, such as random states, each training finds as it left it.
"""

import contextvars
import ctypes
import gc
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

from glmtuner.distributed import accelerator
from glmtuner.distributed.preemption import INHERITED, Preempted, SignalCapture

LOOK_SECONDS = 0.5  # between two looks whether a signal has arrived, while a training runs


class Stopped(BaseException):
    """Raised in a training that waits when the process ends."""


class ProcessState:
    """What the trainings of a process would draw from or write to together: random states, and accelerate's gradient state."""

    def __init__(self) -> None:
        self.keep()
        self.gradients: dict[str, Any] = {}  # of a training that has not begun

    def keep(self) -> None:
        """Take the process's state."""
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.devices = accelerator.rng_states()
        self.gradients = dict(GradientState._shared_state)

    def put_back(self) -> None:
        """Give the process this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        accelerator.set_rng_states(self.devices)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.gradients)


class Runner:
    """A training in its thread."""

    def __init__(self, name: str, work: Callable[["Runner"], Any], lockstep: "Lockstep") -> None:
        self.name, self.work, self.lockstep = name, work, lockstep
        self.state = ProcessState()
        self.turn = threading.Event()
        self.waits_for: str | None = None
        self.raised: BaseException | None = None  # to be raised where it waits
        self.can_stop = False  # whether a signal is looked at by the training itself
        self.is_done = False
        self.outcome: Any = None
        self.error: BaseException | None = None
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True)

    def _run(self) -> None:
        INHERITED.set(self.lockstep.capture)
        self._take_turn()
        try:
            self.outcome = self.work(self)
        except BaseException as error:
            self.error = error
        finally:
            self.is_done = True
            self.work = lambda _: None  # frees the training
            self.lockstep.back.set()

    def _take_turn(self) -> None:
        self.turn.wait()
        self.turn.clear()

    def wait(self, kind: str) -> None:
        """Called by the training: wait until the part of the step that is called `kind` is computed for all."""
        self.waits_for = kind
        self.lockstep.back.set()
        self._take_turn()
        if (raised := self.raised) is not None:
            self.raised = None
            raise raised

    def interrupt(self, error: type[BaseException]) -> None:
        """Raise an error in the training while it runs."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(error))


class Lockstep:
    """Runs trainings; `together` computes a part of a step, by its name, for those of them that wait for it."""

    def __init__(self, together: Mapping[str, Callable[[Sequence[Runner]], None]], capture: SignalCapture) -> None:
        self.together, self.capture = together, capture
        self.back = threading.Event()  # the running training waits, or has ended

    def run(self, works: Sequence[tuple[str, Callable[[Runner], Any]]], at_once: int) -> list[Runner]:
        """Run the works, named, `at_once` at a time; returns them, ended, in order. A signal ends all, as each can be ended."""
        runners: list[Runner] = []
        queue, active = deque(works), list[Runner]()
        outer = ProcessState()
        outer.keep()
        try:
            while queue or active:
                while queue and len(active) < at_once and self.capture.signum is None:
                    if runners and len(runners) >= at_once:
                        gc.collect()  # the Trainer of one that has ended is part of cycles
                    active.append(Runner(*queue.popleft(), self))
                    runners.append(active[-1])
                    active[-1].thread.start()
                for runner in [each for each in active if each.waits_for is None]:
                    self._resume(runner)
                active = [runner for runner in active if not runner.is_done]
                if queue and len(active) < at_once and self.capture.signum is None:
                    continue  # the next one joins this step
                if not active:
                    break
                self._compute(active)
            return runners
        except BaseException:
            self._stop(runners)
            raise
        finally:
            outer.put_back()

    def _compute(self, active: Sequence[Runner]) -> None:
        """Compute what comes first of what the trainings wait for: steps that are begun are ended before others begin."""
        kind = next(kind for kind in self.together if any(runner.waits_for == kind for runner in active))
        waiting = [runner for runner in active if runner.waits_for == kind]
        try:
            self.together[kind](waiting)
        except Exception as error:
            for runner in waiting:
                runner.raised = error
        for runner in waiting:
            runner.waits_for = None

    def _resume(self, runner: Runner) -> None:
        """Let a training run until it waits or ends."""
        runner.state.put_back()
        self.back.clear()
        runner.turn.set()
        was_told = False
        while not self.back.wait(LOOK_SECONDS):
            if self.capture.signum is not None and not runner.can_stop and not was_told:
                # in a run of its own, the signal would end the process here
                runner.interrupt(Interrupted)
                was_told = True
        runner.state.keep()

    def _stop(self, runners: Sequence[Runner]) -> None:
        """End the trainings that wait, so that they give back what they hold."""
        for runner in runners:
            if not runner.is_done:
                runner.raised = Stopped()
                if runner.waits_for is None:
                    runner.interrupt(Stopped)
                runner.turn.set()
        for runner in runners:
            runner.thread.join(LOOK_SECONDS)


class Interrupted(Preempted):
    """A signal that arrived outside of a training's steps."""

    def __init__(self) -> None:
        BaseException.__init__(self, "stopped by a signal outside of a training step")
