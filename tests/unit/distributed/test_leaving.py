"""A rank's process ends with its own exit code, whatever a finalized interpreter would do to threads of C++."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, ctypes, sys
from glmtuner.distributed.ranks import Leaving

ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)  # called while the interpreter is finalized, as gloo's threads drop tensors
with Leaving():
    atexit.register(print, "handlers run")
    sys.stdout.write("written; ")
    {ending}
"""
ENDINGS = {
    "sys.exit(0)": 0, "sys.exit(3)": 3, "sys.exit()": 0, "sys.exit('a message')": 1, "raise ValueError": 1, "pass": 0,
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="SIGABRT")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_rank_ends_with_its_own_exit_code(ending: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(ending=ending)]
    ended = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "WORLD_SIZE": "2"}, check=False)
    assert ended.returncode == ENDINGS[ending], ended.stderr
    assert ended.stdout.split("; ") == ["written", "handlers run\n"]
    assert ("Traceback" in ended.stderr) == ("ValueError" in ending)


def test_without_ranks_the_interpreter_is_finalized() -> None:
    program = [sys.executable, "-c", PROGRAM.format(ending="sys.exit(0)")]
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    assert subprocess.run(program, capture_output=True, env=env, check=False).returncode == -6
