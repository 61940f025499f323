"""Connections to the hub that are lost at chosen bytes, for models, tokenizers and data sets: tried again, then one paragraph."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serve

from glmtuner.config.paths import ASSETS, PACKAGE_DATA

ROOT = Path(__file__).parent.parent.parent
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "data.json"]


def run(tmp_path: Path, cuts: dict[str, list[int]]) -> subprocess.CompletedProcess[str]:
    shutil.copytree(ASSETS / "tiny_glm", tmp_path / "models/org/tiny")
    (tmp_path / "datasets/org/data").mkdir(parents=True)
    shutil.copy(PACKAGE_DATA / "belle_sample.json", tmp_path / "datasets/org/data/data.json")
    (tmp_path / "dataset_info.json").write_text('{"h": {"hf_hub_url": "org/data", "data_files": "data.json"}}')
    server = serve(tmp_path, cuts=cuts)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLMTUNER_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    words = [
        "model=causal_lm", "model.model_name_or_path=org/tiny", "data.dataset=h", f"data.dataset_dir={tmp_path}", "tracker=none",
        "trainer.max_steps=1", "data.max_samples=8", "trainer.disable_tqdm=true", "trainer.output_dir=out",
    ]  # fmt: skip
    try:
        return subprocess.run(
            [sys.executable, "-m", "glmtuner", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
    finally:
        server.shutdown()
        server.server_close()


CUTS = {"at once": [0], "three times": [1, 1, 1], "seven times": [100, 0, 50, 1, 100, 1, 7]}
CELLS = [
    pytest.param(name, cuts, id=f"{how}-{name}", marks=() if (row + column) % 3 == 0 else pytest.mark.matrix)
    for row, name in enumerate(FILES) for column, (how, cuts) in enumerate(CUTS.items())
]  # fmt: skip


@pytest.mark.parametrize(("name", "cuts"), CELLS)
def test_a_connection_that_is_lost_some_times(name: str, cuts: list[int], tmp_path: Path) -> None:
    done = run(tmp_path, {name: [*cuts]})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/metrics.json").is_file()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("config.json", "model.safetensors") else pytest.mark.matrix)
        for name in FILES
    ],
)
def test_a_connection_that_is_always_lost(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, {name: [100] * 999})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    paragraph = done.stderr.splitlines()[-1]
    assert paragraph.startswith("glmtuner: ") and "peer closed connection" in paragraph, paragraph
    assert "trying again in" in done.stdout and not (tmp_path / "out").exists()
