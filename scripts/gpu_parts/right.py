"""Right: reference values, twenty steps of ChatGLM-Efficient-Tuning, the quickstart, and the answers of the CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from gpu_parts.record import Check
from gpu_parts.runs import command

GOLDEN = Path(__file__).parent.parent.parent / "tests/golden"
NO_REFERENCE = "left out: the published tokenizer that it needs is not beside the checkout (--shared)"
# the largest difference of float32 logits; of half precision, the difference's norm as a share of the logits' norm
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 7e-3}
CASES = {
    "chatglm_v1": ("single", "single_mask_token", "batch_left_padded_tokenizer", "sft"),
    "chatglm2": ("single", "batch_left_padded", "sft"),
}


def run(check: Check) -> None:
    for name in CASES:
        for dtype in LIMITS:
            what = f"{name}, reference values, {str(dtype).removeprefix('torch.')}"
            if not check.begins(what):
                continue
            with check.item(what):
                reference_values(check, what, GOLDEN / name, CASES[name], dtype)
    goldens = check.shared / "goldens" if check.shared else None
    for method in ("lora", "freeze"):
        what = f"twenty steps of ChatGLM-Efficient-Tuning, {method}"
        if not check.begins(what):
            continue
        if goldens is None or not (goldens / "parity_v2").is_dir():
            check.add(what, None, note=NO_REFERENCE)
            continue
        with check.item(what):
            twenty_steps(check, what, goldens, method)
    for what, measure in (
        ("greedy answers in float32 equal to the CPU's", compare_with_cpu_answers),
        ("rotary scaling, yarn", rotary_scaling),
        ("quickstart, ROUGE-L", quickstart),
    ):
        if check.begins(what):
            with check.item(what):
                measure(check)


def inputs_of(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """input_ids and the mask as [B, S]; the reference's has four dimensions, True = blocked."""
    inputs = {"input_ids": tensors[f"{case}/input_ids"]}
    mask = tensors.get(f"{case}/attention_mask")
    if mask is not None:
        mask = mask if mask.dim() == 2 else (~mask[:, 0, -1]).long()
        inputs["attention_mask"] = mask[:, -inputs["input_ids"].shape[1] :]
    return inputs


