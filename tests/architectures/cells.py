"""What is tried on an architecture, a cell of the table each: a function that returns, or raises Refused or Wrong."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import reference
import torch
from zoo import SIZES

EXACT = 1e-4
HALF = 2e-3
SAMPLES = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (
        ("1 加 1 等于多少？", "2。"), ("What is GLM?", "A language model, trained to complete text and to answer questions."),
        ("你好", "你好！我可以帮助你做什么？"), ("写一首关于春天的短诗，四行，每行五个字，请押韵", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"),
        ("2 + 3?", "5"), ("Name three colours of the rainbow, please.", "Red, green and blue."), ("谢谢", "不客气。"),
        ("Who are you?", "I am a small model."),
    )
]  # fmt: skip
NEW_TOKENS = 6


class Refused(Exception):
    """The one paragraph in which a run was refused before it began."""


class Wrong(Exception):
    """A traceback, a failure behind the training, or a value that differs from the reference."""


@dataclass
class Tried:
    """An architecture in a folder of its own, with what its cells share."""

    name: str
    folder: Path
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @cached_property
    def rows(self) -> list[dict[str, list[int]]]:
        """The rows of the samples, as `--preview` shows them."""
        told = self.call("--preview", str(len(SAMPLES)), "--json", *self.model, *self.data)
        return [json.loads(line) for line in told.splitlines() if line.startswith("{")]

    @property
    def model(self) -> list[str]:
        return ["model=causal_lm", f"model.model_name_or_path={self.base}", "model.dtype=float32"]

    @property
    def data(self) -> list[str]:
        path = self.folder / "samples.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in SAMPLES), encoding="utf-8")
        return [f"data.dataset={path}", "tracker=none"]

    def call(self, *words: str) -> str:
        """The output of a command, in this process; raises Refused and Wrong."""
        from glmtuner.cli.main import main

        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                code = main(list(words))
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        told = out.getvalue()
        if code == 2:
            raise Refused(told.strip().splitlines()[-1].removeprefix("glmtuner: "))
        if code != 0:
            raise Wrong(f"exit code {code}: {' '.join(told.split())[-300:]}")
        return told

    def train(self, run: str, *words: str) -> Path:
        """The folder of a training in one batch of all samples; one of that name is not repeated."""
        folder = self.folder / run
        chosen = {word.partition("=")[0] for word in words}
        model = [word for word in self.model if word.partition("=")[0] not in chosen]
        if run not in self.done:
            try:
                self.done[run] = self.call(
                    *model, *self.data, f"trainer.output_dir={folder}", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
                    f"trainer.per_device_train_batch_size={len(SAMPLES)}", "trainer.gradient_accumulation_steps=1",
                    "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.max_grad_norm=0",
                    "trainer.logging_steps=1", *words,
                )  # fmt: skip
            except Refused as error:
                begun = (folder / "history.jsonl").is_file() and (folder / "history.jsonl").stat().st_size > 0
                self.done[run] = Wrong(f"refused behind the training: {error}") if begun else error
            except Wrong as error:
                self.done[run] = error
        if isinstance(self.done[run], Exception):
            raise self.done[run]
        return folder

    def losses(self, folder: Path) -> list[float]:
        """The training losses of a run, step by step."""
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    @cached_property
    def loss(self) -> float:
        """The samples' loss by plain transformers."""
        return reference.loss_of(reference.loaded(self.base), self.rows)

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of that loss."""
        return reference.gradients_of(reference.loaded(self.base), self.rows)


def same(found: float, expected: float, what: str, tolerance: float = EXACT) -> None:
    """Raises Wrong unless two values agree."""
    if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
        raise Wrong(f"{what} is {found:.6f}, and plain transformers computes {expected:.6f}")


def same_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str, tolerance: float = EXACT
) -> None:
    """Raises Wrong unless tensors of the same names agree, within a share of the largest of all values."""
    if found.keys() != expected.keys():
        raise Wrong(f"{what}: {sorted(found.keys() ^ expected.keys())[:3]} are in one of both")
    size = max((float(each.abs().max()) for each in expected.values() if each.numel()), default=0.0)
    for name, tensor in expected.items():
        off = float((found[name].float() - tensor.float()).abs().max()) if tensor.numel() else 0.0
        if not off <= tolerance * max(size, 1e-3):
            raise Wrong(f"{what} of {name} differ by {off:.2e}, where the largest is {size:.2e}")


LORA = ("finetuning=lora", "finetuning.lora_rank=4", "finetuning.lora_dropout=0", "trainer.learning_rate=1e-2", "trainer.max_steps=2",
        "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=3")  # fmt: skip
STEP = ("trainer.optim=sgd", "trainer.learning_rate=1", "trainer.max_steps=1")


def trains(tried: Tried, folder: Path, expected: float | None = None, tolerance: float = EXACT) -> None:
    """The first step's loss is that of plain transformers, and the second is lower."""
    first, *others = tried.losses(folder)
    same(first, tried.loss if expected is None else expected, "the first step's loss", tolerance)
    if others and not others[-1] < first:
        raise Wrong(f"the loss rose from {first:.4f} to {others[-1]:.4f}")


