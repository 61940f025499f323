"""Whole: killed and resumed runs, preferences, reinforcement learning, full fine-tuning, fp16, and process groups."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from gpu_parts.kernels import loss_and_gradients, models, relative_error, samples, with_lora
from gpu_parts.models import free, model_overrides, random_models
from gpu_parts.record import Check
from gpu_parts.runs import Failed, Training, command, train

ROUNDING = 2**-8  # of bfloat16
TINY_RUN = ("model=tiny_glm", "tracker=none", "metric=none", "trainer.disable_tqdm=true", "trainer.logging_steps=1",
         "finetuning=lora", "finetuning.lora_dropout=0", "finetuning.lora_target=[all]",
         "data.max_source_length=64", "data.max_target_length=32")  # fmt: skip


def run(check: Check) -> None:
    items: dict[str, tuple[Callable[[Check], None], float]] = {
        "killed by SIGKILL and resumed": (resume_after_kill, 0),
        "a diverged run": (diverged, 0),
        "dpo": (dpo, 0),
        "ppo": (ppo, 0),
        "full fine-tuning in fp16": (fp16, 0),
        "ddp, one process": (partial(one_rank, kind="ddp"), 0),
        "fsdp2, one process": (partial(one_rank, kind="fsdp2"), 0),
        "int4 by fsdp2, one process": (partial(quantized_rank, bits=4), 0),
        "int8 by fsdp2, one process": (partial(quantized_rank, bits=8), 0),
        "full fine-tuning of GLM-Edge-1.5B": (full, 25),
    }
    for what, (measure, seconds) in items.items():
        if check.begins(what, seconds):
            with check.item(what):
                measure(check)


def on_cpu(check: Check) -> list[str]:
    return ["trainer.use_cpu=true"] if check.miniature else []


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def run_of(check: Check, name: str, overrides: list[str]) -> list[dict[str, float]]:
    """Run the shipped model; returns the lines of its history."""
    folder = check.folder / name
    command([*TINY_RUN, *overrides, f"trainer.output_dir={folder}"])
    return history(folder)


def add_falling_loss(check: Check, what: str, losses: list[float], note: str = "") -> None:
    note = "; ".join(filter(None, (f"loss {losses[0]:.3f} to {losses[-1]:.3f} over the run", note)))
    met = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    check.add(what, losses[-1], "loss", goal="falls", met=met, note=note)


def diverged(check: Check) -> None:
    """A run whose loss is not finite ends before anything of it is logged or saved, though no step waits for the GPU."""
    folder, overrides = (
        check.folder / "diverged",
        ["trainer.learning_rate=1e30", "trainer.logging_steps=7", "trainer.max_steps=20"],
    )
    try:
        command([*TINY_RUN, *overrides, *on_cpu(check), "data.dataset=identity_sample", f"trainer.output_dir={folder}"])
        ended = "exit code 0"
    except Failed as failed:
        ended = str(failed).partition(":")[0]
    left = [name for name in ("adapter", "checkpoints") if (folder / name).exists()] + history(folder)
    check.add(
        "a diverged run",
        len(left),
        "lines and folders",
        goal="0, exit code 2",
        met=ended == "exit code 2" and not left,
        note=ended,
    )


def dpo(check: Check) -> None:
    steps = 3 if check.miniature else 10
    lines = run_of(check, "dpo", [
        "stage=dpo", "data.dataset=preference_sample", f"trainer.max_steps={steps}", "trainer.learning_rate=1e-3",
        "trainer.bf16=true", *on_cpu(check),
    ])  # fmt: skip
    add_falling_loss(check, "dpo", [line["loss"] for line in lines])


def full(check: Check) -> None:
    """Train all weights of a model of real size, in float32 with bfloat16 autocast; they are saved and read back."""
    what = "full fine-tuning of GLM-Edge-1.5B"
    training = Training(
        name="full", model="GLM-Edge-1.5B", settings=("finetuning=full", "trainer.learning_rate=1e-5"), batch=4, source=512,
        target=512,
    )  # fmt: skip
    trained = train(check, training)
    note = f"{trained.peak_gib:.1f} GiB, {trained.tokens_per_second:,.0f} tokens/s, {trained.seconds:.0f} s with saving"
    add_falling_loss(check, what, trained.losses, note)


def resume_after_kill(check: Check) -> None:
    """Kill a run after its first checkpoint and repeat the command: every loss is that of the undisturbed run."""
    steps, every = (60, 3) if check.miniature else (120, 10)
    overrides = [*TINY_RUN, "data.dataset=identity_sample", f"trainer.max_steps={steps}", f"trainer.save_steps={every}",
             "trainer.learning_rate=1e-3", "trainer.bf16=true", *on_cpu(check)]  # fmt: skip
    folder = check.folder / "killed"
    package = Path(sys.modules["glmtuner"].__file__ or "").parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-m", "glmtuner", *overrides, f"trainer.output_dir={folder}"],
        env=environment,
        stdout=sys.stderr,
    )
    command([*overrides, f"trainer.output_dir={check.folder / 'undisturbed'}"])
    while child.poll() is None and not (folder / f"checkpoints/checkpoint-{every}").is_dir():
        time.sleep(0.002)
    child.kill()
    if child.wait() != -9:
        raise RuntimeError(f"the run to be killed ended by itself, with exit code {child.returncode}")
    before = len(history(folder))
    command([*overrides, f"trainer.output_dir={folder}"])
    expected, resumed = history(check.folder / "undisturbed"), history(folder)
    differences = [
        abs(line["loss"] - reference["loss"]) / reference["loss"]
        for line, reference in zip(resumed, expected, strict=True)
    ]
    check.add(
        "killed by SIGKILL and resumed", max(differences), "largest difference / loss", at_most=ROUNDING,
        note=f"killed at step {before} of {steps}; {sum(difference == 0 for difference in differences)} of {len(differences)} losses are bit-equal",
    )  # fmt: skip


def ppo(check: Check) -> None:
    """Train a reward model for a few steps, and PPO against it."""
    data = ["data.dataset=preference_sample", "trainer.per_device_train_batch_size=24"]
    count = 1 if check.miniature else 4
    run_of(
        check, "rm", ["stage=rm", *data, f"trainer.max_steps={5 * count}", "trainer.learning_rate=2e-3", *on_cpu(check)]
    )
    lines = run_of(check, "ppo", [
        "stage=ppo", *data, f"model.reward_model={check.folder / 'rm'}", "stage.minibatch_size=12",
        f"trainer.max_steps={count}", "trainer.learning_rate=1e-4", "trainer.bf16=true", *on_cpu(check),
    ])  # fmt: skip
    values = [value for line in lines for value in line.values()]
    last = {name: value for name, value in lines[-1].items() if name in ("loss", "reward", "kl", "score")}
    check.add(
        "ppo", len(lines), "steps", goal="finite", met=len(lines) == count and all(map(math.isfinite, values)),
        note=", ".join(f"{name} {value:.3g}" for name, value in last.items()),
    )  # fmt: skip


def fp16(check: Check) -> None:
    """Train all weights in float32 with float16 autocast; the checkpoint has the loss scale."""
    what = "full fine-tuning in fp16"
    if check.device.type != "cuda":
        check.add(what, None, note="left out: a CPU has no scaler")
        return
    overrides = ["finetuning=full", "data.dataset=identity_sample", "trainer.fp16=true", "trainer.max_steps=20",
             "trainer.learning_rate=1e-4", "trainer.save_steps=10"]  # fmt: skip
    plain = [word for word in TINY_RUN if not word.startswith("finetuning")]
    folder = check.folder / "fp16"
    command([*plain, *overrides, f"trainer.output_dir={folder}"])
    scaler = torch.load(folder / "checkpoints/checkpoint-10/scaler.pt", weights_only=True)
    add_falling_loss(
        check, what, [line["loss"] for line in history(folder)], f"scale of the loss at step 10: {scaler['scale']:g}"
    )


def join_group_of_one(on_gpu: bool) -> None:
    from torch.distributed import init_process_group

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )


def quantized_rank(check: Check, bits: int) -> None:
    """Compare loss and gradients of a LoRA on quantized weights that are sharded with those on bitsandbytes' own layers."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed import destroy_process_group
    from torch.distributed.tensor import DTensor

    from glmtuner.config.compose import compose
    from glmtuner.data.collate import Collator
    from glmtuner.launch.register import register_presets
    from glmtuner.models.load import load_model
    from glmtuner.models.quantized_shards import as_parameters
    from glmtuner.parallel.fsdp2 import Fsdp2

    register_presets()
    words = model_overrides("GLM-Edge-1.5B", check.folder / "quantized", check.miniature)
    run_config = compose([*words, f"quant=int{bits}"]).run
    dtype = torch.float32 if check.miniature else torch.bfloat16
    batch = Collator(pad_id=3)(samples(check.miniature))
    results: list[tuple[float, torch.Tensor]] = []
    packed: list[torch.Tensor] = []
    for shards in (False, True):
        with random_models(check.device):
            model = load_model(run_config.model, None, run_config.quant, check.device, dtype, sharded=shards)
        run_config.quant.prepare(model)
        blocks = list(model.model.layers)
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config).to(check.device).train()
        if shards:
            join_group_of_one(check.device.type == "cuda")
        try:
            if shards:
                as_parameters(adapted)
                Fsdp2(name="fsdp2").shard_model(adapted, blocks)
                packed = [value for value in adapted.parameters() if value.dtype in (torch.uint8, torch.int8)]
            inputs = {name: value.to(check.device) for name, value in batch.items()}
            loss = adapted(**inputs, use_cache=False).loss
            loss.backward()
            found = [value.grad for value in adapted.parameters() if value.grad is not None]
            whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in found]
            results.append((loss.item(), torch.cat([grad.flatten().float() for grad in whole])))
        finally:
            if shards:
                destroy_process_group()
        del model, adapted
        free()
    (expected, gradients), (loss_of_shards, gradients_of_shards) = results
    error = max(relative_error(gradients_of_shards, gradients), abs(loss_of_shards - expected))
    check.add(
        f"int{bits} by fsdp2, one process", error, "difference / gradient", at_most=1e-3, against="bitsandbytes' own layers",
        note=f"{sum(isinstance(value, DTensor) for value in packed)} of {len(packed)} packed tensors are shards",
    )  # fmt: skip


