"""What a board shows: the routes that only read."""

from typing import Any

from fastapi import APIRouter

from glmtuner.board.root import Root


class Views:
    """The routes below /api/ that read the folder. Each is a plain function, called in a thread."""

    def __init__(self, root: Root, read_only: bool) -> None:
        self.root, self.read_only = root, read_only
        self.router = APIRouter()
        self.router.get("/api/about")(self.about)

    def about(self) -> dict[str, Any]:
        """What the page needs to know once: the folder, and whether anything can be changed."""
        return {"folder": str(self.root.path), "read_only": self.read_only}
