"""Conversations learned by heart behind each official template: what comes back by prediction, chat, serve and an exported folder.

What is expected is what transformers renders behind the official generation prompt. Three templates by default,
five by `make test-heavy`, the others of the 21 by `make test-matrix`.
"""

import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from default_cells import TEMPLATES
from listening import official_client
from official_templates import MODELS, Official, official
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from glmtuner.cli.main import main
from glmtuner.launch.build import finished_run
from glmtuner.report.record_scores import record_scores
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.redaction import flatten

BY_DEFAULT = ("glm-4.5", "deepseek-r1-distill", "qwen3")
CHOICES = [
    pytest.param(name, marks=() if name in BY_DEFAULT else [pytest.mark.heavy, *(() if name in TEMPLATES else [pytest.mark.matrix])])
    for name in MODELS
]  # fmt: skip
# their templates have no thoughts, or no calls: without these conversations
WITHOUT_REASONING = {
    "chatglm3-6b", "glm-4-9b-chat", "glm-4-9b-chat-1m-hf", "glm-edge-4b-chat", "glm-z1-rumination-32b-0414", "llama-3.1-instruct",
    "mistral-7b-instruct-v0.3", "mistral-nemo-instruct-2407", "qwen2.5-instruct", "qwen3-instruct-2507",
}  # fmt: skip
WITHOUT_TOOLS = {"chatglm3-6b", "glm-edge-4b-chat"}
WITHOUT_DESCRIPTIONS = {
    "deepseek-r1-distill",
    "glm-z1-rumination-32b-0414",
}  # they render calls, and no descriptions of tools
SWITCH = "enable_thinking"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
THOUGHT, ANSWER = "6*7, 试试", "四十二"
ARGUMENTS = {"city": "北京", "days": 3}


class Record(NamedTuple):
    """A conversation that ends in an answer."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []  # noqa: RUF012  # never changed

    @property
    def answer(self) -> dict[str, Any]:
        return self.messages[-1]

    @property
    def thinks(self) -> bool:
        return "reasoning_content" in self.answer

    @property
    def calls(self) -> list[dict[str, Any]]:
        return list(self.answer.get("tool_calls", ()))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TRAINING = (
    "model.model_name_or_path=base", "model.family=auto", "model.template=tokenizer", "data.dataset=data.jsonl",
    "finetuning=full", "trainer.max_steps=250", "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=1", "trainer.output_dir=run", "trainer.disable_tqdm=true", "tracker=none",
    "generation=greedy", "trainer.logging_steps=10", "data.max_source_length=3000",
)  # fmt: skip
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
RECORDS = [
    Record("plain", [user("1+1?"), said("two")]),
    Record("several turns", [user("name?"), said("Tiny"), user("age?"), said("five\n\n days 岁")]),
    Record("reasoning", [user("hard?"), said(ANSWER, reasoning_content=THOUGHT)]),
    Record("call", [user("北京?"), said("", tool_calls=[CALL])], [WEATHER]),
]


def records_of(name: str) -> list[Record]:
    left_out = {"reasoning"} if name in WITHOUT_REASONING else set()
    left_out |= {"call"} if name in WITHOUT_TOOLS else set()
    records = [record for record in RECORDS if record.name not in left_out]
    return [record._replace(tools=[]) if name in WITHOUT_DESCRIPTIONS else record for record in records]


def expected(template: Official, record: Record) -> str:
    """What is learned of the last answer, as transformers renders it behind the official prompt."""
    behind = template.behind(record.messages, record.tools, **{SWITCH: record.thinks})
    assert behind.strip(), record.name
    return behind


@pytest.fixture(scope="module", params=CHOICES)
def template(request: pytest.FixtureRequest, shared: Path | None) -> Official:
    return official(shared, request.param)


@pytest.fixture(scope="module")
def trained(template: Official, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the base model, data.jsonl and the run in `run`; it is the working directory."""
    folder = tmp_path_factory.mktemp(template.name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_base(template, folder / "base")
        write_records(folder / "data.jsonl", records_of(template.name))
        write_records(folder / "eight.jsonl", (records_of(template.name) * 4)[:8])
        assert main([*TRAINING]) == 0
        yield folder
    finally:
        os.chdir(before)


def write_base(template: Official, folder: Path, special_markup: bool = False) -> None:
    texts = [json.dumps([record.messages, record.tools], ensure_ascii=False) for record in RECORDS]
    tokenizer = template.tokenizer([*texts, template.source], special_markup)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # the base's own generation config names one more end: a token that no answer holds
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, len(tokenizer) - 1]
    model.save_pretrained(folder)


