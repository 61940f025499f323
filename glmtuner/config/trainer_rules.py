"""Values of the trainer that exclude each other, or that would have no effect together, without importing torch.

The first half of transformers' own checks; launch/rehearsal.py has those that need torch or the machine.
"""

from collections.abc import Iterator
from pathlib import Path

from glmtuner.config.checkpointing import KEYS, checkpointing_errors
from glmtuner.config.objective import less_is_better
from glmtuner.config.optimizers import optimizer_errors
from glmtuner.config.schedules import dictionary, schedule_errors
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.config.trainer_fields import shown
from glmtuner.errors import did_you_mean

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")
START_METHODS = ("fork", "spawn", "forkserver")


def trainer_errors(trainer: TrainerArguments) -> Iterator[str]:
    """One sentence for each pair of the trainer's own values that exclude each other."""
    yield from optimizer_errors(trainer)
    yield from schedule_errors(trainer)
    yield from _best_model_errors(trainer)
    yield from _precision_errors(trainer)
    yield from _worker_errors(trainer)
    yield from _dictionary_errors(trainer)
    yield from checkpointing_errors(trainer)
    if trainer.torch_compile_mode not in (None, *COMPILE_MODES):
        listed = f"legal: {', '.join(COMPILE_MODES)}"
        yield f"trainer.torch_compile_mode={trainer.torch_compile_mode}{did_you_mean(trainer.torch_compile_mode, COMPILE_MODES, listed)}"
    debug = trainer.debug.split() if isinstance(trainer.debug, str) else list(trainer.debug)
    for word in debug:
        if word == "tpu_metrics_debug":
            yield "trainer.debug=tpu_metrics_debug: glmtuner does not train on TPUs; leave it out"
        elif word != "underflow_overflow":
            yield f"trainer.debug={word}{did_you_mean(str(word), ['underflow_overflow'], 'legal: underflow_overflow')}"
    if trainer.train_sampling_strategy == "batch_rebalance":
        yield (
            "trainer.train_sampling_strategy=batch_rebalance: its order ignores trainer.seed, and it drops records on several ranks; "
            "type trainer.train_sampling_strategy=group_by_length"
        )
    if trainer.include_num_input_tokens_seen == "non_padding":
        yield (
            "trainer.include_num_input_tokens_seen=non_padding: transformers counts it by a mask, which batches without padding do "
            "not have; type trainer.include_num_input_tokens_seen=all (train_tokens_per_second never counts padding)"
        )
    elif trainer.include_num_input_tokens_seen not in ("all", "no", True, False):
        listed = "legal: all, no"
        yield (
            f"trainer.include_num_input_tokens_seen={trainer.include_num_input_tokens_seen}"
            f"{did_you_mean(str(trainer.include_num_input_tokens_seen), ['all', 'no'], listed)}"
        )
    if trainer.prediction_loss_only and trainer.predict_with_generate:
        yield "trainer.prediction_loss_only=true with trainer.predict_with_generate=true: no losses only, or no answers; leave one out"
    if trainer.push_to_hub and not trainer.do_train:
        yield (
            "trainer.push_to_hub=true without training: it uploads what the run trains; leave it out, and upload a finished run with "
            "`python -m glmtuner export <run folder> --to <folder> --push-to <organization>/<name>`"
        )
    if trainer.push_to_hub and trainer.hub_model_id is not None and trainer.hub_model_id.count("/") > 1:
        yield f"trainer.hub_model_id={trainer.hub_model_id}: a repository is <name> or <organization>/<name>"
    if trainer.hub_strategy.value not in ("every_save", "end"):
        yield (
            f"trainer.hub_strategy={trainer.hub_strategy.value}: checkpoints are not uploaded, trainer.push_to_hub=true uploads "
            "the finished run; type trainer.hub_strategy=end, or leave it out"
        )


