"""A connection to a Ray cluster, and what its nodes have."""

import importlib.util
import os
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtuner.console import say
from glmtuner.errors import ConfigError
from glmtuner.sweep.on_ray.options import GIB, KEY

CONNECT_SECONDS = 5.0
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # how every gRPC connection begins (RFC 9113)
SETTINGS = 4  # the kind of the frame that a server answers with
OBJECTS = 100 * 2**20  # bytes of a local Ray's object store: the jobs hand nothing over by it
NOT_COUNTED = ("node:", "accelerator_type:", "object_store_memory")  # resources of Ray's own
NAMES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory_gb"}

_connected: str | None = None  # the address; "local" for a Ray of this process


@dataclass(frozen=True)
class Node:
    """A node that lives: Ray's id, the host's name, and its resources by Ray's names."""

    id: str
    host: str
    resources: Mapping[str, float]

    def fits(self, demand: Mapping[str, float]) -> bool:
        """Whether it could run a job that asks for this, if it ran nothing else."""
        return all(self.resources.get(name, 0.0) >= amount for name, amount in demand.items())

    def __str__(self) -> str:
        own = [
            f"{amount:g} {name}"
            for name, amount in self.resources.items()
            if name != "memory" and not name.startswith(NOT_COUNTED)
        ]
        memory = self.resources.get("memory", 0.0) / GIB
        return f"{self.host}: {', '.join([*sorted(own), f'{memory:.1f} GB of memory'])}"


def require_ray() -> None:
    """Raise ConfigError if Ray is not installed."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # without one, it is a folder of that name
        raise ConfigError(
            "hydra/launcher=ray needs the package ray, which is not installed; type pip install 'glmtuner[ray]', or "
            "hydra/launcher=joblib for several jobs at once on this machine"
        )


def connect(address: str | None, messages: Path) -> None:
    """Connect this process to the cluster, or start a Ray here; raises ConfigError if it cannot. Ray's own lines go to `messages`."""
    global _connected
    wanted = address or "local"
    if _connected == wanted:
        return
    close()
    if address not in (None, "auto"):
        assert address is not None
        check_server(address)
    if address is None and os.environ.get("RAY_ADDRESS"):
        say(
            f"hydra/launcher=ray: RAY_ADDRESS={os.environ['RAY_ADDRESS']} is not used, and a Ray is started on this machine; type "
            f"{KEY}.address=auto for that cluster"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to its makers
    more: dict[str, Any] = {}
    if address is None:
        more = {"include_dashboard": False, "object_store_memory": OBJECTS}
        if "RAY_AUTH_MODE" not in os.environ:  # Ray listens on all interfaces, and would run what anyone sends
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    try:
        ray.init(address=wanted, log_to_driver=False, logging_level="error", **more)
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{KEY}.address={'null' if address is None else address}: no Ray can be used here ({type(error).__name__}: {reason}); type the "
            "command on a node of the cluster (ray status tells whether it is one), or leave the address out to start a Ray on this machine"
        ) from None
    _connected = wanted
    keep_messages(messages)


def keep_messages(path: Path) -> None:
    """Write what Ray prints about nodes, which are dozens of lines for one that was lost, into this file."""
    import ray._private.worker as worker

    def write(data: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in data.get("lines", ()))

    worker.print_to_stdstream = write


def check_server(address: str) -> None:
    """Raise ConfigError unless a gRPC server answers there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    advice = f"type {KEY}.address=<host>:<port> as `ray start --head` printed it, or {KEY}.address=auto on a node of the cluster"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(CONNECT_SECONDS)
            connection.sendall(HTTP2)
            answer = connection.recv(9)
    except TimeoutError:
        raise ConfigError(
            f"{KEY}.address={address}: nothing answers there within {CONNECT_SECONDS:g} s; {advice}"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{KEY}.address={address}: no connection ({reason.lower()}); {advice}") from None
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise ConfigError(f"{KEY}.address={address}: what answers there is no Ray; {advice}")


def close() -> None:
    """Disconnect this process, which ends a Ray that it has started, and everything that runs in it."""
    global _connected
    if _connected is not None:
        import ray

        ray.shutdown()
    _connected = None


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that live."""
    import ray

    return [
        Node(each["NodeID"], str(each["NodeManagerHostname"]), each["Resources"])
        for each in ray.nodes()
        if each["Alive"]
    ]


def unplaceable(demand: Mapping[str, float], nodes: Sequence[Node]) -> str | None:
    """Why no node could run a job that asks for this, in one paragraph; None if one could."""
    if any(node.fits(demand) for node in nodes):
        return None
    most = {name: max((node.resources.get(name, 0.0) for node in nodes), default=0.0) for name in demand}
    short = [name for name, amount in demand.items() if most[name] < amount]
    asked = ", ".join(
        f"{key_of(name)}={typed_amount(name, amount)}" for name, amount in demand.items() if name in short
    )
    if short:
        largest = most[short[0]]
        remedy = (
            f"type {key_of(short[0])}={typed_amount(short[0], largest)} or less"
            if largest
            else f"leave {key_of(short[0])} out"
            if short[0] not in NAMES
            else f"type {key_of(short[0])}=0"
            if short[0] != "memory"
            else "leave it out"
        )
        what = "a job asks for more than any node has"
    else:
        asked = ", ".join(f"{key_of(name)}={typed_amount(name, amount)}" for name, amount in demand.items())
        remedy, what = "ask for less of one of them", "no node has all of it"
    return f"{asked}: {what} ({listed(nodes)}); {remedy}, or add a node"


def key_of(resource: str) -> str:
    """The key that asks for a resource of Ray's."""
    return f"{KEY}.{NAMES.get(resource, f'resources.{resource}')}"


def typed_amount(resource: str, amount: float) -> str:
    """The amount as the key has it."""
    return f"{amount / GIB:.1f}" if resource == "memory" else f"{amount:g}"


def listed(nodes: Iterable[Node]) -> str:
    """The nodes and what they have, in one line; of many the first."""
    shown = [str(node) for node in nodes]
    return "; ".join(shown[:6]) + (f"; and {len(shown) - 6} more" if len(shown) > 6 else "") or "it has no node"
