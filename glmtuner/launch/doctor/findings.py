"""What `doctor` finds: a state for each subject, and what to type about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OK, MISSING, PROBLEM = "ok", "missing", "problem"
PROBE_SECONDS, PROGRAM_SECONDS, NETWORK_SECONDS = (
    120.0,
    10.0,
    3.0,
)  # that libraries, programs and servers have to answer


@dataclass(frozen=True)
class Finding:
    """What was found of a subject, its state, what to type about it, and the numbers by name; `needed`: no run works before it is ok."""

    subject: str
    state: str
    text: str
    fix: str = ""
    needed: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stops_runs(self) -> bool:
        return self.needed and self.state != OK
