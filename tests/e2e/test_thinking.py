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
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an untrained model; the records lie beside it, and the test runs there."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_glm")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = SOURCE
    tokenizer.save_pretrained("base")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ASSETS / "tiny_glm", vocab_size=len(tokenizer), num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    write("data.jsonl", RECORDS)
    return tmp_path / "base"


def write(name: str, records: list[list[tuple[str, str]]]) -> None:
    lines = [{"messages": [{"role": role, "content": text} for role, text in record]} for record in records]
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train(*more: str) -> Path:
    """The folder of a run that has learned the records by heart."""
    words = (
        "model.model_name_or_path=base", "model.family=auto", "model.template=tokenizer", "data.dataset=data.jsonl",
        "finetuning=full", "trainer.max_steps=60", "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4",
        "trainer.gradient_accumulation_steps=1", "trainer.output_dir=run", "trainer.disable_tqdm=true", "tracker=none",
    )  # fmt: skip
    assert main([*words, *more]) == 0
    return Path("run").resolve()


def predicted(run: Path, *more: str) -> list[dict[str, str]]:
    """The lines of predictions.jsonl."""
    words = ["trainer=predict", f"model.checkpoint_dir={run}", "trainer.output_dir=pred", "tracker=none"]
    assert main([*words, "data.dataset=data.jsonl", *more]) == 0
    return [json.loads(line) for line in Path("pred/predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def trained(base: Path) -> Path:
    return train()


def test_what_was_learned_comes_back(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert RunFolder(trained).provenance()["thinking"] == "off"  # of two records in three
    lines = predicted(trained)
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


def test_records_without_a_thought_are_asked_in_the_only_mode_of_the_training(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = RECORDS[2]
    write("thoughts.jsonl", [thought])
    write("data.jsonl", [[thought[0], ("assistant", "forty-two")]])
    # more records without a thought than with one, which are not trained
    write("plain.jsonl", [[("user", f"{number}?"), ("assistant", "x")] for number in range(3)])
    run = train("data.dataset=thoughts.jsonl", "data.eval_dataset=plain.jsonl", "trainer.do_eval=true")
    plan = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "predictions with thinking on, chat and serve with thinking on" in plan
    assert RunFolder(run).provenance()["thinking"] == "on"
    (line,) = predicted(run)
    assert (line["predict"], line["reference"]) == ("<think>hm, 6*7</think>forty-two", "forty-two")
    assert (line["answer"], line["reasoning"]) == ("forty-two", "hm, 6*7")
    (line,) = predicted(run, "generation.thinking=off", "trainer.overwrite_output_dir=true")
    assert line["predict"] != "<think>hm, 6*7</think>forty-two"


def test_a_prediction_renders_its_records_as_the_training_did(base: Path) -> None:
    run = train("data.thinking=empty")
    assert RunFolder(run).provenance()["thinking"] == "on"
    lines = predicted(run)
    assert [line["predict"] for line in lines] == [
        "<think></think>two", "<think></think>five days", "<think>hm, 6*7</think>forty-two"
    ]  # fmt: skip
    assert all(line["predict"] == line["reference"] for line in lines)
    assert RunFolder(Path("pred")).config().data.thinking == "empty"
