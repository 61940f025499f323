"""Runs that diverge are failures and never results; a run that was killed behind its last step takes no more steps."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "model=tiny_glm", "tracker=none", "trainer.disable_tqdm=true", "trainer.logging_steps=1", "data.max_source_length=64",
    "data.max_target_length=24",
)  # fmt: skip
DIVERGING = {
    "lora": ("data.dataset=identity_sample", "trainer.max_steps=4"),
    "full": ("data.dataset=identity_sample", "trainer.max_steps=4", "finetuning=full"),
    "freeze": ("data.dataset=identity_sample", "trainer.max_steps=4", "finetuning=freeze"),
    "p_tuning": ("data.dataset=identity_sample", "trainer.max_steps=6", "finetuning=p_tuning"),
    "no clipping": ("data.dataset=identity_sample", "trainer.max_steps=4", "trainer.max_grad_norm=0"),
    "pt": ("stage=pt", "data.dataset=text_sample", "trainer.max_steps=6"),
    "dpo": ("stage=dpo", "data.dataset=preference_sample", "trainer.max_steps=4"),
    "kto": ("stage=kto", "data.dataset=feedback_sample", "trainer.max_steps=4"),
    "rm": ("stage=rm", "data.dataset=preference_sample", "trainer.max_steps=4"),
    "the last step": (
        "data.dataset=identity_sample",
        "trainer.max_steps=1",
        "finetuning=full",
        "trainer.warmup_steps=0",
    ),
}


def strict_files(folder: Path) -> None:
    """Every JSON file of a folder holds JSON."""
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        text = path.read_text(encoding="utf-8")
        for document in text.split("\n") if path.suffix == ".jsonl" else [text]:
            if document.strip():
                json.loads(document, parse_constant=lambda name, path=path: pytest.fail(f"{path} holds {name}"))


@pytest.mark.parametrize("kind", DIVERGING)
def test_a_run_that_diverges_fails(glmtuner: Callable, tmp_path: Path, kind: str) -> None:
    done = glmtuner(*TINY, *DIVERGING[kind], "trainer.learning_rate=1e38", "trainer.output_dir=run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "diverged" in done.stderr and "trainer.learning_rate=1e+38" in done.stderr and "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert not any((run / name).exists() for name in ("metrics.json", "adapter", "model", "report.md"))
    assert "diverged" in json.loads((run / "failed.json").read_text())["reason"]
    strict_files(run)


@pytest.mark.parametrize("words", [(), ("trainer.max_steps=9", "trainer.eval_strategy=steps", "trainer.eval_steps=1")])
@pytest.mark.parametrize(
    "stage", [("data.dataset=identity_sample", "finetuning=full"), ("data.dataset=preference_sample", "stage=dpo")]
)
def test_an_evaluation_that_finds_no_finite_loss_fails(
    glmtuner: Callable, tmp_path: Path, stage: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """The weights of a last step may be finite, and too large for any loss; the mean would be null, or that of the other records."""
    steps = [] if words else ["trainer.max_steps=1"]
    done = glmtuner(
        *TINY, *stage, *words, *steps, "data.dev_ratio=0.1", "trainer.do_eval=true", "trainer.warmup_steps=0",
        "trainer.learning_rate=1e30", "trainer.output_dir=run",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert (
        "evaluation records is not finite after step 1: the training diverged with trainer.learning_rate=1e+30" in said
    )
    assert not any((tmp_path / "run" / name).exists() for name in ("metrics.json", "losses.jsonl", "report.md"))
    assert "eval_loss" not in (tmp_path / "run/history.jsonl").read_text()
    strict_files(tmp_path / "run")


def test_a_diverged_job_is_never_ranked(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(
        "-m", *TINY, "data.dataset=identity_sample", "trainer.max_steps=4", "trainer.learning_rate=1e-3,1e30",
        "objective=train_loss", "name=rates",
    )  # fmt: skip
    assert done.returncode == 1 and "diverged" in done.stderr
    board = (tmp_path / "outputs/sweeps/rates/leaderboard.csv").read_text(encoding="utf-8")
    rows = [row for row in board.splitlines() if "1e+30" in row or "1e30" in row]
    assert "(1 finished" in done.stdout and all("failed" in row for row in rows)
    strict_files(tmp_path / "outputs/sweeps/rates")


@pytest.mark.heavy
def test_a_diverged_job_is_never_the_best_of_a_search(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(
        "-m", *TINY, "data.dataset=identity_sample", "trainer.max_steps=4", "trainer.learning_rate=choice(1e-3, 1e30)",
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "objective=train_loss", "name=search",
    )  # fmt: skip
    assert done.returncode == 0 and "diverged: the " in done.stdout, done.stdout + done.stderr
    sweep = tmp_path / "outputs/sweeps/search"
    (metrics,) = sweep.glob("*/metrics.json")  # the search has tried both rates
    assert len([*sweep.glob("*/failed.json")]) == 1
    best = (sweep / "optimization_results.yaml").read_text()
    assert "learning_rate: 0.001" in best and f"best_value: {json.loads(metrics.read_text())['train_loss']}" in best


# -- a run without an optimizer step is none -----------------------------------------------------------------------------

DROPPED = ("trainer.dataloader_drop_last=true", "trainer.per_device_train_batch_size=128")
WITHOUT_A_BATCH = {
    "epochs": ("data.dataset=identity_sample",),
    "steps": ("data.dataset=identity_sample", "trainer.max_steps=4"),
    "pt": ("stage=pt", "data.dataset=text_sample", "trainer.max_steps=4"),
    "dpo": ("stage=dpo", "data.dataset=preference_sample", "trainer.max_steps=4"),
    "kto": ("stage=kto", "data.dataset=feedback_sample", "trainer.max_steps=4"),
    "rm": ("stage=rm", "data.dataset=preference_sample"),
    "packs": ("data.dataset=identity_sample", "data.packing=true", "trainer.max_steps=4"),
}


@pytest.mark.parametrize("kind", WITHOUT_A_BATCH)
def test_records_that_make_no_batch_are_refused(glmtuner: Callable, tmp_path: Path, kind: str) -> None:
    words = (*TINY, *WITHOUT_A_BATCH[kind], "trainer.output_dir=run")
    packed = "trainer.per_device_train_batch_size=48"  # more than the packs, and fewer than the records
    done = glmtuner(*words, *DROPPED, *([packed] if kind == "packs" else []))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "so that no step would be taken" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run").exists() is (kind == "packs"), "packs are known only when the model is"
    again = glmtuner(*words, "trainer.per_device_train_batch_size=1", DROPPED[0], "trainer.max_steps=1")
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_every_step_was_skipped_fails(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As fp16's scaler skips them when every gradient overflows."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    words = (
        *TINY,
        "data.dataset=identity_sample",
        f"finetuning={method}",
        "trainer.max_steps=3",
        "trainer.output_dir=run",
    )
    with monkeypatch.context() as patched:
        patched.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
        patched.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
        done = glmtuner(*words)
    assert done.returncode == 2 and "no optimizer step was taken in 3 steps" in done.stderr, done.stdout + done.stderr
    assert not any((tmp_path / "run" / name).exists() for name in ("metrics.json", "adapter", "model"))


# -- a run that was killed behind its last checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends", [("trainer.max_steps=5",), ("trainer.num_train_epochs=1.5",), ("trainer.num_train_epochs=1",)]
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_killed_behind_its_last_checkpoint_trains_nothing(
    glmtuner: Callable, tmp_path: Path, method: str, ends: tuple[str, ...]
) -> None:
    words = [
        *TINY, f"finetuning={method}", "data.dataset=identity_sample", "data.dev_ratio=0.1", "trainer.do_eval=true", "trainer.do_predict=true",
        "trainer.predict_with_generate=true", "trainer.eval_strategy=epoch", "trainer.lr_scheduler_type=constant", *ends,
        "trainer.output_dir=run",
    ]  # fmt: skip
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    run, saved = tmp_path / "run", "adapter" if method == "lora" else "model"
    weights = next((run / saved).glob("*.safetensors")).read_bytes()
    history, answers = (run / "history.jsonl").read_text(), (run / "predictions.jsonl").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    for _ in range(2):  # as often as it is killed
        shutil.rmtree(run / saved)
        (run / "metrics.json").unlink()
        (run / "predictions.jsonl").unlink()
        done = glmtuner(*words)
        assert done.returncode == 0 and "resumed from checkpoint-" in done.stdout, done.stdout + done.stderr
        assert next((run / saved).glob("*.safetensors")).read_bytes() == weights
        assert (run / "history.jsonl").read_text() == history and (run / "predictions.jsonl").read_text() == answers
        again = json.loads((run / "metrics.json").read_text())
        assert again["train_loss"] == metrics["train_loss"] and again["predict_rouge-l"] == metrics["predict_rouge-l"]


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(glmtuner: Callable, tmp_path: Path) -> None:
    words = [
        *TINY, "data.dataset=identity_sample", "data.dev_ratio=0.1", "trainer.eval_strategy=epoch", "trainer.save_strategy=steps",
        "trainer.save_steps=2", "trainer.max_steps=4", "trainer.output_dir=run",
    ]  # fmt: skip
    assert glmtuner(*words).returncode == 0
    run = tmp_path / "run"
    history = (run / "history.jsonl").read_text()
    lines = history.splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    shutil.rmtree(run / "adapter")
    (run / "metrics.json").unlink()
    (run / "history.jsonl").write_text("".join(lines[:-1]))
    assert glmtuner(*words).returncode == 0
    assert (run / "history.jsonl").read_text() == history


# -- a run that is stopped and resumed is the undisturbed one ----------------------------------------------------------

FIVE_STEPS_AN_EPOCH = (
    *TINY, "data.dataset=identity_sample", "data.max_samples=24", "data.dev_ratio=0.2", "trainer.num_train_epochs=2",
    "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-3", "trainer.max_grad_norm=0.5",
)  # fmt: skip
STOPPED = {  # the optimizer step at whose beginning SIGTERM arrives, and words; tests/attack/test_numbers_resume.py has more
    "the best model only": (
        2,
        (
            "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_strategy=best",
            "trainer.metric_for_best_model=eval_loss", "trainer.save_only_model=true",
        ),
    ),
    "the end of an epoch": (
        5, ("trainer.save_strategy=no", "trainer.eval_strategy=epoch", "trainer.logging_strategy=epoch"),
    ),
}  # fmt: skip


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next training gets SIGTERM when this step begins."""
    from transformers import TrainerCallback

    from glmtuner.training import trainer

    due = [signal.SIGTERM]

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1 and due:
                os.kill(os.getpid(), due.pop())

    begin = trainer.GlmTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.add_callback(Stop())

    monkeypatch.setattr(trainer.GlmTrainer, "__init__", init)


