"""What can fail only with torch or on this machine, tried on a model of one layer before anything is loaded or written."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.config.optimizers import LOMO, SCHEDULE_FREE
from glmtuner.config.schedules import dictionary
from glmtuner.config.schema import Run
from glmtuner.distributed import accelerator, ranks
from glmtuner.errors import ConfigError, did_you_mean
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.resume import require_same_optimizer
from glmtuner.memory.checkpointing import check_offload
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch
    from transformers import Seq2SeqTrainingArguments

UNTRIED = LOMO  # optimizers that step in the backward pass of the real model
STEPS = 1000  # of the tried schedule where the data decide on the number of steps
ACCUMULATION_KEYS = ("sync_with_dataloader", "sync_each_batch", "adjust_scheduler")
ACCELERATOR_KEYS = (
    "split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking", "gradient_accumulation_kwargs",
)  # fmt: skip


def rehearse(run: Run, folder: RunFolder, device: "torch.device", checkpoint: Path | None) -> None:
    """Build the training arguments and, for a training, the optimizer and the schedule; raises GlmtunerError where that fails.

    `checkpoint` is the one that the training continues.
    """
    import torch

    check_precision(run, device)
    check_offload(run.trainer, device)
    check_accelerator_config(run)
    check_compiler(run)
    layer: torch.nn.Linear = torch.nn.utils.skip_init(torch.nn.Linear, 64, 64, device=device)  # draws no random number
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    try:
        arguments = training_arguments(run, folder, layer, device, for_estimate=ranks.world_size() > 1)
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"transformers refuses the arguments of the trainer: {one_line(error)}") from None
    if run.trainer.do_train:
        optimizer = tried_optimizer(run, arguments, layer)
        try_schedule(run, arguments, optimizer)
        if checkpoint is not None and run.trainer.optim.value not in UNTRIED:
            require_same_optimizer(checkpoint, optimizer, run.trainer.optim.value)


def check_precision(run: Run, device: "torch.device") -> None:
    """Raise ConfigError where the device does not compute in the precision that the trainer asks for."""
    trainer = run.trainer
    for name in ("bf16", "bf16_full_eval"):
        if getattr(trainer, name) and not trainer.use_cpu and not accelerator.has_bfloat16(device):
            what = (
                "a GPU without bfloat16"
                if accelerator.has_memory(device)
                else f"the device {device.type}, not a GPU with bfloat16"
            )
            raise ConfigError(
                f"trainer.{name}=true: this machine has {what}; leave it out, or type trainer.use_cpu=true to compute in bfloat16 on "
                "the CPU"
            )
    if trainer.fp16 and device.type == "cpu":
        raise ConfigError(
            "trainer.fp16=true: float16 with loss scaling needs a GPU, and this run is on the CPU; leave it out, or type "
            "trainer.bf16=true trainer.use_cpu=true"
        )
    if trainer.tf32 and not accelerator.supports("tf32", device):
        raise ConfigError(
            "trainer.tf32=true: TensorFloat-32 needs a GPU of NVIDIA's Ampere generation or later; leave it out"
        )


def check_accelerator_config(run: Run) -> None:
    """Raise ConfigError for an argument that accelerate does not take, or that a run sets by itself."""
    config = run.trainer.accelerator_config
    if not isinstance(config, dict):
        return
    knob = f"trainer.accelerator_config={config}"
    inner = config.get("gradient_accumulation_kwargs") or {}
    for given, legal in ((config, ACCELERATOR_KEYS), (inner, ACCUMULATION_KEYS)):
        for name in given:
            if name not in legal:
                raise ConfigError(f"{knob}{did_you_mean(str(name), legal, 'legal: ' + ', '.join(legal))}")
    for name, value in (config | inner).items():
        if name != "gradient_accumulation_kwargs" and not isinstance(value, bool) and value is not None:
            raise ConfigError(f"{knob}: {name} is true or false")


def check_compiler(run: Run) -> None:
    """Raise ConfigError for a backend that torch.compile does not know."""
    backend = run.trainer.torch_compile_backend
    if not run.trainer.torch_compile or backend is None:
        return
    from torch._dynamo import list_backends

    if backend not in list_backends(exclude_tags=None):  # those for debugging, too
        known = list_backends()
        raise ConfigError(
            f"trainer.torch_compile_backend={backend}: no such compiler{did_you_mean(backend, known, 'legal: ' + ', '.join(known))}"
        )


def tried_optimizer(
    run: Run, arguments: "Seq2SeqTrainingArguments", layer: "torch.nn.Linear"
) -> "torch.optim.Optimizer":
    """The optimizer of the trainer on one layer, after a step; raises ConfigError where it cannot be built or cannot step."""
    import torch

    from glmtuner.training.optimizers import tried

    name = run.trainer.optim.value
    if name in UNTRIED:
        return torch.optim.SGD(layer.parameters(), lr=arguments.learning_rate)
    knob = f"trainer.optim={name}" + (
        f" with trainer.optim_args={run.trainer.optim_args}" if run.trainer.optim_args else ""
    )
    try:
        optimizer = tried(run.trainer, layer, arguments)
        if name in SCHEDULE_FREE:
            optimizer.train()  # type: ignore[attr-defined]
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:  # of a library, whatever its class
        raise ConfigError(
            f"{knob} does not work on {layer.weight.device.type}: {one_line(error)}; type trainer.optim=adamw_torch, or leave it out"
        ) from None
    return optimizer


def try_schedule(run: Run, arguments: "Seq2SeqTrainingArguments", optimizer: "torch.optim.Optimizer") -> None:
    """Raise ConfigError where the schedule cannot be built, or has a step without a learning rate."""
    from transformers import get_scheduler

    steps = arguments.max_steps if arguments.max_steps > 0 else STEPS
    knob = f"trainer.lr_scheduler_type={run.trainer.lr_scheduler_type.value} with trainer.lr_scheduler_kwargs={run.trainer.lr_scheduler_kwargs}"
    advice = "type other arguments, or trainer.lr_scheduler_type=linear"
    try:
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dictionary(arguments.lr_scheduler_kwargs),
        )
        factor_at = getattr(schedule, "lr_lambdas", [None])[0]
        tried = sorted({*range(min(steps, STEPS) + 1), steps // 2, steps - 1, steps})
        factors = [] if factor_at is None else [(step, factor_at(step)) for step in tried]
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise ConfigError(f"{knob}: {one_line(error)}; {advice}") from None
    for step, factor in factors:
        if isinstance(factor, complex) or not math.isfinite(factor) or factor < 0:
            raise ConfigError(
                f"{knob}: the learning rate of step {step} would be {arguments.learning_rate}·{factor}; {advice}"
            )


def one_line(error: BaseException) -> str:
    """The error's message on one line, with its class where the message alone says little."""
    message = " ".join(str(error).split())
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"
