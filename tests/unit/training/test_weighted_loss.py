"""Weights of labels in the loss, against sums written out token by token; in padded rows, rows without padding, and in chunks."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from glmtuner.config.paths import ASSETS
from glmtuner.data.collate import Collator
from glmtuner.data.segments import SegmentCollator
from glmtuner.kernels.chunked_loss import enable_chunked_loss
from glmtuner.kernels.segment_attention import enable_segment_attention, position_function
from glmtuner.models.unwrap import unwrapped
from glmtuner.training.measurements import means_of_parts, sample_losses
from glmtuner.training.weighted_loss import batch_weight, weighted_sum

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 20, 21, 22, 8, 30], "labels": [-100, -100, -100, 20, 21, 22, -100, 30], "weight": 1.0, "weights": [1, 1, 1, 0.5, 0.5, 0.5, 1, 3]},
    {"input_ids": [9, 10, 24], "labels": [-100, -100, 24], "weight": 2.0, "weights": None},
    {"input_ids": [11, 12, 13, 40, 41], "labels": [-100, -100, -100, 40, 41], "weight": 0.25, "weights": [1, 1, 1, 4, 2]},
]  # fmt: skip
# the record's weight times the answer's, of each learned token
WEIGHTS = [[0.5, 0.5, 0.5, 3], [2], [1, 0.5]]


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_glm", dtype=torch.float32).train()


def by_hand(model: Any, smoothing: float = 0.0) -> list[list[torch.Tensor]]:
    """The loss of every learned token of each row alone."""
    losses = []
    for row in ROWS:
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0], -1)
        learned = [(t, label) for t, label in enumerate(row["labels"]) if label != -100]
        losses.append([-(1 - smoothing) * logprobs[t - 1, i] - smoothing * logprobs[t - 1].mean() for t, i in learned])
    return losses


def summed(losses: list[list[torch.Tensor]]) -> torch.Tensor:
    pairs = [pair for row, weights in zip(losses, WEIGHTS, strict=True) for pair in zip(row, weights, strict=True)]
    return torch.stack([loss * weight for loss, weight in pairs]).sum()


def prepared(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model and the batch of all rows, in one of the forms that a run has it in."""
    model = tiny()
    collate: Any = Collator(pad_id=0)
    if "segments" in kind:
        enable_segment_attention(unwrapped(model))
        collate = SegmentCollator(positions_of=position_function(unwrapped(model)))
    if "chunks" in kind:
        enable_chunked_loss(unwrapped(model))
    # with segments, a pack of two and a row of its own
    return model, collate([ROWS[:2], ROWS[2]] if "segments" in kind else ROWS)


KINDS = ["padded", "padded, chunks", "segments", "segments, chunks"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_and_its_gradient_are_those_of_the_tokens_one_by_one(kind: str) -> None:
    model, batch = prepared(kind)
    plain = tiny()
    total, wanted = weighted_sum(model, batch, chunked="chunks" in kind, smoothing=0.0), summed(by_hand(plain))
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert batch_weight(batch).item() == sum(map(sum, WEIGHTS)) == 8
    total.backward()
    wanted.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_smoothed_labels_have_weights_too(kind: str) -> None:
    model, batch = prepared(kind)
    total = weighted_sum(model, batch, chunked="chunks" in kind, smoothing=0.1)
    assert total.item() == pytest.approx(summed(by_hand(tiny(), 0.1)).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_times_their_probability_have_weights_too(kind: str) -> None:
    model, batch = prepared(kind)
    total = weighted_sum(model, batch, chunked="chunks" in kind, smoothing=0.0, by_probability=True)
    wanted = summed([[loss * torch.exp(-loss) for loss in row] for row in by_hand(tiny())])
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_weighted_and_each_dataset_has_its_own(kind: str) -> None:
    model, batch = prepared(kind)
    model.eval()
    with torch.no_grad():
        columns = sample_losses(model, batch, chunked="chunks" in kind)
        losses = [[float(loss) for loss in row] for row in by_hand(model)]
    totals = [sum(w * x for w, x in zip(*row, strict=True)) for row in zip(WEIGHTS, losses, strict=True)]
    assert columns["loss"].tolist() == pytest.approx(totals, rel=1e-5)
    assert columns["tokens"].tolist() == [4, 1, 2] and columns["weight"].tolist() == [4.5, 2, 1.5]
    means = means_of_parts(columns, {"a": slice(0, 2), "b": slice(2, 3)}, lambda means: {"double": 2 * means["loss"]})
    wanted = {"loss": sum(totals) / 8, "a_loss": sum(totals[:2]) / 6.5, "b_loss": totals[2] / 1.5}
    assert means == pytest.approx(
        wanted | {name.replace("loss", "double"): 2 * x for name, x in wanted.items()}, rel=1e-5
    )


def test_records_of_weights_1_to_3_are_records_that_stand_there_as_often() -> None:
    rows = [{**row, "weight": weight, "weights": None} for row, weight in zip(ROWS, (1.0, 2.0, 3.0), strict=True)]
    repeated = [
        {name: row[name] for name in ("input_ids", "labels")} for row in rows for _ in range(int(row["weight"]))
    ]
    model, collate = tiny().eval(), Collator(pad_id=0)
    batch = collate(rows)
    loss = weighted_sum(model, batch, chunked=False, smoothing=0.0) / batch_weight(batch)
    assert loss.item() == pytest.approx(model(**collate(repeated)).loss.item(), rel=1e-6)
