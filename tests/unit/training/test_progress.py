"""progress.json: written at the beginning, now and then, and at the end, by the rank that writes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from glmtuner.run_folder.folder import RunFolder
from glmtuner.training import progress
from glmtuner.training.progress import ShowProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_the_steps_and_the_seconds_of_this_process(tmp_path: Path, clock: SimpleNamespace) -> None:
    saves, state = SimpleNamespace(should_save=True), SimpleNamespace(global_step=20, max_steps=60)
    shown = ShowProgress(RunFolder(tmp_path))
    shown.on_train_begin(saves, state, None)
    assert read(tmp_path) == {"step": 20, "steps": 60, "start_step": 20, "seconds": 0.0}
    clock.seconds, state.global_step = 104.0, 22
    shown.on_step_end(saves, state, None)
    assert read(tmp_path)["step"] == 20  # not five seconds yet
    clock.seconds, state.global_step = 105.5, 23
    shown.on_step_end(saves, state, None)
    assert read(tmp_path) == {"step": 23, "steps": 60, "start_step": 20, "seconds": 5.5}
    clock.seconds, state.global_step = 106.0, 24
    shown.on_train_end(saves, state, None)
    assert read(tmp_path)["step"] == 24


def test_another_rank_writes_nothing(tmp_path: Path, clock: SimpleNamespace) -> None:
    other, state = SimpleNamespace(should_save=False), SimpleNamespace(global_step=0, max_steps=60)
    shown = ShowProgress(RunFolder(tmp_path))
    shown.on_train_begin(other, state, None)
    clock.seconds = 200.0
    shown.on_step_end(other, state, None)
    shown.on_train_end(other, state, None)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_has_none_left(glmtuner, tmp_path: Path) -> None:
    words = ["model=tiny_glm", "data.dataset=identity_sample", "trainer.max_steps=1", "tracker=none", "metric=none"]
    done = glmtuner(*words, "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/metrics.json").is_file() and not (tmp_path / "run/progress.json").exists()


def read(folder: Path) -> dict:
    return json.loads((folder / "progress.json").read_text())
