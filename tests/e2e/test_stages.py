"""Beyond SFT through the command line: pt, rm, dpo, kto and ppo learn what they are for, with every kind of method."""

import io
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from json_lines import lines
from safetensors.torch import load_file
from upstream import write_checkpoint
from warm_server import WarmServer

ROOT = Path(__file__).parent.parent.parent
SHORT = (
    "tracker=none", "data.max_source_length=64", "data.max_target_length=24", "trainer.disable_tqdm=true",
    "trainer.logging_steps=2",
)  # fmt: skip
RATES = {"lora": 2e-3, "freeze": 1e-3, "full": 5e-4, "p_tuning": 3e-2}
PPO = (
    "trainer.per_device_train_batch_size=8",
    "stage.minibatch_size=4",
    "stage.ppo_epochs=2",
    "trainer.logging_steps=1",
)


def run(folder: Path, *words: str) -> str:
    """`python -m glmtuner` in this process, its run in `folder`; what it printed."""
    from glmtuner.cli.main import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main([*SHORT, *words, f"trainer.output_dir={folder}"])
    assert code == 0, out.getvalue()
    return out.getvalue()


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder / "history.jsonl") if name in line]


def values(method: str) -> list[str]:
    method, _, quant = method.partition("+")
    return [f"finetuning={method}", f"trainer.learning_rate={RATES[method]}", *([f"quant={quant}"] if quant else [])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The run folders of an SFT model and of a reward model that goes on from it, made once a method."""
    made: dict[str, tuple[Path, Path]] = {}

    def runs(method: str) -> tuple[Path, Path]:
        if method not in made:
            root = tmp_path_factory.mktemp("base")
            run(root / "sft", "model=tiny_glm", *values(method), "data.dataset=feedback_sample", "trainer.max_steps=24")
            run(
                root / "rm", "stage=rm", f"model.checkpoint_dir={root}/sft", *values(method), "data.dataset=preference_sample",
                "data.dev_ratio=0.2", "trainer.max_steps=18", "trainer.do_eval=true", "trainer.do_predict=true",
            )  # fmt: skip
            made[method] = root / "sft", root / "rm"
        return made[method]

    return runs


METHODS = ["lora", "freeze", "lora+int4", "full", "p_tuning+int8"]


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_ranks_pairs_that_it_has_not_seen(base: Callable, method: str) -> None:
    _, folder = base(method)
    losses, metrics = logged(folder, "loss"), json.loads((folder / "metrics.json").read_text())
    assert losses[-1] < losses[0]
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_accuracy"] == pytest.approx(metrics["predict_accuracy"], abs=1e-6)
    assert metrics["eval_margin"] == pytest.approx(metrics["predict_margin"], abs=1e-4)
    assert len(lines(folder / "losses.jsonl")) == 19
    predicted = lines(folder / "predictions.jsonl")
    assert len(predicted) == 19
    assert predicted[0].keys() == {"index", "prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
    beside = folder / ("adapter" if method.partition("+")[0] in ("lora", "p_tuning") else "model")
    assert {*load_file(beside / "value_head.safetensors")} == {"weight", "bias"}
    weights = [name for file in beside.glob("*model*.safetensors") for name in load_file(file)]
    assert weights and not any("value_head" in name for name in weights)


@pytest.mark.parametrize("method", ["lora", "freeze", "lora+int4"])
@pytest.mark.parametrize(("stage", "dataset"), [("dpo", "preference_sample"), ("kto", "feedback_sample")])
def test_preferences_and_feedback_are_learned(
    base: Callable, tmp_path: Path, method: str, stage: str, dataset: str
) -> None:
    sft, _ = base(method)
    run(
        tmp_path / "run", f"stage={stage}", f"model.checkpoint_dir={sft}", *values(method), f"data.dataset={dataset}",
        "data.dev_ratio=0.2", "trainer.eval_on_start=true", "trainer.do_eval=true", "trainer.max_steps=8",
    )  # fmt: skip
    losses, margins = (logged(tmp_path / "run", name) for name in ("eval_loss", "eval_margin"))
    assert losses[0] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[stage], abs=1e-3), "it starts as its own reference"
    assert margins[0] == pytest.approx(0, abs=1e-3)
    assert losses[-1] < losses[0] - 0.02
    assert margins[-1] > 0.2


@pytest.mark.parametrize(
    ("stage", "method"), [("orpo", "lora"), ("simpo", "freeze"), ("cpo", "lora+int4"), ("cpo", "full")]
)
def test_preferences_are_learned_without_a_reference(base: Callable, tmp_path: Path, stage: str, method: str) -> None:
    sft, _ = base(method)
    run(
        tmp_path / "run", f"stage={stage}", f"model.checkpoint_dir={sft}", *values(method), "data.dataset=preference_sample",
        "data.dev_ratio=0.2", "trainer.eval_on_start=true", "trainer.do_eval=true", "trainer.max_steps=8",
    )  # fmt: skip
    losses, margins, accuracy = (logged(tmp_path / "run", f"eval_{name}") for name in ("loss", "margin", "accuracy"))
    assert losses[-1] < losses[0] - 0.02
    assert margins[-1] > margins[0] and accuracy[-1] > 0.9
    assert len(lines(tmp_path / "run/losses.jsonl")) == 19
    assert "eval_reward_chosen" in json.loads((tmp_path / "run/metrics.json").read_text())


@pytest.mark.parametrize("method", ["lora", "freeze", "lora+int4"])
def test_plain_text_is_learned(tmp_path: Path, method: str) -> None:
    told = run(
        tmp_path / "run", "stage=pt", "model=tiny_glm", *values(method), "data.dataset=text_sample", "stage.block_length=64",
        "data.dev_ratio=0.2", "trainer.do_eval=true", "trainer.max_steps=8",
    )  # fmt: skip
    losses, metrics = logged(tmp_path / "run", "loss"), json.loads((tmp_path / "run/metrics.json").read_text())
    assert losses[-1] < losses[0]
    assert "text_sample: 16 records" in told
    assert metrics["eval_perplexity"] == pytest.approx(2.718281828 ** metrics["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_ppo_runs_on_the_layers_of_its_reward_model(base: Callable, tmp_path: Path, method: str) -> None:
    sft, rm = base(method)
    run(
        tmp_path / "run", "stage=ppo", f"model.checkpoint_dir={sft}", f"model.reward_model={rm}", *values(method), *PPO,
        "data.dataset=preference_sample", "trainer.max_steps=2",
    )  # fmt: skip
    first, second = lines(tmp_path / "run/history.jsonl")
    assert first["kl"] == pytest.approx(0, abs=2e-3), "the first answers are the reference's own"
    assert second["kl"] != first["kl"]
    names = {
        "reward",
        "kl",
        "entropy",
        "clip_fraction",
        "value_loss",
        "policy_loss",
        "response_length",
        "kl_coefficient",
    }
    assert names <= first.keys()


def test_a_learning_rate_of_zero_moves_nothing(base: Callable, tmp_path: Path) -> None:
    sft, rm = base("lora")
    run(
        tmp_path / "run", "stage=ppo", f"model.checkpoint_dir={sft}", f"model.reward_model={rm}", *PPO,
        "data.dataset=preference_sample", "trainer.max_steps=2", "trainer.learning_rate=0",
    )  # fmt: skip
    before, after = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (sft, tmp_path / "run"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert not any(value.any() for value in load_file(tmp_path / "run/adapter/value_head.safetensors").values())
    assert logged(tmp_path / "run", "kl") == pytest.approx([0, 0], abs=1e-4)
    assert logged(tmp_path / "run", "clip_fraction") == [0, 0]


@pytest.mark.heavy
def test_the_three_presets_make_answers_friendlier(
    glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of the README, shortened; the true reward is the share of greedy answers that end in the friendly line."""

    def friendly(name: str) -> float:
        done = glmtuner(
            "trainer=predict", f"model.checkpoint_dir=outputs/rlhf/{name}", "tracker=none", "data.dataset=preference_sample",
            "data.dataset_dir=.", f"trainer.output_dir=answers_{name}", "trainer.per_device_eval_batch_size=96",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = [
            line["predict"].endswith("希望能帮到你！") for line in lines(tmp_path / f"answers_{name}/predictions.jsonl")
        ]
        return sum(found) / len(found)

    questions = json.loads((ROOT / "glmtuner/assets/data/preference_sample.json").read_text(encoding="utf-8"))
    answered = [{"instruction": record["instruction"], "output": record["output"][0]} for record in questions]
    (tmp_path / "preference_sample.json").write_text(json.dumps(answered), encoding="utf-8")
    entry = {"preference_sample": {"file_name": "preference_sample.json"}}
    for name, *words in (
        ("sft", "trainer.num_train_epochs=10"),
        ("rm", "trainer.max_steps=16"),
        ("ppo", "trainer.max_steps=8"),
    ):
        done = glmtuner(f"experiment=rlhf_{name}", "trainer.disable_tqdm=true", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "outputs/rlhf/rm/metrics.json").read_text())["eval_accuracy"] > 0.9
    kl, reward = (logged(tmp_path / "outputs/rlhf/ppo", name) for name in ("kl", "eval_reward"))
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    before, after = friendly("sft"), friendly("ppo")
    assert after > before + 0.1
    assert reward[-1] > reward[0] + 0.5
    assert max(kl) < 5


# -- resume --------------------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> list[bytes]:
    names = ("history.jsonl", "adapter/adapter_model.safetensors", "adapter/value_head.safetensors")
    return [(folder / name).read_bytes() for name in names if (folder / name).is_file()]


RESUMED = {
    "sft": ["data.dataset=alpaca_zh_sample", "data.max_samples=30", "stage.loss=dft"],
    "pt": ["model=tiny_glm", "data.dataset=text_sample", "stage.block_length=64"],
    "rm": ["data.dataset=preference_sample"],
    "dpo": ["data.dataset=preference_sample"],
    "orpo": ["data.dataset=preference_sample"],
    "kto": ["data.dataset=feedback_sample", "stage.precompute_reference=true"],
    "ppo": ["data.dataset=preference_sample", "stage.kl_target=1", "stage.kl_horizon=50", *PPO],
}


def resumed_words(stage: str, sft: Path, rm: Path) -> list[str]:
    words = [f"stage={stage}", *RESUMED[stage], "finetuning.lora_dropout=0.1", "trainer.learning_rate=2e-3"]
    words += ["trainer.logging_steps=3", "trainer.save_steps=2", "trainer.max_steps=5"]
    words += [f"model.checkpoint_dir={sft}"] if stage != "pt" else []
    return words + ([f"model.reward_model={rm}"] if stage == "ppo" else [])


@pytest.mark.parametrize("stage", RESUMED)
def test_a_run_cut_short_ends_in_the_same_bytes(base: Callable, tmp_path: Path, stage: str) -> None:
    """What kill -9 leaves of a run is its folder without what is written at the end."""
    words = resumed_words(stage, *base("lora"))
    run(tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for left_over in ("metrics.json", "report.md"):
        (tmp_path / "cut" / left_over).unlink()
    shutil.rmtree(tmp_path / "cut/adapter")
    for later in (4, 5):
        shutil.rmtree(tmp_path / f"cut/checkpoints/checkpoint-{later}")
    assert "resumed from checkpoint-2" in run(tmp_path / "cut", *words)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.heavy
def test_ppo_killed_in_the_middle_ends_in_the_same_bytes(
    base: Callable, warm_server: WarmServer, tmp_path: Path
) -> None:
    words = resumed_words("ppo", *base("lora"))
    run(tmp_path / "whole", *words)
    folder = tmp_path / "killed"
    killed = warm_server.run(
        *SHORT, *words, f"trainer.output_dir={folder}", cwd=tmp_path, below=str(folder), kill_at=1,
        matching=r"/\.partial-checkpoint-(?!2)",
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL, killed.output
    assert not (folder / "metrics.json").is_file()
    run(folder, *words)
    assert outcome(folder) == outcome(tmp_path / "whole")


# -- what else must work of a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dpo", "orpo", "simpo", "cpo"])
def test_accumulation_equals_the_big_batch(base: Callable, tmp_path: Path, stage: str) -> None:
    sft, _ = base("lora")
    for name, batch, accumulation in (("big", 8, 1), ("small", 4, 2)):
        run(
            tmp_path / name, f"stage={stage}", f"model.checkpoint_dir={sft}", "data.dataset=preference_sample", "trainer.max_steps=3",
            f"trainer.per_device_train_batch_size={batch}", f"trainer.gradient_accumulation_steps={accumulation}",
            "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "finetuning.lora_dropout=0", "model.resume_lora_training=false",
        )  # fmt: skip
    big, small = (lines(tmp_path / name / "history.jsonl") for name in ("big", "small"))
    for name in ("loss", "margin", "reward_chosen", "grad_norm"):
        assert [line[name] for line in small] == pytest.approx([line[name] for line in big], rel=2e-3, abs=1e-4)


@pytest.mark.heavy
def test_a_sweep_over_losses_and_what_wandb_gets(
    base: Callable, glmtuner: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, _ = base("lora")
    sent: list[dict] = []
    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", lambda self, data, *args, **kwargs: sent.append(data))
    done = glmtuner(
        "-m", "stage=dpo", "stage.loss=ipo,apo_zero", "stage.sft_weight=0.1", f"model.checkpoint_dir={sft}",
        *(word for word in SHORT if "tracker" not in word), "data.dataset=preference_sample", "trainer.max_steps=2",
        "name=losses",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = sorted(path.parent for path in (tmp_path / "outputs/sweeps/losses").glob("*/metrics.json"))
    assert len(jobs) == 2
    assert all(
        {"margin", "accuracy", "reward_chosen", "nll_chosen"} <= line.keys()
        for job in jobs
        for line in lines(job / "history.jsonl")
    )
    assert {"train/margin", "train/accuracy", "train/loss"} <= {name for data in sent for name in data}


def test_a_reward_model_is_shown_and_exported_and_does_not_talk(
    base: Callable, glmtuner: Callable, tmp_path: Path
) -> None:
    _, rm = base("lora")
    shown = glmtuner("show", str(rm))
    assert shown.returncode == 0 and "worse answer" in shown.stdout
    for verb in ("chat", "serve"):
        refused = glmtuner(verb, str(rm))
        assert refused.returncode == 2
        assert "holds a reward model" in refused.stderr and "stage=ppo" in refused.stderr
    done = glmtuner("export", str(rm), "--to", "out")
    assert done.returncode == 0, done.stderr
    assert "a reward model" in done.stdout and "value_head.safetensors" in done.stdout
    assert (tmp_path / "out/value_head.safetensors").read_bytes() == (
        rm / "adapter/value_head.safetensors"
    ).read_bytes()
    refused = glmtuner("chat", "out")
    assert refused.returncode == 2 and "out holds a reward model" in refused.stderr


def test_a_reward_model_is_evaluated_and_goes_on(base: Callable, tmp_path: Path) -> None:
    _, rm = base("lora")
    run(
        tmp_path / "again",
        "stage=rm",
        "trainer=evaluate",
        f"model.checkpoint_dir={rm}",
        "data.dataset=preference_sample",
    )
    run(
        tmp_path / "same", "stage=rm", "trainer=predict", "trainer.predict_with_generate=false", f"model.checkpoint_dir={rm}",
        "data.dataset=preference_sample",
    )  # fmt: skip
    again, same = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("again", "same"))
    assert again["eval_margin"] == pytest.approx(same["predict_margin"], abs=1e-3)
    assert again["eval_accuracy"] > 0.9
    on = run(
        tmp_path / "on",
        "stage=rm",
        f"model.checkpoint_dir={rm}",
        "data.dataset=preference_sample",
        "trainer.max_steps=2",
    )
    assert on and logged(tmp_path / "on", "loss")[0] < 0.5, "the head is the one that was trained"


@pytest.mark.parametrize("preset", ["chatglm_6b", "chatglm2_6b"])
def test_chatglm(tmp_path: Path, upstream_files: Path, preset: str) -> None:
    write_checkpoint(preset, tmp_path / "base", upstream_files)
    words = [
        f"model={preset}", f"model.model_name_or_path={tmp_path}/base", "data.max_samples=12", "trainer.per_device_train_batch_size=4",
        "trainer.max_steps=2", "trainer.learning_rate=1e-3", "data.max_target_length=12",
    ]  # fmt: skip
    run(tmp_path / "pt", *words, "stage=pt", "data.dataset=text_sample", "stage.block_length=32")
    run(tmp_path / "rm", *words, "stage=rm", "data.dataset=preference_sample")
    run(tmp_path / "ppo", *words, "stage=ppo", f"model.reward_model={tmp_path}/rm", "data.dataset=preference_sample")
    for name, metric in (("pt", "loss"), ("rm", "margin"), ("ppo", "reward")):
        assert logged(tmp_path / name, metric)


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("stage=ppo", "stage=ppo without model.reward_model: answers need a score; train a reward model with stage=rm"),
        ("stage=ppo model.reward_model=nowhere", "model.reward_model=nowhere: no such folder"),
        ("stage=ppo model.reward_model={sft}", "holds a run of stage=sft; name one of stage=rm"),
        ("stage=ppo model.reward_model={rm} finetuning=freeze", "finetuning is lora in the reward model's run, freeze in this one"),
        ("stage=ppo model.reward_model={rm} finetuning.lora_rank=4", "finetuning.lora_rank is 8 in the reward model's run, 4 in this one"),
        ("stage=ppo model.reward_model={rm} model.template=plain", "type model.template=glm4"),
        ("stage=ppo model.reward_model={rm} trainer=evaluate", "stage=ppo without training"),
        ("stage=ppo model.reward_model={rm} trainer.gradient_accumulation_steps=2", "type trainer.gradient_accumulation_steps=1"),
        ("stage=ppo model.reward_model={rm} stage.minibatch_size=9", "stage.minibatch_size=9 is more than"),
        (
            "stage=ppo model.reward_model={rm} model.checkpoint_dir={sft} model.resume_lora_training=false",
            "train both from the same model.checkpoint_dir with the same model.resume_lora_training",
        ),
        ("model.reward_model={rm}", "with stage=sft: it is for stage=ppo"),
        ("stage=rm trainer=evaluate", "type model.checkpoint_dir=<its run folder>"),
        ("stage=rm trainer=evaluate model.checkpoint_dir={sft}", "holds a run of stage=sft; name one of stage=rm"),
        ("stage=rm data.dataset=belle_sample", "holds single answers, and this stage learns from ranked pairs"),
        ("stage=dpo data.dataset=feedback_sample", "holds feedback, and this stage learns from ranked pairs"),
        ("stage=kto data.dataset=belle_sample", "holds single answers, and stage=kto learns from feedback"),
        ("stage=kto data.dataset=good.json", "every answer is marked true, and stage=kto learns good from bad answers"),
        ("stage=pt data.dataset=belle_sample", "holds single answers, and stage=pt learns plain text"),
        ("stage=ppo model.reward_model={rm} data.dataset=text_sample", "holds plain text, and stage=ppo answers prompts"),
        ("stage=rm data.dataset=halves.json", "a ranked pair needs two answers, got a list of 1"),
        ("stage=dpo trainer=predict", "type trainer=predict model.checkpoint_dir=<the folder of this run>"),
        ("stage=dpo stage.beta=0", "stage.beta=0.0: above 0"),
        ("stage=dpo stage.loss=ipo stage.label_smoothing=0.1", "of these losses sigmoid, robust, exo_pair know of swapped labels"),
        ("stage=dpo stage.loss=exo_pair", "it is infinite without label smoothing; type stage.label_smoothing=0.001"),
        ("stage=cpo stage.loss=hinge stage.label_smoothing=0.1", "only sigmoid knows of swapped labels; type stage.label_smoothing=0"),
        ("stage=simpo stage.gamma=-1 stage.beta=0", "stage.beta=0.0: above 0; stage.gamma=-1.0: 0 or more"),
        ("stage=orpo data.dataset=belle_sample", "holds single answers, and this stage learns from ranked pairs"),
        ("stage=ppo model.reward_model={rm} stage.clip_range=1.5", "stage.clip_range=1.5: in (0, 1)"),
    ],
    ids=lambda value: value.replace("=", "-").replace("{", "").replace("}", "")[:50] if "stage" in value or "model" in value else "",
)  # fmt: skip
def test_mistakes_cost_one_paragraph(base: Callable, glmtuner: Callable, tmp_path: Path, words: str, told: str) -> None:
    sft, rm = base("lora")
    (tmp_path / "good.json").write_text(
        json.dumps([{"instruction": q, "output": "好", "kto_tag": True} for q in "一二三"])
    )
    (tmp_path / "halves.json").write_text(
        json.dumps([{"instruction": "一", "output": ["好"]}, {"instruction": "一", "output": ["好", "坏"]}])
    )
    dataset = [] if "data.dataset" in words else ["data.dataset=preference_sample"]
    done = glmtuner("model=tiny_glm", *SHORT, *dataset, "trainer.output_dir=run", *words.format(sft=sft, rm=rm).split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
