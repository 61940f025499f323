"""Losses against values worked out by hand, and against the formulas written out in plain Python loops."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

from glmtuner.objectives import losses


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def drawn(rows: int, tokens: int, seed: int = 0) -> tuple[list[list[float]], ...]:
    """Three tables of random numbers and the lengths of their rows."""
    rng = random.Random(seed)
    tables = [[[rng.gauss(0, 1) for _ in range(tokens)] for _ in range(rows)] for _ in range(3)]
    return (*tables, [rng.randint(1, tokens) for _ in range(rows)])


def mask_of(lengths: list[int], tokens: int, start: int = 0) -> torch.Tensor:
    return torch.tensor([[start <= place < start + length for place in range(tokens)] for length in lengths])


# -- log-probabilities ---------------------------------------------------------------------------------------------------


def test_label_logprobs_are_those_of_a_softmax_and_zero_on_prompts():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 1, -100], [-100, 6, 6, 0, 2]])
    logits.requires_grad_()
    found = losses.label_logprobs(logits, labels)
    wanted = torch.log_softmax(logits, -1)
    for i in range(2):
        for t in range(4):
            label = int(labels[i, t + 1])
            assert found[i, t].item() == pytest.approx(0.0 if label < 0 else wanted[i, t, label].item(), abs=1e-6)
    found.sum().backward()
    assert not logits.grad[0, 0].any() and logits.grad[0, 1].any()  # the prompt's own logits learn nothing


def test_label_logprobs_agree_with_cross_entropy_in_half_precision():
    torch.manual_seed(1)
    logits, labels = torch.randn(3, 6, 11).bfloat16(), torch.randint(0, 11, (3, 6))
    found = losses.label_logprobs(logits, labels)
    assert found.dtype == torch.float32
    wanted = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    assert -found.mean() == pytest.approx(wanted.item(), rel=1e-6)


# -- pairs and feedback --------------------------------------------------------------------------------------------------


def test_pairwise_logistic():
    found = losses.pairwise_logistic(row(2.0, 0.0), row(1.0, 3.0))
    assert found.tolist() == pytest.approx([0.313262, 3.048587], abs=1e-6)  # log(1 + e^-1), log(1 + e^3)


def test_dpo_by_hand():
    found = losses.sigmoid_preference(row(1.0), row(-2.0), beta=0.5, label_smoothing=0.0)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-12)
    smooth = losses.sigmoid_preference(row(1.0), row(-2.0), beta=0.5, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)))
    assert losses.sigmoid_preference(row(0.3), row(0.3), 0.1, 0.0).item() == pytest.approx(math.log(2))


def test_ipo_and_hinge_by_hand():
    assert losses.ipo_preference(row(1.0, 5.0), row(-2.0, 0.0), beta=0.1).tolist() == pytest.approx([4.0, 0.0])
    assert losses.hinge_preference(row(1.0, 9.0), row(-2.0, -2.0), beta=0.1).tolist() == pytest.approx([0.7, 0.0])


def test_smoothed_dpo_is_least_where_the_policy_believes_the_smoothing():
    """The derivative vanishes where sigmoid(margin) is 1 - label_smoothing."""
    margin = torch.tensor([math.log(9.0)], requires_grad=True)
    losses.sigmoid_preference(margin, torch.zeros(1), beta=1.0, label_smoothing=0.1).backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_kto_by_hand():
    found = losses.kto_loss(row(2.0, 2.0), torch.tensor([True, False]), row(0.5)[0], 0.2, 1.0, 1.5)
    assert found.tolist() == pytest.approx([1 - logistic(0.3), 1.5 * (1 - logistic(-0.3))])


# -- proximal policy optimization ----------------------------------------------------------------------------------------


def reference_advantages(rewards, values, lengths, gamma, lam):
    """The sum of equation 16 in arXiv:1506.02438, term by term, in double precision."""
    advantages = [[0.0] * len(values[0]) for _ in values]
    for i, length in enumerate(lengths):
        deltas = [
            rewards[i][t] + (gamma * values[i][t + 1] if t + 1 < length else 0.0) - values[i][t] for t in range(length)
        ]
        for t in range(length):
            advantages[i][t] = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
    return advantages


def test_advantages_by_hand():
    """gamma 0.9, lambda 0.8: deltas -0.5 + 0.9 * 1 = 0.4, then 1 - 1 = 0 and so on, backwards."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 1.0, 0.25]])
    advantages, returns = losses.generalized_advantages(rewards, values, torch.ones(1, 3).bool(), 0.9, 0.8)
    last = 1.0 - 0.25
    middle = 0.0 + 0.9 * 0.25 - 1.0 + 0.72 * last
    first = 0.0 + 0.9 * 1.0 - 0.5 + 0.72 * middle
    assert advantages[0].tolist() == pytest.approx([first, middle, last], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([first + 0.5, middle + 1.0, last + 0.25], abs=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sums_of_the_paper(gamma, lam):
    rewards, values, _, lengths = drawn(6, 9)
    mask = mask_of(lengths, 9)
    advantages, returns = losses.generalized_advantages(torch.tensor(rewards), torch.tensor(values), mask, gamma, lam)
    wanted = torch.tensor(reference_advantages(rewards, values, lengths, gamma, lam))
    torch.testing.assert_close(advantages, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, (wanted + torch.tensor(values)) * mask, atol=1e-5, rtol=1e-5)
    if gamma == lam == 1.0:  # then a return is all the reward that is still to come
        to_come = torch.tensor(rewards).mul(mask).flip(1).cumsum(1).flip(1) * mask
        torch.testing.assert_close(returns, to_come, atol=1e-5, rtol=1e-5)


def test_advantages_do_not_look_beyond_a_response():
    """Numbers on the prompt and behind the answer change nothing."""
    rewards, values, other, lengths = (torch.tensor(part) for part in drawn(4, 8, seed=3))
    mask = mask_of([min(int(length), 5) for length in lengths], 8, start=2)
    noisy = torch.where(mask, values, other * 100)
    rewards = rewards * mask
    clean, _ = losses.generalized_advantages(rewards, values * mask, mask, 0.9, 0.9)
    again, _ = losses.generalized_advantages(rewards, noisy, mask, 0.9, 0.9)
    torch.testing.assert_close(clean * mask, again * mask)


def test_token_rewards_by_hand():
    kl = torch.tensor([[9.0, 0.5, -0.1, 9.0], [9.0, 0.2, 0.0, 0.4]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    found = losses.token_rewards(torch.tensor([2.0, -1.0]), kl, mask, kl_coefficient=0.1)
    wanted = torch.tensor([[0.0, -0.05, 2.01, 0.0], [0.0, -0.02, 0.0, -1.04]])
    torch.testing.assert_close(found, wanted)
    assert found.sum(1).tolist() == pytest.approx([2.0 - 0.1 * 0.4, -1.0 - 0.1 * 0.6], abs=1e-6)


def test_whitening():
    values, _, _, lengths = drawn(5, 7, seed=2)
    mask, values = mask_of(lengths, 7), torch.tensor(values) * 3 + 2
    white = losses.whitened(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()
    kept = losses.whitened(values, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-5)
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]  # as of two ranks, which add up what the formula sums
    asked: list[list[torch.Tensor]] = []
    for _ in range(3):  # the sums of a pass over both halves are known in the next one
        known, found = asked, []
        asked = []
        for part, part_mask in halves:
            own: list[torch.Tensor] = []

            def total(value, own=own, known=known):
                own.append(value)
                return sum(each[len(own) - 1] for each in known) if known else value

            found.append(losses.whitened(part, part_mask, total=total))
            asked.append(own)
    torch.testing.assert_close(torch.cat(found), white)
    alone = losses.whitened(torch.tensor([[5.0]]), torch.tensor([[True]]))
    assert alone.item() == 0  # one token has no variance, and no division by zero


def reference_policy_loss(new, old, advantages, lengths, clip):
    terms, held = [], 0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = math.exp(new[i][t] - old[i][t])
            free, kept = ratio * advantages[i][t], min(max(ratio, 1 - clip), 1 + clip) * advantages[i][t]
            terms.append(-min(free, kept))
            held += kept < free
    return sum(terms) / len(terms), held / len(terms)


def test_the_clipped_objective_is_the_papers():
    new, old, advantages, lengths = drawn(6, 5, seed=4)
    tensors = (torch.tensor(part) for part in (new, old, advantages))
    loss, held = losses.clipped_policy_loss(*tensors, mask_of(lengths, 5), 0.2)
    wanted_loss, wanted_held = reference_policy_loss(new, old, advantages, lengths, 0.2)
    assert (loss.item(), held.item()) == pytest.approx((wanted_loss, wanted_held), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "pushes"),
    [(1.0, 2.0, -2.0, True), (1.5, 2.0, -2.4, False), (0.5, 2.0, -1.0, True), (0.5, -2.0, 1.6, False), (1.5, -2.0, 3.0, True)],
)  # fmt: skip
def test_the_clip_by_hand(ratio, advantage, loss, pushes):
    """Beyond 1 +- 0.2 a token pushes no further in the direction that it has gone."""
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    found, held = losses.clipped_policy_loss(logprob, one * 0, one * advantage, one.bool(), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert (logprob.grad.item() != 0) is pushes
    assert held.item() == float(not pushes)


def test_the_value_loss_by_hand():
    one = torch.ones(1, 1)
    for value, old, target, wanted in ((1.1, 1.0, 2.0, 0.405), (1.9, 1.0, 2.0, 0.32), (3.0, 1.0, 2.0, 0.5)):
        found = losses.clipped_value_loss(one * value, one * old, one * target, one.bool(), 0.2)
        assert found.item() == pytest.approx(wanted, abs=1e-6)


def test_the_kl_coefficient_by_hand():
    """KL twice the target: the error is clipped to 0.2, times 64 of 6400 rows; KL at the target changes nothing."""
    assert losses.next_kl_coefficient(0.1, 12.0, 6.0, 6400, 64) == pytest.approx(0.1 * 1.002)
    assert losses.next_kl_coefficient(0.1, 6.6, 6.0, 6400, 64) == pytest.approx(0.1 * 1.001)
    assert losses.next_kl_coefficient(0.1, 6.0, 6.0, 6400, 64) == 0.1
    assert losses.next_kl_coefficient(0.1, 0.0, 6.0, 6400, 64) == pytest.approx(0.1 * 0.998)


def test_the_kl_coefficient_holds_kl_at_its_target():
    """A policy whose KL falls as the coefficient grows is led to the target from both sides."""
    for start in (0.01, 5.0):
        coefficient = start
        for _ in range(4000):
            coefficient = losses.next_kl_coefficient(coefficient, 1 / coefficient, 4.0, 1000, 10)
        assert 1 / coefficient == pytest.approx(4.0, rel=0.01)
