"""A model's config.json and other files, from a folder or the hub, without importing torch."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from glmtuner.config.groups import Model
from glmtuner.config.offline import advice, offline_folder
from glmtuner.config.paths import model_source
from glmtuner.console import say
from glmtuner.errors import CheckpointError, DataError
from glmtuner.families.config_json import check_config, check_weights
from glmtuner.families.hub_files import model_files, small_files

T = TypeVar("T")
RETRY_WAITS_S = (1.0, 2.0, 4.0)  # before each further attempt after a transient network error
RETRY_WITHIN_S = 20.0  # of the first attempt; one that fails later has been retried by huggingface_hub itself
# Parts of the errors of torch, sentencepiece and transformers for a truncated file, or for shapes that differ
DAMAGE = ("PytorchStreamReader", "ModelProto", "mismatched", "size mismatch")
TRANSIENT_HTTP_ERRORS = {"TimeoutException", "NetworkError", "RemoteProtocolError"}  # of httpx and httpx2
TRANSIENT_STATUS_CODES = {408, 429}  # request timeout, rate limit; and all of the server's own errors, from 500


def hub_options(model: Model) -> dict[str, Any]:
    """The options by which transformers looks up files: revision, cache and token."""
    return {"revision": model.model_revision, "cache_dir": model.cache_dir, "token": model.use_auth_token or None}


def source_of(model: Model, name: str, *, weights: bool = False) -> str:
    """The folder or hub id that transformers understands for a name of the model's; of ModelScope the folder it is in.

    With `model.use_modelscope` what is missing is downloaded there: the weights only if they are asked for. Raises
    CheckpointError.
    """
    source = model_source(name)
    if not model.use_modelscope or Path(source).exists():
        return source
    from glmtuner.families.modelscope import snapshot

    label = f"model.use_modelscope=true model.model_name_or_path={name}"
    try:
        choose = model_files if weights else small_files
        return str(snapshot("models", source, model.model_revision, choose, cache_dir=model.cache_dir, label=label))
    except DataError as error:
        raise CheckpointError(str(error)) from None


def read_config(model: Model) -> dict[str, Any]:
    """The model's config.json, without importing torch. Raises CheckpointError if there is none or it cannot be read."""
    source = source_of(model, model.config_name or model.model_name_or_path)
    if Path(source).is_dir():
        path = Path(source) / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"model.model_name_or_path={model.model_name_or_path}: the folder has no config.json, so it holds no model; "
                f"it holds {', '.join(sorted(entry.name for entry in Path(source).iterdir())[:8]) or 'nothing'}"
            )
    else:
        from huggingface_hub import hf_hub_download

        path = Path(from_hub(model, lambda: hf_hub_download(source, "config.json", **hub_options(model))))
    try:
        config = check_config(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file ({error}); download the model again") from None
    if source == model_source(model.model_name_or_path) and path.parent == Path(source):
        check_weights(config, path.parent)
    return config


def from_hub(model: Model, fetch: Callable[[], T]) -> T:
    """What `fetch` returns; a transient network error is retried, any other failure becomes a CheckpointError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from safetensors import SafetensorError

    name = f"model.model_name_or_path={model.model_name_or_path}"
    load_errors: tuple[type[BaseException], ...] = (*http_errors(HfHubHTTPError), OSError, ValueError)
    try:
        return with_retries(name, fetch)
    except GatedRepoError:
        raise CheckpointError(
            f"{name}: the hub asks you to accept the model's terms; accept them on its page, run `hf auth login`, "
            "and type model.use_auth_token=true"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"{name}: no such folder here and no such model on the hub; type the folder's path, the hub id "
            "(organisation/name), or model=tiny_glm, which ships with glmtuner"
        ) from None
    except LocalEntryNotFoundError as error:  # a FileNotFoundError, but no file is damaged
        raise _not_loaded(model, error) from None
    except (SafetensorError, UnpicklingError, EOFError, FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(part in reason for part in DAMAGE):
            raise
        if isinstance(error, UnpicklingError):
            reason = "a .bin file holds something other than tensors, and nothing else is unpickled"
        raise CheckpointError(
            f"{name}: its files are damaged, incomplete, or do not belong together ({reason[:300]}); download them again, "
            "or run `git lfs pull` in a folder that git cloned"
        ) from None
    except load_errors as error:
        raise _not_loaded(model, error) from None


def with_retries(name: str, fetch: Callable[[], T]) -> T:
    """What `fetch` returns, called again after each of `RETRY_WAITS_S` while it fails with a transient network error.

    huggingface_hub retries most requests itself, for about half a minute, but not all of them. After that there is no
    further attempt, so that an unreachable hub is reported as soon as without these retries.
    """
    if offline_folder() is not None:
        return fetch()
    start = time.monotonic()
    for wait_s in RETRY_WAITS_S:
        try:
            return fetch()
        except Exception as error:
            if not is_transient(error) or time.monotonic() - start > RETRY_WITHIN_S:
                raise
            cause = transient_cause(error) or error
            reason = " ".join(str(cause).split())
            say(f"{name}: {type(cause).__name__}: {reason[:200]}; trying again in {wait_s:g} s")
        time.sleep(wait_s)
    return fetch()


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: the connection failed, was lost or timed out, or the server has a problem."""
    return transient_cause(error) is not None


def transient_cause(error: BaseException) -> BaseException | None:
    """The error of the network or of the server that caused this one; None if another attempt would fail as well.

    transformers and huggingface_hub wrap the client's error in errors of their own, or raise them while they handle it.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for cause in (chain := _causes(error)):
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):  # a ConnectionError
            return None
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return cause if status >= 500 or status in TRANSIENT_STATUS_CODES else None
        if isinstance(cause, ConnectionError | TimeoutError):
            return cause
        if not TRANSIENT_HTTP_ERRORS.isdisjoint(base.__name__ for base in type(cause).__mro__):
            return cause
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """The error and those that it was raised from, the last cause at the end."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return chain


def http_errors(hub_error: type[Exception]) -> tuple[type[BaseException], ...]:
    """The base class of the errors of huggingface_hub's HTTP client (httpx2, before httpx), from which its own derive.

    A connection that breaks or stalls during a download raises an error of the client, not of huggingface_hub.
    """
    return tuple(base for base in hub_error.__mro__ if base.__name__ == "HTTPError")


def _not_loaded(model: Model, error: BaseException) -> CheckpointError:
    reason = " ".join(str(error).split())
    if (cause := transient_cause(error)) not in (None, error):  # transformers only says that it cannot load the files
        reason = f"{' '.join(str(cause).split())[:200]}: {reason}"
    what = "name a local folder with model.model_name_or_path=…, or set HF_ENDPOINT to a mirror that answers"
    return CheckpointError(
        f"model.model_name_or_path={model.model_name_or_path} (revision {model.model_revision}) cannot be loaded: "
        f"{reason[:400]}; {what if offline_folder() is None else advice()}"
    )
