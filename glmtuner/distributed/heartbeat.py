"""Whether the other ranks of a run are still there: a connection of each to rank 0, beside the collectives.

A rank that waits in a collective cannot tell a rank that has gone from one that evaluates for an hour, and waits for trainer.ddp_timeout.
Here each rank's kernel answers for it, whatever the rank computes: a process that ends closes its connection, and what is sent to a
machine that cannot be reached stays unacknowledged (TCP_USER_TIMEOUT of Linux). A process that is stopped, or holds Python's lock for
long, is silent while its machine answers, which ends nothing and is said.
"""

import atexit
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from glmtuner.console import complain
from glmtuner.errors import RankLost

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
GRACE_SECONDS = (
    2.0  # in which a process whose ranks fail may end, or be ended, by itself; shorter than `should_report` waits
)
CONNECT_SECONDS = 3.0  # to one address
ACCEPT_SECONDS = 20.0  # for all ranks
ENDING_SECONDS = 10.0  # for what is recorded before this process ends
AGAIN = "the same command with the same trainer.output_dir resumes from the latest checkpoint"

Told = Callable[[RankLost], None]


@dataclass(frozen=True)
class Peer:
    """A rank, and where it runs."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 awaits the connections of the others, and what they show it."""

    addresses: list[str]
    port: int
    token: str


@dataclass
class Connection:
    """The connection to one rank."""

    link: socket.socket
    peer: Peer
    heard: float = field(default_factory=time.monotonic)
    is_silent: bool = False
    received: bytes = b""

    def send(self, **message: Any) -> None:
        """Send a message; an error is left to what is received, which knows more of it."""
        with suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; raises EOFError where the other process has ended, OSError where it cannot be reached."""
        try:
            arrived = self.link.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            arrived = b""
        if not arrived:
            raise EOFError
        self.heard = time.monotonic()
        *lines, self.received = (self.received + arrived).split(b"\n")
        return [json.loads(line) for line in lines]


class Heartbeat:
    """The connections of this rank, and the thread that listens to them and ends the process when a rank has gone."""

    def __init__(self, own: Peer, connections: Sequence[Connection], lost_after: float, ends: bool) -> None:
        self.own, self.connections, self.lost_after, self.ends = own, [*connections], lost_after, ends
        self.loss: RankLost | None = None
        self.lost, self.left = threading.Event(), threading.Event()
        self._sending = threading.Lock()
        os.register_at_fork(
            after_in_child=self._close
        )  # else the connection would outlive the rank, in its data workers
        atexit.register(self.leave)  # a job of a sweep ends without a last collective, while rank 0 still writes
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def leave(self, failure: str | None = None) -> None:
        """Tell the other ranks that this one ends, with the reason if it has failed. Nothing is watched afterwards."""
        if self.left.is_set():
            return
        self.left.set()
        said: dict[str, Any] = {"bye": True} if failure is None else {"failed": failure}
        if failure is not None and self.own.rank == 0:
            said = {"gone": f"{self.own} has failed: {failure}"}
        self._send(**said)

    def silent(self) -> Connection | None:
        """A rank whose machine answers and which does not, itself; None if there is none."""
        return next((each for each in self.connections if each.is_silent), None)

    def _close(self) -> None:
        for each in self.connections:
            each.link.close()

    def _send(self, **message: Any) -> None:
        with self._sending:
            for each in self.connections:
                each.send(**message)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self.connections:
                selector.register(each.link, selectors.EVENT_READ, each)
            beat = time.monotonic()
            while self.connections and not self.left.is_set():
                if time.monotonic() >= beat:
                    self._send(beat=True)
                    beat = time.monotonic() + BEAT_SECONDS
                    self._tell_silence()
                for key, _ in selector.select(min(max(beat - time.monotonic(), 0), 1.0)):
                    if not self._hear(key.data):
                        selector.unregister(key.data.link)
                        self.connections.remove(key.data)

    def _hear(self, connection: Connection) -> bool:
        """Read what a rank has sent; returns whether more can come of it."""
        peer = connection.peer
        try:
            messages = connection.receive()
        except EOFError:
            self._lose(f"{peer} has ended without a word: it was killed, as by the kernel for lack of memory; {AGAIN}")
            return False
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            self._lose(
                f"{peer} cannot be reached from {self.own.host}, which has had no answer for {self.lost_after:.0f} s ({reason}): the "
                f"network between them is cut, or the machine is down; {AGAIN}",
                unreachable=True,
            )
            return False
        for message in messages:
            if "failed" in message:
                self._lose(f"{peer} has failed: {message['failed']}")
            elif "gone" in message:
                self._lose(str(message["gone"]), speaks=False, unreachable=bool(message.get("unreachable")))
            if "beat" not in message:
                return False
        return True

    def _tell_silence(self) -> None:
        """Say which ranks have fallen silent, and which are heard of again."""
        for each in self.connections:
            quiet = time.monotonic() - each.heard
            if quiet >= SILENT_SECONDS and not each.is_silent:
                each.is_silent = True
                if self.own.rank < 2:  # rank 0 of the others, and one of them of rank 0
                    complain(
                        f"{each.peer} has been silent for {quiet:.0f} s, and its machine answers: it is stopped, or in one long call; this "
                        "run waits for it as long as trainer.ddp_timeout says"
                    )
            elif quiet < SILENT_SECONDS and each.is_silent:
                each.is_silent = False
                if self.own.rank < 2:
                    complain(f"{each.peer} is heard of again")

    def _lose(self, reason: str, *, speaks: bool = True, unreachable: bool = False) -> None:
        """A rank has gone: tell the others, and end this process, unless it ends by itself or by the process that started it."""
        if self.lost.is_set() or self.left.is_set():
            return
        self.loss = RankLost(reason, unreachable=unreachable)
        self.lost.set()
        if self.own.rank == 0:
            self._send(gone=reason, unreachable=unreachable)
        elif int(os.environ.get("LOCAL_RANK", "0")) != 0:
            speaks = False  # one on each machine is enough
        if not self.ends:
            return
        if self.left.wait(GRACE_SECONDS):
            return
        self._end(self.loss, speaks)

    def _end(self, loss: RankLost, speaks: bool) -> NoReturn:
        if speaks:
            complain(f"glmtuner: {loss}")
        recording = threading.Thread(target=_tell, args=(loss,), daemon=True)
        recording.start()
        recording.join(ENDING_SECONDS)
        if speaks and loss.unreachable:
            end_cut_off_agent()
        end_process()


def end_cut_off_agent() -> None:
    """End torchrun, this process's parent, where it waits for a rendezvous that this machine does not reach, and may restart nothing.

    It waits in a call that neither its own timeouts nor SIGTERM end, and would keep this machine for as long.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        return
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with suppress(OSError):
        socket.create_connection(place, timeout=CONNECT_SECONDS).close()
        return
    with suppress(OSError):  # gone, or not Linux
        agent = os.getppid()
        if any(name in Path(f"/proc/{agent}/cmdline").read_bytes() for name in (b"torch", b"accelerate")):
            complain(f"process {agent}, which started this rank, waits for {place[0]}:{place[1]}, and is killed")
            os.kill(agent, signal.SIGKILL)


