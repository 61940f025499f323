"""The rehearsal of the GPU check: every part in miniature, each in a process of its own, through the real script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.heavy
def test_the_rehearsal_passes_and_covers_every_part(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\n<!-- gpu: end -->\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--cpu-rehearsal", "--output", str(tmp_path / "out"), "--page", str(page)],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/gpu_check.json").read_text(encoding="utf-8"))["findings"]
    parts = {name: [it for it in found if it["part"] == name] for name in
             ("right", "kernels", "whole", "ranks", "fast", "small", "estimated", "answers", "sweep")}  # fmt: skip
    for name, count in {
        "right": 11,
        "kernels": 40,
        "whole": 9,
        "ranks": 6,
        "fast": 15,
        "small": 13,
        "estimated": 20,
        "answers": 5,
        "sweep": 2,
    }.items():
        assert len(parts[name]) >= count, name
    assert not [it for it in found if it["met"] is False]
    left_out = [it["what"] for it in found if it["value"] is None]
    # what a CPU cannot do, and what needs the published tokenizers
    allowed = ["Liger", "full fine-tuning in fp16", "transformers' continuous batching"]
    allowed += [] if (ROOT.parent / "shared/goldens").is_dir() else ["twenty steps"]
    assert all(any(part in what for part in allowed) for what in left_out), left_out
    assert page.read_text(encoding="utf-8").count("\n### ") == len(parts)
