"""The loss of a language model whose labels have weights, or probabilities as such: the sum of weight times loss over the sum of the weights.

With this divisor weights are relative: all weights times two are the same training. It is that of an optimizer step, of all batches
and ranks, so that a label weighs the same in whichever batch it is.
"""

from typing import Any

import torch
from torch.nn import functional as F

from glmtuner.models.unwrap import unwrapped
from glmtuner.objectives.objective import COUNTED
from glmtuner.templates.base import IGNORE_INDEX


def batch_weight(batch: dict[str, Any]) -> torch.Tensor:
    """The sum of a batch's weights, a float32 scalar: those of its labels, or of an objective's rows that count."""
    if "weights" not in batch:
        weight_R = batch.get("weight", 1.0) * batch.get(COUNTED, torch.ones(()))
        total: torch.Tensor = weight_R.float().sum()
        return total
    is_labelled_BT = batch["labels"][:, 1:].ne(IGNORE_INDEX)
    summed: torch.Tensor = (batch["weights"][:, 1:] * is_labelled_BT).sum()
    return summed


def weighted_sum(
    model: torch.nn.Module,
    batch: dict[str, Any],
    *,
    chunked: bool,
    smoothing: float = 0.0,
    by_probability: bool = False,
) -> torch.Tensor:
    """The sum of the labels' losses in nats, each times its weight if the batch has weights, a float32 scalar.

    `chunked`: the model computes its loss by glmtuner/kernels/chunked_loss.py. `smoothing` is label smoothing's factor
    (arXiv:1512.00567, section 7). `by_probability` multiplies each loss by the label's probability, which carries no gradient (DFT,
    arXiv:2508.05629). The auxiliary loss of a router is added, as often as the weights say.
    """
    if chunked:
        how = {"smoothing": smoothing, "by_probability": by_probability}
        loss: torch.Tensor = model(**batch, num_items_in_batch=1, **how).loss
        return loss
    unlabelled = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
    out = model(**unlabelled)
    targets_BT = batch["labels"][:, 1:]
    is_labelled_BT = targets_BT.ne(IGNORE_INDEX)
    logits_NV = out.logits[:, : targets_BT.shape[1]][is_labelled_BT].float()
    loss_N = F.cross_entropy(logits_NV, targets_BT[is_labelled_BT], reduction="none", label_smoothing=smoothing)
    weights_N = batch["weights"][:, 1:][is_labelled_BT] if "weights" in batch else torch.ones_like(loss_N)
    if by_probability:
        loss_N = loss_N * torch.exp(-loss_N.detach())
    total = (loss_N * weights_N).sum()
    if getattr(out, "aux_loss", None) is not None:  # a mean over the batch's tokens
        total = total + unwrapped(model).config.router_aux_loss_coef * out.aux_loss * weights_N.sum()
    return total
