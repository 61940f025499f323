"""data.new_tokens in every use of a run: learned by preferences too, in chunks; asked in chat, by a server, and of an export.

A new token is one id: in what is asked, in what is answered, and in what a server counts.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from json_lines import lines
from openai import OpenAI
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upstream import write_checkpoint

from glmtuner.config.paths import model_source
from glmtuner.data.records import Message
from glmtuner.inference.conversation import Conversation
from glmtuner.launch.build import finished_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("tokens")  # whose runs are made once
TOKENS = ["<实体>", "[rel]"]
NEW = 'data.new_tokens=["<实体>","[rel]"]'
RECORDS = [("<实体>是什么？", "<实体>是[rel]的一种"), ("解释[rel]", "[rel]等于<实体>再加"), ("hi", "[rel]<实体>")]
COMMON = [
    "tracker=none", NEW, "data.max_target_length=16", "trainer.disable_tqdm=true", "trainer.use_cpu=true", "trainer.save_strategy=no",
    "trainer.logging_steps=1", "data.max_source_length=48",
]  # fmt: skip


def call(*words: str) -> str:
    from glmtuner.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main([*words]) == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new_tokens")
    single = [{"instruction": question, "input": "", "output": answer} for question, answer in RECORDS]
    pairs = [{**record, "output": [record["output"], "不知道"]} for record in single]
    marked = [{**record, "kto_tag": True} for record in single] + [
        {**record, "output": "不知道", "kto_tag": False} for record in single
    ]
    for name, records in (("facts", single), ("pairs", pairs), ("marked", marked)):
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


@pytest.fixture(scope="module")
def by_heart(here: Path) -> dict[str, Path]:
    """Runs that have learned the records by heart, and their exports."""
    with contextlib.chdir(here):
        for method, *how in (
            ("lora", "finetuning.lora_target=[all]", "finetuning.lora_dropout=0", "trainer.learning_rate=1e-2"),
            ("full", "trainer.learning_rate=1e-3"),
        ):
            call(
                "model=tiny_glm", *COMMON, f"finetuning={method}", "data.dataset=facts.json", "trainer.max_steps=60",
                f"trainer.output_dir={method}", *how,
            )  # fmt: skip
            call("export", method, "--to", f"{method}_exported", "--dtype", "float32")
    return {name: here / name for name in ("lora", "lora_exported", "full", "full_exported")}


@contextlib.contextmanager
def served(run: Path) -> Iterator[OpenAI]:
    """The official client of `serve` in a process of its own."""
    log = run.with_name(f"{run.name}.log")
    command = [sys.executable, "-m", "glmtuner", "serve", run.name, "--port", "0", "generation=greedy"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=run.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        until = time.monotonic() + 600
        while not (found := re.search(r"at (http://\S+:\d+)/v1", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield OpenAI(base_url=f"{found.group(1)}/v1", api_key="none", max_retries=0, timeout=600)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()


@pytest.mark.parametrize("name", ["lora", "lora_exported", "full", "full_exported"])
def test_a_new_token_is_one_id_of_questions_and_answers(by_heart: dict[str, Path], name: str) -> None:
    run = by_heart[name]
    finished = finished_run([run], ["generation=greedy"])
    new = [finished.tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    chat = {question: Conversation(finished).ask(question, lambda text: None)[0] for question, _ in RECORDS}
    assert chat == dict(RECORDS)
    with served(run) as client:
        for question, answer in RECORDS:
            told = client.chat.completions.create(model=run.name, messages=[{"role": "user", "content": question}])
            turns = [Message("user", question), Message("assistant", answer)]
            asked, whole = (
                list(each.input_ids) for each in finished.template.encode(finished.tokenizer, [turns[:1], turns])
            )
            assert told.choices[0].message.content == answer and told.usage is not None
            assert told.usage.prompt_tokens == len(asked)
            assert told.usage.completion_tokens == len(whole) - len(asked), whole
            for number, token in zip(new, TOKENS, strict=True):
                assert asked.count(number) == question.count(token) and whole.count(number) == (
                    question + answer
                ).count(token)
        pieces = client.chat.completions.create(
            model=run.name, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "[rel]<实体>"


STAGES = {"dpo": "pairs", "rm": "pairs", "orpo": "pairs", "kto": "marked"}


METHODS = ("lora", "full", "freeze")
CELLS = [
    pytest.param(stage, method, marks=() if (row + column) % 2 == 0 else pytest.mark.matrix)
    for row, stage in enumerate(STAGES) for column, method in enumerate(METHODS)
]  # fmt: skip


@pytest.mark.parametrize(("stage", "method"), CELLS)
def test_preferences_train_the_new_rows(here: Path, stage: str, method: str) -> None:
    folder = here / f"{stage}_{method}"
    told = call(
        "model=tiny_glm", f"stage={stage}", *COMMON, f"data.dataset={STAGES[stage]}.json", f"finetuning={method}",
        "trainer.max_steps=3", "trainer.learning_rate=5e-3", f"trainer.output_dir={folder}",
        *(["finetuning.lora_dropout=0"] if method == "lora" else []),
    )  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text())["fast_path_chunked_loss"] == (stage != "rm")
    assert "data.new_tokens: 2 tokens" in told
    losses = [line["loss"] for line in lines(folder / "history.jsonl")]
    assert losses[-1] < losses[0]
    assert moved(folder, method) is (method != "freeze")
    assert ("finetuning=freeze does not train them" in told) is (method == "freeze")
    call("export", str(folder), "--to", f"{folder}_exported", "--dtype", "float32")
    found, wanted = logits_of(Path(f"{folder}_exported")), logits_of(folder)
    assert (found - wanted).abs().max() < 1e-4


def moved(folder: Path, method: str) -> bool:
    """Whether the new rows differ from the mean of their pieces."""
    source = Path(model_source("package://tiny_glm"))
    base, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    means = torch.stack(
        [
            base.get_input_embeddings().weight[tokenizer(each, add_special_tokens=False).input_ids].mean(0)
            for each in TOKENS
        ]
    )
    if method == "lora":
        (rows,) = [
            value
            for name, value in load_file(folder / "adapter/adapter_model.safetensors").items()
            if "trainable_tokens" in name
        ]
    else:
        own = AutoTokenizer.from_pretrained(folder / "model")
        rows = (
            AutoModelForCausalLM.from_pretrained(folder / "model")
            .get_input_embeddings()
            .weight[own.convert_tokens_to_ids(TOKENS)]
        )
    return not torch.allclose(rows, means, atol=1e-6)


def logits_of(folder: Path) -> torch.Tensor:
    """By plain transformers, and PEFT for an adapter."""
    if (folder / "adapter").is_dir():
        tokenizer, model = (
            AutoTokenizer.from_pretrained(folder / "adapter"),
            AutoModelForCausalLM.from_pretrained(model_source("package://tiny_glm")),
        )
        model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
        model = PeftModel.from_pretrained(model, folder / "adapter")
    else:
        folder = folder / "model" if (folder / "model").is_dir() else folder
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer("<实体>是[rel]", add_special_tokens=False).input_ids])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[..., :3000]


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_a_head_with_weights_of_its_own(here: Path, upstream_files: Path, stage: str) -> None:
    """A reward is not computed from logits: the head's new rows stay, those of the embeddings move."""
    if not (here / "base").exists():
        write_checkpoint("chatglm2_6b", here / "base", upstream_files)
    folder = here / f"{stage}_untied"
    call(
        "model=chatglm2_6b", "model.model_name_or_path=base", f"stage={stage}", *COMMON, "data.dataset=pairs.json", "trainer.max_steps=2",
        "trainer.learning_rate=5e-3", f"trainer.output_dir={folder}",
    )  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text())["fast_path_chunked_loss"] == (stage != "rm")
    rows = {
        name: value
        for name, value in load_file(folder / "adapter/adapter_model.safetensors").items()
        if "trainable_tokens" in name
    }
    (of_head,) = [value for name, value in rows.items() if "output_layer" in name or "lm_head" in name]
    source = load_file(here / "base/model.safetensors")
    head = next(value for name, value in source.items() if "output_layer" in name or "lm_head" in name).float()
    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    means = torch.stack([head[tokenizer(each, add_special_tokens=False).input_ids].mean(0) for each in TOKENS])
    assert len(rows) == 2 and torch.allclose(of_head.float(), means, atol=1e-3) is (stage == "rm")
