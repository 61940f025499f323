"""The Pareto front of a sweep: against every pair compared by hand, and in the report's table."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from glmtuner.report.pareto import front_markdown, pareto_front, plot_front
from glmtuner.report.ranking import rank_sweep

# (loss, seconds): c is worse than b in both; e equals d in one and is worse in the other; f has no number
POINTS = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (2.5, 6.0), "d": (3.0, 1.0), "e": (3.0, 2.0), "f": (float("nan"), 0.5)}


def sweep_of(folder: Path, points: dict[str, tuple[float, float]], objective: object, keys: tuple[str, str]) -> Path:
    for number, (name, values) in enumerate(points.items()):
        (folder / name).mkdir(parents=True)
        config = OmegaConf.create({"objective": objective, "trainer": {"learning_rate": 0.1 * (number + 1), "seed": 1}})
        OmegaConf.save(config, folder / name / "config.yaml")
        metrics = dict(zip(keys, values, strict=True))
        text = json.dumps(metrics).replace("NaN", "null")
        (folder / name / "metrics.json").write_text(text)
    return folder


def test_no_other_job_beats_a_job_of_the_front(tmp_path):
    sweep = sweep_of(tmp_path, POINTS, ["eval_loss", "train_runtime"], ("eval_loss", "train_runtime"))
    front = pareto_front(rank_sweep(sweep))
    assert [job.name for job in front.best] == ["a", "b", "d"]
    assert sorted(job.name for job in front.others) == ["c", "e"]
    assert front.sentence().startswith("3 of 5 jobs are on the Pareto front of evaluation loss and time")
    assert front.header() == ["evaluation loss", "time", "settings"]
    assert front.rows()[0] == ["1.0000", "9.0 s", "learning_rate 0.1"]
    lines = front_markdown(front)
    assert (
        "| 2.0000 | 5.0 s | learning_rate 0.2 |" in lines
        and len([line for line in lines if line.startswith("| ")]) == 5
    )
    assert plot_front(front).light.startswith(b"\x89PNG")


def test_of_a_score_more_is_better(tmp_path):
    sweep = sweep_of(tmp_path, POINTS, ["rouge-l", "train_runtime"], ("predict_rouge-l", "train_runtime"))
    front = pareto_front(rank_sweep(sweep))
    assert [job.name for job in front.best] == ["d"]  # the highest score and the shortest time of the five


@pytest.mark.parametrize("objective", ["eval_loss", None, ["eval_loss", "bleu"]])
def test_other_sweeps_have_no_front(objective, tmp_path):
    ranking = rank_sweep(sweep_of(tmp_path, POINTS, objective, ("eval_loss", "train_runtime")))
    assert pareto_front(ranking) is None and front_markdown(None) == [] and plot_front(None) is None
    assert ranking.objective == "eval_loss"
