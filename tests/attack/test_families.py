"""Methods on a tiny model of each architecture that a preset names: what each saved is read again, or it is one paragraph.

Losses, gradients and exports of adapters are compared for these and many other architectures in tests/architectures.
"""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from family_models import CONFIGS, write_model
from json_lines import lines

PRESETS = {"glm": "glm4_9b_chat_hf", "glm4": "glm4_9b_0414", "glm4_moe": "glm4_7", "glm4_moe_lite": "glm4_7_flash", "glm_moe_dsa": "glm5"}  # fmt: skip
METHODS = {
    "experts": "finetuning.lora_target=gate_proj,up_proj,down_proj finetuning.lora_dropout=0",
    "down": "finetuning.lora_target=down_proj finetuning.lora_dropout=0",
    "freeze": "finetuning=freeze finetuning.num_layer_trainable=1",
    "qkv": "finetuning=freeze finetuning.num_layer_trainable=-1 finetuning.name_module_trainable=qkv",
    "full": "finetuning=full",
    "p_tuning": "finetuning=p_tuning finetuning.pre_seq_len=3",
}
COMMON = (
    "tracker=none", "data.dataset=identity_sample", "data.max_samples=6", "trainer.disable_tqdm=true",
    "generation.max_new_tokens=5",
)  # fmt: skip


def refused(model_type: str, method: str) -> str | None:
    """Part of the paragraph where the architecture has nothing for the method to train."""
    if method == "experts" and "n_routed_experts" not in CONFIGS[model_type]:
        return "no layer of this model is named 'gate_proj'"
    return None


EXPORTED = [
    (model_type, method)
    for model_type in CONFIGS
    for method in ("experts", "full")
    if refused(model_type, method) is None
]


def train(glmtuner: Callable, folder: Path, model_type: str, method: str, *words: str) -> CompletedProcess[str]:
    write_model(model_type, folder / "base")
    return glmtuner(
        f"model={PRESETS[model_type]}", "model.model_name_or_path=base", *COMMON, "trainer.max_steps=2",
        f"trainer.learning_rate={'0.3' if method == 'p_tuning' else '1e-2'}", "trainer.output_dir=run", *METHODS[method].split(), *words,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_method(glmtuner: Callable, tmp_path: Path, model_type: str, method: str) -> None:
    done = train(
        glmtuner, tmp_path, model_type, method, "data.eval_dataset=identity_sample", "trainer.logging_steps=1",
        "trainer.do_predict=true", "trainer.predict_with_generate=true",
    )  # fmt: skip
    told = refused(model_type, method)
    assert (done.returncode, "Traceback" in done.stderr) == (2 if told else 0, False), done.stdout + done.stderr
    if told:
        assert told in done.stderr
        return
    first, second = (line["loss"] for line in lines(tmp_path / "run/history.jsonl")[:2])
    assert second < first
    again = glmtuner("trainer=predict", "model.checkpoint_dir=run", *COMMON, "trainer.output_dir=predicted")
    assert again.returncode == 0, again.stdout + again.stderr
    assert lines(tmp_path / "predicted/predictions.jsonl") == lines(tmp_path / "run/predictions.jsonl")


@pytest.mark.parametrize(("model_type", "method"), EXPORTED)
def test_export_of_a_method(glmtuner: Callable, tmp_path: Path, model_type: str, method: str) -> None:
    """The exported folder is reloaded and compared with the run by `export` itself."""
    done = train(glmtuner, tmp_path, model_type, method)
    assert done.returncode == 0, done.stdout + done.stderr
    exported = glmtuner("export", "run", "--to", "exported")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "the same greedy answer" in exported.stdout
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert config["model_type"] == model_type
