"""Every fine-tuning preset trains the shipped model through the command line, and its folder alone predicts again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from json_lines import lines

from glmtuner.config.compose import presets
from glmtuner.config.paths import conf_dir

RATES = {"lora": 3e-3, "freeze": 1e-3, "p_tuning": 1e-2, "full": 1e-3, "peft": 3e-3}
EXTRA = {
    "p_tuning": ["finetuning.prefix_projection=true"],
    "peft": ["finetuning.peft_type=MISS", "finetuning.config.r=8"],
}
LORA = {"dora": 3e-3, "rslora": 3e-3, "pissa": 3e-3, "qlora": 3e-3}  # presets of LoRA
METHODS = [name for name in presets([conf_dir()])["finetuning"] if name not in ("none", *LORA)]


def test_every_method_is_tried() -> None:
    assert sorted(RATES) == sorted(METHODS)
    assert sorted({*RATES, *LORA, "none"}) == sorted(presets([conf_dir()])["finetuning"])


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_predicts(glmtuner: Callable, tmp_path: Path, method: str, checkpointing: str) -> None:
    done = glmtuner(
        "model=tiny_glm", "tracker=none", f"finetuning={method}", "data.dataset=alpaca_zh_sample,belle_sample",
        "data.eval_dataset=identity_sample", "data.max_samples=40", "data.max_target_length=24", "trainer.max_steps=24",
        "trainer.logging_steps=4", f"trainer.learning_rate={RATES[method]}", f"trainer.gradient_checkpointing={checkpointing}",
        "trainer.do_predict=true", "trainer.predict_with_generate=true", "trainer.per_device_eval_batch_size=40",
        "trainer.output_dir=run", "trainer.disable_tqdm=true", *EXTRA.get(method, []),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in lines(tmp_path / "run/history.jsonl")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    trained = json.loads((tmp_path / "run/metrics.json").read_text())
    assert trained["train_loss"] > 0
    assert "alpaca_zh_sample: 40 records" in done.stdout
    assert "belle_sample: 40 records" in done.stdout
    if checkpointing == "true":
        return
    again = glmtuner(
        "trainer=predict", "model.checkpoint_dir=run", "tracker=none", "data.dataset=identity_sample", "data.max_samples=40",
        "data.max_target_length=24", "trainer.per_device_eval_batch_size=40", "trainer.output_dir=predicted",
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert lines(tmp_path / "predicted/predictions.jsonl") == lines(tmp_path / "run/predictions.jsonl")
    scored = json.loads((tmp_path / "predicted/metrics.json").read_text())
    before, after = (
        {name: value for name, value in metrics.items() if name.startswith("predict_")} for metrics in (trained, scored)
    )
    assert before == after and len(after) == 4
    assert "trained_parameters" in trained and "trained_parameters" not in scored


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_predicts_on_a_half_precision_base(glmtuner: Callable, tmp_path: Path, method: str) -> None:
    """Trained float32 weights stand between bfloat16 ones in training, in its first batch and in every answer."""
    words = [
        "tracker=none",
        "data.max_samples=12",
        "data.max_target_length=16",
        "trainer.use_cpu=true",
        "trainer.disable_tqdm=true",
    ]
    done = glmtuner(
        "model=tiny_glm", "model.dtype=bfloat16", f"finetuning={method}", "data.dataset=alpaca_zh_sample", *words,
        "data.eval_dataset=identity_sample", "trainer.max_steps=4", f"trainer.learning_rate={RATES[method]}",
        "trainer.eval_on_start=true", "trainer.do_eval=true", "trainer.do_predict=true", "trainer.predict_with_generate=true",
        "trainer.output_dir=run", *EXTRA.get(method, []),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = glmtuner(
        "trainer=predict",
        "model.checkpoint_dir=run",
        "data.dataset=identity_sample",
        *words,
        "trainer.output_dir=predicted",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    found, before = (lines(tmp_path / name / "predictions.jsonl") for name in ("predicted", "run"))
    assert len(found) == len(before) == 12
    if method in (
        "freeze",
        "p_tuning",
    ):  # adapters and whole float32 models are computed in another precision by themselves
        assert found == before


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(glmtuner: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 3)):
        done = glmtuner(
            "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "trainer.max_steps=4", "trainer.logging_steps=1",
            f"trainer.seed={seed}", f"trainer.output_dir={name}", "trainer.save_strategy=no", "trainer.disable_tqdm=true",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    written = {name: (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in "abcd"}
    assert written["a"] == written["b"]
    assert len(set(written.values())) == 3


def test_a_process_whose_sets_have_another_order_writes_the_same_bytes(
    glmtuner_process: Callable, tmp_path: Path
) -> None:
    """PEFT holds the names of an adapter's targets as sets, and Python orders a set of texts anew in each process."""
    timed = {"provenance.json", "metrics.json", "report.md", "progress.json", "complete.json"}
    written = []
    for seed in ("1", "2"):
        done = glmtuner_process(
            "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "trainer.max_steps=1", "data.max_samples=4",
            "finetuning.lora_target=all", "trainer.output_dir=run", "trainer.disable_tqdm=true", env={"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        folder = (tmp_path / "run").rename(tmp_path / seed)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
        written.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    assert written[0] == written[1]
    for name in ("adapter/adapter_config.json", "checkpoints/checkpoint-1/adapter_config.json"):
        targets = ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
        assert json.loads(written[0][name])["target_modules"] == targets


def test_accumulation_equals_the_big_batch(glmtuner: Callable, tmp_path: Path) -> None:
    for name, batch, accumulation in (("big", 8, 1), ("small", 2, 4)):
        done = glmtuner(
            "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "trainer.max_steps=6", "trainer.logging_steps=1",
            "finetuning.lora_dropout=0", f"trainer.per_device_train_batch_size={batch}", "trainer.learning_rate=1e-3",
            f"trainer.gradient_accumulation_steps={accumulation}", f"trainer.output_dir={name}", "trainer.disable_tqdm=true",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    big, small = (lines(tmp_path / name / "history.jsonl") for name in ("big", "small"))
    assert [line["loss"] for line in small] == pytest.approx([line["loss"] for line in big], abs=2e-5)
    assert [line["grad_norm"] for line in small] == pytest.approx([line["grad_norm"] for line in big], rel=1e-3)


SHORT = [
    "model=tiny_glm", "tracker=none", "data.dataset=belle_sample", "data.max_samples=16", "data.max_target_length=16",
    "trainer.max_steps=4", "trainer.logging_steps=1", "trainer.save_steps=2", "trainer.learning_rate=3e-3", "trainer.disable_tqdm=true",
]  # fmt: skip
RESUMED = {
    **{name: [f"finetuning={name}"] for name in LORA},
    "loftq": ["finetuning=lora", "quant=int4", "finetuning.init_lora_weights=loftq"],
    "parts": [
        "finetuning=lora", "finetuning.bias=all", "finetuning.modules_to_save=[norm]", "finetuning.rank_pattern.q_proj=2",
        "finetuning.layers_to_transform=[1,2]", "finetuning.trainable_token_indices=[7,9]", "finetuning.exclude_modules=[v_proj]",
    ],
    "vera": ["finetuning=peft", "finetuning.peft_type=VERA", "finetuning.config={r: 16, vera_dropout: 0.1}"],
    "eva": ["finetuning=lora", "finetuning.init_lora_weights=eva", "finetuning.lora_rank=2", "finetuning.eva_rho=4"],
    "eva_int4": ["finetuning=lora", "quant=int4", "finetuning.init_lora_weights=eva", "finetuning.lora_target=[q_proj,down_proj]"],
    "adalora": ["finetuning=peft", "finetuning.peft_type=ADALORA", "finetuning.config={init_r: 4, target_r: 2, tinit: 1, tfinal: 1}"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_of_every_kind_of_adapter_is_the_undisturbed_one(
    glmtuner: Callable, tmp_path: Path, name: str
) -> None:
    words = [*SHORT, *RESUMED[name], "trainer.output_dir=run"]
    done = glmtuner(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    wanted = [(run / each).read_bytes() for each in ("history.jsonl", "adapter/adapter_model.safetensors")]
    shutil.rmtree(run / "checkpoints/checkpoint-4")
    shutil.rmtree(run / "adapter")
    (run / "metrics.json").unlink()
    again = glmtuner(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "checkpoint-2" in again.stdout
    assert [(run / each).read_bytes() for each in ("history.jsonl", "adapter/adapter_model.safetensors")] == wanted
    for method in (method_of(name), "none"):
        scored = glmtuner(
            "trainer=evaluate", "model.checkpoint_dir=run", f"finetuning={method}", "quant=none", "tracker=none",
            "data.dataset=belle_sample", "data.max_samples=16", f"trainer.output_dir={method}",
        )  # fmt: skip
        assert scored.returncode == 0, scored.stdout + scored.stderr
    one, other = (
        json.loads((tmp_path / each / "metrics.json").read_text())["eval_loss"] for each in (method_of(name), "none")
    )
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "words",
    [
        ["finetuning=lora", "finetuning.lora_dropout=0", "finetuning.init_lora_weights=eva", "finetuning.lora_target=all"],
        ["finetuning=peft", "finetuning.peft_type=ADALORA", "finetuning.config={init_r: 4, target_r: 2, tinit: 1, tfinal: 1}"],
    ],
    ids=["eva", "adalora"],
)  # fmt: skip
def test_two_processes_and_accumulation_are_one_big_batch(
    glmtuner: Callable, glmtuner_process: Callable, tmp_path: Path, words: list[str]
) -> None:
    """Of what a method takes from the rows before the first step, and from the gradients after each."""
    common = [*SHORT, *words, "trainer.save_strategy=no", "trainer.use_cpu=true"]
    done = glmtuner(*common, "trainer.per_device_train_batch_size=4", "trainer.output_dir=one")
    accumulated = [
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=4",
        "trainer.output_dir=small",
    ]
    again = glmtuner(*common, *accumulated)
    two = ["trainer.per_device_train_batch_size=2", "parallel=ddp", "parallel.processes=2", "trainer.output_dir=two"]
    ranks = glmtuner_process(*common, *two)
    assert done.returncode == again.returncode == ranks.returncode == 0, again.stdout + ranks.stdout + ranks.stderr
    one, *others = (
        [line["loss"] for line in lines(tmp_path / name / "history.jsonl")] for name in ("one", "small", "two")
    )
    assert all(each == pytest.approx(one, abs=2e-5) for each in others)
    patterns = [
        json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())["rank_pattern"]
        for name in ("one", "small", "two")
    ]
    assert patterns[0] and patterns[0] == patterns[1] == patterns[2]


def method_of(name: str) -> str:
    return "peft" if name in ("vera", "adalora") else "lora"


def test_a_lora_goes_on_or_is_merged(glmtuner: Callable, tmp_path: Path) -> None:
    words = [
        "tracker=none", "data.dataset=belle_sample", "data.max_samples=16", "trainer.max_steps=2", "trainer.logging_steps=1",
        "trainer.save_strategy=no", "trainer.learning_rate=1e-2", "trainer.disable_tqdm=true", "finetuning.lora_dropout=0",
    ]  # fmt: skip
    first = glmtuner("model=tiny_glm", *words, "trainer.output_dir=first", "finetuning.lora_rank=4")
    assert first.returncode == 0, first.stderr
    on = glmtuner(*words, "model.checkpoint_dir=first", "trainer.output_dir=on")
    new = glmtuner(*words, "model.checkpoint_dir=first", "trainer.output_dir=new", "model.resume_lora_training=false")
    assert on.returncode == new.returncode == 0, on.stderr + new.stderr
    went_on, started_new = (lines(tmp_path / name / "history.jsonl") for name in ("on", "new"))
    assert went_on[0]["loss"] == pytest.approx(
        started_new[0]["loss"], abs=1e-4
    )  # both start from the first run's model
    rank = json.loads((tmp_path / "on/adapter/adapter_config.json").read_text())["r"]
    assert rank == 4, "the checkpoint's own rank is kept"
    predicted = {}
    for name, checkpoints in (("on", "on"), ("new", "new"), ("both", "first,on")):
        done = glmtuner(
            "trainer=evaluate", f"model.checkpoint_dir={checkpoints}", "tracker=none", "data.dataset=belle_sample",
            "data.max_samples=16", f"trainer.output_dir=eval_{name}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        predicted[name] = json.loads((tmp_path / f"eval_{name}/metrics.json").read_text())["eval_loss"]
    assert predicted["on"] < went_on[0]["loss"]
    assert predicted["new"] < started_new[0]["loss"]
    assert predicted["both"] != predicted["on"]
