"""What keeps a training out of the joint step."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from glmtuner.data.segments import Segments
from glmtuner.models.twins import twin_of
from glmtuner.training.joint_step import JointStep, difference, joined


class Decoder(nn.Module):
    """A decoder of one layer, in the place of a causal language model."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(dropout)

    @property
    def base_model(self) -> nn.Module:
        return self


def entered(dropout: float, **settings: object) -> str | None:
    base = Decoder(dropout)
    model = get_peft_model(twin_of(base), LoraConfig(r=2, target_modules=["layer"], **settings))
    return JointStep(twin_of(base)).enter(model, runner=None).problem


def test_the_bases_dropout_and_more_than_lora_are_named():
    assert entered(0.0) is None
    assert entered(0.1) == "dropout.p of the base draws dropout for the whole row"
    assert "more than a plain LoRA" in entered(0.0, use_dora=True)


def test_batches_join_with_their_segments():
    def batch(lengths: tuple[int, ...], first: int) -> dict[str, object]:
        count = sum(lengths)
        return {
            "input_ids": torch.arange(first, first + count)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "attention_mask": torch.ones(1, count),
            "segments": Segments(lengths, (0,) * len(lengths), lengths),
        }

    whole = joined([batch((2, 3), 0), batch((4,), 5)])
    assert whole["input_ids"].tolist() == [[*range(9)]]
    assert whole["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3]]
    assert whole["segments"] == Segments((2, 3, 4), (0, 0, 0), (2, 3, 4)) and whole["attention_mask"].shape == (
        1,
        1,
        1,
        1,
    )


def test_states_that_differ_by_more_than_rounding_are_told():
    alone = torch.tensor([[[100.0, 1.0]]])
    assert difference(alone + 0.005, alone) is None
    assert "would differ by 0.02 of 100" in difference(alone + torch.tensor([0.02, 0.0]), alone)
    assert difference(alone.bfloat16() + 2, alone.bfloat16()) is None
    assert difference(alone * torch.nan, alone) is not None
