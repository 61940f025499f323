"""hydra/launcher=shared: each job's folder against that of a run of its own, by the basic launcher."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import wandb_file
from safetensors.torch import load_file

from glmtuner.run_folder.folder import job_folders
from glmtuner.trackers.wandb import open_sessions

SHARED = "hydra/launcher=shared"
TINY = [
    "-m", "--config-dir", "my_conf", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=24",
    "data.eval_dataset=identity_sample", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1",
    "trainer.save_steps=2", "trainer.disable_tqdm=true",
]  # fmt: skip
UNLIKE = {
    "a": "finetuning: {lora_rank: 2, lora_dropout: 0.0}\ntrainer: {learning_rate: 2.0e-3, seed: 1, max_steps: 6}",
    "b": "finetuning: {lora_rank: 8, lora_alpha: 8, lora_dropout: 0.2, lora_target: [all]}\n"
    "trainer: {learning_rate: 1.0e-3, seed: 2, max_steps: 4, gradient_accumulation_steps: 2, max_grad_norm: 0.3}",
    "c": "finetuning: {lora_rank: 5, lora_dropout: 0.1, use_rslora: true}\n"
    "trainer: {learning_rate: 5.0e-4, seed: 3, data_seed: 9, max_steps: 3, per_device_train_batch_size: 1, do_eval: true}",
}
MORE = {
    "d": "finetuning: {lora_rank: 16, lora_dropout: 0.5, lora_target: [mlp.gate_up_proj]}\n"
    "trainer: {learning_rate: 1.0e-2, seed: 4, max_steps: 9, lr_scheduler_type: cosine, warmup_steps: 5}",
    "e": "finetuning: {lora_rank: 4, layers_to_transform: [1]}\n"
    "trainer: {learning_rate: 1.0e-3, seed: 5, num_train_epochs: 0.5, weight_decay: 0.1, adam_beta1: 0.8}",
    "f": "finetuning: {loraplus_lr_ratio: 16}\ntrainer: {learning_rate: 1.0e-3, seed: 6, max_steps: 7, optim: adafactor}",
    "g": "trainer: {learning_rate: 1.0e-3, seed: 7, max_steps: 8, label_smoothing_factor: 0.1, per_device_train_batch_size: 3}",
    "h": "finetuning: {lora_rank: 32}\ntrainer: {seed: 8, max_steps: 5, do_predict: true, predict_with_generate: true}\n"
    "generation: {max_new_tokens: 4}",
}


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[[Mapping[str, str]], str]:
    """Writes experiments, and returns the override that sweeps over them."""
    folder = tmp_path / "my_conf/experiment"
    folder.mkdir(parents=True)

    def write(experiments: Mapping[str, str]) -> str:
        for name, text in experiments.items():
            (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
        return f"experiment={','.join(experiments)}"

    return write


def folders(sweep: Path) -> dict[str, Path]:
    return {folder.path.name.rpartition("_")[0]: folder.path for folder in job_folders(sweep)}


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same(shared: Path, alone: Path) -> None:
    """The folder is that of the job's own run: the same files and keys, histories and adapters within 1e-5.

    A job that a signal stopped has the checkpoint of that step, too.
    """
    assert {name for name in files(shared) ^ files(alone) if not name.startswith("checkpoints/checkpoint-")} == set()
    assert files(shared) >= files(alone)
    ours, theirs = history(shared), history(alone)
    assert len(ours) == len(theirs) > 0
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)
    trained, expected = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (shared, alone))
    assert trained.keys() == expected.keys()
    assert max(float((trained[name] - expected[name]).abs().max()) for name in trained) <= 1e-5
    if (alone / "predictions.jsonl").is_file():
        assert (shared / "predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (shared, alone))
    assert ours.keys() == theirs.keys()
    same = [name for name in theirs if not any(part in name for part in ("runtime", "per_second", "memory"))]
    assert {name: ours[name] for name in same} == pytest.approx(
        {name: theirs[name] for name in same}, rel=1e-5, abs=1e-5
    )


def assert_sweeps_agree(root: Path, count: int, shared: str = "shared", alone: str = "alone") -> None:
    ours, theirs = (folders(root / "outputs/sweeps" / name) for name in (shared, alone))
    assert ours.keys() == theirs.keys() and len(ours) == count
    for name in theirs:
        assert_same(ours[name], theirs[name])


def test_jobs_that_share_a_base_write_what_their_own_runs_write(glmtuner, tmp_path, jobs):
    words = [*TINY, jobs(UNLIKE)]
    assert glmtuner(*words, "name=alone").returncode == 0
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hydra/launcher=shared: 3 jobs share" in done.stdout and "by itself" not in done.stdout
    assert_sweeps_agree(tmp_path, 3)
    again = glmtuner(*words, "name=shared", SHARED)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 3


def test_a_job_that_diverges_leaves_the_others_their_bytes(glmtuner, tmp_path, jobs):
    """Against a sweep whose last job ends, with the same batches, where the diverging one does."""
    written = {}
    for name, rest in {
        "calm": "learning_rate: 1.0e-3, max_steps: 2",
        "wild": "learning_rate: 1.0e+30, max_steps: 5",
    }.items():
        last = f"trainer: {{seed: 3, {rest}, lr_scheduler_type: constant, max_grad_norm: 0}}"
        done = glmtuner(*TINY, jobs({"a": UNLIKE["a"], "b": UNLIKE["b"], "c": last}), f"name={name}", SHARED)
        found = folders(tmp_path / "outputs/sweeps" / name)
        written[name] = [
            [
                (found[f"experiment-{job}"] / file).read_bytes()
                for file in ("history.jsonl", "adapter/adapter_model.safetensors")
            ]
            for job in "ab"
        ]
    assert written["calm"] == written["wild"]
    assert done.returncode == 1 and "(2 finished, 0 did not fit into memory, 1 failed)" in done.stdout
    failure = json.loads((found["experiment-c"] / "failed.json").read_text())
    assert "is nan in step 2: the training diverged" in failure["reason"] and "traceback" not in failure


@pytest.mark.heavy
def test_a_signal_saves_every_job_and_the_same_command_goes_on(glmtuner, tmp_path, jobs, monkeypatch):
    from glmtuner.training.shared_trainer import SharedTrainer

    words = [*TINY, jobs(UNLIKE)]
    assert glmtuner(*words, "name=alone").returncode == 0
    step = SharedTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.args.seed == 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(SharedTrainer, "training_step", signalled)
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert done.stdout.count("the same command resumes it") == 3
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 0 and done.stdout.count("resumed from checkpoint-") >= 2, done.stdout + done.stderr
    assert_sweeps_agree(tmp_path, 3)


@pytest.mark.heavy
def test_jobs_group_by_base_and_others_run_apart_with_the_reason(glmtuner, tmp_path, jobs):
    words = [*TINY, "trainer.max_steps=2", "trainer.seed=1,2"]
    done = glmtuner(*words, "finetuning=lora,freeze", "data.max_source_length=64,96", "name=groups", SHARED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 jobs share package://tiny_glm") == 2
    assert "jobs 2, 3, 6, 7 of the sweep will run apart: finetuning=freeze is no LoRA on a frozen base" in done.stdout
    assert "(8 finished" in done.stdout


@pytest.mark.heavy
def test_jobs_wait_for_their_turn_and_a_failure_stops_no_other(glmtuner, tmp_path, jobs, monkeypatch):
    from glmtuner.launch import training

    saved = training.save_trained

    def fails(context, objective):
        if context.run.trainer.seed == 2:
            raise RuntimeError("a cable was pulled")
        return saved(context, objective)

    words = [*TINY, "trainer.max_steps=2", "trainer.seed=1,2,3", "name=queue", SHARED]
    wrong = glmtuner(*words, "hydra.launcher.jobs_at_once=0")
    assert (
        wrong.returncode == 2
        and "hydra.launcher.jobs_at_once=0: legal is null" in wrong.stderr
        and not list(tmp_path.glob("outputs/*/*/*_*"))
    )
    monkeypatch.setattr(training, "save_trained", fails)
    done = glmtuner(*words, "hydra.launcher.jobs_at_once=2")
    assert done.returncode == 1 and "3 jobs share package://tiny_glm, 2 at a time" in done.stdout
    assert "RuntimeError: a cable was pulled" in done.stdout and "(2 finished" in done.stdout
    monkeypatch.undo()
    done = glmtuner(*words)
    assert done.returncode == 0 and "it is the only one to run" in done.stdout


@pytest.mark.heavy
@pytest.mark.matrix
def test_eight_unlike_jobs_that_are_killed_write_what_their_own_runs_write(glmtuner, warm_server, tmp_path, jobs):
    """SIGKILL when some checkpoints are written, and again when more are; the same command goes on from what was written."""
    words = [*TINY, jobs(UNLIKE | MORE)]
    assert glmtuner(*words, "name=alone").returncode == 0
    sweep = tmp_path / "outputs/sweeps/shared"
    for change in (7, 14):
        ended = warm_server.run(
            *words, "name=shared", SHARED, cwd=tmp_path, below=str(sweep), kill_at=change,
            matching=r"/checkpoints/\.partial-checkpoint-\d+/\.complete\.json\.partial",
        )  # fmt: skip
        assert ended.code == -signal.SIGKILL, ended.output
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 0 and "resumed from checkpoint-" in done.stdout, done.stdout + done.stderr
    assert_sweeps_agree(tmp_path, 8)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "more",
    [["quant=int4"], ["trainer.gradient_checkpointing=true"], ["trainer.bf16=true", "trainer.use_cpu=true"]],
    ids=" ".join,
)  # fmt: skip
def test_other_bases_and_precisions_agree_too(glmtuner, tmp_path, jobs, more):
    """In 16 bits a row of other length is rounded otherwise."""
    words = [*TINY, jobs({name: UNLIKE[name] for name in "ab"}), *more]
    assert glmtuner(*words, "name=alone").returncode == 0
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 0 and "by itself" not in done.stdout, done.stdout + done.stderr
    if "trainer.bf16=true" not in more:
        assert_sweeps_agree(tmp_path, 2)
        return
    ours, theirs = (folders(tmp_path / "outputs/sweeps" / name) for name in ("shared", "alone"))
    for name, folder in theirs.items():
        for line, expected in zip(history(ours[name]), history(folder), strict=True):
            assert line == pytest.approx(expected, rel=0.05, abs=0.01)


@pytest.mark.heavy
def test_the_base_is_in_memory_once(glmtuner_process, tmp_path, jobs):
    """The peak is at most that of base and process, and 1.15 times what the jobs have of their own, as it is estimated."""
    from glmtuner.config.compose import compose
    from glmtuner.launch.device import device_of
    from glmtuner.launch.memory_check import estimate_run
    from glmtuner.launch.register import register_presets
    from glmtuner.launch.shared_memory import own_bytes

    text = "一二三四五六七八九十" * 60
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": text, "output": text}] * 16, ensure_ascii=False))
    jobs({})
    words = [
        "model=tiny_glm", "tracker=none", f"data.dataset={tmp_path / 'long.json'}", "data.max_source_length=256",
        "data.max_target_length=256", "trainer.per_device_train_batch_size=4", "trainer.max_steps=2", "trainer.save_strategy=no",
    ]  # fmt: skip
    ranks = (2, 4, 8, 16)
    done = glmtuner_process("-m", *words, f"finetuning.lora_rank={','.join(map(str, ranks))}", "name=memory", SHARED)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads(path.read_text()) for path in (tmp_path / "outputs/sweeps/memory").glob("*/metrics.json")]
    alone = glmtuner_process(*words, "finetuning.lora_rank=16", "trainer.output_dir=alone")
    assert alone.returncode == 0
    register_presets()
    own = []
    for rank in ranks:
        run = compose([*words, f"finetuning.lora_rank={rank}"])
        estimate, _ = estimate_run(run, device_of(run.run), None)
        own.append(own_bytes(estimate) / 2**30)
    common = json.loads((tmp_path / "alone/metrics.json").read_text())["peak_memory_gib"] - own[-1]  # measured
    peak = max(each["peak_memory_gib"] for each in metrics)
    print(f"peak {peak:.3f} GiB, base and process {common:.3f}, jobs {[round(each, 3) for each in own]}")
    assert peak <= common + 1.15 * sum(own)


@pytest.mark.heavy
def test_a_race_of_jobs_that_share_ends_as_one_of_jobs_that_do_not(glmtuner, tmp_path):
    words = [
        "-m", "hydra/sweeper=race", "hydra.sweeper.rungs=[2,4]", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample",
        "data.max_samples=40", "data.dev_ratio=0.4", "data.max_target_length=32", "trainer.do_eval=true", "trainer.max_steps=6",
        "trainer.save_steps=3", "trainer.disable_tqdm=true", "trainer.learning_rate=3e-3,2.9e-3,1e-6",
    ]  # fmt: skip
    assert glmtuner(*words, "name=alone").returncode == 0
    done = glmtuner(*words, "name=shared", SHARED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 jobs share") == 2 and "GLMTUNER_PAUSE_AT" not in os.environ
    found, expected = (
        [json.loads(path.read_text()) for path in sorted((tmp_path / "outputs/sweeps" / name / "race").glob("rung-*"))]
        for name in ("shared", "alone")
    )
    assert len(found) == len(expected) == 2
    for rung, other in zip(found, expected, strict=True):
        assert [(job["job"], job["state"], job["step"]) for job in rung["jobs"]] == [
            (job["job"], job["state"], job["step"]) for job in other["jobs"]
        ]
        values, others = ([job["value"] for job in each["jobs"]] for each in (rung, other))
        assert values == pytest.approx(others, rel=1e-5)
    assert found[1]["jobs"][2]["state"] == "dropped"
    ours, theirs = (folders(tmp_path / "outputs/sweeps" / name) for name in ("shared", "alone"))
    finished = [name for name, folder in theirs.items() if (folder / "metrics.json").is_file()]
    assert finished
    for name in finished:
        assert_same(ours[name], theirs[name])


@pytest.mark.heavy
def test_the_hours_of_jobs_that_share_are_counted_once_and_end_them_all_at_the_limit(glmtuner, tmp_path, jobs):
    words = [*TINY, jobs({}) and "trainer.seed=1,2,3", "trainer.max_steps=2000", "trainer.save_steps=5000", "name=limited", SHARED,
             "budget.forecast=false"]  # fmt: skip
    done = glmtuner(*words, "budget.cpu_hours=0.004")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "budget.cpu_hours=0.004 is reached by" in done.stdout and "not started" not in done.stdout
    spent = [json.loads(path.read_text()) for path in (tmp_path / "outputs/sweeps/limited/.spent").glob("*.json")]
    assert [each["job"] for each in spent] == ["jobs_0_to_2"]
    assert 0.004 <= spent[0]["seconds"] / 3600 < 0.02
    for folder in folders(tmp_path / "outputs/sweeps/limited").values():
        assert len([*folder.glob("checkpoints/checkpoint-*/trainer_state.json")]) == 1
    again = glmtuner(*words, "budget.cpu_hours=0.004")
    assert again.returncode == 1 and again.stdout.count("not started, budget.cpu_hours=") == 3


@pytest.mark.heavy
def test_each_job_that_shares_has_a_run_of_its_own_in_wandb(glmtuner, tmp_path, jobs, monkeypatch):
    """Offline; the lines of each are those of its history, and W&B's process ends with the last."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [word for word in TINY if not word.startswith("tracker=")]
    done = glmtuner(*words, jobs(UNLIKE), "name=tracked", "tracker=wandb", SHARED)
    assert done.returncode == 0 and "3 jobs share" in done.stdout, done.stdout + done.stderr
    found = folders(tmp_path / "outputs/sweeps/tracked")
    ids = set()
    for name, folder in found.items():
        (session,) = wandb_file.sessions(folder)
        ids.add(session.run.run_id)
        assert session.run.display_name == name and session.run.run_group == "tracked" and session.exit_code == 0
        losses = [line["train/loss"] for line in session.history if "train/loss" in line]
        assert losses == [line["loss"] for line in history(folder) if "loss" in line]
    assert len(ids) == 3 and not open_sessions
