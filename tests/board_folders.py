"""Folders of runs and sweeps for tests of the board, written by hand."""

import json
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "name": None, "objective": None,
    "model": {"model_name_or_path": "package://tiny_glm", "family": "glm", "template": "glm4", "checkpoint_dir": []},
    "quant": {"quantization_bit": None},
    "data": {"dataset": ["belle_sample"], "eval_dataset": [], "dev_ratio": 0.3, "max_samples": None, "split": "train", "dataset_dir": "data"},
    "finetuning": {"finetuning_type": "lora", "lora_rank": 8},
    "stage": {"name": "sft"},
    "trainer": {"seed": 42, "data_seed": None, "learning_rate": 0.001, "max_steps": 40, "num_train_epochs": 3.0},
    "metric": {"name": "rouge_bleu_zh", "without_reasoning": False},
    "generation": {"do_sample": True},
}  # fmt: skip


def lines_text(lines: list[dict[str, Any]]) -> str:
    """JSON Lines, as `history.jsonl` has them."""
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


def write_sweep(folder: Path, *commands: str, jobs: list[str] | None = None) -> Path:
    """The file of a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"typed": list(commands), "cwd": "/", "jobs": jobs or []}))
    return folder


def write_run(
    folder: Path, changes: dict[str, Any] | None = None, typed: list[str] | None = None, **files: Any
) -> Path:
    """Write a run folder: `changes` of CONFIG by dotted keys, `files` by their names without the suffix; lists become JSON Lines."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    for key, value in (changes or {}).items():
        group, _, leaf = key.partition(".")
        if leaf:
            config[group][leaf] = value
        else:
            config[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    words = typed if typed is not None else [f"{key}={value}" for key, value in (changes or {}).items()]
    (folder / "overrides.txt").write_text("\n".join(words), encoding="utf-8")
    about = {"command": f"python -m glmtuner {' '.join(words)}", "started": "2026-01-01T00:00:00+00:00"}
    (folder / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
    for file, content in files.items():
        suffix = "jsonl" if isinstance(content, list) else "json"
        text = lines_text(content) if isinstance(content, list) else json.dumps(content)
        (folder / f"{file}.{suffix}").write_text(text, encoding="utf-8")
    return folder
