"""Waiting on behalf of a client that may go away. Knows nothing of what is waited for."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from flux_local.errors import Cancelled


async def done_while_connected(request: Request, future: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Waits until the future is done, whatever its result. The request's body must have been read.

    Raises:
        Cancelled: the client went away first. TimeoutError: the seconds passed first.
    """
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({future, gone}, timeout=seconds and max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return
        raise Cancelled("The client went away.") if gone.done() else TimeoutError
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
