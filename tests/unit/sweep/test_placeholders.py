"""Secrets of a sweep: Hydra and its launchers get placeholders, the jobs get the values."""

import os
import stat
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from typed_secrets import HUB_TOKEN, LINES, leaks, typed_overrides

from glmtuner.cli.main import main
from glmtuner.errors import ConfigError
from glmtuner.sweep import job, launchers
from glmtuner.sweep.launchers import hide_setup
from glmtuner.sweep.placeholders import VARIABLE, placeholders, reveal, without_secrets

SWEEP = ["-m", "model=tiny_glm", "data.dataset=belle_sample", "trainer.seed=1,2", "trainer.disable_tqdm=true", "name=s"]


def test_placeholders_and_what_they_stand_for() -> None:
    overrides = [
        "trainer.seed=1,2", "trainer.hub_token='a b'", "+x.token=one,two", "name=plain", "~y", "a=[export B_KEY=c,export HF_TOKEN=d]",
        "hydra.sweeper.storage=mysql://me:pw@h/db", "trainer.hub_token='a b'",
    ]  # fmt: skip
    with placeholders(overrides) as public:
        assert public == [
            "trainer.seed=1,2", "trainer.hub_token=GLMTUNER_SECRET_0_", "+x.token=GLMTUNER_SECRET_1_,GLMTUNER_SECRET_2_", "name=plain",
            "~y", "a=[export B_KEY=c,export HF_TOKEN=GLMTUNER_SECRET_3_]", "hydra.sweeper.storage=mysql://GLMTUNER_SECRET_4_@h/db",
            "trainer.hub_token=GLMTUNER_SECRET_0_",
        ]  # fmt: skip
        assert [reveal(override) for override in public] == overrides
    assert VARIABLE not in os.environ
    with pytest.raises(ConfigError, match=f"the environment variable {VARIABLE}, and this job did not get it"):
        reveal(public[1])
    with placeholders(["name=x"]) as public:
        assert public == ["name=x"] and VARIABLE not in os.environ


def test_while_a_sweep_runs_its_folder_has_no_secret_and_its_jobs_have_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, secrets = typed_overrides()
    assert len(secrets) >= 30
    seen = []

    def launch(composed, output_dir):
        seen.append(
            (
                composed.run.trainer.seed,
                composed.run.trainer.hub_token,
                composed.run.tracker.tags[0],
                leaks(tmp_path, secrets),
            )
        )
        assert {os.environ[f"LINE_{number}"] for number in range(len(LINES))} == {*LINES.values()}
        assert os.environ["MY_SERVICE_TOKEN"] == "typed-env-18" and os.environ["OTHER"] == "plain"
        assert not [secret for secret in secrets if secret in OmegaConf.to_yaml(HydraConfig.instance().cfg)]
        assert (tmp_path / "outputs/sweeps/s/multirun.yaml").is_file()
        raise RuntimeError(f"the hub refuses {composed.run.trainer.hub_token}")

    monkeypatch.setattr(job, "launch", launch)
    assert main([*SWEEP, "tracker=wandb", *overrides]) == 1
    assert seen == [(seed, HUB_TOKEN, "sk-TypedOpenai0123456789abcdefgh", {}) for seed in (1, 2)]
    assert leaks(tmp_path, secrets) == {} and len([*tmp_path.rglob("failed.json")]) == 2
    assert "MY_SERVICE_TOKEN" not in os.environ and VARIABLE not in os.environ


