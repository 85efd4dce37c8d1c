"""Edits and variations: the picture and the mask out of a multipart form or a JSON body, decoded and checked."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from flux_local.api import bodies
from flux_local.decoder import Decode
from flux_local.errors import (
    InvalidValue,
    MissingParameter,
    RequestTooLarge,
    StorageFull,
    UnsupportedMediaType,
)
from flux_local.forms import form_value, from_form
from flux_local.parameters import BY_NAME, Route
from flux_local.plan import Source

BODY_LIMIT = 64_000_000
IMAGE_LIMIT = 50_000_000
PARTS = 64
PICTURES = ("image", "mask")
PARSING = asyncio.Semaphore(2)
"""JSON bodies with pictures that are taken apart at a time: each needs several times its size for a moment."""

File = bytes | UploadFile


@dataclass(frozen=True)
class Upload:
    """A request's parameters, typed, and its pictures as they were sent: in memory or on the disk."""

    raw: dict[str, Any]
    image: File
    mask: File | None

    async def decoded(self, decode: Decode) -> Source:
        """Raises what `decode` and `Source.of` raise."""
        image = await decode(await bytes_of(self.image), "image")
        return Source.of(image, None if self.mask is None else await decode(await bytes_of(self.mask), "mask"))


@contextlib.asynccontextmanager
async def received(request: Request, route: Route) -> AsyncIterator[Upload]:
    """What was sent. It has its share of the memory, or its files, as long as the block lasts. A mask on a route
    without is a name that changes nothing.

    Raises:
        RequestTooLarge, UnsupportedMediaType, InvalidJson, InvalidValue, MissingParameter, RateLimited, StorageFull.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    async with contextlib.AsyncExitStack() as stack:
        if kind == "multipart/form-data":
            sent = await from_multipart(request, stack)
        elif kind == "application/json":
            body = await stack.enter_async_context(bodies.with_pictures(request, BODY_LIMIT))
            async with PARSING:
                sent = await asyncio.to_thread(from_json, body)
            del body
        else:
            raise UnsupportedMediaType("Send the request as multipart/form-data, or as JSON with data URLs.")
        yield checked(route, *sent)


def checked(route: Route, raw: dict[str, Any], images: Sequence[File], masks: Sequence[File]) -> Upload:
    """One image and at most one mask, neither too large."""
    if not images:
        raise MissingParameter("'image' is required: the picture to start from.", param="image")
    if len(images) > 1:
        raise InvalidValue("This model takes one image; send one.", param="image")
    if route not in BY_NAME["mask"].routes and masks:
        raw, masks = {**raw, "mask": ""}, []
    if len(masks) > 1:
        raise InvalidValue("Send one mask.", param="mask")
    for name, file in (("image", images[0]), *(("mask", mask) for mask in masks)):
        if isinstance(file, bytes) and len(file) > IMAGE_LIMIT:  # a form's files are counted as they come in
            raise image_too_large(name)
    return Upload(raw, images[0], masks[0] if masks else None)


def image_too_large(name: str | None) -> RequestTooLarge:
    return RequestTooLarge(f"An image may have at most {IMAGE_LIMIT:,} bytes.", param=name)


async def bytes_of(file: File) -> bytes:
    return file if isinstance(file, bytes) else await file.read()


Sent = tuple[dict[str, Any], Sequence[File], Sequence[File]]
"""Parameters, images, masks."""


class Parts(MultiPartParser):
    """A form's parts, counted as they come in: each file, all text together, and the memory of what is no file, or of
    a file's beginning, which Starlette keeps there."""

    spool_max_size = 1 << 16

    def __init__(self, request: Request, take: Callable[[int], None]) -> None:
        """
        Args:
            take: called for memory.
        """
        super().__init__(request.headers, request.stream(), max_files=PARTS, max_fields=PARTS, max_part_size=BODY_LIMIT)
        self.take = take
        self.part = self.text = 0
        self.whole = False
        """Whether the closing boundary has come."""

    def on_end(self) -> None:
        super().on_end()
        self.whole = True

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self.part = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Raises `RequestTooLarge`, and what `take` raises."""
        name, is_file = plain(self._current_part.field_name), self._current_part.file is not None
        self.part += end - start
        if is_file and self.part > IMAGE_LIMIT:
            raise image_too_large(name if name in PICTURES else None)
        if not is_file or self.part <= self.spool_max_size:
            self.take(end - start)
        if not is_file:
            self.text += 0 if name in PICTURES else end - start
        if self.text > bodies.JSON_LIMIT:
            raise RequestTooLarge(bodies.WITHOUT_PICTURES)
        super().on_part_data(data, start, end)


async def from_multipart(request: Request, stack: contextlib.AsyncExitStack) -> Sent:
    """Fields and files of a form, counted while they come in; `image`, `image[]` and repeats of either are one list.

    Args:
        stack: keeps the files, and the share of the memory of pictures in fields, until it closes.
    """
    fields: dict[str, str] = {}
    files: dict[str, list[File]] = {name: [] for name in PICTURES}
    adapters: dict[str, list[str]] = {"path": [], "scale": []}
    unknown: list[str] = []
    take = stack.enter_context(bodies.MEMORY.share())
    try:
        async with bodies.arriving(BODY_LIMIT) as count:
            parts = Parts(Request(in_latin_1(request), counted(request, count)), take)
            form = await parts.parse()
            stack.push_async_callback(form.close)
            if not parts.whole:
                raise MultiPartException("no closing boundary")
    except MultiPartException as error:
        raise InvalidValue(
            "The multipart body is malformed, incomplete or has too many parts. Check how it was made; the header "
            "Content-Type must name its boundary, as clients do by themselves."
        ) from error
    except OSError as error:  # what is large is put into a file
        raise StorageFull(
            "The server has no room for the upload. Send the picture as JSON, or free space on the server."
        ) from error
    named = [(utf_8(name), value) for name, value in form.multi_items()]
    for full, value in named:
        name = plain(full)
        if isinstance(value, UploadFile):
            if name not in files:
                if name in BY_NAME:
                    raise InvalidValue(f"'{name}' came as a file. Send it as a text field.", param=name)
                unknown.append(name)
            elif value.size or value.filename:  # a browser sends a field left empty as neither
                files[name].append(value)
        elif (part := ADAPTER.fullmatch(full)) is not None:
            adapters[part[1] or "path"].append(utf_8(value))
        elif name in files and value:
            async with PARSING:
                files[name].append(await asyncio.to_thread(from_field, value, name))
        elif name not in files:
            value = utf_8(value)
            if name in BY_NAME and fields.get(name, value) != value:
                raise InvalidValue(f"'{name}' appears twice with different values.", param=name)
            fields[name] = value
    found = from_form(fields)
    if adapters["path"] or adapters["scale"]:
        found.setdefault("loras", adapters_of(**adapters))
    return (
        {**dict.fromkeys(unknown, ""), **found},
        files["image"],
        files["mask"],
    )


def from_field(text: str, name: str) -> bytes:
    return data_url(utf_8(text), name)


def plain(name: str) -> str:
    return name.removesuffix("[]")


def counted(request: Request, count: Callable[[int], None]) -> Receive:
    """The request's messages, each counted by its bytes."""

    async def receive() -> Message:
        message = await request.receive()
        count(len(message.get("body", b"")))
        return message

    return receive


