"""Training to the end, and what it leaves in the run folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.schema import Run
from glmtuner.console import say
from glmtuner.distributed import ranks
from glmtuner.distributed.preemption import capture_signals
from glmtuner.errors import CheckpointError
from glmtuner.inference.predict import answer_all
from glmtuner.run_folder.checkpoints import latest_complete_checkpoint
from glmtuner.run_folder.folder import RunFolder
from glmtuner.run_folder.names import EVALUATIONS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets
    from glmtuner.objectives.objective import Objective
    from glmtuner.training.trainer import GlmTrainer


def make_trainer(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
    arguments: Any,
    objective: "Objective | None",
) -> "GlmTrainer":
    from glmtuner.training.trainer import GlmTrainer

    arguments.remove_unused_columns = False  # a batch is made of all columns, whatever a model's forward is called with
    generates = run.trainer.predict_with_generate and data.evaluation is not None

    def score(step: int) -> dict[str, float]:
        return answer_all(run, folder, model, tokenizer, template, data, folder / EVALUATIONS / f"step-{step}.jsonl")

    return GlmTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation.select_columns(list(data.columns)) if data.evaluation is not None else None,
        data_collator=run.stage.collator(
            pad_id=tokenizer.pad_token_id, ignore_pad_token_for_loss=run.data.ignore_pad_token_for_loss
        ),
        finetuning=run.finetuning,
        tracker=run.tracker,
        folder=folder,
        score=score if generates else None,
        sharded=run.parallel.sharded and ranks.world_size() > 1,
        objective=objective,
        derived=run.stage.derived,
    )


def train(
    run: Run,
    folder: RunFolder,
    trainer: "GlmTrainer",
    tokenizer: "PreTrainedTokenizerBase",
    data: "Datasets",
    resumes: bool,
) -> dict[str, float]:
    """Train to the end, from the newest whole checkpoint when there is one; save what was trained and read it back."""
    from glmtuner.training.callbacks import StopWhenAsked
    from glmtuner.training.preflight import check_first_batch

    checkpoint = Path(run.trainer.resume_from_checkpoint) if run.trainer.resume_from_checkpoint else None
    if resumes and checkpoint is None:
        checkpoint, passed = ranks.broadcast_from_rank0(
            lambda: latest_complete_checkpoint(folder.path, ranks.world_size())
        )
        for sentence in passed:
            say(sentence)
        say(f"resumed from {checkpoint.name}" if checkpoint else "no whole checkpoint yet: started again from step 0")
    if checkpoint is not None:
        require_resumable(checkpoint)
        trainer.args.eval_on_start = False
    assert data.train is not None
    collate = trainer.data_collator
    trainer.checkpoint_activations()
    check_first_batch(
        trainer.model,
        collate([trainer.train_dataset[0]]),
        trainer.accelerator.autocast,
        lambda: generation_smoke_test(trainer.model, tokenizer, data.train[0]),
        trainer.objective.trial if trainer.objective is not None else None,
    )
    with capture_signals() as asked:
        trainer.add_callback(StopWhenAsked(asked))
        out = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if asked.signum is not None and trainer.state.global_step < trainer.state.max_steps:
        run.tracker.abandon(preempted=True)
        raise asked.preempted(trainer.state.global_step)
    save_trained(run, folder, trainer.model, tokenizer, trainer.objective)
    return numeric(out.metrics)


def require_resumable(checkpoint: Path) -> None:
    from glmtuner.run_folder.checkpoints import checkpoint_problem

    reason = checkpoint_problem(checkpoint, ranks.world_size()) if checkpoint.is_dir() else "no such folder"
    if reason:
        raise CheckpointError(
            f"trainer.resume_from_checkpoint={checkpoint} cannot be resumed from: {reason}; name another checkpoint, or leave "
            "it out: the same command with the same trainer.output_dir takes the newest whole one"
        )


def generation_smoke_test(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> None:
    """Generate two tokens: a model that trains and cannot generate is found out now, not at the end."""
    from glmtuner.inference.generate import Decoding, answers

    labels = row.get("labels", [-100] * len(row["input_ids"]))
    prompt = [token for token, label in zip(row["input_ids"], labels, strict=True) if label < 0]
    decoding = Decoding(
        max_new_tokens=2, num_beams=1, repetition_penalty=1.0, stop_ids=(), pad_id=tokenizer.pad_token_id
    )
    list(answers(model, [prompt or row["input_ids"][:1]], decoding, batch_size=1))


def save_trained(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    objective: "Objective | None",
) -> None:
    """Write adapter/ or model/ whole or not at all, and compare what was written with what was trained (CET#262)."""
    from glmtuner.finetuning.trained import digest_of, gathered

    final = folder / run.finetuning.saved_as
    partial = final.with_name(f".{final.name}.partial")
    with gathered(model, everything=run.finetuning.saved_as == "model"):
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            run.finetuning.save(model, partial)
            tokenizer.save_pretrained(partial)
            if objective is not None:
                objective.save(partial)
            trained = digest_of(model)
            run.finetuning.restore(model, partial)
            if digest_of(model) != trained:
                raise CheckpointError(
                    f"what was written to {partial} is not what was trained; is the disk full or failing?"
                )
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    ranks.barrier()


def numeric(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