def test_a_swept_secret_is_not_in_the_names_of_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(job, "launch", lambda composed, output_dir: seen.append(composed.run.trainer.hub_token) or {})
    main(
        [
            "-m",
            "model=tiny_glm",
            "data.dataset=belle_sample",
            "tracker=none",
            "trainer.hub_token=hf_one,hf_two",
            "name=s",
        ]
    )
    assert seen == ["hf_one", "hf_two"] and leaks(tmp_path, ["hf_one", "hf_two"]) == {}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that queues every job and runs none; the environment of `sbatch` is in sbatch.env."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "sbatch": f"env > {tmp_path}/sbatch.env; echo Submitted batch job 7",
        "squeue": "",
        "sinfo": "",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for number in range(2):
        monkeypatch.setenv(f"GLMTUNER_SETUP_{number}", "")  # removed after the test
    monkeypatch.setattr(launchers, "RESULT_GRACE_SECONDS", 0)
    monkeypatch.setattr(launchers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr("glmtuner.launch.memory_check.report_remote_memory", lambda composed: None)
    return folder


def test_what_submitit_writes_has_no_secret(slurm: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    sweep = tmp_path / "here"
    sweep.mkdir()
    monkeypatch.chdir(sweep)
    overrides, secrets = typed_overrides()
    conf = tmp_path / "my_conf/hydra/launcher"
    conf.mkdir(parents=True)
    (conf / "cluster.yaml").write_text(
        "defaults: [/hydra/launcher/slurm@_here_]\nsetup: [module load cuda, export IN_YAML_TOKEN=typed-yaml-19]\n"
    )
    secrets.append("typed-yaml-19")
    words = [*SWEEP, "tracker=wandb", *overrides, "hydra/launcher=cluster", "--config-dir", str(tmp_path / "my_conf")]
    assert main([words[0], *words[-2:], *words[1:-2]]) == 1  # no job has started
    assert leaks(sweep, secrets) == {}
    script = next(sweep.rglob("*.sh"))
    assert "module load cuda" in script.read_text() and 'eval "$GLMTUNER_SETUP_1"' in script.read_text()
    passed = (tmp_path / "sbatch.env").read_text()
    assert "GLMTUNER_SETUP_1=export IN_YAML_TOKEN=typed-yaml-19" in passed and HUB_TOKEN in passed
    pickled = next(sweep.rglob("*_submitted.pkl")).read_bytes()
    assert b"GLMTUNER_SECRET_0_" in pickled and HUB_TOKEN.encode() not in pickled

    typed = "hydra.launcher.setup=['export HF_TOKEN=typed-pw-20',true]"
    assert main([*SWEEP, "tracker=none", "hydra/launcher=slurm", typed, "trainer.seed=5,6"]) == 1
    assert leaks(sweep, ["typed-pw-20"]) == {}
    assert "GLMTUNER_SETUP_0=export HF_TOKEN=typed-pw-20" in (tmp_path / "sbatch.env").read_text()
    capsys.readouterr()
    for wrong in (
        "+hydra.launcher.additional_parameters={export: 'HF_TOKEN=typed-pw-21'}",
        "hydra.launcher.comment=sk-TypedOpenai0123456789",
    ):
        assert main([*SWEEP, "tracker=none", "hydra/launcher=slurm", wrong]) == 2
        assert "holds a secret, which would be in clear in the job's script" in capsys.readouterr().err
    assert leaks(sweep, ["typed-pw-21", "sk-TypedOpenai0123456789"]) == {}


def test_setup_lines_work_in_a_shell(monkeypatch) -> None:
    import subprocess

    line = "export HF_TOKEN='a b\"$c'; export OTHER=1"
    monkeypatch.setenv("GLMTUNER_SETUP_0", "")  # removed after the test
    public = hide_setup({"setup": [line], "comment": None, "srun_args": ["--kill-on-bad-exit=1"]})
    assert "a b" not in str(public)
    script = "\n".join([*public["setup"], 'printf "%s/%s" "$HF_TOKEN" "$OTHER"'])
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == 'a b"$c/1'
    assert hide_setup({"setup": None})["setup"] is None


def test_a_configuration_keeps_its_interpolations() -> None:
    config = OmegaConf.create(
        {
            "a": {"token": "t1", "b": "${a.c}", "c": 3, "list": ["x", "ghp_QwErTyUiOp1234567890"], "m": "???"},
            "p": "GLMTUNER_SECRET_0_",
        }
    )
    OmegaConf.set_readonly(config, True)
    OmegaConf.set_struct(config, True)
    public = without_secrets(config)
    assert OmegaConf.to_container(public) == {
        "a": {"token": "<hidden>", "b": "${a.c}", "c": 3, "list": ["x", "<hidden>"], "m": "???"}, "p": "GLMTUNER_SECRET_0_",
    }  # fmt: skip
    assert OmegaConf.is_readonly(public) and config.a.token == "t1"
