"""LoRA on int8 and int4 base weights, through the command line, on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_lora_on_quantized_weights_lowers_the_loss_and_is_evaluated(
    glmtuner: Callable, tmp_path: Path, quant: str
) -> None:
    done = glmtuner(
        "model=tiny_glm", f"quant={quant}", "tracker=none", "data.dataset=belle_sample", "data.max_samples=40",
        "trainer.max_steps=12", "trainer.logging_steps=3", "trainer.learning_rate=3e-3", "trainer.output_dir=run",
        "trainer.disable_tqdm=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    again = glmtuner(
        "trainer=evaluate", "model.checkpoint_dir=run", "tracker=none", "data.dataset=belle_sample", "data.max_samples=40",
        "trainer.output_dir=evaluated",
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((tmp_path / "evaluated/metrics.json").read_text())["eval_loss"] < losses[0]
    assert f"quantization_bit: {quant.removeprefix('int')}" in (tmp_path / "evaluated/config.yaml").read_text()
