"""A decoding step of a batch, captured once as a CUDA graph and replayed for every further token.

A replayed step runs the same kernels on the same addresses every time. It therefore computes on whole buffers: every row
that the batch has room for, and every column, the unused ones being masked; and the column to which it writes keys and
values is given as a tensor. Before a captured step is used its logits are compared with those of the ordinary forward pass;
a model for which they differ, or that cannot be captured, is run without graphs.

Shape letters: B rows in use, R rows and C columns of a buffer, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin

from glmtuner.distributed import accelerator
from glmtuner.inference.batch import Batch

WARMUP_STEPS = 2  # runs of a step before it is captured, in which libraries choose their kernels
# Largest norm of the difference between a replayed step's logits and the ordinary ones, relative to the norm of these. In
# bfloat16 rounding alone makes some percent: 2 with 40 layers of random weights, and on an H200 the largest difference of a
# GLM-4-9B was 5 % of its largest logit.
LOGITS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03}
BFLOAT16_TOLERANCE = 0.15


def can_replay(model: Any, base: Any) -> bool:
    """Whether a step of the model may be captured: unquantized, unsharded weights, attention by torch's SDPA, no prefix.

    `base` is the causal LM inside the wrappers of `model`.
    """
    attention = (base.config._attn_implementation or "").rpartition("|")[2]
    return (
        attention == "sdpa"
        and not isinstance(model, FSDPModule)
        and not hasattr(base, "prefix_encoder")
        and getattr(base, "quantization_method", None) is None
    )


class Recorder:
    """Records steps of one model. After a step that cannot be recorded, `failure` says why."""

    def __init__(self, model: Any, accepted: Mapping[str, Any]) -> None:
        self.model, self.accepted = model, accepted
        # ChatGLM-6B computes positions from all tokens of a row
        prepare = type(model).prepare_inputs_for_generation
        self.custom_positions = prepare is not GenerationMixin.prepare_inputs_for_generation
        self.pool: Any = None  # memory that the graphs of this model share
        self.failure = ""

    @torch.no_grad()
    def record(self, batch: Batch, logits_BV: torch.Tensor) -> "Replay | None":
        """The batch's last step, whose logits were `logits_BV`, ready for replay; None where it would give other logits."""
        try:
            replay = Replay(self, batch)
            replayed_BV = replay.step(batch)
            difference = float((replayed_BV - logits_BV).norm() / logits_BV.norm())
        except Exception as error:  # a model's code may do anything that a graph does not allow
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.failure = f"a step cannot be captured ({reason[:200]})"
        else:
            if difference <= LOGITS_TOLERANCE.get(self.model.dtype, BFLOAT16_TOLERANCE):
                return replay
            self.failure = f"the logits differ by {difference:.2%}"
        for layer in batch.cache.layers:
            layer.end = batch.end  # as the ordinary step left it
        return None


class Replay:
    """One step on a batch's current buffers."""

    def __init__(self, recorder: Recorder, batch: Batch) -> None:
        self.recorder = recorder
        self.rows, self.columns = batch.buffers[0].shape[0], batch.num_columns
        device = batch.buffers[0].device
        self.ids_R1 = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self.mask_R11C = torch.zeros(self.rows, 1, 1, self.columns, dtype=torch.bool, device=device)
        self.write_column = torch.zeros(1, dtype=torch.long, device=device)
        self.position_ids = self._position_ids(batch)
        self._load(batch)
        self.run = self._capture(batch) if accelerator.supports("graphs", device) else lambda: self._forward(batch)

    def step(self, batch: Batch) -> torch.Tensor:
        """The logits after each row's last token, [B, V], float32; valid until the next step."""
        self._load(batch)
        logits_RV = self.run()
        for layer in batch.cache.layers:
            layer.end = batch.end
        return logits_RV[: len(batch.rows)]

    def _load(self, batch: Batch) -> None:
        """Copy the inputs that differ from step to step into the graph's tensors."""
        last, used = batch.end - 1, len(batch.rows)
        ids, mask = batch.buffers
        self.ids_R1.copy_(ids[:, 0, last : last + 1])
        self.mask_R11C[:, 0, 0] = mask[:, 0, : self.columns].bool()
        self.mask_R11C[..., : batch.start] = False
        # unused rows attend to one token all the same: softmax over no token at all is NaN
        self.mask_R11C[used:, ..., last] = True
        self.write_column.fill_(last)
        position_ids = self._position_ids(batch)
        if self.position_ids is not None and position_ids is not None:
            self.position_ids[:used] = position_ids[:used]

    def _position_ids(self, batch: Batch) -> torch.Tensor | None:
        """The positions of the rows' last tokens, [R, 1] or the model's own shape [R, ...]; None if it takes none."""
        if "position_ids" not in self.recorder.accepted:
            return None
        if not self.recorder.custom_positions:
            last = batch.buffers[1][:, 0, batch.start : batch.end].sum(-1, keepdim=True) - 1
            return last.clamp(min=0)
        inputs = self.recorder.model.prepare_inputs_for_generation(
            batch.ids, next_sequence_length=1, past_key_values=batch.cache, attention_mask=batch.mask,
            is_first_iteration=False, use_cache=True, position_ids=batch.mask.sum(-1, keepdim=True) - 1,
        )  # fmt: skip
        used: torch.Tensor = inputs["position_ids"]
        return torch.cat([used, used.new_zeros(self.rows - len(used), *used.shape[1:])])

    def _forward(self, batch: Batch) -> torch.Tensor:
        """The last column's logits of all rows of the buffers, [R, V], float32."""
        options: dict[str, Any] = {} if self.position_ids is None else {"position_ids": self.position_ids}
        if "logits_to_keep" in self.recorder.accepted:
            options["logits_to_keep"] = 1
        batch.write_column = self.write_column
        try:
            out = self.recorder.model(
                input_ids=self.ids_R1,
                attention_mask=self.mask_R11C,
                past_key_values=batch.cache,
                use_cache=True,
                **options,
            )
        finally:
            batch.write_column = None
        logits_RV: torch.Tensor = out.logits[:, -1].float()
        return logits_RV

    def _capture(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """A function that replays the step; its graph reuses the memory of earlier graphs, which are not replayed again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
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
