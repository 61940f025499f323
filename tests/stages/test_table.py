"""Every stage with every method and quantization, through the command line: trained, cut short and resumed, reported, exported.

A cell is a run of three steps. One that is cut after its first step ends in the same bytes; its report is written; its export, by plain
transformers, has the logits of base and adapter in plain PEFT. What is impossible together is refused before anything is loaded.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from json_lines import lines
from peft import PeftModel

from glmtuner.config.compose import presets
from glmtuner.config.groups import CpoLoss, PreferenceLoss, SftLoss
from glmtuner.config.paths import ASSETS, conf_dir
from glmtuner.config.rewards import PolicyLoss
from glmtuner.config.schema import classes_of
from glmtuner.launch.register import register_presets
from glmtuner.run_folder.names import LOCK, RUN_ENTRIES

register_presets()
BASE = ASSETS / "tiny_glm"
EXACT = 1e-4
COMMON = [
    "model=tiny_glm", "tracker=none", "data.max_source_length=48", "data.max_target_length=12", "data.max_samples=12",
    "data.dev_ratio=0.25", "trainer.do_eval=true", "trainer.max_steps=3", "trainer.save_steps=1", "trainer.logging_steps=1",
    "trainer.per_device_train_batch_size=2", "trainer.learning_rate=3e-3", "trainer.disable_tqdm=true", "trainer.use_cpu=true",
]  # fmt: skip
PAIRS = ["data.dataset=preference_sample"]
STAGES = {
    "pt": ["data.dataset=text_sample", "stage.block_length=32"],
    "sft": ["data.dataset=identity_sample"],
    "rm": PAIRS,
    "dpo": PAIRS,
    "orpo": PAIRS,
    "simpo": PAIRS,
    "cpo": PAIRS,
    "kto": ["data.dataset=feedback_sample"],
    "ppo": [*PAIRS, "model.reward_model={place}/rm", "stage.ppo_epochs=2", "trainer.per_device_train_batch_size=4"],
    "grpo": ["data.dataset={place}/sums.json", "reward=[number,length]", "reward.length.buffer_tokens=2", "stage.num_generations=4"],
}  # fmt: skip
METHODS = {
    "lora": [],
    "freeze": ["finetuning.num_layer_trainable=2"],
    "full": [],
    "p_tuning": ["finetuning.pre_seq_len=4"],
    "peft": ["finetuning.peft_type=VERA", "finetuning.config.r=4", "finetuning.config.d_initial=0.5"],
}
VARIANTS = {
    "dora": [], "rslora": ["finetuning.lora_rank=4"], "pissa": ["finetuning.lora_rank=4"], "qlora": ["finetuning.lora_rank=4"],
}  # fmt: skip
QUANTS = ("none", "int8", "int4")
LOSSES = {
    "sft": [f"stage.loss={SftLoss.dft.value}"],
    "dpo": [
        f"stage.loss={each.value}" + (" stage.label_smoothing=0.1" if each in (PreferenceLoss.robust, PreferenceLoss.exo_pair) else "")
        for each in PreferenceLoss
    ] + ["stage.precompute_reference=true"],
    "kto": ["stage.precompute_reference=true"],
    "cpo": [f"stage.loss={each.value}" for each in CpoLoss],
    "grpo": [f"stage.loss={each.value}" for each in PolicyLoss] + ["stage.beta=0"],
}  # fmt: skip


def call(*words: str) -> tuple[int, str]:
    """`python -m glmtuner` in this process: its exit code, and what it printed."""
    from glmtuner.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main([*words])
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue()


def done(*words: str) -> str:
    """What a command printed that ends well."""
    code, out = call(*words)
    assert code == 0, f"{' '.join(words)}\n{out}"
    return out


def trained_on(quant: str) -> list[str]:
    """The methods that a quantized base can be trained with."""
    return [name for name in METHODS if quant == "none" or classes_of("finetuning")[name].on_quantized]


def cells() -> Iterator[Any]:
    """(stage, method, quantization, further words); those of a method and a quantization follow each other, and share a process.

    `make test-stages` runs every stage once with each quantization, by methods in turn; `make test-matrix` the rest.
    """
    for turn, quant in enumerate(QUANTS):
        methods = trained_on(quant)
        for column, method in enumerate(methods):
            for row, stage in enumerate(STAGES):
                yield cell(stage, method, quant, matrix=(row + column + turn) % len(methods) != 0)
    for column, preset in enumerate(VARIANTS):
        for row, stage in enumerate(("sft", "dpo", "rm")):
            yield cell(stage, preset, "int4" if preset == "qlora" else "none", matrix=(row + column) % 3 != 0)
    for stage, losses in LOSSES.items():
        for loss in losses:
            yield cell(stage, "lora", "none", loss, group="losses", matrix=loss not in (losses[0], losses[-1]))


def cell(stage: str, method: str, quant: str, more: str = "", group: str = "", matrix: bool = False) -> Any:
    name = "-".join([stage, method, quant, *(word.partition("=")[2] for word in more.split())])
    marks = [pytest.mark.xdist_group(group or f"{method}-{quant}"), *([pytest.mark.matrix] if matrix else [])]
    return pytest.param(stage, method, quant, more.split(), id=name, marks=marks)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each method and quantization; its `rm` is the reward model of the others."""
    return {}


