"""`export RUN --to DIR`: a run's model as a standalone folder, which is loaded and compared with the run before it is renamed to DIR."""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.run_folder.names import RECEIPT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glmtuner.data.records import Message
    from glmtuner.finetuning.start import Checkpoint
    from glmtuner.inference.finished import Finished
    from glmtuner.templates.base import Template

HELP = "its model as a standalone folder, merged and checked"
VALUE_HEAD_FILE = "value_head.safetensors"  # of a reward model
DTYPES = ("float32", "float16", "bfloat16")
PROMPT = "你好，请用一句话介绍你自己。Hello, who are you?"
NEW_TOKENS = 16


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="+", help="run folders or adapters, merged in this order")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--layout", choices=("transformers", "published"), default="transformers",
        help="ChatGLM2, ChatGLM3 and GLM-4: transformers' own names, or those of their first release",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; by default that of the base")
    parser.add_argument("--shard", default="5GB", metavar="SIZE", help="the largest file")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="a Hugging Face repository to upload to")


@dataclass(frozen=True)
class Answer:
    """A model's response to the fixed prompt: logits [1, S, vocabulary] in float32, and the token ids of the greedy answer."""

    logits: "torch.Tensor"
    ids: list[int]


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say
    from glmtuner.finetuning.adapter import allowed_difference
    from glmtuner.finetuning.start import checkpoint_in, checkpoints_of
    from glmtuner.launch.build import REWARD_MODEL, finished_run, is_policy
    from glmtuner.run_folder.files import write_json
    from glmtuner.run_folder.provenance import version_of

    to = arguments.to
    if to.exists() and any(to.iterdir() if to.is_dir() else [to]):
        raise ConfigError(f"--to {to}: it exists and is not empty; name a new folder, or remove that one")
    illegal = [override for override in overrides if override.startswith(("quant=", "model.dtype="))]
    if illegal:
        raise ConfigError(
            f"{illegal[0]}: weights are merged in float32 on the unquantized base; leave it out, and type --dtype for the "
            "dtype of the written weights"
        )
    # merged in float32 on the unquantized base, also if the adapter was trained on a quantized one
    finished = finished_run(arguments.run, ["quant=none", "model.dtype=float32", *overrides], generates=False)
    dtype = arguments.dtype or stored_dtype(finished)
    by_peft = answer_of_peft(finished, checkpoints_of(finished.run.model))
    expected = by_peft or answer(finished, finished.model)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    prefix = not finished.finetuning.mergeable
    if prefix:
        write_prefix(finished, partial, arguments.layout)
    else:
        write_model(finished, partial, arguments.layout, dtype, arguments.shard)
    is_reward_model = not is_policy(arguments.run[-1])
    if is_reward_model:
        shutil.copyfile(checkpoint_in(str(arguments.run[-1])).folder / VALUE_HEAD_FILE, partial / VALUE_HEAD_FILE)
    actual = answer(finished, reloaded(finished, partial, prefix))
    drift = (actual.logits - expected.logits).abs().max().item()
    allowed = allowed_difference(expected.logits, "float32" if prefix else dtype)
    same = actual.ids == expected.ids
    if not drift <= allowed or (dtype == "float32" and not same):
        raise CheckpointError(
            f"the export in {partial} differs from the run's model{', as PEFT loads it' if by_peft else ''}: a logit "
            f"by {drift:.2g} (rounding explains {allowed:.2g} at "
            f"most), and the greedy answers are {'equal' if same else 'different'}; the folder is kept for inspection, do not use it"
        )
    receipt = {
        "runs": [str(path) for path in arguments.run], "base": finished.run.model.model_name_or_path, "layout": arguments.layout,
        "dtype": dtype, "method": finished.finetuning.finetuning_type, "drift": drift, "same_greedy_answer": same,
        "prompt": PROMPT, "template": finished.template.describe(), "glmtuner": version_of("glmtuner"),
        "stage": REWARD_MODEL if is_reward_model else "a model that answers",
    }  # fmt: skip
    write_json(partial / RECEIPT, receipt)
    if to.exists():
        to.rmdir()
    partial.rename(to)
    comparison = "the same greedy answer" if same else "another greedy answer"
    say(f"{to}: {'prefix' if prefix else dtype}, logits within {drift:.2g} of the run's, {comparison}")
    if is_reward_model:
        say(
            "a reward model, which scores answers and generates none: a score is weight · h + bias with the weight and bias of "
            f"{VALUE_HEAD_FILE} and h the last layer's hidden state of the answer's last token"
        )
    if arguments.push_to:
        push(to, arguments.push_to)
    return 0


