"""The example of docs/benchmarks.md: its files and its command give the output that the page shows."""

import re
from collections.abc import Callable
from pathlib import Path

from documented import ROOT, commands

PAGE = ROOT / "docs/benchmarks.md"


def test_the_pages_example_prints_what_the_page_shows(glmtuner: Callable, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"`(my_exams/[\w./]+)`(?:(?!```).)*?^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == [
        "my_exams/capitals.yaml", "my_exams/capitals/test.csv", "my_exams/capitals/dev.csv",
    ]  # fmt: skip
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (command,) = [it for it in map(str, commands(PAGE)) if "benchmark=capitals" in it]
    done = glmtuner(*command.removeprefix("python -m glmtuner ").split())
    assert done.returncode == 0, done.stdout + done.stderr
    printed, table = re.findall(r"^```text\n((?:benchmark 1/1|\| benchmark ).*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert printed in done.stdout
    assert table in (tmp_path / "outputs/capitals/report.md").read_text(encoding="utf-8")
