"""What a rank learns of the others: that one has ended, failed or fallen silent, and how its own process ends for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest

from glmtuner.distributed import heartbeat
from glmtuner.distributed.heartbeat import Connection, Heartbeat, Meeting, Peer
from glmtuner.errors import RankLost

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and socketpairs of descriptors")
PEERS = [Peer(0, "a", 100), Peer(1, "b", 101), Peer(2, "c", 102)]


class Pair:
    """Rank 0 with its heartbeat, and the bare sockets of the ranks 1 and 2."""

    def __init__(self) -> None:
        self.others, connections = {}, []
        for peer in PEERS[1:]:
            mine, theirs = socket.socketpair()
            mine.setblocking(False)
            theirs.settimeout(30)
            self.others[peer.rank] = theirs
            connections.append(Connection(mine, peer))
        self.heartbeat = Heartbeat(PEERS[0], connections, 40.0, ends=False)

    def tell(self, rank: int, **message: Any) -> None:
        self.others[rank].sendall(json.dumps(message).encode() + b"\n")

    def told(self, rank: int) -> dict[str, Any]:
        """What rank 0 has told that rank, besides that it lives."""
        with self.others[rank].makefile() as lines:
            return next(said for line in lines if "beat" not in (said := json.loads(line)))


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    made = Pair()
    yield made
    made.heartbeat.leave()
    for each in made.others.values():
        each.close()


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_a_rank_that_ends_without_a_word_is_lost_to_all(pair: Pair) -> None:
    pair.others[1].close()
    assert pair.heartbeat.lost.wait(30) and pair.heartbeat.loss is not None
    assert "rank 1 on b (process 101) has ended without a word: it was killed" in str(pair.heartbeat.loss)
    assert not pair.heartbeat.loss.unreachable
    assert pair.told(2) == {"gone": str(pair.heartbeat.loss), "unreachable": False}


def test_a_rank_that_takes_its_leave_is_not_lost(pair: Pair) -> None:
    pair.tell(1, bye=True)
    pair.others[1].close()
    wait(lambda: len(pair.heartbeat.connections) == 1)
    assert not pair.heartbeat.lost.wait(0.3)
    pair.tell(2, failed="DataError: no such file")
    assert pair.heartbeat.lost.wait(30)
    assert str(pair.heartbeat.loss) == "rank 2 on c (process 102) has failed: DataError: no such file"


def test_a_rank_that_leaves_tells_why(pair: Pair) -> None:
    pair.heartbeat.leave("ValueError: 1")
    assert pair.told(1) == {"gone": "rank 0 on a (process 100) has failed: ValueError: 1"}


def test_silence_is_said_and_ends_nothing_until_a_collective_fails(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "_current", pair.heartbeat)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.1)
    timeout = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv")
    assert heartbeat.cause_of(timeout) is None
    beats = threading.Event()

    def beat() -> None:  # rank 2 lives
        while not beats.wait(0.1):
            pair.tell(2, beat=True)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        wait(lambda: pair.heartbeat.silent())
        assert not pair.heartbeat.lost.is_set()
        assert heartbeat.cause_of(ValueError("of the user")) is None
        cause = heartbeat.cause_of(timeout)
        assert isinstance(cause, RankLost) and str(cause).startswith("rank 1 on b (process 101) has been silent for ")
        pair.tell(1, beat=True)
        wait(lambda: not pair.heartbeat.silent())
    finally:
        beats.set()
        thread.join()
    said = capsys.readouterr().err
    assert "rank 1 on b (process 101) has been silent for 1 s, and its machine answers: it is stopped" in said
    assert "rank 1 on b (process 101) is heard of again" in said and "rank 2" not in said


RANK = """
import os, socket, sys, time
from glmtuner.distributed import heartbeat
from glmtuner.distributed.heartbeat import Connection, Heartbeat, Peer
link = socket.socket(fileno=int(sys.argv[1]))
link.setblocking(False)
beating = Heartbeat(Peer(0, "a", os.getpid()), [Connection(link, Peer(1, "b", 101))], 40.0, ends=True)
if os.fork() == 0:
    time.sleep(600)  # a worker that reads data
with heartbeat.told_of_loss(lambda loss: print("recorded:", loss)):
    print("up", flush=True)
    {then}
