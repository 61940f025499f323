"""The formulas of stage=grpo by hand; tests/trl compares them with TRL's trainers."""

import math

import pytest
import torch

from glmtuner.config.rewards import PolicyLoss, ScaleRewards
from glmtuner.objectives.policy_losses import (
    clipped_surrogate,
    group_advantages,
    importance_log_ratio,
    leave_one_out_advantages,
    reference_kl,
    scaled_by_batch,
    token_weights,
)

REWARDS = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0])  # two groups of four, the second without a signal


def test_advantages_of_a_group():
    assert group_advantages(REWARDS, 4, ScaleRewards.none).tolist() == [0, -1, -1, 2, 0, 0, 0, 0]
    deviation = math.sqrt((0 + 1 + 1 + 4) / 3)
    wanted = [each / (deviation + 1e-4) for each in (0, -1, -1, 2)]
    assert group_advantages(REWARDS, 4, ScaleRewards.group).tolist() == pytest.approx([*wanted, 0, 0, 0, 0])
    mean = 1.5
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in REWARDS.tolist()) / 7)
    wanted = [each / (deviation + 1e-4) for each in (0, -1, -1, 2, 0, 0, 0, 0)]
    assert group_advantages(REWARDS, 4, ScaleRewards.batch).tolist() == pytest.approx(wanted)


def test_the_baseline_of_an_answer_is_the_mean_of_the_others():
    wanted = [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3, 0, 0, 0, 0]
    assert leave_one_out_advantages(REWARDS, 4).tolist() == pytest.approx(wanted, abs=1e-6)
    scaled = scaled_by_batch(torch.tensor(wanted))
    assert scaled.mean().item() == pytest.approx(0, abs=1e-6) and scaled.std().item() == pytest.approx(1, abs=1e-3)


def test_the_estimate_of_the_divergence():
    found = reference_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]]))
    assert found.tolist()[0] == pytest.approx([math.exp(-0.5) + 0.5 - 1, 0])


def test_ratios_of_tokens_and_of_answers():
    log_ratio, counted = torch.tensor([[0.1, 0.3, 9.0], [0.2, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert importance_log_ratio(log_ratio, counted, PolicyLoss.grpo) is log_ratio
    for loss, wanted in ((PolicyLoss.gspo, [0.2, 0.2]), (PolicyLoss.rloo, [0.4, 0.2])):
        found = importance_log_ratio(log_ratio, counted, loss)
        assert found.shape == (2, 3) and found[:, 0].tolist() == pytest.approx(wanted)


def test_a_ratio_out_of_bounds_is_not_followed_further():
    ratios = torch.tensor([[0.5, 1.0, 1.25, 1.5]])
    loss, is_clipped = clipped_surrogate(ratios.log(), torch.tensor([2.0]), 0.2, 0.28)
    assert loss[0].tolist() == pytest.approx([-1.0, -2.0, -2.5, -2.56]) and is_clipped.tolist() == [
        [False, False, False, True]
    ]
    loss, is_clipped = clipped_surrogate(ratios.log(), torch.tensor([-2.0]), 0.2, 0.28)
    assert loss[0].tolist() == pytest.approx([1.6, 2.0, 2.5, 3.0]) and is_clipped.tolist() == [
        [True, False, False, False]
    ]


def test_how_tokens_count():
    counted = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()  # the last answer is filtered out
    third = 1 / 3
    assert token_weights(counted, PolicyLoss.grpo, 10).sum(1).tolist() == pytest.approx([third, third, 0])
    assert token_weights(counted, PolicyLoss.grpo, 10)[0].tolist() == pytest.approx([third / 3] * 3 + [0])
    assert token_weights(counted, PolicyLoss.dr_grpo, 10)[1].tolist() == pytest.approx([1 / 30, 0, 0, 0])
    assert token_weights(counted, PolicyLoss.dapo, 10)[0].tolist() == [0.25, 0.25, 0.25, 0]
    assert token_weights(counted, PolicyLoss.dapo, 10, torch.tensor(8.0))[0, 0] == 0.125
    assert token_weights(~counted & False, PolicyLoss.dapo, 10).sum() == 0
