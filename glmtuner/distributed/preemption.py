"""A run that is told to go (SIGTERM, or SIGUSR2 of SLURM's --signal) saves a checkpoint first, and is continued later."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Preempted(BaseException):
    """The run was told to go and left a checkpoint. No Exception: a sweep must not take it for a failed job and go on."""

    def __init__(self, signum: int, step: int, before: Callable[[int, FrameType | None], Any] | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.before = signum, before

    @classmethod
    def by(cls, signum: int, step: int) -> "Preempted":
        """With whoever handles the signal now as the one to hand it on to."""
        before = signal.getsignal(signum)
        return cls(signum, step, before if callable(before) else None)

    def hand_on(self) -> None:
        """Call who handled the signal before: submitit puts its job back into SLURM's queue, and exits."""
        if self.before is not None:
            self.before(self.signum, None)

    @property
    def exit_code(self) -> int:
        """The shell's: 128 and the signal."""
        return 128 + self.signum


@dataclass
class SignalCapture:
    """Which signal came, if any, and who handled it before."""

    signum: int | None = None
    before: dict[int, Any] = field(default_factory=dict)

    def note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum

    def preempted(self, step: int) -> Preempted:
        assert self.signum is not None
        before = self.before.get(self.signum)
        return Preempted(self.signum, step, before if callable(before) else None)


@contextmanager
def capture_signals() -> Iterator[SignalCapture]:
    """While this lasts the signals are only noted; outside the main thread, where Python has no say, nothing changes."""
    asked = SignalCapture()
    try:
        for signum in SIGNALS:
            asked.before[signum] = signal.signal(signum, asked.note)
    except ValueError:
        pass
    try:
        yield asked
    finally:
        for signum, before in asked.before.items():
            signal.signal(signum, before if before is not None else signal.SIG_DFL)
