"""Reads back the file that W&B writes of a run: LevelDB's log format, each entry one Record of W&B's protocol."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def entries(data: bytes) -> Iterator[bytes]:
    """The entries, put together from their pieces; W&B's own seven bytes stand before the first one."""
    assert data[:4] == b":W&B"
    place, pieces = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield pieces
            pieces = b""


@dataclass
class Written:
    """What a .wandb file holds."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False


def read(path: Path) -> Written:
    from wandb.proto.wandb_internal_pb2 import Record

    found = Written()
    for entry in entries(path.read_bytes()):
        record = Record.FromString(entry)
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _values(record.run.config.update)
            case "config":
                found.config |= _values(record.config.update)
            case "history":
                found.history.append(_values(record.history.item))
            case "summary":
                found.summary |= _values(record.summary.update)
            case "artifact":
                found.artifacts.append(record.artifact)
            case "exit":
                found.exit_code = record.exit.exit_code
            case "preempting":
                found.preempting = True
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def sessions(run: Path) -> list[Written]:
    """Every session of a run folder that was written offline, oldest first."""
    return [read(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
