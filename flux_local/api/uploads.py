"""Edits and variations: the picture and the mask out of a multipart form or a JSON body, decoded and checked."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from PIL import Image
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from flux_local.api import bodies
from flux_local.decoder import SafeDecoder
from flux_local.errors import (
    Cancelled,
    InvalidImage,
    InvalidValue,
    MissingParameter,
    RequestTooLarge,
    UnsupportedMediaType,
)
from flux_local.forms import from_form
from flux_local.params import BY_NAME
from flux_local.plan import Source

BODY_LIMIT = 64_000_000
IMAGE_LIMIT = 50_000_000
PARTS = 64

Raw = Mapping[str, Any]


async def read(request: Request, decoder: SafeDecoder) -> tuple[dict[str, Any], Source]:
    """The request's parameters, typed, and its pictures.

    Raises:
        RequestTooLarge, UnsupportedMediaType, InvalidJson, InvalidValue, InvalidImage, MissingParameter.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        raw, images, masks = await from_multipart(request)
    elif kind == "application/json":
        raw, images, masks = from_json(bodies.parse(await bodies.read(request, BODY_LIMIT)))
    else:
        raise UnsupportedMediaType("Send the request as multipart/form-data, or as JSON with data URLs.")
    if not images:
        raise MissingParameter("'image' is required: the picture to start from.", param="image")
    if len(images) > 1:
        raise InvalidValue("This model takes one image; send one.", param="image")
    if len(masks) > 1:
        raise InvalidValue("Send one mask.", param="mask")
    for name, data in (("image", images[0]), *(("mask", mask) for mask in masks)):
        if len(data) > IMAGE_LIMIT:
            raise RequestTooLarge(f"An image may have at most {IMAGE_LIMIT:,} bytes.", param=name)
    width, height, rows = await decoder.decode(images[0], "image")
    image = Image.frombytes("RGB", (width, height), rows)
    if not masks:
        return raw, Source(image, None)
    width, height, rows = await decoder.decode(masks[0], "mask")
    if (width, height) != image.size:
        raise InvalidImage("The mask must have the image's size.", param="mask")
    return raw, Source(image, Image.frombytes("L", (width, height), rows))


async def from_multipart(request: Request) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """Fields and files of a form, counted while they come in; `image`, `image[]` and repeats of either are one list."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > BODY_LIMIT:
            raise RequestTooLarge(f"The request body may have at most {BODY_LIMIT:,} bytes.")
        return message

    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    try:
        async with Request(request.scope, counted).form(
            max_files=PARTS, max_fields=PARTS, max_part_size=bodies.JSON_LIMIT
        ) as form:
            for name, value in form.multi_items():
                plain = name.removesuffix("[]")
                if isinstance(value, UploadFile):
                    if plain in files:
                        files[plain].append(await value.read())
                elif plain in files and value:
                    files[plain].append(data_url(value, plain))
                elif plain not in files:
                    if plain in BY_NAME and fields.get(plain, value) != value:
                        raise InvalidValue(f"'{plain}' appears twice with different values.", param=plain)
                    fields[plain] = value
    except (MultiPartException, MultipartParseError) as error:
        raise InvalidValue("The multipart body is malformed or has too many parts. Check how it was made.") from error
    except ClientDisconnect as error:
        raise Cancelled("The client went away.") from error
    for value in fields.values():
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidValue("The form's text must be UTF-8.")
    return from_form(fields), files["image"], files["mask"]


def from_json(raw: dict[str, Any]) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """`image` (or a list of them), `images[].image_url`, `mask`: data URLs, or objects with an `image_url`."""
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
