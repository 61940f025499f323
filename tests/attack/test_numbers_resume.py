"""Runs that SIGTERM stops in any step, under every way to save, evaluate and log: resumed, they are the undisturbed run.

ATTACK_STOPS is the number of steps that each is stopped in (1 by default, 10 is all of them).
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
from test_numbers import FIVE_STEPS_AN_EPOCH, outcome, stop_in_step

STOPS = int(os.environ.get("ATTACK_STOPS", "1"))
STEPS = {"trainer.eval_strategy=steps", "trainer.eval_steps=2"}
EPOCH = {"trainer.eval_strategy=epoch"}
WAYS = {
    "plain": set(),
    "model only": {"trainer.save_only_model=true", "trainer.save_steps=1"},
    "no checkpoints": {"trainer.save_strategy=no"},
    "no checkpoints, evaluations by epoch": {"trainer.save_strategy=no", *EPOCH},
    "evaluations by epoch": EPOCH | {"trainer.save_steps=5"},
    "all by epoch": EPOCH | {"trainer.save_strategy=epoch", "trainer.logging_strategy=epoch"},
    "logging by epoch": {"trainer.logging_strategy=epoch", "trainer.save_steps=5"},
    "the best": STEPS | {"trainer.save_strategy=best", "trainer.metric_for_best_model=eval_loss"},
    "the best by epoch": EPOCH | {"trainer.save_strategy=best", "trainer.metric_for_best_model=eval_loss"},
    "load the best": EPOCH
    | {"trainer.save_strategy=epoch", "trainer.load_best_model_at_end=true", "trainer.save_total_limit=1"},
    "accumulation": EPOCH | {"trainer.gradient_accumulation_steps=2", "trainer.num_train_epochs=4"},
    "noise and smoothing": {"trainer.neftune_noise_alpha=5", "trainer.label_smoothing_factor=0.1"},
    "packing": EPOCH | {"data.packing=true", "trainer.num_train_epochs=10"},
    "by length": EPOCH | {"trainer.group_by_length=true"},
    "workers": EPOCH | {"trainer.dataloader_num_workers=1"},
    "dpo": EPOCH | {"stage=dpo", "data.dataset=preference_sample", "trainer.save_only_model=true"},
    "kto": EPOCH | {"stage=kto", "data.dataset=feedback_sample"},
    "pt": EPOCH | {"stage=pt", "data.dataset=text_sample", "stage.block_length=64", "trainer.num_train_epochs=1"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_resumes_to_the_undisturbed_one(
    glmtuner: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    words = (*FIVE_STEPS_AN_EPOCH, *sorted(WAYS[way]))
    assert glmtuner(*words, "trainer.output_dir=undisturbed").returncode == 0
    wanted = outcome(tmp_path / "undisturbed")
    last = max(line["step"] for line in map(json.loads, wanted[0].splitlines()))
    steps = random.Random(way).sample(range(1, last), min(STOPS, last - 1))
    for step in {*steps, min(5, last - 1)}:
        again = (*words, f"trainer.output_dir=stopped_{step}")
        with monkeypatch.context() as patched:
            stop_in_step(patched, step)
            stopped = glmtuner(*again)
        assert stopped.returncode == 128 + signal.SIGTERM, stopped.stdout + stopped.stderr
        done = glmtuner(*again)
        assert done.returncode == 0 and f"resumed from checkpoint-{step}" in done.stdout, done.stdout + done.stderr
        assert outcome(tmp_path / f"stopped_{step}") == wanted, step
