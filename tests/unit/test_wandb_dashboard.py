"""The dashboard script: the workspace it would write, and what it says where it cannot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts/wandb_dashboard.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("wandb_dashboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def a_sweep(folder: Path, objective: str | None = "loss") -> Path:
    for place, (method, rank, rate) in enumerate((("lora", 8, 1e-5), ("lora", 16, 1e-3), ("freeze", None, 1e-3))):
        job = folder / f"job_{place}"
        job.mkdir(parents=True)
        finetuning = {"finetuning_type": method} | ({"lora_rank": rank} if rank else {})
        config = {
            "model": {"family": f"f{place}", "dtype": "auto"}, "finetuning": finetuning, "objective": objective, "name": "s",
            "trainer": {"learning_rate": rate, "output_dir": str(job), "seed": 1}, "tracker": {"group": None},
        }  # fmt: skip
        OmegaConf.save(OmegaConf.create(config), job / "config.yaml")
        (job / "metrics.json").write_text(json.dumps({"train_loss": 1.0, "eval_loss": 2.0}))
    (folder / "pictures").mkdir()
    (folder / "pictures/bars.png").touch()
    (folder / "job_0/loss.png").touch()
    return folder


def written(tmp_path: Path, *words: str) -> tuple[dict, dict[str, list[dict]]]:
    """The workspace's JSON, and its panels' configs by their kind."""
    file = tmp_path / "view.json"
    assert script().main(["team/proj", *words, "--dry-run", str(file)]) == 0
    view = json.loads(file.read_text())
    panels: dict[str, list[dict]] = {}
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            panels.setdefault(panel["viewType"], []).append(panel["config"])
    return view, panels


def test_a_sweeps_folder_tells_its_knobs_and_its_objective(tmp_path: Path) -> None:
    view, panels = written(tmp_path, str(a_sweep(tmp_path / "rates")))
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "proj", "glmtuner sweep rates")
    (runs,) = view["spec"]["section"]["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", "rates")
    scatter = {panel["xAxis"]: panel for panel in panels["Scatter Plot"]}
    assert scatter.keys() == {"config:trainer.value.learning_rate", "config:finetuning.value.lora_rank"}
    assert {panel["yAxis"] for panel in scatter.values()} == {"summary:eval_loss"}
    assert scatter["config:trainer.value.learning_rate"]["xAxisLogScale"]
    assert not scatter["config:finetuning.value.lora_rank"]["xAxisLogScale"]
    (bars,) = panels["Bar Chart"]
    assert bars["groupBy"] == "finetuning.value.finetuning_type" and bars["metrics"] == ["eval_loss"]
    (coordinates,) = panels["Parallel Coordinates Plot"]
    assert [column["accessor"] for column in coordinates["columns"]] == [
        "config:finetuning.value.finetuning_type", "config:finetuning.value.lora_rank",
        "config:trainer.value.learning_rate", "summary:eval_loss",
    ]  # fmt: skip
    assert panels["Parameter Importance"][0]["targetKey"] == "eval_loss"
    curves = {(panel["xAxis"], *panel["metrics"]) for panel in panels["Run History Line Plot"]}
    assert curves == {("train/global_step", name) for name in ("train/loss", "eval/loss", "train/learning_rate")}
    assert panels["Media Browser"][0]["mediaKeys"] == ["pictures/bars", "pictures/loss"]
    assert '"val": "predictions"' in json.dumps(panels["Weave"]) and '"val": "leaderboard"' in json.dumps(
        panels["Weave"]
    )


def test_a_group_alone_and_the_words(tmp_path: Path) -> None:
    words = ["a-group", "--objective", "predict_rouge-l", "--knob", "finetuning.lora_rank", "--knob", "trainer.seed"]
    view, panels = written(tmp_path, *words)
    assert '"value": "a-group"' in json.dumps(view["spec"]["section"]["runSets"])
    assert [panel["groupBy"] for panel in panels["Bar Chart"]] == ["finetuning.value.lora_rank", "trainer.value.seed"]
    assert panels["Parameter Importance"][0]["targetKey"] == "predict_rouge-l"
    _, without = written(tmp_path, str(a_sweep(tmp_path / "s", objective=None)), "--objective", "train_loss")
    assert without["Parameter Importance"][0]["targetKey"] == "train_loss"


def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = script().main
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    for words, told in (
        (["proj", "group"], "'proj' is no ENTITY/PROJECT"),
        (["team/", "group"], "'team/' is no ENTITY/PROJECT"),
        (["team/proj", str(tmp_path / "empty")], "holds no jobs of a sweep"),
        (["team/proj", "group"], "not logged in to W&B; type wandb login, or --dry-run FILE"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.expr", None)
    assert main(["team/proj", "group"]) == 2
    assert "is not installed; type pip install 'glmtuner[dashboard]'" in capsys.readouterr().err


def test_help_needs_no_package() -> None:
    block = f"import runpy, sys; sys.modules['wandb'] = sys.modules['wandb_workspaces'] = None; sys.argv = ['d', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "ENTITY/PROJECT" in done.stdout, done.stderr
