"""The routes: a request in, an answer out. What a request means is decided in `params`, `work` and `requests`."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flux_local.api import bodies, schema, stream, uploads
from flux_local.api.answers import JSON
from flux_local.api.repeats import HEADER, Repeats, fingerprint_of
from flux_local.api.requests import Requests
from flux_local.api.work import Services, Work, base_url
from flux_local.errors import Cancelled, Draining, InvalidValue, ModelNotFound, NotReady
from flux_local.metrics import CONTENT_TYPE
from flux_local.parameters import Route
from flux_local.params import PUBLIC_NAME, GenerationParams, generation_params
from flux_local.plan import Source
from flux_local.sizes import Size

MAX_PAGE = 100


def router(services: Services, requests: Requests, repeats: Repeats) -> APIRouter:
    """The API's routes, without prefix."""
    routes = APIRouter()
    in_json, with_files = (partial(body, model=services.model) for body in (schema.json_body, schema.image_body))

    def checked(raw: dict[str, Any], route: Route, image: Size | None = None) -> GenerationParams:
        params = generation_params(
            raw,
            services.model,
            route=route,
            image=image,
            response_format=services.settings.response_format,
            go_fast=services.settings.fast_by_default(services.dispatcher.precisions),
            max_pixels=services.settings.max_pixels,
        )
        services.precision(params)
        return params

    async def once(request: Request, route: Route, raw: dict[str, Any], source: Source | None = None) -> Response:
        params = checked(raw, route, Size(*source.image.size) if source else None)
        for name in ("stream", "sync_mode"):
            if getattr(params, name) and HEADER in request.headers:
                raise InvalidValue(f"'{name}' does not go with an 'Idempotency-Key'; leave one out.", param=name)
        fingerprint = ""
        if HEADER in request.headers:
            fingerprint = await asyncio.to_thread(fingerprint_of, raw, source, request.headers.get("prefer", ""))
        if source is not None:  # as large as it will be used: what waits is kept in memory
            source = await asyncio.to_thread(source.at, params.delivered)
        work = work_of(services, request, params, source)
        return await repeats.once(
            request, work.owner, route, fingerprint, work.seconds, partial(answer, request, requests, route, work)
        )

    async def with_image(request: Request, route: Route) -> Response:
        if HEADER not in request.headers:  # what would be refused need not be sent, and decoded, first
            services.dispatcher.check_open(owner(request), pictures=1, token_steps=0)
        raw, source = await uploads.read(request, route, services.decoder)
        return await once(request, route, raw, source)

    @routes.post("/images/generations", responses=schema.answers(), openapi_extra=in_json("generations"))
    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt."""
        return await once(request, "generations", await bodies.json_object(request))

    @routes.post("/images/edits", responses=schema.answers(), openapi_extra=with_files("edits"))
    async def edits(request: Request) -> Response:
        """Draw pictures from a prompt and a picture, all over or where a mask says."""
        return await with_image(request, "edits")

    @routes.post("/images/variations", responses=schema.answers(), openapi_extra=with_files("variations"))
    async def variations(request: Request) -> Response:
        """Draw pictures like a picture."""
        return await with_image(request, "variations")

    @routes.get("/images/requests", responses=schema.answers(schema.ENTRIES), openapi_extra=schema.PAGING)
    async def history(request: Request) -> dict[str, Any]:
        """The newest requests of the caller's key, the newest first; `after` an id, those before it."""
        limit = limit_of(request.query_params.get("limit"))
        entries = await services.history.page(owner(request), limit + 1, request.query_params.get("after"))
        views = [requests.view(entry) for entry in entries[:limit]]
        return {"object": "list", "data": views, "has_more": len(entries) > limit}

    @routes.get("/images/requests/{id}", responses=schema.answers(schema.ENTRY))
    async def history_entry(request: Request, id: str) -> dict[str, Any]:
        """One request: status, progress, parameters as run, result."""
        return requests.view(await services.history.get(id, owner(request)))

    @routes.delete("/images/requests/{id}", responses=schema.answers(schema.ENTRY))
    async def cancel(request: Request, id: str) -> dict[str, Any]:
        """Cancel what still runs and remove what is stored."""
        return {**requests.view(await requests.remove(id, owner(request))), "deleted": True}

    @routes.get("/images/files/{name}", responses=schema.FILE_ANSWERS)
    async def file(name: str) -> Response:
        """The bytes behind a `url` answer."""
        data = await asyncio.to_thread(services.store.load, name)
        return Response(
            data,
            media_type=f"image/{name.rpartition('.')[2]}",
            headers={
                "x-content-type-options": "nosniff",
                "content-security-policy": "default-src 'none'; sandbox",
                "content-disposition": f'inline; filename="{name}"',
                "cache-control": "private, max-age=3600",
            },
        )

    @routes.get("/models", responses=schema.answers(schema.MODELS))
    async def models(request: Request) -> dict[str, Any]:
        """The names of its own that this server answers to. `?schema=true` adds the parameters."""
        names = dict.fromkeys((PUBLIC_NAME, services.model.name))
        return {"object": "list", "data": [model_object(services, request, name) for name in names]}

    @routes.get("/models/{name}", responses=schema.answers(schema.MODEL))
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One model. `?schema=true` adds the parameters."""
        if not services.model.answers_to(name):
            raise ModelNotFound("This server has no such model; /v1/models lists what it has.")
        return model_object(services, request, name)

    return routes


def probes(services: Services) -> APIRouter:
    """Live and ready, for supervisors and balancers."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Live: the process answers."""
        return {"status": "ok"}

    @routes.get("/ready", responses=schema.answers(schema.ANY))
    async def ready() -> dict[str, Any]:
        """Ready: a warm-up picture has been drawn and the engine is there."""
        state = services.dispatcher.ready
        if services.dispatcher.draining:
            raise Draining("The server is stopping.", retry_after=5)
        if state is None or not services.dispatcher.started:
            raise NotReady("The model is loading, or its engine is being replaced.", retry_after=5)
        return {
            "status": "ready",
            "model": services.model.name,
            "device": state.device,
            "precision": state.precisions[0],
            "precisions": list(state.precisions),
            "attention": services.dispatcher.attentions,
            "memory": state.memory,
            "safety_checker": services.has_checker,
            "engines": [
                {"device": engine.ready.device if engine.ready else engine.device, "ready": engine.ready is not None}
                for engine in services.dispatcher.engines
            ],
            "load_seconds": round(state.load_seconds, 3),
            "weights_bytes": state.weights_bytes,
            "warm_up_seconds": round(state.warm_up_seconds, 3),
            "step_seconds": round(state.step_seconds, 4),
        }

    @routes.get("/metrics", responses=schema.METRICS_ANSWERS)
    async def metrics() -> Response:
        """Counts, seconds and the state, in Prometheus' text format."""
        return Response(services.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return routes


def limit_of(text: str | None) -> int:
    """Entries on a page of the history."""
    if text is None:
        return MAX_PAGE
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_PAGE:
        raise InvalidValue(f"'limit' must be between 1 and {MAX_PAGE}.", param="limit")
    return int(text)


def owner(request: Request) -> str:
    """Whose request this is: the digest of its key, empty where the server has no keys."""
    found: str = request.scope.get("owner", "")
    return found


def work_of(services: Services, request: Request, params: GenerationParams, source: Source | None = None) -> Work:
    return Work(
        services,
        request.scope["request_id"],
        base_url(services.settings, request),
        services.plan(params, source),
        owner(request),
        timeout_of(request, services.settings.request_timeout),
    )


async def answer(request: Request, requests: Requests, route: Route, work: Work) -> Response:
    """Now, as a stream, or a promise: whatever the client asked for."""
    prefers = request.headers.get("prefer", "").lower()
    later = "respond-async" in (part.split(";")[0].strip() for part in prefers.split(","))
    if later:
        if work.params.stream or work.params.sync_mode:
            name = "stream" if work.params.stream else "sync_mode"
            raise InvalidValue(f"'{name}' does not go with 'Prefer: respond-async'; leave one out.", param=name)
        await requests.start(work, route)
        entry = await requests.services.history.get(work.id, owner(request))
        location = f"{work.base_url}/v1/images/requests/{work.id}"
        headers = {"location": location, "preference-applied": "respond-async", **work.headers({"data": []})}
        return JSON(requests.view(entry), 202, headers)
    if work.params.stream:
        family = "image_generation" if route == "generations" else "image_edit"
        return await stream.response(requests, work, route, family)
    task = await requests.begin(work, route)
    body = await while_connected(request, task)
    return JSON(body, headers=work.headers(body))


def model_object(services: Services, request: Request, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": services.started,
        "owned_by": "flux-local",
    }
    if request.query_params.get("schema", "").lower() in ("true", "1"):
        found["parameters"] = schema.parameter_list(services.model)
    return found


def timeout_of(request: Request, limit: float) -> float:
    """The seconds that the client gives by `X-Request-Timeout`, and no more than the server's own limit."""
    text = request.headers.get("x-request-timeout")
    if text is None:
        return limit
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) == 0:
        raise InvalidValue("The header 'X-Request-Timeout' takes seconds, like 30 or 2.5.", param="X-Request-Timeout")
    return min(float(text), limit)


async def while_connected(request: Request, task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    """The task's result; if the client goes away first, the task is cancelled."""
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The client went away.")
        return await task
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
