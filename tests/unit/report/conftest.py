"""Sweep folders as runs leave them, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmtuner.metrics.rouge_bleu_zh import RougeBleuZh


def nested(values: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return config


BASE = {
    "name": "a_sweep", "objective": None, "model.model_name_or_path": "package://tiny_glm", "model.family": "glm",
    "model.template": "glm4", "model.checkpoint_dir": [], "quant.quantization_bit": None, "data.dataset": ["belle_sample"], "data.eval_dataset": [],
    "data.dev_ratio": 0.3, "data.max_samples": None, "data.split": "train", "data.dataset_dir": "data",
    "finetuning.finetuning_type": "lora", "finetuning.lora_rank": 8, "stage.name": "sft", "trainer.seed": 42,
    "trainer.data_seed": None, "trainer.learning_rate": 0.001, "trainer.max_steps": 4, "trainer.num_train_epochs": 3.0,
    "metric.name": "rouge_bleu_zh", "generation.do_sample": True,
}  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "sweep.json").write_text('{"typed": ["python -m glmtuner -m trainer.learning_rate=1,2"], "cwd": "."}')
    return tmp_path


@pytest.fixture
def job(sweep: Path) -> Callable[..., Path]:
    """Writes a job's folder: config (`values` over BASE), overrides, metrics, answers, losses; None leaves a file out."""

    def make(
        name: str,
        values: dict[str, Any] | None = None,
        overrides: list[str] | None = None,
        metrics: dict[str, float] | None = None,
        answers: list[tuple[str, str, str]] = (),
        losses: list[tuple[float, int]] = (),
        without: tuple[str, ...] = (),
    ) -> Path:
        folder = sweep / name
        folder.mkdir()
        config = {key: value for key, value in {**BASE, **(values or {})}.items() if key not in without}
        (folder / "config.yaml").write_text(yaml.safe_dump(nested(config), allow_unicode=True))
        lines = overrides if overrides is not None else [f"{key}={value}" for key, value in (values or {}).items()]
        (folder / "overrides.txt").write_text("".join(f"{line}\n" for line in lines))
        history = [{"step": 2, "epoch": 1.5, "loss": 3.0}, {"step": 2, "epoch": 1.5, "eval_loss": 3.5}]
        history.append({"step": 4, "epoch": 3.0, "loss": 2.0})
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
        if answers:
            lines = [
                {"index": index, "prompt": prompt, "label": label, "predict": predict}
                for index, (prompt, label, predict) in enumerate(answers)
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / "predictions.jsonl").write_text(text)
            scores = RougeBleuZh().scores([predict for _, _, predict in answers], [label for _, label, _ in answers])
            metrics = {**{f"predict_{name}": value for name, value in scores.items()}, **(metrics or {})}
        if losses:
            lines = [{"index": index, "loss": loss, "tokens": tokens} for index, (loss, tokens) in enumerate(losses)]
            (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            loss = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
            metrics = {"eval_loss": loss, **(metrics or {})}
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


@pytest.fixture
def failed(sweep: Path) -> Callable[..., Path]:
    """Writes the folder of a job that failed before it wrote its config."""

    def make(name: str, overrides: list[str], kind: str = "error", reason: str = "a cable was pulled") -> Path:
        folder = sweep / name
        folder.mkdir()
        about = {"kind": kind, "reason": reason, "time": "2026-01-01T00:00:00+00:00", "words": overrides}
        (folder / "failed.json").write_text(json.dumps(about))
        return folder

    return make
