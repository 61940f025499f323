"""The Trainer of a run, training, and saving what was trained in the run folder."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from glmtuner.console import complain, say
from glmtuner.distributed import ranks
from glmtuner.distributed.pause import Paused
from glmtuner.distributed.preemption import capture_signals
from glmtuner.errors import CheckpointError, GlmtunerError, TrainingError
from glmtuner.inference.context import RunContext
from glmtuner.inference.predict import answer_all
from glmtuner.launch.device import place_model
from glmtuner.launch.optimizations import TrainingBatches
from glmtuner.launch.pause import evaluate_pause, pause_of
from glmtuner.launch.resume import lies_in
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint, saved_ranks, step_of
from glmtuner.run_folder.folder import RunFolder, is_out_of_memory
from glmtuner.run_folder.names import EVALUATIONS, KEPT
from glmtuner.stages.stage import learning_stage
from glmtuner.templates.base import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainingArguments

    from glmtuner.objectives.objective import Objective
    from glmtuner.training.trainer import GlmTrainer


def make_trainer(
    context: RunContext,
    arguments: "Seq2SeqTrainingArguments",
    batches: TrainingBatches,
    objective: "Objective | None",
    kind: "Callable[..., GlmTrainer] | None" = None,
) -> "GlmTrainer":
    """The Trainer of the run, on the model and the batches that optimizations were applied to; `kind` takes the place of its class."""
    from glmtuner.models.unwrap import unwrapped
    from glmtuner.training.early_stopping import EarlyStopping
    from glmtuner.training.optimizers import Optimizers
    from glmtuner.training.trainer import GlmTrainer

    run, data = context.run, context.data
    patience, threshold = run.trainer.early_stopping_patience, run.trainer.early_stopping_threshold
    arguments.remove_unused_columns = False  # a batch is made of all columns, whatever the model's forward accepts
    arguments.train_sampling_strategy = batches.sampling
    generates = run.trainer.predict_with_generate and data.evaluation is not None

    def score(step: int) -> dict[str, float]:
        return answer_all(context, context.folder / EVALUATIONS / f"step-{step}.jsonl")

    return (kind or GlmTrainer)(
        model=context.model,
        args=arguments,
        train_dataset=batches.rows,
        eval_dataset=data.evaluation.select_columns(list(data.columns)) if data.evaluation is not None else None,
        data_collator=batches.collator,
        finetuning=context.finetuning,
        tracker=context.tracker,
        folder=context.folder,
        score=score if generates else None,
        sharded=run.parallel.sharded and ranks.world_size() > 1,
        sequence=run.parallel.ranks_per_row,
        objective=objective,
        derived=learning_stage(run).derived,
        chunks_loss=batches.chunks_loss,
        by_probability=run.stage.by_probability,
        left_out=batches.left_out,
        evaluated_parts=data.evaluated_parts(),
        optimizers_of_run=Optimizers(
            run.trainer, context.finetuning, lambda: context.family.blocks(unwrapped(context.model))
        ),
        early_stopping=EarlyStopping(patience, threshold) if patience is not None else None,
        plain_lines=bool(run.trainer.disable_tqdm),
        async_save=run.trainer.async_save,
    )


def train(
    context: RunContext, trainer: "GlmTrainer", resumes: bool, checkpoint: Path | None = None
) -> dict[str, float]:
    """Train, then save and verify; returns the training's metrics.

    The training continues from `checkpoint`, and from the folder's latest complete one if the run is resumed and that one is
    later or there is no other. Raises Preempted if a signal stops it, and Paused at the pause that the environment asks for.
    """
    from glmtuner.training.callbacks import StopAtPause, StopOnBudget, StopOnSignal
    from glmtuner.training.divergence import require_finite_weights, require_steps
    from glmtuner.training.preflight import check_first_batch
    from glmtuner.training.schedule import FollowSchedule

    data = context.data
    checkpoint, notices = checkpoint_to_continue(context.folder, resumes, checkpoint)
    for sentence in notices:
        say(sentence)
    if checkpoint is not None:
        say(
            f"resumed from {checkpoint.name}"
            if checkpoint.is_relative_to(context.folder.path)
            else f"resumed from {checkpoint}"
        )
        if (before := saved_ranks(checkpoint)) != ranks.world_size():
            say(
                f"number of processes: {ranks.world_size()}, {before} until here: the rows of every step are the same, what is drawn at "
                "random from here on, such as dropout, is not"
            )
        trainer.args.eval_on_start = False
    assert data.train is not None and trainer.train_dataset is not None
    first_row = data.train[0]
    trainer.checkpoint_activations()
    first_batch = trainer.data_collator([trainer.train_dataset[0]])
    loss_of = trainer.objective.preflight_loss if trainer.objective is not None else None
    check_first_batch(
        trainer.model,
        first_batch,
        trainer.accelerator.autocast,
        lambda: generation_smoke_test(trainer.model, context.tokenizer, first_row),
        partial(trainer.weighted_sum, trainer.model) if "weights" in first_batch or trainer.sequence > 1 else loss_of,
        anywhere=bool if trainer.sequence == 1 else lambda here: any(ranks.all_gather(here)),
    )
    if (pause := pause_of(context)) is not None:
        trainer.pause = pause
        trainer.add_callback(StopAtPause(pause))
    with capture_signals() as capture:
        trainer.add_callback(StopOnBudget(capture))  # before what asks for the signal
        trainer.add_callback(StopOnSignal(capture))
        trainer.add_callback(FollowSchedule())
        out = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stopped_early = trainer.early_stopping is not None and trainer.early_stopping.stops
    if capture.signum is not None and trainer.state.global_step < trainer.state.max_steps and not stopped_early:
        context.tracker.abandon(preempted=True)
        raise capture.preempted(trainer.state.global_step)
    if pause is not None and not stopped_early and trainer.state.global_step < trainer.state.max_steps:
        evaluate_pause(context, trainer, pause)
        context.tracker.abandon(preempted=True)
        raise Paused(pause, trainer.state.global_step, trainer.state.max_steps)
    first = step_of(checkpoint) if checkpoint is not None else 0
    if trainer.state.global_step == 0:
        raise TrainingError(
            f"trainer.max_steps={trainer.args.max_steps}: the training ended before its first step; check "
            "trainer.num_train_epochs, trainer.per_device_train_batch_size and trainer.dataloader_drop_last against the number of "
            "records"
        )
    last = trainer.state.global_step
    if last == first and trainer.args.eval_strategy == "epoch" and not evaluated_at(context.folder, last):
        trainer.evaluate()  # the run was killed between its last checkpoint and this
    require_steps(trainer.optimizer_steps.steps, last)
    require_finite_weights(trainer.model.parameters(), trainer.args)
    save_trained(context, trainer.objective)
    metrics = numeric(out.metrics)
    if trainer.early_stopping is not None:
        metrics |= {
            "stopped_early": int(stopped_early),
            "last_step": last,
            "best_step": trainer.state.best_global_step or last,
        }
    return metrics


def checkpoint_to_continue(folder: RunFolder, resumes: bool, checkpoint: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that the training goes on from, if any, and what is to be said about it."""
    if not resumes or (checkpoint is not None and lies_in(checkpoint, folder.path)):
        return checkpoint, []
    latest, notices = ranks.broadcast_from_rank0(lambda: latest_complete_checkpoint(folder.path, ranks.world_size()))
    if checkpoint is None or (latest is not None and step_of(latest) > step_of(checkpoint)):
        checkpoint = latest
    if checkpoint is None:
        notices = [*notices, "no complete checkpoint yet: training starts again from step 0"]
    return checkpoint, list(notices)


