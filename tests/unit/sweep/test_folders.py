"""Folders of a sweep and its jobs."""

import pytest

from glmtuner.sweep.folders import hydra_overrides


@pytest.mark.parametrize("overrides", [["trainer.seed=3", "trainer.seed=1,2"], ["trainer.seed=1,2"]])
def test_a_swept_key_names_the_job_even_if_it_was_given_before(overrides):
    given = hydra_overrides(["model=tiny_glm", *overrides])
    (excluded,) = [text for text in given if text.startswith("hydra.job.config.override_dirname.exclude_keys=")]
    assert "trainer.seed" not in excluded and "model" in excluded
