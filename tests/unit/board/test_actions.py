"""The routes of a board that change something, and what is tried on them: words, ids and places that lead elsewhere."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acting_board import HEADERS, TINY, TOKEN, tree
from acting_board import ActingBoard as Board
from starlette.testclient import TestClient

from glmtuner.board.root import Root
from glmtuner.run_folder.locks import try_lock


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    made = Board(tmp_path)
    yield made
    made.actions.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A board for requests that change nothing."""
    made = Board(tmp_path_factory.mktemp("shared"))
    yield made
    made.actions.close()


def a_run(folder: Path, words: list[str], cwd: Path, **about: Any) -> Path:
    """The files that describe a run, as one that was interrupted leaves them."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {model_name_or_path: x}\n")
    (folder / "overrides.txt").write_text("\n".join(words) + "\n")
    (folder / "provenance.json").write_text(json.dumps({"command": "x", "cwd": str(cwd), **about}))
    (folder / ".lock").touch()
    return folder


# -- words -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "--cfg", "-m", "--config-dir=/etc", "-c=job", "export", "serve", "model=tiny_glm\ntrainer.seed=1", "name=a\0b", "name=\x1b[2J",
        "name=\ud800", "x" * 8001, "", "trainer.output_dir=/tmp/elsewhere", "trainer.output_dir=../elsewhere", "trainer.output_dir=outputs",
        "trainer.output_dir=outputs/.trash/x", "trainer.output_dir=outputs/../../x", "trainer.output_dir=${oc.env:HOME}/x", "hydra.run.dir=/tmp/x",
        "+hydra.run.dir=/tmp/x", "hydra.job.chdir=true", "hydra.output_subdir=../x", "hydra.searchpath=[file:///tmp]", "hydra.mode=MULTIRUN",
        "hydra.job.env_set.PATH=/tmp", "+hydra.callbacks.x._target_=os.system", "hydra.launcher._target_=os.system", "hydra/job_logging=default",
        "hydra.job_logging.handlers.file.filename=/tmp/x", "trainer.output_dir=~/x",
    ],
    ids=repr,
)  # fmt: skip
def test_no_word_is_an_option_a_verb_or_leads_out_of_the_folder(shared: Board, word: str) -> None:
    for name in ("start", "check"):
        body = json.dumps({"words": [*TINY, word]})
        answer = shared.client.post(f"/api/{name}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.json()
    assert tree(shared.outputs) == []
    assert shared.get("tasks")[1] == []


@pytest.mark.parametrize(
    "word",
    [
        "trainer.seed=range(1,1000000000)", "name=.", "hydra.sweep.dir=outputs/sweeps", "name=../../../elsewhere", "name=/tmp/elsewhere", "name=..", "hydra.sweep.dir=/tmp/elsewhere", "hydra.sweep.dir=outputs/../x",
        "'hydra.sweep.dir=${oc.env:HOME}'", "hydra.sweep.subdir=../x", "hydra.launcher.submitit_folder=/tmp/x", "name=${oc.env:HOME}",
        "+hydra.launcher.additional_parameters.output=/tmp/x", "hydra.sweeper.storage=sqlite:////tmp/x.db", "trainer.output_dir=/tmp/x",
    ],
)  # fmt: skip
def test_no_word_of_a_sweep_leads_out_of_the_folder(shared: Board, word: str) -> None:
    (word,) = shlex.split(word)
    more = ["hydra/launcher=slurm"] if "launcher" in word else []
    more += ["hydra/sweeper=optuna", "objective=train_loss"] if "sweeper" in word else []
    shared.refused("start", words=[*TINY, *more, "trainer.seed=1,2", word], multirun=True)
    assert tree(shared.outputs) == []


def test_a_link_in_the_folder_leads_nowhere_else(board: Board, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (board.outputs / "link").symlink_to(tmp_path / "elsewhere")
    assert "writes into" in board.refused("start", words=[*TINY, "trainer.output_dir=outputs/link/run"])
    assert "writes into" in board.refused(
        "start", words=[*TINY, "trainer.seed=1,2", "hydra.sweep.dir=outputs/link/s"], multirun=True
    )
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_all_errors_are_told_at_once_each_with_its_word_as_one_types(shared: Board) -> None:
    status, found = shared.post(
        "compose", words=["model=tiny_glm", "data.datset=x", "finetuning=lorra", "trainer.lerning_rate=1"]
    )
    assert status == 200 and not found["ok"]
    messages = {each["word"]: each["message"] for each in found["errors"]}
    assert messages["data.datset=x"].startswith(
        "unknown key 'data.datset'; did you mean 'dataset'? type data.dataset=…"
    )
    assert "no finetuning preset of that name; did you mean 'lora'?" in messages["finetuning=lorra"]
    assert "did you mean 'learning_rate'?" in messages["trainer.lerning_rate=1"]
    command = [sys.executable, "-m", "glmtuner", "model=tiny_glm", "data.datset=x"]
    typed = subprocess.run(
        command, cwd=shared.outputs.parent, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert typed.stderr.strip() == f"glmtuner: {messages['data.datset=x']}"


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["trainer.learning_rate=fast"], "trainer.learning_rate=fast"),
        (["finetuning=full", "quant=int4"], "quant=int4"),
        (["data.dataset=identty_sample"], "data.dataset=identty_sample"),
        (["finetuning=freeze", "finetuning.lora_rank=4"], "finetuning.lora_rank=4"),
        (["trainer.seed=1,2"], "trainer.seed=1,2"),
    ],
)
def test_an_error_of_the_composed_run_stands_beside_its_word(shared: Board, words: list[str], word: str) -> None:
    _, found = shared.post("compose", words=["model=tiny_glm", *words])
    assert [each["word"] for each in found["errors"]] == [word]


def test_the_resolved_configuration_is_that_of_the_command_line(shared: Board) -> None:
    words = [
        "model=tiny_glm",
        "finetuning=freeze",
        "trainer.learning_rate=1e-3",
        "name=我的 run",
        "trainer.hub_token=hf_abcdefghijklmnop",
    ]
    _, found = shared.post("compose", words=words)
    assert found["ok"] and found["place"].startswith("outputs/<date>/") and found["jobs"] == 1
    assert shlex.split(found["command"]) == ["python", "-m", "glmtuner", *words]
    command = [sys.executable, "-m", "glmtuner", "--cfg", "job", "--resolve", *words]
    printed = subprocess.run(command, cwd=shared.outputs.parent, capture_output=True, text=True, check=True).stdout
    assert printed.replace("hf_abcdefghijklmnop", "null") == found["yaml"]
    assert found["keys"]["trainer.learning_rate"] == 1e-3 and found["keys"]["trainer.hub_token"] is None
    assert "hf_abc" not in json.dumps([found["yaml"], found["keys"]])


def test_a_sweep_says_its_jobs_and_its_folder(shared: Board) -> None:
    words = [*TINY, "finetuning=lora,freeze", "trainer.seed=range(1,4)", "name=six"]
    _, found = shared.post("compose", words=words, multirun=True)
    assert (found["ok"], found["jobs"], found["place"]) == (True, 6, "outputs/sweeps/six")
    assert found["swept"] == ["finetuning", "trainer.seed"] and "-m" in shlex.split(found["command"])
    search = [
        *TINY,
        "trainer.learning_rate=tag(log,interval(1e-5,1e-3))",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=7",
        "objective=train_loss",
    ]
    _, found = shared.post("compose", words=search, multirun=True)
    assert found["ok"] and found["jobs"] == 7
    race = [*TINY, "trainer.seed=1,2", "hydra/sweeper=race"]
    _, found = shared.post("compose", words=race, multirun=True)
    assert {each["word"] for each in found["errors"]} == {"hydra/sweeper=race"}


def test_plugins_are_named_and_not_known_to_the_next_request(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    (board.outputs.parent / "own_metric.py").write_text(
        "from dataclasses import dataclass\nfrom glmtuner.config.groups import Metric, preset\n"
        "@preset('metric', 'own')\n@dataclass(kw_only=True)\nclass Own(Metric):\n    def score(self, prediction, reference): return {'own': 1.0}\n"
    )
    _, found = board.post("compose", words=["model=tiny_glm", "plugins=own_metric", "metric=own"])
    assert found["ok"], found["errors"]
    assert found["notes"] == ["plugins=[own_metric] executes the code of these modules, here and in the run"]
    _, found = board.post("compose", words=["model=tiny_glm", "metric=own"])
    assert [each["word"] for each in found["errors"]] == ["metric=own"]


def test_presets_of_ones_own_are_found(board: Board) -> None:
    own = board.outputs.parent / "my_conf" / "finetuning"
    own.mkdir(parents=True)
    (own / "lora64.yaml").write_text("# mine\ndefaults: [lora]\nlora_rank: 64\n")
    _, found = board.post("compose", words=["model=tiny_glm", "finetuning=lora64"], config_dir="my_conf")
    assert found["ok"] and found["keys"]["finetuning.lora_rank"] == 64
    assert found["command"].startswith("python -m glmtuner --config-dir my_conf ")
    _, form = board.get("form", config_dir="my_conf")
    group = next(each for each in form["groups"] if each["name"] == "finetuning")
    assert {"name": "lora64", "about": "mine", "class": "lora"} in group["presets"]
    assert "no such folder" in board.post("compose", words=[], config_dir="nowhere")[1]["errors"][0]["message"]
    assert "--config-dir" in board.refused("start", words=TINY, config_dir="--cfg")


def test_a_folder_of_presets_cannot_lead_the_jobs_elsewhere(board: Board) -> None:
    own = board.outputs.parent / "evil" / "experiment"
    own.mkdir(parents=True)
    (own / "away.yaml").write_text("# @package _global_\nhydra: {sweep: {dir: /tmp/away, subdir: ../x}}\n")
    (own / "out.yaml").write_text("# @package _global_\ntrainer: {output_dir: /tmp/away}\n")
    said = board.refused(
        "start", words=[*TINY, "experiment=away", "trainer.seed=1,2"], multirun=True, config_dir="evil"
    )
    assert "hydra.sweep.subdir" in said
    assert "trainer.output_dir=/tmp/away" in board.refused("start", words=[*TINY, "experiment=out"], config_dir="evil")


# -- the form ------------------------------------------------------------------------------------------------------------------


def test_the_form_has_every_key_with_its_type_and_its_meaning_in_both_languages(shared: Board) -> None:
    from glmtuner.config.compose import searched_dirs
    from glmtuner.config.keys import all_keys
    from glmtuner.launch.register import register_presets

    register_presets()
    _, form = shared.get("form")
    known = {key.name: key for key in all_keys(searched_dirs(None), "zh")}
    assert {key["key"] for key in form["keys"]} == {*known}
    assert all(key["meaning"]["en"] and key["meaning"]["zh"] == known[key["key"]].meaning for key in form["keys"])
    rank = next(key for key in form["keys"] if key["key"] == "finetuning.lora_rank")
    assert rank["type"] == "whole number" and rank["group"] == "finetuning" and "lora" in rank["presets"]
    names = {group["name"]: group for group in form["groups"]}
    assert names["model"]["default"] == "chatglm_6b" and all(group["meaning"]["zh"] for group in form["groups"])
    assert [preset["name"] for preset in names["hydra/sweeper"]["presets"]] == ["basic", "optuna", "race"]
    assert "quickstart" in {each["name"] for each in form["experiments"]} and form["cwd"] == str(shared.outputs.parent)


# -- starting --------------------------------------------------------------------------------------------------------------------


def test_where_a_board_shows_another_folder_runs_begin_in_it_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmtuner.board.compose import Composer
    from glmtuner.board.places import run_base, sweep_base, working_folder

    monkeypatch.chdir(tmp_path)
    mine, part = tmp_path / "mine", tmp_path / "outputs" / "2026-01-01"
    for folder in (mine, part):
        folder.mkdir(parents=True)
    assert (working_folder(part), run_base(part, tmp_path)) == (tmp_path, part)
    assert (working_folder(mine), run_base(mine, tmp_path), sweep_base(mine, tmp_path)) == (
        tmp_path,
        mine,
        mine / "sweeps",
    )
    composer = Composer(mine, tmp_path)
    try:
        found = composer.compose([*TINY, "trainer.seed=1,2", "name=two"], multirun=True)
        assert found["place"] == "mine/sweeps/two" and found["add"] == ["hydra.sweep.dir='mine/sweeps/two'"]
        assert composer.compose(TINY, multirun=False)["place"].startswith("mine/<date>/")
    finally:
        composer.close()


def test_a_start_that_fails_is_a_failed_run_with_its_output_and_its_words(board: Board) -> None:
    words = ["model=causal_lm", "model.model_name_or_path=/nowhere/at/all", *TINY[1:]]
    status, begun = board.post("start", words=words)
    assert status == 200, begun
    ended = board.ended(begun["task"])
    assert ended["code"] == 2 and any("/nowhere/at/all" in line for line in ended["lines"]) and ended["written"]
    run = board.outputs / begun["id"]
    log = (run / "output.log").read_text(encoding="utf-8").splitlines()
    assert log[0].startswith("$ python -m glmtuner model=causal_lm ") and "/nowhere/at/all" in log[-1]
    assert "/nowhere/at/all" in json.loads((run / "failed.json").read_text())["reason"]
    assert [word.replace("[", "").replace("]", "") for word in board.get("clone", id=begun["id"])[1]["words"]] == words
    assert board.post("continue", id=begun["id"])[0] == 200


def test_a_start_that_is_stopped_at_once_leaves_its_output_and_no_folder(board: Board) -> None:
    _, begun = board.post("start", words=TINY)
    assert (board.outputs / begun["id"]).is_dir()
    _, stopping = board.post("stop", id=begun["id"])
    assert board.ended(stopping["task"])["code"] == 0
    ended = board.ended(begun["task"])
    assert ended["code"] == -15
    assert not (board.outputs / begun["id"]).exists() and not ended["written"]
    assert "is no run" in board.refused("stop", id=begun["id"]) or "is no folder" in board.refused(
        "stop", id=begun["id"]
    )


def test_a_folder_is_not_used_twice(board: Board) -> None:
    run = a_run(board.outputs / "mine", TINY, board.outputs.parent)
    with try_lock(run / ".lock"):  # type: ignore[union-attr]
        words = [*TINY, "trainer.output_dir=outputs/mine"]
        assert "is running" in board.refused("start", words=words)
        assert "is running" in board.refused("continue", id="mine")
        assert "is running" in board.refused("delete", ids=["mine"])
    said = board.refused("start", words=[*words, "trainer.overwrite_output_dir=true"])
    assert "delete it, which moves it to the trash" in said


# -- continuing and cloning --------------------------------------------------------------------------------------------------------


def test_a_clone_has_the_words_without_folder_and_secrets_and_the_next_name(board: Board) -> None:
    words = [
        *TINY,
        "name=mine",
        "trainer.output_dir=outputs/mine",
        "trainer.hub_token=<hidden>",
        "data.source_prefix='a, b'",
    ]
    a_run(board.outputs / "mine", words, board.outputs.parent, flags=["--config-dir", "my_conf"])
    _, cloned = board.get("clone", id="mine")
    assert cloned["words"] == [*TINY, "data.source_prefix='a, b'", "name=mine-2"]
    assert cloned["config_dir"] == "my_conf" and cloned["notes"] == [
        "trainer.hub_token was a secret, which is stored nowhere"
    ]
    sweep = board.outputs / "sweeps" / "two"
    sweep.mkdir(parents=True)
    line = shlex.join(["python", "-m", "glmtuner", "--config-dir", "c", "-m", *TINY, "trainer.seed=1,2", "name='two'"])
    (sweep / "sweep.json").write_text(
        json.dumps({"typed": ["python -m glmtuner -m x=1", line], "cwd": str(board.outputs.parent)})
    )
    sweep.with_name("two-2").mkdir()
    _, cloned = board.get("clone", id="sweeps/two")
    assert (
        cloned["multirun"]
        and cloned["words"] == [*TINY, "trainer.seed=1,2", "name=two-3"]
        and cloned["config_dir"] == "c"
    )


@pytest.mark.parametrize(
    ("words", "about", "message"),
    [
        ([*TINY, "trainer.hub_token=<hidden>"], {}, "was a secret, which is stored nowhere"),
        (TINY, {"flags": ["--config-dir", "conf"]}, "continue it only if you trust it"),
        ([*TINY, "hydra.job.env_set.X=1"], {}, "the board does not take"),
        (["--cfg", "job"], {}, "no options"),
        (TINY, {"cwd": "/nowhere"}, "which is gone"),
        (TINY, {"flags": ["--hydra-help", "x"]}, "does not continue commands with this option"),
        (["model=tiny_glm", "data.dataset=no_such"], {}, "no dataset named"),
    ],
)
def test_what_a_run_folder_says_is_not_obeyed_blindly(
    board: Board, words: list[str], about: dict[str, Any], message: str
) -> None:
    a_run(board.outputs / "mine", words, board.outputs.parent)
    provenance = {"command": "x", "cwd": str(board.outputs.parent), **about}
    (board.outputs / "mine" / "provenance.json").write_text(json.dumps(provenance))
    assert message in board.refused("continue", id="mine")


@pytest.mark.parametrize(
    "word", ["plugins=evil", "plugins=[evil]", "+plugins=[evil]", "++plugins=evil", "plugins = evil", "plugins='evil'"]
)
def test_code_that_a_run_folder_names_is_not_executed_before_it_is_trusted(
    board: Board, tmp_path: Path, word: str
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    a_run(board.outputs / "mine", [*TINY, word], tmp_path)
    assert "continue it only if you trust it" in board.refused("continue", id="mine")
    _, cloned = board.get("clone", id="mine")
    assert cloned["words"] == TINY and "is left out, since it executes these modules" in cloned["notes"][0]
    assert board.post("compose", words=cloned["words"])[1]["ok"]
    assert not (tmp_path / "executed").exists()
    board.post("continue", id="mine", trust=True)
    if word == "plugins=evil":
        assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["hydra/launcher=slurm", "hydra.launcher.setup=[touch x]"],
        ["hydra/launcher=ray", "+hydra.launcher.runtime_env.pip=[theirs]"],
        ["hydra/launcher=ray", "hydra.launcher.address=theirs:6379"],  # which gets this command's environment
    ],
)
def test_shell_lines_and_classes_of_a_recorded_sweep_are_not_executed(
    words: list[str], board: Board, tmp_path: Path
) -> None:
    sweep = board.outputs / "sweeps" / "two"
    sweep.mkdir(parents=True)
    line = shlex.join(["python", "-m", "glmtuner", "-m", *TINY, "trainer.seed=1,2", "name=two", *words])
    (sweep / "sweep.json").write_text(json.dumps({"typed": [line], "cwd": str(tmp_path)}))
    assert "continue it only if you trust it" in board.refused("continue", id="sweeps/two")
    own = tmp_path / "own" / "hydra" / "launcher"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("_target_: os.system\ncommand: touch x\n")
    words = [*TINY, "trainer.seed=1,2", "hydra/launcher=mine"]
    assert "os.system is a class that glmtuner does not ship" in board.refused(
        "start", words=words, multirun=True, config_dir="own"
    )


def test_code_beside_a_recorded_command_is_not_imported(board: Board, tmp_path: Path) -> None:
    """A recorded command names the folder that it is run in: a stranger's could name one that holds a torch.py."""
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for name in ("torch", "psutil", "sitecustomize", "glmtuner", "json"):
        (stranger / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    words = ["model=causal_lm", "model.model_name_or_path=/nowhere/at/all", *TINY[1:]]
    a_run(board.outputs / "mine", words, stranger)
    status, begun = board.post("continue", id="mine")
    assert status == 200, begun
    assert board.ended(begun["task"])["code"] == 2
    assert not (tmp_path / "executed").exists()


def test_files_of_a_run_that_are_links_are_not_read(board: Board, tmp_path: Path) -> None:
    run = a_run(board.outputs / "mine", TINY, tmp_path)
    (tmp_path / "secret").write_text("password=1\n")
    (run / "overrides.txt").unlink()
    (run / "overrides.txt").symlink_to(tmp_path / "secret")
    status, answer = board.get("clone", id="mine")
    assert status == 400 and "password" not in json.dumps(answer)
    (run / "overrides.txt").unlink()
    (run / "overrides.txt").write_text("\n".join(TINY))
    (run / "output.log").symlink_to(tmp_path / "victim")
    assert "no plain file" in board.refused("continue", id="mine") and not (tmp_path / "victim").exists()


IDS = [
    "..", "../outputs", "%2e%2e/x", "/etc", "a/../../x", "mine\0", "mine\\..", ".trash", "mine/", "", "x" * 5000, "//mine", "no_such", ".",
    "mine/checkpoints", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", IDS, ids=repr)
def test_an_id_leads_to_a_run_in_the_folder_or_nowhere(board: Board, name: str) -> None:
    a_run(board.outputs / "mine", TINY, board.outputs.parent)
    a_run(board.outputs.parent / "x", TINY, board.outputs.parent)
    (board.outputs / "mine" / "checkpoints").mkdir()
    before = tree(board.outputs.parent)
    for route, body in {
        "stop": {"id": name}, "continue": {"id": name}, "delete": {"ids": [name]}, "talk/open": {"id": name}, "export": {"id": name},
    }.items():  # fmt: skip
        answer = board.client.post(
            f"/api/{route}", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (400, 422), (route, answer.text)
    assert board.client.get("/api/clone", params={"id": name.encode("utf-8", "replace")}).status_code in (400, 422)
    assert tree(board.outputs.parent) == before


@pytest.mark.parametrize("to", ["../x", "/tmp/x", ".trash/x", "", "a/../../x", "mine", "a\0b", "."])
def test_an_export_goes_into_a_new_folder_inside(board: Board, to: str) -> None:
    run = a_run(board.outputs / "mine", TINY, board.outputs.parent)
    (run / "metrics.json").write_text("{}")
    board.refused("export", id="mine", to=to or ".")
    for wrong in ({"layout": "--push-to=x"}, {"dtype": "int4"}):
        board.refused("export", id="mine", to="new", **wrong)


# -- the trash ---------------------------------------------------------------------------------------------------------------------


def test_what_is_deleted_is_in_the_trash_and_comes_back(board: Board) -> None:
    runs = [a_run(board.outputs / name, TINY, board.outputs.parent) for name in ("2026-01-01/one", "two")]
    before = tree(board.outputs)
    _, done = board.post("delete", ids=["2026-01-01/one", "two"])
    assert not any(run.exists() for run in runs)
    assert (board.outputs / ".trash" / done["trash"] / "2026-01-01" / "one" / "overrides.txt").is_file()
    (listed,) = board.get("trash")[1]["deleted"]
    assert listed["ids"] == ["2026-01-01/one", "two"] and abs(listed["time"] - time.time()) < 60
    a_run(board.outputs / "two", TINY, board.outputs.parent)
    assert "two exists again" in board.refused("restore", trash=done["trash"])
    (board.outputs / "two").rename(board.outputs / "other")
    assert board.post("restore", trash=done["trash"]) == (200, {"ids": ["2026-01-01/one", "two"]})
    (board.outputs / "other").rename(board.outputs.parent / "other")
    assert tree(board.outputs) == [".trash", *before]


@pytest.mark.parametrize(
    "trash", ["..", ".", "20260101-000000-abcdef", "../outputs", "20260101-000000-abcdef/..", "\0"]
)
def test_nothing_but_what_was_deleted_is_restored(board: Board, trash: str) -> None:
    assert "nothing in the trash" in board.refused("restore", trash=trash)


def test_links_are_not_deleted_and_not_followed(board: Board, tmp_path: Path) -> None:
    outside = a_run(tmp_path / "outside", TINY, tmp_path)
    inside = a_run(board.outputs / "inside", TINY, tmp_path)
    (board.outputs / "out").symlink_to(outside)
    (board.outputs / "again").symlink_to(inside)
    assert "'out' is no" in board.refused("delete", ids=["out"])
    assert "is a link to" in board.refused("delete", ids=["again"])
    (tmp_path / "bin").mkdir()
    (board.outputs / ".trash").symlink_to(tmp_path / "bin")
    assert "is a link" in board.refused("delete", ids=["inside"])
    assert list((tmp_path / "bin").iterdir()) == []


def test_all_of_several_are_deleted_or_none(board: Board) -> None:
    a_run(board.outputs / "one", TINY, board.outputs.parent)
    busy = a_run(board.outputs / "two", TINY, board.outputs.parent)
    with try_lock(busy / ".lock"):  # type: ignore[union-attr]
        assert "two cannot be deleted: it is running" in board.refused("delete", ids=["one", "two"])
    sweep = board.outputs / "sweeps" / "s"
    job = a_run(sweep / "job", TINY, board.outputs.parent)
    (sweep / "sweep.json").write_text(json.dumps({"typed": ["python -m glmtuner -m x=1"], "cwd": "/"}))
    with try_lock(job / ".lock"):  # type: ignore[union-attr]
        assert "job is running" in board.refused("delete", ids=["sweeps/s"])
    assert "is inside of" in board.refused("delete", ids=["sweeps/s", "sweeps/s/job"])


# -- requests ----------------------------------------------------------------------------------------------------------------------


def test_every_change_needs_the_token_the_header_and_json(shared: Board) -> None:
    changes = [route.path for route in shared.actions.router.routes if "POST" in route.methods]  # type: ignore[attr-defined]
    assert len(changes) == 11
    for path in changes:
        for dropped in ("Authorization", "X-Glmtuner-Board"):
            headers = {name: value for name, value in HEADERS.items() if name != dropped}
            bare = TestClient(shared.client.app, headers=headers)
            assert bare.post(path, json={"id": "x"}).status_code in (401, 403), (path, dropped)
        assert shared.client.post(path, content="{}", headers={"Content-Type": "text/plain"}).status_code == 403
        assert shared.client.get(path).status_code == 405
        assert shared.client.post(path, json={"id": "x", "surplus": 1}).status_code in (400, 422)
        assert (
            shared.client.post(path, content=b"x" * 2**21, headers={"Content-Type": "application/json"}).status_code
            == 413
        )


def test_a_board_that_only_shows_has_none_of_these_routes(tmp_path: Path) -> None:
    from glmtuner.board.serve import BoardServer

    paths = {}
    for read_only in (False, True):
        server = BoardServer(Root(tmp_path), TOKEN, None, read_only)
        paths[read_only] = [type(part).__name__ for part in server.parts]
        for part in server.parts:
            part.close()
    assert paths == {False: ["Views", "Actions"], True: ["Views"]}


def test_the_board_imports_no_torch() -> None:
    code = "import sys, glmtuner.board.actions; print(*{'torch', 'transformers', 'hydra_plugins'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
