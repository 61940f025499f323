"""The fresh processes of scripts/benchmark.py: they make the model, run the bare loops, and time parts of both tools.

Each role reads its settings from a JSON file and writes what it measured to another. The roles that begin with
llamafactory_ run in LLaMA-Factory's environment, so modules are imported inside the functions.
"""

import argparse
import contextlib
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# -- the model and its records -------------------------------------------------------------------------------------------


def question(record: dict[str, Any]) -> str:
    """The user's turn of an Alpaca record, as both tools build it."""
    return "\n".join(part for part in (record["instruction"], record.get("input")) if part)


def prompt_of(record: dict[str, Any]) -> str:
    return f"[gMASK]<sop><|user|>\n{question(record)}<|assistant|>"


def tokenizer_for(texts: list[str], vocabulary_size: int) -> Any:
    """A byte-level BPE with GLM's control tokens; an answer ends with <|user|>, as GLM-4-0414's do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|user|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in CONTROL_TOKENS if token not in ("<|user|>", "<|endoftext|>")],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def small_glm(tokenizer: Any, seed: int, head_size: int | None = None) -> Any:
    """A GLM of nine million parameters with random weights, of the tokenizer's words or of `head_size`."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(seed)
    config = GlmConfig(
        vocab_size=head_size or len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>")],
    )
    return GlmForCausalLM(config)


def make_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Train and write the model; it memorizes the answers of `learned`, so that generated answers end at different lengths."""
    import torch

    texts = [text for record in settings["texts"] for text in record.values() if isinstance(text, str) and text]
    tokenizer = tokenizer_for(texts, settings["vocabulary_size"])
    model = small_glm(tokenizer, settings["seed"])
    conversations = [f"{prompt_of(record)}\n{record['output']}<|user|>" for record in settings["learned"]]
    rows = [(ids, ids) for ids in (tokenizer.encode(text, add_special_tokens=False) for text in conversations)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    rows.sort(key=lambda row: len(row[0]))
    batch_size = 8
    batches = [
        padded(rows[start : start + batch_size], tokenizer.pad_token_id) for start in range(0, len(rows), batch_size)
    ]
    for epoch in range(settings["epochs"]):
        # it rises in three epochs, then falls to nothing: at a constant rate the answers are never learned well
        rate = min((epoch + 1) / 3, 1 - epoch / settings["epochs"])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        losses = []
        for batch in batches:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)
        if max(losses) < settings["until"]:
            break
    folder = Path(settings["folder"])
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "loss": max(losses)}


def cut_records(settings: dict[str, Any]) -> dict[str, Any]:
    """The records, truncated so that every row fits the cutoff: both tools, which truncate differently, learn the same tokens.

    A question gets at most half of the tokens, an answer the rest; characters are removed from the end.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    def shortened(text: str, fits: Any) -> str:
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
        return text[:low].strip()

    records, half = [], settings["cutoff"] // 2
    for record in settings["records"]:
        cut = {"instruction": question(record), "output": record["output"].strip()}
        cut["instruction"] = shortened(
            cut["instruction"], lambda text: tokens(prompt_of({"instruction": text})) <= half
        )
        available = settings["cutoff"] - 3 - tokens(prompt_of(cut))  # a line break before it, a token after it
        cut["output"] = shortened(cut["output"], lambda text, available=available: tokens(text) <= available)
        if cut["instruction"] and cut["output"]:
            records.append({"instruction": cut["instruction"], "input": "", "output": cut["output"]})
    return {"records": records}


# -- bare loops ----------------------------------------------------------------------------------------------------------


