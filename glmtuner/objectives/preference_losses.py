"""More losses on ranked pairs, as pure functions: those of stage=dpo besides the first three, and those without a reference.

Shape letter: R pairs. A ratio is log(policy / reference) of an answer; a mean is over the tokens of an answer.
"""

import torch
from torch.nn import functional as F

CERTAIN = (
    -1e-7
)  # the largest mean log-probability of a token that odds are computed of; those of certainty are infinite


def robust_preference(
    chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12), [R]: DPO's loss without bias, although labels are flipped.

    `label_smoothing` is the share of pairs that are labelled the wrong way round, below 0.5.
    """
    margin_R = beta * (chosen_ratio_R - rejected_ratio_R)
    right_R, flipped_R = -F.logsigmoid(margin_R), -F.logsigmoid(-margin_R)
    return ((1 - label_smoothing) * right_R - label_smoothing * flipped_R) / (1 - 2 * label_smoothing)


def exo_preference(
    chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """EXO on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16), [R]: the KL divergence from the policy to the preferences.

    Both are distributions over the two answers: the policy's is sigmoid(margin), that of the preferences (1 - label_smoothing,
    label_smoothing), which must be above 0.
    """
    margin_R = beta * (chosen_ratio_R - rejected_ratio_R)
    target = chosen_ratio_R.new_tensor([1 - label_smoothing, label_smoothing]).log()
    better_R, worse_R = F.logsigmoid(margin_R), F.logsigmoid(-margin_R)
    return better_R.exp() * (better_R - target[0]) + worse_R.exp() * (worse_R - target[1])


def sppo_preference(chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float) -> torch.Tensor:
    """SPPO (Wu et al. 2024, arXiv:2405.00675, eq. 4.7) with the probabilities 1 and 0 that an answer wins, [R]; beta is 1 / eta."""
    return (chosen_ratio_R - 0.5 / beta) ** 2 + (rejected_ratio_R + 0.5 / beta) ** 2


def apo_zero_preference(chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float) -> torch.Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7), [R]: the chosen answer becomes likelier, the other less so."""
    return 1 - torch.sigmoid(beta * chosen_ratio_R) + torch.sigmoid(beta * rejected_ratio_R)


def apo_down_preference(chosen_ratio_R: torch.Tensor, rejected_ratio_R: torch.Tensor, beta: float) -> torch.Tensor:
    """APO-down (arXiv:2408.06266, eq. 8), [R]: both answers become less likely, the rejected one more so."""
    margin_R = beta * (chosen_ratio_R - rejected_ratio_R)
    return torch.sigmoid(beta * chosen_ratio_R) + 1 - torch.sigmoid(margin_R)


# -- without a reference -------------------------------------------------------------------------------------------------


def odds_ratio_loss(chosen_mean_R: torch.Tensor, rejected_mean_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ORPO's odds ratio loss (Hong et al. 2024, arXiv:2403.07691, eq. 7), and the log of the odds ratio; each [R].

    The odds are p / (1 - p), where log p is the mean log-probability of an answer's tokens.
    """
    log_odds_R = log_odds(chosen_mean_R) - log_odds(rejected_mean_R)
    return -F.logsigmoid(log_odds_R), log_odds_R


def log_odds(logprob_R: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of a log-probability, exact also where p is near 0 or 1."""
    logprob_R = logprob_R.clamp(max=CERTAIN)
    return logprob_R - torch.log(-torch.expm1(logprob_R))


def simpo_loss(
    chosen_mean_R: torch.Tensor, rejected_mean_R: torch.Tensor, beta: float, gamma: float, label_smoothing: float
) -> torch.Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6), [R]: the better answer's reward is to be larger by the margin `gamma`.

    The reward is beta times the mean log-probability. `label_smoothing` as in DPO.
    """
    margin_R = beta * (chosen_mean_R - rejected_mean_R) - gamma
    return -(1 - label_smoothing) * F.logsigmoid(margin_R) - label_smoothing * F.logsigmoid(-margin_R)