def initialize_method(context: RunContext, device: "torch.device", resumes: bool, checkpoint: Path | None) -> None:
    """Let the method take its first values from the rows of the training, or its shapes from the checkpoint that it goes on from."""
    from glmtuner.data.collate import Collator

    run, data = context.run, context.data
    if data.train is None or not run.trainer.do_train:
        return
    place_model(run, context.model, device)
    columns = [name for name in ("input_ids", "labels") if name in data.train.column_names]
    context.finetuning.initialize(
        context.model,
        data.train.select_columns(columns),
        Collator(pad_id=context.tokenizer.pad_token_id),
        run.trainer.seed,
        checkpoint_to_continue(context.folder, resumes, checkpoint)[0],
    )


def evaluated_at(folder: RunFolder, step: int) -> bool:
    """Whether the history has an evaluation at that step."""
    return any(line["step"] == step and any(name.startswith("eval_") for name in line) for line in folder.history())


def generation_smoke_test(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]
) -> None:
    """Generate two tokens, so that a model that trains but cannot generate fails before step 1."""
    from glmtuner.inference.generate import Decoding, answers

    labels = row.get("labels", [IGNORE_INDEX] * len(row["input_ids"]))
    prompt = [token for token, label in zip(row["input_ids"], labels, strict=True) if label == IGNORE_INDEX]
    decoding = Decoding(
        max_new_tokens=2, num_beams=1, repetition_penalty=1.0, stop_ids=(), pad_id=tokenizer.pad_token_id
    )
    list(answers(model, [prompt or row["input_ids"][:1]], decoding, batch_size=1))


