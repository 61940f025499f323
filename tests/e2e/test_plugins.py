"""Python of a user's own: on the command line, in training, prediction, sweeps, `show`, `report`, `chat` and `export`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

PLUGIN = Path(__file__).parent.parent / "own_plugin.py"
SHORT = (
    "plugins=my_plugin", "model=tiny_glm", "tracker=none", "metric=same_length", "finetuning=norms", "data.dataset=mine", "data.dataset_dir=.",
    "data.dev_ratio=0.2", "data.max_target_length=12", "trainer.max_steps=4", "trainer.logging_steps=2",
    "trainer.learning_rate=1e-2", "trainer.disable_tqdm=true", "trainer.predict_with_generate=true",
)  # fmt: skip
SCORED = (
    "trainer.eval_strategy=steps", "trainer.eval_steps=2", "trainer.save_steps=2", "trainer.load_best_model_at_end=true",
    "trainer.metric_for_best_model=eval_same_length", "trainer.do_predict=true",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the plugin and records that only its format can read."""
    shutil.copyfile(PLUGIN, tmp_path / "my_plugin.py")
    records = [{"ask": f"How much is {n} and {n}?", "reply": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "mine.json").write_text(json.dumps(records), encoding="utf-8")
    entry = {"mine": {"file_name": "mine.json", "formatting": "ask_reply"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    return tmp_path


def test_a_run_with_a_metric_a_method_and_a_format_of_its_own(glmtuner_fork: Callable, here: Path) -> None:
    done = glmtuner_fork(*SHORT, *SCORED, "metric.scale=10", "trainer.output_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    history = [json.loads(line) for line in (here / "run/history.jsonl").read_text().splitlines()]
    scores = [line["eval_same_length"] for line in history if "eval_same_length" in line]
    metrics = json.loads((here / "run/metrics.json").read_text())
    assert len(scores) == 2 and all(0 <= score <= 10 for score in scores)
    answers = [json.loads(line) for line in (here / "run/predictions.jsonl").read_text().splitlines()]
    by_hand = [
        10 * (1 - abs(len(line["predict"]) - len(line["label"])) / max(len(line["predict"]), len(line["label"])))
        for line in answers
    ]
    assert len(answers) == 8 and metrics["predict_same_length"] == pytest.approx(sum(by_hand) / 8)
    assert metrics["predict_same_length"] == pytest.approx(max(scores))  # the best checkpoint by that metric was kept
    with safe_open(next((here / "run/checkpoints").glob("*/trained.safetensors")), "pt") as weights:
        assert weights.keys() and all("norm" in name for name in weights.keys())  # noqa: SIM118
    (plugin,) = json.loads((here / "run/provenance.json").read_text())["plugins"]
    assert plugin["name"] == "my_plugin" and plugin["presets"] == ["finetuning=norms", "metric=same_length"]
    assert plugin["sha256"] == hashlib.sha256((here / "my_plugin.py").read_bytes()).hexdigest()

    for verb in ("show", "report"):
        done = glmtuner_fork(verb, "run")
        assert done.returncode == 0 and "same_length" in done.stdout, done.stdout + done.stderr
    done = glmtuner_fork(  # the run's folder brings its plugins
        "trainer=predict", "model.checkpoint_dir=run", "data.dataset=mine", "data.dataset_dir=.", "metric=none", "tracker=none",
        "data.max_target_length=12", "plugins=my_plugin", "trainer.output_dir=again",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = glmtuner_fork("export", "run", "--to", "out")
    assert done.returncode == 0 and (here / "out/model.safetensors").is_file(), done.stdout + done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]])
def test_a_sweep_over_a_plugins_presets_and_keys(glmtuner_fork: Callable, here: Path, launcher: list[str]) -> None:
    words = [word for word in SHORT if not word.startswith("finetuning=")]
    words += ["trainer.do_predict=true", "finetuning=norms,lora", "objective=same_length", "name=own", *launcher]
    done = glmtuner_fork("-m", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [path for path in (here / "outputs/sweeps/own").iterdir() if (path / "metrics.json").is_file()]
    assert len(jobs) == 2
    report = (here / "outputs/sweeps/own/report.md").read_text()
    assert "same_length" in report and "norms" in report


def test_an_installed_package_brings_plugins_by_its_entry_point(glmtuner_process: Callable, here: Path) -> None:
    about = here / "own_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[glmtuner.plugins]\nmine = my_plugin\n")
    done = glmtuner_process("--cfg", "job", "--resolve", "--package", "metric", "metric=same_length", "metric.scale=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "name: same_length" in done.stdout and "scale: 3.0" in done.stdout


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["plugins=no_such_plugin"], ["plugins=[no_such_plugin]", "no such module", "no_such_plugin.py"]),
        (["plugins=broken"], ["plugins=[broken]", "NameError", "broken.py:2"]),
        (["plugins=lost"], ["plugins=[lost]", "ModuleNotFoundError", "no_such_library"]),
        (["plugins=twice"], ["plugins=[twice]", "metric=rouge_bleu_zh", "another name"]),
        (["plugins=my_plugin", "metric=same_lenght"], ["metric=same_lenght", "same_length"]),
        (["plugins=my_plugin", "metric=same_length", "metric.scal=3"], ["metric.scal", "scale"]),
        (["plugins=my_plugin", "metric=same_length", "metric.scale=-1"], ["metric.scale=-1", "above 0"]),
        (["plugins=my_plugin", "metric=same_length", "metric.scale=much"], ["metric.scale", "much"]),
        (["metric=same_length"], ["metric=same_length", "rouge_bleu_zh"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_a_paragraph(glmtuner_fork: Callable, here: Path, words: list, facts: list) -> None:
    (here / "broken.py").write_text("import os\nos.environ[undefined]\n")
    (here / "lost.py").write_text("import no_such_library\n")
    (here / "twice.py").write_text(
        "from dataclasses import dataclass\nfrom glmtuner.config.groups import Metric, preset\n"
        "@preset('metric', 'rouge_bleu_zh')\n@dataclass(kw_only=True)\nclass Mine(Metric):\n    pass\n"
    )
    done = glmtuner_fork("model=tiny_glm", "tracker=none", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert all(fact in done.stderr for fact in facts), done.stderr
    assert not (here / "outputs").exists()


def test_code_that_came_with_a_run_is_not_executed(
    glmtuner_fork: Callable, glmtuner_process: Callable, here: Path
) -> None:
    done = glmtuner_fork(*SHORT, "trainer.output_dir=run")
    assert done.returncode == 0, done.stdout + done.stderr
    code = (here / "my_plugin.py").read_text(encoding="utf-8")
    (here / "my_plugin.py").unlink()
    (here / "run/my_plugin.py").write_text(f"open('executed', 'w').close()\n{code}", encoding="utf-8")
    for words in (["chat", "run"], ["trainer=predict", "model.checkpoint_dir=run", "data.dataset=identity_sample"]):
        done = glmtuner_process(*words, env={"PYTHONPATH": f"{PLUGIN.parent.parent}:{here / 'run'}"})
        assert done.returncode == 2 and "plugins=my_plugin" in done.stderr and "Traceback" not in done.stderr
    done = glmtuner_process("report", "run", env={"PYTHONPATH": f"{PLUGIN.parent.parent}:{here / 'run'}"})
    assert done.returncode == 0 and not (here / "executed").exists()
