"""The keys of hydra/launcher=ray, checked, and what a job asks of its node."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf

from glmtuner.config.schema import Run
from glmtuner.console import plain
from glmtuner.errors import ConfigError
from glmtuner.run_folder.files import is_number
from glmtuner.run_folder.redaction import redact_value
from glmtuner.sweep.placeholders import PLACEHOLDER

KEY = "hydra.launcher"
GIB = 2**30
FEATURES = ("CPU", "GPU", "memory")  # Ray's own names of resources


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The values of conf/hydra/launcher/ray.yaml."""

    address: str | None
    num_cpus: float
    num_gpus: float | None
    memory_gb: float | None
    resources: dict[str, float]
    max_parallel: int | None
    max_retries: int
    timeout_min: float | None
    grace_s: float
    runtime_env: dict[str, Any]

    @classmethod
    def of(cls, typed: Mapping[str, Any]) -> "RayOptions":
        """The options of these keys; raises ConfigError for an illegal value."""
        values: dict[str, Any] = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in typed.items()
        }
        missing = [each.name for each in fields(cls) if each.name not in values]
        if missing:
            raise ConfigError(
                f"{KEY}.{missing[0]} is missing; a launcher of your own starts from the shipped one: defaults: [/hydra/launcher/ray@_here_]"
            )
        values |= {name: {} for name in ("resources", "runtime_env") if values[name] is None}
        for problem in illegal(values):
            raise ConfigError(problem)
        return cls(**values)

    def demand(self, run: Run, has_gpus: bool) -> dict[str, float]:
        """What a job asks of its node, by Ray's names; without num_gpus a GPU for each of its processes, where the cluster `has_gpus`."""
        gpus = self.num_gpus
        if gpus is None:
            gpus = float(run.parallel.processes or 1) if has_gpus and not run.trainer.use_cpu else 0.0
        asked = {"CPU": self.num_cpus, "GPU": gpus, "memory": (self.memory_gb or 0.0) * GIB, **self.resources}
        return {name: float(amount) for name, amount in asked.items() if amount}


def illegal(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each illegal value."""

    def shown(name: str) -> str:
        return f"{KEY}.{name}={plain(str(values[name]))}"

    address = values["address"]
    if address is not None and not (isinstance(address, str) and is_address(address)):
        yield (
            f"{shown('address')}: legal is null, which starts a Ray on this machine; auto, the cluster that this machine is a node of; or "
            f"<host>:<port> of its head, such as {KEY}.address=10.0.0.1:6379"
            + (
                "; the port of Ray's client (ray://…:10001) is not: type the command on a node of the cluster"
                if str(address).startswith("ray://")
                else ""
            )
        )
    whole = "a whole number, or a share below 1"
    for name, words, is_legal in (
        ("num_cpus", "a number from 0", at_least(values["num_cpus"], 0)),
        (
            "num_gpus",
            f"null, a GPU a process where the cluster has GPUs; {whole}",
            values["num_gpus"] is None or is_gpus(values["num_gpus"]),
        ),
        ("memory_gb", "null, or a number above 0", values["memory_gb"] is None or above(values["memory_gb"], 0)),
        ("max_parallel", "null, as many as have room; or a number from 1", is_count(values["max_parallel"], 1, True)),
        ("max_retries", "a number from 0", is_count(values["max_retries"], 0)),
        ("timeout_min", "null, or minutes above 0", values["timeout_min"] is None or above(values["timeout_min"], 0)),
        ("grace_s", "seconds above 0", above(values["grace_s"], 0)),
    ):
        if not is_legal:
            yield f"{shown(name)}: legal is {words}; leave it out for the value of conf/hydra/launcher/ray.yaml"
    for name in ("resources", "runtime_env"):
        if not isinstance(values[name], dict):
            yield f"{shown(name)}: a mapping; type +{KEY}.{name}.{'a100=1' if name == 'resources' else 'env_vars.NCCL_DEBUG=INFO'}"
            return
    for name, amount in values["resources"].items():
        if name in FEATURES:
            key = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory_gb"}[name]
            yield f"{KEY}.resources.{name}={amount}: Ray has a key of its own for it; type {KEY}.{key}=…"
        elif not above(amount, 0):
            yield f"{KEY}.resources.{name}={amount}: legal is a number above 0; leave it out to ask for none"
    env = values["runtime_env"]
    if PLACEHOLDER.search(str(env)) or redact_value(env) != env:
        yield (
            f"{KEY}.runtime_env holds a secret, which Ray would show to whoever sees the cluster; set it in the environment of this "
            "command, which reaches the jobs by another way"
        )


def is_address(text: str) -> bool:
    """Whether it is `auto` or a host and a port."""
    host, colon, port = text.rpartition(":")
    return text == "auto" or bool(
        colon and host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536 and " " not in host
    )


def above(value: Any, low: float) -> bool:
    """Whether it is a number above `low`."""
    return is_number(value) and value > low


def at_least(value: Any, low: float) -> bool:
    """Whether it is a number from `low`."""
    return is_number(value) and value >= low


def is_gpus(value: Any) -> bool:
    """Whether Ray can give so many GPUs: a share of one, or whole ones."""
    return at_least(value, 0) and (value < 1 or float(value).is_integer())


def is_count(value: Any, low: int, or_null: bool = False) -> bool:
    """Whether it is a whole number from `low`, or null where that is legal."""
    return (or_null and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value >= low)
