"""A checked request at work: its jobs, its files, and the body of its answer, whoever is waiting for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from flux_local import loras
from flux_local.config import Settings
from flux_local.decoder import SafeDecoder
from flux_local.dispatch import Dispatcher
from flux_local.errors import DeadlineExceeded, ModerationBlocked, StorageFull
from flux_local.history import History
from flux_local.messages import Done, Partial, Step
from flux_local.metrics import Metrics
from flux_local.params import GenerationParams, ModelInfo
from flux_local.plan import Plan, Source, check_of, precision_of
from flux_local.store import Store


@dataclass(frozen=True)
class Services:
    """What the routes work with."""

    settings: Settings
    model: ModelInfo
    dispatcher: Dispatcher
    store: Store
    history: History
    decoder: SafeDecoder
    metrics: Metrics
    started: int
    """Unix time."""
    has_checker: bool
    """Whether the engines were started with a safety checker."""

    def plan(self, params: GenerationParams, source: Source | None = None) -> Plan:
        """What is to be drawn.

        Raises:
            InvalidValue, NotFound: an adapter that is not there or no adapter.
            NotAvailable: as `plan.check_of`.
        """
        adapters = loras.find(self.settings.loras_folder(), params.loras)
        check = check_of(params, self.has_checker, self.settings.safety_optional)
        return Plan(params, source, self.model.name, self.settings.png_metadata, adapters, check)

    def precision(self, params: GenerationParams) -> str:
        """As `plan.precision_of`; empty until the engine has said what it has."""
        loaded = self.dispatcher.precisions
        return precision_of(params, loaded) if loaded else ""


OnEvent = Callable[[int, Step | Partial], None]
"""Called with the picture's place among the request's n, and what happened to it."""

OnPicture = Callable[[int, dict[str, Any], Done], None]
"""Called with a picture's place and its entry of `data`, as soon as it is finished."""


