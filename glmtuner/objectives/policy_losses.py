"""The losses of policies that learn from groups of answers to the same prompt, as pure functions.

Shape letters: R rows, of which those of a group stand together, T tokens. `is_counted_RT` is True on the tokens of answers that are
learned from. Everything is computed in float32.
"""

import torch

from glmtuner.config.rewards import PolicyLoss, ScaleRewards

SMALL = 1e-4  # added to a standard deviation, as in the published code of GRPO and of its successors


def group_advantages(rewards_R: torch.Tensor, group: int, scale: ScaleRewards) -> torch.Tensor:
    """Each reward minus the mean of its `group` answers, [R], over a standard deviation (GRPO, arXiv:2402.03300, section 4.1.2).

    Without a scale it is that of Dr. GRPO (arXiv:2503.20783, section 3.2), which no group's difficulty changes.
    """
    grouped = rewards_R.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale is ScaleRewards.group:
        centred = centred / (grouped.std(1, keepdim=True) + SMALL)
    elif scale is ScaleRewards.batch:
        centred = centred / (rewards_R.std() + SMALL)
    return centred.flatten()


def leave_one_out_advantages(rewards_R: torch.Tensor, group: int) -> torch.Tensor:
    """Each reward minus the mean of the other answers of its `group`, [R] (RLOO, arXiv:2402.14740, eq. 7)."""
    grouped = rewards_R.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()


def scaled_by_batch(advantages_R: torch.Tensor) -> torch.Tensor:
    """Advantages of a batch with mean 0 and variance 1, [R]."""
    return (advantages_R - advantages_R.mean()) / (advantages_R.std() + SMALL)


def reference_kl(logprobs_RT: torch.Tensor, reference_RT: torch.Tensor) -> torch.Tensor:
    """An unbiased estimate of each token's KL divergence from the policy to the reference, [R, T], never negative (arXiv:2402.03300, eq. 4)."""
    difference_RT = reference_RT - logprobs_RT
    return difference_RT.exp() - difference_RT - 1


def importance_log_ratio(log_ratio_RT: torch.Tensor, is_counted_RT: torch.Tensor, loss: PolicyLoss) -> torch.Tensor:
    """The log of the ratio that is clipped, [R, T]: of each token, or for gspo and rloo of the whole answer, the same at its tokens.

    GSPO's is the mean over an answer's tokens (arXiv:2507.18071, eq. 7), RLOO's the sum, since an answer is one action
    (arXiv:2402.14740, section 3.1).
    """
    if loss not in (PolicyLoss.gspo, PolicyLoss.rloo):
        return log_ratio_RT
    total_R = (log_ratio_RT * is_counted_RT).sum(1, keepdim=True)
    if loss is PolicyLoss.gspo:
        total_R = total_R / is_counted_RT.sum(1, keepdim=True).clamp(min=1)
    return total_R.expand_as(log_ratio_RT)


def clipped_surrogate(
    log_ratio_RT: torch.Tensor, advantages_R: torch.Tensor, epsilon: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate as a loss of each token, [R, T], and where it is clipped, so that it has no gradient, [R, T].

    The two bounds are those of arXiv:1707.06347, eq. 7, apart as in DAPO (arXiv:2503.14476, eq. 10).
    """
    ratio_RT, advantages_R1 = log_ratio_RT.exp(), advantages_R[:, None]
    clipped_RT = ratio_RT.clamp(1 - epsilon, 1 + epsilon_high)
    loss_RT = -torch.minimum(ratio_RT * advantages_R1, clipped_RT * advantages_R1)
    is_low_RT = (ratio_RT < 1 - epsilon) & (advantages_R1 < 0)
    is_high_RT = (ratio_RT > 1 + epsilon_high) & (advantages_R1 > 0)
    return loss_RT, is_low_RT | is_high_RT


def token_weights(
    is_counted_RT: torch.Tensor,
    loss: PolicyLoss,
    max_tokens: int,
    total_tokens: torch.Tensor | None = None,
    total_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of each token's loss, [R, T]; the loss of the rows is the sum.

    GRPO takes the mean over an answer's tokens, then over the answers (arXiv:2402.03300, eq. 3), and so do gspo and rloo, whose
    tokens are all the same; Dr. GRPO divides by the number of answers and the most tokens of one (arXiv:2503.20783, listing 1); DAPO
    takes the mean over the tokens of all answers (arXiv:2503.14476, eq. 8), of which there are `total_tokens`, by default those here;
    and there are `total_rows` answers.
    """
    counted_RT, rows = is_counted_RT.float(), len(is_counted_RT) if total_rows is None else total_rows
    if loss is PolicyLoss.dr_grpo:
        return counted_RT / (rows * max_tokens)
    if loss is PolicyLoss.dapo:
        total = counted_RT.sum() if total_tokens is None else total_tokens
        return counted_RT / total.clamp(min=1)
    return counted_RT / counted_RT.sum(1, keepdim=True).clamp(min=1) / rows
