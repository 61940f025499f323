"""Settings for the import of the libraries are restored afterwards; Liger's kernels are refused where they cannot be used."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from described_runs import run_with

from glmtuner.errors import ConfigError
from glmtuner.launch.checks import check_liger, check_liger_runs
from glmtuner.launch.libraries import load_libraries


def test_liger_kernels_that_are_not_installed(monkeypatch):
    """What is installed has tests of its own, tests/liger."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"use_liger_kernel=true: .*not installed; type pip install 'liger-kernel>=[0-9.]+', or leave it out",
    ):
        check_liger(run_with("trainer.use_liger_kernel=true"), {"model_type": "glm4"})
    check_liger(run_with(), {"model_type": "glm4"})


def test_liger_kernels_of_old(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.10")
    with pytest.raises(
        ConfigError, match=r"liger-kernel 0\.5\.10 .*; type pip install 'liger-kernel>=[0-9.]+', or leave it out"
    ):
        check_liger(run_with("trainer.use_liger_kernel=true"), {"model_type": "glm4"})


def test_liger_kernels_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = run_with("trainer.use_liger_kernel=true")
    with pytest.raises(ConfigError, match=r"use_liger_kernel=true: .*Triton.* cpu; leave it out"):
        check_liger_runs(asked, torch.device("cpu"))
    check_liger_runs(asked, torch.device("cuda"))
    check_liger_runs(run_with(), torch.device("cpu"))


def test_liger_kernels_are_chosen_as_a_whole():
    assert run_with("trainer.liger_kernel_config={swiglu: false}").trainer.liger_kernel_config == {"swiglu": False}
    with pytest.raises(ConfigError, match=r"trainer\.liger_kernel_config=7"):
        run_with("trainer.liger_kernel_config=7")


FRESH = """\
import gc
from glmtuner.launch.libraries import load_libraries
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
    done = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, text=True, timeout=600)
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
