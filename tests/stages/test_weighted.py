"""Preferences with weights of records and datasets, through a run: its losses are sums that are computed here by plain PEFT.

The same run has two evaluation sets: each one's metrics are in the report and in an offline W&B session.
"""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb_file
from json_lines import lines
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import GlmForCausalLM

from glmtuner.config.paths import ASSETS

BASE = ASSETS / "tiny_glm"
WORDS = [
    "model=tiny_glm", "data.max_source_length=48", "data.max_target_length=12", "finetuning.lora_dropout=0", "trainer.disable_tqdm=true",
    "trainer.use_cpu=true", "trainer.logging_steps=1", "trainer.learning_rate=1e-2", "trainer.max_steps=2", "trainer.do_eval=true",
    "trainer.per_device_train_batch_size=8", "trainer.per_device_eval_batch_size=8", "trainer.save_strategy=no",
    "data.eval_dataset=[few.jsonl,more.jsonl]",
]  # fmt: skip
NUMBERS = "零一二三四五六七"
OF_DATASET = {"few": 2.0, "more": 0.5}
STAGES = {
    "rm": [],
    "dpo": [],
    "orpo": ["stage.beta=0.3"],
    "simpo": [],
    "cpo": ["stage.sft_weight=0.7"],
    "kto": ["stage.desirable_weight=1.3", "stage.undesirable_weight=0.6"],
}


def records(stage: str) -> dict[str, list[dict[str, Any]]]:
    """Five records of one dataset and three of another, with weights."""
    asked = [
        {
            "instruction": f"{word}是几？",
            "output": [f"{index}。" * (1 + index % 2), "我不知道"],
            "weight": 1 + index % 3,
        }
        for index, word in enumerate(NUMBERS)
    ]
    if stage == "kto":
        asked = [
            {**each, "output": each["output"][index % 2], "kto_tag": index % 2 == 0} for index, each in enumerate(asked)
        ]
    return {"few": asked[:3], "more": asked[3:]}


def call(*words: str) -> str:
    from glmtuner.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main([*words]) == 0, out.getvalue()
    return out.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def encoded(questions: list[str], answers: list[str]) -> list[dict[str, list[int]]]:
    """Prompts and answers as stage=sft encodes them."""
    write(Path("single.jsonl"), [{"instruction": q, "output": a} for q, a in zip(questions, answers, strict=True)])
    told = call("--preview", str(len(questions)), "--json", *WORDS[:3], "tracker=none", "data.dataset=single.jsonl")
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def logprob(model: Any, row: dict[str, list[int]]) -> tuple[torch.Tensor, int]:
    """The log-probability of a row's answer, and its number of tokens."""
    labels = torch.tensor(row["labels"])[1:]
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    each = torch.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return each[labels >= 0].sum(), int((labels >= 0).sum())


def pair_loss(
    stage: str, better: tuple[torch.Tensor, int], worse: tuple[torch.Tensor, int], reference: Any
) -> torch.Tensor:
    """The loss of a pair by the stage's paper; of (log-probability, tokens) of the two answers."""
    (c, n), (r, m) = better, worse
    if stage == "dpo":
        return -logsigmoid(0.1 * ((c - reference[0]) - (r - reference[1])))
    if stage == "orpo":
        odds = [value - torch.log1p(-torch.exp(value)) for value in (c / n, r / m)]
        return -c / n - 0.3 * logsigmoid(odds[0] - odds[1])
    if stage == "simpo":
        return -logsigmoid(2 * (c / n - r / m) - 1)
    return -logsigmoid(0.1 * (c - r)) - 0.7 * c / n


def expected(stage: str, model: Any, base: Any, rows: list[dict[str, Any]], run: Path) -> list[float]:
    """The loss of each record, without weights."""
    questions = [row["instruction"] for row in rows]
    with torch.no_grad():
        if stage == "kto":
            own = encoded(questions, [row["output"] for row in rows])
            shifted = encoded(questions, [row["output"] for row in [*rows[1:], rows[0]]])
            ratio, other = ([logprob(model, row)[0] - logprob(base, row)[0] for row in each] for each in (own, shifted))
            kl = torch.stack(other).mean().clamp(min=0)
            return [
                float(
                    1.3 * (1 - torch.sigmoid(0.1 * (r - kl)))
                    if row["kto_tag"]
                    else 0.6 * (1 - torch.sigmoid(0.1 * (kl - r)))
                )
                for r, row in zip(ratio, rows, strict=True)
            ]
        better, worse = (encoded(questions, [row["output"][place] for row in rows]) for place in (0, 1))
        if stage == "rm":
            from safetensors.torch import load_file

            head = load_file(run / "adapter/value_head.safetensors")
            scores = [
                [
                    model.get_base_model().model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0, -1]
                    @ head["weight"][0]
                    for row in each
                ]
                for each in (better, worse)
            ]
            return [float(-logsigmoid(chosen - rejected)) for chosen, rejected in zip(*scores, strict=True)]
        return [
            float(
                pair_loss(
                    stage, logprob(model, one), logprob(model, two), (logprob(base, one)[0], logprob(base, two)[0])
                )
            )
            for one, two in zip(better, worse, strict=True)
        ]


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_weighted_sums_and_each_dataset_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sets = records(stage)
    for name, rows in sets.items():
        write(tmp_path / f"{name}.jsonl", rows)
    told = call(
        f"stage={stage}", *WORDS, *STAGES[stage], "tracker=wandb", "data.dataset=[few.jsonl,more.jsonl]", "data.weights=[2,0.5]",
        "trainer.output_dir=run",
    )  # fmt: skip
    run, base = tmp_path / "run", GlmForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    rows = [row for each in sets.values() for row in each]
    weights = [row["weight"] * OF_DATASET[name] for name, each in sets.items() for row in each]
    if stage != "rm":  # whose head is drawn anew
        first = expected(stage, base, base, rows, run)
        wanted = sum(w * loss for w, loss in zip(weights, first, strict=True)) / sum(weights)
        assert lines(run / "history.jsonl")[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    adapted = PeftModel.from_pretrained(
        GlmForCausalLM.from_pretrained(BASE, dtype=torch.float32), run / "adapter"
    ).eval()
    found, last = lines(run / "losses.jsonl"), expected(stage, adapted, base, rows, run)
    own = [row["weight"] for row in rows]  # data.weights are of the training
    assert [line["weight"] for line in found] == own and len(found) == 8
    assert [line["loss"] for line in found] == pytest.approx(
        [w * loss for w, loss in zip(own, last, strict=True)], rel=2e-4, abs=1e-5
    )
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    session = wandb_file.sessions(run)[-1]
    sent = {name: value for row in session.history for name, value in row.items()}
    report = (run / "report.md").read_text(encoding="utf-8")
    places = {"": slice(0, 8), "few_": slice(0, 3), "more_": slice(3, 8)}
    for label, place in places.items():
        mean = sum(w * loss for w, loss in zip(own[place], last[place], strict=True)) / sum(own[place])
        assert metrics[f"eval_{label}loss"] == pytest.approx(mean, rel=2e-4)
        assert f"eval_{label}loss" in report and f"eval_{label}loss" in told
        assert sent[f"eval/{label}loss"] == pytest.approx(metrics[f"eval_{label}loss"])
        name = "reward_desirable" if stage == "kto" else "accuracy"
        values = [line[name] for line in found[place] if line.get(name) is not None and not math.isnan(line[name])]
        assert metrics[f"eval_{label}{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert f"eval_{label}{name}" in report and sent[f"eval/{label}{name}"] == pytest.approx(
            metrics[f"eval_{label}{name}"]
        )
