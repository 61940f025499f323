"""Fixtures of all tests: the reference values beside the checkout, a cache of their own, the command line in a child."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from default_cells import mark_heavy
from stand_ins import texts_in, write_upstream
from warm_server import WarmServer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = ROOT / "tests/golden"

# where a published tokenizer's file stands in ../shared, and where it comes from
PUBLISHED = {
    "ice_text.model": ("goldens/tokenizer_v1/ice_text.model", "https://huggingface.co/THUDM/chatglm-6b"),
    "tokenizer.model": ("goldens/chatglm2_realvocab/tokenizer.model", "https://huggingface.co/THUDM/chatglm2-6b"),
}
RECORDS = {name: "https://github.com/hiyouga/LLaMA-Factory, data/" for name in (
    "alpaca_zh_demo", "identity", "dpo_zh_demo", "kto_en_demo",
)} | {name: "https://github.com/hiyouga/ChatGLM-Efficient-Tuning, data/" for name in (
    "self_cognition", "oaast_sft_zh", "oaast_rm_zh",
)}  # fmt: skip

os.environ["HF_HUB_OFFLINE"] = "1"  # the default suite never asks for the network
os.environ["WANDB_MODE"] = "offline"
ENVIRONMENT = dict(os.environ)  # before any test changes it
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a script, which child processes would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference values of the published code on random weights."""
    return GOLDEN


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fresh-clone", action="store_true", help="leave ../shared (published tokenizers, real records) aside"
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = mark_heavy(items)
    if missing and not any(
        "::" in argument for argument in config.args
    ):  # with one cell asked for, the others are not there
        raise pytest.UsageError(f"tests/default_cells.py names cells that no test has: {', '.join(missing)}")
    # files go to the workers in this order (`--no-loadscope-reorder`): the long ones first, and at the end no worker waits for another
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: ("/e2e/" not in item.path.as_posix(), -sizes[item.path], item.path))


def pytest_collection_finish() -> None:
    """Take what is imported out of the way of the garbage collections, of which every training does some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path | None:
    """The folder beside the checkout with the published tokenizers and real records, or None."""
    return SHARED if SHARED.is_dir() and not request.config.getoption("--fresh-clone") else None


@pytest.fixture(scope="session")
def published_file(shared: Path | None) -> Callable[[str], Path]:
    """The path of a published tokenizer's file, by its name; the test is skipped without it."""

    def find(name: str) -> Path:
        place, source = PUBLISHED[name]
        if shared is None or not (shared / place).is_file():
            pytest.skip(f"needs {name} of {source} as ../shared/{place}")
        return shared / place

    return find


@pytest.fixture(scope="session")
def real_records(shared: Path | None) -> Callable[[str], Path]:
    """The path of a set of real records, by its name; the test is skipped without it."""

    def find(name: str) -> Path:
        if shared is None or not (shared / f"data/{name}.json").is_file():
            pytest.skip(f"needs {name}.json of {RECORDS[name]} in ../shared/data")
        return shared / f"data/{name}.json"

    return find


@pytest.fixture(scope="session")
def upstream_files(shared: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the hub has them: the published ones, and stand-ins by the same names for those that are not there."""
    if shared is not None and (shared / "goldens/chatglm2_realvocab/model.safetensors").is_file():
        return shared / "goldens"
    folder = tmp_path_factory.mktemp("upstream")
    write_upstream(folder / "goldens", GOLDEN)
    for place, _ in PUBLISHED.values():
        if shared is not None and (shared / place).is_file():
            shutil.copyfile(shared / place, folder / place)
    return folder / "goldens"


@pytest.fixture(scope="session")
def record_texts(shared: Path | None) -> list[str]:
    """Every text of the real records, or of the sample data that ships."""
    folder = ROOT / "glmtuner/assets/data" if shared is None or not (shared / "data").is_dir() else shared / "data"
    paths = sorted(path for path in folder.glob("*.json") if path.name != "dataset_info.json")
    return [text for path in paths for text in texts_in(json.loads(path.read_text(encoding="utf-8")))]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized data for this session alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["GLMTUNER_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def plugins_stay_here() -> Iterator[None]:
    """What a module's plugins register is forgotten after it: tests of other modules in this process list all presets."""
    yield
    groups, plugins = (sys.modules.get(f"glmtuner.config.{name}") for name in ("groups", "plugins"))
    if groups is None or plugins is None:
        return
    for classes in groups.SCHEMA_CLASSES.values():
        for name in [name for name, cls in classes.items() if not cls.__module__.startswith("glmtuner.")]:
            del classes[name]
    for name in plugins._loaded:
        sys.modules.pop(name, None)
    plugins._loaded.clear()


@pytest.fixture(scope="session")
def warm_server(cache: Path) -> Iterator[WarmServer]:
    """Runs command lines in processes of their own, each a fork of one that has imported torch, and kills them where told to."""
    server = WarmServer({**ENVIRONMENT, "GLMTUNER_CACHE": str(cache), "COLUMNS": "160"})
    yield server
    server.close()


@pytest.fixture
def glmtuner_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m glmtuner <words>` in a child process, in a folder of its own; in `env` None removes a variable."""

    def run(
        *words: str, env: dict[str, str | None] | None = None, timeout: float = 1500
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "glmtuner", *words],
            cwd=tmp_path,
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def glmtuner_fork(warm_server: WarmServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a fork of a process that has imported torch: where the command must leave nothing behind in this one, and no
    variable of `env` is read by an import."""

    def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        ended = warm_server.run(*words, cwd=tmp_path, env=env, apart=True)
        code = -signal.SIGKILL if ended.code is None else ended.code
        return subprocess.CompletedProcess([*words], code, ended.output, ended.errors)

    return run


@pytest.fixture
def glmtuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same command line in this process, which saves the seconds that importing torch takes."""
    from glmtuner.cli.main import main

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main(list(words))
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
            except Exception:
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(list(words), code, out.getvalue(), err.getvalue())

    return run
