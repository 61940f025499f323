"""Chooses the optimizations that keep a model's loss.

Each is enabled only after it gave the loss of the unoptimized model on a few samples, in float32 and as the training computes it:
what else a model's code computes is not known here, such as its own attention. Of the loss in chunks it is also checked that the
model does nothing else with its logits: a cap does not show on those of a new model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.kernels.fast_paths import NO_COMMON_BEGINNINGS, FastPath
from glmtuner.models.unwrap import unwrapped
from glmtuner.run_folder.folder import is_out_of_memory
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

SEARCHED_ROWS = 50  # rows among which the shortest are taken as samples
ANSWER_TOKENS = 64  # of the first sample's answer; the second has half as many, so that its row is padded
EXACT = 1e-4  # of a loss in float32
Collate = Callable[[Sequence[Any]], dict[str, Any]]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Optimizations:
    """The collator to use, and the optimizations that are not enabled in the model, with the reasons."""

    collate: Collate
    left_out: Mapping[FastPath, str]

    @property
    def enabled(self) -> frozenset[FastPath]:
        """The optimizations that are enabled in the model."""
        return frozenset(FastPath) - self.left_out.keys()

    @property
    def chunks_loss(self) -> bool:
        """Whether the model's loss is computed in chunks."""
        return FastPath.chunked_loss in self.enabled

    @property
    def fuses_lora(self) -> bool:
        """Whether the model's LoRA layers are fused."""
        return FastPath.fused_lora in self.enabled


def choose_optimizations(
    model: "nn.Module",
    rows: Sequence[Any],
    padded: Collate,
    *,
    autocast: Autocast = contextlib.nullcontext,
    excluded: Mapping[FastPath, str] | None = None,
    by_token: bool = False,
) -> Optimizations:
    """Enable in the model the optimizations that keep the loss of the samples `rows`; returns which these are.

    `padded` is the ordinary collator. `excluded` are not tried, for the reasons given there. `by_token`: the training's loss is one
    of the log-probabilities of tokens, so that they are compared, not a loss in chunks. An optimization is left out where
    the model's code has no place for it, where memory does not suffice for it, or where it changes the loss; any other error
    is raised.
    """
    from glmtuner.data.segments import SegmentCollator
    from glmtuner.kernels.chunked_loss import chunked_loss_problem, disable_chunked_loss, enable_chunked_loss
    from glmtuner.kernels.common_beginnings import SharedCollator, common_beginnings_problem, pair_of, share_beginnings
    from glmtuner.kernels.fused_lora import fuse_lora, unfuse_lora
    from glmtuner.kernels.segment_attention import (
        disable_segment_attention,
        enable_segment_attention,
        position_function,
        segment_attention_problem,
    )

    base = unwrapped(model)
    collate = padded
    left_out = dict(excluded or {})

    def tried(path: FastPath, attempt: Callable[[], str | None]) -> bool:
        """Whether an optimization is kept: its `attempt` returns why not, or raises."""
        try:
            problem = attempt()
        except Exception as error:
            if (problem := problem_of(error)) is None:
                error.add_note(f"raised when {path.value} were tried on two samples before step 1 (glmtuner/kernels)")
                raise
        if problem is not None:
            left_out[path] = problem
        return problem is None

    def keeps_loss(path: FastPath, collate: Collate) -> bool:
        return tried(path, lambda: losses.problem(collate))

    def possible(path: FastPath, problem: Callable[[], str | None]) -> bool:
        """Whether an optimization is to be tried; `problem` says why it cannot be."""
        if path not in left_out and (reason := problem()) is not None:
            left_out[path] = reason
        return path not in left_out

    with evaluating(model):
        losses = Losses(model, rows, padded, autocast, needed=left_out.keys() != set(FastPath), by_token=by_token)
        if possible(FastPath.without_padding, lambda: segment_attention_problem(base)):
            enable_segment_attention(base)
            segmented = SegmentCollator(positions_of=position_function(base))
            if keeps_loss(FastPath.without_padding, segmented):
                collate = segmented
            else:
                disable_segment_attention(base)
        if possible(FastPath.chunked_loss, lambda: chunked_loss_problem(base)) and tried(
            FastPath.chunked_loss, lambda: losses.problem_of_head(base, collate)
        ):
            enable_chunked_loss(base)
            if not keeps_loss(FastPath.chunked_loss, collate):
                disable_chunked_loss(base)
        no_lora = "no plain LoRA on unquantized layers"
        if possible(FastPath.fused_lora, lambda: None if fuse_lora(model) else no_lora) and not keeps_loss(
            FastPath.fused_lora, collate
        ):
            unfuse_lora(model)
        if not by_token:
            left_out.setdefault(FastPath.common_beginnings, NO_COMMON_BEGINNINGS)
        elif FastPath.without_padding in left_out:
            left_out.setdefault(FastPath.common_beginnings, left_out[FastPath.without_padding])
        if possible(FastPath.common_beginnings, lambda: common_beginnings_problem(base)):
            pair = Losses(model, pair_of(rows[0]), padded, autocast, needed=True, by_token=by_token)
            shared = SharedCollator(position_function(base))
            if tried(FastPath.common_beginnings, lambda: pair.problem(shared)):
                share_beginnings(base)
    return Optimizations(collate, left_out)


