"""The process's side of `board`: it listens until Ctrl-C or SIGTERM. What was started from it goes on."""

import socket
from pathlib import Path

import uvicorn

from glmtuner.board.actions import Actions
from glmtuner.board.app import application
from glmtuner.board.root import Root
from glmtuner.board.views import Views
from glmtuner.console import say


def serve(
    folder: Path, listener: socket.socket, url: str, token: str | None, hosts: tuple[str, ...] | None, read_only: bool
) -> None:
    """Serve the folder's board on the listening socket."""
    root = Root(folder)
    views = Views(root, read_only)
    actions = None if read_only else Actions(root)
    routers = [views.router, *([] if actions is None else [actions.router])]
    app = application(routers, token, hosts, listener.getsockname()[1])
    say(f"{folder} at {url}{f'?token={token}' if token else ''} ; Ctrl-C stops the board, not the runs")
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=2)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        if actions is not None:
            actions.close()
