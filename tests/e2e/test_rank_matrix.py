"""Stages, methods and quantizations on 2 and 4 ranks, ddp and fsdp2: losses, metrics, answers and adapters are those of one process.

All cells of a kind of parallelism run in the same processes, so that Python and its libraries are started once. 13 records are
learned in batches of 8 over all ranks: the last batch of an epoch leaves one of two ranks with a single row, and one of four with none.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zoo
from json_lines import lines
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "tests/rank_cells.py"
SUMS = [{"instruction": f"{a}+{b}=?", "input": "", "output": str(a + b)} for a in range(4) for b in range(4)]
WORDS = [
    "model=tiny_glm", "tracker=none", "data.max_samples=16", "data.dev_ratio=0.2", "data.max_source_length=48", "data.max_target_length=8",
    "trainer.num_train_epochs=2", "trainer.logging_steps=1", "trainer.disable_tqdm=true", "trainer.do_eval=true", "trainer.use_cpu=true",
    "trainer.learning_rate=1e-3",
]  # fmt: skip
PREDICTS = ("data.dataset=belle_sample", "trainer.do_predict=true", "trainer.predict_with_generate=true")
PAIRS = "data.dataset=preference_sample"  # their answers differ behind the first tokens
FEEDBACK, ASKED = "data.dataset=feedback_sample", "data.dataset=sums.json"
GRPO = ("stage=grpo", ASKED, "reward=[number,length]", "reward.length.buffer_tokens=4", "stage.num_generations=4")
ACCUMULATED = "trainer.gradient_accumulation_steps=2"
CELLS: dict[str, Sequence[str]] = {
    "sft-lora": PREDICTS,
    "sft-lora-int4": (*PREDICTS, "trainer.save_steps=2"),
    "sft-lora-int8": PREDICTS,
    "sft-p_tuning": PREDICTS,
    "sft-p_tuning-int4": PREDICTS,
    "sft-freeze": PREDICTS,
    "sft-full": PREDICTS,
    "sft-full-beams": (*PREDICTS, "data.eval_num_beams=2"),
    "pt-lora-int4": ("stage=pt", "data.dataset=text_sample"),
    "rm-lora": ("stage=rm", PAIRS, "trainer.do_predict=true"),
    "rm-full": ("stage=rm", PAIRS, "trainer.do_predict=true"),
    "rm-lora-int4": ("stage=rm", PAIRS, "trainer.do_predict=true"),
    "dpo-lora": ("stage=dpo", PAIRS),
    "dpo-lora-int4": ("stage=dpo", PAIRS, "stage.precompute_reference=true"),
    "dpo-full": ("stage=dpo", PAIRS),
    "dpo-lora-accumulated": ("stage=dpo", PAIRS, ACCUMULATED),
    "kto-lora": ("stage=kto", FEEDBACK),
    "kto-freeze-accumulated": ("stage=kto", FEEDBACK, ACCUMULATED),
    "orpo-freeze": ("stage=orpo", PAIRS),
    "orpo-p_tuning-int8": ("stage=orpo", PAIRS),
    "simpo-full": ("stage=simpo", PAIRS),
    "cpo-lora-int4": ("stage=cpo", PAIRS),
    "ppo-lora": ("stage=ppo", ASKED, "stage.ppo_epochs=2", "stage.kl_target=1.0", "stage.whiten_rewards=true"),
    "ppo-full": ("stage=ppo", ASKED, "stage.ppo_epochs=2"),
    # with seed 42 a random number falls on the boundary of two words, so that rounding decides in the second last token of an answer
    "ppo-lora-int4": ("stage=ppo", ASKED, "trainer.seed=7"),
    "grpo-lora": (*GRPO, "stage.loss=dapo", "stage.scale_rewards=batch", "stage.num_iterations=2", "stage.microbatch_size=3"),
    "grpo-full": (*GRPO, "stage.loss=grpo"),
    "grpo-lora-int4": (*GRPO, "stage.loss=rloo", "stage.scale_rewards=batch"),
}  # fmt: skip
# architecture -> whether it has experts that are quantized, too
SHARDED = {"llama": False, "mixtral": True, "qwen3_next": True}
RESUMED = "sft-lora-int4"  # is also resumed after its second step
SMALL = ("sft-lora-int4", "rm-lora", "kto-lora", "ppo-lora")
FOUR = ("sft-full-beams", "dpo-full", "kto-freeze-accumulated", "orpo-p_tuning-int8", "grpo-lora")
Cells = list[dict[str, Any]]


def words_of(name: str, count: int, parallel: str, here: Path) -> list[str]:
    """The command line of a cell for so many ranks; of one that needs a reward model, that of the same kind by one process."""
    stage, method, *more = name.split("-")
    quant = [f"quant={each}" for each in more if each.startswith("int")]
    words = [
        *WORDS,
        f"finetuning={method}",
        *quant,
        *CELLS[name],
        *(["finetuning.lora_dropout=0"] if method == "lora" else []),
    ]
    if stage == "ppo":
        words.append(f"model.reward_model={here / 'one' / name.replace('ppo', 'rm')}")
    rows = 8 // count // (2 if ACCUMULATED in words else 1)
    if stage in ("ppo", "grpo"):
        words.append("trainer.learning_rate=2e-4")
    if PAIRS in words:
        words.append("data.max_target_length=24")
    # LLM.int8() chooses, in evaluations, the columns of a batch that it does not round
    measured = 1 if "quant=int8" in quant else 4 // count
    sizes = [f"trainer.per_device_train_batch_size={rows}", f"trainer.per_device_eval_batch_size={measured}"]
    place = f"{parallel}-{count}" if count > 1 else "one"
    return [*words, *sizes, f"parallel={parallel}", f"trainer.output_dir={here / place / name}"]


def start(here: Path, cells: Cells, count: int) -> None:
    """Run the cells in `count` processes of one start."""
    file = here / f"cells-{count}-{len(list(here.glob('cells-*')))}.json"
    file.write_text(json.dumps(cells), encoding="utf-8")
    log = file.with_suffix(".log")
    paths = [str(ROOT), str(ROOT / "tests/architectures")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(file)]
    if count > 1:
        launched = f"from glmtuner.distributed.ranks import run_ranks; run_ranks({command!r}, {count})"
        command = [sys.executable, "-c", launched]
    with log.open("w") as out:
        done = subprocess.run(command, cwd=here, env=environment, stdout=out, stderr=out, timeout=3000)
    assert done.returncode == 0, log.read_text()[-6000:]


class Ranks:
    """Runs that are made once; those of one process are made for the cells that are asked for."""

    def __init__(self, here: Path) -> None:
        self.here = here
        (here / "sums.json").write_text(json.dumps(SUMS), encoding="utf-8")

    def compared(self, names: Sequence[str], parallel: str, count: int) -> None:
        """Compare each of these cells on so many ranks with one process."""
        missing = [name for name in names if not (self.here / "one" / name / "metrics.json").is_file()]
        if missing:
            start(self.here, [{"words": words_of(name, 1, "none", self.here)} for name in missing], 1)
        cells: Cells = [{"words": words_of(name, count, parallel, self.here)} for name in names]
        undisturbed = self.here / f"{parallel}-{count}" / RESUMED
        resumed = undisturbed.with_name(f"{RESUMED}-resumed")
        if RESUMED in names:
            *words, _ = words_of(RESUMED, count, parallel, self.here)
            checkpoint = f"trainer.resume_from_checkpoint={undisturbed / 'checkpoints/checkpoint-2'}"
            cells.append({"words": [*words, checkpoint, f"trainer.output_dir={resumed}"]})
        start(self.here, cells, count)
        if RESUMED in names:
            adapter = "adapter/adapter_model.safetensors"
            # ddp sums the first step after a start in other buckets, with more than two ranks in another order
            if parallel == "ddp" and count > 2:
                found, wanted = (load_file(folder / adapter) for folder in (resumed, undisturbed))
                assert all((found[name] - wanted[name]).abs().max() <= 1e-5 for name in wanted)
            else:
                for file in (adapter, "predictions.jsonl", "losses.jsonl"):
                    assert (resumed / file).read_bytes() == (undisturbed / file).read_bytes(), file
            assert [line["step"] for line in lines(resumed / "history.jsonl") if "loss" in line] == [3, 4]
        problems = {}
        for name in names:
            try:
                same(self.here / f"{parallel}-{count}" / name, self.here / "one" / name)
            except AssertionError as error:
                problems[name] = str(error)[:1500]
        assert not problems, "\n\n".join(f"{name}: {problem}" for name, problem in problems.items())

    def shards(self, count: int, architectures: Sequence[str]) -> dict[str, Any]:
        """What rank_cells.py found of each architecture in 4 and in 8 bits, of all ranks."""
        cells: Cells = []
        for name in architectures:
            if not (self.here / "models" / name).is_dir():
                zoo.write_checkpoint(name, self.here / "models" / name)
            for bits in (4, 8):
                out = str(self.here / f"shards-{name}-{bits}-{count}.json")
                cells.append({"shards": str(self.here / "models" / name), "bits": bits, "out": out})
        start(self.here, cells, count)
        return {
            f"{Path(cell['shards']).name}-{cell['bits']}": json.loads(Path(cell["out"]).read_text()) for cell in cells
        }


def close(found: Any, wanted: Any, tolerance: float = 1e-5, relative: float = 1e-4) -> Any:
    return found == pytest.approx(wanted, abs=tolerance, rel=relative)


def same(folder: Path, other: Path) -> None:
    """The two runs' histories, losses of the records, answers and adapters are the same but for rounding."""
    mine, theirs = lines(folder / "history.jsonl"), lines(other / "history.jsonl")
    assert [line.keys() for line in mine] == [line.keys() for line in theirs] and len(mine) > 2
    for line, wanted in zip(mine, theirs, strict=True):
        for key, value in wanted.items():
            # a loss within 1e-5; what is a sum over an answer's tokens, or over all weights, relative to its size
            within = {"loss": 0, "eval_loss": 0}.get(key, 1e-4)
            assert close(line[key], value, 1e-4 if key == "kl" else 1e-5, within), (key, line, wanted)
    for name in ("losses.jsonl", "predictions.jsonl", "sampled.jsonl"):
        assert (folder / name).is_file() is (other / name).is_file(), name
        if not (other / name).is_file():
            continue
        found, expected = lines(folder / name), lines(other / name)
        assert len(found) == len(expected), name
        for line, wanted in zip(found, expected, strict=True):
            assert line.keys() == wanted.keys(), name
            if "chosen_score" in wanted:  # a margin is learned; what is added to both scores is not
                for each in (line, wanted):
                    each["rejected_score"] -= each.pop("chosen_score")
            for key, value in wanted.items():
                is_number = isinstance(value, float)
                assert close(line[key], value, 1e-4) if is_number else line[key] == value, (name, key, line, wanted)
    if (other / "predictions.jsonl").is_file():
        metrics, expected_metrics = (json.loads((path / "metrics.json").read_text()) for path in (folder, other))
        for key, value in expected_metrics.items():
            if key.startswith("predict_") or key.endswith("_parameters"):
                assert close(metrics[key], value), key
    for path in (other / "adapter").glob("*.safetensors"):
        found_weights, weights = load_file(folder / "adapter" / path.name), load_file(path)
        assert found_weights.keys() == weights.keys()
        for key, value in weights.items():
            if (path.name, key) == ("value_head.safetensors", "bias") and folder.name.startswith("rm"):
                continue  # it is added to both scores of a pair, so that its gradient is rounding alone, which Adam scales up
            assert found_weights[key].dtype == value.dtype and found_weights[key].shape == value.shape
            assert (found_weights[key] - value).abs().max() < 2e-4, (path.name, key)


