"""`board [FOLDER]`: a page over a folder of runs and sweeps, live, on which runs are compared, started and talked with."""

import argparse
import os
import secrets
from pathlib import Path

from glmtuner.errors import ConfigError

HELP = "a live page over a folder of runs and sweeps"
TOKEN = "GLMTUNER_BOARD_TOKEN"
DEFAULT = Path("outputs")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help="by default outputs/")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for all of them")
    parser.add_argument("--port", type=int, default=8100, help="0 selects a free one")
    parser.add_argument(
        "--static", type=Path, metavar="OUT", help="write the page into this folder instead of serving it"
    )
    parser.add_argument(
        "--watch", type=float, metavar="S", help="with --static: write again every S seconds while jobs run"
    )
    parser.add_argument(
        "--read-only", action="store_true", help="nothing can be started, stopped, deleted or talked with"
    )
    parser.add_argument(
        "--no-token", action="store_true",
        help=f"ask for no token, on the loopback address alone; {TOKEN} in the environment sets one that stays the same",
    )  # fmt: skip


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: board takes a folder and no overrides; type python -m glmtuner board outputs"
        )
    if not arguments.folder.is_dir():
        raise ConfigError(
            f"board {arguments.folder}: no such folder; type the folder that holds your runs, such as outputs or outputs/sweeps/<sweep>"
        )
    if arguments.static is not None:
        return write_static(arguments)
    if arguments.watch is not None:
        raise ConfigError("--watch goes with --static OUT; a board that is served is live without it")
    return serve(arguments)


def write_static(arguments: argparse.Namespace) -> int:
    from glmtuner.board.static import write, write_while_running

    if arguments.watch is not None and not 0 < arguments.watch < 86_400:
        raise ConfigError(f"--watch {arguments.watch}: legal are seconds above 0")
    if arguments.watch is None:
        write(arguments.folder, arguments.static)
    else:
        write_while_running(arguments.folder, arguments.static, arguments.watch)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    from glmtuner.board.serve import serve as serve_board
    from glmtuner.cli.serve import LOOPBACK_NAMES, bind_listener, is_loopback

    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port}: legal are 0 (any free one) to {2**16 - 1}")
    is_local = is_loopback(arguments.host)
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if arguments.no_token and not is_local:
        raise ConfigError(
            f"--no-token --host {arguments.host}: other machines can reach this address, so the board asks for a token; leave one "
            "of the two out"
        )
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token or ";" in token:
        raise ConfigError(
            f"{TOKEN}: a token has at least 16 characters, of ASCII, without spaces and semicolons; set another, or unset it for a "
            "random one"
        )
    listener = bind_listener(arguments.host, arguments.port)
    host, port = listener.getsockname()[:2]
    url_host = f"[{host}]" if ":" in host else host
    hosts = tuple(dict.fromkeys((*LOOPBACK_NAMES, url_host))) if is_local else None
    try:
        serve_board(
            arguments.folder,
            listener,
            f"http://{url_host}:{port}/",
            None if arguments.no_token else token,
            hosts,
            arguments.read_only,
        )
    finally:
        listener.close()
    return 0