def outcome(run: Path) -> tuple[str, bytes]:
    """The history, and the trained weights."""
    return (run / "history.jsonl").read_text(), (run / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", STOPPED)
def test_a_stopped_run_resumes_to_the_undisturbed_one(
    glmtuner: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    step, words = STOPPED[kind]
    assert glmtuner(*FIVE_STEPS_AN_EPOCH, *words, "trainer.output_dir=undisturbed").returncode == 0
    again = (*FIVE_STEPS_AN_EPOCH, *words, "trainer.output_dir=stopped")
    with monkeypatch.context() as patched:
        stop_in_step(patched, step)
        assert glmtuner(*again).returncode == 128 + signal.SIGTERM
    checkpoint = tmp_path / f"stopped/checkpoints/checkpoint-{step}"
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in checkpoint.iterdir()}
    done = glmtuner(*again)
    assert done.returncode == 0 and f"resumed from checkpoint-{step}" in done.stdout, done.stdout + done.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


@pytest.mark.heavy
def test_the_workers_that_load_batches_do_not_change_a_run(glmtuner: Callable, tmp_path: Path) -> None:
    words = (*FIVE_STEPS_AN_EPOCH, "trainer.eval_strategy=steps", "trainer.eval_steps=3", "trainer.save_steps=4")
    workers = ("trainer.dataloader_num_workers=2", "trainer.dataloader_persistent_workers=true")
    assert glmtuner(*words, "trainer.output_dir=none").returncode == 0
    assert glmtuner(*words, *workers, "trainer.output_dir=persistent").returncode == 0
    assert outcome(tmp_path / "persistent") == outcome(tmp_path / "none")
    run = tmp_path / "resumed"
    shutil.copytree(
        tmp_path / "persistent", run
    )  # in another folder, since persistent workers hold its lock in this process
    shutil.rmtree(run / "adapter")
    (run / "metrics.json").unlink()
    for step in (8, 10):
        shutil.rmtree(run / f"checkpoints/checkpoint-{step}")
    done = glmtuner(*words, *workers, "trainer.output_dir=resumed")
    assert done.returncode == 0 and "resumed from checkpoint-4" in done.stdout, done.stdout + done.stderr
    assert outcome(run) == outcome(tmp_path / "none")
