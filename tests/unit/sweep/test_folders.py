"""Folders of a sweep and its jobs."""

import pytest

from glmtuner.config.overrides import bracket_lists, parse, quoted_value
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_json
from glmtuner.sweep.folders import hydra_overrides, record_command


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
        record_command(tmp_path, ["trainer.seed=1,2"])
    (tmp_path / "sweep.json").unlink()
    record_command(tmp_path, ["trainer.seed=1,2"])
    record_command(tmp_path, ["trainer.seed=1,2"])
    assert read_json(tmp_path / "sweep.json")["typed"] == ["python -m glmtuner -m trainer.seed=1,2"]
