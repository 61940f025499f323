"""What needs torch or the machine is tried on one layer before a run loads or writes anything."""

import dataclasses
from pathlib import Path

import pytest
import torch
from typed_trainer import trainer_of

from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.launch.rehearsal import rehearse
from glmtuner.run_folder.folder import RunFolder

register_presets()

RUN = compose(["model=tiny_glm", "tracker=none", "data.dev_ratio=0.1"]).run
CPU = torch.device("cpu")


def rehearse_with(*words):
    rehearse(dataclasses.replace(RUN, trainer=trainer_of(*words)), RunFolder(Path("run")), CPU, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.bf16=true"], "type trainer.use_cpu=true to compute in bfloat16 on the CPU"),
        (["trainer.bf16_full_eval=true", "trainer.do_eval=true"], "trainer.bf16_full_eval=true: this machine has"),
        (["trainer.fp16=true"], "trainer.fp16=true: float16 with loss scaling needs a GPU"),
        (["trainer.fp16=true", "trainer.use_cpu=true"], "needs a GPU"),
        (["trainer.tf32=true"], "Ampere"),
        (["trainer.torch_compile_backend=inductr"], "no such compiler; did you mean 'inductor'?"),
        (["trainer.accelerator_config={even_batch: true}"], "did you mean 'even_batches'?"),
        (["trainer.accelerator_config={split_batches: 3}"], "split_batches is true or false"),
        (["trainer.accelerator_config={gradient_accumulation_kwargs: {num_steps: 2}}"], "legal: sync_with_dataloader"),
        (["trainer.accelerator_config={use_configured_state: true}"], "legal: split_batches"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the answers are those of a machine without a GPU")
def test_what_this_machine_cannot_do_is_refused(words, told):
    with pytest.raises(ConfigError) as caught:
        rehearse_with(*words)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.bf16=true", "trainer.use_cpu=true"],
        ["trainer.tf32=false"],
        ["trainer.torch_compile_backend=eager", "trainer.torch_compile_mode=default"],
        ["trainer.accelerator_config={even_batches: false, gradient_accumulation_kwargs: {sync_each_batch: true}}"],
        ["trainer.optim=adafactor"],
        ["trainer.optim=sgd", 'trainer.optim_args="momentum=0.9,nesterov=true"'],
        ["trainer.optim=rmsprop", 'trainer.optim_args="alpha=0.9,centered=true"'],
        ["trainer.lr_scheduler_type=polynomial", "trainer.lr_scheduler_kwargs={power: 0.5}"],
        ["trainer.lr_scheduler_type=inverse_sqrt", "trainer.warmup_steps=5"],
        ["trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs={num_decay_steps: 10, decay_type: linear}"],
        ["trainer.lr_scheduler_type=reduce_lr_on_plateau", "trainer.eval_strategy=epoch"],
        ["trainer.lr_scheduler_type=cosine_warmup_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr_rate: 0.1, warmup_lr_rate: 0}"],
    ],
)  # fmt: skip
def test_what_it_can_do_is_not(words):
    rehearse_with(*words)


def test_an_optimizer_that_fails_on_this_device_is_named(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA Setup failed\nsee the log")

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(
        ConfigError, match=r"trainer\.optim=sgd does not work on cpu: RuntimeError: CUDA Setup failed see the log"
    ):
        rehearse_with("trainer.optim=sgd")


def test_a_schedule_without_a_rate_for_a_step_is_named(monkeypatch):
    monkeypatch.setattr(
        "transformers.optimization._get_polynomial_decay_schedule_with_warmup_lr_lambda",
        lambda step, **kwargs: complex(0, 1) if step == 3 else 1.0,
    )
    with pytest.raises(ConfigError, match=r"polynomial with .*: the learning rate of step 3 would be"):
        rehearse_with("trainer.lr_scheduler_type=polynomial")
