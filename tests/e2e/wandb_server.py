"""As much of a W&B server as a run without media asks for: it takes the login, tells how far a run is, keeps its rows."""

import gzip
import http.server
import json
import re
from typing import Any

OWNER = {
    "id": "e",
    "entity": "team",
    "username": "me",
    "email": "me@example.org",
    "flags": "{}",
    "teams": {"edges": []},
}


class WandbServer(http.server.ThreadingHTTPServer):
    """Answers on a free port of this machine. Any key is good but the one it refuses."""

    def __init__(self, refused: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refused = refused
        self.gone = False  # True: no request is answered any more
        self.run: dict[str, Any] | None = None  # what the last upsert said
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.ends: list[dict[str, Any]] = []  # how sessions ended: complete, exitcode, preempting
        self.files: set[str] = set()  # names the run announced

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The `data` of a GraphQL request; None for what this server does not know."""
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "team"}}
        match re.search(r"(?:query|mutation)\s+(\w+)", query).group(1):
            case "Viewer":
                return {"viewer": OWNER}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self._state()} if self.run else None}
            case "UpsertBucket":
                self.run = {name: value for name, value in {**(self.run or {}), **given}.items() if value is not None}
                return {"upsertBucket": {"bucket": {**self._state(), "project": project}, "inserted": True}}
            case "CreateRunFiles":
                self.files |= {*given["files"]}
        return None

    def _state(self) -> dict[str, Any]:
        assert self.run is not None
        tail = [json.dumps(self.rows[-1])] if self.rows else []
        return {
            "id": "b", "name": self.run["name"], "displayName": self.run.get("displayName"), "config": "{}", "tags": [],
            "summaryMetrics": json.dumps(self.summary), "historyLineCount": len(self.rows), "historyTail": json.dumps(tail),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "wandbConfig": '{"t": {}}',
        }  # fmt: skip

    def stream(self, message: dict[str, Any]) -> None:
        """Rows at their offset, the summary, and how a session ended."""
        for name, part in (message.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]]
            if name == "wandb-history.jsonl":
                self.rows[part["offset"] : part["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                self.summary = lines[-1]
        ended = {name: message[name] for name in ("preempting", "complete", "exitcode") if name in message}
        if ended:
            self.ends.append(ended)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        if self.server.gone:
            self.close_connection = True
            return None
        if self.path == "/graphql":
            asked = json.loads(body)
            if self.server.refused and self.server.refused in self._key():
                return self._reply(401, {"data": None})
            data = self.server.answer(asked["query"], asked.get("variables") or {})
            return self._reply(200, {"data": data} if data else {"data": None, "errors": [{"message": "unknown"}]})
        if self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body))
        return self._reply(200, {})

    def _key(self) -> str:
        from base64 import b64decode

        return b64decode(self.headers.get("Authorization", "").rpartition(" ")[2]).decode()

    def _reply(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass
