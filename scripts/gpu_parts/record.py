"""The findings of a part of the GPU check: a JSON line for each, written at once, so that a killed part loses none."""

import json
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measurement; `met` is whether its goal is met, None where there is no goal or nothing was measured."""

    part: str
    what: str
    value: float | None = None
    unit: str = ""
    beside: float | None = None  # the same measurement of something else
    against: str = ""  # what that is
    goal: str = ""
    met: bool | None = None
    note: str = ""


class Check:
    """Where a part runs, and the record of its findings."""

    def __init__(
        self,
        part: str,
        path: Path,
        folder: Path,
        shared: Path | None,
        device: "torch.device",
        miniature: bool,
        match: str = "",
    ) -> None:
        self.part, self.path, self.folder, self.shared = part, path, folder, shared
        self.device, self.miniature, self.match = device, miniature, match
        self.until = float("inf")  # on time.monotonic()'s clock

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def add(
        self, what: str, value: float | None, unit: str = "", *, at_most: float | None = None, at_least: float | None = None,
        beside: float | None = None, against: str = "", goal: str = "", met: bool | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Record a finding; a bound gives it a goal. NaN meets none."""
        if value is not None and at_most is not None:
            goal, met = f"at most {at_most:g}", bool(value <= at_most)
        if value is not None and at_least is not None:
            goal, met = f"at least {at_least:g}", bool(value >= at_least)
        finding = Finding(
            part=self.part,
            what=what,
            value=value,
            unit=unit,
            beside=beside,
            against=against,
            goal=goal,
            met=met,
            note=note,
        )
        append(self.path, finding)
        print(f"{'FAILED ' if met is False else ''}{finding}", flush=True)

    def count(self, what: str, equal: int, of: int) -> None:
        """Record how many of `of` are equal; the goal is all of them."""
        self.add(what, equal, f"of {of}", goal="all", met=equal == of)

    def begins(self, what: str, seconds: float = 0.0) -> bool:
        """Whether this matches the selection and `seconds` are left for it; if only time is missing, a finding says so."""
        if not re.search(self.match, what):
            return False
        if self.seconds_left >= seconds:
            return True
        self.add(what, None, note="left out: no time was left")
        return False

    @contextmanager
    def item(self, what: str) -> Iterator[None]:
        """Turn an error in the block into a finding, so that the next measurements still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            message = " ".join(f"{type(error).__name__}: {error}".split())
            self.add(what, None, goal="no error", met=False, note=message[:300])


def append(path: Path, finding: Finding) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")
        file.flush()


def read(path: Path) -> list[Finding]:
    """The findings of a file; an incomplete last line, left by a killed part, is skipped."""
    findings = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        findings.append(Finding(**values))
    return findings
