"""The command line as a user meets it: help, composed config, errors that write nothing, show, sweeps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import serve

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


@pytest.mark.heavy
def test_without_a_reader_what_only_prints_ends_and_what_writes_files_goes_on(tmp_path: Path) -> None:
    run = [*TINY, "data.dataset=belle_sample", "trainer.output_dir=run"]
    written = ["run/metrics.json", "run/adapter/adapter_model.safetensors", "run/report.html", "exported/export.json"]
    for words, code, said, count in (
        (run, 0, "glmtuner: the reader of standard output has gone; the run goes on\n", 2),
        (["show", "run"], 141, "", 2),
        (["--check", *run[:-1]], 141, "", 2),
        (["report", "run"], 0, "", 3),
        (["export", "run", "--to", "exported"], 0, "", 4),
    ):
        with subprocess.Popen(
            [sys.executable, "-m", "glmtuner", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait()) == (said, code), words
        assert [(tmp_path / name).is_file() for name in written] == [True] * count + [False] * (4 - count), words


def test_a_finished_run_is_pushed_to_a_hub(glmtuner_process: Callable, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    root.mkdir()
    server = serve(root)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    env = {"HF_ENDPOINT": address, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
    words = [
        *TINY, "trainer.max_steps=1", "data.dataset=belle_sample", "trainer.push_to_hub=true", "trainer.hub_model_id=me/mine",
        "trainer.hub_revision=v2", "trainer.hub_private_repo=true", "trainer.output_dir=run",
    ]  # fmt: skip
    try:
        done = glmtuner_process(*words, "trainer.hub_token=good", env=env)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uploaded run/adapter to me/mine" in done.stdout
    name = "adapter_model.safetensors"
    assert (root / "models/me/mine" / name).read_bytes() == (tmp_path / "run/adapter" / name).read_bytes()
    assert json.loads((root / "created.json").read_text())["visibility"] == "private"
    assert (root / "branch").read_text() == "v2"


def test_a_hub_that_does_not_answer_is_known_before_the_training(glmtuner: Callable, tmp_path: Path) -> None:
    """The tests' own process is offline."""
    told = one_paragraph(
        glmtuner(*TINY, "data.dataset=belle_sample", "trainer.push_to_hub=true", "trainer.output_dir=run")
    )
    assert "trainer.push_to_hub=true: the repository run cannot be written" in told and "type `hf auth login`" in told
    assert not (tmp_path / "run").exists()


def test_what_fails_late_is_refused_early_and_blocks_nothing(glmtuner: Callable, tmp_path: Path) -> None:
    words = [*TINY, "data.dataset=belle_sample", "trainer.output_dir=run"]
    for mistakes in (
        ["trainer.lr_scheduler_type=cosine_with_min_lr"],
        ["trainer.bf16=true"],
        ["trainer.accelerator_config={even_batch: true}"],
        ["trainer.optim=galore_adamw"],
        ["data.dev_ratio=0.2", "trainer.eval_strategy=steps", "trainer.metric_for_best_model=rouge-9"],
    ):
        one_paragraph(glmtuner(*words, *mistakes))
        assert not (tmp_path / "run").exists()
    done = glmtuner(*words)
    assert done.returncode == 0, done.stderr