class Losses:
    """The loss of a few samples by the unoptimized model, to compare with: in float32, and as the training computes it."""

    def __init__(
        self,
        model: "nn.Module",
        rows: Sequence[Any],
        padded: Collate,
        autocast: Autocast,
        *,
        needed: bool,
        by_token: bool = False,
    ) -> None:
        self.model, self.rows, self.autocast, self.by_token = model, rows, autocast, by_token
        self.expected = loss_of(model, padded(rows), autocast) if needed else 0.0
        self.exact = self._exact(padded) if needed else None

    def problem(self, collate: Collate) -> str | None:
        """How the loss of these batches differs from the unoptimized model's; None if by no more than rounding."""
        loss = loss_of(self.model, collate(self.rows), self.autocast, by_token=self.by_token)
        if not is_same_loss(self.model, self.expected, loss, self.autocast):
            return f"the loss of two samples would be {loss:.6g} instead of {self.expected:.6g}"
        exact = self._exact(collate) if self.exact is not None else None
        if exact is not None and self.exact is not None and not abs(exact - self.exact) <= EXACT * max(self.exact, 1.0):
            return f"the loss of two samples in float32 would be {exact:.7g} instead of {self.exact:.7g}"
        return None

    def problem_of_head(self, base: "PreTrainedModel", collate: Collate) -> str | None:
        """What the model's loss is besides a cross-entropy on its head's outputs; None if nothing."""
        from glmtuner.kernels.exact import in_float32, loss_problem

        widened = self.exact is not None  # half precision hides a scale near 1
        with in_float32(self.model) if widened else self.autocast():
            return loss_problem(self.model, base, on_device_of(self.model, collate(self.rows)))

    def _exact(self, collate: Collate) -> float | None:
        """The loss in float32; None where weights cannot be widened, or are float32 already and computed with as such."""
        from glmtuner.kernels.exact import can_be_exact, in_float32, is_exact

        if not can_be_exact(self.model) or (is_exact(self.model) and self.autocast is contextlib.nullcontext):
            return None
        try:
            with in_float32(self.model):
                return loss_of(self.model, collate(self.rows), contextlib.nullcontext, by_token=self.by_token)
        except Exception as error:
            # kernels of attention for half precision only
            if is_out_of_memory(error) or "dtype" in str(error) or "fp16" in str(error):
                return None
            raise


