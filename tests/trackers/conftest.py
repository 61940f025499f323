"""The trackers' clients are installed by `make test-trackers`; where they write is a folder of this session."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from warm_server import Ended, WarmServer

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="glmtuner-trackio-")  # read when trackio is imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


class PatientServer(WarmServer):
    """Clients take long to import, and MLflow to create a database."""

    def run(self, *words: str, timeout: float = 500.0, **more: Any) -> Ended:
        return super().run(*words, timeout=timeout, **more)


@pytest.fixture(scope="session")
def server() -> Iterator[WarmServer]:
    """Runs command lines in forks of a process that has imported torch."""
    started = PatientServer(os.environ)
    yield started
    started.close()
