"""Fine-tuning on int8 and int4 base weights, through the command line, on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from upstream import write_checkpoint

from glmtuner.cli.main import main

WORDS = [
    "tracker=none", "data.dataset=belle_sample", "data.max_samples=24", "data.max_target_length=24",
    "trainer.max_steps=12", "trainer.logging_steps=3", "trainer.disable_tqdm=true",
    "trainer.per_device_train_batch_size=8",
]  # fmt: skip


METHODS = {
    "lora": ["finetuning=lora", "finetuning.lora_target=all", "trainer.learning_rate=2e-2"],
    "p_tuning": ["finetuning=p_tuning", "finetuning.pre_seq_len=8", "trainer.learning_rate=1.0"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_words(model: str, upstream_files: Path) -> list[str]:
    if model == "tiny_glm":
        return ["model=tiny_glm"]
    write_checkpoint(model, Path("base"), upstream_files)
    return [f"model={model}", "model.model_name_or_path=base"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("model", ["tiny_glm", "chatglm_6b", "chatglm2_6b"])
def test_a_quantized_run_from_training_to_export(
    here: Path, upstream_files: Path, model: str, quant: str, method: str
) -> None:
    words = [*model_words(model, upstream_files), *WORDS, f"quant={quant}", *METHODS[method]]
    assert main([*words, "trainer.output_dir=run"]) == 0
    losses = [json.loads(line)["loss"] for line in (here / "run/history.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.95 * losses[0], losses
    common = ["model.checkpoint_dir=run", "tracker=none", "data.dataset=belle_sample", "data.max_samples=6"]
    common += ["data.max_target_length=24", "trainer.disable_tqdm=true"]
    assert main(["trainer=evaluate", *common, "trainer.output_dir=evaluated"]) == 0
    assert json.loads((here / "evaluated/metrics.json").read_text())["eval_loss"] < losses[0]
    assert f"quantization_bit: {quant.removeprefix('int')}" in (here / "evaluated/config.yaml").read_text()
    assert main(["trainer=predict", *common, "trainer.output_dir=predicted"]) == 0
    assert len((here / "predicted/predictions.jsonl").read_text().splitlines()) == 6
    assert main(["export", "run", "--to", "out", "--dtype", "float32"]) == 0
    receipt = json.loads((here / "out/export.json").read_text())
    assert receipt["drift"] < 1e-4 and receipt["same_greedy_answer"]


@pytest.mark.parametrize(
    ("words", "kind", "nested", "dtype"),
    [
        (["quant=int4"], "nf4", True, torch.float32),
        (["quant=int4", "quant.quantization_type=fp4"], "fp4", True, torch.float32),
        (["quant=int4", "quant.double_quantization=false", "trainer.bf16=true"], "nf4", False, torch.bfloat16),
        (["quant=int4", "model.dtype=bfloat16"], "nf4", True, torch.bfloat16),
    ],
)
def test_the_knobs_of_four_bits_reach_the_weights(
    words: list[str], kind: str, nested: bool, dtype: torch.dtype
) -> None:
    model = loaded(["model=tiny_glm", "data.dataset=belle_sample", "trainer.use_cpu=true", *words])
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) > 4
    for layer in layers:
        assert layer.weight.quant_type == kind and layer.weight.quant_state.nested is nested
        assert layer.compute_dtype == dtype and layer.weight.dtype == torch.uint8


@pytest.mark.parametrize(("quant", "layer"), [("int4", Linear4bit), ("int8", Linear8bitLt)])
@pytest.mark.parametrize("model", ["tiny_glm", "chatglm_6b", "chatglm2_6b"])
def test_projections_are_quantized_and_nothing_else(
    here: Path, upstream_files: Path, model: str, quant: str, layer: type
) -> None:
    words = [*model_words(model, upstream_files), "data.dataset=belle_sample", f"quant={quant}"]
    base = loaded([*words, "finetuning=none", "trainer=evaluate"])
    heads = ("lm_head", "output_layer")
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, layer) is not name.endswith(heads), name
    for name, parameter in base.named_parameters():
        if "embed" in name or "norm" in name or any(head in name for head in heads):
            assert parameter.dtype in (torch.float32, torch.bfloat16, torch.float16), name


def loaded(words: list[str]) -> torch.nn.Module:
    """The model of a run, as it would be trained."""
    from glmtuner.config.compose import compose
    from glmtuner.families.hub import read_config
    from glmtuner.launch.build import load_trainable_model, resolve_family

    composed = compose(words)
    family, finetuning = resolve_family(composed.run, read_config(composed.run.model))
    return load_trainable_model(composed, finetuning, family, torch.device("cpu"))[0]
