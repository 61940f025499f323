"""What the hub's client raises, as one paragraph."""

from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from glmtuner.config.groups import Model
from glmtuner.errors import CheckpointError
from glmtuner.families.hub import from_hub, http_errors

(HTTP_ERROR,) = http_errors(HfHubHTTPError)  # of the client that this huggingface_hub uses


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (LocalEntryNotFoundError("no connection, and nothing in the cache"), "set HF_ENDPOINT to a mirror"),
        (OSError("the proxy refuses"), "set HF_ENDPOINT to a mirror"),
        (HTTP_ERROR("the server stopped sending in the middle of a file"), "set HF_ENDPOINT to a mirror"),
        (EOFError("Ran out of input"), "its files are damaged"),
        (FileNotFoundError("no file named model-00002-of-00003.safetensors"), "its files are damaged"),
    ],
)
def test_each_failure_has_its_own_advice(raised: Exception, told: str) -> None:
    def fetch() -> Any:
        raise raised

    with pytest.raises(CheckpointError, match=told) as error:
        from_hub(Model(model_name_or_path="a/b", family="auto"), fetch)
    assert str(raised) in str(error.value) and "model.model_name_or_path=a/b" in str(error.value)