def padded(rows: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Any]:
    """(ids, labels) as tensors, padded on the right to the longest row."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([[*labels, *[-100] * (longest - len(labels))] for _, labels in rows]),
    }


def bare_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """One epoch in plain PyTorch with transformers' model class and PEFT: the same training as both tools.

    Over padded batches of `rows`, or over `packed`, a file with the tensors of every step of a packed run: with a full
    attention mask, as transformers does it, or with attention `by_sample`.
    """
    import random

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings["seed"])
    lengths: list[int] = []  # of the samples in this step's row
    attention = {"attn_implementation": attention_by_sample(lengths)} if settings.get("by_sample") else {}
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto", **attention).to(device)
    lora = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    model.config.use_cache = False
    half = base.dtype if base.dtype in (torch.float16, torch.bfloat16) else None
    if settings.get("packed"):
        packed = torch.load(settings["packed"], weights_only=True)
    else:
        rows = json.loads(Path(settings["rows"]).read_text())

    started = time.perf_counter()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings["learning_rate"], weight_decay=0.0)
    model.train()
    if settings.get("packed"):
        batches = iter(packed)
    else:
        random.Random(settings["seed"]).shuffle(rows)
        size = settings["batch_size"]
        batches = (padded(rows[first : first + size], settings["pad_id"]) for first in range(0, len(rows), size))
    steps, tokens = 0, 0
    for batch in batches:
        tokens += batch["attention_mask"].sum().item() if "attention_mask" in batch else batch["input_ids"].numel()
        if attention:
            starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
            lengths[:] = [end - start for start, end in pairwise([*starts, batch["input_ids"].numel()])]
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device, half) if half else contextlib.nullcontext():
            loss = model(**on_device).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens, "steps": steps, "loss": loss.item()}


def attention_by_sample(lengths: list[int]) -> str:
    """Register causal attention within each sample of a row; returns its name for `attn_implementation`."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any) -> Any:
        grouped = query.shape[1] != key.shape[1]
        samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        attended = [
            scaled_dot_product_attention(*sample, is_causal=True, scale=scaling, enable_gqa=grouped)
            for sample in samples
        ]
        return torch.cat(attended, dim=2).transpose(1, 2), None

    AttentionInterface.register("by_sample", attend)
    AttentionMaskInterface.register("by_sample", lambda *args, **options: None)
    return "by_sample"


# -- inside glmtuner -----------------------------------------------------------------------------------------------------


class MeasurementDone(BaseException):
    """Ends a run once its measurement is complete."""


def command_line(overrides: list[str]) -> None:
    """`python -m glmtuner` in this process."""
    from glmtuner.cli.main import main

    if status := main(overrides):
        raise SystemExit(status)


def glmtuner_prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the data file to the training rows, without imports and loading the tokenizer; and the rows."""
    import datasets  # noqa: F401 - LLaMA-Factory also imports these before its clock starts
    import tiktoken  # noqa: F401

    from glmtuner.stages.sft import Sft

    original, measured = Sft.datasets, {}

    def timed(self: Any, run: Any, specs: Any, template: Any, tokenizer: Any) -> Any:
        started = time.perf_counter()
        data = original(self, run, specs, template, tokenizer)
        measured.update(seconds=time.perf_counter() - started, train=data.train, pad_id=tokenizer.pad_token_id)
        raise MeasurementDone

    Sft.datasets = timed
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    rows = [(list(map(int, row["input_ids"])), list(map(int, row["labels"]))) for row in measured.pop("train")]
    if settings.get("rows"):
        Path(settings["rows"]).write_text(json.dumps(rows))
    return {**measured, "records": len(rows), "tokens": sum(len(ids) for ids, _ in rows)}


def cpu_seconds() -> float:
    """Seconds of processor time of this process and of those that it has started and awaited."""
    return sum(os.times()[:4])


def glmtuner_rows(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the data file to the memory-mapped rows, without imports and loading the tokenizer; the largest peak memory."""
    import resource

    import datasets  # noqa: F401 - as in glmtuner_prepare
    import tiktoken  # noqa: F401

    from glmtuner.stages.sft import Sft

    original, measured = Sft.datasets, {}

    def timed(self: Any, run: Any, specs: Any, template: Any, tokenizer: Any) -> Any:
        started, before = time.perf_counter(), cpu_seconds()
        data = original(self, run, specs, template, tokenizer)
        measured.update(seconds=time.perf_counter() - started, cpu=cpu_seconds() - before, records=len(data.train))
        raise MeasurementDone

    Sft.datasets = timed
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {**measured, "peak_mib": max(peaks)}


