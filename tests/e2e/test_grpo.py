"""stage=grpo through the command line: it learns what a reward asks for, resumes to the same bytes, and reports its answers."""

import io
import json
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from json_lines import lines
from warm_server import WarmServer

SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(5) for b in range(5)]
PLUGIN = """\
from glmtuner.config.rewards import reward_function

@reward_function("short")
def short(sampled):
    \"\"\"The fewer characters, the better.\"\"\"
    return -len(sampled.answer) / 10

@reward_function("broken")
def broken(sampled):
    return float("nan")

@reward_function("failing")
def failing(sampled):
    return 1 / 0
"""


def call(*words: str) -> tuple[int, str]:
    """`python -m glmtuner` in this process: its exit code, and what it printed."""
    from glmtuner.cli.main import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main([*words])
    return code, out.getvalue()


def words_of(data: Path, *more: str) -> list[str]:
    return [
        "model=tiny_glm", "tracker=none", f"data.dataset={data}", "data.max_source_length=32", "data.max_target_length=6",
        "trainer.disable_tqdm=true", "trainer.logging_steps=1", "stage=grpo", "reward=number", "stage.num_generations=4",
        "trainer.per_device_train_batch_size=3", *more,
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(SUMS), encoding="utf-8")
    return path


def outcome(folder: Path) -> list[bytes]:
    names = ("history.jsonl", "sampled.jsonl", "adapter/adapter_model.safetensors")
    return [(folder / name).read_bytes() for name in names]


RESUMED = (
    "reward=[number,length]", "reward.length.buffer_tokens=2", "stage.num_iterations=2", "stage.minibatch_size=6",
    "stage.microbatch_size=4", "stage.loss=dapo", "finetuning.lora_dropout=0.1", "trainer.learning_rate=2e-3",
    "trainer.save_steps=2", "trainer.max_steps=4",
)  # fmt: skip


def test_a_run_cut_short_ends_in_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """What kill -9 leaves of a run is its folder without what is written at the end, and with answers of later steps."""
    words = words_of(data, *RESUMED)
    code, out = call(*words, f"trainer.output_dir={tmp_path}/whole")
    assert code == 0, out
    assert "stage.loss=dapo: stage.epsilon=0.2, stage.epsilon_high=0.28, stage.scale_rewards=group" in out
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for left_over in ("metrics.json", "report.md"):
        (tmp_path / "cut" / left_over).unlink()
    shutil.rmtree(tmp_path / "cut/adapter")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-4")
    code, out = call(*words, f"trainer.output_dir={tmp_path}/cut")
    assert code == 0 and "resumed from checkpoint-2" in out, out
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    logged = lines(tmp_path / "whole/history.jsonl")[0]
    assert {
        "reward", "reward_number", "reward_length", "reward_std", "no_signal", "response_length", "response_stopped", "entropy",
        "clip_fraction", "kl", "policy_loss",
    } <= logged.keys()  # fmt: skip
    assert logged["reward"] == pytest.approx(logged["reward_number"] + logged["reward_length"])
    sampled = lines(tmp_path / "whole/sampled.jsonl")
    assert [line["step"] for line in sampled] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    report = (tmp_path / "whole/report.md").read_text(encoding="utf-8")
    assert "## Sampled answers" in report and "reward_length" in report
    code, out = call("show", str(tmp_path / "whole"))
    assert code == 0 and "-1.00" in out  # a reward of the length in its table


