"""More losses on pairs against values worked out by hand."""

import math

import pytest
import torch

from glmtuner.objectives import preference_losses as losses
from glmtuner.objectives.pairs import Halves


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def test_robust_by_hand():
    """Margin 0.5 * 3 = 1.5: -log sigmoid is 0.201413 right way round and 1.701413 flipped; (0.9 * … - 0.1 * …) / 0.8."""
    found = losses.robust_preference(row(1.0), row(-2.0), beta=0.5, label_smoothing=0.1)
    assert found.item() == pytest.approx((0.9 * 0.201413 - 0.1 * 1.701413) / 0.8, abs=1e-6)
    plain = losses.robust_preference(row(1.0), row(-2.0), beta=0.5, label_smoothing=0.0)
    assert plain.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_robust_is_without_bias_under_flipped_labels():
    """Of 10 % flipped pairs the expected loss is DPO's own of the right labels."""
    right = losses.robust_preference(row(1.0), row(-2.0), 0.5, 0.1)
    flipped = losses.robust_preference(row(-2.0), row(1.0), 0.5, 0.1)
    assert (0.9 * right + 0.1 * flipped).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_exo_by_hand():
    """The KL divergence of (0.817574, 0.182426), a margin of 1.5, from (0.9, 0.1)."""
    found = losses.exo_preference(row(1.0), row(-2.0), beta=0.5, label_smoothing=0.1)
    wanted = 0.817574 * math.log(0.817574 / 0.9) + 0.182426 * math.log(0.182426 / 0.1)
    assert found.item() == pytest.approx(wanted, abs=1e-5)
    least = losses.exo_preference(row(math.log(9)), row(0.0), beta=1.0, label_smoothing=0.1)
    assert least.item() == pytest.approx(0.0, abs=1e-9), "the policy believes what the preferences say"


def test_sppo_and_apo_by_hand():
    assert losses.sppo_preference(row(2.0), row(-4.0), beta=0.1).item() == pytest.approx((2 - 5) ** 2 + (-4 + 5) ** 2)
    zero = losses.apo_zero_preference(row(2.0), row(-4.0), beta=0.5)
    assert zero.item() == pytest.approx(1 - logistic(1.0) + logistic(-2.0))
    down = losses.apo_down_preference(row(2.0), row(-4.0), beta=0.5)
    assert down.item() == pytest.approx(logistic(1.0) + 1 - logistic(3.0))


def test_odds_by_hand():
    """p 0.8 has the odds 4, p 0.5 the odds 1."""
    loss, log_odds = losses.odds_ratio_loss(row(math.log(0.8)), row(math.log(0.5)))
    assert log_odds.item() == pytest.approx(math.log(4))
    assert loss.item() == pytest.approx(math.log(1.25))


def test_odds_of_certainty_have_a_finite_gradient():
    sure = torch.tensor([0.0, -1e-9, -40.0], requires_grad=True)
    loss, log_odds = losses.odds_ratio_loss(sure, torch.tensor([-0.1, -0.1, -0.1]))
    loss.sum().backward()
    assert log_odds.isfinite().all() and sure.grad.isfinite().all()
    assert log_odds[2].item() == pytest.approx(-40.0 - math.log(math.exp(-0.1) / (1 - math.exp(-0.1))), abs=1e-4)


def test_simpo_by_hand():
    found = losses.simpo_loss(row(-0.5), row(-1.5), beta=2.0, gamma=0.5, label_smoothing=0.0)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    smooth = losses.simpo_loss(row(-0.5), row(-1.5), beta=2.0, gamma=0.5, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)))


def test_means_are_over_each_answers_own_tokens():
    halves = Halves.of(row(-4.0, -6.0, -9.0, -10.0), torch.tensor([2, 3, 3, 5]))
    assert halves.chosen_mean_R.tolist() == [-2, -2] and halves.rejected_mean_R.tolist() == [-3, -2]
