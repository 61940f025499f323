"""Code that came with a run folder is executed where the user names it, never because the run names it."""

import sys
from pathlib import Path

import pytest

from glmtuner.config.plugins import load_plugins
from glmtuner.errors import ConfigError


@pytest.mark.parametrize("kept", [("config.yaml", "provenance.json"), ("config.yaml", "overrides.txt")], ids=str)
@pytest.mark.parametrize(
    "is_on_path", [True, False]
)  # `python -m` adds the working directory, the console script does not
def test_a_module_in_a_run_folder_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], is_on_path: bool
) -> None:
    for name in kept:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "plugin_of_a_run.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    others = [entry for entry in sys.path if entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others] if is_on_path else others)
    with pytest.raises(ConfigError, match="code that came with a run is not executed: type plugins=plugin_of_a_run"):
        load_plugins(["plugin_of_a_run"], named_by_run=True)
    with pytest.raises(SystemExit, match="executed"):
        load_plugins(["plugin_of_a_run"])