def tokenizers_batches(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds that the tokenizers library takes to encode all texts of a file, a thousand records at a time, on its own threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from itertools import islice

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(settings["model"]) / "tokenizer.json"))
    seconds, cpu, records = 0.0, 0.0, 0
    with open(settings["file"], encoding="utf-8") as file:
        while lines := list(islice(file, 1000)):
            texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
            started, before = time.perf_counter(), cpu_seconds()
            tokenizer.encode_batch(texts, add_special_tokens=False)
            seconds, cpu = seconds + time.perf_counter() - started, cpu + cpu_seconds() - before
            records += len(lines)
    return {"seconds": seconds, "cpu": cpu, "records": records}


def glmtuner_predict(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the loaded model to the scored answers."""
    import jieba  # noqa: F401 - LLaMA-Factory also imports these before its clock starts
    import rouge_chinese  # noqa: F401

    from glmtuner.stages.sft import Sft

    original, measured = Sft.predict, {}

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        scores = original(*args, **kwargs)
        measured["seconds"] = time.perf_counter() - started
        return scores

    Sft.predict = timed
    command_line(settings["overrides"])
    return measured


def glmtuner_packed(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the tensors of every step of a packed run, so that the bare loop trains on the same ones."""
    import torch

    from glmtuner.training.trainer import GlmTrainer

    original, batches = GlmTrainer.training_step, []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in ("input_ids", "position_ids", "labels") if name in inputs]
        batches.append({name: inputs[name].detach().cpu().clone() for name in names})
        return original(self, model, inputs, *args, **kwargs)

    GlmTrainer.training_step = training_step
    command_line(settings["overrides"])
    torch.save(batches, settings["packed"])
    return {"steps": len(batches), "tokens": sum(batch["input_ids"].numel() for batch in batches)}


# -- preferences, by glmtuner and by TRL ---------------------------------------------------------------------------------


def new_model(settings: dict[str, Any]) -> dict[str, Any]:
    """Write a GLM with random weights and a tokenizer of the texts; its head may have more words than the tokenizer."""
    tokenizer = tokenizer_for(settings["texts"], settings["vocabulary_size"])
    folder = Path(settings["folder"])
    small_glm(tokenizer, settings["seed"], settings["head_size"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}


def glmtuner_pairs(settings: dict[str, Any]) -> dict[str, Any]:
    """The rows of ranked pairs that glmtuner trains on: a prompt, and the two answers' tokens."""
    from glmtuner.stages.dpo import Dpo

    original, rows = Dpo.datasets, []

    def captured(self: Any, run: Any, specs: Any, template: Any, tokenizer: Any) -> Any:
        for row in original(self, run, specs, template, tokenizer).train:
            start = next(place for place, label in enumerate(row["labels"]) if label != -100)
            ids, other = list(map(int, row["input_ids"])), list(map(int, row["rejected_ids"]))
            rows.append({"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": other[start:]})
        raise MeasurementDone

    Dpo.datasets = captured
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    return {"rows": rows}


def status_mib(name: str) -> float:
    """A line of this process's /proc status, VmRSS or VmHWM, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measured_training(train: Any) -> dict[str, float]:
    """Seconds of a training, and its peak memory above the process at rest, with the model loaded.

    Other work on the machine changes the seconds of its threads, `cpu_seconds`, less.
    """
    import gc

    gc.collect()
    rest = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    started, cpu = time.perf_counter(), time.process_time()
    train()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": status_mib("VmHWM") - rest, "rest_mib": rest}


def seeded_score(hidden_size: int) -> Any:
    """The weight of a reward model's head that both tools begin with."""
    import torch

    return torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(0)) * (hidden_size + 1) ** -0.5


