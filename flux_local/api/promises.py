"""Work as bytes, so that a later process can do what an earlier one promised.

Knows neither requests nor where the bytes are kept.
"""

from __future__ import annotations

import math

import msgspec
from PIL import Image

from flux_local.api.work import Services, Work
from flux_local.errors import InternalError
from flux_local.history import Entry
from flux_local.params import GenerationParams
from flux_local.plan import Source


class Stored(msgspec.Struct, frozen=True):
    """`size`: of the picture to start from, [width, height]; `image` and `mask`: its rows, RGB and a byte a pixel."""

    model: str
    params: GenerationParams
    base_url: str
    size: tuple[int, int] | None
    image: bytes | None
    mask: bytes | None
    seconds: float | None = None
    """That its client gave it; None of a process that did not say."""


def packed(work: Work) -> bytes:
    source = work.plan.source
    stored = Stored(
        work.plan.model,
        work.params,
        work.base_url,
        source.image.size if source else None,
        source.image.tobytes() if source else None,
        source.mask.tobytes() if source and source.mask else None,
        work.seconds,
    )
    return msgspec.msgpack.encode(stored)


def unpacked(entry: Entry, services: Services) -> Work:
    """The work of an entry that has some.

    Raises:
        InternalError: it was for another model. msgspec.MsgspecError, ValueError: another version wrote it. What
            `Services.plan` raises.
    """
    assert entry.work is not None
    stored = msgspec.msgpack.decode(entry.work, type=Stored)
    if stored.model != services.model.name:
        raise InternalError("The server has another model now. Send the request again, for this one.")
    source = None
    if stored.size is not None and stored.image is not None:
        mask = Image.frombytes("L", stored.size, stored.mask) if stored.mask else None
        source = Source(Image.frombytes("RGB", stored.size, stored.image), mask)
    seconds = min(stored.seconds or math.inf, services.settings.request_timeout)
    return Work(services, entry.id, stored.base_url, services.plan(stored.params, source), entry.owner, seconds)
