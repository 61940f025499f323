"""The trackers' clients are installed by `make test-trackers`; where they write is a folder of this session."""

import os
import tempfile
from collections.abc import Iterator

import pytest
from warm_server import WarmServer

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="glmtuner-trackio-")  # read when trackio is imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def server() -> Iterator[WarmServer]:
    """Runs command lines in forks of a process that has imported torch."""
    started = WarmServer()
    yield started
    started.close()
