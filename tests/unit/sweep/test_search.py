"""Searches with stubbed jobs: killed and typed again, shared by processes, failed, diverged, continued with other values."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from stub_search import SPACE, StubSweeper, bowl, in_child, kill_at_append, killed_at_random, started, trials_of

from glmtuner.errors import ConfigError, Diverged
from glmtuner.run_folder.folder import RunFolder


def drawn(sweep: Path) -> list[dict[str, float]]:
    return [trial.params for trial in trials_of(sweep)]


def states(sweep: Path) -> list[str]:
    return [trial.state.name for trial in trials_of(sweep)]


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module", params=[1, 3], ids=lambda n_jobs: f"{n_jobs} at once")
def undisturbed(request, tmp_path_factory) -> tuple[int, list[dict[str, float]]]:
    sweep = tmp_path_factory.mktemp("undisturbed")
    StubSweeper(sweep, n_jobs=request.param).run()
    assert states(sweep) == ["COMPLETE"] * 20
    return request.param, drawn(sweep)


def test_a_search_that_is_killed_at_random_draws_what_the_undisturbed_one_draws(undisturbed, tmp_path):
    n_jobs, values = undisturbed
    kills = killed_at_random(StubSweeper(tmp_path, n_jobs=n_jobs), n_jobs)
    assert kills >= 2
    assert states(tmp_path) == ["COMPLETE"] * 20
    assert drawn(tmp_path) == values
    again = started(tmp_path)
    assert len({*again}) == 20 <= len(again) <= 20 + n_jobs * kills
    assert [*dict.fromkeys(again)] == [trial.user_attrs["folder"] for trial in trials_of(tmp_path)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_search_that_is_killed_in_every_write_to_its_journal_goes_on(share, undisturbed, tmp_path):
    n_jobs, values = undisturbed
    for number in range(100):
        sweep = tmp_path / str(number)

        def killed(sweep=sweep, number=number):
            kill_at_append(number, share)
            StubSweeper(sweep, n_jobs=n_jobs, n_trials=3).run()

        child = in_child(killed)
        child.join()
        if child.exitcode == 0:
            break
        StubSweeper(sweep, n_jobs=n_jobs, n_trials=3).run()
        assert states(sweep) == ["COMPLETE"] * 3 and drawn(sweep) == values[:3]
        assert len({*started(sweep)}) == 3
    assert number == 4 + 3 * 2  # the study, its three attributes, and of each trial its values and its result


def test_two_processes_share_one_search(tmp_path):
    def job(drawn):
        (tmp_path / f"{os.getpid()}.begun").touch()
        until(lambda: len([*tmp_path.glob("*.begun")]) == 2)  # neither does everything before the other begins
        return bowl(drawn)

    children = [in_child(StubSweeper(tmp_path, job, seconds=0.02).run) for _ in range(2)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    trials = trials_of(tmp_path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 20
    assert len({*map(str, drawn(tmp_path))}) == 20
    assert sorted(started(tmp_path)) == sorted(trial.user_attrs["folder"] for trial in trials)  # none was started twice
    assert len({trial.user_attrs["worker"] for trial in trials}) == 2
    assert not list((tmp_path / ".search.journal.locks").glob("worker-*"))


def test_a_process_takes_over_the_trial_of_one_that_was_killed(tmp_path):
    slow = in_child(StubSweeper(tmp_path, seconds=30).run)
    until(lambda: started(tmp_path))
    other = in_child(StubSweeper(tmp_path, n_trials=4).run)  # the slow one's trial counts
    other.join()
    assert other.exitcode == 0 and sorted(states(tmp_path)) == ["COMPLETE"] * 3 + ["RUNNING"]
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    StubSweeper(tmp_path, n_trials=4).run()
    assert states(tmp_path) == ["COMPLETE"] * 4
    assert started(tmp_path).count(trials_of(tmp_path)[0].user_attrs["folder"]) == 2


def test_a_job_that_outlives_its_search_is_waited_for(tmp_path, capsys):
    slow = in_child(StubSweeper(tmp_path, seconds=30).run)
    until(lambda: started(tmp_path))
    folder = RunFolder(tmp_path / started(tmp_path)[0])

    def job_of_a_cluster():
        folder.lock()
        (tmp_path / "locked").touch()
        time.sleep(1)
        (folder / "config.yaml").write_text("{}\n")
        (folder / "metrics.json").write_text('{"eval_loss": 0.5}')

    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    job = in_child(job_of_a_cluster)
    until(lambda: (tmp_path / "locked").exists())
    StubSweeper(tmp_path, n_trials=2).run()
    job.join()
    first, second = trials_of(tmp_path)
    assert first.value == 0.5 and second.state.name == "COMPLETE"
    assert started(tmp_path).count(folder.path.name) == 1


def test_what_becomes_of_a_trial_is_told_to_optuna(tmp_path, capsys):
    def job(drawn):
        norm = float(drawn["trainer.max_grad_norm"])
        if broken and norm < 0.3:
            raise RuntimeError("a cable was pulled")
        if 0.3 <= norm < 0.5:
            raise MemoryError("CUDA out of memory")
        if 0.5 <= norm < 0.7:
            raise Diverged("the training diverged")
        return bowl(drawn) if norm < 0.9 else {"eval_loss": float("nan")}

    broken = True
    StubSweeper(tmp_path, job).run()
    before = trials_of(tmp_path)
    assert len(before) == 20
    kinds = {
        (trial.state.name, trial.user_attrs.get("ended"), (trial.user_attrs.get("reason") or "")[:20])
        for trial in before
    }
    assert kinds == {
        ("COMPLETE", None, ""),
        ("FAIL", "error", "RuntimeError: a cabl"),
        ("PRUNED", "infeasible", "MemoryError: CUDA ou"),
        ("PRUNED", "diverged", "the training diverge"),
        ("PRUNED", "diverged", "its eval_loss is not"),
    }
    failed = [trial for trial in before if trial.state.name == "FAIL"]
    broken = False
    StubSweeper(tmp_path, job).run()
    after = trials_of(tmp_path)
    assert (
        f"{20 - len(failed)} of 20 trials are finished; failed, which are tried again: {len(failed)}"
        in capsys.readouterr().out
    )
    assert [trial.params for trial in after[20:]] == [trial.params for trial in failed]
    assert {trial.state.name for trial in after[20:]} == {"COMPLETE"}
    StubSweeper(tmp_path, job).run()
    assert len(trials_of(tmp_path)) == len(after)
    StubSweeper(tmp_path, job, n_trials=22).run()
    assert len(trials_of(tmp_path)) == len(after) + 2


def test_a_trial_that_fails_again_is_tried_once_a_command(tmp_path):
    def job(drawn):
        raise RuntimeError("always")

    for command in range(1, 4):
        StubSweeper(tmp_path, job, n_trials=3).run()
        assert states(tmp_path) == ["FAIL"] * 3 * command
    assert len({*map(str, drawn(tmp_path))}) == 3


def test_values_that_are_drawn_twice_are_run_once(tmp_path):
    space = {"trainer.learning_rate": "1e-3,1e-4", "trainer.max_grad_norm": "choice(0.5)"}
    StubSweeper(tmp_path, params=space, n_jobs=4, n_trials=8).run()
    assert states(tmp_path) == ["COMPLETE"] * 8 and len(started(tmp_path)) == 2
    assert len({trial.value for trial in trials_of(tmp_path)}) == 2


def test_a_search_ends_when_more_fail_than_may(tmp_path, capsys):
    def job(drawn):
        raise RuntimeError("always")

    StubSweeper(tmp_path, job, max_failure_rate=0.5).run()
    assert states(tmp_path) == ["FAIL"] and "max_failure_rate=0.5; the search ends here" in capsys.readouterr().out


def test_another_space_or_aim_of_the_same_study_is_refused(tmp_path, capsys):
    StubSweeper(tmp_path, n_trials=2).run()
    wider = {**SPACE, "trainer.max_grad_norm": "interval(0, 2)"}
    with pytest.raises(
        ConfigError, match=r"searches another space .trainer.max_grad_norm was number from 0 to 1.; type another name"
    ):
        StubSweeper(tmp_path, params=wider).run()
    with pytest.raises(ConfigError, match=r"objective=train_runtime: the study .* searches for eval_loss .minimize."):
        StubSweeper(tmp_path, objective="train_runtime").run()
    with pytest.raises(ConfigError, match=r"objective=\[eval_loss,train_runtime\]"):
        StubSweeper(tmp_path, objective=["eval_loss", "train_runtime"], direction=["minimize"] * 2).run()
    StubSweeper(tmp_path, n_trials=3, fixed=["trainer.seed=7"]).run()
    assert "may have run with other values (trainer.seed=7)" in capsys.readouterr().out
    assert states(tmp_path) == ["COMPLETE"] * 3


def test_two_objectives_have_a_front(tmp_path, capsys):
    import yaml

    StubSweeper(tmp_path, objective=["eval_loss", "train_runtime"], direction=["minimize"] * 2).run()
    points = [trial.values for trial in trials_of(tmp_path)]
    best = [one for one in points if not any(a <= one[0] and b <= one[1] and [a, b] != one for a, b in points)]
    written = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert sorted(solution["values"] for solution in written["solutions"]) == sorted(best)
    assert f"{len(best)} of them are on the Pareto front of eval_loss and train_runtime" in capsys.readouterr().out


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_database_keeps_a_search_as_a_journal_does(n_jobs, tmp_path):
    storage = f"sqlite:///{tmp_path}/searches.db"
    StubSweeper(tmp_path / "journal", n_jobs=n_jobs, n_trials=8).run()
    slow = in_child(StubSweeper(tmp_path / "s", storage=storage, n_jobs=n_jobs, n_trials=8, seconds=0.3).run)
    until(lambda: len(started(tmp_path / "s")) >= 3)
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    StubSweeper(tmp_path / "s", storage=storage, n_jobs=n_jobs, n_trials=8).run()
    trials = trials_of(tmp_path / "s", storage)
    assert [trial.params for trial in trials] == drawn(tmp_path / "journal")
    assert {trial.state.name for trial in trials} == {"COMPLETE"}


def test_of_two_machines_that_share_a_database_only_one_draws_a_number(tmp_path, monkeypatch):
    """Without a common disk nothing orders them: the second withdraws its trial, and draws again."""
    storage = f"sqlite:///{tmp_path}/searches.db"
    StubSweeper(tmp_path / "s", storage=storage, n_trials=1).run()
    sweeper = StubSweeper(tmp_path / "s", storage=storage, n_trials=3)
    whole, raced = optuna.Study.add_trial, []

    def add_trial(self, trial):
        if not raced and trial.state.name == "RUNNING" and self.study_name == "s":
            raced.append(trial)
            optuna.load_study(study_name="s", storage=storage).add_trial(
                optuna.trial.create_trial(value=1.0, params=trial.params, distributions=trial.distributions)
            )
        whole(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", add_trial)
    sweeper.run()
    assert raced
    trials = trials_of(tmp_path / "s", storage)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[2].user_attrs["ended"] == "withdrawn" and trials[3].params != trials[1].params


def test_a_trial_of_another_machine_is_taken_over_when_its_heartbeat_stops(tmp_path):
    storage = f"sqlite:///{tmp_path}/searches.db"
    database = sqlite3.connect(tmp_path / "searches.db")
    slow = in_child(StubSweeper(tmp_path / "there", storage=storage, study_name="x", n_trials=2, seconds=30).run)
    until(lambda: started(tmp_path / "there"))
    until(lambda: database.execute("select count(*) from trial_heartbeats").fetchone() == (1,))
    StubSweeper(tmp_path / "here", storage=storage, study_name="x", n_trials=2).run()
    assert [trial.state.name for trial in trials_of(tmp_path, storage)] == ["RUNNING", "COMPLETE"]
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    database.execute("update trial_heartbeats set heartbeat = datetime(heartbeat, '-10 minutes')")
    database.commit()
    database.close()
    StubSweeper(tmp_path / "here", storage=storage, study_name="x", n_trials=2).run()
    trials = trials_of(tmp_path, storage)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert started(tmp_path / "here").count(trials[0].user_attrs["folder"]) == 1
