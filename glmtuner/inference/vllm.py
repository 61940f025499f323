"""Greedy answers by vLLM (the optional extra `vllm`), which loads what the run's model is when its adapters are merged."""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from glmtuner.errors import ConfigError
from glmtuner.inference.generate import Decoding, until_stop
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    from torch import nn

AT_ONCE = 1024  # prompts that vLLM is given together: enough to keep it busy, and the most answers that a kill can lose
INSTEAD = "type generation.engine=transformers"


def check_installed() -> None:
    """Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"generation.engine=vllm: vLLM is not installed here; type pip install 'glmtuner[vllm]', or {INSTEAD}"
        )


def vllm_answers(
    model: "nn.Module", prompts: Sequence[Sequence[int]], decoding: Decoding, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """(place in `prompts`, token ids of the answer), in the order of the prompts.

    Raises ConfigError for a model that vLLM does not know. The model waits on the CPU, so that vLLM has the GPU.
    """
    base: Any = unwrapped(model)
    if hasattr(base, "prefix_encoder"):
        raise ConfigError(f"generation.engine=vllm: it does not know the prefix of P-Tuning v2; {INSTEAD}")
    if type(base).__name__ == "ChatGLMForConditionalGeneration":
        raise ConfigError(f"generation.engine=vllm: it does not know the first ChatGLM-6B; {INSTEAD}")
    if not prompts:
        return
    device = base.device
    with TemporaryDirectory(prefix="glmtuner-vllm-") as folder:
        write_merged(model.to("cpu"), Path(folder))
        if device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        from vllm import LLM, SamplingParams

        engine = LLM(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=max(map(len, prompts)) + decoding.max_new_tokens,
            seed=seed,
        )
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=list(decoding.stop_ids),
            ignore_eos=True,  # the stop ids are the whole of it
            repetition_penalty=decoding.repetition_penalty,
            detokenize=False,
        )
        for start in range(0, len(prompts), AT_ONCE):
            given = [{"prompt_token_ids": list(prompt)} for prompt in prompts[start : start + AT_ONCE]]
            for place, found in enumerate(engine.generate(given, sampling, use_tqdm=False), start):
                yield place, until_stop(found.outputs[0].token_ids, decoding.stop_ids)
    model.to(device)


def write_merged(model: "nn.Module", folder: Path) -> None:
    """The model with its adapters merged, in transformers' own layout; the model itself stays as it is."""
    from glmtuner.models.save import save_model

    merged: Any = model
    if hasattr(model, "merge_and_unload"):
        merged = copy.deepcopy(model).merge_and_unload()
    save_model(merged, folder, "transformers")
