"""A server of files on localhost that can fail: drop connections, redirect, answer with errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class FileServer:
    """What the server answers, and the paths that were asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(
        default_factory=list
    )  # of the next answers: bytes of the body before the connection is closed
    announce_length: bool = True
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # of the next answers, with headers
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def url(self, path: str) -> str:
        return self.address + path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: FileServer, *args: object) -> None:
        self.about = server
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        about = self.about
        about.asked.append(self.path)
        if about.statuses:
            status, headers = about.statuses.pop(0)
            self._answer(status, b"", headers)
        elif (target := about.redirects.get(self.path)) is not None:
            self._answer(302, b"", {"Location": target})
        elif (content := about.files.get(self.path)) is None:
            self._answer(404, b"", {})
        elif self.headers.get("If-None-Match") == f'"{len(content)}"':
            self._answer(304, b"", {})
        else:
            self._answer(200, content, {"ETag": f'"{len(content)}"'})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        cut = self.about.cut_after.pop(0) if status == 200 and self.about.cut_after else None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.about.announce_length:
            self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content if cut is None else content[:cut])
        self.close_connection = True


@contextmanager
def serving(files: dict[str, bytes] | None = None) -> Iterator[FileServer]:
    """A server of these files, by their paths, on a free port."""
    about = FileServer(dict(files or {}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, about))
    Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
    about.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield about
    finally:
        server.shutdown()
        server.server_close()
