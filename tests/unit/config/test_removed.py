"""What earlier versions had: a user who types it, or has it in a preset of their own, is told why it is gone and what to type."""

from pathlib import Path

import pytest

from glmtuner.config.compose import compose, compose_every_job, presets, searched_dirs
from glmtuner.config.removed import KEYS, PRESETS
from glmtuner.config.schema import legal_keys
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets

register_presets()

WHY = "DeepSpeed was removed, since its checkpoints could not be resumed safely; type parallel=fsdp2"


def refused(*words: str, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(["model=tiny_glm", *words], **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_that_is_told_to_be_gone_is_there():
    known = presets(searched_dirs(None))
    assert not [name for group, name in PRESETS if name in known[group]]
    assert not {*KEYS} & legal_keys().keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel=zero2"], [f"parallel=zero2: {WHY}"]),
        (["parallel=zero3", "parallel.processes=2"], [f"parallel=zero3: {WHY}", "parallel.cpu_offload=true"]),
        (["parallel.deepspeed_config=a.json"], [f"parallel.deepspeed_config=a.json: {WHY}"]),
        (["parallel=fsdp2", "parallel.offload_parameters=false"], [f"{WHY} parallel.cpu_offload=false"]),
        (
            ["parallel=zero2", "parallel.offload_optimizer=true"],
            [f"parallel=zero2: {WHY}", f"parallel.offload_optimizer=true: {WHY} parallel.cpu_offload=true"],
        ),
        (["trainer.deepspeed=a.json"], [f"trainer.deepspeed=a.json is not a glmtuner key: {WHY}"]),
        (["trainer.deepspeed={zero_optimization: {stage: 2}}"], [WHY]),
    ],
)
def test_what_is_typed(words: list[str], told: list[str]) -> None:
    message = refused(*words)
    assert all(part in message for part in told), message
    assert "did you mean" not in message and "legal:" not in message


def test_the_jobs_of_a_sweep_are_refused_before_the_first():
    with pytest.raises(ConfigError, match="parallel=zero3: DeepSpeed was removed"):
        compose_every_job(["model=tiny_glm", "parallel=ddp,zero3"])


def test_presets_of_the_user_are_named(tmp_path: Path) -> None:
    for name, content in {
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /parallel: zero3\n",
        "experiment/offloads": "# @package _global_\ndefaults:\n  - override /parallel: fsdp2\nparallel:\n  offload_optimizer: true\n",
        "parallel/mine": "defaults: [/schema/parallel/zero2@_here_]\nname: mine\n",
        "parallel/like_it": "defaults: [/parallel/zero2@_here_]\n",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    folder = str(tmp_path)
    assert refused("experiment=mine", config_dir=folder).startswith(f"parallel=zero3: {WHY}")
    assert f"parallel.offload_optimizer=…: {WHY}" in refused("experiment=offloads", config_dir=folder)
    for name in ("mine", "like_it"):
        assert f"In 'parallel/{name}': parallel=zero2: {WHY}" in refused(f"parallel={name}", config_dir=folder)
    assert compose(["model=tiny_glm", "experiment=mine", "parallel=fsdp2"], config_dir=folder).run.parallel.sharded


def test_what_is_advised_is_legal():
    run = compose(["model=tiny_glm", "parallel=fsdp2", "parallel.cpu_offload=true"]).run
    assert run.parallel.cpu_offload is True
