"""Attempts at jobs of a sweep that were lost with the node they ran on: `.ray/lost.json` in the sweep's folder."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from glmtuner.errors import CheckpointError
from glmtuner.run_folder.files import read_object, write_json

FOLDER, FILE = ".ray", "lost.json"


@dataclass(frozen=True)
class Lost:
    """An attempt that was lost: the node's host, when, why, and the step of the checkpoint that the next one begins with."""

    host: str
    time: str
    why: str
    step: int


def read_lost(root: Path) -> dict[str, list[Lost]]:
    """The lost attempts by the name of the job's folder; raises CheckpointError if the file is damaged."""
    path = root / FOLDER / FILE
    if not os.path.lexists(path):
        return {}
    try:
        return {str(name): [Lost(**each) for each in entries] for name, entries in read_object(path).items()}
    except TypeError:
        raise CheckpointError(
            f"{path} is damaged (it is not a list of lost attempts); remove it: no job depends on it"
        ) from None


def add_lost(root: Path, name: str, lost: Lost) -> None:
    """Record that an attempt at the job was lost."""
    known = read_lost(root)
    known[name] = [*known.get(name, []), lost]
    write_json(root / FOLDER / FILE, {job: [asdict(each) for each in entries] for job, entries in known.items()})


def lost_notes(root: Path) -> list[str]:
    """A sentence for each job of which an attempt was lost, for the sweep's report."""
    try:
        found = read_lost(root)
    except CheckpointError as error:
        return [f"{error}"]
    notes = []
    for name, entries in sorted(found.items()):
        each = "; ".join(f"{lost.host} at {lost.time}, then from step {lost.step}" for lost in entries)
        times = "once" if len(entries) == 1 else f"{len(entries)} times"
        notes.append(f"{name} was started again {times}, after its node on Ray was lost: {each}.")
    return notes