@pytest.fixture
def place(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, method: str, quant: str) -> Path:
    key = f"{method}-{quant}"
    if key not in places:
        places[key] = tmp_path_factory.mktemp(key)
        sums = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(4) for b in range(4)]
        (places[key] / "sums.json").write_text(json.dumps(sums), encoding="utf-8")
    return places[key]


def words_of(stage: str, method: str, quant: str, place: Path) -> list[str]:
    given = [word.format(place=place) for word in STAGES[stage]]
    own = [f"finetuning={method}", *(METHODS | VARIANTS)[method]]
    return [f"stage={stage}", *COMMON, *given, *own, *([] if method == "qlora" else [f"quant={quant}"])]


@pytest.mark.parametrize(("stage", "method", "quant", "more"), [*cells()])
def test_a_cell(place: Path, stage: str, method: str, quant: str, more: list[str]) -> None:
    words = [*words_of(stage, method, quant, place), *more]
    whole = place / ("-".join([stage, *more]).replace("=", "-") if more else stage)
    if stage == "ppo" and not (place / "rm/metrics.json").is_file():
        done(*words_of("rm", method, quant, place), f"trainer.output_dir={place}/rm")
    if not (whole / "metrics.json").is_file():
        done(*words, f"trainer.output_dir={whole}")
    check_history(whole, stage)
    check_resumed(whole, words)
    done("report", str(whole))
    assert (whole / "report.html").stat().st_size > 1000 and stage in (whole / "report.md").read_text(encoding="utf-8")
    check_export(whole, place / "exported", method)


def check_history(folder: Path, stage: str) -> None:
    """Every step is logged with its loss, and the evaluation has all that the stage declares."""
    logged, measured = (
        lines(folder / "history.jsonl"),
        json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
    )
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3]
    declared = classes_of("stage")[stage].evaluates
    missing = {f"eval_{name}" for name in declared} - measured.keys()
    # of kto's few records all may be good, or all bad
    assert not missing - {"eval_margin", "eval_reward_desirable", "eval_reward_undesirable"}, missing
    assert missing == set() or stage == "kto"


def check_resumed(whole: Path, words: list[str]) -> None:
    """What kill -9 leaves behind the first step, and the same command."""
    cut = whole.with_name(f"{whole.name}-cut")
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(whole, cut)
    for left_over in ("metrics.json", "report.md", "report.html", "losses.jsonl"):
        (cut / left_over).unlink(missing_ok=True)
    for folder in ("adapter", "model", "checkpoints/checkpoint-2", "checkpoints/checkpoint-3"):
        shutil.rmtree(cut / folder, ignore_errors=True)
    assert "resumed from checkpoint-1" in done(*words, f"trainer.output_dir={cut}")
    # what a run of any stage writes, trainer.overwrite_output_dir removes
    assert {path.name for path in whole.iterdir()} <= {*RUN_ENTRIES, LOCK}
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and is_kept(path, whole)]
    assert len(names) >= 5
    differing = [str(name) for name in names if (cut / name).read_bytes() != (whole / name).read_bytes()]
    assert not differing
    shutil.rmtree(cut)


