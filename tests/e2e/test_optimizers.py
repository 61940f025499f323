"""Every optimizer that is installed trains, and a run that was killed ends with the same bytes as an undisturbed one."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from json_lines import lines
from safetensors.torch import load_file

from glmtuner.config.optimizers import BITSANDBYTES, PACKAGES, SCHEDULE_FREE, SHORT_NAMES, WITHOUT_STATE
from glmtuner.config.trainer_arguments import OptimizerNames

WORDS = [
    "model=tiny_glm", "tracker=none", "data.dataset=alpaca_zh_sample", "data.max_samples=32", "data.max_target_length=24",
    "trainer.max_steps=6", "trainer.save_steps=3", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4",
    "trainer.learning_rate=1e-3", "trainer.weight_decay=0.01", "trainer.disable_tqdm=true", "trainer.output_dir=run",
]  # fmt: skip
NAMES = [name.value for name in OptimizerNames if name.value not in {*WITHOUT_STATE, *SHORT_NAMES}]
# Adam's and SGD's like are the many others' like; bitsandbytes has 15 that differ by the storage of their state
OFTEN = ["adamw_torch_fused", "muon", "sgd", "adafactor", "lion_8bit", "ademamix_8bit"]
WITH_PACKAGES = [
    name for name in NAMES if name in PACKAGES and name not in BITSANDBYTES and find_spec(PACKAGES[name][0]) is not None
]


def needs(name: str) -> list[str]:
    """What else to type with an optimizer."""
    if name.startswith(("galore", "apollo")):
        return ["trainer.optim_target_modules=all-linear", 'trainer.optim_args="rank=4,update_proj_gap=2"']
    if name in SCHEDULE_FREE:
        return ["trainer.lr_scheduler_type=constant"]
    return ["trainer.max_grad_norm=0", "trainer.weight_decay=0", "finetuning=full"] if name == "lomo" else []


def resumed_is_undisturbed(glmtuner: Callable, folder: Path, *words: str) -> None:
    done = glmtuner(*WORDS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "run"
    weights = next(run.glob("adapter/*.safetensors"), None) or run / "model/model.safetensors"
    before, history = weights.read_bytes(), (run / "history.jsonl").read_bytes()
    (run / "metrics.json").unlink()
    shutil.rmtree(weights.parent)
    shutil.rmtree(run / "checkpoints/checkpoint-6")
    again = glmtuner(*WORDS, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from checkpoint-3" in again.stdout
    assert (run / "history.jsonl").read_bytes() == history
    assert weights.read_bytes() == before
    assert len({line["loss"] for line in lines(run / "history.jsonl")}) > 1


@pytest.mark.parametrize("name", [*OFTEN, *WITH_PACKAGES])
def test_resumes_bit_equal(glmtuner: Callable, tmp_path: Path, name: str) -> None:
    if name.endswith("8bit") and name.startswith("galore") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    resumed_is_undisturbed(glmtuner, tmp_path, f"trainer.optim={name}", *needs(name))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in OFTEN and (name in BITSANDBYTES or name not in PACKAGES)]
)
def test_the_others_resume_bit_equal(glmtuner: Callable, tmp_path: Path, name: str) -> None:
    resumed_is_undisturbed(glmtuner, tmp_path, f"trainer.optim={name}")


def test_rates_by_layer_resume_bit_equal_and_are_those_of_the_formula(glmtuner: Callable, tmp_path: Path) -> None:
    words = ["finetuning=full", "trainer.layerwise_lr_decay=0.5", "trainer.optim=muon"]
    resumed_is_undisturbed(glmtuner, tmp_path, *words)
    rates = torch.load(tmp_path / "run/checkpoints/checkpoint-3/scheduler.pt", weights_only=True)["base_lrs"]
    layers = json.loads((tmp_path / "run/model/config.json").read_text())["num_hidden_layers"]
    assert {*rates} == {1e-3 * 0.5**power for power in range(layers + 2)}
    assert rates[0] == 1e-3  # the logged one
    assert lines(tmp_path / "run/history.jsonl")[0]["learning_rate"] == 1e-3


def test_loraplus_resumes_bit_equal(glmtuner: Callable, tmp_path: Path) -> None:
    resumed_is_undisturbed(glmtuner, tmp_path, "finetuning.loraplus_lr_ratio=16")
    rates = torch.load(tmp_path / "run/checkpoints/checkpoint-3/scheduler.pt", weights_only=True)["base_lrs"]
    assert rates == [1e-3, 16e-3]


@pytest.mark.skipif(find_spec("schedulefree") is None, reason="needs schedulefree")
def test_a_schedule_free_run_ends_saves_and_evaluates_with_the_averaged_weights(
    glmtuner: Callable, tmp_path: Path
) -> None:
    words = ["trainer.optim=schedule_free", "trainer.lr_scheduler_type=constant", "trainer.warmup_ratio=0.5"]
    done = glmtuner(
        *WORDS,
        *words,
        "data.dev_ratio=0.2",
        "trainer.do_eval=true",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=6",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    last = load_file(run / "checkpoints/checkpoint-6/adapter_model.safetensors")
    result = load_file(run / "adapter/adapter_model.safetensors")
    assert all(torch.equal(last[name], result[name]) for name in result)
    in_training = [line["eval_loss"] for line in lines(run / "history.jsonl") if "eval_loss" in line]
    assert in_training[0] == in_training[-1] == json.loads((run / "metrics.json").read_text())["eval_loss"]
    saved = torch.load(run / "checkpoints/checkpoint-6/optimizer.pt", weights_only=True)["param_groups"][0]
    assert saved["warmup_steps"] == 3 and saved["train_mode"] is False
