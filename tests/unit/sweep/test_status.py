"""`status`: made-up folders and a made-up squeue."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.locks import try_lock
from glmtuner.sweep.attempts import DONE, begin_attempt, end_attempt, record_death
from glmtuner.sweep.closing import main as close
from glmtuner.sweep.due import folder_names, is_due, queued_submissions
from glmtuner.sweep.queue import in_queue
from glmtuner.sweep.status import Line, Progress, duration, is_over, lines_of, seconds_left
from glmtuner.sweep.submissions import Submission, add_submissions, read_submissions, submitting

CONFIG = (
    "model: {model_name_or_path: package://tiny_glm, family: glm}\ntrainer: {max_steps: 40, num_train_epochs: 3.0}\n"
)
WORDS = ["model=tiny_glm", "tracker=none", "data.dataset=[belle_sample]"]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts programs called squeue and scontrol on PATH: squeue prints these lines, scontrol writes its arguments to a file."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(*lines: str, code: int = 0, error: str = "") -> Path:
        text = "".join(f"{line}\n" for line in lines)
        for name, body in (
            ("squeue", f"cat <<'END'\n{text}END\necho '{error}' >&2\nexit {code}"),
            ("scontrol", f'echo "$@" >> {folder}/asked'),
        ):
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(stat.S_IRWXU)
        return folder / "asked"

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return put


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    root = tmp_path / "sweep"
    root.mkdir()
    (root / "sweep.json").write_text('{"typed": [], "cwd": "."}')
    return root


def job(root: Path, name: str, *, history: list[dict] | None = None, **files: dict) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    if history:
        (folder / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in history))
    for file, value in files.items():
        (folder / f"{file}.json").write_text(json.dumps(value))
    return folder


def submitted(root: Path, **ids: str) -> None:
    add_submissions(
        root, {name: Submission(number, "2026-01-01T00:00:00+00:00", WORDS, None, True) for name, number in ids.items()}
    )


def states(root: Path) -> dict[str, str]:
    return {line.name: line.state for line in lines_of(root)}


def test_every_state_by_the_folders_and_the_queue(sweep, squeue):
    squeue("7_0|RUNNING|None", "7_1|PENDING|Resources", "7_2|PENDING|BeginTime", "7_9|RUNNING|None")
    job(sweep, "starts")
    job(sweep, "again", progress={"step": 8, "steps": 40, "start_step": 0, "seconds": 4.0})
    job(sweep, "finished", metrics={"train_runtime": 20.0, "train_loss": 1.0}, history=[{"step": 40, "loss": 1.0}])
    job(sweep, "broken", failed={"kind": "error", "reason": "DataError: no such file"})
    job(sweep, "large", failed={"kind": "infeasible", "reason": "out of memory"})
    job(sweep, "lost", progress={"step": 12, "steps": 40, "start_step": 0, "seconds": 6.0})
    submitted(
        sweep,
        starts="7_0",
        waits="7_1",
        again="7_2",
        finished="7_3",
        broken="7_4",
        large="7_5",
        lost="7_6",
        cancelled="7_7",
    )
    lines = {line.name: line for line in lines_of(sweep)}
    assert {name: line.state for name, line in lines.items()} == {
        "starts": "running", "waits": "queued", "again": "queued", "finished": "done", "broken": "failed", "large": "failed",
        "lost": "dropped", "cancelled": "dropped",
    }  # fmt: skip
    assert lines["waits"].note == "SLURM job 7_1, pending, Resources"
    assert lines["again"].note == "SLURM job 7_2, pending, BeginTime, back in the queue"
    assert lines["broken"].note == "DataError: no such file"
    assert lines["cancelled"].note == "SLURM job 7_7, left the queue without having started"
    assert lines["lost"].progress == Progress(12, 40, 2.0)
    assert lines["finished"].progress == Progress(40, 40, None)


def test_jobs_that_the_sweep_has_not_come_to_are_listed(sweep, capsys):
    (sweep / "sweep.json").write_text('{"typed": [], "cwd": ".", "jobs": ["one", "two", "three"]}')
    folder = job(sweep, "two", progress={"step": 30, "steps": 40, "start_step": 20, "seconds": 5.0})
    job(sweep, "one", metrics={"train_runtime": 20.0, "train_loss": 1.0}, history=[{"step": 40, "loss": 1.0}])
    with try_lock(folder / ".lock"):
        lines = lines_of(sweep)
    assert {line.name: line.state for line in lines} == {"one": "done", "two": "running", "three": "not started"}
    assert seconds_left(lines) == 5.0 + 20.0
    assert seconds_left(lines_of(sweep)) is None and is_over(lines_of(sweep))  # the command has ended


def test_dropped_and_paused_jobs_are_told_apart_from_interrupted_ones(sweep, squeue):
    job(sweep, "pruned", pruned={"reason": "after 0.1 of the training: loss 7.4"})
    waits = job(sweep, "waits")
    (waits / "pauses/0.5").mkdir(parents=True)
    (waits / "pauses/0.5/pause.json").write_text('{"step": 20, "max_steps": 40}')
    (waits / "checkpoints/checkpoint-20").mkdir(parents=True)
    (waits / "checkpoints/checkpoint-20/complete.json").write_text("{}")
    job(sweep, "cut", history=[{"step": 3, "loss": 1.0}])
    lines = {line.name: (line.state, line.note) for line in lines_of(sweep)}
    assert lines["pruned"] == ("dropped", "pruned after 0.1 of the training: loss 7.4")
    assert lines["waits"] == ("paused", "paused after step 20 of 40")
    assert lines["cut"] == ("interrupted", "the same command resumes it")


def test_the_speed_is_that_of_this_process_and_what_is_left_follows(sweep, squeue):
    squeue("7_0|RUNNING|None")
    folder = job(sweep, "resumed", progress={"step": 30, "steps": 40, "start_step": 20, "seconds": 5.0})
    submitted(sweep, resumed="7_0")
    with try_lock(folder / ".lock"):
        (line,) = lines_of(sweep)
    assert line.progress.speed == 2.0 and line.progress.seconds_left == 5.0
    assert line.cells()[2:5] == ["30 of 40", "2/s", "5 s"]


def test_what_the_sweep_still_takes():
    running = Line("a", "running", Progress(10, 40, 2.0))  # 15 s left of 20
    other = Line("b", "running", Progress(30, 40, 1.0))  # 10 s left of 40
    waiting = [Line(name, "queued") for name in "cd"]
    # (15 + 10 + 2 * mean(20, 40)) / 2 at a time
    assert seconds_left([running, other, *waiting]) == pytest.approx(42.5)
    assert seconds_left([running, Line("e", "done", seconds=60.0), *waiting]) == pytest.approx(15 + 2 * 40)
    assert seconds_left([running, Line("f", "running")]) is None  # nothing is known of one
    assert seconds_left([Line("e", "done", seconds=60.0)]) is None
    assert [duration(seconds) for seconds in (5, 89, 95, 5399, 12000)] == [
        "5 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "3 h 20 min",
    ]


def test_without_squeue_the_folders_speak(sweep, squeue, monkeypatch):
    monkeypatch.setenv("PATH", str(sweep))
    assert in_queue(["7_0"]) is None and in_queue([]) == {}
    job(sweep, "finished", metrics={"train_loss": 1.0})
    job(sweep, "interrupted", history=[{"step": 4, "loss": 1.0}])
    folder = job(sweep, "runs")
    with try_lock(folder / ".lock"):
        assert states(sweep) == {"finished": "done", "interrupted": "interrupted", "runs": "running"}
    submitted(sweep, waits="7_0", interrupted="7_1")
    assert states(sweep) == {"finished": "done", "interrupted": "unknown", "runs": "interrupted", "waits": "unknown"}
    assert not is_over(lines_of(sweep))


def test_an_answer_of_squeue_that_is_none(squeue):
    squeue(code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert in_queue(["7"]) == {}
    squeue(code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    assert in_queue(["7"]) is None
    squeue("garbage", "|", "7|RUNNING|None", "8|RUNNING|None")
    assert set(in_queue(["7"])) == {"7"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"step": "x", "steps": 1, "start_step": 0, "seconds": 1}']
)
def test_a_damaged_progress_is_no_progress(sweep, squeue, content):
    folder = job(sweep, "a", history=[{"step": 3, "loss": 1.0}])
    (folder / "progress.json").write_text(content)
    (line,) = lines_of(sweep)
    assert line.progress == Progress(3, 40, None)


def test_a_line_of_the_history_is_newer_than_a_progress_that_is_written_every_few_seconds(sweep, squeue):
    folder = job(sweep, "a", history=[{"step": 3, "loss": 1.0}])
    for step, known in ((0, Progress(3, 40, None)), (5, Progress(5, 40, 0.5))):
        values = {"step": step, "steps": 40, "start_step": 0, "seconds": 10.0}
        (folder / "progress.json").write_text(json.dumps(values))
        (line,) = lines_of(sweep)
        assert line.progress == known


def test_a_single_run_and_what_is_none(tmp_path, glmtuner):
    job(tmp_path, "run", metrics={"train_loss": 1.0})
    (tmp_path / "empty").mkdir()
    done = glmtuner("status", "run")
    assert done.returncode == 0 and "1 done" in done.stdout
    for words, message in (
        (
            ["status", "nowhere"],
            "status nowhere: no such folder; type python -m glmtuner status outputs/sweeps/<sweep>",
        ),
        (["status", "empty"], "status empty: it holds neither a sweep nor a run"),
        (["status", "run", "a=1"], "a=1: status takes one folder and no overrides"),
        (["status", "run", "--watch", "0"], "--watch 0: a number of seconds is expected, more than 0"),
        (["status", "run", "--watch", "soon"], "argument --watch: invalid float value: 'soon'"),
    ):
        done = glmtuner(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, words


def test_watch_looks_again_until_no_job_is_left(tmp_path, glmtuner, monkeypatch):
    folder = job(tmp_path, "run")
    lock = try_lock(folder / ".lock")
    waited = []

    def end(seconds: float) -> None:
        waited.append(seconds)
        lock.close()

    monkeypatch.setattr("glmtuner.cli.status.time.sleep", end)
    done = glmtuner("status", "run", "--watch", "2")
    assert waited == [2.0] and "1 running" in done.stdout and "1 interrupted" in done.stdout


def test_a_job_stops_at_the_second_death_at_one_step_and_not_if_it_got_further(sweep):
    (sweep / "a").mkdir()
    assert begin_attempt(sweep, "a", "7").starts == 1
    assert record_death(sweep, "a", "7").deaths == [0]
    assert begin_attempt(sweep, "a", "7").starts == 2  # the death counts once
    checkpoint(sweep / "a", 20)
    again = begin_attempt(sweep, "a", "7")  # its node failed: nothing could be recorded
    assert (again.deaths, again.stopped, again.starts) == ([0, 20], None, 3)
    stopped = begin_attempt(sweep, "a", "7")
    assert stopped.deaths == [0, 20, 20] and stopped.starts == 3
    assert "SLURM job 7 has died 2 times without a checkpoint after step 20" in stopped.stopped
    assert begin_attempt(sweep, "a", "8") == stopped  # until its file is removed
    (sweep / ".slurm/attempts/a.json").unlink()
    assert begin_attempt(sweep, "a", "8").deaths == []


def test_a_job_that_is_submitted_again_by_hand_begins_to_count_anew(sweep):
    (sweep / "a").mkdir()
    begin_attempt(sweep, "a", "7")
    assert begin_attempt(sweep, "a", "9").deaths == []


def checkpoint(folder: Path, step: int) -> None:
    where = folder / f"checkpoints/checkpoint-{step}"
    where.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (where / name).write_text("x")
    sizes = {path.name: 1 for path in where.iterdir()}
    (where / "complete.json").write_text(json.dumps({"files": sizes, "ranks": 1}))


def test_the_end_of_a_job_requeues_it_once_and_then_writes_the_report(sweep, squeue, monkeypatch, capsys):
    asked = squeue("7_0|RUNNING|None")
    job(sweep, "a", history=[{"step": 2, "loss": 1.0}])
    submitted(sweep, a="7_0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    begin_attempt(sweep, "a", "7_0")
    assert close([str(sweep)]) == 0
    assert asked.read_text() == "requeue 7_0\n" and not (sweep / "report.md").exists()
    begin_attempt(sweep, "a", "7_0")
    assert close([str(sweep)]) == 1
    assert asked.read_text() == "requeue 7_0\n" and (sweep / "report.md").is_file()
    assert "has died 2 times" in json.loads((sweep / "a/failed.json").read_text())["reason"]
    assert states(sweep) == {"a": "failed"}
    (sweep / "report.md").unlink()
    close([str(sweep)])
    assert not (sweep / "report.md").exists(), "the report of the same ends is written once"


def test_the_last_job_to_end_and_no_other_writes_the_report(sweep, squeue, monkeypatch):
    squeue("7_0|RUNNING|None", "7_1|RUNNING|None")
    for name, task in (("a", "0"), ("b", "1")):
        job(sweep, name, metrics={"train_loss": 1.0})
        begin_attempt(sweep, name, f"7_{task}")
    submitted(sweep, a="7_0", b="7_1", never="7_2")  # which was cancelled
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    for name, task, reported in (("a", "0", False), ("b", "1", True)):
        end_attempt(sweep, name, DONE)
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert close([str(sweep)]) == 0
        assert (sweep / "report.md").is_file() == reported
    assert len(list((sweep / ".slurm").glob("report-*"))) == 1


def test_a_cancelled_job_is_not_put_back(sweep, squeue, monkeypatch):
    asked = squeue("7|COMPLETING|None")
    job(sweep, "a")
    submitted(sweep, a="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin_attempt(sweep, "a", "7")
    close([str(sweep)])
    assert not asked.exists() and not (sweep / "report.md").exists()


def test_queued_jobs_are_not_submitted_again_and_stopped_ones_neither(sweep, squeue, monkeypatch, capsys):
    squeue("7_0|PENDING|Resources")
    submitted(sweep, a="7_0", b="7_1", c="7_2")
    assert queued_submissions(sweep, ["a", "b"]) == {"a": "7_0"}
    squeue(code=1, error="Unable to contact slurm controller")
    with pytest.raises(
        ConfigError,
        match=r"squeue does not answer, and SLURM's jobs 7_0, 7_1 of this sweep.* may still be in the queue",
    ):
        queued_submissions(sweep, ["a", "b"])
    for name in ("b", "c"):
        (sweep / name).mkdir()
        begin_attempt(sweep, name, "7")
    record_death(sweep, "b", "7")
    record_death(sweep, "b", "7")
    assert (
        not is_due(sweep, "b", [], detached=False)
        and "not submitted: b: SLURM job 7 has died" in capsys.readouterr().out
    )
    assert is_due(sweep, "c", [], detached=True)
    job(sweep, "d", metrics={"train_loss": 1.0})
    assert not is_due(sweep, "d", [], detached=True) and is_due(sweep, "d", [], detached=False)
    assert is_due(sweep, "d", ["trainer.overwrite_output_dir=true"], detached=True)


def test_two_commands_do_not_submit_at_the_same_time(sweep):
    with (
        submitting(sweep),
        pytest.raises(ConfigError, match="another command is submitting jobs of this sweep"),
        submitting(sweep),
    ):
        pass
    with submitting(sweep):
        pass


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"id": "7"}}', '{"a": {"id": "7", "nothing": 1}}'])
def test_a_damaged_list_of_jobs_is_one_paragraph(sweep, content):
    (sweep / ".slurm").mkdir()
    (sweep / ".slurm/jobs.json").write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_submissions(sweep)


def test_a_search_does_not_run_without_its_command(tmp_path, glmtuner, squeue):
    squeue()
    done = glmtuner(
        "-m", "model=tiny_glm", "tracker=none", "hydra/launcher=slurm", "hydra.launcher.wait=false", "hydra/sweeper=optuna",
        "objective=train_loss", "data.dataset=belle_sample", "trainer.learning_rate=interval(1e-4, 1e-3)",
    )  # fmt: skip
    assert (
        done.returncode == 2
        and "hydra.launcher.wait=false with hydra/sweeper=optuna: a search chooses its next jobs" in done.stderr
    )
    done = glmtuner(
        "-m", "model=tiny_glm", "tracker=none", "hydra/launcher=slurm", "hydra.launcher.wait=maybe", "trainer.seed=1,2"
    )
    assert done.returncode == 2 and "hydra.launcher.wait=maybe: legal: true" in done.stderr


def test_sbatch_gets_each_job_once_and_nobody_waits(tmp_path, glmtuner, squeue, monkeypatch):
    """A made-up sbatch that keeps the script that it gets."""
    squeue("41_0|PENDING|Resources", "41_1|PENDING|Resources")
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(
        f'#!/bin/sh\ncp "$1" {tmp_path}/script.sh\necho x >> {tmp_path}/calls\necho Submitted batch job 41\n'
    )
    sbatch.chmod(stat.S_IRWXU)
    (tmp_path / "bin/srun").symlink_to("/bin/true")
    words = ["-m", *WORDS, "trainer.seed=1,2", "hydra/launcher=slurm", "hydra.launcher.wait=false", "name=four"]
    first = glmtuner(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (
        "job 0 is SLURM job 41_0: " in first.stdout and "python -m glmtuner status outputs/sweeps/four" in first.stdout
    )
    script = (tmp_path / "script.sh").read_text()
    assert "#SBATCH --requeue" in script and "#SBATCH --array=0-1%2" in script
    assert f"-m glmtuner.sweep.closing {tmp_path}/outputs/sweeps/four" in script
    names = [*read_submissions(tmp_path / "outputs/sweeps/four")]
    assert [name.rpartition("_")[0] for name in names] == ["seed-1", "seed-2"]
    again = glmtuner(*words)
    assert again.returncode == 0 and "job 1 is SLURM job 41_1 already: " in again.stdout
    assert (tmp_path / "calls").read_text() == "x\n"
    assert glmtuner("status", "outputs/sweeps/four").stdout.splitlines()[-1].endswith("2 queued")


def test_the_names_of_folders_are_those_that_hydra_gives(tmp_path, glmtuner, monkeypatch):
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "hydra": {
                "sweep": {"subdir": "${hydra.job.num}-${job_slug:${hydra.job.override_dirname}}"},
                "job": {
                    "num": 0, "override_dirname": "",
                    "config": {"override_dirname": {"kv_sep": "=", "item_sep": ",", "exclude_keys": ["name"]}},
                },
            }
        }
    )  # fmt: skip
    from glmtuner.sweep.folders import job_slug

    assert folder_names(config, [(3, ["trainer.seed=1", "name=x"])]) == [f"3-{job_slug('trainer.seed=1')}"]
    assert config.hydra.job.num == 0
    assert os.environ.get("SLURM_JOB_ID") is None
