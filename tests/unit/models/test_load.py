"""Of which class a checkpoint's model is loaded: one with towers keeps them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from zoo import MULTIMODAL, built, config_of, write_checkpoint

from glmtuner.config.compose import compose
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.full import Full
from glmtuner.launch.register import register_presets
from glmtuner.models.load import auto_class, load_model

torch.set_num_threads(1)
register_presets()


def loaded(folder: Path) -> Any:
    run = compose(["model=causal_lm", f"model.model_name_or_path={folder}", "model.dtype=float32"]).run
    return load_model(run.model, None, run.quant, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", sorted(MULTIMODAL.keys() - {"gemma4"}))
def test_a_checkpoint_with_towers_is_loaded_with_them(name: str, tmp_path: Path) -> None:
    model = loaded(write_checkpoint(name, tmp_path))
    (named,) = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["architectures"]
    assert type(model).__name__ == named
    plain = dict(built(name).named_parameters())
    assert {path: value.shape for path, value in model.named_parameters()} == {
        path: value.shape for path, value in plain.items()
    }


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "llava"])
def test_what_full_tuning_saves_has_the_tower_s_own_bytes(name: str, tmp_path: Path) -> None:
    """Also where AutoModelForCausalLM would load the model without its tower."""
    model = loaded(write_checkpoint(name, tmp_path / "base"))
    family = family_from_structure(model)
    method = Full(finetuning_type="full")
    method.attach(model, family)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1
    method.save(model, tmp_path / "saved")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "saved"))
    assert before.keys() == after.keys()
    same = {path for path, value in before.items() if torch.equal(value, after[path])}
    assert same == {path for path in before if "visual" in path or "vision" in path or "projector" in path}


@pytest.mark.parametrize(
    ("name", "named"), [("qwen3_5", "Qwen3_5ForCausalLM"), ("llama", "LlamaForCausalLM"), ("t5", "T5Model")]
)
def test_other_models_are_loaded_as_causal_lms(name: str, named: str) -> None:
    config = AutoConfig.for_model(name) if name == "t5" else config_of(name)
    config.architectures = [named]
    assert auto_class(config).__name__ == "AutoModelForCausalLM"
