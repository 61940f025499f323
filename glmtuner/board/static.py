"""`board --static OUT`: the page and what it shows as files, for machines without open ports."""

from pathlib import Path


def write(folder: Path, out: Path) -> None:
    """Write the page into `out`, where a browser opens index.html without any server."""
    raise NotImplementedError


def write_while_running(folder: Path, out: Path, seconds: float) -> None:
    """Write the page every so many seconds, until no job in the folder runs or waits."""
    raise NotImplementedError