@pytest.fixture(scope="module")
def rank_runs(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


def test_two_sharded_ranks_learn_and_answer_as_one_process_does(rank_runs: Ranks) -> None:
    rank_runs.compared(SMALL, "fsdp2", 2)


@pytest.mark.heavy
def test_four_sharded_ranks_learn_and_answer_as_one_process_does(rank_runs: Ranks) -> None:
    rank_runs.compared(FOUR, "fsdp2", 4)


@pytest.mark.heavy
@pytest.mark.parametrize(("parallel", "count"), [("fsdp2", 4), ("ddp", 2), ("fsdp2", 2), ("ddp", 4)])
def test_every_stage_and_method_on_ranks_is_that_of_one_process(rank_runs: Ranks, parallel: str, count: int) -> None:
    rank_runs.compared([*CELLS], parallel, count)


def check_shards(found: dict[str, Any], count: int) -> None:
    for name, every in found.items():
        for own in every:
            assert abs(own["loss"]) < 1e-5 and own["gradient"] < 1e-5, (name, own)
            tensors = own["tensors"]
            assert tensors[0] == tensors[1] == tensors[2] == own["scales"] > 0 and len({*own["gradients"]}) == 1, (
                name,
                own,
            )
            # a row of a weight that cannot be divided is at most one more on a rank
            for key in ("loaded", "sharded"):
                assert own[key] <= own["whole"] / count + tensors[0] * 64, (name, key, own)
        assert sum(own["loaded"] for own in every) == every[0]["whole"]
        assert sum(own["scales_sharded"] for own in every) == every[0]["scales_whole"]


def test_ranks_hold_shares_of_integers_and_compute_as_bitsandbytes_does(rank_runs: Ranks) -> None:
    check_shards(rank_runs.shards(2, ["mixtral"]), 2)


@pytest.mark.heavy
def test_four_ranks_hold_shares_of_integers(rank_runs: Ranks) -> None:
    check_shards(rank_runs.shards(4, [*SHARDED]), 4)