def is_kept(path: Path, run: Path) -> bool:
    """Is the file one that has no times and no paths in it?"""
    name = path.relative_to(run).as_posix()
    return (
        path.suffix == ".safetensors"
        or path.name in ("history.jsonl", "losses.jsonl", "sampled.jsonl")
        or name.endswith("optimizer.pt")
    )


def check_export(run: Path, to: Path, method: str) -> None:
    """The export, by plain transformers, computes what base and adapter do in plain PEFT, and what was trained differs from the base."""
    shutil.rmtree(to, ignore_errors=True)
    done("export", str(run), "--to", str(to), "--dtype", "float32")
    base = transformers.GlmForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if (run / "model").is_dir():
        expected = transformers.GlmForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    else:
        expected = PeftModel.from_pretrained(
            transformers.GlmForCausalLM.from_pretrained(BASE, dtype=torch.float32), run / "adapter"
        )
    if method == "p_tuning":  # a prefix cannot be merged: it is an adapter of PEFT
        found = PeftModel.from_pretrained(transformers.GlmForCausalLM.from_pretrained(BASE, dtype=torch.float32), to)
    else:
        found = transformers.GlmForCausalLM.from_pretrained(to, dtype=torch.float32)
    before, wanted, got = (logits_of(model) for model in (base, expected, found))
    assert (got - wanted).abs().max() < EXACT
    assert (wanted - before).abs().max() > EXACT
    if run.name == "rm":
        head = next(run.glob("*/value_head.safetensors"))
        assert (to / head.name).read_bytes() == head.read_bytes()
    shutil.rmtree(to)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_every_stage_method_and_quantization_is_tried_without_the_rest_of_the_matrix() -> None:
    tried = [each.values for each in cells() if not any(mark.name == "matrix" for mark in each.marks)]
    assert {stage for stage, *_ in tried} == {*STAGES}
    pairs = {(method, quant) for method in METHODS for quant in QUANTS if method in trained_on(quant)}
    assert {(method, quant) for _, method, quant, more in tried if method in METHODS and not more} == pairs
    assert {method for _, method, _, _ in tried} == {*METHODS, *VARIANTS}
    assert {(stage, quant) for stage, _, quant, _ in tried} >= {(stage, quant) for stage in STAGES for quant in QUANTS}


def test_everything_that_can_be_chosen_is_in_the_table() -> None:
    known = presets([conf_dir()])
    assert sorted(STAGES) == sorted(known["stage"])
    assert sorted([*METHODS, *VARIANTS, "none"]) == sorted(known["finetuning"])
    assert sorted(QUANTS) == sorted(known["quant"])


REFUSED = [
    (method, quant) for quant in QUANTS for method in METHODS if method not in trained_on(quant)
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_quantized_base_is_not_trained_itself(tmp_path: Path, stage: str) -> None:
    assert REFUSED == [("freeze", "int8"), ("full", "int8"), ("freeze", "int4"), ("full", "int4")]
    for method, quant in REFUSED:
        code, told = call(*words_of(stage, method, quant, tmp_path), f"trainer.output_dir={tmp_path}/run")
        assert code == 2 and len(told.strip().splitlines()) == 1, told
        assert (
            f"quant={quant} stores frozen integer weights and finetuning={method} must update them; type finetuning=lora"
            in told
        )
        assert not (tmp_path / "run").exists()


def keys() -> Iterator[Any]:
    """Every key of every stage and method, with its choice."""
    for group, names in (("stage", STAGES), ("finetuning", METHODS)):
        for name in names:
            yield pytest.param(group, name, id=f"{group}-{name}")


@pytest.mark.parametrize(("group", "name"), [*keys()])
def test_a_misspelt_key_is_answered_with_the_right_one(tmp_path: Path, group: str, name: str) -> None:
    for key in [each.name for each in fields(classes_of(group)[name]) if each.name not in ("name", "finetuning_type")]:
        typed = key[:-1] if len(key) > 3 else f"{key}s"
        words = [word for word in words_of("sft", "lora", "none", tmp_path) if not word.startswith(f"{group}=")]
        code, told = call(*words, f"{group}={name}", f"{group}.{typed}=1", f"trainer.output_dir={tmp_path}/run")
        assert code == 2 and len(told.strip().splitlines()) == 1, told
        assert f"unknown key '{group}.{typed}'; did you mean '" in told, told
        assert f"'{key}'" in told, told
        assert not (tmp_path / "run").exists()
