"""The routes of a board that change something, over a folder `outputs`, and how tests ask them."""

import time
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from glmtuner.board.actions import Actions
from glmtuner.board.app import application
from glmtuner.board.root import Root

TOKEN = "a-token-of-24-characters"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "X-Glmtuner-Board": "1"}
TINY = ["model=tiny_glm", "tracker=none", "metric=none", "data.dataset=identity_sample", "trainer.max_steps=2"]


class ActingBoard:
    """The routes over a folder `outputs`, and what stands in it."""

    def __init__(self, here: Path) -> None:
        self.outputs = here / "outputs"
        self.outputs.mkdir()
        self.actions = Actions(Root(self.outputs))
        app = application([self.actions.router], TOKEN, ("testserver",))
        self.client = TestClient(app, headers=HEADERS, raise_server_exceptions=False)

    def post(self, name: str, **body: Any) -> tuple[int, Any]:
        answer = self.client.post(f"/api/{name}", json=body)
        return answer.status_code, answer.json()

    def get(self, name: str, **asked: Any) -> tuple[int, Any]:
        answer = self.client.get(f"/api/{name}", params=asked)
        return answer.status_code, answer.json()

    def refused(self, name: str, **body: Any) -> str:
        """The paragraph with which a change is refused, after which nothing is other than before."""
        before = tree(self.outputs)
        status, answer = self.post(name, **body)
        assert status in (400, 422), answer
        assert tree(self.outputs) == before
        assert "Traceback" not in answer["error"]
        return str(answer["error"])

    def ended(self, task: str, seconds: float = 200) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            status, answer = self.get("task", task=task)
            assert status == 200
            if answer["state"] == "ended":
                return dict(answer)
            time.sleep(0.1)
        raise AssertionError(answer)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
