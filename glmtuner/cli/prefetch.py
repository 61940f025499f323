"""`prefetch` and the arguments of a run or a sweep: everything that it needs from the network, in one folder, with hashes."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glmtuner.errors import ConfigError

if TYPE_CHECKING:
    from glmtuner.config.compose import Composed

HELP = "what a run needs from the network, for machines without"
TAKES = "group.key=value"  # in the help
USAGE = "python -m glmtuner prefetch --folder FOLDER model=… data.dataset=…"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where to put it; the cache of glmtuner by default")
    parser.add_argument("--multirun", "-m", action="store_true", help="the arguments are those of a sweep")
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="compare a folder's files with its manifest, and do nothing else"
    )
    parser.add_argument("--rows", action="store_true", help="only encode the rows, from what the folder has")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="config")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.config.offline import VARIABLE, offline_folder, place_caches
    from glmtuner.config.paths import cache_root
    from glmtuner.console import complain, say

    if arguments.verify is not None:
        if overrides or arguments.folder is not None:
            raise ConfigError(
                "--verify: it takes one folder and nothing else; type python -m glmtuner prefetch --verify FOLDER"
            )
        from glmtuner.launch.manifest import verify

        verify(arguments.verify)
        return 0
    folder = (arguments.folder or offline_folder() or cache_root()).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: it is a file; type the name of a folder, as in {USAGE}")
    if arguments.rows:
        from glmtuner.launch.prefetch import encode_all

        if offline_folder() != folder:
            raise ConfigError(f"--rows: it reads what {VARIABLE} names; type {VARIABLE}={folder} before the command")
        encode_all(jobs(arguments, overrides), folder)
        return 0
    if offline_folder() is not None:
        raise ConfigError(
            f"prefetch with {VARIABLE}={offline_folder()}: it downloads, which that forbids; unset {VARIABLE}"
        )
    place_caches(folder)
    from glmtuner.launch.prefetch import download_all, total_size
    from glmtuner.run_folder.redaction import redact_overrides

    files = download_all(jobs(arguments, overrides), folder)
    if done := encode_offline(arguments, overrides, folder):
        complain(f"glmtuner: what was downloaded is in {folder}, but its rows could not be encoded")
        return done
    say(f"{folder}: {len(files)} files, {total_size(files.values()) / 2**20:,.1f} MiB, and the rows made of them")
    words = shlex.join([*(["-m"] if arguments.multirun else []), *redact_overrides(overrides)])
    say(f"without a network: {VARIABLE}={shlex.quote(str(folder))} python -m glmtuner {words}")
    return 0


def jobs(arguments: argparse.Namespace, overrides: list[str]) -> "Iterator[Composed]":
    """The jobs that the arguments describe, each composed and validated."""
    from glmtuner.config.compose import compose, every_job

    source = {"config_dir": arguments.config_dir, "config_name": arguments.config_name}
    if arguments.multirun:
        from glmtuner.sweep.launchers import register

        register()
        yield from every_job(overrides, **source)
    else:
        yield compose(overrides, **source)


def encode_offline(arguments: argparse.Namespace, overrides: list[str], folder: Path) -> int:
    """Encode the rows in a process that has no network, as the runs will have none; returns its exit code."""
    from glmtuner.config.offline import VARIABLE

    options = ["--rows", "--folder", str(folder)] + (["--multirun"] if arguments.multirun else [])
    options += ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    options += ["--config-name", arguments.config_name] if arguments.config_name != "config" else []
    command = [sys.executable, "-m", "glmtuner", "prefetch", *options, *overrides]
    return subprocess.run(command, env={**os.environ, VARIABLE: str(folder)}, check=False).returncode
