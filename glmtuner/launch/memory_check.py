"""The memory check of a run, before anything is loaded."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Parallel
from glmtuner.console import say, table
from glmtuner.data.splits import dataset_entries, longest_row
from glmtuner.distributed import ranks
from glmtuner.errors import ConfigError
from glmtuner.families.family import Family
from glmtuner.families.hub import read_config
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.build import resolve_family
from glmtuner.launch.checks import check_base, check_liger
from glmtuner.launch.device import compute_dtype, device_of
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.optimizations import allowed_optimizations, needs_compiler
from glmtuner.launch.places import catalogue_dirs
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
    """Say what the training of this run holds at its peak, without weights or data; nothing is written.

    Raises ConfigError where it surely does not fit into this machine's device, or cannot be told.
    """
    run = composed.run
    device = device_of(run)
    available = device_memory(device)
    needed, line = estimate_run(composed, device, available)
    table("", ("", ""), needed.told(), show_header=False)
    if line is not None:
        say(line)
    if run.stage.name == "ppo":
        say("stage=ppo also generates answers and holds a value head and a reward model, which are not counted")
    if available is None:
        return
    if needed.peak > available * (1 + MARGIN):
        raise does_not_fit(run, needed, available)
    verdict = "fits" if needed.peak < available else "may not fit"
    say(f"{verdict}: {gib(needed.peak)} of the {gib(available)} that this machine's {needed.device} has")


def report_remote_memory(composed: Composed) -> None:
    """Say in one line what a GPU must have for this run, which starts on another machine; never refuses."""
    import torch

    run = composed.run
    if not run.trainer.do_train:
        return
    device = device_of(run)
    if not (run.trainer.use_cpu or device.type == "cuda"):
        device = torch.device("cuda")
    try:
        needed, _ = estimate_run(composed, device, None)
    except ConfigError as error:
        say(f"memory: {error}")
        return
    say(
        f"memory: the first job needs about {gib(needed.peak)} of a {needed.device}'s at its peak, with {needed.rows} rows of "
        f"{needed.longest:,} tokens (python -m glmtuner --check … tells more)"
    )


def estimate_run(composed: Composed, device: "torch.device", available: int | None) -> tuple[Estimate, str | None]:
    """The estimate of the run's largest batch, and the line of gradient checkpointing that is turned on for it."""
    run = composed.run
    dataset_entries(run, catalogue_dirs(composed))
    run.stage.check(run)
    run.parallel.check_machine()
    if not run.trainer.do_train:
        raise ConfigError("--check states the memory of a training, and trainer.do_train=false; type trainer=train")
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    family = resolve_family(run, model_config)
    load_libraries(compiles=needs_compiler(run), trains=True)  # what a run would, since they count
    rows, longest = run.stage.largest_batch(run)
    estimated = estimator(composed, family, device, rows, longest, ranks.processes_to_start(run.parallel))
    line = checkpointing_notice(composed, estimated, available)
    return estimated(run.trainer.gradient_checkpointing or line is not None), line


def estimator(
    composed: Composed, family: Family | None, device: "torch.device", rows: int, longest: int, processes: int
) -> Callable[[bool], Estimate]:
    """What says the peak of the run on batches of that size, given whether gradient checkpointing is on."""
    import torch

    run = composed.run
    baseline = process_baseline_bytes(device, run.tracker.name)

    @cache  # told more than once of one run, and a large model takes seconds
    def estimated(checkpointing: bool) -> Estimate:
        model = build_meta_model(run, family, device, compute_dtype(run, device))
        there = copy.copy(run)
        there.trainer = copy.copy(run.trainer)
        there.parallel = Parallel(name="none")  # DeepSpeed's configuration would change how models are built
        there.trainer.use_cpu = not torch.cuda.is_available()  # transformers refuses bf16 for a GPU that is not here
        arguments = training_arguments(there, RunFolder(Path("outputs")), model, device)
        arguments.activation_checkpointing = checkpointing
        found = estimate(
            model, arguments, device, rows=rows, longest=longest, baseline=baseline, scores=not run.stage.policy,
            **allowed_optimizations(run),
        )  # fmt: skip
        return found.shared(run.parallel.shares, processes)

    return estimated


def checkpoint_where_needed(
    composed: Composed,
    model_config: Mapping[str, Any],
    family: Family | None,
    data: "Datasets",
    device: "torch.device",
) -> None:
    """Turn gradient checkpointing on where the longest batch of these data would not fit without it."""
    run = composed.run
    if data.train is None or run.stage.name == "ppo":
        return
    rows, longest = run.stage.largest_batch(run)[0], longest_row(data.train)

    def decide() -> str | None:
        available = device_memory(device)
        if available is None or upper_bound_fits(model_config, run, rows, longest, available):
            return None
        estimated = estimator(composed, family, device, rows, longest, ranks.world_size())
        return checkpointing_notice(composed, estimated, available)

    if line := ranks.broadcast_from_rank0(decide):
        run.trainer.gradient_checkpointing = True
        say(line)
