"""One composed run, from its configuration to its folder; reads top to bottom."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from glmtuner.benchmarks.tasks import check_benchmarks
from glmtuner.config.compose import Composed, run_folder_of
from glmtuner.config.run_rules import unused_values
from glmtuner.config.schema import Run, Tracker
from glmtuner.console import say
from glmtuner.data.spec import DatasetSpec
from glmtuner.data.splits import dataset_entries, longest_row
from glmtuner.distributed import heartbeat, ranks
from glmtuner.distributed.pause import Paused
from glmtuner.distributed.preemption import Preempted
from glmtuner.distributed.visible import visible_gpus
from glmtuner.errors import CheckpointError, ConfigError, FolderBusy
from glmtuner.families.hub import read_config
from glmtuner.inference.context import RunContext
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.between_jobs import base_key_of
from glmtuner.launch.build import load_trainable_model, resolve_family, resolve_template
from glmtuner.launch.checks import check_base, check_liger, check_liger_runs, check_shared_heads, check_whole_batch
from glmtuner.launch.device import device_of, place_model, return_memory, reuse_memory, shard_model
from glmtuner.launch.inputs import start_hashing
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.memory_check import needs_checkpointing
from glmtuner.launch.optimizations import apply_optimizations, autocast_of, needs_compiler
from glmtuner.launch.parts import Parts
from glmtuner.launch.places import catalogue_dirs, output_folder
from glmtuner.launch.plan import show_plan, write_description
from glmtuner.launch.reference import with_reference_logprobs
from glmtuner.launch.rehearsal import one_line, rehearse
from glmtuner.launch.resume import (
    checkpoint_to_resume,
    differences,
    differences_when_continued,
    how_to_continue,
    lies_in,
    require_same_rows,
)
from glmtuner.launch.template_check import check_first_rows, check_template
from glmtuner.launch.training import initialize_method, make_trainer, numeric, train
from glmtuner.launch.upload import create_repository, upload
from glmtuner.launch.watch import Watcher
from glmtuner.run_folder.acquire import acquire_run_folder
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, step_of
from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import METRICS, PROGRESS
from glmtuner.run_folder.spent import ROOT, counted, current_attempt
from glmtuner.stages.stage import learning_stage

if TYPE_CHECKING:
    from glmtuner.training.trainer import GlmTrainer


def launch(
    composed: Composed, output_dir: Path | None = None, catalogue: list[Path] | None = None, parts: Parts | None = None
) -> dict[str, float]:
    """Run the composed configuration; returns the content of metrics.json, nothing of a paused run. All output is in the run folder.

    `parts` loads what the run is made of, for several runs in this process that share it.

    An error after the folder is acquired is recorded in its failed.json and raised; Preempted is raised if a signal stops
    the run. If the run has several processes, they are started here, and each calls this function again as one rank.
    """
    run = composed.run
    specs = dataset_entries(run, catalogue or catalogue_dirs(composed))
    run.stage.check(run)
    run.tracker.check_machine()
    check_benchmarks(run.benchmark)
    if (count := ranks.processes_to_start(run.parallel)) > 1:
        return launch_ranks(composed, RunFolder(output_dir or output_folder(composed)), count)
    ranks.init_process_group(run.trainer, run.parallel.lost_after)
    tracker = run.tracker if ranks.is_main() else Tracker(name="none")
    folder, resumes, checkpoint = ranks.broadcast_from_rank0(
        lambda: acquire(output_dir or output_folder(composed), composed, ranks.world_size())
    )
    for sentence in unused_values(run):
        say(sentence)

    try:
        with recording_failure(composed, folder, tracker), counted_hours(run, folder):
            metrics = run_in_folder(composed, specs, folder, tracker, resumes, checkpoint, parts or Parts())
    except Paused as paused:
        say(f"{folder.path}: {paused}")
        return {}
    finally:
        folder.unlock()
    if run.trainer.push_to_hub and ranks.is_main():
        upload(run.trainer, folder, run.finetuning.saved_as)
    return metrics


@contextmanager
def recording_failure(composed: Composed, folder: RunFolder, tracker: Tracker) -> Iterator[None]:
    """Within it, an error is recorded in the folder and told to the other ranks; so is a rank that has gone, for which this one ends."""

    def record(error: Exception) -> None:
        if folder.path.is_dir():
            folder.record_failure(error, composed.overrides, first_wins=ranks.world_size() > 1)
        tracker.abandon()

    with heartbeat.told_of_loss(record):
        try:
            yield
        except Paused:
            raise
        except Exception as error:
            cause = heartbeat.cause_of(error)
            record(cause or error)
            if cause is not None:
                raise cause from error
            heartbeat.leave(None if isinstance(error, ranks.ReportedByRank0) else one_line(error))
            raise


def computes_on_gpu(run: Run) -> bool:
    """Whether the run computes on a GPU of this machine."""
    return bool(visible_gpus()) and not run.trainer.use_cpu


@contextmanager
def counted_hours(run: Run, folder: RunFolder) -> Iterator[None]:
    """Within it, the hours of this process are counted: in the sweep's folder, or in that of a run with a budget of its own.

    Those of jobs that share this process are counted already.
    """
    root = Path(os.environ[ROOT]) if ROOT in os.environ else folder.path if run.budget.limits() else None
    if root is None or current_attempt() is not None:
        yield
        return
    with counted(root, folder.path.name, computes_on_gpu(run), run.budget.passed) as attempt:
        if over := attempt.over_before():
            raise ConfigError(
                f"{'; '.join(over)}, which earlier attempts have spent ({root}); type a larger limit, or leave it out"
            )
        yield


def acquire(path: Path, composed: Composed, count: int) -> tuple[RunFolder, bool, Path | None]:
    """The run folder, locked by this process if it exists, whether the run in it is to be resumed, and from which checkpoint.

    The checkpoint is that of trainer.resume_from_checkpoint, or None; `count` is the number of processes.
    """
    run = composed.run
    checkpoint = checkpoint_to_resume(run, composed.config, path, count)
    is_own = checkpoint is not None and lies_in(checkpoint, path)
    compare = differences_when_continued if is_own else differences
    folder = RunFolder(path)
    try:
        resumes = acquire_run_folder(path, composed.config, run.trainer.overwrite_output_dir, compare)
    except FolderBusy:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}{how_to_continue(folder, composed.config, checkpoint)}") from None
    if resumes and run.trainer.do_train and (latest := latest_complete_checkpoint(path, count)[0]) is not None:
        try:
            require_same_rows(run, composed.config, latest, count)
        except CheckpointError:
            folder.unlock()
            raise
    return folder, resumes, checkpoint


def launch_ranks(composed: Composed, folder: RunFolder, count: int) -> dict[str, float]:
    """Run as `count` processes on this machine; raises RankFailed for the first that fails, Preempted on a signal."""
    acquire(folder.path, composed, count)
    folder.unlock()
    try:
        ranks.run_ranks(ranks.command_of(composed.flags, composed.overrides, folder.path), count)
    except ranks.RankFailed as failed:
        if failed.preempted_by is not None:
            checkpoint, _ = latest_complete_checkpoint(folder.path)
            raise Preempted.by(failed.preempted_by, step_of(checkpoint) if checkpoint else 0) from None
        if folder.path.is_dir():
            folder.record_failure(failed, composed.overrides, first_wins=not failed.was_killed)
        raise
    return folder.metrics()


def run_in_folder(
    composed: Composed,
    specs: dict[str, DatasetSpec],
    folder: RunFolder,
    tracker: Tracker,
    resumes: bool,
    checkpoint: Path | None,
    parts: Parts,
) -> dict[str, float]:
    """From the configuration to the results: model, data, Trainer, training, evaluation, prediction, report."""
    run, stage = composed.run, learning_stage(composed.run)
    context, trainer = set_up(composed, specs, folder, tracker, resumes, checkpoint, parts)
    metrics: dict[str, float] = {}
    if run.trainer.do_train:
        metrics |= train(context, trainer, resumes, checkpoint)
    if run.trainer.do_eval:
        metrics |= numeric(trainer.evaluate())
    if run.trainer.do_predict:
        metrics |= stage.predict(context, trainer)
    if run.benchmark.tasks:
        from glmtuner.benchmarks.run import score_benchmarks

        metrics |= score_benchmarks(context)
    return finish(context, trainer, metrics)


def set_up(
    composed: Composed,
    specs: dict[str, DatasetSpec],
    folder: RunFolder,
    tracker: Tracker,
    resumes: bool,
    checkpoint: Path | None,
    parts: Parts,
    watcher: Watcher | None = None,
) -> "tuple[RunContext, GlmTrainer]":
    """All that comes before the first step: the run with its loaded parts, and its Trainer; `watcher` is told of the parts."""
    watcher = watcher or Watcher()
    run, stage = composed.run, learning_stage(composed.run)
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    check_shared_heads(run, model_config)
    family, finetuning = resolve_family(run, model_config)

    load_libraries(compiles=needs_compiler(run), trains=True)
    if in_shares := run.parallel.sharded and ranks.world_size() > 1:
        return_memory()
    if run.model.rope_scaling is not None:
        from glmtuner.models.load import load_config

        load_config(run.model, family)  # transformers judges the values before any data are read
    if run.trainer.do_train:
        finetuning.check_model(run.model, family)
    watcher.reached("libraries")
    from glmtuner.models.positions import check_positions
    from glmtuner.models.unwrap import unwrapped
    from glmtuner.models.warm import keep_originals, make_room

    if run.trainer.predict_with_generate and ranks.is_main():
        Thread(target=run.metric.prepare, daemon=True).start()  # while the weights are read
    device = device_of(run)
    rehearse(run, folder, device, checkpoint)
    if run.trainer.push_to_hub and ranks.is_main():
        create_repository(run.trainer, folder)
    check_liger_runs(run, device)
    tokenizer = parts.tokenizer(run)
    resumed = folder.path if resumes else run_folder_of(str(checkpoint)) if checkpoint else None
    template_name, template = resolve_template(run, family, tokenizer, resumed)
    encoder = stage.encoder(run, template, tokenizer) if run.trainer.do_train else None
    agrees = check_template(run, encoder, template_name)
    data = watcher.data(lambda: parts.datasets(run, specs, template, tokenizer))
    if data.train is not None:
        check_whole_batch(run, len(data.train))
    if agrees:  # one difference is said once
        check_first_rows(run, encoder, template_name, {part.spec.name: part.first for part in data.prepared})
    make_room(base_key_of(run, family, device))
    checkpointing = needs_checkpointing(composed, model_config, finetuning, family, data, device)
    data = watcher.rows(data)
    if ranks.is_main():
        start_hashing(run)
    model, finetuning, family = load_trainable_model(
        composed,
        finetuning,
        family,
        device,
        tokenizer,
        parts.load_model,
        in_shares=in_shares,
    )
    if data.train is not None:
        check_positions(model, longest_row(data.train))
    context = RunContext(
        run=run, folder=folder, model=model, tokenizer=tokenizer, template=template, template_name=template_name,
        family=family, finetuning=finetuning, data=data, tracker=tracker,
    )  # fmt: skip
    initialize_method(context, device, resumes, checkpoint)
    keep_originals(model)
    objective = stage.objective(context)
    if device.type == "cpu" and run.trainer.do_train and run.data.packing and not in_shares:
        reuse_memory()

    if ranks.is_main():
        folder.prepare(resumes=resumes, trains=run.trainer.do_train)
        write_description(composed, context, model_config, resumes, device)
    arguments = training_arguments(run, folder, model, device, checkpointing=checkpointing)
    tracker.start(run, folder.path)
    blocks = family.blocks(unwrapped(model))
    shard_model(run, model, blocks)
    place_model(run, model, device)
    collator = stage.collator(
        pad_id=tokenizer.pad_token_id, ignore_pad_token_for_loss=run.data.ignore_pad_token_for_loss
    )
    batches = apply_optimizations(context, arguments, collator, blocks, device)
    watcher.reached("model")
    context, batches = with_reference_logprobs(context, objective, batches, autocast_of(arguments, device))
    watcher.reached("reference")
    trainer = make_trainer(context, arguments, batches, objective, parts.trainer)
    show_plan(context, trainer, device)
    return context, trainer


def finish(context: RunContext, trainer: "GlmTrainer", metrics: dict[str, float]) -> dict[str, float]:
    """Write plots, the report and, last, metrics.json, which marks the run as finished; returns its content."""
    from glmtuner.report import show_results, write_loss_plot, write_run_markdown

    run, folder = context.run, context.folder
    metrics |= trainer.resources()
    if not ranks.is_main():
        return metrics
    if run.model.plot_loss and run.trainer.do_train:
        write_loss_plot(folder)
    closing = context.tracker.finish(folder.path, metrics)
    write_run_markdown(folder, metrics)
    (folder / PROGRESS).unlink(missing_ok=True)
    write_json(folder / METRICS, metrics)
    show_results(folder)
    if closing:
        say(closing)
    return metrics
