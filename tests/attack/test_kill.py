"""A command that is killed by SIGKILL, at any moment, and given again ends with the files of one that was not disturbed.

ATTACK_KILLS is the number of kills at random moments (30), and ATTACK_KILL_SHARE the share of the moments before a change of a file that
are tried, too (0.04). ATTACK_KILLS=60 ATTACK_KILL_SHARE=1 is the full test, and takes an hour.
"""

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from warm_server import WarmServer

KILLS = int(os.environ.get("ATTACK_KILLS", "30"))
SHARE = float(os.environ.get("ATTACK_KILL_SHARE", "0.04"))
TIMINGS = re.compile(r"_runtime|_per_second|^seconds$|_time$|peak_memory|total_flos")
COMMON = [
    "model=tiny_glm", "tracker=none", "data.max_samples=10", "data.max_source_length=24", "data.max_target_length=12",
    "trainer.max_steps=4", "trainer.save_steps=2", "trainer.logging_steps=1", "trainer.learning_rate=1e-3",
    "trainer.per_device_train_batch_size=2", "trainer.disable_tqdm=true", "trainer.save_total_limit=1",
]  # fmt: skip
SFT = [
    *COMMON, "data.dataset=belle_sample", "data.dev_ratio=0.3", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
    "trainer.eval_on_start=true", "trainer.predict_with_generate=true", "trainer.do_eval=true", "trainer.do_predict=true",
]  # fmt: skip
ONE = "trainer.output_dir=run"
COMMANDS: dict[str, list[str]] = {
    "lora": [*SFT, "finetuning.lora_dropout=0.1", ONE],
    "full": [*SFT, "finetuning=full", ONE],
    "dpo": [*COMMON, "stage=dpo", "data.dataset=preference_sample", "data.dev_ratio=0.3", "trainer.do_eval=true", ONE],
    "ppo": [*COMMON, "stage=ppo", "model.reward_model=../reward", "data.dataset=belle_sample", ONE],
    "predict": [
        "trainer=predict", "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=6",
        "trainer.do_eval=true", "data.max_target_length=12", "trainer.disable_tqdm=true", ONE,
    ],
    "sweep": [
        "-m", *COMMON, "data.dataset=belle_sample", "trainer.max_steps=2", "trainer.save_steps=1", "finetuning.lora_rank=2,4",
        "trainer.learning_rate=1e-3,2e-3,3e-3", ONE,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, warm_server: WarmServer) -> Path:
    """A folder with the reward model."""
    folder = tmp_path_factory.mktemp("kill")
    done = warm_server.run(
        *COMMON,
        "stage=rm",
        "data.dataset=preference_sample",
        "trainer.output_dir=reward",
        cwd=folder,
        env=caches(folder),
    )
    assert done.code == 0, done.output
    return folder


def caches(folder: Path) -> dict[str, str]:
    """A cache of tokenized data of its own, so that a kill meets its writing, too."""
    return {"GLMTUNER_CACHE": str(folder / "cache")}


class Undisturbed:
    """The files and the times of a command that was not killed."""

    def __init__(self, warm_server: WarmServer, place: Path, name: str) -> None:
        self.server, self.place, self.name, self.words = warm_server, place, name, COMMANDS[name]
        folder = self.new_folder("undisturbed")
        done = warm_server.run(*self.words, cwd=folder, env=caches(folder), below=str(folder))
        assert done.code == 0, done.output
        self.files, self.seconds, self.operations = final_files(folder / "run"), done.seconds, done.operations

    def new_folder(self, name: str) -> Path:
        folder = self.place / f"{self.name}-{name}"
        folder.mkdir()
        return folder

    def check_killed(self, label: str, **when: Any) -> None:
        """Kill the command, give it again, and compare."""
        folder = self.new_folder(label)
        killed = self.server.run(*self.words, cwd=folder, env=caches(folder), **when)
        finished = finished_at(folder / "run")
        complete = (folder / "run/metrics.json").is_file() and self.name != "sweep"
        again = self.server.run(*self.words, cwd=folder, env=caches(folder))
        assert "Traceback" not in again.output, (label, when, again.output)
        assert again.code == (2 if complete else 0), (label, when, killed.code, again.output)
        if complete:
            assert "holds a finished run" in again.output
        assert {name: time for name, time in finished_at(folder / "run").items() if name in finished} == finished
        files = final_files(folder / "run")
        assert files.keys() == self.files.keys(), (label, when, killed.output[-500:])
        for name, content in self.files.items():
            assert files[name] == content, (label, when, name)
        shutil.rmtree(folder)


def finished_at(folder: Path) -> dict[str, int]:
    """When the jobs of a sweep finished: those that had are not run again."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/metrics.json")}


def final_files(folder: Path) -> dict[str, Any]:
    """The content of every file by its path, without times."""
    return {
        path.relative_to(folder).as_posix(): content_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in (".lock", "multirun.yaml")
        and path.parent.name != ".spent"  # named by time
    }


def content_of(path: Path) -> Any:
    """The file's bytes, or what JSON it holds, without what differs between two equal runs."""
    if path.name in ("provenance.json", "report.html", "report.md", "sweep.json") or path.suffix == ".csv":
        return "differs by times"
    if path.name == "timings.jsonl":  # a line for each of the history's, and only its step is no time
        return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "plan.json":  # of a job of a sweep the row of its folder is a whole path
        return [row for row in json.loads(path.read_text(encoding="utf-8"))["plan"] if row[0] != "run folder"]
    if path.name == "complete.json":
        return sorted(json.loads(path.read_text(encoding="utf-8"))["files"])
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if not TIMINGS.search(name)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module", params=COMMANDS)
def undisturbed(request: pytest.FixtureRequest, warm_server: WarmServer, place: Path) -> Undisturbed:
    return Undisturbed(warm_server, place, request.param)


def test_before_every_change_of_a_file(undisturbed: Undisturbed) -> None:
    count = len(undisturbed.operations)
    assert count > 30
    share = SHARE / 4 if undisturbed.name == "sweep" else SHARE
    step = max(round(1 / share), 1)
    for number in range(1, count + 1, step):
        undisturbed.check_killed(f"change-{number}", below=str(undisturbed.place / f"{undisturbed.name}-change-{number}"),
                                 kill_at=number, opened=number // step % 2 == 0)  # fmt: skip


def test_at_random_moments(undisturbed: Undisturbed) -> None:
    rng = random.Random(f"{undisturbed.name}")
    last = "checkpoints/checkpoint-4"
    for number in range(max(KILLS // len(COMMANDS), 1)):
        label = f"moment-{number}"
        folder = undisturbed.place / f"{undisturbed.name}-{label}"
        if number % 4 == 0 and f"{last}/complete.json" in undisturbed.files:
            undisturbed.check_killed(
                label, kill_when=str(folder / "run" / last), kill_after=rng.uniform(0, undisturbed.seconds / 2)
            )
        elif number % 4 == 1:
            undisturbed.check_killed(label, kill_after=rng.uniform(0, 0.3))  # the first second of a cold start
        else:
            undisturbed.check_killed(label, kill_after=rng.uniform(0, undisturbed.seconds))
