"""The process's side of `serve`: it listens, and it stops without cutting answers off."""

import asyncio
import gc
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import Scope

from glmtuner.console import say
from glmtuner.serving.app import Server, application

FLUSH_S = 2.0  # for the last bytes to reach the clients, and for the event loop's own tasks to end


class HttpServer(uvicorn.Server):
    """uvicorn's server, which goes on listening while the requests in progress end.

    The first signal closes the gate: new requests get 503. When no request is left, `grace_s` seconds are over, or another
    signal comes, what is left ends with an error of the API, and the server exits.
    """

    def __init__(self, api: Server, key: str | None, hosts: tuple[str, ...] | None, grace_s: float) -> None:
        app = application(api, key, hosts, self.abort)
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="off",
                ws="none",
                proxy_headers=False,  # `abort` finds a connection by its client's address
                timeout_graceful_shutdown=round(FLUSH_S),
            )
        )
        self.api, self.grace_s = api, grace_s
        self.signals = 0
        self.phase = "serving"  # then finishing, then flushing
        self.deadline = 0.0  # of the phase

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count the signal; `on_tick` acts on it, outside of the signal handler."""
        self.signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        now = time.monotonic()
        if self.phase == "serving" and self.signals:
            self.phase, self.deadline = "finishing", now + self.grace_s
            self.api.gate.is_closed = True
            if self.api.gate.inside:
                say(
                    f"stopping: {self.api.gate.inside} requests in progress have {self.grace_s:g} s to finish (--grace); "
                    "a second signal ends them at once"
                )
        if self.phase == "finishing" and (not self.api.gate.inside or now >= self.deadline or self.signals > 1):
            self.phase, self.deadline = "flushing", now + FLUSH_S
            self.api.stop()
        if self.phase == "flushing" and (now >= self.deadline or not self._unfinished()):
            for connection in self._unfinished():
                connection.transport.abort()
            await asyncio.sleep(0.01)  # the tasks of aborted connections end
            self.should_exit = True
        return await super().on_tick(counter)

    def abort(self, scope: Scope) -> None:
        """Close the connection of a request at once, whatever it has not read."""
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == scope["client"]:
                connection.transport.abort()

    def _unfinished(self) -> list[Any]:
        """Connections with a response that is incomplete, or not sent to its end."""
        found: list[Any] = []
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)
            is_answering = cycle is not None and not cycle.response_complete
            if is_answering or connection.transport.get_write_buffer_size():
                found.append(connection)
        return found


def listen(server: HttpServer, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, and until the requests in progress have ended or the grace time is over."""
    # Everything loaded so far lives as long as the server. Python's garbage collector would go through all of it, ten times for
    # a large JSON body, and stop all threads meanwhile.
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets=[listener])
    finally:
        server.api.close_reader()