def stored_dtype(finished: "Finished") -> str:
    """The dtype in the base's config.json; float32 where it names none, or one that is not a choice of --dtype."""
    from glmtuner.families.hub import read_config

    config = read_config(finished.run.model)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return dtype if dtype in DTYPES else "float32"


def answer(finished: "Finished", model: "PreTrainedModel") -> Answer:
    """The model's logits for the fixed prompt, and its greedy answer."""
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


def answer_of_peft(finished: "Finished", checkpoints: "list[Checkpoint]") -> Answer | None:
    """The answer of the base with the adapters as PEFT itself loads them from their files, the last one unmerged.

    None where a checkpoint is not an adapter that PEFT can merge: PEFT has no such checkpoint, or computes another prefix.
    """
    import dataclasses

    import torch
    from peft import PeftConfig, PeftModel

    from glmtuner.config.new_tokens import new_tokens_in
    from glmtuner.finetuning.start import LORA, TUNED, base_folder
    from glmtuner.launch.device import device_of
    from glmtuner.models.load import load_model
    from glmtuner.models.new_tokens import add_rows

    adapters = [checkpoint for checkpoint in checkpoints if not checkpoint.kind.is_whole_model]
    if not adapters or any(checkpoint.kind not in (LORA, TUNED) for checkpoint in adapters):
        return None
    source, device = finished.run.model, device_of(finished.run)
    if folder := base_folder(checkpoints):
        source = dataclasses.replace(source, model_name_or_path=str(folder), config_name=None)
    model: Any = load_model(source, finished.family, finished.run.quant, device, torch.float32).to(device)  # type: ignore[arg-type]
    add_rows(model, finished.tokenizer, learned=new_tokens_in(folder) if folder else ())
    for checkpoint in adapters:
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        config = PeftConfig.from_pretrained(str(checkpoint.folder))
        config.task_type = "CAUSAL_LM"
        model = PeftModel.from_pretrained(model, str(checkpoint.folder), config=config)
    return answer(finished, model.eval())


def write_model(finished: "Finished", folder: Path, layout: str, dtype: str, shard: str) -> None:
    """Write weights with the adapter merged, config, tokenizer, chat template and generation config."""
    import torch
    from transformers import GenerationConfig

    from glmtuner.finetuning.merge import merged_by_peft
    from glmtuner.models.save import save_model

    model: Any = finished.model
    if hasattr(model, "peft_config"):  # also of a method that PEFT cannot merge
        model = merged_by_peft(model, finished.run.model.checkpoint_dir[-1], finished.finetuning.finetuning_type)
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
    """Write a prefix, which cannot be merged, as a PEFT adapter, in the published layout also as ChatGLM's own code reads it."""
    from glmtuner.finetuning.p_tuning import save_published_prefix

    finished.finetuning.save(finished.model, folder)
    if layout == "published":
        save_published_prefix(folder, folder)
    write_tokenizer(finished, folder, "published")


def write_tokenizer(finished: "Finished", folder: Path, layout: str) -> None:
    """Write the tokenizer with the run's template; in transformers' layout as a fast tokenizer that needs no code of glmtuner, where possible."""
    from glmtuner.models.tokenization_chatglm import ChatGLMTokenizer, as_fast

    tokenizer = finished.tokenizer
    if layout == "transformers" and isinstance(tokenizer, ChatGLMTokenizer) and not tokenizer.first_generation:
        tokenizer = as_fast(tokenizer)
    jinja = finished.template.jinja()
    if jinja is not None and tokenizer.is_fast and not renders_the_same(finished.template, tokenizer):
        tokenizer.chat_template = jinja
    tokenizer.save_pretrained(folder)


