"""Every command on a run folder with a damaged file ends in a result, or in one paragraph that names what is wrong.

ATTACK_RUNS is the number of combinations of file, damage and command that are tried, out of all (100); 0 tries all of them.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from warm_server import WarmServer

DAMAGED = int(os.environ.get("ATTACK_RUNS", "100"))
SECONDS = 10.0  # in which a command must end; a machine that does other things, too, is given three times that
TRAIN = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=8", "data.dev_ratio=0.25",
    "data.max_source_length=24", "data.max_target_length=8", "trainer.max_steps=4", "trainer.save_steps=2",
    "trainer.logging_steps=1", "trainer.disable_tqdm=true", "trainer.eval_on_start=true", "trainer.eval_strategy=steps",
    "trainer.eval_steps=2", "trainer.predict_with_generate=true", "trainer.do_predict=true", "trainer.output_dir=run",
]  # fmt: skip
COMMANDS: dict[str, list[str]] = {
    "show": ["show", "run"],
    "report": ["report", "run"],
    "chat": ["chat", "run", "generation.max_new_tokens=2"],
    "export": ["export", "run", "--to", "out"],
    "predict": [
        "trainer=predict", "model.checkpoint_dir=run", "data.dataset=belle_sample", "data.max_samples=2", "tracker=none",
        "data.max_target_length=4", "trainer.disable_tqdm=true", "trainer.output_dir=answers",
    ],
    "again": TRAIN,
    "resume": TRAIN,  # of the same folder without metrics.json
    "overwrite": [*TRAIN, "trainer.overwrite_output_dir=true"],
}  # fmt: skip
FILES = [
    "config.yaml", "overrides.txt", "provenance.json", "history.jsonl", "metrics.json", "predictions.jsonl", "losses.jsonl",
    "report.md", "failed.json", "evaluations/step-0.jsonl", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors", *(
        f"checkpoints/checkpoint-4/{name}" for name in (
            "complete.json", "progress.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
            "adapter_model.safetensors",
        )
    ),
]  # fmt: skip


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path / "inside").mkdir(parents=True)


def write(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b"{"
    path.write_bytes(content[: len(content) // 2])


def change_types(path: Path) -> None:
    """Every value as one of another type."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "{}"
    swapped = {"[]": "7", "null": "[1, {}]", "true": "{a: 1}", ": 8\n": ": [x]\n", ": 4\n": ": {}\n"}
    for old, new in swapped.items():
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": remove,
    "a folder": make_folder,
    "a link to itself": loop,
    "empty": write(b""),
    "truncated": truncate,
    "other types": change_types,
    "null": write(b"null\n"),
    "a list": write(b"[1, 2, {}]\n"),
    "a number": write(b"7\n"),
    "a word": write(b'"word"\n'),
    "an empty mapping": write(b"{}\n"),
    "groups of other types": write(json.dumps({"model": [], "stage": 7, "typed": 5, "data": None}).encode()),
    "nested": write(b"[" * 20_000 + b"]" * 20_000),
    "nested mappings": write(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "aliases": write(BOMB.encode()),
    "binary": write(bytes(range(256)) * 20),
    "zeros": write(bytes(5000)),
    "lines of other types": write(
        b'{"step": "x"}\n{"index": []}\n7\n{"index": {}, "prompt": 3}\n{"step": null, "loss": "a"}\n'
    ),
    "huge": write(b'{"a": "' + b"x" * 3_000_000 + b'"}'),
    "an interpolation": write(b"model: ${oc.env:HOME}\ntrainer: {seed: '${x}'}\n"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, warm_server: WarmServer) -> Path:
    """The folder that holds the run."""
    folder = tmp_path_factory.mktemp("damaged")
    done = warm_server.run(*TRAIN, cwd=folder)
    assert done.code == 0, done.output
    return folder


def combinations() -> list[tuple[str, str, str]]:
    every = [(file, damage, command) for file in FILES for damage in DAMAGES for command in COMMANDS]
    first = [item for item in every if item[0] == "config.yaml" and item[2] in ("show", "chat", "resume")]
    others = [item for item in every if item not in first]
    random.Random(7).shuffle(others)
    return every if not DAMAGED else (first[:DAMAGED:2] + others)[:DAMAGED]


@pytest.mark.parametrize(("file", "damage", "command"), combinations())
def test_a_damaged_folder(
    warm_server: WarmServer, trained: Path, tmp_path: Path, file: str, damage: str, command: str
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    weights = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    if command == "resume":
        for name in ("metrics.json", "predictions.jsonl", "report.md"):
            (tmp_path / "run" / name).unlink()
        shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run" / file).parent.mkdir(exist_ok=True)
    DAMAGES[damage](tmp_path / "run" / file)
    done = warm_server.run(*COMMANDS[command], cwd=tmp_path, stdin="hello\n", timeout=3 * SECONDS)
    assert done.code in (0, 1, 2), (done.code, done.output[-2000:])
    assert "Traceback" not in done.output, done.output
    if done.code:
        paragraph = [line for line in done.output.splitlines() if line.startswith("glmtuner: ")]
        assert len(paragraph) == 1 and "run" in paragraph[0] and len(paragraph[0]) < 1500, done.output
    if command == "resume" and done.code == 0:
        assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == weights  # nothing was lost
        if file.startswith("checkpoints") and "resumed from checkpoint-4" not in done.output:
            assert "checkpoint-4 is skipped" in done.output
