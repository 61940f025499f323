"""The forward and the backward pass of several trainings on one frozen base, as one row without padding.

Each training computes its loss from the last hidden states of its own tokens, and hands back their gradient.

Shape letters: T tokens of the row, N tokens of one training, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from glmtuner.data.segments import Segments
from glmtuner.kernels.choose import evaluating
from glmtuner.kernels.common_beginnings import dropouts
from glmtuner.kernels.shared_lora import Draws, Seat, SharedLayers, adapters_of, shared_layers_problem
from glmtuner.models.unwrap import unwrapped
from glmtuner.training.lockstep import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-4}  # of hidden states, relative to the largest; of other dtypes HALF_TOLERANCE
HALF_TOLERANCE = 0.05
TRIED_SCALE = 0.02  # of the values that a new adapter's B, which is 0, has while the row is tried
Autocast = Callable[[], AbstractContextManager[Any]]
FORWARD, BACKWARD = "forward", "backward"  # the parts of a step, in the order in which they are ended


class Place:
    """A training's place in the joint step: its adapters, its batch, and the hidden states of its tokens, [1, N, H]."""

    def __init__(self, model: torch.nn.Module, runner: Runner, joint: "JointStep") -> None:
        self.model, self.runner, self.joint = model, runner, joint
        base = unwrapped(model)
        self.adapters = adapters_of(base)
        self.decoder: Any = base.base_model
        self.seat = Seat()
        self.batch: Mapping[str, Any] = {}
        self.states: torch.Tensor | None = None
        self.is_tried = False
        self.problem: str | None = None  # why the training computes its steps by itself

    def step(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The loss that `compute` returns after its backward pass, which ends at the hidden states and is continued with the others'."""
        if self.problem is not None:
            return compute()
        self.decoder.forward = self._forward
        try:
            loss = compute()
        finally:
            self.decoder.__dict__.pop("forward")
        if self.states is not None:
            self.runner.wait(BACKWARD)
            self.states = None
        return loss

    def hidden_alone(self) -> torch.Tensor:
        """The last hidden states of the batch by the training's own model, [1, N, H]."""
        redirected = self.decoder.__dict__.pop("forward")
        try:
            hidden: torch.Tensor = self.decoder(**self.batch).last_hidden_state
        finally:
            self.decoder.forward = redirected
        return hidden

    def _forward(self, *args: Any, **batch: Any) -> Any:
        """In place of the decoder's: its last hidden states, from the row of all trainings."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        assert not args
        self.batch = batch
        self.runner.wait(FORWARD)
        self.batch = {}
        if self.problem is not None:
            return type(self.decoder).forward(self.decoder, **batch)
        return BaseModelOutputWithPast(last_hidden_state=self.states)


class JointStep:
    """Computes the steps of trainings together, on `base`, a model tree of its own on their weights, with segment attention."""

    def __init__(self, base: "PreTrainedModel") -> None:
        self.base = base
        self.autocast: Autocast = nullcontext  # that of the trainings, which have the same precision
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.layers = SharedLayers(base)
        self.places: dict[Runner, Place] = {}
        self.hidden: torch.Tensor | None = None
        self.steps, self.tokens = 0, 0  # computed so far

    def enter(self, model: torch.nn.Module, runner: Runner) -> Place:
        """A place for a training that begins; one with a `problem` where its adapters cannot share the base's layers."""
        place = Place(model, runner, self)
        place.problem = shared_layers_problem(model) or self._dropout_problem()
        if place.problem is None:
            self.places[runner] = place
            self.layers.add(place.seat, place.adapters)
            self.base.train()
        return place

    def _dropout_problem(self) -> str | None:
        drawn = [
            (path, name) for path, module in self.base.named_modules() for name, share in dropouts(module) if share > 0
        ]
        return f"{drawn[0][0]}.{drawn[0][1]} of the base draws dropout for the whole row" if drawn else None

    def leave(self, place: Place) -> None:
        """Give up the place of a training that has ended, however it ended."""
        self.places.pop(place.runner, None)
        self.layers.remove(place.seat)
        place.states = None

    def forward(self, runners: Sequence[Runner]) -> None:
        """Compute the hidden states of all tokens, from which the trainings go on."""
        places = [self.places[runner] for runner in runners]
        if new := [place for place in places if not place.is_tried]:
            self._try(new)
        places = [place for place in places if place.problem is None]
        if not places:
            return
        for place in places:
            place.seat.draws = Draws(place.runner.state.torch, self._device_state(place))
        hidden_1TH = self._hidden(places)
        for place in places:
            place.runner.state.torch, device_state = place.seat.draws.states()
            if device_state is not None:
                place.runner.state.devices[self._device_index()] = device_state
            place.states = hidden_1TH.detach()[:, place.seat.tokens].requires_grad_()
        self.hidden = hidden_1TH
        self.steps, self.tokens = self.steps + 1, self.tokens + hidden_1TH.shape[1]

    def backward(self, runners: Sequence[Runner]) -> None:
        """Continue the backward passes into the adapters; a training that has ended meanwhile has no gradient."""
        hidden_1TH, self.hidden = self.hidden, None
        assert hidden_1TH is not None
        gradient = torch.zeros_like(hidden_1TH)
        for place in (self.places[runner] for runner in runners):
            assert place.states is not None
            if place.states.grad is not None:
                gradient[:, place.seat.tokens] = place.states.grad
        with self.layers.recomputing.backward():
            hidden_1TH.backward(gradient)

    def _hidden(self, places: Sequence[Place]) -> torch.Tensor:
        """The last hidden states of the places' batches in one row, [1, T, H]; other seats have no tokens."""
        for seat in [place.seat for place in self.places.values()]:
            seat.tokens = slice(0, 0)
        start = 0
        for place in places:
            count = place.batch["input_ids"].shape[1]
            place.seat.tokens, start = slice(start, start + count), start + count
        self.layers.recomputing.tokens = start
        with self.autocast():
            hidden: torch.Tensor = self.base.base_model(**joined([place.batch for place in places])).last_hidden_state
        return hidden

    def _try(self, places: Sequence[Place]) -> None:
        """Compare the hidden states of a row of all these places with those of each one's own model, and say why a place cannot share.

        Without dropout, and with drawn values for each B, since that of a new adapter is 0, and any adapter like any other.
        """
        kept = [
            (adapter.b_OR, adapter.b_OR.detach().clone()) for place in places for adapter in place.adapters.values()
        ]
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad(), evaluating(self.base):
                for value, _ in kept:
                    value.add_(torch.randn(value.shape, generator=generator).to(value), alpha=TRIED_SCALE)
                try:
                    together = self._hidden(places)
                except (NotImplementedError, TypeError) as error:
                    reason = " ".join(str(error).split())[:200]
                    for place in places:
                        place.problem = f"the model's code does not take the row of several trainings ({reason})"
                    return
                for place in places:
                    with evaluating(place.model), self.autocast():
                        place.problem = difference(together[:, place.seat.tokens], place.hidden_alone())
        finally:
            for value, before in kept:
                value.data.copy_(before)
            for place in places:
                place.is_tried = True

    def _device_index(self) -> int:
        return next(self.base.parameters()).device.index or 0

    def _device_state(self, place: Place) -> torch.Tensor | None:
        devices = place.runner.state.devices
        return devices[self._device_index()] if devices else None


def joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batches without padding as one: what each has, one behind the other, with the segments of all."""
    segments: list[Segments] = [batch["segments"] for batch in batches]
    if any(each.before for each in segments):
        raise NotImplementedError("segments with common beginnings")
    first = batches[0]
    whole = {
        name: torch.cat([batch[name] for batch in batches], dim=-1)
        for name in ("input_ids", "position_ids")
        if name in first
    }
    return whole | {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=first["input_ids"].device),
        "segments": Segments(
            tuple(length for each in segments for length in each.lengths),
            tuple(context for each in segments for context in each.contexts),
            tuple(length for each in segments for length in each.taught),
        ),
        "use_cache": False,
    }


def difference(together: torch.Tensor, alone: torch.Tensor) -> str | None:
    """How hidden states of one training differ in the row of several; None if by no more than rounding."""
    largest = float(alone.abs().max().float())
    found = float((together.float() - alone.float()).abs().max())
    if found <= TOLERANCE.get(alone.dtype, HALF_TOLERANCE) * max(largest, 1.0):
        return None
    return f"its hidden states in the row of several trainings would differ by {found:.3g} of {largest:.3g}"
