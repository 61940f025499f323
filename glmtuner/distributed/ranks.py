"""The ranks of a run, that is its processes: their environment, how they are started, and their collectives.

torchrun, `accelerate launch`, srun or glmtuner itself (parallel=ddp and others) starts them and sets their environment
variables. Only rank 0 writes files and prints. torch is imported by the first collective, not before.
"""

import atexit
import ctypes
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from glmtuner.console import complain
from glmtuner.distributed import accelerator, heartbeat
from glmtuner.distributed.preemption import SIGNALS
from glmtuner.distributed.visible import visible_gpus
from glmtuner.errors import ConfigError, GlmtunerError

if TYPE_CHECKING:
    import torch

    from glmtuner.config.groups import Trainer
    from glmtuner.config.schema import Parallel

T = TypeVar("T")
MEETING_SECONDS = 60.0  # after which a rank says that it waits for the others to start
GRACE_SECONDS = 60.0  # in which the other ranks may save and exit after one was preempted
# Exit codes of a rank that was killed. A rank never ends with one of them because another rank failed.
KILLED_CODES = [
    -getattr(signal, name) for name in ("SIGKILL", "SIGSEGV", "SIGBUS") if hasattr(signal, name)
]  # Windows has SIGSEGV only
PARENT = "GLMTUNER_PARENT"  # the process id of the process that started this rank: a rank must not outlive it
PR_SET_PDEATHSIG = 1  # an option of prctl(2)


