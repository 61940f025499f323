"""Folders of a sweep and its jobs."""

import pytest

from glmtuner.cli.main import main
from glmtuner.config.overrides import bracket_lists, parse, quoted_value
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_json
from glmtuner.sweep import job
from glmtuner.sweep.folders import hydra_overrides, record_command, recorded


@pytest.mark.parametrize("overrides", [["trainer.seed=3", "trainer.seed=1,2"], ["trainer.seed=1,2"]])
def test_a_swept_key_names_the_job_even_if_it_was_given_before(overrides):
    given = hydra_overrides(["model=tiny_glm", *overrides])
    (excluded,) = [text for text in given if text.startswith("hydra.job.config.override_dirname.exclude_keys=")]
    assert "trainer.seed" not in excluded and "model" in excluded


@pytest.mark.parametrize("name", ["it's", "a\\", "b,c [d] {e}", "中文 😀 $HOME"])
def test_a_sweep_of_any_name_has_its_folder(name):
    overrides = ["trainer.seed=1,2", f"name={quoted_value(name)}"]
    folder = next(item for item in hydra_overrides(overrides) if item.startswith("hydra.sweep.dir="))
    (override,) = parse(bracket_lists([folder], multirun=True))
    assert override.value() == f"outputs/sweeps/{name}"


@pytest.mark.parametrize("text", ["", "[", "[]", "7", '{"typed": 7}', '{"typed": [1]}', "{}", "[" * 5000])
def test_a_damaged_sweep_json_is_named(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"sweep\.json is damaged"):
        record_command(tmp_path, [], ["trainer.seed=1,2"], [])
    (tmp_path / "sweep.json").unlink()
    record_command(tmp_path, [], ["trainer.seed=1,2"], ["a", "b"])
    record_command(tmp_path, [], ["trainer.seed=1,2"], ["b", "c"])
    assert read_json(tmp_path / "sweep.json")["typed"] == ["python -m glmtuner -m trainer.seed=1,2"]
    assert recorded(tmp_path, "jobs") == ["a", "b", "c"]


def test_a_sweep_json_of_before_knows_no_jobs_and_a_damaged_list_of_them_is_named(tmp_path):
    (tmp_path / "sweep.json").write_text('{"typed": [], "cwd": "."}')
    assert recorded(tmp_path, "jobs") == []
    (tmp_path / "sweep.json").write_text('{"typed": [], "jobs": 7}')
    with pytest.raises(CheckpointError, match="no list of jobs"):
        recorded(tmp_path, "jobs")


@pytest.mark.parametrize(
    "swept",
    [
        ["trainer.seed=1,2", "finetuning=lora,freeze"],
        ["finetuning.lora_rank=range(2,5)", "data.dataset=[belle_sample],[belle_sample,identity_sample]"],
        ["metric=glob(rouge*)", "trainer.learning_rate=choice(1e-3,5e-4)"],
        ["trainer.hub_token=hf_one,hf_two"],
    ],
)
def test_the_folders_of_a_sweep_are_known_before_its_jobs_start(swept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "launch", lambda composed, output_dir: output_dir.mkdir(parents=True) or {})
    main(["-m", "model=tiny_glm", "data.dataset=belle_sample", "tracker=none", "name=s", *swept])
    root = tmp_path / "outputs/sweeps/s"
    assert sorted(recorded(root, "jobs")) == sorted(path.name for path in root.iterdir() if path.is_dir())
