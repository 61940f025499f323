"""Greedy answers by vLLM (the optional extra `vllm`), which loads the run's model with its adapters merged."""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from glmtuner.distributed import accelerator
from glmtuner.errors import ConfigError
from glmtuner.inference.generate import Decoding, until_stop
from glmtuner.models.unwrap import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

PROMPTS_PER_CALL = 1024  # enough to keep vLLM busy, and the largest number of answers that a killed process loses
USE_TRANSFORMERS = "type generation.engine=transformers"


def check_installed() -> None:
    """Raises ConfigError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"generation.engine=vllm: vLLM is not installed; type pip install 'glmtuner[vllm]', or {USE_TRANSFORMERS}"
        )


def vllm_answers(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], decoding: Decoding, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """(index in `prompts`, token ids of its answer without the stop token), in the order of the prompts.

    Raises ConfigError for a model that vLLM does not support. The model is kept on the CPU meanwhile: vLLM needs the GPU.
    """
    base = unwrapped(model)
    if hasattr(base, "prefix_encoder"):
        raise ConfigError(f"generation.engine=vllm: vLLM does not know the prefix of P-Tuning v2; {USE_TRANSFORMERS}")
    if type(base).__name__ == "ChatGLMForConditionalGeneration":
        raise ConfigError(f"generation.engine=vllm: vLLM does not know the first ChatGLM-6B; {USE_TRANSFORMERS}")
    if not prompts:
        return
    import torch

    device = base.device
    with TemporaryDirectory(prefix="glmtuner-vllm-") as folder:
        move(model, torch.device("cpu"))
        save_merged(model, Path(folder))
        accelerator.empty_cache()
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
            ignore_eos=True,  # the stop ids are all that ends an answer
            repetition_penalty=decoding.repetition_penalty,
            detokenize=False,
        )
        for start in range(0, len(prompts), PROMPTS_PER_CALL):
            token_prompts = [{"prompt_token_ids": list(prompt)} for prompt in prompts[start : start + PROMPTS_PER_CALL]]
            outputs = engine.generate(token_prompts, sampling, use_tqdm=False)
            for index, output in enumerate(outputs, start):
                yield index, until_stop(output.outputs[0].token_ids, decoding.stop_ids)
    move(model, device)


def move(model: "nn.Module", device: "torch.device") -> None:
    """Move the model; a function of its own since transformers' decorator hides the signature of `PreTrainedModel.to`."""
    model.to(device)


def save_merged(model: "PreTrainedModel", folder: Path) -> None:
    """Save the model with its adapters merged, in transformers' own layout; the model itself is not changed."""
    from glmtuner.models.save import save_model

    merged: Any = model
    if hasattr(model, "merge_and_unload"):
        merged = copy.deepcopy(merged).merge_and_unload()
    save_model(merged, folder, "transformers")
