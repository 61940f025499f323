"""The rows of a batch as the model computes them: without padding, and without the logits of a batch, where it can.

Objectives read padded rows. A model that takes segments (glmtuner/kernels/segment_attention.py) gets their tokens as one row
without padding, and what it computes of them is put back where they are; what rows have in common at their start may be computed
once (glmtuner/kernels/common_beginnings.py). Shape letters: R rows, T tokens of the longest row, B and S
those of the batch that the model gets, H hidden size, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from glmtuner.data.segments import Segments
from glmtuner.kernels.chunked_loss import chunks_loss
from glmtuner.kernels.common_beginnings import SharedRows, shares_beginnings
from glmtuner.kernels.segment_attention import position_function, takes_segments
from glmtuner.models.unwrap import unwrapped
from glmtuner.models.value_head import last_hidden_states
from glmtuner.objectives.losses import label_entropies, label_logprobs
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What a model says of the labels of rows, and its last hidden states; of a token at its position, as the labels are."""

    logprobs_RT: torch.Tensor  # each label's log-probability, float32; 0 where there is none
    entropies_RT: torch.Tensor | None  # of the distributions that predict the labels, without a gradient
    states_BSH: torch.Tensor | None  # as the model computes them, for `Rows.unpacked`


@dataclass(frozen=True)
class Rows:
    """Rows that are padded on the right, each [R, T], and what `model` gets of them."""

    model: "PreTrainedModel"
    input_ids_RT: torch.Tensor
    attention_mask_RT: torch.Tensor

    @classmethod
    def of(cls, model: "PreTrainedModel", batch: Mapping[str, torch.Tensor]) -> "Rows":
        """The rows of a batch."""
        return cls(model, batch["input_ids"], batch["attention_mask"])

    @cached_property
    def without_padding(self) -> bool:
        """Whether the model gets the rows as segments of one."""
        return takes_segments(unwrapped(self.model))

    @cached_property
    def shared(self) -> SharedRows | None:
        """The rows with common beginnings, where the model computes these once; None where it computes whole rows."""
        base = unwrapped(self.model)
        if not self.without_padding or not shares_beginnings(base):
            return None
        rows = [ids[mask] for ids, mask in zip(self.input_ids_RT.cpu(), self.is_token_RT.cpu(), strict=True)]
        shared = SharedRows.of(rows, position_function(base))
        return shared if any(shared.starts) else None

    def places(self, *, predicted: bool = False) -> torch.Tensor:
        """Where each token's state is in the row that the model gets, or its label, [R, T], if common beginnings are computed once."""
        assert self.shared is not None
        return self.shared.places(self.input_ids_RT.shape[1], predicted=predicted).to(self.input_ids_RT.device)

    @cached_property
    def is_token_RT(self) -> torch.Tensor:
        """False on padding, [R, T]."""
        return self.attention_mask_RT.bool()

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The arguments of a forward pass, all but the labels."""
        if not self.without_padding:
            return {"input_ids": self.input_ids_RT, "attention_mask": self.attention_mask_RT}
        if self.shared is not None:
            return self.shared.inputs(self.input_ids_RT.device)
        device, places = self.input_ids_RT.device, position_function(unwrapped(self.model))
        rows, lengths = self.input_ids_RT.cpu(), self.is_token_RT.sum(1).tolist()
        positions = [places(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        return {
            "input_ids": self.input_ids_RT[self.is_token_RT][None],
            "position_ids": torch.cat([each for each, _ in positions], dim=-1)[None].to(device),
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            "segments": Segments(tuple(lengths), tuple(context for _, context in positions), ()),
        }

    def packed(self, labels_RT: torch.Tensor) -> torch.Tensor:
        """Labels of the rows' tokens as the model gets them, [B, S]; a shared token has a label if it has one in any row."""
        if self.shared is None:
            return labels_RT[self.is_token_RT][None] if self.without_padding else labels_RT
        tokens = sum(self.shared.segments.lengths)
        return labels_RT.new_full((tokens,), IGNORE_INDEX).scatter_reduce(
            0, self.places(predicted=True)[self.is_token_RT], labels_RT[self.is_token_RT], "amax"
        )[None]

    def unpacked(self, values_BS: torch.Tensor, *, predicted: bool = False) -> torch.Tensor:
        """Values of the model's tokens at their places in the rows, [R, T], 0 on what padding the model did not get.

        `predicted`: they are of labels, not of states.
        """
        if not self.without_padding:
            return values_BS
        if self.shared is not None:
            return values_BS[0][self.places(predicted=predicted)].where(self.is_token_RT, 0.0)
        return values_BS.new_zeros(self.is_token_RT.shape).masked_scatter(self.is_token_RT, values_BS[0])

    def statistics(
        self,
        labels_RT: torch.Tensor,
        call: nn.Module | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        states: bool = False,
    ) -> TokenStatistics:
        """The log-probabilities of the labels, [R, T], which are not shifted; `call` is the wrapped model, if there is one.

        The logits are divided by `temperature`. Entropies and hidden states are there if asked for.
        """
        labels_RT = F.pad(labels_RT[:, 1:], (1, 0), value=IGNORE_INDEX)  # nothing predicts a row's first token
        labels_BS = self.packed(labels_RT)
        chunked = chunks_loss(unwrapped(self.model))
        asked = {"labels": labels_BS, "logprobs": True, "temperature": temperature, "entropy": entropy}
        none: list[torch.Tensor] = []
        watching: AbstractContextManager[list[torch.Tensor]] = (
            last_hidden_states(self.model) if states else nullcontext(none)
        )
        with watching as seen:
            out = (call or self.model)(**self.inputs, **(asked if chunked else {}), use_cache=False)
        if chunked:
            logprobs_BS, entropies_BS = out.logprobs, out.entropies
        else:
            logprobs_BS = F.pad(label_logprobs(out.logits, labels_BS, temperature), (1, 0))
            entropies_BS = (
                F.pad(label_entropies(out.logits, labels_BS, temperature), (1, 0)) if entropy else logprobs_BS
            )
        logprobs_RT = self.unpacked(logprobs_BS, predicted=True)
        entropies_RT = self.unpacked(entropies_BS, predicted=True) if entropy else None
        if self.shared is not None:  # labels of another row
            is_labelled_RT = labels_RT != IGNORE_INDEX
            logprobs_RT = logprobs_RT.where(is_labelled_RT, 0.0)
            entropies_RT = entropies_RT.where(is_labelled_RT, 0.0) if entropies_RT is not None else None
        return TokenStatistics(
            logprobs_RT=logprobs_RT,
            entropies_RT=entropies_RT,
            states_BSH=seen[-1] if states else None,
        )

    def last_states(self, call: nn.Module | None = None) -> torch.Tensor:
        """The last hidden state of each row's last token, [R, H]; of the logits at most those of a batch's last tokens are computed."""
        parameters = inspect.signature(unwrapped(self.model).forward).parameters
        with last_hidden_states(self.model) as seen:
            (call or self.model)(
                **self.inputs, **({"logits_to_keep": 1} if "logits_to_keep" in parameters else {}), use_cache=False
            )
        states_BSH, lengths_R = seen[-1], self.is_token_RT.sum(1)
        if self.shared is not None:
            return states_BSH[0, self.places().gather(1, lengths_R[:, None] - 1)[:, 0]]
        if self.without_padding:
            return states_BSH[0, lengths_R.cumsum(0) - 1]
        return states_BSH[torch.arange(len(lengths_R), device=lengths_R.device), lengths_R - 1]