"""
WAITS = "time.sleep(600)  # in a collective"


def rank_zero(then: str = WAITS) -> tuple["subprocess.Popen[str]", socket.socket]:
    """A process that waits as rank 0, with a worker, and rank 1's end of their connection."""
    mine, theirs = socket.socketpair()
    with theirs:
        started = subprocess.Popen(
            [sys.executable, "-c", RANK.format(then=then), str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert started.stdout is not None and started.stdout.readline() == "up\n"
    mine.settimeout(60)
    return started, mine


def end(group: "subprocess.Popen[str]") -> None:
    os.killpg(group.pid, signal.SIGKILL)
    group.communicate()


def test_a_process_that_waits_ends_with_the_reason_once_a_rank_has_gone() -> None:
    waiting, link = rank_zero()
    link.close()
    try:
        assert waiting.wait(60) == 1
    finally:
        os.killpg(waiting.pid, signal.SIGKILL)
    said, complaint = waiting.communicate()
    assert said.startswith("recorded: rank 1 on b (process 101) has ended without a word")
    assert complaint.startswith("glmtuner: rank 1 on b (process 101) has ended") and "Traceback" not in complaint


@pytest.mark.parametrize("then", ["sys.exit(0)", "raise ValueError"])
def test_a_process_that_ends_takes_its_leave(then: str) -> None:
    ending, link = rank_zero(then)
    received = b""
    try:
        while part := link.recv(4096):
            received += part
    finally:
        end(ending)
        link.close()
    assert json.loads(received.splitlines()[-1]) == {"bye": True}


def test_a_killed_rank_is_lost_although_its_workers_live() -> None:
    killed, link = rank_zero()
    killed.kill()
    try:
        while link.recv(4096):
            pass  # what it had sent
        os.killpg(killed.pid, 0)  # the worker lives
    finally:
        end(killed)
        link.close()


def meet(intrude: Callable[[Meeting], None], count: int = 2) -> list[Heartbeat | None]:
    """The heartbeats of ranks that meet in threads of this process, after `intrude` has had the meeting's place."""
    places: Queue[Meeting] = Queue()
    barrier, problems, made = threading.Barrier(count), [""] * count, [None] * count

    def share(rank: int) -> Callable[[Meeting | None], Meeting]:
        def given(meeting: Meeting | None) -> Meeting:
            if meeting is not None:
                intrude(meeting)
                for _ in range(1, count):
                    places.put(meeting)
                return meeting
            return places.get(timeout=60)

        return given

    def gather(rank: int) -> Callable[[str], list[str]]:
        def gathered(problem: str) -> list[str]:
            problems[rank] = problem
            barrier.wait(60)
            return problems

        return gathered

    def begin(rank: int) -> None:
        own = heartbeat.start(rank, count, 40.0, share(rank), gather(rank), ends=False)
        made[rank] = own

    with ThreadPoolExecutor(count) as threads:
        for done in [threads.submit(begin, rank) for rank in range(count)]:
            done.result(60)
    return made


def test_ranks_meet_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_current", None)
    monkeypatch.setattr(heartbeat, "CONNECT_SECONDS", 1.0)
    strangers = []

    def intrude(meeting: Meeting) -> None:
        for said in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"token": "guessed", "rank": 1, "host": "x", "process": 1}\n',
            b"[]\n",
        ):
            strangers.append(socket.create_connection(("127.0.0.1", meeting.port)))
            strangers[-1].sendall(said)

    first, second = meet(intrude)
    assert first is not None and second is not None
    assert [each.peer.rank for each in first.connections] == [1] and second.connections[0].peer == first.own
    assert first.connections[0].peer.process == os.getpid()
    second.leave()
    wait(lambda: not first.connections)
    assert not first.lost.is_set()
    for stranger in strangers:
        stranger.close()


def test_ranks_that_do_not_meet_say_so_and_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "_current", None)
    monkeypatch.setattr(heartbeat, "ACCEPT_SECONDS", 1.0)
    monkeypatch.setattr(heartbeat, "own_addresses", lambda: ["127.0.0.1"])
    monkeypatch.setattr(heartbeat, "connect", lambda own, meeting: iter(()))  # as behind a firewall
    assert meet(lambda meeting: None) == [None, None]
    said = capsys.readouterr().err
    assert "does not reach port" in said and "(127.0.0.1; 1 of 1 do not)" in said and "trainer.ddp_timeout" in said
