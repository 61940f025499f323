"""What a run's libraries are imported with is switched off for their import only; kernels that are asked for are there."""

import importlib.util
import os
import subprocess
import sys

import pytest

from glmtuner.__main__ import _register
from glmtuner.assemble import check_liger, load_libraries
from glmtuner.config.compose import compose
from glmtuner.errors import ConfigError

LIGER = """\
def kernels(model): ...
MODEL_TYPE_TO_APPLY_LIGER_FN = {"glm4": kernels, "llama": kernels}
"""


@pytest.fixture
def liger(tmp_path, monkeypatch):
    """A liger-kernel that knows two kinds of models; the real one needs Triton to be imported."""
    package = tmp_path / "liger_kernel/transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "monkey_patch.py").write_text(LIGER, encoding="utf-8")
    about = tmp_path / "liger_kernel-0.8.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 0.8.5\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def run_with(*words):
    _register()
    return compose(["model=tiny_glm", *words]).run


def test_liger_kernels_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed here; type pip install liger-kernel, or leave it out"):
        check_liger(run_with("trainer.use_liger_kernel=true"), {"model_type": "glm4"})
    check_liger(run_with(), {"model_type": "glm4"})


def test_liger_kernels_that_are_not_there_for_a_model(liger):
    check_liger(run_with("trainer.use_liger_kernel=true"), {"model_type": "glm4"})
    with pytest.raises(ConfigError) as refused:
        check_liger(run_with("trainer.use_liger_kernel=true"), {"model_type": "chatglm"})
    assert str(refused.value) == (
        "trainer.use_liger_kernel=true with model_type=chatglm: liger-kernel 0.8.5 has no kernels for it; leave it out "
        "(it has them for glm4, llama)"
    )


FRESH = """\
import gc
from glmtuner.assemble import load_libraries
load_libraries(compiles=False, trains=False)
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
import bitsandbytes, sys, torch
assert "torch._inductor.compile_fx" not in sys.modules
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2]
print("graphs", len(graphs))
"""


def test_a_model_is_compiled_and_garbage_collected_after_the_libraries_were_loaded():
    pytest.importorskip("bitsandbytes")
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["graphs", "1"], done.stderr


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("typed", [None, "0", "1"])
def test_what_the_user_said_of_compiling_stays(monkeypatch, typed, quantized):
    if typed is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    else:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", typed)
    load_libraries(compiles=quantized, trains=False)
    assert os.environ.get("TORCHDYNAMO_DISABLE") == typed
