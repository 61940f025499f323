"""A small model and dataset hub on localhost: the part of the Hugging Face hub's HTTP interface that its client uses."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


def serve(
    root: Path, first_statuses: Iterable[int] = (), cuts: dict[str, list[int]] | None = None
) -> ThreadingHTTPServer:
    """Serve `root/models/<org>/<name>` and `root/datasets/<org>/<name>` on a free port, until `shutdown()`.

    The first requests are answered with `first_statuses`, as by a server that is failing. `cuts` are the bytes, by the name of
    a file, after which the connection is lost in the next answers with it.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root, iter(first_statuses), cuts or {}))
    Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, first_statuses: Iterator[int], cuts: dict[str, list[int]], *args: object) -> None:
        self.root, self.first_statuses, self.cuts = root, first_statuses, cuts
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if (status := next(self.first_statuses, None)) is not None:
            self._answer(status, {"error": "failing"})
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            good = self.headers.get("Authorization") == "Bearer good"
            self._answer(
                200 if good else 401, {"name": "me", "type": "user"} if good else {"error": "Invalid credentials"}
            )
            return
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1], "/".join(parts[2:4]), parts[4:])
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            self._file(kind, "/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if (
            path == "api/repos/create"
            or "/branch/" in path
            or "/preupload/" in path
            or "/commit/" in path
            or path.endswith("/objects/batch")
        ):
            self._written(path, self._body())
            return
        body = self._body().decode()
        asked = json.loads(body) if "json" in (self.headers.get("Content-Type") or "") else parse_qs(body)
        self.asked = asked.get("paths", [])
        self.do_GET()

    def do_PUT(self) -> None:
        """A large file's bytes."""
        place = self.root / "lfs" / self.path.rpartition("/")[2]
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(self._body())
        self._answer(200, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _written(self, path: str, body: bytes) -> None:
        """What an upload asks for: a repository, where each file goes, and the commit; all of it with the token `good`."""
        if self.headers.get("Authorization") != "Bearer good":
            self._answer(401, {"error": "Invalid username or password."})
            return
        endpoint = f"http://{self.headers['Host']}"
        if path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.root / "models" / repo).mkdir(parents=True, exist_ok=True)
            (self.root / "created.json").write_bytes(body)
            self._answer(200, {"url": f"{endpoint}/{repo}", "id": repo, "name": repo})
        elif "/branch/" in path:
            (self.root / "branch").write_text(path.rpartition("/")[2], encoding="utf-8")
            self._answer(200, {})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > 100_000 else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{endpoint}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            repo = "/".join(path.split("/")[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                target = self.root / "models" / repo / line["value"].get("path", "")
                target.parent.mkdir(parents=True, exist_ok=True)
                if line["key"] == "file":
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "lfsFile":
                    target.write_bytes((self.root / "lfs" / line["value"]["oid"]).read_bytes())
            self._answer(
                200, {"commitOid": COMMIT, "commitUrl": f"{endpoint}/{repo}/commit/{COMMIT}", "hookOutput": ""}
            )

    def _api(self, kind: str, repo: str, rest: list[str]) -> None:
        folder = self.root / kind / repo
        if not folder.is_dir():
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _digest(path)}
            for path in files
        ]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            about = {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "gated": False, "disabled": False}
            self._answer(200, {**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})
        elif rest[0] == "tree":
            under = folder / "/".join(rest[2:])
            inside = [entry for entry in entries if (folder / str(entry["path"])).is_relative_to(under)]
            if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
                inside = [entry for entry in inside if (folder / str(entry["path"])).parent == under]
                inside += [_directory(path.relative_to(folder)) for path in under.glob("*") if path.is_dir()]
            self._answer(200, inside)
        elif rest[0] == "paths-info":
            asked = [self.asked] if isinstance(self.asked, str) else self.asked
            folders = [_directory(Path(path)) for path in asked if (folder / path).is_dir()]
            self._answer(200, [entry for entry in entries if entry["path"] in asked] + folders)
        else:
            self._answer(404, {"error": "not found"})

    def _file(self, kind: str, repo: str, name: str) -> None:
        path = self.root / kind / repo / name
        if not path.is_file():
            code = "EntryNotFound" if (self.root / kind / repo).is_dir() else "RepoNotFound"
            self._answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        self._answer(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        cuts = self.cuts.get(unquote(urlsplit(self.path).path).rpartition("/")[2])
        if self.command != "HEAD" and cuts and status == 200:
            self.wfile.write(content[: cuts.pop(0)])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)


def _directory(path: Path) -> dict[str, object]:
    return {"type": "directory", "path": path.as_posix(), "oid": COMMIT, "size": 0}


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
