"""The command line as a user meets it: help, composed config, errors that write nothing, show, sweeps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = ["model=tiny_glm", "tracker=none", "data.max_samples=16", "trainer.max_steps=2", "trainer.disable_tqdm=true"]


def one_paragraph(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def test_help_shows_groups_and_examples(glmtuner: Callable) -> None:
    done = glmtuner("--help")
    assert done.returncode == 0
    for group in ("model", "quant", "data", "finetuning", "stage", "trainer", "generation", "tracker", "experiment"):
        assert f"\n  {group} " in done.stdout
    assert done.stdout.count("python -m glmtuner experiment=quickstart") == 1


def test_the_composed_run_is_shown(glmtuner: Callable) -> None:
    done = glmtuner("--cfg", "job", "--resolve", "finetuning=lora", "data.dataset=alpaca_zh,belle")
    assert done.returncode == 0, done.stderr
    assert "dataset:\n  - alpaca_zh\n  - belle\n" in done.stdout
    assert "lora_target:\n  - query_key_value\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.datset=a,b"], "did you mean 'dataset'?"),
        (["data.dataset=alpaca_zh_sampel"], "no dataset named 'alpaca_zh_sampel'; did you mean 'alpaca_zh_sample'?"),
        (["data.dataset=nowhere.json"], "no dataset named 'nowhere.json'"),
        (["finetuning.lora_target=q_porj"], "'q_porj'; did you mean 'q_proj'?"),
        (["finetuning=freeze", "finetuning.num_layer_trainable=99"], "does not fit a model of 4 layers"),
        (["model.model_name_or_path=no/such/folder/here"], "no such folder here"),
        (["model.template=chatglm33"], "no template named 'chatglm33'; did you mean 'chatglm3'?"),
        (["quant=int4", "finetuning=freeze"], "quant=int4 stores frozen integer weights"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_write_nothing(
    glmtuner: Callable, tmp_path: Path, words: list[str], told: str
) -> None:
    words = ["model=tiny_glm", "tracker=none", "data.dataset=belle_sample", *words]
    assert told in one_paragraph(glmtuner(*words))
    assert list(tmp_path.iterdir()) == []


def test_broken_records_are_named_and_counted(glmtuner: Callable, tmp_path: Path) -> None:
    good = {"instruction": "你好", "input": "", "output": "你好！"}
    records = [good, {"instruction": "谁？", "input": "", "output": ""}, good, {"instruction": "数"}]
    (tmp_path / "mine.json").write_text(json.dumps(records), encoding="utf-8")
    told = one_paragraph(glmtuner(*TINY, "data.dataset=mine.json"))
    assert "mine.json: record 2: field output" in told
    assert "record 4" in told
    assert "data.max_bad_records=2" in told
    done = glmtuner(*TINY, "data.dataset=mine.json", "data.max_bad_records=2", "trainer.output_dir=run")
    assert done.returncode == 0, done.stderr
    assert "2 broken records skipped" in done.stdout
    kept = json.loads((tmp_path / "run/provenance.json").read_text())["data"]["mine.json"]
    assert kept["records"] == 2
    assert len(kept["skipped"]) == 2


def test_the_folder_is_complete_and_shown(glmtuner: Callable, tmp_path: Path) -> None:
    done = glmtuner(
        *TINY, "data.dataset=belle_sample", "model.plot_loss=true", "trainer.logging_steps=1", "trainer.hub_token=hf_x"
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "overrides.txt", "provenance.json", "history.jsonl", "metrics.json", "report.md", "loss.png",
        "checkpoints", "adapter",
    }  # fmt: skip
    assert not [path for path in folder.rglob("*") if path.suffix == ".bin"]
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_x" not in path.read_bytes(), path
    about = json.loads((folder / "provenance.json").read_text())
    assert about["template"]["name"] == "glm4"
    assert about["data"]["belle_sample"]["sha256"]
    assert {"command", "packages", "git", "seed"} <= about.keys()
    for line in (folder / "history.jsonl").read_text().splitlines():
        assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} == json.loads(line).keys()
    shown = glmtuner("show", str(folder))
    assert shown.returncode == 0
    assert "finished" in shown.stdout
    assert "train_loss" in shown.stdout


def test_a_sweep_runs_every_combination_in_folders_that_stay(glmtuner: Callable, tmp_path: Path) -> None:
    words = ["-m", *TINY, "data.dataset=alpaca_zh_sample,belle_sample", "trainer.seed=1,2", "name=both"]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = sorted(path.parent.name for path in (tmp_path / "outputs/sweeps/both").glob("*/config.yaml"))
    assert len(jobs) == 4
    assert all((tmp_path / "outputs/sweeps/both" / job / "metrics.json").is_file() for job in jobs)
    assert {name.split("_seed")[0] for name in jobs} == {"dataset-alpaca_zh_sample", "dataset-belle_sample"}
    again = glmtuner(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before, skipped") == 4


def test_a_sweep_with_a_mistake_in_one_job_starts_none(glmtuner: Callable, tmp_path: Path) -> None:
    told = one_paragraph(
        glmtuner("-m", *TINY, "data.dataset=belle_sample", "quant=none,int4", "finetuning=lora,freeze")
    )
    assert "quant=int4 stores frozen integer weights" in told
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_crash(tmp_path: Path) -> None:
    command = f"{sys.executable} -m glmtuner --help | head -n 1; {sys.executable} -m glmtuner --help | true"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("glmtuner fine-tunes") and done.stderr == ""
