"""`model.rope_scaling` through whole runs: what a finished run computes is what PEFT and transformers compute with these positions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from glmtuner.cli.main import main
from glmtuner.config.compose import compose
from glmtuner.launch.build import finished_run
from glmtuner.run_folder.saved_config import read_config

BASE = Path(__file__).parent.parent.parent / "glmtuner/assets/tiny_glm"
LINEAR = {"rope_type": "linear", "factor": 3.0}
TYPED = "model.rope_scaling={rope_type: linear, factor: 3.0}"
SHORT = (
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=8", "data.max_target_length=16", "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-2", "trainer.disable_tqdm=true", "trainer.output_dir=run",
)  # fmt: skip
IDS = torch.arange(5, 105)[None]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS).logits


def scaled_base(folder: Path) -> Path:
    """The shipped model with the parameters in its config.json, which plain transformers reads."""
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= LINEAR
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_is_trained_loaded_and_exported_with_it(here, capsys):
    assert main([*SHORT, "finetuning=lora", TYPED]) == 0
    assert read_config(here / "run/config.yaml").model.rope_scaling == LINEAR
    base = AutoModelForCausalLM.from_pretrained(scaled_base(here / "base"), dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, here / "run/adapter"))
    torch.testing.assert_close(logits(finished_run([here / "run"], []).model), expected, rtol=1e-4, atol=1e-4)
    without = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(without, here / "run/adapter")) - expected).abs().max() > 0.1

    assert main(["export", "run", "--to", "out", "--dtype", "float32"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(here / "out")
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)
    length = json.loads((BASE / "config.json").read_text())["max_position_embeddings"]
    assert exported.config.max_position_embeddings == 3 * length

    # an adapter of another run on the exported model: its positions are in config.json, the adapter's own in its run
    assert main(["export", "out", "run", "--to", "twice", "--dtype", "float32"]) == 0
    again = AutoModelForCausalLM.from_pretrained(here / "twice").config
    assert again.rope_parameters == exported.config.rope_parameters
    assert again.max_position_embeddings == 3 * length

    # a model that is typed beside the checkpoint does not take the positions away
    words = ["trainer=predict", "model.checkpoint_dir=run", "tracker=none", "data.dataset=belle_sample"]
    assert compose([*words, "model=tiny_glm"]).run.model.rope_scaling == LINEAR
    capsys.readouterr()
    other = "model.rope_scaling={rope_type: linear, factor: 2.0}"
    assert compose([*words, other]).run.model.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert f"{other}, as typed: run was trained with {TYPED}" in capsys.readouterr().err


def test_a_whole_model_has_it_in_its_own_config(here):
    assert main([*SHORT, "finetuning=full", TYPED]) == 0
    alone = AutoModelForCausalLM.from_pretrained(here / "run/model", dtype=torch.float32)
    assert {name: alone.config.rope_parameters[name] for name in LINEAR} == LINEAR
    torch.testing.assert_close(logits(finished_run([here / "run"], []).model), logits(alone), rtol=1e-4, atol=1e-4)


def test_a_run_is_not_resumed_on_other_positions(here, capsys):
    assert main([*SHORT, "finetuning=lora", TYPED]) == 0
    further = ("trainer.max_steps=4", "trainer.resume_from_checkpoint=run", "trainer.output_dir=more")
    assert main([*SHORT, "finetuning=lora", *further]) == 2
    assert "model.rope_scaling" in capsys.readouterr().err


def test_a_wrong_value_ends_the_run_before_its_data_are_read(here, capsys):
    assert main([*SHORT, "model.rope_scaling={rope_type: linear, factor: 0.5}"]) == 2
    out, err = capsys.readouterr()
    assert (
        "model.rope_scaling={rope_type: linear, factor: 0.5}" in err and "must be a float or int >= 1, got 0.5" in err
    )
    assert "dataset" not in out and not (here / "run").exists()
