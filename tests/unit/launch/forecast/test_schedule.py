"""Jobs at once, and submissions under a time limit, by hand."""

import pytest
from omegaconf import OmegaConf

from glmtuner.launch.forecast.schedule import Launcher, elapsed, launcher_of, submissions

SLURM = {
    "_target_": "hydra_plugins.glmtuner.SlurmLauncher", "array_parallelism": 8, "nodes": 1, "tasks_per_node": 1,
    "gpus_per_node": None, "gpus_per_task": None, "timeout_min": 60, "signal_delay_s": 120, "max_num_timeout": 20,
}  # fmt: skip


def launcher(**values: object) -> Launcher:
    return launcher_of(OmegaConf.create({"launcher": values}))


def test_jobs_are_started_as_places_become_free():
    assert elapsed([3, 1, 2, 2], 1) == 8
    assert elapsed([3, 1, 2, 2], 2) == 5  # 3 and then 2; 1, 2
    assert elapsed([3, 1, 2, 2], 256) == 3
    assert elapsed([], 2) == 0


@pytest.mark.parametrize(
    ("start", "work", "limit", "notice", "expected"),
    [
        (60, 10_000, None, 0, 1),
        (60, 3540, 3600, 120, 1),  # the last submission needs no notice
        (60, 3541, 3600, 120, 2),
        (60, 3420 + 3540, 3600, 120, 2),  # 3600 - 120 - 60 in the first, 3600 - 60 in the second
        (60, 3420 + 3541, 3600, 120, 3),
        (60, 3 * 3420 + 3540, 3600, 120, 4),
        (3500, 200, 3600, 120, None),  # loading takes longer than a submission
    ],
)
def test_submissions_under_a_time_limit(start, work, limit, notice, expected):
    assert submissions(start, work, limit, notice) == expected


def test_launchers():
    assert launcher(_target_="hydra._internal.core_plugins.basic_launcher.BasicLauncher") == Launcher()
    joblib = launcher(_target_="hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", n_jobs=3)
    assert (joblib.at_once, joblib.shares_process, joblib.remote) == (3, False, False)
    slurm = launcher(**SLURM)
    assert (slurm.at_once, slurm.limit_s, slurm.notice_s, slurm.most_submissions) == (8, 3600, 120, 21)
    assert slurm.remote and slurm.gpus is None
    assert launcher(**SLURM | {"nodes": 2, "gpus_per_node": 4}).gpus == 8
    assert launcher(**SLURM | {"nodes": 2, "tasks_per_node": 3, "gpus_per_task": 1}).gpus == 6
    assert launcher(**SLURM | {"timeout_min": None}).limit_s is None


def test_an_unknown_launcher_is_named():
    other = launcher(_target_="my.RayLauncher", n_jobs=2)
    assert other.at_once == 2 and "my.RayLauncher" in other.notes[0]