def end_process() -> NoReturn:
    """End this process with exit code 1, although its main thread waits for ranks that have gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)


_current: Heartbeat | None = None
_told: list[Told] = []


def _tell(loss: RankLost) -> None:
    for told in reversed(_told):
        try:
            told(loss)
        except Exception as error:
            complain(f"{type(error).__name__}: {error}")


@contextmanager
def told_of_loss(told: Told) -> Iterator[None]:
    """Within it, `told` is called before this process is ended because a rank has gone; what was entered last is called first."""
    _told.append(told)
    try:
        yield
    finally:
        _told.remove(told)


def leave(failure: str | None = None) -> None:
    """Tell the other ranks that this one ends, with the reason if it has failed; nothing in a run of one process."""
    if _current is not None:
        _current.leave(failure)


def cause_of(error: BaseException) -> RankLost | None:
    """The rank that has fallen silent, for an error of a collective; None for another error.

    Does not return where a rank has gone, for which this process ends.
    """
    if _current is None or not is_of_collective(error):
        return None
    if _current.lost.wait(GRACE_SECONDS):
        if _current.ends:
            time.sleep(GRACE_SECONDS + ENDING_SECONDS)
        end_process()  # the process that started this one reports the rank
    if (connection := _current.silent()) is None:
        return None
    quiet = time.monotonic() - connection.heard
    return RankLost(
        f"{connection.peer} has been silent for {quiet:.0f} s, and a collective waits no longer than trainer.ddp_timeout: it is stopped, "
        f"or hangs; {AGAIN}"
    )


def is_of_collective(error: BaseException) -> bool:
    """Whether torch's collectives raised the error: gloo's are plain RuntimeErrors that name it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    )


