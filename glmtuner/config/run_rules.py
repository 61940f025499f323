"""Values of the trainer that the rest of the run excludes, or that have no effect on it."""

import math
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf

from glmtuner.config.datasets import as_override, labels_of
from glmtuner.config.offline import VARIABLE as OFFLINE
from glmtuner.config.offline import offline_folder
from glmtuner.config.optimizers import LOMO, WHOLE_WEIGHTS
from glmtuner.config.schema import Run, hints_of
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.config.trainer_fields import shown
from glmtuner.errors import did_you_mean

# What an evaluation's history line also has, besides the losses and scores.
TIMINGS = ("runtime", "samples_per_second", "steps_per_second")


def run_errors(run: Run) -> Iterator[str]:
    """One sentence for each value of the trainer that the rest of the run excludes."""
    trainer, bits = run.trainer, run.quant.quantization_bit
    if trainer.label_smoothing_factor and not run.stage.models_loss and trainer.do_train:
        own = "stage.label_smoothing" if hasattr(run.stage, "label_smoothing") else None
        yield (
            f"trainer.label_smoothing_factor={trainer.label_smoothing_factor:g} with stage={run.stage.name}: it smooths the "
            f"labels of a language model's loss; {f'type {own}={trainer.label_smoothing_factor:g}' if own else 'leave it out'}"
        )
    measures = trainer.do_eval or trainer.eval_strategy != "no" or trainer.eval_on_start
    if trainer.dataloader_drop_last and measures and trainer.per_device_eval_batch_size > 1:
        yield (
            "trainer.dataloader_drop_last=true with evaluations: transformers drops the incomplete last batch of an evaluation, too, "
            "and its records would not be measured; type trainer.per_device_eval_batch_size=1, or leave it out"
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(trainer, name) and bits is not None:
            yield f"trainer.{name}=true with quant=int{bits}: integer weights are not cast; leave it out"
        elif getattr(trainer, name) and not (trainer.do_eval or trainer.do_predict):
            yield f"trainer.{name}=true without trainer.do_eval=true: evaluations during the training use its precision; leave it out"
    for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph"):
        value = getattr(trainer, f"ddp_{name}")
        if value is not None and run.parallel.name != "ddp":
            yield f"trainer.ddp_{name}={shown(value)} with parallel={run.parallel.name}: it is DistributedDataParallel's; type parallel=ddp, or leave it out"
    yield from _offline_errors(run)
    yield from _method_errors(run)
    yield from _optimizer_errors(run)
    yield from _metric_errors(run)


def _offline_errors(run: Run) -> Iterator[str]:
    """What a run excludes that must not use the network."""
    folder = offline_folder()
    if folder is not None and run.model.cache_dir is not None:
        yield f"model.cache_dir={run.model.cache_dir} with {OFFLINE}={folder}, which is the cache of everything; leave it out"
    if folder is not None and run.trainer.push_to_hub:
        yield f"trainer.push_to_hub=true with {OFFLINE}={folder}: an upload needs the network; leave it out, or unset {OFFLINE}"


def _method_errors(run: Run) -> Iterator[str]:
    """What a method that reads the gradients of every optimizer step excludes."""
    trainer, name = run.trainer, run.finetuning.finetuning_type
    if not (trainer.do_train and run.finetuning.follows_steps):
        return
    kind = f"finetuning={name} finetuning.peft_type={getattr(run.finetuning, 'peft_type', name)}"
    if not run.stage.weighs:  # it takes several optimizer steps in one of the trainer's
        yield f"{kind} with stage={run.stage.name}, whose optimizer steps it does not see; type finetuning=lora"
    if run.parallel.sharded:
        yield f"{kind} with parallel={run.parallel.name}: it needs whole gradients; type parallel=ddp"
    if trainer.optim.value in LOMO:
        yield f"{kind} with trainer.optim={trainer.optim.value}, which keeps no gradients; type trainer.optim=adamw_torch"
    if trainer.fp16:
        yield f"{kind} with trainer.fp16=true, which skips steps whose gradients overflow; type trainer.bf16=true"


def _optimizer_errors(run: Run) -> Iterator[str]:
    trainer, ratio = run.trainer, getattr(run.finetuning, "loraplus_lr_ratio", None)
    setting = f"trainer.optim={trainer.optim.value}"
    if not trainer.do_train:
        return
    if run.parallel.sharded and trainer.optim.value in WHOLE_WEIGHTS:
        yield (
            f"{setting} with parallel={run.parallel.name}: it needs whole weights, and a process has shards of them; type "
            "parallel=ddp, or trainer.optim=adamw_torch"
        )
    if trainer.optim.value in LOMO:
        rates = {"trainer.layerwise_lr_decay": trainer.layerwise_lr_decay, "finetuning.loraplus_lr_ratio": ratio}
        for key, value in rates.items():
            if value is not None:
                yield f"{key}={value:g} with {setting}, which has one learning rate; leave one of the two out"
        if run.parallel.several:
            yield f"{setting} with parallel={run.parallel.name}: its steps within the backward pass know one process; type parallel=none"


def _metric_errors(run: Run) -> Iterator[str]:
    """The metric of the best model is one that every evaluation measures, as far as stage and metric declare them."""
    trainer = run.trainer
    asked = trainer.metric_for_best_model
    if asked is None or trainer.eval_strategy == "no" or not trainer.do_train:
        return
    measured = measured_by(run)
    name = asked.removeprefix("eval_")
    if measured is None or name in measured:
        return
    scores = _score_names(run)
    if scores is not None and name in scores:
        yield (
            f"trainer.metric_for_best_model={asked}: evaluations measure it only with generated answers; type "
            "trainer.predict_with_generate=true"
        )
        return
    listed = f"the evaluations of stage={run.stage.name} measure {', '.join(measured)}"
    yield f"trainer.metric_for_best_model={asked}{did_you_mean(name, measured, listed)}"


def measured_by(run: Run) -> tuple[str, ...] | None:
    """The metrics of the run's evaluations, without eval_; None where a plugin does not declare them."""
    names = run.stage.evaluates
    if names is None:
        return None
    names = (*names, *(f"reward_{name}" for name in run.reward))
    if run.trainer.predict_with_generate:
        scores = _score_names(run)
        if scores is None:
            return None
        names = (*names, *scores)
    labels = labels_of(run.data.eval_dataset or run.data.dataset).values()
    return (*names, *TIMINGS, *(f"{label}_{name}" for label in labels for name in names))


def _score_names(run: Run) -> tuple[str, ...] | None:
    """The names of the metric's scores, of an empty answer; None where the metric cannot say."""
    try:
        return tuple(run.metric.score("", ""))
    except Exception:  # a user's own metric, which may refuse an empty answer
        return None


def unused_values(run: Run) -> Iterator[str]:
    """One sentence for each value that is legal and has no effect on this run."""
    trainer = run.trainer
    if not trainer.do_train:
        return
    for strategy, names in (("eval_strategy", ("eval_steps", "eval_delay")), ("save_strategy", ("save_total_limit",))):
        for name in names:
            if getattr(trainer, strategy) == "no" and getattr(trainer, name):
                yield f"trainer.{name}={getattr(trainer, name):g} has no effect: trainer.{strategy}=no"
    if trainer.eval_strategy == "epoch" and trainer.eval_steps is not None:
        yield f"trainer.eval_steps={trainer.eval_steps:g} has no effect: trainer.eval_strategy=epoch"
    for strategy, name in (("save_strategy", "save_steps"), ("logging_strategy", "logging_steps")):
        value = getattr(trainer, name)
        if getattr(trainer, strategy) != "steps" and value != getattr(TrainerArguments, name):
            yield f"trainer.{name}={value:g} has no effect: trainer.{strategy}={getattr(trainer, strategy)}"
    if run.data.weights and len({*run.data.weights}) == 1:
        yield f"data.weights={as_override(run.data.weights)} has no effect: all datasets weigh the same, and weights are relative"
    if trainer.metric_for_best_model is not None and trainer.eval_strategy == "no":
        yield f"trainer.metric_for_best_model={trainer.metric_for_best_model} has no effect: trainer.eval_strategy=no"
    if (
        trainer.greater_is_better is not None
        and trainer.metric_for_best_model is None
        and not trainer.load_best_model_at_end
    ):
        yield f"trainer.greater_is_better={shown(trainer.greater_is_better)} has no effect without trainer.metric_for_best_model"
    yield from _unused_by_early_stopping(run)
    ratio, of_embeddings = (getattr(run.finetuning, f"loraplus_lr_{name}", None) for name in ("ratio", "embedding"))
    if ratio is None and of_embeddings != getattr(type(run.finetuning), "loraplus_lr_embedding", None):
        yield f"finetuning.loraplus_lr_embedding={of_embeddings:g} has no effect without finetuning.loraplus_lr_ratio"
    evaluates = trainer.do_eval or trainer.do_predict or trainer.eval_strategy != "no" or trainer.eval_on_start
    if trainer.predict_with_generate and not evaluates:
        yield "trainer.predict_with_generate=true has no effect: the run neither evaluates nor predicts"
    if trainer.liger_kernel_config and not trainer.use_liger_kernel:
        yield "trainer.liger_kernel_config has no effect without trainer.use_liger_kernel=true"
    if not trainer.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_token"):
            if getattr(trainer, name) is not None:
                yield f"trainer.{name} has no effect without trainer.push_to_hub=true"


def _unused_by_early_stopping(run: Run) -> Iterator[str]:
    trainer = run.trainer
    patience, threshold = trainer.early_stopping_patience, trainer.early_stopping_threshold
    if patience is None:
        if threshold:
            yield f"trainer.early_stopping_threshold={threshold:g} has no effect without trainer.early_stopping_patience"
        return
    evaluations: float = math.inf
    every = trainer.eval_steps or trainer.logging_steps
    if trainer.eval_strategy == "steps" and every < 1:
        evaluations = 1 / every
    elif trainer.eval_strategy == "steps" and trainer.max_steps > 0:
        evaluations = trainer.max_steps / every
    elif trainer.eval_strategy == "epoch" and trainer.max_steps < 0:
        evaluations = trainer.num_train_epochs
    if patience >= evaluations:
        yield (
            f"trainer.early_stopping_patience={patience} cannot end the training before its last step: it has "
            f"{math.ceil(evaluations)} evaluations"
        )


def nested_values(config: DictConfig) -> Iterator[str]:
    """One sentence for each list of plain values that holds a list or a dictionary, which OmegaConf lets pass."""
    named = [
        name
        for name in map(str, config)
        if not (OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name))
    ]
    owners = [("", config), *((f"{name}.", config[name]) for name in named)]
    for prefix, owner in owners:
        cls = OmegaConf.get_type(owner) if isinstance(owner, DictConfig) else None
        for name, hint in hints_of(cls).items() if cls is not None and is_dataclass(cls) else ():
            if not {list[str], list[int], list[float], list[bool]} & {hint, *typing.get_args(hint)}:
                continue
            if OmegaConf.is_missing(owner, name) or OmegaConf.is_interpolation(owner, name):
                continue
            value = owner.get(name)
            wrong = [part for part in value or [] if isinstance(part, (ListConfig, DictConfig))]
            if wrong:
                key = f"{prefix}{name}"
                yield f"{key}: its list holds {OmegaConf.to_container(wrong[0])!r}; legal are plain values, as in {key}=[a,b]"
