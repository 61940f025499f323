"""A full disk, kill -9 and half a file: the next command says what happened, and what was there before is whole."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm_server import WarmServer

from glmtuner.cli.main import main
from glmtuner.run_folder.checkpoints import checkpoint_problem

SHORT = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=8", "data.max_target_length=16",
    "trainer.max_steps=4", "trainer.save_steps=2", "trainer.learning_rate=1e-3", "trainer.disable_tqdm=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run."""
    folder = tmp_path_factory.mktemp("safety") / "run"
    assert main([*SHORT, f"trainer.output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of its own, of so many MB; called again, it grows."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(megabytes: int) -> Path:
        again = ["-o", f"remount,size={megabytes}m"] if os.path.ismount(folder) else ["-o", f"size={megabytes}m"]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip("needs the right to mount a disk")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_during_training_keeps_the_checkpoint_before(
    disk: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*SHORT, "finetuning=full"]
    assert main([*words, f"trainer.output_dir={tmp_path / 'undisturbed'}"]) == 0
    folder = disk(45) / "run"  # a checkpoint has 27 MB
    assert main([*words, f"trainer.output_dir={folder}"]) == 1
    told = capsys.readouterr().err
    assert "the disk is full" in told and "type the same command again" in told and "Traceback" not in told
    assert checkpoint_problem(folder / "checkpoints" / "checkpoint-2") is None
    disk(300)
    assert main([*words, f"trainer.output_dir={folder}"]) == 0
    for name in ("history.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_disk_that_fills_during_an_export(run: Path, disk: Callable, capsys: pytest.CaptureFixture) -> None:
    folder = disk(7)
    (folder / "before").mkdir()
    (folder / "before" / "model.safetensors").write_bytes(b"an export of last week")
    assert main(["export", str(run), "--to", str(folder / "out")]) == 1
    told = capsys.readouterr().err
    assert "the disk is full" in told and "Traceback" not in told
    assert not (folder / "out").exists()
    assert (folder / "before" / "model.safetensors").read_bytes() == b"an export of last week"
    disk(100)
    assert main(["export", str(run), "--to", str(folder / "out")]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["before", "out"]
    assert (folder / "out" / "export.json").is_file()


def test_an_export_that_is_killed_is_no_export(run: Path, warm_server: WarmServer, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    for file in ("config.json", "tokenizer_config.json", ".export.json.partial"):
        killed = warm_server.run(
            "export",
            str(run),
            "--to",
            str(out),
            cwd=tmp_path,
            below=str(partial),
            kill_at=1,
            matching=re.escape(f"/{file}"),
        )
        assert killed.code == -signal.SIGKILL, killed.output
        assert partial.exists() and not out.exists()
    assert (partial / "model.safetensors").is_file()
    assert main(["export", str(run), "--to", str(out)]) == 0
    assert (out / "export.json").is_file() and not partial.exists()


@pytest.mark.parametrize("verb", [["chat"], ["serve", "--port", "0"], ["export", "--to", "out"]])
def test_half_a_file_of_weights_is_told_by_every_verb(
    run: Path, verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    weights = Path("run/adapter/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert main([verb[0], "run", *verb[1:]]) == 2
    told = capsys.readouterr().err
    assert told.startswith("glmtuner: ") and str(weights) in told and "Traceback" not in told
    assert not Path("out").exists()
    weights.write_bytes(whole)
    assert main(["export", "run", "--to", "out"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["show", "run"],
        ["report", "run"],
        ["chat", "run"],
        ["serve", "run", "--port", "0"],
        ["export", "run", "--to", "out"],
        ["trainer=predict", *SHORT[1:5], "model.checkpoint_dir=run", "trainer.output_dir=out"],
        [*SHORT, "model.checkpoint_dir=run", "trainer.output_dir=out"],
        [*SHORT, "stage=ppo", "model.reward_model=run", "trainer.output_dir=out"],
        [*SHORT, "trainer.resume_from_checkpoint=run", "trainer.output_dir=out"],
    ],
    ids=["show", "report", "chat", "serve", "export", "predict", "start", "reward", "resume"],
)
def test_the_config_of_a_strangers_run_reads_no_variable_of_the_reader(
    run: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "typed-env-value")
    shutil.copytree(run, "run")
    config = Path("run/config.yaml")
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("model_name_or_path: package://tiny_glm", "model_name_or_path: ${oc.env:MINE}"))
    assert config.read_text(encoding="utf-8") != text
    before = {path for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "model.model_name_or_path holds an interpolation" in err and "config.yaml" in err and err.count("\n") == 1
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    assert "typed-env-value" not in out + err
    assert not [path for path in before if path.is_file() and b"typed-env-value" in path.read_bytes()]