def one_rank(check: Check, kind: str) -> None:
    """Compare loss and gradients of a model in a process group of one with those of the model alone."""
    from torch.distributed import destroy_process_group, is_initialized
    from torch.distributed.tensor import DTensor

    from glmtuner.data.collate import Collator
    from glmtuner.parallel.fsdp2 import Fsdp2

    on_gpu = check.device.type == "cuda"
    batch = Collator(pad_id=3)(samples(check.miniature))
    model = with_lora(models(check.miniature)["GLM"], check.device)
    expected = loss_and_gradients(model, batch, half=True)
    model.zero_grad()
    join_group_of_one(on_gpu)
    try:
        wrapped: nn.Module = model
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0] if on_gpu else None)
        else:
            Fsdp2(name="fsdp2").shard_model(model, list(model.get_base_model().model.layers))
        device = check.device.type
        inputs = {name: value.to(check.device) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16):
            loss = wrapped(**inputs).loss
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        full_gradients = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
        error = max(
            relative_error(torch.cat([grad.flatten().float() for grad in full_gradients]), expected[1]),
            abs(loss.item() - expected[0]),
        )
    finally:
        if is_initialized():
            destroy_process_group()
    check.add(f"{kind}, one process", error, "difference / gradient", at_most=1e-3, against="the model by itself")
