"""The errors of the hub's client as one paragraph each, and which of them are retried."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import serve
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from glmtuner.config.groups import Model
from glmtuner.config.paths import ASSETS, PACKAGE
from glmtuner.errors import CheckpointError
from glmtuner.families import hub
from glmtuner.families.hub import RETRY_WAITS_S, from_hub, http_errors

(HTTP_ERROR,) = http_errors(HfHubHTTPError)  # of the client that this huggingface_hub uses


@pytest.mark.parametrize(
    ("raised", "advice"),
    [
        (LocalEntryNotFoundError("no connection, and nothing in the cache"), "set HF_ENDPOINT to a mirror"),
        (OSError("the proxy refuses"), "set HF_ENDPOINT to a mirror"),
        (HTTP_ERROR("the server stopped sending in the middle of a file"), "set HF_ENDPOINT to a mirror"),
        (EOFError("Ran out of input"), "its files are damaged"),
        (FileNotFoundError("no file named model-00002-of-00003.safetensors"), "its files are damaged"),
    ],
)
def test_each_failure_has_its_own_advice(raised: Exception, advice: str) -> None:
    def fetch() -> Any:
        raise raised

    with pytest.raises(CheckpointError, match=advice) as error:
        from_hub(Model(model_name_or_path="a/b", family="auto"), fetch)
    assert str(raised) in str(error.value) and "model.model_name_or_path=a/b" in str(error.value)


# Retries

MODEL = Model(model_name_or_path="a/b", family="auto")


def http_error(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    request = SimpleNamespace(url="http://hub/a/b", method="GET", headers={})
    response: Any = SimpleNamespace(status_code=status, headers={}, request=request)
    return kind(f"status {status}", response=response)


def client_error(name: str) -> Exception:
    """An error of the HTTP client: a connection that fails, a timeout."""
    client = sys.modules[HTTP_ERROR.__module__.partition(".")[0]]
    error: Exception = getattr(client, name)("the connection failed")
    return error


def caused_by(cause: Exception, wrapper: Exception) -> Exception:
    wrapper.__cause__ = cause
    return wrapper


def during(context: Exception, error: Exception, hidden: bool = False) -> Exception:
    """`error` as it is raised while `context` is handled, with `hidden` from None."""
    error.__context__, error.__suppress_context__ = context, hidden
    return error


class Fetch:
    """Raises these errors in turn, then returns "loaded"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = iter(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if (error := next(self.errors, None)) is not None:
            raise error
        return "loaded"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in seconds, none of which is waited for."""
    waits: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    return waits


TRANSIENT = {
    "connection": lambda: client_error("ConnectError"),
    "timeout": lambda: client_error("ReadTimeout"),
    "interrupted": lambda: client_error("RemoteProtocolError"),
    "server error": lambda: http_error(503),
    "rate limit": lambda: http_error(429),
    "reset": lambda: ConnectionResetError("reset by peer"),
    "by huggingface_hub": lambda: caused_by(client_error("ConnectError"), LocalEntryNotFoundError("not in the cache")),
    "while it was handled": lambda: during(client_error("ReadError"), OSError("Can't load tokenizer for 'a/b'")),
    "by datasets": lambda: caused_by(client_error("ReadError"), ConnectionError("Couldn't reach 'a/b' on the Hub")),
    "by transformers": lambda: caused_by(
        caused_by(http_error(500), LocalEntryNotFoundError("not in the cache")), OSError("could not connect")
    ),
}
PERMANENT = {
    "no such repository": lambda: http_error(404, RepositoryNotFoundError),
    "unauthorized": lambda: http_error(401),
    "gated": lambda: http_error(403, GatedRepoError),
    "no such file": lambda: caused_by(http_error(404), OSError("no file named model.safetensors")),
    "offline": lambda: caused_by(OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("not in the cache")),
    "offline by datasets": lambda: caused_by(OfflineModeIsEnabled("offline"), ConnectionError("Couldn't reach 'a/b'")),
    "hidden": lambda: during(client_error("ReadError"), OSError("no file named config.json"), hidden=True),
    "not in the cache": lambda: LocalEntryNotFoundError("not in the cache"),
    "damaged": lambda: EOFError("Ran out of input"),
}


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_error_is_retried(kind: str, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    fetch = Fetch(TRANSIENT[kind]())
    assert from_hub(MODEL, fetch) == "loaded"
    assert (fetch.calls, waits) == (2, [RETRY_WAITS_S[0]])
    printed = capsys.readouterr().out
    assert printed.startswith("model.model_name_or_path=a/b: ") and printed.endswith("trying again in 1 s\n")


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_error_that_stays_is_reported(kind: str, waits: list[float]) -> None:
    fetch = Fetch(*(TRANSIENT[kind]() for _ in range(9)))
    with pytest.raises(CheckpointError, match="set HF_ENDPOINT to a mirror"):
        from_hub(MODEL, fetch)
    assert (fetch.calls, waits) == (1 + len(RETRY_WAITS_S), [*RETRY_WAITS_S])


@pytest.mark.parametrize("kind", PERMANENT)
def test_a_permanent_error_is_not_retried(kind: str, waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    fetch = Fetch(PERMANENT[kind]())
    with pytest.raises(CheckpointError, match=r"model\.model_name_or_path=a/b"):
        from_hub(MODEL, fetch)
    assert (fetch.calls, waits, capsys.readouterr().out) == (1, [], "")


def test_an_attempt_that_took_long_is_not_repeated(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 30.0])
    monkeypatch.setattr(hub.time, "monotonic", lambda: next(clock))
    fetch = Fetch(*(http_error(503) for _ in range(9)))
    with pytest.raises(CheckpointError, match="set HF_ENDPOINT to a mirror"):
        from_hub(MODEL, fetch)
    assert (fetch.calls, waits) == (2, [1.0])


def test_the_reason_is_that_of_the_network() -> None:
    with pytest.raises(CheckpointError, match="the connection failed: Can't load tokenizer"):
        raise hub._not_loaded(MODEL, during(client_error("ReadError"), OSError("Can't load tokenizer for 'a/b'")))


READ_CONFIG = """\
from glmtuner.config.groups import Model
from glmtuner.errors import CheckpointError
from glmtuner.families.hub import read_config
try:
    print(read_config(Model(model_name_or_path="org/tiny", family="auto"))["model_type"])
except CheckpointError as error:
    print("failed", error)
"""


@pytest.mark.parametrize(("status", "count", "last"), [(503, 1, "glm"), (401, 20, "failed"), (404, 20, "failed")])
def test_a_hub_that_fails_at_first(tmp_path: Path, status: int, count: int, last: str) -> None:
    model = tmp_path / "models/org/tiny"
    model.mkdir(parents=True)
    shutil.copy(ASSETS / "tiny_glm/config.json", model)
    statuses = iter([status] * count)
    server = serve(tmp_path, statuses)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(PACKAGE.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_CONFIG], env=environment, capture_output=True, text=True, timeout=600
    )
    server.shutdown()
    lines = done.stdout.splitlines()
    assert lines and lines[-1].startswith(last), done.stdout + done.stderr
    if last == "failed":
        assert len(lines) == 1 and len([*statuses]) > 15  # it was asked once or twice, and not again and again
