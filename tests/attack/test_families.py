"""Every method on a tiny model of each architecture that a preset names: it trains and predicts again, or is one paragraph."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from family_models import CONFIGS, write_model

PRESETS = {"glm": "glm4_9b_chat_hf", "glm4": "glm4_9b_0414", "glm4_moe": "glm4_7", "glm4_moe_lite": "glm4_7_flash", "glm_moe_dsa": "glm5"}  # fmt: skip
METHODS = {
    "lora": "",
    "all": "finetuning.lora_target=all",
    "experts": "finetuning.lora_target=gate_proj,up_proj,down_proj finetuning.lora_dropout=0",
    "down": "finetuning.lora_target=down_proj finetuning.lora_dropout=0",
    "freeze": "finetuning=freeze finetuning.num_layer_trainable=1",
    "qkv": "finetuning=freeze finetuning.num_layer_trainable=-1 finetuning.name_module_trainable=qkv",
    "full": "finetuning=full",
    "p_tuning": "finetuning=p_tuning finetuning.pre_seq_len=3",
    "packing": "data.packing=true",
    "padded": "data.padding_free=false",
    "bfloat16": "model.dtype=bfloat16",
    "checkpointing": "trainer.gradient_checkpointing=true",
}
COMMON = ("tracker=none", "data.max_samples=6", "trainer.disable_tqdm=true", "generation.max_new_tokens=5")


def refused(model_type: str, method: str) -> str | None:
    """Part of the paragraph where the architecture has nothing for the method to train."""
    if method == "p_tuning" and "kv_lora_rank" in CONFIGS[model_type]:
        return "has multi-head latent attention"
    if method == "experts" and "n_routed_experts" not in CONFIGS[model_type]:
        return "no linear layer is named 'gate_proj'"
    return None


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_method(glmtuner: Callable, tmp_path: Path, model_type: str, method: str) -> None:
    write_model(model_type, tmp_path / "base")
    done = glmtuner(
        f"model={PRESETS[model_type]}", "model.model_name_or_path=base", *COMMON, "data.dataset=identity_sample",
        "data.eval_dataset=identity_sample", "trainer.max_steps=2", "trainer.logging_steps=1", "trainer.do_predict=true",
        "trainer.predict_with_generate=true", "trainer.learning_rate=1e-2", "trainer.output_dir=run", *METHODS[method].split(),
    )  # fmt: skip
    told = refused(model_type, method)
    assert (done.returncode, "Traceback" in done.stderr) == (2 if told else 0, False), done.stdout + done.stderr
    if told:
        assert told in done.stderr
        return
    first, second = (line["loss"] for line in lines(tmp_path / "run/history.jsonl")[:2])
    assert second < first
    again = glmtuner(
        "trainer=predict",
        "model.checkpoint_dir=run",
        *COMMON,
        "data.dataset=identity_sample",
        "trainer.output_dir=predicted",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert lines(tmp_path / "predicted/predictions.jsonl") == lines(tmp_path / "run/predictions.jsonl")


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "experts", "full"])
def test_export_of_a_method(glmtuner: Callable, tmp_path: Path, model_type: str, method: str) -> None:
    """The exported folder is reloaded and compared with the run by `export` itself."""
    if refused(model_type, method):
        pytest.skip("the model has no experts")
    write_model(model_type, tmp_path / "base")
    done = glmtuner(
        f"model={PRESETS[model_type]}", "model.model_name_or_path=base", *COMMON, "data.dataset=identity_sample",
        "trainer.max_steps=2", "trainer.learning_rate=1e-2", "trainer.output_dir=run", *METHODS[method].split(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    exported = glmtuner("export", "run", "--to", "exported")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "the same greedy answer" in exported.stdout
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["model_type"] == model_type
