"""`export RUN --to DIR`: a run's model as a folder of its own, loaded again and compared before it is called done."""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from glmtuner.inference.finished import Finished

HELP = "its model as a folder of its own, merged and checked"
RECEIPT = "export.json"  # written last: with it the export is whole
VALUE_HEAD_FILE = "value_head.safetensors"  # of a reward model
PROMPT = "你好，请用一句话介绍你自己。Hello, who are you?"
NEW_TOKENS = 16
# The largest difference of a logit that rounding explains, as a share of the largest logit; float32's is absolute.
DRIFT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="+", help="run folders or adapters, merged in this order")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--layout", choices=("transformers", "published"), default="transformers",
        help="ChatGLM2, ChatGLM3 and GLM-4: transformers' own names, or those of their first release",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DRIFT), help="of the written weights; the base's own by default")
    parser.add_argument("--shard", default="5GB", metavar="SIZE", help="the largest file")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="a repository of the hub to upload to")


@dataclass(frozen=True)
class Answer:
    """What a model makes of the fixed prompt: logits [1, S, vocabulary] in float32, and greedy ids."""

    logits: "torch.Tensor"
    ids: list[int]


def run(given: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say
    from glmtuner.finetuning.start import checkpoint_in
    from glmtuner.launch.build import finished_run, is_policy
    from glmtuner.run_folder.files import write_json
    from glmtuner.run_folder.provenance import version_of

    if given.to.exists() and any(given.to.iterdir() if given.to.is_dir() else [given.to]):
        raise ConfigError(f"--to {given.to}: it exists and is not empty; name a new folder, or remove that one")
    typed = [word for word in overrides if word.startswith(("quant=", "model.dtype="))]
    if typed:
        raise ConfigError(
            f"{typed[0]}: an export is made on the unquantized base, in float32; --dtype says what is written"
        )
    # merged in float32 on the unquantized base: what was trained on a quantized one is added to the weights it stands for
    finished = finished_run(given.run, ["quant=none", "model.dtype=float32", *overrides], to_talk=False)
    dtype = given.dtype or stored_dtype(finished)
    wanted = answer(finished, finished.model)
    partial = given.to.with_name(f".{given.to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    prefix = finished.run.finetuning.finetuning_type == "p_tuning"
    if prefix:
        write_prefix(finished, partial, given.layout)
    else:
        write_model(finished, partial, given.layout, dtype, given.shard)
    scores = not is_policy(given.run[-1])
    if scores:
        shutil.copyfile(checkpoint_in(str(given.run[-1])).folder / VALUE_HEAD_FILE, partial / VALUE_HEAD_FILE)
    again = reloaded(finished, partial, prefix)
    found = answer(finished, again)
    drift = (found.logits - wanted.logits).abs().max().item()
    allowed = DRIFT["float32" if prefix else dtype]
    if dtype != "float32" and not prefix:
        allowed *= wanted.logits.abs().max().item()
    same = found.ids == wanted.ids
    if not drift <= allowed or (dtype == "float32" and not same):
        raise CheckpointError(
            f"the export in {partial} is not the run's model: a logit differs by {drift:.2g} (at most {allowed:.2g} is rounding), "
            f"greedy answers are {'equal' if same else 'different'}; it was left there for a look and is not an export"
        )
    receipt = {
        "runs": [str(path) for path in given.run], "base": finished.run.model.model_name_or_path, "layout": given.layout,
        "dtype": dtype, "method": finished.run.finetuning.finetuning_type, "drift": drift, "same_greedy_answer": same,
        "prompt": PROMPT, "template": finished.template.describe(), "glmtuner": version_of("glmtuner"),
        "stage": "a reward model" if scores else "a model that answers",
    }  # fmt: skip
    write_json(partial / RECEIPT, receipt)
    if given.to.exists():
        given.to.rmdir()
    partial.rename(given.to)
    told = "the same" if same else "another"
    say(f"{given.to}: {'prefix' if prefix else dtype}, logits within {drift:.2g} of the run's, {told} greedy answer")
    if scores:
        say(
            f"a reward model, not one to talk to: an answer's score is weight x hidden state + bias of {VALUE_HEAD_FILE}, read at the "
            "last hidden state of its last token"
        )
    if given.push_to:
        push(given.to, given.push_to)
    return 0


def stored_dtype(finished: "Finished") -> str:
    """The dtype in the base's config.json, float32 where it says none."""
    from glmtuner.families.hub import read_config

    config = read_config(finished.run.model)
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return found if found in DRIFT else "float32"


def answer(finished: "Finished", model: "nn.Module") -> Answer:
    """Logits of the fixed prompt, and the greedy answer to it."""
    import torch

    from glmtuner.data.records import Message
    from glmtuner.inference.generate import Decoding, answers

    (prompt,) = finished.template.encode(finished.tokenizer, [[Message("user", PROMPT)]])
    ids = torch.tensor([prompt.input_ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()
    decoding = Decoding(
        max_new_tokens=NEW_TOKENS, num_beams=1, repetition_penalty=1.0, stop_ids=finished.stops,
        pad_id=finished.tokenizer.pad_token_id,
    )  # fmt: skip
    return Answer(logits, next(iter(answers(model, [prompt.input_ids], decoding, batch_size=1)))[1])


def write_model(finished: "Finished", folder: Path, layout: str, dtype: str, shard: str) -> None:
    """Weights, config, tokenizer, chat template and generation values; the adapter merged."""
    import torch
    from transformers import GenerationConfig

    from glmtuner.models.save import save_model

    model: Any = finished.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model = model.to(getattr(torch, dtype))
    values = finished.run.generation
    sampling = (
        {"temperature": values.temperature, "top_p": values.top_p, "top_k": values.top_k} if values.do_sample else {}
    )
    model.generation_config = GenerationConfig(
        eos_token_id=list(finished.stops), pad_token_id=finished.tokenizer.pad_token_id, do_sample=values.do_sample,
        max_length=values.max_length, repetition_penalty=values.repetition_penalty, **sampling,
    )  # fmt: skip
    save_model(model, folder, layout, shard)  # type: ignore[arg-type]
    write_tokenizer(finished, folder, layout)


def write_prefix(finished: "Finished", folder: Path, layout: str) -> None:
    """A prefix has no weights to merge: PEFT's files, and those of ChatGLM's own trainer in the published layout."""
    from glmtuner.finetuning.p_tuning import save_published_prefix

    finished.run.finetuning.save(finished.model, folder)
    if layout == "published":
        save_published_prefix(folder, folder)
    write_tokenizer(finished, folder, "published")


def write_tokenizer(finished: "Finished", folder: Path, layout: str) -> None:
    """The tokenizer with the run's template; in transformers' layout one that needs no glmtuner, where there is one."""
    from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer, as_fast

    tokenizer = finished.tokenizer
    if layout == "transformers" and isinstance(tokenizer, ChatGLMTokenizer) and not tokenizer.first_generation:
        tokenizer = as_fast(tokenizer)
    jinja = finished.template.jinja()
    if jinja is not None and tokenizer.is_fast:
        tokenizer.chat_template = jinja
    tokenizer.save_pretrained(folder)


def reloaded(finished: "Finished", folder: Path, prefix: bool) -> "nn.Module":
    """What was written, read by transformers as a user would, in float32 on the run's device."""
    import torch
    from transformers import AutoModelForCausalLM

    if prefix:
        from glmtuner.launch.device import device_of
        from glmtuner.models.load import load_model

        device = device_of(finished.run)
        base = load_model(finished.run.model, finished.family, finished.run.quant, device, torch.float32).to(device)
        model = finished.run.finetuning.attach(base, finished.family)
        finished.run.finetuning.restore(model, folder)
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.to(finished.model.device).eval()


def push(folder: Path, repository: str) -> None:
    """Upload the folder to the hub, as a private repository where there is none yet."""
    from huggingface_hub import HfApi

    from glmtuner.console import say

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"glmtuner export of {folder.name}")
    except (
        Exception
    ) as error:  # no network, no token, no right to write, a wrong name: the export is whole all the same
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--push-to {repository}: the hub does not take it ({reason[:300]}); the export in {folder} is whole. Run `hf auth "
            f"login` with a token that may write, then `hf upload {repository} {folder}`"
        ) from None
    say(f"uploaded to {url}")
