"""The processes that train one run together, its ranks: who this one is, how they are started, and what they agree on.

torchrun, `accelerate launch`, srun and glmtuner itself (parallel=ddp and others) start them; each is told who it is by the
environment, and only rank 0 writes and speaks. torch is imported once ranks meet, not before.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from glmtuner.distributed.preemption import SIGNALS
from glmtuner.errors import ConfigError, GlmtunerError

if TYPE_CHECKING:
    import torch

    from glmtuner.config.groups import Trainer
    from glmtuner.config.schema import Parallel

T = TypeVar("T")
GRACE = 60.0  # seconds that the other ranks have to save and end once one was told to go
KILLED = [-signum for signum in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)]  # never what another rank's end causes
PARENT = "GLMTUNER_PARENT"  # the process that started this rank: a rank does not outlive it
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def adopt_slurm_env() -> None:
    """Name this process's rank in the words of torch (RANK, WORLD_SIZE, …) where srun named it in SLURM's."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or not tasks.isdecimal() or int(tasks) < 2:
        return
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(max(int(tasks) // nodes, 1)),
        "MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]) if nodes > 1 else "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 40000)),
    }


def first_host(nodes: str) -> str:
    """The first of SLURM's `node[3-5,9]`."""
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


# -- starting them -------------------------------------------------------------------------------------------------------


def processes_to_start(parallel: "Parallel") -> int:
    """How many processes this one is to start for the run; 1 when it trains by itself, or was started as a rank."""
    if "WORLD_SIZE" in os.environ:
        if parallel.processes is not None and parallel.processes != world_size():
            raise ConfigError(
                f"parallel.processes={parallel.processes}: whoever started this run started {world_size()} processes; leave "
                "parallel.processes out, or start the run without torchrun, accelerate or srun"
            )
        return 1
    return parallel.processes or (max(len(gpus()), 1) if parallel.several else 1)


def gpus() -> list[str]:
    """The GPUs that a child would see, as CUDA_VISIBLE_DEVICES names them; torch is not asked."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


class RankFailed(Exception):
    """A rank did not end well; it has told why itself, unless it was killed."""

    def __init__(self, failed: int, count: int, code: int) -> None:
        self.killed = code in KILLED  # so that it could tell nothing itself
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"rank {failed} of {count} {how}")
        self.code = code

    @property
    def stopped_by(self) -> int | None:
        """The signal that a checkpoint was saved for; None when the rank failed."""
        return next((signum for signum in SIGNALS if self.code == 128 + signum), None)


def run_ranks(command: Sequence[str], count: int) -> None:
    """Run `count` processes of the command as the ranks of one run, and wait; raises RankFailed for the first that fails."""
    threads = max((os.cpu_count() or 1) // count, 1)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    places = [{"RANK": str(place), "LOCAL_RANK": str(place)} for place in range(count)]
    wait_for([subprocess.Popen(command, env={**os.environ, **shared, **place}) for place in places])


def wait_for(children: Sequence["subprocess.Popen[Any]"]) -> None:
    """Until all have ended. What this process is told to do is handed on to them; when one fails the others are ended.

    Raises RankFailed for the first that fails: the collectives of the others would wait for it for ever.
    """
    before: dict[int, Any] = {}
    told: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        told.append(signum)
        for child in children:
            child.send_signal(signum)

    with suppress(ValueError):  # not in the main thread
        before = {signum: signal.signal(signum, hand_on) for signum in SIGNALS}
    try:
        while True:
            codes = [child.poll() for child in children]
            ended = [place for place, code in enumerate(codes) if code]
            if ended:
                failed = min(ended, key=lambda place: codes[place] not in KILLED)  # what the others fail for
                terminate(children)
                code = children[failed].returncode
                raise RankFailed(failed, len(children), 128 - code if -code in told else code)
            if None not in codes:
                return
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def terminate(children: Sequence["subprocess.Popen[Any]"]) -> None:
    """Ask those that still run to go, and make them after a while: a rank that waits in a collective hears nothing."""
    stopped = any(child.returncode in [128 + signum for signum in SIGNALS] for child in children)
    until = time.monotonic() + (GRACE if stopped else 5.0)
    if not stopped:
        for child in children:
            if child.poll() is None:
                child.terminate()
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- being one of them ---------------------------------------------------------------------------------------------------


def init_process_group(trainer: "Trainer") -> None:
    """Meet the other ranks; nothing happens in a run of one process."""
    if "WORLD_SIZE" not in os.environ or world_size() == 1:
        return
    import torch

    die_with_parent()
    if torch.distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available() and not trainer.use_cpu
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=trainer.ddp_timeout)
    )


def die_with_parent() -> None:
    """A rank ends when the process that started it is gone, even by kill -9 (Linux)."""
    if PARENT not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)


def destroy_process_group() -> None:
    """Wait until all are here, and part."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all are here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def is_child() -> bool:
    """Whether glmtuner itself started this rank, and tells what became of the run."""
    return PARENT in os.environ


def should_report(error: GlmtunerError) -> bool:
    """Whether this process is to tell of the mistake: rank 0, or another rank that alone has found it."""
    if is_main():
        return True
    torch = sys.modules.get("torch")
    met = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(error, ReportedByRank0) or not met:
        return False
    time.sleep(3.0)  # what rank 0 finds too, it tells, and its end is the end of this process
    return True


class ReportedByRank0(GlmtunerError):
    """What rank 0 has found and tells; the other ranks end without a word."""


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank; what it raises is raised by all."""
    if world_size() == 1:
        return decide()
    import torch

    answer: list[Any] = [None, None]
    error: GlmtunerError | None = None
    if is_main():
        try:
            answer = [decide(), None]
        except GlmtunerError as found:
            error = found
            answer = [None, str(found)]
    torch.distributed.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise ReportedByRank0(answer[1])
    return answer[0]


def all_gather(value: T) -> list[T]:
    """The value of every rank, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def all_reduce_mean(value: "torch.Tensor") -> "torch.Tensor":
    """The mean of every rank's value, on every rank."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(value)
    return value / world_size()


def command_of(flags: Sequence[str], overrides: Sequence[str], folder: Path) -> list[str]:
    """The command line of one rank of the run, or of one job of a sweep, in that folder."""
    kept = [word for word in overrides if not word.startswith("trainer.output_dir=")]
    return [sys.executable, "-m", "glmtuner", *flags, *kept, f"trainer.output_dir='{folder}'"]
