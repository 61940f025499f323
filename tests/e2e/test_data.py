"""Real records and other tools' dataset files, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path

TINY = ["model=tiny_glm", "tracker=none", "trainer.max_steps=2", "trainer.disable_tqdm=true", "trainer.output_dir=run"]


def test_real_records_train(glmtuner: Callable, tmp_path: Path, real_records: Callable) -> None:
    (folder,) = {real_records(name).parent for name in ("alpaca_zh_demo", "oaast_sft_zh", "identity")}
    done = glmtuner(
        *TINY, f"data.dataset_dir={folder}", "data.dataset=alpaca_zh_demo,oaast_sft_zh,identity",
        "data.max_source_length=128", "data.max_target_length=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "run/provenance.json").read_text())["data"]
    assert {name: about["records"] for name, about in kept.items()} == {
        "alpaca_zh_demo": 1000, "oaast_sft_zh": 689, "identity": 91,
    }  # fmt: skip
    assert kept["oaast_sft_zh"]["prompts_cut"] > 0
    assert kept["oaast_sft_zh"]["turns_dropped"] > 0
    assert "prompts shortened" in done.stdout


def test_ranked_pairs_are_refused_in_words(glmtuner: Callable, tmp_path: Path, real_records: Callable) -> None:
    folder = real_records("dpo_zh_demo").parent
    done = glmtuner(*TINY, f"data.dataset_dir={folder}", "data.dataset=dpo_zh_demo")
    assert done.returncode == 2
    assert "data.dataset=dpo_zh_demo holds ranked pairs, and stage=sft learns single answers" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_cannot_be_served_is_named_only_when_asked_for(glmtuner: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.json").write_text(
        json.dumps([{"from_user": "你好", "reply": "你好，很高兴见到你。", "rules": "简短"}] * 8), encoding="utf-8"
    )
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {
                "mine": {
                    "file_name": "mine.json", "formatting": "alpaca", "ranking": False, "subset": None, "split": "train",
                    "num_samples": 6, "columns": {"prompt": "from_user", "response": "reply", "system": "rules"},
                },
                "pictures": {"file_name": "mine.json", "columns": {"prompt": "from_user", "images": "pictures"}},
                "scripted": {"script_url": "somewhere"},
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    done = glmtuner(*TINY, "data.dataset=mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine: 6 records" in done.stdout
    for name, key in (("pictures", "images"), ("scripted", "script_url")):
        refused = glmtuner(*TINY[:-1], f"data.dataset={name}")
        assert refused.returncode == 2
        assert name in refused.stderr
        assert key in refused.stderr


def written(folder: Path, *records: dict, name: str = "mine.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return f"data.dataset={name}"


def test_what_was_read_as_what_is_printed_and_kept(glmtuner: Callable, tmp_path: Path) -> None:
    good = {"instruction": "1+1?", "input": "in words", "output": "two", "label": True, "id": "x7"}
    dataset = written(tmp_path, {"instruction": "1+1?", "output": "3", "label": False}, *[good] * 4)
    done = glmtuner(*TINY, dataset, "data.input_separator=")
    assert done.returncode == 0, done.stdout + done.stderr
    read = "instruction+input -> prompt, output -> answer, label -> good or bad answer; not used: id"
    assert f"dataset 'mine.jsonl': {read}\n" in done.stdout
    assert "1 records with an answer marked false left out" in done.stdout
    kept = json.loads((tmp_path / "run/provenance.json").read_text())["data"]["mine.jsonl"]
    assert (kept["read"], kept["records"], kept["undesirable"]) == (read, 4, 1)


def test_a_question_without_its_document_is_refused_before_anything_is_written(
    glmtuner: Callable, tmp_path: Path
) -> None:
    record = {"question": "When?", "document": "The ferry has run since 1931.", "note": "n", "answer": "In 1931."}
    dataset = written(tmp_path, {"question": "Who?", "answer": "I."}, record)
    before = sorted(tmp_path.iterdir())
    done = glmtuner(*TINY, dataset)
    assert done.returncode == 2
    assert "mine.jsonl: record 2 has document, which is not read" in done.stderr
    assert "type data.ignore_columns=document to leave it out" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    checked = glmtuner(*TINY, dataset, "data.ignore_columns=document,note", "--cfg=job")
    assert checked.returncode == 0 and "ignore_columns:\n  - document\n  - note" in checked.stdout


def test_a_column_of_an_entry_is_left_out_where_records_are_whole_without_it(
    glmtuner: Callable, tmp_path: Path
) -> None:
    done = glmtuner(*TINY, "data.dataset=feedback_sample", "data.ignore_columns=good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "feedback_sample: 96 records" in done.stdout and "marked false" not in done.stdout
    refused = glmtuner(*TINY[:-1], "data.dataset=feedback_sample", "data.ignore_columns=output")
    assert refused.returncode == 2
    assert "data.ignore_columns=output: dataset 'feedback_sample' reads its response there" in refused.stderr


def test_shares_are_reached_and_told(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(
        *TINY, "data.dataset=alpaca_zh_sample,belle_sample", "data.mix_probabilities=0.7,0.3", "data.dev_ratio=0.1",
        "trainer.do_eval=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "run/provenance.json").read_text())["data"]
    assert abs(kept["alpaca_zh_sample"]["share"] - 0.7) < 0.1
    assert abs(kept["alpaca_zh_sample"]["share"] + kept["belle_sample"]["share"] - 1) < 1e-5
    assert "evaluation │ 24 records" in done.stdout.replace("  ", " ") or "24 records" in done.stdout
    assert json.loads((tmp_path / "run/metrics.json").read_text())["eval_loss"] > 0


def test_tokenized_once(glmtuner_fork: Callable, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        done = glmtuner_fork(
            "model=tiny_glm", "tracker=none", "trainer=evaluate", "data.dataset=belle_sample", f"trainer.output_dir={name}",
            f"trainer.per_device_eval_batch_size={8 if name == 'one' else 16}", env={"GLMTUNER_CACHE": str(cache)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    folders = list((cache / "tokenized").iterdir())
    assert len(folders) == 1
    done = glmtuner_fork(
        "model=tiny_glm", "tracker=none", "trainer=evaluate", "data.dataset=belle_sample", "trainer.output_dir=three",
        "data.max_target_length=20", env={"GLMTUNER_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0
    assert len(list((cache / "tokenized").iterdir())) == 2


WEATHER = {
    "name": "get_weather",
    "description": "查询天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED, RESULT, TOLD = "北京天气如何？", '{"weather": "晴"}', "北京今天晴。"
CALL = {"name": "get_weather", "arguments": {"city": "北京"}}


def tool_records() -> dict[str, dict]:
    """One conversation with a call in each of the formats."""
    described = [{"type": "function", "function": WEATHER}]
    asked, told = {"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}
    call = {"id": "call00001", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
    return {
        "openai": {
            "tools": described,
            "messages": [
                asked, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": RESULT, "tool_call_id": "call00001"}, told,
            ],
        },
        "glaive": {
            "tools": json.dumps([WEATHER], ensure_ascii=False),
            "conversations": [
                {"from": "human", "value": ASKED}, {"from": "function_call", "value": json.dumps(CALL, ensure_ascii=False)},
                {"from": "observation", "value": RESULT}, {"from": "gpt", "value": TOLD},
            ],
        },
        "glm4": {
            "messages": [
                {"role": "system", "content": "", "tools": described}, asked,
                {"role": "assistant", "metadata": "get_weather", "content": json.dumps(CALL["arguments"])},
                {"role": "observation", "content": RESULT}, told,
            ],
        },
        "chatglm3": {
            "tools": [WEATHER],
            "conversations": [
                asked, {"role": "tool", "name": "get_weather", "parameters": CALL["arguments"], "observation": json.loads(RESULT)}, told,
            ],
        },
    }  # fmt: skip


TOOL_LENGTHS = ["data.max_source_length=1500", "data.max_target_length=100", "model.template=glm4"]


def test_records_with_tools_train_whatever_their_format(glmtuner: Callable, tmp_path: Path) -> None:
    """As LLaMA-Factory's glaive sets, GLM-4's and ChatGLM3's own, and OpenAI's; glaive's by its entry in dataset_info.json."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = tool_records()
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps([record] * 3, ensure_ascii=False), encoding="utf-8")
    entry = {
        "file_name": "glaive.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"glaive_toolcall_zh_demo": entry}))
    names = ["glaive_toolcall_zh_demo", *(f"{name}.json" for name in records if name != "glaive")]
    done = glmtuner(*TINY, *TOOL_LENGTHS, f"data.dataset={','.join(names)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dataset 'glaive_toolcall_zh_demo': conversations -> turns, tools -> tools\n" in done.stdout
    kept = json.loads((tmp_path / "run/provenance.json").read_text())["data"]
    counts = {(about["records"], about["tokens"], about["learned_tokens"]) for about in kept.values()}
    assert len(kept) == 4 and len(counts) == 1, kept
    without = glmtuner(
        *TINY, *TOOL_LENGTHS, "data.dataset=openai.json", "data.ignore_columns=tools", "trainer.output_dir=other"
    )
    assert without.returncode == 0 and "3 records call tools and describe none" in " ".join(
        without.stdout.split()
    ).replace("│ │ ", "")


def test_what_a_call_was_to_be_stands_in_the_predictions(glmtuner: Callable, tmp_path: Path) -> None:
    record = tool_records()["openai"]
    dataset = written(tmp_path, record, {**record, "messages": record["messages"][:2]})
    done = glmtuner(*TINY[:2], "trainer=predict", *TOOL_LENGTHS, dataset, "trainer.output_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    answer, call = map(json.loads, (tmp_path / "run/predictions.jsonl").read_text().splitlines())
    assert call["label"] == 'get_weather\n{"city": "北京"}' and call["prompt"] == ASKED
    assert answer["label"] == TOLD
    assert answer["prompt"] == f'user: {ASKED}\nassistant: get_weather({{"city": "北京"}})\ntool: {RESULT}'


def test_tools_that_cannot_be_learned_are_refused_in_words(glmtuner: Callable, tmp_path: Path) -> None:
    record = tool_records()["openai"]
    before = written(tmp_path, record)
    refused = glmtuner(*TINY[:-1], "model.template=chatglm", before)
    assert refused.returncode == 2 and "data.ignore_columns=tools,tool_calls" in refused.stderr
    record["messages"][1]["tool_calls"][0]["function"]["arguments"] = "[1]"
    refused = glmtuner(*TINY[:-1], *TOOL_LENGTHS, written(tmp_path, record))
    assert refused.returncode == 2
    place = "record 1: field messages[1].tool_calls[0].function.arguments: the arguments of a call are a JSON object"
    assert place in refused.stderr and "Traceback" not in refused.stderr
