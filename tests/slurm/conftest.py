"""Each worker of pytest has a SLURM of its own, of those that `make test-slurm` has started; without it, the tests use the user's."""

import os


def pytest_configure() -> None:
    """Choose the SLURM, before the modules of the tests copy the environment."""
    if started := os.environ.get("SLURM_CONFS", "").split():
        number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.environ["SLURM_CONF"] = started[number % len(started)]
