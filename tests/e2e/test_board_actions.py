"""What is done from a board, with real runs of the shipped model: started, stopped, continued, talked with, exported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from acting_board import ActingBoard

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=tiny_glm", "tracker=none", "metric=none", "data.dataset=identity_sample", "trainer.max_steps=60", "trainer.save_steps=1000",
    "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "trainer.disable_tqdm=true", "trainer.seed=3",
]  # fmt: skip
QUESTION = [{"role": "user", "content": "你是谁？"}]
T = TypeVar("T")


def wait(condition: Callable[[], T], seconds: float = 240) -> T:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def lines(run: Path) -> int:
    return (run / "history.jsonl").read_bytes().count(b"\n") if (run / "history.jsonl").is_file() else 0


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActingBoard]:
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    made = ActingBoard(tmp_path_factory.mktemp("board"))
    yield made
    made.actions.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def resumed(board: ActingBoard) -> str:
    """The id of a run that was started, stopped in its midst and continued to its end."""
    _, begun = board.post("start", words=WORDS)
    name, run = begun["id"], board.outputs / begun["id"]
    wait(lambda: lines(run) >= 3)
    assert "has not ended" in board.post("start", words=[*WORDS, f"trainer.output_dir=outputs/{name}"])[1]["error"]
    _, stopping = board.post("stop", id=name)
    told = board.ended(stopping["task"])
    stopped_after = lines(run)
    assert told["code"] == 0 and told["lines"][0].startswith("SIGTERM to process ")
    assert "stopped, and continued from checkpoint-" in told["lines"][-1]
    assert board.ended(begun["task"])["code"] == 128 + signal.SIGTERM and 3 <= stopped_after < 60
    assert not (run / "metrics.json").exists()
    _, going_on = board.post("continue", id=name)
    assert "has not ended" in board.post("continue", id=name)[1]["error"]
    assert board.ended(going_on["task"])["code"] == 0
    assert "is finished" in board.post("continue", id=name)[1]["error"]
    return str(name)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_continued_has_the_bytes_of_an_undisturbed_one(
    board: ActingBoard, resumed: str
) -> None:
    run, undisturbed = board.outputs / resumed, board.outputs.parent / "undisturbed"
    done = subprocess.run(
        [sys.executable, "-m", "glmtuner", *WORDS, f"trainer.output_dir={undisturbed}"], cwd=board.outputs.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    losses = [[json.loads(line).get("loss") for line in (each / "history.jsonl").open()] for each in (run, undisturbed)]
    assert losses[0] == losses[1] and len(losses[0]) >= 60
    assert len(json.loads((run / "provenance.json").read_text())["resumed"]) == 1
    assert (run / "output.log").read_text(encoding="utf-8").count("$ python -m glmtuner") == 2


def answer(board: ActingBoard, talk: str, **parameters: Any) -> tuple[str, list[dict[str, Any]]]:
    sent = board.client.post("/api/talk/chat", json={"talk": talk, "messages": QUESTION, "parameters": parameters})
    assert sent.status_code == 200 and sent.headers["content-type"].startswith("text/event-stream")
    events = [
        json.loads(part[6:]) for part in sent.text.split("\n\n") if part.startswith("data: ") and part != "data: [DONE]"
    ]
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in events if each.get("choices")), events


def loaded(board: ActingBoard, name: str) -> dict[str, Any]:
    status, opened = board.post("talk/open", id=name)
    assert status == 200, opened
    about = wait(
        lambda: (found := board.get("talks", talk=opened["talk"])[1]) and found["state"] != "loading" and found
    )
    assert about["state"] == "ready", about
    return dict(about)


@pytest.mark.slow
def test_a_run_answers_as_chat_does_and_two_at_most_are_loaded(board: ActingBoard, resumed: str) -> None:
    from glmtuner.inference.conversation import Conversation
    from glmtuner.launch.build import finished_run
    from glmtuner.launch.register import register_presets

    register_presets()
    expected = Conversation(finished_run([board.outputs / resumed], ["generation=greedy"])).ask(
        QUESTION[0]["content"], lambda text: None
    )[0]
    talk = loaded(board, resumed)
    assert (talk["tools"], talk["thinking"]) == (True, False)
    said, events = answer(board, talk["talk"], temperature=0)
    assert said == expected and events[-1]["usage"]["completion_tokens"] > 3
    assert board.post("talk/open", id=resumed)[1]["talk"] == talk["talk"]
    short, _ = answer(board, talk["talk"], temperature=0, max_tokens=2)
    assert expected.startswith(short) and len(short) < len(expected)
    _, wrong = answer(board, talk["talk"], temperature=7)
    assert "less than or equal to 2" in wrong[0]["error"]["message"]
    for refused in ({"logit_bias": {}}, {"model": "x"}, {"stream": False}):
        sent = board.client.post(
            "/api/talk/chat", json={"talk": talk["talk"], "messages": QUESTION, "parameters": refused}
        )
        assert sent.status_code == 400 and "no parameter of a question" in sent.json()["error"]
    first = board.actions.talks.get(talk["talk"]).process
    assert "loaded to talk with" in board.post("delete", ids=[resumed])[1]["error"]
    for number in (1, 2):
        shutil.copytree(board.outputs / resumed, board.outputs / f"copy{number}")
        loaded(board, f"copy{number}")
    assert len(board.actions.talks.open_ones) == 2 and first.poll() is not None
    assert "not loaded any more" in board.get("talks", talk=talk["talk"])[1]["error"]
    children = [each.process for each in board.actions.talks.open_ones.values()]
    assert children[0].stdin is not None
    children[0].stdin.close()  # as the end of the board does, however it ends
    assert children[0].wait(30) is not None
    board.post("talk/close", talk=[*board.actions.talks.open_ones][-1])
    assert children[1].wait(30) is not None


@pytest.mark.slow
def test_an_idle_model_is_ended(board: ActingBoard, resumed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = loaded(board, resumed)
    process = board.actions.talks.get(talk["talk"]).process
    monkeypatch.setattr("glmtuner.board.talk.IDLE_SECONDS", 0.1)
    assert wait(lambda: process.poll() is not None, 30)
    assert board.get("talks", talk=talk["talk"])[0] == 400


@pytest.mark.slow
def test_an_export_is_that_of_the_command_line(board: ActingBoard, resumed: str) -> None:
    _, begun = board.post("export", id=resumed, to="exports/mine")
    assert board.ended(begun["task"])["code"] == 0 and begun["to"] == "exports/mine"
    typed = board.outputs.parent / "typed"
    command = [sys.executable, "-m", "glmtuner", "export", str(board.outputs / resumed), "--to", str(typed)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    ours = board.outputs / "exports" / "mine"
    for path in typed.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_is_stopped_with_checkpoints_and_goes_on(board: ActingBoard, launcher: str) -> None:
    more = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    words = [*(word for word in WORDS if "seed" not in word), "trainer.seed=1,2,3", f"name={launcher}", *more]
    _, begun = board.post("start", words=words, multirun=True)
    assert begun["id"] == f"sweeps/{launcher}"
    sweep = board.outputs / begun["id"]
    wait(lambda: sum(lines(job) >= 2 for job in sweep.iterdir() if job.is_dir()) >= (2 if more else 1))
    job = next(each for each in sweep.iterdir() if lines(each) >= 2)
    if not more:
        said = board.post("stop", id=f"sweeps/basic/{job.name}")[1]["error"]
        assert "stop the sweep sweeps/basic" in said
    _, stopping = board.post("stop", id=begun["id"])
    told = board.ended(stopping["task"])
    assert told["code"] == 0 and sum("continued from checkpoint-" in line for line in told["lines"]) == (
        2 if more else 1
    )
    assert board.ended(begun["task"])["code"] in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert not any((each / "metrics.json").exists() for each in sweep.iterdir())
    _, going_on = board.post("continue", id=begun["id"])
    assert board.ended(going_on["task"])["code"] == 0
    finished = [each for each in sweep.iterdir() if (each / "metrics.json").is_file()]
    assert len(finished) == 3 and (sweep / "report.html").is_file()
    assert len(json.loads((job / "provenance.json").read_text())["resumed"]) == 1


HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"


def test_a_process_that_is_no_glmtuner_is_not_signalled(board: ActingBoard) -> None:
    run = board.outputs / "held"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    (run / ".lock").touch()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run / ".lock")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        said = board.post("stop", id="held")[1]["error"]
        assert f"process {other.pid}" in said and "is not the command of glmtuner" in said
        assert other.poll() is None
        other.kill()
    assert "is not running" in board.post("stop", id="held")[1]["error"]


def test_a_run_on_another_machine_is_not_stopped_from_here(
    board: ActingBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared disk the lock is held, and no process of this machine is named for it."""
    run = board.outputs / "far"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    (tmp_path / "locks").touch()
    monkeypatch.setattr("glmtuner.board.processes.LOCKS", tmp_path / "locks")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run / ".lock")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        said = board.post("stop", id="far")[1]["error"]
        assert "it runs on another one" in said and "stop it there (kill -TERM)" in said
        assert other.poll() is None
        other.kill()


