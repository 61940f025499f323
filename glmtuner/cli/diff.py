"""`diff A B …`: what differs between runs, or between sweeps. 0: nothing; 1: something; 2: an error, as of `diff`."""

import argparse
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "what differs between runs, or between sweeps"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="two or more runs, or two or more sweeps"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the comparison as Markdown, too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a self-contained page, too")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.compare.diff import diff_runs
    from glmtuner.compare.document import show, write
    from glmtuner.compare.loaded import kind_of
    from glmtuner.compare.sweeps import diff_sweeps

    folders = arguments.folders
    if overrides:
        raise ConfigError(f"{overrides[0]}: diff takes folders and no overrides; type python -m glmtuner diff A B")
    if len(folders) < 2:
        raise ConfigError(
            f"diff compares two or more folders, and {len(folders)} was named; type python -m glmtuner diff A B"
        )
    kinds = [kind_of(folder, "diff") for folder in folders]
    if len({*kinds}) > 1:
        named = ", ".join(f"{folder} is a {kind}" for folder, kind in zip(folders, kinds, strict=True))
        sweep = folders[kinds.index("sweep")]
        raise ConfigError(
            f"diff compares runs with runs and sweeps with sweeps, and {named}; the jobs of a sweep are runs: type "
            f"{sweep}/<job> for one of {', '.join(sorted(path.name for path in sweep.iterdir() if path.is_dir())[:4])}"
        )
    for option in ("markdown", "html"):
        if (file := getattr(arguments, option)) is not None and file.is_dir():
            raise ConfigError(f"--{option} {file}: it is a folder; name a file")
    document = (diff_runs if kinds[0] == "run" else diff_sweeps)(folders)
    show(document)
    write(document, arguments.markdown, arguments.html)
    return int(document.differs)