# -- meeting ------------------------------------------------------------------------------------------------------------------


def start(
    rank: int,
    count: int,
    lost_after: float,
    share: Callable[[Meeting | None], Meeting],
    gather: Callable[[str], list[str]],
    *,
    ends: bool,
) -> Heartbeat | None:
    """Connect the ranks, and return this one's heartbeat; `share` gives all of them what rank 0 calls it with, `gather` the values of all of them.

    Without `ends` this process is not ended when a rank has gone, which the process that started it sees. Where a rank does not reach
    rank 0, nothing is watched, which rank 0 says, and None is returned.
    """
    global _current
    own = Peer(rank, socket.gethostname(), os.getpid())
    listener = listen(count) if rank == 0 else None
    try:
        port = listener.getsockname()[1] if listener is not None else 0
        meeting = share(Meeting(own_addresses(), port, secrets.token_hex(16)) if rank == 0 else None)
        connections = (
            accept(listener, own, count - 1, meeting.token) if listener is not None else [*connect(own, meeting)]
        )
    finally:
        if listener is not None:
            listener.close()
    problem = "" if rank == 0 or connections else f"{own} does not reach port {meeting.port} of rank 0"
    problems = [each for each in gather(problem) if each]
    if problems:
        for each in connections:
            each.link.close()
        if rank == 0:
            complain(
                f"{problems[0]} ({', '.join(meeting.addresses)}; {len(problems)} of {count - 1} do not), as behind a firewall: a rank that "
                "has gone is waited for as long as trainer.ddp_timeout says"
            )
        return None
    for each in connections:
        each.link.setblocking(False)
        each.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            each.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(lost_after * 1000))
    _current = Heartbeat(own, connections, lost_after, ends)
    return _current


def listen(count: int) -> socket.socket:
    """A socket on a free port of all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=count)
    return socket.create_server(("", 0), backlog=count)


def own_addresses() -> list[str]:
    """This machine's addresses, first that by which it reaches MASTER_ADDR, where the ranks have found each other."""
    import psutil

    first = []
    with suppress(OSError):
        target = socket.getaddrinfo(os.environ.get("MASTER_ADDR", "127.0.0.1"), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
            probe.connect(target[4])  # sends nothing
            first = [str(probe.getsockname()[0])]
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and not address.address.startswith("fe80")
    ]
    return [*dict.fromkeys([*first, *sorted(found, key=lambda address: address.startswith(("127.", "::1")))])]


def accept(listener: socket.socket, own: Peer, count: int, token: str) -> list[Connection]:
    """The connections of the ranks that show the token, of so many, in ACCEPT_SECONDS."""
    connections: list[Connection] = []
    until = time.monotonic() + ACCEPT_SECONDS
    while len(connections) < count and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        with suppress(OSError, ValueError, KeyError, TypeError):  # whoever else knocks
            link, _ = listener.accept()
            link.settimeout(CONNECT_SECONDS)
            said = _line(link)
            if not hmac.compare_digest(str(said.pop("token")), token):
                link.close()
                continue
            connection = Connection(link, Peer(**said))
            connection.send(rank=own.rank, host=own.host, process=own.process)
            connections.append(connection)
    return connections


def connect(own: Peer, meeting: Meeting) -> Iterator[Connection]:
    """The connection to rank 0, by the first of its addresses that it answers on; nothing if it answers on none."""
    for address in meeting.addresses:
        with suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # an address of that machine alone, or another program's port
            link = socket.create_connection((address, meeting.port), timeout=CONNECT_SECONDS)
            try:
                greeting = {"token": meeting.token, "rank": own.rank, "host": own.host, "process": own.process}
                link.sendall(json.dumps(greeting).encode() + b"\n")
                connection = Connection(link, Peer(**_line(link)))
            except BaseException:
                link.close()
                raise
            yield connection
            return


def _line(link: socket.socket) -> dict[str, Any]:
    """The first line that arrives, as an object; read by the byte, since the next one may follow at once."""
    received = b""
    while not received.endswith(b"\n"):
        part = link.recv(1)
        if not part or len(received) > 4096:
            raise ValueError("no greeting")
        received += part
    said = json.loads(received)
    if not isinstance(said, dict):
        raise ValueError("no greeting")
    return said