def adopt_slurm_env() -> None:
    """Set torch's environment variables (RANK, WORLD_SIZE, …) from SLURM's in a task of an srun with several tasks."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or not tasks.isdecimal() or int(tasks) < 2:
        return
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(max(int(tasks) // nodes, 1)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or meeting_place(nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 40000)),
    }


def meeting_place(nodes: int) -> str:
    """The address at which the tasks of a step on so many nodes meet."""
    return address_of(first_host(os.environ["SLURM_STEP_NODELIST"])) if nodes > 1 else "127.0.0.1"


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list such as `gpu[03-05,9]`; scontrol is not asked, which containers do not have."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}: no list of nodes; start the ranks by srun")
    return re.sub(r"\[([^\]]*)\]", lambda group: re.split("[-,]", group[1])[0], first[0])


def address_of(host: str) -> str:
    """The name of a node where it can be resolved, else the address (NodeAddr) that SLURM has for it."""
    with suppress(OSError):
        socket.getaddrinfo(host, None)
        return host
    with suppress(OSError):
        told = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False).stdout
        if (address := re.search(r"\bNodeAddr=(\S+)", told)) is not None:
            return address[1]
    raise ConfigError(
        f"the first node of this job, {host}, is no host name that {socket.gethostname()} can resolve, and scontrol tells no address of "
        "it; set MASTER_ADDR to its address"
    )


def rank() -> int:
    """The rank of this process; 0 in a run of one process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and prints."""
    return rank() == 0


# -- starting the ranks -------------------------------------------------------------------------------------------------------


def processes_to_start(parallel: "Parallel") -> int:
    """The number of ranks to start; 1 if this process trains by itself, or is a rank already."""
    refuse_strategies_of_accelerate()
    if "WORLD_SIZE" in os.environ:
        if parallel.processes is not None and parallel.processes != world_size():
            raise ConfigError(
                f"parallel.processes={parallel.processes}: this run was started as {world_size()} processes; leave "
                "parallel.processes out, or start the run without torchrun, accelerate or srun"
            )
        require_groups(world_size(), parallel.ranks_per_row)
        return 1
    count = parallel.processes or (max(len(visible_gpus()), 1) if parallel.several else 1)
    require_groups(count, parallel.ranks_per_row)
    return count


def refuse_strategies_of_accelerate() -> None:
    """Raise ConfigError where `accelerate launch` asks for a strategy of its own, which transformers reads from the environment."""
    for strategy in ("deepspeed", "fsdp", "megatron_lm", "parallelism_config"):
        name = f"ACCELERATE_USE_{strategy.upper()}"
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise ConfigError(
                f"{name}={os.environ[name]}, as of `accelerate launch --use_{strategy}` or its configuration file: the strategy is a "
                "preset here; start the run without it, and type parallel=fsdp2 or parallel=ddp"
            )


def require_groups(count: int, size: int) -> None:
    """Raise ConfigError unless `count` ranks are groups of `size`, which share a row."""
    if count % size:
        raise ConfigError(
            f"parallel.sequence={size}: processes in groups of {size} share a row, and this run has {count}; start a multiple of "
            f"{size} (parallel.processes={-(-count // size) * size}), or leave parallel.sequence out"
        )


class RankFailed(Exception):
    """A rank has failed; it has reported its error itself, unless it was killed."""

    def __init__(self, failed_rank: int, count: int, code: int) -> None:
        self.was_killed = code in KILLED_CODES
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"rank {failed_rank} of {count} {how}")
        self.code = code

    @property
    def preempted_by(self) -> int | None:
        """The signal that preempted the rank, which has saved a checkpoint; None if it failed."""
        return next((signum for signum in SIGNALS if self.code == 128 + signum), None)


def run_ranks(command: Sequence[str], count: int) -> None:
    """Run `count` processes of the command as the ranks of one run until all have ended; raises RankFailed if one fails."""
    threads = max((os.cpu_count() or 1) // count, 1)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    envs = [{**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]
    wait_for_all([subprocess.Popen(command, env=env) for env in envs])


def wait_for_all(processes: Sequence["subprocess.Popen[Any]"]) -> None:
    """Wait until all processes have ended; SIGNALS that this process receives meanwhile are forwarded to them.

    If one fails, the others, whose collectives would wait for it forever, are terminated, and RankFailed is raised.
    """
    with forwarding(processes) as forwarded:
        while True:
            codes = [process.poll() for process in processes]
            failed = [number for number, code in enumerate(codes) if code]
            if failed:
                first = min(failed, key=lambda number: codes[number] not in KILLED_CODES)  # a killed one is the cause
                terminate(processes)
                code = processes[first].returncode
                raise RankFailed(first, len(processes), 128 - code if -code in forwarded else code)
            if None not in codes:
                return
            time.sleep(0.05)


@contextmanager
def forwarding(processes: Sequence["subprocess.Popen[Any]"]) -> Iterator[list[int]]:
    """Within this, SIGNALS that this process receives are forwarded to the processes, and listed; an error kills them."""
    previous_handlers: dict[int, Any] = {}
    forwarded: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        forwarded.append(signum)
        for process in processes:
            process.send_signal(signum)

    with suppress(ValueError):  # not in the main thread
        previous_handlers = {signum: signal.signal(signum, forward) for signum in SIGNALS}
    try:
        yield forwarded
    except BaseException:
        for process in processes:
            if process.poll() is None:
                process.kill()
        raise
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


def terminate(processes: Sequence["subprocess.Popen[Any]"]) -> None:
    """Terminate the processes that still run, and wait a while for them: one that waits in a collective does not react.

    After a preemption they are given GRACE_SECONDS to save their part of the checkpoint instead.
    """
    preempted = any(process.returncode in [128 + signum for signum in SIGNALS] for process in processes)
    deadline = time.monotonic() + (GRACE_SECONDS if preempted else 5.0)
    if not preempted:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- in a rank ---------------------------------------------------------------------------------------------------


def init_process_group(trainer: "Trainer", lost_after: float | None) -> None:
    """Join the process group of the ranks; does nothing in a run of one process.

    With `lost_after` the run ends when a rank has gone, or its machine has not answered for so many seconds.
    """
    if "WORLD_SIZE" not in os.environ or world_size() == 1:
        return
    import torch

    die_with_parent()
    if torch.distributed.is_initialized():
        return
    if not trainer.use_cpu:
        accelerator.set_device()
    timeout = timedelta(seconds=trainer.ddp_timeout)
    backends = accelerator.collective_backends(use_cpu=trainer.use_cpu)
    waiting = threading.Timer(MEETING_SECONDS, complain, [meeting_problem(f"has waited {MEETING_SECONDS:.0f} s for")])
    waiting.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        waiting.start()
    try:
        torch.distributed.init_process_group(backends, timeout=timeout)
    except torch.distributed.DistError as error:
        reason = meeting_problem(f"has not met, within trainer.ddp_timeout={trainer.ddp_timeout} s,")
        raise ConfigError(f"{reason} ({' '.join(str(error).split())[:200]})") from error
    finally:
        waiting.cancel()
    if lost_after is not None:
        heartbeat.start(
            rank(), world_size(), lost_after, share_from_rank0, all_gather, ends=not is_started_by_glmtuner()
        )


def meeting_problem(what: str) -> str:
    """A sentence about ranks that this one has not met."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"rank {rank()} of {world_size()} on {socket.gethostname()} {what} the other ranks at {place}: start the command on every "
        "node, and check that this address can be reached from all of them"
    )


