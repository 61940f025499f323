"""The routes of a board: its page, what is in its folder, and what can be done with it."""

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from glmtuner.board.access import BoardFilter
from glmtuner.errors import GlmtunerError

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def application(
    routers: list[APIRouter],
    token: str | None,
    hosts: tuple[str, ...] | None,
    abort: Callable[[Scope], None] = lambda scope: None,
) -> BoardFilter:
    """The application: the files of the page at / and /page/, and the routers, whose paths begin with /api/ or /files/.

    Errors are JSON, {"error": one paragraph}: 400 for a GlmtunerError, 401, 403, 404, 405, 408, 413, 422 or 500. `abort` closes the
    connection of a client that stopped reading.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    files = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.suffix in TYPES}

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(files["index.html"], media_type="text/html")

    @app.get("/page/{name:path}")
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return FileResponse(files[name], media_type=TYPES[files[name].suffix], headers={"Cache-Control": "no-cache"})

    for router in routers:
        app.include_router(router)

    @app.exception_handler(GlmtunerError)
    async def users_error(_: Request, error: GlmtunerError) -> Response:
        return _failed(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _failed(422, f"{place}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        words = {404: "does not exist", 405: f"does not take {request.method}"}
        return _failed(error.status_code, f"{request.url.path[:200]} {words.get(error.status_code, error.detail)}")

    @app.exception_handler(Exception)
    async def crash(_: Request, error: Exception) -> Response:
        return _failed(500, f"the board failed on this request ({type(error).__name__}); its output says why")

    return BoardFilter(app, token=token, hosts=hosts, abort=abort)  # around everything: errors have its headers, too


def _failed(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