FAKE = """\
#!{python}
import json, os, pathlib, sys
here = pathlib.Path({here!r})
with (here / "calls").open("a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
name, queue = os.path.basename(sys.argv[0]), here / "queue"
if name == "sbatch":
    queue.write_text("77_0|RUNNING|None\\n77_1|PENDING|Resources\\n")
    print("Submitted batch job 77")
elif name == "squeue":
    print(queue.read_text() if queue.exists() else "", end="")
elif name == "scancel":
    left = [line for line in queue.read_text().splitlines() if not line.startswith(sys.argv[-1] + "|")]
    queue.write_text("".join(line + "\\n" for line in left))
"""


def test_slurm_gets_the_sweep_and_its_jobs_are_cancelled_as_they_are(
    board: ActingBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against programs that record how they are called; tests/slurm does it on a real SLURM."""
    for name in ("sbatch", "squeue", "scancel", "srun"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable, here=str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = [
        *(word for word in WORDS if "seed" not in word),
        "trainer.seed=1,2",
        "name=cluster",
        "hydra/launcher=basic",
    ]
    assert board.get("form")[1]["slurm"]
    _, begun = board.post("start", words=words, multirun=True, launcher="slurm")
    ended = board.ended(begun["task"])
    assert ended["code"] == 0, ended
    assert begun["id"] == "sweeps/cluster" and {
        *json.loads((board.outputs / "sweeps/cluster/.slurm/jobs.json").read_text())
    }
    assert "SLURM has jobs of it in the queue" in board.post("delete", ids=["sweeps/cluster"])[1]["error"]
    _, stopping = board.post("stop", id="sweeps/cluster")
    assert board.ended(stopping["task"])["code"] == 0
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call for call in calls if call[0] == "scancel"] == [
        ["scancel", "--signal=TERM", "77_0"],
        ["scancel", "77_1"],
    ]
    assert sum(call[0] == "sbatch" for call in calls) == 1
