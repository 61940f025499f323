"""`--check` against what runs measure, and gradient checkpointing that a run turns on by itself."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

ASSET = Path(__file__).parents[2] / "glmtuner/assets/tiny_glm"
LONG = "一二三四五六七八九十" * 60
WORDS = ("model=tiny_glm", "tracker=none", "data.dataset_dir=data", "data.dataset=long.json")
LENGTHS = ("data.max_source_length=512", "data.max_target_length=512")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records whose rows are as long as rows may be."""
    (tmp_path / "data").mkdir()
    rows = [{"instruction": LONG * 2, "output": LONG * 2}] * 16
    (tmp_path / "data" / "long.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def value(told: str, name: str) -> str:
    return re.search(rf"│ {name} +│ ([^│]*?) +│", told).group(1)


def test_the_check_tells_what_a_run_measures_and_writes_nothing(glmtuner_process, records):
    words = (*WORDS, *LENGTHS, "finetuning=lora", "trainer.per_device_train_batch_size=4")
    told = glmtuner_process("--check", *words, "budget.forecast=false")
    assert told.returncode == 0, told.stderr
    assert [path.name for path in records.iterdir()] == ["data"]
    done = glmtuner_process(*words, "trainer.max_steps=2", "trainer.save_strategy=no", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((records / "run" / "metrics.json").read_text())
    assert value(told.stdout, "parameters") == f"{metrics['total_parameters']:,}"
    assert value(told.stdout, "trained") == f"{metrics['trained_parameters']:,}"
    peak = float(value(told.stdout, "peak").removesuffix(" GiB"))
    assert peak == pytest.approx(metrics["peak_memory_gib"], rel=0.15)
    assert re.search("^fits: ", told.stdout, re.MULTILINE)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_check_tells_what_a_mixture_of_experts_measures(glmtuner_process, records):
    """GLM-4.7-Flash's structure, 11 million parameters, in float32."""
    torch.manual_seed(0)
    config = Glm4MoeLiteConfig(
        vocab_size=3000, hidden_size=192, intermediate_size=512, moe_intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=24, num_experts_per_tok=4, q_lora_rank=64, kv_lora_rank=64,
        qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=[0, 7, 9],
    )  # fmt: skip
    Glm4MoeLiteForCausalLM(config).save_pretrained(records / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, records / "moe" / name)
    words = ("model=causal_lm", f"model.model_name_or_path={records / 'moe'}", "model.dtype=float32", *WORDS[1:], *LENGTHS,
             "finetuning=lora", "trainer.per_device_train_batch_size=2", "trainer.use_cpu=true")  # fmt: skip
    told = glmtuner_process("--check", *words, "budget.forecast=false")
    assert told.returncode == 0, told.stderr
    done = glmtuner_process(*words, "trainer.max_steps=2", "trainer.save_strategy=no", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((records / "run" / "metrics.json").read_text())
    assert value(told.stdout, "parameters") == f"{metrics['total_parameters']:,}"
    assert "a token, without embeddings" in told.stdout
    peak = float(value(told.stdout, "peak").removesuffix(" GiB"))
    assert peak == pytest.approx(metrics["peak_memory_gib"], rel=0.15)


def test_what_surely_does_not_fit_is_refused_in_one_paragraph(glmtuner, monkeypatch):
    monkeypatch.setattr("glmtuner.launch.memory_check.device_memory", lambda device: 2**26)
    told = glmtuner("--check", "model=tiny_glm", "tracker=none")
    assert told.returncode == 2
    assert "does not fit" in told.stderr and "quant=int4" in told.stderr and len(told.stderr.splitlines()) == 1


def test_a_wrong_word_is_answered_before_anything_is_estimated(glmtuner):
    told = glmtuner("--check", "model=tiny_glm", "finetuning.lora_rnk=4")
    assert told.returncode == 2 and "lora_rank" in told.stderr
    told = glmtuner("--chek", "model=tiny_glm")
    assert told.returncode == 2 and "--check" in told.stderr
    told = glmtuner("--check", "model=tiny_glm", "trainer=evaluate")
    assert told.returncode == 2 and "trainer=train" in told.stderr


@pytest.mark.parametrize(
    "typed", [(), ("trainer.gradient_checkpointing=false",), ("trainer.activation_checkpointing=false",)]
)
def test_a_run_checkpoints_where_its_longest_batch_would_not_fit(glmtuner, monkeypatch, records, typed):
    monkeypatch.setattr("glmtuner.launch.memory_check.device_memory", lambda device: 2**26)
    monkeypatch.setattr("glmtuner.launch.memory_check.process_baseline_bytes", lambda device, tracker: 0)
    done = glmtuner(*WORDS, *typed, "trainer.max_steps=1", "trainer.output_dir=run", "data.max_samples=8",
                    "trainer.per_device_train_batch_size=2", "data.max_source_length=256", "data.max_target_length=256")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("gradient checkpointing is on" in done.stdout) is not bool(typed)
