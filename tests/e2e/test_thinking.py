"""Records with and without reasoning, learned by heart: what comes back from prediction, chat and an exported folder."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glmtuner.cli.main import main
from glmtuner.config.paths import ASSETS
from glmtuner.run_folder.folder import RunFolder

# in the manner of Qwen3: a thought in the last answer, none in earlier ones, and a stop token that is not the tokenizer's end
SOURCE = """\
{%- for m in messages -%}
{%- set thought = '' -%}{%- set content = m.content -%}
{%- if m.role == 'assistant' and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set content = content.split('</think>')[-1].strip() -%}
{%- endif -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' and loop.last %}<think>{{ thought }}</think>{% endif %}{{ content }}
{%- if m.role == 'assistant' %}<eop>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif -%}
"""
RECORDS = [
    [("user", "1+1?"), ("assistant", "two")],
    [("user", "name?"), ("assistant", "Tiny"), ("user", "age?"), ("assistant", "five days")],
    [("user", "hard?"), ("assistant", "<think>hm, 6*7</think>forty-two")],
]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = SOURCE
    tokenizer.save_pretrained("base")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ASSETS / "tiny_glm", vocab_size=len(tokenizer), num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    lines = [{"messages": [{"role": role, "content": text} for role, text in record]} for record in RECORDS]
    Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = (
        "model.model_name_or_path=base", "model.family=auto", "model.template=tokenizer", "data.dataset=data.jsonl",
        "finetuning=full", "trainer.max_steps=60", "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=1", "trainer.output_dir=run", "trainer.disable_tqdm=true", "tracker=none",
    )  # fmt: skip
    assert main([*words]) == 0
    return tmp_path / "run"


def test_what_was_learned_comes_back(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert RunFolder(trained).provenance()["thinking"] == "off"  # of two records in three
    assert (
        main(
            ["trainer=predict", f"model.checkpoint_dir={trained}", "data.dataset=data.jsonl", "trainer.output_dir=pred"]
        )
        == 0
    )
    lines = [json.loads(line) for line in Path("pred/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["predict"] for line in lines] == ["two", "five days", "<think>hm, 6*7</think>forty-two"]
    assert all(line["predict"] == line["reference"] for line in lines)

    for mode, question, answer in (("auto", "1+1?", "two"), ("on", "hard?", "forty-two")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        capsys.readouterr()
        assert main(["chat", str(trained), "generation=greedy", f"generation.thinking={mode}"]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert answer in shown and ("(thinking) hm, 6*7" in shown) == (mode == "on")

    assert main(["export", str(trained), "--to", "out"]) == 0
    tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
    assert tokenizer.chat_template.strip() == SOURCE.strip()
    assert tokenizer.convert_tokens_to_ids("<eop>") in model.generation_config.eos_token_id
    for (_, question), (_, answer) in (RECORDS[0], RECORDS[2]):
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            enable_thinking="<think>" in answer,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert tokenizer.decode(ids) == f"{answer}<eop>"
