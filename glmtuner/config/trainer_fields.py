"""What becomes of each field of transformers' Seq2SeqTrainingArguments: obeyed, redirected to a key of ours, or refused.

A field that is redirected or refused accepts its default, which asks for nothing.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from glmtuner.config.removed import DEEPSPEED
from glmtuner.config.trainer_arguments import TrainerArguments

# What a value other than the default does in this program.
OBEYED = {
    "output_dir": "the run folder",
    "per_device_train_batch_size": "rows of a training batch on each device",
    "num_train_epochs": "length of the training",
    "max_steps": "optimizer steps, whatever num_train_epochs says",
    "learning_rate": "the peak of the schedule",
    "lr_scheduler_type": "the schedule",
    "lr_scheduler_kwargs": "the schedule's own arguments",
    "warmup_steps": "steps of the warm-up; below 1 a share of all steps",
    "optim": "the optimizer",
    "optim_args": "the optimizer's own arguments",
    "weight_decay": "of the weights that decay",
    "adam_beta1": "of the Adam optimizers",
    "adam_beta2": "of the Adam optimizers",
    "adam_epsilon": "of the Adam optimizers",
    "optim_target_modules": "the modules that GaLore and APOLLO project",
    "gradient_accumulation_steps": "batches of an optimizer step",
    "average_tokens_across_devices": "whether a step's loss is the mean over the tokens of all ranks",
    "max_grad_norm": "gradient clipping; 0 turns it off",
    "label_smoothing_factor": "of the model's own loss",
    "bf16": "mixed precision",
    "fp16": "mixed precision with loss scaling",
    "bf16_full_eval": "evaluation outside of the training with bfloat16 weights",
    "fp16_full_eval": "evaluation outside of the training with float16 weights",
    "tf32": "TensorFloat-32 matrix products",
    "activation_checkpointing": "recomputation of activations",
    "activation_checkpointing_kwargs": "its arguments",
    "gradient_checkpointing": "the earlier name of activation_checkpointing",
    "gradient_checkpointing_kwargs": "the earlier name of activation_checkpointing_kwargs",
    "torch_compile": "compiles each block",
    "torch_compile_backend": "of the compiler; turns torch_compile on",
    "torch_compile_mode": "of the compiler; turns torch_compile on",
    "use_liger_kernel": "Liger's kernels",
    "liger_kernel_config": "which of Liger's kernels",
    "use_cache": "use_cache in the model's config during the training",
    "neftune_noise_alpha": "noise on the embeddings",
    "torch_empty_cache_steps": "steps between two calls of torch's empty_cache",
    "logging_strategy": "when the history gets a line",
    "logging_steps": "steps between two lines of the history",
    "logging_first_step": "a line of the history for step 1",
    "log_on_each_node": "whether transformers logs on every node",
    "logging_nan_inf_filter": "never on: a loss that is not finite ends the run",
    "include_num_input_tokens_seen": "counts input tokens in the history",
    "log_level": "transformers' log level",
    "log_level_replica": "transformers' log level on other ranks",
    "disable_tqdm": "no progress bar",
    "eval_strategy": "when an evaluation runs during the training",
    "eval_steps": "steps between two evaluations",
    "eval_delay": "steps or epochs before the first evaluation",
    "per_device_eval_batch_size": "rows of an evaluation batch on each device",
    "prediction_loss_only": "evaluations measure losses; refused with predict_with_generate",
    "eval_on_start": "an evaluation before step 1",
    "save_only_model": "checkpoints without optimizer, which cannot be resumed from",
    "save_strategy": "when a checkpoint is saved",
    "save_steps": "steps between two checkpoints",
    "save_total_limit": "how many checkpoints are kept",
    "load_best_model_at_end": "the result is the best checkpoint",
    "metric_for_best_model": "what best means",
    "greater_is_better": "which way is better; by default what the metric's name says",
    "ignore_data_skip": "a resumed run starts the epoch's data again",
    "full_determinism": "deterministic algorithms only",
    "seed": "of weights, order and dropout",
    "data_seed": "of the order of the data and of the split",
    "use_cpu": "trains on the CPU",
    "accelerator_config": "accelerate's arguments",
    "dataloader_drop_last": "drops an incomplete last batch",
    "dataloader_num_workers": "processes that load batches",
    "dataloader_pin_memory": "pinned memory for GPU transfers",
    "dataloader_persistent_workers": "keeps the workers between epochs",
    "dataloader_prefetch_factor": "batches that each worker loads ahead",
    "dataloader_multiprocessing_context": "how workers are started",
    "dataloader_in_order": "whether batches keep their order",
    "remove_unused_columns": "never needed: an encoded record has no unused column",
    "train_sampling_strategy": "the order of the training records",
    "ddp_find_unused_parameters": "DistributedDataParallel's argument, with parallel=ddp",
    "ddp_bucket_cap_mb": "DistributedDataParallel's argument, with parallel=ddp",
    "ddp_broadcast_buffers": "DistributedDataParallel's argument, with parallel=ddp",
    "ddp_static_graph": "DistributedDataParallel's argument, with parallel=ddp",
    "ddp_timeout": "seconds that a rank waits for the others",
    "debug": "underflow_overflow reports activations that overflow",
    "skip_memory_metrics": "false adds memory metrics to the results",
    "do_train": "trains",
    "do_eval": "evaluates at the end",
    "do_predict": "predicts at the end",
    "resume_from_checkpoint": "a checkpoint, a run folder, or true for trainer.output_dir's latest checkpoint",
    "predict_with_generate": "evaluations also generate answers and score them",
    "push_to_hub": "uploads the finished run's adapter/ or model/",
    "hub_model_id": "the repository of push_to_hub",
    "hub_token": "the token of push_to_hub",
    "hub_private_repo": "whether push_to_hub creates a private repository",
    "hub_revision": "the branch of push_to_hub",
    "hub_strategy": "end, which is what push_to_hub does; uploads of checkpoints are refused",
}

# The key that does what a field says, as the words to type; `{value}` is the value that was given.
REDIRECTED = {
    "report_to": "type tracker=wandb, tracker=mlflow, tracker=swanlab, tracker=trackio, tracker=comet, tracker=tensorboard or tracker=none",
    "run_name": "the run's name is a key of its own: type name={value}",
    "project": "type tracker=wandb tracker.project={value}, or another tracker",
    "fsdp": "type parallel=fsdp2",
    "fsdp_config": "type parallel=fsdp2, and parallel.reshard_after_forward or parallel.cpu_offload",
    "parallelism_config": "type parallel=ddp or parallel=fsdp2",
    "deepspeed": f"{DEEPSPEED}; type parallel=fsdp2, and parallel.cpu_offload=true for what it offloaded",
    "generation_num_beams": "type data.eval_num_beams={value}",
    "generation_max_length": "answers have up to data.max_target_length tokens: type data.max_target_length={value}",
    "generation_config": "evaluation and prediction are greedy or use beams, and chat and serving have their own values: type "
    "data.eval_num_beams=…, or generation.temperature=…, generation.top_p=… and the like",
    "sortish_sampler": "type trainer.train_sampling_strategy=group_by_length",
    "length_column_name": "lengths are those of the encoded records: type trainer.train_sampling_strategy=group_by_length and "
    "leave this out",
}

# Why a field is refused, and what to type.
REFUSED = {
    "auto_find_batch_size": "a run that changes its batch size cannot be resumed or compared; set "
    "trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps",
    "trackio_space_id": "runs are logged on this machine, and `trackio sync` uploads them: type tracker=trackio",
    "trackio_bucket_id": "runs are logged on this machine, and `trackio sync` uploads them: type tracker=trackio",
    "trackio_static_space_id": "runs are logged on this machine, and `trackio sync` uploads them: type tracker=trackio",
    "eval_do_concat_batches": "evaluations keep one number for each record and hand no batches to a metric; leave it out",
    "eval_use_gather_object": "the losses of all ranks are gathered as tensors; leave it out",
    "eval_accumulation_steps": "the losses of a batch are moved to the CPU after every batch, and its logits are not kept; leave "
    "it out",
    "include_for_metrics": "a metric scores answers against labels and sees neither inputs nor losses; leave it out",
    "batch_eval_metrics": "answers are scored one by one as they are generated; leave it out",
    "save_on_each_node": "one run has one folder, which rank 0 writes; leave it out",
    "enable_jit_checkpoint": "a run saves a checkpoint on SIGTERM and SIGUSR2 in any case; leave it out",
    "hub_always_push": "trainer.push_to_hub=true uploads once, when the run is finished; leave it out",
    "restore_callback_states_from_checkpoint": "the callbacks of a run have no state of their own; leave it out",
    "label_names": "every stage knows its own labels; leave it out",
    "ddp_backend": "GPUs communicate by NCCL and CPUs by Gloo; leave it out",
    "local_rank": "torchrun, accelerate and srun set LOCAL_RANK in the environment; leave it out",
}


NOTHING: tuple[Any, ...] = ([], {}, ["none"])  # other ways to ask for nothing


def default_of(declared: Field[Any]) -> Any:
    """The default of a dataclass's field, an enum's as its member; MISSING if it has none."""
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def field_errors(trainer: TrainerArguments) -> Iterator[str]:
    """One sentence for each field that is redirected or refused and has another value than its default."""
    defaults = {declared.name: default_of(declared) for declared in fields(TrainerArguments)}
    for name, sentence in (REDIRECTED | REFUSED).items():
        value = getattr(trainer, name)
        if value == defaults[name] or (name == "trackio_static_space_id" and value is False) or value in NOTHING:
            continue
        text = shown(value)
        what = " is not a glmtuner key" if name in REDIRECTED else ""
        yield f"trainer.{name}={text}{what}: {sentence.replace('{value}', text)}"


def shown(value: Any) -> str:
    """A value in the syntax of an override."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {shown(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    value = value.value if isinstance(value, Enum) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
