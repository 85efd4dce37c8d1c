"""Request bodies: read with a limit, JSON parsed strictly. Errors never repeat what was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from flux_local.errors import Cancelled, InvalidJson, RateLimited, RequestTooLarge, TryLater, UnsupportedMediaType

JSON_LIMIT = 1_000_000
WITHOUT_PICTURES = f"Without its pictures the request may have at most {JSON_LIMIT:,} bytes."
PICTURE = re.compile(rb'"(?:data:[^"]*|[a-z0-9+/=_\\-]{1024,})"', re.IGNORECASE)
"""A string of JSON that is a data URL, or was meant to be one."""
BEGUN = re.compile(rb'"(?:data:[^"]*|[a-z0-9+/=_\\-]*)', re.IGNORECASE)
"""What may become a `PICTURE`; one of more than `KEPT` bytes surely is one."""
KEPT = 1100
BODY_SECONDS, SLOWEST = 60.0, 100_000
"""For which a body may be on its way, and a second more for each so many bytes that have come."""


@contextlib.asynccontextmanager
async def arriving(limit: int) -> AsyncIterator[Callable[[int], None]]:
    """A body on its way: gives what is to be called with the number of bytes of each part.

    Raises:
        RequestTooLarge: more than `limit` bytes. TryLater: it comes too slowly. Cancelled: the client has gone.
    """
    began, received = asyncio.get_running_loop().time(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS) as patience:

            def count(more: int) -> None:
                nonlocal received
                received += more
                if received > limit:
                    raise RequestTooLarge(f"The request body may have at most {limit:,} bytes.")
                patience.reschedule(began + BODY_SECONDS + received / SLOWEST)

            yield count
    except TimeoutError as error:
        raise TryLater("The request's body did not come in time. Send it again, all at once.") from error
    except ClientDisconnect as error:
        raise Cancelled("The client went away.") from error


class Memory:
    """The bytes of large bodies that are held in memory at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Gives what is to be called for more; all of it is given back in the end. Raises `RateLimited`: no room."""
        own = 0

        def take(more: int) -> None:
            nonlocal own
            if self.taken + more > self.limit:
                raise RateLimited(
                    "Too much is being sent at a time. Try again after the time in Retry-After, or send pictures as "
                    "multipart/form-data, which waits on the disk.",
                    retry_after=5,
                )
            own += more
            self.taken += more

        try:
            yield take
        finally:
            self.taken -= own


MEMORY = Memory(512_000_000)
"""Eight of the largest bodies that may come."""


class Text:
    """Of a JSON body in parts, what is not a picture: it may have JSON_LIMIT bytes, and is counted as it comes in."""

    def __init__(self) -> None:
        self.size = 0
        self.begun = b""

    def __call__(self, part: bytes) -> None:
        """Raises `RequestTooLarge`."""
        found = PICTURE.sub(b"", self.begun + part)
        last = max(found.rfind(b'"'), 0)
        counted = last if BEGUN.fullmatch(found, last) else len(found)
        self.size += counted
        self.begun = found[counted : counted + KEPT]
        if self.size > JSON_LIMIT:
            raise RequestTooLarge(WITHOUT_PICTURES)


async def read(request: Request, limit: int, look: Callable[[bytes], None] = lambda part: None) -> bytes:
    """The body, `look` called for each part. Raises what `arriving` and `look` raise."""
    body = bytearray()
    async with arriving(limit) as count:
        async for chunk in request.stream():
            count(len(chunk))
            look(chunk)
            body += chunk
    return bytes(body)


@contextlib.asynccontextmanager
async def with_pictures(request: Request, limit: int) -> AsyncIterator[bytes]:
    """A body of JSON, with its share of MEMORY as long as the block lasts.

    Raises what `read`, `Memory.share` and `Text` raise.
    """
    text = Text()
    with MEMORY.share() as take:

        def look(part: bytes) -> None:
            take(len(part))
            text(part)

        yield await read(request, limit, look)


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UnsupportedMediaType, RequestTooLarge, InvalidJson.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("Send the request as JSON, with the header 'Content-Type: application/json'.")
    return parse(await read(request, JSON_LIMIT))


def parse(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, one value a name, finite numbers, no half characters, an object at the top.

    Raises:
        InvalidJson: anything else.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=refuse,
            parse_float=finite,
            parse_int=bounded,
            object_pairs_hook=unique,
        )
        # A lone surrogate is legal JSON but no text; encoding finds it wherever it hides.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidJson(
            "The body is not valid JSON: UTF-8, finite numbers, each name once. Check how it was made."
        ) from error
    if not isinstance(value, dict):
        raise InvalidJson('The body must be a JSON object, like {"prompt": "a red circle"}.')
    return value


def refuse(_: str) -> NoReturn:
    raise ValueError("no number")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("out of range")
    return value


def bounded(text: str) -> int:
    if len(text) > 300:  # beyond a double's range
        raise ValueError("out of range")
    return int(text)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found
