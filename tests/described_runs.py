"""Runs as they are composed, and folders that hold what describes a run, without weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.compose import compose
from glmtuner.config.schema import Run
from glmtuner.launch.register import register_presets


def run_with(*words: str) -> Run:
    """The run of the shipped model with these arguments."""
    register_presets()
    return compose(["model=tiny_glm", *words]).run


def write_run(
    folder: Path, provenance: dict[str, Any], template: str = "glm4", without: Sequence[tuple[str, str]] = ()
) -> Path:
    """The folder, with a run of the shipped model; `without`: keys, by their groups, that an earlier version had not."""
    folder.mkdir()
    register_presets()
    config: Any = OmegaConf.to_container(compose(["model=tiny_glm"]).config, resolve=True, enum_to_str=True)
    config["model"]["template"] = template
    for group, key in without:
        del config[group][key]
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    (folder / "overrides.txt").write_text("model=tiny_glm\n", encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps({"data": {}, **provenance}), encoding="utf-8")
    return folder
