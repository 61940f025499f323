"""A run whose trained weights cannot be saved keeps them, says where, and is not replaced by the next one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmtuner.finetuning.full import Full
from glmtuner.finetuning.lora import Lora

WORDS = (
    "model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "data.max_samples=8", "trainer.max_steps=2", "trainer.use_cpu=true",
    "trainer.disable_tqdm=true", "trainer.save_strategy=no", "trainer.learning_rate=1e-3",
)  # fmt: skip


def broken(self: object, model: object, folder: Path) -> None:
    folder.mkdir(parents=True)
    raise RuntimeError("a conversion without a reverse")


def test_weights_that_cannot_be_saved_are_kept(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [*WORDS, "finetuning=full"]
    done = glmtuner(*full, "trainer.output_dir=good")
    assert done.returncode == 0, done.stdout + done.stderr
    with monkeypatch.context() as patched:
        patched.setattr(Full, "save", broken)
        done = glmtuner(*full, "trainer.output_dir=run")
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert "could not be written (RuntimeError: a conversion without a reverse); the trained weights are kept in run/kept/" in told.replace(f"{tmp_path}/", "")  # fmt: skip
    assert "type model.checkpoint_dir=" in told and "Traceback" not in told
    kept, good = (
        load_file(tmp_path / "run/kept/trained.safetensors"),
        load_file(tmp_path / "good/model/model.safetensors"),
    )
    assert all(torch.equal(kept[name], good[name]) for name in good)

    done = glmtuner(*full, "trainer.learning_rate=1e-4", "trainer.output_dir=run")  # of another configuration
    assert done.returncode == 2 and "holds an unfinished run of another configuration" in " ".join(done.stderr.split())
    scores = {}
    for name, start in (("of_kept", "run/kept"), ("of_run", "run"), ("of_good", "good")):
        done = glmtuner("trainer=evaluate", f"model.checkpoint_dir={start}", *WORDS[1:4], f"trainer.output_dir={name}", "trainer.use_cpu=true")  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        scores[name] = (tmp_path / name / "metrics.json").read_text().split('"eval_loss": ')[1].split(",")[0]
    assert len({*scores.values()}) == 1, scores


def test_an_adapter_that_reads_back_otherwise_is_kept(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(self: Lora, model: torch.nn.Module, folder: Path) -> None:
        with torch.no_grad():
            next(value for value in model.parameters() if value.requires_grad).zero_()

    with monkeypatch.context() as patched:
        patched.setattr(Lora, "restore", restore)
        done = glmtuner(*WORDS, "trainer.output_dir=run")
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert "are not the trained ones (1 differ, such as base_model." in told and "kept/trained.safetensors" in told
    kept = load_file(tmp_path / "run/kept/trained.safetensors")
    saved = load_file(tmp_path / "run/.adapter.partial/adapter_model.safetensors")
    assert all(torch.equal(value, kept[name.replace(".weight", ".default.weight")]) for name, value in saved.items())
