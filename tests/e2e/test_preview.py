"""`--preview`: the rows as they are trained, and the prompts as they are served, from a folder that holds no weights."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

from glmtuner.cli.options import ROWS
from glmtuner.config.paths import ASSETS

ROOT = Path(__file__).parent.parent.parent
MODEL = ("model.model_name_or_path=base", "model.family=auto", "tracker=none")
THINKS = """\
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}
{%- if m.role == 'assistant' %}<eop>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif -%}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """tiny_glm without its weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "tiny_glm" / name, folder / name)
    return folder


def write(path: Path, *records: object) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def objects(done) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(base: Path, turns: list[tuple[str, str]], **options) -> str:
    """The prompt that a server makes of the turns by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert isinstance(text, str)
    return text


def test_rows_of_each_dataset_from_a_folder_without_weights(base, tmp_path, glmtuner):
    done = glmtuner("--preview", *MODEL, "data.dataset=belle_sample,identity_sample")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("belle_sample, record ") == done.stdout.count("identity_sample, record ") == ROWS == 3
    assert "\x1b" not in done.stdout, "no colours where nobody looks at a terminal"
    assert "the tokenizer's chat template renders the same" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"base"}, "nothing is written"


def test_json_is_an_object_a_row_and_nothing_else(base, glmtuner):
    rows = objects(glmtuner("--preview", "2", "--json", *MODEL, "data.dataset=belle_sample,identity_sample"))
    assert [(row["dataset"], row["index"]) for row in rows] == [
        (name, index) for name in ("belle_sample", "identity_sample") for index in (0, 1)
    ]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in rows:
        assert row["differs"] is None and row["stop"] == "<|user|>"
        assert row["prompt"] + row["learned"] + row["stop"] == tokenizer.decode(row["input_ids"])
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == row["learned"] + row["stop"]
        assert row["served_prompt"] == row["prompt"]
    records = json.loads((ASSETS / "data/belle_sample.json").read_text(encoding="utf-8"))
    for row, record in zip(rows[:2], records, strict=False):
        question = record["instruction"] + (f"\n{record['input']}" if record.get("input") else "")
        assert row["served_prompt"] == expected(base, [("user", question)])
        assert row["learned"].strip() == record["output"]