def _best_model_errors(trainer: TrainerArguments) -> Iterator[str]:
    patience = getattr(trainer, "early_stopping_patience", None)
    if trainer.save_strategy == "best":
        if trainer.eval_strategy == "no":
            yield (
                "trainer.save_strategy=best with trainer.eval_strategy=no: nothing would be saved; type "
                "trainer.eval_strategy=steps or epoch"
            )
        if trainer.metric_for_best_model is None and not trainer.load_best_model_at_end:
            yield "trainer.save_strategy=best: best by which metric? type trainer.metric_for_best_model=loss, say"
    if not trainer.load_best_model_at_end:
        return
    stops = patience is not None
    setting = f"trainer.early_stopping_patience={patience}" if stops else "trainer.load_best_model_at_end=true"
    if not trainer.do_train:
        does = "ends a training" if stops else "loads the best checkpoint of a training"
        yield f"{setting} without training: it {does}; leave it out"
        return
    evaluates, saves = trainer.eval_strategy, trainer.save_strategy
    if saves != "best" and (evaluates == "no" or evaluates != saves):
        chosen = evaluates if evaluates != "no" else saves if saves != "no" else "epoch"
        yield (
            f"{setting} with trainer.eval_strategy={evaluates} and trainer.save_strategy={saves}: "
            f"{'it loads the best checkpoint at the end, so ' if stops else ''}both must be the same, steps or epoch; type trainer.eval_strategy={chosen} trainer.save_strategy={chosen}"
        )
        return
    eval_steps, save_steps = trainer.eval_steps or trainer.logging_steps, trainer.save_steps
    if evaluates == "steps" and eval_steps > trainer.max_steps > 0 and eval_steps >= 1:
        yield (
            f"{setting} with trainer.eval_steps={eval_steps:g} and trainer.max_steps={trainer.max_steps}: the training ends before "
            "its first evaluation; type a smaller trainer.eval_steps"
        )
    if saves != "steps" or evaluates != "steps":
        return
    is_share = (eval_steps < 1, save_steps < 1)
    if is_share[0] != is_share[1]:
        yield (
            f"{setting} with trainer.eval_steps={eval_steps:g} and trainer.save_steps={save_steps:g}: one is a share of all steps and "
            f"the other a number; type trainer.save_steps={eval_steps:g}"
        )
    elif round(save_steps * 1_000_000) % round(eval_steps * 1_000_000):
        yield (
            f"{setting} with trainer.eval_steps={eval_steps:g} and trainer.save_steps={save_steps:g}: every checkpoint needs an "
            f"evaluation, so that trainer.save_steps is a multiple of trainer.eval_steps; type trainer.save_steps={eval_steps:g}"
        )


def _precision_errors(trainer: TrainerArguments) -> Iterator[str]:
    if trainer.fp16 and trainer.bf16:
        yield "trainer.fp16=true with trainer.bf16=true: choose one"
    if trainer.fp16_full_eval and trainer.bf16_full_eval:
        yield "trainer.fp16_full_eval=true with trainer.bf16_full_eval=true: choose one"


def _worker_errors(trainer: TrainerArguments) -> Iterator[str]:
    context = trainer.dataloader_multiprocessing_context
    if context not in (None, *START_METHODS):
        listed = f"legal: {', '.join(START_METHODS)}"
        yield f"trainer.dataloader_multiprocessing_context={context}{did_you_mean(context, START_METHODS, listed)}"
    for name, value in (
        ("prefetch_factor", trainer.dataloader_prefetch_factor),
        ("persistent_workers", trainer.dataloader_persistent_workers or None),
        ("multiprocessing_context", context),
    ):
        if value is not None and trainer.dataloader_num_workers == 0:
            yield (
                f"trainer.dataloader_{name}={shown(value)} with trainer.dataloader_num_workers=0: there are no workers; type "
                "trainer.dataloader_num_workers=2, or leave it out"
            )


def _dictionary_errors(trainer: TrainerArguments) -> Iterator[str]:
    for name in KEYS:
        try:
            dictionary(getattr(trainer, name))
        except ValueError:
            yield f"trainer.{name}={getattr(trainer, name)}: expected a dictionary; type 'trainer.{name}={{<name>: <value>}}'"
    config = trainer.accelerator_config
    if isinstance(config, str) and not config.startswith("{") and not Path(config).expanduser().is_file():
        yield f"trainer.accelerator_config={config}: no such file; type 'trainer.accelerator_config={{even_batches: false}}', say"
    new, old = trainer.activation_checkpointing, trainer.gradient_checkpointing
    if new is not None and old is not None and new != old:
        yield (
            f"trainer.activation_checkpointing={shown(new)} with trainer.gradient_checkpointing={shown(old)}: two names of one "
            "thing; leave gradient_checkpointing out"
        )


def is_greater_better(trainer: TrainerArguments) -> bool | None:
    """Whether a larger value of trainer.metric_for_best_model is better; None without one.

    transformers goes by the name's end alone: a perplexity would be better when it is larger.
    """
    if trainer.greater_is_better is not None or trainer.metric_for_best_model is None:
        return trainer.greater_is_better
    return not less_is_better(trainer.metric_for_best_model)