def die_with_parent() -> None:
    """Let the kernel kill this rank when the process that started it ends, even by SIGKILL (Linux only)."""
    if PARENT in os.environ:
        die_with(int(os.environ[PARENT]))


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the one that started it, whose id is `parent`, ends (Linux only)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def destroy_process_group() -> None:
    """Leave the process group, after a barrier."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            torch.distributed.barrier()
        finally:
            heartbeat.leave()
        torch.distributed.destroy_process_group()


class Leaving:
    """Within it, a rank that exits ends after Python's exit handlers, without finalizing the interpreter.

    gloo's threads outlive the process group, and one that drops a tensor while the interpreter is finalized aborts the process
    (SIGABRT, pytorch#179291), which would hide the exit code. To be entered first: exit handlers run in reverse order.
    """

    def __enter__(self) -> None:
        self.code: object = 1  # of an error that ends the process with a traceback
        if "WORLD_SIZE" in os.environ:
            atexit.register(self.leave)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.code = error.code if isinstance(error, SystemExit) else int(error is not None)

    def leave(self) -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):  # its reader has gone, or its disk is full: reported before, where it can be
                stream.flush()
        os._exit(self.code if isinstance(self.code, int) else int(self.code is not None))


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def is_started_by_glmtuner() -> bool:
    """Whether glmtuner itself started this rank, so that the parent process reports how the run ended."""
    return PARENT in os.environ


def should_report(error: GlmtunerError) -> bool:
    """Whether this process is to print the error: rank 0, or another rank if only that one has it."""
    if is_main():
        return True
    torch = sys.modules.get("torch")
    is_joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(error, ReportedByRank0) or not is_joined:
        return False
    time.sleep(3.0)  # if rank 0 has the same error, it reports it, and its end terminates this process
    return True


class ReportedByRank0(GlmtunerError):
    """An error that rank 0 reports; the other ranks exit silently."""


def broadcast_from_rank0(compute: Callable[[], T]) -> T:
    """The result of `compute` on rank 0, on every rank; a GlmtunerError there is raised on every rank."""
    if world_size() == 1:
        return compute()
    import torch

    result: list[Any] = [None, None]  # value, error message
    error: GlmtunerError | None = None
    if is_main():
        try:
            result = [compute(), None]
        except GlmtunerError as raised:
            error = raised
            result = [None, str(raised)]
    torch.distributed.broadcast_object_list(result, src=0)
    if error is not None:
        raise error
    if result[1] is not None:
        raise ReportedByRank0(result[1])
    value: T = result[0]
    return value


def share_from_rank0(value: T | None) -> T:
    """What rank 0 has called this with, on every rank."""
    import torch

    shared: list[Any] = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    given: T = shared[0]
    return given


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def turns(count: int) -> list[int | None]:
    """Which of `count` pieces of work this rank does, equally many on every rank: None is one that another rank does, too."""
    size, own = world_size(), rank()
    return [number if number < count else None for number in range(own, -(-count // size) * size, size)]


def all_reduce_mean(value: "torch.Tensor") -> "torch.Tensor":
    """The mean over the ranks' values, on every rank; `value` is reduced in place."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(value)
    return value / world_size()


def command_of(flags: Sequence[str], overrides: Sequence[str], folder: Path) -> list[str]:
    """The command line of a rank of the run in this folder, or of a sweep job."""
    from glmtuner.config.overrides import quoted_value  # takes Hydra's time to import

    kept = [override for override in overrides if not override.startswith("trainer.output_dir=")]
    return [sys.executable, "-m", "glmtuner", *flags, *kept, f"trainer.output_dir={quoted_value(str(folder))}"]