def test_every_answer_of_a_conversation_and_rows_of_their_own(base, tmp_path, glmtuner):
    turns = [("user", "1+1?"), ("assistant", "two"), ("user", "2+2?"), ("assistant", "four")]
    write(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    (row,) = objects(glmtuner("--preview", "--json", *MODEL, "data.dataset=a.jsonl"))
    assert [text.strip() for text in row["learned"]] == ["two", "four"]
    assert row["served_prompt"] == row["prompt"] == expected(base, turns[:3])

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = THINKS
    tokenizer.save_pretrained(base)
    thought = {"role": "assistant", "content": "four", "reasoning_content": "2+2"}
    messages = [{"role": role, "content": text} for role, text in turns[:3]]
    write(tmp_path / "b.jsonl", {"messages": [*messages, thought]}, {"messages": messages[:2]})
    rows = objects(glmtuner("--preview", "--json", *MODEL, "model.template=tokenizer", "data.dataset=b.jsonl"))
    assert rows[0]["learned"] == "<think>2+2</think>four" and rows[1]["learned"] == "two"
    assert [row["learned"] for row in rows[0]["earlier"]] == ["two"], "behind the prompt without a thought"
    assert rows[0]["served_prompt"] == expected(base, turns[:3], enable_thinking=True)
    assert rows[1]["served_prompt"] == expected(base, turns[:1], enable_thinking=False)
    assert all(row["differs"] is None for row in (*rows, *rows[0]["earlier"]))
    words = ("model.template=tokenizer", "data.dataset=b.jsonl", "generation.thinking=on")
    rows = objects(glmtuner("--preview", "--json", *MODEL, *words))
    assert rows[1]["served_prompt"] == expected(base, turns[:1], enable_thinking=True) != rows[1]["prompt"]


def test_what_was_cut_is_shown_with_its_size(base, tmp_path, glmtuner):
    write(
        tmp_path / "long.jsonl",
        {"history": [["old question", "old answer"]], "instruction": "12345678 " * 9, "output": "87654321 " * 9},
    )
    words = (*MODEL, "data.dataset=long.jsonl", "data.max_source_length=20", "data.max_target_length=10")
    (row,) = objects(glmtuner("--preview", "--json", *words))
    dropped, end, answer, total = row["cut"]
    assert "2 old turns" in dropped and "old question" in dropped
    assert "at the end of a user turn" in end and "the end of the answer" in answer and "8765" in answer
    (whole,) = objects(glmtuner("--preview", "--json", *MODEL, "data.dataset=long.jsonl"))
    assert total == f"{len(whole['input_ids']) - len(row['input_ids'])} tokens in all"
    assert row["differs"] is None and "cut" not in whole
    shown = glmtuner("--preview", *words).stdout
    assert "\n  cut " in shown and "2 old turns" in shown


@pytest.mark.parametrize(
    ("stage", "dataset", "learned"),
    [
        (("stage=pt", "stage.block_length=32"), "text_sample", None),
        (("stage=dpo",), "preference_sample", "learned"),
        (("stage=rm",), "preference_sample", "learned"),
        (("stage=kto",), "feedback_sample", "learned"),
        (("stage=ppo", "model.reward_model=nowhere"), "feedback_sample", "nothing"),
        (("data.packing=true",), "belle_sample", "learned"),
    ],
)
def test_every_stage_that_has_rows(base, glmtuner, stage, dataset, learned):
    words = ("--preview", "2", *MODEL, *stage, f"data.dataset={dataset}")
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
    assert ("before they are packed" in done.stdout) == (stage == ("data.packing=true",))
    rows = objects(glmtuner("--json", *words))
    assert len(rows) == 2
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in rows:
        text = tokenizer.decode(row["input_ids"])
        if learned == "learned":
            assert row["prompt"] + row["learned"] + row["stop"] == text and row["differs"] is None
            assert row["served_prompt"] == row["prompt"]
        elif learned == "nothing":
            assert row["learned"] == [] and row["prompt"] == text == row["served_prompt"]
        else:
            assert row["prompt"] + row["learned"] == text and row["served_prompt"] is None
    if dataset == "preference_sample":
        assert all(tokenizer.decode(row["rejected_ids"]).startswith(row["prompt"]) for row in rows)
        assert all(row["rejected"] != row["learned"] for row in rows)
    assert ("is_desirable" in rows[0]) == (stage == ("stage=kto",))


def test_ids_on_request(base, glmtuner):
    words = (*MODEL, "data.dataset=identity_sample")
    (row,) = objects(glmtuner("--preview", "1", "--json", *words))
    ids = " ".join(map(str, row["input_ids"]))
    assert ids in glmtuner("--preview", "1", "--ids", *words).stdout
    assert ids not in glmtuner("--preview", "1", *words).stdout


def test_a_tokenizer_alone_is_enough(base, glmtuner):
    rows = {}
    for name in ("with", "without"):
        rows[name] = objects(
            glmtuner("--preview", "--json", *MODEL, "model.template=tokenizer", "data.dataset=belle_sample")
        )
        (base / "config.json").unlink(missing_ok=True)
    assert rows["with"] == rows["without"]
    done = glmtuner("--preview", "model.model_name_or_path=nowhere", "data.dataset=belle_sample")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_a_tokenizer_without_a_template_has_nothing_to_compare_with(base, glmtuner):
    (base / "chat_template.jinja").unlink()
    words = ("--preview", "1", *MODEL, "data.dataset=identity_sample")
    (row,) = objects(glmtuner("--json", *words))
    assert row["differs"] is None
    shown = glmtuner(*words).stdout
    assert "no chat template to compare with" in shown and "\n  official " not in shown


def test_a_run_that_goes_on_is_shown_in_the_template_that_it_is_trained_with(tmp_path, glmtuner):
    train = ("model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "trainer.output_dir=run")
    done = glmtuner(*train, "trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run/provenance.json").read_text(encoding="utf-8"))
    assert about["template"]["name"] == "glm4"
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    (row, *_) = objects(glmtuner("--preview", "--json", *train))
    assert row["differs"] is None and sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    further = ("model.checkpoint_dir=run", "data.dataset=identity_sample", "tracker=none")
    assert "model.template=glm4 (the checkpoint's)" in glmtuner("--preview", *further).stdout


def test_a_difference_is_shown(base, glmtuner):
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        encoding="utf-8",
    )
    words = (*MODEL, "data.dataset=identity_sample")
    (row,) = objects(glmtuner("--preview", "1", "--json", *words))
    assert "the prompt that is served is" in row["differs"] and "你是谁" in row["differs"]
    done = glmtuner("--preview", "1", *words)
    assert done.returncode == 0 and "a training refuses this" in done.stdout and "\n  differs " in done.stdout
    done = glmtuner(*words, "trainer.max_steps=1", "trainer.output_dir=run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.template=glm4: with a question, the prompt that is served is" in done.stderr
    assert "type model.template=tokenizer for the tokenizer's, or model.template=glm4 to keep this one" in done.stderr
    assert not Path("run").exists()


def test_hostile_text_is_escaped(base, tmp_path, glmtuner):
    hostile = "a\x1b]0;owned\x07[red]b\u202ec<|user|>"
    write(tmp_path / "hostile.jsonl", {"instruction": hostile, "output": hostile})
    done = glmtuner("--preview", *MODEL, "data.dataset=hostile.jsonl")
    assert done.returncode == 0, done.stderr
    assert not {"\x1b", "\x07", "\u202e"} & {*done.stdout} and "[red]b" in done.stdout
    (row,) = objects(glmtuner("--preview", "--json", *MODEL, "data.dataset=hostile.jsonl"))
    user = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|user|>")
    assert row["input_ids"].count(user) == 2, "the turn's own and the stop token; what was written is text"
    assert row["differs"] is None, "the text is the same"


def test_records_without_a_row_are_named(base, tmp_path, glmtuner):
    write(
        tmp_path / "mixed.jsonl",
        {"instruction": "a", "output": "b"},
        {"instruction": "", "output": ""},
        {"instruction": "c", "output": "d"},
    )
    done = glmtuner("--preview", "--json", *MODEL, "data.dataset=mixed.jsonl", "data.max_bad_records=1")
    rows = objects(done)
    assert [row["index"] for row in rows] == [0, 2]
    assert "record 2" in done.stderr and "broken" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preview", "0"), "--preview 0: a number of rows, 1 or more"),
        (("--preview", "-3"), "--preview -3: a number of rows"),
        (("--preview=x",), "--preview x: a number of rows"),
        (("--preview", "-m", "finetuning=lora,freeze"), "--preview with --multirun"),
        (("--preview", "hydra.mode=MULTIRUN"), "--preview with hydra.mode=MULTIRUN"),
        (("--preview", "--check"), "--preview with --check"),
        (("--json",), "--json without --preview"),
        (("--ids",), "--ids without --preview"),
        (("--preview", "stage=dpo"), "data.dataset=identity_sample holds single answers"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(base, glmtuner, words, message):
    done = glmtuner(*words, *MODEL, "data.dataset=identity_sample")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not Path("outputs").exists()


def test_colours_in_a_terminal_only(base, glmtuner, monkeypatch):
    words = ("--preview", "1", *MODEL, "data.dataset=identity_sample")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in glmtuner(*words).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    shown = glmtuner(*words).stdout
    assert "[32m" not in shown and "[36m" not in shown


def test_the_picture_is_of_the_real_command(tmp_path):
    spec = importlib.util.spec_from_file_location("preview_picture", ROOT / "scripts/preview_picture.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.html_of(script.terminal_output(tmp_path))
    assert all(part in page for part in ("6 times 7 is 42.", "小明有15元", "会的，请出题。", "tokens in all", "color:"))
    assert (ROOT / "docs/preview.png").is_file() and "\x1b" not in page
