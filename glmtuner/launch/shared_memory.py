"""How many runs on one base fit into memory together."""

from collections.abc import Mapping, Sequence
from typing import Any

from glmtuner.config.compose import Composed
from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.families.hub import read_config
from glmtuner.launch.device import device_of
from glmtuner.launch.memory_check import estimate_run
from glmtuner.memory.estimate import Estimate, gib
from glmtuner.memory.policy import device_memory, upper_bound_fits

COMMON = (
    "frozen weights",
    "Python and libraries",
    "CUDA context",
)  # parts of an estimate that runs on one base have once
ADAPTER_BYTES = 16  # of a weight that is trained in float32 by AdamW: itself, its gradient and two moments
WIDTHS = ("hidden_size", "intermediate_size", "ffn_hidden_size", "inner_hidden_size")
LAYERS, LINEARS = (
    ("num_hidden_layers", "num_layers"),
    7,
)  # a block has at most 7: queries, keys, values, output, gate, up, down


def jobs_that_fit(jobs: Sequence[Composed]) -> int:
    """The number of runs that fit at a time, whichever they are, by the estimates of their largest batches; at least 1.

    What does not fit, and a memory that cannot be estimated, is printed.
    """
    device = device_of(jobs[0].run)
    available = device_memory(device)
    if available is None or all_surely_fit(read_config(jobs[0].run.model), jobs, available):
        return len(jobs)
    estimates: dict[str, Estimate] = {}
    own = []
    try:
        for job in jobs:
            run = job.run
            key = repr(
                (
                    run.finetuning,
                    run.trainer.per_device_train_batch_size,
                    run.trainer.gradient_accumulation_steps,
                    run.trainer.optim,
                )
            )
            if key not in estimates:
                estimates[key] = estimate_run(job, device, available)[0]
            own.append(own_bytes(estimates[key]))
    except ConfigError as error:
        say(
            f"hydra/launcher=shared: {error}; jobs share their base one at a time (hydra.launcher.jobs_at_once=… says how many)"
        )
        return 1
    common = common_bytes(next(iter(estimates.values())))
    count = most_that_fit(common, own, available)
    if count < len(jobs):
        say(
            f"hydra/launcher=shared: the base and the process need {gib(common)}, each job up to {gib(max(own))} more, and "
            f"{gib(available)} are available"
        )
    return count


def common_bytes(estimate: Estimate) -> int:
    """What runs on one base have once."""
    return sum(estimate.parts.get(name, 0) for name in COMMON)


def own_bytes(estimate: Estimate) -> int:
    """What each of the runs has of its own: adapter, gradients, states of the optimizer, activations and temporary memory."""
    return estimate.peak - common_bytes(estimate)


def most_that_fit(common: int, own: Sequence[int], available: int) -> int:
    """How many of these runs fit beside what they have in common, whichever they are: as many as of the largest; at least 1."""
    total, count = common, 0
    for size in sorted(own, reverse=True):
        total += size
        if total > available:
            break
        count += 1
    return max(count, 1)


def all_surely_fit(config: Mapping[str, Any], jobs: Sequence[Composed], available: int) -> bool:
    """Whether a generous upper bound of all runs together fits, computed from config.json alone in no time."""
    rows = longest = adapters = 0
    for job in jobs:
        own_rows, own_longest = job.run.stage.largest_batch(job.run)
        rows, longest = rows + own_rows, max(longest, own_longest)
        adapters += ADAPTER_BYTES * largest_adapter(config, job)
    return upper_bound_fits(config, jobs[0].run, rows, longest, available - adapters)


def largest_adapter(config: Mapping[str, Any], job: Composed) -> int:
    """An upper bound of the number of a LoRA's weights: its rank on every linear layer of every block."""
    method: Any = job.run.finetuning
    rank = max([method.lora_rank, *method.rank_pattern.values()])
    width, layers = (
        max((value for name in names if isinstance(value := config.get(name), int)), default=0)
        for names in (WIDTHS, LAYERS)
    )
    return int(rank * layers * LINEARS * 3 * width)  # inputs, and at most twice as many outputs
