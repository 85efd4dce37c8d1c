"""The web page: static files of the package, for anybody, allowed to load and call nothing but this server.

What the page shows it asks the API for, as any other client.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import FileResponse

from flux_local import web
from flux_local.errors import NotFound

FILES = {path.name: path for path in web.FOLDER.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")}
PATHS = frozenset({b"/", *(f"/web/{name}".encode() for name in FILES)})
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page() -> APIRouter:
    """The page at the root, and its parts."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def index() -> FileResponse:
        return FileResponse(FILES["index.html"], headers=HEADERS)

    @routes.get("/web/{name}")
    async def part(name: str) -> FileResponse:
        if name not in FILES:
            raise NotFound("The page has no such part.")
        return FileResponse(FILES[name], headers=HEADERS)

    return routes
