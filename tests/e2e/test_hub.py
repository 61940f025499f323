"""The README's command, exactly as written, against a local hub that serves the model and the datasets."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import serve

from glmtuner.config.paths import ASSETS, PACKAGE_DATA, conf_dir


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str | None]]:
    """The environment in which the hub's client talks to a local server; a native GLM stands in for ChatGLM-6B."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(ASSETS / "tiny_glm", root / "models/THUDM/chatglm-6b")
    for name, records in (("alpaca_zh", "alpaca_zh_sample"), ("belle", "belle_sample")):
        entry = yaml.safe_load((conf_dir() / f"dataset/{name}.yaml").read_text(encoding="utf-8"))
        target = root / "datasets" / entry["hf_hub_url"] / (entry.get("data_files") or "data.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE_DATA / f"{records}.json", target)
    server = serve(root)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield {"HF_ENDPOINT": address, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def test_the_readme_command_runs_as_written(
    glmtuner_process: Callable, tmp_path: Path, hub: dict[str, str | None]
) -> None:
    done = glmtuner_process("finetuning=freeze", "data.dataset=alpaca_zh,belle", env=hub)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    about = json.loads((folder / "provenance.json").read_text())
    assert {name: kept["records"] for name, kept in about["data"].items()} == {"alpaca_zh": 123, "belle": 124}
    assert all(next(iter(kept["sha256"].values())).startswith("commit 1111") for kept in about["data"].values())
    assert (folder / "model/model.safetensors").is_file()


def test_what_the_hub_does_not_have_is_said(
    glmtuner_process: Callable, tmp_path: Path, hub: dict[str, str | None]
) -> None:
    model = glmtuner_process("model=glm4_9b_chat_hf", "data.dataset=belle_sample", "tracker=none", env=hub)
    assert model.returncode == 2
    assert "model.model_name_or_path=zai-org/glm-4-9b-chat-hf: no such folder here and no such model" in model.stderr
    data = glmtuner_process("model=tiny_glm", "data.dataset=firefly", "tracker=none", env=hub)
    assert data.returncode == 2, data.stdout + data.stderr
    assert "YeungNLP/firefly-train-1.1M" in data.stderr
    assert "Traceback" not in data.stderr
    assert list(tmp_path.iterdir()) == []
