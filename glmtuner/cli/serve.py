"""`serve RUN`: a run's model behind the OpenAI chat-completions API, with a page to chat on."""

import argparse
import os
import socket
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "its model as an OpenAI-compatible server, with a chat page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
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


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say

    key = arguments.api_key or os.environ.get(KEY) or None
    if arguments.host not in LOOPBACK and key is None:
        raise ConfigError(
            f"--host {arguments.host}: other machines can reach this address, so an API key is needed; type {KEY}=<a secret> in "
            "front of the command, or leave --host out to serve this machine only"
        )
    for name in ("batch", "waiting", "timeout"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: legal are numbers above 0")
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port}: legal are 0 (any free one) to {2**16 - 1}")
    listener = bind_listener(arguments.host, arguments.port)
    try:
        from glmtuner.launch.build import finished_run

        finished = finished_run([arguments.run], overrides)
        from glmtuner.serving.app import (
            Limits,
            Server,
            application,
        )  # slow to import: after the overrides are validated
        from glmtuner.serving.engine import Engine

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
        server = Server(finished, engine, name, Limits(timeout_s=arguments.timeout))
        host, port = listener.getsockname()[:2]
        hosts = (*LOOPBACK[:2], "[::1]") if arguments.host in LOOPBACK and key is None else None
        url_host = f"[{host}]" if ":" in host else host
        say(f"{finished.run.model.model_name_or_path} as in {arguments.run}, model name {name!r}")
        say(f"OpenAI API at http://{url_host}:{port}/v1, chat page at http://{url_host}:{port}/ ; Ctrl-C stops")
        try:
            listen(application(server, key, hosts), listener)
        finally:
            engine.close()
    finally:
        listener.close()
    return 0


def bind_listener(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError if the port is in use. Called before anything is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen on this address ({error}); type another --port, 0 for a free one"
        ) from None
    return listener


def listen(app: object, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; answers in progress get three seconds to end."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))  # type: ignore[arg-type]
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again after its shutdown
        return
