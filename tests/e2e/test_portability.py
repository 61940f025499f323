"""What Windows does not have is not needed: here it is removed from Python before glmtuner is imported.

It is removed for every importer, third-party packages included. Only modules that use it because the platform is Linux are
imported before: psutil's backend needs `resource`, and torch's launcher of workers SIGKILL.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Runs each of the command lines in its argument and prints their exit codes, one JSON list of all.
CHILD = """\
import importlib, select, signal, sys

for module in sys.argv[2:]:
    importlib.import_module(module)
for module in ("fcntl", "resource", "pwd"):
    sys.modules[module] = None  # so that importing it raises ImportError
del select.poll
WINDOWS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
for name in dir(signal):
    if name.startswith("SIG") and name not in WINDOWS:
        delattr(signal, name)

import json
from glmtuner.__main__ import main

print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""
TINY = [
    "model=tiny_glm", "tracker=none", "data.dataset=identity_sample", "trainer.max_steps=2", "trainer.logging_steps=1",
    "trainer.save_steps=1", "trainer.disable_tqdm=true",
]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "GLMTUNER_CACHE": str(folder / "cache")}


def run_commands(folder: Path, *commands: list[str], imported: list[str]) -> tuple[list[int], str, str]:
    """The exit codes of the commands, which run one after the other in one child, and its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), *imported],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


def test_help_and_a_mistyped_key(tmp_path: Path) -> None:
    codes, out, errors = run_commands(tmp_path, ["--help"], ["finetuning.lora_rnk=4"], imported=["psutil"])
    assert codes == [0, 2], errors
    assert out.startswith("glmtuner fine-tunes")
    assert "glmtuner: " in errors and "'finetuning.lora_rnk'" in errors and "'lora_rank'" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("flag", ["-u", "-B"], ids=["unbuffered", "buffered"])
def test_help_whose_reader_has_closed_the_pipe(tmp_path: Path, flag: str) -> None:
    command = [sys.executable, flag, "-c", CHILD, '[["--help"]]', "psutil"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""


def test_a_run_and_a_sweep(tmp_path: Path) -> None:
    sweep = ["-m", *TINY, "trainer.seed=1,2", "name=seeds", "objective=train_loss"]
    codes, out, errors = run_commands(
        tmp_path, [*TINY, "trainer.output_dir=run"], ["show", "run"], [*TINY, "trainer.output_dir=run"], sweep,
        imported=["psutil", "torch.distributed.elastic.timer"],
    )  # fmt: skip
    assert codes == [0, 0, 2, 0], out + errors
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    assert metrics["train_loss"] > 0 and metrics["peak_memory_gib"] > 0
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert "finished" in out and "train_loss" in out
    assert "trainer.output_dir=run holds a finished run" in errors
    jobs = [path.parent for path in (tmp_path / "outputs/sweeps/seeds").glob("*/metrics.json")]
    assert len(jobs) == 2 and (tmp_path / "outputs/sweeps/seeds/report.html").is_file()


NAME = 'it\'s a "test" [x],{y}=z $HOME %d ~ 中文 😀'


def test_a_folder_of_any_name_is_used_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from glmtuner.cli.main import main

    folder = tmp_path / NAME
    folder.mkdir()
    monkeypatch.chdir(folder)
    run = [*TINY, "data.max_samples=4", "trainer.max_steps=1", "trainer.output_dir=run"]
    assert main(run) == 0
    for command in (
        ["show", f"{folder}/run"],
        ["trainer=predict", "data.dataset=identity_sample", "data.max_samples=1", "data.max_target_length=4", "tracker=none",
         "model.checkpoint_dir=run", "trainer.disable_tqdm=true", "trainer.output_dir=answers"],
    ):  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115
    assert main(["chat", f"{folder}/run"]) == 0
    (folder / "run/metrics.json").unlink()
    assert main(run) == 0  # resumes
    assert "resumed from checkpoint-1" in capsys.readouterr().out
