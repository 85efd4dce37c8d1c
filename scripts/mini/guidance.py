"""Stage four: classifier-free guidance, distilled into the guidance embedding (arXiv 2210.03142, section 3.1).

A copy of the finished painter shows where guidance leads at a value, in two passes; the painter learns to get there in
one. At value 1 that is the prompt alone. Knows nothing of how the painter came about.
"""

from __future__ import annotations

import copy
import random
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import flow
from .pools import Pools
from .run import Run

STEPS = 300
RATE = 0.25  # of the peak rates of the stage before
AVERAGE = 0.99
HIGHEST = 20.0


def strength(guidance: torch.Tensor) -> torch.Tensor:
    """How far past the prompt's own prediction a guidance value goes: 0 at 1, 0.5 at 4.5.

    A seventh of what the value says, because what these drawings' prompts leave open is little: at a full 4.5 the
    first step would paint every colour four times over.
    """
    return (guidance - 1) / 7


def train(
    run: Run, painter: flow.Painter, vae: AutoencoderKL, scale: float = 1.0, compiled: bool = True
) -> flow.Painter:
    """Goes on from the last checkpoint; returns the averaged weights.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
    """
    torch.manual_seed(run.seed)
    steps = max(1, round(STEPS * scale))
    teacher = copy.deepcopy(painter).eval().requires_grad_(False).to(run.device)
    painter = painter.train().to(run.device)
    if compiled:
        flow.compile_blocks(painter)
        flow.compile_blocks(teacher)
    vae = vae.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    average = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimiser = flow.Optimisers(painter, RATE)
    start = run.resume("guidance", painter, optimiser, average=average)
    rate = run.one_cycle(steps, warm_up=20)
    pools = Pools(run, vae, flow.PHASES[-1].canvases, run.batch, steps, 10_000_000)
    with run.progress("guidance", steps, start) as progress:
        for step in range(start, steps):
            generator = run.generator(10_000_000 + step)
            canvas, latents, scenes = pools(step)
            sigma = flow.random_sigmas(len(latents), latents.shape[1], generator)
            noisy, _ = flow.noised(latents, sigma, generator)
            prompts = flow.worded(scenes, sigma, random.Random(f"{run.seed} guided words {step}"), run.world)
            # Half of the values from 1 to 6, where requests are; the effect is linear, so the others may be few.
            span = torch.where(torch.rand(run.batch, generator=generator, device=run.device) < 0.5, 5.0, HIGHEST - 1)
            guidance = 1 + span * torch.rand(run.batch, generator=generator, device=run.device)
            with torch.no_grad():
                usual = torch.full((run.batch,), flow.GUIDANCE)
                said, unsaid = (
                    flow.velocity(run, teacher, noisy, sigma, words, usual, *canvas)
                    for words in (prompts, [""] * run.batch)
                )
                wanted = said + strength(guidance).to(run.device)[:, None, None] * (said - unsaid)
            predicted = flow.velocity(run, painter, noisy, sigma, prompts, guidance, *canvas)
            loss = flow.weighted(predicted - wanted, sigma)
            run.step(optimiser, loss, painter, rate(step))
            average.update_parameters(painter)
            progress(step + 1, loss=loss.item())
            run.checkpoint("guidance", step + 1, steps, painter, optimiser, average=average)
    return cast(flow.Painter, average.module).eval()