def reference_values(check: Check, what: str, folder: Path, cases: tuple[str, ...], dtype: torch.dtype) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(folder / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(check.device).eval()
    worst = 0.0
    for case in cases:
        inputs = inputs_of(tensors, case)
        with torch.no_grad():
            logits = model(**{key: value.to(check.device) for key, value in inputs.items()}).logits.float().cpu()
        expected = tensors[f"{case}/logits"].float()
        if "attention_mask" in inputs:  # outputs of padding do not matter
            is_token = inputs["attention_mask"].bool()
            logits, expected = logits[is_token], expected[is_token]
        difference = logits - expected
        worst = max(
            worst, (difference.abs().max() if dtype == torch.float32 else difference.norm() / expected.norm()).item()
        )
    unit = "largest difference" if dtype == torch.float32 else "difference / logits"
    check.add(what, worst, unit, at_most=LIMITS[dtype])


def twenty_steps(check: Check, what: str, goldens: Path, method: str) -> None:
    """Compare every loss with that of ChatGLM-Efficient-Tuning 0.1.5, computed on a CPU in float32."""
    from safetensors.torch import load_file, save_file

    golden, folder = goldens / "parity_v2" / method, check.folder / f"parity_{method}"
    overrides = {"lora": ["finetuning=lora", "finetuning.lora_dropout=0", f"model.checkpoint_dir={folder}/start"],
             "freeze": ["finetuning=freeze", "finetuning.num_layer_trainable=-2"]}[method]  # fmt: skip
    if method == "lora":
        (folder / "start").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(golden / "adapter_peft040/adapter_config.json", folder / "start/adapter_config.json")
        start = load_file(golden / "initial_trainable.safetensors")
        save_file(
            {name.replace(".default.", "."): value for name, value in start.items()},
            folder / "start/adapter_model.safetensors",
        )
    steps = 3 if check.miniature else 20
    command([
        "model=chatglm2_6b", f"model.model_name_or_path={goldens}/chatglm2_realvocab", "model.dtype=float32", *overrides,
        f"data.dataset={goldens.parent}/data/self_cognition.json", "data.max_source_length=64", "data.max_target_length=64",
        f"trainer.max_steps={steps}", "trainer.per_device_train_batch_size=4", "trainer.learning_rate=1e-2",
        "trainer.lr_scheduler_type=linear" if steps == 20 else "trainer.lr_scheduler_type=constant",
        "trainer.train_sampling_strategy=sequential", "trainer.logging_steps=1", "trainer.save_strategy=no", "tracker=none",
        f"trainer.output_dir={folder}/run", "trainer.disable_tqdm=true",
    ])  # fmt: skip
    lines = (folder / "run/history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    expected = [step["loss"] for step in json.loads((golden / "parity.json").read_text(encoding="utf-8"))["steps"]]
    compared = 1 if check.miniature else 20  # with fewer steps the learning rate decays faster from the second one on
    difference = max(
        abs(loss - reference) for loss, reference in zip(losses[:compared], expected[:compared], strict=True)
    )
    check.add(what, difference, "largest difference of a loss", at_most=1e-3)


def compare_with_cpu_answers(check: Check) -> None:
    """Compare the shipped model's greedy answers to the shipped questions with those computed on the CPU."""
    from glmtuner.inference.generate import Decoding, answers

    model, prompts, stops = shipped_model(), questions(8 if check.miniature else 48), (0, 7, 9)
    decoding = Decoding(
        max_new_tokens=8 if check.miniature else 64, num_beams=1, repetition_penalty=1.0, stop_ids=stops, pad_id=0
    )
    expected = dict(answers(model, prompts, decoding, batch_size=8))
    actual = dict(answers(model.to(check.device), prompts, decoding, batch_size=32))
    equal = sum(actual[index] == expected[index] for index in expected)
    check.count("greedy answers in float32 equal to the CPU's", equal, len(prompts))


def rotary_scaling(check: Check) -> None:
    """Compare the logits of the shipped model under model.rope_scaling with those that transformers computes on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from glmtuner.config.compose import compose
    from glmtuner.config.paths import model_source
    from glmtuner.launch.register import register_presets
    from glmtuner.models.load import load_model

    register_presets()
    place = model_source("package://tiny_glm")
    run = compose(["model=tiny_glm", "model.rope_scaling={rope_type: yarn, factor: 4.0}"]).run
    model = load_model(run.model, None, run.quant, check.device, torch.float32).to(check.device).eval()
    config = AutoConfig.from_pretrained(place)
    config.rope_parameters |= {"rope_type": "yarn", "factor": 4.0}
    config.rope_parameters["original_max_position_embeddings"] = config.max_position_embeddings
    reference = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=torch.float32).eval()
    length = config.max_position_embeddings * (1 if check.miniature else 2)
    ids = torch.randint(10, 3000, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        logits = model(input_ids=ids.to(check.device)).logits.cpu()
    check.add("rotary scaling, yarn", (logits - expected).abs().max().item(), "largest difference", at_most=1e-4)


def shipped_model() -> Any:
    from transformers import AutoModelForCausalLM

    from glmtuner.config.paths import model_source

    return AutoModelForCausalLM.from_pretrained(model_source("package://tiny_glm"), dtype=torch.float32).eval()


def questions(count: int) -> list[list[int]]:
    """The prompts of the shipped identity questions, as token ids."""
    from glmtuner.config.paths import PACKAGE_DATA
    from glmtuner.data.records import Message
    from glmtuner.templates.glm import TEMPLATES
    from gpu_parts.models import tokenizer

    records = json.loads((PACKAGE_DATA / "identity_sample.json").read_text(encoding="utf-8"))[:count]
    turns = [[Message("user", record["instruction"])] for record in records]
    return [list(encoded.input_ids) for encoded in TEMPLATES["glm4"].encode(tokenizer(), turns)]


def quickstart(check: Check) -> None:
    """The README's first command; the miniature has a twentieth of the epochs and learns too little for a goal."""
    folder = check.folder / "quickstart"
    short = ["trainer.num_train_epochs=2", "trainer.use_cpu=true"] if check.miniature else []
    command(["experiment=quickstart", f"trainer.output_dir={folder}", "trainer.disable_tqdm=true", *short])
    rouge = json.loads((folder / "metrics.json").read_text())["predict_rouge-l"]
    check.add("quickstart, ROUGE-L", rouge, at_least=0.0 if check.miniature else 90.0)