def problem_of(error: Exception) -> str | None:
    """Why an optimization is left out after this error; None where the error is a fault of the optimization.

    What a model's code has no place for are arguments that it does not take; a shape that does not match is no such thing.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if is_out_of_memory(error):
        return f"not enough memory for it ({reason})"
    if isinstance(error, (TypeError, NotImplementedError)):
        return f"the model's code does not support it ({reason})"
    return None


def short_samples(rows: Sequence[Any], count: int = 2) -> list[Any]:
    """The `count` shortest beginnings of the first rows that have labelled tokens, of different lengths.

    They are short because the unoptimized model computes logits of all their tokens, for which whole rows may be too long.
    """
    candidates = []
    for index in range(min(len(rows), SEARCHED_ROWS)):
        row = rows[index]
        ids, labels = (
            row["input_ids"],
            row["labels"] if "labels" in row else row["input_ids"],
        )  # of prompts, the prompts
        first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), None)
        if first is not None:
            candidates.append((first, index, ids, labels))
    shortest = sorted(candidates)[:count]
    ends = [first + ANSWER_TOKENS // (1 + rank) for rank, (first, *_) in enumerate(shortest)]
    return [
        {"input_ids": ids[:end], "labels": labels[:end]}
        for end, (_, _, ids, labels) in zip(ends, shortest, strict=True)
    ]


def apply_liger(
    model: "nn.Module",
    chosen: Mapping[str, bool],
    rows: Sequence[Any],
    collate: Collate,
    autocast: Autocast = contextlib.nullcontext,
) -> None:
    """Put Liger's kernels into the model; raises ConfigError if they fail or change the loss of the samples `rows`.

    Without samples, as for objectives other than the model's own loss, nothing is compared.
    """
    from glmtuner.kernels.liger import enable_liger

    knob = "trainer.use_liger_kernel=true"
    with evaluating(model):
        losses = Losses(model, rows, collate, autocast, needed=bool(rows))
        try:
            enable_liger(unwrapped(model), chosen)
            problem = losses.problem(collate) if rows else None
        except Exception as error:  # from a compiler or a driver, too
            reason = " ".join(str(error).split())
            raise ConfigError(f"{knob}: {type(error).__name__}: {reason[:300]}; leave it out") from error
    if problem is not None:
        raise ConfigError(f"{knob}: {problem}; leave it out")


def require_shared_rows(
    model: "nn.Module", rows: Sequence[Any], whole: Collate, part: Collate, autocast: Autocast, sequence: int
) -> None:
    """Raise ConfigError where ranks that share the row of the samples `rows` do not compute the loss of one process.

    `whole` makes the row, and `part` this rank's part of it.
    """
    base = unwrapped(model)
    with evaluating(model):
        problem = _length_problem(base)
        try:
            problem = problem or Losses(model, rows, whole, autocast, needed=True).problem(part)
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            problem = f"{type(base).__name__} cannot be computed in parts ({type(error).__name__}: {reason})"
    if problem is not None:
        raise ConfigError(f"parallel.sequence={sequence}: {problem}; type parallel.sequence=1")


def _length_problem(base: "PreTrainedModel") -> str | None:
    """Which positions depend on how long a row is, of which a rank knows only its part; None without such."""
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                return f"the positions of {type(base).__name__} depend on the length of the row (rope_type={kind})"
    return None


@contextlib.contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """The model in evaluation mode, without dropout, within this context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def loss_of(model: "nn.Module", batch: Mapping[str, Any], autocast: Autocast, *, by_token: bool = False) -> float:
    """The model's loss of a batch, in nats per labelled token, as the trainer computes it.

    `by_token`: of the tokens' log-probabilities, if the model computes them in chunks.
    """
    import torch

    from glmtuner.kernels.chunked_loss import chunks_loss

    batch = on_device_of(model, batch)
    with torch.no_grad(), autocast():
        if "segments" in batch and batch["segments"].parts:
            return _loss_of_parts(model, batch)
        if not (by_token and chunks_loss(unwrapped(model))):
            return float(model(**batch).loss)
        logprobs_BT = model(**batch, logprobs=True).logprobs
        return float(-logprobs_BT.sum() / batch["labels"][:, 1:].ne(IGNORE_INDEX).sum())


def _loss_of_parts(model: "nn.Module", batch: dict[str, Any]) -> float:
    """The mean loss over the labelled tokens of a row that several ranks share, the same on all of them."""
    import torch

    from glmtuner.distributed.exchange import sum_over_row
    from glmtuner.kernels.chunked_loss import chunks_loss

    targets_BP = batch["labels"][:, 1:]
    if chunks_loss(unwrapped(model)):
        total = model(**batch, num_items_in_batch=1).loss
    else:
        logits_BPV = model(**{name: value for name, value in batch.items() if name not in ("labels", "weights")}).logits
        total = torch.nn.functional.cross_entropy(
            logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    sums = torch.stack([total.float(), targets_BP.ne(IGNORE_INDEX).sum().float()])
    total, count = sum_over_row(sums, len(batch["segments"].parts))
    return float(total / count)


def on_device_of(model: "nn.Module", batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the device of the model."""
    import torch

    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def is_same_loss(model: "nn.Module", expected: float, loss: float, autocast: Autocast) -> bool:
    """Whether two losses differ by no more than the rounding of the dtype that the model computes in."""
    import torch

    with autocast():
        half = torch.is_autocast_enabled(next(model.parameters()).device.type)
    exact = unwrapped(model).dtype == torch.float32 and not half
    return abs(loss - expected) <= (EXACT if exact else 2e-2) * max(abs(expected), 1.0)
