"""Server-sent events of a request in OpenAI's form: partial pictures, then one `completed` for each picture.

Nothing but comments and whole events is sent: no ids, no event without data, no `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from flux_local.api.answers import GENERIC, error_body
from flux_local.api.requests import Requests
from flux_local.api.work import Work, as_text
from flux_local.errors import FluxError, InternalError
from flux_local.messages import Done, Partial, Step

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent, for the proxies between."""

log = logging.getLogger("flux_local.api")


async def response(requests: Requests, work: Work, route: str, family: str) -> EventStream:
    """The stream of accepted work. `family`: `image_generation` or `image_edit`.

    Raises:
        What `Requests.begin` raises: until the first byte a refusal is a status like any other.
    """
    events = Events(work, family)
    task = await requests.begin(work, route, events.on_event, events.on_picture)
    return EventStream(events, task, work.headers())


class EventStream(StreamingResponse):
    """Ends the work when the answer ends, however it ends: read to the end, cut off, or never begun."""

    def __init__(self, events: Events, task: asyncio.Task[dict[str, Any]], headers: dict[str, str]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", **headers}
        super().__init__(events.encoded(task), media_type="text/event-stream", headers=headers)
        self.task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.task.cancel()


class Events:
    """What has happened to a request, in the order in which its client is told."""

    def __init__(self, work: Work, family: str) -> None:
        self.work = work
        self.family = family
        self.several = len(work.params.seeds) > 1
        self.queue: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
        self.last: dict[int, asyncio.Task[None]] = {}
        """Of each picture, what tells its last event, after what tells the one before."""
        self.told: dict[int, int] = {}
        """Of each picture, the partial picture told last; a picture that is drawn again has them all again."""

    def on_event(self, index: int, event: Step | Partial) -> None:
        if isinstance(event, Partial) and event.index > self.told.get(index, -1):
            self.told[index] = event.index
            self._tell(index, self._partial(index, event, self.last.get(index)))

    def on_picture(self, index: int, item: dict[str, Any], done: Done) -> None:
        self._tell(index, self._completed(index, item, done, self.last.get(index)))

    def _tell(self, index: int, telling: Coroutine[Any, Any, None]) -> None:
        self.last[index] = asyncio.create_task(telling)

    async def _partial(self, index: int, message: Partial, before: asyncio.Task[None] | None) -> None:
        text = await asyncio.to_thread(lambda: as_text(self.work.plan.file(index, message.pixels)))
        if before is not None:
            await before
        body = {"partial_image_index": message.index, "b64_json": text}
        self.queue.put_nowait((f"{self.family}.partial_image", {**body, **self._common(index)}))

    async def _completed(self, index: int, item: dict[str, Any], done: Done, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        # The file's URL is for the history: until all of the request has succeeded the file may yet be removed.
        told = {name: value for name, value in item.items() if name != "url"}
        body = {**told, **self._common(index), "usage": self.work.usage(done, 1)}
        self.queue.put_nowait((f"{self.family}.completed", body))

    def _common(self, index: int) -> dict[str, Any]:
        return {**self.work.facts(), "created_at": int(time.time()), **({"index": index} if self.several else {})}

    async def _follow(self, task: asyncio.Task[dict[str, Any]]) -> None:
        """Puts the end of the request at the end of the queue."""
        try:
            await task
            await asyncio.gather(*self.last.values())
        except FluxError as error:
            self.queue.put_nowait(("error", error_body(error)))
        except Exception:  # the boundary of a request: the status is sent, only an event can tell
            log.exception("request %s failed while streaming", self.work.id)
            self.queue.put_nowait(("error", error_body(InternalError(GENERIC))))
        finally:
            self.queue.put_nowait(None)

    async def encoded(self, task: asyncio.Task[dict[str, Any]]) -> AsyncIterator[bytes]:
        """The events as they come, until the pictures are finished or have failed."""
        follower = asyncio.create_task(self._follow(task))
        try:
            yield b": generating\n\n"
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE):
                        event = await self.queue.get()
                except TimeoutError:
                    yield b": keep-alive\n\n"
                    continue
                if event is None:
                    return
                kind, body = event
                payload = body if kind == "error" else {"type": kind, **body}
                yield b"event: %s\ndata: %s\n\n" % (kind.encode(), on_one_line(payload))
        finally:
            follower.cancel()


def on_one_line(payload: dict[str, Any]) -> bytes:
    """As JSON, without what some clients take for the end of a line although it is none of JSON's or of an event's."""
    text = msgspec.json.encode(payload)
    for sign in ("\u0085", "\u2028", "\u2029"):
        text = text.replace(sign.encode(), b"\\u%04x" % ord(sign))
    return text
