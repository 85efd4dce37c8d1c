"""What is stored: a caller's requests, newest first, and the files behind `url` answers."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flux_local.api import schema
from flux_local.api.answers import JSON
from flux_local.api.auth import owner_of
from flux_local.api.requests import Requests
from flux_local.api.work import Services
from flux_local.errors import InvalidValue

MAX_PAGE = 100


def router(services: Services, requests: Requests) -> APIRouter:
    """The history and the files, without prefix."""
    routes = APIRouter()

    @routes.get("/images/requests", responses=schema.answers(schema.ENTRIES), openapi_extra=schema.PAGING)
    async def history(request: Request) -> dict[str, Any]:
        """The newest requests of the caller's key, the newest first; `after` an id, those before it."""
        limit = limit_of(request.query_params.get("limit"))
        entries = await services.history.page(owner_of(request), limit + 1, request.query_params.get("after"))
        return {"object": "list", "data": requests.views(entries[:limit]), "has_more": len(entries) > limit}

    @routes.get("/images/requests/{id}", responses=schema.answers(schema.ENTRY))
    async def history_entry(request: Request, id: str) -> Response:
        """One request: status, progress, parameters as run, result."""
        view = requests.view(await services.history.get(id, owner_of(request)))
        return await asyncio.to_thread(JSON, view)  # it may hold pictures

    @routes.delete("/images/requests/{id}", responses=schema.answers(schema.ENTRY))
    async def cancel(request: Request, id: str) -> Response:
        """Cancel what still runs and remove what is stored."""
        gone = {**requests.view(await requests.remove(id, owner_of(request))), "deleted": True}
        return await asyncio.to_thread(JSON, gone)

    @routes.get("/images/files/{name}", responses=schema.FILE_ANSWERS)
    async def file(request: Request, name: str) -> Response:
        """The bytes behind a `url` answer. They never change; whether they are there still is asked each time."""
        headers = {
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; sandbox",
            "content-disposition": "inline",  # no name: it would be this one, which is as good as a key
            "cache-control": "private, no-cache",
            "etag": f'"{hashlib.sha256(name.encode()).hexdigest()[:32]}"',
        }
        if headers["etag"] in (known := request.headers.get("if-none-match", "")) or known.strip() == "*":
            await asyncio.to_thread(services.store.find, name)
            return Response(status_code=304, headers=headers)
        data = await asyncio.to_thread(services.store.load, name)
        return Response(data, media_type=f"image/{name.rpartition('.')[2]}", headers=headers)

    return routes


def limit_of(text: str | None) -> int:
    """Entries on a page of the history."""
    if text is None:
        return MAX_PAGE
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_PAGE:
        raise InvalidValue(f"'limit' must be between 1 and {MAX_PAGE}.", param="limit")
    return int(text)
