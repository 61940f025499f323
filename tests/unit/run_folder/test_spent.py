"""The hours of a sweep: a file an attempt, added up, kill-safe."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.spent import Hours, counted, current_attempt, hours_spent

ROOT = Path(__file__).parents[3]


def attempt(root: Path, name: str, of: str, seconds: float) -> None:
    (root / ".spent").mkdir(exist_ok=True)
    (root / ".spent" / f"{name}.json").write_text(json.dumps({"job": name, "of": of, "seconds": seconds}))


def none(gpu: float, cpu: float) -> list[str]:
    return []


def test_attempts_are_added_up_by_kind(tmp_path):
    assert hours_spent(tmp_path) == Hours()
    attempt(tmp_path, "a", "gpu", 3600)
    attempt(tmp_path, "b", "gpu", 1800)
    attempt(tmp_path, "c", "cpu", 360)
    assert hours_spent(tmp_path) == Hours(1.5, 0.1)


@pytest.mark.parametrize(
    "content", ['{"of": "cpu"}', '{"of": "cpu", "seconds": -1}', '{"of": "tpu", "seconds": 1}', "[]", "{"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / ".spent").mkdir()
    (tmp_path / ".spent" / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.json is damaged"):
        hours_spent(tmp_path)


def test_the_time_of_the_processor_is_counted_within(tmp_path):
    with counted(tmp_path, "job", on_gpu=False, passed=lambda gpu, cpu: ["over"] if cpu * 3600 >= 0.2 else []) as own:
        assert current_attempt() is own and own.over() == []
        start = time.process_time()
        while time.process_time() - start < 0.3:
            pass
        assert own.over() == ["over"]
    assert current_attempt() is None
    assert 0.28 <= hours_spent(tmp_path).cpu * 3600 < 0.6 + (time.process_time() - start)


def test_the_time_of_the_clock_is_counted_on_a_gpu(tmp_path):
    with counted(tmp_path, "job", on_gpu=True, passed=none):
        time.sleep(0.1)
    assert hours_spent(tmp_path).gpu * 3600 >= 0.1 and hours_spent(tmp_path).cpu == 0


def test_earlier_attempts_count_towards_the_limit(tmp_path):
    attempt(tmp_path, "earlier", "cpu", 7200)
    with counted(tmp_path, "job", on_gpu=False, passed=lambda gpu, cpu: ["over"] if cpu >= 2 else []) as own:
        assert own.over() == ["over"]


def test_a_killed_attempt_leaves_its_last_hours(tmp_path):
    """A process that is killed by SIGKILL while it counts: its file is whole, and no more than a few seconds are lost."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom glmtuner.run_folder import spent\nspent.SECONDS = 0.1\n"
        f"with spent.counted(Path({str(tmp_path)!r}), 'job', on_gpu=True, passed=lambda gpu, cpu: []):\n"
        "    print('counting', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "counting\n"
    start = time.monotonic()
    while hours_spent(tmp_path).gpu * 3600 < 0.3:
        assert time.monotonic() - start < 120
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert 0.3 <= hours_spent(tmp_path).gpu * 3600 <= time.monotonic() - start + 1
    with counted(tmp_path, "job", on_gpu=True, passed=none):
        pass
    assert len(list((tmp_path / ".spent").glob("*.json"))) == 2
