"""What a race costs and how often it drops the best job, on simulated sweeps.

The rule (the trend's scale, its interval) and the rungs were chosen on seed 1; this is another.
"""

from pathlib import Path

import numpy
import pytest
import yaml

from glmtuner.sweep import race_simulation
from glmtuner.sweep.race_rules import HALVING, PAIRED, Rule
from glmtuner.sweep.race_simulation import FAMILIES, RUNGS, simulate, true_losses

ROOT = Path(__file__).parents[3]
SEED = 20261127  # of docs/race.md


def rule(name: str) -> Rule:
    return Rule.of_race(name, 0.05, 1, 3, len(RUNGS))


def test_the_rungs_are_those_of_the_preset() -> None:
    preset = yaml.safe_load((ROOT / "conf/hydra/sweeper/race.yaml").read_text(encoding="utf-8"))
    assert tuple(preset["rungs"]) == RUNGS
    assert (preset["alpha"], preset["keep"], preset["reduction_factor"]) == (0.05, 1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_of_16_jobs_is_rarely_dropped_and_most_steps_are_spared(family: str) -> None:
    found = simulate(rule(PAIRED), RUNGS, family, seed=SEED)
    assert found.lost < 0.05 and found.trained <= 0.45, found
    assert found.overtaken > 0.4  # in these sweeps the best job is often not the best at first
    page = (ROOT / "docs/race.md").read_text(encoding="utf-8")
    assert f"| paired | {family} | 200 | {found.lost:.2%} | {found.trained:.1%} |" in page


def test_going_by_rank_or_without_the_trend_drops_the_best_job_often() -> None:
    by_rank = simulate(rule(HALVING), RUNGS, "late", seed=SEED, sweeps=200)
    assert by_rank.lost > 0.3 and by_rank.trained < 0.25
    behind_only = simulate(rule(PAIRED), RUNGS, "late", seed=SEED, sweeps=200, trend=False)
    assert behind_only.lost > 0.2


def test_the_curves_are_those_that_are_described() -> None:
    shares = [0.0, 0.1, 0.5, 1.0]
    noise = race_simulation.TRAINING_NOISE
    curves = true_losses(numpy.random.default_rng(0), "independent", 20_000, shares)
    assert curves[0].mean() == pytest.approx(race_simulation.START, abs=0.001)
    assert (numpy.diff(curves, axis=0) < 6 * noise).all()
    random = numpy.random.default_rng(0)
    quality = random.normal(size=20_000)  # the first that is drawn
    for family, sign in (("independent", 0), ("late", -1)):
        end = true_losses(numpy.random.default_rng(0), family, 20_000, [0.1, 1.0, 1e9])
        assert end[2] == pytest.approx(2 + 0.12 * quality, abs=0.03)
        share = (end[0] - end[2]) / (4 - end[2])  # of the way that is left after a tenth of the training
        found = numpy.corrcoef(quality, share)[0, 1]
        assert found < -0.2 if sign else abs(found) < 0.02
