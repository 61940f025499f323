"""`export` of every initialization of LoRA and of PEFT's other methods: the folder, in plain transformers, has the logits of plain PEFT."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from glmtuner.cli.main import main
from glmtuner.config.paths import ASSETS

SHORT = (
    "model=tiny_glm", "tracker=none", "metric=none", "data.dataset=belle_sample", "data.max_samples=16", "data.max_target_length=16",
    "trainer.max_steps=4", "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-2", "trainer.disable_tqdm=true",
    "trainer.save_strategy=no",
)  # fmt: skip
INITIALIZATIONS = ("true", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva", "mica")
IDS = torch.randint(4, 200, (2, 24), generator=torch.Generator().manual_seed(5))


def cases() -> list:
    """The name of a case with the words of its command line; the first ones are quick enough for the default suite."""
    path = Path(__file__).parent.parent.parent / "scripts/method_table.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    found = {name: table.rows()[name][0] for name in table.PAPERS if name != "LILY"}  # which cannot be merged
    found["ADALORA"] = [*found["ADALORA"][:2], "finetuning.config={init_r: 4, target_r: 2}"]  # a schedule of four steps
    for word in INITIALIZATIONS:
        quant = ["quant=int4"] if word == "loftq" else []
        found[word] = ["finetuning=lora", f"finetuning.init_lora_weights={word}", "finetuning.lora_target=[q_proj,down_proj]", *quant]  # fmt: skip
    quick = ("eva", "ADALORA", "VERA")
    return [pytest.param(words, id=name, marks=() if name in quick else pytest.mark.heavy) for name, words in found.items()]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", cases())
def test_the_exported_model_has_the_logits_of_plain_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, *words, "trainer.output_dir=run"]) == 0
    assert main(["export", "run", "--to", "exported", "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "exported/export.json").read_text())["drift"] < 1e-4
    base, exported = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (ASSETS / "tiny_glm", tmp_path / "exported")
    )
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        config = PeftConfig.from_pretrained(tmp_path / "run/adapter")
        adapted = PeftModel.from_pretrained(base, tmp_path / "run/adapter", config=config).eval()
        wanted = adapted(input_ids=IDS).logits
        found = exported(input_ids=IDS).logits
    assert (wanted - plain).abs().max() > 1e-3
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
