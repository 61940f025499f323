"""The losses of reward modelling, DPO, KTO and PPO as pure functions.

Shape letters: R rows, T tokens, V vocabulary, N labelled tokens of all rows. `is_…_RT` is True on the tokens that count.
Everything is computed in float32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from glmtuner.templates.base import IGNORE_INDEX

# -- log-probabilities ---------------------------------------------------------------------------------------------------


def label_logprobs(logits_RTV: torch.Tensor, labels_RT: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The log-probability of every label given the tokens before it, [R, T - 1]; 0 where the label is IGNORE_INDEX.

    Only the logits of labelled tokens are converted to float32, so that prompts take no memory here.
    """
    targets_RT = labels_RT[:, 1:]
    is_labelled_RT = targets_RT != IGNORE_INDEX
    logits_NV = logits_RTV[:, :-1][is_labelled_RT].float() / temperature
    logprobs_N = -F.cross_entropy(logits_NV, targets_RT[is_labelled_RT], reduction="none")
    return logprobs_N.new_zeros(targets_RT.shape).masked_scatter(is_labelled_RT, logprobs_N)


@torch.no_grad()
def label_entropies(logits_RTV: torch.Tensor, labels_RT: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The entropy of the distribution that every label was drawn from, in nats, [R, T - 1]; 0 where the label is IGNORE_INDEX."""
    is_labelled_RT = labels_RT[:, 1:] != IGNORE_INDEX
    logprobs_NV = torch.log_softmax(logits_RTV[:, :-1][is_labelled_RT].float() / temperature, dim=-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return entropy_N.new_zeros(is_labelled_RT.shape).masked_scatter(is_labelled_RT, entropy_N)


def masked_mean(
    values_RT: torch.Tensor, is_counted_RT: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean over the tokens that count, of which there are `tokens`, by default those here; 0 when none does."""
    if tokens is None:
        tokens = is_counted_RT.sum().clamp(min=1)
    return (values_RT * is_counted_RT).sum() / tokens


# -- pairs and feedback --------------------------------------------------------------------------------------------------


def pairwise_logistic(chosen_R: torch.Tensor, rejected_R: torch.Tensor) -> torch.Tensor:
    """-log of the probability that the chosen answer wins (Bradley and Terry 1952; InstructGPT, arXiv:2203.02155), [R]."""
    return -F.logsigmoid(chosen_R - rejected_R)


def sigmoid_preference(
    chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """DPO (arXiv:2305.18290, eq. 7), [R], of log(policy / reference) of the two answers.

    `label_smoothing` is the probability that a pair is labelled the wrong way round (conservative DPO, Mitchell 2023).
    """
    margin_R = beta * (chosen_ratio_R - rejected_ratio_R)
    return -(1 - label_smoothing) * F.logsigmoid(margin_R) - label_smoothing * F.logsigmoid(-margin_R)


def ipo_preference(chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO (arXiv:2310.12036, eq. 17), [R]: the margin is pulled to 1 / (2 beta); ratios are means over an answer's tokens."""
    return (chosen_ratio_R - rejected_ratio_R - 1 / (2 * beta)) ** 2


def hinge_preference(chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float) -> torch.Tensor:
    """The hinge loss of SLiC-HF (arXiv:2305.10425) on DPO's margin, [R]."""
    return F.relu(1 - beta * (chosen_ratio_R - rejected_ratio_R))


def kto_loss(
    ratio_R: torch.Tensor,
    is_desirable_R: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """KTO (arXiv:2402.01306, eq. 8), [R]: the value of an answer is relative to `kl`, which carries no gradient."""
    desirable_R = desirable_weight * (1 - torch.sigmoid(beta * (ratio_R - kl)))
    undesirable_R = undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratio_R)))
    return torch.where(is_desirable_R, desirable_R, undesirable_R)


# -- proximal policy optimization ----------------------------------------------------------------------------------------


def token_rewards(
    scores_R: torch.Tensor, kl_RT: torch.Tensor, is_response_RT: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """[R, T]: minus the KL penalty on every token of a response, and the score on its last one (arXiv:1909.08593, eq. 2)."""
    rewards_RT = -kl_coefficient * kl_RT * is_response_RT
    last_R = last_positions(is_response_RT)
    return rewards_RT.scatter_add(1, last_R[:, None], scores_R[:, None].to(rewards_RT.dtype))


def last_positions(is_counted_RT: torch.Tensor) -> torch.Tensor:
    """The position of each row's last token that counts, [R]."""
    positions_T = torch.arange(is_counted_RT.shape[1], device=is_counted_RT.device)
    return (positions_T * is_counted_RT).argmax(1)


def whitened(
    values_RT: torch.Tensor,
    is_counted_RT: torch.Tensor,
    shift_mean: bool = True,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> torch.Tensor:
    """Values with variance 1, and mean 0 when `shift_mean`; 0 on the tokens that do not count.

    `total` sums a value over all parts of the values, where these are one of several.
    """
    tokens = total(is_counted_RT.sum().to(values_RT.dtype))
    mean = total((values_RT * is_counted_RT).sum()) / tokens.clamp(min=1)
    squares = total(((values_RT - mean) ** 2 * is_counted_RT).sum())
    variance = squares / (tokens - 1).clamp(min=1)
    white_RT = (values_RT - mean) * torch.rsqrt(variance + 1e-8)
    return (white_RT if shift_mean else white_RT + mean) * is_counted_RT


def generalized_advantages(
    rewards_RT: torch.Tensor, values_RT: torch.Tensor, is_response_RT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, each [R, T] (GAE, arXiv:1506.02438, eq. 16); a response is contiguous, with no value after it."""
    mask_RT = is_response_RT.float()
    advantage_R, next_value_R = torch.zeros_like(rewards_RT[:, 0]), torch.zeros_like(rewards_RT[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards_RT.shape[1])):
        delta_R = rewards_RT[:, t] + gamma * next_value_R - values_RT[:, t]
        advantage_R = (delta_R + gamma * lam * advantage_R) * mask_RT[:, t]
        next_value_R = values_RT[:, t] * mask_RT[:, t]
        reversed_advantages.append(advantage_R)
    advantages_RT = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages_RT, (advantages_RT + values_RT) * mask_RT


def clipped_policy_loss(
    logprobs_RT: torch.Tensor,
    old_logprobs_RT: torch.Tensor,
    advantages_RT: torch.Tensor,
    is_response_RT: torch.Tensor,
    clip_range: float,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7) as a loss, and the fraction of tokens that are clipped; see `masked_mean`."""
    ratio_RT = torch.exp((logprobs_RT - old_logprobs_RT) * is_response_RT)
    unclipped_RT = -advantages_RT * ratio_RT
    clipped_RT = -advantages_RT * ratio_RT.clamp(1 - clip_range, 1 + clip_range)
    is_clipped_RT = (clipped_RT > unclipped_RT).float()
    loss = masked_mean(torch.maximum(unclipped_RT, clipped_RT), is_response_RT, tokens)
    return loss, masked_mean(is_clipped_RT, is_response_RT, tokens)


def clipped_value_loss(
    values_RT: torch.Tensor,
    old_values_RT: torch.Tensor,
    returns_RT: torch.Tensor,
    is_response_RT: torch.Tensor,
    clip_range: float,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Half the squared error; a value moves at most `clip_range` from the old one (as in the published code of PPO)."""
    clipped_RT = old_values_RT + (values_RT - old_values_RT).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(
        torch.maximum((values_RT - returns_RT) ** 2, (clipped_RT - returns_RT) ** 2), is_response_RT, tokens
    )


def next_kl_coefficient(coefficient: float, kl: float, target: float, horizon: int, rows: int) -> float:
    """The coefficient after `rows` responses with this mean KL (arXiv:1909.08593, section 2.2): it moves KL to `target`."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * rows / horizon)