def lora(tried: Tried) -> None:
    folder = tried.train("lora", *LORA)
    trains(tried, folder)
    check_adapter(tried, folder)


def bfloat16(tried: Tried) -> None:
    """In bfloat16, against float32 on the same, rounded weights."""
    folder = tried.train("bfloat16", *LORA, "model.dtype=bfloat16")
    rounded = reference.loaded(tried.base)
    for each in [*rounded.parameters(), *rounded.buffers()]:
        if each.is_floating_point():
            each.data = each.data.bfloat16().float()
    same(tried.losses(folder)[0], reference.loss_of(rounded, tried.rows), "the first step's loss", HALF)


def lora_all(tried: Tried) -> None:
    folder = tried.train("lora_all", *LORA, "finetuning.lora_target=[all]")
    trains(tried, folder)
    check_adapter(tried, folder)


def check_adapter(tried: Tried, folder: Path) -> None:
    """PEFT loads the adapter by itself, and its loss is what the run's model has."""
    evaluated = tried.folder / f"{folder.name}_evaluated"
    tried.call("trainer=evaluate", f"model.checkpoint_dir={folder}", *tried.data, f"trainer.output_dir={evaluated}", "trainer.use_cpu=true",
               "trainer.disable_tqdm=true")  # fmt: skip
    (found,) = re.findall(r'"eval_loss": ([0-9.e+-]+)', (evaluated / "metrics.json").read_text())
    same(
        float(found),
        reference.loss_of(reference.loaded(tried.base, folder / "adapter"), tried.rows),
        "the adapted model's loss",
    )


def gradients(tried: Tried, run: str, *words: str) -> None:
    """One step of plain gradient descent with rate 1 moves each weight by its gradient."""
    folder = tried.train(run, "finetuning=full", *STEP, *words)
    trains(tried, folder)
    before, after = reference.loaded(tried.base), reference.loaded(folder / "model")
    moved = {name: value.detach() for name, value in after.named_parameters()}
    found = {name: value.detach() - moved[name] for name, value in before.named_parameters() if name in tried.gradients}
    same_tensors(found, tried.gradients, "gradients")
    same_weights(before, after, {name for name in moved if name not in tried.gradients})


def same_weights(before: Any, after: Any, names: set[str]) -> None:
    """Weights that text alone does not reach, those of a tower for images among them, keep their bits."""
    old, new = (dict(model.named_parameters()) for model in (before, after))
    if changed := sorted(name for name in names if not torch.equal(old[name], new[name])):
        raise Wrong(f"{len(changed)} weights without a gradient have changed, such as {changed[0]}")


def full(tried: Tried) -> None:
    gradients(tried, "full")


def padded(tried: Tried) -> None:
    gradients(tried, "padded", "data.padding_free=false")


def packing(tried: Tried) -> None:
    gradients(tried, "packing", "data.packing=true")


def checkpointing(tried: Tried) -> None:
    gradients(tried, "checkpointing", "trainer.gradient_checkpointing=true")


def freeze(tried: Tried) -> None:
    folder = tried.train("freeze", "finetuning=freeze", "finetuning.num_layer_trainable=1", *STEP)
    trains(tried, folder)
    before, after = (dict(reference.loaded(each).named_parameters()) for each in (tried.base, folder / "model"))
    found = {name: (before[name] - after[name]).detach() for name in before}
    moved = {name for name, each in found.items() if each.abs().max() > 0}
    if not moved:
        raise Wrong("no weight has moved")
    same_tensors({name: found[name] for name in moved}, {name: tried.gradients[name] for name in moved}, "gradients")


