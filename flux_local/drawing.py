"""A job on its way through an engine, and how its picture begins. Knows nothing of what else is under way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flux_local.messages import Done, Job

if TYPE_CHECKING:
    from flux_local.model.denoiser import Picture
    from flux_local.model.loader import Pipeline
    from flux_local.model.pace import Mark
    from flux_local.model.text import Encode


@dataclass(eq=False, slots=True)
class Drawing:
    """A job on its way. Times are seconds of the monotonic clock."""

    job: Job
    arrived: float
    steps: int
    partial_steps: list[int]
    picture: Picture | None = None
    encode_s: float = 0.0
    begun: float = 0.0
    beginning: tuple[Mark, Mark] | None = None
    """Before and after its prompt and its source were encoded and its adapters put in place, until that is charged."""
    beginning_s: float = 0.0
    """Of the device, between the two."""
    denoising_ends: Mark = 0.0
    denoised: float = 0.0
    decoding_s: float = 0.0
    """Of the device, for the last decoding."""
    reported: float = 0.0
    retried: bool = False
    """Memory was short for it, and nothing has gone well since."""
    careful: bool = False
    """Drawn with the plain forms of all operations, because the picture was not finite with the fast ones."""


def begin_picture(pipeline: Pipeline, job: Job, encode: Encode) -> Picture:
    """The job's picture before its first step.

    Raises:
        InvalidValue: an adapter that cannot be used.
    """
    pipeline.adapt(job.loras, job.go_fast)
    return pipeline.begin(
        encode(job.prompt, job.prompt_2, job.max_length), job.width, job.height,
        seed=job.seed, steps=job.steps, guidance=job.guidance,
        image=job.image, mask=job.mask, skip=job.skip, true_cfg_scale=job.true_cfg_scale, go_fast=job.go_fast,
        computed=job.computed,
        negative=None if job.negative_prompt is None else encode(job.negative_prompt, None, job.max_length),
    )  # fmt: skip


def finished(drawing: Drawing, pixels: bytes, flagged: bool) -> Done:
    """The account of a picture that has just been decoded."""
    picture = drawing.picture
    assert picture is not None
    return Done(
        id=drawing.job.id,
        pixels=pixels,
        text_tokens=picture.prompt.tokens,
        prompt_read=picture.prompt.read,
        queue_s=drawing.begun - drawing.encode_s - drawing.arrived,
        encode_s=drawing.encode_s,
        denoise_s=drawing.denoised - drawing.begun,
        decode_s=time.monotonic() - drawing.denoised,
        decoding_s=drawing.decoding_s,
        beginning_s=drawing.beginning_s,
        flagged=flagged,
        cut=picture.prompt.cut or (picture.negative is not None and picture.negative.cut),
    )
