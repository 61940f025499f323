"""How much memory a training will take, found out without weights or data: before it starts, or by `--check`.

The model is built from config.json alone, on tensors that have shapes and no memory (torch's fake tensors). The fine-tuning
method is attached to it, and one optimizer step and one forward and backward pass are gone through, in the run's precision,
with its optimizer and its gradient checkpointing; what every operation allocates and what is freed is counted. So it holds
for any architecture whose forward pass does not depend on the values it meets (routing to experts does), for any method,
dropout and attention.
"""

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run
from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from glmtuner.families.family import Family

GIB = 2**30
MARGIN = 0.15  # how far from the measured peak an estimate may lie
CUDA_CONTEXT = 0.75 * GIB  # what the driver and the libraries take of a GPU beside torch's tensors; 0.74 on an H200
HOLES = 0.03  # of what comes and goes: what torch's allocator holds of a GPU between tensors
CUBLAS_WORKSPACE = 32 * 2**20  # of torch's on Hopper, taken from its allocator; smaller on older cards
# What glibc's heap takes for a byte of activations that are kept, and of what comes and goes between them and leaves holes;
# and what data, tokenizer and the checks before the first step leave behind. Chosen on the runs of docs/memory.md.
HEAP_KEPT, HEAP_REST = 1.2, 3.0
LEFT_BEHIND = 40 * 2**20
MAPPED = 2**25  # bytes of a tensor from which on glibc has it from the system, and gives it back when it goes
LIBRARIES = ("datasets", "peft", "sentencepiece", "glmtuner.trainer", "glmtuner.models", "bitsandbytes", "rich.table")
OF_TRACKERS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
ABSMAX_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit storage


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


def cannot_be_followed(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    return ConfigError(
        f"the memory of this model cannot be estimated: its forward pass cannot be gone through without values "
        f"({type(error).__name__}: {reason}); start the run with trainer.max_steps=2 and read peak_memory_gib in metrics.json"
    )


# -- the model without weights -------------------------------------------------------------------------------------------


def hollow(run: Run, family: "Family | None", device: "torch.device", compute_dtype: "torch.dtype") -> "nn.Module":
    """The model as it will be trained, its method attached, on the meta device: shapes and dtypes without values."""
    import torch
    from transformers import AutoModelForCausalLM

    from glmtuner.families.family import family_from_structure
    from glmtuner.finetuning.start import base_folder, checkpoints_of, continued, settings_of
    from glmtuner.models.load import dtype_of, load_config

    finetuning = copy.copy(
        run.finetuning
    )  # what is settled here is settled again, and told, when the run itself is put together
    checkpoints = checkpoints_of(run.model)
    whole = base_folder(checkpoints)
    source = dataclasses.replace(run.model, model_name_or_path=str(whole), config_name=None) if whole else run.model
    config = load_config(source, family)
    dtype = dtype_of(source, config, device)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if run.quant.bits:
            quantize(model, run.quant.bits, compute_dtype)
        if family is None:
            family = family_from_structure(model)
            finetuning.settle(family, len(family.blocks(model)))
        goes_on = continued(checkpoints, finetuning, run.model.resume_lora_training, run.trainer.do_train)
        if goes_on is not None:
            for name, value in settings_of(goes_on).items():
                setattr(finetuning, name, value)
        model = finetuning.attach(model, family)
    model.config.use_cache = False
    return model.train()


def quantize(model: "nn.Module", bits: int, compute_dtype: "torch.dtype") -> None:
    """Put a stand-in, with the memory that bitsandbytes' has, in the place of every linear layer that is quantized."""
    import torch
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    class Product(torch.autograd.Function):
        """x W^T where W is made for the product and thrown away, and nothing is kept."""

        @staticmethod
        def forward(ctx: Any, x: "torch.Tensor", rows: int) -> "torch.Tensor":
            ctx.columns, ctx.dtype = x.shape[-1], x.dtype
            weight = x.new_empty(rows, x.shape[-1], dtype=compute_dtype)
            return nn.functional.linear(x.to(compute_dtype), weight).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: "torch.Tensor") -> Any:
            weight = grad.new_empty(grad.shape[-1], ctx.columns, dtype=compute_dtype)
            return (grad.to(compute_dtype) @ weight).to(ctx.dtype), None

    class Quantized(nn.Linear):
        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            product = Product.apply(x, self.out_features)
            return product if self.bias is None else product + self.bias

    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in kept):
            module.__class__ = Quantized
            module.weight.requires_grad_(False)
            module.weight.stored_bits = bits


