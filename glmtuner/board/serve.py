"""The process's side of `board`: it listens until Ctrl-C or SIGTERM. What was started from it goes on."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import Scope

from glmtuner.board.actions import Actions
from glmtuner.board.app import application
from glmtuner.board.root import Root
from glmtuner.board.views import Views
from glmtuner.console import say

GRACE_S = (
    1.0  # for answers in progress after the first signal; pages ask every two seconds, and again when they are refused
)


class BoardServer(uvicorn.Server):
    """uvicorn's server, which ends soon after a signal, however many pages are open or stream something."""

    def __init__(self, root: Root, token: str | None, hosts: tuple[str, ...] | None, read_only: bool) -> None:
        self.parts: list[Views | Actions] = [Views(root, read_only), *([] if read_only else [Actions(root)])]
        app = application([part.router for part in self.parts], token, hosts, self.abort)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="off",
                ws="none",
                proxy_headers=False,  # `abort` finds a connection by its client's address
                timeout_graceful_shutdown=round(GRACE_S),
            )
        )
        self.signals, self.deadline = 0, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count the signal; `on_tick` acts on it, outside of the signal handler."""
        self.signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self.signals:
            self.deadline = self.deadline or time.monotonic() + GRACE_S
            unfinished = self._unfinished()
            if not unfinished or time.monotonic() >= self.deadline or self.signals > 1:
                logging.getLogger("uvicorn.error").setLevel(
                    logging.CRITICAL
                )  # what is cut off from here on is no fault
                for connection in unfinished:
                    connection.transport.abort()
                await asyncio.sleep(0.01)  # the tasks of aborted connections end
                self.should_exit = self.force_exit = True
        return await super().on_tick(counter)

    def abort(self, scope: Scope) -> None:
        """Close the connection of a request at once, whatever it has not read."""
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == scope["client"]:
                connection.transport.abort()

    def _unfinished(self) -> list[Any]:
        """Connections whose answer is not complete."""
        cycles = ((connection, getattr(connection, "cycle", None)) for connection in self.server_state.connections)
        return [connection for connection, cycle in cycles if cycle is not None and not cycle.response_complete]


def serve(
    folder: Path, listener: socket.socket, url: str, token: str | None, hosts: tuple[str, ...] | None, read_only: bool
) -> None:
    """Serve the folder's board on the listening socket."""
    server = BoardServer(Root(folder), token, hosts, read_only)
    say(f"{folder} at {url}{f'?token={token}' if token else ''} ; Ctrl-C stops the board, not the runs")
    try:
        server.run(sockets=[listener])
    finally:
        for part in server.parts:
            part.close()
    workers = [
        thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon
    ]
    deadline = time.monotonic() + GRACE_S
    for thread in workers:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in workers):
        # Python would wait for a thread that still computes an answer, which nobody waits for
        sys.stdout.flush()
        os._exit(0)
