"""The commands of README.md and docs/ that need no GPU and no network, run as they are written, on the bundled model."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documented import DOCS, NOT_RUN, READMES, ROOT, RUN_BY, Command, commands, make_workspace

from glmtuner.cli.main import main
from glmtuner.cli.options import parse_options
from glmtuner.cli.verbs import VERBS
from glmtuner.config.compose import compose, compose_every_job, first_job, searched_dirs
from glmtuner.data.catalog import find
from glmtuner.launch.register import register_presets
from glmtuner.sweep.launchers import register as register_launchers

TRAIN = next(it for it in commands(READMES[0]) if it.arguments and it.arguments[0] == "model=tiny_glm")
PIPED = "What is a run?\n/clear\n怎样续训？\n/exit\n"  # /clear: it has learned answers to first questions only


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name, and with the run that README's first recipe trains."""
    register_presets()
    register_launchers()
    folder = tmp_path_factory.mktemp("documented")
    make_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(TRAIN.arguments) == 0
    return folder


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace, which the commands of one page change."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    for name in ("sft", "rm", "rlhf/sft", "rlhf/rm", "rlhf/ppo"):  # only composed with
        (tmp_path / "outputs" / name).parent.mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "outputs/mine", tmp_path / "outputs" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def downloads(arguments: list[str]) -> bool:
    """Whether the command needs a model or a dataset of the hub."""
    if arguments[0] in VERBS:
        return False
    options, overrides = parse_options(arguments)
    if options.help or options.version or options.info or options.cfg:
        return False
    where = {"config_dir": options.config_dir}
    composed = (
        first_job(compose_every_job(overrides, **where), **where) if options.multirun else compose(overrides, **where)
    )
    run = composed.run
    if not run.model.model_name_or_path.startswith("package://"):
        return True
    folders = [folder / "dataset" for folder in reversed(searched_dirs(options.config_dir))]
    specs = [find(name, run.data.dataset_dir, folders) for name in (*run.data.dataset, *run.data.eval_dataset)]
    return not options.check and any(spec.file_name is None and spec.kind != "path" for spec in specs)


def offline(page: Path) -> list[Command]:
    """The commands of a page that this file runs; called in a workspace."""
    elsewhere = {*NOT_RUN, *RUN_BY, str(TRAIN)}
    ours = [it for it in commands(page) if it.arguments and str(it) not in elsewhere]
    return [it for it in ours if not downloads(it.arguments or [])]


def run_all(glmtuner: Callable, todo: list[Command], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each command printed, by its first words; all must succeed."""
    printed = {}
    for command in todo:
        monkeypatch.setattr(sys, "stdin", io.StringIO(PIPED))
        done = glmtuner(*(command.arguments or []))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[str(command).removeprefix("python -m glmtuner ").split()[0]] = done.stdout
    return printed


def test_the_recipes_of_the_readme_work_as_written(
    glmtuner: Callable, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = offline(READMES[0])
    assert str(todo[-1]).startswith("python -m glmtuner --cfg")  # the last line of the page
    printed = run_all(glmtuner, todo, monkeypatch)
    assert printed.keys() == {"show", "trainer=predict", "export", "-m", "report", "chat", "--help", "--cfg"}
    assert "outputs/mine (finished)" in printed["show"]
    (scored,) = (here / "outputs").glob("*/*/predictions.jsonl")
    answers = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    assert sum(it["predict"] == it["label"] for it in answers) >= 3  # of 4: learned by heart
    assert "the same greedy answer" in printed["export"]
    assert (here / "my_model/config.json").is_file() and (here / "my_model/model.safetensors").is_file()
    for leaderboard in (printed["-m"], printed["report"]):
        assert leaderboard.count("freeze, learning_rate") >= 2 and leaderboard.count("lora, learning_rate") >= 2
    assert "4 finished" in printed["-m"]
    assert (here / "outputs/sweeps/rates/report.html").is_file()
    learned = [it["label"] for it in answers if it["predict"] == it["label"] and it["prompt"].strip() in PIPED]
    assert learned and all(answer in printed["chat"] for answer in learned)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_the_offline_commands_of_a_page_work_as_written(
    page: Path, glmtuner: Callable, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = offline(page)
    if page.stem in ("keys", "start", "stages", "memory", "prediction", "serving", "tracking"):
        assert todo, "nothing of this page is run"
    run_all(glmtuner, todo, monkeypatch)


def test_the_help_of_the_benchmark() -> None:
    (command,) = [it for it in commands(ROOT / "docs/performance.md") if str(it).endswith("--help")]
    done = subprocess.run(
        [sys.executable, *command.words[1:]], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--only" in done.stdout, done.stderr