def renders_the_same(template: "Template", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's own chat template gives the prompts and the answers of the run's template, and its tools.

    It is kept then: it also has what a template of ours may not have.
    """
    from glmtuner.data.records import Message
    from glmtuner.templates.jinja import TokenizersOwn
    from glmtuner.templates.named import own_source

    source = own_source(tokenizer)
    if source is None:
        return False
    asked, told = Message("user", "你好, x"), Message("assistant", "1\n\n2 = 二")
    conversations = [
        [asked],
        [asked, told, asked],
        [Message("system", "a. b"), asked, told, asked],
        [asked, told],
        [asked, told, asked, told],
    ]
    try:
        own = TokenizersOwn(source=source).encode(tokenizer, conversations)
        ours = template.encode(tokenizer, conversations)
    except ConfigError:  # it refuses system turns, for example
        return False
    return all(
        list(left.input_ids) == list(right.input_ids)
        and (turns[-1].role != "assistant" or left.answers[-1:] == right.answers[-1:])
        for turns, left, right in zip(conversations, own, ours, strict=True)
    ) and (not template.renders_tools(tokenizer) or renders_the_same_tools(template, tokenizer))


def renders_the_same_tools(template: "Template", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's own chat template gives the prompts of the run's template for tools, their calls and results.

    Asked as other programs ask it: GLM-4's own reads tools from a turn, and ignores those that stand beside the turns.
    """
    from glmtuner.data.records import Message
    from glmtuner.templates.tool_calls import ToolCall

    parameters = {"type": "object", "properties": {"城市": {"type": "string"}}, "required": ["城市"]}
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "description": "天气 <b> & 'c'", "parameters": parameters},
    }
    asked, system = Message("user", "北京?"), Message("system", "a. b")
    call = ToolCall("get_weather", {"城市": "北京", "days": 3}, "call00001")
    called = Message("assistant", "", tool_calls=(call,))
    result, told = Message("tool", "晴", call_id="call00001"), Message("assistant", "1\n\n2 = 二")
    conversations = [[asked], [system, asked], [asked, called, result], [asked, called, result, told, asked]]
    for turns in conversations:
        try:
            text = tokenizer.apply_chat_template(
                [_as_openai(turn) for turn in turns], tools=[tool], add_generation_prompt=True, tokenize=False
            )
            (ours,) = template.encode(tokenizer, [turns], [[tool]])
        except Exception:  # jinja templates raise whatever their authors chose
            return False
        if list(tokenizer(str(text), add_special_tokens=False).input_ids) != list(ours.input_ids):
            return False
    return True


def _as_openai(turn: "Message") -> dict[str, Any]:
    called = {"tool_calls": [call.as_openai() for call in turn.tool_calls]} if turn.tool_calls else {}
    return {"role": turn.role, "content": turn.content, **called}


def reloaded(finished: "Finished", folder: Path, prefix: bool) -> "PreTrainedModel":
    """The written model, loaded by transformers as a user would, in float32 on the run's device."""
    import torch
    from transformers import AutoConfig

    from glmtuner.models.load import auto_class, load_model
    from glmtuner.models.new_tokens import add_rows

    if prefix:
        from glmtuner.launch.device import device_of

        device = device_of(finished.run)
        base = load_model(finished.run.model, finished.family, finished.run.quant, device, torch.float32).to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
        add_rows(base, finished.tokenizer)
        model = finished.finetuning.attach(base, finished.family)
        finished.finetuning.restore(model, folder)
        return model.eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    loaded: PreTrainedModel = auto_class(config).from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return loaded.to(finished.model.device).eval()  # type: ignore[arg-type]


def push(folder: Path, repository: str) -> None:
    """Upload the folder to the Hugging Face hub; a new repository is private."""
    from huggingface_hub import HfApi

    from glmtuner.console import say

    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"glmtuner export of {folder.name}")
    except Exception as error:  # no network, no token, no write access, a wrong name: the export itself is complete
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--push-to {repository}: the upload failed ({reason[:300]}); the export in {folder} is complete. Type `hf auth "
            f"login` with a token that has write access, then `hf upload {repository} {folder}`"
        ) from None
    say(f"uploaded to {url}")