def glmtuner_preference(settings: dict[str, Any]) -> dict[str, Any]:
    """A training by glmtuner: its time and memory, the losses of its steps, and the first batch's log-probabilities."""
    import torch

    from glmtuner.objectives import objective, rm
    from glmtuner.training.trainer import GlmTrainer

    original, logprobs, measured, new_head = GlmTrainer.train, [], {}, rm.new_head
    answer_logprobs = objective.AnswerObjective.answer_logprobs

    def watched(self: Any, model: Any, batch: Any) -> Any:
        found = answer_logprobs(self, model, batch)
        if torch.is_grad_enabled():
            logprobs.append(found.detach())
        return found

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        logprobs.clear()  # of the check before the first step
        measured.update(measured_training(lambda: original(self, *args, **kwargs)))
        measured["losses"] = [line["loss"] for line in self.state.log_history if "loss" in line]
        raise MeasurementDone

    def head(model: Any, random_init: bool) -> Any:
        made = new_head(model, random_init)
        made.weight.data = seeded_score(made.weight.shape[1])
        return made

    GlmTrainer.train, objective.AnswerObjective.answer_logprobs, rm.new_head = train, watched, head
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    first = [half.mean().item() for half in logprobs[0].chunk(2)] if logprobs else []
    return {**measured, "logprobs": first}


def trl_preference(settings: dict[str, Any]) -> dict[str, Any]:
    """The same training by TRL's own trainer, on the same rows in the same order."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="right")
    rows = json.loads(Path(settings["rows"]).read_text())
    scores, words = settings["stage"] == "rm", [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = kind.from_pretrained(settings["model"], dtype=torch.float32, **({"num_labels": 1} if scores else {}))
    if scores:
        model.score.weight.data = seeded_score(model.config.hidden_size)
        rows = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
    lora = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        target_modules=settings["targets"],
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    arguments = (RewardConfig if scores else DPOConfig)(
        settings["output"],
        per_device_train_batch_size=settings["batch_size"],
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        seed=settings["seed"],
        **settings["more"],
    )
    set_seed(settings["seed"])
    trainer = (RewardTrainer if scores else DPOTrainer)(
        model, args=arguments, train_dataset=Dataset.from_list(words), processing_class=tokenizer, peft_config=lora
    )
    trainer.train_dataset = Dataset.from_list(
        rows
    )  # the tokens that glmtuner trains on, not those of its own templates
    measured = measured_training(trainer.train)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    names = [name for name in ("logps/chosen", "logps/rejected") if name in logged[0]]
    return {**measured, "losses": [line["loss"] for line in logged], "logprobs": [logged[0][name] for name in names]}


# -- groups of answers, by glmtuner and by TRL -------------------------------------------------------------------------------


def glmtuner_prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """The prompts that glmtuner answers, as token ids, in their order."""
    from glmtuner.stages.grpo import Grpo

    original, prompts = Grpo.datasets, []

    def captured(self: Any, run: Any, specs: Any, template: Any, tokenizer: Any) -> Any:
        prompts.extend(
            list(map(int, row["input_ids"])) for row in original(self, run, specs, template, tokenizer).train
        )
        raise MeasurementDone

    Grpo.datasets = captured
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    return {"prompts": prompts}


def glmtuner_grpo(settings: dict[str, Any]) -> dict[str, Any]:
    """A training by glmtuner: its time and memory, and the tokens of its prompts and answers."""
    from glmtuner.training.trainer import GlmTrainer

    original, measured = GlmTrainer.train, {}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        measured.update(measured_training(lambda: original(self, *args, **kwargs)))
        measured["tokens"] = int(self.tokens)
        raise MeasurementDone

    GlmTrainer.train = train
    with contextlib.suppress(MeasurementDone):
        command_line(settings["overrides"])
    return measured


def trl_grpo(settings: dict[str, Any]) -> dict[str, Any]:
    """The same training by TRL's own trainer, with transformers' generation, on the same prompts in the same order."""
    import torch
    from benchmark_reward import variety
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    prompts = json.loads(Path(settings["rows"]).read_text())
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    lora = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=0.0,
        target_modules=settings["targets"],
        task_type="CAUSAL_LM",
    )
    arguments = GRPOConfig(
        settings["output"],
        per_device_train_batch_size=settings["prompts"] * settings["generations"],
        num_generations=settings["generations"],
        max_completion_length=settings["answer_tokens"],
        max_steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        beta=0.04,
        loss_type="grpo",
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=settings["seed"],
        **settings["more"],
    )
    set_seed(settings["seed"])
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **columns: [variety(text) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(prompts))]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    # the tokens that glmtuner answers, not those of its own template
    trainer._tokenize_prompts = lambda texts: ([prompts[int(text)] for text in texts], None, {})
    measured = measured_training(trainer.train)
    return {**measured, "tokens": int(trainer.state.num_input_tokens_seen)}


# -- inside LLaMA-Factory ------------------------------------------------------------------------------------------------


def timed_requests(model: Any) -> dict[str, float]:
    """The seconds, and the seconds of CPU time, that a class of the harness' models takes for each task's requests, as measured."""
    seconds: dict[str, float] = {}

    def timed(answer: Any) -> Any:
        def measured(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
            started, cpu_started = time.perf_counter(), time.process_time()
            found = answer(self, requests, *args, **kwargs)
            name = requests[0].task_name
            seconds[name], seconds[f"{name}_cpu"] = time.perf_counter() - started, time.process_time() - cpu_started
            return found

        return measured

    for name in ("loglikelihood", "generate_until"):
        setattr(model, name, timed(getattr(model, name)))
    return seconds


def glmtuner_benchmarks(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each task's requests, without loading, and the tasks' scores."""
    from glmtuner.benchmarks import run
    from glmtuner.benchmarks.model import LoadedModel

    original, scores = run.score_benchmarks, {}
    seconds = timed_requests(LoadedModel)

    def watched(context: Any) -> Any:
        scores.update(original(context))
        return scores

    run.score_benchmarks = watched
    command_line(settings["overrides"])
    return {
        "seconds": seconds,
        "scores": {task: scores[f"benchmark_{task}"] for task in seconds if not task.endswith("_cpu")},
    }


