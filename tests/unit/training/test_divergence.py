"""A training that diverged ends with an error, before its numbers reach a file."""

import pytest
import torch

from glmtuner.errors import TrainingError
from glmtuner.training.divergence import (
    require_finite,
    require_finite_evaluation,
    require_finite_weights,
    require_steps,
)


class Args:
    learning_rate, max_grad_norm = 0.5, 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_number_that_is_not_finite_is_an_error_with_its_step(value):
    assert require_finite("loss", torch.tensor(2.5), 7, Args).item() == 2.5
    with pytest.raises(TrainingError) as raised:
        require_finite("gradient norm", torch.tensor(value), 7, Args)
    for fact in ("gradient norm", str(value), "step 8", "trainer.learning_rate=0.5", "trainer.max_grad_norm=0"):
        assert fact in str(raised.value)


def test_weights_that_are_not_finite_are_never_saved():
    trained, frozen = (
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.full((2,), torch.nan), requires_grad=False),
    )
    require_finite_weights([trained, frozen], Args)
    trained.data[1] = torch.inf
    with pytest.raises(TrainingError, match=r"trainer\.learning_rate=0\.5"):
        require_finite_weights([trained, frozen], Args)


def test_steps_that_were_all_skipped_are_an_error():
    require_steps(taken=1, trained=4)
    require_steps(taken=0, trained=0)
    with pytest.raises(TrainingError, match=r"trainer\.bf16=true"):
        require_steps(taken=0, trained=4)


def test_an_evaluation_has_a_finite_loss_of_every_record():
    losses = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    require_finite_evaluation(losses[:1], 7, Args)
    with pytest.raises(TrainingError, match=r"of 2 of 4 evaluation records .* after step 7: .*learning_rate=0\.5"):
        require_finite_evaluation(losses, 7, Args)
    with pytest.raises(TrainingError, match=r"the model overflows; type .*model\.dtype=float32") as raised:
        require_finite_evaluation(losses, 0, Args)
    assert "learning_rate" not in str(raised.value)
