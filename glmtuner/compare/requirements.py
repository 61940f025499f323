"""The packages of a run as a requirements file for pip."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmtuner.console import say
from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import write_text
from glmtuner.run_folder.provenance import PACKAGES

TORCH_INDEX = "https://download.pytorch.org/whl"  # has the builds of torch for one accelerator, such as 2.9.0+cu130


def write_requirements(path: Path, provenance: Mapping[str, Any]) -> None:
    """Write RUN_requirements.txt beside the run, and say how to use it. Raises CheckpointError where the versions are not known."""
    run = path.resolve()
    file = run.with_name(f"{run.name}_requirements.txt")
    text = requirements(path, provenance, file)
    write_text(file, text)
    say(
        f"{file}: {sum('==' in line for line in text.splitlines())} packages, of the run started {provenance.get('started', '')}; install them with"
    )
    for line in text.splitlines()[1:3]:
        say(line.removeprefix("# "))


def requirements(path: Path, provenance: Mapping[str, Any], file: Path) -> str:
    """The content of a requirements file with the versions that the run in `path` had; raises CheckpointError where it has none."""
    packages = {name: version for name, version in provenance.get("packages", {}).items() if version}
    if not packages:
        raise CheckpointError(
            f"reproduce {path} --same-env: its provenance.json has no packages, so their versions are not known; leave --same-env out"
        )
    folder = shlex.quote(str(file.with_suffix("")))
    lines = [
        f"# The packages of the run {path.name}, started {provenance.get('started', 'at an unknown time')} with Python "
        f"{provenance.get('python', 'of an unknown version')}.",
        f"#   python{'.'.join(str(provenance.get('python', '3')).split('.')[:2])} -m venv {folder}",
        f"#   {folder}/bin/pip install -r {shlex.quote(str(file))}",
    ]
    git = provenance.get("git") or {}
    commit = (
        f", of the commit {git['commit']}{' with changes' if git.get('dirty') else ''} if it ran in its own checkout"
        if git.get("commit")
        else ""
    )
    lines.append(
        f"# glmtuner {packages.get('glmtuner', 'of an unknown version')} itself is not listed: install its checkout{commit}."
    )
    if packages.keys() <= {*PACKAGES}:
        lines.append("# An earlier version of glmtuner recorded these packages only.")
    indexes = dict.fromkeys(
        f"--extra-index-url {TORCH_INDEX}/{version.partition('+')[2]}"
        for name, version in packages.items()
        if name == "torch" and "+" in version
    )
    listed = sorted((name, version) for name, version in packages.items() if name != "glmtuner")
    return "\n".join([*lines, *indexes, *(f"{name}=={version}" for name, version in listed)]) + "\n"