def write_records(path: Path, records: list[Record]) -> None:
    lines = [{"messages": record.messages, **({"tools": record.tools} if record.tools else {})} for record in records]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_prediction(template: Official, trained: Path, batch: int) -> None:
    assert [line["loss"] for line in RunFolder(trained / "run").history() if "loss" in line][-1] < 0.01
    words = (
        "trainer=predict", "model.checkpoint_dir=run", "data.dataset=eight.jsonl", f"trainer.output_dir=predicted{batch}",
        f"generation.max_batch_size={batch}", "trainer.disable_tqdm=true", "tracker=none", "data.max_source_length=3000",
    )  # fmt: skip
    assert main([*words]) == 0
    text = (trained / f"predicted{batch}/predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    wanted = [expected(template, record).strip() for record in (records_of(template.name) * 4)[:8]]
    assert [line["predict"] for line in lines] == wanted
    assert [line["reference"] for line in lines] == wanted


@pytest.mark.slow
def test_chat(
    template: Official, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in records_of(template.name):
        if record.calls:
            continue  # chat has no tools to offer
        lines = [message["content"] for message in record.messages if message["role"] == "user"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", "run", f"generation.thinking={'on' if record.thinks else 'off'}"]) == 0
        shown = capsys.readouterr().out
        assert f"\n{record.answer['content']}\n" in shown
        thought = [f"(thinking) {record.answer['reasoning_content']}"] if record.thinks else []
        assert [line for line in shown.splitlines() if line.startswith("(thinking)")] == thought


def as_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as clients send them: arguments are JSON."""

    def text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}

    return [
        {**message, "tool_calls": [text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


@pytest.mark.slow
def test_serve(template: Official, trained: Path) -> None:
    def ask(record: Record) -> Any:
        extra = {"chat_template_kwargs": {SWITCH: record.thinks}} if SWITCH in template.source else {}
        tools: Any = {"tools": record.tools} if record.tools else {}
        messages: Any = as_request(record.messages[:-1])
        answer = client.chat.completions.create(
            model="m", messages=messages, temperature=0, max_tokens=200, extra_body=extra, **tools
        )
        return answer.choices[0]

    def check(record: Record, choice: Any) -> None:
        message = choice.message
        assert (message.content or "") == record.answer["content"].strip(), record.name
        assert (getattr(message, "reasoning_content", None) or "") == record.answer.get("reasoning_content", "")
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
        assert calls == [
            (call["function"]["name"], call["function"]["arguments"]) for call in record.answer.get("tool_calls", ())
        ]
        assert choice.finish_reason == ("tool_calls" if calls else "stop")

    records = records_of(template.name)
    with official_client(finished_run([Path("run")], [])) as client:
        for record in records:
            check(record, ask(record))
        with ThreadPoolExecutor(8) as pool:
            for record, choice in zip(records * 2, pool.map(ask, records * 2), strict=True):
                check(record, choice)


@pytest.mark.slow
def test_exported_folder(template: Official, trained: Path) -> None:
    """By transformers alone, with the exported generation_config and chat template."""
    assert main(["export", "run", "--to", "out"]) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained("out", padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained("out")
    assert tokenizer.chat_template == template.source
    stops = {tokenizer.convert_tokens_to_ids(stop) for stop in template.stops}
    ends = set(model.generation_config.eos_token_id)
    assert {tokenizer.eos_token_id, len(tokenizer) - 1} <= ends
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    records = (records_of(template.name) * 4)[:8]

    def prompt(record: Record) -> str:
        turns, tools = template.native(record.messages[:-1], record.tools)
        options: Any = {"tools": tools or None, SWITCH: record.thinks}
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **options))

    def answers(batch: list[Record]) -> list[str]:
        inputs = tokenizer(list(map(prompt, batch)), add_special_tokens=False, padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=200)[:, inputs.input_ids.shape[1] :].tolist()
        found = []
        for row in ids:
            end = next((place for place, token in enumerate(row) if token in ends), None)
            assert end is not None, tokenizer.decode(row)
            assert row[end] in stops, tokenizer.decode(row)
            found.append(tokenizer.decode(row[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return found

    wanted = [expected(template, record) for record in records]
    assert answers(records) == wanted
    for record, text in list(zip(records, wanted, strict=True))[:4]:
        assert answers([record]) == [text]


@pytest.mark.slow
def test_control_tokens_of_answers_are_kept_and_scores_may_leave_thoughts_out(
    shared: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<think>` and `<tool_call>` are special tokens of this tokenizer, and the records that are predicted have other thoughts."""
    template = official(shared, "qwen3")
    monkeypatch.chdir(tmp_path)
    write_base(template, tmp_path / "base", special_markup=True)
    added = AutoTokenizer.from_pretrained("base").added_tokens_decoder.values()
    assert {"<think>", "<tool_call>"} <= {str(token) for token in added if token.special}
    records = records_of("qwen3")
    write_records(tmp_path / "data.jsonl", records)
    other = [
        record._replace(messages=[*record.messages[:-1], {**record.answer, "reasoning_content": "elsewhere"}])
        if record.thinks
        else record
        for record in records
    ]
    write_records(tmp_path / "other.jsonl", other)
    assert main([*TRAINING]) == 0
    scores = {}
    for leaves_out in (False, True):
        words = (
            "trainer=predict", "model.checkpoint_dir=run", "data.dataset=other.jsonl", "data.max_source_length=3000",
            f"trainer.output_dir=scored_{leaves_out}", "trainer.disable_tqdm=true", "tracker=none",
            f"metric.without_reasoning={leaves_out}",
        )  # fmt: skip
        assert main([*words]) == 0
        folder = RunFolder(tmp_path / f"scored_{leaves_out}")
        text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
        lines = {record.name: json.loads(line) for record, line in zip(records, text.splitlines(), strict=True)}
        assert [line["predict"] for line in lines.values()] == [
            expected(template, record).strip() for record in records
        ]
        assert "<tool_call>" in lines["call"]["predict"]
        thought = lines["reasoning"]
        assert thought["reference"] == "<think>\nelsewhere\n</think>\n\n四十二" and thought["label"] == ANSWER
        assert (thought["reasoning"], thought["answer"], thought["reference_answer"]) == (THOUGHT, ANSWER, ANSWER)
        assert "reasoning" not in lines["plain"]
        scores[leaves_out] = folder.metrics()["predict_rouge-l"]
        values = flatten(OmegaConf.to_container(folder.config()))
        again = record_scores(folder, values, ["predict_rouge-l"])["predict_rouge-l"].values()
        assert sum(total for total, _ in again) / len(again) == pytest.approx(scores[leaves_out])
    assert scores[True] == pytest.approx(100) and scores[False] < 95
