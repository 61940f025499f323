"""Beginnings that rows of a batch have in common, computed once.

The two answers of a ranked pair follow the same prompt, as do the answers of a group of GRPO. In a batch without padding the tokens
that a row shares with an earlier one are not repeated: its own tokens are a segment that attends to the shared ones, too, at the
positions of a row of its own. States, losses and gradients of causal attention are thus those of whole rows (the tree attention of
SpecInfer, Miao et al. 2023, arXiv:2305.09781, for training).

Shape letters: R rows, T tokens of the longest row, S tokens that the model gets, L tokens of one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glmtuner.data.segments import Segments, causal_positions
from glmtuner.models.mixing_layers import is_recurrent
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glmtuner.data.segments import Positions

SHORTEST = 16  # tokens; gathering the keys of fewer costs more than computing them again
ENABLED = "common_beginnings"


def common_beginnings_problem(model: "PreTrainedModel") -> str | None:
    """Why beginnings cannot be computed once; None where every layer mixes tokens by attention."""
    return "recurrent layers carry a state through each row" if is_recurrent(model) else None


def share_beginnings(model: "PreTrainedModel") -> None:
    """Let objectives compute common beginnings of rows once, where batches have no padding."""
    model.__dict__[ENABLED] = True


def shares_beginnings(model: "PreTrainedModel") -> bool:
    """Whether `share_beginnings` is in effect, and the model draws no dropout, which is each row's own."""
    return ENABLED in model.__dict__ and not (model.training and has_dropout(model))


def keep_beginnings(model: "PreTrainedModel") -> None:
    """Undo `share_beginnings`."""
    model.__dict__.pop(ENABLED, None)


def has_dropout(model: nn.Module) -> bool:
    """Whether a training pass draws dropout."""
    return any(value > 0 for module in model.modules() for _, value in dropouts(module))


def dropouts(module: nn.Module) -> list[tuple[str, float]]:
    """The attributes of a module that are probabilities of dropout: of `nn.Dropout`, or of functions such as attention."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [("p", module.p)]
    return [(name, value) for name, value in vars(module).items() if isinstance(value, float) and "drop" in name]


@dataclass(frozen=True)
class SharedRows:
    """Rows of token ids, each [L], of which common beginnings are computed once.

    `starts` are the first own token of each row, 0 where nothing is shared, and `owners` the row that has the ones before.
    """

    rows: Sequence[torch.Tensor]
    starts: tuple[int, ...]
    owners: tuple[int, ...]
    positions: tuple[torch.Tensor, ...]  # of each row's tokens, [..., L]
    contexts: tuple[int, ...]

    @classmethod
    def of(
        cls, rows: Sequence[torch.Tensor], positions_of: "Positions" = causal_positions, shortest: int | None = None
    ) -> "SharedRows":
        """Find what rows have in common with an earlier one, at least `shortest` tokens (SHORTEST if None).

        A row's own tokens begin with the last common one, so that what follows it is predicted from the row's own states.
        """
        shortest = SHORTEST if shortest is None else shortest
        found = [positions_of(row) for row in rows]
        positions, contexts = tuple(each for each, _ in found), tuple(context for _, context in found)
        owners_by_beginning: dict[tuple[int, ...], list[int]] = {}
        starts, owners = [], []
        for index, row in enumerate(rows):
            candidates = owners_by_beginning.setdefault(tuple(row[:shortest].tolist()), [])
            best, best_owner = 0, index
            for owner in candidates:
                start = common_length(rows[owner], row) - 1
                same_places = contexts[owner] == contexts[index] and torch.equal(
                    positions[owner][..., :start], positions[index][..., :start]
                )
                # tokens that attend in both directions see all of them
                if start > best and start >= max(shortest, contexts[index]) and same_places:
                    best, best_owner = start, owner
            if not best:
                candidates.append(index)
            starts.append(best)
            owners.append(best_owner)
        return cls(rows, tuple(starts), tuple(owners), positions, contexts)

    @cached_property
    def segments(self) -> Segments:
        """The rows' own tokens as the segments of one row."""
        begins = self.begins
        return Segments(
            tuple(len(row) - start for row, start in zip(self.rows, self.starts, strict=True)),
            self.contexts,
            (),
            tuple((begins[owner], start) for owner, start in zip(self.owners, self.starts, strict=True)),
        )

    @cached_property
    def begins(self) -> list[int]:
        """Where each row's own tokens begin in the one row."""
        places, place = [], 0
        for row, start in zip(self.rows, self.starts, strict=True):
            places.append(place)
            place += len(row) - start
        return places

    def own(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of the rows' tokens, each [..., L], at the own ones, [..., S]."""
        return torch.cat([each[..., start:] for each, start in zip(values, self.starts, strict=True)], dim=-1)

    def places(self, width: int, *, predicted: bool = False) -> torch.Tensor:
        """Where the state of each token is in the one row, [R, width], or, if `predicted`, what is predicted of it; 0 on padding.

        They differ on a row's first own token, which the last token before it predicts, in the row that has both.
        """
        places_RT = torch.zeros(len(self.rows), width, dtype=torch.long)
        for index, (row, start, owner) in enumerate(zip(self.rows, self.starts, self.owners, strict=True)):
            places_RT[index, : len(row)] = self.begins[index] - start + torch.arange(len(row))
            common = start + 1 if start and predicted else start
            places_RT[index, :common] = self.begins[owner] + torch.arange(common)
        return places_RT

    def inputs(self, device: "torch.device | str") -> dict[str, Any]:
        """The arguments of a forward pass, all but the labels."""
        return {
            "input_ids": self.own(self.rows)[None].to(device),
            "position_ids": self.own(self.positions)[None].to(device),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "segments": self.segments,
        }


@dataclass(frozen=True)
class SharedCollator:
    """Batches whose rows have common beginnings, to compare their loss with that of whole rows; labels are not shared."""

    positions_of: "Positions" = causal_positions

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a forward pass, labels included, [1, S]."""
        shared = SharedRows.of([torch.tensor(row["input_ids"]) for row in rows], self.positions_of, shortest=1)
        labels = [torch.tensor(row["labels"]) for row in rows]
        for each, start in zip(labels, shared.starts, strict=True):
            each[start] = IGNORE_INDEX  # nothing predicts a segment's first token
        return {**shared.inputs("cpu"), "labels": shared.own(labels)[None]}


def pair_of(sample: Any) -> list[dict[str, list[int]]]:
    """A sample and one with the same prompt and its answer's tokens in another order, labelled from where they differ."""
    ids, labels = list(sample["input_ids"]), list(sample["labels"])
    first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids) - 1)
    prompt, answer = ids[:first], ids[first:]
    other = answer[::-1] if answer[::-1] != answer else answer + answer
    rows = [prompt + answer, prompt + other]
    start = common_length(torch.tensor(rows[0]), torch.tensor(rows[1]))
    return [{"input_ids": row, "labels": [IGNORE_INDEX] * start + row[start:]} for row in rows]


def common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """The number of tokens with which both begin."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
