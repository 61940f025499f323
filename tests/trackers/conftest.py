"""The trackers' clients are installed by `make test-trackers`; where they write is a folder of this session."""

import os
import tempfile

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="glmtuner-trackio-")  # read when trackio is imported
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
