"""What a run's libraries are imported with is switched off for their import only."""

import os
import subprocess
import sys

import pytest

from glmtuner.assemble import load_libraries

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