@dataclass(frozen=True)
class Work:
    """One request, from checked parameters to the answer."""

    services: Services
    id: str
    base_url: str
    plan: Plan
    owner: str
    seconds: float
    """After which nobody wants it any more."""
    files: list[str] = field(default_factory=list)
    """Names of what it has stored; gone again unless it succeeds."""
    cut: set[int] = field(default_factory=set)
    """Pictures whose prompts were longer than the text encoders read."""

    @property
    def params(self) -> GenerationParams:
        return self.plan.params

    @property
    def stores(self) -> bool:
        """Whether its answer is worth nothing without files of the server's."""
        return not (self.params.stream or self.params.sync_mode or self.params.response_format == "b64_json")

    async def run(self, on_event: OnEvent | None = None, on_picture: OnPicture | None = None) -> dict[str, Any]:
        """Draws, encodes and stores all pictures; returns the answer's body. Cancelling it cancels its jobs.

        Raises:
            DeadlineExceeded, and what `Dispatcher.draw` and `Store.save` raise; the first failure cancels the
            other pictures.
        """
        try:
            async with asyncio.timeout(self.seconds):
                return await self._run(on_event, on_picture)
        except BaseException as error:
            for name in self.files:
                self.services.store.remove(name)
            self.files.clear()
            if isinstance(error, TimeoutError):
                limit = self.services.settings.request_timeout
                raise DeadlineExceeded(
                    "The request was not finished in its time. Ask for fewer steps, try again when less is waiting, or "
                    f"allow more with 'X-Request-Timeout' (at most {limit:g} s here)."
                ) from None
            raise

    async def _run(self, on_event: OnEvent | None, on_picture: OnPicture | None) -> dict[str, Any]:
        self.services.precision(self.params)  # another process may have accepted it, with other precisions loaded
        started = time.monotonic()
        deadline = started + self.seconds
        if self.plan.source is not None:
            await asyncio.to_thread(lambda: self.plan.on_canvas)
        pictures = range(len(self.params.seeds))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._picture(i, deadline, on_event, on_picture)) for i in pictures]
        except* Exception as failures:
            raise first_of(failures) from None
        results = [task.result() for task in tasks]
        if all(done.flagged for _, done in results):
            raise ModerationBlocked("The safety checker left out every picture. Change the prompt.")
        return self._body(results, time.monotonic() - started)

    def headers(self) -> dict[str, str]:
        """Of the answer: what is known so far."""
        params = self.params
        precision = self.services.precision(params)
        headers = {
            "x-flux-seed": ",".join(map(str, params.seeds)),
            "x-flux-precision": precision,
            "x-flux-attention": self.services.dispatcher.attentions[precision],
        }
        if params.acceleration != "none":
            headers["x-flux-acceleration"] = params.computed_origin
        if ignored := listed(params.ignored):
            headers["x-flux-ignored-params"] = ignored
        if self.cut:
            headers["x-flux-prompt-truncated"] = "true"
        return headers

    async def _picture(
        self, index: int, deadline: float, on_event: OnEvent | None, on_picture: OnPicture | None
    ) -> tuple[dict[str, Any], Done]:
        """One picture: its entry of `data`, empty where it was flagged, and the engine's account of it."""
        if self.plan.untouched:
            done = Done("", b"", 0, self.params.prompt_read, 0.0, 0.0, 0.0, 0.0, 0.0)
            data = await asyncio.to_thread(self.plan.file, index)
        else:
            job = self.plan.job(f"{self.id}-{index}", index, self.owner, deadline)
            notify = None if on_event is None else lambda event: on_event(index, event)
            done = await self.services.dispatcher.draw(job, notify)
            self.services.metrics.picture(
                done, self.services.precision(self.params), self.params.acceleration, job.steps_computed
            )
            if done.cut:
                self.cut.add(index)
            if done.flagged:
                return {}, done
            data = await asyncio.to_thread(self.plan.file, index, done.pixels)
        item = await self._item(data, index, done)
        if on_picture is not None:
            on_picture(index, item, done)
        return item, done

    async def _item(self, data: bytes, index: int, done: Done) -> dict[str, Any]:
        """One entry of the answer's `data`."""
        params = self.params
        found: dict[str, Any] = {"revised_prompt": done.prompt_read, "seed": params.seeds[index]}
        if params.stream and params.response_format == "url" and not params.sync_mode:
            # For the history; the client has the bytes as well, and so a full disk fails nothing.
            with contextlib.suppress(StorageFull):
                found["url"] = await self._url(data)
        if not self.stores:
            text = await asyncio.to_thread(as_text, data)
            if params.sync_mode and not params.stream and params.response_format == "url":
                return {"url": f"data:image/{params.output_format};base64,{text}", **found}
            return {"b64_json": text, **found}
        return {"url": await self._url(data), **found}

    async def _url(self, data: bytes) -> str:
        return f"{self.base_url}/v1/images/files/{await self._saved(data)}"

    async def _saved(self, data: bytes) -> str:
        """The name of a new file; if this is cancelled, none is left once it has ended."""
        store = self.services.store
        saving = asyncio.ensure_future(asyncio.to_thread(store.save, data, self.params.output_format))
        try:
            name = await asyncio.shield(saving)
        except asyncio.CancelledError:
            saving.add_done_callback(lambda done: None if done.exception() else store.remove(done.result()))
            await asyncio.wait([saving])
            raise
        self.files.append(name)
        return name

    def _body(self, results: list[tuple[dict[str, Any], Done]], total: float) -> dict[str, Any]:
        done = [d for _, d in results]
        return {
            "created": int(time.time()),
            "data": [item for item, done in results if not done.flagged],
            **self.facts(),
            **({"flagged": sum(d.flagged for d in done)} if self.plan.check and not self.plan.untouched else {}),
            "usage": self.usage(done[0], len(done)),
            "timings": timings(done, total),
            "id": self.id,
        }

    def facts(self) -> dict[str, str]:
        """What an answer and every streamed event say about the pictures."""
        params = self.params
        return {
            "size": str(params.delivered),
            "output_format": params.output_format,
            "quality": params.quality,
            "background": "opaque",
        }

    def usage(self, done: Done, pictures: int) -> dict[str, Any]:
        """Tokens as the model counts them: T5's for the text, 16 by 16 pixels of canvas for pictures."""
        per_picture = self.params.canvas.tokens
        image = 0 if self.plan.source is None else per_picture
        output = pictures * per_picture
        return {
            "input_tokens": done.text_tokens + image,
            "output_tokens": output,
            "total_tokens": done.text_tokens + image + output,
            "input_tokens_details": {"text_tokens": done.text_tokens, "image_tokens": image},
        }


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def first_of(failures: BaseExceptionGroup[Exception]) -> Exception:
    """One of a request's failures; they are alike."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    assert isinstance(failure, Exception)
    return failure


def timings(done: list[Done], total: float) -> dict[str, float]:
    """Seconds of the slowest picture in each stage, and of the whole request."""
    stages = {name: max(getattr(d, name) for d in done) for name in ("queue_s", "encode_s", "denoise_s", "decode_s")}
    return {name: round(seconds, 4) for name, seconds in {**stages, "total_s": total}.items()}


def base_url(settings: Settings, request: Request) -> str:
    """The configured public address, else the local address that the client reached; never what a client claims."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host, port = request.scope["server"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listed(names: Sequence[str]) -> str:
    """Names as a header can have them, by commas: of those that are text for one, 64 characters each."""
    shown = [name[:64].strip() for name in names if name.isascii() and name.isprintable()]
    return ",".join(filter(None, shown))[:1000].strip()
