"""data.new_tokens through the command line: trained, resumed, predicted, exported, and read by plain transformers and PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from json_lines import lines
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upstream import write_checkpoint

from glmtuner.cli.main import main
from glmtuner.config.paths import model_source

TOKENS = ["<实体>", "[rel]"]
RECORDS = [
    {"instruction": "<实体>是什么？", "input": "", "output": "<实体>是[rel]的一种"},
    {"instruction": "解释[rel]", "input": "", "output": "[rel]等于<实体>再加"},
    {"instruction": "你好<实体>世界", "input": "", "output": "好的 <实体>，[rel]"},
    {"instruction": "hi", "input": "", "output": "[rel]<实体>"},
]
WORDS = [
    "tracker=none", "data.dataset=facts.json", 'data.new_tokens=["<实体>","[rel]"]', "data.max_target_length=16",
    "trainer.max_steps=12", "trainer.save_steps=6", "trainer.logging_steps=3", "trainer.learning_rate=2e-2",
    "trainer.disable_tqdm=true", "trainer.output_dir=run", "data.eval_dataset=facts.json", "trainer.do_predict=true",
    "trainer.predict_with_generate=true",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(model: str, here: Path, upstream_files: Path) -> tuple[list[str], Path]:
    """What names the model, and the folder of its files."""
    if model == "tiny_glm":
        return ["model=tiny_glm"], Path(model_source("package://tiny_glm"))
    write_checkpoint(model, here / "base", upstream_files)
    return [f"model={model}", "model.model_name_or_path=base"], here / "base"


def resumed_and_read_again(glmtuner: Callable, here: Path, words: list[str]) -> None:
    """Killed and resumed, the run ends with the same bytes; its folder alone gives the same answers."""
    before, answers = (
        (here / "run/adapter/adapter_model.safetensors").read_bytes(),
        lines(here / "run/predictions.jsonl"),
    )
    (here / "run/metrics.json").unlink()
    shutil.rmtree(here / "run/adapter")
    shutil.rmtree(here / "run/checkpoints/checkpoint-12")
    again = glmtuner(*words, *WORDS)
    assert again.returncode == 0 and "resumed from checkpoint-6" in again.stdout, again.stdout + again.stderr
    assert (here / "run/adapter/adapter_model.safetensors").read_bytes() == before
    again = glmtuner(
        "trainer=predict",
        "model.checkpoint_dir=run",
        "data.dataset=facts.json",
        "tracker=none",
        "trainer.output_dir=p",
        "data.max_target_length=16",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["predict"] for line in lines(here / "p/predictions.jsonl")] == [line["predict"] for line in answers]


@pytest.mark.parametrize("model", ["tiny_glm", "chatglm2_6b", "chatglm_6b"])
def test_lora_trains_the_new_rows_alone(glmtuner: Callable, here: Path, upstream_files: Path, model: str) -> None:
    words, base = words_of(model, here, upstream_files)
    done = glmtuner(*words, *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.new_tokens: 2 tokens (<实体>, [rel])" in done.stdout
    losses = [line["loss"] for line in lines(here / "run/history.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    adapter = load_file(here / "run/adapter/adapter_model.safetensors")
    rows = {name: value for name, value in adapter.items() if "lora_" not in name}
    untied = model == "chatglm2_6b"
    assert len(rows) == 1 + untied and all(
        value.shape[0] == 2 and "trainable_tokens_delta" in name for name, value in rows.items()
    )
    if model == "tiny_glm":
        resumed_and_read_again(glmtuner, here, words)
    # plain transformers and PEFT: the adapter's own tokenizer, and a base with as many rows
    tokenizer = AutoTokenizer.from_pretrained(here / "run/adapter")
    ids = tokenizer("你好<实体>[rel]世界", add_special_tokens=model == "chatglm_6b").input_ids
    new = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert {*new} <= {*ids} and len({*new}) == 2
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if max(new) >= plain.get_input_embeddings().weight.shape[0]:
        plain.resize_token_embeddings(max(new) + 1)
    theirs = PeftModel.from_pretrained(plain, here / "run/adapter").eval()
    row = torch.tensor([ids])
    with torch.no_grad():
        expected = theirs(input_ids=row, attention_mask=torch.ones_like(row)).logits
    assert main(["export", "run", "--to", "exported", "--dtype", "float32"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(here / "exported", dtype=torch.float32).eval()
    read = AutoTokenizer.from_pretrained(here / "exported")
    assert [read.convert_tokens_to_ids(token) for token in TOKENS] == new
    assert read("你好<实体>[rel]世界", add_special_tokens=model == "chatglm_6b").input_ids == ids
    with torch.no_grad():
        merged = exported(input_ids=row, attention_mask=torch.ones_like(row)).logits
    assert (merged - expected).abs().max() < 1e-4
    if model != "tiny_glm":
        return
    # an exported model is a base like any other: its tokens are there already, with the rows that they learned
    evaluates = [
        "trainer=evaluate",
        "finetuning=none",
        "data.dataset=facts.json",
        "tracker=none",
        "data.max_target_length=16",
    ]
    of_export = [
        *evaluates,
        "model=causal_lm",
        "model.model_name_or_path=exported",
        'data.new_tokens=["<实体>","[rel]"]',
    ]
    other = glmtuner(*of_export, "trainer.output_dir=other")
    assert other.returncode == 0, other.stdout + other.stderr
    assert "'<实体>' is one token of this tokenizer already" in other.stdout
    merged_run = glmtuner(*evaluates, "model.checkpoint_dir=run", "trainer.output_dir=merged")
    assert merged_run.returncode == 0, merged_run.stdout + merged_run.stderr
    found = [json.loads((here / name / "metrics.json").read_text())["eval_loss"] for name in ("other", "merged")]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_methods_that_save_a_model_save_its_rows(glmtuner: Callable, here: Path, method: str) -> None:
    done = glmtuner("model=tiny_glm", *WORDS, f"finetuning={method}", "trainer.learning_rate=1e-3")
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoModelForCausalLM.from_pretrained(here / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(here / "run/model")
    base = AutoModelForCausalLM.from_pretrained(model_source("package://tiny_glm")).get_input_embeddings().weight
    pieces = AutoTokenizer.from_pretrained(model_source("package://tiny_glm"))(
        "[rel]", add_special_tokens=False
    ).input_ids
    row = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("[rel]")]
    mean = base[pieces].mean(0)
    assert torch.allclose(row, mean, atol=1e-6) is (method == "freeze")
    assert ("finetuning=freeze does not train them" in done.stdout) is (method == "freeze")
    again = glmtuner(
        "trainer=predict",
        "model.checkpoint_dir=run",
        "data.dataset=facts.json",
        "tracker=none",
        "trainer.output_dir=p",
        "data.max_target_length=16",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["predict"] for line in lines(here / "p/predictions.jsonl")] == [
        line["predict"] for line in lines(here / "run/predictions.jsonl")
    ]
    more = glmtuner(
        "model.checkpoint_dir=run", *WORDS[:2], 'data.new_tokens=["<实体>","[rel]","<third>"]', "trainer.max_steps=2",
        "trainer.output_dir=more", "finetuning=lora",
    )  # fmt: skip
    assert more.returncode == 0, more.stdout + more.stderr
    wrong = glmtuner("model.checkpoint_dir=run", *WORDS[:2], "data.new_tokens=[x]", "trainer.output_dir=wrong")
    assert (
        wrong.returncode == 2
        and "the rows of its tokens come first; type data.new_tokens=[<实体>,[rel],…]" in wrong.stderr
    )
    merged = glmtuner(
        "trainer=evaluate",
        "finetuning=none",
        "model.checkpoint_dir=more",
        "data.dataset=facts.json",
        "trainer.output_dir=merged",
    )
    assert merged.returncode == 0, merged.stdout + merged.stderr


def test_tokens_in_a_sweep_and_more_of_them_on_an_adapter(glmtuner: Callable, here: Path) -> None:
    done = glmtuner(
        "-m",
        "model=tiny_glm",
        *WORDS[:2],
        "trainer.max_steps=2",
        "data.new_tokens=[aaa1],[aaa1,bbb2]",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path.parent for path in (here / "sweep").rglob("metrics.json"))
    assert len(folders) == 2
    start = [
        f"model.checkpoint_dir={folders[0]}",
        *WORDS[:2],
        "data.new_tokens=[aaa1,bbb2]",
        "trainer.max_steps=2",
        "trainer.output_dir=more",
    ]
    refused = glmtuner(*start)
    assert refused.returncode == 2 and "type model.resume_lora_training=false" in refused.stderr
    merged = glmtuner(*start, "model.resume_lora_training=false")
    assert merged.returncode == 0, merged.stdout + merged.stderr