def stored(parameter: "torch.Tensor") -> int:
    """The bytes that a parameter takes; quantized ones with their scales."""
    bits = getattr(parameter, "stored_bits", None)
    if bits == 4:  # a scale in 8 bits for every block, and their own scales
        return parameter.numel() // 2 + parameter.numel() // ABSMAX_BLOCK
    if bits == 8:  # a float32 scale for every row
        return parameter.numel() + 4 * parameter.shape[0]
    return parameter.numel() * parameter.element_size()


def stand_ins(model: "nn.Module", mode: Any, device: "torch.device") -> None:
    """Replace parameters and buffers on the meta device by fake ones on `device`; tied ones stay tied."""
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (fake, tensor)  # the old one too: its id must stay its own
                held[name] = made[id(tensor)][0]


# -- what is allocated and freed -----------------------------------------------------------------------------------------


class Ledger:
    """Bytes of the tensors that are alive, as operations make them; the most there were, and what it was made of."""

    def __init__(self, model: "nn.Module") -> None:
        self.alive = self.most = self.gradients = self.kept = 0
        self.at_peak = (0, 0)  # gradients, and what the forward pass had kept until the output head
        self.made, self.made_on_heap = 1, 1  # all that was ever made, in tensors of any size and in smaller than MAPPED
        self._sizes: dict[int, int] = {}
        self._with_gradient: set[int] = set()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(self.reached_head)

    @contextmanager
    def open(self) -> Iterator["Ledger"]:
        """Count what happens while this lasts."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        ledger = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = func(*args, **(kwargs or {}))
                for value in tree_leaves(made):
                    if isinstance(value, torch.Tensor):
                        ledger._add(value.untyped_storage())
                return made

        with Counting():
            yield self

    def know(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Do not count these: they were there before."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _add(self, storage: "torch.UntypedStorage") -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += self._sizes[key]
        self.made += self._sizes[key]
        if self._sizes[key] < MAPPED:
            self.made_on_heap += self._sizes[key]
        weakref.finalize(storage, self._free, key)
        if self.alive > self.most:
            self.most, self.at_peak = self.alive, (self.gradients, self.kept)

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)

    def _gradient(self, parameter: "torch.Tensor") -> None:
        if id(parameter) not in self._with_gradient and parameter.grad is not None:
            self._with_gradient.add(id(parameter))
            self.gradients += parameter.grad.nbytes

    def reached_head(self, *_: Any) -> None:
        self.kept = max(self.kept, self.alive - self.gradients)


# -- the estimate --------------------------------------------------------------------------------------------------------


def batch_of(base: "nn.Module", ids: "torch.Tensor", segments: bool) -> dict[str, Any]:
    """A batch of these samples, [rows, longest], all of whose tokens are learned: padded ones have no padding here."""
    import torch

    from glmtuner.data.segments import Segments
    from glmtuner.models.segments import use_segments

    if not segments:
        return {"input_ids": ids, "labels": ids}
    use_segments(base)
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
    from glmtuner.models.head import chunked_cross_entropy

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

    from glmtuner.models.head import can_chunk
    from glmtuner.models.lora import fuse_lora
    from glmtuner.models.segments import can_segment

    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counts = (sum(map(torch.numel, parameters)), sum(map(torch.numel, trained)))
    weights = sum(stored(parameter) for parameter in parameters if not parameter.requires_grad)
    copies = sum(map(stored, trained))
    on_gpu = device.type == "cuda"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps it
    segments = without_padding and can_segment(base)
    if on_weights:
        fuse_lora(model)
    if on_gpu and not torch.cuda.is_available():  # a GPU elsewhere: the operations of this machine's CPU stand for it
        device = torch.device("cpu")
    mode = FakeTensorMode()
    stand_ins(model, mode, device)
    checkpointing = bool(arguments.activation_checkpointing)
    if checkpointing:
        model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs or None)
    ledger = Ledger(model)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it tells errors a second time
    try:
        with mode:
            ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
            ledger.know([*model.parameters(), *model.buffers(), ids])
            batch = batch_of(base, ids, segments)
            chunks = on_weights and can_chunk(base)
            with ledger.open():
                way = loss_of_states if scores else loss_in_chunks if chunks else None
                loss_of = partial(way, base, batch, ledger.reached_head) if way else lambda: model(**batch).loss
                states = _pass(model, arguments, device, ledger, loss_of)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise cannot_be_followed(error) from None
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


# -- the machine, and what to do about it ----------------------------------------------------------------------------------


def resident() -> int:
    """The bytes of memory that this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def settled_baseline(device: "torch.device", tracker: str) -> int:
    """What this process holds besides tensors: its libraries are imported and have computed once."""
    import torch

    if device.type != "cpu":
        return 0
    for name in filter(None, (*LIBRARIES, OF_TRACKERS.get(tracker))):
        with suppress(ImportError):
            import_module(name)
    for dtype in (torch.float32, torch.bfloat16):  # a library's code counts once it has been touched
        x = torch.ones(1, 2, 64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True).log_softmax(-1).sum().backward()
    return resident() + LEFT_BEHIND


