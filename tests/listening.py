"""A server of a loaded run on a port of its own, in a thread of this process, and the official client of it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import OpenAI


@contextmanager
def listening(finished: Any, rows: int = 4, grace_s: float = 10.0, delay_s: float = 0.0) -> Iterator[tuple[Any, int]]:
    """(the HTTP server, its port); every step of the model takes `delay_s` seconds longer."""
    from glmtuner.cli.serve import bind_listener
    from glmtuner.serving.app import Limits, Server, max_characters
    from glmtuner.serving.engine import Engine
    from glmtuner.serving.listen import HttpServer

    engine = Engine(finished, rows, 64)
    step = engine.decoder.step
    engine.decoder.step = lambda batch: (time.sleep(delay_s), step(batch))[1]  # type: ignore[method-assign]
    engine.start()
    listener = bind_listener("127.0.0.1", 0)
    api = Server(finished, engine, "m", Limits(max_characters=max_characters(finished), timeout_s=60))
    server = HttpServer(api, None, ("127.0.0.1", "localhost"), grace_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        engine.close()
        api.close_reader()
        listener.close()
    assert not thread.is_alive()


@contextmanager
def official_client(finished: Any) -> Iterator[OpenAI]:
    """OpenAI's client of a server of the run; the model is named m."""
    with listening(finished, rows=8) as (_, port):
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
