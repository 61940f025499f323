"""A small ModelScope on localhost: the part of its plain HTTP interface that is used."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class ModelScope:
    """Serves `root/models/<org>/<name>` and `root/datasets/<org>/<name>`.

    `asked` are the paths and queries of the requests, with their Range; `cuts` are the bytes, by the name of a file, after which
    the connection is lost in the next answers with it; `digests` are the sha256 that are listed in place of the right ones.
    """

    root: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)
    extra: list[dict[str, Any]] = field(default_factory=list)  # files that are listed as well
    tokens: list[str | None] = field(default_factory=list)
    address: str = ""

    def files_asked(self) -> list[str]:
        """The names of the files that were downloaded, or begun, in order."""
        return [
            query["FilePath"][0]
            for query in (parse_qs(urlsplit(url).query) for url, _ in self.asked)
            if "FilePath" in query
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, about: ModelScope, *args: Any) -> None:
        self.about = about
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        about, parts = self.about, urlsplit(self.path)
        about.asked.append((self.path, self.headers.get("Range")))
        about.tokens.append(self.headers.get("Authorization"))
        words, query = (
            parts.path.strip("/").split("/"),
            {key: values[0] for key, values in parse_qs(parts.query).items()},
        )
        if words[:2] != ["api", "v1"] or len(words) < 6 or words[5] != "repo":
            self._answer(404, b"{}")
            return
        kind, folder = words[2], about.root / words[2] / words[3] / words[4]
        if not folder.is_dir():
            self._answer(404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        elif words[6:] == (["files"] if kind == "models" else ["tree"]):
            self._list(folder, query, paged=kind == "datasets")
        elif not words[6:]:
            self._file(folder / query["FilePath"])
        else:
            self._answer(404, b"{}")

    def _list(self, folder: Path, query: dict[str, str], paged: bool) -> None:
        assert query["Recursive"] == "true" and query["Revision"]
        entries: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                entries.append({"Path": name, "Name": path.name, "Type": "tree", "Size": 0, "Sha256": ""})
                continue
            digest = self.about.digests.get(name, hashlib.sha256(path.read_bytes()).hexdigest())
            entries.append(
                {"Path": name, "Name": path.name, "Type": "blob", "Size": path.stat().st_size, "Sha256": digest}
            )
        entries += self.about.extra
        if paged:
            size, page = int(query["PageSize"]), int(query["PageNumber"])
            entries = entries[size * (page - 1) : size * page]
        self._answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, b"{}")
            return
        content, headers = path.read_bytes(), {"ETag": f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'}
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], headers, path.name)
        else:
            self._answer(200, content, headers, path.name)

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, name: str = "") -> None:
        cuts = self.about.cuts.get(name)
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content)), "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: cuts.pop(0)] if cuts else content)
        self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[ModelScope]:
    """A server of these repositories on a free port."""
    about = ModelScope(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, about))
    Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
    about.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield about
    finally:
        server.shutdown()
        server.server_close()
