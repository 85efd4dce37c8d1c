"""Edits and variations: the picture and the mask out of a multipart form or a JSON body, decoded and checked."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from flux_local.api import bodies
from flux_local.decoder import SafeDecoder
from flux_local.errors import (
    InvalidValue,
    MissingParameter,
    RequestTooLarge,
    UnsupportedMediaType,
)
from flux_local.forms import form_value, from_form
from flux_local.parameters import BY_NAME, Route
from flux_local.plan import Source

BODY_LIMIT = 64_000_000
IMAGE_LIMIT = 50_000_000
PARTS = 64
PARSING = asyncio.Semaphore(2)
"""JSON bodies with pictures that are taken apart at a time: each needs several times its size for a moment."""
WITHOUT_PICTURES = f"Without its pictures the request may have at most {bodies.JSON_LIMIT:,} bytes."
PICTURE = re.compile(rb'"(?:data:[^"]*|[a-z0-9+/=_\\-]{1024,})"', re.IGNORECASE)
"""A string of JSON that is a data URL, or was meant to be one."""


async def read(request: Request, route: Route, decoder: SafeDecoder) -> tuple[dict[str, Any], Source]:
    """The request's parameters, typed, and its pictures; a mask on a route without is a name that changes nothing.

    Raises:
        RequestTooLarge, UnsupportedMediaType, InvalidJson, InvalidValue, InvalidImage, MissingParameter.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        raw, images, masks = await from_multipart(request)
    elif kind == "application/json":
        async with bodies.large(request, BODY_LIMIT) as body, PARSING:
            raw, images, masks = await asyncio.to_thread(from_json, body)
    else:
        raise UnsupportedMediaType("Send the request as multipart/form-data, or as JSON with data URLs.")
    if not images:
        raise MissingParameter("'image' is required: the picture to start from.", param="image")
    if len(images) > 1:
        raise InvalidValue("This model takes one image; send one.", param="image")
    if route not in BY_NAME["mask"].routes and masks:
        raw, masks = {**raw, "mask": ""}, []
    if len(masks) > 1:
        raise InvalidValue("Send one mask.", param="mask")
    for name, data in (("image", images[0]), *(("mask", mask) for mask in masks)):
        if len(data) > IMAGE_LIMIT:
            raise RequestTooLarge(f"An image may have at most {IMAGE_LIMIT:,} bytes.", param=name)
    image = await decoder.decode(images[0], "image")
    return raw, Source.of(image, await decoder.decode(masks[0], "mask") if masks else None)


async def from_multipart(request: Request) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """Fields and files of a form, counted while they come in; `image`, `image[]` and repeats of either are one list."""
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    adapters: dict[str, list[str]] = {"path": [], "scale": []}
    try:
        async with (
            bodies.arriving(BODY_LIMIT) as count,
            Request(in_latin_1(request), counted(request, count)).form(
                max_files=PARTS, max_fields=PARTS, max_part_size=BODY_LIMIT
            ) as form,
        ):
            for name, value in form.multi_items():
                plain = utf_8(name).removesuffix("[]")
                if isinstance(value, UploadFile):
                    data = await value.read() if plain in files else b""
                    if data or (plain in files and value.filename):  # a browser sends a field left empty as neither
                        files[plain].append(data)
                    continue
                value = utf_8(value)
                if (part := ADAPTER.fullmatch(utf_8(name))) is not None:
                    adapters[part[1] or "path"].append(value)
                elif plain in files and value:
                    files[plain].append(data_url(value, plain))
                elif plain not in files:
                    if plain in BY_NAME and fields.get(plain, value) != value:
                        raise InvalidValue(f"'{plain}' appears twice with different values.", param=plain)
                    fields[plain] = value
    except HTTPException as error:
        raise InvalidValue(
            "The multipart body is malformed or has too many parts. Check how it was made; the header Content-Type "
            "must name its boundary, as clients do by themselves."
        ) from error
    if sum(map(len, fields.values())) > bodies.JSON_LIMIT:
        raise RequestTooLarge(WITHOUT_PICTURES)
    found = from_form(fields)
    if adapters["path"] or adapters["scale"]:
        found.setdefault("loras", adapters_of(**adapters))
    return found, files["image"], files["mask"]


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


def from_json(body: bytes) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """`image` (or a list of them), `images[].image_url`, `mask`: data URLs, or objects with an `image_url`."""
    if len(body) > bodies.JSON_LIMIT and len(PICTURE.sub(b"", body)) > bodies.JSON_LIMIT:
        raise RequestTooLarge(WITHOUT_PICTURES)
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
