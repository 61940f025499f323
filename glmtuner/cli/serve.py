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
    parser.add_argument("run", type=Path, help="a run folder; generation.max_length=4096 and its like may follow")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 is every one, and needs a key"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send; {KEY} in the environment is out of sight"
    )
    parser.add_argument("--name", help="of the model; the run folder's own by default")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="answers generated at once")
    parser.add_argument("--waiting", type=int, default=256, metavar="N", help="requests that may wait for their turn")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds from a request to the end of its answer"
    )


def run(given: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import say

    key = given.api_key or os.environ.get(KEY) or None
    if given.host not in LOOPBACK and key is None:
        raise ConfigError(
            f"--host {given.host}: others can reach that address, so an API key is needed; type {KEY}=<a secret> in front of "
            "the command, or leave --host out to serve this machine alone"
        )
    for name in ("batch", "waiting", "timeout"):
        if getattr(given, name) <= 0:
            raise ConfigError(f"--{name} {getattr(given, name)}: legal are numbers above 0")
    if not 0 <= given.port < 2**16:
        raise ConfigError(f"--port {given.port}: legal are 0 (any free one) to {2**16 - 1}")
    taken = listening(given.host, given.port)
    try:
        from glmtuner.launch.build import finished_run

        finished = finished_run([given.run], overrides)
        from glmtuner.serving.app import Limits, Server, application  # slow to import: wrong words are told first
        from glmtuner.serving.engine import Engine

        if finished.run.generation.num_beams > 1:
            raise ConfigError(
                f"generation.num_beams={finished.run.generation.num_beams}: beams cannot be streamed, so serve samples or "
                "decodes greedily; leave it out"
            )
        engine = Engine(finished, given.batch, given.waiting)
        engine.start()
        if engine.most_rows < given.batch:
            say(f"{type(engine.model).__name__} answers otherwise when prompts are padded: one request at a time")
        name = given.name or given.run.resolve().name
        server = Server(finished, engine, name, Limits(seconds=given.timeout))
        host, port = taken.getsockname()[:2]
        hosts = (*LOOPBACK[:2], "[::1]") if given.host in LOOPBACK and key is None else None
        shown = f"[{host}]" if ":" in host else host
        say(f"{finished.run.model.model_name_or_path} as in {given.run}, model name {name!r}")
        say(f"OpenAI API at http://{shown}:{port}/v1, chat page at http://{shown}:{port}/ ; Ctrl-C stops")
        try:
            listen(application(server, key, hosts), taken)
        finally:
            engine.close()
    finally:
        taken.close()
    return 0


def listening(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded: a port that is taken is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(128)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another --port, 0 takes a free one"
        ) from None
    return taken


def listen(app: object, taken: socket.socket) -> None:
    """Serve until Ctrl-C or a SIGTERM; answers under way get three seconds."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))  # type: ignore[arg-type]
    try:
        server.run(sockets=[taken])
    except KeyboardInterrupt:  # uvicorn sends the signal on when it is done
        return
