"""A model's config.json and other files, from a folder or a hub, without importing torch."""

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from glmtuner.config.groups import Model
from glmtuner.config.paths import model_source
from glmtuner.errors import CheckpointError

# in what torch, sentencepiece and transformers say of a file that is cut short, or of shapes that differ
DAMAGE = ("PytorchStreamReader", "ModelProto", "mismatched", "size mismatch")


def hub_options(model: Model) -> dict[str, Any]:
    """Where transformers looks for files: revision, cache and token."""
    return {"revision": model.model_revision, "cache_dir": model.cache_dir, "token": model.use_auth_token or None}


def read_config(model: Model) -> dict[str, Any]:
    """The model's config.json, without importing torch. Raises CheckpointError where there is none."""
    source = model_source(model.config_name or model.model_name_or_path)
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
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON file ({error}); download the model again") from None


def from_hub(model: Model, fetch: Callable[[], Any]) -> Any:
    """What `fetch` returns; its failures as one paragraph."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from safetensors import SafetensorError

    name = f"model.model_name_or_path={model.model_name_or_path}"
    try:
        return fetch()
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
    except LocalEntryNotFoundError as error:  # a FileNotFoundError, and nothing is damaged
        raise _not_loaded(model, error) from None
    except (SafetensorError, UnpicklingError, EOFError, FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(mark in reason for mark in DAMAGE):
            raise
        if isinstance(error, UnpicklingError):
            reason = "a .bin file holds something else than tensors, and nothing else is unpickled"
        raise CheckpointError(
            f"{name}: its files are damaged, not all there, or do not belong together ({reason[:300]}); download them again, "
            "or run `git lfs pull` in a folder that git cloned"
        ) from None
    except (HfHubHTTPError, *http_errors(HfHubHTTPError), OSError, ValueError) as error:
        raise _not_loaded(model, error) from None


def http_errors(of_the_hub: type[Exception]) -> tuple[type[BaseException], ...]:
    """What the HTTP client of this huggingface_hub raises (httpx2's HTTPError, httpx's before): its own errors derive from it.

    A connection that breaks or stalls in the middle of a download raises one that is none of huggingface_hub's.
    """
    return tuple(base for base in of_the_hub.__mro__ if base.__name__ == "HTTPError")


def _not_loaded(model: Model, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"model.model_name_or_path={model.model_name_or_path} (revision {model.model_revision}) cannot be loaded: "
        f"{reason[:400]}; name a local folder with model.model_name_or_path=…, or set HF_ENDPOINT to a mirror that answers"
    )
