"""`Idempotency-Key`: a request that is sent again is not done again.

The first request of a key does the work; a repeat meanwhile waits for it, and takes over if it comes to nothing; a
repeat afterwards gets the stored answer. Refusals and failures are not stored. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flux_local.api.connection import done_while_connected
from flux_local.errors import DeadlineExceeded, IdempotencyKeyReused, InvalidValue, RateLimited, StorageFull, TryLater
from flux_local.history import History, Reply
from flux_local.plan import Source

HEADER = "idempotency-key"
MAX_KEY = 255
MOST_WAITING = 64
"""Repeats of an owner that may wait at a time: each has its picture in memory."""
Keep = Callable[[Response], Reply | None]
"""What is kept of an answer for its repeats: nothing without a key."""
OWN_HEADERS = ("content-length", "x-request-id")
"""Of an answer, that belong to the connection and not to the work."""


class Repeats:
    """The keys of this process, and those that the history keeps."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.running: dict[tuple[str, str, str], tuple[str, asyncio.Future[None]]] = {}
        self.waiting: Counter[str] = Counter()
        """By owner, repeats that wait for the first of their key."""

    async def once(
        self,
        request: Request,
        owner: str,
        route: str,
        fingerprint: str,
        seconds: float,
        make: Callable[[float, Keep], Awaitable[Response]],
    ) -> Response:
        """What `make` answers, or answered before under the same key.

        Args:
            fingerprint: of all that the client asked for.
            seconds: that the client gives it; more are not waited for another request of the key.
            make: called with what is left of them, and with what makes a reply of an answer; a promise (202) it has
                to keep itself, together with what it promises.

        Raises:
            InvalidValue: not a key. IdempotencyKeyReused: the key was used for something else.
            TryLater: the other request took too long. RateLimited: too many wait. Cancelled: the client went away.
        """
        key = key_of(request)
        if key is None:
            return await make(seconds, lambda answer: None)
        place, began = (owner, route, key), time.monotonic()

        def keep(answer: Response) -> Reply:
            headers = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
            id = request.scope["request_id"]
            return Reply(*place, id, fingerprint, answer.status_code, headers, bytes(answer.body))

        if waited := place in self.running:
            await self._others(request, place, fingerprint, began + seconds)
        ended = asyncio.get_running_loop().create_future()
        self.running[place] = (fingerprint, ended)
        try:
            if (stored := await self.history.reply(*place)) is not None:
                same(stored.fingerprint, fingerprint)
                return Response(stored.body, stored.status, {**stored.headers, "idempotent-replayed": "true"})
            left = began + seconds - time.monotonic()
            answer = await (made_late(make, left, keep) if waited else make(seconds, keep))
            if answer.status_code == 200:
                with contextlib.suppress(StorageFull):  # the pictures are there; a repeat would draw them again
                    await self.history.keep_reply(keep(answer))
            return answer
        finally:
            del self.running[place]
            ended.set_result(None)

    async def _others(self, request: Request, place: tuple[str, str, str], fingerprint: str, until: float) -> None:
        """Waits until no other request of the key is under way. Raises as `once`."""
        if self.waiting[place[0]] >= MOST_WAITING:
            raise RateLimited(
                "Too many requests wait for the first of their 'Idempotency-Key'. Try again after the time in "
                "Retry-After.",
                retry_after=5,
            )
        self.waiting[place[0]] += 1
        try:
            while (running := self.running.get(place)) is not None:
                same(running[0], fingerprint)
                await done_while_connected(request, running[1], until - time.monotonic())
        except TimeoutError:
            raise TryLater("The request that has this 'Idempotency-Key' is not done yet. Ask again later.") from None
        finally:
            self.waiting[place[0]] -= 1


async def made_late(make: Callable[[float, Keep], Awaitable[Response]], seconds: float, keep: Keep) -> Response:
    """What `make` answers in the time that waiting has left. Where that is too little, it was not the request's fault.

    Raises:
        TryLater: it was too little.
    """
    try:
        return await make(max(0.0, seconds), keep)
    except DeadlineExceeded as error:
        raise TryLater(
            "The first request with this 'Idempotency-Key' failed, and too little time was left for this one. Send it "
            "again."
        ) from error


def key_of(request: Request) -> str | None:
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not 1 <= len(keys[0]) <= MAX_KEY or not keys[0].isascii() or not keys[0].isprintable():
        raise InvalidValue(
            f"The header 'Idempotency-Key' takes 1 to {MAX_KEY} printable ASCII characters, once.",
            param="Idempotency-Key",
        )
    return keys[0]


def same(before: str, now: str) -> None:
    if before != now:
        raise IdempotencyKeyReused(
            "This 'Idempotency-Key' was used for another request. Take a new key for each request.",
            param="Idempotency-Key",
        )


def fingerprint_of(raw: Mapping[str, Any], source: Source | None, prefers: str) -> str:
    """Of everything that decides the answer, as the client sent it."""
    digest = hashlib.sha256(json.dumps([raw, prefers], sort_keys=True, default=str).encode())
    if source is not None:
        for picture in (source.image, source.mask):
            digest.update(repr(picture and picture.size).encode())
            digest.update(picture.tobytes() if picture is not None else b"")
    return digest.hexdigest()
