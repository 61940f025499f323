"""A model's config, tokenizer and weights, from a folder or a hub, never running code that came with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.config.paths import model_source
from glmtuner.config.schema import Dtype, Model, Quant
from glmtuner.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

        path = Path(_from_hub(model, lambda: hf_hub_download(source, "config.json", **hub_options(model))))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON file ({error}); download the model again") from None


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer, padding on the left, with a padding token."""
    from transformers import AutoTokenizer

    source = model_source(model.tokenizer_name or model.model_name_or_path)
    tokenizer = _from_hub(
        model,
        lambda: AutoTokenizer.from_pretrained(
            source,
            use_fast=model.use_fast_tokenizer,
            trust_remote_code=False,
            padding_side="left",
            **hub_options(model),
        ),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(model: Model, quant: Quant, device: "torch.device", compute_dtype: "torch.dtype") -> "PreTrainedModel":
    """The causal LM with the weights of the checkpoint, in `model.dtype`; quantized ones compute in `compute_dtype`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = model_source(model.model_name_or_path)
    config = _from_hub(
        model,
        lambda: AutoConfig.from_pretrained(
            model_source(model.config_name or model.model_name_or_path), trust_remote_code=False, **hub_options(model)
        ),
    )
    dtype = "auto" if model.dtype is Dtype.auto else getattr(torch, model.dtype.value)
    loaded = _from_hub(
        model,
        lambda: AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            **hub_options(model),
            **quant.loading(device, compute_dtype),
        ),
    )
    if model.dtype is Dtype.auto and device.type == "cpu" and loaded.dtype == torch.float16:
        loaded = loaded.float()  # half precision is slow and partly missing on a CPU
    return loaded


def _from_hub(model: Model, fetch: Callable[[], Any]) -> Any:
    """What `fetch` returns; its failures as one paragraph."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from requests.exceptions import RequestException

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
    except (HfHubHTTPError, RequestException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name} (revision {model.model_revision}) cannot be loaded: {reason[:400]}; name a local folder with "
            "model.model_name_or_path=…, or set HF_ENDPOINT to a mirror that answers"
        ) from None
