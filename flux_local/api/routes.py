"""The routes that draw: a request in, an answer out. What it means is decided in `params`, `work` and `requests`."""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flux_local.api import bodies, schema, stream, uploads
from flux_local.api.answers import JSON
from flux_local.api.auth import owner_of
from flux_local.api.connection import done_while_connected
from flux_local.api.repeats import HEADER, Keep, Repeats, fingerprint_of
from flux_local.api.requests import Requests
from flux_local.api.work import Services, Work, base_url
from flux_local.errors import InvalidValue, TryLater
from flux_local.history import Entry
from flux_local.parameters import Route
from flux_local.params import GenerationParams, generation_params
from flux_local.plan import Source
from flux_local.sizes import Size


def router(services: Services, requests: Requests, repeats: Repeats) -> APIRouter:
    """Pictures from prompts and pictures, without prefix."""
    routes = APIRouter()
    in_json, with_files = (partial(body, model=services.model) for body in (schema.json_body, schema.image_body))

    def checked(raw: dict[str, Any], route: Route, image: Size | None = None) -> GenerationParams:
        return generation_params(
            raw,
            services.model,
            route=route,
            image=image,
            response_format=services.settings.response_format,
            go_fast=services.settings.fast_by_default(services.dispatcher.precisions),
            max_pixels=services.settings.max_pixels,
        )

    async def prepared(
        request: Request, route: Route, raw: dict[str, Any], source: Source | None = None
    ) -> tuple[GenerationParams, Source | None, str]:
        """What is asked for, what of, and the fingerprint that a repeat of it has."""
        params = checked(raw, route, Size(*source.image.size) if source else None)
        for name in ("stream", "sync_mode"):
            if getattr(params, name) and HEADER in request.headers:
                raise InvalidValue(f"'{name}' does not go with an 'Idempotency-Key'; leave one out.", param=name)
        fingerprint = ""
        if HEADER in request.headers:
            fingerprint = await asyncio.to_thread(fingerprint_of, raw, source, preferences(request))
        if source is not None:  # as large as it will be used: what waits is kept in memory
            source = await asyncio.to_thread(source.at, params.delivered)
        return params, source, fingerprint

    async def once(
        request: Request, route: Route, until: float, params: GenerationParams, source: Source | None, fingerprint: str
    ) -> Response:
        async def make(seconds: float, keep: Keep) -> Response:
            # What is loaded, and which adapters there are, is no matter to a repeat: its answer may be stored.
            return await answer(request, requests, route, work_of(services, request, params, source, seconds), keep)

        if (seconds := until - time.monotonic()) <= 0:
            raise TryLater(
                "The time for this ('X-Request-Timeout', or the server's limit) passed while it was being sent. Send "
                "it again, or send less."
            )
        return await repeats.once(request, owner_of(request), route, fingerprint, seconds, make)

    async def with_image(request: Request, route: Route) -> Response:
        until = deadline_of(request, services.settings.request_timeout)
        if HEADER not in request.headers:  # what would be refused need not be sent, and decoded, first
            services.dispatcher.check_open(owner_of(request), pictures=1)
        async with uploads.received(request, route) as upload, services.decoder.turn() as decode:
            ready = await prepared(request, route, upload.raw, await upload.decoded(decode))
        return await once(request, route, until, *ready)

    @routes.post("/images/generations", responses=schema.answers(), openapi_extra=in_json("generations"))
    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt."""
        until = deadline_of(request, services.settings.request_timeout)
        ready = await prepared(request, "generations", await bodies.json_object(request))
        return await once(request, "generations", until, *ready)

    @routes.post("/images/edits", responses=schema.answers(), openapi_extra=with_files("edits"))
    async def edits(request: Request) -> Response:
        """Draw pictures from a prompt and a picture, all over or where a mask says."""
        return await with_image(request, "edits")

    @routes.post("/images/variations", responses=schema.answers(), openapi_extra=with_files("variations"))
    async def variations(request: Request) -> Response:
        """Draw pictures like a picture."""
        return await with_image(request, "variations")

    return routes


def work_of(
    services: Services, request: Request, params: GenerationParams, source: Source | None, seconds: float
) -> Work:
    """Raises what `Services.precision` and `Services.plan` raise: something is not there now."""
    services.precision(params)
    return Work(
        services,
        request.scope["request_id"],
        base_url(services.settings, request),
        services.plan(params, source),
        owner_of(request),
        seconds,
    )


def preferences(request: Request) -> str:
    """All `Prefer` headers as one, which is the same (RFC 7240, section 2)."""
    return ",".join(request.headers.getlist("prefer"))


async def answer(request: Request, requests: Requests, route: Route, work: Work, keep: Keep) -> Response:
    """Now, as a stream, or a promise: whatever the client asked for."""
    if "respond-async" in (part.split(";")[0].strip() for part in preferences(request).lower().split(",")):
        if work.params.stream or work.params.sync_mode:
            name = "stream" if work.params.stream else "sync_mode"
            raise InvalidValue(f"'{name}' does not go with 'Prefer: respond-async'; leave one out.", param=name)
        location = f"{work.base_url}/v1/images/requests/{work.id}"
        headers = {"location": location, "preference-applied": "respond-async"}

        def promised(entry: Entry) -> Response:
            return JSON(requests.view(entry), 202, {**headers, **work.headers()})

        return promised(await requests.start(work, route, lambda entry: keep(promised(entry))))
    if work.params.stream:
        family = "image_generation" if route == "generations" else "image_edit"
        return await stream.response(requests, work, route, family)
    task = await requests.begin(work, route)
    body = await while_connected(request, task)
    return await asyncio.to_thread(JSON, body, headers=work.headers())  # it may hold pictures


def deadline_of(request: Request, limit: float) -> float:
    """When the seconds from now have passed (on the monotonic clock) that the client gives by `X-Request-Timeout`, and
    no more of them than the server's own limit."""
    text = request.headers.get("x-request-timeout")
    if text is None:
        return time.monotonic() + limit
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", text) or float(text) == 0:
        raise InvalidValue("The header 'X-Request-Timeout' takes seconds, like 30 or 2.5.", param="X-Request-Timeout")
    return time.monotonic() + min(float(text), limit)


async def while_connected(request: Request, task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    """The task's result; if the client goes away first, the task is cancelled."""
    try:
        await done_while_connected(request, task)
        return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
