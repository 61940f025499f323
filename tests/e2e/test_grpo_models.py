"""stage=grpo on quantized weights, with every kind of method, on ChatGLM, and on a model that thinks."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from json_lines import lines
from official_templates import official
from transformers import Qwen3Config, Qwen3ForCausalLM
from upstream import write_checkpoint

from glmtuner.cli.main import main
from glmtuner.config import plugins
from glmtuner.config.groups import SCHEMA_CLASSES

SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(3) for b in range(3)]
HEAVY = pytest.mark.heavy
RATES = {"lora": 2e-3, "freeze": 1e-3, "full": 5e-4, "p_tuning": 3e-2}


PLUGIN = """\
from glmtuner.config.rewards import reward_function

@reward_function("letters")
def letters(sampled):
    return len({*sampled.answer}) / 10
"""


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The word that loads a reward which tells any two answers apart."""
    (tmp_path / "own_letters.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugins=own_letters"
    SCHEMA_CLASSES["reward"].pop("letters", None)
    plugins._loaded.pop("own_letters", None)
    sys.modules.pop("own_letters", None)


def grpo(here: Path, *words: str, rounding: float = 2e-3) -> None:
    """Three steps through the command line, of which the first starts at the reference."""
    (here / "sums.json").write_text(json.dumps(SUMS), encoding="utf-8")
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main([
            "tracker=none", "stage=grpo", "reward=letters", "stage.num_generations=4",
            f"data.dataset={here / 'sums.json'}", "data.max_source_length=64", "data.max_target_length=8",
            "trainer.per_device_train_batch_size=3", "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.disable_tqdm=true",
            *words, f"trainer.output_dir={here / 'run'}",
        ])  # fmt: skip
    assert code == 0, out.getvalue()
    found = lines(here / "run/history.jsonl")
    first, _, last = found
    assert first["kl"] == pytest.approx(0, abs=rounding), "the first answers are the reference's own"
    assert first["clip_fraction"] == 0 and first["entropy"] > 0 and first["grad_norm"] > 0
    assert last["kl"] != first["kl"]


@pytest.mark.parametrize(
    "method",
    ["lora+int4", "lora+int8", pytest.param("freeze", marks=HEAVY), pytest.param("full", marks=HEAVY), "p_tuning"],
)
def test_methods(tmp_path: Path, letters: str, method: str) -> None:
    method, _, quant = method.partition("+")
    words = [f"finetuning={method}", f"trainer.learning_rate={RATES[method]}", *([f"quant={quant}"] if quant else [])]
    # int8 rounds activations, too: a difference in the sixth digit becomes one in the third
    grpo(tmp_path, "model=tiny_glm", letters, *words, rounding=0.02 if quant == "int8" else 2e-3)
    kind = "adapter" if method in ("lora", "p_tuning") else "model"
    assert [*(tmp_path / "run" / kind).glob("*.safetensors")]


@pytest.mark.parametrize(
    ("preset", "quant"),
    [("chatglm_6b", "none"), ("chatglm2_6b", "none"), pytest.param("chatglm2_6b", "int4", marks=HEAVY)],
)
def test_chatglm(tmp_path: Path, letters: str, upstream_files: Path, preset: str, quant: str) -> None:
    write_checkpoint(preset, tmp_path / "base", upstream_files)
    model = [f"model={preset}", f"model.model_name_or_path={tmp_path / 'base'}", f"quant={quant}"]
    grpo(tmp_path, *model, letters, "trainer.learning_rate=1e-2")


def test_a_thought_is_part_of_the_answer(tmp_path: Path, shared: Path | None) -> None:
    """A small Qwen3 behind its maker's template: its prompt asks for a thought, which only reward=format looks at."""
    template = official(shared, "qwen3")
    thought = [
        {"messages": [
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "reasoning_content": "hm", "content": record["output"]},
        ]}
        for record in SUMS
    ]  # fmt: skip
    data = tmp_path / "thought.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in thought), encoding="utf-8")
    tokenizer = template.tokenizer([data.read_text(encoding="utf-8"), template.source])
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    base = f"model.model_name_or_path={tmp_path / 'base'}"
    model = [base, "model.family=auto", "model.template=tokenizer", "finetuning=full"]
    common = ["tracker=none", f"data.dataset={data}", "trainer.disable_tqdm=true", "data.max_target_length=24"]
    sft = [
        "trainer.max_steps=60",
        "trainer.learning_rate=5e-3",
        "trainer.per_device_train_batch_size=9",
        "trainer.gradient_accumulation_steps=1",
    ]
    assert main([*common, *model, *sft, f"trainer.output_dir={tmp_path / 'sft'}"]) == 0
    words = [
        "stage=grpo", "reward=[format,number]", "stage.temperature=0.5", "stage.num_generations=4", "trainer.per_device_train_batch_size=3",
        "trainer.max_steps=1", "trainer.learning_rate=1e-6", f"model.checkpoint_dir={tmp_path / 'sft'}",
    ]  # fmt: skip
    assert main([*common, *model, *words, f"trainer.output_dir={tmp_path / 'run'}"]) == 0
    sampled = lines(tmp_path / "run/sampled.jsonl")
    formed = [line for line in sampled if line["answer"].startswith("<think>\nhm\n</think>")]
    assert len(formed) >= 2 and all(line["reward_format"] == 1 for line in formed)
    for line in sampled:
        said = line["answer"].partition("</think>")[2].split()
        assert line["reward_number"] == float(bool(said) and said[-1] == line["label"].split()[-1])
