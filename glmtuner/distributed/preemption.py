"""Preemption: a run that receives SIGTERM, or the SIGUSR2 of SLURM's --signal, saves a checkpoint, stops and can be resumed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

# SIGTERM and SIGUSR2, or those of them that the platform has: Windows has no SIGUSR2.
SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)
)


class Preempted(BaseException):
    """The run was stopped by a signal and has saved a checkpoint.

    It is not an Exception: a sweep must not treat it as a failed job and start the next one.
    """

    def __init__(self, signum: int, step: int, previous_handler: Handler | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.previous_handler = signum, previous_handler

    @classmethod
    def by(cls, signum: int, step: int) -> "Preempted":
        """Preempted by this signal, with its current handler as the previous one."""
        handler = signal.getsignal(signum)
        return cls(signum, step, handler if callable(handler) else None)

    def call_previous_handler(self) -> None:
        """Call the handler that the capture had replaced: submitit's requeues the SLURM job and exits."""
        if self.previous_handler is not None:
            self.previous_handler(self.signum, None)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in a shell."""
        return 128 + self.signum


@dataclass
class SignalCapture:
    """The last captured signal, None if there was none, and the handlers that the capture replaced."""

    signum: int | None = None
    previous_handlers: dict[int, Handler | int | None] = field(default_factory=dict)

    def record(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler that only stores the signal."""
        self.signum = signum

    def preempted(self, step: int) -> Preempted:
        """The exception for the captured signal."""
        assert self.signum is not None
        handler = self.previous_handlers.get(self.signum)
        return Preempted(self.signum, step, handler if callable(handler) else None)


# of the main thread, for a run in a thread of its own
INHERITED: ContextVar[SignalCapture | None] = ContextVar("inherited capture", default=None)


@contextmanager
def capture_signals() -> Iterator[SignalCapture]:
    """Record SIGNALS in the yielded capture instead of handling them, and restore their handlers at the end.

    Outside of the main thread, where Python cannot set handlers, the capture is the INHERITED one; without one, nothing is captured.
    """
    if (inherited := INHERITED.get()) is not None:
        yield inherited
        return
    capture = SignalCapture()
    try:
        for signum in SIGNALS:
            capture.previous_handlers[signum] = signal.signal(signum, capture.record)
    except ValueError:
        pass
    try:
        yield capture
    finally:
        for number, handler in capture.previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