def p_tuning(tried: Tried) -> None:
    folder = tried.train(
        "p_tuning", "finetuning=p_tuning", "finetuning.pre_seq_len=4", "trainer.learning_rate=0.3", "trainer.max_steps=8"
    )  # fmt: skip
    first, *_, last = tried.losses(folder)
    if not last < first:
        raise Wrong(f"the loss went from {first} to {last}")


def quantized(tried: Tried, bits: int) -> None:
    """The first step's loss is that of plain transformers with the dequantized weights, and for int8 with rounded inputs."""
    folder = tried.train(f"int{bits}", *LORA, f"quant=int{bits}")
    model = reference.dequantized(reference.loaded(tried.base), bits)
    # an input in the middle of two integers may be rounded either way
    trains(tried, folder, reference.loss_of(model, tried.rows), EXACT if bits == 4 else 2 * EXACT)


def int4(tried: Tried) -> None:
    quantized(tried, 4)


def int8(tried: Tried) -> None:
    quantized(tried, 8)


def resume(tried: Tried) -> None:
    """From the checkpoint of step 1, step 2 gives the same bytes."""
    whole = tried.train("lora", *LORA)
    resumed = tried.train("resumed", *LORA, f"trainer.resume_from_checkpoint={whole}/checkpoints/checkpoint-1")
    same_files(whole / "adapter/adapter_model.safetensors", resumed / "adapter/adapter_model.safetensors")


def same_files(one: Path, other: Path) -> None:
    if one.read_bytes() != other.read_bytes():
        raise Wrong(f"{other.name} differs after a resume")


def export(tried: Tried) -> None:
    """The exported model, by plain transformers, has the logits of base and adapter, by plain PEFT."""
    run, folder = tried.train("lora", *LORA), tried.folder / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    tried.call("export", str(run), "--to", str(folder))
    ids = torch.tensor([tried.rows[0]["input_ids"]])
    exported = reference.loaded(folder)
    with torch.no_grad():
        merged, adapted = (
            model(input_ids=ids).logits for model in (exported, reference.loaded(tried.base, run / "adapter"))
        )
    same_tensors({"logits": merged}, {"logits": adapted}, "values", 1e-3)
    same_weights(
        reference.loaded(tried.base),
        exported,
        {name for name, _ in exported.named_parameters() if name not in tried.gradients},
    )


def predict(tried: Tried) -> None:
    """Answers at batch 1 and 8 are those of cache-free greedy decoding."""
    found = {}
    for batch in (1, 8):
        folder = tried.folder / f"predict{batch}"
        tried.call("trainer=predict", *tried.model, *tried.data, "finetuning=none", f"trainer.output_dir={folder}", "trainer.use_cpu=true",
                   "trainer.disable_tqdm=true", f"trainer.per_device_eval_batch_size={batch}", f"generation.max_new_tokens={NEW_TOKENS}",
                   "generation=greedy")  # fmt: skip
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        found[batch] = [json.loads(line)["predict"] for line in lines if line]
    if found[1] != found[8]:
        raise Wrong("answers at batch 1 and 8 differ")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tried.base)
    model = reference.loaded(tried.base)
    for row, answer in zip(tried.rows, found[1], strict=True):
        start = next(index for index, label in enumerate(row["labels"]) if label != reference.IGNORED)
        ids = reference.answer_of(model, row["input_ids"][:start], NEW_TOKENS, SIZES["eos_token_id"])
        if answer.strip() not in {tokenizer.decode(ids, skip_special_tokens=skip).strip() for skip in (True, False)}:
            raise Wrong(f"the answer is {answer!r}, and plain transformers gives {tokenizer.decode(ids)!r}")


def check(tried: Tried) -> None:
    """`--check` counts the parameters as plain transformers does."""
    told = tried.call("--check", *tried.model, *tried.data, *LORA[:3], "trainer.use_cpu=true", "budget.forecast=false")
    whole, trained = (
        int(re.findall(rf"{word} +│ ([\d,]+)", told)[0].replace(",", "")) for word in ("parameters", "trained")
    )
    count = sum(each.numel() for each in reference.loaded(tried.base).parameters())
    if whole - trained != count:
        raise Wrong(f"--check counts {whole - trained:,} parameters, and the model has {count:,}")


CELLS: Sequence[Callable[[Tried], None]] = (
    lora, bfloat16, lora_all, full, packing, padded, freeze, p_tuning, int4, int8, checkpointing, predict, resume, export, check,
)  # fmt: skip
