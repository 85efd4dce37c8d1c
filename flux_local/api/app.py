"""The application: routes under each prefix in use, errors, request ids, keys."""

from __future__ import annotations

import logging
import re
import secrets
import time

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import flux_local
from flux_local.api import about, answers, routes, stored
from flux_local.api.auth import KeyGate, OwnGate
from flux_local.api.page import page
from flux_local.api.repeats import Repeats
from flux_local.api.requests import Requests
from flux_local.api.work import Services
from flux_local.config import is_loopback
from flux_local.metrics import Metrics

PREFIXES = ("/v1", "/openai/v1", "")
EXPOSED = (
    "x-request-id", "x-flux-seed", "x-flux-precision", "x-flux-attention", "x-flux-acceleration",
    "x-flux-ignored-params", "x-flux-prompt-truncated", "idempotent-replayed", "retry-after", "x-should-retry",
    "location",
)  # fmt: skip
"""Headers that a page of another origin may read."""

GONE = 499
"""The status, for log and metrics, of a request whose client left before an answer began."""

log = logging.getLogger("flux_local.access")


def create_app(services: Services, requests: Requests) -> ASGIApp:
    """The ASGI application, keys and all."""
    # A redirect would go to whatever Host the client names.
    app = FastAPI(
        title="flux-local", version=flux_local.__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        servers=[{"url": address}] if (address := services.settings.public_url.rstrip("/")) else None,
    )  # fmt: skip
    answers.install(app)
    app.include_router(about.probes(services))
    app.include_router(page())
    repeats = Repeats(services.history)
    for prefix in PREFIXES:
        for part in (
            routes.router(services, requests, repeats), stored.router(services, requests), about.model_routes(services)
        ):  # fmt: skip
            app.include_router(part, prefix=prefix, include_in_schema=prefix == "/v1")
    add_docs(app)
    gated: ASGIApp = HeadAsGet(app)
    if keys := services.settings.keys():
        gated = KeyGate(gated, keys)
    else:
        public = services.settings.public_name()
        any_host = public is None and not is_loopback(services.settings.host)
        gated = OwnGate(gated, services.settings.origins(), any_host, public)
    if origins := services.settings.origins():
        gated = CORSMiddleware(gated, allow_origins=origins, allow_methods=["*"], allow_headers=["*"],
                               expose_headers=EXPOSED)  # fmt: skip
    return RequestLog(gated, services.metrics)


def add_docs(app: FastAPI) -> None:
    """`/docs`, with its script and style from the installed package: no stranger's server is asked."""
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_swagger", "resources")]), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="flux-local",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon-32x32.png",
        )


class HeadAsGet:
    """Answers HEAD as GET, of which the HTTP server sends the head alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


LOOKS = re.compile(r"/(health|ready|metrics|images/requests(/[^/]*)?)$")
"""Paths that are asked for again and again, by monitors and by pages that wait."""


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class RequestLog:
    """Gives each request an id of ours, returns it as `x-request-id`, and writes one line when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = request_id = new_request_id()
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            status = status or GONE
            self.metrics.responses.labels(status).inc()
            looked = scope["method"] == "GET" and status < 400 and LOOKS.search(scope["path"])
            log.log(logging.DEBUG if looked else logging.INFO, "%s %s %d %.3fs %s", scope["method"],
                    printable(scope["path"]), status, time.monotonic() - started, request_id)  # fmt: skip


def printable(path: str) -> str:
    """A path that cannot break a line of the log; the id in a file's URL is a secret and left out."""
    if "/images/files/" in path:
        path = path.partition("/files/")[0] + "/files/…"
    return "".join(c if c.isprintable() else "?" for c in path[:200])
