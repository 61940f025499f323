"""A race in the report: dropped and paused jobs, the steps that were spared, damaged decisions."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmtuner.errors import CheckpointError
from glmtuner.report.jobs import State, read_jobs
from glmtuner.report.leaderboard import leaderboard_csv, sweep_markdown
from glmtuner.report.race import read_rung, rung_table, rung_title
from glmtuner.report.ranking import rank_sweep

RUNG: dict[str, Any] = {
    "rung": 2, "of": 3, "pause": "0.5", "metric": "loss", "rule": "paired", "records": 40,
    "jobs": [
        {"job": "slow", "state": "dropped", "place": 3, "step": 2, "max_steps": 4, "value": 2.5, "gap": 0.5, "low": 0.25, "high": 0.75,
         "p": 1e-5, "adjusted_p": 2e-5, "end_gap": 0.25, "end_low": 0.125, "end_high": 0.375},
        {"job": "lost", "state": "failed", "reason": "RuntimeError: a cable was pulled"},
        {"job": "best", "state": "best", "place": 1, "step": 2, "max_steps": 4, "value": 2.0},
        {"job": "next", "state": "goes on", "place": 2, "step": 2, "max_steps": 4, "value": 2.0, "gap": 0.0, "low": -1.0, "high": 1.0,
         "p": 1.0, "adjusted_p": 1.0},
    ],
}  # fmt: skip
REASON = (
    "rung 2 of 3 (step 2 of 4): loss 2.5000, 0.5000 [0.2500, 0.7500] behind the best, adjusted p 2.0e-05, extrapolated to the end "
    "0.2500 [0.1250, 0.3750]"
)


@pytest.fixture
def race(sweep: Path, job: Callable) -> Path:
    """A sweep of which one job is finished, one dropped, and one paused."""
    (sweep / "race").mkdir()
    (sweep / "race/rung-2.json").write_text(json.dumps(RUNG))
    job("best", {"trainer.learning_rate": 1.0}, losses=[(2.0, 1), (4.0, 2)])
    job("slow", {"trainer.learning_rate": 2.0})
    waiting = job("next", {"trainer.learning_rate": 3.0})
    (waiting / "checkpoints/checkpoint-2").mkdir(parents=True)
    (waiting / "pauses/0.5").mkdir(parents=True)
    (waiting / "pauses/0.5/pause.json").write_text('{"step": 2, "max_steps": 4}')
    return sweep


def test_what_became_of_each_job_of_a_race(race: Path) -> None:
    jobs = {job.name: (job.state, job.reason) for job in read_jobs(race)}
    assert jobs["best"][0] is State.finished
    assert jobs["slow"] == (State.dropped, REASON)
    assert jobs["next"] == (State.paused, "paused after step 2 of 4")
    (race / "next/checkpoints/checkpoint-3").mkdir()  # it was interrupted on the way to the next rung
    assert {job.name: job.state for job in read_jobs(race)}["next"] is State.unfinished


def test_the_report_lists_dropped_jobs_with_their_evidence(race: Path) -> None:
    ranking = rank_sweep(race)
    assert ranking.summary == "1 finished, 1 paused, 1 dropped"
    text = sweep_markdown(ranking, [], ([], []))
    # the best job's 4 steps, and 2 of each other's 4
    assert "The race has trained 8 of the 12 steps of the grid (66.7%)." in text
    assert "hydra.sweeper.recall=\\[slow\\]" in text or "hydra.sweeper.recall=[slow]" in text
    assert "0.5000" in text and "adjusted p 2.0e-05" in text
    assert f'slow,dropped,"{REASON}"' in leaderboard_csv(ranking)


def test_the_table_of_a_rung_is_in_the_order_of_its_jobs() -> None:
    header, rows = rung_table(RUNG)
    assert header == ["job", "loss", "behind the best", "adjusted p", "at the end", ""]
    assert [row[0] for row in rows] == ["best", "next", "slow", "lost"]
    assert rows[2][1:] == ["2.5000", "0.5000 [0.2500, 0.7500]", "2.0e-05", "0.2500 [0.1250, 0.3750]", "dropped"]
    assert rows[3][-1] == "failed: RuntimeError: a cable was pulled"
    assert rung_title(RUNG) == "rung 2 of 3, after 0.5 of the training: loss on 40 records"
    assert rung_title({**RUNG, "pause": "200"}).startswith("rung 2 of 3, after step 200: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rung", "2"), ("rung", None), ("jobs", {}), ("jobs", [1]), ("pause", 0.5), ("metric", None), ("job.job", 3), ("job.state", None),
     ("job.step", "2"), ("job.max_steps", 2.5), ("job.low", "0"), ("job.place", None), ("job.reason", ["x"])],
)  # fmt: skip
def test_a_damaged_decision_is_named_and_breaks_no_report(
    key: str, value: object, race: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy.deepcopy(RUNG)
    (damaged["jobs"][0] if key.startswith("job.") else damaged)[key.removeprefix("job.")] = value
    file = race / "race/rung-2.json"
    file.write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match=r"rung-2\.json is damaged"):
        read_rung(file)
    assert {job.name: job.state for job in read_jobs(race)}["slow"] is State.unfinished
    assert "rung-2.json is damaged" in capsys.readouterr().out
