"""The memory check of a run, before anything is loaded."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.checkpointing import configured_checkpointing
from glmtuner.config.compose import Composed
from glmtuner.config.groups import Finetuning
from glmtuner.config.schema import Run
from glmtuner.console import say, table
from glmtuner.data.splits import dataset_entries, longest_row
from glmtuner.distributed import accelerator, ranks
from glmtuner.errors import ConfigError
from glmtuner.families.family import Family
from glmtuner.families.hub import read_config
from glmtuner.kernels.fast_paths import FastPath
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.build import resolve_family
from glmtuner.launch.checks import check_base, check_liger, check_shared_heads
from glmtuner.launch.device import compute_dtype, device_of
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.optimizations import excluded_optimizations, needs_compiler
from glmtuner.launch.places import catalogue_dirs
from glmtuner.memory.checkpointing import check_offload
from glmtuner.memory.estimate import Estimate, estimate, gib
from glmtuner.memory.meta_model import build_meta_model
from glmtuner.memory.policy import (
    MARGIN,
    checkpointing_notice,
    device_memory,
    does_not_fit,
    process_baseline_bytes,
    upper_bound_fits,
)
from glmtuner.run_folder.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from glmtuner.data.splits import Datasets


def report_memory(composed: Composed) -> None:
    """Print the estimated peak memory of the run's training; no weights or data are loaded, nothing is written.

    Raises ConfigError where it certainly does not fit into the memory of this machine's device, or cannot be estimated.
    """
    run = composed.run
    device = device_of(run)
    available = device_memory(device)
    needed, line = estimate_run(composed, device, available)
    table("", ("", ""), needed.table_rows(), show_header=False)
    if line is not None:
        say(line)
    if run.stage.memory_notice:
        say(run.stage.memory_notice)
    if available is None:
        return
    if needed.peak > available * (1 + MARGIN):
        raise does_not_fit(run, needed, available)
    verdict = "fits" if needed.peak < available else "may not fit"
    say(f"{verdict}: {gib(needed.peak)} of the {gib(available)} that this machine's {needed.device} has")


def report_remote_memory(composed: Composed) -> None:
    """Print in one line the GPU memory that this run needs on another machine; a ConfigError becomes the line."""
    import torch

    run = composed.run
    if not run.trainer.do_train:
        return
    device = device_of(run)
    if not (run.trainer.use_cpu or accelerator.has_memory(device)):
        device = torch.device("cuda")  # the usual one of a cluster
    try:
        needed, _ = estimate_run(composed, device, None)
    except ConfigError as error:
        say(f"memory: {error}")
        return
    say(
        f"memory: the first job needs about {gib(needed.peak)} of {needed.device} memory at its peak, with {needed.rows} rows of "
        f"{needed.longest:,} tokens (details: python -m glmtuner --check …)"
    )


def estimate_run(
    composed: Composed,
    device: "torch.device",
    available: int | None,
    *,
    batch: tuple[int, int] | None = None,
    baseline: int | None = None,
) -> tuple[Estimate, str | None]:
    """The estimate for the run's largest batch, and a notice where gradient checkpointing is turned on for it.

    `batch` are the rows and the tokens of a row of the largest batch of its data, if they are known; `baseline` as in `estimator`.
    """
    run = composed.run
    dataset_entries(run, catalogue_dirs(composed))
    run.stage.check(run)
    run.tracker.check_machine()
    if not run.trainer.do_train:
        raise ConfigError("--check estimates the memory of a training, and trainer.do_train=false; type trainer=train")
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    check_shared_heads(run, model_config)
    family, finetuning = resolve_family(run, model_config)
    load_libraries(compiles=needs_compiler(run), trains=True)  # the same as in a run, since their memory counts
    check_offload(run.trainer, device)
    rows, longest = batch or run.stage.largest_batch(run)
    processes = ranks.processes_to_start(run.parallel)
    estimate_of = estimator(composed, finetuning, family, device, rows, longest, processes, baseline)
    notice = checkpointing_notice(composed, estimate_of, available)
    needed = estimate_of(bool(configured_checkpointing(run.trainer)) or notice is not None)
    if needed.longest < part_of(run, longest):
        limit = f"rows have at most {needed.longest:,} tokens, since the model has no positions for more; a longer one is refused"
        notice = f"{limit}\n{notice}" if notice else limit
    return needed, notice


def estimator(
    composed: Composed,
    finetuning: Finetuning,
    family: Family | None,
    device: "torch.device",
    rows: int,
    longest: int,
    processes: int,
    baseline: int | None = None,
) -> Callable[[bool], Estimate]:
    """A function that estimates the run's peak on batches of that size, given whether gradient checkpointing is on.

    `baseline` are the bytes of a process without tensors; by default they are measured of this one.
    """
    from glmtuner.models.positions import most_positions

    run = composed.run
    bare = process_baseline_bytes(device, run.tracker.name) if baseline is None else baseline

    @cache  # called more than once per run, and a large model takes seconds
    def estimate_of(checkpointing: bool) -> Estimate:
        model = build_meta_model(run, finetuning, family, device, compute_dtype(run, device))
        most = most_positions(model) or longest
        folder = RunFolder(Path("outputs"))
        arguments = training_arguments(run, folder, model, device, checkpointing=checkpointing, for_estimate=True)
        estimated = estimate(
            model, arguments, device, rows=rows, longest=part_of(run, min(longest, most)), baseline=bare, without_logits=not run.stage.policy,
            fast_paths=frozenset(FastPath) - excluded_optimizations(run).keys(),
        )  # fmt: skip
        return estimated.per_process(run.parallel.shares, processes)

    return estimate_of


def part_of(run: Run, tokens: int) -> int:
    """The tokens of a row of so many that a process has."""
    return -(-tokens // run.parallel.ranks_per_row)


def needs_checkpointing(
    composed: Composed,
    model_config: Mapping[str, Any],
    finetuning: Finetuning,
    family: Family | None,
    data: "Datasets",
    device: "torch.device",
) -> bool:
    """Whether gradient checkpointing is on: as configured, or because the longest batch of the data would not fit without it."""
    run = composed.run
    configured = configured_checkpointing(run.trainer)
    if configured is not None or data.train is None or run.stage.memory_notice:
        return bool(configured)
    rows, longest = run.stage.largest_batch(run)[0], longest_row(data.train)

    def decide() -> str | None:
        available = device_memory(device)
        if available is None or upper_bound_fits(model_config, run, rows, longest, available):
            return None
        estimate_of = estimator(composed, finetuning, family, device, rows, longest, ranks.world_size())
        try:
            return checkpointing_notice(composed, estimate_of, available)
        except ConfigError as error:
            say(f"gradient checkpointing stays off (trainer.gradient_checkpointing=true turns it on): {error}")
            return None

    notice = ranks.broadcast_from_rank0(decide)
    if notice:
        say(notice)
    return notice is not None
