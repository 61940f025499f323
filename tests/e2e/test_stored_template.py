"""A run of an earlier release is resumed, asked and exported with the template that is stored with it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from glmtuner.cli.main import main
from glmtuner.templates.base import TEMPLATES
from glmtuner.templates.stored import EARLIER

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "trainer.max_steps=8", "trainer.save_steps=4",
    "trainer.logging_steps=1", "trainer.learning_rate=2e-3", "trainer.disable_tqdm=true",
]  # fmt: skip


def outcome(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "history.jsonl").read_bytes(), (folder / "adapter/adapter_model.safetensors").read_bytes()


def predicted(folder: Path, to: Path) -> list[str]:
    words = ["trainer=predict", "tracker=none", "data.dataset=identity_sample", "data.max_samples=4"]
    assert (
        main([*words, f"model.checkpoint_dir={folder}", f"trainer.output_dir={to}", "trainer.disable_tqdm=true"]) == 0
    )
    return (to / "predictions.jsonl").read_text(encoding="utf-8").splitlines()


def test_a_run_of_before(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, interrupted = tmp_path / "before", tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as release:
        release.setitem(TEMPLATES, "glm4", EARLIER[0])
        words = [*WORDS, "model.template=glm4"]  # named, since it differs from the chat template that ships today
        assert main([*words, f"trainer.output_dir={before}"]) == 0
        answers = predicted(before, tmp_path / "answers before")
    shutil.copytree(before, interrupted)
    (interrupted / "metrics.json").unlink()
    shutil.rmtree(interrupted / "adapter")
    for folder in (interrupted / "checkpoints").glob("checkpoint-8"):
        shutil.rmtree(folder)

    capsys.readouterr()
    assert main([*WORDS, f"trainer.output_dir={interrupted}"]) == 0
    assert "resumed from checkpoint-4" in capsys.readouterr().out
    assert outcome(interrupted) == outcome(before)
    about, stored = (
        json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["template"]
        for folder in (interrupted, before)
    )
    assert about == stored and about["learned"] == ["{assistant}"]

    assert predicted(before, tmp_path / "answers") == answers
    assert main(["export", str(before), "--to", str(tmp_path / "exported")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "[gMASK]<sop><|user|>\n你好<|assistant|>\n"

    after = tmp_path / "after"  # trained on from it, and from the model that was exported from it
    assert main([*WORDS, f"model.checkpoint_dir={before}", f"trainer.output_dir={after}"]) == 0
    assert json.loads((after / "provenance.json").read_text(encoding="utf-8"))["template"] == stored
    words = [
        f"model.model_name_or_path={tmp_path / 'exported'}",
        "trainer.max_steps=1",
        f"trainer.output_dir={tmp_path / 'on'}",
    ]
    assert main([*WORDS, *words]) == 0
    assert json.loads((tmp_path / "on/provenance.json").read_text(encoding="utf-8"))["template"] == stored


def test_a_run_is_not_resumed_with_another_template(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    assert main([*WORDS, "trainer.max_steps=4", f"trainer.output_dir={folder}"]) == 0
    (folder / "metrics.json").unlink()
    assert main([*WORDS, "trainer.max_steps=4", "model.template=plain", f"trainer.output_dir={folder}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "model.template=plain: the run in" in said
        and "is trained with model.template=glm4; leave model.template out" in said
    )
