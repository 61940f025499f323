"""Values of the trainer that exclude each other are refused when the configuration is composed; legal ones are not."""

import dataclasses
import functools
import inspect
import math
import re
import typing

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Seq2SeqTrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from typed_trainer import trainer_of

from glmtuner.config import optimizers, schedules
from glmtuner.config.compose import compose
from glmtuner.config.ranges import infinite_values
from glmtuner.config.run_rules import measured_by, run_errors, unused_values
from glmtuner.config.schema import legal_keys
from glmtuner.config.trainer_arguments import OptimizerNames
from glmtuner.config.trainer_fields import field_errors
from glmtuner.config.trainer_rules import trainer_errors
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()

BASE = ["model=tiny_glm", "tracker=none", "data.dev_ratio=0.1"]
BASE_RUN = compose(BASE).run
EVALUATES = ["data.dev_ratio=0.1", "trainer.eval_strategy=steps"]
BEST = [*EVALUATES, "trainer.load_best_model_at_end=true"]
EPOCHS = ["data.dev_ratio=0.1", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch"]


def refused(*words):
    """The answer to these words; Hydra composes them only where they are of more groups than the trainer."""
    alone = all(word.startswith(("trainer.", "data.dev_ratio=")) for word in words)
    with pytest.raises(ConfigError) as caught:
        if not alone:
            compose([*BASE, *words])
        run = dataclasses.replace(BASE_RUN, trainer=trainer_of(*words))
        if wrong := [*trainer_errors(run.trainer), *run_errors(run)]:
            raise ConfigError("; also: ".join(wrong))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(hint):
    return {int, float} & {
        hint,
        *typing.get_args(hint),
        *(arg for part in typing.get_args(hint) for arg in typing.get_args(part)),
    }


NUMBERS = sorted(key for key, hint in legal_keys().items() if names(hint))
NEGATIVE = {
    "trainer.max_steps": -2,  # -1 is legal
    "finetuning.num_layer_trainable": None,  # any number of layers
    **{key: None for key in legal_keys() if key.startswith("reward.") and key.endswith(".weight")},  # a penalty
}
OWNERS = {
    "lora": "finetuning=lora",
    "num_layer": "finetuning=freeze",
    "pre_seq": "finetuning=p_tuning",
    "block_length": "stage=pt",
}
STAGES = {
    "stage=kto": ("desirable_weight", "undesirable_weight"),
    "stage=dpo": ("beta", "label_smoothing", "sft_weight"),
    "stage=simpo": ("gamma",),
    "stage=grpo": ("epsilon", "epsilon_high", "microbatch_size", "num_generations", "num_iterations"),
}


def owner_of(key):
    """The preset whose class has the key."""
    group, _, leaf = key.partition(".")
    for start, preset in OWNERS.items():
        if leaf.startswith(start):
            return [preset]
    if group == "stage":
        stage = next((stage for stage, leaves in STAGES.items() if leaf in leaves), "stage=ppo")
        return [stage, *{"stage=ppo": ["model.reward_model=x"], "stage=grpo": ["reward=exact"]}.get(stage, [])]
    if group == "reward":
        return [
            "stage=grpo",
            f"reward={leaf.partition('.')[0]}",
            *(["model.reward_model=x"] if leaf.startswith("model.") else []),
        ]
    return {"quant": ["quant=int8"], "parallel": ["parallel=ddp"]}.get(group, [])


@functools.cache
def group_of(group, preset):
    run = compose([*BASE, *preset]).run
    return run.reward[group.partition(".")[2]] if group.startswith("reward.") else getattr(run, group)


@pytest.mark.parametrize("key", NUMBERS)
def test_no_numeric_key_takes_a_number_out_of_range(key):
    assert len(NUMBERS) > 60
    group, _, leaf = key.rpartition(".")
    owner = group_of(group, tuple(owner_of(key)))
    kind = float if float in names(legal_keys()[key]) else int
    wrong = [NEGATIVE.get(key, -7), 99999999999999999999]
    wrong = [*wrong[: 1 if kind is float else 2], *([math.nan, -math.inf] if kind is float else [])]
    for value in (number for number in wrong if number is not None):
        hint = str(legal_keys()[key])
        values = [kind(value)] if "list" in hint else {"q_proj": kind(value)} if "dict" in hint else kind(value)
        with pytest.raises(ConfigError, match=re.escape(key)):
            changed = dataclasses.replace(owner, **{leaf: values})
            wrong_ones = list(infinite_values(group, changed))
            if not wrong_ones and group == "trainer":
                wrong_ones = list(field_errors(changed))
            if wrong_ones:
                raise ConfigError("; ".join(wrong_ones))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.logging_steps=0"], "trainer.logging_steps=0"),
        (["trainer.warmup_steps=-3"], "trainer.warmup_steps=-3"),
        (["trainer.warmup_steps=2.5"], "trainer.warmup_steps=2.5"),
        (["trainer.label_smoothing_factor=1.5"], "a share in [0, 1)"),
        (["trainer.max_steps=0"], "or -1 for"),
        (["trainer.save_strategy=best", *EVALUATES], "type trainer.metric_for_best_model=loss"),
        (["trainer.save_strategy=best", "trainer.metric_for_best_model=loss"], "type trainer.eval_strategy=steps or epoch"),
        (["trainer.load_best_model_at_end=true"], "both must be the same"),
        ([*BEST, "trainer.save_strategy=epoch"], "both must be the same"),
        ([*BEST, "trainer.eval_steps=2", "trainer.save_steps=3"], "type trainer.save_steps=2"),
        ([*BEST, "trainer.eval_steps=0.1", "trainer.save_steps=0.25"], "type trainer.save_steps=0.1"),
        ([*BEST, "trainer.eval_steps=0.5", "trainer.save_steps=4"], "one is a share"),
        ([*BEST, "trainer.save_steps=3", "trainer.logging_steps=2"], "type trainer.save_steps=2"),  # eval_steps=logging_steps
        ([*BEST, "trainer.max_steps=4", "trainer.eval_steps=5", "trainer.save_steps=5"], "ends before its first evaluation"),
        (["trainer=evaluate", "trainer.load_best_model_at_end=true"], "without training"),
        ([*EVALUATES, "trainer.metric_for_best_model=accurracy"], "measure loss"),
        ([*EVALUATES, "trainer.metric_for_best_model=rouge-l"], "type trainer.predict_with_generate=true"),
        (["stage=dpo", *EVALUATES, "trainer.metric_for_best_model=accurcy"], "did you mean 'accuracy'?"),
        (["stage=dpo", "trainer.label_smoothing_factor=0.1"], "type stage.label_smoothing=0.1"),
        (["stage=rm", "trainer.label_smoothing_factor=0.1"], "leave it out"),
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "needs a smallest learning rate"),
        (["trainer.lr_scheduler_type=cosine_warmup_with_min_lr"], "needs a smallest learning rate"),
        (["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 0.000001, min_lr_rate: 0.1}"], "either"),
        (["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 0.1}"], "below its peak"),
        (["trainer.lr_scheduler_type=warmup_stable_decay"], "num_decay_steps"),
        (
            ["trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs={num_decay_steps: 9}", "trainer.max_steps=4"],
            "its phases take 9 steps",
        ),
        (["trainer.lr_scheduler_type=polynomial", "trainer.lr_scheduler_kwargs={lr_end: 1}"], "below its peak"),
        (["trainer.lr_scheduler_type=greedy", *EVALUATES], "below its peak"),  # transformers' min_lr is 1e-3
        (["trainer.lr_scheduler_type=reduce_lr_on_plateau"], "after evaluations"),
        (["trainer.lr_scheduler_type=reduce_lr_on_plateau", *EVALUATES, "trainer.lr_scheduler_kwargs={factor: 2}"], "from 0 to 1"),
        (["trainer.lr_scheduler_type=cosine", "trainer.lr_scheduler_kwargs={num_cycle: 2}"], "did you mean 'num_cycles'?"),
        (["trainer.lr_scheduler_kwargs={num_cycles: 2}"], "it has no arguments"),
        (["trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={power: 2}"], "it has no arguments"),
        (["trainer.lr_scheduler_type=constant", "trainer.warmup_steps=5"], "constant_with_warmup"),
        (["trainer.lr_scheduler_type=constant", "trainer.warmup_ratio=0.1"], "constant_with_warmup"),
        (["trainer.lr_scheduler_kwargs=power"], "expected a dictionary"),
        (["trainer.optim=apollo_adamw"], "pip install apollo-torch"),
        (["trainer.optim=schedule_free_adamw"], "pip install schedulefree"),
        (['trainer.optim_args="amsgrad=true"'], "would be ignored"),
        (["trainer.optim=sgd", 'trainer.optim_args="momentm=0.9"'], "did you mean 'momentum'?"),
        (["trainer.optim=sgd", 'trainer.optim_args="momentum"'], "expected <name>=<value>"),
        (["trainer.optim=sgd", 'trainer.optim_args="momentum=a"'], "a number"),
        (["trainer.optim=sgd", 'trainer.optim_args="nesterov=true"'], "needs a momentum"),
        (["trainer.optim=sgd", 'trainer.optim_args="weight_decay=0.1"'], "type trainer.weight_decay=0.1"),
        (["trainer.optim=adafactor", "trainer.adam_beta1=0.5"], "no such argument"),
        (["trainer.optim_target_modules=all-linear"], "leave it out"),
        (["trainer.fp16_full_eval=true", "trainer.bf16_full_eval=true"], "choose one"),
        (["trainer.fp16_full_eval=true"], "without trainer.do_eval=true"),
        (["quant=int8", "trainer=evaluate", "trainer.bf16_full_eval=true"], "integer weights"),
        (["trainer.dataloader_prefetch_factor=2"], "there are no workers"),
        (["trainer.dataloader_persistent_workers=true"], "there are no workers"),
        (["trainer.dataloader_multiprocessing_context=spawn"], "there are no workers"),
        (["trainer.dataloader_num_workers=1", "trainer.dataloader_multiprocessing_context=spwan"], "did you mean 'spawn'?"),
        (["trainer.torch_compile_mode=max-autotun"], "did you mean 'max-autotune'?"),
        (["trainer.debug=underflow"], "legal: underflow_overflow"),
        (["trainer.debug=tpu_metrics_debug"], "TPUs"),
        (["trainer.dataloader_drop_last=true", *EVALUATES], "type trainer.per_device_eval_batch_size=1"),
        (["trainer.accelerator_config=nowhere.json"], "no such file"),
        (["trainer.ddp_bucket_cap_mb=10"], "type parallel=ddp"),
        (["trainer.prediction_loss_only=true", "trainer.predict_with_generate=true", *EVALUATES], "leave one out"),
        (["trainer.hub_strategy=checkpoint"], "type trainer.hub_strategy=end"),
        (["trainer=evaluate", "trainer.push_to_hub=true"], "export"),
        (["trainer.train_sampling_strategy=batch_rebalance"], "group_by_length"),
        (["trainer.include_num_input_tokens_seen=non_padding"], "=all"),
        (["trainer.include_num_input_tokens_seen=every"], "legal: all, no"),
        (["tracker=none", "trainer.do_train=false"], "nothing to do"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, told):
    assert told in refused(*words)


