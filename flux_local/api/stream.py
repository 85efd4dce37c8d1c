"""Server-sent events of a request in OpenAI's form: partial pictures, then one `completed` for each picture.

Nothing but comments and whole events is sent: no ids, no event without data, no `[DONE]`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.responses import StreamingResponse

from flux_local.api.answers import error_body
from flux_local.api.requests import Requests
from flux_local.api.work import OnEvent, OnPicture, Work
from flux_local.errors import FluxError, InternalError
from flux_local.messages import Done, Partial, Step

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, for the proxies between."""

log = logging.getLogger("flux_local.api")

Draw = Callable[[OnEvent, OnPicture], Coroutine[Any, Any, dict[str, Any]]]


def response(requests: Requests, work: Work, owner: str, route: str, family: str) -> StreamingResponse:
    """The stream. `family`: `image_generation` or `image_edit`."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    headers |= work.headers({"data": []})

    def run(on_event: OnEvent, on_picture: OnPicture) -> Coroutine[Any, Any, dict[str, Any]]:
        return requests.run(work, owner, route, on_event, on_picture)

    return StreamingResponse(events(work, run, family), media_type="text/event-stream", headers=headers)


async def events(work: Work, draw: Draw, family: str) -> AsyncIterator[bytes]:
    """Encoded events, until the pictures are finished or have failed. Closing it cancels the work."""
    queue: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
    several = len(work.params.seeds) > 1
    encoding: set[asyncio.Task[None]] = set()
    last_partial: dict[int, asyncio.Task[None]] = {}

    def common(index: int) -> dict[str, Any]:
        return {**work.facts(), "created_at": int(time.time()), **({"index": index} if several else {})}

    async def partial(index: int, message: Partial, before: asyncio.Task[None] | None) -> None:
        data = await asyncio.to_thread(work.file, message.pixels, index)
        if before is not None:
            await before
        body = {"partial_image_index": message.index, "b64_json": base64.b64encode(data).decode(), **common(index)}
        queue.put_nowait((f"{family}.partial_image", body))

    def on_event(index: int, event: Step | Partial) -> None:
        if isinstance(event, Partial):
            task = asyncio.create_task(partial(index, event, last_partial.get(index)))
            last_partial[index] = task
            encoding.add(task)
            task.add_done_callback(encoding.discard)

    async def completed(index: int, item: dict[str, Any], done: Done, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        queue.put_nowait((f"{family}.completed", {**item, **common(index), "usage": work.usage(done, 1)}))

    def on_picture(index: int, item: dict[str, Any], done: Done) -> None:
        task = asyncio.create_task(completed(index, item, done, last_partial.get(index)))
        encoding.add(task)
        task.add_done_callback(encoding.discard)

    async def run() -> None:
        try:
            await draw(on_event, on_picture)
            await asyncio.gather(*encoding)
        except FluxError as error:
            queue.put_nowait(("error", error_body(error)))
        except Exception:  # the boundary of a request: the status is sent, only an event can tell
            log.exception("request %s failed while streaming", work.id)
            queue.put_nowait(("error", error_body(InternalError("The server failed on this request."))))
        finally:
            queue.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        yield b": generating\n\n"
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    event = await queue.get()
            except TimeoutError:
                yield b": keep-alive\n\n"
                continue
            if event is None:
                return
            kind, body = event
            payload = body if kind == "error" else {"type": kind, **body}
            yield f"event: {kind}\ndata: {json.dumps(payload)}\n\n".encode()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
