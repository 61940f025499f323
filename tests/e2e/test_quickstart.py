"""`experiment=quickstart`: offline, the shipped model learns a new identity and shows it."""

import json
from collections.abc import Callable
from pathlib import Path


def test_quickstart_teaches_a_new_identity(glmtuner_process: Callable, tmp_path: Path) -> None:
    done = glmtuner_process("experiment=quickstart", env={"HF_ENDPOINT": "http://127.0.0.1:9"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*_quickstart")
    before = json.loads((folder / "history.jsonl").read_text().splitlines()[0])
    after = json.loads((folder / "metrics.json").read_text())
    assert before["step"] == 0
    assert before["eval_rouge-l"] < 40
    assert after["predict_rouge-l"] > 90
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "| question | before | after | label |" in report
    for header in ("question", "before", "after", "label"):
        assert header in done.stdout
