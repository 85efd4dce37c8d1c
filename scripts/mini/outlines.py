"""Stage six: outlines. What is left to find of a drawing that can be told from its noise, learnt as an eye sees it.

At such noise levels next to nothing is chance: the whole error is outlines, and it is small. Beside what is chance at
the levels above, its gradients drown, so most batches here are of those levels alone. They come from the painter's own
way there, which begins with a drawing under much noise: under a little, the drawing's own outlines would still be
there to see, as they are not in what it draws itself. The prompt is always the drawing's: a painter that does not
believe it leaves wavering outlines as they are.

And an error of latents says little of what an outline looks like, so that the predicted latents go through the decoder:
the loss is how far the pixels are from what the right latents would give (as a perceptual loss, arXiv 1603.08155, with
the decoder for the network that looks).

One batch in OWN_EVERY is practice at all noise levels, and one is drawings at guidance 1, at which nothing else here
is: it would become what the values above are. What that does not keep as it was, the last act does: the mean of the
weights before and after (as in arXiv 2109.01903) has the outlines of the one and the breadth of the other.
"""

from __future__ import annotations

import random
from typing import cast

import torch
from diffusers import AutoencoderKL

from flux_local.model.latents import unpack

from . import flow, practice
from .pools import Pools
from .practice import Lesson
from .run import Run, between
from .sentences import describe

STEPS = 1600
CANVASES = practice.CANVASES
RATE = 0.2  # of the peak rates of the stage of drawings
AVERAGE = 0.99
TOLD = 0.65  # the noise level below which a drawing can be told; the last three or so of eight steps
OWN_EVERY = 6
PIXELS = 2.0  # weight of the pixels' error, which is about that of the velocity
LOOKED_AT = 0.5  # share of a batch that is decoded, which takes longer than all else
BEGIN = 0.8  # the most noise that a drawing begins under: sizes and backgrounds are then no longer chance
USUAL = 0.7  # share of those that are drawn at the usual guidance, the others between these
GUIDANCE = (3.0, 10.0)
LEARNT = 0.5  # share of the new weights in what is returned; the others are those it began with
OFFSET = 40_000_000  # of this stage's chance
LOOK_EVERY = 500


def told(run: Run, painter: flow.Painter, pools: Pools, turn: int) -> list[Lesson]:
    """The painter's way from a batch of drawings under much noise, as far as a drawing can be told on it; in random
    order."""
    rng = random.Random(f"{run.seed} outlines {turn}")
    generator = run.generator(OFFSET + turn)
    canvas, latents, scenes = pools(turn)
    sigmas = practice.noise_levels(rng, latents.shape[1])
    sigmas = sigmas[rng.choice([at for at, sigma in enumerate(sigmas[:-1]) if sigma < BEGIN]) :]
    x, _ = flow.noised(latents, torch.full((len(latents),), sigmas[0], device=latents.device), generator)
    guidance = torch.tensor([flow.GUIDANCE if rng.random() < USUAL else rng.uniform(*GUIDANCE) for _ in scenes])
    prompts = [describe(scene, rng, run.world).text for scene in scenes]
    _, way = practice.drawn(run, painter, x, sigmas, prompts, guidance, canvas)
    found = [
        Lesson(
            canvas, noisy, torch.full((len(noisy),), sigma, device=noisy.device), prompts, guidance,
            (noisy - latents) / sigma,
        )
        for sigma, noisy in zip(sigmas[:-1], way, strict=True)
        if sigma < TOLD
    ]  # fmt: skip
    rng.shuffle(found)
    return found


def pixels(run: Run, vae: AutoencoderKL, latents: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """Scaled latents [batch, tokens, 64] → pictures [batch, 3, height, width], about −1 to 1, with gradients."""
    z = unpack(latents, *canvas) / vae.config.scaling_factor + vae.config.shift_factor
    with run.autocast():
        return cast(torch.Tensor, vae.decode(z.to(memory_format=torch.channels_last)).sample.float())


def seen(run: Run, vae: AutoencoderKL, predicted: torch.Tensor, lesson: Lesson) -> torch.Tensor:
    """Mean absolute error of the pixels that a predicted velocity leads to, over the first LOOKED_AT of a batch.

    Of the noise on the input nothing is left in either picture: x − σ·v are the latents without it.
    """
    some = slice(max(1, round(LOOKED_AT * len(predicted))))
    noisy, sigma = (part[some].to(run.device) for part in (lesson.noisy, lesson.sigma[:, None, None]))
    made = pixels(run, vae, noisy - sigma * predicted[some], lesson.canvas)
    with torch.no_grad():
        right = pixels(run, vae, noisy - sigma * lesson.wanted[some].to(run.device), lesson.canvas)
    return (made - right).abs().mean()


def train(
    run: Run,
    beginning: flow.Painter,
    vae: AutoencoderKL,
    scale: float = 1.0,
    compiled: bool = True,
    look: flow.Look = lambda painter, step: None,
) -> flow.Painter:
    """Goes on from the last checkpoint; returns the mean of the averaged weights and the beginning's.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
        look: called every LOOK_EVERY steps and at the end with the averaged weights so far.
    """
    torch.manual_seed(run.seed)
    steps = max(2, round(STEPS * scale))
    vae = vae.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    learning = practice.Learning.of(run, beginning, RATE, AVERAGE, compiled)
    start = run.resume("outlines", learning.painter, learning.optimiser, average=learning.average)
    rate = run.one_cycle(steps, warm_up=50)
    pools = Pools(run, vae, CANVASES, run.batch, steps, OFFSET)
    waiting: list[Lesson] = []
    others: list[Lesson] = []
    turn = OFFSET + start
    drawn = start
    with run.progress("outlines", steps, start) as progress:
        for step in range(start, steps):
            kind = {0: "own", OWN_EVERY // 2: "alone"}.get(step % OWN_EVERY, "others")
            if kind == "own" and not waiting:
                waiting = practice.lessons(run, learning.averaged, vae, turn)
                turn += 1
            while kind == "others" and not others:
                others = told(run, learning.averaged, pools, drawn)
                drawn += 1
            if kind == "alone":
                lesson = practice.usual(run, pools, 2 * drawn, alone=1)
            else:
                lesson = (waiting if kind == "own" else others).pop()
            predicted, loss = learning.predicted(run, lesson)
            figures = {kind: loss.item()}
            if kind == "others":
                error = seen(run, vae, predicted, lesson)
                figures["pixels"] = error.item()
                loss = loss + PIXELS * error
            learning.step(run, loss, rate(step))
            progress(step + 1, **figures)
            run.checkpoint("outlines", step + 1, steps, learning.painter, learning.optimiser, average=learning.average)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                look(learning.averaged, step + 1)
    return between(beginning, learning.averaged, LEARNT)