def device_memory(device: "torch.device") -> int | None:
    """The bytes that a run can have: the GPU's all, or on a CPU what is free and what this process holds; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    import psutil

    free = psutil.virtual_memory().available + resident()
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    given = [path.read_text().strip() for path in limits if path.is_file()]
    return min([free, *(int(limit) for limit in given if limit.isdigit())])


def surely_fits(config: Mapping[str, Any], run: Run, rows: int, longest: int, available: int) -> bool:
    """Whether even a bound far above the truth fits, told from config.json alone in no time."""

    def size(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    hidden, layers = size("hidden_size"), size("num_hidden_layers", "num_layers")
    inner = size("intermediate_size", "ffn_hidden_size", "inner_hidden_size")
    vocabulary = size("vocab_size", "padded_vocab_size")
    heads = size("num_attention_heads")
    if any("expert" in name for name in config) or not (hidden and layers and inner and vocabulary and heads):
        return False
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * vocabulary * hidden
    held = weights * (20 if run.finetuning.saved_as == "model" else 8)
    numbers = rows * longest * (layers * (40 * hidden + 10 * inner + 3 * heads * longest) + 8 * vocabulary)
    return held + 4 * numbers + 2 * GIB < available


def settle_checkpointing(
    composed: Composed, estimate_of: Callable[[bool], Estimate], available: int | None
) -> str | None:
    """Whether gradient checkpointing is to be turned on because memory needs it: the line that says so, or None.

    What was typed is obeyed. `estimate_of` is asked without and with checkpointing; a model that cannot be estimated, or
    cannot be checkpointed, is left as it is.
    """
    trainer = composed.run.trainer
    typed = "trainer.gradient_checkpointing" in composed.typed or trainer.gradient_checkpointing
    if typed or not trainer.do_train or available is None:
        return None
    try:
        plain = estimate_of(False)
        if plain.peak <= available:
            return None
        saving = estimate_of(True)
    except ConfigError:
        return None
    return (
        f"gradient checkpointing is on: without it the longest batch needs about {gib(plain.peak)}, with it "
        f"{gib(saving.peak)}, and there are {gib(available)} (trainer.gradient_checkpointing=false leaves it off)"
    )


def does_not_fit(run: Run, needed: Estimate, available: int) -> ConfigError:
    """What to say of a run that is surely too large."""
    largest = max(needed.parts, key=lambda name: needed.parts[name])
    ways = []
    if not needed.checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    if run.quant.bits is None and run.finetuning.on_quantized:
        ways.append("quant=int4")
    if not run.finetuning.on_quantized or run.finetuning.saved_as == "model":
        ways.append("finetuning=lora")
    if run.trainer.per_device_train_batch_size > 1:
        ways.append(
            f"trainer.per_device_train_batch_size={run.trainer.per_device_train_batch_size // 2} with "
            f"trainer.gradient_accumulation_steps={run.trainer.gradient_accumulation_steps * 2}"
        )
    ways += ["smaller data.max_source_length and data.max_target_length", "a smaller model"]
    return ConfigError(
        f"model.model_name_or_path={run.model.model_name_or_path} does not fit: training needs about {gib(needed.peak)} at "
        f"its peak (the most for {largest}, {gib(needed.parts[largest])}), and this machine's {needed.device} has "
        f"{gib(available)}; type {', or '.join(ways)}"
    )


def gib(size: float) -> str:
    """A size in GiB; small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
