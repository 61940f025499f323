"""A few hundred wrong values and combinations, typed: each is one paragraph, writes nothing, and blocks nothing.

The corrected command, with the same run folder, is accepted right after. ATTACK_COMBINATIONS limits how many are tried.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BASE = [
    "model=tiny_glm",
    "tracker=none",
    "data.dataset=identity_sample",
    "trainer.max_steps=2",
    "trainer.disable_tqdm=true",
]
EVALUATES = "data.dev_ratio=0.2 trainer.eval_strategy=steps trainer.eval_steps=1"
BEST = f"{EVALUATES} trainer.load_best_model_at_end=true"
ABOVE_0 = (
    "trainer.logging_steps", "trainer.save_steps", "trainer.eval_steps", "trainer.adam_epsilon", "trainer.num_train_epochs",
    "generation.temperature", "generation.top_p", "generation.repetition_penalty", "finetuning.lora_alpha",
)  # fmt: skip
FROM_0 = (
    "trainer.learning_rate", "trainer.weight_decay", "trainer.max_grad_norm", "trainer.warmup_steps", "trainer.eval_delay",
    "trainer.label_smoothing_factor", "trainer.adam_beta1", "trainer.adam_beta2", "finetuning.lora_dropout", "data.dev_ratio",
)  # fmt: skip
WHOLE_FROM_1 = (
    "trainer.per_device_train_batch_size", "trainer.per_device_eval_batch_size", "trainer.gradient_accumulation_steps",
    "trainer.save_total_limit", "trainer.torch_empty_cache_steps", "trainer.dataloader_prefetch_factor", "trainer.ddp_timeout",
    "trainer.ddp_bucket_cap_mb", "data.max_samples", "data.preprocessing_num_workers", "data.eval_num_beams",
    "generation.num_beams", "generation.max_new_tokens", "generation.max_batch_size", "finetuning.lora_rank",
    "data.max_source_length", "data.max_target_length", "parallel.processes",
)  # fmt: skip
WHOLE_FROM_0 = (
    "trainer.seed",
    "trainer.data_seed",
    "trainer.dataloader_num_workers",
    "data.max_bad_records",
    "generation.top_k",
)
BELOW_1 = (
    "trainer.label_smoothing_factor",
    "trainer.adam_beta1",
    "trainer.adam_beta2",
    "finetuning.lora_dropout",
    "data.dev_ratio",
)
SCHEDULES = (
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy",
    "linear trainer.lr_scheduler_kwargs={num_cycles:1}", "cosine trainer.lr_scheduler_kwargs={num_cycles:-1}",
    "cosine trainer.lr_scheduler_kwargs={num_cycle:1}", "cosine_with_restarts trainer.lr_scheduler_kwargs={num_cycles:1.5}",
    "cosine_with_restarts trainer.lr_scheduler_kwargs={num_cycles:a}", "polynomial trainer.lr_scheduler_kwargs={lr_end:1}",
    "polynomial trainer.lr_scheduler_kwargs={power:-1}", "polynomial trainer.lr_scheduler_kwargs={powr:1}",
    "constant trainer.lr_scheduler_kwargs={a:1}", "constant_with_warmup trainer.lr_scheduler_kwargs={a:1}",
    "constant trainer.warmup_steps=1", "constant trainer.warmup_ratio=0.1", "inverse_sqrt trainer.lr_scheduler_kwargs={timescale:0}",
    "inverse_sqrt trainer.lr_scheduler_kwargs={time_scale:9}", "cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr:1}",
    "cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr:-1}", "cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr_rate:2}",
    "cosine_with_min_lr trainer.lr_scheduler_kwargs={min_lr:1e-6,min_lr_rate:0.1}",
    "warmup_stable_decay trainer.lr_scheduler_kwargs={num_decay_steps:9}",
    "warmup_stable_decay trainer.lr_scheduler_kwargs={num_decay_steps:1,decay_type:cubic}",
    "warmup_stable_decay trainer.lr_scheduler_kwargs={num_decay_steps:1,min_lr_ratio:2}",
    f"reduce_lr_on_plateau {EVALUATES} trainer.lr_scheduler_kwargs={{factor:1.5}}",
    f"reduce_lr_on_plateau {EVALUATES} trainer.lr_scheduler_kwargs={{mode:least}}",
    f"reduce_lr_on_plateau {EVALUATES} trainer.lr_scheduler_kwargs={{patience:-1}}",
    f"reduce_lr_on_plateau {EVALUATES} trainer.warmup_steps=1", f"greedy {EVALUATES}",
    "cosin", "linear trainer.lr_scheduler_kwargs=text", "linear trainer.lr_scheduler_kwargs=[1]",
)  # fmt: skip
OPTIMIZERS = (
    "galore_adamw", "galore_adafactor_layerwise", "apollo_adamw", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
    "schedule_free_sgd", "stable_adamw", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla", "adamw_torch_npu_fused",
    "adamw_anyprecision", "adamw", "adam", "adamw_torch trainer.optim_args=amsgrad", "sgd trainer.optim_args='momentm=0.9'",
    "sgd trainer.optim_args='momentum=a'", "sgd trainer.optim_args='nesterov=true'", "sgd trainer.optim_args='weight_decay=0.1'",
    "sgd trainer.adam_beta1=0.5", "adafactor trainer.adam_epsilon=0.001", "rmsprop trainer.optim_args='centered=perhaps'",
    "lion_8bit trainer.adam_epsilon=0.001", "adamw_torch trainer.optim_target_modules=all-linear",
)  # fmt: skip
OTHERS = (
    "trainer.bf16=true", "trainer.fp16=true", "trainer.tf32=true", "trainer.fp16=true trainer.bf16=true",
    "trainer.fp16_full_eval=true", "trainer.bf16_full_eval=true trainer.do_eval=true data.dev_ratio=0.2",
    "trainer.fp16_full_eval=true trainer.bf16_full_eval=true trainer.do_eval=true data.dev_ratio=0.2",
    "trainer.save_strategy=best", f"trainer.save_strategy=best {EVALUATES}", "trainer.load_best_model_at_end=true",
    f"{BEST} trainer.save_strategy=epoch", f"{BEST} trainer.save_strategy=no", f"{BEST} trainer.eval_steps=2 trainer.save_steps=3",
    f"{BEST} trainer.eval_steps=0.5 trainer.save_steps=2", f"{BEST} trainer.eval_steps=0.2 trainer.save_steps=0.5",
    f"{BEST} trainer.eval_steps=4 trainer.save_steps=4", f"{EVALUATES} trainer.metric_for_best_model=accuracy",
    f"{EVALUATES} trainer.metric_for_best_model=rouge-l", f"{EVALUATES} trainer.metric_for_best_model=eval_los",
    f"{EVALUATES} trainer.metric_for_best_model=train_loss", f"stage=dpo {EVALUATES} trainer.metric_for_best_model=perplexity",
    f"{EVALUATES} trainer.predict_with_generate=true trainer.metric_for_best_model=bleu-5",
    "trainer.eval_strategy=steps", "trainer.do_eval=true", "trainer.do_predict=true trainer.predict_with_generate=true",
    "trainer.eval_on_start=true", "trainer.do_train=false", "stage=dpo trainer.label_smoothing_factor=0.1",
    "trainer.dataloader_persistent_workers=true", "trainer.dataloader_multiprocessing_context=spawn",
    "trainer.dataloader_num_workers=1 trainer.dataloader_multiprocessing_context=thread", "trainer.debug=all",
    "trainer.debug=tpu_metrics_debug", "trainer.torch_compile_backend=inductr", "trainer.torch_compile_mode=fast",
    "trainer.accelerator_config={even_batch:true}", "trainer.accelerator_config={split_batches:2}",
    "trainer.accelerator_config={gradient_accumulation_kwargs:{num_steps:2}}", "trainer.accelerator_config=nowhere.json",
    "trainer.ddp_find_unused_parameters=true", "trainer.ddp_static_graph=true", "trainer.push_to_hub=true",
    "trainer.hub_strategy=checkpoint", "trainer.include_num_input_tokens_seen=non_padding",
    "trainer.train_sampling_strategy=batch_rebalance", "trainer.prediction_loss_only=true trainer.predict_with_generate=true",
    "trainer.activation_checkpointing=true trainer.gradient_checkpointing=false", "trainer.logging_strategy=sometimes",
    "trainer.resume_from_checkpoint=nowhere", "trainer.resume_from_checkpoint=true", "trainer.warmup_ratio=0.1 trainer.warmup_steps=5",
    "trainer.save_steps=1.5", "trainer.logging_steps=2.5", "trainer.warmup_steps=1.5", "trainer.max_steps=0", "trainer.max_steps=-3",
    "trainer.seed=4294967296", "trainer.report_to=wandb", "trainer.run_name=x", "trainer.label_names=[labels]",
    "trainer.sortish_sampler=true", "trainer.batch_eval_metrics=true", "trainer.include_for_metrics=[inputs]",
    "trainer.fsdp=full_shard", "trainer.deepspeed=ds.json", "trainer.local_rank=1", "trainer.ddp_backend=gloo",
    "trainer.generation_num_beams=2", "trainer.eval_accumulation_steps=4", "trainer.save_on_each_node=true",
    "quant=int8 trainer.do_eval=true data.dev_ratio=0.2 trainer.fp16_full_eval=true", "parallel.processes=2",
)  # fmt: skip


def cases() -> Iterator[str]:
    for key in ABOVE_0:
        yield from (f"{key}={value}" for value in ("0", "-1", "nan", "inf", "-inf", "much"))
    for key in FROM_0:
        yield from (f"{key}={value}" for value in ("-0.5", "nan", "-inf", "much"))
    for key in BELOW_1:
        yield from (f"{key}={value}" for value in ("1", "1.5"))
    for key in WHOLE_FROM_1:
        yield from (f"{key}={value}" for value in ("0", "-1", "1.5", "99999999999999999999"))
    for key in WHOLE_FROM_0:
        yield from (f"{key}={value}" for value in ("-1", "0.5", "99999999999999999999"))
    yield from (f"trainer.lr_scheduler_type={case}" for case in SCHEDULES)
    yield from (f"trainer.optim={case}" for case in OPTIMIZERS)
    yield from OTHERS


CASES = list(dict.fromkeys(cases()))[: int(os.environ.get("ATTACK_COMBINATIONS", "1000"))]


@pytest.mark.parametrize("part", range(8))
def test_a_wrong_value_is_one_paragraph_and_writes_nothing(part: int, glmtuner: Callable, tmp_path: Path) -> None:
    wrong = []
    for case in CASES[part::8]:
        done = glmtuner(*BASE, "trainer.output_dir=run", *case.split())
        reason = None
        if done.returncode != 2:
            reason = f"exit code {done.returncode}"
        elif len(done.stderr.strip().splitlines()) != 1 or "Traceback" in done.stderr:
            reason = "more than one paragraph"
        elif (tmp_path / "run").exists():
            reason = "a folder was written"
        elif "data.dev_ratio=" not in done.stderr and not any(
            word.partition("=")[0].rpartition(".")[2] in done.stderr for word in case.split()
        ):
            reason = "the key is not named"
        if reason:
            wrong.append(f"{case}: {reason}: {done.stderr.strip()[-300:]}")
    assert not wrong, "\n".join(wrong)
    corrected = glmtuner(*BASE, "trainer.output_dir=run")
    assert corrected.returncode == 0, corrected.stderr
