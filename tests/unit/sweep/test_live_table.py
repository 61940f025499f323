"""The table of a sweep's jobs in a terminal: made-up folders, and errors that must not reach the sweep."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import Terminal, on_screen

from glmtuner.console import TABLE, say
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.locks import is_locked, try_lock
from glmtuner.run_folder.names import LOCK
from glmtuner.sweep import live_table
from glmtuner.sweep.status import DROPPED, PAUSED, Line, Progress, lines_of

SHARED, BASIC = "hydra_plugins.glmtuner.SharedLauncher", "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
CONFIG = (
    "model: {model_name_or_path: package://tiny_glm, family: glm}\ntrainer: {max_steps: 40, num_train_epochs: 3.0}\n"
)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal(80, 20)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(live_table, "DRAW_SECONDS", 0.02)
    monkeypatch.setattr(live_table, "SHARE", 0.9)
    yield terminal
    terminal.close()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text('{"typed": [], "cwd": ".", "jobs": ["first", "第二"]}')
    return tmp_path / "sweep"


def job(root: Path, name: str, *losses: float, **files: dict) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    lines = [json.dumps({"step": step, "epoch": 0.1, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (folder / "history.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for file, value in files.items():
        (folder / f"{file}.json").write_text(json.dumps(value))
    return folder


def wait_for(screen: Terminal, word: str) -> list[str]:
    end = time.monotonic() + 120
    while not any(word in line for line in screen.lines()):
        assert time.monotonic() < end, screen.lines()
    return screen.lines()


@on_screen
def test_the_table_follows_the_folders(screen, sweep):
    with live_table.live_table(sweep, SHARED):
        assert os.environ[TABLE]
        shown = wait_for(screen, "2 not started")
        assert [line.split()[:1] for line in shown[:3]] == [["job"], ["first"], ["第二"]]
        folder = job(sweep, "first", 3.5, 2.25, progress={"step": 8, "steps": 40, "start_step": 0, "seconds": 4.0})
        with (folder / LOCK).open("ab") as file:
            held = try_lock(folder / LOCK)
            assert held is not None and file
            row = next(line for line in wait_for(screen, "running") if line.startswith("first"))
            assert row.split() == ["first", "running", "8", "of", "40", "2.25", "2/s", "16", "s"]
            say("job 1 says something")
            shown = wait_for(screen, "says something")
            assert shown[0] == "job 1 says something" and "1 running, 1 not started; about " in shown[-1]
            held.close()
    assert screen.lines() == ["job 1 says something"] and TABLE not in os.environ


@on_screen
def test_an_error_switches_it_off_and_the_sweep_goes_on(screen, sweep, monkeypatch):
    def fails(root: Path) -> list[Line]:
        raise RuntimeError("folder on fire")

    with live_table.live_table(sweep, SHARED):
        wait_for(screen, "not started")
        monkeypatch.setattr(live_table, "lines_of", fails)
        text = "".join(wait_for(screen, "switched off"))
        assert "the table of the jobs is switched off (RuntimeError: folder on fire)" in text
        say("goes on")
    assert screen.lines()[-1] == "goes on" and not any("not started" in line for line in screen.lines())
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(keep_drawing)")]


@on_screen
def test_a_signal_ends_it(screen, sweep):
    with pytest.raises(KeyboardInterrupt), live_table.live_table(sweep, SHARED):
        wait_for(screen, "not started")
        raise KeyboardInterrupt
    assert screen.lines() == []


@on_screen
def test_jobs_that_run_in_this_process_by_the_basic_launcher_have_a_line_of_their_own(screen, sweep):
    with live_table.live_table(sweep, BASIC):
        time.sleep(0.1)
        assert screen.lines() == [] and TABLE not in os.environ


@on_screen
def test_processes_that_share_the_terminal_are_silent_meanwhile(screen, monkeypatch, capfd):
    monkeypatch.setenv(TABLE, "1")
    say("into the table")
    assert screen.lines() == []
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    say("into a log")
    assert capfd.readouterr().out == "into a log\n"


def test_as_many_jobs_as_there_are_rows():
    lines = [Line(f"j{number}", "not started") for number in range(30)] + [
        Line("最后", "running", Progress(3, 10, 0.5), loss=1.5)
    ]
    shown = live_table.table_lines(Path("s"), lines, 50, 10)
    assert len(shown) == 8 and shown[1].split() == ["最后", "running", "3", "of", "10", "1.5", "0.5/s", "14", "s"]
    assert shown[-2] == "and 26 more" and shown[-1].startswith("1 running, 30 not started; about ")
    assert len(live_table.table_lines(Path("s"), lines[:3], 50, 10)) == 5
    assert live_table.table_lines(Path("s"), lines, 20, 3)[1].startswith("最后")


def test_jobs_of_a_race_are_paused_or_dropped(sweep, tmp_path, monkeypatch):
    from dataclasses import replace

    from glmtuner.report.jobs import State, read_jobs
    from glmtuner.sweep import status

    job(sweep, "first", 2.0)
    job(sweep, "第二", 3.0)
    states = {"first": (State.paused, "paused after step 2 of 4"), "第二": (State.dropped, "rung 1 of 2")}
    jobs = [replace(each, state=states[each.name][0], reason=states[each.name][1]) for each in read_jobs(sweep)]
    monkeypatch.setattr(status, "read_jobs", lambda root: jobs)
    assert {line.name: (line.state, line.note, line.loss) for line in lines_of(sweep)} == {
        "first": (PAUSED, "paused after step 2 of 4", 2.0),
        "第二": (DROPPED, "rung 1 of 2", 3.0),
    }


def test_who_looks_at_a_folder_does_not_keep_a_run_from_it(tmp_path):
    """A look takes the lock for an instant; a run that starts in that instant tries again."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder / LOCK).touch()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            is_locked(folder / LOCK)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            folder.lock()
            folder.unlock()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
