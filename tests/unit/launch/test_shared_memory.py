"""How many runs fit beside their base."""

import pytest

from glmtuner.config.compose import compose
from glmtuner.launch import shared_memory
from glmtuner.launch.register import register_presets
from glmtuner.launch.shared_memory import jobs_that_fit, most_that_fit
from glmtuner.memory.estimate import Estimate

PARTS = {
    "frozen weights": 1000, "trained weights": 10, "gradients": 10, "optimizer states": 20, "activations": 50,
    "logits, loss and temporary": 10, "Python and libraries": 500,
}  # fmt: skip


def test_the_largest_runs_decide_and_one_always_runs():
    assert most_that_fit(100, [10, 50, 20], 180) == 3
    assert most_that_fit(100, [10, 50, 20], 179) == 2
    assert most_that_fit(100, [10, 50, 20], 160) == 1
    assert most_that_fit(100, [10, 50, 20], 90) == 1


@pytest.mark.parametrize(("available", "count"), [(1500 + 399, 3), (1500 + 400, 4), (100, 1)])
def test_the_base_and_the_process_count_once(monkeypatch, capsys, available, count):
    register_presets()
    jobs = [compose(["model=tiny_glm", "tracker=none", f"trainer.seed={seed}"]) for seed in range(4)]
    estimated = []

    def estimate_run(job, device, memory):
        estimated.append(job)
        about = {"total_parameters": 1, "trained_parameters": 1, "active_parameters": None, "rows": 1, "longest": 1}
        return Estimate(device="CPU", parts=PARTS, checkpointing=False, **about), None

    monkeypatch.setattr(shared_memory, "device_memory", lambda device: available)
    monkeypatch.setattr(shared_memory, "estimate_run", estimate_run)
    assert jobs_that_fit(jobs) == count
    assert len(estimated) == 1  # another seed is no other memory
    assert ("are available" in capsys.readouterr().out) == (count < 4)


def test_small_runs_on_a_large_machine_are_not_estimated(monkeypatch):
    register_presets()
    jobs = [compose(["model=tiny_glm", "tracker=none", f"finetuning.lora_rank={rank}"]) for rank in (4, 8)]
    monkeypatch.setattr(shared_memory, "device_memory", lambda device: 2**40)
    monkeypatch.setattr(shared_memory, "estimate_run", None)
    assert jobs_that_fit(jobs) == 2
