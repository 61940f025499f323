"""The peak memory of a training, estimated without weights or data: before the training starts, or by `--check`.

The model is built from config.json alone, on tensors that have shapes and no memory (torch's fake tensors), with the
fine-tuning method attached. An optimizer step, a forward and backward pass and another step are traced in the run's
precision, with its optimizer and its gradient checkpointing, and every allocation and every free is counted. The estimate
therefore holds for any method, dropout and attention, and for any architecture whose forward pass does not depend on values.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import accelerator
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.memory.checkpointing import enable_checkpointing
from glmtuner.memory.ledger import Ledger
from glmtuner.memory.meta_model import estimation_unsupported, materialize_fake, stored_nbytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments


GIB = 2**30
CUDA_CONTEXT = 0.75 * GIB  # the driver and the libraries on a GPU, besides torch's tensors; 0.74 on an H200
FRAGMENTATION = (
    0.03  # of gradients, activations and temporary memory: what torch's CUDA allocator holds between tensors
)
CUBLAS_WORKSPACE = 32 * 2**20  # torch's default on Hopper, from its allocator; smaller on older GPUs
# Bytes of glibc's heap for a byte of kept activations, and for a byte of the temporary tensors between them, which leave
# gaps. Fitted to the runs of docs/memory.md.
HEAP_KEPT, HEAP_TEMPORARY = 1.2, 3.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory of one process at the peak of a training, in bytes by part."""

    device: str  # CPU or GPU
    total_parameters: int
    trained_parameters: int
    active_parameters: str | None  # that compute a token, in words; None without experts
    parts: dict[str, int]  # name -> bytes
    rows: int  # of the batch
    longest: int  # tokens of a row
    checkpointing: bool  # gradient checkpointing

    def per_process(self, sharded_parts: Sequence[str], processes: int) -> "Estimate":
        """The estimate for one of several processes, which holds only its shard of some parts."""
        parts = {name: size // processes if name in sharded_parts else size for name, size in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    def table_rows(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        batch = f"{self.rows} rows of {self.longest:,} tokens, gradient checkpointing {'on' if self.checkpointing else 'off'}"
        return [
            ("parameters", f"{self.total_parameters:,}"),
            *([("active", self.active_parameters)] if self.active_parameters else []),
            ("trained", f"{self.trained_parameters:,}"),
            ("longest batch", batch),
            *((name, gib(size)) for name, size in self.parts.items()),
            ("peak", gib(self.peak)),
        ]

    @property
    def peak(self) -> int:
        """The bytes that the device must have."""
        return sum(self.parts.values())


def build_batch(base: "PreTrainedModel", ids: "torch.Tensor", segments: bool) -> dict[str, Any]:
    """A batch of these samples, [rows, longest], with every token labelled and no padding; in one row if `segments`."""
    import torch

    from glmtuner.data.segments import Segments
    from glmtuner.kernels.segment_attention import enable_segment_attention

    if not segments:
        return {"input_ids": ids, "labels": ids}
    enable_segment_attention(base)
    rows, longest = ids.shape
    bidirectional = hasattr(base, "places")  # assumed: half of a sample is context with bidirectional attention
    positions = torch.arange(longest, device=ids.device).repeat(rows)
    return {
        "input_ids": ids.flatten()[None],
        "labels": ids.flatten()[None],
        "position_ids": torch.stack([positions, positions])[None] if bidirectional else positions[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "segments": Segments((longest,) * rows, (longest // 2 if bidirectional else 0,) * rows, (longest,) * rows),
    }


def chunked_loss(base: "PreTrainedModel", batch: dict[str, Any], at_head: Callable[[], None]) -> "torch.Tensor":
    """The chunked loss of a batch with every token labelled; `at_head` is called before the output head.

    The model's own chunked loss selects the labelled tokens by value, and fake tensors have no values.
    """
    from glmtuner.kernels.chunked_loss import chunked_cross_entropy

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs).last_hidden_state.flatten(0, 1)
    at_head()
    head = base.get_output_embeddings()
    return chunked_cross_entropy(hidden, head, batch["labels"].flatten())[0] / len(hidden)


def hidden_state_loss(base: "PreTrainedModel", batch: dict[str, Any], at_head: Callable[[], None]) -> "torch.Tensor":
    """A loss on hidden states without logits, as that of a value head; `at_head` is called before it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden: torch.Tensor = base.base_model(**inputs).last_hidden_state
    at_head()
    return hidden.float().mean()


def estimate(
    model: "PreTrainedModel",
    arguments: "TrainingArguments",
    device: "torch.device",
    *,
    rows: int,
    longest: int,
    baseline: int,
    fast_paths: Collection[FastPath] = (),
    without_logits: bool = False,
) -> Estimate:
    """The peak of a meta model's training on batches of `rows` rows of `longest` tokens; the model is unusable afterwards.

    `baseline` are the bytes of the process before anything is loaded, which count on a CPU only. `fast_paths` are the
    optimizations that the run allows (glmtuner/kernels/choose.py), which nearly every model can use. `without_logits`: the
    loss is one of hidden states, as a reward model's. Raises ConfigError if the forward pass depends on values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from glmtuner.kernels.chunked_loss import chunked_loss_problem
    from glmtuner.kernels.fused_lora import fuse_lora
    from glmtuner.kernels.segment_attention import segment_attention_problem
    from glmtuner.models.sizes import active_summary
    from glmtuner.models.unwrap import unwrapped

    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    total_parameters, trained_parameters = sum(map(torch.numel, parameters)), sum(map(torch.numel, trained))
    active = active_summary(model)
    frozen_bytes = sum(stored_nbytes(parameter) for parameter in parameters if not parameter.requires_grad)
    trained_bytes = sum(map(stored_nbytes, trained))
    on_gpu = accelerator.has_memory(device)
    base = unwrapped(model)
    segments = FastPath.without_padding in fast_paths and segment_attention_problem(base) is None
    if FastPath.fused_lora in fast_paths:
        fuse_lora(model)
    context = "CUDA context" if device.type == "cuda" else f"context, if {device.type} has one of CUDA's size"
    if on_gpu and not accelerator.is_available("cuda"):  # another machine's or kind: traced with a CPU's operations
        device = torch.device("cpu")
    mode = FakeTensorMode()
    materialize_fake(model, mode, device)
    checkpointing = bool(arguments.activation_checkpointing)
    options: dict[str, Any] = dict(arguments.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]  # parsed, no longer a str
    offloads = checkpointing and on_gpu and bool(options.pop("offload", False))
    enable_checkpointing(model, dataclasses.replace(arguments, activation_checkpointing_kwargs=options))
    ledger = Ledger(model)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs the errors that are raised
    try:
        with mode:
            ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
            ledger.ignore_existing([*model.parameters(), *model.buffers(), ids])
            batch = build_batch(base, ids, segments)
            chunks = FastPath.chunked_loss in fast_paths and chunked_loss_problem(base) is None
            with ledger.counting():
                own_loss = hidden_state_loss if without_logits else chunked_loss if chunks else None
                compute_loss = (
                    partial(own_loss, base, batch, ledger.reached_head) if own_loss else lambda: model(**batch).loss
                )
                states = _trace_training(model, arguments, device, ledger, compute_loss)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise estimation_unsupported(error) from None
    gradients = ledger.gradients_at_peak
    transient = ledger.peak - states - gradients  # activations and temporary memory
    # where the peak is in the forward pass itself, what it holds at its end is nearly what it held then
    kept = min(max((ledger.kept_at_peak or ledger.kept) - states, 0), transient)
    temporary = transient - kept
    if offloads:  # to the host's memory, but for the block that is being computed
        kept //= base.config.get_text_config().num_hidden_layers
    overhead = {"Python and libraries": baseline}
    if on_gpu:
        temporary += CUBLAS_WORKSPACE
        overhead = {
            context: int(CUDA_CONTEXT),
            "allocator": int(FRAGMENTATION * (gradients + kept + temporary)),
        }
    else:
        on_heap = ledger.allocated_on_heap / ledger.allocated
        temporary = int(temporary * (1 + on_heap * (HEAP_TEMPORARY - 1)))
        kept = int(kept * (1 + on_heap * (HEAP_KEPT - 1)))
    return Estimate(
        device="GPU" if on_gpu else "CPU",
        total_parameters=total_parameters,
        trained_parameters=trained_parameters,
        active_parameters=active,
        parts={
            "frozen weights": frozen_bytes,
            "trained weights": trained_bytes,
            "gradients": gradients,
            "optimizer states": states,
            "activations": kept,
            "logits, loss and temporary": temporary,
            **overhead,
        },
        rows=rows,
        longest=longest,
        checkpointing=checkpointing,
    )


def _trace_training(
    model: "PreTrainedModel",
    arguments: "TrainingArguments",
    device: "torch.device",
    ledger: Ledger,
    compute_loss: "Callable[[], torch.Tensor]",
) -> int:
    """An optimizer step to create its states, then a forward and backward pass and a step; returns the states' bytes."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from transformers import Trainer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = optimizer_class(
        trained, **{name: value for name, value in options.items() if name not in ("params", "model")}
    )
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        ledger.count_gradient(parameter)
    optimizer.step()
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    if arguments.gradient_accumulation_steps == 1:
        optimizer.zero_grad(set_to_none=True)
        ledger.clear_gradients()
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if half is not None:
        model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does
    with torch.autocast(device.type, half) if half is not None else nullcontext():
        loss = compute_loss()
    loss.backward()
    optimizer.step()
    return states


def gib(size: float) -> str:
    """A number of bytes as text in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