@pytest.mark.parametrize(
    "words",
    [
        [*EPOCHS, "trainer.load_best_model_at_end=true"],
        [*EVALUATES, "trainer.save_strategy=best", "trainer.metric_for_best_model=loss"],
        [*BEST, "trainer.save_strategy=best"],
        [*BEST, "trainer.eval_steps=2", "trainer.save_steps=4"],
        [*BEST, "trainer.eval_steps=0.1", "trainer.save_steps=0.3"],
        [*BEST, "trainer.predict_with_generate=true", "trainer.metric_for_best_model=eval_bleu-4"],
        ["stage=dpo", *BEST, "trainer.metric_for_best_model=eval_accuracy"],
        ["stage=pt", *BEST, "trainer.metric_for_best_model=perplexity"],
        ["trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr_rate: 0.1}"],
        ["trainer.lr_scheduler_type=cosine", "trainer.lr_scheduler_kwargs='{\"num_cycles\": 2}'"],
        ["trainer.lr_scheduler_type=inverse_sqrt", "trainer.lr_scheduler_kwargs={timescale: 10}"],
        ["trainer.lr_scheduler_type=reduce_lr_on_plateau", *EVALUATES],
        ["trainer.learning_rate=0"],
        ["trainer.learning_rate=1e30"],
        ["trainer.max_grad_norm=0"],
        ["trainer.max_grad_norm=inf"],
        ["trainer.warmup_steps=0.1"],
        ["trainer.optim=sgd", 'trainer.optim_args="momentum=0.9, nesterov=true"'],
        [
            "trainer.dataloader_num_workers=2",
            "trainer.dataloader_persistent_workers=true",
            "trainer.dataloader_prefetch_factor=4",
        ],
        ["trainer.debug=''"],
        ["trainer.debug=[underflow_overflow]"],
        ["trainer.hub_strategy=end"],
        ["trainer.include_num_input_tokens_seen=true"],
        ["trainer.prediction_loss_only=true"],
        ["trainer=evaluate", "trainer.bf16_full_eval=true"],
    ],
)
def test_what_can_be_is_not(words):
    if any(not word.startswith(("trainer.", "data.dev_ratio=")) for word in words):
        compose([*BASE, *words])
    trainer = trainer_of(*words)
    assert [*trainer_errors(trainer)] == []


