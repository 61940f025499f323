"""How much memory a training will take, found out without weights or data: before it starts, or by `--check`.

The model is built from config.json alone, on tensors that have shapes and no memory (torch's fake tensors). The fine-tuning
method is attached to it, and one optimizer step and one forward and backward pass are gone through, in the run's precision,
with its optimizer and its gradient checkpointing; what every operation allocates and what is freed is counted. So it holds
for any architecture whose forward pass does not depend on the values it meets (routing to experts does), for any method,
dropout and attention.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from glmtuner.memory.ledger import Ledger
from glmtuner.memory.meta_model import estimation_unsupported, materialize_fake, stored_nbytes

if TYPE_CHECKING:
    import torch
    from torch import nn


GIB = 2**30
CUDA_CONTEXT = 0.75 * GIB  # what the driver and the libraries take of a GPU beside torch's tensors; 0.74 on an H200
HOLES = 0.03  # of what comes and goes: what torch's allocator holds of a GPU between tensors
CUBLAS_WORKSPACE = 32 * 2**20  # of torch's on Hopper, taken from its allocator; smaller on older cards
# What glibc's heap takes for a byte of activations that are kept, and of what comes and goes between them and leaves holes;
# and what data, tokenizer and the checks before the first step leave behind. Chosen on the runs of docs/memory.md.
HEAP_KEPT, HEAP_REST = 1.2, 3.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training holds at its peak, in bytes by part, on one process."""

    device: str  # CPU or GPU
    total_parameters: int
    trained_parameters: int
    parts: dict[str, int]
    rows: int
    longest: int  # tokens of a row
    checkpointing: bool

    def shared(self, shares: Sequence[str], processes: int) -> "Estimate":
        """What one of several processes holds, which keeps its share only of some parts."""
        parts = {name: size // processes if name in shares else size for name, size in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    def told(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        batch = f"{self.rows} rows of {self.longest:,} tokens, gradient checkpointing {'on' if self.checkpointing else 'off'}"
        return [
            ("parameters", f"{self.total_parameters:,}"),
            ("trained", f"{self.trained_parameters:,}"),
            ("longest batch", batch),
            *((name, gib(size)) for name, size in self.parts.items()),
            ("peak", gib(self.peak)),
        ]

    @property
    def peak(self) -> int:
        """What the device must have."""
        return sum(self.parts.values())


def batch_of(base: "nn.Module", ids: "torch.Tensor", segments: bool) -> dict[str, Any]:
    """A batch of these samples, [rows, longest], all of whose tokens are learned: padded ones have no padding here."""
    import torch

    from glmtuner.data.segments import Segments
    from glmtuner.kernels.segment_attention import enable_segment_attention

    if not segments:
        return {"input_ids": ids, "labels": ids}
    enable_segment_attention(base)
    rows, longest = ids.shape
    two_way = hasattr(base, "places")  # half of a sample is taken for context that sees itself
    positions = torch.arange(longest, device=ids.device).repeat(rows)
    return {
        "input_ids": ids.flatten()[None],
        "labels": ids.flatten()[None],
        "position_ids": torch.stack([positions, positions])[None] if two_way else positions[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
        "segments": Segments((longest,) * rows, (longest // 2 if two_way else 0,) * rows, (longest,) * rows),
    }


def loss_in_chunks(base: "nn.Module", batch: dict[str, Any], at_head: Callable[[], None]) -> "torch.Tensor":
    """What a model prepared by `use_chunks` computes where every token is learned; which ones are cannot be looked up here."""
    from glmtuner.kernels.chunked_loss import chunked_cross_entropy

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs).last_hidden_state.flatten(0, 1)
    at_head()
    return chunked_cross_entropy(hidden, base.get_output_embeddings(), batch["labels"].flatten())[0] / len(hidden)


def loss_of_states(base: "nn.Module", batch: dict[str, Any], at_head: Callable[[], None]) -> "torch.Tensor":
    """A loss that reads the hidden states alone, as a value head does."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs).last_hidden_state
    at_head()
    return hidden.float().mean()


def estimate(
    model: "nn.Module",
    arguments: Any,
    device: "torch.device",
    *,
    rows: int,
    longest: int,
    baseline: int,
    without_padding: bool = False,
    on_weights: bool = False,
    scores: bool = False,
) -> Estimate:
    """Of a `hollow` model, which is used up: the peak of its training on batches of `rows` rows of `longest` tokens.

    `arguments` are transformers' TrainingArguments; `baseline` is what the process holds before anything is loaded, which
    counts on a CPU only; two flags are those of `fast_paths`, which takes what they allow for nearly every model, and
    `scores` says that the loss is one of hidden states, a reward model's, which makes no logits. Raises ConfigError where the
    model's forward pass cannot be gone through without values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from glmtuner.kernels.chunked_loss import supports_chunked_loss
    from glmtuner.kernels.fused_lora import fuse_lora
    from glmtuner.kernels.segment_attention import supports_segment_attention
    from glmtuner.models.unwrap import unwrapped

    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counts = (sum(map(torch.numel, parameters)), sum(map(torch.numel, trained)))
    weights = sum(stored_nbytes(parameter) for parameter in parameters if not parameter.requires_grad)
    copies = sum(map(stored_nbytes, trained))
    on_gpu = device.type == "cuda"
    base = unwrapped(model)
    segments = without_padding and supports_segment_attention(base)
    if on_weights:
        fuse_lora(model)
    if on_gpu and not torch.cuda.is_available():  # a GPU elsewhere: the operations of this machine's CPU stand for it
        device = torch.device("cpu")
    mode = FakeTensorMode()
    materialize_fake(model, mode, device)
    checkpointing = bool(arguments.activation_checkpointing)
    if checkpointing:
        model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs or None)
    ledger = Ledger(model)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it tells errors a second time
    try:
        with mode:
            ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
            ledger.ignore_existing([*model.parameters(), *model.buffers(), ids])
            batch = batch_of(base, ids, segments)
            chunks = on_weights and supports_chunked_loss(base)
            with ledger.open():
                way = loss_of_states if scores else loss_in_chunks if chunks else None
                loss_of = partial(way, base, batch, ledger.reached_head) if way else lambda: model(**batch).loss
                states = _pass(model, arguments, device, ledger, loss_of)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise estimation_unsupported(error) from None
    gradients, kept = ledger.at_peak
    rest = ledger.most - states - gradients
    kept = min(max(kept - states, 0), rest)
    own = {"Python and libraries": baseline}
    if on_gpu:
        rest += CUBLAS_WORKSPACE
        own = {"CUDA context": int(CUDA_CONTEXT), "allocator": int(HOLES * (gradients + rest))}
    else:
        on_heap = ledger.made_on_heap / ledger.made
        coming = int((rest - kept) * (1 + on_heap * (HEAP_REST - 1)))
        kept = int(kept * (1 + on_heap * (HEAP_KEPT - 1)))
        rest = kept + coming
    return Estimate(
        device="GPU" if on_gpu else "CPU",
        total_parameters=counts[0],
        trained_parameters=counts[1],
        parts={
            "frozen weights": weights,
            "trained weights": copies,
            "gradients": gradients,
            "optimizer states": states,
            "activations": kept,
            "logits, loss and temporary": rest - kept,
            **own,
        },
        rows=rows,
        longest=longest,
        checkpointing=checkpointing,
    )


def _pass(
    model: "nn.Module",
    arguments: Any,
    device: "torch.device",
    ledger: Ledger,
    loss_of: "Callable[[], torch.Tensor]",
) -> int:
    """An optimizer step, so that its states are there, then a forward and backward pass and a step; the states' bytes."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from transformers import Trainer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = kind(trained, **{name: value for name, value in options.items() if name not in ("params", "model")})
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        ledger._gradient(parameter)
    optimizer.step()
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    if arguments.gradient_accumulation_steps == 1:
        optimizer.zero_grad(set_to_none=True)
        ledger.gradients, ledger._with_gradient = 0, set()
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    if half is not None:
        model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does
    with torch.autocast(device.type, half) if half is not None else nullcontext():
        loss = loss_of()
    loss.backward()
    optimizer.step()
    return states


def gib(size: float) -> str:
    """A size in GiB; small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
