"""Threads that take turns: what each finds as it left it, what is computed for all, and how they end."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from accelerate.state import GradientState

from glmtuner.distributed.preemption import SIGNALS, Preempted, SignalCapture, capture_signals
from glmtuner.training.lockstep import Lockstep, Stopped


def draws(seed: int, pauses: list[int], pause=lambda: None) -> list[float]:
    """Numbers of all three generators, with a pause now and then."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    found = []
    for step in range(6):
        found += [random.random(), float(np.random.rand()), float(torch.rand(()))]
        if step in pauses:
            pause()
    return found


def test_each_draws_what_it_draws_alone():
    before = torch.get_rng_state()
    alone = [draws(1, []), draws(2, []), draws(3, [])]
    torch.set_rng_state(before)
    works = [
        (str(seed), lambda runner, seed=seed, pauses=pauses: draws(seed, pauses, lambda: runner.wait("step")))
        for seed, pauses in ((1, [0, 1, 4]), (2, [2]), (3, [0, 5]))
    ]
    runners = Lockstep({"step": lambda waiting: torch.rand(7)}, SignalCapture()).run(works, at_once=3)
    assert [runner.outcome for runner in runners] == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_state_of_accelerate_is_each_trainings_own():
    seen = {}

    def work(runner):
        state = GradientState()
        state._set_sync_gradients(runner.name == "a")
        runner.wait("step")
        seen[runner.name] = state.sync_gradients

    Lockstep({"step": lambda waiting: None}, SignalCapture()).run([("a", work), ("b", work)], at_once=2)
    assert seen == {"a": True, "b": False}


def test_what_is_computed_together_and_who_waits_in_the_queue():
    computed = []

    def work(runner, steps):
        for _ in range(steps):
            runner.wait("forward")
            runner.wait("backward")

    together = {
        kind: lambda waiting, kind=kind: computed.append((kind, "".join(each.name for each in waiting)))
        for kind in ("backward", "forward")
    }
    works = [(name, lambda runner, steps=steps: work(runner, steps)) for name, steps in (("a", 1), ("b", 3), ("c", 1))]
    Lockstep(together, SignalCapture()).run(works, at_once=2)
    assert [names for kind, names in computed if kind == "forward"] == ["ab", "bc", "b"]
    assert [kind for kind, _ in computed] == ["forward", "backward"] * 3


def test_an_error_ends_its_training_alone_and_one_of_all_reaches_each():
    def fails(runner):
        runner.wait("step")
        raise ValueError("mine")

    def goes_on(runner):
        for _ in range(3):
            runner.wait("step")
        return "done"

    runners = Lockstep({"step": lambda waiting: None}, SignalCapture()).run([("a", fails), ("b", goes_on)], at_once=2)
    assert str(runners[0].error) == "mine" and runners[1].outcome == "done"

    def breaks(waiting):
        raise MemoryError("all")

    runners = Lockstep({"step": breaks}, SignalCapture()).run([("a", goes_on), ("b", goes_on)], at_once=2)
    assert [str(runner.error) for runner in runners] == ["all", "all"]


def test_a_signal_ends_what_does_not_look_at_it_and_nothing_new_begins():
    reached = []

    def predicts(runner):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(600):
                time.sleep(0.05)
        except Preempted:
            reached.append(runner.name)
            raise

    with capture_signals() as capture:
        runners = Lockstep({}, capture).run([("a", predicts), ("b", predicts)], at_once=1)
    assert reached == ["a"] and len(runners) == 1 and isinstance(runners[0].error, Preempted)
    assert capture.signum == signal.SIGTERM and signal.SIGTERM in SIGNALS


def test_those_that_wait_give_back_what_they_hold_when_the_process_ends():
    given_back = []

    def holds(runner):
        try:
            runner.wait("step")
        except Stopped:
            given_back.append(runner.name)
            raise

    def interrupted(waiting):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lockstep({"step": interrupted}, SignalCapture()).run([("a", holds), ("b", holds)], at_once=2)
    assert sorted(given_back) == ["a", "b"]