# transformers' own checks: whatever it refuses when arguments are made on a CPU is refused here by then


@pytest.mark.parametrize(
    "values",
    [
        {"torch_empty_cache_steps": 0},
        {"logging_steps": 0},
        {"logging_steps": 1.5},
        {"eval_strategy": "steps", "eval_steps": 2.5},
        {"save_steps": 2.5},
        {"load_best_model_at_end": True, "eval_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 0.3},
        {"fp16": True, "bf16": True, "use_cpu": True},
        {"fp16_full_eval": True, "bf16_full_eval": True, "use_cpu": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
        {"warmup_steps": -1},
        {"dataloader_prefetch_factor": 2},
        {"debug": "everything"},
        {"eval_strategy": "sometimes"},
    ],
    ids=str,
)
def test_what_transformers_refuses_is_refused(values):
    with pytest.raises(ValueError):
        Seq2SeqTrainingArguments(output_dir="run", report_to="none", **values)
    refused("data.dev_ratio=0.1", *(f"trainer.{name}={str(value).lower()}" for name, value in values.items()))


@pytest.mark.parametrize("kind", list(schedules.SchedulerType), ids=str)
def test_the_arguments_of_a_schedule_are_those_of_transformers(kind):
    function = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}.get(kind.value)
    function = function or next(made for name, made in TYPE_TO_SCHEDULER_FUNCTION.items() if name.value == kind.value)
    fixed = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert schedules.ARGUMENTS[kind].keys() == inspect.signature(function).parameters.keys() - fixed


def test_every_optimizer_is_in_the_tables_or_torchs_own():
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "muon"}
    assert {name.value for name in OptimizerNames} - {*optimizers.SHORT_NAMES} == own | optimizers.PACKAGES.keys()
    assert optimizers.ARGUMENTS.keys() | {*optimizers.WITHOUT_ADAM} <= own | optimizers.PACKAGES.keys()


@pytest.mark.parametrize("stage", ["sft", "pt", "rm", "dpo", "kto"])
def test_every_stage_declares_what_its_evaluations_measure(stage):
    assert "loss" in measured_by(compose([*BASE, f"stage={stage}"]).run)


def test_values_without_an_effect_are_named():
    run = compose([*BASE, "trainer.eval_steps=5", "trainer.save_strategy=no", "trainer.save_total_limit=2"]).run
    assert list(unused_values(run)) == [
        "trainer.eval_steps=5 has no effect: trainer.eval_strategy=no",
        "trainer.save_total_limit=2 has no effect: trainer.save_strategy=no",
    ]
    assert list(unused_values(compose(BASE).run)) == []
