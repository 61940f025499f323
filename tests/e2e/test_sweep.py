"""Sweeps: what fails, what does not fit, what was cut off; several at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glmtuner.run_folder.folder import job_folders

TINY = [
    "-m", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=16", "trainer.max_steps=4",
    "trainer.logging_steps=2", "trainer.save_steps=2", "trainer.disable_tqdm=true", "objective=train_loss",
]  # fmt: skip


def folders(sweep: Path) -> dict[str, Path]:
    return {folder.path.name.rpartition("_")[0]: folder.path for folder in job_folders(sweep)}


def written(sweep: Path) -> dict[str, tuple[bytes, bytes]]:
    return {
        name: ((path / "history.jsonl").read_bytes(), (path / "adapter/adapter_model.safetensors").read_bytes())
        for name, path in folders(sweep).items()
    }


def test_a_failed_job_stops_no_other_and_is_tried_again(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.launch import run as launch

    trained, broken = launch.train, {"seed": 2}

    def train(context, *given):
        if context.run.trainer.seed == broken["seed"]:
            raise RuntimeError("a cable was pulled")
        return trained(context, *given)

    monkeypatch.setattr(launch, "train", train)
    words = [*TINY, "trainer.seed=1,2,3", "name=retried"]
    done = glmtuner(*words)
    sweep = tmp_path / "outputs/sweeps/retried"
    assert done.returncode == 1
    assert "a job of the sweep failed: seed-2_" in done.stderr and "RuntimeError: a cable was pulled" in done.stderr
    assert "(2 finished, 0 did not fit into memory, 1 failed)" in done.stdout
    failure = json.loads((folders(sweep)["seed-2"] / "failed.json").read_text())
    assert failure["kind"] == "error" and "Traceback" in failure["traceback"] and "trainer.seed=2" in failure["words"]
    broken["seed"] = 0
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 2
    assert not (folders(sweep)["seed-2"] / "failed.json").exists()
    more = glmtuner(*TINY, "trainer.seed=1,2,3,4", "name=retried")  # a value more runs one job more
    assert more.stdout.count("finished before, skipped") == 3 and "(4 finished" in more.stdout


def test_out_of_memory_is_infeasible_and_no_crash(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.launch import run as launch

    trained = launch.train

    def train(context, *given):
        if context.run.trainer.per_device_train_batch_size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
        return trained(context, *given)

    monkeypatch.setattr(launch, "train", train)
    words = [*TINY, "trainer.per_device_train_batch_size=2,8", "name=memory"]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    assert "(1 finished, 1 did not fit into memory, 0 failed)" in done.stdout
    again = glmtuner(*words)
    assert "did not fit into memory before, skipped" in again.stdout and again.returncode == 0


def test_an_objective_that_is_not_measured_is_told(glmtuner: Callable) -> None:
    done = glmtuner(*TINY[:-1], "objective=eval_loss", "trainer.seed=1,2", "name=unmeasured")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "objective=eval_loss: the run measured train_runtime" in done.stderr
    right = glmtuner(
        *TINY[:-1], "objective=train_loss", "trainer.seed=1,2", "hydra.sweep.dir=outputs/sweeps/unmeasured"
    )
    assert right.returncode == 0 and "(2 finished, 0 did not fit into memory, 0 failed)" in right.stdout


@pytest.mark.heavy
@pytest.mark.matrix
def test_joblib_gives_what_the_basic_launcher_gives(glmtuner: Callable, tmp_path: Path) -> None:
    words = [*TINY, "trainer.seed=1,2", "trainer.learning_rate=1e-3,1e-4"]
    assert glmtuner(*words, "name=one").returncode == 0
    done = glmtuner(*words, "name=two", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert written(tmp_path / "outputs/sweeps/one") == written(tmp_path / "outputs/sweeps/two")
    log = next((tmp_path / "outputs/sweeps/two").glob("*/output.log")).read_text()
    assert "train_loss" in log and "Traceback" not in log


def test_a_run_that_is_told_to_go_saves_and_ends_like_its_undisturbed_twin(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from transformers import TrainerCallback

    from glmtuner.training import trainer

    class Tell(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == 1 and told:
                os.kill(os.getpid(), told.pop())

    words = [word for word in TINY[1:] if not word.startswith("trainer.save_steps")]
    told: list[int] = []
    assert glmtuner(*words, "trainer.output_dir=undisturbed").returncode == 0
    begin = trainer.GlmTrainer.__init__

    def init(self, *given, **options):
        begin(self, *given, **options)
        self.add_callback(Tell())

    monkeypatch.setattr(trainer.GlmTrainer, "__init__", init)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)]
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGUSR2, 140)):
        told.append(signum)
        name = signal.Signals(signum).name
        done = glmtuner(*words, f"trainer.output_dir={name}")
        assert done.returncode == code, done.stderr
        assert f"stopped by {name} after step 2" in done.stderr and "same trainer.output_dir" in done.stderr
        assert (tmp_path / name / "checkpoints/checkpoint-2/complete.json").is_file()
        assert not (tmp_path / name / "metrics.json").exists() and not (tmp_path / name / "failed.json").exists()
        again = glmtuner(*words, f"trainer.output_dir={name}")
        assert again.returncode == 0 and "resumed from checkpoint-2" in again.stdout
        for file in ("history.jsonl", "adapter/adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)] == handlers
