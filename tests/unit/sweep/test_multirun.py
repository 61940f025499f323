"""`run_sweep`: the memory line before the jobs are submitted to SLURM."""

import shutil

import pytest

from glmtuner.launch.register import register_presets
from glmtuner.sweep.multirun import run_sweep

register_presets()


class StartsJobs(Exception):
    """Raised in place of the sweep itself."""


@pytest.mark.parametrize(
    ("launcher", "is_reported"),
    [
        (["hydra/launcher=slurm"], True),
        (["hydra/launcher=cluster"], True),
        (["hydra/launcher=joblib"], False),
        ([], False),
    ],
)
def test_memory_is_reported_for_every_launcher_that_submits_to_slurm(launcher, is_reported, tmp_path, monkeypatch):
    folder = tmp_path / "hydra/launcher"
    folder.mkdir(parents=True)
    (folder / "cluster.yaml").write_text("defaults: [/hydra/launcher/slurm@_here_]\npartition: gpu\n", encoding="utf-8")
    reported = []

    def start(overrides):
        raise StartsJobs

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("glmtuner.launch.memory_check.report_remote_memory", reported.append)
    monkeypatch.setattr("glmtuner.run_folder.acquire.require_usable", start)
    with pytest.raises(StartsJobs):
        run_sweep(["finetuning=lora,freeze", *launcher], [], config_dir=str(tmp_path), config_name="config")
    assert [composed.run.finetuning.finetuning_type for composed in reported] == ["lora"] * is_reported
