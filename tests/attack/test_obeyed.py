"""What fields of the trainer do to a run: each against the same run without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BASE = [
    "model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "data.max_samples=24", "data.dev_ratio=0.2",
    "trainer.per_device_train_batch_size=2", "trainer.max_steps=4", "trainer.logging_steps=1", "trainer.save_strategy=no",
    "trainer.disable_tqdm=true", "trainer.do_eval=true",
]  # fmt: skip
CHANGES = (  # the training itself
    "trainer.data_seed=7", "trainer.seed=7", "trainer.train_sampling_strategy=sequential", "trainer.weight_decay=0.5",
    "trainer.adam_beta1=0.5", "trainer.adam_beta2=0.5", "trainer.adam_epsilon=0.1", "trainer.max_grad_norm=0.01",
    "trainer.learning_rate=1e-2", "trainer.warmup_steps=3", "trainer.lr_scheduler_type=constant", "trainer.optim=adafactor",
    "trainer.gradient_accumulation_steps=2", "trainer.label_smoothing_factor=0.1", "trainer.neftune_noise_alpha=5",
    "trainer.bf16=true trainer.use_cpu=true", "trainer.accelerator_config={use_seedable_sampler:false}",
)  # fmt: skip
KEEPS = (  # every loss, bit for bit
    "trainer.full_determinism=true", "trainer.torch_empty_cache_steps=1", "trainer.skip_memory_metrics=false",
    "trainer.include_num_input_tokens_seen=all", "trainer.debug=underflow_overflow", "trainer.dataloader_in_order=false",
    "trainer.dataloader_pin_memory=false", "trainer.remove_unused_columns=false", "trainer.logging_nan_inf_filter=false",
    "trainer.use_cpu=true", "trainer.log_level=error", "trainer.prediction_loss_only=true", "trainer.save_total_limit=1",
    "trainer.use_cache=true", "trainer.average_tokens_across_devices=false", "trainer.logging_first_step=true",
)  # fmt: skip


@pytest.fixture
def history(glmtuner: Callable, tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    def run(*words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        done = glmtuner(*BASE, f"trainer.output_dir={folder}", *words)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        return lines, json.loads((folder / "metrics.json").read_text())

    return run


def losses(lines: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Loss and gradient norm of each step, and the losses of the evaluations."""
    return [(line["loss"], line["grad_norm"]) if "loss" in line else (line["eval_loss"],) for line in lines]


def test_fields_that_change_the_training(history: Callable) -> None:
    plain, _ = history()
    for case in CHANGES:
        lines, _ = history(*case.split())
        assert losses(lines) != losses(plain), case


def test_fields_that_keep_it(history: Callable) -> None:
    plain, metrics = history()
    for case in KEEPS:
        lines, more = history(*case.split())
        assert losses(lines) == losses(plain), case
        if "tokens_seen" in case:
            assert lines[3]["num_input_tokens_seen"] > lines[0]["num_input_tokens_seen"] > 0
        if "memory_metrics" in case:
            assert "train_mem_cpu_alloc_delta" in more.keys() - metrics.keys()


def test_fields_of_the_history(history: Callable) -> None:
    for case, steps in (
        ("trainer.logging_steps=2", [2, 4]), ("trainer.logging_steps=3 trainer.logging_first_step=true", [1, 3]),
        ("trainer.logging_strategy=no", []), ("trainer.max_steps=3", [1, 2, 3]),
    ):  # fmt: skip
        lines, _ = history(*case.split())
        assert [line["step"] for line in lines if "loss" in line] == steps, case
    for case, steps in (
        ("trainer.eval_strategy=steps trainer.eval_steps=1 trainer.eval_delay=3", [3, 4]),
        ("trainer.eval_strategy=steps trainer.eval_steps=2 trainer.eval_on_start=true", [0, 2, 4]),
    ):
        lines, _ = history(*case.split())
        assert sorted({line["step"] for line in lines if "eval_loss" in line}) == steps, case


def test_the_precision_of_an_evaluation(history: Callable) -> None:
    _, plain = history()
    for name, others in (("bf16_full_eval", ["trainer.use_cpu=true"]), ("fp16_full_eval", [])):
        _, metrics = history(f"trainer.{name}=true", *others)
        assert metrics["eval_loss"] != plain["eval_loss"]
        assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.01)


def test_checkpoints(glmtuner: Callable, tmp_path: Path) -> None:
    for number, (case, kept) in enumerate((
        ("trainer.save_strategy=steps trainer.save_steps=1 trainer.save_total_limit=2", [3, 4]),
        ("trainer.save_strategy=steps trainer.save_steps=1 trainer.save_total_limit=3", [2, 3, 4]),
        ("trainer.save_strategy=steps trainer.save_steps=1 trainer.save_total_limit=9", [1, 2, 3, 4]),
        ("trainer.save_strategy=steps trainer.save_steps=0.5", [2, 4]),
        ("trainer.save_strategy=best trainer.metric_for_best_model=loss trainer.eval_strategy=steps trainer.eval_steps=2 "
         "trainer.learning_rate=1e-3", [2, 4]),
        ("trainer.save_strategy=steps trainer.save_steps=2 trainer.eval_strategy=steps trainer.eval_steps=2 "
         "trainer.load_best_model_at_end=true trainer.greater_is_better=true", [2, 4]),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        done = glmtuner(*BASE, f"trainer.output_dir={folder}", *case.split())
        assert done.returncode == 0, done.stderr
        assert sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir()) == kept, case
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    first, last, of_the_result = (line["eval_loss"] for line in history if "eval_loss" in line)
    assert of_the_result == max(first, last) > min(first, last)
    greatest = 2 if first > last else 4
    best, same, other = (
        (folder / part / "adapter_model.safetensors").read_bytes()
        for part in ("adapter", f"checkpoints/checkpoint-{greatest}", f"checkpoints/checkpoint-{6 - greatest}")
    )
    assert best == same != other


def test_a_part_of_an_epoch_and_dropped_batches(history: Callable) -> None:
    """19 of 24 records are trained on: 10 batches of 2, the last of 1."""
    lines, _ = history("trainer.max_steps=-1", "trainer.num_train_epochs=0.5")
    assert lines[-2]["step"] == 5
    lines, metrics = history("trainer.max_steps=-1", "trainer.num_train_epochs=1")
    whole = max(line["step"] for line in lines)
    lines, _ = history(
        "trainer.max_steps=-1",
        "trainer.num_train_epochs=1",
        "trainer.dataloader_drop_last=true",
        "trainer.per_device_eval_batch_size=1",
    )
    assert max(line["step"] for line in lines) == whole - 1
    assert metrics["epoch"] == 1.0
