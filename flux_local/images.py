"""Pixels of a canvas → the picture delivered → the bytes of a file. Knows neither requests nor models."""

from __future__ import annotations

import io
import json
import math

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from flux_local import png
from flux_local.params import GenerationParams
from flux_local.sizes import Size

LANCZOS_REACH = 3
"""Pixels, of the larger ones, that a pixel's value depends on in each direction."""


def delivered(pixels: bytes, canvas: Size, size: Size) -> Image.Image:
    """The canvas as the picture asked for: cropped at the centre, or resampled to cover it and then cropped.

    Args:
        pixels: RGB rows of the canvas.
    """
    picture = Image.frombytes("RGB", canvas, pixels)
    if is_rounded_up(canvas, size):
        left, top = (canvas.width - size.width) // 2, (canvas.height - size.height) // 2
        return picture.crop((left, top, left + size.width, top + size.height))
    return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS)


def covering(picture: Image.Image, size: Size) -> Image.Image:
    """Scaled to cover the size and cropped at the centre; the picture itself if it has that size.

    A mask (mode L) is scaled without grey between.
    """
    if picture.size == size:
        return picture
    method = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, size, method=method)


def on_canvas(picture: Image.Image, canvas: Size, size: Size) -> Image.Image:
    """The inverse of `delivered`: a picture of the delivered size as the canvas that it would be made from.

    What will be cropped off is filled with the picture's own border. A mask (mode L) is scaled without grey between.
    """
    if is_rounded_up(canvas, size):
        left, top = (canvas.width - size.width) // 2, (canvas.height - size.height) // 2
        return bordered(picture, (left, top, canvas.width - size.width - left, canvas.height - size.height - top))
    scale = max(size.width / canvas.width, size.height / canvas.height)  # pixels of the picture for one of the canvas
    beside, above = (max(0.0, (side - own / scale) / 2) for side, own in zip(canvas, size, strict=True))
    left, top = math.floor(beside), math.floor(above)
    part = Size(canvas.width - 2 * left, canvas.height - 2 * top)
    border = math.ceil((LANCZOS_REACH + 1) * max(1.0, scale))
    x, y = border + scale * (left - beside), border + scale * (top - above)
    box = (x, y, x + scale * part.width, y + scale * part.height)
    method = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    scaled = bordered(picture, (border,) * 4).resize(part, method, box)
    return bordered(scaled, (left, top, left, top))


def bordered(picture: Image.Image, around: tuple[int, ...]) -> Image.Image:
    """With its outermost pixels repeated so often to the left, above, to the right and below."""
    left, above, right, below = around
    pixels = np.asarray(picture)
    return Image.fromarray(np.pad(pixels, ((above, below), (left, right), (0, 0))[: pixels.ndim], mode="edge"))


def keep_unmasked(made: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture made where the mask (mode L) is not 0, and the original's own pixels elsewhere."""
    return Image.composite(made, original, mask)


def is_rounded_up(canvas: Size, size: Size) -> bool:
    return all(0 <= side - asked < 16 for side, asked in zip(canvas, size, strict=True))


def encode(picture: Image.Image, params: GenerationParams, text: str | None) -> bytes:
    """The file. `text` goes into a PNG's `parameters` chunk, where image tools look for it."""
    out = io.BytesIO()
    match params.output_format:
        case "png":
            chunks = PngImagePlugin.PngInfo()
            if text is not None:
                chunks.add_text("parameters", text)
            return png.encode(picture, chunks)
        case "gif":
            picture.save(out, "GIF")
        case "jpeg":
            picture.save(out, "JPEG", quality=params.output_quality)
        case "webp" | "avif":
            picture.save(out, params.output_format.upper(), quality=params.output_quality)
    return out.getvalue()


def parameters_text(params: GenerationParams, seed: int, model: str) -> str:
    """Prompt and parameters in the form that AUTOMATIC1111's web UI began and most image tools read."""
    text = (
        f"{params.prompt}\n"
        f"{f'Negative prompt: {params.negative_prompt}{chr(10)}' if params.negative_prompt is not None else ''}"
        f"Steps: {params.steps}, Sampler: Euler, CFG scale: {params.guidance:g}, "
        f"Seed: {seed}, Size: {params.delivered}, Model: {model}"
        f"{f', Denoising strength: {params.strength:g}' if params.strength not in (None, 1) else ''}"
        f"{f', True CFG scale: {params.true_cfg_scale:g}' if params.true_cfg_scale > 1 else ''}"
        f"{''.join(f', Lora: {name} {scale:g}' for name, scale in params.loras)}"
        f"{f', T5 prompt: {json.dumps(params.prompt_2)}' if params.prompt_2 is not None else ''}"
        f"{f', T5 tokens: {params.max_length}' if params.max_length is not None else ''}"
        f"{', Precision: fp8' if params.go_fast else ''}"
        f"{f', Acceleration: {params.acceleration}' if params.acceleration != 'none' else ''}"
    )
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # which ends a PNG's text
