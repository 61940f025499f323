"""`serve RUN`: a run's model behind the OpenAI chat-completions API, with a page to chat on."""

import argparse
import ipaddress
import math
import os
import socket
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "its model as an OpenAI-compatible server, with a chat page"
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")  # in URLs
SEND_BUFFER = 32 * 1024  # bytes that the system holds for a client that does not read
KEY = "GLMTUNER_API_KEY"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder; overrides such as generation.max_length=4096 may follow")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0, all addresses, needs a key"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 selects a free one")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the key that clients must send; {KEY} in the environment keeps it out of the process list",
    )
    parser.add_argument("--name", help="the model's name; by default that of the run folder")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="most answers generated at once")
    parser.add_argument("--waiting", type=int, default=256, metavar="N", help="most requests in the queue")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="most seconds from a request to the end of its answer"
    )
    parser.add_argument(
        "--grace", type=float, default=20, metavar="S",
        help="seconds that answers in progress get to finish after Ctrl-C or SIGTERM; a second signal ends them at once",
    )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say

    check(arguments)
    key = arguments.api_key or os.environ.get(KEY) or None
    is_local = is_loopback(arguments.host)
    if not is_local and key is None:
        raise ConfigError(
            f"--host {arguments.host}: other machines can reach this address, so an API key is needed; type {KEY}=<a secret> in "
            "front of the command, or leave --host out to serve this machine only"
        )
    listener = bind_listener(arguments.host, arguments.port)
    try:
        from glmtuner.launch.build import finished_run

        finished = finished_run([arguments.run], overrides)
        from glmtuner.serving.app import (
            Limits,
            Server,
            max_characters,
        )  # slow to import: after the overrides are validated
        from glmtuner.serving.engine import Engine
        from glmtuner.serving.listen import HttpServer, listen

        if finished.run.generation.num_beams > 1:
            raise ConfigError(
                f"generation.num_beams={finished.run.generation.num_beams}: beams cannot be streamed, so serve only samples "
                "or decodes greedily; leave it out"
            )
        engine = Engine(finished, arguments.batch, arguments.waiting)
        engine.start()
        if engine.max_rows < arguments.batch:
            model_name = type(engine.decoder.model).__name__
            say(f"{model_name} is not padding-invariant: requests are answered one at a time")
        name = arguments.name or arguments.run.resolve().name
        limits = Limits(max_characters=max_characters(finished), timeout_s=arguments.timeout)
        host, port = listener.getsockname()[:2]
        url_host = f"[{host}]" if ":" in host else host
        hosts = tuple(dict.fromkeys((*LOOPBACK_NAMES, url_host))) if is_local and key is None else None
        server = HttpServer(Server(finished, engine, name, limits), key, hosts, arguments.grace)
        say(f"{finished.run.model.model_name_or_path} as in {arguments.run}, model name {name!r}")
        say(f"OpenAI API at http://{url_host}:{port}/v1, chat page at http://{url_host}:{port}/ ; Ctrl-C stops")
        try:
            listen(server, listener)
        finally:
            engine.close()
    finally:
        listener.close()
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option's value that is not legal."""
    for name in ("batch", "waiting", "timeout"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: legal are numbers above 0")
    if not 0 <= arguments.grace < math.inf:
        raise ConfigError(f"--grace {arguments.grace}: legal are 0 (end answers at once) and numbers above it")
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port}: legal are 0 (any free one) to {2**16 - 1}")
    if arguments.name == "":
        raise ConfigError("--name '': the model needs a name; leave the option out to name it after the run folder")
    if arguments.api_key == "":
        raise ConfigError(
            "--api-key '': an empty key protects nothing; type a key, or leave the option out to ask for none"
        )
    key = arguments.api_key or os.environ.get(KEY) or "key"
    if key != key.strip() or not key.isprintable():
        raise ConfigError(
            f"--api-key or {KEY}: the key begins or ends with white space, or has a control character, which no HTTP header "
            "carries; choose another key"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def bind_listener(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError if the port is in use. Called before anything is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections inherit it
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:  # a host name that is too long is a UnicodeError
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen on this address ({error}); type another --port, 0 for a free one"
        ) from None
    return listener