@pytest.mark.heavy
def test_a_killed_run_ends_in_the_same_bytes(data: Path, warm_server: WarmServer, tmp_path: Path) -> None:
    words = words_of(data, *RESUMED)
    assert call(*words, f"trainer.output_dir={tmp_path}/whole")[0] == 0
    folder = tmp_path / "killed"
    killed = warm_server.run(
        *words, f"trainer.output_dir={folder}", cwd=tmp_path, below=str(folder), kill_at=1,
        matching=r"/\.partial-checkpoint-(?!2)",
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL, killed.output
    assert not (folder / "metrics.json").is_file()
    assert call(*words, f"trainer.output_dir={folder}")[0] == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_with_a_learning_rate_of_zero_nothing_moves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it with a user's own reward; the policy stays its reference."""
    from safetensors.torch import load_file

    from glmtuner.config import plugins
    from glmtuner.config.paths import ASSETS

    (tmp_path / "own_rewards.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        words = words_of(
            data, "plugins=own_rewards", "finetuning=full", "trainer.max_steps=2", "trainer.weight_decay=0.1"
        )
        code, out = call(
            *words, "reward=[short,number]", "reward.short.weight=0.5", "stage.num_iterations=2", "trainer.learning_rate=0",
            "trainer.output_dir=still",
        )  # fmt: skip
        assert code == 0, out
        for line in lines(tmp_path / "still/history.jsonl"):
            assert line["kl"] == pytest.approx(0, abs=1e-4) and line["clip_fraction"] == 0
            assert line["reward"] == pytest.approx(0.5 * line["reward_short"] + line["reward_number"])
            assert line["reward_short"] < 0
        before = load_file(ASSETS / "tiny_glm/model.safetensors")
        after = load_file(tmp_path / "still/model/model.safetensors")
        assert all((after[name] == before[name]).all() for name in before)
        for reward, reason in (
            ("broken", "reward=broken gave nan for the 4 answers"),
            ("failing", "ZeroDivisionError"),
        ):
            code, out = call(*words, f"reward={reward}", f"trainer.output_dir={reward}")
            assert code == 2 and reason in " ".join(out.split()) and "Traceback" not in out, out
    finally:
        from glmtuner.config.groups import SCHEMA_CLASSES

        for name in ("short", "broken", "failing"):
            SCHEMA_CLASSES["reward"].pop(name, None)
        plugins._loaded.pop("own_rewards", None)
        sys.modules.pop("own_rewards", None)


def test_a_label_that_nothing_can_be_compared_with_is_refused(data: Path, tmp_path: Path) -> None:
    data.write_text(
        json.dumps([*SUMS[:3], {"instruction": "What is five?", "input": "", "output": "five"}]), encoding="utf-8"
    )
    code, out = call(*words_of(data, f"trainer.output_dir={tmp_path}/run"))
    said = " ".join(out.split())
    assert code == 2 and "that of row 4 ('What is five?') holds no number" in said, out
    assert "Traceback" not in out


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_are_learned_by_reward(data: Path, tmp_path: Path, seed: int) -> None:
    """Behind five steps of SFT half of the answers are right."""
    common = ["model=tiny_glm", "tracker=none", f"data.dataset={data}", "data.max_source_length=32", "data.max_target_length=8",
              "finetuning=full", "trainer.disable_tqdm=true"]  # fmt: skip
    code, out = call(
        *common, "trainer.max_steps=5", "trainer.per_device_train_batch_size=25", "trainer.learning_rate=1e-3",
        f"trainer.output_dir={tmp_path}/sft",
    )  # fmt: skip
    assert code == 0, out
    code, out = call(
        *common, "stage=grpo", "reward=number", "stage.num_generations=16", f"model.checkpoint_dir={tmp_path}/sft",
        f"trainer.seed={seed}", "trainer.max_steps=30", "trainer.per_device_train_batch_size=12", "trainer.learning_rate=1e-4",
        "trainer.lr_scheduler_type=constant", "trainer.logging_steps=5", "trainer.eval_strategy=steps", "trainer.eval_steps=10",
        "trainer.eval_on_start=true", f"data.eval_dataset={data}", "trainer.per_device_eval_batch_size=25",
        "trainer.save_strategy=no", f"trainer.output_dir={tmp_path}/grpo",
    )  # fmt: skip
    assert code == 0, out
    history = lines(tmp_path / "grpo/history.jsonl")
    right = [line["eval_reward_number"] for line in history if "eval_reward_number" in line]
    assert right[-1] > right[0] + 0.2
    assert max(line["kl"] for line in history if "kl" in line) < 5
