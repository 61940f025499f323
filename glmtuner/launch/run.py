"""One composed run, from its words to its folder; reads top to bottom."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.compose import Composed
from glmtuner.config.schema import Run, Tracker
from glmtuner.console import say
from glmtuner.data.splits import dataset_entries
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import Preempted
from glmtuner.families.hub import read_config
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.build import load_trainable_model, resolve_family, resolve_template
from glmtuner.launch.checks import check_base, check_liger, check_liger_runs
from glmtuner.launch.device import device_of
from glmtuner.launch.libraries import load_libraries
from glmtuner.launch.memory_check import checkpoint_where_needed
from glmtuner.launch.optimizations import apply_optimizations, needs_compiler
from glmtuner.launch.places import catalogue_dirs, output_folder
from glmtuner.launch.plan import show_plan, write_description
from glmtuner.launch.training import make_trainer, numeric, train
from glmtuner.run_folder.acquire import acquire_run_folder
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, step_of
from glmtuner.run_folder.files import write_json
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import METRICS

if TYPE_CHECKING:
    from glmtuner.training.trainer import GlmTrainer


def launch(composed: Composed, output_dir: Path | None = None, catalogue: list[Path] | None = None) -> dict[str, float]:
    """Do what the run says; returns the content of metrics.json. Everything it writes lands in the run folder.

    An error after the folder is claimed is recorded there (failed.json) and raised; Preempted is raised by a run that a
    signal stopped. A run of several processes is started here, and every one of them comes here again as one rank of it.
    """
    run = composed.run
    specs = dataset_entries(run, catalogue or catalogue_dirs(composed))
    run.stage.check(run)
    run.parallel.check_machine()
    if (count := ranks.processes_to_start(run.parallel)) > 1:
        return launch_ranks(composed, RunFolder(output_dir or output_folder(composed)), count)
    ranks.init_process_group(run.trainer)
    if not ranks.is_main():
        run.tracker = Tracker(name="none")
    folder, resumes = ranks.broadcast_from_rank0(lambda: acquire(output_dir or output_folder(composed), composed))
    try:
        metrics = _run_in_folder(composed, specs, folder, resumes)
    except Exception as error:
        run.tracker.abandon()
        if folder.path.is_dir():
            folder.record_failure(error, composed.overrides, first_wins=ranks.world_size() > 1)
        raise
    finally:
        folder.unlock()
    return metrics


def acquire(path: Path, composed: Composed) -> tuple[RunFolder, bool]:
    """The run's folder, locked by this process where it exists, and whether the run in it is to be resumed."""
    return RunFolder(path), acquire_run_folder(path, composed.config, composed.run.trainer.overwrite_output_dir)


def launch_ranks(composed: Composed, folder: RunFolder, count: int) -> dict[str, float]:
    """The run by `count` processes of this machine; raises RankFailed for the first that fails, Preempted when told to go."""
    acquire(folder.path, composed)
    folder.unlock()
    try:
        ranks.run_ranks(ranks.command_of(composed.flags, composed.overrides, folder.path), count)
    except ranks.RankFailed as failed:
        if failed.stopped_by is not None:
            checkpoint, _ = latest_complete_checkpoint(folder.path)
            raise Preempted.by(failed.stopped_by, step_of(checkpoint) if checkpoint else 0) from None
        if folder.path.is_dir():
            folder.record_failure(failed, composed.overrides, first_wins=not failed.killed)
        raise
    return folder.metrics()


def _run_in_folder(composed: Composed, specs: Any, folder: RunFolder, resumes: bool) -> dict[str, float]:
    run = composed.run
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    family = resolve_family(run, model_config)

    load_libraries(compiles=needs_compiler(run), trains=True)
    from glmtuner.models.load import load_tokenizer
    from glmtuner.models.unwrap import unwrapped

    tokenizer = load_tokenizer(run.model)
    template = resolve_template(run, family, tokenizer)
    data = run.stage.datasets(run, specs, template, tokenizer)
    device = device_of(run)
    check_liger_runs(run, device)
    checkpoint_where_needed(composed, model_config, family, data, device)
    model, family = load_trainable_model(composed, family, device)
    run.model.family = family.name
    objective = run.stage.objective(run, model, template, tokenizer)

    if ranks.is_main():
        folder.lock()
        write_description(folder, composed, family, template, model_config, data, resumes)
    arguments = training_arguments(run, folder, model, device)
    run.tracker.start(run, folder.path)
    blocks = family.blocks(unwrapped(model))
    if ranks.world_size() > 1:
        run.parallel.shard_model(model, blocks)
    trainer = make_trainer(run, folder, model, tokenizer, template, data, arguments, objective)
    apply_optimizations(run, trainer, data, blocks)
    show_plan(run, folder, model, data, trainer, device)
    metrics: dict[str, float] = {}
    if run.trainer.do_train:
        metrics |= train(run, folder, trainer, tokenizer, data, resumes)
    if run.trainer.do_eval:
        metrics |= numeric(trainer.evaluate())
    if run.trainer.do_predict:
        metrics |= run.stage.predict(run, folder, trainer, tokenizer, template, data)
    return finish(run, folder, trainer, metrics)


def finish(run: Run, folder: RunFolder, trainer: "GlmTrainer", metrics: dict[str, float]) -> dict[str, float]:
    """Pictures, the report, and metrics.json last: with it the run counts as finished."""
    from glmtuner.report import draw_loss, show_results, write_run

    metrics |= trainer.resources()
    if not ranks.is_main():
        return metrics
    if run.model.plot_loss and run.trainer.do_train:
        draw_loss(folder)
    closing = run.tracker.finish(folder.path, metrics)
    write_run(folder, metrics)
    write_json(folder / METRICS, metrics)
    show_results(folder)
    if closing:
        say(closing)
    return metrics
