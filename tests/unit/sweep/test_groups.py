"""Which jobs of a sweep can share a base."""

import pytest

from glmtuner.config.compose import compose
from glmtuner.launch.register import register_presets
from glmtuner.sweep.groups import common_values, differing, grouped, reason_apart

TINY = ["model=tiny_glm", "tracker=none", "data.dataset=belle_sample"]


def composed(*overrides: str):
    register_presets()
    return compose([*TINY, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["finetuning=rslora", "finetuning.lora_rank=64", "finetuning.lora_target=[all]", "trainer.optim=muon"],
        ["quant=int4", "trainer.bf16=true", "trainer.use_cpu=true", "data.packing=true"],
        ["tracker=tensorboard", "trainer.gradient_checkpointing=true", "trainer.label_smoothing_factor=0.1"],
    ],
    ids=" ".join,
)
def test_plain_lora_shares(overrides):
    assert reason_apart(composed(*overrides)) is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["finetuning=full"], "finetuning=full is no LoRA on a frozen base"),
        (["finetuning=dora"], "finetuning.use_dora=true trains or computes more than a plain LoRA"),
        (["finetuning=pissa"], "finetuning.init_lora_weights=pissa changes the base"),
        (["quant=int8"], "quant=int8: which columns are computed in 16 bits depends on all tokens"),
        (["finetuning.bias=all"], "finetuning.bias=all trains biases of the base"),
        (["finetuning.modules_to_save=[norm]"], "finetuning.modules_to_save=['norm'] trains"),
        (["stage=pt", "data.dataset=text_sample"], "stage=pt is not stage=sft"),
        (["data.padding_free=false"], "data.padding_free=false"),
        (["trainer.neftune_noise_alpha=5"], "trainer.neftune_noise_alpha=5"),
        (["trainer.dataloader_num_workers=2"], "trainer.dataloader_num_workers=2"),
        (["kernels=compile"], "trainer.torch_compile=true"),
    ],
)  # fmt: skip
def test_what_cannot_share_is_told_why(overrides, reason):
    job = composed(*overrides)
    assert reason in reason_apart(job)


def test_jobs_group_by_what_the_base_has_once():
    jobs = [
        composed("finetuning.lora_rank=2", "trainer.seed=1"),
        composed("data.max_source_length=64"),
        composed("finetuning.lora_rank=4", "trainer.learning_rate=1e-2", "trainer.max_steps=3", "metric=none"),
        composed("quant=int4"),
        composed("data.max_source_length=64", "trainer.per_device_train_batch_size=7", "trainer.eval_strategy=no"),
        composed("trainer.gradient_checkpointing=true"),
    ]
    values = [common_values(job, {}) for job in jobs]
    assert grouped(values) == [[0, 2], [1, 4], [3], [5]]
    assert differing(values[0], values[1]) == ["data.max_source_length"]
    assert differing(values[0], values[5]) == ["trainer.gradient_checkpointing"]
    other = common_values(jobs[0], {"HF_ENDPOINT": "http://127.0.0.1"})
    assert differing(values[0], other) == ["hydra.job.env_set.HF_ENDPOINT"]
    assert grouped([values[0], other, values[2]]) == [[0, 2], [1]]
