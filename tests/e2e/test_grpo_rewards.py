"""stage=grpo with a reward model, and where its answers are shown: the scores are the reward model's own, W&B and TensorBoard have them."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import wandb_file
from json_lines import lines

from glmtuner.cli.main import main

SHORT = [
    "model=tiny_glm", "data.max_source_length=64", "data.max_target_length=24", "trainer.disable_tqdm=true", "trainer.logging_steps=1",
]  # fmt: skip
GROUPS = [
    "stage=grpo",
    "stage.num_generations=4",
    "trainer.per_device_train_batch_size=3",
    "trainer.learning_rate=1e-3",
]
SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(3) for b in range(3)]


def run(folder: Path, *words: str) -> str:
    """`python -m glmtuner` in this process, its run in `folder`; what it printed."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main([*SHORT, *words, f"trainer.output_dir={folder}"])
    assert code == 0, out.getvalue()
    return out.getvalue()


def test_a_reward_model_scores_as_its_own_run_does(tmp_path: Path) -> None:
    """Mixed with another reward by weight, and resumed to the same bytes."""
    rm = tmp_path / "rm"
    run(
        rm,
        "tracker=none",
        "stage=rm",
        "data.dataset=preference_sample",
        "trainer.max_steps=8",
        "trainer.learning_rate=2e-3",
    )
    words = [
        *GROUPS, "tracker=none", f"data.dataset={tmp_path / 'sums.json'}", f"model.reward_model={rm}", "reward=[model,length]",
        "reward.model.weight=0.5", "reward.length.weight=2", "reward.length.buffer_tokens=6", "data.max_target_length=12",
        "stage.temperature=0.9", "trainer.save_steps=2", "trainer.max_steps=3",
    ]  # fmt: skip
    (tmp_path / "sums.json").write_text(json.dumps(SUMS), encoding="utf-8")
    grpo = tmp_path / "grpo"
    run(grpo, *words)
    shutil.copytree(grpo, tmp_path / "cut")
    for left_over in ("metrics.json", "report.md"):
        (tmp_path / "cut" / left_over).unlink()
    shutil.rmtree(tmp_path / "cut/adapter")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-3")
    assert "resumed from checkpoint-2" in run(tmp_path / "cut", *words)
    for name in ("history.jsonl", "sampled.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (grpo / name).read_bytes(), name

    sampled = lines(grpo / "sampled.jsonl")
    assert len(sampled) == 12
    for line in sampled:
        assert line["reward"] == pytest.approx(0.5 * line["reward_model"] + 2 * line["reward_length"], abs=1e-5)
    # the reward model's own run reads a record's answer between the template's line break and the stop token
    whole = [line for line in sampled if line["tokens"] < 12 and line["answer"] == f"\n{line['answer'].strip()}"]
    assert len(whole) >= 4
    pairs = [{"instruction": line["prompt"], "output": [line["answer"].strip(), "."]} for line in whole]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    run(
        tmp_path / "scored", "tracker=none", "stage=rm", "trainer=predict", "trainer.predict_with_generate=false",
        f"model.checkpoint_dir={rm}", f"data.dataset={tmp_path / 'pairs.json'}",
    )  # fmt: skip
    scores = [line["chosen_score"] for line in lines(tmp_path / "scored/predictions.jsonl")]
    assert scores == pytest.approx([line["reward_model"] for line in whole], abs=1e-3)
    assert max(scores) - min(scores) > 0.01


@pytest.fixture
def shown(tmp_path: Path) -> Callable[[str], tuple[Path, list[dict]]]:
    (tmp_path / "sums.json").write_text(json.dumps(SUMS), encoding="utf-8")

    def made(tracker: str) -> tuple[Path, list[dict]]:
        folder = tmp_path / tracker
        words = [*GROUPS, f"tracker={tracker}", "reward=[number,format]", f"data.dataset={tmp_path / 'sums.json'}"]
        run(folder, *words, "data.max_target_length=6", "trainer.max_steps=2", "trainer.save_strategy=no")
        found = lines(folder / "sampled.jsonl")
        assert [line["step"] for line in found] == [1] * 4 + [2] * 4
        return folder, found

    return made


def test_the_answers_are_a_table_of_an_offline_session_and_of_the_report(shown: Callable) -> None:
    folder, sampled = shown("wandb")
    (session,) = wandb_file.sessions(folder)
    table = json.loads((folder / f"wandb/latest-run/files/{session.summary['sampled/path']}").read_text())
    assert table["columns"] == [
        "step",
        "prompt",
        "label",
        "answer",
        "reward",
        "reward_number",
        "reward_format",
        "tokens",
    ]
    assert table["data"] == [[line[name] for name in table["columns"]] for line in sampled]
    rows = [row for row in session.history if "train/reward" in row]
    assert len(rows) == 2 and {"train/reward_number", "train/no_signal", "train/kl", "train/entropy"} <= rows[0].keys()
    assert main(["report", str(folder)]) == 0
    for name, header in (("report.md", "## Sampled answers"), ("report.html", "Sampled answers")):
        text = (folder / name).read_text(encoding="utf-8")
        assert header in text and "reward_number" in text, name
        assert all(line["prompt"].replace("=", "") in text.replace("\\", "").replace("=", "") for line in sampled)


def test_the_answers_are_texts_of_tensorboard(shown: Callable) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, sampled = shown("tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    texts = events.Tensors("sampled/text_summary")
    assert [event.step for event in texts] == [1, 2]
    found = [
        json.loads(line) for event in texts for line in event.tensor_proto.string_val[0].decode().splitlines() if line
    ]
    assert found == sampled
