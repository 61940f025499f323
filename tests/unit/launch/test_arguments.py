"""The values of the trainer arrive in transformers' training arguments as they were given."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from typed_trainer import trainer_of

from glmtuner.config.compose import compose
from glmtuner.config.trainer_rules import trainer_errors
from glmtuner.launch.arguments import training_arguments
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.folder import RunFolder

register_presets()

CPU = torch.device("cpu")
EVALUATES = ("data.dev_ratio=0.1", "trainer.eval_strategy=steps")
# What is typed, and the value of the field in transformers' arguments; `field` alone is `trainer.field`.
PASSED = {
    "per_device_train_batch_size": ("3", 3),
    "per_device_eval_batch_size": ("3", 3),
    "num_train_epochs": ("0.5", 0.5),
    "max_steps": ("7", 7),
    "learning_rate": ("1e-3", 1e-3),
    "lr_scheduler_type": ("cosine", "cosine"),
    "warmup_steps": ("0.25", 0.25),
    "optim": ("adamw_torch", "adamw_torch"),
    "weight_decay": ("0.1", 0.1),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.9", 0.9),
    "adam_epsilon": ("1e-6", 1e-6),
    "gradient_accumulation_steps": ("2", 2),
    "average_tokens_across_devices": ("false", False),
    "max_grad_norm": ("0.5", 0.5),
    "label_smoothing_factor": ("0.1", 0.1),
    "fp16": ("true", True),
    "fp16_full_eval": ("true", True, "data.dev_ratio=0.1", "trainer.do_eval=true"),
    "bf16": ("true", True, "trainer.use_cpu=true"),
    "bf16_full_eval": ("true", True, "trainer.use_cpu=true", "data.dev_ratio=0.1", "trainer.do_eval=true"),
    "tf32": ("false", False),
    "activation_checkpointing": ("true", True),
    "activation_checkpointing_kwargs": (
        "{use_reentrant: false}", {"use_reentrant": False}, "trainer.activation_checkpointing=true",
    ),
    "gradient_checkpointing": ("true", True),
    "gradient_checkpointing_kwargs": ("{use_reentrant: false}", {"use_reentrant": False}, "trainer.gradient_checkpointing=true"),
    "use_cache": ("true", True),
    "neftune_noise_alpha": ("5", 5.0),
    "torch_empty_cache_steps": ("2", 2),
    "logging_strategy": ("epoch", "epoch"),
    "logging_steps": ("3", 3),
    "logging_first_step": ("true", True),
    "log_on_each_node": ("false", False),
    "logging_nan_inf_filter": ("false", False),
    "include_num_input_tokens_seen": ("all", "all"),
    "log_level": ("info", "info"),
    "log_level_replica": ("error", "error"),
    "disable_tqdm": ("true", True),
    "eval_strategy": ("epoch", "epoch", "data.dev_ratio=0.1"),
    "eval_steps": ("3", 3, *EVALUATES),
    "eval_delay": ("2", 2, *EVALUATES),
    "eval_on_start": ("true", True, "data.dev_ratio=0.1"),
    "save_only_model": ("true", True),
    "save_strategy": ("epoch", "epoch"),
    "save_steps": ("0.5", 0.5),
    "save_total_limit": ("2", 2),
    "load_best_model_at_end": ("true", True, "data.dev_ratio=0.1", "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch"),
    "metric_for_best_model": ("eval_loss", "eval_loss", *EVALUATES),
    "greater_is_better": ("true", True, *EVALUATES, "trainer.metric_for_best_model=loss"),
    "ignore_data_skip": ("true", True),
    "full_determinism": ("true", True),
    "seed": ("7", 7),
    "data_seed": ("7", 7),
    "use_cpu": ("true", True),
    "dataloader_drop_last": ("true", True),
    "dataloader_num_workers": ("2", 2),
    "dataloader_persistent_workers": ("true", True, "trainer.dataloader_num_workers=2"),
    "dataloader_prefetch_factor": ("3", 3, "trainer.dataloader_num_workers=2"),
    "dataloader_multiprocessing_context": ("spawn", "spawn", "trainer.dataloader_num_workers=2"),
    "dataloader_in_order": ("false", False),
    "dataloader_pin_memory": ("false", False),
    "remove_unused_columns": ("false", False),
    "train_sampling_strategy": ("sequential", "sequential"),
    "ddp_find_unused_parameters": ("true", True, "parallel=ddp"),
    "ddp_bucket_cap_mb": ("30", 30, "parallel=ddp"),
    "ddp_broadcast_buffers": ("false", False, "parallel=ddp"),
    "ddp_static_graph": ("true", True, "parallel=ddp"),
    "ddp_timeout": ("60", 60),
    "debug": ("underflow_overflow", ["underflow_overflow"]),
    "skip_memory_metrics": ("false", False),
    "optim_args": ('"momentum=0.9"', "momentum=0.9", "trainer.optim=sgd"),
    "lr_scheduler_kwargs": ("{num_cycles: 2}", {"num_cycles": 2}, "trainer.lr_scheduler_type=cosine"),
}  # fmt: skip


RUN = compose(["model=tiny_glm", "tracker=none", "data.dev_ratio=0.1"]).run


def arguments_of(*words):
    run = dataclasses.replace(RUN, trainer=trainer_of(*words))
    return training_arguments(run, RunFolder(Path("run")), torch.nn.Linear(2, 2), CPU)


@pytest.mark.parametrize("name", sorted(PASSED))
def test_a_value_arrives(name):
    typed, expected, *others = PASSED[name]
    arguments = arguments_of(*others, f"trainer.{name}={typed}")
    value = getattr(arguments, name)
    assert ([word.value for word in value] if name == "debug" else value) == expected


def test_a_dictionary_of_accelerate_arrives():
    """accelerator_config is parsed by transformers."""
    assert arguments_of("trainer.accelerator_config={even_batches: false}").accelerator_config.even_batches is False


def test_optim_target_modules_arrive():
    words = ["trainer.optim=galore_adamw", "trainer.optim_target_modules=all-linear"]
    assert arguments_of(*words).optim_target_modules == "all-linear"


def test_torch_compile_is_left_to_the_blocks():
    """transformers would compile the whole model."""
    assert trainer_of("trainer.torch_compile_mode=default").torch_compile is True
    assert arguments_of("trainer.torch_compile=true").torch_compile is False


def test_two_names_of_checkpointing_that_differ_are_refused():
    trainer = trainer_of("trainer.activation_checkpointing=false", "trainer.gradient_checkpointing=true")
    assert "two names of one thing" in "".join(trainer_errors(trainer))


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("eval_loss", False), ("perplexity", False), ("eval_perplexity", False)]
)
def test_a_smaller_perplexity_is_better(metric, greater):
    """transformers goes by the end of the name alone, and would keep the worst checkpoint."""
    arguments = arguments_of("stage=pt", *EVALUATES, f"trainer.metric_for_best_model={metric}")
    assert arguments.greater_is_better is greater


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(
    ("stage", "metric", "mode"), [("dpo", "accuracy", "max"), ("pt", "perplexity", "min"), ("sft", "loss", "min")]
)
def test_a_plateau_waits_for_the_metric_to_improve_in_its_own_direction(kind, stage, metric, mode):
    """torch's ReduceLROnPlateau waits for a smaller value, whatever the metric."""
    words = [
        f"stage={stage}",
        *EVALUATES,
        f"trainer.metric_for_best_model={metric}",
        f"trainer.lr_scheduler_type={kind}",
    ]
    words += ["trainer.learning_rate=1e-2"]
    assert arguments_of(*words).lr_scheduler_kwargs == {"mode": mode}
    typed = arguments_of(*words, "trainer.lr_scheduler_kwargs={mode: max, patience: 2}")
    assert typed.lr_scheduler_kwargs == {"mode": "max", "patience": 2}


def test_no_argument_uploads_checkpoints():
    arguments = arguments_of("trainer.push_to_hub=true", "trainer.hub_token=hf_x", "trainer.hub_model_id=me/x")
    assert (arguments.push_to_hub, arguments.hub_token, arguments.hub_model_id) == (False, None, None)


def test_an_infinite_gradient_norm_clips_nothing():
    assert arguments_of("trainer.max_grad_norm=inf").max_grad_norm == math.inf
