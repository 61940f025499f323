"""A step of a batch of answers recorded once, as a CUDA graph, and replayed for every further token.

The kernels of a replayed step are the same every time and so are the addresses that they read and write. So it computes on
whole buffers: every row that the batch has room for, and every column, those that hold nothing hidden by the mask; and its
keys and values go to a column that is itself a tensor. What a recorded step gives is compared with the step computed the
plain way before it is used, and a model for which it differs, or that cannot be recorded, goes on without.

Shape letters: B rows in use, R rows and C columns of a buffer, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin

from glmtuner.inference.batch import Batch

WARM_UPS = 2  # runs of a step before it is recorded, in which libraries choose their kernels
# The norm of the difference between a replayed step's logits and the plain one's, as a share of their norm. In bfloat16 the
# rounding alone is some percent of it: 2 on 40 layers of random weights, and on an H200 the largest difference of a GLM-4-9B
# was 5 % of its largest logit.
DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03}
IN_BFLOAT16 = 0.15


def can_replay(model: Any, base: Any) -> bool:
    """Whether a step of the model may be recorded: weights as they are, attention by torch's own function."""
    attention = (base.config._attn_implementation or "").rpartition("|")[2]
    return (
        attention == "sdpa"
        and not isinstance(model, FSDPModule)
        and not hasattr(base, "prefix_encoder")
        and getattr(base, "quantization_method", None) is None
    )


class Recorder:
    """Records steps of one model; after one that cannot be, `refused` says why and it records no more."""

    def __init__(self, model: Any, accepted: Mapping[str, Any]) -> None:
        self.model, self.accepted = model, accepted
        # ChatGLM-6B's positions follow from all of a row's tokens
        own = type(model).prepare_inputs_for_generation
        self.counts_itself = own is not GenerationMixin.prepare_inputs_for_generation
        self.pool: Any = None
        self.refused = ""

    @torch.no_grad()
    def recorded(self, batch: Batch, logits_BV: torch.Tensor) -> "Replay | None":
        """The step that the batch has just done and all further ones on its buffers; None where it would give other logits."""
        try:
            replay = Replay(self, batch)
            found_BV = replay.step(batch)
            off = float((found_BV - logits_BV).norm() / logits_BV.norm())
        except Exception as error:  # whatever a model's code does that a graph has no room for
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self.refused = f"a step cannot be recorded ({told[:200]})"
        else:
            if off <= DIFFERENCE.get(self.model.dtype, IN_BFLOAT16):
                return replay
            self.refused = f"the logits would be off by {off:.2%}"
        for layer in batch.cache.layers:
            layer.end = batch.end  # as the plain step left it
        return None


class Replay:
    """One step on a batch's buffers, as they are until they are made anew."""

    def __init__(self, recorder: Recorder, batch: Batch) -> None:
        self.recorder = recorder
        self.rows, self.columns = batch.buffers[0].shape[0], batch.columns
        device = batch.buffers[0].device
        self.ids_R1 = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self.mask_R11C = torch.zeros(self.rows, 1, 1, self.columns, dtype=torch.bool, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = self._positions(batch)
        self._load(batch)
        self.run = self._graph(batch) if device.type == "cuda" else lambda: self._forward(batch)

    def step(self, batch: Batch) -> torch.Tensor:
        """The logits behind each row's last token, [B, V]; they are there until the next step."""
        self._load(batch)
        logits_RV = self.run()
        for layer in batch.cache.layers:
            layer.end = batch.end
        return logits_RV[: len(batch.rows)]

    def _load(self, batch: Batch) -> None:
        """Put in place what differs from step to step."""
        last, used = batch.end - 1, len(batch.rows)
        ids, mask = batch.buffers
        self.ids_R1.copy_(ids[:, 0, last : last + 1])
        self.mask_R11C[:, 0, 0] = mask[:, 0, : self.columns].bool()
        self.mask_R11C[..., : batch.start] = False
        # rows without a token see one all the same: attention to nothing at all is no number
        self.mask_R11C[used:, ..., last] = True
        self.column.fill_(last)
        if self.positions is not None:
            self.positions[:used] = self._positions(batch)[:used]

    def _positions(self, batch: Batch) -> torch.Tensor | None:
        """The positions of the rows' last tokens, [R, 1] or what else the model counts; None where it takes none."""
        if "position_ids" not in self.recorder.accepted:
            return None
        if not self.recorder.counts_itself:
            counted = batch.buffers[1][:, 0, batch.start : batch.end].sum(-1, keepdim=True) - 1
            return counted.clamp(min=0)
        inputs = self.recorder.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=1, past_key_values=batch.cache, attention_mask=batch.mask,
            is_first_iteration=False, use_cache=True, position_ids=batch.mask.sum(-1, keepdim=True) - 1,
        )  # fmt: skip
        found = inputs["position_ids"]
        return torch.cat([found, found.new_zeros(self.rows - len(found), *found.shape[1:])])

    def _forward(self, batch: Batch) -> torch.Tensor:
        options: dict[str, Any] = {} if self.positions is None else {"position_ids": self.positions}
        if "logits_to_keep" in self.recorder.accepted:
            options["logits_to_keep"] = 1
        batch.column = self.column
        try:
            out = self.recorder.model(
                input_ids=self.ids_R1,
                attention_mask=self.mask_R11C,
                past_key_values=batch.cache,
                use_cache=True,
                **options,
            )
        finally:
            batch.column = None
        return out.logits[:, -1].float()

    def _graph(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """What replays the step; the memory of a graph before this one, which is not replayed again, is used once more."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.recorder.pool, capture_error_mode="thread_local"):
            logits_RV = self._forward(batch)
        self.recorder.pool = graph.pool()

        def run() -> torch.Tensor:
            graph.replay()
            return logits_RV

        return run
