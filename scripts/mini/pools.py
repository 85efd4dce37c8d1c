"""Drawings as latents, a few thousand at a time, for the stages that learn from them.

What a step gets depends on the seed and the step alone. Knows nothing of what is learnt.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import numpy as np
import torch
from diffusers import AutoencoderKL

from flux_local.model.latents import pack

from .drawings import Scene, painted, random_scene
from .run import Run
from .vae import as_tensor

PART = 32  # pictures drawn by one process at a time
CHUNK = 4096  # pictures encoded at a time
REUSE = 10  # epochs over a chunk before it is replaced


@functools.cache
def drawers(count: int) -> ProcessPoolExecutor:
    """Processes that draw. They know nothing of models: a start takes them no time, and no memory."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def drawings(run: Run, scenes: list[Scene], width: int, height: int) -> Iterator[np.ndarray]:
    """The scenes' drawings in order, PART at a time: uint8 [part, height, width, 3]."""
    parts = [scenes[at : at + PART] for at in range(0, len(scenes), PART)]
    there = drawers(run.workers).map if run.workers else map
    return there(painted, parts, repeat(width), repeat(height))


def encoded(run: Run, vae: AutoencoderKL, scenes: list[Scene], width: int, height: int) -> torch.Tensor:
    """Scaled latents of the scenes' drawings, packed: [scenes, tokens, 64]."""
    return latents_of(run, vae, drawings(run, scenes, width, height))


@torch.no_grad()
def latents_of(run: Run, vae: AutoencoderKL, parts: Iterable[np.ndarray]) -> torch.Tensor:
    """Scaled latents of drawings, packed: [pictures of all parts, tokens, 64].

    Args:
        parts: each uint8 [part, height, width, 3].
    """
    found = []
    for pixels in parts:
        x = as_tensor(pixels, run.device).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            mean = vae.encode(x).latent_dist.mean
        found.append(pack((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor))
    return torch.cat(found)


class Pool:
    """Scaled latents of fresh drawings on one canvas. What step `k` gets depends on the seed and `k` alone."""

    def __init__(
        self, run: Run, vae: AutoencoderKL, width: int, height: int, batch: int, chunk: int, offset: int
    ) -> None:
        self.run, self.vae, self.width, self.height, self.offset = run, vae, width, height, offset
        self.batch, self.chunk, self.loaded = batch, chunk, -1
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)

    def __call__(self, step: int) -> tuple[torch.Tensor, list[Scene]]:
        index = step * self.batch // (self.chunk * REUSE)
        if index != self.loaded:
            self.load(index)
        chosen = random.Random(f"{self.run.seed} {self.width}x{self.height} {self.offset + step}").sample(
            range(self.chunk), self.batch
        )
        return self.latents[chosen].float(), [self.scenes[i] for i in chosen]

    def load(self, index: int) -> None:
        rng = random.Random(f"{self.run.seed} {self.width}x{self.height} chunk {self.offset + index}")
        self.scenes = [random_scene(rng, self.width, self.height, world=self.run.world) for _ in range(self.chunk)]
        self.latents = encoded(self.run, self.vae, self.scenes, self.width, self.height).half()
        self.loaded = index


class Pools:
    """Pictures of canvases in turn. A canvas that comes up twice in a cycle has one pool all the same."""

    def __init__(
        self, run: Run, vae: AutoencoderKL, canvases: Sequence[tuple[int, int]], batch: int, steps: int, offset: int
    ) -> None:
        self.cycle = canvases
        self.pools = {}
        for canvas in dict.fromkeys(canvases):
            chunk = min(CHUNK * canvases.count(canvas) // len(canvases), batch * steps)
            self.pools[canvas] = Pool(run, vae, *canvas, batch, max(batch, chunk), offset)

    def __call__(self, step: int) -> tuple[tuple[int, int], torch.Tensor, list[Scene]]:
        """Canvas, latents [batch, tokens, 64] and scenes of step `step`."""
        rounds, place = divmod(step, len(self.cycle))
        canvas = self.cycle[place]
        turn = rounds * self.cycle.count(canvas) + self.cycle[:place].count(canvas)
        return canvas, *self.pools[canvas](turn)
