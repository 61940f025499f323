"""Weights of datasets, records and turns through the command line, and evaluations with scores of each dataset."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from json_lines import lines

WORDS = (
    "model=tiny_glm", "tracker=none", "data.max_source_length=64", "data.max_target_length=24", "trainer.disable_tqdm=true",
    "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "finetuning.lora_dropout=0",
)  # fmt: skip
NUMBERS = "零一二三四五六七八九"


def run(folder: Path, *words: str) -> str:
    """`python -m glmtuner` in this process, its run in `folder`; what it printed."""
    from glmtuner.cli.main import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main([*WORDS, *words, f"trainer.output_dir={folder}"])
    assert code == 0, out.getvalue()
    return out.getvalue()


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with weights, conversations whose answers have weights, the same with repeated records, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    asked = [
        {"instruction": f"{word}是几？" * (index % 3 + 1), "output": f"{index}。" * (index + 1)}
        for index, word in enumerate(NUMBERS)
    ]
    weights = [1, 2, 3, 0, 1, 2, 1, 1, 3, 1]
    write(
        folder / "weighted.jsonl", [{**record, "weight": weight} for record, weight in zip(asked, weights, strict=True)]
    )
    write(
        folder / "repeated.jsonl",
        [record for record, weight in zip(asked, weights, strict=True) for _ in range(weight)],
    )
    write(folder / "plain.jsonl", asked)
    turns = [
        [
            {"role": "user", "content": f"{word}？"}, {"role": "assistant", "content": f"{index}", "weight": 0.5},
            {"role": "user", "content": "再说"}, {"role": "assistant", "content": word * 3, "loss": index + 1},
        ]
        for index, word in enumerate(NUMBERS)
    ]  # fmt: skip
    write(folder / "turns.jsonl", [{"messages": each} for each in turns])
    pairs = [
        {"instruction": record["instruction"], "output": [record["output"], "不知道"], "weight": 1 + index % 3}
        for index, record in enumerate(asked)
    ]
    write(folder / "pairs.jsonl", pairs)
    return folder


def history(folder: Path, *names: str) -> list[list[float]]:
    return [[line[name] for name in names if name in line] for line in lines(folder / "history.jsonl")]


def same(folder: Path, other: Path, rel: float = 1e-5) -> None:
    mine, theirs = (history(path, "loss", "eval_loss", "eval_turns_loss") for path in (folder, other))
    assert len(mine) == len(theirs) > 3
    for found, wanted in zip(mine, theirs, strict=True):
        assert found == pytest.approx(wanted, rel=rel)


def test_a_weight_is_how_often_a_record_stands_there(tmp_path: Path, data: Path) -> None:
    """One step on all records: 9 with weights, of which one of weight 0 is left out, and the 15 that they stand for."""
    said = run(
        tmp_path / "weighted",
        f"data.dataset={data}/weighted.jsonl",
        "trainer.per_device_train_batch_size=9",
        "trainer.max_steps=4",
    )
    run(
        tmp_path / "repeated",
        f"data.dataset={data}/repeated.jsonl",
        "trainer.per_device_train_batch_size=15",
        "trainer.max_steps=4",
    )
    assert "1 records without an answer to learn left out; 4 rows" in " ".join(said.replace("│", " ").split())
    for name in ("loss", "grad_norm"):
        mine, theirs = (history(tmp_path / folder, name) for folder in ("weighted", "repeated"))
        assert mine == [pytest.approx(wanted, rel=2e-4) for wanted in theirs]


def mixed(data: Path) -> list[str]:
    return [
        f"data.dataset=[{data}/weighted.jsonl,{data}/turns.jsonl]", "data.weights=[2,0.5]", "data.dev_ratio=0.2",
        "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.max_steps=5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "whole"
    said = run(folder, *mixed(data), "trainer.per_device_train_batch_size=8")
    assert f"{data}/weighted.jsonl 2, {data}/turns.jsonl 0.5" in "".join(said.replace("│", " ").split()).replace(
        "2,", "2, "
    ).replace("jsonl", "jsonl ")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"],
        ["trainer.per_device_train_batch_size=8", "data.padding_free=false"],
    ],
    ids=["accumulated", "padded"],
)
def test_a_label_weighs_the_same_in_whichever_batch_it_is(
    tmp_path: Path, data: Path, whole: Path, words: list[str]
) -> None:
    run(tmp_path / "other", *mixed(data), *words)
    same(tmp_path / "other", whole, rel=5e-5)


@pytest.mark.heavy
def test_two_processes_learn_what_one_does(
    glmtuner: Callable[..., Any], tmp_path: Path, data: Path, whole: Path
) -> None:
    words = ["parallel=ddp", "parallel.processes=2", "trainer.per_device_train_batch_size=4"]
    done = glmtuner(*WORDS, *mixed(data), *words, f"trainer.output_dir={tmp_path}/ddp")
    assert done.returncode == 0, done.stdout + done.stderr
    same(tmp_path / "ddp", whole, rel=5e-5)


def test_a_run_cut_short_ends_in_the_same_bytes(tmp_path: Path, data: Path) -> None:
    words = [*mixed(data), "finetuning.lora_dropout=0.1", "data.packing=true", "trainer.per_device_train_batch_size=2"]
    run(tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/metrics.json").unlink()
    shutil.rmtree(tmp_path / "cut/adapter")
    for later in (4, 5):
        shutil.rmtree(tmp_path / f"cut/checkpoints/checkpoint-{later}")
    assert "resumed from checkpoint-2" in run(tmp_path / "cut", *words)
    for name in ("history.jsonl", "losses.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_each_dataset_has_a_loss_and_scores_of_its_own(tmp_path: Path, data: Path) -> None:
    said = run(
        tmp_path / "run", f"data.dataset={data}/plain.jsonl", f"data.eval_dataset=[{data}/turns.jsonl,feedback_sample]",
        "data.max_samples=10", "trainer.do_eval=true", "trainer.predict_with_generate=true", "trainer.do_predict=true",
        "trainer.max_steps=2", "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.save_steps=1", "data.max_target_length=8",
        "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_feedback_sample_loss",
    )  # fmt: skip
    measured, rows = json.loads((tmp_path / "run/metrics.json").read_text()), lines(tmp_path / "run/losses.jsonl")
    for label in ("turns", "feedback_sample"):
        own = [row for row in rows if row["dataset"] == label]
        wanted = sum(row["loss"] for row in own) / sum(row["weight"] for row in own)
        assert measured[f"eval_{label}_loss"] == pytest.approx(wanted, rel=1e-6)
        assert f"eval_{label}_rouge-l" in measured and f"predict_{label}_bleu-4" in measured
    whole = sum(row["loss"] for row in rows) / sum(row["weight"] for row in rows)
    assert measured["eval_loss"] == pytest.approx(whole, rel=1e-6)
    assert {row["weight"] for row in rows if row["dataset"] == "feedback_sample"} == {
        row["tokens"] for row in rows if row["dataset"] == "feedback_sample"
    }
    scored = lines(tmp_path / "run/history.jsonl")
    assert all("eval_turns_rouge-l" in line for line in scored if "eval_loss" in line)
    assert "eval_feedback_sample_loss" in said


def test_a_preview_shows_the_weights(data: Path) -> None:
    from glmtuner.cli.main import main

    shown = {}
    for options in (["--preview", "2"], ["--preview", "2", "--json"]):
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            assert main([*options, *WORDS, f"data.dataset=[{data}/weighted.jsonl,{data}/turns.jsonl]"]) == 0
        shown[len(options)] = out.getvalue()
    assert "learned, weight 2" in shown[2] and "weights of its answers 0.5, 2" in shown[2]
    rows = [json.loads(line) for line in shown[3].splitlines()]
    assert [row.get("weight") for row in rows] == [None, 2, None, None]
    learned = [weight for weight, label in zip(rows[3]["weights"], rows[3]["labels"], strict=True) if label >= 0]
    assert sorted({*learned}) == [0.5, 2] and "weights" not in rows[0]


@pytest.mark.parametrize("stage", ["dpo", "orpo", "rm"])
def test_pairs_have_weights(tmp_path: Path, data: Path, stage: str) -> None:
    """The sum of weight times loss over the sum of the weights, in whichever batches the pairs are."""
    words = [f"stage={stage}", f"data.dataset={data}/pairs.jsonl", "trainer.max_steps=3"]
    run(tmp_path / "big", *words, "trainer.per_device_train_batch_size=10")
    run(tmp_path / "small", *words, "trainer.per_device_train_batch_size=5", "trainer.gradient_accumulation_steps=2")
    for name in ("loss", "grad_norm", "margin"):
        big, small = (history(tmp_path / folder, name) for folder in ("big", "small"))
        assert small == [pytest.approx(wanted, rel=2e-3, abs=1e-4) for wanted in big]
    run(tmp_path / "plain", *words, "data.ignore_columns=weight", "trainer.per_device_train_batch_size=10")
    assert history(tmp_path / "plain", "loss")[2] != history(tmp_path / "big", "loss")[2]
    checked = [
        "trainer=evaluate",
        f"stage={stage}",
        f"data.dataset={data}/pairs.jsonl",
        f"model.checkpoint_dir={tmp_path}/big",
    ]
    run(tmp_path / "eval", *checked)
    rows = lines(tmp_path / "eval/losses.jsonl")
    assert [row["weight"] for row in rows] == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    measured = json.loads((tmp_path / "eval/metrics.json").read_text())["eval_loss"]
    assert measured == pytest.approx(sum(row["loss"] for row in rows) / 19, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.dataset=[identity_sample,belle_sample]", "data.weights=[1]"], "1 weights for the 2 datasets [identity_sample,belle_sample]"),
        (["data.dataset=[identity_sample,belle_sample]", "data.weights=[1,-2]"], "a weight is a number from 1e-06 to 1e+06; leave a dataset"),
        (["data.dataset=identity_sample", "data.weights=[nan]"], "a weight is a number from 1e-06"),
        (["data.dataset=identity_sample", "data.weigths=[1]"], "did you mean 'weights'?"),
        (["data.dataset=identity_sample", "stage=ppo", "model.reward_model=x", "data.weights=[2]"], "with stage=ppo: it learns from answers of its own"),
        (
            ["data.dataset=[identity_sample,belle_sample]", "data.dev_ratio=0.1", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch",
             "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_bele_sample_loss"],
            "did you mean 'belle_sample_loss'?",
        ),
        (["data.dataset=bad.jsonl"], "bad.jsonl: record 2: field weight: a mark of what is learned is true, false, 0 or a number from 1e-06"),
    ],
)  # fmt: skip
def test_mistakes_cost_one_paragraph(glmtuner: Callable[..., Any], tmp_path: Path, words: list[str], told: str) -> None:
    write(tmp_path / "bad.jsonl", [{"instruction": "q", "output": "a", "weight": weight} for weight in (1, -1)])
    done = glmtuner(*WORDS, *words, "trainer.output_dir=run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert not (tmp_path / "run/history.jsonl").exists()