def in_latin_1(request: Request) -> Scope:
    """The request's scope with a form that is said to be in Latin-1, which gives every byte back: `utf_8` decodes.

    A charset of the client's own could be any codec of Python's, some of them slow enough to stop a server.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"").replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    kind = b"multipart/form-data; charset=latin-1" + (b'; boundary="' + boundary + b'"' if boundary else b"")
    others = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    return {**request.scope, "headers": [*others, (b"content-type", kind)]}


def utf_8(text: str) -> str:
    """A form's bytes, given as Latin-1, as the text that they are."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError as error:
        raise InvalidValue("The form's text must be UTF-8.") from error


ADAPTER = re.compile(r"loras\[[0-9]*\](?:\[(path|scale)\])?")
"""A list of adapters as the official clients put it into a form: all `loras[][path]`, then all `loras[][scale]`."""


def adapters_of(path: list[str], scale: list[str]) -> list[dict[str, Any]]:
    """The list that was taken apart.

    Raises:
        InvalidValue: some have a scale and some have not, so that nobody knows which.
    """
    if not scale:
        return [{"path": name} for name in path]
    if len(scale) != len(path):
        raise InvalidValue("In a form, give each of 'loras' its path and its scale, or none a scale.", param="loras")
    return [{"path": name, "scale": form_value("number", by)} for name, by in zip(path, scale, strict=True)]


def from_json(body: bytes) -> Sent:
    """`image` (or a list of them), `images[].image_url`, `mask`: data URLs, or objects with an `image_url`."""
    raw = bodies.parse(body)
    given = {name: value for name, value in raw.items() if name not in ("image", "images", "mask")}
    images = [*as_list(raw.get("image")), *as_list(raw.get("images"))]
    return (
        given,
        [data_url(image, "image") for image in images],
        [data_url(mask, "mask") for mask in as_list(raw.get("mask"))],
    )


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def data_url(value: Any, name: str) -> bytes:
    """The bytes of a data URL. This server fetches no other kind."""
    if isinstance(value, dict):
        value = value.get("image_url", value.get("url"))
        if isinstance(value, dict):
            value = value.get("url")
    if isinstance(value, str) and value[:5].lower() == "data:":
        head, comma, body = value.partition(",")
        if comma and head.lower().endswith(";base64"):
            try:
                return base64.b64decode("".join(body.split()), validate=True)
            except (binascii.Error, ValueError):
                pass
    raise InvalidValue(
        f"'{name}' must be a data URL with base64 (data:image/png;base64,…). This server fetches no URLs.", param=name
    )
