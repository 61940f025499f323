"""`prefetch` fills a folder from a hub on localhost, and runs read it without a network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import modelscope_server
import pytest
from hub_server import serve

from glmtuner.config.paths import ASSETS, PACKAGE_DATA

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "model=causal_lm",
    "model.model_name_or_path=org/tiny",
    "data.dataset=mine,linked",
    "tracker=none",
    "metric=none",
]
RUN = [*WORDS, "trainer.max_steps=2", "trainer.output_dir=run", "trainer.disable_tqdm=true"]
# Python runs this before anything else: every connection but to this machine's own sockets is an error that cannot be missed.
NO_NETWORK = """\
import socket, sys
def refuse(self, address, *more):
    sys.stderr.write(f"A SOCKET WAS ASKED FOR {address}\\n"); sys.stderr.flush()
    raise SystemExit(99)
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *address, **more: refuse(None, address)
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of the hub: a model, a dataset with two subsets, and one whose files are named."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(ASSETS / "tiny_glm", root / "models/org/tiny")
    (root / "models/org/tiny/pytorch_model.bin").write_bytes(b"a second copy")
    (root / "models/org/tiny/README.md").write_text("# tiny", encoding="utf-8")
    data = root / "datasets/org/set"
    for subset, records in (("zh", "belle_sample"), ("en", "alpaca_zh_sample")):
        (data / subset).mkdir(parents=True)
        shutil.copy(PACKAGE_DATA / f"{records}.json", data / subset / "train.json")
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: zh\n  data_files: zh/*.json\n- config_name: en\n  data_files: en/*.json\n---\n",
        encoding="utf-8",
    )
    return root


@pytest.fixture(scope="module")
def hub(remote: Path) -> Iterator[dict[str, str | None]]:
    server = serve(remote)
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    server.shutdown()


def entries(folder: Path, hub: dict[str, str | None]) -> None:
    """Entries of one subset of a hub dataset, and of a file of the hub by its URL."""
    url = f"{hub['HF_ENDPOINT']}/datasets/org/set/resolve/main/en/train.json"
    keys = {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}
    digest = hashlib.sha256((PACKAGE_DATA / "alpaca_zh_sample.json").read_bytes()).hexdigest()
    info = {"mine": {"hf_hub_url": "org/set", "subset": "zh", **keys}, "linked": {"url": url, "sha256": digest, **keys}}
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, hub: dict[str, str | None]) -> tuple[Path, str]:
    """A folder that prefetch has filled, beside the entries, and what it said. It is copied before it is changed."""
    folder = tmp_path_factory.mktemp("filled")
    entries(folder, hub)
    done = command(folder, "prefetch", "--folder", "F", *WORDS, env=hub)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def command(
    folder: Path, *words: str, env: dict[str, str | None], before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    home = {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    merged = {**os.environ, **home, **env}
    return subprocess.run(
        [*before, sys.executable, "-m", "glmtuner", *words], cwd=folder, capture_output=True, text=True, timeout=600,
        env={name: value for name, value in merged.items() if value is not None},
    )  # fmt: skip


def copied(filled: tuple[Path, str], folder: Path) -> Path:
    shutil.copytree(filled[0], folder / "copy", symlinks=True)
    return folder / "copy"


def blocked(folder: Path) -> dict[str, str | None]:
    """The environment of a process in which a connection is an error."""
    (folder / "blocked").mkdir(exist_ok=True)
    (folder / "blocked/sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    return {
        "PYTHONPATH": f"{folder / 'blocked'}{os.pathsep}{ROOT}",
        "GLMTUNER_OFFLINE": "F",
        "HF_HUB_OFFLINE": None,
        "WANDB_MODE": None,
    }


def test_the_folder_holds_what_the_run_needs_and_says_so(filled: tuple[Path, str]) -> None:
    folder, said = filled
    files = json.loads((folder / "F/manifest.json").read_text())["files"]
    names = {
        path.rpartition("/")[2]: entry
        for path, entry in files.items()
        if path.startswith("hub/") and "/snapshots/" in path
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names.keys()
    assert not {"pytorch_model.bin"} & names.keys(), "the weights in one format"
    sources = {path for path in files if path.startswith("hub/datasets--org--set/snapshots/")}
    assert {path.partition("/snapshots/")[2].partition("/")[2] for path in sources} == {"README.md", "zh/train.json"}
    assert names["config.json"]["revision"] == "1" * 40 and names["config.json"]["source"].endswith("/org/tiny")
    digest = hashlib.sha256((ASSETS / "tiny_glm/model.safetensors").read_bytes()).hexdigest()
    assert names["model.safetensors"]["sha256"] == digest
    assert sum(path.startswith("tokenized/") and path.endswith("rows-00000.arrow") for path in files) == 2
    assert said.splitlines()[-1].startswith("without a network: GLMTUNER_OFFLINE=")


def test_a_run_reads_the_folder_and_asks_no_socket(filled: tuple[Path, str], tmp_path: Path) -> None:
    here = copied(filled, tmp_path)
    made = sorted((here / "F/tokenized").iterdir())
    done = command(here, *RUN, env=blocked(here))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A SOCKET" not in done.stderr
    counts = json.loads((here / "run/provenance.json").read_text())["data"]
    assert {name: entry["records"] for name, entry in counts.items()} == {"mine": 124, "linked": 123}
    assert sorted((here / "F/tokenized").iterdir()) == made, "the rows are those that prefetch made"

    proof = command(here, *WORDS, "trainer.output_dir=other", "model.model_revision=other", env=blocked(here))
    assert proof.returncode == 2 and "Traceback" not in proof.stderr
    assert f"type python -m glmtuner prefetch --folder {here / 'F'}" in proof.stderr and "A SOCKET" not in proof.stderr


def test_without_the_folder_the_same_run_asks_for_the_network(
    filled: tuple[Path, str], tmp_path: Path, hub: dict
) -> None:
    """So that the test above could fail."""
    here = copied(filled, tmp_path)
    env = {**blocked(here), "GLMTUNER_OFFLINE": None, "HF_ENDPOINT": hub["HF_ENDPOINT"], "HF_HUB_DISABLE_XET": "1"}
    done = command(here, *RUN, env=env)
    assert done.returncode != 0 and "A SOCKET WAS ASKED FOR" in done.stderr


@pytest.mark.heavy
def test_a_run_in_a_network_namespace_that_is_cut_off(filled: tuple[Path, str], tmp_path: Path) -> None:
    probe = ["unshare", "-n", sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9), 1)"]
    if not shutil.which("unshare") or "unreachable" not in subprocess.run(probe, capture_output=True, text=True).stderr:
        pytest.skip("needs `unshare -n`, the right to make a network namespace")
    here = copied(filled, tmp_path)
    env: dict[str, str | None] = {"GLMTUNER_OFFLINE": "F", "HF_HUB_OFFLINE": None}
    done = command(
        here,
        *RUN,
        "tracker=wandb",
        "metric=rouge_bleu_zh",
        "trainer.do_eval=true",
        "data.dev_ratio=0.1",
        env=env,
        before=("unshare", "-n"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = command(
        here, "-m", *WORDS, "trainer.max_steps=1", "trainer.seed=1,2", "name=two", env=env, before=("unshare", "-n")
    )
    assert sweep.returncode == 0 and "(4 finished" in sweep.stdout, sweep.stdout + sweep.stderr


@pytest.mark.heavy
def test_a_folder_that_cannot_be_written_is_read_all_the_same(filled: tuple[Path, str], tmp_path: Path) -> None:
    here = copied(filled, tmp_path)
    mount = 'mount --bind F F && mount -o remount,ro,bind F && exec "$@"'
    before = ("unshare", "-m", "-n", "sh", "-c", mount, "sh")
    probe = subprocess.run([*before, "true"], cwd=here, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"needs the right to mount a folder read-only ({probe.stderr.strip()})")
    env = {"GLMTUNER_OFFLINE": "F", "HF_HUB_OFFLINE": None, "GLMTUNER_CACHE": str(here / "own")}
    done = command(here, *RUN, env=env, before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (here / "own/datasets").is_dir() and not (here / "own/tokenized").exists(), (
        "the rows are those of the folder"
    )


def test_a_damaged_file_is_named_and_fetched_again(filled: tuple[Path, str], tmp_path: Path, hub: dict) -> None:
    here = copied(filled, tmp_path)
    assert "all of them are what was downloaded" in command(here, "prefetch", "--verify", "F", env={}).stdout
    (weights,) = (here / "F/hub/models--org--tiny/snapshots").rglob("model.safetensors")
    blob = weights.resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (rows, *_) = (here / "F/tokenized").rglob("rows-00000.arrow")
    rows.write_bytes(b"short")
    bad = command(here, "prefetch", "--verify", "F", env={})
    assert bad.returncode == 2 and "2 of " in bad.stderr and "model.safetensors: sha256" in bad.stderr
    assert "rows-00000.arrow: 5 bytes instead of" in bad.stderr and "Traceback" not in bad.stderr
    again = command(here, "prefetch", "--folder", "F", *WORDS, env=hub)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "model.safetensors is damaged (sha256" in again.stdout and "1 of them to download" in again.stdout
    assert weights.resolve().read_bytes() == content
    assert command(here, "prefetch", "--verify", "F", env={}).returncode == 0


def test_a_file_that_is_another_one_under_the_same_commit_is_refused(
    filled: tuple[Path, str], tmp_path: Path, hub: dict
) -> None:
    here = copied(filled, tmp_path)
    path = here / "F/manifest.json"
    manifest = json.loads(path.read_text())
    name = next(each for each in manifest["files"] if each.endswith("/config.json") and "/snapshots/" in each)
    manifest["files"][name]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    done = command(here, "prefetch", "--folder", "F", *WORDS, env=hub)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"and the same commit had before {'0' * 64}; it is removed: type the same command again" in done.stderr


@pytest.mark.heavy
@pytest.mark.matrix
def test_an_interrupted_download_is_completed(remote: Path, tmp_path: Path) -> None:
    cuts = {"model.safetensors": [1_000_000] * 40}
    server = serve(remote, cuts=cuts)
    env: dict[str, str | None] = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    words = ["model=causal_lm", "model.model_name_or_path=org/tiny", "data.dataset=belle_sample", "tracker=none"]
    first = command(tmp_path, "prefetch", "--folder", "F", *words, env=env)
    assert first.returncode == 2 and "Traceback" not in first.stderr, first.stdout + first.stderr
    cuts.clear()
    second = command(tmp_path, "prefetch", "--folder", "F", *words, env=env)
    server.shutdown()
    assert second.returncode == 0, second.stdout + second.stderr
    assert command(tmp_path, "prefetch", "--verify", "F", env={}).returncode == 0


@pytest.mark.heavy
def test_a_sweep_is_prefetched_as_a_whole_also_from_modelscope(remote: Path, tmp_path: Path) -> None:
    with modelscope_server.serving(remote) as server:
        entry = {"ms_hub_url": "org/set", "subset": "zh", "columns": {"prompt": "instruction", "response": "output"}}
        (tmp_path / "data").mkdir()
        (tmp_path / "data/dataset_info.json").write_text(json.dumps({"ms": entry}), encoding="utf-8")
        words = [
            "model=causal_lm", "model.model_name_or_path=org/tiny", "model.use_modelscope=true", "data.use_modelscope=true",
            "data.dataset=ms,belle_sample", "tracker=none", "metric=none", "trainer.max_steps=1", "name=two",
        ]  # fmt: skip
        env: dict[str, str | None] = {"MODELSCOPE_DOMAIN": server.address, "HF_HUB_OFFLINE": None}
        done = command(tmp_path, "prefetch", "-m", "--folder", "F", *words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        asked = len(server.asked)
        files = json.loads((tmp_path / "F/manifest.json").read_text())["files"]
        assert "modelscope/models/org/tiny/master/model.safetensors" in files
        assert (
            files["modelscope/datasets/org/set/master/zh/train.json"]["source"] == f"{server.address}/datasets/org/set"
        )
        sweep = command(tmp_path, "-m", *words, env={**blocked(tmp_path), "MODELSCOPE_DOMAIN": server.address})
        assert sweep.returncode == 0 and "(2 finished" in sweep.stdout, sweep.stdout + sweep.stderr
        assert len(server.asked) == asked


def test_what_is_typed_wrongly_is_one_paragraph(
    tmp_path: Path, glmtuner: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/manifest.json").write_text('{"files": {"a": {"size": 1}}}')
    for words, message in (
        (["prefetch", "--verify", "nowhere"], "nowhere/manifest.json cannot be read (it is missing)"),
        (["prefetch", "--verify", "damaged"], "damaged/manifest.json is damaged (it does not list files)"),
        (["prefetch", "--verify", "damaged", "model=tiny_glm"], "--verify: it takes one folder and nothing else"),
        (["prefetch", "--folder", "file", "model=tiny_glm"], "it is a file; type the name of a folder"),
        (["prefetch", "--foldr", "x"], "--foldr"),
        (["prefetch", "--rows", "--folder", "empty", "model=tiny_glm"], "--rows: it reads what GLMTUNER_OFFLINE names"),
    ):
        done = glmtuner(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)


def test_offline_with_a_folder_that_is_none_or_with_the_network(
    tmp_path: Path, glmtuner_process: Callable, filled: tuple[Path, str]
) -> None:
    for folder, message in (("nowhere", "no such folder"), (".", "it has no manifest.json")):
        done = glmtuner_process("--version", env={"GLMTUNER_OFFLINE": folder})
        assert (
            done.returncode == 2
            and f"GLMTUNER_OFFLINE={folder}: {message}; type python -m glmtuner prefetch" in done.stderr
        )
    env = {"GLMTUNER_OFFLINE": str(filled[0] / "F")}
    done = glmtuner_process("--check", "model=tiny_glm", "model.cache_dir=x", "trainer.push_to_hub=true", env=env)
    assert done.returncode == 2 and "model.cache_dir=x with GLMTUNER_OFFLINE=" in done.stderr
    assert "trainer.push_to_hub=true with GLMTUNER_OFFLINE=" in done.stderr
    done = glmtuner_process("prefetch", "model=tiny_glm", "data.dataset=belle_sample", env=env)
    assert done.returncode == 2 and "prefetch with GLMTUNER_OFFLINE=" in done.stderr
