"""A training that stops early: the best checkpoint is its result, and a run that was killed makes the same decision."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from json_lines import lines

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "data.dev_ratio=0.2", "trainer.learning_rate=0.05",
    "trainer.max_steps=40", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=4", "data.max_target_length=24", "trainer.disable_tqdm=true", "trainer.do_eval=true",
    "trainer.early_stopping_patience=2", "trainer.save_total_limit=2",
]  # fmt: skip
STEPS = ["trainer.eval_strategy=steps", "trainer.output_dir=run"]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.heavy
def test_stops_at_the_same_step_after_a_kill_and_keeps_the_best(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(*WORDS, *STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    run, metrics = tmp_path / "run", json.loads((tmp_path / "run/metrics.json").read_text())
    losses = {line["step"]: line["eval_loss"] for line in lines(run / "history.jsonl") if "eval_loss" in line}
    best, last = int(metrics["best_step"]), int(metrics["last_step"])
    assert losses[best] == min(losses.values()) == metrics["eval_loss"] and metrics["stopped_early"] == 1
    in_training = {step: loss for step, loss in losses.items() if step <= last}
    assert [step for step in in_training if step > best] == [best + 2, best + 4] and last == best + 4 < 40
    assert f"the training stops early, after step {last}" in done.stdout
    assert (run / f"checkpoints/checkpoint-{best}").is_dir() and len([*(run / "checkpoints").iterdir()]) <= 2
    chosen, history = (run / ADAPTER).read_bytes(), (run / "history.jsonl").read_bytes()
    saved = run / f"checkpoints/checkpoint-{best}/adapter_model.safetensors"
    assert saved.read_bytes() == chosen
    # killed after its last checkpoint, which holds the decision, and after the best one
    for kept in (last, best):
        (run / "metrics.json").unlink()
        shutil.rmtree(run / "adapter")
        for folder in (run / "checkpoints").iterdir():
            if int(folder.name.rpartition("-")[2]) > kept:
                shutil.rmtree(folder)
        again = glmtuner(*WORDS, *STEPS)
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"resumed from checkpoint-{kept}" in again.stdout
        assert (run / ADAPTER).read_bytes() == chosen and (run / "history.jsonl").read_bytes() == history
        assert json.loads((run / "metrics.json").read_text())["last_step"] == last
    # continued elsewhere, the best checkpoint is that of the first run; with more patience the training goes on
    source = f"trainer.resume_from_checkpoint=run/checkpoints/checkpoint-{last}"
    other = glmtuner(*WORDS, STEPS[0], source, "trainer.output_dir=other")
    assert other.returncode == 0, other.stdout + other.stderr
    assert (tmp_path / "other" / ADAPTER).read_bytes() == chosen
    longer = glmtuner(*WORDS, STEPS[0], source, "trainer.output_dir=longer", "trainer.early_stopping_patience=4")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert json.loads((tmp_path / "longer/metrics.json").read_text())["last_step"] > last


def test_epochs_another_metric_and_a_job_of_a_sweep(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(
        "-m", "model=tiny_glm", "tracker=none", "stage=dpo", "data.dataset=preference_sample", "data.dev_ratio=0.4",
        "data.max_samples=10", "trainer.learning_rate=0.1", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch",
        "trainer.num_train_epochs=6", "trainer.metric_for_best_model=accuracy", "trainer.early_stopping_patience=1,2",
        "trainer.per_device_train_batch_size=4", "data.max_target_length=24", "trainer.disable_tqdm=true", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (path.parent for path in (tmp_path / "sweep").rglob("metrics.json")):
        values = [line["eval_accuracy"] for line in lines(folder / "history.jsonl") if "eval_accuracy" in line]
        patience = 1 if "patience=1" in (folder / "overrides.txt").read_text() else 2
        best, waited = -1.0, 0
        for value in values:
            assert waited < patience
            waited = 0 if value > best else waited + 1
            best = max(best, value)
        assert len(values) == 6 or waited == patience
