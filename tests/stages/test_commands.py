"""Each stage by the real command line: a sweep that is killed by SIGKILL in its first job and typed again, and its report."""

import csv
import json
import signal
from pathlib import Path

import pytest
from warm_server import WarmServer

COMMON = [
    "model=tiny_glm", "tracker=none", "data.max_source_length=48", "data.max_target_length=12", "data.max_samples=16",
    "data.dev_ratio=0.25", "trainer.do_eval=true", "trainer.max_steps=3", "trainer.save_steps=1", "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=2", "trainer.learning_rate=3e-3", "trainer.disable_tqdm=true", "trainer.use_cpu=true",
]  # fmt: skip
PAIRS = ["data.dataset=preference_sample"]
SWEEPS = {  # stage -> what is swept and by what it is judged
    "pt": ["data.dataset=text_sample", "stage.block_length=16,32", "objective=perplexity"],
    "sft": ["data.dataset=identity_sample", "stage.loss=cross_entropy,dft", "objective=eval_loss"],
    "rm": [*PAIRS, "trainer.seed=1,2", "objective=accuracy"],
    "dpo": [*PAIRS, "stage.loss=sigmoid,apo_zero", "objective=margin"],
    "orpo": [*PAIRS, "stage.beta=0.1,0.5", "objective=log_odds"],
    "simpo": [*PAIRS, "stage.gamma=0.5,1", "objective=accuracy"],
    "cpo": [*PAIRS, "stage.loss=sigmoid,ipo", "objective=nll_chosen"],
    "kto": ["data.dataset=feedback_sample", "data.max_samples=60", "stage.beta=0.1,0.5", "objective=reward_desirable"],
    "ppo": [*PAIRS, "model.reward_model=../rm", "stage.kl_coefficient=0.1,0.3", "objective=reward"],
    "grpo": ["data.dataset=../sums.json", "reward=number", "stage.num_generations=4", "stage.loss=grpo,dapo", "objective=reward"],
}  # fmt: skip


def finished(server: WarmServer, folder: Path, *words: str) -> str:
    done = server.run(*words, cwd=folder)
    assert done.code == 0, done.output
    return done.output


def in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    from glmtuner.cli.main import main

    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main([*words]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model, and sums."""
    folder = tmp_path_factory.mktemp("commands")
    sums = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(4) for b in range(4)]
    (folder / "sums.json").write_text(json.dumps(sums), encoding="utf-8")
    return folder


@pytest.mark.parametrize("stage", SWEEPS)
def test_a_killed_sweep_typed_again_is_the_undisturbed_one(
    place: Path, warm_server: WarmServer, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    if stage == "ppo":
        in_this_process(place / "for_ppo", monkeypatch, "stage=rm", *COMMON, *PAIRS, "trainer.output_dir=../rm")
    words = ["-m", f"stage={stage}", *COMMON, *SWEEPS[stage], "name=swept"]
    whole, killed = place / f"{stage}-whole", place / f"{stage}-killed"
    in_this_process(whole, monkeypatch, *words)
    killed.mkdir()
    ended = warm_server.run(
        *words, cwd=killed, below=str(killed), matching=r"/checkpoints/\.partial-checkpoint-2", kill_at=1
    )
    assert ended.code == -signal.SIGKILL, ended.output
    assert [*killed.glob("outputs/sweeps/swept/*/checkpoints/checkpoint-1/complete.json")]
    assert not [*killed.glob("outputs/sweeps/swept/*/metrics.json")]
    told = finished(warm_server, killed, *words)
    assert "resumed from checkpoint-" in told and "(2 finished, 0 did not fit into memory, 0 failed)" in told
    assert outcomes(killed) == outcomes(whole)
    check_report(killed, finished(warm_server, killed, "report", "outputs/sweeps/swept"), words)


def outcomes(folder: Path) -> dict[str, bytes]:
    """The history, the losses and the weights of each job."""
    jobs = folder / "outputs/sweeps/swept"
    wanted = [*jobs.glob("*/history.jsonl"), *jobs.glob("*/losses.jsonl"), *jobs.glob("*/adapter/*.safetensors")]
    found = {path.relative_to(jobs).as_posix(): path.read_bytes() for path in wanted}
    assert len(found) >= 6
    return found


def check_report(folder: Path, told: str, words: list[str]) -> None:
    """The report orders both jobs by the stage's objective, which each measured."""
    (objective,) = [word.partition("=")[2] for word in words if word.startswith("objective=")]
    measured = objective if objective.startswith("eval_") else f"eval_{objective}"
    sweep = folder / "outputs/sweeps/swept"
    values = [json.loads(path.read_text(encoding="utf-8"))[measured] for path in sweep.glob("*/metrics.json")]
    with (sweep / "leaderboard.csv").open(encoding="utf-8") as file:
        ranked = [float(row[measured]) for row in csv.DictReader(file)]
    less = measured.endswith(("loss", "perplexity"))
    assert ranked == pytest.approx(sorted(values, reverse=not less)) and len(ranked) == 2
    assert measured in (sweep / "report.md").read_text(encoding="utf-8") and measured.removeprefix("eval_") in told
    assert (sweep / "report.html").stat().st_size > 1000
