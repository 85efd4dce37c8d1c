"""A checked request at work: its jobs, its files, and the body of its answer, whoever is waiting for it."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import Request

from flux_local import images
from flux_local.api.uploads import Source
from flux_local.config import Settings
from flux_local.decoder import SafeDecoder
from flux_local.dispatch import Dispatcher
from flux_local.history import History
from flux_local.messages import Done, Job, Partial, Step
from flux_local.params import GenerationParams, ModelInfo
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
    started: int
    """Unix time."""


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
    params: GenerationParams
    source: Source | None = None

    async def run(self, on_event: OnEvent | None = None, on_picture: OnPicture | None = None) -> dict[str, Any]:
        """Draws, encodes and stores all pictures; returns the answer's body. Cancelling it cancels its jobs.

        Raises:
            What `Dispatcher.draw` and `Store.save` raise; the first failure cancels the other pictures.
        """
        started = time.monotonic()
        self.services.dispatcher.admit(len(self.params.seeds))
        original = await asyncio.to_thread(self._original)
        pictures = range(len(self.params.seeds))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._picture(i, original, on_event, on_picture)) for i in pictures]
        except* Exception as failures:
            raise first_of(failures) from None
        results = [task.result() for task in tasks]
        return self._body(results, time.monotonic() - started)

    def headers(self, body: dict[str, Any]) -> dict[str, str]:
        """Of the answer with this body."""
        params = self.params
        ready = self.services.dispatcher.ready
        headers = {
            "x-flux-seed": ",".join(map(str, params.seeds)),
            "x-flux-precision": ready.precision if ready else "",
        }
        if ignored := [name[:64] for name in params.ignored if name.isascii() and name.isprintable()]:
            headers["x-flux-ignored-params"] = ",".join(ignored)[:1000]
        if any(item["revised_prompt"] != params.prompt for item in body["data"]):
            headers["x-flux-prompt-truncated"] = "true"
        return headers

    def _original(self) -> tuple[Image.Image, Image.Image | None] | None:
        """The input and its mask at the delivered size."""
        if self.source is None:
            return None
        size = self.params.delivered
        mask = self.source.mask and images.covering(self.source.mask, size)
        return images.covering(self.source.image, size), mask

    def _job(self, index: int, original: tuple[Image.Image, Image.Image | None] | None) -> Job:
        params = self.params
        image: bytes | None = None
        mask: bytes | None = None
        if original is not None and (params.strength != 1 or original[1] is not None):
            image = images.on_canvas(original[0], params.canvas, params.delivered).tobytes()
            if original[1] is not None:
                mask = images.on_canvas(original[1], params.canvas, params.delivered).tobytes()
        return Job(
            id=f"{self.id}-{index}",
            prompt=params.prompt,
            seed=params.seeds[index],
            width=params.canvas.width,
            height=params.canvas.height,
            steps=params.steps,
            guidance=params.guidance,
            negative_prompt=params.negative_prompt,
            true_cfg_scale=params.true_cfg_scale,
            image=image,
            mask=mask,
            skip=params.steps - params.steps_run if image is not None else 0,
            partials=params.partial_images if params.stream else 0,
        )

    async def _picture(
        self,
        index: int,
        original: tuple[Image.Image, Image.Image | None] | None,
        on_event: OnEvent | None,
        on_picture: OnPicture | None,
    ) -> tuple[dict[str, Any], Done]:
        """One picture: its entry of `data`, and the engine's account of it."""
        if original is not None and self.params.strength == 0:
            done = Done("", b"", 0, self.params.prompt, 0.0, 0.0, 0.0, 0.0)
            data = await asyncio.to_thread(self._encode, original[0], index)
        else:
            job = await asyncio.to_thread(self._job, index, original)
            notify = None if on_event is None else lambda event: on_event(index, event)
            done = await self.services.dispatcher.draw(job, notify)
            data = await asyncio.to_thread(self.file, done.pixels, index, original)
        item = await self._item(data, index, done)
        if on_picture is not None:
            on_picture(index, item, done)
        return item, done

    def file(self, pixels: bytes, index: int, original: tuple[Image.Image, Image.Image | None] | None = None) -> bytes:
        """The canvas's pixels as the file asked for; what a mask keeps is the input's own."""
        picture = images.delivered(pixels, self.params.canvas, self.params.delivered)
        if original is not None and original[1] is not None:
            picture = images.keep_unmasked(picture, original[0], original[1])
        return self._encode(picture, index)

    def _encode(self, picture: Image.Image, index: int) -> bytes:
        text = None
        if self.services.settings.png_metadata:
            text = images.parameters_text(self.params, self.params.seeds[index], self.services.model.name)
        return images.encode(picture, self.params, text)

    async def _item(self, data: bytes, index: int, done: Done) -> dict[str, Any]:
        """One entry of the answer's `data`."""
        params = self.params
        found: dict[str, Any] = {"revised_prompt": done.prompt_read, "seed": params.seeds[index]}
        if params.stream or params.response_format == "b64_json":
            return {"b64_json": base64.b64encode(data).decode(), **found}
        if params.sync_mode:
            return {"url": f"data:image/{params.output_format};base64,{base64.b64encode(data).decode()}", **found}
        name = await asyncio.to_thread(self.services.store.save, data, params.output_format)
        return {"url": f"{self.base_url}/v1/images/files/{name}", **found}

    def _body(self, results: list[tuple[dict[str, Any], Done]], total: float) -> dict[str, Any]:
        done = [d for _, d in results]
        return {
            "created": int(time.time()),
            "data": [item for item, _ in results],
            **self.facts(),
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
        per_picture = self.params.canvas.area // 256
        image = 0 if self.source is None else per_picture
        output = pictures * per_picture
        return {
            "input_tokens": done.text_tokens + image,
            "output_tokens": output,
            "total_tokens": done.text_tokens + image + output,
            "input_tokens_details": {"text_tokens": done.text_tokens, "image_tokens": image},
        }


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
