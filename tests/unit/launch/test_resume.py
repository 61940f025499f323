"""Which checkpoint trainer.resume_from_checkpoint names, and which other values a run may continue it with."""

import dataclasses
import fnmatch
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from glmtuner.config.compose import compose
from glmtuner.config.schema import legal_keys
from glmtuner.errors import CheckpointError, ConfigError, GlmtunerError
from glmtuner.launch.register import register_presets
from glmtuner.launch.resume import BATCH_KEYS, MAY_CHANGE, checkpoint_to_resume, may_change, require_same_optimizer
from glmtuner.run_folder.acquire import DERIVED_KEYS, RESUME_IGNORED_KEYS
from glmtuner.run_folder.checkpoints import mark_complete

register_presets()

COMPOSED = compose(["model=tiny_glm", "tracker=none", "trainer.max_steps=8", "data.dev_ratio=0.1"])
SAVED = OmegaConf.to_yaml(COMPOSED.config, resolve=True)


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    """A checkpoint of AdamW, with the files that are required."""
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    for name in ("scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (path / name).write_text("{}", encoding="utf-8")
    if complete:
        mark_complete(path, {"step": step, "ranks": 1})
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    for step in (2, 4):
        checkpoint(folder, step)
    checkpoint(folder, 6, complete=False)
    (folder / "config.yaml").write_text(SAVED, encoding="utf-8")
    (folder / "provenance.json").write_text("{}", encoding="utf-8")
    return folder


def resumed(value: str | Path | None, folder: Path, ranks: int = 1, **changed: object) -> Path | None:
    """The checkpoint for a run in `folder` with `resume_from_checkpoint=value` and other values of the trainer."""
    trainer = dataclasses.replace(
        COMPOSED.run.trainer, resume_from_checkpoint=None if value is None else str(value), **changed
    )
    config = OmegaConf.create(OmegaConf.to_container(COMPOSED.config))
    for name, new in changed.items():
        config.trainer[name] = new
    config.trainer.resume_from_checkpoint = trainer.resume_from_checkpoint
    return checkpoint_to_resume(dataclasses.replace(COMPOSED.run, trainer=trainer), config, folder, ranks)


def refused(*args: object, **changed: object) -> str:
    with pytest.raises(GlmtunerError) as caught:
        resumed(*args, **changed)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_a_run_folder_and_true(run_folder: Path, tmp_path: Path) -> None:
    four = run_folder / "checkpoints/checkpoint-4"
    new = tmp_path / "second"
    assert resumed(run_folder / "checkpoints/checkpoint-2", new) == run_folder / "checkpoints/checkpoint-2"
    assert resumed(run_folder, new) == four
    assert resumed(run_folder / "checkpoints", new) == four
    assert resumed("True", run_folder, output_dir=str(run_folder)) == four
    for nothing in (None, "False", "null"):
        assert resumed(nothing, new) is None


def test_what_is_no_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "second"
    assert "did you mean 'checkpoint-2' or 'checkpoint-4'" in refused(run_folder / "checkpoints/checkpoint-3", new)
    assert "did you mean 'first'?" in refused(tmp_path / "frist/checkpoints/checkpoint-2", new)
    assert "it is a file" in refused(run_folder / "config.yaml", new)
    assert "trainer.output_dir is not set" in refused("True", new)
    assert "there is no folder" in refused("True", new, output_dir=str(new))
    foreign = refused(run_folder / "checkpoints/checkpoint-6", new)
    assert "glmtuner has not saved it, or not completely" in foreign and f"model.checkpoint_dir={run_folder}" in foreign
    older = refused(run_folder / "checkpoints/checkpoint-4", new, ranks=2)
    assert "saved by 1 processes, by a version for which this run must have as many, and it has 2" in older
    (run_folder / "checkpoints/checkpoint-4/optimizer.pt").unlink()
    assert "as with trainer.save_only_model=true" in refused(run_folder / "checkpoints/checkpoint-4", new)
    assert resumed(run_folder, new) == run_folder / "checkpoints/checkpoint-2"


@pytest.mark.parametrize("named", ["checkpoints/checkpoint-4", ".", "True"])
def test_a_checkpoint_of_a_strategy_that_was_removed(run_folder: Path, tmp_path: Path, named: str) -> None:
    """As parallel=zero3 left them: no optimizer, no scheduler and no random states, and a config.yaml with its keys."""
    for path in (run_folder / "checkpoints").iterdir():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (path / name).unlink()
        mark_complete(path, {"step": 1, "ranks": 2})
    saved = OmegaConf.create(SAVED)
    saved.parallel = {
        "name": "zero3", "processes": 2, "offload_optimizer": True, "deepspeed_config": None, "offload_parameters": False,
    }  # fmt: skip
    (run_folder / "config.yaml").write_text(OmegaConf.to_yaml(saved), encoding="utf-8")
    own = run_folder if named == "True" else tmp_path / "second"
    told = refused(named if named == "True" else run_folder / named, own, ranks=2)
    assert "its run had parallel=zero3: DeepSpeed was removed" in told and "type parallel=fsdp2" in told
    last = named if named.startswith("checkpoints") else "checkpoints/checkpoint-6"
    assert f"type model.checkpoint_dir={run_folder / last} " in told


def test_other_numbers_of_processes_that_learn_the_same_rows_in_a_step(run_folder: Path, tmp_path: Path) -> None:
    four, new = run_folder / "checkpoints/checkpoint-4", tmp_path / "second"
    batch = COMPOSED.run.trainer.per_device_train_batch_size
    (four / "complete.json").unlink()
    mark_complete(four, {"step": 4, "ranks": 6, "rows_per_step": 6 * batch})
    assert resumed(four, new, ranks=6) == four
    assert resumed(four, new, ranks=3, gradient_accumulation_steps=2) == four
    assert resumed(four, new, ranks=1, per_device_train_batch_size=3 * batch, gradient_accumulation_steps=2) == four
    told = refused(four, new, ranks=3)
    assert (
        f"{6 * batch} rows in an optimizer step, and this run has {3 * batch} (processes are 6 there and 3 here)"
        in told
    )
    product = "trainer.per_device_train_batch_size times trainer.gradient_accumulation_steps"
    assert f"with 3 processes, {product} must be {2 * batch}, or start" in told
    assert f"5 processes cannot share {6 * batch} rows equally" in refused(four, new, ranks=5)
    told = refused(four, new, ranks=6, gradient_accumulation_steps=2)
    assert "trainer.gradient_accumulation_steps is 1 there and 2 here" in told and "processes are" not in told
    lengths = {"train_sampling_strategy": "group_by_length"}
    saved = OmegaConf.create(SAVED)
    saved.trainer.train_sampling_strategy = "group_by_length"
    (run_folder / "config.yaml").write_text(OmegaConf.to_yaml(saved), encoding="utf-8")
    assert resumed(four, new, ranks=6, **lengths) == four
    told = refused(four, new, ranks=3, gradient_accumulation_steps=2, **lengths)
    assert "the order of the data would be another one; type the values of the checkpoint's run and 6 processes" in told


def test_training_must_be_asked_for(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without training: .*type model\.checkpoint_dir="):
        resumed(run_folder, tmp_path / "second", do_train=False, do_eval=True)


def test_the_checkpoint_is_not_removed_first(run_folder: Path) -> None:
    assert "removes that checkpoint" in refused(run_folder, run_folder, overwrite_output_dir=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3}, {"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}, {"weight_decay": 0.1},
        {"warmup_steps": 3.0}, {"max_grad_norm": 0.5}, {"seed": 7}, {"data_seed": 7}, {"bf16": True}, {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1}, {"adam_beta2": 0.9}, {"dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential"}, {"optim": "sgd"}, {"lr_scheduler_type": "cosine"},
    ],
    ids=str,
)  # fmt: skip
def test_another_training_is_named_and_refused(run_folder: Path, tmp_path: Path, changed: dict[str, object]) -> None:
    ((name, value),) = changed.items()
    told = refused(run_folder, tmp_path / "second", **changed)
    assert f"trainer.{name} is " in told and f" there and {str(value).lower()} here" in told


def leaves(config: DictConfig, prefix: str = "") -> dict[str, object]:
    """The value of every key."""
    found: dict[str, object] = {}
    for name, value in OmegaConf.to_container(config, enum_to_str=True).items():  # type: ignore[union-attr]
        key = f"{prefix}{name}"
        found |= leaves(config[name], f"{key}.") if isinstance(value, dict) and value else {key: value}
    return found


def another(value: object) -> object:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else ["other"] if isinstance(value, list) else "other"


def test_every_key_that_may_not_change_is_named_and_refused(run_folder: Path, tmp_path: Path) -> None:
    """The dataset, the lengths, the rank and the dtype among them."""
    wanted = {
        key: value
        for key, value in leaves(COMPOSED.config).items()
        if not may_change(key) and key not in (*RESUME_IGNORED_KEYS, *DERIVED_KEYS, *BATCH_KEYS)
    }
    assert {
        "data.dataset",
        "data.max_target_length",
        "finetuning.lora_rank",
        "model.dtype",
        "stage.name",
    } <= wanted.keys()
    checkpoint_2 = run_folder / "checkpoints/checkpoint-2"
    run = dataclasses.replace(
        COMPOSED.run, trainer=dataclasses.replace(COMPOSED.run.trainer, resume_from_checkpoint=str(checkpoint_2))
    )
    accepted = []
    for key, value in wanted.items():
        config = OmegaConf.create(OmegaConf.to_container(COMPOSED.config))
        OmegaConf.update(config, key, another(value))
        try:
            checkpoint_to_resume(run, config, tmp_path / "second", 1)
            accepted.append(key)
        except CheckpointError as error:
            assert f"with another configuration: {key} is " in str(error)
    assert accepted == []


def test_a_longer_training_with_other_measurements_is_the_same(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {
        "max_steps": 20, "logging_steps": 1.0, "save_steps": 3.0, "eval_strategy": "steps", "eval_steps": 2.0,
        "disable_tqdm": True, "save_total_limit": 2, "dataloader_num_workers": 2, "per_device_eval_batch_size": 2,
        "activation_checkpointing": True, "output_dir": "elsewhere",
    }  # fmt: skip
    assert resumed(run_folder, tmp_path / "second", **changed) == run_folder / "checkpoints/checkpoint-4"
    assert "trainer.max_steps=20, 8 in the checkpoint's run: the schedule" in capsys.readouterr().out


def test_a_training_that_ended_before_the_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    assert "is at step 4, past trainer.max_steps=3" in refused(run_folder, tmp_path / "second", max_steps=3)
    assert resumed(run_folder, tmp_path / "second", max_steps=4) is not None


def test_keys_that_an_earlier_version_did_not_have_are_at_their_defaults(run_folder: Path, tmp_path: Path) -> None:
    saved = OmegaConf.create(SAVED)
    for group, name in (("data", "loss_on"), ("data", "eval_dataset"), ("trainer", "max_grad_norm"), ("stage", "name")):
        saved[group].pop(name)
    saved.stage.name = "sft"
    (run_folder / "config.yaml").write_text(OmegaConf.to_yaml(saved), encoding="utf-8")
    assert resumed(run_folder, tmp_path / "second") is not None
    assert "trainer.max_grad_norm" in refused(run_folder, tmp_path / "second", max_grad_norm=0.5)


def test_every_pattern_of_what_may_change_is_of_a_key() -> None:
    assert [pattern for pattern in MAY_CHANGE if not fnmatch.filter(legal_keys(), pattern)] == []
    free = {key for key in legal_keys() if may_change(key)}
    assert {"trainer.max_steps", "trainer.eval_steps", "tracker.project", "generation.top_p"} <= free
    assert not free & {
        "trainer.learning_rate",
        "data.dataset",
        "finetuning.lora_rank",
        "stage.beta",
        "quant.quantization_type",
    }


@pytest.mark.parametrize(
    ("made", "same"),
    [
        (lambda weights: torch.optim.AdamW(weights, fused=True), True),
        (lambda weights: torch.optim.SGD(weights, lr=1e-3), False),
        (lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9), False),
        (lambda weights: torch.optim.Adagrad(weights), False),
        (lambda weights: torch.optim.RMSprop(weights), False),
    ],
)
def test_the_optimizer_state_is_of_the_same_optimizer(tmp_path: Path, made, same: bool) -> None:  # type: ignore[no-untyped-def]
    layer = torch.nn.Linear(2, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = made(layer.parameters())
    optimizer.step()
    saved = checkpoint(tmp_path, 2)
    if same:
        require_same_optimizer(saved, optimizer, "it")
    else:
        with pytest.raises(
            CheckpointError, match=r"saved with another optimizer than trainer\.optim=it: its state holds exp_avg"
        ):
            require_same_optimizer(saved, optimizer, "it")