def save_trained(context: RunContext, objective: "Objective | None") -> None:
    """Write adapter/ or model/ atomically, and verify that it holds the trained parameters bit for bit (CET#262).

    Whatever fails, the trained parameters are kept.
    """
    from glmtuner.distributed.shards import is_sharded
    from glmtuner.finetuning.trained import gathered

    model, finetuning = context.model, context.finetuning
    final = context.folder / finetuning.saved_as
    partial = final.with_name(f".{final.name}.partial")
    if finetuning.saved_as == "model" and is_sharded(model):
        save_in_stream(context, objective, partial)
    else:
        with gathered(model, everything=finetuning.saved_as == "model"):
            if ranks.is_main():
                save_gathered(context, objective, partial)
    if ranks.is_main():
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    ranks.barrier()


def save_gathered(context: RunContext, objective: "Objective | None", partial: Path) -> None:
    """Write and verify the folder of the trained weights on this rank, which has them whole."""
    from glmtuner.finetuning.trained import TRAINED, differing, misread, save_tensors, trained_parameters

    model, finetuning = context.model, context.finetuning
    try:
        shutil.rmtree(partial, ignore_errors=True)
        finetuning.save(model, partial)
        context.tokenizer.save_pretrained(partial)
        if objective is not None:
            objective.save(partial)
        if finetuning.saved_as == "model":
            wrong = differing(model, partial)
        else:
            wrong = misread(model, lambda: finetuning.restore(model, partial))
        require_none_differ(wrong, partial)
    except Exception as error:
        kept = keep_trained(context, partial, lambda path: save_tensors(trained_parameters(model), path / TRAINED))
        raise_and_tell(error, partial, kept)


def save_in_stream(context: RunContext, objective: "Objective | None", partial: Path) -> None:
    """Write and verify the folder of a sharded model that was trained whole, of which each rank gathers one layer at a time.

    A collective, which raises the error of any rank on every rank.
    """
    from glmtuner.finetuning.streamed import Failures, differing_on_ranks, save_model, save_tensors_of_ranks
    from glmtuner.finetuning.trained import TRAINED, VALUE_HEAD, gathered, trained_parameters

    model, failures = context.model, Failures()
    try:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial, [f"{VALUE_HEAD}."])
        with gathered(model, everything=False, beginning=f"{VALUE_HEAD}."), failures.kept():
            if ranks.is_main():
                context.tokenizer.save_pretrained(partial)
                if objective is not None:
                    objective.save(partial)
        failures.settle()
        require_none_differ(differing_on_ranks(model, partial), partial)
    except Exception as error:
        kept = keep_trained(
            context, partial, lambda path: save_tensors_of_ranks(trained_parameters(model), path / TRAINED)
        )
        if not ranks.is_main():
            raise ranks.ReportedByRank0(str(error)) from error
        raise_and_tell(error, partial, kept)


def require_none_differ(wrong: list[str], partial: Path) -> None:
    """Raise CheckpointError if weights that were read back differ from the trained ones."""
    if wrong:
        raise CheckpointError(
            f"the weights read back from {partial} are not the trained ones ({len(wrong)} differ, such as {wrong[0]}); "
            "check the disk, and type the same command again"
        )


def raise_and_tell(error: Exception, partial: Path, kept: str) -> NoReturn:
    """Raise the error of a folder that could not be written, with the sentence about what is kept."""
    if isinstance(error, GlmtunerError):
        raise CheckpointError(f"{error}; {kept}") from error
    if isinstance(error, OSError) or is_out_of_memory(error):  # whose sentences are made elsewhere
        complain(kept)
        raise error
    reason = " ".join(str(error).split())[:300]
    raise CheckpointError(f"{partial} could not be written ({type(error).__name__}: {reason}); {kept}") from error


def keep_trained(context: RunContext, partial: Path, save: "Callable[[Path], None]") -> str:
    """Write the trained parameters by their names in the model, where the folder to save could not be; returns a sentence."""
    from glmtuner.finetuning.trained import TRAINED

    kept = context.folder / KEPT
    try:
        try:
            save(kept)
        except OSError:  # a full disk: the unfinished folder makes room
            shutil.rmtree(partial, ignore_errors=True)
            save(kept)
    except Exception as error:
        shutil.rmtree(kept, ignore_errors=True)
        last = latest_complete_checkpoint(context.folder.path, ranks.world_size())[0]
        return f"the trained weights could not be kept either ({' '.join(str(error).split())[:200]}); " + (
            f"the last complete checkpoint is {last}" if last else "there is no complete checkpoint"
        )
    start = f"; type model.checkpoint_dir={kept} to start from them" if context.finetuning.saved_as == "model" else ""
    return f"the trained weights are kept in {kept / TRAINED}{start}"


def numeric(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics with numeric values."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
