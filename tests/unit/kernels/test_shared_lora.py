"""Layers under several adapters against PEFT's own layer, one adapter at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from glmtuner.kernels.shared_lora import Draws, Seat, SharedLayers, adapters_of, shared_layers_problem
from glmtuner.models.twins import twin_of

LENGTHS = (3, 5, 2)
ADAPTERS = (
    {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["first"]},
    {"r": 3, "lora_alpha": 8, "lora_dropout": 0.4, "target_modules": ["first", "second"], "use_rslora": True},
    {"r": 4, "lora_alpha": 1, "lora_dropout": 0.1, "target_modules": ["second"]},
)


class Net(nn.Module):
    """Two layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(x)))


class Halved(nn.Linear):
    """Stands for a layer whose product is its own, such as a quantized one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def trainings(base: Net) -> list[nn.Module]:
    """PEFT's model of each adapter on a tree of its own, with a B that is not 0."""
    models = []
    for number, settings in enumerate(ADAPTERS):
        torch.manual_seed(number)
        models.append(get_peft_model(twin_of(base), LoraConfig(**settings)))
        for name, value in models[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(value)
    return models


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    for value in model.parameters():
        value.grad = None
    return found


@pytest.mark.parametrize("kind", [nn.Linear, Halved])
def test_each_adapter_gives_and_gets_what_it_does_alone(kind):
    torch.manual_seed(0)
    base = Net()
    base.first = kind(6, 10)
    models = trainings(base)
    inputs = [torch.randn(1, length, 6) for length in LENGTHS]
    weights = [torch.randn(1, length, 4) for length in LENGTHS]
    alone = []
    for number, (model, x, weight) in enumerate(zip(models, inputs, weights, strict=True)):
        torch.manual_seed(100 + number)
        x = x.clone().requires_grad_()
        out = model(x)
        (out * weight).sum().backward()
        alone.append((out.detach(), x.grad, gradients(model), torch.get_rng_state()))

    layers = SharedLayers(twin_of(base))
    seats = []
    for number, model in enumerate(models):
        assert shared_layers_problem(model) is None
        seat = Seat()
        layers.add(seat, adapters_of(model.get_base_model()))
        torch.manual_seed(100 + number)
        seat.draws = Draws(torch.get_rng_state())
        seats.append(seat)
    start = 0
    for seat, length in zip(seats, LENGTHS, strict=True):
        seat.tokens, start = slice(start, start + length), start + length
    layers.recomputing.tokens = start
    x = torch.cat(inputs, dim=1).requires_grad_()
    out = layers.base.train()(x)
    (out * torch.cat(weights, dim=1)).sum().backward()
    for seat, model, (expected, x_grad, expected_gradients, state) in zip(seats, models, alone, strict=True):
        torch.testing.assert_close(out[:, seat.tokens], expected)
        torch.testing.assert_close(x.grad[:, seat.tokens], x_grad)
        found = gradients(model)
        assert found.keys() == expected_gradients.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected_gradients[name])
        assert torch.equal(seat.draws.states()[0], state)  # the next draw is that of a run of its own

    layers.remove(seats[1])
    seats[1].tokens = slice(0, 0)
    seats[0].tokens, seats[2].tokens = slice(0, 3), slice(3, 5)
    layers.recomputing.tokens = 5
    out = layers.base.eval()(torch.cat([inputs[0], inputs[2]], dim=1))
    torch.testing.assert_close(out, torch.cat([models[0].eval()(inputs[0]), models[2].eval()(inputs[2])], dim=1))


def test_a_layer_that_is_computed_again_drops_the_same_inputs():
    base = Net()
    model = trainings(base)[1]
    layers = SharedLayers(twin_of(base))
    seat = Seat(tokens=slice(0, 5))
    layers.add(seat, adapters_of(model.get_base_model()))
    layers.recomputing.tokens, layers.recomputing.keeps_states = 5, True
    x = torch.randn(1, 5, 6)
    first = layers.base(x)
    state = seat.draws.states()[0]
    with layers.recomputing.backward():
        assert torch.equal(layers.base(x), first)
    assert torch.equal(seat.draws.states()[0], state)
    assert not torch.equal(layers.base(x), first)


def test_nan_of_one_training_stays_its_own():
    base = Net()
    models = trainings(base)[:2]
    layers = SharedLayers(twin_of(base))
    seats = [Seat(tokens=slice(0, 3)), Seat(tokens=slice(3, 8))]
    for seat, model in zip(seats, models, strict=True):
        layers.add(seat, adapters_of(model.get_base_model()))
    layers.recomputing.tokens = 8
    with torch.no_grad():
        next(value for name, value in models[0].named_parameters() if "lora_B" in name).fill_(torch.nan)
    out = layers.base(torch.randn(1, 8, 6))
    assert out[:, :3].isnan().all() and out[:, 3:].isfinite().all()
    weight = torch.ones_like(out)
    weight[:, :3] = 0  # the training has ended
    out.backward(weight)
    assert all(value.isfinite().all() for value in gradients(models[1]).values())


def test_tokens_that_a_layer_does_not_get_in_order_are_refused():
    base = Net()
    layers = SharedLayers(twin_of(base))
    layers.add(Seat(), adapters_of(trainings(base)[0].get_base_model()))
    layers.recomputing.tokens = 8
    with pytest.raises(NotImplementedError, match="other tokens than those of the row"):
        layers.base(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "more than a plain LoRA"),
        ({"lora_bias": True}, "more than a plain LoRA"),
        ({"bias": "all"}, "is trained beside the LoRA"),
        ({"modules_to_save": ["second"]}, "is trained beside the LoRA"),
    ],
)
def test_more_than_plain_lora_is_named(settings, problem):
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"], **settings))
    assert problem in shared_layers_problem(model)


def test_a_twin_has_modules_of_its_own_and_the_same_weights():
    base = Net()
    base.tied = base.first
    twin = twin_of(base)
    assert twin.first is not base.first and twin.tied is twin.first
    assert all(value is other for value, other in zip(twin.parameters(), base.parameters(), strict=True))
    twin.first = nn.Identity()
    assert isinstance(base.first, nn.Linear)