def harness_benchmarks(settings: dict[str, Any]) -> dict[str, Any]:
    """The same of the harness' own model of transformers."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from glmtuner.benchmarks.tasks import local_sets

    tasks, device = Path(settings["tasks"]), "cuda" if torch.cuda.is_available() else "cpu"
    seconds = timed_requests(HFLM)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings["batch_size"], device=device)
    manager, scores = TaskManager(include_defaults=False, include_path=[tasks]), {}
    with local_sets("benchmark", [tasks]):
        for name in ("letters", "options", "answers"):
            loaded = manager.load([name])
            loaded["tasks"][name].set_fewshot_seed(seed=1234)
            results = evaluate(harness, loaded, bootstrap_iters=0)["results"][name]
            scores[name] = next(value for key, value in results.items() if key.endswith(",none"))
    return {"seconds": seconds, "scores": {name: float(value) for name, value in scores.items()}}


def llamafactory_prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of its get_dataset and of the tokenization in it, and the rows."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer, loader
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, _, _ = get_train_args(settings["arguments"])
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    original, tokenizing = loader._get_preprocessed_dataset, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        rows = original(*args, **kwargs)
        tokenizing.append(time.perf_counter() - started)
        return rows

    loader._get_preprocessed_dataset = timed
    started, before = time.perf_counter(), cpu_seconds()
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    rows = list(data["input_ids"])
    if settings.get("rows"):
        Path(settings["rows"]).write_text(json.dumps(rows))
    tokens = sum(map(len, rows))
    return {
        "seconds": seconds, "cpu": cpu, "tokenizing": sum(tokenizing), "records": len(rows), "tokens": tokens
    }  # fmt: skip


ROLES = {
    role.__name__: role
    for role in (
        make_model, cut_records, bare_loop, glmtuner_prepare, glmtuner_rows, tokenizers_batches, glmtuner_predict, glmtuner_packed, llamafactory_prepare, new_model,
        glmtuner_pairs, glmtuner_preference, trl_preference, glmtuner_prompts,
        glmtuner_grpo, trl_grpo, glmtuner_benchmarks, harness_benchmarks,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("settings", type=Path, help="JSON file with the role's settings")
    parser.add_argument("result", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = ROLES[options.role](json.loads(options.settings.read_text(encoding="utf-8")))
    options.result.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
